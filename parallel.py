"""The processes of a run: one, or as many as torchrun starts. All that they say to each other is in this file.

Every process makes the same collective calls in the same order. What only the main process (rank 0) does, such as
reading checkpoints and writing files, goes through on_main; what may fail in some processes goes through together. Then
an error in one is an error in all, instead of a hang. A single process runs the same code and talks to nobody.
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import UserError, pick_device

rank = int(os.environ.get("RANK", 0))
world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
is_main = rank == 0


def join(timeout_minutes):
    """Find the other processes, if torchrun started some. Without one of them for timeout_minutes, the others end."""
    if "RANK" not in os.environ:
        return
    timeout = timedelta(minutes=timeout_minutes)
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over its restarts, and the addresses in it are those of dead processes.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # Small things (errors, signals, validation losses) travel between CPUs, and do not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timeout)


def share_of_batch(cfg, world):
    """(sequences per process and step, sequences per micro-step). Raises UserError if batch_size does not divide so."""
    if cfg.batch_size < world:
        raise UserError(f"batch_size={cfg.batch_size} is fewer than one sequence for each of {world} processes")
    micro = min(cfg.micro_batch_size, cfg.batch_size // world)
    if cfg.batch_size % (world * micro):
        raise UserError(f"batch_size={cfg.batch_size} must be a multiple of processes x micro_batch_size = "
                        f"{world} x {micro}")
    return cfg.batch_size // world, micro


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name):
    """The device of this process: as pick_device says, and on CUDA that of its place on the node."""
    device = pick_device(name)
    if device.type == "cuda" and dist.is_initialized():
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    if device.type == "mps" and dist.is_initialized():
        if name != "auto":
            raise UserError("several processes cannot share work on mps: leave out torchrun, or use --device=cpu")
        device = torch.device("cpu")  # gloo sends nothing from mps
    return device


# ---- agreeing ------------------------------------------------------------------------------------------------------


def together(function):
    """Own result of function(), called in every process. A UserError in any of them is raised in all."""
    result, error = None, None
    try:
        result = function()
    except UserError as caught:
        error = str(caught)
    errors = [error]
    if dist.is_initialized():
        errors = [None] * world
        dist.all_gather_object(errors, error)
    for i, error in enumerate(errors):
        if error:
            raise UserError(error if i == 0 else f"process {i}: {error}")
    return result


def on_main(function):
    """Result of function(), called in the main process alone, in all processes. A UserError is raised in all."""
    result = [together(function if is_main else lambda: None)]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def total(x):
    """Sum of a tensor over the processes, in place and returned."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


LOST_PARENT = 1000  # beside the numbers of signals, and above them


class StopSignals:
    """SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM) are remembered, to be obeyed when all have finished their step.

    So is the end of torchrun, if it is killed and can say nothing (as by the kernel when memory is short): its workers
    go on in sessions of their own, and would hold the folder for ever. They find that they have another parent.
    """

    def __init__(self):
        self.received, self.parent = 0, os.getppid()
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number, frame):
        # A second Ctrl-C stops at once; under torchrun each one arrives twice, from the terminal and from torchrun.
        if self.received == number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        self.received = number

    def agreed(self):
        """(number, name) of what any process is to stop for, or (0, None). All get the same answer."""
        if "RANK" in os.environ and os.getppid() != self.parent:
            self.received = LOST_PARENT
        number = torch.tensor(self.received)
        if dist.is_initialized():
            dist.all_reduce(number, dist.ReduceOp.MAX)
        number = number.item()
        return number, "the end of torchrun" if number == LOST_PARENT else number and signal.Signals(number).name


# ---- models on several devices -------------------------------------------------------------------------------------


def spread(model, device, fsdp, compiled):
    """The model as training calls it, on the device: compiled if so, averaging gradients over the processes.

    With fsdp every process keeps a share of each parameter, and collects a block's when it is needed (FSDP,
    arXiv 2304.11277); else every process has the whole model (DDP).
    """
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        mesh = init_device_mesh(device.type, (world,))
        for block in model.blocks:
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
        # Else the outer parameters would stay whole after a forward pass without a backward one, and become stale.
        return fully_shard(model, mesh=mesh, reshard_after_forward=True)
    model.to(device)
    if compiled:
        model.trunk = torch.compile(model.trunk)
    if not dist.is_initialized():
        return model
    net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                  gradient_as_bucket_view=True)
    net.broadcast_buffers = False  # tables that never change
    return net


def average_gradients(net, wanted):
    """Whether the next backward pass averages gradients over the processes: once per step is enough.

    FSDP does it every time all the same, because otherwise every process would have to keep all of them.
    """
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = wanted  # what its no_sync() sets


def local(tensors):
    """What this process has of each tensor, as a view without gradient."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in (x.detach() for x in tensors)]


def whole(x):
    """A tensor, collected if it is shared out: on the CPU in the main process, None in the others."""
    x = x.detach()
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    return x.cpu() if is_main else None


@torch.no_grad()
def copy_from_main(target, source):
    """Copy the main process's source, a whole tensor (ignored elsewhere), into target, which may be shared out."""
    if dist.is_initialized():
        source = source.to(target.device, target.dtype) if is_main else torch.empty(
            target.shape, dtype=target.dtype, device=target.device)
        dist.broadcast(source, 0)
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)
