"""The command lines, on tiny data: prepare, evaluate, sample; what they say to bad input; the README. Training itself
is in test_runs.py, test_processes.py and test_damage.py."""

import argparse
import ast
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cli
import configs
import likelihood
import storage
from commands import ROOT, SMALL, Result, assert_one_line, log, train
from conftest import TRAINED
from data.loader import load_split
from test_checkpoint import changed


# ---- what all commands share -----------------------------------------------------------------------------------------


def test_control_characters_on_a_terminal():
    """They could move the cursor, so · stands for them. A file gets the text as it is."""
    text = "a\tb\n\x1b[31mc\rd\x9be é"
    assert cli.for_terminal(text, SimpleNamespace(isatty=lambda: True)) == "a\tb\n·[31mc·d·e é"
    assert cli.for_terminal(text, SimpleNamespace(isatty=lambda: False)) == text


def test_numbers_of_thousands_of_digits(call):
    """A line that quotes one is short."""
    for command in (["sample.py", "--steps="], ["sample.py", "--steps=x"], ["train.py", "demo", "--n_layer="]):
        result = call(*command[:-1], command[-1] + "9" * 4000)
        assert_one_line(result, "9...")
        assert len(result.err) < 200


def test_ctrl_c_while_torch_is_loaded(tmp_path):
    """It ends a command without a traceback. During main() it is a KeyboardInterrupt, as in any Python program."""
    heed_ctrl_c = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs do not
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    commands = [path for folder in (ROOT, ROOT / "data", ROOT / "studies") for path in sorted(folder.glob("*.py"))
                if "run(main" in path.read_text(encoding="utf-8")]
    assert len(commands) > 20
    for command in commands:
        done = subprocess.run([sys.executable, command], env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=50,
                              capture_output=True, text=True, preexec_fn=heed_ctrl_c)
        assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", ""), command
    code = ("import signal, sys; sys.argv[0] = 'plot.py'; import cli; "
            "cli.run(lambda: signal.raise_signal(signal.SIGINT))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          preexec_fn=heed_ctrl_c)
    assert (done.returncode, done.stderr) == (130, "\nplot.py: interrupted\n")


# ---- evaluate and sample ---------------------------------------------------------------------------------------------


def test_evaluate(call, data_dir, trained):
    """One JSON object on stdout; the whole split; the number is reproducible and near the last validation."""
    result = call("evaluate.py", trained, "--split", "test", "--json", "--baselines", "--data_dir", data_dir)
    scored = json.loads(result.out)
    n = json.loads((data_dir / "tiny" / "meta.json").read_text())["sizes"]["test"]
    assert scored["n_sequences"] == n // 32 and scored["n_tokens"] == n // 32 * 32
    assert 0 < scored["stderr"] < 0.5 and set(scored["baselines"]) > {"uniform", "5-gram"}
    assert call("evaluate.py", trained, "--split=test", "--json", "--data_dir", data_dir).out.count("\n") == 1
    last = [line["val_bits_per_token"] for line in log(trained) if "val_bits_per_token" in line][-1]
    assert abs(scored["bits_per_token"] - last) < 6 * scored["stderr"]
    plain = call("evaluate.py", trained, "--n_tokens", "64", "--data_dir", data_dir)
    assert "bits per char on tiny val (2 windows of 32;" in plain.out


def test_more_repeats(call, data_dir, trained):
    """Repeats average independent noise."""
    score = lambda *a: json.loads(call("evaluate.py", trained, "--json", "--data_dir", data_dir, *a).out)
    one, many = score("--batch_size=3"), score("--repeats=8")
    assert many["stderr"] < one["stderr"] and abs(many["bits_per_token"] - one["bits_per_token"]) < 5 * one["stderr"]


def test_two_checkpoints(call, data_dir, trained, tmp_path):
    """evaluate.py A B: both on the same windows and masks, and their difference; a checkpoint does not differ from
    itself, and weights of two moments differ by more than their noise."""
    result = call("evaluate.py", trained, trained, "--json", "--data_dir", data_dir)
    same = json.loads(result.out)
    assert same["difference"] == same["difference_stderr"] == 0 and result.err.count("bits per char on tiny val") == 2
    assert train(call, "d3pm_text8", data_dir, tmp_path / "d3pm", "--max_steps=2").code == 0
    result = call("evaluate.py", trained, tmp_path / "d3pm", "--data_dir", data_dir, "--json")
    other = json.loads(result.out)
    one, two = other["models"]
    assert other["difference"] == pytest.approx(two["bits_per_token"] - one["bits_per_token"])
    assert other["difference"] > 10 * other["difference_stderr"] > 0
    assert one["estimator"] == two["estimator"] == "continuous-time bound, exact k"  # d3pm's own has T steps
    assert "T = 50" in call("evaluate.py", tmp_path / "d3pm", "--data_dir", data_dir).out


def test_two_checkpoints_on_different_texts(call, data_dir, trained, tmp_path):
    """The same data set's name, but each checkpoint finds another text under it: no difference is printed."""
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "tiny")
    payload = torch.load(trained / "ckpt.pt", weights_only=True)
    payload["config"]["data_dir"] = str(tmp_path / "data")
    payload.pop("sha256")
    storage.save(tmp_path / "other.pt", payload)
    assert call("evaluate.py", trained, tmp_path / "other.pt").code == 0
    tokens = bytearray((tmp_path / "data" / "tiny" / "val.bin").read_bytes())
    (tmp_path / "data" / "tiny" / "val.bin").write_bytes(tokens[::-1])
    assert_one_line(call("evaluate.py", trained, tmp_path / "other.pt"), "have different data under the name of tiny")


def test_scores_after_a_prefix(call, data_dir, trained, tmp_path):
    """They are not compared with those of whole windows. With --block_size the prefix may end inside a block."""
    out = changed(trained, tmp_path / "out", config=lambda config: config | {"prefix": "fixed:9"})
    go = lambda *a: call("evaluate.py", *a, "--data_dir", data_dir)
    assert_one_line(go(trained, out), "scored after different prefixes (none and fixed:9)")
    found = go(out, "--block_size=8", "--seq_len=16", "--check", "--repeats=9")
    assert found.code == 0 and found.out.count("given a prefix (fixed:9), blocks of 8") == 2 and "agree" in found.out


def test_estimators(call, data_dir, trained):
    """--estimator and --T choose, --seed draws other noise, --check finds two to agree, --order gives a likelihood, in
    the same JSON."""
    score = lambda *a: json.loads(call("evaluate.py", trained, "--json", "--data_dir", data_dir, *a).out)
    default, few = score(), score("--T=2")
    assert score("--estimator=continuous")["estimator"] == "continuous-time bound, independent masks"
    assert few["estimator"] == "T-step bound, T = 2" and few["bits_per_token"] > default["bits_per_token"]
    assert score("--estimator=t_step")["estimator"] == "T-step bound, T = 50"
    assert score("--seed=1")["bits_per_token"] != default["bits_per_token"]
    assert default["perplexity"] == pytest.approx(2 ** default["bits_per_token"])
    assert default["bits_per_char"] == default["bits_per_byte"] == pytest.approx(default["bits_per_token"])
    checked = score("--check", "--seq_len=8", "--repeats=5")["check"]
    assert checked["agree"] and abs(checked["difference"]) < 4 * checked["stderr"]
    for order in ("l2r", "random", "confidence"):
        assert score(f"--order={order}")["estimator"] == f"negative log-likelihood, order {order}"
    assert abs(score("--order=random")["bits_per_token"] - default["bits_per_token"]) < 6 * default["stderr"]


def test_every_error_leaves_out_the_trend(call, data_dir, trained, monkeypatch):
    """The errors of a model, of a difference of two, and of a check are computed from values sorted by mask rate."""
    orders, real = [], likelihood.mean_and_error

    def spy(values, by_stratum=None):
        orders.append(by_stratum)
        return real(values, by_stratum)

    monkeypatch.setattr(likelihood, "mean_and_error", spy)
    for words in (("--check",), (trained,)):
        assert call("evaluate.py", trained, *words, "--seq_len=8", "--split=train", "--n_tokens=2400", "--data_dir",
                    data_dir).code == 0
    assert len(orders) == 6 and all(order is not None for order in orders)


def test_numbers():
    """Different numbers in order, or an error for one that is outside or none."""
    parse = cli.numbers(float, 1, 10)
    assert parse("4,1,4,2") == [1, 2, 4]
    for wrong in ("0,1", "1,11", "1,", ""):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(wrong)


def test_failed_check(call, data_dir, trained, monkeypatch):
    """An estimator that leaves out the small rates is found out: exit code 1, in words and in JSON."""
    import diffusion
    exact_k = diffusion.Absorbing.exact_k
    monkeypatch.setattr(diffusion.MDLM, "exact_k", lambda self, u, v, pick=None: exact_k(self, 0.5 + u / 2, v))
    result = call("evaluate.py", trained, "--check", "--seq_len=8", "--repeats=5", "--data_dir", data_dir)
    assert result.code == 1 and "they DISAGREE" in result.out
    result = call("evaluate.py", trained, "--check", "--json", "--seq_len=8", "--repeats=5", "--data_dir", data_dir)
    assert result.code == 1 and json.loads(result.out)["check"]["agree"] is False


def test_zero_shot(call, trained, tmp_path):
    """--text brings a text into text8's symbols and scores whole windows of it, without any data set."""
    (tmp_path / "cat.txt").write_text("The cat sat on the MAT, and the dog... sat on the log! " * 3)
    result = call("evaluate.py", trained, "--text", tmp_path / "cat.txt", "--data_dir=/nonexistent", "--json")
    scored = json.loads(result.out)
    assert scored["n_sequences"] == 4 and scored["split"] is None and scored["dataset"].endswith("cat.txt")
    assert "in text8's 27 symbols, no detokenisation; the last 21 tokens left out" in result.err
    assert_one_line(call("evaluate.py", trained, trained, "--text", "/dev/null"), "a pipe can be read only once")
    short = json.loads(call("evaluate.py", trained, "--text", tmp_path / "cat.txt", "--seq_len=8", "--json").out)
    assert short["n_sequences"] == 18 and short["seq_len"] == 8


def test_studies(call, data_dir, trained, tmp_path):
    """--curve and --curse write tables, JSON and pictures."""
    go = lambda *a: call("evaluate.py", trained, "--data_dir", data_dir, "--out_dir", tmp_path, "--n_tokens=640", *a)
    bound = json.loads(call("evaluate.py", trained, "--repeats=8", "--data_dir", data_dir, "--json").out)
    result = go("--curve", "--json")
    curve = json.loads(result.out)
    assert curve == json.loads((tmp_path / "curve.json").read_text()) and curve["mask_rate"][-1] == 1
    assert abs(curve["area"] - bound["bits_per_token"]) < 0.3 and curve["bits_per_token"][-1] > curve["area"]
    assert "area under it" in go("--curve").out
    n = json.loads((data_dir / "tiny" / "meta.json").read_text())["sizes"]["val"]
    whole = call("evaluate.py", trained, "--data_dir", data_dir, "--out_dir", tmp_path, "--curve", "--json")
    assert json.loads(whole.out)["n_sequences"] == min(n // 32, 256)
    curse = json.loads(go("--curse", "--json").out)["curse"][0]
    assert [row["tokens"] for row in curse["rows"]] == [1, 2, 4, 8, 16, 32]
    assert all(row["tokens"] == row["characters"] for row in curse["rows"])
    assert curse["rows"][0]["gap"] == 0 and curse["rows"][-1]["gap"] > 0.3
    assert curse["rows"][-1]["parallel"] == pytest.approx(curve["bits_per_token"][-1], abs=0.01)
    for name in ("curve.png", "curse.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"curve.json", "curve.png", "curse.json", "curse.png"}
    one = go("--curve", "--json", "--n_tokens=1")  # one window has no standard error, and JSON no NaN
    assert set(json.loads(one.out)["stderr"]) == {None}
    assert json.loads(go("--curse", "--json", "--n_tokens=1").out)["curse"][0]["n_sequences"] == 1
    score = lambda *a: call("evaluate.py", trained, "--data_dir", data_dir, "--n_tokens=1", *a).out
    assert json.loads(score("--json"))["stderr"] is None and "(n = 1)" in score()


@pytest.mark.parametrize("objective, config", [("ar", "ar_text8"), ("mdlm", "mdlm_text8")])
def test_known_entropy(call, tmp_path, objective, config):
    """Tossed coins, P(b) = 0.11: every kind of model finds half a bit per character, no less."""
    import random
    coins = "".join(random.Random(1).choices("ab", [0.89, 0.11], k=20_000))
    (tmp_path / "coins.txt").write_text(coins)
    assert call("data/prepare_textfile.py", tmp_path / "coins.txt", "--name=coins", "--data_dir", tmp_path).code == 0
    assert train(call, config, tmp_path, tmp_path / "out", "--dataset=coins", "--max_steps=80", "--lr=3e-3",
                 "--ema_decay=0.9", "--eval_interval=80").code == 0
    scored = json.loads(call("evaluate.py", tmp_path / "out", "--json", "--repeats=4", "--split=test").out)
    share = coins[-1000:].count("b") / 1000
    entropy = -0.11 * math.log2(0.11) - 0.89 * math.log2(0.89)
    on_test = -share * math.log2(0.11) - (1 - share) * math.log2(0.89)
    assert entropy == pytest.approx(0.5, abs=0.001)
    assert scored["bits_per_token"] == pytest.approx(on_test, abs=0.05)


def test_sample(call, trained, tmp_path):
    """Samples go to stdout and --out, without masks, the same for the same seed, and need no data set."""
    first = call("sample.py", trained, "--batch_size", "3", "--steps", "10", "--seed", "5", "--out", tmp_path / "s.txt")
    again = call("sample.py", trained, "--batch_size", "3", "--steps", "10", "--seed", "5", "--json")
    other = call("sample.py", trained, "--batch_size", "3", "--steps", "10", "--seed", "6", "--json")
    parsed = json.loads(again.out)
    texts = [sample["text"] for sample in parsed["samples"]]
    assert first.out == "\n\n".join(texts) + "\n" and (tmp_path / "s.txt").read_text() == "\n".join(texts) + "\n"
    assert all(len(text) == 32 and set(text) <= set(" abcdefghijklmnopqrstuvwxyz") for text in texts)
    assert all(0 <= token < 27 for sample in parsed["samples"] for token in sample["tokens"])
    assert parsed["nfe"] <= 10 and parsed["steps"] == 10 and parsed["seed"] == 5
    assert texts != [sample["text"] for sample in json.loads(other.out)["samples"]]


def test_show(call, data_dir, trained):
    """--show prints some ten states in plain lines where stderr is no terminal, from all masks to none;
    --show_intermediate every n-th, and the last."""
    result = call("sample.py", trained, "--show", "--steps", "200", "--known_words", "--data_dir", data_dir)
    states = re.findall(r"step (\d+), (\d+) masks? left\n(.*)\n", result.err)
    masks = [state.count("░") for *_, state in states]
    assert masks == [int(left) for _, left, _ in states] == sorted(masks, reverse=True)
    assert masks[0] == 32 and masks[-1] == 0 and 8 <= len(masks) <= 12
    assert states[-1][2] == result.out.rstrip("\n") and "% of the words occur" in result.err
    result = call("sample.py", trained, "--show_intermediate", "8", "--steps", "20")
    states = re.findall(r"step (\d+), .*\n(.*)\n", result.err)
    assert [int(step) for step, _ in states] == [0, 8, 16, 20] and states[-1][1] == result.out.rstrip("\n")
    states = re.findall(r"step (\d+),", call("sample.py", trained, "--show_intermediate", "--steps", "5").err)
    assert [int(step) for step in states] == list(range(6))


def test_show_on_a_terminal(trained):
    """On a terminal the frames overwrite each other and highlight what is new."""
    import pty
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, ROOT / "sample.py", trained, "--show", "--steps", "5"], stderr=slave,
                               stdout=subprocess.PIPE, text=True)
    os.close(slave)
    frames = b""
    try:
        while chunk := os.read(master, 65536):
            frames += chunk
    except OSError:
        pass  # how a pseudo-terminal says that the other end is closed
    text = process.stdout.read()
    assert process.wait() == 0 and len(text) == 33
    assert frames.count(b"\x1b[2A") >= 3 and b"\x1b[1;32m" in frames and b"step 5, 0 masks left" in frames


def test_autoregressive(call, data_dir, trained, tmp_path, monkeypatch):
    """The baseline is trained, scored and sampled by the same commands; what has no meaning for it is refused."""
    out = tmp_path / "out"
    assert train(call, "ar_text8", data_dir, out, "--max_steps=40", "--lr=0.01", "--sample_interval=40",
                 "--time_sampling=stratified").code == 0
    bits = [line["val_bits_per_token"] for line in log(out) if "val_bits_per_token" in line]
    assert bits[-1] < bits[0] - 0.5
    scored = json.loads(call("evaluate.py", out, "--json").out)
    assert scored["estimator"] == "negative log-likelihood, chain rule"
    again = json.loads(call("evaluate.py", out, "--json", "--seed=5", "--batch_size=3").out)
    assert again["bits_per_token"] == pytest.approx(scored["bits_per_token"], rel=1e-5)  # there is no noise in it
    sampled = json.loads(call("sample.py", out, "--json", "--batch_size=2").out)
    assert sampled["nfe"] == sampled["steps"] == 32 and sampled["sampler"] == "left_to_right"
    exact = call("evaluate.py", out, "--check", "--json", "--seq_len=8")  # without noise few windows will do
    assert json.loads(exact.out)["check"]["agree"]
    for flag, words in (("--curve", "autoregressive"), ("--curse", "autoregressive"), ("--T=5", "is exact"),
                        ("--estimator=exact_k", "is exact"), ("--order=random", "has only one order")):
        assert_one_line(call("evaluate.py", out, flag), words)
    # The second model is checked before the first is scored.
    monkeypatch.setattr(likelihood, "nll_of", None)
    for flags in ((), ("--text", ROOT / "README.md")):
        assert_one_line(call("evaluate.py", trained, out, "--order=random", *flags), "has only one order")
    assert_one_line(call("sample.py", out, "--steps=4"), "one step per token")
    assert_one_line(call("train.py", "ar_text8", "--conditioning=step"), "objective=ar has no time")


def test_gpt2_tokens(call, gpt2, data_dir, tmp_path):
    """A data set of GPT-2 tokens: train, evaluate in bits per token, sample text."""
    call("data/prepare_textfile.py", data_dir / "text.txt", "--name", "bpe", "--tokenizer", "gpt2",
         "--data_dir", tmp_path)
    result = call("train.py", "mdlm_openwebtext_8gpu", *SMALL, "--dataset=bpe", f"--data_dir={tmp_path}",
                  f"--out_dir={tmp_path / 'out'}", "--max_steps=2", "--log_interval=1")
    assert result.code == 0 and "bits/token" in result.out
    assert "bits per token on bpe val" in call("evaluate.py", tmp_path / "out").out
    scored = json.loads(call("evaluate.py", tmp_path / "out", "--json").out)
    tokens = load_split("bpe", "val", 32, tmp_path)[:scored["n_tokens"]]
    n_bytes = len(gpt2.decode(tokens).encode())
    assert scored["bits_per_byte"] == pytest.approx(scored["bits_per_token"] * scored["n_tokens"] / n_bytes)
    assert scored["bits_per_char"] == scored["bits_per_byte"] < scored["bits_per_token"] / 2
    sample = json.loads(call("sample.py", tmp_path / "out", "--json", "--steps=4").out)["samples"][0]
    assert sample["text"] == gpt2.decode(sample["tokens"]) and len(sample["tokens"]) == 32
    assert_one_line(call("evaluate.py", tmp_path / "out", "--baselines"), "only with character data")


def test_help_lists_every_setting(call):
    """--help shows every field with type and default, of the config where one is named, in groups; bare train.py lists
    configs."""
    text = call("train.py", "d3pm_openwebtext_8gpu", "--help").out
    assert all(f"\n{title}:\n  --{field} " in text for field, title in configs.GROUPS.items())
    assert all(f"--{field} " in text for field in configs.Config.__dataclass_fields__)
    assert re.search(r"--lr FLOAT\s+peak learning rate \[float: 0.0006\]", text)
    bare = call("train.py")
    assert bare.code == 0 and all(name in bare.out for name in configs.CONFIGS)


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, words", [
    (["nope"], ["unknown config 'nope'", "d3pm_text8"]),
    (["d3pm_text8_4gpu"], ["did you mean d3pm_text8_8gpu?"]),
    (["--lr=1"], ["no config is named"]),
    (["demo", "--lrr=1"], ["did you mean --lr"]),
    (["demo", "--learning_rate=1"], ["unknown argument --learning_rate=1, did you mean --lr?"]),
    (["--config", "demo"], ["write its value without --config"]),
    (["demo", "--max_steps=many"], ["--max_steps", "'many'"]),
    (["demo", "--compile=perhaps"], ["neither true nor false"]),
    (["demo", "--batch_size=0"], ["batch_size=0 must be at least 1"]),
    (["demo", "--lr=-1"], ["lr=-1.0"]),
    (["demo", "--lr=nan"], ["lr=nan"]),
    (["demo", "--timeout_minutes=1e15"], ["timeout_minutes"]),
    (["demo", "--fsdp"], ["torchrun"]),
    (["demo", "--objective=gan"], ["objective='gan' is unknown: choose one of d3pm, mdlm"]),
    (["demo", "--n_head=5"], ["n_embd", "n_head=5"]),
    (["demo", "--device=tpu"], ["'tpu' is not available"]),
    *((["demo", f"--device={device}"], [f"{device!r} is not available"])
      for device in ("cpu:x", "cpu:00", "cpu:1", "cpu:-1", "cpu:", "cpu:²", ":0", "CPU", "cuda:01", "meta", "cpu:0:0")),
    (["demo", f"--seed={2**64}"], ["seed must be below"]),
    (["demo", "--batch_size=10", "--micro_batch_size=4"], ["batch_size=10 must be a multiple"]),
    (["demo", "--dataset=nothing"], ["not prepared", "prepare_textfile.py"]),
    (["d3pm_text8", "--data_dir=/nonexistent"], ["run python data/prepare_text8.py"]),
    (["d3pm_text8", "--time_sampling=exact_k"], ["continuous-time bound"]),
    (["demo", "--lambda_ce=1"], ["lambda_ce=1.0 is only for objective=d3pm: use lambda_ce=0.0"]),
    (["demo", "--scale_by_sigma=false"], ["scale_by_sigma=False is only for objective=sedd: use scale_by_sigma=True"]),
    (["demo", "--block_size=4"], ["block_size=4 is only for objective=block: use block_size=0"]),
    *((["d3pm_text8", "--schedule=loglinear", *flags], ["objective=d3pm needs a schedule from alpha = 1 to 0"])
      for flags in ([], ["--noise=uniform", "--lambda_ce=0"])),
    (["mdlm_text8", "--conditioning=sigma"], ["needs a finite sigma, and schedule=linear ends at an infinite one"]),
    *((["sedd_text8", "--schedule=linear", "--conditioning=none", flag], ["needs a finite sigma"])
      for flag in ("--scale_by_sigma=false", "--noise=uniform")),
    *((["mdlm_text8", "--fsdp", flag], ["needs whole tensors, and --fsdp splits them"])
      for flag in ("--optimizer=sm3", "--optimizer=sm3_nesterov", "--clip=agc:0.01")),
    (["mdlm_text8", "--schedule=quadratic"], ["is unknown: choose one of", "cosine"]),
    (["udlm_text8", "--noise=gauss"], ["is unknown: choose one of mask, uniform, hybrid"]),
    (["d3pm_text8", "--noise=hybrid"], ["noise=hybrid does not work with objective=d3pm: use mdlm"]),
    (["gidd_text8", "--uniform_share=1"], ["uniform_share=1.0 must be from 0.001 to 0.999: "]),
    (["gidd_text8", "--prefix=fixed:4"], ["noise=hybrid needs --prefix=none: "]),
    (["mdlm_text8", "--uniform_share=0.2"], ["is only for objective=mdlm with noise=hybrid: use uniform_share=0.1"]),
    (["bd3_demo", "--uniform_share=0.2"], ["is only for objective=mdlm with noise=hybrid: use uniform_share=0.1"]),
    (["ar_text8", "--noise=uniform"], ["noise=uniform does not work with objective="]),
    (["d3pm_text8", "--noise=uniform"], ["noise=uniform needs --lambda_ce=0: "]),
    (["udlm_text8", "--objective=sedd", "--weighting=simple"], ["noise=uniform needs --weighting=nelbo: "]),
    (["demo", "--noise=uniform"], ["noise=uniform needs --time_sampling=stratified (or uniform): "]),
    *((["udlm_text8", flag], [f"noise=uniform needs {needed}"])
      for flag, needed in (("--prefix=fixed:4", "--prefix=none: "), ("--lambda_ce=1", "--lambda_ce=0: "),
                           ("--scale_by_sigma=false", "--scale_by_sigma: "),
                           ("--time_sampling=exact_k", "--time_sampling=stratified (or uniform): "))),
])
def test_bad_train_arguments(call, tmp_path, monkeypatch, arguments, words):
    """One line that says what is wrong, exit code 2, and no output folder."""
    monkeypatch.chdir(tmp_path)
    assert_one_line(call("train.py", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_learning_rate_that_would_rise(call, data_dir, trained, tmp_path):
    """A new run is refused. An older run that has it continues."""
    for flags in ([], ["--resume=auto"], ["--init_from", trained]):
        assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "new", *TRAINED, "--min_lr=0.02", *flags),
                        "lr=0.01 is below min_lr=0.02: use --min_lr=0.01 or less")
        assert not (tmp_path / "new").exists()
    old = changed(trained, tmp_path / "old", config=lambda config: config | {"min_lr": 0.02})
    result = train(call, "mdlm_text8", data_dir, old, *TRAINED, "--min_lr=0.02", "--resume=auto")
    assert result.code == 0 and "all 60 steps are done already" in result.out


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py", "bench.py"])
def test_bad_devices(call, trained, data_dir, script):
    """The other commands, too, say of a malformed device what they say of one that is not there."""
    arguments = ["demo"] if script == "bench.py" else [trained]
    assert_one_line(call(script, *arguments, "--device=cpu:00"), "device 'cpu:00' is not available here")
    if script == "sample.py":
        assert call(script, *arguments, "--device=cpu:0", "--steps=2").code == 0


def test_names_with_line_breaks(call, trained, data_dir, tmp_path):
    """The name of a file may hold a line break, or a code that moves a terminal's cursor: what is said stays a line."""
    for name in ("two\nlines", "colour\x1b[31m", "tab\tand\rback"):
        shown = name.encode("unicode_escape").decode()
        assert_one_line(call("sample.py", tmp_path / name), f"no checkpoint at {tmp_path}/{shown}")
        assert_one_line(call("data/prepare_textfile.py", tmp_path / name, "--name=x"),
                        f"cannot read {tmp_path}/{shown}")
        (tmp_path / name).mkdir()
        shutil.copy(trained / "ckpt.pt", tmp_path / name / "ckpt.pt")
        assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / name, "--max_steps=2"),
                        f"{shown} already holds a run")
    (tmp_path / "two\nlines" / "ckpt_prev.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "two\nlines" / "ckpt.pt").write_bytes(b"rubbish")
    result = train(call, "mdlm_text8", data_dir, tmp_path / "two\nlines", *TRAINED, "--resume=auto")
    assert result.code == 0 and result.err.count("\n") == 1 and "two\\nlines" in result.err


def test_a_validation_on_one_window(call, data_dir, tmp_path):
    """It has no standard error, and says that it is one, on the terminal, in the log and in a plot's legend."""
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=2", "--eval_sequences=1")
    assert re.search(r"validation bits/char \d\.\d{4} \(n = 1\)  \(best so far\)", result.out)
    assert "nan" not in result.out
    assert [line["val_stderr"] for line in log(tmp_path / "out") if "val_stderr" in line] == [None]
    assert call("checkpoint.py", "export", tmp_path / "out", tmp_path / "card").code == 0
    assert "(n = 1) |  | validation during training" in (tmp_path / "card" / "README.md").read_text()
    assert likelihood.plus_minus(0.12345) == "± 0.1235" and likelihood.plus_minus(math.nan) == "(n = 1)"


@pytest.mark.parametrize("module, command, words", [
    ("wandb", ["train.py", "demo", "--wandb"], "--wandb needs the package wandb: pip install wandb"),
    ("PIL", ["sample.py", "CKPT", "--gif=x.gif"], "a picture needs the package pillow: pip install pillow"),
    ("matplotlib", ["evaluate.py", "CKPT", "--curve"], "--curve, which draws a picture, needs the package matplotlib"),
    ("matplotlib", ["plot.py", "CKPT"], "needs the package matplotlib"),
    ("matplotlib", ["bench.py", "demo", "--scaling=x.png"], "--scaling needs the package matplotlib"),
    ("huggingface_hub", ["sample.py", "hf://a/b"], "hf://a/b, which is on the Hub, needs the package huggingface_hub"),
    ("transformers", ["evaluate.py", "CKPT", "--samples=1", "--judge=hf://gpt2"], "needs the package transformers"),
    ("mauve", ["evaluate.py", "CKPT", "--samples=100", "--judge=CKPT", "--mauve"], "needs the package mauve-text"),
    ("tiktoken", ["data/prepare_textfile.py", "TEXT", "--name=x", "--tokenizer=gpt2"], "needs the package tiktoken"),
    ("tokenizers", ["data/prepare_textfile.py", "TEXT", "--name=x", "--tokenizer=bpe:300"],
     "a vocabulary of your own needs the package tokenizers"),
    ("transformers", ["data/prepare_textfile.py", "TEXT", "--name=x", "--tokenizer=bert"],
     "the tokenizer of hf://google-bert/bert-base-uncased needs the package transformers"),
    ("datasets", ["data/prepare_openwebtext.py"], "the download of Skylion007/openwebtext needs the package datasets")])
def test_missing_packages(call, trained, data_dir, tmp_path, monkeypatch, module, command, words):
    """A command that needs an optional package says which one, in one line, before it does anything else."""
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == module else find(name, *more))
    monkeypatch.chdir(tmp_path)
    names = {"CKPT": trained, "TEXT": data_dir / "text.txt"}
    more = ["--data_dir", tmp_path] if command[0].startswith("data") else []
    result = call(*(names.get(word, word) for word in command), *more)
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1, result.err
    assert list(tmp_path.iterdir()) == []


def test_requirements():
    """requirements.txt is what the three commands import; every other package in use is in requirements-all.txt."""
    core, more = ({re.match(r"[\w-]+", line)[0].lower() for line in (ROOT / name).read_text().splitlines()
                   if line[:1].isalnum()} for name in ("requirements.txt", "requirements-all.txt"))
    assert core == {"torch", "numpy", "tqdm", "safetensors", "tokenizers"} and not core & more
    used = {name.split(".")[0].lower() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
            if path.parent.name != "tests" for node in ast.walk(ast.parse(path.read_text()))
            for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                         [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])}
    mine = {path.stem for path in ROOT.glob("*.py")} | {"data", "foreign", "studies"}
    packages = {"pil": "pillow", "yaml": "pyyaml", "mauve": "mauve-text"}
    outside = {packages.get(name, name) for name in used - mine if name not in sys.stdlib_module_names}
    assert outside <= core | more, outside - core - more


def test_flags_that_would_do_nothing(call, trained, data_dir, tmp_path):
    """A flag that has no effect beside the others is refused, not passed over."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat " * 20)
    for command, words in (
            (["bench.py", "demo", "--gpu=a100"], "need --estimate"), (["bench.py", "demo", "--gpus=2"], "need --est"),
            (["bench.py", "demo", "--mfu=0.5"], "--mfu need --estimate"),
            (["bench.py", "demo", "--estimate", "--repeats=3"], "times nothing: leave out --repeats"),
            (["demos.py", "caesar", "a text", "--dataset=text8"], "name one with -m CKPT"),
            (["demos.py", "perturb", "a text", "--dataset=text8"], "name one with -m CKPT"),
            (["sample.py", trained, "--sampler=first_hitting", "--gamma=1", "--eta=0.1"], "use entropy_bound"),
            (["evaluate.py", trained, "--text", tmp_path / "text.txt", "--split=test"], "leave out --split"),
            (["evaluate.py", trained, "--text", tmp_path / "text.txt", "--dataset=tiny"], "leave out --dataset"),
            (["evaluate.py", trained, "--out_dir", tmp_path, "--data_dir", data_dir], "--out_dir needs"),
            (["data/prepare_textfile.py", tmp_path / "text.txt", "--name=x", "--val=", "--test="],
             "--val: the value is empty")):
        assert_one_line(call(*command), words)


def test_bad_training_starts(call, data_dir, trained, tmp_path):
    """Sequences longer than a split, nothing to resume, another run's checkpoint, weights that do not fit."""
    out = tmp_path / "out"
    go = lambda *a: train(call, "mdlm_text8", data_dir, out, *a)
    (tmp_path / "file").write_text("in the way")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "file"),
                    f"cannot use the folder {tmp_path / 'file'}: it is a file")
    assert_one_line(train(call, "mdlm_text8", data_dir, "x" * 300), "File name too long")
    assert_one_line(go("--seq_len=100000"), "fewer than one sequence of 100,000", "--seq_len=")
    assert_one_line(go(f"--resume={tmp_path}"), "no checkpoint at")
    assert_one_line(go(f"--resume={trained}", "--max_steps=60", "--lr=0.5"), "of another run",
                    "lr (was 0.01, now 0.5)", "--init_from")
    assert_one_line(go(f"--init_from={trained}", "--n_layer=3"), "of another network", "add --n_layer=2")
    assert not out.exists()


@pytest.mark.parametrize("script", ["evaluate.py", "sample.py"])
def test_bad_checkpoints(call, trained, tmp_path, script):
    """Missing, foreign, empty and truncated files."""
    whole = (trained / "ckpt.pt").read_bytes()
    cases = {"text.pt": b"not a checkpoint", "empty.pt": b"", "truncated.pt": whole[:len(whole) // 2]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        assert_one_line(call(script, tmp_path / name), name, "cannot be read as a checkpoint")
    assert_one_line(call(script, tmp_path / "none.pt"), "no checkpoint at")
    assert_one_line(call(script, tmp_path), "no checkpoint at")


def test_other_bad_input(call, data_dir, trained, tmp_path):
    """Options out of range, other alphabets, folders that are not there."""
    (tmp_path / "text.txt").write_text("ABC abc " * 200)
    assert call("data/prepare_textfile.py", tmp_path / "text.txt", "--name", "caps", "--data_dir", data_dir).code == 0
    assert_one_line(call("evaluate.py", trained, "--dataset", "caps", "--data_dir", data_dir),
                    "outside the checkpoint's alphabet: 'A' 'B' 'C'")
    assert_one_line(call("evaluate.py", trained, "--dataset", "none", "--data_dir", data_dir), "not prepared")
    assert_one_line(call("evaluate.py", trained, "--split", "dev"), "dev")
    assert_one_line(call("evaluate.py", trained, "--repeats", "0"), "0 is outside")
    go = lambda *a: call("evaluate.py", trained, "--data_dir", data_dir, *a)
    (tmp_path / "short.txt").write_text("too short")
    assert_one_line(go("--text", tmp_path / "short.txt"), "9 tokens, fewer than one window of 32", "--seq_len=9")
    assert_one_line(go("--text", tmp_path / "none.txt"), "none.txt")
    assert_one_line(go("--seq_len=64"), "longer than the 32 tokens")
    assert_one_line(go("--n_tokens=64", "--check", "--repeats=128"), "at least 30 windows, and there are 2")
    few = "--check", "--seq_len=8", "--n_tokens=248"
    assert_one_line(go(*few), "256 draws of noise, and 31 windows have 31: use --repeats 9")
    assert_one_line(go(*few, "--repeats=8"), "31 windows have 248")
    assert go("--check", "--seq_len=8", "--n_tokens=256", "--repeats=8").code != 2
    assert_one_line(go("--n_tokens=1" + "0" * 400), "is outside")
    assert_one_line(go("--check", "--order=l2r"), "not allowed with")
    for flag in ("--repeats=2", "--estimator=exact_k"):
        assert_one_line(go("--order=l2r", flag), "has no noise")
    assert_one_line(go("--estimator=exact_k", "--T=5"), "--T is for the T-step bound")
    assert_one_line(go("--curve", "--T=5"), "are for the bound")
    assert_one_line(go(trained, "--curve"), "--curve takes one checkpoint, not two")
    assert_one_line(go("--baselines", "--seq_len=8"), "needs the whole split")
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny/train.bin").unlink()
    assert_one_line(go("--baselines", "--data_dir", tmp_path), "train.bin is missing")  # before anything is scored
    assert_one_line(go("--curve", "--out_dir", tmp_path / "no" / "where"), "cannot be made: No such file or directory")
    assert_one_line(call("evaluate.py", trained, trained, "third"), "third is one argument too many")
    for command in (lambda: go("--curve", "--out_dir=/proc"), lambda: call("sample.py", trained, "--gif=/proc/a.gif")):
        assert_one_line(command(), "cannot be written")  # before the work; root, too, may not write there
    assert_one_line(go("--estimator=raw"), "invalid choice: 'raw'")
    assert train(call, "mdlm_text8", data_dir, tmp_path / "caps", "--dataset=caps", "--max_steps=1").code == 0
    assert_one_line(go(tmp_path / "caps"), "different tokens (alphabet", "--text FILE compares bits per byte")
    assert train(call, "mdlm_text8", data_dir, tmp_path / "short", "--seq_len=16", "--max_steps=1").code == 0
    assert_one_line(go(tmp_path / "short"), "windows of 32 and 16 tokens", "--seq_len=16")
    assert_one_line(call("evaluate.py"), "checkpoint")
    assert_one_line(call("sample.py", trained, "--steps", "x"), "'x' is not an integer")
    assert_one_line(call("sample.py", trained, "--batch_size", "0"), "0 is outside")
    assert_one_line(call("sample.py", trained, "--out", tmp_path / "no" / "where.txt"), "folder that does not exist")
    assert_one_line(call("sample.py", trained, "--out", "."), "is a folder")
    assert_one_line(call("sample.py", trained, "--seed", 2**64), "outside")
    assert_one_line(call("evaluate.py", trained, "--data_dir", tmp_path / "text.txt"), "not prepared")
    assert_one_line(call("sample.py", trained, "--step", "3"), "did you mean --steps?")
    assert_one_line(call("sample.py", trained, "--prompt", "a"), "did you mean --prefix?")
    assert_one_line(call("sample.py", "--checkpoint", trained), "write its value without --checkpoint")
    assert_one_line(call("sample.py", trained, "--model", "a"), "unknown argument --model (--help")
    assert_one_line(call("evaluate.py", trained, "--num_samples", "3"), "did you mean --samples?")


def test_a_real_process_says_it_in_one_line(tmp_path):
    """The same through a real interpreter: exit code 2, one line, no traceback."""
    process = subprocess.run([sys.executable, ROOT / "sample.py", tmp_path / "none.pt"], capture_output=True, text=True)
    assert_one_line(Result(process.returncode, process.stdout, process.stderr), "sample.py: no checkpoint at")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_are_never_unpickled():
    """Every torch.load says weights_only=True: a checkpoint from somewhere must not run code."""
    calls = [(path.name, call) for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if path.parent.name != "tests"
             for call in re.findall(r"torch\.load\((.*)", path.read_text())]
    assert calls and all("weights_only=True" in call for _, call in calls), calls


def test_heavy_libraries_stay_out():
    """wandb, datasets and tiktoken are imported only where they are used."""
    code = ("import sys, train, sample, evaluate, bench, plot, demos, data.prepare_openwebtext, data.prepare_textfile\n"
            "heavy = {'wandb', 'datasets', 'tiktoken', 'pandas', 'matplotlib', 'transformers'}\n"
            "print(sorted(heavy & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


# ---- the README ------------------------------------------------------------------------------------------------------


PAGES = [ROOT / "README.md", ROOT / "studies/README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Parsed(Exception):
    pass


def commands_of(page):
    """In their order: `make demo`, and every command that runs a script of this repository, from the script on, of the
    page's shell blocks and of its text (`python ...`)."""
    found = []
    for block, inline in re.findall(r"```(?:sh|bash)\n(.*?)```|`python ([^`]*)`", page.read_text(), re.S):
        lines = block.replace("\\\n", " ").splitlines() or [" ".join(inline.split())]
        lines = [re.sub(r"\s+(#|\|\||>).*", "", line) for line in lines if not line.startswith("#")]
        found += [shlex.split(match[0]) for line in lines
                  if (match := re.search(r"^make demo$|(?<![\w/])((data|studies)/)?\w+\.py( .*)?$", line))]
    return found


def readme_commands():
    """The commands of the README and of docs/ that run a script."""
    return [command for page in PAGES for command in commands_of(page) if command[0] != "make"]


def folders(command):
    """(those that it reads, those that it writes) of the folders out/NAME."""
    if command == ["make", "demo"]:
        return set(), {"out/demo"}
    text = " ".join(command)
    named = set(re.findall(r"(?<![\w/])out/[\w.-]+", text))
    if command[0].startswith("studies/"):
        return set(), named
    if command[0] != "train.py":
        return named, set()
    chosen = re.search(r"--out_dir[ =](\S+)", text)
    written = {chosen[1] if chosen else f"out/{command[1]}"}
    return named - written, written


def test_readme_has_commands():
    assert len(readme_commands()) > 20
    assert folders("train.py demo --init_from out/a --out_dir=out/b".split()) == ({"out/a"}, {"out/b"})
    assert folders("train.py demo --dataset=book".split()) == (set(), {"out/demo"})
    assert folders("evaluate.py out/a --judge out/b/ckpt.pt".split()) == ({"out/a", "out/b"}, set())


def test_progress_bars_need_no_semaphore():
    """tqdm's own lock is one, and Python 3.14 reports it as lost at the end of every command."""
    code = "import cli, tqdm.std; list(cli.progress([1])); assert not hasattr(tqdm.std.TqdmDefaultWriteLock, 'mp_lock')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("message", ["InvalidCxxCompiler: No working C++ compiler found", "TritonMissing: no Triton"])
def test_no_compiler(message, monkeypatch, capsys):
    """A missing compiler is reported in one line. Other errors keep their traceback."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])

    def fail():
        raise RuntimeError(message)

    with pytest.raises(SystemExit) as ended:
        cli.run(fail)
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    message = "something else"
    with pytest.raises(RuntimeError):
        cli.run(fail)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_folders_are_made(page):
    """A command reads only folders that an earlier command of the same page makes."""
    made = set()
    for command in commands_of(page):
        read, written = folders(command)
        assert read <= made, f"{page.name}: `{' '.join(command)}` reads {', '.join(read - made)}, which nothing made"
        made |= written


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_readme_links(page):
    """Links to files of this repository, and to their headings, lead somewhere."""
    for name, _, heading in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", page.read_text()):
        path = page.parent / name if name else page
        assert path.is_file(), name
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else [""]
        assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], heading


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_command_parses(command, call, monkeypatch):
    """Every command in the README names an existing script and parses. The settings of a training go together."""
    parse = cli.ArgumentParser.parse_args

    def parse_and_stop(self, *args):
        parse(self, *args)
        raise Parsed

    if "--help" in command:
        assert call(*command).code == 0
    elif command[0] == "train.py":
        monkeypatch.setattr(sys, "argv", [word.replace("=DTYPE", "=float32") for word in command])
        add_arguments = importlib.import_module("train").add_arguments
        name, cfg, _ = configs.from_command_line("train.py", "", add_arguments)
        assert name == command[1] and cfg.min_lr <= cfg.lr  # else checkpoint.open_run would refuse it
    else:
        monkeypatch.setattr(cli.ArgumentParser, "parse_args", parse_and_stop)
        with pytest.raises(Parsed):
            call(*command)


def test_readme_names_every_file():
    """The file map of the README lists every Python file at the top, in data/ and in foreign/; studies/ has its own."""
    text = (ROOT / "README.md").read_text()
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").glob("prepare_*.py"), *ROOT.glob("foreign/[a-z]*.py")]:
        assert f"`{path.relative_to(ROOT)}`" in text, path.name
    text = (ROOT / "studies/README.md").read_text()
    for path in ROOT.glob("studies/[a-z]*.py"):
        assert f"`{path.name}`" in text, path.name


@pytest.mark.parametrize("module", ["train", "sample", "evaluate", "bench", "demos", "studies.simulator"])
def test_cli_comes_before_torch(module):
    """cli.py sets how long OpenMP's threads spin, before torch is loaded; a value of the user's own stays."""
    code = f"""
import os, sys
class Watch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Watch())
import {module}
"""
    for own, value in (({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7")):
        environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"} | own
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.stdout.split() == [value], done.stderr
