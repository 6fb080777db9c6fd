"""Train a denoiser.

    python train.py CONFIG [--key=value ...]                      one CPU, MPS or GPU
    torchrun --standalone --nproc_per_node=8 train.py CONFIG      one node of 8 GPUs; more: docs/long_runs.md
    python train.py CONFIG --help                                 the settings, with their values in CONFIG

Writes out/CONFIG/ckpt.pt (the last state), ckpt_prev.pt (the one before), ckpt_best.pt (the best validation) and
log.jsonl (every number shown). On SIGTERM, SIGUSR1, Ctrl-C or the end of torchrun, training finishes the step, writes a
checkpoint and stops. --resume auto continues from it, and the result is the same as without the interruption (to the
last bit on a CPU with one process or two; docs/long_runs.md).
"""

import functools
import math
import os
from dataclasses import asdict
from pathlib import Path

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import (UserError, autocast, device_name, generator_on, in_short, matmul_peak, memory_used, named, note,
                 pick_dtype, progress, require, run)

import torch

import checkpoint
import configs
import parallel
import storage
from attention import annealed
from costs import check_fits, count_parameters, flops_per_token, numbers_kept, training_bytes, weight_bytes
from data.loader import check_same_data, move_padding, open_data, prefetch, random_crops, windows
from data.tokenizer import make_tokenizer
from diffusion import to_device
from likelihood import Windows, bound, by_rate, mean_and_error, plus_minus
from local_sgd import AmongProcesses, EveryStep, deal
from log import Log, Pace, Tally, duration, finite
from optim import EMA, clip_gradients, learning_rate, make_optimizers, set_learning_rate
from parallel import on_main, share_of_batch, together
from prompts import denoise, end_of, text_of
from randomness import give_prefix, prefix_lengths, rng, uniforms
from sampler_settings import default_settings


def batches(tokens, objective, cfg, first_step, indices, micro, pin, record=1, pad=None):
    """Yield for each step this process's share of the batch: a list of micro-batches (x0, noise).

    indices: the places in the batch of this process's sequences. micro: number of sequences in a micro-batch.
    pin: put them in pinned memory, for the copy to a GPU. record, pad: from data.loader.records.
    """
    for step in range(first_step, cfg.max_steps):
        x0 = random_crops(tokens, cfg.seq_len, cfg.seed, step, indices, record)
        if cfg.padding == "random" and pad is not None:  # bench.py trains on random tokens, without pads
            x0 = move_padding(x0, pad, cfg.seed, step, indices)
        u, v = uniforms(cfg.seed, step, indices, cfg.batch_size, cfg.seq_len, cfg.time_sampling != "uniform",
                        objective.n_times(cfg.seq_len))
        v = give_prefix(v, prefix_lengths(cfg.prefix_range, cfg.seed, step, indices))
        parts = list(zip(x0.split(micro), objective.noise(u, v).split(micro)))
        if pin:
            parts = [(x0.pin_memory(), type(noise)(*(x.pin_memory() for x in noise))) for x0, noise in parts]
        yield parts


def train_step(net, objective, parts, optimizers, cfg, device, dtype, mark=lambda part: None, sees=None):
    """Take one optimiser step on `parts`, this process's share of the batch.

    mark: called with the name of each part when it is done, for the timing of bench.py.
    sees: which tokens each token sees in this step (attention.annealed). None: all.

    Returns three tensors (nats, norm, bad): the bound in nats per token, the gradient norm before clipping, and whether
    one of the two is not finite. If so, weights and optimiser state stay as they were. All three are of the whole
    batch, or with local_steps of the worker's part of it.
    Without `sees`, and with the networks of model.py and mixers.py, nothing in a step waits for a GPU.
    """
    nats, denoiser = torch.zeros((), device=device), net
    if sees is not None:
        denoiser = functools.partial(net, sees=to_device(sees, device))
    for i, (x0, noise) in enumerate(parts):
        parallel.average_in_next_backward(net, i == len(parts) - 1)
        with autocast(device, dtype):
            loss, nelbo = objective.loss(denoiser, to_device(x0, device), noise.to(device))
        mark("loss")
        (loss / len(parts)).backward()
        mark("backward")
        nats += nelbo.mean() / len(parts)
    nats = parallel.total(nats, parallel.team) / parallel.team_size
    norm = clip_gradients(parallel.bare(net), cfg)
    bad = ~(nats.isfinite() & norm.isfinite())
    for optimizer in optimizers:
        optimizer.step_unless(bad)
        parallel.clear_gradients(net, optimizer)
    return nats, norm, bad


# ---- the run ------------------------------------------------------------------------------------------------------


def add_arguments(parser):
    parser.add_argument("--resume", type=named, metavar="CKPT|auto",
                        help="checkpoint of the run to continue; auto: the last one in out_dir, if there is one")
    parser.add_argument("--init_from", type=named, metavar="CKPT",
                        help="checkpoint whose averaged weights a new run starts from (fine-tuning); ignored if "
                        "--resume finds a run")


def start_or_resume(cfg, args, out_dir, meta, model, objective, device, dtype, stop):
    """Set up a new run, or one that continues from a checkpoint.

    Returns (net, optimizers, ema, exchange, (step, best_val, tally, wandb_id, init_from), lock).

    net is the model on its device, wrapped for training. The caller keeps the lock of out_dir until the run ends. The
    memory of the checkpoint is free on return."""
    payload, source, lock = together(lambda: checkpoint.open_run(
        out_dir, args.resume, args.init_from, cfg, meta, model, stop) if parallel.is_main else (None, None, None))
    resumed, copied = on_main(lambda: (payload is not None, source is not None))
    lock = together(lambda: (lock or storage.claim(out_dir)) if parallel.is_main else None)
    net = parallel.spread(model, objective, device, cfg.fsdp, parallel.compiles(cfg, device))
    if copied:
        for key, p in model.named_parameters():
            parallel.copy_from_main(p, source and source[key])
    optimizers = make_optimizers(model, cfg, device, dtype)
    exchange = AmongProcesses(model, cfg) if cfg.local_steps else EveryStep()
    ema = EMA(model, cfg.ema_decay, list(exchange.anchor.values()))
    step, best_val, tally, wandb_id, init_from = 0, math.inf, torch.zeros(5), None, args.init_from
    if resumed:
        step, best_val, tally, wandb_id, init_from = on_main(
            lambda: [payload.get(key) for key in ("step", "best_val", "tally", "wandb_id", "init_from")])
        checkpoint.restore(payload, model, ema, optimizers)
        tally = exchange.resume(payload, checkpoint.states(optimizers), tally)
        ema.updates = step
    return net, optimizers, ema, exchange, (step, best_val, Tally(*tally.to(device)), wandb_id, init_from), lock


def validate(model, objective, ema, data, cfg):
    """Score the averaged weights on fixed windows with fixed noise. Returns (bits per token, standard error).

    All processes call it, and score equally many windows, because with FSDP each call of the network needs all
    processes. So some windows may be scored twice.
    """
    n, world = data.n, parallel.world
    n_scores = n + -n % world  # n, rounded up to a multiple of the number of processes
    mine = [i % n for i in range(parallel.rank, n_scores, world)]
    sums = torch.zeros(2, n, dtype=torch.float64)  # for each window: nats, and how often it was scored
    if cfg.eager:  # the workers' anchors, and so their averages, differ a little: all validate the main one's
        for average in ema.average:
            parallel.copy_from_main(average, average)
    with ema.applied():
        sums[0, mine] = bound(model, objective, data, mine, prefix_range=cfg.prefix_range)
    sums[1, mine] = 1
    nats, times_scored = parallel.total(sums)
    return mean_and_error(nats / times_scored / math.log(2), by_rate(n, n_times=objective.n_times(cfg.seq_len)))


def main():
    """Set up a run or resume it, and train.

    Training itself is batches(), train_step() and the loop at the end of this function. The rest checks, validates and
    writes. `together`, `on_main` and `exchange` are for runs of several processes. In one process the first two only
    call the function that they are given, and the exchange does nothing.
    """
    name, cfg, args = configs.from_command_line("train.py", __doc__, add_arguments)
    parallel.join(cfg.timeout_minutes)
    if cfg.local_steps:
        parallel.form_teams(cfg.local_group, cfg.timeout_minutes)
    rank, world, is_main = parallel.rank, parallel.world, parallel.is_main
    stop = parallel.StopSignals()
    if cfg.fsdp and "RANK" not in os.environ:
        raise UserError("--fsdp splits the model over several processes: start them with torchrun")
    if cfg.wandb:
        on_main(lambda: require("wandb", "--wandb"))
    device = together(lambda: parallel.own_device(cfg.device))
    dtype = pick_dtype(device, cfg.dtype)
    local, micro = share_of_batch(cfg, world)
    out_dir = Path(cfg.out_dir) if cfg.out_dir else Path("out", name)
    cfg = on_main(lambda: checkpoint.with_sizes_of_source(cfg, args.resume, args.init_from, out_dir))

    # ---- data and model; nothing is written before all of it has been checked ---------------------------------------
    meta, train_tokens, val_tokens, record, pad = together(lambda: open_data(cfg))
    main_meta = on_main(lambda: meta)
    together(lambda: check_same_data(meta, main_meta, cfg.dataset, "the main process"))
    tokenizer = together(lambda: make_tokenizer(meta))
    objective = cfg.make_objective(meta["vocab_size"])
    for needed, where in ((weight_bytes(cfg, meta["vocab_size"]), torch.device("cpu")),
                          (training_bytes(cfg, meta["vocab_size"], local, micro, world if cfg.fsdp else 1), device)):
        if where.type == "cpu":
            needed *= parallel.on_this_machine  # its processes share the memory
        together(lambda: check_fits(needed, where, f"training {name}", "use a smaller model or --micro_batch_size"))
    torch.manual_seed(cfg.seed)
    model = cfg.make_model(meta["vocab_size"])  # made on the CPU: equal weights on every device and in every process
    deal([name for name, _ in model.named_parameters()], cfg.fragments)  # raises UserError if it cannot be done
    n_params, optimizer_bytes = count_parameters(model), 4 * numbers_kept(model, cfg)
    flops = flops_per_token(model, objective, cfg)
    net, optimizers, ema, exchange, (step, best_val, tally, wandb_id, init_from), lock = start_or_resume(
        cfg, args, out_dir, meta, model, objective, device, dtype, stop)
    peak_of_device = cfg.peak_tflops * 1e12 or matmul_peak(device, dtype)
    peak = parallel.total(torch.tensor(peak_of_device, dtype=torch.float64)).item()

    # ---- what is done besides training ------------------------------------------------------------------------------
    bar = progress(total=cfg.max_steps, initial=step, desc=name, unit="step", show=is_main)
    log = together(lambda: Log(out_dir, step, name, asdict(cfg), bar, wandb_id) if is_main else None)
    unit = f"bits/{tokenizer.unit}"
    val_data = Windows(val_tokens, windows(val_tokens, cfg.seq_len, cfg.eval_sequences), cfg.seq_len, micro, device,
                       dtype)

    tokens_seen = lambda: step * cfg.batch_size * cfg.seq_len

    def report(line, **values):
        on_main(lambda: log.write(line, step=step, tokens=tokens_seen(), **values))

    def sample():
        """Draw one text from the averaged weights; all processes do the same. If the model needs a prefix, the text
        continues the first tokens of the validation split."""
        end = end_of(cfg, tokenizer)
        given = torch.from_numpy(val_tokens[:cfg.prefix_range[0]].astype("int64"))
        xt = torch.nn.functional.pad(given[None], (0, cfg.seq_len - len(given)), value=objective.mask_id).to(device)
        with ema.applied(), autocast(device, dtype), torch.compiler.set_stance("force_eager"):
            together(lambda: refuse_infinite(parallel.local(model.parameters())))
            *_, state = denoise(default_settings(cfg), objective, model, xt, cfg, 0, generator_on(device, cfg.seed),
                                end)
        return text_of(state.xt[0].tolist(), xt[0].tolist(), end, tokenizer)

    def refuse_infinite(weights):
        if not all(p.isfinite().all() for p in weights):
            raise UserError(f"the weights are not finite after step {step:,} and were not saved: the last good "
                            f"checkpoint in {out_dir} is unchanged; try a smaller --lr in a new run")

    def save(filename, to_resume):
        state = checkpoint.state_of(model, ema, optimizers if to_resume else (), exchange, tally)

        def write():
            refuse_infinite([*state["model"].values(), *state["ema"].values()])
            log.sync()
            storage.save(out_dir / filename, {
                "name": name, "config": asdict(cfg), "meta": meta, "step": step, "best_val": best_val,
                "tally": torch.stack(tally).cpu(), "wandb_id": log.wandb_id, "init_from": init_from, **state},
                keep_previous=to_resume)
            log.record(step=step, tokens=tokens_seen(), saved=filename)

        on_main(write)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    facts = [f"{in_short(n_params)} parameters", f"{cfg.batch_size} x {cfg.seq_len} tokens per step",
             f"{world} x {device.type}", "sharded" if cfg.fsdp else "",
             f"{parallel.n_teams} workers that exchange every {cfg.local_steps} steps" if cfg.local_steps else "",
             str(dtype).removeprefix("torch."), "compiled" if parallel.compiles(cfg, device) else "",
             f"peak {peak / 1e12:.3g} TFLOP/s", f"optimiser state {optimizer_bytes / 1e6:,.1f} MB",
             f"writing to {out_dir}"]
    report(f"{name}: {', '.join(fact for fact in facts if fact)}"
           + (f"\ncontinuing at step {step:,} of {cfg.max_steps:,}" if 0 < step < cfg.max_steps else "")
           + (f"\nall {step:,} steps are done already" if step == cfg.max_steps else ""),
           run=name, config=asdict(cfg), processes=world, device=device_name(device), peak_tflops=peak / 1e12,
           parameters=n_params, optimizer_bytes=optimizer_bytes, versions=storage.versions())
    if is_main and cfg.warmup_steps >= cfg.max_steps:  # easily so in a short trial of a long config
        note(f"the learning rate rises until the end, to {learning_rate(cfg.max_steps - 1, cfg):.2g}: it decays only "
             f"if --warmup_steps (here {cfg.warmup_steps}) is less than --max_steps (here {cfg.max_steps})")
    indices = range(rank * local, (rank + 1) * local)
    stream = prefetch(batches(train_tokens, objective, cfg, step, indices, micro, device.type == "cuda", record, pad))
    pace, stopped = Pace(step), 0
    model.train()
    for parts in stream:
        lr = learning_rate(step, cfg)
        set_learning_rate(optimizers, lr)
        if cfg.dropout:  # dropout noise, too, follows from the seed and the step
            torch.manual_seed(int(rng(cfg.seed, "dropout", step, rank).integers(2**63)))
        sees = annealed(cfg.seq_len + cfg.predict_next, step, cfg.anneal_steps, cfg.seed)
        nats, norm, bad = train_step(net, objective, parts, optimizers, cfg, device, dtype, sees=sees)
        tally = tally.count(nats, bad)
        step += 1
        bar.update()
        taken = exchange.after(step)  # 1; with --local_steps the steps of the round that ends here, or 0 within a round
        if not taken:
            continue  # within a round a worker hears nothing of the others
        # Is this the last step, or was a multiple of the interval among the steps just taken?
        due = lambda interval: step == cfg.max_steps or step // interval > (step - taken) // interval
        ema.update(taken)

        if due(cfg.log_interval):
            counted = tally.of_all().numbers()  # waits for the GPU, so the pace is right
            tally = tally.next_line()
            rate = pace.lap(step) * cfg.batch_size * cfg.seq_len
            left = pace.left(cfg.max_steps - step)
            bits = counted.nats / counted.steps / math.log(2) if counted.steps else math.nan
            mfu, memory = rate * flops / peak, memory_used(device)
            epochs = tokens_seen() / len(train_tokens)
            report(f"step {step:,}  tokens {tokens_seen():,}  "
                   f"{f'epoch {epochs:.1f}  ' if cfg.unique_tokens else ''}{unit} {bits:.3f}  "
                   f"lr {lr:.2e}  grad norm {norm:.3f}  {rate:,.0f} tokens/s  MFU {mfu:.0%}  "
                   f"{memory / 1e9:.1f} GB  {duration(left)} left"
                   + (f"  {counted.skipped:.0f} steps skipped (not finite)" if counted.skipped else ""),
                   bits_per_token=finite(bits), lr=lr, grad_norm=finite(norm.item()), skipped=int(counted.skipped),
                   epochs=epochs, tokens_per_second=rate, mfu=mfu, memory_bytes=memory, seconds_left=left)
            if counted.most_in_a_row >= cfg.max_skipped:
                raise UserError(f"loss or gradient was not finite in {counted.most_in_a_row:.0f} steps in a row before "
                                f"step {step + 1:,}: the last good checkpoint in {out_dir} is unchanged; try a smaller "
                                "--lr in a new run")
        with pace.paused():
            if due(cfg.eval_interval):
                bits, error = validate(model, objective, ema, val_data, cfg)
                report(f"step {step:,}  validation {unit} {bits:.4f}"
                       f"{f' {plus_minus(error)}' if math.isfinite(bits) else ''}"
                       f"{'  (best so far)' if bits < best_val else ''}",
                       val_bits_per_token=finite(bits), val_stderr=finite(error))
                if bits < best_val:
                    best_val = bits
                    save("ckpt_best.pt", to_resume=False)
            if cfg.sample_interval and due(cfg.sample_interval):
                text = sample()
                report(f"step {step:,}  sample  {text}", sample=text)
        stopped, stopped_by = stop.agreed()  # a fast process waits here for the others: this counts, and is no pause
        with pace.paused():
            if due(cfg.checkpoint_interval) or stopped:
                save("ckpt.pt", to_resume=True)
        if stopped and step < cfg.max_steps:
            report(f"stopped by {stopped_by} after step {step:,} of {cfg.max_steps:,}, which is saved in {out_dir}: "
                   "to continue, run the same command with --resume auto", stopped=stopped_by)
            break
    stream.close()
    on_main(lambda: log.close())
    parallel.leave()
    return int(stopped == parallel.LOST_PARENT and step < cfg.max_steps)  # 1: torchrun on other nodes sees a failure


if __name__ == "__main__":
    run(main)
