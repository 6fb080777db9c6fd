"""data/prepare_gutenberg.py: what it keeps of each kind of source, on invented texts; downloads and --file."""

import hashlib
import http.client
import io
import lzma
import sys
import urllib.request

import pytest

from commands import ROOT
from cli import UserError
from data import prepare_gutenberg
from data.loader import load_meta
from data.prepare_gutenberg import normalise, text_of
from data.tokenizer import train_bpe
from test_data import read

PROSE = "It was a dull morning, and nobody at the inn had thought of the letter yet; " * 4 + "so they slept on."
BOOK = f"""\ufeffThe Project Gutenberg eBook, A Dull Morning, by Nobody

You may copy it under the terms of the licence online.

*** START OF THIS PROJECT GUTENBERG EBOOK A DULL
MORNING ***

Produced by Some Volunteers and the Online Distributed
Proofreading Team at http://www.example.org

Words in italics are marked with _underscores_.

A DULL MORNING

[Illustration: The inn,
by night]

CONTENTS

   I. A Letter      1

   II. The Inn      9

Nobody's motto was short: too short to end the contents.

{PROSE}

H. W.

CHAPTER II

It's the 20th, said the _ostler_;[12] caf\u00e9s were shut.[Footnote 3: So he thought.]

HOR., Ep. ii. 2, 208.

   1771     5,948     2,832
   1772    41,316    22,237

[Transcriber's Note: The rest is lost.]

THE END

Printed by Nobody & Sons, London.

End of the Project Gutenberg EBook of A Dull Morning

*** END OF THIS PROJECT GUTENBERG EBOOK A DULL MORNING ***

The full licence.
"""
CLEAN = f"a dull morning {' '.join(normalise(PROSE).split())} chapter ii it s the two zero th said the ostler " \
        "caf s were shut so he thought the rest is lost"
TEI = """<TEI><teiHeader><title>Not this</title></teiHeader><text><front><p>Nor this</p></front>
<body><pb n="1"/><head>CHAPTER&#160;I.<hi>The Inn</hi></head><p>A gal<pb n="2"/>lery &amp; a \u201cbar\u201d.</p>
<note xml:id="n1">* A note</note><p>Don\u2019t!</p></body></text></TEI>"""


def prepare(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare_gutenberg", *map(str, arguments)])
    prepare_gutenberg.main()


@pytest.fixture
def books(monkeypatch, tmp_path):
    """A list of four books in the place of the real one: the clean texts by path."""
    texts = {"a/one.txt": CLEAN, "two.xml": "chapter i the inn a gal lery a bar don t", "three.txt": "the third book",
             "a%20%0D/four.txt": "the fourth"}
    rows = ["split repo commit path characters sha256 title author".split()]
    for (path, text), split in zip(texts.items(), ("train", "train", "val", "test")):
        rows.append([split, "some/repo", "c0ffee", path, str(len(text)), hashlib.sha256(text.encode()).hexdigest()[:16],
                     f'The "{path[-8:]}"', "Nobody"])
    (tmp_path / "list.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    monkeypatch.setattr(prepare_gutenberg, "LIST", tmp_path / "list.tsv")
    return texts


def test_a_gutenberg_file():
    """No licence, credits, illustrations, contents, initials, references, tables or end matter; digits are spelled."""
    assert normalise(text_of(BOOK)) == normalise(text_of(BOOK.replace("\n", "\r\n"))) == CLEAN


def test_a_file_without_licence():
    """Nothing is lost where there are no marks; titles and years within a paragraph stay."""
    assert normalise(text_of("THE INN\nLondon\n1888\n\nII\n\nNobody came.")) == (
        "the inn london one eight eight eight ii nobody came")


def test_index_and_notes_at_the_end():
    """INDEX or a transcriber's note in the second half ends the book; an index in the first half is no end."""
    chapters = "\n\n".join(["Nobody came."] * 6)
    for end in ("INDEX.", "Index", "Transcriber\u2019s Notes:"):
        assert text_of(f"{chapters}\n\n{end}\n\nArms, smiths making.") == chapters
    assert text_of(f"INDEX\n\n{chapters}").endswith(chapters)


def test_a_tei_file():
    """The body, notes left out; a tag is a space, also within a word."""
    assert normalise(text_of(TEI)) == "chapter i the inn a gal lery a bar don t"


def test_the_list():
    """154 books, each named once; the texts of a split joined by spaces have the sizes that the script promises."""
    rows = [line.split("\t") for line in prepare_gutenberg.LIST.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == "split repo commit path characters sha256 title author".split()
    assert len(rows) == 155 and len({(row[1], row[3]) for row in rows}) == 155 and {len(row) for row in rows} == {8}
    sizes = {split: [int(row[4]) for row in rows if row[0] == split] for split in ("train", "val", "test")}
    assert {split: len(s) for split, s in sizes.items()} == {"train": 146, "val": 4, "test": 4}
    assert sum(sizes["train"]) + 145 == 94_271_674 and sum(sizes["val"] + sizes["test"]) + 7 == 5_339_579
    assert all(row[3].isascii() and " " not in row[3] for row in rows)  # paths are quoted


def test_download(monkeypatch, tmp_path, books, capsys):
    """Every book is fetched from its commit; one that differs is used and named; a second time is a no-op."""
    sources = {"a/one.txt": BOOK, "two.xml": TEI, "three.txt": "The third book.", "a%20%0D/four.txt": "The FORTH"}
    fetched = []

    def urlopen(url, timeout):
        fetched.append(url)
        return io.BytesIO(sources[url.removeprefix("https://raw.githubusercontent.com/some/repo/c0ffee/")].encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    prepare(monkeypatch, "--data_dir", tmp_path)
    folder, messages = tmp_path / "gutenberg", capsys.readouterr().err
    assert read(folder, "train") == f"{CLEAN} {books['two.xml']}"
    assert (read(folder, "val"), read(folder, "test")) == ("the third book", "the forth")
    assert 'The "four.txt": 9 characters, the list has 10' in messages and "1 of 4 books differ" in messages
    assert "three" not in messages and len(fetched) == 4
    assert load_meta("gutenberg", tmp_path)["source"] == "some/repo"
    prepare(monkeypatch, "--data_dir", tmp_path)
    assert len(fetched) == 4 and "is already prepared" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError("no route"), http.client.IncompleteRead(b"The fi", 9)])
def test_no_network_is_one_line(monkeypatch, tmp_path, books, error):
    """A download that fails three times, or ends too soon, names the URL and --file, and leaves nothing behind."""
    tries = []

    def urlopen(url, timeout):
        tries.append(url)
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"download https://raw.*one.txt \((no route|Inco.*)\); .* --file TRAIN VAL"):
        prepare(monkeypatch, "--data_dir", tmp_path / "data")
    assert len(tries) == 3 and not (tmp_path / "data").exists()


def test_file(monkeypatch, tmp_path, books, capsys):
    """--file takes the clean text, plain or .xz, and cuts VAL into val and test between books."""
    texts = list(books.values())
    (tmp_path / "train.txt.xz").write_bytes(lzma.compress(" ".join(texts[:2]).encode()))
    (tmp_path / "val.txt").write_text(" ".join(texts[2:]) + "\n")
    prepare(monkeypatch, "--file", tmp_path / "train.txt.xz", tmp_path / "val.txt", "--data_dir", tmp_path)
    folder = tmp_path / "gutenberg"
    assert [read(folder, split) for split in ("train", "val", "test")] == [" ".join(texts[:2]), *texts[2:]]
    assert "differ" not in capsys.readouterr().err
    assert load_meta("gutenberg", tmp_path)["dtype"] == "uint8"


def test_gpt2(monkeypatch, tmp_path, books):
    """--tokenizer gpt2 writes the same text, in words that begin with a space, to a data set of its own."""
    texts, encoded = list(books.values()), []

    class Tokenizer:
        def encode(self, text):
            encoded.append(text)
            return list(text.encode())

    monkeypatch.setattr(prepare_gutenberg, "make_tokenizer", lambda meta: Tokenizer())
    for name, part in (("train.txt", texts[:2]), ("val.txt", texts[2:])):
        (tmp_path / name).write_text(" ".join(part))
    prepare(monkeypatch, "--tokenizer", "gpt2", "--file", tmp_path / "train.txt", tmp_path / "val.txt",
            "--data_dir", tmp_path)
    meta = load_meta("gutenberg_gpt2", tmp_path)
    assert (meta["tokenizer"], meta["vocab_size"], meta["dtype"]) == ("gpt2", 50257, "uint16")
    assert encoded[1] == f" {texts[1]}" and meta["bytes"]["train"] == len(" ".join(texts[:2]))


def test_bpe(monkeypatch, tmp_path, books):
    """--tokenizer bpe:SIZE makes its vocabulary of the books of train."""
    texts = list(books.values())
    for name, part in (("train.txt", texts[:2]), ("val.txt", texts[2:])):
        (tmp_path / name).write_text(" ".join(part))
    go = lambda tokens: prepare(monkeypatch, "--tokenizer", tokens, "--file", tmp_path / "train.txt",
                                tmp_path / "val.txt", "--data_dir", tmp_path)
    go("bpe:270")
    meta = load_meta("gutenberg_bpe270", tmp_path)
    assert meta["definition"] == train_bpe(texts[:2], 270) and meta["vocab_size"] == 270
    assert [read(tmp_path / "gutenberg_bpe270", split) for split in ("train", "val", "test")] == [
        " ".join(texts[:2]), *texts[2:]]
    for tokens, message in (("bpe:9", "bpe:9: write bpe:SIZE"), ("270", "270 cannot be used here: choose gpt2")):
        with pytest.raises(UserError, match=f"--tokenizer {message}"):
            go(tokens)
    prepare(monkeypatch, "--tokenizer", ROOT / "pretrained/prose", "--file", tmp_path / "train.txt",
            tmp_path / "val.txt", "--data_dir", tmp_path)  # the tokens of a checkpoint
    assert load_meta("gutenberg_prose", tmp_path)["vocab_size"] == 8192
    with pytest.raises(UserError, match="is already prepared with tokenizer .*pretrained/prose, not other/prose"):
        go("other/prose")  # another checkpoint of this name
    assert read(tmp_path / "gutenberg_prose", "train") == " ".join(texts[:2])


def test_another_file_is_refused(monkeypatch, tmp_path, books):
    """Text of another length is not cut at the wrong places, and no data set is left."""
    for name in ("train.txt", "val.txt"):
        (tmp_path / name).write_text("another text")
    with pytest.raises(UserError, match="train.txt is not the expected text: 12 characters, expected"):
        prepare(monkeypatch, "--file", tmp_path / "train.txt", tmp_path / "val.txt", "--data_dir", tmp_path / "data")
    assert not (tmp_path / "data").exists()
