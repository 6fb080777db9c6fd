"""The denoiser: a bidirectional transformer with adaLN-Zero conditioning on time (DiT, arXiv 2212.09748).

It maps noisy tokens xt (B, L) and their time t to logits (B, L, V) over clean tokens. The objective and the sampler say
what the logits mean. For the network the mask is one more token, and the time one more input. The network also knows
which tokens each token sees: all, those on its left (`causal`), or its block and those before (`block_size`, `clean`).

Shapes: B sequences of L tokens, V kinds of tokens, D = n_embd channels. A *position* is the index of a token in its
text. A *place* is its index among all B L tokens of a batch: token l of sequence b has place b L + l.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import Layout, Past, attend, layout_beside_clean, layout_of_blocks


class LayerNorm(nn.Module):
    """LayerNorm in float32 with a gain, and with a bias if bias=True."""

    def __init__(self, n_embd, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x):
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, eps=1e-5)


def modulate(x, shift, scale):
    """Return x * (1 + scale) + shift in float32: in bfloat16 1 + scale would lose a small scale. Without scale: x."""
    return x if scale is None else x * (1 + scale.float()) + shift


def rotary_tables(seq_len, head_dim):
    """cos and sin of RoPE (arXiv 2104.09864), (seq_len, head_dim / 2) each, float32."""
    frequency = 1 / 10000.0 ** (torch.arange(0, head_dim, 2).float() / head_dim)
    angle = torch.outer(torch.arange(seq_len).float(), frequency)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + head_dim/2]) of x (..., L, head_dim); cos and sin are (..., L, head_dim/2)."""
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)


class TimeEmbedding(nn.Module):
    """Map time to c by 256 sinusoids of clock(t) and an MLP: t (B,) or (B, L) -> (B, 1, n_cond) or (B, L, n_cond)."""

    def __init__(self, n_cond, clock):
        super().__init__()
        self.clock = clock
        self.fc_in = nn.Linear(256, n_cond)
        self.fc_out = nn.Linear(n_cond, n_cond)

    def forward(self, t):
        t = self.clock(t.float())
        frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angle = t[..., None] * frequency
        c = self.fc_out(F.silu(self.fc_in(torch.cat((angle.cos(), angle.sin()), dim=-1))))
        return F.silu(c[:, None] if t.dim() == 1 else c)


def moved(x, n, past=None):
    """Move x (B, L, C) right by n tokens. The last tokens of the past (B, P, C), or zeros, come in at the left."""
    if past is None:
        return F.pad(x, (0, 0, n, 0))[:, :x.shape[1]]
    return torch.cat((F.pad(past, (0, 0, n, 0))[:, -n:], x), 1)[:, :x.shape[1]]


def token_shift(x, left_only=False, past=None, beside=None, last=None):
    """Take the first quarter of the channels of x (B, L, D) from the left neighbour, the second from the right one.

    A token without that neighbour gets zeros. left_only: take the second quarter from the second token to the left.
    past (B, P, D/4), or (B, P, D/2) with left_only: these channels of the tokens before x.
    beside, last: as in attention.Layout.

    This is RWKV's token shift (arXiv 2305.13048) in both directions and without parameters. It shows each token its
    neighbours at no cost; small networks need long training to find them by attention.
    """
    quarter = x.shape[-1] // 4
    left, right, here = x.split([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    if left_only:
        past, past_2 = (None, None) if past is None else past.chunk(2, dim=-1)
        return torch.cat((moved(left, 1, past), moved(right, 2, past_2), here), dim=-1)
    right = F.pad(right, (0, 0, 0, 1))[:, 1:]
    right = right if last is None else right.masked_fill(last[:, None], 0)
    left = moved(left, 1, past) if beside is None else torch.where(beside[:, None], moved(past, 1), moved(left, 1))
    return torch.cat((left, right, here), dim=-1)


def at_places(at, B, L, *features):
    """Pick each of the features (B or 1, L or 1, D) at the places `at` (N,): (N, D). at=None: unchanged."""
    if at is None:
        return features
    return [x if x is None else x.expand(B, L, -1).flatten(0, 1).index_select(0, at) for x in features]


def padded_linear(x, weight, bias, multiple):
    """Compute F.linear(x, weight, bias), (..., V), with the number of outputs rounded up to a multiple of `multiple`.

    On CUDA V = 50,257 outputs take five to seven times as long as 50,304, a multiple of 64. So rows of zeros are added
    to the weight (V, D), and their outputs are cut off."""
    V = weight.shape[0]
    more = -V % multiple
    if not more:
        return F.linear(x, weight, bias)
    return F.linear(x, F.pad(weight, (0, 0, 0, more)), bias if bias is None else F.pad(bias, (0, more)))[..., :V]


def places(where):
    """Return the places (N,) of the True elements of `where` (B, L). Places and None stay as they are."""
    return where if where is None or where.dim() == 1 else where.flatten().nonzero().squeeze(1)


GATE_INPUTS = 12  # the head gates of a token depend on its first 12 channels; all channels help no more (LOG.md)


class Block(nn.Module):
    """A layer of the transformer: attention, then an MLP, with adaLN-Zero if n_cond > 0:

        x <- x + gate attention(norm(x) (1 + scale) + shift),   and the same with the MLP.

    Shift, scale and gate are linear in c (TimeEmbedding), with weights that are 0 at first. Without c: 0, 0 and 1.
    """

    def __init__(self, config, n_cond):
        super().__init__()
        D = config.n_embd
        self.n_head, self.dropout, self.shift_tokens = config.n_head, config.dropout, config.shift_tokens
        self.causal = config.objective_class.causal
        self.shift_left = self.causal or config.predict_next  # see token_shift
        self.norm1 = LayerNorm(D, config.norm_bias)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.head_gate = nn.Parameter(torch.zeros(config.n_head, min(GATE_INPUTS, D))) if config.head_gates else None
        self.norm2 = LayerNorm(D, config.norm_bias)
        self.mlp_in = nn.Linear(D, 4 * D)
        self.mlp_out = nn.Linear(4 * D, D)
        self.modulation = nn.Linear(n_cond, 6 * D) if n_cond else None

    def neighbours(self, h, layout, past):
        """Return token_shift(h) of h (B, L, D), or h if token shift is off. past: a Past's to_attention or to_mlp."""
        return token_shift(h, self.shift_left, past, layout.beside, layout.last) if self.shift_tokens else h

    def heads(self, h, cos, sin):
        """Queries, keys and values of h (B, L, D), (B, heads, L, D/heads) each. The first two are rotated, unless the
        positions are in h already: then cos and sin are None."""
        B, L, D = h.shape
        qk, v = self.qkv(h).view(B, L, 3, self.n_head, D // self.n_head).permute(2, 0, 3, 1, 4).split((2, 1))
        q, k = qk if cos is None else rotate(qk, cos, sin)  # q and k at once: fewer and larger operations
        return q, k, v.squeeze(0)

    def gates(self, h):
        """A factor for the output of each head (gated attention, arXiv 2505.06708): h (B, L, D) -> (B, L, heads).

        None without head gates. Their weights are zero at first, so the factors are 1."""
        return None if self.head_gate is None else 2 * torch.sigmoid(F.linear(h[..., :GATE_INPUTS], self.head_gate))

    def attention(self, q, k, v, sees=None, gates=None):
        """The output (B, L, D) of attention to keys and values of the past and these tokens. gates: see gates()."""
        x = attend(q, k, v, sees, self.causal).transpose(1, 2)  # (B, L, heads, D/heads)
        x = x if gates is None else x * gates[..., None]
        return self.attn_out(x.flatten(2))

    def mlp(self, x):
        return self.mlp_out(F.gelu(self.mlp_in(x), approximate="tanh"))

    def add(self, x, y, gate):
        """Return x + gate y, with dropout of y. Without gate: x + y."""
        y = F.dropout(y, self.dropout, self.training)
        return x + (y if gate is None else gate * y)

    def kept(self, k, v, h1, h2, past):
        """The Past of all tokens so far. h1, h2: the inputs of attention and MLP before token_shift."""
        if not self.shift_tokens:
            return Past(k, v)
        n_shifted = h1.shape[-1] // 4 * (2 if self.shift_left else 1)  # the channels that token_shift moves right
        shifted = [h[..., :n_shifted] for h in (h1, h2)]
        if past is not None:
            shifted = [torch.cat(pair, 1) for pair in zip((past.to_attention, past.to_mlp), shifted)]
        return Past(k, v, *shifted)

    def forward(self, x, c, cos, sin, layout=Layout(), at=None, past=None, keep=False):
        """x (B, L, D), c (B or 1, 1 or L, n_cond) or None -> (B, L, D), or (N, D) at the places `at` (N,).

        at: the MLP, two thirds of the weights, runs at these places alone. In the last block nothing reads the rest.
        past: the Past of the tokens before these, or None.
        keep: also return the Past of all tokens so far. If `at` is empty, only what that needs is computed.
        """
        B, L, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (None,) * 6 if self.modulation is None else self.modulation(c).chunk(6, dim=-1))

        h1 = modulate(self.norm1(x), shift1, scale1)
        q, k, v = self.heads(self.neighbours(h1, layout, past and past.to_attention), cos, sin)
        if past is not None:
            k, v = torch.cat((past.keys, k), 2), torch.cat((past.values, v), 2)
        if keep and at is not None and len(at) == 0 and not self.shift_tokens:
            return None, Past(k, v)
        x = self.add(x, self.attention(q, k, v, layout.sees, self.gates(h1)), gate1)

        h2 = modulate(self.norm2(x), shift2, scale2)
        x, h, gate2 = at_places(at, B, L, x, self.neighbours(h2, layout, past and past.to_mlp), gate2)
        x = self.add(x, self.mlp(h), gate2)
        return (x, self.kept(k, v, h1, h2, past)) if keep else x

    def matrices(self):
        """The matrices of the block, without that of the time conditioning."""
        return [layer.weight for layer in (self.qkv, self.attn_out, self.mlp_in, self.mlp_out)]

    def outputs(self):
        """The layers that make the block the identity if they are zero: its gates, or its two output layers."""
        return [self.attn_out, self.mlp_out] if self.modulation is None else [self.modulation]

    def flops(self, seen, predicted=1.0, attends=True):
        """Floating-point operations of a training step per token: those of attention, and 6 per weight (4 backward).

        seen: keys per token. predicted: the share of tokens that the MLP runs on. attends: False if only keys and
        values are needed; the queries are computed all the same, in one product with them."""
        qkv, attn_out, mlp_in, mlp_out = (weight.numel() for weight in self.matrices())
        attn_out += 0 if self.head_gate is None else self.head_gate.numel()
        return 6 * (qkv + attends * attn_out + predicted * (mlp_in + mlp_out)) + (
            12 * attends * seen * self.attn_out.out_features)


class DiT(nn.Module):
    """Denoiser over V = vocab_size tokens and, if the noise has masks, the mask (id V). It reads from configs.Config:

    clock: maps t to the input of the time embedding. Without it this is a plain pre-norm transformer.
    tied: the head's weights are the tokens' embeddings; else the head has its own weights, zero at first.
    head_bias, norm_bias: biases that other projects' networks have.
    block_size: a token sees its block and the blocks before (block diffusion); 0: all tokens. No weight depends on it.
    predict_next: the output at a token predicts the token on its right. The mask stands before the text, as in the
        autoregressive baseline, so that the first token is predicted, too.
    shift_tokens: see token_shift. With predict_next, and in the autoregressive baseline, it looks to the left only.
    """

    block = Block   # the class of the blocks
    own = ("head_gates",)  # settings of Config that no other network has
    of_source = ()  # settings that a run with --init_from takes from the checkpoint
    large = False   # a large language model: its weights may be in bfloat16, and no text goes on after its end token

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config)

    @classmethod
    def misfit(cls, config):
        """A message that says which settings of a Config this network does not allow, or None."""
        if config.n_embd % (2 * config.n_head):
            return f"n_embd={config.n_embd} must be an even multiple of n_head={config.n_head}"
        objective = config.objective_class
        if (config.predict_next or config.anneal_steps) and (
                objective.causal or config.block_size or objective.random_tokens):
            return "predict_next and anneal_steps are for masks in whole texts: use objective=mdlm, d3pm, sedd or bert"

    def __init__(self, vocab_size, config):
        super().__init__()
        objective, clock, D = config.objective_class, config.clock, config.n_embd
        self.vocab_size, self.seq_len, self.predict_next = vocab_size, config.seq_len, config.predict_next
        self.shift_tokens, self.causal, self.block_size = config.shift_tokens, objective.causal, config.block_size
        self.checkpoint_blocks, self.head_dim = config.checkpoint_blocks, D // config.n_head
        n_cond = config.n_cond if clock else 0
        self.embed = nn.Embedding(vocab_size + objective.has_mask, D)
        self.time_embed = TimeEmbedding(n_cond, clock) if n_cond else None
        self.blocks = nn.ModuleList(self.block(config, n_cond) for _ in range(config.n_layer))
        self.norm = LayerNorm(D, config.norm_bias)
        self.modulation = nn.Linear(n_cond, 2 * D) if n_cond else None
        self.head_weight = None if config.tied else nn.Parameter(torch.zeros(vocab_size, D))
        self.head_bias = nn.Parameter(torch.zeros(vocab_size)) if config.head_bias else None
        cos, sin = rotary_tables(config.seq_len + config.predict_next, self.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw matrices and embeddings from U(-1/sqrt(fan_in), 1/sqrt(fan_in)).

        Biases, modulations, and the output layers of blocks without a modulation are zero. So every block is the
        identity at the start, with adaLN-Zero (its gates are zero) and without (its outputs are zero).
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

    def layout(self, L, past=None, sees=None, beside_clean=False):
        """The Layout of L tokens after the past. Raises ValueError as forward does."""
        P, device = 0 if past is None else past[0].keys.shape[2], self.cos.device
        assert P + L <= self.seq_len + self.predict_next, f"{P + L} tokens, but the model was built for {self.seq_len}"
        if self.block_size:
            assert sees is None, "with blocks, what a token sees follows from them"
            # FlexAttention skips tiles of 128 x 128 pairs in which nothing is seen, and takes no heads smaller than 16.
            flex = device.type == "cuda" and L >= 128 and self.head_dim >= 16
            return (layout_beside_clean(L, self.block_size, device, flex) if beside_clean
                    else layout_of_blocks(L, P, self.block_size, device, flex))
        if P and self.shift_tokens and not self.causal:
            raise ValueError("shift_tokens mixes a token with both neighbours, so it allows a past only with blocks")
        if P and self.causal and sees is None:
            sees = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)
        return Layout(sees, P + torch.arange(L, device=device))

    def angles(self, positions):
        """cos and sin at positions (L,), as rotate() takes them; or None and None, if `embedded` adds the positions."""
        return self.cos[positions], self.sin[positions]

    def embedded(self, xt, positions):
        """The input of the blocks (B, L, D) float32."""
        return self.embed(xt).float()

    def trunk(self, xt, t, layout=None, at=None, past=None, keep=False):
        """Tokens -> the head's input, features (B, L, D) float32, or (N, D) at the places `at` (N,).

        past: a list with the Past of each block, or None. keep: return (features, such a list that includes these
        tokens). Without token shift the features are None if `at` is empty."""
        B, L = xt.shape
        layout = layout or self.layout(L, past)
        x = self.embedded(xt, layout.positions)
        cos, sin = self.angles(layout.positions)
        c = None if self.time_embed is None else self.time_embed(t)
        pasts = []
        for i, block in enumerate(self.blocks):
            inputs = (x, c, cos, sin, layout, at if block is self.blocks[-1] else None, past and past[i], keep)
            x = (checkpoint(block, *inputs, use_reentrant=False) if self.checkpoint_blocks and self.training
                 else block(*inputs))
            if keep:
                x, kept = x
                pasts.append(kept)
        if x is None:
            return None, pasts
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *at_places(at, B, L, *self.modulation(c).chunk(2, dim=-1)))
        return (x, pasts) if keep else x

    def head(self, x):
        """Features (..., D) -> logits (..., V). The mask is never predicted: its row of the embedding is left out."""
        weight = self.embed.weight[:self.vocab_size] if self.head_weight is None else self.head_weight
        return padded_linear(x, weight, self.head_bias, 64 if x.is_cuda and self.vocab_size >= 1000 else 1)

    def forward(self, xt, t, where=None, sees=None, past=None, clean=None, keep=False):
        """Map xt (B, L) long in [0, V], t (B,) or (B, L) in [0, 1], to logits (B, L, V).

        where: (B, L) bool, or the places (N,) long of its True elements, which saves a search on a GPU. Returns logits
            (N, V) at these places only, in their order. With a vocabulary of 50,000 the head is a third of the work,
            and nothing reads the logits at visible tokens.
        sees: as in Layout, but None with block_size. With predict_next it is of L + 1 tokens: the mask comes first.
        past: what remember() returned for the P tokens before these.
        clean: (B, L) long, with block_size: the text of which xt is the noisy version. Every block of xt sees the clean
            blocks before it, so one call scores all blocks.
        keep: return (logits, past) with the past for the tokens that follow, as remember() returns it.
        Raises ValueError with shift_tokens and a past, unless the network is causal or has blocks: the last token of
        the past would have channels of the first token after it.
        """
        at = places(where)
        if self.predict_next:  # the output before a token predicts it, and the last output predicts nothing
            at = at if at is None else at + at // xt.shape[1]  # each sequence before has one token more
            xt = F.pad(xt, (1, 0), value=self.vocab_size)
        if clean is not None and xt.shape[1] > self.block_size:
            # Not self.remember(): at its end FSDP would free the parameters, in the middle of this call.
            t0, nowhere = torch.zeros_like(t if t.dim() == 1 else t[:, 0]), xt.new_empty(0)
            past = self.trunk(clean, t0, self.layout(xt.shape[1]), at=nowhere, keep=True)[1]
            layout = self.layout(xt.shape[1], beside_clean=True)
        else:
            layout = self.layout(xt.shape[1], past, sees)
        x = self.trunk(xt, t, layout, at, past, keep)
        if keep:
            return self.head(x[0]), x[1]
        return self.head(x[:, :-1] if self.predict_next and where is None else x)

    def remember(self, xt, t, past=None):
        """Read tokens xt (B, L) after a past, and return the `past` for calls on the tokens that follow.

        It is a list with the Past of each block. One call on all tokens would compute the same, if these tokens see
        none of those that follow. The last block computes keys and values only (unless shift_tokens).
        """
        return self.trunk(xt, t, self.layout(xt.shape[1], past), at=xt.new_empty(0), past=past, keep=True)[1]

    def matrices(self):
        """The matrices of the blocks, without those of the time conditioning."""
        return [weight for block in self.blocks for weight in block.matrices()]

    def output_layer(self):
        """The parameters of the head, which are those of the embedding if it is tied."""
        weight = self.embed.weight if self.head_weight is None else self.head_weight
        return [weight] if self.head_bias is None else [weight, self.head_bias]

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token.

        predicted: the share of tokens that the head and the last MLP run on. Recomputed activations do not count (PaLM,
        arXiv 2204.02311, appendix B). Normalisation and time embedding do not count either. Without blocks of text,
        attention counts as if every token saw all tokens, even in a causal network (PaLM does so).
        """
        *others, last = self.blocks
        reads_clean = 0 < self.block_size < seq_len  # block diffusion; then tokens see half a text on average
        seen = (seq_len + self.block_size) / 2 if reads_clean else seq_len
        total = sum(block.flops(seen) for block in others) + last.flops(seen, predicted)
        if reads_clean:
            total += sum(block.flops(seen) for block in others) + last.flops(seen, 0, self.shift_tokens)
        return total + 6 * predicted * self.vocab_size * self.embed.embedding_dim
