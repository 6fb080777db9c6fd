"""Measure the quality of samples: what a judge says of them (judges.py), their entropy and their repetition.

A judge's perplexity alone can mislead: text that repeats itself has a low one. So it is always reported with the
entropy and the repetition of the same samples, and with the same numbers of real text.
"""

import csv
import io
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np

from cli import UserError, note, table, write_file
from data.loader import gather, windows
from plot import picture
from prompts import end_of, text_of
from studies.baselines import known_word_share, words_of
from studies.judges import features, ids_of, judged, mauve

MIN_MAUVE = 100  # fewest samples that MAUVE is computed of: they make ten clusters


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


def statistics_of(texts, tokenizer, known):
    """Return the statistics of texts that need no judge, as a dict. known: the words of the training text."""
    entropies = [unigram_entropy(ids_of(text, tokenizer)) for text in texts]
    return {"unigram_entropy_bits": sum(entropies) / len(entropies), "distinct_1": distinct(texts, 1),
            "distinct_2": distinct(texts, 2), "repetition_2": repetition(texts, 2),
            "known_words": known_word_share(texts, known)}


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


def other_windows(tokens, length, starts, n, where):
    """The starts of n windows beside those at `starts`, evenly spread. Raises UserError if n samples are too few for
    MAUVE, or the text is too short."""
    if n < MIN_MAUVE:
        raise UserError(f"--mauve needs at least {MIN_MAUVE} samples, and these are {n}: ask for more")
    others = np.setdiff1d(windows(tokens, length), starts)
    if len(others) < n:
        raise UserError(f"--mauve compares {n} samples with as many pieces of real text, and these with as many "
                        f"others, and {where} has only {len(starts) + len(others)} pieces of {length} tokens: choose "
                        "another --split, or fewer samples")
    return others[np.linspace(0, len(others) - 1, n).round().astype(int)]


def measure(subject, samples, judge, settings, seed, with_mauve=False):
    """Measure samples of each of several sampling.Settings, and as many pieces of real text, if there are so many.

    Returns [{sampler, steps, nfe, ...}]. samples: their number, or texts. subject: a subject.Subject. judge: from
    open_judge, or None. A piece is as long as a sample; if the samples are texts, as long as they are on average. The
    prefix of a model that needs one is left out. with_mauve: compare the samples with the pieces of real text by MAUVE,
    and these with as many others, because no samples can be expected to come nearer.
    """
    rows, data, end = [], subject.data, end_of(subject.config, subject.tokenizer)
    known, from_file = words_of(subject.training_tokens(), subject.tokenizer), isinstance(samples, list)
    c, length, n = 0, data.seq_len, len(samples) if from_file else samples
    if from_file and "record" not in subject.meta:
        length = max(1, round(sum(len(ids_of(text, subject.tokenizer)) for text in samples) / n))
        if length > len(data.tokens):
            length = len(data.tokens)
            note(f"the samples are longer than {subject.where}, so their entropy and distinct-n cannot be compared "
                 "with those of real text")
    if not from_file:
        c = subject.config.prefix_range[0]
    starts = windows(data.tokens, length, n)
    text_at = lambda starts: [subject.tokenizer.decode(data.tokens[i + c:i + length]) for i in starts]
    if with_mauve:
        more_starts = other_windows(data.tokens, length, starts, n, subject.where)
        real = features(judge, text_at(starts), data.batch_size)

    def add(name, texts, **more):
        row = {"sampler": name, "steps": None, "setting": None, "nfe": None, "tokens_read": None,
               "temperature": None, "top_p": None, "top_k": None, "seed": None, "seconds": None}
        row |= more | {"n_samples": len(texts), **statistics_of(texts, subject.tokenizer, known)}
        row |= judged(judge, texts, data.batch_size) if judge else {}
        if with_mauve:
            compared = text_at(more_starts) if name == "real text" else texts
            row["mauve"] = mauve(features(judge, compared, data.batch_size), real)
        rows.append(row)

    if from_file:
        add("file", samples)
    else:
        xt = gather(data.tokens, np.resize(starts, n), length)
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
    add("real text", text_at(starts))
    return rows


def samples(subject, samples, settings, judge, folder, seed, out, with_mauve=False):
    """Print, write and draw the quality of samples by network evaluations.

    samples: their number, or texts. settings: a list of sampling.Settings, one for each row. judge: from open_judge, or
    None. with_mauve: as in measure.
    """
    if judge and judge.meta and judge.meta.get("alphabet") not in (None, subject.meta.get("alphabet")):
        raise UserError(f"--judge {judge.name} has another alphabet than {subject.path}, so its perplexity would mean "
                        "nothing: choose a judge trained on the same data")
    path = subject.output(folder, "quality.csv")
    subject.one_prefix("--samples")
    rows = measure(subject, samples, judge, settings, seed, with_mauve)
    columns = {"sampler": ("", ""), "steps": ("steps", "d"), "setting": ("", ""), "nfe": ("NFE", ".1f"),
               "tokens_read": ("tokens read", ",.0f"), "judge_perplexity": ("perplexity", ".3f"),
               "judge_bits_per_char": ("bits/char", ".4f"),
               "judge_stderr_per_char": ("± s.e.", ".4f"), "mauve": ("MAUVE", ".3f"),
               "unigram_entropy_bits": ("entropy", ".3f"),
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
