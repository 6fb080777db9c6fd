"""tiny_diffusion.py: another project's network and checkpoints give what its own code gives; it trains and samples."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import storage
from categorical import Counted
from cli import UserError
from commands import assert_one_line, losses, train
from configs import Config
from costs import count_parameters
from model import places
from networks import small
from diffusion import D3PM
from foreign import translate
from foreign.tiny_diffusion import TinyDiffusion, swap_halves
from sampling import Settings
from test_interop import nanodd_payload, small_model

CPU = torch.device("cpu")
MASK, T, L, HEADS, D = 127, 10, 12, 2, 16
UNSAID = {"n_head": HEADS, "seq_len": L}


# ---- that project's conventions, written out -------------------------------------------------------------------------


def their_state():
    """A random state dict under tiny-diffusion's names: 128 ASCII codes, of which 0 is the mask, 2 blocks, T steps."""
    g = torch.Generator().manual_seed(0)
    shapes = {"token_emb": (128, D), "time_emb": (T, D), "output_head": (128, D)}
    for i in range(2):
        shapes |= {f"blocks.{i}.attn.c_{name}": (D, D) for name in ("q", "k", "v", "proj")}
        shapes |= {f"blocks.{i}.mlp.c_fc": (4 * D, D), f"blocks.{i}.mlp.c_proj": (D, 4 * D)}
    return {f"{name}.weight": torch.randn(shape, generator=g) * shape[-1]**-0.5 for name, shape in shapes.items()}


def their_logits(state, codes, index):
    """codes (B, L) with 0 the mask, index (B,) into the time embedding, 0 the least masked -> logits (B, L, 128)."""
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    linear = lambda x, name: x @ state[f"{name}.weight"].T
    half = D // HEADS // 2
    angle = torch.arange(codes.shape[1])[:, None] * 10000.0 ** (-torch.arange(half) / half)

    def turned(x):  # the other way round than model.rotate
        x1, x2 = x[..., :half], x[..., half:]
        return rms(torch.cat((x1 * angle.cos() + x2 * angle.sin(), x2 * angle.cos() - x1 * angle.sin()), -1))

    x = rms(state["token_emb.weight"][codes] + state["time_emb.weight"][index][:, None])
    for i in range(2):
        heads = []
        for h in range(HEADS):
            q, k, v = (linear(rms(x), f"blocks.{i}.attn.c_{name}").chunk(HEADS, -1)[h] for name in "qkv")
            heads.append((turned(q) @ turned(k).mT / math.sqrt(2 * half)).softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), f"blocks.{i}.attn.c_proj")
        x = x + linear(linear(rms(x), f"blocks.{i}.mlp.c_fc").relu() ** 2, f"blocks.{i}.mlp.c_proj")
    return linear(rms(x), "output_head")


def loaded(path, state=None, overrides=UNSAID):
    """The model behind a file, which is made of the state dict first if there is one."""
    if state is not None:
        torch.save(state, path)
    return checkpoint.load_model(path, CPU, storage.Hints(overrides=overrides))


def ours(codes):
    """Their ids -> ours: codes 1 ... 127 are 0 ... 126, and the mask is the last one."""
    return (codes - 1) % 128


# ---- its checkpoints -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_import(tmp_path):
    """Our network with translated weights gives their logits, at every step, but for the mask's, which it lacks."""
    state, codes = their_state(), torch.randint(0, 128, (T, L), generator=torch.Generator().manual_seed(1))
    model, config, meta, step = loaded(tmp_path / "diffusion_model.pt", state)
    assert (config.T, config.n_layer, config.n_head, config.seq_len, config.conditioning) == (T, 2, HEADS, L, "step")
    assert (config.architecture, config.objective, meta["vocab_size"], meta["alphabet"][64], step) == (
        "tiny_diffusion", "d3pm", MASK, "A", 0)
    index = torch.arange(T)
    expected = their_logits(state, codes, index)[..., 1:]
    logits = model(ours(codes), (index + 1) / T)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    short = model(ours(codes[:, :5]), (index + 1) / T)
    torch.testing.assert_close(short, their_logits(state, codes[:, :5], index)[..., 1:], atol=1e-4, rtol=1e-4)
    where = torch.rand(codes.shape) < 0.4
    for positions in (where, places(where)):
        torch.testing.assert_close(model(ours(codes), (index + 1) / T, where=positions), logits[where])
    raw = checkpoint.load_model(tmp_path / "diffusion_model.pt", CPU, storage.Hints(overrides=UNSAID), raw=True)
    assert torch.equal(raw.model(ours(codes), (index + 1) / T), logits)
    for block in model.blocks:  # without the exchange of halves it is another network
        for layer in (block.q, block.k):
            layer.weight.copy_(swap_halves(layer.weight, HEADS))
    assert (model(ours(codes), (index + 1) / T) - expected).abs().max() > 0.1


def test_other_vocabularies(tmp_path):
    """A file of 60 codes is a model of the characters 1 ... 59; there is no table of sizes."""
    state = {key: value[:60] if len(value) == 128 else value for key, value in their_state().items()}
    model, config, meta, _ = loaded(tmp_path / "x.pt", state)
    assert model.vocab_size == meta["vocab_size"] == 59 and meta["alphabet"] == "".join(map(chr, range(1, 60)))
    codes = torch.randint(0, 60, (T, L), generator=torch.Generator().manual_seed(1))
    index = torch.arange(T)
    torch.testing.assert_close(model((codes - 1) % 60, (index + 1) / T),
                               their_logits(state, codes, index)[..., 1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_golden_logits(golden):
    """Logits recorded from tiny-diffusion's own code."""
    from safetensors.torch import load_file
    expected = load_file(golden / "tiny_diffusion" / "expected.safetensors")
    model, config, _, _ = loaded(golden / "tiny_diffusion" / "diffusion_model.pt",
                                 overrides={"n_head": 2, "seq_len": 40})
    t = (expected["net.t"] + 1) / config.T
    for kind in ("", "short_"):
        torch.testing.assert_close(model(ours(expected[f"net.{kind}x_t"]), t), expected[f"net.{kind}logits"][..., 1:],
                                   atol=1e-4, rtol=1e-5)


def test_golden_loss(golden):
    """Its training loss, cross-entropy over the masked tokens of the batch, and its gradients, through our network.

    Its head predicts the mask, too: that logit is put back for the softmax, from the file.
    """
    from safetensors.torch import load_file
    folder = golden / "tiny_diffusion"
    expected = load_file(folder / "expected.safetensors")
    model, config, _, _ = loaded(folder / "diffusion_model.pt", overrides={"n_head": 2, "seq_len": 40})
    x0, xt, t = ours(expected["train.x0"]), ours(expected["train.x_t"]), (expected["train.t"] + 1) / config.T
    features, mask_row = model.trunk(xt, t), torch.load(folder / "diffusion_model.pt")["output_head.weight"][:1]
    logits = torch.cat((model.head(features), features @ mask_row.T), -1)
    loss = F.cross_entropy(logits[xt == MASK], x0[xt == MASK])
    torch.testing.assert_close(loss, expected["train.loss"], atol=1e-4, rtol=1e-5)
    loss.backward()
    rows = ours(torch.arange(128)).argsort()  # their row of each of our tokens
    for name, found, recorded in (
            ("token_emb", model.embed.weight.grad, lambda g: g[rows]), ("time_emb", model.time_embed.weight.grad, None),
            ("output_head", model.head.weight.grad, lambda g: g[1:]),
            ("blocks.0.attn.c_q", swap_halves(model.blocks[0].q.weight.grad, 2), None),
            ("blocks.1.mlp.c_proj", model.blocks[1].mlp_out.weight.grad, None)):
        gradient = expected[f"train.grad.{name}.weight"]
        torch.testing.assert_close(found, recorded(gradient) if recorded else gradient, atol=1e-6, rtol=1e-3)


def test_bad_files(tmp_path):
    """What is missing, too much, of another shape or no tensor is named; n_head must divide the width."""
    def refused(match, overrides=UNSAID, **changes):
        state = their_state() | changes
        with pytest.raises(UserError, match=match) as error:
            loaded(tmp_path / "bad.pt", {key: value for key, value in state.items() if value is not None}, overrides)
        assert "\n" not in str(error.value)

    refused(r"blocks.1.k.weight: missing, expected \(16, 16\)", **{"blocks.1.attn.c_k.weight": None})
    refused(r"extra: \(3,\), expected none", extra=torch.zeros(3))
    refused(r"blocks.0.q.weight: \(8, 16\), expected \(16, 16\)", **{"blocks.0.attn.c_q.weight": torch.zeros(8, 16)})
    refused(r"head.weight: \(127, 16\), expected \(64, 16\)", **{"token_emb.weight": torch.zeros(65, 16)})
    refused(r"head.weight: \(64, 16\), expected \(127, 16\)", **{"output_head.weight": torch.zeros(65, 16)})
    refused("is damaged", **{"time_emb.weight": torch.zeros(3)})
    refused("but 'step' in it is not a tensor", step=3)
    refused("not finite", **{"time_emb.weight": torch.full((T, D), math.nan)})
    refused("n_embd=16 must be an even multiple of n_head=3", {"n_head": 3})
    refused("contains its n_layer: use --override only for n_head, seq_len", {"n_layer": 2})
    refused("has no known format; the most similar are tiny-diffusion, then .* it lacks time_emb.weight", None,
            **{"time_emb.weight": None})


def test_overrides(tmp_path, trained):
    """--override's text; what a file leaves unsaid has usual values; what it says, as ours do, cannot be changed."""
    assert translate.overrides("n_head=2,seq_len=40,prefix=0") == {"n_head": 2, "seq_len": 40, "prefix": 0}
    for text, word in (("n_heads=2", "KEY of block_size, n_head, prefix, seq_len"), ("n_head", "KEY=NUMBER"),
                       ("", "KEY=NUMBER"), ("n_head=2,n_head=3", "once"), ("n_head=two", "not an integer"),
                       ("seq_len=0", "outside")):
        with pytest.raises(argparse.ArgumentTypeError, match=word):
            translate.overrides(text)
    config = loaded(tmp_path / "model.pt", their_state(), {}).config
    assert (config.n_head, config.seq_len) == (1, 256)
    with pytest.raises(UserError, match="of this project and contains its n_head: leave out --override"):
        loaded(trained, overrides={"n_head": 2})
    assert loaded(trained, overrides={}).config.n_head == 2
    nanodd = nanodd_payload(small_model())
    assert loaded(tmp_path / "ckpt.pt", nanodd, {"seq_len": 7}).config.seq_len == 7
    with pytest.raises(UserError, match="of nanodd and contains its n_head: use --override only for seq_len"):
        loaded(tmp_path / "ckpt.pt", nanodd, {"n_head": 1})


# ---- the network -----------------------------------------------------------------------------------------------------


def theirs(**settings):
    return small(architecture="tiny_diffusion", conditioning="step", **settings)


def network(seed=0):
    torch.manual_seed(seed)
    return TinyDiffusion(50, theirs(seq_len=64, n_layer=3, n_head=2, n_embd=64, T=T))


def test_initial_network():
    """Blocks are the identity and the prediction is uniform; embeddings and matrices have their standard deviations."""
    model, x = network(), torch.randn(1, 8, 64)
    assert torch.equal(model.blocks[1](x, model.cos[:8], model.sin[:8]), x)
    assert (model(torch.full((1, 8), 50), torch.ones(1)) == 0).all()
    for weight, std in ((model.embed.weight, 1), (model.time_embed.weight, 1), (model.blocks[0].q.weight, 1 / 8),
                        (model.blocks[2].mlp_in.weight, 1 / 8)):
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    published = TinyDiffusion(127, theirs(seq_len=256, n_layer=6, n_head=6, n_embd=384, T=128))
    assert count_parameters(published) == 10_764_288 - 384  # without the mask's logits


def test_time_and_what_it_is_told():
    """Step s = round(t T) is row s - 1, cut off at both ends; an objective's steps are met exactly."""
    model, objective = network(), D3PM(50, T)
    seen = []
    model.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].tolist()))
    xt = torch.full((T, 4), 50)
    model.trunk(xt, objective.time(torch.arange(1, T + 1, dtype=torch.float64) / T))
    model.trunk(xt[:4], torch.tensor([0.001, 0.149, 0.151, 1.0]))
    assert seen == [list(range(T)), [0, 0, 1, T - 1]]


@pytest.mark.parametrize("run, settings", [
    ("topk1", Settings("topk", {"k": 1})), ("topk4", Settings("topk", {"k": 4})),
    ("conf90", Settings("threshold", {"threshold": 0.9})), ("conf40", Settings("threshold", {"threshold": 0.4}))])
def test_golden_runs(run, settings, golden):
    """Greedy runs of the original code with a context: the same tokens, revealed at the same steps, as many calls.

    That code feeds its network the time in the wrong direction: the index of the step, 0, 1, 2, ..., T - 1, T - 1, ...,
    where 0 was trained as the step with the fewest masks. In the right direction the tokens are others.
    """
    from safetensors.torch import load_file
    expected = load_file(golden / "tiny_diffusion" / "expected.safetensors")
    model, config, meta, _ = loaded(golden / "tiny_diffusion" / "diffusion_model.pt",
                                    overrides={"n_head": 2, "seq_len": 40})
    objective = config.make_objective(meta["vocab_size"])
    context = ours(expected["sample.context"])
    canvas = F.pad(context, (0, 32), value=objective.mask_id)

    def wrong_direction():
        index = iter(range(10**6))
        return lambda rate: torch.full(rate.shape, (min(next(index), config.T - 1) + 1) / config.T)

    def go():
        denoiser, revealed, xt = Counted(model), torch.full_like(canvas, -1), canvas
        states = settings._replace(temperature=0.0).states(objective, denoiser, canvas, torch.Generator())
        for step, state in enumerate(states):
            revealed[xt != state.xt], xt = step, state.xt
        return xt, revealed, denoiser.nfe

    right, *_ = go()
    objective.time = wrong_direction()
    tokens, steps, nfe = go()
    assert torch.equal(tokens + 1, expected[f"sample.{run}.ctx.tokens"])  # their ids are codes
    assert torch.equal(steps, expected[f"sample.{run}.ctx.step"])
    assert nfe == expected[f"sample.{run}.ctx.n_forward"]
    assert not torch.equal(right, tokens)


def test_flops():
    """flops() is what PyTorch's own counter finds in a forward and backward pass."""
    from torch.utils.flop_counter import FlopCounterMode
    model, where = network(), torch.rand(4, 64) < 0.5
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randint(0, 50, (4, 64)), torch.rand(4), where).sum().backward()
    assert counter.get_total_flops() == pytest.approx(model.flops(64, where.float().mean().item()) * 4 * 64)


def test_bf16_autocast_is_close():
    """bfloat16 matrix products move logits by a little; they come out of a float32 residual stream."""
    model, xt, t = network(), torch.randint(0, 51, (3, 16)), torch.rand(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
        with torch.autocast("cpu", torch.bfloat16):
            assert model.trunk(xt, t).dtype == torch.float32
            logits = model(xt, t)
        assert logits.dtype == torch.bfloat16
        assert (logits.float() - model(xt, t)).abs().max() < 0.05 * model(xt, t).abs().max()


def test_config():
    """Settings that this network lacks are refused, not ignored."""
    for wrong in ({"dropout": 0.1}, {"shift_tokens": True}, {"checkpoint_blocks": True}, {"conditioning": "time"},
                  {"objective": "ar"}, {"objective": "ar", "conditioning": "none"}):
        with pytest.raises(UserError, match="architecture=tiny_diffusion needs conditioning=step"):
            Config(architecture="tiny_diffusion", **wrong)
    assert isinstance(Config(architecture="tiny_diffusion", n_layer=1).make_model(5), TinyDiffusion)


# ---- the command lines -----------------------------------------------------------------------------------------------


def test_train_and_sample(call, data_dir, tmp_path):
    """It trains, resumes and samples by the same commands as the DiT; a run of the one is none of the other."""
    run = lambda *more: train(call, "d3pm_text8", data_dir, tmp_path / "out", "--dropout=0", "--lr=0.01", *more)
    result = run("--architecture=tiny_diffusion", "--max_steps=3")
    assert result.code == 0, result
    assert len(losses(tmp_path / "out")) == 3 and losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    assert isinstance(checkpoint.load_model(tmp_path / "out", CPU).model, TinyDiffusion)
    assert_one_line(run("--resume=auto", "--max_steps=3"), "architecture (was 'tiny_diffusion', now 'dit')")
    assert run("--architecture=tiny_diffusion", "--max_steps=3", "--resume=auto").code == 0
    result = call("sample.py", tmp_path / "out", "--steps=4")
    assert result.code == 0 and len(result.out.rstrip("\n")) == 32, result


def test_their_checkpoint_on_the_command_line(call, tmp_path):
    """sample.py and evaluate.py --text take the file as it is."""
    torch.save(their_state(), tmp_path / "diffusion_model.pt")
    result = call("sample.py", tmp_path / "diffusion_model.pt", "--steps=2")
    assert result.code == 0 and result.out.isascii(), result
    (tmp_path / "book.txt").write_text("To be, or not to be:\nthat is the question. " * 20)
    result = call("evaluate.py", tmp_path / "diffusion_model.pt", "--text", tmp_path / "book.txt", "--n_tokens=256")
    assert result.code == 0 and f"T = {T}" in result.out, result
