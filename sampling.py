"""The reverse process: samplers, as functions of a denoiser callable `model(xt, rate, where) -> logits`.

A sampler is an iterator over the states on the way from xt (B, L), which has masks and maybe given tokens, to text. The
given tokens never change. `ancestral` and `topk` do not walk through the steps in which nothing happens. They only
count them (State.steps). So their cost is limited by the number of tokens, not of steps.

    sampler          reveals                                                      distribution of the texts
    ancestral        each mask by chance, on a grid of mask rates                 that of the chain on this grid
    first_hitting    one mask at a time, at a random rate                         that of the chain in continuous time
    topk             the surest tokens, a fixed number per step                   heuristic
    threshold        all tokens surer than a threshold                            heuristic
    entropy_bound    the tokens of least entropy, as many as gamma nats allow     heuristic; a step costs gamma at most
    remdm            as ancestral, and makes tokens masks again by chance         that of its own chain
    analytic, euler  each mask by chance, by scores that need not be normalised   those of SEDD's two predictors
    left_to_right    (causal networks) one position after another                 that of the model, exactly

All but the last can also fill a text piece by piece, from left to right (piece_by_piece). `denoise`, at the end, is
what the commands call: it runs a sampler on texts of any length.

A token is drawn from the network's prediction. Only `temperature`, `top_k`, `top_p` and `guidance` change this
distribution.

Samplers know mask rates, not times. The rate r of a sampler is the share of the masks of xt that are still masks. From
rate r to rate rho < r a mask is revealed with probability 1 - rho/r, whatever the schedule is. If tokens are given, the
rate of the whole text is lower: rate0 * r, where rate0 is its rate at the start. The network is told the time of that
rate (diffusion.Objective.time). Settings.states does both.

All samplers take the same arguments, and then those of their own:

    model      the denoiser: xt (B, L), rate (B,) and where (B, L) -> logits (N, V) of the N positions in `where`
    xt         (B, L) long; objective.mask_id where a token is to be written
    objective  that of the model
    draw       categorical.Draw: logits (N, V) -> tokens and their probabilities; also all other random numbers
    grid       (samplers with steps) rates, never rising: from 1, or the schedule's rate at t = 1, to 0

Networks trained on random tokens have samplers of their own, in uniform.py and hybrid.py. Their texts can be corrected
afterwards (uniform.self_corrected).
"""

import math
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from block_diffusion import finish, in_blocks
from categorical import SURE, Draw, State, begin, rates_of, with_denoising
from hybrid import hybrid_ancestral
from uniform import self_corrected, uniform_ancestral, uniform_euler


# ---- what the samplers share -----------------------------------------------------------------------------------------


def denoiser_of(model, objective, past=None, window=None):
    """The denoiser that tells the network the time of each rate, and runs it only where something is to be predicted:
    for the sequences in which `where` has any position. Logits that are no prediction (SEDD's) become log f.

    past: of all B sequences, what model.remember() returned for the tokens before (model.DiT).
    window: (a, b), if `where` lies in a ... b - 1 in all calls: a piece of piece_by_piece(). The first call reads all
        tokens, and the later ones the piece alone. It sees keys and values of the other tokens as they were in the
        first call (dual cache, arXiv 2505.22618; foreign.llm.LLM.within). Each token that is revealed would change
        these, unless the network has one layer. So the logits are an approximation.
    """
    outside = None

    def denoiser(xt, rate, where):
        nonlocal outside
        t, rows = objective.time(rate).to(xt.device), where.any(1).nonzero().squeeze(1)
        of_rows = lambda kept: kept if len(rows) == len(where) else [layer.of_rows(rows) for layer in kept]
        if window is None:
            more = {} if past is None else {"past": of_rows(past)}
            logits = model(xt[rows], t[rows], where=where[rows], **more)
        elif outside is None:
            logits, outside = model.within(xt, t, where, window)  # of all sequences: later calls may be for others
        else:
            logits, _ = model.within(xt[rows], t[rows], where[rows], window, of_rows(outside))
        if objective.normalised:
            return logits
        return objective.log_prediction(logits, t[:, None].expand(where.shape)[where])

    return denoiser


def guided(denoiser, given, objective, size, w):
    """Classifier-free guidance towards the given tokens (B, L), without a second training (arXiv 2410.18514).

    The network predicts twice: with the given tokens c, and with masks in their place. Tokens are drawn from

        p(x | c)^(1 + w) / p(x)^w, normalised.

    The logits in `where` are combined, so w = 0 is p(x | c). size: as in Settings.states. At rate r the first call has
    size * r masks. In the second call the given tokens are masks, too: size * r + number of all L tokens, the rate
    (size * r + number)/L.
    """
    L, number = given.shape[1], given.sum(1).cpu()

    def both(xt, rate, where):
        logits = denoiser(xt, rate, where).float()
        logits_without = denoiser(xt.masked_fill(given, objective.mask_id), (size * rate + number) / L, where).float()
        return (1 + w) * logits - w * logits_without

    return both


def fill(model, state, where, rate, draw):
    """Draw tokens for the masks at `where` (B, L), from the network at the rates `rate` (B,). Returns a State."""
    return state.put(where, *draw(model(state.xt, rate, where))) if where.any() else state


def propose(model, state, masked, rate, draw, by="probability"):
    """Draw a token for every mask. Returns that State, and how sure the network is (B, L): the probability of the token
    drawn, or another measure of categorical.SURE; -inf where nothing is masked."""
    logits = model(state.xt, rate, masked)
    tokens, p, *sure = draw(logits, SURE[by])
    sure = torch.full_like(state.p, -torch.inf).masked_scatter(masked, sure[0] if sure else p)
    return state.put(masked, tokens, p), sure


def accept(state, proposed, sure, n):
    """Take the n (B,) surest proposals of each sequence. Of equals, the left one comes first."""
    rank = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    taken = (rank < n[:, None]) & sure.isfinite()
    return State(torch.where(taken, proposed.xt, state.xt), torch.where(taken, proposed.p, state.p))


# ---- samplers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ancestral(model, xt, objective, draw, grid):
    """The reverse chain on a grid of mask rates rho_0 > rho_1 > ... > 0 (D3PM, eq. 4; MDLM, eq. 6).

    From r to rho each mask is revealed with probability 1 - rho/r, whatever the network says. Its token is drawn from
    the network's prediction at r. So the network runs only for the sequences, and its head only at the positions, where
    a mask is revealed. This is a draw from the posterior over all V + 1 states, which is never built.

    A mask is still there at rate rho_m with probability rho_1/rho_0 * ... * rho_m/rho_(m-1) = rho_m/rho_0. A number
    that is uniform on [0, rho_0), the mask's reveal rate, is below rho_m with the same probability. So each mask gets
    one, and is revealed in the step from r to rho if it is in [rho, r). All reveal rates are drawn at once, and only
    the steps that reveal something are walked through. These steps differ between sequences, which do not depend on
    each other. So network call number j takes the j-th such step of every sequence, each at its own rate. The number of
    calls is the largest number of such steps in a sequence.
    """
    state, masked, n_steps = begin(xt), xt == objective.mask_id, len(grid) - 1
    rates = torch.tensor(grid, dtype=torch.float64)
    reveal_rate = grid[0] * draw.uniform(xt.shape)
    step_of = n_steps - torch.searchsorted(rates.flip(0).to(reveal_rate.device), reveal_rate, right=True)
    step_of = step_of.to(xt.device).masked_fill(~masked, n_steps)  # (B, L), 0 ... n_steps - 1; given tokens: n_steps
    ordered, order = step_of.sort(dim=1)
    is_new = F.pad(ordered.diff(dim=1) > 0, (1, 0))
    turn = torch.zeros_like(step_of).scatter(1, order, is_new.cumsum(1))  # j, if the token is in the j-th such step
    last = torch.full((len(xt),), -1, device=xt.device)  # the last step of each sequence so far
    for j in range(int(turn[masked].max()) + 1 if masked.any() else 0):
        where = masked & (turn == j)
        step = torch.where(where, step_of, last[:, None]).amax(1)
        state = fill(model, state, where, rates[step.clamp(min=0).cpu()], draw)
        yield state._replace(steps=(step - last).cpu())
        last = step
    if (last < n_steps - 1).any():  # the empty steps at the end
        yield state._replace(steps=(n_steps - 1 - last).cpu())


@torch.no_grad()
def first_hitting(model, xt, objective, draw):
    """The reverse chain in continuous time, without a grid (first-hitting sampler, arXiv 2409.02908); L States at most.

    At rate r there are k masks, each with its own reveal rate, uniform on [0, r). The next one is the largest of these:
    P(largest <= rho) = (rho/r)^k, so it is r u^(1/k) for a uniform u. By symmetry it is each of the masks with the same
    probability. Its token is drawn from the network's prediction at that rate. No two masks are revealed at once, so
    the draw is exact for the chain in continuous time.
    """
    state, rate = begin(xt), torch.ones(len(xt), dtype=torch.float64)
    while (masked := state.xt == objective.mask_id).any():
        rate = rate * draw.uniform(len(xt)).cpu() ** (1 / masked.sum(1).clamp(min=1).cpu())
        which = draw.uniform(xt.shape).masked_fill(~masked.to(draw.generator.device), -1).argmax(1).to(xt.device)
        state = fill(model, state, masked & F.one_hot(which, xt.shape[1]).bool(), rate, draw)
        yield state


def share_left(left, n):
    """The rate of sequences that have `left` of their n masks: (B,) float64."""
    return left.cpu().double() / n.cpu().clamp(min=1)


@torch.no_grad()
def topk(model, xt, objective, draw, grid=None, k=1, by="probability"):
    """Reveal the surest tokens first, a fixed number in each step (MaskGIT, arXiv 2202.04200; LLaDA, 2502.09992).

    A token is drawn for every mask, and the surest ones are kept. How sure the network is follows from its prediction
    at temperature 1, as `by` says (categorical.SURE). MaskGIT adds Gumbel noise to this measure; here there is none.
    On a grid of mask rates a share rho_m/rho_0 of the masks, rounded down, is left after step m. Without one, each step
    reveals k tokens. Texts do not have the distribution of the model: they look better, and become more alike.
    """
    state, n = begin(xt), (xt == objective.mask_id).sum(1).cpu()
    numbers, which = n.unique(return_inverse=True)  # different numbers of masks, (K,): often all texts have the same
    if grid:
        left = (torch.tensor(grid, dtype=torch.float64)[:, None] / grid[0] * numbers + 1e-9).floor().long()
    else:
        left = (numbers - k * torch.arange(math.ceil(int(n.max()) / k) + 1)[:, None]).clamp(min=0)
    done, n_steps = 0, len(left) - 1  # left: the masks after 0, 1, ..., n_steps steps, (n_steps + 1, K)
    for i in (left[1:] < left[:-1]).any(1).nonzero().flatten().tolist():  # the steps that reveal something
        masked = state.xt == objective.mask_id
        proposed, sure = propose(model, state, masked, share_left(left[i, which], n), draw, by)
        state = accept(state, proposed, sure, (left[i] - left[i + 1])[which].to(xt.device))
        yield state._replace(steps=i + 1 - done)
        done = i + 1
    if done < n_steps:
        yield state._replace(steps=n_steps - done)


@torch.no_grad()
def threshold(model, xt, objective, draw, threshold=0.9):
    """Reveal all tokens to which the network gives at least `threshold`, and always the surest one (Fast-dLLM, arXiv
    2505.22618). A token is drawn for every mask, as in topk. Texts do not have the distribution of the model."""
    state, n = begin(xt), (xt == objective.mask_id).sum(1)
    while (masked := state.xt == objective.mask_id).any():
        proposed, sure = propose(model, state, masked, share_left(masked.sum(1), n), draw)
        state = accept(state, proposed, sure, (sure >= threshold).sum(1).clamp(min=1))
        yield state


@torch.no_grad()
def entropy_bound(model, xt, objective, draw, gamma=0.1):
    """Reveal the tokens of least entropy, as many as have (sum of their entropies - the largest of them) <= gamma nats
    (EB-Sampler, arXiv 2505.24857).

    If the predictions are the marginals of one joint distribution, drawing tokens i independently costs

        KL(joint || product of marginals) = sum_i H_i - H(joint) <= sum_i H_i - max_i H_i nats,

    because H(joint) >= max_i H_i. gamma = 0: one at a time, unless more are certain. The entropies are those of the
    prediction at temperature 1. The order by entropy is not that of the model's chain, so texts do not have its
    distribution.
    """
    state, n = begin(xt), (xt == objective.mask_id).sum(1)
    while (masked := state.xt == objective.mask_id).any():
        proposed, sure = propose(model, state, masked, share_left(masked.sum(1), n), draw, "entropy")
        costs = -sure.sort(dim=1, descending=True).values
        n_now = (costs.cumsum(1) - costs <= gamma).sum(1)  # at visible tokens inf - inf is no number, hence False
        state = accept(state, proposed, sure, n_now)
        yield state


DEFAULT_ETA = {"cap": 0.02, "rescale": 0.05, "conf": 1.0, "loop": 0.02}  # {rule of remdm: its eta}


@torch.no_grad()
def remdm(model, xt, objective, draw, grid, remask="cap", eta=None):
    """ancestral, but revealed tokens may become masks again, so that mistakes can be mended (ReMDM, arXiv 2503.00307,
    eq. 7, which calls g sigma_t).

    In the step from rate r to rho a mask is revealed with probability h, and a revealed token becomes a mask with
    probability g. The share of visible tokens must become 1 - rho, as in the chain that the network was trained for:

        (1 - r)(1 - g) + r h = 1 - rho,   so   h = 1 - rho/r + g (1 - r)/r,   and h <= 1 if g <= rho/(1 - r).

    remask: the rule for g, with limit = min(1, rho/(1 - r)):
    cap: min(eta, limit).    rescale: eta * limit.
    conf: eta * limit * softmax(-p) over the revealed tokens, where p is the network's probability of each. Masks are
        revealed with 1 - rho/r, as if g were 0, so the mask rate stays a little above the grid.
    loop: as cap where the grid stands still (loop_grid: r = rho, so h = g (1 - r)/r), else 0.
    Given tokens are never masked.
    """
    eta = DEFAULT_ETA[remask] if eta is None else eta
    state, given = begin(xt), xt != objective.mask_id
    for r, rho in zip(grid, grid[1:]):
        masked = state.xt == objective.mask_id
        limit = min(1, rho / (1 - r)) if r < 1 else 1
        if remask == "cap" or remask == "loop" and r == rho:
            g = min(eta, limit)
        elif remask == "rescale":
            g = eta * limit
        elif remask == "conf":
            g = eta * limit * state.p.neg().masked_fill(masked | given, -torch.inf).softmax(1)
        else:  # loop, where the grid moves on
            g = 0
        h = 1 - rho / r + (0 if remask == "conf" else g * (1 - r) / r)
        revealed = masked & draw.happens(h, xt)
        again = ~masked & ~given & draw.happens(g, xt)
        state = fill(model, state, revealed, rates_of(xt, r), draw)
        state = State(state.xt.masked_fill(again, objective.mask_id), state.p.masked_fill(again, torch.nan))
        yield state


@torch.no_grad()
def analytic(model, xt, objective, draw, grid, chance=lambda schedule, r, rho: 1 - rho / r):
    """SEDD's analytic predictor, or Tweedie denoiser (arXiv 2310.16834), with masks.

    From rate r to rho a mask becomes y with probability (1 - rho/r) f_y, where f is the network's prediction, whose sum
    Z may not be 1 (diffusion.SEDD). If it is, this is `ancestral`. A probability above 1 counts as 1. The last step, to
    0, is the removal of noise: what is still a mask is drawn from f/Z. Every step calls the network while a mask is
    left. chance: (schedule, r, rho) -> 1 - rho/r, or what stands in its place.
    """
    state = begin(xt)
    for r, rho in zip(grid, grid[1:]):
        masked = state.xt == objective.mask_id
        if masked.any():
            logits = model(state.xt, rates_of(xt, r), masked)
            tokens, p = draw(logits)
            Z = logits.float().exp().sum(-1) if not objective.normalised else torch.ones_like(p)
            Z = torch.zeros(xt.shape, device=xt.device).masked_scatter(masked, Z)
            revealed = masked & (draw.happens(Z * chance(objective.schedule, r, rho), xt) | (rho == 0))
            chosen = revealed[masked]
            state = state.put(revealed, tokens[chosen], p[chosen])
        yield state


def euler_chance(schedule, r, rho):
    """(t - tau) w(t), where r and rho are the rates at t and tau. An Euler step has it in place of 1 - rho/r.

    The learned jump rate from the mask to y is sigma' S_y = sigma' odds f_y = w(t) f_y (docs/maths.md, section 9).
    """
    t, tau = schedule.times(r, rho)
    return ((t - tau) * schedule.weight(t)).item()


def euler(model, xt, objective, draw, grid):
    """SEDD's Euler predictor (arXiv 2310.16834), with masks: analytic with euler_chance in place of 1 - rho/r. For
    linear and log-linear noise the two numbers are equal.

    As in that project the chain ends just before t = 0, and a step of noise removal follows.
    """
    return analytic(model, xt, objective, draw, with_denoising(grid), euler_chance)


@torch.no_grad()
def left_to_right(model, xt, objective, draw):
    """Fill the masks from left to right with a causal network (diffusion.AutoRegressive), and yield a State for each.

    model: the network itself, with its keyword arguments, and not a denoiser. It is called once for each position where
    a token is missing. It reads the tokens that it has not read yet, and has the keys and values of those before. Given
    tokens stay, but only the tokens on their right see them.
    """
    state, past, n_read, t = begin(xt), None, 0, torch.ones(len(xt), device=xt.device)
    for i in range(xt.shape[1]):
        here = torch.zeros_like(xt, dtype=torch.bool)
        here[:, i] = xt[:, i] == objective.mask_id
        if here.any():
            inputs = F.pad(state.xt[:, :i], (1, 0), value=objective.mask_id)  # the output at input i is for token i
            logits, past = model(inputs[:, n_read:], t, where=here[:, n_read:i + 1], past=past, keep=True)
            n_read, state = i + 1, state.put(here, *draw(logits))
            yield state


@torch.no_grad()
def piece_by_piece(sampler, of_piece, xt, objective, draw, size, n, options, end=None):
    """Fill the masks of xt (B, L) from left to right, n at a time: semi-autoregressive (LLaDA, arXiv 2502.09992).

    The sampler fills one piece of n masks after the other. It takes the masks of later pieces for given tokens, and the
    network sees them as masks. Of `size` tokens, m are masks of the piece at first, and m' of later pieces. At rate r
    of the sampler m r + m' masks are expected, so the rate of the whole text is (m r + m')/size.

    If n is at least the number of masks, there is one piece and m' = 0: this is the sampler itself.

    of_piece: (a, b) -> the denoiser for a piece, whose masks are at the positions a ... b - 1.
    size: as in Settings.states. options: those of the sampler.
    end: the id of the token that ends a text, or None. Once a piece has it, all later masks of that text are filled
        with `end`, without the network.
    """
    state, masked = begin(xt), xt == objective.mask_id
    number = masked.cumsum(1)  # 1, 2, ... at the masks, from left to right
    for last in range(n, int(number.max()) + n, n):
        if not (state.xt == objective.mask_id).any():  # all texts have ended
            break
        here, later = masked & (number > last - n) & (number <= last), masked & (number > last)
        m, m_later = (where.sum(1).cpu().double() for where in (here, later))
        at = here.any(0).nonzero()
        model = of_piece((int(at[0]), int(at[-1]) + 1))
        denoiser = lambda x, r, where: model(x.masked_fill(later, objective.mask_id), (m * r + m_later) / size, where)
        p = state.p  # that of the pieces before
        for part in sampler(denoiser, state.xt.masked_fill(later, 0), objective, draw, **options):
            xt = part.xt.masked_fill(later, objective.mask_id)
            state = State(xt, torch.where(part.p.isnan(), p, part.p), part.steps)
            yield state
        if end is not None and (state.xt == end).any():
            state = state._replace(xt=finish(state.xt, ~masked, end, objective.mask_id), steps=0)
            yield state


# ---- a sampler and its settings --------------------------------------------------------------------------------------


class Sampler(NamedTuple):
    """A sampler, and what sampler_settings.py and Settings must know of it."""

    function: Callable
    flags: tuple = ()            # the flags of the command line that it uses
    draws_tokens: bool = True    # from a distribution that temperature, top_p and top_k change
    keeps_past: bool = False     # it calls the network on all sequences each time, with a past of its own


# A new sampler is named here, and by the objectives whose networks it is for (diffusion.Objective.samplers).
SAMPLERS = {
    "ancestral": Sampler(ancestral, ("steps", "grid")),
    "first_hitting": Sampler(first_hitting),
    "topk": Sampler(topk, ("steps", "grid", "k", "by")),
    "threshold": Sampler(threshold, ("threshold",)),
    "entropy_bound": Sampler(entropy_bound, ("gamma",)),
    "remdm": Sampler(remdm, ("steps", "grid", "remask", "eta")),
    "analytic": Sampler(analytic, ("steps", "grid")),
    "euler": Sampler(euler, ("steps", "grid")),
    "uniform_ancestral": Sampler(uniform_ancestral, ("steps", "grid")),
    "uniform_euler": Sampler(uniform_euler, ("steps", "grid"), draws_tokens=False),
    "hybrid_ancestral": Sampler(hybrid_ancestral, ("steps", "grid")),
    "left_to_right": Sampler(left_to_right, keeps_past=True),
}


class Settings(NamedTuple):
    """A sampler with all that it needs to know beside the model."""

    sampler: str
    options: dict = {}
    grid_name: str = ""  # of options["grid"], if it is not that of the model's schedule
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: float = 0.0  # w of guided()
    block_length: int = 0  # n of piece_by_piece(), if it is not 0
    dual_cache: bool = False  # read the whole text once for each piece: `window` of denoiser_of()
    correct: int = 0       # n of self_corrected(), if it is not 0
    correct_temperature: float = 0.1

    @property
    def steps(self):
        """The number of steps, or None if it is not known beforehand. With block_length it is that of each piece."""
        return len(self.options["grid"]) - 1 if self.options.get("grid") else None

    def states(self, objective, model, xt, generator, size=None, past=None, end=None):
        """An iterator over the States from xt (B, L) on.

        size: (B,), the tokens of each sequence that noise can hit: all (the default), or those after its prefix. The
            rate of a whole text is its masks / size.
        past: what model.remember() returned for the tokens before xt.
        end: the token after which piece_by_piece() stops a text, or None.
        """
        draw = Draw(generator, self.temperature, self.top_p, self.top_k)
        size = xt.shape[1] if size is None else size.cpu()
        sampler = SAMPLERS[objective.samplers[self.sampler]]
        if sampler.keeps_past:
            return sampler.function(model, xt, objective, draw)
        denoiser = denoiser_of(model, objective, past)
        if self.guidance:
            denoiser = guided(denoiser, xt != objective.mask_id, objective, size, self.guidance)
        if self.block_length:
            of_piece = lambda window: denoiser_of(model, objective, window=window) if self.dual_cache else denoiser
            return piece_by_piece(sampler.function, of_piece, xt, objective, draw, size, self.block_length,
                                  self.options, end)
        free = xt == objective.mask_id
        # With random tokens the rate is that of the free tokens alone.
        rate0 = 1 if objective.random_tokens else free.sum(1).cpu().double() / size
        of_text = lambda xt, r, where: denoiser(xt, rate0 * r, where)
        states = sampler.function(of_text, xt, objective, draw, **self.options)
        if not self.correct:
            return states
        return self_corrected(states, of_text, free, objective, Draw(generator, self.correct_temperature), self.correct)


# ---- texts of any length ---------------------------------------------------------------------------------------------


def windows_of(length, seq_len, context):
    """Windows (a, b) that cover 0 ... length. Each begins `context` tokens before the end of the previous one."""
    found = [(0, min(length, seq_len))]
    while found[-1][1] < length:
        a = found[-1][1] - context
        found.append((a, min(length, a + seq_len)))
    return found


def n_given(xt, mask_id):
    """The number of tokens before the first mask of each sequence: (B, L) -> (B,)."""
    masked = xt == mask_id
    return torch.where(masked.any(1), masked.int().argmax(1), xt.shape[1])


def denoise(settings, objective, model, canvas, config, context, generator, end=None):
    """Fill the masks of a canvas (B, N), which may be longer than the model's window, window by window.

    Yields the State of the whole canvas after each step. The time that a network for masks is told follows from the
    share of masks: among the tokens after the given ones if it was trained to continue a prefix, else among all tokens
    of the window. Block diffusion fills each window block by block. There context must be a multiple of the block size,
    so that each window begins with whole blocks. A text stops after the block, piece or window that has its token
    `end`, if that is not None.
    """
    given, size = canvas != objective.mask_id, None
    state = begin(canvas)
    for a, b in windows_of(canvas.shape[1], config.seq_len, context):
        xt, p = state.xt[:, a:b], state.p[:, a:b]
        if not (xt == objective.mask_id).any():
            continue
        if config.prefix != "none":
            size = (b - a - n_given(xt, objective.mask_id)).clamp(min=1)
        parts = (in_blocks(settings, objective, model, xt, generator, end) if objective.block_size
                 else settings.states(objective, model, xt, generator, size, end=end))
        for part in parts:
            part_p = torch.where(part.p.isnan(), p, part.p)  # p: what an earlier window drew
            state = State(torch.cat((state.xt[:, :a], part.xt, state.xt[:, b:]), 1),
                          torch.cat((state.p[:, :a], part_p, state.p[:, b:]), 1), part.steps)
            yield state
        if end is not None and b < canvas.shape[1]:
            state = state._replace(xt=finish(state.xt, given, end, objective.mask_id), steps=0)
            yield state
