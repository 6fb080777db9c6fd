"""Helpers for tests of the command lines: start a small run, wait for it, and read its results."""

import contextlib
import gc
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import storage

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--n_cond=8", "--seq_len=32", "--batch_size=8",
         "--micro_batch_size=8", "--dtype=float32", "--device=cpu", "--warmup_steps=5", "--eval_sequences=8",
         "--sample_interval=0", "--T=50", "--dataset=tiny", "--eval_interval=10", "--log_interval=1",
         "--peak_tflops=1"]

# Adam turns the sign of even a tiny gradient into a whole step, so rounding grows quickly at a usual learning rate.
STEADY = ["--lr=1e-5", "--dropout=0", "--time_sampling=exact_k", "--max_steps=4"]


class Result:
    """The result of a command: exit code, stdout, stderr."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err


def arguments(config, data_dir, out, *extra):
    """Return the command line of a small run, to be passed to call() or put after `python`."""
    return [ROOT / "train.py", config, *SMALL, f"--data_dir={data_dir}", f"--out_dir={out}", *extra]


def train(call, *args):
    """Do a small run in this process; args as for arguments()."""
    gc.collect()  # a failed run keeps the lock of its folder while its traceback, or its process, exists
    return call(*map(str, arguments(*args)))


def free_port():
    """A free port below the range that the kernel gives to outgoing connections. One in that range could be taken
    before the run begins."""
    while True:
        port = 20000 + secrets.randbelow(12000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start(*args, n=1, torchrun=None, script=None, **environment):
    """Start a small run of n real processes that connect as torchrun's workers do, or by torchrun itself.

    args as for arguments(); torchrun: its flags; script: runs in place of train.py; environment: variables.
    Returns the processes, or [torchrun's process]. The stdout and stderr of each go to one pipe.
    """
    command = [sys.executable, *map(str, arguments(*args))]
    command[1] = str(script or command[1])
    if torchrun is not None:
        command[1:1] = ["-m", "torch.distributed.run", f"--nproc_per_node={n}", *torchrun]
    workers = [{}]
    if n > 1 and torchrun is None:
        port = free_port()
        workers = [{"RANK": i, "LOCAL_RANK": i, "WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                   for i in range(n)]
    common = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env=os.environ | {key: str(value) for key, value in (common | worker).items()})
            for worker in workers]


def finish(processes, timeout=300):
    """Return [(exit code, output)] of the processes of start(), in order. After `timeout` seconds they are killed."""
    watchdog = threading.Timer(timeout, lambda: [process.kill() for process in processes])
    watchdog.start()
    try:
        outputs = [process.stdout.read() for process in processes]
        return [(process.wait(), output) for process, output in zip(processes, outputs)]
    finally:
        watchdog.cancel()


def finish_well(processes):
    results = finish(processes)
    assert all(code == 0 and "FutureWarning" not in output for code, output in results), results
    return results


def read_until(process, beginning):
    """Read a process's output up to the line with this beginning. Raises AssertionError if none comes in 5 minutes."""
    watchdog, lines = threading.Timer(300, process.kill), []
    watchdog.start()
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith(beginning):
                return
    finally:
        watchdog.cancel()
    raise AssertionError("".join(lines))


def children(process):
    """Return the ids of a process's children."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = listed.read_text() if listed.exists() else subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def stop_after(monkeypatch, steps, number=signal.SIGTERM):
    """Send this process a signal in the middle of the training step that is number `steps` from now."""
    clip, left = torch.nn.utils.clip_grad_norm_, [steps]

    def clip_and_signal(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_signal)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out, key="bits_per_token"):
    return [line[key] for line in log(out) if key in line]


def assert_same_training(one, two, rel=1e-4):
    """Assert that losses and gradient norms of two runs agree up to rounding."""
    for key in ("bits_per_token", "grad_norm"):
        assert len(losses(one, key)) >= 3 and losses(one, key) == pytest.approx(losses(two, key), rel=rel)


def assert_identical(one, two):
    """Assert that two finished runs agree bit for bit: weights, averages, optimisers, tally, best and logged losses."""
    one_state, two_state = storage.read(one), storage.read(two)
    for key in ("step", "best_val", "tally", "model", "ema", "optimizer"):
        assert storage.digest(one_state[key]) == storage.digest(two_state[key]), key
    for key in ("bits_per_token", "grad_norm", "lr", "skipped", "val_bits_per_token"):
        assert losses(one, key) == losses(two, key), key


def assert_resumes_exactly(call, monkeypatch, config, data_dir, folder, flags, start=()):
    """Assert that a small run that is stopped after three steps and resumed agrees bit for bit with a whole one.

    start: more flags for the two beginnings. Returns the folder of the whole run and the Result of its command.
    """
    whole, stopped = folder / "whole", folder / "stopped"
    result = train(call, config, data_dir, whole, *flags, *start)
    assert result.code == 0, result.err
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        train(call, config, data_dir, stopped, *flags, *start)
    assert len(losses(stopped)) < len(losses(whole))
    again = train(call, config, data_dir, stopped, *flags, "--resume=auto")
    assert again.code == 0, again.err
    assert_identical(whole, stopped)
    return whole, result


def assert_one_line(result, *words):
    """Assert that a command was refused: exit code 2, no stdout, one line on stderr that contains these words."""
    assert result.code == 2, result
    assert result.out == "" and result.err.count("\n") == 1 and "Traceback" not in result.err, result.err
    for word in words:
        assert word in result.err, result.err
