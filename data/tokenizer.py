"""Text <-> token ids. A tokenizer is known by the `meta` of a data set or checkpoint: plain types, saved as JSON."""

import string

import numpy as np

from cli import UserError

TEXT8_ALPHABET = " " + string.ascii_lowercase  # space 0, a 1, ..., z 26

# What a checkpoint of another project was trained on, where it does not say so itself.
KNOWN = {
    "text8": {"tokenizer": "char", "alphabet": TEXT8_ALPHABET, "vocab_size": 27},
    "openwebtext": {"tokenizer": "gpt2", "vocab_size": 50257},
}


class CharTokenizer:
    """One token per character of a fixed alphabet; ids are positions in it."""

    unit = "char"

    def __init__(self, alphabet):
        self.alphabet, self.vocab_size = alphabet, len(alphabet)
        self.ids = {ord(character): i for i, character in enumerate(alphabet)}

    def encode(self, text):
        """str -> (n,) uint16. Raises UserError that names the characters outside the alphabet."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        known, inverse = np.unique(codes, return_inverse=True)
        strange = [chr(code) for code in known if code not in self.ids]
        if strange:
            shown = " ".join(repr(character) for character in strange[:10])
            raise UserError(f"{shown}{' ...' if len(strange) > 10 else ''} not in the alphabet {self.alphabet!r}")
        return np.array([self.ids[code] for code in known], dtype=np.uint16)[inverse]

    def decode(self, ids):
        """Sequence of ids -> str."""
        return "".join(self.alphabet[i] for i in ids)

    def lengths(self):
        """Of each token: (V,) characters and (V,) bytes of UTF-8."""
        return np.ones(self.vocab_size, dtype=int), np.array([len(c.encode()) for c in self.alphabet])


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken: 50,256 tokens and end-of-text (id 50256)."""

    unit = "token"
    vocab_size = 50257
    end_of_text = 50256

    def __init__(self):
        import tiktoken
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken downloads the merges once; its errors are those of the network
            raise UserError(f"tiktoken could not get the GPT-2 vocabulary ({type(error).__name__}): go online once, "
                            f"or set TIKTOKEN_CACHE_DIR to a folder that has it")

    def encode(self, text):
        """str -> (n,) uint16; special tokens in the text are read as plain text."""
        return np.array(self.bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        return self.bpe.decode(list(map(int, ids)))

    def lengths(self):
        """Of each token: (V,) characters, counted where they start, and (V,) bytes of UTF-8."""
        pieces = [self.bpe.decode_single_token_bytes(i) for i in range(self.vocab_size)]
        return (np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]),
                np.array([len(piece) for piece in pieces]))


def make_tokenizer(meta):
    """The tokenizer that a data set's or checkpoint's meta describes."""
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta["alphabet"])
    if meta["tokenizer"] == "gpt2":
        return GPT2Tokenizer()
    raise UserError(f"unknown tokenizer {meta['tokenizer']!r}; this version knows char and gpt2")


def text8_words(text):
    """English text as a list of words in a ... z: lower case, apostrophes dropped, anything else a space."""
    lower = text.lower().replace("'", "").replace("\u2019", "")
    return "".join(c if "a" <= c <= "z" else " " for c in lower).split()
