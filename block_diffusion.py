"""Block diffusion of text: blocks from left to right, masked diffusion within each (BD3-LM, arXiv 2503.09573).

A text of L tokens is cut into L/n blocks of n tokens. By the chain rule over blocks, and MDLM's bound for each,

    -log p(x) = sum_b -log p(x^b | x^{<b}) <= sum_b E_t [weight(t) * sum over masks of block b of CE given x^{<b}].

The blocks before are clean, and each block has its own time t. With n = L there is one block, with nothing before it:
this is MDLM. With n = 1 it is an autoregressive model. If such a network is not told the time, the bound of a token is
its CE, and the bound of the text is exactly -log p(x).

    here        meaning                                    BD3-LM
    n           block_size: tokens of a block              L'
    u           (B, L/n): one number for each block        t_b
    clean       x0, as the context of the blocks after it  x^{<b}

One call of the network scores all blocks: `model(xt, t, where, clean=x0)`. The network first reads the clean text, and
keeps its keys and values. Then it reads the noisy text, where a token sees its noisy block and the clean blocks before
(docs/blocks.md). Sampling keeps the same keys and values (in_blocks).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from categorical import State, begin
from diffusion import MDLM, Noise, n_free


def read_rate_range(text):
    """'0.3:0.8' -> (0.3, 0.8). Raises ValueError if these are not two numbers with 0 <= low < high <= 1."""
    low, high = map(float, text.split(":"))
    if not 0 <= low < high <= 1:
        raise ValueError(text)
    return low, high


def mask_count_probabilities(n, low, high):
    """P(k of n tokens are masked), k = 0 ... n, if each is masked with probability r, and r is uniform on [low, high].

    It is the mean over r of (n choose k) r^k (1 - r)^(n - k), a polynomial of degree n. Gauss's rule with n/2 + 1
    points is exact for it, and sums positive terms only. (n + 1,) float64.
    """
    points, weights = np.polynomial.legendre.leggauss(n // 2 + 1)
    r = torch.from_numpy((low + high) / 2 + (high - low) / 2 * points)[:, None]
    k = torch.arange(n + 1, dtype=torch.float64)
    log_choices = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    return (torch.from_numpy(weights) / 2) @ torch.exp(log_choices + torch.xlogy(k, r) + torch.xlogy(n - k, 1 - r))


class BlockDiffusion(MDLM):
    """MDLM in each block, given the clean blocks before it.

    time_sampling, weighting: as in MDLM, for each block. With 'exact_k' a block has k masks, k uniform on 1 ... n, and
    weight n/k. 'stratified' and 'exact_k' spread the u over all blocks of a batch: one u in each of (L/n) B equal
    intervals, in random order, so that the time says nothing about the place of the block. (In BD3-LM's code the
    intervals are in the order of the blocks, so that early blocks get early times.)

    rate_range (low, high): training draws the mask rate r from [low, high] only, and the loss keeps its weights 1/r.
    These are the paper's clipped schedules, which reduce the variance. Masks are still independent. So every number of
    masks k = 0 ... n has a probability P(k) > 0, also k = n, where sampling begins. Therefore the same draws can
    estimate the bound over the full range, without bias if the network does not see the time:

        sum_k 1/k * E[sum CE, k masks] = sum_k P(k) * weight * E[sum CE, k masks]        with weight = 1/(k P(k)).

    At low = 0 and high = 1 this is the weight (n + 1)/k of Absorbing.continuous. Where P(k) is small, the estimate
    varies much.
    """

    description = "writes block after block, from left to right"
    any_order = both_sides = False
    own = (*MDLM.own, "block_size", "rate_range")
    samplers = {name: name for name in ("ancestral", "first_hitting", "topk", "threshold", "entropy_bound", "remdm")}

    def __init__(self, mask_id, block_size, schedule="linear", time_sampling="exact_k", weighting="nelbo",
                 rate_range=(0.0, 1.0)):
        super().__init__(mask_id, schedule, time_sampling, weighting)
        self.block_size, self.rate_range = block_size, rate_range
        self.clipped = rate_range != (0, 1)
        if self.clipped:
            p = mask_count_probabilities(block_size, *rate_range)
            k = torch.arange(block_size + 1)
            self.full_range_weight = torch.where(k > 0, 1 / (k * p), 0.0)

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.block_size, config.schedule, config.time_sampling, config.weighting,
                   read_rate_range(config.rate_range))

    @classmethod
    def misfit(cls, config):
        n, L = config.block_size, config.seq_len
        if not n or L % n:
            return f"objective=block needs a block_size that divides seq_len={L}" + (f", and {n} does not" if n else "")
        try:
            clipped = read_rate_range(config.rate_range) != (0, 1)
        except ValueError:
            return f"rate_range={config.rate_range!r} is not like 0.3:0.8, two mask rates from 0 to 1"
        if clipped and (config.time_sampling == "exact_k" or config.schedule != "linear" or (
                config.conditioning != "none" or config.prefix != "none")):
            return ("rate_range needs schedule=linear, conditioning=none, prefix=none, and time_sampling=uniform or "
                    "stratified: exact_k draws the number of masks, not a rate")
        if config.prefix != "none" and config.conditioning != "none":
            return "objective=block with a prefix needs conditioning=none"
        return super().misfit(config)

    def n_times(self, L):
        return L // self.block_size

    def in_each_block(self, draw, u, v, *pick):
        """Call draw(u, v, *pick) with blocks as if they were texts: u, pick (B, L/n), v (B, L) -> Noise (B, L).

        A prefix may end inside a block. If f of the N free tokens of a text are in a block, the weight from draw is
        for the mean of these f, and has the factor n/f. For the mean of all N it needs the factor L/N instead.
        Blocks without free tokens have no noise.
        """
        n, (B, L) = self.block_size, v.shape
        N, v = n_free(v).repeat_interleave(L // n), v.reshape(-1, n)
        f = n_free(v)
        some = f > 0
        found = draw(u.reshape(-1)[some], v[some], *(x.reshape(-1)[some] for x in pick))
        mask, t, weight = (x.new_zeros(len(v), *x.shape[1:]).index_put((some,), x)
                           for x in (found.mask, found.t, found.weight))
        weight = (weight * (f / n * L / N)).float()
        return Noise(mask.view(B, L), *(x.repeat_interleave(n).view(B, L) for x in (t, weight)))

    def clipped_rates(self, u, v):
        """Masks at rates from rate_range: u (N,), v (N, n) -> Noise of N blocks, with weights of the full range."""
        low, high = self.rate_range
        rate = low + (high - low) * u
        mask = v <= rate[:, None]
        return Noise(mask, rate.float(), self.full_range_weight[mask.sum(1)].float())

    def noise(self, u, v):
        if self.time_sampling == "exact_k":
            return self.exact_k(u, v)
        return self.in_each_block(self.clipped_rates if self.clipped else super().noise, u, v)

    def exact_k(self, u, v, pick=None):
        return self.in_each_block(super().exact_k, u, v)

    def continuous(self, u, v, pick):
        return self.in_each_block(super().continuous, u, v, pick)

    def predict(self, model, x0, noise):
        return model(self.corrupt(x0, noise.mask), noise.t, where=noise.located().at, clean=x0)

    def loss(self, model, x0, noise):
        if not self.clipped or self.weighting == "simple":
            return super().loss(model, x0, noise)
        ce = self.masked_ce(model, x0, noise)
        return self.weighted(ce, 1 / noise.t).mean(), self.weighted(ce, noise.weight).detach()  # linear: t is the rate


# ---- sampling --------------------------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """The past of a Rereader: the tokens themselves, (B, P)."""

    xt: torch.Tensor

    def of_rows(self, rows):
        return Tokens(self.xt[rows])


class Rereader:
    """A network without a cache: every call reads all earlier blocks again (`sample.py --no_cache`)."""

    def __init__(self, model):
        self.model = model

    def remember(self, xt, t, past=None):
        return [Tokens(xt if past is None else torch.cat((past[0].xt, xt), 1))]

    def __call__(self, xt, t, where, past=None):
        if past is None:
            return self.model(xt, t, where=where)
        before = past[0].xt
        t = torch.cat((t.new_zeros(before.shape), t[:, None].expand(xt.shape)), 1)
        return self.model(torch.cat((before, xt), 1), t, where=F.pad(where, (before.shape[1], 0)))


@torch.no_grad()
def in_blocks(settings, objective, model, xt, generator, end=None):
    """Fill the masks of xt (B, L) block after block, each by the sampler of `settings`. Yields States of all L tokens.

    The network runs on one block at a time. It gets the keys and values of the blocks before, `past`. model.remember()
    computes those of a block when its last mask is filled. Nothing is kept inside the network. This is exact: the clean
    blocks see neither noise nor later blocks.

    The given tokens may end inside a block, and at a different place in each text. The last block may be short. It is
    then filled as a whole block, and cut: the network was trained on whole blocks.

    end: the id of the token that ends a text, or None. Once a block has it after the given tokens, that text is
    finished: its masks are filled with `end`, without the network.
    """
    n, past, known = objective.block_size, None, 0
    state, given = begin(xt), xt != objective.mask_id
    for a in range(0, xt.shape[1], n):
        block = state.xt[:, a:a + n]
        if not (block == objective.mask_id).any():
            continue
        if known < a:  # all blocks since the last one that was remembered: several, if a prompt is long
            past = model.remember(state.xt[:, known:a], torch.zeros(len(xt), device=xt.device), past=past)
            known = a
        width, last = block.shape[1], None
        for part in settings.states(objective, model, F.pad(block, (0, n - width), value=objective.mask_id), generator,
                             past=past):
            new = [torch.cat((whole[:, :a], piece[:, :width], whole[:, a + n:]), 1)
                   for whole, piece in ((state.xt, part.xt), (state.p, part.p))]
            if last is not None:  # a State is yielded when the next one is there: the last one is finished first
                yield last
            last = State(*new, part.steps)
        state = last
        if end is not None:  # only now, because remdm makes masks again in a block that was full
            state = state._replace(xt=finish(state.xt, given, end, objective.mask_id))
        yield state


def finish(xt, given, end, mask_id):
    """Fill the masks of the texts xt (B, L) that have `end` outside the given tokens (B, L), with `end`."""
    ended = ((xt == end) & ~given).any(1, keepdim=True)
    return torch.where(ended & (xt == mask_id), end, xt)


def cut(tokens, start, end):
    """Cut a text before the first `end` that was written into a mask of `start`; both are lists of ids."""
    for i, token in enumerate(tokens):
        if token == end and start[i] != end:
            return tokens[:i]
    return tokens
