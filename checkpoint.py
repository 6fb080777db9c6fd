"""Use checkpoints: collect and restore the state of a run, start from its weights, load its model, export it.

    python checkpoint.py export out/demo demo-model --results test.json     a folder to share, also on the Hub

storage.py defines the format, and writes and reads it.
"""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import NamedTuple

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import ArgumentParser, UserError, named, note, run

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import optim
import parallel
import storage
from adapt import adapt
from configs import Config, same_run
from costs import check_fits, weight_bytes
from data.loader import check_same_data, check_same_tokens
from data.tokenizer import make_tokenizer
from export import export
from foreign import translate
from local_sgd import EveryStep
from log import parse
from storage import (Hints, add_hints, check_finite, check_fit, check_keys, claim, config_of, hints_of, load_weights,
                     read, read_latest)

OF_ENGLISH = ("text8", "openwebtext", "lm1b", "ascii")  # English data sets of foreign checkpoints


# ---- the state of a run --------------------------------------------------------------------------------------------


def states(optimizers):
    """{parameter: its state} of all optimizers. With Muon, each parameter belongs either to Muon or to AdamW."""
    return {p: optimizer.state[p] for optimizer in optimizers for group in optimizer.param_groups
            for p in group["params"]}


def state_of(model, ema, optimizers=(), exchange=EveryStep(), tally=None):
    """Collect weights, averages and optimiser state for a checkpoint in the main process. All processes call it."""
    parameters = dict(model.named_parameters())
    state = {"model": {name: parallel.whole(p) for name, p in (exchange.anchor or parameters).items()},
             "ema": {name: parallel.whole(average) for name, average in zip(parameters, ema.average)}}
    if optimizers:
        moments = states(optimizers)
        state["optimizer"] = {name: {key: parallel.whole(value) for key, value in moments[p].items()}
                              for name, p in parameters.items()}
        state |= exchange.checkpoint(moments, tally)
    return state


def restore(state, model, ema, optimizers):
    """Copy the state that state_of collected, and that only the main process has, back into all processes."""
    shapes = parallel.on_main(lambda: {name: {key: value.shape for key, value in entries.items()}
                                       for name, entries in state["optimizer"].items()})
    moments = states(optimizers)
    for (name, p), average in zip(model.named_parameters(), ema.average):
        parallel.copy_from_main(p, state and state["model"][name])
        parallel.copy_from_main(average, state and state["ema"][name])
        for key, shape in shapes[name].items():  # moments have the shape and the sharding of their parameter
            value = torch.zeros_like(p) if shape == p.shape else torch.zeros(shape, device=p.device)
            parallel.copy_from_main(value, state and state["optimizer"][name][key])
            moments[p][key] = value


# ---- continuing a run ----------------------------------------------------------------------------------------------


def with_sizes_of_source(cfg, resume, init_from, out_dir):
    """Return the Config with the sizes of the checkpoint that the run begins with: its network's settings `of_source`.

    So `--init_from` of any size needs no flags for the size. Only the main process calls it. Raises UserError if the
    checkpoint cannot be read or has another kind of network.
    """
    if not cfg.network_class.of_source or cfg.backbone:
        return cfg
    where, payload = None, None
    if resume == "auto":
        where, payload = out_dir, read_latest(out_dir)[1]
    elif resume:
        where, payload = resume, read(resume)
    if payload is None and init_from:
        where, payload = init_from, read(init_from, Hints(cfg.dataset, data_dir=cfg.data_dir))
    if payload is None:
        return cfg
    source = config_of(payload)
    if source.architecture != cfg.architecture:
        raise UserError(f"{where} has architecture={source.architecture}, and this run "
                        f"{cfg.architecture}: use --architecture={source.architecture}")
    found = {key: getattr(source, key) for key in cfg.network_class.of_source}
    other = [f"{key}={value} (not {getattr(cfg, key)})" for key, value in found.items()
             if key != "backbone" and value != getattr(cfg, key)]
    if other:
        note(f"the size of the network is that of {where}: {', '.join(other)}")
    return dataclasses.replace(cfg, **found)


def open_run(out_dir, resume, init_from, cfg, meta, model, stop):
    """Open what a run begins with: (checkpoint to continue, weights to start from, lock of out_dir). Each may be None.

    Only the main process calls it. Raises UserError if out_dir is in use or holds another run, and if the checkpoint
    asked for is missing, damaged, of another config or of other data.
    """
    # Seconds to wait for the lock: at most half of timeout_minutes, the time that the other processes wait for this one
    patience = min(storage.PATIENCE, 30 * cfg.timeout_minutes) if resume else 0
    lock = claim(out_dir, patience, stop) if out_dir.is_dir() else None
    last = out_dir / "ckpt.pt"
    holds_run = any((out_dir / name).exists() for name in ("ckpt.pt", "ckpt_prev.pt", "ckpt_best.pt", "log.jsonl"))
    if not resume and holds_run:
        raise UserError(f"{out_dir} already holds a run: continue it with --resume auto (without a checkpoint it "
                        "begins again), or choose another --out_dir")
    path, payload, source = None, None, None
    if resume == "auto":
        path, payload = read_latest(out_dir)
        if not payload and holds_run:
            check_nothing_is_lost(out_dir, cfg)
    elif resume:
        path, payload = Path(resume), read(resume)
        folder = path if path.is_dir() else path.parent
        if holds_run and folder.resolve() != out_dir.resolve():
            raise UserError(f"{out_dir} already holds a run, and {path} is not part of it: choose another --out_dir")
    if payload:
        check_same_run(payload, path, cfg, meta)
        for kind in ("model", "ema"):
            check_fit(model, payload[kind], path)
        check_moments(model, cfg, payload["optimizer"], path)
        is_last = path.resolve() in (last.resolve(), out_dir.resolve())
        if not is_last and last.exists() and (resume == "auto" or storage.is_damaged(last)):  # auto: it was just read
            last.rename(out_dir / "ckpt_damaged.pt")  # else the next save would put it over ckpt_prev.pt
    elif cfg.min_lr > cfg.lr:  # older runs may have it, and continue
        raise UserError(f"lr={cfg.lr} is below min_lr={cfg.min_lr}: use --min_lr={cfg.lr} or less")
    if init_from and not payload:
        source = read(init_from, Hints(cfg.dataset, data_dir=cfg.data_dir))
        check_same_tokens(source["meta"], meta, cfg.dataset)
        source = adapt(model, source, cfg, init_from)
    return payload, source, lock


def check_nothing_is_lost(out_dir, cfg):
    """Check a run that has no checkpoint. Raises UserError if it has come so far that it must have had one.

    Otherwise it crashed before its first checkpoint, and a line on stderr says that it begins again."""
    log, best = out_dir / "log.jsonl", out_dir / "ckpt_best.pt"
    entries = parse(log)[0] if log.is_file() else []
    came_to = max((entry["step"] for entry in entries), default=0)
    with contextlib.suppress(UserError):  # the step of a damaged ckpt_best.pt is unknown
        came_to = max(came_to, read(best)["step"])
    configs = [entry["config"] for entry in entries if isinstance(entry.get("config"), dict)]
    first = max(map(first_save, [dataclasses.asdict(cfg), *configs]))  # checkpoint_interval may have changed
    if came_to > first or any(entry.get("saved") == "ckpt.pt" for entry in entries):
        start = f" and --init_from={best} (the best validation)" if best.exists() else ""
        raise UserError(f"the run in {out_dir} reached step {came_to:,}, but its ckpt.pt and ckpt_prev.pt are missing: "
                        f"put one of them back, or start a new run with another --out_dir{start}")
    note(f"the run in {out_dir} has no checkpoint yet: it begins again at step 0")


def first_save(config):
    """The step of the first checkpoint of a run with these settings. With local_steps it is the end of a round."""
    interval, steps = config.get("checkpoint_interval", 0), max(1, config.get("local_steps", 0))
    return -(-interval // steps) * steps


def check_same_run(payload, path, cfg, meta):
    """Raise a UserError that names the differences, unless payload is of a run with this config on this data."""
    if "optimizer" not in payload:
        raise UserError(f"{path} has no optimiser state to resume from: start a new run with --init_from={path}")
    check_keys(payload, ("best_val", "tally", "wandb_id"), path)
    check_keys(payload["meta"], ("sha256",), path)
    before, now = dataclasses.asdict(config_of(payload)), dataclasses.asdict(cfg)
    changed = [f"{key} (was {before[key]!r}, now {now[key]!r})" for key in now
               if same_run(key) and before[key] != now[key]]
    if changed:
        raise UserError(f"{path} is of another run: {', '.join(changed)}; use its settings, or start a new run from "
                        f"its weights, with --init_from={path} and another --out_dir")
    check_same_tokens(payload["meta"], meta, cfg.dataset)
    check_same_data(meta, payload["meta"], cfg.dataset, f"the run of {path}")


# ---- using a model -------------------------------------------------------------------------------------------------


class Loaded(NamedTuple):
    model: torch.nn.Module  # in eval mode
    config: Config
    meta: dict              # of the data set: tokenizer, vocab_size
    step: int


def add_model_flags(parser):
    """Add the flags of a command that runs a checkpoint's model: how it is read, which weights, how it is computed."""
    add_hints(parser)
    parser.add_argument("--raw", action="store_true", help="use the raw weights instead of their moving average")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first one that is available)")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto",
                        help="number format of matrix products (default: bfloat16 where it is fast, else float32)")
    parser.add_argument("--compile", action="store_true",
                        help="compile the network with torch.compile, for long computations: the first calls are "
                        "slow, the others faster (docs/speed.md)")


class ZeroDraws(TorchDispatchMode):
    """Context in which random numbers are zeros: billions of weights that are read next need not be drawn first."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default):
            return args[0].zero_()
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def undrawn(dtype):
    """Context in which random numbers are zeros, and new tensors of floats have this number format."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with ZeroDraws():
            yield
    finally:
        torch.set_default_dtype(before)


def load_model(path, device, hints=Hints(), raw=False, compiled=False, dtype=torch.float32):
    """Load a checkpoint's model, ready to use, with its EMA weights (or the raw ones), and compile it if `compiled`.

    dtype: number format of the products. Large language models keep their weights in it, as their authors do. All other
    models have weights in float32. Raises UserError if the weights do not fit or are not finite. If a foreign
    checkpoint should know English, but its predictions make no sense of it, a line on stderr says so.
    """
    payload = read(path, hints)
    config, vocab_size = config_of(payload), payload["meta"]["vocab_size"]
    large = config.network_class.large
    needed = weight_bytes(config, vocab_size) * (dtype.itemsize / 4 if large else 1)
    for where in map(torch.device, ("cpu", device)):
        check_fits(needed, where, f"the model of {path}", "use a machine with more memory")
    weights = payload["model"] if raw else payload["ema"]
    check_finite(weights, path)
    with undrawn(dtype) if large else contextlib.nullcontext():
        model = config.make_model(vocab_size)
    check_fit(model, weights, path)
    load_weights(model, weights)
    model = model.to(device).eval()
    if payload.get("foreign") and (large or payload["meta"]["name"] in OF_ENGLISH):
        translate.warn_if_implausible(model, config.make_objective(payload["meta"]["vocab_size"]),
                                      make_tokenizer(payload["meta"]), config, device, path)
    if compiled:
        note("compiling the network: its first calls are slow (docs/speed.md)")
        parallel.compile_trunk(model)
    return Loaded(model, config, payload["meta"], payload["step"])


def check_moments(model, cfg, moments, path):
    """Raise a UserError that names the first parameter whose optimiser state is missing, of another optimiser or of
    another shape."""
    names = {p: name for name, p in model.named_parameters()}
    expected = {names[p]: kind.state_shapes(p.shape) for kind, parameters in optim.shares(model, cfg)
                for p in parameters}
    found = {name: {key: tuple(value.shape) for key, value in state.items()} for name, state in moments.items()}
    fits = lambda name: name in expected and found.get(name) in (expected[name], {})  # {}: never had a gradient
    wrong = [name for name in sorted(expected.keys() | found.keys()) if not fits(name)]
    if wrong:
        raise UserError(f"the field 'optimizer' in {path} does not fit the model (first difference: {wrong[0]}): start "
                        f"a new run with --init_from={path}")


def main():
    p = ArgumentParser(description=__doc__)
    p.add_argument("command", choices=["export"], help="write a folder with safetensors, settings and a model card")
    p.add_argument("checkpoint", type=named,
                   help="checkpoint of this or another project: a file, a folder or hf://owner/name")
    p.add_argument("folder", type=named, help="new folder to write")
    p.add_argument("--results", type=named, nargs="+", default=[], metavar="JSON",
                   help="files with the output of `evaluate.py CKPT --json`, for the model card")
    p.add_argument("--dtype", choices=("float32", "float16"), default="float32",
                   help="type of the stored weights; float16 halves the file (default float32)")
    p.add_argument("--dataset", help="data set of another project's checkpoint, if it does not name it")
    p.add_argument("--data_dir", default="", help="folder that has the data sets (default: data/)")
    add_hints(p)
    args = p.parse_args()
    export(args.checkpoint, args.folder, args.results, hints_of(args), getattr(torch, args.dtype))
    folder = shlex.quote(args.folder)
    note(f"{args.folder} is ready: read it with `python sample.py {folder}`, share it with `hf upload OWNER/NAME "
         f"{folder}`")


if __name__ == "__main__":
    run(main)
