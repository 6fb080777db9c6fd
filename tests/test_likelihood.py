"""likelihood.py and studies/curves.py: chain rules, agreement of estimators, invalid ones, and the studies' numbers,
on a world that can be enumerated."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import world
from block_diffusion import BlockDiffusion
from commands import assert_one_line
from diffusion import D3PM, MDLM, AutoRegressive, Noise, cross_entropy
from evaluate import agree
from likelihood import (ORDERS, Windows, along_orders, bound, by_rate, nll_along, nll_of, draw_with_orders,
                        log_mean, mean_and_error, reveal)
from networks import network
from randomness import repeated_uniforms
from studies.curves import area, measure_curse, measure_curve
from studies.orders import measure_orders, two_sides
from world import ENTROPY, MASK, P_DATA, SEQUENCES, L, V

CPU, FLOAT = torch.device("cpu"), torch.float32


def random_network(seed, conditioning, seq_len=6, causal=False):
    return network(4, seed, std=0.5, seq_len=seq_len, conditioning=conditioning,
                   objective="ar" if causal else "mdlm")


def windows_of(x0):
    """Windows that are the rows of x0 (n, L)."""
    return Windows(x0.flatten().numpy(), np.arange(0, x0.numel(), x0.shape[1]), x0.shape[1], 1000, CPU, FLOAT)


def world_text(n, seed=0):
    """n sequences drawn from the world's distribution."""
    return SEQUENCES[torch.multinomial(P_DATA, n, True, generator=torch.Generator().manual_seed(seed))]


def random_text(n, seq_len=6):
    return torch.randint(4, (n, seq_len), generator=torch.Generator().manual_seed(0))


def compare(model, objective, x0, one, two):
    """Mean and standard error of the paired difference of two estimators, in nats."""
    scored = [bound(model, objective, windows_of(x0), estimator=name) for name in (one, two)]
    return mean_and_error(scored[0] - scored[1], by_rate(len(x0)))


# ---- estimators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 4])
def test_continuous_estimators_have_the_entropy(repeats):
    """With the Bayes-optimal denoiser on text from the world, both average to -log p(x) of that text."""
    x0 = world_text(8000)
    truth = -P_DATA.log()[(x0 * torch.tensor([V**2, V, 1])).sum(1)] / L
    assert truth.mean().item() == pytest.approx(ENTROPY / L, rel=0.02)
    for estimator in MDLM.estimators:
        nats = bound(world.oracle, MDLM(MASK), windows_of(x0), repeats=repeats, estimator=estimator)
        mean, error = mean_and_error(nats - truth, by_rate(len(x0), 0, repeats))
        assert abs(mean) < 4 * error and error < 0.02 * ENTROPY / L


@pytest.mark.parametrize("conditioning", ["none", "time", "step"])
@pytest.mark.parametrize("objective", [MDLM(4), MDLM(4, "cosine"), D3PM(4, 10), D3PM(4, 100, "cosine")],
                         ids=["mdlm", "mdlm-cosine", "d3pm-10", "d3pm-100-cosine"])
def test_estimators_agree(conditioning, objective):
    """On a random network, time-conditioned or not, a bound's two estimators agree, and --check says so."""
    model, x0 = random_network(1, conditioning), random_text(1500)
    size = bound(model, objective, windows_of(x0)).mean().item()
    for one, two in objective.estimators.items():
        mean, error = compare(model, objective, x0, one, two)
        assert agree(mean, error) and error < 0.1 * size, (one, two, mean, error)


def test_rounding_is_no_disagreement():
    """Two estimates without noise may differ by less than 1e-4 bits, and by no more."""
    assert agree(5e-5, 0.0) and not agree(2e-4, 0.0)


def test_a_short_chain_is_told_from_continuous_time():
    """The bounds of 4 steps and of continuous time differ, and the check notices."""
    mean, error = compare(world.oracle, D3PM(MASK, 4), world_text(8000), "t_step", "exact_k")
    assert not agree(mean, error) and mean > 0


class Invalid(MDLM):
    """What has been reported as a bound and is none."""

    def pooled_mean(self, u, v, w):
        """Cross-entropy divided by the masked tokens of the whole batch (tiny-diffusion, RoBERTaDiffusion)."""
        noise = self.noise(u, v)
        return noise._replace(weight=torch.full_like(noise.weight, noise.mask.numel() / noise.mask.sum()))

    def clipped_range(self, u, v, w):
        """Rates from .3 to .8 only: fine to train blocks with (BD3-LM), no bound."""
        return self.exact_k(0.3 + 0.5 * u, v)

    def clamped_k(self, u, v, w):
        """Independent masks at a uniform rate, at least one, with weight L/k."""
        mask = v <= torch.maximum(u, v.amin(1))[:, None]
        return Noise(mask, u.float(), mask.shape[1] / mask.sum(1).float())

    def missing_factor(self, u, v, w):
        """The mean over each sequence's masked tokens, without (L + 1)/L."""
        noise = self.continuous(u, v, w)
        L = noise.mask.shape[1]
        return noise._replace(weight=noise.weight * L / (L + 1))


@pytest.mark.parametrize("estimator", ["pooled_mean", "clipped_range", "clamped_k", "missing_factor"])
def test_invalid_estimators_fail_the_check(estimator):
    """With the Bayes-optimal denoiser: each is far from the bound, and the valid second estimator is not."""
    x0 = world_text(5_000)
    assert agree(*compare(world.oracle, Invalid(MASK), x0, "exact_k", "continuous"))
    mean, error = compare(world.oracle, Invalid(MASK), x0, "exact_k", estimator)
    assert not agree(mean, error), (mean, error)


def test_repeats_are_stratified():
    """All u together, and those of each window, fall into equal intervals; the rest is uniform on (0, 1]."""
    n, repeats, length = 50, 6, 40
    u, v, w = repeated_uniforms(3, range(n), n, repeats, length)
    assert sorted(torch.ceil(u.flatten() * n * repeats).long().tolist()) == list(range(1, n * repeats + 1))
    assert all(sorted(row) == list(range(1, repeats + 1)) for row in torch.ceil(u * repeats).long().tolist())
    for x in (u, v, w):
        assert x.min() > 0 and x.max() <= 1 and torch.histc(x.flatten(), 4, 0, 1).min() > 0.18 * x.numel()
    some = repeated_uniforms(3, [7, 3], n, repeats, length)
    assert all(torch.equal(a, b[[7, 3]]) for a, b in zip(some, (u, v, w)))


def test_stratified_error():
    """The error from neighbours is that of the mean of stratified draws, also where the noise grows towards one end, as
    it does at small mask rates, and for odd n; that of independent values is far larger."""
    generator = torch.Generator().manual_seed(0)
    for n in (9, 200):
        trend, means, errors, naive = torch.linspace(-9, 9, n, dtype=torch.float64), [], [], []
        spread = (n / torch.arange(1, n + 1)) ** 0.5
        for _ in range(1500):
            order = torch.randperm(n, generator=generator)
            values = torch.empty(n, dtype=torch.float64)
            values[order] = trend + spread * torch.randn(n, dtype=torch.float64, generator=generator)
            mean, error = mean_and_error(values, order)
            means.append(mean), errors.append(error**2), naive.append(mean_and_error(values)[1])
        truth, inside = (spread**2).sum().item() ** 0.5 / n, (18 / (n - 1)) ** 2 / n  # the trend within pairs
        assert torch.tensor(means).std().item() == pytest.approx(truth, rel=0.06)
        assert (sum(errors) / 1500) ** 0.5 == pytest.approx((truth**2 + inside / 2 * (n // 2 * 2) / n) ** 0.5, rel=0.12)
        assert sum(naive) / 1500 > 1.5 * truth
    assert math.isnan(mean_and_error(torch.ones(1))[1]) and by_rate(5, 0, repeats=2) is None


def test_errors_by_hand():
    """Pairs of neighbours give the sum of two variances each; of an odd number the last is compared with the one before
    it, which gives half of the squared difference for its own variance."""
    values, order = torch.tensor([8.0, 1.0, 20.0, 4.0, 2.0]), torch.tensor([1, 4, 3, 0, 2])  # 1, 2, 4, 8, 20
    assert mean_and_error(values, order) == pytest.approx((7.0, math.sqrt(1 + 16 + 12**2 / 2) / 5))
    assert mean_and_error(values[order][:4], torch.arange(4)) == pytest.approx((3.75, math.sqrt(1 + 16) / 4))
    assert mean_and_error(values[:2]) == pytest.approx((4.5, 3.5))
    noise = torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = [mean_and_error(row, torch.arange(5))[1] ** 2 for row in noise]
    assert sum(squares) / len(squares) == pytest.approx(1 / 5, rel=0.02)  # 4 standard deviations


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_the_order_of_rates(seed):
    """by_rate orders windows by the rate at which bound() masks them with this seed; another seed is another order."""
    u, _, _ = repeated_uniforms(seed, range(40), 40, 1, 3)
    assert (u[by_rate(40, seed), 0].diff() > 0).all()
    assert not torch.equal(by_rate(40, seed), by_rate(40, seed + 1))


def test_bound_does_not_depend_on_batches_or_shares():
    """Scoring some windows, in small batches, gives the numbers of scoring all at once."""
    model, x0 = random_network(2, "time"), random_text(40)
    data = windows_of(x0)
    whole = bound(model, MDLM(4), data, repeats=3)
    some = bound(model, MDLM(4), data._replace(batch_size=2), mine=[5, 30, 7], repeats=3)
    torch.testing.assert_close(whole[[5, 30, 7]], some, rtol=1e-5, atol=1e-5)


# ---- the chain rule --------------------------------------------------------------------------------------------------


def test_last_batch_of_one_window():
    """33 windows in batches of 8 are scored like 33 in one."""
    model, x0 = random_network(5, "none"), random_text(33)
    data = lambda size: windows_of(x0)._replace(batch_size=size)
    for measure in (
            lambda size: nll_of(model, MDLM(4), data(size), "random"),
            lambda size: torch.tensor([row["ce"] for row in measure_curve(model, MDLM(4), data(size))]),
            lambda size: torch.tensor([
                row["gap"] for row in measure_curse(model, MDLM(4), data(size), torch.ones(4))])):
        torch.testing.assert_close(measure(8), measure(100), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sees_time", [False, True])
def test_orders_are_distributions(order, sees_time):
    """The probabilities of all 27 sequences along an order sum to one, for a random denoiser."""
    model = world.random_denoiser(4, sees_time)
    v = torch.tensor([0.7, 0.2, 0.9]).expand(27, L)
    total = (-L * nll_along(model, MDLM(MASK), SEQUENCES, order, v).double()).exp().sum().item()
    assert total == pytest.approx(1, abs=1e-4)


def test_orders_differ_and_the_oracle_does_not_mind():
    """With the Bayes-optimal denoiser every order gives -log p(x); with another one each is another distribution."""
    v = torch.tensor([0.7, 0.2, 0.9]).expand(27, L)
    for order in ORDERS:
        nats = L * nll_along(world.oracle, MDLM(MASK), SEQUENCES, order, v)
        torch.testing.assert_close(nats.double(), -P_DATA.log(), rtol=1e-4, atol=1e-4)
    model = world.random_denoiser(4, False)
    scored = [nll_along(model, MDLM(MASK), SEQUENCES, order, v) for order in ORDERS]
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(scored, 2))


def test_confidence_order_by_hand():
    """The first token revealed is where the largest probability stands, and so on."""
    model, x0 = world.random_denoiser(5, False), SEQUENCES[17:18]
    xt, nats = torch.full((1, L), MASK), 0.0
    for _ in range(L):
        p = model(xt, torch.ones(1)).softmax(-1)[0]
        best = max((i for i in range(L) if xt[0, i] == MASK), key=lambda i: p[i].max())
        nats -= p[best, x0[0, best]].log().item()
        xt[0, best] = x0[0, best]
    assert L * nll_along(model, MDLM(MASK), x0, "confidence").item() == pytest.approx(nats, rel=1e-5)


@pytest.mark.parametrize("objective", [MDLM(MASK, "cosine"), D3PM(MASK, 9)], ids=["mdlm", "d3pm"])
def test_orders_tell_the_share_of_masks(objective):
    """With k of L tokens masked a network is told the time at which a share k/L is expected to be."""
    told = []

    def model(xt, t, where):
        told.append(set(t.tolist()))
        assert ((xt == MASK).sum(1) == L + 1 - len(told)).all()
        return torch.zeros(int(where.sum()), V)

    nll_along(model, objective, SEQUENCES, "l2r")
    expected = objective.time(torch.tensor([3, 2, 1], dtype=torch.float64) / L).tolist()
    assert told == [{t} for t in expected] and expected[0] == 1 and expected[2] < expected[1] < 1


@pytest.mark.parametrize("all_at", [(), (2,), (1, 3)])
def test_only_what_is_asked_for_is_computed(all_at):
    """reveal() computes the cost of all masks if their number is in all_at, else of the next one. It is 0 elsewhere."""
    model, asked = world.random_denoiser(6, False), []

    def network(xt, t, where):
        asked.append(where.sum(1).tolist())
        return model(xt, t, where)

    order = torch.tensor([2, 0, 1]).expand(27, L)
    for k, (position, masked, ce) in zip((3, 2, 1), reveal(network, MDLM(MASK), SEQUENCES, order, all_at)):
        assert (position == order[0, 3 - k]).all() and (masked.sum(1) == k).all()
        assert asked[-1] == [k if k in all_at else 1] * 27 == (ce > 0).sum(1).tolist()


# ---- over all orders -------------------------------------------------------------------------------------------------

ALL_ORDERS = torch.tensor(list(itertools.permutations(range(L))))  # (6, L)


def log_p_along(model):
    """log p(x | order) of all sequences and orders of the world by the chain rule written out: (27, 6)."""
    found = torch.zeros(len(SEQUENCES), len(ALL_ORDERS), dtype=torch.float64)
    for i, x in enumerate(SEQUENCES):
        for j, order in enumerate(ALL_ORDERS):
            xt = torch.full((1, L), MASK)
            for step, position in enumerate(order):
                t = torch.tensor([(L - step) / L])
                found[i, j] += model(xt, t)[0, position].log_softmax(-1)[x[position]]
                xt[0, position] = x[position]
    return found


@pytest.mark.parametrize("sees_time", [True, False])
def test_two_sides_of_the_likelihood(sees_time):
    """By enumeration of all orders: p is a distribution; the log-mean of K orders is below log p, rises with K, and is
    the bound at K = 1; with the true order of a sample among them it is above log p, falls with K; both tend to it."""
    l = log_p_along(world.random_denoiser(3, sees_time))
    log_p = l.logsumexp(1) - math.log(6)
    assert log_p.exp().sum().item() == pytest.approx(1)
    truth = (log_p.exp() * log_p).sum()
    true_order = (l - math.log(6)).exp()  # p(x, order)
    below, above = [], []
    for K in (1, 2, 3):
        tuples = torch.tensor(list(itertools.product(range(6), repeat=K)))
        values = log_mean(l[:, tuples].flatten(0, 1)[:, None]).view(27, -1)
        assert (values.mean(1) < log_p).all()
        below.append((log_p.exp() * values.mean(1)).sum())
        others = values.view(27, 6, -1).mean(2)  # the mean over all but the first order
        above.append((true_order * others).sum())
    assert below[0] < below[1] < below[2] < truth < above[2] < above[1] < above[0]
    assert below[0] == pytest.approx((log_p.exp() * l.mean(1)).sum())
    orders = torch.randint(6, (4000,), generator=torch.Generator().manual_seed(0))
    assert log_mean(l[:, None, orders]).sub(log_p).abs().max() < 0.2


@pytest.mark.parametrize("sees_time", [True, False])
def test_orders_of_the_world(sees_time):
    """along_orders and draw_with_orders by the chain rule written out; samples have the distribution E exp l."""
    model, objective, n = world.random_denoiser(3, sees_time), MDLM(MASK), 20000
    l = log_p_along(model)
    g = torch.Generator().manual_seed(1)
    v, u = torch.rand(2, n, L, generator=g, dtype=torch.float64)
    number = lambda rows: (rows * torch.tensor([V**2, V, 1])).sum(1)
    place = {tuple(order.tolist()): i for i, order in enumerate(ALL_ORDERS)}
    which = torch.tensor([place[tuple(order)] for order in v.argsort(1).tolist()])
    x0, drawn = draw_with_orders(model, objective, v, u, CPU)
    torch.testing.assert_close(drawn[:, 0], l[number(x0), which], atol=1e-5, rtol=1e-5)
    again = along_orders(model, objective, x0, v[:, None])
    torch.testing.assert_close(again[:, 0, 0], drawn[:, 0], atol=1e-5, rtol=1e-5)
    p = l.exp().mean(1)
    frequency = torch.bincount(number(x0), minlength=27) / n
    assert (frequency - p).abs().max() < 5 * (0.25 / n) ** 0.5
    only_true = two_sides(torch.zeros(n, 1, 1), torch.zeros(n, 1, 1), drawn)["samples_below"]
    torch.testing.assert_close(only_true, -drawn[:, 0])  # K = 1: the true order alone
    data = windows_of(world_text(1000))
    found = two_sides(*measure_orders(model, objective, data, 3))
    assert (found["log_mean"] <= found["bound"] + 1e-9).all()
    sides = [found[name].mean().item() for name in ("samples_below", "samples_above")]
    error = max(found[name].std().item() for name in found) / 1000**0.5
    assert sides[0] - 4 * error < -(p * p.log()).sum() < sides[1] + 4 * error and sides[0] < sides[1]


@pytest.mark.parametrize("conditioning", ["none", "time"])
def test_orders_in_blocks(conditioning):
    """Texts of block diffusion are drawn block after block, with the likelihood that along_orders gives them."""
    model = network(4, std=0.5, seq_len=6, conditioning=conditioning, objective="block", block_size=3)
    objective = BlockDiffusion(4, 3)
    v, u = torch.rand(2, 5, 6, dtype=torch.float64)
    x0, l = draw_with_orders(model.eval(), objective, v, u, CPU)
    assert l.shape == (5, 2)
    torch.testing.assert_close(along_orders(model, objective, x0, v[:, None])[..., 0], l, atol=1e-5, rtol=1e-5)


def test_orders_command(call, trained, data_dir):
    """evaluate.py --orders says both sides, and refuses what has no orders."""
    flags = ["--data_dir", data_dir, "--n_tokens=320"]
    result = json.loads(call("evaluate.py", trained, "--orders=3", "--json", *flags).out)
    assert result["log_mean"]["bits_per_token"] < result["bound"]["bits_per_token"]
    assert result["samples_below"]["bits_per_token"] < result["samples_above"]["bits_per_token"]
    assert result["orders"] == 3 and result["gap"]["stderr"] > 0
    assert_one_line(call("evaluate.py", trained, "--orders=33", *flags), "use --batch_size 33 or more")
    assert_one_line(call("evaluate.py", trained, "--orders=3", "--repeats=2", *flags), "leave them out with --orders")


def test_autoregressive_prefixes():
    """The likelihood from prefixes alone is that of one causal pass; a network that looks to the right is found out."""
    x0 = random_text(50)
    for causal in (True, False):
        model, objective = random_network(3, "none", causal=causal), AutoRegressive(4)
        mean, error = mean_and_error(bound(model, objective, windows_of(x0))
                                     - nll_of(model, objective, windows_of(x0), "l2r"))
        assert agree(mean, error if causal else 0) == causal


# ---- studies ---------------------------------------------------------------------------------------------------------


def test_curve():
    """Its points are the enumerated cross-entropies, and the area under it is the bound."""
    x0 = world_text(3000)
    rows = measure_curve(world.oracle, MDLM(MASK), windows_of(x0))
    assert [row["masks"] for row in rows] == [1, 2, 3]
    for row in rows:
        masks = [mask for mask in world.MASKS if mask.sum() == row["masks"]]
        exact = sum((P_DATA * ce_at(mask)).sum().item() for mask in masks) / len(masks) / row["masks"]
        assert abs(row["ce"] - exact) < 4 * row["stderr"] < 0.08
    assert area(rows) == pytest.approx(ENTROPY / L, rel=0.04)


def ce_at(mask):
    """Summed cross-entropy of the oracle at these positions, for every sequence: (27,) nats."""
    log_p = world.oracle(torch.where(mask, MASK, SEQUENCES))
    return (cross_entropy(log_p, SEQUENCES) * mask).sum(1).double()


def test_area_of_a_line():
    """Measured at some k only: the mean over all k of a line is exact."""
    assert area([dict(masks=k, ce=float(k)) for k in (1, 4, 9, 10)]) == pytest.approx(5.5)


def test_curse_is_the_total_correlation():
    """With the Bayes-optimal denoiser the gap of k tokens is their total correlation given the others, enumerated."""
    x0, n_chars = world_text(8_000), torch.tensor([1, 2, 3])
    rows = measure_curse(world.oracle, MDLM(MASK), windows_of(x0), n_chars)
    assert [row["tokens"] for row in rows] == [1, 2, 3] and abs(rows[0]["gap"]) < 1e-6
    for row in rows:
        gaps, sizes = [], []
        for mask in (mask for mask in world.MASKS if mask.sum() == row["tokens"]):
            same = ((SEQUENCES[:, None] == SEQUENCES) | mask).all(-1).double()   # agree at the visible positions
            joint = -(P_DATA / (same @ P_DATA)).log()                            # -log p(x_S | the others)
            gaps.append((P_DATA * (ce_at(mask) - joint)).sum())
            sizes.append((P_DATA * (n_chars[SEQUENCES] * mask).sum(1)).sum())
        exact = (sum(gaps) / sum(sizes)).item()
        assert abs(row["gap"] - exact) <= 4 * row["stderr"] + 1e-6 and row["stderr"] < 0.02
        assert row["characters"] == pytest.approx((sum(sizes) / len(sizes)).item(), rel=0.02)
        assert row["parallel"] - row["sequential"] == pytest.approx(row["gap"])


def test_curse_of_tokens_without_characters():
    """Nothing is said of k tokens that have no characters, such as pads."""
    x0, n_chars = torch.tensor([[0, 0, 0], [0, 0, 1]]), torch.tensor([0, 1, 1])
    found = [row["characters"] for row in measure_curse(world.oracle, MDLM(MASK), windows_of(x0), n_chars)]
    assert found and 0 not in found
    assert measure_curse(world.oracle, MDLM(MASK), windows_of(x0[:1]), n_chars) == []


def test_errors_of_the_curse():
    """They are the spread of the gap over many texts, of tokens with very different numbers of characters."""
    found = [measure_curse(world.oracle, MDLM(MASK), windows_of(world_text(50, seed)), torch.tensor([1, 60, 1]), seed)
             for seed in range(400)]
    for i in (1, 2):
        gaps, errors = (torch.tensor([rows[i][key] for rows in found]) for key in ("gap", "stderr"))
        assert errors.mean().item() == pytest.approx(gaps.std().item(), rel=0.15)


def test_variance_of_the_reported_bound():
    """The reported estimator has at most a quarter of the variance of the papers' way, s uniform and tokens masked
    independently, with as many network calls on the same windows. Both have the same mean (T = 1000 is nearly
    continuous)."""
    model, data = random_network(4, "none", seq_len=16), windows_of(random_text(8, seq_len=16))
    x0, chain, generator = data.read(range(8)).repeat_interleave(8, 0), D3PM(4), torch.Generator().manual_seed(0)
    ours, naive = [], []
    for trial in range(60):
        ours.append(bound(model, MDLM(4), data, seed=trial, repeats=8).mean())
        u, v = (1 - torch.rand(shape, dtype=torch.float64, generator=generator) for shape in ((64,), (64, 16)))
        with torch.no_grad():
            naive.append(chain.nelbo(model, x0, chain.noise(u, v)).double().mean())
    (mean, error), (other, other_error) = (mean_and_error(torch.stack(values)) for values in (ours, naive))
    assert abs(mean - other) < 4 * math.hypot(error, other_error) and error**2 < other_error**2 / 4
