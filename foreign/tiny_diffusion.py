"""The network of tiny-diffusion (github.com/nathan-barry/tiny-diffusion), to train it or to use its checkpoints.

It is a nanochat-style transformer, not the DiT of model.py, but is called in the same way. The time is a learned
vector per step, added once to the tokens. RMSNorm has no parameters and is also applied to q and k. The MLP has relu^2.
There are no biases, and the output layer is not tied to the embedding.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import places, rotary_tables, rotate


def norm(x):
    """RMSNorm over the channels without parameters, in float32, with the eps of F.rms_norm."""
    return F.rms_norm(x.float(), x.shape[-1:])


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.q, self.k, self.v, self.attn_out = (nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))
        self.mlp_in = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.mlp_out = nn.Linear(4 * n_embd, n_embd, bias=False)

    def attention(self, x, cos, sin):
        B, L, D = x.shape
        # (B, heads, L, D/heads) each
        q, k, v = (project(x).view(B, L, self.n_head, -1).transpose(1, 2) for project in (self.q, self.k, self.v))
        q, k = (norm(rotate(x, cos, sin)).to(v.dtype) for x in (q, k))
        return self.attn_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, D))

    def forward(self, x, cos, sin):
        x = x + self.attention(norm(x), cos, sin)
        return x + self.mlp_out(F.relu(self.mlp_in(norm(x))).square())


class TinyDiffusion(nn.Module):
    """Denoiser over V = vocab_size tokens and the mask (id V). It is told the step round(t T) of T."""

    own, of_source, large = (), (), False

    @classmethod
    def from_config(cls, config, vocab_size):
        return cls(vocab_size, config)

    @classmethod
    def misfit(cls, config):
        """Say which settings of a Config this network does not support, in words; None if it supports all."""
        objective = config.objective_class
        if config.n_embd % (2 * config.n_head):
            return f"n_embd={config.n_embd} must be an even multiple of n_head={config.n_head}"
        if (config.conditioning != "step" or objective.random_tokens or objective.causal or config.block_size
                or config.dropout or not config.tied or config.head_bias or config.norm_bias or config.shift_tokens
                or config.checkpoint_blocks or config.predict_next or config.anneal_steps):
            return ("architecture=tiny_diffusion needs conditioning=step, noise=mask, dropout=0, an objective other "
                    "than ar and block, and the defaults of tied, head_bias, norm_bias, shift_tokens, predict_next, "
                    "anneal_steps and checkpoint_blocks")

    def __init__(self, vocab_size, config):
        super().__init__()
        self.vocab_size, self.seq_len, D = vocab_size, config.seq_len, config.n_embd
        self.embed = nn.Embedding(vocab_size + 1, D)
        self.time_embed = nn.Embedding(config.T, D)  # row s - 1 is step s; step 1 has the fewest masks
        self.blocks = nn.ModuleList(Block(D, config.n_head) for _ in range(config.n_layer))
        self.head = nn.Linear(D, vocab_size, bias=False)
        cos, sin = rotary_tables(config.seq_len, D // config.n_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw embeddings from N(0, 1), matrices with std = min(1, sqrt(fan_out/fan_in))/sqrt(fan_in); zero outputs."""
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_()
            elif isinstance(module, nn.Linear):
                fan_out, fan_in = module.weight.shape
                module.weight.normal_(std=min(1, (fan_out / fan_in)**0.5) * fan_in**-0.5)
        for last in (self.head, *(layer for block in self.blocks for layer in (block.attn_out, block.mlp_out))):
            last.weight.zero_()

    def trunk(self, xt, t):
        """Map tokens xt (B, L) at times t (B,) to features (B, L, D) in float32, the input of the head."""
        L = xt.shape[1]
        assert L <= self.seq_len, f"{L} tokens, but the model was built for {self.seq_len}"
        T = self.time_embed.num_embeddings
        step = (t.float() * T).round().long().clamp(1, T)
        x = norm(self.embed(xt) + self.time_embed(step - 1)[:, None])
        for block in self.blocks:
            x = block(x, self.cos[:L], self.sin[:L])
        return norm(x)

    def forward(self, xt, t, where=None):
        """Map xt (B, L) long in [0, V], t (B,) in (0, 1], to logits (B, L, V), or (N, V) at `where`.

        where: (B, L) bool, or places (N,), as in DiT.forward."""
        x = self.trunk(xt, t)
        return self.head(x if where is None else x.flatten(0, 1)[places(where)])

    def output_layer(self):
        return list(self.head.parameters())

    def matrices(self):
        return list(self.blocks.parameters())

    def flops(self, seq_len, predicted=1.0):
        """Floating-point operations of a training step per token, counted as DiT.flops does."""
        weights = sum(p.numel() for p in self.blocks.parameters()) + predicted * self.head.weight.numel()
        return 6 * weights + 12 * len(self.blocks) * seq_len * self.head.in_features


# ---- its checkpoints -----------------------------------------------------------------------------------------------


def swap_halves(weight, n_head):
    """Exchange the two halves of each head's channels, which are rows of weight (D, D).

    tiny-diffusion rotates q and k in the opposite direction: (x1 cos + x2 sin, x2 cos - x1 sin). This is model.rotate
    of (x2, x1) with its halves exchanged. RMSNorm and the products of q and k do not depend on the order of channels.
    """
    return weight.unflatten(0, (n_head, 2, -1)).flip(1).flatten(0, 2)


def our_weights(state, n_head):
    """Turn a state dict in our names but tiny-diffusion's conventions into our conventions.

    Its tokens are ASCII codes, and 0 is the mask. Our ids are 0 ... 126 for codes 1 ... 127, then the mask. Its head
    can predict the mask; ours cannot. Weights of a wrong shape stay as they are, and checkpoint.check_fit names them.
    """
    state = dict(state)
    D = state["embed.weight"].shape[-1]
    for key, weight in state.items():
        if key.endswith((".q.weight", ".k.weight")) and weight.shape == (D, D):
            state[key] = swap_halves(weight, n_head)
    state["embed.weight"] = state["embed.weight"].roll(-1, 0)
    state["head.weight"] = state["head.weight"][1:]
    return state
