"""Likelihoods of text: bounds with small standard errors, and exact likelihoods by the chain rule along an order.

All values are in nats. Each window has a value of its own. So a standard error over windows covers both the noise of
the estimate and the choice of text, and two models can be compared on the same windows and masks.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from categorical import inverse_cdf
from cli import autocast, progress
from data.loader import gather
from randomness import give_prefix, prefix_lengths, repeated_uniforms, strata

ORDERS = ("l2r", "random", "confidence")


def mean_and_error(values, by_stratum=None):
    """Mean of n values (n,) and its standard error (nan if n = 1).

    by_stratum: a permutation that sorts the values by stratum, if one value was drawn from each stratum. Then a trend
    over the strata adds nothing to the variance of the mean, but the formula for independent values counts it as noise.
    So this case uses pairs of neighbours: their squared difference estimates the sum of their two variances (collapsed
    strata: Cochran, Sampling Techniques, 1977, section 5A.12). The trend within a pair makes the error a bit too large.
    """
    n = len(values)
    if n < 2:
        return values.mean().item(), math.nan
    if by_stratum is None:
        return values.mean().item(), (values.var() / n).sqrt().item()
    squares = values[by_stratum].diff() ** 2
    total = squares[::2].sum() + (squares[-1] / 2 if n % 2 else 0)  # n odd: the last one and its neighbour
    return values.mean().item(), total.sqrt().item() / n


def plus_minus(error, digits=4):
    """A standard error as text to print. None and nan stand for one value, which has no standard error."""
    return "(n = 1)" if error is None or math.isnan(error) else f"± {error:.{digits}f}"


class Windows(NamedTuple):
    """Windows of a text, with the batch size, device and dtype of matrix products to score them with."""

    tokens: np.ndarray    # the ids of the whole text, 1-dimensional
    starts: np.ndarray    # (n,), index of the first token of each window
    seq_len: int          # tokens in each window
    batch_size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def n(self):
        return len(self.starts)

    def batches(self):
        """The indices of the windows, a list for each batch."""
        return [list(range(i, min(i + self.batch_size, self.n))) for i in range(0, self.n, self.batch_size)]

    def read(self, chunk):
        """The windows with these indices: (N, seq_len) long, on the CPU."""
        return gather(self.tokens, self.starts[chunk], self.seq_len)


def by_rate(n, seed=0, repeats=1, n_times=1):
    """The order that sorts bound()'s values by the mask rate of their windows, for mean_and_error.

    None if each window has several rates, spread over (0, 1]: then the values have no trend with the rate.
    """
    return torch.from_numpy(strata(seed, n)).argsort() if repeats == n_times == 1 else None


@torch.no_grad()
def bound(model, objective, data, mine=None, seed=0, repeats=1, estimator=None, prefix_range=(0, 0), until=None,
          show=False):
    """Estimate the bound on windows `mine` (default: all) of the data (Windows): (len(mine),) float64, nats per token.

    prefix_range, until: what is given at the beginning of each window, and not scored (randomness.prefix_lengths).
    repeats: draws of the noise for each window. Its value is their mean.
    estimator: one of objective.estimators (default: objective.reported).

    The noise of window i depends on seed, i, data.n, repeats, the estimator, the blocks and prefix_range. So two models
    that agree in these, or two steps of training, are compared on the same masks.
    """
    draw_noise = getattr(objective, estimator or objective.reported)
    mine = list(range(data.n) if mine is None else mine)
    size = max(1, data.batch_size // repeats)
    nats = []
    with progress(total=repeats * len(mine), desc="evaluating", unit="seq", leave=False, show=show) as bar:
        for i in range(0, len(mine), size):
            chunk = mine[i:i + size]
            texts = data.read(chunk)
            x0 = texts.repeat_interleave(repeats, 0)
            u, v, pick = repeated_uniforms(seed, chunk, data.n, repeats, data.seq_len, objective.n_times(data.seq_len))
            v = give_prefix(v, prefix_lengths(prefix_range, seed, 0, chunk, texts, until))
            noise = draw_noise(u.flatten(0, 1), v.flatten(0, 1), pick.flatten(0, 1))
            for x, part in zip(x0.split(data.batch_size), noise.split(data.batch_size)):
                with autocast(data.device, data.dtype):
                    nelbo = objective.nelbo(model, x.to(data.device), part.to(data.device))
                nats.append(nelbo.cpu().double())
                bar.update(len(x))
    return torch.cat(nats).view(len(mine), repeats).mean(1)


# ---- the chain rule --------------------------------------------------------------------------------------------------


@torch.no_grad()
def reveal(model, objective, x0, order, all_at=()):
    """Reveal x0 (B, L) token by token, with one network call for each. Yields (position, masked, ce) before each token.

    position: (B,), the position that is revealed next. masked: (B, L) bool, the positions that are still masked.
    ce: (B, L), -log p of the clean token given the visible ones, at the next position, and 0 elsewhere. It is computed
        at all masked positions if their number is in `all_at`, or if the order is 'confidence'.

    order: (B, L) positions, or 'confidence': the next position is the masked one with the largest max p(token).
    """
    B, L = x0.shape
    xt, rows = torch.full_like(x0, objective.mask_id), torch.arange(B, device=x0.device)
    for i in range(L):
        masked = xt == objective.mask_id
        where = masked
        if torch.is_tensor(order):
            position = order[:, i]
            if L - i not in all_at:
                where = torch.zeros_like(masked)
                where[rows, position] = True
        if objective.causal:  # the visible text, after the mask that stands for its start
            seen, t = torch.nn.functional.pad(xt[:, :i], (1, 0), value=objective.mask_id), torch.ones(B)
        else:
            seen, t = xt, objective.time(torch.full((B,), (L - i) / L, dtype=torch.float64))
        log_p = model(seen, t.to(x0.device), where=where[:, :seen.shape[1]]).float().log_softmax(-1)
        if not torch.is_tensor(order):
            surest = torch.full(x0.shape, -math.inf, device=x0.device).masked_scatter(where, log_p.amax(-1))
            position = surest.argmax(1)
        ce = -log_p.gather(-1, x0[where][:, None]).squeeze(-1)
        yield position, masked, torch.zeros(x0.shape, device=x0.device).masked_scatter(where, ce)
        xt[rows, position] = x0[rows, position]


def nll_along(model, objective, x0, order, v=None):
    """-log p(x0) of the model that reveals one token per call in this order: x0 (B, L) -> nats per token (B,).

        -log p(x) = sum over m of -log p(x[order[m]] | x[order[0]], ..., x[order[m - 1]])

    This is not a bound but the exact negative log-likelihood. Every order defines another model (DUEL, arXiv
    2603.01367). Orders: 'l2r'; 'random', the positions sorted by v (B, L); 'confidence', as in reveal. 'confidence'
    depends on visible tokens alone, so the probabilities of all sequences still sum to one.

    Block diffusion reveals the tokens of each block in this order, given the clean blocks before. All blocks are
    computed at once: a call reveals one token in each.
    """
    return nats_of_blocks(model, objective, x0, order, v).sum(1) / x0.shape[1]


def nats_of_blocks(model, objective, x0, order, v):
    """nll_along, but in nats of each block: (B, L/n). A text without blocks is one block: (B, 1)."""
    if n := objective.block_size:
        def blocks_beside_clean(xt, t, where):  # as if each block were a text: xt, where (B L/n, n), t (B L/n,)
            return model(xt.view(x0.shape), t.repeat_interleave(n).view(x0.shape), where=where.view(x0.shape), clean=x0)

        v = v if v is None else v.reshape(-1, n)
        return order_nats(blocks_beside_clean, objective, x0.reshape(-1, n), order, v).view(len(x0), -1)
    return order_nats(model, objective, x0, order, v)[:, None]


def order_nats(model, objective, x0, order, v):
    """nll_along of texts without blocks, in nats of the whole text: (B,)."""
    B, L = x0.shape
    if order != "confidence":
        order = torch.arange(L).expand(B, L) if order == "l2r" else v.argsort(1)
        order = order.to(x0.device)
    rows, nats = torch.arange(B, device=x0.device), torch.zeros(B, device=x0.device)
    for position, _, ce in reveal(model, objective, x0, order):
        nats += ce[rows, position]
    return nats


def nll_of(model, objective, data, order, seed=0):
    """nll_along of all windows: (n,) float64, nats per token. A window's random order depends on (seed, window)."""
    nats = []
    with progress(total=data.n, desc=f"order {order}", unit="seq", leave=False) as bar:
        for chunk in data.batches():
            _, v, _ = repeated_uniforms(seed, chunk, data.n, 1, data.seq_len)
            with autocast(data.device, data.dtype):
                nats.append(nll_along(model, objective, data.read(chunk).to(data.device), order,
                                      v[:, 0]).cpu().double())
            bar.update(len(chunk))
    return torch.cat(nats)


# ---- over all orders: from two sides ---------------------------------------------------------------------------------


def along_orders(model, objective, x0, v):
    """log p of each block of x0, revealed in K random orders: x0 (B, L), v (B, K, L) -> l (B, blocks, K) float64, nats.

    The model that reveals tokens in random order has p(x) = E exp l(order), the mean over all orders (log_mean).
    """
    B, K, L = v.shape
    nats = nats_of_blocks(model, objective, x0.repeat_interleave(K, 0), "random", v.flatten(0, 1))
    return -nats.cpu().double().view(B, K, -1).transpose(1, 2)  # mps has no float64


@torch.no_grad()
def draw_with_orders(model, objective, v, draws, device):
    """Draw texts, revealing one token per call: v, draws (B, L) -> x0 (B, L) long, l (B, blocks) along the orders of v.

    The positions are sorted by v, as in nll_along, block after block. draws: uniform numbers, one for each token.
    """
    B, L = v.shape
    n = objective.block_size or L
    order = (v.view(B, -1, n).argsort(2) + torch.arange(0, L, n)[:, None]).flatten(1).to(device)
    xt, rows = torch.full((B, L), objective.mask_id, device=device), torch.arange(B, device=device)
    l = torch.zeros(B, L // n, dtype=torch.float64)
    for i in range(L):
        t = objective.time(torch.full((B,), (n - i % n) / n, dtype=torch.float64)).to(device)
        if n < L:  # blocks before this one are clean
            t = torch.where(torch.arange(L, device=device) // n < i // n, 0, t[:, None])
        where = torch.zeros(B, L, dtype=torch.bool, device=device)
        where[rows, order[:, i]] = True
        log_p = model(xt, t, where=where).float().log_softmax(-1)
        drawing = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
        tokens = inverse_cdf(log_p.exp().to(drawing), draws[:, i, None].to(drawing)).to(device)
        l[:, i // n] += log_p[rows, tokens].cpu()
        xt[rows, order[:, i]] = tokens
    return xt, l


def log_mean(l):
    """log of the mean of exp l over K orders, summed over the blocks: l (B, blocks, K) -> (B,)."""
    return (l.logsumexp(2) - math.log(l.shape[2])).sum(1)
