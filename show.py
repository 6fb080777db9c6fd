"""Denoising made visible: recorded, on the terminal, as a web page that plays it, and as pictures.

    history, screen = History(xt, mask_id), Screen(mask_id, tokenizer)
    for xt, p, steps in chain:
        history.add(xt, p, steps)
        screen.show(history.steps, xt[0].tolist())
    screen.show(history.steps, xt[0].tolist(), last=True)
    write_file(Path("denoising.html"), html(history, tokenizer, mask_id, "out/demo, 64 steps"))
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

MASK = "\N{LIGHT SHADE}"
HIGHLIGHT, RESET = "\x1b[1;32m", "\x1b[0m"
FRAME_SECONDS = 1 / 25


class History:
    """What happened to a batch of samples, kept as changes.

    steps: number of steps. start: B lists of the N ids that it began with, masks and given tokens. events: for
    each sample a list of (step, position, token, p) in the order of the steps, which count from 1. The token may be the
    mask, since some samplers mask tokens again. p is the probability that the network gave the token when it was drawn,
    None if unknown and for masks. A token that is drawn again and stays the same makes no event.
    """

    def __init__(self, xt, mask_id):
        self.mask_id, self.steps, self.start = mask_id, 0, xt.tolist()
        self.events = [[] for _ in self.start]
        self.xt = xt.clone()  # samplers may write into theirs

    def add(self, xt, p, steps=1):
        """Record the state after so many more steps: tokens xt (B, N) long and their probabilities p (B, N), nan if
        none."""
        self.steps += steps
        changed = xt != self.xt
        rows, positions = changed.nonzero(as_tuple=True)
        for b, i, token, q in zip(rows.tolist(), positions.tolist(), xt[changed].tolist(), p[changed].tolist()):
            self.events[b].append((self.steps, i, token, None if math.isnan(q) else q))
        self.xt = xt.clone()

    def cells(self, b, step):
        """For each position of sample b after `step` steps: (token, the step that put it there, p); (token, 0, None) if
        nothing has happened there."""
        cells = [(token, 0, None) for token in self.start[b]]
        for when, i, token, p in itertools.takewhile(lambda event: event[0] <= step, self.events[b]):
            cells[i] = (token, when, p)
        return cells

    def state(self, b, step):
        """The ids of sample b after `step` steps."""
        return [token for token, _, _ in self.cells(b, step)]

    def revealed(self, b):
        """For each position of sample b the step that revealed its final token: 0 if given, None if it is a mask."""
        return [None if token == self.mask_id else step for token, step, _ in self.cells(b, self.steps)]

    def confidence(self, b):
        """For each position of sample b the probability of its final token: None if given, or unknown."""
        return [p for _, _, p in self.cells(b, self.steps)]


def joined(histories, order):
    """One History of all samples of several, sample order[0] of them first, and so on."""
    whole = copy.copy(histories[0])
    whole.steps = max(history.steps for history in histories)
    starts = [start for history in histories for start in history.start]
    events = [sample for history in histories for sample in history.events]
    whole.start, whole.events = [starts[i] for i in order], [events[i] for i in order]
    return whole


def piece(token, mask_id, tokenizer):
    """The text of one token, safe to show: a mask as a block, control characters as dots, odd spaces as spaces.

    Newlines stay, and a pad, which decode leaves out, is shown. A token that is part of a character comes as U+FFFD.
    """
    if token == mask_id:
        return MASK
    kinds = {"C": "\N{MIDDLE DOT}", "Z": " "}
    text = tokenizer.decode([token]) or getattr(tokenizer, "pad", None) or ""
    return "".join(c if c == "\n" else kinds.get(unicodedata.category(c)[0], c) for c in text)


def status(step, ids, mask_id):
    """One line: the step and how many masks are left."""
    left = ids.count(mask_id)
    return f"step {step}, {left} mask{'' if left == 1 else 's'} left"


# ---- terminal --------------------------------------------------------------------------------------------------------


def terminal_size():
    """(columns, rows) of the terminal that stderr is, whatever stdout is; else what shutil says."""
    try:
        size = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        size = (0, 0)
    return size if min(size) > 0 else shutil.get_terminal_size()


def columns(character):
    """How many columns of a terminal a character takes: 0 (accents of their own), 1 or 2."""
    if unicodedata.category(character) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def draw(ids, before, mask_id, tokenizer, width, color):
    """One state as lines of at most `width` columns; in color, what is new since the state `before` is highlighted."""
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
    """Shows on stderr how one text emerges: live on a terminal, elsewhere some ten states in plain lines.

    every: print each every-th state in plain lines instead, also on a terminal. The number of steps need not be known:
    states are due by masks that have gone. Live, those are 250 at most, each shown for 1/25 s, so a run that could be
    faster waits 10 s in all; other changes are shown if no frame was drawn in the last 1/25 s.
    """

    def __init__(self, mask_id, tokenizer, every=None):
        self.mask_id, self.tokenizer, self.every = mask_id, tokenizer, every
        self.live = every is None and sys.stderr.isatty()
        self.taken = None  # the last state, (step, ids)
        self.step, self.ids = None, None  # those shown last
        self.height, self.drawn = 0, -math.inf  # the lines on the terminal, and when they were drawn

    def show(self, step, ids, last=False):
        """Take the state after `step` steps, a list of ids. Step 0 comes first; the last comes again, with last. Steps
        that are left out changed nothing."""
        if self.every and self.taken:
            before, same = self.taken
            for unchanged in range((before // self.every + 1) * self.every, step, self.every):
                self.print(unchanged, same)
        self.taken = step, ids
        left = ids.count(self.mask_id)
        if self.ids is None:
            self.stride, self.due = left / (250 if self.live else 10), left
        due = step % self.every == 0 if self.every else left <= self.due and ids != self.ids
        if self.live:
            late = time.monotonic() - self.drawn >= FRAME_SECONDS
            if last or due or late and ids != self.ids:
                self.redraw(step, ids, last)
        elif (last or due) and step != self.step:
            self.print(step, ids)
        if due:
            self.due = left - self.stride

    def print(self, step, ids):
        """Print a state as plain lines."""
        width = min(80, terminal_size()[0]) - 1
        lines = draw(ids, ids, self.mask_id, self.tokenizer, max(width, 2), color=False)
        print(status(step, ids, self.mask_id), *lines, sep="\n", file=sys.stderr, flush=True)
        self.step, self.ids = step, ids

    def redraw(self, step, ids, last):
        """Draw over the last frame, after 1/25 s: the lines that fit, around what is new, and status."""
        time.sleep(max(0, self.drawn + FRAME_SECONDS - time.monotonic()))
        width, rows = terminal_size()
        width = max(min(80, width) - 1, 2)  # the last column stays free: some terminals wrap there
        lines = draw(ids, self.ids or ids, self.mask_id, self.tokenizer, width, color=not last)
        n = max(rows - 2, 1)
        new = [i for i, line in enumerate(lines) if HIGHLIGHT in line]
        top = min(max(new[-1] - n // 2, 0), len(lines) - n) if new and len(lines) > n else -n
        lines = lines[top:][:n] + [status(step, ids, self.mask_id)[:width]]
        back = f"\x1b[{self.height}A" if self.height else ""
        sys.stderr.write(back + "".join(f"\x1b[2K{line}\n" for line in lines) + "\x1b[J")
        sys.stderr.flush()
        self.step, self.ids, self.height, self.drawn = step, ids, len(lines), time.monotonic()


# ---- web page --------------------------------------------------------------------------------------------------------


def html(history, tokenizer, mask_id, title):
    """A web page (str) that plays the denoising of all samples; it loads nothing else.

    It is player.html with data in it, the only text from outside, which scripts put into the page as text. It starts to
    play when it is opened; as page.html#12 it waits at step 12. Arrow keys step, space plays. An event of the page
    knows the one that it replaced, so going back is as cheap as going forward; a token carries its probability --p and
    the time --t of its reveal, both in [0, 1], from which CSS makes its colour.
    """
    used = {mask_id, *itertools.chain(*history.start), *(event[2] for events in history.events for event in events)}
    pieces = {token: piece(token, mask_id, tokenizer) for token in sorted(used)}
    if tokenizer.unit != "char":
        pieces[mask_id] = 3 * MASK  # about as wide as what will stand there
    events = [[(step, i, token, p if p is None else float(f"{p:.3g}")) for step, i, token, p in events]
              for events in history.events]
    samples = [{"start": start, "events": events} for start, events in zip(history.start, events)]
    data = json.dumps({"title": title, "unit": tokenizer.unit, "mask": mask_id, "steps": history.steps,
                       "pieces": pieces, "samples": samples}, separators=(",", ":"))
    page = (Path(__file__).parent / "player.html").read_text(encoding="utf-8")
    return page.replace("DATA", data.replace("<", "\\u003c"))  # so no text can end the script element


# ---- pictures --------------------------------------------------------------------------------------------------------


COLUMNS = 64  # characters in a row
WHITE, INK, SOFT, BLOCK, NEW = (255, 255, 255), (32, 34, 42), (125, 125, 130), (222, 220, 215), (255, 216, 107)


def pillow(size):
    """(PIL.Image, PIL.ImageDraw, a monospaced font of that size in pixels). Raises UserError without the packages."""
    try:
        from PIL import Image, ImageDraw, ImageFont
        from matplotlib.font_manager import findfont
    except ImportError as error:
        name = "pillow" if error.name == "PIL" else error.name
        raise UserError(f"a picture needs the package {name}: pip install {name}")
    return Image, ImageDraw, ImageFont.truetype(findfont("DejaVu Sans Mono"), size)


def lay_out(pieces):
    """The cells [(row, column)] of the characters of each piece of text; a newline takes a cell and ends the row."""
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
    """At most n different steps from 0 to that of the last event, with equally many events between them."""
    return sorted({0} | {events[len(events) * i // (n - 1) - 1][0] for i in range(1, n) if len(events) * i >= n - 1})


class Sheet:
    """Where a sample's tokens stand in a picture: the finished text is laid out once, at characters, so nothing jumps.

    A mask fills the cells of the token that will come; another token that stood there first is cut or padded to them.
    """

    def __init__(self, history, tokenizer, mask_id, font):
        self.tokenizer, self.mask_id, self.font = tokenizer, mask_id, font
        self.given = [token != mask_id for token in history.start[0]]
        ids = history.state(0, history.steps)
        self.cells = lay_out([piece(token, mask_id, tokenizer) for token in ids])
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


def gif(history, tokenizer, mask_id, seconds=6):
    """The denoising of the first sample as an animated GIF (bytes): it takes `seconds`, stays for 2 s, starts again.

    At most 60 frames with equally many changes between them; new tokens are highlighted. Characters that DejaVu Sans
    Mono lacks are empty boxes.
    """
    Image, ImageDraw, font = pillow(16)
    small = font.font_variant(size=12)
    sheet = Sheet(history, tokenizer, mask_id, font)
    (width, height), margin = sheet.size, 20
    picture = Image.new("RGB", (max(width, 220) + 2 * margin, height + 2 * margin + 28), WHITE)
    draw = ImageDraw.Draw(picture)
    shades = [tuple(a + (b - a) * i // 15 for a, b in zip(paper, ink))  # letters have smooth edges
              for paper, ink in ((WHITE, INK), (NEW, INK), (WHITE, SOFT)) for i in range(16)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(list(itertools.chain(*shades, BLOCK)))

    frames, before, new = [], None, set()
    steps = milestones(history.events[0], 59)
    for step in [*steps, steps[-1]]:  # the last state comes again, to stay without highlights
        ids, old = history.state(0, step), new
        new = {i for i, token in enumerate(ids) if before and token not in (before[i], mask_id)}
        for i, token in enumerate(ids):
            if not before or token != before[i] or i in old:
                sheet.paint(draw, (margin, margin), i, token, INK, NEW if i in new else WHITE)
        draw.rectangle((0, picture.height - margin - 16, picture.width, picture.height), fill=WHITE)
        draw.text((margin, picture.height - margin), status(step, ids, mask_id), SOFT, small, anchor="ls")
        frames.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
        before = ids
    out, pace = io.BytesIO(), max(20, round(100 * seconds / (len(frames) - 1)) * 10)  # GIFs count in 10 ms
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], loop=0,
                   duration=[pace] * (len(frames) - 1) + [2000])
    return out.getvalue()


def png(history, tokenizer, mask_id, moments=4):
    """The denoising of the first sample as a film strip (PNG, bytes): at most `moments` states, one above the other.

    The first one, the last one, and equally many changes between them. Colours tell when a token came; given ones are
    underlined.
    """
    Image, ImageDraw, font = pillow(26)
    from matplotlib import colormaps
    small = font.font_variant(size=19)
    sheet = Sheet(history, tokenizer, mask_id, font)
    (width, height), margin, gap = sheet.size, 40, 64
    steps = milestones(history.events[0], moments)
    picture = Image.new("RGB", (max(width, 420) + 2 * margin, len(steps) * (height + gap) + gap + margin), WHITE)
    draw = ImageDraw.Draw(picture)

    def color(time):  # without the yellow end, which is hard to read on white
        return tuple(round(255 * x) for x in colormaps["plasma"](0.7 * time)[:3])

    y = 0
    for step in steps:
        cells = history.cells(0, step)
        caption = status(step, [token for token, _, _ in cells], mask_id)
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
