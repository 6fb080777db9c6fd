"""Find checkpoints in files, folders and on the Hub, and read them without executing anything in them.

torch.load(weights_only=True) builds tensors and plain containers, and refuses all else. Lightning's checkpoints also
hold the run's settings and its tokenizer, as objects of omegaconf, transformers and the like. An inert stand-in, which
accepts all arguments and does nothing, replaces each such class; the real modules are never imported. Only classes of
the modules in ALLOWED have stand-ins. A pickle that asks for anything else is refused before it is read.

A file of torch.save is a zip archive with a CRC-32 of each tensor. torch.load does not compare them; check_crc does.
Some files have no checksum: those of safetensors, of torch.save before version 1.6, and of a torch that left the sums
out (torch.serialization.set_crc32_options). A flipped bit in them is read as another number.
"""

import errno
import itertools
import json
import re
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import torch

from cli import UserError, first_line, require


class CannotOpen(UserError):
    """A file that cannot be read now, without permission or from a file system that fails. It may be whole."""


class Found(NamedTuple):
    """The contents of a checkpoint file or folder."""

    payload: dict   # as saved
    settings: dict  # from config.json, config.yaml or Lightning's hyper-parameters; {} if there are none
    path: Path      # of the file with the weights


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHARDS = "model.safetensors.index.json"  # names the files of weights that are in several
WEIGHTS = ("ckpt.pt", "model.safetensors", SHARDS, "pytorch_model.bin", "checkpoints-meta/checkpoint.pth",
           "checkpoint.pth", "checkpoints/checkpoint.pth", "diffusion_model.pt", "checkpoints/last.ckpt", "last.ckpt")


def check_floats(state, path):
    """Raise UserError for tensors that are not real numbers, such as quantised ones, which need their scales."""
    wrong = [f"{key} ({value.dtype})" for key, value in state.items() if value.dtype not in FLOATS]
    if wrong:
        raise UserError(f"{path} has weights that are no real numbers, such as quantised ones: {', '.join(wrong[:3])}; "
                        "use the file before quantisation")


def from_hub(name):
    """Return the local folder of hf://owner/name[@revision], downloaded or cached. Raises UserError if it has none."""
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if not match:
        raise UserError(f"{name} is not a name on the Hub: write hf://owner/name or hf://owner/name@revision")
    require("huggingface_hub", f"{name}, which is on the Hub,")
    from huggingface_hub import snapshot_download
    for patterns in (["*.json", "*.yaml", "*.txt", "*.safetensors"], ["*.bin", "*.pt", "*.pth", "*.ckpt"]):
        try:
            folder = Path(snapshot_download(match[1], revision=match[2], allow_patterns=patterns))
        except Exception as error:  # from several HTTP libraries, and the Hub's own errors
            kind = type(error).__name__
            reason = {"LocalEntryNotFoundError": "it is not in the cache, and the Hub cannot be reached",
                      "RepositoryNotFoundError": "there is no such repository, or it is private",
                      "RevisionNotFoundError": "there is no such revision",
                      "GatedRepoError": "its owner must give you access: ask for it on its page"}.get(kind, kind)
            raise UserError(f"{name} could not be downloaded: {reason}; download it elsewhere and pass the folder")
        if find_weights(folder):
            return folder
    raise UserError(f"{name} has no file of weights with a known name ({', '.join(WEIGHTS[:4])}, ...)")


def find_weights(folder):
    """Return the file with the weights in a folder, or None."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    numbered = list(folder.glob("checkpoints/checkpoint_*.pth"))
    if numbered:
        return max(numbered, key=lambda path: int(re.sub(r"\D", "", path.stem) or 0))
    others = other_weights(folder)
    return others[0] if len(others) == 1 else None


def other_weights(folder):
    """Return the files in a folder whose names end as those of weights do."""
    return [path for kind in ("safetensors", "ckpt", "pth", "pt", "bin") for path in sorted(folder.glob(f"*.{kind}"))
            if path.is_file()]


def what_lacks(folder):
    """Say what to do about a folder in which find_weights() found nothing."""
    if several := other_weights(folder):
        return f"it has {', '.join(path.name for path in several[:5])}: name one of its files"
    if runs := sorted(path.parent.name for path in folder.glob("*/ckpt.pt")):
        return f"name one of the runs in it, such as {folder / runs[0]}"
    for name in ("config.json", "config.yaml"):
        if (folder / name).is_file():
            return f"it has a {name}, but no file of weights, such as model.safetensors"
    return "`python train.py CONFIG` writes out/CONFIG/ckpt.pt"


def read_files(weights):
    """Read a file of weights, and the settings with it, into Found. Raises UserError if it cannot be read safely."""
    if weights.name == SHARDS or weights.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            names = [weights.name]
            if weights.name == SHARDS:
                shards = json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()
                names = sorted({Path(name).name for name in shards})
            payload = {key: value for name in names for key, value in load_file(weights.parent / name).items()}
        except Exception as error:
            cut = "it is truncated, damaged or another kind of file: " if isinstance(error, SafetensorError) else ""
            raise UserError(f"{weights} cannot be read as safetensors: {cut}{first_line(error)}")
    else:
        payload = load(weights)
    ours = payload.get("format") if isinstance(payload, dict) else None
    if isinstance(ours, str) and ours.startswith("discrete-diffusion"):  # ours need no settings beside them
        return Found(payload, {}, weights)
    check_crc(weights)
    lightning = payload.get("hyper_parameters") if isinstance(payload, dict) else None
    if isinstance(lightning, dict):
        return Found(payload, settings(lightning.get("config")), weights)
    return Found(payload, read_settings(weights), weights)


def read_settings(weights):
    """Read the settings beside a file of weights, or one folder above checkpoints*/. Returns {} if there are none.

    Raises UserError if they cannot be read.
    """
    folders = [weights.parent]
    if weights.parent.name.startswith("checkpoints"):
        folders.append(weights.parent.parent)
    for path in (folder / name for folder in folders for name in ("config.json", ".hydra/config.yaml", "config.yaml")):
        if not path.is_file():
            continue
        try:
            if path.suffix == ".json":
                found = json.loads(path.read_text(encoding="utf-8"))
            else:
                require("yaml", f"{path}")
                import yaml
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise UserError(f"{path} cannot be read: {first_line(error)}")
        if not isinstance(found, dict):
            raise UserError(f"{path} does not contain settings")
        inner = found.get("config")  # some projects save it one level down
        return inner if isinstance(inner, dict) and "format" not in found else found
    return {}


# ---- pickles ---------------------------------------------------------------------------------------------------------

ALLOWED = ("omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "transformers", "tokenizers",
           "dataloader", "typing", "collections")
PLAIN = {f"builtins.{kind.__name__}": kind for kind in (dict, list, set, frozenset, tuple, int, float, bool, str)}


class Inert:
    """Stand-in for an object of a class that is not imported here: it keeps its state and has no behaviour."""

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state


def a_dict(*args):
    """Stand-in for collections.defaultdict and the like, which would call a function that the file names."""
    return {}


def stand_in(name, path):
    """Return (replacement, name) for torch.serialization.safe_globals. Raises UserError if it is not in ALLOWED."""
    if name in PLAIN:
        return PLAIN[name], name
    if name.split(".")[0] not in ALLOWED:
        raise UserError(f"{path} asks for {name}, which does not belong in a checkpoint and could run code: the file "
                        "was refused, and nothing in it was executed")
    if name in ("collections.defaultdict", "collections.OrderedDict", "collections.Counter", "collections.deque"):
        return a_dict, name
    return type(name.rsplit(".", 1)[-1], (Inert,), {}), name


def load(path):
    """Return the contents of a file of torch.save, tensors on the CPU.

    Raises UserError if it is damaged or refused, and CannotOpen if the system does not let it be read."""
    refuse_bomb(path)
    try:
        return quietly(path)
    except Exception as error:  # pickle, zip and zlib errors of many kinds, which mean nothing to a user
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: the file is too short
            raise CannotOpen(f"{path} cannot be read: {error.strerror}")
        reason = ""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file of torch.save, or a pickle that torch.save does not write
        names = []
    allowed = [stand_in(name, path) for name in names]
    if allowed:
        try:
            with torch.serialization.safe_globals(allowed):
                return quietly(path)
        except Exception as error:
            reason = f": {first_line(error)}"
    raise UserError(f"{path} cannot be read as a checkpoint: it is truncated, damaged or another kind of file{reason}")


# What zipfile raises on a damaged archive: its own error, and those of the fields that it believes (a compression that
# does not exist is a NotImplementedError).
ZIP_ERRORS = (zipfile.BadZipFile, EOFError, NotImplementedError, OSError, OverflowError, RuntimeError, ValueError,
              struct.error, zlib.error)


def refuse_bomb(path):
    """Raise UserError if a zip archive holds much more than the file has bytes. torch.save does not compress."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            held = sum(item.file_size for item in archive.infolist())
    except ZIP_ERRORS:  # torch.load will say what it is
        return
    if held > 2 * path.stat().st_size + 10**6:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes and claims to hold {held:,}: the file was refused")


def quietly(path):
    """Call torch.load without its warnings, which are for programmers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def check_crc(path):
    """Raise UserError if a zip archive's contents do not match their CRC-32, or its lists of them do not agree."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            has_sums = any(item.CRC for item in archive.infolist())
            wrong = archive.testzip() if has_sums else None
    except ZIP_ERRORS as error:
        wrong = str(error)
    if wrong:
        raise UserError(f"{path} is damaged (the checksum test failed: {wrong}): get it again")


MOST = 100_000  # objects in settings; those of the projects have some hundreds


def settings(node):
    """Convert omegaconf's objects into dicts, lists and values, and resolve references such as ${model.length}.

    Returns {} if the result is no dict. Raises UserError for more than MOST objects or more than 50 levels. An object
    that is referred to twice counts twice.
    """
    root = plain(node, itertools.count(1))
    return resolved(root, root) if isinstance(root, dict) else {}


def plain(node, counter, depth=0):
    """Convert omegaconf's objects into dicts, lists and values. counter: itertools.count of the objects."""
    if next(counter) > MOST or depth > 50:
        raise UserError("the settings in the checkpoint have too many values or levels: the file was refused")
    if isinstance(node, Inert):
        state = node.state if isinstance(node.state, dict) else {}
        node = state.get("_content", state.get("_val"))
    if isinstance(node, dict):
        return {str(key)[:99]: plain(value, counter, depth + 1) for key, value in node.items() if isinstance(key, str)}
    if isinstance(node, (list, tuple)):
        return [plain(value, counter, depth + 1) for value in node]
    return None if isinstance(node, Inert) else node


def resolved(value, root):
    """Replace the references in dicts, lists and values by what they lead to in root."""
    if isinstance(value, dict):
        return {key: resolved(inner, root) for key, inner in value.items()}
    if isinstance(value, list):
        return [resolved(inner, root) for inner in value]
    return followed(value, root)


def followed(value, root):
    """Follow a reference to its value in root: None if it leads nowhere, in a circle, or to a dict or a list."""
    for _ in range(9):
        match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if not match:
            return None if isinstance(value, (dict, list)) else value
        value = root
        for key in match[1].split("."):
            value = value.get(key) if isinstance(value, dict) else None


# ---- state dicts -----------------------------------------------------------------------------------------------------

BUFFERS = re.compile(r"(^|\.)(inv_freq|(cos|sin)_cached|betas|alpha_bars|sampling_eps_m(in|ax)|limiting_distribution)$"
                     r"|^noise\.")


def plain_key(key):
    """Return a key without the prefixes of compilation, data parallelism and wrapper classes."""
    return re.sub(r"^(backbone\.)+", "", key.replace("_orig_mod.", "").replace("module.", ""))


def tensors(payload):
    """Return the state dict in a payload, {plain key: tensor}; {} if there is none."""
    if not isinstance(payload, dict):
        return {}
    state = next((payload[key] for key in ("state_dict", "model") if isinstance(payload.get(key), dict)), payload)
    return {plain_key(key): value for key, value in state.items() if torch.is_tensor(value) and isinstance(key, str)}


def rename(state, names):
    """Apply the (pattern, replacement) pairs to the plain keys of a state dict, and leave out its buffers."""
    renamed = {}
    for key, value in state.items():
        key = plain_key(key)
        if BUFFERS.search(key):
            continue
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
