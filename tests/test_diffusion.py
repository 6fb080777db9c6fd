"""diffusion.py against brute force: closed forms, bounds and estimators on a world that can be enumerated."""

import math

import pytest
import torch

import world
from cli import UserError
from configs import OBJECTIVES, OWNERS, Config
from diffusion import D3PM, MDLM, SEDD, AutoRegressive, Noise
from foreign.bert import BERT
from likelihood import ORDERS
from networks import log_scores, network
from randomness import give_prefix, prefix_lengths, repeated_uniforms, uniforms
from sampling import SAMPLERS
from schedules import FULL_RANGE, SCHEDULES, Schedule, make_schedule
from uniform import Uniform
from world import MASK, MASKS, SEQUENCES, L, V, picked

T = 4


def alphas(schedule, T):
    return make_schedule(schedule).alpha(torch.arange(T + 1, dtype=torch.float64) / T).tolist()


def v_of(mask, threshold):
    """Numbers v that are masked exactly where `mask` says, if noise masks v <= threshold."""
    return torch.where(mask, threshold / 2, (1 + threshold) / 2)


def exact_mean(model, objective, draws):
    """sum over draws (probability, u, v) of probability * nelbo, for every sequence: (27,) nats per sequence."""
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for probability, u, v in draws:
        noise = objective.noise(torch.full((len(SEQUENCES),), u, dtype=torch.float64), v.expand(len(SEQUENCES), L))
        total += probability * objective.nelbo(model, SEQUENCES, noise).double() * L
    return total


def independent_draws(u_nodes, threshold):
    """Every mask of every u, with its probability under independent masking at rate threshold(u)."""
    for weight, u in u_nodes:
        rate = threshold(u)
        for mask in MASKS:
            k = int(mask.sum())
            yield weight * rate**k * (1 - rate) ** (L - k), u, v_of(mask, torch.tensor(rate, dtype=torch.float64))


def d3pm_draws(objective):
    def rate(u):
        return 1 - objective.schedule.alpha(torch.tensor(math.ceil(u * T) / T, dtype=torch.float64)).item()
    return independent_draws([(1 / T, (s - 0.5) / T) for s in range(1, T + 1)], rate)


def quadrature(n=40):
    """Gauss-Legendre nodes and weights on (0, 1): exact for the polynomials in t that an expected loss is made of."""
    import numpy as np
    x, w = np.polynomial.legendre.leggauss(n)
    return [(weight / 2, (node + 1) / 2) for node, weight in zip(x, w)]


# ---- the forward process --------------------------------------------------------------------------------------------


ENDS = {"linear": (1, 0), "cosine": (1, 0), "loglinear": (1, 1e-3), "loglinear:0.2": (1, 0.2),
        "geometric": (math.exp(-1e-4), math.exp(-20)), "geometric:0.1:3": (math.exp(-0.1), math.exp(-3)),
        "gidd": (1, 0), "gidd:0.9": (1, 0)}


@pytest.mark.parametrize("schedule", ENDS | SCHEDULES)
def test_schedule_is_consistent(schedule):
    """alpha falls between its ends, dalpha is its derivative, inverse its inverse, and stays in [0, 1] beyond them."""
    s = make_schedule(schedule)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    alpha = s.alpha(t)
    if schedule in ENDS:
        torch.testing.assert_close(alpha[[0, -1]], torch.tensor(ENDS[schedule], dtype=torch.float64))
    assert (alpha.diff() < 0).all()
    (gradient,) = torch.autograd.grad(alpha.sum(), t)
    known = gradient.isfinite()  # that of gidd is infinite at t = 0, and autograd's is no number at t = 1
    assert known[1:-1].all() and (known.all() or schedule.startswith("gidd"))
    torch.testing.assert_close(s.dalpha(t.detach())[known], gradient[known])
    torch.testing.assert_close(s.inverse(alpha.detach()), t.detach(), atol=1e-7, rtol=0)
    assert s.inverse(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([0, 1])
    assert s.inverse(torch.tensor([1 + 1e-9, -1e-9], dtype=torch.float64)).tolist() == pytest.approx([0, 1])
    inner = t.detach()[1:-1]
    torch.testing.assert_close(s.sigma(inner), -alpha.detach()[1:-1].log())
    dsigma = torch.autograd.grad(s.sigma(t)[1:-1].sum(), t)[0][1:-1]
    torch.testing.assert_close(s.weight(inner), dsigma / torch.expm1(s.sigma(inner)))  # as SEDD and MDLM write it


@pytest.mark.parametrize("wrong", ["", "quadratic", "linear:1", "loglinear:2", "loglinear:-1", "loglinear:nan",
                                   "loglinear:x", "geometric:5:1", "geometric:0:1", "geometric:1:inf",
                                   "geometric:1:2:3", "geometric:1:50", "geometric:20", "geometric:25",
                                   "loglinear:1e-9", "gidd:0", "gidd:1", "gidd:nan"])
def test_no_schedule(wrong):
    """The message repeats the name, and is not Python's about the arguments of a function."""
    with pytest.raises(ValueError, match=f"^'{wrong}' is (unknown|not valid): [^()]*$"):
        make_schedule(wrong)


def test_whole_schedules(monkeypatch):
    """A schedule is whole if its alpha goes from 1 to 0, also one with a number: D3PM takes it, and no network is told
    its sigma. A message says which number is wrong."""
    power = lambda p=2.0: Schedule(lambda t: 1 - t**p, lambda t: -p * t ** (p - 1), lambda a: (1 - a) ** (1 / p),
                                   lambda t: -torch.log1p(-t**p))
    monkeypatch.setitem(SCHEDULES, "power", power)
    assert all(make_schedule(name).full_range for name in ("linear", "cosine", "power", "power:3"))
    assert not any(make_schedule(name).full_range for name in ("loglinear:1e-6", "geometric", "geometric:1e-9:30"))
    assert Config(schedule="power:3").make_objective(5).schedule.alpha(torch.tensor(0.5)) == 1 - 0.5**3
    with pytest.raises(UserError, match="schedule=power:3 ends at an infinite one"):
        Config(schedule="power:3", conditioning="sigma")
    with pytest.raises(UserError, match="schedule='loglinear:2' is not valid: eps must be from 1e-6 to 0.5"):
        Config(schedule="loglinear:2")


@pytest.mark.parametrize("schedule", FULL_RANGE)
def test_marginals_are_products_of_one_step_matrices(schedule):
    """The share of v in (0, 1] masked at step s is the mask's entry of Q_1 ... Q_s; a token never changes otherwise."""
    objective, n = D3PM(MASK, T, schedule), 10_000
    _, products = world.matrices(alphas(schedule, T))
    v = ((torch.arange(n, dtype=torch.float64) + 0.5) / n)[None]
    for s in range(1, T + 1):
        noise = objective.noise(torch.tensor([(s - 0.5) / T], dtype=torch.float64), v)
        assert noise.t.item() == pytest.approx(s / T)
        assert noise.mask.float().mean().item() == pytest.approx(products[s][0, MASK].item(), abs=1 / n)
        assert products[s][0, 0] + products[s][0, MASK] == pytest.approx(1)
    assert objective.noise(torch.tensor([1.0], dtype=torch.float64), v).mask.all()  # t = 1: everything is masked


def test_the_edges_of_u_fall_into_the_right_steps():
    """u = 1/T still belongs to s = 1, and u just above it to s = 2; the smallest u gives s = 1, not 0."""
    u = torch.tensor([1e-300, 1 / T, 1 / T + 1e-12, 1.0], dtype=torch.float64)
    v = torch.full((4, L), 0.5, dtype=torch.float64)
    assert (D3PM(MASK, T).noise(u, v).t * T).tolist() == [1, 1, 2, T]
    assert (D3PM(MASK, T).t_step(u, v).t * T).tolist() == [1, 1, 2, T]
    assert MDLM(MASK).exact_k(torch.tensor([1e-300, 1.0], dtype=torch.float64),
                              torch.rand(2, L)).mask.sum(1).tolist() == [1, L]


# ---- closed forms against definitions -------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", FULL_RANGE)
@pytest.mark.parametrize("sees_time", [False, True])
def test_d3pm_estimates_its_definition(schedule, sees_time):
    """The exact expectation of D3PM's estimate is the sum of all T posterior KLs, for an arbitrary denoiser."""
    model, objective = world.random_denoiser(1, sees_time), D3PM(MASK, T, schedule)
    torch.testing.assert_close(exact_mean(model, objective, d3pm_draws(objective)),
                               world.t_step_bound(model, alphas(schedule, T)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", FULL_RANGE)
def test_t_step_bound_is_a_bound_on_its_own_sampler(schedule):
    """The T-step bound of every sequence is at least -log p_T(x0) under the enumerated reverse chain."""
    for model in (world.oracle, world.random_denoiser(2, sees_time=True)):
        objective = D3PM(MASK, T, schedule)
        expected = world.chain_distribution(model, alphas(schedule, T))
        assert expected.sum().item() == pytest.approx(1)
        slack = exact_mean(model, objective, d3pm_draws(objective)) + expected.log()
        assert slack.min() > -1e-5 and slack.max() > 1e-3


# ---- which bounds equal the entropy (Bayes-optimal denoiser) ---------------------------------------------------------


@pytest.mark.parametrize("schedule", FULL_RANGE)
def test_continuous_bound_is_the_log_likelihood(schedule):
    """With the Bayes-optimal denoiser, MDLM's bound of every single x is -log p(x), whatever the schedule."""
    objective = MDLM(MASK, schedule)
    rate = lambda u: 1 - objective.schedule.alpha(torch.tensor(u, dtype=torch.float64)).item()
    # u = sin^2(pi x/2), so that sqrt(u (1 - u)), which is in the schedule gidd, is a smooth function of x
    nodes = [(w * math.pi / 2 * math.sin(math.pi * x), math.sin(math.pi * x / 2) ** 2) for w, x in quadrature()]
    bound = exact_mean(world.oracle, objective, independent_draws(nodes, rate))
    torch.testing.assert_close(bound, -world.P_DATA.log(), rtol=1e-4, atol=1e-5)


# ---- estimators ------------------------------------------------------------------------------------------------------


def continuous_bound(model, schedule, pieces=1):
    """The continuous bound of every sequence for any denoiser, by quadrature over t from its definition: (27,) nats.

    pieces: of (0, 1], on each of which the model is smooth in t.
    """
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    nodes = [(weight / pieces, (i + t) / pieces) for i in range(pieces) for weight, t in quadrature(60)]
    for weight, t in nodes:
        alpha = make_schedule(schedule).alpha(torch.tensor(t, dtype=torch.float64)).item()
        dalpha = make_schedule(schedule).dalpha(torch.tensor(t, dtype=torch.float64)).item()
        for mask in MASKS:
            k = int(mask.sum())
            log_p = model(torch.where(mask, MASK, SEQUENCES), torch.full((27,), t, dtype=torch.float64)).log_softmax(-1)
            ce = -log_p.gather(-1, SEQUENCES[..., None]).squeeze(-1)
            total += weight * -dalpha / (1 - alpha) * (1 - alpha) ** k * alpha ** (L - k) * (ce * mask).sum(1)
    return total


@pytest.mark.parametrize("kind, estimator", [
    ("d3pm", "noise"), ("d3pm", "t_step"), ("d3pm", "t_step_uniform"), ("d3pm", "exact_k"), ("d3pm", "continuous"),
    ("mdlm", "noise"), ("mdlm", "exact_k"), ("mdlm", "continuous")])
@pytest.mark.parametrize("schedule", FULL_RANGE)
@pytest.mark.parametrize("sees_time", [False, True])
def test_estimators_are_unbiased(kind, estimator, schedule, sees_time):
    """On the noise of evaluation, 20,000 draws average to within 4 standard errors of the exact bound; with four
    repeats, too, whose noise is not independent. A D3PM network knows no other times than its T steps."""
    model, n, repeats = world.random_denoiser(3, sees_time), 5_000, 4
    objective = D3PM(MASK, T, schedule) if kind == "d3pm" else MDLM(MASK, schedule, "exact_k")
    if kind == "mdlm":
        exact = continuous_bound(model, schedule)
    elif estimator in ("exact_k", "continuous"):
        exact = continuous_bound(lambda xt, t: model(xt, torch.ceil(t * T) / T), schedule, pieces=T)
    else:
        exact = world.t_step_bound(model, alphas(schedule, T))
    u, v, w = (x.flatten(0, 1) for x in repeated_uniforms(1, range(n), n, repeats, L))
    noise = objective.noise(u, v) if estimator == "noise" else getattr(objective, estimator)(u, v, w)
    for i in (0, 13, 26):
        values = objective.nelbo(model, SEQUENCES[i].expand(n * repeats, L), noise).double() * L
        means = values.view(n, repeats).mean(1)
        assert abs(means.mean() - exact[i]) < 4 * means.std() / math.sqrt(n)
        assert means.std() / math.sqrt(n) < 0.02 * exact[i]  # or the line above would show little


def bound_given(model, c, schedule, T=None):
    """The bound of the tokens after the first c, which are given, from its definition: (27,) nats. T: of T steps."""
    if T:
        a = alphas(schedule, T)
        nodes = [(s / T, a[s], (a[s - 1] - a[s]) / (1 - a[s])) for s in range(1, T + 1)]
    else:
        alpha, dalpha = ((lambda t, f=f: f(torch.tensor(t, dtype=torch.float64)).item())
                         for f in make_schedule(schedule)[:2])
        nodes = [(t, alpha(t), weight * -dalpha(t) / (1 - alpha(t))) for weight, t in quadrature(60)]
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for t, a, weight in nodes:
        for mask in MASKS[~MASKS[:, :c].any(1)]:
            k = int(mask.sum())
            log_p = model(torch.where(mask, MASK, SEQUENCES), torch.full((27,), t, dtype=torch.float64)).log_softmax(-1)
            ce = -log_p.gather(-1, SEQUENCES[..., None]).squeeze(-1)
            total += weight * (1 - a) ** k * a ** (L - c - k) * (ce * mask).sum(1)
    return total


@pytest.mark.parametrize("c", [1, 2])
def test_bound_given_a_prefix_is_the_conditional_likelihood(c):
    """With the Bayes-optimal denoiser: -log p(x) + log p(x_1 ... x_c)."""
    prefix = torch.stack([world.P_DATA[(SEQUENCES[:, :c] == x[:c]).all(1)].sum() for x in SEQUENCES])
    torch.testing.assert_close(bound_given(world.oracle, c, "linear"), -(world.P_DATA / prefix).log(), rtol=1e-5,
                               atol=1e-6)


@pytest.mark.parametrize("kind, estimator", [
    ("d3pm", "noise"), ("d3pm", "t_step"), ("mdlm", "noise"), ("mdlm", "exact_k"), ("mdlm", "continuous")])
@pytest.mark.parametrize("c", [1, 2])
def test_estimators_given_a_prefix(kind, estimator, c):
    """Every estimator, nats per token that is not given; the network never sees a mask in the prefix."""
    model, n = world.random_denoiser(3, sees_time=True), 20_000
    objective = D3PM(MASK, T, "cosine") if kind == "d3pm" else MDLM(MASK, "cosine", "uniform")
    exact = bound_given(model, c, "cosine", T if kind == "d3pm" else None)
    u, v, w = (x.squeeze(1) for x in repeated_uniforms(1, range(n), n, 1, L))
    v = give_prefix(v, [c] * n)
    noise = objective.noise(u, v) if estimator == "noise" else getattr(objective, estimator)(u, v, w)
    assert not noise.mask[:, :c].any() and noise.mask[:, c:].any(0).all()
    for i in (0, 13, 26):
        values = objective.nelbo(model, SEQUENCES[i].expand(n, L), noise).double() * (L - c)
        assert abs(values.mean() - exact[i]) < 4 * values.std() / math.sqrt(n)
        assert values.std() / math.sqrt(n) < (0.1 if estimator == "noise" else 0.05) * exact[i]


def test_autoregressive_given_a_prefix():
    """Nats per token of those that are not given."""
    model = lambda seen, t, where: picked(torch.arange(3.0).expand(*seen.shape, 3), where)
    ce = torch.arange(3.0).logsumexp(0) - SEQUENCES.float()
    objective = AutoRegressive(MASK)
    for lengths in ([0] * 27, [2] * 27, [i % 3 for i in range(27)]):
        noise = objective.noise(torch.ones(27), give_prefix(torch.ones(27, L), lengths))
        expected = torch.stack([row[c:].mean() for row, c in zip(ce, lengths)])
        torch.testing.assert_close(objective.nelbo(model, SEQUENCES, noise), expected)


def test_prefix_lengths():
    """Uniform from the fewest to the most, a function of seed, step and index."""
    found = prefix_lengths((2, 5), 1, 0, range(4000))
    assert set(found) == {2, 3, 4, 5} and abs((found == 2).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert (prefix_lengths((2, 5), 1, 0, [7, 9]) == found[[7, 9]]).all()
    assert (found != prefix_lengths((2, 5), 1, 1, range(4000))).any()
    assert prefix_lengths((3, 3), 1, 0, range(2)).tolist() == [3, 3]
    assert give_prefix(torch.full((2, 2, 3), 0.5), [0, 2])[:, 1].tolist() == [[0.5, 0.5, 0.5], [2, 2, 0.5]]


def test_d3pm_tells_steps():
    """A share of masks of s/T is step s for every s, however it is rounded; what lies between belongs to the next."""
    objective = D3PM(MASK, 1000)
    rates = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert (objective.time(rates) * 1000).round().tolist() == list(range(1, 1001))
    assert (objective.time(torch.tensor([1e-9, 0.0011])) * 1000).round().tolist() == [1, 2]


def test_low_variance_has_lower_variance():
    """Of the two estimators of the same T-step bound, the one for reports varies less, by far at many steps."""
    model, n, steps = world.random_denoiser(3, sees_time=False), 20_000, 1000
    u, v = uniforms(seed=3, step=0, indices=range(n), batch_size=n, seq_len=L, stratified=False)
    objective, x0 = D3PM(MASK, steps), SEQUENCES[13].expand(n, L)
    plain, better = (objective.nelbo(model, x0, noise).var().item()
                     for noise in (objective.noise(u, v), objective.t_step(u, v)))
    assert better < plain / 4


def test_stratified_u_are_uniform_one_by_one_and_even_together():
    """Every interval of length 1/B holds one u of the batch, at a random place in it, different in every step."""
    B = 64
    batches = [uniforms(seed=4, step=step, indices=range(B), batch_size=B, seq_len=1, stratified=True)[0]
               for step in range(200)]
    for u in batches:
        assert sorted(torch.ceil(u * B).long().tolist()) == list(range(1, B + 1))
    first = torch.stack([u[0] for u in batches])
    assert abs(first.mean() - 0.5) < 4 / math.sqrt(12 * 200) and first.min() < 0.1 and first.max() > 0.9


def test_noise_is_a_function_of_seed_step_and_index():
    """Any part of a batch can be drawn alone: the numbers of sequence i do not depend on who asks for which others."""
    u, v = uniforms(seed=5, step=7, indices=range(16), batch_size=16, seq_len=8, stratified=True)
    u2, v2 = uniforms(seed=5, step=7, indices=[3, 11], batch_size=16, seq_len=8, stratified=True)
    assert torch.equal(u[[3, 11]], u2) and torch.equal(v[[3, 11]], v2)
    u3, v3 = uniforms(seed=5, step=8, indices=range(16), batch_size=16, seq_len=8, stratified=True)
    assert not (u == u3).any() and not (v == v3).any()
    assert 0 < v.min() and v.max() <= 1


# ---- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [MDLM(MASK), D3PM(MASK, 10), BERT(MASK), Uniform(V)])
def test_split(objective):
    """Noise in pieces is that of the whole, row by row. Each piece has the places of its own masks, so the loss of a
    piece needs no search, and is the one without these places."""
    u, v = uniforms(0, 0, range(8), 8, L, stratified=True)
    x0, whole = SEQUENCES[:8], objective.noise(u, v)
    model = world.random_denoiser(4, sees_time=True)
    again = whole.located().split(3) if "at" in whole._fields else whole.split(3)
    for i, part in enumerate(whole.split(3)):
        assert all(map(torch.equal, part, again[i]))
        rows = type(whole)(*(x if x is None else x[3 * i:3 * i + 3] for x in whole))
        for name in set(whole._fields) - {"at"}:
            assert torch.equal(getattr(part, name), getattr(rows, name))
        if "at" in whole._fields:
            assert torch.equal(world.mask_of(part.at, part.mask), part.mask) and part.located() is part
        assert torch.equal(objective.loss(model, x0[3 * i:3 * i + 3], part)[0],
                           objective.loss(model, x0[3 * i:3 * i + 3], rows)[0])


def test_bound_of_a_sequence_ignores_its_neighbours():
    """The estimate of each sequence is its own: the same alone as in a batch (no average over the batch's masks)."""
    model, objective = world.random_denoiser(6, sees_time=True), MDLM(MASK)
    u, v = uniforms(seed=6, step=0, indices=range(8), batch_size=8, seq_len=L, stratified=True)
    noise, x0 = objective.noise(u, v), SEQUENCES[:8]
    together = objective.nelbo(model, x0, noise)
    alone = torch.cat([objective.nelbo(model, x0[i:i + 1], Noise(*(n[i:i + 1] for n in noise[:3]))) for i in range(8)])
    torch.testing.assert_close(together, alone)
    loss, bits = objective.loss(model, x0, noise)
    assert loss == together.mean() and torch.equal(bits, together)


def test_auxiliary_loss():
    """lambda_ce adds lambda_ce * mean CE over all positions to L_T/T, and leaves the reported bound alone."""
    model = world.random_denoiser(7, sees_time=True)
    u, v = uniforms(seed=7, step=0, indices=range(27), batch_size=27, seq_len=L, stratified=False)
    plain, with_aux = D3PM(MASK, T), D3PM(MASK, T, lambda_ce=0.3)
    noise = plain.noise(u, v)
    xt = torch.where(noise.mask, MASK, SEQUENCES)
    ce = torch.nn.functional.cross_entropy(model(xt, noise.t).transpose(1, 2), SEQUENCES)
    loss, nelbo = plain.loss(model, SEQUENCES, noise)
    loss_aux, nelbo_aux = with_aux.loss(model, SEQUENCES, noise)
    assert loss.item() == pytest.approx(nelbo.mean().item() / T)
    assert loss_aux.item() == pytest.approx(loss.item() + 0.3 * ce.item(), rel=1e-5)
    torch.testing.assert_close(nelbo, nelbo_aux)


def test_simple_weighting():
    """weighting='simple' minimises twice the masked CE per token, all masked tokens alike; the reported bound stays."""
    model, objective = world.random_denoiser(9, sees_time=True), MDLM(MASK, time_sampling="exact_k", weighting="simple")
    u, v = uniforms(seed=9, step=0, indices=range(27), batch_size=27, seq_len=L, stratified=True)
    noise = objective.noise(u, v)
    xt = torch.where(noise.mask, MASK, SEQUENCES)
    ce = torch.nn.functional.cross_entropy(model(xt, noise.t).transpose(1, 2), SEQUENCES, reduction="none")
    loss, nelbo = objective.loss(model, SEQUENCES, noise)
    assert loss.item() == pytest.approx(2 * (ce * noise.mask).mean().item(), rel=1e-5)
    torch.testing.assert_close(nelbo, objective.nelbo(model, SEQUENCES, noise))


# ---- the autoregressive baseline -------------------------------------------------------------------------------------


def nll(model):
    """-log p of every sequence, nats (27,), by the objective."""
    objective = AutoRegressive(MASK)
    u, v = torch.rand(len(SEQUENCES)), torch.rand(len(SEQUENCES), L)
    noise = objective.chain_rule(u, v)
    return objective.nelbo(model, SEQUENCES, noise).double() * L


@pytest.mark.parametrize("causal", [True, False])
def test_autoregressive_likelihoods_sum_to_one(causal):
    """The probabilities of all sequences under a random causal network sum to one; a network that looks to the right
    is no distribution, and is found out."""
    model = network(V, seed=2, std=1.0, seq_len=L, objective="ar" if causal else "mdlm")
    with torch.no_grad():
        total = (-nll(model)).exp().sum().item()
    assert (abs(total - 1) < 1e-4) == causal, total


def test_autoregressive_oracle_has_the_entropy():
    """With the conditionals of the data the negative log-likelihood is -log p(x) for every sequence."""
    def model(seen, t, where):
        log_p = []
        for i in range(L):
            prefix = torch.full((len(seen), L), MASK)
            prefix[:, :i] = seen[:, 1:i + 1]
            log_p.append(world.oracle(prefix)[:, i])
        return picked(torch.stack(log_p, 1), where)

    torch.testing.assert_close(nll(model), -world.P_DATA.log(), atol=1e-5, rtol=1e-5)


# ---- score entropy ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["loglinear", "geometric", "linear"])
@pytest.mark.parametrize("scaled", [True, False])
def test_score_entropy_is_its_definition(schedule, scaled):
    """weight * cost is dsigma * [sum_y s_y - r log s_x0 + r (log r - 1)] of the scores, r = 1/(e^sigma - 1).

    The formula is that of arXiv 2310.16834. scale_by_sigma takes log(e^sigma - 1) and log V off the network's output,
    as that project does.
    """
    generator = torch.Generator().manual_seed(3)
    logits, x0 = torch.randn(40, V, generator=generator), torch.randint(V, (40,), generator=generator)
    t = torch.rand(40, generator=generator) * 0.9 + 0.05
    objective = SEDD(MASK, schedule, scaled=scaled)
    sigma = objective.schedule.sigma(t.double())
    dsigma = -objective.schedule.dalpha(t.double()) / objective.schedule.alpha(t.double())
    log_s = logits.double() - (sigma.expm1().log() + math.log(V))[:, None] * scaled
    torch.testing.assert_close(log_scores(objective, logits, t).double(), log_s, rtol=1e-4, atol=1e-4)
    r = 1 / sigma.expm1()
    entropy = dsigma * (log_s.exp().sum(1) - r * log_s[torch.arange(40), x0] + r * (r.log() - 1))
    torch.testing.assert_close((objective.schedule.weight(t) * objective.cost(logits, x0, t)).double(), entropy,
                               rtol=2e-4, atol=1e-4)


def test_normalised_scores_are_mdlm():
    """Of normalised scores the score entropy is MDLM's cross-entropy.

    Else it is Z - 1 - log Z more, for every mask and time.
    """
    model = world.random_denoiser(4, sees_time=True)
    u, v = uniforms(0, 0, range(27), 27, L, stratified=True)
    sedd, mdlm = SEDD(MASK, "loglinear"), MDLM(MASK, "loglinear")
    noise = sedd.noise(u, v)
    for a, b in zip(noise.located(), mdlm.noise(u, v).located()):
        assert torch.equal(a, b)
    normalised = lambda xt, t, where: model(xt, t, where).log_softmax(-1) + math.log(V)
    torch.testing.assert_close(sedd.nelbo(normalised, SEQUENCES, noise), mdlm.nelbo(model, SEQUENCES, noise).float())
    log_z = 0.7
    shifted = lambda xt, t, where: normalised(xt, t, where) + log_z
    penalty = noise.weight * noise.mask.sum(1) / L * (math.exp(log_z) - 1 - log_z)
    torch.testing.assert_close(sedd.nelbo(shifted, SEQUENCES, noise),
                               mdlm.nelbo(model, SEQUENCES, noise).float() + penalty)
    torch.testing.assert_close(sedd.log_prediction(shifted(world.STATES[:1], torch.ones(1), None)[0], torch.ones(L)),
                               model(world.STATES[:1], torch.ones(1)).log_softmax(-1)[0].float() + log_z)


# ---- what objectives say of themselves, and times for each token -----------------------------------------------------


@pytest.mark.parametrize("key", OBJECTIVES, ids=" ".join)
def test_attributes_of_an_objective(key):
    """Attributes are there, and hold: estimators come in pairs and are methods or orders, the reported one is one of
    them, the samplers exist, the network has as many tokens as it says, and only the loss has a gradient."""
    name, noise_kind = key
    config = Config(n_layer=1, n_head=1, n_embd=4, n_cond=4, seq_len=4, conditioning="none", objective=name,
                    noise=noise_kind, schedule="loglinear" if name == "sedd" else "cosine",
                    block_size=2 if name == "block" else 0)
    torch.manual_seed(0)  # else all tokens may happen to be noise
    objective, model = config.make_objective(5), config.make_model(5)
    assert type(objective) is OBJECTIVES[key] and isinstance(objective.description, str)
    assert model.embed.num_embeddings == 5 + objective.has_mask and model.blocks[0].causal == objective.causal
    assert objective.reported in objective.estimators and set(objective.samplers.values()) <= set(SAMPLERS)
    times = objective.n_times(4)
    assert times == (4 // objective.block_size if objective.block_size else 1) and model.block_size == config.block_size
    u, v = uniforms(0, 0, range(3), 3, 4, False, times)
    for estimator, other in objective.estimators.items():
        assert len(getattr(objective, estimator)(u, v, u).weight) == 3 and other != estimator
        assert objective.estimators.get(other) == estimator or other in ORDERS
    noise = objective.noise(u, v)
    assert torch.equal(v, uniforms(0, 0, range(3), 3, 4, False, times)[1])  # they change nothing
    asked = []

    def network(xt, t, where=None, **more):
        asked.append(where is None or len(where) == xt.numel())
        return model(xt, t, where, **more)

    cost, used = objective.cost, []
    objective.cost = lambda *inputs: used.append(inputs) or cost(*inputs)
    loss, nelbo = objective.loss(network, torch.randint(5, (3, 4)), noise)
    assert used  # so that what parallel.compile_parts puts there is used
    assert loss.dim() == 0 and nelbo.shape == (3,) and asked == [objective.everywhere]
    assert objective.own == () or set(objective.own) <= Config.__dataclass_fields__.keys()
    assert loss.requires_grad and not nelbo.requires_grad


def test_attributes_that_are_settings():
    """Every setting of the group "objective and noise" belongs to some objectives, or to all of them: otherwise it
    would be taken without a word by an objective that ignores it."""
    names = list(Config.__dataclass_fields__)
    group = set(names[names.index("objective"):names.index("batch_size")])
    assert group - OWNERS.keys() == {"objective", "noise", "T", "schedule", "time_sampling", "anneal_steps"}


@pytest.mark.parametrize("objective", [MDLM(MASK), SEDD(MASK), SEDD(MASK, scaled=False), D3PM(MASK, 10)],
                         ids=["mdlm", "sedd", "sedd-unscaled", "d3pm"])
def test_a_time_and_a_weight_for_each_token(objective):
    """Noise whose t and weight are (B, L): equal values give what (B,) gives, and different ones the sum of the bounds
    of the parts, each with its own. The network's output depends on a token's place and time alone."""
    generator = torch.Generator().manual_seed(0)
    x0, mask = torch.randint(V, (6, 8), generator=generator), torch.rand(6, 8, generator=generator) < 0.6
    table = torch.randn(8, V, generator=generator)
    per_token = lambda x: x if x.dim() == 2 else x[:, None].expand(6, 8)
    model = lambda xt, t, where: picked(table * (1 + per_token(t)[..., None]), where)
    (t, t2), (weight, weight2) = (0.1 + 0.8 * torch.rand(2, 6, generator=generator) for _ in range(2))
    bound = lambda *noise: objective.nelbo(model, x0, Noise(*noise))
    torch.testing.assert_close(bound(mask, per_token(t), per_token(weight)), bound(mask, t, weight))
    left = torch.arange(8) < 3
    mixed = bound(mask, *(torch.where(left, per_token(a), per_token(b)) for a, b in ((t, t2), (weight, weight2))))
    torch.testing.assert_close(mixed, bound(mask & left, t, weight) + bound(mask & ~left, t2, weight2))
    assert (mixed - bound(mask, t, weight)).abs().min() > 1e-3
