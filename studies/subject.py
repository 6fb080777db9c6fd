"""A checkpoint and the windows of a text that a command scores it on, for evaluate.py and the studies."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from categorical import Counted
from checkpoint import load_model
from cli import UserError, autocast, check_place, generator_on, note, progress
from data.loader import check_items, check_same_data, end_of_prefix, load_meta, load_split, recode, windows
from data.prepare import read_text
from data.tokenizer import TEXT8_ALPHABET, make_tokenizer, text8_words
from likelihood import Windows
from prompts import end_of
from sampling import denoise
from storage import hints_of


class Subject(NamedTuple):
    """A checkpoint and the data that it is scored on."""

    path: str
    model: torch.nn.Module
    config: object
    meta: dict
    step: int
    tokenizer: object
    dataset: str          # name of the data set, or of the text file
    split: str            # None for a text file
    where: str            # dataset and split in words
    data_dir: str
    data: Windows
    n_bytes: int = None   # bytes of UTF-8 of the text that all tokens were made of; None: unknown (an old data set)
    text: str = None      # the text of a text file, as it was encoded

    @property
    def until(self):
        """The id of the token that ends the given tokens of each window, or None."""
        return end_of_prefix(self.config, self.tokenizer)

    def fill(self, xt, settings, seed):
        """Fill the masks of texts xt (n, L). Returns (ids (n, L), network calls and tokens read by them, per text).

        settings: a sampling.Settings."""
        data, objective, end = self.data, self.objective(), end_of(self.config, self.tokenizer)
        denoiser, generator, filled = Counted(self.model), generator_on(data.device, seed), []
        name = f"{settings.sampler} {settings.steps or ''}"
        for part in progress(xt.to(data.device).split(data.batch_size), desc=name, leave=False):
            with autocast(data.device, data.dtype):
                *_, state = denoise(settings, objective, denoiser, part, self.config, 0, generator, end)
            filled.append(state.xt.cpu())
        return torch.cat(filled), denoiser.sequences / len(xt), denoiser.tokens / len(xt)

    def training_tokens(self):
        """Return all tokens of the train split of the data set, in the checkpoint's ids."""
        meta = load_meta(self.dataset, self.data_dir)
        return recode(load_split(self.dataset, "train", 1, self.data_dir), meta, self.meta, self.dataset)

    def output(self, folder, name):
        """Return the path to write a study to, in folder or the checkpoint's. Raises UserError if there is none."""
        path = Path(self.path)
        if self.path.startswith("hf://") and not folder:
            raise UserError(f"{self.path} is on the Hub: name a folder for the results with --out_dir")
        folder = folder or (path if path.is_dir() else path.parent)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise UserError(f"--out_dir {folder} cannot be made: {error.strerror}")
        check_place("--out_dir:", folder / name, "")
        return folder / name

    def masked_only(self, flag):
        objective = self.config.objective_class
        if not objective.any_order:
            raise UserError(f"{flag} needs a model of masks in whole texts, and {self.path} {objective.description}")

    def one_prefix(self, flag):
        if self.until is not None:
            raise UserError(f"{flag} gives the same number of tokens of each window, and {self.path} was trained on "
                            f"prefixes of any length ({self.config.prefix})")

    def whole_windows(self, flag):
        if self.config.prefix_range[0]:
            raise UserError(f"{flag} scores whole windows, and {self.path} needs a prefix ({self.config.prefix})")

    def objective(self, estimator=None, T=None):
        config = self.config
        if estimator in ("t_step", "t_step_uniform"):
            config = config.with_objective("d3pm", T=T or config.T, time_sampling="uniform")
        return config.make_objective(self.meta["vocab_size"])


def open_subject(path, args, device, dtype, n_windows=None):
    """Load a checkpoint and the data that the flags of evaluate.py (args) name: a split of a data set, or a text file.

    n_windows: number of windows without --n_tokens; None: all of them. Raises UserError if flags do not fit together.
    """
    model, config, meta, step = load_model(path, device, hints_of(args), args.raw, args.compile, dtype)
    seq_len = args.seq_len or config.seq_len
    config = config_to_score(config, path, seq_len, args.normalised, args.block_size)
    if args.block_size:
        model.block_size = args.block_size  # no weight depends on it
    tokenizer, data_dir = make_tokenizer(meta), args.data_dir or config.data_dir
    if args.text:
        if args.dataset and "sha256" in meta:
            raise UserError("--text is scored instead of a data set: leave out --dataset")
        dataset, split = args.text, None
        own = meta.get("request", {}).get("alphabet") == "text8"  # made by prepare_textfile.py, which spells no digits
        spelled = config.dataset.startswith(("text8", "gutenberg")) and not own
        tokens, content, where = read_tokens(args.text, tokenizer, seq_len, spelled)
        n_bytes = len(content.encode())
    else:
        dataset, split, content = args.dataset or config.dataset, args.split, None
        where = f"{dataset} {split}"
        tokens, n_bytes = read_split(dataset, split, data_dir, seq_len, meta, None if args.dataset else path)
    check_items(tokens, seq_len, end_of_prefix(config, tokenizer), where)
    if args.n_tokens:
        n_windows = max(1, round(args.n_tokens / seq_len))
    data = Windows(tokens, windows(tokens, seq_len, n_windows), seq_len, args.batch_size, device, dtype)
    return Subject(path, model, config, meta, step, tokenizer, dataset, split, where, data_dir, data, n_bytes, content)


def read_split(dataset, split, data_dir, seq_len, meta, path):
    """The tokens of a split, in the ids of a checkpoint's meta, and the bytes of its text (Subject.n_bytes).

    path: the checkpoint's. A line on stderr says if it was trained on another data set. None: nothing is said.
    Raises UserError if windows of seq_len tokens would cut the items of the data set.
    """
    data_meta = load_meta(dataset, data_dir)
    if path and meta.get("sha256", data_meta["sha256"]) != data_meta["sha256"]:
        note(f"data set {dataset!r} is not the one that {path} was trained on: its {split} split may have text of "
             "the training")
    record = data_meta.get("record", 1)
    if seq_len % record:
        raise UserError(f"data set {dataset!r} has items of {record} tokens, and windows of {seq_len} would cut "
                        f"them: use --seq_len={record}")
    tokens = recode(load_split(dataset, split, seq_len, data_dir), data_meta, meta, dataset)
    return tokens, data_meta["bytes"][split] if "bytes" in data_meta else None


def config_to_score(config, path, seq_len, normalised, block_size):
    """The Config of a checkpoint for windows of seq_len tokens. Raises UserError if they do not fit together.

    normalised: score the normalised prediction, where the objective's own is not normalised
    block_size: score as block diffusion with blocks of so many tokens (models of objective=mdlm or block)
    """
    if seq_len > config.seq_len:
        raise UserError(f"--seq_len={seq_len} is longer than the {config.seq_len} tokens that {path} was trained on")
    if seq_len <= config.prefix_range[1]:
        raise UserError(f"--seq_len={seq_len} leaves nothing after the prefix of {path} ({config.prefix}): use more")
    if normalised:
        if config.objective_class.normalised:
            raise UserError(f"--normalised is only for score entropy with masks, and {path} has another objective")
        config = config.with_objective("mdlm")
    size = block_size or config.block_size
    if size and seq_len % size:
        raise UserError(f"windows of {seq_len} tokens are no multiple of blocks of {size}: choose another --seq_len"
                        + (" or --block_size" if block_size else ""))
    if not block_size:
        return config
    if config.objective not in ("mdlm", "block") or config.noise != "mask":
        raise UserError(f"--block_size is for models of objective=mdlm or block, and {path} has "
                        f"objective={config.objective} with noise={config.noise}")
    if config.predict_next:
        raise UserError(f"--block_size is for networks whose output at a token predicts that token, and {path} "
                        "predicts the next one: leave it out")
    return config.with_objective("block", block_size=block_size, seq_len=seq_len)


def read_tokens(file, tokenizer, seq_len, spelled=False):
    """The tokens of a text file, its text as it was encoded, and in words what was done to it.

    spelled: as in text8_words, for tokenizers that know only text8's symbols. Raises UserError if the tokens do not
    fill one window.
    """
    content, how = read_text(file), "as it stands"
    if tokenizer.alphabet == TEXT8_ALPHABET:
        content, how = " ".join(text8_words(content, spelled)), "in text8's 27 symbols"
    try:
        tokens = tokenizer.encode(content)
    except UserError as error:
        raise UserError(f"{file}: {error}")
    if len(tokens) < seq_len:
        raise UserError(f"{file} has {len(tokens):,} tokens, fewer than one window of {seq_len}: "
                        f"use a longer text{f' or --seq_len={len(tokens)}' if len(tokens) else ''}")
    rest = f"; the last {len(tokens) % seq_len} tokens left out" if len(tokens) % seq_len else ""
    return tokens, content, f"{file} ({how}, no detokenisation{rest})"


def different_tokens(one, two):
    """The first part of the description of their tokens in which two subjects differ, or None."""
    return next((key for key in ("tokenizer", "alphabet", "vocab_size", "definition")
                 if one.meta.get(key) != two.meta.get(key)), None)


def same_tokens(one, two, size=1 << 24):
    """Tell whether two arrays (n,) are equal. They are compared in pieces: a split may be larger than the memory."""
    return len(one) == len(two) and all(np.array_equal(one[i:i + size], two[i:i + size])
                                        for i in range(0, len(one), size))


def count_tokens(tokens, vocab_size, size=1 << 24):
    """Count each of the V tokens in an array, in pieces, because np.bincount would copy a whole split: (n,) -> (V,)."""
    return sum(np.bincount(tokens[i:i + size], minlength=vocab_size) for i in range(0, len(tokens), size))


def check_comparable(one, two, named_data):
    """Raise UserError unless two subjects are scored on the same windows, after the same prefixes.

    Their checkpoints must have been trained on the same data, unless the user named the data (named_data).
    """
    if key := different_tokens(one, two):
        values = "" if key == "definition" else f", {one.meta.get(key)!r} and {two.meta.get(key)!r}"
        raise UserError(f"{one.path} and {two.path} have different tokens ({key}{values}): their bits per token cannot "
                        "be compared; --text FILE compares bits per byte")
    if one.dataset != two.dataset:
        raise UserError(f"{one.path} and {two.path} have different data ({one.dataset} and {two.dataset}): "
                        "choose one for both with --dataset")
    if (one.config.prefix_range, one.until) != (two.config.prefix_range, two.until):
        by_number = one.until is two.until is None
        remedy = "score each of them with --context" if by_number else "compare runs of one --prefix"
        raise UserError(f"{one.path} and {two.path} are scored after different prefixes ({one.config.prefix} and "
                        f"{two.config.prefix}): {remedy}")
    if not named_data and "sha256" in one.meta and "sha256" in two.meta:
        check_same_data(one.meta, two.meta, one.dataset, two.path)
    if not same_tokens(one.data.tokens, two.data.tokens):
        raise UserError(f"{one.path} and {two.path} have different data under the name of {one.dataset}: "
                        "choose the data for both with --data_dir")
    lengths = one.data.seq_len, two.data.seq_len
    if lengths[0] != lengths[1]:
        raise UserError(f"{one.path} and {two.path} have windows of {lengths[0]} and {lengths[1]} tokens: "
                        f"choose --seq_len={min(lengths)} for both")
