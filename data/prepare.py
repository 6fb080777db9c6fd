"""Functions for the prepare_*.py scripts: download with a checksum, read text files, write a data set at once.

A data set is a folder data/NAME with train.bin, val.bin, test.bin (token ids, raw uint8, uint16 or uint32) and
meta.json, which names the tokenizer, and has the bytes of UTF-8 of the text that each split was made of. It is built in
a temporary folder and renamed when complete, so a data set that exists is whole. If it consists of short items, such as
names, meta.json has their length, "record", and the character for padding, "pad".
"""

import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import tempfile
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from cli import ArgumentParser, UserError, note, progress
from data.loader import DATA_DIR, SPLITS, load_meta
from data.tokenizer import id_type


def parser(description):
    p = ArgumentParser(description=description)
    p.add_argument("--data_dir", type=lambda text: Path(text or DATA_DIR), default=DATA_DIR,
                   help="folder to write NAME/ into (default: data/)")
    return p


def check_name(name):
    """Raise UserError if the name of a data set cannot be that of a folder."""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UserError(f"--name {name!r} is not a valid folder name: use letters, digits, _ and -")


def write_splits(folder, meta, texts, encode):
    """Write a data set that fits into memory: texts {"train": str, "val": str, "test": str}; encode: str -> ids."""
    with DatasetWriter(folder, meta) as writer:
        for split in SPLITS:
            writer.append(split, encode(texts[split]), len(texts[split].encode()))


def cut(text, train, val):
    """Cut a sequence into consecutive splits: the fraction `train`, the fraction `val`, and the rest for test."""
    a, b = round(train * len(text)), round((train + val) * len(text))
    return {"train": text[:a], "val": text[a:b], "test": text[b:]}


def folder_of(args, name, usual):
    """The folder of a data set NAME, or of NAME_TOKENS if args.tokenizer is not the usual one."""
    tokens = args.tokenizer.rstrip("/").rsplit("/", 1)[-1].replace(":", "")
    return args.data_dir / (name if args.tokenizer == usual else f"{name}_{tokens}")


def in_words(value):
    """Return the value of a request (a str, a list of str, or None) as a str for messages."""
    if value is None or value == []:
        return "none"
    return ", ".join(value) if isinstance(value, list) else value


def named_files(files, hashed=True):
    """Return the name, the size and the beginning of the SHA-256 of each file, by which a later call recognises it.

    hashed=False: without the SHA-256, which takes long for hundreds of gigabytes. Raises UserError if a file cannot be
    read."""
    def named(path):
        if path.is_file() and not hashed:
            return f"{path.name} ({path.stat().st_size:,} bytes)"
        is_pipe = path.exists() and not path.is_dir() and not path.is_file()  # it can be read only once, later
        if not hashed or is_pipe:
            return path.name
        content = read_bytes(path)
        return f"{path.name} ({len(content):,} bytes, SHA-256 {hashlib.sha256(content).hexdigest()[:12]})"

    return [named(Path(file)) for file in files]


def is_prepared(folder, request={}, remedy="choose another --name"):
    """Return True and print a line that says so if the data set is prepared already.

    request: what this call asks for, of what meta.json keeps, there under "request" or at its top. Raises UserError if
    the data set was made otherwise.
    """
    if not (folder / "meta.json").exists():
        return False
    meta = load_meta(folder.name, folder.parent)
    made = meta | meta.get("request", request)  # older data sets have no request
    for key in request:
        if made.get(key) != request[key]:
            raise UserError(f"{folder} is already prepared with {key} {in_words(made.get(key))}, not "
                            f"{in_words(request[key])}: {remedy}, or delete it")
    sizes = ", ".join(f"{split} {meta['sizes'][split]:,}" for split in SPLITS)
    note(f"{folder} is already prepared ({sizes} tokens); delete it to prepare it again")
    return True


def fetch(url, sha256, file=None):
    """Return the bytes of url or of a local copy. Raises UserError if they are unavailable or have another SHA-256."""
    if file:
        content = read_bytes(file)
    else:
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                size = int(response.headers.get("Content-Length", 0)) or None
                with progress(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                    chunks = []
                    while chunk := response.read(1 << 20):
                        chunks.append(chunk)
                        bar.update(len(chunk))
            content = b"".join(chunks)
        except OSError as error:
            raise UserError(f"could not download {url} ({error}); get it elsewhere and pass --file PATH")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(f"{file or url} is not the expected file: SHA-256 {found}, expected {sha256}")
    return content


def read_bytes(path):
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder: name its files")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")


def read_text(path):
    """Return the text of a UTF-8 file; decompress .gz and .xz.

    Raises UserError if it cannot be read or is blank, or if its name says that it has JSON, whose keys are no text."""
    if re.search(r"\.jsonl?(\.gz|\.xz)?$", str(path), re.IGNORECASE):
        raise UserError(f"{path} has JSON, whose keys and braces are no text: write its texts to a .txt file "
                        "(data/prepare_openwebtext.py makes a data set of .json and .jsonl)")
    content = read_bytes(path)
    try:
        if str(path).endswith(".gz"):
            content = gzip.decompress(content)
        elif str(path).endswith(".xz"):
            content = unpack_xz(content)
        text = content.decode("utf-8-sig")  # without the byte order mark of some editors
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is not a complete compressed file: {error}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start:,}; only .gz and .xz are unpacked): convert it "
                        "first")
    if not text.strip():
        raise UserError(f"{path} contains no text")
    return text


def unpack_xz(content):
    """Decompress all streams of an .xz file. lzma.decompress would leave out a damaged one that is not the first."""
    parts = []
    while content := content.lstrip(b"\0"):  # zeros may follow a stream
        unpacker = lzma.LZMADecompressor()
        parts.append(unpacker.decompress(content))
        if not unpacker.eof:
            raise EOFError("its end is missing")
        content = unpacker.unused_data
    return b"".join(parts)


class DatasetWriter:
    """Write a data set into a temporary folder beside its place; leaving the `with` block renames the folder.

    append(split, ids, n_bytes) may be called any number of times and keeps no ids in memory. n_bytes: of the text, in
    UTF-8, without tokens that are no text. meta.json has `meta`, the folder's name as "name", and what was counted.
    After an exception nothing is left.
    """

    def __init__(self, folder, meta):
        self.folder = Path(os.path.realpath(folder))  # the folder may be a link to another disk
        self.meta = {"name": Path(folder).name} | meta
        self.dtype = id_type(meta["vocab_size"])

    def __enter__(self):
        if (self.folder / "meta.json").exists():
            raise UserError(f"{self.folder} has a data set already: delete it to make it again, or choose another name")
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} exists and is not a data set: move it, or choose another name")
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent))
        except OSError as error:
            raise UserError(f"cannot write to {self.folder.parent}: {error.strerror}")
        self.files = {split: open(self.temporary / f"{split}.bin", "wb") for split in SPLITS}
        self.hashes = {split: hashlib.sha256() for split in SPLITS}
        self.sizes, self.bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        return self

    def append(self, split, ids, n_bytes):
        content = np.asarray(ids).astype(self.dtype).tobytes()
        self.files[split].write(content)
        self.hashes[split].update(content)
        self.sizes[split] += len(ids)
        self.bytes[split] += n_bytes

    def __exit__(self, kind, error, traceback):
        try:
            for file in self.files.values():
                file.close()
            if kind is None:
                self._finish()
        except OSError as full:  # some bytes are written only when a file is closed
            error = error or full
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error.filename, str):  # a failed write names no file
            raise UserError(f"cannot write {self.folder}: {error.strerror}; nothing of it was kept: fix the cause, and "
                            "run the command again")
        if isinstance(error, OSError) and kind is None:
            raise error

    def _finish(self):
        empty = [split for split in SPLITS if not self.sizes[split]]
        if empty:
            more = ", or a larger --held_out" if "held_out" in self.meta.get("request", {}) else ""
            raise UserError(f"the {' and '.join(empty)} split would be empty: use a longer text{more}")
        meta = dict(self.meta, dtype=np.dtype(self.dtype).name, sizes=self.sizes, bytes=self.bytes,
                    sha256={split: digest.hexdigest() for split, digest in self.hashes.items()})
        (self.temporary / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        self.temporary.chmod(0o755)
        try:
            os.rename(self.temporary, self.folder)
        except OSError as error:
            meanwhile = ", perhaps because another command made it meanwhile" if self.folder.exists() else ""
            raise UserError(f"{self.folder} cannot be made ({error.strerror}){meanwhile}: nothing was changed there")
        sizes = ", ".join(f"{split} {self.sizes[split]:,}" for split in SPLITS)
        note(f"{self.folder}: {sizes} tokens, vocabulary of {meta['vocab_size']:,}")
