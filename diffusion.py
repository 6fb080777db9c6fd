"""Absorbing diffusion of text: the forward process and the training objectives. docs/maths.md derives every formula.

A token is visible at time t with probability alpha(t), independently of the others. Otherwise it is the mask. A mask
stays a mask: it is an absorbing state. Time runs from t = 0 (clean text) to t = 1 (all masks). Models with T steps use
the times t = s/T, s = 1 ... T. The step s = 1 ends at clean text; its term of the bound is the papers' reconstruction
term.

    here        meaning                               D3PM            MDLM          MD4         SEDD          ReMDM
                                                      2107.03006      2406.07524    2406.04329  2310.16834    2503.00307
    x0, xt      clean and noisy tokens, (B, L) long   x_0, x_t        x, z_t        x_0, x_t    x_0, x_t      x, z_t
    t, s        time in (0, 1], step in 1 ... T       t/T, t          t, -          t, -        t, -          t, -
    alpha(t)    P(a token is visible at t)            prod(1 - beta)  alpha_t       alpha_t     exp(-sigma)   alpha_t
    mask_id     the mask, always the last id: V       [MASK]          m             m           MASK          m
    model       logits (B, L, V) of x0 given xt       p~(x~_0|x_t)    x_theta       mu_theta    s_theta       x_theta
    nelbo       upper bound on -log p(x0), in nats    L_vb / L        L_NELBO / L   loss / L    L_DWDSE / L   -
                per token: divided by L

The model never predicts the mask, and it keeps what it sees (carry-over). Then the KL divergence between the true and
the learned reverse step is zero at visible tokens. At masks it is a multiple of the cross-entropy, CE = -log of the
network's probability of the clean token. So every bound here is one sum,

    nelbo = E[ weight * sum over masks of CE ] / L,

and a method is a way to draw (mask, t, weight). The posterior over all V + 1 states is never built; the tests build it,
and compare. Score entropy (SEDD) is such a sum, too, with a penalty beside CE. Noise of random tokens is in uniform.py,
and of both in hybrid.py. alpha is in schedules.py.

All randomness comes in as numbers in (0, 1]: u (B,) says how much is masked, v (B, L) which tokens are (randomness.py).
So an objective is a deterministic function of (x0, u, v). One estimator needs a third number for each text, pick (B,).

The first c tokens of a text may be given: its prefix. They have v = 2, which is above every rate, so they are never
masked. The other n = L - c tokens are free. The bound is then on -log p(free tokens | prefix)/n, in nats per free
token. Here p is the model that noises the free tokens alone. It is not the conditional probability under the model of
whole texts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from schedules import make_schedule, misfit_of_steps


def to_device(x, device):
    """Copy to the device. Only a copy from pinned memory can go on safely while the CPU does other work."""
    return x.to(device, non_blocking=x.is_pinned())


class Noise(NamedTuple):
    """The masks, the times, and the weights of the masks in the bound.

    t and weight have one number for each sequence (B,), or one for each token (B, L). Block diffusion needs the latter,
    because each block of a text has its own time.
    """

    mask: torch.Tensor    # (B, L) bool, True where xt is the mask
    t: torch.Tensor       # (B,) or (B, L) float32, the time that the model is told
    weight: torch.Tensor  # (B,) or (B, L) float32, the factor of each mask's CE in the bound. The bound is per free
                          # token, but `nelbo` divides by L. So with n free tokens the weight contains the factor L/n
    at: torch.Tensor = None  # (N,) long, the indices of the N masks among all B L tokens, or None: not yet searched.
                             # Code that replaces `mask` must replace `at`, too

    def located(self):
        """Return the noise with `at`. A search on a GPU waits for all work before it, so `split` does it on the CPU."""
        return self if self.at is not None else self._replace(at=self.mask.flatten().nonzero().squeeze(1))

    def to(self, device):
        return type(self)(*(x if x is None else to_device(x, device) for x in self))

    def split(self, size):
        """Cut the batch into a list of Noise of `size` sequences each, all located."""
        whole = [x for x in self._replace(at=None) if x is not None]
        return [type(self)(*part).located() for part in zip(*(x.split(size) for x in whole))]


def n_free(v):
    """Count the tokens of each sequence that are not given: v (B, L) -> (B,) float64."""
    return (v <= 1).sum(1).double()


def cross_entropy(logits, x0):
    """-log softmax(logits)[x0] in float32, nats, for logits (..., V) and x0 (...)."""
    return F.cross_entropy(logits.float().flatten(0, -2), x0.flatten(), reduction="none").view(x0.shape)


class Objective:
    """An objective: how text is made noisy, what training minimises, and the bound that is reported.

    A new one is a class that inherits from this one, or from Absorbing for masks, and one line in configs.OBJECTIVES.
    It overrides the attributes and methods below whose values here are wrong for it. It always defines these methods:

    from_config(config, vocab_size): the objective of a Config
    noise(u, v): the noise to train on, a NamedTuple with `t` and the methods `to` and `split` of Noise
    cost(logits, x0, ...): the cost of each position. If has_mask, nothing else may read the network's output in
        training: parallel.compile_parts moves the output layer into cost(), and the network then returns features
    nelbo(model, x0, noise): one estimate of the bound (B,), nats per token, from the noise of an estimator
    a method (u, v, pick) -> noise for each of its estimators, with random numbers as at the top of this file
    """

    description = "predicts masked tokens"  # what a checkpoint of this objective does; completes "it ..." in messages
    has_mask = True     # the noise makes masks, so the network has one token more than the vocabulary
    random_tokens = False  # the noise puts random tokens in place of others; nothing shows where (uniform.py)
    causal = False      # the network sees only tokens on the left
    any_order = True    # it predicts masks in whole texts: any of them, from any visible tokens
    both_sides = True   # a token sees the text on its right, too, so that blanks in the middle of a text can be filled
    everywhere = False  # the loss asks for logits at all positions, visible ones included
    normalised = True   # with masks: the prediction of a token sums to 1
    T = None            # the number of steps, or None in continuous time
    block_size = 0      # tokens of a block, if blocks are predicted from left to right (block_diffusion.py)
    own = ()         # settings of Config that not all objectives have: the others refuse all values but the default
    samplers = {}    # {what --sampler calls a sampler: its name in sampling.SAMPLERS}. The first one is the default
    estimators = {}  # {estimator of the bound: another one with the same mean, for --check}, names of methods
    reported = None  # the default estimator

    @classmethod
    def misfit(cls, config):
        """A message that says which settings of a Config do not go with this objective, or None."""

    def __init__(self, mask_id, schedule="linear"):
        self.mask_id = mask_id
        self.schedule = make_schedule(schedule)

    def time(self, rate):
        """The time that the network is told when a share `rate` of the tokens is expected to be noise, masks or random
        tokens: (B,) -> (B,) float32. Samplers call it, too."""
        return self.schedule.inverse(1 - rate).float()

    def n_times(self, L):
        """The number of numbers u that the noise of a text of L tokens needs; if more than one, u is (B, n_times)."""
        return 1

    def loss(self, model, x0, noise):
        """The loss to minimise, a scalar, and the bound of each sequence (B,), nats per token, detached."""
        nelbo = self.nelbo(model, x0, noise)
        return nelbo.mean(), nelbo.detach()


class Absorbing(Objective):
    """The common part of the objectives of masked text: the cross-entropy at masks, and two estimators of the bound.

    pick (B,), of the estimators: uniform numbers, by which `continuous` chooses the time that the network is told.
    """

    samplers = {name: name for name in ("ancestral", "first_hitting", "topk", "threshold", "entropy_bound", "remdm",
                                        "analytic", "euler")}
    estimators, reported = {"exact_k": "continuous", "continuous": "exact_k"}, "exact_k"

    def corrupt(self, x0, mask):
        """Return the input of the network for x0 (B, L)."""
        return torch.where(mask, self.mask_id, x0)

    def predict(self, model, x0, noise):
        """The logits (N, V) of the N masked positions of x0 (B, L)."""
        return model(self.corrupt(x0, noise.mask), noise.t, where=noise.located().at)

    def masked_ce(self, model, x0, noise):
        """The cross-entropy at masked positions, 0 at visible ones: x0 (B, L) -> nats (B, L)."""
        noise = noise.located()
        t = noise.t if noise.t.dim() == 2 else noise.t[:, None].expand(x0.shape)
        ce = self.cost(self.predict(model, x0, noise), x0.flatten()[noise.at], t.flatten()[noise.at])
        return ce.new_zeros(x0.numel()).scatter(0, noise.at, ce).view(x0.shape)

    def log_prediction(self, logits, t):
        """The logarithms of the prediction of x0, (N, V) float32, from logits (N, V) at times t (N,)."""
        return logits.float().log_softmax(-1)

    def cost(self, logits, x0, t):
        """Costs of masked positions in the bound: logits (..., V), x0 (...), their times t -> nats (...)."""
        return cross_entropy(logits, x0)

    def weighted(self, ce, weight):
        """The weighted sum of each sequence, divided by L: ce (B, L), weight (B,) or (B, L) -> nats per token (B,)."""
        if weight.dim() == 2:
            return (weight * ce).sum(1) / ce.shape[1]
        return weight * (ce.sum(1) / ce.shape[1])

    def nelbo(self, model, x0, noise):
        """One-sample estimate of the bound for each sequence: x0 (B, L) -> nats per token (B,)."""
        return self.weighted(self.masked_ce(model, x0, noise), noise.weight)

    def exact_k(self, u, v, pick=None):
        """The continuous-time bound by exactly k = ceil(u n) masks, with weight L/k: u (B,), v (B, L) -> Noise.

        The bound for the n free tokens can be written with a rate r or with a number k of masks (ARDM, arXiv
        2110.02037; RADD, arXiv 2406.03736):

            integral over r of (1/r) E[sum CE, each token masked with probability r]
                = mean over k, uniform on 1 ... n, of (n/k) E[sum CE, exactly k masks].

        Per free token this is (1/n) (n/k) sum CE = (1/L) (L/k) sum CE, and `nelbo` divides by L.

        The masked tokens are those with the k smallest v. The k-th smallest v is the rate r, and the network is told
        the time of r. This r has the distribution Beta(k, n - k + 1), which is that of a rate given k masks under the
        weight 1/r. So the mean is the bound for networks that see the time, too.
        """
        L, n = v.shape[1], n_free(v)
        k = torch.ceil(u * n).long()
        rate = v.sort(dim=1).values.gather(1, k[:, None] - 1)
        return Noise(v <= rate, self.time(rate.squeeze(1)), L / k.float())

    def continuous(self, u, v, pick):
        """The continuous-time bound by independent masks at a uniform rate, u, without the large weights of small u.

        u (B,), v (B, L), pick (B,) -> Noise. Given k masks, u has the distribution Beta(k + 1, n - k + 1). So the mean
        of the weight 1/u is (n + 1)/k, which takes its place: the estimate has the same mean, and a finite variance
        (Rao-Blackwell). If k = 0, there is no CE: the weight is 0.

        A network that sees the time must be told the time of a rate from Beta(k, n - k + 1), as in exact_k. Leave out
        one of the n + 1 numbers v and u at random (pick). The k-th smallest of the others is such a rate
        (docs/maths.md, section 7): u, if the one left out is below u, which has probability k/(n + 1), else the largest
        v <= u.
        """
        L, n = v.shape[1], n_free(v)
        mask = v <= u[:, None]
        k = mask.sum(1)
        rate = torch.where(pick <= k / (n + 1), u, (v * mask).amax(1))
        return Noise(mask, self.time(rate), torch.where(k > 0, (n + 1) / k * L / n, 0).float())


class D3PM(Absorbing):
    """Absorbing D3PM with T steps (arXiv 2107.03006, eq. 1 and 5; closed form: MD4, arXiv 2406.04329, eq. 19).

    Let a_s = alpha(s/T). The true and the learned reverse step from s to s - 1 reveal a mask with the same probability,
    (a_{s-1} - a_s)/(1 - a_s). They differ in the token that they reveal. Hence

        KL(q(x_{s-1} | x_s, x0) || p(x_{s-1} | x_s)) = (a_{s-1} - a_s)/(1 - a_s) * CE   at masks, else 0,

    which is CE/s for the linear schedule. Drawing one s of T uniformly multiplies the weight by T. There is no prior
    term, because alpha(1) = 0. With alpha(1) > 0 it would be infinite, so the schedule must have its full range.

    lambda_ce adds the auxiliary loss of eq. 5: lambda_ce * CE at all positions, visible ones included, beside one term
    of the sum over s (not the whole sum), as in the published code. With nanoDD's settings it weighs 25 times as much
    as the bound, per masked token on average (docs/maths.md, section 8). It is never reported.
    """

    estimators = {"t_step": "t_step_uniform", "t_step_uniform": "t_step"} | Absorbing.estimators
    reported = "t_step"
    own = ("lambda_ce",)

    def __init__(self, mask_id, T=1000, schedule="linear", lambda_ce=0.0):
        super().__init__(mask_id, schedule)
        self.T, self.lambda_ce, self.everywhere = T, lambda_ce, bool(lambda_ce)

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.T, config.schedule, config.lambda_ce)

    @classmethod
    def misfit(cls, config):
        if wrong := misfit_of_steps(config.schedule):
            return wrong
        if config.time_sampling == "exact_k":
            return "time_sampling=exact_k is for the continuous-time bound: use it with objective=mdlm"
        if config.prefix != "none" and config.lambda_ce:
            return "lambda_ce is a loss of all tokens, and those of a prefix have none: use lambda_ce=0 with a prefix"
        return super().misfit(config)

    def noise(self, u, v):
        """Draw s uniformly from 1 ... T, and masks independently, by uniform numbers u (B,) and v (B, L) -> Noise."""
        s = torch.ceil(u * self.T)
        a, a_before = self.schedule.alpha(s / self.T), self.schedule.alpha((s - 1) / self.T)
        weight = self.T * (a_before - a) / (1 - a) * v.shape[1] / n_free(v)
        return Noise(v <= 1 - a[:, None], (s / self.T).float(), weight.float())

    def time(self, rate):
        """s/T, the time of the step s in whose interval the noise rate lies: s - 1 < T alpha^-1(1 - rate) <= s."""
        s = torch.ceil(self.schedule.inverse(1 - rate) * self.T - 1e-6)  # step s stays s if it was rounded up a little
        return (s.clamp(1, self.T) / self.T).float()

    def t_step_uniform(self, u, v, pick=None):
        """The T-step bound as the papers write it: s uniform, tokens masked independently, weights up to T."""
        return self.noise(u, v)

    def t_step(self, u, v, pick=None):
        """The T-step bound from a better draw: one token i, chosen uniformly, is always masked. No weight is above L.

        Draw s with P(s) = a_{s-1} - a_s. Use E[masked_i CE_i] = (1 - a_s) E[CE_i | i masked]:

            sum_s (a_{s-1} - a_s)/(1 - a_s) sum_i E[masked_i CE_i] = sum_s P(s) sum_i E[CE_i | i masked]
                                                                   = L * E_s E_i E[CE_i | i masked].

        Given the masks, i is each of the k masked tokens with probability 1/k. So the mean of L CE_i over i is L/k
        times the sum of CE, and small s have no large weights. The number v_f of the first free token f, uniform on
        (0, 1], chooses i = f + ceil(n v_f) - 1. Then v_f takes the value of v_i, and v_i becomes 0: i is masked.
        """
        (B, L), n = v.shape, n_free(v)
        rows, first = torch.arange(B), (L - n).long()
        s = torch.ceil(self.T * self.schedule.inverse(1 - u)).clamp(1, self.T)
        sure = first + torch.ceil(v[rows, first] * n).long() - 1
        v = v.clone()
        v[rows, first] = v[rows, sure]
        v[rows, sure] = 0
        mask = v <= 1 - self.schedule.alpha(s / self.T)[:, None]
        return Noise(mask, (s / self.T).float(), L / mask.sum(1).float())

    def loss(self, model, x0, noise):
        """The loss to minimise and the bound, as Objective.loss returns them. As in the paper, the loss contains one
        random term of the sum over s. It is nelbo/T, because the estimate of the whole sum is T times one term. The
        factor 1/T matters: lambda_ce and the clipping of gradients do not scale with it."""
        if not self.lambda_ce:
            nelbo = self.nelbo(model, x0, noise)
            return nelbo.mean() / self.T, nelbo.detach()
        ce = self.cost(model(self.corrupt(x0, noise.mask), noise.t), x0, noise.t)
        nelbo = self.weighted(ce * noise.mask, noise.weight)
        return nelbo.mean() / self.T + self.lambda_ce * ce.mean(), nelbo.detach()


class MDLM(Absorbing):
    """Absorbing diffusion in continuous time: MDLM (arXiv 2406.07524, eq. 10), MD4 (arXiv 2406.04329, eq. 5).

        nelbo = integral over t in (0, 1] of -alpha'(t)/(1 - alpha(t)) * E[sum over masked positions of CE] dt / L

    This integral covers only the rates from 1 - alpha(0) to 1 - alpha(1). If these are not all rates, it is a little
    less than the bound. `noise`, for training, estimates this integral. `exact_k` and `continuous` draw all rates, and
    tell the network t = 1 at rates above 1 - alpha(1), and t = 0 at rates below 1 - alpha(0).

    For a network that does not see the time, the bound is the same for every schedule from alpha = 1 to alpha = 0. The
    variance of its estimate is not the same. time_sampling says what is drawn for training:

        uniform      t = u, independent masks; the u of a batch are independent
        stratified   the same, but the u of a batch are spread evenly over (0, 1] (MDLM's low-discrepancy sampler)
        exact_k      exactly k masks (the method exact_k), with u spread evenly, too

    train.batches draws u, so `noise` does the same for the first two. If alpha(0) = 1, their estimates of the bound
    have no finite variance: use them for training and to match papers, never for error bars.

    weighting 'simple' trains on 2 sum CE / L, the same weight for every masked token. For the linear schedule the bound
    is the mean of (1/t) sum CE / L, so 'simple' multiplies each draw by 2t, which is 1 on average. This is not the
    bound, but it varies less, and short runs end lower, `demo` by .09 bits (LOG.md). The reported bound keeps its
    weights.
    """

    own = ("weighting",)

    def __init__(self, mask_id, schedule="linear", time_sampling="stratified", weighting="nelbo"):
        super().__init__(mask_id, schedule)
        self.time_sampling, self.weighting = time_sampling, weighting

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.schedule, config.time_sampling, config.weighting)

    def noise(self, u, v):
        """Draw what to train on, in the way of time_sampling. u (B,), v (B, L) -> Noise."""
        if self.time_sampling == "exact_k":
            return self.exact_k(u, v)
        masked = 1 - self.schedule.alpha(u)
        weight = self.schedule.weight(u) * v.shape[1] / n_free(v)
        return Noise(v <= masked[:, None], u.float(), weight.float())

    def loss(self, model, x0, noise):
        ce = self.masked_ce(model, x0, noise)
        nelbo = self.weighted(ce, noise.weight)
        loss = nelbo if self.weighting == "nelbo" else 2 * (ce.sum(1) / ce.shape[1])
        return loss.mean(), nelbo.detach()


class SEDD(MDLM):
    """Score entropy (arXiv 2310.16834) with masks: the network's ratios of probabilities need not be normalised.

    At each mask the network learns the scores S_y = q_t(xt with y here)/q_t(xt) of the tokens y. The true score is
    odds * p(x0 = y | visible tokens), where odds = alpha/(1 - alpha) = 1/(e^sigma - 1). The score entropy of a mask is

        dsigma/dt * [sum_y S_y - odds log S_x0 + odds (log odds - 1)].

    Write S_y = odds * f_y: then f is a prediction of x0 that is not normalised, with the sum Z. As dsigma/dt * odds is
    -alpha'/(1 - alpha), the weight of the bound, the score entropy is this weight times

        Z - 1 - log f_x0  =  CE + (Z - 1 - log Z),

    with the CE of the normalised prediction f/Z: MDLM's bound and a penalty, which is zero if Z = 1 (RADD, arXiv
    2406.03736). So the network is a masked denoiser like any other, and nothing is lost by normalising.

    scaled: as SEDD's `scale_by_sigma`. The logits are log(V f_y) instead of log S_y, so that an output of zeros is
    normalised.
    """

    normalised, own = False, ("scale_by_sigma",)

    def __init__(self, mask_id, schedule="loglinear", time_sampling="stratified", scaled=True):
        super().__init__(mask_id, schedule, time_sampling)
        self.scaled = scaled

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config.schedule, config.time_sampling, config.scale_by_sigma)

    @classmethod
    def misfit(cls, config):
        if make_schedule(config.schedule).full_range and not config.scale_by_sigma:
            return (f"scale_by_sigma=False needs a finite sigma, and schedule={config.schedule} ends at an infinite "
                    "one: use loglinear or geometric")
        return super().misfit(config)

    def log_odds(self, t):
        """log(alpha/(1 - alpha)) at times t."""
        return -torch.log(torch.expm1(self.schedule.sigma(t)))

    def log_prediction(self, logits, t):
        """log f, not normalised, (N, V) float32, for logits (N, V) at times t (N,)."""
        if self.scaled:
            return logits.float() - math.log(logits.shape[-1])
        return logits.float() - self.log_odds(t)[:, None]

    def cost(self, logits, x0, t):
        log_f = self.log_prediction(logits, t)
        return log_f.exp().sum(-1) - 1 - log_f.gather(-1, x0[:, None]).squeeze(-1)


class AutoRegressive(Absorbing):
    """No diffusion: every token is predicted from those on its left, by a causal network. The baseline of the field.

    nelbo is not a bound but the negative log-likelihood itself, by the chain rule. There is no noise in it. In the
    terms of masks: all positions are predicted with weight 1, and position i sees x0[:i]. The input is x0 shifted by
    one; it begins with the mask, which stands for the start of the text.
    """

    description = "is autoregressive"
    causal, any_order, both_sides, everywhere = True, False, False, True
    samplers = {"left_to_right": "left_to_right"}
    estimators, reported = {"chain_rule": "l2r"}, "chain_rule"  # l2r: no method but an order (likelihood.nll_along)

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size)

    @classmethod
    def misfit(cls, config):
        if config.conditioning != "none":
            return "objective=ar has no time: use conditioning=none"
        return super().misfit(config)

    def noise(self, u, v):
        """Noise whose mask is True at all free tokens, those with v <= 1. v (B, L) -> Noise; u (B,) is not used."""
        return Noise(v <= 1, torch.ones(len(u)), (v.shape[1] / n_free(v)).float())

    def chain_rule(self, u, v, pick=None):
        """All tokens in one call of the network, which must be causal."""
        return self.noise(u, v)

    def corrupt(self, x0, mask):
        return F.pad(x0[:, :-1], (1, 0), value=self.mask_id)
