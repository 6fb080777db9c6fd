"""The simulator of uneven machines: its times against published arithmetic, its training against train.py."""

import itertools
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import configs
import storage
from cli import UserError
from commands import ROOT, SMALL, assert_one_line, finish_well, log, losses, start
from configs import replace
from local_sgd import outer_step
from optim import learning_rate
from studies import servers, simulator
from studies.clock import Clock, asynchronous, read_machines

HALOS = ROOT / "studies/machines/halos.txt"
PYTHIA = 281.7e6  # bytes of the weights of Pythia-70M in float32

EQUAL = "machine a here 1\nmachine b here 1\nlink here here 1e9 0\n"
UNEVEN = """
machine a here  1    jitter=0.1
machine b here  0.35 fails_every=0.01 recovers=7
machine c there 0.8
link here here 100
link there there 100
link here there 0.01 50   # slow
"""


def simulate(tmp_path, data_dir, machines, *flags, name="sim", resume=False):
    """Run the simulator in a process of one thread. Returns its folder."""
    file = tmp_path / "machines.txt"
    file.write_text(machines)
    out = tmp_path / name
    finish_well(start("mdlm_text8", data_dir, out, f"--machines={file}", *flags, *["--resume"] * resume,
                      script=ROOT / "studies/simulator.py"))
    return out


# ---- times -----------------------------------------------------------------------------------------------------------


def events(rule, speeds, *args, **kwargs):
    found = read_machines(HALOS)
    clock = Clock(found, 0.238391, contention=False, relative=True)
    steps = [max(1, -int(-speed * rule // 1)) for speed in found.relative_speeds()] if speeds else [rule] * 16
    return list(asynchronous(clock, PYTHIA, steps, 98304, *args, **kwargs))


def test_hours_of_the_halos_paper(call, data_dir):
    """16 machines in 4 regions, 98,304 steps: hours by the arithmetic of the paper's own simulator, within 1 %.

    DiLoCo with 32 local steps, by hand: the slowest machine takes 32 steps of 0.238391 s at 0.107/0.907 of the speed of
    the fastest, the ring 2 * 15/16 * 281.7 MB at 0.127 Gbit/s, and there are 98,304 / (16 * 32) rounds.
    """
    by_hand = (32 * 0.238391 * 0.907 / 0.107 + 2 * 15 / 16 * PYTHIA * 8 / 0.127e9) * 192 / 3600
    assert by_hand == pytest.approx(5.22, rel=0.01)
    common = ["mdlm_text8", *SMALL, f"--data_dir={data_dir}", f"--machines={HALOS}", "--clock_only", "--no_contention",
              "--relative_speeds", "--step_seconds=0.238391", f"--model_bytes={PYTHIA}", "--max_steps=6144",
              "--batch_size=16", "--micro_batch_size=1"]
    for flags, hours in ((["--local_steps=32"], 5.22), (["--local_steps=32", "--dynamic_steps"], 3.50),
                         (["--local_steps=32", "--dynamic_steps", "--algorithm=async"], 1.14),
                         (["--local_steps=8", "--dynamic_steps", "--algorithm=halos", "--merge_every=32"], 0.676)):
        result = call("studies/simulator.py", *common, *flags)
        assert result.code == 0 and float(result.err.split()[1]) == pytest.approx(hours, rel=0.01), result.err


def test_what_halos_never_sends():
    """The share of differences that a region's server takes between sending and merging: 31, 21 and 57 % far away."""
    found, share = events(8, True, servers=True, merge_every=32), {}
    for region in range(4):
        away, n, lost = False, 0, 0
        for event in found:
            if event.who == region and event.kind in ("send", "merge"):
                away = event.kind == "send"
            if event.kind == "apply" and event.who // 4 == region:
                n, lost = n + 1, lost + away
        share[region] = lost / n
    assert [share[1], share[2], share[3]] == pytest.approx([0.31, 0.21, 0.57], abs=0.01)


@pytest.mark.parametrize("kwargs", [{}, dict(servers=True, merge_every=5),
                                    dict(servers=True, merge_every=5, carry=True)])
def test_no_update_is_lost_or_applied_twice(kwargs):
    """Each round that is begun is applied once, rounds of a worker follow each other, and all steps are taken."""
    found, open_rounds, steps, times = events(8, True, **kwargs), {}, 0, []
    away = set()
    for event in found:
        times.append(event.time)
        if event.kind == "start":
            assert event.who not in open_rounds and event.n_begun == steps
            open_rounds[event.who] = event.steps
            steps += event.steps
        elif event.kind == "apply":
            open_rounds.pop(event.who)
        elif event.kind == "send":
            assert event.who not in away
            away.add(event.who)
        elif event.kind == "merge":
            away.remove(event.who)
    assert not open_rounds and not away and steps == 98304 and times == sorted(times)


def test_links_and_machines(tmp_path):
    """Transfers over one link wait for each other; a failure costs the time of the lost steps and of the recovery."""
    file = tmp_path / "machines.txt"
    file.write_text(UNEVEN)
    found = read_machines(file)
    clock = Clock(found, 2.0)
    assert clock.transfer(0, 10**6, "here", "there") == pytest.approx(0.8 + 0.05)
    assert clock.transfer(0.1, 10**6, "here", "there") == pytest.approx(1.6 + 0.05)
    assert clock.transfer(0.1, 10**6, "there", "here") == pytest.approx(0.1 + 0.8 + 0.05)
    assert Clock(found, 2.0, contention=False).transfer(0.1, 10**6, "here", "there") == pytest.approx(0.1 + 0.8 + 0.05)
    assert clock.compute(2, 10) == pytest.approx(25)
    spread = [clock.compute(0, 1) for _ in range(4000)]
    assert sum(spread) / 4000 == pytest.approx(2, rel=0.02) and min(spread) < 1.8 < 2.2 < max(spread)
    work = 4 / 0.35 * 0.5  # seconds of a step of b; a failure in 36 seconds of work, in the mean
    seconds = [clock.compute(1, 5) for _ in range(4000)]
    rate, n = 1 / 36, 5 * work
    expected = (2.718281828459045 ** (rate * n) - 1) * (1 / rate + 7)  # restarts until n seconds pass without a failure
    assert sum(seconds) / 4000 == pytest.approx(expected, rel=0.06)


def test_failures_repeat_what_was_not_exchanged(tmp_path):
    """Mean time of a step after 3 others: until a failure or the end, and from then on until all 4 steps succeed."""
    file = tmp_path / "machines.txt"
    file.write_text(UNEVEN)
    clock = Clock(read_machines(file), 2.0)
    step, rate = 2 / 0.35, 1 / 36  # seconds, failures per second of work
    until = (1 - math.exp(-rate * step)) / rate
    again = (math.exp(rate * 4 * step) - 1) * (1 / rate + 7)
    expected = until + (1 - math.exp(-rate * step)) * (7 + again)
    found = sum(clock.compute(1, 1, again=3) for _ in range(20000)) / 20000
    assert found == pytest.approx(expected, rel=0.05)


def test_all_reduce(tmp_path):
    """Three machines in two regions: the ring has one hop inside the first region, and one each way between them."""
    file = tmp_path / "machines.txt"
    file.write_text(UNEVEN)
    clock = Clock(read_machines(file), 1.0)
    each = 2 * 2 / 3 * 10**6
    assert clock.all_reduce(1.0, 10**6) == pytest.approx(1 + 8 * each / 1e7 + 2 * 2 * 0.05)
    assert {pair: sent / each for pair, sent in clock.bytes_sent.items() if sent} == pytest.approx(
        {("here", "here"): 1, ("here", "there"): 1, ("there", "here"): 1})
    file.write_text(EQUAL.replace("1e9 0", "0.01 0"))
    clock = Clock(read_machines(file), 1.0)
    assert clock.all_reduce(0.0, 10**6) == pytest.approx(8 * 10**6 / 1e7)
    assert clock.bytes_sent["here", "here"] == 2 * 10**6


def test_work_counts_when_it_is_done(tmp_path):
    """So the utilisation never exceeds one, at any event."""
    file = tmp_path / "machines.txt"
    file.write_text("machine a here 1\nmachine b here 0.02\nlink here here 10\n")
    clock = Clock(read_machines(file), 1.0)
    for event in asynchronous(clock, 1000, [10, 10], 500):
        assert sum(clock.busy) <= 2 * event.time * (1 + 1e-9)
    assert sum(clock.busy) == pytest.approx(sum(n * each for n, each in zip((490, 10), (1, 50))))


def test_the_best_ring():
    """The best ring has the fastest slowest link of all orders of the regions, by brute force."""
    found = read_machines(HALOS)
    slowest = lambda ring: min(found.links[pair].bits_per_second for pair in zip(ring, ring[1:] + ring[:1]))
    best = Clock(found, 1.0).ring
    assert slowest(best) == max(slowest(list(ring)) for ring in itertools.permutations("ABCD")) == 0.127e9


# ---- the servers -----------------------------------------------------------------------------------------------------


def test_delayed_nesterov():
    """By the paper's formula, and with a buffer of one as torch's SGD with Nesterov's momentum."""
    torch.manual_seed(0)
    w, differences = torch.randn(4, dtype=torch.double), torch.randn(12, 4, dtype=torch.double)
    for N in (1, 3):
        server, theirs = servers.Server([w], 0.7, 0.9, N), w.clone().requires_grad_()
        sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
        m, total, literal = torch.zeros(4, dtype=torch.double), torch.zeros(4, dtype=torch.double), w.clone()
        for t, g in enumerate(differences):
            server.apply([g])
            total += g
            if (t + 1) % N == 0:
                m = 0.9 * m + total / N
                literal -= 0.7 * (0.9 * m + g / N)
                total.zero_()
            else:
                literal -= 0.7 * g / N
            theirs.grad = g
            sgd.step()
        torch.testing.assert_close(server.weights[0], literal)
        assert (N == 1) == torch.allclose(server.weights[0], theirs.detach())


def test_carry():
    """A server with carry sends all that moved it, once: its messages add up to its steps. Else some is lost."""
    w, moves = torch.zeros(3, dtype=torch.double), torch.randn(9, 3, dtype=torch.double)
    for carry in (False, True):
        server, sent = servers.RegionalServer([w], 1.0, 0.0, 1, 0.25, carry), torch.zeros(3, dtype=torch.double)
        for i, move in enumerate(moves):
            server.apply([move])
            if i in (2, 8):
                server.send()
                sent += server.difference[0]
            if i == 5:
                server.answer = [torch.ones(3, dtype=torch.double)]
                server.merge()
        assert torch.allclose(sent, moves.sum(0)) == carry
        assert carry or torch.allclose(sent, moves[:3].sum(0) + moves[6:].sum(0))


def test_merging():
    """w <- (1 - a) w + a answer, and the next difference begins there."""
    server = servers.RegionalServer([torch.tensor([1.0, 2.0])], 1.0, 0.0, 1, 0.25, False)
    server.answer = [torch.tensor([5.0, 6.0])]
    server.merge()
    assert server.weights[0].tolist() == [2.0, 3.0]
    server.send()
    assert server.difference[0].tolist() == [0.0, 0.0]


def test_difference_of_an_outer_step():
    """difference_of finds the D that outer_step has used, from the weights and the momentum before."""
    cfg = SimpleNamespace(outer_lr=0.7, outer_momentum=0.9)
    anchor, momentum, D = torch.randn(3, 5, dtype=torch.double).unbind()
    after, M = [anchor.clone()], [momentum.clone()]
    outer_step(after, [anchor - D], M, 0.7, 0.9)
    torch.testing.assert_close(simulator.difference_of([anchor], after, [momentum], cfg)[0], D)


def test_learning_rates_of_rounds(data_dir, tmp_path, monkeypatch):
    """A local step has the learning rate of the step that all workers together have reached."""
    rates = {0: [], 1: [], 2: []}

    def step(copy, lr, parts=None):
        rates[copy.k].append(lr)
        copy.taken += 1
        return 1.0

    file = tmp_path / "machines.txt"
    file.write_text(UNEVEN)
    monkeypatch.setattr(simulator.Copy, "step", step)
    flags = [*SMALL, "--max_steps=20", "--batch_size=6", "--micro_batch_size=2", "--local_steps=3", "--dynamic_steps"]
    monkeypatch.setattr(sys, "argv", [
        "simulator.py", "mdlm_text8", *flags, f"--data_dir={data_dir}", f"--machines={file}", "--algorithm=async",
        f"--out_dir={tmp_path / 'out'}", "--eval_interval=20"])
    simulator.main()
    cfg = replace(configs.mdlm_text8(), max_steps=20, warmup_steps=5)
    expected = {0: [], 1: [], 2: []}
    clock = Clock(read_machines(file), 1.0, cfg.seed)
    n_bytes = 4 * sum(p.numel() for p in storage.read(tmp_path / "out")["model"].values())
    for event in asynchronous(clock, n_bytes, [3, 2, 3], 60):
        if event.kind == "start":
            expected[event.who] += [learning_rate(min(19, event.n_begun // 3 + i), cfg) for i in range(event.steps)]
    assert rates == expected and sum(map(len, rates.values())) == 60


# ---- training --------------------------------------------------------------------------------------------------------

RUN = ["--max_steps=12", "--lr=3e-3", "--eval_interval=4", "--dropout=0.1", "--log_interval=4"]


@pytest.mark.parametrize("flags", [["--local_steps=4"], ["--local_steps=4", "--delay=4", "--eager"],
                                   ["--local_steps=4", "--fragments=2", "--delay=1", "--pull=0.5"],
                                   ["--local_steps=4", "--delay=4", "--pull=0.6", "--outer_lr=1",
                                    "--outer_momentum=0"]])
def test_equal_machines_do_what_two_processes_do(flags, data_dir, tmp_path):
    """The anchor and its average, bit for bit, and so the validations."""
    out = simulate(tmp_path, data_dir, EQUAL, *RUN, *flags)
    finish_well(start("mdlm_text8", data_dir, tmp_path / "real", *RUN, *flags, n=2))
    one, other = storage.read(out), storage.read(tmp_path / "real")
    for key in ("model", "ema"):
        assert storage.digest(one[key]) == storage.digest(other[key]), key
    assert losses(out, "val_bits_per_token") == pytest.approx(losses(tmp_path / "real", "val_bits_per_token"), rel=1e-6)


def test_averaged_gradients_are_those_of_micro_batches(call, data_dir, tmp_path):
    """ddp on two machines is train.py with two micro-batches, bit for bit."""
    flags = [*RUN, "--dropout=0", "--micro_batch_size=4"]
    out = simulate(tmp_path, data_dir, EQUAL, *flags, "--algorithm=ddp")
    finish_well(start("mdlm_text8", data_dir, tmp_path / "real", *flags))
    one, other = storage.read(out), storage.read(tmp_path / "real")
    assert storage.digest(one["model"]) == storage.digest(other["model"])


def test_halos_of_one_region_is_async(data_dir, tmp_path):
    """HALoS is async if the global server applies each difference at once, and returns the same weights."""
    flags = [*RUN, "--dynamic_steps", "--local_steps=3", "--batch_size=6", "--micro_batch_size=2"]
    one_place = UNEVEN.replace("there", "here").replace("link here here 100\n" * 2, "").replace("0.01 50", "1e9 0")
    one = simulate(tmp_path, data_dir, one_place, *flags, "--algorithm=async", "--buffer=3", name="async")
    other = simulate(tmp_path, data_dir, one_place, *flags, "--algorithm=halos", "--buffer=3", "--merge_every=1",
                     "--merge_weight=1", "--global_lr=1", "--global_momentum=0", "--global_buffer=1", name="halos")
    one, other = storage.read(one), storage.read(other)
    for name, p in one["model"].items():
        torch.testing.assert_close(p, other["model"][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("flags", [["--algorithm=ddp"],
                                   ["--local_steps=3", "--delay=2", "--pull=0.5", "--dynamic_steps"],
                                   ["--algorithm=async", "--local_steps=3", "--buffer=2", "--dynamic_steps",
                                    "--outer_lr=0.3"],
                                   ["--algorithm=halos", "--local_steps=2", "--merge_every=2", "--carry"]])
def test_a_simulated_run(flags, call, data_dir, tmp_path):
    """On uneven machines all tokens are seen, the model learns and can be scored, and a run that is continued from its
    checkpoint before the last ends with the same weights and the same log."""
    flags = [*RUN, "--batch_size=6", "--micro_batch_size=2", "--max_steps=24", *flags]
    whole = simulate(tmp_path, data_dir, UNEVEN, *flags, name="whole")
    lines = [line for line in log(whole) if "val_bits_per_token" in line]
    assert lines[-1]["tokens"] == 24 * 6 * 32 and lines[-1]["val_bits_per_token"] < lines[0]["val_bits_per_token"]
    assert 0 < lines[-1]["utilisation"] <= 1 and any(line["staleness"] > 0 for line in lines) == (
        flags[-1] in ("--outer_lr=0.3", "--carry"))
    assert (whole / "run.png").exists() and call("evaluate.py", whole, "--data_dir", data_dir).code == 0
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    (parts / "ckpt_prev.pt").rename(parts / "ckpt.pt")
    assert storage.read(parts)["events"] < storage.read(whole)["events"]
    assert all(line["utilisation"] <= 1 and -1 <= line["cosine"] <= 1 for line in lines if line["cosine"] is not None)
    simulate(tmp_path, data_dir, UNEVEN, *flags, name="parts", resume=True)
    one, other = storage.read(whole), storage.read(parts)
    for key in ("model", "ema", "simulation"):
        assert storage.digest(one[key]) == storage.digest(other[key]), key
    assert [line for line in log(parts) if "val_bits_per_token" in line] == lines
    simulate(tmp_path, data_dir, UNEVEN, *flags, name="parts", resume=True)  # complete: nothing happens
    assert [line for line in log(parts) if "val_bits_per_token" in line] == lines
    assert_one_line(call("studies/simulator.py", "mdlm_text8", *SMALL, *flags[:-1], "--local_steps=7", "--resume",
                         f"--machines={tmp_path}/machines.txt", f"--data_dir={data_dir}", f"--out_dir={parts}"),
                    "another run")


def test_wrong_tables(tmp_path):
    for text, words in (("machine a here", "line 1"), ("machine a here 1\nmachine b there 1\nlink here here 1",
                        "no link between here and there"), ("", "must have machines"), ("# no\nlink a b", "line 2"),
                        ("machine a here -1", "line 1"), ("machine a here 1 color=3", "line 1"),
                        ("machine a here 1\nmachine a here 1\nlink here here 1", "a name of its own")):
        (tmp_path / "machines.txt").write_text(text)
        with pytest.raises(UserError, match=words):
            read_machines(tmp_path / "machines.txt")
    with pytest.raises(UserError, match="cannot read"):
        read_machines(Path(tmp_path / "missing.txt"))


def test_flags_that_contradict(call, data_dir, trained, tmp_path):
    go = lambda *flags: call("studies/simulator.py", "mdlm_text8", *SMALL, f"--data_dir={data_dir}", "--batch_size=16",
                             f"--machines={HALOS}", "--micro_batch_size=1", f"--out_dir={tmp_path}/no", *flags)
    for flags, words in (([], "needs --local_steps"),
                         (["--algorithm=async", "--local_steps=3", "--delay=1"], "are for"),
                         (["--local_steps=3", "--buffer=2"], "--buffer is for"),
                         (["--algorithm=ddp", "--dynamic_steps"], "needs rounds"),
                         (["--algorithm=ddp", "--batch_size=8"], "multiple of the 16 machines"),
                         (["--algorithm=ddp", "--anneal_steps=8"], "not simulated"),
                         (["--local_steps=3", f"--init_from={trained}", "--n_head=1"], "config: add --n_head=2"),
                         (["--local_steps=3", "--merge_weight=0.5"], "--merge_weight is for --algorithm halos")):
        assert_one_line(go(*flags), words)
    assert not (tmp_path / "no").exists()
