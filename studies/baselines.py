"""Reference points for bits per token: results of simple models on the same split (`evaluate.py --baselines`)."""

import lzma
import math
import re

import numpy as np

from cli import progress
from data.tokenizer import END

BETWEEN = re.compile(rf"(?:\s|{re.escape(END)})+")  # what is between two words
MOST, CHUNK = 100_000_000, 1 << 20  # tokens of a training text whose words count as known; those decoded at a time


def ngram_bits(train, test, n, vocab_size):
    """Bits per token of test (m,) under an n-gram model of train, interpolated to uniform by Witten-Bell smoothing:

        p_n(x | h) = (count(h x) + types(h) p_{n-1}(x | h')) / (count(h) + types(h)),

    where types(h) is the number of different tokens seen after the history h, and h' is h without its oldest token
    (Chen and Goodman 1998, section 2.4). The first tokens of test have a short history and are given lower orders.
    """
    p = np.full(len(test), 1 / vocab_size)
    for order in range(1, n + 1):
        grams, counts = np.unique(windows_as_ints(train, order, vocab_size), return_counts=True)
        histories, start = np.unique(grams // vocab_size, return_index=True)
        history_counts, types = np.add.reduceat(counts, start), np.diff(np.append(start, len(grams)))

        queries = windows_as_ints(test, order, vocab_size)
        count = look_up(queries, grams, counts)
        history_count = look_up(queries // vocab_size, histories, history_counts)
        type_count = look_up(queries // vocab_size, histories, types)
        seen = history_count > 0
        lower = p[order - 1:]
        lower[seen] = (count[seen] + type_count[seen] * lower[seen]) / (history_count[seen] + type_count[seen])
    return float(-np.log2(p).mean())


def windows_as_ints(tokens, order, vocab_size):
    """Return all runs of `order` tokens as integers in base vocab_size, (len(tokens) - order + 1,) int64.

    vocab_size**order must be below 2**63."""
    tokens = np.asarray(tokens, dtype=np.int64)
    codes = np.zeros(len(tokens) - order + 1, dtype=np.int64)
    for i in range(order):
        codes = codes * vocab_size + tokens[i:i + len(codes)]
    return codes


def look_up(queries, keys, values):
    """Return values[i] where a query equals keys[i], which are sorted, else 0."""
    i = np.searchsorted(keys, queries).clip(max=len(keys) - 1)
    return np.where(keys[i] == queries, values[i], 0)


def lzma_bits(train, test):
    """Bits per token of test under LZMA given train: the compressed size of both, minus that of train alone."""
    size = lambda tokens: len(lzma.compress(np.asarray(tokens).tobytes(), preset=9 | lzma.PRESET_EXTREME))
    return 8 * (size(np.concatenate([train, test])) - size(train)) / len(test)


def reference_points(train, test, vocab_size):
    """Return [(name, bits per token)] of simple models on test; no n-grams whose number does not fit into 63 bits."""
    n_grams = [(name, ngram_bits(train, test, n, vocab_size))
               for n, name in ((1, "unigram"), (3, "trigram"), (5, "5-gram")) if vocab_size**n < 2**63]
    return [("uniform", math.log2(vocab_size)), *n_grams, ("lzma given train", lzma_bits(train, test))]


def words_of(tokens, tokenizer):
    """The set of words in a training text (n,) of tokens; in its first 100 million tokens, if it is longer."""
    tokens, known, rest = tokens[:MOST], set(), ""
    for start in progress(range(0, len(tokens), CHUNK), desc="words of the training text", leave=False):
        *words, rest = re.split(BETWEEN, rest + tokenizer.decode(tokens[start:start + CHUNK]))
        known.update(words)  # the last word may go on in the next chunk
    return (known | {rest}) - {""}


def known_word_share(texts, known):
    """Share of words in texts that are known. A text's first and last word may be cut and do not count; None if no text
    has another one."""
    words = [word for text in texts for word in re.split(BETWEEN, text.strip())[1:-1]]
    return sum(word in known for word in words) / len(words) if words else None
