"""What a checkpoint of ours may hold: whole files, with the right hash and a field that train.py would not write."""

import json
import math
import os
import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import checkpoint
import costs
import parallel
import storage
from checkpoint import states
from cli import UserError, memory_of
from commands import assert_one_line, train
from configs import CONFIGS, Config, replace
from conftest import ROOT, TRAINED
from optim import make_optimizers
from studies import forecast

NEVER = object()  # the change of a field that is left out
CPU = torch.device("cpu")


def changed(trained, out, **fields):
    """A copy of a run's checkpoint in a new folder, with other fields, or without those that are NEVER here."""
    payload = storage.read(trained)
    payload |= {name: change(payload[name]) if callable(change) else change for name, change in fields.items()}
    out.mkdir()
    storage.save(out / "ckpt.pt", {name: value for name, value in payload.items() if value is not NEVER})
    return out


def test_compiled_commands(call, trained, data_dir, monkeypatch):
    """--compile changes neither a score nor a sample. Two graphs suffice: the second fits any number of texts."""
    torch._dynamo.reset()
    graphs, plain = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: plain(
        function, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph))
    for command in (["evaluate.py", trained, "--data_dir", data_dir], ["sample.py", trained, "--batch_size=3"]):
        one, two = call(*command, "--json"), call(*command, "--json", "--compile")
        assert one.code == two.code == 0 and "compiling" in two.err, two.err
        one, two = json.loads(one.out), json.loads(two.out)
        differ = {key for key in one if one[key] != two[key]}
        assert differ <= {"seconds", "tokens_per_second"} and len(graphs) in (1, 2)
        graphs.clear()


def first(change):
    """Change the first tensor of {name: tensor}."""
    def apply(weights):
        name = next(iter(weights))
        return weights | {name: change(weights[name])}
    return apply


def moments(change):
    """Change what is kept of the first parameter."""
    return first(lambda entries: change(dict(entries)))


SHARED = [  # field, change, words: seen by train, evaluate and sample
    ("config", [], "'config' is not a set of settings"), ("config", {1: 2}, "'config' is not a set of settings"),
    ("config", {"n_layer": "2"}, "n_layer='2' must be of type int"),
    ("config", {"depth": 2}, "unknown to this version"),
    ("config", {"n_layer": 10**9}, "n_layer=1,000,000,000 is above the limit of 1,000"),
    ("meta", [], "'meta' is not a description"), ("meta", {}, "'meta' is not a description"),
    ("meta", {"tokenizer": "char", "alphabet": "ab", "vocab_size": True}, "'meta' is not a description"),
    ("meta", {"tokenizer": "char", "alphabet": "aa", "vocab_size": 2}, "'meta' is not a description"),
    ("meta", {"tokenizer": "gpt2", "vocab_size": 27}, "'meta' is not a description"),
    ("meta", lambda meta: meta | {"pad": "!"}, "'meta' is not a description"),
    ("model", None, "'model' is not tensors"), ("model", {}, "'model' is not tensors"),
    ("ema", [], "'ema' is not tensors"),
    ("ema", first(lambda w: w.long()), "'ema' is not tensors of real numbers"),
    ("ema", first(lambda w: w > 0), "'ema' is not tensors of real numbers"),
    ("ema", first(lambda w: w + 0j), "'ema' is not tensors of real numbers"),
    ("ema", first(lambda w: w.tolist()), "'ema' is not tensors of real numbers"),
    ("step", -3, "'step' is not an integer of at least 0"), ("step", True, "'step' is not an integer of at least 0"),
    ("step", 3.0, "'step' is not an integer of at least 0"), ("step", 2**70, "'step' is not an integer of at least 0"),
    ("step", NEVER, "lacks step"), ("name", 5, "'name' is not text"), ("best_val", "low", "'best_val' is not a number"),
    ("best_val", math.nan, "'best_val' is not a number"), ("tally", [0] * 5, "'tally' is not a tensor of five numbers"),
    ("tally", torch.zeros(4), "'tally'"), ("tally", torch.full((5,), math.nan), "'tally'"),
    ("wandb_id", 7, "'wandb_id'"), ("name", "x\udcff", "'name' is not text"),
    ("meta", lambda meta: meta | {"more": torch.zeros(2)}, "'meta' is not a description"),
    ("meta", lambda meta: meta | {"record": 10**9}, "'meta' is not a description"),
    ("meta", {"tokenizer": "gpt2", "vocab_size": 10**30}, "'meta' is not a description"),
    ("ema", first(lambda w: w.to(torch.float8_e5m2)), "'ema' is not tensors of real numbers"),
    ("ema", lambda weights: {"x\udcff": torch.zeros(2)}, "'ema' is not tensors of real numbers"),
    ("tally", torch.zeros(5).to(torch.float8_e5m2), "'tally'"),
    ("optimizer", lambda state: state | {5: {}}, "'optimizer' is not tensors"),
    ("optimizer", [1], "'optimizer' is not tensors"), ("optimizer", {"embed.weight": 3}, "'optimizer' is not tensors"),
    ("optimizer", moments(lambda m: m | {"exp_avg": m["exp_avg"].int()}), "'optimizer' is not tensors"),
]


@pytest.mark.parametrize("field, change, words", SHARED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_wrong_field_is_named(call, trained, data_dir, tmp_path, field, change, words):
    """One line that names the field, exit code 2, from every command that reads the file, and nothing is written."""
    if field == "config" and isinstance(change, dict):
        settings = change
        change = lambda config: config | settings
    out = changed(trained, tmp_path / "out", **{field: change})
    assert_one_line(call("sample.py", out), words)
    assert_one_line(call("evaluate.py", out, "--data_dir", data_dir), words)
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "new", "--max_steps=2", f"--init_from={out}"),
                    words)
    assert_one_line(train(call, "mdlm_text8", data_dir, out, *TRAINED, "--resume=auto"), words)
    assert not (tmp_path / "new").exists() and {path.name for path in out.iterdir()} <= {"ckpt.pt", ".lock"}


@pytest.mark.parametrize("change, words", [
    (lambda state: {}, "(first difference: blocks.0.attn_out.weight"),
    (lambda state: state | {"more": {}}, "(first difference: more"),
    (moments(lambda m: {"exp_avg": m["exp_avg"]}), "(first difference: embed.weight"),
    (moments(lambda m: m | {"momentum": m["exp_avg"]}), "(first difference: embed.weight"),
    (moments(lambda m: {"momentum": m["exp_avg"]}), "(first difference: embed.weight"),
    (moments(lambda m: m | {"exp_avg": m["exp_avg"][:1]}), "(first difference: embed.weight"),
    (moments(lambda m: m | {"step": m["exp_avg"]}), "(first difference: embed.weight")])
def test_optimiser_state_that_does_not_fit(call, trained, data_dir, tmp_path, change, words):
    """Moments of other parameters, of other shapes or of another optimiser, before training begins."""
    out = changed(trained, tmp_path / "out", optimizer=change)
    assert_one_line(train(call, "mdlm_text8", data_dir, out, *TRAINED, "--resume=auto"), "'optimizer'", words)
    assert call("sample.py", out).code == 0  # which does not need it


def test_weights_that_are_no_numbers(call, trained, data_dir, tmp_path):
    """Weights to start from must be finite, as those to sample from; averages must fit the model as weights do."""
    out = changed(trained, tmp_path / "out", ema=first(lambda w: w * math.inf))
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "new", "--shift_tokens", f"--init_from={out}"),
                    "not finite numbers")
    assert_one_line(call("sample.py", out), f"the weights in {out} are not finite numbers")
    out = changed(trained, tmp_path / "other", ema=first(lambda w: w[1:]))
    assert_one_line(train(call, "mdlm_text8", data_dir, out, *TRAINED, "--resume=auto"), "do not fit the model",
                    "embed.weight")


def test_weights_that_are_too_large(call, trained, data_dir, tmp_path):
    """A likelihood that is not finite is one line; a perplexity that no float holds is left out."""
    out = changed(trained, tmp_path / "infinite", ema=first(lambda w: 1e30 * w))
    assert_one_line(call("evaluate.py", out, "--json", "--data_dir", data_dir), "is not finite")
    out = changed(trained, tmp_path / "large", ema=first(lambda w: 3000 * w))
    result = call("evaluate.py", out, "--json", "--data_dir", data_dir)
    scored = json.loads(result.out)
    assert result.code == 0 and scored["bits_per_token"] > 1024 and scored["perplexity"] is None


def test_contents_that_cannot_be_hashed(call, trained, tmp_path):
    """Sparse tensors, tensors without data or with more numbers than are stored, a dict inside itself, and lists of one
    another are no contents of ours: damaged, in one line, at once."""
    cycle, shared = {}, [1]
    cycle["again"] = cycle
    for _ in range(40):
        shared = [shared, shared]
    for i, value in enumerate((torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), cycle, shared,
                               torch.zeros(1).expand(10**12))):
        payload = storage.read(trained) | {"format": storage.FORMAT, "sha256": "0" * 64, "extra": value}
        torch.save(payload, tmp_path / f"{i}.pt")
        assert_one_line(call("sample.py", tmp_path / f"{i}.pt"), f"{i}.pt is damaged")


def test_exported_folders_of_other_contents(call, trained, tmp_path):
    """A folder of our format whose weights are something else is damaged; a checkpoint whose average does not fit its
    config is not exported."""
    assert call("checkpoint.py", "export", trained, tmp_path / "good").code == 0
    for i, weights in enumerate(([1], None, {1: torch.zeros(2), "a": torch.zeros(2)}, {"a": torch.eye(2).to_sparse()})):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "config.json").write_bytes((tmp_path / "good" / "config.json").read_bytes())
        torch.save(weights, folder / "pytorch_model.bin")
        assert_one_line(call("sample.py", folder), "damaged" if i else "")
    card = json.loads((tmp_path / "good" / "config.json").read_text())
    del card["name"]
    (tmp_path / "good" / "config.json").write_text(json.dumps(card))
    assert_one_line(call("checkpoint.py", "export", tmp_path / "good", tmp_path / "again"), "lacks name")
    out = changed(trained, tmp_path / "other", ema=first(lambda w: w[1:]))
    assert_one_line(call("checkpoint.py", "export", out, tmp_path / "card"), "do not fit the model")
    assert not (tmp_path / "card").exists()


def test_another_version(call, trained, tmp_path):
    """A checkpoint or folder of another version says so, and is not taken for another project's."""
    payload = torch.load(trained / "ckpt.pt", weights_only=True)
    torch.save(payload | {"format": "discrete-diffusion-1"}, tmp_path / "ckpt.pt")
    assert_one_line(call("sample.py", tmp_path),
                    "by another version of this project: its format is discrete-diffusion-1")
    assert call("checkpoint.py", "export", trained, tmp_path / "card").code == 0
    text = (tmp_path / "card" / "config.json").read_text().replace("discrete-diffusion-2", "discrete-diffusion-3")
    (tmp_path / "card" / "config.json").write_text(text)
    assert_one_line(call("sample.py", tmp_path / "card"), "its format is discrete-diffusion-3")


def test_what_is_no_file(call, tmp_path):
    """Devices and pipes are refused at once, also in a folder; so is an archive that claims to hold far more than it
    has."""
    os.mkfifo(tmp_path / "pipe.pt")
    for path in ("/dev/zero", tmp_path / "pipe.pt"):
        assert_one_line(call("sample.py", path), "is a device or a pipe")
    assert_one_line(call("sample.py", tmp_path), "no checkpoint at")
    for name in ("kuleshov-group/mdlm-owt", "https://huggingface.co/kuleshov-group/mdlm-owt"):
        assert_one_line(call("sample.py", name), f"no checkpoint at {name}", "write hf://kuleshov-group/mdlm-owt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data/0", bytes(50_000_000))
    assert_one_line(call("sample.py", tmp_path / "bomb.pt"), "claims to hold 50,000,000: the file was refused")


# ---- memory is predicted before it is taken --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d3pm_shakespeare", "mdlm_mini_fast", "sedd_text8", "tiny_diffusion"])
def test_sizes_without_building(name):
    """Parameters, optimiser state and tables of a model as estimated are those of the model as built."""
    tiny = Config(architecture="tiny_diffusion", T=20) if name == "tiny_diffusion" else CONFIGS[name]()
    for n_layer in (1, 2, 5):
        cfg = replace(tiny, n_layer=n_layer, n_embd=32, n_head=2, seq_len=16)
        model = cfg.make_model(27)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers = make_optimizers(model, cfg, CPU, torch.float32)
        for optimizer in optimizers:
            optimizer.step_unless(torch.tensor(False))
        kept = sum(value.numel() for entries in states(optimizers).values() for key, value in entries.items()
                   if key != "step")  # AdamW's own count of its steps, one number
        n_params, tables = costs.count_parameters(model), sum(table.nbytes for table in model.buffers())
        assert costs.sizes(cfg, 27) == (n_params, kept, tables)
        assert costs.weight_bytes(cfg, 27) == 4 * n_params + tables


def test_what_training_takes_at_least():
    """Five numbers of a parameter with AdamW, four of a matrix with Muon, a share of them with FSDP, three more with
    local steps; then the inputs of all blocks, and the batch. Less than a step really takes, in every part."""
    cfg = Config(n_layer=3, n_embd=32, n_head=2, seq_len=16, batch_size=8, micro_batch_size=4)
    n_params, _, tables = costs.sizes(cfg, 27)
    rest = tables + 4 * 3 * 4 * 16 * 32 + 16 * 8 * 16 + 8 * 8
    assert costs.training_bytes(cfg, 27, 8, 4) == 20 * n_params + rest
    assert costs.training_bytes(cfg, 27, 8, 4, shares=4) == 5 * n_params + rest
    assert costs.training_bytes(replace(cfg, local_steps=2), 27, 8, 4) == 32 * n_params + rest
    muon = replace(cfg, optimizer="muon")
    assert costs.training_bytes(muon, 27, 8, 4) == 20 * n_params - 4 * 3 * 12 * 32**2 + rest
    assert forecast.kept_bytes(cfg, 27, 4, CPU, torch.float32) > 4 * 3 * 4 * 16 * 32


def test_more_than_the_machine_has(call, trained, data_dir, tmp_path, monkeypatch):
    """Every command refuses a model of 4 TB before it builds it, and says both numbers. Where the memory is unknown,
    nothing is refused."""
    assert 1e8 < memory_of(CPU) < 1e13
    big = ["--n_embd=9600", "--n_head=4", "--n_layer=1000"]
    costs.check_fits(memory_of(CPU), CPU, "just enough", "")
    with pytest.raises(UserError, match=r"it needs at least [\d.,]+ GB of memory, and cpu has [\d.,]+ GB: do less"):
        costs.check_fits(memory_of(CPU) + 1, CPU, "it", "do less")
    folders = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'x'}"]
    for command in (["train.py", "mdlm_text8", "--dataset=tiny", *folders], ["bench.py", "mdlm_text8", "--repeats=1"],
                    ["bench.py", "mdlm_text8", "--samplers", "--repeats=1"],
                    ["bench.py", "mdlm_text8", "--scaling", str(tmp_path / "x.png"), "--seq_len=10000000"]):
        assert_one_line(call(*command, *big), "needs at least", "GB of memory, and cpu has")
    with monkeypatch.context() as patch:
        patch.setattr(parallel, "on_this_machine", 10**7)  # processes, each of which builds the whole model
        assert_one_line(call("train.py", "mdlm_text8", "--dataset=tiny", *folders), "needs at least")
    assert not list(tmp_path.iterdir())
    out = changed(trained, tmp_path / "out", config=lambda config: config | {"n_embd": 9600, "n_layer": 1000})
    for script in ("sample.py", "evaluate.py"):
        assert_one_line(call(script, out), f"the model of {out} needs at least", "GB of memory, and cpu has")
    monkeypatch.setattr(costs, "memory_of", lambda device: None)
    costs.check_fits(1e30, CPU, "it", "do less")


@pytest.mark.parametrize("setting, value", [("n_layer", 10**9), ("n_embd", 10**12), ("T", 10**12), ("seq_len", 10**9),
                                            ("n_cond", 10**9), ("outer_lr", 1e300)])
def test_settings_have_limits(call, tmp_path, setting, value):
    """A setting that is absurdly large is refused before a model or a list of steps is built."""
    assert_one_line(call("train.py", "demo", f"--{setting}={value}", f"--out_dir={tmp_path / 'x'}"),
                    f"{setting}={value:,} is above the limit of")


def test_more_samples_than_memory(call, trained):
    """Samples that need more memory than the machine has are refused: each token takes some for its history."""
    assert_one_line(call("sample.py", trained, "--batch_size=100000", "--length=1000000", "--context=4"),
                    "--batch_size=100000 x 1,000,000 tokens needs at least", "GB")


def test_where_the_sizes_come_from(monkeypatch, capsys):
    """The sizes of a network come from the run that is resumed, or else from the checkpoint of --init_from."""
    def of(n_layer):
        return {"config": asdict(Config(architecture="nanogpt", n_layer=n_layer, objective="ar", conditioning="none"))}

    files = {"INIT": of(1), "OTHER": of(3)}
    cfg = Config(architecture="nanogpt", n_layer=9, objective="ar", conditioning="none")
    monkeypatch.setattr(checkpoint, "read", lambda path, hints=None: files[str(path)])
    for latest, resume, init, n_layer, where in ((of(2), "auto", "INIT", 2, "RUN"), (None, "auto", "INIT", 1, "INIT"),
                                                 (None, "OTHER", None, 3, "OTHER"), (None, None, "INIT", 1, "INIT")):
        monkeypatch.setattr(checkpoint, "read_latest", lambda folder: (None, latest))
        assert checkpoint.with_sizes_of_source(cfg, resume, init, Path("RUN")).n_layer == n_layer
        assert f"is that of {where}" in capsys.readouterr().err


def test_in_python(trained, capsys):
    """The lines of docs/checkpoints.md that use a model from Python."""
    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    code, = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code.replace("out/demo", str(trained)), {})
    assert re.fullmatch(r"(the [a-z ]{8} returns a list\n){2}", capsys.readouterr().out)
