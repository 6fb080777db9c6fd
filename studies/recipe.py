"""The fast recipe at two sizes: which of its choices hold, and how far is it ahead of nanoDD's recipe?

    python data/prepare_gutenberg.py
    python studies/recipe.py out/recipe --jobs 2

The recipes are d3pm_mini (nanoDD's) and mdlm_mini_fast, at 128 x 4 and at 384 x 6. The learning rate of each is tuned
by factors of 2, by the validation of seed 1. Then one setting of the fast recipe is changed at a time: weight decay,
the horizon of the averaged weights, the batch, and head gates. The learning rate goes with the square root of the
batch, and the averaged weights look back on as many characters. All runs see equally many characters. Runs on 50 and
75 % of them show how many the fast recipe needs.

It prints two tables. The first has bits per character of the test split, bounds in continuous time, for both recipes.
The second has the validation of each choice, less that of the recipe with the same seed. Errors are over seeds. It
writes recipe.json, with the sizes and seeds of the last call. Finished runs are not repeated.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import ArgumentParser, run, table, write_file
from configs import CONFIGS
from log import finite
from studies import runs
from studies.runs import over_seeds

RECIPES = {"nanoDD's": "d3pm_mini", "fast": "mdlm_mini_fast"}
SIZES = {"128x4": dict(n_layer=4, n_head=4, n_embd=128), "384x6": dict(n_layer=6, n_head=6, n_embd=384)}
CHOICES = [dict(weight_decay=0.0), dict(weight_decay=0.03), dict(weight_decay=0.3), dict(ema_decay=0.97),
           dict(batch_size=8), dict(batch_size=32), dict(head_gates=False)]
SHARES = 0.5, 0.75, 1.0


class Study:
    def __init__(self, args):
        self.args = args

    def run(self, size, recipe, lr, seed, share=1.0, **settings):
        """(folder, arguments of train.py) of a run on a share of the characters."""
        usual, config = CONFIGS["mdlm_mini_fast"]().batch_size, CONFIGS[RECIPES[recipe]]()
        batch = settings.get("batch_size", config.batch_size)
        steps = round(self.args.steps * share * usual / batch)
        words = [size, RECIPES[recipe], f"lr={lr:g}", f"share={share:g}", *(f"{k}={v:g}" for k, v in settings.items()),
                 seed]
        larger, warmup = batch / config.batch_size, config.warmup_steps / config.max_steps
        settings = SIZES[size] | dict(ema_decay=config.ema_decay ** larger) | settings | dict(
            micro_batch_size=batch, lr=lr * larger ** 0.5, seed=seed, max_steps=steps,
            warmup_steps=max(1, round(warmup * steps)), eval_interval=steps, eval_sequences=1024, sample_interval=0)
        return (self.args.folder / "_".join(map(str, words)),
                [RECIPES[recipe], *(f"--{key}={value}" for key, value in settings.items())])

    def measure(self, size, recipe, lr, seed, choice=None):
        """Train one run, with one of CHOICES by its number. Returns {"val": bits of its validation}."""
        settings = {} if choice is None else CHOICES[choice]
        return runs.validated(*self.run(size, recipe, lr, seed, **settings), self.args)

    def score(self, size, recipe, lr, seed, share):
        """The bits per character of the test split of one run."""
        how = ["--estimator", "exact_k"] if recipe == "nanoDD's" else []  # its own bound is of 1,000 steps
        return runs.trained(*self.run(size, recipe, lr, seed, share), self.args, how=how)["bits"]


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=800)
    p.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes (default: both)")
    args = p.parse_args()
    runs.refuse(args, runs.SIZES + runs.SWEPT)
    runs.make_folder(args.folder, args)
    study, seeds = Study(args), range(1, args.seeds + 1)
    sizes = list(dict.fromkeys(args.sizes))
    kinds = [(size, recipe) for size in sizes for recipe in RECIPES]
    best, _ = runs.tuned(kinds, study.measure, args.jobs)
    rows = [(size, recipe, lr, share) for size, recipe in kinds
            for lr in dict.fromkeys((best[size, recipe], CONFIGS[RECIPES[recipe]]().lr) if recipe == "nanoDD's"
                                    else (best[size, recipe],))
            for share in (SHARES if recipe == "fast" else SHARES[-1:])]
    bits = runs.in_stages([[(*row[:3], seed, row[3]) for seed in seeds for row in rows]], study.score, args.jobs)
    scored, chosen = [], []
    for size, recipe, lr, share in rows:
        mean, error = over_seeds([bits[size, recipe, lr, seed, share] for seed in seeds])
        scored.append({"size": size, "recipe": recipe, "lr": lr, "share": share, "bits": finite(mean), "stderr": error})
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds; "
          f"100 % are the characters of {args.steps:,} steps of mdlm_mini_fast")
    table(scored, {"size": ("", ""), "recipe": ("", ""), "lr": ("lr", "g"), "share": ("characters", ".0%"),
                   "bits": ("bits", ".4f"), "stderr": ("±", ".4f")}, sys.stdout)
    sys.stdout.flush()  # the next table takes long

    changes = [(size, "fast", best[size, "fast"], choice) for size in sizes
               for choice in (None, *range(len(CHOICES)))]
    val = runs.in_stages([[(*change[:3], seed, change[3]) for seed in seeds for change in changes]], study.measure,
                         args.jobs)
    for size, recipe, lr, choice in changes:
        of = lambda choice: [val[size, recipe, lr, seed, choice]["val"] for seed in seeds]
        mean, error = over_seeds([a - b for a, b in zip(of(choice), of(None))])
        row = {"size": size, "change": "nothing", "bits": finite(over_seeds(of(choice))[0])}
        if choice is not None:
            (key, value), = CHOICES[choice].items()
            row |= {"change": f"{key}={value:g}", "more": finite(mean), "stderr": error}
        chosen.append(row)
    print("the fast recipe with one change: bits of the validation, and what they are more than without it")
    table(chosen, {"size": ("", ""), "change": ("", ""), "bits": ("bits", ".4f"), "more": ("more", "+.4f"),
                   "stderr": ("±", ".4f")}, sys.stdout)
    write_file(args.folder / "recipe.json", json.dumps({"recipes": scored, "changes": chosen}) + "\n")


if __name__ == "__main__":
    run(main)
