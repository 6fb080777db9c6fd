"""Score entropy and uniform noise from the command line: trained by the same train.py, scored and sampled as others."""

import json
import operator

import pytest

from commands import assert_one_line, losses, train

FAMILIES = {
    "sedd": ["sedd_text8"],
    "sedd_unscaled": ["sedd_text8", "--scale_by_sigma=false", "--schedule=geometric:0.001:6"],
    "udlm": ["udlm_text8"],
    "sedd_uniform": ["udlm_text8", "--objective=sedd", "--schedule=geometric"],
    "gidd": ["udlm_text8", "--noise=hybrid", "--schedule=linear", "--conditioning=time", "--weighting=simple"],
    "d3pm_uniform": ["udlm_text8", "--objective=d3pm", "--schedule=cosine", "--conditioning=step"],
}


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, data_dir, tmp_path_factory):
    """(name, folder) of a short run of each family."""
    import subprocess
    import sys

    from commands import arguments
    out = tmp_path_factory.mktemp(request.param) / "out"
    config, *more = FAMILIES[request.param]
    command = arguments(config, data_dir, out, *more, "--max_steps=40", "--lr=0.01", "--eval_interval=20",
                        "--sample_interval=40", "--ema_decay=0.9")
    subprocess.run([sys.executable, *command], check=True)
    return request.param, out


def test_it_learns_and_is_scored(call, run):
    """The bound falls below that of equal probabilities; evaluate.py names its estimator; another one gives about the
    same; score entropy is never below the bound of the normalised prediction."""
    name, out = run
    assert len(losses(out)) == 40
    result = json.loads(call("evaluate.py", out, "--repeats=8", "--json").out)
    assert 1 < result["bits_per_token"] < 4.75
    rates = "continuous-time bound, random tokens"
    expected = {"udlm": (rates, "flatter_rates"), "sedd_uniform": (rates, "flatter_rates"),
                "gidd": (rates, "flatter_rates"), "d3pm_uniform": ("T-step bound, T = 50", "t_step_uniform")}
    estimator, other = expected.get(name, ("continuous-time bound, exact k", "continuous"))
    assert result["estimator"] == estimator
    again = json.loads(call("evaluate.py", out, "--repeats=8", "--json", f"--estimator={other}").out)
    assert abs(again["bits_per_token"] - result["bits_per_token"]) < 4 * (again["stderr"] + result["stderr"])
    if name.startswith("sedd") and name != "sedd_uniform":
        normalised = json.loads(call("evaluate.py", out, "--repeats=8", "--json", "--normalised").out)
        assert 0 < result["bits_per_token"] - normalised["bits_per_token"] < 1
        assert normalised["estimator"].endswith("exact k, normalised")
    else:
        assert_one_line(call("evaluate.py", out, "--normalised"), "--normalised is only for score entropy with masks")
        assert "normalised" not in result["estimator"]


def test_it_samples(call, run):
    """All its samplers, a prefix that stays, the same seed the same text, quality without a judge, an export."""
    name, out = run
    for sampler in ("ancestral", "analytic", "euler") if name != "gidd" else ("ancestral",):
        command = ["sample.py", out, "--steps=6", "--sampler", sampler, "--prefix=the cat", "--batch_size=2", "--json"]
        result = json.loads(call(*command).out)
        assert all(sample["text"].startswith("the cat") and len(sample["text"]) == 32 for sample in result["samples"])
        assert json.loads(call(*command).out)["samples"] == result["samples"]
        assert result["nfe"] <= 7
        if name in ("udlm", "sedd_uniform", "d3pm_uniform", "gidd"):
            done = call(*command, "--correct=5", "--correct_temperature=0.5")
            assert "at most 5 corrections" in done.err
            corrected = json.loads(done.out)
            assert all(sample["text"].startswith("the cat") for sample in corrected["samples"])
            assert result["nfe"] < corrected["nfe"] <= result["nfe"] + 5 and corrected["correct"] == 5
            pairs = zip(corrected["samples"], result["samples"])
            assert 1 <= max(sum(map(operator.ne, a["tokens"], b["tokens"])) for a, b in pairs) <= 5
    assert call("sample.py", out, "--steps=4", "--temperature=0.5", "--top_p=0.9", "--show").code == 0
    if name == "udlm":
        rows = json.loads(call("evaluate.py", out, "--samples=4", "--steps=4", "--sampler=ancestral,euler", "--json",
                               "--out_dir", out.parent).out)["samples"]
        assert [row["sampler"] for row in rows] == ["ancestral", "euler", "real text"]
        assert call("checkpoint.py", "export", out, out.parent / "shared").code == 0
        assert call("sample.py", out.parent / "shared", "--steps=4").out == call("sample.py", out, "--steps=4").out


def test_what_random_tokens_have_not(call, run):
    """Studies and samplers of masks are refused in one line, and so are estimators of other processes."""
    name, out = run
    if name not in ("udlm", "sedd_uniform", "d3pm_uniform", "gidd"):
        assert_one_line(call("sample.py", out, "--correct=5"), "--correct is for models that were trained on random")
        assert_one_line(call("evaluate.py", out, "--T=10"), "the T-step bound needs a schedule from alpha = 1 to 0")
        assert_one_line(call("evaluate.py", out, "--estimator=rates"), "choose exact_k or continuous")
        return
    for flag in ("--curve", "--curse", "--context=0,4", "--order=l2r"):
        assert_one_line(call("evaluate.py", out, flag), flag.split("=")[0],
                        "trained with masks and random tokens" if name == "gidd" else "trained with uniform noise")
    if name == "gidd":
        assert_one_line(call("evaluate.py", out, "--T=10"), "for which there is no T-step bound: leave out --T and")
    assert_one_line(call("evaluate.py", out, "--estimator=exact_k"), "--estimator exact_k does not work with")
    assert_one_line(call("sample.py", out, "--sampler=topk"), "--sampler topk needs a model of masks in whole texts",
                    "choose ancestral" if name == "gidd" else "ancestral or analytic or euler")
    assert_one_line(call("sample.py", out, "--correct_temperature=1"), "that of --correct: add --correct N")
    assert_one_line(call("sample.py", out, "--steps=auto"), "auto needs a model of masks in whole texts")
    assert_one_line(call("sample.py", out, "--sampler=euler", "--top_k=2"), "choose ancestral" if name == "gidd" else
                    "--top_k changes the token distribution, which euler does not use with uniform noise: choose "
                    "--sampler ancestral")
    assert_one_line(call("sample.py", out, "--block_length=4"), "--block_length is for models of masks in whole texts")
    assert_one_line(call("evaluate.py", out, "--block_size=4"), "--block_size is for models of objective=mdlm or block")
    assert call("sample.py", out, "--grid=1,0.5,0.4,0").code == 0
    if name == "udlm":
        assert call("sample.py", out, "--grid=geometric", "--steps=5").code == 0
        assert_one_line(call("bench.py", "udlm_text8", "--samplers"), "is not one: choose a masked config")


def test_the_t_step_bound_of_score_entropy(call, data_dir, tmp_path):
    """It needs the normalised prediction."""
    out = tmp_path / "out"
    flags = ["--schedule=linear", "--conditioning=time", "--max_steps=1"]
    assert train(call, "sedd_text8", data_dir, out, *flags).code == 0
    assert_one_line(call("evaluate.py", out, "--T=50"), "add --normalised")
    assert json.loads(call("evaluate.py", out, "--T=50", "--normalised", "--json").out)["estimator"] == (
        "T-step bound, T = 50, normalised")


def test_two_kinds_are_compared(call, run, trained):
    """A masked model and one of uniform noise: each by its own bound, on the same windows."""
    name, out = run
    alone = [json.loads(call("evaluate.py", path, "--json").out) for path in (out, trained)]
    result = json.loads(call("evaluate.py", out, trained, "--json").out)
    for key in ("estimator", "bits_per_token"):
        assert [model[key] for model in result["models"]] == [one[key] for one in alone]
    assert result["difference"] == pytest.approx(alone[1]["bits_per_token"] - alone[0]["bits_per_token"])
