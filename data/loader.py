"""Open prepared data sets, take random crops to train on and windows to evaluate on, and prefetch."""

import json
import queue
import re
import shlex
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import UserError
from data.tokenizer import TEXT8_ALPHABET, describes_tokens, id_type, make_tokenizer
from randomness import rng

DATA_DIR = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test")
VARIANTS = {"shakespeare27": "shakespeare.py --alphabet text8", "wikitext103": "wikitext.py --large"}
# Data sets in other tokens, as prepare.folder_of names them.
OTHER_TOKENS = re.compile(r"(pydoc(?=_gpt2)|gutenberg|wikitext|wikitext103)_(gpt2|bert|bpe\d+)")


def prepare_command(name, meta={}):
    """The command that prepares a data set of this name. meta: its meta.json, if it is known."""
    request, other = meta.get("request", {}), OTHER_TOKENS.fullmatch(name)  # request: what the script was asked for
    text, tokens = other.groups() if other else (name, "")
    by_own_script = not {"val and test", "held_out"} & request.keys() and "record" not in meta
    if "_" in name and not other and "tokenizer" in request and by_own_script:
        text, tokens = name.split("_")[0], request["tokenizer"]  # TEXT_CHECKPOINT: only meta has the checkpoint's path
    script, *flags = VARIANTS.get(text, f"{text}.py").split()
    if (DATA_DIR / f"prepare_{script}").exists() and text != "textfile":
        flags += ["--tokenizer", shlex.quote(re.sub(r"^bpe(?=\d)", "bpe:", tokens))] if tokens else []
        return " ".join([f"python data/prepare_{script}", *flags])
    tokens = f" --tokenizer {shlex.quote(request['tokenizer'])}" if "tokenizer" in request else ""
    if "record" in meta:
        length = f" --length {meta['record']}" if meta["record"] != 32 else ""
        return f"python data/prepare_names.py --file FILE --name {shlex.quote(name)}{length}{tokens}"
    if "held_out" in request:
        own = f" --file FILE --name {shlex.quote(name)}" if "files" in request else ""
        return f"python data/prepare_openwebtext.py{own} --held_out {request['held_out']}{tokens}"
    words = ["python data/prepare_textfile.py FILE --name", shlex.quote(name)]
    for key, default in (("tokenizer", "char"), ("alphabet", "own")):
        if request.get(key, default) != default:
            words += [f"--{key}", shlex.quote(request[key])]
    if request.get("val and test"):
        words.append("--val FILE --test FILE")
    return " ".join(words)


def load_meta(name, data_dir):
    """Return the meta.json of a data set. Raises UserError if it is damaged, or missing (with the remedy)."""
    folder = Path(data_dir or DATA_DIR) / name
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        there = f" --data_dir {shlex.quote(str(data_dir))}" if data_dir else ""
        raise UserError(f"data set {name!r} is not prepared in {folder.parent}: run {prepare_command(name)}{there}, or "
                        "name the folder that has it with --data_dir")
    except (ValueError, RecursionError):
        meta = None

    def of_splits(key, kind):
        return isinstance(meta.get(key), dict) and meta[key].keys() == set(SPLITS) and all(
            type(value) is kind for value in meta[key].values())

    if not describes_tokens(meta) or meta.get("dtype") not in ("uint8", "uint16", "uint32") or not (
            of_splits("sizes", int) and of_splits("sha256", str) and ("bytes" not in meta or of_splits("bytes", int))):
        raise UserError(f"{folder / 'meta.json'} is damaged: delete {folder} and prepare the data set again")
    return meta


def check_same_tokens(meta, data_meta, dataset):
    """Raise UserError unless each token id means the same for the checkpoint (meta) and the data set (data_meta)."""
    strange = sorted(set(data_meta.get("alphabet", "")) - set(meta.get("alphabet", "")))
    if strange and meta["tokenizer"] == "char":
        text = meta.get("alphabet") == TEXT8_ALPHABET and "record" not in data_meta
        advice = "prepare it with --alphabet text8, or " if text else ""
        raise UserError(f"data set {dataset!r} has characters outside the checkpoint's alphabet: "
                        f"{' '.join(map(repr, strange[:10]))}{' ...' if len(strange) > 10 else ''}; "
                        f"{advice}choose another with --dataset")
    if meta.get("definition") != data_meta.get("definition") and meta["tokenizer"] == data_meta["tokenizer"]:
        raise UserError(f"data set {dataset!r} has another tokenizer than the checkpoint: prepare its text "
                        "with data/prepare_textfile.py --tokenizer CHECKPOINT, or choose another with --dataset")
    for key in ("tokenizer", "alphabet", "vocab_size"):
        if meta.get(key) != data_meta.get(key):
            raise UserError(f"the checkpoint's {key} is {meta.get(key)!r} and that of data set {dataset!r} is "
                            f"{data_meta.get(key)!r}: choose another with --dataset")


def recode(tokens, data_meta, meta, dataset):
    """Convert tokens of a data set (data_meta) into the ids of a checkpoint (meta), which may know more symbols.

    Raises UserError if the checkpoint does not know all symbols of the data set, or has another tokenizer.
    """
    if meta["tokenizer"] == data_meta["tokenizer"] == "gpt2" and data_meta["vocab_size"] <= meta["vocab_size"]:
        return tokens  # the checkpoint may have padding tokens, too
    of_data, of_model = data_meta.get("alphabet", ""), meta.get("alphabet", "")
    if of_data == of_model or not of_data or not set(of_data) <= set(of_model):
        check_same_tokens(meta, data_meta, dataset)
        return tokens
    return np.array([of_model.index(symbol) for symbol in of_data], dtype=id_type(len(of_model)))[tokens]


def check_same_data(meta, other, dataset, owner):
    """Raise UserError unless the meta.json read here and that of `owner` (other) have the same SHA-256 of the data."""
    if meta["sha256"] != other["sha256"]:
        raise UserError(f"data set {dataset!r} is not the same as that of {owner}: copy that one here, or prepare it "
                        "again")


def load_split(name, split, seq_len, data_dir):
    """Return the tokens of a split, memory-mapped (n,) uint8 to uint32.

    Raises UserError if n is wrong or < seq_len, or if a token is not in the vocabulary (up to LONG tokens are checked).
    """
    meta = load_meta(name, data_dir)
    path = Path(data_dir or DATA_DIR) / name / f"{split}.bin"
    try:
        tokens = np.memmap(path, dtype=meta["dtype"], mode="r")
    except (FileNotFoundError, ValueError):
        raise UserError(f"{path} is missing, empty or cut off: delete {path.parent} and prepare the data set again")
    if len(tokens) != meta["sizes"][split]:
        raise UserError(f"{path} has {len(tokens):,} tokens and its meta.json says {meta['sizes'][split]:,}: "
                        f"delete {path.parent} and prepare the data set again")
    if len(tokens) < seq_len:
        raise UserError(f"the {split} split of {name} has {len(tokens):,} tokens, "
                        f"fewer than one sequence of {seq_len:,}: "
                        f"use --seq_len={min(meta['sizes'].values())} or less, or a larger text"
                        + (", or a larger --held_out" if "held_out" in meta.get("request", {}) else ""))
    if len(tokens) <= LONG and tokens.max() >= meta["vocab_size"]:
        raise UserError(f"{path} is damaged, it has tokens that are not in its vocabulary: delete {path.parent} and "
                        "prepare the data set again")
    return tokens


LONG = 2**28   # tokens of a split that would take long to read
PIECE = 2**14  # tokens


def subset(tokens, n, record=1):
    """Return n of the tokens, always the same: pieces of up to PIECE tokens that are evenly spread over the split.

    n = 0: all of them. The pieces begin at multiples of `record`. Raises UserError if there are fewer tokens than n.
    """
    if not n:
        return tokens
    if n > len(tokens):
        raise UserError(f"unique_tokens={n:,} is more than the {len(tokens):,} tokens of the training split")
    size = min(PIECE // record * record or record, n)
    sizes = [min(size, n - i) for i in range(0, n, size)]
    last = len(tokens) - n  # what is left between the pieces, shared out evenly
    starts = [i * size + last * i // max(1, len(sizes) - 1) // record * record for i in range(len(sizes))]
    return np.concatenate([tokens[start:start + size] for start, size in zip(starts, sizes)])


def gather(tokens, starts, seq_len):
    """Return the windows tokens[start : start + seq_len], (len(starts), seq_len) long."""
    return torch.from_numpy(np.stack([tokens[start:start + seq_len] for start in starts]).astype(np.int64))


class Items(NamedTuple):
    """Facts about the items of a data set, such as names, that training needs. The defaults are for one long text."""

    record: int = 1     # tokens of an item
    pad: int = None     # the id of the pad, which is no part of the text
    until: int = None   # the id of the token with which the given tokens of an item end (end_of_prefix)


def items_of(cfg, meta):
    """The Items of a data set. Raises UserError if the config does not fit the data set."""
    record, pad = meta.get("record", 1), meta.get("pad")
    if record not in (1, cfg.seq_len):
        raise UserError(f"data set {cfg.dataset!r} has items of {record} tokens each: use --seq_len={record}")
    if record == 1 and cfg.prefix_symbol:
        raise UserError(f"prefix={cfg.prefix} needs items, such as questions with answers (docs/names.md), and data "
                        f"set {cfg.dataset!r} is one long text: use --prefix=none")
    if cfg.padding == "random" and pad is None:
        raise UserError(f"padding=random needs items with pads, such as names, and data set {cfg.dataset!r} has "
                        "no pads: use --padding=end")
    return Items(record, None if pad is None else meta["alphabet"].index(pad),
                 end_of_prefix(cfg, cfg.prefix_symbol and make_tokenizer(meta)))


def end_of_prefix(config, tokenizer):
    """The id of the token with which the given tokens of an item end (prefix=until:TEXT), or None.

    Raises UserError if the text is not one token."""
    if not config.prefix_symbol:
        return None
    ids = tokenizer.encode(config.prefix_symbol)
    if len(ids) != 1:
        raise UserError(f"prefix={config.prefix}: {config.prefix_symbol!r} is {len(ids)} tokens of the data set, and "
                        "must be one")
    return int(ids[0])


def check_items(tokens, length, until, what):
    """Raise UserError unless each item of `length` tokens has the token `until`, and a token after the last `until`.

    until=None: nothing is checked."""
    if until is None:
        return
    found = (tokens[:len(tokens) // length * length].reshape(-1, length) == until)
    bad = int((~found.any(1) | found[:, -1]).sum())
    if bad:
        raise UserError(f"{bad:,} of the {len(found):,} items of {length} tokens of {what} do not have the token that "
                        "ends their prefix, or have nothing after it: leave them out of the data set")


def open_data(cfg):
    """Open the data that a Config trains on. Returns (meta, tokens of train, tokens of val, Items).

    Raises UserError if the data set is missing or damaged, or does not fit the Config.
    """
    meta = load_meta(cfg.dataset, cfg.data_dir)
    items = items_of(cfg, meta)
    train, val = (load_split(cfg.dataset, split, cfg.seq_len, cfg.data_dir) for split in ("train", "val"))
    for split, tokens in (("train", train), ("val", val)):
        check_items(tokens, cfg.seq_len, items.until, f"the {split} split of {cfg.dataset}")
    return meta, subset(train, cfg.unique_tokens, items.record), val, items


def random_crops(tokens, seq_len, seed, step, indices, record=1):
    """Draw the sequences `indices` of the batch of a step: windows with random starts, the last possible one included.

    The starts are multiples of `record`, the length of an item of the data set; 1 means anywhere.
    """
    last = (len(tokens) - seq_len) // record
    starts = [record * rng(seed, "crop", step, index).integers(0, last, endpoint=True) for index in indices]
    return gather(tokens, starts, seq_len)


def move_padding(x0, pad, seed, step, indices):
    """Move all pads of each item of x0 (N, L) long, in one run, to a random place of its text.

    A text of n tokens has n + 1 places, all equally likely: before it, after it, or between two of its tokens. The
    order of its tokens does not change.
    """
    moved = torch.full_like(x0, pad)
    for row, old, index in zip(moved, x0, indices):
        text = old[old != pad]
        k = rng(seed, "padding", step, index).integers(0, len(text), endpoint=True)
        row[:k] = text[:k]
        row[len(row) - len(text) + k:] = text[k:]
    return moved


def windows(tokens, seq_len, limit=None):
    """Return the starts of the non-overlapping windows of a split; with limit, of at most that many, evenly spread."""
    starts = np.arange(0, len(tokens) - seq_len + 1, seq_len)
    if limit is None or limit >= len(starts):
        return starts
    return starts[np.linspace(0, len(starts) - 1, limit).round().astype(int)]


def prefetch(iterator):
    """Yield from iterator, which runs ahead in a thread by about four items. Its exceptions are raised here."""
    items, stop = queue.Queue(4), threading.Event()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def put(item):
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def work():
        if gpu is not None:
            torch.cuda.set_device(gpu)  # a thread begins with the first one
        try:
            for item in iterator:
                put((item, None))
                if stop.is_set():
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item
    finally:
        stop.set()
        thread.join()
