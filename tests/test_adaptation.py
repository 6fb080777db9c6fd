"""Networks of other training become diffusion models: BERT's kin, GPT-2, nanoGPT, and our left-to-right models."""

import contextlib
import copy
import functools
import itertools
import json
import math
import re
import sys

import pytest
import torch

import checkpoint
import parallel
import storage
from adapt import adapt, resize
from attention import annealed
from commands import assert_one_line, assert_resumes_exactly, losses, train
from configs import Config, replace
from data.loader import load_meta, load_split
from data.tokenizer import HubTokenizer, definition_of, from_hub, make_tokenizer
from diffusion import MDLM, cross_entropy
from foreign.bert import BERT
from likelihood import chain_rule
from model import places
from studies import adaptation, runs
from world import picked

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
    for kind in KINDS:
        network, config, meta, _ = checkpoint.load_model(saved(kind)[0], CPU)
        x0 = torch.randint(meta["vocab_size"], (4, 8))
        objective = config.make_objective(meta["vocab_size"])
        objective.loss(network.train(), x0, objective.noise(torch.full((4,), 0.7), torch.rand(4, 8)))[0].backward()
        assert all(p.grad is not None for p in network.parameters()), kind
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
    _, config, meta, _ = checkpoint.load_model(saved("roberta")[0], CPU)
    for flag in (False, True):
        network = replace(config, checkpoint_blocks=flag).make_model(meta["vocab_size"])
        assert network.body.is_gradient_checkpointing == flag
    dropping = replace(config, dropout=0.3).make_model(meta["vocab_size"]).modules()
    assert {part.p for part in dropping if isinstance(part, torch.nn.Dropout)} == {0.3}
    head = sum(p.numel() for p in network.head.parameters() if p.dim() == 2)
    assert network.flops(8, 1.0) - network.flops(8, 0.5) == pytest.approx(3 * head)
    with pytest.raises(storage.UserError, match="no --fsdp"):
        replace(config, fsdp=True)
    for wrong in ("{}", "x", "[1]", json.dumps(json.loads(config.backbone) | {"mask": 10**6}),
                  json.dumps(json.loads(config.backbone) | {"before": ["a"]})):
        with pytest.raises(storage.UserError, match="backbone is not what"):
            replace(config, backbone=wrong)


@pytest.mark.parametrize("kind", ["unigram", "word_pieces"])
def test_tokens_without_bytes(kind):
    """Unknown characters stay unknown; lengths are those of the text, a space before each word included."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    if kind == "unigram":
        found = Tokenizer(models.Unigram([
            ("<s>", 0.0), ("<unk>", 0.0), ("\u2581the", -1.0), ("\u2581cat", -1.0), ("s", -2.0), ("\u2581", -3.0),
            ("\u00e9", -3.0)], unk_id=1))
        found.pre_tokenizer, found.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        found.add_special_tokens(["<s>", "<unk>"])
        text, unknown = "the cats the\u00e9", "<unk>"
    else:
        found, text, unknown = word_pieces(), "the cat sat, on a mat.", "[UNK]"
    tokenizer = HubTokenizer(json.dumps(json.loads(found.to_str())))
    assert unknown in [tokenizer.pieces[i] for i in tokenizer.ids]
    assert "<s>" not in [tokenizer.pieces[i] for i in tokenizer.ids]
    assert tokenizer.decode(tokenizer.encode("the \u2603"))[-len(unknown):] == unknown
    chars, sizes = (lengths[tokenizer.encode(text)].sum() for lengths in tokenizer.lengths())
    assert chars == len(text) + 1 and sizes == len(text.encode()) + 1  # a space before the first word
    with pytest.raises(storage.UserError, match="into its special token"):
        HubTokenizer(json.dumps(json.loads(found.to_str())), left_out={tokenizer.encode("the")[0].item()
                                                                      + len(tokenizer.left_out)}).encode("the")


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
                          ({"hidden_size": "x"}, "knows no model with these settings"),
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


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def roberta_data(saved, tmp_path_factory):
    """A data set `words` of the tiny RoBERTa's tokens."""
    import subprocess
    folder = tmp_path_factory.mktemp("roberta_data")
    (folder / "text.txt").write_text(TEXT * 10)
    from commands import ROOT
    subprocess.run([sys.executable, ROOT / "data/prepare_textfile.py", folder / "text.txt", "--name", "words",
                    "--tokenizer", saved("roberta")[0], "--data_dir", folder], check=True)
    return folder


TUNE = ["--dataset=words", "--seq_len=24", "--prefix=fixed:4", "--lr=1e-3", "--max_steps=6"]


def test_fine_tuning(saved, roberta_data, call, tmp_path, monkeypatch):
    """roberta_wikitext trains, resumes to the bit, is scored, sampled and exported as any other model."""
    folder, model, tokenizer = saved("roberta")
    meta = load_meta("words", roberta_data)
    tokens = load_split("words", "train", 1, roberta_data)
    assert make_tokenizer(meta).decode(tokens[:200]) in TEXT * 10
    out, result = assert_resumes_exactly(  # to resume, no --init_from is needed
        call, monkeypatch, "roberta_wikitext", roberta_data, tmp_path, TUNE, [f"--init_from={folder}"])
    n = len(list(checkpoint.load_model(folder, CPU)[0].parameters()))
    assert f"{n} of {n} tensors taken as they are" in result.err, result.err
    assert losses(out)[-1] < losses(out)[0]
    payload = storage.read(out)
    assert payload["config"]["architecture"] == "masked_lm" and payload["meta"]["definition"] == meta["definition"]
    assert call("checkpoint.py", "export", out, tmp_path / "shared").code == 0
    values = []
    for path in (out, tmp_path / "shared"):
        result = call("evaluate.py", path, "--json", "--data_dir", roberta_data, "--dtype=float32")
        assert result.code == 0, result.err
        values.append(json.loads(result.out)["bits_per_token"])
        assert json.loads(result.out)["bits_per_byte"] < values[-1]
    assert values[0] == values[1]
    result = call("sample.py", out, "--prefix", "the cat", "--length", "16", "--steps", "4")
    assert result.code == 0 and result.out.startswith("the cat"), result


def test_before_any_fine_tuning(saved, roberta_data, call, tmp_path):
    folder, _, _ = saved("roberta")
    result = call("sample.py", folder, "--length", "8", "--json", "--sampler", "topk", "--k", "2")
    assert result.code == 0 and json.loads(result.out)["nfe"] == 4, result.err
    (tmp_path / "text.txt").write_text(TEXT)
    result = call("evaluate.py", folder, "--curve", "--text", tmp_path / "text.txt", "--json", "--out_dir", tmp_path)
    assert result.code == 0 and json.loads(result.out)["masks"][-1] == 36, result.err
    one = call("evaluate.py", folder, "--dataset=words", "--data_dir", roberta_data, "--check", "--repeats", "8",
               "--split", "train", "--n_tokens", "2000")
    assert one.code == 0, one.err


def test_wrong_starts(saved, roberta_data, call, trained, data_dir, tmp_path):
    go = lambda *more: train(call, "roberta_wikitext", roberta_data, tmp_path / "out", *TUNE, *more)
    assert_one_line(go(), "takes its network from a checkpoint", "--init_from")
    assert_one_line(go(f"--init_from={trained}"), "has architecture=dit, and this run masked_lm")
    assert_one_line(go(f"--init_from={saved('bert')[0]}"), "has another tokenizer of Hugging Face", "--tokenizer")
    assert_one_line(go(f"--init_from={saved('roberta')[0]}", "--seq_len=37"), "seq_len=37 is more than the 36 tokens")
    assert_one_line(go(f"--init_from={saved('roberta')[0]}", "--objective=block", "--block_size=8", "--prefix=none"),
                    "architecture=masked_lm needs")
    assert_one_line(train(call, "demo", data_dir, tmp_path / "out", f"--init_from={saved('roberta')[0]}"),
                    "the checkpoint's tokenizer is 'hf'")
    assert_one_line(train(call, "demo", data_dir, tmp_path / "out", "--backbone=x"),
                    "backbone needs architecture=masked_lm")
    assert_one_line(call("bench.py", "roberta_wikitext"), "architecture=masked_lm is a network of a checkpoint")
    assert not (tmp_path / "out").exists()


def test_prepare(saved, call, tmp_path):
    """WikiText from local text; a tokenizer that does not exist."""
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    files = [tmp_path / f"{split}.txt" for split in ("train", "val", "test")]
    result = call("data/prepare_wikitext.py", "--tokenizer", saved("bert")[0], "--data_dir", tmp_path, "--file", *files)
    assert result.code == 0, result.err
    name = f"wikitext_{saved('bert')[0].name}"  # other tokens than the usual ones, so another data set
    meta = load_meta(name, tmp_path)
    assert meta["tokenizer"] == "hf" and "the cat sat" in make_tokenizer(meta).decode(
        load_split(name, "val", 1, tmp_path)[:20])
    assert_one_line(call("data/prepare_textfile.py", files[0], "--name", "x", "--tokenizer", "bort", "--data_dir",
                         tmp_path), "--tokenizer bort is none of char, gpt2, bert, roberta")
    damaged = meta | {"definition": "{}"}
    with pytest.raises(storage.UserError, match="damaged"):
        make_tokenizer(damaged)


# ---- from left to right to diffusion ---------------------------------------------------------------------------------


def gpt2_folder(tmp_path, **settings):
    import transformers as hf
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50257, n_embd=16, n_layer=2, n_head=2, n_positions=24,
                                             **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p * 8 if p.dim() > 1 else p + 0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2", model


def as_nanogpt(model, bias=True):
    """The contents of nanoGPT's ckpt.pt with the weights of a GPT2LMHeadModel: its matrices are (outputs, inputs)."""
    state = {"_orig_mod." + key: value.T if re.search(r"(c_attn|c_proj|c_fc)\.weight", key) else value
             for key, value in model.state_dict().items() if bias or not key.endswith("bias")}
    for i in range(2):
        state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()  # a buffer of old versions
    return {"model": state, "optimizer": {}, "iter_num": 7, "config": {}, "model_args": dict(
        n_layer=2, n_head=2, n_embd=16, block_size=24, bias=bias, vocab_size=50257, dropout=0.0)}


@pytest.fixture(params=["gpt2", "nanogpt", "nanogpt without bias"])
def left_to_right(request, tmp_path):
    """(path, the original model) of a left-to-right network of another project."""
    pytest.importorskip("transformers")
    folder, model = gpt2_folder(tmp_path, **({} if request.param == "gpt2" else {"activation_function": "gelu"}))
    if request.param == "gpt2":
        return folder, model
    bias = request.param == "nanogpt"
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not bias and name.endswith("bias"):
                p.zero_()
    torch.save(as_nanogpt(model, bias), tmp_path / "ckpt.pt")
    return tmp_path / "ckpt.pt", model


def opened(path):
    """(network, Config) of a checkpoint. checkpoint.load_model would also need GPT-2's vocabulary."""
    payload = storage.read(path)
    network = storage.config_of(payload).make_model(payload["meta"]["vocab_size"]).eval()
    storage.check_fit(network, payload["ema"], path)
    storage.load_weights(network, payload["ema"])
    return network, storage.config_of(payload)


def test_gpt2_logits(left_to_right):
    """GPT-2 and nanoGPT: our logits at position i, after end-of-text, are the original's."""
    path, model = left_to_right
    network, config = opened(path)
    assert config.objective == "ar" and network.vocab_size == 50257
    x0 = torch.randint(50257, (3, 20))
    with torch.no_grad():
        expected = model(torch.nn.functional.pad(x0, (1, 0), value=50256)[:, :-1]).logits
        objective = config.make_objective(50257)
        found = network(objective.corrupt(x0, None), torch.ones(3))
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_rows_that_are_no_tokens_are_cut(tmp_path):
    """nanoGPT's 50,304 rows become GPT-2's 50,257, so its models and data sets fit."""
    pytest.importorskip("transformers")
    _, model = gpt2_folder(tmp_path, activation_function="gelu")
    contents = as_nanogpt(model)
    weight = contents["model"]["_orig_mod.transformer.wte.weight"]
    padded = torch.cat((weight, torch.randn(47, 16)))
    contents["model"] |= {"_orig_mod.transformer.wte.weight": padded, "_orig_mod.lm_head.weight": padded}
    torch.save(contents, tmp_path / "ckpt.pt")
    payload = storage.read(tmp_path / "ckpt.pt")
    assert payload["meta"]["vocab_size"] == 50257 and torch.equal(payload["ema"]["embed.weight"],
                                                                  torch.cat((weight, weight[-1:])))
    short = storage.read(tmp_path / "ckpt.pt", storage.Hints(overrides={"seq_len": 10}))
    assert short["config"]["seq_len"] == 10 and len(short["ema"]["positions.weight"]) == 10


@pytest.mark.parametrize("change", [{"n_inner": 32}, {"scale_attn_by_inverse_layer_idx": True},
                                    {"scale_attn_weights": False}, {"layer_norm_epsilon": 1e-12}])
def test_variants_of_gpt2_are_refused(change, tmp_path, call):
    pytest.importorskip("transformers")
    folder, _ = gpt2_folder(tmp_path, **change)
    assert_one_line(call("sample.py", folder), "a variant of GPT-2 that is not supported", next(iter(change)))


def test_nanogpt_of_characters(data_dir, call, tmp_path):
    """Its file does not name its characters; the data set that is named has them. The start is a mean of all rows."""
    args = dict(n_layer=1, n_head=2, n_embd=8, block_size=16, bias=False, vocab_size=27, dropout=0.0)
    state = {"transformer.wte.weight": torch.randn(27, 8), "transformer.wpe.weight": torch.randn(16, 8)}
    for key, shape in (("ln_1", (8,)), ("attn.c_attn", (24, 8)), ("attn.c_proj", (8, 8)), ("ln_2", (8,)),
                       ("mlp.c_fc", (32, 8)), ("mlp.c_proj", (8, 32))):
        state[f"transformer.h.0.{key}.weight"] = torch.randn(shape)
    state |= {"transformer.ln_f.weight": torch.ones(8), "lm_head.weight": state["transformer.wte.weight"]}
    path = tmp_path / "ckpt.pt"
    torch.save({"model": state, "model_args": args, "iter_num": 3}, path)
    assert_one_line(call("sample.py", path), "has 27 tokens, and does not say which", "--dataset")
    result = call("sample.py", path, "--dataset=tiny", "--data_dir", data_dir, "--prefix", "the ")
    assert result.code == 0 and result.out.startswith("the ") and len(result.out) == 17, result
    flags = ["--architecture=nanogpt", "--conditioning=none", "--predict_next", "--seq_len=15", "--max_steps=2"]
    result = train(call, "mdlm_text8", data_dir, tmp_path / "out", *flags, f"--init_from={path}")
    assert "n_layer=1 (not 2), n_embd=8 (not 32)" in result.err
    assert result.code == 0 and storage.read(tmp_path / "out")["config"]["n_embd"] == 8, result.err
    assert "9 of 9 tensors taken as they are" in result.err, result.err
    torch.save({"model": state | {"lm_head.weight": torch.randn(27, 8)}, "model_args": args}, path)
    assert_one_line(call("sample.py", path, "--dataset=tiny", "--data_dir", data_dir), "a head of its own")


def causal(network, L):
    return functools.partial(network, sees=torch.ones(L + 1, L + 1, dtype=torch.bool).tril())


def diffusion_twin(network, config, V):
    """The network and objective of a diffusion model with the weights of a left-to-right model."""
    new = replace(config, objective="mdlm", predict_next=True)
    twin = new.make_model(V).eval()
    source = {"config": vars(config), "ema": dict(network.named_parameters())}
    storage.load_weights(twin, adapt(twin, source, new, "it"))
    return twin, new.make_objective(V)


def assert_same_likelihood(network, config, V, L):
    """Assert that with causal attention --order l2r of the diffusion model is the left-to-right model's likelihood."""
    x0 = torch.randint(V, (3, L))
    twin, objective = diffusion_twin(network, config, V)
    one = chain_rule(network, config.make_objective(V), x0, "l2r")
    two = chain_rule(causal(twin, L), objective, x0, "l2r")
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert (chain_rule(twin, objective, x0, "l2r") - one).abs().min() > 1e-3  # full attention is another model
    return twin


@pytest.mark.parametrize("shift_tokens", [False, True])
def test_our_left_to_right_model_as_diffusion(shift_tokens):
    config = Config(n_layer=2, n_head=2, n_embd=32, seq_len=12, conditioning="none", objective="ar",
                    shift_tokens=shift_tokens)
    torch.manual_seed(0)
    network = config.make_model(11).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert_same_likelihood(network, config, 11, 12)


def test_gpt2_as_diffusion(tmp_path, capsys):
    """Also with a row more for the positions than the file has, since the start of the text is an input."""
    pytest.importorskip("transformers")
    network, config = opened(gpt2_folder(tmp_path)[0])
    assert config.seq_len == 24
    assert_same_likelihood(network, replace(config, seq_len=23), 50257, 23)
    err = capsys.readouterr().err
    assert "28 of 28 tensors taken as they are" in err, err
    assert_same_likelihood(network, config, 50257, 24)
    err = capsys.readouterr().err
    assert "27 of 28 tensors taken as they are; resized: positions.weight (from 24 to 25 rows)" in err, err
    table = torch.arange(6).view(3, 2).float()
    assert resize(table, 2).tolist() == [[0, 1], [2, 3]] and resize(table, 4).tolist()[2:] == [[4, 5], [4, 5]]


def test_after_annealing_it_is_a_plain_network():
    """The network with full attention is a plain bidirectional one, called with the mask before the text."""
    config = Config(n_layer=2, n_head=2, n_embd=32, seq_len=12, conditioning="none", objective="mdlm")
    torch.manual_seed(0)
    next_token, plain = (replace(config, seq_len=n, predict_next=n == 12).make_model(11).eval() for n in (12, 13))
    storage.load_weights(plain, {name: p + 0.3 * torch.randn_like(p) for name, p in next_token.named_parameters()})
    storage.load_weights(next_token, dict(plain.named_parameters()))
    xt, t, where = torch.randint(12, (3, 12)), torch.ones(3), torch.rand(3, 12) < 0.5
    with torch.no_grad():
        expected = plain(torch.nn.functional.pad(xt, (1, 0), value=11), t)[:, :-1]
        full = torch.ones(13, 13, dtype=torch.bool)
        for found in (next_token(xt, t), next_token(xt, t, sees=full)):
            torch.testing.assert_close(found, expected)
        for positions in (where, places(where)):
            torch.testing.assert_close(next_token(xt, t, positions), expected[where])


def test_annealed():
    """Tokens on the left are always visible, those on the right with probability (step + 1)/anneal_steps."""
    left = torch.ones(40, 40, dtype=torch.bool).tril()
    for step in (0, 4, 8):
        visible = annealed(40, step, 10, seed=3)
        assert visible[left].all() and torch.equal(visible, annealed(40, step, 10, seed=3))
        n = (~left).sum().item()
        share = visible[~left].float().mean().item()
        assert abs(share - (step + 1) / 10) < 4 * math.sqrt((step + 1) / 10 * (9 - step) / 10 / n) + 1e-6
    assert not torch.equal(annealed(40, 4, 10, 3), annealed(40, 4, 10, 4))
    assert not torch.equal(annealed(40, 4, 10, 3), annealed(40, 9, 20, 3))  # the same share, another step
    assert annealed(40, 9, 10, 3) is None and annealed(40, 0, 0, 3) is None


def test_annealing_run(data_dir, call, tmp_path, monkeypatch):
    """From our ar model: what is taken is said, the run resumes to the bit in the middle of annealing."""
    ar = tmp_path / "ar"
    assert train(call, "ar_demo", data_dir, ar, "--max_steps=10").code == 0
    flags = ["--predict_next", "--anneal_steps=6", "--max_steps=8"]
    out, result = assert_resumes_exactly(call, monkeypatch, "demo", data_dir, tmp_path, flags, [f"--init_from={ar}"])
    assert "tensors taken as they are" in result.err and "objective=ar, now mdlm" in result.err
    assert "predict the next" not in result.err
    seen = []  # the visibility of each step
    original = annealed
    monkeypatch.setattr("attention.annealed", lambda *args: seen.append(original(*args)) or seen[-1])
    assert train(call, "demo", data_dir, tmp_path / "watched", *flags, f"--init_from={ar}").code == 0
    n_right = [None if v is None else (v.sum() - 33 * 34 // 2).item() for v in seen]
    assert len(seen) == 8 and n_right[5:] == [None] * 3 and n_right[:5] == sorted(n_right[:5]) and n_right[0] > 0
    assert seen[0].shape == (33, 33)
    other = tmp_path / "other"
    train(call, "demo", data_dir, other, "--predict_next", "--max_steps=8", f"--init_from={ar}")
    for key in ("bits_per_token", "val_bits_per_token"):
        assert losses(other, key)[0] != losses(out, key)[0]
    assert call("sample.py", out, "--steps", "4").code == 0
    result = train(call, "demo", data_dir, tmp_path / "unshifted", "--max_steps=1", f"--init_from={ar}")
    assert result.code == 0 and "predict the next token: --predict_next would keep that" in result.err
    for flag in ("--predict_next", "--anneal_steps=5"):
        for config, more in (("ar_demo", []), ("bd3_demo", []), ("udlm_text8", ["--conditioning=none"])):
            assert_one_line(train(call, config, data_dir, tmp_path / "no", flag, *more), "are for masks in whole texts")


# ---- what is new changes nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [{"conditioning": "time"}, {"tied": False}, {"head_bias": True}, {"norm_bias": True},
                                 {"conditioning": "step", "tied": False, "head_bias": True, "norm_bias": True},
                                 {"conditioning": "none", "head_gates": True},
                                 {"conditioning": "time", "architecture": "mixers", "mixer": "gmlp"},
                                 {"conditioning": "time", "architecture": "mixers", "mixer": "synth_dense"}])
def test_new_tensors_do_not_change_the_function(new, capsys):
    before = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=12, conditioning="none", objective="mdlm")
    before = replace(before, **{key: value for key, value in new.items() if key in ("architecture", "mixer")})
    torch.manual_seed(0)
    network = before.make_model(11).eval()
    storage.load_weights(network, {name: p + 0.3 * torch.randn_like(p) for name, p in network.named_parameters()})
    now = replace(before, **new)
    other = now.make_model(11).eval()
    source = {"config": vars(before) | {}, "ema": dict(network.named_parameters())}
    storage.load_weights(other, adapt(other, source, now, "it"))
    assert "; new: " in capsys.readouterr().err
    if now.conditioning != "none":
        assert other.time_embed.fc_in.weight.abs().max() > 0
    xt, t = torch.randint(12, (3, 12)), torch.rand(3)
    with torch.no_grad():
        torch.testing.assert_close(other(xt, t), network(xt, t))


def test_what_may_not_be_new():
    before = Config(n_layer=2, n_head=2, n_embd=32, n_cond=8, seq_len=12, conditioning="time", objective="mdlm")
    source = {"config": vars(before) | {}, "ema": dict(before.make_model(11).named_parameters())}
    for change, words in (({"conditioning": "none"}, "do not fit the model"), ({"n_layer": 3}, "of another network"),
                          ({"shift_tokens": True}, "of another network"), ({"n_head": 4}, "of another network")):
        now = replace(before, **change)
        with pytest.raises(storage.UserError, match=words):
            adapt(now.make_model(11), source, now, "it")
    gated = {"config": source["config"] | {"head_gates": True}, "ema": source["ema"]}
    with pytest.raises(storage.UserError, match="of another network: head_gates=True, now False"):
        adapt(before.make_model(11), gated, before, "it")
    source["ema"]["norm.weight"] = torch.full((32,), math.nan)
    with pytest.raises(storage.UserError, match="not finite"):
        adapt(before.make_model(11), source, before, "it")


# ---- BERT's training -------------------------------------------------------------------------------------------------


def test_bert_loss_by_enumeration():
    """The expected loss over all choices, weighted by their probabilities, for texts of 3 tokens and 2 symbols.

    Each token is not chosen (.85), shown as the mask (.12), as each symbol (.015/2 each) or as it is (.015)."""
    V, L = 2, 3
    torch.manual_seed(0)
    table = torch.randn((V + 1) ** L, L, V, dtype=torch.float64)
    place = torch.tensor([9, 3, 1])

    def model(xt, t, where=None):
        logits = table[(xt * place).sum(1)]
        return picked(logits, where)

    objective, x0 = BERT(V), torch.tensor([[1, 0, 1]])
    # (probability, a number v that means it, what is shown: None for the token itself)
    ways = [(0.85, 0.5, None), (0.12, 0.06, V), (0.0075, 0.12 + 0.00375, 0), (0.0075, 0.12 + 0.01125, 1),
            (0.015, 0.14, None)]
    expected = found = 0.0
    for chosen in itertools.product(range(5), repeat=L):
        p = math.prod(ways[way][0] for way in chosen)
        v = torch.tensor([[ways[way][1] for way in chosen]], dtype=torch.float64)
        loss, nats = objective.loss(model, x0, objective.noise(torch.rand(1), v))
        assert loss == nats.mean()
        found += p * loss.item()
        xt = torch.tensor([[x0[0, i].item() if ways[way][2] is None else ways[way][2] for i, way in enumerate(chosen)]])
        ce = cross_entropy(model(xt, None), x0)[0]
        expected += p * sum(ce[i].item() for i, way in enumerate(chosen) if way) / (0.15 * L)
    assert found == pytest.approx(expected, rel=1e-6)


def test_bert_is_mdlm_elsewhere(data_dir, call, tmp_path):
    """Validation and scores are MDLM's bound; BERT knows no time; given tokens are never predicted."""
    for name in ("exact_k", "continuous"):
        assert getattr(BERT, name) is getattr(MDLM, name)
    noise = BERT(5).noise(torch.rand(2), torch.tensor([[2, 2, 0.1, 0.9], [0.01, 0.2, 0.3, 0.4]]).double())
    assert noise.mask.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert noise.weight.tolist() == pytest.approx([2 / 0.15, 1 / 0.15])
    bert = ["--objective=bert", "--time_sampling=uniform"]
    assert train(call, "mdlm_text8", data_dir, tmp_path / "out", *bert, "--max_steps=20").code == 0
    result = call("evaluate.py", tmp_path / "out", "--check", "--repeats=4", "--split=train", "--n_tokens=2000",
                  "--dtype=float32")
    assert result.code == 0, result.err
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", *bert, "--conditioning=time"), "no time")
    assert_one_line(train(call, "mdlm_text8", data_dir, tmp_path / "no", bert[0], "--time_sampling=exact_k"),
                    "one mask rate")


# ---- the study -------------------------------------------------------------------------------------------------------


def test_steps_to_reach():
    points = [(100, 3.0), (200, 2.8), (400, 2.7)]
    assert adaptation.steps_to_reach(2.8, points) == 200
    assert adaptation.steps_to_reach(2.9, points) == pytest.approx(100 * 2**0.5)
    assert adaptation.steps_to_reach(3.1, points) == 100 and adaptation.steps_to_reach(2.6, points) is None


def test_study(call, data_dir, tmp_path, monkeypatch):
    """All commands of a study, with recorded answers: a second call repeats none of them."""
    calls = []

    def answer(script, *arguments):
        calls.append([script, *map(str, arguments)])
        words = calls[-1]
        if script == "train.py":
            out = next(word for word in words if word.startswith("--out_dir=")).removeprefix("--out_dir=")
            storage.Path(out).mkdir()
            lines = {"step": 0, "config": {"seq_len": 128}}, {"step": 32, "val_bits_per_token": 2.0}
            (storage.Path(out) / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            return ""
        if "--curve" in words:
            return json.dumps({"mask_rate": [0.1, 1.0], "bits_per_token": [1.0, 4.0]})
        if "--samples" in words:
            row = {"nfe": 16.0, "judge_bits_per_char": 3.0, "unigram_entropy_bits": 3.9, "known_words": 0.5,
                   "judge_stderr_per_char": 0.1}
            return json.dumps({"samples": [row, row]})
        return json.dumps({"bits_per_token": 2.0 + len(calls) / 1000})

    monkeypatch.setattr(runs, "call", answer)
    monkeypatch.setattr(sys, "argv", ["adaptation.py", str(tmp_path / "study"), "--seeds", "2", "--steps", "32",
                                      "--dataset=tiny", f"--data_dir={data_dir}"])
    adaptation.main()
    trained = [words for words in calls if words[0] == "train.py"]
    assert len(trained) == 2 * (4 + 5 + 5 + 2) + 1
    assert sum("--predict_next" in words for words in trained) == 14
    assert sum("--anneal_steps=16" in words for words in trained) == 2
    found = json.loads((tmp_path / "study/adaptation.json").read_text())
    assert len(found["bits"]) == 4 + 12 and {"mask_rates.png", "steps.png"} < {
        path.name for path in (tmp_path / "study").iterdir()}
    before = len(calls)
    adaptation.main()
    assert len(calls) == before
