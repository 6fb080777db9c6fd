"""Begin a new run with the weights of another model (`train.py --init_from`): what is taken, resized and new.

This is not the continuation of a run (checkpoint.open_run), where everything must be the same. Here the objective, the
noise, the time conditioning and the order of the text may change:

    python train.py demo --init_from out/demo --lr=1e-3 --out_dir=out/tuned                  fine-tuning
    python train.py demo --init_from out/ar_demo --predict_next --anneal_steps=500           left to right -> diffusion
    python train.py roberta_wikitext --init_from hf://FacebookAI/roberta-base                BERT -> diffusion

A new tensor does not change what the network computes at first: a new bias is zero, a new head has the weights of the
embeddings, new head gates are 1, and a new time conditioning has gates of 1, and shifts and scales of 0.
"""

import dataclasses
import re

import torch

from cli import UserError, note
from storage import check_finite, check_fit, config_of

# parameters of the model that the other model may lack
NEW = re.compile(r"^time_embed\.|(^|\.)modulation\.|^head_weight$|^head_bias$|head_gate$|norm\d?\.bias$")
POSITIONS = "positions.weight"  # the table of learned positions, one row for each


def adapt(model, source, cfg, path):
    """Return the weights that a new run begins with: {name: tensor} for all parameters of the model.

    source: the payload of the other model, whose averaged weights are taken. A line on stderr says what was taken as it
    is, resized, or is new. Raises UserError if other tensors do not fit, or the networks differ in another way.
    """
    notes = check_same_network(source, cfg, path)
    weights, ours = dict(source["ema"]), dict(model.named_parameters())
    resized = []
    if any(key in ours and (key not in weights or weights[key].dim() != 2) for key in ("embed.weight", POSITIONS)):
        check_fit(model, weights, path)  # fails here, because what follows takes these tables for granted
    if POSITIONS in weights and POSITIONS in ours and len(weights[POSITIONS]) != len(ours[POSITIONS]):
        before, now = len(weights[POSITIONS]), len(ours[POSITIONS])
        weights[POSITIONS] = resize(weights[POSITIONS], now)
        resized.append(f"{POSITIONS} (from {before:,} to {now:,} rows)")
    has_mask = cfg.objective_class.has_mask
    if config_of(source).objective_class.has_mask != has_mask:  # then the embedding has one more row, the last
        rows = weights["embed.weight"]
        weights["embed.weight"] = torch.cat((rows, rows.mean(0, keepdim=True))) if has_mask else rows[:-1]
        resized.append(f"embed.weight (from {len(rows):,} to {len(weights['embed.weight']):,} rows)")
    new = [name for name in ours if name not in weights and NEW.search(name)]
    for name in new:
        weights[name] = first_value(name, ours[name].detach(), weights)
    check_fit(model, weights, path)
    check_finite(weights, path)
    words = [f"{len(ours) - len(new) - len(resized)} of {len(ours)} tensors taken as they are"]
    words += [f"{what}: {', '.join(names)}" for what, names in (("resized", resized), ("new", new)) if names]
    for line in (*notes, f"weights of {path}: {'; '.join(words)}"):
        note(line)
    return weights


def resize(table, n):
    """The first n rows of a table; missing ones are copies of its last row."""
    return torch.cat((table, table[-1:].expand(n, -1)))[:n]


def first_value(name, drawn, weights):
    """The first value of a new tensor, for which the model drew the value `drawn`."""
    if name == "head_weight":
        return weights["embed.weight"][:len(drawn)]
    if name.startswith("time_embed."):
        return drawn
    value = torch.zeros_like(drawn)
    if name.endswith("modulation.bias"):
        for gate in value.split(weights["embed.weight"].shape[1])[2::3]:  # shift, scale, gate; perhaps of two layers
            gate.fill_(1)
    return value


NETWORK = ("architecture", "n_layer", "n_head", "n_embd", "shift_tokens", "mixer", "residual", "static_map",
           "mask_aware")
# settings that some architectures refuse
NOT_FOR_ALL = ("conditioning", "tied", "norm_bias", "head_bias", "head_gates", "dropout")


def check_same_network(source, cfg, path):
    """Raise UserError if the networks differ, even where their shapes are equal. Returns lines on other settings."""
    before, now = dataclasses.asdict(config_of(source)), dataclasses.asdict(cfg)
    differ = lambda keys: [f"{key}={before[key]}, now {now[key]}" for key in keys if before[key] != now[key]]
    same = [*NETWORK, *(key for key in ("head_gates", "norm_bias", "head_bias") if before[key])]  # these may be new,
    same += [] if before["tied"] else ["tied"]  # and an own head, too, but none of them may be left out
    if before["conditioning"] != "none":
        same += ["n_cond"] if cfg.clock else ["n_cond", "conditioning"]
        same += ["schedule"] if not cfg.clock and before["conditioning"] == "sigma" else []
    if before["architecture"] != now["architecture"]:
        same += [key for key in NOT_FOR_ALL if key not in same]
    if other := [key for key in same if before[key] != now[key]]:
        flags = [f"--{'' if before[key] else 'no-'}{key}" if isinstance(before[key], bool) else f"--{key}={before[key]}"
                 for key in other]
        raise UserError(f"the weights in {path} are of another network than that of this config: add {' '.join(flags)}")
    timed = {"sigma": ["schedule"], "time": ["schedule"], "unscaled_time": ["schedule"], "step": ["T"]}
    clock = timed.get(cfg.conditioning, [])  # what the time conditioning depends on
    other = differ(("objective", "noise", "block_size", "conditioning", *clock, "scale_by_sigma"))
    notes = [f"the weights in {path} were trained with other settings: {'; '.join(other)}"] if other else []
    causal = cfg.objective_class.causal
    predicted_next = config_of(source).objective_class.causal or before["predict_next"]
    if predicted_next != (causal or now["predict_next"]):
        meaning, keep = (("the next token", "--predict_next") if predicted_next else
                         ("the token itself", "--no-predict_next"))
        can_keep = now["predict_next"] or not (cfg.block_size or causal)
        notes.append(f"the outputs of {path} predict {meaning}" + (f": {keep} would keep that" if can_keep else ""))
    return notes
