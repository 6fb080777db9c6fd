"""Models with different tokenizers on the same text, in bits per byte, for `evaluate.py A B --text FILE`.

docs/evaluation.md says how the text is cut into chunks and windows.
"""

import math

import numpy as np

from cli import UserError, note, progress
from data.tokenizer import TEXT8_ALPHABET
from likelihood import bound, plus_minus
from log import finite

CHUNK = 4096  # characters, about


def cut_into_chunks(text, size=CHUNK):
    """Cut a text before spaces or line breaks into parts of about `size` characters, whose concatenation it is."""
    chunks, start = [], 0
    while start < len(text):
        end = start + size
        places = [place for place in (text.find(" ", end), text.find("\n", end)) if place >= 0]
        end = min(places) if places and len(text) - end > size / 2 else len(text)
        chunks.append(text[start:end])
        start = end
    return chunks


def windows_of(ids, seq_len):
    """Windows that cover all tokens of chunks, ids [(n_i,)]: [(start in all ids together, length, chunk)]."""
    found, start = [], 0
    for chunk, own in enumerate(ids):
        found += [(start + i, min(seq_len, len(own) - i), chunk) for i in range(0, len(own), seq_len)]
        start += len(own)
    return found


def nats_of_chunks(subject, objective, estimator, chunks, seed=0, repeats=1):
    """Score chunks of a text with one model: (nats (n,) float64, number of tokens)."""
    ids = [subject.tokenizer.encode(chunk) for chunk in chunks]
    tokens, nats = np.concatenate(ids), np.zeros(len(chunks))
    starts, lengths, chunk = (np.array(column) for column in zip(*windows_of(ids, subject.data.seq_len)))
    with progress(total=len(starts), desc=subject.path, unit="window", leave=False) as bar:
        for length in np.unique(lengths).tolist():
            mine = np.flatnonzero(lengths == length)  # of all windows, so that each has noise of its own
            data = subject.data._replace(tokens=tokens, starts=starts, seq_len=length)
            found = bound(subject.model, objective, data, mine.tolist(), seed, repeats, estimator)
            np.add.at(nats, chunk[mine], length * found.numpy())
            bar.update(len(mine))
    return nats, len(tokens)


def ratio(values, sizes):
    """sum of values / sum of sizes, (n,) each, and its standard error: that of the residuals values - ratio * sizes
    (Cochran, Sampling Techniques, 1977, section 6.3)."""
    n, mean = len(values), values.sum() / sizes.sum()
    if n < 2:
        return mean, math.nan
    return mean, math.sqrt(n / (n - 1) * ((values - mean * sizes) ** 2).sum()) / sizes.sum()


def same_text(one, two):
    """The text that both models score, in text8's 27 symbols if one of them knows only these, and words that say so."""
    for subject in (one, two):
        if subject.tokenizer.alphabet == TEXT8_ALPHABET:
            return subject.text, " in text8's 27 symbols"
    return one.text, ""


def compare_on_text(one, two, estimators, args, out):
    """Print bits per byte of two models on the same text, and the difference, chunk by chunk. Raises UserError."""
    text, symbols = same_text(one, two)
    chunks = cut_into_chunks(text)
    if args.n_tokens:
        n = max(2, round(args.n_tokens * len(chunks) / len(one.tokenizer.encode(text))))
        places = np.linspace(0, len(chunks) - 1, min(n, len(chunks))).round().astype(int)
        chunks = [chunks[i] for i in places]
    n_bytes = np.array([len(chunk.encode()) for chunk in chunks])
    objectives = [subject.objective(estimator, args.T) for subject, estimator in zip((one, two), estimators)]
    for subject, objective in zip((one, two), objectives):
        subject.whole_windows("a comparison in bytes")
        if objective.block_size:
            raise UserError(f"{subject.path} {objective.description}, and the last window of a chunk is no multiple of "
                            "its blocks: compare another model in bytes")
    bits, models = [], []
    for subject, objective, estimator in zip((one, two), objectives, estimators):
        if subject.tokenizer.decode(subject.tokenizer.encode(chunks[0])) != chunks[0]:
            note(f"the tokenizer of {subject.path} loses a part of the text, such as capitals or spaces: its bits "
                 "describe less than the text")
        nats, n_tokens = nats_of_chunks(subject, objective, estimator, chunks, args.seed, args.repeats)
        if not np.isfinite(nats).all():
            raise UserError(f"the likelihood of {subject.path} is not finite: its weights are damaged, or it predicts "
                            "0")
        bits.append(nats / math.log(2))
        mean, error = ratio(bits[-1], n_bytes)
        models.append({"checkpoint": subject.path, "bits_per_byte": mean, "stderr": finite(error),
                       "bits_per_token": bits[-1].sum() / n_tokens, "n_tokens": n_tokens, "estimator": estimator})
        print(f"{subject.path}: {mean:.4f} {plus_minus(error)} bits per byte ({n_tokens:,} tokens in windows of up to "
              f"{subject.data.seq_len}; {estimator}; step {subject.step:,})", file=out)
    mean, error = ratio(bits[1] - bits[0], n_bytes)
    print(f"{two.path} less {one.path}: {mean:+.4f} {plus_minus(error)} bits per byte, on {len(chunks):,} chunks of "
          f"{args.text}{symbols}, {n_bytes.sum():,} bytes", file=out)
    return {"models": models, "difference": mean, "difference_stderr": finite(error),
            "n_chunks": len(chunks), "n_bytes": int(n_bytes.sum())}
