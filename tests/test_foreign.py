"""Foreign checkpoints as files: where they are found, what is refused, the Hub's cache, unknown families, weights that
look wrong."""

import collections
import dataclasses
import io
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import checkpoint
import storage
from cli import UserError
from commands import ROOT, assert_one_line
from configs import CONFIGS, replace
from data.loader import SPLITS
from data.tokenizer import KNOWN, CharTokenizer, make_tokenizer
from diffusion import MDLM
from foreign import ddit, files, translate
from networks import small
from test_tiny_diffusion import their_state
from uniform import Uniform

CPU = torch.device("cpu")


def ddit_state(rows=28, D=16, C=8, n_layer=2, time=True, bias=False, seed=0, prefix=""):
    """A state dict of SEDD's network, as its code names and orders the parameters, with random weights."""
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.2 * torch.randn(shape, generator=generator)
             for key, shape in ddit.shapes_of(rows, D, C, n_layer, time, bias).items()}
    state["rotary_emb.inv_freq"] = torch.ones(D // 4)  # two heads
    return {prefix + key: value for key, value in state.items()}


SEDD = {"tokens": 27, "graph": {"type": "absorb"}, "noise": {"type": "loglinear", "sigma_min": "1e-4", "sigma_max": 20},
        "model": {"length": 32, "n_heads": 2, "scale_by_sigma": True}, "sampling": {"steps": 12}}


def folder_of(path, state, settings, weights="model.safetensors"):
    from safetensors.torch import save_file
    path.mkdir(parents=True, exist_ok=True)
    if weights.endswith("safetensors"):
        save_file(state, path / weights)
    else:
        (path / weights).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path / weights)
    if settings is not None:
        (path / "config.json").write_text(json.dumps(settings))
    return path


# ---- what it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, settings, state, expected", [
    ("sedd", SEDD, ddit_state(), dict(objective="sedd", conditioning="sigma", schedule="loglinear", T=12, seq_len=32)),
    ("sedd", {"config": SEDD, "vocab_size": 28}, ddit_state(), dict(objective="sedd", T=12)),
    ("sedd", SEDD | {"graph": {"type": "uniform"}, "model": SEDD["model"] | {"scale_by_sigma": False},
                     "noise": {"type": "geometric", "sigma_min": "1e-4", "sigma_max": 20}},
     ddit_state(27), dict(objective="sedd", noise="uniform", schedule="geometric:1e-4:20")),
    ("oxen", {"model": {"length": 16, "n_heads": 2}}, ddit_state(99),
     dict(objective="sedd", seq_len=16, dataset="names")),
    ("mdlm", {"model_type": "mdlm", "model_length": 24, "time_conditioning": False}, ddit_state(prefix="backbone."),
     dict(objective="mdlm", conditioning="none", schedule="linear", norm_bias=True, seq_len=24, n_head=2, T=1000)),
    ("mdlm", {"model_type": "mdlm", "model_length": 24, "time_conditioning": True}, ddit_state(prefix="backbone."),
     dict(conditioning="sigma", schedule="loglinear", norm_bias=False)),
    ("mdlm", {"model_type": "mdlm", "model_length": 24}, ddit_state(35, prefix="backbone."), dict(dataset="text8")),
    ("bd3lm", {"model_type": "bd3lm", "model_length": 24, "block_size": 24, "adaln": True, "time_conditioning": False},
     ddit_state(prefix="backbone."), dict(objective="mdlm", conditioning="none")),
    ("bd3lm", {"model_type": "bd3lm", "model_length": 24, "block_size": 1, "cross_attn": False},
     ddit_state(prefix="backbone.backbone."), dict(objective="mdlm", conditioning="none")),
    ("bd3lm", {"algo": {"name": "bd3lm", "cross_attn": "False"}, "block_size": 4, "time_conditioning": False,
               "model": {"length": 24, "n_heads": 2}}, ddit_state(prefix="backbone."), dict(objective="mdlm")),
    ("bd3lm", {"model_type": "bd3lm", "model_length": 24, "block_size": 4, "time_conditioning": False},
     ddit_state(prefix="backbone."), dict(objective="block", block_size=4)),
    ("duo", {"algo": {"name": "ot-finetune"}, "model": {"length": 24}}, ddit_state(27, prefix="backbone."),
     dict(noise="uniform")),
    ("duo", {"algo": {"name": "distillation"}, "model": {"length": 24}}, ddit_state(27, prefix="backbone."),
     dict(objective="mdlm", noise="uniform", seq_len=24)),
    ("bd3lm", {"model_type": "bd3lm", "model_length": 24, "block_size": 24, "parameterization": "sedd",
               "time_conditioning": True},
     ddit_state(prefix="backbone."), dict(objective="sedd", conditioning="sigma")),
    ("duo", {"model_type": "DUO", "model_length": 24}, ddit_state(27, prefix="backbone."),
     dict(objective="mdlm", noise="uniform", conditioning="sigma", schedule="loglinear")),
    ("udlm", {"model_type": "udlm", "model_length": 24, "time_conditioning": True}, ddit_state(27, prefix="backbone."),
     dict(objective="mdlm", noise="uniform", conditioning="sigma")),
    ("radd", {"tokens": 27, "model": {"length": 24, "n_heads": 2}}, ddit_state(time=False, bias=True),
     dict(objective="mdlm", conditioning="none", norm_bias=True, seq_len=24)),
], ids=lambda x: x if isinstance(x, str) else "")
def test_detected(tmp_path, name, settings, state, expected):
    """The format follows from tensors and settings, sizes from the tensors; the folder, the file in it, and forced."""
    folder = folder_of(tmp_path / "x", state, settings)
    for path, hints in ((folder, storage.Hints()), (folder / "model.safetensors", storage.Hints()),
                        (folder, storage.Hints(format=name))):
        payload = storage.read(path, hints)
        assert payload["foreign"] == name
        assert {key: payload["config"][key] for key in expected} == expected
        model, config, *_ = checkpoint.load_model(path, CPU, hints)
        assert (config.n_embd, config.n_layer, config.n_head) == (16, 2, 2) and not config.tied and config.head_bias
        assert model.embed.num_embeddings == next(v for k, v in state.items() if "vocab_embed" in k).shape[0]
    assert storage.read(folder, storage.Hints(overrides={"seq_len": 8}))["config"]["seq_len"] == 8


def test_layouts(tmp_path):
    """SEDD's and Oxen's folders of local runs, numbered checkpoints (the last one), and a single file of any name."""
    import yaml
    state = {"model": ddit_state(), "step": 3, "ema": {"decay": 0.9, "num_updates": 1, "shadow_params": [
        value for key, value in ddit_state(seed=1).items() if "inv_freq" not in key]}}
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / ".hydra" / "config.yaml").write_text(yaml.safe_dump(SEDD))
    for n in (2, 10):
        torch.save(state | {"step": n}, run / "checkpoints" / f"checkpoint_{n}.pth")
    payload = storage.read(run)
    assert payload["step"] == 10 and payload["foreign"] == "sedd"
    assert torch.equal(payload["model"]["norm.weight"], state["model"]["output_layer.norm_final.weight"])
    assert torch.equal(payload["ema"]["norm.weight"], ddit_state(seed=1)["output_layer.norm_final.weight"])
    assert storage.read(run / "checkpoints" / "checkpoint_2.pth")["step"] == 2
    oxen = tmp_path / "oxen"
    oxen.mkdir()
    torch.save(ddit_state(99), oxen / "anything.pth")
    (oxen / "config.yaml").write_text(yaml.safe_dump({"model": {"length": 16, "n_heads": 2}}))
    assert storage.read(oxen)["foreign"] == "oxen"
    torch.save(ddit_state(99), oxen / "other.pth")
    with pytest.raises(UserError, match="nor one of another project: it has anything.pth, other.pth: name one"):
        storage.read(oxen)
    state["ema"]["shadow_params"].pop()
    torch.save(state, run / "checkpoints" / "checkpoint_11.pth")
    with pytest.raises(UserError, match="moving average that does not fit its weights: 29 tensors for 30"):
        storage.read(run)


def test_the_mask_comes_last(tmp_path):
    """MDLM's text8 has the mask at row 4 of 35; here it comes last.

    It is the last row of the embedding, and no row of the head; text is still what it was.
    """
    state = ddit_state(35, prefix="backbone.")
    payload = storage.read(folder_of(tmp_path / "x", state, {"model_type": "mdlm", "model_length": 24}))
    theirs = state["backbone.vocab_embed.embedding"]
    assert torch.equal(payload["ema"]["embed.weight"], theirs[[0, 1, 2, 3, *range(5, 35), 4]])
    for ours, key in (("head_bias", "bias"), ("head_weight", "weight")):
        assert torch.equal(payload["ema"][ours],
                           state[f"backbone.output_layer.linear.{key}"][[0, 1, 2, 3, *range(5, 35)]])
    ids = make_tokenizer(payload["meta"]).encode("az ")
    assert torch.equal(payload["ema"]["embed.weight"][ids.astype(int)], theirs[[8, 33, 34]])
    uniform = storage.read(folder_of(tmp_path / "y", state, {"model_type": "duo", "model_length": 24}))
    assert torch.equal(uniform["ema"]["embed.weight"], theirs) and uniform["meta"]["vocab_size"] == 35
    assert make_tokenizer(uniform["meta"]).encode("az ").tolist() == [8, 33, 34]


def test_vocabularies():
    """As their projects have them: Oxen's 98 symbols; text8 with frames; one symbol per token, none twice."""
    oxen = KNOWN["oxen"]["alphabet"]
    assert len(oxen) == 98 and oxen.index("a") == 2 and oxen.index("A") == 28 and oxen.index("0") == 54
    assert oxen.index("!") == 64 and oxen.index("~") == 95 and oxen[96:] == "\n "
    assert len(KNOWN["oxen_words"]["alphabet"]) == 97 and KNOWN["text8_framed"]["vocab_size"] == 34
    for meta in KNOWN.values():
        assert len(set(meta.get("alphabet", ""))) == len(meta.get("alphabet", "")) <= meta["vocab_size"]


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_checked(tmp_path):
    """What is missing, unexpected or of another shape is named as its own project names it."""
    def refused(match, settings=SEDD, base=None, **changes):
        state = (base or ddit_state()) | changes
        folder = folder_of(tmp_path / str(len(list(tmp_path.iterdir()))),
                           {key: value for key, value in state.items() if value is not None}, settings)
        with pytest.raises(UserError, match=match):
            storage.read(folder)

    refused("blocks.1.mlp.0.bias is missing", **{"blocks.1.mlp.0.bias": None})
    refused("extra is unexpected", extra=torch.zeros(2))
    refused(r"blocks.0.norm1.weight is \(3,\), expected \(16,\)", **{"blocks.0.norm1.weight": torch.zeros(3)})
    refused("cond_map.embedding_table.weight is unexpected", {"model_type": "udlm", "model_length": 8}, ddit_state(27),
            **{"cond_map.embedding_table.weight": torch.zeros(2, 8)})
    refused("does not say its sequence length", SEDD | {"model": {}})
    refused("does not say its number of heads", SEDD | {"model": {"length": 8}}, **{"rotary_emb.inv_freq": None})
    refused("30 tokens, and does not say which", SEDD, ddit_state(31))
    refused("noise 'cosine', which is not supp", {"model_type": "duo", "model_length": 8, "noise": {"type": "cosine"}},
            ddit_state(27))
    refused("parameterization 'd3pm'", {"model_type": "mdlm", "model_length": 8, "parameterization": "d3pm"})
    refused("and T = 1000", {"model_type": "mdlm", "model_length": 8, "T": 1000})
    refused("causal attention", {"model_type": "bd3lm", "model_length": 8, "causal": True})
    refused("without modulations", {"model_type": "bd3lm", "model_length": 8, "adaln": False})
    refused("time conditioning and", {"model_type": "mdlm", "model_length": 8, "time_conditioning": True,
                                      "training": {"change_of_variables": True}})
    refused("does not say with which loss", {"model_type": "bd3lm", "model_length": 8, "time_conditioning": True})
    refused("has the unknown algorithm 'plaid'", {"model_type": "plaid"})
    refused("no settings say which", None)


def test_an_unknown_family_is_compared(tmp_path):
    """The two nearest families, and the first keys that differ."""
    path = folder_of(tmp_path / "x", ddit_state(time=False), {})
    with pytest.raises(UserError, match="most similar are RADD, then SEDD, MDLM, Duo; compared with the first, it "
                                        "lacks blocks.N.norm1.bias, "
                                        "blocks.N.norm2.bias, output_layer.norm_final.bias$"):
        storage.read(path)
    gpt = {f"transformer.h.0.{name}.weight": torch.zeros(2) for name in ("ln_1", "attn.c_attn")}
    with pytest.raises(UserError, match="has no known format.* and has transformer.h.N.attn.c_attn.weight, "):
        storage.read(folder_of(tmp_path / "y", gpt, {}))
    ours = {"blocks.0.mlp_in.weight": torch.zeros(2, 2)}  # a folder of export.py without its config.json
    with pytest.raises(UserError, match="has the tensors of this project's networks: the config.json that"):
        storage.read(folder_of(tmp_path / "z", ours, None))


class Evil:
    """Pickles as a call of function(*arguments)."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def lightning(path, **more):
    torch.save({"state_dict": ddit_state(prefix="backbone."), "hyper_parameters": {}, **more}, path)
    return path


@pytest.mark.parametrize("function, arguments, name", [
    (eval, ("open('{flag}', 'w')",), "builtins.eval"), (exec, ("open('{flag}', 'w')",), "builtins.exec"),
    (os.system, ("touch {flag}",), "posix.system"), (getattr, (os, "system"), "builtins.getattr"),
    (subprocess.check_call, (["touch", "{flag}"],), "check_call"), (__import__, ("os",), "builtins.__import__"),
    (shutil.rmtree, ("{flag}",), "shutil.rmtree"), (torch.load, ("{flag}",), "torch.serialization.load")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_malicious_pickles(call, tmp_path, function, arguments, name):
    """Real ones, which do run under pickle.loads: refused by name, exit code 2, nothing executed."""
    flag = tmp_path / "flag"
    arguments = [a.format(flag=flag) if isinstance(a, str) else [b.format(flag=flag) for b in a] if isinstance(a, list)
                 else a for a in arguments]
    if function in (eval, exec, os.system, subprocess.check_call):
        pickle.loads(pickle.dumps(Evil(function, *arguments)))
        assert flag.exists()
        flag.unlink()
    if function is getattr:
        arguments = ["x", "upper"]
    path = lightning(tmp_path / "evil.ckpt", callbacks=Evil(function, *arguments))
    assert_one_line(call("sample.py", path), "evil.ckpt", name, "nothing in it was executed")
    assert_one_line(call("evaluate.py", path), name)
    assert not flag.exists()


def test_plain_pickles(call, tmp_path):
    """A pickle that torch.save did not write is not executed: one line, and nothing before it."""
    path, flag = tmp_path / "x.pt", tmp_path / "flag"
    for content in ({"model": Evil(os.system, f"touch {flag}")}, {"model": [1.0, 2.0]}):
        path.write_bytes(pickle.dumps(content))
        for script in ("sample.py", "evaluate.py"):
            assert_one_line(call(script, path), "x.pt cannot be read as a checkpoint")
    assert not flag.exists()


def test_files_of_torch_before_1_6(call, tmp_path):
    """Their format, without a zip archive, is read; what else they ask for is not executed; half a file is damaged."""
    old, flag = dict(_use_new_zipfile_serialization=False), tmp_path / "flag"
    torch.save({"x": torch.arange(3)}, tmp_path / "x.pt", **old)
    assert files.load(tmp_path / "x.pt")["x"].tolist() == [0, 1, 2]
    torch.save({"x": Evil(os.system, f"touch {flag}")}, tmp_path / "evil.pt", **old)
    (tmp_path / "half.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-30])
    for name in ("evil.pt", "half.pt"):
        assert_one_line(call("sample.py", tmp_path / name), f"{name} cannot be read as a checkpoint", "damaged")
    assert not flag.exists()


def test_flipped_bits_of_other_peoples_files(tmp_path):
    """Every single-bit flip in the tensors of a .pth is reported by name; plain torch.load reads them all as other
    numbers, without a word. Files without sums of their contents, which torch can be told to write, are still read."""
    path, state = tmp_path / "checkpoint.pth", {"model": ddit_state(), "step": 1}
    torch.save(state, path)
    whole, chance = path.read_bytes(), random.Random(0)
    weights = state["model"]["vocab_embed.embedding"].numpy().tobytes()
    start, seen = whole.index(weights), 0
    for _ in range(50):
        damaged = bytearray(whole)
        damaged[start + chance.randrange(len(weights))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        seen += not torch.equal(torch.load(path, weights_only=True)["model"]["vocab_embed.embedding"],
                                state["model"]["vocab_embed.embedding"])
        with pytest.raises(UserError, match=r"pth is damaged \(the checksum test failed: checkpoint/data/\d+\)"):
            files.read_files(path)
    assert seen > 45  # a flip can turn 0 into -0
    path.write_bytes(whole)
    assert files.read_files(path).payload["step"] == 1
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert files.read_files(path).payload["step"] == 1


def test_a_missing_average_is_said(call, tmp_path, capfd):
    """SEDD's file with an `ema` that holds none: the raw weights are used, and a line says so; with one, nothing."""
    folder = folder_of(tmp_path / "x", {}, SEDD)
    for ema, said in (([], True), ({}, True), ({"shadow_params": list(ddit_state().values())[:-1]}, False)):
        state = ddit_state()
        torch.save({"model": state, "ema": ema, "step": 1}, folder / "checkpoint.pth")
        (folder / "model.safetensors").unlink(missing_ok=True)
        storage.read(folder)
        assert ("its raw weights are used instead" in capfd.readouterr().err) == said


def test_an_evil_name_in_an_allowed_module(tmp_path):
    """Only names count.

    What calls itself part of transformers is a stand-in that does nothing, whatever it is given.
    """
    path, flag = tmp_path / "x.ckpt", tmp_path / "flag"
    buffer = io.BytesIO()
    torch.save({"state_dict": ddit_state(prefix="backbone."),
                "callbacks": Evil(os.system, f"touch {flag}")}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                assert b"cposix\nsystem\n" in content
                content = content.replace(b"cposix\nsystem\n", b"ctransformers\nsystem\n")
            new.writestr(item, content)
    payload = files.load(path)
    assert type(payload["callbacks"]).__name__ == "system" and isinstance(payload["callbacks"], files.Inert)
    assert not flag.exists() and "transformers.system" not in sys.modules


def test_containers_and_references(tmp_path):
    """Containers become plain ones; settings of omegaconf follow their references; real modules are not imported."""
    class Node:
        def __init__(self, **state):
            self.__dict__ = state

    path = tmp_path / "x.ckpt"
    torch.save({"x": collections.defaultdict(list), "y": frozenset([1]), "z": {2},
                "w": collections.OrderedDict(b=1)}, path)
    assert files.load(path) == {"x": {}, "y": frozenset([1]), "z": {2}, "w": {"b": 1}}

    def inert(**state):
        node = files.Inert()
        node.__setstate__(state)
        return node

    leaf = lambda value: inert(_val=value)
    tree = inert(_content={"model": inert(_content={"length": leaf(32), "again": leaf("${model.length}")}),
                           "block": leaf("${model.again}"), "list": inert(_content=[leaf(1), leaf("${nothing.there}")]),
                           "loop": leaf("${loop}"), "text": leaf("a ${b}"), "none": leaf(None)})
    found = files.settings(tree)
    assert found["block"] == found["model"]["again"] == 32 and found["list"] == [1, None] and found["text"] == "a ${b}"
    assert found["none"] is None


def test_mazes_of_settings(tmp_path):
    """References that multiply, loop or share without end are refused, or lead nowhere, at once; so are cycles."""
    def lightning_settings(config):
        payload = {"state_dict": ddit_state(prefix="backbone."), "hyper_parameters": {"config": config}}
        torch.save(payload, tmp_path / "x")
        return files.read_files(tmp_path / "x").settings

    loops = lightning_settings({"a": ["${a}"] * 60, "b": "${c}", "c": "${b}"})
    assert loops == {"a": [None] * 60, "b": None, "c": None}
    assert lightning_settings([1]) == lightning_settings("x") == {}
    shared, cycle = {"x": 1}, {}
    for _ in range(40):
        shared = {"a": shared, "b": shared}
    cycle["again"] = cycle
    for config in (shared, cycle):
        with pytest.raises(UserError, match="too many values or levels"):
            lightning_settings(config)


@pytest.mark.parametrize("changes", [
    {"algo": "sedd"}, {"algo": ["x"]}, {"sampling": {"steps": [1]}}, {"sampling": {"steps": "many"}},
    {"model": "small"},
    {"model": {"length": 10**30, "n_heads": 2}}, {"model": {"length": "x", "n_heads": 2}}, {"noise": "loglinear"},
    {"model": {"length": 8, "n_heads": -2}}, {"model": {"length": 8, "n_heads": 2, "scale_by_sigma": "maybe"}},
    {"graph": "absorb"}, {"noise": {"type": "geometric", "sigma_min": 1, "sigma_max": 200}},
    {"model_type": "mdlm", "time_conditioning": "x"}, {"sampling": {"steps": -1}}], ids=str)
def test_strange_settings(call, tmp_path, changes):
    """Settings of the wrong kind are one line, exit code 2."""
    assert_one_line(call("sample.py", folder_of(tmp_path / "x", ddit_state(), SEDD | changes)))


def test_an_assumed_number_of_heads_is_said(tmp_path, capfd):
    """A checkpoint of tiny-diffusion does not have it: a line says what was assumed, unless the user says it."""
    torch.save(their_state(), tmp_path / "x.pt")
    for overrides, said in (({}, True), ({"n_head": 1}, False)):
        storage.read(tmp_path / "x.pt", storage.Hints(overrides=overrides))
        assert ("does not say its n_head: 1 is assumed" in capfd.readouterr().err) == said


def test_strange_weights(call, tmp_path):
    """Half precision is read; integers are no weights; a table without frequencies is none; tied heads are exported."""
    half = folder_of(tmp_path / "half", {key: value.bfloat16() for key, value in ddit_state().items()}, SEDD)
    assert checkpoint.load_model(half, CPU).model.embed.weight.dtype == torch.float32
    whole = {key: value.long() for key, value in ddit_state().items()}
    assert_one_line(call("sample.py", folder_of(tmp_path / "whole", whole, SEDD)), "no real numbers, such as quantised")
    none = ddit_state() | {"rotary_emb.inv_freq": torch.zeros(0)}
    assert_one_line(call("sample.py", folder_of(tmp_path / "none", none, SEDD)), "is damaged")
    other = SEDD | {"model": SEDD["model"] | {"n_heads": 4}}
    assert_one_line(call("sample.py", folder_of(tmp_path / "heads", ddit_state(), other)),
                    "2 heads, and its settings say 4")
    tied = ddit_state()
    tied["output_layer.linear.weight"] = tied["vocab_embed.embedding"]
    folder = folder_of(tmp_path / "tied", tied, SEDD, "pytorch_model.bin")
    assert call("checkpoint.py", "export", folder, tmp_path / "out").code == 0


def test_a_data_set_of_ones_own(call, tmp_path):
    """27 other symbols than text8's: --dataset says so; one that is not there is an error; our own know theirs."""
    folder = folder_of(tmp_path / "x", ddit_state(), SEDD)
    (tmp_path / "mine").mkdir()
    meta = {"tokenizer": "char", "alphabet": "ABCDEFGHIJKLMNOPQRSTUVWXYZ.", "vocab_size": 27, "dtype": "uint8",
            "sizes": dict.fromkeys(SPLITS, 1), "sha256": dict.fromkeys(SPLITS, "")}
    (tmp_path / "mine" / "meta.json").write_text(json.dumps(meta))
    flags = ["--dataset", "mine", "--data_dir", tmp_path]
    result = call("sample.py", folder, "--steps=2", *flags)
    assert result.code == 0 and set(result.out.strip()) <= set(meta["alphabet"])
    assert_one_line(call("sample.py", folder, "--dataset", "absent", "--data_dir", tmp_path), "is not prepared")
    assert call("checkpoint.py", "export", folder, tmp_path / "shared", *flags, "--format", "sedd").code == 0
    assert set(call("sample.py", tmp_path / "shared", "--steps=2").out.strip()) <= set(meta["alphabet"])


def test_shards_outside_the_folder_are_not_read(call, tmp_path):
    folder = folder_of(tmp_path / "x", ddit_state(), SEDD)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / files.SHARDS).write_text(json.dumps({"weight_map": {"bias": "../secret.safetensors"}}))
    assert_one_line(call("sample.py", folder), "cannot be read as safetensors")


def test_files_that_are_none(call, tmp_path):
    for name, content in (("x.ckpt", b"rubbish"), ("x.safetensors", b"rubbish"), ("x.pth", b"")):
        (tmp_path / name).write_bytes(content)
        assert_one_line(call("sample.py", tmp_path / name), name, "cannot be read")
    (tmp_path / "empty").mkdir()
    assert_one_line(call("sample.py", tmp_path / "empty"), "nor one of another project")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert_one_line(call("sample.py", tmp_path / "empty"), "it has a config.json, but no file of weights")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "ckpt.pt").write_bytes(b"")
    assert_one_line(call("sample.py", tmp_path / "runs"), f"name one of the runs in it, such as {tmp_path}/runs/demo")
    folder = folder_of(tmp_path / "x", ddit_state(), None)
    for name, content in (("config.json", "{"), ("config.json", "[]"), ("config.yaml", "a: [")):
        (folder / name).write_text(content)
        assert_one_line(call("sample.py", folder), name)
        (folder / name).unlink()
    assert_one_line(call("sample.py", folder, "--format", "plaid"), "invalid choice")
    assert_one_line(call("sample.py", folder, "--format", "nanodd"), "looks like a checkpoint of nanodd but lacks")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def offline(cache, *command):
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment,
                          cwd=ROOT)


def cached(cache, name):
    """The folder of a repository in a cache of the Hub's layout."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("abc123")
    return root / "snapshots" / "abc123"


def test_hub_offline(tmp_path):
    """hf://owner/name from the local cache without a network; one line where it is not there; names that are none."""
    folder_of(cached(tmp_path, "louaaron/sedd-tiny"), ddit_state(), SEDD)
    folder_of(cached(tmp_path, "someone/pickled"), ddit_state(), SEDD, "pytorch_model.bin")
    cached(tmp_path, "someone/empty").mkdir(parents=True)
    ours = cached(tmp_path, "me/ours")
    code = f"""
import contextlib, io, sys
sys.path.insert(0, {str(ROOT)!r})
import checkpoint, storage, torch
from cli import UserError
from export import export
export("hf://louaaron/sedd-tiny", {str(ours)!r})
for name in ("louaaron/sedd-tiny", "someone/pickled", "me/ours"):
    assert checkpoint.load_model("hf://" + name, torch.device("cpu")).config.objective == "sedd"
for name in ("someone/empty", "someone/absent", "louaaron/sedd-tiny@v2", "nobody"):
    try:
        storage.read("hf://" + name)
    except UserError as error:
        print(error)
"""
    lines = offline(tmp_path, "-c", code)
    assert lines.returncode == 0, lines.stderr
    empty, absent, revision, wrong = lines.stdout.splitlines()
    assert "someone/empty has no file of weights" in empty and "is not in the cache" in absent
    assert "sedd-tiny@v2 could not be downloaded" in revision and "hf://owner/name" in wrong
    result = offline(tmp_path, "sample.py", "hf://louaaron/sedd-tiny", "--steps", "2", "--length", "8")
    assert result.returncode == 0 and len(result.stdout) == 9
    result = offline(tmp_path, "evaluate.py", "hf://someone/absent")
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


def test_a_missing_tokenizer(tmp_path):
    """MDLM's LM1B model has BERT's words: where these are not cached, one line; where they are, it samples."""
    folder = folder_of(tmp_path / "lm1b", ddit_state(30522, prefix="backbone."),
                       {"model_type": "mdlm", "model_length": 8, "time_conditioning": False})
    result = offline(tmp_path / "cache", "sample.py", folder, "--steps=1")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("sample.py: the tokenizer of hf://google-bert")
    assert "Traceback" not in result.stderr
    vocabulary = cached(tmp_path / "cache", "google-bert/bert-base-uncased")
    vocabulary.mkdir(parents=True)
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["the", "cat", "sat", "##s", *(f"word{i}" for i in range(30522 - len(words) - 4))]
    (vocabulary / "vocab.txt").write_text("\n".join(words))
    (vocabulary / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (vocabulary / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data.tokenizer import make_tokenizer
for size, shift in ((30522, 0), (30521, 1)):
    tokenizer = make_tokenizer({{"tokenizer": "bert", "vocab_size": size}})
    ids = tokenizer.encode("The cat sats")
    assert ids.tolist() == [104 - shift, 105 - shift, 106 - shift, 107 - shift], ids
    assert tokenizer.decode(ids) == "the cat sats"
    chars, sizes = tokenizer.lengths()
    assert len(chars) == size and chars[ids].tolist() == [4, 4, 4, 1]
"""
    result = offline(tmp_path / "cache", "-c", code)
    assert result.returncode == 0, result.stderr
    result = offline(tmp_path / "cache", "sample.py", folder, "--steps=1")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr


# ---- weights that look wrong -----------------------------------------------------------------------------------------


def shuffled(weights):
    generator = torch.Generator().manual_seed(0)
    return {key: value.flatten()[torch.randperm(value.numel(), generator=generator)].view(value.shape)
            for key, value in weights.items()}


def test_plausible(trained, monkeypatch):
    """A trained network knows more than frequencies.

    With shuffled weights, or rows of the wrong tokens, it knows less.
    """
    monkeypatch.setattr(translate, "ENGLISH", "the cat sat on the mat and the dog sat on the log " * 3)
    model, config, meta, _ = checkpoint.load_model(trained, CPU)
    objective, tokenizer = config.make_objective(27), CharTokenizer(meta["alphabet"])
    measure = lambda: translate.plausible(model, objective, tokenizer, config.seq_len, CPU)
    ce, level = measure()
    assert ce < 0.8 * level
    intact = {key: value.clone() for key, value in model.state_dict().items()}
    for broken in (shuffled(intact), intact | {"embed.weight": intact["embed.weight"].roll(5, 0)}):
        model.load_state_dict(broken)
        ce, level = measure()
        assert ce > level


def test_plausible_with_uniform_noise(monkeypatch):
    """The network is told the time at which one token in seven is noise, and its outputs are read for that rate."""
    objective, told = Uniform(27), {}

    def model(x, t):
        told["time"] = t
        return torch.zeros(*x.shape, 27)

    def prediction(logits, x, sigma):
        told["sigma"] = sigma
        return logits.softmax(-1)

    monkeypatch.setattr(objective, "prediction", prediction)
    ce, _ = translate.plausible(model, objective, CharTokenizer(KNOWN["text8"]["alphabet"]), 32, CPU)
    assert ce == pytest.approx(math.log(27))
    assert objective.schedule.alpha(told["time"].double()).item() == pytest.approx(6 / 7, rel=1e-5)
    torch.testing.assert_close((-told["sigma"]).exp(), torch.full((1, 32), 6 / 7))


def test_a_trained_checkpoint_and_its_weights_shuffled(tmp_path, capsys, monkeypatch):
    """RADD's format, trained for some seconds: no warning; the same with shuffled weights: a warning."""
    text = "the cat sat on the mat and the dog sat on the log " * 4
    monkeypatch.setattr(translate, "ENGLISH", text)
    torch.manual_seed(0)
    model = small(seq_len=32, n_layer=1, n_embd=32, tied=False, head_bias=True, norm_bias=True).make_model(27)
    tokens = torch.from_numpy(CharTokenizer(KNOWN["text8"]["alphabet"]).encode(text).astype("int64"))
    objective = MDLM(27)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(200):
        x0 = torch.stack([tokens[i:i + 32] for i in torch.randint(len(tokens) - 32, (16,))])
        noise = objective.exact_k(torch.rand(16).double(), torch.rand(16, 32).double())
        loss = objective.masked_ce(model, x0, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    back = {ours: theirs for theirs, ours in ((key, next(iter(files.rename({key: None}, ddit.NAMES))))
                                              for key in ddit.shapes_of(28, 32, 1, 1, time=False, bias=True))}
    state = {back[key]: value.detach() for key, value in model.state_dict().items()}
    for key in ("output_layer.linear.weight", "output_layer.linear.bias"):
        state[key] = torch.cat((state[key], torch.zeros_like(state[key][:1])))  # the mask's
    state["rotary_emb.inv_freq"] = torch.ones(8)
    settings = {"tokens": 27, "model": {"length": 32}}
    loaded = checkpoint.load_model(folder_of(tmp_path / "intact", state, settings), CPU).model
    assert torch.equal(loaded(x0, torch.ones(16)), model.eval()(x0, torch.ones(16))) and capsys.readouterr().err == ""
    checkpoint.load_model(folder_of(tmp_path / "shuffled", shuffled(state), settings), CPU)
    assert "look wrong or untrained" in capsys.readouterr().err


def test_warning(tmp_path, capsys):
    """Random weights are warned of, numbers that are none are refused; our own checkpoints are not looked at."""
    folder = folder_of(tmp_path / "x", ddit_state(), SEDD)
    checkpoint.load_model(folder, CPU)
    assert "look wrong or untrained" in capsys.readouterr().err
    state = ddit_state()
    state["blocks.0.mlp.0.bias"].fill_(1e30)
    state["blocks.0.mlp.2.weight"].fill_(1e30)
    with pytest.raises(UserError, match="not finite"):
        checkpoint.load_model(folder_of(tmp_path / "y", state, SEDD), CPU)


# ---- read and exported as ours ---------------------------------------------------------------------------------------


def test_a_foreign_checkpoint_is_exported(call, tmp_path):
    folder = folder_of(tmp_path / "x", ddit_state(), SEDD)
    assert call("checkpoint.py", "export", folder, tmp_path / "ours").code == 0
    one, two = (checkpoint.load_model(path, CPU) for path in (folder, tmp_path / "ours"))
    assert one.config == two.config
    for a, b in zip(one.model.parameters(), two.model.parameters()):
        assert torch.equal(a, b)
    assert "Nothing was measured yet" in (tmp_path / "ours" / "README.md").read_text()


def test_new_settings_of_old_checkpoints():
    """A checkpoint from before these settings existed is read with their defaults: a tied head, masks, no biases."""
    new = dict(noise="mask", tied=True, head_bias=False, norm_bias=False, scale_by_sigma=True)
    old = {key: value for key, value in dataclasses.asdict(small()).items() if key not in new}
    config = storage.config_of({"config": old})
    assert {key: getattr(config, key) for key in new} == new and config.n_embd == small().n_embd
    for name in ("sedd_text8", "udlm_text8", "sedd_openwebtext_8gpu"):
        assert replace(CONFIGS[name](), n_layer=1).conditioning == "sigma"
