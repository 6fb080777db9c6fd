"""The reverse process: samplers, as functions of a denoiser callable `model(xt, t, where) -> logits`."""

import torch


def categorical(logits, generator):
    """Draw from softmax(logits): (N, V) -> (N,) long, by inverting the cumulative distribution in float64.

    float32 Gumbel noise lives on a grid of 2^-24 and cuts off the tail, which silently lowers the temperature
    (arXiv 2409.02908); float64 does not. Where there is no float64 (mps), the CPU draws.
    """
    device = generator.device
    cumulative = logits.to(device).double().softmax(-1).cumsum(-1)
    u = torch.rand(len(logits), 1, dtype=torch.float64, device=device, generator=generator)
    drawn = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(-1)
    return drawn.clamp(max=logits.shape[1] - 1).to(logits.device)  # u * total may round up to the total


@torch.no_grad()
def ancestral(model, xt, mask_id, schedule, steps, generator, temperature=1.0):
    """The reverse chain on the grid 1, (n-1)/n, ..., 1/n, 0 with n = steps (D3PM, eq. 4; MDLM, eq. 6), as an iterator.

    Starts from xt (B, L) at t = 1: masks, and tokens that are given. Yields the state after each step, which is a new
    tensor wherever it changed. From t to s < t each mask is revealed with probability
    (alpha_s - alpha_t)/(1 - alpha_t), whatever the network says; only then is a token drawn, from the network's
    prediction at t. So the network runs for the sequences that reveal something, its head at the positions that do, and
    on many steps not at all: the law is that of a draw from the posterior over all V + 1 states. At s = 0 everything is
    revealed, and a revealed token never changes.

    temperature divides the logits; other than 1, the law is no longer the model's.
    """
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha = schedule.alpha(grid)
    for i in range(steps):
        reveal_probability = ((alpha[i + 1] - alpha[i]) / (1 - alpha[i])).item()
        u = torch.rand(xt.shape, dtype=torch.float64, device=generator.device, generator=generator)
        reveal = (xt == mask_id) & (u < reveal_probability).to(xt.device)
        rows = reveal.any(1)
        if rows.any():
            t = torch.full((int(rows.sum()),), grid[i].item(), device=xt.device)
            drawn = categorical(model(xt[rows], t, where=reveal[rows]).float() / temperature, generator)
            xt = xt.masked_scatter(reveal, drawn)
        yield xt
