"""Parts of sampling.py: the state of a sampler, a denoiser that counts its calls, and drawing tokens."""

from typing import NamedTuple

import torch

from cli import UserError


class State(NamedTuple):
    """The state of a sampler."""

    xt: torch.Tensor  # (B, L) long, tokens and masks
    p: torch.Tensor   # (B, L) float32, the network's probability of each drawn token; nan at masks and given tokens
    steps: int = 1    # steps since the State before, above 1 if those in between changed nothing; or (B,) long

    def put(self, where, tokens, p):
        """The next State: with N tokens and their probabilities, (N,) each, at the N places of `where` (B, L) bool."""
        return State(self.xt.masked_scatter(where, tokens), self.p.masked_scatter(where, p))


def begin(xt):
    return State(xt, torch.full(xt.shape, torch.nan, device=xt.device))


def rates_of(xt, r):
    """The same rate r for all texts xt (B, L): (B,) float64."""
    return torch.full((len(xt),), r, dtype=torch.float64)


def with_denoising(grid, least=0.0):
    """Insert one more rate before the 0 at the end of a grid: 1e-5, or half of the rate before it if that is less.

    The step from it to 0 removes the noise that is left. least: the rate at t = 0, where an Euler chain ends."""
    return [*grid[:-1], max(least, min(1e-5, grid[-2] / 2)), 0.0]


class Counted:
    """A denoiser that counts its calls (nfe: number of function evaluations), and the sequences and tokens in them.

    A call that only fills a cache (model.DiT.remember) counts, too; tokens that are in the cache do not."""

    def __init__(self, model):
        self.model, self.nfe, self.sequences, self.tokens = model, 0, 0, 0

    def count(self, xt):
        self.nfe, self.sequences, self.tokens = self.nfe + 1, self.sequences + len(xt), self.tokens + xt.numel()

    def __call__(self, xt, t, where=None, **more):
        self.count(xt)
        return self.model(xt, t, where, **more)

    def remember(self, xt, t, **more):
        self.count(xt)
        return self.model.remember(xt, t, **more)

    def within(self, xt, t, where, window, outside=None):
        self.count(xt if outside is None else xt[:, slice(*window)])
        return self.model.within(xt, t, where, window, outside)


def in_pieces(logits):
    """Split the rows of logits (N, V) into pieces, so that the computations on them take little memory.

    In float32 a piece has 8 MB on a CPU, to fit into its caches, and half a gigabyte on a GPU."""
    size = 2**21 if logits.device.type == "cpu" else 2**27
    return logits.split(max(1, size // logits.shape[-1]))


NOT_FINITE = "the outputs of the network are not finite: its weights are damaged"


def inverse_cdf(p, u):
    """The first token at which the cumulative sum of the weights p (N, V) exceeds u (N, 1) times their total: (N,).

    p is float32 and not all zero; u is float64 in [0, 1). First the group of about sqrt(V) tokens is found, then the
    token in it: two short cumulative sums in float64 instead of a long one. The groups' totals are float32, which
    changes the probability of a token by less than a millionth of it. On a CPU a token of weight zero is never
    drawn, because the sum does not grow there. A GPU adds in parallel, and rounding can draw one in some 1e16 draws.

    Raises UserError if p is not finite.
    """
    if not p.sum().isfinite():
        raise UserError(NOT_FINITE)

    def find(weights, u):
        total = weights.double().cumsum(-1)
        y = u * total[:, -1:]  # less than the total even after rounding, because u is at most 1 - 2^-53
        i = torch.searchsorted(total, y, right=True)
        share = (y - (total - weights).gather(1, i)) / weights.double().gather(1, i)  # the part of weight i below y
        return i, share.clamp(0, 1 - 2**-53)

    N, V = p.shape
    width = int(V**0.5)
    whole = V // width * width
    sums = p[:, :whole].view(N, -1, width).sum(-1)
    group, u = find(torch.cat((sums, p[:, whole:].sum(-1, keepdim=True)), 1), u)  # the last group has the other tokens
    tokens = group * width + torch.arange(width, device=p.device)
    within, _ = find(p.gather(1, tokens.clamp(max=V - 1)) * (tokens < V), u)
    return tokens.gather(1, within).squeeze(1)


class Draw:
    """Draw tokens from softmax(logits / temperature), cut to the top_k likeliest, then to the fewest that reach top_p.

    The cut by top_p is nucleus sampling (arXiv 1904.09751). temperature 0: the likeliest token.

    Uniform numbers are float64. Those of float32 are multiples of 2^-24, so the Gumbel noise that other code makes of
    them never exceeds 16.64. It draws a token of probability 1e-7 only 0.73 times as often as it should, and one of
    1e-8 0.015 times, as if the temperature were lower (arXiv 2409.02908; docs/maths.md, section 15). mps has no
    float64, so there the generator is on the CPU, and tokens are drawn on the CPU.
    """

    def __init__(self, generator, temperature=1.0, top_p=1.0, top_k=0):
        self.generator, self.temperature, self.top_p, self.top_k = generator, temperature, top_p, top_k

    def uniform(self, shape):
        """Uniform float64 numbers in [0, 1), on the generator's device."""
        return torch.rand(shape, dtype=torch.float64, device=self.generator.device, generator=self.generator)

    def happens(self, probability, xt):
        """Draw an independent event of this probability (a number, or (B, L)) for each of xt (B, L): (B, L) bool."""
        if torch.is_tensor(probability):
            probability = probability.to(self.generator.device)
        return (self.uniform(xt.shape) < probability).to(xt.device)

    def __call__(self, logits, sure=None):
        """logits (N, V) -> drawn tokens (N,) long, and their probabilities (N,) float32 in softmax(logits), uncut.

        sure: a function of SURE, whose values are also returned.
        """
        pieces = [self.piece(logits.float(), sure) for logits in in_pieces(logits)]
        return tuple(map(torch.cat, zip(*pieces)))

    def piece(self, logits, sure):
        p = logits.softmax(-1)
        if self.temperature == 0 and not p.sum().isfinite():  # otherwise inverse_cdf checks this
            raise UserError(NOT_FINITE)
        tokens = logits.argmax(-1) if self.temperature == 0 else self.pick(self.cut(logits, p))
        return tokens, p.gather(-1, tokens[:, None]).squeeze(-1), *([sure(logits, p)] if sure else [])

    def cut(self, logits, p):
        """Weights (N, V) of the tokens: p = softmax(logits) after temperature, top_k and top_p."""
        if self.temperature == 0:
            return torch.zeros_like(p).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        q = p
        if self.temperature != 1:
            q = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if 0 < self.top_k < q.shape[-1]:
            values, tokens = q.topk(self.top_k)
            q = torch.zeros_like(q).scatter(-1, tokens, values)
        if self.top_p < 1:
            sorted_q, order = q.sort(dim=-1, descending=True, stable=True)
            before = sorted_q.cumsum(-1) - sorted_q
            sorted_q[before >= self.top_p * sorted_q.sum(-1, keepdim=True)] = 0
            q = torch.zeros_like(q).scatter(-1, order, sorted_q)
        return q

    def pick(self, q):
        """Draw tokens (N,) with probabilities proportional to q (N, V)."""
        device = self.generator.device
        return inverse_cdf(q.to(device), self.uniform((len(q), 1))).to(q.device)


def entropy(logits, p):
    """Entropy of p = softmax(logits), (N, V) float32 -> (N,) nats, with an error below 1e-4 (1e-5 if V <= 10,000).

    log Z - sum of p logits takes half the work of - sum of p log p. The largest logit is made 0 first, because sums of
    smaller numbers have smaller rounding errors. Then the largest p is exp(0)/Z, so log Z is minus its logarithm."""
    logits = logits - logits.amax(-1, keepdim=True)
    with torch.autocast(p.device.type, enabled=False):  # which would compute vecdot in bfloat16
        mean = torch.linalg.vecdot(p, logits.clamp(min=-1e30))  # 0 times -inf would be nan
    return (-p.amax(-1).log() - mean).clamp(min=0)


def margin(logits, p):
    """The largest probability minus the second largest (0 if V = 1; arXiv 2502.06768): (N, V) -> (N,)."""
    largest = p.topk(min(2, p.shape[-1])).values
    return largest[:, 0] - largest[:, 1:].sum(-1)


# How sure the network is of a position: {name: (logits, p) -> (N,)}. None: the probability of the token drawn there.
SURE = {"probability": None, "margin": margin, "entropy": lambda logits, p: -entropy(logits, p)}
