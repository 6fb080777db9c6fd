"""Config, the settings of a run, and the named configs: functions that return one. `python train.py` lists them.

batch_size is the number of sequences per optimiser step over all GPUs. micro_batch_size is the number on one GPU at a
time; the number of accumulation steps follows from both. So a config trains the same model on any number of GPUs.
"""

import argparse
import dataclasses
import inspect
import sys
from dataclasses import dataclass, replace

import torch

import local_sgd
from block_diffusion import BlockDiffusion
from cli import ArgumentParser, UserError, did_you_mean
from diffusion import D3PM, MDLM, SEDD, AutoRegressive
from foreign.bert import BERT
from foreign.gpt2 import GPT2, NanoGPT
from foreign.llm import LLM
from foreign.masked_lm import MaskedLM
from foreign.tiny_diffusion import TinyDiffusion
from hybrid import Hybrid
from mixers import MIXERS, RESIDUALS, MixerDiT
from model import DiT
from optim import OPTIMIZERS, TAKE_SHARES, parse_clip
from schedules import SCHEDULES, make_schedule
from uniform import Uniform, UniformD3PM, UniformSEDD

# A new objective or network gets a name here and a file of its own (diffusion.Objective lists what it must have).
OBJECTIVES = {("d3pm", "mask"): D3PM, ("mdlm", "mask"): MDLM, ("sedd", "mask"): SEDD,
              ("block", "mask"): BlockDiffusion, ("bert", "mask"): BERT, ("ar", "mask"): AutoRegressive,
              ("d3pm", "uniform"): UniformD3PM, ("mdlm", "uniform"): Uniform, ("sedd", "uniform"): UniformSEDD,
              ("mdlm", "hybrid"): Hybrid}
# {a setting that some objectives do not have: the names and noises of those that have it}
OWNERS = {key: [names for names, other in OBJECTIVES.items() if key in other.own]
          for objective in OBJECTIVES.values() for key in objective.own}
NETWORKS = {"dit": DiT, "tiny_diffusion": TinyDiffusion, "gpt2": GPT2, "nanogpt": NanoGPT,
            "masked_lm": MaskedLM, "llm": LLM, "mixers": MixerDiT}


def setting(default, help, choices=None, same_run=True):
    """A field of Config. same_run: --resume refuses a run in which this setting was another one."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, same_run=same_run))


def default_of(key):
    return Config.__dataclass_fields__[key].default


# Numbers of these fields are at least 1. Numbers of other fields are at least 0.
COUNTS = {"seq_len", "n_layer", "n_head", "n_embd", "n_cond", "T", "batch_size", "micro_batch_size", "max_steps",
          "eval_interval", "eval_sequences", "checkpoint_interval", "log_interval",
          "max_skipped", "local_group", "fragments"}
# The largest numbers. T: float32 cannot tell more steps apart.
MOST = {"seq_len": 10**7, "n_layer": 1000, "n_head": 10**4, "n_embd": 10**6, "n_cond": 10**6, "T": 10**7,
        "outer_lr": 10**6, "peak_tflops": 10**6}


# {first field of a group: title of the group in --help}
GROUPS = {"dataset": "data", "architecture": "network", "mixer": "network, for architecture=mixers (mixers.py)",
          "objective": "objective and noise", "batch_size": "optimisation",
          "local_steps": "workers that exchange weights from time to time (local_sgd.py)", "eval_interval": "run"}


@dataclass(frozen=True)
class Config:
    dataset: str = setting("text8", "name of the data set: a folder in data_dir that data/prepare_*.py made")
    data_dir: str = setting("", "folder that has the data sets; empty: data/ of this repository", same_run=False)
    seq_len: int = setting(256, "tokens per sequence")
    unique_tokens: int = setting(0, "number of tokens of the training split to train on, evenly spread over it; 0: all")
    prefix: str = setting("none", "first tokens of a text that are given and not in the loss: none, fixed:64, "
                          "uniform:0:128 (a random number), or until:= (those up to the last = of an item)")
    padding: str = setting("end", "where the pads of an item (such as a name) are in training: at the end, or all "
                           "together at a random place in its text", ("end", "random"))

    architecture: str = setting("dit", "network: dit (model.py), mixers (mixers.py), or one of foreign/: masked_lm is "
                                "BERT, RoBERTa and others of transformers, llm is Llama, Qwen and others",
                                tuple(NETWORKS))
    backbone: str = setting("", "settings of architecture=masked_lm and llm, as JSON; empty: those of --init_from or "
                            "--resume")
    n_layer: int = setting(12, "number of transformer blocks")
    n_head: int = setting(12, "number of attention heads")
    n_embd: int = setting(768, "width of the network: features per token")
    n_cond: int = setting(128, "width of the time conditioning")
    dropout: float = setting(0.0, "dropout probability on the two residual branches of a block")
    conditioning: str = setting("step", "input of the time conditioning: nothing, 1000 t, t, the step in 1 ... T, "
                                "the total noise sigma = -log alpha(t), or a constant",
                                ("none", "time", "unscaled_time", "step", "sigma", "constant"))
    tied: bool = setting(True, "use the token embeddings as the weights of the head (the output layer)")
    head_bias: bool = setting(False, "add a bias to the head")
    norm_bias: bool = setting(False, "add a bias to the layer norms")
    shift_tokens: bool = setting(False, "take half of the features of a token from its neighbours; speeds up learning")
    head_gates: bool = setting(False, "multiply what each attention head found by a gate that depends on the token; "
                               "architecture=dit only")
    predict_next: bool = setting(False, "the output at a token predicts the token on its right, as in networks that "
                                 "were trained from left to right; shift_tokens then takes features from the left only")
    checkpoint_blocks: bool = setting(False, "recompute activations in the backward pass: less memory, a third slower",
                                      same_run=False)

    mixer: str = setting("attention", "what mixes the tokens", tuple(MIXERS))
    residual: str = setting("zero", "branches of a block: zero at first (adaLN-Zero), with one learned gate (rezero), "
                            "or plain", RESIDUALS)
    static_map: str = setting("full", "weights of static maps: one for each pair of positions (full), or for each "
                              "distance (toeplitz)", ("full", "toeplitz"))
    map_init: str = setting("", "first weights of static maps: orthogonal, or their standard deviation, as 0.004 or "
                            "0.02/L; empty: the mixer's own")
    mask_aware: bool = setting(False, "leave masked tokens out where tokens are mixed without attention")
    gate_bias: float = setting(1.0, "first bias of the gate of mixer=gmlp and amlp")

    objective: str = setting("d3pm", "training objective: d3pm (T steps), mdlm (continuous time), sedd (score entropy),"
                             " block (mdlm in blocks, from left to right), bert (mask rate 0.15 alone) or ar "
                             "(autoregressive)",
                             tuple(dict.fromkeys(name for name, _ in OBJECTIVES)))
    block_size: int = setting(0, "number of tokens in a block, a divisor of seq_len; objective=block only")
    rate_range: str = setting("0:1", "lowest and highest mask rate in training, such as 0.3:0.8; objective=block only")
    noise: str = setting("mask", "kind of noise: tokens become the mask, random tokens (mdlm is then UDLM), or either "
                         "(GIDD)", tuple(dict.fromkeys(noise for _, noise in OBJECTIVES)))
    uniform_share: float = setting(0.1, "largest share of random tokens on the way from text to masks; noise=hybrid "
                                   "only")
    T: int = setting(1000, "steps of objective=d3pm and conditioning=step; default number of sampling steps")
    lambda_ce: float = setting(0.0, "weight of the auxiliary cross-entropy at all positions; d3pm only")
    schedule: str = setting("linear", f"noise schedule alpha(t): {', '.join(SCHEDULES)}; or with parameters: "
                            "loglinear:0.001, geometric:0.0001:20")
    scale_by_sigma: bool = setting(True, "multiply the network's scores by alpha/(1 - alpha)/V; sedd with masks only")
    time_sampling: str = setting("uniform", "how training draws the time of each sequence: uniform; stratified, "
                                 "spread evenly over the batch; or exact_k, a number of masks, also spread evenly (not "
                                 "for d3pm or random tokens)", ("uniform", "stratified", "exact_k"))
    weighting: str = setting("nelbo", "loss weight of a token that is noise: nelbo, as in the bound; or simple, the "
                             "same at all times (mdlm, block); bert always has the same for all",
                             ("nelbo", "simple"))
    anneal_steps: int = setting(0, "steps in which attention grows from causal to full, at random places; 0: full at "
                                "once")

    batch_size: int = setting(1024, "sequences per optimiser step, on all GPUs together")
    micro_batch_size: int = setting(256, "maximum number of sequences in a pass of one GPU; gradients are accumulated",
                                    same_run=False)
    max_steps: int = setting(500_000, "number of optimiser steps")
    optimizer: str = setting("adamw", "adamw for all weights; muon for the matrices of the blocks; sm3 or "
                             "sm3_nesterov for all weights, with about half of adamw's state (optim.py)",
                             tuple(OPTIMIZERS))
    lr: float = setting(1e-3, "peak learning rate")
    min_lr: float = setting(1e-5, "learning rate at max_steps")
    lr_decay: str = setting("cosine", "shape of the decay of the learning rate to min_lr", ("cosine", "linear"))
    warmup_steps: int = setting(2500, "steps of linear warm-up of the learning rate")
    beta1: float = setting(0.9, "AdamW's first decay rate; SM3's momentum")
    beta2: float = setting(0.98, "AdamW's second decay rate")
    weight_decay: float = setting(0.1, "weight decay, of tensors with two or more dimensions")
    clip: str = setting("norm", "gradient clipping: norm (to grad_clip), or adaptive, against the norm of the weights: "
                        "agc:0.01 for each output, agc_tensor:0.003 for whole tensors")
    grad_clip: float = setting(0.1, "maximum gradient norm of clip=norm; larger gradients are scaled down; 0: no "
                               "clipping")
    ema_decay: float = setting(0.9999, "decay per step of the moving average (EMA) of the weights, used to evaluate")
    seed: int = setting(1, "random seed of the weights, data order, noise and dropout")

    local_steps: int = setting(0, "steps that each worker takes alone between two exchanges of weights (local_sgd.py); "
                               "0: gradients are averaged in every step")
    local_group: int = setting(1, "number of processes of a worker", same_run=False)
    outer_lr: float = setting(0.7, "learning rate of an exchange")
    outer_momentum: float = setting(0.9, "Nesterov's momentum of an exchange")
    pull: float = setting(1.0, "share of the way to the common weights that a worker goes in an exchange")
    delay: int = setting(0, "steps from sending weights to using the mean")
    fragments: int = setting(1, "number of parts of the weights that are exchanged in turn")
    eager: bool = setting(False, "a worker uses its own part of the mean at once; needs delay=local_steps and pull=1")
    send_dtype: str = setting("float32", "number format of what is sent", ("float32", "bfloat16"))

    eval_interval: int = setting(2500, "steps between validations", same_run=False)
    eval_sequences: int = setting(2048, "maximum number of validation sequences, spread evenly over the split",
                                  same_run=False)
    sample_interval: int = setting(10_000, "steps between printed samples; 0: no samples", same_run=False)
    checkpoint_interval: int = setting(2500, "steps between checkpoints", same_run=False)
    log_interval: int = setting(50, "steps between log lines", same_run=False)
    out_dir: str = setting("", "folder for the checkpoints and log.jsonl; empty: out/CONFIG", same_run=False)
    device: str = setting("auto", "device: cuda, mps or cpu; auto: the first one that is available", same_run=False)
    dtype: str = setting("auto", "number format of matrix products; auto: bfloat16 where it is fast, else float32",
                         ("auto", "bfloat16", "float32"), same_run=False)
    compile: bool = setting(None, "compile the model with torch.compile; default: only on CUDA", same_run=False)
    fsdp: bool = setting(False, "split the model over the processes (FSDP) instead of copying it to each (DDP)",
                         same_run=False)
    max_skipped: int = setting(20, "stop after this many steps in a row whose loss or gradient is not finite",
                               same_run=False)
    timeout_minutes: float = setting(10.0, "minutes without an answer from a process after which the run stops",
                                     same_run=False)
    peak_tflops: float = setting(0.0, "peak TFLOP/s of one device; the MFU in the log is the share of it that is used; "
                                      "0: measured at the start", same_run=False)
    wandb: bool = setting(False, "also log to Weights & Biases; with WANDB_MODE=offline, or without an account, to the "
                                 "folder wandb", same_run=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            types = {int: int, float: (int, float), str: str, bool: (bool, type(field.default))}[field.type]
            if not isinstance(value, types) or isinstance(value, bool) and field.type is not bool:  # a bool is an int
                raise UserError(f"{field.name}={value!r} must be of type {field.type.__name__}")
            if choices and value not in choices:
                raise UserError(f"{field.name}={value!r} is unknown: choose one of {', '.join(choices)}")
            least = 1 if field.name in COUNTS else 0
            if field.type in (int, float) and not least <= value < float("inf"):
                raise UserError(f"{field.name}={value} must be "
                                f"{'a finite number, ' if least == 0 else ''}at least {least}")
            if field.name in MOST and value > MOST[field.name]:
                raise UserError(f"{field.name}={value:,} is above the limit of {MOST[field.name]:,}")
        if not 0 < self.timeout_minutes <= 1e6:
            raise UserError("timeout_minutes must be above 0 and at most a million")
        try:
            full_range = make_schedule(self.schedule).full_range
        except ValueError as error:
            raise UserError(f"schedule={error}")
        if full_range and self.conditioning == "sigma":
            raise UserError(f"conditioning=sigma needs a finite sigma, and schedule={self.schedule} ends at an "
                            "infinite one: use loglinear or geometric")
        if self.seed >= 2**63:
            raise UserError("seed must be below 2**63")
        if self.prefix_range[1] >= self.seq_len:
            raise UserError(f"prefix={self.prefix} leaves nothing to predict of seq_len={self.seq_len}: shorten it")
        if 0 < self.unique_tokens < self.seq_len:
            raise UserError(f"unique_tokens={self.unique_tokens} is less than one sequence of seq_len={self.seq_len}: "
                            "use more")
        if not (self.dropout < 1 and self.ema_decay < 1 and self.beta1 < 1 and self.beta2 < 1):
            raise UserError("dropout, ema_decay, beta1 and beta2 must be below 1")
        if (self.objective, self.noise) not in OBJECTIVES:
            others = " or ".join(name for name, noise in OBJECTIVES if noise == self.noise)
            raise UserError(f"noise={self.noise} does not work with objective={self.objective}: use {others}")
        if self.fsdp and OPTIMIZERS[self.optimizer] not in TAKE_SHARES:
            raise UserError(f"optimizer={self.optimizer} needs whole tensors, and --fsdp splits them: leave out one of "
                            "the two")
        try:
            parse_clip(self.clip)
        except ValueError:
            raise UserError(f"clip={self.clip!r} is not valid: use norm, or a number above 0 as in agc:0.01 or "
                            "agc_tensor:0.003")
        if self.clip != "norm" and self.fsdp:
            raise UserError(f"clip={self.clip} needs whole tensors, and --fsdp splits them: leave out one of the two")
        for name, network in NETWORKS.items():
            for key in self.changed(network.own):
                if key not in self.network_class.own:
                    raise UserError(f"{key} needs architecture={name}")
        for part in (self.network_class, self.objective_class, local_sgd):
            if misfit := part.misfit(self):
                raise UserError(misfit)
        for key in self.changed(OWNERS):
            if key not in self.objective_class.own:
                names, noises = (list(dict.fromkeys(part)) for part in zip(*OWNERS[key]))
                with_noise = "" if "mask" in noises else f" with noise={' or '.join(noises)}"
                raise UserError(f"{key}={getattr(self, key)} is only for objective={' or '.join(names)}{with_noise}: "
                                f"use {key}={default_of(key)}")

    def changed(self, keys):
        """Those of some settings whose values are not the defaults."""
        return [key for key in keys if getattr(self, key) != default_of(key)]

    def with_objective(self, name, **settings):
        """This Config with another objective. Settings that the other objective does not have get their defaults."""
        others = {key: default_of(key) for key, owners in OWNERS.items() if (name, self.noise) not in owners}
        return replace(self, objective=name, **others, **settings)

    @property
    def objective_class(self):
        """The class of the objective, one of OBJECTIVES."""
        return OBJECTIVES[self.objective, self.noise]

    @property
    def network_class(self):
        return NETWORKS[self.architecture]

    @property
    def clock(self):
        """The function of t whose sinusoids the time embedding takes (model.py), or None without time conditioning.
        With 'step', a model sees its step numbers 1 ... T exactly."""
        T, sigma = self.T, make_schedule(self.schedule).sigma
        return {"none": None, "time": lambda t: 1000 * t, "unscaled_time": lambda t: t,
                "step": lambda t: (T * t).round(), "constant": torch.zeros_like, "sigma": sigma}[self.conditioning]

    @property
    def prefix_range(self):
        """(fewest, most) given tokens, from `prefix`. Raises UserError if `prefix` is malformed."""
        if self.prefix_symbol:
            return 1, self.seq_len - 1
        kind, *numbers = self.prefix.split(":")
        known = (kind, len(numbers)) in (("none", 0), ("fixed", 1), ("uniform", 2))
        if known and all(n.isdecimal() and len(n) < 10 for n in numbers):
            fewest, most = (int(numbers[0]), int(numbers[-1])) if numbers else (0, 0)
            if fewest <= most:
                return fewest, most
        raise UserError(f"prefix={self.prefix!r} is not valid: use none, numbers as in fixed:64 or uniform:0:128, or a "
                        "token as in until:=")

    @property
    def prefix_symbol(self):
        """The text of the token with which the given tokens end, from prefix=until:TEXT, or None."""
        return self.prefix.removeprefix("until:") if self.prefix.startswith("until:") else None

    def make_model(self, vocab_size):
        return self.network_class.from_config(self, vocab_size)

    def make_objective(self, vocab_size):
        return self.objective_class.from_config(self, vocab_size)


# ---- configs -------------------------------------------------------------------------------------------------------
# nanoDD's published hyperparameters are the defaults of Config. The docstrings are what `python train.py` lists.


def demo():
    """MDLM on the text of Python's documentation, 27 symbols: about 4 minutes on 2 CPU cores (`make demo`)"""
    return Config(
        dataset="pydoc", seq_len=128, n_layer=4, n_head=4, n_embd=128, conditioning="none", shift_tokens=True,
        objective="mdlm", time_sampling="exact_k", weighting="simple",
        batch_size=16, micro_batch_size=16, max_steps=1700, lr=3e-3, min_lr=3e-5, warmup_steps=50,
        grad_clip=1.0, ema_decay=0.99,
        eval_interval=500, eval_sequences=256, sample_interval=250, checkpoint_interval=250, log_interval=50,
    )


def names():
    """MDLM on names of up to 32 letters; fills gaps of unknown length: 3 minutes on 2 CPU cores"""
    return replace(
        demo(), dataset="names", seq_len=32, padding="random", batch_size=64, micro_batch_size=64, max_steps=1000,
        sample_interval=500, checkpoint_interval=500,
    )


def d3pm_shakespeare():
    """absorbing D3PM on Tiny Shakespeare, 65 characters, 13M parameters"""
    return Config(
        dataset="shakespeare", n_layer=6, n_head=6, n_embd=384, dropout=0.2, lambda_ce=0.05,
        batch_size=64, micro_batch_size=64, max_steps=10_000, warmup_steps=200, ema_decay=0.999,
        eval_interval=500, eval_sequences=256, sample_interval=1000, checkpoint_interval=500,
    )


def d3pm_text8():
    """absorbing D3PM on text8, with nanoDD's hyperparameters: 1,024 x 256 characters per step, 92M parameters"""
    return Config(dataset="text8", dropout=0.025, lambda_ce=0.05)


def d3pm_text8_8gpu():
    """as d3pm_text8, with micro-batches of 128: on eight GPUs the same run, on fewer it needs less memory"""
    return replace(d3pm_text8(), micro_batch_size=128)


def d3pm_openwebtext_8gpu():
    """nanoDD's D3PM on OpenWebText: 1,024 x 1,024 GPT-2 tokens per step, 131M parameters; micro-batches of 32"""
    return Config(dataset="openwebtext", seq_len=1024, lambda_ce=0.05, lr=6e-4, micro_batch_size=32)


def mdlm_twin(config):
    """MDLM with the data, size and optimisation of a D3PM: no time conditioning or auxiliary loss, exactly k masks.

    time_sampling=stratified is closer to the paper, but its weights 1/t make losses and gradients jump. The mean weight
    of a token over the draws (0 where it is visible) is 1 in this loss, and 1/T + lambda_ce/2 = 0.026 in that of d3pm_*
    (docs/maths.md, section 8). So gradients are larger here, and grad_clip is 1.0 instead of 0.1.
    """
    return replace(config, objective="mdlm", conditioning="none", lambda_ce=0.0, time_sampling="exact_k", grad_clip=1.0)


def mdlm_shakespeare():
    """as d3pm_shakespeare, with MDLM (continuous time, no time conditioning) instead of D3PM"""
    return mdlm_twin(d3pm_shakespeare())


def shakespeare_context():
    """MDLM on Tiny Shakespeare: continues 64 given characters with 192 more, like tiny-diffusion; 11M parameters"""
    return replace(mdlm_shakespeare(), prefix="fixed:64", weighting="simple", max_steps=20_000)


def mdlm_text8():
    """as d3pm_text8, with MDLM instead of D3PM; 85M parameters"""
    return mdlm_twin(d3pm_text8())


def mdlm_text8_8gpu():
    """as mdlm_text8, with micro-batches of 128: on eight GPUs the same run, on fewer it needs less memory"""
    return mdlm_twin(d3pm_text8_8gpu())


def mdlm_openwebtext_8gpu():
    """as d3pm_openwebtext_8gpu, with MDLM instead of D3PM; 124M parameters"""
    return mdlm_twin(d3pm_openwebtext_8gpu())


def d3pm_mini():
    """nanoDD's recipe on Gutenberg books, 32 x 128 characters per step, 1.3M parameters; baseline of mdlm_mini_fast"""
    return Config(
        dataset="gutenberg", seq_len=128, n_layer=4, n_head=4, n_embd=128, dropout=0.025, lambda_ce=0.05,
        batch_size=32, micro_batch_size=32, max_steps=1000, warmup_steps=100, ema_decay=0.99,
        eval_interval=1000, eval_sequences=1024, sample_interval=0, checkpoint_interval=250,
    )


def fast_twin(config, **settings):
    """The same data and width, with changes by which short runs learn more from as many tokens (RESULTS.md)."""
    return replace(mdlm_twin(config), weighting="simple", shift_tokens=True, head_gates=True, dropout=0.0,
                   optimizer="muon", lr_decay="linear", **settings)


def mdlm_mini_fast():
    """as d3pm_mini, with the fast recipe instead of nanoDD's (docs/speed.md); 0.8M parameters"""
    return fast_twin(d3pm_mini(), lr=6e-3, min_lr=3e-5, batch_size=16, micro_batch_size=16, max_steps=2000)


def prose():
    """the model in pretrained/: Gutenberg books, 8,192 tokens of their own; 5.3M parameters; 95 minutes on one core"""
    return replace(
        mdlm_mini_fast(), dataset="gutenberg_bpe8192", n_head=8, n_embd=256, head_gates=False, lr=4e-3,
        max_steps=15_000, ema_decay=0.999, sample_interval=500, log_interval=100,
    )


def mdlm_text8_fast_8gpu():
    """as mdlm_text8_8gpu, with the fast recipe (docs/speed.md); 85M parameters; run for 2 minutes at this size"""
    return fast_twin(d3pm_text8_8gpu())


def mdlm_openwebtext_fast_8gpu():
    """as mdlm_openwebtext_8gpu, with the fast recipe (docs/speed.md); 124M parameters; timed, but never trained"""
    return fast_twin(d3pm_openwebtext_8gpu())


def sedd_text8():
    """SEDD (score entropy) with masks on text8, with its authors' hyperparameters: 512 x 256 characters per step"""
    return Config(
        dataset="text8", objective="sedd", schedule="loglinear", conditioning="sigma", tied=False, head_bias=True,
        time_sampling="stratified", dropout=0.1, batch_size=512, micro_batch_size=256, max_steps=1_000_000, lr=3e-4,
        min_lr=3e-4, beta2=0.999, weight_decay=0.0, grad_clip=1.0,
    )


def sedd_openwebtext_8gpu():
    """as sedd_text8, on OpenWebText: 512 x 1,024 GPT-2 tokens per step, 170M parameters; micro-batches of 32"""
    return replace(sedd_text8(), dataset="openwebtext", seq_len=1024, micro_batch_size=32)


def udlm_text8():
    """as sedd_text8, with UDLM: continuous time, and noise of random characters instead of masks"""
    return replace(sedd_text8(), objective="mdlm", noise="uniform")


def gidd_text8():
    """as udlm_text8, with GIDD: noise of masks and of random characters, which are at most a tenth of the text"""
    return replace(udlm_text8(), noise="hybrid", schedule="linear", conditioning="time", weighting="simple")


def ar_twin(config):
    """The autoregressive baseline: the same data, size and optimisation, causal attention, exact likelihood."""
    return replace(config, objective="ar", conditioning="none", lambda_ce=0.0, time_sampling="uniform",
                   weighting="nelbo", grad_clip=1.0)


def ar_demo():
    """as demo, but autoregressive"""
    return ar_twin(demo())


def ar_shakespeare():
    """as d3pm_shakespeare, but autoregressive"""
    return ar_twin(d3pm_shakespeare())


def ar_text8():
    """as d3pm_text8, but autoregressive; 85M parameters"""
    return ar_twin(d3pm_text8())


def ar_openwebtext_8gpu():
    """as d3pm_openwebtext_8gpu, but autoregressive; 124M parameters"""
    return ar_twin(d3pm_openwebtext_8gpu())


def block_twin(config, block_size, **settings):
    """Block diffusion: the same data, size and optimisation, exactly k masks in each block, no time conditioning."""
    return replace(config, objective="block", block_size=block_size, conditioning="none", lambda_ce=0.0,
                   time_sampling="exact_k", grad_clip=1.0, **settings)


def bd3_demo():
    """block diffusion where demo has masked diffusion, in blocks of 8 characters; 7 minutes on 1 CPU core"""
    return block_twin(demo(), 8)


def bd3_shakespeare():
    """block diffusion where mdlm_shakespeare has MDLM, blocks of 16 characters"""
    return block_twin(mdlm_shakespeare(), 16)


def bd3_openwebtext_8gpu():
    """block diffusion in blocks of 16 tokens, a short run that starts from mdlm_openwebtext_8gpu (--init_from)"""
    return block_twin(mdlm_openwebtext_8gpu(), 16, batch_size=512, micro_batch_size=16, max_steps=150_000, lr=3e-4)


def roberta_wikitext():
    """RoBERTa, BERT or their kin (--init_from) at all mask rates, on WikiText-2: 30 passes, after 16 given tokens"""
    return Config(
        dataset="wikitext", seq_len=256, prefix="fixed:16", architecture="masked_lm", dropout=0.1, conditioning="none",
        objective="mdlm", time_sampling="exact_k", weighting="simple",
        batch_size=16, micro_batch_size=16, max_steps=18_000, lr=5e-5, min_lr=0.0, lr_decay="linear", warmup_steps=500,
        beta2=0.999, weight_decay=0.01, grad_clip=1.0, ema_decay=0.999,
        eval_interval=1000, eval_sequences=512, sample_interval=1000, checkpoint_interval=1000,
    )


def diffugpt_openwebtext_8gpu():
    """GPT-2 (--init_from) as a diffusion model, with DiffuGPT's learning rate, warm-up and annealing; never run here"""
    return replace(
        mdlm_openwebtext_8gpu(), architecture="gpt2", norm_bias=True, predict_next=True, anneal_steps=10_000,
        batch_size=1280, micro_batch_size=32, max_steps=160_000, lr=3e-4, min_lr=0.0, warmup_steps=2000,
    )


CONFIGS = {function.__name__: function for function in (
    demo, names,
    d3pm_shakespeare, d3pm_text8, d3pm_text8_8gpu, d3pm_openwebtext_8gpu, mdlm_shakespeare, shakespeare_context,
    mdlm_text8, mdlm_text8_8gpu, mdlm_openwebtext_8gpu, d3pm_mini, mdlm_mini_fast, prose, mdlm_text8_fast_8gpu,
    mdlm_openwebtext_fast_8gpu, sedd_text8, sedd_openwebtext_8gpu, udlm_text8, gidd_text8, ar_demo, ar_shakespeare,
    ar_text8, ar_openwebtext_8gpu, bd3_demo, bd3_shakespeare, bd3_openwebtext_8gpu, roberta_wikitext,
    diffugpt_openwebtext_8gpu,
)}


# ---- command line of train.py --------------------------------------------------------------------------------------


def same_run(name):
    """Tell whether --resume refuses a run in which this field of Config was another one."""
    return Config.__dataclass_fields__[name].metadata["same_run"]


def boolean(text):
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def from_command_line(script, description, add_arguments, several=False):
    """Parse CONFIG, a flag for each field of Config, and the flags that add_arguments adds.

    Returns (config name, Config, all arguments), or, with several, ([(config name, Config), ...], all arguments).
    """
    chosen = next((CONFIGS[word]() for word in sys.argv[1:] if word in CONFIGS), Config())  # --help shows its values
    listing = "configs:\n" + "\n".join(f"  {name:26} {inspect.getdoc(CONFIGS[name])}" for name in CONFIGS)
    p = ArgumentParser({"--learning_rate": "--lr"}, usage=f"python {script} CONFIG [--key=value ...]",
                       description=description, epilog=listing)
    p.add_argument("config", nargs="*", metavar="CONFIG", help="one of the configs below")
    add_arguments(p)
    for field in dataclasses.fields(Config):
        if field.name in GROUPS:
            group = p.add_argument_group(GROUPS[field.name])
        kind, choices = field.type.__name__, field.metadata["choices"]
        text = f"{field.metadata['help']} [{'|'.join(choices) if choices else kind}: {getattr(chosen, field.name)!r}]"
        options = dict(type=boolean, nargs="?", const=True) if field.type is bool else dict(type=field.type)
        group.add_argument(f"--{field.name}", metavar=kind.upper(), help=text, default=argparse.SUPPRESS, **options)
        if field.type is bool:
            group.add_argument(f"--no-{field.name}", dest=field.name, action="store_false", default=argparse.SUPPRESS,
                               help=argparse.SUPPRESS)
    if len(sys.argv) == 1:
        print(f"usage: {p.usage}, --help lists the keys\n\n{listing}")
        sys.exit(0)
    args = p.parse_args()
    if not args.config:
        raise UserError("no config is named: add one of " + ", ".join(CONFIGS))
    for name in args.config:
        if name not in CONFIGS:
            raise UserError(f"unknown config {name!r}{did_you_mean(name, CONFIGS) or ':'} choose one of "
                            f"{', '.join(CONFIGS)}")
    if len(args.config) > 1 and not several:
        raise UserError(f"name one config at a time, not {' and '.join(args.config)}")
    overrides = {key: value for key, value in vars(args).items() if key in Config.__dataclass_fields__}
    configs = [(name, replace(CONFIGS[name](), **overrides)) for name in args.config]
    return (configs, args) if several else (*configs[0], args)
