"""What a model's likelihood is made of (`evaluate.py --curve`, `--curse`, `--context`, `--variance`): cross-entropy by
mask rate, the price of parallel decoding, the worth of context, and how much noise each way to estimate it leaves.

measure_* returns rows of numbers in nats; the function of the same name prints, writes and draws them in bits, for an
evaluate.Subject.
"""

import json
import math

import numpy as np
import torch

from cli import UserError, autocast, progress, table, write_file
from data.loader import gather, windows
from likelihood import by_rate, in_batches, mean_and_error, reveal
from plot import picture
from randomness import give_prefix, repeated_uniforms, uniforms
from storage import digest


def some_of(low, high, n):
    """About n different integers from low to high, both included, half of them evenly spaced, half of them by ratio."""
    even, ratio = torch.linspace(low, high, n // 2), torch.logspace(math.log10(low), math.log10(high), n - n // 2)
    return sorted({min(high, max(low, round(x))) for x in torch.cat([even, ratio]).tolist()})


def in_bits(rows, *keys):
    """The rows with these entries turned from nats into bits, and what is no number (an error, if n = 1) into None."""
    bits = [row | {key: row[key] / math.log(2) for key in keys} for row in rows]
    return [{key: None if value != value else value for key, value in row.items()} for row in bits]


# ---- cross-entropy by mask rate --------------------------------------------------------------------------------------


@torch.no_grad()
def measure_curve(model, objective, tokens, starts, seq_len, batch_size, device, dtype, seed=0, given=0):
    """Cross-entropy at a masked token, given the number k of masks in its window: [{masks: k, mask_rate, ce, stderr}].

    Its mean over k = 1 ... L is the continuous-time bound (Absorbing.exact_k). A network that sees the time is told it
    as there. given: tokens at the beginning of each window that are never masked; then L counts the others.
    """
    rows, L = [], seq_len - given
    for k in progress(some_of(1, L, 32), desc="mask rates", leave=False):
        nats = []
        for chunk in in_batches(starts, batch_size):
            _, v, _ = repeated_uniforms(seed, chunk, len(starts), 1, seq_len)
            v = give_prefix(v, [given] * len(chunk))
            u = torch.full((len(chunk),), (k - 0.5) / L, dtype=torch.float64)
            with autocast(device, dtype):
                nats.append(objective.nelbo(model, gather(tokens, starts[chunk], seq_len).to(device),
                                            objective.exact_k(u, v[:, 0]).to(device)).cpu().double())
        mean, error = mean_and_error(torch.cat(nats))
        rows.append(dict(masks=k, mask_rate=k / L, ce=mean, stderr=error))
    return rows


def area(rows):
    """Mean of the curve over k = 1 ... L, interpolated linearly between the k that were measured: nats per token."""
    k = [row["masks"] for row in rows]
    inner = sum((b["masks"] - a["masks"]) * (a["ce"] + b["ce"]) / 2 for a, b in zip(rows, rows[1:]))
    return (inner + (rows[0]["ce"] + rows[-1]["ce"]) / 2) / k[-1]


def curve(subject, args, device, dtype, out):
    """Cross-entropy by mask rate, of one checkpoint."""
    subject.masked_only("--curve")
    path = subject.output(args.out_dir, "curve.json")
    rows = in_bits(measure_curve(subject.model, subject.objective(), *subject.windows(args.batch_size, device, dtype),
                                 args.seed, subject.config.prefix_range[0]), "ce", "stderr")
    unit, given = subject.tokenizer.unit, subject.config.prefix_range[0]
    print(f"bits per masked {unit} on {subject.where}, {len(subject.starts):,} windows of {subject.seq_len}"
          + (f", the first {given} given" if given else ""), file=out)
    table(rows, {"masks": ("masks", "d"), "mask_rate": ("mask rate", ".3f"), "ce": (f"bits/{unit}", ".4f"),
                 "stderr": ("± s.e.", ".4f")}, out)
    result = {"seq_len": subject.seq_len, "masks": [row["masks"] for row in rows],
              "mask_rate": [row["mask_rate"] for row in rows], "bits_per_token": [row["ce"] for row in rows],
              "stderr": [row["stderr"] for row in rows], "area": area(rows), "n_sequences": len(subject.starts),
              "dataset": subject.dataset, "split": None if args.text else args.split, "step": subject.step,
              "checkpoint": subject.path, "weights": digest(subject.model.state_dict()), "seed": args.seed}
    print(f"area under it: {result['area']:.4f} bits per {unit}, the continuous-time bound", file=out)
    series = {subject.path: [(row["mask_rate"], row["ce"], row["stderr"]) for row in rows]}
    picture(path.with_suffix(".png"), series, "mask rate", f"bits per masked {unit}")
    write_file(path, json.dumps(result) + "\n")
    return result


# ---- the curse of parallel decoding ----------------------------------------------------------------------------------


def measure_curse(model, objective, tokens, starts, seq_len, batch_size, device, dtype, n_chars, seed=0):
    """What predicting k tokens at once costs against one by one, all others being visible, nats per character of the k:

    [{tokens: k, characters, parallel, sequential, gap, stderr}], means over windows. n_chars: (V,), of each token.

    Both prices come from one pass that reveals a window in random order: when k masks are left, their cross-entropies
    add up to the parallel price; those of each, when its turn comes, to the sequential one. For the Bayes-optimal
    network the expected gap is the total correlation of the k tokens given the others.
    """
    ks = sorted({2**i for i in range(seq_len.bit_length())} | {seq_len})
    prices = []  # of each batch: (3, len(ks), B)
    for chunk in progress(in_batches(starts, batch_size), desc="revealing", leave=False):
        _, v, _ = repeated_uniforms(seed, chunk, len(starts), 1, seq_len)
        x0, order = gather(tokens, starts[chunk], seq_len).to(device), v[:, 0].argsort(1).to(device)
        rows, at_once, each, size = torch.arange(len(x0), device=device), [], [], []
        with autocast(device, dtype):
            for position, masked, ce in reveal(model, objective, x0, order, everywhere=ks):
                at_once.append(ce.sum(1))
                each.append(ce[rows, position])
                size.append((n_chars.to(device)[x0] * masked).sum(1))
        each = torch.stack(each).flip(0).cumsum(0).flip(0)  # from here to the end
        left = [seq_len - k for k in ks]
        prices.append(torch.stack([torch.stack(at_once)[left], each[left], torch.stack(size)[left]]).cpu().double())
    rows = []
    for k, parallel, sequential, size in zip(ks, *torch.cat(prices, 2)):
        gap = (parallel - sequential).sum() / size.sum()
        _, error = mean_and_error((parallel - sequential - gap * size) / size.mean())  # of a ratio of means
        rows.append(dict(tokens=k, characters=size.mean().item(), parallel=(parallel.sum() / size.sum()).item(),
                         sequential=(sequential.sum() / size.sum()).item(), gap=gap.item(), stderr=error))
    return rows


def curse(subjects, args, device, dtype, out):
    """The price of parallel decoding, of one checkpoint, or of two that may have different tokens."""
    for subject in subjects:
        subject.masked_only("--curse")
        subject.whole_windows("--curse")
    path, result, series = subjects[0].output(args.out_dir, "curse.json"), [], {}
    for subject in subjects:
        n_chars = torch.from_numpy(subject.tokenizer.lengths()[0])
        rows = in_bits(measure_curse(subject.model, subject.objective(),
                                     *subject.windows(args.batch_size, device, dtype), n_chars, args.seed),
                       "parallel", "sequential", "gap", "stderr")
        print(f"{subject.path}: bits per character of tokens predicted at once, all others visible, on "
              f"{subject.where}, {len(subject.starts):,} windows of {subject.seq_len}", file=out)
        table(rows, {"tokens": ("tokens", "d"), "characters": ("characters", ".1f"), "parallel": ("at once", ".4f"),
                     "sequential": ("one by one", ".4f"), "gap": ("gap", ".4f"), "stderr": ("± s.e.", ".4f")}, out)
        result.append({"checkpoint": subject.path, "dataset": subject.dataset, "n_sequences": len(subject.starts),
                       "step": subject.step, "rows": rows})
        series[f"{subject.path} ({subject.meta['tokenizer']})"] = [
            (row["characters"], row["gap"], row["stderr"]) for row in rows]
    picture(path.with_suffix(".png"), series, "characters predicted at once", "gap, bits per character", log_x=True)
    write_file(path, json.dumps({"curse": result}) + "\n")
    return {"curse": result}


# ---- what context is worth -------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_context(model, objective, tokens, starts, seq_len, batch_size, device, dtype, contexts, seed=0,
                    prefix="none"):
    """The bound of the same tokens after contexts of different lengths: [{context, bits, stderr, gain, gain_stderr}].

    Scored are the last seq_len - max(contexts) tokens of each window, after as many tokens before them as a context
    has; masks and their rates are the same for all. gain: over the shortest context, window by window. Nats per token.
    A network that was trained without a prefix is told the share of masks among all tokens, not among those scored.
    """
    most, n, nats = max(contexts), len(starts), []
    draw = getattr(objective, objective.reported)
    for c in progress(sorted(contexts), desc="contexts", leave=False):
        found = []
        for chunk in in_batches(starts, batch_size):
            u, v, w = (x[:, 0] for x in repeated_uniforms(seed, chunk, n, 1, seq_len - most))
            v = give_prefix(torch.nn.functional.pad(v, (c, 0)), [c] * len(chunk))
            noise = draw(u, v, w)
            if prefix == "none":
                rate = 1 - objective.schedule.alpha(noise.t.double())
                noise = noise._replace(t=objective.time(rate * (1 - c / v.shape[1])))
            with autocast(device, dtype):
                found.append(objective.nelbo(model, gather(tokens, starts[chunk] + most - c, v.shape[1]).to(device),
                                             noise.to(device)).cpu().double())
        nats.append(torch.cat(found))
    rows = []
    for c, values in zip(sorted(contexts), nats):
        mean, error = mean_and_error(values, by_rate(n, seed))
        gain, gain_error = mean_and_error(nats[0] - values, by_rate(n, seed))
        rows.append(dict(context=c, bits=mean, stderr=error, gain=gain, gain_stderr=gain_error))
    return rows


def context(subject, args, device, dtype, out):
    """What the tokens before a text say about it."""
    if not subject.config.objective_class.has_mask:
        subject.masked_only("--context")
    if max(args.context) >= subject.seq_len:
        raise UserError(f"--context {max(args.context)} leaves nothing of windows of {subject.seq_len} tokens")
    path, unit = subject.output(args.out_dir, "context.json"), subject.tokenizer.unit
    rows = in_bits(measure_context(subject.model, subject.objective(), *subject.windows(args.batch_size, device, dtype),
                                   args.context, args.seed, subject.config.prefix),
                   "bits", "stderr", "gain", "gain_stderr")
    n = subject.seq_len - max(args.context)
    print(f"bits per {unit} of the same {n} {unit}s after {unit}s of context, on {subject.where}, "
          f"{len(subject.starts):,} windows", file=out)
    table(rows, {"context": ("context", "d"), "bits": (f"bits/{unit}", ".4f"), "stderr": ("± s.e.", ".4f"),
                 "gain": ("gain", ".4f"), "gain_stderr": ("± s.e.", ".4f")}, out)
    result = {"context": rows, "n_tokens": n, "n_sequences": len(subject.starts), "dataset": subject.dataset,
              "step": subject.step, "checkpoint": subject.path, "seed": args.seed}
    write_file(path, json.dumps(result) + "\n")
    return result


# ---- the noise of the estimate ---------------------------------------------------------------------------------------


@torch.no_grad()
def measure_variance(model, objective, chain, tokens, starts, seq_len, batch_size, device, dtype, unigram, repeats,
                     trials, seed=0):
    """The Monte-Carlo noise of ways to estimate the mean bound of the same windows with as many network calls each:

    [{way, mean, stderr, noise}] over independent trials, nats per token; noise: the standard deviation of one trial.
    The first way is nanoDD's: half the calls for s uniform on 2 ... T with weight (T - 1)/s, half for the
    reconstruction term, s = 1. chain: the D3PM whose T steps these are. unigram: (V,), the probability of each token,
    for the control variate.
    """
    n, L = len(starts), seq_len
    x0 = gather(tokens, starts, L).repeat_interleave(repeats, 0)
    unigram_nats = -unigram.double().log()[x0]
    first_half = torch.arange(len(x0)) % 2 == 0

    def independent(seed):
        generator = torch.Generator().manual_seed(seed)
        return [1 - torch.rand(shape, dtype=torch.float64, generator=generator)
                for shape in ((n, repeats), (n, repeats, L), (n, repeats))]

    def stratified(seed):
        return repeated_uniforms(seed, range(n), n, repeats, L)

    def in_batch(seed):  # as in training: every repeat by itself
        return torch.stack([stratified_u(seed, j) for j in range(repeats)], 1), *independent(seed)[1:]

    def stratified_u(seed, j):
        return uniforms(seed, j, range(n), n, 1, stratified=True)[0]

    def complementary(seed):  # the second mask of a pair is what the first one left, and one token more
        u, v, w = stratified(seed)
        u[:, 1::2], v[:, 1::2] = 1 - u[:, 0::2], 1 - v[:, 0::2]
        return u.clamp(min=1e-12), v, w

    def dealt(seed):  # the masks of a window take turns, as cards are dealt from one shuffled deck
        u, v, w = stratified(seed)
        turn = u.cumsum(1) - u
        return u, 1 - (v[:, :1] + turn[..., None]) % 1, w

    def nanodd(u, v, w):
        T = chain.T
        noise = chain.noise(torch.where(first_half, (1 + (T - 1) * u) / T, 1 / T), v)
        return noise._replace(weight=noise.weight * torch.where(first_half, 2 * (T - 1) / T, 2 / T))

    def small_k_often(u, v, w):  # P(k) about proportional to k^(-1/3), since single tokens are the noise
        noise = objective.exact_k(u**1.5, v)
        k = noise.mask.sum(1).double()
        return noise._replace(weight=(1 / k / ((k / L) ** (2 / 3) - ((k - 1) / L) ** (2 / 3))).float())

    def estimate(draw, noise_of, control, seed):
        u, v, w = noise_of(seed)
        noise = draw(u.flatten(), v.flatten(0, 1), w.flatten())
        with autocast(device, dtype):
            nats = torch.cat([objective.nelbo(model, x.to(device), part.to(device)).cpu().double()
                              for x, part in zip(x0.split(batch_size), noise.split(batch_size))])
        if control:  # what a unigram model would pay there, of which the mean is known
            nats = nats - noise.weight * (unigram_nats * noise.mask).mean(1) + unigram_nats.mean(1)
        return nats.mean()

    ways = {
        "nanoDD's": (nanodd, independent, False),
        "exact_k, independent draws": (objective.exact_k, independent, False),
        "exact_k, stratified in each batch": (objective.exact_k, in_batch, False),
        "exact_k, stratified over repeats, too (evaluate.py)": (objective.exact_k, stratified, False),
        "the same, complementary masks": (objective.exact_k, complementary, False),
        "the same, masks dealt in turn": (objective.exact_k, dealt, False),
        "the same, less what a unigram model pays": (objective.exact_k, stratified, True),
        "the same, small k more often": (small_k_often, stratified, False),
        "continuous, stratified over repeats, too": (objective.continuous, stratified, False),
        "t_step, stratified over repeats, too": (chain.t_step, stratified, False),
    }
    rows = []
    for name, way in progress(ways.items(), desc="ways", leave=False):
        estimates = torch.stack([estimate(*way, (trials * seed + trial) % 2**63) for trial in range(trials)])
        mean, error = mean_and_error(estimates)
        rows.append(dict(way=name, mean=mean, stderr=error, noise=estimates.std().item()))
    return rows


def variance(subject, args, device, dtype, out):
    """The noise of several estimators with 64 network calls on 8 windows."""
    subject.masked_only("--variance")
    subject.whole_windows("--variance")
    n_trials = args.trials or 200
    subject = subject._replace(starts=windows(subject.tokens, subject.seq_len, 8))
    unigram = np.bincount(subject.tokens, minlength=subject.meta["vocab_size"]) + 1
    rows = measure_variance(subject.model, subject.objective(), subject.objective("t_step"),
                            *subject.windows(64, device, dtype), torch.from_numpy(unigram / unigram.sum()),
                            repeats=32 // len(subject.starts) * 2, trials=n_trials, seed=args.seed)
    rows = in_bits(rows, "mean", "stderr", "noise")
    for row in rows:
        row["variance_ratio"] = (rows[0]["noise"] / row["noise"]) ** 2 if row["noise"] else None
    n_calls = 32 // len(subject.starts) * 2 * len(subject.starts)
    print(f"{n_calls} network calls on {len(subject.starts)} windows of {subject.seq_len} of {subject.where}, "
          f"{n_trials} trials each; a ratio is known to {200 / math.sqrt(n_trials):.0f} %", file=out)
    table(rows, {"way": ("estimator", ""), "mean": ("mean, bits", ".4f"), "stderr": ("± s.e.", ".4f"),
                 "noise": ("noise, bits", ".4f"), "variance_ratio": ("variance 1/", ".1f")}, out)
    return {"variance": rows}
