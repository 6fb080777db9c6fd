"""Train a denoiser.

    python train.py CONFIG [--key=value ...]                      one CPU, MPS or GPU
    torchrun --standalone --nproc_per_node=8 train.py CONFIG      one node of 8 GPUs
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py CONFIG
                                                                  on each of 4 nodes

Writes out/CONFIG/ckpt.pt (the last state), ckpt_best.pt (the best validation) and log.jsonl (every number shown).
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import configs
from cli import UserError, autocast, generator_on, pick_device, pick_dtype, progress, run
from data.loader import check_same_tokens, load_meta, load_split, prefetch, random_crops, windows
from data.tokenizer import make_tokenizer
from diffusion import Noise, to_device
from evaluate import bound, mean_and_error
from noise import rng, uniforms
from sampling import ancestral


class EMA:
    """Exponential moving average of a model's weights, with warm-up: the decay of update n is at most (1+n)/(10+n)."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = model, decay, 0
        self.names, self.params = zip(*model.named_parameters())
        self.average = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, self.params, 1 - decay)

    @contextlib.contextmanager
    def applied(self):
        """Within the context the model is in eval mode and has the average as its weights."""
        raw = [p.detach().clone() for p in self.params]
        self._put(self.average)
        self.model.eval()
        try:
            yield
        finally:
            self._put(raw)
            self.model.train()

    @torch.no_grad()
    def _put(self, weights):
        torch._foreach_copy_(self.params, weights)

    def state_dict(self):
        return dict(zip(self.names, self.average))

    def load_state_dict(self, state):
        torch._foreach_copy_(self.average, [state[name] for name in self.names])


def make_optimizer(model, cfg, device):
    """AdamW; weight decay on matrices and embeddings only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=device.type in ("cuda", "cpu"))


def learning_rate(step, cfg):
    """Linear warm-up to lr, then a cosine that reaches min_lr at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    done = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    return cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def setup_processes(cfg):
    """(rank, number of processes, device). Under torchrun it joins the others: by nccl on CUDA, by gloo elsewhere."""
    device = pick_device(cfg.device)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            device_id=device if device.type == "cuda" else None)
    return dist.get_rank(), dist.get_world_size(), device


def share_of_batch(cfg, world):
    """(sequences per process and step, sequences per micro-step). Raises UserError if batch_size does not divide so."""
    local = cfg.batch_size // world
    micro = min(cfg.micro_batch_size, local)
    if micro == 0 or cfg.batch_size % (world * micro):
        raise UserError(f"batch_size={cfg.batch_size} must be a multiple of processes x micro_batch_size = "
                        f"{world} x {max(micro, 1)}")
    return local, micro


def batches(tokens, objective, cfg, first_step, indices, micro, pin):
    """Yield for each step its sequences `indices` as a list of (x0, noise), `micro` sequences each."""
    for step in range(first_step, cfg.max_steps):
        x0 = random_crops(tokens, cfg.seq_len, cfg.seed, step, indices)
        u, v = uniforms(cfg.seed, step, indices, cfg.batch_size, cfg.seq_len, cfg.time_sampling != "uniform")
        tensors = (x0, *objective.noise(u, v))
        if pin:
            tensors = [tensor.pin_memory() for tensor in tensors]
        yield [(x0, Noise(*noise)) for x0, *noise in zip(*(tensor.split(micro) for tensor in tensors))]


def train_step(net, objective, parts, optimizer, cfg, device, dtype):
    """One optimiser step on the batch in `parts`. Returns the bound, nats per token, and gradient norm, as tensors."""
    nats = torch.zeros((), device=device)
    for i, (x0, noise) in enumerate(parts):
        last = i == len(parts) - 1
        # Under DistributedDataParallel gradients are averaged over the processes, once per step.
        with contextlib.nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync():
            with autocast(device, dtype):
                loss, nelbo = objective.loss(net, to_device(x0, device), noise.to(device))
            (loss / len(parts)).backward()
        nats += nelbo.mean() / len(parts)
    norm = torch.nn.utils.clip_grad_norm_(net.parameters(), cfg.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return nats, norm


def resume_from(where, cfg, meta, out_dir):
    """The payload to continue from. where: a checkpoint, or 'auto': that of out_dir, and None if there is none yet.

    Raises UserError if it is of another config, of other data, or would overwrite another run.
    """
    path = out_dir / "ckpt.pt" if where == "auto" else Path(where)
    if where == "auto" and not path.exists():
        return None
    payload = checkpoint.read(path)
    if "optimizer" not in payload:
        raise UserError(f"{path} has no optimiser state to resume from; start a new run with --init_from={path}")
    before, now = asdict(checkpoint.config_of(payload)), asdict(cfg)
    changed = [f"{key} (was {before[key]!r}, now {now[key]!r})" for key in now
               if configs.same_run(key) and before[key] != now[key]]
    if changed:
        raise UserError(f"{path} is of another run: {', '.join(changed)}; start a new one with --init_from={path}")
    check_same_tokens(payload["meta"], meta, cfg.dataset)
    if payload["meta"]["sha256"] != meta["sha256"]:
        raise UserError(f"data set {cfg.dataset!r} is not the one that {path} was trained on: prepare that one again, "
                        f"or start a new run with --init_from={path}")
    folder = path if path.is_dir() else path.parent
    if (out_dir / "ckpt.pt").exists() and folder.resolve() != out_dir.resolve():
        raise UserError(f"{out_dir} holds another run than {path}: choose another --out_dir")
    return payload


def open_log(path, step):
    """log.jsonl for appending, without the lines of later steps than the one that the run continues from."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # cut off by a crash
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))
    return open(path, "a", buffering=1)


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


def add_arguments(parser):
    parser.add_argument("--resume", metavar="CKPT|auto", help="continue a run; auto: that of out_dir, if there is one")
    parser.add_argument("--init_from", metavar="CKPT",
                        help="start from the averaged weights of another run (fine-tuning), unless --resume finds one")


def main():
    name, cfg, args = configs.from_command_line("train.py", __doc__, add_arguments)
    rank, world, device = setup_processes(cfg)
    master = rank == 0
    dtype = pick_dtype(device, cfg.dtype)
    local, micro = share_of_batch(cfg, world)
    out_dir = Path(cfg.out_dir or f"out/{name}")

    # ---- data, model, optimiser; a resumed run loads all three ------------------------------------------------------
    meta = load_meta(cfg.dataset, cfg.data_dir)
    train_tokens = load_split(cfg.dataset, "train", cfg.seq_len, cfg.data_dir)
    val_tokens = load_split(cfg.dataset, "val", cfg.seq_len, cfg.data_dir)
    val_starts = windows(val_tokens, cfg.seq_len, cfg.eval_sequences)
    tokenizer = make_tokenizer(meta)
    objective = cfg.make_objective(meta["vocab_size"])

    torch.manual_seed(cfg.seed)
    model = cfg.make_model(meta["vocab_size"]).to(device)
    step, best_val, payload = 0, math.inf, None
    if args.resume:
        payload = resume_from(args.resume, cfg, meta, out_dir)
    elif (out_dir / "ckpt.pt").exists():
        raise UserError(f"{out_dir} holds a run already: --resume auto continues it, --out_dir puts this one elsewhere")
    if args.init_from and not payload:
        source = checkpoint.read(args.init_from)
        check_same_tokens(source["meta"], meta, cfg.dataset)
        checkpoint.load_weights(model, source["ema"], args.init_from)
    if payload:
        checkpoint.load_weights(model, payload["model"], out_dir)
    optimizer, ema = make_optimizer(model, cfg, device), EMA(model, cfg.ema_decay)
    if payload:
        step, best_val = payload["step"], payload["best_val"]
        optimizer.load_state_dict(payload["optimizer"])
        ema.load_state_dict(payload["ema"])
        ema.updates = step
    if world > 1:
        steps = [None] * world
        dist.all_gather_object(steps, step)
        if len(set(steps)) > 1:
            raise UserError(f"the processes found checkpoints of different steps {sorted(set(steps))}: out_dir must be "
                            "on a file system that all nodes share")
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    if compiled:
        model.trunk = torch.compile(model.trunk)
    net = model if world == 1 else DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None)

    # ---- where results go -------------------------------------------------------------------------------------------
    if master:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {out_dir}: {error.strerror}")
        log_file = open_log(out_dir / "log.jsonl", step)
        if cfg.wandb:
            import wandb
            wandb.init(project="discrete-diffusion", name=name, config=asdict(cfg))
    bar = progress(total=cfg.max_steps, initial=step, desc=name, unit="step", show=master)
    unit = f"bits/{tokenizer.unit}"

    def log(line, **values):
        """Show a line; write the values to log.jsonl, and to wandb if asked."""
        if master:
            bar.write(line, file=sys.stdout)
            log_file.write(json.dumps({"step": step, "tokens": step * cfg.batch_size * cfg.seq_len, **values}) + "\n")
            if cfg.wandb:
                wandb.log(values, step=step)

    def validate():
        """Bits per token of the averaged weights on fixed windows with fixed noise, and the standard error."""
        with ema.applied():
            nats = bound(model, objective, val_tokens, val_starts, cfg.seq_len, micro, device, dtype,
                         mine=slice(rank, None, world))
        if world > 1:
            nats = nats.to(device)
            dist.all_reduce(nats)  # every process has filled in its own windows
        return mean_and_error(nats.cpu() / math.log(2))

    def sample():
        """One text from the averaged weights."""
        generator = generator_on(device, cfg.seed)
        xt = torch.full((1, cfg.seq_len), objective.mask_id, device=device)
        with ema.applied(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            for xt in ancestral(model, xt, objective.mask_id, objective.schedule, cfg.T, generator):
                pass
        return tokenizer.decode(xt[0].tolist())

    def save(filename):
        checkpoint.save(out_dir / filename, {
            "name": name, "config": asdict(cfg), "meta": meta, "step": step, "best_val": best_val,
            "model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
        })

    # ---- the loop ---------------------------------------------------------------------------------------------------
    if master:
        bar.write(f"{name}: {model.n_params() / 1e6:.1f}M parameters, "
                  f"{cfg.batch_size} x {cfg.seq_len} tokens per step, "
                  f"{world} x {device.type}, {str(dtype).removeprefix('torch.')}{', compiled' if compiled else ''}, "
                  f"writing to {out_dir}", file=sys.stdout)
        if step:
            bar.write(f"continuing at step {step:,} of {cfg.max_steps:,}", file=sys.stdout)
    indices = range(rank * local, (rank + 1) * local)
    stream = prefetch(batches(train_tokens, objective, cfg, step, indices, micro, pin=device.type == "cuda"))
    first_step, seconds = step, 0.0           # of this process; seconds of training alone
    nats, logged, clock = torch.zeros((), device=device), step, time.perf_counter()  # since the last log line
    model.train()
    for parts in stream:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        if cfg.dropout:  # dropout, too, is a function of (seed, step)
            torch.manual_seed(int(rng(cfg.seed, "dropout", step, rank).integers(2**63)))
        step_nats, norm = train_step(net, objective, parts, optimizer, cfg, device, dtype)
        nats += step_nats
        ema.update()
        step += 1
        bar.update()

        if step % cfg.log_interval == 0 or step == cfg.max_steps:
            if world > 1:
                dist.all_reduce(nats)
            bits = nats.item() / world / (step - logged) / math.log(2)  # waits for the GPU, so the time below is true
            elapsed = time.perf_counter() - clock
            clock += elapsed
            seconds += elapsed
            rate = (step - logged) * cfg.batch_size * cfg.seq_len / elapsed
            left = (cfg.max_steps - step) * seconds / (step - first_step)
            log(f"step {step:,}  tokens {step * cfg.batch_size * cfg.seq_len:,}  {unit} {bits:.3f}  "
                f"lr {group['lr']:.2e}  grad norm {norm:.3f}  {rate:,.0f} tokens/s  {duration(left)} left",
                bits_per_token=bits, lr=group["lr"], grad_norm=norm.item(), tokens_per_second=rate)
            nats.zero_()
            logged = step
        paused = time.perf_counter()
        if step % cfg.eval_interval == 0 or step == cfg.max_steps:
            bits, error = validate()
            log(f"step {step:,}  validation {unit} {bits:.4f} ± {error:.4f}"
                f"{'  (best so far)' if bits < best_val else ''}",
                val_bits_per_token=bits, val_stderr=None if math.isnan(error) else error)
            if bits < best_val:
                best_val = bits
                if master:
                    save("ckpt_best.pt")
        if master and cfg.sample_interval and step % cfg.sample_interval == 0:
            text = sample()
            log(f"step {step:,}  sample  {text}", sample=text)
        if master and (step % cfg.checkpoint_interval == 0 or step == cfg.max_steps):
            save("ckpt.pt")
        clock += time.perf_counter() - paused
    bar.close()
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
