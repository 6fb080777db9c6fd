"""Prepare `pydoc`: the English in every full CPython, for a first run that needs no download.

The text is the prose of the language reference (pydoc_data.topics) and of the standard library's docstrings (parsed
with ast; nothing is imported), without code, grammar and tables, in text8's 27 symbols. A paragraph is left out if more
than a quarter of its phrases of 8 words occurred before. The split into 80 % train, 10 % val, 10 % test is by a hash of
the paragraph. The text differs a little between versions of Python: meta.json records which one. With --tokenizer gpt2
the same text becomes `pydoc_gpt2`.
"""

import ast
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import UserError, progress, run
from data.prepare import DatasetWriter, folder_of, is_prepared, parser
from data.tokenizer import KNOWN, make_tokenizer, text8_words

PHRASE = 8  # words; a paragraph with too many known phrases of this length counts as a repetition
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def documents():
    """Yield every topic of the language reference and every docstring of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python lacks pydoc_data.topics (a stripped build): install the full standard library "
                        "(Debian, Ubuntu: apt install libpython3-stdlib)")
    yield from (topics[name] for name in sorted(topics))
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in progress(sorted(library.rglob("*.py")), desc="docstrings", unit="file"):
        if SKIP & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a few files of the library are templates or bad on purpose
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield ast.get_docstring(node, clean=False) or ""


def is_prose(paragraph):
    """Detect English sentences, as opposed to code, grammar, a table or a signature."""
    if "::=" in paragraph or ">>>" in paragraph or "==" in paragraph or "--" in paragraph or "()" in paragraph[:20]:
        return False
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return letters > 0.88 * len(paragraph) and re.search(r"[.;:,]", paragraph) and len(paragraph.split()) >= 8


def paragraphs():
    """Yield the distinct prose paragraphs as lists of words in text8's alphabet."""
    seen = set()
    for text in documents():
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text.expandtabs())):
            words = text8_words(paragraph) if is_prose(paragraph) else []
            phrases = {hash_of(words[i:i + PHRASE]) for i in range(len(words) - PHRASE + 1)}
            if phrases and len(phrases & seen) <= len(phrases) / 4:
                yield words
            seen |= phrases


def hash_of(words):
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(), "little")


def main():
    p = parser(__doc__)
    p.add_argument("--tokenizer", choices=("char", "gpt2"), default="char", help="kind of tokens (default: char)")
    args = p.parse_args()
    folder = folder_of(args, "pydoc", "char")
    if is_prepared(folder):
        return
    meta = dict(KNOWN["text8" if args.tokenizer == "char" else "openwebtext"],
                source=f"documentation strings of Python {platform.python_version()}")
    tokenizer = make_tokenizer(meta)
    with DatasetWriter(folder, meta) as writer:
        for words in paragraphs():
            part = hash_of(words) % 10
            split = "test" if part == 0 else "val" if part == 1 else "train"
            text = " ".join(words)
            text = f"{text} " if args.tokenizer == "char" else f" {text}"  # GPT-2: " word"
            writer.append(split, tokenizer.encode(text), len(text))


if __name__ == "__main__":
    run(main)
