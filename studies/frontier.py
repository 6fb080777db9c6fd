"""Compute against bits: which method needs how many operations for equal bits?

    python studies/frontier.py out/frontier --jobs 2

D3PM (nanoDD's objective and optimiser), the fast recipe of MDLM, block diffusion in blocks of 16, and left to right,
each at sizes from 0.2M to 10M parameters with some budgets of operations C (model.DiT.flops, recomputation not
counted). A budget gives each size its number of steps. The learning rate of each method and size is tuned by factors of
2, by the validation of seed 1 with the second budget. Then seed 1 trains all sizes with all budgets. The other seeds
train the two sizes that have the best validation with seed 1, for each method and budget. All bits of masked models are
bounds in continuous time.

For each method and budget the best size gives a point of the frontier. Through the points of all budgets goes the line

    log(bits - floor) = a - b log C,

with one floor for all methods, which is chosen to fit best. (The entropy of the text itself is unknown.) The ratio of
operations at equal bits is read off the lines of each seed. The level is the worst method's bits at the largest budget.
Where a method is below it at its smallest budget already, its line is extended, and a sentence says so. It writes
frontier.json and frontier.png. What is there is not run again.
"""

import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import configs
from cli import ArgumentParser, UserError, number, require, run, table, write_file
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
BUDGETS = "3e12,1e13,3e13,1e14"
KEPT = 2  # sizes that all seeds train


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
        return {"val": runs.validated(*self.run(*key), self.args)}

    def measure(self, method, *key):
        """Train one run, or continue it. Returns {"val": bits of its validation, "bits": on the test split}."""
        how = ["--estimator", "exact_k"] if method == "D3PM" else []  # its own is of 1,000 steps
        out, flags = self.run(method, *key)
        bits = runs.trained(out, flags, self.args, how=how)
        return {"val": runs.validation(out), "bits": bits}


# ---- the frontier ----------------------------------------------------------------------------------------------------


def line(points, floor):
    """Least squares of log(bits - floor) = a - b log C over points [(C, bits)]: (a, b, sum of squared residuals)."""
    x, y = np.log([c for c, _ in points]), np.log([bits - floor for _, bits in points])
    slope, a = np.polyfit(x, y, 1)
    return a, -slope, ((y - a - slope * x) ** 2).sum()


def fit(frontiers):
    """One floor and a line for each method, {method: [(C, bits)]} -> (floor, {method: (a, b)})."""
    lowest = min(bits for points in frontiers.values() for _, bits in points)
    floors = np.linspace(0, 0.98 * lowest, 99)
    floor = min(floors, key=lambda f: sum(line(points, f)[2] for points in frontiers.values()))
    return float(floor), {method: line(points, floor)[:2] for method, points in frontiers.items()}


def operations(bits, floor, a, b):
    """The C at which a line reaches these bits."""
    return math.exp((a - math.log(bits - floor)) / b)


def ratios(frontiers, reference, bits):
    """{method: operations for these bits, relative to the reference's}."""
    floor, lines = fit(frontiers)
    needed = {method: operations(bits, floor, *lines[method]) for method in frontiers}
    return {method: value / needed[reference] for method, value in needed.items()}


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=0)
    p.add_argument("--budgets", default=BUDGETS, help=f"operations, separated by commas (default {BUDGETS})")
    args = p.parse_args()
    require("matplotlib", "a picture")
    runs.make_folder(args.folder, args)
    study, seeds = Study(args), range(1, args.seeds + 1)
    budgets = sorted({number(float, 1, 1e30)(text) for text in args.budgets.split(",")})
    if len(budgets) < 2:
        raise UserError("--budgets needs at least two numbers, for a line")
    best, _ = runs.tuned([(method, size, budgets[1]) for method in METHODS for size in SIZES], study.tune, args.jobs)
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
        """[(C, bits of the best size)], in the mean over the chosen seeds."""
        mean = lambda size, budget: sum(found[key(method, size, budget, seed)]["bits"] for seed in chosen) / len(chosen)
        return [(budget, min(mean(size, budget) for size in kept[method, budget])) for budget in budgets]

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
    level = max(points[-1][1] for points in frontiers.values())  # the bits that all methods reach
    if not math.isfinite(level):
        raise UserError("a method has no run with finite bits at the largest budget: there is no line to fit")
    for method, points in frontiers.items():
        if points[0][1] < level:
            print(f"{method} is below {level:.3f} bits at its smallest budget: its operations are extrapolated")
    by_seed = [ratios({method: frontier(method, [seed]) for method in METHODS}, "left to right", level)
               for seed in seeds]
    floor, lines = fit(frontiers)
    result = {method: {"a": a, "b": b, "ratio": ratios(frontiers, "left to right", level)[method],
                       "by_seed": [of_seed[method] for of_seed in by_seed]} for method, (a, b) in lines.items()}
    print(f"floor {floor:.3f} bits; operations for {level:.3f} bits, relative to left to right, in all and by seed")
    table([{"method": method, **values, "by_seed": "  ".join(f"{x:.2f}" for x in values["by_seed"])}
           for method, values in result.items()],
          {"method": ("", ""), "b": ("exponent b", ".3f"), "ratio": ("times the operations", ".2f"),
           "by_seed": ("by seed", "")}, sys.stdout)
    picture(args.folder / "frontier.png", {method: [(c, bits, 0.0) for c, bits in points]
                                           for method, points in frontiers.items()},
            "operations of the training", "bits per character (test), the best size", log_x=True)
    write_file(args.folder / "frontier.json", json.dumps({"rows": rows, "floor": floor, "level": level,
                                                          "methods": result}) + "\n")


if __name__ == "__main__":
    run(main)
