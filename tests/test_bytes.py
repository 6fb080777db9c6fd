"""Bits per byte: of which text the bytes are, and that models with different tokens are compared on the same ones."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from commands import SMALL, assert_one_line, train
from data.loader import SPLITS, load_meta, load_split
from data.tokenizer import make_tokenizer
from likelihood import Windows, bound
from studies.raw_text import cut_into_chunks, nats_of_chunks, ratio, windows_of
from studies.subject import count_tokens, open_subject, same_tokens

TEXT = "".join(f"Zeile {i}: größere Wörter, 雪 und » {i * i} « .\n" for i in range(300))


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_bytes_of_a_data_set(tokenizer, call, gpt2, text_file, tmp_path):
    """meta.json has the bytes of each split; together they are the file, and tokens have them exactly."""
    call("data/prepare_textfile.py", text_file, "--name=mine", f"--tokenizer={tokenizer}", "--data_dir", tmp_path)
    meta = load_meta("mine", tmp_path)
    assert sum(meta["bytes"].values()) == len(TEXT.encode())
    decoded = ""
    for split in SPLITS:
        tokens = load_split("mine", split, 1, tmp_path)
        part = make_tokenizer(meta).decode(tokens)
        assert meta["bytes"][split] == len(part.encode()) == make_tokenizer(meta).lengths()[1][tokens].sum()
        assert split == "train" or tokenizer == "char" or part.startswith("Zeile")  # no token is cut
        decoded += part
    assert decoded == TEXT


def test_what_is_no_text_has_no_bytes(call, gpt2, tmp_path):
    """Pads of names and GPT-2's end-of-text."""
    names = "".join(f"{a}{b}{c}\n" for a in "abc" for b in "aeiou" for c in "xyz")
    (tmp_path / "names.txt").write_text(names)
    call("data/prepare_names.py", "--file", tmp_path / "names.txt", "--data_dir", tmp_path)
    meta = load_meta("names", tmp_path)
    tokens = load_split("names", "train", 1, tmp_path)
    assert meta["bytes"]["train"] == make_tokenizer(meta).lengths()[1][tokens].sum() < len(tokens) / 8
    assert make_tokenizer({"tokenizer": "gpt2", "vocab_size": 50257}).lengths()[1][50256] == 0


def test_evaluate_says_which_bytes(call, text_file, tmp_path):
    """n_bytes are those of the windows that are scored, and the whole text has the rest, too."""
    call("data/prepare_textfile.py", text_file, "--name=mine", "--data_dir", tmp_path)
    assert train(call, "mdlm_text8", tmp_path, tmp_path / "out", "--dataset=mine", "--max_steps=2").code == 0
    result = json.loads(call("evaluate.py", tmp_path / "out", "--json").out)
    meta = load_meta("mine", tmp_path)
    scored = make_tokenizer(meta).decode(load_split("mine", "val", 1, tmp_path)[:result["n_tokens"]])
    assert result["n_bytes"] == len(scored.encode()) <= result["n_bytes_of_text"] == meta["bytes"]["val"]
    assert result["bits_per_byte"] * result["n_bytes"] == pytest.approx(result["bits_per_token"] * result["n_tokens"])
    # If the text had more bytes than its tokens, as with a tokenizer that drops spaces, each window has its share.
    (tmp_path / "mine/meta.json").write_text(json.dumps(meta | {"bytes": {k: 2 * n for k, n in meta["bytes"].items()}}))
    lossy = json.loads(call("evaluate.py", tmp_path / "out", "--json").out)
    assert lossy["n_bytes"] == 2 * result["n_bytes"]
    assert lossy["bits_per_byte"] == pytest.approx(result["bits_per_byte"] / 2)


# ---- two models with different tokens --------------------------------------------------------------------------------


def test_splits_larger_than_memory():
    """Counting and comparing in pieces, the last of which is short, is counting and comparing."""
    tokens = np.array([3, 0, 1, 3, 2, 3, 0], dtype=np.uint16)
    for size in (1, 3, 7, 100):
        assert count_tokens(tokens, 5, size).tolist() == [2, 1, 1, 3, 0]
        for i in range(7):
            assert not same_tokens(tokens, np.where(np.arange(7) == i, 4, tokens), size)
        assert same_tokens(tokens, tokens.copy(), size) and not same_tokens(tokens, tokens[:-1], size)


def test_chunks():
    """Chunks are the text, cut before white space; windows cover each token of each chunk once."""
    for size in (20, 50, 10**6):
        chunks = cut_into_chunks(TEXT, size)
        assert "".join(chunks) == TEXT and all(chunk[0] in " \n" for chunk in chunks[1:])
        assert len(chunks) == 1 or max(map(len, chunks)) < 3 * size
    ids = [np.arange(n) for n in (7, 3, 0, 12)]
    seen = []
    for start, length, chunk in windows_of(ids, 5):
        seen += range(start, start + length)
        assert sum(map(len, ids[:chunk])) <= start and start + length <= sum(map(len, ids[:chunk + 1]))
    assert sorted(seen) == list(range(22))


def test_ratio():
    """The ratio of sums, and its error by the jackknife."""
    g = np.random.default_rng(0)
    sizes = g.integers(50, 150, 400)
    values = 2 * sizes + 10 * g.standard_normal(400)
    mean, error = ratio(values, sizes)
    left_out = (values.sum() - values) / (sizes.sum() - sizes)
    jackknife = math.sqrt(399 / 400 * ((left_out - left_out.mean()) ** 2).sum())
    assert mean == values.sum() / sizes.sum() and error == pytest.approx(jackknife, rel=0.02)


def test_every_token_is_scored_once(call, text_file, tmp_path, monkeypatch):
    """Nats of a chunk are the sum over its windows, of which the last is shorter: by hand, with an exact likelihood."""
    call("data/prepare_textfile.py", text_file, "--name=mine", "--data_dir", tmp_path)
    assert train(call, "ar_text8", tmp_path, tmp_path / "out", "--dataset=mine", "--max_steps=2").code == 0
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(tmp_path / "out"), f"--text={text_file}", "--batch_size=7"])
    subject = open_subject(str(tmp_path / "out"), evaluate.parse_args(), torch.device("cpu"), torch.float32)
    chunks = cut_into_chunks(TEXT[:400], 90)
    objective = subject.objective()
    nats, n = nats_of_chunks(subject, objective, objective.reported, chunks)
    assert n == 400
    for chunk, value in zip(chunks, nats):
        ids, total = subject.tokenizer.encode(chunk), 0.0
        for i in range(0, len(ids), 32):
            part = ids[i:i + 32]
            data = subject.data._replace(tokens=part, starts=np.array([0]), seq_len=len(part))
            total += len(part) * bound(subject.model, objective, data, estimator=objective.reported).item()
        assert value == pytest.approx(total, rel=1e-5)


def test_windows_of_all_lengths_have_noise_of_their_own(monkeypatch):
    """The noise of a window follows from its number among all windows, also if each length comes once."""
    seen = []

    def record(model, objective, data, mine, *rest):
        seen.extend((i, data.n, data.seq_len) for i in mine)
        return torch.ones(len(mine), dtype=torch.float64)

    monkeypatch.setattr("studies.raw_text.bound", record)
    ids = [np.zeros(n, dtype=int) for n in range(1, 41)]
    subject = SimpleNamespace(path="x", model=None, tokenizer=SimpleNamespace(encode=lambda chunk: ids[chunk]),
                              data=Windows(None, None, 64, 8, torch.device("cpu"), torch.float32))
    nats, n = nats_of_chunks(subject, None, None, range(40))
    assert sorted(seen) == [(i, 40, i + 1) for i in range(40)] and n == 820 and nats.tolist() == list(range(1, 41))


def test_models_with_different_tokens(call, gpt2, text_file, tmp_path):
    """Characters against GPT-2's tokens, on one text: the same bytes, and the difference chunk by chunk."""
    for name, config, flags in (("char", "mdlm_text8", []), ("gpt2", "mdlm_openwebtext_8gpu", ["--tokenizer=gpt2"])):
        call("data/prepare_textfile.py", text_file, f"--name={name}", *flags, "--data_dir", tmp_path)
        done = call("train.py", config, *SMALL, f"--dataset={name}", f"--data_dir={tmp_path}", "--max_steps=2",
                    f"--out_dir={tmp_path / f'out_{name}'}")
        assert done.code == 0, done.err
    pair = [tmp_path / "out_char", tmp_path / "out_gpt2"]
    assert_one_line(call("evaluate.py", *pair), "different tokens (tokenizer", "--text FILE compares bits per byte")
    result = json.loads(call("evaluate.py", *pair, "--text", text_file, "--json").out)
    assert result["n_bytes"] == len(TEXT.encode()) and result["n_chunks"] == len(cut_into_chunks(TEXT)) > 2
    one, two = result["models"]
    assert one["n_tokens"] == len(TEXT)
    assert one["bits_per_byte"] == pytest.approx(one["bits_per_token"] * one["n_tokens"] / result["n_bytes"])
    assert result["difference"] == pytest.approx(two["bits_per_byte"] - one["bits_per_byte"])
    few = json.loads(call("evaluate.py", *pair, "--text", text_file, "--n_tokens=5000", "--json").out)
    assert 2 <= few["n_chunks"] < result["n_chunks"]
    assert_one_line(call("evaluate.py", *pair, "--text", text_file, "--order=l2r"), "leave it out")
    # The second model is checked before the first is scored: nothing is on stdout.
    for name, flags, words in (("blocks", ["bd3_demo", "--block_size=4"], "no multiple of its blocks"),
                               ("after", ["mdlm_text8", "--prefix=fixed:8"], "scores whole windows")):
        done = call("train.py", *flags, *SMALL, "--dataset=char", f"--data_dir={tmp_path}", "--max_steps=2",
                    f"--out_dir={tmp_path / name}")
        assert done.code == 0, done.err
        assert_one_line(call("evaluate.py", pair[1], tmp_path / name, "--text", text_file), words)
