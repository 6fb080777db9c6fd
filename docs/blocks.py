"""Draws docs/blocks.png, the figure of docs/blocks.md: `python docs/blocks.py FOLDER ...`.

Each FOLDER has a quality.csv of `evaluate.py CKPT --samples N --judge JUDGE`: one line of points for each, the judge's
bits per character by the tokens that the network read for each text.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plot import picture


def points(folder):
    """[(tokens read, bits, standard error)] of a quality.csv, sorted, and the bits of real text."""
    with open(Path(folder, "quality.csv")) as file:
        rows = list(csv.DictReader(file))
    found = [tuple(float(row[key]) for key in ("tokens_read", "judge_bits_per_char", "judge_stderr_per_char"))
             for row in rows if row["tokens_read"]]
    return sorted(found), float(rows[-1]["judge_bits_per_char"])


if __name__ == "__main__":
    found = {Path(folder).name: points(folder) for folder in sys.argv[1:]}
    *_, (_, real) = found.values()
    picture(Path(__file__).with_name("blocks.png"), {name: line for name, (line, _) in found.items()},
            "tokens that the network read, per text", "bits per character to the judge", log_x=True,
            level=("real text", real))
