"""What a run will need: bytes on each GPU, and days, from the operations of its config and a stated utilisation.

    python bench.py --estimate d3pm_openwebtext_8gpu --gpu h100
"""

import json
import re

import torch

from cli import UserError, autocast
from configs import replace
from train import flops_per_token, share_of_batch

# Dense bfloat16 TFLOP/s and GB of memory, from the manufacturer's data sheets.
GPUS = {"a100": (312, 80), "a100-40": (312, 40), "h100": (989, 80), "h200": (989, 141), "b200": (2250, 180),
        "l40s": (362, 48), "rtx4090": (165, 24), "rtx3090": (71, 24)}
SPARE = 0.9  # of a GPU's memory can be used: the rest goes to CUDA, temporary buffers and fragmentation


def kept_bytes(cfg, vocab_size, n, device, dtype):
    """What autograd keeps of n sequences between the forward and the backward pass, half of the tokens masked.

    Returns bytes: each storage once, the parameters not at all.
    """
    model, objective = cfg.make_model(vocab_size).to(device), cfg.make_objective(vocab_size)
    storages, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    x0 = torch.randint(vocab_size, (n, cfg.seq_len), device=device)
    half = torch.full((n,), 0.5, dtype=torch.float64)
    noise = objective.noise(half, torch.rand(n, cfg.seq_len, dtype=torch.float64)).to(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), autocast(device, dtype):
        loss, _ = objective.loss(model, x0, noise)  # kept, or the storages would be used again
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def activation_bytes(cfg, vocab_size, device, dtype):
    """A function n -> kept_bytes of n sequences, found from one and two of them through one and two blocks.

    It is a + b n + c n_layer + d n n_layer; c are the blocks' weights in bfloat16.
    """
    f = {(n, layers): kept_bytes(replace(cfg, n_layer=layers), vocab_size, n, device, dtype)
         for n in (1, 2) for layers in (1, 2)}
    one, two = f[1, 1] + (cfg.n_layer - 1) * (f[1, 2] - f[1, 1]), f[2, 1] + (cfg.n_layer - 1) * (f[2, 2] - f[2, 1])
    return lambda n: one + (n - 1) * (two - one)


def state_bytes(model, cfg):
    """Weights, gradients, averages and the optimiser's moments, in float32: two for AdamW, one for Muon."""
    muon = sum(p.numel() for p in model.matrices()) if cfg.optimizer == "muon" else 0
    return 4 * (5 * model.n_params() - muon)


def spell(days):
    return next(f"{days * n:.3g} {unit}" for n, unit in ((1, "days"), (24, "hours"), (1440, "minutes"))
                if days * n >= 2 or unit == "minutes")


def estimate(name, cfg, vocab_size, gpu, gpus, mfu):
    """Print memory and days of a run on `gpus` GPUs of a kind, DDP, without torch.compile, which keeps less.

    The optimiser's own operations are not counted: for Muon some per cent of the rest, at 100,000 tokens per step.
    """
    dtype = torch.float32 if cfg.dtype == "float32" else torch.bfloat16
    if gpu not in GPUS:
        raise UserError(f"--gpu {gpu!r} is none of {', '.join(GPUS)}")
    peak, memory = GPUS[gpu][0] * 1e12, GPUS[gpu][1] * 1e9
    gpus = gpus or int((re.search(r"_(\d+)gpu", name) or [0, 1])[1])
    _, micro = share_of_batch(cfg, gpus)
    model = cfg.make_model(vocab_size)
    state = state_bytes(model, cfg)
    kept = activation_bytes(cfg, vocab_size, torch.device("cpu"), dtype)
    one, both = kept(2) - kept(1), kept(micro)
    tokens = cfg.max_steps * cfg.batch_size * cfg.seq_len
    flops = flops_per_token(model, cfg.make_objective(vocab_size), cfg)
    again = 4 / 3 if cfg.checkpoint_blocks else 1  # the forward pass, which is a third, once more
    days = tokens * flops * again / (gpus * peak * mfu) / 86400
    most = max(0, int((memory * SPARE - state) / one))
    result = {
        "config": name, "gpu": gpu, "gpus": gpus, "utilisation": mfu, "parameters": model.n_params(),
        "dtype": str(dtype).removeprefix("torch."), "state_bytes": state, "activation_bytes_per_sequence": one,
        "micro_batch_size": micro, "total_bytes": state + both, "largest_micro_batch_size": most, "tokens": tokens,
        "flops_per_token": flops, "tokens_per_second": gpus * peak * mfu / (flops * again), "days": days,
    }
    print(f"{name} on {gpus} x {gpu}\n"
          f"memory  {(state + both) / 1e9:.1f} of {memory / 1e9:.0f} GB each: {state / 1e9:.1f} of weights, gradients, "
          f"moments and averages, {both / 1e9:.1f} of activations of {micro} sequences in {result['dtype']}, and what "
          "the allocator wastes"
          + ("" if micro <= most else "\n        does not fit: try "
             + (f"--micro_batch_size={1 << most.bit_length() - 1}" if most else "--checkpoint_blocks"))
          + f"\ntime    {spell(days)}: {tokens:.3g} tokens x {flops:.3g} FLOP at an assumed {mfu:.0%} of "
          f"{peak / 1e12:.0f} TFLOP/s, {result['tokens_per_second']:,.0f} tokens/s")
    print(json.dumps(result))
