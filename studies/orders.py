"""The likelihood from two sides, for evaluate.py --orders: log-means over K random orders (maths.md, section 14)."""

import math

import torch

from cli import UserError, autocast, progress
from likelihood import along_orders, draw_with_orders, log_mean, mean_and_error, plus_minus
from log import finite
from randomness import repeated_uniforms


def measure_orders(model, objective, data, K, seed=0):
    """Log-likelihoods along K random orders, in nats.

    Returns (of the data, of samples, of the samples along their true orders): (n, blocks, K) float64 twice and
    (n, blocks). There are as many samples as windows. Orders and samples depend on the seed and on the window.
    """
    of_data, of_samples, true = [], [], []
    size = max(1, data.batch_size // K)
    with progress(total=data.n, desc=f"{K} orders", unit="seq", leave=False) as bar:
        for i in range(0, data.n, size):
            chunk = list(range(i, min(i + size, data.n)))
            _, v, _ = repeated_uniforms(seed, chunk, data.n, 2 * K + 2, data.seq_len)
            with autocast(data.device, data.dtype):
                of_data.append(along_orders(model, objective, data.read(chunk).to(data.device), v[:, :K]))
                samples, l = draw_with_orders(model, objective, v[:, K], 1 - v[:, K + 1], data.device)
                of_samples.append(along_orders(model, objective, samples, v[:, K + 2:]))
            true.append(l)
            bar.update(len(chunk))
    return torch.cat(of_data), torch.cat(of_samples), torch.cat(true)


def two_sides(of_data, of_samples, true):
    """{name: nats (n,)}, all of -log p: on the data bounds from above, on samples from above and from below."""
    with_true = torch.cat((true[..., None], of_samples[..., 1:]), 2)
    return {"bound": -of_data.sum(1).mean(1), "log_mean": -log_mean(of_data),
            "samples_above": -log_mean(of_samples), "samples_below": -log_mean(with_true)}


def orders(subject, K, seed, out):
    """Print bounds over K orders on the data, and from both sides on samples of the model."""
    if not subject.config.objective_class.has_mask or not subject.config.block_size:
        subject.masked_only("--orders")
    subject.whole_windows("--orders")
    data, unit = subject.data, subject.tokenizer.unit
    if K > data.batch_size:
        raise UserError(f"--orders {K} is more than the texts of a network call: use --batch_size {K} or more")
    found = two_sides(*measure_orders(subject.model, subject.objective(), data, K, seed))
    result = {"orders": K, "n_sequences": data.n, "dataset": subject.dataset, "split": subject.split,
              "seq_len": data.seq_len, "step": subject.step, "checkpoint": subject.path, "seed": seed}
    words = {"bound": f"mean over {K} orders, on {subject.where}: an upper bound",
             "log_mean": f"log-mean of {K} orders, on {subject.where}: a tighter upper bound",
             "samples_above": f"log-mean of {K} orders, on samples of the model: an upper bound",
             "samples_below": "the same with the samples' true orders among them: a lower bound"}
    found["gap"] = found["samples_above"] - found["samples_below"]
    print(f"-log2 p(x) per {unit}: {data.n:,} windows and {data.n:,} samples of {data.seq_len} {unit}s, "
          f"read {K * data.seq_len:,} and {(K + 1) * data.seq_len:,} times", file=out)
    for name, nats in found.items():
        bits, error = mean_and_error(nats / data.seq_len / math.log(2))
        result[name] = {"bits_per_token": bits, "stderr": finite(error)}
        print(f"{bits:10.4f} {plus_minus(error)}  {words.get(name, 'between the two sides on samples')}", file=out)
    return result
