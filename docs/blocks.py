"""Draws docs/blocks.png, the figure of docs/blocks.md: `python docs/blocks.py FOLDER ...`.

Each FOLDER has a quality.csv of `evaluate.py CKPT --samples N --judge JUDGE`: one line of points for each, the judge's
bits per character by the tokens that the network read for each text.
"""

import csv
import sys
from pathlib import Path


def points(folder):
    """[(tokens read, bits, standard error)] of a quality.csv, sorted, and the bits of real text."""
    with open(Path(folder, "quality.csv")) as file:
        rows = list(csv.DictReader(file))
    found = [tuple(float(row[key]) for key in ("tokens_read", "judge_bits_per_char", "judge_stderr_per_char"))
             for row in rows if row["tokens_read"]]
    return sorted(found), float(rows[-1]["judge_bits_per_char"])


def draw(folders, out):
    """Write the figure to the file `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.5, 4), dpi=100)
    for folder in folders:
        found, real = points(folder)
        axes.errorbar(*zip(*[(x, y) for x, y, _ in found]), yerr=[error for *_, error in found], fmt="o-", ms=4,
                      label=Path(folder).name)
    axes.axhline(real, color="gray", ls="--", label="real text")
    axes.set(xscale="log", xlabel="tokens that the network read, per text", ylabel="bits per character to the judge")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out)


if __name__ == "__main__":
    draw(sys.argv[1:], Path(__file__).with_name("blocks.png"))
