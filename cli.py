"""Functions that the command lines share: one-line errors, the device, the precision, progress bars."""

import argparse
import contextlib
import difflib
import importlib.util
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# OpenMP's threads spin while they wait for each other, and sleep after this many turns. The default is 300,000: if
# another program has one of the cores, a small network is then 20 times slower (docs/speed.md). OpenMP reads it when
# torch is loaded, so the commands import this file before torch.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# A daemon may start a command without stdout or stderr. Then what is printed is dropped. Without /dev/null here, the
# next file that is opened would take the stream's place and get what is printed.
for stream in ("stdout", "stderr"):
    if getattr(sys, stream) is None:
        setattr(sys, stream, open(os.devnull, "w"))

# Until run() begins, Ctrl-C ends a command of this project at once. Python itself would print a traceback of torch.
ROOT, command = Path(__file__).resolve().parent, Path(sys.argv[0]).resolve()
if (command.is_file() and command.parent in (ROOT, ROOT / "data", ROOT / "studies")
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.distributed as dist
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None


# How a run that could not write goes on: the end of such messages.
HINT = "fix the cause, then continue the run (train.py: --resume auto; studies/simulator.py: --resume)"


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, without the usage block, and suggest the flag for a typo."""

    def __init__(self, elsewhere={}, **kwargs):
        """elsewhere: {a flag of other projects: the one that it is here}, for the errors."""
        self.elsewhere = elsewhere
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message):
        if message.endswith("expected one argument"):
            message += "; a value that begins with - is written after =, as in --prefix=-x"
        raise UserError(f"{message} (--help lists the options)")

    def parse_args(self, args=None):
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"{word}: -- cannot be a value, because Python before 3.13 loses it")
        parsed, unknown = self.parse_known_intermixed_args(args)  # options may stand between CKPTs
        if unknown:
            flag = unknown[0].split("=")[0]
            if flag in [f"--{action.dest}" for action in self._actions if not action.option_strings]:
                self.error(f"unknown argument {unknown[0]}: write its value without {flag}")
            if not flag.startswith("-"):
                self.error(f"{flag} is one argument too many")
            known = [option for action in self._actions for option in action.option_strings]
            guess = f", did you mean {self.elsewhere[flag]}?" if flag in self.elsewhere else did_you_mean(flag, known)
            self.error(f"unknown argument {unknown[0]}{guess}")
        return parsed


def did_you_mean(word, known):
    """Return ", did you mean X?" with X the known word that is most like `word`, or "" if none is like it."""
    return "".join(f", did you mean {guess}?" for guess in difflib.get_close_matches(word, known, n=1, cutoff=0.72))


def require(module, what):
    """Raise UserError if an optional package (requirements-all.txt) is missing. Commands call it before any work."""
    if importlib.util.find_spec(module) is None:
        package = {"PIL": "pillow", "yaml": "pyyaml", "mauve": "mauve-text"}.get(module, module)
        raise UserError(f"{what} needs the package {package}: pip install {package}")


def note(text):
    """Print one line on stderr. Line breaks and other unprintable characters, as of names of files, are escaped, and
    numbers of more than 80 digits, which a flag may quote, are shortened."""
    text = re.sub(r"(\d[\d,]{39})[\d,]{40,}", r"\1...", text)
    print("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), file=sys.stderr)


@contextlib.contextmanager
def without_stderr():
    """A context in which stderr is lost: torch's profiler and faiss write to it from C++ at every log level."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def first_line(error):
    """The first line of an error's message, or its name if it has none, as short text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def in_short(n):
    """A number of parameters as short text: 5.3M, or 46K."""
    return f"{n / 1e6:.1f}M" if n >= 1e5 else f"{n / 1e3:.0f}K"


def for_terminal(text, stream):
    """The text as it is printed: on a terminal, · stands for control characters, which could move the cursor."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "·", text) if stream.isatty() else text


def ended(number, frame):
    """Handle SIGTERM as an exception, so that what a command has begun to write is removed."""
    sys.exit(128 + number)


def lacks_compiler(error):
    name_and_text = f"{type(error).__name__} {error}"
    return any(word in name_and_text for word in ("InvalidCxxCompiler", "TritonMissing", "Failed to find C compiler"))


def lacks_memory(error):
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def torchrun_lacks():
    """Return the first variable of those by which torchrun tells a process of the others that is missing or wrong, or
    None."""
    for key in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        value = os.environ.get(key, "")
        if not re.fullmatch("[0-9]{1,5}", value) or int(value) > 65_535:
            return key
    return None if os.environ.get("MASTER_ADDR") else "MASTER_ADDR"


def run(main, processes=False):
    """Call main(), which returns an exit code or None, and end the process with the exit code.

    processes: main() joins the other processes that torchrun started (parallel.py). Then the first one reports errors.
    UserError and OSError: one line on stderr and exit code 2. Ctrl-C: exit code 130. SIGTERM, where main does not
    handle it: 143. Other errors: exit code 1."""
    name = os.path.basename(sys.argv[0])
    rank = os.environ["RANK"] if processes and not torchrun_lacks() else None
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if rank is None and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, ended)
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
        pass  # `python sample.py CKPT | head -1` is not an error
    except OSError as error:
        where = "the output cannot be written" if error.filename is None else error.filename
        note(f"{name}: {where}: {error.strerror}" if error.strerror else f"{name}: {error}")
        code = 2
    except torch.OutOfMemoryError:
        note(f"{name}: out of GPU memory: use a smaller --micro_batch_size (train.py) or --batch_size")
        code = 1
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        code = 1
        if lacks_compiler(error):
            code = 2
            if rank in (None, "0"):
                note(f"{name}: torch.compile finds no compiler (it needs g++, and on a GPU Triton): install it, or "
                     "leave out --compile (train.py and bench.py on a GPU: use --no-compile)")
        elif rank is None and lacks_memory(error):
            note(f"{name}: out of memory: use a smaller --micro_batch_size (train.py) or --batch_size")
        elif rank is None:  # Python prints the traceback
            raise
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).split("] ", 1)[-1].splitlines()[0][:100]
            note(f"{name}: process {rank} lost another process, which ended or did not answer in time ({reason})")
        else:
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nothing reads it, or the disk is full: so that Python does not report this again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if rank is not None:
        # Exit at once: an ordinary exit can wait for a process that is gone, and gloo's threads can crash it (pytorch's
        # issue 179291).
        os._exit(code)
    if code:
        sys.exit(code)


def named(text):
    """An argparse type: text that is not empty. (`--resume "$UNSET"` gives empty text.)"""
    if not text:
        raise argparse.ArgumentTypeError("the value is empty")
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


def numbers(kind, low, high=10**15):
    """An argparse type: different ints or floats in [low, high], separated by commas: 16,0,64 -> [0, 16, 64]."""
    def parse(text):
        return sorted({number(kind, low, high)(part) for part in text.split(",")})
    return parse


def pick_device(name):
    """torch.device by name; 'auto': the first of cuda, mps, cpu that is here. Raises UserError if it is not here."""
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if name == "auto":
        name = next(kind for kind in count if count[kind])
    match = re.fullmatch(r"(cuda|mps|cpu)(?::(0|[1-9]\d{0,4}))?", name, re.ASCII)  # the same names as torch.device
    if not match or int(match[2] or 0) >= count[match[1]]:
        raise UserError(f"device {name!r} is not available here: use --device=cpu, or leave out --device")
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
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_peak(device, dtype):
    """Floating-point operations per second that this device reaches in large square matrix products: best of five.

    The utilisation of a model (MFU) is relative to this, because no program reaches the number in a data sheet.
    """
    n, products = (8192, 20) if device.type == "cuda" else (1024, 1)
    a, seconds = torch.randn(n, n, device=device, dtype=dtype), []
    for _ in range(6):  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        for _ in range(products):
            a @ a
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        del a
        torch.cuda.reset_peak_memory_stats(device)  # these matrices do not count in memory_used
    return 2 * n**3 * products / min(seconds[1:])


def memory_of(device):
    """Total memory of the device in bytes (CPU: of the machine, or the container's limit); None if unknown."""
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
    """Peak memory in bytes: of the tensors on CUDA, of the process on a CPU. On mps, the memory in use now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def autocast(device, dtype):
    """A context in which matrix products run in dtype. For float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def generator_on(device, seed):
    """A seeded generator for sampling. Draws need float64, which mps lacks: there the generator is on the CPU."""
    return torch.Generator("cpu" if device.type == "mps" else device).manual_seed(seed)


def table(rows, columns, out):
    """Print rows (dicts) under the columns {key: (title, format)}. The cell of a missing value or nan is empty."""
    empty = lambda value: value is None or value != value  # nan is not equal to itself
    cells = [[title for title, _ in columns.values()]]
    for row in rows:
        cells.append(["" if empty(row.get(key)) else format(row[key], how) for key, (_, how) in columns.items()])
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)), file=out)


def check_place(flag, path, ending):
    """Raise UserError if the file that a flag names cannot be written, or lacks this ending. Devices need no ending."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # fails for a link that leads to itself
        special = path.exists() and not path.is_file()
        if path.is_dir() or not path.parent.is_dir():
            raise UserError(f"{flag} {path} is {'a folder' if path.is_dir() else 'in a folder that does not exist'}")
        if not special:  # make a file beside it, as write_file does: os.access() tells root that all can be written
            tempfile.TemporaryFile(dir=path.resolve().parent).close()
        elif not os.access(path, os.W_OK):
            raise UserError(f"{flag} {path} cannot be written: there is no permission")
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written: {error.strerror}")
    if not special and not path.name.lower().endswith(ending):
        raise UserError(f"{flag} {path} must end in {ending}")


def write_file(path, content):
    """Write text or bytes to a file atomically: a failure leaves the old file. Raises UserError.

    A link stays a link. A path that is not a regular file (a pipe, /dev/null) is written to and not replaced.
    """
    special = path.exists() and not path.is_file()
    if not special:  # resolve() would turn /dev/stdout into the name of a pipe, which cannot be opened
        path = path.resolve()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        (path if special else temporary).write_bytes(content.encode() if isinstance(content, str) else content)
        if not special:
            temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}")


# tqdm's own lock, for several processes, is a semaphore, which Python 3.14 reports as lost if os._exit ends a process.
tqdm.set_lock(threading.RLock())


def progress(iterable=None, show=True, **kwargs):
    """A tqdm bar on stderr. Silent if stderr is not a terminal, or show=False."""
    return tqdm(iterable, disable=None if show else True, file=sys.stderr, dynamic_ncols=True, **kwargs)
