"""Optimisation: AdamW, Muon, the learning rate, clipping, and the moving average of the weights.

The loop in train.py uses three things of an optimiser: `step_unless(bad)`, `zero_grad()` and `param_groups`. A new one is
a class like Muon, named in `KINDS` and `shares`; a new rule of clipping is a line in `clip_gradients`.

Muon (Keller Jordan et al., 2024; Moonlight, arXiv 2502.16982). Gradients of weight matrices have a few large singular
values and many small ones, and so have AdamW's steps. Muon replaces the momentum U S V^T by U V^T, so that every
direction learns at the same speed. It is for the matrices inside the blocks; embeddings, head, time conditioning and
vectors stay with AdamW. torch.optim.Muon does the same, but always in bfloat16, which is a hundred times slower on CPUs
that emulate it, and one matrix at a time. Here it is in the dtype of the run's matrix products, and matrices of one
shape go together.
"""

import contextlib
import math

import torch

import parallel


def learning_rate(step, cfg):
    """Linear warm-up to lr, then a cosine or a line that reaches min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def clip_gradients(parameters, cfg):
    """Scale all gradients down together if their norm is above grad_clip (0: never). Returns the norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP


# ---- optimisers ------------------------------------------------------------------------------------------------------


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which can leave out a step without waiting for the device to say so."""

    keys = {"step", "exp_avg", "exp_avg_sq"}  # of its state, for each parameter

    @staticmethod
    def numbers_kept(shape):
        """How many numbers of state a parameter of this shape has."""
        return 2 * math.prod(shape)

    @staticmethod
    def flops(shape):
        """Operations of a step of a parameter of this shape, where they count beside the network's."""
        return 0

    def step_unless(self, bad):
        """Take a step, unless bad, a bool tensor on the device, is True."""
        if self.defaults["fused"]:
            self.found_inf = bad.float()  # has it do nothing, decided on the device, as torch.amp.GradScaler does
            self.step()
        elif not bad:
            self.step()


def orthogonalise(g, steps=5):
    """U V^T of g = U S V^T, roughly, for matrices g (..., m, n).

    Newton-Schulz: x <- a x + b (x x^T) x + c (x x^T)^2 x maps every singular value s of x to a s + b s^3 + c s^5. The
    coefficients are Jordan's. They raise small values fastest and do not quite converge: five iterations bring all
    values in [0.01, 1] to between 0.68 and 1.14.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.mT if g.shape[-2] > g.shape[-1] else g  # so that x x^T is the smaller square
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum (Nesterov's), orthogonalised in `dtype`, with decoupled weight decay. params: matrices.

    A step of an m x n matrix is scaled by 0.2 sqrt(max(m, n)), to the size of AdamW's, so that both take the same
    learning rate and weight decay (Moonlight, arXiv 2502.16982, eq. 4).
    """

    keys = {"momentum"}

    @staticmethod
    def numbers_kept(shape):
        return math.prod(shape)

    @staticmethod
    def flops(shape):
        """Operations of a step of an m x n matrix, m <= n: five iterations of three products."""
        m, n = sorted(shape)
        return 5 * (4 * m * m * n + 2 * m**3)

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    def step_unless(self, bad):
        """Take a step, unless bad, a bool tensor on the device, is True."""
        self.step(good=1 - bad.float())

    @torch.no_grad()
    def step(self, good=1.0):
        """good: 1, or a tensor of 0 or 1; with 0 nothing changes, decided on the device."""
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                self.step_together([p for p in group["params"] if p.shape == shape], group, torch.as_tensor(good))

    def step_together(self, params, group, good):
        """params: of one shape."""
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        good = good.to(params[0].device)
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        # Where a step is bad, its gradient is replaced: the average of the momentum and itself is itself.
        grads = [p.grad.where(good > 0, buffer) for p, buffer in zip(params, buffers)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        steps = orthogonalise(torch.stack(ahead).to(self.dtype)).to(ahead[0].dtype) * good
        torch._foreach_mul_(params, 1 - lr * weight_decay * good)
        torch._foreach_add_(params, list(steps), alpha=-lr * 0.2 * max(params[0].shape) ** 0.5)


KINDS = AdamW, Muon


def shares(model, cfg):
    """[(optimiser class, its parameters)]: every parameter of the model once. Muon has the matrices of the blocks."""
    matrices = model.matrices() if cfg.optimizer == "muon" else []
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [(AdamW, rest), (Muon, matrices)] if matrices else [(AdamW, rest)]


def make_optimizers(model, cfg, device, dtype):
    """The optimisers of a run. Weight decay on matrices and embeddings only."""
    optimizers = []
    for kind, parameters in shares(model, cfg):
        if kind is Muon:
            optimizers.append(Muon(parameters, cfg.lr, weight_decay=cfg.weight_decay, dtype=dtype))
            continue
        groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
                  {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
        optimizers.append(AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu")))
    return optimizers


# ---- the moving average ----------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a model's weights, with warm-up: the decay of update n is at most (1+n)/(10+n)."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = model, decay, 0
        self.average = [p.detach().clone() for p in model.parameters()]
        # What this process holds of them: with FSDP a share, else all.
        self.weights, self.averages = parallel.local(model.parameters()), parallel.local(self.average)

    def update(self):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.weights, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Within the context the model is in eval mode and has the average as its weights."""
        raw = [weight.clone() for weight in self.weights]
        torch._foreach_copy_(self.weights, self.averages)
        self.model.eval()
        try:
            yield
        finally:
            torch._foreach_copy_(self.weights, raw)
            self.model.train()
