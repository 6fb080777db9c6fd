"""Compute against bits: which method needs how many operations for equal bits?

    python studies/frontier.py out/frontier --jobs 2

D3PM (nanoDD's objective and optimiser), the fast recipe of MDLM, block diffusion in blocks of 16, and left to right,
each at sizes from 0.2M to 10M parameters with some budgets of operations C (model.DiT.flops, recomputation not
counted). A budget gives each size its number of steps. The learning rate of each method and size is tuned by factors of
2, by the validation of seed 1 with the last budget but one. Then seed 1 trains all sizes with all budgets. For each
method and budget, the other seeds train the two sizes that have the best validation with seed 1. All bits of masked
models are bounds in continuous time.

For each method and budget, the best size gives a point of the frontier. The ratio says how many times the operations a
method needs for equal bits: its largest budget, divided by the operations with which left to right has the same bits.
These are read off the frontier of left to right, by a line between neighbouring points in log C. There is no ratio
where the smallest budget of left to right brings fewer bits already. Small budgets cost little, so --budgets should
begin low. The slope says what ten times the operations bring: it is that of a line of bits against log10 C, fitted to
the last three points. Ratio and slope are computed for each seed, too.

It writes frontier.json and frontier.png. Finished runs are not repeated.
"""

import functools
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, numbers, require, run, table, write_file

import numpy as np
import torch

import configs
from configs import replace
from costs import flops_per_token
from log import finite
from plot import picture
from studies import runs
from studies.runs import over_seeds

METHODS = {
    "D3PM": ("d3pm_mini", dict(batch_size=16, micro_batch_size=16)),
    "MDLM, fast": ("mdlm_mini_fast", {}),
    "blocks of 16": ("mdlm_mini_fast", dict(objective="block", block_size=16)),
    "left to right": ("mdlm_mini_fast", dict(objective="ar", weighting="nelbo", time_sampling="uniform")),
}
SIZES = {"0.2M": dict(n_layer=4, n_embd=64, n_head=2), "0.8M": dict(n_layer=4, n_embd=128, n_head=4),
         "2.7M": dict(n_layer=6, n_embd=192, n_head=6), "10M": dict(n_layer=6, n_embd=384, n_head=6)}
BUDGETS = "1e11,3e11,1e12,3e12,1e13,3e13,1e14"
KEPT = 2  # sizes that all seeds train
LAST = 3  # budgets of the slope


def config_of(method, size):
    name, settings = METHODS[method]
    return replace(configs.CONFIGS[name](), **settings, **SIZES[size])


@functools.cache
def operations_per_step(method, size):
    """Operations of a training step, at 27 symbols."""
    config = config_of(method, size)
    with torch.device("meta"):
        model = config.make_model(27)
    return flops_per_token(model, config.make_objective(27), config) * config.batch_size * config.seq_len


def steps_of(method, size, budget):
    """Number of training steps that a budget of operations pays for."""
    return max(1, round(budget / operations_per_step(method, size)))


class Study:
    def __init__(self, args):
        self.args = args

    def run(self, method, size, budget, lr, seed):
        """(folder, arguments of train.py) of a run."""
        name, settings = METHODS[method]
        steps = steps_of(method, size, budget)
        out = self.args.folder / f"{method.replace(' ', '_').replace(',', '')}_{size}_{budget:g}_lr={lr:g}_{seed}"
        flags = [name, *(f"--{key}={value}" for key, value in (settings | SIZES[size]).items()), f"--lr={lr}",
                 "--sample_interval=0", "--eval_sequences=256", f"--seed={seed}", f"--max_steps={steps}",
                 f"--warmup_steps={max(1, min(100, steps // 10))}", f"--eval_interval={steps}"]
        return out, flags

    def tune(self, *key):
        """Train one run, or continue it. Returns {"val": bits of its validation}."""
        return runs.validated(*self.run(*key), self.args)

    def measure(self, method, *key):
        """Train one run, or continue it. Returns {"val": bits of its validation, "bits": on the test split}."""
        how = ["--estimator", "exact_k"] if method == "D3PM" else []  # its own is of 1,000 steps
        return runs.trained(*self.run(method, *key), self.args, how=how)


# ---- the frontier ----------------------------------------------------------------------------------------------------


def slope(points):
    """Bits for ten times the operations: least squares of the bits against log10 C over the finite ones of points
    [(C, bits, ...)]. nan if there are fewer than two."""
    points = [(math.log10(C), bits) for C, bits, *_ in points if math.isfinite(bits)]
    return np.polyfit(*zip(*points), 1)[0].item() if len(points) > 1 else math.nan


def operations(points, bits):
    """The C at which a frontier [(C, bits, ...)] has these bits, by lines between points in log C; None outside."""
    for (c, y, *_), (c2, y2, *_) in zip(points, points[1:]):
        if math.inf > y >= bits >= y2:
            return c * (c2 / c) ** ((y - bits) / (y - y2) if y > y2 else 0)
    return None


def ratio(points, reference):
    """The last budget of a frontier, divided by the operations at which the reference has its bits; None: unknown."""
    needed = operations(reference, points[-1][1])
    return None if needed is None else points[-1][0] / needed


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=0)
    p.add_argument("--budgets", default=BUDGETS, type=numbers(float, 1, 1e30),
                   help=f"operations, separated by commas (default {BUDGETS})")
    args = p.parse_args()
    budgets = args.budgets
    if len(budgets) < 2:
        p.error("--budgets needs at least two numbers, for a line")
    require("matplotlib", "a picture")
    runs.refuse(args, runs.SIZES + runs.SWEPT)
    runs.make_folder(args.folder, args)
    study, seeds = Study(args), range(1, args.seeds + 1)
    best, _ = runs.tuned([(method, size, budgets[-2]) for method in METHODS for size in SIZES], study.tune, args.jobs)
    best = {(method, size): lr for (method, size, _), lr in best.items()}
    key = lambda method, size, budget, seed: (method, size, budget, best[method, size], seed)
    pairs = [(method, budget) for budget in budgets for method in METHODS]
    found = runs.in_stages([[key(method, size, budget, 1) for method, budget in pairs for size in SIZES]],
                           study.measure, args.jobs)
    val = lambda method, size, budget: found[key(method, size, budget, 1)]["val"]
    kept = {(method, budget): sorted(SIZES, key=lambda size: val(method, size, budget))[:KEPT]
            for method, budget in pairs}
    found |= runs.in_stages([[key(method, size, budget, seed) for method, budget in pairs for seed in seeds[1:]
                              for size in kept[method, budget]]], study.measure, args.jobs)

    def frontier(method, chosen):
        """[(C, bits of the size with the best validation in the mean over the chosen seeds, their standard error)]."""
        of = lambda size, budget, what: over_seeds([found[key(method, size, budget, seed)][what] for seed in chosen])
        size_of = lambda budget: min(kept[method, budget], key=lambda size: of(size, budget, "val")[0])
        return [(budget, *of(size_of(budget), budget, "bits")) for budget in budgets]

    rows = []
    for method in METHODS:
        for budget in budgets:
            for size in SIZES:
                trained = [k for seed in seeds if (k := key(method, size, budget, seed)) in found]
                bits, error = over_seeds([found[k]["bits"] for k in trained])
                rows.append({"method": method, "operations": budget, "size": size, "lr": best[method, size],
                             "steps": steps_of(method, size, budget), "seeds": len(trained), "bits": finite(bits),
                             "stderr": error})
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows")
    table(rows, {"method": ("", ""), "operations": ("operations", ".0e"), "size": ("size", ""), "lr": ("lr", "g"),
                 "steps": ("steps", ",d"), "seeds": ("seeds", "d"), "bits": ("bits", ".4f"), "stderr": ("±", ".4f")},
          sys.stdout)
    frontiers = {method: frontier(method, list(seeds)) for method in METHODS}
    result = []
    for method in METHODS:
        of_seeds = [(frontier(method, [seed]), frontier("left to right", [seed])) for seed in seeds]
        ratios = [ratio(*pair) for pair in of_seeds]
        slopes = over_seeds([slope(points[-LAST:]) for points, _ in of_seeds])
        result.append({"method": method, "bits": finite(frontiers[method][-1][1]), "slope": finite(slopes[0]),
                       "stderr": slopes[1], "ratio": ratio(frontiers[method], frontiers["left to right"]),
                       "by_seed": ratios})
    print(f"the frontiers at {budgets[-1]:.0e} operations: bits; bits more with ten times the operations; and how many "
          f"times the operations of left to right these bits take, in all and by seed (none: more than "
          f"{budgets[-1] / budgets[0]:,.0f})")
    shown = lambda x: "none" if x is None else f"{x:.2f}"
    table([row | {"ratio": shown(row["ratio"]), "by_seed": "  ".join(map(shown, row["by_seed"]))} for row in result],
          {"method": ("", ""), "bits": ("bits", ".4f"), "slope": ("slope", "+.3f"), "stderr": ("±", ".3f"),
           "ratio": ("times the operations", ""), "by_seed": ("by seed", "")}, sys.stdout)
    picture(args.folder / "frontier.png", frontiers, "operations of the training",
            "bits per character (test), the best size", log_x=True)
    write_file(args.folder / "frontier.json", json.dumps({"rows": rows, "methods": result}) + "\n")


if __name__ == "__main__":
    run(main)
