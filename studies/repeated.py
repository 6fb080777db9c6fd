"""Train on repeated data: does masked diffusion overtake left-to-right training when text is scarce?

    python studies/repeated.py out/repeated --jobs 2

Both are trained on the same 200,000 characters (--unique_tokens), again and again, for 1 to 128 epochs, by two networks
of mdlm_mini_fast: 0.2M and 0.8M parameters. Equal epochs are equal tokens and, but for the output layer, equal
operations. Both are scored on the same windows of the test split: left to right exactly, diffusion by its bound, so it
can only be better than it looks. A run is scored at its best checkpoint, which 16 validations choose. In a long run
they are far apart, and a network that overfits early is caught too late. So the figure, and the number of epochs at
which the lines cross, have the best of all runs of up to so many epochs, chosen by validation.

Each is tuned on its own, by its validations: learning rate, dropout and weight decay with 16 epochs and one seed;
dropout and weight decay once more with 64 epochs, for the runs of 32 epochs and more. It prints the tables and the
number of epochs at which the lines cross, and writes repeated.json and repeated.png. Finished runs are not repeated.
"""

import itertools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import ArgumentParser, number, numbers, require, run, table, write_file
from log import finite
from plot import picture
from studies import runs
from studies.runs import over_seeds

SIZES = {"0.2M": ["--n_embd=64", "--n_head=2"], "0.8M": []}
KINDS = {"left to right": ["--objective=ar", "--weighting=nelbo", "--time_sampling=uniform"], "diffusion": []}
FEW = [dict(lr=lr, dropout=dropout, weight_decay=decay) for lr, dropout, decay in itertools.product(
    (1.5e-3, 3e-3, 6e-3), (0.0, 0.1, 0.3), (0.1, 1.0))]
MANY = [dict(dropout=dropout, weight_decay=decay) for dropout, decay in itertools.product((0.1, 0.3, 0.5), (0.1, 1.0))]
TUNED_AT = 16, 64  # epochs of the two rounds of tuning
TOKENS = 16 * 128  # of a step


class Study:
    def __init__(self, args):
        self.args = args

    def measure(self, kind, size, epochs, seed, settings):
        """Train one run, or continue it; settings: pairs. Returns {"bits": per character on the test split, "val": its
        best validation}."""
        config = dict(settings)
        steps = round(epochs * self.args.unique / TOKENS)
        words = "_".join(f"{key}={value:g}" for key, value in config.items())
        out = self.args.folder / f"{kind.replace(' ', '_')}_{size}_{epochs}_{words}_{seed}"
        flags = ["mdlm_mini_fast", "--sample_interval=0", "--eval_sequences=512", *SIZES[size], *KINDS[kind],
                 f"--unique_tokens={self.args.unique}", f"--seed={seed}", f"--max_steps={steps}",
                 f"--warmup_steps={max(1, min(100, steps // 10))}", f"--eval_interval={math.ceil(steps / 16)}",
                 *(f"--{key}={value}" for key, value in config.items())]
        return runs.trained(out, flags, self.args, best=True)

    def tune(self):
        """{(kind, size, whether epochs are many): settings as pairs}, those with the best validation; and all runs."""
        pairs = [(kind, size) for size in SIZES for kind in KINDS]
        few = [(*pair, TUNED_AT[0], 1, tuple(settings.items())) for pair in pairs for settings in FEW]
        found = runs.in_stages([few], self.measure, self.args.jobs)
        choose = lambda keys, pair: min((key for key in keys if key[:2] == pair), key=lambda key: found[key]["val"])[4]
        best = {(*pair, False): choose(few, pair) for pair in pairs}
        many = [(*pair, TUNED_AT[1], 1, tuple((dict(best[*pair, False]) | settings).items()))
                for pair in pairs for settings in MANY]
        found |= runs.in_stages([many], self.measure, self.args.jobs)
        best |= {(*pair, True): choose(many, pair) for pair in pairs}
        return best, found


def crossing(one, two):
    """The x at which the line `two` falls below `one`, by interpolation in log x, and stays there; None if it does not.

    one, two: [(x, y)] with the same x.
    """
    gaps = [(x, b - a) for (x, a), (_, b) in zip(one, two)]
    if not all(math.isfinite(gap) for _, gap in gaps) or gaps[-1][1] >= 0:
        return None
    last = max((i for i, (_, gap) in enumerate(gaps) if gap >= 0), default=None)
    if last is None:
        return gaps[0][0]
    (x0, g0), (x1, g1) = gaps[last:last + 2]
    return math.exp(math.log(x0) + math.log(x1 / x0) * g0 / (g0 - g1))


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=0)
    p.add_argument("--unique", type=number(int, 16 * TOKENS), default=200_000,  # 16 steps, each before a validation
                   help="characters to train on (default 200,000)")
    p.add_argument("--epochs", type=numbers(int, 1), default=[1, 4, 16, 64, 128],
                   help="numbers of epochs (default 1,4,16,64,128)")
    args = p.parse_args()
    require("matplotlib", "a picture")
    runs.refuse(args, ("n_embd", "n_head", "seq_len", "batch_size", "dropout", "weight_decay", *runs.SWEPT))
    runs.make_folder(args.folder, args)
    study, seeds, epochs = Study(args), range(1, args.seeds + 1), args.epochs
    best, tried = study.tune()
    key = lambda kind, size, n, seed: (kind, size, n, seed, best[kind, size, n >= 2 * TUNED_AT[0]])
    keys = [key(kind, size, n, seed) for seed in seeds for size in SIZES for kind in KINDS for n in epochs]
    found = runs.in_stages([keys], study.measure, args.jobs)

    print(f"tuned with {TUNED_AT[0]} and {TUNED_AT[1]} epochs, seed 1; bits per character on {args.dataset} test")
    table([{"kind": kind, "size": size, "epochs": TUNED_AT[many], "settings": "  ".join(
        f"{name} {value:g}" for name, value in settings)} for (kind, size, many), settings in best.items()],
          {"size": ("", ""), "kind": ("", ""), "epochs": ("epochs", "d"), "settings": ("best of all tried", "")},
          sys.stdout)

    def up_to(kind, size, n, seed):
        """The bits of the run with the best validation among those of up to n epochs."""
        tried = [found[key(kind, size, m, seed)] for m in epochs if m <= n]
        return min(tried, key=lambda result: result["val"])["bits"]

    rows, series = [], {}
    for size in SIZES:
        for kind in KINDS:
            series[f"{kind}, {size}"] = [(n, *over_seeds([up_to(kind, size, n, seed) for seed in seeds]))
                                         for n in epochs]
            for n, best_bits, best_error in series[f"{kind}, {size}"]:
                bits, error = over_seeds([found[key(kind, size, n, seed)]["bits"] for seed in seeds])
                rows.append({"size": size, "kind": kind, "epochs": n, "bits": finite(bits), "stderr": error,
                             "best": finite(best_bits), "best_stderr": best_error})
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds, "
          f"{args.unique:,} characters of training text")
    table(rows, {"size": ("", ""), "kind": ("", ""), "epochs": ("epochs", "d"), "bits": ("bits", ".4f"),
                 "stderr": ("±", ".4f"), "best": ("best up to here", ".4f"), "best_stderr": ("±", ".4f")}, sys.stdout)
    crossings = {}
    for size in SIZES:
        by_seed = [crossing(*([(n, up_to(kind, size, n, seed)) for n in epochs] for kind in KINDS)) for seed in seeds]
        crossings[size] = by_seed
        print(f"{size}: diffusion is better from this number of epochs on, by seed: "
              + ", ".join(f"not up to {epochs[-1]}" if x is None else f"{x:.0f}" for x in by_seed))
    picture(args.folder / "repeated.png", series, f"epochs of {args.unique:,} characters", "bits per character (test)",
            log_x=True)
    write_file(args.folder / "repeated.json", json.dumps({"rows": rows, "crossings": crossings, "tried": [
        [*key[:4], dict(key[4]), finite(result["val"])] for key, result in tried.items()]}) + "\n")


if __name__ == "__main__":
    run(main)
