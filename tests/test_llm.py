"""Networks of large language models, LLaDA, Dream and their kin: the same logits and tokens, and what is refused."""

import copy
import functools
import json
import re
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import checkpoint
import parallel
import storage
import tiny_llms
from commands import ROOT, assert_one_line
from configs import replace
from data.loader import load_meta, load_split, prepare_command
from data.tokenizer import describes_tokens, make_tokenizer, tokens_of_hub
from foreign.llada import check_router, separate_heads, stacked
from foreign.llm import FAMILIES, network_settings, see_all, tokens_and_mask
from foreign.masked_lm import read_settings
from hub_models import TEXT
from model import places
from tiny_llms import (BEGIN, END, EXPERTS, LLADA, LLADA2, LLADA_MOE, MASK, ROWS, SIZES, llada2_state,
                       llada_moe_state)

pytest.importorskip("transformers")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Function: kind -> (folder, function ids (B, L) -> logits of the original network)."""
    @functools.cache
    def get(kind):
        folder = tmp_path_factory.mktemp(kind) / kind
        return folder, tiny_llms.make(kind, folder)
    return get


@pytest.mark.parametrize("kind", ("llada", "llada_moe", "dream", "a2d", "qwen2"))
def test_logits(llm, kind):
    """The network computes what the original does, whatever the length, at some positions and at all."""
    folder, reference = llm(kind)
    loaded, config, meta, _ = checkpoint.load_model(folder, CPU)
    ours = make_tokenizer(meta)
    mask = 295 if kind == "qwen2" else MASK  # it has none: the first row that is no token
    before = {"llada": [], "llada_moe": [], "a2d": []}.get(kind, [BEGIN])
    assert config.architecture == "llm" and config.objective == "mdlm" and config.seq_len == 64 - len(before)
    assert config.predict_next == bool(before) and ours.left_out == [MASK][kind == "qwen2":]
    generator = torch.Generator().manual_seed(1)
    for L in (config.seq_len, 7):
        xt = torch.randint(ours.vocab_size, (3, L), generator=generator)
        where = torch.rand(3, L, generator=generator) < 0.4
        xt[where] = ours.vocab_size
        theirs = torch.tensor([*ours.ids, mask])[xt]
        expected = reference(F.pad(theirs, (len(before), 0), value=BEGIN))
        expected = (expected[:, :-1] if before else expected)[..., ours.ids]
        assert expected.std() > 0.1
        with torch.no_grad():
            torch.testing.assert_close(loaded(xt, torch.ones(3)), expected, atol=1e-4, rtol=1e-4)
            for positions in (where, places(where)):
                torch.testing.assert_close(loaded(xt, torch.ones(3), positions), expected[where], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ("sdar", "sdar_moe", "llada2"))
def test_blocks(llm, kind):
    """The network of SDAR and LLaDA 2 predicts each noisy block given the clean blocks before it: in one call for all
    blocks, and with keys and values that are kept, read at once or block by block."""
    folder, reference = llm(kind)
    model, config, meta, _ = checkpoint.load_model(folder, CPU)
    ours = make_tokenizer(meta)
    assert (config.objective, config.block_size, config.seq_len, config.predict_next) == ("block", 8, 64, False)
    ids, t = torch.tensor([*ours.ids, MASK]), torch.ones(3)
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(ours.vocab_size, (3, 24), generator=generator)
    xt = x0.masked_fill(torch.rand(3, 24, generator=generator) < 0.5, ours.vocab_size)
    with torch.no_grad():
        at_once, past, close = model(xt, t, clean=x0), None, functools.partial(torch.testing.assert_close, rtol=1e-4,
                                                                               atol=1e-4)
        for a in range(0, 24, 8):
            block = xt[:, a:a + 8]
            expected = reference(ids[torch.cat((x0[:, :a], block), 1)])[:, a:, ours.ids]
            assert expected.std() > 0.1
            close(at_once[:, a:a + 8], expected)
            close(model(block, t, past=past), expected)
            close(model(block, t, where=block == MASK, past=past), expected[block == MASK])
            past = model.remember(x0[:, a:a + 8], t, past=past)
        for one, two in zip(past, model.remember(x0, t)):
            close(one.keys, two.keys)
            close(one.values, two.values)
    layers = {"sdar": 0, "sdar_moe": 2, "llada2": 1}[kind]  # with experts, of which a token takes two
    taken = layers * 2 * 3 * 24 * 32
    of_clean = 6 * (sum(weight.numel() for weight in model.matrices()) + taken)
    assert model.flops(24) - model.flops(8) == of_clean + 12 * 2 * (24 - 8) * 32  # a block of 8 has no clean text


def test_llada2_chooses_experts_in_float32(llm):
    """The products are in bfloat16, and the scores of the experts in float32, as in its own code."""
    model = checkpoint.load_model(llm("llada2")[0], CPU, dtype=torch.bfloat16).model
    weights, seen = load_file(llm("llada2")[0] / "model.safetensors")["model.layers.1.mlp.gate.weight"], []
    for network in (copy.deepcopy(model), model):
        router = network.body.layers[1].mlp.gate
        router.register_forward_hook(lambda part, inputs, output: seen.append((*inputs, output[0])))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            network(torch.randint(290, (2, 16)), torch.ones(2))
            router.weight.zero_()
            assert not router(torch.ones(1, 32))[0].any()  # a copy has its own weights
    x, scores = seen[0]
    assert x.dtype == torch.bfloat16 and scores.dtype == torch.float32
    assert torch.equal(scores, x.reshape(-1, 32).float() @ weights.float().T)


@pytest.mark.parametrize("kind", ("llada", "llada_moe", "dream"))
def test_dual_cache(llm, kind):
    """A call in a window sees keys and values of the other tokens as they were in the first call, and of its own as
    they are: the logits of the whole network, if hooks keep what its layers compute for the others."""
    model, _, meta, _ = checkpoint.load_model(llm(kind)[0], CPU)
    V, t, generator = meta["vocab_size"], torch.ones(3), torch.Generator().manual_seed(1)
    projections = [part for name, part in model.body.named_modules() if name.endswith(("k_proj", "v_proj"))]
    assert len(projections) == 4
    for a, b in (0, 5), (6, 13), (15, 20), (0, 20):
        kept = {}
        start, end = model.n_before + a - model.predict_next, model.n_before + b

        def keep(part, _, output):
            first = kept.setdefault(part, output)
            return torch.cat((first[:, :start], output[:, start:end], first[:, end:]), 1)

        xt, where = torch.randint(V, (3, 20), generator=generator), torch.zeros(3, 20, dtype=torch.bool)
        where[:, a:b] = torch.rand(3, b - a, generator=generator) < 0.6
        texts = [xt.clone().index_fill_(1, torch.arange(a, b), V)]
        for _ in range(2):
            texts.append(xt.clone())
            texts[-1][:, a:b] = torch.randint(V + 1, (3, b - a), generator=generator)
        with torch.no_grad():
            hooks = [part.register_forward_hook(keep) for part in projections]
            expected, outside = [model(text, t, where=where) for text in texts], None
            for hook in hooks:
                hook.remove()
            for text, logits in zip(texts, expected):
                found, outside = model.within(text, t, where, (a, b), outside)
                torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
            differ = (model(texts[-1], t, where=where) - logits).abs().max() > 1e-2
        assert differ == (b - a < 20)  # the whole text is a window without an outside


def test_samples_with_a_dual_cache(llm, call, tmp_path):
    """Each piece costs one call on the whole text, and later ones on its window. With one call per piece, or a network
    of one layer, the texts are those without the cache; in templates, too, whose pieces have given tokens inside."""
    templates, shifted = tmp_path / "templates.txt", tmp_path / "shifted.txt"
    templates.write_text("the ____ sat {9} mat\nsat on {9} the ____ cat\n")
    shifted.write_text("the cat sat{9}\n{6}the cat{3} sat\n")  # of equal length: read together, with blanks elsewhere

    def write(folder, *flags):
        done = call("sample.py", folder, "--json", *flags)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        return [sample["tokens"] for sample in found["samples"]], found

    for kind in ("llada", "dream"):
        shutil.copytree(llm(kind)[0], tmp_path / kind)
        file = tmp_path / kind / "config.json"
        layers = {"n_layers": 1} if kind == "llada" else {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | layers))
        weights = load_file(tmp_path / kind / "model.safetensors")
        save_file({key: value for key, value in weights.items() if not re.search(r"(blocks|layers)\.1\.", key)},
                  tmp_path / kind / "model.safetensors")
        several = ["--prefix", "the cat", "--length=40", "--batch_size=3"]  # pieces with different numbers of calls
        for flags in (["--infill", templates, "--temperature=0", "--sampler=topk", "--k=1"],
                      ["--infill", templates, "--temperature=0", "--sampler=topk", "--k=4"],
                      ["--infill", shifted, "--temperature=0", "--sampler=topk", "--k=1"],
                      [*several, "--sampler=threshold", "--threshold=0.9"]):
            flags.append("--block_length=4")
            one_layer, two_layers = tmp_path / kind, llm(kind)[0]
            (expected, without), (found, cached) = write(one_layer, *flags), write(one_layer, *flags, "--dual_cache")
            assert found == expected and cached["nfe"] == without["nfe"] and cached["dual_cache"]
            assert cached["tokens_read"] < without["tokens_read"] or "--k=4" in flags
            (expected, _), (found, _) = write(two_layers, *flags), write(two_layers, *flags, "--dual_cache")
            assert (found == expected) == ("--k=4" in flags), (kind, flags)
            assert shifted not in flags or len({len(tokens) for tokens in found}) == 1
    _, cached = write(llm("llada")[0], "--prefix", "the cat", "--length=40", "--block_length=8", "--sampler=topk",
                      "--k=1", "--dual_cache")
    masks = 40 - len(make_tokenizer(checkpoint.load_model(llm("llada")[0], CPU).meta).encode("the cat"))
    pieces = [8] * (masks // 8) + [masks % 8] * (masks % 8 > 0)
    assert cached["tokens_read"] == sum(40 + (size - 1) * size for size in pieces)


def test_what_a_dual_cache_needs(llm, trained, call, tmp_path):
    go = lambda where, *flags: call("sample.py", where, "--dual_cache", *flags)
    assert_one_line(go(trained, "--block_length=4"), "for large language models", "leave it out")
    assert_one_line(go(llm("sdar")[0]), "--dual_cache is for models of masks in whole texts")
    assert_one_line(go(llm("llada")[0]), "add --block_length N")
    done = go(llm("llada")[0], "--block_length=4", "--compile")
    assert done.code == 2 and done.err.endswith("--dual_cache is not compiled: leave out --compile\n"), done.err
    assert_one_line(go(llm("llada")[0], "--block_length=4", "--prefix=a", "--guidance=1"), "do not go together")


def test_how_long_blocks_are(llm, call, tmp_path):
    """The size of a block is that of config.json or of --override. Without both it is four, or 32 for LLaDA 2, and a
    line says so."""
    shutil.copytree(llm("sdar")[0], tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    settings = json.loads(file.read_text())
    del settings["block_size"]
    file.write_text(json.dumps(settings))
    said = "does not say how long its blocks are: 4 tokens are assumed"
    for more, is_said in ((), True), (("--override", "block_size=6"), False):
        done = call("sample.py", tmp_path / "x", "--length", 12, "--steps", 1, *more)
        assert done.code == 0 and (said in done.err) == is_said, done.err
    for where, more, words in ((tmp_path / "x", "block_size=65", "block_size that divides seq_len"),
                               (llm("llada")[0], "block_size=4", "has no blocks: leave out --override block_size")):
        assert_one_line(call("sample.py", where, "--override", more), words)
    for size in (0, -4, True, "4", 4.0, [4]):
        file.write_text(json.dumps(settings | {"block_size": size}))
        assert_one_line(call("sample.py", tmp_path / "x", "--length", 12), f"is {size}, not a whole number from 1")
    assert call("sample.py", tmp_path / "x", "--length", 12, "--override", "block_size=4").code == 0
    shutil.copytree(llm("llada2")[0], tmp_path / "y")
    (tmp_path / "y" / "config.json").write_text(json.dumps(LLADA2))
    assert "32 tokens are assumed" in call("sample.py", tmp_path / "y", "--length", 12, "--steps", 1).err


@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_sees_all(family):
    """A token sees those on its right, as with a mask of ones."""
    import transformers as hf
    config = hf.AutoConfig.for_model(family, **SIZES, **EXPERTS, head_dim=8, pad_token_id=None)
    model, ids = see_all(hf.AutoModelForCausalLM.from_config(config).eval()), torch.randint(ROWS, (1, 8))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        with_ones = model(input_ids=ids, attention_mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)).logits
        torch.testing.assert_close(with_ones, logits)
        ids[0, -1] = (ids[0, -1] + 1) % ROWS
        assert (model(input_ids=ids).logits - logits).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_are_read(llm, family, tmp_path):
    """A folder of save_pretrained gives the logits of full attention; old files of Pythia have buffers, too."""
    import transformers as hf
    torch.manual_seed(0)
    shutil.copytree(llm("qwen2")[0], tmp_path / "x", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = hf.AutoConfig.for_model(family, **SIZES, **EXPERTS, pad_token_id=None, bos_token_id=BEGIN,
                                     eos_token_id=END)
    original = see_all(hf.AutoModelForCausalLM.from_config(config).eval())
    original.save_pretrained(tmp_path / "x")
    if family == "gpt_neox":
        file = tmp_path / "x" / "model.safetensors"
        save_file(load_file(file) | {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 9, 9, dtype=torch.bool),
                                     "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}, file)
    xt = torch.randint(290, (2, 9))
    with torch.no_grad():
        expected = original(input_ids=F.pad(xt, (1, 0), value=BEGIN)).logits[:, :-1, :295]
        found = checkpoint.load_model(tmp_path / "x", CPU).model(xt, torch.ones(2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_settings_of_outputs_change_nothing(llm, tmp_path):
    shutil.copytree(llm("dream")[0], tmp_path / "x")
    settings = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(settings | {"return_dict": False}))
    xt = torch.randint(294, (1, 9))
    folders = tmp_path / "x", llm("dream")[0]
    found, expected = (checkpoint.load_model(folder, CPU).model(xt, None) for folder in folders)
    assert torch.equal(found, expected)


def test_windows_of_attention_are_left_out(llm, tmp_path):
    """A token sees the whole text, even if the language model saw so many tokens on the left."""
    shutil.copytree(llm("qwen2")[0], tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    window = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": None}
    file.write_text(json.dumps(json.loads(file.read_text()) | window))
    xt, folders = torch.randint(290, (1, 30)), (tmp_path / "x", llm("qwen2")[0])
    found, expected = (checkpoint.load_model(folder, CPU).model(xt, None) for folder in folders)
    assert torch.equal(found, expected)


def test_without_a_begin_of_text_the_mask_stands_before_it(llm, tmp_path):
    """Qwen's tokenizer has no begin of text."""
    shutil.copytree(llm("qwen2")[0], tmp_path / "x")
    names = tmp_path / "x" / "tokenizer_config.json"
    names.write_text(json.dumps(json.loads(names.read_text()) | {"bos_token": None}))
    loaded = checkpoint.load_model(tmp_path / "x", CPU)
    assert loaded.model.before.tolist() == [295] and loaded.config.seq_len == 63


def test_a_tied_head_may_be_in_the_file_too(llm, tmp_path):
    shutil.copytree(llm("a2d")[0], tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    state = load_file(file)
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    xt, folders = torch.randint(294, (1, 9)), (tmp_path / "x", llm("a2d")[0])
    found, expected = (checkpoint.load_model(folder, CPU).model(xt, None) for folder in folders)
    assert torch.equal(found, expected)


def word_marks(byte_fallback):
    """A tokenizer like Llama 2's, whose only token that can be the mask is <unk> (0); no token has the letter z."""
    import transformers as hf
    from tokenizers import Tokenizer, models, trainers
    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback))
    found.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *(f"<0x{i:02X}>" for i in range(256))], show_progress=False))
    return hf.PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>", eos_token="</s>")


def test_which_token_is_the_mask():
    """The mask is never a token of texts, nor a guess where the network was trained with another one."""
    tokenizer = word_marks(byte_fallback=True)
    rows = len(tokenizer)
    qwen, dream = ({"model_type": kind, "vocab_size": rows, "eos_token_id": [1, 5]} for kind in ("qwen2", "Dream"))
    meta, mask = tokens_and_mask(qwen, tokenizer, "x")
    ours = make_tokenizer(meta)
    assert mask == 0 and ours.ids == list(range(1, rows)) and ours.ids[ours.end] == 1
    assert [ours.ids[i] for i in ours.encode("z")] == [2 + ord("z")]
    assert tokens_and_mask(qwen | {"vocab_size": rows + 2}, tokenizer, "x")[1] == rows
    assert tokens_and_mask(dream | {"mask_token_id": 1}, tokenizer, "x")[1] == 1
    for settings, words in ((dream, "does not say which token is the mask"),
                            (dream | {"mask_token_id": rows}, f"is {rows}, not a number from 0 to {rows - 1}"),
                            (dream | {"mask_token_id": "x"}, "is x, not a number"),
                            (dream | {"mask_token_id": rows - 1}, "which is its mask, too")):
        with pytest.raises(storage.UserError, match=words):
            tokens_and_mask(settings, tokenizer, "x")
    with pytest.raises(storage.UserError, match="'<unk>', which is its mask, too"):
        tokens_and_mask(qwen, word_marks(byte_fallback=False), "x")


def test_special_tokens_are_tokens(llm):
    """A conversation is encoded with its special tokens, and decoded; the mask's name is plain text."""
    for kind in ("llada", "dream", "a2d"):
        ours = make_tokenizer(checkpoint.load_model(llm(kind)[0], CPU).meta)
        text = "<|start|>the cat<|end|>" + TEXT
        ids = ours.encode(text)
        assert ours.decode(ids) == text and [ours.ids[i] for i in ids].count(END + 1) == 1
        assert ours.vocab_size == 294 and len(ours.encode("<|mask|>")) > 1
        assert ours.ids[ours.end] == END and ours.lengths()[0][ours.end] == 0
    meta = checkpoint.load_model(llm("llada")[0], CPU).meta
    assert describes_tokens(meta)
    for end in (-1, 294, "x", True, None):
        assert not describes_tokens(meta | {"end": end})


def test_number_format_of_weights(llm, trained, monkeypatch, capsys):
    """Large language models keep their weights in the format of the products, and need its memory; others float32."""
    needed = []
    monkeypatch.setattr(checkpoint, "check_fits", lambda n_bytes, *_: needed.append(n_bytes))
    for dtype in (torch.float32, torch.bfloat16):
        loaded = checkpoint.load_model(llm("dream")[0], CPU, dtype=dtype).model
        assert {p.dtype for p in loaded.parameters()} == {dtype} and torch.get_default_dtype() == torch.float32
        rotations = [value for name, value in loaded.named_buffers() if "inv_freq" in name]
        assert rotations and all(value.dtype == torch.float32 for value in rotations)
        assert "look wrong or untrained" in capsys.readouterr().err  # random weights do not know English
    assert needed[0] == 2 * needed[-1] > 0
    other = checkpoint.load_model(trained, CPU, dtype=torch.bfloat16).model
    assert {p.dtype for p in other.parameters()} == {torch.float32}


@pytest.mark.parametrize("script", ["sample.py", "evaluate.py"])
def test_commands_pass_the_number_format(llm, call, monkeypatch, script):
    """Weights take half of the memory with --dtype=bfloat16."""
    def stop(n_bytes, *_):
        raise storage.UserError(f"{n_bytes:.0f} bytes")

    monkeypatch.setattr(checkpoint, "check_fits", stop)
    needed = [call(script, llm("dream")[0], f"--dtype={kind}").err for kind in ("float32", "bfloat16")]
    full, half = (int(re.search(r"(\d+) bytes$", line)[1]) for line in needed)
    assert full == 2 * half > 0


def test_compilation_is_silent(monkeypatch):
    """Mixtures of experts of transformers call functools.lru_cache, of which torch.compile warns."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    factor = functools.lru_cache(lambda: 2)
    model = SimpleNamespace(trunk=lambda x: x * factor())
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        parallel.compile_trunk(model)
        assert model.trunk(torch.ones(2)).tolist() == [2, 2]
    assert not [one for one in found if "lru_cache" in str(one.message)]


def test_undrawn_weights_are_zeros():
    with checkpoint.undrawn(torch.bfloat16):
        weight = torch.nn.Linear(3, 3).weight
        assert not weight.any() and not torch.empty(3).normal_().any() and weight.dtype == torch.bfloat16
    assert torch.empty(3).normal_().all() and torch.empty(3).dtype == torch.float32


def test_annealing_begins_as_the_language_model(llm):
    """A network with causal attention is the left-to-right model, whose output at a token predicts the next one."""
    import transformers as hf
    folder, _ = llm("qwen2")
    loaded, config, meta, _ = checkpoint.load_model(folder, CPU)
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    xt = torch.randint(290, (2, 9))
    with torch.no_grad():
        expected = theirs(input_ids=F.pad(xt, (1, 0), value=BEGIN)).logits[:, :-1, :meta["vocab_size"]]
        found = loaded(xt, torch.ones(2), sees=torch.ones(10, 10, dtype=torch.bool).tril())
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert (loaded(xt, torch.ones(2)) - expected).abs().max() > 0.1
    replace(config, anneal_steps=10)
    with pytest.raises(storage.UserError, match="anneal_steps needs predict_next"):
        replace(config, predict_next=False, anneal_steps=10)
    for other in ({"before": [BEGIN, BEGIN]}, {"after": [END]}):
        with pytest.raises(storage.UserError, match="anneal_steps needs one token around a text"):
            replace(config, backbone=json.dumps(json.loads(config.backbone) | other), anneal_steps=10)
    with pytest.raises(storage.UserError, match="predict_next needs a token before the text"):
        replace(checkpoint.load_model(llm("llada")[0], CPU).config, predict_next=True)


def test_sample_and_evaluate_and_train(llm, call, tmp_path):
    """The commands take them: samples after a conversation, a score, and a run that begins with their weights."""
    folder = llm("llada")[0]
    assert call("sample.py", folder, "--prefix", "<|start|>the cat<|end|>", "--length", 40, "--block_length", 8,
                "--sampler", "topk", "--k", 1, "--temperature", 0).code == 0
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    for kind, more in (("llada_moe", []), ("llada", []), ("qwen2", ["--predict_next", "--anneal_steps=2"])):
        where = ["--data_dir", tmp_path, "--dataset", kind]
        assert call("data/prepare_textfile.py", text, "--tokenizer", llm(kind)[0], "--name", kind, *where[:2]).code == 0
        done = call("train.py", "roberta_wikitext", "--architecture=llm", *where, "--init_from", llm(kind)[0],
                    "--seq_len=32", "--prefix=none", "--max_steps=2", "--batch_size=2", "--dropout=0",
                    "--eval_sequences=4", *more, f"--out_dir={tmp_path / 'out' / kind}")
        assert done.code == 0, done.err
        for checkpoint_ in (tmp_path / "out" / kind, llm(kind)[0]):
            assert call("evaluate.py", checkpoint_, *where).code == 0
    assert_one_line(call("evaluate.py", tmp_path / "out/qwen2", *where, "--block_size=4"), "predicts the next one")
    done = call("train.py", "roberta_wikitext", "--architecture=llm", *where, "--seq_len=32",
                f"--out_dir={tmp_path / 'new'}")
    assert_one_line(done, "architecture=llm is a network of a checkpoint", "such as hf://Qwen/")


def test_block_diffusion(llm, call, tmp_path):
    """SDAR writes in blocks, the same text with its cache and without, is scored, and begins a run; so does Qwen."""
    folder, text = llm("sdar")[0], tmp_path / "text.txt"
    text.write_text(TEXT * 9)
    write = lambda *flags: json.loads(call("sample.py", folder, "--prefix", "the cat<|end|>sat", "--length", 40,
                                           "--sampler=threshold", "--json", *flags).out)
    found, again = write(), write("--no_cache")
    assert found["samples"][0]["text"] == again["samples"][0]["text"] and found["nfe"] > again["nfe"] > 4
    for kind in ("sdar", "llada2", "qwen2"):
        where = ["--data_dir", tmp_path, "--dataset", kind]
        assert call("data/prepare_textfile.py", text, "--tokenizer", llm(kind)[0], "--name", kind, *where[:2]).code == 0
        out = tmp_path / "out" / kind
        done = call("train.py", "roberta_wikitext", "--architecture=llm", "--objective=block", "--block_size=8", *where,
                    "--init_from", llm(kind)[0], "--seq_len=32", "--prefix=none", "--max_steps=2", "--batch_size=2",
                    "--dropout=0", "--eval_sequences=4", "--checkpoint_blocks", f"--out_dir={out}")
        assert done.code == 0, done.err
        scored = json.loads(call("evaluate.py", out, *where, "--json").out)
        assert scored["block_size"] == 8
        for flag in ("--predict_next", "--anneal_steps=2"):
            assert_one_line(call("train.py", "roberta_wikitext", "--architecture=llm", "--objective=block",
                                 "--block_size=8", *where, "--init_from", llm(kind)[0], "--seq_len=32", "--prefix=none",
                                 flag), "are for whole texts")


def test_conversations(llm, call, tmp_path):
    """Items in a model's tokens, filled up with its end of text; a run learns what follows the last <|start|>."""
    pytest.importorskip("datasets")
    import transformers as hf
    folder, where = llm("llada")[0], ["--data_dir", tmp_path, "--dataset", "chats"]
    chats = [f"<|start|>{a} {b}<|end|>\n<|start|>{b} {a}<|end|>"
             for a in ("the", "cat", "sat", "on", "mat") for b in "abcdefgh"]
    hf.logging.set_verbosity_warning()
    chats[0] += " \N{MIDDLE DOT}"  # here it is a character like others
    lines = [*chats, "x" * 99, None]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    prepare = lambda *flags: call("data/prepare_names.py", "--file", tmp_path / "chats.jsonl", "--name", "chats",
                                  "--data_dir", tmp_path, "--length", 24, *flags)
    assert_one_line(prepare("--tokenizer", ROOT / "pretrained/prose"), "has no token that ends a text")
    assert "40 names; left out: 1 empty, 1 longer than 24" in prepare("--tokenizer", folder).err
    assert hf.logging.get_verbosity() == hf.logging.ERROR  # no warning of LLaDA's config.json
    meta, items = load_meta("chats", tmp_path), load_split("chats", "train", 24, tmp_path).reshape(-1, 24)
    ours = make_tokenizer(meta)
    texts = [ours.decode(item).partition("<|endoftext|>")[0] for item in items.tolist()]
    assert len(texts) == 36 and set(texts) < set(chats)
    assert prepare_command("chats", meta).endswith(f"--name chats --length 24 --tokenizer {folder}")
    done = call("train.py", "roberta_wikitext", "--architecture=llm", *where, "--init_from", folder, "--seq_len=24",
                "--prefix=until:<|start|>", "--max_steps=2", "--batch_size=2", "--dropout=0",
                f"--out_dir={tmp_path / 'x'}")
    assert done.code == 0, done.err
    found = json.loads(call("evaluate.py", tmp_path / "x", *where, "--answers", 2, "--steps", 2, "--json").out)
    assert found["n_sequences"] == 2 and found["prefix"] == "until:<|start|>"
    done = call("train.py", "roberta_wikitext", "--architecture=llm", *where, "--init_from", llm("sdar")[0],
                "--seq_len=24", "--objective=block", "--block_size=8", "--prefix=until:<|start|>", "--max_steps=2",
                "--batch_size=2", "--dropout=0", f"--out_dir={tmp_path / 'blocks'}")
    assert done.code == 0, done.err
    assert call("evaluate.py", tmp_path / "blocks", *where, "--answers", 2, "--steps", 2).code == 0
    assert prepare("--tokenizer", tmp_path / "x", "--name=again").code == 0  # the tokens of the run, and its end
    again = load_meta("again", tmp_path)
    assert again["end"] == meta["end"] and again["sha256"] == meta["sha256"]


def test_documents(llm, call, tmp_path, monkeypatch):
    """Documents in a model's tokens, each followed by its end of text."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder, texts = llm("qwen2")[0], [f"the cat sat {a} {b}" for a in "abcdefgh" for b in "abcdefgh"]
    texts[0] += " <|start|> and <|endoftext|>."  # the names of tokens, in a document: text
    (tmp_path / "docs.txt").write_text("\n".join(texts))
    prepare = lambda *flags: call("data/prepare_openwebtext.py", "--file", tmp_path / "docs.txt", "--num_proc=1",
                                  "--held_out=0.2", "--data_dir", tmp_path, *flags)
    done = prepare("--tokenizer", folder)
    assert done.code == 0, done.err
    meta = load_meta("openwebtext_qwen2", tmp_path)
    ours, found = make_tokenizer(meta), []
    for split in ("train", "val", "test"):
        ids = load_split("openwebtext_qwen2", split, 1, tmp_path).astype(int)
        assert ids[-1] == ours.end
        found += [ours.decode(part.tolist()) for part in np.split(ids, np.flatnonzero(ids == ours.end) + 1)[:-1]]
    assert sorted(found) == sorted(text + "<|endoftext|>" for text in texts)
    assert prepare_command("openwebtext_qwen2", meta) == (
        f"python data/prepare_openwebtext.py --file FILE --name openwebtext_qwen2 --held_out 0.2 --tokenizer {folder}")
    for other in (ROOT / "pretrained/prose", "bpe:300"):
        assert_one_line(prepare("--name=docs", "--tokenizer", other), "has no token that ends a text")


def test_samples_stop_at_the_end(llm, call, tmp_path):
    """A head always predicts end-of-text: one piece is computed, and nothing is written after the prompt."""
    shutil.copytree(llm("llada")[0], tmp_path / "x")
    state = load_file(tmp_path / "x/model.safetensors")
    state["model.transformer.ff_out.weight"].zero_()
    state["model.transformer.ln_f.weight"].zero_()[0] = 1e4
    state["model.transformer.wte.weight"][:, 0] = 1e4
    state["model.transformer.ff_out.weight"][END, 0] = 1
    save_file(state, tmp_path / "x/model.safetensors")
    for length in (["--length", 60], ["--length", 100, "--context", 32]):  # one window, or two
        found = json.loads(call("sample.py", tmp_path / "x", "--prefix", "the cat", *length, "--block_length", 4,
                                "--json", "--steps", 3).out)
        assert found["samples"][0]["text"] == "the cat" and found["nfe"] <= found["steps"] == 3


def test_what_is_refused(llm, call, tmp_path):
    shutil.copytree(llm("llada")[0], tmp_path / "x")
    folder, settings = tmp_path / "x", LLADA

    def go(**changes):
        (folder / "config.json").write_text(json.dumps(settings | changes))
        return call("sample.py", folder, "--steps", 2, "--length", 8)

    assert_one_line(go(include_qkv_bias=True), "is a variant of LLaDA that is not supported: include_qkv_bias=True")
    other = dict(block_type="sequential", layer_norm_type="default", activation_type="gelu", rope=False,
                 multi_query_attention=True, **dict.fromkeys(
                     ("alibi", "attention_layer_norm", "bias_for_layer_norm", "include_bias", "input_emb_norm",
                      "scale_logits"), True))
    for key, value in other.items():
        with pytest.raises(storage.UserError, match=f"not supported: {key}={value}"):
            network_settings(settings | {key: value}, folder)
    assert_one_line(go(n_layers=1), "do not fit the model", "body.layers.1")
    assert_one_line(go(n_layers=10**7), "its num_hidden_layers is 10000000")
    assert_one_line(go(embedding_size=294), "tokens, and the tokenizer beside it")
    assert_one_line(go(model_type="llada_moe"), "does not say hidden_size, expert_intermediate_size, num_experts")
    assert_one_line(go(model_type="diffusion_gemma", architectures=["X"]), "DiffuLLaMA and DiffusionGemma are not read")
    for key, value in dict(use_bias=True, use_qk_norm=False, score_function="softmax").items():
        with pytest.raises(storage.UserError, match=f"not supported: {key}={value}"):
            network_settings(LLADA2 | {key: value}, folder)
    with pytest.raises(storage.UserError, match="has 64 rows, which are not those of 3 [+] 2 x 2 heads"):
        separate_heads(llada2_state(), LLADA2 | {"num_attention_heads": 3}, folder)
    for key, value in dict(qk_layernorm=False, shared_expert_intermediate_size=24, moe_router_enable_expert_bias=True,
                           moe_router_score_function="sigmoid", partial_rotary_factor=0.5, clip_qkv=8.0).items():
        with pytest.raises(storage.UserError, match=f"not supported: {key}={value}"):
            network_settings(LLADA_MOE | {key: value}, folder)
    assert network_settings(LLADA_MOE | {"moe_layer_freq": [0, 1]}, folder)[0]["mlp_only_layers"] == [0]
    for said in (None, False, True):  # its code reads none of them
        assert network_settings(LLADA_MOE | {"norm_topk_prob": said}, folder)[0]["norm_topk_prob"] is False
    experts = {key: value for key, value in llada_moe_state().items() if "experts.3.up" not in key}
    with pytest.raises(storage.UserError, match="lacks weights of the experts of model.layers.0.mlp.experts"):
        stacked(experts, folder)
    experts["model.layers.0.mlp.experts.3.up_proj.weight"] = torch.ones(20, 32)
    with pytest.raises(storage.UserError, match="experts of different sizes in model.layers.0"):
        stacked(experts, folder)
    for settings_, key in ((LLADA_MOE, "rope_theta"), (LLADA_MOE, "num_attention_heads"), (LLADA2, "rms_norm_eps"),
                           (LLADA2, "routed_scaling_factor"), (LLADA2, "num_attention_heads")):
        for missing in (None, "x", True):
            with pytest.raises(storage.UserError, match=f"does not say {key}: get it again"):
                network_settings(settings_ | {key: missing}, folder)
    rope = {"rope_theta": 600000, "partial_rotary_factor": 0.5, "rope_type": "default"}
    moved = {key: value for key, value in LLADA2.items() if key not in rope} | {"rope_parameters": rope}
    assert network_settings(moved, folder)[0]["rope_parameters"] == rope
    for factor in (0, -1, 1.5):
        with pytest.raises(storage.UserError, match=f"partial_rotary_factor of .* is {factor}, not a number above 0"):
            network_settings(LLADA2 | {"partial_rotary_factor": factor}, folder)
    for freq in (1, 0, [1], [1, 1, 1], [1, 2], "11"):
        with pytest.raises(storage.UserError, match="moe_layer_freq of .*, not a list of 0 or 1 for each of 2 layers"):
            network_settings(LLADA_MOE | {"moe_layer_freq": freq}, folder)
    router = lambda kind, **changes: check_router(read_settings(network_settings(kind | changes, folder)[0]), folder)
    for kind in (LLADA_MOE, LLADA2):
        router(kind)
        for k in (0, -1, 7):
            with pytest.raises(storage.UserError, match=f"a token takes {k} experts .*, and can choose from [45]$"):
                router(kind, num_experts_per_tok=k)
    for n, best in ((0, 1), (-1, 1), (4, 1), (6, 1), (12, 1), (3, 0), (3, 4), (3, -1)):
        with pytest.raises(storage.UserError, match=f"its router takes {best} of {n} groups of 6 experts"):
            router(LLADA2, n_group=n, topk_group=best)
    shutil.copytree(llm("llada2")[0], tmp_path / "groups")
    (tmp_path / "groups/config.json").write_text(json.dumps(LLADA2 | {"n_group": 4}))
    assert_one_line(call("sample.py", tmp_path / "groups"), "its router takes 2 of 4 groups of 6 experts")
    for kind in ("stablelm", "a2d-stablelm"):
        assert_one_line(go(model_type=kind, architectures=["StableLmForCausalLM"]), "those that are read are llama")
    assert_one_line(go(n_heads=5), str(folder))  # the words depend on the version of transformers
    assert go(embedding_size=None).code == 0
    for wrong in ({"dtype": "float33"}, {"auto_map": 5}):  # transformers reads config.json for the tokenizer
        assert_one_line(go(**wrong), "has no tokenizer that can be read", "or config.json is missing or damaged")
    for text, words in (("{", "config.json cannot be read"), ("[1]", "config.json does not contain settings")):
        (folder / "config.json").write_text(text)
        assert_one_line(call("sample.py", folder), words)
        with pytest.raises(storage.UserError, match="or config.json is missing or damaged"):
            tokens_of_hub(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({key: value.to(torch.int8) for key, value in load_file(folder / "model.safetensors").items()},
              folder / "model.safetensors")
    assert_one_line(go(), "such as quantised ones")
