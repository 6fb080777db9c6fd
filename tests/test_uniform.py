"""uniform.py against brute force, on the enumerable world."""

import math

import numpy as np
import pytest
import torch

import world
from randomness import uniforms
from sampling import Settings
from uniform import Uniform, UniformD3PM, UniformNoise, UniformSEDD, noise_at, prior_kl
from world import ENTROPY, P_DATA, SEQUENCES, L, V

N_SEQUENCES = len(SEQUENCES)
EVERY_X0 = SEQUENCES.repeat_interleave(N_SEQUENCES, 0)
EVERY_XT = SEQUENCES.repeat(N_SEQUENCES, 1)


def network(logits):
    """The denoiser that gives these logits, (27, L, V), whatever the time."""
    return lambda xt, t, where=None: logits[(xt * torch.tensor([9, 3, 1])).sum(1)]


def at_rate(rate, weight=1.0, t=None):
    """Noise that turns EVERY_X0 into EVERY_XT."""
    n = len(EVERY_X0)
    return UniformNoise(EVERY_XT, torch.full((n,), rate if t is None else t), torch.full((n,), weight),
                        -torch.log1p(torch.full((n,), -rate, dtype=torch.float64)).float())


def expected(objective, model, rate, weight=1.0, t=None):
    """E over xt of the nelbo of every sequence, nats per sequence, (27,)."""
    nats = objective.nelbo(model, EVERY_X0, at_rate(rate, weight, t)).double().view(N_SEQUENCES, -1) * L
    return (world.uniform_distribution(1 - rate) * nats).sum(1)


def quadrature(n=60):
    """Nodes and weights of the integral over u in (0, 1), as rates u^2."""
    x, w = np.polynomial.legendre.leggauss(n)
    return [((x + 1) / 2, w / 2) for x, w in zip(x.tolist(), w.tolist())]


def bound(objective, model_at):
    """The continuous-time bound of every sequence, nats, (27,): model_at(rate) -> denoiser."""
    total = torch.zeros(N_SEQUENCES, dtype=torch.float64)
    for u, w in quadrature():
        noise = objective.rates(torch.tensor([u], dtype=torch.float64), torch.ones(1, L, dtype=torch.float64))
        rate = -math.expm1(-noise.sigma.item())
        total += w * expected(objective, model_at(rate), rate, noise.weight.item())
    return total


def random_logits(seed):
    return 1.5 * torch.randn(N_SEQUENCES, L, V, generator=torch.Generator().manual_seed(seed))


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Uniform(V, "linear"), Uniform(V, "loglinear"), Uniform(V, "geometric:0.01:4"),
                                       UniformD3PM(V, 4), UniformD3PM(V, 4, "cosine")])
def test_marginals(objective):
    """The share of v in (0, 1] that becomes each token is the row of the product of one-step matrices."""
    n = 30_000
    v = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[None]
    for u in (0.03, 0.5, 1.0):
        noise = objective.noise(torch.tensor([u], dtype=torch.float64), v)
        t = math.ceil(u * objective.T) / objective.T if objective.T else u
        assert noise.t.item() == pytest.approx(t)
        alpha = objective.schedule.alpha(torch.tensor(t, dtype=torch.float64)).item()
        product = torch.linalg.matrix_power(world.uniform_matrix(alpha**0.25), 4)
        x0 = torch.ones(1, n, dtype=torch.long)
        share = objective.corrupt(x0, noise.token)[0].bincount(minlength=V) / n
        torch.testing.assert_close(share.double(), product[1], atol=2e-4, rtol=0)
        assert noise.sigma.item() == pytest.approx(-math.log(alpha) if alpha else math.inf)


# ---- the bounds ------------------------------------------------------------------------------------------------------


def test_duo():
    """The score entropy of a score made of x_theta, times dsigma, is Duo's formula (arXiv 2506.10892) and UDLM's."""
    objective, logits, rate = Uniform(V, "linear"), random_logits(2), 0.4
    alpha, dalpha = 1 - rate, -1.0
    nats = objective.cost(network(logits)(EVERY_XT, None), EVERY_X0, EVERY_XT,
                          torch.full((len(EVERY_X0),), -math.log(1 - rate)))
    x_bar = V * alpha * torch.nn.functional.one_hot(EVERY_X0, V).double() + 1 - alpha
    x_bar_theta = V * alpha * network(logits)(EVERY_XT, None).double().softmax(-1) + 1 - alpha
    z = EVERY_XT[..., None]
    at_z, theta_at_z = x_bar.gather(-1, z), x_bar_theta.gather(-1, z)
    sums = (x_bar / at_z * (theta_at_z.log() - x_bar_theta.log() + x_bar.log() - at_z.log())).sum(-1, keepdim=True)
    duo = (dalpha / (V * alpha) * (V / at_z - V / theta_at_z - sums)).squeeze(-1)
    torch.testing.assert_close((-dalpha / alpha * nats).double(), duo, rtol=1e-5, atol=1e-6)


def test_scores():
    """Of the leave-one-out predictor the score is the true ratio of marginals, and gives the prediction back."""
    objective, scores = Uniform(V, "linear"), UniformSEDD(V, "loglinear")
    for rate in (0.05, 0.5, 0.95):
        x, sigma = world.uniform_oracle(1 - rate), torch.full((N_SEQUENCES, L), -math.log(1 - rate))
        log_s = objective.log_score(x.log(), SEQUENCES, sigma)
        torch.testing.assert_close(log_s.double(), world.true_scores(1 - rate).log(), rtol=1e-4, atol=1e-5)
        anything = log_s + torch.nn.functional.one_hot(SEQUENCES, V)  # what a network says of xt itself is ignored
        torch.testing.assert_close(scores.prediction(anything, SEQUENCES, sigma).double(), x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores.log_score(anything, SEQUENCES, sigma), log_s)


@pytest.mark.parametrize("score", [False, True])
def test_bound_of_the_optimum_is_the_entropy(score):
    """With the leave-one-out predictor, or the true scores, the bound is the entropy; with p(x0_i | xt) it is not."""
    objective = UniformSEDD(V, "loglinear:0.0001") if score else Uniform(V, "linear")
    optimum = {False: world.uniform_oracle, True: world.true_scores}[score]
    nats = bound(objective, lambda rate: network(optimum(1 - rate).log()))
    assert (P_DATA * nats).sum().item() == pytest.approx(ENTROPY, abs=1e-3)
    torch.testing.assert_close(nats, -P_DATA.log(), atol=0.02, rtol=0)  # for each sequence, too
    if not score:
        ordinary = bound(objective, lambda rate: network(world.uniform_oracle(1 - rate, leave_one_out=False).log()))
        assert (P_DATA * ordinary).sum().item() > ENTROPY + 0.1


def test_prior():
    """KL(q(x_1 | x0) || uniform) of a token, by summing over its values."""
    for sigma in (0.1, 1.0, 6.9):
        q = world.uniform_matrix(math.exp(-sigma))[0]
        assert prior_kl(sigma, V) == pytest.approx((q * (q * V).log()).sum().item(), rel=1e-9)
    assert prior_kl(-math.log(1e-3), 50258) == pytest.approx(0.0030, abs=1e-4)


def test_bound_of_true_scores_that_end_early():
    """Where noise stops far from uniform, the prior term makes it a bound: the entropy and KL(q(x_1) || uniform)."""
    objective = UniformSEDD(V, "geometric:0.001:1.5")
    nats = bound(objective, lambda rate: network(world.true_scores(1 - rate).log()))
    last = P_DATA @ world.uniform_distribution(math.exp(-1.5))
    extra = (last * (last * N_SEQUENCES).log()).sum().item()
    assert extra > 0.01 and (P_DATA @ nats).item() == pytest.approx(ENTROPY + extra, abs=1e-3)


@pytest.mark.parametrize("schedule", ["geometric", "loglinear"])
def test_scores_that_do_not_vanish_have_a_finite_bound(schedule):
    """A network of one fixed score, whose cost is constant where noise is pure: the bound is the integral over sigma up
    to the last one, and the prior; both estimators find it, with errors that mean something."""
    objective, logits = UniformSEDD(V, schedule), random_logits(8)
    exact = (P_DATA @ bound(objective, lambda rate: network(logits))).item() / L
    B, generator = 20_000, torch.Generator().manual_seed(2)
    x0 = SEQUENCES[torch.multinomial(P_DATA, B, replacement=True, generator=generator)]
    for name in Uniform.estimators:
        u, v = (1 - torch.rand(B, *shape, dtype=torch.float64, generator=generator) for shape in ((), (L,)))
        nats = objective.nelbo(network(logits), x0, getattr(objective, name)(u, v)).double()
        assert abs(nats.mean() - exact) < 4 * nats.std() / B**0.5 < 0.1 * exact


def test_digits():
    """float32 costs next to float64, where they are hard: 50,258 tokens and little noise; a billion steps."""
    N, generator = 50258, torch.Generator().manual_seed(3)
    logits = torch.randn(1, 2, N, generator=generator)
    x0, xt = torch.tensor([[5, 6]]), torch.tensor([[5, 7]])
    sigma = torch.tensor([1e-6])

    class Exact(torch.Tensor):
        def float(self):
            return self.double()

    exact = Uniform(N).cost(logits.double().as_subclass(Exact), x0, xt, sigma.double())
    torch.testing.assert_close(Uniform(N).cost(logits, x0, xt, sigma).double(), torch.Tensor(exact.data).double(),
                               rtol=1e-4, atol=1e-12)
    logits, x0, xt = random_logits(1)[:1], SEQUENCES[5:6], SEQUENCES[7:8]
    limit = Uniform(V, "linear").cost(logits, x0, xt, torch.tensor([-math.log(0.5)])) * 2
    for T in (10**4, 10**6, 10**9):
        torch.testing.assert_close(UniformD3PM(V, T).cost(logits, x0, xt, torch.tensor([T / 2])) * T, limit,
                                   rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_d3pm_is_its_definition(schedule):
    """The expected T-step estimate is the sum of all posterior KLs from matrices; of the optimum it is above the
    entropy and falls towards it. The loss is its share of one step."""
    gaps = []
    for T in (2, 4, 8):
        objective = UniformD3PM(V, T, schedule)
        alphas = objective.schedule.alpha(torch.arange(T + 1, dtype=torch.float64) / T).tolist()
        for x_theta in (lambda s: random_logits(s).double().softmax(-1), lambda s: world.uniform_oracle(alphas[s])):
            total = sum(expected(objective, network(x_theta(s).log()), 1 - alphas[s], 1.0, s / T)
                        for s in range(1, T + 1))
            torch.testing.assert_close(total, world.uniform_t_step_bound(x_theta, alphas), rtol=1e-4, atol=1e-4)
        gaps.append((P_DATA * total).sum().item() - ENTROPY)
        p = world.uniform_chain_distribution([world.uniform_step(x_theta(s), alphas[s], alphas[s - 1])
                                              for s in range(T, 0, -1)])
        assert p.sum().item() == pytest.approx(1) and (total + p.log()).min() > -1e-4  # a bound on its own sampler
    assert gaps[0] > gaps[1] > gaps[2] > 1e-3
    loss, nelbo = objective.loss(network(random_logits(1)), EVERY_X0, at_rate(0.5, 8.0))
    assert loss.item() == pytest.approx(nelbo.mean().item() / 8)


def test_draws_have_the_right_weights():
    """Steps are drawn as the weights assume.

    Estimates of a number that depends on s, or the rate, alone are its sum.
    """
    n, T = 200_000, 5
    u, v = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.ones(n, 1).double()
    f = lambda rate: torch.sin(3 * rate) + rate
    chain = UniformD3PM(V, T)
    for draw in (chain.noise, chain.t_step):
        noise = draw(u, v)
        assert (noise.weight * f(noise.t)).mean().item() == pytest.approx(
            f(torch.arange(1, T + 1) / T).sum().item(), rel=0.01)
    objective = Uniform(V, "linear")
    for draw in (objective.rates, objective.flatter_rates):
        noise = draw(u, v)
        # dsigma = d rate/(1 - rate)
        mean = (noise.weight * torch.exp(-noise.sigma) * f(-torch.expm1(-noise.sigma))).mean().item()
        assert mean == pytest.approx((1 - math.cos(3)) / 3 + 0.5, rel=0.01)
    noise = objective.noise(u, v)
    torch.testing.assert_close(noise.weight, (1 / (1 - u)).float())
    quarter = torch.full((1,), 0.25, dtype=torch.float64)
    sigmas = [getattr(objective, name)(quarter, v[:1]).sigma.item() for name in Uniform.estimators]
    assert sigmas == pytest.approx([-math.log1p(-0.25**2), -math.log1p(-0.25**1.5)])  # two estimators indeed


def test_estimates_are_finite_and_agree():
    """For a network of a fixed output, bounds by both estimators agree within their errors; so do all-equal logits with
    the entropy of the uniform distribution, log V, exactly in expectation."""
    B = 40_000
    generator = torch.Generator().manual_seed(1)
    u, v = (1 - torch.rand(B, *shape, dtype=torch.float64, generator=generator) for shape in ((), (L,)))
    x0 = SEQUENCES[torch.randint(N_SEQUENCES, (B,), generator=generator)]
    for logits in (random_logits(5), torch.zeros(N_SEQUENCES, L, V)):
        means = []
        for name in Uniform.estimators:
            objective = Uniform(V)
            nats = objective.nelbo(network(logits), x0, getattr(objective, name)(u, v)).double()
            assert nats.isfinite().all() and (nats >= 0).all()
            means.append((nats.mean().item(), nats.std().item() / B**0.5))
        assert abs(means[0][0] - means[1][0]) < 4 * (means[0][1] + means[1][1])
    assert abs(means[0][0] - math.log(V)) < 4 * means[0][1]


def test_training_reaches_the_optimum():
    """Minimising the loss from noise of all kinds moves a table of logits to the leave-one-out predictor."""
    rate = 0.5
    table = torch.zeros(N_SEQUENCES, L, V, requires_grad=True)
    optimizer, objective = torch.optim.Adam([table], lr=0.1), Uniform(V, "linear")
    weights = (P_DATA[:, None] * world.uniform_distribution(1 - rate)).flatten()
    for _ in range(300):
        nats = objective.nelbo(network(table), EVERY_X0, at_rate(rate))
        optimizer.zero_grad()
        (weights * nats).sum().backward()
        optimizer.step()
    torch.testing.assert_close(table.detach().double().softmax(-1), world.uniform_oracle(1 - rate), atol=2e-3, rtol=0)


def test_simple_weights():
    """A random token's KL has the same weight in the loss at every rate: 6, as rates are uniform."""
    objective, logits = Uniform(V, "linear", "simple"), random_logits(2)
    noise = objective.noise(*uniforms(0, 0, range(27), 27, L, stratified=True))
    rate = -torch.expm1(-noise.sigma)
    loss, nelbo = objective.loss(network(logits), SEQUENCES, noise)
    assert loss.item() == pytest.approx((6 * rate * (1 - rate) * nelbo).mean().item(), rel=1e-5)
    assert Uniform(V, "linear").loss(network(logits), SEQUENCES, noise)[0] == nelbo.mean()
    x0, z = torch.tensor([[0]]), torch.tensor([[1]])
    for r in (0.01, 0.5, 0.99):
        alpha, sigma = 1 - r, torch.tensor([-math.log1p(-r)])
        q, p = (alpha * x + r / V for x in (torch.eye(V)[0], logits[0, 0].softmax(-1)))
        kl = (q * (q / p).log()).sum() + q[1] / p[1] - 1 - (q[1] / p[1]).log()
        term = objective.simple_weight(sigma) / alpha * objective.cost(logits[:1, :1], x0, z, sigma)  # sigma' = 1/alpha
        assert term.item() == pytest.approx(6 * kl.item(), rel=1e-3)


def test_edges():
    """Rates next to 0 and 1, and predictions of certainty, give finite costs and gradients."""
    logits = (1e4 * torch.nn.functional.one_hot(SEQUENCES, V).float()).requires_grad_()
    for kind in (Uniform, UniformSEDD):
        objective = kind(V, "loglinear")
        u = torch.tensor([1e-12, 1e-4, 0.5, 1 - 1e-9, 1.0], dtype=torch.float64)
        v, x0 = torch.rand(5, L, dtype=torch.float64), SEQUENCES[:5]
        for draw in (objective.noise, objective.rates):
            scale = 1e-3 if objective.score else 1.0
            nats = objective.nelbo(network(logits * scale), x0, draw(u, v))
            assert nats.isfinite().all()
            (gradient,) = torch.autograd.grad(nats.sum(), logits)
            assert gradient.isfinite().all()


def test_noise_depends_on_seed_and_index_alone():
    """The noise of each sequence is the same alone as in a batch."""
    u, v = uniforms(3, 7, range(4), 4, 16, stratified=True)
    objective = Uniform(27)
    whole = objective.noise(u, v)
    parts = [objective.noise(*uniforms(3, 7, [i], 4, 16, stratified=True)) for i in range(4)]
    for a, b in zip(whole, zip(*parts)):
        assert torch.equal(a, torch.cat(b))


@pytest.mark.parametrize("sampler, common", [("ancestral", {}), ("ancestral", {"top_p": 0.9}),
                                             ("ancestral", {"temperature": 0.5}), ("euler", {})])
def test_scores_of_no_distribution(sampler, common):
    """The prediction of such scores can be negative. What is drawn, and its probability, are in range all the same."""
    objective, generator = UniformSEDD(V, "loglinear"), torch.Generator().manual_seed(0)
    model = lambda xt, t, where: 3 * torch.randn(int(where.sum()), V, generator=generator)
    logits, z = 3 * torch.randn(9, V), torch.zeros(9, dtype=torch.long)
    assert (objective.prediction(logits, z, noise_at(0.5, z)) < 0).any()
    xt = torch.full((50, 4), objective.mask_id)
    *_, state = Settings(sampler, {"grid": [1, 0.7, 0.3, 0]}, **common).states(objective, model, xt, generator)
    assert ((0 <= state.xt) & (state.xt < V)).all() and ((0 <= state.p) & (state.p <= 1)).all()
