"""Measure the quality of samples: their perplexity under a judge, another language model, and their repetition.

Perplexity alone can mislead: text that repeats itself has a low one. So it is always reported with the entropy and the
repetition of the same samples, and with the same numbers of real text.
"""

import csv
import io
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from checkpoint import load_model
from cli import UserError, autocast, first_line, note, progress, require, table, write_file
from data.loader import gather, windows
from data.tokenizer import END, make_tokenizer
from diffusion import AutoRegressive, cross_entropy
from plot import picture
from prompts import end_of, text_of
from studies.baselines import known_word_share, words_of


# ---- without a judge -------------------------------------------------------------------------------------------------


def unigram_entropy(tokens):
    """Entropy of the distribution of tokens within one sample, in bits; low if the sample repeats itself."""
    counts = Counter(tokens).values()
    return -sum(count / len(tokens) * math.log2(count / len(tokens)) for count in counts) if tokens else 0.0


def ngrams(words, n):
    return list(zip(*(words[i:] for i in range(n))))


def distinct(texts, n):
    """Share of different word n-grams among those of all texts (distinct-n; arXiv 1510.03055 divides by the words).

    It decreases with more text. None if no text has n words.
    """
    found = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(found)) / len(found) if found else None


def repetition(texts, n):
    """Share of word n-grams, of all texts together, that occurred before in their text. None if no text has any.

    seq-rep-n of arXiv 1908.04319 is the mean of this share over texts.
    """
    found = [ngrams(text.split(), n) for text in texts]
    return 1 - sum(len(set(grams)) for grams in found) / sum(map(len, found)) if any(found) else None


def ids_of(text, tokenizer):
    """The ids of a text that a tokenizer has decoded, a list: end-of-text becomes its own token again."""
    return getattr(tokenizer, "encode_decoded", tokenizer.encode)(text).tolist()


def statistics_of(texts, tokenizer, known):
    """Return the statistics of texts that need no judge, as a dict. known: the words of the training text."""
    entropies = [unigram_entropy(ids_of(text, tokenizer)) for text in texts]
    return {"unigram_entropy_bits": sum(entropies) / len(entropies), "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2), "repetition_2": repetition(texts, 2),
            "known_words": known_word_share(texts, known)}


# ---- judges ----------------------------------------------------------------------------------------------------------


class Judge:
    """An autoregressive checkpoint as a judge. `judged` cuts texts longer than its window into independent pieces."""

    def __init__(self, path, device, dtype):
        self.model, config, meta, _ = load_model(path, device)
        if config.objective != "ar":
            raise UserError(f"{path} cannot be a judge: its objective is {config.objective}, and a judge needs ar "
                            "(`python train.py ar_...`)")
        if config.prefix_range[0]:
            raise UserError(f"{path} cannot be a judge: it needs a prefix ({config.prefix}), and a judge scores whole "
                            "texts")
        self.objective, self.length = AutoRegressive(meta["vocab_size"]), config.seq_len
        self.name, self.meta, self.tokenizer, self.device, self.dtype = path, meta, make_tokenizer(meta), device, dtype

    def encode(self, text):
        return ids_of(text, self.tokenizer)

    def cross_entropies(self, x0):
        """x0 (B, L), L at most self.length -> (B, L) nats."""
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        with autocast(self.device, self.dtype):
            logits = self.model(self.objective.corrupt(x0, everywhere), torch.ones(len(x0), device=self.device))
        return cross_entropy(logits, x0)


class TransformersJudge:
    """A causal language model of Hugging Face's transformers, such as GPT-2. A start token is put before each text."""

    def __init__(self, name, device, dtype):
        require("transformers", f"--judge hf://{name}")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        except Exception as error:  # of transformers, of safetensors, or of a file that is none of theirs
            raise UserError(f"hf://{name} cannot be loaded as a causal language model: {first_line(error)}")
        if report["missing_keys"]:
            raise UserError(f"hf://{name} lacks weights of {type(model).__name__}: "
                            f"{', '.join(sorted(report['missing_keys'])[:3])}")
        self.model, config = model.to(device).eval(), model.config
        self.length = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", 1024)
        self.length -= 1  # for the start token
        start = self.tokenizer.bos_token_id
        if start is None:
            start = self.tokenizer.eos_token_id
        if start is None:
            raise UserError(f"hf://{name} has no start token: choose another judge")
        self.name, self.meta, self.start, self.device, self.dtype = f"hf://{name}", None, start, device, dtype
        with torch.no_grad():  # BERT and its kin are loaded, too, and see the tokens that they predict
            one, two = (self.cross_entropies(torch.tensor([[start, last, start]], device=device))[0, 0]
                        for last in (0, 1))
        if abs(one - two) > 1e-4:
            raise UserError(f"hf://{name} sees the text on the right of a token, so it cannot be a judge: choose a "
                            "causal language model")

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cross_entropies(self, x0):
        """x0 (B, L), L at most self.length -> (B, L) nats."""
        seen = torch.nn.functional.pad(x0, (1, 0), value=self.start)
        with autocast(self.device, self.dtype):
            logits = self.model(input_ids=seen[:, :-1]).logits
        return cross_entropy(logits, x0)


def open_judge(name, device, dtype):
    """Open hf://NAME, hf://FOLDER or an autoregressive checkpoint of ours. Raises UserError if it is none of them."""
    if name.startswith("hf://"):
        return TransformersJudge(name.removeprefix("hf://"), device, dtype)
    return Judge(name, device, dtype)


@torch.no_grad()
def judged(judge, texts, batch_size=16):
    """Return perplexity and bits per token (the judge's tokens) and per character, with standard errors over texts.

    Perplexity is exp of the mean cross-entropy, in nats, over all tokens of all texts. Raises UserError if all texts
    are empty, or a likelihood is not finite.
    """
    pieces = [(i, ids[j:j + judge.length]) for i, ids in enumerate(map(judge.encode, texts))
              for j in range(0, len(ids), judge.length)]
    nats = torch.zeros(len(texts), dtype=torch.float64)
    tokens = torch.zeros(len(texts), dtype=torch.float64)
    for start in progress(range(0, len(pieces), batch_size), desc="judging", leave=False):
        batch = pieces[start:start + batch_size]
        longest = max(len(ids) for _, ids in batch)
        # Judges are causal, so the padding on the right changes nothing.
        x0 = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in batch], device=judge.device)
        ce = judge.cross_entropies(x0).cpu().double()
        for (i, ids), row in zip(batch, ce):
            nats[i] += row[:len(ids)].sum()
            tokens[i] += len(ids)
    if not tokens.sum():
        raise UserError("all samples are empty: there is nothing to judge")
    if not nats.isfinite().all():
        raise UserError(f"the likelihood of the judge {judge.name} is not finite: its weights are damaged")
    characters = torch.tensor([len(text.replace(END, "")) for text in texts], dtype=torch.float64)
    per_token, per_character = nats.sum() / tokens.sum() / math.log(2), nats.sum() / characters.sum() / math.log(2)

    def error(sizes, mean):  # standard error of a ratio of means
        residual = (nats / math.log(2) - mean * sizes) / sizes.mean()
        return (residual.std() / math.sqrt(len(texts))).item() if len(texts) > 1 else None

    return {"judge": judge.name, "judge_perplexity": 2 ** per_token.item(), "judge_bits_per_token": per_token.item(),
            "judge_stderr": error(tokens, per_token), "judge_bits_per_char": per_character.item(),
            "judge_stderr_per_char": error(characters, per_character)}


# ---- samples ---------------------------------------------------------------------------------------------------------


def read_samples(path):
    """Read texts printed by `sample.py --json`, or one per line of a text file. Raises UserError if that fails."""
    try:
        content = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"--samples {path} is neither a number nor a file")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UserError(f"--samples {path} cannot be read: {reason}")
    if content.lstrip().startswith("{"):
        try:
            texts = [sample["text"] for sample in json.loads(content)["samples"]]
            "".join(texts).encode()  # JSON can hold invalid text
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"--samples {path} looks like JSON but is not what sample.py --json prints")
    else:
        texts = [line for line in content.splitlines() if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise UserError(f"--samples {path} has no samples, or an empty one")
    return texts


def measure(subject, samples, judge, settings, seed):
    """Measure samples of each of several sampling.Settings, and as many pieces of real text, if there are so many.

    Returns [{sampler, steps, nfe, ...}]. samples: their number, or texts. subject: a subject.Subject. judge: from
    open_judge, or None. A piece is as long as a sample; if the samples are texts, as long as they are on average. The
    prefix of a model that needs one is left out.
    """
    rows, data, end = [], subject.data, end_of(subject.config, subject.tokenizer)
    known = words_of(subject.training_tokens(), subject.tokenizer)

    def add(name, texts, **more):
        row = {"sampler": name, "steps": None, "setting": None, "nfe": None, "tokens_read": None,
               "temperature": None, "top_p": None, "top_k": None, "seed": None, "seconds": None}
        row |= more | {"n_samples": len(texts), **statistics_of(texts, subject.tokenizer, known)}
        rows.append(row | (judged(judge, texts, data.batch_size) if judge else {}))

    c, length = 0, data.seq_len
    if isinstance(samples, list):
        add("file", samples)
        if "record" not in subject.meta:
            n_tokens = [len(ids_of(text, subject.tokenizer)) for text in samples]
            length = max(1, round(sum(n_tokens) / len(samples)))
            if length > len(data.tokens):
                length = len(data.tokens)
                note(f"the samples are longer than {subject.where}, so their entropy and distinct-n cannot be compared "
                     "with those of real text")
    else:
        starts, c = windows(data.tokens, length, samples), subject.config.prefix_range[0]
        xt = gather(data.tokens, np.resize(starts, samples), length)
        xt[:, c:] = subject.objective().mask_id
        for way in settings:
            began = time.perf_counter()
            filled, nfe, tokens_read = subject.fill(xt, way, seed)
            seconds = time.perf_counter() - began
            texts = [text_of(*pair, end, subject.tokenizer) for pair in zip(filled[:, c:].tolist(), xt[:, c:].tolist())]
            options = way.options | {"grid": way.grid_name, "block_length": way.block_length or "",
                                     "dual_cache": way.dual_cache or "",
                                     "correct": f"{way.correct}@{way.correct_temperature}" if way.correct else ""}
            others = " ".join(f"{key}={value}" for key, value in options.items() if value != "")
            add(way.sampler, texts, steps=way.steps, setting=others or None, nfe=nfe, tokens_read=tokens_read,
                temperature=way.temperature, top_p=way.top_p, top_k=way.top_k or None, seed=seed, seconds=seconds)
    starts = windows(data.tokens, length, len(samples) if isinstance(samples, list) else samples)
    add("real text", [subject.tokenizer.decode(data.tokens[i + c:i + length]) for i in starts])
    return rows


def samples(subject, samples, settings, judge, folder, seed, out):
    """Print, write and draw the quality of samples by network evaluations.

    samples: their number, or texts. settings: a list of sampling.Settings, one for each row. judge: from open_judge, or
    None.
    """
    if judge and judge.meta and judge.meta.get("alphabet") not in (None, subject.meta.get("alphabet")):
        raise UserError(f"--judge {judge.name} has another alphabet than {subject.path}, so its perplexity would mean "
                        "nothing: choose a judge trained on the same data")
    path = subject.output(folder, "quality.csv")
    subject.one_prefix("--samples")
    rows = measure(subject, samples, judge, settings, seed)
    columns = {"sampler": ("", ""), "steps": ("steps", "d"), "setting": ("", ""), "nfe": ("NFE", ".1f"),
               "tokens_read": ("tokens read", ",.0f"), "judge_perplexity": ("perplexity", ".3f"),
               "judge_bits_per_char": ("bits/char", ".4f"),
               "judge_stderr_per_char": ("± s.e.", ".4f"), "unigram_entropy_bits": ("entropy", ".3f"),
               "distinct_1": ("distinct-1", ".3f"), "distinct_2": ("distinct-2", ".3f"),
               "repetition_2": ("repetition-2", ".3f"), "known_words": ("known words", ".3f"),
               "seconds": ("seconds", ".1f")}
    columns = {key: column for key, column in columns.items() if any(row.get(key) is not None for row in rows)}
    print(f"{rows[0]['n_samples']} samples{f', judged by {judge.name}' if judge else ''}; entropy: of a sample's "
          "tokens, bits; distinct-n and repetition-n: of words; NFE: network calls", file=out)
    table(rows, columns, out)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, lines.getvalue())
    key, label = (("judge_perplexity", "perplexity to the judge") if judge else
                  ("unigram_entropy_bits", "unigram entropy, bits"))
    drawn = [row for row in rows if row["nfe"]]
    if drawn:
        picture(path.with_suffix(".png"),
                {name: [(row["nfe"], row[key], 0) for row in drawn if row["sampler"] == name]
                 for name in dict.fromkeys(row["sampler"] for row in drawn)},
                "network evaluations per sample", label, log_x=True, level=("real text", rows[-1][key]))
    return {"samples": rows}
