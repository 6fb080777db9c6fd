"""The settings of a sampler: command-line flags -> sampling.Settings, and the grids of mask rates that they ask for."""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from categorical import SURE
from cli import UserError, number
from configs import OBJECTIVES
from sampling import DEFAULT_ETA, SAMPLERS, Settings
from schedules import SCHEDULES, make_schedule
from storage import digest

NAMES = list(dict.fromkeys(name for objective in OBJECTIVES.values() if not objective.causal
                           for name in objective.samplers))  # for --sampler; causal networks have no choice
FLAGS = list(dict.fromkeys(flag for sampler in SAMPLERS.values() for flag in sampler.flags if flag != "steps"))
DEFAULTS = {"threshold": 0.9, "gamma": 0.1, "remask": "cap"}
CORRECTION = ("correct", "correct_temperature")
# flags for all samplers: fields of Settings
COMMON = ("temperature", "top_p", "top_k", "block_length", "dual_cache", *CORRECTION)


def grid_flag(text):
    """An argparse type: a schedule's name, auto, or mask rates such as 1,0.8,0.3,0."""
    if text == "auto":
        return text
    if text.split(":")[0] in SCHEDULES:
        try:
            make_schedule(text)
        except ValueError as error:
            raise UserError(f"--grid {error}")
        return text
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError:
        rates = []
    if len(rates) < 2 or rates[0] != 1 or rates[-1] != 0 or not all(r - rho > 1e-9 for r, rho in zip(rates, rates[1:])):
        raise UserError(f"--grid {text!r} is not a grid: use {', '.join(SCHEDULES)}, auto, or mask rates that fall "
                        "from 1 to 0, each by more than 1e-9, such as 1,0.8,0.3,0")
    return rates


def temperature_flag(text):
    """An argparse type: 0, or a number from 0.001 to 100, which float32 can represent well."""
    value = number(float, 0, 100)(text)
    if 0 < value < 1e-3:
        raise argparse.ArgumentTypeError(f"{text} is below 0.001: use 0, which draws the likeliest token")
    return value


def steps_flag(text):
    """An argparse type: a number of steps, or auto."""
    return "auto" if text == "auto" else number(int, 1, 10**6)(text)


def add_arguments(parser):
    """Add the flags of samplers, for sample.py and evaluate.py, except --sampler and --steps."""
    p = parser.add_argument_group("settings of the sampler")
    p.add_argument("--grid", type=grid_flag, help="mask rates of the steps: a schedule such as cosine, rates such as "
                   "1,0.8,0.3,0, or auto: chosen from the curve of evaluate.py --curve (default: the model's schedule)")
    p.add_argument("--k", type=number(int, 1), help="tokens that topk reveals per step, instead of --steps and --grid")
    p.add_argument("--by", choices=SURE, help="what makes topk sure of a token: its probability, the margin between "
                   "the two likeliest tokens there, or a low entropy there (default probability)")
    p.add_argument("--threshold", type=number(float, 0, 1),
                   help="probability at which the sampler threshold reveals a token (default 0.9)")
    p.add_argument("--gamma", type=number(float, 0), help="limit of entropy_bound in nats per step: sum of the "
                   "entropies of its tokens - the largest of them (default 0.1)")
    p.add_argument("--remask", choices=DEFAULT_ETA, help="rule by which remdm masks tokens again (default cap)")
    p.add_argument("--eta", type=number(float, 0, 1), help="strength of the remasking of remdm (default: "
                   + ", ".join(f"{rule} {eta}" for rule, eta in DEFAULT_ETA.items()) + ")")
    p.add_argument("--block_length", type=number(int, 1), metavar="N",
                   help="fill the masks from left to right, N at a time, each piece by the sampler (and its --steps); "
                   "the network sees the whole text (default: all masks at once)")
    p.add_argument("--dual_cache", action="store_true", default=None,
                   help="with --block_length, for large language models: read the whole text once for each piece, and "
                   "then the piece alone, which sees keys and values of the rest as they were; faster, not exact")
    p.add_argument("--correct", type=number(int, 1, 10**6), metavar="N",
                   help="then change at most N tokens of each text, one by one, where the network disagrees most: the "
                   "self-correction of GIDD, for models that were trained on random tokens")
    p.add_argument("--correct_temperature", type=number(float, 1e-3, 100), metavar="X",
                   help="temperature of --correct (default 0.1)")
    p.add_argument("--temperature", type=temperature_flag, help="temperature of the token distribution; below 1: "
                   "likelier tokens, less variety; 0: the likeliest token (default 1)")
    p.add_argument("--top_p", type=number(float, 1e-6, 1),
                   help="draw only from the fewest tokens that together have this probability (default 1)")
    p.add_argument("--top_k", type=number(int, 1), help="draw only from this many likeliest tokens (default: all)")


def given_flags(args, steps):
    """{flag: value} of the samplers' own flags that were given, --steps included."""
    flags = {"steps": steps} | {name: getattr(args, name) for name in FLAGS}
    return {name: value for name, value in flags.items() if value is not None}


def common_flags(args):
    """{flag: value} of the flags for all samplers that were given."""
    return {name: getattr(args, name) for name in COMMON if getattr(args, name) is not None}


def settings_of(args, config, checkpoint, model, sampler, flags):
    """Make Settings from args and flags (from given_flags), for the model of a checkpoint.

    sampler: a name, or None for the objective's default. Raises UserError for flags that the sampler does not know, for
    flags that contradict each other, and for auto without a curve.
    """
    common, objective = common_flags(args), config.objective_class
    sampler = pick_sampler(sampler, flags, common, objective, f"{checkpoint} {objective.description}")
    known = SAMPLERS[objective.samplers[sampler]].flags
    own = {flag: value for flag, value in DEFAULTS.items() if flag in known} | flags
    if "dual_cache" in common:
        check_dual_cache(common, args.compile, checkpoint, model)
    remask, steps, grid = own.get("remask"), own.pop("steps", None), own.pop("grid", None)
    if remask:
        own.setdefault("eta", DEFAULT_ETA[remask])
    if "steps" in known and "k" not in own:
        own["grid"] = make_grid(steps, grid, config, checkpoint, model, remask, args.raw)
    return Settings(sampler, own, name_of_grid(steps, grid, remask), **common)


def pick_sampler(sampler, flags, common, objective, described):
    """Return the sampler's name. Raises UserError for flags that the objective or the sampler does not know, and for
    flags that contradict each other.

    sampler, flags: as for settings_of. common: from common_flags. described: the checkpoint in words.
    """
    for flag in ("block_length", "dual_cache"):
        if flag in common and not objective.any_order:
            raise UserError(f"--{flag} is for models of masks in whole texts, and {described}: leave it out")
    if common.keys() & {*CORRECTION} and not objective.random_tokens:
        raise UserError(f"--correct is for models that were trained on random tokens, and {described}: leave it out")
    if "correct_temperature" in common and "correct" not in common:
        raise UserError("--correct_temperature is that of --correct: add --correct N")
    if objective.causal and (sampler or flags):
        raise UserError(f"{described} and takes one step per token: leave out "
                        + ", ".join(f"--{name}" for name in (["sampler"] if sampler else []) + list(flags)))
    sampler = sampler or next(iter(objective.samplers))
    if sampler not in objective.samplers:
        raise UserError(f"--sampler {sampler} needs a model of masks in whole texts, and {described}: choose "
                        f"{' or '.join(objective.samplers)}")
    if not objective.any_order and "auto" in (flags.get("steps"), flags.get("grid")):
        raise UserError(f"auto needs a model of masks in whole texts, and {described}: use --steps N")
    uses = {name: SAMPLERS[function].flags for name, function in objective.samplers.items()}
    if unknown := [flag for flag in flags if flag not in uses[sampler]]:
        users = [name for name in uses if unknown[0] in uses[name]]
        raise UserError(f"--sampler {sampler} does not use --{unknown[0]}: leave it out"
                        + (f", or use {' or '.join(users)}" if users else ""))
    if common.get("temperature") == 0 and common.keys() & {"top_p", "top_k"}:
        raise UserError("--temperature 0 draws the likeliest token: leave out --top_p and --top_k")
    cuts = [flag for flag in common if flag not in CORRECTION]
    if cuts and not SAMPLERS[objective.samplers[sampler]].draws_tokens:
        raise UserError(f"--{cuts[0]} changes the token distribution, which euler does not use with uniform "
                        "noise: choose --sampler ancestral")
    if "k" in flags and (flags.get("steps") or flags.get("grid")):
        raise UserError("--k sets the number of tokens per step: leave out --steps and --grid")
    return sampler


def check_dual_cache(common, compiled, checkpoint, model):
    """Raise UserError if --dual_cache does not fit the other flags or the model."""
    if not hasattr(model, "within"):
        raise UserError(f"--dual_cache is for large language models, and {checkpoint} is none: leave it out")
    if "block_length" not in common:
        raise UserError("--dual_cache reads the rest of a text once for each piece: add --block_length N")
    if compiled:
        raise UserError("--dual_cache is not compiled: leave out --compile")


def name_of_grid(steps, grid, remask):
    """The name of a grid in reports; "" for the one of the model's schedule."""
    if isinstance(grid, list):
        return ",".join(map(str, grid))
    return grid or ("auto" if steps == "auto" else "loop" if remask == "loop" else "")


def make_grid(steps, grid, config, checkpoint, model, remask, raw):
    """The grid of mask rates that --steps, --grid and remdm's --remask ask for. Raises UserError."""
    if isinstance(grid, list) and remask != "loop":
        if steps:
            raise UserError(f"--grid already sets {len(grid) - 1} steps: leave out --steps")
        return grid
    if remask == "loop":
        if grid or steps == "auto":
            raise UserError("--remask loop has its own grid: leave out --grid, and use a number for --steps")
        if (steps or config.T) < 3:
            raise UserError(f"--remask loop needs at least 3 steps, not {steps or config.T}")
        return loop_grid(steps or config.T)
    if steps != "auto" and grid != "auto":
        return schedule_grid(grid or config.schedule, steps or config.T)
    if grid not in (None, "auto"):
        raise UserError(f"--steps auto also chooses the grid: leave out --grid {grid}")
    rates, ce = read_curve(checkpoint, model, raw)
    steps = enough_steps(rates, ce) if steps in (None, "auto") else steps
    if steps > 256:
        raise UserError(f"--grid auto works for at most 256 steps, not {steps}")
    return best_grid(rates, ce, steps)


def read_curve(checkpoint, model, raw=False):
    """(mask rates, cross-entropies) of curve.json beside a checkpoint. Raises UserError if it is of other weights.

    raw: the model has the raw weights, not their moving average.

    At rate r, beside a token that is a mask, each of the other L - 1 tokens is a mask with probability r. So the
    cross-entropy with k masks stands for the rate r = (k - 1)/(L - 1).
    """
    if checkpoint.startswith("hf://"):
        raise UserError(f"auto needs curve.json beside the checkpoint: download {checkpoint} into a folder first")
    path = Path(checkpoint)
    path = (path if path.is_dir() else path.parent) / "curve.json"
    again = f"run `python evaluate.py {checkpoint} --curve{' --raw' if raw else ''}` first"
    try:
        curve = json.loads(path.read_text())
        masks, ce = ([float(x) for x in curve[key]] for key in ("masks", "bits_per_token"))
        weights = curve["weights"]
    except FileNotFoundError:
        raise UserError(f"auto needs {path}, which does not exist: {again}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version: {again}")
    if (not len(masks) == len(ce) >= 2 or not all(0 <= x < math.inf for x in ce) or max(ce) == 0
            or not all(1 <= a < b < math.inf for a, b in zip(masks, masks[1:]))):
        raise UserError(f"{path} has no valid curve: {again}")
    if weights != digest(model.state_dict()):
        raise UserError(f"{path} was measured with other weights than those of {checkpoint}: {again}")
    return [(k - 1) / (masks[-1] - 1) for k in masks], ce


# ---- grids of mask rates ---------------------------------------------------------------------------------------------


def schedule_grid(schedule, steps):
    """The rates 1 - alpha(t) of a schedule (see schedules.make_schedule) at n + 1 equally spaced times from 1 to 0.

    The last rate is set to 0: alpha(0) is a little below 1 in the geometric schedule.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return [*(1 - make_schedule(schedule).alpha(times)).clamp(0, 1).tolist()[:-1], 0.0]


def loop_grid(steps, hold=0.1):
    """ReMDM-loop: 45 % of the steps go down to the mask rate `hold`, 50 % stay there, the rest go to 0. steps >= 3."""
    down, still = max(1, round(0.45 * steps)), max(1, round(0.5 * steps))
    down = min(down, steps - 2)
    still = min(still, steps - 1 - down)
    points = lambda a, b, n: torch.linspace(a, b, n + 1, dtype=torch.float64).tolist()
    return points(1, hold, down) + [hold] * still + points(hold, 0, steps - down - still)[1:]


def bound_on_grid(rates, ce, grid):
    """The bound of a chain on this grid, in the unit of ce: the sum of (r - rho) CE(r), with CE interpolated at r."""
    return sum((r - rho) * c for r, rho, c in zip(grid, grid[1:], np.interp(grid, rates, ce)))


def best_grid(rates, ce, steps, n_points=256):
    """The grid of n steps, made of mask rates i/n_points, on which bound_on_grid() is least.

    bound_on_grid() is the area under a staircase above the curve CE(r). The area between the two is the cost of
    revealing tokens in parallel. So steps belong where the curve rises. This is the optimal schedule of arXiv
    2510.25544, whose information profile is this curve. Dynamic programming finds it exactly:

        cost(rho, n steps) = min over r of cost(r, n - 1 steps) + (r - rho) CE(r).
    """
    points = np.linspace(0, 1, n_points + 1)
    step_cost = (points[:, None] - points) * np.interp(points, rates, ce)[:, None]  # [r, rho]
    step_cost[points[:, None] <= points] = np.inf
    cost, came_from = np.where(points == 1, 0, np.inf), []
    for _ in range(steps):
        total = cost[:, None] + step_cost
        came_from.append(total.argmin(0))
        cost = total.min(0)
    i, grid = 0, [0.0]
    for best in reversed(came_from):
        i = best[i]
        grid.append(float(points[i]))
    return grid[::-1]


def enough_steps(rates, ce):
    """The fewest steps whose best grid has a bound of at most 1.01 times the area under the curve, or 256."""
    area = bound_on_grid(rates, ce, np.linspace(1, 0, 10_001).tolist())
    low, high = 1, 256
    while low < high:
        n = (low + high) // 2
        enough = bound_on_grid(rates, ce, best_grid(rates, ce, n)) <= 1.01 * area
        low, high = (low, n) if enough else (n + 1, high)
    return low


def default_settings(config):
    """Settings to sample a config's model with, if no flag says otherwise: its objective's first sampler, in T steps if
    the sampler has steps."""
    name, function = next(iter(config.objective_class.samplers.items()))
    has_steps = "steps" in SAMPLERS[function].flags
    return Settings(name, {"grid": schedule_grid(config.schedule, config.T)} if has_steps else {})
