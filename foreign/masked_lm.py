"""BERT, RoBERTa, ModernBERT and most other masked language models of transformers, as denoisers.

Masked language modelling is absorbing diffusion at one mask rate (docs/adaptation.md). So these networks predict masked
tokens at every mask rate, though not well. Fine-tuning improves that. The differences from model.DiT:

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
import warnings

import torch
import torch.nn as nn

from cli import UserError, first_line, note, require
from data.tokenizer import HubTokenizer, definition_of, from_hub, hub_meta
from foreign.files import check_floats
from model import places

SIZES = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
MOST = {"num_hidden_layers": 1000, "num_attention_heads": 1000, "hidden_size": 10**5, "vocab_size": 10**7,
        "max_position_embeddings": 10**6, "num_labels": 10**5}
NOT_KEPT = ("auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version", "attn_implementation",
            "_attn_implementation", "experts_implementation", "_experts_implementation", "return_dict")  # code, formats


class PassThrough(nn.Module):
    """In place of the body of a model of transformers: returns the features that it is given as inputs_embeds."""

    def forward(self, input_ids=None, inputs_embeds=None, **_):
        from transformers.modeling_outputs import MoeModelOutputWithPast  # heads of mixtures of experts read its fields
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


def read_settings(settings):
    """Turn a dict into a config object of transformers. Keys that name code, kernels or number formats are left out.

    Raises UserError if transformers does not know the model, or if a size is out of range.
    """
    require("transformers", "a language model of transformers")
    from transformers import AutoConfig
    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    check_sizes({key: settings[key] for key in MOST if key in settings})  # before lists of these lengths are made
    try:
        with warnings.catch_warnings(action="ignore"):  # about settings with older names
            found = AutoConfig.for_model(**{key: value for key, value in settings.items() if key not in NOT_KEPT})
        sizes = {key: getattr(found, key) for key in MOST}
    except Exception as error:  # unknown model types, settings of wrong types
        raise UserError(f"transformers knows no model with these settings (model_type {name_of(settings)}): "
                        f"{first_line(error)}")
    check_sizes(sizes)  # those with other names in config.json, too
    return found


def check_sizes(sizes):
    for key, value in sizes.items():
        if type(value) is not int or not 0 < value <= MOST[key]:
            raise UserError(f"its {key} is {str(value)[:30]}, not a number from 1 to {MOST[key]:,}")


def build(settings, task):
    """The model of transformers of these settings, with random weights. Raises UserError if there is none.

    task: AutoModelForMaskedLM, or another class of transformers that knows the models of a task."""
    import transformers
    try:
        with warnings.catch_warnings(action="ignore"):  # about tensors without elements
            return getattr(transformers, task).from_config(settings)
    except Exception as error:
        raise UserError(f"transformers cannot build a {task.removeprefix('AutoModelFor')} of model_type "
                        f"{settings.model_type} with these settings: {first_line(error)}")


def name_of(settings):
    return str(settings.get("model_type"))[:50]


@functools.lru_cache
def read_backbone(text):
    """Config.backbone as a dict. Raises UserError if it is not what translate() writes."""
    def numbers(value):
        return isinstance(value, list) and all(type(i) is int and 0 <= i < rows for i in value)

    try:
        found = json.loads(text)
        rows = read_settings(found["settings"]).vocab_size
        good = (numbers([found["mask"]]) and all(numbers(found[key]) for key in ("before", "after", "left_out"))
                and (found["first"] is None or type(found["first"]) is int and 0 <= found["first"] < 10**6)
                and all(isinstance(name, str) for name in found["unused"])
                and isinstance(found["autocast"], bool))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        good = False
    if not good:
        raise UserError("backbone is not what --init_from makes of a model of transformers: leave out --backbone")
    return found


def longest_text(backbone):
    """How many tokens of text a network has positions for."""
    positions = read_settings(backbone["settings"]).max_position_embeddings
    return positions - (backbone["first"] or 0) - len(backbone["before"]) - len(backbone["after"])


class MaskedLM(nn.Module):
    """Denoiser over V = vocab_size tokens and the mask (id V), which is not told the time.

    backbone: the settings of transformers; the numbers that its tokenizer has for the mask, for what is put before and
    after a text, and for what is left out; the number of the first position (None: it is not told positions); the
    names of weights that no output depends on; and whether the network can compute in bfloat16.
    """

    own, of_source = ("backbone",), ("backbone", *SIZES)
    large = takes_blocks = False  # takes_blocks: it knows block diffusion
    task = "AutoModelForMaskedLM"  # the class of transformers that builds the network
    example = "hf://FacebookAI/roberta-base"
    defaults = ("tied", "head_bias", "norm_bias", "shift_tokens", "predict_next", "anneal_steps")  # must have them

    @classmethod
    def from_config(cls, config, vocab_size):
        if not config.backbone:
            raise UserError(f"architecture={config.architecture} is a network of a checkpoint: a run takes its network "
                            f"from a checkpoint that --init_from names, such as {cls.example}")
        backbone = read_backbone(config.backbone)
        settings = read_settings(backbone["settings"])
        for ours, theirs in SIZES.items():
            setattr(settings, theirs, getattr(config, ours))
        if getattr(settings, "layer_types", None):  # one for each layer
            settings.layer_types = (settings.layer_types * config.n_layer)[:config.n_layer]
        for key, value in settings.to_dict().items():
            if "dropout" in key and type(value) in (int, float):
                setattr(settings, key, config.dropout)
        return cls(vocab_size, build(settings, cls.task), backbone, config.predict_next, config.checkpoint_blocks)

    @classmethod
    def misfit(cls, config):
        objective = config.objective_class
        if (config.conditioning != "none" or objective.random_tokens or objective.causal
                or config.block_size and not cls.takes_blocks or config.changed(cls.defaults)):
            return (f"architecture={config.architecture} needs conditioning=none, noise=mask, an objective other than "
                    f"ar{'' if cls.takes_blocks else ' and block'}, and the defaults of {', '.join(cls.defaults)}")
        if config.backbone:
            longest = longest_text(read_backbone(config.backbone))
            if config.seq_len > longest:
                return f"seq_len={config.seq_len} is more than the {longest} tokens that the network has positions for"

    def __init__(self, vocab_size, model, backbone, predict_next=False, checkpoint_blocks=False):
        super().__init__()
        self.vocab_size, self.predict_next, self.body = vocab_size, predict_next, model.base_model
        setattr(model, model.base_model_prefix, PassThrough())
        self.head = model
        if checkpoint_blocks:
            enable = getattr(self.body, "activation_checkpointing_enable", None)  # its name in newer versions
            try:
                (enable or self.body.gradient_checkpointing_enable)()
            except ValueError:  # some networks, such as ALBERT, cannot recompute their layers
                raise UserError(f"--checkpoint_blocks does not work with the network {type(self.body).__name__} of "
                                "transformers: leave it out")
        self.n_before, self.first, self.autocast = len(backbone["before"]), backbone["first"], backbone["autocast"]
        left_out = set(backbone["left_out"])
        tokens = [i for i in range(self.body.config.vocab_size) if i not in left_out][:vocab_size]
        for name, ids in (("ids", [*tokens, backbone["mask"]]), ("before", backbone["before"]),
                          ("after", backbone["after"])):
            self.register_buffer(name, torch.tensor(ids, dtype=torch.long), persistent=False)
        for name, p in self.named_parameters():
            p.requires_grad_(name not in backbone["unused"])  # DistributedDataParallel would wait for their gradients

    @property
    def blocks(self):
        """The layers that --fsdp splits one by one: those that transformers can recompute.

        FSDP needs layers that are called as modules, and these are. Networks without them, such as ALBERT, are split
        as a whole."""
        from transformers.modeling_layers import GradientCheckpointingLayer
        return [part for part in self.body.modules() if isinstance(part, GradientCheckpointingLayer)]

    def framed(self, xt):
        """Tokens xt (B, L) -> their numbers in transformers, with what stands before and after a text."""
        B = len(xt)
        return torch.cat((self.before.expand(B, -1), self.ids[xt], self.after.expand(B, -1)), 1)

    def trunk(self, xt, sees=None):
        """Tokens xt (B, L) -> features (B, L, D), the input of the head. sees: see forward."""
        L, ids = xt.shape[1], self.framed(xt)
        more = {} if sees is None else {"attention_mask": sees[None, None]}
        if self.first is not None:
            more["position_ids"] = self.first + torch.arange(ids.shape[1], device=xt.device)[None]
        x = self.body(input_ids=ids, **more)[0]
        start = self.n_before - self.predict_next
        return x[:, start:start + L]

    def forward(self, xt, t, where=None, **more):
        """Map xt (B, L) long in [0, V], and t, which is not used, to logits (B, L, V), or (N, V) at the N
        True positions of `where` (B, L), or at the places `where` (N,). more: for the trunk. `sees` says which tokens
        each one sees, (n, n) bool, for the n = L + 1 tokens of a network with predict_next, the first of which stands
        before the text."""
        with self.precision(xt.device.type):
            return self.predict(self.trunk(xt, **more), where)

    def precision(self, kind):
        """The context in which the network computes on this kind of device: autocast, if it is on and allowed."""
        return torch.autocast(kind, enabled=self.autocast and torch.is_autocast_enabled(kind))

    def predict(self, x, where):
        """Features (B, L, D) -> logits (B, L, V), or (N, V) at the places `where`. See forward."""
        x = x if where is None else x.flatten(0, 1)[places(where)][None]
        logits = self.head(inputs_embeds=x).logits.index_select(-1, self.ids[:-1])
        return logits if where is None else logits[0]

    def matrices(self):
        """The weights of the linear layers of the body."""
        weights = [part.weight for part in self.body.modules() if isinstance(part, nn.Linear)]
        return [weight for weight in weights if weight.requires_grad]

    def output_layer(self):
        """The embeddings and all parameters of the head."""
        return [self.body.get_input_embeddings().weight, *self.head.parameters()]

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token, counted as DiT.flops does; attention as if full."""
        D, n = self.body.config.hidden_size, self.body.config.num_hidden_layers
        head = sum(weight.numel() for weight in self.head.parameters() if weight.dim() == 2)
        return 6 * (sum(weight.numel() for weight in self.matrices()) + predicted * head) + 12 * n * seq_len * D


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def is_masked_lm(settings):
    """Tell whether a config.json is that of a masked language model of transformers."""
    architectures = settings.get("architectures")
    return isinstance(architectures, list) and any(str(name).endswith("ForMaskedLM") for name in architectures)


def translate(found, hints):
    """Translate a folder that save_pretrained of transformers wrote. Nothing in it is executed.

    Its tokenizer must be beside it. The objective is mdlm: the weights are those of a denoiser, which was trained at
    one mask rate.
    """
    require("transformers", f"{found.path}, a masked language model of transformers,")
    try:
        settings = read_settings(found.settings)
        with torch.device("meta"):
            kind = type(build(settings, MaskedLM.task))
    except UserError as error:
        raise UserError(f"{found.path} cannot be used: {error}")
    state = {key: value for key, value in found.payload.items()
             if torch.is_tensor(value) and value.dtype != torch.int64}  # without positions
    check_floats(state, found.path)
    state = {key: value.float() for key, value in state.items()}
    model, report = kind.from_pretrained(None, config=settings, state_dict=state, output_loading_info=True,
                                         ignore_mismatched_sizes=True)
    lacking = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if lacking:
        raise UserError(f"{found.path} lacks weights of {kind.__name__}, or has them in other shapes: "
                        f"{', '.join(sorted(lacking)[:3])}")
    more = [key for key in report["unexpected_keys"] if re.search(r"\.\d+\.", key)]  # of layers
    if more:
        raise UserError(f"{found.path} has weights of layers that its config.json does not have: "
                        f"{', '.join(sorted(more)[:3])}")
    tokenizer = from_hub(found.path.parent)
    if tokenizer.mask_token_id is None:
        raise UserError(f"the tokenizer of {found.path.parent} has no mask token")
    meta = hub_meta(definition_of(tokenizer)) | {"name": "wikitext"}
    ours, (before, after) = HubTokenizer(meta["definition"]), frame_of(tokenizer)
    most = max(ours.ids[-1], tokenizer.mask_token_id, *before, *after)
    if most >= settings.vocab_size:
        raise UserError(f"{found.path} has {settings.vocab_size:,} tokens, and the tokenizer beside it {most + 1:,}")
    kept = {key: value for key, value in settings.to_diff_dict().items() if key not in NOT_KEPT}
    backbone = {"settings": kept | {"model_type": settings.model_type}, "mask": tokenizer.mask_token_id,
                "before": before, "after": after,
                "left_out": [i for i in ours.left_out if i < settings.vocab_size], "first": None, "unused": [],
                "autocast": True}
    model.eval()
    try:
        backbone["first"] = first_position(model.base_model, settings, ours.ids[-4:])
        network = MaskedLM(meta["vocab_size"], model, backbone)
        text = torch.arange(min(4, meta["vocab_size"]))[None]
        network(text, None).sum().backward()
        network.autocast = backbone["autocast"] = works_in_bfloat16(network, text)
    except Exception as error:
        raise UserError(f"{found.path} is a {kind.__name__}, and this kind of network is not supported: "
                        f"{first_line(error)}")
    backbone["unused"] = [name for name, p in network.named_parameters() if p.grad is None]
    config = dict(dataset="wikitext", architecture="masked_lm", backbone=json.dumps(backbone), objective="mdlm",
                  conditioning="none", seq_len=hints.overrides.get("seq_len", longest_text(backbone)),
                  **{ours: getattr(settings, theirs) for ours, theirs in SIZES.items()})
    weights = {name: p.detach() for name, p in network.named_parameters()}
    return dict(name=re.sub(r"\W", "_", name_of(found.settings)), config=config, meta=meta, model=weights, ema=weights,
                step=0)


@torch.no_grad()
def works_in_bfloat16(network, text):
    try:
        with torch.autocast("cpu", torch.bfloat16):
            network(text, None)
        return True
    except RuntimeError:  # some networks mix number formats then
        return False


@torch.no_grad()
def first_position(body, settings, ids):
    """The position at which a network of transformers begins to count, or None if it is not told positions.

    RoBERTa and its kin begin after the number of the padding. So 0 and pad_token_id + 1 are tried. The right one gives
    the same output as no position_ids.
    """
    if "position_ids" not in inspect.signature(body.forward).parameters:
        return None
    ids = torch.tensor([ids])
    expected = body(input_ids=ids)[0]
    for first in {0, (settings.pad_token_id or 0) + 1}:
        positions = first + torch.arange(ids.shape[1])[None]
        if torch.allclose(body(input_ids=ids, position_ids=positions)[0], expected, atol=1e-5):
            return first
    if expected.isfinite().all():
        note(f"{type(body).__name__} counts positions in a way of its own, and is left to it")
    return None


def frame_of(tokenizer):
    """The numbers of the special tokens that a tokenizer of transformers puts before and after a text."""
    tokens = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    ids_of = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    text = next((text for text in ("a", *tokens) if ids_of(text)), "a")  # it may drop what it does not know
    inner = ids_of(text)
    whole = tokenizer(text)["input_ids"]
    for i in range(len(whole) - len(inner) + 1):
        if whole[i:i + len(inner)] == inner:
            return whole[:i], whole[i + len(inner):]
    return [], []
