"""sample.py end to end: the text it prints, from checkpoints that a test trains or writes itself."""

import codecs
import fcntl
import io
import json
import math
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest
import torch
from conftest import ROOT, process_environment, random_gpt, train_in

import sample
from kqv import device
from kqv.formats import checkpoint, loading
from kqv.generation import writer
from kqv.generation.engine import COMPILE_FROM, compiling_pays, generation_dtype
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, ChatTokenizer
from kqv.training.start import padded
from model import GPT, GPTConfig

SEPARATOR = "\n---------------\n"
SMALL = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}  # a GPTConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, made once: checkpoints of a small model that has begun to learn."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=30", "--dropout=0.2")
    return folder / "out"


@pytest.fixture
def write(cli, trained):
    """Call sample.py on the trained model, far from its data: write("--start=keys") -> the text."""

    def succeed(*argv):
        status, out, err = cli(
            sample.main, f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=40", *argv
        )
        assert (status, err) == (0, "")
        return out

    return succeed


def save(gpt, tokenizer, folder, name="ckpt.pt"):
    """A checkpoint in `folder`, which is returned."""
    folder.mkdir(exist_ok=True)
    contents = {
        "model": gpt.state_dict(),
        "model_args": vars(gpt.config),
        "config": {},
        "tokenizer": tokenizer.to_json(),
    }
    checkpoint.save(folder / name, contents)
    return folder


@torch.no_grad()
def gpt_of(logits):
    """A GPT that gives the same logits whatever it reads."""
    gpt = GPT(GPTConfig(vocab_size=len(logits), **SMALL))
    gpt.transformer.ln_f.weight.zero_()
    gpt.transformer.ln_f.bias.zero_()[0] = 1
    gpt.lm_head.weight[:, 0] = torch.as_tensor(logits)
    return gpt


def gpt_that_likes(favourites, vocab_size):
    """A GPT that finds some ids likeliest, whatever it reads."""
    logits = torch.zeros(vocab_size)
    logits[list(favourites)] = 30
    return gpt_of(logits)


@torch.no_grad()
def gpt_that_writes(ids, vocab_size):
    """A GPT that is sure of `ids` after a prompt of one token, and of ids[n:] after one of n more."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=64))
    gpt.lm_head.weight.copy_(torch.nn.functional.normalize(torch.randn(vocab_size, 64)))
    gpt.transformer.wpe.weight.zero_()
    gpt.transformer.wpe.weight[: len(ids)] = 100 * gpt.lm_head.weight[list(ids)]  # a position's next id
    gpt.transformer.h[0].attn.c_proj.weight.zero_()
    gpt.transformer.h[0].mlp.c_proj.weight.zero_()
    gpt.transformer.ln_f.weight.fill_(10)  # so that nothing else is ever drawn
    return gpt


def command(*arguments):
    return [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *map(str, arguments)]


def parsed(out):
    return [json.loads(line) for line in out.splitlines()]


# The text


def test_text_begins_with_the_prompt_and_goes_on(write):
    out = write("--start=keys and ")
    assert out.startswith("keys and ") and out.endswith("\n")
    assert len(out) == len("keys and ") + 40 + 1


def test_the_same_seed_writes_the_same_text(write):
    assert write("--seed=5") == write("--seed=5")
    assert write("--seed=5") != write("--seed=6")


def test_several_samples_are_separated_as_in_nanogpt(write):
    out = write("--num_samples=3", "--start=keys")
    assert out.endswith(SEPARATOR)
    samples = out.removesuffix(SEPARATOR).split(SEPARATOR)
    assert len(set(samples)) == 3
    assert all(text.startswith("keys") and len(text) == 44 for text in samples)


def test_a_single_sample_is_the_text_alone(write):
    assert "---" not in write("--num_samples=1")


def test_temperature_zero_takes_the_likeliest_token(write, trained):
    contents = loading.load(trained / "best.pt")
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    tok = loading.tokenizer_of(contents)
    ids = torch.tensor([tok.encode("keys").tolist()])  # (1, T)
    for _ in range(12):  # up to block_size, so that nothing is forgotten
        ids = torch.cat([ids, gpt(ids)[:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert (
        write("--start=keys", "--temperature=0", "--max_new_tokens=12") == tok.decode(ids[0].tolist()) + "\n"
    )
    assert write("--temperature=0", "--seed=5") == write("--temperature=0", "--seed=6")
    assert write("--top_k=1", "--seed=5") == write("--temperature=0")


def test_streamed_text_is_that_of_a_batch(write):
    alone = write("--start=keys", "--temperature=0")
    assert write("--start=keys", "--temperature=0", "--num_samples=2") == 2 * (alone + SEPARATOR.lstrip("\n"))


def test_text_grows_past_the_context(write):
    assert len(write("--start=keys", "--max_new_tokens=100")) == 4 + 100 + 1  # block_size is 16
    assert write("--max_new_tokens=30", "--seed=5")[:-1] == write("--max_new_tokens=100", "--seed=5")[:31]


def test_no_new_tokens_leave_the_prompt(write):
    assert write("--start=keys", "--max_new_tokens=0") == "keys\n"
    assert write("--start=keys", "--max_new_tokens=0", "--num_samples=2") == 2 * ("keys" + SEPARATOR)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_writes_too(write, dtype):
    assert len(write("--start=keys", f"--dtype={dtype}")) == 45


@pytest.mark.slow  # the compiler takes its time
def test_compiled_text_is_that_of_the_plain_model(write, cli, trained):
    argv = [f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=40"]  # past block_size
    status, out, err = cli(sample.main, *argv, "--compile=True")
    assert status == 0, err  # which may hold the compiler's own warnings
    assert out == write("--compile=False")


# The prompt


def test_prompt_from_a_file(write, tmp_path):
    (tmp_path / "prompt.txt").write_text("tokens, é"[:6] + " é", "utf-8")
    assert write("--start=FILE:prompt.txt").startswith("tokens é")
    assert write(f"--start=FILE:{tmp_path / 'prompt.txt'}") == write("--start=tokens é")


def test_prompt_from_standard_input(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("masks é".encode())))
    assert write("--start=-") == write("--start=masks é")


# Which weights


def test_best_newest_or_any_checkpoint(cli, tmp_path):
    tok = CharTokenizer("abc")
    save(gpt_that_likes([0], 3), tok, tmp_path / "out", "ckpt.pt")
    save(gpt_that_likes([1], 3), tok, tmp_path / "out", "best.pt")
    save(gpt_that_likes([2], 3), tok, tmp_path / "other", "any.pt")

    def letter(*argv):
        status, out, err = cli(
            sample.main, "--start=c", "--temperature=0", "--max_new_tokens=3", "--device=cpu", *argv
        )
        assert (status, err) == (0, "")
        return out

    assert letter() == letter("--checkpoint=best") == "cbbb\n"
    assert letter("--checkpoint=newest") == letter("--checkpoint=out/ckpt.pt") == "caaa\n"
    assert letter("--checkpoint=other/any.pt") == letter("--init_from=other/any.pt") == "cccc\n"
    assert letter("--init_from=out", "--out_dir=nowhere") == "cbbb\n"
    (tmp_path / "out/best.pt").unlink()
    assert letter() == letter("--checkpoint=best") == "caaa\n"


def test_nothing_but_the_checkpoint_is_needed(write, tmp_path):
    write("--start=keys")
    assert list(tmp_path.iterdir()) == []


# Ids and characters


@pytest.mark.parametrize("draw", ["--temperature=0", "--temperature=1.5", "--top_k=3", "--top_k=0"])
def test_ids_beyond_the_vocabulary_are_never_written(cli, tmp_path, draw):
    chars = "".join(map(chr, range(0x4E00, 0x4E00 + 1100)))
    assert padded(len(chars)) == 1152
    save(gpt_that_likes(range(1100, 1152), 1152), CharTokenizer(chars), tmp_path / "out")
    for samples in (1, 2):
        argv = [
            f"--start={chars[:5]}",
            f"--num_samples={samples}",
            "--max_new_tokens=30",
            "--device=cpu",
            draw,
        ]
        status, out, err = cli(sample.main, *argv)
        assert (status, err) == (0, "")
        assert set(out) - set(chars) <= set(SEPARATOR)
        assert len(out.replace(SEPARATOR, "").strip()) == samples * 35


@pytest.fixture
def recite(cli, tmp_path):
    """
    Call sample.py with a byte model that writes given ids: recite(b"abc", "--stop=c") -> what it prints.
    """

    def succeed(ids, *argv):
        save(gpt_that_writes(ids, 257), ByteTokenizer(), tmp_path / "out")
        status, out, err = cli(
            sample.main, "--start=>", "--device=cpu", f"--max_new_tokens={len(ids)}", *argv
        )
        assert (status, err) == (0, "")
        return out

    return succeed


TEXTS = {
    "characters of one to four bytes": "aé€😀".encode(),
    "a stray byte": b"a\xffb",
    "a character that is cut off": "aé".encode()[:-1],
    "a character broken by another": b"\xe2\x82A\xc3\xc3\xa9",
}


@pytest.mark.parametrize("ids", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_bytes_become_the_text_of_all_bytes(recite, ids):
    expected = ">" + ids.decode("utf-8", errors="replace")
    assert recite(ids) == expected + "\n"
    assert recite(ids, "--num_samples=2") == 2 * (expected + SEPARATOR)


def test_a_token_is_shown_before_the_next_is_drawn_and_a_character_when_it_is_whole(recite, monkeypatch):
    shown, stream = [], sample.stream

    def observed(*arguments):
        for drawn in stream(*arguments):
            yield drawn
            shown.append(sys.stdout.getvalue())

    class Unbuffered(io.StringIO):
        """What has been flushed."""

        def getvalue(self):
            return self.flushed

        def flush(self):
            self.flushed = super().getvalue()

    monkeypatch.setattr(sample, "stream", observed)
    with pytest.MonkeyPatch.context() as patch:
        written = Unbuffered()
        written.reconfigure = lambda **_: None
        patch.setattr(sys, "stdout", written)
        recite("é!😀".encode())
    assert shown == [">", ">é", ">é!", ">é!", ">é!", ">é!", ">é!😀"]
    assert written.getvalue() == ">é!😀\n"


def test_text_goes_out_on_a_terminal_of_another_encoding(trained):
    environment = process_environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    arguments = command(f"--out_dir={trained}", "--start=é", "--max_new_tokens=3")
    done = subprocess.run(arguments, env=environment, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    codecs.decode(done.stdout, "ascii")


# The end of a text


@pytest.fixture
def steps(monkeypatch):
    """How many tokens were drawn by each call of `stream`."""
    counts, stream = [], sample.stream

    def counted(*arguments):
        counts.append(0)
        for drawn in stream(*arguments):
            counts[-1] += 1
            yield drawn

    monkeypatch.setattr(sample, "stream", counted)
    return counts


@pytest.mark.parametrize(
    "text, stops, expected, tokens",
    [
        ("one two three", ["two"], "one ", 7),
        ("one two three", ["three", "two"], "one ", 7),
        ("one two three", ["e", " t"], "on", 3),
        ("one two three", ["o"], "", 1),
        ("one two", ["twos", "x"], "one two", 7),
        ("a€b😀c", ["€b😀"], "a", 9),
        ("a€b", ["\u20ad"], "a€b", 5),  # shares its first bytes with the euro
        ("one\n\ntwo", ["\n\n"], "one", 5),
        ("aaab", ["aab"], "a", 4),
    ],
)
def test_a_text_ends_before_the_first_stop_and_no_more_is_drawn(recite, steps, text, stops, expected, tokens):
    given = [f"--stop={stop}" for stop in stops]
    assert recite(text.encode(), *given) == f">{expected}\n"
    assert recite(text.encode(), *given, "--num_samples=2") == 2 * f">{expected}{SEPARATOR}"
    assert steps == [tokens, tokens]
    (record,) = parsed(recite(text.encode(), *given, "--format=jsonl"))
    end = "stop" if expected != text else "length"
    assert record == {"prompt": ">", "sample": 0, "text": expected, "tokens": tokens, "end": end}


def test_a_stop_in_the_prompt_or_across_its_end_is_none(recite):
    assert recite(b"bc", "--start=a", "--stop=a", "--stop=ab") == "abc\n"


def test_a_character_model_stops_too(write):
    whole = write("--start=keys", "--temperature=0")[4:-1]
    stop = whole[6:9]
    assert write("--start=keys", "--temperature=0", "--stop", stop) == f"keys{whole[: whole.index(stop)]}\n"


def test_what_may_begin_a_stop_is_held_back_until_that_is_known(recite, monkeypatch):
    shown, events = [], writer.Writer.events

    def observed(*arguments):
        for event in events(*arguments):
            shown.append(event[2])
            yield event

    monkeypatch.setattr(writer.Writer, "events", observed)
    assert recite(b"a<|b<|en", "--stop=<|end|>") == ">a<|b<|en\n"
    assert shown == ["a", "", "", "<|b", "", "", "", "", "<|en"]  # the last: when no token comes any more


def test_each_text_of_a_batch_stops_by_itself(recite, steps, tmp_path):
    (tmp_path / "prompts.txt").write_text("1\n12345678\n1234\n")  # the last two start further on
    argv = ["--start=", "--prompts=prompts.txt", "--stop=stop", "--format=jsonl"]
    records = parsed(recite(b"ab stop cd and so on", *argv, "--max_new_tokens=9"))
    assert [(record["text"], record["tokens"], record["end"]) for record in records] == [
        ("ab ", 7, "stop"),
        (" cd and s", 9, "length"),
        ("", 4, "stop"),
    ]
    recite(b"ab stop cd stop ef", *argv)
    assert steps == [9, 8]  # nothing is drawn once all have stopped


def test_the_end_of_text_ends_a_text(recite, steps):
    ids = [*b"ab", 256, *b"cd"]
    assert recite(ids) == ">ab\n"
    assert recite(ids, "--num_samples=2") == 2 * (">ab" + SEPARATOR)
    assert recite([*b"a", "é".encode()[0], 256]) == ">a\ufffd\n"
    assert recite(ids, "--stop=bc") == ">ab\n"  # what was held back is part of the text
    assert steps == [3, 3, 3, 3]
    (record,) = parsed(recite(ids, "--format=jsonl"))
    assert (record["text"], record["tokens"], record["end"]) == ("ab", 3, "end_of_text")
    (record,) = parsed(recite(ids, "--format=jsonl", "--beams=2"))
    assert (record["text"], record["tokens"], record["end"]) == ("ab", 3, "end_of_text")
    assert recite(ids, "--beams=2") == ">ab\n"


def test_an_empty_stop_is_refused(refusal):
    assert "--stop is empty" in refusal(sample.main, "--stop=a", "--stop=", status=2)


# A JSON object for each text


def test_jsonl_says_the_text_of_the_text_format(write):
    argv = ["--start=keys é", "--num_samples=3", "--stop=s ", "--stop=."]
    records = parsed(write(*argv, "--format=jsonl"))
    texts = write(*argv).removesuffix(SEPARATOR).split(SEPARATOR)
    assert [record["prompt"] + record["text"] for record in records] == texts
    assert [record["sample"] for record in records] == [0, 1, 2]
    for record in records:
        assert list(record) == ["prompt", "sample", "text", "tokens", "end"]
        assert record["end"] in ("length", "stop")
        assert record["tokens"] == 40 if record["end"] == "length" else record["tokens"] > len(record["text"])


def test_jsonl_of_one_text_that_ends_by_its_length(write):
    (record,) = parsed(write("--start=keys", "--seed=4", "--format=jsonl"))
    assert (record["tokens"], record["end"], len(record["text"])) == (40, "length", 40)
    assert write("--start=keys", "--seed=4") == f"keys{record['text']}\n"


# Log-probabilities


@pytest.fixture(scope="module")
def model(trained):
    """(the trained GPT, its tokenizer)"""
    contents = loading.load(trained / "best.pt")
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    return gpt, loading.tokenizer_of(contents)


@torch.no_grad()
def logprobs_after(gpt, ids):
    return gpt(torch.tensor([ids]))[0, -1].log_softmax(dim=-1)  # (V,)


@pytest.mark.parametrize("draw", ["--temperature=0", "--temperature=3", "--repetition_penalty=2"])
def test_logprobs_are_the_models_own_whatever_is_made_of_them(write, model, draw):
    gpt, tok = model
    argv = ["--num_samples=2", "--max_new_tokens=11", draw, "--start=keys"]  # within block_size
    lines = parsed(write(*argv, "--logprobs"))
    texts = [record["text"] for record in parsed(write(*argv, "--format=jsonl"))]
    for copy, text in enumerate(texts):
        ids, said = tok.encode("keys").tolist(), [line for line in lines if line["sample"] == copy]
        assert [line["token"] for line in said] == list(text)
        for line in said:
            expected = logprobs_after(gpt, ids)
            assert line["prompt"] == 0 and tok.decode([line["id"]]) == line["token"]
            assert line["logprob"] == pytest.approx(expected[line["id"]].item(), abs=1e-4)
            top = line["top"]
            assert [entry["logprob"] for entry in top] == pytest.approx(
                expected.topk(5).values.tolist(), abs=1e-4
            )
            for entry in top:
                assert entry["logprob"] == pytest.approx(expected[entry["id"]].item(), abs=1e-4)
                assert tok.decode([entry["id"]]) == entry["token"]
            if draw == "--temperature=0":
                assert top[0] == {name: line[name] for name in ("token", "id", "logprob")}
            ids.append(line["id"])


def test_logprobs_end_where_the_text_ends(recite):
    ids = [*b"ab", 256, *b"cd"]
    assert [line["id"] for line in parsed(recite(ids, "--logprobs"))] == [97, 98, 256]
    assert [line["id"] for line in parsed(recite(b"abcd", "--stop=bc", "--logprobs"))] == [97, 98, 99]


# Beam search


def test_beams_are_printed_best_first_with_their_log_probability(write, model):
    gpt, tok = model
    argv = ["--start=keys", "--beams=4", "--max_new_tokens=6"]
    records = parsed(write(*argv, "--num_samples=3", "--format=jsonl"))
    assert [record["sample"] for record in records] == [0, 1, 2]
    assert len({record["text"] for record in records}) == 3
    assert sorted(records, key=lambda record: -record["score"]) == records
    for record in records:
        ids, total = tok.encode("keys").tolist(), 0.0
        for token in tok.encode(record["text"]).tolist():
            total += logprobs_after(gpt, ids)[token].item()
            ids.append(token)
        assert record["tokens"] == len(record["text"]) == 6 and record["end"] == "length"
        assert record["logprob"] == record["score"] == pytest.approx(total, abs=1e-3)
    out = write(*argv, "--num_samples=3")
    assert out == "".join(f"keys{record['text']}{SEPARATOR}" for record in records)
    assert write(*argv) == f"keys{records[0]['text']}\n"


def test_the_tokens_of_a_beam_have_its_log_probability_together(write):
    argv = ["--start=keys", "--max_new_tokens=10"]
    (record,) = parsed(write(*argv, "--beams=1", "--format=jsonl"))
    tokens = parsed(write(*argv, "--temperature=0", "--logprobs"))
    assert "".join(token["token"] for token in tokens) == record["text"]
    assert record["logprob"] == pytest.approx(sum(token["logprob"] for token in tokens), abs=1e-4)


def test_one_beam_takes_the_likeliest_token(write):
    assert write("--start=keys", "--beams=1") == write("--start=keys", "--temperature=0")


def test_a_length_penalty_prefers_longer_texts(cli, tmp_path):
    chances = {"a": 0.65, "b": 0.35}
    save(gpt_of([math.log(chance) for chance in chances.values()]), CharTokenizer("ab"), tmp_path / "out")

    def found(penalty):
        argv = ["--beams=4", "--num_samples=4", "--stop=b", "--max_new_tokens=3", "--format=jsonl"]
        status, out, err = cli(sample.main, "--start=a", *argv, f"--length_penalty={penalty}", "--device=cpu")
        assert (status, err) == (0, "")
        return parsed(out)

    assert [record["text"] for record in found(0)] == ["", "aaa", "a", "aa"]
    assert [record["end"] for record in found(0)] == ["stop", "length", "stop", "stop"]
    assert [record["text"] for record in found(1)] == ["aaa", "aa", "a", ""]
    for record in found(2):
        assert record["logprob"] == pytest.approx(
            sum(math.log(chances[c]) for c in record["text"] + "b" * (record["end"] == "stop")), abs=1e-5
        )
        assert record["score"] == pytest.approx(record["logprob"] / record["tokens"] ** 2)


def test_fewer_texts_than_beams_are_no_reason_to_leave_others_out(cli, tmp_path):
    save(gpt_of([0.0, 1.0]), CharTokenizer("ab"), tmp_path / "out")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    argv = ["--prompts=prompts.txt", "--beams=3", "--num_samples=3", "--max_new_tokens=1", "--device=cpu"]
    status, out, err = cli(sample.main, *argv)
    assert (status, err) == (0, "")
    assert out.split(SEPARATOR) == ["ab", "aa", "bb", "ba", ""]


def test_a_prompt_is_searched_once_for_all_its_texts(write, monkeypatch):
    searched, search = [], sample.beam_search

    def observed(engine, texts, *arguments):
        searched.append(texts)
        return search(engine, texts, *arguments)

    monkeypatch.setattr(sample, "beam_search", observed)
    write("--start=k", "--beams=3", "--num_samples=3")
    assert list(map(len, searched)) == [1]


def test_beams_that_can_not_be_are_refused(refusal):
    assert "--format=jsonl" in refusal(sample.main, "--beams=2", "--logprobs", status=2)
    line = refusal(sample.main, "--beams=2", "--num_samples=3", status=2)
    assert "num_samples=3" in line and "beams=2" in line


# A file of prompts


@pytest.fixture
def write_all(write, tmp_path):
    """Continue the texts of a file: write_all("keys\\nand\\n", "--seed=3") -> what sample.py prints."""

    def succeed(content, *argv):
        (tmp_path / "prompts.txt").write_bytes(content.encode())
        return write("--prompts=prompts.txt", *argv)

    return succeed


PROMPTS = ["keys and v", "k", "é", "queries", "va", "masks and head"]
FILE = "".join(f"{prompt}\n" for prompt in PROMPTS)


@pytest.mark.parametrize("copies, draw", [(3, []), (2, ["--beams=3"]), (1, ["--stop=s"])])
def test_prompts_are_continued_in_the_files_order_whatever_the_batches(write_all, copies, draw):
    argv = [*draw, f"--num_samples={copies}"]
    records = parsed(write_all(FILE, *argv, "--format=jsonl"))
    expected = [(prompt, copy) for prompt in PROMPTS for copy in range(copies)]
    assert [(record["prompt"], record["sample"]) for record in records] == expected
    out = "".join(record["prompt"] + record["text"] + SEPARATOR for record in records)
    for batch_size in (1, 2, 5, 64):
        assert write_all(FILE, *argv, f"--batch_size={batch_size}") == out


def test_prompts_are_batched_by_their_length(write_all, monkeypatch):
    batches, stream = [], sample.stream

    def observed(engine, texts, *arguments):
        batches.append(list(map(len, texts)))
        return stream(engine, texts, *arguments)

    monkeypatch.setattr(sample, "stream", observed)
    write_all(FILE, "--batch_size=2")
    assert batches == [[1, 1], [2, 7], [10, 14]]


def test_a_text_is_printed_as_soon_as_those_before_it(write_all, monkeypatch):
    printed, stream = [], sample.stream

    def observed(*arguments):
        printed.append(sys.stdout.getvalue())
        return stream(*arguments)

    monkeypatch.setattr(sample, "stream", observed)
    monkeypatch.setattr(sample, "print", lambda *words, **_: print(*words, end="|"), raising=False)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), write_through=True))
    sys.stdout.getvalue = lambda: sys.stdout.buffer.getvalue().decode()
    write_all("va\nk\nkeys\n", "--batch_size=1", "--max_new_tokens=0")
    assert printed == ["", "", "va|---------------|k|---------------|"]


def test_log_probabilities_of_prompts_name_them(write_all):
    lines = parsed(write_all("keys\nk\n", "--logprobs", "--num_samples=2", "--max_new_tokens=2"))
    named = {(line["prompt"], line["sample"]) for line in lines}
    assert named == {(0, 0), (0, 1), (1, 0), (1, 1)} and len(lines) == 8
    texts = parsed(write_all("keys\nk\n", "--format=jsonl", "--num_samples=2", "--max_new_tokens=2"))
    for number, prompt in enumerate(["keys", "k"]):
        for copy in range(2):
            tokens = [line for line in lines if (line["prompt"], line["sample"]) == (number, copy)]
            text = "".join(token["token"] for token in tokens)
            assert {"prompt": prompt, "sample": copy, "text": text, "tokens": 2, "end": "length"} in texts


def test_a_single_prompt_in_a_file_is_a_text_alone(write, write_all):
    assert write_all("keys") == write_all("keys\n") == write("--start=keys")


def test_line_ends_of_another_system_are_no_part_of_a_prompt(write_all):
    assert write_all("keys\r\nva\r\n") == write_all("keys\nva\n")


def test_only_a_line_end_ends_a_prompt(recite, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\u2028b\x0cc\x1d\n", "utf-8", newline="")
    (record,) = parsed(recite(b"0123456789", "--start=", "--prompts=prompts.txt", "--format=jsonl"))
    assert record["prompt"] == "a\u2028b\x0cc\x1d"


@pytest.mark.parametrize(
    "content, says",
    [
        ("", ["prompts.txt", "line 1"]),
        ("\n", ["prompts.txt", "line 1"]),
        ("keys\n\nand\n", ["prompts.txt", "line 2"]),
        ("keys\nand\n\n", ["prompts.txt", "line 3"]),
        ("keys\r\n\r\n", ["prompts.txt", "line 2"]),
        ("keys\n" + "queries " * 6, ["'queries queries queries queries queries ...'", "48 tokens", "16"]),
        ("keys\nX\n", ["'X'", "position 0"]),
        (b"keys\n\xff", ["prompts.txt", "0xff", "offset 5"]),
    ],
)
def test_prompts_that_can_not_be_continued(refusal, trained, tmp_path, content, says):
    (tmp_path / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", "--prompts=prompts.txt")
    assert all(part in line for part in says), line


def test_a_prompt_may_fill_the_context(write, refusal, trained):
    text = "keys" * 4  # block_size is 16
    assert write(f"--start={text}", "--max_new_tokens=1").startswith(text)
    line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", f"--start={text}s")
    assert "17 tokens" in line and "16" in line


def test_a_long_prompt_is_shown_in_part(refusal, trained):
    for text, shown in [("keys" * 10, repr("keys" * 10)), ("keys" * 10 + "k", f"{'keys' * 10 + '...'!r}")]:
        line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", f"--start={text}")
        assert f"the prompt {shown} has {len(text)} tokens" in line


def test_prompts_that_are_not_there_or_not_alone(refusal, trained):
    assert "--prompts=nope.txt can't be read" in refusal(sample.main, "--prompts=nope.txt")
    line = refusal(sample.main, "--prompts=nope.txt", "--start=keys", status=2)
    assert "--start" in line and "--prompts" in line


# How tokens are drawn


def test_each_way_to_leave_only_the_likeliest_token_is_greedy(write):
    greedy = write("--temperature=0")
    for only in ("--top_k=1", "--top_p=1e-6", "--top_p=0", "--min_p=1", "--min_p=2"):
        assert write(only, "--temperature=3") == greedy
    assert write("--temperature=3") != greedy


def test_a_large_repetition_penalty_repeats_nothing(cli, tmp_path):
    save(gpt_of([5.0, 4.0, 3.0, 2.0, 1.0]), CharTokenizer("abcde"), tmp_path / "out")
    argv = ["--start=b", "--temperature=0", "--max_new_tokens=4", "--device=cpu"]
    assert cli(sample.main, *argv, "--repetition_penalty=100") == (0, "bacde\n", "")
    assert cli(sample.main, *argv, "--repetition_penalty=2") == (0, "bacaa\n", "")  # 5 / 2 is more than 2


def test_a_sample_is_the_same_beside_any_others(write):
    argv = ["--start=keys", "--seed=7", "--temperature=1.5", "--format=jsonl"]
    five = write(*argv, "--num_samples=5").splitlines()
    assert len({parsed(line)[0]["text"] for line in five}) == 5
    assert write(*argv, "--num_samples=2").splitlines() == five[:2]
    assert write(*argv, "--num_samples=1").splitlines() == five[:1]
    for batch_size in (1, 2, 3):
        assert write(*argv, "--num_samples=5", f"--batch_size={batch_size}").splitlines() == five
    assert f"keys{parsed(five[0])[0]['text']}\n" == write(*argv[:-1])


# Precision, compilation


@pytest.fixture(scope="module")
def sizes():
    """GPTs with 15 and 17 million parameters, without memory for them."""
    with torch.device("meta"):
        return [GPT(GPTConfig(**{**SMALL, "vocab_size": count * 10**6 // 8})) for count in (15, 17)]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_large_models_are_read_in_bfloat16_by_a_cpu_that_has_it(monkeypatch, sizes, has_bfloat16):
    monkeypatch.setattr(device, "cpu_has_bfloat16", lambda: has_bfloat16)
    cpu, (small, large) = torch.device("cpu"), sizes
    fast = torch.bfloat16 if has_bfloat16 else torch.float32
    assert generation_dtype("auto", cpu, small) == torch.float32
    assert generation_dtype("auto", cpu, large) == fast
    assert generation_dtype("auto", torch.device("mps"), large) == torch.float32
    for name in ("float32", "float16", "bfloat16"):
        for gpt in sizes:
            assert generation_dtype(name, cpu, gpt) == getattr(torch, name)


def test_the_precision_asked_for_is_the_engines(write, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "compiling_pays", lambda batches, device, gpt, config: seen.append(gpt))
    write("--dtype=bfloat16")
    write()
    assert [gpt.lm_head.weight.dtype for gpt in seen] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "device, prompts, argv, pays",
    [
        ("cuda", 1, ["--max_new_tokens=1999"], False),
        ("cuda", 1, ["--max_new_tokens=2000"], True),
        ("cuda", 100, ["--max_new_tokens=1000"], True),
        ("cuda", 64, ["--max_new_tokens=1000"], False),  # one batch
        ("cuda", 1, ["--max_new_tokens=2000", "--beams=4"], True),
        ("cpu", 1, ["--max_new_tokens=1999"], False),
        ("cpu", 1, ["--max_new_tokens=2000"], True),
        ("cpu", 2, ["--max_new_tokens=2000"], True),
        ("cpu", 1, ["--max_new_tokens=1000", "--num_samples=2", "--batch_size=1"], True),
        ("mps", 1, ["--max_new_tokens=2000"], False),
    ],
)
def test_compiling_pays_for_many_steps(monkeypatch, sizes, device, prompts, argv, pays):
    config = sample.parse(sample.SampleSettings, argv)
    batches = writer.batched([[0]] * prompts, config)
    device, (small, large) = torch.device(device), sizes
    assert COMPILE_FROM == 2000
    for found in (True, False):
        monkeypatch.setattr(sample, "has_compiler", lambda found=found: found)
        on_gpu = device.type == "cuda"
        assert compiling_pays(batches, device, large, config) == (pays and (found or on_gpu))
        assert compiling_pays(batches, device, small, config) == (pays and on_gpu)


@pytest.mark.parametrize(
    "argv, compiled",
    [
        ([], False),
        (["--compile=True"], True),
        (["--prompts=many.txt", "--batch_size=1"], True),
        (["--prompts=many.txt", "--batch_size=1", "--compile=False"], False),
        (["--prompts=many.txt", "--batch_size=2"], False),
    ],
)
def test_the_engine_is_compiled_where_that_pays_or_is_asked_for(write, tmp_path, monkeypatch, argv, compiled):
    (tmp_path / "many.txt").write_text("keys\n" * 50)
    asked = []

    class Engine(sample.Engine):
        def __init__(self, gpt, compiled):
            asked.append(compiled)
            super().__init__(gpt)

    monkeypatch.setattr(sample, "Engine", Engine)
    monkeypatch.setattr(sample, "stream", lambda *arguments: iter([]))
    monkeypatch.setattr(sample, "is_large", lambda gpt: True)
    monkeypatch.setattr(sample, "has_compiler", lambda: True)
    monkeypatch.setattr(sample, "find_compile", lambda choice, device: choice)
    write(*argv)  # max_new_tokens=40
    assert asked == [compiled]


# A conversation


class Terminal:
    """sample.py on a terminal of its own."""

    def __init__(self, *arguments, cwd):
        self.screen, theirs = pty.openpty()

        def on_this_terminal():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where tests run in the background

        environment = process_environment(TERM="dumb", INPUTRC="/dev/null", PYTHONIOENCODING="utf-8:strict")
        streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
        self.process = subprocess.Popen(
            command(*arguments),
            **streams,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=on_this_terminal,
        )
        os.close(theirs)
        self.unread = b""

    def type(self, keys):
        os.write(self.screen, keys if isinstance(keys, bytes) else keys.encode())

    def until(self, awaited, again=b""):
        """What appears up to and with `awaited`; the keys `again` are typed for every second of silence."""
        deadline = time.monotonic() + 60
        while awaited.encode() not in self.unread:
            assert time.monotonic() < deadline, f"{awaited!r} does not appear after {self.unread!r}"
            ready, _, _ = select.select([self.screen], [], [], 1)
            if not ready:
                self.type(again)
                continue
            try:
                self.unread += os.read(self.screen, 4096)
            except OSError:  # the process has closed the terminal
                raise AssertionError(f"the end without {awaited!r}: {self.unread!r}") from None
        shown, found, self.unread = self.unread.partition(awaited.encode())
        return (shown + found).decode(errors="replace").replace("\r\n", "\n")


@pytest.fixture
def terminal(trained, tmp_path):
    """Start sample.py on a terminal: terminal("--seed=3") -> a Terminal."""
    opened = []

    def start(*argv):
        opened.append(Terminal(f"--out_dir={trained}", *argv, cwd=tmp_path))
        return opened[-1]

    yield start
    for one in opened:
        one.process.kill()
        one.process.wait()
        os.close(one.screen)


def test_a_conversation_on_a_terminal(terminal, write):
    greedy = ["--temperature=0", "--max_new_tokens=5", "--stop=."]
    continued = write("--start=keys and", *greedy)
    screen = terminal(*greedy)
    assert "Ctrl-C stops it; Ctrl-D ends" in screen.until("\n> ")
    screen.type("keys and\n")
    assert screen.until("\n> ") == f"keys and\n{continued}> "
    screen.type("keys X\n")
    shown = screen.until("\n> ").splitlines()
    assert shown[1].startswith("warning: the character 'X' at position 5 ") and len(shown) == 3
    screen.type("keys keys keys keys\n")
    assert "has 19 tokens, but the model takes 1 to 16" in screen.until("\n> ")
    screen.type(b"\xff\n")
    assert "warning: " in screen.until("\n> ")
    screen.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # up arrows: the fourth line before this one
    assert screen.until("\n> ").endswith(f"and\n{continued}> ")
    screen.type("\n")  # no text: a newline is continued
    assert screen.until("\n> ") == f"\n{write(*greedy)}> "
    screen.type("\x04")
    screen.until("\n")
    assert screen.process.wait(60) == 0


def test_control_c_stops_a_text_and_asks_again(terminal):
    screen = terminal("--max_new_tokens=1000000", "--num_samples=3")
    screen.until("> ")
    for start in ("keys", "and"):
        screen.type(f"{start}\n")
        screen.until(f"{start}\r\n{start}")
        screen.until("s")  # it is writing
        screen.type("\x03")
        screen.until("\n> ")
    screen.type("\x03")  # with nothing to stop, it asks again
    screen.until("\n> ", again=b"\x03")  # readline overlooks one just before it reads
    screen.type("\x04")
    assert screen.process.wait(60) == 0


@pytest.fixture
def asked(monkeypatch):
    """What is typed on a pretended terminal, one line after another; then it ends."""
    lines = []

    def answer(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    sys.stdin.isatty = lambda: True
    return lines


def test_each_turn_of_a_conversation_draws_anew(write, asked):
    asked += ["keys", "keys"]
    texts = write("--seed=3", "--num_samples=2").split("keys")
    assert len(texts) == 5 and len(set(texts)) == 5
    asked += ["keys"]
    assert write("--seed=3").endswith(write("--start=keys", "--seed=3") + "\n")  # the newline of Ctrl-D


def test_a_conversation_obeys_the_same_settings(write, asked):
    for argv in (["--temperature=0", "--stop=s"], ["--beams=3"], ["--beams=3", "--num_samples=2"]):
        asked += ["keys"]
        assert write("--start=keys", *argv).splitlines()[0] in write(*argv)


@pytest.mark.parametrize(
    "argv", [["--start=keys"], ["--prompts=prompts.txt"], ["--format=jsonl"], ["--logprobs"]]
)
def test_a_terminal_is_not_asked_where_there_is_a_text_or_a_program_reads(write, tmp_path, asked, argv):
    (tmp_path / "prompts.txt").write_text("keys\n")
    asked += ["keys"]
    assert "Ctrl-D" not in write(*argv) and asked == ["keys"]


def test_without_a_terminal_a_text_begins_with_a_newline(write, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("it asks"))
    assert write() == write("--start=\n")
    assert write()[0] == "\n" and len(write()) == 1 + 40 + 1


# Models of conversations

TALK = ChatTokenizer(CharTokenizer("abcdef ."))


@pytest.fixture
def talk(cli, tmp_path):
    """Call sample.py on a model of conversations with random weights: talk("--start=ab") -> its answer."""
    shape = {"vocab_size": TALK.vocab_size, "block_size": 32, "n_embd": 32}
    save(random_gpt(seed=1, std=0.5, **shape), TALK, tmp_path / "talk")

    def succeed(*argv):
        status, out, err = cli(sample.main, "--out_dir=talk", "--device=cpu", "--max_new_tokens=6", *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


@pytest.fixture
def read(monkeypatch):
    """The texts, as ids, that the model was given to go on from, one after another."""
    texts, stream, search = [], sample.stream, sample.beam_search
    for name, function in (("stream", stream), ("beam_search", search)):

        def observed(engine, some, *arguments, function=function):
            texts.extend(map(list, some))
            return function(engine, some, *arguments)

        monkeypatch.setattr(sample, name, observed)
    return texts


def piped(monkeypatch, content):
    """Let a program write to standard input."""
    content = content if isinstance(content, bytes) else content.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def chat_ids(*messages, system=""):
    """The ids of what the two sides say in turn, the user first."""
    roles = ("user", "assistant") * len(messages)
    return TALK.encode_chat([("system", system), *zip(roles, messages, strict=False)]).tolist()


def test_what_the_user_says_is_answered_and_not_repeated(talk, read, tmp_path):
    answer = talk("--start=ab c")
    assert read == [chat_ids("ab c")] and len(answer) > 3
    (record,) = parsed(talk("--start=ab c", "--format=jsonl"))
    assert (record["prompt"], record["text"]) == ("ab c", answer[:-1])
    (tmp_path / "prompts.txt").write_text("ab c\nfed\n")
    both = [record["text"] for record in parsed(talk("--prompts=prompts.txt", "--format=jsonl"))]
    assert both[0] == answer[:-1] and both[1] != both[0]
    assert talk("--prompts=prompts.txt") == "".join(text + SEPARATOR for text in both)
    assert read[-2:] == [chat_ids("fed"), chat_ids("ab c")]  # the shorter first
    assert len(talk("--start=ab c", "--num_samples=2").split(SEPARATOR)) == 3
    best = parsed(talk("--start=ab c", "--beams=3", "--format=jsonl"))[0]["text"]
    assert talk("--start=ab c", "--beams=3") == f"{best}\n"


def test_the_system_text_comes_first(talk, read):
    talk("--start=ab", "--system=be f.")
    assert read == [chat_ids("ab", system="be f.")]


def test_log_probabilities_of_marks_have_no_text(cli, tmp_path):
    ids = [0] * 4 + [TALK.user, 3, TALK.system, TALK.assistant, TALK.separator]
    save(gpt_that_writes(ids, TALK.vocab_size), TALK, tmp_path / "out")
    status, out, err = cli(sample.main, "--device=cpu", "--start=ab", "--logprobs")
    assert (status, err) == (0, "")
    assert [(line["id"], line["token"]) for line in parsed(out)] == [
        (TALK.user, ""),
        (3, "d"),
        (TALK.system, ""),
        (TALK.assistant, ""),
        (TALK.separator, ""),
    ]
    assert cli(sample.main, "--device=cpu", "--start=ab") == (0, "d\n", "")


def test_characters_that_the_tokenizer_lacks(talk, write, read, refusal):
    line = refusal(sample.main, "--out_dir=talk", "--device=cpu", "--start=aXb")
    assert "'X' at position 1" in line and "--unknown=skip" in line
    assert talk("--start=aXbX", "--unknown=skip") == talk("--start=ab")
    assert read == [chat_ids("ab")] * 2
    talk("--start=X", "--unknown=skip")
    assert read[-1] == chat_ids("")
    assert write("--start=keXys", "--unknown=skip")[4:] == write("--start=keys")[3:]
    line = refusal(sample.main, "--out_dir=talk", "--start=ab", "--unknown=skp", status=2)
    assert "--unknown=skp" in line and "error|skip" in line


def test_a_model_of_texts_has_no_characters_left_to_go_on_from(refusal, trained):
    line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", "--start=XX", "--unknown=skip")
    assert "0 tokens" in line


def test_a_conversation_is_remembered(talk, read, monkeypatch):
    piped(monkeypatch, "ab\nba c\r\n\nf")
    answers = talk("--chat", "--system=d.", "--max_new_tokens=2", "--temperature=9").split("\n")
    assert answers.pop() == "" and len(set(answers)) > 2
    assert read == [
        chat_ids("ab", system="d."),
        chat_ids("ab", answers[0], "ba c", system="d."),
        chat_ids("ab", answers[0], "ba c", answers[1], "", system="d."),
        chat_ids("ab", answers[0], "ba c", answers[1], "", answers[2], "f", system="d."),
    ]


def test_each_answer_of_a_conversation_draws_anew(talk, monkeypatch):
    piped(monkeypatch, "ab\n" * 5)
    answers = talk("--chat", "--temperature=9", "--top_k=0").splitlines()
    piped(monkeypatch, "ab\n" * 5)
    assert answers == talk("--chat", "--temperature=9", "--top_k=0").splitlines()
    piped(monkeypatch, "ab\n" * 5)
    assert answers != talk("--chat", "--temperature=9", "--top_k=0", "--seed=2").splitlines()
    piped(monkeypatch, "ab")
    assert talk("--chat") == talk("--start=ab")


@pytest.mark.parametrize("draw", [["--temperature=0"], ["--beams=3"]])
@pytest.mark.parametrize("tokens, room", [(6, 26), (8, 24), (500, 24), (0, 32)])
def test_the_oldest_exchanges_make_room_for_an_answer(talk, read, monkeypatch, draw, tokens, room):
    said = ["a", "bb", "abc", "d" * 10, "a", "ef" * 12, "f", "e", "d"]  # the sixth fills the context alone
    piped(monkeypatch, "".join(f"{text}\n" for text in said))
    answers = talk("--chat", "--system=d.", f"--max_new_tokens={tokens}", "--stop= ", *draw).split("\n")
    assert len(answers) == len(said) + 1
    forgotten, kept = 0, []
    for turn, ids in enumerate(read):
        messages = [text for pair in zip(said, answers, strict=False) for text in pair][: 2 * turn + 1]
        fitting = [
            number
            for number in range(turn + 1)
            if len(chat_ids(*messages[2 * number :], system="d.")) <= room or number == turn
        ]
        forgotten = max(forgotten, fitting[0])  # what was dropped once does not come back
        assert ids == chat_ids(*messages[2 * forgotten :], system="d.")
        kept.append(turn - forgotten)
    assert kept[0] == kept[5] == 0 and max(kept) > 1 and len(set(kept)) > 2


def test_an_error_ends_a_conversation_with_a_program(talk, cli, monkeypatch):
    for content, says in (
        ("ab\nX\nab", ["'X'"]),
        ("ab\n" + "f" * 30 + "\nab", ["f" * 30, "33 tokens", "1 to 32"]),
        (b"ab\n\xff\nab", ["message 2 of standard input", "0xff"]),
    ):
        piped(monkeypatch, content)
        status, out, err = cli(sample.main, "--out_dir=talk", "--device=cpu", "--max_new_tokens=6", "--chat")
        assert status == 1 and out == talk("--start=ab") and err.startswith("error: ")
        assert all(part in err for part in says) and len(err.splitlines()) == 1


def test_a_prompt_too_long_is_shown_with_the_system_text(talk, refusal):
    argv = ["--out_dir=talk", "--device=cpu", f"--system={'d' * 28}"]
    assert "the prompt 'ddd" in refusal(sample.main, *argv, "--start=ab")
    assert "the prompt 'ddd" in refusal(sample.main, "--out_dir=talk", argv[2], "--start=a" + 40 * "b")


def test_an_answer_that_was_stopped_is_remembered_so_far(talk, read, asked, monkeypatch):
    count, stream = iter(range(100)), sample.stream

    def stopped(*arguments):
        for drawn in stream(*arguments):
            if next(count) == 3:
                raise KeyboardInterrupt
            yield drawn

    monkeypatch.setattr(sample, "stream", stopped)
    asked += ["ab", "c"]
    shown = talk("--chat", "--temperature=0").splitlines()
    whole = talk("--start=ab", "--temperature=0")
    assert len(shown[1]) == 3 and whole.startswith(shown[1])
    assert read[:2] == [chat_ids("ab"), chat_ids("ab", shown[1], "c")]


def test_a_message_that_can_not_be_read_is_not_remembered_and_drops_nothing(talk, read, cli, asked):
    asked += ["ab", "f" * 30, "X", "c"]
    argv = ["--out_dir=talk", "--device=cpu", "--max_new_tokens=6", "--chat"]
    status, out, err = cli(sample.main, *argv)
    answer = talk("--start=ab")[:-1]
    assert status == 0 and answer in out
    first, second = err.splitlines()
    assert first.startswith("warning: ") and "33 tokens" in first
    assert second.startswith("warning: ") and "'X'" in second
    assert read[:2] == [chat_ids("ab"), chat_ids("ab", answer, "c")]


def test_a_terminal_without_chat_remembers_nothing(write, talk, read, asked):
    assert write().startswith("Begin a text, and it is continued.")
    asked += ["ab", "c", ""]
    shown = talk("--temperature=0")
    assert shown.startswith("Say something, and it is answered.") and "ab" not in shown.splitlines()[1]
    assert read == [chat_ids("ab"), chat_ids("c"), chat_ids("")]


@pytest.mark.parametrize(
    "argument", ["--start=a", "--prompts=a.txt", "--num_samples=2", "--logprobs", "--format=jsonl"]
)
def test_settings_that_mean_nothing_in_a_conversation(refusal, argument):
    line = refusal(sample.main, "--chat", argument, status=2)
    assert argument.split("=")[0] in line and "--chat" in line


@pytest.mark.parametrize("argument", ["--chat", "--system=a"])
def test_a_model_of_texts_does_not_talk(refusal, trained, argument):
    line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", argument)
    assert argument.split("=")[0] in line and "prepare.py" in line


def test_a_conversation_on_a_terminal_of_its_own(terminal, talk, monkeypatch):
    greedy = ["--chat", "--temperature=0"]
    piped(monkeypatch, "ab\nc\n")
    first, second = talk(*greedy).splitlines()
    screen = terminal("--out_dir=talk", "--max_new_tokens=6", *greedy)
    assert "Ctrl-C stops it; Ctrl-D ends" in screen.until("\n> ")
    screen.type("ab\n")
    assert screen.until("\n> ") == f"ab\n{first}\n> "
    screen.type("X\n")
    assert "warning: the character 'X'" in screen.until("\n> ")
    screen.type("c\n")
    assert screen.until("\n> ") == f"c\n{second}\n> "
    screen.type("\x04")
    screen.until("\n")
    assert screen.process.wait(60) == 0


def test_a_program_talks_a_line_at_a_time(talk, monkeypatch, tmp_path):
    argv = ["--out_dir=talk", "--max_new_tokens=6", "--chat"]
    piped(monkeypatch, "ab\nc\n")
    expected = talk("--chat").splitlines()
    process = subprocess.Popen(
        command(*argv),
        cwd=tmp_path,
        env=process_environment(PYTHONUNBUFFERED=""),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    patience = threading.Timer(60, process.kill)
    patience.start()
    for message, answer in zip(["ab\n", "c\n"], expected, strict=True):
        process.stdin.write(message)
        process.stdin.flush()
        assert process.stdout.readline() == f"{answer}\n"  # before the next message is there
    assert process.communicate() == ("", "") and process.returncode == 0
    patience.cancel()


def test_a_closed_standard_input_is_an_empty_one(write, talk, monkeypatch):
    text = write()
    monkeypatch.setattr(sys, "stdin", None)
    assert write() == text
    monkeypatch.setattr(sys, "stdin", None)
    assert talk("--chat") == ""


# Processes


def test_a_reader_that_leaves_ends_the_text_quietly(trained, tmp_path):
    arguments = command(f"--out_dir={trained}", "--start=keys", "--max_new_tokens=100000", "--compile=False")
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, env=process_environment()
    )
    os.close(theirs)
    assert len(os.read(ours, 5)) > 0
    os.close(ours)  # as `| head` does
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == 1


def test_the_text_of_a_process_is_that_of_main(write, trained, tmp_path):
    done = subprocess.run(
        command(f"--out_dir={trained}", "--max_new_tokens=40"),
        cwd=tmp_path,
        env=process_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == (write(), "")
