"""Muon: steps of momentum whose singular values are all made equal (Keller Jordan et al., 2024, "Muon").

Gradients of weight matrices have a few large singular values and many small ones; so have AdamW's steps. Muon replaces
the momentum U S V^T by U V^T, so that every direction learns at the same speed. It is for the matrices inside the
blocks; embeddings, head, time conditioning and vectors stay with AdamW.

torch.optim.Muon does the same, but always in bfloat16, which is a hundred times slower on CPUs that emulate it, and
one matrix at a time. Here matrices of one shape go together.
"""

import torch


def orthogonalise(g, steps=5):
    """U V^T of g = U S V^T, roughly, for matrices g (..., m, n): the singular values end between 0.7 and 1.2.

    Newton-Schulz: each step maps every singular value s, at most 1 at first, to a s + b s^3 + c s^5. The coefficients
    are Jordan's: they raise small values fastest, and do not quite converge.
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
    learning rate and weight decay (Moonlight, arXiv 2502.16982, eq. 4). As torch's fused optimisers, it does nothing
    where the attribute found_inf is 1, without waiting for the GPU.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                self.step_together([p for p in group["params"] if p.shape == shape], group)

    def step_together(self, params, group):
        """params: of one shape."""
        lr, momentum, weight_decay = group["lr"], group["momentum"], group["weight_decay"]
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum"] for p in params]
        good = 1 - getattr(self, "found_inf", torch.zeros((), device=params[0].device))
        # Where a step is bad, its gradient is replaced: the average of the momentum and itself is itself.
        grads = [p.grad.where(good > 0, buffer) for p, buffer in zip(params, buffers)]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, buffers, momentum)
        steps = orthogonalise(torch.stack(ahead).to(self.dtype)).to(ahead[0].dtype) * good
        torch._foreach_mul_(params, 1 - lr * weight_decay * good)
        torch._foreach_add_(params, list(steps), alpha=-lr * 0.2 * max(params[0].shape) ** 0.5)
