"""Compare diffusion throughout with BERT's training and with left-to-right training, each continued at all mask rates.

    python studies/adaptation.py out/adaptation                        # all runs, the tables and the figures
    python studies/adaptation.py out/adaptation --seeds 1 --steps 200  # a quick look

    A      trained as BERT is: 15 % of the tokens are predicted (foreign/bert.py), S steps
    B n    A, then n steps at all mask rates
    C      all S steps at all mask rates (MDLM), and once more with 2 S steps, as many as B S has had
    D n    AR, a left-to-right network of S steps, then n steps at all mask rates and with full attention. It still
           predicts the next token
    E n    as D n, but attention grows from causal to full in the first half of the n steps

All are one network of 0.8M parameters (mdlm_mini_fast without token shift, so that it is a plain transformer encoder),
on the same windows and seeds. B has a learning rate of 3e-3, the others have 6e-3 (LOG.md). Every run is one of
train.py, every number one of evaluate.py. Finished runs are not repeated. The study writes adaptation.json,
mask_rates.png and steps.png.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import ArgumentParser, number, require, run, table, write_file
from plot import picture
from studies import runs
from studies.runs import over_seeds

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
    runs.add_arguments(p, steps=2000)
    p.add_argument("--samples", type=number(int, 1), default=64, help="samples of each model (default 64)")
    p.add_argument("--calls", default="16,64,128", help="sampling steps (default 16,64,128)")
    return p.parse_args()


class Study:
    """The runs of the study: names are KIND_SEED, and KIND_SEED_N if they have other than S steps from nothing."""

    def __init__(self, args):
        self.args, self.folder = args, args.folder
        halves = [args.steps // 2**i for i in (4, 3, 2, 1, 0)]
        self.lengths = {"B": halves, "D": halves, "E": halves[2::2]}  # the numbers n
        seeds = range(1, args.seeds + 1)
        first = [(kind, seed, args.steps) for seed in seeds for kind in ("A", "C", "AR")]
        self.stages = [first + [("AR", JUDGE_SEED, args.steps)] + [("C", seed, 2 * args.steps) for seed in seeds],
                       [(kind, seed, n) for kind in SOURCES for n in self.lengths[kind] for seed in seeds]]

    def out(self, kind, seed, n):
        plain = kind not in SOURCES and n == self.args.steps
        return self.folder / (f"{kind}_{seed}" if plain else f"{kind}_{seed}_{n}")

    def bits(self, kind, seed, n):
        """Train one run, or continue it. Returns its bits per token on the test split."""
        flags = [*PLAIN, *KINDS[kind], f"--seed={seed}", f"--max_steps={n}", f"--warmup_steps={max(1, n // 40)}",
                 f"--eval_interval={n}"]
        if kind in SOURCES:
            flags += [f"--init_from={self.out(SOURCES[kind], seed, self.args.steps)}"]
        if kind == "E":
            flags += [f"--anneal_steps={n // 2}"]
        return runs.trained(self.out(kind, seed, n), flags, self.args)["bits"]

    def samples(self, kind, seed, n):
        """Samples and real text, judged: the rows of evaluate.py --samples."""
        out, judge = self.out(kind, seed, n), self.out("AR", JUDGE_SEED, self.args.steps)
        steps = [] if kind == "AR" else ["--steps", self.args.calls]
        name = f"{out.name}.samples_{self.args.samples}_{self.args.calls}.json"
        return runs.once(self.folder / name, lambda: json.loads(runs.call(
            "evaluate.py", out, *runs.data_flags(self.args), "--samples", self.args.samples, *steps, "--judge",
            judge)))["samples"]


def steps_to_reach(level, points):
    """The n at which bits fall to a level: points [(n, bits)], interpolated in log n. None if they do not."""
    if points[0][1] <= level:
        return points[0][0]
    for (n0, b0), (n1, b1) in zip(points, points[1:]):
        if b1 <= level < b0:
            return n0 * (n1 / n0) ** ((b0 - level) / (b0 - b1))


def main():
    args = parse_args()
    require("matplotlib", "a picture")
    runs.make_folder(args.folder, args)
    study, seeds, S = Study(args), range(1, args.seeds + 1), args.steps
    bits = runs.in_stages(study.stages, study.bits, args.jobs)
    lengths = study.lengths

    # ---- bits, and the steps to reach C ----
    rows, by_steps, needed = [], {}, {}
    tuned = [(kind, n) for kind in SOURCES for n in lengths[kind]]
    for kind, n in [("A", S), ("C", S), ("C", 2 * S), ("AR", S), *tuned]:
        mean, error = over_seeds([bits[kind, seed, n] for seed in seeds])
        less, less_error = over_seeds([bits[kind, seed, n] - bits["C", seed, S] for seed in seeds])
        rows.append(dict(run=kind, steps=n, bits=mean, stderr=error, less_c=less, less_c_stderr=less_error))
        if kind in SOURCES:
            by_steps.setdefault(kind, []).append((n, mean, error))
    print(f"bits per character on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds; ± standard error "
          "over seeds")
    table(rows, {"run": ("", ""), "steps": ("steps", ",d"), "bits": ("bits", ".4f"), "stderr": ("±", ".4f"),
                 "less_c": ("less C", "+.4f"), "less_c_stderr": ("±", ".4f")}, sys.stdout)
    for kind in SOURCES:
        needed[kind] = [steps_to_reach(bits["C", seed, S], [(n, bits[kind, seed, n]) for n in lengths[kind]])
                        for seed in seeds]
        print(f"steps that {kind} needs to reach C, by seed: "
              + ", ".join("not reached" if n is None else f"{n:,.0f}" for n in needed[kind]))
    picture(study.folder / "steps.png", by_steps, "steps n at all mask rates", "bits per character (a bound)",
            log_x=True, level=(f"C, {S:,} steps", statistics.mean(bits["C", seed, S] for seed in seeds)))

    # ---- cross-entropy by mask rate ----
    shown = [("A", S), *(("B", n) for n in lengths["B"][::2]), ("C", S), ("D", S)]
    found = runs.in_stages([[(kind, seed, n) for kind, n in shown for seed in seeds]],
                           lambda *key: runs.curve_of(study.out(*key), args), args.jobs)
    curves = {f"{kind} {n:,}" if kind in SOURCES else kind: runs.mean_curve([found[kind, seed, n] for seed in seeds])
              for kind, n in shown}
    picture(study.folder / "mask_rates.png", curves, "mask rate", "bits per masked character")

    # ---- samples ----
    quality, shown = [], [*shown, ("AR", S)]
    found = runs.in_stages([[(kind, seed, n) for kind, n in shown for seed in seeds]], study.samples, args.jobs)
    for kind, n in shown:
        by_seed = [found[kind, seed, n] for seed in seeds]
        for row in range(len(by_seed[0]) - 1):  # the last row is real text
            one = [rows_of_seed[row] for rows_of_seed in by_seed]
            judge, judge_error = over_seeds([r["judge_bits_per_char"] for r in one])
            entropy, entropy_error = over_seeds([r["unigram_entropy_bits"] for r in one])
            quality.append(dict(
                run=kind, steps=n, calls=statistics.mean(r["nfe"] for r in one), judge=judge,
                judge_stderr=judge_error, entropy=entropy, entropy_stderr=entropy_error,
                known_words=statistics.mean(r["known_words"] or 0 for r in one)))
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
