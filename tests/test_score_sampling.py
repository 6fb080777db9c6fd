"""SEDD's predictors and the samplers of uniform noise, against enumerated distributions built from rate matrices."""

import math

import pytest
import torch

import world
from categorical import Draw, with_denoising
from diffusion import MDLM, SEDD, Absorbing
from networks import log_scores
from sampler_settings import schedule_grid
from sampling import SAMPLERS, Settings, ancestral, denoiser_of
from schedules import make_schedule
from test_sampling import chi_square_excess, counts_of, masks
from uniform import Uniform, UniformD3PM, UniformSEDD
from world import MASK, P_DATA, SEQUENCES, STATES, L, V, picked

N_SAMPLES = 30_000
ABSORBING = torch.zeros(V + 1, V + 1, dtype=torch.float64)  # rate matrices, rows: from
ABSORBING[:V, MASK], ABSORBING[range(V), range(V)] = 1.0, -1.0
UNIFORM = torch.full((V, V), 1 / V, dtype=torch.float64) - torch.eye(V, dtype=torch.float64)


def tweedie(scores, states, rates, dsigma):
    """p(x_s | x_t) per position, unnormalised: [e^(-dsigma Q) s]_y e^(dsigma Q)(y, x_t): discrete Tweedie (SEDD).

    scores (n, L, K): ratios of p_t(y) to p_t(x_t), 1 at x_t itself. rates: Q.
    """
    back, forth = torch.matrix_exp(-dsigma * rates), torch.matrix_exp(dsigma * rates)
    return torch.einsum("nly,yz->nlz", scores, back) * forth[:, states].permute(1, 2, 0)


def distribution_of(steps, states, first):
    """p(x0) of a chain: steps (n, L, K) unnormalised, from the distribution `first` over the states (n, L)."""
    expected = first
    for p in steps:
        p = p / p.sum(-1, keepdim=True)
        expected = expected @ torch.stack([p[:, i, states[:, i]] for i in range(L)]).prod(0)
    return expected


def sample(objective, model, settings, xt=None, seed=0):
    xt = masks(N_SAMPLES) if xt is None else xt
    *_, state = settings.states(objective, model, xt, torch.Generator().manual_seed(seed))
    return state.xt


# ---- masks -----------------------------------------------------------------------------------------------------------


def unnormalised(scaled=True):
    """A network of SEDD's kind whose predictions sum to something between 0.7 and 1.1."""
    model = world.random_denoiser(3, sees_time=True)

    def network(xt, t, where=None):
        z = 0.9 + 0.2 * torch.sin((xt * torch.arange(1, L + 1)).sum(1).double())
        logits = model(xt, t).log_softmax(-1) + z.log()[:, None, None]
        logits = logits + (math.log(V) if scaled else SEDD(MASK).log_odds(t)[:, None, None])
        return picked(logits, where)
    return network


def masked_steps(model, objective, grid, dsigma_of):
    """The steps of a chain by definition, for every state: visible tokens stay; the last step leaves no mask."""
    steps = []
    for r, s in zip(grid, grid[1:]):
        t = objective.time(torch.full((len(STATES),), r, dtype=torch.float64))
        logits = model(STATES, t).reshape(-1, V)
        scores = log_scores(objective, logits, t.repeat_interleave(L)).exp().double().view(len(STATES), L, V)
        p = dsigma_of(torch.cat([scores, torch.ones(len(STATES), L, 1)], -1), r, s)
        if s == 0:
            p[..., MASK] = 0
        visible = torch.nn.functional.one_hot(STATES, V + 1).double()
        steps.append(torch.where((STATES == MASK)[..., None], p, visible))
    return steps


FINISHED = (STATES != MASK).all(1)
ALL_MASKS = (STATES == MASK).all(1).double()
GRID = [0.999, 0.8, 0.55, 0.3, 0.0]  # of mask rates; log-linear noise ends at .999


@pytest.mark.parametrize("scaled", [True, False])
def test_analytic_follows_tweedie(scaled):
    """With scores that do not sum to one: the chain of matrix exponentials, which is not that of normalised scores."""
    objective, model = SEDD(MASK, scaled=scaled), unnormalised(scaled)

    def step(scores, r, s):
        dsigma = math.log((1 - s) / (1 - r))
        return tweedie(scores, STATES, ABSORBING, dsigma)

    steps = masked_steps(model, objective, GRID, step)
    expected = distribution_of(steps, STATES, ALL_MASKS)[FINISHED]
    assert expected.sum().item() == pytest.approx(1)
    counts = counts_of(sample(objective, model, Settings("analytic", {"grid": GRID})))
    assert chi_square_excess(counts, expected) < 4
    assert chi_square_excess(counts_of(sample(objective, model, Settings("ancestral", {"grid": GRID}))), expected) > 10


@pytest.mark.parametrize("schedule", ["loglinear", "geometric:0.05:3"])
def test_euler_follows_its_steps(schedule):
    """Each step is identity + dt dsigma/dt reverse rates; then the noise removal of SEDD, by Tweedie, without masks."""
    objective, model = SEDD(MASK, schedule), unnormalised()
    noise = make_schedule(schedule)
    grid = (1 - noise.alpha(torch.tensor([1.0, 0.6, 0.3, 0.0], dtype=torch.float64))).tolist()
    grid[-1] = 0.0
    time_of = lambda rate: noise.inverse(torch.tensor(1 - rate, dtype=torch.float64))

    def step(scores, r, s):
        if s == 0:
            return tweedie(scores, STATES, ABSORBING, -math.log(1 - r))
        t, dt = time_of(r), time_of(r) - time_of(s)
        p = dt * -noise.dalpha(t) / noise.alpha(t) * scores
        p[..., MASK] = 1 - p[..., :V].sum(-1)
        return p.clamp(min=0)

    expected = distribution_of(masked_steps(model, objective, with_denoising(grid), step), STATES, ALL_MASKS)[FINISHED]
    counts = counts_of(sample(objective, model, Settings("euler", {"grid": grid})))
    assert chi_square_excess(counts, expected) < 4


@pytest.mark.parametrize("schedule", ["linear", "loglinear"])
def test_euler_analytic_and_ancestral_are_one(schedule):
    """Of normalised predictions and log-linear noise all three reveal with probability (t - s)/t.

    Draw for draw the same tokens by analytic and Euler, but for the noise removal at the end. Their distribution is
    that of ancestral.
    """
    grid = schedule_grid(schedule, 4)
    objective = MDLM(MASK, schedule)
    model = world.random_denoiser(2, sees_time=True)
    one, two = (sample(objective, model, Settings(name, {"grid": grid})) for name in ("analytic", "euler"))
    assert (one == two).all(1).double().mean() > 0.99
    expected = world.chain_distribution(lambda xt, t: model(xt, objective.time(1 - objective.schedule.alpha(t))),
                                        [1 - rate for rate in reversed(grid)])
    for x0 in (one, two, sample(objective, model, Settings("ancestral", {"grid": grid}))):
        assert chi_square_excess(counts_of(x0), expected) < 4


@pytest.mark.parametrize("schedule", ["cosine", "geometric:0.01:6"])
def test_analytic_is_ancestral_for_every_schedule(schedule):
    """Of normalised predictions: both follow the enumerated chain; Euler's steps are others."""
    grid, objective = schedule_grid(schedule, 3), MDLM(MASK, schedule)
    model = world.random_denoiser(5, sees_time=True)
    expected = world.chain_distribution(model, [1 - rate for rate in reversed(grid)])
    counts = {name: counts_of(sample(objective, model, Settings(name, {"grid": grid})))
              for name in ("analytic", "ancestral", "euler")}
    assert chi_square_excess(counts["analytic"], expected) < 4 and chi_square_excess(counts["ancestral"], expected) < 4
    assert chi_square_excess(counts["euler"], expected) > 10


# ---- uniform noise ---------------------------------------------------------------------------------------------------


def network_at(objective, predict):
    """A denoiser from predict(rate) -> (27, L, V) logits; it finds the rate from the time that it is told."""
    def model(xt, t, where):
        rate = 1 - float(objective.schedule.alpha(t[0].double()))
        logits = predict(rate)[(xt * torch.tensor([9, 3, 1])).sum(1)]
        return picked(logits, where).float()
    return model


def random_prediction(rate):
    generator = torch.Generator().manual_seed(11)
    a, b = torch.randn(2, len(SEQUENCES), L, V, dtype=torch.float64, generator=generator)
    return 1.5 * (a + math.sin(3 * rate) * b)


UNIFORM_START = torch.full((len(SEQUENCES),), 1 / len(SEQUENCES), dtype=torch.float64)


@pytest.mark.parametrize("objective", [Uniform(V, "linear"), UniformD3PM(V, 100), Uniform(V, "loglinear")],
                         ids=["udlm", "d3pm", "duo"])
def test_uniform_ancestral_follows_its_chain(objective):
    grid = [1.0, 0.7, 0.3, 0.0]
    objective_time = lambda r: 1 - float(objective.schedule.alpha(objective.time(torch.tensor([r]).double()).double()))
    for predict in (random_prediction, lambda rate: world.uniform_oracle(1 - rate).log()):
        steps = [world.uniform_step(predict(objective_time(r)).softmax(-1), 1 - r, 1 - s)
                 for r, s in zip(grid, grid[1:])]
        x0 = sample(objective, network_at(objective, predict), Settings("ancestral", {"grid": grid}))
        counts = counts_of(x0)
        assert chi_square_excess(counts, world.uniform_chain_distribution(steps)) < 4
        assert chi_square_excess(counts, P_DATA) > 10


@pytest.mark.parametrize("consistent", [True, False])
def test_uniform_scores_follow_tweedie(consistent):
    """Score networks: the chain of matrix exponentials, also of scores that belong to no prediction; the analytic step
    of a prediction's scores is the posterior step."""
    objective = UniformSEDD(V, "geometric:0.01:3")
    most = 1 - float(objective.schedule.alpha(torch.tensor(1.0).double()))
    grid = [most, 0.6, 0.3, 0.0]

    def predict(rate):
        if consistent:
            x_bar = V * (1 - rate) * random_prediction(rate).softmax(-1) + rate
            return x_bar.log() - x_bar.log().gather(-1, SEQUENCES[..., None])
        score = 0.3 * random_prediction(rate)
        return score.scatter(-1, SEQUENCES[..., None], 0.0)

    steps = []
    for r, s in zip(grid, grid[1:]):
        told = 1 - float(objective.schedule.alpha(objective.time(torch.tensor([r]).double()).double()))
        p = tweedie(predict(told).exp(), SEQUENCES, UNIFORM, math.log((1 - s) / (1 - r))).clamp(min=0)
        if consistent:
            exact = world.uniform_step(random_prediction(told).softmax(-1), 1 - r, 1 - s)
            torch.testing.assert_close(p / p.sum(-1, keepdim=True), exact, rtol=1e-4, atol=1e-6)
        steps.append(p)
    expected = distribution_of(steps, SEQUENCES, UNIFORM_START)
    model = network_at(objective, predict)
    for name in ("analytic", "ancestral"):
        samples = sample(objective, model, Settings(name, {"grid": [1.0, *grid[1:]]}))
        assert chi_square_excess(counts_of(samples), expected) < 4


@pytest.mark.parametrize("score", [True, False])
def test_uniform_euler_follows_its_steps(score):
    objective = (UniformSEDD if score else Uniform)(V, "geometric:0.05:3")
    noise = objective.schedule
    grid = (1 - noise.alpha(torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64))).tolist()
    grid[-1] = 0.0
    time_of = lambda rate: noise.inverse(torch.tensor(1 - rate, dtype=torch.float64))
    steps = []
    rates = with_denoising(grid, 1 - noise.alpha(torch.tensor(0.0).double()).item())
    for r, s in zip(rates, rates[1:]):
        told = 1 - float(noise.alpha(objective.time(torch.tensor([r]).double()).double()))
        scores = random_prediction(told)
        if not score:
            scores = (V * (1 - r) * scores.softmax(-1) + r).log()
        scores = (scores - scores.gather(-1, SEQUENCES[..., None])) if not score else scores.scatter(
            -1, SEQUENCES[..., None], 0.0)
        if s == 0:
            steps.append(tweedie(scores.exp(), SEQUENCES, UNIFORM, -math.log(1 - r)).clamp(min=0))
            continue
        t = time_of(r)
        p = (t - time_of(s)) * -noise.dalpha(t) / noise.alpha(t) / V * scores.exp()
        p = p.scatter(-1, SEQUENCES[..., None], 0.0)
        steps.append(p.scatter(-1, SEQUENCES[..., None], (1 - p.sum(-1, keepdim=True)).clamp(min=0)))
    expected = distribution_of(steps, SEQUENCES, UNIFORM_START)
    x0 = sample(objective, network_at(objective, random_prediction), Settings("euler", {"grid": grid}))
    assert chi_square_excess(counts_of(x0), expected) < 4


@pytest.mark.parametrize("name", ["ancestral", "euler"])
def test_noise_is_removed(name):
    """Samples by the true scores have no impossible token. `geometric` has noise at t = 0, here sigma = 0.1."""
    objective, p = UniformSEDD(4, "geometric:0.1:20"), torch.tensor([0.7, 0.3, 0.0, 0.0])

    def model(xt, t, where):
        alpha = objective.schedule.alpha(t[0])
        q = alpha * p + (1 - alpha) / 4
        return (q / q[xt[where]][:, None]).log()

    grid = (1 - objective.schedule.alpha(torch.linspace(1, 0, 50).double())).tolist()
    x0 = sample(objective, model, Settings(name, {"grid": [*grid[:-1], 0.0]}), torch.full((5000, 1), 4))
    assert torch.bincount(x0.flatten(), minlength=4)[2:].sum() == 0


def test_rates_that_a_score_network_does_not_know():
    """Steps between mask rates above the last one of the schedule call no network. The network is told no such rate."""
    objective, told = UniformSEDD(V, "loglinear:0.01"), []

    def model(xt, t, where):
        told.append(t[0].item())
        return torch.zeros(int(where.sum()), V)

    sample(objective, model, Settings("ancestral", {"grid": [1.0, 0.999, 0.995, 0.5, 0.0]}), masks(2))
    assert told == pytest.approx([1.0, 0.5 / 0.99])


def test_uniform_infilling():
    """Given tokens stay, the marks of what is to be written are gone from the first state on, p is a probability: that
    of the token given all of xt, with the Bayes-optimal network."""
    objective, rates = Uniform(V, "linear"), [1.0, 0.6, 0.2, 0.0]
    model = network_at(objective, lambda rate: world.uniform_oracle(1 - rate).log())
    xt = torch.tensor([[0, V, 2], [V, 1, V], [0, 1, 2]]).repeat(50, 1)
    for name in Uniform.samplers:
        before = None
        way = Settings(name, {"grid": rates})
        for state, r in zip(way.states(objective, model, xt, torch.Generator().manual_seed(0)), rates[:-1]):
            assert (state.xt < V).all() and torch.equal(state.xt[xt != V], xt[xt != V])
            assert state.p[xt != V].isnan().all() and ((state.p[xt == V] >= 0) & (state.p[xt == V] <= 1)).all()
            if before is not None:
                posterior = world.uniform_oracle(1 - r, leave_one_out=False)[(before * torch.tensor([9, 3, 1])).sum(1)]
                expected = posterior.gather(-1, state.xt[..., None]).squeeze(-1).float()
                torch.testing.assert_close(state.p[xt == V], expected[xt == V], rtol=1e-4, atol=1e-5)
            before = state.xt


def test_temperature_of_uniform_noise():
    """Temperature changes the prediction, not the probabilities of a step.

    At temperature 0 the last step draws the likeliest token where it draws one anew, and at 0.5 from the softmax of
    twice the logits. With top_k = 1 the chain is that of a prediction of certainty.
    """
    objective = Uniform(V, "linear")
    model = network_at(objective, random_prediction)
    draw = Draw(torch.Generator().manual_seed(0), temperature=0)
    sampler = SAMPLERS["uniform_ancestral"].function
    (state,) = sampler(denoiser_of(model, objective), masks(500), objective, draw, grid=[1.0, 0.0])
    first = Draw(torch.Generator().manual_seed(0)).uniform((500, L)) * V
    guess = random_prediction(1.0)[(first.long() * torch.tensor([9, 3, 1])).sum(1)].argmax(-1)
    assert torch.equal(state.xt, guess)
    steps = []
    for r, s in ((1.0, 0.5), (0.5, 0.0)):
        likeliest = torch.nn.functional.one_hot(random_prediction(r).argmax(-1), V).double()
        steps.append(world.uniform_step(likeliest, 1 - r, 1 - s))
    counts = counts_of(sample(objective, model, Settings("ancestral", {"grid": [1.0, 0.5, 0.0]}, top_k=1)))
    expected = world.uniform_chain_distribution(steps)
    assert counts[expected == 0].sum() == 0 and chi_square_excess(counts[expected > 0], expected[expected > 0]) < 4
    draw = Draw(torch.Generator().manual_seed(0), temperature=0.5)
    (state,) = sampler(denoiser_of(model, objective), masks(N_SAMPLES), objective, draw, grid=[1.0, 0.0])
    first = (Draw(torch.Generator().manual_seed(0)).uniform((N_SAMPLES, L)) * V).long()
    p = (2 * random_prediction(1.0)).softmax(-1)[(first * torch.tensor([9, 3, 1])).sum(1)].mean(0)
    for i in range(L):
        assert chi_square_excess(state.xt[:, i].bincount(minlength=V).double(), p[i]) < 4


def test_noise_removal_ends_the_chain():
    """As in SEDD's code, the last of n steps ends just above 0, and one more, without masks, removes what is left."""
    assert with_denoising([1.0, 0.5, 0.0]) == [1.0, 0.5, 1e-5, 0.0]
    assert with_denoising([1.0, 1e-6, 0.0]) == [1.0, 1e-6, 5e-7, 0.0]
    assert with_denoising([1.0, 0.5, 0.0], 1e-3) == [1.0, 0.5, 1e-3, 0.0]


def test_names():
    """Samplers of uniform noise have the names of those of masks, so that one list of names serves both."""
    assert set(Uniform.samplers) <= set(Absorbing.samplers)
    assert SAMPLERS["ancestral"].function is ancestral
