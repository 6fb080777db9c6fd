"""Prompts: text with blanks -> canvases, lists of token ids with masks where the model is to write.

sampling.denoise() fills the masks."""

import re

from block_diffusion import cut
from cli import UserError, note
from data.prepare import read_text
from data.tokenizer import check_alphabet

BLANKS = re.compile(r"\\(?P<escaped>[\\_{}n])|(?P<blanks>_+)|\{(?P<count>[^{}]*)\}|(?P<wrong>[{}\\])")


def template(text, tokenizer, mask_id, name="--template"):
    r"""The canvas of a template: n underscores are n masks, {12} is 12; \_ \{ \} \\ and \n are _ { } \ and a new line.

    Each piece of text between two blanks is encoded separately. Raises UserError if text is not a template, or has no
    blank.
    """
    canvas, plain, end = [], "", 0

    for match in BLANKS.finditer(text):
        plain, end = plain + text[end:match.start()], match.end()
        if match["escaped"]:
            plain += match["escaped"].replace("n", "\n")
            continue
        count = match["count"]
        if count and count.isdecimal() and len(count) > 7:
            raise UserError(f"{name} {text[:80]!r}: {match[0][:80]} is too long a blank: write {{9999999}} at most")
        if match["wrong"] or count is not None and not count.isdecimal():
            raise UserError(f"{name} {text[:80]!r}: {match[0][:80]!r} is not a blank (____ or {{12}}); write the "
                            r"characters { } _ \ as \{ \} \_ \\")
        n = len(match["blanks"] or "") or int(count)
        canvas += encode(before_blank(plain, tokenizer), tokenizer, name) + [mask_id] * n
        plain = ""
    canvas += encode(plain + text[end:], tokenizer, name)
    if mask_id not in canvas:
        raise UserError(f"{name} {text[:80]!r} has no blanks: write ____ for four tokens, {{12}} for twelve")
    return canvas


def before_blank(text, tokenizer):
    """Remove the last space of a text before a blank, if a token includes the space before it: the model writes it."""
    return text.removesuffix(" ") if tokenizer.space_first else text


def encode(text, tokenizer, name):
    """Token ids of a prompt. Raises a UserError that names the characters that the model does not know."""
    try:
        text.encode()
        check_alphabet(text, tokenizer.alphabet or text)  # a BPE could encode more than its model has seen
        return tokenizer.encode(text).tolist()
    except UnicodeEncodeError:
        raise UserError(f"{name} is not valid text: it has bytes that are not UTF-8")
    except UserError as error:
        raise UserError(f"{name}: {error}")


def canvases(args, seq_len, tokenizer, mask_id, block_size=0):
    """The canvases that --length, --prefix, --suffix, --template and --infill ask for.

    Without any of them, one canvas of seq_len masks. block_size: of block diffusion, or 0. Raises UserError for flags
    that contradict each other, and for canvases longer than seq_len without --context, which says how longer text is
    continued. Flags that change nothing here are named on stderr.
    """
    if (args.template or args.infill) and (args.prefix or args.suffix or args.length):
        raise UserError("--template and --infill give the whole text: leave out --prefix, --suffix and --length")
    if args.template and args.infill:
        raise UserError("use --template or --infill, not both")
    if args.infill:
        text = read_text("/dev/stdin" if args.infill == "-" else args.infill)
        lines = [line.rstrip("\r") for line in text.split("\n") if line.strip()]
        found = [template(line, tokenizer, mask_id, f"--infill {args.infill}, template {i}")
                 for i, line in enumerate(lines, 1)]
    elif args.template:
        found = [template(args.template, tokenizer, mask_id)]
    else:
        prefix = encode(before_blank(args.prefix or "", tokenizer), tokenizer, "--prefix")
        suffix = encode(args.suffix or "", tokenizer, "--suffix")
        length = args.length or seq_len
        if len(prefix) + len(suffix) >= length:
            more = " and a --context" if length >= seq_len and args.context is None else ""
            raise UserError(f"the prompt has {len(prefix) + len(suffix)} tokens, which leaves nothing of {length} to "
                            f"write: shorten it, or use a larger --length{more}")
        found = [prefix + [mask_id] * (length - len(prefix) - len(suffix)) + suffix]
    longest = max(map(len, found))
    if longest > seq_len and args.context is None:
        multiple = block_size or 1
        quarter = min(max(seq_len // 4 // multiple, 1) * multiple, seq_len - multiple)
        raise UserError(f"the text has {longest} tokens, and the model writes {seq_len} at a time: shorten it, or "
                        f"set --context, the number of tokens that each window continues, such as {quarter}")
    if args.context is not None and args.context >= seq_len:
        raise UserError(f"--context {args.context} leaves nothing of the model's {seq_len} tokens: use fewer")
    if args.context is not None and longest <= seq_len:
        note(f"--context changes nothing: the text has {longest} tokens, and the model writes {seq_len} at a time")
    n_masks = min(seq_len, max(canvas.count(mask_id) for canvas in found))
    if args.block_length and args.block_length > n_masks:
        note(f"--block_length {args.block_length} changes nothing: here at most {n_masks} tokens are written at a time")
    return found


def end_of(config, tokenizer):
    """The id of the token at which a text of this model ends, or None: for block diffusion and for large language
    models, if the data have one. Other models write several texts in a row."""
    stops = config.block_size and config.padding == "end" or config.network_class.large
    return tokenizer.end if stops else None


def text_of(tokens, start, end, tokenizer):
    """The text of a list of ids up to the first `end` that was written into `start`, the ids before sampling."""
    return tokenizer.decode(tokens if end is None else cut(tokens, start, end))
