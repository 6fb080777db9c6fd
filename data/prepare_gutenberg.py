"""Prepare `gutenberg`: 154 English books from before 1929 in text8's 27 symbols, a stand-in for text8 of its size.

gutenberg.tsv lists the books, on GitHub at fixed commits. 146 are train (94M characters). The other 8, by authors who
are not in train, are val and test, 4 each. Digits are spelled out; licences, credits, contents, indexes are left out.
The list has a hash of each book's cleaned text. A book with another hash is used all the same, and a line names it.
These are books, not an encyclopedia: numbers on them do not compare with those on text8. With --tokenizer gpt2 the same
text becomes `gutenberg_gpt2`, and with --tokenizer bpe:4096, a vocabulary made of the books of train,
`gutenberg_bpe4096`.

    python data/prepare_gutenberg.py
    python data/prepare_gutenberg.py --file train.txt.xz val.txt.xz    # the cleaned text itself; val is val and test
"""

import csv
import functools
import hashlib
import html
import http.client
import re
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, named, progress, run
from data.prepare import DatasetWriter, folder_of, is_prepared, named_files, parser, read_text
from data.tokenizer import KNOWN, TEXT8_ALPHABET, make_tokenizer, text8_words, tokens_of

LIST = Path(__file__).with_name("gutenberg.tsv")
URL = "https://raw.githubusercontent.com/{repo}/{commit}/{path}"
MARKS = re.compile(r"(?i)\[(?:Illustration|Frontispiece)[^\]]*\]|\[(?:Footnote|Transcriber.s note)[^:\]]*:|\[\d+\]")
CREDIT = re.compile(r"(?i)project gutenberg|proofread|\be-?(book|text)\b|https?:|www\.|transcriber.s note")
CREDIT_IN_FRONT = re.compile(r"(?i)\W*(produced|prepared|transcribed|scanned)\b|.*(italics|asterisk|hyphenat|spelling)")
FRONT = 40  # paragraphs
LAST = re.compile(r"(?i)\W*(the end|finis)\W*$|.{,60}printed (by|in)")


def text_of(source):
    """Return the text of a TEI file's body, without notes, or of a Project Gutenberg file, by paragraphs."""
    if body := re.search(r"<body\b.*</body>", source, re.DOTALL):
        return html.unescape(re.sub(r"<note\b.*?</note>|<[^>]*>", " ", body[0], flags=re.DOTALL))
    source = re.split(r"(?s)\*\*\* ?START OF TH(?:E|IS) PROJECT GUTENBERG.*?\*\*\*", source, maxsplit=1)[-1]
    source = re.split(r"\*\*\* ?END OF TH(?:E|IS) PROJECT GUTENBERG", source)[0]
    paragraphs = re.split(r"\n\s*\n", MARKS.sub(" ", source.replace("\r\n", "\n")))
    kept, in_contents = [], False
    for i, lines in enumerate(paragraphs):
        p = " ".join(lines.split())
        if i > len(paragraphs) / 2 and re.fullmatch(r"(?i)(index|\W*transcriber.s notes?)\W*", p):
            break
        in_contents = not is_prose(p) if in_contents else bool(re.fullmatch(r"(?i)(table of )?contents\W*", p))
        credit = len(p) < 2000 and (CREDIT.search(p) or i < FRONT and CREDIT_IN_FRONT.match(p))
        if p and not in_contents and not credit and not is_table(lines.strip().split("\n")):
            kept.append(p)
    while kept and LAST.match(kept[-1]):
        kept.pop()
    return "\n\n".join(kept)


def is_table(lines):
    """Detect tables, references, initials: too few letters, or page numbers at the end of half the lines or more."""
    text = " ".join(" ".join(lines).split())
    return (sum(c.isalpha() for c in text) < (0.6 if len(lines) == 1 else 0.42) * len(text)
            or sum(bool(re.search(r"(\.|\s\s)\s*\d{1,3}\s*$", line)) for line in lines) >= len(lines) / 2)


def is_prose(paragraph):
    """Detect prose, which ends a table of contents: 50 words or more, over 2/3 in lower case, and a sentence end."""
    words = paragraph.split()
    return (len(words) >= 50 and sum(word[0].islower() for word in words) > 2 / 3 * len(words)
            and bool(re.search(r"[.!?]['\")_\u2019\u201d]*$", paragraph)))


def normalise(text):
    return " ".join(text8_words(text, spelled=True))


def download(url):
    for last in (False, False, True):
        try:
            with urllib.request.urlopen(url, timeout=60) as response:
                return response.read().decode("utf-8-sig", errors="replace")
        except (OSError, http.client.HTTPException) as error:  # HTTPException: cut off in the middle
            if getattr(error, "code", None) == 404:
                return ""  # main() then names it as a book that differs
            if last:
                raise UserError(f"could not download {url} ({error}); try again, or pass --file TRAIN VAL")


def cut_books(files, books):
    """Yield the books in the cleaned text of two files: TRAIN, and VAL with the books of val, then those of test."""
    for file, splits in zip(files, (["train"], ["val", "test"])):
        text, start = read_text(file).strip(), 0
        sizes = [int(book["characters"]) for book in books if book["split"] in splits]
        expected = sum(sizes) + len(sizes) - 1
        if len(text) != expected:
            raise UserError(f"{file} is not the expected text: {len(text):,} characters, expected {expected:,}")
        for size in sizes:
            yield text[start:start + size]
            start += size + 1  # books are joined by a space


def main():
    p = parser(__doc__)
    p.add_argument("--file", nargs=2, type=named, metavar=("TRAIN", "VAL"),
                   help="local files with the cleaned text (.txt, .gz or .xz) to use instead of downloads")
    p.add_argument("--tokenizer", type=named, default="char", metavar="KIND|CKPT|hf://NAME",
                   help="kind of tokens: char (default), gpt2, bpe:SIZE, those of a checkpoint, or of a model of "
                   "transformers")
    args = p.parse_args()
    folder = folder_of(args, "gutenberg", "char")
    request = {"files": named_files(args.file)} if args.file else {}
    if not re.fullmatch(r"char|gpt2|bpe:\d+", args.tokenizer):  # else the name of the folder says all
        request["tokenizer"] = args.tokenizer
    if is_prepared(folder, request, "choose another --data_dir"):
        return
    with open(LIST, encoding="utf-8", newline="") as file:
        books = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    load = functools.cache(lambda: list(cut_books(args.file, books)) if args.file else [
        normalise(text_of(download(URL.format(**book)))) for book in progress(books, desc="downloading", unit="book")])
    tokens = KNOWN["text8"] if args.tokenizer == "char" else tokens_of(
        args.tokenizer, lambda: [text for book, text in zip(books, load()) if book["split"] == "train"])
    if args.tokenizer.startswith("bpe:"):
        tokens["characters"] = TEXT8_ALPHABET
    meta = tokens | {"source": ", ".join(sorted({book["repo"] for book in books})), "request": request}
    tokenizer, texts, different = make_tokenizer(meta), load(), []
    with DatasetWriter(folder, meta) as writer, progress(total=len(books), desc="encoding", unit="book") as bar:
        for book, text in zip(books, texts):
            if hashlib.sha256(text.encode()).hexdigest()[:16] != book["sha256"]:
                different.append(f"{book['title']}: {len(text):,} characters, the list has {int(book['characters']):,}")
            if writer.sizes[book["split"]]:
                text = " " + text
            writer.append(book["split"], tokenizer.encode(text), len(text))
            bar.update()
    if different:
        print(*different, f"{len(different)} of {len(books)} books differ from the list", sep="\n", file=sys.stderr)


if __name__ == "__main__":
    run(main)
