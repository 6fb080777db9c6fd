"""Show denoising: a record of its states, on the terminal, as a web page that plays it, and as pictures.

    history, screen = History(xt, mask_id), Screen(mask_id, tokenizer)
    for xt, p, steps in chain:
        history.add(xt, p, steps)
        screen.show(history.steps, xt[0].tolist())
    screen.show(history.steps, xt[0].tolist(), last=True)
    write_file(Path("denoising.html"), html(history, tokenizer, "out/demo, 64 steps"))
"""

import copy
import io
import itertools
import json
import math
import os
import shutil
import sys
import time
import unicodedata
from pathlib import Path

from cli import UserError
from data.tokenizer import CharTokenizer

MASK = "\N{LIGHT SHADE}"
HIGHLIGHT, RESET = "\x1b[1;32m", "\x1b[0m"
FRAME_SECONDS = 1 / 25


class History:
    """The record of the denoising of B samples, kept as changes.

    taken: B numbers of steps, one for each sample; they differ on the way. steps: the largest of them.
    start: B lists of the N ids before the first step, masks and given tokens.
    events: for each sample a list of (step, position, token, p), sorted by step; steps count from 1. The token may be
        the mask, since some samplers mask tokens again. p is the probability that the network gave the token when it
        was drawn; None for masks, and if unknown. A token that is drawn again and stays the same is no event.
    """

    def __init__(self, xt, mask_id):
        self.mask_id, self.taken, self.start = mask_id, [0] * len(xt), xt.tolist()
        self.events = [[] for _ in self.start]
        self.xt = xt.clone()  # samplers may write into their xt

    def add(self, xt, p, steps=1):
        """Record the state after `steps` more steps, a number or (B,) long: tokens xt (B, N) long and their
        probabilities p (B, N), which are nan if unknown."""
        more = steps.tolist() if hasattr(steps, "tolist") else [steps] * len(self.taken)
        self.taken = [taken + some for taken, some in zip(self.taken, more)]
        changed = xt != self.xt
        rows, positions = changed.nonzero(as_tuple=True)
        for b, i, token, q in zip(rows.tolist(), positions.tolist(), xt[changed].tolist(), p[changed].tolist()):
            self.events[b].append((self.taken[b], i, token, None if math.isnan(q) else q))
        self.xt = xt.clone()

    @property
    def steps(self):
        return max(self.taken)

    def cells(self, b, step):
        """For each position of sample b after `step` steps: (token, the step that wrote it, p), or (token, 0, None) if
        the position has not changed."""
        cells = [(token, 0, None) for token in self.start[b]]
        for when, i, token, p in itertools.takewhile(lambda event: event[0] <= step, self.events[b]):
            cells[i] = (token, when, p)
        return cells

    def state(self, b, step):
        """The ids of sample b after `step` steps."""
        return [token for token, _, _ in self.cells(b, step)]

    def final(self, b):
        """The ids of sample b after its last step."""
        return self.state(b, self.taken[b])

    def revealed(self, b):
        """For each position of sample b the step that revealed its final token: 0 if given, None if still a mask."""
        return [None if token == self.mask_id else step for token, step, _ in self.cells(b, self.taken[b])]

    def confidence(self, b):
        """For each position of sample b the probability p of its final token: None if given, or unknown."""
        return [p for _, _, p in self.cells(b, self.taken[b])]


def joined(histories, order):
    """Merge histories into one. order: the numbers of its samples, which are counted through all of the histories."""
    taken = [steps for history in histories for steps in history.taken]
    starts = [start for history in histories for start in history.start]
    events = [sample for history in histories for sample in history.events]
    whole = copy.copy(histories[0])
    whole.taken, whole.start, whole.events = ([values[i] for i in order] for values in (taken, starts, events))
    return whole


def piece(token, mask_id, tokenizer):
    """The text of one token, safe to show: a mask as a block, control characters as dots, all separators as spaces.

    Newlines stay newlines. A pad, which decode leaves out, is shown. A token that is part of a character is U+FFFD.
    """
    if token == mask_id:
        return MASK
    kinds = {"C": "\N{MIDDLE DOT}", "Z": " "}
    before = tokenizer.decode([0])  # because some tokenizers leave out the space before a text
    text = tokenizer.decode([0, token])[len(before):] or tokenizer.decode([token])
    text = text or getattr(tokenizer, "pad", None) or ""
    return "".join(c if c == "\n" else kinds.get(unicodedata.category(c)[0], c) for c in text)


def status(step, ids, mask_id):
    """A line that says the step and how many masks are left."""
    left = ids.count(mask_id)
    return f"step {step}, {left} mask{'' if left == 1 else 's'} left"


# ---- terminal --------------------------------------------------------------------------------------------------------


def terminal_size():
    """(columns, rows) of the terminal on stderr. If stderr is not a terminal, the size that shutil reports."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        size = (0, 0)
    return size if min(size) > 0 else shutil.get_terminal_size()


def columns(character):
    """The number of terminal columns of a character: 0 (combining accents), 1 or 2."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def draw(ids, before, mask_id, tokenizer, width, color):
    """A state as lines of at most `width` columns. With color, tokens that are new since `before` are highlighted."""
    lines, used = [[]], 0
    for token, old in zip(ids, before):
        for character in piece(token, mask_id, tokenizer).replace("\n", "\N{RETURN SYMBOL}"):
            if used + columns(character) > width:
                lines, used = lines + [[]], 0
            lines[-1].append((character, color and token not in (mask_id, old)))
            used += columns(character)
    runs = [[(new, "".join(c for c, _ in run)) for new, run in itertools.groupby(line, lambda cell: cell[1])]
            for line in lines]
    return ["".join(f"{HIGHLIGHT}{text}{RESET}" if new else text for new, text in line) for line in runs]


class Screen:
    """Show on stderr how one text emerges: live on a terminal, elsewhere about ten states in plain lines.

    every: print the state after each `every` steps in plain lines instead, if it is new, also on a terminal. The number
    of steps need not be known: a state is due when enough masks have been revealed since the last one. Live, at most
    250 states are due, and each is shown for 1/25 s, so a fast run waits 10 s in all. Other changes are shown if no
    frame was drawn in the last 1/25 s.
    """

    def __init__(self, mask_id, tokenizer, every=None):
        self.mask_id, self.tokenizer, self.every = mask_id, tokenizer, every
        self.live = every is None and sys.stderr.isatty()
        self.latest = None  # the last state that was passed to show(), (step, ids)
        self.ids = None  # of the state that was shown last
        self.height, self.drawn = 0, -math.inf  # the number of lines on the terminal, and the time when they were drawn

    def show(self, step, ids, last=False):
        """Take the state after `step` steps, a list of ids, and show it if it is due.

        The first call is for step 0. The last state is passed again, with last=True. Steps without a call changed
        nothing."""
        if self.every and self.latest:
            last_step, last_ids = self.latest
            due_step = (last_step // self.every + 1) * self.every
            if due_step < step and last_ids != self.ids:
                self.print(due_step, last_ids)
        self.latest = step, ids
        left = ids.count(self.mask_id)
        if self.ids is None:
            self.stride, self.due = left / (250 if self.live else 10), left
        due = ids != self.ids and (step % self.every == 0 if self.every else left <= self.due)
        if self.live:
            idle = time.monotonic() - self.drawn >= FRAME_SECONDS
            if last or due or (idle and ids != self.ids):
                self.redraw(step, ids, last)
        elif (last or due) and ids != self.ids:
            self.print(step, ids)
        if due:
            self.due = left - self.stride

    def print(self, step, ids):
        """Print a state as plain lines."""
        width = min(80, terminal_size()[0]) - 1
        lines = draw(ids, ids, self.mask_id, self.tokenizer, max(width, 2), color=False)
        print(status(step, ids, self.mask_id), *lines, sep="\n", file=sys.stderr, flush=True)
        self.ids = ids

    def redraw(self, step, ids, last):
        """Draw a frame over the last one, not sooner than 1/25 s after it: the lines that fit, and status().

        If not all lines fit, the last line with new tokens is near the middle. Without new tokens the end is shown."""
        time.sleep(max(0, self.drawn + FRAME_SECONDS - time.monotonic()))
        width, rows = terminal_size()
        width = max(min(80, width) - 1, 2)  # the last column stays free: some terminals wrap there
        lines = draw(ids, self.ids or ids, self.mask_id, self.tokenizer, width, color=not last)
        n = max(rows - 2, 1)
        end = max(len(lines) - n, 0)
        new = [i for i, line in enumerate(lines) if HIGHLIGHT in line]
        top = min(max(new[-1] - n // 2, 0), end) if new else end
        lines = lines[top:top + n] + [status(step, ids, self.mask_id)[:width]]
        back = f"\x1b[{self.height}A" if self.height else ""
        sys.stderr.write(back + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        sys.stderr.flush()
        self.ids, self.height, self.drawn = ids, len(lines), time.monotonic()


# ---- web page --------------------------------------------------------------------------------------------------------


def html(history, tokenizer, title):
    """A web page (str) that plays the denoising of all samples, and loads no other file.

    It is player.html with the data in it. The data is the only text from outside, and the page's script inserts it as
    text, not as HTML. The page plays when it is opened; page.html#12 waits at step 12. Arrow keys step, space plays.
    Each event in the page stores the event that it replaced, so a step back costs as little as a step forward. The
    element of a token has the CSS variables --p, its probability, and --t, the time of its reveal, both in [0, 1]: its
    colour follows from them.
    """
    mask_id = history.mask_id
    used = {mask_id, *itertools.chain(*history.start), *(event[2] for events in history.events for event in events)}
    pieces = {token: piece(token, mask_id, tokenizer) for token in sorted(used)}
    unit = "char" if isinstance(tokenizer, CharTokenizer) else "token"
    if unit == "token":
        pieces[mask_id] = 3 * MASK  # about as wide as a token
    events = [[(step, i, token, p if p is None else float(f"{p:.3g}")) for step, i, token, p in events]
              for events in history.events]
    samples = [{"start": start, "events": events} for start, events in zip(history.start, events)]
    data = json.dumps({"title": title, "unit": unit, "mask": mask_id, "steps": history.steps,
                       "pieces": pieces, "samples": samples}, separators=(",", ":"))
    page = (Path(__file__).parent / "player.html").read_text(encoding="utf-8")
    return page.replace("DATA", data.replace("<", "\\u003c"))  # so that no text can end the script element


# ---- pictures --------------------------------------------------------------------------------------------------------


COLUMNS = 64  # characters in a row
WHITE, INK, SOFT, BLOCK, NEW = (255, 255, 255), (32, 34, 42), (125, 125, 130), (222, 220, 215), (255, 216, 107)


def pillow(size):
    """(PIL.Image, PIL.ImageDraw, a monospaced font of size pixels)."""
    from PIL import Image, ImageDraw, ImageFont
    os.environ["MPLBACKEND"] = "Agg"  # that of a notebook may not be installed here
    from matplotlib.font_manager import findfont
    return Image, ImageDraw, ImageFont.truetype(findfont("DejaVu Sans Mono"), size)


def lay_out(pieces):
    """For each piece of text the cells [(row, column)] of its characters. A newline takes a cell and ends the row."""
    cells, row, column = [], 0, 0
    for text in pieces:
        cells.append([])
        for character in text or " ":
            if column == COLUMNS:
                row, column = row + 1, 0
            cells[-1].append((row, column))
            row, column = (row + 1, 0) if character == "\n" else (row, column + 1)
    return cells


def milestones(events, n):
    """At most n different steps, from 0 to that of the last event, with equally many events between them."""
    return sorted({0} | {events[len(events) * i // (n - 1) - 1][0] for i in range(1, n) if len(events) * i >= n - 1})


class Sheet:
    """The places of a sample's tokens in a picture. The final text is laid out once, by characters, so no token moves.

    A position has the cells of its final token. A mask fills them, and an earlier token is cut or padded to them.
    """

    def __init__(self, history, tokenizer, font):
        self.tokenizer, self.mask_id, self.font = tokenizer, history.mask_id, font
        self.given = [token != self.mask_id for token in history.start[0]]
        ids = history.state(0, history.steps)
        self.cells = lay_out([piece(token, self.mask_id, tokenizer) for token in ids])
        used = list(itertools.chain(*self.cells))
        self.cell = math.ceil(font.getlength("0")), round(1.6 * font.size)
        if used[-1][0] >= 300:
            raise UserError(f"a text of {used[-1][0] + 1:,} lines is too long for a picture: use --html")
        self.size = (self.cell[0] * (1 + max(column for _, column in used)), self.cell[1] * (1 + used[-1][0]))

    def paint(self, draw, corner, position, token, ink, paper):
        """Draw a token into the cells of a position, on a sheet whose upper left corner is at (x, y)."""
        width, height = self.cell
        masked, cells = token == self.mask_id, self.cells[position]
        text = piece(token, self.mask_id, self.tokenizer).replace("\n", " ").ljust(len(cells))
        for (row, column), character in zip(cells, text):
            x, y = corner[0] + column * width, corner[1] + row * height
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=paper)
            if masked:
                draw.rectangle((x + width // 10, y + height // 8, x + width - 1 - width // 10, y + height * 7 // 8 - 1),
                               fill=BLOCK)
            else:
                draw.text((x + width / 2, y + round(0.69 * height)), character, ink, self.font, anchor="ms")
            if self.given[position]:
                draw.line((x, y + height - 3, x + width - 1, y + height - 3), fill=ink)


def gif(history, tokenizer, seconds=6):
    """The denoising of the first sample as an animated GIF (bytes): it plays for `seconds`, stops for 2 s, repeats.

    It has at most 60 frames, with equally many changes between them. New tokens are highlighted. Characters that DejaVu
    Sans Mono lacks are empty boxes.
    """
    Image, ImageDraw, font = pillow(16)
    small = font.font_variant(size=12)
    sheet = Sheet(history, tokenizer, font)
    (width, height), margin = sheet.size, 20
    picture = Image.new("RGB", (max(width, 220) + 2 * margin, height + 2 * margin + 28), WHITE)
    draw = ImageDraw.Draw(picture)
    shades = [tuple(a + (b - a) * i // 15 for a, b in zip(paper, ink))  # shades for the smooth edges of letters
              for paper, ink in ((WHITE, INK), (NEW, INK), (WHITE, SOFT)) for i in range(16)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(list(itertools.chain(*shades, BLOCK)))

    frames, before, new = [], None, set()
    steps = milestones(history.events[0], 59)
    for step in [*steps, steps[-1]]:  # the last state comes again, without highlights
        ids, old = history.state(0, step), new
        new = {i for i, token in enumerate(ids) if before and token not in (before[i], history.mask_id)}
        for i, token in enumerate(ids):
            if not before or token != before[i] or i in old:
                sheet.paint(draw, (margin, margin), i, token, INK, NEW if i in new else WHITE)
        draw.rectangle((0, picture.height - margin - 16, picture.width, picture.height), fill=WHITE)
        draw.text((margin, picture.height - margin), status(step, ids, history.mask_id), SOFT, small, anchor="ls")
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
        before = ids
    out, pace = io.BytesIO(), max(20, round(100 * seconds / (len(frames) - 1)) * 10)  # GIFs count time in 10 ms
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[pace] * (len(frames) - 1) + [2000])
    return out.getvalue()


def png(history, tokenizer, moments=4):
    """The denoising of the first sample as a film strip (PNG, bytes): at most `moments` states, one above the other.

    They include the first and the last state, with equally many changes between them. The colour of a token shows when
    it was revealed. Given tokens are underlined.
    """
    Image, ImageDraw, font = pillow(26)
    from matplotlib import colormaps
    small = font.font_variant(size=19)
    sheet = Sheet(history, tokenizer, font)
    (width, height), margin, gap = sheet.size, 40, 64
    steps = milestones(history.events[0], moments)
    picture = Image.new("RGB", (max(width, 420) + 2 * margin, len(steps) * (height + gap) + gap + margin), WHITE)
    draw = ImageDraw.Draw(picture)

    def color(time):  # without the yellow end, which is hard to read on white
        return tuple(round(255 * x) for x in colormaps["plasma"](0.7 * time)[:3])

    y = 0
    for step in steps:
        cells = history.cells(0, step)
        caption = status(step, [token for token, _, _ in cells], history.mask_id)
        draw.text((margin, y + gap - 14), caption, SOFT, small, anchor="ls")
        y += gap
        for i, (token, when, _) in enumerate(cells):
            sheet.paint(draw, (margin, y), i, token, color(when / history.steps) if when else INK, WHITE)
        y += height
    y += gap - 14
    x = margin + small.getlength("early ")
    for i in range(120):
        draw.line((x + i, y - 14, x + i, y), fill=color(i / 119))
    draw.text((margin, y), "early", SOFT, small, anchor="ls")
    draw.text((x + 120 + small.getlength(" "), y), "late", SOFT, small, anchor="ls")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()
