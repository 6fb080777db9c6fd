"""Translate checkpoints of SEDD's network ("DDiT") into our names and conventions, for model.DiT.

MDLM, BD3-LM, Duo, UDLM, RADD and GIDD took over that network.
"""

import json

import torch
import torch.nn.functional as F

from cli import UserError, first_line, note
from data.loader import load_meta
from data.tokenizer import KNOWN, TOKENS
from foreign.files import BUFFERS, check_floats, rename, tensors

NAMES = (
    (r"^vocab_embed\.embedding$", "embed.weight"),
    (r"^sigma_map\.mlp\.0\.", "time_embed.fc_in."),
    (r"^sigma_map\.mlp\.2\.", "time_embed.fc_out."),
    (r"^output_layer\.norm_final\.", "norm."),
    (r"^output_layer\.linear\.weight$", "head_weight"),
    (r"^output_layer\.linear\.bias$", "head_bias"),
    (r"^output_layer\.", ""),
    (r"adaLN_modulation\.", "modulation."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.mlp\.0\.", ".mlp_in."),
    (r"\.mlp\.2\.", ".mlp_out."),
)


def shapes_of(rows, D, C, n_layer, time=True, bias=False):
    """Return {key: shape} of all parameters in the order of registration, which averages saved as a list have too."""
    shapes = {"vocab_embed.embedding": (rows, D)}
    if time:
        shapes |= {"sigma_map.mlp.0.weight": (C, 256), "sigma_map.mlp.0.bias": (C,),
                   "sigma_map.mlp.2.weight": (C, C), "sigma_map.mlp.2.bias": (C,)}

    def norm(key):
        return {f"{key}.weight": (D,)} | ({f"{key}.bias": (D,)} if bias else {})

    def modulation(key, n):
        return {f"{key}.adaLN_modulation.weight": (n * D, C), f"{key}.adaLN_modulation.bias": (n * D,)} if time else {}

    for i in range(n_layer):
        block = {**norm("norm1"), "attn_qkv.weight": (3 * D, D), "attn_out.weight": (D, D), **norm("norm2"),
                 "mlp.0.weight": (4 * D, D), "mlp.0.bias": (4 * D,), "mlp.2.weight": (D, 4 * D), "mlp.2.bias": (D,)}
        shapes |= {f"blocks.{i}.{key}": shape for key, shape in block.items()} | modulation(f"blocks.{i}", 6)
    return shapes | norm("output_layer.norm_final") | {
        "output_layer.linear.weight": (rows, D), "output_layer.linear.bias": (rows,)} | modulation("output_layer", 2)


def averages(payload, state, path):
    """Return the moving average as a state dict; Lightning and SEDD save a list in the order of the parameters."""
    average = payload.get("ema")
    shadow = average.get("shadow_params") if isinstance(average, dict) else None
    if shadow is None:
        if "ema" in payload:
            note(f"{path} has no moving average under 'ema': its raw weights are used instead")
        return state
    if len(shadow) != len(state) or any(a.shape != b.shape for a, b in zip(shadow, state.values())):
        wrong = next((key for (key, b), a in zip(state.items(), shadow) if a.shape != b.shape), "their number")
        raise UserError(f"{path} has a moving average that does not fit its weights: {len(shadow)} tensors for "
                        f"{len(state)} parameters, first difference: {wrong}")
    return dict(zip(state, shadow))


def check_names(state, shapes, path):
    """Raise a UserError that names keys which are missing, unexpected or of another shape, if there are any."""
    found = {key: tuple(value.shape) for key, value in state.items()}
    wrong = [f"{key} is missing" if key not in found else f"{key} is unexpected" if key not in shapes else
             f"{key} is {found[key]}, expected {shapes[key]}"
             for key in shapes | found if shapes.get(key) != found.get(key)]
    if wrong:
        raise UserError(f"{path} does not fit its format: {'; '.join(wrong[:3])}"
                        + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def fold(state, n_layer):
    """Turn weights of a network that is always told sigma = 0 into those of the same function without a time.

    The shifts, scales and gates are then constants. LN(x) w (1 + scale) + shift is a norm with a bias. A gate is a
    factor of the rows of the layer before it. Keys and conventions are ours (DiT with norm_bias). Computed in float64.
    """
    state = {key: value.double() for key, value in state.items()}
    c = torch.cat((torch.ones(128), torch.zeros(128))).double()  # cos 0 and sin 0
    for layer in ("fc_in", "fc_out"):
        c = F.silu(state.pop(f"time_embed.{layer}.weight") @ c + state.pop(f"time_embed.{layer}.bias"))

    def modulation(prefix, n):
        return (state.pop(f"{prefix}modulation.weight") @ c + state.pop(f"{prefix}modulation.bias")).chunk(n)

    for i in range(n_layer):
        block = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(block, 6)
        state[block + "norm1.weight"] *= 1 + scale1
        state[block + "norm1.bias"] = shift1
        state[block + "attn_out.weight"] *= gate1[:, None]
        state[block + "norm2.weight"] *= 1 + scale2
        state[block + "norm2.bias"] = shift2
        state[block + "mlp_out.weight"] *= gate2[:, None]
        state[block + "mlp_out.bias"] *= gate2
    shift, scale = modulation("", 2)
    state["norm.weight"] *= 1 + scale
    state["norm.bias"] = shift
    return {key: value.float() for key, value in state.items()}


def mask_last(state, mask):
    """Move the mask's row (number `mask`; None: no mask) to the end of the embedding, and drop it from the head."""
    if mask is None:
        return state
    others = [i for i in range(len(state["embed.weight"])) if i != mask]
    return state | {"embed.weight": state["embed.weight"][[*others, mask]], "head_weight": state["head_weight"][others],
                    "head_bias": state["head_bias"][others]}


# Number of rows -> (name of the vocabulary in KNOWN, row of the mask).
WITH_MASK = {28: ("text8", 27), 35: ("text8_framed", 4), 50258: ("openwebtext", 50257), 30522: ("bert", 103)}
WITHOUT_MASK = {27: ("text8", None), 35: ("text8_framed_uniform", None), 50257: ("openwebtext", None),
                50258: ("gpt2_padded", None), 30522: ("bert_uniform", None)}
GIDD = {50258: ("openwebtext", 50257), 50259: ("gpt2_padded", 50258)}
# The data set of a vocabulary, where its name differs.
DATA_OF = {"text8_framed": "text8", "text8_framed_uniform": "text8", "gpt2_padded": "openwebtext",
           "bert": "lm1b", "bert_uniform": "lm1b", "oxen": "names", "oxen_words": "names"}
OXEN = {99: ("oxen", 98), 98: ("oxen_words", 97), 3: ("ox", 2)}


def vocabulary(rows, table, uniform, hints, path):
    """Return (meta of the tokens, the mask's row) for a number of rows; `table` has the known numbers.

    hints.dataset, which the user names, takes precedence if it has as many tokens, but not those of `table`. Raises
    UserError if `table` lacks the number of rows, and the user names no data set, or one with another number of tokens.
    """
    dataset = hints.dataset
    last = None if uniform else rows - 1
    known, mask = table.get(rows, (None, last))
    V, theirs = rows - (not uniform), None
    if dataset and (dataset not in KNOWN or not known):
        meta = load_meta(dataset, hints.data_dir) | {"name": dataset}
        theirs = {key: meta[key] for key in ("name", *TOKENS, "pad", "record") if key in meta}
    if known:
        meta = dict(KNOWN[known], name=DATA_OF.get(known, known))
        same = theirs and theirs["tokenizer"] == meta["tokenizer"] and (
            set(theirs.get("alphabet", "")) <= set(meta.get("alphabet", "")))
        if theirs and theirs["vocab_size"] == V and not same:
            return theirs, last
        return meta, mask
    if not theirs:
        raise UserError(f"{path} has {V:,} tokens, and does not say which: name the prepared data set that it was "
                        "trained on with --dataset")
    if theirs["vocab_size"] != V:
        raise UserError(f"{path} has {V:,} tokens and data set {dataset!r} has {theirs['vocab_size']:,}: name the "
                        "prepared data set that it was trained on with --dataset")
    return theirs, mask


def truth(value):
    """Return a setting as a bool. Raises ValueError if it is neither true nor false."""
    if value not in (True, False, "True", "False", "true", "false"):
        raise ValueError(f"{value!r} must be true or false")
    return value in (True, "True", "true")


def process_of(name, settings, path):
    """Return the fields of Config that say how a checkpoint was trained: objective, noise, schedule, conditioning.

    name: the format. settings: as saved with the checkpoint. Raises UserError for settings that are not known here.
    """
    def refuse(what):
        raise UserError(f"{path} is a checkpoint of {name} with {what}, which is not supported")

    if name == "gidd":
        share = settings["p_uniform"]
        if type(share) not in (int, float) or not (share == 0 or 1e-3 <= share <= 0.999):
            raise ValueError(f"p_uniform is {share!r}, not 0 or a number from 0.001 to 0.999")
        mixed = dict(noise="hybrid", uniform_share=float(share), schedule=f"gidd:{share}") if share else {}
        return dict(objective="mdlm", conditioning="unscaled_time") | mixed
    algo = settings.get("algo") or settings
    noise = settings.get("noise") or {}
    kind = str(noise.get("type", "loglinear")).replace("-", "").lower()
    schedule = {"loglinear": "loglinear",
                "geometric": f"geometric:{noise.get('sigma_min')}:{noise.get('sigma_max')}"}.get(kind)
    timed = truth(algo.get("time_conditioning", name in ("duo", "udlm", "sedd", "oxen")))
    if any(truth(algo.get(key, False)) for key in ("causal", "causal_attention")) or not truth(algo.get("adaln", True)):
        refuse("causal attention or without modulations")
    if name == "oxen":
        return dict(objective="sedd", conditioning="sigma", schedule="loglinear")
    if name == "sedd":
        uniform = (settings.get("graph") or {}).get("type", "absorb") == "uniform"
        if schedule is None:
            refuse(f"noise {kind!r}")
        return dict(objective="sedd", conditioning="sigma", schedule=schedule, noise="uniform" if uniform else "mask",
                    scale_by_sigma=uniform or truth((settings.get("model") or {}).get("scale_by_sigma", True)))
    if name in ("duo", "udlm"):
        if kind != "loglinear":
            refuse(f"noise {kind!r}")
        return dict(objective="mdlm", noise="uniform", conditioning="sigma" if timed else "constant",
                    schedule="loglinear")
    parameterization = algo.get("parameterization", "subs")
    if parameterization not in ("subs", "sedd", "score") or algo.get("T") or settings.get("T"):
        refuse(f"parameterization {parameterization!r} and T = {algo.get('T', 0)}")
    if name == "bd3lm" and timed and "parameterization" not in algo:
        raise UserError(f"{path} is told the time, and does not say with which loss it was trained: use --format mdlm, "
                        "or --format sedd for kuleshov-group/sedd-noeos-owt")
    if not timed or name == "radd":
        return dict(objective="mdlm", conditioning="none", schedule="linear")
    if schedule is None or (settings.get("training") or {}).get("change_of_variables"):
        refuse(f"time conditioning and noise {kind!r}")
    return dict(objective="mdlm" if parameterization == "subs" else "sedd", conditioning="sigma", schedule=schedule)


def heads_of(buffers, D):
    """Return the number of heads that the tables of rotary embeddings in a file belong to, or None without tables."""
    for key, table in buffers.items():
        if key.endswith("inv_freq"):
            return D // (2 * len(table))
        if key.endswith("cos_cached"):
            return D // table.shape[-1]


def check_mask(path, mask):
    """Raise UserError if a tokenizer.json beside the weights names another row than `mask` for [MASK]."""
    file = path.parent / "tokenizer.json"
    if not file.is_file():
        return
    try:
        added = json.loads(file.read_text(encoding="utf-8"))["added_tokens"]
        said = {token["content"]: token["id"] for token in added}["[MASK]"]
    except (KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not say which token is [MASK]: get it again ({first_line(error)})")
    if said != mask:
        raise UserError(f"{file} says that [MASK] is token {said}, and in {path} it is {mask}: the two files do not "
                        "belong together")


def translate(found, name, hints):
    """Translate SEDD, Oxen, MDLM, BD3-LM, Duo, UDLM, RADD or GIDD: one network, told sigma, t or no time."""
    payload, settings, path = found
    state = {key: value for key, value in tensors(payload).items() if not BUFFERS.search(key)}
    rows, D = state["vocab_embed.embedding"].shape
    n_layer = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    time = name != "radd"
    C = len(state["sigma_map.mlp.0.weight"]) if time else 1
    shapes = shapes_of(rows, D, C, n_layer, time, bias=name == "radd")
    check_names(state, shapes, path)
    raw = {key: state[key] for key in shapes}
    average = averages(payload, raw, path)
    for kind in (raw, average):
        check_floats(kind, path)

    sizes = settings.get("model") if isinstance(settings.get("model"), dict) else settings
    if name == "gidd":
        if settings.get("vocab_size", rows) != rows:
            raise UserError(f"{path} has {rows:,} tokens, and its settings say {settings['vocab_size']}")
        sizes = {"n_heads": settings["num_attention_heads"], "n_blocks": settings["num_hidden_layers"],
                 "length": settings["max_seq_len"]}
    n_head = heads_of(tensors(payload), D) or sizes.get("n_heads")
    seq_len = hints.overrides.get("seq_len") or sizes.get("length") or sizes.get("model_length")
    if not n_head:
        raise UserError(f"{path} does not say its number of heads: put its config.json or config.yaml beside it")
    if sizes.get("n_heads", n_head) != n_head:
        raise UserError(f"{path} has rotary frequencies of {n_head} heads, and its settings say {sizes['n_heads']}")
    if sizes.get("n_blocks", n_layer) != n_layer:
        raise UserError(f"{path} has {n_layer} blocks, and its settings say {sizes['n_blocks']}: a part is missing")
    if not seq_len:
        raise UserError(f"{path} does not say its sequence length: use --override seq_len=N, such as seq_len=1024")
    process = process_of(name, settings, path)
    uniform = process.get("noise") == "uniform"
    table = WITHOUT_MASK if uniform else {"oxen": OXEN | WITH_MASK, "gidd": GIDD}.get(name, WITH_MASK)
    meta, mask = vocabulary(rows, table, uniform, hints, path)
    if name == "gidd":
        check_mask(path, mask)
    config = dict(dataset=meta["name"], seq_len=int(seq_len), n_layer=n_layer, n_head=int(n_head), n_embd=D, n_cond=C,
                  tied=False, head_bias=True, norm_bias=process["conditioning"] == "none",
                  T=int((settings.get("sampling") or {}).get("steps") or 1000)) | process
    weights = [mask_last(rename(kind, NAMES), mask) for kind in (raw, average)]
    if process["conditioning"] == "none" and time:
        weights = [fold(kind, n_layer) for kind in weights]
    in_blocks = truth((settings.get("algo") or settings).get("cross_attn", True))  # else its attention is full
    block_size = settings.get("block_size", seq_len) if in_blocks else int(seq_len)
    if name == "bd3lm" and (type(block_size) is not int or block_size < 1):
        raise UserError(f"{path} has block_size={block_size!r}, which is not a number of tokens")
    if name == "bd3lm" and block_size < int(seq_len):
        if process["conditioning"] != "none":
            raise UserError(f"{path} is told one time for all of its blocks, which is not known here")
        config |= dict(objective="block", block_size=block_size, time_sampling="stratified")
    step = payload.get("global_step", payload.get("step", 0))
    return dict(name=name, config=config, meta=meta, model=weights[0], ema=weights[1],
                step=step if isinstance(step, int) else 0)
