"""Parts of a model's likelihood (`evaluate.py --curve`, `--curse`, `--context`).

They are the cross-entropy by mask rate, the cost of parallel decoding, and the gain from context. measure_* returns
rows of numbers in nats. The function of the same name prints, writes and draws them in bits for a subject.Subject.
folder: where it writes (by default the checkpoint's folder). out: where it prints.
"""

import json
import math

import torch

from cli import UserError, autocast, progress, table, write_file
from data.loader import gather
from likelihood import by_rate, mean_and_error, reveal
from plot import picture
from randomness import give_prefix, repeated_uniforms
from storage import digest


def some_up_to(most):
    """About 32 different integers from 1 to `most`, both included: half evenly spaced, half at even ratios."""
    even, ratio = torch.linspace(1, most, 16), torch.logspace(0, math.log10(most), 16)
    return sorted({min(most, max(1, round(x))) for x in torch.cat([even, ratio]).tolist()})


def in_bits(rows, *keys):
    """Convert these entries of rows from nats to bits, and every nan (a standard error for n = 1) to None."""
    bits = [row | {key: row[key] / math.log(2) for key in keys} for row in rows]
    return [{key: None if value != value else value for key, value in row.items()} for row in bits]


# ---- cross-entropy by mask rate --------------------------------------------------------------------------------------


@torch.no_grad()
def measure_curve(model, objective, data, seed=0, given=0):
    """Cross-entropy at a masked token, given the number k of masks in its window: [{masks: k, mask_rate, ce, stderr}].

    Its mean over k = 1 ... L is the continuous-time bound (Absorbing.exact_k). The network is told the time as in
    exact_k. given: tokens at the beginning of each window that are never masked; L counts only the others.
    """
    rows, L = [], data.seq_len - given
    for k in progress(some_up_to(L), desc="mask rates", leave=False):
        nats = []
        for chunk in data.batches():
            _, v, _ = repeated_uniforms(seed, chunk, data.n, 1, data.seq_len)
            v = give_prefix(v, [given] * len(chunk))
            u = torch.full((len(chunk),), (k - 0.5) / L, dtype=torch.float64)
            with autocast(data.device, data.dtype):
                nats.append(objective.nelbo(model, data.read(chunk).to(data.device),
                                            objective.exact_k(u, v[:, 0]).to(data.device)).cpu().double())
        mean, error = mean_and_error(torch.cat(nats))
        rows.append(dict(masks=k, mask_rate=k / L, ce=mean, stderr=error))
    return rows


def area(rows):
    """Mean of the curve over k = 1 ... L, interpolated linearly between the measured k, in the unit of ce."""
    k = [row["masks"] for row in rows]
    inner = sum((b["masks"] - a["masks"]) * (a["ce"] + b["ce"]) / 2 for a, b in zip(rows, rows[1:]))
    return (inner + (rows[0]["ce"] + rows[-1]["ce"]) / 2) / k[-1]


def curve(subject, folder, seed, out):
    """Print, write and draw the cross-entropy of one checkpoint by mask rate."""
    subject.masked_only("--curve")
    subject.one_prefix("--curve")
    path = subject.output(folder, "curve.json")
    rows = in_bits(measure_curve(subject.model, subject.objective(), subject.data, seed,
                                 subject.config.prefix_range[0]), "ce", "stderr")
    unit, given = subject.tokenizer.unit, subject.config.prefix_range[0]
    print(f"bits per masked {unit} on {subject.where}, {subject.data.n:,} windows of {subject.data.seq_len}"
          + (f", the first {given} given" if given else ""), file=out)
    table(rows, {"masks": ("masks", "d"), "mask_rate": ("mask rate", ".3f"), "ce": (f"bits/{unit}", ".4f"),
                 "stderr": ("± s.e.", ".4f")}, out)
    result = {"seq_len": subject.data.seq_len, "masks": [row["masks"] for row in rows],
              "mask_rate": [row["mask_rate"] for row in rows], "bits_per_token": [row["ce"] for row in rows],
              "stderr": [row["stderr"] for row in rows], "area": area(rows), "n_sequences": subject.data.n,
              "dataset": subject.dataset, "split": subject.split, "step": subject.step,
              "checkpoint": subject.path, "weights": digest(subject.model.state_dict()), "seed": seed}
    print(f"area under it: {result['area']:.4f} bits per {unit}, the continuous-time bound", file=out)
    series = {subject.path: [(row["mask_rate"], row["ce"], row["stderr"]) for row in rows]}
    write_file(path, json.dumps(result) + "\n")
    picture(path.with_suffix(".png"), series, "mask rate", f"bits per masked {unit}")
    return result


# ---- the curse of parallel decoding ----------------------------------------------------------------------------------


def measure_curse(model, objective, data, n_chars, seed=0):
    """Cost of predicting k tokens at once, compared with one by one, all others visible; nats per character of the k.

    Returns [{tokens: k, characters, parallel, sequential, gap, stderr}], means over windows, for all k whose tokens
    have any characters. n_chars (V,): characters of each token. Both costs come from one pass that reveals a window in
    random order. The parallel cost is the sum of the cross-entropies of all masks when k are left. The sequential cost
    is the sum of those of each of the k tokens just before it is revealed. For the Bayes-optimal network the expected
    gap is the total correlation of the k tokens given the others.
    """
    device = data.device
    ks = sorted({2**i for i in range(data.seq_len.bit_length())} | {data.seq_len})
    prices = []  # one (3, len(ks), B) for each batch
    for chunk in progress(data.batches(), desc="revealing", leave=False):
        _, v, _ = repeated_uniforms(seed, chunk, data.n, 1, data.seq_len)
        x0, order = data.read(chunk).to(device), v[:, 0].argsort(1).to(device)
        rows, at_once, each, size = torch.arange(len(x0), device=device), [], [], []
        with autocast(device, data.dtype):
            for position, masked, ce in reveal(model, objective, x0, order, all_at=ks):
                at_once.append(ce.sum(1))
                each.append(ce[rows, position])
                size.append((n_chars.to(device)[x0] * masked).sum(1))
        each = torch.stack(each).flip(0).cumsum(0).flip(0)  # sum from here to the end
        left = [data.seq_len - k for k in ks]
        prices.append(torch.stack([torch.stack(at_once)[left], each[left], torch.stack(size)[left]]).cpu().double())
    rows = []
    for k, parallel, sequential, size in zip(ks, *torch.cat(prices, 2)):
        if not size.sum():  # these tokens are pads or later parts of characters
            continue
        gap = (parallel - sequential).sum() / size.sum()
        _, error = mean_and_error((parallel - sequential - gap * size) / size.mean())  # of a ratio of means
        rows.append(dict(tokens=k, characters=size.mean().item(), parallel=(parallel.sum() / size.sum()).item(),
                         sequential=(sequential.sum() / size.sum()).item(), gap=gap.item(), stderr=error))
    return rows


def curse(subjects, folder, seed, out):
    """Print, write and draw the cost of parallel decoding for one checkpoint, or two, whose tokens may differ."""
    for subject in subjects:
        subject.masked_only("--curse")
        subject.whole_windows("--curse")
    path, result, series = subjects[0].output(folder, "curse.json"), [], {}
    for subject in subjects:
        n_chars = torch.from_numpy(subject.tokenizer.lengths()[0])
        rows = in_bits(measure_curse(subject.model, subject.objective(), subject.data, n_chars, seed),
                       "parallel", "sequential", "gap", "stderr")
        print(f"{subject.path}: bits per character of tokens predicted at once, all others visible, on "
              f"{subject.where}, {subject.data.n:,} windows of {subject.data.seq_len}", file=out)
        table(rows, {"tokens": ("tokens", "d"), "characters": ("characters", ".1f"), "parallel": ("at once", ".4f"),
                     "sequential": ("one by one", ".4f"), "gap": ("gap", ".4f"), "stderr": ("± s.e.", ".4f")}, out)
        result.append({"checkpoint": subject.path, "dataset": subject.dataset, "n_sequences": subject.data.n,
                       "step": subject.step, "rows": rows})
        series[f"{subject.path} ({subject.meta['tokenizer']})"] = [
            (row["characters"], row["gap"], row["stderr"]) for row in rows]
    write_file(path, json.dumps({"curse": result}) + "\n")
    picture(path.with_suffix(".png"), series, "characters predicted at once", "gap, bits per character", log_x=True)
    return {"curse": result}


# ---- the gain from context -------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_context(model, objective, data, contexts, seed=0, knows_prefixes=False):
    """Bound of the same tokens given contexts of different lengths: [{context, bits, stderr, gain, gain_stderr}].

    All numbers are nats per token. The last seq_len - max(contexts) tokens of each window are scored, given the
    `context` tokens before them. Masks and mask rates are the same for all contexts. gain: mean decrease of the bound
    from the shortest context, window by window. knows_prefixes: the network was trained with a prefix, and is told the
    mask rate of the scored tokens. Any other network is told the mask rate of all tokens.
    """
    contexts, most, n, nats = sorted(contexts), max(contexts), data.n, []
    draw = getattr(objective, objective.reported)
    for c in progress(contexts, desc="contexts", leave=False):
        found = []
        for chunk in data.batches():
            u, v, pick = (x[:, 0] for x in repeated_uniforms(seed, chunk, n, 1, data.seq_len - most))
            v = give_prefix(torch.nn.functional.pad(v, (c, 0)), [c] * len(chunk))
            noise = draw(u, v, pick)
            if c and not knows_prefixes:  # with c = 0 the time is right, and float32 could round it to the next step
                rate = 1 - objective.schedule.alpha(noise.t.double())
                noise = noise._replace(t=objective.time(rate * (1 - c / v.shape[1])))
            x0 = gather(data.tokens, data.starts[chunk] + most - c, v.shape[1])
            with autocast(data.device, data.dtype):
                found.append(objective.nelbo(model, x0.to(data.device), noise.to(data.device)).cpu().double())
        nats.append(torch.cat(found))
    rows = []
    for c, values in zip(contexts, nats):
        mean, error = mean_and_error(values, by_rate(n, seed))
        gain, gain_error = mean_and_error(nats[0] - values, by_rate(n, seed))
        rows.append(dict(context=c, bits=mean, stderr=error, gain=gain, gain_stderr=gain_error))
    return rows


def context(subject, contexts, folder, seed, out):
    """Print and write the bound of the same tokens after contexts of different lengths."""
    if subject.config.objective_class.random_tokens or subject.config.block_size:
        subject.masked_only("--context")
    subject.one_prefix("--context")
    if max(contexts) >= subject.data.seq_len:
        raise UserError(f"--context {max(contexts)} leaves nothing of windows of {subject.data.seq_len}: use less")
    path, unit = subject.output(folder, "context.json"), subject.tokenizer.unit
    rows = in_bits(measure_context(subject.model, subject.objective(), subject.data, contexts, seed,
                                   subject.config.prefix != "none"),
                   "bits", "stderr", "gain", "gain_stderr")
    n = subject.data.seq_len - max(contexts)
    print(f"bits per {unit} of the same {n} {unit}s after {unit}s of context, on {subject.where}, "
          f"{subject.data.n:,} windows", file=out)
    table(rows, {"context": ("context", "d"), "bits": (f"bits/{unit}", ".4f"), "stderr": ("± s.e.", ".4f"),
                 "gain": ("gain", ".4f"), "gain_stderr": ("± s.e.", ".4f")}, out)
    result = {"context": rows, "n_tokens": n, "n_sequences": subject.data.n, "dataset": subject.dataset,
              "step": subject.step, "checkpoint": subject.path, "seed": seed}
    write_file(path, json.dumps(result) + "\n")
    return result
