"""Prepare your own text, as characters or as tokens: a BPE of its own, GPT-2's, BERT's, or any on the Hub.

    python data/prepare_textfile.py book.txt --name book
    python data/prepare_textfile.py *.txt.gz --name letters --tokenizer gpt2
    python data/prepare_textfile.py book.txt --name book_bpe --tokenizer bpe:4096       # a vocabulary of this text
    python data/prepare_textfile.py book.txt --name book_roberta --tokenizer roberta    # or hf://OWNER/NAME, a folder
    python data/prepare_textfile.py book.txt --name tuned --tokenizer pretrained/prose  # to fine-tune a checkpoint
    python data/prepare_textfile.py train.txt --val val.txt --test test.txt --name mine --alphabet text8

Files are UTF-8, plain, .gz or .xz, and are joined in the order given, with a line end between them. Without --val and
--test, the last tenth of the text becomes val and test, half each. (prepare_openwebtext.py holds out whole documents.)
To train on the data set, pass --dataset=NAME.
"""

import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, named, note, progress, run
from data.loader import SPLITS
from data.prepare import check_name, cut, is_prepared, named_files, parser, read_text, write_splits
from data.tokenizer import (KNOWN, TEXT8_ALPHABET, characters, is_checkpoint, make_tokenizer, size_of_bpe, text8_words,
                            tokens_of)

CHUNK = 1 << 20  # characters encoded at a time


def main():
    p = parser(__doc__)
    p.add_argument("files", nargs="+", type=named, metavar="FILE", help="text to train on")
    p.add_argument("--name", required=True, help="name of the data set")
    p.add_argument("--val", type=named, metavar="FILE", help="text to validate on; needs --test")
    p.add_argument("--test", type=named, metavar="FILE", help="text to test on; needs --val")
    p.add_argument("--tokenizer", type=named, default="char", metavar="KIND|CKPT|hf://NAME",
                   help="kind of tokens: char (default), gpt2, bpe:SIZE (a vocabulary of this many tokens, made of the "
                   "text to train on), bert, roberta, those of a checkpoint, to fine-tune it, or the tokenizer of a "
                   "model of transformers (hf://NAME or a folder), which the data set then has a copy of")
    p.add_argument("--alphabet", choices=("own", "text8"), default="own",
                   help="symbols of --tokenizer char: the text's own (default), or text8's 27 (the text is converted)")
    args = p.parse_args()
    if bool(args.val) != bool(args.test):
        p.error("--val and --test need each other: give both or neither")
    if args.tokenizer != "char" and args.alphabet == "text8":
        p.error("--alphabet text8 needs --tokenizer char")
    check_name(args.name)
    if args.tokenizer.startswith("bpe:"):
        size_of_bpe(args.tokenizer)  # refuses what is not a size
    folder, held_out = args.data_dir / args.name, [file for file in (args.val, args.test) if file]
    request = {"files": named_files(args.files), "val and test": named_files(held_out), "tokenizer": args.tokenizer,
               "alphabet": args.alphabet}
    if is_prepared(folder, request):
        return

    *first, last = map(read_text, args.files)
    texts = ["".join(text if text.endswith("\n") else text + "\n" for text in first) + last]
    texts += [read_text(path) for path in held_out]
    if args.alphabet == "own" and any("\r\n" in text for text in texts):
        note("the text has Windows' line ends, \\r\\n, and both characters are kept: convert it first if you want \\n")
    known = tokens_of(args.tokenizer, None) if is_checkpoint(args.tokenizer) else None
    of_letters = known and make_tokenizer(known).alphabet == TEXT8_ALPHABET
    if args.alphabet == "text8" or of_letters:
        texts = [" ".join(text8_words(text)) for text in texts]
        if not all(texts):
            raise UserError("the text has no letters from a to z: choose "
                            + ("another --tokenizer" if of_letters else "--alphabet own"))
        if of_letters:
            note(f"the text is converted into a ... z and spaces, because {args.tokenizer} knows nothing else")
    if args.val:
        splits = dict(zip(SPLITS, texts))
    else:
        splits = cut(texts[0], train=0.9, val=0.05)
        if args.tokenizer != "char":
            splits = whole_lines(*splits.values())
    if known:
        meta = known
    elif args.tokenizer != "char":
        meta = tokens_of(args.tokenizer, lambda: [splits["train"]])
    elif args.alphabet == "text8":
        meta = dict(KNOWN["text8"])
    else:
        alphabet = "".join(sorted(set().union(*texts)))
        if len(alphabet) > 65_536:
            raise UserError(f"the text has {len(alphabet):,} different characters, more than 65,536: "
                            "use --tokenizer gpt2")
        meta = characters(alphabet)
    meta |= {"source": ", ".join(Path(file).name for file in args.files), "request": request}
    tokenizer = make_tokenizer(meta)
    write_splits(folder, meta, splits, lambda text: encode(text, tokenizer))


def whole_lines(train, val, test):
    """Move the beginnings of val and test to the beginning of a line or a word, so that no token is cut."""
    moved = next_start(test)
    val, test = val + test[:moved], test[moved:]
    moved = next_start(val)
    return {"train": train + val[:moved], "val": val[moved:], "test": test}


def next_start(text):
    """Return the place of the second line of a text, or of its first space; 0 if neither is in the first half."""
    half = len(text) // 2
    return text.find("\n", 0, half) + 1 or max(text.find(" ", 0, half), 0)


def encode(text, tokenizer):
    """Encode chunk by chunk. Chunks end after a line break, where GPT-2's, RoBERTa's and BERT's tokens end."""
    lines = re.split(r"(?<=\S\n)(?=\S)|(?<=\n)(?= \S)", text)
    chunks, size = [[]], 0
    for line in lines:
        if size > CHUNK:
            chunks.append([])
            size = 0
        chunks[-1].append(line)
        size += len(line)
    return np.concatenate([tokenizer.encode("".join(chunk)) for chunk in progress(chunks, desc="encoding", unit="MB")])


if __name__ == "__main__":
    run(main)
