"""studies/baselines.py against counting by hand."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from data.tokenizer import END, CharTokenizer, make_tokenizer, tokens_of
from evaluate import comparison
from studies import baselines
from studies.baselines import known_word_share, lzma_bits, ngram_bits, reference_points, words_of


def slow_ngram(train, history, x, n, V):
    """Witten-Bell by its recursion, from counts of substrings."""
    if n == 0:
        return 1 / V
    h = history[len(history) - (n - 1):]
    followers = Counter(train[i + n - 1] for i in range(len(train) - n + 1) if train[i:i + n - 1] == h)
    lower = slow_ngram(train, history, x, n - 1, V)
    if not followers:
        return lower
    return (followers[x] + len(followers) * lower) / (sum(followers.values()) + len(followers))


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_ngram(n):
    """The vectorised n-gram model is the recursion, token by token; its probabilities sum to 1."""
    rng = np.random.default_rng(0)
    V, train, test = 4, rng.integers(0, 4, 60).tolist(), rng.integers(0, 4, 25).tolist()
    bits = -sum(math.log2(slow_ngram(train, test[:i], x, min(n, i + 1), V)) for i, x in enumerate(test)) / len(test)
    assert ngram_bits(train, test, n, V) == pytest.approx(bits)
    for history in itertools.product(range(V), repeat=n - 1):
        assert sum(slow_ngram(train, list(history), x, n, V) for x in range(V)) == pytest.approx(1)


def test_reference_points_order():
    """On text made by a second-order rule, longer histories help and lzma given train sees the repetition."""
    text = np.array(([1, 2, 3, 1, 3, 2] * 200)[:1100], dtype=np.uint8)
    bits = dict(reference_points(text[:1000], text[1000:], 4))
    assert bits["uniform"] == 2 and bits["trigram"] < 0.1 < 1.5 < bits["unigram"] < 2
    assert lzma_bits(text[:1000], text[1000:]) < 0.5


def test_a_large_vocabulary():
    """5-grams of more than 63 bits are left out."""
    text = np.arange(9000, dtype=np.uint16) % 7000
    assert [name for name, _ in reference_points(text[:8000], text[8000:], 7000)] == [
        "uniform", "unigram", "trigram", "lzma given train"]


def test_a_model_beats_what_is_beyond_its_error():
    """A reference point within one standard error of the model is not beaten."""
    scored = {"bits_per_token": 1.0, "stderr": 0.1, "estimator": "", "baselines": {"near": 1.05, "far": 1.2}}
    assert comparison(scored, "char").endswith("The model beats far; it does not beat near.")


def test_known_words():
    """Words cut by the ends of a sample do not count."""
    assert known_word_share(["cut the cat xq sat cu"], {"the", "cat", "sat"}) == pytest.approx(3 / 4)
    assert known_word_share(["cut cu", "cut", ""], {"cut"}) is None
    assert known_word_share([f"x the mat{END}the cat y"], {"the", "cat", "mat"}) == 1  # two texts in one window


@pytest.mark.parametrize("chunk", [1, 4, 7, 1000])
def test_words_of(monkeypatch, chunk):
    """Chunks of tokens may end within words, and between them; what is beyond the limit does not count."""
    text = "the cat sat  on a\nmat the end"
    monkeypatch.setattr(baselines, "CHUNK", chunk)
    letters = CharTokenizer("".join(sorted(set(text))))
    assert words_of(letters.encode(text), letters) == set(text.split())
    parts = [*"the end", END, *"the start"]
    two_texts = SimpleNamespace(decode=lambda ids: "".join(parts[i] for i in ids))
    monkeypatch.setattr(baselines, "MOST", 100)
    assert words_of(np.arange(len(parts)), two_texts) == {"the", "end", "start"}
    bpe = make_tokenizer(tokens_of("bpe:270", lambda: [text * 9]))
    assert words_of(bpe.encode(text), bpe) == set(text.split())
    monkeypatch.setattr(baselines, "MOST", 7)
    assert words_of(letters.encode(text), letters) == {"the", "cat"}
