"""Foreign checkpoints as files, and our own, exported and read again.

Of foreign ones: where they are found, what is refused, the Hub's cache, unknown families, weights that look wrong.
"""

import collections
import dataclasses
import io
import json
import math
import os
import pickle
import random
import shlex
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import checkpoint
import storage
from cli import UserError
from commands import ROOT, assert_one_line, train
from configs import CONFIGS, from_command_line, replace
from data.loader import SPLITS
from data.tokenizer import KNOWN, CharTokenizer, make_tokenizer
from diffusion import MDLM
from export import last_validation, training_commands
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
    ("sedd", SEDD | {"graph": {"type": "uniform"},
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
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_detected(tmp_path, name, settings, state, expected, weights):
    """The format follows from tensors and settings, sizes from the tensors; the folder, the file in it, and forced."""
    folder = folder_of(tmp_path / "x", state, settings, weights)
    for path, hints in ((folder, storage.Hints()), (folder / weights, storage.Hints()),
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
    with pytest.raises(UserError, match="nor one of another project"):
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
    refused("has the unknown algorithm 'gidd'", {"model_type": "gidd"})
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
    assert_one_line(call("sample.py", folder_of(tmp_path / "whole", whole, SEDD)), "not tensors of real numbers")
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
    folder = folder_of(tmp_path / "x", ddit_state(), None)
    for name, content in (("config.json", "{"), ("config.json", "[]"), ("config.yaml", "a: [")):
        (folder / name).write_text(content)
        assert_one_line(call("sample.py", folder), name)
        (folder / name).unlink()
    assert_one_line(call("sample.py", folder, "--format", "gidd"), "invalid choice")
    assert_one_line(call("sample.py", folder, "--format", "nanodd"), "looks like a checkpoint of nanodd but lacks")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


def offline(cache, *command):
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment,
                          cwd=ROOT)


def cached(cache, name, commit="abc123"):
    """The folder of a repository in a cache of the Hub's layout."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return root / "snapshots" / commit


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


def shuffled(weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
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


# ---- our own, shared -------------------------------------------------------------------------------------------------


def test_export(call, trained, data_dir, tmp_path, monkeypatch):
    """The folder samples and scores as the checkpoint does, carries its numbers, and says if it was damaged."""
    result = call("evaluate.py", trained, "--json")
    (tmp_path / "result.json").write_text(result.out)
    folder = tmp_path / "shared"
    assert call("checkpoint.py", "export", trained, folder, "--results", tmp_path / "result.json").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = json.loads(call("evaluate.py", folder, "--json", "--data_dir", data_dir).out)
    assert again["bits_per_token"] == json.loads(result.out)["bits_per_token"]
    assert call("sample.py", folder, "--seed=3").out == call("sample.py", trained, "--seed=3").out
    card = (folder / "README.md").read_text()
    assert f"{again['bits_per_token']:.4f} ± {again['stderr']:.4f}" in card and "python sample.py shared" in card
    assert "validation during training, step 60" in card and "mdlm_text8" in card
    assert f"| {json.loads(result.out)['bits_per_char']:.4f} | tiny val, " in card
    prepare, train_again = card.split("```sh\n")[2].split("\n```")[0].splitlines()
    assert prepare == "python data/prepare_textfile.py FILE --name tiny --alphabet text8"
    config = json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(sys, "argv", shlex.split(train_again)[1:])
    again = dataclasses.asdict(from_command_line("train.py", "", lambda p: None)[1])
    assert {key: again[key] for key in config["config"]} == config["config"] and again["max_steps"] == 60
    assert config["meta"]["alphabet"] == KNOWN["text8"]["alphabet"] and "/" not in json.dumps(config["config"])
    ascii_only = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, ROOT / "checkpoint.py", "export", trained, tmp_path / "c"], env=ascii_only,
                   check=True)
    assert "±" in (tmp_path / "c" / "README.md").read_text(encoding="utf-8")
    half = tmp_path / "half"
    assert call("checkpoint.py", "export", trained, half, "--dtype=float16").code == 0
    size = lambda path: (path / "model.safetensors").stat().st_size
    assert size(half) < 0.55 * size(folder)
    of_half = json.loads(call("evaluate.py", half, "--json", "--data_dir", data_dir, "--dtype=float32").out)
    assert of_half["bits_per_token"] == pytest.approx(json.loads(result.out)["bits_per_token"], abs=0.01)
    assert_one_line(call("checkpoint.py", "export", trained, folder), "already exists")
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", folder / "config.json"),
                    "is not the output of `evaluate.py")
    (tmp_path / "other.json").write_text(call("evaluate.py", trained, "--json", "--raw").out)
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", tmp_path / "other.json"),
                    "has the score of other weights", "step 60, raw")
    assert_one_line(call("checkpoint.py", "export", trained, tmp_path / "z", "--results", tmp_path / "none.json"),
                    "cannot read", "No such file")
    assert_one_line(call("checkpoint.py", "export", tmp_path / "nothing", tmp_path / "z"), "no checkpoint at")
    assert not (tmp_path / "z").exists() and not list(tmp_path.glob(".*.tmp"))
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert_one_line(call("sample.py", folder), "do not match the SHA-256")


def test_a_card_of_several_workers_has_no_commands(call, trained, tmp_path):
    """How many there were is not known, so the commands would train another model."""
    folder = tmp_path / "two words"
    assert "`python sample.py '" in call("checkpoint.py", "export", trained, folder).err
    card, text = json.loads((folder / "config.json").read_text()), (folder / "README.md").read_text()
    assert "python sample.py 'two words'" in text and len(training_commands(card)) == 2
    card["config"]["local_steps"] = 4
    assert training_commands(card) == []


def test_a_card_names_the_weights_that_training_began_with(call, trained, data_dir, tmp_path):
    """Without them the commands would train another model. A resumed run, and its folder, still know them."""
    tune = ["mdlm_text8", data_dir, tmp_path / "tuned", "--shift_tokens", "--max_steps=4", "--checkpoint_interval=2"]
    assert train(call, *tune, f"--init_from={trained}").code == 0
    (tmp_path / "tuned" / "ckpt.pt").unlink()  # so that the run goes on at step 2
    assert train(call, *tune, "--resume=auto").code == 0
    assert call("checkpoint.py", "export", tmp_path / "tuned", tmp_path / "a").code == 0
    assert call("checkpoint.py", "export", tmp_path / "a", tmp_path / "b").code == 0  # from a folder, too
    text = (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert f"began with the weights of `{trained}`" in text and "from nothing" not in text
    assert text.count(f"--init_from {trained}") == 1 and "python train.py mdlm_text8" in text


def test_a_card_has_its_own_validation(tmp_path):
    """That of the step of the weights, or the last one before: later ones are of other weights."""
    lines = [{"step": step, "val_bits_per_token": 4 - step / 100, "val_stderr": 0.1} for step in (20, 40, 60)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"step": 0}, *lines]))
    found = [last_validation(tmp_path / "ckpt_best.pt", step) for step in (10, 20, 50, 60)]
    assert found == [None, (3.8, 0.1, 20), (3.6, 0.1, 40), (3.4, 0.1, 60)]


def test_nothing_is_written_over(call, trained, tmp_path):
    """Samples do not replace weights or settings; export leaves alone what it did not make; a damaged config.json is
    one line."""
    folder = tmp_path / "shared"
    (tmp_path / ".shared.tmp").mkdir()
    (tmp_path / ".shared.tmp" / "precious").write_text("x")
    assert call("checkpoint.py", "export", trained, folder).code == 0
    assert (tmp_path / ".shared.tmp" / "precious").exists()
    for name in ("model.safetensors", "config.json"):
        assert_one_line(call("sample.py", folder, "--out", folder / name), "part of the checkpoint")
    assert_one_line(call("sample.py", trained, "--html", trained / "ckpt.pt"), "must end in .html")
    assert call("sample.py", folder, "--steps=2", "--out", folder / "samples.txt").code == 0
    text = (folder / "config.json").read_text()
    card = json.loads(text)
    for changes in ({"config": 5}, {"config": None}, {"config": card["config"] | {"n_layer": "2"}}, {"meta": []},
                    {"config": card["config"] | {"n_layer": 2.5}}, {"config": card["config"] | {"schedule": []}},
                    {"config": card["config"] | {"prefix": 5}}, {"meta": card["meta"] | {"alphabet": "ab"}},
                    {"meta": card["meta"] | {"vocab_size": "27"}}, {"weights_sha256": "x"}):
        (folder / "config.json").write_text(json.dumps(card | changes))
        assert_one_line(call("sample.py", folder))
    (folder / "config.json").write_text(text)
    assert call("sample.py", folder, "--steps=2").code == 0
    assert_one_line(call("sample.py", trained, "--dataset=tiny"), "already names its data set")


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
