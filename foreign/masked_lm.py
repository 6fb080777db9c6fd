"""BERT, RoBERTa, ModernBERT and all other masked language models of transformers, as denoisers.

Masked language modelling is absorbing diffusion at one mask rate (docs/adaptation.md). So these networks predict masked
tokens at every mask rate, if not well, and fine-tuning improves that. The differences to model.DiT are here:

tokens     Ours are the tokens of texts, then the mask. Theirs are in another order, with special tokens among them.
           A table translates ours, and picks those of the head's outputs that are ours: special tokens are no output.
frame      They were trained with special tokens around a text, such as <s> ... </s>. These are put around every text.
positions  They are given explicitly where the network takes them. RoBERTa would count them from the tokens that are no
           padding, beginning at 2. There is no padding here, and no attention mask.
"""

import functools
import inspect
import json
import re

import torch
import torch.nn as nn

from cli import UserError, require
from data.tokenizer import HubTokenizer, definition_of, from_hub, hub_meta

SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}


class Given(nn.Module):
    """In place of the body of a model of transformers: returns the features that it is given as inputs_embeds."""

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        from transformers.modeling_outputs import BaseModelOutput
        return BaseModelOutput(last_hidden_state=inputs_embeds)


def settings_of(backbone):
    """The settings of transformers (its config object) in the JSON text of Config.backbone."""
    require("transformers", "a masked language model of transformers")
    from transformers import AutoConfig
    return AutoConfig.for_model(**json.loads(backbone)["settings"])


def build(settings):
    """The model of transformers of these settings, with random weights."""
    from transformers import AutoModelForMaskedLM
    return AutoModelForMaskedLM.from_config(settings)


class MaskedLM(nn.Module):
    """Denoiser over V = vocab_size tokens and the mask (id V), which is not told the time.

    backbone: JSON text with the settings of transformers, and with the numbers that its tokenizer has for the mask, for
    what is put before and after a text, and for what is left out.
    """

    of_source = ("backbone", *SIZES)

    @classmethod
    def from_config(cls, config, vocab_size):
        if not config.backbone:
            raise UserError("architecture=masked_lm is a network of a checkpoint: `train.py --init_from` has one, and "
                            "nothing else can make it")
        settings = settings_of(config.backbone)
        for ours, theirs in SIZES.items():
            setattr(settings, theirs, getattr(config, ours))
        if getattr(settings, "layer_types", None):  # one for each layer
            settings.layer_types = settings.layer_types[:config.n_layer]
        for key, value in settings.to_dict().items():
            if "dropout" in key and isinstance(value, (int, float)):
                setattr(settings, key, config.dropout)
        return cls(vocab_size, build(settings), json.loads(config.backbone), config.checkpoint_blocks)

    @classmethod
    def misfit(cls, config):
        objective = config.objective_class
        if (config.conditioning != "none" or not objective.has_mask or objective.causal or config.block_size
                or not config.tied or config.head_bias or config.norm_bias or config.shift_tokens
                or config.predict_next or config.anneal_steps or config.fsdp):
            return ("architecture=masked_lm needs conditioning=none, noise=mask, an objective other than ar and block, "
                    "no --fsdp, and the defaults of tied, head_bias, norm_bias, shift_tokens, predict_next and "
                    "anneal_steps")
        if config.backbone:
            try:
                longest = longest_text(config.backbone)
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                return f"backbone is not what --init_from makes it: {str(error).splitlines()[0][:100]}"
            if config.seq_len > longest:
                return f"seq_len={config.seq_len} is more than the {longest} tokens that the network has positions for"

    def __init__(self, vocab_size, model, backbone, checkpoint_blocks=False):
        super().__init__()
        self.vocab_size, self.body = vocab_size, model.base_model
        setattr(model, model.base_model_prefix, Given())
        self.head = model
        self.body.config.use_cache = False
        if checkpoint_blocks:
            self.body.gradient_checkpointing_enable()
        self.n_before, self.n_after = len(backbone["before"]), len(backbone["after"])
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self.first = first_position(self.body.config)
        left_out = set(backbone["left_out"])
        rows = self.body.get_input_embeddings().num_embeddings
        tokens = [i for i in range(rows) if i not in left_out][:vocab_size]
        for name, ids in (("ids", [*tokens, backbone["mask"]]), ("tokens", tokens), ("before", backbone["before"]),
                          ("after", backbone["after"])):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)

    def trunk(self, xt):
        """Tokens xt (B, L) -> features (B, L, D), the input of the head."""
        B, L = xt.shape
        ids = torch.cat((self.before.expand(B, -1), self.ids[xt], self.after.expand(B, -1)), 1)
        positions = self.first + torch.arange(ids.shape[1], device=xt.device)[None]
        x = self.body(input_ids=ids, **({"position_ids": positions} if self.takes_positions else {}))[0]
        return x[:, self.n_before:self.n_before + L]

    def forward(self, xt, t, where=None):
        """Map xt (B, L) long in [0, V], and t, which is not used, to logits (B, L, V), or (N, V) where `where`."""
        x = self.trunk(xt)
        x = x if where is None else x[where][None]
        logits = self.head(inputs_embeds=x).logits.index_select(-1, self.tokens)
        return logits if where is None else logits[0]

    @property
    def blocks(self):
        """The transformer blocks: the list in the body that has one for each layer."""
        n = self.body.config.num_hidden_layers
        return next(part for part in self.body.modules() if isinstance(part, nn.ModuleList) and len(part) == n)

    def matrices(self):
        return [weight for weight in self.blocks.parameters() if weight.dim() == 2]

    def output_layer(self):
        return [self.body.get_input_embeddings().weight, *self.head.parameters()]

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token, counted as DiT.flops does; attention as if full."""
        D, n = self.body.config.hidden_size, self.body.config.num_hidden_layers
        head = sum(weight.numel() for weight in self.head.parameters() if weight.dim() == 2)
        return 6 * (sum(weight.numel() for weight in self.matrices()) + predicted * head) + 12 * n * seq_len * D


def first_position(settings):
    """The number of the first position: RoBERTa and its kin count from the number of the padding, plus one."""
    from transformers import AutoModel
    with torch.device("meta"):
        body = AutoModel.from_config(settings)
    return settings.pad_token_id + 1 if hasattr(
        getattr(body, "embeddings", None), "create_position_ids_from_input_ids") else 0


@functools.lru_cache
def longest_text(backbone):
    """How many tokens of text the network has positions for."""
    settings, parts = settings_of(backbone), json.loads(backbone)
    return settings.max_position_embeddings - first_position(settings) - len(parts["before"]) - len(parts["after"])


# ---- checkpoints -----------------------------------------------------------------------------------------------------

PLAIN = (bool, int, float, str, type(None))


def is_masked_lm(settings):
    """Tell whether a config.json is that of a masked language model of transformers."""
    architectures = settings.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith("ForMaskedLM") for name in architectures)


def translate(found, overrides):
    """Translate a folder that save_pretrained of transformers wrote. Nothing in it is executed.

    Its tokenizer must be beside it. The objective is mdlm: the weights are those of a denoiser, which was trained at
    one mask rate.
    """
    require("transformers", f"{found.path}, a masked language model of transformers,")
    from transformers import AutoConfig
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kept = {key: value for key, value in found.settings.items()
            if key not in ("auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version")}
    try:
        settings = AutoConfig.for_model(**kept)
        with torch.device("meta"):
            kind = type(build(settings))
    except Exception as error:  # unknown model types, settings of wrong types
        raise UserError(f"{found.path} has a config.json of no masked language model that this version of transformers "
                        f"knows ({settings_name(found.settings)}): {str(error).splitlines()[0][:100]}")
    state = {key: value.float() for key, value in found.payload.items() if torch.is_tensor(value)}
    model, report = kind.from_pretrained(None, config=settings, state_dict=state, output_loading_info=True)
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:
        raise UserError(f"{found.path} lacks weights of {kind.__name__}, or has them in other shapes: "
                        f"{', '.join(sorted(lacking)[:3])}")
    tokenizer = from_hub(found.path.parent)
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {found.path.parent} has no mask token")
    meta = hub_meta(definition_of(tokenizer)) | {"name": "wikitext"}
    ours = HubTokenizer(meta["definition"])
    rows = model.get_input_embeddings().num_embeddings
    if ours.ids[-1] >= rows:
        raise UserError(f"{found.path} has {rows:,} tokens, and the tokenizer beside it {ours.ids[-1] + 1:,}")
    before, after = frame_of(tokenizer)
    backbone = {"settings": settings.to_diff_dict() | {"model_type": settings.model_type},
                "mask": tokenizer.mask_token_id, "before": before, "after": after, "left_out": ours.left_out}
    backbone_text = json.dumps(backbone)
    config = dict(dataset="wikitext", architecture="masked_lm", backbone=backbone_text, objective="mdlm",
                  conditioning="none", seq_len=overrides.get("seq_len", longest_text(backbone_text)),
                  **{ours: getattr(settings, theirs) for ours, theirs in SIZES.items()})
    network = MaskedLM(meta["vocab_size"], model, backbone)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    return dict(name=re.sub(r"\W", "_", settings_name(found.settings)), config=config, meta=meta, model=weights,
                ema=weights, step=0)


def settings_name(settings):
    return str(settings.get("model_type"))[:50]


def frame_of(tokenizer):
    """The numbers of the special tokens that a tokenizer of transformers puts before and after a text."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for i in range(len(whole) - len(inner) + 1):
        if whole[i:i + len(inner)] == inner:
            return whole[:i], whole[i + len(inner):]
    return [], []
