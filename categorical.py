"""Where a sampler is, a denoiser that counts, and how tokens are drawn: what sampling.py is made of."""

from typing import NamedTuple

import torch

from cli import UserError


class State(NamedTuple):
    """Where a sampler is."""

    xt: torch.Tensor  # (B, L) long, tokens and masks
    p: torch.Tensor   # (B, L) float32, what the network gave a token that it drew; nan at masks and given tokens
    steps: int = 1    # of the sampler since its State before: more than one where nothing happened in the others


class Counted:
    """A denoiser that counts its calls and the sequences in them (nfe: number of function evaluations)."""

    def __init__(self, model):
        self.model, self.nfe, self.sequences = model, 0, 0

    def __call__(self, xt, t, where=None):
        self.nfe += 1
        self.sequences += len(xt)
        return self.model(xt, t, where)


def in_pieces(logits):
    """Rows of logits (N, V), some at a time, so that what comes after a network takes little memory: 8 MB on a CPU,
    whose caches like that, half a gigabyte on a GPU."""
    size = 2**21 if logits.device.type == "cpu" else 2**27
    return logits.split(max(1, size // logits.shape[-1]))


def inverse_cdf(p, u):
    """The token at which the cumulative sum of p (N, V), weights not all zero, exceeds u (N, 1) of its total: (N,).

    p float32 and u float64 in [0, 1). First the block of some sqrt(V) tokens is found, then the token in it: two short
    cumulative sums in float64 instead of a long one. What is float32, p and the blocks' totals, changes no token's
    probability by more than a ten-millionth of it. A token of weight zero is never drawn, whatever is rounded.
    """
    if not p.sum().isfinite():
        raise UserError("the network gives numbers that are not finite: its weights are broken")

    def find(weights, u):
        total = weights.double().cumsum(-1)
        y = u * total[:, -1:]  # below the total, as rounded, too, because u is at most 1 - 2^-53
        i = torch.searchsorted(total, y, right=True)
        return i, ((y - (total - weights).gather(1, i)) / weights.double().gather(1, i)).clamp(0, 1 - 2**-53)

    N, V = p.shape
    width = int(V**0.5)
    whole = V // width * width
    sums = p[:, :whole].view(N, -1, width).sum(-1)
    block, u = find(torch.cat((sums, p[:, whole:].sum(-1, keepdim=True)), 1), u)
    tokens = block * width + torch.arange(width, device=p.device)
    within, _ = find(p.gather(1, tokens.clamp(max=V - 1)) * (tokens < V), u)
    return tokens.gather(1, within).squeeze(1)


class Draw:
    """How tokens are drawn: from softmax(logits / temperature), cut to its top_k likeliest tokens, then to the fewest
    whose probabilities reach top_p (nucleus sampling, arXiv 1904.09751). temperature 0: the likeliest token.

    The noise is float64. Gumbel noise from float32 uniforms lives on a grid of 2^-24 and never exceeds 16.64: beside
    one other token, one of probability 1e-7 is drawn .73 times as often as it should be, one of 1e-8 .015 times (the
    tests compute it), which silently lowers the temperature (arXiv 2409.02908). Where there is no float64 (mps), the
    generator is one of the CPU, which then draws.
    """

    def __init__(self, generator, temperature=1.0, top_p=1.0, top_k=0):
        self.generator, self.temperature, self.top_p, self.top_k = generator, temperature, top_p, top_k

    def uniform(self, shape):
        """Float64 in [0, 1) on the generator's device."""
        return torch.rand(shape, dtype=torch.float64, device=self.generator.device, generator=self.generator)

    def happens(self, probability, xt):
        """Independent events of this probability (a number, or (B, L)), one for each of xt (B, L): (B, L) bool."""
        if torch.is_tensor(probability):
            probability = probability.to(self.generator.device)
        return (self.uniform(xt.shape) < probability).to(xt.device)

    def __call__(self, logits, entropies=False):
        """logits (N, V) -> tokens (N,) long, and what the network gave them (N,) float32: softmax(logits), uncut.

        entropies: also those of softmax(logits), (N,) nats.
        """
        pieces = [self.piece(logits.float(), entropies) for logits in in_pieces(logits)]
        return tuple(map(torch.cat, zip(*pieces)))

    def piece(self, logits, entropies):
        p = logits.softmax(-1)
        tokens = logits.argmax(-1) if self.temperature == 0 else self.pick(self.cut(logits, p))
        return tokens, p.gather(-1, tokens[:, None]).squeeze(-1), *([entropy(logits, p)] if entropies else [])

    def cut(self, logits, p):
        """Weights (N, V) of the tokens, as temperature, top_k and top_p leave them of p = softmax(logits)."""
        if self.temperature == 0:
            return torch.zeros_like(p).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
        q = p
        if self.temperature != 1:
            q = ((logits - logits.amax(-1, keepdim=True)) / self.temperature).softmax(-1)
        if 0 < self.top_k < q.shape[-1]:
            q = torch.zeros_like(q).scatter(-1, *q.topk(self.top_k)[::-1])
        if self.top_p < 1:
            sorted_q, order = q.sort(dim=-1, descending=True, stable=True)
            before = sorted_q.cumsum(-1) - sorted_q
            sorted_q[before >= self.top_p * sorted_q.sum(-1, keepdim=True)] = 0
            q = torch.zeros_like(q).scatter(-1, order, sorted_q)
        return q

    def pick(self, q):
        """Tokens (N,) with probabilities proportional to q (N, V)."""
        device = self.generator.device
        return inverse_cdf(q.to(device), self.uniform((len(q), 1))).to(q.device)


def entropy(logits, p):
    """Of p = softmax(logits), (N, V) float32 -> (N,) nats, to a millionth: log Z - sum of p logits, half of the
    work that the logarithms of all p would be."""
    log_z = logits.amax(-1) - p.amax(-1).log()
    return (log_z - torch.linalg.vecdot(p, logits.clamp(min=-1e30))).clamp(min=0)  # 0 times -inf would be no number
