"""A direct implementation of D3PM from the paper: correct and slow. It is the place to begin reading.

    python studies/textbook.py      # trains a tiny network on README.md for a minute, and samples from it

Every step builds the true and the learned posterior over all V + 1 states of all tokens, (B, L, V + 1), in float32.
docs/maths.md, section 4, shows why diffusion.py needs none of them. bench.py compares the speed of the two.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, run

import torch
import torch.nn.functional as F

from configs import Config

MASK = "░"  # the picture of a masked token


def forward_process(x0, T):
    """Draw the noise of texts x0 (B, L): a step s of each text from 1 ... T, and masks with probability s/T each.

    Returns `t` = s/T (B,) and `mask` (B, L) bool, as D3PM.noise of diffusion.py does.
    """
    t = torch.randint(1, T + 1, (len(x0),)) / T
    return SimpleNamespace(t=t, mask=torch.rand(x0.shape) < t[:, None])


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
    """KL(q || p) of one random step, nats per token (arXiv 2107.03006, eq. 1). x0 (B, L), noise: from forward_process.

    T times this is an estimate of the bound on -log p(x0). It equals D3PM.loss of diffusion.py with the linear schedule
    and without the auxiliary term.
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
    """Take one training step as tutorials do. parts: (x0, noise) of each micro-batch. Returns the loss."""
    total = 0.0
    for x0, noise in parts:
        part = loss(model, x0, noise, T, mask_id) / len(parts)
        part.backward()
        total += part.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return total


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


def main(T=100, L=64, steps=1000):
    ArgumentParser(description=__doc__).parse_args()
    text = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    text = text.replace(MASK, "")  # README.md shows masks, too: as a letter, the network would learn to write them
    letters = sorted(set(text))
    tokens, mask_id = torch.tensor([letters.index(letter) for letter in text]), len(letters)
    torch.manual_seed(0)
    model = Config(n_layer=2, n_head=4, n_embd=128, seq_len=L, T=T, shift_tokens=True).make_model(mask_id)
    optimizer, total = torch.optim.AdamW(model.parameters(), 3e-3), 0.0
    for step in range(1, steps + 1):
        x0 = tokens[torch.randint(len(tokens) - L, (32, 1)) + torch.arange(L)]
        total += train_step(model, [(x0, forward_process(x0, T))], T, mask_id, optimizer, grad_clip=1.0).item()
        if step % 100 == 0:
            print(f"step {step}: the bound of the last 100 is {T * total / 100:.2f} nats per letter", flush=True)
            total = 0.0
    xt = torch.full((1, L), mask_id)
    for step, xt in enumerate(sample(SimpleNamespace(mask_id=mask_id), model, xt, torch.Generator(), T), 1):
        if step % 20 == 0:
            print(f"{T - step:3} steps left: {''.join((letters + [MASK])[i] for i in xt[0])!r}")


if __name__ == "__main__":
    run(main)
