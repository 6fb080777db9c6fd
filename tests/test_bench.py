"""bench.py, costs.py, studies/forecast.py, studies/textbook.py: what speed is compared with is right. No test
asks how fast anything is."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import costs
import world
from commands import ROOT, assert_one_line
from configs import CONFIGS, Config, replace
from diffusion import D3PM
from optim import make_optimizers
from randomness import uniforms
from studies import forecast, textbook

SMALL = ["--n_layer=1", "--n_embd=32", "--n_head=2", "--T=20", "--batch_size=4", "--micro_batch_size=4", "--seq_len=16",
         "--repeats=2"]
CPU = torch.device("cpu")


def last_line(result):
    assert result.code == 0, result.err
    return json.loads(result.out.strip().split("\n")[-1])


# ---- studies/textbook.py ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [1, 2, 5])
def test_posterior_is_bayes(s):
    """posterior() with a one-hot x0 is q(x_{s-1} | x_s, x0) by matrix products, for all x0 and the x_s they become."""
    T = 5
    steps, products = world.matrices([1 - i / T for i in range(T + 1)])
    q = world.posterior(steps, products, s)  # (x_s, x0, x_{s-1})
    for x0 in range(world.V):
        for xs in {x0, world.MASK} if s < T else {world.MASK}:
            found = textbook.posterior(torch.tensor([[xs]]), torch.eye(world.V + 1)[x0][None, None],
                                       torch.tensor([1 - s / T]), torch.tensor([1 - (s - 1) / T]), world.MASK)
            torch.testing.assert_close(found[0, 0].double(), q[xs, x0], atol=1e-6, rtol=0)


def test_textbook_loss_is_ours():
    """The KL of full posteriors and D3PM's weighted cross-entropy: the same number, and the same gradients."""
    torch.manual_seed(0)
    cfg = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=16, T=10)
    model, objective = cfg.make_model(27), D3PM(27, T=10)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x0, noise = torch.randint(0, 27, (20, 16)), objective.noise(*uniforms(0, 0, range(20), 20, 16, True))
    ours, theirs = objective.loss(model, x0, noise)[0], textbook.loss(model, x0, noise, 10, 27)
    gradients = [torch.autograd.grad(loss, model.parameters()) for loss in (ours, theirs)]
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-4) and ours > 0.1
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)


def test_textbook_sampler_draws_from_the_model():
    """20,000 draws of 4 steps with the Bayes-optimal denoiser follow that chain, whose paths are summed."""
    n = 20_000
    xt = torch.full((n, world.L), world.MASK)
    generator = torch.Generator().manual_seed(0)
    for xt in textbook.sample(D3PM(world.MASK), lambda x, t: world.oracle(x), xt, generator, T=4):
        pass
    counts = torch.bincount((xt * torch.tensor([9, 3, 1])).sum(1), minlength=27)
    expected = world.chain_distribution(world.oracle, [1 - i / 4 for i in range(5)])
    assert (counts / n - expected).abs().sum() / 2 < 0.02


def test_textbook_trains(monkeypatch, capsys):
    """Steps from 1 to T come up, and masks as often as they say; the command trains and samples.

    No mask is left after the last step, and the sign that shows a mask is not a letter that the network learns.
    """
    torch.manual_seed(0)
    noise = textbook.forward_process(torch.zeros(4000, 20), T=4)
    assert sorted(set(noise.t.tolist())) == [0.25, 0.5, 0.75, 1.0]
    for t in (0.25, 0.5, 1.0):
        assert noise.mask[noise.t == t].float().mean().item() == pytest.approx(t, abs=0.02)
    text = "░".join((ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: text)
    monkeypatch.setattr(sys, "argv", ["textbook.py"])
    textbook.main(T=20, L=8, steps=100)
    trained, *states = capsys.readouterr().out.splitlines()
    assert 2 < float(trained.split()[-4]) < 5 and len(states) == 1 and "░" not in states[0]


# ---- bench.py --------------------------------------------------------------------------------------------------------


def test_training(call):
    """Two configs in turn: each has its rate, its utilisation, shares of a step that add up to 1, and memory."""
    line = last_line(call("bench.py", "demo", "d3pm_text8", *SMALL))
    assert [row["config"] for row in line["results"]] == ["demo", "d3pm_text8"] and line["peak_tflops"] > 0
    for row in line["results"]:
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"])
        flops = row["tokens_per_second"] * row["flops_per_token"]
        assert row["mfu"] == pytest.approx(flops / (line["peak_tflops"] * 1e12))
        parts = [row[part] for part in ("data", "forward", "loss", "backward", "optimiser")]
        assert min(parts) > 0 and sum(parts) == pytest.approx(1)
        assert 16 * 4 * 32 * 4 < row["activation_bytes"] < 10**8


def test_compare(call):
    """Ours beside the naive path, with the ratios of what both say; with 3,000 tokens it needs far less memory."""
    ours, naive = last_line(call("bench.py", "d3pm_text8", *SMALL, "--compare=naive", "--vocab_size=3000"))["results"]
    assert ours["ratio"] == pytest.approx(ours["tokens_per_second"] / naive["tokens_per_second"])
    assert ours["activation_ratio"] == pytest.approx(ours["activation_bytes"] / naive["activation_bytes"])
    assert ours["activation_ratio"] < 0.5 and naive["activation_bytes"] > 3 * 64 * 3000 * 4
    head = 6 * 3000 * 32
    assert naive["flops_per_token"] == ours["flops_per_token"] < (0.6 + 0.3) * head  # at masks: lambda_ce is 0


def test_the_naive_step():
    """Three steps, of two micro-batches each, are those of a loop written here; in float32, eager and with AdamW,
    whatever the config says. The second gradient is not clipped: its size counts."""
    cfg = replace(CONFIGS["mdlm_mini_fast"](), n_layer=1, n_embd=32, n_head=2, seq_len=16, batch_size=4,
                  micro_batch_size=2, T=20, grad_clip=0.2, lr=0.01, compile=True)
    naive, again = (bench.Naive("x", cfg, 27, CPU) for _ in range(2))
    assert naive.dtype == torch.float32 and not naive.compiled
    adamw = torch.optim.AdamW(again.model.parameters(), lr=0.01, weight_decay=cfg.weight_decay)
    norms = []
    for _ in range(3):
        naive.step()
        parts = next(again.stream)
        loss = torch.stack([textbook.loss(again.model, x0, noise, 20, 27) for x0, noise in parts]).mean()
        adamw.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(again.model.parameters(), 0.2).item())
        adamw.step()
    assert len(parts) == 2 and norms[1] < 0.2 < 2 * norms[1] and 0.2 < min(norms[0], norms[2])
    for p, q in zip(naive.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)
    for training in (naive, again):
        training.stream.close()


def test_memory_of_a_step():
    """As much as autograd keeps for the backward pass, and not much more; no gradient is subtracted."""
    cfg = replace(CONFIGS["mdlm_mini_fast"](), n_embd=64, seq_len=32, batch_size=8, micro_batch_size=8)
    training = bench.Training("x", cfg, 27, CPU, torch.float32)
    kept = forecast.kept_bytes(cfg, 27, 8, CPU, torch.float32)
    assert 0.9 * kept < bench.measured_bytes(training) < 1.3 * kept
    assert training.ema.updates == 3
    training.stream.close()


def test_samplers(call):
    """Calls of the network, and where the time goes: the network has most of it, and the shares add up."""
    line = last_line(call("bench.py", "demo", "--samplers", "--samples=2", *SMALL[:-2], "--seq_len=16", "--repeats=1"))
    rows = {row["sampler"].split(",")[0]: row for row in line["samplers"]}
    assert line["batch_size"] == 2 and rows["first_hitting"]["nfe"] == 16 and rows["topk"]["nfe"] == 4
    assert rows["naive"]["nfe"] == 1000 and rows["naive"]["drawing"] is None and rows["ancestral"]["nfe"] <= 16
    del rows["naive"]  # which has draws of its own
    for row in rows.values():
        assert row["network"] + row["drawing"] + row["elsewhere"] == pytest.approx(1)
        assert row["elsewhere"] > 0 and row["drawing"] > 0


def test_compiled_samplers(call, monkeypatch):
    """--compile is for all samplers but the naive one."""
    used = Counter()
    monkeypatch.setattr(torch, "compile", lambda trunk: lambda *inputs: used.update(["calls"]) or trunk(*inputs))
    line = last_line(call("bench.py", "demo", "--samplers", "--samples=2", *SMALL[:-2], "--seq_len=16", "--repeats=1",
                          "--compile", "--first=2"))
    assert line["compiled"] and used["calls"] == 2 * sum(row["nfe"] for row in line["samplers"][1:])


def test_scaling(call, tmp_path):
    """A table, a picture, and a line with every point; wider networks cost more operations per token."""
    line = last_line(call("bench.py", "demo", "--scaling", tmp_path / "s.png", *SMALL[:-2], "--seq_len=64",
                          "--repeats=1"))
    widths = [row for row in line["scaling"] if row["axis"] == "width"]
    for row in line["scaling"]:
        limit = row["flops_per_token"] / (line["peak_tflops"] * 1e12)
        assert row["limit"] == pytest.approx(1e6 * limit)
        assert row["mfu"] == pytest.approx(row["limit"] / row["microseconds_per_token"])
    assert {row["batch_size"] * row["seq_len"] for row in line["scaling"] if row["axis"] == "seq_len"} == {4096}
    assert len(line["scaling"]) == 12 and [row["width"] for row in widths] == [64, 128, 256, 512]
    assert all(a["parameters"] < b["parameters"] for a, b in zip(widths, widths[1:]))
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_flags(call, tmp_path):
    assert_one_line(call("bench.py", "ar_demo", "--compare=naive"), "neither")
    assert_one_line(call("bench.py", "d3pm_text8", "--compare=naive", "--schedule=cosine"), "--schedule=linear")
    assert_one_line(call("bench.py", "demo", "--first=3"), "--samplers")
    assert_one_line(call("bench.py", "demo", "--samples=3"), "--samplers")
    assert_one_line(call("bench.py", "demo", "--estimate", "--fsdp"), "leave out --fsdp")
    assert_one_line(call("bench.py", "demo", "--samplers", "--estimate"), "not allowed with argument")
    assert_one_line(call("bench.py", "demo", "names", "--samplers"), "one config at a time")
    assert_one_line(call("bench.py", "demo", "--scaling", tmp_path), "is a folder")
    assert_one_line(call("bench.py", "demo", "--scaling", tmp_path / "no" / "s.png"), "in a folder that does not exist")
    assert_one_line(call("bench.py", "demo", "--estimate", "--gpu=abacus"), "is unknown: choose one of a100")
    assert_one_line(call("train.py", "demo", "names"), "one config at a time")


# ---- costs.py and studies/forecast.py -------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["d3pm_text8", "mdlm_text8", "demo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_extrapolated_exactly(config, dtype):
    """What five sequences through four blocks keep, counted, is what one and two of each say."""
    cfg = replace(CONFIGS[config](), n_embd=32, n_head=2, seq_len=16, n_layer=4, dropout=0.0, lambda_ce=0.0)
    counted = forecast.kept_bytes(cfg, 27, 5, CPU, dtype)
    fixed, one = forecast.activation_bytes(cfg, 27, CPU, dtype)
    assert fixed + 5 * one == pytest.approx(counted, rel=0.01)


def test_logits_of_as_many_masks_as_asked_for():
    """kept_bytes is the same in each call, and twice the masks keep the logits of twice as many tokens, in float32."""
    cfg = replace(CONFIGS["sedd_text8"](), n_layer=1, n_embd=32, n_head=2, seq_len=64)
    kept = [forecast.kept_bytes(cfg, 5000, 4, CPU, torch.float32, masked) for masked in (0.5, 0.5, 1.0)]
    assert kept[0] == kept[1] and kept[2] - kept[0] >= 128 * 5000 * 4


@pytest.mark.parametrize("config, more", [
    ("d3pm_openwebtext_8gpu", {}), ("mdlm_openwebtext_8gpu", {}), ("ar_text8", {}), ("sedd_text8", {}),
    ("udlm_text8", {}), ("sedd_text8", {"noise": "uniform"}), ("d3pm_text8", {"noise": "uniform", "lambda_ce": 0.0})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary(config, more, dtype):
    """A step with nearly nothing but logits takes what is kept and their gradients, whatever the cost."""
    cfg = replace(CONFIGS[config](), **more, n_layer=1, n_embd=32, n_head=2, seq_len=64, batch_size=4,
                  micro_batch_size=4)
    training = bench.Training("x", cfg, 10_000, CPU, dtype)
    fixed, one = forecast.activation_bytes(cfg, 10_000, CPU, dtype)
    estimated = fixed + 4 * (one + forecast.gradient_bytes(cfg, 10_000))
    assert estimated == pytest.approx(bench.measured_bytes(training), rel=0.06)
    training.stream.close()


def test_the_fullest_micro_batch():
    """Of 200,000 micro-batches of 8 none has more masks, and many have nearly as many."""
    rates = np.random.default_rng(0).random((200_000, 8)).mean(1)
    assert rates.max() < forecast.fullest(8) < rates.max() + 0.1 and forecast.fullest(1) == 1


def test_what_checkpoint_blocks_saves_and_costs():
    """A step's memory is less than estimated, and not much; the operations of the blocks' forward pass come twice."""
    cfg = replace(CONFIGS["mdlm_text8"](), n_layer=4, n_embd=64, n_head=2, seq_len=64, batch_size=8, micro_batch_size=8,
                  dropout=0.0, checkpoint_blocks=True)
    training = bench.Training("x", cfg, 27, CPU, torch.float32)
    fixed, one = forecast.activation_bytes(cfg, 27, CPU, torch.float32)
    assert 0.75 < (fixed + 8 * one) / bench.measured_bytes(training) < 1.3
    training.stream.close()
    flops = training.model.flops(64, 0.5)
    head = 6 * 27 * 64 * 0.5
    assert forecast.recomputed(training.model, flops, cfg, 27) == pytest.approx((flops - head) / 3)


def test_operations_of_muon():
    """As PyTorch's own counter finds them in a step."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = replace(CONFIGS["mdlm_mini_fast"](), n_layer=2, n_embd=32, n_head=2, seq_len=8)
    model = cfg.make_model(5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    with FlopCounterMode(display=False) as counter:
        for optimizer in make_optimizers(model, cfg, CPU, torch.float32):
            optimizer.step_unless(torch.tensor(False))
    assert counter.get_total_flops() == costs.optimizer_flops(model, cfg)


def test_weights_are_no_activations():
    """Of one short text a wide network keeps less than its weights, which it needs for the backward pass, too."""
    cfg = Config(n_layer=1, n_head=2, n_embd=128, n_cond=8, seq_len=2, lambda_ce=0.0)
    assert 0 < forecast.kept_bytes(cfg, 27, 1, CPU, torch.float32) < 4 * costs.count_parameters(cfg.make_model(27)) / 4


def test_vocabulary_of_data_that_is_not_prepared(call, tmp_path):
    """That of a BPE is in the name of the data set. Where 27 is a guess, a line says so."""
    go = lambda name: call("bench.py", "--estimate", "demo", f"--dataset={name}", f"--data_dir={tmp_path}")
    bpe, guess = go("book_bpe4096"), go("book")
    assert last_line(bpe)["parameters"] - last_line(guess)["parameters"] == (4096 - 27) * 128
    assert bpe.err == "" and "book is not prepared: 27 different tokens were assumed" in guess.err


def test_estimate(call):
    """Days are tokens x operations over GPUs x peak x utilisation; the config's name says how many GPUs."""
    options = ["--estimate", "d3pm_text8_8gpu", "--n_layer=1", "--n_embd=32", "--n_head=2", "--seq_len=16",
               "--micro_batch_size=8"]
    line = last_line(call("bench.py", *options, "--gpu=a100", "--mfu=0.25"))
    seconds = line["tokens"] * line["flops_per_token"] / (8 * 312e12 * 0.25)
    assert line["gpus"] == 8 and line["days"] == pytest.approx(seconds / 86400)
    assert line["tokens"] == 500_000 * 1024 * 16
    assert last_line(call("bench.py", *options, "--gpus=16"))["days"] == pytest.approx(line["days"] / 2 / 3.17,
                                                                                       rel=0.01)
    again = last_line(call("bench.py", *options, "--gpu=a100", "--mfu=0.25", "--checkpoint_blocks"))
    assert line["days"] < again["days"] < line["days"] * 4 / 3
    assert line["days"] * 86400 * line["tokens_per_second"] == pytest.approx(line["tokens"])
    cfg = replace(CONFIGS["d3pm_text8_8gpu"](), n_layer=1, n_embd=32, n_head=2, seq_len=16)
    fixed, one = forecast.activation_bytes(cfg, 27, CPU, torch.bfloat16, line["masked"])
    one += forecast.gradient_bytes(cfg, 27, line["masked"])
    assert line["state_bytes"] == 20 * line["parameters"] and line["micro_batch_size"] == 8
    assert line["total_bytes"] == pytest.approx(line["state_bytes"] + fixed + 8 * one)
    cfg = replace(CONFIGS["mdlm_text8_8gpu"](), n_layer=1, n_embd=32, n_head=2, seq_len=16)  # logits at masks only
    masks = last_line(call("bench.py", "--estimate", "mdlm_text8_8gpu", *options[2:], "--gpu=a100"))
    fixed, one = forecast.activation_bytes(cfg, 27, CPU, torch.bfloat16, masks["masked"])
    one += forecast.gradient_bytes(cfg, 27, masks["masked"])
    assert masks["total_bytes"] == pytest.approx(masks["state_bytes"] + fixed + 8 * one)
    workers = last_line(call("bench.py", *options, "--gpu=a100", "--mfu=0.25", "--local_steps=5"))
    assert workers["state_bytes"] == 32 * line["parameters"]  # also the anchor, its momentum and the message
    muon = [last_line(call("bench.py", "--estimate", "mdlm_mini_fast", "--gpus=4", *flags))["flops_per_token"]
            for flags in ([], ["--local_steps=5"], ["--local_steps=5", "--local_group=4"])]
    assert muon[0] == muon[2] < muon[1]  # Muon's matrices are shared out within a group
    assert "masks" not in call("bench.py", "--estimate", "ar_text8", *options[2:]).out.split("time")[0]
    adamw = last_line(call("bench.py", "mdlm_mini_fast", "--estimate", "--gpus=4", "--optimizer=adamw"))
    muon = last_line(call("bench.py", "mdlm_mini_fast", "--estimate", "--gpus=4"))
    fast = CONFIGS["mdlm_mini_fast"]()
    alone, three, shared = (costs.optimizer_flops(fast.make_model(27), fast, n) for n in (1, 3, 4))
    assert alone == 4 * shared and three == 2 * shared  # four blocks have four matrices of each shape
    extra = shared / (4 * 128)  # each GPU has 4 sequences
    assert muon["flops_per_token"] == pytest.approx(adamw["flops_per_token"] + extra)


def test_does_not_fit(call, monkeypatch):
    """More than the GPU has: the line says which micro-batch would fit."""
    monkeypatch.setitem(forecast.GPUS, "a100", (312, 0.05))
    result = call("bench.py", "--estimate", "d3pm_text8", "--n_layer=2", "--n_embd=64", "--n_head=2", "--gpu=a100")
    line = last_line(result)
    most, state, one = (line[key] for key in ("largest_micro_batch_size", "state_bytes",
                                              "activation_bytes_per_sequence"))
    fixed = line["total_bytes"] - state - 256 * one
    assert state + fixed + most * one <= 0.9 * 0.05e9 < state + fixed + (most + 1) * one
    assert most < 256 and "does not fit: try --micro_batch_size=" in result.out
