"""Questions with answers: what is given (prefix=until:TEXT), the loss of the rest, and the share of right answers."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoint import load_model
from cli import UserError
from commands import assert_one_line, train
from configs import Config
from data.loader import Items, check_items, load_meta, load_split, open_data
from data.tokenizer import make_tokenizer
from demos import prepared
from diffusion import D3PM, MDLM
from likelihood import Windows, bound
from randomness import prefix_lengths
from sampling import Settings
from studies.answers import measure_answers
from studies.subject import Subject
from test_checkpoint import changed
from train import batches
from world import picked

CPU, L = torch.device("cpu"), 14


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A folder with the data set `sums`: items such as 3 + 9 = 12."""
    from data import prepare_names
    folder = tmp_path_factory.mktemp("sums")
    (folder / "sums.txt").write_text("".join(f"{a} + {b} = {a + b}\n" for a in range(12) for b in range(12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["prepare_names.py", "--file", str(folder / "sums.txt"), "--name", "sums",
                                   "--length", str(L), "--data_dir", str(folder)])
        prepare_names.main()
    return folder


SMALL = ["--dataset=sums", f"--seq_len={L}", "--padding=end", "--prefix=until:=", "--n_layer=1", "--n_embd=16",
         "--n_head=2", "--max_steps=2", "--batch_size=8", "--micro_batch_size=8"]


def test_what_is_given():
    """All tokens up to the last `until`; it may be the first one, or the last but one."""
    x0 = torch.tensor([[7, 1, 2, 3], [1, 7, 7, 2], [7, 1, 7, 7], [0, 0, 7, 0]])
    assert prefix_lengths((1, 3), 0, 0, range(4), x0, 7).tolist() == [1, 3, 4, 3]


def test_batches_give_the_questions(sums):
    """Masks are in answers alone, and at times everywhere in them; the bound is per token of the answers."""
    meta, tokens = load_meta("sums", sums), load_split("sums", "train", L, sums)
    until = meta["alphabet"].index("=")
    cfg = SimpleNamespace(seq_len=L, seed=1, batch_size=256, max_steps=1, padding="end", prefix_range=(1, L - 1),
                          time_sampling="uniform")
    (x0, noise), = next(batches(tokens, MDLM(meta["vocab_size"]), cfg, 0, range(256), 256, False,
                                Items(L, None, until)))
    given = torch.tensor([row.index(until) + 1 for row in x0.tolist()])
    answer = torch.arange(L) >= given[:, None]
    assert len(given.unique()) > 2 and not (noise.mask & ~answer).any() and (noise.mask == answer).all(1).any()
    rate = noise.mask.sum(1) / answer.sum(1)
    assert rate.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("objective", [MDLM(27), D3PM(27, 20)])
def test_the_bound_is_that_of_each_question(objective):
    """The bound of a window is that with as many given tokens for all windows, whatever the lengths of the others."""
    tokens = np.arange(80) * 7 % 11
    data = Windows(tokens, np.arange(0, 80, 8), 8, 4, CPU, torch.float32)
    x0, until = data.read(slice(None)), 5
    lengths = prefix_lengths((1, 7), 0, 0, range(10), x0, until)
    keep = [i for i in range(10) if (x0[i] == until).any() and lengths[i] < 8]
    assert len({lengths[i] for i in keep}) > 2
    data = data._replace(starts=data.starts[keep])

    def logits(xt, t, where):
        left = torch.roll(xt, 1, 1).flatten()[where]
        return torch.sin(torch.outer(left + 1.0, torch.arange(27.0))) + t.mean()

    found = bound(logits, objective, data, prefix_range=(1, 7), until=until, repeats=3)
    for i, window in enumerate(keep):
        n = lengths[window]
        assert found[i] == pytest.approx(bound(logits, objective, data, prefix_range=(n, n), repeats=3)[i].item())


def test_right_answers(sums):
    """A network that adds is right in all cases, one that adds one in none; pads are no part of an answer."""
    meta, tokens = load_meta("sums", sums), load_split("sums", "train", L, sums)
    tokenizer, V = make_tokenizer(meta), meta["vocab_size"]
    until = meta["alphabet"].index("=")

    def adds(more):
        def network(xt, t, where):
            rows = []
            for row in xt.tolist():
                question = tokenizer.decode(row[:row.index(until) + 1])
                a, b = question.split("=")[0].split("+")
                text = f"{question}{meta['pad']} {int(a) + int(b) + more}".ljust(L, meta["pad"])
                rows.append(torch.nn.functional.one_hot(torch.from_numpy(tokenizer.encode(text).astype("int64")), V))
            return 50.0 * picked(torch.stack(rows), where)
        return network

    data = Windows(tokens, np.arange(0, len(tokens), L)[:20], L, 8, CPU, torch.float32)
    for more, share in ((0, 1), (1, 0)):
        config = Config(dataset="sums", prefix="until:=", seq_len=L, objective="mdlm")
        subject = Subject("", adds(more), config, meta, 0, tokenizer, "sums", "train", "", sums, data)
        right, nfe = measure_answers(subject, Settings("topk", {"k": 2}), seed=0)
        assert right.double().mean() == share and len(right) == 20 and 3 <= nfe <= 5


def test_commands(call, sums, tmp_path):
    """A run, its score per token of the answers, right answers as JSON, a sample that begins with a question."""
    out = tmp_path / "out"
    assert train(call, "names", sums, out, *SMALL, "--sample_interval=2").code == 0
    found = json.loads(call("evaluate.py", out, "--json").out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["val_bits_per_token"] for line in log if "val_bits_per_token" in line][-1] == pytest.approx(
        found["bits_per_token"], rel=1e-4)
    tokens = load_split("sums", "val", L, sums).reshape(-1, L)
    until = load_meta("sums", sums)["alphabet"].index("=")
    sample, first = next(line["sample"] for line in log if "sample" in line), tokens[0].tolist()
    assert sample.startswith(make_tokenizer(load_meta("sums", sums)).decode(first[:first.index(until) + 1]))
    assert found["n_tokens"] == sum(L - 1 - row.tolist().index(until) for row in tokens)
    found = json.loads(call("evaluate.py", out, "--answers=5", "--sampler=ancestral,topk", "--steps=2,4", "--json").out)
    assert [(row["sampler"], row["steps"]) for row in found["answers"]] == [
        ("ancestral", 2), ("ancestral", 4), ("topk", 2), ("topk", 4)] and found["n_sequences"] == 5
    assert all(0 <= row["right"] <= 1 for row in found["answers"])
    assert call("demos.py", "loss", "3 + 9 = 12", "-m", out).code == 0
    assert prepared(torch.from_numpy(tokens[0].astype("int64")), load_model(out, CPU))[1] == first.index(until) + 1
    assert "without --prefix its text is worse" in call("sample.py", out).err
    for flag in ("--curve", "--context=2", "--samples=2"):
        assert_one_line(call("evaluate.py", out, flag), "was trained on prefixes of any length (until:=)")
    (tmp_path / "text.txt").write_text("1 + 2 + 3 + 4 + 5 = 15 " * 2)
    assert_one_line(call("evaluate.py", out, "--text", tmp_path / "text.txt"), "do not have the token that ends their")
    assert_one_line(call("evaluate.py", out, "--order=l2r"), "needs a prefix (until:=)")
    assert_one_line(call("evaluate.py", out, "--baselines"), "scores whole texts", "after a prefix (until:=)")
    assert_one_line(call("evaluate.py", out, "--answers=2", "--judge", out), "--judge needs --samples")
    assert_one_line(call("evaluate.py", out, "--answers=2", "--out_dir", tmp_path), "--out_dir needs --curve")
    assert_one_line(call("evaluate.py", out, "--answers=2", "--n_tokens=99"), "leave out --n_tokens")
    other = changed(out, tmp_path / "other", config=lambda config: config | {"prefix": "until:+"})
    assert_one_line(call("evaluate.py", out, other), "different prefixes (until:= and until:+): compare runs of one")


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_split_is_checked(sums, split, tmp_path):
    shutil.copytree(sums / "sums", tmp_path / "sums")
    tokens = np.fromfile(tmp_path / "sums" / f"{split}.bin", np.uint8)
    tokens[:L] = 0
    tokens.tofile(tmp_path / "sums" / f"{split}.bin")
    config = Config(dataset="sums", data_dir=str(tmp_path), seq_len=L, prefix="until:=")
    with pytest.raises(UserError, match=f"1 of the .* of the {split} split of sums do not have"):
        open_data(config)


def test_items_without_an_answer():
    check_items(np.array([1, 7, 2, 7, 7, 3, 9]), 3, 7, "x")
    for item, until in (([1, 2, 7], 7), ([7, 1, 7], 7), ([1, 2, 3], 7)):
        with pytest.raises(UserError, match="1 of the 2 items of 3 tokens of x"):
            check_items(np.array([7, 7, 1, *item]), 3, until, "x")


def test_what_is_refused(call, sums, data_dir, trained, tmp_path):
    go = lambda *flags: train(call, "names", sums, tmp_path / "out", *SMALL, *flags)
    assert_one_line(go("--prefix=until:"), "is not valid: use none, numbers as in fixed:64")
    assert_one_line(go("--prefix=until:= "), "is 2 tokens of the data set, and must be one")
    assert_one_line(go("--prefix=until:7"), "do not have the token that ends their prefix")
    assert_one_line(go("--prefix=until:x"), "not in the alphabet")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "out", "--prefix=until:a"), "needs items")
    assert_one_line(call("evaluate.py", trained, "--answers=3", "--data_dir", data_dir), "trained without --prefix")
    assert_one_line(call("evaluate.py", trained, "--k=3", "--data_dir", data_dir), "need --samples or --answers")
    assert not (tmp_path / "out").exists()
