"""foreign/translate.py: other projects' checkpoints give what their own code gave (recorded outputs in GOLDEN_DIR)."""

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import storage
from cli import UserError
from commands import assert_one_line
from configs import Config
from diffusion import D3PM, Noise

MASK, T = 27, 1000


def foreign(model):
    """The state dict of one of our networks under nanoDD's names, with its buffers."""
    names = {"embed.weight": "vocab_embed.weight", "norm.weight": "norm_final.weight",
             "modulation.": "adaLN_modulation.", "time_embed.fc_in.": "c_embed.mlp.0.",
             "time_embed.fc_out.": "c_embed.mlp.2.", ".qkv.": ".attn_qkv.", ".mlp_in.": ".mlp.0.",
             ".mlp_out.": ".mlp.2."}
    state = {"betas": torch.zeros(T + 1), "alpha_bars": torch.zeros(T + 1), "net.rotary_emb.inv_freq": torch.zeros(4)}
    for key, value in model.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state["net." + key] = value
    return state


def nanodd_payload(model, prefix=""):
    args = dict(vocab_size=model.vocab_size, n_embed=16, n_heads=2, n_blocks=2, n_cond=8, dropout=0.0, T=T,
                lambda_ce=0.05)
    state = {prefix + key: value for key, value in foreign(model).items()}
    ema = {"initted": torch.tensor(True), "step": torch.tensor(3),
           **{f"ema_model.{k}": v + 1 for k, v in state.items()}}
    return dict(model=state, ema=ema, optimizer={}, model_cls="D3PMAbsorbing", model_args=args,
                training_args=dict(seq_len=12), total_batch_size=1, iter_num=7, best_val_loss=1.0)


def small_model(vocab_size=27):
    torch.manual_seed(0)
    return Config(seq_len=12, n_layer=2, n_head=2, n_embd=16, n_cond=8).make_model(vocab_size)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_nanodd_names(tmp_path, prefix):
    """Every tensor finds its place, raw and averaged, also through the prefixes of compile and DDP."""
    model = small_model()
    torch.save(nanodd_payload(model, prefix), tmp_path / "ckpt.pt")
    raw = checkpoint.load_model(tmp_path / "ckpt.pt", torch.device("cpu"), raw=True)
    ema = checkpoint.load_model(tmp_path, torch.device("cpu"))
    assert ((raw.config.seq_len, raw.config.T, raw.config.conditioning, raw.meta["name"], raw.step)
            == (12, T, "step", "text8", 7))
    for key, value in model.state_dict().items():
        assert torch.equal(raw.model.state_dict()[key], value)
        assert torch.equal(ema.model.state_dict()[key], value + 1)


def test_nanodd_tokens_by_their_number(tmp_path):
    torch.save(nanodd_payload(small_model(50257)), tmp_path / "ckpt.pt")
    meta = storage.read(tmp_path)["meta"]
    assert (meta["name"], meta["tokenizer"], meta["vocab_size"]) == ("openwebtext", "gpt2", 50257)


def test_nanodd_strictness(tmp_path):
    """A missing tensor, a wrong shape, a foreign vocabulary and a missing entry are named."""
    def load(change, dataset=None):
        payload = nanodd_payload(small_model())
        change(payload)
        torch.save(payload, tmp_path / "ckpt.pt")
        checkpoint.load_model(tmp_path / "ckpt.pt", torch.device("cpu"), storage.Hints(dataset))

    with pytest.raises(UserError, match="blocks.1.mlp_in.bias: missing"):
        load(lambda p: p["ema"].pop("ema_model.net.blocks.1.mlp.0.bias"))
    with pytest.raises(UserError, match=r"norm.weight: \(3,\), expected \(16,\)"):
        load(lambda p: p["ema"].update({"ema_model.net.norm_final.weight": torch.zeros(3)}))
    with pytest.raises(UserError, match="has 27 tokens, and openwebtext has 50,257"):
        load(lambda p: None, dataset="openwebtext")
    with pytest.raises(UserError, match="is damaged"):
        load(lambda p: p.update(model_args=[]))
    with pytest.raises(UserError, match="lacks 'model_args'"):
        load(lambda p: p.pop("model_args"))
    with pytest.raises(UserError, match="of this project or of another one that is known .nanodd, "
                                        ".*it contains weights"):
        torch.save({"weights": 1}, tmp_path / "ckpt.pt")
        checkpoint.load_model(tmp_path, torch.device("cpu"))


def test_nanodd_of_any_data_set(call, tmp_path):
    """A checkpoint of 6 symbols is read with any prepared data set of 6, and no other; one of 27 symbols is text8's
    unless the data set named has 27 others."""
    letters = {"six": "abcdef", "seven": "abcdefg", "others": "ABCDEFGHIJKLMNOPQRSTUVWXYZ.", "same": "etaoin shrdlu"}
    for name, alphabet in letters.items():
        (tmp_path / "text.txt").write_text(alphabet * 100)
        assert call("data/prepare_textfile.py", tmp_path / "text.txt", "--name", name, "--data_dir", tmp_path).code == 0
    torch.save(nanodd_payload(small_model(6)), tmp_path / "six.pt")
    torch.save(nanodd_payload(small_model()), tmp_path / "text8.pt")
    flags = ["--data_dir", tmp_path, "--steps=3"]
    result = call("sample.py", tmp_path / "six.pt", "--dataset=six", *flags)
    assert result.code == 0 and len(result.out) == 13 and set(result.out) <= set("abcdef\n")
    assert call("evaluate.py", tmp_path / "six.pt", "--dataset=six", "--data_dir", tmp_path).code == 0
    assert_one_line(call("sample.py", tmp_path / "six.pt", *flags), "has 6 tokens", "the prepared data set")
    assert_one_line(call("sample.py", tmp_path / "six.pt", "--dataset=seven", *flags), "has 6 tokens", "'seven' has 7")
    assert_one_line(call("sample.py", tmp_path / "six.pt", "--dataset=text8", *flags), "has 6 tokens, and text8 has 27")
    result = call("sample.py", tmp_path / "text8.pt", "--dataset=others", *flags)
    assert result.code == 0 and set(result.out) <= set(letters["others"] + "\n")
    result = call("evaluate.py", tmp_path / "text8.pt", "--dataset=same", "--data_dir", tmp_path)
    assert result.code == 0 and "bits per char on same val" in result.out  # text8's symbols, scored on another text


# ---- recorded outputs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nanodd(golden):
    from safetensors.torch import load_file
    expected = load_file(golden / "nanodd" / "expected.safetensors")
    models = {kind: checkpoint.load_model(golden / "nanodd" / "ckpt.pt", torch.device("cpu"), raw=kind == "model").model
              for kind in ("model", "ema")}
    return models, expected


def all_logits(model, xt, t):
    """Logits over K = V + 1 classes, the mask's own included, which our head leaves out."""
    return F.linear(model.trunk(xt, t), model.embed.weight)


@pytest.mark.parametrize("kind", ["model", "ema"])
@torch.no_grad()
def test_golden_logits(nanodd, kind, monkeypatch):
    """Logits at step numbers t (B,), and at one time per position (B, L), recorded between steps: not to be rounded."""
    models, expected = nanodd
    xt, t, t_2d = expected["net.x_t"], expected["net.t"], expected["net.t_2d"]
    for name, time, clock in ((f"net.logits_{kind}", t, Config(T=T, conditioning="step").clock),
                              (f"net.logits2d_{kind}", t_2d, lambda t: T * t)):
        monkeypatch.setattr(models[kind].time_embed, "clock", clock)
        torch.testing.assert_close(all_logits(models[kind], xt, time / T), expected[name], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(models[kind](xt, time / T), expected[name][..., :-1], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["model", "ema"])
@pytest.mark.parametrize("case", ["mixed", "pos", "zero"])
@torch.no_grad()
def test_golden_loss(nanodd, kind, case):
    """Per-position KL is our weight/T * CE at masked positions; CE at all positions; the loss, where no row has t = 0.

    In a row with t = 0 nanoDD trains on the plain CE of all positions; ours is lambda_ce * CE + CE at masked ones.
    """
    models, expected = nanodd
    get = lambda name: expected[f"loss.{kind}.{case}.{name}"]
    x0, xt, s = expected["loss.x0"], get("x_tplus1"), get("t") + 1
    mask = xt == MASK
    objective = D3PM(MASK, T, lambda_ce=0.05)
    noise = Noise(mask, (s / T).float(), objective.noise((s - 0.5) / T, torch.rand(x0.shape)).weight)
    log_p = models[kind](xt, noise.t).log_softmax(-1)
    ce = -log_p.gather(-1, x0[..., None]).squeeze(-1)
    kl = noise.weight[:, None] / T * ce * mask
    torch.testing.assert_close(ce, get("l_ce"), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(kl[s > 1], get("l_kl")[s > 1], atol=1e-6, rtol=1e-4)
    loss, nelbo = objective.loss(models[kind], x0, noise)
    torch.testing.assert_close(nelbo / T, kl.mean(1))
    rows = torch.where((s > 1)[:, None], kl + 0.05 * ce, ce)
    torch.testing.assert_close(rows.mean(), get("loss"), atol=1e-4, rtol=1e-5)
    if case == "pos":
        torch.testing.assert_close(loss, get("loss"), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(nelbo.mean() / torch.tensor(2.0).log(), get("metric_bpt"), rtol=1e-4, atol=0)


def test_golden_gradients(nanodd):
    """Gradients of nanoDD's own mixed loss through our network are the recorded ones."""
    models, expected = nanodd
    model = models["model"]
    x0, xt, s = expected["loss.x0"], expected["loss.model.mixed.x_tplus1"], expected["loss.model.mixed.t"] + 1
    ce = F.cross_entropy(model(xt, (s / T).float()).transpose(1, 2), x0, reduction="none")
    rows = torch.where((s > 1)[:, None], ce * (xt == MASK) / s[:, None] + 0.05 * ce, ce)
    model.zero_grad()
    rows.mean().backward()
    ours = {"grad.net.blocks.0.attn_qkv.weight": model.blocks[0].qkv.weight,
            "grad.net.norm_final.weight": model.norm.weight,
            "grad.net.blocks.1.adaLN_modulation.bias": model.blocks[1].modulation.bias,
            "grad.net.c_embed.mlp.0.weight": model.time_embed.fc_in.weight,
            "grad.net.vocab_embed.weight": model.embed.weight}
    for name, p in ours.items():
        torch.testing.assert_close(p.grad, expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", ["model", "ema"])
@torch.no_grad()
def test_golden_posteriors(nanodd, kind):
    """nanoDD's sampling distributions follow from our logits once its mask class is put back.

    With p_m the mask's softmax probability, a masked token at step s >= 2 becomes v with probability
    p_v/(s (1 - p_m) + T p_m); at s = 1 nanoDD redraws every position from the raw softmax over K. Our sampler forbids
    the mask (p_m = 0), which leaves p_v/s, and keeps what it has.
    """
    models, expected = nanodd
    for s in expected["post.t"].tolist():
        xt = expected[f"post.{kind}.x_t.{s}"]
        p = all_logits(models[kind], xt, torch.full((len(xt),), s / T)).softmax(-1)
        if s > 1:
            p_mask = p[..., -1:]
            reveal = p[..., :-1] / (s * (1 - p_mask) + T * p_mask)
            rebuilt = torch.cat([reveal, 1 - reveal.sum(-1, keepdim=True)], -1)
            p = torch.where((xt == MASK)[..., None], rebuilt, F.one_hot(xt, MASK + 1).float())
        torch.testing.assert_close(p, expected[f"post.{kind}.probs.{s}"], atol=5e-5, rtol=0)
