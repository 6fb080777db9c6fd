"""Prepare `shakespeare`: Tiny Shakespeare (Andrej Karpathy), 1.1 million characters, 65 symbols.

The first 90 % are the training split, the next 5 % val, the last 5 % test. With --alphabet text8 the text is converted
to text8's 27 symbols and becomes `shakespeare27`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import named, run
from data.prepare import cut, fetch, is_prepared, parser, write_splits
from data.tokenizer import KNOWN, CharTokenizer, characters, text8_words

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def main():
    p = parser(__doc__)
    p.add_argument("--file", type=named, help="local copy to use instead of a download")
    p.add_argument("--alphabet", choices=("own", "text8"), default="own", help="symbols of the text: its own 65 "
                   "(default), or text8's 27")
    args = p.parse_args()
    name = "shakespeare27" if args.alphabet == "text8" else "shakespeare"
    folder = args.data_dir / name
    if is_prepared(folder):
        return
    text = fetch(URL, SHA256, args.file).decode("ascii")
    alphabet = "".join(sorted(set(text)))
    if args.alphabet == "text8":
        text, alphabet = " ".join(text8_words(text)), KNOWN["text8"]["alphabet"]
    meta = characters(alphabet) | {"source": URL}
    write_splits(folder, meta, cut(text, train=0.9, val=0.05), CharTokenizer(alphabet).encode)


if __name__ == "__main__":
    run(main)
