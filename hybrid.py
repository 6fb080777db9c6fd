"""Masks and random tokens together: the noise of GIDD (arXiv 2503.04482). The forward process, objective and sampler.

A token stays with probability alpha(t), independently of the others. With probability m it becomes the mask, and with
probability n one of the V tokens at random, itself included. With M for the mask,

    q(xt = y | x0) = alpha [y = x0] + m [y = M] + n/V [y != M],     alpha + m + n = 1,     n = b sqrt(alpha m).

So n, the share of random tokens, is 0 at both ends, and largest where alpha = m. The largest share, b/(2 + b), is
Config.uniform_share. At first tokens become random ones; at the end all are masks. GIDD writes z_t for xt, B for b, and
beta_t pi_t for the two shares: m at the mask, and n/V at a token.

A network of this kind fills masks. It also learns that any token that it sees may be noise. So it can correct what it
has written: in sampling any token may change until the end. As with uniform noise (uniform.py), its softmax x_theta at
a position estimates p(x0 there | all other tokens of xt), and every position has a cost.

Names and conventions are those of diffusion.py and uniform.py. docs/maths.md, section 13, derives the formulas.
"""

import math

import torch
import torch.nn.functional as F

from schedules import masks_and_random
from uniform import Uniform, chain, excess


class Hybrid(Uniform):
    """GIDD in continuous time (arXiv 2503.04482), in terms of the total noise sigma = -log alpha.

    Noise hits a token with the jump rate dsigma/dt. A hit turns it into the mask M or into a token y, with probability

        J_M = m/(m + n/2)     and     J_y = (n/2)/(m + n/2) / V.

    At one position, let z be the token of xt, q(y) = q(xt = y | x0), and p(y) the same with x_theta[y] in place of
    [y = x0]. Then, with excess(d) = e^d - 1 - d,

        nelbo = integral over t of dsigma/dt * E[ sum_i J_z/q(z) (KL(q || p) + excess(log q(z)/p(z))) ] / L.

    This is the score entropy of the scores S_y = p(y)/p(z), written without division by p. At t = 1 all tokens are
    masks, so there is no prior term. There is no reconstruction term either (see Uniform).

    weighting 'simple' multiplies each sample of the bound by 6 phi (1 - phi) in training, where phi = m/(alpha + m) is
    GIDD's time. The loss is then an integral over phi with nearly constant weights: 6 for a mask, 3 for a random token,
    and little for a clean one. These are the paper's dynamic weights, up to a factor. With schedule gidd:P, where P is
    uniform_share, phi is t.
    """

    description = "was trained with masks and random tokens"
    has_mask = True
    samplers = {"ancestral": "hybrid_ancestral"}
    own = ("weighting", "uniform_share")
    log_score = None  # Uniform's is of random tokens alone, and nothing here needs scores

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.schedule, config.uniform_share, config.weighting)

    @classmethod
    def misfit(cls, config):
        if not 1e-3 <= config.uniform_share <= 0.999:
            return (f"uniform_share={config.uniform_share} must be from 0.001 to 0.999: noise=mask has masks alone, "
                    "noise=uniform random tokens alone")
        return super().misfit(config)

    def __init__(self, vocab_size, schedule="linear", uniform_share=0.1, weighting="nelbo"):
        super().__init__(vocab_size, schedule, weighting)
        self.b = 2 * uniform_share / (1 - uniform_share)

    def shares(self, sigma):
        """Return (alpha, m, n) at the total noise sigma, a tensor."""
        alpha = torch.exp(-sigma)
        return alpha, *masks_and_random(alpha, -torch.expm1(-sigma), self.b)

    def tokens(self, rate, v):
        """The noise tokens (B, L) at rates (B,): a random one where v (B, L) <= n, the mask where n < v <= rate, else
        -1."""
        _, _, n = self.shares(-torch.log1p(-rate))
        random = super().tokens(n, v)
        return torch.where((random < 0) & (v <= rate[:, None]), self.mask_id, random)

    def cost(self, logits, x0, xt, sigma):
        """J_z/q(z) (KL(q || p) + excess(log q(z)/p(z))): logits (B, L, V), sigma (B,) -> nats (B, L).

        q(y) is `each` = n/V for a token y != x0, and alpha + n/V for x0. The mask's term of the KL is zero, because
        q(M) = p(M). Over the tokens q and p have the same sum, so KL = sum of q excess(d) with d = log p - log q.
        """
        alpha, m, n = (share[:, None] for share in self.shares(sigma))
        each = (n / self.V).clamp(min=1e-30)
        log_each, q_x0 = each.log()[..., None], alpha + each
        log_x = logits.float().log_softmax(-1)
        d = torch.logaddexp(log_x + alpha.log()[..., None], log_each) - log_each
        d_x0 = d.gather(-1, x0[..., None]).squeeze(-1) + (each / q_x0).log()
        kl = each * excess(d.scatter(-1, x0[..., None], 0.0)).sum(-1) + q_x0 * excess(d_x0)
        masked, same = xt == self.mask_id, xt == x0
        d_z = torch.where(same, d_x0, d.gather(-1, xt.masked_fill(masked, 0)[..., None]).squeeze(-1))
        at_token = each / 2 / torch.where(same, q_x0, each) * (kl + excess(-d_z))
        return torch.where(masked, kl, at_token) / (m + n / 2)

    def simple_weight(self, sigma):
        """The factor of weighting 'simple': 6 phi (1 - phi), with phi = m/(alpha + m)."""
        alpha, m, _ = self.shares(sigma)
        return 6 * alpha * m / (alpha + m) ** 2


def posterior(x, z, now, before):
    """Weights proportional to p(x_tau | x_t = z), if x (N, V) are the probabilities of x0: z (N,) -> (N, V + 1).

    now, before: (alpha, m, n) at t and at tau < t. A token survives from tau to t with probability kappa, else it
    becomes z with probability h(z). By Bayes, as q_t = kappa q_tau + h,

        p(x_tau = y | x_t = z) is proportional to (kappa [y = z] + h(z)) q_tau(y),

    where q_tau(y) is alpha_tau x[y] + n_tau/V for a token y, and m_tau for the mask.
    """
    V = x.shape[-1]
    (alpha, m, n), (alpha_tau, m_tau, n_tau) = now, before
    kappa = alpha / alpha_tau
    q = torch.cat((alpha_tau * x + n_tau / V, x.new_full((len(x), 1), m_tau)), 1)
    h = torch.where(z == V, max(m - kappa * m_tau, 0), max(n - kappa * n_tau, 0) / V).to(x)
    return (h[:, None] * q).scatter_add(-1, z[:, None], kappa * q.gather(-1, z[:, None]))


def hybrid_ancestral(model, xt, objective, draw, grid):
    """The reverse chain: begin with masks, and draw each position anew in each step, a token or the mask, from the
    posterior given the network's prediction.

    Temperature, top_k and top_p change the prediction. p of the States is the network's probability that the new token
    y is the clean one, given z = xt, as in uniform_chain. If z is the mask, it is x[y]. If y is the mask, it is nan.
    """
    def step(logits, z, r, rho):
        now, before = ([share.item() for share in objective.shares(-torch.log1p(-rate))]
                       for rate in torch.tensor((r, rho), dtype=torch.float64))
        x = logits.float().softmax(-1)
        weights = draw.cut(logits.float(), x)
        y = draw.pick(posterior(weights / weights.sum(-1, keepdim=True), z, now, before))
        V, (alpha, _, n) = x.shape[-1], now
        x_y, x_z = (F.pad(x, (0, 1), value=math.nan).gather(-1, token[:, None]).squeeze(-1) for token in (y, z))
        return y, torch.where(z == V, x_y, (n * x_y + V * alpha * x_z * (y == z)) / (n + V * alpha * x_z))

    return chain(model, xt, xt, objective, [1.0, *grid[1:]], step)
