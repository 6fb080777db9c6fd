"""Checkpoints: one file of plain tensors and plain types, written atomically, read with weights_only=True.

    format   "discrete-diffusion-1"
    config   the fields of Config              meta    the data set's meta.json: sampling needs no data set
    model    raw weights                       ema     their moving average, which is what evaluate and sample use
    optimizer, step, best_val                  name    of the config function
    versions of torch, numpy and Python
"""

import dataclasses
import os
import platform
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import interop
from cli import UserError
from configs import Config

FORMAT = "discrete-diffusion-1"


def save(path, payload):
    """Write payload to path: to a temporary file, to the disk, then renamed. A crash leaves the old file or the new."""
    path = Path(path)
    versions = {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(dict(payload, format=FORMAT, versions=versions), file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path, dataset=None):
    """The payload behind path: a file, or a folder with ckpt.pt. Other projects' files are translated (interop.py).

    dataset: what a foreign checkpoint was trained on, where it does not say.
    Raises UserError for whatever is no checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "ckpt.pt"
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: `python train.py CONFIG` writes out/CONFIG/ckpt.pt")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and zlib errors of many kinds; none of them means anything to a user
        reason = str(error).strip().split("\n")[0][:100]
        raise UserError(f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {reason}")
    if isinstance(payload, dict) and payload.get("format") == FORMAT:
        return payload
    return interop.translate(payload, path, dataset)


def config_of(payload):
    """The Config of a payload; settings this version does not know are an error, missing ones take their default."""
    known = {field.name for field in dataclasses.fields(Config)}
    unknown = set(payload["config"]) - known
    if unknown:
        raise UserError(f"the checkpoint has settings unknown to this version: {', '.join(sorted(unknown))}; update")
    return Config(**payload["config"])


class Loaded(NamedTuple):
    model: torch.nn.Module  # in eval mode
    config: Config
    meta: dict              # of the data set: tokenizer, vocab_size
    step: int


def load_model(path, device, dataset=None, raw=False):
    """A checkpoint's model, ready to use, with its EMA weights (or the raw ones)."""
    payload = read(path, dataset)
    config = config_of(payload)
    model = config.make_model(payload["meta"]["vocab_size"])
    load_weights(model, payload["model"] if raw else payload["ema"], path)
    return Loaded(model.to(device).eval(), config, payload["meta"], payload["step"])


def load_weights(model, weights, path):
    """load_state_dict, strictly; a misfit is a UserError that names the first keys or shapes concerned."""
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in weights.items()}
    wrong = [f"{key}: {found.get(key, 'missing')}, expected {expected.get(key, 'none')}"
             for key in sorted(expected.keys() | found.keys()) if expected.get(key) != found.get(key)]
    if wrong:
        raise UserError(f"the weights in {path} do not fit the model: {'; '.join(wrong[:3])}"
                        + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    model.load_state_dict(weights)
