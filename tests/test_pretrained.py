"""The model that comes with the repository: small, inert, and it knows English."""

import json
import random

import pytest
import torch

import sample
from checkpoint import load_model
from commands import ROOT, assert_one_line
from data.tokenizer import make_tokenizer
from likelihood import Windows, bound

# Not from any book: nothing of it was trained on.
RECORDED = (3.336555, 3.916024, 3.741929)  # nats, tokens 1, 4, 7 ... masked; 2, 5, 8 ...; 3, 6, 9 ...
TEXT = ("when the rain had stopped the two sisters walked down to the harbour and asked every fisherman they met "
        "whether a letter had come with the morning boat but nobody had seen one and so they bought some bread and "
        "turned back towards the hill where their father was waiting for them at the gate with his old grey dog")


def loaded():
    model, config, meta, _ = load_model(str(sample.PRETRAINED), torch.device("cpu"))
    return model, config, make_tokenizer(meta), config.make_objective(meta["vocab_size"])


def test_files():
    """Weights, settings and a card, 12 MB at most, and nothing that could run."""
    files = {path.name: path.stat().st_size for path in sample.PRETRAINED.iterdir()}
    assert files.keys() == {"model.safetensors", "config.json", "README.md"} and sum(files.values()) <= 12e6
    card = json.loads((sample.PRETRAINED / "config.json").read_text())
    assert card["measured"] and card["measured"][0]["split"] == "test"


def test_without_arguments(call, monkeypatch, tmp_path):
    """`python sample.py`, from any folder: a text of the model's length appears, in words."""
    monkeypatch.chdir(tmp_path)
    result = call(ROOT / "sample.py")
    text = result.out.rstrip("\n").split("\n")[-1]
    assert result.code == 0 and 300 < len(text) < 900 and set(text) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert " the " in text


def test_it_knows_english():
    """English costs far less than the same words with their letters in any order, and those less than any letters."""
    model, config, tokenizer, objective = loaded()
    letters = random.Random(0)
    mixed = " ".join("".join(letters.sample(word, len(word))) for word in TEXT.split())
    any_letters = "".join(letters.choice(" abcdefghijklmnopqrstuvwxyz") for _ in TEXT)
    bits = []
    for text in (TEXT, mixed, any_letters):
        tokens = tokenizer.encode(text)[:config.seq_len]
        data = Windows(tokens, torch.zeros(1, dtype=torch.long).numpy(), len(tokens), 16, torch.device("cpu"),
                       torch.float32)
        nats = bound(model, objective, data, repeats=32).item() * len(tokens)
        bits.append(nats / 0.6931 / len(tokenizer.decode(tokens)))  # per character
    assert bits[0] < 1.6 and bits[0] + 2 < bits[1] and bits[1] + 1 < bits[2]


@torch.no_grad()
def test_recorded_numbers():
    """Cross-entropies of this text, every third token masked, as recorded once: whatever changes what the published
    weights mean, such as another sign of the rotation, epsilon or GELU, changes them."""
    model, config, tokenizer, objective = loaded()
    x0 = torch.from_numpy(tokenizer.encode(TEXT)[:config.seq_len].astype("int64"))[None]
    for first, recorded in enumerate(RECORDED):
        where = torch.zeros_like(x0, dtype=torch.bool)
        where[:, first::3] = True
        logits = model(objective.corrupt(x0, where), torch.tensor([1 / 3]), where=where)
        assert torch.nn.functional.cross_entropy(logits, x0[where]).item() == pytest.approx(recorded, abs=1e-4)


def test_texts_that_it_does_not_know(call, tmp_path):
    """Its vocabulary has all bytes, but it has seen 27 symbols: a prompt in others is refused, a file is converted."""
    assert_one_line(call("sample.py", "--prefix", "The end, "), "--prefix: ',' 'T' not in the alphabet ' abc")
    assert_one_line(call("sample.py", "--template", "ab\udcff ____"), "--template is not valid text")
    (tmp_path / "a.txt").write_text(f"{TEXT.title()}!\n" * 4)
    (tmp_path / "b.txt").write_text(" ".join([TEXT] * 4))
    bits = [json.loads(call("evaluate.py", sample.PRETRAINED, "--json", "--text", tmp_path / name).out)["bits_per_byte"]
            for name in ("a.txt", "b.txt")]
    assert bits[0] == bits[1] < 3


def test_it_fills_in(call):
    """What is missing of two common words in their sentence is found."""
    result = call("sample.py", "--template", "for the first _ in his life he did not _ what to do",
                  "--sampler=topk", "--k=1", "--temperature=0.1")
    assert result.out == "for the first time in his life he did not know what to do\n"
