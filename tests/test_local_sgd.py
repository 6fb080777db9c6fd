"""Local SGD: its special cases are other algorithms, to the bit where they can be, and interruptions change nothing."""

import signal
import time

import pytest
import torch

import parallel
import storage
from commands import (STEADY, assert_identical, assert_one_line, finish, finish_well, log, losses, read_until, start,
                      train)
from configs import Config, replace
from local_sgd import Exchange, Worker, deal, outer_step
from optim import EMA

H, K, STEPS = 6, 3, 20  # steps of a round, workers, steps of a run, which ends within a round

MODES = {
    "diloco": {},
    "averaging": dict(outer_lr=1.0, outer_momentum=0.0),
    "overlap": dict(delay=H, pull=0.6, outer_lr=1.0, outer_momentum=0.0),
    "eager": dict(delay=H, eager=True),
    "streaming": dict(fragments=2, delay=2, pull=0.5),
    "streaming at once": dict(fragments=2),
}


def config(**settings):
    return replace(Config(), local_steps=H, max_steps=STEPS, **settings)


class Weights(torch.nn.Module):
    """Two blocks and an embedding, of two numbers each."""

    def __init__(self):
        super().__init__()
        part = lambda: torch.nn.Linear(2, 1, bias=False, dtype=torch.double)
        self.embed, self.blocks = part(), torch.nn.ModuleList([part(), part()])


@torch.no_grad()
def local_step(w, k, step):
    """A step of worker k on a vector, in place: to its own, moving target."""
    w += 0.1 * (torch.sin(torch.arange(len(w), dtype=w.dtype) + 1.7 * k + 0.3 * step) - w)


def fixed_step(w, k, step):
    """A step of worker k, in place, that does not depend on the weights."""
    w += torch.sin(torch.arange(len(w), dtype=w.dtype) + 1.7 * k + 0.3 * step)


def by_exchange(cfg, K=K):
    """Run K workers by local_sgd.py: the weights of each, a list of vectors (embed, blocks 0 and 1)."""
    torch.manual_seed(0)
    models = [Weights() for _ in range(K)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    start = torch.nn.utils.parameters_to_vector(models[0].parameters()).detach()
    exchange = Exchange([Worker(model, cfg, K) for model in models], cfg,
                        lambda messages: parallel.Average(messages, torch.double))
    for step in range(1, STEPS + 1):
        for k, model in enumerate(models):
            w = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            local_step(w, k, step)
            with torch.no_grad():
                for p, part in zip(model.parameters(), w.split(2)):
                    p.copy_(part.view_as(p))
        exchange.after(step)
    return start, [torch.nn.utils.parameters_to_vector(model.parameters()).detach() for model in models], exchange


def nesterov(anchor, gradient, momentum, cfg):
    momentum = cfg.outer_momentum * momentum + gradient
    return anchor - cfg.outer_lr * (gradient + cfg.outer_momentum * momentum), momentum


def literally(cfg, start):
    """The same by the papers' pseudo-code, one fragment after the other: the anchor (of worker 0) at the end."""
    w = [start.clone() for _ in range(K)]
    parts = {"embed": slice(0, 2), "block 0": slice(2, 4), "block 1": slice(4, 6)}
    fragments = [list(parts.values())] if cfg.fragments == 1 else [[parts["block 0"]],
                                                                   [parts["block 1"], parts["embed"]]]
    anchors, momenta = [start.clone() for _ in range(K)], [torch.zeros(6, dtype=torch.double) for _ in range(K)]
    sent = {}  # (fragment, worker) -> (step of arrival, what was sent)
    for step in range(1, STEPS + 1):
        for k in range(K):
            local_step(w[k], k, step)
        for i, slices in enumerate(fragments):
            at, last = torch.cat([torch.arange(6)[s] for s in slices]), step == STEPS
            sends = (step + i * H // cfg.fragments) % H == 0 or last

            def apply_mean():
                mean = sum(sent[i, k][1] for k in range(K)) / K
                for k in range(K):
                    gradient = anchors[k][at] - mean
                    anchors[k][at], momenta[k][at] = nesterov(anchors[k][at], gradient, momenta[k][at], cfg)
                    w[k][at] = (1 - cfg.pull) * w[k][at] + cfg.pull * anchors[k][at]
                    sent.pop((i, k))

            if cfg.eager:
                if sends:
                    own = [anchors[k][at] - w[k][at] for k in range(K)]
                    for k in range(K):
                        others = sum(sent[i, j] for j in range(K) if j != k) / K if sent else 0
                        anchors[k][at], momenta[k][at] = nesterov(anchors[k][at], own[k] / K + others, momenta[k][at],
                                                                  cfg)
                        w[k][at] = anchors[k][at]
                    sent = {(i, k): own[k] for k in range(K)}
                if last:
                    for k in range(K):
                        others = sum(sent[i, j] for j in range(K) if j != k) / K
                        anchors[k][at] -= cfg.outer_lr * (1 + cfg.outer_momentum) * others
                continue
            if (i, 0) in sent and (step == sent[i, 0][0] or last):
                apply_mean()
            if sends:
                for k in range(K):
                    sent[i, k] = step + cfg.delay, w[k][at].clone()
                if cfg.delay == 0 or last:
                    apply_mean()
    return anchors[0]


@pytest.mark.parametrize("mode", MODES)
def test_by_the_papers(mode):
    """Each mode does what its paper's pseudo-code says, and ends with the anchor as the weights of each worker."""
    cfg = config(n_layer=2, **MODES[mode])
    start, weights, exchange = by_exchange(cfg)
    torch.testing.assert_close(weights[0], literally(cfg, start), atol=1e-12, rtol=1e-12)
    if mode != "eager":  # there anchors differ by the weight that momentum gave to own differences
        assert all(torch.equal(other, weights[0]) for other in weights)
    assert (weights[0] - start).norm() > 0.1 and exchange.under_way == [None] * cfg.fragments


def test_nothing_is_lost_or_applied_twice(monkeypatch):
    """Without momentum, and with steps that do not depend on the weights, the end is the start plus the mean of all
    steps of all workers, however they travel."""
    monkeypatch.setitem(globals(), "local_step", fixed_step)
    for mode in ("averaging", "eager", "streaming at once"):
        cfg = config(n_layer=2, **MODES[mode] | dict(outer_lr=1.0, outer_momentum=0.0))
        start, weights, _ = by_exchange(cfg)
        expected = start.clone()
        for k in range(K):
            for step in range(1, STEPS + 1):
                moved = torch.zeros_like(start)
                fixed_step(moved, k, step)
                expected += moved / K
        for other in weights:
            torch.testing.assert_close(other, expected, atol=1e-12, rtol=1e-12)


def test_eager_with_one_worker_is_diloco():
    """The eager exchange of one worker is DiLoCo's, because its own difference is the mean."""
    eager, plain = (by_exchange(config(n_layer=2, **MODES[mode]), K=1)[1][0] for mode in ("eager", "diloco"))
    torch.testing.assert_close(eager, plain, atol=1e-12, rtol=1e-12)


def test_outer_step_is_that_of_torch():
    """outer_step is torch's SGD with Nesterov's momentum."""
    torch.manual_seed(0)
    ours, momentum = [torch.randn(5, dtype=torch.double)], [torch.zeros(5, dtype=torch.double)]
    theirs = ours[0].clone().requires_grad_()
    sgd = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        mean = torch.randn(5, dtype=torch.double)
        theirs.grad = theirs.detach() - mean
        sgd.step()
        outer_step(ours, [mean], momentum, 0.7, 0.9)
    torch.testing.assert_close(ours[0], theirs.detach())


def test_rounds_of_one_step_are_ddp():
    """K workers with SGD, rounds of one step and plain averaging do what averaged gradients do."""
    cfg = replace(config(outer_lr=1.0, outer_momentum=0.0), local_steps=1)
    torch.manual_seed(0)
    data = torch.randn(STEPS, K, 4, 2, dtype=torch.double)
    loss = lambda model, x: (model.blocks[1](x) - model.embed(x).tanh() * model.blocks[0](x)).square().mean()
    models = [Weights() for _ in range(K + 1)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    exchange = Exchange([Worker(model, cfg, K) for model in models[:K]], cfg,
                        lambda messages: parallel.Average(messages, torch.double))
    for step in range(STEPS):
        for model, optimizer, batches in zip(models, optimizers, [*data[step].split(1), data[step]]):
            optimizer.zero_grad()
            sum(loss(model, x) for x in batches).div(len(batches)).backward()
            optimizer.step()
        exchange.after(step + 1)
    for p, q in zip(models[0].parameters(), models[K].parameters()):
        torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-12)


def test_bfloat16_rounds_differences(monkeypatch):
    """Differences are rounded to bfloat16, not weights: weights of 1,000, whose rounding is up to 2, move by less."""
    monkeypatch.setitem(globals(), "local_step", fixed_step)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda layer: torch.nn.init.constant_(layer.weight, 1000))
    exact, average = by_exchange(config(n_layer=2))[1][0], parallel.Average
    monkeypatch.setattr(parallel, "Average", lambda messages, dtype: average(messages, torch.bfloat16))
    rounded = by_exchange(config(n_layer=2, send_dtype="bfloat16"))[1][0]
    assert 0 < (rounded - exact).abs().max() < 0.1


def test_a_mean_has_the_digits_of_the_weights():
    """A mean is added up in the format that was sent, and divided in that of the weights."""
    messages = [[torch.tensor([x])] for x in (1.0, 0.0, 0.0)]
    assert parallel.Average(messages, torch.bfloat16).wait()[0].item() == torch.tensor(1 / 3).item()


def test_average_of_a_round():
    """An EMA that is updated once after n steps has the decay of the last step to the power of n."""
    model, of = torch.nn.Linear(1, 1, bias=False), [torch.ones(1, 1)]
    ema = EMA(model, 0.9, of)
    ema.average[0].fill_(3.0)
    ema.updates = 1000
    ema.update(4)
    assert ema.average[0].item() == pytest.approx(1 + 2 * 0.9**4) and ema.updates == 1004


def test_deal():
    """Blocks are dealt out in turn, and all other weights go to the last fragment."""
    names = ["embed.weight", *(f"blocks.{i}.qkv.weight" for i in range(12)), "norm.weight"]
    assert deal(names, 1) == [names]
    one, two = deal(names, 2)
    assert one == [f"blocks.{i}.qkv.weight" for i in range(0, 12, 2)]
    assert two == ["embed.weight", *(f"blocks.{i}.qkv.weight" for i in range(1, 12, 2)), "norm.weight"]


# ---- in train.py -----------------------------------------------------------------------------------------------------

RUN = ["--max_steps=12", "--lr=3e-3", "--eval_interval=6", "--checkpoint_interval=4", "--dropout=0.1"]


def test_one_worker_that_is_only_averaged_is_a_plain_run(call, data_dir, tmp_path):
    """Weights and optimiser agree to the bit for rounds of any length, and the EMA for rounds of one step."""
    plain = tmp_path / "plain"
    assert train(call, "mdlm_text8", data_dir, plain, *RUN).code == 0
    for steps in (1, 5):
        out = tmp_path / f"rounds{steps}"
        result = train(call, "mdlm_text8", data_dir, out, *RUN, f"--local_steps={steps}", "--outer_lr=1",
                       "--outer_momentum=0")
        assert result.code == 0, result.err
        one, other = storage.read(plain), storage.read(out)
        for key in ("model", "optimizer", "tally", *["ema"] * (steps == 1)):
            assert storage.digest(one[key]) == storage.digest(other[key]), key
    assert losses(tmp_path / "rounds1") == losses(plain) and len(losses(out)) == 3


def test_log_lines_wait_for_the_end_of_a_round(call, data_dir, tmp_path):
    """A line, a validation and a checkpoint come after the round in which they fall due."""
    flags = ["--max_steps=14", "--local_steps=4", "--log_interval=5", "--eval_interval=7"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", *flags).code == 0
    at = lambda key: [line["step"] for line in log(tmp_path / "out") if key in line]
    assert at("bits_per_token") == [8, 12, 14] and at("val_bits_per_token") == [8, 14]


def test_losses_of_all_workers_are_logged(call, data_dir, tmp_path):
    """The logged bits are the mean over the workers: with tiny steps those of one process on the whole batch."""
    flags = [*STEADY, "--log_interval=2"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *flags).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *flags, "--local_steps=2", n=2))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.parametrize("flags", [[], ["--delay=4", "--pull=0.6"], ["--delay=4", "--eager"],
                                   ["--fragments=2", "--delay=1", "--pull=0.5", "--send_dtype=bfloat16"]])
def test_two_workers_resume_exactly(flags, data_dir, tmp_path):
    """Two workers stop at the end of a round, and go on: bit for bit as two that did not stop, with all that was under
    way. The workers' own optimisers differ."""
    flags = ["--max_steps=202", "--lr=1e-3", "--local_steps=4", *flags, "--log_interval=8", "--dropout=0.1"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "whole", *flags, n=2))
    processes = start("mdlm_text8", data_dir, tmp_path / "parts", *flags, n=2)
    read_until(processes[0], "step 24 ")
    processes[1].send_signal(signal.SIGUSR1)
    finish_well(processes)
    state = storage.read(tmp_path / "parts")
    assert state["step"] % 4 == 0 and 24 <= state["step"] < 202 and len(state["workers"]) == 2
    one, two = (worker["optimizer"]["embed.weight"]["exp_avg"] for worker in state["workers"])
    assert not torch.equal(one, two)
    finish_well(start("mdlm_text8", data_dir, tmp_path / "parts", *flags, "--resume=auto", n=2))
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    for key in ("val_bits_per_token", "grad_norm"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "parts", key)
    one, two = (storage.read(tmp_path / name)["workers"] for name in ("whole", "parts"))
    assert storage.digest(one) == storage.digest(two)


def test_teams(call, data_dir, tmp_path):
    """Two workers of two processes each do what two of one process do, up to rounding."""
    flags = [*STEADY, "--local_steps=2"]
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *flags, "--log_interval=2", n=2))
    finish_well(start("mdlm_text8", data_dir, tmp_path / "four", *flags, "--log_interval=2", "--local_group=2", n=4))
    one, other = (storage.read(tmp_path / name) for name in ("two", "four"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "four"), rel=1e-5)
    for name, p in one["model"].items():
        torch.testing.assert_close(p, other["model"][name], atol=1e-5, rtol=1e-4)
    result = finish(start("mdlm_text8", data_dir, tmp_path / "two", *flags, "--resume=auto", n=4))
    assert result[0][0] == 2 and "the run has 2 workers, and 4 were started" in result[0][1]


def test_a_dead_worker_ends_the_run(data_dir, tmp_path):
    """The others notice at their next exchange, and end with one line; nothing that was saved is lost."""
    processes = start("mdlm_text8", data_dir, tmp_path / "out", "--max_steps=100000", "--local_steps=5",
                      "--checkpoint_interval=5", n=2)
    read_until(processes[0], "step 10 ")
    processes[1].kill()
    killed = time.time()
    (code, output), _ = finish(processes)
    assert code == 1 and "lost another process" in output.splitlines()[-1] and time.time() - killed < 60
    assert storage.read(tmp_path / "out")["step"] >= 5


def test_settings_that_contradict(call, data_dir, tmp_path):
    go = lambda *flags: train(call, "mdlm_text8", data_dir, tmp_path / "no", "--max_steps=5", *flags)
    for flags, words in ((["--outer_lr=0.5"], "outer_lr needs local_steps"), (["--eager"], "eager needs local_steps"),
                         (["--local_steps=5", "--fsdp"], "--fsdp splits them"),
                         (["--local_steps=5", "--pull=1.5"], "pull at most 1"),
                         (["--local_steps=5", "--outer_momentum=1"], "must be below 1"),
                         (["--local_steps=5", "--delay=6"], "delay and fragments must be at most"),
                         (["--local_steps=2", "--fragments=3", "--n_layer=3"], "delay and fragments must be at most"),
                         (["--local_steps=5", "--fragments=4"], "no 4 blocks to deal out"),
                         (["--local_steps=5", "--eager"], "eager needs delay=5"),
                         (["--local_steps=5", "--delay=5"], "throws all local steps away"),
                         (["--local_steps=5", "--local_group=2"], "does not divide the number of processes, 1")):
        assert_one_line(go(*flags), words)
    assert not (tmp_path / "no").exists()
