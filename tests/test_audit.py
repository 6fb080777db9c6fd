"""The audit of bounds: it accepts what is a bound, and finds every known mistake."""

import math

import pytest
import torch

from commands import assert_one_line
from diffusion import D3PM, MDLM
from studies.audit import CLAIMS, audit, audit_bytes, denoisers, verdict, worlds
from world import picked

RIGHT = {"exactly_k": "a bound, and tight", "weight_one_over_t": "a bound, and tight", "mask_not_forbidden": "loose"}
BROKEN = {"pooled_mean": "model", "divided_by_masks": "Kraft, entropy, model", "weight_of_visible": "model",
          "without_reconstruction": "Kraft, entropy, model", "cut_off": "times",
          "joint_of_parts": "Kraft, entropy, model", "lucky_masks": "Kraft, entropy, model"}


@pytest.mark.parametrize("name", CLAIMS)
def test_known_claims(name):
    """Each known mistake breaks exactly the rules listed for it. A correct bound breaks none."""
    said = verdict(audit(CLAIMS[name]))
    if name in RIGHT:
        assert RIGHT[name] in said and "NO BOUND" not in said
    else:
        assert said == f"NO BOUND: breaks {BROKEN[name]}"


@pytest.mark.parametrize("steps", [None, 1, 4, 500])
def test_our_own_bounds(steps):
    """The bounds that evaluate.py reports pass: MDLM's, and D3PM's for the chain of its own steps, which costs more."""
    def claim(model, x0, rng):
        bound, n = D3PM(model.mask_id, steps) if steps else MDLM(model.mask_id), len(x0)
        draw = getattr(bound, bound.reported)
        u, v, w = (1 - torch.rand(shape, generator=rng, dtype=torch.float64) for shape in ((n,), x0.shape, (n,)))
        score = lambda xt, t, where=None: picked(model(xt, t), where)
        return bound.nelbo(score, x0, draw(u, v, w)) * x0.shape[1]

    loose = steps and steps < 100
    assert verdict(audit(claim, steps=steps)).startswith("a bound, loose" if loose else "a bound, and tight")
    if loose:
        assert "model" in verdict(audit(claim))  # of another model, which fails at the last mask


def test_the_audit_knows_the_truth():
    """p of a denoiser is a distribution; of the perfect one on texts that are possible it is that of the world, if the
    order does not matter to it, as it never does; the joint is normalised, too."""
    for w in worlds():
        assert w.p.sum().item() == pytest.approx(1)
        for name, model in denoisers(w).items():
            log_p = model.log_p()
            assert log_p.exp().sum().item() == pytest.approx(1)
            assert model.log_p(4).exp().sum().item() == pytest.approx(1)
            assert (model.log_p(3000).exp() - log_p.exp()).abs().max() < 1e-3  # one by one, nearly always
            assert model.table.exp().sum(1) == pytest.approx(torch.ones(len(model.table)))
            if name == "perfect":
                assert log_p.exp() == pytest.approx(w.p)
                assert -torch.xlogy(w.p, log_p.exp()).sum().item() == pytest.approx(w.entropy)


def test_share_of_tied_bits():
    """The joint of two tied bits costs half of the entropy: the integral of t log 2."""
    [finding] = [f for f in audit(CLAIMS["joint_of_parts"]) if (f.world, f.denoiser) == ("two tied bits", "perfect")]
    assert finding.claimed == pytest.approx(math.log(2) / 2, abs=5 * finding.error)
    [finding] = [f for f in audit(CLAIMS["divided_by_masks"]) if (f.world, f.denoiser) == ("two tied bits", "perfect")]
    assert finding.claimed == pytest.approx(2 / 3 * math.log(2), abs=5 * finding.error)  # L/(L + 1)


def test_claims_that_are_odd():
    """One number for the mean of all texts passes if it is right, with any use of rng; nan does not pass."""
    def mean(model, x0, rng):
        torch.rand(7, generator=rng)
        return CLAIMS["exactly_k"](model, x0, rng).mean()

    assert verdict(audit(mean, draws=4000)) == "a bound, and tight"
    nan = lambda model, x0, rng: CLAIMS["exactly_k"](model, x0, rng) * math.nan
    assert "finite" in verdict(audit(nan, draws=1000))


def test_bytes(tmp_path, call):
    """1.1465 bits per byte, at an assumed 4.3 bytes per token, are 2.02 if a token has 2.442 bytes."""
    true, factor = audit_bytes(b"x" * 2442, 1000, 4.3)
    assert true == 2.442 and 1.1465 * factor == pytest.approx(2.02, abs=0.01)
    (tmp_path / "book.txt").write_bytes(b"x" * 2442)
    result = call("studies/audit.py", "--bytes", tmp_path / "book.txt", "--tokens=1000", "--bytes_per_token=4.3")
    assert result.out.startswith("2.442 bytes per token, not 4.3: bits per byte are 1.761 times")


def test_command(tmp_path, call):
    """The command audits a function of a file and prints its table. What is no such function is refused."""
    (tmp_path / "mine.py").write_text("def half(model, x0, rng):\n    import torch\n    t = torch.rand(len(x0))\n"
                                      "    model(x0, t)\n    return 0.5 * torch.ones(len(x0))\n")
    result = call("studies/audit.py", f"{tmp_path}/mine.py:half", "--draws=1000")
    assert result.code == 0 and "half: NO BOUND: breaks Kraft" in result.out and "two tied bits" in result.out
    for text in ("nothing", f"{tmp_path}/none.py:half"):
        assert_one_line(call("studies/audit.py", text), "use FILE.py:NAME")
    assert_one_line(call("studies/audit.py", f"{tmp_path}/mine.py:whole"), "has no function 'whole'")
    for content, words in (("def claim(model, x0): return x0", "claim must take three arguments"),
                           ("raise SystemExit(0)", "cannot be loaded: SystemExit: 0")):
        (tmp_path / "other.py").write_text(content)
        assert_one_line(call("studies/audit.py", f"{tmp_path}/other.py:claim"), words)
    assert_one_line(call("studies/audit.py", "--bytes=x"), "--bytes needs")
    assert_one_line(call("studies/audit.py", "--tokens=3"), "are for --bytes")
    assert_one_line(call("studies/audit.py", "d3pm", "--bytes=x", "--tokens=3", "--bytes_per_token=4"), "audits no")
    (tmp_path / "empty.txt").write_text("")
    assert_one_line(call("studies/audit.py", "--bytes", tmp_path / "empty.txt", "--tokens=3", "--bytes_per_token=4"),
                    "no bytes")
    (tmp_path / "odd.py").write_text("def number(model, x0, rng):\n    return 3.0\n"
                                     "def silent(model, x0, rng):\n    return 0.0 * x0[:, 0]\n")
    assert_one_line(call("studies/audit.py", f"{tmp_path}/odd.py:number"), "must return a tensor", "float")
    assert_one_line(call("studies/audit.py", f"{tmp_path}/odd.py:silent"), "never asks the model")
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    assert_one_line(call("studies/audit.py", f"{tmp_path}/broken.py:f"), "cannot be loaded: ModuleNotFoundError")
