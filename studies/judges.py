"""Judges of samples: language models that predict from left to right, and what they say of texts.

The perplexity of samples says how likely each of them is to a judge. MAUVE compares the distribution of all of them
with that of real text, in the features of a judge.
"""

import math
import sys

import torch
import torch.nn.functional as F

from checkpoint import load_model
from cli import UserError, autocast, first_line, progress, require, without_stderr
from data.tokenizer import END, make_tokenizer
from diffusion import AutoRegressive, cross_entropy


def ids_of(text, tokenizer):
    """The ids of a text that a tokenizer has decoded, a list: end-of-text becomes its own token again."""
    return getattr(tokenizer, "encode_decoded", tokenizer.encode)(text).tolist()


class Judge:
    """An autoregressive checkpoint as a judge. `judged` cuts texts longer than its window into independent pieces."""

    def __init__(self, path, device, dtype):
        self.model, config, meta, _ = load_model(path, device)
        if config.objective != "ar":
            raise UserError(f"{path} cannot be a judge: its objective is {config.objective}, and a judge needs ar "
                            "(`python train.py ar_...`)")
        if config.prefix_range[0]:
            raise UserError(f"{path} cannot be a judge: it needs a prefix ({config.prefix}), and a judge scores whole "
                            "texts")
        self.objective, self.length = AutoRegressive(meta["vocab_size"]), config.seq_len
        self.name, self.meta, self.tokenizer, self.device, self.dtype = path, meta, make_tokenizer(meta), device, dtype

    def encode(self, text):
        return ids_of(text, self.tokenizer)

    def cross_entropies(self, x0):
        """x0 (B, L), L at most self.length -> (B, L) nats."""
        everywhere = torch.ones_like(x0, dtype=torch.bool)
        with autocast(self.device, self.dtype):
            logits = self.model(self.objective.corrupt(x0, everywhere), torch.ones(len(x0), device=self.device))
        return cross_entropy(logits, x0)

    def features(self, x0):
        """x0 (B, L), L less than self.length -> (B, L + 1, D): what the head sees after 0, 1, ... L tokens."""
        seen = F.pad(x0, (1, 0), value=self.objective.mask_id)
        with autocast(self.device, self.dtype):
            return self.model.trunk(seen, torch.ones(len(x0), device=self.device))


class TransformersJudge:
    """A causal language model of Hugging Face's transformers, such as GPT-2. A start token is put before each text."""

    def __init__(self, name, device, dtype):
        require("transformers", f"--judge hf://{name}")
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
        except Exception as error:  # of transformers, of safetensors, or of a file that is none of theirs
            raise UserError(f"hf://{name} cannot be loaded as a causal language model: {first_line(error)}")
        if report["missing_keys"]:
            raise UserError(f"hf://{name} lacks weights of {type(model).__name__}: "
                            f"{', '.join(sorted(report['missing_keys'])[:3])}")
        self.model, config = model.to(device).eval(), model.config
        self.length = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", 1024)
        self.length -= 1  # for the start token
        start = self.tokenizer.bos_token_id
        if start is None:
            start = self.tokenizer.eos_token_id
        if start is None:
            raise UserError(f"hf://{name} has no start token: choose another judge")
        self.name, self.meta, self.start, self.device, self.dtype = f"hf://{name}", None, start, device, dtype
        with torch.no_grad():  # BERT and its kin are loaded, too, and see the tokens that they predict
            one, two = (self.cross_entropies(torch.tensor([[start, last, start]], device=device))[0, 0]
                        for last in (0, 1))
        if abs(one - two) > 1e-4:
            raise UserError(f"hf://{name} sees the text on the right of a token, so it cannot be a judge: choose a "
                            "causal language model")

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def cross_entropies(self, x0):
        """x0 (B, L), L at most self.length -> (B, L) nats."""
        seen = F.pad(x0, (1, 0), value=self.start)
        with autocast(self.device, self.dtype):
            logits = self.model(input_ids=seen[:, :-1]).logits
        return cross_entropy(logits, x0)

    def features(self, x0):
        """Return features (B, L + 1, D) of x0 (B, L), as Judge.features does."""
        with autocast(self.device, self.dtype):
            return self.model.base_model(input_ids=F.pad(x0, (1, 0), value=self.start))[0]


def open_judge(name, device, dtype):
    """Open hf://NAME, hf://FOLDER or an autoregressive checkpoint of ours. Raises UserError if it is none of them."""
    if name.startswith("hf://"):
        return TransformersJudge(name.removeprefix("hf://"), device, dtype)
    return Judge(name, device, dtype)


def padded(texts, device):
    """Lists of ids as one tensor (B, L). Judges are causal, so the padding on the right changes nothing."""
    longest = max(map(len, texts))
    return torch.tensor([ids + [0] * (longest - len(ids)) for ids in texts], dtype=torch.long, device=device)


@torch.no_grad()
def judged(judge, texts, batch_size=16):
    """Return perplexity and bits per token (the judge's tokens) and per character, with standard errors over texts.

    Perplexity is exp of the mean cross-entropy, in nats, over all tokens of all texts. Raises UserError if all texts
    are empty, or a likelihood is not finite.
    """
    pieces = [(i, ids[j:j + judge.length]) for i, ids in enumerate(map(judge.encode, texts))
              for j in range(0, len(ids), judge.length)]
    nats = torch.zeros(len(texts), dtype=torch.float64)
    tokens = torch.zeros(len(texts), dtype=torch.float64)
    for start in progress(range(0, len(pieces), batch_size), desc="judging", leave=False):
        batch = pieces[start:start + batch_size]
        ce = judge.cross_entropies(padded([ids for _, ids in batch], judge.device)).cpu().double()
        for (i, ids), row in zip(batch, ce):
            nats[i] += row[:len(ids)].sum()
            tokens[i] += len(ids)
    if not tokens.sum():
        raise UserError("all samples are empty: there is nothing to judge")
    if not nats.isfinite().all():
        raise UserError(f"the likelihood of the judge {judge.name} is not finite: its weights are damaged")
    characters = torch.tensor([len(text.replace(END, "")) for text in texts], dtype=torch.float64)
    per_token, per_character = nats.sum() / tokens.sum() / math.log(2), nats.sum() / characters.sum() / math.log(2)

    def error(sizes, mean):  # standard error of a ratio of means
        residual = (nats / math.log(2) - mean * sizes) / sizes.mean()
        return (residual.std() / math.sqrt(len(texts))).item() if len(texts) > 1 else None

    return {"judge": judge.name, "judge_perplexity": 2 ** per_token.item(), "judge_bits_per_token": per_token.item(),
            "judge_stderr": error(tokens, per_token), "judge_bits_per_char": per_character.item(),
            "judge_stderr_per_char": error(characters, per_character)}


# ---- MAUVE -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(judge, texts, batch_size=16):
    """The features that a judge has after the last token of each text, (n, D) float32. A text that does not fit its
    window is cut."""
    found, ids = [], [judge.encode(text)[:judge.length - 1] for text in texts]
    for start in progress(range(0, len(ids), batch_size), desc="features", leave=False):
        batch = ids[start:start + batch_size]
        x = judge.features(padded(batch, judge.device))
        found.append(x[torch.arange(len(batch)), [len(text) for text in batch]].float().cpu())
    return torch.cat(found).numpy()


def mauve(p, q):
    """MAUVE (arXiv 2102.01454) of the features p of samples and q of real text, (n, D) each: 1 if the two are
    distributed alike, near 0 if they have nothing in common.

    k-means puts the features of both into n/10 clusters. Let P be the shares of the samples in the clusters, Q those of
    real text, and R = w P + (1 - w) Q. MAUVE is the area under the curve of the points

        (exp(-5 KL(Q || R)), exp(-5 KL(P || R))),   0 < w < 1.
    """
    from mauve import compute_mauve
    with without_stderr():  # faiss, which finds the clusters, asks for larger ones than the authors'
        return float(compute_mauve(p_features=p, q_features=q, verbose=False).mauve)
