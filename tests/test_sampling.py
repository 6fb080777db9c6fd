"""sampling.py against enumeration: every sampler must follow its own Markov chain, exactly, or its rule, by hand.

`pytest tests/test_sampling.py -k follows -rP` prints how far samples are from their distributions (total variation).
"""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import configs
import world
from categorical import SURE, Draw, entropy, inverse_cdf
from diffusion import D3PM, MDLM, Absorbing, AutoRegressive
from sampler_settings import (DEFAULTS, best_grid, bound_on_grid, default_settings, enough_steps, loop_grid,
                              schedule_grid)
from sampling import (DEFAULT_ETA, SAMPLERS, Settings, ancestral, denoiser_of, entropy_bound, first_hitting,
                      left_to_right, remdm, threshold, topk)
from schedules import make_schedule
from world import MASK, L, V, picked


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(seed=0, **cut):
    return Draw(generator(seed), **cut)


def masks(B, L=L, mask=MASK):
    return torch.full((B, L), mask)


def states_of(sampler, model, xt, *options, objective=MDLM(MASK), seed=0, temperature=1.0, **named):
    denoiser, rate0 = denoiser_of(model, objective), (xt == objective.mask_id).double().mean(1)
    states = sampler(lambda xt, r, where: denoiser(xt, rate0 * r, where), xt, objective,
                     draw(seed, temperature=temperature), *options, **named)
    return [state.xt for state in states]


def counts_of(x0):
    return torch.bincount((x0 * torch.tensor([V**2, V, 1])).sum(1), minlength=V**L).double()


def chi_square_excess(counts, expected):
    """How many standard deviations Pearson's statistic lies above its mean, if counts (n,) follow expected (n,).

    Cells that expect fewer than 20 are put together. Prints the total variation, too.
    """
    print(f"total variation {0.5 * (counts / counts.sum() - expected).abs().sum():.4f}, {int(counts.sum()):,} samples")
    expected = counts.sum() * expected
    small = expected < 20
    if small.any():
        counts, expected = (torch.cat([x[~small], x[small].sum()[None]]) for x in (counts, expected))
    statistic, dof = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    return (statistic - dof) / math.sqrt(2 * dof)


def alphas(grid):
    return [1 - r for r in reversed(grid)]


# ---- the reverse chain -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule, steps, sees_time", [("linear", 1, False), ("linear", 2, True), ("linear", 4, False),
                                                        ("cosine", 3, True), ("cosine", 5, False)])
def test_ancestral_follows_its_chain(schedule, steps, sees_time):
    """30,000 samples follow the enumerated reverse chain; its distribution is not the data's, and the test can tell."""
    model = world.random_denoiser(1, sees_time) if sees_time else world.oracle
    alphas = make_schedule(schedule).alpha(torch.arange(steps + 1).double() / steps).tolist()
    expected = world.chain_distribution(model, alphas)
    x0 = states_of(ancestral, model, masks(30_000), schedule_grid(schedule, steps),
                   objective=MDLM(MASK, schedule))[-1]
    assert chi_square_excess(counts_of(x0), world.P_DATA) > 10
    assert chi_square_excess(counts_of(x0), expected) < 4


def test_ancestral_from_less_than_pure_noise():
    """A grid that begins below rate 1, as log-linear noise ends: the first step reveals 1 - r_1/r_0 of the masks."""
    grid = [0.8, 0.4, 0.0]
    xt, taken, in_first = masks(10_000), torch.zeros(10_000), 0
    model = lambda xt, t, where: torch.zeros(int(where.sum()), V)
    for state in ancestral(model, xt, MDLM(MASK), draw(), grid):
        taken += state.steps
        in_first += ((state.xt != MASK) & (xt == MASK)).sum(1)[taken == 1].sum()
        xt = state.xt
    assert in_first / xt.numel() == pytest.approx(0.5, abs=0.015)  # 5 standard deviations
    assert (taken == 2).all()


@pytest.mark.parametrize("sampler", [ancestral, topk])
def test_a_million_steps_cost_what_the_tokens_do(sampler):
    """Of a million steps no more are walked through than there are masks, all of them are counted, and where nothing
    is to be done, too."""
    grid = schedule_grid("linear", 10**6)
    model = lambda xt, t, where: torch.zeros(int(where.sum()), V)
    for xt, most in ((masks(2, 10), 10), (torch.zeros(2, 10, dtype=torch.long), 0)):
        states = list(sampler(model, xt, MDLM(MASK), draw(), grid))
        steps = torch.stack([torch.as_tensor(state.steps).expand(2) for state in states])
        assert len(states) <= most + 1 and (steps.sum(0) == 10**6).all()
        assert (states[-1].xt != MASK).all() and (steps.amax(1) > 0).all() and steps.min() >= 0


def test_the_network_is_asked_only_for_what_is_revealed():
    """At most one call per token of a sequence, only for rows and positions that are revealed, at each one's own time
    of the grid, which falls from call to call."""
    asked = []

    def model(xt, t, where):
        assert where.any(1).all() and (xt[where] == MASK).all()
        asked.append({int(row[0]): (time.item(), int(at.sum())) for row, time, at in zip(xt, t, where)})
        return torch.zeros(int(where.sum()), V)

    xt = masks(300, 6)
    xt[:, 0] = torch.arange(300) + 10 * MASK  # given, to tell the rows apart
    states_of(ancestral, model, xt, schedule_grid("linear", 100))
    assert len(asked) <= 5
    for row in range(300):
        times, numbers = zip(*[call[row + 10 * MASK] for call in asked if row + 10 * MASK in call])
        assert sum(numbers) == 5 and list(times) == sorted(set(times), reverse=True)
        rates = [time / (5 / 6) * 100 for time in times]  # a sixth is given, so times begin at 5/6
        assert all(abs(rate - round(rate)) < 1e-3 and rate > 0 for rate in rates)
    first = torch.tensor([asked[0][row + 10 * MASK][0] for row in range(300)]) / (5 / 6)
    assert first.mean().item() == pytest.approx(5 / 6 + 0.005, abs=0.04)  # of the largest of five uniform numbers


def test_first_hitting_follows_the_data():
    """With the Bayes-optimal denoiser 30,000 samples follow the data itself, with at most L calls."""
    states = states_of(first_hitting, world.oracle, masks(30_000))
    assert len(states) == L and all(((state == MASK).sum(1) == L - 1 - i).all() for i, state in enumerate(states))
    assert chi_square_excess(counts_of(states[-1]), world.P_DATA) < 4


@pytest.mark.parametrize("given", [(None, 2, None), (0, None, 1)])
def test_first_hitting_follows_the_data_given_tokens(given):
    """A template: with the Bayes-optimal denoiser, the samples follow the data given its tokens, wherever they are."""
    xt = torch.tensor([[MASK if token is None else token for token in given]]).expand(30_000, L)
    agrees = ((world.SEQUENCES == xt[0]) | (xt[0] == MASK)).all(1)
    expected = world.P_DATA * agrees
    counts = counts_of(states_of(first_hitting, world.oracle, xt)[-1])
    assert counts[~agrees].sum() == 0
    assert chi_square_excess(counts[agrees], (expected / expected.sum())[agrees]) < 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_first_hitting_follows_the_time(schedule):
    """A network that sees the time: the limit of many steps of the ancestral chain, which is enumerated."""
    model, objective = world.random_denoiser(1, sees_time=True), MDLM(MASK, schedule)
    x0 = states_of(first_hitting, model, masks(30_000), objective=objective)[-1]
    alphas = objective.schedule.alpha(torch.arange(301).double() / 300).tolist()
    expected = world.chain_distribution(model, alphas)
    blind = world.chain_distribution(lambda xt, t: model(xt, torch.ones_like(t)), [1 - s / 50 for s in range(51)])
    assert chi_square_excess(counts_of(x0), blind) > 10
    assert chi_square_excess(counts_of(x0), expected) < 4


# ---- remasking -------------------------------------------------------------------------------------------------------


def most(r, s):
    return min(1, s / (1 - r)) if r < 1 else 1


@pytest.mark.parametrize("remask, eta, grid, g", [
    ("cap", 0.3, [1, 0.75, 0.5, 0.25, 0], lambda r, s: min(0.3, most(r, s))),
    ("cap", 1.0, [1, 0.5, 0.4, 0], lambda r, s: most(r, s)),
    ("rescale", 0.6, [1, 0.6, 0.3, 0], lambda r, s: 0.6 * most(r, s)),
    ("loop", 0.4, [1, 0.4, 0.4, 0.4, 0.2, 0], lambda r, s: 0.4 if r == s else 0.0),
])
def test_remdm_follows_its_chain(remask, eta, grid, g):
    """30,000 samples follow the enumerated chain with remasking, which is another one than without."""
    model = world.random_denoiser(1, sees_time=True)
    x0 = states_of(remdm, model, masks(30_000), grid, remask, eta)[-1]
    expected = world.remasking_distribution(
        model, grid, lambda r, s, states: torch.full(states.shape, g(r, s)).double())
    assert chi_square_excess(counts_of(x0), world.remasking_distribution(
        model, grid, lambda r, s, states: torch.zeros(states.shape).double())) > 6
    assert chi_square_excess(counts_of(x0), expected) < 4


def test_remdm_conf_follows_its_chain():
    """Remasking by confidence: enumerable where a token's probability depends on its position alone."""
    table = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5], [3.0, 0.0, 0.0]])
    model = lambda xt, t, where=None: picked(table.expand(len(xt), L, V), where)
    grid = [1, 0.6, 0.4, 0.2, 0]
    p = torch.cat([table.softmax(-1), torch.full((L, 1), math.inf)], -1).double()  # masks: infinitely sure

    def g(r, s, states):
        return torch.nan_to_num(0.9 * most(r, s) * (-p[torch.arange(L), states]).softmax(1))  # nothing revealed: 0

    x0 = states_of(remdm, model, masks(30_000), grid, "conf", 0.9)[-1]
    expected = world.remasking_distribution(model, grid, g)
    assert chi_square_excess(counts_of(x0), expected) < 4
    halfway = states_of(remdm, model, masks(30_000), grid[:3] + [0.4], "conf", 0.9)  # r = s: masks return, none falls
    sure = (halfway[1][:, 2] == 0) & (halfway[1][:, 1] == 0)
    gone = lambda i: (halfway[2][sure][:, i] == MASK).double().mean()
    assert gone(1) > 1.5 * gone(2) > 0


@pytest.mark.parametrize("remask", DEFAULT_ETA)
def test_remdm_keeps_the_mask_rate_on_its_grid(remask):
    """The marginal of the chain is that of masking (ReMDM, theorem 3.1); conf remasks without paying for it."""
    grid = loop_grid(8, hold=0.3) if remask == "loop" else [1, 0.75, 0.5, 0.3, 0.1, 0]
    states = states_of(remdm, world.random_denoiser(3, True), masks(20_000), grid, remask, 0.5)
    for r, state in zip(grid[1:], states):
        rate, error = (state == MASK).double().mean().item(), math.sqrt(r * (1 - r) / 60_000) + 1e-12
        assert rate == pytest.approx(r, abs=5 * error) if remask != "conf" else rate >= r - 5 * error
    again = sum(((after == MASK) & (before != MASK)).sum() for before, after in zip(states, states[1:]))
    assert again > 100


def test_loop_grid():
    """Down, still, to zero; any number of steps from 3 on."""
    for n in (3, 4, 10, 20, 1000):
        grid = loop_grid(n)
        assert len(grid) == n + 1 and grid[0] == 1 and grid[-1] == 0 and grid.count(0.1) >= 2
        assert all(r >= s for r, s in zip(grid, grid[1:]))
    assert loop_grid(20).count(0.1) == 11 and loop_grid(20).index(0.1) == 9


# ---- the surest first ------------------------------------------------------------------------------------------------


HAND = torch.tensor([[0.0, 3.0], [0.0, 9.0], [5.0, 0.0], [0.0, 1.0]])  # p: .953, .9999, .993, .731


def by_hand(xt, t, where):
    return picked(HAND.expand(len(xt), 4, 2), where)


def test_topk_by_hand():
    """In each of two steps half of what is left, the surest first; a cosine grid; k at a time; given tokens."""
    go = lambda xt, **named: [state.tolist() for state in states_of(topk, by_hand, xt, objective=MDLM(2), temperature=0,
                                                                    **named)]
    M = 2
    assert go(masks(3, 4, M), grid=[1, 0.5, 0]) == [[[M, 1, 0, M]] * 3, [[1, 1, 0, 1]] * 3]
    assert [state.count(M) for (state,) in go(masks(1, 4, M), grid=schedule_grid("cosine", 4))] == [3, 2, 1, 0]
    assert go(masks(1, 4, M), k=3) == [[[1, 1, 0, M]], [[1, 1, 0, 1]]]
    given = torch.tensor([[1, M, M, M], [0, M, 1, 1], [0, 0, 0, 0]])
    assert go(given, k=2) == [[[1, 1, 0, M], [0, 1, 1, 1], [0] * 4], [[1, 1, 0, 1], [0, 1, 1, 1], [0] * 4]]
    states = topk(by_hand, given[:1], MDLM(M), draw(), schedule_grid("linear", 5))
    assert [(int((state.xt == M).sum()), state.steps) for state in states] == [(2, 1), (1, 1), (0, 2), (0, 1)]
    flat = lambda xt, t, where: torch.zeros(int(where.sum()), 2)
    left = [int((state == M).sum()) for state in states_of(topk, flat, masks(1, 100, M), schedule_grid("linear", 100),
                                                           objective=MDLM(M))]
    assert left == list(range(99, -1, -1))
    for rates in ([0.999, 0.5, 0], [0.3, 0]):  # a schedule that ends before the mask rate 1
        assert not (states_of(topk, flat, masks(1, 1, M), grid=rates, objective=MDLM(M))[-1] == M).any()


@pytest.mark.parametrize("by, order", [("probability", [0, 1, 2]), ("margin", [1, 0, 2]), ("entropy", [2, 0, 1])])
def test_topk_by_hand_in_three_ways(by, order):
    """Largest probabilities .6, .55, .54; margins .3, .5, .08; entropies .898, 1.678, .690 nats."""
    p = torch.tensor([[0.6, 0.3, 0.1] + [0.0] * 7, [0.55] + [0.05] * 9, [0.54, 0.46] + [0.0] * 8])
    model = lambda xt, t, where: picked(p.log().expand(len(xt), 3, 10), where)
    states = states_of(topk, model, masks(1, 3, 10), k=1, by=by, objective=MDLM(10), temperature=0)
    left = [(state[0] == 10).nonzero().squeeze(1).tolist() for state in states]
    assert left == [sorted(order[1:]), order[2:], []]


@pytest.mark.parametrize("by", SURE)
def test_topk_with_one_kind_of_token(by):
    """A text that repeats one character has a vocabulary of 1, and no second likeliest token."""
    flat = lambda xt, t, where: torch.zeros(int(where.sum()), 1)
    assert (states_of(topk, flat, masks(2, 3, 1), k=2, by=by, objective=MDLM(1))[-1] == 0).all()


def test_topk_asks_no_more_than_it_must():
    """Steps that reveal nothing cost nothing; the share of masks is told as the time at which it is expected."""
    told = []

    def model(xt, t, where):
        told.append(t.tolist())
        return torch.zeros(int(where.sum()), V)

    states_of(topk, model, masks(2, 4), schedule_grid("linear", 1000), objective=MDLM(MASK, "cosine"))
    expected = [make_schedule("cosine").inverse(torch.tensor(1 - rate, dtype=torch.float64)).item()
                for rate in (1, 0.75, 0.5, 0.25)]
    assert [t[0] for t in told] == pytest.approx(expected) and [t[1] for t in told] == pytest.approx(expected)


def test_threshold_by_hand():
    """All that are sure enough, the surest one where none is, and rows that are finished stay."""
    xt = torch.tensor([[2, 2, 2, 2], [0, 2, 2, 0], [0, 0, 0, 0]])
    states = states_of(threshold, by_hand, xt, threshold=0.95, objective=MDLM(2), temperature=0)
    assert [state.tolist() for state in states] == [[[1, 1, 0, 2], [0, 1, 0, 0], [0] * 4],
                                                    [[1, 1, 0, 1], [0, 1, 0, 0], [0] * 4]]
    one_by_one = states_of(threshold, by_hand, xt[:1], threshold=1.0, objective=MDLM(2), temperature=0)
    assert [state.tolist()[0] for state in one_by_one] == [[2, 1, 2, 2], [2, 1, 0, 2], [1, 1, 0, 2], [1, 1, 0, 1]]
    assert len(states_of(threshold, by_hand, xt, threshold=0.0, objective=MDLM(2))) == 1
    certain = lambda xt, t, where: picked(torch.tensor([0.0, 200.0]).expand(len(xt), 4, 2), where)
    assert len(states_of(threshold, certain, masks(1, 4, 2), threshold=1.0, objective=MDLM(2))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entropy(dtype):
    """It is that of float64, whatever is added to all logits, also with many tokens, and within autocast, which would
    compute the sum of products in bfloat16."""
    for scale, more, tokens, error in ((8, 0, 27, 1e-5), (3, 20, 10_000, 1e-5), (3, 20, 50_000, 1e-4)):
        logits = scale * torch.randn(50, tokens, generator=generator()) + more
        logits[:, :3] = -math.inf
        exact = torch.special.entr(logits.double().softmax(-1)).sum(-1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = entropy(logits, logits.softmax(-1))
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=error)


@pytest.mark.parametrize("sampler, flags", [(threshold, {"threshold": 1.0}), (entropy_bound, {"gamma": 0.0}),
                                            (topk, {"k": 1})])
def test_the_network_is_told_the_masks_that_are_left(sampler, flags):
    """Four masks that go one by one: the rates of 1, .75, .5 and .25. If a fifth token is given, the network is told
    the rates of .8, .6, .4 and .2 in the whole text."""
    told = []

    def network(xt, t, where):
        told.append(t.tolist())
        return by_hand(xt, t, where[:, :4])

    list(sampler(network, masks(1, 4, 2), MDLM(2), draw(), **flags))
    list(Settings(sampler.__name__, flags).states(MDLM(2), network, torch.tensor([[2, 2, 2, 2, 0]]), generator()))
    assert told == [pytest.approx([rate]) for rate in (1, 0.75, 0.5, 0.25, 0.8, 0.6, 0.4, 0.2)]


def test_entropy_bound_by_hand():
    """Entropies .0012, .0402, .1914, .5825 nats: their sum without the largest stays below gamma."""
    H = entropy(HAND, HAND.softmax(-1)).double()
    assert H.tolist() == pytest.approx([-(p * math.log(p) + (1 - p) * math.log(1 - p))
                                        for p in (HAND.max(1).values - HAND.min(1).values).sigmoid().tolist()],
                                       abs=1e-5)
    certain = torch.tensor([[0.0, -math.inf, -math.inf], [0.0, -200.0, -math.inf], [1.0, 1.0, -math.inf]])
    assert entropy(certain, certain.softmax(-1)).tolist() == pytest.approx([0, 0, math.log(2)], abs=1e-6)
    go = lambda gamma, xt: [(state == 2).sum(1).tolist()
                            for state in states_of(entropy_bound, by_hand, xt, gamma=gamma, objective=MDLM(2))]
    all_masks = masks(1, 4, 2)
    assert go(0.0, all_masks) == [[3], [2], [1], [0]]
    assert go(0.002, all_masks) == [[2], [1], [0]]       # .0012 fits: two; then .0402 does not: one
    assert go(0.05, all_masks) == [[1], [0]]             # .0012 + .0402
    assert go(0.25, all_masks) == [[0]]                  # .0012 + .0402 + .1914
    assert go(0.05, torch.tensor([[2] * 4, [0, 2, 2, 0], [0] * 4])) == [[1, 0, 0], [0, 0, 0]]


# ---- what all of them promise ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.0, 1.5])
def test_guidance_follows_its_formula(w):
    """One token is given. Each next token x follows p(x | all)^(1 + w) / p(x | all but the given one)^w."""
    xt = torch.tensor([[1, MASK, MASK]])
    def next_token(at, xt):
        where = torch.arange(L)[None] == at
        c, u = (world.oracle(x, where=where)[0].softmax(-1) for x in (xt, torch.where(torch.arange(L) == 0, MASK, xt)))
        q = c ** (1 + w) / u**w
        return q / q.sum()

    expected = torch.zeros(V, V)
    for first, second in ((1, 2), (2, 1)):  # both orders are equally likely
        for token, p in enumerate(next_token(first, xt)):
            q = p / 2 * next_token(second, torch.where(torch.arange(L) == first, token, xt))
            expected += (q * F.one_hot(torch.tensor(token), V)[:, None] if first == 1
                         else q[:, None] * F.one_hot(torch.tensor(token), V))
    way = Settings("first_hitting", guidance=w)
    *_, state = way.states(MDLM(MASK), world.oracle, xt.expand(30_000, L), generator())
    assert chi_square_excess(counts_of(state.xt)[V**2:2 * V**2], expected.flatten().double()) < 4


@pytest.mark.parametrize("size", [None, torch.tensor([2])])
@pytest.mark.parametrize("objective", [MDLM(MASK, "cosine"), MDLM(MASK, "loglinear"), D3PM(MASK, 1000)])
def test_guidance_tells_both_times(objective, size):
    """The call without the given token has one more mask among the three tokens, and is told the time of that rate. In
    a model with prefixes the rate of the other call is that of the two free tokens."""
    told = []

    def network(xt, t, where):
        told.append(((xt == MASK).sum().item(), t.item()))
        return world.oracle(xt, where=where)

    xt = torch.tensor([[1, MASK, MASK]])
    grid = [1.0, 0.55, 0.0]
    list(Settings("topk", {"grid": grid}, guidance=1.0).states(objective, network, xt, generator(), size))
    first = 2 / 3 if size is None else 1.0
    expected = [objective.time(torch.tensor(rate, dtype=torch.float64)).item()
                for rate in (first, 1.0, first / 2, 2 / 3)]
    assert [masks for masks, _ in told] == [2, 3, 1, 2] and [t for _, t in told] == pytest.approx(expected, abs=1e-7)


ALL = [Settings("ancestral", {"grid": schedule_grid("cosine", 6)}), Settings("first_hitting"),
       Settings("topk", {"grid": schedule_grid("linear", 3)}), Settings("topk", {"k": 2}), Settings("threshold"),
       Settings("entropy_bound", {"gamma": 0.5}), Settings("analytic", {"grid": schedule_grid("linear", 4)}),
       Settings("euler", {"grid": schedule_grid("cosine", 4)}),
       *(Settings("remdm", {"grid": loop_grid(7) if rule == "loop" else schedule_grid("linear", 7), "remask": rule,
                            "eta": 0.7}) for rule in DEFAULT_ETA)]
NAMES = [f"{settings.sampler} {settings.options.get('remask', '')}".strip() for settings in ALL]


def test_all_are_here():
    missing = set(Absorbing.samplers) - {settings.sampler for settings in ALL}
    assert not missing, f"add Settings of {', '.join(missing)} to ALL, so that the tests below see them, too"


@pytest.mark.parametrize("settings", ALL, ids=NAMES)
def test_given_tokens_stay(settings):
    """Prefix, suffix, the middle, everything or nothing given: never changed, no mask is left; the same seed gives the
    same sample; p is what the network gave; all steps are counted."""
    xt = masks(60)
    xt[:20, 0], xt[10:30, 1], xt[25:50, 2], xt[59] = 2, 1, 0, torch.tensor([0, 1, 2])
    model, objective = world.random_denoiser(2, True), MDLM(MASK)
    states = list(settings.states(objective, model, xt, generator()))
    given = xt != MASK
    for state in states:
        assert torch.equal(state.xt[given], xt[given])
        assert torch.equal(state.p.isnan(), given | (state.xt == MASK))
        assert ((state.p > 0) & (state.p <= 1))[~state.p.isnan()].all()
    assert (states[-1].xt != MASK).all()
    steps = settings.steps + (settings.sampler == "euler") if settings.steps else len(states)  # euler also denoises
    assert (torch.as_tensor(sum(state.steps for state in states)) == steps).all()
    if settings.sampler != "remdm":
        for before, after in zip(states, states[1:]):
            seen = before.xt != MASK
            assert torch.equal(after.xt[seen], before.xt[seen]) and torch.equal(after.p[seen & ~given],
                                                                                before.p[seen & ~given])
    again, other = (list(settings.states(objective, model, xt, generator(seed)))[-1].xt for seed in (0, 1))
    assert torch.equal(again, states[-1].xt) and not torch.equal(other, again)


@pytest.mark.parametrize("settings", [s for s in ALL if s.sampler == "remdm"], ids=lambda s: s.options["remask"])
def test_remdm_remasks_in_a_template(settings):
    """What it drew, never what was given."""
    xt = masks(200)
    xt[:, 1] = 2
    states = list(settings.states(MDLM(MASK), world.random_denoiser(2, True), xt, generator()))
    assert sum(((after.xt == MASK) & (before.xt != MASK)).sum() for before, after in zip(states, states[1:])) > 20


# ---- piece by piece --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2])
def test_pieces_follow_the_data(n):
    """Samples of the Bayes-optimal denoiser follow the data for every length of pieces, because every order gives the
    data. This holds after given tokens, too."""
    settings = Settings("first_hitting", block_length=n)
    *_, state = settings.states(MDLM(MASK), world.oracle, masks(30_000), generator())
    assert chi_square_excess(counts_of(state.xt), world.P_DATA) < 4
    xt = torch.tensor([[MASK, 2, MASK]])
    agrees = ((world.SEQUENCES == xt) | (xt == MASK)).all(1)
    *_, state = settings.states(MDLM(MASK), world.oracle, xt.expand(30_000, L), generator())
    counts = counts_of(state.xt)
    assert counts[~agrees].sum() == 0
    assert chi_square_excess(counts[agrees], world.P_DATA[agrees] / world.P_DATA[agrees].sum()) < 4


@pytest.mark.parametrize("n", [1, 2])
def test_pieces_stop_at_the_end(n):
    """Texts that stop after the piece with their `end` follow the data up to it. A given `end` does not stop a text."""
    END = 2
    settings, rows = Settings("first_hitting", block_length=n), []

    def network(xt, t, where):
        rows.append(len(xt))
        return world.oracle(xt, t, where)

    *_, state = settings.states(MDLM(MASK), network, masks(30_000), generator(), end=END)
    goes_on = lambda k: world.P_DATA[(world.SEQUENCES[:, :k] != END).all(1)].sum().item()
    assert sum(rows) == pytest.approx(30_000 * sum(goes_on(k) * min(n, L - k) for k in range(0, L, n)), rel=0.02)
    stopped = lambda texts: torch.where(((texts == END).int().cumsum(1) > 0), END, texts)
    expected = torch.zeros(27, dtype=torch.float64).index_add(
        0, (stopped(world.SEQUENCES) * torch.tensor([9, 3, 1])).sum(1), world.P_DATA)
    counts = counts_of(stopped(state.xt))
    assert counts[expected == 0].sum() == 0 and chi_square_excess(counts[expected > 0], expected[expected > 0]) < 4
    *_, state = settings.states(MDLM(MASK), network, torch.tensor([[END, MASK, MASK]]).expand(1000, 3), generator(),
                                end=END)
    assert (state.xt[:, 2] != END).sum() > 100


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("sampler, grid", [("ancestral", [1, 0.7, 0.2, 0]), ("first_hitting", None)])
def test_pieces_follow_their_chain(sampler, grid, n):
    """A network that sees the time: the enumerated chain, piece by piece; of first_hitting, its limit of many steps.
    It is another one than that of all masks at once."""
    model = world.random_denoiser(1, sees_time=True)
    settings = Settings(sampler, {"grid": grid} if grid else {}, block_length=n)
    *_, state = settings.states(MDLM(MASK), model, masks(30_000), generator())
    grid = grid or schedule_grid("linear", 300)
    assert chi_square_excess(counts_of(state.xt), world.pieces_distribution(model, grid, L)) > 10
    assert chi_square_excess(counts_of(state.xt), world.pieces_distribution(model, grid, n)) < 4


def test_the_time_of_a_piece():
    """Two of 8 tokens are given, and the pieces have 4 and 2 masks. The network is told the share of all masks among
    all 8 tokens, or among those that `size` counts. It sees them all, and is asked for its piece only."""
    told, xt = [], masks(1, 8)
    xt[0, 0], xt[0, 3] = 1, 2

    def model(xt, t, where):
        now = where[0].nonzero().squeeze(1).tolist()
        assert (xt[where] == MASK).all() and (set(now) <= {1, 2, 4, 5} and (xt[0, 6:] == MASK).all()
                                              or set(now) <= {6, 7} and (xt[0, :6] != MASK).all())
        told.append(t.item())
        return torch.zeros(int(where.sum()), V)

    one_by_one, grid = [6, 5, 4, 3, 2, 1], {"grid": [1, 0.5, 1e-9, 0]}
    for settings, expected in ((Settings("topk", {"k": 1}), one_by_one), (Settings("topk", {"k": 3}), [6, 3, 2]),
                               (Settings("threshold", {"threshold": 1.0}), one_by_one),
                               (Settings("threshold", {"threshold": 0.0}), [6, 2]),
                               (Settings("entropy_bound", {"gamma": 0.0}), one_by_one),
                               (Settings("analytic", {"grid": [1, 0.9, 0]}), {6, 4 * 0.9 + 2, 2, 2 * 0.9}),
                               (Settings("ancestral", grid), {6, 4, 2, 1}),
                               (Settings("remdm", grid | {"remask": "rescale", "eta": 0.0}), {6, 4, 2, 1})):
        for size in (8, 6):
            told.clear()
            pieces = settings._replace(block_length=4)
            *_, state = pieces.states(MDLM(MASK), model, xt, generator(3), torch.tensor([size]))
            assert (state.xt != MASK).all()
            masks_told = [size * t for t in told]
            if isinstance(expected, set):  # these steps reveal something by chance
                assert {round(k, 3) for k in masks_told} <= expected and masks_told == sorted(masks_told)[::-1]
                assert masks_told[0] > 2.1 > masks_told[-1]
            else:
                assert masks_told == pytest.approx(expected, rel=1e-6)
    told.clear()
    list(Settings("first_hitting", block_length=4).states(MDLM(MASK), model, xt, generator()))
    assert 6 / 8 > told[0] > told[1] > told[2] > told[3] > 2 / 8 > told[4] > told[5] > 0


def test_guidance_of_pieces():
    """One of the two calls sees masks in place of the prompt. Both see what earlier pieces wrote."""
    seen = []
    model = lambda xt, t, where: seen.append(xt[0].tolist()) or torch.zeros(int(where.sum()), V)
    xt = torch.tensor([[1, MASK, MASK, MASK, 2]])
    *_, state = Settings("topk", {"k": 1}, guidance=1.0, block_length=1).states(MDLM(MASK), model, xt, generator())
    written = state.xt[0, 1:4].tolist()
    middles = [written[:i] + [MASK] * (3 - i) for i in range(3)]
    assert seen == [row for m in middles for row in ([1, *m, 2], [MASK, *m, MASK])]


@pytest.mark.parametrize("settings", ALL, ids=NAMES)
def test_one_piece_is_the_sampler(settings):
    """A piece of all masks or more changes nothing: the same tokens, probabilities and steps in every State."""
    xt = masks(60)
    xt[:20, 0], xt[10:30, 1], xt[25:50, 2] = 2, 1, 0
    run = lambda n: list(settings._replace(block_length=n).states(MDLM(MASK), world.random_denoiser(2, True), xt,
                                                                  generator()))
    for n in (3, 9):
        for one, other in zip(run(0), run(n), strict=True):
            for a, b in zip(one, other):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("settings", ALL, ids=NAMES)
def test_pieces_from_left_to_right(settings):
    """Each text has its own pieces of two masks. One is full before the next one begins, and stays as it is."""
    xt = torch.tensor([[MASK] * 6, [0, MASK, 1, MASK, MASK, MASK], [MASK, 2, 2, 2, 2, MASK], [1] * 6]).repeat(20, 1)
    model = lambda xt, t, where: torch.zeros(int(where.sum()), V)
    states = list(settings._replace(block_length=2).states(MDLM(MASK), model, xt, generator()))
    piece = torch.where(xt == MASK, ((xt == MASK).cumsum(1) - 1) // 2, -1)
    begun = [torch.where(state.xt != MASK, piece, -1).amax(1, keepdim=True) for state in states]
    for state, last in zip(states, begun):
        assert (state.xt[piece < last] != MASK).all() and torch.equal(state.xt[piece == -1], xt[piece == -1])
        assert torch.equal(state.p.isnan(), (piece == -1) | (state.xt == MASK))
    for before, after, last in zip(states, states[1:], begun):
        assert torch.equal(before.xt[piece < last], after.xt[piece < last])
        torch.testing.assert_close(before.p[piece < last], after.p[piece < last], rtol=0, atol=0, equal_nan=True)
    assert (states[-1].xt != MASK).all()


def test_only_what_is_drawn_is_asked_and_timed():
    """The objective is asked for the time once for each call of the network."""
    calls, ticks, objective = [], [], MDLM(MASK)
    model = lambda xt, t, where: calls.append(1) or torch.zeros(int(where.sum()), V)

    def time(rate):
        ticks.append(1)
        return rate.float()

    objective.time = time
    for settings in ALL:
        calls.clear(), ticks.clear()
        list(settings.states(objective, model, masks(2, 5), generator()))
        assert len(calls) == len(ticks) > 0


def test_default_settings():
    """Training and bench.py sample in T steps of the model's own schedule, or left to right. The samplers have the
    defaults of the command line."""
    assert DEFAULTS["threshold"] == 0.9
    for name, value in DEFAULTS.items():
        found = [inspect.signature(sampler.function).parameters.get(name) for sampler in SAMPLERS.values()]
        assert {p.default for p in found if p} == {value}
    config = configs.replace(configs.demo(), T=3, schedule="cosine")
    assert default_settings(config).options["grid"] == pytest.approx([1, math.cos(math.pi / 6), 0.5, 0])
    states = list(default_settings(config).states(MDLM(MASK, "cosine"), world.oracle, masks(2), generator()))
    assert len(states) <= 4 and (sum(state.steps for state in states) == 3).all() and (states[-1].xt != MASK).all()


def test_left_to_right_follows_the_data():
    """30,000 samples follow the data, whose conditionals the network has. It reads the start and each token once. It is
    asked for the last position only, and not at all where a token is given."""
    lengths = []

    def model(unread, t, where, past, keep):
        seen = unread if past is None else torch.cat((past, unread), 1)
        i = seen.shape[1] - 1
        assert (seen[:, 0] == MASK).all() and (seen[:, 1:] < V).all() and where.shape == unread.shape and keep
        assert where[:, -1].sum() == where.sum() > 0
        lengths.append((i, unread.shape[1]))
        return world.oracle(torch.nn.functional.pad(seen[:, 1:], (0, L - i), value=MASK))[where[:, -1], i], seen

    *_, state = left_to_right(model, masks(30_000), AutoRegressive(MASK), draw())
    assert lengths == [(0, 1), (1, 1), (2, 1)]
    assert chi_square_excess(counts_of(state.xt), world.P_DATA) < 4
    xt = masks(50)
    xt[:, 0], xt[:25, 2] = 2, 1
    *_, state = Settings("left_to_right").states(AutoRegressive(MASK), model, xt, generator())
    assert (state.xt[:, 0] == 2).all() and (state.xt[:25, 2] == 1).all() and (state.xt != MASK).all()
    assert lengths[3:] == [(1, 2), (2, 1)]


# ---- drawing tokens --------------------------------------------------------------------------------------------------


def test_draw_follows_softmax():
    """Draws follow softmax(logits), and a token of probability zero is never drawn, first and last ones included."""
    logits = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, -3.0, -math.inf])
    tokens, p = draw()(logits.expand(50_000, 6))
    counts = torch.bincount(tokens, minlength=6).double()
    possible = logits.isfinite()
    assert (counts[~possible] == 0).all() and torch.allclose(p, logits.softmax(0)[tokens])
    assert chi_square_excess(counts[possible], logits.softmax(0).double()[possible]) < 4


@pytest.mark.parametrize("cut, kept", [
    (dict(temperature=0.5), [0.25, 0.09, 0.0225, 0.0025]),
    (dict(top_k=2), [0.5, 0.3, 0, 0]), (dict(top_k=9), [0.5, 0.3, 0.15, 0.05]),
    (dict(top_p=0.79), [0.5, 0.3, 0, 0]), (dict(top_p=0.81), [0.5, 0.3, 0.15, 0]), (dict(top_p=1e-6), [1, 0, 0, 0]),
    (dict(temperature=0.5, top_k=3, top_p=0.9), [0.25, 0.09, 0, 0]), (dict(temperature=0), [1, 0, 0, 0]),
])
def test_cuts_follow_their_definition(cut, kept):
    """temperature, top_k and top_p, in this order; what is told of a token is its uncut probability."""
    p = torch.tensor([0.3, 0.05, 0.5, 0.15])
    tokens, told = draw(**cut)(p.log().expand(20_000, 4))
    expected = torch.tensor([kept[1], kept[3], kept[0], kept[2]]).double()
    counts = torch.bincount(tokens, minlength=4).double()
    assert (counts[expected == 0] == 0).all() and torch.allclose(told, p[tokens])
    if (expected > 0).sum() > 1:
        assert chi_square_excess(counts[expected > 0], (expected / expected.sum())[expected > 0]) < 4


@pytest.mark.parametrize("size", [1, 2, 3, 27, 50_257])
def test_inverse_cdf(size):
    """Equal to one search in the whole cumulative sum, with zeros, ties and the largest u below 1."""
    p = torch.rand(200, size, generator=generator()) ** 8
    p[:, size // 2:][p[:, size // 2:] < 0.1] = 0
    p[:, 0] += 1e-3
    p[100:, size // 2 + 1:] = 0  # nothing at the end
    p[1, :size // 2], p[1, size // 2] = 0, 1  # nothing at the beginning
    u = torch.rand(200, 1, dtype=torch.float64, generator=generator())
    u[:2], u[90:] = 0, 1 - 2**-53
    found = inverse_cdf(p, u)
    total = p.double().cumsum(-1)
    low, high = (total - p)[torch.arange(200), found], total[torch.arange(200), found]
    y = (u * total[:, -1:]).squeeze(1)
    slack = 1e-6 * total[:, -1]
    assert (p[torch.arange(200), found] > 0).all() and (low - slack <= y).all() and (y <= high + slack).all()


def test_tokens_without_weight_are_not_drawn():
    """The total of 1 and a tiny weight has lost some digits of that weight. u is where the one of them ends and the
    other begins, in another group: no rounding leads to the zeros between them."""
    for tiny in torch.arange(1e-10, 1e-9, 1e-10):
        p = torch.tensor([[tiny, 0, 0, 1]])
        u = p[0, 0].double() / p.double().sum() * (1 + 1e-7 * torch.arange(-20, 20, dtype=torch.float64)[:, None])
        assert set(inverse_cdf(p.expand(40, 4), u).tolist()) == {0, 3}


def test_noise_and_sums_are_float64():
    """The noise is finer than float32's grid, and tokens that float32 sums would lose beside a likely one are drawn."""
    u = draw().uniform((1000,))
    assert u.dtype == torch.float64 and (u * 2**24 % 1 != 0).double().mean() > 0.99
    p = torch.full((1, 50_257), 1e-9)
    p[0, 0] = 1
    total = 1 + 50_256 * 1e-9
    for token in (225, 5_000, 50_256):  # not in the block of the likely one, where only the shares are exact
        u = torch.tensor([[(1 + (token - 0.5) * 1e-9) / total]], dtype=torch.float64)
        assert abs(inverse_cdf(p, u).item() - token) <= 1


def test_float32_gumbel_noise_cuts_the_tail():
    """What Draw's docstring says, computed on the grid of float32 uniforms, k 2^-24 with k = 1 ... 2^24 - 1: where the
    noise ends, and how often a token of probability p wins against one other, over p."""
    n = 2**24
    u = torch.arange(1, n, dtype=torch.float64) / n
    assert -(-u[-1].log()).log() == pytest.approx(16.64, abs=0.005)
    won = []
    for p in (1e-4, 1e-7, 1e-8):
        # It wins where the other's noise is smaller by log((1 - p)/p), that is, where the other's u' < u^((1 - p)/p).
        smaller = (torch.ceil(n * u ** ((1 - p) / p)) - 1).clamp(min=0)
        won.append(smaller.sum().item() / (n - 1) ** 2 / p)
    assert won == [pytest.approx(1, abs=1e-3), pytest.approx(0.73, abs=0.005), pytest.approx(0.015, abs=0.0005)]


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_bound_on_grid_is_the_bound_of_a_chain():
    """bound_on_grid, from the cross-entropies at the rates of a grid, is the enumerated bound of its chain."""
    grid = [1, 0.7, 0.4, 0.1, 0]
    model = world.random_denoiser(1, sees_time=False)
    ce = [world.cross_entropy_at(model, rate) for rate in grid]
    bound = (world.P_DATA * world.t_step_bound(model, alphas(grid))).sum().item() / L
    assert bound_on_grid(grid[::-1], ce[::-1], grid) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("curve", [lambda r: 3 * r**2, lambda r: np.sqrt(r), lambda r: 1 + 0.3 * np.sin(9 * r)])
def test_cheapest_grid(curve):
    """No grid of as many steps is cheaper, of all that there are on 12 points; an even one is dearer."""
    rates = np.linspace(0, 1, 13)
    for steps in (1, 2, 4):
        best = best_grid(rates, curve(rates), steps, n_points=12)
        assert len(best) == steps + 1 and best[0] == 1 and best[-1] == 0
        bounds = [bound_on_grid(rates, curve(rates), [1, *sorted(inner, reverse=True), 0])
                  for inner in itertools.combinations(rates[1:-1].tolist(), steps - 1)]
        assert bound_on_grid(rates, curve(rates), best) == pytest.approx(min(bounds), rel=1e-12)
    fine = np.linspace(0, 1, 257)
    assert (bound_on_grid(fine, fine**4, best_grid(fine, fine**4, 16))
            < bound_on_grid(fine, fine**4, schedule_grid("linear", 16)) - 0.005)


def test_enough_steps():
    """The fewest whose bound is within 1 % of the area: one fewer is not enough."""
    rates = np.linspace(0, 1, 33)
    ce = 0.5 + 3 * rates**2
    n, area = enough_steps(rates, ce), bound_on_grid(rates, ce, np.linspace(1, 0, 10_001).tolist())
    enough, fewer = (bound_on_grid(rates, ce, best_grid(rates, ce, steps)) for steps in (n, n - 1))
    assert enough <= 1.01 * area < fewer
