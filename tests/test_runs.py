"""Whole runs: what they learn, report and repeat, when they are stopped, and after steps that are not finite."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import data.loader
import diffusion
import optim
import parallel
import storage
from commands import (ROOT, STEADY, assert_identical, assert_one_line, assert_same_training, children, finish,
                      finish_well, free_port, log, losses, read_until, start, stop_after, train)
from configs import Config
from plot import legible


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
    """The same weights whether a run validates and samples at every step or only at the end."""
    for interval in (1, 100):
        assert train(call, "d3pm_text8", data_dir, tmp_path / str(interval), "--max_steps=4",
                     f"--eval_interval={interval}", f"--sample_interval={interval}").code == 0
    drawn = [[line["step"] for line in log(tmp_path / name) if "sample" in line] for name in ("1", "100")]
    assert drawn == [[1, 2, 3, 4], [4]]
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
    """The first step of nine of warm-up is a ninth of one without, of AdamW's parameters and of Muon's. A line says
    that a run ends within the warm-up."""
    steps = {}
    for warmup in (0, 9):
        options = ["--max_steps=1", f"--warmup_steps={warmup}", "--optimizer=muon", "--weight_decay=0", "--lr=0.01"]
        result = train(call, "mdlm_text8", data_dir, tmp_path / str(warmup), *options)
        assert result.code == 0 and ("rises until the end, to 0.0011:" in result.err) == (warmup == 9)
        payload = storage.read(tmp_path / str(warmup))
        config = Config(**payload["config"])
        torch.manual_seed(config.seed)
        before = config.make_model(27).state_dict()
        steps[warmup] = [(payload["model"][name] - before[name]).norm().item()
                         for name in ("embed.weight", "blocks.0.attn_out.weight")]
    assert steps[9] == pytest.approx([step / 9 for step in steps[0]], rel=1e-3) and min(steps[0]) > 0


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
    """Each of the three finishes the step, writes a checkpoint, says how to go on, and exits 0. Ctrl-C is answered at
    once, and a run that is done says so."""
    stop_after(monkeypatch, 3, getattr(signal, name))
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=50", "--log_interval=50")
    assert result.code == 0 and result.out.splitlines()[-1] == (
        f"stopped by {name} after step 3 of 50, which is saved in {tmp_path / 'out'}: "
        "to continue, run the same command with --resume auto")
    assert storage.read(tmp_path / "out")["step"] == 3
    assert ("stopping after this step" in result.err) == (name == "SIGINT")
    monkeypatch.undo()
    again = lambda: train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=50", "--resume=auto")
    continued, done = again().out, again().out
    assert "continuing at step 3 of 50" in continued and "done already" not in continued
    assert "continuing" not in done and "all 50 steps are done already" in done


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    stop = parallel.StopSignals()
    stop.remember(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        stop.remember(signal.SIGINT, None)


def test_the_speed_has_the_time_of_waiting_for_others(call, data_dir, tmp_path, monkeypatch):
    """The processes agree on signals after each step, where fast ones wait for slow ones. Here that takes 0.2 s."""
    monkeypatch.setattr(parallel.StopSignals, "agreed", lambda self: (time.sleep(0.2), (0, 0))[1])
    options = ["--max_steps=4", "--log_interval=2"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", *options).code == 0
    assert losses(tmp_path / "out", "tokens_per_second")[1] < 1.01 * 8 * 32 / 0.2  # 2 steps, 2 waits


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
    options = ["--max_steps=150", "--log_interval=7", "--lr=1e-5", "--dropout=0", "--ema_decay=0.9"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *options, n=2))
    processes = start("mdlm_text8", data_dir, tmp_path / "parts", *options, n=2)
    read_until(processes[0], "step 21 ")
    processes[1].send_signal(signal.SIGUSR1)
    first, second = finish_well(processes)
    assert first[1].count("stopped by SIGUSR1") == 1 and second[1] == ""
    stopped = storage.read(tmp_path / "parts")["step"]
    assert 21 <= stopped < 150
    shutil.copytree(tmp_path / "parts", tmp_path / "alone")
    finish_well(start("mdlm_text8", data_dir, tmp_path / "parts", *options, "--resume=auto", n=2))
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert train(call, "mdlm_text8", data_dir, tmp_path / "alone", *options, "--resume=auto").code == 0
    assert_same_training(tmp_path / "whole", tmp_path / "alone", rel=1e-3)


def test_torchrun(data_dir, tmp_path, monkeypatch):
    """torchrun passes signals on. After a worker is killed it starts all of them again, and they go on alone."""
    options = ["--max_steps=200", "--log_interval=10", "--checkpoint_interval=10", "--lr=1e-5", "--resume=auto"]
    flags = ["--standalone", "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--max-restarts=1"]
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "60")
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
    worker = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    for environment, code, step in ((worker, 1, 4), ({}, 0, 9)):
        out = tmp_path / f"out{code}"
        [(found, output)] = finish(start("mdlm_text8", data_dir, out, "--max_steps=9", script=tmp_path / "train.py",
                                         **environment))
        assert found == code and ("stopped by the end of torchrun after step 4 of 9" in output) == bool(code), output
        assert storage.read(out)["step"] == step


def test_killed_at_random(data_dir, tmp_path):
    """Real runs that write a checkpoint after every step are killed (SIGKILL) at 16 random moments, and resumed: a
    whole checkpoint is there each time, never of an earlier step, and they end as runs that nobody killed."""
    counts = {"kills": 0, "in a write": 0, "on the way": 0}

    def torment(config, seed):
        options = ["--max_steps=300", "--checkpoint_interval=1", "--log_interval=20", "--eval_interval=100"]
        whole, out, delay = tmp_path / config, tmp_path / f"{config}-killed", random.Random(seed)
        finish_well(start(config, data_dir, whole, *options))
        saved = 0
        for _ in range(8):
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


def test_weights_that_overflow_are_not_saved(call, data_dir, tmp_path, monkeypatch):
    """A step makes the weights infinite, from a finite loss and gradient: the checkpoint before it stays the last."""
    monkeypatch.setattr(optim, "learning_rate", lambda step, cfg: 1e-3 if step < 3 else 3e38)
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", "--max_steps=40", "--checkpoint_interval=1",
                   "--beta2=0", "--grad_clip=0", "--log_interval=40")
    assert result.code == 2 and result.err.count("\n") == 1 and "weights are not finite after step" in result.err
    last = storage.read(tmp_path / "out")
    assert last["step"] == 3 and all(value.isfinite().all() for value in last["model"].values())
    result = train(call, "mdlm_text8", data_dir, tmp_path / "sampled", "--max_steps=40", "--checkpoint_interval=40",
                   "--eval_interval=4", "--sample_interval=4", "--beta2=0", "--grad_clip=0", "--log_interval=40")
    assert result.code == 2 and result.err.count("\n") == 1 and "try a smaller --lr in a new run" in result.err
    assert "validation bits/char nan\n" in result.out


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


# ---- what a run reports ----------------------------------------------------------------------------------------------


def test_log(trained):
    """Each line has what it should, and the first one says what was run on what."""
    lines = log(trained)
    assert lines[0]["run"] == "mdlm_text8" and lines[0]["config"]["lr"] == 0.01 and lines[0]["processes"] == 1
    assert lines[0]["versions"]["torch"] == torch.__version__ and lines[0]["peak_tflops"] == 1
    line = next(line for line in lines if "bits_per_token" in line)
    assert line["tokens"] == 10 * 8 * 32 and line["tokens_per_second"] > 0 and line["skipped"] == 0
    assert line["memory_bytes"] > 1e7 and line["seconds_left"] > 0 and 0 < line["mfu"] < 1


def test_pictures_from_a_notebook(trained, tmp_path):
    """A notebook's MPLBACKEND, which may not be installed here, does no harm."""
    env = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    for command in (["plot.py", trained, "--out"], ["sample.py", trained, "--png"]):
        subprocess.run([sys.executable, ROOT / command[0], *command[1:], tmp_path / f"{command[0]}.png"], env=env,
                       check=True)


def test_plot(call, trained, data_dir, tmp_path):
    """plot.py draws several runs to a PNG, on any axis, and refuses what is no run with one line."""
    shutil.copytree(trained, tmp_path / "other")
    for x in ("step", "tokens", "hours"):
        out = tmp_path / f"{x}.png"
        assert call("plot.py", trained, tmp_path / "other" / "log.jsonl", "--out", out, "--x", x, "--log_x").code == 0
        assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 10_000
    for i, name in enumerate((b"_lr$3^$x", b"lat\xfcn")):  # mathematics to matplotlib, and no UTF-8
        shutil.copytree(trained, tmp_path / os.fsdecode(name))
        assert call("plot.py", tmp_path / os.fsdecode(name), "--out", tmp_path / f"{i}.png").code == 0
    assert [legible(name) for name in ("_run", os.fsdecode(b"lat\xfcn"))] == [" _run", "lat?n"]
    assert_one_line(call("plot.py", tmp_path / "none"), "cannot read")
    assert_one_line(call("plot.py", trained, "--from_step=1000"), "has no losses to draw from step 1,000 on")
    assert_one_line(call("plot.py", trained, "--out", tmp_path / "no" / "where.png"), "in a folder that does not exist")
    (tmp_path / "ckpt.pt").write_bytes(b"weights")
    assert_one_line(call("plot.py", trained, "--out", tmp_path / "ckpt.pt"), "must end in .png")
    assert (tmp_path / "ckpt.pt").read_bytes() == b"weights"
    other = [entry if "config" not in entry else entry | {"config": {"dataset": "book"}} for entry in log(trained)]
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in other))
    result = call("plot.py", trained, tmp_path / "book", "--out", out)
    assert result.code == 0 and "several data sets (book, tiny): bits per token compare only if" in result.err
    for content in (b"PNG\xff\n", b"[1]\n", b"{\n", b'{"step": "x"}\n', b"[" * 10**5 + b"\n",
                    b'{"step": 1, "bits_per_token": 3}\n', b'{"step": 1, "tokens": 1, "val_bits_per_token": 3}\n',
                    b'{"step": 1, "tokens": 1, "bits_per_token": "x", "tokens_per_second": 1}\n',
                    b'{"step": 1, "tokens": 1, "bits_per_token": 3, "tokens_per_second": 0}\n',
                    b'{"step": 1, "tokens": 1, "val_stderr": 0, "val_bits_per_token": 1' + b"0" * 400 + b'}\n'):
        (tmp_path / "log.jsonl").write_bytes(content)
        assert_one_line(call("plot.py", tmp_path), "is not a log of train.py")


def test_curves(tmp_path):
    """Hours of training add up over resumptions, without the pauses; skipped intervals leave a gap."""
    from plot import curves
    lines = [{"step": 0, "tokens": 0, "run": "x"},
             {"step": 1, "tokens": 3600, "bits_per_token": 3.0, "tokens_per_second": 1.0},
             {"step": 1, "tokens": 3600, "val_bits_per_token": 2.5, "val_stderr": None},
             {"step": 1, "tokens": 3700, "run": "x"},  # stopped after some steps, which count, too
             {"step": 2, "tokens": 7200, "bits_per_token": None, "tokens_per_second": 2.0},
             {"step": 3, "tokens": 10800, "bits_per_token": 2.0, "tokens_per_second": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    name, _, training, validation = curves(tmp_path)
    assert training == [(1, 3600, 1.0, 3.0), (3, 10800, 2.5, 2.0)] and validation == [(1, 3600, 1.0, 2.5, 0.0)]
    assert name == tmp_path.name and curves(tmp_path, from_step=2)[3] == []


def test_wandb(data_dir, tmp_path, monkeypatch):
    """--wandb without account and network logs offline; a resumed run has the same id."""
    pytest.importorskip("wandb")
    environment = {"WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    options = ["--max_steps=2", "--sample_interval=1", "--wandb"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "out", *options, **environment))
    run_id = storage.read(tmp_path / "out")["wandb_id"]
    wrong = environment | {"WANDB_MODE": "nonsense"}
    [(code, output)] = finish(start("mdlm_text8", data_dir, tmp_path / "nonsense", *options, **wrong))
    assert code == 2 and "Weights & Biases: " in output and "Traceback" not in output
    assert not (tmp_path / "nonsense/log.jsonl").exists()  # the corrected command can begin
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
