"""Convert text to token ids and back. The `meta` of a data set or checkpoint, plain JSON types, names its tokenizer."""

import json
import re
import string
import warnings
from pathlib import Path

import numpy as np

from cli import UserError, first_line, note, require

TEXT8_ALPHABET = " " + string.ascii_lowercase  # space 0, a 1, ..., z 26
END = "<|endoftext|>"  # GPT-2's token between two texts, as decode() writes it

LETTERS = string.ascii_letters + string.digits + string.punctuation


def characters(alphabet):
    return {"tokenizer": "char", "alphabet": alphabet, "vocab_size": len(alphabet)}


TOKENS = "tokenizer", "alphabet", "vocab_size", "definition", "characters", "end"  # fields of a meta: what its ids are

# Vocabularies by name. Other projects' checkpoints do not contain theirs.
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


def check_alphabet(characters, alphabet):
    """Raise UserError that names any of the characters outside the alphabet."""
    strange = sorted(set(characters) - set(alphabet))
    if strange:
        raise UserError(f"{' '.join(map(repr, strange[:10]))}{' ...' if len(strange) > 10 else ''} not in the alphabet "
                        f"{alphabet!r}"
                        + (": write lower case letters and spaces" if alphabet == TEXT8_ALPHABET else ""))


class CharTokenizer:
    """One token per character of a fixed alphabet; ids are positions in it.

    end, of all tokenizers: the id of the token that ends a text, or None.
    space_first, of all tokenizers: whether the first token of a word has the space before it.
    alphabet, of all tokenizers: the characters of the texts that it is for, or None if these are any.
    pad: the character of the alphabet, or None, that fills items up to their length and is no part of the text.
    """

    space_first = False

    def __init__(self, alphabet, pad=None):
        self.alphabet, self.vocab_size, self.pad = alphabet, len(alphabet), pad
        self.unit = "token" if pad else "char"  # the pad is a token, and no character
        self.ids = {ord(character): i for i, character in enumerate(alphabet)}
        self.end = alphabet.index(pad) if pad else None

    def encode(self, text):
        """Convert a str to (n,) uint16. Raises UserError that names any characters outside the alphabet."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        known, inverse = np.unique(codes, return_inverse=True)
        check_alphabet([chr(code) for code in known], self.alphabet)
        return np.array([self.ids[code] for code in known], dtype=np.uint16)[inverse]

    def decode(self, ids):
        """Convert a sequence of ids to a str without the pads."""
        return "".join(self.alphabet[i] for i in ids if self.alphabet[i] != self.pad)

    def lengths(self):
        """Return the length of each token: (V,) in characters, (V,) in bytes of UTF-8. The pad is no text: 0 and 0."""
        texts = ["" if c == self.pad else c for c in self.alphabet]
        return np.array([len(text) for text in texts]), np.array([len(text.encode()) for text in texts])


class GPT2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken: 50,256 tokens and end-of-text (id 50256)."""

    unit, space_first, alphabet = "token", True, None
    end = 50256  # end-of-text

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
        """Convert a sequence of ids to a str. End-of-text becomes the constant END."""
        return self.bpe.decode([int(i) for i in ids if i <= self.end])

    def encode_decoded(self, text):
        """Convert what decode() returned, in which END is the token of end-of-text: str -> (n,) uint16."""
        return np.array(self.bpe.encode(text, allowed_special={END}), dtype=np.uint16)

    def lengths(self):
        """Return the length of each token: (V,) in characters that start in it, and (V,) in bytes of UTF-8."""
        pieces = [self.bpe.decode_single_token_bytes(i) for i in range(self.end)]
        pieces += [b""] * (self.vocab_size - len(pieces))  # end-of-text and padding are no text
        return lengths_of(pieces)


class HubTokenizer:
    """A tokenizer of Hugging Face's tokenizers, such as that of BERT, RoBERTa or ModernBERT.

    Special tokens such as <s> and [PAD] are no tokens of a text, and are left out. The other tokens get the ids
    0 ... V - 1, in the tokenizer's order. An unknown token stays if the tokenizer makes it of unknown characters.
    """

    unit, space_first = "token", True

    def __init__(self, definition, left_out=None, alphabet=None, end=None, plain=False):
        """definition: what a tokenizer.json contains. left_out: the ids to leave out, if not those of special tokens.
        alphabet, end: see CharTokenizer. The vocabulary does not say the alphabet: a byte-level BPE has tokens for all
        bytes. plain: the names of all added tokens in a text are text, also of those that are not special.

        Raises UserError if it is no such definition.
        """
        require("tokenizers", "this tokenizer")
        from tokenizers import Tokenizer
        try:
            self.tokenizer, parts = Tokenizer.from_str(definition), json.loads(definition)
            self.pieces = {i: piece for piece, i in self.tokenizer.get_vocab().items()}
            most = max(self.pieces)
            self.prefix = parts["model"].get("continuing_subword_prefix") or "##"
            self.suffix = parts["model"].get("end_of_word_suffix")
            self.decoder = json.dumps(parts["decoder"])
            unknown = self.unknown_of(parts["model"])
            self.added = {token["id"] for token in parts["added_tokens"]}  # their pieces are their texts
            special = {token["id"] for token in parts["added_tokens"]
                       if token["special"] and token["content"] != unknown}
            if plain:
                added = [token | {"special": True} for token in parts["added_tokens"]]
                self.tokenizer = Tokenizer.from_str(json.dumps(parts | {"added_tokens": added}))
        except Exception as error:  # a plain Exception of the library; or parts that are missing
            raise UserError(f"the definition of the tokenizer is damaged: {first_line(error)}")
        if most > 10**7:
            raise UserError(f"the tokenizer has a token number {most:,}, which is above ten million")
        self.tokenizer.encode_special_tokens = True
        self.ids = sorted(self.pieces.keys() - (special if left_out is None else left_out))  # ours -> the tokenizer's
        self.left_out = sorted(set(range(most + 1)) - set(self.ids))
        self.vocab_size, self.alphabet, self.end = len(self.ids), alphabet, end

    def unknown_of(self, model):
        """The token for characters that the tokenizer does not know, or None if it knows all, as those of bytes do."""
        all_bytes = {f"<0x{byte:02X}>" for byte in range(256)} <= set(self.pieces.values())
        if self.byte_level or model.get("byte_fallback") and all_bytes:
            return None
        return self.pieces[model["unk_id"]] if model.get("unk_id") is not None else model.get("unk_token")

    @property
    def byte_level(self):
        return "ByteLevel" in self.decoder

    def encode(self, text):
        """Convert a str to (n,) uint8, uint16 or uint32. Special tokens in the text are read as plain text.

        Raises UserError if the tokenizer makes a token of it that is left out.
        """
        theirs = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        found = np.searchsorted(self.ids, theirs).clip(max=self.vocab_size - 1)
        strange = theirs[np.array(self.ids)[found] != theirs] if len(theirs) else theirs
        if len(strange):
            raise UserError(f"the tokenizer turns a part of this text into its special token "
                            f"{self.pieces[strange[0]]}: remove that part")
        return found.astype(id_type(self.vocab_size))

    def decode(self, ids):
        return self.tokenizer.decode([self.ids[i] for i in ids], skip_special_tokens=False)

    def lengths(self):
        """Return the length of each token: (V,) in characters, (V,) in bytes of UTF-8.

        A character of several bytes counts for the token in which it starts. WordPiece drops spaces. One is counted
        before every token that neither continues a word nor is a punctuation mark. An unknown token counts as its name.
        The token that ends a text is no text: 0 and 0.
        """
        pieces = [self.pieces[i] for i in self.ids]
        if self.byte_level:  # a character of a piece stands for a byte
            alphabet = byte_alphabet()
            pieces = [piece.encode() if i in self.added else bytes(alphabet[c] for c in piece if c in alphabet)
                      for i, piece in zip(self.ids, pieces)]
        elif "WordPiece" in self.decoder:
            pieces = [piece.removeprefix(self.prefix) if piece.startswith(self.prefix) else
                      piece if len(piece) == 1 and not piece.isalnum() else " " + piece for piece in pieces]
            pieces = [piece.encode() for piece in pieces]
        elif self.suffix:  # it ends a word, and stands for the space after it
            pieces = [(piece.removesuffix(self.suffix) + " " if piece.endswith(self.suffix) else piece).encode()
                      for piece in pieces]
        else:  # a mark stands for a space; <0x0A> is a byte
            pieces = [bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x[0-9A-F]{2}>", piece)
                      else piece.replace("\u2581", " ").encode() for piece in pieces]
        return lengths_of(b"" if i == self.end else piece for i, piece in enumerate(pieces))


def lengths_of(pieces):
    """Return the length of each of some bytes: in characters of UTF-8 that start in it, and in bytes."""
    pieces = list(pieces)
    return (np.array([sum(byte & 0xC0 != 0x80 for byte in piece) for piece in pieces]),
            np.array([len(piece) for piece in pieces]))


def byte_alphabet():
    """The characters that stand for bytes in byte-level BPE, {character: byte}: themselves if they can be printed."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}


def id_type(vocab_size):
    """The smallest type of the ids of a vocabulary on disk."""
    return np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32


def read_tokenizer(place, **revision):
    """The tokenizer of transformers in a folder or in the Hub's cache. Code that it brings along is not executed."""
    from transformers import AutoTokenizer, Qwen2Tokenizer
    from transformers.utils import logging
    logging.set_verbosity_error()  # it warns of a config.json of a kind that it does not know, such as LLaDA's
    with warnings.catch_warnings(action="ignore"):  # about settings with older names
        try:
            return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False, **revision)
        except ValueError as error:
            if "custom code" not in str(error):
                raise
        return Qwen2Tokenizer.from_pretrained(place, local_files_only=True, **revision)  # Dream's has Qwen2's form


def from_hub(name):
    """Return the tokenizer of transformers that a folder or hf://owner/name[@revision] has. Raises UserError."""
    require("transformers", f"the tokenizer of {name}")
    from huggingface_hub import snapshot_download
    on_hub = str(name).startswith("hf://")
    place, _, revision = str(name).removeprefix("hf://").partition("@") if on_hub else (str(name), "", "")
    try:
        try:
            found = read_tokenizer(place, revision=revision or "main")
        except Exception:
            if not on_hub:
                raise
            # not in the cache; AutoTokenizer would try each file for a minute if there is no network
            found = read_tokenizer(snapshot_download(place, revision=revision or "main",
                                                     allow_patterns=["*.json", "*.txt", "*.model"]))
        if found.backend_tokenizer.get_vocab_size() > len(found.all_special_ids):  # else it was made of no file
            return found
        raise FileNotFoundError
    except Exception as error:  # of many kinds: network, files, missing libraries
        kind = type(error).__name__
        if on_hub:
            raise UserError(f"the tokenizer of {name} is not in the Hub's cache and could not be downloaded ({kind}): "
                            "go online once, or name a folder with its files")
        raise UserError(f"{name} has no tokenizer that can be read ({kind}): its tokenizer.json, "
                        "tokenizer_config.json or config.json is missing or damaged: get them again")


def definition_of(tokenizer):
    """The tokenizer.json of a tokenizer, without truncation, padding and the special tokens around a text: a str."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(parts | {"truncation": None, "padding": None, "post_processor": None}, ensure_ascii=False)


def hub_meta(definition):
    """The meta of a HubTokenizer that leaves out the special tokens."""
    return {"tokenizer": "hf", "vocab_size": HubTokenizer(definition).vocab_size, "definition": definition}


def tokens_of_hub(name):
    """The meta of the tokens of a model in a folder or on the Hub: that of its checkpoint. Raises UserError."""
    from foreign.llm import is_llm, tokens_and_mask
    tokenizer, settings = from_hub(name), settings_of(name)
    return tokens_and_mask(settings, tokenizer, name)[0] if is_llm(settings) else hub_meta(definition_of(tokenizer))


def settings_of(name):
    """The config.json, a dict, of a folder or of hf://owner/name[@revision] in the Hub's cache; {} if there is none."""
    path = Path(name, "config.json")
    if str(name).startswith("hf://"):
        from huggingface_hub import try_to_load_from_cache
        place, _, revision = name.removeprefix("hf://").partition("@")
        path = try_to_load_from_cache(place, "config.json", revision=revision or "main")
        if not isinstance(path, str):
            return {}
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def size_of_bpe(name):
    """The number of tokens that `bpe:SIZE` asks for. Raises UserError if it is none of 257 ... 65,536."""
    size = re.fullmatch(r"bpe:(\d{3,5})", name, re.ASCII)
    if not size or not 257 <= int(size[1]) <= 65_536:
        raise UserError(f"--tokenizer {name}: write bpe:SIZE with a size of 257 to 65,536 tokens, such as bpe:4096")
    return int(size[1])


def short_words(text):
    """Cut a text into parts whose words have at most 1,000 characters, because the time of train_bpe is proportional to
    the square of a word's length."""
    return re.findall(r"\s*\S{1,1000}|\s+", text) if re.search(r"\S{1001}", text) else [text]


def train_bpe(texts, vocab_size):
    """The definition of a byte-level BPE (Sennrich et al., arXiv 1508.07909) of a few texts, as HubTokenizer reads it.

    It starts with 256 tokens, one for each byte, and merges the most frequent pair of neighbours into a new token until
    it has vocab_size of them. No token reaches from one word into the next; a space belongs to the word after it.
    """
    require("tokenizers", "a vocabulary of your own")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator((part for text in texts for part in short_words(text)), trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return bpe.to_str()


HUB = {"bert": "hf://google-bert/bert-base-uncased", "roberta": "hf://FacebookAI/roberta-base"}


def is_checkpoint(name):
    """Tell whether the NAME of --tokenizer is a file, as of a checkpoint, or a folder that train.py or checkpoint.py
    export has made."""
    path = Path(name)
    if name in ("char", "gpt2", *HUB):
        return False
    settings = path / "config.json"
    return path.is_file() or (path / "ckpt.pt").exists() or (
        settings.is_file() and "discrete-diffusion" in settings.read_text(encoding="utf-8", errors="replace"))


def tokens_of_checkpoint(path, items=False):
    """The meta of a checkpoint's tokens, to prepare a text for its fine-tuning, or items.

    Raises UserError for models of items, unless `items`."""
    from storage import read
    meta = read(path)["meta"]
    if "record" in meta and not items:
        raise UserError(f"{path} is a model of items of {meta['record']} tokens: prepare them with "
                        "data/prepare_names.py")
    return {key: meta[key] for key in TOKENS if key in meta}


def tokens_of(name, texts, items=False):
    """The meta of `--tokenizer NAME`: gpt2, bert, roberta, bpe:SIZE, a checkpoint, hf://owner/name or a folder.

    texts: a function that returns the texts of which bpe:SIZE is made. It is called for nothing else, and only after
    the name is checked. items: as for tokens_of_checkpoint. Raises UserError if there is no such tokenizer.
    """
    if is_checkpoint(name):
        return tokens_of_checkpoint(name, items)
    if name == "gpt2":
        return dict(KNOWN["openwebtext"])
    if name.startswith("bpe:"):
        size = size_of_bpe(name)
        meta = hub_meta(train_bpe(texts(), size))
        if meta["vocab_size"] < size:
            note(f"--tokenizer {name}: the text repeats so little that it gives no more than {meta['vocab_size']:,} "
                 "tokens")
        return meta
    if name not in HUB and not name.startswith("hf://") and not Path(name).is_dir():
        raise UserError(f"--tokenizer {name} cannot be used here: choose gpt2, {', '.join(HUB)}, one like bpe:4096 or "
                        "hf://owner/name, a folder or a checkpoint")
    return tokens_of_hub(HUB.get(name, name))


def describes_tokens(meta):
    """Tell whether the meta of a data set or checkpoint has all that make_tokenizer needs, with the right types."""
    if not isinstance(meta, dict):
        return False
    size, kind, alphabet, pad = (meta.get(key) for key in ("vocab_size", "tokenizer", "alphabet", "pad"))
    record = meta.get("record", 1)
    if type(size) is not int or size > 10**7 or not isinstance(kind, str):
        return False
    if type(record) is not int or not 1 <= record <= 10**7 or not isinstance(meta.get("request", {}), dict):
        return False
    if kind == "char":
        return (isinstance(alphabet, str) and len(alphabet) == len(set(alphabet)) == size >= 1
                and (pad is None or isinstance(pad, str) and len(pad) == 1 and pad in alphabet))
    if pad is not None or not isinstance(meta.get("alphabet", ""), str):
        return False
    if kind == "hf" and not (isinstance(meta.get("definition"), str) and type(meta.get("end", 0)) is int
                             and 0 <= meta.get("end", 0) < size):
        return False
    return size >= {"gpt2": 50257, "bert": 30521}.get(kind, 1) and isinstance(meta.get("characters", ""), str)


def make_tokenizer(meta, plain=False):
    """Return the tokenizer that the meta of a data set or checkpoint describes. Raises UserError if it is unknown.

    plain: read names of tokens in a text, such as <|endoftext|>, as text. Else large language models have their tokens.
    """
    if meta["tokenizer"] == "char":
        return CharTokenizer(meta["alphabet"], meta.get("pad"))
    if meta["tokenizer"] == "gpt2":
        return GPT2Tokenizer(meta["vocab_size"])
    if meta["tokenizer"] == "bert":
        mask = {103} if meta["vocab_size"] == 30521 else set()  # MDLM's models lack [MASK], UDLM's have it
        return HubTokenizer(definition_of(from_hub(HUB["bert"])), left_out=mask)
    if meta["tokenizer"] == "hf":
        tokenizer = HubTokenizer(meta["definition"], None, meta.get("characters"), meta.get("end"), plain)
        if tokenizer.vocab_size != meta["vocab_size"]:
            raise UserError(f"the definition of the tokenizer has {tokenizer.vocab_size:,} tokens, and the vocabulary "
                            f"beside it {meta['vocab_size']:,}: one of them is damaged")
        return tokenizer
    raise UserError(f"unknown tokenizer {meta['tokenizer']!r}; this version knows char, gpt2, bert and hf")


DIGITS = "zero one two three four five six seven eight nine".split()
SPELLED = str.maketrans({str(digit): f" {name} " for digit, name in enumerate(DIGITS)} | {"'": " ", "\u2019": " "})


def text8_words(text, spelled=False):
    """Return the words of an English text in a ... z, in lower case. All other characters become spaces.

    spelled: as in text8 itself, "don't" becomes "don t", and digits are spelled. Without it "don't" becomes "dont".
    """
    lower = text.lower().translate(SPELLED) if spelled else text.lower().replace("'", "").replace("\u2019", "")
    return "".join(c if "a" <= c <= "z" else " " for c in lower).split()
