"""data/: tokenizers, the prepare scripts on small local files in the real formats, crops and windows."""

import collections
import gzip
import hashlib
import io
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import storage
from cli import UserError
from commands import ROOT, assert_one_line, train
from conftest import TRAINED
from data import (
    prepare_openwebtext, prepare_pydoc, prepare_shakespeare, prepare_text8, prepare_textfile, prepare_wikitext,
)
from data.loader import (PIECE, SPLITS, check_same_data, gather, load_meta, load_split, prefetch, prepare_command,
                         random_crops, recode, subset, windows)
from data.prepare import DatasetWriter, is_prepared, read_text
from data.tokenizer import (
    KNOWN, TEXT8_ALPHABET, CharTokenizer, GPT2Tokenizer, HubTokenizer, byte_alphabet, characters, check_alphabet,
    make_tokenizer, short_words, text8_words, tokens_of,
)
from studies.quality import ids_of

META = {"tokenizer": "char", "alphabet": TEXT8_ALPHABET, "vocab_size": 27}


def prepare(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


def read(folder, split):
    meta = json.loads((folder / "meta.json").read_text())
    return make_tokenizer(meta).decode(np.fromfile(folder / f"{split}.bin", dtype=meta["dtype"]))


def words(n, seed=0):
    letters = random.Random(seed)
    return " ".join("".join(letters.choices("abcdefghij", k=4)) for _ in range(n))


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def test_text8_ids():
    """Space is 0, a is 1, z is 26; decode inverts encode."""
    tokenizer = CharTokenizer(TEXT8_ALPHABET)
    assert tokenizer.encode(" az").tolist() == [0, 1, 26]
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"


def test_a_character_outside_the_alphabet_is_named():
    with pytest.raises(UserError, match="'é' 'Ω' not in the alphabet"):
        CharTokenizer(TEXT8_ALPHABET).encode("caféΩ")
    with pytest.raises(UserError, match="write lower case letters and spaces"):
        check_alphabet("A", TEXT8_ALPHABET)
    with pytest.raises(UserError, match="'abc'$"):
        check_alphabet("x", "abc")


def test_lengths_of_characters():
    """One character each, and the bytes of UTF-8; the pad has none."""
    assert (CharTokenizer("aé·", "·").unit, CharTokenizer("aé").unit) == ("token", "char")  # a pad is no character
    assert [x.tolist() for x in CharTokenizer("aé·", "·").lengths()] == [[1, 1, 0], [1, 2, 0]]


def test_text8_words():
    """Lower case, apostrophes vanish, all else is a space."""
    assert text8_words("Don't, can\u2019t -- Stop\n2 times, café!") == ["dont", "cant", "stop", "times", "caf"]
    assert text8_words("Don\u2019t stop 20\ntimes", spelled=True) == ["don", "t", "stop", "two", "zero", "times"]


def test_recode():
    """Data whose symbols a checkpoint knows comes in its ids, the same text; with other symbols it is refused."""
    text, ascii_meta = "a cat", {"tokenizer": "char", "alphabet": "".join(map(chr, range(1, 128))), "vocab_size": 127}
    ids = make_tokenizer(META).encode(text)
    assert make_tokenizer(ascii_meta).decode(recode(ids, META, ascii_meta, "x")) == text
    assert recode(ids, META, dict(META, name="other"), "x") is ids
    with pytest.raises(UserError, match="characters outside the checkpoint's alphabet"):
        recode(ids, ascii_meta, META, "x")
    gpt2, padded = ({"tokenizer": "gpt2", "vocab_size": size} for size in (50257, 50258))
    assert recode(ids, gpt2, padded, "x") is ids
    for data, model in ((padded, gpt2), (gpt2, META), (META, gpt2)):
        with pytest.raises(UserError, match="choose another with --dataset"):
            recode(ids, data, model, "x")


def test_bpe_merges_the_most_frequent_pair():
    """Every merge of bpe:SIZE joins a pair of neighbours that no other pair within words exceeds in number. The 256
    characters of bytes are the library's."""
    from tokenizers import pre_tokenizers
    text = words(400) + " " + words(300, seed=1)[::-1] + " caf\u00e9"
    meta = tokens_of("bpe:300", lambda: [text[:900], text[900:]])
    letters = {byte: character for character, byte in byte_alphabet().items()}
    assert sorted(letters) == list(range(256)) and {*letters.values()} == {*pre_tokenizers.ByteLevel.alphabet()}
    pieces = [[letters[byte] for byte in word.encode()] for part in (text[:900], text[900:])
              for word in re.findall(" ?[^ ]+", part)]
    merges = json.loads(meta["definition"])["model"]["merges"]
    assert len(merges) == 300 - 256
    for one, two in merges:
        counts = collections.Counter(pair for word in pieces for pair in zip(word, word[1:]))
        assert counts[one, two] == max(counts.values())
        for i, word in enumerate(pieces):
            merged = []
            for piece in word:  # from the left, as in the paper
                if merged and (merged[-1], piece) == (one, two):
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces[i] = merged
    tokenizer = make_tokenizer(meta)
    ids = tokenizer.encode(text)
    assert meta["vocab_size"] == 300 and tokenizer.decode(ids) == text and ids.max() >= 256
    characters, n_bytes = tokenizer.lengths()
    assert (characters[ids].sum(), n_bytes[ids].sum()) == (len(text), len(text.encode()))
    assert tokens_of("bpe:300", lambda: [text[:900], text[900:]]) == meta
    strange = "\u03a9\n\t 12 \U0001f600"  # not in the text: bytes
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


def test_bpe_of_long_words():
    """Words of more than 1,000 characters are cut; other texts stay whole."""
    text, long = "some  words\n\n in a row " * 50, "acgt" * 600
    assert short_words(text) == [text]
    parts = short_words(f"{text}\n{long} end ")
    assert "".join(parts) == f"{text}\n{long} end "
    assert max(len(part.strip()) for part in parts) == 1000
    assert [part for part in parts if "word" in part][:2] == ["  words"] * 2


def test_added_tokens_have_their_characters():
    """Tokens that were added to a byte-level BPE, such as runs of spaces, stand in it as they are."""
    from tokenizers import Tokenizer
    made = Tokenizer.from_str(tokens_of("bpe:300", lambda: [words(500)])["definition"])
    n = made.get_vocab_size()
    made.add_tokens(["    ", "        "])
    tokenizer = HubTokenizer(made.to_str())
    text = "def f(x):\n        return     x"
    ids = tokenizer.encode(text)
    assert ids.max() >= n and tokenizer.decode(ids) == text
    assert [lengths[ids].sum() for lengths in tokenizer.lengths()] == [len(text)] * 2


@pytest.mark.parametrize("size", ["", "256", "65537", "4k", "-300"])
def test_bpe_of_no_size(size):
    """It is refused before any text is read or downloaded."""
    with pytest.raises(UserError, match=f"--tokenizer bpe:{size}: write bpe:SIZE with a size of 257 to 65,536"):
        tokens_of(f"bpe:{size}", lambda: pytest.fail("the text was read"))


def test_padding_of_gpt2_is_no_text(gpt2):
    """Tokens beyond end-of-text decode to nothing and have no length."""
    tokenizer = GPT2Tokenizer(50258)
    ids = [*tokenizer.encode("a cat").tolist(), 50257]
    assert tokenizer.decode(ids) == "a cat"
    chars, sizes = tokenizer.lengths()
    assert len(chars) == 50258 and chars[ids].sum() == 5 and sizes[50257] == 0


def test_no_gpt2_vocabulary_is_one_line(monkeypatch, tmp_path):
    """Without network and cache, tiktoken's failure becomes a UserError that says what to do."""
    import tiktoken
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(UserError, match="TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


# ---- prepare scripts -------------------------------------------------------------------------------------------------


def test_pydoc(monkeypatch, tmp_path):
    """A million characters of English in 27 symbols, split 80/10/10; the splits share next to no phrase of 8 words."""
    prepare(monkeypatch, prepare_pydoc, "--data_dir", tmp_path)
    text = {split: read(tmp_path / "pydoc", split) for split in ("train", "val", "test")}
    total = sum(map(len, text.values()))
    assert total > 1_000_000 and set(text["train"]) == set(TEXT8_ALPHABET) and "  " not in text["train"]
    assert 0.78 < len(text["train"]) / total < 0.82 and 0.08 < len(text["test"]) / total < 0.12
    assert text["train"].count(" the ") > 5000 and " self " not in text["train"][:2000]

    def phrases(split):
        w = text[split].split()
        return {tuple(w[i:i + 8]) for i in range(len(w) - 7)}

    for a, b in (("test", "train"), ("val", "train"), ("test", "val")):
        assert len(phrases(a) & phrases(b)) < 0.02 * len(phrases(a))
    before = (tmp_path / "pydoc" / "train.bin").stat().st_mtime_ns
    prepare(monkeypatch, prepare_pydoc, "--data_dir", tmp_path)  # a second time is a no-op
    assert (tmp_path / "pydoc" / "train.bin").stat().st_mtime_ns == before


def test_text8(monkeypatch, tmp_path):
    """A zip like the original becomes splits of 90, 5 and 5 %, in uint8. Another file is refused by its checksum."""
    text = words(2000)[:10_000 - 1] + " "
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("text8", text)
    (tmp_path / "text8.zip").write_bytes(buffer.getvalue())
    arguments = ("--file", tmp_path / "text8.zip", "--data_dir", tmp_path)
    with pytest.raises(UserError, match="is not the expected file"):
        prepare(monkeypatch, prepare_text8, *arguments)
    monkeypatch.setattr(prepare_text8, "SHA256", hashlib.sha256(buffer.getvalue()).hexdigest())
    prepare(monkeypatch, prepare_text8, *arguments)
    folder = tmp_path / "text8"
    assert ([len(read(folder, split)) for split in ("train", "val", "test")]
            == [9 * len(text) // 10, *[len(text) // 20] * 2])
    assert read(folder, "train") + read(folder, "val") + read(folder, "test") == text
    meta = load_meta("text8", tmp_path)
    assert meta["dtype"] == "uint8" and meta["sizes"]["train"] == 9 * len(text) // 10
    assert meta["sha256"]["val"] == hashlib.sha256((folder / "val.bin").read_bytes()).hexdigest()


def test_shakespeare(monkeypatch, tmp_path):
    text = "To be, or not to be:\n" * 100
    (tmp_path / "input.txt").write_text(text)
    monkeypatch.setattr(prepare_shakespeare, "SHA256", hashlib.sha256(text.encode()).hexdigest())
    prepare(monkeypatch, prepare_shakespeare, "--file", tmp_path / "input.txt", "--data_dir", tmp_path)
    folder = tmp_path / "shakespeare"
    assert read(folder, "train") + read(folder, "val") + read(folder, "test") == text
    assert load_meta("shakespeare", tmp_path)["vocab_size"] == len(set(text))
    prepare(monkeypatch, prepare_shakespeare, "--file", tmp_path / "input.txt", "--data_dir", tmp_path,
            "--alphabet", "text8")
    folder = tmp_path / "shakespeare27"
    assert (read(folder, "train") + read(folder, "val") + read(folder, "test")
            == " ".join(["to be or not to be"] * 100)) and load_meta("shakespeare27", tmp_path)["vocab_size"] == 27


def test_no_network_is_one_line(monkeypatch, tmp_path):
    """A failed download names the URL and --file, and leaves nothing behind."""
    monkeypatch.setattr(prepare_text8, "URL", "http://127.0.0.1:9/text8.zip")
    with pytest.raises(UserError, match="could not download http://127.0.0.1:9/text8.zip .* --file PATH"):
        prepare(monkeypatch, prepare_text8, "--data_dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_textfile(monkeypatch, tmp_path):
    """Plain, .gz and .xz files are joined; 90/5/5; the alphabet is the text's own."""
    parts = ["Alpha, beta.\n" * 50, "Gamma delta!\n" * 50, "äöü\n" * 50]
    (tmp_path / "a.txt").write_text(parts[0])
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(parts[1][:-1].encode()))  # its last line has no end, and gets one
    (tmp_path / "c.txt.xz").write_bytes(lzma.compress(parts[2].encode()))
    prepare(monkeypatch, prepare_textfile, tmp_path / "a.txt", tmp_path / "b.txt.gz", tmp_path / "c.txt.xz",
            "--name", "mine", "--data_dir", tmp_path)
    folder, text = tmp_path / "mine", "".join(parts)
    assert read(folder, "train") + read(folder, "val") + read(folder, "test") == text
    assert load_meta("mine", tmp_path)["alphabet"] == "".join(sorted(set(text)))
    sizes = load_meta("mine", tmp_path)["sizes"]
    assert sizes["train"] == round(0.9 * len(text)) and abs(sizes["val"] - sizes["test"]) <= 1


def test_textfile_with_its_own_splits(monkeypatch, tmp_path):
    """--val and --test are used as they are; --alphabet text8 normalises all three."""
    for name, text in (("train", "Yes, it IS."), ("val", "No, it isn't!"), ("test", "Maybe 7")):
        (tmp_path / f"{name}.txt").write_text(text)
    prepare(monkeypatch, prepare_textfile, tmp_path / "train.txt", "--val", tmp_path / "val.txt", "--test",
            tmp_path / "test.txt", "--name", "mine", "--alphabet", "text8", "--data_dir", tmp_path)
    assert [read(tmp_path / "mine", s) for s in ("train", "val", "test")] == ["yes it is", "no it isnt", "maybe"]


def test_textfile_in_the_tokens_of_a_checkpoint(call, trained, tmp_path, monkeypatch):
    """A checkpoint of any kind of tokens gives them; one of letters gets letters. Fine-tuning takes the data set."""
    (tmp_path / "a.txt").write_text("The cat's 3 mats!\n" * 100)
    prepare = lambda name, tokens: call("data/prepare_textfile.py", tmp_path / "a.txt", "--name", name, "--data_dir",
                                        tmp_path, "--tokenizer", tokens)
    for name, tokens in (("letters", trained), ("file", trained / "ckpt.pt"), ("bpe", ROOT / "pretrained/prose")):
        result = prepare(name, tokens)
        assert result.code == 0 and "converted into a ... z and spaces" in result.err
        meta, known = load_meta(name, tmp_path), storage.read(tokens)["meta"]
        assert all(meta.get(key) == known.get(key) for key in ("tokenizer", "alphabet", "vocab_size", "definition"))
        assert read(tmp_path / name, "train").startswith("the cats mats the cats")
    assert train(call, "mdlm_text8", tmp_path, tmp_path / "out", *TRAINED, "--max_steps=1", "--dataset=letters",
                 "--init_from", trained).code == 0
    assert_one_line(prepare("no", tmp_path / "a.txt"), "a.txt")
    assert_one_line(prepare("no", tmp_path), "has no tokenizer that can be read")
    items = storage.read(trained)
    items["meta"]["record"] = 8
    storage.save(tmp_path / "items.pt", items)
    assert_one_line(prepare("no", tmp_path / "items.pt"), "is a model of items of 8 tokens")
    (tmp_path / "a.txt").write_text("1 + 2 = 3\n" * 100)
    assert_one_line(prepare("no", trained), "no letters from a to z: choose another --tokenizer")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "char").touch()  # the kind of tokens is meant, not this file
    assert prepare("plain", "char").code == 0
    assert_one_line(call("data/prepare_textfile.py", tmp_path, "--name=no"), "is a folder: name its files")


@pytest.mark.parametrize("text", ["one two three four " * 400, "\n".join(["a line of words " * 200] * 3) + "\n"])
def test_tokens_of_few_lines(monkeypatch, tmp_path, text):
    """Splits of a text without lines, or with a few, begin with a word."""
    (tmp_path / "a.txt").write_text(text)
    prepare(monkeypatch, prepare_textfile, tmp_path / "a.txt", "--name", "mine", "--tokenizer", "bpe:300", "--data_dir",
            tmp_path)
    sizes = load_meta("mine", tmp_path)["bytes"]
    assert sum(sizes.values()) == len(text) and all(0.02 < sizes[split] / len(text) < 0.1 for split in ("val", "test"))
    assert all(read(tmp_path / "mine", split)[0] in " a" for split in ("val", "test"))


def test_encoding_in_pieces(monkeypatch):
    """A text in WikiText's form, whose lines begin and end with a space, is encoded in pieces; so is any other one."""
    for text in (" = Title = \n \n A line of text . \n Another one . \n" * 30, "A line.\n\n  Indented.\nOne.\n" * 30):
        tokenizer = make_tokenizer(tokens_of("bpe:300", lambda: [text]))
        whole, calls, real = tokenizer.encode(text).tolist(), [], tokenizer.encode
        monkeypatch.setattr(tokenizer, "encode", lambda piece: calls.append(piece) or real(piece), raising=False)
        monkeypatch.setattr(prepare_textfile, "CHUNK", 100)
        assert prepare_textfile.encode(text, tokenizer).tolist() == whole
        assert len(calls) > 5 and "".join(calls) == text


def test_xz_of_several_files(tmp_path):
    """Files that were joined are all read; one that is damaged, or something else behind it, is noticed."""
    one, two = (lzma.compress(part.encode() * 3000) for part in ("first ", "second "))
    (tmp_path / "a.xz").write_bytes(one + bytes(8) + two)
    assert read_text(tmp_path / "a.xz") == "first " * 3000 + "second " * 3000
    wrong = bytearray(one + two)
    wrong[len(one) + 40] ^= 1
    for content in (wrong, one + two[:-9], one + b"something else", one[:-9]):
        (tmp_path / "a.xz").write_bytes(content)
        with pytest.raises(UserError, match="is not a complete compressed file"):
            read_text(tmp_path / "a.xz")


def test_a_data_set_on_another_disk(monkeypatch, tmp_path):
    """Its folder may be a link, which stays one."""
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    (tmp_path / "mine").symlink_to(tmp_path / "disk" / "mine")
    (tmp_path / "a.txt").write_text("some words " * 100)
    prepare(monkeypatch, prepare_textfile, tmp_path / "a.txt", "--name", "mine", "--data_dir", tmp_path)
    assert (tmp_path / "mine").is_symlink() and load_meta("mine", tmp_path)["sizes"]["train"] == 990
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["mine"]


def test_another_command_was_faster(tmp_path):
    """A data set that another command makes in the meantime stays, and no temporary file is left."""
    with pytest.raises(UserError, match="perhaps because another command made it meanwhile"):
        with DatasetWriter(tmp_path / "mine", characters("ab")) as writer:
            for split in ("train", "val", "test"):
                writer.append(split, [0, 1], 2)
            (tmp_path / "mine").mkdir()
            (tmp_path / "mine" / "meta.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "meta.json"]


def test_byte_order_mark(tmp_path):
    """The mark that some editors put before a text is no text."""
    (tmp_path / "a.txt").write_bytes("\ufeffwords".encode())
    assert read_text(tmp_path / "a.txt") == "words"


@pytest.mark.parametrize("name, command", [
    ("shakespeare27", "shakespeare.py --alphabet text8"), ("wikitext103", "wikitext.py --large"),
    ("wikitext103_bert", "wikitext.py --large --tokenizer bert"), ("pydoc_gpt2", "pydoc.py --tokenizer gpt2"),
    ("gutenberg_bpe4096", "gutenberg.py --tokenizer bpe:4096"), ("gutenberg_bert", "gutenberg.py --tokenizer bert"),
    *((name, f"{name}.py") for name in (
        "gutenberg", "names", "openwebtext", "pydoc", "shakespeare", "text8", "wikitext")),
    *((name, f"textfile.py FILE --name {name}") for name in (
        "mine", "names_mine", "text8_gpt2", "pydoc_mine", "textfile", "textfile_x", "pydoc_bpe4096"))])
def test_prepare_command(name, command):
    """Each name of a data set has the command that makes it."""
    assert prepare_command(name) == f"python data/prepare_{command}"
    if name == "mine":
        assert prepare_command("my book") == "python data/prepare_textfile.py FILE --name 'my book'"
        assert prepare_command(name, {"record": 32}) == "python data/prepare_names.py --file FILE --name mine"
        asked = {"files": ["a"], "val and test": ["b", "c"], "tokenizer": "bpe:300", "alphabet": "own"}
        assert prepare_command(name, {"request": asked}) == (
            "python data/prepare_textfile.py FILE --name mine --tokenizer bpe:300 --val FILE --test FILE")
        asked = {"files": ["a"], "val and test": [], "tokenizer": "char", "alphabet": "text8"}
        assert prepare_command(name, {"request": asked}) == (
            "python data/prepare_textfile.py FILE --name mine --alphabet text8")


@pytest.mark.parametrize("damage", [b"", b"\xff" * 12])
def test_a_damaged_archive(tmp_path, damage):
    """Cut off, or garbled inside, where gzip says it in another way: one line."""
    packed = gzip.compress(b"some words, some other words")
    (tmp_path / "a.gz").write_bytes(packed[:10] + damage + packed[22:] if damage else packed[:-9])
    with pytest.raises(UserError, match="a.gz is not a complete compressed file"):
        read_text(tmp_path / "a.gz")


def test_a_name_that_is_taken(call, tmp_path):
    """The same command again is fine. Other texts or other tokens under the same name are refused."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("some words, and then some other words. " * 100)
    prepare = lambda file, *more: call(
        "data/prepare_textfile.py", tmp_path / file, "--name", "x", "--data_dir", tmp_path, *more)
    assert prepare("a.txt").code == 0 and prepare("a.txt").code == 0
    assert_one_line(prepare("b.txt"), "prepared with files a.txt (3,900 bytes, SHA-256 ")
    assert_one_line(prepare("a.txt", "--alphabet", "text8"), "already prepared with alphabet own, not text8: choose")
    assert_one_line(prepare("a.txt", "--tokenizer", "bpe:300"), "tokenizer char, not bpe:300: choose another --name")
    assert_one_line(prepare("a.txt", "--tokenizer", "bpe:x"), "write bpe:SIZE")
    assert_one_line(prepare("a.txt", "--val", tmp_path / "b.txt", "--test", tmp_path / "b.txt"),
                    "with val and test none, not b.txt (3,900 bytes, SHA-256 ")
    (tmp_path / "a.txt").write_text("other words, and then some words again. " * 97 + " " * 20)
    assert_one_line(prepare("a.txt"), "with files a.txt (3,900 bytes, SHA-256 ", ", not a.txt (3,900 bytes, SHA-256 ")


def test_other_files_under_a_fixed_name(call, tmp_path):
    """Scripts without --name refuse other files, too; a call that names none is content with what is there."""
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text(f"some words of {name}\n" * 50)
    prepare = lambda *files: call("data/prepare_wikitext.py", "--tokenizer", "bpe:300", "--data_dir", tmp_path,
                                  *(["--file", *(tmp_path / f"{name}.txt" for name in files)] if files else []))
    assert prepare(*"abc").code == prepare(*"abc").code == prepare().code == 0
    assert_one_line(prepare(*"abd"), "already prepared with files a.txt", "choose another --data_dir, or delete it")
    assert_one_line(prepare(*"abx"), "cannot read", "No such file")


def test_the_same_command_again(call, tmp_path):
    """A text too small for so many tokens of a BPE has fewer, and the same command is fine all the same."""
    (tmp_path / "a.txt").write_text("some words\n" * 200)
    command = ["data/prepare_textfile.py", tmp_path / "a.txt", "--name", "x", "--data_dir", tmp_path, "--tokenizer"]
    for _ in range(2):
        assert call(*command, "bpe:2000").code == 0
    assert json.loads((tmp_path / "x" / "meta.json").read_text())["vocab_size"] < 2000
    assert_one_line(call(*command, "bpe:1000"), "with tokenizer bpe:2000, not bpe:1000")


def test_textfile_bpe(monkeypatch, tmp_path):
    """The vocabulary is made of the text to train on alone; the data set has a copy of it."""
    lines = [words(20, seed=i) for i in range(100)]
    text = "\n".join(lines[:90] + ["zebra " * 16] * 10)
    (tmp_path / "a.txt").write_text(text)
    prepare(monkeypatch, prepare_textfile, tmp_path / "a.txt", "--name", "mine", "--tokenizer", "bpe:300",
            "--data_dir", tmp_path)
    meta = load_meta("mine", tmp_path)
    parts = [read(tmp_path / "mine", split) for split in ("train", "val", "test")]
    assert "".join(parts) == text and sum(meta["bytes"].values()) == len(text)
    expected = tokens_of("bpe:300", lambda: parts[:1])
    assert {key: meta[key] for key in ("tokenizer", "vocab_size", "definition")} == expected
    assert meta["definition"] != tokens_of("bpe:300", lambda: [text])["definition"]


@pytest.mark.parametrize("content, message", [
    (b"", "contains no text"), (b" \n", "contains no text"), (b"abc\xff", "not UTF-8"), (b"a", "use a longer text"),
    (None, "cannot read"),
])
def test_textfile_bad_input(monkeypatch, tmp_path, content, message):
    """Empty, non-text, too short and missing files: one line, and no data set is left behind."""
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        prepare(monkeypatch, prepare_textfile, tmp_path / "a.txt", "--name", "mine", "--data_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "txt"])
def test_openwebtext(monkeypatch, tmp_path, gpt2, kind):
    """Local files in the real formats: every document once, then end-of-text; copies of a document in one split."""
    from datasets import Dataset
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = [f"Document {i}: {words(20, seed=i)}" for i in range(300)] + ["A copy of the same page."] * 20
    path = tmp_path / f"docs.{kind}"
    if kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        path.write_text("".join((json.dumps({"text": t}) if kind == "jsonl" else t) + "\n" for t in texts))
    monkeypatch.setattr(prepare_openwebtext, "BATCH", 16)
    prepare(monkeypatch, prepare_openwebtext, "--file", path, "--num_proc", 2, "--held_out", 0.1,
            "--data_dir", tmp_path)
    found = {split: read(tmp_path / "openwebtext", split).split("<|endoftext|>") for split in ("train", "val", "test")}
    assert all(documents.pop() == "" for documents in found.values())
    assert sorted(sum(found.values(), [])) == sorted(texts)
    assert sum("A copy of the same page." in documents for documents in found.values()) == 1
    assert 15 <= len(set(found["val"])) <= 50 and 15 <= len(set(found["test"])) <= 50


def test_documents_of_your_own(call, monkeypatch, tmp_path, gpt2):
    """--name makes another data set of documents, which knows its command; few held-out documents are announced. The
    other commands do not take JSON for text."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": f"Document {i}"}) + "\n" for i in range(100)))
    go = lambda *flags: call("data/prepare_openwebtext.py", "--num_proc=1", "--data_dir", tmp_path, *flags)
    assert_one_line(go("--name=docs"), "name their files with --file")
    assert_one_line(go("--name=a/b", "--file", path), "is not a valid folder name")
    result = go("--name=docs", "--file", path, "--held_out=0.2")
    assert result.code == 0 and "val and test get about 20 of the 100 documents each" in result.err
    few = go("--name=few", "--file", path)
    assert few.code == 2 and "split would be empty: use a longer text, or a larger --held_out" in few.err
    assert load_meta("docs", tmp_path)["name"] == "docs"
    command = prepare_command("docs", load_meta("docs", tmp_path))
    assert command == "python data/prepare_openwebtext.py --file FILE --name docs --held_out 0.2"
    assert_one_line(go("--name=docs", "--file", path, "--held_out=0.1"), "already prepared with held_out 0.2, not 0.1")
    with pytest.raises(UserError, match="or a larger text, or a larger --held_out"):
        load_split("docs", "val", 10**5, tmp_path)
    for name in ("a.JSON", "a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).touch()
        assert_one_line(call("data/prepare_textfile.py", tmp_path / name, "--name=b", "--data_dir", tmp_path),
                        f"{tmp_path / name} has JSON, whose keys and braces are no text")


def test_openwebtext_of_damaged_files(call, monkeypatch, tmp_path, gpt2):
    """A cut or empty file is one line; a document without a text is left out."""
    import datasets
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and not much more")
    (tmp_path / "a.jsonl").write_text("")
    go = lambda file: call("data/prepare_openwebtext.py", "--file", tmp_path / file, "--data_dir", tmp_path)
    for file in ("a.parquet", "a.jsonl"):
        result = go(file)
        assert_one_line(result, f"could not load {tmp_path / file} (")
    assert_one_line(go(""), "is a folder: name its files")
    assert not (tmp_path / "openwebtext").exists()
    prepare_openwebtext.start_worker(KNOWN["openwebtext"], 0.0)
    (tokens, n_bytes), = prepare_openwebtext.encode(["\ufeffone", None, "two", ""]).values()
    assert gpt2.decode(tokens) == "one<|endoftext|>two<|endoftext|>" and n_bytes == 6
    (tmp_path / "numbers.jsonl").write_text('{"text": 123}\n')
    assert_one_line(go("numbers.jsonl"), "has values of type int64, and not text")
    datasets.Dataset.from_dict({"text": [123]}).to_parquet(tmp_path / "n.parquet")
    assert_one_line(call("data/prepare_wikitext.py", "--data_dir", tmp_path, "--file", *[tmp_path / "n.parquet"] * 3),
                    "has values of type int64, and not text")


def test_openwebtext_of_odd_names(call, monkeypatch, tmp_path, gpt2):
    """Brackets in a file's name are not read as a pattern of names."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name, word in (("a1.txt", "other"), ("a[1].txt", "mine")):
        (tmp_path / name).write_text("".join(f"{word} {i}\n" for i in range(60)))
    assert call("data/prepare_openwebtext.py", "--file", tmp_path / "a[1].txt", "--data_dir", tmp_path, "--num_proc=1",
                "--held_out=0.2").code == 0
    assert "mine" in read(tmp_path / "openwebtext", "train") and "other" not in read(tmp_path / "openwebtext", "train")


def die(meta, share):
    os._exit(1)


def test_openwebtext_without_its_workers(monkeypatch, tmp_path, gpt2):
    """Processes that end, as for lack of memory, end the command, and nothing is left."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "a.txt").write_text("some text\n" * 60)
    monkeypatch.setattr(prepare_openwebtext, "start_worker", die)
    with pytest.raises(UserError, match="a process ended, perhaps for lack of memory"):
        prepare(monkeypatch, prepare_openwebtext, "--file", tmp_path / "a.txt", "--data_dir", tmp_path / "data",
                "--num_proc", 1)
    assert list((tmp_path / "data").iterdir()) == []


def test_openwebtext_on_a_full_disk(monkeypatch, tmp_path, gpt2):
    """The documents that still wait when one cannot be written are not encoded."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "a.txt").write_text("some text\n" * 8)
    encoded = []

    def encode(texts):
        encoded.append(texts)
        time.sleep(0.1)
        return {"train": ([0], 1)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_openwebtext, "ProcessPoolExecutor",
                        lambda n, context, *start: ThreadPoolExecutor(n, "", *start))
    monkeypatch.setattr(prepare_openwebtext, "encode", encode)
    monkeypatch.setattr(prepare_openwebtext, "BATCH", 1)
    monkeypatch.setattr(DatasetWriter, "append", full)
    with pytest.raises(UserError, match="No space left on device; nothing of it was kept"):
        prepare(monkeypatch, prepare_openwebtext, "--file", tmp_path / "a.txt", "--data_dir", tmp_path, "--num_proc", 1)
    assert len(encoded) < 5


def test_splits_of_wikitext(monkeypatch):
    """Each split is that of its authors: what is `validation` on the Hub is our val."""
    def load(files, source, name, split):
        return {"text": [f"{source} {name} ", None, split]}

    monkeypatch.setattr(prepare_wikitext, "load_documents", load)
    for large, name in ((False, "wikitext-2-raw-v1"), (True, "wikitext-103-raw-v1")):
        assert dict(zip(SPLITS, prepare_wikitext.texts(large, None))) == {
            ours: f"Salesforce/wikitext {name} {theirs}"
            for ours, theirs in (("train", "train"), ("val", "validation"), ("test", "test"))}


def test_line_ends_of_windows(call, tmp_path):
    """Both characters are kept, and a line says so."""
    (tmp_path / "w.txt").write_bytes(b"one line\r\nand another\r\n" * 20)
    result = call("data/prepare_textfile.py", tmp_path / "w.txt", "--name", "w", "--data_dir", tmp_path)
    assert result.code == 0 and "Windows' line ends, \\r\\n, and both characters are kept" in result.err
    assert "\r\n" in read(tmp_path / "w", "train")


def test_end_of_text_is_one_token(gpt2):
    """Decoding and encoding keeps end-of-text as one token. In a text of the user's the same letters are letters."""
    tokens = [*gpt2.encode("a b"), gpt2.end, *gpt2.encode("c")]
    assert gpt2.encode_decoded(gpt2.decode(tokens)).tolist() == tokens == ids_of(gpt2.decode(tokens), gpt2)
    assert len(gpt2.encode(gpt2.decode(tokens))) > len(tokens) and gpt2.vocab_size == gpt2.end + 1
    assert gpt2.encode("a").dtype == np.uint16


def test_an_interrupted_write_leaves_nothing(tmp_path):
    """An exception while a data set is written removes the temporary folder; the data set's name never appears."""
    with pytest.raises(KeyboardInterrupt):
        with DatasetWriter(tmp_path / "mine", META) as writer:
            writer.append("train", [1, 2, 3], 3)
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_way_is_found_before_the_work(tmp_path):
    """A folder of the data set's name that is none is refused at the start, and stays as it is."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "book.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is not a data set"), DatasetWriter(tmp_path / "mine", META):
        raise AssertionError("started to write")
    assert (tmp_path / "mine" / "book.txt").read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


# ---- loader ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path):
    with DatasetWriter(tmp_path / "small", META) as writer:
        for split, n in (("train", 27), ("val", 20), ("test", 7)):
            writer.append(split, np.arange(n), n)
    return tmp_path


def test_a_data_set_has_the_name_of_its_folder(small):
    assert load_meta("small", small)["name"] == "small"


def test_crops_reach_every_position(small):
    """Crops are consecutive tokens, start everywhere, reach the last window and depend on (seed, step, index) alone."""
    tokens = load_split("small", "train", 8, small)
    x0 = random_crops(tokens, 8, seed=0, step=0, indices=range(2000))
    assert (x0.diff(dim=1) == 1).all() and set(x0[:, 0].tolist()) == set(range(27 - 8 + 1))
    assert (x0[[5, 900]] == random_crops(tokens, 8, seed=0, step=0, indices=[5, 900])).all()
    assert (x0 != random_crops(tokens, 8, seed=0, step=1, indices=range(2000))).any()


def test_windows_tile_the_split(small):
    """Windows do not overlap and cover all but a shorter remainder; a limit takes them evenly, ends included. The files
    are open to read alone."""
    tokens = load_split("small", "val", 6, small)
    assert not tokens.flags.writeable
    assert windows(tokens, 6).tolist() == [0, 6, 12]
    assert windows(load_split("small", "test", 7, small), 7).tolist() == [0]  # a split of one window
    assert gather(tokens, windows(tokens, 5), 5).flatten().tolist() == list(range(20))
    assert (windows(np.zeros(1000), 10, limit=3).tolist() == [0, 500, 990]
            and len(windows(np.zeros(1000), 10, 500)) == 100)


def test_missing_and_damaged_data_sets(small):
    """Each names the command or the folder to delete."""
    with pytest.raises(UserError, match="run python data/prepare_text8.py"):
        load_split("text8", "train", 8, small)
    with pytest.raises(UserError, match="run python data/prepare_pydoc.py --tokenizer gpt2"):
        load_meta("pydoc_gpt2", small)
    with pytest.raises(UserError, match="run python data/prepare_gutenberg.py --tokenizer bpe:4096"):
        load_meta("gutenberg_bpe4096", small)
    with pytest.raises(UserError, match=f"prepare_textfile.py FILE --name nothing --data_dir {small}, or name"):
        load_meta("nothing", small)
    with pytest.raises(UserError, match="7 tokens, fewer than one sequence of 8: use --seq_len=7"):
        load_split("small", "test", 8, small)
    (small / "small" / "val.bin").write_bytes(bytes([5] * 19 + [27]))
    with pytest.raises(UserError, match="val.bin is damaged, it has tokens that are not in its vocabulary"):
        load_split("small", "val", 2, small)
    (small / "small" / "val.bin").write_bytes(b"123")
    with pytest.raises(UserError, match="3 tokens and its meta.json says 20"):
        load_split("small", "val", 2, small)
    meta = json.loads((small / "small" / "meta.json").read_text())
    for content in (b"{", b"[]", b"{}", b"\xff\xfe", b'{"vocab_size": 27}',
                    b"[" * 20_000, *(json.dumps(meta | change).encode() for change in (
                        {"dtype": "float64"}, {"sizes": meta["sizes"] | {"val": "x"}}, {"bytes": 5}, {"record": None},
                        {"bytes": dict.fromkeys(SPLITS)}, {"request": 5}, {"tokenizer": "hf", "pad": "x"},
                        {"alphabet": list(meta["alphabet"])}))):
        (small / "small" / "meta.json").write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            load_meta("small", small)
    with pytest.raises(UserError, match="is damaged"):
        is_prepared(small / "small")
    check_same_data(meta, dict(meta), "small", "a run")
    with pytest.raises(UserError, match="'small' is not the same as that of a run"):
        check_same_data(meta, meta | {"sha256": {}}, "small", "a run")


def test_prefetch():
    """Order is kept, errors surface in the caller, and leaving early ends the thread."""
    assert list(prefetch(iter(range(20)))) == list(range(20))

    def failing():
        yield 1
        raise ValueError("broken")

    stream = prefetch(failing())
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)
    threads = {*threading.enumerate()}
    endless = prefetch(iter(int, 1))
    assert next(endless) == 0
    [thread] = {*threading.enumerate()} - threads
    endless.close()
    assert not thread.is_alive()


def test_subset():
    """A fixed part: n tokens in pieces without overlap, from all over the split, the last token among them."""
    tokens = np.arange(10**6)
    for n in (5, 20_000, 10**5, 10**6 - 3, 10**6):
        part = subset(tokens, n)
        assert len(part) == n and len(set(part.tolist())) == n and (np.diff(part) > 0).all()
        assert (part == subset(tokens, n)).all() and (n < 20_000 or part[0] == 0 and part[-1] == 10**6 - 1)
    assert subset(tokens, 0) is tokens
    starts = subset(tokens, 10**5)[::PIECE]
    assert np.diff(starts).max() < 1.01 * np.diff(starts).min() + PIECE
    for n, size, kept in ((10**4, 32, 700), (3001, 48, 900)):  # 48 does not divide a piece
        items = subset(np.repeat(np.arange(n), size), size * kept, record=size).reshape(-1, size)
        assert (items == items[:, :1]).all() and items[0, 0] == 0 and items[-1, 0] == n - 1  # no item is cut
    with pytest.raises(UserError, match="more than the 1,000,000 tokens"):
        subset(tokens, 10**6 + 1)


def test_sigterm_leaves_nothing_half_written(tmp_path):
    """A command that gets SIGTERM while it prepares a data set removes the folder that it has begun."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from cli import run
from data.prepare import DatasetWriter

def main():
    with DatasetWriter({str(tmp_path / "new")!r}, {{"vocab_size": 2}}):
        print("ready", flush=True)
        time.sleep(60)

run(main)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n" and len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait() == 143 and not list(tmp_path.iterdir())
