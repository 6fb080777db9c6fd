"""Uniform diffusion of text: noise of random tokens instead of masks; the forward process and the training objectives.

A token stays with probability alpha(t), independently of the others; otherwise it becomes one of the N = V tokens at
random, itself included. There is no mask, so nothing shows which tokens are noise: the network is asked everywhere, is
told the time, and may change its mind until the end. Given x0, with es = (1 - alpha)/alpha = e^sigma - 1,

    q(xt = y | x0) = alpha [y = x0] + (1 - alpha)/N.

What the network's softmax x_theta means is not p(x0_i | xt) but the same without position i (leave one out): the bounds
below have their minimum there. p(x0_i = j | xt) itself is proportional to x_theta[j] q(xt_i | x0_i = j).

Names and conventions are those of diffusion.py. The canvases of samplers mark what is to be written with mask_id = V,
which no network of this kind ever sees.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from diffusion import WHOLE, Noise, make_schedule


class UniformNoise(NamedTuple):
    """What noise put in place of which tokens, at which time, and what a nat of cost counts in the bound."""

    token: torch.Tensor   # (B, L) long, what replaces the token of x0; -1 where it stays
    t: torch.Tensor       # (B,) float32, the time that the model is told
    weight: torch.Tensor  # (B,) float32
    sigma: torch.Tensor   # (B,) float32, -log alpha, from which alpha and 1 - alpha follow exactly at both ends

    to, split = Noise.to, Noise.split


def posterior(x, xt, r, s):
    """q(x_s | x_t = xt, x0 ~ x), unnormalised: x (..., N) and xt (...) at noise rates r > s, 1 - alpha -> (..., N).

    UDLM, arXiv 2412.10193; D3PM, arXiv 2107.03006, eq. 3 and 4. With a = alpha_t/alpha_s it is

        N alpha_t x_z + a - alpha_t   at z = xt, and everywhere   (alpha_s - alpha_t) x + (1 - a)(1 - alpha_s)/N,

    which sums to N alpha_t x_z + 1 - alpha_t. Linear in x, which may be any weights that sum to one. The rates are
    numbers, or float64 tensors, because their difference counts.
    """
    N = x.shape[-1]
    spread, rest, at_x, stays = (c.to(x) if torch.is_tensor(c) else c for c in (
        r - s, (r - s) / (1 - s) * s / N, N * (1 - r), (1 - r) / (1 - s) * s))
    at_z = at_x * x.gather(-1, xt[..., None]) + stays
    return (spread * x + rest).scatter_add(-1, xt[..., None], at_z)


def positive(sigma):
    """sigma in float32, kept from 0, where nothing happens."""
    return sigma.float().clamp(min=1e-30)


def prior_kl(sigma, N):
    """KL(q(x_1 | x0) || uniform) of a token, nats, at the total noise sigma."""
    a = math.exp(-sigma)
    return (a + (1 - a) / N) * math.log1p(a * (N - 1)) + (1 - a) * (N - 1) / N * math.log1p(-a)


def excess(d):
    """e^d - 1 - d, never negative: sum of q excess(log p - log q) = KL(q || p), and no term cancels another."""
    return torch.expm1(d) - d


class Uniform:
    """Uniform diffusion in continuous time: UDLM (arXiv 2412.10193), Duo (arXiv 2506.10892); with `score`, SEDD's.

    All of them learn the scores s_y = p_t(y)/p_t(z), z = xt, at every position, whose true value given x0 is
    r_y = q(y | x0)/q(z | x0), and minimise the same score entropy (SEDD, arXiv 2310.16834; for a score made of
    x_theta it is UDLM's bound, and Duo's), since dsigma/dt / N is the forward rate between any two tokens:

        nelbo = integral over t of dsigma/dt * E[ sum_i 1/N sum_{y != z} (s_y - r_y log s_y + r_y (log r_y - 1)) ] / L.

    score: the network's logits are log s_y, up to the schedule's last sigma, and then comes a prior term. Else they are
    those of x_theta, and s_y = (N alpha x_theta[y] + 1 - alpha)/(the same at z): then the bound is drawn over all rates
    1 - alpha from 0 to 1, and where the schedule ends earlier the network is told the last time that it knows, so that
    nothing is left for a prior term. Below the first sigma it is told t = 0, and there is no reconstruction term.
    """

    description = "was trained on random tokens"
    has_mask, causal, any_order, everywhere, normalised = False, False, False, True, None
    samplers = {"ancestral": "uniform_ancestral", "analytic": "uniform_ancestral", "euler": "uniform_euler"}
    estimators, reported = {"rates": "flatter_rates", "flatter_rates": "rates"}, "rates"

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.schedule)

    @classmethod
    def misfit(cls, config):
        if config.prefix != "none" or config.lambda_ce or config.time_sampling == "exact_k" or (
                config.weighting == "simple"):
            return ("noise=uniform goes with neither prefix nor lambda_ce nor time_sampling=exact_k nor "
                    "weighting=simple, which are for masks")

    def __init__(self, vocab_size, schedule="loglinear", score=False):
        self.mask_id, self.score = vocab_size, score
        self.schedule = make_schedule(schedule)
        self.last_sigma = self.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)).item() if score else math.inf
        self.prior = prior_kl(self.last_sigma, vocab_size) if score else 0.0

    def time(self, rate):
        """What the network is told at a noise rate: (B,) -> (B,) float32."""
        return self.schedule.inverse(1 - rate).float()

    def corrupt(self, x0, token):
        """What the network sees of x0 (B, L)."""
        return torch.where(token < 0, x0, token)

    def tokens(self, rate, v):
        """The noise tokens at rates (B,): where v (B, L) is at most the rate, which token is decided by v/rate."""
        token = torch.ceil(v / rate[:, None] * self.mask_id).clamp(1, self.mask_id).long() - 1
        return torch.where(v <= rate[:, None], token, -1)

    def noise(self, u, v):
        """t = u, weight dsigma/dt. u (B,), v (B, L) -> UniformNoise."""
        alpha = self.schedule.alpha(u)
        weight = -self.schedule.dalpha(u) / alpha.clamp(min=1e-30)
        return UniformNoise(self.tokens(1 - alpha, v), u.float(), weight.float(), positive(self.schedule.sigma(u)))

    def rates(self, u, v, w=None, power=2.0):
        """The bound by rates u^2, so that small rates, where few tokens cost much, come more often than among uniform
        ones, whose estimate has no finite variance. Scores do not vanish at large sigma, as they should, so for them it
        is sigma that is u^2, times the last one. u (B,), v (B, L) -> UniformNoise."""
        if self.score:
            sigma = self.last_sigma * u**power
            rate, weight = -torch.expm1(-sigma), self.last_sigma * power * u ** (power - 1)
        else:
            rate = u**power
            sigma, weight = -torch.log1p(-rate), power * u ** (power - 1) / (1 - rate).clamp(min=1e-30)
        return UniformNoise(self.tokens(rate, v), self.time(rate), weight.float(), positive(sigma))

    def flatter_rates(self, u, v, w=None):
        """The same number by u^1.5."""
        return self.rates(u, v, w, power=1.5)

    def log_score(self, logits, xt, sigma):
        """log s, zero at xt: logits (..., N), xt (...) long, sigma (...) float32 -> (..., N) float32."""
        if self.score:
            return logits.float().scatter(-1, xt[..., None], 0.0)
        N, sigma = logits.shape[-1], sigma[..., None]
        log_x_bar = torch.logaddexp(logits.float().log_softmax(-1) + math.log(N) - sigma,
                                    torch.log(-torch.expm1(-sigma)))
        return log_x_bar - log_x_bar.gather(-1, xt[..., None])

    def prediction(self, logits, xt, sigma):
        """x_theta (..., N) float32. Scores that no x_theta has give one with negative entries, which sums to one."""
        if not self.score:
            return logits.float().softmax(-1)
        share = self.log_score(logits, xt, sigma).softmax(-1)
        return (share + torch.expm1(-sigma[..., None]) / logits.shape[-1]) * torch.exp(sigma[..., None])

    def cost(self, logits, x0, xt, sigma):
        """1/N sum_{y != z} r_y (e^d - 1 - d), d = log s_y - log r_y: logits (B, L, N), sigma (B,) -> nats (B, L).

        Where z = x0 all r_y are rho = (1 - alpha)/(1 - alpha + N alpha); else r_x0 is 1/rho, and the others are 1.
        """
        N, sigma = logits.shape[-1], sigma[:, None].expand_as(x0)
        log_s, same = self.log_score(logits, xt, sigma), xt == x0
        rate = -torch.expm1(-sigma)
        log_rho = torch.log(rate / (rate + N * torch.exp(-sigma)))
        usual = torch.where(same, log_rho, 0.0)  # log r_y of all y but x0
        d = (log_s - usual[..., None]).scatter(-1, xt[..., None], 0.0).scatter(-1, x0[..., None], 0.0)
        d_x0 = log_s.gather(-1, x0[..., None]).squeeze(-1) + log_rho
        return (usual.exp() * excess(d).sum(-1) + torch.where(same, 0.0, excess(d_x0) / log_rho.exp())) / N

    def nelbo(self, model, x0, noise):
        """One-sample estimate of the bound for each sequence: x0 (B, L) -> nats per token (B,)."""
        xt = self.corrupt(x0, noise.token)
        return noise.weight * self.cost(model(xt, noise.t), x0, xt, noise.sigma).mean(1) + self.prior

    def loss(self, model, x0, noise):
        """What to minimise, a scalar, and the bound (B,), nats per token, detached."""
        nelbo = self.nelbo(model, x0, noise)
        return nelbo.mean(), nelbo.detach()


class UniformSEDD(Uniform):
    """Uniform with `score`: what SEDD's networks of uniform noise are trained with."""

    def __init__(self, vocab_size, schedule="loglinear"):
        super().__init__(vocab_size, schedule, score=True)

    @classmethod
    def misfit(cls, config):
        if config.schedule in WHOLE:
            return f"sigma is infinite at the end of schedule={config.schedule}: use loglinear or geometric"
        return super().misfit(config)


class UniformD3PM(Uniform):
    """Uniform D3PM with T steps (arXiv 2107.03006, eq. 1): nelbo = sum over s of E[KL(q(x_{s-1}|x_s, x0) || p)] / L.

    p is the posterior given what the network predicts. s = 1, which ends at x0, is the reconstruction term.
    """

    estimators, reported = {"t_step": "t_step_uniform", "t_step_uniform": "t_step"}, "t_step"

    def __init__(self, vocab_size, T=1000, schedule="linear"):
        super().__init__(vocab_size, schedule)
        self.T = T

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.T, config.schedule)

    @classmethod
    def misfit(cls, config):
        if config.schedule not in WHOLE:
            return (f"objective=d3pm goes all the way from text to noise, and schedule={config.schedule} does not: use "
                    + " or ".join(WHOLE))
        return super().misfit(config)

    def at_step(self, s, v, weight):
        rate = 1 - self.schedule.alpha(s / self.T)
        return UniformNoise(self.tokens(rate, v), (s / self.T).float(), weight.float(),
                            positive(self.schedule.sigma(s / self.T)))

    def noise(self, u, v):
        """s uniform on 1 ... T, weight T. u (B,), v (B, L) -> UniformNoise."""
        return self.at_step(torch.ceil(u * self.T), v, torch.full_like(u, self.T))

    def time(self, rate):
        """The time of one of the T steps, which are all that the network knows: that in whose interval the rate is."""
        s = torch.ceil(self.schedule.inverse(1 - rate) * self.T - 1e-6)
        return (s.clamp(1, self.T) / self.T).float()

    def t_step_uniform(self, u, v, w=None):
        """The T-step bound, s uniform."""
        return self.noise(u, v)

    def t_step(self, u, v, w=None):
        """The T-step bound by s = ceil(u^2 T): small s, where few tokens cost much, come more often."""
        s = torch.ceil(u**2 * self.T).clamp(min=1)
        return self.at_step(s, v, 1 / ((s / self.T).sqrt() - ((s - 1) / self.T).sqrt()))

    def step_kl(self, logits, x0, xt, s):
        """KL(q(x_{s-1} | x_s = xt, x0) || p) at steps s (B,): logits (B, L, N) -> nats (B, L)."""
        steps = s.cpu().double()[:, None, None]  # mps has no float64
        r, r_next = (1 - self.schedule.alpha(x / self.T) for x in (steps, steps - 1))
        q, p = (posterior(x, xt, r, r_next) for x in (F.one_hot(x0, logits.shape[-1]).float(),
                                                      logits.float().softmax(-1)))
        q, p = q / q.sum(-1, keepdim=True), (p / p.sum(-1, keepdim=True)).clamp(min=1e-30)
        possible = q > 0
        return torch.where(possible, q * excess(torch.where(possible, p.log() - q.log(), 0.0)), p).sum(-1)

    def nelbo(self, model, x0, noise):
        xt = self.corrupt(x0, noise.token)
        return noise.weight * self.step_kl(model(xt, noise.t), x0, xt, (noise.t * self.T).round()).mean(1)

    def loss(self, model, x0, noise):
        nelbo = self.nelbo(model, x0, noise)
        return nelbo.mean() / self.T, nelbo.detach()
