"""Draws docs/maths.png, the figure of docs/maths.md: `python docs/maths.py`.

Left: the schedules (section 2). Middle: the weight of a masked token in the bound (section 5). Right: the distribution
of the mask rate given k masks, with and without the bound's weight (section 7).
"""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusion import D3PM
from schedules import make_schedule


def beta(r, a, b):
    """The density of Beta(a, b) for whole numbers a and b, at r."""
    return math.factorial(a + b - 1) / math.factorial(a - 1) / math.factorial(b - 1) * r ** (a - 1) * (1 - r) ** (b - 1)


def t_step_weights(T):
    """The times s/T of all steps, and what D3PM multiplies the cross-entropy of a mask by."""
    noise = D3PM(1, T).noise((torch.arange(T, dtype=torch.float64) + 0.5) / T, torch.ones(T, 1, dtype=torch.float64))
    return noise.t, noise.weight


def draw(out):
    """Write the figure to the file `out`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.8), dpi=80)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    for name, style in (("linear", "-"), ("loglinear", "--"), ("cosine", "-"), ("geometric", "-")):
        left.plot(t, make_schedule(name).alpha(t), style, label=name)
    left.set(xlabel="t", title="α(t), probability to survive")
    left.legend()

    middle.plot(t[4:], make_schedule("linear").weight(t[4:]), color="black", lw=1, label="1/t")
    for T, color, size in ((4, "C1", 8), (16, "C0", 4)):
        at, weight = t_step_weights(T)
        middle.stairs(weight, torch.cat((torch.zeros(1), at)), color=color, lw=1, baseline=None)
        middle.plot(at, weight, "o", color=color, ms=size, label=f"T/s at t = s/T, T = {T}")
    middle.set(xlabel="t", title="weight of a masked token, α = 1 − t", yscale="log", ylim=(0.8, 40))
    middle.legend()

    L = 8
    for k, color in ((1, "C0"), (4, "C1"), (8, "C2")):
        right.plot(t, beta(t, k, L - k + 1), color=color, label=f"k = {k}")
        right.plot(t, beta(t, k + 1, L - k + 1), color=color, ls="--")
    right.plot([], [], color="gray", label="weight 1/r")
    right.plot([], [], color="gray", ls="--", label="uniform r")
    right.set(xlabel="r", title=f"density of the rate given k masks, L = {L}", ylim=(0, None))
    right.legend(loc="upper center")
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
