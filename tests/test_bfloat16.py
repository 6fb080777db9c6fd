"""What holds in bfloat16, in which matrix products keep 8 significant bits: on tiny sizes, where a CPU may emulate it.

Bit for bit: what is the same computation, such as a run and its resumption. Up to rounding: what sums in another order
or in other pieces, such as two processes in place of one.
"""

import json

import pytest
import torch

import storage
from cli import pick_dtype
from commands import STEADY, assert_identical, finish_well, losses, start, stop_after, train

HALF = ["--dtype=bfloat16"]
UNIT = 2**-8  # the largest relative error of a number rounded to bfloat16 is half of it


@pytest.mark.parametrize("has_units", [True, False])
def test_auto_is_bfloat16_where_the_cpu_has_units_for_it(monkeypatch, has_units):
    """--dtype=auto asks the CPU; a name is taken as it is."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_units, raising=False)
    cpu = torch.device("cpu")
    assert pick_dtype(cpu) == (torch.bfloat16 if has_units else torch.float32)
    assert pick_dtype(cpu, "float32") == torch.float32 and pick_dtype(cpu, "bfloat16") == torch.bfloat16


@pytest.mark.parametrize("config, extra", [("d3pm_text8", []), ("mdlm_text8", ["--optimizer=muon", "--dropout=0.1"]),
                                           ("ar_text8", [])])
def test_resume_is_exact(call, data_dir, tmp_path, monkeypatch, config, extra):
    """A run in bfloat16, stopped and resumed twice, ends bit for bit as one that was not stopped."""
    options = [*HALF, "--max_steps=6", "--eval_interval=3", "--lr=0.02", *extra]
    assert train(call, config, data_dir, tmp_path / "whole", *options).code == 0
    for _ in range(3):
        with monkeypatch.context() as patch:
            stop_after(patch, 2)
            assert train(call, config, data_dir, tmp_path / "parts", *options, "--resume=auto").code == 0
    assert_identical(tmp_path / "whole", tmp_path / "parts")


def test_weights_and_averages_stay_float32(call, data_dir, tmp_path):
    """bfloat16 is of matrix products alone: what is kept of a run is float32, and no rounded copy of it."""
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", *HALF, "--max_steps=2", "--optimizer=muon").code == 0
    state = storage.read(tmp_path / "out")
    kept = [*state["model"].values(), *state["ema"].values(),
            *(value for entries in state["optimizer"].values() for value in entries.values())]
    assert {value.dtype for value in kept} == {torch.float32}
    for kind in ("model", "ema"):
        assert not torch.equal(state[kind]["embed.weight"], state[kind]["embed.weight"].bfloat16().float())


def test_two_processes_and_micro_batches_agree_up_to_rounding(call, data_dir, tmp_path):
    """Every micro-batch's gradient is rounded before it is added, so one process, four parts of its batch and two
    processes differ; in the first steps by less than one rounding. (In float32 by 1e-7: test_processes.py.)"""
    for name, extra in (("one", []), ("parts", ["--micro_batch_size=2"])):
        assert train(call, "mdlm_text8", data_dir, tmp_path / name, *HALF, *STEADY, *extra).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *HALF, *STEADY, n=2))
    for name in ("parts", "two"):
        bits = [losses(tmp_path / run) for run in ("one", name)]
        assert len(bits[0]) == 4 and bits[0] == pytest.approx(bits[1], rel=UNIT)
        norms = [losses(tmp_path / run, "grad_norm") for run in ("one", name)]
        assert norms[0] == pytest.approx(norms[1], rel=8 * UNIT)  # of a sum of terms of both signs


def test_likelihood_is_that_of_float32_up_to_rounding(call, trained, data_dir):
    """The same windows and masks in both: the mean over the windows moves by less than one rounding of its value, and
    it does move, or bfloat16 was not used."""
    bits = {dtype: json.loads(call("evaluate.py", trained, "--json", "--data_dir", data_dir,
                                   f"--dtype={dtype}").out)["bits_per_token"] for dtype in ("float32", "bfloat16")}
    assert bits["bfloat16"] == pytest.approx(bits["float32"], rel=UNIT) and bits["bfloat16"] != bits["float32"]


def test_validation_is_what_evaluate_says(call, data_dir, tmp_path):
    """The last validation of a run and evaluate.py, both in bfloat16 and with the same masks, but other batches."""
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, *HALF, "--max_steps=10", "--eval_sequences=100000").code == 0
    found = json.loads(call("evaluate.py", out, *HALF, "--json", "--data_dir", data_dir, "--batch_size=3").out)
    assert found["bits_per_token"] == pytest.approx(losses(out, "val_bits_per_token")[-1], rel=UNIT)


@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "topk", "entropy_bound"])
def test_sampling(call, trained, sampler):
    """Samplers fill all masks, and the probabilities that they report are probabilities."""
    result = call("sample.py", trained, *HALF, "--json", "--prefix=the cat ", f"--sampler={sampler}")
    [sample] = json.loads(result.out)["samples"]
    assert sample["text"].startswith("the cat ") and len(sample["text"]) == 32
    assert all(0 < p <= 1 for p in sample["p"][8:])
