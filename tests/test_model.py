"""model.py: what the network can see, and that its shortcuts change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F

import configs
import parallel
from attention import attend, attend_by_products
from costs import count_parameters
from diffusion import Noise
from model import Block, padded_linear, places, rotary_tables, token_shift
from networks import network, small


def tiny(conditioning="time", causal=False, **settings):
    """A small network with a vocabulary of 5 tokens."""
    return network(5, conditioning=conditioning, **({"objective": "ar"} if causal else {}), **settings)


def batch(B=3):
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 6, (B, 16), generator=g), torch.rand(B, generator=g)


@pytest.mark.parametrize("name", sorted(set(configs.NETWORKS) - {"masked_lm", "llm"}))  # test_masked_lm.py, test_llm.py
def test_what_a_network_has(name):
    """A network has what the README asks for: settings; logits of V tokens at all positions, or at `where` (bool or
    places); a trunk and a head for --compile; matrices and an output layer that get gradients; operations."""
    conditioning = "step" if name == "tiny_diffusion" else "none"
    model, (xt, t) = network(5, architecture=name, conditioning=conditioning), batch()
    assert {*model.own, *model.of_source} <= configs.Config.__dataclass_fields__.keys() and model.vocab_size == 5
    assert not model.large
    where = torch.rand(xt.shape) < 0.4
    logits = model(xt, t)
    assert logits.shape == (3, 16, 5)
    for chosen in (where, places(where)):
        torch.testing.assert_close(model(xt, t, where=chosen), logits[where], atol=1e-4, rtol=1e-4)
    if hasattr(model, "trunk"):
        torch.testing.assert_close(model.head(model.trunk(xt, t)), logits)
        called, trunk = [], model.trunk
        model.trunk = lambda *x, **more: called.append(1) or trunk(*x, **more)
        model(xt, t)
        assert called, "forward must call trunk, which --compile replaces"
    gradients = torch.autograd.grad(logits.square().sum(), model.parameters(), allow_unused=True)
    learns = {id(p) for p, gradient in zip(model.parameters(), gradients) if gradient is not None}
    assert learns >= {id(p) for p in model.matrices()} and learns >= {id(p) for p in model.output_layer()}
    assert all(p.dim() == 2 for p in model.matrices()) and 0 < model.flops(16, 0.5) < model.flops(16)


@pytest.mark.parametrize("conditioning, shift", [("none", True), ("none", False), ("time", True), ("step", False)])
def test_where_selects(conditioning, shift):
    """Logits at `where` are those rows of all logits, in row-major order, and so are all gradients; none of the mask.

    Times may differ by token, or be one for all.
    """
    model, (xt, t) = tiny(conditioning, shift_tokens=shift, head_gates=shift), batch()
    where = torch.rand(xt.shape) < 0.4
    for t in (t, t[:1], torch.rand(xt.shape)):
        all_logits, logits = model(xt, t), model(xt, t, where=where)
        assert all_logits.shape == (3, 16, 5)
        torch.testing.assert_close(logits, all_logits[where], atol=1e-4, rtol=1e-4)
        gradients = [torch.autograd.grad((y**2).sum(), model.parameters()) for y in (all_logits[where], logits)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
        assert torch.equal(model(xt, t, where=places(where)), logits)
        assert model(xt, t, where=torch.zeros_like(where)).shape == (0, 5)


@pytest.mark.parametrize("biased", [True, False])
def test_padded_linear(biased):
    """Outputs that are added, up to a multiple of 8, change neither the values of F.linear nor its gradients."""
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 4), (13, 4), (13,)))
    inputs = [x, weight, bias] if biased else [x, weight]
    found, expected = padded_linear(x, weight, bias if biased else None, 8), F.linear(*inputs)
    torch.testing.assert_close(found, expected)
    of = [torch.autograd.grad(y.sin().sum(), inputs) for y in (found, expected)]
    torch.testing.assert_close(*of)


def test_what_is_compiled():
    """By default runs on CUDA; else as --compile says."""
    for kind in ("cuda", "cpu"):
        found = [parallel.compiles(small(compile=value), torch.device(kind)) for value in (None, True, False)]
        assert found == [kind == "cuda", True, False]


@pytest.mark.parametrize("objective, vocab_size", [
    ("d3pm", 5), ("mdlm", 5), ("d3pm", 1000), ("mdlm", 1000), ("sedd", 1000)])
def test_compiles_in_one_graph(objective, vocab_size, monkeypatch):
    """torch.compile finds no reason to leave a graph, and needs no other one for another number of masks.

    With many tokens the head and the cost are compiled, too."""
    torch._dynamo.reset()
    plain, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or plain(
        function, fullgraph=True, backend="aot_eager"))
    settings = {"d3pm": dict(conditioning="step", lambda_ce=0.1), "mdlm": dict(head_gates=True),
                "sedd": dict(conditioning="sigma", schedule="loglinear")}
    settings = dict(objective=objective, **settings.get(objective, {}))
    model, objective = network(vocab_size, **settings), small(**settings).make_objective(vocab_size)
    x0, mask = torch.randint(vocab_size, (3, 16)), torch.rand(3, 16)
    noise = [Noise(mask < rate, torch.full((3,), rate), torch.ones(3)) for rate in (0.3, 0.5, 0.8)]
    loss = lambda: objective.loss(model, x0, noise[0])[0]
    gradients = lambda: torch.autograd.grad(loss(), list(model.parameters()))
    expected = [loss(), *(objective.masked_ce(model, x0, n) for n in noise)]
    expected_gradients = gradients()
    parallel.compile_parts(model, objective)
    assert len(calls) == (4 if vocab_size >= 1000 else 1)
    torch.testing.assert_close(gradients(), expected_gradients, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # as in validation
        found = [loss(), objective.masked_ce(model, x0, noise[0])]
    torch.testing.assert_close(found, expected[:2], rtol=1e-4, atol=1e-4)
    used, cost = [], objective.cost
    objective.cost = lambda *inputs: used.append(1) or cost(*inputs)
    found = [objective.loss(model, x0, noise[0])[0], objective.masked_ce(model, x0, noise[0])]
    assert len(used) == 2  # the loss, too, goes through what is compiled
    torch.compiler.set_stance("fail_on_recompile")
    try:
        found += [objective.masked_ce(model, x0, n) for n in noise[1:]]
    finally:
        torch.compiler.set_stance("default")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab_size", [999, 1000])
@pytest.mark.parametrize("architecture", ["dit", "tiny_diffusion", "gpt2", "nanogpt", "mixers"])
def test_every_network_can_be_compiled(architecture, vocab_size, monkeypatch):
    """Its outputs and the names of its parameters stay the same. test_masked_lm.py has masked_lm."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or function)
    settings = dict(architecture=architecture, conditioning="step" if architecture == "tiny_diffusion" else "none",
                    predict_next=architecture in ("gpt2", "nanogpt"))
    model, (xt, t) = network(vocab_size, **settings), batch()
    names, expected = list(model.state_dict()), [model(xt, t), model(xt, t, where=xt < 3)]
    parallel.compile_parts(model, small(**settings).make_objective(vocab_size))
    assert len(calls) == (1 if vocab_size < 1000 else 2 if architecture == "tiny_diffusion" else 4)
    assert list(model.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close([model(xt, t), model(xt, t, where=xt < 3)], expected)


@pytest.mark.parametrize("shift", [False, True])
def test_a_causal_network_looks_left_only(shift):
    """With causal, a changed token changes the output there and later, never before; padding on the right is unseen."""
    model, (xt, t) = tiny(causal=True, conditioning="none", shift_tokens=shift), batch(1)
    other = xt.clone()
    other[0, 7] = (xt[0, 7] + 1) % 5
    changed = (model(xt, t) - model(other, t)).abs().amax(-1)[0] > 1e-6
    assert not changed[:7].any() and changed[7:].float().mean() > 0.5
    for length in (1, 2, 9):
        torch.testing.assert_close(model(xt[:, :length], t), model(xt, t)[:, :length])


@pytest.mark.parametrize("seen", ["all", "left", "mask", "mask per text"])
def test_attention_by_products(seen):
    """The two ways to compute attention agree, with their gradients; in bfloat16 up to some roundings."""
    L, P = 12, 0 if seen == "left" else 5
    g = torch.Generator().manual_seed(0)
    visible = {"mask": torch.rand(L, P + L, generator=g) < 0.5,
               "mask per text": torch.rand(3, 1, L, P + L, generator=g) < 0.5}.get(seen)
    if visible is not None:
        visible[..., 0] = True
    q, k, v = (torch.randn(3, 2, n, 8, generator=g, dtype=torch.double) for n in (L, P + L, P + L))
    found = []
    for function, dtype in ((attend, torch.double), (attend_by_products, torch.double), (attend, torch.bfloat16)):
        inputs = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        y = function(*inputs, visible, seen == "left")
        assert y.dtype == dtype
        found.append([y, *torch.autograd.grad(y.double().square().sum(), inputs)])
    for exact, products, rounded in zip(*found):
        torch.testing.assert_close(products, exact, atol=1e-12, rtol=1e-12)
        assert (rounded.double() - exact).norm() < 0.03 * exact.norm()


def by_the_formulas(model, xt, t, clock, n_head):
    """Logits of a DiT in float64, from its weights and the papers' formulas, without model.py: xt (B, L), t (B,).

    Layer norm (arXiv 1607.06450) with epsilon 1e-5; GELU by tanh (arXiv 1606.08415, section 2); rotary angles
    (arXiv 2104.09864, section 3.4.2) as complex numbers, i theta to the position's power, for pairs half a head apart.
    """
    w = {name: p.detach().double() for name, p in model.named_parameters()}
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    silu = lambda x: x / (1 + torch.exp(-x))
    gelu = lambda x: x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-5) * w[f"{name}.weight"]

    angle = clock(t.double())[:, None] * 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    c = linear(silu(linear(torch.cat((angle.cos(), angle.sin()), 1), "time_embed.fc_in")), "time_embed.fc_out")
    x, (B, L), c = w["embed.weight"][xt], xt.shape, silu(c)[:, None]
    half = x.shape[-1] // n_head // 2
    theta = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.exp(1j * torch.arange(L)[:, None] * theta)

    def turned(x):
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((z.real, z.imag), -1)

    for i in range(len(model.blocks)):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c, f"{name}.modulation").chunk(6, -1)
        h = norm(x, f"{name}.norm1") * (1 + scale1) + shift1
        q, k, v = (y.view(B, L, n_head, -1).transpose(1, 2) for y in linear(h, f"{name}.qkv").chunk(3, -1))
        scores = turned(q) @ turned(k).transpose(-1, -2) / math.sqrt(2 * half)
        weights = torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True)
        x = x + gate1 * linear((weights @ v).transpose(1, 2).reshape(B, L, -1), f"{name}.attn_out")
        h = norm(x, f"{name}.norm2") * (1 + scale2) + shift2
        x = x + gate2 * linear(gelu(linear(h, f"{name}.mlp_in")), f"{name}.mlp_out")
    shift, scale = linear(c, "modulation").chunk(2, -1)
    return (norm(x, "norm") * (1 + scale) + shift) @ w["embed.weight"][:-1].T


@torch.no_grad()
@pytest.mark.parametrize("small", [1.0, 0.01])
def test_the_network_by_the_formulas(small):
    """The whole network agrees with its formulas, written out in float64. Small embeddings make features whose variance
    is near the epsilon of the norms."""
    model, (xt, t) = tiny("time"), batch()
    model.embed.weight *= small
    expected = by_the_formulas(model, xt, t, lambda t: 1000 * t, n_head=2)
    error = (model(xt, t) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, error


def block_causal(L, size):
    """Visibility (L, L) of blocks of `size` tokens: a token sees its own block and those before."""
    block = torch.arange(L) // size
    return block[:, None] >= block


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["none", "time"])
def test_visibility(conditioning):
    """All visible is the network as it is; a lower triangle is the causal network; what is not visible changes nothing,
    and may differ by sequence."""
    model, (xt, t) = tiny(conditioning), batch()
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    close(model(xt, t, sees=torch.ones(16, 16, dtype=torch.bool)), model(xt, t))
    if conditioning == "none":
        close(model(xt, t, sees=torch.ones(16, 16, dtype=torch.bool).tril()), tiny("none", causal=True)(xt, t))
    seen = block_causal(16, 4)
    changed = xt.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 5
    before, after = model(xt, t, sees=seen), model(changed, t, sees=seen)
    close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(-1).min() > 1e-4
    by_sequence = torch.stack([torch.ones(16, 16, dtype=torch.bool), seen, seen.new_ones(16, 16).tril()])[:, None]
    expected = torch.stack([model(xt, t, sees=visible[0])[i] for i, visible in enumerate(by_sequence)])
    close(model(xt, t, sees=by_sequence), expected)


@torch.no_grad()
@pytest.mark.parametrize("conditioning, causal, shift", [("none", False, False), ("time", False, False),
                                                         ("none", True, False), ("none", True, True)])
def test_the_past_is_remembered(conditioning, causal, shift):
    """Block after block, with the keys and values of the blocks before, gives the logits of the whole text at once,
    under the visibility of blocks, or of a causal network; also with blocks of unequal lengths and with `where`."""
    model, (xt, t) = tiny(conditioning, causal=causal, shift_tokens=shift, head_gates=shift), batch()
    edges = [0, 4, 8, 16] if not causal else [0, 1, 2, 7, 16]
    block = torch.bucketize(torch.arange(16), torch.tensor(edges[1:-1]), right=True)
    whole = model(xt, t, sees=None if causal else block[:, None] >= block)
    where, past = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.5, None
    for a, b in zip(edges, edges[1:]):
        logits = model(xt[:, a:b], t, past=past)
        torch.testing.assert_close(logits, whole[:, a:b], atol=1e-4, rtol=1e-4)
        some = model(xt[:, a:b], t, where=where[:, a:b], past=past)
        torch.testing.assert_close(some, whole[:, a:b][where[:, a:b]], atol=1e-4, rtol=1e-4)
        if causal and not shift:  # `sees` may leave out the past
            hidden = torch.ones(b - a, b, dtype=torch.bool).tril(a) & (torch.arange(b) >= a)
            torch.testing.assert_close(model(xt[:, a:b], t, past=past, sees=hidden), model(xt[:, a:b], t), atol=1e-4,
                                       rtol=1e-4)
        again, kept = model(xt[:, a:b], t, past=past, keep=True)
        past = model.remember(xt[:, a:b], t, past=past)
        assert torch.equal(again, logits) and all(x is y is None or torch.equal(x, y)
                                                  for one, two in zip(kept, past) for x, y in zip(one, two))
        assert len(past) == 2 and past[0][0].shape == (3, 2, b, 8)
    with pytest.raises(AssertionError, match="17 tokens, but the model was built for 16"):
        model(xt[:, :1], t, past=past)
    with pytest.raises(ValueError, match="shift_tokens"):
        tiny(conditioning, shift_tokens=True)(xt[:, :1], t, past=tiny(conditioning).remember(xt[:, :1], t))


def test_token_shift():
    """A quarter of the channels moves one right, a quarter one left, zeros come in at the ends; the rest stays."""
    x = torch.arange(1, 25.0).view(1, 3, 8)
    shifted = token_shift(x)[0]
    assert (shifted[:, 0].tolist() == [0, 1, 9] and shifted[:, 2].tolist() == [11, 19, 0]
            and shifted[:, 7].tolist() == [8, 16, 24])


def test_a_block_shifts_before_attention_and_mlp():
    """What goes into both is shifted, with and without a modulation."""
    x, tables = torch.randn(2, 5, 16), rotary_tables(5, 8)
    for c in (None, torch.randn(2, 1, 8)):
        plain, shifting = (Block(small(shift_tokens=flag), 0 if c is None else 8) for flag in (False, True))
        with torch.no_grad():
            for p, q in zip(plain.parameters(), shifting.parameters()):
                q.copy_(p.normal_(std=0.3))
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            [0, 0, 1, 0, 0, 1] if c is None else plain.modulation(c).chunk(6, dim=-1))
        h = token_shift(plain.norm1(x) * (1 + scale1) + shift1)
        y = x + gate1 * plain.attention(*plain.heads(h, *tables))
        expected = y + gate2 * plain.mlp(token_shift(plain.norm2(y) * (1 + scale2) + shift2))
        torch.testing.assert_close(shifting(x, c, *tables), expected)


def test_head_gates():
    """The gate of a head is 2 sigmoid of a linear function of the first 12 channels of the block's input. It is 1 at
    first."""
    x, tables = torch.randn(2, 5, 16), rotary_tables(5, 8)
    plain, gated = (Block(small(head_gates=flag), 0) for flag in (False, True))
    gated.load_state_dict(plain.state_dict() | {"head_gate": torch.randn(2, 12)})
    with torch.no_grad():
        h = plain.norm1(x)
        each = [plain.attention(*plain.heads(h, *tables), gates=torch.eye(2)[i].expand(2, 5, 2)) for i in range(2)]
        torch.testing.assert_close(sum(each), plain.attention(*plain.heads(h, *tables)))
        gates = 2 / (1 + torch.exp(-h[..., :12] @ gated.head_gate.T))
        y = x + sum(gates[..., i:i + 1] * each[i] for i in range(2))
        torch.testing.assert_close(gated(x, None, *tables), y + plain.mlp(plain.norm2(y)))
    models = [small(head_gates=flag).make_model(5) for flag in (False, True)]
    models[1].load_state_dict(models[0].state_dict() | {
        key: value for key, value in models[1].state_dict().items() if "head_gate" in key})
    xt, t = batch()
    assert torch.equal(*(model(xt.clamp(max=4), t) for model in models))


def test_time():
    """'none' ignores t, 'time' sees it, 'step' sees it rounded to 1/T; t may differ by position."""
    xt, t = batch()
    assert torch.equal(tiny("none")(xt, t), tiny("none")(xt, t / 2))
    assert (tiny("time")(xt, t) - tiny("time")(xt, t / 2)).abs().max() > 1e-3
    step = tiny("step")
    assert torch.equal(step(xt, torch.tensor([0.1, 0.2, 0.3])), step(xt, torch.tensor([0.1049, 0.1951, 0.3])))
    assert not torch.equal(step(xt, torch.tensor([0.1, 0.2, 0.3])), step(xt, torch.tensor([0.1, 0.2, 0.4])))
    torch.testing.assert_close(tiny()(xt, t), tiny()(xt, t[:, None].expand_as(xt)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("conditioning", ["none", "step"])
def test_initial_network(conditioning):
    """At the start every block is the identity, and the prediction is nearly uniform."""
    torch.manual_seed(0)
    config = small(seq_len=8, n_layer=3, n_embd=64, conditioning=conditioning)
    model, x = config.make_model(27), torch.randn(1, 8, 64)
    c = None if conditioning == "none" else torch.randn(1, 1, 8)
    assert torch.equal(model.blocks[1](x, c, model.cos, model.sin), x)
    entropy = -(lambda p: (p * p.log()).sum(-1))(model(torch.full((1, 8), 27), torch.ones(1)).softmax(-1))
    assert entropy.min() > 0.9 * math.log(27)


def test_checkpointed_blocks_give_the_same_gradients():
    """Recomputing activations changes neither loss nor gradients."""
    xt, t = batch()
    gradients = []
    for flag in (False, True):
        model = tiny(checkpoint_blocks=flag).train()
        F.cross_entropy(model(xt, t).flatten(0, 1), xt.clamp(max=4).flatten()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", sorted(set(configs.CONFIGS) - {"roberta_wikitext"}))  # that one: test_masked_lm.py
def test_every_parameter_of_every_config_is_used(name):
    """No config builds a parameter that gets no gradient (DistributedDataParallel would hang or complain)."""
    cfg = configs.CONFIGS[name]()
    cfg = configs.replace(cfg, n_embd=24, n_head=2, n_layer=2, seq_len=8, n_cond=8, prefix="none",
                          block_size=min(cfg.block_size, 4))
    model, objective = cfg.make_model(11), cfg.make_objective(11)
    x0, u = torch.randint(0, 11, (4, 8)), torch.full((4, objective.n_times(8)), 0.7).double().squeeze(1)
    objective.loss(model, x0, objective.noise(u, torch.rand(4, 8).double()))[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bf16_autocast_is_close():
    """bfloat16 matrix products move logits by a little; they come out of a float32 residual stream."""
    model, (xt, t) = tiny(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.trunk(xt, t).dtype == torch.float32
        logits = model(xt, t)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - model(xt, t)).abs().max() < 0.1 * model(xt, t).abs().max()


def test_number_of_parameters():
    """The README's sizes."""
    with torch.device("meta"):
        size = lambda name, V: count_parameters(configs.CONFIGS[name]().make_model(V))
        assert round(size("d3pm_text8", 27) / 1e6) == 92
        assert round(size("mdlm_text8", 27) / 1e6) == 85
        assert round(size("d3pm_openwebtext_8gpu", 50257) / 1e6) == 131


@pytest.mark.parametrize("conditioning", ["none", "time", "step"])
def test_flops(conditioning):
    """flops() is what PyTorch's own counter finds in a forward and backward pass, attention as two products of (L, L);
    all but the time embedding and modulations, which run once per sequence."""
    from torch.utils.flop_counter import FlopCounterMode
    B, L, V = 4, 64, 50
    model = small(seq_len=L, n_layer=3, n_embd=64, conditioning=conditioning, head_gates=True).make_model(V)
    where = torch.rand(B, L) < 0.5
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randint(0, V, (B, L)), torch.rand(B), where).sum().backward()
    expected = model.flops(L, where.float().mean().item()) * B * L
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6 if conditioning == "none" else 0.01)


def test_dropout_of_a_layer():
    """Everything that a layer adds may be dropped in training, and nothing else is."""
    block, x = Block(small(), 0), torch.randn(2, 8, small().n_embd)
    block.dropout = 1.0
    for layer in block.outputs():
        torch.nn.init.normal_(layer.weight)
    assert torch.equal(block.train()(x, None, None, None), x)
    assert not torch.equal(block.eval()(x, None, None, None), x)
