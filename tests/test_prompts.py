"""sample.py's prompts, lengths, samplers and pictures, through the command line; prompts.py by hand."""

import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import configs
import sampler_settings
import storage
from cli import UserError
from commands import ROOT, assert_one_line, log, train
from data.loader import load_split, windows
from data.tokenizer import CharTokenizer, make_tokenizer, tokens_of
from diffusion import D3PM, MDLM
from likelihood import Windows, bound
from model import DiT
from prompts import canvases, template
from randomness import prefix_lengths
from sampler_settings import best_grid, bound_on_grid, enough_steps, read_curve
from sampling import DEFAULT_ETA, windows_of
from studies.curves import measure_context, measure_curve
from test_checkpoint import changed
from train import batches
from world import mask_of

CPU = torch.device("cpu")

ALPHABET = " abcdefghijklmnopqrstuvwxyz_{}\\\n"
M = 99

SAMPLERS = [["--sampler=ancestral", "--steps=7"], ["--sampler=ancestral", "--grid=1,0.9,0.2,0"],
            ["--sampler=first_hitting"], ["--sampler=topk", "--steps=5", "--grid=cosine"], ["--sampler=topk", "--k=3"],
            ["--sampler=topk", "--k=3", "--by=margin"],
            ["--sampler=threshold", "--threshold=0.2"], ["--sampler=entropy_bound", "--gamma=3"],
            *(["--sampler=remdm", "--steps=9", f"--remask={rule}", "--eta=0.5"] for rule in DEFAULT_ETA)]


@pytest.fixture
def sample(call, trained):
    """Run sample.py on the tiny model (32 characters); the parsed JSON."""
    def run(*flags, path=trained):
        result = call("sample.py", path, "--json", *flags)
        assert result.code == 0, result.err
        return json.loads(result.out)
    return run


def ids(text):
    return [ALPHABET.index(c) if c != "?" else M for c in text]


# ---- templates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, canvas", [
    ("the ____ sat", "the ???? sat"), ("{3}", "???"), ("a_{2}_b", "a????b"), (r"\_ \{\}\\_\n", "_ {}\\?\n"),
    ("_", "?"), ("{12}x", "????????????x"), ("a{0}_", "a?"),
])
def test_template(text, canvas):
    assert template(text, CharTokenizer(ALPHABET), M) == ids(canvas)


@pytest.mark.parametrize("text, words", [
    ("the cat", "has no blanks"), ("{0}", "has no blanks"), ("a {x} b_", "'{x}' is not a blank"),
    ("a {_", "'{' is not a blank"), ("a } _", "'}' is not a blank"), ("a \\q _", "is not a blank"),
    ("{-3}", "'{-3}' is not a blank"), ("{99999999}", "is too long a blank"), ("{²}", "is not a blank"),
    ("a5 Ab_", "'5' 'A' not in the alphabet"), ("a_5", "'5' not in the alphabet"),
])
def test_bad_template(text, words):
    with pytest.raises(UserError) as error:
        template(text, CharTokenizer(ALPHABET), M)
    assert words in str(error.value)


def test_template_of_bpe(gpt2):
    """The pieces between blanks are encoded by themselves."""
    canvas = template("The{2} sat on the{3}.", gpt2, M)
    assert canvas == [*gpt2.encode("The"), M, M, *gpt2.encode(" sat on the"), M, M, M, *gpt2.encode(".")]


def test_space_before_a_blank():
    """A token of a BPE has the space before its word, so it is not also given; other spaces, and characters, stay."""
    bpe = make_tokenizer(tokens_of("bpe:300", lambda: ["the cat sat on the mat " * 9]))
    ids = lambda text: bpe.encode(text).tolist()
    assert template("the _ sat {2} ", bpe, M) == [*ids("the"), M, *ids(" sat"), M, M, *ids(" ")]
    assert template("the  _, the\\n_", bpe, M) == [*ids("the "), M, *ids(", the\n"), M]
    assert template("the _", CharTokenizer(ALPHABET), M) == [*CharTokenizer(ALPHABET).encode("the "), M]
    args = SimpleNamespace(template=None, infill=None, prefix="the cat ", suffix=" mat", length=9, context=None,
                           block_length=None)
    assert canvases(args, 9, bpe, M)[0] == [*ids("the cat"), *[M] * (9 - len(ids("the cat")) - len(ids(" mat"))),
                                            *ids(" mat")]


def test_windows():
    """They cover all, overlap by the context, and are no longer than the model."""
    assert windows_of(20, 32, 0) == [(0, 20)] and windows_of(32, 32, 5) == [(0, 32)]
    assert windows_of(70, 32, 8) == [(0, 32), (24, 56), (48, 70)] and windows_of(64, 32, 0) == [(0, 32), (32, 64)]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", SAMPLERS, ids=lambda flags: " ".join(flags))
def test_known_tokens_stay(flags, call, trained, tmp_path):
    """A template, and its blanks filled, by every sampler; at no step does a known token change."""
    result = call("sample.py", trained, "--template", "the {7} of __ a", *flags, "--batch_size=3", "--top_p=0.9",
                  "--show_intermediate", "--json")
    found = json.loads(result.out)
    for one in found["samples"]:
        assert len(one["text"]) == 19 and "░" not in one["text"]
        known = [c if c != "_" else None for c in "the _______ of __ a"]
        assert all(c in (None, d) for c, d in zip(known, one["text"]))
        assert [step == 0 for step in one["steps"]] == [c is not None for c in known]
        assert [p is None for p in one["p"]] == [c is not None for c in known]
        assert all(0 < p <= 1 for p in one["p"] if p is not None) and max(one["steps"]) <= found["steps"]
    states = re.findall(r"step \d+, .*\n(.*)\n", result.err)
    assert states[0] == "the ░░░░░░░ of ░░ a" and states[-1] == found["samples"][0]["text"]
    assert all(one != next_one for one, next_one in zip(states, states[1:]))
    assert all(re.fullmatch("the .{7} of .. a", state) for state in states)
    assert re.search(rf"{flags[0][10:]}, (\d+ steps, )?{found['nfe']} network calls", result.err)


def test_prefix_suffix_and_length(sample):
    """They begin and end the text, which has the model's length, or less."""
    texts = [one["text"] for one in sample("--prefix", "the cat ", "--suffix", " end", "--batch_size=4")["samples"]]
    assert all(len(text) == 32 and text.startswith("the cat ") and text.endswith(" end") for text in texts)
    assert len(set(texts)) == 4
    assert len(sample("--length=5")["samples"][0]["text"]) == 5
    text = sample("--length=9", "--prefix=ab", "--suffix=cd")["samples"][0]["text"]
    assert len(text) == 9 and text[:2] + text[-2:] == "abcd"


def test_infill(call, trained, sample, tmp_path):
    """Many templates of several lengths in the order of the file, each several times; equal ones are one batch."""
    (tmp_path / "t.txt").write_text("the ____ one\r\n\na__\n \nb {5} two\nc__\nthe ____ one\n")  # \r: of Windows
    found = sample("--infill", tmp_path / "t.txt", "--batch_size=2", "--sampler=first_hitting")
    patterns = ["the .{4} one", "a..", "b .{5} two", "c..", "the .{4} one"]
    texts = [one["text"] for one in found["samples"]]
    assert len(texts) == 10 and all(re.fullmatch(patterns[i // 2], text) for i, text in enumerate(texts))
    assert found["nfe"] == 4 + 2 + 5 and len(set(texts)) > 5
    assert [one["prompt"] for one in found["samples"]] == [i // 2 for i in range(10)]
    for flag in ("html", "gif", "png"):
        assert call("sample.py", trained, "--infill", tmp_path / "t.txt", f"--{flag}", tmp_path / f"a.{flag}").code == 0
    assert (tmp_path / "a.html").read_text().count('"events"') == 5
    assert (tmp_path / "a.gif").read_bytes()[:3] == b"GIF" and (tmp_path / "a.png").read_bytes()[1:4] == b"PNG"
    piped = subprocess.run([sys.executable, ROOT / "sample.py", trained, "--infill", "-"], input="the ____ one\n",
                           capture_output=True, text=True, check=True)
    assert re.fullmatch("the .{4} one\n", piped.stdout)


def test_many_templates_go_in_batches(sample, tmp_path):
    """More than fit together: as many as there are, in their order."""
    (tmp_path / "t.txt").write_text("".join(f"{chr(97 + i % 26)}_\n" for i in range(40)))
    found = sample("--infill", tmp_path / "t.txt", "--sampler=topk", "--k=1")
    assert [one["text"][0] for one in found["samples"]] == [chr(97 + i % 26) for i in range(40)] and found["nfe"] == 2


def test_long_text_by_windows(sample, trained, monkeypatch):
    """Each block sees the last tokens of the one before, and the suffix comes last."""
    seen = []
    model, *rest = checkpoint.load_model(trained, torch.device("cpu"))
    forward = type(model).forward

    def watch(self, xt, t, where=None):
        seen.append(xt.clone())
        return forward(self, xt, t, where)

    monkeypatch.setattr(type(model), "forward", watch)
    found = sample("--length=75", "--context=10", "--prefix=the ", "--suffix= end", "--sampler=topk", "--k=11")
    tokens = torch.tensor(found["samples"][0]["tokens"])
    assert len(tokens) == 75 and found["samples"][0]["text"].startswith("the ")
    assert found["samples"][0]["text"].endswith(" end")
    steps = found["samples"][0]["steps"]
    assert max(steps[4:32]) < min(steps[32:54]) and max(steps[32:54]) < min(steps[54:71])
    firsts = [i for i, xt in enumerate(seen) if i == 0 or (xt == 27).sum() > (seen[i - 1] == 27).sum()
              or xt.shape != seen[i - 1].shape]
    assert len(firsts) == 3 and [seen[i].shape[1] for i in firsts] == [32, 32, 31]
    for i, (a, b) in zip(firsts[1:], ((22, 32), (44, 54))):
        assert torch.equal(seen[i][0, :10], tokens[a:b]) and (seen[i][0, 10:] == 27).sum() == (22 if a == 22 else 17)


def test_block_length(sample, call, trained, tmp_path):
    """Pieces of so many tokens after a prefix, in blanks and in each window of a long text: each is finished before the
    next begins. A piece of all tokens changes nothing."""
    whole, one = sample("--sampler=topk", "--k=4"), sample("--sampler=topk", "--k=4", "--block_length=32")
    assert whole["samples"] == one["samples"] and (whole["nfe"], whole["block_length"]) == (8, None)
    found = sample("--sampler=topk", "--steps=3", "--block_length=6", "--prefix=the ", "--length=20", "--suffix= a")
    steps = found["samples"][0]["steps"]
    assert [set(steps[a:b]) for a, b in ((0, 4), (4, 10), (10, 16), (16, 18), (18, 20))] == [
        {0}, {1, 2, 3}, {4, 5, 6}, {7, 8}, {0}]  # the third step for two masks reveals nothing
    assert (found["steps"], found["nfe"], found["block_length"]) == (9, 8, 6)
    found = sample("--length=70", "--context=8", "--block_length=16", "--sampler=first_hitting", "--batch_size=2")
    for text in found["samples"]:
        pieces = [text["steps"][a:b] for a, b in ((0, 16), (16, 32), (32, 48), (48, 56), (56, 70))]
        assert all(max(one) < min(other) for one, other in zip(pieces, pieces[1:]))
    assert found["nfe"] == 70
    result = call("sample.py", trained, "--template", "a ____ b ____", "--block_length=3", "--steps=5", "--guidance=1",
                  "--show_intermediate")
    assert "changes nothing" not in result.err
    assert "ancestral, 5 steps for each 3 tokens, " in result.err and re.fullmatch("a .{4} b .{4}\n", result.out)
    rows = json.loads(call("evaluate.py", trained, "--samples=2", "--sampler=topk", "--k=8", "--block_length=16",
                           "--out_dir", tmp_path, "--json").out)["samples"]
    assert (rows[0]["setting"], rows[0]["nfe"]) == ("k=8 block_length=16", 4)


def test_flags_that_change_nothing(call, trained):
    """A text too short for --context or --block_length: a line says so."""
    texts = ["--prefix=the", "--length=20"]
    for flag, words in (("--context=8", "the text has 20 tokens, and the model writes 32 at a time"),
                        ("--block_length=18", "here at most 17 tokens are written at a time")):
        result = call("sample.py", trained, *texts, flag)
        assert result.code == 0 and result.err.count("\n") == 2 and words in result.err.split("\n")[0]
    for flags in (["--length=20", "--block_length=20"], ["--length=33", "--context=8", "--block_length=32"]):
        assert "changes nothing" not in call("sample.py", trained, *flags).err


def test_guidance(sample, call, trained, tmp_path):
    """Guidance takes two network calls for one, and a model that knows texts without a prompt."""
    flags = ["--template=the ____ on", "--sampler=topk", "--k=1"]
    plain, guided = sample(*flags), sample(*flags, "--guidance=2")
    assert [(found["guidance"], found["nfe"]) for found in (plain, guided)] == [(0, 4), (2, 8)]
    for prefix, code in (("uniform:0:8", 0), ("uniform:1:8", 2), ("fixed:8", 2)):
        out = changed(trained, tmp_path / prefix, config=lambda config: config | {"prefix": prefix})
        result = call("sample.py", out, "--prefix=the cat ", "--guidance=1")
        assert result.code == code
        if code:
            assert_one_line(result, "--guidance compares with the text without its prompt")


def test_left_to_right_continues_a_prefix(sample, call, data_dir, tmp_path):
    """A causal model can continue, and by blocks; it knows nothing of what comes later."""
    out = tmp_path / "ar"
    assert train(call, "ar_text8", data_dir, out, "--max_steps=2").code == 0
    found = sample("--prefix=the cat ", "--length=50", "--context=8", "--top_k=3", path=out)
    assert found["samples"][0]["text"].startswith("the cat ") and len(found["samples"][0]["text"]) == 50
    assert found["sampler"] == "left_to_right" and found["nfe"] == 42
    for flags in (["--suffix=a"], ["--template=a_"], ["--infill=x"]):
        assert_one_line(call("sample.py", out, *flags), "sees only the text on the left")
    assert_one_line(call("sample.py", out, "--k=3"), "one step per token: leave out --k")
    assert_one_line(call("sample.py", out, "--block_length=3"), "is autoregressive: leave it out")


def test_greedy(sample):
    """Temperature 0 gives the same text for all seeds. topk with k = 1 makes one network call for each token."""
    a, b = (sample("--sampler=topk", "--k=1", "--temperature=0", f"--seed={seed}") for seed in (1, 2))
    assert a["samples"] == b["samples"] and a["nfe"] == 32
    assert sorted(a["samples"][0]["steps"]) == list(range(1, 33))
    (one,) = sample("--sampler=topk", "--k=1", "--temperature=0", "--block_length=1")["samples"]
    assert one["steps"] == list(range(1, 33))


def test_steps_auto(sample, call, trained, data_dir, tmp_path):
    """The grid comes from the model's own curve, which must be there, and of this checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ckpt.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    assert_one_line(call("sample.py", folder, "--steps=auto"), "evaluate.py", "--curve` first")
    assert call("evaluate.py", folder, "--curve", "--data_dir", data_dir).code == 0
    auto = sample("--steps=auto", path=folder)
    measured = read_curve(str(folder), checkpoint.load_model(folder, CPU)[0])
    assert auto["steps"] == enough_steps(*measured) < 256 and auto["grid"] == best_grid(*measured, auto["steps"])
    assert sample("--grid=auto", path=folder)["grid"] == auto["grid"]
    eight = sample("--steps=8", "--grid=auto", "--sampler=topk", path=folder)
    assert eight["nfe"] == 8 and eight["grid"] == best_grid(*measured, 8)
    rows = json.loads(call("evaluate.py", folder, "--samples=2", "--steps=4,auto", "--json").out)["samples"]
    assert [row["steps"] for row in rows[:2]] == [4, auto["steps"]]
    curve = json.loads((folder / "curve.json").read_text())
    # if k masks cost 2 + k each, C(r) = 2 + E[k | a token is a mask] = 3 + 31 r, whose area is the mean over k
    (folder / "curve.json").write_text(json.dumps(curve | {"bits_per_token": [2.0 + k for k in curve["masks"]]}))
    rates, ce = read_curve(str(folder), checkpoint.load_model(folder, CPU)[0])
    assert bound_on_grid(rates, ce, [i / 4000 for i in range(4000, -1, -1)]) == pytest.approx(2 + 33 / 2, abs=0.01)
    for change, words in (({"weights": "0"}, "with other weights"), ({"masks": []}, "has no valid curve"),
                          ({"masks": curve["masks"][::-1]}, "has no valid curve"),
                          ({"bits_per_token": [float("nan")] * len(curve["masks"])}, "has no valid curve"),
                          ({"bits_per_token": [-1.0] * len(curve["masks"])}, "has no valid curve"),
                          ({"masks": curve["masks"][1:]}, "has no valid"), ({"masks": 3}, "is damaged"),
                          ({"masks": [0.5, *curve["masks"][1:]]}, "has no valid"),
                          ({"masks": [1, 1, *curve["masks"][2:]]}, "has no valid"),
                          ({"masks": [*curve["masks"][:-1], math.inf]}, "has no valid"),
                          ({"masks": [*curve["masks"][:-1], 10**400]}, "is damaged")):
        (folder / "curve.json").write_text(json.dumps(curve | change))
        assert_one_line(call("sample.py", folder, "--steps=auto"), words)
    (folder / "curve.json").write_text(json.dumps(curve))
    assert_one_line(call("sample.py", folder, "--steps=auto", "--raw"), "was measured with other weights",
                    f"run `python evaluate.py {folder} --curve --raw`")
    loop = json.loads(call("sample.py", folder, "--sampler=remdm", "--remask=loop", "--steps=4", "--json").out)
    assert loop["grid"] == pytest.approx([1, 0.55, 0.1, 0.1, 0])
    rows = json.loads(call("evaluate.py", folder, "--samples=2", "--sampler=ancestral,topk", "--grid=cosine", "--k=16",
                           "--by=margin", "--steps=4", "--json").out)["samples"]
    assert [(row["sampler"], row["steps"], row["setting"]) for row in rows[:2]] == [
        ("ancestral", 4, "grid=cosine"), ("topk", None, "k=16 by=margin")]


def test_bad_requests(call, trained, tmp_path):
    """One line each, and nothing is written."""
    (tmp_path / "none.txt").write_text("\n\n")
    (tmp_path / "plain.txt").write_text("a_\nno blanks\n")
    (tmp_path / "long.txt").write_text("a_\n{40}\nb_\n")
    out, loop = tmp_path / "out.html", tmp_path / "loop"
    loop.symlink_to(loop)
    for flags, words in (
            (["--prefix", "a" * 40], "or use a larger --length and a --context"),
            (["--prefix", "a" * 20, "--suffix", "b" * 12], "the prompt has 32 tokens, which leaves nothing of 32"),
            (["--prefix=the cat", "--length=7"], "a larger --length\n"),
            (["--guidance=1"], "strengthens a prompt"), (["--guidance=1", "--template=___"], "strengthens a prompt"),
            (["--prefix=the", "--guidance=1", "--sampler=euler"], "a sampler that normalises its prediction"),
            (["--prefix=the", "--known_words"], "counts the words of whole samples"),
            (["--temperature=0", "--top_k=3"], "leave out --top_p and --top_k"),
            (["--length=100"], "such as 8\n"), (["--template", "{40}"], "the model writes 32"),
            (["--length=100", "--context=32"], "leaves nothing of the model's 32"),
            (["--prefix=Ab"], "--prefix: 'A' not in the alphabet"), (["--suffix=5"], "--suffix: '5' not in"),
            (["--template=the cat"], "has no blanks"), (["--template=a_", "--length=5"], "leave out --prefix"),
            (["--template=a_", "--infill=x"], "not both"), (["--infill", tmp_path / "nowhere"], "nowhere"),
            (["--infill", tmp_path / "none.txt"], "no text"),
            (["--infill", tmp_path / "plain.txt"], "template 2 'no blanks' has no blanks"),
            (["--infill", tmp_path / "long.txt"], "the text has 40 tokens, and the model writes 32"),
            (["--prefix="], "the value is empty"), (["--sampler=topk", "--k=0"], "outside"),
            (["--k=3"], "--sampler ancestral does not use --k: leave it out, or use topk"),
            (["--sampler=topk", "--k=3", "--steps=5"], "leave out --steps and --grid"), (["--steps=0"], "outside"),
            (["--steps=many"], "not an integer"), (["--grid=1,0.5"], "mask rates that fall from 1 to 0"),
            (["--grid=1,0.5,0.7,0"], "rates that fall from 1 to 0"),
            (["--grid=loglinear:1e-12"], "eps must be from 1e-6 to 0.5"),
            (["--prefix=--"], "--prefix=--: -- cannot be a value"), (["--prefix", "-x"], "is written after =, as in"),
            (["--grid=1,0.5,1e-300,0"], "each by more than 1e-9"), (["--grid=square"], "rates that fall from 1 to 0"),
            (["--grid=1,0.5,0", "--steps=2"], "already sets 2 steps"),
            (["--sampler=remdm", "--remask=best"], "invalid choice"),
            (["--sampler=remdm", "--remask=loop", "--steps=2"], "needs at least 3 steps"),
            (["--sampler=remdm", "--remask=loop", "--grid=cosine"], "has its own grid"),
            (["--steps=auto", "--grid=cosine"], "leave out --grid cosine"), (["--gamma=1"], "or use entropy_bound"),
            (["--sampler=threshold", "--threshold=2"], "outside"),
            (["--sampler=threshold", "--steps=4"], "does not use --steps"),
            (["--temperature=-1"], "outside"), (["--top_p=0"], "outside"), (["--top_k=0"], "outside"),
            (["--show", "--show_intermediate"], "not both"),
            (["--html", tmp_path / "no" / "x"], "in a folder that does not exist"),
            (["--override", "n_head=2"], "leave out --override"),
            (["--context=-1"], "outside"), (["--sampler=remdm", "--remask=loop", "--grid=1,0.5,0"], "its own grid"),
            (["--temperature=1e-38"], "is below 0.001"), (["--prefix=\udcff"], "not valid text"),
            (["--template=a{" + "9" * 5000 + "}"], "is too long a blank"),
            (["--out", trained / "ckpt.pt"], "is also part of the checkpoint"),
            (["--out", tmp_path / "both.png", "--png", tmp_path / "both.png"], "is also --out"),
            (["--png", tmp_path / "picture"], "must end in .png"), (["--out", loop], "cannot be written"),
            (["--infill", tmp_path / "plain.txt", "--out", tmp_path / "plain.txt"], "is also --infill")):
        assert_one_line(call("sample.py", trained, *flags, "--html", out) if "--html" not in flags else
                        call("sample.py", trained, *flags), words)
    assert not out.exists() and (trained / "ckpt.pt").stat().st_size > 10_000


def test_outputs(call, trained, tmp_path):
    """A link stays a link, /dev/null stays what it is; files are written although nobody reads what is printed."""
    (tmp_path / "real.txt").write_text("before")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real.txt")
    result = call("sample.py", trained, "--out", tmp_path / "link.txt", "--html", "/dev/null", "--png", "/dev/null")
    assert result.code == 0 and (tmp_path / "link.txt").is_symlink() and not os.path.isfile("/dev/null")
    assert (tmp_path / "real.txt").read_text() == result.out
    written = subprocess.run([sys.executable, ROOT / "sample.py", trained, "--out", "/dev/stdout", "--json"],
                             stdout=subprocess.PIPE, text=True, check=True).stdout
    assert written.endswith(json.loads(written.split("\n")[0])["samples"][0]["text"] + "\n")
    with subprocess.Popen([sys.executable, ROOT / "sample.py", trained, "--out", tmp_path / "out.txt"],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        process.stderr.read()
    assert len((tmp_path / "out.txt").read_text()) == 33


# ---- training with a prefix ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [["mdlm_text8"], ["d3pm_text8", "--lambda_ce=0"], ["ar_text8"]])
def test_training_with_a_prefix(objective, call, data_dir, tmp_path):
    """A prefix is trained with, scored with, sampled with; --context tells what it is worth."""
    out = tmp_path / "out"
    assert train(call, *objective[:1], data_dir, out, *objective[1:], "--prefix=uniform:0:12", "--max_steps=20",
                 "--eval_interval=10", "--eval_sequences=100000", "--sample_interval=20").code == 0
    validated = [line["val_bits_per_token"] for line in log(out) if "val_bits_per_token" in line][-1]
    result = call("evaluate.py", out, "--json", "--data_dir", data_dir, "--batch_size=3")
    found = json.loads(result.out)
    assert "given a prefix (uniform:0:12)" in found["estimator"]
    assert found["bits_per_token"] == pytest.approx(validated, rel=1e-4)  # the same windows, masks and prefixes
    free = 32 - prefix_lengths((0, 12), 0, 0, range(found["n_sequences"]))
    assert found["n_tokens"] == free.sum()
    model, config, meta, _ = checkpoint.load_model(out, CPU)
    tokens = load_split("tiny", "val", 32, data_dir)
    data = Windows(tokens, windows(tokens, 32, found["n_sequences"]), 32, 3, CPU, torch.float32)
    nats = bound(model, config.make_objective(meta["vocab_size"]), data, prefix_range=(0, 12))
    assert found["bits_per_token"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)
    assert found["bits_per_byte"] == found["bits_per_char"]  # of ASCII
    assert found["bits_per_char"] == pytest.approx(nats.numpy() @ free / free.sum() / math.log(2), rel=1e-5)
    rows = json.loads(call("evaluate.py", out, "--context=8,0", "--json", "--data_dir", data_dir).out)["context"]
    assert [row["context"] for row in rows] == [0, 8] and rows[0]["gain"] == 0
    assert rows[1]["gain"] == pytest.approx(rows[0]["bits"] - rows[1]["bits"])
    assert 0 < rows[1]["gain_stderr"] < rows[0]["stderr"]
    text = json.loads(call("sample.py", out, "--prefix=the ", "--json").out)["samples"][0]["text"]
    assert text.startswith("the ") and len(text) == 32
    assert_one_line(call("evaluate.py", out, "--seq_len=12", "--data_dir", data_dir), "leaves nothing after the prefix")
    assert_one_line(call("evaluate.py", out, "--context=32", "--data_dir", data_dir), "leaves nothing of windows of 32")


def test_batches_give_the_prefix():
    """No mask in it, all else is masked at times; no prefix where none is asked for."""
    for prefix, fewest in (("uniform:3:9", 3), ("fixed:9", 9), ("none", 0)):
        cfg = configs.replace(configs.mdlm_text8(), seq_len=16, batch_size=64, max_steps=1, prefix=prefix)
        (x0, noise), = next(batches(np.arange(500) % 27, MDLM(27), cfg, 0, range(64), 64, pin=False))
        masked = noise.mask.any(0).tolist()
        assert masked == [False] * fewest + [True] * (16 - fewest)


@pytest.mark.parametrize("prefix, size", [("none", 29), ("uniform:0:16", 19), ("fixed:8", 19)])
def test_the_time_told(prefix, size, sample, trained, tmp_path, monkeypatch):
    """Of a canvas with a prefix of 10 tokens of 29 and 15 masks: a model that was trained with prefixes is told the
    share of masks in the rest, another one that in all."""
    payload = torch.load(trained / "ckpt.pt", weights_only=True)
    payload["config"]["prefix"] = prefix
    payload.pop("sha256")
    storage.save(tmp_path / "ckpt.pt", payload)
    told, forward = [], DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda self, xt, t, where=None: (told.append(t.tolist()),
                                                                         forward(self, xt, t, where))[1])
    sample("--template", "the cat si{8} it {7}", "--sampler=topk", "--grid=1,0.5,0", path=tmp_path)
    assert [t[0] for t in told] == pytest.approx([15 / size, 7 / size], rel=1e-5)


@pytest.mark.parametrize("prefix, most", [("none", 1 / 3), ("fixed:16", 1)])
def test_the_time_told_with_context(prefix, most):
    """evaluate.py --context: of 8 tokens after 16 given ones at most a third is masked, which is what a network is told
    that was trained without a prefix; the tokens and the masks of the 8 do not depend on the context."""
    told, seen = [], []

    def model(xt, t, where):
        mask = mask_of(where, xt)
        told.append(t), seen.append((xt[:, -8:], mask[:, -8:]))
        assert not mask[:, :-8].any()
        return torch.zeros(len(where), 27)

    tokens, starts = np.random.default_rng(0).integers(0, 27, 24 * 60), np.arange(0, 24 * 59, 24)
    data = Windows(tokens, starts, 24, 100, torch.device("cpu"), torch.float32)
    rows = measure_context(model, MDLM(27), data, [0, 16], knows_prefixes=prefix != "none")
    assert told[0].max() > 0.9 and 0.9 * most < told[1].max() <= most and len(told) == 2
    assert all(torch.equal(a, b) for a, b in zip(*seen))
    assert [row["bits"] for row in rows] == pytest.approx([np.log(27)] * 2)


def test_the_step_told_without_context():
    """evaluate.py --context 0 tells a network of T steps the step that was drawn."""
    told, objective = [], D3PM(27, T=1000)

    def model(xt, t, where):
        told.append(t)
        return torch.zeros(len(where), 27)

    tokens, starts = np.zeros(8 * 1000, dtype=np.uint16), np.arange(0, 8 * 1000, 8)
    data = Windows(tokens, starts, 8, 1000, torch.device("cpu"), torch.float32)
    measure_context(model, objective, data, [0])
    bound(model, objective, data, estimator="t_step")
    assert torch.equal(*told)


def test_the_curve_of_a_model_that_needs_a_prefix():
    """The given tokens are never masked; k counts the others."""
    asked = []

    def model(xt, t, where):
        mask = mask_of(where, xt)
        assert not mask[:, :16].any()
        asked.append(int(mask[0].sum()))
        return torch.zeros(len(where), 27)

    data = Windows(np.arange(240) % 27, np.arange(0, 240, 24), 24, 100, torch.device("cpu"), torch.float32)
    rows = measure_curve(model, MDLM(27), data, given=16)
    assert asked == [row["masks"] for row in rows] == list(range(1, 9)) and rows[-1]["mask_rate"] == 1
    assert [row["ce"] for row in rows] == pytest.approx([np.log(27)] * 8)


def test_the_sample_during_training_is_told_all(call, data_dir, tmp_path, monkeypatch):
    """At its start all of what follows the prefix is masked: time 1."""
    sizes = []
    recorded = sampler_settings.default_settings

    def watch(cfg):
        def states(objective, model, xt, generator, size, end):
            sizes.append((size.item(), (xt != 27).sum().item()))
            return recorded(cfg).states(objective, model, xt, generator, size)

        return SimpleNamespace(states=states)

    monkeypatch.setattr(sampler_settings, "default_settings", watch)
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", "--prefix=fixed:8", "--max_steps=2",
                 "--sample_interval=2").code == 0
    assert sizes == [(24, 8)]


def test_a_model_that_needs_a_prefix(call, data_dir, tmp_path):
    """It is sampled after text during training; without --prefix a line says what it was made for."""
    out = tmp_path / "out"
    flags = ["--prefix=fixed:8", "--max_steps=4", "--sample_interval=4"]
    assert train(call, "mdlm_text8", data_dir, out, *flags).code == 0
    text = next(line["sample"] for line in log(out) if "sample" in line)
    val = (data_dir / "tiny" / "val.bin").read_bytes()[:8]
    assert text.startswith("".join(" abcdefghijklmnopqrstuvwxyz"[i] for i in val)) and len(text) == 32
    assert "trained to continue text (fixed:8)" in call("sample.py", out).err
    assert "trained to continue" not in call("sample.py", out, "--prefix=the cat ").err
    found = json.loads(call("evaluate.py", out, "--json", "--data_dir", data_dir).out)
    assert found["n_tokens"] == found["n_sequences"] * 24
    curve = json.loads(call("evaluate.py", out, "--curve", "--json", "--data_dir", data_dir).out)
    assert curve["masks"][-1] == 24
    for flag in ("--order=random", "--curse"):
        assert_one_line(call("evaluate.py", out, flag, "--data_dir", data_dir), "scores whole windows")
    (tmp_path / "ends").mkdir()
    rows = json.loads(call("evaluate.py", out, "--samples=2", "--sampler=first_hitting", "--data_dir", data_dir,
                           "--out_dir", tmp_path / "ends", "--json").out)["samples"]
    assert rows[0]["nfe"] == 24
    for value, words in (("fixed:32", "leaves nothing"), ("fixed", "is not valid: use none, numbers"),
                         ("uniform:5:2", "is not valid"), ("some:3", "is not valid"), ("uniform:0:-3", "is not valid")):
        assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "bad", f"--prefix={value}"), words)
    assert_one_line(train(call, "d3pm_text8", data_dir, tmp_path / "bad", "--prefix=fixed:8"), "lambda_ce")
