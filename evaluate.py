"""Score checkpoints: likelihood with its standard error, by several estimators; sample quality; zero-shot.

    python evaluate.py out/demo                                # bits per token on the validation split
    python evaluate.py out/demo out/mdlm_demo --split test     # the difference of two, on the same masks
    python evaluate.py out/demo --check                        # two estimators; exit code 1 if they disagree
    python evaluate.py out/demo --order confidence             # the exact likelihood along an order of reveals
    python evaluate.py out/demo --text book.txt                # any text, zero-shot
    python evaluate.py out/demo --curve                        # cross-entropy by mask rate
    python evaluate.py out/demo --curse                        # what decoding in parallel costs
    python evaluate.py out/demo --context 0,16,64              # what is known of the text before it is worth
    python evaluate.py out/demo --samples 64 --steps 8,32,128 --judge out/ar_demo

A masked model's number is an upper bound on its -log2 p(x), averaged over non-overlapping windows of the whole split.
The standard error is that of the mean over windows: it covers the noise of the estimate and the choice of text.
"""

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import load_model
from cli import ArgumentParser, UserError, named, number, pick_device, pick_dtype, run
from data.loader import SPLITS, check_same_data, load_meta, load_split, recode, windows
from data.prepare import read_text
from data.tokenizer import TEXT8_ALPHABET, make_tokenizer, text8_words
from diffusion import WHOLE, Absorbing
from likelihood import ORDERS, bound, by_rate, chain_rule_of, mean_and_error, plus_minus
from randomness import prefix_lengths
from sampler_flags import add_arguments, cuts, given_flags, steps_flag
from storage import add_hints, hints_of
from studies.baselines import reference_points
from studies.curves import context, curse, curve, variance
from studies.quality import samples

ESTIMATORS = {
    "exact_k": "continuous-time bound, exact k", "continuous": "continuous-time bound, independent masks",
    "t_step": "T-step bound, T = {T}", "t_step_uniform": "T-step bound, T = {T}, uniform steps",
    "rates": "continuous-time bound, uniform noise",
    "flatter_rates": "continuous-time bound, uniform noise, flatter rates",
    "chain_rule": "negative log-likelihood, chain rule",
}
LIMIT = 4         # standard errors by which two estimates of one number may differ, if these are known from
LEAST = 30        # windows at least
ROUNDING = 1e-4   # bits by which they may in any case


def several_steps(text):
    """An argparse type: 8,16,auto -> [8, 16, "auto"]."""
    return [steps_flag(part) for part in text.split(",")]


def lengths(text):
    """An argparse type: 0,16,64 -> [0, 16, 64]."""
    return sorted({number(int, 0)(part) for part in text.split(",")})


def samples_flag(text):
    """An argparse type: a number of samples, or the name of a file of them."""
    return number(int, 1, 10**6)(text) if text.isdecimal() else named(text)


def samplers(text):
    """An argparse type: names of samplers, separated by commas."""
    unknown = [name for name in text.split(",") if name not in Absorbing.samplers]
    if unknown:
        raise UserError(f"--sampler {unknown[0]!r} is none of {', '.join(Absorbing.samplers)}")
    return text.split(",")


def parse_args():
    p = ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", help="a file, a folder or hf://owner/name; of other projects, too")
    p.add_argument("other", nargs="?", type=named, help="another checkpoint to compare with")
    data = p.add_argument_group("on what")
    data.add_argument("--split", choices=SPLITS, help="default: val")
    data.add_argument("--dataset", help="data set to score on (default: the one that the checkpoint was trained on)")
    data.add_argument("--data_dir", default="", help="folder of data sets (default: the one trained on)")
    data.add_argument("--text", type=named, metavar="FILE", help="score this text (plain, .gz or .xz) instead")
    data.add_argument("--seq_len", type=number(int, 1), help="tokens per window (default: as trained; not more)")
    data.add_argument("--n_tokens", type=number(int, 1),
                      help="about this many tokens, in windows spread over the split (default: all of it; for --curve, "
                           "--curse and --context 256 windows)")
    how = p.add_argument_group("likelihood")
    how.add_argument("--estimator", choices=[name for name in ESTIMATORS if name != "chain_rule"],
                     help="default: t_step for d3pm, exact_k for other masked models, rates for uniform noise")
    how.add_argument("--normalised", action="store_true",
                     help="sedd: score the normalised prediction, a tighter bound than the score entropy trained with")
    how.add_argument("--T", type=number(int, 1, 10**7), help="steps of the T-step bound (default: the checkpoint's)")
    how.add_argument("--repeats", type=number(int, 1, 10**4), default=1,
                     help="draws of the noise per window (default 1)")
    how.add_argument("--baselines", action="store_true",
                     help="also n-grams and lzma on the same split (character data)")
    modes = p.add_argument_group("instead of the bound").add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true",
                       help="estimate the bound in two ways; exit code 1 if they disagree beyond their errors")
    modes.add_argument("--order", choices=ORDERS,
                       help="the exact likelihood when tokens are revealed one by one in this order; slow")
    modes.add_argument("--curve", action="store_true", help="cross-entropy by mask rate; writes curve.json, curve.png")
    modes.add_argument("--curse", action="store_true",
                       help="price of predicting tokens in parallel; writes curse.json, curse.png")
    modes.add_argument("--context", type=lengths, metavar="0,16,64",
                       help="bits of the same text after so many tokens of context; writes context.json")
    modes.add_argument("--variance", action="store_true",
                       help="noise of several estimators with 64 network calls on 8 windows; slow")
    modes.add_argument("--samples", type=samples_flag, metavar="N|FILE",
                       help="quality of N samples, or of those in FILE; writes quality.csv (N: and quality.png)")
    p.add_argument("--trials", type=number(int, 2, 10**6), help="of --variance (default 200)")
    q = p.add_argument_group("--samples")
    q.add_argument("--judge", type=named, metavar="CKPT|hf://NAME",
                   help="autoregressive checkpoint, or model of transformers, that reads the samples")
    q.add_argument("--steps", type=several_steps,
                   help="steps of sampling, such as 8,32,auto (default: the config's T)")
    q.add_argument("--sampler", type=samplers,
                   help=f"of {', '.join(Absorbing.samplers)}, several with commas (default ancestral)")
    add_arguments(p)
    add_hints(p)
    p.add_argument("--raw", action="store_true", help="the raw weights instead of their moving average")
    p.add_argument("--batch_size", type=number(int, 1), default=32, help="windows per network call (default 32)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (default 0)")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first one there is)")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                   help="default: bfloat16 where fast")
    p.add_argument("--out_dir", type=Path, help="folder of what is written (default: the checkpoint's)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    args = p.parse_args()
    if args.text and args.split:
        raise UserError("--text is scored instead of a split: leave out --split")
    args.split = args.split or "val"
    return args


# ---- what is scored --------------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A checkpoint and what it is scored on."""

    path: str
    model: torch.nn.Module
    config: object
    meta: dict
    step: int
    tokenizer: object
    dataset: str          # name of the data set, or of the text file
    where: str            # the same in words
    data_dir: str
    tokens: np.ndarray    # (n,)
    starts: np.ndarray    # of the windows
    seq_len: int

    def windows(self, batch_size, device, dtype):
        """The arguments that all measurements share."""
        return self.tokens, self.starts, self.seq_len, batch_size, device, dtype

    def split(self, name):
        """All tokens of a split of the data set, in the checkpoint's ids."""
        meta = load_meta(self.dataset, self.data_dir)
        return recode(load_split(self.dataset, name, 1, self.data_dir), meta, self.meta, self.dataset)

    def output(self, folder, name):
        """Where a study is written: in folder, or the checkpoint's. Raises UserError if there is no such folder."""
        path = Path(self.path)
        if self.path.startswith("hf://") and not folder:
            raise UserError(f"say with --out_dir where to write what is found out about {self.path}")
        folder = folder or (path if path.is_dir() else path.parent)
        if not folder.is_dir():
            raise UserError(f"--out_dir {folder} is no folder")
        return folder / name

    def masked_only(self, flag):
        objective = self.config.objective_class
        if not objective.any_order:
            raise UserError(f"{self.path} {objective.description}: {flag} is for masked models")

    def whole_windows(self, flag):
        if self.config.prefix_range[0]:
            raise UserError(f"{self.path} needs a prefix ({self.config.prefix}), and {flag} scores whole windows")

    def objective(self, estimator=None, T=None):
        config = self.config
        if estimator in ("t_step", "t_step_uniform"):
            config = replace(config, objective="d3pm", T=T or config.T, weighting="nelbo", time_sampling="uniform")
        return config.make_objective(self.meta["vocab_size"])


def open_subject(path, args, device):
    """Load a checkpoint and what to score it on. Raises UserError for what does not fit together."""
    model, config, meta, step = load_model(path, device, hints_of(args), args.raw)
    seq_len = args.seq_len or config.seq_len
    if seq_len > config.seq_len:
        raise UserError(f"--seq_len={seq_len} is longer than the {config.seq_len} tokens that {path} was trained on")
    if seq_len <= config.prefix_range[1]:
        raise UserError(f"--seq_len={seq_len} leaves nothing after the prefix that {path} needs ({config.prefix})")
    if args.normalised:
        if not config.objective_class.normalised:
            raise UserError(f"--normalised is for score entropy with masks, and {path} has another objective")
        config = replace(config, objective=config.objective_class.normalised)
    tokenizer = make_tokenizer(meta)
    dataset, data_dir = args.dataset or config.dataset, args.data_dir or config.data_dir
    if args.text and args.dataset and "sha256" in meta:
        raise UserError("--text is scored instead of a data set: leave out --dataset")
    if args.text:
        text, how = read_text(args.text), "as it stands"
        if meta.get("alphabet") == TEXT8_ALPHABET:
            text, how = " ".join(text8_words(text)), "in text8's 27 symbols"
        tokens = tokenizer.encode(text)
        if len(tokens) < seq_len:
            raise UserError(f"{args.text} has {len(tokens):,} tokens, fewer than one window of {seq_len}: "
                            f"use a longer text{f' or --seq_len={len(tokens)}' if len(tokens) else ''}")
        dataset = args.text
        where = f"{args.text} ({how}, no detokenisation; the last {len(tokens) % seq_len} tokens left out)"
    else:
        tokens = recode(load_split(dataset, args.split, seq_len, data_dir), load_meta(dataset, data_dir), meta, dataset)
        where = f"{dataset} {args.split}"
    n_windows = args.n_tokens and max(1, round(args.n_tokens / seq_len))
    if args.curve or args.curse or args.context:
        n_windows = n_windows or 256
    return Subject(path, model, config, meta, step, tokenizer, dataset, where, data_dir, tokens,
                   windows(tokens, seq_len, n_windows), seq_len)


def check_comparable(one, two, named_data):
    """Raise UserError unless two subjects are scored on the same windows of data that neither was chosen for."""
    for key in ("tokenizer", "alphabet", "vocab_size"):
        if one.meta.get(key) != two.meta.get(key):
            raise UserError(f"{one.path} and {two.path} have different data: their {key}s are {one.meta.get(key)!r} "
                            f"and {two.meta.get(key)!r}, so that their bits per token are of different things")
    if one.dataset != two.dataset:
        raise UserError(f"{one.path} and {two.path} have different data ({one.dataset} and {two.dataset}): "
                        "name the one to score both on with --dataset")
    if one.config.prefix_range != two.config.prefix_range:
        raise UserError(f"{one.path} and {two.path} are scored given different prefixes ({one.config.prefix} and "
                        f"{two.config.prefix}): score each with --context")
    if not named_data and "sha256" in one.meta and "sha256" in two.meta:
        check_same_data(one.meta, two.meta, one.dataset, two.path)
    if not np.array_equal(one.tokens, two.tokens):
        raise UserError(f"{one.path} and {two.path} have different data under the name of {one.dataset}: "
                        "say with --data_dir which to score both on")
    if one.seq_len != two.seq_len:
        raise UserError(f"{one.path} and {two.path} have windows of {one.seq_len} and {two.seq_len} tokens: "
                        f"choose --seq_len={min(one.seq_len, two.seq_len)} for both")


# ---- likelihood ------------------------------------------------------------------------------------------------------


def pick_estimator(subject, args):
    """The estimator asked for, or the one that belongs to the checkpoint's objective."""
    objective = subject.objective()
    estimator = args.estimator or ("t_step" if args.T else objective.reported)
    if args.T and not estimator.startswith("t_step"):
        raise UserError(f"--T belongs to the T-step bound, not to --estimator {estimator}")
    if objective.causal and estimator != objective.reported:
        raise UserError(f"{subject.path} {objective.description}: its likelihood is exact; leave out --estimator and "
                        "--T")
    if estimator.startswith("t_step"):
        if subject.config.schedule not in WHOLE:
            raise UserError(f"{subject.path} has schedule={subject.config.schedule}, which does not go all the way "
                            "from text to noise, and hence no T-step bound: leave out --T and --estimator")
    elif estimator not in objective.estimators:
        raise UserError(f"--estimator {estimator} is not for {subject.path}: choose "
                        f"{' or '.join(objective.estimators)}")
    return estimator


def second_of(subject, estimator):
    """What estimates the same number in another way: an estimator, or an order."""
    return subject.objective(estimator).estimators[estimator]


def nats_of(subject, estimator, args, device, dtype):
    """Nats per token of each window by an estimator or along an order (n,), and the name of the method."""
    settings = subject.windows(args.batch_size, device, dtype)
    if estimator in ORDERS:
        objective = subject.objective()
        subject.whole_windows("the likelihood along an order")
        if not objective.causal:
            subject.masked_only("--order")
        elif estimator != "l2r":
            raise UserError(f"{subject.path} {objective.description} and knows one order: --order l2r")
        return (chain_rule_of(subject.model, objective, *settings, estimator, args.seed, show=True),
                f"negative log-likelihood, order {estimator}")
    objective, prefix = subject.objective(estimator, args.T), subject.config.prefix
    nats = bound(subject.model, objective, *settings, seed=args.seed, repeats=args.repeats, estimator=estimator,
                 prefix=subject.config.prefix_range, show=True)
    return nats, (ESTIMATORS[estimator].format(T=getattr(objective, "T", None)) + ", normalised" * args.normalised
                  + ("" if prefix == "none" else f", given a prefix ({prefix})"))


def likelihood(subject, estimator, args, device, dtype):
    """(nats per token of each window, the line to print, the fields of the JSON object)."""
    start = time.perf_counter()
    nats, method = nats_of(subject, estimator, args, device, dtype)
    if not nats.isfinite().all():
        raise UserError(f"{subject.path} gives no finite likelihood: its weights are broken, or predict zero somewhere")
    bits, error = mean_and_error(nats / math.log(2), by_rate(len(nats), args.seed, args.repeats))
    unit = subject.tokenizer.unit
    given = prefix_lengths((0, 0) if estimator in ORDERS else subject.config.prefix_range, args.seed, 0,
                           range(len(subject.starts)))
    counts = sum(np.bincount(subject.tokens[i + c:i + subject.seq_len], minlength=subject.meta["vocab_size"])
                 for i, c in zip(subject.starts, given))
    n_tokens = int(counts.sum())
    n_chars, n_bytes = (int(counts @ lengths) for lengths in subject.tokenizer.lengths())
    perplexity = 2**bits if bits < 1024 else None  # beyond, a float has no number for it
    result = {
        "bits_per_token": bits, "stderr": None if math.isnan(error) else error, "n_sequences": len(subject.starts),
        "n_tokens": n_tokens, "bits_per_char": bits * n_tokens / n_chars, "bits_per_byte": bits * n_tokens / n_bytes,
        "perplexity": perplexity, "estimator": method, "dataset": subject.dataset,
        "split": None if args.text else args.split, "seq_len": subject.seq_len, "repeats": args.repeats,
        "seed": args.seed, "step": subject.step, "weights": "raw" if args.raw else "ema", "checkpoint": subject.path,
        "seconds": time.perf_counter() - start,
    }
    also = "" if unit == "char" else f", {result['bits_per_byte']:.4f} bits per byte"
    line = (f"{bits:.4f} {plus_minus(error)} bits per {unit} on {subject.where} ({len(subject.starts):,} windows of "
            f"{subject.seq_len}; {method}; step {subject.step:,}; "
            f"perplexity {'above 1e308' if perplexity is None else format(perplexity, ',.2f')}{also})")
    return nats, line, result


def agree(mean, error):
    """Whether a difference of two estimates of the same number, in bits, is within its error, or rounding."""
    return abs(mean) <= LIMIT * error or abs(mean) < ROUNDING


def difference(one, two, args):
    """Mean of one - two in bits, and its standard error, for nats (n,) of the same windows each."""
    return mean_and_error((one - two) / math.log(2), by_rate(len(one), args.seed, args.repeats))


def score(args, device, dtype, out):
    """The bound, or the likelihood along an order, of one or two checkpoints, or two estimates of one."""
    one = open_subject(args.checkpoint, args, device)
    if args.baselines and (args.n_tokens or args.text or args.seq_len or args.other):
        raise UserError("--baselines are scored on the whole split, beside one checkpoint: leave out --n_tokens, "
                        "--text and --seq_len")
    if args.baselines and one.meta["tokenizer"] != "char":
        raise UserError("--baselines is for character data")
    if args.order and (args.estimator or args.T or args.repeats > 1):
        raise UserError("--order is exact and has no noise: leave out --estimator, --T and --repeats")
    if args.other:
        if args.check:
            raise UserError("--check is for one checkpoint")
        two = open_subject(args.other, args, device)
        check_comparable(one, two, args.dataset or args.text)
        return compare(one, two, args, device, dtype, out)
    if args.check and one.config.objective_class.causal and one.config.prefix != "none":
        raise UserError(f"--check of an autoregressive model scores whole windows, not after {one.config.prefix}")
    if args.check and len(one.starts) < LEAST:
        raise UserError(f"--check needs at least {LEAST} windows, and here are {len(one.starts)}: more --n_tokens, a "
                        "longer text or a shorter --seq_len")
    estimator = args.order or pick_estimator(one, args)
    nats, line, result = likelihood(one, estimator, args, device, dtype)
    print(line, file=out)
    if args.check:
        second_nats, line, second = likelihood(one, second_of(one, estimator), args, device, dtype)
        mean, error = difference(nats, second_nats, args)
        verdict = agree(mean, error)
        print(f"{line}\ndifference {mean:.4f} {plus_minus(error)}: they {'agree' if verdict else 'DISAGREE'} "
              f"(more than {max(LIMIT * error, ROUNDING):.4f} would have been noticed)", file=out)
        result["check"] = {"agree": verdict, "difference": mean, "stderr": error, "second": second}
    if args.baselines:
        train = one.split("train")
        result["baselines"] = dict(reference_points(train, one.tokens, one.meta["vocab_size"]))
        print(comparison(result, one.tokenizer.unit), file=out)
    return result


def compare(one, two, args, device, dtype, out):
    """Two checkpoints on the same windows, and the same masks where both have masks."""
    estimators = [args.order or pick_estimator(subject, args) for subject in (one, two)]
    if set(estimators) == {"t_step", "exact_k"} and all(s.config.objective_class.any_order for s in (one, two)):
        estimators = ["exact_k", "exact_k"]  # d3pm against mdlm: what can be compared
    scored = [likelihood(subject, estimator, args, device, dtype)
              for subject, estimator in zip((one, two), estimators)]
    mean, error = difference(scored[1][0], scored[0][0], args)
    for subject, (_, line, _) in zip((one, two), scored):
        print(f"{subject.path}: {line}", file=out)
    print(f"{two.path} less {one.path}: {mean:+.4f} {plus_minus(error)} bits per {one.tokenizer.unit}, "
          "window by window", file=out)
    return {"models": [result for *_, result in scored], "difference": mean,
            "difference_stderr": None if math.isnan(error) else error}


def comparison(result, unit):
    """The model among the reference points, worst first, and in words which of them it beats."""
    bits, error, baselines = result["bits_per_token"], result["stderr"] or math.nan, result["baselines"]
    name = "this model (a bound)" if "bound" in result["estimator"] else "this model"
    rows = [(name, value, "") for name, value in baselines.items()] + [(name, bits, " " + plus_minus(error))]
    error = result["stderr"] or 0
    lines = [f"  {name:24}{value:8.4f}{extra}" for name, value, extra in sorted(rows, key=lambda row: -row[1])]
    beaten = [name for name, value in baselines.items() if bits + error < value]
    unbeaten = [name for name in baselines if name not in beaten]
    return "\n".join([f"bits per {unit}, same split, reference points fitted on the train split:", *lines,
                      f"The model beats {', '.join(beaten) or 'none of them'}"
                      + (f"; it does not beat {', '.join(unbeaten)}." if unbeaten else ".")])


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    out = sys.stderr if args.json else sys.stdout
    study_of = {"curve": curve, "context": context, "variance": variance, "samples": samples}
    mode = next((mode for mode in (*study_of, "curse") if getattr(args, mode)), None)
    if mode and (args.estimator or args.T or args.repeats > 1 or args.baselines or args.normalised):
        raise UserError("--estimator, --T, --repeats, --normalised and --baselines belong to the bound, not to "
                        f"--{mode}")
    if mode == "samples" and args.text:
        raise UserError("--samples are compared with the data set: leave out --text")
    if mode != "samples" and (args.judge or args.sampler or given_flags(args, args.steps) or cuts(args)):
        raise UserError("--judge and the flags of samplers go with --samples")
    if args.out_dir and mode not in ("curve", "curse", "context", "samples"):
        raise UserError("--out_dir goes with --curve, --curse, --context and --samples, which write files")
    if args.trials and mode != "variance" or args.n_tokens and mode == "variance":
        raise UserError("--trials goes with --variance, which has 8 windows whatever --n_tokens says")
    if mode == "curse":
        subjects = [open_subject(path, args, device) for path in (args.checkpoint, args.other) if path]
        result = curse(subjects, args, device, dtype, out)
    elif mode:
        if args.other:
            raise UserError(f"--{mode} is for one checkpoint")
        result = study_of[mode](open_subject(args.checkpoint, args, device), args, device, dtype, out)
    else:
        result = score(args, device, dtype, out)
    if args.json:
        print(json.dumps(result, allow_nan=False))
    if not result.get("check", {"agree": True})["agree"]:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
