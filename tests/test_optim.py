"""Muon, against linear algebra and torch's own; SM3 and adaptive clipping, against their papers' rules written out."""

import itertools
import math

import pytest
import torch

import costs
import optim
from checkpoint import states
from cli import UserError
from commands import assert_one_line, assert_resumes_exactly, losses, train
from configs import Config, replace
from optim import COEFFICIENTS, OPTIMIZERS, SM3, Muon, clip_gradients, make_optimizers, orthogonalise

CFG = Config(n_layer=2, n_head=2, n_embd=16, n_cond=8, seq_len=8, optimizer="muon", lr=0.01)
GOOD = torch.tensor(False)  # the argument `bad` of a step that is taken


def after_five_iterations(v):
    """Apply the polynomial of five iterations to singular values v."""
    a, b, c = COEFFICIENTS
    for _ in range(5):
        v = a * v + b * v**3 + c * v**5
    return v


def with_values(s, shape):
    """Return (u, v, u s v^T), of shape (..., m, n), with singular values s and random singular vectors u and v."""
    n = min(shape[-2:])
    u, v = torch.linalg.qr(torch.randn(*shape[:-1], n))[0], torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], n))[0]
    return u, v, u * s @ v.mT


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 16, 64), (2, 64, 16), (3, 16, 40)])
def test_orthogonalise(shape):
    """The singular vectors stay, and the singular values are those of five iterations, after the division."""
    torch.manual_seed(0)
    s = torch.logspace(0, -3, min(shape[-2:]))
    u, v, g = with_values(s, shape)
    inner = u.mT @ orthogonalise(10 * g) @ v
    values = inner.diagonal(dim1=-2, dim2=-1)
    expected = after_five_iterations(s / (s**8).sum() ** (1 / 8))
    torch.testing.assert_close(values, expected.expand_as(values), atol=1e-3, rtol=0)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-3, rtol=0)
    assert orthogonalise(torch.zeros(shape)).abs().max() == 0
    for scale in (1e-6, 1e6, 1e15):  # each matrix by its own size
        both = orthogonalise(torch.cat((g, scale * g)))
        torch.testing.assert_close(*both.chunk(2), atol=1e-3, rtol=0)


def test_coefficients():
    """Values from 0.005 to 1 end in [0.68, 1.16], none up to 1.2 ends above 1.21, and tiny ones become 485 times as
    large."""
    values = after_five_iterations(torch.linspace(0.005, 1, 100_001, dtype=torch.float64))
    assert 0.68 < values.min() and 1.15 < values.max() < 1.16
    assert 1.20 < after_five_iterations(torch.linspace(0, 1.2, 100_001, dtype=torch.float64)).max() < 1.21
    assert after_five_iterations(1e-9) == pytest.approx(485e-9, rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64)])
def test_small_values_in_bfloat16(shape):
    """Rounding does not drown small singular values: those from 1 to 1/100 end where they do in float32, within 0.1.
    (With five iterations from one s, rounding makes values of hundreds.)"""
    torch.manual_seed(0)
    s = torch.logspace(0, -2, 64)
    u, v, g = with_values(s, shape)
    inner = u.mT @ orthogonalise(g[None].bfloat16())[0].float() @ v
    expected = after_five_iterations(s / (s**8).sum() ** (1 / 8))
    torch.testing.assert_close(inner, torch.diag(expected), atol=0.1, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "one direction", "two directions", "one row", "some rows", "one entry",
                                  "uneven rows"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 256)])
def test_no_value_grows_in_bfloat16(kind, shape):
    """No singular value ends much above 1.21, whatever the gradient is like: no value up to 1.2 does (see above)."""
    torch.manual_seed(0)
    m, n = shape
    for i in range(1, 21):
        direction = lambda: torch.outer(torch.randn(m), torch.randn(n))
        g = torch.randn(shape)
        g = {"dense": g, "one direction": direction(), "two directions": direction() + i / 20 * direction(),
             "one row": g * (torch.arange(m) == 3)[:, None], "some rows": g * (torch.arange(m) < i)[:, None],
             "one entry": i / 7 * torch.eye(m, n) * (torch.arange(m) == 3)[:, None],
             "uneven rows": g * torch.randn(m, 1).mul(3).exp()}[kind]
        assert torch.linalg.svdvals(orthogonalise(g[None].bfloat16()).float()).max() < 1.4


def test_is_torchs(monkeypatch):
    """Ten steps from random gradients, with torch's iterations, are torch.optim.Muon's. Shapes are mixed on purpose."""
    theirs_of = lambda x: torch.stack([torch.optim._muon._zeropower_via_newtonschulz(
        matrix, COEFFICIENTS, 5, 1e-7) for matrix in x]).float()
    monkeypatch.setattr(optim, "orthogonalise", theirs_of)
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = dict(lr=0.01, weight_decay=0.1)
    muon, torchs = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        muon.step_unless(GOOD)
        torchs.step()
    for p, q, old in zip(ours, theirs, start):
        assert (p - q).norm() < 1e-5 * (p - old).norm()


def test_compiled_steps():
    """The compiled Muon takes the same steps, skips the same ones, and is compiled once for all learning rates."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((12, 8), (12, 8), (8, 16))]
    grads = [[torch.randn_like(p) for p in starts] for _ in range(4)]
    ends = []
    for compiled in (False, True):
        params = [torch.nn.Parameter(p.clone()) for p in starts]
        optimizer = Muon(params, lr=0.1, weight_decay=0.1, compiled=compiled)
        for i, of_step in enumerate(grads):
            optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            for p, grad in zip(params, of_step):
                p.grad = grad
            torch.compiler.set_stance("fail_on_recompile" if compiled and i else "default")
            optimizer.step_unless(torch.tensor(i == 2))
            torch.compiler.set_stance("default")
        ends.append([p.detach() for p in params])
    torch.testing.assert_close(ends[1], ends[0])


def test_precision():
    """In bfloat16 a step is the same but for its rounding: a seventh of its norm here."""
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(16, 64))
        p.grad = torch.randn(p.shape)
        Muon([p], lr=0.1, dtype=dtype).step_unless(GOOD)
        steps.append(p.detach())
    assert steps[1].dtype == torch.float32 and 1e-4 < (steps[0] - steps[1]).norm() / steps[0].norm() < 0.2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_does_nothing(name):
    """A gradient of nans moves neither weights nor state. A good step moves both. The state has its shapes."""
    kind, p = OPTIMIZERS[name], torch.nn.Parameter(torch.randn(4, 8))
    optimizer = kind.from_config([{"params": [p], "weight_decay": 0.1}], replace(CFG, optimizer=name),
                                 torch.device("cpu"), torch.float32)
    for bad in (True, False, True):
        before = {key: x.clone() for key, x in optimizer.state[p].items()} | {"weights": p.detach().clone()}
        p.grad = torch.full_like(p, math.nan) if bad else torch.randn_like(p)
        optimizer.step_unless(torch.tensor(bad))
        for key, x in (optimizer.state[p] | {"weights": p.detach()}).items():
            assert torch.equal(x, before.get(key, torch.zeros_like(x))) == bad, key
    assert {key: x.shape for key, x in optimizer.state[p].items()} == kind.state_shapes(p.shape)


def test_who_steps_what():
    """Muon has the four matrices of each block, AdamW all else, and together they have every parameter once. SM3 has
    all, with the momentum beta1."""
    model = CFG.make_model(5)
    assert make_optimizers(model, CFG, torch.device("cpu"), torch.bfloat16)[1].dtype is torch.bfloat16
    adamw, muon = make_optimizers(model, CFG, torch.device("cpu"), torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    mine = [names[p] for group in muon.param_groups for p in group["params"]]
    kinds = ("qkv", "attn_out", "mlp_in", "mlp_out")
    assert sorted(mine) == sorted(f"blocks.{i}.{kind}.weight" for i in range(2) for kind in kinds)
    assert [group["weight_decay"] for group in muon.param_groups if group["params"]] == [CFG.weight_decay] != [0]
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(mine + rest) == sorted(names.values()) and states([adamw, muon]).keys() == names.keys()
    for name in ("sm3", "sm3_nesterov"):
        cfg = replace(CFG, optimizer=name, beta1=0.7)
        [sm3] = make_optimizers(model, cfg, torch.device("cpu"), torch.float32)
        assert (sm3.defaults["momentum"], sm3.defaults["nesterov"]) == (0.7, name == "sm3_nesterov")


# ---- SM3 -------------------------------------------------------------------------------------------------------------


def literal_sm3(start, gradients, lr, beta, nesterov, decay):
    """Algorithm SM3-II of arXiv 1901.11150, entry by entry, with momentum; its sets are all rows, columns and so on."""
    start, gradients = (start[None], [g[None] for g in gradients]) if start.dim() == 0 else (start, gradients)
    w, m = start.clone(), torch.zeros_like(start)
    mu = [[0.0] * n for n in start.shape]
    for g in gradients:
        nu = torch.zeros_like(w)
        new = [[0.0] * n for n in start.shape]
        for i in itertools.product(*map(range, start.shape)):
            nu[i] = min(mu[r][i[r]] for r in range(w.dim())) + g[i] ** 2
            for r in range(w.dim()):
                new[r][i[r]] = max(new[r][i[r]], nu[i].item())
        mu = new
        u = torch.where(nu > 0, g / nu.clamp(min=1e-30).sqrt(), 0)
        m = beta * m + (u if nesterov else (1 - beta) * u)
        w = (1 - lr * decay) * w - lr * (beta * m + u if nesterov else m)
    return w


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_sm3_is_the_papers(shape, nesterov):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    start, gradients = p.detach().clone(), [torch.randn(shape).double() for _ in range(6)]
    if shape:
        gradients[2][0] = 0
    optimizer = SM3([p], 0.1, momentum=0.9, weight_decay=0.2, nesterov=nesterov)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step_unless(GOOD)
    expected = literal_sm3(start, gradients, 0.1, 0.9, nesterov, 0.2).view(shape)
    torch.testing.assert_close(p.detach(), expected, atol=1e-6, rtol=1e-6)


def test_sm3_takes_half_the_memory():
    """The state is the momentum and a number for each row and column; AdamW has two numbers for each weight."""
    cfg = replace(CFG, optimizer="sm3")
    model = cfg.make_model(27)
    bytes_ = costs.numbers_kept(model, cfg)
    assert bytes_ == sum(p.numel() + sum(p.shape) for p in model.parameters())  # in numbers
    adamw = replace(CFG, optimizer="adamw")
    assert costs.numbers_kept(model, adamw) == 2 * costs.count_parameters(model)
    for optimizer, config in ((make_optimizers(model, c, torch.device("cpu"), torch.float32)[0], c)
                              for c in (cfg, adamw)):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step_unless(GOOD)
        kept = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.dim())
        assert kept == costs.numbers_kept(model, config)


# ---- clipping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["agc:0.05", "agc_tensor:0.05"])
def test_adaptive_clipping(clip):
    """Against the rule written out row by row, for all parameters but the output layer."""
    cfg = replace(CFG, optimizer="adamw", clip=clip, head_bias=True)
    model = cfg.make_model(27)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * torch.rand(p.shape[:1]).view(-1, *[1] * (p.dim() - 1)))
    model.blocks[0].qkv.weight.data[1] = 0  # a unit of weights 0 counts as one of norm 0.001
    for p in model.parameters():
        scales = 10 ** (torch.rand(()) * 4 - 4 + torch.rand(p.shape[:1]) * 2)
        p.grad = torch.randn_like(p) * scales.view(-1, *[1] * (p.dim() - 1))
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    total = clip_gradients(model, cfg)
    assert total.item() == pytest.approx(math.sqrt(sum((g ** 2).sum().item() for g in before.values())), rel=1e-5)
    clipped = kept = 0
    for name, p in model.named_parameters():
        if name in ("embed.weight", "head_bias"):
            assert torch.equal(p.grad, before[name])
            continue
        rows = range(len(p)) if clip.startswith("agc:") and p.dim() > 1 else [slice(None)]
        for row in rows:
            g, most = before[name][row], 0.05 * max(p.detach()[row].norm().item(), 1e-3)
            expected = g * most / g.norm() if g.norm() > most else g
            torch.testing.assert_close(p.grad[row], expected)
            clipped, kept = clipped + (g.norm() > most).item(), kept + (g.norm() <= most).item()
    assert clipped > 5 and kept > 5


def test_settings_of_clipping():
    for wrong in ("agc", "agc:0", "agc:-1", "agc:x", "agc:inf", "agc:nan", "unit:0.1", "norm:1"):
        with pytest.raises(UserError, match="clip="):
            replace(CFG, clip=wrong)
    for more in ({"optimizer": "sm3"}, {"optimizer": "adamw", "clip": "agc:0.01"}):
        with pytest.raises(UserError, match="--fsdp splits them"):
            replace(CFG, fsdp=True, **more)


@pytest.mark.parametrize("flags", [["--optimizer=sm3", "--clip=agc:0.01"],
                                   ["--optimizer=sm3_nesterov", "--clip=agc_tensor:0.003"]])
def test_sm3_and_agc_resume_to_the_bit(flags, call, data_dir, tmp_path, monkeypatch):
    flags = [*flags, "--lr=3e-3", "--max_steps=8"]
    one, _ = assert_resumes_exactly(call, monkeypatch, "mdlm_text8", data_dir, tmp_path, flags)
    assert losses(one)[-1] < losses(one)[0]
    result = train(call, "mdlm_text8", data_dir, one, "--lr=3e-3", "--max_steps=8", "--resume=auto", "--optimizer=sm3")
    assert_one_line(result, "of another run", "clip")
