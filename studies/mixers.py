"""Compare mixers, optimisers and clipping rules in tables of many small runs, one command for each table.

    python studies/mixers.py out/mixers --table mixers        # all mixers, as they are and with equal parameters
    python studies/mixers.py out/mixers --table gates         # gMLP by gate bias, first weights and residual
    python studies/mixers.py out/mixers --table optimizers    # AdamW, Muon and SM3 by clipping
    python studies/mixers.py out/mixers --table masks         # masks kept out of static maps, and Toeplitz maps

All runs are MDLM of 4 blocks, 128 wide unless a row is called matched, on texts of 128 characters, with equally many
tokens, without token shift. Each row is trained at every learning rate of its table with every seed. The best learning
rate of a row is that with the lowest mean of the validations. Bits are of the test split. A run fails if it does not
reach the bits of single characters, which need no mixing, or ends in numbers that are not finite. Afterwards it times a
training step of each row with one thread, in alternation, on random tokens, and measures the activations of a step. It
writes TABLE.json and, for mixers and masks, TABLE.png.
"""

import functools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, note, pick_dtype, progress, require, run, table, write_file

import torch

import bench
import configs
import log
from configs import replace
from costs import count_parameters
from data.loader import load_meta, load_split
from mixers import MIXERS
from plot import picture
from studies import runs
from studies.runs import over_seeds

BASE = dict(optimizer="adamw", shift_tokens=False, head_gates=False, sample_interval=0, eval_sequences=256,
            architecture="mixers")
LRS = (1e-3, 3e-3, 6e-3)


class Row(NamedTuple):
    name: str
    settings: dict  # fields of Config beside BASE
    lrs: tuple = LRS


@functools.cache
def mixer_rows():
    """Each mixer at the width of the base, and at the width with as many parameters as attention."""
    rows = []
    for mixer in MIXERS:
        for heads in (4, 1) if mixer in ("attention", "mixer", "gmlp") else (4,):
            name = mixer + (", 1 head" if heads == 1 else "")
            settings = {"mixer": mixer, "n_head": heads}
            rows.append(Row(name, settings))
            width = matched_width(settings)
            if width != 128:
                rows.append(Row(f"{name}, matched", settings | {"n_embd": width}))
    return rows


def n_params(settings):
    with torch.device("meta"):
        return count_parameters(replace(configs.mdlm_mini_fast(), **BASE | settings).make_model(27))


def matched_width(settings):
    """The width, a multiple of 8, at which a network has as many parameters as attention at width 128, nearly."""
    aim = n_params({"mixer": "attention"})
    return min(range(64, 257, 8), key=lambda width: abs(n_params(settings | {"n_embd": width}) - aim))


def gate_rows():
    return [Row(f"bias {bias}, init {init or '.00058/L'}, {residual}",
                {"mixer": "gmlp", "gate_bias": bias, "map_init": init, "residual": residual}, (3e-3, 1e-2))
            for bias in (1.0, 0.0) for init in ("", "0.02/L", "0.004", "orthogonal")
            for residual in ("zero", "rezero", "plain")]


def optimizer_rows():
    clips = {"grad_clip": 1.0}, {"clip": "agc:0.003"}, {"clip": "agc:0.01"}
    words = lambda clip: ", ".join(f"{key}={value}" for key, value in clip.items())
    return [Row(f"{optimizer}, {words(clip)}", {"mixer": "attention", "optimizer": optimizer} | clip, lrs)
            for optimizer, lrs in (("adamw", (3e-4, 1e-3, 3e-3, 1e-2)), ("muon", (1e-3, 3e-3, 1e-2)),
                                   ("sm3", (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
                                   ("sm3_nesterov", (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)))
            for clip in clips]


def mask_rows():
    return [Row(f"{mixer}, {kind}{', mask_aware' if aware else ''}",
                {"mixer": mixer, "static_map": kind, "mask_aware": aware}, (1e-3, 3e-3))
            for mixer in ("mixer", "gmlp", "synth_random", "container") for kind in ("full", "toeplitz")
            for aware in (False, True)] + [Row("attention", {"mixer": "attention"}, (1e-3, 3e-3))]


TABLES = {"mixers": mixer_rows, "gates": gate_rows, "optimizers": optimizer_rows, "masks": mask_rows}


def folder_of(row, lr, seed):
    return "_".join(str(part).replace(":", "-").replace("/", "per") for part in (
        *(f"{key}={value}" for key, value in row.settings.items() if value != ""), f"lr={lr:g}", seed))


def measure(row, lr, seed, args):
    """Train one run. Returns its bits and its validation (infinite if its weights became so), and bytes of state."""
    out = args.folder / folder_of(row, lr, seed)
    flags = ["mdlm_mini_fast", *(f"--{key}={value}" for key, value in (BASE | row.settings).items() if value != ""),
             f"--lr={lr}", f"--seed={seed}", f"--max_steps={args.steps}", f"--warmup_steps={args.steps // 20}",
             f"--eval_interval={args.steps}", "--max_skipped=1000000"]
    return runs.trained(out, flags, args) | {"state": log.read(out / "log.jsonl")[0]["optimizer_bytes"]}


def costs_of(rows, repeats=15):
    """{name of a row: (milliseconds of a training step, MB of its activations)}, the former medians."""
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    config = lambda row: replace(configs.mdlm_mini_fast(), **BASE | row.settings)
    trainings = [bench.Training(row.name, config(row), 27, cpu, pick_dtype(cpu)) for row in rows]
    seconds = [[bench.timed(training.step, cpu) for training in trainings]
               for _ in progress(range(repeats + 2), desc="timing")]
    found = {training.name: (1000 * statistics.median(times[2:]), bench.measured_bytes(training) / 1e6)
             for training, times in zip(trainings, zip(*seconds))}
    for training in trainings:
        training.stream.close()
    torch.set_num_threads(threads)
    return found


def unigram_bits(args):
    """Entropy of single characters of the training split."""
    tokens = load_split(args.dataset, "train", 1, args.data_dir)[:10**7]
    V = load_meta(args.dataset, args.data_dir)["vocab_size"]
    share = torch.bincount(torch.from_numpy(tokens.astype("int64")), minlength=V).double() / len(tokens)
    return -torch.xlogy(share, share).sum().item() / math.log(2)


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=600)
    p.add_argument("--table", choices=TABLES, required=True, help="the table to make")
    args = p.parse_args()
    require("matplotlib", "a picture")
    runs.refuse(args, runs.SIZES + runs.SWEPT)
    runs.make_folder(args.folder, args, f"{args.table}_settings")
    rows, seeds, level = TABLES[args.table](), range(1, args.seeds + 1), unigram_bits(args)
    keys = [(row.name, lr, seed) for row in rows for lr in row.lrs for seed in seeds]
    by_name = {row.name: row for row in rows}
    note(f"{len(keys)} runs of {args.steps:,} steps")
    found = runs.in_stages([keys], lambda name, lr, seed: measure(by_name[name], lr, seed, args), args.jobs)

    results, best, costs = [], {}, costs_of(rows)
    for row in rows:
        means = {lr: over_seeds([found[row.name, lr, seed]["bits"] for seed in seeds]) for lr in row.lrs}
        best[row.name] = lr = min(row.lrs, key=lambda lr: sum(found[row.name, lr, seed]["val"] for seed in seeds))
        all_runs = [found[row.name, rate, seed] for rate in row.lrs for seed in seeds]
        results.append(dict(
            row=row.name, bits=log.finite(means[lr][0]), stderr=means[lr][1], lr=lr, params=n_params(row.settings),
            by_lr={f"{rate:g}": log.finite(mean) for rate, (mean, _) in means.items()},
            failed=sum(run["bits"] > level for run in all_runs) / len(all_runs),
            ms=costs[row.name][0], activations=costs[row.name][1], state=all_runs[0]["state"] / 1e6))
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds, {args.steps:,} "
          f"steps; ± standard error over seeds; failed: share of all runs above {level:.3f} bits")
    table(results, {"row": ("", ""), "bits": ("bits", ".4f"), "stderr": ("±", ".4f"), "lr": ("lr", "g"),
                    "failed": ("failed", ".2f"), "params": ("parameters", ",d"), "ms": ("ms/step", ".0f"),
                    "activations": ("MB", ".0f"), "state": ("optimiser MB", ".1f")}, sys.stdout)
    curves = {}
    if args.table == "masks":
        lines = runs.in_stages([[(row.name, seed) for row in rows for seed in seeds]], lambda name, seed: runs.curve_of(
            args.folder / folder_of(by_name[name], best[name], seed), args), args.jobs)
        curves = {row.name: runs.mean_curve([lines[row.name, seed] for seed in seeds]) for row in rows}
        drawn = {name: curve for name, curve in curves.items() if "full" not in name}
        picture(args.folder / "masks.png", drawn, "mask rate", "bits per masked character")
    if args.table == "mixers":
        series = {}
        for row in rows:
            logs = [log.read(args.folder / folder_of(row, best[row.name], seed) / "log.jsonl") for seed in seeds]
            training = [[(line["tokens"], line["bits_per_token"]) for line in lines if line.get("bits_per_token")]
                        for lines in logs]
            if "matched" not in row.name:
                series[row.name] = runs.mean_curve(training)
        picture(args.folder / "mixers.png", series, "training tokens", "bits per character (training)", log_x=True)
    write_file(args.folder / f"{args.table}.json", json.dumps({"rows": results, "curves": curves}) + "\n")


if __name__ == "__main__":
    run(main)
