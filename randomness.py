"""Random numbers of training and of bounds: each is a function of (seed, purpose, step, index in the global batch).

Philox is a counter-based generator (Salmon et al., SC 2011): its state is a position in one long stream. So the numbers
of sequence 17 of step 1,000 are found by a jump to their position. They do not depend on the number of processes, the
micro-batch size or interruptions of the run, and two models can be compared on the same noise. Dropout is the
exception: its noise is drawn on the device, and depends on the process and the micro-batch, too. Samplers draw from one
torch.Generator for the whole batch (categorical.Draw), so the same seed gives other texts with another batch size.
"""

import numpy as np
import torch

PURPOSES = ("crop", "noise", "strata", "dropout", "prefix", "padding", "attention", "clock")


def rng(seed, purpose, step, index=0):
    """A numpy Generator for one purpose, one step and one sequence (index)."""
    key = np.array([seed, PURPOSES.index(purpose)], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, step]))


def uniforms(seed, step, indices, batch_size, seq_len, stratified, n_times=1):
    """The noise of N sequences of a batch: u (N,), or (N, n_times) if n_times > 1, and v (N, L), float64 in (0, 1].

    indices (N,): which of the batch_size sequences. u says how much of a sequence is masked, v which of its tokens.
    With `stratified`, each interval ((i - 1)/batch_size, i/batch_size] has one u of the whole batch, in random order.
    Every single u is still uniform, so estimates stay unbiased, but their mean over the batch varies less. With several
    times per sequence there are batch_size * n_times intervals.
    """
    u, v = np.empty((len(indices), n_times)), np.empty((len(indices), seq_len))
    for row, index in enumerate(indices):
        generator = rng(seed, "noise", step, index)
        u[row] = 1 - generator.random(n_times)
        v[row] = 1 - generator.random(seq_len)
    if stratified:
        stratum = strata(seed, batch_size * n_times, step).reshape(-1, n_times)[np.asarray(indices)]
        u = (stratum + u) / (batch_size * n_times)
    return torch.from_numpy(u if n_times > 1 else u[:, 0]), torch.from_numpy(v)


def strata(seed, n, number=0):
    """A permutation of 0 ... n - 1, (n,): entry i says in which of n equal intervals the i-th u lies.

    number: of the step or the repeat; each has a permutation of its own."""
    return rng(seed, "strata", number).permutation(n)


def repeated_uniforms(seed, indices, n, repeats, seq_len, n_times=1):
    """The noise of some of n sequences that are scored `repeats` times each, as (u, v, pick), float64.

    u and pick are (N, repeats), v is (N, repeats, L). Every number is uniform on (0, 1], and all v and pick are
    independent. The u are stratified: (0, 1] has n * repeats equal intervals with one u in each. Every sequence has one
    u in each of `repeats` larger intervals: with repeats = 2, one in (0, 1/2] and one in (1/2, 1]. With n_times > 1, u
    and pick are (N, repeats, n_times), and the n * n_times u of each repeat are stratified.
    """
    stratum = np.stack([strata(seed, n * n_times, repeat).reshape(n, n_times) for repeat in range(repeats)], 1)
    u, pick = np.empty((2, len(indices), repeats, n_times))
    v = np.empty((len(indices), repeats, seq_len))
    for row, index in enumerate(indices):
        generator, interval = rng(seed, "noise", 0, index), stratum[index]
        if n_times == 1:  # one of the larger intervals for each repeat, and in it one of n small ones
            large = generator.permutation(repeats)
            interval = (large * n + interval[large, 0])[:, None]
        u[row] = (interval + 1 - generator.random((repeats, n_times))) / (n * (repeats if n_times == 1 else n_times))
        v[row], pick[row] = 1 - generator.random((repeats, seq_len)), 1 - generator.random((repeats, n_times))
    if n_times == 1:
        u, pick = u[..., 0], pick[..., 0]
    return tuple(map(torch.from_numpy, (u, v, pick)))


def prefix_lengths(prefix_range, seed, step, indices, x0=None, until=None):
    """The number of given tokens of each sequence, uniform on fewest ... most of prefix_range: (N,) int.

    until: the id of a token, or None. If it is not None, each text of x0 (N, L) is given up to its last `until`."""
    if until is not None:
        return x0.shape[1] - (x0 == until).flip(1).int().argmax(1).numpy()
    fewest, most = prefix_range
    if fewest == most:
        return np.full(len(indices), most)
    return np.array([rng(seed, "prefix", step, index).integers(fewest, most, endpoint=True) for index in indices])


def give_prefix(v, lengths):
    """Set v (N, ..., L) to 2 at the first lengths (N,) tokens: these are given and not scored (diffusion.py)."""
    given = torch.arange(v.shape[-1]) < torch.as_tensor(lengths).view(-1, *[1] * (v.dim() - 1))
    return torch.where(given, 2.0, v)
