"""docs/maths.md: every numbered claim on a case that is small enough to enumerate, and the names that the page uses."""

import ast
import itertools
import math
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import D3PM, MDLM, SEDD, Absorbing
from hybrid import Hybrid
from networks import log_scores
from randomness import uniforms
from sampler_settings import bound_on_grid
from sampling import Settings, euler_chance
from schedules import make_schedule
from uniform import Uniform, UniformD3PM, posterior, prior_kl
from world import picked

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/maths.md").read_text(encoding="utf-8")
L, V = 3, 2
TEXTS = np.array(list(itertools.product(range(V), repeat=L)))    # (8, L)
MASKS = np.array(list(itertools.product([0, 1], repeat=L)))      # (8, L)
Q_DATA = np.random.default_rng(1).dirichlet(np.ones(len(TEXTS)))
NODES, WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(80))
NODES = NODES + 0.5                                               # of integrals over (0, 1)


def ce_table(seed):
    """A network by what it costs: CE (mask set, position) for one text, at time t, smooth in t."""
    level, slope = np.random.default_rng(seed).uniform(0.2, 2, (2, len(MASKS), L))
    return lambda t, sees_time: level + slope * math.sin(3 * t if sees_time else 1)


def masked_sum(r, ce):
    """E of the sum over masks of CE when each token is masked with probability r, ce (mask set, position)."""
    probability = np.prod(np.where(MASKS, r, 1 - r), 1)
    return (probability * (ce * MASKS).sum(1)).sum()


def C(r, ce):
    """The mean CE of a masked token when the others are masked with probability r."""
    total = 0
    for i in range(L):
        others = np.prod(np.delete(np.where(MASKS, r, 1 - r), i, 1), 1)
        total += (others * MASKS[:, i] * ce[:, i]).sum()
    return total / L


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def test_example():
    """Section 1: the numbers of the example, by the code."""
    x0, u, v = torch.tensor([[2, 0, 1]]), tensor([0.5]), tensor([[0.7, 0.2, 0.9]])
    table = tensor([[0.45, 0.45, 0.1], [0.5, 0.25, 0.25], [1, 1, 1]]).log()[None]  # letters a, t, c by position
    model = lambda xt, t, where: picked(table, where)
    noise = MDLM(3).exact_k(u, v)
    assert MDLM(3).corrupt(x0, noise.mask).tolist() == [[3, 3, 1]] and noise.t.item() == pytest.approx(0.7)
    nats = MDLM(3).nelbo(model, x0, noise).item()
    assert (3 * nats, nats, nats / math.log(2)) == pytest.approx((4.494, 1.498, 2.161), abs=5e-4)
    noise = D3PM(3, 10).noise(tensor([0.65]), v)
    assert noise.t.item() == pytest.approx(0.7) and noise.mask.tolist() == [[True, True, False]]
    assert 3 * D3PM(3, 10).nelbo(model, x0, noise).item() == pytest.approx(4.280, abs=5e-4)


# ---- masks -----------------------------------------------------------------------------------------------------------


def one_step(keep):
    """Q (V + 1, V + 1) of masks: a token survives with probability keep."""
    Q = np.eye(V + 1) * keep
    Q[:, V] += 1 - keep
    return Q


def by_bayes(Q_before, Q_step, x0, xt):
    """q(x_tau | x_t, x_0) from the matrices to tau and from tau to t."""
    joint = Q_before[x0] * Q_step[:, xt]
    return joint / joint.sum()


def test_forward_process():
    """Section 2: survival multiplies, beta_s = 1/(T - s + 1), and the posterior by Bayes reveals with 1 - rho/r."""
    T = 5
    for s in range(1, T):
        assert 1 - (1 - s / T) / (1 - (s - 1) / T) == pytest.approx(1 / (T - s + 1))
    for alpha_t, alpha_tau in ((0.3, 0.7), (0.0, 0.2), (0.5, 1.0)):
        step = one_step(alpha_t / alpha_tau)
        np.testing.assert_allclose(one_step(alpha_tau) @ step, one_step(alpha_t))
        h = 1 - (1 - alpha_tau) / (1 - alpha_t)
        assert h == pytest.approx((alpha_tau - alpha_t) / (1 - alpha_t))
        np.testing.assert_allclose(by_bayes(one_step(alpha_tau), step, 1, V), [0, h, 1 - h], atol=1e-15)
        if alpha_t > 0:
            np.testing.assert_allclose(by_bayes(one_step(alpha_tau), step, 1, 1), [0, 1, 0], atol=1e-15)
    v = (torch.arange(1000, dtype=torch.float64) + 0.5)[None] / 1000
    for s in range(1, T + 1):
        assert D3PM(V, T).noise(tensor([(s - 0.5) / T]), v).mask.double().mean().item() == pytest.approx(s / T)


def test_schedules():
    """Section 2: alpha and w of each schedule as the table has them."""
    t, eps, low, high = NODES, 1e-3, 1e-4, 20.0
    sigma = low ** (1 - t) * high**t
    for name, alpha, weight in (
            ("linear", 1 - t, 1 / t), ("loglinear", 1 - (1 - eps) * t, 1 / t),
            ("cosine", 1 - np.cos(math.pi / 2 * (1 - t)), math.pi / 2 * np.tan(math.pi / 2 * (1 - t))),
            ("geometric", np.exp(-sigma), sigma * math.log(high / low) / np.expm1(sigma))):
        schedule = make_schedule(name)
        np.testing.assert_allclose(schedule.alpha(tensor(t)), alpha, rtol=1e-9)
        np.testing.assert_allclose(schedule.weight(tensor(t)), weight, rtol=1e-6)


def test_bound_is_a_sum_of_kls():
    """Section 3: over all paths of 2 tokens and 3 steps the bound is the sum of KLs, and its gap is the KL of paths."""
    T, n, alphas = 3, 2, [1.0, 0.7, 0.4, 0.0]
    states = list(itertools.product(range(V + 1), repeat=n))
    x0, index = (0, 1), {state: i for i, state in enumerate(states)}
    x_theta = np.random.default_rng(2).dirichlet(np.ones(V), (len(states), n))
    steps = [None] + [one_step(alphas[s] / alphas[s - 1]) for s in range(1, T + 1)]
    before = [one_step(a) for a in alphas]

    def learned(s, xs):
        """p(x_{s-1} | x_s) at each position, (n, V + 1)."""
        p = np.zeros((n, V + 1))
        for i, token in enumerate(xs):
            if token < V:
                p[i, token] = 1
            else:
                h = 1 - (1 - alphas[s - 1]) / (1 - alphas[s])
                p[i] = [*(h * x_theta[index[xs], i]), 1 - h]
        return p

    def chance(p, x):
        return math.prod(p[i][token] for i, token in enumerate(x))

    kls = 0.0
    for s in range(1, T + 1):
        for xs in states:
            weight = chance([before[s][token] for token in x0], xs)
            if weight > 0:
                q, p = [by_bayes(before[s - 1], steps[s], a, b) for a, b in zip(x0, xs)], learned(s, xs)
                kls += weight * sum(q[i][y] * math.log(q[i][y] / p[i][y])
                                    for i in range(n) for y in range(V + 1) if q[i][y] > 0)
    p_x0, bound, log_ratio_of_paths = 0.0, 0.0, []
    for path in itertools.product(states, repeat=T):  # x_1 ... x_T
        q, p, now = 1.0, float(path[-1] == (V, V)), x0
        for s, xs in enumerate(path, 1):
            q *= chance([steps[s][token] for token in now], xs)
            p *= chance(learned(s, xs), now)
            now = xs
        p_x0 += p
        if q > 0:
            bound += q * math.log(q / p)
            log_ratio_of_paths.append((q, p))
    assert bound == pytest.approx(kls, rel=1e-10)
    gap = sum(q * math.log(q / (p / p_x0)) for q, p in log_ratio_of_paths)
    assert gap > 1e-3 and bound + math.log(p_x0) == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_kl_is_a_cross_entropy(schedule):
    """Section 4: the KL is h CE at a mask and 0 at a visible token, which D3PM's eq. 4 keeps by itself."""
    T, x0, x_theta = 6, 1, np.array([0.3, 0.7])
    alphas = make_schedule(schedule).alpha(torch.arange(T + 1, dtype=torch.float64) / T).clamp(min=0).numpy()
    for s in range(1, T + 1):
        before, step = one_step(alphas[s - 1]), one_step(alphas[s] / alphas[s - 1])
        h = (alphas[s - 1] - alphas[s]) / (1 - alphas[s])
        for xs in (x0, V):
            if xs == x0 and alphas[s] < 1e-9:
                continue
            q = by_bayes(before, step, x0, xs)
            p = (x_theta[:, None] * before[:V] * step[:, xs]).sum(0)
            p = p / p.sum()
            kl = sum(a * math.log(a / b) for a, b in zip(q, p) if a > 0)
            assert kl == pytest.approx(-h * math.log(x_theta[x0]) if xs == V else 0, abs=1e-12)
        noise = D3PM(V, T, schedule).noise(tensor([(s - 0.5) / T]), torch.ones(1, 1, dtype=torch.float64))
        assert noise.weight.item() == pytest.approx(T * h, rel=1e-6)
        if schedule == "linear":
            assert h == pytest.approx(1 / s)


def test_infinitely_many_steps():
    """Section 5: T/s is 1/t, other weights differ by O(1/T), and the bounds are areas of C(r)."""
    T = 16
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    noise = D3PM(V, T).noise(t - 0.5 / T, torch.ones(T, 1, dtype=torch.float64))
    torch.testing.assert_close(noise.weight, (1 / t).float())
    torch.testing.assert_close(make_schedule("linear").weight(t), 1 / t)
    cosine, at = make_schedule("cosine"), tensor(0.4)
    far, near = ((cosine.alpha(at - dt) - cosine.alpha(at)) / dt / (1 - cosine.alpha(at)) - cosine.weight(at)
                 for dt in (1e-3, 1e-4))
    assert 0 < abs(near) < 1e-3 and (far / near).item() == pytest.approx(10, rel=0.01)

    ce = ce_table(3)(0, sees_time=False)
    for r in (0.2, 0.9):
        assert masked_sum(r, ce) == pytest.approx(r * L * C(r, ce))
    for schedule in ("linear", "cosine"):
        a = make_schedule(schedule).alpha(torch.arange(T + 1, dtype=torch.float64) / T).numpy()
        bound = sum((a[s - 1] - a[s]) / (1 - a[s]) * masked_sum(1 - a[s], ce) for s in range(1, T + 1))
        assert bound == pytest.approx(L * sum((a[s - 1] - a[s]) * C(1 - a[s], ce) for s in range(1, T + 1)))
        rates = (1 - a).tolist()
        assert bound / L == pytest.approx(bound_on_grid(rates, [C(r, ce) for r in rates], rates[::-1]))


def test_optimal_network_costs_more_at_higher_rates():
    """Section 5: of the Bayes-optimal network C(r) rises, averaged over the data, and so T steps cost more."""
    def mean_C(r):
        total = 0.0
        for x, q in zip(TEXTS, Q_DATA):
            ce = np.zeros((len(MASKS), L))
            for m, mask in enumerate(MASKS):
                agree = Q_DATA * ((TEXTS == x) | (mask == 1)).all(1)
                ce[m] = [-math.log(agree[TEXTS[:, i] == x[i]].sum() / agree.sum()) for i in range(L)]
            total += q * C(r, ce)
        return total
    values = [mean_C(r) for r in np.linspace(0, 1, 6)]
    assert (np.diff(values) > 0).all()
    area = (WEIGHTS * [mean_C(r) for r in NODES]).sum()
    assert np.mean(values[1:]) > area  # 5 steps
    entropy = -(Q_DATA * np.log(Q_DATA)).sum()
    assert L * area == pytest.approx(entropy)  # and the continuous bound is tight


def continuous_bound(schedule, ce, sees_time):
    """The integral over t of w(t) E[sum over masks of CE]."""
    schedule, total = make_schedule(schedule), 0.0
    for t, weight in zip(NODES, WEIGHTS):
        r = 1 - schedule.alpha(tensor(t)).item()
        total += weight * schedule.weight(tensor(t)).item() * masked_sum(r, ce(t, sees_time))
    return total


def test_network_without_the_time():
    """Section 6: its bound is the same for two schedules and the area under C(r); with the time it is not."""
    ce = ce_table(4)
    bounds = [continuous_bound(schedule, ce, sees_time=False) for schedule in ("linear", "cosine")]
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-9)
    assert bounds[0] == pytest.approx(L * sum(w * C(r, ce(0, False)) for r, w in zip(NODES, WEIGHTS)), rel=1e-9)
    seeing = [continuous_bound(schedule, ce, sees_time=True) for schedule in ("linear", "cosine")]
    assert abs(seeing[0] - seeing[1]) > 0.01
    area = lambda low, high: L * (high - low) * sum(
        w * C(low + (high - low) * r, ce(0, False)) for r, w in zip(NODES, WEIGHTS))
    first, last = -math.expm1(-0.3), -math.expm1(-2)
    for name, low, high in (("loglinear:0.2", 0, 0.8), ("geometric:0.3:2", first, last)):  # the rates from t = 0 to 1
        rest = area(0, low) + area(high, 1)
        assert continuous_bound(name, ce, sees_time=False) + rest == pytest.approx(bounds[0], rel=1e-9)
    assert MDLM(V, "loglinear:0.2").time(torch.tensor([0.4, 0.9], dtype=torch.float64)).tolist() == [0.5, 1.0]
    assert MDLM(V, "geometric:0.3:2").time(torch.tensor([0.2, 0.9], dtype=torch.float64)).tolist() == [0.0, 1.0]
    rate = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    torch.testing.assert_close(1 - make_schedule("cosine").alpha(Absorbing(V, "cosine").time(rate)), rate.float())


def beta(r, a, b):
    return math.gamma(a + b) / math.gamma(a) / math.gamma(b) * r ** (a - 1) * (1 - r) ** (b - 1)


def of_k_masks(k, ce):
    """F_k: the mean over all sets of k masks of the sum of their CE."""
    rows = MASKS.sum(1) == k
    return (ce * MASKS)[rows].sum() / rows.sum()


def test_exactly_k_masks():
    """Section 7: the binomial integrates to 1/k, so k uniform with weight L/k is the bound."""
    ce = ce_table(5)
    for n, k in ((3, 1), (8, 3), (8, 8)):
        assert (WEIGHTS * math.comb(n, k) * NODES ** (k - 1) * (1 - NODES) ** (n - k)).sum() == pytest.approx(1 / k)
    bound = sum(of_k_masks(k, ce(0, False)) / k for k in range(1, L + 1))
    assert bound == pytest.approx(continuous_bound("linear", ce, sees_time=False))
    n = 6
    u, v = (torch.arange(n, dtype=torch.float64) + 0.5) / n, uniforms(0, 0, range(n), n, n, False)[1]
    noise = MDLM(V).exact_k(u, v)
    assert noise.mask.sum(1).tolist() == [1, 2, 3, 4, 5, 6]
    torch.testing.assert_close(noise.weight, torch.tensor([6.0, 3, 2, 1.5, 1.2, 1]))
    torch.testing.assert_close(noise.t.double(), v.sort(1).values.diagonal(), rtol=1e-6, atol=0)


def test_the_rate_given_k_masks():
    """Section 7: Beta(k, L - k + 1) under the weight 1/r, Beta(k + 1, L - k + 1) under a uniform rate."""
    for k in range(1, L + 1):
        binomial = math.comb(L, k) * NODES**k * (1 - NODES) ** (L - k)
        weighted = binomial / NODES
        np.testing.assert_allclose(weighted / (WEIGHTS * weighted).sum(), beta(NODES, k, L - k + 1), rtol=1e-9)
        np.testing.assert_allclose(binomial / (WEIGHTS * binomial).sum(), beta(NODES, k + 1, L - k + 1), rtol=1e-9)
        assert (WEIGHTS * NODES * beta(NODES, k, L - k + 1)).sum() == pytest.approx(k / (L + 1))
        assert (WEIGHTS * NODES * beta(NODES, k + 1, L - k + 1)).sum() == pytest.approx((k + 1) / (L + 2))
        assert (WEIGHTS / NODES * beta(NODES, k + 1, L - k + 1)).sum() == pytest.approx((L + 1) / k)
        cdf = sum(math.comb(L, j) * 0.3**j * 0.7 ** (L - j) for j in range(k, L + 1))  # k numbers or more are below 0.3
        below = (0.3 * WEIGHTS * beta(0.3 * NODES, k, L - k + 1)).sum()
        assert below == pytest.approx(cdf)
    ce = ce_table(6)
    bound = sum(w / k * beta(r, k, L - k + 1) * of_k_masks(k, ce(r, True))
                for k in range(1, L + 1) for r, w in zip(NODES, WEIGHTS))
    assert bound == pytest.approx(continuous_bound("linear", ce, sees_time=True))
    wrong = sum(w / k * beta(r, k + 1, L - k + 1) * of_k_masks(k, ce(r, True))
                for k in range(1, L + 1) for r, w in zip(NODES, WEIGHTS))
    assert abs(wrong - bound) > 0.01


def test_continuous_estimator():
    """Section 7: independent masks at a uniform rate have the weight (L + 1)/k, and rates of Beta(k, L - k + 1)."""
    B, n = 20_000, 4
    generator = torch.Generator().manual_seed(3)
    u, v, w = (1 - torch.rand(B, *shape, dtype=torch.float64, generator=generator) for shape in ((), (n,), ()))
    noise, k = MDLM(V).continuous(u, v, w), (v <= u[:, None]).sum(1)
    for number in range(n + 1):
        here = k == number
        assert here.double().mean().item() == pytest.approx(1 / (n + 1), abs=4 * 0.4 / B**0.5)
        assert noise.weight[here].unique().tolist() == pytest.approx([(n + 1) / number if number else 0])
        if number:
            t = noise.t[here].double()
            assert t.mean().item() == pytest.approx(number / (n + 1), abs=4 * t.std().item() / len(t) ** 0.5)


def test_variance():
    """Section 7: the second moment with weight 1/t grows as log(1/eps); with weight L/k no draw is above L max CE."""
    ce = ce_table(7)(0, sees_time=False)
    squares = ((ce * MASKS).sum(1)) ** 2

    def moment(low, high):
        """The part of times low ... high, by the variable log t."""
        t = np.exp(math.log(low) + NODES * math.log(high / low))
        probability = np.prod(np.where(MASKS, t[:, None, None], 1 - t[:, None, None]), 2)
        return (WEIGHTS * math.log(high / low) * t * (probability * squares).sum(1) / t**2).sum()

    one_mask = (squares * (MASKS.sum(1) == 1)).sum()  # L times the mean of CE^2
    for low in (1e-6, 1e-8):
        assert moment(low, 10 * low) == pytest.approx(one_mask * math.log(10), rel=1e-4)
    k = MASKS.sum(1)[1:]
    assert (L / k * (ce * MASKS).sum(1)[1:]).max() <= L * ce.max()


def test_auxiliary_loss():
    """Section 8: of weights averaged over masked tokens auxiliary : bound = 25.025, in sums and in D3PM.loss."""
    T, lam = 1000, 0.05
    s = np.arange(1, T + 1)
    bound, masked, visible = np.mean(s / T / s), np.mean(s / T * lam), np.mean((1 - s / T) * lam)
    assert (bound, masked, visible) == pytest.approx((0.001, 0.025025, 0.024975))
    assert masked / bound == pytest.approx(lam * (T + 1) / 2) == pytest.approx(25.025)
    assert 1 / 1000 + lam == pytest.approx(0.051) and 1 / 201 + lam == pytest.approx(0.055, abs=5e-5)
    assert s[200:].sum() / s.sum() == pytest.approx(1 - 200 * 201 / (1000 * 1001)) == pytest.approx(0.96, abs=5e-4)

    def sure(xt, t, where=None):  # CE is log 2 at masks and 0 at visible tokens
        return 1e4 * torch.nn.functional.one_hot(xt, 3)[..., :2].float()

    objective, n = D3PM(2, T, lambda_ce=lam), 100
    u, v = (torch.arange(T, dtype=torch.float64) + 0.5) / T, (torch.arange(n, dtype=torch.float64) + 0.5) / n
    v = (v[None] + torch.arange(T)[:, None] * 0.61803) % 1  # every s, and 100 levels of v that move with it
    x0 = torch.zeros(T, n, dtype=torch.long)
    noise = objective.noise(u, v)
    loss, nelbo = objective.loss(sure, x0, noise)
    auxiliary = loss.item() - nelbo.mean().item() / T
    assert auxiliary / (nelbo.mean().item() / T) == pytest.approx(25.025, rel=0.01)


def test_scores():
    """Section 9: the ratio of marginals at a mask is odds times the prediction from the visible tokens."""
    alpha = 0.3

    def marginal(x):  # -1 is the mask
        return sum(q * math.prod((1 - alpha) if a < 0 else alpha * (a == b) for a, b in zip(x, text))
                   for text, q in zip(TEXTS, Q_DATA))

    odds = 1 / math.expm1(-math.log(alpha))
    assert odds == pytest.approx(alpha / (1 - alpha))
    for x in itertools.product((-1, 0, 1), repeat=L):
        agree = Q_DATA * np.array([all(a in (-1, b) for a, b in zip(x, text)) for text in TEXTS])
        for i in (i for i in range(L) if x[i] < 0):
            for y in range(V):
                prediction = agree[TEXTS[:, i] == y].sum() / agree.sum()
                score = marginal(x[:i] + (y,) + x[i + 1:]) / marginal(x)
                assert score == pytest.approx(odds * prediction)
                assert (agree / agree.sum() * odds * (TEXTS[:, i] == y)).sum() == pytest.approx(score)  # E[c_y | x_t]


def test_score_entropy():
    """Section 9: a short step's KL is the score entropy, which is w (CE + Z - 1 - log Z), and SEDD.cost times w."""
    rng = np.random.default_rng(8)
    R, learned, dt = *rng.uniform(0.2, 2, (2, 3)), 1e-5
    q, p = np.array([*(R * dt), 1 - R.sum() * dt]), np.array([*(learned * dt), 1 - learned.sum() * dt])
    rate = (learned - R + R * np.log(R / learned)).sum()
    assert (q * np.log(q / p)).sum() / dt == pytest.approx(rate, rel=1e-3)
    t, x0, S = tensor(0.35), 2, rng.uniform(0.1, 1, 4)
    schedule = make_schedule("loglinear")
    alpha = schedule.alpha(t).item()
    slope, odds = -schedule.dalpha(t).item() / alpha, alpha / (1 - alpha)
    score_entropy = slope * (S.sum() - odds * math.log(S[x0]) + odds * (math.log(odds) - 1))
    f = S / odds
    Z, w = f.sum(), schedule.weight(t).item()
    assert slope * odds == pytest.approx(w)
    assert score_entropy == pytest.approx(w * (Z - 1 - math.log(f[x0])))
    assert score_entropy == pytest.approx(w * (-math.log(f[x0] / Z) + Z - 1 - math.log(Z)))
    assert Z - 1 - math.log(Z) > 0
    for scaled in (False, True):
        objective = SEDD(4, scaled=scaled)
        logits = torch.from_numpy(np.log(f * 4 if scaled else S))[None].float()
        assert w * objective.cost(logits, torch.tensor([x0]), t[None]).item() == pytest.approx(score_entropy, rel=1e-5)
        found = log_scores(objective, logits, t[None])[0].exp()
        torch.testing.assert_close(found.double(), tensor(S), rtol=1e-5, atol=0)


# ---- sampling --------------------------------------------------------------------------------------------------------


def zeros(xt, t, where=None):
    """A network that gives all tokens the same probability."""
    logits = torch.zeros(*xt.shape, V)
    return picked(logits, where)


def states(settings, B, n, time=None):
    """The states of a sampler that begins with B sequences of n masks, and how many steps each of them stands for."""
    xt, generator, objective = torch.full((B, n), V), torch.Generator().manual_seed(0), MDLM(V)
    objective.time = time or objective.time
    return [(state.xt, state.steps) for state in settings.states(objective, zeros, xt, generator)]


def test_ancestral():
    """Section 10: the chances to stay a mask multiply to rho_m/rho_0, the sampler reveals rho_(m-1) - rho_m in step m,
    and this gives the number of steps that reveal something."""
    grid, B, n = [1.0, 0.55, 0.5, 0.2, 0.0], 3000, 4
    assert math.prod(b / a for a, b in zip(grid[:3], grid[1:4])) == pytest.approx(grid[3])
    step, revealed = torch.zeros(B, 1, dtype=torch.long), torch.full((B, n), 99)  # the step that reveals each token
    for xt, steps in states(Settings("ancestral", {"grid": grid}), B, n):
        step += steps[:, None]
        revealed = torch.where((xt != V) & (revealed == 99), step, revealed)
    assert (step == 4).all()
    for i, rate in enumerate(grid):
        found = (revealed > i).double().mean().item()
        assert found == pytest.approx(rate, abs=4 * (rate * (1 - rate) / (B * n)) ** 0.5 + 1e-12)
    calls = torch.tensor([len(row.unique()) for row in revealed], dtype=torch.float64)
    expected = sum(1 - (1 - (before - after) / grid[0])**n for before, after in zip(grid, grid[1:]))
    assert calls.mean().item() == pytest.approx(expected, abs=4 * calls.std().item() / B**0.5)
    assert 1000 * (1 - (1 - 1 / 1000)**128) == pytest.approx(120.2, abs=0.05)
    for schedule, linear in (("linear", True), ("loglinear", True), ("cosine", False)):  # the Euler step
        chance = euler_chance(make_schedule(schedule), 0.6, 0.5)
        assert (chance == pytest.approx(1 - 0.5 / 0.6)) == linear


def test_first_hitting():
    """Section 10: r u^(1/k) is the largest of k uniform numbers, and the rates told are all order statistics."""
    for k, r, rho in ((1, 0.9, 0.3), (3, 0.9, 0.8)):
        u = (np.arange(2000) + 0.5) / 2000
        assert (r * u ** (1 / k) <= rho).mean() == pytest.approx((rho / r) ** k, abs=1e-3)
    B, n, told = 4000, 4, []

    def time(rate):
        told.append(rate.double())
        return rate.float()

    states(Settings("first_hitting"), B, n, time)
    assert len(told) == n
    for j, rates in enumerate(told):  # the j-th largest of n: Beta(n - j, j + 1)
        mean = (n - j) / (n + 1)
        assert rates.mean().item() == pytest.approx(mean, abs=4 * (mean * (1 - mean) / (n + 2) / B) ** 0.5)
        second = (n - j) * (n - j + 1) / ((n + 1) * (n + 2))
        assert rates.square().mean().item() == pytest.approx(second, abs=4 * rates.square().std().item() / B**0.5)


def test_remdm():
    """Section 11: h conserves the marginal for every g, and is at most 1 just for g up to min(1, rho/(1 - r))."""
    for r, rho in ((0.8, 0.5), (0.3, 0.2), (0.9, 0.02)):
        limit = min(1, rho / (1 - r))
        for g in np.linspace(0, limit, 5):
            h = (1 - rho - (1 - g) * (1 - r)) / r
            assert h == pytest.approx(1 - rho / r + g * (1 - r) / r) and -1e-12 <= h <= 1 + 1e-12
            assert (1 - r) * g + r * (1 - h) == pytest.approx(rho)
        if limit < 1:
            assert (1 - rho - (1 - limit - 1e-3) * (1 - r)) / r > 1
    grid, B, n = [1.0, 0.7, 0.5, 0.4, 0.0], 3000, 4
    found = [(xt == V).double().mean().item() for xt, _ in
             states(Settings("remdm", {"grid": grid, "remask": "rescale", "eta": 1.0}), B, n)]
    assert found == pytest.approx(grid[1:], abs=4 * 0.5 / (B * n) ** 0.5)


# ---- uniform noise ---------------------------------------------------------------------------------------------------


def uniform_matrix(keep, n=V):
    return np.eye(n) * keep + (1 - keep) / n


def leave_one_out(alpha, x, i, everything=False):
    """q(x_0 = j at position i | x_t = x without position i), or given all of x_t, (V,)."""
    Q, found = uniform_matrix(alpha), np.zeros(V)
    for text, q in zip(TEXTS, Q_DATA):
        found[text[i]] += q * math.prod(Q[text[j], x[j]] for j in range(L) if j != i or everything)
    return found / found.sum()


def test_uniform_posterior():
    """Section 12: stages compose, and Bayes gives the posterior of uniform.posterior."""
    n, x_theta = 4, np.array([0.1, 0.2, 0.3, 0.4])
    for alpha_t, alpha_tau in ((0.3, 0.7), (0.0, 0.4), (0.6, 1.0)):
        kappa = alpha_t / alpha_tau
        before, step = uniform_matrix(alpha_tau, n), uniform_matrix(kappa, n)
        np.testing.assert_allclose(before @ step, uniform_matrix(alpha_t, n))
        for z in range(n):
            for x in (*np.eye(n), x_theta):
                formula = (alpha_tau - alpha_t) * x + (1 - kappa) * (1 - alpha_tau) / n
                formula[z] += n * alpha_t * x[z] + kappa - alpha_t
                assert formula.sum() == pytest.approx(n * alpha_t * x[z] + 1 - alpha_t)
                joint = (x[:, None] * before * step[:, z]).sum(0)
                np.testing.assert_allclose(formula / formula.sum(), joint / joint.sum(), atol=1e-12)
                code = posterior(tensor(x), torch.tensor(z), 1 - alpha_t, 1 - alpha_tau).numpy()
                np.testing.assert_allclose(code, formula, atol=1e-12)


def test_leave_one_out():
    """Section 12: with the leave-one-out prediction the step, p(x_0 | x_t) and S_y are true; else the KL is larger."""
    alpha_t, alpha_tau = 0.4, 0.6
    r, before, step = 1 - alpha_t, uniform_matrix(alpha_tau), uniform_matrix(alpha_t / alpha_tau)
    Q = uniform_matrix(alpha_t)
    for x in ((0, 1, 1), (1, 0, 1)):
        i, z = 1, x[1]
        out, full = leave_one_out(alpha_t, x, i), leave_one_out(alpha_t, x, i, everything=True)
        given = r * out + V * alpha_t * out[z] * (np.arange(V) == z)
        np.testing.assert_allclose(given / (r + V * alpha_t * out[z]), full)
        true = sum(full[j] * by_bayes(before, step, j, z) for j in range(V))
        code = posterior(tensor(out), torch.tensor(z), r, 1 - alpha_tau).numpy()
        np.testing.assert_allclose(code / code.sum(), true)
        other = posterior(tensor(full), torch.tensor(z), r, 1 - alpha_tau).numpy()

        def mean_kl(p):
            return sum(full[j] * (q * np.log(q / p)).sum() for j in range(V) for q in [by_bayes(before, step, j, z)])

        other = other / other.sum()
        assert mean_kl(other) == pytest.approx(mean_kl(true) + (true * np.log(true / other)).sum())
        assert mean_kl(other) > mean_kl(true) + 1e-4
        marginal = [sum(q * math.prod(Q[text[j], (y if j == i else x[j])] for j in range(L))
                        for text, q in zip(TEXTS, Q_DATA)) for y in range(V)]
        score = (V * alpha_t * out + r) / (V * alpha_t * out[z] + r)
        np.testing.assert_allclose(score, np.array(marginal) / marginal[z])
        np.testing.assert_allclose(full @ (Q / Q[:, [z]]), score)  # E[c_y | x_t], section 9
        log_score = Uniform(V).log_score(tensor(out).log()[None], torch.tensor([z]), tensor([-math.log(alpha_t)]))
        np.testing.assert_allclose(log_score[0].exp(), score, rtol=1e-5)


def ratios(alpha, n, x0, z):
    """c_y for all y but z, where it is 1."""
    r = 1 - alpha
    c = np.full(n, r / (r + n * alpha) if z == x0 else 1.0)
    c[z] = 1.0
    if z != x0:
        c[x0] = (r + n * alpha) / r
    return c


def test_uniform_score_entropy():
    """Section 12: c_y are the ratios of q, the terms are c (e^d - 1 - d), Uniform.cost, and the KL of a short step."""
    n, alpha, dt = 4, 0.4, 1e-5
    x_theta, Q = np.array([0.1, 0.2, 0.3, 0.4]), uniform_matrix(alpha, n)
    for x0, z in ((2, 2), (1, 3)):
        c = ratios(alpha, n, x0, z)
        np.testing.assert_allclose(c, Q[x0] / Q[x0, z])
        S = (n * alpha * x_theta + 1 - alpha) / (n * alpha * x_theta[z] + 1 - alpha)
        d = np.log(S / c)
        terms = S - c * np.log(S) + c * (np.log(c) - 1)
        np.testing.assert_allclose(terms, c * (np.exp(d) - 1 - d), atol=1e-12)
        cost = np.delete(terms, z).sum() / n
        logits, sigma = tensor(np.log(x_theta))[None, None], tensor([-math.log(alpha)])
        code = Uniform(n).cost(logits, torch.tensor([[x0]]), torch.tensor([[z]]), sigma)
        assert code.item() == pytest.approx(cost, rel=1e-4)
        q, p = (posterior(tensor(x), torch.tensor(z), 1 - alpha, 1 - alpha - dt).numpy()
                for x in (np.eye(n)[x0], x_theta))
        q, p = q / q.sum(), p / p.sum()
        assert (q * np.log(q / p)).sum() / dt == pytest.approx(cost / alpha, rel=1e-3)  # sigma' = 1/alpha here
    chain = UniformD3PM(n, 5)
    q, p = (posterior(tensor(x), torch.tensor(1), 0.6, 0.4).numpy() for x in (np.eye(n)[2], x_theta))
    q, p = q / q.sum(), p / p.sum()
    code = chain.cost(tensor(np.log(x_theta))[None, None], torch.tensor([[2]]), torch.tensor([[1]]),
                         torch.tensor([3]))
    assert code.item() == pytest.approx((q * np.log(q / p)).sum(), rel=1e-4)


@pytest.mark.parametrize("rate, slope", [
    (lambda u: u**2, lambda u: 2 * u),
    (lambda u: math.cos(math.pi / 2 * (1 - u)), lambda u: math.pi / 2 * math.sin(math.pi / 2 * (1 - u)))])
def test_uniform_bound_is_tight(rate, slope):
    """Section 12: with the leave-one-out prediction the integral is -log q(x_0), by u^2 and by the cosine schedule; the
    prior term is its KL."""
    bound = np.zeros(len(TEXTS))
    for u, weight in zip(NODES, WEIGHTS):
        r, dr = rate(u), slope(u)                # sigma' dt = dr/alpha
        alpha = 1 - r
        Q = uniform_matrix(alpha)
        for x in TEXTS:
            for i in range(L):
                out, z = leave_one_out(alpha, x, i), x[i]
                S = (V * alpha * out + r) / (V * alpha * out[z] + r)
                y = 1 - z                        # the other one of V = 2 tokens
                for n, x0 in enumerate(TEXTS):
                    c = ratios(alpha, V, x0[i], z)[y]
                    chance = math.prod(Q[a, b] for a, b in zip(x0, x))
                    bound[n] += weight * dr / alpha * chance * (S[y] - c * math.log(S[y]) + c * (math.log(c) - 1)) / V
    np.testing.assert_allclose(bound, -np.log(Q_DATA), rtol=1e-3)
    alpha, n = 0.2, 5
    r, q = 1 - alpha, uniform_matrix(alpha, n)[0]
    formula = (alpha + r / n) * math.log(n * alpha + r) + (n - 1) * r / n * math.log(r)
    assert formula == pytest.approx((q * np.log(q * n)).sum()) == pytest.approx(prior_kl(-math.log(alpha), n))


def test_uniform_variance():
    """Section 12: at small r the second moment of the estimate grows faster than 1/r if r is uniform, so its integral
    has no end; for r = u^2 it grows as (log u)^2."""
    def second_moment(r):
        """E of the squared integrand over r, for one token, x_0 = 0, and a network that says (.7, .3)."""
        alpha, found = 1 - r, 0
        for z in range(V):
            S = (V * alpha * np.array([0.7, 0.3]) + r) / (V * alpha * (0.7, 0.3)[z] + r)
            y = 1 - z
            c = ratios(alpha, V, 0, z)[y]
            cost = (S[y] - c * math.log(S[y]) + c * (math.log(c) - 1)) / V / alpha
            found += uniform_matrix(alpha)[0, z] * cost**2
        return found

    assert 1 < 1e-3 * second_moment(1e-3) < 1e-5 * second_moment(1e-5) < 1e-7 * second_moment(1e-7)
    for u in (1e-7, 1e-5, 1e-3, 0.1, 0.9):
        assert (2 * u)**2 * second_moment(u**2) < 16 * (math.log(u) - 1)**2


# ---- masks and random tokens -----------------------------------------------------------------------------------------


def shares_of(alpha, b):
    """(μ, ν): the quadratic equation of section 13, solved by NumPy."""
    root = max(np.roots([1, b * math.sqrt(alpha), alpha - 1]).real)
    return root**2, b * math.sqrt(alpha) * root


def hybrid_row(alpha, b, x):
    """q(x_t = y) of a token with the distribution x (n,): (n + 1,), the mask last."""
    mu, nu = shares_of(alpha, b)
    return np.append(alpha * np.asarray(x) + nu / len(x), mu)


@pytest.mark.parametrize("b", [0.2, 1.5])
def test_masks_and_random_tokens(b):
    """Section 13: the shares, the hits of a stage and their ratio, the posterior, the closed form of the sum over y,
    its cases, and the factors of equal weights."""
    alphas, n, dsigma = np.linspace(0.001, 1, 1000), 4, 1e-6
    found = np.array([shares_of(alpha, b) for alpha in alphas])
    largest = found[:, 1].argmax()
    assert found[largest, 1] == pytest.approx(b / (2 + b), rel=1e-4)
    assert found[largest, 0] == pytest.approx(alphas[largest], rel=1e-2)
    alpha, earlier = 0.4, 0.4 * math.exp(dsigma)
    (mu, nu), (mu_before, nu_before) = shares_of(alpha, b), shares_of(earlier, b)
    kappa = alpha / earlier
    H_mask, H_tokens = mu - kappa * mu_before, nu - kappa * nu_before
    assert H_mask > 0 and H_tokens / H_mask == pytest.approx(nu / 2 / mu, rel=1e-3)
    assert H_mask + H_tokens == pytest.approx(1 - kappa)
    J = np.append(np.full(n, nu / 2 / n), mu) / (mu + nu / 2)
    np.testing.assert_allclose(np.append(np.full(n, H_tokens / n), H_mask) / dsigma, J, rtol=1e-3)
    x_theta = np.array([0.1, 0.2, 0.3, 0.4])
    q, p = hybrid_row(alpha, b, np.eye(n)[1]), hybrid_row(alpha, b, x_theta)
    objective = Hybrid(n, "linear", b / (2 + b))
    for z in (n, 1, 2):
        c, S = q / q[z], p / p[z]
        cost = J[z] * np.delete(S - c * np.log(S) + c * (np.log(c) - 1), z).sum()
        kl = (q * np.log(q / p)).sum()
        assert cost == pytest.approx(J[z] / q[z] * (kl + q[z] / p[z] - 1 - math.log(q[z] / p[z])))
        code = objective.cost(tensor(np.log(x_theta))[None, None], torch.tensor([[1]]), torch.tensor([[z]]),
                              tensor([-math.log(alpha)]))
        assert code.item() == pytest.approx(cost, rel=1e-4)
        steps = []
        for x in (np.eye(n)[1], x_theta):
            keep = kappa * (np.arange(n + 1) == z)
            H = H_mask if z == n else H_tokens / n
            weights = (keep + H) * hybrid_row(earlier, b, x)
            assert weights.sum() == pytest.approx(hybrid_row(alpha, b, x)[z])  # q(x_t = z | x_0)
            steps.append(weights / weights.sum())
        assert (steps[0] * np.log(steps[0] / steps[1])).sum() / dsigma == pytest.approx(cost, rel=2e-3)
        factor = {n: 1, 1: nu / 2 / (n * alpha + nu), 2: 1 / 2}[z]
        assert (mu + nu / 2) * J[z] / q[z] == pytest.approx(factor)
    r = 1 - alpha
    row = uniform_matrix(alpha, n)[1]
    assert [r / n / row[z] for z in (2, 1)] == pytest.approx([1, r / (n * alpha + r)])  # the factors of uniform noise
    phi = [m / (a + m) for a in (alpha, earlier) for m in [shares_of(a, b)[0]]]
    assert (phi[0] - phi[1]) / dsigma == pytest.approx(phi[0] * (1 - phi[0]) / (mu + nu / 2), rel=1e-3)


# ---- drawing tokens --------------------------------------------------------------------------------------------------


def test_float32_uniform_numbers():
    """Section 15: exact numbers draw the first token with eta/(1 + eta), multiples of 2^-24 with the sum, and its ratio
    to eta is delta/(e^delta - 1). (test_sampling.py has the sum over both numbers.)"""
    assert (WEIGHTS * NODES ** (1 / 0.2)).sum() == pytest.approx(0.2 / 1.2)
    m = np.arange(1, 2**20)
    for eta, ratio in ((1e-7, 0.73), (1e-8, 0.015)):
        delta = 2.0**-24 / eta
        assert delta / math.expm1(delta) == pytest.approx(ratio, rel=0.03)
        won = (2.0**-24 * (1 - m * 2.0**-24) ** (1 / eta)).sum()
        assert won / eta == pytest.approx(delta / math.expm1(delta), rel=1e-4)


# ---- the page --------------------------------------------------------------------------------------------------------


def names_of(body):
    """All that a module or a class defines at its top, dotted."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
            if isinstance(node, ast.ClassDef):
                yield from (f"{node.name}.{name}" for name in names_of(node.body))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from (target.id for target in getattr(node, "targets", [getattr(node, "target", None)])
                        if isinstance(target, ast.Name))


# ---- the likelihood from two sides -----------------------------------------------------------------------------------


def test_two_sides():
    """p(o | x), the probability Q of K orders of which one is true, and the two inequalities with their gaps; the bound
    from above falls with K."""
    before = -np.inf
    orders = math.factorial(L)
    l = np.log(np.random.default_rng(2).dirichlet(np.ones(len(TEXTS)), orders).T)  # (texts, orders): any p_o
    p = np.exp(l).mean(1)
    given_text = np.exp(l) / orders / p[:, None]  # p(o | x)
    assert given_text.sum(1) == pytest.approx(np.ones(len(TEXTS))) and p.sum() == pytest.approx(1)
    for K in (1, 2, 3):
        tuples = np.array(list(itertools.product(range(orders), repeat=K)))
        means = np.exp(l[:, tuples]).mean(2)  # (texts, tuples)
        U = np.full(means.shape, orders**-float(K))
        Q = given_text[:, tuples].mean(2) * orders ** -(K - 1.0)
        assert Q == pytest.approx(U * means / p[:, None]) and Q.sum(1) == pytest.approx(np.ones(len(TEXTS)))
        above = (Q * np.log(means)).sum(1) - np.log(p)
        assert above == pytest.approx((Q * np.log(Q / U)).sum(1)) and (above > 0).all()
        below = (U * np.log(means)).sum(1) - np.log(p)
        assert (below < 0).all() and (below > before).all()
        before = below
        if K == 1:
            assert below + np.log(p) == pytest.approx(l.mean(1))


def test_names_exist():
    """Every file and every module.function that the page names exists."""
    quoted = re.findall(r"`([^`\n]+)`", PAGE)
    files = {text for text in quoted if re.fullmatch(r"[\w/]+\.(py|md|png)", text)}
    dotted = {text for text in quoted if re.fullmatch(r"[A-Za-z]\w*(\.\w+)+", text)} - files
    assert len(files) >= 2 and len(dotted) > 30
    assert not [name for name in files if not (ROOT / name).is_file()]
    for name in dotted:
        module, rest = re.fullmatch(r"((?:studies\.|foreign\.)?\w+)\.(.+)", name).groups()
        module = module.replace(".", "/")
        source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
        assert rest in names_of(ast.parse(source).body), name


def test_sections_and_lines():
    """Sections 1 to 15, in this order, in lines of at most 120 characters."""
    assert re.findall(r"^## (\d+)\. ", PAGE, re.MULTILINE) == [str(i) for i in range(1, 16)]
    assert max(map(len, PAGE.splitlines())) <= 120


def test_figure(tmp_path):
    """docs/maths.py draws the figure, which is small."""
    runpy.run_path(str(ROOT / "docs/maths.py"))["draw"](tmp_path / "maths.png")
    assert (tmp_path / "maths.png").stat().st_size > 10_000
    assert 10_000 < (ROOT / "docs/maths.png").stat().st_size < 80_000
