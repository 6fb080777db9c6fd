"""Prepare `names`: 29,494 first names (Andrej Karpathy's makemore), or a list of your own, one name per line.

    python data/prepare_names.py
    python data/prepare_names.py --file towns.txt --name towns
    python data/prepare_names.py --file sums.txt --name sums --length 64       # lines such as "17 + 25 = 42"
    python data/prepare_names.py --file chats.jsonl --name chats --length 512 --tokenizer gpt2

A name takes 32 tokens, or --length: its letters, then pads, an extra symbol of the alphabet that is no part of the
text. Repeated names count once, so the splits share no name. They are 90 % train, 5 % val, 5 % test, shuffled with a
fixed seed. Any alphabet is possible. Names that are longer, or contain the character of the pad, are left out. Then
train the config `names`, with --dataset=NAME for a list of your own, and --seq_len=LENGTH.

With --tokenizer the items are in its tokens, and its end of text fills them up. Items of several lines are in a file
.jsonl, .json or .parquet with a column `text`.
"""

import random
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, named, note, number, run
from data.prepare import DatasetWriter, check_name, cut, fetch, is_prepared, named_files, parser, read_text
from data.prepare_openwebtext import load_documents
from data.tokenizer import CharTokenizer, characters, make_tokenizer, tokens_of

URL = "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt"
SHA256 = "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d"
LENGTH = 32  # tokens of a name
PAD = "\N{MIDDLE DOT}"


def clean(lines, length=LENGTH, tokenizer=None):
    """Return (the different names of some lines, {why lines were left out: how many}).

    tokenizer: counts the tokens of a name; None: they are its characters, and PAD is none of them."""
    lines = [line.strip() for line in lines]
    full = [line for line in lines if line]
    fit = [line for line in full if len(tokenizer.encode(line) if tokenizer else line) <= length]
    good = [line for line in fit if tokenizer or PAD not in line]
    names = list(dict.fromkeys(good))
    return names, {"empty": len(lines) - len(full), f"longer than {length}": len(full) - len(fit),
                   f"with a {PAD}": len(fit) - len(good), "repeated": len(good) - len(names)}


def lines_of(file):
    """The lines of a text file, or the values of the column `text` of a .jsonl, .json or .parquet."""
    if Path(file).suffix in (".jsonl", ".json", ".parquet"):
        return [text or "" for text in load_documents([file])["text"]]
    return read_text(file).splitlines()


def main():
    p = parser(__doc__)
    p.add_argument("--file", type=named, help="file to use instead of a download: UTF-8 text, plain, .gz or .xz, one "
                   "item per line; or .jsonl, .json or .parquet with a column `text`")
    p.add_argument("--name", default="names", help="name of the data set (default: names)")
    p.add_argument("--length", type=number(int, 1, 10**5), default=LENGTH, help=f"tokens of a name (default {LENGTH})")
    p.add_argument("--tokenizer", type=named, default="char", metavar="KIND|CKPT|hf://NAME",
                   help="kind of tokens: char (default), gpt2, those of a checkpoint, or of a model of transformers")
    args = p.parse_args()
    check_name(args.name)
    folder = args.data_dir / args.name
    request = {"files": named_files([args.file]) if args.file else [URL]}
    request |= {"tokenizer": args.tokenizer} if args.tokenizer != "char" else {}
    if is_prepared(folder, request | {"record": args.length}):
        return
    lines, tokenizer = lines_of(args.file) if args.file else fetch(URL, SHA256).decode("ascii").splitlines(), None
    if args.tokenizer != "char":
        meta = tokens_of(args.tokenizer, lambda: lines, items=True)
        tokenizer = make_tokenizer(meta)
        if tokenizer.end is None:
            raise UserError(f"--tokenizer {args.tokenizer} has no token that ends a text, to fill shorter items up: "
                            "use char, gpt2, or the tokens of a large language model")
    names, left_out = clean(lines, args.length, tokenizer)
    counts = ", ".join(f"{n:,} {why}" for why, n in left_out.items() if n)
    if len(names) < 20:
        raise UserError(f"{args.file} has {len(names)} usable names{f' (left out: {counts})' if counts else ''}, "
                        "and three splits need at least 20")
    random.Random(1).shuffle(names)
    if tokenizer is None:
        alphabet = "".join(sorted(set().union(*names))) + PAD
        meta, tokenizer = characters(alphabet) | {"pad": PAD}, CharTokenizer(alphabet, PAD)
    meta |= {"record": args.length, "request": request, "source": Path(args.file).name if args.file else URL}
    with DatasetWriter(folder, meta) as writer:
        for split, part in cut(names, train=0.9, val=0.05).items():
            for ids in map(tokenizer.encode, part):
                writer.append(split, np.pad(ids, (0, args.length - len(ids)), constant_values=tokenizer.end), 0)
            writer.append(split, [], len("".join(part).encode()))
    note(f"{len(names):,} names{f'; left out: {counts}' if counts else ''}")


if __name__ == "__main__":
    run(main)
