"""Damage: crashes while saving, flipped bits, full disks, lost and locked files. No checkpoint is lost."""

import errno
import json
import random
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import storage
from cli import UserError
from commands import (ROOT, arguments, assert_identical, assert_one_line, log, losses, read_until,
                      start, stop_after, train)
from conftest import TRAINED
from foreign import files


# ---- checkpoints that cannot be written or read ----------------------------------------------------------------------


PAYLOAD = {"name": "x", "step": 0, "meta": {"tokenizer": "char", "alphabet": "ab", "vocab_size": 2},
           "config": {"lr": 0.1, "betas": (0.9, 0.98), "wandb": False, "compile": None},
           "model": {"w": torch.arange(64.0).view(8, 8), "b": torch.ones(3, dtype=torch.bfloat16)},
           "ema": {"w": torch.zeros(8, 8)},
           "optimizer": {"w": {"step": torch.tensor(3.0), "exp_avg": torch.zeros(0)}}}


def test_a_crash_at_any_instant_of_saving(tmp_path):
    """The process dies at the first, second, ... system call of save: a whole checkpoint is there, the last or the one
    before, and it is the last from the second rename on."""
    calls = ["open", "fsync", "replace", "replace", "fsync"]
    for died_at in range(len(calls) + 1):
        out = tmp_path / str(died_at)
        out.mkdir()
        for step in (1, 2):
            storage.save(out / "ckpt.pt", PAYLOAD | {"step": step}, keep_previous=True)
        storage.save(out / "ckpt_best.pt", PAYLOAD)
        code = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import builtins, torch, storage
payload = storage.read({str(out)!r}) | {{"step": 3}}
seen = 0
def dying(function):
    def call(*args, **kwargs):
        global seen
        if seen == {died_at}:
            os._exit(9)
        seen += 1
        return function(*args, **kwargs)
    return call
os.replace, os.fsync, storage.open = dying(os.replace), dying(os.fsync), dying(open)
storage.save({str(out / "ckpt.pt")!r}, payload, keep_previous=True)
"""
        died = subprocess.run([sys.executable, "-c", code]).returncode
        assert died == (9 if died_at < len(calls) else 0)
        expected = 3 if died_at >= 4 else 2
        assert storage.read_latest(out)[1]["step"] == storage.read(out)["step"] == expected
        assert (out / "ckpt.pt").exists() == (died_at != 3)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """Each of 400 single-bit flips anywhere, and each one in the archive's own records, is either reported by name or
    changes nothing of the contents.
    """
    path = tmp_path / "ckpt.pt"
    storage.save(path, PAYLOAD)
    whole, contents = path.read_bytes(), storage.digest(storage.read(path))
    chance, noticed, harmful = random.Random(0), 0, 0

    def reported(bit):
        """Flip the bit, and tell whether that is reported. If not, the contents must be the same."""
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            payload = storage.read(path)
        except UserError as error:
            assert str(path) in str(error)
            return True
        assert storage.digest(payload) == contents
        return False

    for _ in range(400):
        noticed += reported(chance.randrange(8 * len(whole)))
        try:
            loaded = torch.load(path, weights_only=True)
            harmful += storage.digest({k: v for k, v in loaded.items() if k != "sha256"}) != contents
        except Exception:
            pass
    print(f"{noticed} of 400 flips reported; torch.load read {harmful} of them as something else, without a word")
    assert noticed > 20 and harmful > 5
    first = whole.index(b"PK\x01\x02")  # the list of the archive's files; at the end, where that list lies
    for bit in [*range(8 * first, 8 * (first + 46)), *range(8 * (len(whole) - 98), 8 * len(whole))]:
        reported(bit)


def test_every_kind_of_change_changes_the_hash():
    """Keys, order, types, shapes and values all count; numbers that are not stored have no hash."""
    base = storage.digest(PAYLOAD)
    w = PAYLOAD["model"]["w"]
    for change in ({"name": "y"}, {"config": PAYLOAD["config"] | {"lr": 0.2}},
                   {"meta": PAYLOAD["meta"] | {"pad": None}}, {"extra": 1}, {"model": {"v": w}},
                   {"config": PAYLOAD["config"] | {"betas": [0.9, 0.98]}},
                   {"model": PAYLOAD["model"] | {"w": w.view(4, 16)}}, {"model": PAYLOAD["model"] | {"w": w.int()}},
                   {"model": PAYLOAD["model"] | {"w": w + 1e-5}}, {"optimizer": {}}):
        assert storage.digest(PAYLOAD | change) != base, change
    assert storage.digest(dict(reversed(PAYLOAD.items()))) != base
    with pytest.raises(ValueError, match="without all of its numbers"):
        storage.digest({"x": torch.zeros(1).expand(2)})


@pytest.mark.parametrize("damage, resume", [("truncated", "auto"), ("flipped", "auto"), ("missing", "auto"),
                                            ("flipped", "out/ckpt_prev.pt")])
def test_a_run_continues_from_its_previous_checkpoint(call, data_dir, tmp_path, monkeypatch, damage, resume):
    """A damaged last checkpoint is reported by name and kept aside, the one before is used, and the end is the same.
    The user may also name the one before."""
    monkeypatch.chdir(tmp_path)
    options = ["--max_steps=8", "--checkpoint_interval=3"]
    for out in ("whole", "out"):
        assert train(call, "mdlm_text8", data_dir, tmp_path / out, *options).code == 0
    path = tmp_path / "out" / "ckpt.pt"
    content = bytearray(path.read_bytes())
    content[content.index(storage.read(path)["model"]["embed.weight"].numpy().tobytes())] ^= 4
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1000] if damage == "truncated" else content)
        assert_one_line(call("sample.py", tmp_path / "out"), "ckpt.pt")
        assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "out", *options, f"--resume={path}"), "ckpt.pt")
    if resume == "auto":
        monkeypatch.setattr(storage, "is_damaged", lambda path: pytest.fail(f"{path} is read again"))
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", *options, f"--resume={resume}")
    assert result.code == 0 and "continuing at step 6" in result.out
    if resume == "auto" and damage != "missing":
        assert f"{path} " in result.err and "continuing from" in result.err and result.err.count("\n") == 1
    if damage != "missing":
        assert (tmp_path / "out" / "ckpt_damaged.pt").exists()
    assert_identical(tmp_path / "whole", tmp_path / "out")
    assert storage.read(tmp_path / "out" / "ckpt_prev.pt")["step"] == 6


@pytest.mark.parametrize("resume", ["auto", "out/ckpt.pt", "out"])
def test_the_last_checkpoint_is_read_once(call, data_dir, tmp_path, monkeypatch, resume):
    """However the user names it: a second copy in memory could be too large."""
    monkeypatch.chdir(tmp_path)
    for flags in ([], [f"--resume={resume}"]):
        assert train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=2", *flags).code == 0
        monkeypatch.setattr(storage, "is_damaged", lambda path: pytest.fail(f"{path} is read again"))


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(call, data_dir, tmp_path, monkeypatch):
    """Without permission, or if the file system fails, nothing is renamed, and no older state is trained on."""
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, "--max_steps=4", "--checkpoint_interval=2").code == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.pt")}

    quietly = files.quietly

    def fail(path):
        if path.name == "ckpt.pt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return quietly(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "quietly", fail)
        for resume in ("auto", out / "ckpt_prev.pt"):
            result = train(call, "mdlm_text8", data_dir, out, "--max_steps=4", f"--resume={resume}")
            assert_one_line(result, "ckpt.pt cannot be read: Input/output error")
    assert {path.name: path.read_bytes() for path in out.glob("*.pt")} == before


def test_a_user_may_go_back(call, data_dir, tmp_path):
    """--resume of the previous checkpoint does not call the last one damaged if it is whole."""
    out, options = tmp_path / "out", ["--max_steps=4", "--checkpoint_interval=2"]
    assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
    result = train(call, "mdlm_text8", data_dir, out, *options, f"--resume={out / 'ckpt_prev.pt'}")
    assert result.code == 0 and "continuing at step 2" in result.out and not (out / "ckpt_damaged.pt").exists()


def test_two_damaged_checkpoints_are_not_written_over(call, data_dir, tmp_path):
    """If the previous checkpoint is damaged as well, the run stops, names both, and changes nothing."""
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=4", "--checkpoint_interval=2").code == 0
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / "out" / name).write_bytes(b"rubbish")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=4", "--resume=auto"),
                    "out/ckpt.pt", "out/ckpt_prev.pt", f"another --out_dir and --init_from={tmp_path / 'out'}")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == b"rubbish"


def test_full_disk(call, data_dir, tmp_path, monkeypatch):
    """No room for the next checkpoint: one line that says so, exit code 2, and both earlier ones are untouched."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert train(call, "mdlm_text8", data_dir, out, "--max_steps=6", "--checkpoint_interval=2").code == 0
    files = {path: path.read_bytes() for path in (out / "ckpt.pt", out / "ckpt_prev.pt")}
    size, limits = (out / "ckpt.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(size // 3, size, size // 15):  # torch.save fails in different ways
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            result = train(call, "mdlm_text8", data_dir, out, "--max_steps=6", "--checkpoint_interval=2",
                           "--eval_interval=100", "--resume=auto")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert result.code == 2 and result.err.count("\n") == 1, result.err
        assert "cannot write" in result.err and "File too large" in result.err and "--resume auto" in result.err
        assert {path: path.read_bytes() for path in files} == files and not list(out.glob(".*.tmp"))
    assert train(call, "mdlm_text8", data_dir, out, "--max_steps=6", "--checkpoint_interval=2",
                 "--resume=auto").code == 0


def test_closed_streams(trained):
    """A command that was started without stdout or stderr does its work, as daemons want it."""
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"exec {sys.executable} {ROOT / 'sample.py'} {trained} --steps 2 {closed}"],
                              capture_output=True, text=True)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (closed, done.stderr)
        assert (len(done.stdout) == 33) == (closed == "2>&-") and ("network calls" in done.stderr) == (closed == ">&-")


def test_nobody_reads_the_output(data_dir, tmp_path):
    """`train.py | head` goes on to the end without complaint; output to a full disk ends the run with one line."""
    def shell(out, before, after):
        command = [sys.executable, *arguments("mdlm_text8", data_dir, out, "--max_steps=9")]
        return subprocess.run(["bash", "-c", f"{before} {' '.join(map(str, command))} {after}"], capture_output=True,
                              text=True)

    process = shell(tmp_path / "out", "set -o pipefail;", "| head -2")
    assert process.returncode == 0 and process.stderr == "" and storage.read(tmp_path / "out")["step"] == 9
    process = shell(tmp_path / "other", "", "> /dev/full")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "No space left" in process.stderr


def test_a_damaged_log_does_not_stop_a_run(call, data_dir, tmp_path, monkeypatch):
    """Lines that a crash spoilt are left out and reported; the file is kept as log_damaged.jsonl."""
    out, options = tmp_path / "out", ["--max_steps=6"]
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
    content = (out / "log.jsonl").read_bytes().split(b"\n")
    content[2] = b"\0" * 50
    (out / "log.jsonl").write_bytes(b"\n".join(content))
    result = train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto")
    assert result.code == 0 and "damaged lines" in result.err and "(first: line 3)" in result.err
    assert [line["step"] for line in log(out) if "bits_per_token" in line] == [1, 3, 4, 5, 6]
    assert b"\0" in (out / "log_damaged.jsonl").read_bytes()


def test_what_is_left_of_a_run_is_not_written_over(call, data_dir, tmp_path):
    """A folder with only the best checkpoint, or only the log, is that of a run, too; an empty --resume is refused."""
    out, options = tmp_path / "out", ["--max_steps=2"]
    assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
    assert_one_line(train(call, "mdlm_text8", data_dir, out, *options, "--resume="), "--resume: the value is empty")
    for name in ("ckpt.pt", "ckpt_best.pt"):
        (out / name).unlink()
        assert_one_line(train(call, "mdlm_text8", data_dir, out, *options), "already holds a run")
    assert [path.name for path in out.glob("[a-z]*")] == ["log.jsonl"]


def test_lost_checkpoints(call, data_dir, tmp_path):
    """--resume auto touches nothing and says so if the checkpoints of a run are gone. If the run was stopped before its
    first checkpoint, it says that it begins again, and does."""
    out, options = tmp_path / "out", ["--max_steps=8", "--eval_interval=1", "--checkpoint_interval=4"]
    assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (out / name).unlink()
    left = {path.name: path.read_bytes() for path in out.iterdir()}
    for gone in (".lock", "log.jsonl", "ckpt_best.pt"):  # the log and the best checkpoint both know how far it was
        (out / gone).unlink()
        names = {path.name for path in out.iterdir()}
        if gone != "ckpt_best.pt":
            assert_one_line(train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto"),
                            "reached step", "ckpt.pt and ckpt_prev.pt are missing", f"--init_from={out}")
        assert {path.name for path in out.iterdir()} - {".lock"} == names - {".lock"}
        (out / ".lock").unlink(missing_ok=True)
        if gone == "log.jsonl":
            (out / gone).write_bytes(left[gone])
    lines = [line for line in map(json.loads, left["log.jsonl"].splitlines()) if line["step"] <= 4]
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines if "saved" not in line))
    before = losses(out)
    result = train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto")
    assert result.code == 0 and "has no checkpoint yet: it begins again at step 0" in result.err
    assert storage.read(out)["step"] == 8 and losses(out)[:4] == before


def disk_is_full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_lost_checkpoints_of_short_runs(call, data_dir, monkeypatch, tmp_path):
    """A run that ended, or that a signal stopped, had a checkpoint, however few steps it took. One that failed before
    it was saved had none, and begins again."""
    out, options = tmp_path / "out", ["--max_steps=4", "--eval_interval=1", "--checkpoint_interval=100"]
    for stop in (True, False):
        with monkeypatch.context() as patch:
            stop_after(patch, 2 if stop else 10)
            assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
        (out / "ckpt.pt").unlink()
        assert_one_line(train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto"), "are missing: put one")
        shutil.rmtree(out)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync_folder", disk_is_full)
        assert train(call, "mdlm_text8", data_dir, out, *options).code == 2
    for path in out.glob("*.pt"):
        path.unlink()
    result = train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto")
    assert result.code == 0 and "begins again at step 0" in result.err


@pytest.mark.parametrize("crashed, goes_on", [
    (["--checkpoint_interval=100"], ["--checkpoint_interval=2"]),
    (["--local_steps=4", "--checkpoint_interval=2"],) * 2])
def test_when_the_first_checkpoint_was_due(call, data_dir, monkeypatch, tmp_path, crashed, goes_on):
    """A run that crashed before its first checkpoint was due begins again, also if it would be due earlier now."""
    out, options = tmp_path / "out", ["--max_steps=4", "--eval_interval=100", "--log_interval=1"]
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync_folder", disk_is_full)
        assert train(call, "mdlm_text8", data_dir, out, *options, *crashed).code == 2
    for path in out.glob("*.pt"):
        path.unlink()
    assert losses(out)
    result = train(call, "mdlm_text8", data_dir, out, *options, *goes_on, "--resume=auto")
    assert result.code == 0 and "begins again at step 0" in result.err


def test_a_full_disk_while_the_log_is_rewritten(call, data_dir, tmp_path):
    """The line names the file and says what to do, the log is as it was, and no temporary file is left."""
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, "--max_steps=4").code == 0
    before, limits = (out / "log.jsonl").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        result = train(call, "mdlm_text8", data_dir, out, "--max_steps=4", "--resume=auto")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(result, "cannot write", "log.jsonl", "File too large", "--resume auto")
    assert (out / "log.jsonl").read_bytes() == before and not list(out.glob(".*.tmp"))


def test_one_run_per_folder(call, data_dir, tmp_path, monkeypatch):
    """A second run in the folder of a living one is refused, at once, or after waiting if it is a resumption; a dead
    one, even if killed, holds nothing."""
    monkeypatch.setattr(storage, "PATIENCE", 1)
    options = ["--max_steps=100000", "--checkpoint_interval=5"]
    [first] = start("mdlm_text8", data_dir, tmp_path / "out", *options)
    read_until(first, "step 6 ")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "out", *options), "another process is training in")
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", *options, "--resume=auto")
    assert result.code == 2 and [("waiting 1 s" in line, "wait for it, or" in line)
                                 for line in result.err.splitlines()] == [(True, False), (False, True)]
    first.kill()
    first.wait()
    done = storage.read_latest(tmp_path / "out")[1]["step"]
    (tmp_path / "out" / "log.jsonl").unlink()
    [again] = start("mdlm_text8", data_dir, tmp_path / "out", *options, "--resume=auto")
    read_until(again, f"continuing at step {done:,}")
    again.kill()
    again.wait()


def test_a_file_system_without_locks(call, data_dir, tmp_path, monkeypatch):
    """A run on a file system without locks says so, once, and goes on."""
    def flock(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    for resume in ([], ["--resume=auto"]):
        result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=1", *resume)
        assert result.code == 0 and result.err.count("cannot be locked") == 1


def test_resume_refuses_other_data_and_other_runs(call, data_dir, trained, tmp_path):
    """The same config on other data of the same name, or into the folder of another run: refused, nothing changed."""
    options = [*TRAINED, f"--resume={trained}"]
    (tmp_path / "text.txt").write_text("another text, of the same alphabet. " * 200)
    call("data/prepare_textfile.py", tmp_path / "text.txt", "--name", "tiny", "--alphabet", "text8",
         "--data_dir", tmp_path)
    assert_one_line(train(call, "mdlm_text8", tmp_path, tmp_path / "out", *options), "is not the same as that of")
    other = tmp_path / "other"
    assert train(call, "mdlm_text8", data_dir, other, "--max_steps=1").code == 0
    before = (other / "ckpt.pt").read_bytes(), (other / "log.jsonl").read_bytes()
    assert_one_line(train(call, "mdlm_text8", data_dir, other, *options), "is not part of it")
    assert before == ((other / "ckpt.pt").read_bytes(), (other / "log.jsonl").read_bytes())


def test_a_finished_run_is_left_alone(call, data_dir, trained):
    """Training again is refused, and --resume auto of a finished run does nothing, successfully."""
    before = (trained / "ckpt.pt").stat().st_mtime_ns
    refused = train(call, "mdlm_text8", data_dir, trained, *TRAINED)
    assert refused.code == 2 and "already holds a run" in refused.err
    assert train(call, "mdlm_text8", data_dir, trained, *TRAINED, "--resume=auto").code == 0
    assert (trained / "ckpt.pt").stat().st_mtime_ns == before
