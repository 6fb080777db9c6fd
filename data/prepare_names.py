"""Prepare `names`: 29,494 first names (Andrej Karpathy's makemore), or a list of your own, one name per line.

    python data/prepare_names.py
    python data/prepare_names.py --file towns.txt --name towns
    python data/prepare_names.py --file sums.txt --name sums --length 64       # lines such as "17 + 25 = 42"

A name takes 32 tokens, or --length: its letters, then pads, an extra symbol of the alphabet that is no part of the
text. Repeated names count once, so the splits share no name. They are 90 % train, 5 % val, 5 % test, shuffled with a
fixed seed. Any alphabet is possible. Names that are longer, or contain the character of the pad, are left out. Then
train the config `names`, with --dataset=NAME for a list of your own, and --seq_len=LENGTH.
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, named, note, number, run
from data.prepare import DatasetWriter, check_name, cut, fetch, is_prepared, named_files, parser, read_text
from data.tokenizer import CharTokenizer, characters

URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
LENGTH = 32  # tokens of a name
PAD = "\N{MIDDLE DOT}"


def clean(text, length=LENGTH):
    """Return (the different names of a text, one per line, {why lines were left out: how many})."""
    lines = [line.strip() for line in text.splitlines()]
    full = [line for line in lines if line]
    fit = [line for line in full if len(line) <= length]
    good = [line for line in fit if PAD not in line]
    names = list(dict.fromkeys(good))
    return names, {"empty": len(lines) - len(full), f"longer than {length}": len(full) - len(fit),
                   f"with a {PAD}": len(fit) - len(good), "repeated": len(good) - len(names)}


def main():
    p = parser(__doc__)
    p.add_argument("--file", type=named, help="file to use instead of a download: UTF-8 text, plain, .gz or .xz")
    p.add_argument("--name", default="names", help="name of the data set (default: names)")
    p.add_argument("--length", type=number(int, 1, 10**5), default=LENGTH, help=f"tokens of a name (default {LENGTH})")
    args = p.parse_args()
    check_name(args.name)
    folder = args.data_dir / args.name
    request = {"files": named_files([args.file]) if args.file else [URL]}
    if is_prepared(folder, request | {"record": args.length}):
        return
    names, left_out = clean(read_text(args.file) if args.file else fetch(URL, SHA256).decode("ascii"), args.length)
    counts = ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    if len(names) < 20:
        raise UserError(f"{args.file} has {len(names)} usable names{f' (left out: {counts})' if counts else ''}, "
                        "and three splits need at least 20")
    random.Random(1).shuffle(names)
    alphabet = "".join(sorted(set().union(*names))) + PAD
    meta = characters(alphabet) | {"pad": PAD, "record": args.length, "request": request,
                                   "source": Path(args.file).name if args.file else URL}
    encode = CharTokenizer(alphabet).encode
    with DatasetWriter(folder, meta) as writer:
        for split, part in cut(names, train=0.9, val=0.05).items():
            ids = encode("".join(name.ljust(args.length, PAD) for name in part))
            writer.append(split, ids, len("".join(part).encode()))
    note(f"{len(names):,} names{f'; left out: {counts}' if counts else ''}")


if __name__ == "__main__":
    run(main)
