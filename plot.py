"""Draw the training curves of runs, from their log.jsonl, into a PNG file.

    python plot.py out/demo
    python plot.py out/d3pm_text8 out/mdlm_text8 --out text8.png --x hours --from_step 10000
"""

import io
import os
from pathlib import Path

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, check_place, note, number, require, run, write_file

import log
from likelihood import plus_minus

AXES = {"step": "step", "tokens": "training tokens", "hours": "hours of training"}


def parse_args():
    p = ArgumentParser(description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")
    p.add_argument("--out", type=Path, default=Path("curves.png"), metavar="FILE",
                   help="PNG file to write (default: curves.png)")
    p.add_argument("--x", choices=AXES, default="tokens", help="horizontal axis (default: tokens)")
    p.add_argument("--log_x", action="store_true", help="use a logarithmic horizontal axis")
    p.add_argument("--from_step", type=number(int, 0), default=0, help="first step to draw (default 0)")
    return p.parse_args()


def curves(path, from_step=0):
    """(name, data set, training, validation) from the log of a run. Raises UserError.

    training: a list of (step, tokens, hours, bits per token). validation: the same and the standard error.
    """
    path = path / "log.jsonl" if path.is_dir() or not path.suffix else path
    entries = log.read(path)
    try:
        dataset = next((entry["config"]["dataset"] for entry in entries if "config" in entry), None)
        training, validation = rows(entries, from_step)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        raise UserError(f"{path} is not a log of train.py: numbers are missing in its lines")
    if not training and not validation:
        raise UserError(f"{path} has no losses to draw{f' from step {from_step:,} on' if from_step else ''}")
    return path.resolve().parent.name, dataset, training, validation


def rows(entries, from_step):
    """(training, validation) of curves(), from the objects of a log."""
    hours, before, training, validation = 0.0, None, [], []
    for entry in entries:
        before = before or entry  # time counts from the last line of losses, also if the run was stopped after it
        if "bits_per_token" in entry:
            hours += (entry["tokens"] - before["tokens"]) / entry["tokens_per_second"] / 3600
            before = entry
        where = (entry["step"], entry["tokens"], hours)
        if entry["step"] < from_step:
            continue
        if entry.get("bits_per_token") is not None:
            training.append((*where, float(entry["bits_per_token"])))
        if entry.get("val_bits_per_token") is not None:
            validation.append((*where, float(entry["val_bits_per_token"]), abs(entry["val_stderr"] or 0.0)))
    return training, validation


def subplots(*shape, **options):
    """plt.subplots for a file: no display is needed."""
    os.environ["MPLBACKEND"] = "Agg"  # that of a notebook may not be installed here
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a $ in the name of a folder is a $
    import matplotlib.pyplot as plt
    return plt.subplots(*shape, **options)


def legible(name):
    """A name for a legend: matplotlib hides one that begins with _, and cannot draw bytes that are no text."""
    name = name.encode(errors="replace").decode()
    return f" {name}" if name.startswith("_") else name


def draw(runs, out, x, log_x):
    """Draw training as a thin line and validation as points ± 2 standard errors, in one colour per run."""
    figure, axes = subplots(figsize=(8, 5), dpi=150)
    for i, (name, _, training, validation) in enumerate(runs):
        name = legible(name)
        color, column = f"C{i}", list(AXES).index(x)
        if training:
            axes.plot([row[column] for row in training], [row[3] for row in training], color=color, alpha=0.4, lw=0.8,
                      label=None if validation else name)
        if validation:
            axes.errorbar([row[column] for row in validation], [row[3] for row in validation],
                          [2 * row[4] for row in validation], color=color, marker="o", ms=3, lw=1, capsize=2,
                          label=f"{name}: {validation[-1][3]:.3f} {plus_minus(validation[-1][4] or None, 3)}")
    axes.set(xlabel=AXES[x], ylabel="bits per token (a bound; exact from left to right)",
             xscale="log" if log_x else "linear")
    axes.set_title("line: training; points: validation of the averaged weights, with bars of 2 standard errors\n"
                   "Errors of runs on the same windows vary together: `evaluate.py A B` has that of their difference.",
                   fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend(title="last validation ± standard error" if any(validation for *_, validation in runs) else None)
    save(figure, out)


def picture(out, series, x, y, log_x=False, level=None):
    """Draw {name: [(x, y, standard error or None)]} with ± 2 standard errors, and level (name, y) as a dashed line."""
    figure, axes = subplots(figsize=(8, 5), dpi=150)
    for i, (name, points) in enumerate(series.items()):
        name = legible(name)
        xs, ys, errors = zip(*sorted(points))
        axes.errorbar(xs, ys, [2 * (error or 0) for error in errors], marker="o", ms=3, lw=1, capsize=2, label=name,
                      ls="-" if i < 10 else "--")  # there are ten colours
    if level:
        axes.axhline(level[1], color="gray", ls="--", lw=1, label=level[0])
    axes.set(xlabel=x, ylabel=y, xscale="log" if log_x else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, out)


def panels(out, t, curves):
    """Draw {title: {name: y (n,)}} over t (n,), one panel per title. All y axes but the first are logarithmic."""
    figure, row = subplots(1, len(curves), figsize=(4 * len(curves), 4), dpi=150)
    for axes, (title, lines) in zip(row, curves.items()):
        for i, (name, y) in enumerate(lines.items()):
            axes.plot(t, y, label=name, ls=("-", "--", "-.", ":")[i % 4])  # two curves may be equal
        axes.set(xlabel="t", title=title, yscale="linear" if axes is row[0] else "log")
        axes.grid(alpha=0.3)
    row[0].legend()
    save(figure, out)


def save(figure, out):
    """Write a figure as PNG. A failure leaves the old file. Raises UserError."""
    import matplotlib.pyplot as plt

    png = io.BytesIO()
    figure.tight_layout()
    figure.savefig(png, format="png")
    plt.close(figure)
    write_file(out, png.getvalue())


def main():
    require("matplotlib", "a picture")
    args = parse_args()
    check_place("--out", args.out, ".png")
    runs = [curves(path, args.from_step) for path in args.runs]
    names = [name for name, *_ in runs]
    if len(set(names)) < len(names):  # a/demo and b/demo
        runs = [(str(path), *rest) for path, (_, *rest) in zip(args.runs, runs)]
    if len(datasets := {str(dataset) for _, dataset, *_ in runs}) > 1:
        note(f"these runs are of several data sets ({', '.join(sorted(datasets))}): bits per token compare only if "
             "their tokens are the same")
    draw(runs, args.out, args.x, args.log_x)
    note(f"{args.out}: {', '.join(name for name, *_ in runs)}")


if __name__ == "__main__":
    run(main)
