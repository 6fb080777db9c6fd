"""Noise schedules: alpha(t), the probability that no noise has hit a token until t. docs/maths.md, section 2.

Names in a Config are like linear, loglinear:0.001 or geometric:0.0001:20. A new schedule is a function here that
returns a Schedule, with defaults for its numbers, and a line in SCHEDULES.
"""

import math
from typing import Callable, NamedTuple

import torch


class Schedule(NamedTuple):
    """A noise schedule: alpha decreases from t = 0 to t = 1. Its functions map tensors to tensors."""

    alpha: Callable    # t -> P(no noise has hit a token until t); with masks, that it is visible
    dalpha: Callable   # t -> d alpha / dt, never positive
    inverse: Callable  # a -> the t at which alpha(t) = a, or the nearest t there is; rounding may take a out of [0, 1]
    sigma: Callable    # t -> sigma(t) = -log alpha(t), the total noise

    def weight(self, t):
        """-alpha'(t)/(1 - alpha(t)), the factor of the CE at a mask in the bound. It is also the probability per unit
        of t that a mask is revealed in reverse time."""
        return -self.dalpha(t) / (1 - self.alpha(t))

    def dsigma(self, t):
        """d sigma/dt = -alpha'(t)/alpha(t), the jump rate of a token: noise hits it in dt with probability dsigma.

        Where alpha is 0 the result is large, but finite."""
        return -self.dalpha(t) / self.alpha(t).clamp(min=1e-30)

    @property
    def full_range(self):
        """True if alpha goes from 1 to 0, up to rounding: then T steps are possible, and sigma(1) is infinite."""
        first, last = self.alpha(torch.tensor((0.0, 1.0), dtype=torch.float64, device="cpu")).tolist()
        return max(1 - first, last) < 1e-15

    def times(self, *rates):
        """The times at which the noise rate 1 - alpha(t) has these values: float64 tensors."""
        return [self.inverse(torch.tensor(1 - rate, dtype=torch.float64)) for rate in rates]


def linear():
    """alpha(t) = 1 - t."""
    return Schedule(alpha=lambda t: 1 - t, dalpha=lambda t: -torch.ones_like(t),
                    inverse=lambda a: (1 - a).clamp(0, 1), sigma=lambda t: -torch.log1p(-t))


def cosine():
    """alpha(t) = 1 - cos(pi/2 (1 - t)) (MD4, arXiv 2406.04329)."""
    alpha = lambda t: 1 - torch.cos(math.pi / 2 * (1 - t))
    return Schedule(
        alpha=alpha,
        dalpha=lambda t: -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t)),
        inverse=lambda a: 1 - 2 / math.pi * torch.acos(1 - a.clamp(0, 1)),
        sigma=lambda t: -torch.log(alpha(t)),
    )


def loglinear(eps=1e-3):
    """alpha(t) = 1 - (1 - eps) t (SEDD, arXiv 2310.16834). sigma = -log(1 - (1 - eps) t), hence the name.

    alpha is a straight line here, too, but ends at eps, not at 0: SEDD's networks see sigma, which must be finite.
    """
    if not 1e-6 <= eps <= 0.5:  # float32 does not reach further
        raise ValueError("eps must be from 1e-6 to 0.5")
    return Schedule(alpha=lambda t: 1 - (1 - eps) * t, dalpha=lambda t: (eps - 1) * torch.ones_like(t),
                    inverse=lambda a: ((1 - a) / (1 - eps)).clamp(0, 1), sigma=lambda t: -torch.log1p((eps - 1) * t))


def geometric(sigma_min=1e-4, sigma_max=20.0):
    """sigma(t) = sigma_min^(1 - t) sigma_max^t, SEDD's schedule for uniform noise. It is not quite clean at t = 0."""
    if not 1e-9 <= sigma_min < sigma_max <= 30:  # float32 does not reach further
        raise ValueError("sigma must grow between 1e-9 and 30")
    ratio = math.log(sigma_max / sigma_min)
    sigma = lambda t: sigma_min * torch.exp(ratio * t)
    return Schedule(alpha=lambda t: torch.exp(-sigma(t)), dalpha=lambda t: -torch.exp(-sigma(t)) * sigma(t) * ratio,
                    inverse=lambda a: (torch.log(-torch.log(a.clamp(0, 1)) / sigma_min) / ratio).clamp(0, 1),
                    sigma=sigma)


def masks_and_random(alpha, rate, b):
    """Return the shares (m, n) of masks and of random tokens in GIDD's noise (hybrid.py): n = b sqrt(alpha m).

    rate: 1 - alpha. Both are tensors. b: as in gidd(). sqrt(m) solves m + b sqrt(alpha m) = rate.
    """
    factor = b * alpha.sqrt()
    root = 2 * rate / ((factor**2 + 4 * rate).sqrt() + factor)
    return root**2, factor * root


def gidd(uniform_share=0.1):
    """The time of GIDD (arXiv 2503.04482), for noise of masks and random tokens: t = m/(alpha + m) (hybrid.py).

    With b = 2 uniform_share/(1 - uniform_share) and G = 1 + b sqrt(t (1 - t)), alpha is (1 - t)/G and m is t/G.
    """
    if not 1e-3 <= uniform_share <= 0.999:
        raise ValueError("uniform_share must be from 0.001 to 0.999")
    b = 2 * uniform_share / (1 - uniform_share)
    G = lambda t: 1 + b * (t * (1 - t)).sqrt()

    def inverse(a):
        a = a.clamp(0, 1)
        m, _ = masks_and_random(a, 1 - a, b)
        return m / (a + m)

    return Schedule(
        alpha=lambda t: (1 - t) / G(t),
        dalpha=lambda t: -(1 + b * (0.5 - t) * ((1 - t) / t).sqrt() / G(t)) / G(t),
        inverse=inverse,
        sigma=lambda t: G(t).log() - torch.log1p(-t),
    )


SCHEDULES = {"linear": linear, "cosine": cosine, "loglinear": loglinear, "geometric": geometric, "gidd": gidd}


def make_schedule(name):
    """'linear' or 'geometric:0.0001:20' -> Schedule. Raises ValueError if the name is not a schedule."""
    kind, *numbers = name.split(":")
    if kind not in SCHEDULES:
        raise ValueError(f"{name!r} is unknown: choose one of {', '.join(SCHEDULES)}, or give numbers, as in "
                         "loglinear:0.001 or geometric:0.0001:20")
    try:
        return SCHEDULES[kind](*map(float, numbers))
    except TypeError:  # Python's message would name a function
        raise ValueError(f"{name!r} is not valid: it has too many numbers")
    except ValueError as error:
        raise ValueError(f"{name!r} is not valid: {error}")


FULL_RANGE = [name for name in SCHEDULES if make_schedule(name).full_range]


def misfit_of_steps(schedule):
    """A message if a chain of T steps cannot run on the schedule with this name, or None."""
    if not make_schedule(schedule).full_range:
        return (f"objective=d3pm needs a schedule from alpha = 1 to 0, which schedule={schedule} is not: use "
                f"{' or '.join(FULL_RANGE)}")
