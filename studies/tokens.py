"""Characters against tokens of a BPE: do small tokens cost masked diffusion more than left-to-right models?

    python data/prepare_gutenberg.py && python data/prepare_gutenberg.py --tokenizer bpe:4096
    python studies/tokens.py out/tokens --jobs 2

Lee et al. (arXiv 2605.12928) say so of bytes: masks leave few whole words to read. Token shift gives each position the
embedding of the one before, so it may mend that. Eight kinds of runs are compared: characters or tokens, diffusion or
left to right, with token shift or without. All see the same number of bytes, in windows of as many bytes and batches of
as many windows, by the same transformer (mdlm_mini_fast, 0.8M parameters without the 0.5M of the embeddings of tokens).
The learning rate of each kind is tuned by factors of 2, by the validation of seed 1.

It prints bits per byte of the test split, what characters cost (characters less tokens), and how much more they cost
diffusion, with errors over seeds. Diffusion has a bound, left to right its exact likelihood. It writes tokens.json.
Finished runs are not repeated.
"""

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import ArgumentParser, UserError, run, table, write_file
from configs import CONFIGS
from data.loader import load_meta
from log import finite
from studies import runs
from studies.runs import over_seeds

KINDS = {"diffusion": [], "left to right": ["--objective=ar", "--weighting=nelbo", "--time_sampling=uniform"]}
TOKENS = "characters", "BPE"


class Study:
    def __init__(self, args):
        self.args, base = args, CONFIGS["mdlm_mini_fast"]()
        self.datasets = dict(zip(TOKENS, (args.dataset, f"{args.dataset}_bpe4096")))
        bytes_per_token = {}
        for tokens, dataset in self.datasets.items():
            meta = load_meta(dataset, args.data_dir)
            if "bytes" not in meta:
                raise UserError(f"{dataset} does not say how many bytes its text has: delete it and prepare it again")
            bytes_per_token[tokens] = meta["bytes"]["train"] / meta["sizes"]["train"]
        window = base.seq_len * bytes_per_token["characters"]  # bytes
        self.seq_len = {tokens: round(window / size) for tokens, size in bytes_per_token.items()}
        self.steps = {tokens: round(args.steps * window / (self.seq_len[tokens] * size))
                      for tokens, size in bytes_per_token.items()}

    def run(self, tokens, kind, shift, lr, seed):
        """(folder, arguments of train.py) of a run."""
        steps = self.steps[tokens]
        out = self.args.folder / f"{tokens}_{kind.replace(' ', '_')}_{'shift' if shift else 'plain'}_lr={lr:g}_{seed}"
        flags = ["mdlm_mini_fast", *KINDS[kind], f"--shift_tokens={shift}", f"--lr={lr}", f"--seed={seed}",
                 f"--seq_len={self.seq_len[tokens]}", f"--max_steps={steps}", f"--warmup_steps={max(1, steps // 20)}",
                 f"--eval_interval={steps}", "--eval_sequences=512", "--sample_interval=0"]
        return out, flags

    def tune(self, tokens, *key):
        """Train one run, or continue it. Returns {"val": bits per token of its validation}."""
        return runs.validated(*self.run(tokens, *key), self.args, self.datasets[tokens])

    def measure(self, tokens, *key):
        """Train one run, or continue it. Returns {"bits": per byte of the test split, "val": per token}."""
        return runs.trained(*self.run(tokens, *key), self.args, dataset=self.datasets[tokens], unit="byte")


def main():
    p = ArgumentParser(description=__doc__)
    runs.add_arguments(p, steps=1500)
    args = p.parse_args()
    runs.refuse(args, ("seq_len", *runs.SWEPT))
    runs.make_folder(args.folder, args)
    study, seeds = Study(args), range(1, args.seeds + 1)
    kinds = list(itertools.product(TOKENS, KINDS, (False, True)))
    best, _ = runs.tuned(kinds, study.tune, args.jobs)
    found = runs.in_stages([[(*kind, best[kind], seed) for seed in seeds for kind in kinds]], study.measure, args.jobs)
    bits = {kind: [found[(*kind, best[kind], seed)]["bits"] for seed in seeds] for kind in kinds}

    rows = []
    for tokens, kind, shift in kinds:
        mean, error = over_seeds(bits[tokens, kind, shift])
        rows.append({"tokens": tokens, "kind": kind, "shift": "yes" if shift else "no", "lr": best[tokens, kind, shift],
                     "bits": finite(mean), "stderr": error})
    (characters, tokens), (steps, as_many) = study.seq_len.values(), study.steps.values()
    print(f"bits per byte on {args.dataset} test, {args.windows:,} windows, {args.seeds} seeds; trained for {steps:,} "
          f"steps on windows of {characters} characters, and for {as_many:,} steps on windows of {tokens} tokens")
    table(rows, {"tokens": ("", ""), "kind": ("", ""), "shift": ("token shift", ""), "lr": ("lr", "g"),
                 "bits": ("bits", ".4f"), "stderr": ("±", ".4f")}, sys.stdout)

    less = lambda one, two: [a - b for a, b in zip(one, two)]
    costs = {(kind, shift): less(bits["characters", kind, shift], bits["BPE", kind, shift])
             for kind in KINDS for shift in (False, True)}
    answers = {f"characters less BPE, {kind}, {'with' if shift else 'without'} token shift": cost
               for (kind, shift), cost in costs.items()}
    for shift in (False, True):
        answers[f"what they cost diffusion more, {'with' if shift else 'without'} token shift"] = less(
            costs["diffusion", shift], costs["left to right", shift])
    summary = {name: over_seeds(values) for name, values in answers.items()}
    table([{"what": name, "bits": finite(mean), "stderr": error} for name, (mean, error) in summary.items()],
          {"what": ("bits per byte, by seed", ""), "bits": ("", "+.4f"), "stderr": ("±", ".4f")}, sys.stdout)
    write_file(args.folder / "tokens.json", json.dumps({"rows": rows, "answers": summary}) + "\n")


if __name__ == "__main__":
    run(main)
