"""Other projects' checkpoints, translated into ours: key names, conventions, and what they leave unsaid.

nanoDD (github.com/flukeskywalker/nanoDD), ckpt.pt: the same network under other names, fed the step number 1 ... T; the
output is tied to the input embedding; EMA weights by ema_pytorch. Its buffers (betas, alpha_bars, inv_freq) follow from
T and the sizes, so they are dropped.
"""

import re

from cli import UserError
from data.tokenizer import KNOWN

NANODD_NAMES = (
    (r"^net\.", ""),
    (r"^vocab_embed\.weight", "embed.weight"),
    (r"^c_embed\.mlp\.0\.", "time_embed.fc_in."),
    (r"^c_embed\.mlp\.2\.", "time_embed.fc_out."),
    (r"^norm_final\.", "norm."),
    (r"adaLN_modulation\.", "modulation."),
    (r"\.attn_qkv\.", ".qkv."),
    (r"\.mlp\.0\.", ".mlp_in."),
    (r"\.mlp\.2\.", ".mlp_out."),
)


def translate(payload, path, dataset=None):
    """A foreign payload -> one of ours (checkpoint.py). Raises UserError if it is of no known kind."""
    if isinstance(payload, dict) and payload.get("model_cls") == "D3PMAbsorbing":
        return nanodd(payload, path, dataset)
    keys = ", ".join(map(str, list(payload)[:5])) if isinstance(payload, dict) else type(payload).__name__
    raise UserError(f"{path} is neither a checkpoint of this project nor of nanoDD (it holds: {keys})")


def nanodd(payload, path, dataset=None):
    """nanoDD's ckpt.pt. dataset: text8 or openwebtext; by default the one that has its vocabulary size."""
    try:
        args, training = payload["model_args"], payload.get("training_args", {})
        V = args["vocab_size"]
        if dataset not in KNOWN:  # the user's own data: the checkpoint's is recognised by its vocabulary
            dataset = next((name for name, meta in KNOWN.items() if meta["vocab_size"] == V), "text8")
        defaults = {"text8": 256, "openwebtext": 1024}
        config = dict(
            dataset=dataset, seq_len=training.get("seq_len", defaults.get(dataset, 256)),
            n_layer=args["n_blocks"], n_head=args["n_heads"], n_embd=args["n_embed"], n_cond=args["n_cond"],
            dropout=args["dropout"], conditioning="step",
            objective="d3pm", T=args["T"], lambda_ce=args["lambda_ce"],
        )
        ema = {key.removeprefix("ema_model."): value for key, value in payload["ema"].items()
               if key.startswith("ema_model.")}
        weights = [rename(state, NANODD_NAMES) for state in (payload["model"], ema)]
        step = payload["iter_num"]
    except KeyError as error:
        raise UserError(f"{path} looks like a nanoDD checkpoint but lacks {error}")
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} looks like a nanoDD checkpoint but is damaged: {error}")
    meta = dict(KNOWN.get(dataset, {}), name=dataset)
    if meta.get("vocab_size") != V:
        raise UserError(f"{path} has a vocabulary of {V:,}, which is not {dataset}'s: name its data set with --dataset "
                        f"({' or '.join(KNOWN)})")
    return dict(name="nanoDD", config=config, meta=meta, model=weights[0], ema=weights[1], step=step)


def rename(state, names):
    """Apply the (pattern, replacement) pairs to the keys of a state dict, without its buffers and wrapper prefixes."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("_orig_mod.", "").replace("module.", "")
        if key in ("betas", "alpha_bars") or key.endswith("inv_freq"):
            continue
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed
