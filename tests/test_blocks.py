"""block_diffusion.py on worlds that can be enumerated: the bound, its two ends, its estimators, samplers, the cache.

The world here has V = 2 tokens and L = 4 positions, so blocks of 1, 2 and 4 tokens.
"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from attention import Layout, Tiles, attend, layout_beside_clean, layout_of_blocks
from block_diffusion import (BlockDiffusion, Rereader, cut, finish, in_blocks, mask_count_probabilities,
                             read_rate_range)
from categorical import Counted
from commands import assert_one_line, assert_resumes_exactly, log, losses, train
from configs import Config
from data.tokenizer import CharTokenizer
from diffusion import MDLM
from likelihood import by_rate, nll_along
from model import Block
from networks import network, small
from prompts import end_of, text_of
from randomness import give_prefix, repeated_uniforms, uniforms
from sampler_settings import loop_grid, schedule_grid
from sampling import Settings, denoise
from test_sampling import chi_square_excess
from world import picked

V, L, MASK = 2, 4, 2
TEXTS = torch.tensor(list(itertools.product(range(V), repeat=L)))                       # (16, L)
P_DATA = (2 * torch.randn(V**L, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).softmax(0)
SIZES = (1, 2, 4)


class World:
    """A denoiser for blocks of n tokens. rule: (clean tokens before (B, P), noisy block (B, n)) -> log p (B, n, V).

    It has the network's three ways to be called: on all blocks beside the clean text, on the block after the past, and
    on the clean text before and the noisy block together.
    """

    def __init__(self, n, rule):
        self.n, self.rule = n, rule

    def __call__(self, xt, t, where=None, past=None, clean=None):
        n = self.n
        if past is not None:
            log_p = self.rule(past[0].xt, xt)
        elif clean is not None:
            log_p = torch.cat([self.rule(clean[:, :a], xt[:, a:a + n]) for a in range(0, xt.shape[1], n)], 1)
        else:
            log_p = torch.cat([self.rule(xt[:, :a], xt[:, a:a + n]) for a in range(0, xt.shape[1], n)], 1)
        return picked(log_p, where)

    def remember(self, xt, t, past=None):
        return Rereader(None).remember(xt, t, past)


def optimum(before, block):
    """log p(x_i | clean tokens before, visible tokens of the block), by Bayes' rule over all texts."""
    seen = torch.cat((before, block), 1)
    agrees = ((seen[:, None] == TEXTS[:, :seen.shape[1]]) | (seen[:, None] == MASK)).all(-1)   # (B, 16)
    posterior = agrees * P_DATA
    one_hot = F.one_hot(TEXTS[:, before.shape[1]:seen.shape[1]], V).double()
    return (torch.einsum("bk,kiv->biv", posterior, one_hot) / posterior.sum(1)[:, None, None]).log()


def arbitrary(before, block):
    """A fixed function of all that a block may see, far from the optimum."""
    seen = torch.cat((before, block), 1).double()
    code = (seen * torch.tensor([1.0, 2.7, 7.1, 19.3])[:seen.shape[1]].double()).sum(1, keepdim=True)
    place = torch.arange(block.shape[1]) + before.shape[1]
    return torch.stack((torch.sin(code * 1.3 + place), torch.cos(code * 0.7 + 2 * place)), -1).mul(2).log_softmax(-1)


def in_order(rule, n, x, orders):
    """log p(x (L,)) if the tokens of each block of n are revealed in the order of `orders` (one for each block)."""
    total = torch.zeros((), dtype=torch.float64)
    for a, order in zip(range(0, L, n), orders):
        block = torch.full((1, n), MASK)
        for i in order:
            total = total + rule(x[None, :a], block)[0, i, x[a + i]]
            block[0, i] = x[a + i]
    return total


def block_orders(n):
    """All ways to order the tokens of each block."""
    return list(itertools.product(itertools.permutations(range(n)), repeat=L // n))


def bound_of(rule, n):
    """The bound by definition, the mean over orders of -log p(text revealed in it), for all texts: (16,) nats."""
    return torch.stack([-torch.stack([in_order(rule, n, x, orders) for orders in block_orders(n)]).mean()
                        for x in TEXTS])


def likelihood_of(rule, n):
    """-log of the mean over orders, which is what first_hitting samples from: (16,) nats."""
    found = [torch.stack([in_order(rule, n, x, orders) for orders in block_orders(n)]) for x in TEXTS]
    return torch.stack([math.log(len(p)) - p.logsumexp(0) for p in found])


def all_noise(n, n_rates=None):
    """u (N, L/n) and v (N, L) on which exact_k takes each number of masks and each order of tokens equally often.

    n_rates: number of u, a multiple of the numbers of free tokens that blocks have (default: n)."""
    n_rates = n_rates or n
    one = [((k + 0.5) / n_rates, [(i + 0.5) / n for i in ranks])
           for k in range(n_rates) for ranks in itertools.permutations(range(n))]
    rows = list(itertools.product(one, repeat=L // n))
    return (torch.tensor([[u for u, _ in row] for row in rows], dtype=torch.float64),
            torch.tensor([sum((v for _, v in row), []) for row in rows], dtype=torch.float64))


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("rule", [optimum, arbitrary])
def test_bound_by_enumeration(n, rule):
    """The mean of exact_k over all its draws is the mean over all orders; it is at least the likelihood of the model,
    and equal to it for n = 1. With the optimum, it is the entropy of the data for every n."""
    objective, model = BlockDiffusion(MASK, n), World(n, rule)
    u, v = all_noise(n)
    noise = objective.exact_k(u, v)
    assert noise.t.shape == noise.weight.shape == noise.mask.shape == v.shape
    found = torch.stack([objective.nelbo(model, x.expand(len(v), -1), noise).double().mean() for x in TEXTS]) * L
    bound, nll = bound_of(rule, n), likelihood_of(rule, n)
    torch.testing.assert_close(found, bound, rtol=1e-5, atol=1e-5)
    assert (bound >= nll - 1e-9).all()
    if n == 1:
        torch.testing.assert_close(bound, nll)
    elif rule is arbitrary:
        assert (bound - nll).max() > 0.05
    if rule is optimum:
        torch.testing.assert_close(bound, -P_DATA.log())


@pytest.mark.parametrize("n", SIZES)
def test_estimators_agree(n):
    """20,000 draws of exact_k, of continuous and of the training noise have the mean of the enumerated bound."""
    rule, N = arbitrary, 20_000
    model, bound = World(n, rule), bound_of(rule, n)
    u, v, w = (x[:, 0] for x in repeated_uniforms(0, range(N), N, 1, L, n_times=max(2, L // n)))
    u, w = (x if L // n > 1 else x[:, 0] for x in (u, w))
    x = TEXTS[torch.arange(N) % 16]
    expected = bound[torch.arange(N) % 16] / L
    plain = BlockDiffusion(MASK, n, time_sampling="stratified")
    for noise, tolerance in ((plain.exact_k(u, v), 4), (plain.continuous(u, v, w), 4)):
        error = plain.nelbo(model, x, noise).double() - expected
        assert error.mean().abs() < tolerance * error.std() / N**0.5 + 1e-6  # of one token there is no noise
    noise = plain.noise(u * 0.9 + 0.1, v)  # of rates in (0.1, 1]: 1/t has no finite variance
    clipped = BlockDiffusion(MASK, n, time_sampling="stratified", rate_range=(0.1, 1.0))
    again = clipped.noise(u, v)
    assert torch.equal(noise.mask, again.mask) and torch.equal(noise.t, again.t)
    torch.testing.assert_close(noise.weight, 1 / again.t)


def bound_given(rule, n, c):
    """The bound on -log p of all but the first c tokens given these, by definition, for all texts: (16,) nats.

    In each block the free tokens are revealed in a random order, after the given ones."""
    def mean_over_orders(x, a):
        found, free = [], [i for i in range(n) if a + i >= c]
        for order in itertools.permutations(free):
            block = x[None, a:a + n].clone()
            block[0, free], log_p = MASK, 0
            for i in order:
                log_p = log_p + rule(x[None, :a], block)[0, i, x[a + i]]
                block[0, i] = x[a + i]
            found.append(-log_p)
        return sum(found) / len(found) if free else 0

    return torch.stack([sum(mean_over_orders(x, a) for a in range(0, L, n)) for x in TEXTS])


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("c", [1, 2, 3])
def test_bound_given_a_prefix(n, c):
    """The mean of exact_k over all its draws is the bound given the prefix, in nats per free token. With the optimum it
    is -log p(free tokens | prefix). Wherever in a block the prefix ends, no given token is a mask."""
    objective = BlockDiffusion(MASK, n)
    u, v = all_noise(n, {1: 1, 2: 2, 4: 12}[n])
    noise = objective.exact_k(u, give_prefix(v, [c] * len(v)))
    assert not noise.mask[:, :c].any() and noise.mask[:, c:].any(0).all() and noise.weight.isfinite().all()
    nothing = (0 if n == 4 else c // n) * n  # the tokens of blocks that are given as a whole
    assert not noise.weight[:, :nothing].any() and not noise.t[:, :nothing].any()
    for rule in (optimum, arbitrary):
        found = torch.stack([objective.nelbo(World(n, rule), x.expand(len(v), -1), noise).double().mean()
                             for x in TEXTS]) * (L - c)
        torch.testing.assert_close(found, bound_given(rule, n, c), rtol=1e-5, atol=1e-5)
    of_prefix = torch.stack([P_DATA[(TEXTS[:, :c] == x[:c]).all(1)].sum() for x in TEXTS])
    torch.testing.assert_close(bound_given(optimum, n, c), -(P_DATA / of_prefix).log())


@pytest.mark.parametrize("estimator", ["exact_k", "continuous", "noise"])
def test_estimators_given_prefixes_of_any_length(estimator):
    """20,000 draws, a third of them after each of 0, 1 and 3 tokens, in blocks of two."""
    N, n, objective = 20_000, 2, BlockDiffusion(MASK, 2, "linear", "stratified")
    u, v, pick = (x[:, 0] for x in repeated_uniforms(2, range(N), N, 1, L, n_times=2))
    lengths = torch.tensor([0, 1, 3])[torch.arange(N) % 3]
    more = (pick,) if estimator == "continuous" else ()
    noise = getattr(objective, estimator)(u, give_prefix(v, lengths), *more)
    x = torch.arange(N) % 16
    expected = torch.stack([bound_given(arbitrary, n, c) / (L - c) for c in range(4)])[lengths, x]
    error = objective.nelbo(World(n, arbitrary), TEXTS[x], noise).double() - expected
    for c in (0, 1, 3):
        some = error[lengths == c]
        error_of_mean = some.std() / len(some)**0.5
        assert some.mean().abs() < 4 * error_of_mean + 1e-6  # of one token there is no noise
        assert error_of_mean < (0.05 if estimator == "noise" else 0.025)


@pytest.mark.parametrize("n", [2, 4])
def test_estimators_agree_if_the_network_sees_the_time(n):
    """The rates that exact_k and continuous tell the network are those of the bound, block by block."""
    class Timed(World):
        def __call__(self, xt, t, where=None, clean=None):
            log_p = World.__call__(self, xt, t, clean=clean)
            return picked(log_p * (1 + torch.sin(6 * t.double()))[..., None], where)

    N, objective = 40_000, BlockDiffusion(MASK, n)
    u, v, w = (x[:, 0] for x in repeated_uniforms(1, range(N), N, 1, L, n_times=max(2, L // n)))
    u, w = (x if L // n > 1 else x[:, 0] for x in (u, w))
    x = TEXTS[torch.arange(N) % 16]
    found = [objective.nelbo(Timed(n, arbitrary), x, noise).double()
             for noise in (objective.exact_k(u, v), objective.continuous(u, v, w))]
    error = (found[0].var() + found[1].var()).sqrt() / N**0.5
    assert (found[0].mean() - found[1].mean()).abs() < 4 * error < 0.06


def test_the_ends():
    """Blocks of L tokens: MDLM's loss, bound and gradients, with the same network and noise. Blocks of one: what the
    chain rule from left to right gives, whatever u and v are."""
    g = torch.Generator().manual_seed(0)
    x0, v = torch.randint(27, (6, 16), generator=g), torch.rand(6, 16, dtype=torch.float64, generator=g)
    for sampling, weighting in itertools.product(("uniform", "exact_k"), ("nelbo", "simple")):
        u = torch.rand(6, dtype=torch.float64, generator=g)
        results = []
        for objective, size in ((MDLM(27, "linear", sampling, weighting), 0),
                                (BlockDiffusion(27, 16, "linear", sampling, weighting), 16)):
            model = network(27, **({"objective": "block", "block_size": size} if size else {}))
            loss, nelbo = objective.loss(model, x0, objective.noise(u, v))
            loss.backward()
            results.append((loss, nelbo, *[p.grad for p in model.parameters()]))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
    model, objective = network(27, objective="block", block_size=1), BlockDiffusion(27, 1)
    with torch.no_grad():
        nelbo = objective.nelbo(model, x0, objective.exact_k(torch.rand(6, 16, dtype=torch.float64), v))
        torch.testing.assert_close(nelbo, nll_along(model, objective, x0, "l2r"), rtol=1e-5, atol=1e-5)
        one = [F.cross_entropy(model(F.pad(x0[:, :i], (0, 1), value=27), torch.ones(6))[:, -1], x0[:, i],
                               reduction="none") for i in range(16)]
        torch.testing.assert_close(nelbo, torch.stack(one, 1).mean(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", SIZES)
def test_chain_rule_in_blocks(n):
    """Orders within blocks: from left to right, random, and by confidence: probabilities that sum to one."""
    objective, model = BlockDiffusion(MASK, n), World(n, arbitrary)
    left = torch.stack([in_order(arbitrary, n, x, [range(n)] * (L // n)) for x in TEXTS])
    torch.testing.assert_close(nll_along(model, objective, TEXTS, "l2r").double() * L, -left, rtol=1e-5, atol=1e-5)
    v = torch.rand(1, L, generator=torch.Generator().manual_seed(1)).expand(16, -1)
    orders = [v[0, a:a + n].argsort().tolist() for a in range(0, L, n)]
    mixed = torch.stack([in_order(arbitrary, n, x, orders) for x in TEXTS])
    torch.testing.assert_close(nll_along(model, objective, TEXTS, "random", v).double() * L, -mixed, rtol=1e-5,
                               atol=1e-5)
    sure = nll_along(model, objective, TEXTS, "confidence").double() * L
    assert torch.exp(-sure).sum().item() == pytest.approx(1, abs=1e-5)
    if n == L:
        assert not torch.allclose(sure, -left, atol=1e-3)


# ---- noise -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, low, high", [(1, 0.0, 1.0), (4, 0.0, 1.0), (4, 0.45, 0.95), (16, 0.3, 0.8),
                                          (64, 0.5, 1.0)])
def test_mask_counts(n, low, high):
    """Probabilities of 0 ... n masks against a fine sum over rates; all are positive and reached by training noise."""
    p = mask_count_probabilities(n, low, high)
    r = low + (high - low) * (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    brute = torch.stack([(math.comb(n, k) * r**k * (1 - r)**(n - k)).mean() for k in range(n + 1)])
    torch.testing.assert_close(p, brute, rtol=1e-5, atol=1e-12)
    assert (p > 0).all() and p.sum().item() == pytest.approx(1)
    if (low, high) == (0, 1):
        torch.testing.assert_close(p, torch.full_like(p, 1 / (n + 1)))


@pytest.mark.parametrize("low, high", [(0.45, 0.95), (0.3, 0.8), (0.0, 0.6)])
def test_clipped_noise(low, high):
    """Every number of masks is drawn, as often as it should be, at rates in the range; the reported bound, weighted by
    1/(k p(k)), is that of the full range, while the loss has weights 1/r: the paper's, over the range alone."""
    n, N, rule = 4, 40_000, arbitrary
    objective = BlockDiffusion(MASK, n, time_sampling="stratified", rate_range=(low, high))
    generator = torch.Generator().manual_seed(0)
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    v = torch.rand(N, n, dtype=torch.float64, generator=generator)
    noise = objective.noise(u, v)
    counts = torch.bincount(noise.mask.sum(1), minlength=n + 1)
    assert (counts > 0).all() and chi_square_excess(counts, mask_count_probabilities(n, low, high)) < 4
    assert low <= noise.t.min() and noise.t.max() <= high + 1e-6
    model, x = World(n, rule), TEXTS[torch.arange(N) % 16]
    loss, nelbo = objective.loss(model, x, noise)
    error = nelbo.double() - bound_of(rule, n)[torch.arange(N) % 16] / L
    assert error.mean().abs() < 4 * error.std() / N**0.5
    ce = objective.masked_ce(model, x, noise)
    assert loss.item() == pytest.approx((ce.sum(1) / noise.t[:, 0] / L).mean().item(), rel=1e-5)
    assert not torch.allclose(noise.weight, 1 / noise.t, rtol=0.1)
    objective.weighting = "simple"
    loss, again = objective.loss(model, x, noise)
    assert loss.item() == pytest.approx(2 * (ce.sum(1) / L).mean().item(), rel=1e-5) and torch.equal(again, nelbo)


def test_times_are_spread_over_blocks_but_not_tied_to_places():
    """One u in each of B L/n equal intervals of a batch; over many batches each block has each interval equally often.
    Times in order, as in the original, would make the estimate biased if the model differs by place."""
    B, times = 2, 4
    seen = torch.zeros(times, B * times)
    for step in range(2000):
        u, v = uniforms(5, step, range(B), B, 8, stratified=True, n_times=times)
        assert u.shape == (B, times) and v.shape == (B, 8)
        interval = torch.ceil(u * B * times).long() - 1
        assert interval.flatten().sort().values.tolist() == list(range(B * times))
        for b in range(times):
            seen[b] += torch.bincount(interval[:, b], minlength=B * times)
    assert chi_square_excess(seen.flatten(), torch.full((times * B * times,), 1 / seen.numel()).double()) < 4
    some = uniforms(5, 7, [1], B, 8, stratified=True, n_times=times)
    whole = uniforms(5, 7, range(B), B, 8, stratified=True, n_times=times)
    assert all(torch.equal(a, b[1:]) for a, b in zip(some, whole))
    u, v, w = repeated_uniforms(3, range(5), 5, 2, 8, n_times=times)
    assert u.shape == w.shape == (5, 2, times) and v.shape == (5, 2, 8)
    for repeat in range(2):
        assert (torch.ceil(u[:, repeat] * 20).long() - 1).flatten().sort().values.tolist() == list(range(20))
    again = repeated_uniforms(3, [4, 2], 5, 2, 8, n_times=times)
    assert all(torch.equal(a, b[[4, 2]]) for a, b in zip(again, (u, v, w)))
    seen, pairs = torch.zeros(times, 20), []
    for seed in range(1000):
        u, v, w = repeated_uniforms(seed, range(5), 5, 1, 8, n_times=times)
        for b in range(times):
            seen[b] += torch.bincount(torch.ceil(u[:, 0, b] * 20).long() - 1, minlength=20)
        pairs.append(torch.stack((u.flatten(), w.flatten(), v[..., :times].flatten())))
    assert chi_square_excess(seen.flatten(), torch.full((seen.numel(),), 1 / seen.numel()).double()) < 4
    assert (torch.corrcoef(torch.cat(pairs, 1)) - torch.eye(3)).abs().max() < 0.03
    assert by_rate(5, n_times=2) is None and by_rate(5) is not None


# ---- the network -----------------------------------------------------------------------------------------------------


def texts(n, seed=1):
    """Noisy and clean texts, times of blocks, each for a token: xt, x0 (4, 16) long, t (4, 16)."""
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(27, (4, 16), generator=g)
    t = torch.rand(4, 16 // n, generator=g).repeat_interleave(n, 1)
    return torch.where(torch.rand(4, 16, generator=g) < t, 27, x0), x0, t


KINDS = [(conditioning, shift) for conditioning in ("none", "time") for shift in (False, True)]


@pytest.mark.parametrize("n", [1, 4, 8])
@pytest.mark.parametrize("conditioning, shift", KINDS)
def test_three_ways_to_call_are_one(conditioning, shift, n):
    """All blocks beside the clean text in one call, as in training; each block with its cache, as in sampling; and
    each with the clean text before it read again: the same logits, and the same gradients of their sum."""
    xt, x0, t = texts(n)
    found = []
    for way in ("beside", "cache", "again"):
        model = network(27, conditioning=conditioning, objective="block", block_size=n, shift_tokens=shift,
                        head_gates=shift)
        if way == "beside":
            logits = model(xt, t, clean=x0)
        else:
            past, blocks, memory = None, [], model if way == "cache" else Rereader(model)
            for a in range(0, 16, n):
                where = torch.ones(4, n, dtype=torch.bool)
                blocks.append(memory(xt[:, a:a + n], t[:, a], where=where, past=past).view(4, n, 27))
                past = memory.remember(x0[:, a:a + n], torch.zeros(4), past=past)
            logits = torch.cat(blocks, 1)
        logits.logsumexp(-1).sum().backward()
        found.append((logits.detach(), [p.grad for p in model.parameters()]))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-5, atol=1e-5)
        for a, b in zip(other[1], found[0][1]):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("shift", [False, True])
def test_several_blocks_after_a_past(shift):
    """Remembered at once, they are what they are one after the other: each sees its own block and those before."""
    model, (_, x0, _) = network(27, objective="block", block_size=4, shift_tokens=shift), texts(4)
    one = two = model.remember(x0[:, :4], torch.zeros(4))
    one = model.remember(x0[:, 4:12], torch.zeros(4), past=one)
    for a in (4, 8):
        two = model.remember(x0[:, a:a + 4], torch.zeros(4), past=two)
    for x, y in zip(one, two):
        for a, b in zip(x, y):
            assert a is b is None or torch.allclose(a, b, atol=1e-5)


def test_one_text_of_noisy_and_clean_tokens():
    """BD3-LM's own form, x_t and x_0 beside each other as one text of 2 L tokens under one mask, gives the same."""
    n, (xt, x0, t) = 4, texts(4)
    block, clean = torch.arange(32) % 16 // n, torch.arange(32) >= 16
    sees = (block[:, None] == block) & (clean[:, None] == clean) | (block[:, None] > block) & clean
    both = network(27)
    logits = both.head(both.trunk(torch.cat((xt, x0), 1), t[:, 0], Layout(sees, torch.arange(16).repeat(2))))
    model = network(27, objective="block", block_size=n)
    torch.testing.assert_close(model(xt, t, clean=x0), logits[:, :16], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("conditioning, shift", KINDS)
def test_nothing_leaks_from_later_blocks(conditioning, shift):
    """Logits of block b stay the same to the last bit, whatever its own clean tokens and all later tokens are; they
    change with the clean tokens before, and with the noisy tokens of the block itself."""
    n, (xt, x0, t) = 4, texts(4)
    model = network(27, conditioning=conditioning, objective="block", block_size=n, shift_tokens=shift)
    before = model(xt, t, clean=x0)
    for b in range(4):
        a, e = b * n, (b + 1) * n
        later_clean, later_noisy = x0.clone(), xt.clone()
        later_clean[:, a:] = (later_clean[:, a:] + 1) % 27
        later_noisy[:, e:] = (later_noisy[:, e:] + 1) % 28
        later_noisy[:, :a] = (later_noisy[:, :a] + 1) % 28
        assert torch.equal(model(later_noisy, t, clean=later_clean)[:, a:e], before[:, a:e])
        if b:
            earlier = x0.clone()
            earlier[:, a - 1] = (earlier[:, a - 1] + 1) % 27
            assert ((model(xt, t, clean=earlier) - before)[:, a:e].abs().amax((1, 2)) > 1e-5).all()
        own = xt.clone()
        own[:, e - 1] = (own[:, e - 1] + 1) % 28
        assert (model(own, t, clean=x0) - before)[:, a].abs().max() > 1e-4


def test_neighbours_of_blocks():
    """The left neighbour of a noisy token is of its block, or the last clean token of the block before; the right one
    of its block. The numbers are those of positions, 100 more for clean tokens, 0 for none."""
    layout = layout_beside_clean(6, 3, torch.device("cpu"))
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 5]
    block = Block(small(n_head=1, n_embd=4, shift_tokens=True), n_cond=0)
    number = lambda *numbers: torch.tensor(numbers).float()[None, :, None].expand(1, -1, 4)
    found = block.neighbours(number(1, 2, 3, 4, 5, 6), layout, number(101, 102, 103, 104, 105, 106)[..., :1])
    assert found[0].T.int().tolist() == [[0, 1, 2, 103, 4, 5], [2, 3, 0, 5, 6, 0], *[[1, 2, 3, 4, 5, 6]] * 2]
    layout = layout_of_blocks(4, 3, 3, torch.device("cpu"))  # after 3 others; the last block is short
    assert layout.positions.tolist() == [3, 4, 5, 6]
    found = block.neighbours(number(4, 5, 6, 7), layout, number(101, 102, 103)[..., :1])
    assert found[0].T.int().tolist() == [[103, 4, 5, 6], [5, 6, 0, 0], *[[4, 5, 6, 7]] * 2]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention(monkeypatch):
    """FlexAttention with its block mask, which CUDA uses, and SDPA with its mask give the same in training's two
    layouts, and after a past. (Here it is not compiled. On a CPU it has no gradients.)"""
    monkeypatch.setattr("attention.compiled_flex_attention", lambda: flex_attention)
    q, k, v = torch.randn(3, 2, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    for make, arguments, L, seen in ((layout_of_blocks, (32, 0, 4), 32, 32), (layout_of_blocks, (32, 12, 4), 32, 44),
                                     (layout_beside_clean, (32, 4), 32, 64)):
        found, expected = (attend(q[:, :, :L], k[:, :, :seen], v[:, :, :seen],
                                  make(*arguments, torch.device("cpu"), flex).sees, False) for flex in (True, False))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [4, 32])
def test_tiles(size):
    """Attention in tiles is attention under the whole mask, and so are its gradients; it leaves out what is not seen:
    of 4 x 4 tiles of 16 tokens those above the diagonal, and of 4 x 8 those without a clean or noisy token to see.
    Lengths that do not divide into tiles stay whole."""
    n, device = 64, torch.device("cpu")
    assert torch.is_tensor(layout_of_blocks(66, 0, 3, device).sees)
    assert torch.is_tensor(layout_of_blocks(72, 8, 8, device).sees)
    for tiles, seen, kept in ((layout_of_blocks(n, 0, size, device).sees, n, {4: 10, 32: 12}),
                              (layout_beside_clean(n, size, device).sees, 2 * n, {4: 10 + 4, 32: 4 + 8})):
        assert isinstance(tiles, Tiles) and sum(map(len, tiles.seen)) == kept[size]
        mask = torch.zeros(n, seen, dtype=torch.bool)
        for i, (row, tile) in enumerate(zip(tiles.seen, tiles.masks)):
            for j, part in zip(row, tile.split(16, 1)):
                mask[16 * i:16 * i + 16, 16 * j:16 * j + 16] = part
        block = torch.arange(n) // size
        assert torch.equal(mask[:, -n:], block[:, None] == block if seen > n else block[:, None] >= block)
        assert torch.equal(mask[:, :-n], block[:, None] > block[:seen - n])
        q, k, v = (torch.randn(2, 2, length, 8, generator=torch.Generator().manual_seed(length), requires_grad=True)
                   for length in (n, seen, seen))
        found, expected = (attend(q, k, v, visible, False) for visible in (tiles, mask))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad((y**2).sum(), (q, k, v)) for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_blocks_compile_in_one_graph(shift):
    """torch.compile finds no reason to leave the graph of either text; with any number of masks."""
    torch._dynamo.reset()
    model, (xt, x0, t) = network(27, objective="block", block_size=4, shift_tokens=shift), texts(4)
    expected = [model(xt, t, where=where, clean=x0) for where in (xt == 27, xt < 9)]
    model.trunk = torch.compile(model.trunk, fullgraph=True, backend="aot_eager")
    found = [model(xt, t, where=where, clean=x0) for where in (xt == 27, xt < 9)]
    torch.testing.assert_close(found, expected)
    found[0].sum().backward()


def test_flops_of_blocks():
    """PyTorch's own counter finds what flops() says for a training step beside the clean text, and the operations for
    pairs of tokens that do not see each other: of 40 x 40 clean pairs and 40 x 80 noisy ones half of 40 x 48 do."""
    from torch.utils.flop_counter import FlopCounterMode
    for shift in (False, True):
        model = network(27, seq_len=40, objective="block", block_size=8, shift_tokens=shift)
        g = torch.Generator().manual_seed(0)
        x0, where = torch.randint(27, (4, 40), generator=g), torch.rand(4, 40, generator=g) < 0.5
        with (FlopCounterMode(display=False) as counter,
              torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)):
            model(torch.where(where, 27, x0), torch.rand(4, 40), where, clean=x0).sum().backward()
        expected = model.flops(40, where.float().mean().item()) * 4 * 40
        unseen = 2 * (80 - 24) + (2 if shift else 1) * (40 - 24)  # per token, in two layers
        assert counter.get_total_flops() == pytest.approx(expected + 12 * 16 * unseen * 4 * 40, rel=1e-6)


# ---- sampling --------------------------------------------------------------------------------------------------------


GRID = [1.0, 0.7, 0.3, 0.0]
ALL = [Settings("ancestral", {"grid": schedule_grid("cosine", 6)}), Settings("first_hitting"),
       Settings("topk", {"grid": schedule_grid("linear", 3)}), Settings("topk", {"k": 2}), Settings("threshold"),
       Settings("entropy_bound", {"gamma": 0.5}),
       Settings("remdm", {"grid": schedule_grid("linear", 7), "remask": "cap"}),
       Settings("remdm", {"grid": loop_grid(7), "remask": "loop"})]


def chain_of(rule, n, grid):
    """p(text) of the ancestral chain on a grid in each block, by summing over all its paths: (16,)."""
    states = torch.tensor(list(itertools.product(range(V + 1), repeat=n)))
    total = torch.ones(len(TEXTS), dtype=torch.float64)
    for a in range(0, L, n):
        for before in TEXTS[:, :a].unique(dim=0) if a else [TEXTS[0, :0]]:
            log_p = rule(before.expand(len(states), -1), states)
            p = (states == MASK).all(1).double()
            for r, s in zip(grid, grid[1:]):
                shown = (1 - s / r) * log_p.exp()                                              # (S, n, V)
                stay = torch.full((*shown.shape[:2], 1), s / r, dtype=torch.float64)
                step = torch.where((states == MASK)[..., None], torch.cat((shown, stay), -1),
                                   F.one_hot(states, V + 1).double())
                p = p @ torch.stack([step[:, i, states[:, i]] for i in range(n)]).prod(0)
            for row in (TEXTS[:, :a] == before).all(1).nonzero().flatten().tolist():
                total[row] *= p[(states == TEXTS[row, a:a + n]).all(1)].item()
    return total


def counts_of(texts):
    return torch.bincount((texts * 2 ** torch.arange(L - 1, -1, -1)).sum(1), minlength=V**L)


@pytest.mark.parametrize("n", SIZES)
def test_samplers_follow_their_chains(n):
    """20,000 texts by ancestral and by first_hitting, block by block, against enumeration; they are two distributions,
    except for n = 1. With the optimum, first_hitting draws from the data."""
    N, objective = 20_000, BlockDiffusion(MASK, n)

    def sample(settings, rule):
        *_, state = in_blocks(settings, objective, World(n, rule), torch.full((N, L), MASK),
                              torch.Generator().manual_seed(0))
        assert (state.xt != MASK).all() and (state.p > 0).all()
        return counts_of(state.xt)

    chain, limit = chain_of(arbitrary, n, GRID), torch.exp(-likelihood_of(arbitrary, n))
    assert chain.sum().item() == pytest.approx(1) and limit.sum().item() == pytest.approx(1)
    counts = sample(Settings("ancestral", {"grid": GRID}), arbitrary)
    assert chi_square_excess(counts, chain) < 4 and (n == 1 or chi_square_excess(counts, limit) > 10)
    assert chi_square_excess(sample(Settings("first_hitting"), arbitrary), limit) < 4
    assert chi_square_excess(sample(Settings("first_hitting"), optimum), P_DATA) < 4


@torch.no_grad()
@pytest.mark.parametrize("settings", ALL, ids=lambda settings: settings.sampler)
@pytest.mark.parametrize("conditioning, shift", [("none", True), ("time", False)])
def test_the_cache_changes_nothing(settings, conditioning, shift):
    """Tokens with and without the cache are the same, and their probabilities to 1e-5, from the same numbers. Prompts
    end anywhere, one is longer than a block, and the text is no multiple of the block size."""
    n = 4
    model = network(27, conditioning=conditioning, seq_len=24, objective="block", block_size=n, shift_tokens=shift)
    xt = torch.full((5, 22), 27)
    for row, given in enumerate((0, 3, 4, 9, 21)):
        xt[row, :given] = torch.randint(27, (given,), generator=torch.Generator().manual_seed(row))
    objective, runs = BlockDiffusion(27, n), []
    for network_ in (model, Rereader(model)):
        runs.append(list(in_blocks(settings, objective, network_, xt, torch.Generator().manual_seed(4))))
    assert len(runs[0]) == len(runs[1])
    for cached, again in zip(*runs):
        assert torch.equal(cached.xt, again.xt) and cached.xt.shape == xt.shape
        torch.testing.assert_close(cached.p, again.p, rtol=1e-4, atol=1e-5, equal_nan=True)
    last = runs[0][-1]
    assert (last.xt != 27).all() and torch.equal(last.xt[xt != 27], xt[xt != 27])
    assert torch.equal(last.p.isnan(), xt != 27)
    for state in runs[0]:  # left to right: no token is written while a mask is left in a block before
        open_ = (state.xt == 27).view(5, -1)
        first = torch.where(open_.any(1), open_.int().argmax(1), 22) // n * n + n
        later = (torch.arange(22) >= first.min()) & (xt == 27)
        assert (state.xt[later] == 27).all()


@torch.no_grad()
def test_calls_of_the_network():
    """A block is remembered once, after it is full, and counted; a prompt of several blocks in one call; nothing for
    the last block. A text that has its end token costs no more calls."""
    model, objective, sizes = network(27, objective="block", block_size=4), BlockDiffusion(27, 4), []

    class Watched(Counted):
        def __call__(self, xt, t, where=None, **more):
            sizes.append(("call", len(xt), xt.shape[1], more["past"][0].keys.shape[2] if "past" in more else 0))
            return super().__call__(xt, t, where, **more)

        def remember(self, xt, t, **more):
            sizes.append(("remember", len(xt), xt.shape[1]))
            return super().remember(xt, t, **more)

    watched, xt = Watched(model), torch.full((2, 16), 27)
    xt[:, :9] = 5
    *_, state = in_blocks(Settings("topk", {"k": 4}), objective, watched, xt, torch.Generator().manual_seed(0))
    assert sizes == [("remember", 2, 8), ("call", 2, 4, 8), ("remember", 2, 4), ("call", 2, 4, 12)]
    assert watched.nfe == 4 and watched.tokens == 2 * (8 + 4 + 4 + 4)
    end = state.xt[0, 10].item()
    sizes.clear()
    *_, stopped = in_blocks(Settings("topk", {"k": 4}), objective, watched, xt, torch.Generator().manual_seed(0), end)
    ended = ((state.xt[:, 9:12] == end).any(1)).tolist()
    assert ended[0] and (stopped.xt[0, 12:] == end).all() and torch.equal(stopped.xt[:, :12], state.xt[:, :12])
    assert stopped.p[0, 12:].isnan().all()
    assert sizes[3:] == ([] if all(ended) else [("call", 1, 4, 12)])


def test_a_short_last_block():
    """It is filled as a whole block, and cut: its tokens have the distribution of the first ones of a whole block."""
    N, objective = 20_000, BlockDiffusion(MASK, 4)
    p = torch.exp(-likelihood_of(arbitrary, 4)).view(4, 4).sum(1)
    *_, state = in_blocks(Settings("first_hitting"), objective, World(4, arbitrary), torch.full((N, 2), MASK),
                          torch.Generator().manual_seed(0))
    assert chi_square_excess(torch.bincount(state.xt[:, 0] * 2 + state.xt[:, 1], minlength=4), p) < 4


class Counting:
    """A network whose next token is always one more than the one before, from 3 on: (token before + 1) % 27."""

    def remember(self, xt, t, past=None):
        return Rereader(None).remember(xt, t, past)

    def __call__(self, xt, t, where, past=None):
        before = past[0].xt[:, -1] if past else torch.full((len(xt),), 2)
        tokens = (before[:, None] + 1 + torch.arange(xt.shape[1])) % 27
        return picked(F.one_hot(tokens, 27).float(), where) * 50


def test_where_texts_end():
    """A token `end` that was given does not end the text; one that is written does, once its block is full: states
    before that show no `end` where there are masks. It ends the text over windows, too."""
    objective, way = BlockDiffusion(27, 4), Settings("topk", {"k": 1})
    xt = torch.full((2, 16), 27)
    xt[0, 0], xt[1, :2] = 9, torch.tensor([9, 4])  # 9 is the end; the second text goes on from 3 at its token 2
    states = list(in_blocks(way, objective, Counting(), xt, torch.Generator(), end=9))
    assert states[-1].xt[0].tolist() == [9, 4, 5, 6, 7, 8, 9, 10, *[9] * 8]
    assert states[-1].xt[1].tolist() == [9, 4, 5, 6, 7, 8, 9, 10, *[9] * 8]
    for state in states:
        if (state.xt[:, :8] == 27).any():
            assert (state.xt[:, 8:] == 27).all()
    finished = 0  # a block that is full for a while, as with remdm, does not end the text
    for state in in_blocks(Settings("remdm", {"grid": schedule_grid("linear", 60), "remask": "rescale", "eta": 0.5}),
                           objective, Counting(), xt, torch.Generator().manual_seed(0), end=9):
        ended = (state.xt[:, -1] == 9).sum()
        assert ended >= finished
        finished = ended
    assert finished == 2
    config = Config(objective="block", block_size=4, seq_len=16, n_layer=2, n_head=2, n_embd=16, conditioning="none")
    canvas = torch.full((2, 36), 27)
    *_, state = denoise(way, objective, Counting(), canvas, config, 4, torch.Generator())
    assert state.xt[0].tolist() == [(3 + i) % 27 for i in range(36)]  # windows 0 to 16, 12 to 28, 24 to 36
    states = list(denoise(way, objective, Counting(), canvas, config, 4, torch.Generator(), end=20))
    assert states[-1].xt[0].tolist() == [*range(3, 23), *[20] * 16]
    assert sum(state.steps for state in states) == 20  # what fills the text up is no step
    *_, state = denoise(way, objective, Counting(), canvas, config, 4, torch.Generator(), end=16)
    assert state.xt[0].tolist() == [*range(3, 19), *[16] * 20]


def test_ends():
    """`end` counts where it was written, not where it was given. It is the pad, where pads come last, with blocks."""
    xt = torch.tensor([[7, 1, 9, 9], [2, 7, 9, 9], [2, 3, 9, 9]])
    given = torch.tensor([[True, True, False, False], [True, False, False, False], [False] * 4])
    assert finish(xt, given, 7, 9).tolist() == [[7, 1, 9, 9], [2, 7, 7, 7], [2, 3, 9, 9]]
    assert cut([7, 1, 4, 7, 7], [7, 1, 9, 9, 9], 7) == [7, 1, 4] and cut([7, 1], [7, 9], 7) == [7, 1]
    tokenizer = CharTokenizer("ab.", ".")
    ends = [end_of(small(padding=padding, **blocks), tokenizer)
            for blocks in ({"objective": "block", "block_size": 4}, {}) for padding in ("end", "random")]
    assert ends == [2, None, None, None]
    assert [text_of([0, 1, 2, 1], [0, 3, 3, 3], end, tokenizer) for end in (2, None)] == ["ab", "abb"]


# ---- configs and commands --------------------------------------------------------------------------------------------


def test_rate_ranges():
    """Two rates are read, also of a config; other texts are refused. Many tokens do not overflow."""
    assert mask_count_probabilities(4096, 0.3, 0.8).sum().item() == pytest.approx(1)
    assert read_rate_range("0.3:0.8") == (0.3, 0.8)
    config = small(objective="block", block_size=4, time_sampling="uniform", rate_range="0.3:0.8")
    assert config.make_objective(V).rate_range == (0.3, 0.8)
    for text in ("", "0.5", "0.8:0.3", "0:2", "-1:1", "a:b", "0.1:0.2:0.3", "nan:1"):
        with pytest.raises(ValueError):
            read_rate_range(text)


BLOCK = ["--objective=block", "--block_size=8"]
CLIPPED = ["--rate_range=0.3:0.8", "--time_sampling=stratified"]


def test_trains_and_resumes(call, monkeypatch, data_dir, tmp_path):
    """A run of the tiny config: losses fall; a resumed run ends as one without interruption; DiT's checkpointing of
    activations changes nothing."""
    flags = [*BLOCK, "--shift_tokens", "--max_steps=8"]
    whole, _ = assert_resumes_exactly(call, monkeypatch, "mdlm_text8", data_dir, tmp_path, flags)
    assert losses(whole)[-1] < losses(whole)[0]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "again", *flags, "--checkpoint_blocks").code == 0
    assert losses(tmp_path / "again") == pytest.approx(losses(whole), rel=1e-4)


def test_commands(call, data_dir, tmp_path):
    """evaluate.py with --check, orders, --block_size, of MDLM too; sample.py with and without cache, prompts, windows,
    pictures in the terminal; what does not go is one line."""
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, *BLOCK, "--max_steps=4", "--sample_interval=4").code == 0
    assert any("sample" in line for line in log(out))
    score = lambda *flags: call("evaluate.py", out, "--json", "--data_dir", data_dir, *flags)
    found = {name: json.loads(score(*flags).out)["bits_per_token"] for name, flags in (
        ("bound", ()), ("many", ("--repeats=64",)), ("l2r", ("--order=l2r",)), ("ones", ("--block_size=1",)),
        ("ones l2r", ("--block_size=1", "--repeats=2")), ("whole", ("--block_size=32",)))}
    assert found["ones"] == pytest.approx(found["ones l2r"], abs=1e-5) and found["bound"] != found["whole"]
    assert found["bound"] == pytest.approx(found["many"], abs=0.2)
    assert score("--check", "--block_size=2", "--seq_len=8", "--repeats=5").code == 0
    sample = lambda *flags: call("sample.py", out, "--json", *flags)
    for flags in (("--batch_size=3",), ("--prefix=abcdefghij",), ("--length=70", "--context=8"), ("--length=13",),
                  ("--sampler=first_hitting", "--show"), ("--sampler=remdm", "--steps=9"),
                  ("--sampler=threshold", "--html", tmp_path / "page.html")):
        cached, again = sample(*flags), sample("--no_cache", *flags)
        assert cached.code == again.code == 0, cached.err + again.err
        one, two = (json.loads(result.out) for result in (cached, again))
        assert [s["tokens"] for s in one["samples"]] == [s["tokens"] for s in two["samples"]]
        assert one["nfe"] > two["nfe"] and one["tokens_read"] < two["tokens_read"]
    assert (tmp_path / "page.html").stat().st_size > 1000
    mdlm = tmp_path / "mdlm"
    assert train(call, "mdlm_text8", data_dir, mdlm, "--max_steps=2").code == 0
    whole = json.loads(call("evaluate.py", mdlm, "--json", "--data_dir", data_dir).out)["bits_per_token"]
    same = json.loads(call("evaluate.py", mdlm, "--block_size=32", "--json", "--data_dir", data_dir).out)
    assert same["bits_per_token"] == pytest.approx(whole, abs=1e-4)
    one, two = (json.loads(call("evaluate.py", *pair, "--json", "--data_dir", data_dir).out)
                for pair in ((mdlm, out), (out, mdlm)))  # the rates of one of them have an order
    assert one["difference"] == -two["difference"] and one["difference_stderr"] == two["difference_stderr"]
    d3pm = mdlm.parent / "d3pm"
    assert train(call, "d3pm_text8", data_dir, d3pm, "--max_steps=1").code == 0
    models = json.loads(call("evaluate.py", d3pm, out, "--json", "--data_dir", data_dir).out)["models"]
    assert all("exact k" in model["estimator"] for model in models)  # not the bound of d3pm's T steps
    for result, words in (
            (sample("--suffix=ab"), "sees only the text on the left"),
            (sample("--template=a__"), "sees only the text on"),
            (sample("--block_length=4"), "of masks in whole texts"),
            (sample("--prefix=ab", "--guidance=1"), "--guidance needs a model of masks in whole texts"),
            (sample("--sampler=euler"), "--sampler euler"), (sample("--steps=auto"), "--steps N"),
            (call("sample.py", mdlm, "--no_cache"), "block diffusion"),
            (sample("--length=70"), "such as 8\n"), (sample("--length=70", "--context=11"), "use 16"),
            (sample("--length=70", "--context=31"), "use 24"),
            (sample("--sampler=first_hitting", "--steps=5"), "or use ancestral or topk or remdm\n"),
            (score("--context=0,8"), "of masks in whole texts"),
            (score("--T=8"), "T-step bound is for whole texts"),
            (call("demos.py", "loss", "some text", "-m", out), "use evaluate.py for its loss"),
            (score("--block_size=5"), "no multiple of blocks of 5"), (score("--curve"), "of masks in whole texts"),
            (score("--curse"), "of masks in whole texts"), (score("--seq_len=20"), "no multiple of blocks of 8"),
            (call("evaluate.py", out, "--curve", "--block_size=4", "--data_dir", data_dir), "are for the bound")):
        assert_one_line(result, words)
    bad = lambda *flags: train(call, "mdlm_text8", data_dir, tmp_path / "bad", *flags)
    for flags, words in (
            (("--objective=block",), "a block_size that divides"),
            (("--objective=block", "--block_size=5"), "5 does not"),
            (("--block_size=4",), "is only for objective=block"),
            ((*BLOCK, "--noise=uniform"), "noise=uniform does not work with"),
            ((*BLOCK, "--prefix=fixed:8", "--conditioning=time"), "with a prefix needs conditioning=none"),
            ((*BLOCK, *CLIPPED, "--prefix=fixed:8"), "rate_range needs"),
            ((*BLOCK, *CLIPPED, "--conditioning=time"), "rate_range needs"),
            ((*BLOCK, *CLIPPED, "--schedule=cosine"), "rate_range needs"),
            ((*BLOCK, "--architecture=tiny_diffusion", "--conditioning=step"), "other than ar and block"),
            ((*BLOCK, "--rate_range=0.9:0.2"), "is not like 0.3:0.8"),
            ((*BLOCK, "--rate_range=0.3:0.8", "--time_sampling=exact_k"), "rate_range needs"),
            ((*BLOCK, "--lambda_ce=1"), "lambda_ce"), ((*BLOCK, "--architecture=tiny_diffusion"), "tiny_diffusion")):
        assert_one_line(bad(*flags), words)
        assert not (tmp_path / "bad").exists()


def test_from_mdlm_to_blocks(call, data_dir, tmp_path):
    """The paper's two stages: MDLM first, then --init_from with blocks; a line says that the objective changes."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(call, "mdlm_text8", data_dir, first, "--max_steps=4").code == 0
    result = train(call, "mdlm_text8", data_dir, second, *BLOCK, "--max_steps=4", "--init_from", first)
    assert result.code == 0 and "objective=mdlm, now block" in result.err
    clipped = train(call, "mdlm_text8", data_dir, tmp_path / "third", *BLOCK, "--max_steps=4", "--init_from", first,
                    "--rate_range=0.3:0.8", "--time_sampling=stratified")
    assert clipped.code == 0 and all(math.isfinite(line.get("bits_per_token", 0)) for line in log(tmp_path / "third"))
