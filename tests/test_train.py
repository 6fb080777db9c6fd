"""The parts of train.py that comparing a run with itself cannot check: averages, learning rate, decay, clipping."""

import dataclasses
import math

import pytest
import torch

import checkpoint
import parallel
from cli import matmul_peak
from commands import losses, train
from configs import CONFIGS, Config, replace
from costs import flops_per_token
from data.loader import load_split, windows
from diffusion import MDLM
from likelihood import Windows, bound
from log import Pace
from networks import small
from optim import EMA, AdamW, learning_rate, make_optimizers
from randomness import uniforms
from train import train_step

CFG = Config(n_layer=1, n_head=2, n_embd=16, n_cond=8, seq_len=8, max_steps=110, warmup_steps=10, lr=1.0, min_lr=0.1)


def test_ema():
    """average <- d * average + (1 - d) * weights with d = min(decay, (1 + n)/(10 + n)), update by update."""
    model = torch.nn.Linear(1, 1, bias=False)
    ema, expected = EMA(model, decay=0.5), model.weight.item()
    for n in range(1, 20):
        with torch.no_grad():
            model.weight.fill_(float(n))
        ema.update()
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * n
        assert ema.average[0].item() == pytest.approx(expected)


def test_ema_is_applied_and_taken_back():
    """Inside applied() the model has the average and is in eval mode; then its own weights again, after errors, too."""
    model = torch.nn.Linear(3, 3).train()
    ema, average = EMA(model, decay=0.9), model.weight.clone()
    with torch.no_grad():
        model.weight.normal_()
    raw = model.weight.clone()
    with pytest.raises(ZeroDivisionError), ema.applied():
        assert torch.equal(model.weight, average) and not model.training
        assert torch.equal(ema.average[0], raw)  # there is no third copy, which the forecast of memory would not count
        raise ZeroDivisionError
    assert torch.equal(model.weight, raw) and model.training and torch.equal(ema.average[0], average)


def test_validation_is_of_the_average_without_dropout(call, data_dir, tmp_path):
    """What a run reports as validation is the bound of the averaged weights in eval mode: neither that of the raw ones
    nor that of a network that drops out, which are hundreds of times the tolerance away."""
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, "--max_steps=20", "--lr=0.05", "--dropout=0.9", "--ema_decay=0.9",
                 "--eval_interval=20", "--eval_sequences=100").code == 0
    [reported] = losses(out, "val_bits_per_token")
    tokens = load_split("tiny", "val", 32, data_dir)
    found = {}
    for name, raw, dropping in (("average", False, False), ("raw", True, False), ("dropping", False, True)):
        model, config, *_ = checkpoint.load_model(out, torch.device("cpu"), raw=raw)
        torch.manual_seed(0)
        data = Windows(tokens, windows(tokens, 32, 100), 32, 8, torch.device("cpu"), torch.float32)
        nats = bound(model.train(dropping), config.make_objective(27), data)
        found[name] = nats.mean().item() / math.log(2)
    assert reported == pytest.approx(found["average"], rel=1e-5)
    assert min(abs(found[other] - reported) for other in ("raw", "dropping")) > 0.01, found


def test_learning_rate():
    """Linear warm-up, the peak, a quarter and half of the way down the cosine or the line, and min_lr at the end."""
    rates = lambda **change: [learning_rate(step, replace(CFG, **change)) for step in (0, 4, 9, 10, 35, 60, 110)]
    assert rates() == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1])
    assert rates(lr_decay="linear") == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.775, 0.55, 0.1])


def test_decay_on_matrices_only():
    """Every parameter is in one group; embeddings and matrices decay, gains and biases do not."""
    model = CFG.make_model(5)
    [adamw] = make_optimizers(model, CFG, torch.device("cpu"), torch.float32)
    decayed, free = adamw.param_groups
    assert decayed["weight_decay"] == CFG.weight_decay and free["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_settings_of_adamw():
    [adamw] = make_optimizers(CFG.make_model(5), replace(CFG, beta1=0.7, beta2=0.8), torch.device("cpu"), torch.float32)
    assert adamw.defaults["betas"] == (0.7, 0.8) and adamw.defaults["lr"] == CFG.lr


def test_what_the_fast_recipe_changes():
    """Of the settings of an mdlm_* config: what README says, and nothing else."""
    mdlm, fast = (dataclasses.asdict(CONFIGS[f"mdlm_text8{kind}_8gpu"]()) for kind in ("", "_fast"))
    assert {key: (mdlm[key], fast[key]) for key in mdlm if mdlm[key] != fast[key]} == {
        "weighting": ("nelbo", "simple"), "shift_tokens": (False, True), "head_gates": (False, True),
        "dropout": (0.025, 0.0), "optimizer": ("adamw", "muon"), "lr_decay": ("cosine", "linear")}


def test_flops_of_what_the_loss_asks_for():
    """The head runs on masks, half of all tokens, and everywhere where the auxiliary loss asks for it."""
    model = CFG.make_model(50)
    flops = [flops_per_token(model, replace(CFG, **change).make_objective(50), replace(CFG, **change))
             for change in ({"lambda_ce": 0.1}, {"lambda_ce": 0.0}, {"lambda_ce": 0.0, "noise": "uniform"})]
    assert flops[0] == flops[2] == model.flops(8)
    assert flops[1] == pytest.approx(model.flops(8, 0.5), rel=0.02) and flops[1] < 0.9 * flops[0]
    for objective, share in (("d3pm", 1 / 8), ("ar", 2 / 8)):  # given tokens have no logits
        cfg = replace(CFG, objective=objective, lambda_ce=0.0, prefix="fixed:6", conditioning="none")
        found = flops_per_token(cfg.make_model(50), cfg.make_objective(50), cfg)
        assert found == pytest.approx(cfg.make_model(50).flops(8, share), rel=0.03)
        questions = torch.tensor([4, 4, 4, 4, 4, 9, 4, 4]).expand(256, -1)  # of the same length
        until = replace(cfg, prefix="until:x")
        assert flops_per_token(until.make_model(50), until.make_objective(50), until, questions, 9) == found


@pytest.mark.parametrize("grad_clip", [0.01, 0.0])
def test_clipping(grad_clip):
    """The step is taken with the gradient of the whole batch, scaled down to norm grad_clip; 0 leaves it alone."""
    torch.manual_seed(0)
    cfg = Config(n_layer=1, n_head=2, n_embd=16, n_cond=8, seq_len=8, grad_clip=grad_clip)
    model, objective = cfg.make_model(5), MDLM(5)
    x0, noise = torch.randint(0, 5, (4, 8)), objective.noise(*uniforms(0, 0, range(4), 4, 8, True))
    objective.loss(model, x0, noise)[0].backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    norm = math.sqrt(sum((g**2).sum().item() for g in gradients))
    model.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.step_unless = lambda bad: optimizer.step()
    nats, reported, bad = train_step(model, objective, [(x0, noise)], [optimizer], cfg, torch.device("cpu"),
                                     torch.float32)
    scale = min(1.0, grad_clip / norm) if grad_clip else 1.0
    for p, old, gradient in zip(model.parameters(), before, gradients):
        torch.testing.assert_close(old - p, scale * gradient, atol=1e-6, rtol=1e-3)
    assert reported.item() == pytest.approx(norm, rel=1e-4) and norm > 0.01 and nats > 0 and not bad


def test_a_bad_step_is_skipped():
    """A bad step changes nothing: an AdamW that is not fused (as on mps) is not called in it."""
    torch.manual_seed(0)
    model, objective = CFG.make_model(5), MDLM(5)
    optimizer = AdamW(model.parameters(), lr=0.1, fused=False)
    x0, noise = torch.randint(0, 5, (4, 8)), objective.noise(*uniforms(0, 0, range(4), 4, 8, True))
    spoilt = noise._replace(weight=noise.weight * math.nan)
    weights = lambda: [p.detach().clone() for p in model.parameters()]
    before = weights()
    for draw, skipped in ((spoilt, True), (noise, False), (spoilt, True)):
        *_, bad = train_step(model, objective, [(x0, draw)], [optimizer], CFG, torch.device("cpu"),
                             torch.float32)
        after = weights()
        assert bool(bad) == skipped == all(torch.equal(a, b) for a, b in zip(before, after))
        before = after


def test_pace(monkeypatch):
    """Steps per second and the time left count training alone: from step 10, 5 steps in 2 s, a pause of 50 s, 10 in
    4."""
    clock = iter([100, 102, 103, 153, 156, 157])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pace = Pace(10)
    assert pace.lap(15) == 2.5 and pace.left(20) == 8
    with pace.paused():
        pass
    assert pace.lap(25) == 2.5 and pace.left(20) == 8
    assert pace.lap(35) == 10 and pace.left(25) == pytest.approx(7)


def test_matmul_peak(monkeypatch):
    """The peak is that of the fastest product, 2 n^3 operations in its time; the first one only warms up."""
    durations = [1, 40, 20, 30, 50, 60]
    clock = iter([time for i, duration in enumerate(durations) for time in (100 * i, 100 * i + duration)])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert matmul_peak(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 20


def test_gradients_are_freed():
    """The memory of gradients is free between steps, if there is one process."""
    model = small().make_model(27)
    model(torch.zeros(1, small().seq_len, dtype=torch.long), torch.ones(1)).sum().backward()
    parallel.clear_gradients(model, torch.optim.SGD(model.parameters()))
    assert all(p.grad is None for p in model.parameters())
