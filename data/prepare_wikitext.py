"""Prepare `wikitext`: WikiText-2 (Merity et al., arXiv 1609.07843), articles of Wikipedia, as RoBERTa's tokens.

2 million words of training text; with --large (`wikitext103`) 103 million. Splits are those of its authors.

    python data/prepare_wikitext.py
    python data/prepare_wikitext.py --tokenizer bert       # `wikitext_bert`; also gpt2, hf://OWNER/NAME, a checkpoint
    python data/prepare_wikitext.py --file train.parquet val.parquet test.parquet
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import named, run
from data.loader import SPLITS
from data.prepare import folder_of, is_prepared, named_files, parser, read_text, write_splits
from data.prepare_openwebtext import load_documents
from data.prepare_textfile import encode
from data.tokenizer import make_tokenizer, tokens_of

SOURCE = "Salesforce/wikitext"  # on the Hugging Face Hub, as parquet files


def texts(large, files):
    """The texts of the splits train, val, test. Raises UserError if they cannot be loaded."""
    if files and not all(file.endswith(".parquet") for file in files):
        return [read_text(file) for file in files]
    if files:
        found = [load_documents([file]) for file in files]
    else:
        found = [load_documents(None, SOURCE, f"wikitext-{103 if large else 2}-raw-v1", split)
                 for split in ("train", "validation", "test")]
    return ["".join(filter(None, documents["text"])) for documents in found]


def main():
    p = parser(__doc__)
    p.add_argument("--large", action="store_true", help="WikiText-103 instead, as `wikitext103`")
    p.add_argument("--tokenizer", type=named, default="roberta", metavar="KIND|CKPT|hf://NAME",
                   help="gpt2, bert, roberta (default), bpe:SIZE, those of a checkpoint, or of a model of transformers")
    p.add_argument("--file", nargs=3, type=named, metavar=("TRAIN", "VAL", "TEST"),
                   help="local copies: .parquet with a column `text`, or plain text")
    args = p.parse_args()
    folder = folder_of(args, "wikitext103" if args.large else "wikitext", "roberta")
    request = {"tokenizer": args.tokenizer} | ({"files": named_files(args.file)} if args.file else {})
    if is_prepared(folder, request, "choose another --data_dir"):
        return
    load = functools.cache(lambda: dict(zip(SPLITS, texts(args.large, args.file))))
    if args.file:
        load()  # local files are read before a tokenizer is downloaded
    meta = tokens_of(args.tokenizer, lambda: [load()["train"]])
    meta |= {"source": ", ".join(args.file or [SOURCE]), "request": request}
    tokenizer = make_tokenizer(meta)
    write_splits(folder, meta, load(), lambda text: encode(text, tokenizer))


if __name__ == "__main__":
    run(main)
