"""hybrid.py, the noise of masks and random tokens, against brute force on the enumerable world."""

import math

import pytest
import torch

import world
from categorical import Draw
from configs import gidd_text8, replace
from diffusion import MDLM
from hybrid import Hybrid, posterior
from randomness import uniforms
from sampler_settings import schedule_grid
from sampling import Settings
from test_sampling import chi_square_excess, counts_of, masks
from test_uniform import quadrature
from uniform import Uniform, UniformNoise
from world import ENTROPY, MASK, P_DATA, SEQUENCES, STATES, L, V, picked

N_SEQUENCES, N_STATES = len(SEQUENCES), len(STATES)
EVERY_X0 = SEQUENCES.repeat_interleave(N_STATES, 0)
EVERY_XT = STATES.repeat(N_SEQUENCES, 1)
CODE = torch.tensor([(V + 1) ** 2, V + 1, 1])
SHARES = (0.1, 0.5)  # values of uniform_share


def network(logits):
    """The denoiser that gives these logits, (64, L, V), whatever the time."""
    return lambda xt, t, where=None: picked(logits[(xt * CODE).sum(1)], where)


def random_logits(seed):
    return 1.5 * torch.randn(N_STATES, L, V, generator=torch.Generator().manual_seed(seed))


def all_noise(rate, weight=1.0):
    """Noise that turns EVERY_X0 into EVERY_XT."""
    n = len(EVERY_X0)
    return UniformNoise(EVERY_XT, torch.full((n,), rate), torch.full((n,), weight),
                        -torch.log1p(torch.full((n,), -rate, dtype=torch.float64)).float())


def bound(objective, p, model_at):
    """The bound of every sequence, nats, (27,), by quadrature: model_at(shares) -> denoiser. p: uniform_share."""
    total = torch.zeros(N_SEQUENCES, dtype=torch.float64)
    for u, w in quadrature(100):
        noise = objective.rates(torch.tensor([u], dtype=torch.float64), torch.ones(1, L, dtype=torch.float64))
        rate = -math.expm1(-noise.sigma.item())
        shares = world.hybrid_shares(1 - rate, p)
        nats = objective.nelbo(model_at(shares), EVERY_X0, all_noise(rate, noise.weight.item())).double()
        total += w * (world.hybrid_distribution(shares) * nats.view(N_SEQUENCES, -1) * L).sum(1)
    return total


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", SHARES)
def test_shares(p):
    """The shares are those that bisection finds; n is at most p; both ends are exact; stages are probabilities, and two
    stages make one."""
    objective = Hybrid(V, "linear", p)
    alphas = torch.tensor([1.0, 1 - 1e-9, 0.9, 0.5, 0.2, 1e-6, 0.0], dtype=torch.float64)
    found = torch.stack(objective.shares(-alphas.log()), 1)
    expected = torch.tensor([world.hybrid_shares(alpha, p) for alpha in alphas.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert found[0].tolist() == [1, 0, 0] and found[-1].tolist() == [0, 1, 0]
    many = torch.stack(objective.shares(-torch.linspace(0, 1, 10_001, dtype=torch.float64).log()))
    assert many[2].max().item() == pytest.approx(p, abs=1e-6)
    at = many[2].argmax()
    assert many[0, at].item() == pytest.approx(many[1, at].item(), abs=1e-3)
    early, middle, late = (world.hybrid_shares(alpha, p) for alpha in (0.9, 0.5, 0.1))
    one, two = world.hybrid_stage(early, middle), world.hybrid_stage(middle, late)
    assert (one >= 0).all() and (two >= 0).all()
    torch.testing.assert_close(one @ two, world.hybrid_stage(early, late))
    torch.testing.assert_close(world.hybrid_matrix(*early) @ one, world.hybrid_matrix(*middle))


@pytest.mark.parametrize("p", SHARES)
def test_noise_has_the_distribution_of_the_process(p):
    """Frequencies of what `tokens` makes of each token are those of the matrix."""
    objective, n = Hybrid(V, "linear", p), 100_000
    v = 1 - torch.rand(n, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = torch.arange(V).expand(n, V)
    for rate in (0.3, 0.8, 1.0):
        xt = objective.corrupt(x0, objective.tokens(torch.full((n,), rate, dtype=torch.float64), v))
        expected = world.hybrid_matrix(*world.hybrid_shares(1 - rate, p))
        for token in range(V):
            counts = xt[:, token].bincount(minlength=V + 1).double()
            possible = expected[token] > 1e-12
            assert counts[~possible].sum() == 0
            if possible.sum() > 1:
                assert chi_square_excess(counts[possible], expected[token, possible]) < 4


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", SHARES)
@pytest.mark.parametrize("alpha", [0.9, 0.4, 0.05])
def test_cost_is_the_kl_of_a_short_step(p, alpha):
    """For every clean token and every state: KL of the true and the learned step, divided by the noise of the step."""
    x = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    dsigma = 1e-6
    now, before = (world.hybrid_shares(a, p) for a in (alpha, alpha * math.exp(dsigma)))
    z = torch.arange(V + 1)
    learned = world.hybrid_step(x.expand(V + 1, V), z, now, before)
    x0, xt = torch.cartesian_prod(torch.arange(V), z).T
    costs = Hybrid(V, "linear", p).cost(x.log().expand(1, len(x0), V), x0[None], xt[None],
                                        torch.tensor([-math.log(alpha)]))[0].double()
    for token, state, cost in zip(x0.tolist(), xt.tolist(), costs.tolist()):
        q = world.hybrid_step(torch.nn.functional.one_hot(torch.tensor(token), V).double(), torch.tensor(state), now,
                              before)
        terms = torch.where(q > 0, q * (q / learned[state]).log(), 0.0)
        assert cost == pytest.approx(terms.sum().item() / dsigma, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("p", SHARES)
def test_bound_of_the_optimum_is_the_entropy(p):
    """The bound of the leave-one-out predictor is -log p of each sequence; that of p(x0_i | xt) is larger."""
    objective = Hybrid(V, "linear", p)
    nats = bound(objective, p, lambda shares: network(world.hybrid_oracle(shares).log()))
    assert (P_DATA @ nats).item() == pytest.approx(ENTROPY, abs=2e-3)
    torch.testing.assert_close(nats, -P_DATA.log(), atol=0.02, rtol=0)
    ordinary = bound(objective, p, lambda shares: network(world.hybrid_oracle(shares, leave_one_out=False).log()))
    assert (P_DATA @ ordinary).item() > ENTROPY + 0.02


def test_limits():
    """The cost of masks alone is MDLM's, and that of random tokens alone is Uniform's."""
    logits, sigma = random_logits(1)[:27].float(), torch.full((27,), 0.7)
    alpha = torch.exp(-sigma)
    kept = torch.randint(V, (27, L), generator=torch.Generator().manual_seed(0))
    for shares, xt, expected in (
            ((alpha, 1 - alpha, 0 * alpha), torch.full((27, L), MASK),
             alpha[:, None] / (1 - alpha[:, None]) * MDLM(MASK).cost(logits, SEQUENCES, None)),
            ((alpha, 0 * alpha, 1 - alpha), kept, Uniform(V).cost(logits, SEQUENCES, kept, sigma))):
        objective = Hybrid(V)
        objective.shares = lambda sigma: shares
        torch.testing.assert_close(objective.cost(logits, SEQUENCES, xt, sigma), expected, rtol=1e-4, atol=1e-5)


def test_few_random_tokens_have_the_bound_of_masks():
    """The bound of a network that ignores the time, with uniform_share = 0.001: nearly that of masks alone."""
    logits, generator, n = random_logits(2), torch.Generator().manual_seed(4), 200_000
    u, v, pick = (1 - torch.rand(n, *shape, dtype=torch.float64, generator=generator) for shape in ((), (L,), ()))
    x0 = SEQUENCES[torch.multinomial(P_DATA, n, replacement=True, generator=generator)]
    mine, theirs = Hybrid(V, "linear", 1e-3), MDLM(MASK)
    # what the network says of tokens that it sees: themselves, so that random tokens are the only surprise
    sees = torch.nn.functional.one_hot(STATES.clamp(max=V - 1), V) * (STATES != MASK)[..., None]
    a = mine.nelbo(network(torch.where(sees.any(-1, keepdim=True), 0.0, logits)), x0, mine.rates(u, v)).double()
    b = theirs.nelbo(network(logits), x0, theirs.continuous(u, v, pick)).double()
    assert abs(a.mean() - b.mean()) < 4 * (a.std() + b.std()) / n**0.5 + 0.02 and b.mean() > 1


def test_estimates_are_finite_and_agree():
    """For a network of a fixed output both estimators agree, within errors that mean something, also with `noise`."""
    objective, logits, n = Hybrid(V, "cosine", 0.3), random_logits(5), 60_000
    exact = (P_DATA @ bound(objective, 0.3, lambda shares: network(logits))).item() / L
    generator = torch.Generator().manual_seed(2)
    x0 = SEQUENCES[torch.multinomial(P_DATA, n, replacement=True, generator=generator)]
    for name in ("rates", "flatter_rates", "noise"):
        u, v = (1 - torch.rand(n, *shape, dtype=torch.float64, generator=generator) for shape in ((), (L,)))
        nats = objective.nelbo(network(logits), x0, getattr(objective, name)(u, v)).double()
        assert nats.isfinite().all() and (nats >= 0).all()
        assert abs(nats.mean() - exact) < 4 * nats.std() / n**0.5 < 0.2 * exact


def test_simple_weights():
    """The loss is 6 phi (1 - phi) times the bound, whose weight in dphi is 1/(phi (1 - phi)), up to J/q."""
    objective = Hybrid(V, "linear", 0.2, "simple")
    u, v = uniforms(0, 0, range(27), 27, L, stratified=True)
    noise = objective.noise(u, v)
    alpha, m, _ = objective.shares(noise.sigma)
    phi = m / (alpha + m)
    loss, nelbo = objective.loss(network(random_logits(3)), SEQUENCES, noise)
    assert loss.item() == pytest.approx((6 * phi * (1 - phi) * nelbo).mean().item(), rel=1e-5)
    assert Hybrid(V, "linear", 0.2).loss(network(random_logits(3)), SEQUENCES, noise)[0] == nelbo.mean()
    # dphi/dt = phi (1 - phi) dsigma/dt / (m + n/2): for phi uniform, a mask's KL has the factor 6, a random token's 3
    t = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    of = lambda t: objective.shares(-torch.log1p(-t))
    share = lambda t: of(t)[1] / (of(t)[0] + of(t)[1])
    slope = (share(t + 1e-6) - share(t - 1e-6)) / 2e-6
    alpha, m, n = of(t)
    torch.testing.assert_close(slope, share(t) * (1 - share(t)) / (1 - t) / (m + n / 2), rtol=1e-5, atol=0)


def test_training_reaches_the_optimum():
    """Minimising the loss from all noise of one rate moves a table of logits to the leave-one-out predictor."""
    p, rate = 0.3, 0.5
    shares = world.hybrid_shares(1 - rate, p)
    table = torch.zeros(N_STATES, L, V, requires_grad=True)
    optimizer, objective = torch.optim.Adam([table], lr=0.1), Hybrid(V, "linear", p)
    weights = (P_DATA[:, None] * world.hybrid_distribution(shares)).flatten()
    for _ in range(400):
        optimizer.zero_grad()
        (weights * objective.nelbo(network(table), EVERY_X0, all_noise(rate))).sum().backward()
        optimizer.step()
    torch.testing.assert_close(table.detach().double().softmax(-1), world.hybrid_oracle(shares), atol=5e-3, rtol=0)


def test_edges():
    """Rates next to 0 and 1, and predictions of certainty, give finite costs and gradients; with 50,258 tokens, too."""
    for vocabulary, p in ((V, 0.5), (50258, 0.001), (50258, 0.999)):
        objective = Hybrid(vocabulary, "linear", p)
        x0 = torch.randint(vocabulary, (6, 4), generator=torch.Generator().manual_seed(0))
        logits = (1e4 * torch.nn.functional.one_hot(x0, vocabulary).float()).requires_grad_()
        u = torch.tensor([1e-12, 1e-6, 1e-3, 0.5, 1 - 1e-9, 1.0], dtype=torch.float64)
        v = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for draw in (objective.noise, objective.rates):
            nats = objective.nelbo(lambda xt, t: logits, x0, draw(u, v))
            assert nats.isfinite().all() and (nats >= 0).all()
            (gradient,) = torch.autograd.grad(nats.sum(), logits)
            assert gradient.isfinite().all()


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_posterior_is_bayes():
    """The weights are those of Bayes' rule, in float32, for all states, also in the first and the last step."""
    x = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    z = torch.arange(V + 1)
    for alpha, earlier in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0), (0.5, 0.5 + 1e-6)):
        now, before = (world.hybrid_shares(a, 0.3) for a in (alpha, earlier))
        code = posterior(x.float().expand(V + 1, V), z, now, before)
        possible = z if alpha else z[-1:]  # at first all tokens are masks
        expected = world.hybrid_step(x.expand(V + 1, V), z, now, before)
        torch.testing.assert_close((code / code.sum(-1, keepdim=True)).double()[possible], expected[possible],
                                   rtol=1e-4, atol=1e-6)


def told(p):
    """A denoiser that predicts by the rate that it is told, with the objective's share of random tokens."""
    def model(xt, t, where):
        shares = world.hybrid_shares(1 - t[0].double().item(), p)
        return picked(predict(shares)[(xt * CODE).sum(1)], where).float()

    generator = torch.Generator().manual_seed(11)
    a, b = torch.randn(2, N_STATES, L, V, dtype=torch.float64, generator=generator)
    predict = lambda shares: 1.5 * (a + math.sin(3 * shares[0]) * b)
    return model, predict


def steps_of(grid, p, predict):
    of = lambda rate: world.hybrid_shares(1 - rate, p)
    return [world.hybrid_step(predict(of(r)).softmax(-1), STATES, of(r), of(rho)) for r, rho in zip(grid, grid[1:])]


@pytest.mark.parametrize("p", SHARES)
def test_samples_follow_the_chain(p):
    """Texts of an arbitrary network have the distribution that the enumerated chain gives; each step, too."""
    grid, (model, predict) = [1.0, 0.7, 0.3, 0.0], told(p)
    states = Settings("ancestral", {"grid": grid}).states(Hybrid(V, "linear", p), model, masks(30_000),
                                                          torch.Generator().manual_seed(0))
    *_, before_last, last = states
    expected = world.hybrid_chain_distribution(steps_of(grid, p, predict))
    assert expected.sum().item() == pytest.approx(1)
    assert chi_square_excess(counts_of(last.xt), expected) < 4
    assert chi_square_excess(counts_of(last.xt), P_DATA) > 10
    *_, other = Settings("ancestral", {"grid": [0.9, 0.7, 0.3, 0.0]}).states(
        Hybrid(V, "loglinear:0.1", p), model, masks(10), torch.Generator().manual_seed(0))
    *_, same = Settings("ancestral", {"grid": grid}).states(
        Hybrid(V, "loglinear:0.1", p), model, masks(10), torch.Generator().manual_seed(0))
    assert torch.equal(other.xt, same.xt)  # a schedule that ends early: the chain begins with masks all the same
    assert (before_last.xt == MASK).any() and (last.xt != before_last.xt)[before_last.xt != MASK].any()


def test_many_steps_of_the_optimum_draw_from_the_data():
    """The chain of the exact predictor tends to the distribution of the data as the number of steps grows."""
    gaps = []
    for n in (4, 16, 64):
        grid = [1 - i / n for i in range(n)] + [0.0]
        chain = world.hybrid_chain_distribution(
            steps_of(grid, 0.3, lambda shares: world.hybrid_oracle(shares).nan_to_num(1 / V).log()))
        gaps.append((P_DATA * (P_DATA / chain).log()).sum().item())
    assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 0.02


def test_infilling():
    """Given tokens stay; p is that of the token given all of xt, with the optimum, and nan where a mask is left."""
    p, grid = 0.5, [1.0, 0.6, 0.2, 0.0]
    objective = Hybrid(V, "linear", p)

    def model(xt, t, where):
        shares = world.hybrid_shares(max(1 - t[0].double().item(), 1e-9), p)  # at rate 1 no token could be given
        return picked(world.hybrid_oracle(shares).log()[(xt * CODE).sum(1)], where)

    xt = torch.tensor([[0, V, 2], [V, 1, V], [0, 1, 2]]).repeat(50, 1)
    free, before = xt == MASK, xt
    states = Settings("ancestral", {"grid": grid}).states(objective, model, xt, torch.Generator().manual_seed(0))
    for state, r in zip(states, grid):
        assert torch.equal(state.xt[~free], xt[~free]) and state.p[~free].isnan().all()
        now = world.hybrid_oracle(world.hybrid_shares(max(1 - r, 1e-9), p), leave_one_out=False)[(before * CODE).sum(1)]
        expected = now.gather(-1, state.xt.clamp(max=V - 1)[..., None]).squeeze(-1).float()
        written = free & (state.xt != MASK)
        torch.testing.assert_close(state.p[written], expected[written], rtol=1e-3, atol=1e-5)
        assert state.p[free & ~written].isnan().all()
        before = state.xt
    assert (before != MASK).all()


@pytest.mark.parametrize("common", [dict(temperature=0), dict(temperature=0.5), dict(top_p=0.7), dict(top_k=2)])
def test_temperature(common):
    """Temperature, top_p and top_k change the prediction, from which each step follows: at temperature 0 the chain is
    that of a prediction of certainty."""
    grid, (model, predict) = [1.0, 0.5, 0.0], told(0.5)
    cut = Draw(torch.Generator(), **common).cut

    def changed(shares):
        logits = predict(shares)
        p = cut(logits.flatten(0, 1), logits.softmax(-1).flatten(0, 1)).view(logits.shape)
        return (p / p.sum(-1, keepdim=True)).log()

    expected = world.hybrid_chain_distribution(steps_of(grid, 0.5, changed))
    *_, state = Settings("ancestral", {"grid": grid}, **common).states(
        Hybrid(V, "linear", 0.5), model, masks(20_000), torch.Generator().manual_seed(0))
    counts, possible = counts_of(state.xt), expected > 1e-12
    assert counts[~possible].sum() == 0 and chi_square_excess(counts[possible], expected[possible]) < 4


def test_rates_next_to_one():
    """Steps of schedules and grids whose rates are 1 in float32."""
    anything = lambda xt, t, where: torch.zeros(int(where.sum()), V)
    for rates in ([1.0, 1 - 1e-8, 0.5, 0.0], schedule_grid("geometric", 20), schedule_grid("cosine", 10**5)[:3] + [0]):
        *_, state = Settings("ancestral", {"grid": rates}).states(Hybrid(V), anything, masks(50),
                                                                  torch.Generator().manual_seed(0))
        assert (state.xt != MASK).all()


def test_settings_reach_the_objective():
    """uniform_share, weighting and schedule of a Config arrive where they belong."""
    config = replace(gidd_text8(), schedule="cosine", uniform_share=0.5)
    objective = config.make_objective(V)
    found = [share.item() for share in objective.shares(torch.tensor(math.log(3), dtype=torch.float64))]
    assert found == pytest.approx(world.hybrid_shares(1 / 3, 0.5))
    assert objective.weighting == "simple" and objective.time(torch.tensor(0.5)).item() == pytest.approx(1 / 3)
