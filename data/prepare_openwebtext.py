"""Prepare `openwebtext`: 8 million web pages (Gokaslan and Cohen), GPT-2 tokens, 9 billion of them: 18 GB on disk.

Every document is followed by the token that ends a text. A hash of its text assigns a document to train, val or test,
so copies of a page stay in one split. Documents stream from disk through a pool of processes, so memory use does not
grow with the corpus.

    python data/prepare_openwebtext.py --num_proc 16
    python data/prepare_openwebtext.py --file shard-*.parquet    # .parquet, .jsonl (field text) or .txt (a line each)
    python data/prepare_openwebtext.py --file docs.jsonl --name docs --held_out 0.05       # documents of your own
    python data/prepare_openwebtext.py --file docs.jsonl --name docs_qwen --tokenizer hf://Qwen/Qwen3-0.6B
"""

import glob
import hashlib
import itertools
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, named, note, number, progress, require, run
from data.loader import SPLITS
from data.prepare import DatasetWriter, check_name, folder_of, is_prepared, named_files, parser
from data.tokenizer import id_type, make_tokenizer, tokens_of

SOURCE = "Skylion007/openwebtext"  # on the Hugging Face Hub, as parquet files
BATCH = 200  # documents that a process encodes at a time
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text"}


def load_documents(files, source=SOURCE, name=None, split="train"):
    """Return documents as a Hugging Face data set with a column `text`, memory-mapped from its cache.

    files: local files, or None for a split of a data set on the Hub (source, and name, one of its parts). Raises
    UserError if they cannot be loaded, or have no text.
    """
    require("datasets", f"the text of {files[0]}" if files else f"the download of {source}")
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import CRITICAL, set_verbosity
    set_verbosity(CRITICAL)  # what goes wrong is said below, in one line
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if not files:
            return load_dataset(source, name, split=split)
        for file in files:
            if Path(file).is_dir():
                raise UserError(f"{file} is a folder: name its files")
            if not Path(file).is_file():
                raise UserError(f"no such file: {file}")
        kinds = {READERS.get(Path(file).suffix) for file in files}
        if None in kinds or len(kinds) > 1:
            raise UserError(f"--file takes files of one kind, one of {', '.join(READERS)}")
        documents = load_dataset(kinds.pop(), data_files=[glob.escape(str(file)) for file in files], split="train")
    except (OSError, ConnectionError, DatasetGenerationError, ValueError, StopIteration) as error:
        reason = (str(error.__cause__ or error).strip() or "it is empty").split("\n")[0][:150]
        raise UserError(f"could not load {', '.join(files or [source])} ({reason})"
                        + ("" if files else "; download its parquet files elsewhere and pass --file"))
    first = files[0] if files else source
    if "text" not in documents.column_names:
        raise UserError(f"{first} has no column `text`, only {', '.join(documents.column_names)}: rename "
                        "the one that has the texts")
    if (kind := getattr(documents.features["text"], "dtype", "list")) not in ("string", "large_string", "null"):
        raise UserError(f"the column `text` of {first} has values of type {kind}, and not text")
    return documents


def start_worker(meta, share):
    global tokenizer, held_out
    tokenizer, held_out = make_tokenizer(meta, plain=True), share


def encode(texts):
    """Encode documents as {split: (tokens, bytes)}, with the end of a text, which has no bytes, after each document."""
    tokens, n_bytes = {split: [] for split in SPLITS}, dict.fromkeys(SPLITS, 0)
    for text in filter(None, texts):  # a document may have no text
        text = text.removeprefix("\ufeff")  # the byte order mark of some editors
        place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") / 2**64
        split = "test" if place < held_out else "val" if place < 2 * held_out else "train"
        tokens[split] += [tokenizer.encode(text), [tokenizer.end]]
        n_bytes[split] += len(text.encode())
    return {split: (np.concatenate(parts).astype(id_type(tokenizer.vocab_size)), n_bytes[split])
            for split, parts in tokens.items() if parts}


def no_end(tokenizer):
    raise UserError(f"--tokenizer {tokenizer} has no token that ends a text, to stand after each document: use gpt2, "
                    "or the tokens of a large language model")


def main():
    p = parser(__doc__)
    p.add_argument("--file", nargs="+", type=named, metavar="FILE", help="local files to use instead of a download")
    p.add_argument("--name", default="openwebtext", help="name of the data set (default: openwebtext)")
    p.add_argument("--tokenizer", type=named, default="gpt2", metavar="KIND|CKPT|hf://NAME",
                   help="kind of tokens: gpt2 (default), those of a checkpoint, or of a model of transformers, if one "
                   "of them ends a text")
    p.add_argument("--num_proc", type=number(int, 1), default=os.cpu_count(),
                   help="number of processes (default: one per core)")
    p.add_argument("--held_out", type=number(float, 1e-6, 0.5), default=0.0005, metavar="SHARE",
                   help="share of documents for val, and for test (default 0.0005: about 4.5M tokens each)")
    args = p.parse_args()
    check_name(args.name)
    if args.name != "openwebtext" and not args.file:
        p.error("--name is for documents of your own: name their files with --file")
    folder = folder_of(args, args.name, "gpt2") if args.name == "openwebtext" else args.data_dir / args.name
    request = {"held_out": args.held_out} | ({"files": named_files(args.file, hashed=False)} if args.file else {})
    request |= {"tokenizer": args.tokenizer} if args.tokenizer != "gpt2" else {}
    if is_prepared(folder, request, "choose another --name" if args.file else "choose another --data_dir"):
        return
    documents = load_documents(args.file)
    tokens = tokens_of(args.tokenizer, lambda: no_end(args.tokenizer))  # a BPE of these documents would have no end
    if make_tokenizer(tokens).end is None:  # it also fills a cache for the workers
        no_end(args.tokenizer)
    if (held_out := len(documents) * args.held_out) < 50:
        note(f"val and test get about {held_out:.0f} of the {len(documents):,} documents each: a larger --held_out "
             "gives them more")
    meta = tokens | {"source": ", ".join(args.file) if args.file else SOURCE, "request": request}
    pool = ProcessPoolExecutor(args.num_proc, multiprocessing.get_context("spawn"), start_worker,
                               (tokens, args.held_out))
    with DatasetWriter(folder, meta) as writer, pool, progress(total=len(documents), unit="doc") as bar:
        batches = (batch["text"] for batch in documents.iter(BATCH))
        try:
            # pool.map would read the whole corpus ahead; waves of a few batches per process keep memory bounded.
            while wave := list(itertools.islice(batches, 8 * args.num_proc)):
                for texts, encoded in zip(wave, pool.map(encode, wave)):
                    for split, (ids, n_bytes) in encoded.items():
                        writer.append(split, ids, n_bytes)
                    bar.update(len(texts))
        except BrokenProcessPool:
            raise UserError("a process ended, perhaps for lack of memory: use a smaller --num_proc")


if __name__ == "__main__":
    run(main)
