"""Is BERT one step of text diffusion? Train as BERT, continue at all mask rates, and compare with diffusion throughout.

    python studies/adaptation.py out/adaptation                        # all runs, the tables and the figures
    python studies/adaptation.py out/adaptation --seeds 1 --steps 200  # a quick look

    A      trained as BERT is: 15 % of the tokens are predicted (diffusion.BERT), S steps
    B n    A, then n steps at all mask rates
    C      all S steps at all mask rates (MDLM)
    D n    a left-to-right network of S steps, then n steps at all mask rates and with full attention; it predicts the
           next token
    E n    as D n, but attention grows from causal to full in the first half of the n steps

All are one network of 0.8M parameters (mdlm_mini_fast without token shift, so that it is a plain transformer encoder),
on the same windows, masks and seeds. Every run is one of train.py, every number one of evaluate.py. What is there is
not run again, so an interrupted study continues with the same command. It writes adaptation.json, mask_rates.png and
steps.png.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import log
from cli import ArgumentParser, UserError, named, number, progress, require, run, table, write_file
from plot import picture

PLAIN = ["mdlm_mini_fast", "--no-shift_tokens", "--sample_interval=0", "--eval_sequences=256"]
KINDS = {  # what a run has beside PLAIN
    "A": ["--objective=bert", "--time_sampling=uniform"],
    "C": [],
    "AR": ["--objective=ar", "--weighting=nelbo", "--time_sampling=uniform"],
    "B": ["--lr=3e-3"],  # of 0.75e-3, 1.5e-3, 3e-3 and 6e-3 (LOG.md)
    "D": ["--predict_next"],
    "E": ["--predict_next"],
}
SOURCES = {"B": "A", "D": "AR", "E": "AR"}
JUDGE_SEED = 1000  # of one more AR, which scores the samples


def parse_args():
    p = ArgumentParser(description=__doc__)
    p.add_argument("folder", type=named, help="folder for the runs and the results")
    p.add_argument("--dataset", default="gutenberg", help="data set of characters (default: gutenberg)")
    p.add_argument("--data_dir", default="", help="folder that has the data sets (default: data/)")
    p.add_argument("--seeds", type=number(int, 1, 100), default=3, help="number of seeds (default 3)")
    p.add_argument("--steps", type=number(int, 16), default=2000, help="training steps S (default 2000)")
    p.add_argument("--windows", type=number(int, 2), default=1024, help="windows of the test split (default 1024)")
    p.add_argument("--samples", type=number(int, 1), default=64, help="samples of each model (default 64)")
    p.add_argument("--calls", default="16,64,128", help="sampling steps (default 16,64,128)")
    p.add_argument("--jobs", type=number(int, 1), default=1, help="runs at a time, one thread each (default 1)")
    p.add_argument("--flags", type=named, nargs="*", default=[], metavar="KEY=VALUE",
                   help="settings of train.py for all runs, such as n_embd=64")
    return p.parse_args()


def call(script, *arguments):
    """Run a command of this project with one thread. Returns its stdout. Raises UserError with its last line."""
    done = subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise UserError(f"{script} {' '.join(map(str, arguments))} failed: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def once(path, measure):
    """Return the JSON object in a file, which is measured and written if there is none yet."""
    if not path.exists():
        write_file(path, json.dumps(measure()) + "\n")
    return json.loads(path.read_text())


class Study:
    """The runs of the study: names are KIND_SEED or KIND_SEED_N."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.folder)
        self.extra = [f"--{flag}" for flag in args.flags]
        halves = [args.steps // 2**i for i in (4, 3, 2, 1, 0)]
        self.lengths = {"B": halves, "D": halves, "E": halves[2::2]}  # the numbers n
        seeds = range(1, args.seeds + 1)
        first = [(kind, seed, args.steps) for seed in seeds for kind in ("A", "C", "AR")]
        self.stages = [first + [("AR", JUDGE_SEED, args.steps)],
                       [(kind, seed, n) for kind in SOURCES for n in self.lengths[kind] for seed in seeds]]

    def out(self, kind, seed, n):
        return self.folder / (f"{kind}_{seed}_{n}" if kind in SOURCES else f"{kind}_{seed}")

    def train(self, kind, seed, n):
        """Train one run, or continue it, and score it on the test split."""
        out, warmup = self.out(kind, seed, n), max(1, n // 40)
        flags = [*PLAIN, *KINDS[kind], f"--dataset={self.args.dataset}", f"--data_dir={self.args.data_dir}",
                 f"--seed={seed}", f"--max_steps={n}", f"--warmup_steps={warmup}", f"--eval_interval={n}",
                 f"--out_dir={out}", *self.extra]
        if kind in SOURCES:
            flags += [f"--init_from={self.out(SOURCES[kind], seed, self.args.steps)}"]
        if kind == "E":
            flags += [f"--anneal_steps={n // 2}"]

        def measure():
            call("train.py", *flags, "--resume=auto")
            seq_len = log.read(out / "log.jsonl")[0]["config"]["seq_len"]
            return json.loads(call("evaluate.py", out, "--split", "test", "--data_dir", self.args.data_dir, "--json",
                                   "--n_tokens", seq_len * self.args.windows))

        return once(self.folder / f"{out.name}.json", measure)["bits_per_token"]

    def bits(self):
        """Train all. Returns {(kind, seed, n): bits per token on the test split}."""
        found, total = {}, sum(map(len, self.stages))
        with progress(total=total, desc="runs") as bar, ThreadPoolExecutor(self.args.jobs) as pool:
            for stage in self.stages:
                for key, bits in zip(stage, pool.map(lambda key: self.train(*key), stage)):
                    found[key] = bits
                    bar.update()
        return found

    def curve(self, kind, seed, n):
        """The cross-entropy by mask rate: [(mask rate, bits)]."""
        out = self.out(kind, seed, n)
        found = once(self.folder / f"{out.name}.curve.json", lambda: json.loads(call(
            "evaluate.py", out, "--split", "test", "--data_dir", self.args.data_dir, "--curve", "--json")))
        return list(zip(found["mask_rate"], found["bits_per_token"]))

    def samples(self, kind, seed, n):
        """Samples and real text, judged: the rows of evaluate.py --samples."""
        out, judge = self.out(kind, seed, n), self.out("AR", JUDGE_SEED, None)
        steps = [] if kind == "AR" else ["--steps", self.args.calls]
        return once(self.folder / f"{out.name}.samples.json", lambda: json.loads(call(
            "evaluate.py", out, "--split", "test", "--data_dir", self.args.data_dir, "--samples", self.args.samples,
            *steps, "--judge", judge, "--json")))["samples"]


def mean_and_spread(values):
    """Mean over seeds and standard error of it (None for one seed)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def steps_to_reach(level, points):
    """The n at which bits fall to a level: points [(n, bits)], interpolated in log n. None if they do not."""
    for (n0, b0), (n1, b1) in zip(points, points[1:]):
        if b1 <= level < b0:
            return n0 * (n1 / n0) ** ((b0 - level) / (b0 - b1))
    return points[0][0] if points[0][1] <= level else None


def main():
    args = parse_args()
    require("matplotlib", "a picture")
    try:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {args.folder}: {error.strerror}")
    study, seeds, S = Study(args), range(1, args.seeds + 1), args.steps
    bits = study.bits()

    # ---- bits, and the steps to reach C ----
    rows, by_steps = [], {}
    for kind, n in [("A", S), ("C", S), ("AR", S), *((kind, n) for kind in SOURCES for n in study.lengths[kind])]:
        mean, error = mean_and_spread([bits[kind, seed, n] for seed in seeds])
        paired, paired_error = mean_and_spread([bits[kind, seed, n] - bits["C", seed, S] for seed in seeds])
        rows.append(dict(run=kind, steps=n, bits=mean, stderr=error, less_c=paired, less_c_stderr=paired_error))
        if kind in SOURCES:
            by_steps.setdefault(kind, []).append((n, mean, error))
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds; ± standard error "
          "over seeds")
    table(rows, {"run": ("", ""), "steps": ("steps", ",d"), "bits": ("bits", ".4f"), "stderr": ("±", ".4f"),
                 "less_c": ("less C", "+.4f"), "less_c_stderr": ("±", ".4f")}, sys.stdout)
    needed = {}
    for kind in SOURCES:
        needed[kind] = [steps_to_reach(bits["C", seed, S], [(n, bits[kind, seed, n]) for n in study.lengths[kind]])
                        for seed in seeds]
        print(f"steps that {kind} needs to reach C, by seed: "
              + ", ".join("not reached" if n is None else f"{n:,.0f}" for n in needed[kind]))
    picture(study.folder / "steps.png", by_steps, "steps n at all mask rates", "bits per character (a bound)",
            log_x=True, level=(f"C, {S:,} steps", statistics.mean(bits["C", seed, S] for seed in seeds)))

    # ---- cross-entropy by mask rate ----
    shown, curves = [("A", S), *(("B", n) for n in study.lengths["B"][::2]), ("C", S), ("D", S)], {}
    for kind, n in progress(shown, desc="curves"):
        points = [study.curve(kind, seed, n) for seed in seeds]
        name = f"{kind} {n:,}" if kind in SOURCES else kind
        curves[name] = [(column[0][0], *mean_and_spread([y for _, y in column])) for column in zip(*points)]
    picture(study.folder / "mask_rates.png", curves, "mask rate", "bits per masked character")

    # ---- samples ----
    quality = []
    shown = [("A", S), *(("B", n) for n in study.lengths["B"][::2]), ("C", S), ("D", S), ("AR", S)]
    for kind, n in progress(shown, desc="samples"):
        by_seed = [study.samples(kind, seed, n) for seed in seeds]
        for row in range(len(by_seed[0]) - 1):  # the last row is real text
            one = [rows[row] for rows in by_seed]
            judge, judge_error = mean_and_spread([r["judge_bits_per_char"] for r in one])
            entropy, entropy_error = mean_and_spread([r["unigram_entropy_bits"] for r in one])
            quality.append(dict(
                run=kind, steps=n, calls=statistics.mean(r["nfe"] for r in one), judge=judge,
                judge_stderr=judge_error, entropy=entropy, entropy_stderr=entropy_error,
                known_words=statistics.mean(r["known_words"] for r in one)))
    real = by_seed[0][-1]
    quality.append(dict(run="real text", steps=None, calls=None, judge=real["judge_bits_per_char"],
                        judge_stderr=real["judge_stderr_per_char"], entropy=real["unigram_entropy_bits"],
                        entropy_stderr=None, known_words=real["known_words"]))
    print(f"{args.samples} samples of each seed, judged by another left-to-right network")
    table(quality, {"run": ("", ""), "steps": ("steps", ",d"), "calls": ("network calls", ".0f"),
                    "judge": ("judge, bits/char", ".3f"), "judge_stderr": ("±", ".3f"),
                    "entropy": ("entropy", ".3f"), "entropy_stderr": ("±", ".3f"),
                    "known_words": ("known words", ".3f")}, sys.stdout)
    write_file(study.folder / "adaptation.json", json.dumps(
        {"bits": rows, "steps_to_reach_c": needed, "curves": curves, "samples": quality}) + "\n")


if __name__ == "__main__":
    run(main)
