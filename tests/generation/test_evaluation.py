"""sample.py --evaluate: the loss on a prepared set, and how many of its answers a model gives."""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import TINY_RUN, logits_of, random_gpt
from known_models import forward_hook, gpt_of, gpt_that_likes, gpt_that_writes, parsed, save
from torch.nn import functional as F

import prepare
import sample
import train
from kqv.generation import evaluation
from kqv.generation.engine import Engine
from kqv.generation.sampling import Sampling
from kqv.generation.stream import generate
from kqv.text import dataset, dataset_writer
from kqv.text.text_stream import TextStream
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, ChatTokenizer

TOK = ChatTokenizer(CharTokenizer("abcd789"))
SIZE = {"vocab_size": TOK.vocab_size, "block_size": 24, "n_embd": 32}  # a GPTConfig
TALKS = [
    [("user", "ab"), ("assistant", "7")],
    [("user", "ba"), ("assistant", "77")],
    [("system", "dd"), ("user", "a"), ("assistant", "98")],
    [("user", "bcd" * 3), ("assistant", "7899")],
    [("user", "a"), ("assistant", "88"), ("user", "b"), ("assistant", "7")],
    [("user", "abcdabcdabcda"), ("assistant", "789789789")],  # one id longer than block_size
    [("user", "cc"), ("assistant", "")],
    [("user", "abcdabcdabcd"), ("assistant", "789789789")],  # as long as block_size
]
FITTING = [talk for talk in TALKS if len(TOK.encode_chat(talk)) <= SIZE["block_size"] + 1]


def write_set(val, train=TALKS, tok=TOK, name="talk", **about):
    """A prepared set of conversations or of texts."""
    encode = tok.encode_chat if tok.kind == "chat" else tok.encode
    splits = {"train": train, "val": val}
    ids = {split: np.concatenate([encode(document) for document in some]) for split, some in splits.items()}
    dataset_writer.write(Path("data") / name, ids, tok, about)
    return f"--dataset={name}"


@pytest.fixture
def evaluate(cli):
    """Evaluate the model in out: evaluate("--beams=2") -> (a record for each conversation, the numbers)."""

    def succeed(*argv):
        status, out, err = cli(
            sample.main, "--device=cpu", "--evaluate=val", "--dataset=talk", "--format=jsonl", *argv
        )
        assert (status, err) == (0, "")
        *records, numbers = parsed(out)
        return records, numbers

    return succeed


@pytest.fixture
def random_model(cli, tmp_path):
    """A GPT of random weights for TOK, also as the checkpoint in out."""
    gpt = random_gpt(seed=3, std=0.5, **SIZE)
    save(gpt, TOK, tmp_path / "out")
    return gpt


@torch.no_grad()
def losses_of(gpt, ids):
    """How much each of the ids (T,) but the first surprises the model, (T - 1,)."""
    ids = torch.from_numpy(ids.astype(np.int64))
    logprobs = logits_of(gpt, ids[None, :-1])[0].log_softmax(dim=-1)  # (T - 1, V)
    return -logprobs.gather(1, ids[1:, None])[:, 0].numpy()


# The loss


def test_the_loss_is_the_mean_over_all_that_is_to_be_learnt(evaluate, random_model):
    write_set(TALKS)
    losses = []
    for talk in FITTING:
        ids = TOK.encode_chat(talk)
        losses += losses_of(random_model, ids)[TOK.is_learnt(ids)[1:]].tolist()
    assert len(losses) == sum(len(text) + 1 for talk in FITTING for role, text in talk if role == "assistant")
    for batch_size in (1, 2, 3, 64):
        _, numbers = evaluate(f"--batch_size={batch_size}")
        assert numbers["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert numbers["tokens"] == len(losses)
        assert "bits_per_byte" not in numbers  # conversations have no count of bytes


@pytest.mark.parametrize("length", [2, 7, 24, 25, 26, 48, 49, 200])
def test_every_token_of_a_text_counts_once(evaluate, cli, tmp_path, length):
    tok = CharTokenizer("abc€")
    gpt = random_gpt(**{**SIZE, "vocab_size": 4})
    save(gpt, tok, tmp_path / "out")
    text = "".join("abc€"[i * i % 7 % 4 or 3] for i in range(length))
    size = len(text.encode())
    write_set(text, train="abc" * 30, tok=tok, bytes={"train": 90, "val": size})
    ids, losses = tok.encode(text), []
    for start in range(0, length - 1, SIZE["block_size"]):
        losses += losses_of(gpt, ids[start : start + SIZE["block_size"] + 1]).tolist()
    for batch_size in (1, 3, 64):
        records, numbers = evaluate(f"--batch_size={batch_size}")
        assert numbers["tokens"] == len(losses) == length - 1
        assert numbers["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert numbers["bits_per_byte"] == pytest.approx(numbers["loss"] / math.log(2) * length / size)
        assert records == [] and "examples" not in numbers
    status, out, _ = cli(sample.main, "--device=cpu", "--evaluate=val", "--dataset=talk")
    assert status == 0
    assert out == (
        "data/talk, val split\n"
        f"loss {numbers['loss']:.4f} nats per token, over {length - 1} tokens: "
        f"{numbers['bits_per_byte']:.4f} bits per byte\n"
    )


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["texts", "conversations"])
def test_logits_that_are_not_finite_are_an_error(refusal, tmp_path, wrong, kind):
    tok = TOK if kind == "conversations" else TOK.base
    save(gpt_of([0.0, wrong, *[0.0] * (tok.vocab_size - 2)]), tok, tmp_path / "out")
    argv = ["--device=cpu", "--evaluate=val", write_set(*[TALKS if tok is TOK else "abcd" * 9] * 2, tok=tok)]
    for more in ([], ["--format=jsonl"]):
        assert "the model's logits are not finite" in refusal(sample.main, *argv, *more)


def test_a_loss_has_no_dropout_whatever_the_mode_of_the_model(random_model):
    write_set(FITTING)
    data = dataset.Dataset("talk")
    expected = evaluation.mean_loss(random_model, data, "val", 4)
    gpt = random_gpt(seed=3, std=0.5, dropout=0.5, **SIZE).train()
    assert evaluation.mean_loss(gpt, data, "val", 4) == expected and gpt.training


def test_each_split_by_its_name(evaluate, random_model):
    write_set(TALKS[:2], train=TALKS[2:5])
    for split, talks in (("val", TALKS[:2]), ("train", TALKS[2:5])):
        records, numbers = evaluate(f"--evaluate={split}")
        assert numbers["split"] == split and numbers["dataset"] == "data/talk"
        assert [record["expected"] for record in records] == [talk[-1][1] for talk in talks]
    assert numbers["tokens"] == len("98") + len("7899") + len("88") + len("7") + 4


def test_losses_of_lower_precision_are_not_rounded(evaluate, random_model):
    write_set(TALKS)
    exact = evaluate()[1]["loss"]
    for name in ("bfloat16", "float16"):
        loss = evaluate(f"--dtype={name}")[1]["loss"]
        assert loss == pytest.approx(exact, rel=0.02)
        assert torch.tensor(loss).to(getattr(torch, name)).item() != loss


def test_the_precision_is_that_of_the_text(evaluate, random_model):
    write_set(TALKS)
    seen = []

    def observe(embedding, ids):
        seen.append((embedding.weight.dtype, embedding.training, torch.is_grad_enabled()))

    for dtype in (torch.float32, torch.bfloat16):
        with forward_hook(TOK.vocab_size, observe):
            evaluate(f"--dtype={str(dtype).removeprefix('torch.')}")
        assert set(seen) == {(dtype, False, False)}
        seen.clear()


# The answers


@pytest.fixture
def writes(cli, tmp_path):
    """Make the model in out one that answers a prompt of 5 ids so: writes("77")."""

    def make(answer):
        ids = [0, 0, 0, 0, *TOK.encode(answer).tolist(), TOK.separator]
        save(gpt_that_writes(ids, TOK.vocab_size), TOK, tmp_path / "out")

    return make


ASKED = ["ab", "ba", "cc", "dd", "da"]


def test_an_answer_is_right_where_it_is_the_same_to_the_end(evaluate, writes):
    answers = ["77", "7", "77", "777", "78"]
    write_set([[("user", q), ("assistant", a)] for q, a in zip(ASKED, answers, strict=True)])
    writes("77")
    records, numbers = evaluate()
    assert records == [
        {"prompt": question, "text": "77", "expected": answer, "match": answer == "77"}
        for question, answer in zip(ASKED, answers, strict=True)
    ]
    assert (numbers["matches"], numbers["examples"], numbers["exact_match"]) == (2, 5, 0.4)
    writes("")
    records, numbers = evaluate()
    assert {record["text"] for record in records} == {""} and numbers["exact_match"] == 0


def test_the_numbers_in_words(evaluate, writes, cli, monkeypatch):
    write_set([[("user", q), ("assistant", "77")] for q in (*ASKED[:2], "a" * 70)] + TALKS[:1])
    writes("77")
    argv = ["--device=cpu", "--evaluate=val", "--dataset=talk"]
    loss = evaluate()[1]["loss"]
    status, out, err = cli(sample.main, *argv)
    assert (status, err) == (0, "")
    assert out == (
        "data/talk, val split\n"
        f"loss {loss:.4f} nats per token, over 8 tokens\n"
        "exact match 66.67%, 2 of 3 conversations; 1 left out, longer than block_size=64\n"
    )
    status, out, err = cli(sample.main, *argv, "--max_examples=2")
    assert out.splitlines()[0] == "data/talk, val split, of which at most the first 2 conversations"
    assert out.splitlines()[2] == "exact match 100.00%, 2 of 2 conversations"
    writes("9")
    assert "exact match 0.00%, 0 of 3 conversations" in cli(sample.main, *argv)[1]


def test_the_last_answer_follows_from_all_that_was_said(evaluate, random_model):
    """Each conversation as a program would ask for its answer, with the ids that the model is to read."""
    write_set(TALKS)
    records, numbers = evaluate("--max_new_tokens=3")
    engine, alone = Engine(random_model), []
    for talk, record in zip(FITTING, records, strict=True):
        for read in (talk[:-1], talk[-2:-1]):
            ids = TOK.encode_chat(read).tolist()
            (whole,) = generate(engine, [ids], 3, sampling=Sampling(temperature=0), vocab_size=TOK.vocab_size)
            text = TextStream(TOK)
            alone.append("".join(map(text.feed, whole[len(ids) :])) + text.finish())
        assert record["text"] == alone[-2]
    assert alone[::2] != alone[1::2]  # what was said before the last question matters
    assert [record["expected"] for record in records] == [talk[-1][1] for talk in FITTING]
    said = ["ab", "ba", "dd\na", "bcd" * 3, "a\n88\nb", "cc", "abcdabcdabcd"]
    assert [record["prompt"] for record in records] == said
    assert (numbers["examples"], numbers["left_out"], numbers["block_size"]) == (7, 1, 24)


@pytest.mark.parametrize("beams", [0, 3])
def test_answers_are_the_likeliest_whatever_the_batches(evaluate, cli, random_model, beams):
    simple = [talk for talk in FITTING if len(talk) == 2]
    write_set(simple)
    (found, numbers) = evaluate(f"--beams={beams}", "--max_new_tokens=4")
    for record in found:
        how = f"--beams={beams}" if beams else "--temperature=0"
        argv = [f"--start={record['prompt']}", how, "--max_new_tokens=4"]
        status, out, err = cli(sample.main, "--device=cpu", *argv)
        assert (status, out, err) == (0, f"{record['text']}\n", "")
    assert len({record["text"] for record in found}) > 2
    for batch_size in (1, 2):
        assert evaluate(f"--beams={beams}", "--max_new_tokens=4", f"--batch_size={batch_size}") == (
            found,
            {**numbers, "loss": pytest.approx(numbers["loss"])},
        )
    if beams:
        assert found != evaluate("--max_new_tokens=4")[0]


def test_an_answer_ends_by_max_new_tokens_or_where_the_context_is_full(evaluate, cli, tmp_path):
    save(gpt_that_likes([4], TOK.vocab_size), TOK, tmp_path / "out")  # it says 7 for ever
    write_set([[("user", "ab"), ("assistant", "7")], [("user", "abcdab"), ("assistant", "77")]])
    records, numbers = evaluate("--max_new_tokens=2")
    assert [record["text"] for record in records] == ["77", "77"] and numbers["matches"] == 1
    records, numbers = evaluate()
    assert records[0]["text"] == "7" * (16 + 1 - 5)  # the block_size of that model
    assert numbers["matches"] == 0


def test_a_separator_with_a_text_is_no_part_of_what_is_said(evaluate, cli, tmp_path, monkeypatch):
    """GPT-2's reads <|endoftext|>."""
    monkeypatch.setattr(
        ByteTokenizer,
        "decode_bytes",
        lambda self, ids: b"".join(bytes([i]) if i < 256 else b"<end>" for i in ids),
    )
    tok = ChatTokenizer(ByteTokenizer())
    save(random_gpt(**{**SIZE, "vocab_size": tok.vocab_size}), tok, tmp_path / "out")
    write_set([TALKS[4]], tok=tok)
    (record,), _ = evaluate()
    assert (record["prompt"], record["expected"]) == ("a\n88\nb", "7")


def test_the_first_examples_alone(evaluate, random_model):
    for number in (1, 5, 6, 8):  # the sixth does not fit
        write_set(TALKS)
        records, numbers = evaluate(f"--max_examples={number}")
        write_set(TALKS[:number])
        records_of_all, numbers_of_all = evaluate()
        assert (numbers.pop("max_examples"), numbers_of_all.pop("max_examples")) == (number, 0)
        assert (records, numbers) == (records_of_all, numbers_of_all)
    write_set(TALKS)
    assert evaluate("--max_examples=1000")[0] == evaluate()[0]


# BLEU

SENTENCES = {
    "the cat sat on the mat today": "the cat sat on the mat",
    "a dog ran to the red house": "the cat sat on the mat",
    "the cat is on the mat": "the cat sat on the mat",
}


@pytest.fixture
def translator(cli, tmp_path):
    """A model in out that translates whatever it is asked by the same sentence, and a set of sentences."""
    (answer,) = set(SENTENCES.values())
    tok = ChatTokenizer(ByteTokenizer())
    ids = [0, 0, 0, *tok.encode(answer).tolist(), tok.separator]
    save(gpt_that_writes(ids, tok.vocab_size), tok, tmp_path / "out")
    talks = [[("user", "?"), ("assistant", expected)] for expected in SENTENCES]
    write_set(talks, train=talks, tok=tok)


def test_bleu_is_sacrebleus(evaluate, translator, cli):
    records, numbers = evaluate("--bleu")
    assert [record["text"] for record in records] == list(SENTENCES.values())
    expected = sacrebleu.corpus_bleu(list(SENTENCES.values()), [list(SENTENCES)])
    assert 10 < expected.score < 90
    assert numbers["bleu"] == pytest.approx(expected.score)
    assert numbers["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "bleu" not in evaluate()[1]
    out = cli(sample.main, "--device=cpu", "--evaluate=val", "--dataset=talk", "--bleu=True")[1]
    assert out.splitlines()[-1] == f"BLEU {expected.score:.2f}, {numbers['bleu_signature']}"


def test_without_sacrebleu_nothing_is_computed_first(refusal, translator, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with forward_hook(260, lambda *_: pytest.fail("it computes")):
        line = refusal(sample.main, "--device=cpu", "--evaluate=val", "--dataset=talk", "--bleu")
    assert "pip install sacrebleu" in line


# From rows to numbers


def test_a_trained_model_knows_the_set_it_learnt(cli, tmp_path):
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli(prepare.main, "sums.jsonl", "--val_fraction=0.3")[0] == 0
    argv = [*TINY_RUN, "--dataset=sums", "--max_iters=60", "--eval_interval=60", "--lr_decay_iters=60"]
    status, printed, err = cli(train.main, *argv, "--eval_iters=1000")
    assert status == 0, err
    status, out, err = cli(sample.main, "--device=cpu", "--evaluate=val", "--checkpoint=newest")
    assert (status, err) == (0, "")
    shown = re.fullmatch(
        r"data/sums, val split\nloss (\d\.\d{4}) nats per token, over \d+ tokens\n"
        r"exact match (\d+\.\d\d)%, (\d+) of (\d+) conversations\n",
        out,
    )
    loss, share, matches, count = map(float, shown.groups())
    assert count == len(list(dataset.Dataset("sums").conversations("val")))
    assert share == pytest.approx(100 * matches / count, abs=0.01)
    (learnt,) = re.findall(r"step 60: train loss [\d.]+, val loss ([\d.]+)", printed)
    assert loss == pytest.approx(float(learnt), abs=0.1)  # which weighs batches alike, and takes some twice


# What can not be


def test_splits_and_settings_that_are_none(refusal):
    assert "--evaluate=vall" in refusal(sample.main, "--evaluate=vall", status=2)
    assert "max_examples is -1" in refusal(sample.main, "--evaluate=val", "--max_examples=-1", status=2)


def test_a_set_that_is_not_there(refusal, random_model):
    assert "--dataset=" in refusal(sample.main, "--device=cpu", "--evaluate=val", status=2)
    line = refusal(sample.main, "--device=cpu", "--evaluate=val", "--dataset=plays_chat")
    assert "data/plays_chat" in line and "python prepare.py plays_chat" in line


def test_a_set_of_another_tokenizer(refusal, random_model):
    for tok in (ChatTokenizer(CharTokenizer("abcd7890")), ChatTokenizer(ByteTokenizer()), ByteTokenizer()):
        talks = TALKS if tok.kind == "chat" else ["abcd" * 10]
        name = write_set(talks, train=talks, tok=tok)
        line = refusal(sample.main, "--device=cpu", "--evaluate=val", name)
        assert "data/talk" in line and "another tokenizer" in line and "--tokenizer" in line


def test_a_model_of_conversations_has_a_loss_on_texts(evaluate, random_model):
    write_set(["abcdabdcacbd"], train=["abcd"], tok=TOK.base)
    ids = torch.from_numpy(TOK.base.encode("abcdabdcacbd").astype(np.int64))
    records, numbers = evaluate()
    with torch.no_grad():
        logits = random_model(ids[None, :-1])[0, :, : TOK.base.vocab_size]
    assert records == [] and "exact_match" not in numbers and numbers["tokens"] == 11
    assert numbers["loss"] == pytest.approx(F.cross_entropy(logits, ids[1:]).item(), abs=1e-5)


@pytest.mark.parametrize(
    "argument",
    ["--bleu", "--max_examples=3", "--max_examples=0", "--beams=2", "--stop=a", "--max_new_tokens=9"],
)
def test_texts_have_no_answers(refusal, tmp_path, argument):
    save(random_gpt(**{**SIZE, "vocab_size": 7}), TOK.base, tmp_path / "out")
    name = write_set("abcd", train="abcd", tok=TOK.base)
    line = refusal(sample.main, "--device=cpu", "--evaluate=val", name, argument, status=2)
    assert argument.split("=")[0] in line and "data/talk" in line


def test_splits_with_nothing_to_evaluate(refusal, random_model, tmp_path):
    argv = ["--device=cpu", "--evaluate=val", write_set([TALKS[5]])]
    line = refusal(sample.main, *argv)
    assert "no conversation of the val split" in line and "block_size=24" in line
    assert "no conversation" in refusal(sample.main, *argv, "--max_examples=1")
    save(random_gpt(**{**SIZE, "vocab_size": 7}), TOK.base, tmp_path / "out")
    write_set("a", train="abcd", tok=TOK.base)
    assert "the val split of data/talk is too short" in refusal(sample.main, *argv)
