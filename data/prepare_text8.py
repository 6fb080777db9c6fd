"""Prepare `text8`: the first 100 million characters of a cleaned English Wikipedia (Matt Mahoney), a to z and space.

The splits are the usual ones: the first 90M characters are train, the next 5M val, the last 5M test.
"""

import io
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import named, run
from data.prepare import cut, fetch, is_prepared, parser, write_splits
from data.tokenizer import KNOWN, CharTokenizer

URL = "http://mattmahoney.net/dc/text8.zip"  # the site has no https; the checksum is what is trusted
SHA256 = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"


def main():
    p = parser(__doc__)
    p.add_argument("--file", type=named, help="local text8.zip to use instead of a download")
    args = p.parse_args()
    folder = args.data_dir / "text8"
    if is_prepared(folder):
        return
    with zipfile.ZipFile(io.BytesIO(fetch(URL, SHA256, args.file))) as archive:
        text = archive.read("text8").decode("ascii")
    meta = dict(KNOWN["text8"], source=URL)
    write_splits(folder, meta, cut(text, train=0.9, val=0.05), CharTokenizer(meta["alphabet"]).encode)


if __name__ == "__main__":
    run(main)
