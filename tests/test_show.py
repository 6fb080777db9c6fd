"""show.py: the record of a run, the terminal, the web page (in a browser where there is one) and the pictures."""

import colorsys
import html.parser
import io
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata

import pytest
import torch

import show
from data.tokenizer import CharTokenizer, HubTokenizer, definition_of
from hub_models import make
from show import History, Screen, gif, html as page_of, joined, piece, png

NAN = float("nan")
LETTERS = CharTokenizer("abcdefgh \n")
MASK = LETTERS.vocab_size


class Pieces:
    """A tokenizer whose tokens are these strings."""

    unit = "token"

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def hand_made():
    """Two samples of 4 tokens; the first one begins with a given token, and masks one of its tokens again."""
    m = MASK
    history = History(torch.tensor([[7, m, m, m], [m, m, m, m]]), m)
    for xt, p in (([[7, 1, m, m], [m, m, m, 5]], [[NAN, .5, NAN, NAN], [NAN, NAN, NAN, .25]]),
                  ([[7, 1, m, m], [m, m, m, 5]], [[NAN, .9, NAN, NAN], [NAN, NAN, NAN, .9]]),  # nothing new
                  ([[7, m, 2, m], [6, m, m, 5]], [[NAN, NAN, .75, NAN], [1, NAN, NAN, .25]]),
                  ([[7, 0, 2, 3], [6, 4, 3, 2]], [[NAN, .125, .75, 1], [1, NAN, 0, .5]])):
        history.add(torch.tensor(xt), torch.tensor(p))
    return history


def random_history(text, steps, tokenizer, mask_id, given=0):
    """A text that emerges in random order from masks; the first tokens are given. text: ids."""
    x0, generator = torch.tensor([text, text[::-1]]), torch.Generator().manual_seed(0)
    at = torch.randint(1, steps + 1, x0.shape, generator=generator)
    at[:, :given] = 0
    p = torch.rand(x0.shape, generator=generator)
    history = History(x0.masked_fill(at > 0, mask_id), mask_id)
    for step in range(1, steps + 1):
        history.add(x0.masked_fill(at > step, mask_id), p.masked_fill((at > step) | (at == 0), NAN))
    return history


# ---- the record ------------------------------------------------------------------------------------------------------


def test_history():
    """Only changes are events; masks return; what a redrawn token was before does not count in the end."""
    history = hand_made()
    m = MASK
    assert history.steps == 4 and history.start == [[7, m, m, m], [m, m, m, m]]
    assert history.events[0] == [(1, 1, 1, .5), (3, 1, m, None), (3, 2, 2, .75), (4, 1, 0, .125), (4, 3, 3, 1)]
    assert [history.state(0, step) for step in range(5)] == [
        [7, m, m, m], [7, 1, m, m], [7, 1, m, m], [7, m, 2, m], [7, 0, 2, 3]]
    assert history.state(1, 3) == [6, m, m, 5] and history.state(1, 99) == [6, 4, 3, 2]
    assert history.revealed(0) == [0, 4, 3, 4] and history.confidence(0) == [None, .125, .75, 1]
    assert history.revealed(1) == [3, 4, 4, 4] and history.confidence(1) == [1, None, 0, .5]


def test_history_of_a_state_that_is_written_over():
    """A sampler may reuse its tensor; masks that are left have no step."""
    xt = torch.tensor([[MASK, MASK, 3]])
    history = History(xt, MASK)
    for i in (0, 1):
        xt[0, 0] = i
        history.add(xt, torch.tensor([[.5, NAN, NAN]]))
    assert history.events == [[(1, 0, 0, .5), (2, 0, 1, .5)]]
    assert history.revealed(0) == [2, None, 0] and history.confidence(0) == [.5, None, None]


# ---- terminal --------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal's stderr, with a clock of its own that time.sleep moves. picture() is what it shows."""

    def __init__(self, monkeypatch, columns, rows):
        super().__init__()
        self.columns, self.rows, self.now, self.slept = columns, rows, 100.0, 0.0
        monkeypatch.setattr(sys, "stderr", self)
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *args: os.terminal_size((columns, rows)))
        monkeypatch.setattr(show.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(show.time, "sleep", self.sleep)

    def sleep(self, seconds):
        assert seconds >= 0
        self.now, self.slept = self.now + seconds, self.slept + seconds

    def isatty(self):
        return True

    def picture(self):
        """The lines on the screen, the cursor in the last; fails if a line is too wide or the cursor leaves the top."""
        lines, y = [""], 0
        for code, text, end in re.findall(r"(\x1b\[[\d;]*[A-Zm])|([^\x1b\n]+)|(\n)", self.getvalue()):
            if code.endswith("A"):
                y -= int(code[2:-1])
                assert y >= max(0, len(lines) - self.rows), "the cursor cannot go where it is meant to"
            elif code.endswith("K"):
                lines[y] = ""
            elif code.endswith("J"):
                lines[y:] = [""]
            elif end:
                y += 1
                lines += [""] * (y == len(lines))
            lines[y] += text
            width = sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) == "W")
                        for c in lines[y])
            assert width < self.columns and not re.search(r"[\x00-\x1f\x7f-\x9f]", lines[y])
        return lines


def play(screen, history):
    for step in range(history.steps + 1):
        screen.show(step, history.state(0, step))
    screen.show(history.steps, history.state(0, history.steps), last=True)


@pytest.mark.parametrize("columns, rows, shown", [(200, 24, 79), (80, 24, 79), (20, 24, 19), (20, 5, 19), (20, 3, 19)])
def test_screen(monkeypatch, columns, rows, shown):
    """Frames replace each other whatever the size; of a text that is too long the end is shown."""
    text = "".join("abcdefgh"[i * i % 8] for i in range(200))
    history = random_history(LETTERS.encode(text).tolist(), 30, LETTERS, MASK)
    terminal = Terminal(monkeypatch, columns, rows)
    screen = Screen(MASK, LETTERS)
    screen.show(0, history.start[0])
    assert terminal.picture()[0] in ("░" * shown, "░" * (200 % shown)) and "step 0, 200 masks" in terminal.picture()[-2]
    play(screen, history)
    lines = [text[i:i + shown] for i in range(0, 200, shown)][-(rows - 2):]
    assert terminal.picture() == [*lines, "step 30, 0 masks left"[:shown], ""]
    assert show.HIGHLIGHT in terminal.getvalue()


def test_spaces_between_words():
    """The pieces of BERT's tokens, whose text has no space before its first word, have the spaces between them."""
    tokenizer = HubTokenizer(definition_of(make("bert")[1]))
    ids = tokenizer.encode("the cat sat on the mat").tolist()
    assert "".join(piece(token, MASK, tokenizer) for token in ids) == " the cat sat on the mat"


def test_screen_highlights_what_is_new(monkeypatch):
    """In a frame the tokens that came since the last one, as runs; nothing in the last."""
    terminal = Terminal(monkeypatch, 80, 24)
    screen = Screen(MASK, LETTERS)
    frames = []
    for step, ids in enumerate(([MASK] * 4, [0, MASK, MASK, MASK], [0, 1, 2, MASK], [0, MASK, 2, 3])):
        screen.show(step, ids, last=step == 3)
        frames.append(terminal.getvalue().split("\x1b[2K")[-2].rstrip("\n"))
    assert frames == ["░░░░", "\x1b[1;32ma\x1b[0m░░░", "a\x1b[1;32mbc\x1b[0m░", "a░cd"]


def test_screen_survives_strange_tokens(monkeypatch):
    """Newlines, control characters, wide and combining ones, and pieces of a character."""
    tokenizer = Pieces("a", "\n", "\x1b[2J\r\t", "漢字", "e\u0301", "\ufffd", "\u202e", "\u2028")
    history = random_history([0, 1, 2, 3, 4, 5, 6, 7] * 6, 20, tokenizer, 8)
    terminal = Terminal(monkeypatch, 20, 24)
    play(Screen(8, tokenizer), history)
    shown = "".join(terminal.picture()[:-2])
    assert shown == "a⏎·[2J··漢字e\u0301\ufffd· " * 6 and len(terminal.picture()) > 5


@pytest.mark.parametrize("n, steps", [(16, 4), (128, 1000), (1024, 1000), (128, 20_000)])
def test_screen_waits_for_the_viewer_but_not_for_ever(monkeypatch, n, steps):
    """Frames are 1/25 s apart; a fast run takes 12 s at most, a slow one not longer than it would."""
    terminal = Terminal(monkeypatch, 80, 24)
    screen, times = Screen(MASK, LETTERS), []
    redraw = screen.redraw
    screen.redraw = lambda *args: (redraw(*args), times.append(terminal.now))

    def run(seconds):
        ids = [MASK] * n
        for step in range(steps + 1):
            for i in range(n * (step - 1) // steps if step else 0, n * step // steps):
                ids[i] = i % 8
            terminal.now += seconds
            screen.show(step, list(ids))
        screen.show(steps, ids, last=True)

    run(0)
    assert terminal.slept <= 12 and all(b - a >= 0.0399 for a, b in zip(times, times[1:]))
    assert len(times) >= min(n, steps, 200)
    terminal.slept = 0
    screen.ids = None
    run(0.05)
    assert terminal.slept < 0.05  # for the last frame


def test_screen_of_a_sampler_that_masks_again(monkeypatch):
    """A sampler that masks tokens again and again does not make the display wait."""
    terminal = Terminal(monkeypatch, 80, 24)
    screen = Screen(MASK, LETTERS)
    for step in range(10_000):
        screen.show(step, [MASK if (i + step) % 3 else 1 for i in range(99)])
    assert terminal.slept < 1


def test_plain_lines(capsys):
    """Where stderr is no terminal some ten states are printed, first and last included, and no codes."""
    history = random_history(LETTERS.encode("abcdefgh" * 16).tolist(), 200, LETTERS, MASK)
    play(Screen(MASK, LETTERS), history)
    out = capsys.readouterr().err
    states = re.findall(r"step (\d+), (\d+) masks? left\n(.*)\n(.*)\n", out)
    left = [int(masks) for _, masks, *_ in states]
    assert "\x1b" not in out and 9 <= len(states) <= 12 and left == sorted(set(left), reverse=True)
    assert states[0][:3] == ("0", "128", "░" * 79) and left[-1] == 0 and "".join(states[-1][2:]) == "abcdefgh" * 16
    assert all(masks == (one + two).count("░") for masks, (*_, one, two) in zip(left, states))


@pytest.mark.parametrize("steps", [9, 10])
def test_every(monkeypatch, steps):
    """every=n prints each n-th state, the first and the last once each, also on a terminal."""
    history = random_history([0] * 8, steps, LETTERS, MASK)
    terminal = Terminal(monkeypatch, 80, 24)
    play(Screen(MASK, LETTERS, every=5), history)
    assert re.findall(r"step (\d+)", terminal.getvalue()) == ["0", "5", str(steps)]
    assert "\x1b" not in terminal.getvalue() and terminal.slept == 0


@pytest.mark.parametrize("every, steps", [(1, [0, 3, 5]), (2, [0, 4, 6])])
def test_states_that_are_not_new_are_not_printed_again(monkeypatch, every, steps):
    """Steps 1, 2 and 4 reveal nothing. With every=2 the state of step 3 is due at step 4, and that of step 5 at 6."""
    terminal = Terminal(monkeypatch, 80, 24)
    screen = Screen(MASK, LETTERS, every)
    for step, ids in ((0, [MASK] * 2), (3, [0, MASK]), (5, [0, 1]), (9, [0, 1])):
        screen.show(step, ids)
    screen.show(9, [0, 1], last=True)
    assert re.findall(r"step (\d+)", terminal.getvalue()) == list(map(str, steps))


# ---- web page --------------------------------------------------------------------------------------------------------


HOSTILE = Pieces("</script><script>document.title='owned'</script>", "<!--", "&amp;", "\"'", "<b>x</b>", "\n", "ok")


class Reader(html.parser.HTMLParser):
    """The elements of a page, and the text of each kind."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], {}
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags:
            self.text.setdefault(self.tags[-1][0], []).append(data)


def test_page():
    """One page that loads nothing, with the whole record in it."""
    history = hand_made()
    page = page_of(history, LETTERS, "a title")
    assert not re.search(r"https?://|src=|<link|url\(|@import|innerHTML", page)
    reader = Reader(page)
    data = json.loads(reader.text["script"][0])
    assert data["title"] == "a title" and data["steps"] == 4 and data["mask"] == MASK and data["unit"] == "char"
    assert [sample["start"] for sample in data["samples"]] == history.start
    assert [[tuple(event) for event in sample["events"]] for sample in data["samples"]] == history.events
    assert data["pieces"] == {"0": "a", "1": "b", "2": "c", "3": "d", "4": "e", "5": "f", "6": "g", "7": "h", "10": "░"}


def test_no_text_breaks_out_of_the_page():
    """Tokens and title that look like HTML arrive as they are, and add no element."""
    title = "</title></script><script>alert(1)</script>"
    history = random_history(list(range(7)), 3, HOSTILE, 7)
    page = page_of(history, HOSTILE, title)
    assert len(Reader(page).tags) == len(Reader(page_of(hand_made(), LETTERS, "")).tags)
    data = json.loads(Reader(page).text["script"][0])
    assert data["title"] == title and [data["pieces"][str(i)] for i in range(7)] == list(HOSTILE.pieces)


BROWSERS = ("chromium-headless-shell", "headless_shell", "chromium", "chromium-browser", "google-chrome",
            "google-chrome-stable", "/usr/lib/chromium/chromium-headless-shell", "/usr/lib/chromium/chromium")

# Does what a viewer does, and notes what is to be seen, once per line of `acts`.
VIEWER = r"""
<script>
const see = () => ({
  texts: [...document.querySelectorAll("main p")].map(p => p.textContent),
  kinds: [...document.querySelectorAll("main p")].map(p => [...p.children].map(span => span.classList[0])),
  titles: [...document.querySelector("main p").children].map(span => span.title),
  places: [...document.querySelector("main p").children].map(span => [span.offsetLeft, span.offsetTop]),
  background: getComputedStyle(document.querySelector("main .token") || document.body).backgroundColor,
  left: [...document.querySelectorAll("h2 span:last-child")].map(span => span.textContent),
  status: get("status").textContent, button: get("play").textContent, slider: get("step").value,
  page: document.title, heading: document.querySelector("h1").textContent,
  elements: document.querySelectorAll("*").length,
});
const slide = to => { get("step").value = to; get("step").dispatchEvent(new Event("input", {bubbles: true})); };
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const choose = (id, value) => { get(id).value = value; get(id).dispatchEvent(new Event("change", {bubbles: true})); };
const wait = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
(async () => {
  const seen = [see()];
  for (const act of [ACTS]) {
    await act();
    seen.push(see());
  }
  document.body.appendChild(document.createElement("pre")).textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
})();
</script>
"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function (page, acts) -> what is to be seen before and after each of the acts, in headless Chromium."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium here: Debian's package chromium-headless-shell has one")

    def browse(page, *acts):
        folder = tmp_path_factory.mktemp("page")
        (folder / "page.html").write_text(page.replace("</body>", VIEWER.replace("ACTS", ", ".join(
            f"() => {act}" for act in acts)) + "</body>"))
        result = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
             "--no-first-run", "--disable-component-update", "--disable-sync", "--disable-quic",
             f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=60000", "--dump-dom",
             (folder / "page.html").as_uri()],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=180)
        dumped = "".join(Reader(result.stdout).text.get("pre", []))
        assert dumped.count("SEEN") == 2, result.stderr[-2000:]
        return json.loads(dumped.split("SEEN")[1])
    return browse


def test_page_in_a_browser(browse):
    """Slider, keys, button and colours of the hand-made record: each state as History has it, forwards and back."""
    history = hand_made()
    seen = browse(page_of(history, LETTERS, "hand-made"), "slide(3)", "slide(1)", "press('ArrowRight')",
                  "press('End')", "press('ArrowRight')", "press('ArrowLeft')", "press('Home')", "press('ArrowLeft')",
                  "press(' ')", "wait(20)", "choose('color', 't')", "choose('color', '')", "get('play').click()",
                  "wait(0.9)", "get('play').click()", "choose('speed', '4') || get('play').click()", "wait(0.5)")
    (start, at3, at1, at2, end, beyond, back, home, before, playing, played, timed, plain, again, half, paused, fast,
     done) = seen

    def text(step):
        return ["".join("░" if token == MASK else LETTERS.decode([token]) for token in history.state(b, step))
                for b in range(2)]

    assert start["button"] == "Pause" and start["page"] == start["heading"] == "hand-made"  # it plays when opened
    for state, step in ((start, 0), (at3, 3), (at1, 1), (at2, 2), (end, 4), (beyond, 4), (back, 3), (home, 0),
                        (before, 0), (played, 4), (again, 0), (done, 4)):
        left = "".join(text(step)).count("░")
        assert state["texts"] == text(step) and state["slider"] == str(step)
        assert state["status"] == f"step {step} of 4, {left} mask{'' if left == 1 else 's'} left"
        assert [int((words or "0").split()[0]) for words in state["left"]] == [t.count("░") for t in text(step)]
    assert at3["kinds"] == [["given", "mask", "token", "mask"], ["token", "mask", "mask", "token"]]
    assert at3["titles"] == ["given", "masked", "probability 0.75, step 3", "masked"]
    assert end["titles"] == ["given", "probability 0.125, step 4", "probability 0.75, step 3", "probability 1, step 4"]
    assert at3["button"] == back["button"] == "Play" and playing["button"] == "Pause" and played["button"] == "Play"
    assert len({state["background"] for state in (played, timed, plain)}) == 3
    assert again["button"] == half["button"] == fast["button"] == "Pause" and paused["button"] == "Play"
    shown = int(half["slider"])  # 1.6 s for 4 steps, if the browser is in time
    assert half["slider"] == paused["slider"] and shown in (2, 3) and half["texts"] == text(shown)


def test_places_in_a_browser(browse):
    """A character stands where its mask stood, spaces at the ends of lines included; a newline starts a line."""
    history = random_history(LETTERS.encode("abcdefg  hgfedcba " * 24).tolist(), 3, LETTERS, MASK)
    first, last = browse(page_of(history, LETTERS, ""), "slide(3)")
    for one, other in zip(first["places"], last["places"]):
        assert one == pytest.approx(other, abs=3)  # a token may be a little higher than a mask; a line has 28 pixels
    assert last["places"][-1][1] > last["places"][0][1] + 100
    *_, last = browse(page_of(random_history([0, 9, 1], 3, LETTERS, MASK), LETTERS, ""), "slide(3)")
    (left, top), _, (below_left, below_top) = last["places"]
    assert left == below_left and top < below_top


def test_hostile_tokens_in_a_browser(browse):
    """They are text on the page and nothing else."""
    history = random_history(list(range(7)), 3, HOSTILE, 7)
    first, last = browse(page_of(history, HOSTILE, "<i>title</i>"), "slide(3)")
    assert last["texts"] == [HOSTILE.decode(range(7)), HOSTILE.decode(range(6, -1, -1))]
    assert first["texts"] == ["░░░" * 7] * 2 and last["page"] == last["heading"] == "<i>title</i>"
    assert first["elements"] == last["elements"]


# ---- pictures --------------------------------------------------------------------------------------------------------


def pixels(picture, color):
    """How many pixels of an RGB picture have this color."""
    return sum(n for n, other in picture.getcolors(10**6) if other == color)


LONG = LETTERS.encode(("abc defg\n" + "hgfedcba " * 30)[:256]).tolist()


def frames(image):
    """Its frames in RGB, and how many ms each one stays."""
    pictures, times = [], []
    for i in range(image.n_frames):
        image.seek(i)
        times.append(image.info["duration"])
        pictures.append(image.convert("RGB"))
    return pictures, times


def test_gif():
    """At most 60 frames that take as long as asked for, then 2 s of the text; small, the same each time."""
    Image = pytest.importorskip("PIL.Image")
    history = random_history(LONG, 200, LETTERS, MASK, given=4)
    content = gif(history, LETTERS, seconds=3)
    assert content == gif(history, LETTERS, seconds=3) and len(content) < 500_000
    image = Image.open(io.BytesIO(content))
    pictures, times = frames(image)
    assert 40 <= len(pictures) <= 60 and image.info["loop"] == 0 and image.width < 800
    assert times[-1] == 2000 and sum(times[:-1]) == pytest.approx(3000, rel=0.1)
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
    blocks = [pixels(picture, show.BLOCK) for picture in pictures]
    assert blocks[0] > 1.5 * blocks[len(pictures) // 2] > 100 * blocks[-1]  # letters have a little of it
    assert pixels(pictures[0], show.NEW) == pixels(pictures[-1], show.NEW) == 0 < pixels(pictures[20], show.NEW)


def test_tokens_keep_their_place():
    """Given tokens look the same in all frames; a newline takes a cell and ends the row, so nothing moves."""
    Image = pytest.importorskip("PIL.Image")
    image = Image.open(io.BytesIO(gif(random_history(LONG, 20, LETTERS, MASK, given=4), LETTERS)))
    corners = set()
    for i in range(image.n_frames):
        image.seek(i)
        corners.add(image.convert("RGB").crop((0, 0, 20 + 4 * 10, 20 + 26)).tobytes())
    assert len(corners) == 1
    assert show.lay_out(["ab", "\n\n", "c" * 65]) == [
        [(0, 0), (0, 1)], [(0, 2), (1, 0)], [*((2, i) for i in range(64)), (3, 0)]]


def test_png():
    """As many states as asked for, each as high as the text; those in between are different."""
    Image = pytest.importorskip("PIL.Image")
    history = random_history(LONG, 200, LETTERS, MASK, given=4)
    images = [Image.open(io.BytesIO(png(history, LETTERS, moments=n))) for n in (2, 3, 4)]
    assert png(history, LETTERS) == png(history, LETTERS)
    heights = [image.height for image in images]
    assert heights[2] - heights[1] == heights[1] - heights[0] > 5 * 26 and len({image.width for image in images}) == 1
    image, strip = images[2].convert("RGB"), heights[2] - heights[1]
    states = [image.crop((0, i * strip, image.width, (i + 1) * strip)) for i in range(4)]
    blocks = [pixels(state, show.BLOCK) for state in states]
    assert 100 * blocks[3] < blocks[2] < blocks[1] < blocks[0]
    assert blocks[1] / blocks[0] == pytest.approx(2 / 3, abs=0.05)
    colors = [colorsys.rgb_to_hsv(*color) for _, color in states[3].getcolors(10**6)]
    assert len({round(10 * hue) for hue, saturation, _ in colors if saturation > 0.6}) >= 4  # from blue to orange


def test_pictures_of_odd_runs():
    """One step; nothing to do; masks left; tokens of other lengths in between; an empty piece of text."""
    Image = pytest.importorskip("PIL.Image")
    tokenizer, m = Pieces("a", "longer", "\n", "", "漢"), 5
    for states in ([[m, m]], [[m, m], [0, 1]], [[m, m], [1, m], [m, m], [0, m]], [[2, m], [2, 3]], [[3]], [[0, 4]]):
        history = History(torch.tensor(states[:1]), m)
        for state in states[1:]:
            history.add(torch.tensor([state]), torch.full((1, len(state)), 0.5))
        for content in (gif(history, tokenizer), png(history, tokenizer)):
            Image.open(io.BytesIO(content)).load()


def test_milestones():
    """Evenly many changes between them, from nothing to all."""
    events = [(step, 0, 0, None) for step in range(1, 101)]
    assert show.milestones(events, 5) == [0, 25, 50, 75, 100]
    assert show.milestones(events[:3], 60) == [0, 1, 2, 3] and show.milestones([], 4) == [0]
    assert show.milestones([(7, i, 0, None) for i in range(9)], 4) == [0, 7]


def test_joined():
    """Samples of several histories in another order, of different lengths and numbers of steps."""
    M = MASK
    one, two = History(torch.tensor([[M, 1], [2, M]]), M), History(torch.tensor([[M, M, 3]]), M)
    one.add(torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.5, torch.nan], [torch.nan, 0.25]]))
    for xt in ([[M, 2, 3]], [[1, 2, 3]]):
        two.add(torch.tensor(xt), torch.full((1, 3), 0.75))
    whole = joined([one, two], [2, 0, 1])
    assert whole.steps == 2 and whole.start == [[M, M, 3], [M, 1], [2, M]]
    assert [whole.state(b, 2) for b in range(3)] == [[1, 2, 3], [0, 1], [2, 0]]
    assert [whole.revealed(b) for b in range(3)] == [[2, 1, 0], [1, 0], [0, 1]]
    assert one.start == [[M, 1], [2, M]]


def test_one_sample_does_not_look_at_all_others(monkeypatch):
    """The record of one sample is read without those of the others. With them, 60,000 samples took minutes."""
    history = History(torch.tensor([[2, 2], [2, 0]]), mask_id=2)
    history.add(torch.tensor([[1, 2], [1, 0]]), torch.full((2, 2), 0.5), torch.tensor([1, 4]))
    history.add(torch.tensor([[1, 1], [1, 0]]), torch.full((2, 2), 0.25), torch.tensor([2, 0]))
    monkeypatch.setattr(History, "steps", None)
    assert [history.final(b) for b in (0, 1)] == [[1, 1], [1, 0]]
    assert [history.revealed(b) for b in (0, 1)] == [[1, 3], [4, 0]]
    assert [history.confidence(b) for b in (0, 1)] == [[0.5, 0.25], [0.5, None]]
