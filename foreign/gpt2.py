"""GPT-2 and nanoGPT's network (github.com/karpathy/nanoGPT), to train them or to use their checkpoints.

It is model.DiT without time, with learned positions instead of rotations and with biases in all layers. Its weights are
those of a left-to-right model (objective=ar). With predict_next they become those of a diffusion model (adapt.py), as
those of DiffuGPT are (github.com/HKUNLP/DiffuLLaMA, arXiv 2410.17891).
"""

import re

import torch
import torch.nn as nn
import torch.nn.functional as F

from cli import UserError
from foreign.ddit import vocabulary
from foreign.files import rename, tensors
from model import Block, DiT

END = 50256      # GPT-2's end-of-text, which stands before every text
ROUNDED = 50304  # rows of nanoGPT's models of GPT-2's tokens: the last 47 are no tokens
MASK = 10541     # the mask of DiffuGPT's small model, a rare token of GPT-2; the medium one has a new token, 50257


class GPT2Block(Block):
    """model.Block with biases in all layers (or none at all)."""

    def __init__(self, config, n_cond):
        super().__init__(config, n_cond)
        for name in ("qkv", "attn_out", "mlp_in", "mlp_out"):
            layer = getattr(self, name)
            setattr(self, name, nn.Linear(layer.in_features, layer.out_features, config.norm_bias))


class NanoGPTBlock(GPT2Block):
    def mlp(self, x):
        return self.mlp_out(F.gelu(self.mlp_in(x)))  # the exact function; GPT-2 has the approximation by tanh


class GPT2(DiT):
    """Denoiser, or left-to-right model, over V = vocab_size tokens and the mask, which is also the start of a text.

    positions.weight has a row for each token of a text, and one for the mask before it, if that is an input.
    """

    block, own, of_source = GPT2Block, (), ("n_layer", "n_head", "n_embd", "norm_bias")

    @classmethod
    def misfit(cls, config):
        if (config.conditioning != "none" or config.objective_class.random_tokens or not config.tied
                or config.head_bias or config.shift_tokens):
            return (f"architecture={config.architecture} needs conditioning=none, noise=mask, and the defaults of "
                    "tied, head_bias and shift_tokens")
        return super().misfit(config)

    def __init__(self, vocab_size, config):
        super().__init__(vocab_size, config)
        self.positions = nn.Embedding(config.seq_len + config.predict_next, config.n_embd)
        self.init_weights()

    def embedded(self, xt, positions):
        return self.embed(xt).float() + self.positions(positions)

    def angles(self, positions):
        return None, None


class NanoGPT(GPT2):
    block = NanoGPTBlock


# ---- checkpoints -----------------------------------------------------------------------------------------------------

NAMES = (
    (r"^(transformer|denoise_model)\.", ""),
    (r"^(wte|embed_tokens)\.", "embed."),
    (r"^wpe\.", "positions."),
    (r"^ln_f\.", "norm."),
    (r"^h\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.c_attn\.", ".qkv."),
    (r"\.attn\.c_proj\.", ".attn_out."),
    (r"\.mlp\.c_fc\.", ".mlp_in."),
    (r"\.mlp\.c_proj\.", ".mlp_out."),
)
LEFT_OUT = re.compile(r"(^|\.)attn\.(masked_)?bias$|^lm_head\.weight$")  # causal masks; the head, which is tied


def our_weights(state, name, path):
    """Turn a state dict of the format `name` into ours. nanoGPT's matrices are (outputs, inputs), as ours are; those of
    the other formats are (inputs, outputs).

    The embedding gets a row for the mask, which also stands before every text. DiffuGPT has one, which is copied if it
    is that of an ordinary token. GPT-2 was trained on texts after end-of-text, so it is a copy of that row. Other
    vocabularies have no such token: it is the mean of all rows.
    """
    key = "embed_tokens.weight" if name == "diffugpt" else "transformer.wte.weight"
    head, tokens = state.get("lm_head.weight"), state["wte.weight" if "wte.weight" in state else key]
    if head is not None and not torch.equal(head, tokens):
        raise UserError(f"{path} has a head of its own: lm_head.weight differs from the embeddings, and GPT-2's head "
                        "has the same weights as they")
    tokens = tokens[:END + 1] if len(tokens) == ROUNDED else tokens
    ours = rename({key: value for key, value in state.items() if not LEFT_OUT.search(key)}, NAMES)
    if name != "nanogpt":
        ours = {key: value.T if value.dim() == 2 and key.startswith("blocks.") else value
                for key, value in ours.items()}
    if name == "diffugpt":
        if len(tokens) <= END:
            raise UserError(f"{path} has {len(tokens):,} tokens, and DiffuGPT has those of GPT-2")
        mask, tokens = tokens[MASK if len(tokens) == END + 1 else END + 1], tokens[:END + 1]
    else:
        mask = tokens[END] if len(tokens) == END + 1 else tokens.float().mean(0).to(tokens.dtype)
    ours["embed.weight"] = torch.cat((tokens, mask[None]))
    return ours


def translate(found, name, hints):
    """Translate GPT2LMHeadModel of transformers ("gpt2"), nanoGPT's ckpt.pt ("nanogpt") or DiffuGPT ("diffugpt").

    The first two do not name their tokens: 50,257 or 50,304 rows are GPT-2's, others those of the data set that the
    user names. nanoGPT rounds the number of rows up. Rows that are no tokens are cut off, so they get no probability.
    """
    state, settings = tensors(found.payload), found.settings
    if name == "nanogpt":
        args = found.payload["model_args"]
        sizes = {"n_layer": args["n_layer"], "n_head": args["n_head"], "bias": args["bias"]}
        step = found.payload.get("iter_num", 0)
    else:
        # The values of GPT-2 itself, the default first. The two names of the activation mean the same function.
        allowed = {"activation_function": ("gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (True,),
                   "n_inner": (None, 4 * settings.get("n_embd", 0)), "scale_attn_by_inverse_layer_idx": (False,),
                   "layer_norm_epsilon": (1e-5,)}
        other = [f"{key}={settings[key]}" for key, values in allowed.items()
                 if settings.get(key, values[0]) not in values]
        if other:
            raise UserError(f"{found.path} is a variant of GPT-2 that is not supported: {', '.join(other)}")
        sizes, step = {"n_layer": settings["n_layer"], "n_head": settings["n_head"], "bias": True}, 0
    weights = our_weights(state, name, found.path)
    (rows, n_embd), V = weights["positions.weight"].shape, len(weights["embed.weight"]) - 1
    first = int(name == "diffugpt")  # with predict_next, the mask before the text has a position, too
    seq_len = hints.overrides.get("seq_len", rows - first)
    if seq_len > rows - first:
        raise UserError(f"{found.path} has {rows:,} positions: use --override seq_len={rows - first} or less")
    weights["positions.weight"] = weights["positions.weight"][:seq_len + first].clone()
    meta, _ = vocabulary(V + 1, {50258: ("openwebtext", None)}, False, hints, found.path)
    config = dict(dataset=meta["name"], seq_len=seq_len, n_layer=sizes["n_layer"], n_head=sizes["n_head"],
                  n_embd=n_embd, norm_bias=bool(sizes["bias"]), conditioning="none")
    config |= (dict(architecture="gpt2", objective="mdlm", predict_next=True) if name == "diffugpt" else
               dict(architecture=name, objective="ar"))
    return dict(name=name, config=config, meta=meta, model=weights, ema=weights, step=step)
