"""Estimate the memory per GPU and the days of a run from its config and an assumed utilisation.

    python bench.py --estimate d3pm_openwebtext_8gpu --gpu h100
"""

import json
import re
from unittest import mock

import torch

import attention
from cli import UserError, autocast
from configs import replace
from costs import check_fits, count_parameters, flops_per_token, numbers_kept, optimizer_flops, weight_bytes
from parallel import share_of_batch

# Dense bfloat16 TFLOP/s and GB of memory, from the manufacturer's data sheets.
GPUS = {"a100": (312, 80), "a100-40": (312, 40), "h100": (989, 80), "h200": (989, 141), "b200": (2250, 180),
        "l40s": (362, 48), "rtx4090": (165, 24), "rtx3090": (71, 24)}
SPARE = 0.9  # usable share of a GPU's memory; CUDA, temporary buffers and fragmentation take the rest


def kept_bytes(cfg, vocab_size, n, device, dtype, masked=0.5):
    """Bytes that autograd keeps for n sequences between the forward and the backward pass, as on a GPU.

    masked: the share of masks among their tokens. Each storage counts once. Parameters do not count.
    """
    model, objective = cfg.make_model(vocab_size).to(device), cfg.make_objective(vocab_size)
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x0 = torch.randint(vocab_size, (n, cfg.seq_len), device=device)
    noise = objective.noise(torch.full((n, objective.n_times(cfg.seq_len)), masked, dtype=torch.float64).squeeze(1),
                            torch.rand(n, cfg.seq_len, dtype=torch.float64)).to(device)
    if not (objective.random_tokens or objective.causal):  # the exact number of masks, anywhere
        noise = noise._replace(mask=(torch.randperm(x0.numel(), device=device) < masked * x0.numel()).view_as(x0))
    with (mock.patch.object(attention, "MOST_PRODUCTS", 0),  # a GPU's attention keeps no scores
          torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(device, dtype)):
        loss, _ = objective.loss(model, x0, noise)  # keeps the storages from being reused
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def activation_bytes(cfg, vocab_size, device, dtype, masked=0.5):
    """Return (a, b) such that kept_bytes of n sequences is a + b n.

    They follow from one and two sequences through one and two blocks, since kept_bytes is also linear in the number of
    blocks. a is the size of the blocks' weights in bfloat16. checkpoint_blocks adds what one block keeps while it is
    computed again.
    """
    def through(n, layers, again=cfg.checkpoint_blocks):
        variant = replace(cfg, n_layer=layers, checkpoint_blocks=again)
        return kept_bytes(variant, vocab_size, n, device, dtype, masked)

    def kept(n):
        one, two = through(n, 1), through(n, 2)
        computed_again = through(n, 2, False) - through(n, 1, False) if cfg.checkpoint_blocks else 0
        return one + (cfg.n_layer - 1) * (two - one) + computed_again

    one, two = kept(1), kept(2)
    return 2 * one - two, two - one


def gradient_bytes(cfg, vocab_size, masked=0.5):
    """Bytes of the gradients of one sequence's logits, and of what the cost computes from them, in float32.

    The backward pass begins with them, when all that autograd keeps is still there. Measured: a cross-entropy has two
    such tensors at a time, the score entropy of masks one, noise of random tokens three, and four with D3PM's steps.
    """
    objective = cfg.make_objective(vocab_size)
    random_tokens, score_entropy = objective.random_tokens, not objective.normalised
    tensors = (4 if objective.T else 3) if random_tokens else 1 if score_entropy else 2
    return 4 * tensors * (1.0 if objective.everywhere else masked) * cfg.seq_len * vocab_size


def fullest(rates):
    """Largest share of masks in a micro-batch of a long run; the memory for logits must suffice for it.

    It is five standard deviations above one half, at most 1: 1/2 + 5/sqrt(12 rates), for this number of mask rates in
    the micro-batch, uniform on [0, 1].
    """
    return min(1.0, 0.5 + 5 / (12 * rates) ** 0.5)


def recomputed(model, flops, cfg, vocab_size):
    """Operations per token that --checkpoint_blocks adds: the forward pass of the blocks again, a third of theirs."""
    if not cfg.checkpoint_blocks:
        return 0
    without, everywhere = model.flops(cfg.seq_len, 0), model.flops(cfg.seq_len)
    head = 6 * vocab_size * cfg.n_embd * (flops - without) / (everywhere - without)
    return (flops - head) / 3


def spell(days):
    return next(f"{days * n:.3g} {unit}" for n, unit in ((1, "days"), (24, "hours"), (1440, "minutes"))
                if days * n >= 2 or unit == "minutes")


def estimate(name, cfg, vocab_size, gpu, gpus, mfu):
    """Print the memory and the days of a run on `gpus` GPUs of a kind, with DDP and without torch.compile.

    torch.compile keeps less. mfu: the assumed utilisation. Raises UserError for an unknown GPU, and for FSDP, which
    divides the state among GPUs.
    """
    if cfg.fsdp:
        raise UserError("--estimate is for DDP, where each GPU has the whole model: leave out --fsdp")
    if cfg.dtype == "float32":
        raise UserError("--estimate knows the speed of GPUs in bfloat16 alone: leave out --dtype=float32")
    dtype = torch.bfloat16
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r} is unknown: choose one of {', '.join(GPUS)}")
    peak, memory = GPUS[gpu][0] * 1e12, GPUS[gpu][1] * 1e9
    gpus = gpus or int((re.search(r"_(\d+)gpu", name) or [0, 1])[1])
    _, micro = share_of_batch(cfg, gpus)
    check_fits(weight_bytes(replace(cfg, n_layer=2), vocab_size), torch.device("cpu"), f"--estimate {name}",
               "it runs two blocks of the model on this machine")
    with torch.device("meta"):
        model = cfg.make_model(vocab_size)
    copies = 6 if cfg.local_steps else 3  # weights, gradients, averages; anchor, its momentum, message
    state = 4 * (copies * count_parameters(model) + numbers_kept(model, cfg))
    objective = cfg.make_objective(vocab_size)
    masked = fullest(micro * objective.n_times(cfg.seq_len))
    fixed, one = activation_bytes(cfg, vocab_size, torch.device("cpu"), dtype, masked)
    one += gradient_bytes(cfg, vocab_size, masked)
    activations = fixed + one * micro
    tokens = cfg.max_steps * cfg.batch_size * cfg.seq_len
    flops = flops_per_token(model, objective, cfg)
    work = flops + recomputed(model, flops, cfg, vocab_size)
    sharing = cfg.local_group if cfg.local_steps else gpus
    work += optimizer_flops(model, cfg, sharing) * gpus / (cfg.batch_size * cfg.seq_len)
    days = tokens * work / (gpus * peak * mfu) / 86400
    most = max(0, int((memory * SPARE - state - fixed) / one))
    result = {
        "config": name, "gpu": gpu, "gpus": gpus, "utilisation": mfu, "parameters": count_parameters(model),
        "dtype": str(dtype).removeprefix("torch."), "state_bytes": state, "activation_bytes_per_sequence": one,
        "micro_batch_size": micro, "masked": masked, "total_bytes": state + activations,
        "largest_micro_batch_size": most, "tokens": tokens, "flops_per_token": work,
        "tokens_per_second": gpus * peak * mfu / work, "days": days,
    }
    when = f", when {masked:.0%} of their tokens are masks" if not (objective.random_tokens or objective.causal) else ""
    print(f"{name} on {gpus} x {gpu}\n"
          f"memory  {(state + activations) / 1e9:.1f} of {memory / 1e9:.0f} GB each: {state / 1e9:.1f} of weights, "
          f"gradients, moments and averages, {activations / 1e9:.1f} of activations of {micro} sequences in "
          f"{result['dtype']}{when}, and what the allocator wastes"
          + ("" if micro <= most else "\n        does not fit: try "
             + (f"--micro_batch_size={1 << most.bit_length() - 1}" if most else "--checkpoint_blocks"))
          + f"\ntime    {spell(days)}: {tokens:.3g} tokens x {work:.3g} FLOP at an assumed {mfu:.0%} of "
          f"{peak / 1e12:.0f} TFLOP/s, {result['tokens_per_second']:,.0f} tokens/s")
    print(json.dumps(result))
