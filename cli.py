"""What the command lines share: one-line errors, the device, the precision, progress bars."""

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import sys
import time
import traceback

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None


class UserError(Exception):
    """Something the user can mend. The message is one line: what is wrong, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line (exit code 2), without the usage block, and which guesses typos."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_intermixed_args(args, namespace)  # options may stand between CKPTs
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            guess = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f", did you mean {guess[0]}?" if guess else ""))
        return parsed


def require(module, what):
    """Raise UserError if an optional package (requirements-all.txt) is missing, before any work is done."""
    if importlib.util.find_spec(module) is None:
        package = {"PIL": "pillow", "yaml": "pyyaml"}.get(module, module)
        raise UserError(f"{what} needs the package {package}: pip install {package}")


def one_line(text):
    """The text with line breaks and other control characters escaped: names of files may have them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def note(text):
    """Print one line on stderr."""
    print(one_line(text), file=sys.stderr)


def run(main):
    """Call main(), which returns an exit code or None; turn a UserError into one line on stderr and exit code 2, Ctrl-C
    into exit code 130."""
    name, rank = os.path.basename(sys.argv[0]), os.environ.get("RANK")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it lacks
    code = 0
    try:
        code = main() or 0
    except UserError as error:
        if rank in (None, "0"):  # under torchrun all processes raise the same one (parallel.py)
            note(f"{name}: {error}")
        code = 2
    except BrokenPipeError:
        pass  # `python sample.py CKPT | head -1` is no error
    except OSError as error:
        note(f"{name}: {error}")
        code = 2
    except torch.OutOfMemoryError:
        note(f"{name}: out of GPU memory: use a smaller --micro_batch_size (train.py) or --batch_size")
        code = 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if rank is None and isinstance(error, (MemoryError, RuntimeError)) and (
                isinstance(error, MemoryError) or "can't allocate memory" in str(error)):
            note(f"{name}: out of memory: use a smaller --batch_size")
            sys.exit(1)
        if rank is None:
            raise
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).split("] ", 1)[-1].splitlines()[0][:100]
            note(f"{name}: process {rank} has lost another one, which ended, or did not answer in time ({reason})")
        else:
            traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads it, or its disk is full: do not complain once more at the very end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if rank is not None:
        # At once: an ordered exit can wait for a process that is gone, and gloo's threads can crash it (issue 179291 of
        # pytorch).
        os._exit(code)
    if code:
        sys.exit(code)


def named(text):
    """An argparse type: text that is not empty, as `--resume "$UNSET"` would be."""
    if not text:
        raise argparse.ArgumentTypeError("is empty")
    return text


def number(kind, low, high=10**15):
    """An argparse type: an int or float in [low, high]."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside [{low}, {high}]")
        return value
    return parse


def pick_device(name="auto"):
    """torch.device for 'auto' (cuda, then mps, then cpu) or for the name given. Raises UserError if it is not there."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind in count if count[kind])
    match = re.fullmatch(r"(cuda|mps|cpu)(?::(0|[1-9]\d{0,4}))?", name, re.ASCII)  # what torch.device takes, too
    if not match or int(match[2] or 0) >= count[match[1]]:
        raise UserError(f"device {name!r} is not available here; use --device=cpu or leave it out")
    return torch.device(name)


def pick_dtype(device, name="auto"):
    """The autocast dtype: 'auto' is bfloat16 where the matrix units support it, else float32.

    A CPU without AVX512-BF16 emulates bfloat16: with AVX2, matrix products were 100 times slower than in float32.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        fast = device.type == "cpu" and probe()
    return torch.bfloat16 if fast else torch.float32


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device):
    """Wait until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device, dtype, repeats=5):
    """Floating-point operations per second that this device reaches in large square matrix products: best of repeats.

    What a model does per second is compared with that (MFU), since data sheets promise more than any program gets.
    """
    n, products = (8192, 20) if device.type == "cuda" else (1024, 1)
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(repeats + 1):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 * products / min(seconds[1:])


def memory_of(device):
    """Bytes that the device has in all, for a CPU the machine or the container; None if that is not known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    limits = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # there is no sysconf on Windows
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
            with open(path) as file:
                limits.append(int(file.read()))
    return min(limits, default=None)


def memory_used(device):
    """Peak memory in bytes: what tensors took on a GPU, what the process took on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(device, dtype):
    """Context in which matrix products run in dtype; nothing at all for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def generator_on(device, seed):
    """A seeded generator for sampling. Draws are made in float64, which mps lacks: there the CPU makes them."""
    return torch.Generator("cpu" if device.type == "mps" else device).manual_seed(seed)


def table(rows, columns, out):
    """Print rows (dicts) under their columns {key: (title, format)}; what a row lacks, or is nan, is left empty."""
    cells = [[title for title, _ in columns.values()]]
    empty = lambda value: value is None or value != value
    cells += [["" if empty(row.get(key)) else format(row[key], how) for key, (_, how) in columns.items()]
              for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)), file=out)


def write_file(path, content):
    """Write text or bytes to a file at once: a failure leaves what was there before. Raises UserError.

    A link stays one. What is no file (a pipe, /dev/null) is written to and not replaced.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        special = path.exists() and not path.is_file()
        (path if special else temporary).write_bytes(content.encode() if isinstance(content, str) else content)
        if not special:
            temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}")


def progress(iterable=None, show=True, **kwargs):
    """A tqdm bar on stderr, silent when stderr is not a terminal."""
    return tqdm(iterable, disable=None if show else True, file=sys.stderr, dynamic_ncols=True, **kwargs)
