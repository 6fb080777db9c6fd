"""The log of a run: on the terminal, in log.jsonl, and with --wandb in Weights & Biases.

log.jsonl has one JSON object per line. Each has "step", and "tokens", those of training so far. The other keys tell its
kind:

    run, config, parameters, processes, ...    a start, or a resumption
    bits_per_token, lr, grad_norm, skipped,    training: bits_per_token is the mean since the last such line, lr and
    epochs, tokens_per_second, mfu,            grad_norm (before clipping) are those of the last step, and skipped is
    memory_bytes, seconds_left                 the number of steps of the run that were skipped as not finite
    val_bits_per_token, val_stderr             a validation of the averaged weights
    sample                                     a text from the averaged weights
    saved                                      the name of a checkpoint that was written
    stopped                                    the signal after which the run ended
"""

import contextlib
import html
import json
import math
import os
import shutil
import sys
import time
from typing import NamedTuple

import torch

import parallel
from cli import HINT, UserError, first_line, for_terminal, note




def parse(path):
    """(objects, numbers of the damaged lines) of a log.jsonl. A last line that a crash cut off is in neither."""
    lines = path.read_bytes().split(b"\n")[:-1]
    entries, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entry["step"] + 0
            entries.append(entry)
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged.append(number)
    return entries, damaged


def read(path):
    """The objects of a log.jsonl. Raises UserError if it cannot be read, or has a damaged line."""
    try:
        entries, damaged = parse(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}")
    if damaged:
        raise UserError(f"{path} is not a log of train.py, or is damaged: line {damaged[0]} has no step")
    return entries


def finite(x):
    """x, or None if x is infinite or nan, which JSON does not have."""
    return x if math.isfinite(x) else None


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"


class Pace:
    """The speed of training from a step on, without the time of validations, samples and checkpoints."""

    def __init__(self, step):
        self.first = self.last = step          # steps at the start, and at the last log line
        self.seconds = 0.0                     # of training since the start
        self.clock = time.perf_counter()       # at the last log line, moved on by the pauses

    def lap(self, step):
        """The steps per second since the last log line."""
        elapsed, done = time.perf_counter() - self.clock, step - self.last
        self.clock, self.seconds, self.last = self.clock + elapsed, self.seconds + elapsed, step
        return done / elapsed

    def left(self, steps):
        """The seconds that `steps` more steps will take, at the mean speed since the start."""
        return steps * self.seconds / (self.last - self.first)

    @contextlib.contextmanager
    def paused(self):
        """A context whose time does not count."""
        start = time.perf_counter()
        yield
        self.clock += time.perf_counter() - start


class Tally(NamedTuple):
    """The counts between two log lines: 0-dimensional tensors, so that no step waits for a GPU."""

    nats: torch.Tensor         # sum of the bound over the steps since the last line, skipped ones left out
    steps: torch.Tensor        # number of these steps
    skipped: torch.Tensor      # steps of the whole run skipped because loss or gradient was not finite
    in_a_row: torch.Tensor     # steps skipped in a row up to now
    most_in_a_row: torch.Tensor  # the largest in_a_row since the last line

    def count(self, nats, bad):
        """The tally after one more step, which was skipped if `bad`."""
        in_a_row = (self.in_a_row + 1) * bad
        return Tally(self.nats + torch.where(bad, 0, nats), self.steps + ~bad, self.skipped + bad, in_a_row,
                     torch.maximum(self.most_in_a_row, in_a_row))

    def of_all(self):
        """The tally of all workers together (local_sgd.py): sums of the first three, maxima of the other two."""
        if parallel.n_teams == 1:
            return self
        counts, runs = torch.stack(self[:3]), torch.stack(self[3:])
        sums = parallel.total(counts) / parallel.team_size  # a team's processes have equal tallies
        return Tally(*sums, *parallel.largest(runs))

    def next_line(self):
        """The tally after a log line."""
        zero = torch.zeros_like(self.nats)
        return Tally(zero, zero, self.skipped, self.in_a_row, zero)

    def numbers(self):
        """The tally as Python numbers. This waits for the GPU."""
        return Tally(*torch.stack(self).tolist())


class Log:
    """The log of a run that continues at `step`. Lines of later steps are removed: the run will write them again.

    wandb_id: the id of the Weights & Biases run to continue. None: a new run, whose id is then in self.wandb_id.
    Raises UserError if log.jsonl cannot be read or written.
    """

    def __init__(self, out_dir, step, name, config, bar, wandb_id=None):
        self.path, self.bar, self.wandb, self.wandb_id = out_dir / "log.jsonl", bar, None, wandb_id
        self.terminal = True
        if config["wandb"]:  # before the log, so that wrong settings of W&B leave none
            self.wandb = start_wandb(name, config, wandb_id)
            self.wandb_id = self.wandb.id
        try:
            entries, damaged = parse(self.path) if self.path.exists() else ([], [])
            if damaged:
                shutil.copy(self.path, out_dir / "log_damaged.jsonl")
                note(f"{self.path} has damaged lines, which are removed (first: line {damaged[0]}); log_damaged.jsonl "
                     "is a copy of the old file")
            temporary = self.path.with_name(".log.jsonl.tmp")
            with open(temporary, "w") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in entries if entry["step"] <= step)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            self.file = open(self.path, "a", buffering=1)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.with_name(".log.jsonl.tmp").unlink()
            if self.wandb:
                self.wandb.finish(exit_code=1)
            raise UserError(f"cannot write {self.path}: {error.strerror}; {HINT}")

    def show(self, line):
        """Print a line. If nothing reads stdout any more, as after `train.py | head`, training goes on silently."""
        try:
            if self.terminal:
                self.bar.write(for_terminal(line, sys.stdout), file=sys.stdout)
                sys.stdout.flush()
        except BrokenPipeError:
            self.terminal = False
        except OSError as error:
            raise UserError(f"cannot write the output: {error.strerror}; {HINT}")

    def record(self, **values):
        """Write the values, which include the step, into log.jsonl."""
        try:
            self.file.write(json.dumps(values) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}; {HINT}")

    def write(self, line, **values):
        """Show a line, record the values, which include the step, and log them to Weights & Biases if wanted."""
        self.show(line)
        self.record(**values)
        if self.wandb and "config" not in values:
            if "sample" in values:
                import wandb
                text = html.escape(values["sample"])
                values["sample"] = wandb.Html(f"<pre style='white-space: pre-wrap'>{text}</pre>")
            self.wandb.log(values)

    def sync(self):
        """Sync log.jsonl to the disk, so that it survives a power cut."""
        os.fsync(self.file.fileno())

    def close(self):
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(name, config, run_id):
    """Start a Weights & Biases run, or continue that with run_id. Offline without an account or a connection."""
    import wandb
    options = dict(project="discrete-diffusion", name=name, config=config, id=run_id, resume="allow")
    try:
        if "WANDB_MODE" not in os.environ and not wandb.login(prompt=False):
            raise wandb.Error("no account is set up here (`wandb login`)")
        run = wandb.init(**options, settings=wandb.Settings(init_timeout=30))
    except ValueError as error:  # of settings in the environment
        raise UserError(f"Weights & Biases: {' '.join(str(error).split())[:200]}")
    except wandb.Error as error:
        note(f"Weights & Biases: {first_line(error)}; logging offline, upload the log later with `wandb sync "
             "wandb/offline-run-*`")
        run = wandb.init(**options, mode="offline")
    # A resumed run repeats some steps, and wandb's own step counter cannot go back.
    run.define_metric("*", step_metric="step")
    return run
