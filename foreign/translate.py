"""Translate other projects' checkpoints into ours: find the format, rename the weights, add what the file leaves out.

files.py reads the checkpoints. ddit.py translates the network that most of them share.

    format          project                                      what the network is here
    nanodd          github.com/flukeskywalker/nanoDD             DiT, told the step number; tied head
    tiny-diffusion  github.com/nathan-barry/tiny-diffusion       its own (tiny_diffusion.py)
    sedd            github.com/louaaron/Score-Entropy-Discrete-  DiT, told sigma; score entropy, masks or uniform noise
                    Diffusion, Hub and local runs
    oxen            github.com/Oxen-AI/Score-Entropy-Discrete-   the same; always masks and scale_by_sigma
                    Diffusion
    mdlm            github.com/kuleshov-group/mdlm, Hub and      DiT, told sigma, or folded if sigma is always 0
                    Lightning
    bd3lm           github.com/kuleshov-group/bd3lms             the same, in blocks from left to right
    duo, udlm       github.com/s-sahoo/duo, kuleshov-group/      DiT, told sigma; uniform noise
                    discrete-diffusion-guidance
    radd            github.com/ML-GSAI/RADD                      DiT without time
    gidd            github.com/dvruette/gidd, Hub                DiT, told t; masks and random tokens
    gpt2, nanogpt   GPT2LMHeadModel of transformers;             GPT-2, left to right (gpt2.py)
                    github.com/karpathy/nanoGPT
    diffugpt        github.com/HKUNLP/DiffuLLaMA, DiffuGPT       GPT-2 with full attention, masks
    masked_lm       all ...ForMaskedLM of transformers           themselves (masked_lm.py)
    llm             LLaDA, Dream, SDAR, A2D of ZHZisZZ/dllm;     Llama or Qwen of transformers, masks (llm.py)
                    ...ForCausalLM of transformers, to train

Sizes are read from the file. Only two formats lack some: nanoDD may lack its seq_len, and tiny-diffusion lacks its
n_head and seq_len. These get defaults. The mask becomes the last token and is never predicted.
"""

import argparse
import math
import re

import torch
import torch.nn.functional as F

from cli import UserError, first_line, note, number
from configs import Config
from data.tokenizer import KNOWN, CharTokenizer, characters
from diffusion import Noise
from foreign import ddit, gpt2, llm, masked_lm
from foreign.files import BUFFERS, plain_key, rename, tensors
from foreign.masked_lm import is_masked_lm
from foreign.tiny_diffusion import our_weights

FORMATS = ("nanodd", "tiny-diffusion", "sedd", "oxen", "mdlm", "bd3lm", "duo", "udlm", "radd", "gidd",
           "gpt2", "nanogpt", "diffugpt", "masked_lm", "llm")
# Settings that the user may override, because the file does not hold them reliably.
UNSAID = dict.fromkeys(FORMATS, ("seq_len",)) | {
    "tiny-diffusion": ("n_head", "seq_len", "prefix"), "llm": ("seq_len", "block_size")}


# ---- which format ----------------------------------------------------------------------------------------------------

NANODD_NAMES = (
    (r"^net\.", ""),
    (r"^vocab_embed\.weight", "embed.weight"),
    (r"^c_embed\.mlp\.0\.", "time_embed.fc_in."),
    (r"^c_embed\.mlp\.2\.", "time_embed.fc_out."),
    (r"^norm_final\.", "norm."),
    *ddit.NAMES[-4:],  # of the blocks
)

TINY_NAMES = (
    (r"^token_emb\.", "embed."),
    (r"^time_emb\.", "time_embed."),
    (r"^output_head\.", "head."),
    (r"\.attn\.c_([qkv])\.", r".\1."),
    (r"\.attn\.c_proj\.", ".attn_out."),
    (r"\.mlp\.c_fc\.", ".mlp_in."),
    (r"\.mlp\.c_proj\.", ".mlp_out."),
)
TINY_KEYS = {"token_emb.weight", "time_emb.weight", "blocks.0.attn.c_q.weight", "output_head.weight"}


def detect(found):
    """Return the format of what was found. Raises UserError if it is ambiguous, or unknown (naming the nearest)."""
    payload, settings = found.payload, found.settings
    if isinstance(payload, dict) and payload.get("model_cls") == "D3PMAbsorbing":
        return "nanodd"
    if isinstance(payload, dict) and TINY_KEYS <= payload.keys():
        return "tiny-diffusion"
    if is_masked_lm(settings):
        return "masked_lm"
    if llm.is_llm(settings):
        return "llm"
    state = tensors(payload)
    if {"wte.weight", "transformer.wte.weight"} & state.keys():
        return "nanogpt" if "model_args" in payload else "gpt2"
    if {"embed_tokens.weight", "denoise_model.wpe.weight"} <= state.keys():
        return "diffugpt"
    if "vocab_embed.embedding" not in state or "output_layer.linear.weight" not in state:
        raise unknown(found, state)
    if "sigma_map.mlp.0.weight" not in state:
        if "blocks.0.norm1.bias" in state:
            return "radd"
        raise unknown(found, state)
    if "p_uniform" in settings:
        return "gidd"
    named = settings.get("model_type") or (settings.get("algo") or {}).get("name") or ""
    named = named.lower() if isinstance(named, str) else ""
    named = {"duo_base": "duo", "distillation": "duo", "ot-finetune": "duo"}.get(named, named)
    if named in ("mdlm", "bd3lm", "duo", "udlm", "sedd"):
        return named
    if named:
        raise UserError(f"{found.path} has the unknown algorithm {named!r}: choose its format with --format, one of "
                        f"{', '.join(FORMATS)}")
    if settings.get("diffusion") == "uniform":
        return "udlm"
    if "parameterization" in settings:
        return "mdlm"
    if "graph" in settings:
        return "sedd"
    if isinstance(settings.get("model"), dict):
        return "oxen"
    raise UserError(f"{found.path} has the tensors of SEDD, MDLM or a similar model, but no settings say which: put "
                    "its config.json or config.yaml beside it, or use --format sedd, oxen, mdlm, bd3lm, duo or udlm")


def patterns(keys):
    """Return the set of plain keys, with N for each number of a block, without buffers."""
    return {re.sub(r"\.\d+\.", ".N.", plain_key(key)) for key in keys if not BUFFERS.search(key)}


def unknown(found, state):
    """Return the error for a state dict of no known family; it names the nearest families and the first differences."""
    payload = found.payload
    ours = patterns(state)
    if not ours:
        keys = ", ".join(map(str, list(payload)[:5])) if isinstance(payload, dict) else type(payload).__name__
        return UserError(f"{found.path} is not a checkpoint of this project or of another one that is known "
                         f"({', '.join(FORMATS)}): it contains {keys}")
    if "blocks.N.mlp_in.weight" in ours:
        return UserError(f"{found.path} has the tensors of this project's networks: the config.json that "
                         "`checkpoint.py export` wrote must be beside it")
    parts = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    sedd = patterns(ddit.shapes_of(1, 1, 1, 1))
    nano = {"net." + key.replace("vocab_embed.embedding", "vocab_embed.weight").replace("sigma_map", "c_embed")
            .replace("output_layer.", "") for key in sedd if "output_layer.linear" not in key}
    families = {"SEDD, MDLM, Duo": sedd, "RADD": patterns(ddit.shapes_of(1, 1, 1, 1, time=False, bias=True)),
                "nanoDD": nano, "tiny-diffusion": patterns(TINY_KEYS) | {f"blocks.N.{p}.weight" for p in parts}}
    near = sorted(families, key=lambda name: -len(families[name] & ours) / len(families[name] | ours))[:2]
    lacking, more = (sorted(keys)[:3] for keys in (families[near[0]] - ours, ours - families[near[0]]))
    what = [f"{verb} {', '.join(keys)}" for verb, keys in (("lacks", lacking), ("has", more)) if keys]
    if found.settings.get("model_type"):
        return UserError(f"{found.path} is a model of transformers, {masked_lm.name_of(found.settings)}: if it has a "
                         "masked language model (a class ...ForMaskedLM), use --format masked_lm; DiffuLLaMA "
                         "and DiffusionGemma are not read")
    return UserError(f"{found.path} has no known format; the most similar are {near[0]}, then {near[1]}; compared with "
                     f"the first, it {' and '.join(what)}")


def translate(found, hints):
    """Translate Found of another project into the payload of a checkpoint of ours, with its format under "foreign".

    hints: storage.Hints, what the user says of it. Raises UserError if it is of no known format, or damaged.
    """
    try:
        name = hints.format or detect(found)
    except (AttributeError, RuntimeError, TypeError):  # RuntimeError: tensors among the settings
        raise UserError(f"{found.path} has settings of an unexpected form: put the original file of settings beside it")
    said = [key for key in hints.overrides if key not in UNSAID[name]]
    if said:
        raise UserError(f"{found.path} is a checkpoint of {name} and contains its {', '.join(said)}: use --override "
                        f"only for {', '.join(UNSAID[name])}")
    try:
        if name == "nanodd":
            payload = nanodd(found, hints)
        elif name == "tiny-diffusion":
            payload = tiny(found, hints)
        elif name in ("gpt2", "nanogpt", "diffugpt"):
            payload = gpt2.translate(found, name, hints)
        elif name == "masked_lm":
            payload = masked_lm.translate(found, hints)
        elif name == "llm":
            payload = llm.translate(found, hints)
        else:
            payload = ddit.translate(found, name, hints)
        Config(**payload["config"])
    except KeyError as error:
        raise UserError(f"{found.path} looks like a checkpoint of {name} but lacks {error}")
    except (ArithmeticError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{found.path} looks like a checkpoint of {name} but is damaged: {first_line(error)}")
    return payload | {"foreign": name}


def overrides(text):
    """Parse n_head=2,seq_len=40 as {"n_head": 2, "seq_len": 40}, as an argparse type. prefix=64 stands for fixed:64."""
    known, found = sorted({key for keys in UNSAID.values() for key in keys}), {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key not in known or not equals or key in found:
            raise argparse.ArgumentTypeError(f"{part!r} is not KEY=NUMBER, once for each KEY of {', '.join(known)}")
        found[key] = number(int, 0 if key == "prefix" else 1, 10**6)(value)
    return found


# ---- nanoDD ----------------------------------------------------------------------------------------------------------


def nanodd(found, hints):
    """Translate nanoDD's ckpt.pt: model.DiT under other names, told the step number 1 ... T.

    The output is tied to the input embedding. EMA weights are by ema_pytorch. The buffers (betas, alpha_bars, inv_freq)
    follow from T and the sizes. The file has the number of its tokens but not their names: 27 are text8's, 50,257 are
    GPT-2's, unless hints.dataset, a prepared data set, has as many others. For any other number it is required.
    """
    payload = found.payload
    args, training = payload["model_args"], payload.get("training_args", {})
    V = args["vocab_size"]
    table = {KNOWN[name]["vocab_size"] + 1: (name, None) for name in ("text8", "openwebtext")}
    named = hints.dataset
    if named in ("text8", "openwebtext") and table.get(V + 1, ("",))[0] != named:
        raise UserError(f"{found.path} has {V:,} tokens, and {named} has {KNOWN[named]['vocab_size']:,}: name the "
                        "prepared data set that it was trained on with --dataset")
    meta, _ = ddit.vocabulary(V + 1, table, False, hints, found.path)
    config = dict(
        dataset=meta["name"], seq_len=training.get("seq_len", 1024 if meta["tokenizer"] == "gpt2" else 256),
        n_layer=args["n_blocks"], n_head=args["n_heads"], n_embd=args["n_embed"], n_cond=args["n_cond"],
        dropout=args["dropout"], conditioning="step",
        objective="d3pm", T=args["T"], lambda_ce=args["lambda_ce"],
    ) | hints.overrides
    ema = {key.removeprefix("ema_model."): value for key, value in payload["ema"].items()
           if key.startswith("ema_model.")}
    weights = [rename(state, NANODD_NAMES) for state in (payload["model"], ema)]
    return dict(name="nanoDD", config=config, meta=meta, model=weights[0], ema=weights[1], step=payload["iter_num"])


# ---- tiny-diffusion --------------------------------------------------------------------------------------------------


def tiny(found, hints):
    """Translate tiny-diffusion's diffusion_model.pt: the bare state dict of another network (tiny_diffusion.py).

    Its tokens are the codes of characters, one for each row of the embedding: 128 rows are ASCII. Code 0 is the mask.
    The file has neither n_head nor seq_len nor the length of the prefix that the network was trained to continue. They
    are n_embd / 64, 256 and 16, as in that project's code, unless hints say otherwise. There is no moving average,
    so the weights are used for it, too.
    """
    payload, path = found.payload, found.path
    other = [key for key, value in payload.items() if not torch.is_tensor(value)]
    if other:
        raise UserError(f"{path} looks like a checkpoint of tiny-diffusion but {other[0]!r} in it is not a tensor")
    (T, n_embd), state = payload["time_emb.weight"].shape, rename(payload, TINY_NAMES)
    n_layer = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    config = dict(
        dataset="shakespeare", seq_len=256, architecture="tiny_diffusion", n_layer=n_layer,
        n_head=max(1, n_embd // 64), n_embd=n_embd, conditioning="step", objective="d3pm", T=T,
    ) | hints.overrides
    config.setdefault("prefix", 16 if config["seq_len"] > 16 else 0)
    config["prefix"] = f"fixed:{config['prefix']}" if config["prefix"] else "none"
    if "n_head" not in hints.overrides and n_embd != 384:
        note(f"{path} does not say its n_head: {config['n_head']} is assumed; sample.py and evaluate.py change it "
             "by --override n_head=N")
    Config(**config)  # checks that n_head divides n_embd before the weights are rearranged by it
    weights = our_weights(state, config["n_head"])
    V = len(payload["token_emb.weight"]) - 1
    meta = {"name": "ascii" if V == 127 else "codes"} | characters("".join(map(chr, range(1, V + 1))))
    return dict(name="tiny-diffusion", config=config, meta=meta, model=weights, ema=weights, step=0)


# ---- do the weights make sense? --------------------------------------------------------------------------------------

ENGLISH = ("the old man walked slowly down the road to the village where his sister lived with her three children and "
           "when he came to the bridge over the river he stopped for a while to look at the water and the small boats "
           "and thought about the years that had gone by since he was last at home for it was a long time and the "
           "people there would hardly know him now but he went on all the same because he had nowhere else to go")
TOKEN_NATS = 7.0  # entropy of single GPT-2 tokens in English prose, nats (LOG.md)


@torch.no_grad()
def plausible(model, objective, tokenizer, seq_len, device):
    """Return two cross-entropies in nats for an English text: of the network, and of the token frequencies alone.

    The network predicts every seventh token given the others. A trained network is far below the frequencies; one whose
    weights were mixed up is not. With uniform noise the tokens stay as they are, and the network is told a rate of 1/7.
    """
    x0 = torch.from_numpy(tokenizer.encode(ENGLISH).astype("int64"))[:seq_len].to(device)[None]
    where = torch.zeros_like(x0, dtype=torch.bool)
    where[:, 3::7] = True
    t = objective.time(torch.tensor([1 / 7], dtype=torch.float64)).to(device)
    if objective.random_tokens:
        sigma = torch.full(x0.shape, -math.log(6 / 7), device=device)
        logits = objective.prediction(model(x0, t), x0, sigma).clamp(min=1e-9).log()[where]
    else:
        logits = objective.predict(model, x0, Noise(where, t, t))
    ce = F.cross_entropy(logits.float(), x0[where]).item()
    if not isinstance(tokenizer, CharTokenizer):
        return ce, TOKEN_NATS
    share = torch.bincount(x0[0].cpu()).double() / x0.shape[1]
    return ce, -torch.xlogy(share, share).sum().item()


def warn_if_implausible(model, objective, tokenizer, config, device, path):
    """Warn on stderr if the loss on English text exceeds that of frequencies. Raises UserError if it is not finite."""
    if config.seq_len < 8:
        return
    ce, level = plausible(model, objective, tokenizer, config.seq_len, device)
    if not math.isfinite(ce):
        raise UserError(f"the outputs of the network of {path} are not finite: its weights are damaged")
    if ce > level:
        note(f"the weights of {path} look wrong or untrained: the cross-entropy of an English text is "
             f"{ce / math.log(2):.1f} bits per {tokenizer.unit}, and the frequencies of its {tokenizer.unit}s alone "
             f"give {level / math.log(2):.1f}")
