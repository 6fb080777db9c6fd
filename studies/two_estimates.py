"""Check the likelihoods of all runs in some folders by a second estimator, which knows nothing of the first.

    python studies/two_estimates.py out/mixers out/demo --jobs 2

A run is a folder with ckpt.pt: one of those given, or inside one of them. `evaluate.py --check` scores each on the test
split by its own estimator and by another one of the same number, on the same windows. The others draw their masks from
other distributions: with a rate for each window in place of a number of masks, or a step for each window in place of
strata of steps. Runs of different names have noise of their own. So if both estimators are right, z = difference / its
standard error has mean 0 and a variance of about 1 over the runs (less for blocks, docs/evaluation.md).

The exact likelihood of left-to-right models is computed once more, with one network call for each token, on 32 windows.
Nothing is random there: the two numbers must be equal up to rounding.

It prints every difference, and exits with code 1 if one of them is larger than four standard errors and 0.0001 bits.
RUN.check.json beside each run keeps the answer. It is not measured again, unless the run was trained on since, or
--windows or --repeats are others.
"""

import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, number, run, table

import storage
from evaluate import MIN_DRAWS
from studies import runs


def checked(out, args):
    """Return what check() returns, from the file beside the run if that is of the same weights and settings."""
    payload, kept = storage.read(out), out.with_name(f"{out.name}.check.json")
    about = {"windows": args.windows, "repeats": args.repeats, "weights": storage.digest(payload["ema"])}
    if kept.exists() and runs.read(kept).get("about") != about:
        kept.unlink()
    return runs.once(kept, lambda: check(out, payload["config"], args) | {"about": about})


def check(out, config, args):
    """Two estimates of a run's likelihood: what a row of the table has, and whether one is "exact"."""
    exact = config["objective"] == "ar"
    if exact and config.get("prefix", "none") != "none":  # its likelihood is exact, and --check has no second way
        return {"agree": "no second way", "exact": True}
    windows = min(args.windows, 32) if exact else args.windows
    words = ["--n_tokens", config["seq_len"] * windows, "--seed", zlib.crc32(out.name.encode()),
             *([] if exact else ["--repeats", args.repeats])]
    found = runs.unless_infinite(lambda: json.loads(
        runs.call("evaluate.py", out, *runs.data_flags(args), "--check", *words, ok=(0, 1))))
    if found is None:
        return {"agree": "no likelihood", "exact": exact}
    difference, error = found["check"]["difference"], found["check"]["stderr"]
    return {"first": found["bits_per_token"], "second": found["check"]["second"]["bits_per_token"],
            "difference": difference, "stderr": error, "z": difference / error if error else None,
            "agree": "yes" if found["check"]["agree"] else "NO", "exact": exact}


def runs_in(folders):
    """The runs that the folders are, or have inside. Raises UserError if one has none."""
    found = []
    for folder in folders:
        here = [path.parent for path in sorted(folder.rglob("ckpt.pt"))]
        if not here:
            raise UserError(f"{folder} has no run (a folder with ckpt.pt)")
        found += here
    return list(dict.fromkeys(found))


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument("folders", type=Path, nargs="+", help="runs, or folders of runs")
    p.add_argument("--data_dir", default="", help="folder that has the data sets (default: data/)")
    p.add_argument("--windows", type=number(int, 32), default=512, help="windows of the test split (default 512)")
    p.add_argument("--repeats", type=number(int, 1), default=2, help="draws of the noise for each window (default 2)")
    p.add_argument("--jobs", type=number(int, 1), default=1, help="runs at a time, one thread each (default 1)")
    args = p.parse_args()
    if args.windows * args.repeats < MIN_DRAWS:
        p.error(f"--windows times --repeats must be at least {MIN_DRAWS}, what evaluate.py --check asks for")
    outs = runs_in(args.folders)
    found = runs.in_stages([[(out,) for out in outs]], lambda out: checked(out, args), args.jobs)
    results = [{"run": str(out), **found[out,]} for out in outs]
    table(results, {"run": ("", ""), "first": ("bits", ".4f"), "second": ("again", ".4f"),
                    "difference": ("difference", "+.4f"), "stderr": ("±", ".4f"), "z": ("z", "+.2f"),
                    "agree": ("agree", "")}, sys.stdout)
    z = [result["z"] for result in results if result.get("z") is not None and not result["exact"]]
    count = lambda word: sum(result["agree"] == word for result in results)
    print(f"{count('yes')} agree, {count('NO')} disagree"
          + (f"; {len(z)} estimates with noise: mean of z {sum(z) / len(z):+.2f}, of z² "
             f"{sum(x * x for x in z) / len(z):.2f}, largest |z| {max(map(abs, z)):.2f}" if z else ""))
    if count("NO"):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
