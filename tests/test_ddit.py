"""SEDD, MDLM, BD3-LM, Duo and their kin, against their original code.

What it computed from small checkpoints in their formats, and ours from the same files. Skipped where GOLDEN_DIR is not
set. Tolerances are those recorded with the arrays.
"""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import storage
from attention import layout_beside_clean, layout_of_blocks
from block_diffusion import BlockDiffusion
from commands import assert_one_line, train
from costs import count_parameters
from data.loader import SPLITS
from diffusion import MDLM, Noise
from foreign import ddit, files
from networks import log_scores, small
from sampling import euler_chance
from schedules import make_schedule
from uniform import Uniform, posterior, uniform_jumps

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load(golden):
    """load(folder, **) -> (model, objective, expected arrays)."""
    from safetensors.torch import load_file

    def load(path, expected=None, dataset=None, data_dir="", raw=False, folder=None):
        hints = storage.Hints(dataset, data_dir=str(data_dir))
        loaded = checkpoint.load_model(folder or golden / path, CPU, hints, raw)
        arrays = load_file(golden / (expected or path.split("/")[0]) / "expected.safetensors")
        return loaded.model, loaded.config.make_objective(loaded.meta["vocab_size"]), arrays
    return load


def close(actual, expected, atol=1e-4, rtol=1e-5):
    torch.testing.assert_close(actual.float(), expected.float(), atol=atol, rtol=rtol)


def gradients(model, loss):
    return dict(zip(dict(model.named_parameters()),
                    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)))


OURS = {"vocab_embed.embedding": "embed.weight", "blocks.0.attn_qkv.weight": "blocks.0.qkv.weight",
        "blocks.1.adaLN_modulation.bias": "blocks.1.modulation.bias", "output_layer.linear.bias": "head_bias",
        "blocks.1.mlp.0.weight": "blocks.1.mlp_in.weight"}


# ---- SEDD ------------------------------------------------------------------------------------------------------------


def test_schedules(load):
    """Total noise and its rate, log-linear and geometric, as SEDD's code has them."""
    _, _, arrays = load("sedd/hf_absorb")
    t = arrays["noise.t"].double()
    for name, ours in (("loglinear", "loglinear"), ("geometric_1e-3_1", "geometric:1e-3:1"),
                       ("geometric_1e-4_20", "geometric")):
        schedule = make_schedule(ours)
        close(schedule.sigma(t), arrays[f"noise.{name}.sigma"], atol=0, rtol=1e-5)
        close(-schedule.dalpha(t) / schedule.alpha(t), arrays[f"noise.{name}.dsigma"], atol=0, rtol=1e-3)


def masked_probs(objective, logits, xt, t, chance):
    """What SEDD hands to its sampler: q times the chance of falling at masks, and what is left at the mask."""
    q = objective.log_prediction(logits, t).exp() * chance
    return torch.cat((q, 1 - q.sum(-1, keepdim=True)), -1)


@pytest.mark.parametrize("name", ["hf_absorb", "hf_absorb_noscale", "oxen"])
def test_sedd_masks(load, name, tmp_path):
    """Log-scores, score entropy at masks, losses, gradients, and probabilities of steps.

    The steps are Euler, analytic and denoising ones.
    """
    if name == "oxen":
        symbols = "abcdefghijklmnopqrstuvwxyz '-"
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "meta.json").write_text(json.dumps({
            "tokenizer": "char", "alphabet": symbols, "vocab_size": 29, "dtype": "uint8",
            "sizes": dict.fromkeys(SPLITS, 1), "sha256": dict.fromkeys(SPLITS, "")}))
        model, objective, arrays = load("sedd_oxen", dataset="mine", data_dir=tmp_path)
    else:
        model, objective, arrays = load(f"sedd/{name}")
        arrays = {key.removeprefix(name + "."): value for key, value in arrays.items() if key.startswith(name + ".")}
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    B, L, V = *xt.shape, objective.mask_id
    masked, flat_t = xt == V, t[:, None].expand(xt.shape)
    noise = objective.schedule
    close(noise.sigma(t.double()), arrays["sigma"], atol=0)
    dsigma = -noise.dalpha(t.double()) / noise.alpha(t.double())
    close(dsigma, arrays["dsigma"], atol=0, rtol=1e-4)

    logits = model(xt, t)
    log_score = log_scores(objective, logits.flatten(0, 1), flat_t.flatten()).view(B, L, V)
    own = F.one_hot(xt, V + 1)[..., :V].bool()
    close(log_score.masked_fill(own, 0.0), arrays["log_score"][..., :V])
    cost = objective.cost(logits[masked], x0[masked], flat_t[masked])
    r = objective.log_odds(flat_t[masked].double()).exp()
    close(cost * r, arrays["score_entropy"][masked], atol=1e-5, rtol=1e-4)
    assert (arrays["score_entropy"][~masked] == 0).all()
    loss = (noise.weight(t) * torch.zeros(B, L).masked_scatter(masked, cost).sum(1))
    close(loss, arrays["loss"], atol=0, rtol=1e-4)
    found = gradients(model, loss.mean())
    for key, ours in OURS.items():
        if f"grad.{key}" in arrays:
            mine = found[ours]  # not scaled, they are in the thousands, and rounding moves the original's by 5e-3
            close(mine, arrays[f"grad.{key}"][:len(mine)],
                  atol=0.05 if name == "hf_absorb_noscale" else 1e-5, rtol=1e-3)

    for i, sigma in enumerate((0.01, 0.499, 0.5, 3.0)):
        if f"entropy_at_sigma{i}" in arrays:
            at = noise.inverse(torch.tensor([math.exp(-sigma)], dtype=torch.float64)).float().expand(B)
            entropy = (objective.cost(model(xt, at)[masked], x0[masked], at[:1].expand(int(masked.sum())))
                       / math.expm1(sigma))
            close(entropy, arrays[f"entropy_at_sigma{i}"][masked], atol=1e-5, rtol=1e-4)

    for where in ("hi", "mid", "lo"):
        if f"step.{where}.t" not in arrays:
            continue
        t, dt = arrays[f"step.{where}.t"].squeeze(1), arrays[f"step.{where}.dt"].double()
        r, s = (1 - noise.alpha(x).item() for x in (t[0].double(), t[0].double() - dt))
        logits, flat = model(xt, t)[masked], t[0].expand(int(masked.sum()))
        for step, chance in (("euler", euler_chance(noise, r, s)), ("analytic", 1 - s / r), ("denoise", 1.0)):
            expected = arrays.get(f"step.{where}.{step}.probs")
            if expected is not None:
                ours = masked_probs(objective, logits, xt, flat, chance)[:, :expected.shape[-1]]
                scale = ours.abs().max().clamp(min=1)
                close(ours / scale, expected[masked] / scale, atol=1e-5, rtol=1e-4)
                visible = F.one_hot(xt, V + 1)[..., :expected.shape[-1]][~masked].float()
                close(visible, expected[~masked])  # visible tokens stay


def test_sedd_uniform(load):
    """The same of uniform noise.

    The original's score entropy loses digits at small sigma; ours is compared at 1e-2 there and with float64
    everywhere.
    """
    model, objective, arrays = load("sedd/hf_uniform")
    arrays = {key.removeprefix("hf_uniform."): value for key, value in arrays.items() if key.startswith("hf_uniform.")}
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    (B, L), N, noise = xt.shape, objective.mask_id, objective.schedule
    sigma = noise.sigma(t.double())
    close(sigma, arrays["sigma"], atol=0)
    logits = model(xt, t)
    per_token = sigma.float()[:, None].expand(B, L)
    close(objective.log_score(logits, xt, per_token), arrays["log_score"])
    cost = objective.cost(logits, x0, xt, sigma.float())
    close(cost, arrays["score_entropy"], atol=1e-5, rtol=1e-2)
    es, log_s = sigma.expm1()[:, None, None], objective.log_score(logits, xt, per_token).double()
    at = lambda tokens: F.one_hot(tokens, N).double() + es / N  # q(y | x0), but for a factor
    r = at(x0) / at(x0).gather(-1, xt[..., None])
    exact = (log_s.exp() - r * log_s + r * (r.log() - 1)).scatter(-1, xt[..., None], 0.0).sum(-1) / N
    close(cost, exact, atol=1e-6, rtol=1e-4)
    loss = (arrays["dsigma"][:, None] * cost).sum(1)
    close(loss, arrays["loss"], atol=0, rtol=1e-2)
    for key, mine in gradients(model, loss.mean()).items():
        for theirs, ours in OURS.items():
            if ours == key and f"grad.{theirs}" in arrays:
                close(mine, arrays[f"grad.{theirs}"], atol=1e-3, rtol=1e-2)
    for i, s in enumerate((0.01, 0.499, 0.5, 3.0)):
        told = noise.inverse(torch.tensor([math.exp(-s)], dtype=torch.float64)).float().expand(B)
        close(objective.cost(model(xt, told), x0, xt, torch.full((B,), s)), arrays[f"entropy_at_sigma{i}"],
              atol=1e-5, rtol=1e-3)
    for where in ("hi", "mid", "lo"):
        t, dt = arrays[f"step.{where}.t"].squeeze(1), arrays[f"step.{where}.dt"].double()
        r, s = (1 - noise.alpha(x).item() for x in (t[0].double(), t[0].double() - dt))
        logits = model(xt, t).flatten(0, 1)
        now, sigma = xt.flatten(), noise.sigma(t[:1].double()).float().expand(B * L)
        euler = uniform_jumps(objective, logits, now, r, s)
        expected = arrays[f"step.{where}.euler.probs"].flatten(0, 1)
        scale = expected.abs().max().clamp(min=1)
        close(euler / scale, expected / scale, atol=1e-5, rtol=1e-4)
        x = objective.prediction(logits, now, sigma)
        for name, to in (("analytic", s), ("denoise", 0.0)):
            ours, expected = posterior(x, now, r, to), arrays[f"step.{where}.{name}.probs"].flatten(0, 1)
            ours, expected = (p / p.sum(-1, keepdim=True) for p in (ours, expected))  # theirs are not normalised
            close(ours, expected, atol=2e-4, rtol=1e-3)


def test_sedd_local_run(load):
    """checkpoints-meta/checkpoint.pth and .hydra/config.yaml: the unnamed moving average, and the raw weights."""
    for kind in ("ema", "raw"):
        model, objective, arrays = load("sedd_local", raw=kind == "raw")
        x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
        log_score = log_scores(objective, model(xt, t).flatten(0, 1), t[:, None].expand(xt.shape).flatten())
        own = F.one_hot(xt, 28)[..., :27].bool()
        close(log_score.view(*xt.shape, 27).masked_fill(own, 0.0), arrays[f"{kind}.log_score"][..., :27])
        if kind == "ema":
            noise = MDLM(27, "loglinear").noise(t.double(), torch.zeros(xt.shape))._replace(mask=xt == 27)
            close(objective.nelbo(model, x0, noise) * xt.shape[1], arrays["ema.loss"], atol=0, rtol=1e-4)


# ---- MDLM and BD3-LM -------------------------------------------------------------------------------------------------


def with_settings(golden, tmp_path, name, **changes):
    """A copy of a folder whose config.json says something else."""
    folder = tmp_path / f"{name.replace('/', '_')}{len(list(tmp_path.iterdir()))}"
    shutil.copytree(golden / name, folder)
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def unfolded(golden):
    """MDLM's network as it is, always told sigma = 0."""
    found = files.read_files(files.find_weights(golden / "mdlm/hf"))
    state = {key: value for key, value in files.tensors(found.payload).items() if "inv_freq" not in key}
    model = small(seq_len=32, n_embd=64, n_cond=32, conditioning="constant", tied=False, head_bias=True).make_model(27)
    model.load_state_dict(ddit.mask_last(files.rename(state, ddit.NAMES), 27))
    return model.eval()


@pytest.mark.parametrize("path", ["mdlm/hf", "sedd/hf_absorb", "nanodd"])
def test_fine_tuning(golden, call, data_dir, tmp_path, path):
    """--init_from first says which flags give the network of the checkpoint, all at once; with these it begins."""
    flags = ["--conditioning=none", f"--init_from={golden / path}", "--max_steps=1"]
    refused = train(call, "mdlm_text8", data_dir, tmp_path / "out", *flags)
    assert_one_line(refused, "of another network than that of this config: add --n_")
    flags += refused.err.strip().split("add ")[1].split(" ")
    begun = train(call, "mdlm_text8", data_dir, tmp_path / "out", *flags)
    assert begun.code == 0 and "tensors taken as they are" in begun.err and "; new:" not in begun.err, begun.err


def test_folded_is_unfolded(load, golden):
    """Constant modulations folded into the weights: the same function, without time, with fewer parameters."""
    folded, _, arrays = load("mdlm/hf")
    whole, xt, t = unfolded(golden), arrays["x_t"], arrays["t"]
    assert folded.time_embed is None and count_parameters(folded) < 0.75 * count_parameters(whole)
    torch.testing.assert_close(folded(xt, t), whole(xt, t), atol=1e-5, rtol=1e-5)
    assert (folded(xt, t) - arrays["backbone.logits_sigma"][..., :27]).abs().max() > 0.01


def test_mdlm(load, golden, tmp_path):
    """Logits with sigma = 0 and with sigma; SUBS; NELBO per token; gradients; ancestral, cached and analytic steps."""
    model, objective, arrays = load("mdlm/hf")
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    masked = xt == 27
    timed, timed_objective, _ = load("mdlm/hf",
                                     folder=with_settings(golden, tmp_path, "mdlm/hf", time_conditioning=True))
    close(model(xt, t), arrays["backbone.logits_zero"][..., :27])
    close(timed(xt, t), arrays["backbone.logits_sigma"][..., :27])
    for name, net, process in (("subs", model, objective), ("subs_tc", timed, timed_objective)):
        log_p = net(xt, t, where=masked).log_softmax(-1)
        close(log_p, arrays[f"{name}.output"][masked][:, :27])
        ce = process.cost(net(xt, t, where=masked), x0[masked], t)
        weight = make_schedule("loglinear").weight(t)
        close(weight[:, None].expand(xt.shape)[masked] * ce, arrays[f"{name}.nelbo_per_token"][masked],
              atol=1e-5, rtol=1e-4)
        assert (arrays[f"{name}.nelbo_per_token"][~masked] == 0).all()
        for where in ("hi", "mid", "lo"):
            at, dt = arrays[f"step.{where}.t"].squeeze(1), arrays[f"step.{where}.dt"].item()
            p = net(xt, at, where=masked).softmax(-1)
            r, s = at[0].item(), at[0].item() - dt
            for step, scale in (("ddpm", 0.999), ("ddpm_cache", 1.0)):  # theirs sum to the mask rate
                both = torch.cat(((r - s) * scale * p, torch.full((len(p), 1), s * scale)), -1)
                close(both, arrays[f"{name}.step.{where}.{step}.q_xs"][masked], atol=1e-6, rtol=1e-4)
            close((1 - s / r) * p, arrays[f"{name}.step.{where}.analytic.q_xs"][masked][:, :27], atol=1e-6, rtol=1e-4)
    whole = unfolded(golden)
    ce = torch.zeros(xt.shape).masked_scatter(masked, objective.cost(whole(xt, t, where=masked), x0[masked], t))
    loss = (ce / t[:, None])[:, :-3].sum() / ce[:, :-3].numel()
    close(loss, arrays["subs.loss_masked"], atol=0, rtol=1e-4)
    found = gradients(whole, loss)
    for key, ours in OURS.items():
        if f"subs.grad.{key}" in arrays:
            close(found[ours], arrays[f"subs.grad.{key}"][:len(found[ours])], atol=1e-6, rtol=1e-3)


def test_score_entropy_of_mdlms_code(load, golden, tmp_path):
    """The same network under its parameterization=sedd: scores, score entropy, analytic steps."""
    folder = with_settings(golden, tmp_path, "mdlm/hf", time_conditioning=True, parameterization="sedd")
    model, objective, arrays = load("mdlm/hf", folder=folder)
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    masked = xt == 27
    at = t[:, None].expand(xt.shape)[masked]
    logits = model(xt, t, where=masked)
    close(log_scores(objective, logits, at), arrays["sedd.output"][masked][:, :27])
    close(objective.schedule.weight(at) * objective.cost(logits, x0[masked], at),
          arrays["sedd.nelbo_per_token"][masked], atol=1e-5, rtol=1e-4)
    for where in ("hi", "mid", "lo"):
        at, dt = arrays[f"step.{where}.t"].squeeze(1), arrays[f"step.{where}.dt"].item()
        at, r, s = at[:1].expand(int(masked.sum())), at[0].item(), at[0].item() - dt
        logits = model(xt, at[:1].expand(len(xt)), where=masked)
        q = objective.log_prediction(logits, at).exp()
        close((1 - s / r) * q, arrays[f"sedd.step.{where}.analytic.q_xs"][masked][:, :27], atol=1e-5, rtol=1e-4)
        close(q, arrays[f"sedd.step.{where}.denoise.q_xs"][masked][:, :27], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_mdlm_lightning(load, kind):
    """A file that Lightning's own trainer wrote, read without Lightning.

    Raw weights and the unnamed average, told sigma.
    """
    model, objective, arrays = load("mdlm_lightning", raw=kind == "raw")
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    masked = xt == 27
    close(model(xt, t), arrays[f"{kind}.logits"][..., :27])
    close(model(xt, t, where=masked).log_softmax(-1), arrays[f"{kind}.log_x_theta"][masked][:, :27])
    weight = objective.schedule.weight(t)[:, None].expand(xt.shape)[masked]
    close(weight * objective.cost(model(xt, t, where=masked), x0[masked], t), arrays[f"{kind}.nelbo_per_token"][masked],
          atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [4, 16])
def test_bd3lm_blocks(load, size):
    """The folded network as a block diffusion model, in training (their [x_t | x_0] is our `clean`) and in sampling,
    there also with the keys and values of the blocks before.

    What a token sees, logits, likelihoods, NELBO per token with a time per block, losses, gradients, reverse steps.
    """
    model, objective, arrays = load(f"bd3lm/hf_block{size}")
    arrays, x0 = {key.removeprefix(f"block{size}."): value for key, value in arrays.items()}, arrays["x0"]
    L, cpu = x0.shape[1], torch.device("cpu")
    assert type(objective) is BlockDiffusion and objective.block_size == model.block_size == size
    noisy, clean = (layout.sees for layout in (layout_beside_clean(L, size, cpu), layout_of_blocks(L, 0, size, cpu)))
    theirs = arrays["attn_mask"]  # of [x_t | x_0]; our past, the clean text, comes first
    assert torch.equal(torch.cat((noisy[:, L:], noisy[:, :L]), 1), theirs[:L])
    assert torch.equal(torch.cat((torch.zeros_like(clean), clean), 1), theirs[L:])
    xt, t = arrays["x_t"], arrays["t"]
    logits = model(xt, t, clean=x0)
    close(logits, arrays["hf_logits"][..., :27])
    close(logits, arrays["dit_logits"][..., :27])
    masked = xt == 27
    close(logits[masked].log_softmax(-1), arrays["log_x_theta"][masked][:, :27])
    xt = torch.cat((x0[:, :1], xt[:, 1:]), 1)  # the first token is given
    masked = xt == 27
    noise = Noise(masked, t, 1 / t)
    close(noise.weight * objective.masked_ce(model, x0, noise), arrays["nelbo_per_token"], atol=1e-5, rtol=1e-4)
    nelbo = objective.nelbo(model, x0, noise)
    close(nelbo.mean(), arrays["loss_train"], atol=0, rtol=1e-4)
    close(nelbo.mean() * L / (L - 1), arrays["loss_eval"], atol=0, rtol=1e-4)
    grads = gradients(model, objective.nelbo(model, x0, noise).mean())
    close(grads["blocks.0.qkv.weight"], arrays["grad.blocks.0.attn_qkv.weight"], atol=1e-6, rtol=1e-3)
    close(grads["head_bias"], arrays["grad.output_layer.linear.bias"][:27], atol=1e-6, rtol=1e-3)

    x = arrays["sample.x"]
    logits, past = model(x, t), None
    for block in x.split(size, 1)[:-1]:
        past = model.remember(block, t, past=past)
    close(model(x[:, -size:], t, past=past), logits[:, -size:])
    masked = x == 27
    close(logits[masked].log_softmax(-1), arrays["sample.log_x_theta"][masked][:, :27])
    for where in ("mid", "lo"):
        r, dt = arrays[f"sample.{where}.t_dt"].tolist()
        last = masked[:, -size:]
        p = logits[:, -size:][last].softmax(-1)
        both = torch.cat((p * dt / r, torch.full((len(p), 1), 1 - dt / r)), -1)
        close(both, arrays[f"sample.{where}.q_xs"][last], atol=5e-5, rtol=0)


# ---- Duo -------------------------------------------------------------------------------------------------------------


def test_duo(load):
    """Logits, log x_theta, NELBO per token, gradients, posterior steps.

    The NELBO per token also of recorded predictions, in float64's digits.
    """
    model, objective, arrays = load("duo/hf")
    assert type(objective) is Uniform and objective.mask_id == 27
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    noise, steps = objective.schedule, ("hi", "mid", "lo")
    close(noise.alpha(arrays["noise.t"]), arrays["noise.loglinear.alpha"], atol=1e-6)
    close(noise.dalpha(arrays["noise.t"]), arrays["noise.loglinear.dalpha"], atol=1e-5)
    logits, sigma = model(xt, t), noise.sigma(t.double()).float()
    close(sigma, arrays["loglinear.sigma"].squeeze(1), atol=1e-5)
    close(logits, arrays["loglinear.logits"])
    close(logits.log_softmax(-1), arrays["loglinear.log_x_theta"])
    dsigma = (-arrays["loglinear.dalpha_t"] / arrays["loglinear.alpha_t"])
    nelbo = dsigma * objective.cost(logits, x0, xt, sigma)
    close(nelbo, arrays["loglinear.nelbo_per_token"], atol=1e-4, rtol=1e-4)
    for kind in ("loglinear", "cosine"):  # of cosine the rates alone: its derivative lacks a factor in that project
        alpha = arrays[f"{kind}.alpha_t"].squeeze(1)
        cost = objective.cost(arrays[f"{kind}.rand_log_x_theta"], x0, xt, -torch.log(alpha))
        close(-arrays[f"{kind}.dalpha_t"] / arrays[f"{kind}.alpha_t"] * cost,
              arrays[f"{kind}.rand_nelbo_per_token_f64"], atol=1e-5, rtol=1e-4)
    loss = nelbo.mean()
    close(loss, arrays["loglinear.loss"], atol=0, rtol=1e-3)
    found = gradients(model, loss)
    for key, ours in OURS.items():
        if f"loglinear.grad.{key}" in arrays:
            close(found[ours], arrays[f"loglinear.grad.{key}"], atol=1e-4, rtol=1e-2)
    for where in steps:
        alpha_t, alpha_s = arrays[f"loglinear.step.{where}.alpha_t_s"][0].double().tolist()
        at = arrays[f"loglinear.step.{where}.t_dt"][:1].expand(len(xt))
        x = model(xt, at).softmax(-1).double()
        for name, s in (("ancestral", 1 - alpha_s), ("denoise", 0.0)):
            q = posterior(x, xt, 1 - alpha_t, s)
            close(q / q.sum(-1, keepdim=True), arrays[f"loglinear.step.{where}.{name}.q_xs"], atol=5e-5)
        if f"loglinear.step.{where}.true_posterior" in arrays:
            q = posterior(F.one_hot(x0, 27).double(), xt, 1 - alpha_t, 1 - alpha_s)
            close(q / q.sum(-1, keepdim=True), arrays[f"loglinear.step.{where}.true_posterior"], atol=1e-6)


@pytest.mark.parametrize("kind", ["raw", "ema"])
def test_duo_lightning(load, kind):
    model, objective, arrays = load("duo_lightning", raw=kind == "raw")
    x0, xt, t = arrays["x0"], arrays["x_t"], arrays["t"]
    logits, sigma = model(xt, t), objective.schedule.sigma(t.double()).float()
    close(logits, arrays[f"{kind}.logits"])
    dsigma = -objective.schedule.dalpha(t) / objective.schedule.alpha(t)
    close(dsigma[:, None] * objective.cost(logits, x0, xt, sigma), arrays[f"{kind}.nelbo_per_token"],
          atol=1e-4, rtol=1e-4)


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sedd/hf_absorb", "sedd/hf_absorb_noscale", "sedd/hf_uniform", "sedd_local",
                                  "sedd_oxen", "mdlm/hf", "mdlm_lightning", "bd3lm/hf_block4", "bd3lm/hf_block16",
                                  "duo/hf", "duo_lightning", "nanodd", "tiny_diffusion"])
def test_every_folder_samples_and_scores(call, golden, data_dir, tmp_path, name):
    """`sample.py FOLDER` and `evaluate.py FOLDER`, with a prompt; a line says that these weights are random."""
    more = ["--data_dir", data_dir]
    if name == "sedd_oxen":
        symbols = "abcdefghijklmnopqrstuvwxyz '-"  # nobody knows what its 29 tokens are
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "meta.json").write_text((data_dir / "tiny" / "meta.json").read_text().replace(
            '" abcdefghijklmnopqrstuvwxyz"', json.dumps(symbols)).replace('"vocab_size": 27', '"vocab_size": 29'))
        (tmp_path / "mine" / "val.bin").write_bytes((data_dir / "tiny" / "val.bin").read_bytes())
        assert call("sample.py", golden / name).code == 2
        more = ["--data_dir", tmp_path, "--dataset", "mine"]
    if name == "tiny_diffusion":
        more += ["--override", "n_head=2,seq_len=40", "--override", "prefix=8"]
    prompt = ["--prefix=the ", "--length=16"] if name.startswith("bd3lm") else ["--template=the {12}"]
    result = call("sample.py", golden / name, "--steps=4", *prompt, *more)
    assert result.code == 0 and result.out.startswith("the ") and len(result.out) == 17, result.err
    if name != "sedd_oxen":
        assert "look wrong or untrained" in result.err
        more += ["--dataset", "tiny"]
    result = call("evaluate.py", golden / name, "--n_tokens=512", "--json", *more)
    assert result.code == 0 and 1 < json.loads(result.out)["bits_per_token"] < 1000, result.err
