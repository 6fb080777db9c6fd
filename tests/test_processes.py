"""Runs of several processes, by gloo on the CPU: they train as one does, share their work out, and end together."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import parallel
import storage
from cli import UserError, run
from commands import (ROOT, STEADY, assert_same_training, finish, finish_well, log, losses, read_until,
                      start, train)
from conftest import TRAINED
from hub_models import TEXT


# ---- the same run, whatever it runs on -------------------------------------------------------------------------------


def test_muon_in_several_processes(call, data_dir, tmp_path):
    """Processes that share Muon's matrices out train as one: two with all rows, and three with a third of them each
    (FSDP), which is not the same number everywhere."""
    options = [*STEADY, "--optimizer=muon", "--lr=0.01", "--warmup_steps=1", "--batch_size=6", "--micro_batch_size=6"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *options).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *options, n=2))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "fsdp", *options, "--fsdp", n=3))
    for name in ("two", "fsdp"):
        assert_same_training(tmp_path / "one", tmp_path / name, rel=1e-3)


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


MANY_TOKENS = """
import runpy, sys
sys.path.insert(0, {root!r})
import parallel
parallel.MANY_TOKENS = 5
runpy.run_path({root!r} + "/train.py", run_name="__main__")
"""


def test_compiled_processes(call, data_dir, tmp_path):
    """Two compiled processes train as one that is not compiled, copied (DDP) and sharded. The network is large enough
    for DDP to cut its graph, at 1 MB. Head and cost are compiled, too, as with many tokens."""
    (tmp_path / "train.py").write_text(MANY_TOKENS.format(root=str(ROOT)))
    options = [*STEADY, "--n_head=4", "--n_embd=160", "--log_interval=1"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *options).code == 0
    for name in ("--no-fsdp", "--fsdp"):
        first, second = finish_well(start("mdlm_text8", data_dir, tmp_path / name, *options, name, "--compile", n=2,
                                          script=tmp_path / "train.py"))
        assert_same_training(tmp_path / "one", tmp_path / name)
        assert ", compiled, " in first[1]


def test_blocks_run_everywhere(call, data_dir, tmp_path):
    """Block diffusion, whose network is called on two texts in each step: in parts, over two processes, sharded."""
    flags = [*STEADY, "--objective=block", "--block_size=8", "--shift_tokens"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *flags).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *flags, "--micro_batch_size=2", n=2))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "fsdp", *flags, "--fsdp", "--checkpoint_blocks",
                      "--sample_interval=4", n=2))
    for name in ("two", "fsdp"):
        assert_same_training(tmp_path / "one", tmp_path / name)
    assert [len(line["sample"]) for line in log(tmp_path / "fsdp") if "sample" in line] == [32]


@pytest.mark.parametrize("kind, more", [
    ("roberta", []), ("llama", ["--architecture=llm", "--predict_next", "--anneal_steps=3", "--checkpoint_blocks"])])
def test_networks_of_transformers(saved, kind, more, call, tmp_path):
    """Two processes that share such a network (FSDP) train, validate and sample as one process does."""
    folder = saved(kind)[0]
    (tmp_path / "text.txt").write_text(TEXT * 10)
    assert call("data/prepare_textfile.py", tmp_path / "text.txt", "--name", kind, "--tokenizer", folder,
                "--data_dir", tmp_path).code == 0
    options = [*STEADY, *more, f"--dataset={kind}", f"--init_from={folder}", "--prefix=fixed:4", "--sample_interval=4"]
    assert train(call, "roberta_wikitext", tmp_path, tmp_path / "one", *options).code == 0
    results = finish_well(start("roberta_wikitext", tmp_path, tmp_path / "fsdp", *options, "--fsdp", n=2))
    assert not any("FSDP2-wrapped" in output for _, output in results), results  # a warning of views
    assert_same_training(tmp_path / "one", tmp_path / "fsdp")
    one, two = ([losses(tmp_path / name, key) for key in ("val_bits_per_token", "sample")] for name in ("one", "fsdp"))
    assert two == [pytest.approx(one[0], rel=1e-4), one[1]] and len(one[1]) == 1


def test_validation_with_fewer_windows_than_processes(call, data_dir, tmp_path):
    """Three windows over two processes: each counts once."""
    options = [*STEADY, "--max_steps=1", "--eval_sequences=3"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *options).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *options, n=2))
    for key in ("val_bits_per_token", "val_stderr"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), rel=1e-5)


def test_sharded_and_whole_checkpoints_are_the_same(data_dir, tmp_path):
    """A run begun with FSDP goes on with DDP and the other way round; the files have the same names and shapes."""
    begin = ["--max_steps=6", "--dropout=0", "--lr=1e-5", "--checkpoint_interval=3", "--optimizer=muon"]
    end = ["--resume=auto"]
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
        whole = storage.read(tmp_path / "whole")
        for name, value in whole["ema"].items():
            torch.testing.assert_close(state["ema"][name], value, atol=1e-5, rtol=1e-4)
        for name, moments in whole["optimizer"].items():
            if "momentum" in moments:
                lost = (state["optimizer"][name]["momentum"] - moments["momentum"]).norm()
                assert lost < 1e-3 * moments["momentum"].norm(), name
    assert shapes[0] == shapes[1]


SHARES = """
import os
import sys
sys.path.insert(0, {root!r})
import torch
import parallel
from configs import Config
from costs import count_parameters
from optim import EMA

parallel.join(1)
torch.manual_seed(0)
model = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=16).make_model(27)
before = {{name: p.detach().clone() for name, p in model.named_parameters()}}
parallel.spread(model, None, torch.device("cpu"), True, False)
ema = EMA(model, 0.9)
held = sum(x.numel() for x in ema.local_weights)
n_params = count_parameters(model)
assert held == sum(x.numel() for x in ema.local_average) < 0.6 * n_params, (held, n_params)
assert parallel.total(torch.tensor(held)) == n_params == sum(x.numel() for x in before.values())
for name, p in model.named_parameters():
    together = parallel.whole(p)
    assert torch.equal(together, before[name]) if parallel.is_main else together is None
    transposed = (before[name] + 1).T.contiguous().T  # a view, as the weights of GPT-2, and of another type
    parallel.copy_from_main(p, transposed.double() if parallel.is_main else None)
    together = parallel.whole(p)
    assert together is None or torch.equal(together, before[name] + 1)
parallel.leave()
os._exit(0)  # as cli.run ends, since gloo's threads can crash an ordered exit
"""


GRADIENTS = """
import os
import sys
sys.path.insert(0, {root!r})
import torch
import parallel
from configs import Config

parallel.join(1)
model = Config(n_layer=1, n_head=2, n_embd=32, n_cond=8, seq_len=16).make_model(27)
net, optimizer = parallel.spread(model, None, torch.device("cpu"), False, False), torch.optim.SGD(model.parameters())
for step in range(3):
    for i in range(2):
        kept = [p.grad is not None and p.grad.data_ptr() for p in model.parameters()]
        parallel.average_in_next_backward(net, i == 1)
        net(torch.zeros(1, 16, dtype=torch.long), torch.ones(1)).sum().backward()
        if step == 2:  # DDP has arranged its buckets
            assert kept == [p.grad.data_ptr() for p in model.parameters()]
    parallel.clear_gradients(net, optimizer)
    assert not any(p.grad.any() for p in model.parameters())
parallel.leave()
os._exit(0)  # as cli.run ends, since gloo's threads can crash an ordered exit
"""


def test_gradients_stay_in_the_buckets(data_dir, tmp_path):
    """The gradients of all micro-batches lie in DDP's buckets, and take no memory of their own."""
    (tmp_path / "gradients.py").write_text(GRADIENTS.format(root=str(ROOT)))
    finish_well(start("x", data_dir, tmp_path, script=tmp_path / "gradients.py", n=2))


def test_fsdp_shares_the_model_out(data_dir, tmp_path):
    """Each of two processes holds about half of the weights and averages; together they hold all, each value once.
    What the main process has reaches all of them, however it lies in memory."""
    (tmp_path / "shares.py").write_text(SHARES.format(root=str(ROOT)))
    finish_well(start("x", data_dir, tmp_path, script=tmp_path / "shares.py", n=2))


SHARED_OUT = """
import os
import sys
sys.path.insert(0, {root!r})
import torch
import parallel

parallel.join(1)
parallel.form_teams({size}, 10)
for group in (parallel.team, parallel.leaders if parallel.rank % {size} == 0 else parallel.team):
    assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == 600
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
parallel.total(torch.ones(1))  # the first process has what the others need to connect: it waits for them
parallel.leave()
os._exit(0)
"""


@pytest.mark.parametrize("processes, size", [(3, 3), (4, 2), (2, 1)])
def test_work_is_shared_out_in_teams(data_dir, tmp_path, processes, size):
    """Each process of a team does its part of the work, or none, and all of them get the whole result, bit for bit."""
    (tmp_path / "shared.py").write_text(SHARED_OUT.format(root=str(ROOT), size=size))
    finish_well(start("x", data_dir, tmp_path, script=tmp_path / "shared.py", n=processes))


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

run(main, processes=True)
"""


def test_bad_input_is_reported_once(call, data_dir, trained, tmp_path):
    """Two processes print one line between them, and both exit with 2, without touching the folder."""
    for options, words in (
            (["--batch_size=1"], "batch_size=1 is less than one for each of 2 processes"),
            (["--batch_size=10", "--micro_batch_size=4"], "batch_size=10 must be a multiple of processes x"),
            (["--batch_size=7"], "batch_size=7 cannot be shared out among 2 processes: use 6 or 8"),
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


SPOILED = """
import sys
sys.path.insert(0, {root!r})
import optim
import parallel
import train
from cli import run

class Spoiled(optim.EMA):
    def update(self, steps=1):
        super().update(steps)
        if parallel.rank == 1:
            self.local_average[0].fill_(float("nan"))

train.EMA = Spoiled
run(train.main)
"""


def test_weights_that_are_not_finite_in_one_process(data_dir, tmp_path):
    """The main process reports them when a sample is drawn, although with FSDP only another process has them."""
    (tmp_path / "spoiled.py").write_text(SPOILED.format(root=str(ROOT)))
    first, second = finish(start("mdlm_text8", data_dir, tmp_path / "out", *STEADY, "--fsdp", "--sample_interval=1",
                                 script=tmp_path / "spoiled.py", n=2))
    assert first[0] == second[0] == 2 and "process 1: the weights are not finite after step 1" in first[1], first


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match="has 4 GPUs.*--nproc_per_node=4"):
        parallel.own_device("auto")


def test_processes_of_this_machine():
    """Two machines of two processes each: two share the memory."""
    code = """
import parallel
parallel.dist.rendezvous = lambda *_, **__: iter([(None, 2, 4)])  # no other process is waited for
parallel.dist.init_process_group = lambda *_, **__: None
parallel.dist.group.WORLD = None
parallel.join(1)
print(parallel.rank, parallel.world, parallel.on_this_machine)
"""
    assert joined(code, RANK=2, WORLD_SIZE=4, LOCAL_RANK=0, LOCAL_WORLD_SIZE=2, MASTER_ADDR="localhost",
                  MASTER_PORT=1234).stdout == "2 4 2\n"


VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"  # those of torchrun


def joined(code, **environment):
    """Run Python code with no variables of torchrun but these."""
    others = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True,
                          env=others | {key: str(value) for key, value in environment.items()})


def test_only_torchrun_makes_processes():
    """A WORLD_SIZE that something else has left in the environment does not make a single process one of two."""
    code = "import parallel; parallel.join(1); print(parallel.rank, parallel.world)"
    assert joined(code, WORLD_SIZE=2).stdout == "0 1\n"


@pytest.mark.parametrize("wrong, more", [
    ("WORLD_SIZE", dict(WORLD_SIZE="")), ("MASTER_ADDR", dict(MASTER_ADDR="")), ("RANK", dict(RANK="x")),
    ("MASTER_PORT", dict(MASTER_PORT="abc")), ("MASTER_PORT", dict(MASTER_PORT=99999))])
def test_rank_without_torchrun(wrong, more):
    """A cluster's environment can have a RANK, which torchrun did not set. Every process says so in one line."""
    code = "import cli, parallel; cli.run(lambda: parallel.join(1), processes=True)"
    environment = dict(RANK=1, WORLD_SIZE=2, MASTER_ADDR="localhost", MASTER_PORT=1234) | more
    result = joined(code, **environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"its {wrong} is missing or wrong: start several processes with torchrun" in result.stderr


def test_commands_of_one_process_report_errors_with_any_rank(monkeypatch, capsys):
    """sample.py and evaluate.py report their errors also where a cluster's environment says RANK=1."""
    for key in VARIABLES:
        monkeypatch.setenv(key, "1")

    def fail():
        raise UserError("wrong")

    with pytest.raises(SystemExit):
        run(fail)
    assert capsys.readouterr().err.endswith(": wrong\n")


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
