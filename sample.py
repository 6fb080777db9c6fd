"""Generate text with a checkpoint, of any length: from nothing, from a prompt or into blanks. Watch it emerge.

    python sample.py                                                   # watch text emerge: the model in pretrained/
    python sample.py out/demo --show                                   # the same with your model
    python sample.py out/demo --batch_size 4 --steps 64 --seed 7 --out samples.txt
    python sample.py out/demo --sampler entropy_bound --gamma 0.5 --temperature 0.8 --html denoising.html
    python sample.py out/demo --prefix "the function returns " --suffix " of the list"
    python sample.py out/demo --template "the ____ of the {12} is an integer"
    python sample.py out/shakespeare_context --prefix "ROMEO: But, soft! what light" --length 2000 --context 64
"""

import itertools
import json
import sys
import time
from pathlib import Path

# before torch: cli.py sets what OpenMP reads when torch is loaded
from cli import (ArgumentParser, UserError, autocast, check_place, for_terminal, generator_on, named, note, number,
                 pick_device, pick_dtype, progress, require, run, write_file)

import torch

from block_diffusion import Rereader
from categorical import Counted
from checkpoint import add_model_flags, load_model
from costs import check_fits
from data.loader import load_meta, load_split
from data.tokenizer import make_tokenizer
from prompts import canvases, end_of, text_of
from sampler_settings import NAMES, add_arguments, given_flags, settings_of, steps_flag
from sampling import denoise
from show import History, Screen, gif, html, joined, png
from storage import hints_of
from studies.baselines import known_word_share, words_of

OF_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json", ".jsonl", ".yaml")  # endings of file names
RECORD = 100  # least bytes that the record of a token takes (show.History)
AT_ONCE = 32  # most sequences in a network call, unless --batch_size asks for more
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "prose"


def parse_args():
    p = ArgumentParser({"--prompt": "--prefix", "--start": "--prefix", "--num_samples": "--batch_size",
                        "--max_new_tokens": "--length"}, description=__doc__)
    p.add_argument("checkpoint", nargs="?", type=named, default=str(PRETRAINED),
                   help="checkpoint of this or another project: a file, a folder or hf://owner/name (default: the "
                   "model in pretrained/)")
    p.add_argument("--batch_size", type=number(int, 1, 10**5), default=1,
                   help="number of samples for each prompt, drawn together: more need more memory (default 1)")
    p.add_argument("--sampler", choices=NAMES, help="method of sampling (default: ancestral)")
    p.add_argument("--steps", type=steps_flag, help="number of steps of ancestral, topk, remdm, analytic and euler; "
                   "auto: chosen from the curve of evaluate.py --curve (default: the config's T)")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0,
                   help="random seed (default 0); the same seed and the same other flags give the same samples")
    add_arguments(p)
    q = p.add_argument_group("prompts")
    q.add_argument("--prefix", type=named, metavar="TEXT", help="begin with TEXT")
    q.add_argument("--suffix", type=named, metavar="TEXT", help="end with TEXT")
    q.add_argument("--length", type=number(int, 1, 10**7),
                   help="number of tokens, the prompt included (default: the length in training)")
    q.add_argument("--context", type=number(int, 0), metavar="N",
                   help="write longer text in windows: each continues the last N tokens of the window before")
    q.add_argument("--template", type=named, metavar="TEXT",
                   help=r"fill the blanks of TEXT: ____ is four tokens, {12} is twelve; write _ { } \ and a new line "
                   r"as \_ \{ \} \\ \n")
    q.add_argument("--infill", type=named, metavar="FILE", help="fill the templates in FILE (-: stdin), one per line")
    q.add_argument("--guidance", type=number(float, 0, 100), default=0.0, metavar="W",
                   help="follow the prompt more closely: draw from p(x|prompt)^(1+W) / p(x)^W, with two network calls "
                   "for one (default 0: p(x|prompt))")
    q = p.add_argument_group("output")
    q.add_argument("--show", action="store_true", help="show the denoising of the first sample as it happens")
    q.add_argument("--show_intermediate", type=number(int, 1), nargs="?", const=1, metavar="N",
                   help="print every N-th state of the first sample, if it is new (default: every one)")
    q.add_argument("--html", type=Path, metavar="FILE", help="write a page that plays the denoising of all samples")
    q.add_argument("--gif", type=Path, metavar="FILE", help="write the denoising of the first sample as a moving GIF")
    q.add_argument("--png", type=Path, metavar="FILE", help="write some states of the first sample as a picture")
    q.add_argument("--out", type=Path, metavar="FILE", help="also write the samples to FILE, one after the other")
    q.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    q.add_argument("--known_words", action="store_true",
                   help="also report the share of words that occur in the training data")
    p.add_argument("--dataset",
                   help="data set of another project's checkpoint, if it does not name it: text8, or one of yours")
    p.add_argument("--data_dir", default="",
                   help="folder that has the data sets, for --known_words (default: as in training)")
    p.add_argument("--no_cache", action="store_true",
                   help="block diffusion: read all earlier blocks again in each network call, for comparison")
    add_model_flags(p)
    return p.parse_args(sys.argv[1:] or ["--show", "--temperature=0.8"])


def batches(order, prompts, size):
    """Split the prompts' indices, in this order, into lists of at most `size` prompts of equal length."""
    for _, group in itertools.groupby(order, lambda i: len(prompts[i])):
        group = list(group)
        yield from (group[i:i + size] for i in range(0, len(group), size))


def fill_all(prompts, n, mask_id, fill, bar, screen, by_step):
    """Fill n copies of each prompt. Returns the History of all samples, in the order of the prompts.

    Prompts of equal length are filled together. fill: canvas (B, N) -> an iterator over States. The screen, or None,
    shows the first sample. The bar counts the masks that are filled, or, with by_step, the States.
    """
    # Prompts of the first one's length come first, so that the screen shows the first sample.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]) != len(prompts[0]), len(prompts[i])))
    histories = []
    for batch in batches(order, prompts, max(1, AT_ONCE // n)):
        canvas = torch.tensor([prompts[i] for i in batch]).repeat_interleave(n, 0)
        history, left = History(canvas, mask_id), int((canvas == mask_id).sum())
        watch = screen.show if screen and not histories else lambda *_, **__: None
        histories.append(history)
        watch(0, history.start[0])
        for state in fill(canvas):
            xt = state.xt.cpu()
            history.add(xt, state.p.cpu(), state.steps)
            left_now = int((xt == mask_id).sum())
            bar.update(1 if by_step else left - left_now)
            left = left_now
            watch(history.taken[0], xt[0].tolist())
        watch(history.taken[0], xt[0].tolist(), last=True)
    return joined(histories, [order.index(i) * n + j for i in range(len(prompts)) for j in range(n)])


def check(args, config):
    """Raise UserError for flags that do not fit each other, the model or the file system."""
    inputs = [(args.infill, "--infill")]
    if not args.checkpoint.startswith("hf://"):
        folder = Path(args.checkpoint)
        folder = folder if folder.is_dir() else folder.parent
        inputs += [(path, "part of the checkpoint") for path in folder.iterdir() if path.suffix in OF_CHECKPOINTS]
        inputs.append((args.checkpoint, "the checkpoint"))
    taken = {Path(name).resolve(): what for name, what in inputs if name}
    for flag in ("out", "html", "gif", "png"):
        path = getattr(args, flag)
        if path is None:
            continue
        check_place(f"--{flag}", path, "" if flag == "out" else f".{flag}")
        if path.exists() and not path.is_file():
            continue  # several outputs may go to /dev/null
        if path.resolve() in taken:
            raise UserError(f"--{flag} {path} is also {taken[path.resolve()]}: choose another file")
        taken[path.resolve()] = f"--{flag}"
    if args.gif or args.png:
        require("PIL", "a picture")
        require("matplotlib", "a picture")  # its colours, and a font
    objective = config.objective_class
    if not objective.both_sides and (args.suffix or args.template or args.infill):
        raise UserError(f"{args.checkpoint} {objective.description} and sees only the text on the left: it can "
                        "continue a --prefix, but --suffix, --template and --infill need a masked model")
    if args.context and config.block_size and args.context % config.block_size:
        n_blocks = min(-(-args.context // config.block_size), config.seq_len // config.block_size - 1)
        raise UserError(f"--context {args.context} is no multiple of the block size of {args.checkpoint}: use "
                        f"{n_blocks * config.block_size}")
    if args.guidance:
        if not objective.any_order or args.sampler in ("analytic", "euler"):
            raise UserError("--guidance needs a model of masks in whole texts, and a sampler that normalises its "
                            "prediction, such as ancestral: leave it out")
        if args.dual_cache:
            raise UserError("--guidance and --dual_cache do not go together: leave out one of them")
        if config.prefix_range[0]:
            raise UserError(f"--guidance compares with the text without its prompt, and {args.checkpoint} needs a "
                            "prefix: leave it out")
    if args.no_cache and not config.block_size:
        raise UserError("--no_cache is for block diffusion: leave it out")
    if args.known_words and (args.prefix or args.suffix or args.template or args.infill):
        raise UserError("--known_words counts the words of whole samples: leave it out, or the prompt")
    if args.show and args.show_intermediate:
        raise UserError("use --show or --show_intermediate, not both")


def main():
    args = parse_args()
    device = pick_device(args.device)
    dtype = pick_dtype(device, args.dtype)
    model, config, meta, _ = load_model(args.checkpoint, device, hints_of(args), args.raw, args.compile, dtype)
    if args.dataset and "sha256" in meta:
        raise UserError(f"{args.checkpoint} already names its data set: leave out --dataset")
    check(args, config)
    tokenizer = make_tokenizer(meta)
    objective = config.make_objective(meta["vocab_size"])
    settings = settings_of(args, config, args.checkpoint, model, args.sampler, given_flags(args, args.steps))
    settings = settings._replace(guidance=args.guidance)
    prompts = canvases(args, config.seq_len, tokenizer, objective.mask_id, config.block_size)
    if args.guidance and set(itertools.chain(*prompts)) == {objective.mask_id}:
        raise UserError("--guidance strengthens a prompt: add text by --prefix, --suffix, --template or --infill")
    check_fits(RECORD * args.batch_size * sum(map(len, prompts)), torch.device("cpu"),
               f"--batch_size={args.batch_size} x {sum(map(len, prompts)):,} tokens", "ask for fewer tokens at a time")
    if config.prefix_range[0] and not args.prefix and not args.template and not args.infill:
        note(f"{args.checkpoint} was trained to continue text ({config.prefix}): without --prefix its text is worse")
    if args.known_words:
        data_dir = args.data_dir or config.data_dir  # the data's own tokenizer: the model's may have another alphabet
        known = words_of(load_split(config.dataset, "train", 1, data_dir),
                         make_tokenizer(load_meta(config.dataset, data_dir)))
    watching = args.show or args.show_intermediate
    rewrites = objective.random_tokens  # all tokens are drawn anew in each step: the number of masks says nothing
    every = args.show_intermediate
    if rewrites and not every and not sys.stderr.isatty():
        every = -(-settings.steps // 10)  # with masks, Screen itself chooses the states
    screen = Screen(objective.mask_id, tokenizer, every) if watching else None
    denoiser, generator, began = Counted(model), generator_on(device, args.seed), time.perf_counter()
    n_masks = args.batch_size * sum(prompt.count(objective.mask_id) for prompt in prompts)
    network = Rereader(denoiser) if args.no_cache else denoiser
    end = end_of(config, tokenizer)
    fill = lambda canvas: denoise(settings, objective, network, canvas.to(device), config, args.context or 0,
                                  generator, end)
    with (autocast(device, dtype),
          progress(total=None if rewrites else n_masks, desc="sampling", unit="step" if rewrites else "token",
                   leave=False, show=not screen) as bar):
        history = fill_all(prompts, args.batch_size, objective.mask_id, fill, bar, screen, rewrites)
    seconds = time.perf_counter() - began
    samples = [history.final(b) for b in range(len(history.start))]
    texts = [text_of(tokens, start, end, tokenizer) for tokens, start in zip(samples, history.start)]
    each = f" for each {settings.block_length} tokens" if settings.block_length else ""
    steps = f"{settings.steps} steps{each}, " if settings.steps else ""
    steps += f"at most {settings.correct} corrections, " if settings.correct else ""
    title = f"{args.checkpoint}: {settings.sampler}, {steps}{denoiser.nfe} network calls"
    files = ((args.out, lambda: "".join(text + "\n" for text in texts)),
             (args.html, lambda: html(history, tokenizer, title)),
             (args.gif, lambda: gif(history, tokenizer)),
             (args.png, lambda: png(history, tokenizer)))
    options = {key: value for key, value in settings.options.items() if key != "grid" or settings.grid_name}
    try:
        if args.json:
            print(json.dumps({
                "samples": [{"text": text, "tokens": tokens, "steps": history.revealed(b), "p": history.confidence(b),
                             "prompt": b // args.batch_size}
                            for b, (text, tokens) in enumerate(zip(texts, samples))],
                "sampler": settings.sampler, "steps": history.steps, **options,
                "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k,
                "guidance": settings.guidance, "block_length": args.block_length,
                "dual_cache": settings.dual_cache, "context": args.context,
                "correct": settings.correct, "correct_temperature": settings.correct_temperature,
                "nfe": denoiser.nfe, "tokens_read": denoiser.tokens, "seconds": seconds,
                "tokens_per_second": n_masks / seconds, "seed": args.seed, "dtype": str(dtype).removeprefix("torch."),
                "checkpoint": args.checkpoint}), flush=True)
        else:
            print(for_terminal("\n\n".join(texts), sys.stdout), flush=True)
    finally:  # also if nothing reads stdout
        for path, make in files:
            if path:
                write_file(path, make())
    written = [str(path) for path, _ in files if path]
    note(f"{settings.sampler}, {steps}{denoiser.nfe} network calls, {seconds:.1f} s, "
         f"{n_masks / seconds:,.0f} tokens/s, seed {args.seed}" + (f"; wrote {', '.join(written)}" if written else ""))
    if args.known_words:
        share = known_word_share(texts, known)
        note("the samples have no words but their first and last ones, which may be cut: none was counted"
             if share is None else f"{share:.1%} of the words occur in the training data")


if __name__ == "__main__":
    run(main)
