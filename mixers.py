"""Networks that mix tokens by other means than attention (`--architecture=mixers --mixer=NAME`).

As in model.DiT, a block is attention and an MLP. Another mixer stands in the place of attention, and gMLP in the place
of both. With x (B, L, D) after the norm, heads h of d = D/heads channels, and learned matrices:

    name               tokens become                                      source
    attention          softmax(q k^T / sqrt d) v                          Transformer, 1706.03762; rotary positions
    mixer              W2_h gelu(W1_h x_h)                                MLP-Mixer, 2105.01601; here for each head
    gmlp               O (u * (W_h norm(v) + b)), [u, v] = gelu(U x)      gMLP, 2105.08050
    amlp               gmlp, with one small attention head in the gate    the same
    synth_random       softmax(R_h) v                                     Synthesizer, 2005.00743
    synth_factorised   softmax(A_h B_h^T) v                               the same
    synth_dense        softmax(Q_h relu(P_h x_h)) v                       the same; here for each head
    container          (a_h softmax(q k^T / sqrt d) + b_h S_h) v          CONTAINER, 2106.01401
    container_conv     as container, S a convolution over 5 tokens        the same, as its authors' code has it

One head (`--n_head=1`) gives the single-head form of each. In mixer, gmlp, amlp, synth_random and container W1, W2, W,
R and S are static maps, (L, L) for each head: they weigh positions, not contents. A map has a number for each pair of
positions (static_map=full), or for each distance (toeplitz). L is the length of the training texts. A shorter text of
n tokens uses the first n rows and columns.

mask_aware: where tokens are mixed without attention, masked tokens are left out. A static map scales the others up by
n/(their number). In a softmax the weights of the others sum to 1. A convolution does not scale them. If all tokens are
masked, the sum over tokens is 0.
"""

import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attend
from model import DiT, LayerNorm, at_places, modulate, places, rotary_tables, rotate, token_shift

TINY = 64   # width of the attention head in amlp's gate
RANK = 8    # of A and B of synth_factorised
TAPS = 5    # tokens of container_conv's convolution


# ---- static maps -----------------------------------------------------------------------------------------------------


class Map(nn.Module):
    """A static map: for each head a matrix (n, n), by which a text of n <= L tokens is multiplied."""

    def __init__(self, n_head, L, kind, init):
        super().__init__()
        self.L, self.kind, self.init = L, kind, init
        self.weight = nn.Parameter(torch.empty(n_head, L, L) if kind == "full" else torch.empty(n_head, 2 * L - 1))

    @torch.no_grad()
    def init_weights(self):
        """Draw the weights. init: 'orthogonal', or a standard deviation such as '0.004', or '0.02/L' (divided by L)."""
        if self.init == "orthogonal":
            for matrix in self.weight:
                nn.init.orthogonal_(matrix)
        else:
            self.weight.normal_(std=std_of(self.init, self.L))

    def forward(self, n):
        """The matrices of a text of n tokens: (heads, n, n). Row i says what the token at position i gets."""
        if self.kind == "full":
            return self.weight[:, :n, :n]
        i = torch.arange(n, device=self.weight.device)
        return self.weight[:, i[:, None] - i + self.L - 1]  # entry (i, j) is the number of distance i - j


def std_of(init, L):
    """The standard deviation that '0.004' or '0.02/L' means; None for 'orthogonal'. Raises ValueError otherwise."""
    if init == "orthogonal":
        return None
    number, slash, letter = init.partition("/")
    if (slash, letter) not in (("", ""), ("/", "L")) or not 0 <= float(number) < math.inf:
        raise ValueError(init)
    return float(number) / (L if slash else 1)


def split_heads(x, n_head):
    """(B, L, D) -> (B, heads, L, D/heads)."""
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)


def join_heads(x):
    return x.transpose(1, 2).flatten(2)


def without_masks(x, known):
    """Set the masked tokens of x (B, heads, L, d) to 0, and scale the others up. known=None: return x."""
    if known is None:
        return x
    share = known.float().mean(1).clamp(min=1 / known.shape[1])
    return x * (known / share[:, None])[:, None, :, None].to(x.dtype)


def average(weights, v, known):
    """softmax(weights) v without masked tokens: weights (..., heads, L, L), v (B, heads, L, d) -> (B, heads, L, d)."""
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if known is None:
        return weights.softmax(-1).to(v.dtype) @ v
    any_known = known.any(1)  # a text of masks keeps all its tokens: a softmax over nothing would have nan as gradient
    counted = known | ~any_known[:, None]
    weights = weights.masked_fill(~counted[:, None, None], -torch.inf).softmax(-1)
    return (weights * any_known[:, None, None, None]).to(v.dtype) @ v  # 0 for a text of masks


# ---- layers: x (B, L, D), known (B, L) or None -> (B, L, D) ----------------------------------------------------------
#
# known: True for tokens that are not masked; None without mask_aware. mixing(L, D) counts the multiplications per token
# that no nn.Linear does.


class Attention(nn.Module):
    def __init__(self, D, n_head, L, kind, init):
        super().__init__()
        self.n_head = n_head
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        for name, table in zip(("cos", "sin"), rotary_tables(L, D // n_head)):
            self.register_buffer(name, table, persistent=False)

    def queries(self, x):
        """Queries, keys and values (B, heads, L, d)."""
        q, k, v = (split_heads(part, self.n_head) for part in self.qkv(x).chunk(3, -1))
        cos, sin = self.cos[:x.shape[1]], self.sin[:x.shape[1]]
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x, known):
        return self.out(join_heads(attend(*self.queries(x), None, False)))

    def mixing(self, L, D):
        """Multiplications per token in q k^T (L D), and in the weighted sum of v (L D)."""
        return 2 * L * D


class Mixer(nn.Module):
    def __init__(self, D, n_head, L, kind, init):
        super().__init__()
        self.n_head = n_head
        self.inner, self.out = (Map(n_head, L, kind, init or f"{L ** -0.5}") for _ in range(2))

    def forward(self, x, known):
        n, x = x.shape[1], without_masks(split_heads(x, self.n_head), known)
        h = F.gelu(self.inner(n).to(x.dtype) @ x, approximate="tanh")
        return join_heads(self.out(n).to(x.dtype) @ h)

    def mixing(self, L, D):
        return 2 * L * D


class Synthesizer(nn.Module):
    """softmax(weights) v. The weights are a table (random), a product of two thin tables (factorised), or a function of
    the token (dense)."""

    def __init__(self, D, n_head, L, kind, init, form):
        super().__init__()
        self.n_head, self.form, d = n_head, form, D // n_head
        self.value, self.out = nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)
        if form == "random":
            self.map = Map(n_head, L, kind, init or "0.02")
        elif form == "factorised":
            self.rows, self.columns = (nn.Parameter(torch.randn(n_head, L, RANK) * RANK ** -0.5) for _ in range(2))
        else:
            self.inner, self.outer = (nn.Parameter(torch.randn(n_head, d, n) * d ** -0.5) for n in (d, L))

    def forward(self, x, known):
        n = x.shape[1]
        if self.form == "random":
            weights = self.map(n)
        elif self.form == "factorised":
            weights = self.rows[:, :n] @ self.columns[:, :n].mT
        else:
            h = split_heads(x, self.n_head)
            weights = F.relu(h @ self.inner.to(h.dtype)) @ self.outer[..., :n].to(h.dtype)
        return self.out(join_heads(average(weights, split_heads(self.value(x), self.n_head), known)))

    def mixing(self, L, D):
        return 2 * L * D + D * D // self.n_head if self.form == "dense" else L * D


class Container(Attention):
    """The sum of attention and a static map of the values, each times a learned number per head, 1 at first."""

    def __init__(self, D, n_head, L, kind, init):
        super().__init__(D, n_head, L, kind, init)
        self.map = Map(n_head, L, kind, init or "0.02/L")
        self.dynamic, self.static = (nn.Parameter(torch.ones(n_head)) for _ in range(2))

    def forward(self, x, known):
        q, k, v = self.queries(x)
        a, b = self.dynamic[:, None, None].to(v.dtype), self.static[:, None, None].to(v.dtype)
        static = self.map(x.shape[1]).to(v.dtype) @ without_masks(v, known)
        return self.out(join_heads(a * attend(q, k, v, None, False) + b * static))

    def mixing(self, L, D):
        return 3 * L * D


class ContainerConv(Attention):
    """(1 - s) attention + s (depthwise convolution of the values), with s = sigmoid(w) per head and w = 0 at first."""

    def __init__(self, D, n_head, L, kind, init):
        super().__init__(D, n_head, L, kind, init)
        self.taps = nn.Parameter(torch.randn(D, 1, TAPS) * TAPS ** -0.5)
        self.share = nn.Parameter(torch.zeros(n_head))

    def forward(self, x, known):
        q, k, v = self.queries(x)
        share = self.share.sigmoid()[:, None, None].to(v.dtype)
        kept = v if known is None else v * known[:, None, :, None].to(v.dtype)
        local = F.conv1d(join_heads(kept).mT, self.taps.to(v.dtype), padding=TAPS // 2, groups=x.shape[-1]).mT
        y = (1 - share) * attend(q, k, v, None, False) + share * split_heads(local, self.n_head)
        return self.out(join_heads(y))

    def mixing(self, L, D):
        return 2 * L * D + TAPS * D


class MLP(nn.Module):
    """The MLP of a block: it mixes channels, and no tokens."""

    def __init__(self, D):
        super().__init__()
        self.inner, self.out = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x, known, at=None):
        x, = at_places(at, *x.shape[:2], x)
        return self.out(F.gelu(self.inner(x), approximate="tanh"))

    def mixing(self, L, D):
        return 0


class GMLP(nn.Module):
    """gMLP's layer, which mixes channels and tokens. Its width is 6 D: u and v have 3 D channels each."""

    def __init__(self, D, n_head, L, kind, init, gate_bias, tiny=False):
        super().__init__()
        self.n_head, width = n_head, 3 * D
        self.inner, self.out = nn.Linear(D, 2 * width), nn.Linear(width, D)
        self.norm, self.map = LayerNorm(width, bias=True), Map(n_head, L, kind, init or f"{1e-3 / 3 ** 0.5}/L")
        self.bias = nn.Parameter(torch.full((n_head * L,), float(gate_bias)))  # a vector has no weight decay
        self.tiny = nn.Linear(D, 3 * TINY, bias=False) if tiny else None
        self.tiny_out = nn.Linear(TINY, width, bias=False) if tiny else None

    def forward(self, x, known, at=None):
        B, n = x.shape[:2]
        u, v = F.gelu(self.inner(x), approximate="tanh").chunk(2, -1)
        v = without_masks(split_heads(self.norm(v).to(u.dtype), self.n_head), known)
        bias = self.bias.view(self.n_head, -1, 1)[:, :n].to(u.dtype)
        gate = join_heads(self.map(n).to(u.dtype) @ v + bias)
        if self.tiny is not None:
            q, k, values = (part[:, None] for part in self.tiny(x).chunk(3, -1))
            gate = gate + self.tiny_out(attend(q, k, values, None, False)[:, 0])
        return self.out(*at_places(at, B, n, u * gate))

    def mixing(self, L, D):
        return 3 * L * D + 2 * L * TINY * (self.tiny is not None)


# {name: the class of the layer that mixes tokens}
MIXERS = {"attention": Attention, "mixer": Mixer, "gmlp": GMLP, "amlp": functools.partial(GMLP, tiny=True),
          "synth_random": functools.partial(Synthesizer, form="random"),
          "synth_factorised": functools.partial(Synthesizer, form="factorised"),
          "synth_dense": functools.partial(Synthesizer, form="dense"), "container": Container,
          "container_conv": ContainerConv}


def layers(config):
    """The layers of a block with the mixer that config names."""
    make = functools.partial(MIXERS[config.mixer], config.n_embd, config.n_head, config.seq_len, config.static_map,
                             config.map_init)
    return [make(gate_bias=config.gate_bias)] if config.mixer in ("gmlp", "amlp") else [make(), MLP(config.n_embd)]


MAPPED = ("mixer", "gmlp", "amlp", "synth_random", "container")  # these have static maps
RESIDUALS = ("zero", "rezero", "plain")


# ---- the network -----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Compute x + gate * layer(norm(x)). With time conditioning, the time shifts and scales the input of the layer.

    zero: the branch is zero at first. With time conditioning the gate depends on the time (adaLN-Zero, arXiv
        2212.09748), and is 0 at first. Without, the weights of the layer's output are 0 at first.
    rezero: the gate is one learned number, 0 at first (ReZero, arXiv 2003.04887).
    plain: there is no gate.
    """

    def __init__(self, layer, config, n_cond):
        super().__init__()
        D, self.layer, self.residual = config.n_embd, layer, config.residual
        self.dropout, self.shift_tokens = config.dropout, config.shift_tokens
        self.norm = LayerNorm(D, config.norm_bias)
        self.modulation = nn.Linear(n_cond, (3 if self.residual == "zero" else 2) * D) if n_cond else None
        self.gate = nn.Parameter(torch.zeros(())) if self.residual == "rezero" else None

    @torch.no_grad()
    def init_weights(self):
        for part in self.layer.modules():
            if isinstance(part, nn.Linear):
                bound = part.in_features ** -0.5
                part.weight.uniform_(-bound, bound)
                if part.bias is not None:
                    part.bias.zero_()
            elif isinstance(part, Map):
                part.init_weights()
        if self.modulation is not None:
            self.modulation.weight.zero_()
            self.modulation.bias.zero_()
        elif self.residual == "zero":
            self.layer.out.weight.zero_()

    def forward(self, x, c, known, at):
        B, L, D = x.shape
        shift, scale, *gates = (None, None) if self.modulation is None else self.modulation(c).split(D, -1)
        h = modulate(self.norm(x), shift, scale)
        h = token_shift(h) if self.shift_tokens else h
        y = self.layer(h, known) if at is None else self.layer(h, known, at)
        y = F.dropout(y, self.dropout, self.training)
        x, *gates = at_places(at, B, L, x, *gates)
        gate = gates[0] if gates else self.gate
        return x + (y if gate is None else gate * y)


class MixerBlock(nn.ModuleList):
    """The branches of a block, one after the other."""

    def __init__(self, config, n_cond):
        super().__init__(Residual(layer, config, n_cond) for layer in layers(config))

    def forward(self, x, c, known, at=None):
        for branch in self:
            x = branch(x, c, known, at if branch is self[-1] else None)
        return x

    def outputs(self):
        """No layers: Residual.init_weights makes the block the identity."""
        return []


class MixerDiT(DiT):
    """model.DiT with another mixer of tokens in its blocks. It has no past, no block diffusion and no causal mode."""

    block = MixerBlock
    own = ("mixer", "residual", "static_map", "map_init", "mask_aware", "gate_bias")

    @classmethod
    def misfit(cls, config):
        objective = config.objective_class
        if objective.causal or config.block_size or config.predict_next or config.anneal_steps or config.fsdp:
            return ("architecture=mixers reads whole texts and cannot be split: it takes no objective=ar or block, "
                    "predict_next, anneal_steps or --fsdp")
        if config.mask_aware and not (objective.has_mask and config.mixer != "attention"):
            return "mask_aware is for noise=mask and mixers other than attention: leave it out"
        if config.static_map != "full" and config.mixer not in MAPPED:
            return f"static_map=toeplitz is for mixer={', '.join(MAPPED)}, which have static maps"
        if config.map_init and config.mixer not in MAPPED:
            return f"map_init is for mixer={', '.join(MAPPED)}, which have static maps"
        if config.map_init == "orthogonal" and config.static_map != "full":
            return "map_init=orthogonal is for static_map=full: a Toeplitz map is not orthogonal"
        if config.gate_bias != 1 and config.mixer not in ("gmlp", "amlp"):
            return "gate_bias is for mixer=gmlp and amlp: leave it out"
        try:
            std_of(config.map_init or "0", 1)
        except ValueError:
            return f"map_init={config.map_init!r} is not valid: use orthogonal, or a number as in 0.004 or 0.02/L"
        return super().misfit(config)

    def __init__(self, vocab_size, config):
        super().__init__(vocab_size, config)
        self.mask_aware = config.mask_aware

    def init_weights(self):
        super().init_weights()
        for block in self.blocks:
            for branch in block:
                branch.init_weights()

    def trunk(self, xt, t, at=None):
        """Tokens -> the head's input, features (B, L, D) float32, or (N, D) at the places `at` (N,)."""
        (B, L), x = xt.shape, self.embed(xt).float()
        assert L <= self.seq_len, f"{L} tokens, but the model was built for {self.seq_len}"
        c = None if self.time_embed is None else self.time_embed(t)
        known = xt != self.vocab_size if self.mask_aware else None
        for block in self.blocks:
            inputs = (x, c, known, at if block is self.blocks[-1] else None)
            x = (checkpoint(block, *inputs, use_reentrant=False) if self.checkpoint_blocks and self.training
                 else block(*inputs))
        x = self.norm(x)
        if self.modulation is not None:
            x = modulate(x, *at_places(at, B, L, *self.modulation(c).chunk(2, dim=-1)))
        return x

    def forward(self, xt, t, where=None):
        """Map xt (B, L) long in [0, V], t (B,) in (0, 1], to logits (B, L, V), or (N, V) at `where`.

        where: (B, L) bool, or places (N,), as in DiT.forward."""
        return self.head(self.trunk(xt, t, places(where)))

    def matrices(self):
        """The two-dimensional weights of the layers; static maps, which are one matrix for each head, are left out."""
        return [part.weight for block in self.blocks for branch in block for part in branch.layer.modules()
                if isinstance(part, nn.Linear)]

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token, counted as DiT.flops does."""
        total = 6 * predicted * self.vocab_size * self.embed.embedding_dim
        for block in self.blocks:
            for branch in block:
                last = block is self.blocks[-1] and branch is block[-1]
                for part in branch.layer.modules():
                    if isinstance(part, nn.Linear):
                        fewer = last and (isinstance(branch.layer, MLP) or part is branch.layer.out)
                        total += 6 * (predicted if fewer else 1) * part.weight.numel()
                total += 6 * branch.layer.mixing(seq_len, self.embed.embedding_dim)
        return total
