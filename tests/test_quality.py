"""studies/quality.py: statistics by hand, judges against direct computation, and evaluate.py --samples."""

import csv
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import storage
from cli import UserError
from commands import assert_one_line, train
from hub_models import make
from studies import quality
from studies.judges import Judge, TransformersJudge, features, judged, mauve, open_judge, padded
from studies.quality import distinct, read_samples, repetition, unigram_entropy

CPU, FLOAT = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def ar(data_dir, tmp_path_factory):
    """A short autoregressive run on `tiny`."""
    import subprocess
    import sys
    from commands import arguments
    out = tmp_path_factory.mktemp("ar") / "out"
    subprocess.run([sys.executable, *map(str, arguments("ar_text8", data_dir, out, "--max_steps=80", "--lr=0.01"))],
                   check=True)
    return out


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_unigram_entropy():
    """Bits of the distribution within one sample."""
    assert unigram_entropy([5, 5, 5]) == 0 and unigram_entropy([]) == 0
    assert unigram_entropy([1, 2, 3, 4] * 3) == pytest.approx(2)
    assert unigram_entropy([1, 1, 1, 2]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.5)


def test_distinct_and_repetition():
    """distinct counts over all texts, repetition within each."""
    texts = ["a b a b a", "a b c d e"]
    assert distinct(texts, 1) == pytest.approx(5 / 10)
    assert distinct(texts, 2) == pytest.approx(5 / 8)      # ab ba bc cd de
    assert repetition(texts, 2) == pytest.approx(2 / 8)    # ab and ba once more, in the first
    assert repetition(["a b", "a b"], 2) == 0 and distinct(["", "x"], 2) is repetition(["", "x"], 2) is None


# ---- judges ----------------------------------------------------------------------------------------------------------


def test_judge_is_the_models_likelihood(call, ar, data_dir):
    """On the windows of a split, the judge finds what evaluate.py finds; batches and padding change nothing."""
    scored = json.loads(call("evaluate.py", ar, "--json", "--n_tokens=320", "--data_dir", data_dir).out)
    judge = Judge(ar, CPU, FLOAT)
    from data.loader import load_split, windows
    tokens = load_split("tiny", "val", 32, data_dir)
    texts = [judge.tokenizer.decode(tokens[i:i + 32]) for i in windows(tokens, 32, 10)]
    found = judged(judge, texts)
    assert found["judge_bits_per_token"] == pytest.approx(scored["bits_per_token"], rel=1e-5)
    assert found["judge_bits_per_char"] == found["judge_bits_per_token"]
    assert found["judge_perplexity"] == pytest.approx(2 ** scored["bits_per_token"], rel=1e-5)
    mixed = [*texts, "the", "a" * 31, texts[0] + texts[1]]  # short ones are padded, long ones cut
    alone = [judged(judge, [text]) for text in mixed]
    total = sum(one["judge_bits_per_token"] * len(text) for one, text in zip(alone, mixed))
    assert judged(judge, mixed, 5)["judge_bits_per_token"] == pytest.approx(total / sum(map(len, mixed)), rel=1e-5)
    assert alone[-1]["judge_bits_per_token"] == pytest.approx(
        (alone[0]["judge_bits_per_token"] + alone[1]["judge_bits_per_token"]) / 2, rel=1e-5)
    with pytest.raises(UserError, match="empty"):
        judged(judge, [""])


def test_errors_of_a_judge():
    """Those of its two rates, of texts of any length, are those of the jackknife."""
    g = torch.Generator().manual_seed(0)
    nats = torch.rand(300, generator=g)
    judge = SimpleNamespace(name="x", device=CPU, length=300, encode=lambda text: list(map(int, text.split())),
                            cross_entropies=lambda x0: nats[x0])
    texts = [" ".join(map(str, torch.randint(300, (n,), generator=g).tolist()))
             for n in torch.randint(20, 60, (100,), generator=g).tolist()]
    found = judged(judge, texts)
    left_out = [judged(judge, texts[:i] + texts[i + 1:]) for i in range(100)]
    for value, error in (("judge_bits_per_token", "judge_stderr"), ("judge_bits_per_char", "judge_stderr_per_char")):
        spread = torch.tensor([one[value] for one in left_out], dtype=torch.float64).std(correction=0).item()
        assert found[error] == pytest.approx(math.sqrt(99) * spread, rel=0.03)


@pytest.fixture(scope="module")
def tiny_gpt2(tmp_path_factory):
    """A random GPT-2 with a tokenizer of single bytes, saved as transformers saves it."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    folder = tmp_path_factory.mktemp("hf") / "tiny-gpt2"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {character: i + 1 for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>",
                                         eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(vocabulary), n_positions=17, n_embd=16, n_layer=2, n_head=2,
                                     bos_token_id=0, eos_token_id=0, initializer_range=0.5)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_transformers_judge(tiny_gpt2):
    """GPT-2 by transformers: the likelihood of the text after a start token, 16 tokens at a time; per character."""
    import transformers
    judge = open_judge(f"hf://{tiny_gpt2}", CPU, FLOAT)
    assert isinstance(judge, TransformersJudge) and judge.length == 16
    model = transformers.GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()
    texts, total, n_tokens = ["the cat sat", "né " * 7], 0.0, 0
    for text in texts:
        ids = judge.encode(text)
        assert len(ids) == len(text.encode())
        for i in range(0, len(ids), 16):
            seen = torch.tensor([[0] + ids[i:i + 16]])
            log_p = model(seen).logits.log_softmax(-1)[0]
            total -= sum(log_p[j, token].item() for j, token in enumerate(ids[i:i + 16]))
            n_tokens += len(ids[i:i + 16])
    found = judged(judge, texts)
    assert found["judge_perplexity"] == pytest.approx(math.exp(total / n_tokens), rel=1e-4)
    assert found["judge_bits_per_char"] == pytest.approx(total / math.log(2) / sum(map(len, texts)), rel=1e-4)


def test_features_of_a_judge(ar, tiny_gpt2):
    """Those after the last token: the head makes the prediction of the next token of them. Long texts are cut."""
    texts = ["the cat", "t", "a cat sat on the mat and", ""]
    for judge, head in ((Judge(ar, CPU, FLOAT), lambda judge: judge.model.head),
                        (open_judge(f"hf://{tiny_gpt2}", CPU, FLOAT), lambda judge: judge.model.lm_head)):
        found, n_cut = torch.tensor(features(judge, texts, batch_size=3)), 0
        for text, one in zip(texts, found):
            ids = judge.encode(text)
            n_cut += len(ids) >= judge.length
            ids = ids[:judge.length - 1]
            with torch.no_grad():
                logits = head(judge)(one)
                for token in (0, 5):
                    ce = judge.cross_entropies(padded([[*ids, token]], CPU))[0, -1]
                    assert -logits.log_softmax(-1)[token].item() == pytest.approx(ce.item(), rel=1e-4)
        assert n_cut == isinstance(judge, TransformersJudge)


def test_mauve():
    """Features at two points are two clusters; the area under the curve of their shares is that of many trapezoids."""
    pytest.importorskip("mauve")
    points = np.eye(2, 8, dtype=np.float32)
    for share_p, share_q in ((0.8, 0.3), (0.5, 0.45), (1, 0), (0.9, 0.05)):
        p, q = (np.repeat(points, [round(20 * share), 20 - round(20 * share)], axis=0) for share in (share_p, share_q))
        P, Q = np.array([share_p, 1 - share_p]), np.array([share_q, 1 - share_q])
        kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b) if x > 0)
        mixtures = [w * P + (1 - w) * Q for w in np.linspace(1e-9, 1 - 1e-9, 4001)]
        curve = np.exp(-5 * np.array([[math.inf, 0], *([kl(P, R), kl(Q, R)] for R in mixtures), [0, math.inf]]))
        area = abs(np.trapezoid(curve[:, 1], curve[:, 0]))
        assert mauve(p, q) == pytest.approx(area, abs=0.01), (share_p, share_q)
        assert mauve(p, q) == pytest.approx(mauve(q, p))


# ---- the command -----------------------------------------------------------------------------------------------------


def test_samples(call, trained, ar, tiny_gpt2, data_dir, tmp_path):
    """Several samplers and step counts beside real text: table, CSV, picture, JSON."""
    result = call("evaluate.py", trained, "--samples=6", "--steps=2,16", "--sampler=ancestral,topk,first_hitting",
                  "--judge", ar, "--data_dir", data_dir, "--out_dir", tmp_path, "--json")
    rows = json.loads(result.out)["samples"]
    assert [(row["sampler"], row["steps"]) for row in rows] == [
        ("ancestral", 2), ("ancestral", 16), ("topk", 2), ("topk", 16), ("first_hitting", None), ("real text", None)]
    assert [row["nfe"] for row in rows[2:5]] == [2, 16, 32] and rows[0]["nfe"] <= 2 and rows[5]["nfe"] is None
    for row in rows:
        assert row["n_samples"] == 6 and row["judge_perplexity"] > 1 and 0 < row["unigram_entropy_bits"] < math.log2(27)
        assert 0 < row["distinct_1"] <= 1 and 0 <= row["repetition_2"] <= 1 and 0 <= row["known_words"] <= 1
    assert rows[-1]["known_words"] == 1 and rows[-1]["judge_perplexity"] < rows[0]["judge_perplexity"]
    with open(tmp_path / "quality.csv") as file:
        written = list(csv.DictReader(file))
    assert [row["judge_perplexity"] for row in written] == [str(row["judge_perplexity"]) for row in rows]
    assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
    assert "perplexity" in result.err

    sampled = call("sample.py", trained, "--batch_size=3", "--steps=4", "--json")
    (tmp_path / "samples.json").write_text(sampled.out)
    rows = json.loads(call("evaluate.py", trained, "--samples", tmp_path / "samples.json", "--judge",
                           f"hf://{tiny_gpt2}", "--data_dir", data_dir, "--out_dir", tmp_path, "--json").out)["samples"]
    assert [row["sampler"] for row in rows] == ["file", "real text"] and rows[0]["n_samples"] == 3
    rows = json.loads(call("evaluate.py", trained, "--samples=2", "--sampler=threshold,entropy_bound,remdm,topk",
                           "--steps=4,8", "--threshold=0", "--gamma=1e9", "--remask=rescale", "--top_k=5",
                           "--temperature=0.5", "--data_dir", data_dir, "--json").out)["samples"]
    assert [(row["sampler"], row["steps"], row["setting"], row["nfe"]) for row in rows[:-1]] == [
        ("threshold", None, "threshold=0.0", 1), ("entropy_bound", None, "gamma=1000000000.0", 1),
        ("remdm", 4, "remask=rescale eta=0.05", rows[2]["nfe"]),
        ("remdm", 8, "remask=rescale eta=0.05", rows[3]["nfe"]),
        ("topk", 4, None, 4), ("topk", 8, None, 8)]
    assert all((row["top_k"], row["temperature"]) == (5, 0.5) for row in rows[:-1])
    rows = json.loads(call("evaluate.py", ar, "--samples=2", "--data_dir", data_dir, "--json").out)["samples"]
    assert rows[0]["sampler"] == "left_to_right" and rows[0]["nfe"] == 32 and "judge_perplexity" not in rows[0]


@pytest.fixture
def measured(monkeypatch):
    """The lists of texts whose statistics were computed."""
    found, real = [], quality.statistics_of
    monkeypatch.setattr(quality, "statistics_of", lambda texts, *more: found.append(texts) or real(texts, *more))
    return found


def test_real_text_is_as_long_as_the_samples(call, trained, data_dir, tmp_path, measured):
    """Real text is as long as the texts of a file are on average. A prefix, which no model writes, is not measured."""
    (tmp_path / "lines.txt").write_text("a" * 100 + "\n" + "b" * 60 + "\n")
    assert call("evaluate.py", trained, "--samples", tmp_path / "lines.txt", "--data_dir", data_dir, "--out_dir",
                tmp_path).code == 0
    assert [len(text) for text in measured.pop()] == [80, 80]
    out = tmp_path / "out"
    assert train(call, "mdlm_text8", data_dir, out, "--prefix=fixed:20", "--max_steps=1").code == 0
    assert call("evaluate.py", out, "--samples=3", "--steps=2", "--data_dir", data_dir).code == 0
    drawn, real = measured[-2:]
    assert [len(text) for text in drawn + real] == 6 * [12]


def test_mauve_of_samples(call, trained, ar, data_dir, tmp_path):
    """Samples are compared with real text, and real text with other real text, which is nearest to 1."""
    pytest.importorskip("mauve")
    flags = ["--judge", ar, "--data_dir", data_dir, "--out_dir", tmp_path, "--mauve", "--split=train"]
    rows = json.loads(call("evaluate.py", trained, "--samples=100", "--steps=1,16", *flags, "--json").out)["samples"]
    one, many, real = [row["mauve"] for row in rows]
    assert 0 < one < many < real < 1 and real > 0.8
    (tmp_path / "x.txt").write_text("the cat sat on the mat\n" * 100)
    done = call("evaluate.py", trained, "--samples", tmp_path / "x.txt", *flags)
    assert done.code == 0 and "MAUVE" in done.out and "WARNING" not in done.err
    for few, words in (("99", "at least 100 samples"), ("141", "has only 281 pieces of 32 tokens: choose another")):
        assert_one_line(call("evaluate.py", trained, "--samples", few, "--steps=1", *flags), words)
    assert_one_line(call("evaluate.py", trained, "--samples=100", "--mauve"), "add --samples N and --judge")


def test_read_samples(tmp_path):
    """JSON of sample.py, or a line per sample."""
    (tmp_path / "a.json").write_text(json.dumps({"samples": [{"text": "one\ntwo"}, {"text": "three"}]}))
    (tmp_path / "b.txt").write_text("one\n\ntwo\n")
    assert read_samples(tmp_path / "a.json") == ["one\ntwo", "three"]
    assert read_samples(tmp_path / "b.txt") == ["one", "two"]


def test_bad_samples(call, trained, ar, data_dir, tmp_path):
    """Files without samples, judges that cannot judge."""
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.json").write_text('{"samples": 3}')
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    go = lambda *a: call("evaluate.py", trained, "--data_dir", data_dir, "--out_dir", tmp_path, *a)
    assert_one_line(go("--samples", tmp_path / "none.txt"), "neither a number nor a file")
    assert_one_line(go("--samples", tmp_path / "empty.txt"), "has no samples")
    assert_one_line(go("--samples", tmp_path / "bad.json"), "looks like JSON")
    assert_one_line(go("--samples", tmp_path / "latin.txt"), "not UTF-8")
    (tmp_path / "deep.json").write_text('{"samples": ' + "[" * 100_000)
    assert_one_line(go("--samples", tmp_path / "deep.json"), "looks like JSON")
    (tmp_path / "surrogate.json").write_text('{"samples": [{"text": "\\ud800 a"}]}')
    assert_one_line(go("--samples", tmp_path / "surrogate.json"), "looks like JSON")
    assert_one_line(go("--samples", "0"), "outside [1, 1000000]")
    assert_one_line(go("--samples", "\u00b2"), "neither a number nor a file")
    assert_one_line(go("--samples", "2", "--text", tmp_path / "bad.json"), "leave out --text")
    assert_one_line(go("--samples", "2", "--n_tokens=64"), "leave out --n_tokens")
    assert_one_line(go("--judge", ar), "--judge needs --samples")
    for flag in ("--steps=3", "--sampler=topk", "--gamma=1", "--top_p=0.5"):
        assert_one_line(go(flag), "need --samples or --answers")
    assert_one_line(go("--samples=2", "--sampler=topk,remdm", "--gamma=1"), "--sampler topk does not use --gamma")
    assert_one_line(call("evaluate.py", ar, "--samples=2", "--steps=3", "--data_dir", data_dir), "one step per token")
    assert_one_line(call("sample.py", ar, "--sampler=topk"), "one step per token")
    assert_one_line(call("sample.py", trained, "--sampler=first_hitting", "--steps=3"), "does not use --steps")
    broken = torch.load(trained / "ckpt.pt", weights_only=True)
    broken["ema"]["embed.weight"][:] = math.nan
    broken.pop("sha256")
    storage.save(tmp_path / "broken.pt", broken)
    for script, *flags in (["evaluate.py", "--json"], ["evaluate.py", "--samples=2"], ["sample.py"]):
        assert_one_line(call(script, tmp_path / "broken.pt", *flags), "not finite")
    for sampler in ("ancestral", "topk", "threshold"):
        assert_one_line(call("sample.py", tmp_path / "broken.pt", "--temperature=0", "--sampler", sampler),
                        "not finite")
    assert_one_line(go("--samples", "2", "--judge", trained), "cannot be a judge: its objective is mdlm")
    assert_one_line(go("--samples", "2", "--judge", "hf://" + str(tmp_path)), "cannot be loaded as a causal language")
    model, tokenizer = make("bert")
    for part in (model.bert, tokenizer):  # without the head
        part.save_pretrained(tmp_path / "bert")
    assert_one_line(go("--samples", "2", "--judge", f"hf://{tmp_path / 'bert'}"), "lacks weights of BertLMHeadModel")
    (tmp_path / "bert/model.safetensors").write_bytes(b"cut off")
    assert_one_line(go("--samples", "2", "--judge", f"hf://{tmp_path / 'bert'}"), "cannot be loaded as a causal")
    for part in make("roberta"):
        part.save_pretrained(tmp_path / "roberta")
    assert_one_line(go("--samples", "2", "--judge", f"hf://{tmp_path / 'roberta'}"), "sees the text on the right")
    assert train(call, "ar_text8", data_dir, tmp_path / "after", "--prefix=fixed:8", "--max_steps=1").code == 0
    assert_one_line(go("--samples", "2", "--judge", tmp_path / "after"), "cannot be a judge: it needs a prefix")
    assert_one_line(go("--samples", "2", "--sampler=best"), "'best' is unknown: choose from ancestral")
    assert_one_line(go("--samples", "2", "--steps=4,x"), "'x' is not an integer")
    assert_one_line(go("--samples", "2", "--out_dir", tmp_path / "no" / "where"), "cannot be made")
    (tmp_path / "strange.txt").write_text("Ünknown letters\n")
    assert_one_line(go("--samples", tmp_path / "strange.txt", "--steps=3"), "--samples FILE draws no samples")
    assert_one_line(go("--samples", tmp_path / "strange.txt"), "not in the alphabet")

    (tmp_path / "text.txt").write_text("ABC abc " * 200)
    assert call("data/prepare_textfile.py", tmp_path / "text.txt", "--name", "caps", "--data_dir", data_dir).code == 0
    assert train(call, "ar_text8", data_dir, tmp_path / "caps", "--dataset=caps", "--max_steps=1").code == 0
    assert_one_line(go("--samples", "2", "--judge", tmp_path / "caps"), "another alphabet")
