"""Networks of transformers, BERT and its kin: the same logits, tokens and files, and what is refused."""

import contextlib
import copy
import json
import shutil
import sys
import warnings

import pytest
import torch

import checkpoint
import parallel
import storage
from commands import assert_one_line
from configs import replace
from data.loader import load_split
from data.tokenizer import HubTokenizer, definition_of, from_hub, make_tokenizer
from foreign.masked_lm import MaskedLM, frame_of
from hub_models import SIZES, TEXT, byte_level, word_pieces
from model import places

CPU = torch.device("cpu")
KINDS = ("roberta", "bert", "modernbert", "distilbert")


@torch.no_grad()
def their_logits(model, tokenizer, xt, where, ours):
    """The logits (N, V) of the original model, called as its authors do, at `where` of our tokens xt (B, L)."""
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
            for positions in (where, places(where)):
                torch.testing.assert_close(loaded(xt, torch.ones(3), positions), expected, atol=1e-5, rtol=1e-5)
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


def test_every_parameter_gets_a_gradient(saved):
    """Else DistributedDataParallel would hang."""
    for kind in (*KINDS, "llama"):
        network, config, meta, _ = checkpoint.load_model(saved(kind)[0], CPU)
        x0 = torch.randint(meta["vocab_size"], (4, 8))
        objective = config.make_objective(meta["vocab_size"])
        objective.loss(network.train(), x0, objective.noise(torch.full((4,), 0.7), torch.rand(4, 8)))[0].backward()
        assert all(p.grad is not None for p in network.parameters()), kind
        in_blocks = {p for block in network.blocks for p in block.parameters()}  # what --fsdp splits block by block
        assert len(network.blocks) == config.n_layer and in_blocks.issuperset(network.matrices())
        assert sum(weight.numel() for weight in network.matrices()) > 2 * 4 * 32 * 32
        assert network.flops(8) > 6 * sum(weight.numel() for weight in network.matrices())


def test_weights_under_old_names_and_as_bin(saved, tmp_path):
    """Old files call the gains and biases of norms gamma and beta; and a .bin is read without running its pickle."""
    folder, model, tokenizer = saved("bert")
    state = {key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
             for key, value in model.state_dict().items()}
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    one, two = (checkpoint.load_model(path, CPU)[0] for path in (folder, tmp_path))
    for (name, a), b in zip(one.named_parameters(), two.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_weights_that_are_not_its_own(saved, tmp_path):
    """Quantised weights, and more layers than the settings have, are refused."""
    from safetensors.torch import load_file, save_file
    folder, model, tokenizer = saved("bert")
    for name, change, words in (
            ("int8", lambda state: {key: value.to(torch.int8) if "query.weight" in key else value
                                    for key, value in state.items()}, "such as quantised ones"),
            ("layers", lambda state: state, "has weights of layers that its config.json does not have")):
        shutil.copytree(folder, tmp_path / name)
        weights = tmp_path / name / "model.safetensors"
        save_file(change(load_file(weights)), weights, metadata={"format": "pt"})
        if name == "layers":
            settings = json.loads((tmp_path / name / "config.json").read_text())
            (tmp_path / name / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
        with pytest.raises(storage.UserError, match=words):
            checkpoint.load_model(tmp_path / name, CPU)


def test_the_frame_of_a_tokenizer_without_the_letter_a():
    """frame_of uses another text than "a" if the tokenizer makes no tokens of "a"."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    tokens = Tokenizer(models.BPE({"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "b": 3, "c": 4}, []))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    tokens.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, cls_token="[CLS]", sep_token="[SEP]",
                                                     pad_token="[PAD]")
    assert tokenizer("a", add_special_tokens=False)["input_ids"] == [] and frame_of(tokenizer) == ([1], [2])


def test_weights_in_several_files_and_in_half_precision(saved, tmp_path):
    folder, model, tokenizer = saved("roberta")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    from safetensors.torch import save_file
    (tmp_path / "half").mkdir()
    model.config.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    save_file({name: p.detach().half() for name, p in model.named_parameters()}, tmp_path / "half/model.safetensors")
    whole, shards, half = (checkpoint.load_model(path, CPU)[0]
                           for path in (folder, tmp_path / "shards", tmp_path / "half"))
    for one, two, three in zip(*(network.parameters() for network in (whole, shards, half))):
        assert torch.equal(one, two) and three.dtype == torch.float32
        torch.testing.assert_close(one, three, atol=1e-2, rtol=1e-3)


def test_uneven_frame_and_unused_weights(saved, tmp_path):
    """A frame of one token; a pooler that no output depends on; a network that counts positions from elsewhere."""
    import transformers as hf
    from tokenizers import processors
    tokens = word_pieces()
    tokens.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    torch.manual_seed(0)
    models = [hf.BertForMaskedLM(hf.BertConfig(vocab_size=60, **SIZES, tie_word_embeddings=False)),
              hf.MPNetForMaskedLM(hf.MPNetConfig(vocab_size=60, **SIZES))]
    for i, model in enumerate(models):
        model.eval().save_pretrained(tmp_path / str(i))
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=tokens, **names)
        tokenizer.save_pretrained(tmp_path / str(i))
        network, config, meta, _ = checkpoint.load_model(tmp_path / str(i), CPU)
        backbone = json.loads(config.backbone)
        assert (backbone["before"], backbone["after"]) == ([2], []) and backbone["first"] == (0, 2)[i]
        ours = make_tokenizer(meta)
        xt = torch.randint(1, ours.vocab_size, (2, 9))  # 0 is [UNK], whose number is MPNet's padding
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([[2, *(ours.ids[j] for j in row)] for row in xt.tolist()])).logits
            torch.testing.assert_close(network(xt, None), expected[:, 1:, ours.ids], atol=1e-5, rtol=1e-5)
        network.train()
        network(xt, None).sum().backward()
        missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing and backbone["unused"] == [name for name, p in network.named_parameters() if p.grad is None]


def test_networks_that_cannot_compute_in_bfloat16(tmp_path):
    """DeBERTa's masks exceed bfloat16: it computes in float32 then, and the same as without autocast."""
    import transformers as hf
    torch.manual_seed(0)
    model = hf.DebertaForMaskedLM(hf.DebertaConfig(vocab_size=60, **SIZES, relative_attention=True,
                                                   pos_att_type=["c2p"]))
    model.eval().save_pretrained(tmp_path)
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk", "mask")}
    hf.PreTrainedTokenizerFast(tokenizer_object=word_pieces(), **names).save_pretrained(tmp_path)
    network, config, _, _ = checkpoint.load_model(tmp_path, CPU)
    xt = torch.randint(50, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = network(xt, None)
    with torch.no_grad():
        assert torch.equal(found, network(xt, None))
    assert json.loads(config.backbone)["autocast"] is False


def test_it_can_be_compiled(saved, monkeypatch):
    """Its outputs and the names of its parameters stay the same."""
    calls = []
    monkeypatch.setattr(torch, "compile", lambda function: calls.append(function) or function)
    model = checkpoint.load_model(saved("bert")[0], CPU)[0].eval()
    names, xt = list(model.state_dict()), torch.arange(8)[None]
    expected = model(xt, None)
    parallel.compile_parts(model, None)
    assert len(calls) == 1 and list(model.state_dict()) == names
    torch.testing.assert_close(model(xt, None), expected)


def test_recomputation_and_flops(saved):
    """--checkpoint_blocks and --dropout reach the network; the head counts by its share of predicted tokens."""
    import transformers as hf
    _, config, meta, _ = checkpoint.load_model(saved("roberta")[0], CPU)
    for flag in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            network = replace(config, checkpoint_blocks=flag).make_model(meta["vocab_size"])
        assert any(getattr(part, "gradient_checkpointing", False) for part in network.body.modules()) == flag
    albert = lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(
        vocab_size=9, embedding_size=8, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, intermediate_size=8))
    backbone = dict(before=[], after=[], first=0, autocast=True, left_out=[], mask=8, unused=[])
    with pytest.raises(storage.UserError, match="--checkpoint_blocks does not work with the network AlbertModel"):
        MaskedLM(8, albert(), backbone, checkpoint_blocks=True)
    assert MaskedLM(8, albert(), backbone).blocks == []  # --fsdp splits it as a whole
    dropping = replace(config, dropout=0.3).make_model(meta["vocab_size"]).modules()
    assert {part.p for part in dropping if isinstance(part, torch.nn.Dropout)} == {0.3}
    head = sum(p.numel() for p in network.head.parameters() if p.dim() == 2)
    assert network.flops(8, 1.0) - network.flops(8, 0.5) == pytest.approx(3 * head)
    for other in ({"predict_next": True}, {"anneal_steps": 5}, {"norm_bias": True}):
        with pytest.raises(storage.UserError, match="and the defaults of tied"):
            replace(config, **other)
    for wrong in ("{}", "x", "[1]", json.dumps(json.loads(config.backbone) | {"mask": 10**6}),
                  json.dumps(json.loads(config.backbone) | {"before": ["a"]})):
        with pytest.raises(storage.UserError, match="backbone is not what"):
            replace(config, backbone=wrong)


def test_tokens_that_end_words():
    """</w> is no text: it stands for the space after a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    found = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    found.pre_tokenizer, found.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder(suffix="</w>")
    found.train_from_iterator(["the cat sat on the mat"], trainers.BpeTrainer(
        vocab_size=40, end_of_word_suffix="</w>", show_progress=False))
    tokenizer = HubTokenizer(found.to_str())
    with pytest.raises(storage.UserError, match="the vocabulary beside it 7: one of them is damaged"):
        make_tokenizer({"tokenizer": "hf", "definition": found.to_str(), "vocab_size": 7})
    text = "the cat sat on the mat"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [lengths[ids].sum() for lengths in tokenizer.lengths()] == [len(text) + 1] * 2  # with a last space


@pytest.mark.parametrize("kind", ["unigram", "word_pieces"])
def test_tokens_without_bytes(kind):
    """Unknown characters stay unknown; lengths are those of the text, a space before each word included. <0xC3> is a
    byte: the first one of the last character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    if kind == "unigram":
        found = Tokenizer(models.Unigram([
            ("<s>", 0.0), ("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581cat", -1.0), ("s", -2.0), ("\u2581", -3.0),
            ("\u00e9", -3.0), ("<0xC3>", -9.0), ("<0x9F>", -9.0)], unk_id=1, byte_fallback=True))
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        found.add_special_tokens(["<s>", "<unk>", "<mask>"])  # the last one is new
        text, unknown = "the cats the\u00e9\u00df", "<unk>"
    else:
        found, text, unknown = word_pieces(), "the cat sat, on a mat.", "[UNK]"
    tokenizer = HubTokenizer(json.dumps(json.loads(found.to_str())))
    assert unknown in [tokenizer.pieces[i] for i in tokenizer.ids]
    assert not {"<s>", "<mask>"} & {tokenizer.pieces[i] for i in tokenizer.ids}
    assert sorted(tokenizer.ids + tokenizer.left_out) == sorted(tokenizer.pieces)
    assert tokenizer.decode(tokenizer.encode("the \u2603"))[-len(unknown):] == unknown
    chars, sizes = (lengths[tokenizer.encode(text)].sum() for lengths in tokenizer.lengths())
    assert chars == len(text) + 1 and sizes == len(text.encode()) + 1  # a space before the first word
    with pytest.raises(storage.UserError, match="into its special token"):
        HubTokenizer(json.dumps(json.loads(found.to_str())),
                     left_out={tokenizer.ids[tokenizer.encode("the")[0]]}).encode("the")


def test_code_beside_a_tokenizer_is_not_run(saved, tmp_path):
    saved("bert")[2].save_pretrained(tmp_path)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'flag')!r}, 'w')\nfrom transformers import "
                                      "PreTrainedTokenizerFast\nclass Evil(PreTrainedTokenizerFast): pass\n")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        settings | {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}))
    with contextlib.suppress(storage.UserError):
        from_hub(tmp_path)
    assert not (tmp_path / "flag").exists()


def test_truncation_is_left_out(saved):
    """A tokenizer that cuts texts and fills them up encodes whole texts, and nothing else."""
    other, text = copy.deepcopy(saved("bert")[2]), "the cat sat on the mat"
    n = len(other(text, add_special_tokens=False)["input_ids"])
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding(length=512)
    assert len(HubTokenizer(definition_of(other)).encode(text)) == n > 4


def test_large_vocabularies(tmp_path):
    from data.prepare import write_splits
    from data.tokenizer import id_type
    assert [id_type(n).__name__ for n in (256, 257, 65536, 65537)] == ["uint8", "uint16", "uint16", "uint32"]
    meta = {"tokenizer": "hf", "definition": "{}", "vocab_size": 70_000, "name": "large"}
    write_splits(tmp_path / "large", meta, dict.fromkeys(("train", "val", "test"), "a"), lambda text: [69_999, 1])
    assert load_split("large", "train", 1, tmp_path).tolist() == [69_999, 1]
    parts = json.loads(word_pieces().to_str())
    parts["model"]["vocab"]["zzz"] = 10**8
    with pytest.raises(storage.UserError, match="above ten million"):
        HubTokenizer(json.dumps(parts))


def test_bad_folders(saved, tmp_path, call, monkeypatch):
    folder, model, tokenizer = saved("roberta")
    go = lambda: call("sample.py", tmp_path)
    model.save_pretrained(tmp_path)
    assert_one_line(go(), "has no tokenizer that can be read")
    tokenizer.save_pretrained(tmp_path)
    state = model.state_dict()
    del state["lm_head.dense.weight"], state["roberta.encoder.layer.1.output.dense.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    assert_one_line(go(), "lacks weights of RobertaForMaskedLM", "lm_head.dense.weight")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "robert"}))
    assert_one_line(go(), "transformers knows no model with these settings (model_type robert)")
    for change, words in (({"num_hidden_layers": 10**7}, "its num_hidden_layers is 10000000"),
                          ({"num_labels": 10**6}, "its num_labels is 1000000"),
                          ({"hidden_size": "x"}, "its hidden_size is x, not a number"),
                          ({"type_vocab_size": "x"}, "knows no model with these settings"),
                          ({"vocab_size": 50}, "in other shapes"), ({"num_attention_heads": 5}, "cannot build")):
        (tmp_path / "config.json").write_text(json.dumps(settings | change))
        assert_one_line(go(), words)
    model.save_pretrained(tmp_path)
    foreign = {"auto_map": {"AutoConfig": "evil.E", "AutoModelForMaskedLM": "evil.M"}, "dtype": "float16",
               "attn_implementation": "evil/kernel", "quantization_config": {"quant_method": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(settings | foreign))
    assert call("sample.py", tmp_path, "--steps=2").code == 0  # code, kernels and formats are not read, nor kept
    assert not foreign.keys() & json.loads(checkpoint.load_model(tmp_path, CPU)[1].backbone)["settings"].keys()
    tokenizer_only = tmp_path / "other"
    small = byte_level(["<mask>"], 270)
    import transformers
    transformers.PreTrainedTokenizerFast(tokenizer_object=small, bos_token="<s>").save_pretrained(tokenizer_only)
    model.save_pretrained(tokenizer_only)
    assert_one_line(call("sample.py", tokenizer_only), "has no mask token")
    big = byte_level(["<mask>"], 330)
    transformers.PreTrainedTokenizerFast(tokenizer_object=big, mask_token="<mask>").save_pretrained(tokenizer_only)
    assert_one_line(call("sample.py", tokenizer_only), "tokens, and the tokenizer beside it")
    model.save_pretrained(tmp_path)
    assert_one_line(call("sample.py", tmp_path, "--override", "seq_len=39"), "seq_len=39 is more than the 36 tokens")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_one_line(call("sample.py", folder), "transformers", "pip install")


def test_a_tokenizer_from_the_hub(saved, monkeypatch):
    """A tokenizer that is not in the cache is fetched once, at the revision asked for. For a folder nothing is."""
    import huggingface_hub
    import transformers
    folder, calls, read = saved("bert")[0], [], transformers.AutoTokenizer.from_pretrained

    def from_files(place, **named):
        calls.append((place, named.get("revision"), named["local_files_only"]))
        if place == "a/b":
            raise OSError
        return read(place, **named)

    def fetch(place, revision, allow_patterns):
        calls.append((place, revision, allow_patterns))
        return folder

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    from_hub("hf://a/b@v2")
    assert calls[:2] == [("a/b", "v2", True), ("a/b", "v2", ["*.json", "*.txt", "*.model"])] and calls[2][2]
    calls.clear()
    with pytest.raises(storage.UserError):
        from_hub("a/b")
    assert len(calls) == 1
