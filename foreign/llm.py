"""LLaDA, Dream, SDAR and other diffusion models that have the network of a large language model, as denoisers.

LLaDA (arXiv 2502.09992) is a Llama and Dream (arXiv 2508.15487) a Qwen2 in which every token sees all others. SDAR
(arXiv 2510.06303) is a Qwen3 for block diffusion: a token sees its block and the blocks before. LLaDA-MoE, LLaDA 2
(llada.py) and the largest SDAR are mixtures of experts. So transformers has their networks (see_all). What differs from
masked_lm.py:

tokens     Special tokens are tokens like others, because conversations are written with them. Only the mask is not.
shift      Dream's output at a token predicts the one on its right, as in the language model that it began with
           (predict_next). So a token must stand before the text: the begin of text, or the mask.
blocks     With objective=block nothing is put around a text, and `read` gives the network a table of what each token
           sees. Keys and values of the blocks before are kept in the cache of transformers.
weights    They are only renamed, because they have billions of numbers, and those of the experts of a layer are put
           together (llada.stacked). The tokenizer and config.json say the rest.

A left-to-right model (Llama, Qwen) is read in the same way, with predict_next. It is no denoiser before it is trained
as one (docs/adaptation.md).
"""

import inspect
import json
import re

import torch
import torch.nn.functional as F

from attention import Past, beside_clean, of_blocks, table
from cli import UserError, note
from data.tokenizer import HubTokenizer, definition_of, from_hub, hub_meta
from foreign import llada
from foreign.files import check_floats, rename, tensors
from foreign.masked_lm import (NOT_KEPT, SIZES, MaskedLM, build, frame_of, longest_text, name_of, read_backbone,
                               read_settings)

LONGEST = 4096  # tokens of a text if the user does not say; some networks have positions for 131,072
# Families of transformers that see_all works with, as the tests check. Some others see the left side all the same.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt_neox", "olmo2", "smollm3")
WHOLE_TEXT = {"sliding_window": None, "use_sliding_window": False, "layer_types": None}  # no windows of attention


class LLM(MaskedLM):
    """Denoiser over V = vocab_size tokens and the mask (id V), which is not told the time. See MaskedLM.

    block_size: as in model.DiT."""

    large = takes_blocks = True
    task, example = "AutoModelForCausalLM", "hf://Qwen/Qwen3-0.6B"
    defaults = ("tied", "head_bias", "norm_bias", "shift_tokens")

    @classmethod
    def from_config(cls, config, vocab_size):
        network = super().from_config(config, vocab_size)
        network.block_size = config.block_size
        return network

    @classmethod
    def misfit(cls, config):
        if config.block_size and (config.predict_next or config.anneal_steps):
            return "predict_next and anneal_steps are for whole texts: use objective=mdlm, or leave them out"
        if config.anneal_steps and not config.predict_next:
            return "anneal_steps needs predict_next with architecture=llm"
        if config.predict_next and config.backbone:
            before, after = (read_backbone(config.backbone)[key] for key in ("before", "after"))
            if not before:
                return "predict_next needs a token before the text, and this checkpoint has none: leave it out"
            if config.anneal_steps and len(before + after) != 1:
                return ("anneal_steps needs one token around a text, the one before it, and the tokenizer of this "
                        f"checkpoint puts {len(before)} before and {len(after)} after it: leave it out")
        return super().misfit(config)

    def __init__(self, vocab_size, model, *others):
        super().__init__(vocab_size, see_all(model), *others)
        llada.prepare_routers(self)
        self.block_size = 0

    def trunk(self, xt, sees=None, past=None, clean=None):
        """Tokens xt (B, L) -> features (B, L, D), the input of the head. sees: as in MaskedLM. past, clean: as in
        model.DiT.forward, with block_size."""
        return self.read(xt, past, clean)[0] if self.block_size else super().trunk(xt, sees)

    def remember(self, xt, t, past=None):
        """Read whole blocks xt (B, L) after a past, and return the `past` for calls on the tokens that follow."""
        return self.read(xt, past, keep=True)[1]

    def read(self, xt, past=None, clean=None, keep=False):
        """Read tokens xt (B, L) in blocks: features (B, L, D), and with `keep` the Past of each layer.

        With `clean` one pass reads the clean text and then the noisy one, each at the positions 0 ... L - 1. A clean
        token sees the clean tokens of its block and of those before.
        """
        L, n, device = xt.shape[1], self.block_size, xt.device
        P = 0 if past is None else past[0].keys.shape[2]
        positions, sees = P + torch.arange(L, device=device), table(of_blocks(n, P), L, P + L, device)
        if clean is not None and L > n:  # else there is one block, which sees no clean one
            xt, positions = torch.cat((clean, xt), 1), positions.repeat(2)
            sees = torch.cat((F.pad(sees, (0, L)), table(beside_clean(n, L), L, 2 * L, device)))
        x, past = self.features(self.ids[xt], positions, sees, past, keep)
        return x[:, -L:], past

    def features(self, ids, positions, sees, past, keep):
        """Run the layers on ids (B, n) at these positions (n,), after a past of P tokens: features (B, n, D), and with
        `keep` the Past of each layer. sees: as in attention.Layout, (n, P + n) bool."""
        more = {"use_cache": False}
        if past is not None or keep:
            from transformers import DynamicCache
            cache = DynamicCache()
            for i, layer in enumerate(past or ()):
                cache.update(layer.keys, layer.values, i)
            its_name = {"cache", "past_key_values"} & inspect.signature(self.body.forward).parameters.keys()
            more = {its_name.pop(): cache, "use_cache": True}  # the first is that of newer versions
        x = self.body(input_ids=ids, attention_mask=sees[None, None], position_ids=positions[None], **more)[0]
        return x, [Past(layer.keys, layer.values) for layer in cache.layers] if keep else None

    def within(self, xt, t, where, window, outside=None):
        """Logits (N, V) at the True positions of `where` (B, L), which are in the window a ... b - 1 of texts (B, L),
        and `outside`, the Past of the tokens outside the window in each layer.

        Without `outside` all tokens are read. With that of an earlier call only the window is. Its tokens see the
        others as they were in that call: the dual cache of Fast-dLLM (arXiv 2505.22618).
        """
        a, b = window
        start, end = self.n_before + a - self.predict_next, self.n_before + b  # with predict_next, a - 1 predicts a
        ids = self.framed(xt)
        n, positions = ids.shape[1], torch.arange(ids.shape[1], device=xt.device)
        with self.precision(xt.device.type):
            here = positions if outside is None else positions[start:end]
            sees = here.new_ones(len(here), n, dtype=torch.bool)
            x, past = self.features(ids[:, here], here, sees, outside, keep=outside is None)
            if outside is None:
                x, there = x[:, start:], torch.cat((positions[:start], positions[end:]))
                outside = [Past(layer.keys[:, :, there], layer.values[:, :, there]) for layer in past]
            return self.predict(x[:, :b - a], where[:, a:b]), outside

    def flops(self, seq_len, predicted=1.0):
        """Count the operations of a training step per token as MaskedLM.flops does. Block diffusion reads the clean
        text, too. Of a layer's experts only those that a token takes count."""
        settings, reads_clean = self.body.config, 0 < self.block_size < seq_len
        experts = [p for p in self.body.parameters() if p.dim() == 3]
        taken = sum(p[0].numel() for p in experts) * getattr(settings, "num_experts_per_tok", 0)
        of_clean = 6 * sum(weight.numel() for weight in self.matrices()) if reads_clean else 0
        return super().flops(seq_len, predicted) + of_clean + 6 * taken * (1 + reads_clean)


def see_all(model):
    """Let every token of a model of transformers see all others. Newer versions need only is_causal in its settings."""
    model.config.is_causal = False
    for part in model.modules():
        if hasattr(part, "is_causal"):
            part.is_causal = False
    return model


# ---- checkpoints -----------------------------------------------------------------------------------------------------

GPT_NEOX_BUFFERS = re.compile(r"\.attention\.(masked_)?bias$")  # of Pythia's files
BLOCKS = {"sdar": 4, "sdar_moe": 4, "llada2_moe": 32}  # {model_type: tokens of a block, if nothing says it}


def is_llm(settings):
    """Tell whether a config.json is of a denoiser (is_denoiser), or of a left-to-right model of transformers."""
    architectures = settings.get("architectures")
    return is_denoiser(settings) or (
        isinstance(architectures, list) and any(str(name).endswith("ForCausalLM") for name in architectures))


def is_denoiser(settings):
    """Tell whether a config.json is that of a LLaDA, Dream, SDAR, or A2D of dllm, which were trained with masks."""
    kind = name_of(settings)
    return kind in llada.KINDS or kind in BLOCKS or kind == "Dream" or kind.startswith("a2d-")


def network_settings(settings, path):
    """Return (settings of transformers, whether outputs predict the next token) for a config.json, both as dicts.

    Raises UserError for variants of LLaDA that are other networks, and for other families.
    """
    kind = name_of(settings)
    if kind in llada.KINDS:
        return llada.network_settings(settings, path), False
    if kind == "Dream":
        return settings | {"model_type": "qwen2"}, True
    if kind in BLOCKS:  # SDAR
        return settings | {"model_type": kind.replace("sdar", "qwen3")}, False
    family = kind.removeprefix("a2d-")
    if family not in FAMILIES:
        raise UserError(f"{path} is a language model of the family {family}; those that are read are "
                        f"{', '.join(FAMILIES)}")
    if family == kind:
        note(f"{path} is a language model, which predicts from left to right: train it as a diffusion model first "
             "(docs/adaptation.md)")
    return settings | {"model_type": family}, family == kind


def tokens_and_mask(settings, tokenizer, path):
    """Return (meta, mask) for a config.json and the tokenizer of transformers beside it.

    Special tokens are tokens; only the mask is left out. Its number is that of config.json, else of the tokenizer. A
    left-to-right model may have none: then it is a row of the embedding that is no token, else the unknown token.
    Raises UserError if there is none of these, or if texts have this token, too.
    """
    rows, used = settings.get("embedding_size") or settings.get("vocab_size"), max(tokenizer.get_vocab().values()) + 1
    if type(rows) is not int:
        raise UserError(f"the config.json of {path} has no vocab_size")
    if used > rows:
        raise UserError(f"{path} has {rows:,} tokens, and the tokenizer beside it {used:,}")
    mask = settings.get("mask_token_id")
    mask = tokenizer.mask_token_id if mask is None else mask
    if mask is None and name_of(settings) in llada.KINDS:
        mask = tokenizer.get_vocab().get("<|mask|>")
    if mask is None and is_denoiser(settings):
        raise UserError(f"{path} does not say which token is the mask: write mask_token_id into its config.json")
    if mask is None:
        mask = used if used < rows else tokenizer.unk_token_id
    if mask is None:
        raise UserError(f"{path} has no token that can be the mask: no mask, no unknown token, and no unused row")
    if type(mask) is not int or not 0 <= mask < rows:
        raise UserError(f"the mask_token_id of {path} is {str(mask)[:30]}, not a number from 0 to {rows - 1:,}")
    parts = json.loads(definition_of(tokenizer))
    for token in parts["added_tokens"]:
        token["special"] = token["id"] == mask
    meta = hub_meta(json.dumps(parts, ensure_ascii=False))
    ids, ends = HubTokenizer(meta["definition"]).ids, tokenizer.eos_token_id
    ends = settings.get("eos_token_id") if ends is None else ends
    if mask in ids:
        raise UserError(f"texts of {path} have the token {tokenizer.convert_ids_to_tokens(mask)!r}, which is its mask, "
                        "too: write another mask_token_id into its config.json")
    end = ends[0] if isinstance(ends, list) and ends else ends
    return meta | ({"end": ids.index(end)} if end in ids else {}), mask


def block_size_of(found, hints):
    """The number of tokens in a block of SDAR and LLaDA 2, or 0 for a network of whole texts. Raises UserError for a
    hint there."""
    if name_of(found.settings) not in BLOCKS:
        if "block_size" in hints.overrides:
            raise UserError(f"{found.path} has no blocks: leave out --override block_size")
        return 0
    size = hints.overrides.get("block_size", found.settings.get("block_size"))
    if size is None:
        size = BLOCKS[name_of(found.settings)]
        note(f"{found.path} does not say how long its blocks are: {size} tokens are assumed; sample.py and evaluate.py "
             "change it by --override block_size=N")
    if type(size) is not int or size < 1:  # 0 would be a network of whole texts
        raise UserError(f"the block_size of {found.path} is {str(size)[:30]}, not a whole number from 1: correct its "
                        "config.json")
    return size


def translate(found, hints):
    """Translate a folder with config.json, a tokenizer, and the weights of a language model. Nothing in it is executed.

    The objective is mdlm, which LLaDA, Dream and A2D were trained with, and block for SDAR and LLaDA 2.
    """
    path = found.path
    state = {key: value for key, value in tensors(found.payload).items() if not GPT_NEOX_BUFFERS.search(key)}
    check_floats(state, path)
    theirs, predict_next = network_settings(found.settings, path)
    variant = llada.variant_of(found.settings)
    if variant is llada.LLADA2:
        state = llada.separate_heads(state, found.settings, path)
    state = llada.stacked(state, path)
    try:
        settings = read_settings(theirs | WHOLE_TEXT)
        with torch.device("meta"):
            model = build(settings, LLM.task)
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}")
    llada.check_router(settings, path)
    tokenizer = from_hub(path.parent)
    meta, mask = tokens_and_mask(found.settings, tokenizer, path)
    before, after = frame_of(tokenizer)
    if predict_next and not before:
        before = [mask if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    kept = {key: value for key, value in settings.to_diff_dict().items() if key not in NOT_KEPT}
    backbone = {"settings": kept | {"model_type": settings.model_type}, "mask": mask, "before": before, "after": after,
                "left_out": HubTokenizer(meta["definition"]).left_out, "first": None, "unused": [], "autocast": True}
    size = block_size_of(found, hints)
    longest = min(longest_text(backbone), LONGEST)
    if size:
        longest = longest // size * size or longest  # whole blocks
    config = dict(dataset="wikitext", architecture="llm", backbone=json.dumps(backbone),
                  objective="block" if size else "mdlm", block_size=size, conditioning="none",
                  predict_next=predict_next, seq_len=hints.overrides.get("seq_len", longest),
                  **{ours: getattr(settings, theirs) for ours, theirs in SIZES.items()})
    prefix = model.base_model_prefix + "."
    head = next(name for name, part in model.named_modules() if part is model.get_output_embeddings())
    names = (*(variant.names if variant else ()),
             (r"^(lm_head|embed_out)\.", f"{head}."))  # GPT-NeoX's has both names, depending on the version
    weights = {f"body.{key.removeprefix(prefix)}" if key.startswith(prefix) else f"head.{key}": value
               for key, value in rename(state, names).items()}
    if settings.tie_word_embeddings:  # the head's weights are those of the embeddings
        weights.pop(f"head.{head}.weight", None)
    name = name_of(found.settings).lower().replace("-", "_")
    return dict(name=name, config=config, meta=meta | {"name": "wikitext"}, model=weights, ema=weights, step=0)
