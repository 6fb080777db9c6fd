"""Optimisation: AdamW, Muon, SM3, the learning rate, clipping, and the moving average of the weights.

Muon is by Keller Jordan et al., 2024 (see also Moonlight, arXiv 2502.16982). Gradients of weight matrices have a few
large singular values and many small ones, and so have AdamW's steps. Muon replaces the momentum U S V^T by U V^T, so
that every direction learns at the same speed. It updates the matrices inside the blocks. AdamW updates embeddings,
head, time conditioning and vectors. torch.optim.Muon has the same momentum, scale and iterations. But it divides by the
Frobenius norm first, takes one matrix at a time, and computes in bfloat16, which is a hundred times slower on CPUs that
emulate it. Muon here computes in the dtype of the run's matrix products, treats all matrices of one shape together,
needs a quarter fewer operations for the four matrices of a layer, and shares the matrices out among the processes of a
run, also with FSDP.
"""

import contextlib
import functools
import math

import torch

import parallel


def learning_rate(step, cfg):
    """Learning rate of a step: linear warm-up to lr, then a cosine or linear decay to min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    left = 1 - done if cfg.lr_decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * left


def set_learning_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def clip_gradients(model, cfg):
    """Clip the gradients of a model in place, as cfg.clip says. Returns the norm of all gradients before clipping.

    norm: all gradients are scaled down together if their norm exceeds grad_clip (0: never).
    agc:X: adaptive clipping by unit (arXiv 2102.06171, eq. 3): g <- g min(1, X max(|w|, 0.001)/|g|). A unit is w[i],
        the part of a tensor with one first index, such as the weights of one output. A vector is one unit.
    agc_tensor:X: the same rule with whole tensors as units.
    Both leave out the output layer, as the paper does, and so the embeddings if they are its weights.
    """
    kind, limit = parse_clip(cfg.clip)
    most = (cfg.grad_clip or math.inf) if kind == "norm" else math.inf
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    if kind != "norm":
        last = {id(p) for p in model.output_layer()}
        for p in model.parameters():
            if id(p) not in last and p.grad is not None:
                clip_adaptively(p, limit, by_unit=kind == "agc")
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP


@torch.no_grad()
def clip_adaptively(p, limit, by_unit):
    """Clip the gradient of a parameter by the rule of agc (by_unit) or agc_tensor."""
    dims = tuple(range(1, p.dim())) if by_unit and p.dim() > 1 else None  # all but the first; None: all
    norm = lambda x: torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    allowed = limit * norm(p).clamp(min=1e-3)
    p.grad.mul_((allowed / norm(p.grad).clamp(min=1e-6)).clamp(max=1))


def parse_clip(text):
    """Config.clip as (kind, limit). Raises ValueError if it is neither norm nor like agc:0.01 or agc_tensor:0.003."""
    kind, _, limit = text.partition(":")
    if text == "norm":
        return "norm", None
    if kind not in ("agc", "agc_tensor") or not 0 < float(limit) < math.inf:
        raise ValueError(text)
    return kind, float(limit)


# ---- optimisers ------------------------------------------------------------------------------------------------------


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which can skip a step without waiting for the device.

    Every optimiser here has state_shapes, flops, from_config and step_unless.
    """

    @classmethod
    def from_config(cls, groups, cfg, device, dtype):
        """The optimiser of a run. groups: of parameters, as torch's optimisers take them. dtype: of matrix products."""
        return cls(groups, cfg.lr, (cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu"))

    @staticmethod
    def state_shapes(shape):
        """The state of a parameter of this shape: {name: shape}."""
        return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}

    @staticmethod
    def flops(shape):
        """Operations of a step of a parameter of this shape: 0, since they are negligible beside the network's."""
        return 0

    def step_unless(self, bad):
        """Take a step, unless bad, a bool tensor on the device, is True."""
        if self.defaults["fused"]:
            self.found_inf = bad.float()  # 1: no step, decided on the device, as torch.amp.GradScaler does
            self.step()
        elif not bad:
            self.step()


COEFFICIENTS = 3.4445, -4.7750, 2.0315  # Keller Jordan's a, b, c: a v + b v^3 + c v^5 is steep at 0, flat around 1


def orthogonalise(g):
    """Approximate U V^T of g = U S V^T, for matrices g (N, m, n).

    An iteration of Newton-Schulz, x <- p x with s = x x^T and p = a I + b s + c s^2, maps every singular value v of x
    to a v + b v^3 + c v^5. Five of them map values from 0.005 to 1 into [0.68, 1.16], and tiny ones to 485 v.

    First x is divided by (sum of v^8)^(1/8) = |s^2|^(1/4), which is at least the largest v, and closer to it than the
    Frobenius norm (sum of v^2)^(1/2). (Before this, s is divided by its largest entry, because v^8 would leave the
    range of float32.)
    """
    x = g.mT if g.shape[-2] > g.shape[-1] else g  # so that s is the smaller square
    s = x @ x.mT
    scale = s.abs().amax(dim=(-2, -1), keepdim=True).clamp(min=1e-14)
    s = s / scale
    square = s @ s
    largest = square.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-12) ** 0.5  # at least the largest v^2
    x = product(s / largest, square / largest**2, 2) / (scale * largest) ** 0.5 @ x
    s = x @ x.mT  # computed anew: rounding errors in s grow with every iteration, and would drown its small eigenvalues
    x = product(s, s @ s, 3) @ x
    return x.mT if g.shape[-2] > g.shape[-1] else x


def product(s, square, n):
    """Return q = p_n ... p_1, the product of the matrices of n iterations, from s = x x^T and its square, (N, m, m).

    x <- p x makes s <- p s p. So x itself, which may be much wider than s, is not needed during the n iterations.
    With r = b s + c s^2, p y is a y + r y, and y p is a y + y r: one call each, rounded once."""
    a, b, c = COEFFICIENTS
    r = b * s + c * square
    q = r + a * torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    for _ in range(n - 1):
        half = torch.baddbmm(s, r, s, beta=a)            # p s
        s = torch.baddbmm(half, half, r, beta=a)         # p s p
        r = torch.baddbmm(s, s, s, beta=b, alpha=c)
        q = torch.baddbmm(q, r, q, beta=a)               # p q
    return q


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised in `dtype`, with decoupled weight decay. params: matrices.

    A step of an m x n matrix is scaled by 0.2 sqrt(max(m, n)), to the size of AdamW's steps. So both optimisers can use
    the same learning rate and weight decay (Moonlight, arXiv 2502.16982, eq. 4).

    compiled: compile the functions that a step consists of, which then read and write each number less often.
    """

    @classmethod
    def from_config(cls, groups, cfg, device, dtype):
        return cls(groups, cfg.lr, dtype=dtype, compiled=parallel.compiles(cfg, device))

    @staticmethod
    def state_shapes(shape):
        return {"momentum": shape}

    @staticmethod
    def flops(shape):
        """Operations of orthogonalise for an m x n matrix."""
        m, n = sorted(shape)
        return 8 * m * m * n + 28 * m**3

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32, compiled=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        self.directions, self.orthogonalise, self.add = (
            torch.compile(function, dynamic=False) if compiled else function
            for function in (directions, orthogonalise, add))

    @torch.no_grad()
    def step_unless(self, bad):
        """Take a step, unless bad, a bool tensor on the device, is True: then nothing changes."""
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                self.step_together([p for p in group["params"] if p.shape == shape], group, ~bad)

    def step_together(self, params, group, good):
        """Step all of params, N matrices of one shape, at once.

        With FSDP a process has some rows of each matrix: all_rows collects whole ones, and own_rows picks its rows of
        the results. shared_out lets each process orthogonalise some of the N matrices, and gives all the results to
        all processes. With one process only self.orthogonalise is called.
        """
        like = params[0]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        x = self.directions(parallel.local([p.grad for p in params]),
                            parallel.local([self.state[p]["momentum"] for p in params]), good, group["momentum"],
                            self.dtype)
        steps = parallel.own_rows(parallel.shared_out(self.orthogonalise, parallel.all_rows(x, like)), like)
        rate = group["lr"] * good
        self.add(parallel.local(params), steps, -0.2 * max(like.shape) ** 0.5 * rate, 1 - group["weight_decay"] * rate)


def directions(grads, momenta, good, momentum, dtype):
    """Update the momenta, and return Nesterov's directions as one tensor (N, m, n)."""
    # In a bad step the momentum stands for the gradient: the average of the momentum with itself is unchanged.
    grads = [grad.where(good, m) for grad, m in zip(grads, momenta)]
    torch._foreach_lerp_(momenta, grads, 1 - momentum)
    return torch.stack(torch._foreach_lerp(grads, momenta, momentum)).to(dtype)


def add(params, steps, scale, decay):
    """Set params to decay params + scale steps, with steps (N, m, n), and tensors for scale and decay."""
    torch._foreach_mul_(params, decay)
    torch._foreach_add_(params, list(steps.to(params[0].dtype) * scale))


class SM3(torch.optim.Optimizer):
    """SM3-II with momentum (arXiv 1901.11150): AdaGrad with one number for each row and each column of a matrix.

    Every row and every column r keeps one number, mu_r. For entry i of the gradient g, in one step:

        nu_i = g_i^2 + min of mu_r over the r with i,     u_i = g_i / sqrt(nu_i),     mu_r = max of nu_i over i in r.

    AdaGrad divides by the root of the sum of the squares of all g_i so far; nu_i is never less than this sum. A vector
    has a number for each entry: that is AdaGrad itself. So the state is the momentum and, of an m x n matrix, m + n
    numbers.

    nesterov=False: m = beta m + (1 - beta) u, and the step is m, as in the authors' code.
    nesterov=True: m = beta m + u, and the step is beta m + u. Steps are 1/(1 - beta) times as long.
    Weight decay is decoupled, as AdamW's.
    """

    @classmethod
    def from_config(cls, groups, cfg, device, dtype):
        return cls(groups, cfg.lr, cfg.beta1, nesterov=cfg.optimizer == "sm3_nesterov")

    @staticmethod
    def state_shapes(shape):
        return {"momentum": shape} | {f"max_{i}": tuple(n if i == j else 1 for j, n in enumerate(shape))
                                      for i in range(max(1, len(shape)))}

    @staticmethod
    def flops(shape):
        return 0

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, nesterov=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov))

    @torch.no_grad()
    def step_unless(self, bad):
        """Take a step, unless bad, a bool tensor on the device, is True: then nothing changes."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.step_one(p, group, ~bad)

    def step_one(self, p, group, good):
        state, lr, beta = self.state[p], group["lr"], group["momentum"]
        if not state:
            for key, shape in self.state_shapes(p.shape).items():
                state[key] = torch.zeros(shape, device=p.device)
        g = p.grad.where(good, 0)
        maxima = [state[f"max_{i}"] for i in range(max(1, p.dim()))]  # of a matrix mu of the rows, and of the columns
        nu = functools.reduce(torch.minimum, maxima) + g * g
        for i, mu in enumerate(maxima):
            others = [j for j in range(p.dim()) if j != i]
            mu.copy_((nu.amax(others, keepdim=True) if others else nu).where(good, mu))
        u = g * nu.clamp(min=1e-30).rsqrt()
        m = state["momentum"]
        new = beta * m + (u if group["nesterov"] else (1 - beta) * u)
        step = (beta * new + u if group["nesterov"] else new).where(good, 0)
        m.copy_(new.where(good, m))
        p.mul_(1 - lr * group["weight_decay"] * good).sub_(step, alpha=lr)


OPTIMIZERS = {"adamw": AdamW, "muon": Muon, "sm3": SM3, "sm3_nesterov": SM3}
TAKE_SHARES = (AdamW, Muon)  # these can step the shares of tensors that --fsdp leaves to a process


def shares(model, cfg):
    """Return [(optimiser class, its parameters)], each parameter of the model once. Muon has the blocks' matrices."""
    if OPTIMIZERS[cfg.optimizer] is not Muon:
        return [(OPTIMIZERS[cfg.optimizer], list(model.parameters()))]
    matrices = model.matrices()
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [(AdamW, rest), (Muon, matrices)] if matrices else [(AdamW, rest)]


def make_optimizers(model, cfg, device, dtype):
    """Return the optimisers of a run. Tensors of two or more dimensions have weight decay."""
    def groups(parameters):
        return [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": cfg.weight_decay},
                {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]

    return [kind.from_config(groups(parameters), cfg, device, dtype) for kind, parameters in shares(model, cfg)]


# ---- the moving average ----------------------------------------------------------------------------------------------


class EMA:
    """Exponential moving average of a model's weights with warm-up: step n has decay min(decay, (1+n)/(10+n)).

    of: the weights to average, if not the model's own (local_sgd.py averages its anchor)."""

    def __init__(self, model, decay, of=None):
        self.model, self.decay, self.updates = model, decay, 0
        self.average = [p.detach().clone() for p in model.parameters()]
        # The part that this process holds: a share with FSDP, else all.
        self.local_weights, self.local_average = parallel.local(model.parameters()), parallel.local(self.average)
        self.of = of or self.local_weights

    def update(self, steps=1):
        """Update after some steps: average <- d^steps average + (1 - d^steps) weights, with d the last step's decay."""
        self.updates += steps
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) ** steps
        torch._foreach_lerp_(self.local_average, self.of, 1 - decay)

    def swap(self):
        """Exchange the model's weights and the average, one tensor after the other, so that no third copy is needed."""
        for weight, average in zip(self.local_weights, self.local_average):
            raw = weight.clone()
            weight.copy_(average)
            average.copy_(raw)

    @contextlib.contextmanager
    def applied(self):
        """Put the model into eval mode with the average as its weights, within the context."""
        self.swap()
        self.model.eval()
        try:
            yield
        finally:
            self.swap()
            self.model.train()
