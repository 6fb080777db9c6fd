"""The denoiser: a bidirectional transformer with adaLN-Zero conditioning on time (DiT, arXiv 2212.09748).

It maps noisy tokens xt (B, L) and their time t to logits over clean tokens. It contains nothing of diffusion: the mask
is one more token, the time is one more input, and the objective and the sampler interpret the logits.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class LayerNorm(nn.Module):
    """LayerNorm in float32 with a gain, and with a bias if bias=True."""

    def __init__(self, n_embd, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, eps=1e-5)


def modulate(x, shift, scale):
    """x * (1 + scale) + shift in float32: in bfloat16 the sum 1 + scale would lose a small scale."""
    return x * (1 + scale.float()) + shift


def rotary_tables(seq_len, head_dim, base=10000.0):
    """cos and sin of RoPE (arXiv 2104.09864), (seq_len, head_dim / 2) each, float32."""
    frequency = 1 / base ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(seq_len).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + head_dim/2]) of x (..., L, head_dim); cos and sin are (..., L, head_dim/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class TimeEmbedding(nn.Module):
    """Map time to c by 256 sinusoids of clock(t) and an MLP: t (B,) or (B, L) -> (B, 1, n_cond) or (B, L, n_cond)."""

    def __init__(self, n_cond, clock, n_frequency=256):
        super().__init__()
        self.clock, self.n_frequency = clock, n_frequency
        self.fc_in = nn.Linear(n_frequency, n_cond)
        self.fc_out = nn.Linear(n_cond, n_cond)

    def forward(self, t):
        t = self.clock(t.float())
        half = self.n_frequency // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angle = t[..., None] * frequency
        c = self.fc_out(F.silu(self.fc_in(torch.cat((angle.cos(), angle.sin()), dim=-1))))
        return F.silu(c[:, None] if t.dim() == 1 else c)


def token_shift(x, causal=False):
    """Take a quarter of the channels of x (B, L, D) from the token on the left, a quarter from the one on the right.

    causal: the second quarter comes from the second token to the left instead.

    This is RWKV's token shift (arXiv 2305.13048) in both directions and without parameters. It shows each token its
    neighbours at no cost; small networks need long training to find them by attention.
    """
    left, right, here = x.split([x.shape[-1] // 4, x.shape[-1] // 4, x.shape[-1] - x.shape[-1] // 4 * 2], dim=-1)
    left = F.pad(left, (0, 0, 1, 0))[:, :-1]
    right = F.pad(right, (0, 0, 2, 0))[:, :-2] if causal else F.pad(right, (0, 0, 0, 1))[:, 1:]
    return torch.cat((left, right, here), dim=-1)


def at_positions(at, B, L, *features):
    """Pick each of the features (B or 1, L or 1, D) at positions `at` (N,) of all B L: (N, D). at=None: unchanged."""
    if at is None:
        return features
    return [x.expand(B, L, -1).flatten(0, 1).index_select(0, at) for x in features]


class Block(nn.Module):
    """Attention and MLP, pre-norm. If n_cond > 0, c shifts, scales and gates both (adaLN-Zero)."""

    def __init__(self, n_embd, n_head, n_cond, dropout, shift_tokens=False, causal=False, norm_bias=False):
        super().__init__()
        self.n_head, self.dropout, self.causal = n_head, dropout, causal
        self.neighbours = (lambda x: token_shift(x, causal)) if shift_tokens else lambda x: x
        self.norm1 = LayerNorm(n_embd, norm_bias)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.attn_out = nn.Linear(n_embd, n_embd, bias=False)
        self.norm2 = LayerNorm(n_embd, norm_bias)
        self.mlp_in = nn.Linear(n_embd, 4 * n_embd)
        self.mlp_out = nn.Linear(4 * n_embd, n_embd)
        self.modulation = nn.Linear(n_cond, 6 * n_embd) if n_cond else None

    def attention(self, x, cos, sin, visible=None, past=None, keep=None):
        """Attention of x (B, L, D) -> (B, L, D). visible: as in DiT.forward. past: (keys, values) of this block.

        keep: a list. The (keys, values) of all tokens, those of the past first, are appended to it.
        """
        B, L, D = x.shape
        # q, k, v: (B, heads, L, D/heads)
        q, k, v = self.qkv(x).view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
            if self.causal and visible is None:
                visible = torch.ones(L, k.shape[2], dtype=torch.bool, device=x.device).tril(k.shape[2] - L)
        if keep is not None:
            keep.append((k, v))
        x = F.scaled_dot_product_attention(q, k, v, visible, is_causal=self.causal and visible is None)
        return self.attn_out(x.transpose(1, 2).reshape(B, L, D))

    def mlp(self, x):
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))

    def forward(self, x, c, cos, sin, at=None, visible=None, past=None, keep=None):
        """x (B, L, D), c (B or 1, 1 or L, n_cond) or None -> (B, L, D), or (N, D) at the positions `at` of all B L.

        With `at`, the MLP, two thirds of a block's weights, runs at these positions alone. It is for the last block:
        nothing reads its output at other positions.
        """
        (B, L, _), drop = x.shape, lambda x: F.dropout(x, self.dropout, self.training)
        attend = lambda h: drop(self.attention(self.neighbours(h), cos, sin, visible, past, keep))
        if self.modulation is None:
            x = x + attend(self.norm1(x))
            x, h = at_positions(at, B, L, x, self.neighbours(self.norm2(x)))
            return x + drop(self.mlp(h))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=-1)
        x = x + gate1 * attend(modulate(self.norm1(x), shift1, scale1))
        x, h, gate2 = at_positions(at, B, L, x, self.neighbours(modulate(self.norm2(x), shift2, scale2)), gate2)
        return x + gate2 * drop(self.mlp(h))

    def matrices(self):
        """The matrices of the block, without that of the time conditioning."""
        return [layer.weight for layer in (self.qkv, self.attn_out, self.mlp_in, self.mlp_out)]

    def outputs(self):
        """The layers that make the block the identity if they are zero: its gates, or its two output layers."""
        return [self.attn_out, self.mlp_out] if self.modulation is None else [self.modulation]

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token: 2 per weight forward, 4 backward, and attention's.

        predicted: the share of tokens that the MLP runs on."""
        qkv, attn_out, mlp_in, mlp_out = (weight.numel() for weight in self.matrices())
        return 6 * (qkv + attn_out + predicted * (mlp_in + mlp_out)) + 12 * seq_len * self.attn_out.out_features


class DiT(nn.Module):
    """Denoiser over V = vocab_size tokens and, unless mask=False, the mask (id V).

    clock: t -> the number whose sinusoids the time embedding takes (configs.clock has some by name). None: a plain
    pre-norm transformer without time. tied: the head's weights are the tokens' embeddings; else the head has its own
    weights, zero at first. head_bias, norm_bias: biases that other projects' networks have. shift_tokens: see
    token_shift. causal: no token sees those on its right (for the autoregressive baseline).
    """

    @classmethod
    def from_config(cls, config, vocab_size):
        objective = config.objective_class
        return cls(vocab_size, config.seq_len, config.n_layer, config.n_head, config.n_embd, config.n_cond,
                   config.dropout, config.clock, objective.has_mask, config.tied, config.head_bias, config.norm_bias,
                   config.shift_tokens, config.checkpoint_blocks, objective.causal)

    @classmethod
    def misfit(cls, config):
        """A message that says which settings of a Config this network does not allow, or None."""
        if config.n_embd % (2 * config.n_head):
            return f"n_embd={config.n_embd} must be an even multiple of n_head={config.n_head}"

    def __init__(self, vocab_size, seq_len, n_layer, n_head, n_embd, n_cond=128, dropout=0.0, clock=None,
                 mask=True, tied=True, head_bias=False, norm_bias=False, shift_tokens=False, checkpoint_blocks=False,
                 causal=False):
        super().__init__()
        self.vocab_size, self.seq_len, self.checkpoint_blocks = vocab_size, seq_len, checkpoint_blocks
        self.shift_tokens = shift_tokens
        n_cond = n_cond if clock else 0
        self.embed = nn.Embedding(vocab_size + mask, n_embd)
        self.time_embed = TimeEmbedding(n_cond, clock) if n_cond else None
        self.blocks = nn.ModuleList(Block(n_embd, n_head, n_cond, dropout, shift_tokens, causal, norm_bias)
                                    for _ in range(n_layer))
        self.norm = LayerNorm(n_embd, norm_bias)
        self.modulation = nn.Linear(n_cond, 2 * n_embd) if n_cond else None
        self.head_weight = None if tied else nn.Parameter(torch.zeros(vocab_size, n_embd))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size)) if head_bias else None
        cos, sin = rotary_tables(seq_len, n_embd // n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw matrices and embeddings from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        Biases, modulations, and the output layers of blocks without gates are zero. So every block is the identity at
        the start, with adaLN-Zero (its gates are zero) and without (its outputs are zero).
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                bound = module.weight.shape[1] ** -0.5
                module.weight.uniform_(-bound, bound)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
        for last in (layer for block in self.blocks for layer in block.outputs()):
            last.weight.zero_()
        if self.modulation is not None:
            self.modulation.weight.zero_()

    def angles(self, positions, L, past=None):
        """cos and sin at the tokens' positions (L,) or (B, L). By default the positions continue after the past."""
        if positions is None:
            first = 0 if past is None else past[0][0].shape[2]
            assert first + L <= self.seq_len, f"{first + L} tokens, but the model was built for {self.seq_len}"
            return self.cos[first:first + L], self.sin[first:first + L]
        tables = self.cos[positions], self.sin[positions]
        return tables if positions.dim() == 1 else [table[:, None] for table in tables]  # the same for all heads

    def trunk(self, xt, t, at=None, visible=None, positions=None, past=None, keep=None):
        """Tokens -> the head's input, features (B, L, D) float32, or (N, D) at the positions `at` (N,) of all B L."""
        if past is not None and self.shift_tokens:
            raise ValueError("shift_tokens mixes a token with its neighbours, which the past does not keep")
        B, L = xt.shape
        x, (cos, sin) = self.embed(xt).float(), self.angles(positions, L, past)
        c = None if self.time_embed is None else self.time_embed(t)
        for i, block in enumerate(self.blocks):
            inputs = (x, c, cos, sin, at if block is self.blocks[-1] else None, visible, past and past[i], keep)
            if self.checkpoint_blocks and self.training:
                x = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x = block(*inputs)
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *at_positions(at, B, L, *self.modulation(c).chunk(2, dim=-1)))
        return x

    def head(self, x):
        """Features (..., D) -> logits (..., V). The mask is never predicted: its row of the embedding is left out."""
        weight = self.embed.weight[:self.vocab_size] if self.head_weight is None else self.head_weight
        return F.linear(x, weight, self.head_bias)

    def forward(self, xt, t, where=None, visible=None, positions=None, past=None):
        """xt (B, L) long in [0, V], t (B,) or (B, L) in (0, 1] -> logits (B, L, V).

        where: (B, L) bool. Returns logits (N, V) at its N True positions only, in row-major order. For 50,000 tokens
            the head is a third of the work, and nothing reads its logits at visible tokens.
        visible: bool, True where the token of a row sees the token of a column; the columns of the past come first.
            (L, P + L), or (B, 1, L, P + L) for each sequence. Default: all tokens, or with `causal` those on the left.
        positions: (L,) or (B, L) long, the tokens' positions in the text, below seq_len. Default: 0, 1, ..., or the
            next ones after the past.
        past: what remember() returned for the P tokens before these. Raises ValueError with shift_tokens, because the
            shift mixes tokens on both sides of the border.
        """
        at = None if where is None else where.flatten().nonzero().squeeze(1)
        return self.head(self.trunk(xt, t, at, visible, positions, past))

    def remember(self, xt, t, visible=None, positions=None, past=None):
        """Keys and values of the past and of tokens xt (B, L) after it: the `past` for calls on the tokens that follow.

        Returns a list of (keys, values) for each block, (B, heads, P + L, head_dim) each. They equal those of one call
        on all tokens, provided that these tokens see none of those that follow.
        """
        keep = []
        self.trunk(xt, t, torch.empty(0, dtype=torch.long, device=xt.device), visible, positions, past, keep)
        return keep

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def matrices(self):
        """The matrices of the blocks, without those of the time conditioning."""
        return [weight for block in self.blocks for weight in block.matrices()]

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token.

        predicted: the share of tokens that the head and the last MLP run on. Recomputed activations do not count (PaLM,
        arXiv 2204.02311, appendix B). Normalisation and time embedding do not count either.
        """
        *others, last = self.blocks
        head = 6 * predicted * self.vocab_size * self.embed.embedding_dim
        return sum(block.flops(seq_len) for block in others) + last.flops(seq_len, predicted) + head
