"""What a run survives, and what it repeats: micro-batches, processes, interruptions, damage, full disks, NaNs.

Tests with several processes use gloo on the CPU, which is what train.py does there.
"""

import errno
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch

import data.loader
import diffusion
import storage
from cli import UserError
from commands import (ROOT, STEADY, arguments, assert_identical, assert_one_line, assert_same_training, children,
                      finish, finish_well, log, losses, read_until, start, stop_after, train)
from configs import Config
from conftest import TRAINED


def test_training_learns(trained):
    """Bits fall well below the first steps'; the log has losses, validations and a sample; checkpoints are there."""
    bits = losses(trained)
    assert bits[0] > 3.2 > bits[-1] + 0.5
    validations = [line for line in log(trained) if "val_bits_per_token" in line]
    assert [line["step"] for line in validations] == [30, 60]
    assert validations[0]["val_bits_per_token"] > validations[1]["val_bits_per_token"] > 0
    assert [len(line["sample"]) for line in log(trained) if "sample" in line] == [32]
    payload = storage.read(trained)
    assert payload["step"] == 60 and payload["best_val"] == validations[1]["val_bits_per_token"]
    assert payload["meta"]["alphabet"] == " abcdefghijklmnopqrstuvwxyz"
    assert (trained / "ckpt_best.pt").exists() and not list(trained.glob("*.tmp"))


def test_validation_and_samples_do_not_touch_training(call, data_dir, tmp_path):
    """The same weights whether a run validates and samples at every step or never."""
    for interval in (1, 100):
        assert train(call, "d3pm_text8", data_dir, tmp_path / str(interval), "--max_steps=4",
                     f"--eval_interval={interval}", f"--sample_interval={interval}").code == 0
    often, seldom = (storage.read(tmp_path / interval) for interval in ("1", "100"))
    assert all(torch.equal(often["model"][key], seldom["model"][key]) for key in often["model"])


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))),
                    reason="torch.compile needs a C++ compiler on a CPU, and here is none")
def test_compiled_training(data_dir, tmp_path):
    """torch.compile changes losses by rounding only, and checkpoints keep plain names."""
    for flag in ("--compile", "--no-compile"):
        finish_well(start("mdlm_text8", data_dir, tmp_path / flag, "--eval_interval=100", *STEADY, "--n_layer=1", flag))
    assert_same_training(tmp_path / "--compile", tmp_path / "--no-compile")
    assert (storage.read(tmp_path / "--compile")["model"].keys()
            == storage.read(tmp_path / "--no-compile")["model"].keys())


def test_fine_tuning(call, data_dir, trained, tmp_path):
    """--init_from starts from the averaged weights: the first loss is the trained model's, at step 0 of a new run."""
    result = train(call, "mdlm_text8", data_dir, tmp_path / "tuned", "--max_steps=2", f"--init_from={trained}",
                   "--shift_tokens", "--time_sampling=exact_k", "--lr=1e-4")
    assert result.code == 0 and losses(tmp_path / "tuned")[0] < losses(trained)[0] - 0.5


def test_every_optimizer_warms_up(call, data_dir, tmp_path):
    """The first step of nine of warm-up is a ninth of one without, of AdamW's parameters and of Muon's."""
    steps = {}
    for warmup in (0, 9):
        options = ["--max_steps=1", f"--warmup_steps={warmup}", "--optimizer=muon", "--weight_decay=0", "--lr=0.01"]
        assert train(call, "mdlm_text8", data_dir, tmp_path / str(warmup), *options).code == 0
        payload = storage.read(tmp_path / str(warmup))
        config = Config(**payload["config"])
        torch.manual_seed(config.seed)
        before = config.make_model(27).state_dict()
        steps[warmup] = [(payload["model"][name] - before[name]).norm().item()
                         for name in ("embed.weight", "blocks.0.attn_out.weight")]
    assert steps[9] == pytest.approx([step / 9 for step in steps[0]], rel=1e-3) and min(steps[0]) > 0


# ---- the same run, whatever it runs on -------------------------------------------------------------------------------


def test_muon_in_two_processes(call, data_dir, tmp_path):
    """Two processes that share Muon's matrices out train as one."""
    options = [*STEADY, "--optimizer=muon", "--lr=0.01", "--warmup_steps=1"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *options).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *options, n=2))
    assert_same_training(tmp_path / "one", tmp_path / "two", rel=1e-3)


def test_any_number_of_processes_and_any_micro_batch(call, data_dir, tmp_path):
    """One process at once, one in four parts, two (twice two parts), four, and two that share the model (FSDP): the
    same losses, gradient norms and validations."""
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *STEADY).code == 0
    assert train(call, "mdlm_text8", data_dir, tmp_path / "parts", *STEADY, "--micro_batch_size=2").code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *STEADY, "--micro_batch_size=2", n=2))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "four", *STEADY, n=4))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "fsdp", *STEADY, "--micro_batch_size=2", "--fsdp", n=2))
    for name in ("parts", "two", "four", "fsdp"):
        assert_same_training(tmp_path / "one", tmp_path / name)
        one, other = (losses(tmp_path / run, "val_bits_per_token") for run in ("one", name))
        assert len(one) == 1 and one == pytest.approx(other, rel=1e-4)
    print("largest relative difference of a loss, 1 and 2 processes:", max(
        abs(a / b - 1) for a, b in zip(losses(tmp_path / "one"), losses(tmp_path / "two"))))


def test_blocks_run_everywhere(call, data_dir, tmp_path):
    """Block diffusion, whose network is called on two texts in each step: in parts, over two processes, sharded."""
    flags = [*STEADY, "--objective=block", "--block_size=8", "--shift_tokens"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *flags).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *flags, "--micro_batch_size=2", n=2))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "fsdp", *flags, "--fsdp", "--checkpoint_blocks", n=2))
    for name in ("two", "fsdp"):
        assert_same_training(tmp_path / "one", tmp_path / name)


def test_validation_with_fewer_windows_than_processes(call, data_dir, tmp_path):
    """Three windows over two processes: each counts once."""
    options = [*STEADY, "--max_steps=1", "--eval_sequences=3"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *options).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *options, n=2))
    for key in ("val_bits_per_token", "val_stderr"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), rel=1e-5)


def test_sharded_and_whole_checkpoints_are_the_same(data_dir, tmp_path):
    """A run begun with FSDP goes on with DDP and the other way round; the files have the same names and shapes."""
    begin, end = ["--max_steps=6", "--dropout=0", "--lr=1e-5", "--checkpoint_interval=3"], ["--resume=auto"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *begin, n=2))
    shapes = []
    for first, second in ((["--fsdp"], []), ([], ["--fsdp"])):
        out = tmp_path / ("sharded" if first else "copied")
        finish_well(start("mdlm_text8", data_dir, out, *begin, *first, n=2))
        (out / "ckpt_prev.pt").rename(out / "ckpt.pt")  # back to step 3
        finish_well(start("mdlm_text8", data_dir, out, *begin, *end, *second, n=2))
        assert_same_training(tmp_path / "whole", out)
        state = storage.read(out)
        shapes.append([{name: value.shape for name, value in state[kind].items()} for kind in ("model", "ema")]
                      + [{key: v.shape for key, v in moments.items()} for moments in state["optimizer"].values()])
        for name, value in storage.read(tmp_path / "whole")["ema"].items():
            torch.testing.assert_close(state["ema"][name], value, atol=1e-5, rtol=1e-4)
    assert shapes[0] == shapes[1]


SHARES = """
import os
import sys
sys.path.insert(0, {root!r})
import torch
import parallel
from configs import Config
from optim import EMA

parallel.join(1)
torch.manual_seed(0)
model = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=16).make_model(27)
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
parallel.spread(model, torch.device("cpu"), True, False)
ema = EMA(model, 0.9)
held = sum(x.numel() for x in ema.weights)
assert held == sum(x.numel() for x in ema.averages) < 0.6 * model.n_params(), (held, model.n_params())
assert parallel.total(torch.tensor(held)) == model.n_params() == sum(x.numel() for x in before.values())
for name, p in model.named_parameters():
    together = parallel.whole(p)
    assert torch.equal(together, before[name]) if parallel.is_main else together is None
    parallel.copy_from_main(p, before[name] + 1 if parallel.is_main else None)
    together = parallel.whole(p)
    assert together is None or torch.equal(together, before[name] + 1)
parallel.leave()
os._exit(0)  # as cli.run ends, since gloo's threads can crash an ordered exit
"""


def test_fsdp_shares_the_model_out(data_dir, tmp_path):
    """Each of two processes holds about half of the weights and averages; together they hold all, each value once."""
    (tmp_path / "shares.py").write_text(SHARES.format(root=str(ROOT)))
    finish_well(start("x", data_dir, tmp_path, script=tmp_path / "shares.py", n=2))


SHARED_OUT = """
import os
import sys
sys.path.insert(0, {root!r})
import torch
import parallel

parallel.join(1)
parallel.form_teams({size})
sizes = []

def function(x):
    return torch.stack([2 * part + part.mean() for part in x])

def counted(x):
    sizes.append(len(x))
    return function(x)

for n in (1, 2, 5, 7):
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(100 * n + parallel.rank // {size})  # another x in each team
        x = torch.randn(n, 3, 4, generator=generator).to(dtype)
        found = parallel.shared_out(counted, x)
        assert found.dtype == dtype and torch.equal(found, function(x)), (n, dtype)
        assert sum(sizes) <= -(-n // {size}), sizes
        sizes.clear()
parallel.leave()
os._exit(0)
"""


@pytest.mark.parametrize("processes, size", [(3, 3), (4, 2), (2, 1)])
def test_work_is_shared_out_in_teams(data_dir, tmp_path, processes, size):
    """Each process of a team does its part of the work, or none, and all of them get the whole result, bit for bit."""
    (tmp_path / "shared.py").write_text(SHARED_OUT.format(root=str(ROOT), size=size))
    finish_well(start("x", data_dir, tmp_path, script=tmp_path / "shared.py", n=processes))


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config, extra", [("d3pm_text8", []),
                                           ("mdlm_text8", ["--conditioning=time", "--dropout=0.1",
                                                           "--optimizer=muon"])])
def test_resume_is_exact_at_every_step(call, data_dir, tmp_path, monkeypatch, config, extra):
    """A run stopped and resumed after each of its 12 steps ends with the weights, averages, optimiser state and log
    of one that was not stopped: bit for bit. Its log lines cover 5 steps, so the sums in between survive, too."""
    options = ["--max_steps=12", "--log_interval=5", "--eval_interval=3", "--ema_decay=0.2", "--lr=0.02", *extra]
    assert train(call, config, data_dir, tmp_path / "whole", *options).code == 0
    for step in range(1, 13):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            result = train(call, config, data_dir, tmp_path / "parts", *options, "--resume=auto")
        assert result.code == 0 and (f"stopped by SIGTERM after step {step} of 12" in result.out) == (step < 12)
        assert storage.read(tmp_path / "parts")["step"] == step
        if step < 12:
            with open(tmp_path / "parts" / "log.jsonl", "a") as file:  # as if a crash had come after some later steps
                file.write(json.dumps({"step": step + 1, "bits_per_token": 99.0}) + "\n" + '{"step": 99, "bits')
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_resume_keeps_the_best_validation(call, data_dir, tmp_path, monkeypatch):
    """A resumed run compares its validations with the best one of before: a worse one is not the best, and ckpt_best.pt
    stays as it is; a better one is."""
    out, options = tmp_path / "out", ["--max_steps=4", "--eval_interval=2"]
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(call, "mdlm_text8", data_dir, out, *options).code == 0
    payload = storage.read(out)
    for best, wins in ((0.5, False), (50.0, True)):  # a validation of this untrained network is near 4.7 bits
        again = tmp_path / str(best)
        shutil.copytree(out, again)
        storage.save(again / "ckpt.pt", payload | {"best_val": best})
        before = (again / "ckpt_best.pt").read_bytes()
        result = train(call, "mdlm_text8", data_dir, again, *options, "--resume=auto")
        assert result.code == 0 and ("(best so far)" in result.out) == wins
        [_, validation] = losses(again, "val_bits_per_token")
        assert storage.read(again)["best_val"] == (validation if wins else best) and 1 < validation < 10
        assert ((again / "ckpt_best.pt").read_bytes() != before) == wins


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals(call, data_dir, tmp_path, monkeypatch, name):
    """Each of the three finishes the step, writes a checkpoint, says how to go on, and exits 0."""
    stop_after(monkeypatch, 3, getattr(signal, name))
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=50", "--log_interval=50")
    assert result.code == 0 and result.out.splitlines()[-1] == (
        f"stopped by {name} after step 3 of 50, which is saved in {tmp_path / 'out'}: "
        "to continue, run the same command with --resume auto")
    assert storage.read(tmp_path / "out")["step"] == 3


def test_a_signal_while_starting(call, data_dir, tmp_path, monkeypatch):
    """A signal that comes before the first step lets that step happen, and is obeyed then."""
    split = data.loader.load_split

    def load_and_signal(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return split(*args)

    monkeypatch.setattr(data.loader, "load_split", load_and_signal)
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=50")
    assert result.code == 0 and "stopped by SIGTERM after step 1 of 50" in result.out


def test_two_processes_resume_exactly(call, data_dir, tmp_path):
    """One of two processes gets a signal: both finish the same step and exit 0. Two that go on end bit for bit where
    two that never stopped do; a single one sees the same data, and ends there up to rounding."""
    options = ["--max_steps=300", "--log_interval=7", "--lr=1e-5", "--dropout=0", "--ema_decay=0.9"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *options, n=2))
    processes = start("mdlm_text8", data_dir, tmp_path / "parts", *options, n=2)
    read_until(processes[0], "step 21 ")
    processes[1].send_signal(signal.SIGUSR1)
    first, second = finish_well(processes)
    assert first[1].count("stopped by SIGUSR1") == 1 and second[1] == ""
    stopped = storage.read(tmp_path / "parts")["step"]
    assert 21 <= stopped < 300
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    finish_well(start("mdlm_text8", data_dir, tmp_path / "parts", *options, "--resume=auto", n=2))
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert train(call, "mdlm_text8", data_dir, tmp_path / "alone", *options, "--resume=auto").code == 0
    assert_same_training(tmp_path / "whole", tmp_path / "alone", rel=1e-3)


def test_torchrun(data_dir, tmp_path):
    """torchrun passes signals on. After a worker is killed it starts all of them again, and they go on alone."""
    options = ["--max_steps=200", "--log_interval=10", "--checkpoint_interval=10", "--lr=1e-5", "--resume=auto"]
    flags = ["--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=60", "--max-restarts=1"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *options, n=2))

    [torchrun] = start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=flags)
    read_until(torchrun, "step 40 ")
    torchrun.send_signal(signal.SIGUSR1)
    [(code, output)] = finish([torchrun])
    assert code == 1 and "stopped by SIGUSR1 after step" in output  # torchrun calls any signal a failure
    stopped = storage.read(tmp_path / "out")["step"]
    assert 40 <= stopped < 200

    [torchrun] = start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=flags)
    read_until(torchrun, "continuing at step")
    worker = children(torchrun)[-1]
    read_until(torchrun, "step 120 ")
    os.kill(worker, signal.SIGKILL)
    [(code, output)] = finish([torchrun])
    assert code == 0 and "continuing at step 1" in output
    assert_identical(tmp_path / "whole", tmp_path / "out")


def test_torchrun_is_killed(data_dir, tmp_path):
    """torchrun gets SIGKILL, and its two workers do not: they finish their step, save and leave the folder. The same
    command, started at once, waits for that, goes on from there, and ends as a run that nobody killed."""
    options = ["--max_steps=200", "--log_interval=10", "--checkpoint_interval=1000", "--lr=1e-5", "--resume=auto"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *options, n=2))
    [torchrun] = start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=["--standalone"])
    read_until(torchrun, "step 20 ")
    torchrun.kill()
    [again] = start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=["--standalone"])
    left = torchrun.stdout.read()  # until both workers have closed it
    assert re.search(r"stopped by the end of torchrun after step (\d+) of 200", left), left
    step = int(re.search(r"after step (\d+) of", left)[1])
    [(code, output)] = finish([again])
    assert code == 0 and f"continuing at step {step}" in output and 20 <= step < 200, output
    assert_identical(tmp_path / "whole", tmp_path / "out")


def test_everyone_gets_the_signal(data_dir, tmp_path):
    """SIGTERM to torchrun and to each of its workers at once, as systemd sends it, and again from torchrun to its
    workers: they obey once, and the run goes on from there."""
    options = ["--max_steps=200", "--log_interval=10", "--checkpoint_interval=1000", "--lr=1e-5", "--resume=auto"]
    [torchrun] = start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=["--standalone"])
    read_until(torchrun, "step 20 ")
    for pid in (*children(torchrun), torchrun.pid):
        os.kill(pid, signal.SIGTERM)
    [(code, output)] = finish([torchrun])
    assert code == 1 and output.count("stopped by SIGTERM after step") == 1, output
    step = storage.read(tmp_path / "out")["step"]
    [(code, output)] = finish(start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2, torchrun=["--standalone"]))
    assert code == 0 and 20 <= step < 200 and f"continuing at step {step}" in output


LONELY = """
import os, runpy, sys
sys.path.insert(0, {root!r})
parent, calls = os.getppid(), 0

def getppid():  # from the fourth step on, another one
    global calls
    calls += 1
    return parent if calls <= 4 else 1

os.getppid = getppid
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_only_workers_mind_their_parent(data_dir, tmp_path):
    """A worker whose parent is gone saves, and exits with 1: to a torchrun on another node it must not be done. A run
    that torchrun did not start goes on, as it must when its terminal is closed."""
    (tmp_path / "train.py").write_text(LONELY.format(root=str(ROOT)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for environment, code, step in ((worker, 1, 4), ({}, 0, 9)):
        out = tmp_path / f"out{code}"
        [(found, output)] = finish(start("mdlm_text8", data_dir, out, "--max_steps=9", script=tmp_path / "train.py",
                                         **environment))
        assert found == code and ("stopped by the end of torchrun after step 4 of 9" in output) == bool(code), output
        assert storage.read(out)["step"] == step


def test_killed_at_random(data_dir, tmp_path):
    """Real runs that write a checkpoint after every step are killed (SIGKILL) at 22 random moments, and resumed: a
    whole checkpoint is there each time, never of an earlier step, and they end as runs that nobody killed."""
    counts = {"kills": 0, "in a write": 0, "on the way": 0}

    def torment(config, seed):
        options = ["--max_steps=300", "--checkpoint_interval=1", "--log_interval=20", "--eval_interval=100"]
        whole, out, delay = tmp_path / config, tmp_path / f"{config}-killed", random.Random(seed)
        finish_well(start(config, data_dir, whole, *options))
        saved = 0
        for _ in range(11):
            [process] = start(config, data_dir, out, *options, "--resume=auto")
            if delay.random() < 0.8:
                read_until(process, "continuing at step" if saved else "mdlm" if "mdlm" in config else "d3pm")
                time.sleep(delay.uniform(0, 0.4))
            else:
                time.sleep(delay.uniform(0, 2))
            process.kill()
            killed = process.wait() == -signal.SIGKILL  # else it was done already, on a fast machine
            counts["kills"] += killed
            counts["in a write"] += (out / ".ckpt.pt.tmp").exists()
            if saved or (out / "ckpt.pt").exists():
                step = storage.read_latest(out)[1]["step"]
                assert step >= saved and (killed or step == 300)
                counts["on the way"] += killed and saved < step < 300
                saved = step
        finish_well(start(config, data_dir, out, *options, "--resume=auto"))
        assert_identical(whole, out)
        assert not list(out.glob("*damaged*"))

    errors = []

    def attempt(*args):
        try:
            torment(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=args) for args in (("d3pm_text8", 1), ("mdlm_text8", 2))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    print(f"{counts['kills']} kills survived, {counts['in a write']} of them in the middle of writing a checkpoint, "
          f"{counts['on the way']} after some steps of their own")
    assert counts["on the way"] >= 3


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
    """Keys, order, types, shapes and values all count."""
    base = storage.digest(PAYLOAD)
    w = PAYLOAD["model"]["w"]
    for change in ({"name": "y"}, {"config": PAYLOAD["config"] | {"lr": 0.2}},
                   {"meta": PAYLOAD["meta"] | {"pad": None}}, {"extra": 1}, {"model": {"v": w}},
                   {"config": PAYLOAD["config"] | {"betas": [0.9, 0.98]}},
                   {"model": PAYLOAD["model"] | {"w": w.view(4, 16)}}, {"model": PAYLOAD["model"] | {"w": w.int()}},
                   {"model": PAYLOAD["model"] | {"w": w + 1e-5}}, {"optimizer": {}}):
        assert storage.digest(PAYLOAD | change) != base, change
    assert storage.digest(dict(reversed(PAYLOAD.items()))) != base


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_resume_auto_takes_the_previous_checkpoint(call, data_dir, tmp_path, capfd, damage):
    """A damaged last checkpoint is reported by name and kept aside, the one before is used, and the end is the same."""
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
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", *options, "--resume=auto")
    assert result.code == 0 and "continuing at step 6" in result.out
    if damage != "missing":
        assert f"{path} " in result.err and "continuing from" in result.err and result.err.count("\n") == 1
        assert (tmp_path / "out" / "ckpt_damaged.pt").exists()
    assert_identical(tmp_path / "whole", tmp_path / "out")
    assert storage.read(tmp_path / "out" / "ckpt_prev.pt")["step"] == 6


def test_two_damaged_checkpoints_are_not_written_over(call, data_dir, tmp_path):
    """If the previous checkpoint is damaged as well, the run stops, names both, and changes nothing."""
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=4", "--checkpoint_interval=2").code == 0
    for name in ("ckpt.pt", "ckpt_prev.pt"):
        (tmp_path / "out" / name).write_bytes(b"rubbish")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=4", "--resume=auto"),
                    "out/ckpt.pt", "out/ckpt_prev.pt")
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


def test_other_names_of_a_config(call, data_dir, tmp_path, monkeypatch):
    """A run begun under one name of a config goes on under another, in the same folder: the config's own, or the one
    that a run made under another name."""
    monkeypatch.chdir(tmp_path)
    command = [word for word in map(str, arguments("mdlm_text8_4gpu", data_dir, "", "--max_steps=4"))
               if not word.startswith("--out_dir")]
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert call(*command).code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mdlm_text8"]
    assert storage.read(tmp_path / "out/mdlm_text8")["step"] == 2
    (tmp_path / "out/mdlm_text8").rename(tmp_path / "out/mdlm_text8_4gpu")  # as runs were called before
    command[1] = "mdlm_text8"
    result = call(*command, "--resume=auto")
    assert result.code == 0 and "continuing at step 2" in result.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mdlm_text8_4gpu"]


def test_lost_checkpoints(call, data_dir, tmp_path):
    """Where a run must have had a checkpoint and there is none, --resume auto says so and touches nothing; where it was
    stopped before the first one, it says that it begins again, and does."""
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
    (out / "log.jsonl").write_text("".join(
        json.dumps(line) + "\n" for line in map(json.loads, left["log.jsonl"].splitlines()) if line["step"] <= 3))
    result = train(call, "mdlm_text8", data_dir, out, *options, "--resume=auto")
    assert result.code == 0 and "has no checkpoint yet: it begins again at step 0" in result.err
    assert storage.read(out)["step"] == 8 and losses(out)[:3] == losses(out)[:3]


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
    """Where nothing can be locked the run says so, once, and goes on."""
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


# ---- numbers that are not finite -------------------------------------------------------------------------------------


GRADIENT, BOUND = "a gradient", "the bound"


def poison(monkeypatch, steps, what=GRADIENT):
    """Have these steps of MDLM's loss go wrong, counted from now."""
    loss, calls = diffusion.MDLM.loss, [0]

    def poisoned(self, model, x0, noise):
        value, nelbo = loss(self, model, x0, noise)
        calls[0] += 1
        if calls[0] in steps:
            return (value * math.nan, nelbo) if what == GRADIENT else (value, nelbo / 0)
        return value, nelbo

    monkeypatch.setattr(diffusion.MDLM, "loss", poisoned)


@pytest.mark.parametrize("what", [GRADIENT, BOUND])
def test_a_step_that_is_not_finite_is_skipped(call, data_dir, tmp_path, monkeypatch, what):
    """A loss or gradient that is not finite: weights and optimiser state stay as they were, the step is counted and
    left out of the mean, and training goes on."""
    def run(out, *options, bad=()):
        with monkeypatch.context() as patch:
            poison(patch, bad, what)
            result = train(call, "mdlm_text8", data_dir, tmp_path / out, "--dropout=0", "--warmup_steps=0", *options)
        assert result.code == 0, result.err
        return result

    result = run("out", "--max_steps=4", "--log_interval=2", bad=[3])
    assert result.out.count("1 steps skipped (not finite)") == 1
    assert losses(tmp_path / "out", "skipped") == [0, 1]
    assert all(0 < bits < 10 for bits in losses(tmp_path / "out"))
    run("two", "--max_steps=2", "--min_lr=1e-3")
    run("four", "--max_steps=4", "--min_lr=1e-3", bad=[3, 4])
    two, four = storage.read(tmp_path / "two"), storage.read(tmp_path / "four")
    for key in ("model", "optimizer"):
        assert storage.digest(two[key]) == storage.digest(four[key])
    assert four["tally"][2:4].tolist() == [2, 2] and losses(tmp_path / "four")[2:] == [None, None]


def test_too_many_steps_that_are_not_finite(call, data_dir, tmp_path, monkeypatch):
    """After max_skipped such steps in a row the run stops with one line, and its last checkpoint is a good one."""
    poison(monkeypatch, [2, *range(4, 100)])
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=50", "--max_skipped=3",
                   "--checkpoint_interval=3")
    assert result.code == 2 and result.err.count("\n") == 1 and result.err.startswith(
        "train.py: loss or gradient was not finite in 3 steps in a row before step 7")
    payload = storage.read(tmp_path / "out")
    assert payload["step"] == 3 and all(torch.isfinite(value).all() for value in payload["ema"].values())


def test_bad_steps_between_two_log_lines_count(call, data_dir, tmp_path, monkeypatch):
    """Three in a row stop the run at the next log line, also if good ones came after; two do not."""
    for bad, code in ((range(2, 5), 2), (range(2, 4), 0)):
        with monkeypatch.context() as patch:
            poison(patch, bad)
            assert train(call, "mdlm_text8", data_dir, tmp_path / str(code), "--max_steps=12", "--max_skipped=3",
                         "--log_interval=10").code == code


def test_weights_that_overflow_are_not_saved(call, data_dir, tmp_path):
    """A step makes the weights infinite, from a finite loss and gradient: the checkpoint before it stays the last."""
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=40", "--checkpoint_interval=1",
                   "--lr=3e38", "--beta2=0", "--grad_clip=0", "--log_interval=40")
    assert result.code == 2 and result.err.count("\n") == 1 and "weights are not finite after step" in result.err
    for path in (tmp_path / "out").glob("ckpt*.pt"):
        assert all(torch.isfinite(value).all() for value in storage.read(path)["model"].values())


POISONED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import diffusion
loss, calls = diffusion.MDLM.loss, 0

def poisoned(self, model, x0, noise):
    global calls
    calls += 1
    value, nelbo = loss(self, model, x0, noise)
    return value * float("nan") if calls == 3 and os.environ["RANK"] == "1" else value, nelbo

diffusion.MDLM.loss = poisoned
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_all_processes_skip_the_same_step(data_dir, tmp_path):
    """The gradient of one of two processes is not finite: both skip the step, and stay together."""
    (tmp_path / "train.py").write_text(POISONED.format(root=str(ROOT)))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "out", "--max_steps=5", script=tmp_path / "train.py", n=2))
    assert losses(tmp_path / "out", "skipped") == [0, 0, 1, 1, 1]
    assert all(torch.isfinite(value).all() for value in storage.read(tmp_path / "out")["model"].values())


# ---- several processes: errors, deaths, hangs ------------------------------------------------------------------------


AGREE = """
import sys
sys.path.insert(0, {root!r})
import parallel
from cli import UserError, run

def fail_in(rank):
    if parallel.rank == rank:
        raise UserError("only here")

def main():
    parallel.join(1)
    assert parallel.on_main(lambda: parallel.rank) == 0
    assert parallel.together(lambda: parallel.rank) == parallel.rank
    for function, message in ((lambda: parallel.on_main(lambda: fail_in(0)), "only here"),
                              (lambda: parallel.together(lambda: fail_in(1)), "process 1: only here")):
        try:
            function()
        except UserError as error:
            assert str(error) == message
        else:
            raise AssertionError
    parallel.together(lambda: fail_in(1))

run(main)
"""


def test_bad_input_is_reported_once(call, data_dir, trained, tmp_path):
    """Two processes print one line between them, and both exit with 2, without touching the folder."""
    for options, words in (
            (["--batch_size=1"], "batch_size=1 is less than one for each of 2 processes"),
            (["--batch_size=10", "--micro_batch_size=4"], "batch_size=10 must be a multiple of processes x"),
            ([f"--resume={tmp_path / 'none'}"], "no checkpoint at"),
            ([f"--resume={trained}", *TRAINED, "--lr=0.5"], "is of another run: lr (was 0.01, now 0.5)"),
            (["--dataset=none"], "is not prepared in")):
        first, second = finish(start("mdlm_text8", data_dir, tmp_path / "out", *options, n=2))
        assert first[0] == second[0] == 2 and second[1] == "", (first, second)
        assert first[1].count("\n") == 1 and words in first[1], first[1]
        assert not (tmp_path / "out").exists()


def test_an_error_in_one_process_is_one_in_all(data_dir, tmp_path):
    """together and on_main give all processes the same outcome; the main one reports an error of another."""
    (tmp_path / "agree.py").write_text(AGREE.format(root=str(ROOT)))
    first, second = finish(start("x", data_dir, tmp_path, script=tmp_path / "agree.py", n=2))
    assert (first, second) == ((2, "agree.py: process 1: only here\n"), (2, ""))


def test_only_torchrun_makes_processes():
    """A WORLD_SIZE that something else has left in the environment does not make a single process one of two."""
    code = "import parallel; print(parallel.rank, parallel.world)"
    environment = {key: value for key, value in os.environ.items() if key != "RANK"} | {"WORLD_SIZE": "2"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True,
                          text=True).stdout == "0 1\n"


def test_a_dead_process_ends_the_others(data_dir, tmp_path):
    """One of two processes is killed: within seconds, not the timeout of ten minutes, the other ends with one line."""
    for victim in (0, 1):
        processes = start("mdlm_text8", data_dir, tmp_path / str(victim), "--max_steps=100000", n=2)
        read_until(processes[0], "step 5 ")
        processes[victim].kill()
        killed = time.time()
        results = finish(processes)
        assert time.time() - killed < 60 and results[victim][0] == -signal.SIGKILL
        code, output = results[1 - victim]
        assert code == 1 and "Traceback" not in output, output
        assert f"process {1 - victim} lost another process" in output.splitlines()[-1]


def test_a_hanging_process_is_given_up(data_dir, tmp_path):
    """One of two processes stands still: after timeout_minutes the other ends with one line."""
    processes = start("mdlm_text8", data_dir, tmp_path / "out", "--max_steps=100000", "--timeout_minutes=0.4", n=2)
    read_until(processes[0], "step 5 ")
    processes[1].send_signal(signal.SIGSTOP)
    code, output = finish(processes[:1])[0]
    processes[1].kill()
    processes[1].wait()
    assert code == 1 and "did not answer in time" in output.splitlines()[-1] and "Traceback" not in output


# ---- what a run reports ----------------------------------------------------------------------------------------------


def test_log(trained):
    """Each line has what it should, and the first one says what was run on what."""
    lines = log(trained)
    assert lines[0]["run"] == "mdlm_text8" and lines[0]["config"]["lr"] == 0.01 and lines[0]["processes"] == 1
    assert lines[0]["versions"]["torch"] == torch.__version__ and lines[0]["peak_tflops"] == 1
    line = next(line for line in lines if "bits_per_token" in line)
    assert line["tokens"] == 10 * 8 * 32 and line["tokens_per_second"] > 0 and line["skipped"] == 0
    assert line["memory_bytes"] > 1e7 and line["seconds_left"] > 0 and 0 < line["mfu"] < 1


def test_plot(call, trained, data_dir, tmp_path):
    """plot.py draws several runs to a PNG, on any axis, and refuses what is no run with one line."""
    shutil.copytree(trained, tmp_path / "other")
    for x in ("step", "tokens", "hours"):
        out = tmp_path / f"{x}.png"
        assert call("plot.py", trained, tmp_path / "other" / "log.jsonl", "--out", out, "--x", x, "--log_x").code == 0
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    assert_one_line(call("plot.py", tmp_path / "none"), "cannot read")
    assert_one_line(call("plot.py", trained, "--from_step=1000"), "has no losses to draw from step 1,000 on")
    assert_one_line(call("plot.py", trained, "--out", tmp_path / "no" / "where.png"), "in a folder that does not exist")
    for content in (b"PNG\xff\n", b"[1]\n", b"{\n", b'{"step": "x"}\n', b"[" * 10**5 + b"\n",
                    b'{"step": 1, "bits_per_token": 3}\n', b'{"step": 1, "tokens": 1, "val_bits_per_token": 3}\n',
                    b'{"step": 1, "tokens": 1, "bits_per_token": "x", "tokens_per_second": 1}\n',
                    b'{"step": 1, "tokens": 1, "bits_per_token": 3, "tokens_per_second": 0}\n'):
        (tmp_path / "log.jsonl").write_bytes(content)
        assert_one_line(call("plot.py", tmp_path), "is not a log of train.py")


def test_curves(tmp_path):
    """Hours of training add up over resumptions, without the pauses; skipped intervals leave a gap."""
    from plot import curves
    lines = [{"step": 0, "tokens": 0, "run": "x"},
             {"step": 1, "tokens": 3600, "bits_per_token": 3.0, "tokens_per_second": 1.0},
             {"step": 1, "tokens": 3600, "val_bits_per_token": 2.5, "val_stderr": None},
             {"step": 1, "tokens": 3600, "run": "x"},
             {"step": 2, "tokens": 7200, "bits_per_token": None, "tokens_per_second": 2.0},
             {"step": 3, "tokens": 10800, "bits_per_token": 2.0, "tokens_per_second": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, training, validation = curves(tmp_path)
    assert training == [(1, 3600, 1.0, 3.0), (3, 10800, 2.5, 2.0)] and validation == [(1, 3600, 1.0, 2.5, 0.0)]
    assert name == tmp_path.name and curves(tmp_path, from_step=2)[2] == []


def test_wandb(data_dir, tmp_path, monkeypatch):
    """--wandb without account and network logs offline; a resumed run has the same id."""
    pytest.importorskip("wandb")
    environment = {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    options = ["--max_steps=2", "--sample_interval=1", "--wandb"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "out", *options, **environment))
    run_id = storage.read(tmp_path / "out")["wandb_id"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "out", *options, "--resume=auto", **environment))
    runs = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and all(name.endswith(run_id) for name in runs)


def test_unique_tokens(call, data_dir, tmp_path):
    """A run on a part of the data sees no other tokens, and its log counts how often it has seen them."""
    out = tmp_path / "out"
    result = train(call, "mdlm_text8", data_dir, out, "--unique_tokens=320", "--max_steps=5")
    assert result.code == 0 and "epoch 4.0" in result.out  # 5 steps of 8 sequences of 32 tokens
    assert losses(out, "epochs") == pytest.approx([0.8, 1.6, 2.4, 3.2, 4.0])
    assert train(call, "mdlm_text8", data_dir, tmp_path / "all", "--max_steps=5").code == 0
    assert losses(out) != losses(tmp_path / "all") and losses(tmp_path / "all", "epochs")[-1] < 0.2
    for n, words in ((31, "less than one sequence"), (99999, "more than the 8,999")):
        assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", f"--unique_tokens={n}"), words)
