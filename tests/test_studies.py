"""Studies of many runs, with recorded answers of the commands: what they run and compute, and that they resume."""

import argparse
import json
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

import storage
from cli import UserError
from studies import frontier, mixers, recipe, repeated, runs, slow_links, tokens, two_estimates


@pytest.fixture
def answers(monkeypatch):
    """Replace the commands: train.py and the simulator write a log, evaluate.py answers by a function of its words."""
    calls = []

    def install(bits, val=None):
        val = val or bits

        def answer(script, *arguments):
            words = [script, *map(str, arguments)]
            calls.append(words)
            if script == "evaluate.py":
                found = bits(words[1].removesuffix("/ckpt_best.pt"))
                return json.dumps({"bits_per_token": found, "bits_per_byte": found})
            if "--clock_only" in words:
                return json.dumps({"hours": 1.0, "utilisation": 0.5, "gigabytes": 2.0})
            out = runs.Path(next(word for word in words if word.startswith("--out_dir=")).removeprefix("--out_dir="))
            out.mkdir(exist_ok=True)
            drift = 0.01 * len(calls)
            lines = [{"step": 0, "config": {"seq_len": 128}}] + [
                {"step": step, "val_bits_per_token": val(str(out)) + 1 / step, "val_stderr": 0.1,
                 "hours": step / 10, "drift": drift, "staleness": 1.0, "cosine": 0.5, "utilisation": 0.9,
                 "bytes": {"a-b": 1e9}}
                for step in (50, 100)]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return ""

        monkeypatch.setattr(runs, "call", answer)
        monkeypatch.setattr(runs, "load_meta", lambda *args: {})
        return calls

    return install


def go(module, monkeypatch, folder, *flags):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", str(folder), *flags])
    module.main()
    return json.loads((folder / f"{module.__name__.split('.')[-1]}.json").read_text())


def assert_nothing_runs_again(calls, *call):
    """Call go() once more: what is there is not run again."""
    before = len(calls)
    go(*call)
    assert len(calls) == before


def test_repeated(answers, monkeypatch, tmp_path):
    """The best settings win, the best checkpoint is scored, and the crossing is between the right numbers of epochs."""
    def bits(path):
        folder = path.split("/")[-1]
        kind, size = folder.split("_0.")[0], "0." + folder.split("_0.")[1][:2]
        epochs = int(folder.split("M_")[1].split("_")[0])
        base = 3 - 0.2 * math.log(epochs) + (0.03 * epochs if kind == "left_to_right" and epochs > 16 else 0)
        return base + (0.4 if kind == "diffusion" else 0) + (0.3 if "lr=0.006" in folder else 0) + (
            0.1 if "dropout=0_" in folder else 0) + len(size) / 100

    calls = answers(bits)
    found = go(repeated, monkeypatch, tmp_path / "study", "--seeds", "2")
    assert all(words[1].endswith("ckpt_best.pt") for words in calls if words[0] == "evaluate.py")
    trained = [words for words in calls if words[0] == "train.py"]
    assert len(trained) == 4 * 18 + 4 * 6 + 2 * 4 * 5 - 4 * 2  # seed 1 at 16 and 64 epochs has been trained in tuning
    assert all("--lr=0.006" not in words for words in trained if "--max_steps=12500" in words)
    assert all(64 < x < 128 for by_seed in found["crossings"].values() for x in by_seed)
    of = lambda kind, epochs: next(row for row in found["rows"] if (row["kind"], row["epochs"]) == (kind, epochs))
    assert of("left to right", 128)["best"] == of("left to right", 16)["bits"] < of("left to right", 128)["bits"]
    assert of("diffusion", 128)["best"] == of("diffusion", 128)["bits"]
    assert_nothing_runs_again(calls, repeated, monkeypatch, tmp_path / "study", "--seeds", "2")


def test_validation_chooses(answers, monkeypatch, tmp_path):
    """The best run of up to so many epochs is the one with the best validation, whatever its bits on test."""
    epochs = lambda path: int(path.split("/")[-1].split("M_")[1].split("_")[0])
    answers(lambda path: 3 - 0.1 * (epochs(path) == 4), lambda path: 3 - 0.1 * (epochs(path) == 16))
    found = go(repeated, monkeypatch, tmp_path / "study", "--seeds", "1")
    assert {row["epochs"]: row["best"] for row in found["rows"]} == dict.fromkeys((1, 4, 16, 64, 128), 3)


def test_crossing():
    line = lambda *ys: list(zip((1, 10, 100), ys))
    assert repeated.crossing(line(1, 1, 1), line(2, 2, 2)) is None
    assert repeated.crossing(line(1, 1, 1), line(0, 0, 0)) == 1
    assert repeated.crossing(line(1, 1, 1), line(2, 1.5, 0.5)) == pytest.approx(10 * 10**0.5)
    assert repeated.crossing(line(1, 1, 1), line(0, 2, 2)) is None


def test_frontier(answers, monkeypatch, tmp_path):
    """A known law is found again: the slope and the ratio of operations."""
    factor = {"D3PM": 4.0, "MDLM_fast": 2.0, "blocks_of_16": 1.5, "left_to_right": 1.0}

    def bits(path):
        name, size, budget, *_ = path.split("/")[-1].rsplit("_", 4)
        worse = {"0.2M": 0.1, "0.8M": 0.0, "2.7M": 0.05, "10M": 0.4}[size] + (0.1 if "lr=0.006" in path else 0)
        return 1.3 + 3 * (float(budget) / 1e12 / factor[name]) ** -0.25 + worse

    calls, flags = answers(bits), ["--seeds", "2", "--budgets", "1e12,2e12,4e12,8e12,1.6e13"]
    found = go(frontier, monkeypatch, tmp_path / "study", *flags)
    for row, true in zip(found["methods"], factor.values()):
        assert row["ratio"] == pytest.approx(true, rel=0.02) and row["by_seed"] == pytest.approx([row["ratio"]] * 2)
        assert row["slope"] == pytest.approx(-0.75 * np.log(10) * (8 / true) ** -0.25, rel=0.02) and row["stderr"] == 0
    steps = {(row["method"], row["size"], row["operations"]): row["steps"] for row in found["rows"]}
    assert steps["MDLM, fast", "0.2M", 1.6e13] == pytest.approx(4 * steps["MDLM, fast", "0.2M", 4e12], rel=0.01)
    assert all(row["lr"] != 6e-3 for row in found["rows"])
    assert {row["size"]: row["seeds"] for row in found["rows"]} == {"0.2M": 1, "0.8M": 2, "2.7M": 2, "10M": 1}
    assert all("8e+12" in str(words) for words in calls if "lr=0.006" in str(words))  # tuned with the last but one
    assert_nothing_runs_again(calls, frontier, monkeypatch, tmp_path / "study", *flags)


def test_ratio_of_operations():
    """Between points by a line in log C; outside of the reference it is unknown."""
    reference = [(1e12, 3.0), (1e14, 2.0)]
    assert frontier.ratio([(1e15, 2.5)], reference) == pytest.approx(100)
    assert frontier.ratio([(1e15, 3.0)], reference) == pytest.approx(1000)
    assert frontier.ratio(reference, reference) == 1
    assert frontier.ratio([(1e15, 3.01)], reference) is None and frontier.ratio([(1e15, 1.9)], reference) is None
    assert frontier.slope(reference) == pytest.approx(-0.5)


def test_slow_links(answers, monkeypatch, tmp_path):
    """Servers are tuned first; drift is correlated with what it costs; a second call repeats nothing."""
    calls = answers(lambda path: 3 - 0.5 * ("outer_lr=0.35" in path) + 0.01 * len(calls) / 100)
    found = go(slow_links, monkeypatch, tmp_path / "study", "--seeds", "2")
    assert all(flags == ["--outer_lr=0.35"] for name, flags in found["best"].items() if name != "halos")
    simulated = [words for words in calls if words[0] == "studies/simulator.py" and "--clock_only" not in words]
    assert any("--machines" in " ".join(words) and "halos.txt" in " ".join(words) for words in simulated)
    assert {row["name"] for row in found["rows"]} == {"ddp", "diloco", "async", "async dn", "halos", "plain",
                                                      "lookahead"}
    assert all((tmp_path / "study" / name).exists() for name in ("slow_links.png", "hours.png"))
    curve = [(1, 2.5, 0.0), (2, 2.9, 0.0), (3, 2.4, 0.0), (4, 2.5, 0.0)]
    assert [slow_links.hours_to(bits, curve) for bits in (3.0, 2.5, 2.45, 2.0)] == [1, 3, None, None]
    assert_nothing_runs_again(calls, slow_links, monkeypatch, tmp_path / "study", "--seeds", "2")


def test_two_estimates(monkeypatch, tmp_path, capsys):
    """Every run inside the folders is checked once; one that disagrees ends the command with exit code 1."""
    for name in ("a/one", "a/two", "b", "nan", "after"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ckpt.pt").touch()
    calls = []

    def answer(script, out, *words, ok):
        calls.append((out.name, words))
        if out.name == "nan":
            raise UserError("the likelihood is not finite")
        difference = {"one": 0.02, "two": 0.00001, "b": -0.5}[out.name]
        return json.dumps({"bits_per_token": 2 + difference, "check": {
            "agree": abs(difference) < 0.1, "difference": difference, "stderr": 0.01, "second": {"bits_per_token": 2}}})

    monkeypatch.setattr(runs, "call", answer)
    monkeypatch.setattr(storage, "read", lambda out: {
        "config": {"seq_len": 8, "objective": "ar" if out.name in ("two", "after") else "mdlm",
                   "prefix": "fixed:4" if out.name == "after" else "none"}, "ema": weights})
    weights = {"one": 1}
    go_on = lambda *folders: (monkeypatch.setattr(sys, "argv", ["two_estimates.py", *map(str, folders)]),
                              two_estimates.main())
    go_on(tmp_path / "a", tmp_path / "a" / "one", tmp_path / "nan")
    printed = capsys.readouterr().out
    assert "2 agree, 0 disagree; 1 estimates with noise: mean of z +2.00, of z² 4.00, largest |z| 2.00" in printed
    assert "no likelihood" in printed and [name for name, _ in calls] == ["one", "two", "nan"]
    assert len({words[words.index("--seed") + 1] for _, words in calls}) == 3  # each has noise of its own
    assert "--repeats" in calls[0][1] and "--repeats" not in calls[1][1] and 8 * 512 in calls[0][1]
    with pytest.raises(SystemExit) as stopped:
        go_on(tmp_path / "a", tmp_path / "b")
    assert stopped.value.code == 1 and len(calls) == 4 and "2 agree, 1 disagree" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no run"):
        go_on(tmp_path / "missing")
    for again in (["--windows", "199"], ["--windows", "199", "--repeats", "3"]):  # other questions, and other weights
        go_on(tmp_path / "a" / "one", *again)
    weights["one"] = 2
    for _ in range(2):
        go_on(tmp_path / "a" / "one", *again)
    assert len(calls) == 7 and 8 * 199 in calls[-1][1]
    go_on(tmp_path / "after")  # an exact likelihood, given prefixes
    assert len(calls) == 7 and "no second way" in capsys.readouterr().out


def test_tokens(answers, monkeypatch, tmp_path):
    """All kinds see as many bytes, each with its own data set; what characters cost is computed from the best rates."""
    def bits(path):
        name = path.split("/")[-1]
        kind = 2 + ("characters" in name) * (0.3 + 0.2 * ("diffusion" in name) - 0.15 * ("diffusion_shift" in name))
        return kind + 0.1 * ("lr=0.003" not in name) + 0.001 * int(name[-1])

    calls = answers(bits)
    for name, tokenizer, per_token in (("x", {"tokenizer": "char", "alphabet": "ab", "vocab_size": 2}, 1),
                                       ("x_bpe4096", {"tokenizer": "hf", "vocab_size": 4096, "definition": ""}, 5)):
        split = lambda value: dict.fromkeys(("train", "val", "test"), value)
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps(tokenizer | {
            "dtype": "uint16", "sizes": split(10**6 // per_token), "bytes": split(10**6), "sha256": split("")}))
    flags = ["--seeds", "2", "--dataset", "x", "--data_dir", str(tmp_path)]
    found = go(tokens, monkeypatch, tmp_path / "study", *flags)
    trained = [words for words in calls if words[0] == "train.py"]
    assert len(trained) == 8 * 3 + 8
    for words in trained:
        value = {word.split("=")[0]: word.split("=")[-1] for word in words}
        per_token = 5 if value["--dataset"] == "x_bpe4096" else 1
        assert int(value["--max_steps"]) * int(value["--seq_len"]) * per_token == pytest.approx(1500 * 128, rel=1e-3)
    assert [row["lr"] for row in found["rows"]] == [3e-3] * 8
    expected = [0.5, 0.35, 0.3, 0.3, 0.2, 0.05]
    assert [mean for mean, _ in found["answers"].values()] == pytest.approx(expected)
    assert_nothing_runs_again(calls, tokens, monkeypatch, tmp_path / "study", *flags)


def test_recipe(answers, monkeypatch, tmp_path):
    """Each choice is compared with the same seed; batches and shares change the number of steps; nothing runs twice."""
    def bits(path):
        name = path.split("/")[-1]
        words = dict(word.split("=") for word in name.split("_") if "=" in word)
        seed, nano = int(name[-1]), "d3pm" in name
        return (2 + 0.4 * nano + abs(math.log2(float(words["lr"]) / 3e-3)) + 0.3 * (1 - float(words["share"]))
                + 0.05 * ("batch_size=32" in name) - 0.02 * seed * ("weight_decay=0_" in name) + 0.001 * seed)

    calls = answers(bits)
    found = go(recipe, monkeypatch, tmp_path / "study", "--seeds", "2", "--sizes", "128x4")
    assert [row["lr"] for row in found["recipes"]] == [3e-3, 1e-3, 3e-3, 3e-3, 3e-3]
    assert [row["bits"] for row in found["recipes"]] == pytest.approx(
        [2.4015, 2.4015 + math.log2(3), 2.1515, 2.0765, 2.0015])
    nothing, *changes = found["changes"]
    assert nothing == {"size": "128x4", "change": "nothing", "bits": pytest.approx(2.0115)}
    more = {row["change"]: (row["more"], row["stderr"]) for row in changes}
    assert more.pop("weight_decay=0") == pytest.approx((-0.03, 0.01))
    assert more.pop("batch_size=32")[0] == pytest.approx(0.05)
    assert len(more) == 5 and all(value == pytest.approx((0, 0), abs=1e-9) for value in more.values())
    found = go(recipe, monkeypatch, tmp_path / "study", "--seeds", "2")
    assert {row["size"] for row in found["recipes"]} == {"128x4", "384x6"} and len(found["changes"]) == 16
    outs = set()
    for words in (words for words in calls if words[0] == "train.py"):
        value = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
        assert words[-1] == "--resume=auto"
        outs.add(name := value["out_dir"].split("/")[-1])
        named = dict(word.split("=") for word in name.split("_") if "=" in word)
        usual = 32 if words[1] == "d3pm_mini" else 16
        batch = int(value["micro_batch_size"])
        assert batch == int(value.get("batch_size", usual))
        assert int(value["max_steps"]) * batch == 12_800 * float(named["share"])
        assert float(value["lr"]) == pytest.approx(float(named["lr"]) * (batch / usual) ** 0.5)
        steps, share_of_warmup = int(value["max_steps"]), 0.1 if usual == 32 else 0.05
        assert int(value["warmup_steps"]) == round(share_of_warmup * steps)
        assert (int(value["eval_interval"]), value["eval_sequences"]) == (steps, "1024")
        assert (value["n_embd"], value["n_layer"]) == (("384", "6") if name.startswith("384x6") else ("128", "4"))
        if "decay=" not in name:
            assert float(value["ema_decay"]) == pytest.approx(0.99 ** (batch / usual))
    assert len(outs) == sum(words[0] == "train.py" for words in calls)
    for words in (words for words in calls if words[0] == "evaluate.py"):
        assert ("exact_k" in words) == ("d3pm_mini" in words[1])
    assert_nothing_runs_again(calls, recipe, monkeypatch, tmp_path / "study", "--seeds", "2")


def test_a_run_that_diverges(answers, monkeypatch, tmp_path):
    """Its bits and its validation are infinite, and it is not trained again; any other error ends the study."""
    args = argparse.Namespace(dataset="x", data_dir="", flags=[], windows=8)
    message = "train.py failed: the weights are not finite after step 7"

    def fail(script, *words):
        calls.append(script)
        raise UserError(message)

    calls = []
    monkeypatch.setattr(runs, "call", fail)
    for _ in range(2):
        assert runs.trained(tmp_path / "one", [], args) == {"bits": math.inf, "val": math.inf}
        assert runs.validated(tmp_path / "two", [], args) == {"val": math.inf}
    assert len(calls) == 2
    message = "no space is left"
    for function in (runs.trained, runs.validated):
        with pytest.raises(UserError, match="no space"):
            function(tmp_path / "three", [], args)


def test_a_likelihood_that_is_infinite(answers, monkeypatch, tmp_path):
    """A run whose validation is good and whose likelihood is not finite is not chosen. What was measured is kept, also
    without the run's folder."""
    args = argparse.Namespace(dataset="x", data_dir="", flags=[], windows=8)
    calls = answers(lambda path: math.nan if path.endswith("bad") else 3.0, lambda path: 2.0)
    answer = runs.call

    def refuse(script, out, *words):
        if script == "evaluate.py" and out.name == "bad":
            raise UserError("evaluate.py failed: the likelihood is not finite")
        return answer(script, out, *words)

    monkeypatch.setattr(runs, "call", refuse)
    for _ in range(2):
        assert runs.validated(tmp_path / "bad", [], args)["val"] < 3
        assert runs.trained(tmp_path / "bad", [], args) == {"bits": math.inf, "val": math.inf}
        found = runs.trained(tmp_path / "good", [], args)
        assert found["bits"] == 3 and found["val"] == pytest.approx(2.01)
        (tmp_path / "good" / "log.jsonl").unlink(missing_ok=True)
    assert [words[0] for words in calls] == ["train.py", "train.py", "evaluate.py"]


def test_a_run_that_is_stopped(answers, monkeypatch, tmp_path):
    """Nothing is kept of a run that Ctrl-C ended early, so that the next call goes on with it."""
    args = argparse.Namespace(dataset="x", data_dir="", flags=[], windows=8)
    calls = answers(lambda path: 3.0)
    answer = runs.call

    def stop(script, *words):
        answer(script, *words)
        with open(tmp_path / "one" / "log.jsonl", "a") as file:
            file.write(json.dumps({"step": 100, "stopped": "SIGINT"}) + "\n")

    for function in (runs.validated, runs.trained):
        monkeypatch.setattr(runs, "call", stop)
        with pytest.raises(UserError, match="one was stopped: the same command goes on"):
            function(tmp_path / "one", [], args)
        assert [path.name for path in tmp_path.iterdir()] == ["one"]
    monkeypatch.setattr(runs, "call", answer)
    assert runs.trained(tmp_path / "one", [], args)["bits"] == 3 and len(calls) == 4


def test_flags_of_the_network(monkeypatch, tmp_path):
    """A study chooses some settings itself, such as the sizes that its costs and budgets are of."""
    for module, key, *more in ((frontier, "n_embd"), (mixers, "n_embd", "--table=masks"), (recipe, "n_layer"),
                               (repeated, "dropout"), (tokens, "max_steps"), (slow_links, "seed"), (recipe, "lr")):
        with pytest.raises(UserError, match=f"--flags {key}=32: this study chooses {key} itself"):
            go(module, monkeypatch, tmp_path / "study", *more, "--flags", "beta2=0.9", f"{key}=32")
    with pytest.raises(UserError, match="is not prepared"):
        go(tokens, monkeypatch, tmp_path / "study", "--dataset", "nothing", "--flags", "n_embd=32")
    assert not (tmp_path / "study").exists()


def test_a_study_that_is_ended_ends_its_runs(monkeypatch, tmp_path):
    """SIGTERM reaches the processes that a study has started, and no more are begun."""
    (tmp_path / "long.py").write_text("import sys, time\nopen(sys.argv[1], 'w').close()\ntime.sleep(600)\n")

    def end(number, frame):
        raise SystemExit(143)

    def work(name):
        threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        runs.call(tmp_path / "long.py", tmp_path / name)

    before = signal.signal(signal.SIGTERM, end)
    began = time.time()
    with pytest.raises(SystemExit):
        runs.in_stages([[("a",), ("b",)]], work, 1)
    signal.signal(signal.SIGTERM, before)
    assert time.time() - began < 60 and not runs.RUNNING and not (tmp_path / "b").exists()


def test_slope():
    """The slope is that of the finite points; nan if there are fewer than two."""
    points = [(1e12, 3.0, None), (1e13, 2.5, None), (1e14, math.inf, None)]
    assert frontier.slope(points) == pytest.approx(-0.5) and math.isnan(frontier.slope(points[1:]))


def test_what_a_study_runs(answers, monkeypatch, tmp_path):
    """Every training has --flags, and every score is of so many windows of the test split."""
    calls = answers(lambda path: 3.0)
    go(frontier, monkeypatch, tmp_path / "study", "--seeds", "1", "--budgets", "1e12,4e12", "--windows", "99",
       "--flags", "dropout=0.3")
    for words in calls:
        if words[0] == "train.py":
            assert "--dropout=0.3" in words and words[-1] == "--resume=auto"
        else:
            assert (words[words.index("--split") + 1], words[words.index("--n_tokens") + 1]) == ("test", str(99 * 128))


def test_settings_before_the_first_run_can_change(monkeypatch, tmp_path):
    """A folder that has nothing but its settings takes others. One with runs takes neither others nor other data."""
    args = argparse.Namespace(dataset="x", data_dir="", windows=8)
    monkeypatch.setattr(runs, "load_meta", lambda *_: {"sha256": {"train": data}})
    data = "abc"
    runs.make_folder(tmp_path / "study", args)
    args.windows = 9
    runs.make_folder(tmp_path / "study", args)
    (tmp_path / "study" / "run").mkdir()
    data = "abd"
    with pytest.raises(UserError, match="has runs with data=abc, not abd"):
        runs.make_folder(tmp_path / "study", args)
    for damaged in ("{", "[]"):
        (tmp_path / "study" / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="settings.json is damaged: restore it"):
            runs.make_folder(tmp_path / "study", args)


def test_tuned():
    """The search goes on while the best rate is an end, and not after runs that are equal or all diverged."""
    val = {"large": lambda rate: abs(math.log2(rate / 0.024)), "small": lambda rate: abs(math.log2(rate / 4e-4)),
           "middle": lambda rate: abs(math.log2(rate / 3e-3)), "flat": lambda rate: 1.0, "bad": lambda rate: math.inf}
    best, found = runs.tuned([(kind,) for kind in val], lambda kind, rate, seed: {"val": val[kind](rate)}, 1)
    assert {kind: rate for (kind,), rate in best.items()} == {
        "large": 0.024, "small": 3.75e-4, "middle": 3e-3, "flat": 1.5e-3, "bad": 1.5e-3}
    assert sorted(rate for kind, rate, _ in found if kind == "large") == [1.5e-3, 3e-3, 6e-3, 0.012, 0.024, 0.048]
    assert len(found) == 6 + 6 + 3 * 3


def test_correlation():
    g = np.random.default_rng(0)
    x = g.standard_normal(400)
    y = 0.6 * x + 0.8 * g.standard_normal(400)
    assert slow_links.correlation(x, y) == pytest.approx(
        ((x - x.mean()) * (y - y.mean())).mean() / x.std() / y.std())
    assert slow_links.correlation([1, 1], [2, 3]) is None and slow_links.correlation([], []) is None


def test_other_settings_are_other_runs(answers, monkeypatch, tmp_path):
    """A folder keeps its settings: a study that would mix runs of two kinds is refused. More seeds and budgets are
    allowed, and add their own runs alone."""
    calls = answers(lambda path: 3.0)
    go(frontier, monkeypatch, tmp_path / "study", "--seeds", "1", "--budgets", "1e12,4e12")
    before = len(calls)
    go(frontier, monkeypatch, tmp_path / "study", "--seeds", "2", "--budgets", "1e11,1e12,4e12")
    assert len(calls) - before == 2 * (4 * 4 + 3 * 4 * 2)  # a training and a score of each new run
    with pytest.raises(UserError, match="has runs with windows=1024, not 99"):
        go(frontier, monkeypatch, tmp_path / "study", "--budgets", "1e12,5e12", "--windows", "99")
    for budgets, message in (("1e12", "at least two numbers"), ("1e12,0", "0 is outside"), ("x,1", "'x' is not")):
        with pytest.raises(UserError, match=message):
            go(frontier, monkeypatch, tmp_path / "other", "--budgets", budgets)
    assert not (tmp_path / "other").exists()


def test_a_wrong_data_set_leaves_nothing(monkeypatch, tmp_path):
    """A data set that does not exist is refused before the folder is made, so that the right one can still be named."""
    for module in (frontier, repeated, slow_links, tokens):
        with pytest.raises(UserError, match="'nothing' is not prepared"):
            go(module, monkeypatch, tmp_path / "study", "--dataset", "nothing")
    assert not (tmp_path / "study").exists()


def test_a_diverged_run_does_not_end_a_study(answers, monkeypatch, tmp_path):
    """It has no bits, is never chosen, and is not run again."""
    calls = answers(lambda path: 3.0)
    answer = runs.call

    def diverge(script, *arguments):
        if "--outer_lr=0.7" in arguments and "simulator" in script and "--clock_only" not in arguments:
            raise UserError("loss or gradient of worker 2 is not finite")
        return answer(script, *arguments)

    monkeypatch.setattr(runs, "call", diverge)
    found = go(slow_links, monkeypatch, tmp_path / "study", "--seeds", "1")
    assert all("--outer_lr=0.7" not in flags for flags in found["best"].values())
    assert_nothing_runs_again(calls, slow_links, monkeypatch, tmp_path / "study", "--seeds", "1")
