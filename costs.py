"""Memory and operations that a model and its training need, computed without building it, and checks that they fit."""

import math
from collections import Counter
from dataclasses import replace

import torch

import optim
from cli import UserError, memory_of
from randomness import give_prefix, prefix_lengths, uniforms


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def numbers_kept(model, cfg):
    """Return how many numbers of state the optimisers keep, in all."""
    return sum(math.prod(shape) for kind, parameters in optim.shares(model, cfg) for p in parameters
               for shape in kind.state_shapes(p.shape).values() if shape)


def sizes(cfg, vocab_size):
    """Return (parameters, numbers of optimiser state, bytes of tables) of a config's model, without building it.

    All three are linear in the number of blocks. So they follow from models of one and two blocks on the meta device,
    which has shapes and no memory. All three are infinite if PyTorch cannot even count the elements.
    """
    def of(n_layer):
        with torch.device("meta"):
            model = replace(cfg, n_layer=n_layer).make_model(vocab_size)
        return torch.tensor([count_parameters(model), numbers_kept(model, cfg),
                             sum(table.nbytes for table in model.buffers())], dtype=torch.float64)

    try:
        one, two = of(1), of(2)
    except RuntimeError:
        return (math.inf,) * 3
    return tuple((one + (cfg.n_layer - 1) * (two - one)).tolist())


def weight_bytes(cfg, vocab_size):
    """Bytes of a model: its weights and its tables of angles, in float32."""
    n_params, _, tables = sizes(cfg, vocab_size)
    return 4 * n_params + tables


def training_bytes(cfg, vocab_size, local, micro, shares=1):
    """Bytes that one process of a run needs at least on its device.

    local, micro: sequences per process and step, and per micro-step. shares: number of processes that share the state.
    """
    n_params, kept, tables = sizes(cfg, vocab_size)
    copies = 6 if cfg.local_steps else 3  # weights, gradients and averages; with local_steps anchor, momentum, message
    state = 4 * (copies * n_params + kept) / shares
    inputs = 4 * cfg.n_layer * micro * cfg.seq_len * cfg.n_embd  # of every block, in a micro-batch
    tokens_and_noise = 16 * local * cfg.seq_len + 8 * cfg.batch_size  # of a step
    return state + tables + inputs + tokens_and_noise


def check_fits(needed, device, what, remedy):
    """Raise UserError if `needed` bytes are more than the total memory of the device."""
    total = memory_of(device)
    if total and needed > total:
        raise UserError(f"{what} needs at least {needed / 1e9:,.1f} GB of memory, and {device.type} has "
                        f"{total / 1e9:,.1f} GB: {remedy}")


def flops_per_token(model, objective, cfg, items=None, until=None):
    """Floating-point operations of a training step per token; the head counts only where logits are computed.

    items: 256 of them (256, L), if their prefixes end with the token `until`. Without them all lengths are as likely.
    """
    if objective.everywhere and cfg.prefix == "none":
        return model.flops(cfg.seq_len)
    u, v = uniforms(cfg.seed, 0, range(256), 256, cfg.seq_len, stratified=True, n_times=objective.n_times(cfg.seq_len))
    given = prefix_lengths(cfg.prefix_range, cfg.seed, 0, range(256), items, until)
    noise = objective.noise(u, give_prefix(v, given))
    return model.flops(cfg.seq_len, noise.mask.float().mean().item())


def optimizer_flops(model, cfg, processes=1):
    """Operations of the optimisers per step and process, the busiest one: Muon shares the matrices of a shape out."""
    return sum(kind.flops(shape) * -(-n // processes) for kind, parameters in optim.shares(model, cfg)
               for shape, n in Counter(p.shape for p in parameters).items())
