"""Audit a claimed bound on the likelihood of a masked diffusion model, on worlds so small that the truth is known.

    python studies/audit.py                              # a correct bound, and known mistakes that look like bounds
    python studies/audit.py mine.py:my_bound             # your own function
    python studies/audit.py --bytes book.txt --tokens 31415 --bytes_per_token 4.3     # is a division by bytes right?

A claim is a function claim(model, x0, rng) -> nats (n,), one draw of the estimate of each text x0 (n, L), or one number
for the mean of all. model(xt, t) -> log p (n, L, V): the logarithms of the probabilities of the tokens, for xt (n, L)
with masks (model.mask_id) at times t (n,). rng is a torch.Generator. The audit calls it on all texts of some worlds
with several denoisers, very often. It compares the means with numbers that come from summing over all texts and orders:

    Kraft     The sum over all texts x of exp(-claim(x)) is at most 1. Reason: if claim(x) >= -log p(x), each term is
              at most p(x), and the p(x) sum to 1. This holds for every model.
    model     claim(x) >= -log p(x) for the model's own p. It reveals the tokens one by one in random order, or, with
              --steps T, in T steps, each of them several at a time.
    entropy   The mean claim over the world's texts is at least their entropy, with any model.
    times     If a claim draws its times at random, they come from all over (0, 1]. (With --steps this is not asked.)
    finite    The claim is a number, or infinite, for each text that is possible.

A correct bound can be loose. So the excess over the entropy with the perfect denoiser is printed, too. docs/audit.md
explains the mistakes.
"""

import importlib.util
import inspect
import itertools
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, number, run, table

import torch

from data.prepare import read_bytes

# ---- worlds ----------------------------------------------------------------------------------------------------------


class World:
    """A distribution over the V^L texts: all texts (n, L), their probabilities p (n,) float64, and its entropy."""

    def __init__(self, name, V, L, p):
        self.name, self.V, self.L = name, V, L
        self.texts = torch.tensor(list(itertools.product(range(V), repeat=L)))
        self.p = torch.as_tensor(p, dtype=torch.float64)
        self.entropy = -torch.xlogy(self.p, self.p).sum().item()


def worlds():
    """Three kinds: tied tokens, which parallel decoding gets wrong; a parity; and random joint distributions."""
    g = torch.Generator().manual_seed(0)
    tied = [0.5, 0, 0, 0.5]
    parity = [0.25 * (sum(bits) % 2 == 0) for bits in itertools.product(range(2), repeat=3)]
    return [World("two tied bits", 2, 2, tied), World("parity of three bits", 2, 3, parity),
            World("random, 3 x 2", 3, 2, (2 * torch.randn(9, generator=g, dtype=torch.float64)).softmax(0)),
            World("random, 2 x 3", 2, 3, (2 * torch.randn(8, generator=g, dtype=torch.float64)).softmax(0))]


class Denoiser:
    """The model that a claim gets: a table of log p for each of the (V + 1)^L states. The last id is the mask.

    joint(xt, t): log p of all texts given the visible tokens (n, V^L).
    leaky(xt, t): logits (n, L, V + 1) that also give the mask a probability, `leak`, as a network without a rule does.
    asked: the times of all calls.
    """

    leak = 0.2

    def __init__(self, world, log_joint):
        """log_joint (states, texts): log p(text | visible tokens), normalised."""
        self.V, self.L, self.mask_id, self.texts, self.table = world.V, world.L, world.V, world.texts, log_joint
        one_hot = torch.nn.functional.one_hot(world.texts, world.V).double()
        self.marginals = torch.einsum("sn,nlv->slv", log_joint.exp(), one_hot).log()
        self.asked = []

    def state(self, xt, t):
        self.asked.append(torch.as_tensor(t).detach().flatten())
        return (xt * (self.V + 1) ** torch.arange(self.L - 1, -1, -1)).sum(1)

    def __call__(self, xt, t):
        return self.marginals[self.state(xt, t)]

    def joint(self, xt, t):
        return self.table[self.state(xt, t)]

    def leaky(self, xt, t):
        found = self(xt, t) + math.log(1 - self.leak)
        return torch.cat((found, torch.full_like(found[..., :1], math.log(self.leak))), -1)

    def log_p(self, steps=None):
        """log p(x) of all texts: the mean over all orders of revealing one token after the other; or of a chain.

        steps: the chain of so many steps, in which step s = steps ... 1 reveals each mask with probability 1/s.
        """
        if steps:
            return self.of_chain(steps)
        total = []
        for order in itertools.permutations(range(self.L)):
            xt, l = torch.full_like(self.texts, self.mask_id), torch.zeros(len(self.texts), dtype=torch.float64)
            for i in order:
                l += self.marginals[self.state(xt, torch.ones(1))][torch.arange(len(xt)), i, self.texts[:, i]]
                xt = xt.clone()
                xt[:, i] = self.texts[:, i]
            total.append(l)
        self.asked.clear()
        return torch.stack(total).logsumexp(0) - math.log(len(total))

    def of_chain(self, steps):
        """log p(x) of a chain of steps, by the probability of every state after each of them."""
        states = torch.tensor(list(itertools.product(range(self.V + 1), repeat=self.L)))
        visible = torch.nn.functional.one_hot(states, self.V + 1).double()
        p = torch.zeros(len(states), dtype=torch.float64)
        p[-1] = 1  # all masked
        for s in range(steps, 0, -1):
            drawn = torch.cat((self.marginals.exp() / s, torch.full((*states.shape, 1), 1 - 1 / s)), 2)
            each = torch.where((states == self.V)[..., None], drawn, visible)  # (states, L, V + 1)
            p = p @ torch.stack([each[:, i, states[:, i]] for i in range(self.L)]).prod(0)
        return p[(states != self.V).all(1)].log()


def denoisers(world):
    """{name: Denoiser}: the perfect one, one that knows nothing, one at random, and one that fails near the end."""
    states = torch.tensor(list(itertools.product(range(world.V + 1), repeat=world.L)))
    agrees = ((states[:, None] == world.texts) | (states[:, None] == world.V)).all(-1)  # (states, texts)
    perfect = agrees * world.p
    perfect = torch.where(perfect.sum(1, keepdim=True) > 0, perfect, agrees.double())
    few = ((states == world.V).sum(1) == 1)[:, None]
    g = torch.Generator().manual_seed(1)
    wrong = torch.where(few, agrees * (perfect / perfect.sum(1, keepdim=True) < 0.5) + 1e-4 * agrees, perfect)
    found = {"perfect": perfect, "knows nothing": agrees.double(), "fails at the last mask": wrong,
             "random": agrees * (2 * torch.randn(agrees.shape, generator=g, dtype=torch.float64)).exp()}
    return {name: Denoiser(world, (weights / weights.sum(1, keepdim=True)).log()) for name, weights in found.items()}


# ---- the audit -------------------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    world: str
    denoiser: str
    claimed: float       # mean over the world's texts, in nats
    error: float
    entropy: float
    kraft: float         # nan if the claim gives only one number for all texts
    kraft_error: float
    times: tuple         # the lowest and the highest time at which the model was asked
    broken: tuple        # names of the rules that it breaks


def measure(claim, model, x0, draws, rng, p=None):
    """Mean and standard error of the claim on each of the texts x0 (n, L), or of its one number: tensors (n,) or ().

    p: draw the texts with these probabilities, for a claim of one number. Raises UserError if it returns neither.
    """
    parts, values = 50, []
    for _ in range(parts):
        texts = x0.repeat(draws // parts, 1)
        if p is not None:
            texts = x0[torch.multinomial(p, len(texts), True, generator=rng)]
        found = claim(model, texts, rng)
        if not torch.is_tensor(found) or found.shape not in ((), (len(texts),)):
            raise UserError(f"the claim must return a tensor of one number for each of {len(texts)} texts, or of one "
                            f"number, not {getattr(found, 'shape', type(found).__name__)}")
        found = found.double()
        values.append(found.view(draws // parts, -1).mean(0) if found.dim() else found)
    values = torch.stack(values)
    return values.mean(0), values.std(0) / parts**0.5


DRAWS = 20_000  # draws of each text
LIMIT = 5  # standard errors by which a claim must fall short to break a rule


def audit(claim, draws=DRAWS, steps=None):
    """Audit a claim on all worlds with all denoisers: a list of Findings.

    steps: of the chain that the claim is about; None: tokens are revealed one by one.
    """
    findings = []
    for world in worlds():
        for name, model in denoisers(world).items():
            rng, x0 = torch.Generator().manual_seed(0), world.texts
            log_p = model.log_p(steps)
            possible = world.p > 0
            mean, error = measure(claim, model, x0, draws, rng)
            if not model.asked:
                raise UserError("the claim never asks the model: a bound has to call model(xt, t)")
            asked, broken = torch.cat(model.asked).double(), []
            of_possible = mean[possible] if mean.dim() else mean
            if (of_possible.isnan() | of_possible.isneginf()).any():
                broken.append("finite")
            if mean.dim():
                claimed = (world.p[possible] * mean[possible]).sum()
                claimed_error = (world.p[possible] * error[possible]).square().sum().sqrt()
                terms = (-mean).exp().nan_to_num(0)
                kraft, kraft_error = terms.sum().item(), (terms * error.nan_to_num(0)).square().sum().sqrt().item()
                if kraft - 1 > LIMIT * kraft_error + 1e-6:
                    broken.append("Kraft")
                finite = mean.isfinite() & log_p.isfinite()
                short = ((-log_p - mean - 1e-6) / error.clamp(min=1e-9))[finite].max().item() if finite.any() else 0.0
                if short > LIMIT or (mean[log_p.isneginf()] < math.inf).any():  # texts that the model never writes
                    broken.append("model")
            else:  # one number for the mean over texts: on texts that are drawn anew each time
                claimed, claimed_error = measure(claim, model, x0, draws, rng, world.p)
                kraft = kraft_error = math.nan
                if -(world.p[possible] * log_p[possible]).sum() - claimed > LIMIT * claimed_error + 0.01:
                    broken.append("model")
            if world.entropy - claimed > LIMIT * claimed_error + 1e-6:
                broken.append("entropy")
            times, fixed = (asked.min().item(), asked.max().item()), steps or len(asked.unique()) < 100
            beyond = 20 / len(asked)  # uniform times are all above this with probability exp(-20)
            often = [(asked == t).sum() > 20 for t in times]  # asked on purpose: for a grid, or a reconstruction term
            if not fixed and (times[0] > beyond and not often[0] or times[1] < 1 - beyond and not often[1]):
                broken.append("times")
            findings.append(Finding(world.name, name, claimed.item(), claimed_error.item(), world.entropy, kraft,
                                    kraft_error, times, tuple(broken)))
    return findings


# ---- claims ----------------------------------------------------------------------------------------------------------


def noise(x0, rng, low=0.0):
    """(t, mask): t uniform on (low, 1], each token masked with probability t."""
    t = 1 - (1 - low) * torch.rand(len(x0), generator=rng, dtype=torch.float64)
    return t, torch.rand(x0.shape, generator=rng, dtype=torch.float64) < t[:, None]


def at_masks(log_p, x0, mask):
    """The cross-entropy at masks, 0 elsewhere: (n, L)."""
    return torch.where(mask, -log_p.gather(2, x0[..., None]).squeeze(2), 0)


def masked(model, x0, rng, low=0.0):
    """(t, mask, cross-entropy at masks or 0) of a draw of noise."""
    t, mask = noise(x0, rng, low)
    return t, mask, at_masks(model(torch.where(mask, model.mask_id, x0), t), x0, mask)


def exactly_k(model, x0, rng):
    """Correct: k masks, k uniform on 1 ... L, and weight L/k (docs/maths.md, section 7)."""
    n, L = x0.shape
    k = torch.randint(1, L + 1, (n, 1), generator=rng)
    mask = torch.rand(x0.shape, generator=rng).argsort(1).argsort(1) < k
    log_p = model(torch.where(mask, model.mask_id, x0), torch.rand(n, generator=rng))
    return L * at_masks(log_p, x0, mask).sum(1) / k[:, 0]


def weight_one_over_t(model, x0, rng):
    """Correct: weight 1/t at a uniform time (MDLM, docs/maths.md, section 5)."""
    t, _, ce = masked(model, x0, rng)
    return ce.sum(1) / t


def pooled_mean(model, x0, rng):
    """Mistake: the mean over all masked tokens of a batch. Texts with many masks, which are hard, count more often, and
    a model that fails when few tokens are masked is not found out."""
    _, mask, ce = masked(model, x0, rng)
    return x0.shape[1] * ce.sum() / mask.sum()


def divided_by_masks(model, x0, rng):
    """Mistake: L times the mean over the masks of each text, at a uniform time. A text without masks counts as 0, and
    that happens with probability 1/(L + 1): the rest is L/(L + 1) of the bound."""
    _, mask, ce = masked(model, x0, rng)
    return x0.shape[1] * ce.sum(1) / mask.sum(1).clamp(min=1)


def weight_of_visible(model, x0, rng):
    """Mistake: the weight 1/alpha instead of 1/(1 - alpha), alpha = 1 - t the probability that a token is visible."""
    t, _, ce = masked(model, x0, rng)
    return ce.sum(1) / (1 - t).clamp(min=1e-3)


def without_reconstruction(model, x0, rng):
    """Mistake: T = 4 steps, of which the last one of sampling, s = 1, which gives the text itself, is left out."""
    T = 4
    s = torch.randint(2, T + 1, (len(x0),), generator=rng)
    mask = torch.rand(x0.shape, generator=rng, dtype=torch.float64) < (s / T)[:, None]
    log_p = model(torch.where(mask, model.mask_id, x0), s / T)
    return (T - 1) / s * at_masks(log_p, x0, mask).sum(1)


def cut_off(model, x0, rng):
    """Mistake: times below 0.001 are never drawn. So nobody asks how surely the last tokens are predicted."""
    t, _, ce = masked(model, x0, rng, low=1e-3)
    return (1 - 1e-3) * ce.sum(1) / t


def joint_of_parts(model, x0, rng):
    """Mistake: the parts of a word are masked one by one, but scored together, by -log p(whole word | visible parts).
    The bound needs the sum of -log of their marginals. Two tied bits cost half of their entropy."""
    t, mask = noise(x0, rng)
    word = (x0 * model.V ** torch.arange(model.L - 1, -1, -1)).sum(1)
    return -model.joint(torch.where(mask, model.mask_id, x0), t).gather(1, word[:, None])[:, 0] / t


def mask_not_forbidden(model, x0, rng):
    """Looseness, no mistake: the network may predict the mask, and what it gives to the mask is lost."""
    t, mask = noise(x0, rng)
    log_p = model.leaky(torch.where(mask, model.mask_id, x0), t).log_softmax(-1)
    return at_masks(log_p, x0, mask).sum(1) / t


def lucky_masks(model, x0, rng):
    """Mistake: of eight draws of the masks, the one with the lowest loss. A fixed choice that was tuned is the same."""
    return torch.stack([exactly_k(model, x0, rng) for _ in range(8)]).amin(0)


CLAIMS = {claim.__name__: claim for claim in (
    exactly_k, weight_one_over_t, pooled_mean, divided_by_masks, weight_of_visible, without_reconstruction, cut_off,
    joint_of_parts, mask_not_forbidden, lucky_masks)}


# ---- bytes -----------------------------------------------------------------------------------------------------------


def audit_bytes(text, tokens, bytes_per_token):
    """(true bytes per token, factor by which claimed bits per byte are too low) of a text (bytes) of so many tokens."""
    if not text:
        raise UserError("the text has no bytes")
    true = len(text) / tokens
    return true, bytes_per_token / true


# ---- command line ----------------------------------------------------------------------------------------------------


def load(text):
    """The function of a claim, FILE.py:NAME. Raises UserError."""
    path, _, name = text.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise UserError(f"{text!r} is not the name of a function: use FILE.py:NAME with a file that exists")
    spec = importlib.util.spec_from_file_location("claim", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"{path} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())[:100]}")
    claim = getattr(module, name, None)
    if not callable(claim):
        raise UserError(f"{path} has no function {name!r}")
    try:
        inspect.signature(claim).bind(None, None, None)
    except TypeError:
        raise UserError(f"{path}: {name} must take three arguments, (model, x0, rng)")
    return claim


def verdict(findings):
    """One line about a claim: the rules that it breaks, and how loose it is where the denoiser is perfect."""
    broken = sorted({rule for finding in findings for rule in finding.broken})
    excess = [finding.claimed - finding.entropy for finding in findings if finding.denoiser == "perfect"
              and not finding.claimed - finding.entropy <= LIMIT * finding.error]  # others may be noise
    if broken:
        return f"NO BOUND: breaks {', '.join(broken)}"
    if max(excess, default=0.0) > 0.02:
        return f"a bound, loose: up to {max(excess):.3f} nats above the entropy with the perfect denoiser"
    return "a bound, and tight"


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument("claim", nargs="?", help=f"FILE.py:NAME, or one of {', '.join(CLAIMS)} (default: all of these)")
    p.add_argument("--draws", type=number(int, 1000, 10**7), help=f"draws of each text (default {DRAWS:,})")
    p.add_argument("--steps", type=number(int, 1, 1000), help="steps of the chain that is claimed to be bounded")
    p.add_argument("--bytes", metavar="FILE", help="instead: the text whose bytes were divided by")
    p.add_argument("--tokens", type=number(int, 1), help="number of its tokens")
    p.add_argument("--bytes_per_token", type=number(float, 1e-9), help="bytes per token that were assumed")
    args = p.parse_args()
    if not args.bytes and (args.tokens or args.bytes_per_token):
        raise UserError("--tokens and --bytes_per_token are for --bytes FILE")
    if args.bytes:
        if not args.tokens or not args.bytes_per_token:
            raise UserError("--bytes needs --tokens and --bytes_per_token")
        if args.claim or args.draws or args.steps:
            raise UserError("--bytes audits no claim: leave out the claim, --draws and --steps")
        true, factor = audit_bytes(read_bytes(args.bytes), args.tokens, args.bytes_per_token)
        print(f"{true:.3f} bytes per token, not {args.bytes_per_token:g}: bits per byte are {factor:.3f} times what was"
              " claimed")
        return
    claims = CLAIMS
    if args.claim:
        claims = {args.claim: CLAIMS[args.claim] if args.claim in CLAIMS else load(args.claim)}
    for name, claim in claims.items():
        findings = audit(claim, args.draws or DRAWS, args.steps)
        if args.claim:
            table([finding._asdict() | {"broken": ", ".join(finding.broken), "low": finding.times[0],
                                        "high": finding.times[1]} for finding in findings],
                  {"world": ("", ""), "denoiser": ("", ""), "claimed": ("claimed", ".4f"), "error": ("±", ".4f"),
                   "entropy": ("entropy", ".4f"), "kraft": ("Kraft", ".4f"), "kraft_error": ("±", ".4f"),
                   "low": ("times from", ".5f"), "high": ("to", ".5f"), "broken": ("breaks", "")}, sys.stdout)
        print(f"{name}: {verdict(findings)}", flush=True)


if __name__ == "__main__":
    run(main)
