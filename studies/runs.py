"""Runs of train.py and scores of evaluate.py, each done once and kept: what studies of many runs share.

A study that is interrupted continues with the same command. It repeats no finished run.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import log
from cli import UserError, number, progress, write_file
from data.loader import load_meta

ROOT = Path(__file__).resolve().parent.parent
RUNNING = set()  # the processes that call() waits for
# settings that ask for more or fewer runs, or for other samples of them
CHANGE_NO_RUN = "folder", "data_dir", "seeds", "jobs", "epochs", "budgets", "sizes", "samples", "calls"


def add_arguments(parser, steps):
    """Add the flags of every study of runs; steps=0: the study chooses the number of steps."""
    parser.add_argument("folder", type=Path, help="folder for the runs and the results")
    parser.add_argument("--dataset", default="gutenberg", help="data set of characters (default: gutenberg)")
    parser.add_argument("--data_dir", default="", help="folder that has the data sets (default: data/)")
    parser.add_argument("--seeds", type=number(int, 1, 100), default=3, help="number of seeds (default 3)")
    if steps:
        parser.add_argument("--steps", type=number(int, 16), default=steps, help=f"training steps (default {steps})")
    parser.add_argument("--windows", type=number(int, 2), default=1024, help="windows of the test split (default 1024)")
    parser.add_argument("--jobs", type=number(int, 1), default=1, help="runs at a time, one thread each (default 1)")
    parser.add_argument("--flags", nargs="*", default=[], metavar="KEY=VALUE",
                        help="settings of train.py for all runs, such as weight_decay=0.3")


def make_folder(path, args, name="settings"):
    """Make the folder of a study, and keep its settings in NAME.json, but for those that change no run.

    Raises UserError if it has runs with other settings or on other data, or the data set is not prepared.
    """
    data = load_meta(args.dataset, args.data_dir)  # before anything is kept
    settings = {key: value for key, value in vars(args).items() if key not in CHANGE_NO_RUN}
    hashes = data.get("sha256", {})
    settings["data"] = hashes.get("train", "")[:16]
    settings["held out"] = " ".join(hashes.get(split, "")[:16] for split in ("val", "test"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror}")
    kept = path / f"{name}.json"
    if list(path.iterdir()) == [kept]:
        kept.unlink()  # of a call that ended before its first run
    before = once(kept, lambda: settings)
    for key in settings:
        old = settings[key] if key in ("data", "held out") else None  # older folders do not say of which data
        was = before.get(key, old)
        if was != settings[key]:
            raise UserError(f"{path} has runs with {key}={was}, not {settings[key]}: choose another folder")


SWEPT = "lr", "seed", "max_steps"  # what a study gives each run itself
SIZES = "n_layer", "n_embd", "n_head", "seq_len", "batch_size", "micro_batch_size"


def refuse(args, keys):
    """Raise UserError if --flags has one of these settings, which a study chooses itself."""
    for flag in args.flags:
        key = flag.split("=")[0]
        if key in keys:
            raise UserError(f"--flags {flag}: this study chooses {key} itself; leave it out")


def call(script, *arguments, ok=(0,)):
    """Run a command of this project with one thread. Returns its stdout. Raises UserError with its last line.

    ok: exit codes that are no failure.
    """
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    RUNNING.add(process)
    out, err = process.communicate()
    RUNNING.remove(process)
    if process.returncode not in ok:
        last = (err.strip() or "no message").splitlines()[-1]
        raise UserError(f"{script} {' '.join(map(str, arguments))} failed: {last}")
    return out


def once(path, measure):
    """Return the JSON object in a file, which is measured and written if there is none yet."""
    if not path.exists():
        write_file(path, json.dumps(measure()) + "\n")
    return read(path)


def read(path):
    """Return the JSON object that once() has written. Raises UserError if the file has something else."""
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: restore it, or delete it, and the same command writes it again")
    return found


def train(out, *words):
    """Train the run `out` with these arguments of train.py, or continue it. Returns the objects of its log.

    Raises UserError if it was stopped: Ctrl-C reaches the runs of a study, too, and they end as if all were well."""
    call("train.py", *words, f"--out_dir={out}", "--resume=auto")
    lines = log.read(out / "log.jsonl")
    if "stopped" in lines[-1]:
        raise UserError(f"{out} was stopped: the same command goes on with it")
    return lines


def validated(out, flags, args, dataset=None):
    """Train the run `out`, or continue it. Returns {"val": its best validation, bits per token}, by which settings are
    chosen. It is infinite if the run's weights became so.

    dataset: if not that of all runs.
    """
    def measure():
        lines = train(out, *flags, f"--dataset={dataset or args.dataset}", f"--data_dir={args.data_dir}",
                      *(f"--{flag}" for flag in args.flags))
        return {"val": min((line["val_bits_per_token"] for line in lines
                            if line.get("val_bits_per_token") is not None), default=None)}

    val = once(out.with_name(f"{out.name}.val.json"), lambda: unless_infinite(measure) or {"val": None})["val"]
    return {"val": math.inf if val is None else val}


def trained(out, flags, args, best=False, how=(), dataset=None, unit="token"):
    """Train the run `out`, or continue it, and score it. Returns {"bits": on the test split, "val": as validated}.

    best: at the checkpoint of the best validation. how: more flags of evaluate.py. unit: of the bits, "token" or
    "byte". Both are infinite if its weights or its likelihood became so.
    """
    val = validated(out, flags, args, dataset)["val"]

    def measure():
        if not math.isfinite(val):
            return None
        seq_len = log.read(out / "log.jsonl")[0]["config"]["seq_len"]
        return json.loads(call("evaluate.py", out / "ckpt_best.pt" if best else out, *data_flags(args), "--n_tokens",
                               seq_len * args.windows, *how))

    key = f"bits_per_{unit}"
    bits = once(out.with_name(f"{out.name}.json"), lambda: unless_infinite(measure) or {key: None})[key]
    return {"bits": math.inf, "val": math.inf} if bits is None else {"bits": bits, "val": val}


def unless_infinite(measure):
    """Return measure(), or None if a command of it says that weights or a likelihood are not finite."""
    try:
        return measure()
    except UserError as error:
        if "not finite" in str(error):
            return None
        raise


def data_flags(args):
    """Flags of evaluate.py that all scores of a study have."""
    return ["--split", "test", "--data_dir", args.data_dir, "--json"]


def curve_of(out, args):
    """The cross-entropy by mask rate of a run: [(mask rate, bits)]."""
    found = once(out.with_name(f"{out.name}.curve.json"),
                 lambda: json.loads(call("evaluate.py", out, *data_flags(args), "--curve")))
    return list(zip(found["mask_rate"], found["bits_per_token"]))


def in_stages(stages, work, jobs):
    """Call work(*key) for the keys of each stage, a list, `jobs` at a time. Returns {key: result}."""
    found = {}
    with progress(total=sum(map(len, stages)), desc="runs") as bar, ThreadPoolExecutor(jobs) as pool:
        try:
            for stage in stages:
                for key, result in zip(stage, pool.map(lambda key: work(*key), stage)):
                    found[key] = result
                    bar.update()
        except (KeyboardInterrupt, SystemExit):  # a run that is told to end saves itself first
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                process.terminate()
            raise
    return found


def tuned(kinds, measure, jobs):
    """Tune the learning rate of each kind, a tuple. Returns ({kind: best rate}, {(*kind, rate, 1): result}).

    measure(*kind, rate, seed) returns a dict with "val", by which seed 1 decides. If the best of the rates tried is the
    smallest or the largest one, half of it or twice as much is tried, too, and so on.
    """
    tried, best, found = {kind: {1.5e-3, 3e-3, 6e-3} for kind in kinds}, {}, {}
    while new := [(*kind, rate, 1) for kind in kinds for rate in sorted(tried[kind]) if (*kind, rate, 1) not in found]:
        found |= in_stages([new], measure, jobs)
        for kind in kinds:
            val = {rate: found[(*kind, rate, 1)]["val"] for rate in sorted(tried[kind])}
            best[kind] = rate = min(val, key=val.get)
            ends = {min(val): rate / 2, max(val): 2 * rate}
            lowest, second, *_ = sorted(val.values())
            if rate in ends and lowest < second:  # equal ones, such as two infinite ones, say nothing
                tried[kind].add(ends[rate])
    return best, found


def over_seeds(values):
    """Mean over seeds and the standard error of it (None for one seed, or if the mean is not finite)."""
    mean = sum(values) / len(values)
    if len(values) < 2 or not math.isfinite(mean):
        return mean, None
    return mean, statistics.stdev(values) / math.sqrt(len(values))


def mean_curve(curves):
    """[(x, mean, standard error)] of curves [(x, y)] with the same x."""
    return [(column[0][0], *over_seeds([y for _, y in column])) for column in zip(*curves)]
