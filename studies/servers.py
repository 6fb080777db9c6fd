"""Servers of asynchronous training, for studies/simulator.py: weights that change when a worker's difference arrives.

All weights, momenta and differences are lists of tensors.
"""

import math

import torch


class Server:
    """Weights that change as soon as a difference d = (weights at the start of a round - at its end) arrives.

    Delayed Nesterov (arXiv 2401.09135, algorithm 3) with a buffer of N differences, and S the sum of those in it:

        d number N, 2 N, ...:   M <- mu M + S / N,   w <- w - lr (mu M + d / N),   S <- 0
        all others:                                  w <- w - lr d / N

    So lr is divided by N for each difference. N = 1 is Nesterov's momentum. A larger N changes the momentum once for N
    differences, as DiLoCo does with N workers.
    """

    kept = ("weights", "momentum", "buffer", "counts")

    def __init__(self, weights, lr, mu, N):
        self.weights, self.lr, self.mu, self.N = [w.detach().clone() for w in weights], lr, mu, N
        self.momentum, self.buffer = ([torch.zeros_like(w) for w in self.weights] for _ in range(2))
        self.counts = [torch.zeros(())]  # differences in the buffer

    def apply(self, difference):
        torch._foreach_add_(self.buffer, difference)
        self.counts[0] += 1
        torch._foreach_add_(self.weights, difference, alpha=-self.lr / self.N)
        if self.counts[0] == self.N:
            torch._foreach_mul_(self.momentum, self.mu)
            torch._foreach_add_(self.momentum, self.buffer, alpha=1 / self.N)
            torch._foreach_add_(self.weights, self.momentum, alpha=-self.lr * self.mu)
            torch._foreach_zero_(self.buffer)
            self.counts[0].zero_()

    def state(self):
        return lists(self)

    def restore(self, tree):
        fill_lists(self, tree)


class RegionalServer(Server):
    """A server of HALoS. It sends what it has moved since it merged, and merges the answer: w <- (1 - a) w + a answer.

    carry: what moved it between sending and merging is part of what it sends next.
    """

    kept = (*Server.kept, "base", "difference", "weights_sent", "answer")

    def __init__(self, weights, lr, mu, N, a, carry):
        super().__init__(weights, lr, mu, N)
        self.a, self.carry = a, carry
        self.base, self.difference, self.weights_sent, self.answer = (
            [w.clone() for w in self.weights] for _ in range(4))

    def send(self):
        self.difference = torch._foreach_sub(self.base, self.weights)
        self.weights_sent = [w.clone() for w in self.weights]

    def merge(self):
        late = torch._foreach_sub(self.weights_sent, self.weights)
        torch._foreach_lerp_(self.weights, self.answer, self.a)
        self.base = [w.clone() for w in self.weights]
        if self.carry:
            torch._foreach_add_(self.base, late)


def lists(x):
    """The lists of tensors in x that are kept, as a tree of tensors."""
    return {key: {str(i): value.clone() for i, value in enumerate(getattr(x, key))} for key in x.kept}


def fill_lists(x, tree):
    """Copy back what lists() returned."""
    for key in x.kept:
        torch._foreach_copy_(getattr(x, key), list(tree[key].values()))


def norm(tensors):
    return math.sqrt(sum(x.square().sum().item() for x in tensors))


def cosine(a, b):
    """Cosine of the angle between lists of tensors, 0 if one is zero."""
    return sum((x * y).sum().item() for x, y in zip(a, b)) / (norm(a) * norm(b) or 1.0)
