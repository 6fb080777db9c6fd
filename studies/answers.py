"""Right answers, for evaluate.py --answers: how many items a model completes exactly, given their first tokens."""

import torch

from cli import UserError, table
from likelihood import mean_and_error
from randomness import prefix_lengths


def measure_answers(subject, settings, seed):
    """Complete the windows of the data after their given tokens. Returns (right (n,) bool, network calls per window).

    An answer is right if the whole text is that of the window; pads are no text. settings: a sampling.Settings.
    """
    data, decode = subject.data, subject.tokenizer.decode
    x0 = data.read(slice(None))
    given = prefix_lengths(subject.config.prefix_range, seed, 0, range(data.n), x0, subject.until)
    is_given = torch.arange(data.seq_len) < torch.from_numpy(given)[:, None]
    filled, nfe, _ = subject.fill(torch.where(is_given, x0, subject.objective().mask_id), settings, seed)
    return torch.tensor([decode(found) == decode(asked) for found, asked in zip(filled.tolist(), x0.tolist())]), nfe


def answers(subject, settings, seed, out):
    """Print the share of right answers for each of several sampling.Settings. Returns the JSON object."""
    if subject.config.prefix == "none":
        raise UserError(f"--answers completes items after their given tokens, and {subject.path} was trained without "
                        "--prefix (docs/names.md)")
    rows = []
    for way in settings:
        right, nfe = measure_answers(subject, way, seed)
        share, error = mean_and_error(right.double())
        rows.append({"sampler": way.sampler, "steps": way.steps, "nfe": nfe, "right": share, "stderr": error,
                     "temperature": way.temperature})
    print(f"share of {subject.data.n:,} items of {subject.where} that are completed exactly, given a prefix "
          f"({subject.config.prefix}); NFE: network calls", file=out)
    table(rows, {"sampler": ("", ""), "steps": ("steps", "d"), "nfe": ("NFE", ".1f"), "right": ("right", ".4f"),
                 "stderr": ("± s.e.", ".4f")}, out)
    return {"answers": rows, "n_sequences": subject.data.n, "dataset": subject.dataset, "split": subject.split,
            "prefix": subject.config.prefix, "seed": seed, "step": subject.step, "checkpoint": subject.path}
