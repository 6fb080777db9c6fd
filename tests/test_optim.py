"""Muon: orthogonal steps, against linear algebra and against torch's own."""

import math

import pytest
import torch

from cli import UserError
from configs import Config, replace
from optim import Muon, make_optimizers, orthogonalise
from train import states

CFG = Config(n_layer=2, n_head=2, n_embd=16, n_cond=8, seq_len=8, optimizer="muon", lr=0.01)


@pytest.mark.parametrize("shape", [(16, 16), (16, 64), (64, 16), (3, 16, 40)])
def test_orthogonalise(shape):
    """The singular vectors stay, and the singular values, from 1 to 1/300 of the largest, end between 0.6 and 1.25."""
    n = min(shape[-2:])
    u, v = torch.linalg.qr(torch.randn(*shape[:-1], n))[0], torch.linalg.qr(torch.randn(*shape[:-2], shape[-1], n))[0]
    s = torch.logspace(0, -math.log10(300), n)
    inner = u.mT @ orthogonalise(10 * u * s @ v.mT) @ v
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.6 and values.max() < 1.25
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert orthogonalise(torch.zeros(shape)).abs().max() == 0


def test_is_torchs():
    """Ten steps from random gradients are torch.optim.Muon's, but for its bfloat16; shapes are mixed on purpose."""
    torch.manual_seed(0)
    shapes = [(16, 16), (48, 16), (16, 64), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    settings = dict(lr=0.01, weight_decay=0.1)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, old in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (p - old).norm()


def test_precision():
    """In bfloat16 a step is the same but for its rounding."""
    steps = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(16, 64))
        p.grad = torch.randn(p.shape)
        Muon([p], lr=0.1, dtype=dtype).step()
        steps.append(p.detach())
    assert steps[1].dtype == torch.float32 and 1e-4 < (steps[0] - steps[1]).norm() / steps[0].norm() < 0.08


def test_a_bad_step_does_nothing():
    """With a gradient of nans, neither weights nor momentum move; a good step moves both."""
    p = torch.nn.Parameter(torch.randn(4, 8))
    optimizer = Muon([p], lr=0.1, weight_decay=0.1)
    for bad in (True, False, True):
        before = p.detach().clone(), optimizer.state[p].get("momentum", torch.zeros(4, 8)).clone()
        p.grad = torch.full_like(p, math.nan) if bad else torch.randn_like(p)
        optimizer.step_unless(torch.tensor(bad))
        same = [torch.equal(a, b) for a, b in zip(before, (p.detach(), optimizer.state[p]["momentum"]))]
        assert same == [bool(bad)] * 2


def test_who_steps_what():
    """Muon has the four matrices of each block, AdamW all else, and together they have every parameter once."""
    model = CFG.make_model(5)
    adamw, muon = make_optimizers(model, CFG, torch.device("cpu"), torch.float32)
    names = {p: name for name, p in model.named_parameters()}
    mine = [names[p] for group in muon.param_groups for p in group["params"]]
    kinds = ("qkv", "attn_out", "mlp_in", "mlp_out")
    assert sorted(mine) == sorted(f"blocks.{i}.{kind}.weight" for i in range(2) for kind in kinds)
    assert [group["weight_decay"] for group in muon.param_groups] == [CFG.weight_decay] != [0]
    rest = [names[p] for group in adamw.param_groups for p in group["params"]]
    assert sorted(mine + rest) == sorted(names.values()) and states([adamw, muon]).keys() == names.keys()


def test_where_it_does_not_go():
    """FSDP shares matrices out, and Muon needs whole ones."""
    with pytest.raises(UserError, match="optimizer=muon needs whole matrices"):
        replace(CFG, fsdp=True)
