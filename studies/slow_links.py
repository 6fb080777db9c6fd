"""Compare ways to train on uneven machines: does it hurt that machines differ, and does drift explain it?

    python studies/slow_links.py out/slow_links --jobs 2

A network (mdlm_mini_fast with AdamW, 0.8M parameters) is first trained by one worker. Then four workers go on with
rounds of 50 local steps, on machines that are equal, or slightly, moderately or very different (studies/machines):

    ddp        averaged gradients: every step uses the four workers' batches together
    diloco     exchanges of all workers together
    async      one server, Nesterov's momentum for every difference
    async dn   one server, delayed Nesterov with a buffer of 4, and dynamic local steps
    halos      two regions with a server each, delayed Nesterov, dynamic local steps
    plain, lookahead    one worker with all four batches, without and with an outer step every 50 steps

Then 16 machines in 4 regions (studies/machines/halos.txt) do the same, with the times of a network of 70M
parameters: 281.7 MB and 0.238 s a step, as in the HALoS paper. Each takes a quarter of the steps, in rounds of half the
length, so the number of tokens is that of four machines. The asynchronous servers' learning rates are chosen once more,
from those of four machines down to a sixteenth of them. There the study reports each algorithm's hours to the final
bits of the worst one that has learnt something.

All see the same number of tokens. The learning rates of the servers are chosen first, by the validation of one seed on
moderately different machines. It prints bits per character on the test split, the same windows and masks for all, the
differences from diloco by seed, and the correlation of drift with that difference over the algorithms and machines of
each seed. Finished runs are not repeated. It writes slow_links.json, slow_links.png and hours.png.
"""

import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, number, require, run, table, write_file

import numpy as np

import log
from plot import picture
from studies import runs
from studies.runs import ROOT, over_seeds

LEVELS = ("none", "slight", "moderate", "very")
BASE = ["mdlm_mini_fast", "--optimizer=adamw", "--lr=3e-3", "--sample_interval=0", "--eval_sequences=256"]
HALOS = ["--algorithm=halos", "--dynamic_steps", "--buffer=2", "--merge_every=4", "--global_buffer=2", "--carry"]
ALGORITHMS = {
    "ddp": ["--algorithm=ddp"],
    "diloco": ["--algorithm=local"],
    "async": ["--algorithm=async"],
    "async dn": ["--algorithm=async", "--buffer=4", "--dynamic_steps"],
    "halos": HALOS,
}
TUNED = {  # flags to choose from, with one seed
    "diloco": [[f"--outer_lr={lr}"] for lr in (1, 0.7, 0.35)],
    "async": [[f"--outer_lr={lr}"] for lr in (0.7, 0.35, 0.175, 0.0875, 0.044, 0.022)],
    "async dn": [[f"--outer_lr={lr}"] for lr in (0.7, 0.35, 0.175)],
    "halos": [[f"--outer_lr={lr}", f"--global_lr={top}", f"--merge_weight={weight}"] for lr, top, weight in (
        (0.7, 0.7, 0.5), (0.7, 1, 0.25), (0.35, 0.7, 0.5), (0.7, 1, 1), (0.175, 0.7, 0.5))],
}
ASYNCHRONOUS = "async", "async dn", "halos"
REGIONS = ["--step_seconds=0.238391", "--model_bytes=281.7e6", "--relative_speeds", "--batch_size=64"]
OF_16 = {"async dn": ["--buffer=16"], "halos": ["--buffer=4", "--merge_every=8"]}  # a buffer has each worker once


def choose(found, trials, name):
    """The flags of an algorithm with the best validation."""
    value = lambda key: math.inf if found[key]["val"] is None else found[key]["val"]
    return min((key for key in trials if key[0] == name), key=value)[3]


def hours_to(target, points):
    """The hours from which on the bits of a curve [(hours, bits, error)] stay at the target or below; None: never."""
    above = max((i for i, (_, bits, _) in enumerate(points) if bits > target), default=-1)
    return points[above + 1][0] if above + 1 < len(points) else None


def smaller(flags, factor):
    """The flags with the learning rate of the server, the first of them, times a factor."""
    return (f"--outer_lr={factor * float(flags[0].removeprefix('--outer_lr=')):g}", *flags[1:])


class Study:
    def __init__(self, args):
        self.args = args

    def flags_of(self, seed):
        a = self.args
        return [*BASE, f"--seed={seed}", f"--dataset={a.dataset}", f"--data_dir={a.data_dir}", f"--max_steps={a.steps}",
                f"--warmup_steps={a.steps // 20}", "--eval_interval=50",
                *(f"--{flag}" for flag in a.flags)]

    def first(self, seed):
        """The network that all go on from."""
        out, steps = self.args.folder / f"first_{seed}", self.args.first
        runs.once(out.with_name(f"{out.name}.json"), lambda: {"step": runs.train(
            out, *self.flags_of(seed), f"--max_steps={steps}", f"--eval_interval={steps}")[-1]["step"]})
        return out

    def how(self, name, level, extra):
        """Flags of the simulator for an algorithm on the machines of a level."""
        steps = [] if name == "ddp" else [f"--local_steps={self.args.local_steps}"]
        flags = [*ALGORITHMS[name], *steps, "--micro_batch_size=4", f"--machines={ROOT}/studies/machines/{level}.txt",
                 *extra]
        if level == "halos":
            flags += [*REGIONS, *OF_16.get(name, ()), f"--max_steps={self.args.steps // 4}",
                      f"--eval_interval={max(1, self.args.steps // 40)}"]
            flags += [] if name == "ddp" else [f"--local_steps={self.args.local_steps // 2}"]
        return flags

    def measure(self, name, level, seed, extra=()):
        """Bits on the test split, the last validation and means of the log of one run; None if it diverged."""
        folder = "_".join([name.replace(" ", "_"), level, *(flag.strip("-") for flag in extra), str(seed)])
        out = self.args.folder / folder

        def work():
            common = [*self.flags_of(seed), f"--init_from={self.first(seed)}"]

            def go():
                if level == "one":
                    return runs.train(out, *common, *extra)
                return runs.call("studies/simulator.py", *common, f"--out_dir={out}", *self.how(name, level, extra),
                                 "--resume")

            if runs.unless_infinite(go) is None:
                return {"bits": None, "val": None, "curve": []}
            lines = [line for line in log.read(out / "log.jsonl") if "val_bits_per_token" in line]
            mean = lambda key: float(np.mean([line[key] for line in lines if line.get(key) is not None] or [0.0]))
            n_tokens = log.read(out / "log.jsonl")[0]["config"]["seq_len"] * self.args.windows
            score = runs.call("evaluate.py", out, *runs.data_flags(self.args), "--n_tokens", n_tokens)
            return {"bits": json.loads(score)["bits_per_token"], "val": lines[-1]["val_bits_per_token"],
                    "drift": mean("drift"), "staleness": mean("staleness"), "cosine": mean("cosine"),
                    "hours": lines[-1].get("hours"), "utilisation": lines[-1].get("utilisation"),
                    "gigabytes": sum(lines[-1].get("bytes", {}).values()) / 1e9,
                    "curve": [(line["hours"], line["val_bits_per_token"]) for line in lines if "hours" in line]}

        return runs.once(out.with_name(f"{folder}.json"), work)

    def levels(self, name):
        """ddp and diloco take the same steps on all machines, so they are trained once: only their times differ."""
        return ("very",) if name in ("ddp", "diloco") else LEVELS

    def times(self, name, level, extra):
        """Hours and utilisation of ddp or diloco, without training."""
        def work():
            return json.loads(runs.call("studies/simulator.py", *self.flags_of(1), *self.how(name, level, extra),
                                        "--clock_only", "--json"))

        return runs.once(self.args.folder / f"clock_{name}_{level}.json", work)

    def all(self):
        """Tune, then run everything on four machines.

        Returns ({key: result}, {name: the best flags}, the keys (name, level, seed, flags), those of the tuning).
        """
        seeds = range(1, self.args.seeds + 1)
        runs.in_stages([[(seed,) for seed in seeds]], self.first, self.args.jobs)
        trials = [(name, "moderate", 1, tuple(flags)) for name, choices in TUNED.items() for flags in choices]
        found = runs.in_stages([trials], self.measure, self.args.jobs)
        best = {name: choose(found, trials, name) for name in TUNED}
        keys = [(name, level, seed, best.get(name, ())) for seed in seeds for name in ALGORITHMS
                for level in self.levels(name)]
        keys += [("one", "one", seed, flags) for seed in seeds
                 for flags in ((), (f"--local_steps={self.args.local_steps}",))]
        found |= runs.in_stages([keys], self.measure, self.args.jobs)
        return found, best, keys, trials

    def in_regions(self, best):
        """Tune, then run all algorithms on 16 machines in 4 regions.

        Returns ({(name, "halos", seed, flags): result}, {name: the best flags}).
        """
        trials = [(name, "halos", 1, smaller(best[name], factor)) for name in ASYNCHRONOUS
                  for factor in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16)]
        found = runs.in_stages([trials], self.measure, self.args.jobs)
        best = best | {name: choose(found, trials, name) for name in ASYNCHRONOUS}
        found |= runs.in_stages([[(name, "halos", seed, best.get(name, ())) for seed in range(1, self.args.seeds + 1)
                                  for name in ALGORITHMS]], self.measure, self.args.jobs)
        return found, best


def correlation(x, y):
    """Pearson's correlation; None if one of the two is constant."""
    x, y = np.array(x), np.array(y)
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 1 and x.std() > 0 and y.std() > 0 else None


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=1000)
    p.add_argument("--first", type=number(int, 1), default=400, help="steps of the first network (default 400)")
    p.add_argument("--local_steps", type=number(int, 2), default=50, help="steps of a round (default 50)")
    args = p.parse_args()
    require("matplotlib", "a picture")
    runs.refuse(args, ("seed",))
    runs.make_folder(args.folder, args)
    study, seeds = Study(args), range(1, args.seeds + 1)
    found, best, keys, trials = study.all()

    print("validation of the choices, seed 1, moderately different machines:")
    table([{"name": name, "flags": " ".join(flags), "bits": found[name, level, seed, flags]["val"]}
           for name, level, seed, flags in trials],
          {"name": ("", ""), "flags": ("", ""), "bits": ("bits", ".4f")}, sys.stdout)
    base = {seed: found["diloco", "very", seed, best["diloco"]]["bits"] for seed in seeds}
    if None in base.values():
        raise UserError("diloco, with which all others are compared, diverged: choose another folder and a smaller "
                        "learning rate (--flags lr=...)")
    rows, points = [], []
    for name in ("ddp", "diloco"):
        for level in LEVELS[:-1]:
            rows.append({"name": name, "level": level, **study.times(name, level, best.get(name, ()))})
    for name, level, flags in dict.fromkeys((name, level, flags) for name, level, _, flags in keys):
        these = [found[name, level, seed, flags] for seed in seeds]
        if any(one["bits"] is None for one in these):
            rows.append({"name": name, "level": f"{level}: diverged"})
            continue
        bits, _ = over_seeds([one["bits"] for one in these])
        more, error = over_seeds([one["bits"] - base[seed] for one, seed in zip(these, seeds)])
        mean = lambda key: sum(one[key] or 0 for one in these) / len(these)
        rows.append({"name": name if level != "one" else ("lookahead" if flags else "plain"), "level": level,
                     "bits": bits, "more": more, "error": error,
                     "hours": mean("hours"), "utilisation": mean("utilisation"),
                     "gigabytes": mean("gigabytes"), "staleness": mean("staleness"), "drift": mean("drift")})
        points += [(name, seed, one["drift"], one["bits"] - base[seed]) for one, seed in zip(these, seeds)
                   if name in ASYNCHRONOUS]
    print(f"\nbits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds; more: than "
          "diloco, by seed")
    table(rows, {"name": ("", ""), "level": ("machines", ""), "bits": ("bits", ".4f"), "more": ("more", "+.4f"),
                 "error": ("±", ".4f"), "hours": ("hours", ".2f"), "utilisation": ("utilised", ".2f"),
                 "gigabytes": ("GB", ".2f"), "staleness": ("staleness", ".1f"), "drift": ("drift", ".4f")}, sys.stdout)
    found_r = {}
    for chosen in (ASYNCHRONOUS, *((name,) for name in ASYNCHRONOUS)):
        of_seed = lambda seed: [point for point in points if point[1] == seed and point[0] in chosen]
        values = [correlation([p[2] for p in of_seed(seed)], [p[3] for p in of_seed(seed)]) for seed in seeds]
        found_r[" and ".join(chosen)] = values
        print(f"correlation of drift with bits more than diloco, {', '.join(chosen)}, by seed: "
              + "  ".join("none" if r is None else f"{r:.2f}" for r in values))
    series = {name: sorted((drift, more, 0.0) for other, _, drift, more in points if other == name)
              for name in ASYNCHRONOUS}
    picture(args.folder / "slow_links.png", series, "drift", "bits more than diloco")
    found, best = study.in_regions(best)
    hours = {name: runs.mean_curve([found[name, "halos", seed, best.get(name, ())]["curve"] for seed in seeds])
             for name in ALGORITHMS}
    hours = {name: points for name, points in hours.items() if points}  # without what diverged
    target = max((points[-1][1] for points in hours.values() if points[-1][1] <= points[0][1]), default=None)
    if target is None:
        raise UserError("nothing was learnt on the 16 machines: choose another folder and a smaller learning rate "
                        "(--flags lr=...)")
    print(f"\n16 machines in 4 regions: hours to {target:.4f} bits per character (validation, mean of the seeds)")
    rows_of_16 = [{
        "name": name, "flags": " ".join(best.get(name, ())), "hours": hours_to(target, points),
        "all": points[-1][0], "bits": points[-1][1], "error": points[-1][2],
        "gigabytes": found[name, "halos", 1, best.get(name, ())]["gigabytes"]} for name, points in hours.items()]
    table(rows_of_16, {"name": ("", ""), "flags": ("", ""), "hours": ("hours", ".3f"),
                       "all": ("at the end: hours", ".3f"), "bits": ("bits", ".4f"), "error": ("±", ".4f"),
                       "gigabytes": ("GB between regions and machines", ".0f")}, sys.stdout)
    picture(args.folder / "hours.png", hours, "simulated hours on 16 machines in 4 regions",
            "bits per character (validation)", log_x=True)
    write_file(args.folder / "slow_links.json", json.dumps(
        {"rows": rows, "regions": hours, "correlations": found_r, "best": best}) + "\n")


if __name__ == "__main__":
    run(main)
