"""Mixers of tokens, against loops over tokens and channels; what they do to order, shorter texts and masks."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import storage
from commands import (STEADY, assert_one_line, assert_resumes_exactly, assert_same_training, finish_well, losses,
                      start, train)
from configs import Config, replace
from cli import UserError
from mixers import MAPPED, MIXERS, TINY, Map, layers, std_of
from model import places
from networks import small
from studies import mixers as study
from studies import runs

D, L, H = 12, 6, 2
CFG = Config(architecture="mixers", n_layer=2, n_head=H, n_embd=D, n_cond=8, seq_len=L, conditioning="none",
             objective="mdlm")


def gelu(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(row):
    top = max(row)
    total = sum(math.exp(value - top) for value in row)
    return [math.exp(value - top) / total for value in row]


def shape(name, n_head=H, kind="full", **settings):
    """The Config of layers with the mixer of this name."""
    return small(architecture="mixers", mixer=name, seq_len=L, n_embd=D, n_head=n_head, static_map=kind, **settings)


def one_layer(name, kind="full", n_head=H):
    """The layer that mixes tokens, with weights of a size at which everything matters, in float64."""
    layer = layers(shape(name, n_head, kind))[0]
    if name in ("gmlp", "amlp"):
        layer.norm = torch.nn.LayerNorm(3 * D)  # as ours, but not only in float32
    layer.double()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * (0.5 if p.dim() else 1))
    return layer


def matrix(table, head, i, j):
    """Entry (i, j) of a static map: full, or by distance."""
    return (table.weight[head, i, j] if table.kind == "full" else table.weight[head, i - j + table.L - 1]).item()


def naive(name, layer, x, known):
    """Compute the formula in the docstring of mixers.py by loops: x (n, D), known (n,) bool or None -> (n, D)."""
    n, heads = len(x), layer.n_head
    linear = lambda part, row: (part.weight @ row + (0 if part.bias is None else part.bias))
    seen = [True] * n if known is None else known.tolist()
    scale = 1 if known is None else n / max(1, sum(seen))
    out = torch.zeros(n, 3 * D if name in ("gmlp", "amlp") else D, dtype=torch.float64)
    d = out.shape[1] // heads

    def rotated(row, i):
        half = d // 2
        turned = row.clone()
        for c in range(half):
            angle = i / 10000 ** (2 * c / d)
            a, b = row[c].item(), row[half + c].item()
            turned[c], turned[half + c] = (a * math.cos(angle) - b * math.sin(angle),
                                           b * math.cos(angle) + a * math.sin(angle))
        return turned

    def dynamic(head):
        qkv = [linear(layer.qkv, row).view(3, heads, d)[:, head] for row in x]
        q, k = ([rotated(row[part], i) for i, row in enumerate(qkv)] for part in (0, 1))
        return [softmax([(q[i] @ k[j]).item() / math.sqrt(d) for j in range(n)]) for i in range(n)], [
            row[2] for row in qkv]

    def masked_softmax(rows):
        if not any(seen):
            return [[0] * n] * n
        return [softmax([value if s else -math.inf for value, s in zip(row, seen)]) for row in rows]

    if name in ("gmlp", "amlp"):
        hidden = [[gelu(value.item()) for value in linear(layer.inner, row)] for row in x]
        u, v = torch.tensor(hidden, dtype=torch.float64).chunk(2, 1)
        v = F.layer_norm(v, (3 * D,), layer.norm.weight, layer.norm.bias)
        extra = torch.zeros(n, 3 * D, dtype=torch.float64)
        if name == "amlp":
            qkv = [linear(layer.tiny, row).view(3, TINY) for row in x]
            for i in range(n):
                share = softmax([(qkv[i][0] @ qkv[j][1]).item() / math.sqrt(TINY) for j in range(n)])
                extra[i] = linear(layer.tiny_out, sum(share[j] * qkv[j][2] for j in range(n)))
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        if name in ("gmlp", "amlp"):
            for i in range(n):
                out[i, part] = u[i, part] * (layer.bias.view(heads, L)[head, i] + extra[i, part] + sum(
                    matrix(layer.map, head, i, j) * scale * v[j, part] for j in range(n) if seen[j]))
        elif name == "mixer":
            rows = [[sum(matrix(layer.inner, head, i, j) * scale * x[j, head * d + c].item()
                         for j in range(n) if seen[j]) for c in range(d)] for i in range(n)]
            for i in range(n):
                for c in range(d):
                    out[i, head * d + c] = sum(matrix(layer.out, head, i, j) * gelu(rows[j][c]) for j in range(n))
        elif name.startswith("synth_"):
            if name == "synth_random":
                weights = [[matrix(layer.map, head, i, j) for j in range(n)] for i in range(n)]
            elif name == "synth_factorised":
                weights = [[(layer.rows[head, i] @ layer.columns[head, j]).item() for j in range(n)] for i in range(n)]
            else:
                weights = [(F.relu(row[part] @ layer.inner[head]) @ layer.outer[head])[:n].tolist() for row in x]
            for i, share in enumerate(masked_softmax(weights)):
                out[i, part] = sum(share[j] * linear(layer.value, x[j])[part] for j in range(n))
        else:
            shares, v = dynamic(head)
            for i in range(n):
                y = sum(shares[i][j] * v[j] for j in range(n))
                if name == "container":
                    y = layer.dynamic[head] * y + layer.static[head] * sum(
                        (matrix(layer.map, head, i, j) * scale * v[j] for j in range(n) if seen[j]),
                        torch.zeros(d, dtype=torch.float64))
                if name == "container_conv":
                    share = torch.sigmoid(layer.share[head])
                    y = (1 - share) * y + share * sum(
                        (layer.taps[part, 0, tap] * v[i + tap - 2] for tap in range(5)
                         if 0 <= i + tap - 2 < n and seen[i + tap - 2]), torch.zeros(d, dtype=torch.float64))
                out[i, part] = y
    return out if name == "mixer" else torch.stack([linear(layer.out, row) for row in out])


CASES = [(name, kind) for name in MIXERS for kind in ("full", "toeplitz") if kind == "full" or name in MAPPED]


@pytest.mark.parametrize("name, kind", CASES)
@torch.no_grad()
def test_against_loops(name, kind):
    """At the trained length and shorter, with one head and two, with all tokens known, some, and none."""
    for n_head in (1, 2):
        layer = one_layer(name, kind, n_head)
        for n in (L, 4):
            x = torch.randn(3, n, D, dtype=torch.float64)
            known = torch.rand(3, n) < 0.6
            known[2] = False
            for given in [None] if name == "attention" else [None, known]:
                found = layer(x, given)
                for b in range(3):
                    expected = naive(name, layer, x[b], None if given is None else given[b])
                    torch.testing.assert_close(found[b], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name, kind", CASES)
def test_gradients(name, kind):
    """Against finite differences, for the input and all weights."""
    layer = one_layer(name, kind)
    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    known = torch.tensor([[True, False, True, True], [False] * 4]) if name != "attention" else None
    names, weights = zip(*layer.named_parameters())
    project = torch.randn(2, 4, D, dtype=torch.float64)

    def value(x, *weights):
        return (torch.func.functional_call(layer, dict(zip(names, weights)), (x, known)) * project).sum()

    found = torch.autograd.grad(value(x, *weights), (x, *weights))
    for i, (tensor, gradient) in enumerate(zip((x, *weights), found)):
        direction = torch.randn_like(tensor)
        moved = [[t + step * direction if i == k else t for k, t in enumerate((x, *weights))] for step in (1e-5, -1e-5)]
        with torch.no_grad():
            slope = (value(*moved[0]) - value(*moved[1])) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("conditioning", ["none", "time"])
@pytest.mark.parametrize("name", MIXERS)
def test_identity_at_first(name, conditioning):
    """A block is the identity before training with residual=zero and rezero, and not with plain."""
    x = torch.randn(2, L, D)
    for residual in ("zero", "rezero", "plain"):
        net = replace(CFG, mixer=name, residual=residual, conditioning=conditioning).make_model(5)
        c = None if net.time_embed is None else net.time_embed(torch.rand(2))
        y = net.blocks[0](x, c, None)
        assert torch.equal(y, x) == (residual != "plain")


def test_first_weights_of_maps():
    torch.manual_seed(0)
    for init, std in (("0.5", 0.5), ("2/L", 2 / 40), ("0", 0)):
        table = Map(3, 40, "full", init)
        table.init_weights()
        assert table.weight.std().item() == pytest.approx(std, rel=0.05) and std_of(init, 40) == pytest.approx(std)
    table = Map(2, 8, "full", "orthogonal")
    table.init_weights()
    torch.testing.assert_close(table.weight @ table.weight.mT, torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0)
    gate = layers(shape("gmlp"))[0]
    assert (gate.bias == 1).all() and layers(shape("gmlp", gate_bias=0.0))[0].bias.abs().max() == 0


@pytest.mark.parametrize("width, expected", [
    ((256, 128, 4), [986, 855, 759, 857, 921, 904, 1052, 988]), ((384, 256, 6), [2069, 2266, 1876, 2023, 2168, 1897,
                                                                                 2463, 2071]),
    ((768, 256, 12), [7678, 6891, 6406, 6701, 7284, 6744, 8464, 7682])])
def test_number_of_parameters(width, expected):
    """Parameters of a block with time conditioning of 128, in thousands."""
    names = ["attention", "mixer", "gmlp", "amlp", "synth_random", "synth_dense", "container", "container_conv"]
    for name, thousands in zip(names, expected):
        D, L, H = width
        with torch.device("meta"):
            net = replace(CFG, mixer=name, n_layer=1, n_embd=D, seq_len=L, n_head=H, n_cond=128,
                          conditioning="time").make_model(27)
        assert abs(sum(p.numel() for p in net.blocks.parameters()) / 1000 - thousands) < 1, name


@pytest.mark.parametrize("name", MIXERS)
def test_network(name):
    """where picks, recomputation changes nothing, every parameter learns, and masked tokens are left out if asked."""
    aware = name != "attention"
    torch.manual_seed(0)
    cfg = replace(CFG, mixer=name, conditioning="time", mask_aware=aware, shift_tokens=True)
    net = cfg.make_model(5).train()
    storage.load_weights(net, {key: p + 0.3 * torch.randn_like(p) for key, p in net.named_parameters()})
    xt, t, where = torch.randint(6, (3, L)), torch.rand(3), torch.rand(3, L) < 0.5
    for positions in (where, places(where)):
        torch.testing.assert_close(net(xt, t, positions), net(xt, t)[where])
    gradients = []
    for recompute in (False, True):
        net.checkpoint_blocks = recompute
        net.zero_grad()
        F.cross_entropy(net(xt, t).flatten(0, 1), xt.clamp(max=4).flatten()).backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)
    assert all(p.grad.abs().max() > 0 for p in net.parameters())
    torch._dynamo.reset()  # its limit of compilations is for all networks of a process together
    expected, net.trunk = net(xt, t, where), torch.compile(net.trunk, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(net(xt, t, where), expected)
    assert len(net.matrices()) >= 2 and net.flops(L, 0.5) < net.flops(L, 1.0)
    if aware and name not in ("amlp", "container", "container_conv"):  # these attend to masks, too
        net = replace(cfg, shift_tokens=False).make_model(5).eval()
        storage.load_weights(net, {key: p + 0.3 * torch.randn_like(p) for key, p in net.named_parameters()})
        xt = torch.tensor([[0, 5, 1, 5, 2, 3]])
        with torch.no_grad():
            before = net(xt, t[:1])
            net.embed.weight[5] += torch.randn(D)
            moved = net(xt, t[:1]) - before
        assert moved[xt != 5].abs().max() < 1e-5 < moved[xt == 5].abs().max()


@pytest.mark.parametrize("name", ["gmlp", "synth_dense"])
def test_a_run(name, call, data_dir, tmp_path, monkeypatch):
    """Train with Muon, resume to the bit, score, sample a shorter text, export."""
    flags = ["--architecture=mixers", f"--mixer={name}", "--mask_aware", "--optimizer=muon", "--max_steps=8",
             "--conditioning=none", "--lr=3e-3", "--dropout=0.1"]
    one, _ = assert_resumes_exactly(call, monkeypatch, "mdlm_text8", data_dir, tmp_path, flags)
    assert losses(one)[-1] < losses(one)[0]
    assert call("evaluate.py", one, "--check", "--split=train", "--n_tokens=2000", "--repeats=5").code == 0
    assert call("checkpoint.py", "export", one, tmp_path / "shared").code == 0
    assert len(call("sample.py", tmp_path / "shared", "--length=10", "--steps=4").out) == 11
    assert call("bench.py", "mdlm_text8", *flags[:3], *flags[-3:], "--estimate").code == 0


@pytest.mark.parametrize("name", ["gmlp", "container"])
def test_two_processes(name, call, data_dir, tmp_path):
    """They train as one does: maps, gates and weights of heads are averaged, too."""
    flags = ["--architecture=mixers", f"--mixer={name}", "--residual=rezero", "--mask_aware", *STEADY]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "one", *flags).code == 0
    finish_well(start("mdlm_text8", data_dir, tmp_path / "two", *flags, n=2))
    assert_same_training(tmp_path / "one", tmp_path / "two")


def test_what_they_cannot_do(call, data_dir, tmp_path):
    go = lambda *flags: train(call, "mdlm_text8", data_dir, tmp_path / "no", "--architecture=mixers", *flags)
    for flags, words in ((["--objective=ar", "--time_sampling=uniform"], "reads whole texts"),
                         (["--predict_next"], "reads whole texts"), (["--mask_aware"], "mask_aware is for"),
                         (["--static_map=toeplitz"], "static maps"),
                         (["--mixer=gmlp", "--map_init=1/M"], "map_init='1/M' is not valid"),
                         (["--mixer=gmlp", "--map_init=orthogonal", "--static_map=toeplitz"], "is for static_map=full"),
                         (["--mixer=synth_dense", "--map_init=0.1"], "map_init is for"),
                         (["--gate_bias=0.5"], "gate_bias is for mixer=gmlp and amlp"),
                         (["--objective=block", "--block_size=8"], "reads whole texts")):
        assert_one_line(go(*flags), words)
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", "--mixer=gmlp"),
                    "mixer needs architecture=mixers")
    assert_one_line(go("--head_gates"), "head_gates needs architecture=dit")
    with pytest.raises(UserError, match="reads whole texts"):
        replace(CFG, fsdp=True)


# ---- the study -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", study.TABLES)
def test_study(table, data_dir, tmp_path, monkeypatch):
    """The rows of each table are settings that exist; with recorded answers, the best learning rate is found."""
    for row in study.TABLES[table]():
        assert study.replace(study.configs.mdlm_mini_fast(), **study.BASE | row.settings).architecture == "mixers"
    calls = []

    def answer(script, *arguments):
        words = [script, *map(str, arguments)]
        calls.append(words)
        if script == "train.py":
            out = study.Path(next(w for w in words if w.startswith("--out_dir=")).removeprefix("--out_dir="))
            out.mkdir()
            lines = [{"step": 0, "run": "x", "optimizer_bytes": 8, "config": {"seq_len": 128}},
                     {"step": 50, "tokens": 100, "bits_per_token": 4.0},
                     {"step": 50, "val_bits_per_token": 2.5 if "--lr=0.003" in words else 3.0}]
            (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            if "--lr=0.01" in words and "--seed=2" in words:
                raise UserError("the weights are not finite after step 7")
            return ""
        if "--curve" in words:
            return json.dumps({"mask_rate": [0.1, 1.0], "bits_per_token": [1.0, 4.0]})
        return json.dumps({"bits_per_token": 2.5 if "lr=0.003" in words[1] else 3.0})

    monkeypatch.setattr(runs, "call", answer)
    monkeypatch.setattr(study, "costs_of", lambda rows: {row.name: (1000, 5) for row in rows})
    monkeypatch.setattr(sys, "argv", ["mixers.py", str(tmp_path / "study"), "--table", table, "--seeds", "2",
                                      "--dataset=tiny", f"--data_dir={data_dir}"])
    study.main()
    rows = json.loads((tmp_path / "study" / f"{table}.json").read_text())["rows"]
    assert len(rows) == len(study.TABLES[table]()) and all(row["ms"] == 1000 for row in rows)
    for row in rows:
        if "0.003" in row["by_lr"]:
            assert row["lr"] == 3e-3 and row["bits"] == 2.5
        if "0.01" in row["by_lr"]:
            assert row["by_lr"]["0.01"] is None and row["failed"] > 0
    before = len(calls)
    study.main()
    assert len(calls) == before


@pytest.mark.parametrize("mixer", ["gmlp", "mixer", "synth_dense"])
def test_operations(mixer):
    """The formula equals torch's count, if the logits of a few tokens are asked for."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Config(architecture="mixers", mixer=mixer, n_layer=2, n_head=2, n_embd=64, seq_len=32, conditioning="none",
                 objective="mdlm")
    model = cfg.make_model(11)
    where = torch.zeros(4, 32, dtype=torch.bool)
    where[:, :8] = True
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(4, 32, dtype=torch.long), torch.ones(4), where).sum().backward()
    assert counter.get_total_flops() / (4 * 32) == pytest.approx(model.flops(32, 0.25), rel=0.03)


def test_costs():
    """A step takes time, and a mixer's activations are those of its step: gMLP has more of them than MLP-Mixer."""
    found = study.costs_of([study.Row(name, {"mixer": name, "n_layer": 1}) for name in ("mixer", "gmlp")], repeats=1)
    assert all(ms > 0 for ms, _ in found.values()) and found["gmlp"][1] > found["mixer"][1] > 1


def test_matched_width():
    """A row that is called matched has as many parameters as attention, within 6 %; the widths are multiples of 8."""
    aim = study.n_params({"mixer": "attention"})
    matched = [row for row in study.mixer_rows() if "matched" in row.name]
    assert len(matched) > 5
    for row in matched:
        assert abs(study.n_params(row.settings) / aim - 1) < 0.06, row
