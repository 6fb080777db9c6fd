"""The processes of a run: one, or as many as torchrun starts. All their communication is in this file.

Every process makes the same collective calls in the same order. Work for the main process (rank 0) alone, such as
reading checkpoints and writing files, goes through on_main. Work that may fail in some processes goes through together.
Then an error in one process is raised in all, and none waits for ever. A single process runs the same code without
communication.
"""

import functools
import os
import signal
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cli import UserError, pick_device, torchrun_lacks

# One process, until join() finds others.
rank, world, is_main = 0, 1, True
on_this_machine = 1  # processes

# Processes that train one copy of the weights are a team. All are one team, unless form_teams is called.
team, team_size = None, 1  # team: the process group of this process's team; None: of all processes
leaders, n_teams = None, 1  # leaders: the process group of the first processes of all teams


def join(timeout_minutes):
    """Connect to the other processes, if torchrun started some. If one is silent for timeout_minutes, all end.

    Raises UserError if something else than torchrun left a RANK in the environment.
    """
    global rank, world, is_main, on_this_machine, team_size, everyone
    if "RANK" not in os.environ:
        return
    if wrong := torchrun_lacks():
        raise UserError(f"the environment has a RANK, and its {wrong} is missing or wrong: start several processes "
                        "with torchrun, or unset RANK")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    is_main, team_size = rank == 0, world
    timeout = timedelta(minutes=timeout_minutes)
    store, *_ = next(dist.rendezvous("env://", timeout=timeout))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps one store over its restarts, so the addresses in it are those of dead processes.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    # Small values (errors, signals, validation losses) are sent between CPUs, and do not wait for a GPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                            world_size=world, timeout=timeout)
    # When nothing refers to a group any more, PyTorch ends it and waits for gloo's threads. These may wait for Python's
    # global lock, which main() holds: a deadlock. So this reference stays until cli.run ends the process by os._exit.
    everyone = dist.group.WORLD


def share_of_batch(cfg, world):
    """(sequences per process and step, sequences per micro-step). Raises UserError if they do not divide batch_size."""
    if cfg.batch_size < world:
        raise UserError(f"batch_size={cfg.batch_size} is less than one for each of {world} processes: use a larger one")
    if cfg.batch_size % world:
        less = cfg.batch_size // world * world
        raise UserError(f"batch_size={cfg.batch_size} cannot be shared out among {world} processes: use {less} or "
                        f"{less + world}")
    micro = min(cfg.micro_batch_size, cfg.batch_size // world)
    if cfg.batch_size % (world * micro):
        raise UserError(f"batch_size={cfg.batch_size} must be a multiple of processes x micro_batch_size = "
                        f"{world} x {micro}")
    return cfg.batch_size // world, micro


def form_teams(size, timeout_minutes):
    """Split the processes into teams of `size`, the workers of local_sgd.py, with the timeout of join().

    Raises UserError if the size does not divide their number.
    """
    global team, team_size, leaders, n_teams
    if world % size:
        raise UserError(f"local_group={size} does not divide the number of processes, {world}")
    team_size, n_teams = size, world // size
    if dist.is_initialized():
        for first in range(0, world, size):  # every process has to take part in making every group
            group = dist.new_group(list(range(first, first + size)), timeout=timedelta(minutes=timeout_minutes))
            if first <= rank < first + size:
                team = group
        leaders = dist.new_group(list(range(0, world, size)), timeout=timedelta(minutes=timeout_minutes))


def leave():
    if dist.is_initialized():
        dist.destroy_process_group()


def own_device(name):
    """The device of this process: pick_device(name), and on CUDA under torchrun the GPU with its LOCAL_RANK."""
    device = pick_device(name)
    if device.type == "cuda" and dist.is_initialized():
        if not os.environ.get("LOCAL_RANK", "").isdecimal():
            raise UserError("LOCAL_RANK, the number of a process's GPU, is not set: start the processes with torchrun")
        n_gpus, local_rank = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if local_rank >= n_gpus:
            raise UserError(f"this machine has {n_gpus} GPUs, and each process needs one: use torchrun with "
                            f"--nproc_per_node={n_gpus} or less")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if device.type == "mps" and dist.is_initialized():
        if name != "auto":
            raise UserError("several processes cannot share work on mps: leave out torchrun, or use --device=cpu")
        device = torch.device("cpu")  # gloo cannot send tensors on mps
    return device


# ---- agreeing ------------------------------------------------------------------------------------------------------


def together(function):
    """Call function() in every process and return its own result. A UserError in any process is raised in all."""
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
    """Call function() in the main process alone; all processes return its result. A UserError is raised in all."""
    result = [together(function if is_main else lambda: None)]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


def total(x, group=None):
    """Sum a tensor over the processes (of a group), in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(x, group=group)
    return x


def largest(x):
    """Replace each number of a tensor by its largest value in any process, in place, and return the tensor."""
    if dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


LOST_PARENT = 1000  # stands for a signal; it is larger than their numbers, so agreed() prefers it


class StopSignals:
    """Remember SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (SLURM), so that all processes stop after the same step.

    The end of torchrun counts as such a signal. If torchrun is killed without warning, for example by the kernel when
    memory is short, its workers go on in sessions of their own, and would lock the folder for ever. A worker notices
    that torchrun is gone because it then has another parent process.
    """

    def __init__(self):
        self.received, self.parent = 0, os.getppid()
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self.remember)

    def remember(self, number, frame):
        # A second Ctrl-C stops at once. Under torchrun each one arrives twice, from the terminal and from torchrun.
        if self.received == number == signal.SIGINT and not dist.is_initialized():
            raise KeyboardInterrupt
        if number == signal.SIGINT and not dist.is_initialized():
            os.write(2, b"\nstopping after this step, which will be saved; Ctrl-C again stops at once, without "
                        b"saving\n")
        self.received = number

    def agreed(self):
        """(number, name) of the signal that any process has received, or (0, ""). All processes get the same answer."""
        if "RANK" in os.environ and os.getppid() != self.parent:
            self.received = LOST_PARENT
        number = largest(torch.tensor(self.received)).item()
        if number == LOST_PARENT:
            return number, "the end of torchrun"
        return number, signal.Signals(number).name if number else ""


# ---- models on several devices -------------------------------------------------------------------------------------


def compiles(cfg, device):
    """Tell whether a run is compiled: as cfg.compile says, or by default on CUDA only."""
    return device.type == "cuda" if cfg.compile is None else cfg.compile


def allow_graphs():
    """Allow torch.compile 64 graphs for each function, instead of 8. Training, validation, both texts of block
    diffusion, and batches of other sizes need one each."""
    torch._dynamo.config.recompile_limit = 64


def compile_trunk(model):
    """Compile the trunk of a model. It is one graph, for any number of masks.

    In several processes DistributedDataParallel cuts it at its buckets of gradients."""
    allow_graphs()
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")  # by transformers
    trunk = torch.compile(model.trunk)

    def trunk_for_any_masks(*inputs, **more):
        for x in inputs:
            if torch.is_tensor(x) and x.dim() == 1 and not x.is_floating_point():  # the places of the masks
                torch._dynamo.maybe_mark_dynamic(x, 0)  # else the next step, with other masks, would compile again
        return trunk(*inputs, **more)

    model.trunk = trunk_for_any_masks


def compiled_for_any_masks(function):
    """Compile a function of tokens, (B, L, ...) or the N masked ones alone, (N, ...), as one graph for any N."""
    compiled = torch.compile(function)

    def call(x, *more):
        if x.dim() == 2:
            for part in (x, *more):
                torch._dynamo.maybe_mark_dynamic(part, 0)
        return compiled(x, *more)

    return call


MANY_TOKENS = 1000  # with a vocabulary of this size or more, compiling the head and the cost pays (LOG.md)


def compile_parts(model, objective):
    """Compile what a run trains: the trunk, and with a large vocabulary the head (the output layer) and the cost.

    Compiled, head and cost need no copy of the logits in float32. With a small vocabulary they are as fast uncompiled.
    With masks, head and cost become one graph in training, which needs no copy of the logits' gradient either. Then
    model.head returns its input unchanged, and objective.cost computes the logits from it, and the cost from these.
    """
    compile_trunk(model)
    if model.vocab_size < MANY_TOKENS:
        return
    head, cost = model.head, objective.cost
    objective.cost = compiled_cost = compiled_for_any_masks(cost)
    if isinstance(head, torch.nn.Module):  # compiled, its parameters would get other names
        return
    model.head = compiled_head = compiled_for_any_masks(head)
    if objective.has_mask:
        head_and_cost = compiled_for_any_masks(lambda x, *more: cost(head(x), *more))
        training = torch.is_grad_enabled
        model.head = lambda x: x if training() else compiled_head(x)
        objective.cost = lambda x, *more: head_and_cost(x, *more) if training() else compiled_cost(x, *more)


def spread(model, objective, device, fsdp, compiled):
    """Put the model on the device, compile it if `compiled`, and wrap it to average gradients over the processes.

    With fsdp every process keeps a share of each parameter, and collects the whole parameters of a block when they are
    needed (FSDP, arXiv 2304.11277). Then each block is compiled alone, and with a large vocabulary the objective's
    cost. Without fsdp every process has the whole model (DDP), and compile_parts says what is compiled.
    """
    if fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        mesh = init_device_mesh(device.type, (world,))
        if compiled:
            allow_graphs()
        # Keys and values are views of one product, and some networks' logits are views, too. Nothing writes into them,
        # so their gradients are right.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .*returned a view")
        for block in model.blocks:
            if compiled:
                block.compile()
            fully_shard(block, mesh=mesh)
        # Without reshard_after_forward the parameters outside the blocks would stay whole after a validation, and miss
        # later updates.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        if compiled and model.vocab_size >= MANY_TOKENS:
            objective.cost = compiled_for_any_masks(objective.cost)
        if hasattr(model, "remember"):  # samplers call it, and it needs whole parameters, as forward does
            register_fsdp_forward_method(model, "remember")
        return model
    model.to(device)
    if compiled:
        compile_parts(model, objective)
    if team_size == 1:
        return model
    net = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None, process_group=team,
                                  gradient_as_bucket_view=True)
    net.broadcast_buffers = False  # the buffers are tables that never change
    return net


def bare(net):
    """The model without the wrapper that spread() may have put around it."""
    return net.module if isinstance(net, DistributedDataParallel) else net


def average_in_next_backward(net, wanted):
    """Say whether the next backward pass averages the gradients over the processes. DDP needs it once per step.

    FSDP averages in every backward pass, because otherwise every process would have to keep all gradients.
    """
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = wanted  # the attribute that DDP's no_sync() sets


def clear_gradients(net, optimizer):
    """Clear the gradients, and free their memory. With DistributedDataParallel they stay, as views of its buckets.

    The buckets' memory is never freed. Without these views the first micro-batch would need gradients beside them."""
    optimizer.zero_grad(set_to_none=not isinstance(net, DistributedDataParallel))


def shared_out(function, x):
    """Compute function(x), of the shape of x (n, ...), together: each process of the team does some of the n parts.

    The function treats the parts one by one. All processes have the same x, and get the whole result.
    """
    if team_size == 1:
        return function(x)
    each = -(-len(x) // team_size)
    first = rank % team_size * each
    mine = x[first:first + each]  # the last processes may have fewer than `each`, or none
    own = x.new_zeros(each, *x.shape[1:])
    if len(mine):
        own[:len(mine)] = function(mine)
    found = x.new_empty(team_size * each, *x.shape[1:])
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # the latter before torch 2.13
    gather(found, own, group=team)
    return found[:len(x)]


def all_rows(x, like):
    """Return N whole matrices (N, m, n), of which x has this process's rows. FSDP splits the parameter `like` by rows.

    If `like` is not split, x is whole already. Otherwise every process has all rows for a moment."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Shard
    (m, n), N = like.shape, len(x)
    return DTensor.from_local(x, like.device_mesh, [Shard(1)], shape=(N, m, n), stride=(m * n, n, 1)).full_tensor()


def own_rows(x, like):
    """Take this process's rows of the matrices x (N, m, n), the reverse of all_rows."""
    if not hasattr(like, "device_mesh"):
        return x
    from torch.distributed.tensor import DTensor, Replicate, Shard
    return DTensor.from_local(x, like.device_mesh, [Replicate()]).redistribute(placements=[Shard(1)]).to_local()


def local(tensors):
    """This process's share of each tensor, as a view without gradient."""
    detached = [x.detach() for x in tensors]
    return [x.to_local() if hasattr(x, "to_local") else x for x in detached]


def whole(x):
    """The whole of a tensor that may be shared out: on the CPU in the main process, None in the others."""
    x = x.detach()
    if hasattr(x, "full_tensor"):
        x = x.full_tensor()
    return x.cpu() if is_main else None


@torch.no_grad()
def copy_from_main(target, source):
    """Copy a whole tensor of the main process, source, into target, which may be shared out. Others pass any source."""
    if dist.is_initialized():
        # contiguous, because numbers are sent as they lie in memory: GPT-2's matrices are transposed views
        source = source.to(target.device, target.dtype).contiguous() if is_main else torch.empty(
            target.shape, dtype=target.dtype, device=target.device)
        dist.broadcast(source, 0)
        if hasattr(target, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor
            source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


# ---- workers that exchange their weights (local_sgd.py) ------------------------------------------------------------


class Average:
    """An average of lists of tensors over all teams, which is computed while training goes on, until wait().

    messages: one list for each worker of this process; train.py has one. The processes of a team have equal messages.
    dtype: number format in which they are sent and added up.
    The first process of each team takes part in the sum, and wait() sends the result to the rest of its team.
    """

    def __init__(self, messages, dtype):
        self.like, self.n = messages[0], n_teams * len(messages)
        flat = [torch.cat([x.flatten() for x in message]).to(dtype) for message in messages]
        self.sum, self.work = functools.reduce(torch.add, flat), None
        if n_teams > 1 and rank % team_size == 0:
            self.work = dist.all_reduce(self.sum, group=leaders, async_op=True)

    def wait(self):
        """The averages, as a list like the messages."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        if n_teams > 1 and team_size > 1:
            leader = rank // team_size * team_size
            dist.broadcast(self.sum, leader, group=team)
        mean = self.sum.to(self.like[0].dtype) / self.n
        return [x.view(y.shape) for x, y in zip(mean.split([y.numel() for y in self.like]), self.like)]


def gather_from_teams(x):
    """Return the list of x of the first process of each team in the main process, and None in the others.

    One team sends after the other."""
    found = [x]
    for leader in range(team_size, world, team_size):
        box = [x]
        if rank == leader:
            dist.send_object_list(box, 0, device=torch.device("cpu"))
        elif is_main:
            dist.recv_object_list(box, leader, device=torch.device("cpu"))
            found.append(box[0])
    return found if is_main else None


def hand_out(found):
    """Give every process its team's entry of a list that the main process has."""
    for other in range(1, world):
        box = [found[other // team_size] if is_main else None]
        if is_main:
            dist.send_object_list(box, other, device=torch.device("cpu"))
        elif rank == other:
            dist.recv_object_list(box, 0, device=torch.device("cpu"))
            return box[0]
    return found[0]
