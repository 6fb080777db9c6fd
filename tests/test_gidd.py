"""GIDD's published checkpoints: their network, noise and steps by their definition, damaged files; self-correction.

The published files are on the Hub: config.json, model.safetensors, tokenizer.json. Here are tiny ones of the same form.
"""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import storage
import world
from categorical import Draw, begin
from cli import UserError
from commands import arguments, assert_one_line
from data.tokenizer import make_tokenizer
from hybrid import Hybrid, posterior
from sampler_settings import schedule_grid
from sampling import Settings, denoiser_of
from test_sampling import chi_square_excess, counts_of, masks
from uniform import Uniform, UniformD3PM, self_corrected
from world import MASK, P_DATA, SEQUENCES, L, V

D, HEADS, COND, LAYERS, LENGTH, GPT2 = 16, 2, 8, 2, 24, 50257


def settings_of(rows, p):
    """The config.json of a network with this share p_uniform."""
    return dict(architectures=["DIT"], attention_dropout=0.0, auto_map={
        "AutoConfig": "configuration_dit.DITConfig", "AutoModelForMaskedLM": "modeling_dit.DIT"}, hidden_size=D,
        max_seq_len=LENGTH, model_type="dit", num_attention_heads=HEADS, num_hidden_layers=LAYERS, p_uniform=p,
        t_eps=0.0001, timestep_cond_dim=COND, torch_dtype="float32", transformers_version="4.46.0", vocab_size=rows)


def weights_of(rows, seed=0):
    """Random weights and the tables of rotary embeddings, under the names of the files."""
    shapes = {"vocab_embed.embedding": (rows, D),
              "sigma_map.mlp.0.weight": (COND, 256), "sigma_map.mlp.0.bias": (COND,),
              "sigma_map.mlp.2.weight": (COND, COND), "sigma_map.mlp.2.bias": (COND,),
              "output_layer.norm_final.weight": (D,), "output_layer.linear.weight": (rows, D),
              "output_layer.linear.bias": (rows,), "output_layer.adaLN_modulation.weight": (2 * D, COND),
              "output_layer.adaLN_modulation.bias": (2 * D,)}
    for i in range(LAYERS):
        block = {"norm1.weight": (D,), "attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D), "norm2.weight": (D,),
                 "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,), "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,),
                 "adaLN_modulation.weight": (6 * D, COND), "adaLN_modulation.bias": (6 * D,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()}
    generator = torch.Generator().manual_seed(seed)
    state = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    d = D // HEADS
    angle = (torch.arange(LENGTH)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)).repeat(1, 2)
    for name in ("cos", "sin"):
        table = getattr(angle, name)()[None, :, None, None].repeat(1, 1, 3, 1, 1)  # of queries, keys and values
        table[:, :, 2] = name == "cos"
        state[f"rotary_emb.{name}_cached"] = table
    return state


def published_logits(state, ids, t):
    """GIDD's network by its definition: ids (B, L), t (B,) -> (B, L, rows), float64."""
    w, (B, L), d = {key: value.double() for key, value in state.items()}, ids.shape, D // HEADS
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)
    angle = t.double()[:, None] * 10000 ** (-torch.arange(128) / 128)  # of t itself, in (0, 1)
    c = F.silu(linear(F.silu(linear(torch.cat((angle.cos(), angle.sin()), 1), "sigma_map.mlp.0")), "sigma_map.mlp.2"))
    turn = torch.polar(*torch.broadcast_tensors(torch.ones(()).double(), torch.arange(L)[:, None].double()
                                                / 10000 ** (torch.arange(0, d, 2) / d)))

    def norm(x, name, shift, scale):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] * (1 + scale[:, None]) + shift[:, None]

    def rotated(x):  # x[i] + i x[i + d/2] is turned
        z = torch.complex(x[..., :d // 2], x[..., d // 2:]) * turn
        return torch.cat((z.real, z.imag), -1)

    x = w["vocab_embed.embedding"][ids]
    for i in range(LAYERS):
        block = f"blocks.{i}."
        shift, scale, gate, shift2, scale2, gate2 = linear(c, block + "adaLN_modulation").split(D, 1)
        q, k, v = (part.view(B, L, HEADS, d).transpose(1, 2) for part in
                   linear(norm(x, block + "norm1", shift, scale), block + "attn_qkv").split(D, -1))
        seen = (rotated(q) @ rotated(k).mT / d**0.5).softmax(-1) @ v
        x = x + gate[:, None] * linear(seen.transpose(1, 2).reshape(B, L, D), block + "attn_out")
        h = linear(norm(x, block + "norm2", shift2, scale2), block + "mlp.0")
        h = h / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + gate2[:, None] * linear(h, block + "mlp.2")
    shift, scale = linear(c, "output_layer.adaLN_modulation").split(D, 1)
    return linear(norm(x, "output_layer.norm_final", shift, scale), "output_layer.linear")


def published_noise(t, p, rows):
    """GIDD's alpha and beta pi (rows,) at its time t, with gamma = 1. The mask is the last row."""
    c = 2 * p / (1 - p) * math.sqrt(t * (1 - t))
    others = torch.full((rows - 1,), c / (1 + c) / (rows - 1), dtype=torch.float64)
    return (1 - t) / (1 + c), torch.cat((others, torch.tensor([t / (1 + c)], dtype=torch.float64)))


def folder_of(path, rows=GPT2 + 1, p=0.2, added=None, **changes):
    """A folder as on the Hub. added: {name of a token: its id} in tokenizer.json, or None: no tokenizer.json."""
    path.mkdir(parents=True, exist_ok=True)
    state = weights_of(rows) | {key: value for key, value in changes.items() if torch.is_tensor(value)}
    settings = settings_of(rows, p) | {key: value for key, value in changes.items() if not torch.is_tensor(value)}
    save_file(state, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    if added is not None:
        tokens = [{"id": i, "content": content, "special": True} for content, i in added.items()]
        (path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": tokens}))
    return path


# ---- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("rows", [GPT2 + 1, GPT2 + 2])
def test_logits(tmp_path, p, rows):
    """The logits of all tokens but the mask, at GIDD's times; the settings; the tokens, with [PAD] or without."""
    mask = rows - 1
    added = {"<|endoftext|>": GPT2 - 1} | ({"[PAD]": GPT2} if rows == GPT2 + 2 else {}) | {"[MASK]": mask}
    folder = folder_of(tmp_path / "x", rows, p, added)
    payload = storage.read(folder)
    config, meta = storage.config_of(payload), payload["meta"]
    assert payload["foreign"] == "gidd" and (meta["tokenizer"], meta["vocab_size"]) == ("gpt2", mask)
    assert (config.noise, config.objective, config.conditioning) == ("hybrid" if p else "mask", "mdlm", "unscaled_time")
    assert (config.seq_len, config.n_layer, config.n_head, config.n_embd) == (LENGTH, LAYERS, HEADS, D)
    assert not p or (config.uniform_share, config.schedule) == (p, f"gidd:{p}")
    objective = config.make_objective(meta["vocab_size"])
    assert objective.mask_id == mask
    model = config.make_model(meta["vocab_size"])
    model.load_state_dict(payload["ema"])
    t = torch.tensor([1e-4, 0.3, 0.5, 1 - 1e-4], dtype=torch.float64)
    xt = torch.randint(rows, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    xt[:, ::3] = mask
    told = objective.time(1 - torch.tensor([published_noise(x, p, rows)[0] for x in t.tolist()]))
    torch.testing.assert_close(told.double(), t, rtol=1e-5, atol=1e-7)
    expected = published_logits(weights_of(rows), xt, t)
    torch.testing.assert_close(model(xt, told).double(), expected[..., :mask], rtol=1e-4, atol=1e-4)
    others = published_logits(weights_of(rows), xt, 1000 * t)  # the test sees the difference
    assert (others - expected).abs().amax((1, 2)).min() > 0.01


def test_tokens_of_text(tmp_path, gpt2):
    """Text has GPT-2's tokens, with [PAD] or without."""
    for rows in (GPT2 + 1, GPT2 + 2):
        meta = storage.read(folder_of(tmp_path / str(rows), rows))["meta"]
        assert make_tokenizer(meta).encode("Hello world").tolist() == [15496, 995]


# ---- the noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.2, 0.9])
def test_published_noise(p):
    """GIDD's marginals at its times are those of Hybrid with schedule gidd:p; its time is the t of the schedule."""
    rows = 7
    objective = Hybrid(rows - 1, f"gidd:{p}", p)
    for t in (0.0, 1e-4, 0.01, 0.3, 0.5, 0.9, 1 - 1e-4, 1.0):
        alpha, beta_pi = published_noise(t, p, rows)
        u = torch.tensor([t], dtype=torch.float64)
        ours, m, n = (share.item() for share in objective.shares(objective.schedule.sigma(u)))
        assert ours == pytest.approx(alpha, rel=1e-12, abs=1e-15)
        assert m == pytest.approx(beta_pi[-1].item(), rel=1e-9, abs=1e-12)
        assert n / objective.V == pytest.approx(beta_pi[0].item(), rel=1e-9, abs=1e-12)
        assert m / (ours + m) == pytest.approx(t, abs=1e-9)
        assert objective.time(1 - objective.schedule.alpha(u)).item() == pytest.approx(t, abs=1e-6)
        assert objective.schedule.alpha(u).item() == pytest.approx(alpha, rel=1e-12)
        if 0 < t < 1:  # what training draws at this time: the share of each kind of noise
            v = ((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)[None]
            noise = objective.noise(u, v)
            counts = torch.bincount(noise.token[0] + 1, minlength=rows + 1) / v.numel()
            assert noise.t.item() == pytest.approx(t)
            torch.testing.assert_close(counts.double(), torch.cat((torch.tensor([alpha]).double(), beta_pi)),
                                       rtol=0, atol=3e-5)
    n = [published_noise(t / 1000, p, rows)[1][:-1].sum().item() for t in range(1001)]
    assert max(n) == n[500] == pytest.approx(p)  # p_uniform is the largest share of random tokens


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_published_steps(p):
    """A step of GIDD's generation from t to s is that of hybrid.posterior, on the grid of steps of sample.py.

    GIDD: p(z_s | z_t) is proportional to q(z_t | z_s) q_s(z_s), with the network's prediction as x.
    """
    V, grid = 5, [1 - alpha for alpha in (published_noise(t, p, 6)[0] for t in (1.0, 0.75, 0.5, 0.25, 0.0))]
    assert schedule_grid(f"gidd:{p}", 4) == pytest.approx(grid, abs=1e-12)
    x = torch.rand(V + 1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, z, objective = x / x.sum(-1, keepdim=True), torch.arange(V + 1), Hybrid(V, f"gidd:{p}", p)
    for t, s in ((0.75, 0.5), (0.25, 1e-4), (1 - 1e-4, 0.9)):
        (alpha_t, noise_t), (alpha_s, noise_s) = published_noise(t, p, V + 1), published_noise(s, p, V + 1)
        kept = alpha_t / alpha_s
        stage = kept * torch.eye(V + 1) + (noise_t - kept * noise_s)  # from z_s, a row, to z_t, a column
        weights = stage.T[z] * (alpha_s * F.pad(x, (0, 1)) + noise_s)
        of = lambda t: [share.item() for share in
                        objective.shares(objective.schedule.sigma(torch.tensor(t, dtype=torch.float64)))]
        ours = posterior(x, z, of(t), of(s))
        torch.testing.assert_close(ours / ours.sum(-1, keepdim=True), weights / weights.sum(-1, keepdim=True),
                                   rtol=1e-6, atol=1e-9)


# ---- self-correction -------------------------------------------------------------------------------------------------


def table(seed):
    """Logits at every text of the enumerable world, (27, L, V)."""
    return 1.5 * torch.randn(len(SEQUENCES), L, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def index(xt):
    return (xt * torch.tensor([V**2, V, 1])).sum(1)


def denoiser(logits, told):
    """The network of a table. It keeps what it is told in the list `told`."""
    def model(xt, t, where):
        told.extend(t.tolist())
        return logits[index(xt)][where].float()
    return model


def corrected_distribution(x, start, free, n, temperature, patience):
    """Distribution (27,) of the text after n steps from the text `start`, by enumeration: x (27, L, V) probabilities.

    A step: draw y_i ~ q_i at all free i, with q_i proportional to x_i^(1/temperature); put the y_i != text_i of largest
    q_i(y_i) into the text. Stop at a text with no such y_i. Stop before the change if the share of free tokens that are
    the likeliest ones has not exceeded its maximum in more than `patience` steps.
    """
    live, done = {(start, 0.0, 0): 1.0}, torch.zeros(len(SEQUENCES), dtype=torch.float64)
    positions = [i for i in range(L) if free[i]]
    for _ in range(n):
        after = {}
        for (text, best, waited), p in live.items():
            q = x[text] ** (1 / temperature)
            q, likeliest, old = q / q.sum(-1, keepdim=True), x[text].argmax(-1).tolist(), SEQUENCES[text].tolist()
            for y in itertools.product(range(V), repeat=len(positions)):
                chance = math.prod(q[i, token].item() for i, token in zip(positions, y))
                new, changes = list(old), [(q[i, token].item(), -i, token) for i, token in zip(positions, y)
                                           if token != old[i]]
                if changes:
                    _, i, token = max(changes)
                    new[-i] = token
                agreement = sum(new[i] == likeliest[i] for i in positions) / len(positions)
                now = (0 if agreement > best else waited + 1)
                if not changes or now > patience:
                    done[text] += p * chance
                else:
                    key = (index(torch.tensor([new])).item(), max(best, agreement), now)
                    after[key] = after.get(key, 0) + p * chance
        live = after
    for (text, *_), p in live.items():
        done[text] += p
    return done


HYBRID = Hybrid(V, "gidd:0.2", 0.2)


@pytest.mark.parametrize("objective, n, temperature, patience, free", [
    (HYBRID, 1, 1.0, 32, (1, 1, 1)), (HYBRID, 4, 1.0, 0, (1, 1, 1)), (HYBRID, 5, 0.7, 1, (1, 1, 1)),
    (HYBRID, 4, 0.5, 32, (1, 0, 1)), (HYBRID, 8, 0.1, 32, (1, 1, 1)), (Uniform(V), 3, 0.5, 32, (1, 1, 1)),
    (UniformD3PM(V, 200), 3, 0.5, 32, (1, 1, 1))])
def test_self_correction(objective, n, temperature, patience, free):
    """Texts have the enumerated distribution; the network is told t = 0.01; given tokens stay."""
    logits, told, start, N = table(3), [], 5, 20_000
    free = torch.tensor(free, dtype=torch.bool)
    texts = SEQUENCES[start].repeat(N, 1)
    draw = Draw(torch.Generator().manual_seed(0), temperature)
    model = denoiser_of(denoiser(logits, told), objective)
    states = list(self_corrected([begin(texts)], model, free.expand(N, L), objective, draw, n, patience))
    assert told and told == pytest.approx([0.01] * len(told), rel=1e-5)
    expected = corrected_distribution(logits.softmax(-1), start, free.tolist(), n, temperature, patience)
    assert expected.sum().item() == pytest.approx(1)
    counts, possible = counts_of(states[-1].xt), expected > 1e-12
    assert counts[~possible].sum() == 0 and chi_square_excess(counts[possible], expected[possible]) < 4
    assert torch.equal(states[-1].xt[:, ~free], texts[:, ~free])
    for before, after in zip(states, states[1:]):
        changed = before.xt != after.xt
        assert (changed.sum(1) <= 1).all()
        x = logits[index(before.xt)].softmax(-1).gather(-1, after.xt[..., None]).squeeze(-1).float()
        torch.testing.assert_close(after.p[changed], x[changed])
        assert not changed[after.steps == 0].any()


def test_self_correction_improves_texts():
    """Corrected texts are likelier under the data, if the network is the exact predictor. The states of the sampler
    come first."""
    objective, told = Hybrid(V, "gidd:0.2", 0.2), []
    shares = [share.item() for share in objective.shares(objective.schedule.sigma(torch.tensor(0.01).double()))]
    codes = (SEQUENCES * torch.tensor([(V + 1) ** 2, V + 1, 1])).sum(1)
    network_of_texts = denoiser(world.hybrid_oracle(shares)[codes].log(), told)
    model = denoiser_of(network_of_texts, objective)
    draw = lambda: Draw(torch.Generator().manual_seed(1), 0.1)
    start = SEQUENCES.repeat(20, 1)
    *_, end = self_corrected([begin(start)], model, torch.ones_like(start, dtype=torch.bool), objective, draw(), 20)
    of = lambda xt: P_DATA[index(xt)].log().mean()
    assert of(end.xt) > of(start) + 0.5

    def network(xt, t, where):
        return torch.zeros(int(where.sum()), V) if (xt == MASK).any() else network_of_texts(xt, t, where)

    run = lambda **more: list(Settings("ancestral", {"grid": [1.0, 0.0]}, **more).states(
        objective, network, masks(200), torch.Generator().manual_seed(0)))
    plain, corrected = run(), run(correct=6)
    assert len(plain) == 1 and len(corrected) > 2 and torch.equal(plain[0].xt, corrected[0].xt)
    assert of(corrected[-1].xt) > of(plain[0].xt) + 0.5
    hot = run(correct=6, correct_temperature=100.0)
    assert of(corrected[-1].xt) > of(hot[-1].xt) + 0.5


# ---- files that do not fit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, match", [
    (dict(num_attention_heads=None), "lacks 'num_attention_heads'"),
    (dict(num_attention_heads=4), "rotary frequencies of 2 heads, and its settings say 4"),
    (dict(num_hidden_layers=3), "has 2 blocks, and its settings say 3"),
    (dict(vocab_size=50304), "has 50,258 tokens, and its settings say 50304"),
    (dict(max_seq_len=None), "lacks 'max_seq_len'"),
    (dict(max_seq_len=0), "does not say its sequence length"),
    (dict(p_uniform="a"), "damaged: p_uniform is 'a', not 0 or a number from 0.001 to 0.999"),
    (dict(p_uniform=True), "p_uniform is True, not 0"),
    (dict(p_uniform=1.0), "p_uniform is 1.0, not 0"),
    (dict(p_uniform=-0.1), "p_uniform is -0.1, not 0"),
    (dict(p_uniform=math.nan), "p_uniform is nan, not 0"),
    (dict(p_uniform=None), "unknown algorithm 'dit'"),
    (dict(added={"[PAD]": 50257}), r"tokenizer.json does not say which token is \[MASK\]"),
    (dict(added={"[MASK]": 50256}), r"\[MASK\] is token 50256, and in .* it is 50257"),
    ({"blocks.0.norm1.weight": torch.ones(3)}, r"blocks.0.norm1.weight is \(3,\), expected \(16,\)"),
    ({"logit_bias": torch.zeros(1, 1, 1)}, "logit_bias is unexpected"),
    (dict(rows=50304), "has 50,303 tokens, and does not say which"),
])
def test_damaged(tmp_path, changes, match):
    with pytest.raises(UserError, match=match):
        storage.read(folder_of(tmp_path / "x", **changes))


def test_damaged_tokenizers(call, tmp_path):
    """A tokenizer.json that is none: one line on the command line."""
    folder = folder_of(tmp_path / "x")
    for text in ("", "[]", "{", '{"added_tokens": 3}', '{"added_tokens": [3]}', '{"added_tokens": [{"id": 5}]}'):
        (folder / "tokenizer.json").write_text(text)
        assert_one_line(call("sample.py", folder), "tokenizer.json does not say which token is [MASK]: get it again")


# ---- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_commands(call, data_dir, tmp_path, p):
    """sample.py, evaluate.py and train.py --init_from take a network of these characters; first a line names flags."""
    folder, where = folder_of(tmp_path / "x", 28, p), ["--dataset", "tiny", "--data_dir", data_dir]
    done = call("sample.py", folder, "--steps=4", "--template=the {12}", *where)
    assert done.code == 0 and done.out.startswith("the ") and len(done.out) == 17, done.err
    assert_one_line(call("sample.py", folder), "has 27 tokens, and does not say which", "--dataset")
    done = call("evaluate.py", folder, "--n_tokens=512", "--json", *where)
    assert done.code == 0 and 1 < json.loads(done.out)["bits_per_token"] < 1000, done.err
    flags = ["--seq_len=24", f"--init_from={folder}", "--max_steps=1", "--conditioning=unscaled_time"]
    flags += ["--noise=hybrid", "--schedule=gidd:0.2", "--uniform_share=0.2", "--time_sampling=stratified"] if p else []
    refused = call(*arguments("mdlm_text8", data_dir, tmp_path / "out", *flags))
    assert_one_line(refused, "of another network than that of this config: add --n_")
    flags += refused.err.strip().split("add ")[1].split(" ")
    begun = call(*arguments("mdlm_text8", data_dir, tmp_path / "out", *flags))
    assert begun.code == 0 and "tensors taken as they are" in begun.err and "; new:" not in begun.err, begun.err
    assert "trained with other settings" not in begun.err
    other = call(*arguments("mdlm_text8", data_dir, tmp_path / "other", *flags, "--schedule=cosine"))
    assert other.code == 0 and f"schedule={'gidd:0.2' if p else 'linear'}, now cosine" in other.err
