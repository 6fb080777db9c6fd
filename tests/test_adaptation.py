"""Networks of other training become diffusion models: BERT's kin, GPT-2, nanoGPT, and our left-to-right models."""

import copy
import functools
import json
import math

import numpy as np
import pytest
import torch

import checkpoint
import storage
from attention import annealed
from commands import SMALL, assert_identical, assert_one_line, stop_after, train
from configs import Config, replace
from data.tokenizer import HubTokenizer, definition_of, hub_meta, make_tokenizer
from diffusion import BERT, Noise, cross_entropy
from foreign.files import read_files
from likelihood import chain_rule
from randomness import uniforms

CPU = torch.device("cpu")
TEXT = "the cat sat on the mat, and the dog's log was d\u00e9j\u00e0 vu \u2603 again. " * 20
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=40)


# ---- tiny models, as transformers saves them -------------------------------------------------------------------------


def byte_level(special, n=290):
    """A byte-level BPE with these special tokens, as RoBERTa and ModernBERT have it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    found = Tokenizer(models.BPE())
    found.pre_tokenizer, found.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=n, special_tokens=special, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False))
    return found


def word_pieces():
    """A WordPiece tokenizer, as BERT has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    found = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    found.decoder = decoders.WordPiece()
    found.train_from_iterator([TEXT.replace("\u2603", "")], trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False))
    found.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return found


def make(kind):
    """A tiny model of transformers with random weights, and its tokenizer."""
    import transformers as hf
    from tokenizers import processors
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.manual_seed(0)
    if kind == "roberta":
        tokens = byte_level(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
        tokens.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        names = dict(bos_token="<s>", cls_token="<s>", sep_token="</s>", eos_token="</s>", pad_token="<pad>",
                     unk_token="<unk>", mask_token="<mask>")
        model = hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=tokens.get_vocab_size(), **SIZES))
    elif kind == "modernbert":
        tokens = byte_level(["<|padding|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"])
        tokens.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        model = hf.ModernBertForMaskedLM(hf.ModernBertConfig(  # with rows that no token has, as the published one
            vocab_size=tokens.get_vocab_size() + 6, pad_token_id=4, bos_token_id=2, eos_token_id=3, cls_token_id=2,
            sep_token_id=3, global_attn_every_n_layers=2, local_attention=8, **SIZES | {"num_hidden_layers": 3}))
    else:
        tokens = word_pieces()
        n = tokens.get_vocab_size()
        model = (hf.BertForMaskedLM(hf.BertConfig(vocab_size=n, **SIZES)) if kind == "bert" else
                 hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=n, dim=32, n_layers=2, n_heads=2,
                                                              hidden_dim=64, max_position_embeddings=40)))
    if kind != "roberta":
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # so that logits differ visibly
    return model.eval(), hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **names)


KINDS = ("roberta", "bert", "modernbert", "distilbert")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function: kind -> (folder, model, tokenizer), saved once."""
    pytest.importorskip("transformers")

    @functools.cache
    def get(kind):
        folder = tmp_path_factory.mktemp(kind) / kind
        model, tokenizer = make(kind)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder, model, tokenizer
    return get


@torch.no_grad()
def their_logits(model, tokenizer, xt, where, ours):
    """The logits (N, V) of the original model, called as its authors do, at masked positions of our tokens xt (B, L)."""
    ids = [[tokenizer.mask_token_id if i == ours.vocab_size else ours.ids[i] for i in row] for row in xt.tolist()]
    framed = [tokenizer("a")["input_ids"] for _ in ids]
    before, after = framed[0][:1], framed[0][-1:]
    found = model(input_ids=torch.tensor([[*before, *row, *after] for row in ids])).logits[:, 1:-1]
    return found[where][:, ours.ids]


@pytest.mark.parametrize("kind", KINDS)
def test_logits(saved, kind):
    """The network computes what the original does, at some positions and at all, with texts of any length."""
    folder, model, tokenizer = saved(kind)
    loaded, config, meta, _ = checkpoint.load_model(folder, CPU)
    ours = make_tokenizer(meta)
    assert config.architecture == "masked_lm" and config.seq_len == 40 - 2 - (2 if kind == "roberta" else 0)
    for L in (config.seq_len, 7):
        xt = torch.randint(ours.vocab_size, (3, L), generator=torch.Generator().manual_seed(L))
        where = torch.rand(3, L, generator=torch.Generator().manual_seed(1)) < 0.4
        xt[where] = ours.vocab_size
        expected = their_logits(model, tokenizer, xt, where, ours)
        assert expected.std() > 0.1
        with torch.no_grad():
            torch.testing.assert_close(loaded(xt, torch.ones(3), where), expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(loaded(xt, torch.ones(3))[where], expected, atol=1e-5, rtol=1e-5)


def test_special_tokens_are_no_output(saved):
    for kind in KINDS:
        folder, _, tokenizer = saved(kind)
        _, _, meta, _ = checkpoint.load_model(folder, CPU)
        ours, special = make_tokenizer(meta), set(tokenizer.all_special_ids)
        if kind in ("bert", "distilbert"):  # these make [UNK] of characters that they do not know
            special.remove(tokenizer.unk_token_id)
        if kind == "modernbert":
            special.add(0)  # <|padding|>
        assert sorted(special) == ours.left_out and meta["vocab_size"] == len(ours.ids)
        assert sorted({*ours.ids, *special}) == list(range(len(tokenizer)))
        text = "the cat [MASK] <s> </s> [SEP] sat"  # plain text, whatever it looks like
        assert max(ours.encode(text)) < ours.vocab_size
        ids = [ours.ids[i] for i in ours.encode(TEXT)]
        assert ids == tokenizer(TEXT, add_special_tokens=False)["input_ids"]
        chars, sizes = ours.lengths()
        encoded = ours.encode(TEXT)
        if kind in ("roberta", "modernbert"):
            assert ours.decode(encoded) == TEXT
            assert sizes[encoded].sum() == len(TEXT.encode()) and chars[encoded].sum() == len(TEXT)
