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
import cli
from cli import (UserError, autocast, device_name, generator_on, in_short, matmul_peak, memory_used, named, note,
                 pick_dtype, progress, require)

import torch

import checkpoint
import configs
import parallel
import storage
from attention import annealed
from costs import check_fits, count_parameters, flops_per_token, numbers_kept, training_bytes, weight_bytes
from data.loader import Items, check_same_data, move_padding, open_data, prefetch, random_crops, windows
from data.tokenizer import make_tokenizer
from diffusion import to_device
from likelihood import Windows, bound, by_rate, mean_and_error, plus_minus
from local_sgd import AmongProcesses, EveryStep, deal
from log import Log, Pace, Tally, duration, finite
from optim import EMA, clip_gradients, learning_rate, make_optimizers, set_learning_rate
from parallel import on_main, share_of_batch, together
from prompts import end_of, text_of
from randomness import give_prefix, prefix_lengths, rng, uniforms
from sampler_settings import default_settings
from sampling import denoise


def batches(tokens, objective, cfg, first_step, indices, micro, pin, items=Items()):
    """Yield for each step this process's share of the batch: a list of micro-batches (x0, noise).

    indices: which sequences of the batch are those of this process. micro: number of sequences in a micro-batch.
    pin: put them in pinned memory, for the copy to a GPU. items: those of data.loader.open_data.
    """
    for step in range(first_step, cfg.max_steps):
        x0 = random_crops(tokens, cfg.seq_len, cfg.seed, step, indices, items.record)
        if cfg.padding == "random" and items.pad is not None:  # bench.py trains on random tokens, without pads
            x0 = move_padding(x0, items.pad, cfg.seed, step, indices)
        u, v = uniforms(cfg.seed, step, indices, cfg.batch_size, cfg.seq_len, cfg.time_sampling != "uniform",
                        objective.n_times(cfg.seq_len))
        v = give_prefix(v, prefix_lengths(cfg.prefix_range, cfg.seed, step, indices, x0, items.until))
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


def validate(model, objective, ema, data, cfg, until=None):
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
        sums[0, mine] = bound(model, objective, data, mine, prefix_range=cfg.prefix_range, until=until)
    sums[1, mine] = 1
    nats, times_scored = parallel.total(sums)
    return mean_and_error(nats / times_scored / math.log(2), by_rate(n, n_times=objective.n_times(cfg.seq_len)))


class Run:
    """A run: its settings and data, what training changes, and its log.

    All processes call every method together. Only refuse_infinite may be called by some, as it sends nothing. In one
    process `together` and `on_main` only call the function that they are given, and `exchange` does nothing.
    """

    def __init__(self, name, cfg, args):
        """Set up a new run, or the one that --resume finds. Nothing is written before everything has been checked."""
        parallel.join(cfg.timeout_minutes)
        if cfg.local_steps:
            parallel.form_teams(cfg.local_group, cfg.timeout_minutes)
        self.stop = parallel.StopSignals()
        if cfg.fsdp and "RANK" not in os.environ:
            raise UserError("--fsdp splits the model over several processes: start them with torchrun")
        if cfg.wandb:
            on_main(lambda: require("wandb", "--wandb"))
        self.device = together(lambda: parallel.own_device(cfg.device))
        self.dtype = pick_dtype(self.device, cfg.dtype)
        local, self.micro = share_of_batch(cfg, parallel.world)
        self.indices = range(parallel.rank * local, (parallel.rank + 1) * local)
        self.name, self.out_dir = name, Path(cfg.out_dir) if cfg.out_dir else Path("out", name)
        cfg = on_main(lambda: checkpoint.with_sizes_of_source(cfg, args.resume, args.init_from, self.out_dir))

        meta, self.train_tokens, self.val_tokens, self.items = together(lambda: open_data(cfg))
        main_meta = on_main(lambda: meta)
        together(lambda: check_same_data(meta, main_meta, cfg.dataset, "the main process"))
        self.cfg, self.meta, self.tokenizer = cfg, meta, together(lambda: make_tokenizer(meta))
        V, shards = meta["vocab_size"], parallel.world if cfg.fsdp else 1
        self.objective = cfg.make_objective(V)
        for needed, where in ((weight_bytes(cfg, V), torch.device("cpu")),
                              (training_bytes(cfg, V, local, self.micro, shards), self.device)):
            if where.type == "cpu":
                needed *= parallel.on_this_machine  # its processes share the memory
            together(lambda: check_fits(needed, where, f"training {name}", "use a smaller model or --micro_batch_size"))
        torch.manual_seed(cfg.seed)
        self.model = cfg.make_model(V)  # made on the CPU: equal weights on every device and in every process
        deal([key for key, _ in self.model.named_parameters()], cfg.fragments)  # raises UserError if it cannot be done
        texts = random_crops(self.train_tokens, cfg.seq_len, cfg.seed, 0, range(256), self.items.record)
        self.flops = flops_per_token(self.model, self.objective, cfg, texts, self.items.until)
        self.start_or_resume(args)

        # what reports need
        self.tokens_per_step = cfg.batch_size * cfg.seq_len
        peak_of_device = cfg.peak_tflops * 1e12 or matmul_peak(self.device, self.dtype)
        self.peak = parallel.total(torch.tensor(peak_of_device, dtype=torch.float64)).item()
        self.bar = progress(total=cfg.max_steps, initial=self.step, desc=name, unit="step", show=parallel.is_main)
        self.log = together(lambda: Log(self.out_dir, self.step, name, asdict(cfg), self.bar, self.wandb_id)
                            if parallel.is_main else None)
        starts = windows(self.val_tokens, cfg.seq_len, cfg.eval_sequences)
        self.val_data = Windows(self.val_tokens, starts, cfg.seq_len, self.micro, self.device, self.dtype)

    def start_or_resume(self, args):
        """Set up what training changes, new or from a checkpoint, whose memory is free on return."""
        cfg, model, out_dir = self.cfg, self.model, self.out_dir
        open_run = lambda: checkpoint.open_run(out_dir, args.resume, args.init_from, cfg, self.meta, model, self.stop)
        payload, source, lock = together(open_run if parallel.is_main else lambda: (None, None, None))
        resumed, copied = on_main(lambda: (payload is not None, source is not None))
        self.lock = together(lambda: (lock or storage.claim(out_dir)) if parallel.is_main else None)  # until the end
        self.net = parallel.spread(model, self.objective, self.device, cfg.fsdp, parallel.compiles(cfg, self.device))
        if copied:
            for key, p in model.named_parameters():
                parallel.copy_from_main(p, source and source[key])
        self.optimizers = make_optimizers(model, cfg, self.device, self.dtype)
        self.exchange = AmongProcesses(model, cfg) if cfg.local_steps else EveryStep()
        self.ema = EMA(model, cfg.ema_decay, list(self.exchange.anchor.values()))
        kept = {"step": 0, "best_val": math.inf, "tally": torch.zeros(5), "wandb_id": None, "init_from": args.init_from}
        if resumed:
            kept = on_main(lambda: {key: payload.get(key) for key in kept})
            checkpoint.restore(payload, model, self.ema, self.optimizers)
            kept["tally"] = self.exchange.resume(payload, checkpoint.states(self.optimizers), kept["tally"])
            self.ema.updates = kept["step"]
        self.step, self.best_val, self.tally = kept["step"], kept["best_val"], Tally(*kept["tally"].to(self.device))
        self.wandb_id, self.init_from = kept["wandb_id"], kept["init_from"]

    @property
    def tokens_seen(self):
        """The number of tokens in the steps taken."""
        return self.step * self.tokens_per_step

    def report(self, line, **values):
        """Show a line, and write it with its values to the log."""
        on_main(lambda: self.log.write(line, step=self.step, tokens=self.tokens_seen, **values))

    def report_start(self):
        cfg, step, peak_tflops = self.cfg, self.step, self.peak / 1e12
        n_params, optimizer_bytes = count_parameters(self.model), 4 * numbers_kept(self.model, cfg)
        facts = [f"{in_short(n_params)} parameters", f"{cfg.batch_size} x {cfg.seq_len} tokens per step",
                 f"{parallel.world} x {self.device.type}", "sharded" if cfg.fsdp else "",
                 f"{parallel.n_teams} workers that exchange every {cfg.local_steps} steps" if cfg.local_steps else "",
                 str(self.dtype).removeprefix("torch."), "compiled" if parallel.compiles(cfg, self.device) else "",
                 f"peak {peak_tflops:.3g} TFLOP/s", f"optimiser state {optimizer_bytes / 1e6:,.1f} MB",
                 f"writing to {self.out_dir}"]
        self.report(f"{self.name}: {', '.join(fact for fact in facts if fact)}"
                    + (f"\ncontinuing at step {step:,} of {cfg.max_steps:,}" if 0 < step < cfg.max_steps else "")
                    + (f"\nall {step:,} steps are done already" if step == cfg.max_steps else ""),
                    run=self.name, config=asdict(cfg), processes=parallel.world, device=device_name(self.device),
                    peak_tflops=peak_tflops, parameters=n_params, optimizer_bytes=optimizer_bytes,
                    versions=storage.versions())
        if parallel.is_main and cfg.warmup_steps >= cfg.max_steps:  # easily so in a short trial of a long config
            note(f"the learning rate rises until the end, to {learning_rate(cfg.max_steps - 1, cfg):.2g}: it decays "
                 f"only if --warmup_steps (here {cfg.warmup_steps}) is less than --max_steps (here {cfg.max_steps})")

    def report_training(self, pace, lr, norm):
        """Report the steps since the last such line. Raises UserError if too many in a row were skipped."""
        cfg, step, tokens = self.cfg, self.step, self.tokens_seen
        counted = self.tally.of_all().numbers()  # waits for the GPU, so the pace is right
        self.tally = self.tally.next_line()
        rate, left = pace.lap(step) * self.tokens_per_step, pace.left(cfg.max_steps - step)
        bits = counted.nats / counted.steps / math.log(2) if counted.steps else math.nan
        mfu, memory, epochs = rate * self.flops / self.peak, memory_used(self.device), tokens / len(self.train_tokens)
        self.report(f"step {step:,}  tokens {tokens:,}  "
                    f"{f'epoch {epochs:.1f}  ' if cfg.unique_tokens else ''}bits/{self.tokenizer.unit} {bits:.3f}  "
                    f"lr {lr:.2e}  grad norm {norm:.3f}  {rate:,.0f} tokens/s  MFU {mfu:.0%}  "
                    f"{memory / 1e9:.1f} GB  {duration(left)} left"
                    + (f"  {counted.skipped:.0f} steps skipped (not finite)" if counted.skipped else ""),
                    bits_per_token=finite(bits), lr=lr, grad_norm=finite(norm.item()), skipped=int(counted.skipped),
                    epochs=epochs, tokens_per_second=rate, mfu=mfu, memory_bytes=memory, seconds_left=left)
        if counted.most_in_a_row >= cfg.max_skipped:
            raise UserError(f"loss or gradient was not finite in {counted.most_in_a_row:.0f} steps in a row before "
                            f"step {step + 1:,}: the last good checkpoint in {self.out_dir} is unchanged; try a "
                            "smaller --lr in a new run")

    def report_validation(self):
        """Validate and report. The best weights so far are saved."""
        bits, error = validate(self.model, self.objective, self.ema, self.val_data, self.cfg, self.items.until)
        is_best = bits < self.best_val
        self.report(f"step {self.step:,}  validation bits/{self.tokenizer.unit} {bits:.4f}"
                    f"{f' {plus_minus(error)}' if math.isfinite(bits) else ''}{'  (best so far)' if is_best else ''}",
                    val_bits_per_token=finite(bits), val_stderr=finite(error))
        if is_best:
            self.best_val = bits
            self.save("ckpt_best.pt", to_resume=False)

    def report_sample(self):
        """Draw one text from the averaged weights, the same in all processes, and report it. If the model needs a
        prefix, the text continues the first tokens of the validation split."""
        cfg, end = self.cfg, end_of(self.cfg, self.tokenizer)
        xt = torch.from_numpy(self.val_tokens[:cfg.seq_len].astype("int64"))[None]
        n_given = prefix_lengths(cfg.prefix_range[:1] * 2, cfg.seed, 0, [0], xt, self.items.until)[0]
        xt[:, n_given:] = self.objective.mask_id
        xt = xt.to(self.device)
        with self.ema.applied(), autocast(self.device, self.dtype), torch.compiler.set_stance("force_eager"):
            together(lambda: self.refuse_infinite(parallel.local(self.model.parameters())))
            *_, state = denoise(default_settings(cfg), self.objective, self.model, xt, cfg, 0,
                                generator_on(self.device, cfg.seed), end)
        text = text_of(state.xt[0].tolist(), xt[0].tolist(), end, self.tokenizer)
        self.report(f"step {self.step:,}  sample  {text}", sample=text)

    def refuse_infinite(self, weights):
        if not all(p.isfinite().all() for p in weights):
            raise UserError(f"the weights are not finite after step {self.step:,} and were not saved: the last good "
                            f"checkpoint in {self.out_dir} is unchanged; try a smaller --lr in a new run")

    def save(self, filename, to_resume):
        state = checkpoint.state_of(self.model, self.ema, self.optimizers if to_resume else (), self.exchange,
                                    self.tally)

        def write():
            self.refuse_infinite([*state["model"].values(), *state["ema"].values()])
            self.log.sync()
            storage.save(self.out_dir / filename, {
                "name": self.name, "config": asdict(self.cfg), "meta": self.meta, "step": self.step,
                "best_val": self.best_val, "tally": torch.stack(self.tally).cpu(), "wandb_id": self.log.wandb_id,
                "init_from": self.init_from, **state}, keep_previous=to_resume)
            self.log.record(step=self.step, tokens=self.tokens_seen, saved=filename)
        on_main(write)


def main():
    """Train a network. Training is batches(), train_step() and this loop. The class Run sets up, reports and saves."""
    run = Run(*configs.from_command_line("train.py", __doc__, add_arguments))
    run.report_start()
    cfg, device, pace, stopped = run.cfg, run.device, Pace(run.step), 0
    stream = prefetch(batches(run.train_tokens, run.objective, cfg, run.step, run.indices, run.micro,
                              device.type == "cuda", run.items))
    run.model.train()
    for parts in stream:
        lr = learning_rate(run.step, cfg)
        set_learning_rate(run.optimizers, lr)
        if cfg.dropout:  # dropout noise, too, follows from the seed and the step
            torch.manual_seed(int(rng(cfg.seed, "dropout", run.step, parallel.rank).integers(2**63)))
        sees = annealed(cfg.seq_len + cfg.predict_next, run.step, cfg.anneal_steps, cfg.seed)
        nats, norm, bad = train_step(run.net, run.objective, parts, run.optimizers, cfg, device, run.dtype, sees=sees)
        run.tally = run.tally.count(nats, bad)
        run.step += 1
        run.bar.update()
        taken = run.exchange.after(run.step)  # 1; with --local_steps: the steps of a round at its end, else 0
        if not taken:
            continue  # within a round a worker hears nothing of the others
        # Is this the last step, or was a multiple of the interval among the steps just taken?
        due = lambda interval: run.step == cfg.max_steps or run.step // interval > (run.step - taken) // interval
        run.ema.update(taken)

        if due(cfg.log_interval):
            run.report_training(pace, lr, norm)
        with pace.paused():
            if due(cfg.eval_interval):
                run.report_validation()
            if cfg.sample_interval and due(cfg.sample_interval):
                run.report_sample()
        stopped, stopped_by = run.stop.agreed()  # a fast process waits here for the others: this counts as training
        with pace.paused():
            if due(cfg.checkpoint_interval) or stopped:
                run.save("ckpt.pt", to_resume=True)
        if stopped and run.step < cfg.max_steps:
            run.report(f"stopped by {stopped_by} after step {run.step:,} of {cfg.max_steps:,}, which is saved in "
                       f"{run.out_dir}: to continue, run the same command with --resume auto", stopped=stopped_by)
            break
    stream.close()
    on_main(lambda: run.log.close())
    parallel.leave()
    return int(stopped == parallel.LOST_PARENT and run.step < cfg.max_steps)  # 1: other nodes' torchrun sees a failure


if __name__ == "__main__":
    cli.run(main, processes=True)
