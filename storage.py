"""The checkpoint format: one file of plain tensors and plain types, written atomically, read with weights_only=True.

    format     "discrete-diffusion-2"
    config     the fields of Config
    name       the name of the config function
    meta       the data set's meta.json: sampling needs no data set
    model      raw weights
    ema        their moving average, which evaluate.py and sample.py use
    optimizer  its tensors by parameter name
    step       number of steps done
    best_val, tally, wandb_id      what else a resumed run continues from (train.py, log.py)
    init_from  the checkpoint whose weights the run began with (train.py --init_from), or None
    workers    with local_steps only: the state of each worker (local_sgd.py)
    versions   of torch, numpy and Python
    sha256     of all of the above

No state of random generators is stored, because all draws follow from the seed and the step (randomness.py).

The folder of a run has ckpt.pt, the last checkpoint; ckpt_prev.pt, the one before; and ckpt_best.pt, that of the best
validation, without optimizer. At every instant ckpt.pt or ckpt_prev.pt is whole on the disk. See also checkpoint.py.
"""

import dataclasses
import hashlib
import os
import platform
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cli import HINT, UserError, note
from configs import Config
from data.tokenizer import describes_tokens
from foreign import files, translate

FORMAT = "discrete-diffusion-2"
MOST = 10**6  # limit for the number of values in a payload; a model of 100 blocks has some 10,000


# ---- writing -------------------------------------------------------------------------------------------------------


def digest(payload):
    """SHA-256 of the contents of a payload: keys, plain values, and every tensor's type, shape and bytes.

    torch.load does not notice flipped bits. A hash of the contents, unlike a hash of the file, can be in the file.
    Raises ValueError for more than MOST values, as of lists that contain each other, and for tensors that claim to be
    larger than what is stored of them. train.py writes neither.
    """
    sha, left = hashlib.sha256(), [MOST]

    def add(value):
        left[0] -= 1
        if left[0] < 0:
            raise ValueError("too many values")
        if isinstance(value, torch.Tensor):
            if value.nbytes > value.untyped_storage().nbytes():
                raise ValueError("a tensor without all of its numbers")
            sha.update(f"{value.dtype} {tuple(value.shape)}\0".encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        elif isinstance(value, (dict, list, tuple)):
            sha.update(f"{type(value).__name__} {len(value)}\0".encode())
            for item in value.items() if isinstance(value, dict) else value:
                add(item)
        else:
            sha.update(f"{value!r}\0".encode())

    add(payload)
    return sha.hexdigest()


def save(path, payload, keep_previous=False):
    """Write payload to path through a temporary file, which is synced to the disk and then renamed.

    A crash leaves the old file or the new one, whole. keep_previous: the old file is first renamed to NAME_prev.pt.
    Raises UserError if the file cannot be written, as on a full disk.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    payload = dict(payload, format=FORMAT, versions=versions())
    payload["sha256"] = digest(payload)
    try:
        with open(temporary, "wb") as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        cause = error
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__  # torch.save reports a full disk by another kind of error
        if cause is None:
            raise
        raise UserError(f"cannot write {path}: {cause.strerror}; earlier checkpoints are unchanged: {HINT}")


def versions():
    return {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}


def previous(path):
    return path.with_name(f"{path.stem}_prev{path.suffix}")


def sync_folder(folder):
    """Sync a folder, so that renames in it survive a power cut. Does nothing where folders cannot be synced."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


PATIENCE = 120  # seconds that a resumed run waits for its folder: workers that have lost torchrun may still be saving


def claim(out_dir, patience=0, stop=None):
    """Make the folder, and lock it for this process. Returns the open file that holds the lock until the process ends.

    The kernel keeps the lock, so the lock of a dead process is free. Where there are no such locks (Windows, some
    network file systems), a line on stderr says so, and training goes on. Raises UserError if another process still has
    the lock after `patience` seconds, or when stop (parallel.StopSignals) has received a signal.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = open(out_dir / ".lock", "a")
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror  # strerror: "File exists"
        raise UserError(f"cannot use the folder {out_dir}: {reason}")
    deadline = None
    while True:
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # which of the two is raised depends on the file system
            if deadline is None and patience:
                note(f"another process is training in {out_dir}: waiting {patience:.0f} s for it to end")
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() >= deadline or stop and stop.received:
                raise UserError(f"another process is training in {out_dir}: wait for it, or choose another --out_dir")
            time.sleep(0.2)
            continue
        except (ImportError, OSError):
            note(f"{out_dir} cannot be locked: do not start a second run there")
        return lock


# ---- reading -------------------------------------------------------------------------------------------------------


class Hints(NamedTuple):
    """Facts about a foreign checkpoint that the user gives because it does not have them."""

    dataset: str = None     # name of its data set
    overrides: dict = {}    # other settings {key: value}
    format: str = None      # one of translate.FORMATS
    data_dir: str = ""


def add_hints(parser):
    """Add the flags --format and --override, for a command that reads foreign checkpoints."""
    parser.add_argument("--format", choices=translate.FORMATS,
                        help="format of another project's checkpoint (default: detected from the file)")
    parser.add_argument("--override", type=translate.overrides, metavar="KEY=N,...", action="append", default=[],
                        help="settings that another project's checkpoint lacks, such as n_head=2,seq_len=40")


def hints_of(args):
    overrides = {key: value for given in args.override for key, value in given.items()}
    return Hints(args.dataset, overrides, args.format, args.data_dir)


def read(path, hints=Hints()):
    """The payload at path: a file, a folder, or hf://owner/name. Other projects' files are translated (foreign/).

    A payload is a dict with the fields above. Raises UserError if path holds no checkpoint, or a damaged one.
    """
    name, path = str(path), files.from_hub(path) if str(path).startswith("hf://") else Path(path)
    if path.is_dir() and not (path / "ckpt.pt").exists() and previous(path / "ckpt.pt").exists():
        path = previous(path / "ckpt.pt")  # a crash between the two renames of save() left no ckpt.pt
    if not path.exists():
        on_hub = re.fullmatch(r"(?:https://huggingface\.co/)?([\w-][\w.-]*/[\w.-]+)/?", name)
        raise UserError(f"no checkpoint at {name}: `python train.py CONFIG` writes out/CONFIG/ckpt.pt"
                        + (f"; if it is a name on the Hub, write hf://{on_hub[1]}" if on_hub else ""))
    if not path.is_dir() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe: name a file or a folder")
    weights = files.find_weights(path) if path.is_dir() else path
    if weights is None:
        raise UserError(f"no checkpoint at {path / 'ckpt.pt'}, nor one of another project: {files.what_lacks(path)}")
    found = files.read_files(weights)
    payload, path = found.payload, found.path
    card = dict(found.settings) if found.settings.get("format") == FORMAT else {}  # config.json that export() wrote
    version = payload.get("format") if isinstance(payload, dict) else None
    version = version if isinstance(version, str) else str(found.settings.get("format"))
    if version.startswith(FORMAT.rstrip("0123456789")) and version != FORMAT:
        raise UserError(f"{path} was written by another version of this project: its format is {version[:40]}, and "
                        f"this version reads {FORMAT}")
    is_ours = card or isinstance(payload, dict) and payload.get("format") == FORMAT
    if hints.format or not is_ours:
        payload = translate.translate(found, hints)
        check_fields(payload, path)
        return payload
    if hints.overrides:
        raise UserError(f"{path} is a checkpoint of this project and contains its {', '.join(hints.overrides)}: leave "
                        "out --override")
    try:
        expected = card.pop("weights_sha256", None) if card else payload.pop("sha256", None)
        intact = expected == digest(dict(sorted(payload.items())) if card else payload)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        intact = False  # sparse tensors and those without data, which digest() cannot read; weights that are no dict
    if not intact:
        raise UserError(f"{path} is damaged: " + ("the weights do not match the SHA-256 in config.json" if card else
                                                  "its contents do not match their SHA-256"))
    if card:
        payload = card | {"model": payload, "ema": payload}
    check_fields(payload, path)
    return payload


def is_floats(x):
    """Tell whether x is a tensor of real numbers of a usual type."""
    return torch.is_tensor(x) and x.dtype in files.FLOATS


def is_text(x):
    """Tell whether x is a str of fewer than 1,000 printable characters."""
    return isinstance(x, str) and len(x) < 1000 and x.isprintable()


def is_weights(x):
    """Tell whether x is a dict {name: tensor of floats} that is not empty."""
    return isinstance(x, dict) and len(x) > 0 and all(is_text(key) and is_floats(value) for key, value in x.items())


def is_tree(x):
    """Tell whether x is a dict of tensors of floats, or of such dicts."""
    return isinstance(x, dict) and all(is_text(key) and (is_floats(value) or is_tree(value))
                                       for key, value in x.items())


def is_json(x):
    """Tell whether x consists of the types that JSON has."""
    if isinstance(x, dict):
        return all(isinstance(key, str) and is_json(value) for key, value in x.items())
    return all(map(is_json, x)) if isinstance(x, list) else x is None or isinstance(x, (str, bool, int, float))


# field -> (function: value -> whether it is valid, description of a valid value). Every checkpoint has the first five.
FIELDS = {
    "config": (lambda x: isinstance(x, dict) and all(isinstance(key, str) for key in x), "a set of settings"),
    "meta": (lambda x: describes_tokens(x) and is_json(x), "a description of its tokens"),
    "model": (is_weights, "tensors of real numbers by name"),
    "ema": (is_weights, "tensors of real numbers by name"),
    "step": (lambda x: type(x) is int and 0 <= x < 2**63, "an integer of at least 0"),
    "name": (is_text, "text"),
    "best_val": (lambda x: type(x) in (int, float) and x == x, "a number"),
    "tally": (lambda x: is_floats(x) and x.shape == (5,) and x.isfinite().all(),
              "a tensor of five numbers"),
    "wandb_id": (lambda x: x is None or isinstance(x, str), "text, or nothing"),
    "init_from": (lambda x: x is None or isinstance(x, str), "text, or nothing"),
    "optimizer": (lambda x: isinstance(x, dict) and all(
        is_text(name) and (entries == {} or is_weights(entries)) for name, entries in x.items()),
                  "tensors of real numbers by parameter"),
    "workers": (lambda x: isinstance(x, list) and len(x) > 0 and all(map(is_tree, x)),
                "a list of states of workers"),
}


def check_fields(payload, path):
    """Raise a UserError that names missing fields, or the first one whose value is not what train.py writes."""
    check_keys(payload, list(FIELDS)[:5], path)
    for field, (fits, expected) in FIELDS.items():
        try:
            good = field not in payload or fits(payload[field])
        except RecursionError:
            good = False
        if not good:
            raise UserError(f"{path} cannot be used: its field {field!r} is not {expected}")


def check_keys(payload, keys, path):
    missing = [key for key in keys if key not in payload]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: it was written by another version of this project")


def is_damaged(path):
    """Tell whether a checkpoint is damaged. Raises UserError if the system does not let it be read."""
    try:
        read(path)
    except files.CannotOpen:
        raise  # it may be whole
    except UserError:
        return True
    return False


def read_latest(out_dir):
    """(path, payload) of a run's last whole checkpoint, or (None, None) if it has none.

    If ckpt.pt is damaged, a line on stderr says so, and ckpt_prev.pt is read. Raises UserError if no checkpoint that is
    there can be read, or if the system does not let ckpt.pt be read.
    """
    problems = []
    for path in (out_dir / "ckpt.pt", out_dir / "ckpt_prev.pt"):
        if path.exists():
            try:
                payload = read(path)
            except files.CannotOpen:
                raise  # it may be whole
            except UserError as error:
                problems.append(str(error))
                continue
            for problem in problems:
                note(f"{problem}; continuing from {path}")
            return path, payload
    if problems:
        best = out_dir / "ckpt_best.pt"
        raise UserError(f"{'; '.join(problems)}; start a new run with another --out_dir"
                        + (f" and --init_from={best}" if best.exists() else ""))
    return None, None


def config_of(payload):
    """The Config of a payload. Missing settings take their defaults. Raises UserError for settings unknown to it."""
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = set(payload["config"]) - known
    if unknown:
        raise UserError(f"the checkpoint has settings unknown to this version: {', '.join(sorted(unknown))}; update "
                        "the code")
    return Config(**payload["config"])


def check_fit(model, weights, path):
    """Raise a UserError that names the first differences unless weights have exactly the model's keys and shapes."""
    expected = {key: tuple(value.shape) for key, value in model.named_parameters()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [f"{key}: {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
             for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if wrong:
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}"
                        + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


@torch.no_grad()
def load_weights(model, weights):
    """Copy weights {name: tensor}, which check_fit found to fit, into the model's parameters."""
    for name, p in model.named_parameters():
        p.copy_(weights[name])


def check_finite(weights, path):
    """Raise UserError unless all weights are finite."""
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"the weights in {path} are not finite numbers: take an earlier checkpoint of that run")
