"""Folders to share: what export writes, what its card says, and that the folder is read again."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest

from commands import ROOT, assert_one_line, train
from configs import from_command_line
from data.tokenizer import KNOWN
from export import last_validation, training_commands
from parallel import share_of_batch


def test_export(call, trained, data_dir, tmp_path, monkeypatch):
    """The folder samples and scores as the checkpoint does, carries its numbers, and says if it was damaged."""
    result = call("evaluate.py", trained, "--json")
    (tmp_path / "result.json").write_text(result.out)
    folder = tmp_path / "shared"
    assert call("checkpoint.py", "export", trained, folder, "--results", tmp_path / "result.json").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = json.loads(call("evaluate.py", folder, "--json", "--data_dir", data_dir).out)
    assert again["bits_per_token"] == json.loads(result.out)["bits_per_token"]
    assert call("sample.py", folder, "--seed=3").out == call("sample.py", trained, "--seed=3").out
    card = (folder / "README.md").read_text()
    assert f"{again['bits_per_token']:.4f} ± {again['stderr']:.4f}" in card and "python sample.py shared" in card
    assert "validation during training, step 60" in card and "mdlm_text8" in card
    assert f"| {json.loads(result.out)['bits_per_char']:.4f} | tiny val, " in card
    prepare, train_again = card.split("```sh\n")[2].split("\n```")[0].splitlines()
    assert "micro_batch_size" not in train_again
    assert prepare == "python data/prepare_textfile.py FILE --name tiny --alphabet text8"
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(sys, "argv", shlex.split(train_again)[1:])
    again = dataclasses.asdict(from_command_line("train.py", "", lambda p: None)[1])
    assert {key: again[key] for key in config["config"]} == config["config"] and again["max_steps"] == 60
    assert config["meta"]["alphabet"] == KNOWN["text8"]["alphabet"] and "/" not in json.dumps(config["config"])
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, ROOT / "checkpoint.py", "export", trained, tmp_path / "c"], env=ascii_only,
                   check=True)
    assert "±" in (tmp_path / "c" / "README.md").read_text(encoding="utf-8")
    half = tmp_path / "half"
    assert call("checkpoint.py", "export", trained, half, "--dtype=float16").code == 0
    size = lambda path: (path / "model.safetensors").stat().st_size
    assert size(half) < 0.55 * size(folder)
    of_half = json.loads(call("evaluate.py", half, "--json", "--data_dir", data_dir, "--dtype=float32").out)
    assert of_half["bits_per_token"] == pytest.approx(json.loads(result.out)["bits_per_token"], abs=0.01)
    nothing = tmp_path / "nothing"
    assert_one_line(call("checkpoint.py", "export", nothing, folder), "already exists")  # said before it is read
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", folder / "config.json"),
                    "is not the output of `evaluate.py")
    (tmp_path / "large.json").write_text(json.dumps(json.loads(result.out) | {"bits_per_token": 10**400}))
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", tmp_path / "large.json"),
                    "is not the output of `evaluate.py")
    (tmp_path / "other.json").write_text(call("evaluate.py", trained, "--json", "--raw").out)
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", tmp_path / "other.json"),
                    "has the score of other weights", "step 60, raw")
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", tmp_path / "none.json"),
                    "cannot read", "No such file")
    assert_one_line(call("checkpoint.py", "export", nothing, tmp_path / "z"), "no checkpoint at")
    assert not (tmp_path / "z").exists() and not list(tmp_path.glob(".*.tmp"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert_one_line(call("sample.py", folder), "do not match the SHA-256")


def test_a_card_of_several_workers_has_no_commands(call, trained, tmp_path):
    """How many there were is not known, so the commands would train another model."""
    folder = tmp_path / "two words"
    assert "`python sample.py '" in call("checkpoint.py", "export", trained, folder).err
    card, text = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert "python sample.py 'two words'" in text and len(training_commands(card)) == 2
    card["config"]["local_steps"] = 4
    assert training_commands(card) == []


def test_a_card_of_an_odd_batch(call, data_dir, tmp_path, monkeypatch):
    """Its command is one that train.py takes: it has micro-batches that divide the batch."""
    out = tmp_path / "out"
    flags = ["--batch_size=384", "--micro_batch_size=384", "--max_steps=1"]
    assert train(call, "mdlm_text8", data_dir, out, *flags).code == 0
    assert call("checkpoint.py", "export", out, tmp_path / "shared").code == 0
    *_, again = (tmp_path / "shared" / "README.md").read_text().split("```sh\n")[2].split("\n```")[0].splitlines()
    monkeypatch.setattr(sys, "argv", shlex.split(again)[1:])
    cfg = from_command_line("train.py", "", lambda p: None)[1]
    assert share_of_batch(cfg, 1) == (384, 128)  # not the usual 256


def test_a_card_names_the_weights_that_training_began_with(call, trained, data_dir, tmp_path):
    """Without them the commands would train another model. A resumed run, and its folder, still know them."""
    tune = ["mdlm_text8", data_dir, tmp_path / "tuned", "--shift_tokens", "--max_steps=4", "--checkpoint_interval=2"]
    assert train(call, *tune, f"--init_from={trained}").code == 0
    (tmp_path / "tuned" / "ckpt.pt").unlink()  # so that the run goes on at step 2
    assert train(call, *tune, "--resume=auto").code == 0
    assert call("checkpoint.py", "export", tmp_path / "tuned", tmp_path / "a").code == 0
    assert call("checkpoint.py", "export", tmp_path / "a", tmp_path / "b").code == 0  # from a folder, too
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert f"began with the weights of `{trained}`" in text and "from nothing" not in text
    assert text.count(f"--init_from {trained}") == 1 and "python train.py mdlm_text8" in text


def test_a_card_has_its_own_validation(tmp_path):
    """The validation on a card is the last one up to the step of the weights, not a later one."""
    lines = [{"step": step, "val_bits_per_token": 4 - step / 100, "val_stderr": 0.1} for step in (20, 40, 60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    for damage in ("", "\0\0\nnull\n[1]\n" + "[" * 20_000 + "\n"):  # damaged lines are left out
        (tmp_path / "log.jsonl").write_text(damage + (tmp_path / "log.jsonl").read_text())
        found = [last_validation(tmp_path / "ckpt_best.pt", step) for step in (10, 20, 50, 60)]
        assert found == [None, (3.8, 0.1, 20), (3.6, 0.1, 40), (3.4, 0.1, 60)]


def test_nothing_is_written_over(call, trained, tmp_path):
    """Samples do not replace weights or settings; export leaves alone what it did not make; a damaged config.json is
    one line."""
    folder = tmp_path / "shared"
    (tmp_path / ".shared.tmp").mkdir()
    (tmp_path / ".shared.tmp" / "precious").write_text("x")
    assert call("checkpoint.py", "export", trained, folder).code == 0
    assert (tmp_path / ".shared.tmp" / "precious").exists()
    for name in ("model.safetensors", "config.json"):
        assert_one_line(call("sample.py", folder, "--out", folder / name), "part of the checkpoint")
    assert_one_line(call("sample.py", trained, "--html", trained / "ckpt.pt"), "must end in .html")
    assert call("sample.py", folder, "--steps=2", "--out", folder / "samples.txt").code == 0
    text = (folder / "config.json").read_text()
    card = json.loads(text)
    for changes in ({"config": 5}, {"config": None}, {"config": card["config"] | {"n_layer": "2"}}, {"meta": []},
                    {"config": card["config"] | {"n_layer": 2.5}}, {"config": card["config"] | {"schedule": []}},
                    {"config": card["config"] | {"prefix": 5}}, {"meta": card["meta"] | {"alphabet": "ab"}},
                    {"meta": card["meta"] | {"vocab_size": "27"}}, {"weights_sha256": "x"}):
        (folder / "config.json").write_text(json.dumps(card | changes))
        assert_one_line(call("sample.py", folder))
    (folder / "config.json").write_text(text)
    assert call("sample.py", folder, "--steps=2").code == 0
    assert_one_line(call("sample.py", trained, "--dataset=tiny"), "already names its data set")
