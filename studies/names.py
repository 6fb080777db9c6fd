"""Test models of names (data/prepare_names.py): are samples valid, new, and of the right lengths?

It also tests whether a gap in the middle can hold fewer letters than it has tokens, which is the purpose of
--padding=random. `python demos.py names CKPT` prints the results. An item is a str of `record` tokens: a name with its
pads.
"""

import math
import sys
from collections import Counter

import torch

from checkpoint import load_model
from cli import UserError, generator_on, pick_device, progress, table
from data.loader import check_same_tokens, load_meta, load_split
from data.tokenizer import make_tokenizer
from prompts import end_of
from sampler_settings import default_settings
from sampling import Settings, denoise


def items_of(ids, meta):
    """Convert ids (N, record), a tensor or array, to N str, pads included."""
    return ["".join(meta["alphabet"][i] for i in row) for row in ids.tolist()]


def valid(item, pad):
    """Tell whether an item has letters, and all of its pads in one run."""
    return item.strip(pad) != "" and pad * item.count(pad) in item


def distribution(lengths):
    """Return the distribution of lengths, {length: share}."""
    return {length: n / len(lengths) for length, n in sorted(Counter(lengths).items())}


def total_variation(p, q):
    """Half of the sum of |p - q|: the share of one distribution that has to move to give the other."""
    return sum(abs(p.get(x, 0) - q.get(x, 0)) for x in p.keys() | q.keys()) / 2


def chance(p, n):
    """Approximate mean total variation distance between p and n draws from p, with shares taken as normal."""
    return sum(math.sqrt(x * (1 - x) / n) for x in p.values()) / math.sqrt(2 * math.pi)


def fill(loaded, canvas, seed, device, size=256):
    """Fill the masks of canvas (N, record) long with samples of the model, at temperature 1.

    A masked model is sampled with the chain in continuous time (first_hitting).
    """
    config, generator, filled = loaded.config, generator_on(device, seed), []
    way = Settings("first_hitting") if "first_hitting" in config.objective_class.samplers else default_settings(config)
    end = end_of(config, make_tokenizer(loaded.meta))
    objective = config.make_objective(loaded.meta["vocab_size"])
    for xt in progress(canvas.split(size), desc="sampling", leave=False):
        *_, state = denoise(way, objective, loaded.model, xt.to(device), config, 0, generator, end)
        filled.append(state.xt.cpu())
    return torch.cat(filled)


def gaps(held_out, meta, gap):
    """Convert names to (N, record) long: the first two letters, `gap` masks, the last letter, and pads to the end."""
    ids, mask_id = {c: i for i, c in enumerate(meta["alphabet"])}, meta["vocab_size"]
    canvas = torch.full((len(held_out), meta["record"]), ids[meta["pad"]])
    for row, name in zip(canvas, held_out):
        row[:2], row[2:2 + gap], row[2 + gap] = torch.tensor([ids[c] for c in name[:2]]), mask_id, ids[name[-1]]
    return canvas


def lengths_table(title, columns):
    """Print the distributions of two samples of lengths, {title: [length]}, side by side; the first is of the data."""
    (_, data), (_, ours) = columns.items()
    shares = {key: distribution(lengths) for key, lengths in columns.items()}
    p, q = shares.values()
    rows = [{"length": str(x)} | {key: 100 * share.get(x, 0) for key, share in shares.items()} for x in sorted(p | q)]
    table(rows, {"length": (title, "")} | {key: (f"{key}, %", ".2f") for key in columns}, sys.stdout)
    print(f"mean {sum(data) / len(data):.2f} and {sum(ours) / len(ours):.2f}; total variation distance "
          f"{total_variation(p, q):.3f} (as many draws from the data: {chance(p, len(ours)):.3f})")


def names(args):
    """Draw names from a model; count the valid, unique, novel ones and their letters; fill gaps in held-out names."""
    device = pick_device("auto")
    loaded = load_model(args.checkpoint, device)
    config, meta = loaded.config, loaded.meta
    pad, record = meta.get("pad"), meta.get("record")
    if not pad:
        raise UserError(f"{args.checkpoint} is not a model of names: its data set has no pads (data/prepare_names.py)")
    gap = args.gap or record - 3
    if gap > record - 3:
        raise UserError(f"--gap {gap} leaves fewer than three of {record} tokens for letters: use at most {record - 3}")
    data_dir = args.data_dir or config.data_dir
    check_same_tokens(meta, load_meta(config.dataset, data_dir), config.dataset)
    train, val, test = ([item.replace(pad, "") for item in items_of(load_split(
        config.dataset, split, record, data_dir).reshape(-1, record), meta)] for split in ("train", "val", "test"))

    drawn = items_of(fill(loaded, torch.full((args.samples, record), meta["vocab_size"]), args.seed, device), meta)
    good = [item.replace(pad, "") for item in drawn if valid(item, pad)]
    known, others = set(train), set(val + test)
    novel = [name for name in good if name not in known]
    n = len(good)

    def line(what, count, of, text):
        print(f"  {what:8}{count / max(of, 1):6.1%}  {text}")

    print(f"{args.samples:,} names drawn, seed {args.seed}")
    line("valid", n, args.samples, "letters, and all pads in one run")
    line("unique", len(set(good)), n, "of the valid ones")
    line("novel", len(novel), n, f"of the valid ones: not among the {len(train):,} of the train split")
    line("hits", sum(name in others for name in novel), n, f"of the valid ones: of the {len(others):,} of val and test")
    print(f"novel ones: {' '.join(dict.fromkeys(novel[:20])) or 'none'}\n")
    if good:
        lengths_table("letters", {"train split": list(map(len, train)), "drawn": list(map(len, good))})
    if not config.objective_class.both_sides:
        return print("A model from left to right fills no gaps.")

    held_out = [name for name in test if 3 <= len(name) <= gap + 3][:args.samples]
    if not held_out:
        raise UserError(f"no name of the test split has 3 to {gap + 3} letters: choose another --gap")
    filled = items_of(fill(loaded, gaps(held_out, meta, gap), args.seed, device), meta)
    found = [(name, item.replace(pad, "")) for name, item in zip(held_out, filled) if valid(item, pad)]
    inside, m = [len(name) - 3 for _, name in found], len(held_out)
    print(f"\n{m:,} held-out names with a gap of {gap} tokens between their first two letters and the last")
    line("valid", len(found), m, "all pads in one run")
    line("shorter", sum(x < gap for x in inside), m, "valid, and fewer letters in the gap than tokens")
    real = known | others
    line("names", sum(name in real for _, name in found), m, "valid, and a name of the data")
    line("glued", sum(name[:-1] in real for _, name in found), m, "valid, and one without its last letter: what "
         "follows the gap may have been ignored")
    line("hits", sum(name == filled for name, filled in found), m, "the very name that was held out")
    print("".join(f"  {name[:2]} [{gap}] {name[-1]} -> {filled}\n" for name, filled in found[:5]))
    if found:
        lengths_table("letters in the gap", {"held out": [len(name) - 3 for name in held_out], "filled": inside})
