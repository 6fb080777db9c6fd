"""Score checkpoints: likelihood with its standard error by several estimators, also zero-shot, and sample quality.

    python evaluate.py out/demo                                # bits per token on the validation split
    python evaluate.py out/demo out/ar_demo --split test       # the difference of two, on the same windows
    python evaluate.py out/demo --check                        # two estimators; exit code 1 if they disagree
    python evaluate.py out/demo --order confidence             # the exact likelihood along an order of reveals
    python evaluate.py out/demo --orders 8                     # the likelihood over all orders, from two sides
    python evaluate.py out/demo --text book.txt                # any text, zero-shot
    python evaluate.py out/demo --curve                        # cross-entropy by mask rate
    python evaluate.py out/demo --curse                        # the cost of decoding in parallel
    python evaluate.py out/demo --context 0,16,64              # how much the text before helps
    python evaluate.py out/demo --samples 64 --steps 8,32,128 --judge out/ar_demo

The result of a masked model is an upper bound on its -log2 p(x), averaged over non-overlapping windows of the whole
split. The standard error is that of the mean over windows: it covers the noise of the estimate and the choice of text.
"""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np

from checkpoint import add_model_flags
from cli import ArgumentParser, UserError, named, number, numbers, pick_device, pick_dtype, require, run
from configs import OBJECTIVES
from data.loader import SPLITS
from likelihood import ORDERS, bound, by_rate, nll_of, mean_and_error, plus_minus
from log import finite
from randomness import prefix_lengths
from sampler_settings import NAMES, add_arguments, common_flags, given_flags, settings_of, steps_flag
from sampling import SAMPLERS
from schedules import make_schedule
from storage import digest
from studies.baselines import reference_points
from studies.curves import context, curse, curve
from studies.orders import orders
from studies.answers import answers
from studies.judges import open_judge
from studies.quality import read_samples, samples
from studies.raw_text import compare_on_text
from studies.subject import check_comparable, count_tokens, different_tokens, open_subject

ESTIMATORS = {
    "exact_k": "continuous-time bound, exact k", "continuous": "continuous-time bound, independent masks",
    "t_step": "T-step bound, T = {T}", "t_step_uniform": "T-step bound, T = {T}, uniform steps",
    "rates": "continuous-time bound, random tokens",
    "flatter_rates": "continuous-time bound, random tokens, flatter rates",
    "chain_rule": "negative log-likelihood, chain rule",
}
MAX_ERRORS = 4    # standard errors by which two estimates of one number may differ
MIN_WINDOWS = 30  # for --check, because standard errors come from the differences of windows
MIN_DRAWS = 256   # of noise, for --check: with 64, 1 in 100 to 200 correct estimates differ by MAX_ERRORS
ROUNDING = 1e-4   # bits by which two estimates may always differ


def several_steps(text):
    """An argparse type: 8,16,auto -> [8, 16, "auto"]."""
    return [steps_flag(part) for part in text.split(",")]


def samples_flag(text):
    """An argparse type: a number of samples, or the name of a file with samples."""
    return number(int, 1, 10**6)(text) if text.isdecimal() else named(text)


def samplers(text):
    """An argparse type: names of samplers, separated by commas."""
    unknown = [name for name in text.split(",") if name not in NAMES]
    if unknown:
        raise UserError(f"--sampler {unknown[0]!r} is unknown: choose from {', '.join(NAMES)}")
    return text.split(",")


def parse_args():
    p = ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", type=named,
                   help="checkpoint of this or another project: a file, a folder or hf://owner/name")
    p.add_argument("other", nargs="?", type=named, help="second checkpoint, to compare with the first")
    data = p.add_argument_group("data")
    data.add_argument("--split", choices=SPLITS, help="split to score (default: val)")
    data.add_argument("--dataset", type=named, help="data set to score (default: the one of the training)")
    data.add_argument("--data_dir", default="", help="folder that has the data sets (default: as in training)")
    data.add_argument("--text", type=named, metavar="FILE", help="text to score instead of a split (plain, .gz or .xz)")
    data.add_argument("--seq_len", type=number(int, 1), help="tokens per window (default, maximum: as in training)")
    data.add_argument("--n_tokens", type=number(int, 1),
                      help="approximate number of tokens to score, in windows spread over the split (default: all of "
                           "it; 256 windows for --orders, --curve, --curse, --context)")
    how = p.add_argument_group("estimate of the likelihood")
    how.add_argument("--estimator", choices=[name for name in ESTIMATORS if name != "chain_rule"],
                     help="estimator of the bound (default: t_step for d3pm; else exact_k for masks, rates for "
                          "random tokens)")
    how.add_argument("--normalised", action="store_true",
                     help="score the normalised prediction of sedd with masks: a tighter bound than score entropy")
    how.add_argument("--T", type=number(int, 1, 10**7), help="steps of the T-step bound (default: the checkpoint's)")
    how.add_argument("--block_size", type=number(int, 1),
                     help="score as block diffusion with blocks of so many tokens (default: as trained)")
    how.add_argument("--repeats", type=number(int, 1, 10**4), default=1,
                     help="number of draws of the noise per window (default 1)")
    how.add_argument("--baselines", action="store_true",
                     help="also score n-gram models and lzma on the same split (character data only)")
    modes = p.add_argument_group("other measurements, instead of the bound").add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true",
                       help="use two estimators of the bound; exit code 1 if they differ by more than their errors")
    modes.add_argument("--order", choices=ORDERS,
                       help="compute the exact likelihood of revealing the tokens one by one in this order (slow)")
    modes.add_argument("--orders", type=number(int, 1, 10**5), metavar="K",
                       help="bound -log p from above by K random orders, and on samples from both sides (slow)")
    modes.add_argument("--curve", action="store_true",
                       help="measure the cross-entropy by mask rate; writes curve.json and curve.png")
    modes.add_argument("--curse", action="store_true",
                       help="measure the cost of predicting tokens in parallel; writes curse.json and curse.png")
    modes.add_argument("--context", type=numbers(int, 0), metavar="0,16,64",
                       help="measure the bits of a text after these numbers of context tokens; writes context.json")
    modes.add_argument("--samples", type=samples_flag, metavar="N|FILE",
                       help="measure the quality of N new samples, or of those in FILE; writes quality.csv, and for N "
                            "quality.png")
    modes.add_argument("--answers", type=number(int, 1, 10**7), metavar="N",
                       help="measure how many of N items are completed exactly after their given tokens (--prefix of "
                            "the training)")
    q = p.add_argument_group("flags of --samples and --answers")
    q.add_argument("--judge", type=named, metavar="CKPT|hf://NAME",
                   help="judge that scores the samples: an autoregressive checkpoint, or a model of transformers")
    q.add_argument("--mauve", action="store_true",
                   help="also compare the samples with real text by MAUVE, in the features of the judge; it needs some "
                   "thousands of samples")
    q.add_argument("--steps", type=several_steps,
                   help="numbers of sampling steps, such as 8,32,auto (default: the config's T)")
    q.add_argument("--sampler", type=samplers,
                   help=f"samplers, separated by commas, of {', '.join(NAMES)} (default: ancestral)")
    add_arguments(p)
    p.add_argument("--batch_size", type=number(int, 1), default=32, help="windows per network call (default 32)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed of the noise (default 0)")
    add_model_flags(p)
    p.add_argument("--out_dir", type=Path, help="folder to write files to (default: the checkpoint's)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = p.parse_args()
    if args.text and args.split:
        raise UserError("--text is scored instead of a split: leave out --split")
    if args.text and args.other and Path(args.text).exists() and not Path(args.text).is_file():
        raise UserError("--text is read once for each of the two checkpoints, and a pipe can be read only once: name "
                        "a file")
    args.split = args.split or "val"
    return args


# ---- likelihood ------------------------------------------------------------------------------------------------------


def pick_estimator(subject, args):
    """The estimator or the order that the flags ask for, or the objective's estimator. Raises UserError if it does not
    fit."""
    objective = subject.objective()
    if args.order:
        subject.whole_windows("the likelihood along an order")
        if objective.causal and args.order != "l2r":
            raise UserError(f"{subject.path} {objective.description} and has only one order: use --order l2r")
        if not objective.causal and not objective.block_size:
            subject.masked_only("--order")
        return args.order
    estimator = args.estimator or ("t_step" if args.T else objective.reported)
    if args.T and not estimator.startswith("t_step"):
        raise UserError(f"--T is for the T-step bound, not for --estimator {estimator}: leave out one of the two")
    if objective.causal and estimator != objective.reported:
        raise UserError(f"{subject.path} {objective.description}, so its likelihood is exact: leave out --estimator "
                        "and --T")
    if estimator.startswith("t_step"):
        if ("d3pm", subject.config.noise) not in OBJECTIVES:
            raise UserError(f"{subject.path} {objective.description}, for which there is no T-step bound: leave out "
                            "--T and --estimator")
        if objective.block_size:
            raise UserError(f"the T-step bound is for whole texts, and {subject.path} {objective.description}: leave "
                            "out --T and --estimator")
        if not make_schedule(subject.config.schedule).full_range:
            raise UserError(f"the T-step bound needs a schedule from alpha = 1 to 0, which schedule="
                            f"{subject.config.schedule} of {subject.path} is not: leave out --T and --estimator")
        if not objective.normalised:
            raise UserError(f"the T-step bound needs a normalised prediction, which that of {subject.path} is not: add "
                            "--normalised, or leave out --T and --estimator")
    elif estimator not in objective.estimators:
        raise UserError(f"--estimator {estimator} does not work with {subject.path}: choose "
                        f"{' or '.join(objective.estimators)}")
    return estimator


def pick_estimators(one, two, args):
    """The estimators to compare two models by: each one's own. But if only one of two models of masks has T steps, both
    get the bound in continuous time."""
    estimators = [pick_estimator(subject, args) for subject in (one, two)]
    if set(estimators) == {"t_step", "exact_k"} and all("exact_k" in s.objective().estimators for s in (one, two)):
        return ["exact_k", "exact_k"]
    return estimators


def nats_of(subject, estimator, args):
    """Nats per token of each window (n,), by an estimator or along an order, and a description of the method."""
    if estimator in ORDERS:
        return (nll_of(subject.model, subject.objective(), subject.data, estimator, args.seed),
                f"negative log-likelihood, order {estimator}")
    objective, prefix = subject.objective(estimator, args.T), subject.config.prefix
    nats = bound(subject.model, objective, subject.data, seed=args.seed, repeats=args.repeats, estimator=estimator,
                 prefix_range=subject.config.prefix_range, until=subject.until, show=True)
    words = ESTIMATORS.get(estimator, estimator).format(T=objective.T)
    return nats, (words + (", normalised" if args.normalised else "")
                  + ("" if prefix == "none" else f", given a prefix ({prefix})")
                  + (f", blocks of {objective.block_size}" if objective.block_size else ""))


def strata_of(subject, args):
    """The order of a subject's windows by mask rate, for mean_and_error, or None."""
    return by_rate(subject.data.n, args.seed, args.repeats, subject.objective().n_times(subject.data.seq_len))


def likelihood(subject, estimator, args):
    """(nats per token of each window, the line to print, the fields of the JSON object)."""
    start, data = time.perf_counter(), subject.data
    nats, method = nats_of(subject, estimator, args)
    if not nats.isfinite().all():
        raise UserError(f"the likelihood of {subject.path} is not finite: its weights are damaged, or it predicts 0")
    bits, error = mean_and_error(nats / math.log(2), strata_of(subject, args))
    unit = subject.tokenizer.unit
    questions = None if subject.until is None else data.read(slice(None))
    given = prefix_lengths((0, 0) if estimator in ORDERS else subject.config.prefix_range, args.seed, 0,
                           range(data.n), questions, subject.until)
    in_all = nats.numpy() @ (data.seq_len - given) / math.log(2)  # bits of all scored tokens
    counts = sum(np.bincount(data.tokens[i + c:i + data.seq_len], minlength=subject.meta["vocab_size"])
                 for i, c in zip(data.starts, given))
    n_tokens = int(counts.sum())
    n_chars, n_bytes = (int(counts @ lengths) for lengths in subject.tokenizer.lengths())
    if subject.n_bytes is not None:  # bytes of the whole text. Tokens may lose some: the scored ones get a share
        of_all = count_tokens(data.tokens, subject.meta["vocab_size"]) @ subject.tokenizer.lengths()[1]
        n_bytes = n_bytes * (subject.n_bytes / of_all)
    perplexity = 2**bits if bits < 1024 else None  # beyond 1024 a float overflows
    result = {
        "bits_per_token": bits, "stderr": finite(error), "n_sequences": data.n,
        "n_tokens": n_tokens, "bits_per_char": in_all / n_chars, "bits_per_byte": in_all / n_bytes,
        "n_bytes": round(n_bytes), "n_bytes_of_text": subject.n_bytes,
        "perplexity": perplexity, "estimator": method, "dataset": subject.dataset,
        "split": subject.split, "seq_len": data.seq_len, "block_size": subject.config.block_size,
        "repeats": args.repeats,
        "seed": args.seed, "step": subject.step, "weights": "raw" if args.raw else "ema", "checkpoint": subject.path,
        "scored_sha256": digest(dict(sorted(subject.model.named_parameters()))) if args.json else None,
        "seconds": time.perf_counter() - start,
    }
    also = f", {result['bits_per_byte']:.4f} bits per byte" if unit == "token" else ""
    windows = f"{data.n:,} windows" if data.n > 1 else "1 window"
    line = (f"{bits:.4f} {plus_minus(error)} bits per {unit} on {subject.where} ({windows} of {data.seq_len}; "
            f"{method}; step {subject.step:,}; "
            f"perplexity {'above 1e308' if perplexity is None else format(perplexity, ',.2f')}{also})")
    return nats, line, result


def agree(mean, error):
    """Tell whether two estimates agree: their difference, in bits, is at most MAX_ERRORS errors, or is rounding."""
    return abs(mean) <= MAX_ERRORS * error or abs(mean) < ROUNDING


def difference(one, two, by_stratum):
    """Mean of one - two, nats (n,) of the same windows, in bits, and its standard error."""
    return mean_and_error((one - two) / math.log(2), by_stratum)


def score(args, open_subject, out):
    """Score one checkpoint, or compare two, by the bound or along an order. With --check: two estimates of one."""
    one = open_subject(args.checkpoint)
    if args.baselines and (args.n_tokens or args.text or args.seq_len or args.other):
        raise UserError("--baselines needs the whole split and one checkpoint: leave out --n_tokens, --text, --seq_len "
                        "and the second checkpoint")
    if args.baselines and one.meta["tokenizer"] != "char":
        raise UserError("--baselines works only with character data")
    if args.baselines and one.config.prefix != "none":
        raise UserError(f"--baselines scores whole texts, and {one.path} is scored after a prefix "
                        f"({one.config.prefix})")
    if args.order and (args.estimator or args.T or args.repeats > 1):
        raise UserError("--order is exact and has no noise: leave out --estimator, --T and --repeats")
    if args.other:
        if args.check:
            raise UserError("--check takes one checkpoint, not two")
        two = open_subject(args.other)
        if args.text and different_tokens(one, two):
            if args.order:
                raise UserError("--order compares tokens, and these models have different ones: leave it out")
            return compare_on_text(one, two, pick_estimators(one, two, args), args, out)
        check_comparable(one, two, args.dataset or args.text)
        return compare(one, two, args, out)
    if args.check and one.config.objective_class.causal and one.config.prefix != "none":
        raise UserError(f"--check of an autoregressive model needs prefix=none, and {one.path} has {one.config.prefix}")
    if args.check and one.data.n < MIN_WINDOWS:
        raise UserError(f"--check needs at least {MIN_WINDOWS} windows, and there are {one.data.n}: use more "
                        "--n_tokens, a longer text or a shorter --seq_len")
    draws = one.data.n * args.repeats
    if args.check and draws < MIN_DRAWS and not one.config.objective_class.causal:
        raise UserError(f"--check needs at least {MIN_DRAWS} draws of noise, and {one.data.n} windows have {draws}: "
                        f"use --repeats {-(-MIN_DRAWS // one.data.n)}, more --n_tokens or a longer text")
    estimator = pick_estimator(one, args)
    train = one.training_tokens() if args.baselines else None
    nats, line, result = likelihood(one, estimator, args)
    print(line, file=out)
    if args.check:
        another = one.objective(estimator).estimators[estimator]  # an estimator of the same number, or an order
        second_nats, line, second = likelihood(one, another, args)
        mean, error = difference(nats, second_nats, strata_of(one, args))
        verdict = agree(mean, error)
        print(f"{line}\ndifference {mean:.4f} {plus_minus(error)}: they {'agree' if verdict else 'DISAGREE'} "
              f"(more than {max(MAX_ERRORS * error, ROUNDING):.4f} would have been noticed)", file=out)
        result["check"] = {"agree": verdict, "difference": mean, "stderr": error, "second": second}
    if args.baselines:
        result["baselines"] = dict(reference_points(train, one.data.tokens, one.meta["vocab_size"]))
        print(comparison(result, one.tokenizer.unit), file=out)
    return result


def compare(one, two, args, out):
    """Compare two checkpoints on the same windows, and on the same masks if both have masks."""
    estimators = pick_estimators(one, two, args)
    scored = [likelihood(subject, estimator, args) for subject, estimator in zip((one, two), estimators)]
    strata = [strata_of(subject, args) for subject in (one, two)]
    by_stratum = strata[0] if strata[0] is not None else strata[1]  # a trend of one model is one of the difference
    mean, error = difference(scored[1][0], scored[0][0], by_stratum)
    for subject, (_, line, _) in zip((one, two), scored):
        print(f"{subject.path}: {line}", file=out)
    print(f"{two.path} less {one.path}: {mean:+.4f} {plus_minus(error)} bits per {one.tokenizer.unit}, "
          "window by window", file=out)
    return {"models": [result for *_, result in scored], "difference": mean, "difference_stderr": finite(error)}


def comparison(result, unit):
    """A text: the model among the reference points, worst first, and a sentence that says which of them it beats."""
    bits, error, baselines = result["bits_per_token"], result["stderr"] or math.nan, result["baselines"]
    model = "this model (a bound)" if "bound" in result["estimator"] else "this model"
    rows = [(name, value, "") for name, value in baselines.items()] + [(model, bits, " " + plus_minus(error))]
    lines = [f"  {name:24}{value:8.4f}{extra}" for name, value, extra in sorted(rows, key=lambda row: -row[1])]
    beaten = [name for name, value in baselines.items() if bits + (result["stderr"] or 0) < value]
    unbeaten = [name for name in baselines if name not in beaten]
    return "\n".join([f"bits per {unit}, same split, reference points fitted on the train split:", *lines,
                      f"The model beats {', '.join(beaten) or 'none of them'}"
                      + (f"; it does not beat {', '.join(unbeaten)}." if unbeaten else ".")])


def ways(subject, args):
    """Settings for each --sampler and each number of --steps, without duplicates.

    Every sampler gets the flags that it knows. For a flag that none of them knows, settings_of raises UserError."""
    names, found = args.sampler or [None], []
    samplers = subject.config.objective_class.samplers
    knows = {name: SAMPLERS[samplers.get(name or next(iter(samplers)), name)].flags for name in names}
    known = set().union(*knows.values())
    for name, steps in itertools.product(names, args.steps or [None]):
        flags = {flag: value for flag, value in given_flags(args, steps).items()
                 if flag in knows[name] or flag not in known}
        if "k" in flags and len(names) > 1:  # with --k, the steps are for the other samplers
            flags = {flag: value for flag, value in flags.items() if flag not in ("steps", "grid")}
        way = settings_of(args, subject.config, subject.path, subject.model, name, flags)
        if way not in found:  # samplers without steps come once
            found.append(way)
    return found


def quality(subject, args, out):
    """Measure the quality of samples: the mode --samples."""
    drawn = isinstance(args.samples, int)
    if not drawn and (args.sampler or given_flags(args, args.steps) or common_flags(args)):
        raise UserError("--samples FILE draws no samples: leave out the flags of samplers")
    texts = args.samples if drawn else read_samples(args.samples)
    settings = ways(subject, args) if drawn else []
    judge = open_judge(args.judge, subject.data.device, subject.data.dtype) if args.judge else None
    return samples(subject, texts, settings, judge, args.out_dir, args.seed, out, args.mauve)


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    out = sys.stderr if args.json else sys.stdout
    modes = "orders", "curve", "curse", "context", "samples", "answers"
    mode = next((mode for mode in modes if getattr(args, mode)), None)
    if mode and (args.estimator or args.T or args.repeats > 1 or args.baselines or args.normalised or args.block_size):
        raise UserError("--estimator, --T, --repeats, --normalised, --block_size and --baselines are for the bound: "
                        f"leave them out with --{mode}")
    if mode in ("samples", "answers") and args.n_tokens:
        raise UserError(f"--{mode} takes as many windows as it says: leave out --n_tokens")
    if mode == "samples" and args.text:
        raise UserError("--samples compares with the data set: leave out --text")
    if mode != "samples" and args.judge:
        raise UserError("--judge needs --samples")
    if args.mauve:
        if not args.judge:
            raise UserError("--mauve compares the features of a judge: add --samples N and --judge")
        require("mauve", "--mauve")
    if mode not in ("samples", "answers") and (args.sampler or given_flags(args, args.steps) or common_flags(args)):
        raise UserError("the flags of samplers need --samples or --answers")
    if args.out_dir and mode in (None, "orders", "answers"):
        raise UserError("--out_dir needs --curve, --curse, --context or --samples, which write files: leave it out")
    if args.other and mode not in (None, "curse"):
        raise UserError(f"--{mode} takes one checkpoint, not two")

    if mode in ("curve", "curse", "samples"):
        require("matplotlib", f"--{mode}, which draws a picture,")

    def opened(path):
        return open_subject(path, args, device, dtype, None if mode in (None, "samples") else args.answers or 256)

    if mode == "orders":
        result = orders(opened(args.checkpoint), args.orders, args.seed, out)
    elif mode == "curve":
        result = curve(opened(args.checkpoint), args.out_dir, args.seed, out)
    elif mode == "curse":
        subjects = [opened(path) for path in (args.checkpoint, args.other) if path]
        result = curse(subjects, args.out_dir, args.seed, out)
    elif mode == "context":
        result = context(opened(args.checkpoint), args.context, args.out_dir, args.seed, out)
    elif mode == "samples":
        result = quality(opened(args.checkpoint), args, out)
    elif mode == "answers":
        subject = opened(args.checkpoint)
        result = answers(subject, ways(subject, args), args.seed, out)
    else:
        result = score(args, opened, out)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    return int(args.check and not result["check"]["agree"])


if __name__ == "__main__":
    run(main)
