"""A direct implementation of D3PM from the paper: correct and slow. It is the place to begin reading.

Every step builds the true and the learned posterior over all V + 1 states of all tokens, (B, L, V + 1), in float32.
docs/maths.md, section 4, shows why diffusion.py needs none of them. bench.py compares the speed of the two.
"""

import torch
import torch.nn.functional as F


def posterior(xt, p_x0, a, a_before, mask_id):
    """q(x_{s-1} | x_s, x_0), normalised, (B, L, V + 1), for x_0 given by its probabilities p_x0 (B, L, V + 1).

    D3PM, arXiv 2107.03006, eq. 3: q(x_s | x_{s-1}) q(x_{s-1} | x_0) divided by its sum over x_{s-1}. a, a_before (B,):
    the probability that a token is visible at step s and at step s - 1. p_x0 must be positive at visible tokens.
    """
    n_states = mask_id + 1
    is_mask = F.one_hot(torch.tensor(mask_id, device=xt.device), n_states).float()
    a_before, kappa = a_before[:, None, None], (a / a_before)[:, None, None]  # kappa: survives step s
    # q(x_s = xt | x_{s-1}), for each of the states of x_{s-1}. A mask stays a mask: its probability is 1.
    forward = torch.where(xt[..., None] == mask_id, 1 - kappa + kappa * is_mask, kappa * F.one_hot(xt, n_states))
    before = a_before * p_x0 + (1 - a_before) * is_mask  # q(x_{s-1} | x_0)
    product = forward * before
    return product / product.sum(-1, keepdim=True)


def loss(model, x0, noise, T, mask_id):
    """KL(q || p) of one random step, nats per token (arXiv 2107.03006, eq. 1). x0 (B, L), noise: from D3PM.noise.

    It equals D3PM.loss of diffusion.py with the linear schedule and without the auxiliary term.
    """
    s = (noise.t * T).round()
    a, a_before = 1 - s / T, 1 - (s - 1) / T
    xt = torch.where(noise.mask, mask_id, x0)
    p_x0 = F.pad(model(xt, noise.t).softmax(-1), (0, 1))  # the mask, the last state, is never predicted
    true = posterior(xt, F.one_hot(x0, mask_id + 1).float(), a, a_before, mask_id)
    learned = posterior(xt, p_x0, a, a_before, mask_id)
    tiny = torch.finfo(torch.float32).tiny  # 0 log 0 = 0
    return (true * (true.clamp(min=tiny).log() - learned.clamp(min=tiny).log())).sum(-1).mean()


def train_step(model, parts, T, mask_id, optimizer, grad_clip):
    """Take one training step as tutorials do. parts: (x0, noise) of each micro-batch."""
    for x0, noise in parts:
        (loss(model, x0, noise, T, mask_id) / len(parts)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def sample(objective, model, xt, generator, T=1000):
    """Sample by the reverse chain: T steps, each with logits and the posterior at all positions, and a draw from it.

    Unlike the samplers of sampling.py, it yields only xt (B, L).
    """
    for s in range(T, 0, -1):
        t = torch.full((len(xt),), s / T, device=xt.device)
        p_x0 = F.pad(model(xt, t).float().softmax(-1), (0, 1))
        p = posterior(xt, p_x0, 1 - t, 1 - t + 1 / T, objective.mask_id)
        xt = torch.multinomial(p.flatten(0, 1), 1, generator=generator).view(xt.shape)
        yield xt
