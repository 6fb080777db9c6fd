"""Tiny random large language models, as the files of their projects, and their networks by definition."""

import functools
import json

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from hub_models import byte_level

SPECIAL = ["<|endoftext|>", "<|start|>", "<|end|>", "<|begin|>", "<|mask|>"]  # of 295 tokens the last five
END, BEGIN, MASK, ROWS = 290, 293, 294, 300
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=ROWS, max_position_embeddings=64)
EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
LLADA = dict(model_type="llada", architectures=["LLaDAModelLM"],
             auto_map={"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
             d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, mlp_hidden_size=48, vocab_size=ROWS, embedding_size=ROWS,
             max_sequence_length=64, rms_norm_eps=1e-5, rope_theta=500000.0, weight_tying=False, mask_token_id=MASK,
             eos_token_id=END, block_type="llama", layer_norm_type="rms", activation_type="silu", rope=True,
             alibi=False, include_bias=False, scale_logits=False, multi_query_attention=None)


LLADA_MOE = dict(model_type="llada", architectures=["LLaDAMoEModelLM"], hidden_size=32, dense_intermediate_size=48,
                 expert_intermediate_size=24, shared_expert_intermediate_size=None, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=4, hidden_act="silu", max_position_embeddings=64,
                 rms_norm_eps=1e-5, rope_theta=50000, partial_rotary_factor=1, rope_scaling=None, attention_bias=False,
                 clip_qkv=None, num_experts=5, num_experts_per_tok=2, norm_topk_prob=None, qk_layernorm=True,
                 moe_layer_freq=[1, 1], moe_router_enable_expert_bias=False, moe_router_score_function="softmax",
                 tie_word_embeddings=False, vocab_size=ROWS, eos_token_id=END, mask_token_id=MASK,
                 auto_map={"AutoConfig": "configuration_llada.LLaDAConfig"})


def random_weights(shapes):
    return {key: torch.randn(shape) / 4 + (len(shape) == 1) for key, shape in shapes.items()}


def rms_norm(x, gain):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def rotated(x, theta):
    """x (..., L, d), its entries i and i + d/2 turned by the position times theta^(-2 i/d)."""
    L, d = x.shape[-2:]
    angle = torch.arange(L)[:, None] / theta ** (torch.arange(0, d, 2) / d)
    z = torch.complex(x[..., :d // 2], x[..., d // 2:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((z.real, z.imag), -1)


def llada_moe_state():
    """Random weights under the names of LLaDA-MoE's files."""
    shapes = {"model.embed_tokens.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (32, 32) for name in "qkvo"}
        shapes |= {f"{layer}.self_attn.{name}_norm.weight": (8,) for name in "qk"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
        shapes |= {f"{layer}.mlp.gate.weight": (5, 32)}
        for expert in range(5):
            shapes |= {f"{layer}.mlp.experts.{expert}.{name}_proj.weight": (24, 32) for name in ("gate", "up")}
            shapes |= {f"{layer}.mlp.experts.{expert}.down_proj.weight": (32, 24)}
    return random_weights(shapes)


def llada_moe_logits(w, ids):
    """LLaDA-MoE's network by its definition: ids (B, L) -> (B, L, rows). A token takes the two experts to which the
    router gives the largest probabilities, each times this probability."""
    (B, L), x = ids.shape, w["model.embed_tokens.weight"][ids]
    for i in range(2):
        get = lambda name: w[f"model.layers.{i}.{name}.weight"]
        h = rms_norm(x, get("input_layernorm"))
        q, k, v = ((h @ get(f"self_attn.{name}_proj").T).view(B, L, 4, 8).transpose(1, 2) for name in "qkv")
        q, k = (rotated(rms_norm(a, get(f"self_attn.{name}_norm")), 50000.0) for a, name in ((q, "q"), (k, "k")))
        seen = (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
        x = x + seen.transpose(1, 2).reshape(B, L, -1) @ get("self_attn.o_proj").T
        h = rms_norm(x, get("post_attention_layernorm"))
        p = (h @ get("mlp.gate").T).softmax(-1)
        p = p.where(p >= p.topk(2).values[..., -1:], 0)
        for expert in range(5):
            gate, up, down = (get(f"mlp.experts.{expert}.{name}_proj") for name in ("gate", "up", "down"))
            x = x + p[..., expert, None] * ((F.silu(h @ gate.T) * (h @ up.T)) @ down.T)
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


LLADA2 = dict(model_type="llada2_moe", architectures=["LLaDA2MoeModelLM"], hidden_size=32, intermediate_size=48,
              moe_intermediate_size=24, num_hidden_layers=2, first_k_dense_replace=1, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, hidden_act="silu", max_position_embeddings=64, rms_norm_eps=1e-5,
              rope_theta=600000, partial_rotary_factor=0.5, rope_scaling=None, use_qkv_bias=False, use_qk_norm=True,
              use_bias=False, num_experts=6, num_experts_per_tok=2, num_shared_experts=1, n_group=3, topk_group=2,
              norm_topk_prob=True, routed_scaling_factor=2.5, score_function="sigmoid", norm_head=False,
              moe_router_enable_expert_bias=True, tie_word_embeddings=False, vocab_size=ROWS, pad_token_id=END,
              auto_map={"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig"})


def llada2_state():
    """Random weights under the names of LLaDA 2's files. The first layer has no experts."""
    shapes = {"model.word_embeddings.weight": (ROWS, 32), "model.norm.weight": (32,), "lm_head.weight": (ROWS, 32)}
    mlp = lambda name, n: {f"{name}.{part}_proj.weight": (32, n) if part == "down" else (n, 32)
                           for part in ("gate", "up", "down")}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.attention.query_key_value.weight": (64, 32), f"{layer}.attention.dense.weight": (32, 32)}
        shapes |= {f"{layer}.attention.{name}_layernorm.weight": (8,) for name in ("query", "key")}
        shapes |= {f"{layer}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    shapes |= mlp("model.layers.0.mlp", 48) | mlp("model.layers.1.mlp.shared_experts", 24)
    shapes |= {"model.layers.1.mlp.gate.weight": (6, 32), "model.layers.1.mlp.gate.expert_bias": (1, 6)}
    for expert in range(6):
        shapes |= mlp(f"model.layers.1.mlp.experts.{expert}", 24)
    state = random_weights(shapes)
    return state | {"model.layers.1.mlp.gate.expert_bias": state["model.layers.1.mlp.gate.expert_bias"][0]}


def llada2_logits(w, ids):
    """LLaDA 2's network by its definition, with blocks of 8: ids (B, L) -> (B, L, rows).

    The router has a score for each of six experts, the sigmoid of a product. The biases are added where experts are
    chosen, and only there: of three groups of two the two groups with the largest sums, of their experts the best two.
    Their weights are their scores divided by the sum of both, times 2.5. Another expert works for all tokens."""
    (B, L), x = ids.shape, w["model.word_embeddings.weight"][ids]
    block = torch.arange(L) // 8

    def mlp(name, h):
        gate, up, down = (w[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (F.silu(h @ gate.T) * (h @ up.T)) @ down.T

    def mixture(name, h):
        scores = (h @ w[f"{name}.gate.weight"].T).sigmoid()
        biased = (scores + w[f"{name}.gate.expert_bias"]).tolist()
        groups = sorted(range(3), key=lambda group: -sum(biased[2 * group:2 * group + 2]))[:2]
        chosen = sorted((i for i in range(6) if i // 2 in groups), key=lambda i: -biased[i])[:2]
        return mlp(f"{name}.shared_experts", h) + sum(
            2.5 * scores[i] / scores[chosen].sum() * mlp(f"{name}.experts.{i}", h) for i in chosen)

    for i in range(2):
        layer = f"model.layers.{i}"
        get = lambda name: w[f"{layer}.{name}.weight"]
        h = rms_norm(x, get("input_layernorm"))
        q, k, v = (h @ get("attention.query_key_value").T).view(B, L, 8, 8).transpose(1, 2).split((4, 2, 2), 1)
        q, k = (rms_norm(a, get(f"attention.{name}_layernorm")) for a, name in ((q, "query"), (k, "key")))
        q, k = (torch.cat((rotated(a[..., :4], 600000.0), a[..., 4:]), -1) for a in (q, k))  # half of the channels
        k, v = (a.repeat_interleave(2, 1) for a in (k, v))
        scores = (q @ k.mT / 8 ** 0.5).masked_fill(block > block[:, None], -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, -1) @ get("attention.dense").T
        h = rms_norm(x, get("post_attention_layernorm"))
        x = x + (mlp(f"{layer}.mlp", h) if i == 0 else
                 torch.stack([mixture(f"{layer}.mlp", one) for one in h.flatten(0, 1)]).view_as(h))
    return rms_norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def llada_state():
    """Random weights under the names of LLaDA's files."""
    shapes = {"wte.weight": (ROWS, 32), "ln_f.weight": (32,), "ff_out.weight": (ROWS, 32)}
    for i in range(2):
        shapes |= {f"blocks.{i}.{name}.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"blocks.{i}.ff_proj.weight": (48, 32), f"blocks.{i}.up_proj.weight": (48, 32),
                   f"blocks.{i}.ff_out.weight": (32, 48),
                   f"blocks.{i}.attn_norm.weight": (32,), f"blocks.{i}.ff_norm.weight": (32,)}
    return random_weights({f"model.transformer.{key}": shape for key, shape in shapes.items()})


def llada_logits(state, ids):
    """LLaDA's network by its definition: ids (B, L) -> (B, L, rows)."""
    w = {key.removeprefix("model.transformer."): value for key, value in state.items()}
    (B, L), heads, d = ids.shape, 4, 8
    x = w["wte.weight"][ids]
    for i in range(2):
        get = lambda name: w[f"blocks.{i}.{name}.weight"]
        h = rms_norm(x, get("attn_norm"))
        q, k, v = ((h @ get(f"{name}_proj").T).view(B, L, heads, d).transpose(1, 2) for name in "qkv")
        seen = (rotated(q, 500000.0) @ rotated(k, 500000.0).mT / d ** 0.5).softmax(-1) @ v
        x = x + seen.transpose(1, 2).reshape(B, L, -1) @ get("attn_out").T
        h = rms_norm(x, get("ff_norm"))
        x = x + (F.silu(h @ get("ff_proj").T) * (h @ get("up_proj").T)) @ get("ff_out").T
    return rms_norm(x, w["ln_f.weight"]) @ w["ff_out.weight"].T


def make(kind, folder):
    """Write a random model of a kind into a new folder. Returns the function ids (B, L) -> logits (B, L, rows) of its
    network: by definition for LLaDA's, else that of transformers with full attention, or in blocks."""
    import transformers as hf
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokens = byte_level([])
    tokens.add_special_tokens(SPECIAL)
    folder.mkdir()
    names = dict(bos_token="<|begin|>", eos_token="<|endoftext|>")
    names |= {} if kind in ("llada", "llada_moe", "llada2", "qwen2") else {"mask_token": "<|mask|>"}
    hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **names).save_pretrained(folder)
    if kind == "llada":
        state, settings = llada_state(), LLADA
        reference = functools.partial(llada_logits, state)
    elif kind == "llada2":
        state, settings = llada2_state(), LLADA2 | {"block_size": 8}
        reference = functools.partial(llada2_logits, state)
    elif kind == "llada_moe":
        state, settings = llada_moe_state(), LLADA_MOE
        reference = functools.partial(llada_moe_logits, state)
    else:
        family = {"dream": "qwen2", "a2d": "qwen3", "sdar": "qwen3", "sdar_moe": "qwen3_moe"}.get(kind, kind)
        config = hf.AutoConfig.for_model(family, **SIZES, **EXPERTS, head_dim=8, tie_word_embeddings=kind == "a2d")
        model = hf.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn_like(p) / 4 + (p.dim() == 1))
        state = {name: p.detach().clone() for name, p in model.named_parameters()}
        settings = {"dream": dict(model_type="Dream", architectures=["DreamModel"], mask_token_id=MASK,
                                  auto_map={"AutoConfig": "configuration_dream.DreamConfig"}),
                    "sdar_moe": dict(model_type="sdar_moe", architectures=["SDARMoeForCausalLM"], block_size=8),
                    "sdar": dict(model_type="sdar", architectures=["SDARForCausalLM"], block_size=8,
                                 debug=False, fuse_cross_entropy=True, attn_implementation="flex_attention",
                                 auto_map={"AutoConfig": "configuration_sdar.SDARConfig"}),
                    "a2d": dict(model_type="a2d-qwen3", architectures=["A2DQwen3LMHeadModel"])}.get(kind, {})
        settings = config.to_dict() | {"eos_token_id": END, "architectures": ["Qwen2ForCausalLM"]} | settings

        def reference(ids):
            block = torch.arange(ids.shape[1]) // (8 if kind.startswith("sdar") else 10**6)
            return model(input_ids=ids, attention_mask=(block <= block[:, None])[None, None]).logits
    if kind == "dream":  # its tokenizer has code of its own, and the files of Qwen2's
        parts = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(parts["model"]["vocab"]))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, parts["model"]["merges"])))
        (folder / "tokenizer_config.json").write_text(json.dumps(names | {
            "tokenizer_class": "DreamTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_dream.Dream", None]},
            "added_tokens_decoder": {str(END + i): {"content": text, "special": True}
                                     for i, text in enumerate(SPECIAL)}}))
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({key: value.bfloat16() for key, value in state.items()}, folder / "model.safetensors")
    for value in state.values():
        value.copy_(value.bfloat16())  # the file's precision
    if not kind.startswith("llada"):
        model.load_state_dict(state, strict=False)
    return torch.no_grad()(reference)
