"""Checks of train.py, evaluate.py and sample.py on a GPU: `python -m pytest tests/gpu.py`. Skipped without CUDA.

`make test` leaves this file out. DEVICE=cpu runs the same checks on the CPU, to test them. `-n 8` runs eight at a time.
RESULTS.md, "On a GPU", has the commands that measure speed and memory.
"""

import os
import warnings

import numpy as np
import pytest
import torch

import configs
from bench import Training
from commands import finish_well, log, losses, start, stop_after, train
from configs import replace
from likelihood import Windows, bound

DEVICE = os.environ.get("DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA")
KINDS = {
    "d3pm": ["d3pm_text8"],
    "mdlm": ["mdlm_text8"],
    "fast": ["mdlm_text8_fast_8gpu"],
    "sedd": ["mdlm_text8", "--objective=sedd", "--conditioning=sigma", "--schedule=loglinear"],
    "uniform": ["mdlm_text8", "--noise=uniform", "--conditioning=sigma", "--schedule=loglinear", "--weighting=nelbo",
                "--time_sampling=stratified"],
    "hybrid": ["mdlm_text8", "--noise=hybrid", "--conditioning=time", "--weighting=simple",
               "--time_sampling=stratified"],
    "blocks": ["bd3_demo", "--block_size=16", "--seq_len=128"],
    "left to right": ["ar_text8"],
    "mixers": ["demo", "--architecture=mixers", "--mixer=gmlp"],
}
kinds = pytest.mark.parametrize("kind", KINDS)


def flags(kind, *extra):
    """(config, flags) of a small run on DEVICE."""
    config, *own = KINDS[kind]
    return config, [f"--device={DEVICE}", "--n_embd=64", "--max_steps=12", "--dropout=0", *own, *extra]


@kinds
@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_trains_resumes_scores_and_samples(call, monkeypatch, data_dir, tmp_path, kind, compiled):
    """A run that is stopped and resumed has the losses of a whole one; its checkpoint is scored and sampled. All three
    commands compile the network, or none."""
    config, own = flags(kind, compiled)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(call, config, data_dir, whole, *own)
    assert result.code == 0, result.err
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(call, config, data_dir, stopped, *own)
    assert len(losses(stopped)) < len(losses(whole)) == 12
    result = train(call, config, data_dir, stopped, *own, "--resume=auto")
    assert result.code == 0, result.err
    assert losses(stopped) == pytest.approx(losses(whole), rel=1e-3)
    for command in (["evaluate.py", whole, "--data_dir", data_dir, "--n_tokens=4096"],
                    ["sample.py", whole, "--batch_size=2"]):
        result = call(*command, f"--device={DEVICE}", *(["--compile"] if compiled == "--compile" else []))
        assert result.code == 0 and result.out, result.err


@pytest.mark.parametrize("compiled", ["--compile", "--no-compile"])
def test_resumes_with_dropout(call, monkeypatch, data_dir, tmp_path, compiled):
    """The noise of dropout, too, goes on after a stop as it would have gone on without."""
    config, own = flags("mdlm", "--dropout=0.2", compiled)
    assert train(call, config, data_dir, tmp_path / "whole", *own).code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        train(call, config, data_dir, tmp_path / "stopped", *own)
    assert train(call, config, data_dir, tmp_path / "stopped", *own, "--resume=auto").code == 0
    assert losses(tmp_path / "stopped") == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)


@kinds
def test_compiled_losses(call, data_dir, tmp_path, kind):
    """A compiled run has the losses of the other up to rounding, and those of a run on the CPU."""
    config, own = flags(kind)
    runs = {"whole": [], "compiled": ["--compile"], "cpu": ["--device=cpu", "--no-compile"]}
    for name, more in runs.items():
        result = train(call, config, data_dir, tmp_path / name, *own, "--no-compile", *more)
        assert result.code == 0, result.err
    for name in ("compiled", "cpu"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3), name


def small(kind, **settings):
    """The Config of a small network."""
    name, *words = KINDS[kind]
    cfg = configs.CONFIGS[name]()
    own = {key: type(getattr(cfg, key))(value) for key, value in (word.removeprefix("--").split("=") for word in words)}
    return replace(cfg, **own | dict(n_embd=64, n_head=2, n_layer=2, seq_len=128) | settings)


def bounds(kind, device, dtype=torch.float32):
    """The bounds of four texts, (4,), by a network with random weights, none of them zero, on a device."""
    cfg = small(kind, dropout=0.0)
    torch.manual_seed(0)
    model = cfg.make_model(27).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    text = np.random.default_rng(0).integers(0, 27, 4 * 128)
    data = Windows(text, 128 * np.arange(4), 128, 4, torch.device(device), dtype)
    return bound(model.to(device), cfg.make_objective(27), data)


@kinds
def test_bounds_agree_with_the_cpu(kind):
    """In float32 every objective gives on the GPU what it gives on the CPU. Blocks use FlexAttention there."""
    torch.testing.assert_close(bounds(kind, DEVICE), bounds(kind, "cpu"), rtol=1e-4, atol=1e-4)


@kinds
def test_bfloat16(kind):
    """In bfloat16 a bound is that of float32 within two per cent."""
    torch.testing.assert_close(bounds(kind, DEVICE, torch.bfloat16), bounds(kind, DEVICE), rtol=0.02, atol=0.02)


# Only several processes build DistributedDataParallel, share Muon's matrices out and split tensors for FSDP.
PROCESSES = min(2, torch.cuda.device_count()) if DEVICE == "cuda" else 2


@pytest.mark.parametrize("more", [[], ["--local_steps=3", f"--local_group={PROCESSES}", "--outer_lr=1",
                                       "--outer_momentum=0"]])
def test_torchrun(data_dir, tmp_path, more):
    """Processes of torchrun, with nccl on GPUs, have the losses of a plain one, also with exchanges."""
    config, own = flags("mdlm")
    command = [*own, "--no-compile", "--eval_interval=6", "--ema_decay=0"]
    finish_well(start(config, data_dir, tmp_path / "plain", *command))
    finish_well(start(config, data_dir, tmp_path / "torchrun", *command, *more, n=PROCESSES,
                      torchrun=["--standalone"]))
    validations = [losses(tmp_path / name, "val_bits_per_token") for name in ("plain", "torchrun")]
    assert validations[0] and validations[1] == pytest.approx(validations[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["mdlm", "fast", "blocks"])
def test_fsdp(data_dir, tmp_path, kind):
    """FSDP has the losses of a plain run, and can draw a sample."""
    config, own = flags(kind, "--no-compile", "--eval_interval=6", "--sample_interval=6")
    finish_well(start(config, data_dir, tmp_path / "plain", *own))
    finish_well(start(config, data_dir, tmp_path / "fsdp", *own, "--fsdp", n=PROCESSES,
                      torchrun=["--standalone"]))
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)
    assert any(line.get("sample") for line in log(tmp_path / "fsdp"))


@pytest.mark.parametrize("kind", ["d3pm", "fast", "sedd", "left to right"])
def test_a_large_vocabulary(kind):
    """Three steps with the head and the cost compiled, as for 1,200 tokens, leave the weights of three plain steps, and
    those of three steps on the CPU, where the head has no columns of zeros."""
    weights = []
    for device, compiled in ((DEVICE, False), (DEVICE, True), ("cpu", False)):
        cfg = small(kind, batch_size=8, micro_batch_size=8, dropout=0.0, lr=1e-5, compile=compiled)
        training = Training(kind, cfg, 1200, torch.device(device), torch.float32)
        for _ in range(3):
            training.step()
        training.stream.close()
        weights.append({name: p.detach().cpu() for name, p in training.model.named_parameters()})
    for others in weights[1:]:
        torch.testing.assert_close(others, weights[0], rtol=1e-3, atol=1e-5)


@kinds
@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU does not wait")
def test_waits(kind):
    """A training step never waits for the GPU."""
    cfg = small(kind, batch_size=8, micro_batch_size=8, compile=False)
    training = Training(kind, cfg, 27, torch.device(DEVICE), torch.bfloat16)
    for _ in range(2):
        training.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        training.stream.close()
    waits = [f"{w.filename}:{w.lineno}" for w in found if "synchroniz" in str(w.message)]
    assert not waits


def test_memory_and_utilisation_are_logged(call, data_dir, tmp_path):
    """The log has the memory that the GPU gave, and a share of the peak that was measured on it."""
    config, own = flags("mdlm", "--peak_tflops=0", "--no-compile")
    assert train(call, config, data_dir, tmp_path / "run", *own).code == 0
    last = log(tmp_path / "run")[-1]
    line = next(line for line in reversed(log(tmp_path / "run")) if "mfu" in line)
    assert 0 < line["mfu"] < 1 and line["memory_bytes"] > 0 and last["step"] == 12
