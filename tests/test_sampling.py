"""sampling.py against enumerated laws: the sampler must follow its own Markov chain, exactly."""

import math

import pytest
import torch

import world
from diffusion import MDLM, SCHEDULES
from sampling import ancestral, categorical, first_hitting, left_to_right, topk
from world import L, MASK, V


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def run(model, xt, steps, schedule="linear", seed=0):
    return list(ancestral(model, xt, MASK, SCHEDULES[schedule], steps, generator(seed)))


def masks(B, L=L):
    return torch.full((B, L), MASK)


def chi_square_excess(counts, law):
    """How many standard deviations Pearson's statistic lies above its mean, if counts (n,) are drawn from law (n,).

    Cells that expect fewer than 20 are put together.
    """
    expected = counts.sum() * law
    small = expected < 20
    if small.any():
        counts, expected = (torch.cat([x[~small], x[small].sum()[None]]) for x in (counts, expected))
    statistic, dof = ((counts - expected) ** 2 / expected).sum().item(), len(expected) - 1
    return (statistic - dof) / math.sqrt(2 * dof)


@pytest.mark.parametrize("schedule, steps, sees_time", [("linear", 1, False), ("linear", 2, True), ("linear", 4, False),
                                                        ("cosine", 3, True), ("cosine", 5, False)])
def test_ancestral_follows_its_chain(schedule, steps, sees_time):
    """30,000 samples follow the enumerated law of the reverse chain; it is not the data's, and the test can tell."""
    model = world.random_denoiser(1, sees_time) if sees_time else world.oracle
    law = world.chain_law(model, SCHEDULES[schedule].alpha(torch.arange(steps + 1).double() / steps).tolist())
    x0 = run(model, masks(30_000), steps, schedule)[-1]
    index = (x0 * torch.tensor([V**2, V, 1])).sum(1)
    counts = torch.bincount(index, minlength=V**L).double()
    assert chi_square_excess(counts, law) < 4
    assert chi_square_excess(counts, world.P_DATA) > 10


def test_many_steps_approach_the_data():
    """With the Bayes-optimal denoiser, the total variation between p_T and the data shrinks like 1/T."""
    distance = [0.5 * (world.chain_law(world.oracle, [1 - s / T for s in range(T + 1)])
                       - world.P_DATA).abs().sum().item()
                for T in (4, 8, 16)]
    assert distance[0] > 1.7 * distance[1] > 1.7**2 * distance[2] > 0


@pytest.mark.parametrize("steps", [1, 3, 50])
def test_masks_vanish_and_tokens_stay(steps):
    """Masks only ever become tokens, tokens never change, given ones included, and none is masked at the end."""
    xt = masks(64)
    xt[:, 1] = 2
    states = [xt] + run(world.random_denoiser(2, True), xt, steps)
    assert len(states) == steps + 1
    for before, after in zip(states, states[1:]):
        assert torch.equal(after[before != MASK], before[before != MASK])
    assert (states[-1] != MASK).all() and (states[-1] < V).all() and (states[-1][:, 1] == 2).all()


def test_the_network_is_asked_only_for_what_is_revealed():
    """At most one call per step, none if nothing is revealed, only rows and positions that are, at the step's time."""
    asked = []

    def model(xt, t, where):
        assert where.any(1).all() and (xt[where] == MASK).all()
        assert len(set(t.tolist())) == 1
        asked.append((t[0].item(), int(where.sum())))
        return torch.zeros(int(where.sum()), V)

    run(model, masks(2, 5), 100)
    assert sum(n for _, n in asked) == 2 * 5 and len(asked) <= 10
    assert [t for t, _ in asked] == sorted((t for t, _ in asked), reverse=True)
    assert all(abs(t * 100 - round(t * 100)) < 1e-4 and t > 0 for t, _ in asked)


def test_same_seed_same_sample():
    """A sample is a function of the seed."""
    model = world.random_denoiser(3, False)
    a, b, c = (run(model, masks(50), 4, seed=seed)[-1] for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_categorical_follows_softmax():
    """Draws follow softmax(logits), and a token of probability zero is never drawn, first and last ones included."""
    logits = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, -3.0, -math.inf])
    counts = torch.bincount(categorical(logits.expand(50_000, 6), generator()), minlength=6).double()
    possible = logits.isfinite()
    assert (counts[~possible] == 0).all()
    assert chi_square_excess(counts[possible], logits.softmax(0).double()[possible]) < 4


def test_temperature():
    """At temperature 1/2 the tokens follow p^2, normalised; the order of reveals stays that of the chain."""
    p = torch.tensor([0.5, 0.3, 0.2])
    model = lambda xt, t, where: p.log().expand(int(where.sum()), V)
    *_, x0 = ancestral(model, masks(20_000), MASK, SCHEDULES["linear"], 3, generator(), temperature=0.5)
    assert chi_square_excess(torch.bincount(x0.flatten()).double(), (p**2 / (p**2).sum()).double()) < 4


def test_left_to_right_follows_the_data():
    """With the conditionals of the data, 30,000 samples follow the data; the network sees the start and the prefix, is
    asked for the last position only, and not at all where a token is given."""
    lengths = []

    def model(seen, t, where):
        i = seen.shape[1] - 1
        assert (seen[:, 0] == MASK).all() and (seen[:, 1:] < V).all() and where.sum() == len(seen) == where[:, i].sum()
        lengths.append(i)
        return world.oracle(torch.nn.functional.pad(seen[:, 1:], (0, L - i), value=MASK))[:, i]

    *_, x0 = left_to_right(model, masks(30_000), MASK, generator())
    assert lengths == [0, 1, 2]
    counts = torch.bincount((x0 * torch.tensor([V**2, V, 1])).sum(1), minlength=V**L).double()
    assert chi_square_excess(counts, world.P_DATA) < 4
    xt = masks(50)
    xt[:, 0], xt[:25, 2] = 2, 1
    states = list(left_to_right(model, xt, MASK, generator()))
    assert (states[-1][:, 0] == 2).all() and (states[-1][:25, 2] == 1).all() and (states[-1] != MASK).all()
    assert len(states) == L and lengths == [0, 1, 2, 1, 2]


# ---- first hitting, top k --------------------------------------------------------------------------------------------


def law_of(x0):
    return torch.bincount((x0 * torch.tensor([V**2, V, 1])).sum(1), minlength=V**L).double()


def test_first_hitting_follows_the_continuous_chain():
    """With the Bayes-optimal denoiser 30,000 samples follow the data itself, with at most L calls."""
    states = list(first_hitting(world.oracle, masks(30_000), MASK, MDLM(MASK).time, generator()))
    assert len(states) == L and all(((state == MASK).sum(1) == L - 1 - i).all() for i, state in enumerate(states))
    assert chi_square_excess(law_of(states[-1]), world.P_DATA) < 4


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_first_hitting_tells_the_time(schedule):
    """A network that sees the time: the limit of many steps of the ancestral chain, whose law is enumerated."""
    model, objective = world.random_denoiser(1, sees_time=True), MDLM(MASK, schedule)
    *_, x0 = first_hitting(model, masks(30_000), MASK, objective.time, generator())
    steps = 300
    law = world.chain_law(model, objective.schedule.alpha(torch.arange(steps + 1).double() / steps).tolist())
    assert chi_square_excess(law_of(x0), law) < 4
    blind = world.chain_law(lambda xt, t: model(xt, torch.ones_like(t)), [1 - s / 50 for s in range(51)])
    assert chi_square_excess(law_of(x0), blind) > 10


def test_first_hitting_keeps_what_is_given():
    """Rows with different numbers of masks: each token is drawn once, given ones stay, finished rows are left alone."""
    xt = masks(50)
    xt[:, 1], xt[:25, 2], xt[0] = 2, 1, torch.tensor([0, 1, 2])
    states = list(first_hitting(world.random_denoiser(2, True), xt, MASK, MDLM(MASK).time, generator()))
    assert len(states) == 2 and (states[-1] != MASK).all()
    assert torch.equal(states[-1][xt != MASK], xt[xt != MASK])


def test_topk_by_hand():
    """At a low temperature: in each of two steps half of what is left, the surest first, then the rest."""
    logits = torch.tensor([[0.0, 3.0], [0.0, 9.0], [5.0, 0.0], [0.0, 1.0]])
    model = lambda xt, t, where: logits.expand(len(xt), 4, 2)[where]
    first, last = topk(model, torch.full((3, 4), 2), 2, MDLM(2).time, 2, generator(), temperature=0.01)
    assert first.tolist() == [[2, 1, 0, 2]] * 3 and last.tolist() == [[1, 1, 0, 1]] * 3
    given = torch.tensor([[1, 2, 2, 2]])
    states = list(topk(model, given, 2, MDLM(2).time, 5, generator(), temperature=0.01))
    assert len(states) == 5 and [int((state == 2).sum()) for state in states] == [2, 1, 0, 0, 0]
    assert states[-1].tolist() == [[1, 1, 0, 1]]


def test_topk_tells_the_share_of_masks():
    """The network is told the time at which as many masks are expected as there are."""
    told = []

    def model(xt, t, where):
        told.append(t.tolist())
        return torch.zeros(int(where.sum()), V)

    list(topk(model, masks(2, 4), MASK, MDLM(MASK, "cosine").time, 2, generator()))
    expected = [SCHEDULES["cosine"].inverse(torch.tensor(1 - rate, dtype=torch.float64)).item() for rate in (1, 0.5)]
    assert [t[0] for t in told] == pytest.approx(expected) and [t[1] for t in told] == pytest.approx(expected)
