"""Tiny models of transformers, with random weights, and their tokenizers."""

import torch

TEXT = "the cat sat on the mat, and the dog's log was d\u00e9j\u00e0 vu \u2603 again. " * 20
SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
             max_position_embeddings=40)


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
    elif kind == "llama":
        tokens = byte_level(["<s>", "<mask>"])
        names = dict(bos_token="<s>", mask_token="<mask>")
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=tokens.get_vocab_size(), num_key_value_heads=1,
                                                   bos_token_id=0, eos_token_id=None, **SIZES))
    else:
        tokens = word_pieces()
        n = tokens.get_vocab_size()
        model = (hf.BertForMaskedLM(hf.BertConfig(vocab_size=n, **SIZES)) if kind == "bert" else
                 hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=n, dim=32, n_layers=2, n_heads=2,
                                                              hidden_dim=64, max_position_embeddings=40)))
    if kind not in ("roberta", "llama"):
        names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)  # so that logits differ visibly
    return model.eval(), hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
