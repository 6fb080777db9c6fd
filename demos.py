"""Show the ideas of discrete diffusion on your own text, after the scripts of Oxen.ai's tutorial on SEDD.

    python demos.py caesar "uploading large datasets" -n 1                     # why tokens need a noise of their own
    python demos.py perturb "applying diffusion to text is kind of crazy" -t 0.35
    python demos.py loss "the function returns a list" -m out/demo -t 0.5      # the cost of each token of a noisy text
    python demos.py noise --out noise.png                                      # the schedules
    python demos.py names out/names -n 1000                                    # does a model of names write names?

`python demos.py DEMO --help` lists the flags of a demo. Without -m CKPT the tokens are characters: printable ASCII and
the other characters of the text. Symbols are those of diffusion.py.
"""

import argparse
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, check_place, named, number, require, run, table

import torch
import torch.nn.functional as F

from checkpoint import load_model
from configs import default_of
from data.loader import end_of_prefix
from data.tokenizer import CharTokenizer, make_tokenizer
from diffusion import MDLM
from hybrid import Hybrid
from plot import panels
from prompts import encode
from randomness import give_prefix, prefix_lengths, uniforms
from schedules import SCHEDULES, make_schedule
from show import piece
from storage import Hints
from studies.names import names
from uniform import Uniform

BIT = math.log(2)  # nats
ASCII = "".join(map(chr, range(32, 127)))


def open_text(args):
    """TEXT as ids (L,) long, the tokenizer, and the checkpoint given by -m (checkpoint.Loaded), or None."""
    if args.dataset and not args.model:
        raise UserError("--dataset needs a checkpoint: name one with -m CKPT, or leave out --dataset")
    loaded = load_model(args.model, torch.device("cpu"), Hints(args.dataset)) if args.model else None
    others = "".join(sorted(set(args.text) - set(ASCII)))
    tokenizer = make_tokenizer(loaded.meta) if loaded else CharTokenizer(ASCII + others)
    return torch.tensor(encode(args.text, tokenizer, "TEXT")), tokenizer, loaded


def shown(ids, tokenizer):
    """Ids (L,), which may be masks, as text."""
    return "".join(piece(token, tokenizer.vocab_size, tokenizer) for token in ids.tolist())


def say(text):
    print("\n" + textwrap.fill(" ".join(text.split()), 110))


def caesar(args):
    """Add n to the id of every token."""
    ids, tokenizer, _ = open_text(args)
    moved = (ids + args.n) % tokenizer.vocab_size
    print(f"{len(ids)} tokens, ids 0 to {tokenizer.vocab_size - 1:,}; each id {args.n:+d}:\n\n"
          f"  {shown(ids, tokenizer)}\n  {shown(moved, tokenizer)}\n\n"
          f"{(ids != moved).sum()} of {len(ids)} tokens differ (their Hamming distance).")
    say("""Add 1 to every pixel of a picture and it looks the same: a pixel is an amount, so noise for pictures adds a
        little to all of them. The id of a token is a name, and the next id means something else: so noise for text
        leaves most tokens alone and replaces some, each with probability 1 - alpha(t), until at t = 1 all are gone.""")


def perturb(args):
    """Add the noise of time t to a text, and show which tokens change, and into what."""
    x0, tokenizer, loaded = open_text(args)
    kind = args.noise or (loaded.config.noise if loaded else "mask")
    name = args.schedule or (loaded.config.schedule if loaded else "linear")
    V, L, t = tokenizer.vocab_size, len(x0), torch.tensor([args.t], dtype=torch.float64)
    share = loaded.config.uniform_share if loaded else default_of("uniform_share")
    objective = {"mask": MDLM(V, name), "uniform": Uniform(V, name), "hybrid": Hybrid(V, name, share)}[kind]
    _, v = uniforms(args.seed, 0, [0], 1, L, stratified=False)
    noise = objective.noise(t, v)
    xt = objective.corrupt(x0, noise[0])[0]
    hit = noise.token[0] >= 0 if objective.random_tokens else noise.mask[0]
    alpha, sigma = objective.schedule.alpha(t).item(), objective.schedule.sigma(t).item()
    print(f"t = {args.t:g}, schedule {name}: a token stays with probability alpha(t) = {alpha:.4f}\n"
          f"sigma(t) = -log alpha(t) = {sigma:.4f}, the total noise, which SEDD's networks are told\n"
          f"move chance 1 - alpha(t) = 1 - e^-sigma(t) = {1 - alpha:.4f}: of {L} tokens {L * (1 - alpha):.1f} ± "
          f"{math.sqrt(L * alpha * (1 - alpha)):.1f} move on average, and {hit.sum()} did\n\n"
          f"  {shown(x0, tokenizer)}\n  {shown(xt, tokenizer)}\n")
    moves = []
    for i in hit.nonzero().flatten().tolist():
        to = f" -> {shown(xt[i:i + 1], tokenizer)!r}" if objective.random_tokens else ""
        moves.append(f"{i} {shown(x0[i:i + 1], tokenizer)!r}{to}")
    became, advice = {
        "mask": ("absorbed", "A mask shows where text is missing: the network fills it in."),
        "uniform": ("replaced by any token, maybe itself",
                    "Nothing shows which tokens are noise: the network must doubt all of them."),
        "hybrid": ("replaced by the mask, or by any token, maybe itself",
                   "Masks show where text is missing; the network must also doubt the tokens that it sees."),
    }[kind]
    print(f"{became}: {'  '.join(moves) or 'none'}")
    say(f"""Each token has a random number in (0, 1] of its own and moves once 1 - alpha(t) reaches it: with the same
        --seed a larger -t moves the same tokens and more. {advice}""")


def prepared(x0, loaded):
    """(x0 (L,) padded as in training, number of given tokens). Raises UserError if the model cannot score the text."""
    if not loaded:
        raise UserError("the demo loss needs a network: name a checkpoint, such as -m pretrained/prose")
    config, meta = loaded.config, loaded.meta
    until = end_of_prefix(config, make_tokenizer(meta))
    given = prefix_lengths(config.prefix_range[:1] * 2, 0, 0, [0], x0[None], until)[0]
    if not config.objective_class.both_sides:
        raise UserError(f"the checkpoint {config.objective_class.description}, and `loss` shows one time t of the "
                        "whole text: use evaluate.py for its loss")
    if len(x0) > config.seq_len:
        raise UserError(f"TEXT has {len(x0)} tokens, more than the {config.seq_len} of the model: shorten it")
    if len(x0) <= given:
        raise UserError(f"TEXT has {len(x0)} tokens, and the model was trained to continue {given}: lengthen it")
    if meta.get("pad"):
        x0 = F.pad(x0, (0, meta["record"] - len(x0)), value=meta["alphabet"].index(meta["pad"]))
    return x0, given


def masked_terms(objective, logits, x0, noise, weight):
    """The cost of each token if it is masked: logits (L, V), x0 (L,), Noise of one sequence -> {column: (L,) float64}.

    All columns are in bits except p and Z, the sum of the network's prediction f, which need not be normalised. The
    score entropy is that of the scores S = odds f, computed by its own formula (diffusion.SEDD), for every objective:
    dsigma/dt [sum_y S_y - odds log S_x0 + odds (log odds - 1)].
    """
    log_f = objective.log_prediction(logits, noise.t.expand(len(x0))).double()
    log_z, log_f_x0 = log_f.logsumexp(-1), log_f.gather(-1, x0[:, None]).squeeze(-1)
    ce, t = log_z - log_f_x0, noise.t.double()
    alpha = objective.schedule.alpha(t).clamp(min=1e-9)  # at alpha = 0 sigma is infinite
    odds, dsigma = alpha / (1 - alpha), -objective.schedule.dalpha(t) / alpha
    entropy = dsigma * ((log_f.exp() * odds).sum(-1) - odds * (log_f_x0 + odds.log()) + odds * (odds.log() - 1))
    columns = {"p(token)": (-ce).exp(), "CE": ce / BIT, "weight x CE": weight * ce / BIT,
               "score entropy": entropy / BIT}
    if not objective.normalised:
        columns |= {"Z": log_z.exp(), "penalty": weight * (log_z.exp() - 1 - log_z) / BIT}
    return columns


def uniform_terms(objective, logits, x0, noise, weight):
    """The cost of every token under uniform noise, in bits: logits (L, N), UniformNoise -> {column: (L,) float64}."""
    cost = objective.position_costs(logits[None], x0[None], noise)[0].double() / BIT
    if objective.T:
        return {"KL": cost, "weight x KL": weight * cost}
    return {"score entropy / dsigma": cost, "score entropy": weight * cost}


@torch.no_grad()
def loss(args):
    """Add the noise of time t to a text, and show the cost of each token: one sample of the bound."""
    x0, tokenizer, loaded = open_text(args)
    x0, given = prepared(x0, loaded)
    model, config = loaded.model, loaded.config
    kind = "mdlm" if config.objective == "bert" else config.objective  # bert has one rate, whatever t is
    objective = replace(config, objective=kind, time_sampling="uniform").make_objective(loaded.meta["vocab_size"])
    show_costs(objective, model, x0, given, args, tokenizer)
    show_other_draws(objective, model, x0, given, args)


def show_costs(objective, model, x0, given, args, tokenizer):
    """Print the numbers of the noise at time t, and the cost of each token of x0 (L,) under it."""
    L, n, masks = len(x0), len(x0) - given, not objective.random_tokens
    _, v = uniforms(args.seed, 0, [0], 1, L, stratified=False)
    noise = objective.noise(torch.tensor([args.t], dtype=torch.float64), give_prefix(v, [given]))
    xt = objective.corrupt(x0[None], noise[0])
    hit = noise.mask[0] if masks else noise.token[0] >= 0
    t, schedule = noise.t.double(), objective.schedule
    alpha = schedule.alpha(t).item()
    dsigma = -schedule.dalpha(t).item() / alpha if alpha else math.inf
    weight = noise.weight.item() * n / L  # of one nat in the bound on the text, n nelbo; nelbo is a mean over L
    print(f"t = {t.item():g}: noise hits a token with probability 1 - alpha = {1 - alpha:.4f}, {hit.sum()} of {n}\n"
          f"sigma = -log alpha = {schedule.sigma(t).item():.4f} nats, dsigma/dt = {dsigma:.4f}, "
          f"odds = alpha/(1 - alpha) = {alpha / (1 - alpha):.4f}\n"
          f"weight = {weight:.4f}: {meaning_of_weight(objective)}\n\n  {shown(xt[0], tokenizer)}\n")

    costs = (masked_terms if masks else uniform_terms)(objective, model(xt, noise.t)[0], x0, noise, weight)
    token, seen = ([repr(shown(ids[i:i + 1], tokenizer)) for i in range(L)] for ids in (x0, xt[0]))
    rows = [{"i": i, "token": token[i], "seen": seen[i]} for i in range(L)]
    for i in hit.nonzero().flatten().tolist() if masks else range(L):  # a visible token costs nothing
        rows[i] |= {key: column[i].item() for key, column in costs.items()}
    table(rows, {"i": ("", "d"), "token": ("token", ""), "seen": ("seen", "")} | {key: (key, ".4f") for key in costs},
          sys.stdout)
    total = objective.nelbo(model, x0[None], noise).item() * n / BIT
    prior = 0.0 if masks else objective.prior * n / BIT
    print(f"\nin bits; the sum is {total:.2f}, {total / n:.4f} per token: one sample of the bound on -log2 p(TEXT)"
          + (f", with {prior:.2f} for the noise that is left at the end (uniform.prior_kl)" if prior > 0.005 else ""))
    if not masks:
        say(("Masks are noise, but nothing shows which of the other tokens are" if objective.has_mask else
             "Nothing shows which tokens are noise") + ", so all of them cost something.")
    elif not objective.normalised:
        say("""The scores are S = odds f, and the prediction f sums to Z, not to 1. So score entropy is weight x CE and
            a penalty, weight x (Z - 1 - log Z), which normalising f would save.""")
    else:
        say("""Visible tokens cost nothing: they are kept. SEDD's score entropy of the scores S = odds p is the same
            number as weight x CE, because p sums to 1""" + (", up to the size of a step." if objective.T else "."))


def meaning_of_weight(objective):
    if objective.random_tokens:
        return f"T, as one of T = {objective.T:,} steps is drawn" if objective.T else "dsigma/dt"
    formula = (f"T (a_(s-1) - a_s)/(1 - a_s), with a_s = alpha(s/T) and T = {objective.T:,}" if objective.T else
               "-alpha'(t)/(1 - alpha(t)) = odds dsigma/dt")
    return f"{formula}: what a nat at a mask counts"


def show_other_draws(objective, model, x0, given, args):
    """Print how much the bound on x0 varies, over draws of time and noise in two ways."""
    (u, v), (w, _) = (uniforms(args.seed, step, range(args.draws), args.draws, len(x0), False) for step in (1, 2))
    v = give_prefix(v, [given] * args.draws)
    ways = {"t uniform on (0, 1]": objective.noise(u, v),
            "as evaluate.py draws": getattr(objective, objective.reported)(u, v, w)}
    print(f"\n{args.draws} other draws of time and noise, in bits per token:")
    for name, drawn in ways.items():
        bits = objective.nelbo(model, x0.expand(args.draws, -1), drawn).double() / BIT
        print(f"  {name:20}  mean {bits.mean():.3f}, standard deviation {bits.std():.3f}, from {bits.min():.3f} to "
              f"{bits.max():.3f}")
    say("Training draws the time anew for every text, so single losses jump, and their mean counts. "
        + ("""A token counts as often as the weight says. The weight is large where few tokens are masked: there one
           hard token is a large number. In the draws of evaluate.py k masks have the weight L/k."""
           if not objective.random_tokens else ""))


def noise(args):
    """Print a table of the noise schedules, and draw alpha(t), sigma(t) and the loss weight of a masked token."""
    require("matplotlib", "a picture")
    check_place("--out", args.out, ".png")
    schedules = {name: make_schedule(name) for name in [*SCHEDULES, *([args.schedule] if args.schedule else [])]}
    what = {"alpha": ("alpha(t), P(a token stays)", lambda s, t: s.alpha(t)),
            "sigma": ("sigma(t) = -log alpha(t), nats", lambda s, t: s.sigma(t)),
            "weight": ("weight -alpha'(t)/(1 - alpha(t))", lambda s, t: s.weight(t))}
    t = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
    panels(args.out, t, {title: {name: f(s, t) for name, s in schedules.items()} for title, f in what.values()})
    rows = [{"schedule": name, "t": t} | {key: f(s, torch.tensor(t, dtype=torch.float64)).item()
                                          for key, (_, f) in what.items()}
            for name, s in schedules.items() for t in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)]
    table(rows, {"schedule": ("schedule", ""), "t": ("t", ".2f")} | {key: (key, ".4f") for key in what}, sys.stdout)
    say(f"""alpha: how many tokens stay until t; sigma = -log alpha; weight: what a nat of CE at a mask counts in the
        bound. For a network that is not told the time the bound is the same for all schedules from alpha = 1 to 0: they
        spend training on other mask rates, and change the noise of its estimate. loglinear and geometric end before
        sigma is infinite, so a network can be told sigma. The curves are in {args.out}.""")


# ---- command line ----------------------------------------------------------------------------------------------------


def schedule(text):
    """An argparse type: the name of a schedule."""
    try:
        make_schedule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error))
    return text


FLAGS = {
    "text": dict(type=named, metavar="TEXT", help="text to show the demo with"),
    "checkpoint": dict(metavar="CKPT", help="checkpoint of a model of names: a file, or a folder with ckpt.pt"),
    "-n": dict(type=number(int, -10**6, 10**6), default=1, help="number to add to each id (default 1)"),
    "-t": dict(type=number(float, 1e-6, 1), default=0.5, help="time, in (0, 1] (default 0.5)"),
    "--noise": dict(choices=("mask", "uniform", "hybrid"), help="kind of noise (default: the checkpoint's, or mask)"),
    "--schedule": dict(type=schedule, help=f"noise schedule: {', '.join(SCHEDULES)}, or like geometric:0.0001:20"),
    "--seed": dict(type=number(int, 0, 2**63 - 1), default=0, help="random seed (default 0)"),
    "-m --model": dict(type=named, metavar="CKPT", help="checkpoint: a file, or a folder with ckpt.pt"),
    "--dataset": dict(help="data set of another project's checkpoint, if it does not name it: text8 or openwebtext"),
    "--draws": dict(type=number(int, 2, 10**5), default=64, help="number of draws of time and noise (default 64)"),
    "--out": dict(type=Path, default=Path("noise.png"), metavar="FILE", help="picture to write (default noise.png)"),
    "-n --samples": dict(type=number(int, 1, 10**6), default=1000, help="number of names to draw (default 1000)"),
    "--gap": dict(type=number(int, 1), help="tokens in the gap of held-out names (default: all but three)"),
    "--data_dir": dict(default="", help="folder that has the data sets (default: as in training)"),
}
DEMOS = {  # name -> (function, its flags)
    "caesar": (caesar, ("text", "-n", "-m --model", "--dataset")),
    "perturb": (perturb, ("text", "-t", "--noise", "--schedule", "--seed", "-m --model", "--dataset")),
    "loss": (loss, ("text", "-m --model", "-t", "--seed", "--draws", "--dataset")),
    "noise": (noise, ("--schedule", "--out")),
    "names": (names, ("checkpoint", "-n --samples", "--gap", "--seed", "--data_dir")),
}


def main():
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        return print(__doc__)
    if name not in DEMOS:
        raise UserError(f"unknown demo {name!r}: choose one of {', '.join(DEMOS)}")
    demo, flags = DEMOS[name]
    p = ArgumentParser(prog=f"demos.py {name}", description=demo.__doc__)
    for flag in flags:
        p.add_argument(*flag.split(), **FLAGS[flag])
    demo(p.parse_args(sys.argv[2:]))


if __name__ == "__main__":
    run(main)
