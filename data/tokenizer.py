"""Convert text to token ids and back. The `meta` of a data set or checkpoint, plain JSON types, names its tokenizer."""

import string

import numpy as np

from cli import UserError, require

TEXT8_ALPHABET = " " + string.ascii_lowercase  # space 0, a 1, ..., z 26

# Vocabularies of other projects' checkpoints, which do not say themselves what they were trained on (KNOWN).
LETTERS = string.ascii_letters + string.digits + string.punctuation


def characters(alphabet):
    return {"tokenizer": "char", "alphabet": alphabet, "vocab_size": len(alphabet)}


KNOWN = {
    "text8": characters(TEXT8_ALPHABET),
    "openwebtext": {"tokenizer": "gpt2", "vocab_size": 50257},
    # text8 of MDLM and Duo: a symbol each for [CLS] [SEP] [BOS] [EOS] [MASK] [PAD] [RESERVED] [UNK], then letters;
    # only the uniform one has [MASK]
    "text8_framed": characters("\u2401\u2402\u2403\u2404\u2406\u2407\u2408" + string.ascii_lowercase + " "),
    "text8_framed_uniform": characters("\u2401\u2402\u2403\u2404\u2405\u2406\u2407\u2408"
                                       + string.ascii_lowercase + " "),
    "gpt2_padded": {"tokenizer": "gpt2", "vocab_size": 50258},  # Duo: [PAD] is one more token
    "bert": {"tokenizer": "bert", "vocab_size": 30521},         # without [MASK]
    "bert_uniform": {"tokenizer": "bert", "vocab_size": 30522},
    "oxen": characters("\u2400\ufffd" + LETTERS + "\n "),       # its baby names; [PAD] [UNK]
    "oxen_words": characters("\u2400\u2401" + LETTERS + " "),
    "ox": characters("ox"),
}


class CharTokenizer:
    """One token per character of a fixed alphabet; ids are positions in it.

    end, of all tokenizers: the id of the token that ends a text, or None.
    pad: the character of the alphabet, or None, that fills items up to their length and is no part of the text.
    """

    unit = "char"

    def __init__(self, alphabet, pad=None):
        self.alphabet, self.vocab_size, self.pad = alphabet, len(alphabet), pad
        self.ids = {ord(character): i for i, character in enumerate(alphabet)}
        self.end = alphabet.index(pad) if pad else None

    def encode(self, text):
        """Convert a str to (n,) uint16. Raises UserError that names any characters outside the alphabet."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        known, inverse = np.unique(codes, return_inverse=True)
        strange = [chr(code) for code in known if code not in self.ids]
        if strange:
            shown = " ".join(repr(character) for character in strange[:10])
            raise UserError(f"{shown}{' ...' if len(strange) > 10 else ''} not in the alphabet {self.alphabet!r}")
        return np.array([self.ids[code] for code in known], dtype=np.uint16)[inverse]

    def decode(self, ids):
        """Convert a sequence of ids to a str without the pads."""
        return "".join(self.alphabet[i] for i in ids if self.alphabet[i] != self.pad)

    def lengths(self):
        """Return the length of each token: (V,) in characters and (V,) in bytes of UTF-8."""
        return np.ones(self.vocab_size, dtype=int), np.array([len(c.encode()) for c in self.alphabet])


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken: 50,256 tokens and end-of-text (id 50256)."""

    unit = "token"
    end = end_of_text = 50256

    def __init__(self, vocab_size=50257):
        """vocab_size is more than 50,257 if a model has extra tokens, such as padding, which are no text."""
        require("tiktoken", "GPT-2's vocabulary")
        import tiktoken
        self.vocab_size = vocab_size
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # tiktoken downloads the merges once and raises network errors
            raise UserError(f"tiktoken could not get the GPT-2 vocabulary ({type(error).__name__}): go online once, "
                            f"or set TIKTOKEN_CACHE_DIR to a folder that has it")

    def encode(self, text):
        """Convert a str to (n,) uint16. Special tokens in the text are read as plain text."""
        return np.array(self.bpe.encode_ordinary(text), dtype=np.uint16)

    def decode(self, ids):
        return self.bpe.decode([int(i) for i in ids if i <= self.end_of_text])

    def lengths(self):
        """Return the length of each token: (V,) in characters that start in it, and (V,) in bytes of UTF-8."""
        pieces = [self.bpe.decode_single_token_bytes(i) for i in range(self.end_of_text + 1)]
        pieces += [b""] * (self.vocab_size - len(pieces))
        return (np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]),
                np.array([len(piece) for piece in pieces]))


class BertTokenizer:
    """BERT's WordPiece (bert-base-uncased) by transformers: lower case, words and parts of words."""

    unit = "token"
    mask, end = 103, None

    def __init__(self, vocab_size=30522):
        """vocab_size is 30,522, or one less: then [MASK] is the mask of the noise, and is left out of the tokens."""
        self.vocab_size = vocab_size
        require("transformers", "BERT's vocabulary")
        from transformers import AutoTokenizer
        try:
            self.tokenizer = AutoTokenizer.from_pretrained("google-bert/bert-base-uncased")
        except Exception as error:
            raise UserError("BERT's vocabulary (google-bert/bert-base-uncased) is not in the Hub's cache and could not "
                            f"be downloaded ({type(error).__name__}): go online once")
        self.ids = [i for i in range(30522) if vocab_size == 30522 or i != self.mask]  # ours -> BERT's

    def encode(self, text):
        """Convert a str to (n,) uint16. Raises UserError for a [MASK] in it, if that is left out."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if self.mask in ids and self.mask not in self.ids:
            raise UserError("'[MASK]' is the mask of the noise and cannot be in a text: write a blank instead")
        return np.searchsorted(self.ids, np.array(ids, dtype=np.int64)).astype(np.uint16)

    def decode(self, ids):
        return self.tokenizer.decode([self.ids[i] for i in ids])

    def lengths(self):
        """Return the length of each token, with the space before a word: (V,) in characters, (V,) in bytes of UTF-8."""
        pieces = self.tokenizer.convert_ids_to_tokens(self.ids)
        pieces = [piece[2:] if piece.startswith("##") else " " + piece for piece in pieces]
        return np.array([len(piece) for piece in pieces]), np.array([len(piece.encode()) for piece in pieces])


def describes_tokens(meta):
    """Tell whether the meta of a data set or checkpoint has all that make_tokenizer needs, with the right types."""
    if not isinstance(meta, dict):
        return False
    size, kind, alphabet, pad, record = (meta.get(key) for key in ("vocab_size", "tokenizer", "alphabet", "pad",
                                                                   "record"))
    if type(size) is not int or size > 10**7 or not isinstance(kind, str) or record is not None and (
            type(record) is not int or not 1 <= record <= 10**7):
        return False
    if kind == "char":
        return (isinstance(alphabet, str) and len(alphabet) == len(set(alphabet)) == size >= 1
                and (pad is None or isinstance(pad, str) and len(pad) == 1 and pad in alphabet))
    return size >= {"gpt2": 50257, "bert": 30521}.get(kind, 1)


def make_tokenizer(meta):
    """Return the tokenizer that the meta of a data set or checkpoint describes. Raises UserError if it is unknown."""
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta["alphabet"], meta.get("pad"))
    if meta["tokenizer"] == "gpt2":
        return GPT2Tokenizer(meta["vocab_size"])
    if meta["tokenizer"] == "bert":
        return BertTokenizer(meta["vocab_size"])
    raise UserError(f"unknown tokenizer {meta['tokenizer']!r}; this version knows char, gpt2 and bert")


def text8_words(text):
    """Return the words of an English text in a ... z: lower case, apostrophes dropped, all else becomes a space."""
    lower = text.lower().replace("'", "").replace("\u2019", "")
    return "".join(c if "a" <= c <= "z" else " " for c in lower).split()
