"""Bits per token of a checkpoint on a split of its data set, with a standard error.

    python evaluate.py out/demo                     # the validation split
    python evaluate.py out/demo --split test --json

Every number is an upper bound on -log2 p(x) of the model, averaged over non-overlapping windows of the whole split. It
is estimated with one network call per window and repeat; the standard error is that of the mean over windows, so it
covers the noise of the estimate and of the choice of text.
"""

import json
import math
import sys
import time

import torch

from baselines import reference_points
from checkpoint import load_model
from cli import ArgumentParser, UserError, autocast, number, pick_device, pick_dtype, progress, run
from data.loader import SPLITS, check_same_tokens, gather, load_meta, load_split, windows
from noise import uniforms


@torch.no_grad()
def bound(model, objective, tokens, starts, seq_len, batch_size, device, dtype, mine=None, seed=0, repeats=1,
          show=False):
    """The bound on windows `mine` (default: all) of the tokens: (len(mine),) float64, nats per token.

    The noise of window i depends on (seed, i) alone and is stratified over all windows, so two models, or two steps of
    training, are compared on the same masks.
    """
    mine = list(range(len(starts)) if mine is None else mine)
    total = torch.zeros(len(mine), dtype=torch.float64)
    with progress(total=repeats * len(mine), desc="evaluating", unit="seq", leave=False, show=show) as bar:
        for repeat in range(repeats):
            for i in range(0, len(mine), batch_size):
                chunk = mine[i:i + batch_size]
                x0 = gather(tokens, starts[chunk], seq_len).to(device)
                u, v = uniforms(seed, repeat, chunk, len(starts), seq_len, stratified=True)
                with autocast(device, dtype):
                    nelbo = objective.nelbo(model, x0, objective.noise_low_variance(u, v).to(device))
                total[i:i + batch_size] += nelbo.cpu().double() / repeats
                bar.update(len(chunk))
    return total


def mean_and_error(values):
    """Mean of n independent values (n,) and its standard error (nan if n = 1)."""
    error = (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
    return values.mean().item(), error


def parse_args():
    p = ArgumentParser(description=__doc__)
    p.add_argument("checkpoint", help="a file, or a folder with ckpt.pt (nanoDD's ckpt.pt works as well)")
    p.add_argument("--split", choices=SPLITS, default="val", help="default: val")
    p.add_argument("--n_tokens", type=number(int, 1),
                   help="stop after about this many tokens (default: the whole split)")
    p.add_argument("--repeats", type=number(int, 1), default=1, help="draws of the noise per window (default 1)")
    p.add_argument("--dataset", help="data set to score on (default: the one that the checkpoint was trained on)")
    p.add_argument("--data_dir", default="", help="folder of data sets (default: the one trained on)")
    p.add_argument("--raw", action="store_true", help="the raw weights instead of their moving average")
    p.add_argument("--batch_size", type=number(int, 1), default=32, help="windows per network call (default 32)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the noise (default 0)")
    p.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first one there is)")
    p.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                   help="default: bfloat16 where fast")
    p.add_argument("--baselines", action="store_true", help="also n-grams and lzma on the same split (character data)")
    p.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return p.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.baselines and args.n_tokens:
        raise UserError("--baselines are scored on the whole split: leave out --n_tokens")
    model, config, meta, step = load_model(args.checkpoint, device, args.dataset, args.raw)
    dataset, data_dir = args.dataset or config.dataset, args.data_dir or config.data_dir
    check_same_tokens(meta, load_meta(dataset, data_dir), dataset)
    if args.baselines and meta["tokenizer"] != "char":
        raise UserError("--baselines is for character data")
    tokens = load_split(dataset, args.split, config.seq_len, data_dir)
    limit = args.n_tokens and max(1, round(args.n_tokens / config.seq_len))
    starts = windows(tokens, config.seq_len, limit)

    start = time.perf_counter()
    objective = config.make_objective(meta["vocab_size"])
    nats = bound(model, objective, tokens, starts, config.seq_len, args.batch_size, device,
                 pick_dtype(device, args.dtype), seed=args.seed, repeats=args.repeats, show=True)
    bits, error = mean_and_error(nats / math.log(2))
    unit = "char" if meta["tokenizer"] == "char" else "token"
    estimator = {"d3pm": f"T-step bound, T = {config.T}", "mdlm": "continuous-time bound, exact k",
                 "ar": "negative log-likelihood, chain rule"}[config.objective]
    result = {
        "bits_per_token": bits, "stderr": None if math.isnan(error) else error, "n_sequences": len(starts),
        "n_tokens": len(starts) * config.seq_len, "estimator": estimator, "dataset": dataset, "split": args.split,
        "seq_len": config.seq_len, "repeats": args.repeats, "seed": args.seed, "step": step,
        "weights": "raw" if args.raw else "ema", "checkpoint": args.checkpoint, "seconds": time.perf_counter() - start,
    }
    line = (f"{bits:.4f} ± {error:.4f} bits per {unit} on {dataset} {args.split} "
            f"({len(starts):,} windows of {config.seq_len}; {estimator}; step {step:,})")
    out = sys.stderr if args.json else sys.stdout
    print(line, file=out)
    if args.baselines:
        train = load_split(dataset, "train", 1, data_dir)
        result["baselines"] = dict(reference_points(train, tokens, meta["vocab_size"]))
        print(comparison(bits, error, result["baselines"], unit), file=out)
    if args.json:
        print(json.dumps(result))


def comparison(bits, error, baselines, unit):
    """The model among the reference points, worst first, and in words which of them it beats."""
    rows = ([(name, value, "") for name, value in baselines.items()]
            + [("this model (a bound)", bits, f" ± {error:.4f}")])
    lines = [f"  {name:24}{value:8.4f}{extra}" for name, value, extra in sorted(rows, key=lambda row: -row[1])]
    margin = 0 if math.isnan(error) else error
    beaten = [name for name, value in baselines.items() if bits + margin < value]
    unbeaten = [name for name in baselines if name not in beaten]
    return "\n".join([f"bits per {unit}, same split, reference points fitted on the train split:", *lines,
                      f"The model beats {', '.join(beaten) or 'none of them'}"
                      + (f"; it does not beat {', '.join(unbeaten)}." if unbeaten else ".")])


if __name__ == "__main__":
    run(main)
