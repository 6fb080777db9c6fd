"""Visibility for model.py: which tokens a token sees, in blocks, and in a past that is kept as keys and values.

By default a token sees all tokens, or in a causal network itself and those on its left. Block diffusion
(block_diffusion.py) uses blocks and a past. A causal network that writes token after token uses a past
(sampling.left_to_right). A causal network that becomes a diffusion model uses `annealed` (train.py).
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from parallel import allow_graphs
from randomness import rng


class Past(NamedTuple):
    """Keys, values and channels for token_shift that a block keeps of P tokens, for the tokens that follow them."""

    keys: torch.Tensor             # (B, heads, P, head_dim), after rotation
    values: torch.Tensor           # (B, heads, P, head_dim)
    to_attention: torch.Tensor = None  # the channels of the attention's input that token_shift takes from the left:
                                       # (B, P, D/4), or (B, P, D/2) with left_only; None without token_shift
    to_mlp: torch.Tensor = None        # those of the MLP's input

    def of_rows(self, rows):
        """The past of the sequences `rows`, a (N,) long."""
        return Past(*(x if x is None else x[rows] for x in self))


class Layout(NamedTuple):
    """The positions of L tokens, and which tokens each of them sees.

    sees: (L, P + L) or (B, 1, L, P + L) bool: sees[i, j] is True if token i sees token j, where the P tokens of the
        past come first, then these L. Or Tiles, or FlexAttention's BlockMask, for the same. None: a token sees all
        tokens, or in a causal network itself and those on its left.
    positions: (L,) long, the tokens' positions in the text.
    last: (L,) bool, for token_shift: True for tokens without a right neighbour. None: only the last token has none.
    beside: (L,) bool, for token_shift, if the past is the clean text of these same tokens: True for tokens whose left
        neighbour, at position i - 1, is the clean one. None: the past comes before these tokens.
    """

    sees: torch.Tensor = None
    positions: torch.Tensor = None
    last: torch.Tensor = None
    beside: torch.Tensor = None


class Tiles(NamedTuple):
    """A visibility cut into square tiles. Attention skips the tiles in which nothing is seen."""

    width: int    # tokens
    seen: tuple   # for each row of tiles, the numbers of the tiles that it sees
    masks: tuple  # for each row of tiles, the visibility in these tiles, (width, width * len(seen)) bool


def in_tiles(sees):
    """Cut a visibility (L, n) bool into four rows of Tiles. Return it uncut if it does not fit, or little is saved."""
    (L, n), rows = sees.shape, 4
    width = L // rows
    if width < 16 or L % rows or n % width:
        return sees
    tiles = sees.view(rows, width, n // width, width)  # (row of tiles, row in it, column of tiles, column in it)
    seen = [row.nonzero().flatten().tolist() for row in tiles.any(3).any(1)]
    if sum(map(len, seen)) > 0.9 * rows * n // width:
        return sees
    masks = tuple(tile_row[:, numbers].flatten(1) for tile_row, numbers in zip(tiles, seen))
    return Tiles(width, tuple(map(tuple, seen)), masks)


def visibility(rule, L, n, device, flex):
    """Layout's `sees` for L tokens among n, where rule(i, j) tells whether i sees j. flex: return a BlockMask."""
    if flex:
        return create_block_mask(lambda batch, head, row, column: rule(row, column), None, None, L, n, device=device)
    return in_tiles(table(rule, L, n, device))


def table(rule, L, n, device):
    """The visibility (L, n) bool of a rule."""
    return rule(torch.arange(L, device=device)[:, None], torch.arange(n, device=device))


def of_blocks(size, P=0):
    """The rule for tokens in blocks of `size` after a past of P tokens: a token sees its block and those before."""
    return lambda i, j: j // size <= (P + i) // size


def beside_clean(size, L):
    """The rule for L noisy tokens whose past is the clean text itself, j < L: a token sees the noisy tokens of its own
    block, and the clean tokens of the blocks before (BD3-LM, arXiv 2503.09573, appendix B.6)."""
    return lambda i, j: torch.where(j < L, j // size < i // size, (j - L) // size == i // size)


@functools.lru_cache(maxsize=64)
def layout_of_blocks(L, P, size, device, flex=False):
    """The Layout of L tokens after P others, in blocks of `size` tokens: a token sees its block and those before.

    The neighbour on the left may be of the block before. The neighbour on the right may not be of the block after.
    """
    sees, here = None, P + torch.arange(L, device=device)
    if P % size + L > size:  # otherwise all L tokens are in one block, and see everything
        sees = visibility(of_blocks(size, P), L, P + L, device, flex)
    return Layout(sees, here, here % size == size - 1)


@functools.lru_cache(maxsize=64)
def layout_beside_clean(L, size, device, flex=False):
    """The Layout of L noisy tokens whose past is the clean text itself, P = L, at the same positions."""
    here = torch.arange(L, device=device)
    sees = visibility(beside_clean(size, L), L, 2 * L, device, flex)
    return Layout(sees, here, here % size == size - 1, here % size == 0)


def annealed(L, step, anneal_steps, seed):
    """The visibility (L, L) of a training step on the way from causal to full attention (DiffuLLaMA, arXiv 2410.17891).

    A token sees all tokens on its left, itself, and each one on its right with probability (step + 1)/anneal_steps. One
    table serves all sequences and all layers. Returns None, which means full attention, from step anneal_steps - 1 on.
    """
    share = (step + 1) / anneal_steps if anneal_steps else 1
    if share >= 1:
        return None
    drawn = torch.from_numpy(rng(seed, "attention", step).random((L, L), dtype="float32") < share)
    return drawn | torch.ones(L, L, dtype=torch.bool).tril()


@functools.cache
def compiled_flex_attention():
    """FlexAttention, compiled for networks that are not. It needs a graph for each shape."""
    allow_graphs()
    return torch.compile(flex_attention)


MOST_PRODUCTS = 512  # up to so many keys attend_by_products is faster; studies/forecast.py sets 0, as on a GPU


def attend(q, k, v, sees, causal):
    """Attention of q (B, heads, L, head_dim) to k and v (B, heads, P + L, head_dim). sees: as in Layout."""
    if isinstance(sees, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else compiled_flex_attention()
        return flex(q, k, v, block_mask=sees)
    if isinstance(sees, Tiles):
        q, k, v = (x.split(sees.width, 2) for x in (q, k, v))
        found = []
        for queries, seen, mask in zip(q, sees.seen, sees.masks):
            keys, values = (torch.cat([x[i] for i in seen], 2) for x in (k, v))
            found.append(attend(queries, keys, values, mask, False))
        return torch.cat(found, 2)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MOST_PRODUCTS:
        return attend_by_products(q, k, v, sees, causal)
    return F.scaled_dot_product_attention(q, k, v, sees, is_causal=causal and sees is None)


def attend_by_products(q, k, v, sees, causal):
    """Compute attend() as softmax(q k^T / sqrt(head_dim)) v, two products, and keep the scores (B heads, L, P + L).

    In bfloat16 on CPUs, training with up to 512 keys is two to five times as fast as with PyTorch's own function, which
    keeps no scores and computes them again for the gradient. The softmax is computed in float32, kept in bfloat16.
    """
    B, heads, L, head_dim = q.shape
    if causal and sees is None:
        sees = torch.ones(L, k.shape[2], dtype=torch.bool).tril()
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(q.new_zeros(()), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=head_dim ** -0.5)
        if sees is not None:
            scores = scores.view(B, heads, L, -1).masked_fill(~sees, -torch.inf).flatten(0, 1)
        return (scores.softmax(-1) @ v.flatten(0, 1)).view(B, heads, L, -1)
