"""Export a checkpoint as a folder to share: `python checkpoint.py export CKPT DIR`."""

import dataclasses
import json
import math
import shlex
import shutil
import tempfile
from pathlib import Path

import torch

from cli import UserError, in_short
from configs import CONFIGS, same_run
from data.loader import prepare_command
from likelihood import plus_minus
from log import parse
from storage import FORMAT, Hints, check_finite, check_fit, check_keys, config_of, digest, read, versions


def export(checkpoint, folder, results=(), hints=Hints(), dtype=torch.float32):
    """Write a checkpoint, with its averaged weights, into a new folder that `sample.py FOLDER` and the Hub can read.

    The files are model.safetensors, config.json (settings and tokens) and README.md, a model card. results: files with
    the output of `evaluate.py --json`, which the card quotes. dtype: of the stored weights. Raises UserError. A failure
    leaves no folder.
    """
    from safetensors.torch import save
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} already exists: name a new folder")
    payload = read(checkpoint, hints)
    check_keys(payload, ("name",), checkpoint)
    with torch.device("meta"):  # shapes alone
        check_fit(config_of(payload).make_model(payload["meta"]["vocab_size"]), payload["ema"], checkpoint)
    weights = {key: value.to(dtype).contiguous().clone() for key, value in sorted(payload["ema"].items())}
    check_finite(payload["ema"], checkpoint)
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"the weights in {checkpoint} have numbers too large for {str(dtype)[6:]}: use --dtype float32")
    settings = {field: value for field, value in dataclasses.asdict(config_of(payload)).items() if same_run(field)}
    scored = digest({key: value.float() for key, value in sorted(payload["ema"].items())}) if results else None
    measured = [read_result(path, scored) for path in results]
    card = {"format": FORMAT, "name": payload["name"], "step": payload["step"], "config": settings,
            "meta": payload["meta"], "versions": versions(), "weights_sha256": digest(weights), "measured": measured,
            "init_from": payload.get("init_from")}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write to {folder.parent}: {error.strerror}")
    try:
        temporary.chmod(0o755)
        (temporary / "model.safetensors").write_bytes(save(weights))
        (temporary / "config.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        n_params = sum(value.numel() for value in weights.values())
        validation = last_validation(Path(checkpoint), payload["step"])
        text = model_card(folder.name, card, n_params, validation).encode(errors="replace")
        (temporary / "README.md").write_bytes(text)
        temporary.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_result(path, scored):
    """The fields for the card from a file with the output of evaluate.py --json. Raises UserError if it is no such
    file, or has the score of other weights: scored is the SHA-256 of these averaged weights."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
        if result["scored_sha256"] != scored:
            raise UserError(f"{path} has the score of other weights ({result['checkpoint']}, step {result['step']}, "
                            f"{result['weights']}): run `evaluate.py CKPT --json` on this checkpoint")
        found = {key: result[key] for key in ("bits_per_token", "bits_per_char", "stderr", "estimator", "dataset",
                                              "split", "n_sequences", "seq_len", "n_tokens")}
        row_of(found)
        return found
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{path} is not the output of `evaluate.py CKPT --json`: run that again")


def last_validation(path, step):
    """(bits, standard error, step) of the last validation up to a step in the log beside a checkpoint, or None."""
    try:
        entries, _ = parse((path if path.is_dir() else path.parent) / "log.jsonl")
    except OSError:
        return None
    found = [(line["val_bits_per_token"], line.get("val_stderr"), line["step"]) for line in entries
             if type(line.get("val_bits_per_token")) is float and line["step"] <= step
             and isinstance(line.get("val_stderr"), (float, type(None)))]
    return found[-1] if found else None


def row_of(r):
    """The row of the card's table for the output of evaluate.py --json (dict)."""
    return (f"| {r['bits_per_token']:.4f} {plus_minus(r['stderr'])} | {r['bits_per_char']:.4f} | "
            f"{r['dataset']} {r['split'] or ''}, {r['n_sequences']:,} windows of {r['seq_len']}; {r['estimator']} |")


def model_card(name, card, n_params, validation):
    """README.md of an exported folder (str): what the model is, how to use it, what was measured."""
    config = card["config"]
    blocks = f" of {config['block_size']} tokens" if config.get("block_size") else ""
    rows = []
    if validation:
        bits, error, step = validation
        rows.append(f"| {bits:.4f} {plus_minus(error)} |  | validation during training, step {step:,} |")
    rows += map(row_of, card["measured"])
    again, source = training_commands(card), card["init_from"]
    began = f" Training began with the weights of `{source}`." if source else ""
    better = "." if source else (" from nothing. More steps (`--max_steps`) and a larger network (`--n_layer`, "
                                 "`--n_embd`) make a better one.")
    return "\n".join([
        "---", "tags:", "- text-diffusion", "- discrete-diffusion", "---", f"# {name}", "",
        f"A discrete diffusion model of text, {in_short(n_params)} parameters, trained as `{card['name']}` for "
        f"{card['step']:,} steps of {config['batch_size']} x {config['seq_len']} tokens of {card['meta'].get('name')}: "
        f"objective {config['objective']}{blocks}, noise {config['noise']}, schedule {config['schedule']}, "
        f"conditioning {config['conditioning']}.{began} The weights are the moving average.", "",
        "```sh", f"python sample.py {shlex.quote(name)}      # or hf://OWNER/{name}",
        f"python evaluate.py {shlex.quote(name)}", "```", "",
        *(["| bits per token | per character | on |", "|---|---|---|", *rows, ""] if rows else
          ["Nothing was measured yet.", ""]),
        *([f"These commands train a model with these settings{better}", "", "```sh", *again, "```", ""] if again
          else [])])


def training_commands(card):
    """The commands that prepare the data and train with these settings. There are none for another project's model, and
    none for local_steps, because ckpt_best.pt does not say how many workers there were."""
    if card["name"] not in CONFIGS or card["config"]["local_steps"]:
        return []
    usual = dataclasses.asdict(CONFIGS[card["name"]]())
    flags = [f"--{key}={shlex.quote(str(value))}" for key, value in card["config"].items() if usual[key] != value]
    batch, micro = card["config"]["batch_size"], usual["micro_batch_size"]
    if batch % min(batch, micro):  # train.py would refuse the usual micro-batches
        flags.append(f"--micro_batch_size={math.gcd(batch, micro)}")
    flags += [f"--init_from {shlex.quote(card['init_from'])}"] if card["init_from"] else []
    return [prepare_command(card["config"]["dataset"], card["meta"]),
            " ".join(["python train.py", card["name"], *flags])]
