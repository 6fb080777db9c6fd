"""LLaDA's checkpoints in the settings and names of transformers, for llm.py.

               network of transformers    a token sees
    LLaDA      Llama                      all others                       arXiv 2502.09992
    LLaDA-MoE  Qwen3-MoE                  all others                       arXiv 2509.24389
    LLaDA 2    GLM-4-MoE                  its block and those before       arXiv 2512.15745

Llama's MLP is a mixture of experts in the other two: a router gives each token to a few of the experts.
"""

import functools
import re
from typing import NamedTuple

import torch

from cli import UserError
from foreign.masked_lm import name_of


class Variant(NamedTuple):
    """A kind of LLaDA, and how it is translated."""

    family: str           # model_type of its network in transformers
    settings: dict        # {their setting: that of transformers}; the others have the same names
    needed: tuple         # numbers that its config.json must have, in their names
    fixed: dict           # settings that make it this network; with other values it is another one
    added: dict           # settings of transformers, whatever config.json says
    names: tuple          # (pattern, replacement) pairs for the names of weights


LLADA = Variant(
    "llama",
    {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
     "n_kv_heads": "num_key_value_heads", "mlp_hidden_size": "intermediate_size",
     "max_sequence_length": "max_position_embeddings", "weight_tying": "tie_word_embeddings"},
    ("d_model", "n_layers", "n_heads", "mlp_hidden_size"),
    {"block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
     "attention_layer_norm": False, "bias_for_layer_norm": False, "include_bias": False, "include_qkv_bias": False,
     "input_emb_norm": False, "scale_logits": False, "multi_query_attention": None},
    {},
    ((r"^model\.transformer\.wte\.", "model.embed_tokens."),
     (r"^model\.transformer\.ln_f\.", "model.norm."),
     (r"^model\.transformer\.ff_out\.", "lm_head."),  # the output layer of the network; below, that of each MLP
     (r"^model\.transformer\.blocks\.", "model.layers."),
     (r"\.attn_norm\.", ".input_layernorm."),
     (r"\.ff_norm\.", ".post_attention_layernorm."),
     (r"\.([qkv])_proj\.", r".self_attn.\1_proj."),
     (r"\.attn_out\.", ".self_attn.o_proj."),
     (r"\.ff_proj\.", ".mlp.gate_proj."),
     (r"\.up_proj\.", ".mlp.up_proj."),
     (r"\.ff_out\.", ".mlp.down_proj.")))

LLADA_MOE = Variant(
    "qwen3_moe",
    {"expert_intermediate_size": "moe_intermediate_size", "dense_intermediate_size": "intermediate_size"},
    ("hidden_size", "expert_intermediate_size", "num_experts", "num_experts_per_tok", "num_hidden_layers",
     "num_attention_heads", "rms_norm_eps", "rope_theta"),
    {"qk_layernorm": True, "shared_expert_intermediate_size": None, "moe_router_enable_expert_bias": False,
     "moe_router_score_function": "softmax", "clip_qkv": None, "partial_rotary_factor": 1, "rope_scaling": None,
     "hidden_act": "silu"},
    {"norm_topk_prob": False},  # its code does not read that of config.json
    ())

LLADA2 = Variant(
    "glm4_moe",
    {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts", "use_qkv_bias": "attention_bias"},
    ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_shared_experts", "n_group",
     "topk_group", "first_k_dense_replace", "num_hidden_layers", "num_attention_heads", "rms_norm_eps", "rope_theta",
     "partial_rotary_factor", "routed_scaling_factor"),
    {"use_qk_norm": True, "use_bias": False, "score_function": "sigmoid", "norm_topk_prob": True, "norm_head": False,
     "rope_scaling": None, "use_sliding_window": False, "hidden_act": "silu"},
    {"use_qk_norm": True, "norm_topk_prob": True, "num_mtp_layers": 0},
    ((r"^model\.word_embeddings\.", "model.embed_tokens."),
     (r"\.attention\.dense\.", ".self_attn.o_proj."),
     (r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
     (r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
     (r"\.gate\.expert_bias$", ".gate.e_score_correction_bias")))

KINDS = {"llada": LLADA, "lladamoe": LLADA_MOE, "llada_moe": LLADA_MOE, "llada2_moe": LLADA2}  # by model_type


def variant_of(settings):
    """The Variant of a config.json, or None. LLaDA-MoE's files may have LLaDA's model_type."""
    found = KINDS.get(name_of(settings))
    return LLADA_MOE if found is LLADA and "num_experts" in settings else found


def network_settings(settings, path):
    """Translate a config.json of LLaDA into settings of transformers, a dict. Raises UserError for other networks."""
    variant, rope = variant_of(settings), settings.get("rope_parameters")
    said = settings | (rope if isinstance(rope, dict) else {})  # newer versions of transformers write these there
    other = [f"{key}={said[key]}" for key, value in variant.fixed.items() if said.get(key, value) != value]
    if other:
        raise UserError(f"{path} is a variant of LLaDA that is not supported: {', '.join(other)}")
    if lacking := [key for key in variant.needed if type(said.get(key)) not in (int, float)]:
        raise UserError(f"the config.json of {path} does not say {', '.join(lacking)}: get it again")
    found = {variant.settings.get(key, key): value for key, value in settings.items() if value is not None}
    if settings.get("embedding_size"):
        found["vocab_size"] = settings["embedding_size"]  # with rows that are no tokens
    if variant is LLADA_MOE and (freq := settings.get("moe_layer_freq")) is not None:
        n = settings["num_hidden_layers"]
        if not isinstance(freq, list) or len(freq) != n or not all(i in (0, 1) for i in freq):
            raise UserError(f"the moe_layer_freq of {path} is {str(freq)[:30]}, not a list of 0 or 1 for each of {n} "
                            "layers: correct its config.json")
        found["mlp_only_layers"] = [i for i, is_mixture in enumerate(freq) if not is_mixture]
    if variant is LLADA2 and not 0 < said["partial_rotary_factor"] <= 1:
        raise UserError(f"the partial_rotary_factor of {path} is {said['partial_rotary_factor']}, not a number "
                        "above 0, and at most 1: correct its config.json")
    return found | variant.added | {"model_type": variant.family}


def check_router(settings, path):
    """Raise UserError if a token cannot take experts in the way that these settings of transformers say.

    A token takes k of E experts. LLaDA 2 chooses them from the best of its groups, by the two best experts of each.
    """
    E = getattr(settings, "n_routed_experts", None) or getattr(settings, "num_experts", 0)
    if not E:
        return
    k, size = settings.num_experts_per_tok, E
    if settings.model_type == LLADA2.family:
        n, best = settings.n_group, settings.topk_group
        if n < 1 or E % n or E // n < 2 or not 1 <= best <= n:
            raise UserError(f"{path} cannot be used: its router takes {best} of {n} groups of {E} experts "
                            "(topk_group, n_group, num_experts), and groups must be equal, of two experts or more")
        size = E // n * best
    if not 1 <= k <= size:
        raise UserError(f"{path} cannot be used: a token takes {k} experts (num_experts_per_tok), and can choose from "
                        f"{size}")


def prepare_routers(network):
    """Make the biases of LLaDA 2's routers parameters that no training changes, so that checkpoints have them, and let
    the routers compute in float32, as its code does: rounded scores would choose other experts."""
    for name, bias in list(network.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            router = network.get_submodule(name.rpartition(".")[0])
            del router.e_score_correction_bias
            router.e_score_correction_bias = torch.nn.Parameter(bias, requires_grad=False)
            router.forward = functools.partial(without_autocast, router.forward)


def without_autocast(forward, x):
    with torch.autocast(x.device.type, enabled=False):
        return forward(x)


def separate_heads(state, settings, path):
    """Cut LLaDA 2's query_key_value into the weights of queries, keys and values. Raises UserError if they are not of
    the size that config.json says."""
    n, found = settings["num_attention_heads"], {}
    n_kv = settings.get("num_key_value_heads") or n
    for key, value in state.items():
        if ".attention.query_key_value." not in key:
            found[key] = value
            continue
        if len(value) % (n + 2 * n_kv):
            raise UserError(f"{key} of {path} has {len(value)} rows, which are not those of {n} + 2 x {n_kv} heads")
        size = len(value) // (n + 2 * n_kv)
        for letter, part in zip("qkv", value.split((n * size, n_kv * size, n_kv * size))):
            found[key.replace("attention.query_key_value", f"self_attn.{letter}_proj")] = part
    return found


EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight$")


def stacked(state, path):
    """Put the matrices of a layer's E experts together, as transformers does: gate_up_proj (E, 2 n, D) and down_proj
    (E, D, n). Raises UserError if an expert lacks one of its three matrices."""
    found, experts = {}, {}
    for key, value in state.items():
        if match := EXPERT.match(key):
            layer, i, part = match.groups()
            experts.setdefault(layer, {})[int(i), part] = value
        else:
            found[key] = value
    for layer, parts in experts.items():
        n = max(i for i, _ in parts) + 1
        if len(parts) != 3 * n:
            raise UserError(f"{path} lacks weights of the experts of {layer}: get it again")
        try:
            found[f"{layer}.gate_up_proj"] = torch.stack(
                [torch.cat((parts.pop((i, "gate")), parts.pop((i, "up")))) for i in range(n)])
            found[f"{layer}.down_proj"] = torch.stack([parts.pop((i, "down")) for i in range(n)])
        except RuntimeError:
            raise UserError(f"{path} has experts of different sizes in {layer}: get it again")
    return found
