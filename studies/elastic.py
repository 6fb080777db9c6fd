"""Train on machines that come and go: DiLoCo by the engine torchft, in which groups of processes may die and join.

    pip install torchft==0.2.0
    torchft_lighthouse --min_replicas 1 --heartbeat_timeout_ms 2000              on a machine that all others reach
    export TORCHFT_LIGHTHOUSE=http://THAT_MACHINE:29510 RUST_LOG=warn NUM_REPLICA_GROUPS=2
    REPLICA_GROUP_ID=0 python studies/elastic.py CONFIG --local_steps=50         on one machine
    REPLICA_GROUP_ID=1 python studies/elastic.py CONFIG --local_steps=50         on another one, now or later
    ... torchrun --standalone --nproc_per_node=8 studies/elastic.py CONFIG ...   a group of 8 processes

NUM_REPLICA_GROUPS is the largest number of groups. batch_size is that of all of them; each group reads its own share.
In a round a group trains for local_steps steps, then takes the outer step of local_sgd.py together with all groups that
are alive. A new group takes part in one exchange before it trains, in which it gets the state of another group. There
are no checkpoints on the way; at the end each group writes OUT_DIR/GROUP/ckpt.pt. docs/slow_links.md says what to know
of the engine.

After each round the first process of a group prints how many groups took part (0: the round is lost, and is trained
again), its bits per token, and a checksum of weights and averages (EMA), which is the same in all groups.
"""

import dataclasses
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import UserError, pick_dtype, require, run

import torch

import configs
import parallel
import storage
from checkpoint import restore, state_of
from data.loader import open_data
from optim import EMA, learning_rate, make_optimizers, set_learning_rate
from train import batches, train_step


def check(cfg):
    """(number of this group, largest number of groups). Raises UserError if something is missing or not possible."""
    require("torchft", "studies/elastic.py")
    for name in ("TORCHFT_LIGHTHOUSE", "REPLICA_GROUP_ID", "NUM_REPLICA_GROUPS"):
        if not os.environ.get(name):
            raise UserError(f"the environment variable {name} is not set: --help shows the commands")
    if not cfg.local_steps:
        raise UserError("--local_steps is missing: the number of steps between two exchanges")
    if cfg.delay or cfg.fragments > 1 or cfg.send_dtype != "float32" or cfg.pull < 1 or cfg.local_group > 1 or (
            cfg.anneal_steps or cfg.dropout):
        raise UserError("delay, eager, fragments, pull, send_dtype, local_group, anneal_steps and dropout do not work "
                        "here: leave them out (--dropout=0)")
    if cfg.max_steps % cfg.local_steps:
        raise UserError(f"max_steps={cfg.max_steps} must be a multiple of local_steps={cfg.local_steps}")
    try:
        k, n = int(os.environ["REPLICA_GROUP_ID"]), int(os.environ["NUM_REPLICA_GROUPS"])
        assert 0 <= k < n
    except (ValueError, AssertionError):
        raise UserError("REPLICA_GROUP_ID must be one of 0 ... NUM_REPLICA_GROUPS - 1")
    return k, n


def claim_new(out):
    """Lock a folder for this process, as storage.claim does. Raises UserError if it has a run."""
    lock = storage.claim(out)
    if any(out.glob("ckpt*.pt")):
        raise UserError(f"{out} has a run already: choose another --out_dir, or delete it")
    return lock


def main():
    name, cfg, _ = configs.from_command_line("studies/elastic.py", __doc__, lambda parser: None)
    group, n_groups = check(cfg)
    from torchft import Manager, ProcessGroupGloo
    from torchft.local_sgd import DiLoCo

    parallel.join(cfg.timeout_minutes)
    rank, world, h = parallel.rank, parallel.world, cfg.local_steps
    device = parallel.own_device(cfg.device)
    meta, tokens, _, items = open_data(cfg)
    dtype, out = pick_dtype(device, cfg.dtype), Path(cfg.out_dir or Path("out", f"elastic_{name}"), str(group))
    _ = parallel.together(lambda: claim_new(out) if parallel.is_main else None)  # locked until this process ends
    local, micro = parallel.share_of_batch(cfg, n_groups * world)
    mine = range(local * (group * world + rank), cfg.batch_size)[:local]
    torch.manual_seed(cfg.seed)
    model, objective = cfg.make_model(meta["vocab_size"]), cfg.make_objective(meta["vocab_size"])
    net = parallel.spread(model, objective, device, fsdp=False, compiled=False)
    optimizers, ema = make_optimizers(model, cfg, device, dtype), EMA(model, cfg.ema_decay)
    outer = torch.optim.SGD(model.parameters(), lr=cfg.outer_lr, momentum=cfg.outer_momentum,
                            nesterov=cfg.outer_momentum > 0)
    # torchft counts the steps of one optimiser, and a run may have two. So it counts those of one that does nothing.
    clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)])

    def load(state):
        restore(state, model, ema, optimizers)
        ema.updates = state["updates"]

    store = None if "RANK" in os.environ else torch.distributed.TCPStore("localhost", 0, is_master=True)
    manager = Manager(
        ProcessGroupGloo(timedelta(seconds=60)), load, lambda: state_of(model, ema, optimizers) | {
            "updates": ema.updates}, min_replica_size=1, use_async_quorum=False, init_sync=False,
        quorum_timeout=timedelta(minutes=cfg.timeout_minutes), rank=rank, world_size=world, replica_id=str(group),
        store_addr=store and store.host, store_port=store and store.port)
    # A new group fetches the EMA before the outer step that it takes part in, so the EMA belongs to this step.
    outer.register_step_post_hook(lambda *_: ema.update(h if manager.current_step() > 1 else 0))  # 1: no training yet
    # All weights in one message: torchft averages several buckets wrongly (docs/slow_links.md).
    with DiLoCo(manager, [model], clock, outer, sync_every=h, use_bucketization=True, bucket_cap_mb=2**20):
        for _ in range(h):  # the exchange without training
            clock.step()
        while (r := manager.current_step()) <= cfg.max_steps // h:
            nats, stream = 0.0, batches(tokens, objective, cfg, (r - 1) * h, mine, micro, False, items)
            for step, parts in zip(range((r - 1) * h, r * h), stream):
                set_learning_rate(optimizers, learning_rate(step, cfg))
                nats += train_step(net, objective, parts, optimizers, cfg, device, dtype)[0].item() / h
                clock.step()  # the last one of a round exchanges weights
            if rank == 0:
                took_part = manager.num_participants() * (manager.current_step() == r + 1)
                checksum = sum(x.double().sum().item() for x in [*model.parameters(), *ema.average])
                print(f"round {r}  groups {took_part}  bits {nats / math.log(2):.4f}  checksum {checksum}", flush=True)
    if rank == 0:
        storage.save(out / "ckpt.pt", state_of(model, ema) | {
            "name": name, "config": dataclasses.asdict(cfg), "meta": meta, "step": (r - 1) * h})
    manager.shutdown()


if __name__ == "__main__":
    run(main, processes=True)
