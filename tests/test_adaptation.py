"""Networks of other training become diffusion models: BERT's kin, GPT-2, nanoGPT, and our left-to-right models."""

import functools
import itertools
import json
import math
import re
import sys

import pytest
import torch

import checkpoint
import storage
from adapt import adapt, check_same_network, resize
from attention import annealed
from commands import ROOT, assert_one_line, assert_resumes_exactly, losses, train
from configs import Config, replace
from data.loader import load_meta, load_split, prepare_command
from data.tokenizer import make_tokenizer
from diffusion import MDLM, cross_entropy
from foreign.bert import BERT
from hub_models import TEXT
from likelihood import nll_along
from model import places
from studies import adaptation, runs
from world import picked

CPU = torch.device("cpu")


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roberta_data(saved, tmp_path_factory):
    """A data set `words` of the tiny RoBERTa's tokens."""
    import subprocess
    folder = tmp_path_factory.mktemp("roberta_data")
    (folder / "text.txt").write_text(TEXT * 10)
    subprocess.run([sys.executable, ROOT / "data/prepare_textfile.py", folder / "text.txt", "--name", "words",
                    "--tokenizer", saved("roberta")[0], "--data_dir", folder], check=True)
    return folder


TUNE = ["--dataset=words", "--seq_len=24", "--prefix=fixed:4", "--lr=1e-3", "--max_steps=6"]


def test_fine_tuning(saved, roberta_data, call, tmp_path, monkeypatch):
    """roberta_wikitext trains, resumes to the bit, is scored, sampled and exported as any other model."""
    folder, model, tokenizer = saved("roberta")
    meta = load_meta("words", roberta_data)
    tokens = load_split("words", "train", 1, roberta_data)
    assert make_tokenizer(meta).decode(tokens[:200]) in TEXT * 10
    out, result = assert_resumes_exactly(  # to resume, no --init_from is needed
        call, monkeypatch, "roberta_wikitext", roberta_data, tmp_path, TUNE, [f"--init_from={folder}"])
    n = len(list(checkpoint.load_model(folder, CPU)[0].parameters()))
    assert f"{n} of {n} tensors taken as they are" in result.err, result.err
    assert losses(out)[-1] < losses(out)[0]
    payload = storage.read(out)
    assert payload["config"]["architecture"] == "masked_lm" and payload["meta"]["definition"] == meta["definition"]
    assert call("checkpoint.py", "export", out, tmp_path / "shared").code == 0
    values = []
    for path in (out, tmp_path / "shared"):
        result = call("evaluate.py", path, "--json", "--data_dir", roberta_data, "--dtype=float32")
        assert result.code == 0, result.err
        values.append(json.loads(result.out)["bits_per_token"])
        assert json.loads(result.out)["bits_per_byte"] < values[-1]
    assert values[0] == values[1]
    result = call("sample.py", out, "--prefix", "the cat", "--length", "16", "--steps", "4")
    assert result.code == 0 and result.out.startswith("the cat"), result


def test_before_any_fine_tuning(saved, roberta_data, call, tmp_path):
    folder, _, _ = saved("roberta")
    result = call("sample.py", folder, "--length", "8", "--json", "--sampler", "topk", "--k", "2")
    assert result.code == 0 and json.loads(result.out)["nfe"] == 4, result.err
    (tmp_path / "text.txt").write_text(TEXT)
    result = call("evaluate.py", folder, "--curve", "--text", tmp_path / "text.txt", "--json", "--out_dir", tmp_path)
    assert result.code == 0 and json.loads(result.out)["masks"][-1] == 36, result.err
    one = call("evaluate.py", folder, "--dataset=words", "--data_dir", roberta_data, "--check", "--repeats", "8",
               "--split", "train", "--n_tokens", "2000")
    assert one.code == 0, one.err


def test_wrong_starts(saved, roberta_data, call, trained, data_dir, tmp_path):
    go = lambda *more: train(call, "roberta_wikitext", roberta_data, tmp_path / "out", *TUNE, *more)
    assert_one_line(go(), "takes its network from a checkpoint", "--init_from")
    assert_one_line(go(f"--init_from={trained}"), "has architecture=dit, and this run masked_lm")
    assert_one_line(go(f"--init_from={saved('bert')[0]}"), "has another tokenizer than", "--tokenizer")
    assert_one_line(go(f"--init_from={saved('roberta')[0]}", "--seq_len=37"), "seq_len=37 is more than the 36 tokens")
    assert_one_line(go(f"--init_from={saved('roberta')[0]}", "--objective=block", "--block_size=8", "--prefix=none"),
                    "architecture=masked_lm needs")
    assert_one_line(train(call, "demo", data_dir, tmp_path / "out", f"--init_from={saved('roberta')[0]}"),
                    "the checkpoint's tokenizer is 'hf'")
    assert_one_line(train(call, "demo", data_dir, tmp_path / "out", "--backbone=x"),
                    "backbone needs architecture=masked_lm")
    assert_one_line(call("bench.py", "roberta_wikitext"), "architecture=masked_lm is a network of a checkpoint")
    assert not (tmp_path / "out").exists()


def test_prepare(saved, call, tmp_path):
    """WikiText from local text; a tokenizer that does not exist."""
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    files = [tmp_path / f"{split}.txt" for split in ("train", "val", "test")]
    result = call("data/prepare_wikitext.py", "--tokenizer", saved("bert")[0], "--data_dir", tmp_path, "--file", *files)
    assert result.code == 0, result.err
    name = f"wikitext_{saved('bert')[0].name}"  # other tokens than the usual ones, so another data set
    meta = load_meta(name, tmp_path)
    assert meta["tokenizer"] == "hf" and "the cat sat" in make_tokenizer(meta).decode(
        load_split(name, "val", 1, tmp_path)[:20])
    prose = ROOT / "pretrained/prose"  # the tokens of a checkpoint
    result = call("data/prepare_wikitext.py", "--tokenizer", prose, "--data_dir", tmp_path, "--file", *files)
    meta = load_meta("wikitext_prose", tmp_path)
    assert prepare_command("wikitext_prose", meta) == f"python data/prepare_wikitext.py --tokenizer {prose}"
    assert result.code == 0 and meta["vocab_size"] == 8192 and "the cat sat" in make_tokenizer(meta).decode(
        load_split("wikitext_prose", "val", 1, tmp_path)[:20])
    assert_one_line(call("data/prepare_textfile.py", files[0], "--name", "x", "--tokenizer", "bort", "--data_dir",
                         tmp_path), "--tokenizer bort cannot be used here: choose gpt2, bert, roberta")
    damaged = meta | {"definition": "{}"}
    with pytest.raises(storage.UserError, match="damaged"):
        make_tokenizer(damaged)


# ---- from left to right to diffusion ---------------------------------------------------------------------------------


def gpt2_folder(tmp_path, **settings):
    import transformers as hf
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50257, n_embd=16, n_layer=2, n_head=2, n_positions=24,
                                             **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 8 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model


def as_nanogpt(model, bias=True):
    """The contents of nanoGPT's ckpt.pt with the weights of a GPT2LMHeadModel: its matrices are (outputs, inputs)."""
    state = {"_orig_mod." + key: value.T if re.search(r"(c_attn|c_proj|c_fc)\.weight", key) else value
             for key, value in model.state_dict().items() if bias or not key.endswith("bias")}
    for i in range(2):
        state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()  # a buffer of old versions
    return {"model": state, "optimizer": {}, "iter_num": 7, "config": {}, "model_args": dict(
        n_layer=2, n_head=2, n_embd=16, block_size=24, bias=bias, vocab_size=50257, dropout=0.0)}


@pytest.fixture(params=["gpt2", "nanogpt", "nanogpt without bias"])
def left_to_right(request, tmp_path):
    """(path, the original model) of a left-to-right network of another project."""
    pytest.importorskip("transformers")
    folder, model = gpt2_folder(tmp_path, **({} if request.param == "gpt2" else {"activation_function": "gelu"}))
    if request.param == "gpt2":
        return folder, model
    bias = request.param == "nanogpt"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not bias and name.endswith("bias"):
                p.zero_()
    torch.save(as_nanogpt(model, bias), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", model


def opened(path):
    """(network, Config) of a checkpoint. checkpoint.load_model would also need GPT-2's vocabulary."""
    payload = storage.read(path)
    network = storage.config_of(payload).make_model(payload["meta"]["vocab_size"]).eval()
    storage.check_fit(network, payload["ema"], path)
    storage.load_weights(network, payload["ema"])
    return network, storage.config_of(payload)


def test_gpt2_logits(left_to_right):
    """GPT-2 and nanoGPT: our logits at position i, after end-of-text, are the original's."""
    path, model = left_to_right
    network, config = opened(path)
    assert config.objective == "ar" and network.vocab_size == 50257
    x0 = torch.randint(50257, (3, 20))
    with torch.no_grad():
        expected = model(torch.nn.functional.pad(x0, (1, 0), value=50256)[:, :-1]).logits
        objective = config.make_objective(50257)
        found = network(objective.corrupt(x0, None), torch.ones(3))
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_are_no_tokens_are_cut(tmp_path):
    """nanoGPT's 50,304 rows become GPT-2's 50,257, so its models and data sets fit."""
    pytest.importorskip("transformers")
    _, model = gpt2_folder(tmp_path, activation_function="gelu")
    contents = as_nanogpt(model)
    weight = contents["model"]["_orig_mod.transformer.wte.weight"]
    padded = torch.cat((weight, torch.randn(47, 16)))
    contents["model"] |= {"_orig_mod.transformer.wte.weight": padded, "_orig_mod.lm_head.weight": padded}
    torch.save(contents, tmp_path / "ckpt.pt")
    payload = storage.read(tmp_path / "ckpt.pt")
    assert payload["meta"]["vocab_size"] == 50257 and torch.equal(payload["ema"]["embed.weight"],
                                                                  torch.cat((weight, weight[-1:])))
    short = storage.read(tmp_path / "ckpt.pt", storage.Hints(overrides={"seq_len": 10}))
    assert short["config"]["seq_len"] == 10 and len(short["ema"]["positions.weight"]) == 10


@pytest.mark.parametrize("rows, mask", [(50257, 10541), (50258, 50257)])
def test_diffugpt_logits(rows, mask, tmp_path):
    """DiffuGPT, small and medium: our logits at position i are those of GPT-2 with full attention at i - 1, where the
    mask stands before the text, and masks of ours are its masks."""
    pytest.importorskip("transformers")
    from safetensors.torch import save_file
    folder, model = gpt2_folder(tmp_path, attn_implementation="eager")
    if rows > 50257:
        model.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            model.transformer.wte.weight[mask].normal_()
    state = {re.sub("^transformer", "denoise_model", key).replace("denoise_model.wte", "embed_tokens"): value.clone()
             for key, value in model.state_dict().items()}
    (folder / "model.safetensors").unlink()
    save_file(state, folder / "model.safetensors")
    network, config = opened(folder)
    assert (config.objective, config.seq_len, config.predict_next, network.vocab_size) == ("mdlm", 23, True, 50257)
    xt = torch.randint(50257, (3, 23)).masked_fill(torch.rand(3, 23) < 0.5, 50257)
    theirs = torch.nn.functional.pad(xt.masked_fill(xt == 50257, mask), (1, 0), value=mask)
    with torch.no_grad():
        expected = model(theirs, attention_mask=torch.zeros(3, 1, 24, 24)).logits[:, :-1, :50257]
        causal = model(theirs).logits[:, :-1, :50257]
        torch.testing.assert_close(network(xt, torch.ones(3)), expected, atol=1e-5, rtol=1e-5)
    assert (causal - expected).abs().max() > 0.1
    with pytest.raises(storage.UserError, match="use --override seq_len=23 or less"):
        storage.read(folder, storage.Hints(overrides={"seq_len": 24}))
    del state["embed_tokens.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(storage.UserError, match="but lacks 'embed_tokens.weight'"):
        storage.read(folder, storage.Hints(format="diffugpt"))


def test_gpt2_in_other_words(tmp_path):
    """A config.json that writes the usual settings out in other words is read as the usual one."""
    folder, model = gpt2_folder(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    expected = opened(folder)[0].state_dict()
    (folder / "config.json").write_text(json.dumps(
        settings | {"n_inner": 4 * settings["n_embd"], "activation_function": "gelu_pytorch_tanh"}))
    torch.testing.assert_close(opened(folder)[0].state_dict(), expected)


@pytest.mark.parametrize("change", [{"n_inner": 32}, {"scale_attn_by_inverse_layer_idx": True},
                                    {"scale_attn_weights": False}, {"layer_norm_epsilon": 1e-12}])
def test_variants_of_gpt2_are_refused(change, tmp_path, call):
    pytest.importorskip("transformers")
    folder, _ = gpt2_folder(tmp_path, **change)
    assert_one_line(call("sample.py", folder), "a variant of GPT-2 that is not supported", next(iter(change)))


def test_nanogpt_of_characters(data_dir, call, tmp_path):
    """Its file does not name its characters; the data set that is named has them. The start is a mean of all rows."""
    args = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=27, dropout=0.0)
    state = {"transformer.wte.weight": torch.randn(27, 8), "transformer.wpe.weight": torch.randn(16, 8)}
    for key, shape in (("ln_1", (8,)), ("attn.c_attn", (24, 8)), ("attn.c_proj", (8, 8)), ("ln_2", (8,)),
                       ("mlp.c_fc", (32, 8)), ("mlp.c_proj", (8, 32))):
        state[f"transformer.h.0.{key}.weight"] = torch.randn(shape)
    state |= {"transformer.ln_f.weight": torch.ones(8), "lm_head.weight": state["transformer.wte.weight"]}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "iter_num": 3}, path)
    assert_one_line(call("sample.py", path), "has 27 tokens, and does not say which", "--dataset")
    result = call("sample.py", path, "--dataset=tiny", "--data_dir", data_dir, "--prefix", "the ")
    assert result.code == 0 and result.out.startswith("the ") and len(result.out) == 17, result
    flags = ["--architecture=nanogpt", "--conditioning=none", "--predict_next", "--seq_len=15", "--max_steps=2"]
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", *flags, f"--init_from={path}")
    assert "n_layer=1 (not 2), n_embd=8 (not 32)" in result.err
    assert result.code == 0 and storage.read(tmp_path / "out")["config"]["n_embd"] == 8, result.err
    assert "9 of 9 tensors taken as they are" in result.err, result.err
    torch.save({"model": state | {"lm_head.weight": torch.randn(27, 8)}, "model_args": args}, path)
    assert_one_line(call("sample.py", path, "--dataset=tiny", "--data_dir", data_dir), "a head of its own")


def causal(network, L):
    return functools.partial(network, sees=torch.ones(L + 1, L + 1, dtype=torch.bool).tril())


def diffusion_twin(network, config, V):
    """The network and objective of a diffusion model with the weights of a left-to-right model."""
    new = replace(config, objective="mdlm", predict_next=True)
    twin = new.make_model(V).eval()
    source = {"config": vars(config), "ema": dict(network.named_parameters())}
    storage.load_weights(twin, adapt(twin, source, new, "it"))
    return twin, new.make_objective(V)


def assert_same_likelihood(network, config, V, L):
    """Assert that with causal attention --order l2r of the diffusion model is the left-to-right model's likelihood."""
    x0 = torch.randint(V, (3, L))
    twin, objective = diffusion_twin(network, config, V)
    one = nll_along(network, config.make_objective(V), x0, "l2r")
    two = nll_along(causal(twin, L), objective, x0, "l2r")
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert (nll_along(twin, objective, x0, "l2r") - one).abs().min() > 1e-3  # full attention is another model
    return twin


@pytest.mark.parametrize("shift_tokens", [False, True])
def test_our_left_to_right_model_as_diffusion(shift_tokens):
    config = Config(n_layer=2, n_head=2, n_embd=32, seq_len=12, conditioning="none", objective="ar",
                    shift_tokens=shift_tokens)
    torch.manual_seed(0)
    network = config.make_model(11).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert_same_likelihood(network, config, 11, 12)


def test_gpt2_as_diffusion(tmp_path, capsys):
    """GPT-2 becomes a diffusion model of 23 tokens, and of 24, which needs one more row of positions than the file has,
    because the start of the text is an input."""
    pytest.importorskip("transformers")
    network, config = opened(gpt2_folder(tmp_path)[0])
    assert config.seq_len == 24
    assert_same_likelihood(network, replace(config, seq_len=23), 50257, 23)
    err = capsys.readouterr().err
    assert "28 of 28 tensors taken as they are" in err, err
    assert_same_likelihood(network, config, 50257, 24)
    err = capsys.readouterr().err
    assert "27 of 28 tensors taken as they are; resized: positions.weight (from 24 to 25 rows)" in err, err
    table = torch.arange(6).view(3, 2).float()
    assert resize(table, 2).tolist() == [[0, 1], [2, 3]] and resize(table, 4).tolist()[2:] == [[4, 5], [4, 5]]


def test_after_annealing_it_is_a_plain_network():
    """The network with full attention is a plain bidirectional one, called with the mask before the text."""
    config = Config(n_layer=2, n_head=2, n_embd=32, seq_len=12, conditioning="none", objective="mdlm")
    torch.manual_seed(0)
    next_token, plain = (replace(config, seq_len=n, predict_next=n == 12).make_model(11).eval() for n in (12, 13))
    storage.load_weights(plain, {name: p + 0.3 * torch.randn_like(p) for name, p in next_token.named_parameters()})
    storage.load_weights(next_token, dict(plain.named_parameters()))
    xt, t, where = torch.randint(12, (3, 12)), torch.ones(3), torch.rand(3, 12) < 0.5
    with torch.no_grad():
        expected = plain(torch.nn.functional.pad(xt, (1, 0), value=11), t)[:, :-1]
        full = torch.ones(13, 13, dtype=torch.bool)
        for found in (next_token(xt, t), next_token(xt, t, sees=full)):
            torch.testing.assert_close(found, expected)
        for positions in (where, places(where)):
            torch.testing.assert_close(next_token(xt, t, positions), expected[where])


def test_annealed():
    """Tokens on the left are always visible, those on the right with probability (step + 1)/anneal_steps."""
    left = torch.ones(40, 40, dtype=torch.bool).tril()
    for step in (0, 4, 8):
        visible = annealed(40, step, 10, seed=3)
        assert visible[left].all() and torch.equal(visible, annealed(40, step, 10, seed=3))
        n = (~left).sum().item()
        share = visible[~left].float().mean().item()
        assert abs(share - (step + 1) / 10) < 4 * math.sqrt((step + 1) / 10 * (9 - step) / 10 / n) + 1e-6
    assert not torch.equal(annealed(40, 4, 10, 3), annealed(40, 4, 10, 4))
    assert not torch.equal(annealed(40, 4, 10, 3), annealed(40, 9, 20, 3))  # the same share, another step
    assert annealed(40, 9, 10, 3) is None and annealed(40, 0, 0, 3) is None


def test_annealing_run(data_dir, call, tmp_path, monkeypatch):
    """From our ar model: what is taken is said, the run resumes to the bit in the middle of annealing."""
    ar = tmp_path / "ar"
    assert train(call, "ar_demo", data_dir, ar, "--max_steps=10").code == 0
    flags = ["--predict_next", "--anneal_steps=6", "--max_steps=8"]
    out, result = assert_resumes_exactly(call, monkeypatch, "demo", data_dir, tmp_path, flags, [f"--init_from={ar}"])
    assert "tensors taken as they are" in result.err and "objective=ar, now mdlm" in result.err
    assert "predict the next" not in result.err
    seen = []  # the visibility of each step
    original = annealed
    monkeypatch.setattr("attention.annealed", lambda *args: seen.append(original(*args)) or seen[-1])
    assert train(call, "demo", data_dir, tmp_path / "watched", *flags, f"--init_from={ar}").code == 0
    n_right = [None if v is None else (v.sum() - 33 * 34 // 2).item() for v in seen]
    assert len(seen) == 8 and n_right[5:] == [None] * 3 and n_right[:5] == sorted(n_right[:5]) and n_right[0] > 0
    assert seen[0].shape == (33, 33)
    other = tmp_path / "other"
    train(call, "demo", data_dir, other, "--predict_next", "--max_steps=8", f"--init_from={ar}")
    for key in ("bits_per_token", "val_bits_per_token"):
        assert losses(other, key)[0] != losses(out, key)[0]
    assert call("sample.py", out, "--steps", "4").code == 0
    result = train(call, "demo", data_dir, tmp_path / "unshifted", "--max_steps=1", f"--init_from={ar}")
    assert result.code == 0 and "predict the next token: --predict_next would keep that" in result.err
    for flag in ("--predict_next", "--anneal_steps=5"):
        for config, more in (("ar_demo", []), ("bd3_demo", []), ("udlm_text8", ["--conditioning=none"])):
            assert_one_line(train(call, config, data_dir, tmp_path / "no", flag, *more), "are for masks in whole texts")


# ---- what is new changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [{"conditioning": "time"}, {"tied": False}, {"head_bias": True}, {"norm_bias": True},
                                 {"conditioning": "step", "tied": False, "head_bias": True, "norm_bias": True},
                                 {"conditioning": "none", "head_gates": True},
                                 {"conditioning": "time", "architecture": "mixers", "mixer": "gmlp"},
                                 {"conditioning": "time", "architecture": "mixers", "mixer": "synth_dense"}])
def test_new_tensors_do_not_change_the_function(new, capsys):
    before = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=12, conditioning="none", objective="mdlm")
    before = replace(before, **{key: value for key, value in new.items() if key in ("architecture", "mixer")})
    torch.manual_seed(0)
    network = before.make_model(11).eval()
    storage.load_weights(network, {name: p + 0.3 * torch.randn_like(p) for name, p in network.named_parameters()})
    now = replace(before, **new)
    other = now.make_model(11).eval()
    source = {"config": vars(before) | {}, "ema": dict(network.named_parameters())}
    storage.load_weights(other, adapt(other, source, now, "it"))
    assert "; new: " in capsys.readouterr().err
    if now.conditioning != "none":
        assert other.time_embed.fc_in.weight.abs().max() > 0
    xt, t = torch.randint(12, (3, 12)), torch.rand(3)
    with torch.no_grad():
        torch.testing.assert_close(other(xt, t), network(xt, t))


@pytest.mark.parametrize("noise", ["mask", "uniform"])
def test_another_noise(noise, capsys):
    """The embedding of the mask is cut off for uniform noise, and added for masks: the mean of the others. All other
    weights stay."""
    before = Config(n_layer=1, n_head=2, n_embd=32, n_cond=8, seq_len=12, objective="mdlm", noise=noise)
    now = replace(before, noise="uniform" if noise == "mask" else "mask")
    network, other = before.make_model(11), now.make_model(11)
    source = {"config": vars(before) | {}, "ema": dict(network.named_parameters())}
    storage.load_weights(other, adapt(other, source, now, "it"))
    printed = capsys.readouterr().err
    assert f"noise={noise}" in printed and "resized: embed.weight (from " in printed
    torch.testing.assert_close(other.embed.weight[:11], network.embed.weight[:11])
    if noise == "uniform":
        torch.testing.assert_close(other.embed.weight[11], network.embed.weight.mean(0))
    torch.testing.assert_close(other.blocks[0].qkv.weight, network.blocks[0].qkv.weight)


@pytest.mark.parametrize("before, now, words", [
    ({}, {}, []), ({}, {"schedule": "cosine", "T": 7}, []),
    ({}, {"conditioning": "step", "schedule": "cosine", "T": 7}, ["conditioning=none, now step; T=1000, now 7"]),
    ({"conditioning": "sigma"}, {"conditioning": "sigma", "schedule": "geometric", "T": 7},
     ["schedule=loglinear, now geometric"]),
    ({"objective": "sedd"}, {"objective": "sedd", "scale_by_sigma": False}, ["scale_by_sigma=True, now False"]),
    ({"objective": "sedd"}, {}, ["objective=sedd, now mdlm"]),
    ({}, {"objective": "sedd", "scale_by_sigma": False}, ["objective=mdlm, now sedd; scale_by_sigma=True, now False"]),
    ({"predict_next": True}, {"predict_next": True}, []),
    ({"predict_next": True}, {}, ["predict the next token: --predict_next would keep that"]),
    ({}, {"predict_next": True}, ["predict the token itself: --no-predict_next would keep that"]),
    ({"objective": "ar"}, {"predict_next": True}, ["objective=ar, now mdlm"]),
    ({"objective": "ar"}, {}, ["objective=ar, now mdlm", "predict the next token: --predict_next would keep that"]),
    ({"objective": "ar"}, {"objective": "block", "block_size": 4},
     ["objective=ar, now block; block_size=0, now 4", "predict the next token"]),
    ({}, {"objective": "ar"}, ["objective=mdlm, now ar", "predict the token itself"])])
def test_notes_of_changes(before, now, words):
    """A line for settings that change what the network was trained for, and one for outputs at another place."""
    usual = Config(n_layer=1, n_head=2, n_embd=32, n_cond=8, seq_len=12, conditioning="none", objective="mdlm",
                   schedule="loglinear", T=1000)
    notes = check_same_network({"config": vars(replace(usual, **before)) | {}}, replace(usual, **now), "it")
    assert len(notes) == len(words) and all(note.endswith(end) for note, end in zip(notes, words)), notes


def test_what_may_not_be_new():
    before = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=12, conditioning="time", objective="mdlm")
    source = {"config": vars(before) | {}, "ema": dict(before.make_model(11).named_parameters())}
    for change, words in (({"conditioning": "none"}, "add --conditioning=time"), ({"n_layer": 3}, "add --n_layer=2"),
                          ({"shift_tokens": True, "n_cond": 4}, "add --no-shift_tokens --n_cond=8"),
                          ({"n_head": 4}, "of another network than that of this config: add --n_head=2")):
        now = replace(before, **change)
        with pytest.raises(storage.UserError, match=re.escape(words)):
            adapt(now.make_model(11), source, now, "it")
    gated = {"config": source["config"] | {"head_gates": True}, "ema": source["ema"]}
    with pytest.raises(storage.UserError, match="add --head_gates"):
        adapt(before.make_model(11), gated, before, "it")
    plain_gpt = replace(before, architecture="gpt2", conditioning="none", norm_bias=True)
    flags = "--architecture=gpt2 --norm_bias --conditioning=none --no-head_gates"
    with pytest.raises(storage.UserError, match=f"add {flags}$"):
        check_same_network({"config": vars(plain_gpt) | {}}, replace(before, head_gates=True), "it")
    mixer = replace(before, architecture="mixers", mixer="gmlp")  # the same shapes with and without mask_aware
    with pytest.raises(storage.UserError, match="add --mask_aware"):
        check_same_network({"config": vars(replace(mixer, mask_aware=True)) | {}}, mixer, "it")
    plain = replace(before, conditioning="none", noise="uniform")
    weights = {name: p for name, p in plain.make_model(11).named_parameters() if name != "embed.weight"}
    for embeddings in ({}, {"embed.weight": torch.ones(11)}):  # none, or no matrix
        with pytest.raises(storage.UserError, match="do not fit the model"):
            adapt(before.make_model(11), {"config": vars(plain) | {}, "ema": weights | embeddings}, before, "it")
    source["ema"]["norm.weight"] = torch.full((32,), math.nan)
    with pytest.raises(storage.UserError, match="not finite"):
        adapt(before.make_model(11), source, before, "it")


# ---- BERT's training -------------------------------------------------------------------------------------------------


def test_bert_loss_by_enumeration():
    """The expected loss over all choices, weighted by their probabilities, for texts of 3 tokens and 2 symbols.

    Each token is not chosen (.85), shown as the mask (.12), as each symbol (.015/2 each) or as it is (.015)."""
    V, L = 2, 3
    torch.manual_seed(0)
    table = torch.randn((V + 1) ** L, L, V, dtype=torch.float64)
    place = torch.tensor([9, 3, 1])

    def model(xt, t, where=None):
        logits = table[(xt * place).sum(1)]
        return picked(logits, where)

    objective, x0 = BERT(V), torch.tensor([[1, 0, 1]])
    # (probability, a number v that means it, what is shown: None for the token itself)
    ways = [(0.85, 0.5, None), (0.12, 0.06, V), (0.0075, 0.12 + 0.00375, 0), (0.0075, 0.12 + 0.01125, 1),
            (0.015, 0.14, None)]
    expected = found = 0.0
    for chosen in itertools.product(range(5), repeat=L):
        p = math.prod(ways[way][0] for way in chosen)
        v = torch.tensor([[ways[way][1] for way in chosen]], dtype=torch.float64)
        loss, nats = objective.loss(model, x0, objective.noise(torch.rand(1), v))
        assert loss == nats.mean()
        found += p * loss.item()
        xt = torch.tensor([[x0[0, i].item() if ways[way][2] is None else ways[way][2] for i, way in enumerate(chosen)]])
        ce = cross_entropy(model(xt, None), x0)[0]
        expected += p * sum(ce[i].item() for i, way in enumerate(chosen) if way) / (0.15 * L)
    assert found == pytest.approx(expected, rel=1e-6)


def test_bert_is_mdlm_elsewhere(data_dir, call, tmp_path):
    """Validation and scores are MDLM's bound; BERT knows no time; given tokens are never predicted."""
    for name in ("exact_k", "continuous"):
        assert getattr(BERT, name) is getattr(MDLM, name)
    noise = BERT(5).noise(torch.rand(2), torch.tensor([[2, 2, 0.1, 0.9], [0.01, 0.2, 0.3, 0.4]]).double())
    assert noise.mask.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert noise.weight.tolist() == pytest.approx([2 / 0.15, 1 / 0.15])
    bert = ["--objective=bert", "--time_sampling=uniform"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", *bert, "--max_steps=20").code == 0
    result = call("evaluate.py", tmp_path / "out", "--check", "--repeats=5", "--split=train", "--n_tokens=2000",
                  "--dtype=float32")
    assert result.code == 0, result.err
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", *bert, "--conditioning=time"), "no time")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", bert[0], "--time_sampling=exact_k"),
                    "one mask rate")


# ---- the study -------------------------------------------------------------------------------------------------------


def test_steps_to_reach():
    points = [(100, 3.0), (200, 2.8), (400, 2.7)]
    assert adaptation.steps_to_reach(2.8, points) == 200
    assert adaptation.steps_to_reach(2.9, points) == pytest.approx(100 * 2**0.5)
    assert adaptation.steps_to_reach(3.1, points) == 100 and adaptation.steps_to_reach(2.6, points) is None


def test_study(call, data_dir, tmp_path, monkeypatch):
    """All commands of a study, with recorded answers: a second call repeats none of them."""
    calls = []

    def answer(script, *arguments):
        calls.append([script, *map(str, arguments)])
        words = calls[-1]
        if script == "train.py":
            out = next(word for word in words if word.startswith("--out_dir=")).removeprefix("--out_dir=")
            storage.Path(out).mkdir()
            lines = {"step": 0, "config": {"seq_len": 128}}, {"step": 32, "val_bits_per_token": 2.0}
            (storage.Path(out) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return ""
        if "--curve" in words:
            return json.dumps({"mask_rate": [0.1, 1.0], "bits_per_token": [1.0, 4.0]})
        if "--samples" in words:
            row = {"nfe": 16.0, "judge_bits_per_char": 3.0, "unigram_entropy_bits": 3.9, "known_words": 0.5,
                   "judge_stderr_per_char": 0.1}
            return json.dumps({"samples": [row, row]})
        return json.dumps({"bits_per_token": 2.0 + len(calls) / 1000})

    monkeypatch.setattr(runs, "call", answer)
    monkeypatch.setattr(sys, "argv", ["adaptation.py", str(tmp_path / "study"), "--seeds", "2", "--steps", "32",
                                      "--dataset=tiny", f"--data_dir={data_dir}"])
    adaptation.main()
    trained = [words for words in calls if words[0] == "train.py"]
    assert len(trained) == 2 * (4 + 5 + 5 + 2) + 1
    assert sum("--predict_next" in words for words in trained) == 14
    assert sum("--anneal_steps=16" in words for words in trained) == 2
    found = json.loads((tmp_path / "study/adaptation.json").read_text())
    assert len(found["bits"]) == 4 + 12 and {"mask_rates.png", "steps.png"} < {
        path.name for path in (tmp_path / "study").iterdir()}
    before = len(calls)
    adaptation.main()
    assert len(calls) == before
