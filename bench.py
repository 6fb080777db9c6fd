"""Measure the throughput and memory of training, and the time of samplers, on random tokens: no data needed.

    python bench.py demo                                  the time of each part of a step, and the utilisation (MFU)
    python bench.py demo mdlm_mini_fast --repeats 5       several configs, timed in alternation
    python bench.py d3pm_text8 --compare naive            compared with a simple D3PM (studies/textbook.py)
    python bench.py demo --scaling scaling.png            cost per token by size, length and batch
    python bench.py demo --samplers                       the samplers, compared with the naive one
    python bench.py --estimate d3pm_text8_8gpu --gpu h100 memory and days of a run on other GPUs

Timings that are compared alternate in one process, except those of --scaling, which run one after the other. Results
are medians over the repeats after a warm-up. The last line is JSON.
"""

import copy
import itertools
import json
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import (UserError, autocast, check_place, device_name, generator_on, in_short, matmul_peak, named, note,
                 number, pick_device, pick_dtype, progress, require, run, synchronize, table, without_stderr)

import numpy as np
import torch

import configs
import parallel
from categorical import Counted, Draw
from costs import check_fits, count_parameters, flops_per_token, training_bytes, weight_bytes
from data.loader import load_meta, prefetch
from data.tokenizer import KNOWN
from diffusion import D3PM, MDLM
from optim import EMA, make_optimizers
from parallel import share_of_batch
from plot import save, subplots
from sampler_settings import schedule_grid
from sampling import Settings
from studies import textbook
from studies.forecast import GPUS, estimate
from train import batches, train_step


def add_arguments(parser):
    parser.add_argument("--repeats", type=number(int, 1),
                        help="number of timed optimiser steps, or of timed batches of --samplers (default 10)")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compare", choices=("naive",), help="also time a simple implementation of D3PM (float32, "
                      "not compiled, with full posteriors); sets lambda_ce=0")
    mode.add_argument("--scaling", type=named, metavar="PNG", help="measure the cost per token by width, length "
                      "and batch size, and plot it")
    mode.add_argument("--samplers", action="store_true", help="time the samplers")
    mode.add_argument("--estimate", action="store_true", help="predict the memory and the days of a run")
    parser.add_argument("--samples", type=number(int, 1), help="texts in a batch of --samplers (default 8)")
    parser.add_argument("--first", type=number(int, 1), help="number of steps of each of --samplers (default: all)")
    parser.add_argument("--gpu", type=named, help=f"GPU of --estimate: {', '.join(GPUS)} (default h100)")
    parser.add_argument("--gpus", type=number(int, 1), help="number of GPUs of --estimate (default: from the config's "
                        "name, else 1)")
    parser.add_argument("--mfu", type=number(float, 1e-3, 1),
                        help="utilisation (MFU) that --estimate assumes (default 0.25)")
    parser.add_argument("--vocab_size", type=number(int, 2, 10**6), help="number of tokens in the vocabulary "
                        "(default: that of the config's data set, or 27 if it is unknown)")


# ---- training --------------------------------------------------------------------------------------------------------


class Training:
    """The work of train.py between two log lines."""

    naive = False

    def __init__(self, name, cfg, vocab_size, device, dtype):
        self.name, self.cfg, self.device, self.dtype = name, replace(cfg, max_steps=10**9), device, dtype
        self.vocab_size = vocab_size
        check_fits(training_bytes(cfg, vocab_size, *share_of_batch(cfg, 1)), device, f"a step of {name}",
                   "use a smaller model or --micro_batch_size")
        torch.manual_seed(cfg.seed)
        self.model, self.objective = cfg.make_model(vocab_size), cfg.make_objective(vocab_size)
        self.flops = flops_per_token(self.model, self.objective, cfg)
        self.compiled = parallel.compiles(cfg, device)
        self.net = parallel.spread(self.model, self.objective, device, False, self.compiled)
        self.optimizers, self.ema = make_optimizers(self.model, cfg, device, dtype), EMA(self.model, cfg.ema_decay)
        self.stream = self.batches(self.objective)

    def batches(self, objective):
        local, micro = share_of_batch(self.cfg, 1)
        tokens = np.random.default_rng(0).integers(0, self.vocab_size, 100 * self.cfg.seq_len)
        return prefetch(batches(tokens, objective, self.cfg, 0, range(local), micro, self.device.type == "cuda"))

    def step(self, mark=lambda part: None):
        parts = next(self.stream)
        mark("data")
        train_step(self.net, self.objective, parts, self.optimizers, self.cfg, self.device, self.dtype, mark)
        self.ema.update()
        mark("optimiser")


class Naive(Training):
    """Training of the same network by the code of studies/textbook.py, with AdamW in float32, not compiled."""

    naive = True

    def __init__(self, name, cfg, vocab_size, device):
        super().__init__(name, replace(cfg, compile=False, optimizer="adamw"), vocab_size, device, torch.float32)
        self.stream.close()
        self.stream = self.batches(D3PM(vocab_size, cfg.T))
        self.optimizers = torch.optim.AdamW(self.model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)

    def step(self):
        parts = [(x0.to(self.device), noise.to(self.device)) for x0, noise in next(self.stream)]
        textbook.train_step(self.model, parts, self.cfg.T, self.vocab_size, self.optimizers, self.cfg.grad_clip)


def timed(function, device):
    """The seconds that a call of function() takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def split(training):
    """Shares of one step's time: {data, forward, loss, backward, optimiser}. Waits for the device after each part.

    If head and cost are compiled together (parallel.compile_parts), the time of the head counts as loss."""
    seconds, last = Counter(), time.perf_counter()

    def mark(part):
        nonlocal last
        synchronize(training.device)
        now = time.perf_counter()
        seconds[part] += now - last
        last = now

    hooks = [training.model.register_forward_pre_hook(lambda *_: mark("loss")),
             training.model.register_forward_hook(lambda *_: mark("forward"))]
    training.step(mark)
    for hook in hooks:
        hook.remove()
    return {part: seconds[part] / seconds.total() for part in ("data", "forward", "loss", "backward", "optimiser")}


def measured_bytes(training):
    """Peak memory of a step in bytes, besides weights, averages and moments; None on mps.

    It is the median of three steps, which have different masks. The peak is at the beginning of the backward pass, when
    there are gradients of logits and hardly any of parameters."""
    if training.device.type == "mps":
        return None
    return statistics.median(peak_of_step(training) for _ in range(3))


def peak_of_step(training):
    """Peak bytes during one step, less the bytes before it."""
    if training.device.type == "cuda":
        before = torch.cuda.memory_allocated(training.device)
        torch.cuda.reset_peak_memory_stats(training.device)
        training.step()
        return torch.cuda.max_memory_allocated(training.device) - before
    with without_stderr(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                                  profile_memory=True) as profile:
        training.step()
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                    if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in events))


def with_mb(rows):
    """Rows for a table: each row with its activations in MB added."""
    return [row | {"activations": row["activation_bytes"] and row["activation_bytes"] / 1e6} for row in rows]


def throughput(trainings, repeats, compare):
    """Print the time and memory of training. With compare, trainings are pairs (ours, naive)."""
    device, dtype = trainings[0].device, trainings[0].dtype
    seconds, peaks, shares = {training: [] for training in trainings}, [], {training: [] for training in trainings}
    for repeat in progress(range(-2, repeats), desc="training", leave=False):  # two steps to warm up and compile
        peaks.append(matmul_peak(device, dtype))
        for training in trainings:
            taken = timed(training.step, device)
            if repeat >= 0:
                seconds[training].append(taken)
                if not training.naive:
                    shares[training].append(split(training))
    rows = []
    for training in trainings:
        cfg, step = training.cfg, statistics.median(seconds[training])
        rate = cfg.batch_size * cfg.seq_len / step
        row = {"config": training.name, "parameters": count_parameters(training.model), "batch_size": cfg.batch_size,
               "seq_len": cfg.seq_len, "vocab_size": training.vocab_size,
               "dtype": str(training.dtype).removeprefix("torch."), "compiled": training.compiled,
               "step_seconds": step, "tokens_per_second": rate, "flops_per_token": training.flops,
               "activation_bytes": measured_bytes(training)}
        if training.naive:
            ours = rows[-1]
            ours["ratio"] = ours["tokens_per_second"] / rate
            ours["activation_ratio"] = row["activation_bytes"] and ours["activation_bytes"] / row["activation_bytes"]
        else:
            row["mfu"] = rate * training.flops / max(peaks)
            row |= {part: statistics.median(share[part] for share in shares[training]) for part in shares[training][0]}
        rows.append(row)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, matrix products "
          f"{max(peaks) / 1e12:.3g} TFLOP/s in {str(dtype).removeprefix('torch.')}, torch {torch.__version__}, "
          f"medians of {repeats}")
    table(with_mb(rows), {
        "config": ("", ""), "parameters": ("parameters", ",.0f"), "step_seconds": ("s/step", ".3f"),
        "tokens_per_second": ("tokens/s", ",.0f"), "mfu": ("MFU", ".0%"), "data": ("data", ".0%"),
        "forward": ("forward", ".0%"), "loss": ("loss", ".0%"), "backward": ("backward", ".0%"),
        "optimiser": ("optimiser", ".0%"), "activations": ("activations, MB", ",.0f"),
        **({"ratio": ("times naive", ".2f"), "activation_ratio": ("activations / naive", ".2f")} if compare else {}),
    }, sys.stdout)
    return {"device": device_name(device), "threads": torch.get_num_threads(), "torch": str(torch.__version__),
            "repeats": repeats, "peak_tflops": max(peaks) / 1e12, "results": rows}


# ---- scaling ---------------------------------------------------------------------------------------------------------


def scaling(name, cfg, vocab_size, device, dtype, repeats, path):
    """Print and plot the cost of a token in training, by the width, by the length of sequences (with equally many
    tokens per step), and by the batch size."""
    lengths = (64, 256, 1024, 4096)
    tokens = max(cfg.batch_size * cfg.seq_len, lengths[-1])
    axes = {
        "width": [replace(cfg, n_embd=64 * n, n_head=n) for n in (1, 2, 4, 8)],
        "seq_len": [replace(cfg, seq_len=n, batch_size=tokens // n) for n in lengths],
        "batch_size": [replace(cfg, batch_size=n) for n in (1, 4, 16, 64)],
    }
    rows, peaks = [], []
    for axis, variants in progress(axes.items(), desc="scaling", leave=False):
        for variant in variants:
            training = Training(name, replace(variant, micro_batch_size=variant.batch_size), vocab_size, device, dtype)
            peaks.append(matmul_peak(device, dtype))
            seconds = [timed(training.step, device) for _ in range(repeats + 2)][2:]
            rate = variant.batch_size * variant.seq_len / statistics.median(seconds)
            rows.append({"axis": axis, "width": variant.n_embd, "seq_len": variant.seq_len,
                         "batch_size": variant.batch_size, "parameters": count_parameters(training.model),
                         "microseconds_per_token": 1e6 / rate, "flops_per_token": training.flops,
                         "activation_bytes": measured_bytes(training)})
            training.stream.close()
    for row in rows:
        row["limit"] = 1e6 * row["flops_per_token"] / max(peaks)
        row["mfu"] = row["limit"] / row["microseconds_per_token"]
    table(with_mb(rows), {
        "axis": ("", ""), "width": ("width", ""), "seq_len": ("length", ""), "batch_size": ("batch", ""),
        "parameters": ("parameters", ",.0f"), "microseconds_per_token": ("us/token", ".1f"),
        "limit": ("at the matmul peak", ".1f"), "mfu": ("MFU", ".0%"), "activations": ("activations, MB", ",.0f"),
    }, sys.stdout)
    plot_scaling(rows, path)
    print(json.dumps({"config": name, "device": device_name(device), "threads": torch.get_num_threads(),
                      "dtype": str(dtype).removeprefix("torch."), "repeats": repeats, "peak_tflops": max(peaks) / 1e12,
                      "scaling": rows}))


def plot_scaling(rows, path):
    """Plot one panel for each axis: microseconds per token as measured, and at the peak of matrix products."""
    figure, panels = subplots(1, 3, figsize=(11, 3.4), dpi=150, sharey=True)
    for panel, axis in zip(panels, ("width", "seq_len", "batch_size")):
        points = [row for row in rows if row["axis"] == axis]
        x = [row[axis] for row in points]
        panel.loglog(x, [row["microseconds_per_token"] for row in points], "o-", label="measured")
        panel.loglog(x, [row["limit"] for row in points], "--", color="gray", label="all at the matmul peak")
        panel.set_xticks(x, map(str, x))
        panel.minorticks_off()
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds per token")
    panels[0].legend()
    save(figure, Path(path))


# ---- samplers --------------------------------------------------------------------------------------------------------

NAIVE = 20  # steps of the naive sampler that are timed, of 1,000 equal ones


class Stopwatch:
    """Sums the seconds of all calls of a function, and waits for the device before and after each."""

    def __init__(self, function, device):
        self.function, self.device, self.seconds = function, device, 0.0

    def __call__(self, *args, **more):
        synchronize(self.device)
        start = time.perf_counter()
        result = self.function(*args, **more)
        synchronize(self.device)
        self.seconds += time.perf_counter() - start
        return result


def sample_timed(sampler, model, objective, xt, device, dtype, seed, n_states):
    """Fill xt (B, L) with a sampler, up to its n_states-th State (None: to the end).

    Returns (seconds, the network's share of them, the share of drawing tokens, network calls)."""
    denoiser, draws = Stopwatch(Counted(model), device), Stopwatch(Draw.piece, device)
    start = time.perf_counter()
    with autocast(device, dtype), mock.patch.object(Draw, "piece", lambda *args: draws(*args)):
        states = sampler(objective, denoiser, xt, generator_on(device, seed))
        for _ in itertools.islice(states, n_states):
            pass
    synchronize(device)
    seconds = time.perf_counter() - start
    states.close()  # else its memory would be freed while the next one is timed
    return seconds, denoiser.seconds / seconds, draws.seconds / seconds, denoiser.function.nfe


def samplers(name, cfg, model, objective, device, dtype, repeats, batch_size, first):
    """Print the time of each sampler for a batch, and its ratio to the naive one. The samplers alternate.

    first: run only this many steps of each (None: all). This shows what a step costs outside the network, but not the
    whole time.
    With --compile the network of all samplers but the naive one is compiled.
    """
    if not objective.any_order:
        raise UserError(f"--samplers needs a masked model, and {name} is not one: choose a masked config")
    chain = {"grid": schedule_grid(cfg.schedule, cfg.T)}
    naive = "naive, 1000 steps"
    ways = {naive: textbook.sample, f"ancestral, {cfg.T} steps": Settings("ancestral", chain).states,
            "first_hitting": Settings("first_hitting").states, "topk, k = 4": Settings("topk", {"k": 4}).states,
            "threshold": Settings("threshold").states, "entropy_bound": Settings("entropy_bound").states,
            f"remdm, {cfg.T} steps": Settings("remdm", chain).states}
    networks, compiled = dict.fromkeys(ways, model), bool(cfg.compile)
    if compiled:
        networks[naive] = copy.deepcopy(model)
        parallel.compile_trunk(model)
    xt = torch.full((batch_size, cfg.seq_len), objective.mask_id, device=device)
    timings = {way: [] for way in ways}
    for repeat in progress(range(-1, repeats), desc="repeats", leave=False):  # one to warm up and compile
        for way, sampler in ways.items():
            n_states = first or (NAIVE if way == naive else None)
            timing = sample_timed(sampler, networks[way], objective, xt, device, dtype, repeat + 1, n_states)
            if repeat >= 0:
                timings[way].append(timing)
    rows = []
    for way in ways:
        seconds, network, drawing, nfe = (statistics.median(values) for values in zip(*timings[way]))
        row = {"sampler": way, "nfe": nfe, "seconds": seconds, "ratio": None, "tokens_per_second": None,
               "network": network, "drawing": None, "elsewhere": None}
        if way == naive and not first:  # all steps cost the same
            row |= {"nfe": nfe * 1000 / NAIVE, "seconds": seconds * 1000 / NAIVE}
        if way != naive:  # the naive one draws without Draw
            row |= {"drawing": drawing, "elsewhere": 1 - network - drawing}
        rows.append(row)
    for row in rows if not first else ():
        row |= {"ratio": row["seconds"] / rows[0]["seconds"],
                "tokens_per_second": batch_size * cfg.seq_len / row["seconds"]}
    print(f"{name}: {batch_size} samples of {cfg.seq_len} tokens, {objective.mask_id:,} different ones, an untrained "
          f"network of {in_short(count_parameters(model))} parameters, {device_name(device)}, "
          f"{torch.get_num_threads()} threads, {str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}; "
          + (f"the first {first} steps of each" if first else f"{NAIVE} of the naive steps timed"))
    table(rows, {"sampler": ("", ""), "nfe": ("NFE", ".0f"), "seconds": ("seconds", ".2f"), "ratio": ("ratio", ".3f"),
                 "tokens_per_second": ("tokens/s", ",.0f"), "network": ("network", ".1%"),
                 "drawing": ("drawing tokens", ".1%"), "elsewhere": ("elsewhere", ".1%")}, sys.stdout)
    print(json.dumps({"config": name, "device": device_name(device), "batch_size": batch_size, "repeats": repeats,
                      "seq_len": cfg.seq_len, "vocab_size": objective.mask_id, "first": first, "compiled": compiled,
                      "samplers": rows}))


def data_set(cfg):
    """Facts about the config's data set: its meta.json if it is prepared, else those in KNOWN, else its size N from the
    name NAME_bpeN, else a guess: 27 symbols."""
    try:
        return load_meta(cfg.dataset, cfg.data_dir)
    except UserError:
        if cfg.dataset in KNOWN:
            return KNOWN[cfg.dataset]
        if bpe := re.search(r"_bpe(\d+)$", cfg.dataset):
            return {"vocab_size": int(bpe[1])}
        return {"vocab_size": 27, "guess": True}


def main():
    chosen, args = configs.from_command_line("bench.py", __doc__, add_arguments, several=True)
    device = pick_device(chosen[0][1].device)
    dtype = pick_dtype(device, chosen[0][1].dtype)
    size = lambda cfg: args.vocab_size or data_set(cfg)["vocab_size"]
    (name, cfg), *more = chosen
    if (args.first or args.samples) and not args.samplers:
        raise UserError("--first and --samples need --samplers")
    if not args.estimate and (args.gpu or args.gpus or args.mfu):
        raise UserError("--gpu, --gpus and --mfu need --estimate")
    if args.estimate and args.repeats:
        raise UserError("--estimate times nothing: leave out --repeats")
    repeats = args.repeats or 10
    if more and (args.scaling or args.samplers):
        raise UserError("--scaling and --samplers take one config at a time")
    if args.estimate:
        for name, cfg in chosen:
            estimate(name, cfg, size(cfg), args.gpu or "h100", args.gpus, args.mfu or 0.25)
    elif args.scaling:
        require("matplotlib", "--scaling")
        check_place("--scaling", Path(args.scaling), ".png")
        scaling(name, cfg, size(cfg), device, dtype, repeats, args.scaling)
    elif args.samplers:
        check_fits(weight_bytes(cfg, size(cfg)), device, name, "use a smaller model")
        model, objective = cfg.make_model(size(cfg)).to(device).eval(), cfg.make_objective(size(cfg))
        samplers(name, cfg, model, objective, device, dtype, repeats, args.samples or 8, args.first)
    else:
        trainings = []
        for name, cfg in chosen:
            if args.compare and cfg.objective_class not in (D3PM, MDLM):
                raise UserError(f"--compare is only for d3pm and mdlm with masks, and {name} is neither")
            if args.compare and (cfg.schedule != "linear" or cfg.prefix != "none"):
                raise UserError("--compare needs --schedule=linear and --prefix=none, as studies/textbook.py does")
            cfg = replace(cfg, lambda_ce=0.0) if args.compare else cfg
            trainings.append(Training(name, cfg, size(cfg), device, dtype))
            if args.compare:
                trainings.append(Naive(f"{name}, naive", cfg, size(cfg), device))
        print(json.dumps(throughput(trainings, repeats, args.compare)))
    for dataset in {cfg.dataset for _, cfg in chosen if not args.vocab_size and "guess" in data_set(cfg)}:
        note(f"the data set {dataset} is not prepared: 27 different tokens were assumed (--vocab_size N: others)")


if __name__ == "__main__":
    run(main)
