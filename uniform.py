"""Uniform diffusion of text: the noise is random tokens, not masks. The forward process, the objectives, the samplers.

A token stays with probability alpha(t), independently of the others. Otherwise it becomes one of the V tokens at
random, itself included. With alpha = e^-sigma,

    q(xt = y | x0) = alpha [y = x0] + (1 - alpha)/V.

There is no mask, so nothing shows which tokens are noise. The network predicts every position, is told the time, and
every token may change until the end.

The network's softmax x_theta at position i estimates p(x0_i | xt without position i), not p(x0_i | xt): the bounds
below have their minimum there. p(x0_i = j | xt) is proportional to x_theta[j] q(xt_i | x0_i = j).

Names and conventions are those of diffusion.py. The texts that samplers fill have mask_id = V at positions that are
still to be written. No network of this kind ever sees mask_id.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from categorical import State, begin, in_pieces, rates_of, with_denoising
from diffusion import D3PM, Noise, Objective
from schedules import make_schedule, misfit_of_steps


class UniformNoise(NamedTuple):
    """Noise for a batch: the tokens that replace those of x0, the time, and the weight of the cost in the bound."""

    token: torch.Tensor   # (B, L) long, the token that replaces that of x0; -1 where x0 stays
    t: torch.Tensor       # (B,) float32, the time that the model is told
    weight: torch.Tensor  # (B,) float32, the factor of the cost in the bound
    sigma: torch.Tensor   # (B,) float32, -log alpha: gives alpha and 1 - alpha exactly at both ends

    to = Noise.to

    def split(self, size):
        """Cut the batch into a list of UniformNoise of `size` sequences each."""
        return [UniformNoise(*part) for part in zip(*(x.split(size) for x in self))]


def posterior(x, xt, r, rho):
    """Weights proportional to q(x_tau | x_t = xt), if x (..., V) are the probabilities of x0: xt (...) -> (..., V).

    r and rho < r are the noise rates at t and tau. UDLM, arXiv 2412.10193; D3PM, arXiv 2107.03006, eq. 3 and 4. With
    z = xt, and kappa = (1 - r)/(1 - rho), the probability to survive from tau to t, the weight of token y is

        (r - rho) x[y] + (1 - kappa) rho/V + [y = z] (V (1 - r) x[z] + kappa rho).

    The sum over y is V (1 - r) x[z] + r. The weights are linear in x, so x may be any weights that sum to one. The
    rates are numbers or float64 tensors, because float32 would lose their difference.
    """
    V = x.shape[-1]
    kappa, not_kappa = (1 - r) / (1 - rho), (r - rho) / (1 - rho)
    factors = r - rho, not_kappa * rho / V, V * (1 - r), kappa * rho
    of_x, constant, of_x_z, at_z = (c.to(x) if torch.is_tensor(c) else c for c in factors)
    more_at_z = of_x_z * x.gather(-1, xt[..., None]) + at_z
    return (of_x * x + constant).scatter_add(-1, xt[..., None], more_at_z)


def positive(sigma):
    """sigma in float32, at least 1e-30: at sigma = 0 the noise rate is 0, and log_score takes its logarithm."""
    return sigma.float().clamp(min=1e-30)


def prior_kl(sigma, V):
    """KL(q(x_t | x0) || uniform) of one token at t = 1, in nats, where the total noise is sigma."""
    a = math.exp(-sigma)
    return (a + (1 - a) / V) * math.log1p(a * (V - 1)) + (1 - a) * (V - 1) / V * math.log1p(-a)


def excess(d):
    """e^d - 1 - d, never negative. KL(q || p) = sum of q excess(log p - log q): no term of this sum cancels another."""
    return torch.expm1(d) - d


class Uniform(Objective):
    """Uniform diffusion in continuous time: UDLM (arXiv 2412.10193), Duo (arXiv 2506.10892); with `score`, SEDD's.

    All of them learn the scores S_y = q_t(xt with y here)/q_t(xt) at every position, by the score entropy (SEDD, arXiv
    2310.16834). With scores that are computed from x_theta it is the bound of UDLM and Duo. Let z be the token of xt at
    a position. Given x0, the true score there is c_y = q(y | x0)/q(z | x0). The forward jump rate between any two
    tokens is dsigma/dt / V, so

        nelbo = integral over t of dsigma/dt * E[ sum_i 1/V sum_{y != z} (S_y - c_y log S_y + c_y (log c_y - 1)) ] / L.

    Without `score` the logits are those of x_theta, and S_y = x_bar[y]/x_bar[z], where x_bar[y] = V alpha x_theta[y] +
    1 - alpha (UDLM's letter). The estimators draw all noise rates from 0 to 1, so the prior term is zero. The network
    is told t = 1 at rates above those of the schedule, and t = 0 at rates below them.

    With `score` the logits are log S_y. The integral ends at the schedule's last sigma, and a prior term is added.

    In both cases the rates begin at 0, where xt = x0, so there is no reconstruction term. `noise`, for training, draws
    only the rates of the schedule.

    weighting 'simple' (without `score`) multiplies each sample of the bound by 6 r (1 - r) in training, where r is the
    noise rate. Then a random token has the same weight at all rates, and a clean one little: GIDD's dynamic weights
    (arXiv 2503.04482; docs/maths.md, section 13). The reported bound keeps its weights.
    """

    description = "was trained with uniform noise"
    score = False  # the logits are those of x_theta, not log S_y
    has_mask = any_order = False
    everywhere = random_tokens = True
    samplers = {"ancestral": "uniform_ancestral", "analytic": "uniform_ancestral", "euler": "uniform_euler"}
    estimators, reported = {"rates": "flatter_rates", "flatter_rates": "rates"}, "rates"
    own = ("weighting",)

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.schedule, config.weighting)

    @classmethod
    def misfit(cls, config):
        for_masks = {"prefix=none": config.prefix != "none", "lambda_ce=0": config.lambda_ce,
                     "weighting=nelbo": config.weighting == "simple" and "weighting" not in cls.own,
                     "scale_by_sigma": not config.scale_by_sigma,
                     "time_sampling=stratified (or uniform)": config.time_sampling == "exact_k"}
        if wrong := [f"--{setting}" for setting, is_wrong in for_masks.items() if is_wrong]:
            return f"noise={config.noise} needs {' '.join(wrong)}: what is set now is for masks"

    def __init__(self, vocab_size, schedule="loglinear", weighting="nelbo"):
        super().__init__(vocab_size, schedule)
        self.V, self.weighting = vocab_size, weighting
        self.last_sigma, self.prior = math.inf, 0.0
        if self.score:
            self.last_sigma = self.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)).item()
            self.prior = prior_kl(self.last_sigma, vocab_size)

    def corrupt(self, x0, token):
        """The input of the network, xt, for x0 (B, L)."""
        return torch.where(token < 0, x0, token)

    def tokens(self, rate, v):
        """The noise tokens (B, L) at rates (B,): token ceil(V v/rate) - 1 where v (B, L) <= rate, else -1.

        Given v <= rate, v/rate is uniform on (0, 1]. So v decides whether a token is replaced, and by which."""
        token = torch.ceil(v / rate[:, None] * self.V).clamp(1, self.V).long() - 1
        return torch.where(v <= rate[:, None], token, -1)

    def noise(self, u, v):
        """Noise at the time t = u, with weight dsigma/dt: u (B,), v (B, L) -> UniformNoise."""
        alpha = self.schedule.alpha(u)
        return UniformNoise(self.tokens(1 - alpha, v), u.float(), self.schedule.dsigma(u).float(),
                            positive(self.schedule.sigma(u)))

    def rates(self, u, v, pick=None, power=2.0):
        """The bound by the noise rate u^power, with weight dsigma/du: u (B,), v (B, L) -> UniformNoise.

        At small rates each random token costs much. So they are drawn more often than by a uniform rate, whose estimate
        has no finite variance (docs/maths.md, section 12). With `score`, sigma is last_sigma u^power instead, because a
        network's log S, unlike the true one, does not vanish at large sigma."""
        if self.score:
            sigma = self.last_sigma * u**power
            rate, weight = -torch.expm1(-sigma), self.last_sigma * power * u ** (power - 1)
        else:
            rate = u**power
            sigma, weight = -torch.log1p(-rate), power * u ** (power - 1) / (1 - rate).clamp(min=1e-30)
        return UniformNoise(self.tokens(rate, v), self.time(rate), weight.float(), positive(sigma))

    def flatter_rates(self, u, v, pick=None):
        """The bound of `rates`, estimated with power 1.5."""
        return self.rates(u, v, pick, power=1.5)

    def log_score(self, logits, xt, sigma):
        """log S_y, which is zero at xt: logits (..., V), xt (...) long, sigma (...) float32 -> (..., V) float32."""
        if self.score:
            return logits.float().scatter(-1, xt[..., None], 0.0)
        V, sigma = logits.shape[-1], sigma[..., None]
        log_x_bar = torch.logaddexp(logits.float().log_softmax(-1) + math.log(V) - sigma,
                                    torch.log(-torch.expm1(-sigma)))
        return log_x_bar - log_x_bar.gather(-1, xt[..., None])

    def prediction(self, logits, xt, sigma):
        """x_theta (..., V) float32, with sum 1. For scores that belong to no x_theta some entries are negative."""
        if not self.score:
            return logits.float().softmax(-1)
        share = self.log_score(logits, xt, sigma).softmax(-1)  # x_bar/V = alpha x_theta + (1 - alpha)/V
        return (share + torch.expm1(-sigma[..., None]) / logits.shape[-1]) * torch.exp(sigma[..., None])

    def cost(self, logits, x0, xt, sigma):
        """1/V sum_{y != z} c_y (e^d - 1 - d), d = log S_y - log c_y: logits (B, L, V), sigma (B,) -> nats (B, L).

        Let c = (1 - alpha)/(1 - alpha + V alpha). If z = x0, all c_y are c. Else c_x0 = 1/c, and the other c_y are 1.
        """
        V, sigma = logits.shape[-1], sigma[:, None].expand_as(x0)
        log_score, clean = self.log_score(logits, xt, sigma), xt == x0
        rate = -torch.expm1(-sigma)
        log_c = torch.log(rate / (rate + V * torch.exp(-sigma)))
        log_c_y = torch.where(clean, log_c, 0.0)  # of all y but z and x0
        d = (log_score - log_c_y[..., None]).scatter(-1, xt[..., None], 0.0).scatter(-1, x0[..., None], 0.0)
        d_x0 = log_score.gather(-1, x0[..., None]).squeeze(-1) + log_c  # if z is not x0
        return (log_c_y.exp() * excess(d).sum(-1) + torch.where(clean, 0.0, excess(d_x0) / log_c.exp())) / V

    def position_costs(self, logits, x0, noise):
        """Costs of the positions in the bound, without its weight: logits (B, L, V), x0 (B, L) -> nats (B, L)."""
        return self.cost(logits, x0, self.corrupt(x0, noise.token), noise.sigma)

    def nelbo(self, model, x0, noise):
        """Estimate the bound of each sequence by one sample of the noise: x0 (B, L) -> nats per token (B,)."""
        costs = self.position_costs(model(self.corrupt(x0, noise.token), noise.t), x0, noise)
        return noise.weight * costs.mean(1) + self.prior

    def simple_weight(self, sigma):
        """The factor of weighting 'simple': 6 r (1 - r), whose mean over r is 1."""
        return 6 * torch.exp(-sigma) * -torch.expm1(-sigma)

    def loss(self, model, x0, noise):
        nelbo = self.nelbo(model, x0, noise)
        weight = self.simple_weight(noise.sigma) if self.weighting == "simple" else 1.0
        return (weight * nelbo).mean(), nelbo.detach()


class UniformSEDD(Uniform):
    """Uniform of scores: the objective of SEDD's networks for uniform noise."""

    score, own = True, ()

    @classmethod
    def misfit(cls, config):
        if make_schedule(config.schedule).full_range:
            return (f"objective=sedd needs a finite sigma, and schedule={config.schedule} ends at an infinite one: use "
                    "loglinear or geometric")
        return super().misfit(config)


class UniformD3PM(Uniform):
    """Uniform D3PM with T steps (arXiv 2107.03006, eq. 1): nelbo = sum over s of E[KL(q(x_{s-1}|x_s, x0) || p)] / L.

    p is posterior() with the network's prediction as x. The step s = 1 ends at x0: it is the reconstruction term.
    """

    estimators, reported = {"t_step": "t_step_uniform", "t_step_uniform": "t_step"}, "t_step"
    own = ()
    time, t_step_uniform = D3PM.time, D3PM.t_step_uniform

    def __init__(self, vocab_size, T=1000, schedule="linear"):
        super().__init__(vocab_size, schedule)
        self.T = T

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.T, config.schedule)

    @classmethod
    def misfit(cls, config):
        return misfit_of_steps(config.schedule) or super().misfit(config)

    def at_step(self, s, v, weight):
        rate = 1 - self.schedule.alpha(s / self.T)
        return UniformNoise(self.tokens(rate, v), (s / self.T).float(), weight.float(),
                            positive(self.schedule.sigma(s / self.T)))

    def noise(self, u, v):
        """Noise at a step s that is uniform on 1 ... T, with weight T: u (B,), v (B, L) -> UniformNoise."""
        return self.at_step(torch.ceil(u * self.T), v, torch.full_like(u, self.T))

    def t_step(self, u, v, pick=None):
        """The T-step bound by s = ceil(u^2 T), with weight 1/P(s). Small s, at which few tokens cost much, come more
        often."""
        s = torch.ceil(u**2 * self.T).clamp(min=1)
        return self.at_step(s, v, 1 / ((s / self.T).sqrt() - ((s - 1) / self.T).sqrt()))

    def cost(self, logits, x0, xt, s):
        """KL(q(x_{s-1} | x_s = xt, x0) || p) at steps s (B,): logits (B, L, V) -> nats (B, L)."""
        steps = (s.cpu() if s.device.type == "mps" else s).double()[:, None, None]  # mps has no float64
        r, rho = 1 - self.schedule.alpha(steps / self.T), 1 - self.schedule.alpha((steps - 1) / self.T)
        q = posterior(F.one_hot(x0, logits.shape[-1]).float(), xt, r, rho)
        p = posterior(logits.float().softmax(-1), xt, r, rho)
        q, p = q / q.sum(-1, keepdim=True), (p / p.sum(-1, keepdim=True)).clamp(min=1e-30)
        possible = q > 0
        # With d = log p - log q, a term q (e^d - 1 - d) = p - q - q d of the sum is p where q = 0.
        d = torch.where(possible, p.log() - q.log(), 0.0)
        return torch.where(possible, q * excess(d), p).sum(-1)

    def position_costs(self, logits, x0, noise):
        return self.cost(logits, x0, self.corrupt(x0, noise.token), (noise.t * self.T).round())

    def loss(self, model, x0, noise):
        nelbo = self.nelbo(model, x0, noise)
        return nelbo.mean() / self.T, nelbo.detach()


# ---- samplers --------------------------------------------------------------------------------------------------------


def noise_at(r, tokens):
    """sigma (N,) float32 of a noise rate r for tokens (N,)."""
    return torch.full(tokens.shape, -math.log1p(-r) if r < 1 else math.inf, device=tokens.device)


@torch.no_grad()
def chain(model, xt, start, objective, grid, step):
    """Yield the States of a chain that draws tokens anew in each step of a grid, from noise rate r to rho.

    xt: (B, L) long, masks at the positions to draw. All other tokens are given and never change.
    start: (B, L) long, xt with tokens of the rate grid[0] in place of the masks.
    step: (logits (N, V), tokens (N,), r, rho) -> new tokens (N,), and the network's probabilities of these (N,).

    The network is told the time of the rate r, even if tokens are given: r says how likely a token is to be noise.
    """
    state, free = begin(start), xt == objective.mask_id
    for r, rho in zip(grid, grid[1:]):
        if free.any():
            logits = in_pieces(model(state.xt, rates_of(xt, r), free))
            now = state.xt[free].split([len(piece) for piece in logits])
            new = [step(piece, z, r, rho) for piece, z in zip(logits, now)]
            state = state.put(free, *map(torch.cat, zip(*new)))
        yield state


@torch.no_grad()
def self_corrected(states, model, free, objective, draw, n, patience=32):
    """Yield the states of a sampler, and those of at most n more steps, each of which changes one token of each text:
    GIDD's self-correction (arXiv 2503.04482), for networks that were trained on random tokens.

    In a step a token y_i is drawn at every free position i, from the network's prediction at the temperature of `draw`.
    Of those that differ from the text the likeliest one replaces its token. The network is always told t = 0.01. A text
    is finished when no y_i differs, or when its agreement, the share of its free tokens that are the network's
    likeliest, has not grown in more than `patience` steps. Texts do not have the distribution of the model.

    free: (B, L) bool; other tokens never change. p of a new token is that of the prediction, uncut.
    """
    for state in states:
        yield state
    B, device = len(free), free.device
    rate = 1 - objective.schedule.alpha(torch.tensor(0.01, dtype=torch.float64)).item()
    best, waited, active = torch.zeros(B, device=device), torch.zeros(B, device=device), free.any(1)

    def propose(logits, z):
        x = objective.prediction(logits, z, noise_at(rate, z)).clamp(min=0)
        x = x / x.sum(-1, keepdim=True)
        q = draw.cut(x.log(), x)
        y = draw.pick(q)
        q_y, x_y = (p.gather(-1, y[:, None]).squeeze(-1) for p in (q, x))
        return y, x_y, torch.where(y == z, 0.0, q_y), x.argmax(-1)

    for _ in range(n):
        if not active.any():
            break
        where = free & active[:, None]
        logits = in_pieces(model(state.xt, rates_of(state.xt, rate), where))
        now = state.xt[where].split([len(piece) for piece in logits])
        y, p, score, likeliest = map(torch.cat, zip(*(propose(*pair) for pair in zip(logits, now))))
        score = torch.zeros(free.shape, device=device).masked_scatter(where, score)
        changes = (score > 0) & F.one_hot(score.argmax(1), free.shape[1]).bool()
        new = state.put(changes, y[changes[where]], p[changes[where]])
        agrees = torch.zeros_like(free).masked_scatter(where, new.xt[where] == likeliest)
        agreement = agrees.sum(1) / free.sum(1).clamp(min=1)
        waited = torch.where(agreement > best, 0, waited + 1)
        best, took_part = torch.maximum(best, agreement), active
        active = active & changes.any(1) & (waited <= patience)
        keep = active[:, None]
        state = State(torch.where(keep, new.xt, state.xt), torch.where(keep, new.p, state.p), took_part.long().cpu())
        yield state


def uniform_chain(model, xt, objective, draw, grid, weigh):
    """The chain that begins with random tokens in place of the masks of xt (B, L).

    weigh: (x (N, V), logits (N, V), tokens (N,), r, rho) -> weights (N, V) to draw the new tokens from, where x is the
        network's prediction. Negative weights count as 0.

    p of the States is the network's probability that the new token y is the clean one (docs/maths.md, section 12):

        p(x0 = y | xt = z) = (r x[y] + V (1 - r) [y = z] x[z]) / (r sum x + V (1 - r) x[z]).
    """
    noise = (draw.uniform(xt.shape) * objective.V).long().to(xt.device)

    def step(logits, z, r, rho):
        x = objective.prediction(logits, z, noise_at(r, z))
        y = draw.pick(weigh(x, logits, z, r, rho).clamp(min=0))
        x = x.clamp(min=0)
        x_y, x_z = (x.gather(-1, token[:, None]).squeeze(-1) for token in (y, z))
        extra = x.shape[-1] * (1 - r)
        return y, (x_y * r + x_z * extra * (y == z)) / (x.sum(-1) * r + x_z * extra)

    return chain(model, xt, torch.where(xt == objective.mask_id, noise, xt), objective, grid, step)


def uniform_ancestral(model, xt, objective, draw, grid):
    """The reverse chain of uniform noise: draw each token from the posterior given the network's prediction (UDLM,
    arXiv 2412.10193; D3PM, eq. 4). For scores this is SEDD's analytic predictor, and negative probabilities count as 0.
    Rates above the last one that a score network knows are left out."""
    most = -math.expm1(-objective.last_sigma)
    cut = draw.temperature != 1 or draw.top_p < 1 or draw.top_k

    def weigh(x, logits, now, r, rho):
        if cut:
            x = x.clamp(min=0)
            x = draw.cut(x.log(), x / x.sum(-1, keepdim=True))
            x = x / x.sum(-1, keepdim=True)
        return posterior(x, now, r, rho)

    known = sorted({min(rate, most) for rate in grid}, reverse=True)
    return uniform_chain(model, xt, objective, draw, known, weigh)


def uniform_euler(model, xt, objective, draw, grid):
    """SEDD's Euler predictor with uniform noise. From time t to tau a token z becomes y != z with probability
    (t - tau) dsigma/dt S_y / V, where S_y is the score. Otherwise it stays. The last step removes the noise, as in
    `euler`."""
    def weigh(x, logits, now, r, rho):
        return posterior(x, now, r, rho) if rho == 0 else uniform_jumps(objective, logits, now, r, rho)

    least = 1 - objective.schedule.alpha(torch.zeros((), dtype=torch.float64)).item()  # 1e-4 for `geometric`
    return uniform_chain(model, xt, objective, draw, with_denoising(grid, least), weigh)


def uniform_jumps(objective, logits, now, r, rho):
    """Probabilities (N, V) of an Euler step from noise rate r to rho, for tokens now (N,) and logits (N, V). That of
    staying is negative if the step is too long."""
    t, tau = objective.schedule.times(r, rho)
    score = objective.log_score(logits, now, noise_at(r, now)).exp()
    jump = ((t - tau) * objective.schedule.dsigma(t)).item() / logits.shape[-1] * score.scatter(-1, now[:, None], 0.0)
    return jump.scatter(-1, now[:, None], 1 - jump.sum(-1, keepdim=True))
