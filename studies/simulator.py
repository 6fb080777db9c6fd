"""Train by several workers on uneven machines, all in one process: real training, simulated time.

    python studies/simulator.py mdlm_mini_fast --machines studies/machines/very.txt --local_steps=50
    python studies/simulator.py mdlm_mini_fast --machines studies/machines/very.txt --local_steps=50 --out_dir=out/dn \\
        --algorithm async --buffer 4 --dynamic_steps
    python studies/simulator.py mdlm_mini_fast --machines studies/machines/halos.txt --algorithm halos \\
        --local_steps=8 --dynamic_steps --clock_only                    times and bytes, without training

Algorithms, for K workers with learning rate lr = outer_lr and momentum mu = outer_momentum at the server:

    ddp      gradients are averaged in every step (local_steps and the outer step play no part)
    local    workers exchange weights after local_steps steps, as in train.py: DiLoCo, and with --delay, --eager and
             --fragments its relatives (local_sgd.py)
    async    Async Local-SGD (arXiv 2401.09135): a worker sends its difference when it is done, the server takes an
             outer step at once, and the worker goes on with the new weights. Nobody waits. --buffer N: delayed
             Nesterov; see studies/servers.py
    halos    HALoS (arXiv 2506.04531): async within each region, with a server of its own, and between these servers and
             a global one. The paper's settings for 4 x 4 workers: --local_steps=8 --dynamic_steps --buffer 16
             --outer_lr=3.2 --outer_momentum=0.9 --merge_every 32 --merge_weight 0.25 --global_lr 0.3
             --global_momentum 0.5 --global_buffer 2

--dynamic_steps gives slow machines fewer local steps: h_k = ceil(local_steps * speed_k / fastest speed).

All algorithms take max_steps * K local steps in all, each on batch_size / K sequences, so they see equally many tokens.
A local step has the learning rate of the step that the run as a whole has reached. Everything is a function of the
settings and the seed. The times (studies/clock.py) do not depend on the weights, so an interrupted run replays them and
goes on with --resume from its last checkpoint.

It writes ckpt.pt, which evaluate.py and sample.py read, run.png, and log.jsonl. Each line of the log has the validation
of the server's averaged (EMA) weights, the simulated hours, and three means over the updates since the line before:

    staleness   updates of other workers between the start of a worker's round and its own update
    drift       |server's weights at the update - at the start of the round| / |server's weights|
    cosine      of the angle between the difference that comes and the momentum of the server before it
"""

import dataclasses
import functools
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import UserError, named, note, number, pick_dtype, progress, require, run, table

import torch

import configs
import local_sgd
import storage
from adapt import adapt
from checkpoint import states
from configs import replace
from data.loader import check_same_data, check_same_tokens, open_data, windows
from likelihood import Windows, bound, by_rate, mean_and_error, plus_minus
from local_sgd import Exchange, Worker
from log import Log
from log import read as read_log
from optim import EMA, learning_rate, make_optimizers, set_learning_rate
from parallel import Average
from plot import picture
from randomness import rng
from studies.clock import Clock, Rounds, asynchronous, read_machines
from studies.servers import RegionalServer, Server, cosine, fill_lists, lists, norm
from train import batches, train_step

SUMS = ("staleness", "drift", "cosine")
HALOS = dict(merge_every=8, merge_weight=0.25, carry=False, global_lr=0.3, global_momentum=0.5, global_buffer=2)


def add_arguments(parser):
    parser.add_argument("--machines", type=Path, required=True, metavar="FILE", help="table of machines and links")
    parser.add_argument("--algorithm", choices=("ddp", "local", "async", "halos"), default="local",
                        help="how workers work together (default: local)")
    parser.add_argument("--buffer", type=number(int, 1), default=1,
                        help="differences from one change of the momentum to the next; async and halos (default 1)")
    parser.add_argument("--dynamic_steps", action="store_true", help="slow machines take fewer local steps")
    halos = parser.add_argument_group(f"flags of halos (defaults: {HALOS})".replace("'", ""))
    halos.add_argument("--merge_every", type=number(int, 1),
                       help="differences that a region's server takes before it sends")
    halos.add_argument("--merge_weight", type=number(float, 0, 1),
                       help="weight of the global weights when a region's server merges them")
    halos.add_argument("--carry", action="store_true", help="also send what came between sending and merging")
    halos.add_argument("--global_lr", type=number(float, 0), help="learning rate of the global server")
    halos.add_argument("--global_momentum", type=number(float, 0, 0.999), help="momentum of the global server")
    halos.add_argument("--global_buffer", type=number(int, 1), help="buffer of the global server")
    parser.set_defaults(**HALOS)
    parser.add_argument("--step_seconds", type=number(float, 1e-9), default=1.0,
                        help="seconds of a local step of a machine of speed 1 (default 1)")
    parser.add_argument("--model_bytes", type=number(float, 1),
                        help="bytes of the weights (default: the model's, in float32)")
    parser.add_argument("--no_contention", action="store_true",
                        help="transfers over one link do not wait for each other")
    parser.add_argument("--relative_speeds", action="store_true", help="divide all speeds by the largest")
    parser.add_argument("--clock_only", action="store_true", help="print times and bytes; do not train")
    parser.add_argument("--json", action="store_true", help="with --clock_only: print one JSON object")
    parser.add_argument("--init_from", type=named, metavar="CKPT",
                        help="checkpoint whose averaged weights training starts from")
    parser.add_argument("--resume", action="store_true", help="continue the run in out_dir, if there is one")


# ---- training --------------------------------------------------------------------------------------------------------


def data_of(sim, k, taken):
    """The batches of worker k from its step `taken` on, as process k of K of train.py has them; see train.batches."""
    endless, mine = replace(sim.cfg, max_steps=10**9), range(k * sim.local, (k + 1) * sim.local)
    return batches(sim.tokens, sim.objective, endless, taken, mine, sim.micro, False, sim.items)


class Copy:
    """A worker's model, optimisers and data.

    base: the weights at the start of a round of an asynchronous algorithm. difference: base - the weights at its end.
    """

    kept = ("params", "base", "difference")

    def __init__(self, sim, k, weights):
        cfg, self.k, self.sim, self.taken = sim.cfg, k, sim, 0
        torch.manual_seed(cfg.seed)
        self.model = cfg.make_model(sim.meta["vocab_size"])
        with torch.no_grad():
            for p, w in zip(self.model.parameters(), weights):
                p.copy_(w)
        self.model.train()
        self.optimizers = make_optimizers(self.model, cfg, sim.device, sim.dtype)
        self.params, self.data = [p.detach() for p in self.model.parameters()], data_of(sim, k, 0)
        self.base, self.difference = ([p.clone() for p in self.params] for _ in range(2))

    def step(self, lr, parts=None):
        """Take a training step, exactly as train.py does, on the next batch or on `parts`. Returns nats per token."""
        cfg = self.sim.cfg
        set_learning_rate(self.optimizers, lr)
        parts = parts or next(self.data)
        if cfg.dropout:
            torch.manual_seed(int(rng(cfg.seed, "dropout", self.taken, self.k).integers(2**63)))
        nats, _, bad = train_step(self.model, self.sim.objective, parts, self.optimizers, cfg, self.sim.device,
                                  self.sim.dtype)
        if bad:
            raise UserError(f"loss or gradient of worker {self.k} is not finite: use a smaller --lr or --outer_lr")
        self.taken += 1
        return nats.item()

    def state(self):
        moments = states(self.optimizers)
        return lists(self) | {"taken": {"taken": torch.tensor(float(self.taken))}, "optimizer": {
            name: dict(moments[p]) for name, p in self.model.named_parameters()}}

    def restore(self, tree):
        fill_lists(self, tree)
        self.taken, moments = int(tree["taken"]["taken"]), states(self.optimizers)
        self.data = data_of(self.sim, self.k, self.taken)
        for name, p in self.model.named_parameters():
            moments[p].update({key: value.clone() for key, value in tree["optimizer"][name].items()})


class Simulation:
    """The parts that all algorithms share: data, the model that is validated, the log, checkpoints."""

    def __init__(self, name, cfg, args, clock):
        self.name, self.cfg, self.args, self.clock = name, cfg, args, clock
        self.K = len(clock.found.machines)
        self.device, self.dtype = torch.device("cpu"), pick_dtype(torch.device("cpu"), cfg.dtype)
        self.local = cfg.batch_size // self.K
        self.micro = min(cfg.micro_batch_size, self.local)
        self.meta, self.tokens, val, self.items = open_data(cfg)
        self.objective = cfg.make_objective(self.meta["vocab_size"])
        self.windows = Windows(val, windows(val, cfg.seq_len, cfg.eval_sequences), cfg.seq_len, self.micro, self.device,
                               self.dtype)
        torch.manual_seed(cfg.seed)
        self.model = cfg.make_model(self.meta["vocab_size"])
        self.out = Path(cfg.out_dir) if cfg.out_dir else Path("out", f"{args.algorithm}_{name}")
        fields = dataclasses.asdict(cfg)
        own = {key: value for key, value in vars(args).items() if key not in (*fields, "config", "resume")}
        self.settings = {key: str(value) for key, value in (own | fields | {"machines": clock.found}).items()
                         if key not in fields or configs.same_run(key)}
        if args.init_from:
            source = storage.read(args.init_from)
            check_same_tokens(source["meta"], self.meta, cfg.dataset)
            storage.load_weights(self.model, adapt(self.model, source, cfg, args.init_from))
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.sums, self.updates, self.nats, self.steps = dict.fromkeys(SUMS, 0.0), 0, 0.0, 0
        self.events_done, self.logged, self.progress = 0, 0, 0

    def open(self):
        """Open the folder. Sets `events_done`, the number of events of an earlier part of the run. Raises UserError."""
        self.payload, step = None, 0
        if self.args.resume:
            _, self.payload = storage.read_latest(self.out)
        if self.payload:
            before = self.payload.get("settings", {})
            changed = [key for key in self.settings if before.get(key) != self.settings[key]]
            if changed:
                raise UserError(f"{self.out} holds another run ({changed[0]} was {before.get(changed[0])}): use its "
                                "settings")
            check_same_data(self.meta, self.payload["meta"], self.cfg.dataset, f"the run of {self.out}")
            self.events_done, self.progress, step = (self.payload[key] for key in ("events", "progress", "step"))
        elif not self.args.resume and (self.out / "log.jsonl").exists():
            raise UserError(f"{self.out} already holds a run: continue it with --resume, or choose another --out_dir")
        self.lock = storage.claim(self.out)
        self.bar = progress(total=self.cfg.max_steps, initial=step, desc=self.args.algorithm, unit="step")
        self.log = Log(self.out, step, self.name, dataclasses.asdict(self.cfg) | {"wandb": False}, self.bar)
        self.logged = step

    def begin(self, weights, kept):
        """Begin or continue.

        weights: of the server, which change in place. They are averaged (EMA), validated and saved.
        kept: {name: object with state() and restore()}, all that the rest of the run depends on.
        """
        self.weights, self.kept, self.ema = weights, kept, EMA(self.model, self.cfg.ema_decay, weights)
        if self.payload:
            for name, thing in kept.items():
                thing.restore(self.payload["simulation"][name])
            torch._foreach_copy_(self.ema.average, list(self.payload["ema"].values()))

    def save(self, events):
        names = [name for name, _ in self.model.named_parameters()]
        storage.save(self.out / "ckpt.pt", {
            "name": self.name, "config": dataclasses.asdict(self.cfg), "meta": self.meta, "step": self.logged,
            "model": dict(zip(names, self.weights)), "ema": dict(zip(names, self.ema.average)),
            "settings": self.settings, "events": events, "progress": self.progress,
            "simulation": {name: thing.state() for name, thing in self.kept.items()}}, keep_previous=True)

    def update(self, staleness=0, drift=0.0, cosine=0.0):
        for key, value in zip(SUMS, (staleness, drift, cosine)):
            self.sums[key] += value
        self.updates += 1

    def learning_rate(self, progress):
        """progress: local steps of all workers together."""
        return learning_rate(min(progress // self.K, self.cfg.max_steps - 1), self.cfg)

    def report(self, progress, seconds, events, done=False):
        """Validate, write a line and save, if an evaluation is due after this many local steps of all workers."""
        self.ema.updates = self.progress / self.K  # not added up, so that an interruption changes no rounding
        self.ema.update((progress - self.progress) / self.K)
        self.progress, step = progress, progress // self.K
        self.bar.update(step - self.bar.n)
        if not done and step // self.cfg.eval_interval == self.logged // self.cfg.eval_interval:
            return
        self.logged = step
        with self.ema.applied():
            nats = bound(self.model, self.objective, self.windows, prefix_range=self.cfg.prefix_range,
                         until=self.items.until)
        order = by_rate(self.windows.n, n_times=self.objective.n_times(self.cfg.seq_len))
        bits, error = mean_and_error(nats / math.log(2), order)
        means = {key: value / self.updates if self.updates else None for key, value in self.sums.items()}
        used = sum(self.clock.busy) / (self.K * seconds) if seconds else 1.0
        self.log.write(
            f"step {step:,}  {seconds / 3600:.3f} h  validation bits {bits:.4f} {plus_minus(error)}  training bits "
            f"{self.nats / max(1, self.steps) / math.log(2):.3f}  utilisation {used:.0%}"
            + (f"  staleness {means['staleness']:.1f}  drift {means['drift']:.4f}  cosine {means['cosine']:.2f}"
               if self.updates else ""),
            step=step, tokens=progress * self.local * self.cfg.seq_len, hours=seconds / 3600, val_bits_per_token=bits,
            val_stderr=error, utilisation=used,
            bytes={"-".join(pair): sent for pair, sent in self.clock.bytes_sent.items() if sent}, **means)
        self.sums, self.updates, self.nats, self.steps = dict.fromkeys(SUMS, 0.0), 0, 0.0, 0
        self.save(events)

    def train(self, copy, lr, parts=None):
        self.nats += copy.step(lr, parts)
        self.steps += 1


# ---- the algorithms --------------------------------------------------------------------------------------------------


def dynamic_steps(cfg, args, found):
    """Local steps of a round of each worker."""
    return [max(1, math.ceil(cfg.local_steps * speed)) if args.dynamic_steps else cfg.local_steps
            for speed in found.relative_speeds()]


def all_reduces(sim, n_bytes):
    """Train with averaged gradients: one model, and one optimiser step on the parts of all workers."""
    rounds = Rounds(sim.clock, [n_bytes])
    if not sim.args.clock_only:
        copy, data = Copy(sim, 0, sim.start), [data_of(sim, k, sim.events_done) for k in range(sim.K)]
        sim.begin(copy.params, {"worker 0": copy})
    for step in range(sim.cfg.max_steps):
        rounds.step(range(sim.K), 0)
        rounds.average([0]).wait()
        if step >= sim.events_done and not sim.args.clock_only:
            sim.train(copy, sim.learning_rate(step * sim.K), [part for share in data for part in next(share)])
            sim.update()
            sim.report((step + 1) * sim.K, max(rounds.now), step + 1, step + 1 == sim.cfg.max_steps)
    return max(rounds.now)


def difference_of(before, after, momentum, cfg):
    """The D of an outer step from `before` to `after`, M being the momentum before: they differ by
    lr (D + mu (mu M + D)). Zero where nothing moved."""
    lr, mu = cfg.outer_lr, cfg.outer_momentum
    return [torch.zeros_like(a) if torch.equal(a, b) else ((a - b) / lr - mu**2 * m) / (1 + mu)
            for a, b, m in zip(before, after, momentum)]


def exchanges(sim, n_bytes):
    """Train in rounds, after which all workers exchange weights: local_sgd.py, as in train.py."""
    cfg, K = sim.cfg, sim.K
    steps = dynamic_steps(cfg, sim.args, sim.clock.found)
    working_at = lambda step: [k for k in range(K) if step % cfg.local_steps < steps[k]]
    total, left, last = cfg.max_steps * K, cfg.max_steps * K, 0
    while left > 0:
        left, last = left - len(working_at(last)), last + 1
    cfg = replace(cfg, max_steps=last)
    names = {name: p.numel() for name, p in sim.model.named_parameters()}
    sizes = [sum(names[name] for name in dealt) for dealt in local_sgd.deal(list(names), cfg.fragments)]
    each = n_bytes / sum(sizes) / (2 if cfg.send_dtype == "bfloat16" else 1)
    rounds = Rounds(sim.clock, [size * each for size in sizes])
    numbers = [SimpleNamespace(send=lambda i=i: i, receive=lambda mean: None, finish=lambda: None)
               for i in range(cfg.fragments)]  # fragments without weights: each sends its number
    timed = Exchange([SimpleNamespace(fragments=numbers)], cfg, rounds.average)
    if not sim.args.clock_only:
        copies = [Copy(sim, k, sim.start) for k in range(K)]
        workers, dtype = [Worker(copy.model, cfg, K) for copy in copies], getattr(torch, cfg.send_dtype)
        exchange = Exchange(workers, cfg, lambda messages: Average(messages, dtype))
        kept = {f"worker {k}": copy for k, copy in enumerate(copies)}
        kept |= {f"exchange {k}": SimpleNamespace(state=functools.partial(exchange.state, k),
                                                  restore=functools.partial(exchange.restore, k=k)) for k in range(K)}
        sim.begin(list(workers[0].tensors("anchor").values()), kept)
    progress = 0
    for step in range(1, cfg.max_steps + 1):
        working = working_at(step - 1)[:total - progress]
        rounds.step(working, (step - 1) % cfg.local_steps)
        training = step > sim.events_done and not sim.args.clock_only
        if training:
            for k in working:
                sim.train(copies[k], sim.learning_rate(progress))
        progress += len(working)
        ended = timed.after(step)
        if training:
            anchor, momentum = ([x.clone() for x in workers[0].tensors(key).values()] for key in ("anchor", "momentum"))
            exchange.after(step)
            if cfg.outer_lr and any(not torch.equal(a, w) for a, w in zip(anchor, sim.weights)):
                moved = [x for x in zip(anchor, sim.weights, momentum) if not torch.equal(*x[:2])]  # of a fragment
                sim.update(cosine=cosine(difference_of(*zip(*moved), cfg), [m for *_, m in moved]))
            if ended:
                sim.report(progress, max(rounds.now), step, step == cfg.max_steps)
    return max(rounds.now)


def without_waiting(sim, n_bytes):
    """Train with one server to which every worker sends when it is done, or with one in each region (HALoS)."""
    cfg, args, K, clock = sim.cfg, sim.args, sim.K, sim.clock
    halos, regions = args.algorithm == "halos", clock.found.regions
    total = cfg.max_steps * K
    events = asynchronous(clock, n_bytes, dynamic_steps(cfg, args, clock.found), total, halos, args.merge_every,
                          args.carry)
    if args.clock_only:
        return max(event.time for event in events)
    copies = [Copy(sim, k, sim.start) for k in range(K)]
    server_of = [regions.index(machine.region) if halos else 0 for machine in clock.found.machines]
    rule = sim.start, cfg.outer_lr, cfg.outer_momentum, args.buffer
    if halos:
        servers = [RegionalServer(*rule, args.merge_weight, args.carry) for _ in regions]
        top = Server(sim.start, args.global_lr, args.global_momentum, args.global_buffer)
    else:
        servers = [Server(*rule)]
        top = servers[0]
    sim.begin(top.weights, {f"worker {k}": copy for k, copy in enumerate(copies)}
              | {f"server {r}": server for r, server in enumerate(servers)} | ({"global server": top} if halos else {}))
    versions, started, sizes, applied = [0] * len(servers), [0] * K, [0] * K, 0  # counted again after an interruption
    for i, (now, kind, who, first, steps, n_begun) in enumerate(events, 1):
        live = i > sim.events_done
        if kind == "start":
            copy, server = copies[who], servers[server_of[who]]
            started[who], sizes[who] = versions[server_of[who]], steps
            if live:
                assert copy.taken == first
                torch._foreach_copy_(copy.params, server.weights)
                torch._foreach_copy_(copy.base, server.weights)
                for step in range(steps):
                    sim.train(copy, sim.learning_rate(n_begun + step * K))
                copy.difference = torch._foreach_sub(copy.base, copy.params)
        elif kind == "apply":
            copy, server = copies[who], servers[server_of[who]]
            if live:
                moved = norm(torch._foreach_sub(server.weights, copy.base)) / norm(server.weights)
                sim.update(versions[server_of[who]] - started[who], moved, cosine(copy.difference, server.momentum))
                server.apply(copy.difference)
            versions[server_of[who]] += 1
            applied += sizes[who]
            if live and not halos and applied < total:
                sim.report(applied, now, i)
        elif live and kind == "send":
            servers[who].send()
        elif live and kind == "apply_global":
            top.apply(servers[who].difference)
            servers[who].answer = [w.clone() for w in top.weights]
            if applied < total:
                sim.report(applied, now, i)
        elif live:
            servers[who].merge()
    sim.report(applied, now, i, done=True)
    return now


ALGORITHMS = {"ddp": all_reduces, "local": exchanges, "async": without_waiting, "halos": without_waiting}


def check(cfg, args, K):
    """Raise UserError if the settings contradict each other."""
    if args.algorithm != "ddp" and not cfg.local_steps:
        raise UserError(f"algorithm={args.algorithm} needs --local_steps, the number of steps of a round")
    if args.algorithm in ("async", "halos") and (cfg.delay or cfg.eager or cfg.fragments > 1 or cfg.pull < 1
                                                 or cfg.send_dtype != "float32"):
        raise UserError("delay, eager, fragments, pull and send_dtype are for --algorithm local")
    if args.algorithm not in ("async", "halos") and args.buffer > 1:
        raise UserError("--buffer is for --algorithm async or halos")
    if args.dynamic_steps and args.algorithm == "ddp":
        raise UserError("--dynamic_steps needs rounds: use another --algorithm than ddp")
    if cfg.batch_size % K or cfg.batch_size // K % min(cfg.micro_batch_size, cfg.batch_size // K):
        raise UserError(f"batch_size={cfg.batch_size} must be a multiple of the {K} machines, and a machine's share "
                        "one of micro_batch_size")
    if cfg.local_group > 1 or cfg.anneal_steps or cfg.fsdp or cfg.wandb or cfg.device not in ("auto", "cpu"):
        raise UserError("local_group, anneal_steps, fsdp, wandb and devices other than cpu are not simulated")
    if args.algorithm != "halos":
        for name, default in HALOS.items():
            if getattr(args, name) != default:
                raise UserError(f"--{name} is for --algorithm halos")


def main():
    name, cfg, args = configs.from_command_line("studies/simulator.py", __doc__, add_arguments)
    found = read_machines(args.machines)
    check(cfg, args, len(found.machines))
    if not args.clock_only:
        require("matplotlib", "a picture")
        if args.json:
            raise UserError("--json is for --clock_only: log.jsonl has the numbers of a run")
    clock = Clock(found, args.step_seconds, cfg.seed, not args.no_contention, args.relative_speeds)
    sim = Simulation(name, cfg, args, clock)
    if not args.clock_only:
        sim.open()
        if sim.progress == sim.K * cfg.max_steps:
            note(f"the run in {sim.out} is complete")
            return
    n_bytes = args.model_bytes or 4 * sum(w.numel() for w in sim.start)
    seconds = ALGORITHMS[args.algorithm](sim, n_bytes)
    if args.json:
        print(json.dumps({"hours": seconds / 3600, "utilisation": sum(clock.busy) / sim.K / seconds,
                          "gigabytes": sum(clock.bytes_sent.values()) / 1e9,
                          "bytes": {"-".join(pair): sent for pair, sent in clock.bytes_sent.items() if sent}}))
        return
    note(f"{args.algorithm}: {seconds / 3600:.3f} hours, utilisation {sum(clock.busy) / sim.K / seconds:.0%}, "
         f"{sum(clock.bytes_sent.values()) / 1e9:.3f} GB sent")
    table([{"link": " - ".join(pair), "bytes": sent / 1e9} for pair, sent in clock.bytes_sent.items() if sent],
          {"link": ("from - to", ""), "bytes": ("GB", ".3f")}, sys.stdout)
    if not args.clock_only:
        lines = [line for line in read_log(sim.out / "log.jsonl") if "val_bits_per_token" in line]
        curve = [(line["hours"], line["val_bits_per_token"], line["val_stderr"]) for line in lines]
        picture(sim.out / "run.png", {args.algorithm: curve}, "simulated hours", "bits per token (validation)")


if __name__ == "__main__":
    run(main)
