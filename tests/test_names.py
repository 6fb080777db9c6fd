"""Names: the data set, pads that are no text, their place in training, and what is said of a model of names."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commands import assert_one_line, train
from configs import Config
from data import prepare_names
from data.loader import items_of, load_meta, load_split, move_padding, prepare_command, random_crops
from data.tokenizer import CharTokenizer, make_tokenizer
from diffusion import MDLM
from show import piece
from studies import names
from train import batches

PAD = prepare_names.PAD
SMALL = ["--dataset=names", "--n_layer=1", "--n_embd=16", "--n_head=2", "--max_steps=2", "--batch_size=8",
         "--micro_batch_size=8"]


def syllables():
    return [a + b + c for a in "bdklmn" for b in "aeio" for c in ("", "n", "ra", "lina")]


@pytest.fixture(scope="session")
def names_dir(tmp_path_factory):
    """A data set of 96 names made by the script's own functions."""
    folder = tmp_path_factory.mktemp("names")
    (folder / "list.txt").write_text("\n".join(syllables()) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_names.py", "--file", str(folder / "list.txt"), "--data_dir", str(folder)])
        prepare_names.main()
    return folder


def test_longer_items(call, tmp_path):
    """--length: longer lines than names, such as questions with their answers; another length needs another name."""
    (tmp_path / "sums.txt").write_text("".join(f"what is {i} plus {i}? it is {2 * i}\n" for i in range(1000, 1040)))
    go = lambda *flags: call("data/prepare_names.py", "--file", tmp_path / "sums.txt", "--name=sums", "--data_dir",
                             tmp_path, *flags)
    assert_one_line(go(), "has 0 usable names (left out: 40 longer than 32)")
    assert go("--length=48").code == 0
    meta = load_meta("sums", tmp_path)
    assert meta["record"] == 48 and prepare_command("sums", meta).endswith("--name sums --length 48")
    items = names.items_of(np.asarray(load_split("sums", "train", 48, tmp_path)).reshape(-1, 48), meta)
    assert len(items) == 36 and all(item.rstrip(PAD).startswith("what is ") for item in items)
    assert "already prepared (" in go("--length=48").err
    for flags in ((), ("--length=64",)):
        assert_one_line(go(*flags), f"already prepared with record 48, not {flags[0].split('=')[1] if flags else 32}")
    assert_one_line(train(call, "mdlm_text8", tmp_path, tmp_path / "out", *SMALL, "--dataset=sums"), "use --seq_len=48")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_items_with_line_breaks(monkeypatch, tmp_path, kind):
    """An item is a value of the column `text`; one without a text is empty."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path, rows = tmp_path / f"items.{kind}", [{"text": "a\nb"}, {"text": None}, {"text": "c"}]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert prepare_names.lines_of(path) == ["a\nb", "", "c"]


def text_of(folder, split):
    """The names of a split, as it is on disk, pads included."""
    meta = load_meta("names", folder)
    ids = np.asarray(load_split("names", split, 32, folder)).reshape(-1, 32)
    return names.items_of(ids, meta), meta


# ---- the data set ----------------------------------------------------------------------------------------------------


def test_data_set(names_dir):
    """Every name takes 32 tokens, its pads at the end, is in one split, and there are no others."""
    found = {split: text_of(names_dir, split)[0] for split in ("train", "val", "test")}
    meta = load_meta("names", names_dir)
    assert meta["alphabet"][-1] == meta["pad"] == PAD and meta["record"] == 32
    assert [len(items) for items in found.values()] == [86, 5, 5]
    items = sum(found.values(), [])
    assert all(item == item.rstrip(PAD).ljust(32, PAD) for item in items)
    assert sorted(item.rstrip(PAD) for item in items) == sorted(syllables())
    assert [item.rstrip(PAD) for item in found["train"]] != syllables()[:86]  # shuffled


def test_what_is_left_out():
    """Empty lines, names that are too long or have the pad in them, and repeated ones, are left out and counted."""
    text = f"Ada\r\n\nZo\u00eb  \nAda\n{'x' * 33}\n{'y' * 32}\nan{PAD}na\n"
    found, left_out = prepare_names.clean(text.splitlines())
    assert found == ["Ada", "Zo\u00eb", "y" * 32]
    assert list(left_out.values()) == [1, 1, 1, 1]


def test_prepare_refuses(call, tmp_path):
    """A file that is not there, one without names, and a name that is no folder's: one line."""
    def prepare(*args):
        return call("data/prepare_names.py", "--data_dir", tmp_path, *args)

    assert_one_line(prepare("--file", tmp_path / "none.txt"), "cannot read")
    (tmp_path / "few.txt").write_text("ada\nada\nbo\n")
    assert_one_line(prepare("--file", tmp_path / "few.txt"), "2 usable names", "1 repeated")
    assert_one_line(prepare("--file", tmp_path / "few.txt", "--name", "../x"), "is not a valid folder name")
    assert not (tmp_path / "names").exists()


def test_pads_are_no_text_but_can_be_seen():
    """decode leaves pads out, show.py's piece shows them, encode knows them; other tokenizers are as before."""
    tokenizer = make_tokenizer({"tokenizer": "char", "alphabet": "ab" + PAD, "vocab_size": 3, "pad": PAD})
    assert tokenizer.decode([0, 2, 1, 2]) == "ab" and tokenizer.encode("a" + PAD).tolist() == [0, 2]
    assert [piece(i, 3, tokenizer) for i in range(4)] == ["a", "b", PAD, "\u2591"]
    assert CharTokenizer("ab" + PAD).decode([0, 2]) == "a" + PAD


# ---- training --------------------------------------------------------------------------------------------------------


def test_crops_begin_where_items_begin():
    """Crops of a data set of short items are whole items, each equally likely."""
    tokens = np.arange(40)
    x0 = random_crops(tokens, 8, seed=0, step=3, indices=range(3000), record=8)
    assert (x0 == x0[:, :1] + torch.arange(8)).all()
    share = (x0[:, 0] // 8).bincount(minlength=5) / 3000
    assert (x0[:, 0] % 8 == 0).all() and (share - 0.2).abs().max() < 0.03


def test_each_place_of_the_padding_is_equally_likely():
    """The pads stay together, the letters in order, and all n + 1 places for them come equally often."""
    pad, n = 9, 8000
    item = torch.tensor([4, 1, 1, 2, pad, pad, pad])
    moved = move_padding(item.repeat(n, 1), pad, seed=5, step=2, indices=range(n))
    letters = moved[moved != pad].view(n, 4)
    assert (letters == item[:4]).all()
    first = (moved == pad).int().argmax(1)  # as many letters stand before the pads
    assert all((row[k:k + 3] == pad).all() for row, k in zip(moved, first))
    share = first.bincount(minlength=5) / n
    assert len(share) == 5 and (share - 0.2).abs().max() < 5 * (0.2 * 0.8 / n) ** 0.5


def test_padding_is_a_function_of_seed_step_and_index():
    """Whoever holds a sequence, and whenever: its pads are at the same place; full and empty items stay as they are."""
    pad, x0 = 9, torch.tensor([[1, 2, 3, 4, 5, 9, 9, 9]]).repeat(40, 1)
    whole = move_padding(x0, pad, 1, 7, range(40))
    assert (move_padding(x0[20:], pad, 1, 7, range(20, 40)) == whole[20:]).all()
    for seed, step in ((1, 8), (2, 7)):
        assert (move_padding(x0, pad, seed, step, range(40)) != whole).any()
    for row in ([[1, 2, 3]], [[9, 9, 9]]):
        assert move_padding(torch.tensor(row), pad, 0, 0, [0]).tolist() == row


def test_batches_move_the_padding_of_every_share_alike(names_dir):
    """train.batches with padding=random: real names of the split, and two halves of a batch are the whole batch."""
    items, meta = text_of(names_dir, "train")
    tokens = load_split("names", "train", 32, names_dir)
    config = Config(dataset="names", seq_len=32, batch_size=16, padding="random", seed=3, n_embd=16, n_head=2,
                    objective="mdlm", conditioning="none", max_steps=9)
    known = items_of(config, meta)

    def x0(indices, step=4):
        parts = next(batches(tokens, MDLM(len(meta["alphabet"])), config, step, indices, 4, False, known))
        return torch.cat([x for x, _ in parts])

    whole = x0(range(16))
    assert (torch.cat((x0(range(8)), x0(range(8, 16)))) == whole).all()
    drawn = names.items_of(whole, meta)
    assert {item.replace(PAD, "") for item in drawn} <= {item.replace(PAD, "") for item in items}
    assert all(names.valid(item, PAD) for item in drawn) and any(not item.endswith(PAD) for item in drawn)


def test_train_refuses(call, names_dir, data_dir, tmp_path):
    """Windows that are no items, and random padding of text that has no pads: one line, and nothing is written."""
    result = train(call, "names", names_dir, tmp_path / "a", *SMALL, "--seq_len=16", "--padding=end")
    assert_one_line(result, "items of 32 tokens", "--seq_len=32")
    result = train(call, "mdlm_text8", data_dir, tmp_path / "b", "--padding=random")
    assert_one_line(result, "has no pads", "--padding=end")
    assert_one_line(train(call, "names", names_dir, tmp_path / "c", "--padding=middle"), "padding")
    assert not list(tmp_path.iterdir())


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_valid():
    """Letters, and all pads together: wherever they are, or none at all."""
    assert all(names.valid(item, "-") for item in ("ab--", "--ab", "a--b", "abcd", "a-bc"))
    assert not any(names.valid(item, "-") for item in ("----", "-a--", "a-b-", "-ab-"))


def test_distances():
    """total_variation is the largest difference of probabilities; chance is what draws from p itself have."""
    p, q = {1: 0.5, 2: 0.25, 3: 0.25}, {1: 0.25, 2: 0.25, 4: 0.5}
    assert names.total_variation(p, q) == 0.5 and names.total_variation(p, p) == 0
    assert names.distribution([3, 1, 3, 3]) == {1: 0.25, 3: 0.75}
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(500, list(p.values()), size=2000) / 500
    mean = np.abs(drawn - list(p.values())).sum(1).mean() / 2
    assert names.chance(p, 500) == pytest.approx(mean, rel=0.05)


def test_gaps(names_dir):
    """First two letters, masks, last letter, pads."""
    meta = load_meta("names", names_dir)
    canvas, mask = names.gaps(["balina", "dan"], meta, 20), meta["vocab_size"]
    assert (canvas == mask).sum(1).tolist() == [20, 20] and (canvas[:, 2:22] == mask).all()
    assert [item.replace(PAD, "") for item in names.items_of(canvas[:, [0, 1, 22, 23]], meta)] == ["baa", "dan"]


def test_report_is_right(names_dir, monkeypatch, capsys):
    """The shares are those of known draws, put in the place of a network's."""
    meta = load_meta("names", names_dir)
    old, held_out = text_of(names_dir, "train")[0][0], [item.rstrip(PAD) for item in text_of(names_dir, "test")[0]]
    drawn = ["baboo", "baboo", held_out[0], old.rstrip(PAD), "", f"a{PAD}b"]  # 4 valid, 3 different, 3 new
    held_out = [name for name in held_out if len(name) >= 3]
    gaps = [name[:-1] + PAD * (32 - len(name)) + name[-1] for name in held_out]
    gaps[:2] = ["ab" + "i" * 29 + "a", "ba" + PAD + "i" + PAD * 27 + "a"]  # as long as the gap; pads at two places
    encode = CharTokenizer(meta["alphabet"]).encode
    answers = iter([torch.tensor(np.stack([encode(item.ljust(32, PAD)) for item in items]).astype(np.int64))
                    for items in (drawn, gaps)])
    config = Config(dataset="names", data_dir=str(names_dir), objective="mdlm", conditioning="none")
    monkeypatch.setattr(names, "load_model", lambda *_: SimpleNamespace(config=config, meta=meta))
    monkeypatch.setattr(names, "fill", lambda *_: next(answers))
    names.names(SimpleNamespace(checkpoint="x", samples=6, gap=None, seed=0, data_dir=""))
    lines = capsys.readouterr().out.splitlines()
    shares = [line.split()[:2] for line in lines if line.startswith("  ") and "%" in line and "[" not in line]
    m = len(held_out)
    assert shares == [["valid", "66.7%"], ["unique", "75.0%"], ["novel", "75.0%"], ["hits", "25.0%"]] + [
        [what, f"{n / m:.1%}"] for what, n in (("valid", m - 1), ("shorter", m - 2), ("names", m - 2),
                                               ("glued", sum(name[:-1] in syllables() for name in held_out[2:])),
                                               ("hits", m - 2))]


@pytest.fixture(scope="module")
def run(names_dir, tmp_path_factory):
    """The folder of a short run of the config `names`, small, in this process."""
    import runpy
    import sys
    from commands import ROOT, arguments
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, arguments("names", names_dir, out, *SMALL, "--max_steps=120",
                                                           "--lr=0.02", "--eval_interval=120", "--log_interval=60"))))
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return out


def test_commands(call, run):
    """sample.py prints names without pads, with the prefix and the suffix at their ends; demos.py measures."""
    result = call("sample.py", run, "--batch_size", 4, "--prefix", "ba", "--suffix", "n", "--json")
    assert result.code == 0, result.err
    for sample in json.loads(result.out)["samples"]:
        assert PAD not in sample["text"] and sample["text"].startswith("ba") and sample["text"].endswith("n")
        assert len(sample["tokens"]) == 32
    result = call("demos.py", "names", run, "-n", 20, "--seed", 3)
    assert result.code == 0 and "20 names drawn, seed 3" in result.out and "gap of 29 tokens" in result.out, result.err
    assert call("demos.py", "names", run, "-n", 20, "--seed", 3).out == result.out
    assert_one_line(call("evaluate.py", run, "--seq_len=16"), "windows of 16 would cut them: use --seq_len=32")


def test_names_in_blocks(call, names_dir, tmp_path):
    """Block diffusion ends a name at its first pad: later blocks are pads, without the network. It fills no gaps."""
    out = tmp_path / "out"
    assert train(call, "names", names_dir, out, *SMALL, "--objective=block", "--block_size=4", "--padding=end",
                 "--max_steps=60", "--lr=0.02").code == 0
    result = call("sample.py", out, "--batch_size", 20, "--prefix", "ba", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    pad = load_meta("names", names_dir)["alphabet"].index(PAD)
    ended = [s["tokens"] for s in found["samples"] if pad in s["tokens"][:28]]
    assert len(ended) > 5
    for tokens in ended:
        after = tokens.index(pad) // 4 * 4 + 4
        assert set(tokens[after:]) <= {pad}
    assert all(PAD not in s["text"] and len(s["text"]) <= 32 for s in found["samples"])
    assert found["tokens_read"] < 20 * 32
    measured = call("demos.py", "names", out, "-n", 20)
    assert measured.code == 0 and "fills no gaps" in measured.out


def test_names_refuses(call, run, trained):
    """A model of something else, no checkpoint, data that is not there, a gap that is too wide: one line."""
    assert_one_line(call("demos.py", "names", trained), "no pad")
    assert_one_line(call("demos.py", "names", run / "none"), "no checkpoint")
    assert_one_line(call("demos.py", "names", run, "--data_dir", run), "not prepared")
    assert_one_line(call("demos.py", "names", run, "--gap", 30), "use at most 29")
