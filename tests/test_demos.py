"""demos.py: the numbers it prints, computed once more in another way, and what it refuses."""

import math
import re
from dataclasses import asdict

import pytest
import torch

import checkpoint
import storage
from commands import assert_one_line
from configs import Config
from data.tokenizer import KNOWN, make_tokenizer
from randomness import uniforms
from schedules import SCHEDULES

TEXT8 = make_tokenizer(KNOWN["text8"])
TEXT, L, V = "the cat sat on the log", 22, 27


def demo(call, *args):
    result = call("demos.py", *args)
    assert result.code == 0 and result.err == "", result.err
    return result.out


def numbers(text, pattern):
    """The numbers that stand where the pattern, with # for each of them, is found."""
    found = re.search(re.escape(pattern).replace(r"\#", r"(-?[\d.,]+|inf)"), text)
    assert found, text
    return [float(group.replace(",", "")) for group in found.groups()]


def table(text):
    """{position: (token, seen, [numbers])} of the table that `loss` prints."""
    rows = re.findall(r"^ *(\d+) +'(.)' +'(.)' *(.*)$", text, re.M)
    return {int(i): (token, seen, [float(x) for x in rest.split()]) for i, token, seen, rest in rows}


@pytest.fixture
def untrained(tmp_path):
    """A checkpoint of a small network with random weights, on text8's symbols: settings of Config -> (path, network).
    """
    def make(**settings):
        config = Config(n_layer=1, n_head=2, n_embd=16, n_cond=8, seq_len=32, **settings)
        torch.manual_seed(0)
        model = config.make_model(V)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.4 * torch.randn_like(p))
        state = {name: p.detach() for name, p in model.named_parameters()}
        storage.save(tmp_path / "ckpt.pt", {"name": "x", "config": asdict(config), "meta": KNOWN["text8"], "step": 0,
                                            "model": state, "ema": state})
        return tmp_path / "ckpt.pt", model.eval()
    return make


def drawn_v(seed=0):
    return uniforms(seed, 0, [0], 1, L, False)[1][0]


def logits_at(model, xt, t):
    with torch.no_grad():
        return model(xt[None], torch.tensor([t], dtype=torch.float32))[0].double()


# ---- caesar, perturb, noise ------------------------------------------------------------------------------------------


def test_caesar(call, trained):
    """Every id plus n, modulo the vocabulary of ASCII, or of a checkpoint; back again is the text."""
    out = demo(call, "caesar", "Hal ~", "-n", 1)
    assert "  Hal ~\n  Ibm! \n" in out and "5 of 5 tokens differ" in out
    assert "  Ibm! \n  Hal ~\n" in demo(call, "caesar", "Ibm! ", "-n", -1)
    assert "  zoe a\n   pfab\n" in demo(call, "caesar", "zoe a", "-m", trained)
    assert "  Zo\u00eb\n" in demo(call, "caesar", "Zo\u00eb")  # what ASCII lacks is in the alphabet, too


@pytest.mark.parametrize("schedule,alpha", [("linear", 0.65), ("cosine", 1 - math.cos(math.pi / 2 * 0.65)),
                                            ("loglinear", 1 - 0.999 * 0.35),
                                            ("geometric:0.1:10", math.exp(-0.1 * 100**0.35))])
def test_perturb(call, schedule, alpha):
    """The numbers by their definitions; the tokens whose own random number is at most 1 - alpha are absorbed."""
    out = demo(call, "perturb", TEXT, "-t", 0.35, "--schedule", schedule, "--seed", 4)
    assert numbers(out, "probability alpha(t) = #") == [pytest.approx(alpha, abs=6e-5)]
    assert numbers(out, "sigma(t) = -log alpha(t) = #,") == [pytest.approx(-math.log(alpha), abs=6e-5)]
    hit = [v <= 1 - alpha for v in drawn_v(4).tolist()]
    assert numbers(out, "e^-sigma(t) = #: of # tokens # ± ") == pytest.approx([1 - alpha, L, round(L * (1 - alpha), 1)],
                                                                              abs=6e-5)
    assert "  " + "".join("\u2591" if h else c for c, h in zip(TEXT, hit)) + "\n" in out
    moved = [(str(i), c) for i, (c, h) in enumerate(zip(TEXT, hit)) if h]
    assert re.findall(r"(\d+) '(.)'", out) == moved


def test_perturb_with_random_tokens(call, trained):
    """Replaced are the same tokens; by others of the vocabulary, maybe by themselves. With larger t more are."""
    before = set()
    for t in (0.1, 0.4, 1):
        out = demo(call, "perturb", TEXT, "-t", t, "--noise", "uniform", "-m", trained)
        moves = {int(i): (a, b) for i, a, b in re.findall(r"(\d+) '(.)' -> '(.)'", out)}
        assert moves.keys() == {i for i, v in enumerate(drawn_v().tolist()) if v <= t} and before <= moves.keys()
        seen = "".join(moves[i][1] if i in moves else c for i, c in enumerate(TEXT))
        assert f"  {TEXT}\n  {seen}\n" in out and set(seen) <= set(TEXT8.alphabet)
        before = moves.keys()
    assert len(before) == L


def test_perturb_with_masks_and_random_tokens(call, untrained):
    """Masks and other tokens, in the shares of the checkpoint; each token that moved is named with what it became. In
    the table of `loss` every token has a cost."""
    path, _ = untrained(noise="hybrid", objective="mdlm", conditioning="none", uniform_share=0.5)
    for flags, few in (["-m", path], False), (["--noise", "hybrid"], True):
        out = demo(call, "perturb", TEXT, "-t", 0.6, *flags)
        moves = dict(re.findall(r"(\d+) '.' -> '(.)'", out))
        assert {int(i) for i in moves} == {i for i, v in enumerate(drawn_v().tolist()) if v <= 0.6}
        masks = [c for c in moves.values() if c == "\u2591"]
        assert (len(masks) > len(moves) / 2) == few and 0 < len(masks)
    out = demo(call, "loss", TEXT, "-m", path, "-t", 0.6)
    assert "Masks are noise, but nothing shows which of the other tokens are" in out
    assert len(table(out)) == L and all(len(costs) == 2 and costs[0] > 0 for _, _, costs in table(out).values())


def test_noise(call, tmp_path):
    """The table is that of the definitions, for one more schedule, too; the picture is a PNG."""
    out = demo(call, "noise", "--out", tmp_path / "n.png", "--schedule", "geometric:0.1:10")
    assert (tmp_path / "n.png").read_bytes()[:4] == b"\x89PNG"
    rows = {(name, float(t)): list(map(float, rest.split()))
            for name, t, rest in re.findall(r"^ *([\w:.]+) +(\d\.\d\d) +(.*)$", out, re.M)}
    assert len(rows) == 7 * (len(SCHEDULES) + 1)
    alphas = {"linear": lambda t: 1 - t, "cosine": lambda t: 1 - math.cos(math.pi / 2 * (1 - t)),
              "loglinear": lambda t: 1 - 0.999 * t, "geometric": lambda t: math.exp(-1e-4 * 2e5**t),
              "geometric:0.1:10": lambda t: math.exp(-0.1 * 100**t)}
    for (name, t), (alpha, sigma, weight) in ((key, row) for key, row in rows.items() if key[0] in alphas):
        a, h = alphas[name], 1e-6
        slope = (a(min(t + h, 1)) - a(t - h)) / (min(t + h, 1) - t + h)
        assert alpha == pytest.approx(a(t), abs=6e-5)
        assert sigma == (pytest.approx(-math.log(a(t)), abs=6e-5) if a(t) > 0 else math.inf)
        assert weight == pytest.approx(-slope / (1 - a(t)), rel=1e-3, abs=1e-4)


# ---- loss ------------------------------------------------------------------------------------------------------------


def test_loss_of_a_masked_model(call, trained):
    """CE, its weight 1/t and score entropy, by a network call of this test's own; their sum; nothing at visible tokens.
    """
    t = 0.4
    out = demo(call, "loss", TEXT, "-m", trained, "-t", t, "--seed", 2)
    x0, hit = torch.tensor(TEXT8.encode(TEXT).astype(int)), drawn_v(2) <= t
    p = logits_at(checkpoint.load_model(trained, "cpu").model, torch.where(hit, V, x0), t).softmax(-1)
    rows, total = table(out), 0.0
    assert numbers(out, "weight = #:") == [1 / t] and len(rows) == L
    assert "  " + "".join("\u2591" if h else c for c, h in zip(TEXT, hit)) + "\n" in out
    for i, (token, seen, found) in rows.items():
        assert token == TEXT[i] and seen == ("\u2591" if hit[i] else TEXT[i])
        bits = -math.log2(p[i, x0[i]])
        total += bits / t * hit[i].item()
        assert found == (pytest.approx([p[i, x0[i]].item(), bits, bits / t, bits / t], abs=2e-3) if hit[i] else [])
    assert numbers(out, "the sum is #, # per token") == pytest.approx([total, total / L], abs=1e-2)


@pytest.mark.parametrize("scaled", [True, False])
def test_loss_of_scores(call, untrained, scaled):
    """SEDD: score entropy by its formula, from the scores: weight x CE and the penalty, which adds up to the sum."""
    path, model = untrained(objective="sedd", schedule="loglinear", conditioning="sigma", scale_by_sigma=scaled)
    t, out = 0.7, demo(call, "loss", TEXT, "-m", path, "-t", 0.7)
    alpha = 1 - 0.999 * t
    x0, hit = torch.tensor(TEXT8.encode(TEXT).astype(int)), drawn_v() <= 1 - alpha
    dsigma, r = 0.999 / alpha, alpha / (1 - alpha)
    log_s = logits_at(model, torch.where(hit, V, x0), t) + (math.log(r) - math.log(V) if scaled else 0)
    rows, total = table(out), 0.0
    for i in hit.nonzero().flatten().tolist():
        entropy = dsigma * (log_s[i].exp().sum() - r * log_s[i, x0[i]] + r * (math.log(r) - 1)) / math.log(2)
        p, ce, weighted, found, z, penalty = rows[i][2]
        assert found == pytest.approx(entropy.item(), rel=1e-3) and found == pytest.approx(weighted + penalty, rel=1e-3)
        assert z == pytest.approx((log_s[i].exp().sum() / r).item(), rel=1e-3) and p == pytest.approx(2**-ce, abs=1e-3)
        total += entropy.item()
    assert numbers(out, "the sum is #,") == [pytest.approx(total, rel=1e-3)]


@pytest.mark.parametrize("objective", ["mdlm", "sedd"])
def test_loss_of_uniform_noise(call, untrained, objective):
    """Score entropy at every position, as the sum over all other tokens: that of the numbers printed, and their sum."""
    path, model = untrained(objective=objective, noise="uniform", schedule="loglinear", conditioning="sigma")
    t, out = 0.6, demo(call, "loss", TEXT, "-m", path, "-t", 0.6)
    alpha, rows, total = 1 - 0.999 * t, table(out), 0.0
    x0, xt = (TEXT8.encode("".join(row[which] for row in rows.values())).astype(int).tolist() for which in (0, 1))
    logits = logits_at(model, torch.tensor(xt), t)
    q = lambda y, i: alpha * (y == x0[i]) + (1 - alpha) / V
    for i, z in enumerate(xt):
        s = logits[i].exp() if objective == "sedd" else (V * alpha * logits[i].softmax(-1) + 1 - alpha)
        cost = 0.0
        for y in set(range(V)) - {z}:
            r, score = q(y, i) / q(z, i), (s[y] if objective == "sedd" else s[y] / s[z]).item()
            cost += (score - r * math.log(score) + r * (math.log(r) - 1)) / V / math.log(2)
        assert rows[i][2] == pytest.approx([cost, 0.999 / alpha * cost], rel=2e-3, abs=1e-3)
        total += 0.999 / alpha * cost
    assert numbers(out, "the sum is #,") == [pytest.approx(total, rel=1e-3)]


@pytest.mark.parametrize("settings", [dict(conditioning="step", T=40), dict(conditioning="step", T=40, noise="uniform"),
                                      dict(objective="mdlm", conditioning="none", prefix="fixed:4"),
                                      dict(objective="mdlm", conditioning="time", schedule="cosine")])
def test_loss_adds_up(call, untrained, settings):
    """Chains of T steps, a prefix that is given, another schedule: the column adds up to the sum, per token of those
    that are not given."""
    path, _ = untrained(**settings)
    out = demo(call, "loss", TEXT, "-m", path, "-t", 0.5, "--draws", 4)
    column = 1 if settings.get("noise") else 2
    free = L - 4 * ("prefix" in settings)
    total = sum(row[2][column] for row in table(out).values() if row[2])
    assert numbers(out, "the sum is #, # per token") == pytest.approx([total, total / free], rel=1e-3)
    assert numbers(out, " of #\nsigma") == [free]
    assert all(not row[2] for i, row in table(out).items() if i < L - free)


def test_loss_at_the_ends(call, untrained):
    """At t = 1, where sigma is infinite, and where no token happens to be masked."""
    path, _ = untrained(objective="mdlm", conditioning="none")
    out = demo(call, "loss", TEXT, "-m", path, "-t", 1)
    assert len([row for row in table(out).values() if row[2]]) == L and "nan" not in out
    rows = table(out).values()
    assert all(row[2][3] == pytest.approx(row[2][2], abs=2e-3) for row in rows)  # score entropy has its limit
    assert numbers(demo(call, "loss", "a", "-m", path, "-t", 1e-6), "the sum is #,") == [0]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_refuses(call, trained, untrained, tmp_path):
    """Whatever is wrong is one line, and exit code 2."""
    def refuse(words, *args):
        assert_one_line(call("demos.py", *args), *words)

    refuse(["unknown demo", "caesar"], "cesar")
    for name in ("caesar", "perturb", "loss"):
        refuse(["TEXT", "empty"], name, "")
        refuse(["'\u00e9'", "alphabet"], name, "caf\u00e9", "-m", trained)
        refuse(["no checkpoint"], name, "a", "-m", tmp_path / "none")
    for t in ("0", "1.5", "-1", "nan", "x"):
        refuse(["-t"], "perturb", "a", f"-t={t}")
    refuse(["hyperbolic", "geometric"], "perturb", "a", "--schedule", "hyperbolic")
    refuse(["geometric"], "noise", "--schedule", "geometric:2:1")
    refuse(["folder that does not exist"], "noise", "--out", tmp_path / "no" / "n.png")
    refuse(["n.jpg"], "noise", "--out", tmp_path / "n.jpg")
    refuse(["-m pretrained/prose"], "loss", "a")
    refuse(["33 tokens", "32"], "loss", "a" * 33, "-m", trained)
    refuse(["--sed", "did you mean"], "perturb", "a", "--sed", "1")
    path, _ = untrained(objective="ar", conditioning="none")
    refuse(["autoregressive"], "loss", "a", "-m", path)
    path, _ = untrained(objective="mdlm", conditioning="none", prefix="fixed:4")
    refuse(["continue 4"], "loss", "abcd", "-m", path)
    assert demo(call) == demo(call, "--help") and "perturb" in demo(call)
    assert "--schedule" in demo(call, "perturb", "--help")
