"""sample.py end to end: the text it prints, from checkpoints that a test trains or writes itself."""

import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, process_environment, train_in
from known_models import SMALL, forward_hook, gpt_of, gpt_that_likes, gpt_that_writes, parsed, save

import sample
from kqv.errors import UserError
from kqv.formats import loading
from kqv.generation import choice
from kqv.generation.choice import GRAPH_FROM, choose_engine, generation_dtype
from kqv.settings import fill, read_given
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer, ChatTokenizer
from kqv.training.start import padded
from model import GPT, GPTConfig

SEPARATOR = "\n---------------\n"


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


def command(*arguments):
    return [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *map(str, arguments)]


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
    status, out, err = cli(sample.main, *argv, "--engine=compiled")
    assert status == 0, err  # which may hold the compiler's own warnings
    assert out == write("--engine=plain")


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
    assert letter("--init_from=out") == "cbbb\n"
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
    Call sample.py with a byte model that writes given ids after a prompt of one token, and ids[n:] after one
    of n more: recite(b"abc", "--stop=c") -> what it prints.
    """

    def succeed(ids, *argv):
        save(gpt_that_writes(ids, 257), ByteTokenizer(), tmp_path / "out")
        start = [] if "--prompts=prompts.txt" in argv else ["--start=>"]
        status, out, err = cli(sample.main, *start, "--device=cpu", f"--max_new_tokens={len(ids)}", *argv)
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


class Unbuffered(io.StringIO):
    """A standard output of which only what has been flushed can be seen."""

    flushed = ""

    def flush(self):
        self.flushed = super().getvalue()

    def getvalue(self):
        return self.flushed

    def reconfigure(self, **_):
        pass


@pytest.fixture
def shown(recite):
    """
    What has been printed when the model begins each of its forwards, and in the end:
    shown(b"abc", "--stop=c") -> [text, ...].
    """

    def observed(ids, *argv):
        with pytest.MonkeyPatch.context() as patch:
            out, texts = Unbuffered(), []
            patch.setattr(sys, "stdout", out)
            with forward_hook(257, lambda *_: texts.append(out.flushed)):
                recite(ids, *argv)
        return [*texts, out.flushed]

    return observed


def test_a_token_is_shown_before_the_next_is_drawn_and_a_character_when_it_is_whole(shown):
    expected = [">", ">", ">é", ">é!", ">é!", ">é!", ">é!", ">é!😀\n"]
    assert shown("é!😀".encode()) == expected


# The end of a text


@pytest.fixture
def steps():
    """How many rows each decoding step of the byte model had."""
    rows = []
    with forward_hook(257, lambda _, ids: rows.append(len(ids)) if ids.shape[1] == 1 else None):
        yield rows


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
    assert steps == [1] * tokens + [2] * tokens
    (record,) = parsed(recite(text.encode(), *given, "--format=jsonl"))
    end = "stop" if expected != text else "length"
    assert record == {"prompt": ">", "sample": 0, "text": expected, "tokens": tokens, "end": end}


def test_a_stop_in_the_prompt_or_across_its_end_is_none(recite):
    assert recite(b"bc", "--start=a", "--stop=a", "--stop=ab") == "abc\n"


def test_a_character_model_stops_too(write):
    whole = write("--start=keys", "--temperature=0")[4:-1]
    stop = whole[6:9]
    assert write("--start=keys", "--temperature=0", "--stop", stop) == f"keys{whole[: whole.index(stop)]}\n"


def test_what_may_begin_a_stop_is_held_back_until_that_is_known(shown):
    texts = shown(b"a<|b<|en", "--stop=<|end|>")
    assert texts == [">", *[">a"] * 3, *[">a<|b"] * 4, ">a<|b<|en\n"]


def test_each_text_of_a_batch_stops_by_itself(recite, steps, tmp_path):
    (tmp_path / "prompts.txt").write_text("1\n12345678\n1234\n")  # the last two start further on
    argv = ["--prompts=prompts.txt", "--stop=stop", "--format=jsonl"]
    records = parsed(recite(b"ab stop cd and so on", *argv, "--max_new_tokens=9"))
    assert [(record["text"], record["tokens"], record["end"]) for record in records] == [
        ("ab ", 7, "stop"),
        (" cd and s", 9, "length"),
        ("", 4, "stop"),
    ]
    assert steps == [3] * 9
    recite(b"ab stop cd stop ef", *argv)
    assert steps[9:] == [3] * 8  # nothing is drawn once all have stopped


def test_the_end_of_text_ends_a_text(recite, steps):
    ids = [*b"ab", 256, *b"cd"]
    assert recite(ids) == ">ab\n"
    assert recite(ids, "--num_samples=2") == 2 * (">ab" + SEPARATOR)
    assert recite([*b"a", "é".encode()[0], 256]) == ">a\ufffd\n"
    assert recite(ids, "--stop=bc") == ">ab\n"  # what was held back is part of the text
    assert steps == [1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    (record,) = parsed(recite(ids, "--format=jsonl"))
    assert (record["text"], record["tokens"], record["end"]) == ("ab", 3, "end_of_text")
    (record,) = parsed(recite(ids, "--format=jsonl", "--beams=2"))
    assert (record["text"], record["tokens"], record["end"]) == ("ab", 3, "end_of_text")
    assert recite(ids, "--beams=2") == ">ab\n"


def test_a_stop_with_a_newline_as_it_is_typed_in_a_shell(recite):
    for typed in ("\\n", "\n"):
        assert recite(b"one\n\ntwo", f"--stop={typed}") == ">one\n"
        assert recite(b"one\n\ntwo", f"--stop={typed}", "--beams=2") == ">one\n"
        assert recite(b"o\ne\n\ntwo", f"--stop={typed * 2}") == ">o\ne\n"
    assert recite(b"one\ttwo", "--stop=\\t") == ">one\n"
    assert recite(b"x = '\\n'", "--stop=\\n") == ">x = '\n"  # a program's text may hold those two characters
    assert recite(b"a \\textbf{b}", "--stop=\\textbf") == ">a \n"


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


def test_a_prompt_is_searched_once_for_all_its_texts(recite, steps):
    recite(b"abc", "--beams=3", "--num_samples=3")
    assert steps == [3, 3, 3]


def test_beams_that_can_not_be_are_refused(refusal):
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
    argv = [*draw, f"--num_samples={copies}", "--max_new_tokens=20"]  # past block_size
    records = parsed(write_all(FILE, *argv, "--format=jsonl"))
    expected = [(prompt, copy) for prompt in PROMPTS for copy in range(copies)]
    assert [(record["prompt"], record["sample"]) for record in records] == expected
    out = "".join(record["prompt"] + record["text"] + SEPARATOR for record in records)
    for batch_size in (1, 2, 5, 64):
        assert write_all(FILE, *argv, f"--batch_size={batch_size}") == out


def test_a_text_is_printed_as_soon_as_those_before_it(shown, tmp_path):
    (tmp_path / "prompts.txt").write_text("va\nk\nkeys\n")
    argv = ["--prompts=prompts.txt", "--batch_size=1", "--max_new_tokens=1"]
    first_two = f"va2{SEPARATOR}k1{SEPARATOR}"
    # The model reads k, va (in two forwards) and keys (in two).
    assert shown(b"1234", *argv) == ["", "", "", first_two, first_two, f"{first_two}keys4{SEPARATOR}"]


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


@pytest.mark.parametrize(
    "content, says",
    [
        ("keys\n\nand\n", ["prompts.txt", "line 2"]),
        ("keys\nX\n", ["'X'", "position 0"]),
    ],
)
def test_prompts_that_can_not_be_continued(refusal, trained, tmp_path, content, says):
    (tmp_path / "prompts.txt").write_text(content)
    line = refusal(sample.main, f"--out_dir={trained}", "--device=cpu", "--prompts=prompts.txt")
    assert all(part in line for part in says), line


def test_a_prompt_may_fill_the_context_and_of_a_longer_one_the_end_is_read(write, cli, trained, tmp_path):
    text = "keys" * 4  # block_size is 16
    short = write(f"--start={text}")
    assert short.startswith(text)
    argv = [f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=40"]
    status, out, err = cli(sample.main, *argv, f"--start=and {text}")
    assert (status, out) == (0, f"and {short}")
    assert err.startswith("warning: ") and "20 tokens" in err and len(err.splitlines()) == 1
    (tmp_path / "prompts.txt").write_text(f"{text}\nqueries and {text}\nk\n")
    status, out, err = cli(sample.main, *argv, "--prompts=prompts.txt", "--format=jsonl")
    assert status == 0 and err.startswith("warning: the prompt 'queries and ") and len(err.splitlines()) == 1
    assert [record["prompt"] for record in parsed(out)] == [text, f"queries and {text}", "k"]
    assert f"{text}{parsed(out)[0]['text']}\n" == short


def test_prompts_that_are_not_there(refusal):
    assert "--prompts=nope.txt can't be read" in refusal(sample.main, "--prompts=nope.txt")


# How tokens are drawn


def test_each_way_to_leave_only_the_likeliest_token_is_greedy(write):
    greedy = write("--temperature=0")
    for only in ("--top_k=1", "--top_p=1e-6", "--top_p=0", "--min_p=1"):
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


def test_a_text_depends_on_its_seed_prompt_and_sample_alone(write_all):
    argv = ["--seed=7", "--temperature=1.5", "--format=jsonl"]
    file = "keys\nand v\nk\n"
    texts = {}
    for copies in (1, 2, 3):
        for batch_size in (1, 2, 64):
            out = write_all(file, *argv, f"--num_samples={copies}", f"--batch_size={batch_size}")
            for record in parsed(out):
                texts.setdefault((record["prompt"], record["sample"]), set()).add(record["text"])
    assert len(texts) == 9 and all(len(same) == 1 for same in texts.values())
    assert len(set.union(*texts.values())) == 9
    for record in parsed(write_all("queries é\nand v\nva\ns\n", *argv, "--num_samples=2")):
        if record["prompt"] == "and v":  # the second beside any others
            assert texts["and v", record["sample"]] == {record["text"]}


def test_a_penalty_does_not_put_off_the_end_of_a_text(cli, tmp_path):
    tok = ChatTokenizer(CharTokenizer("abc"))
    logits = [1.0, 2.0, 1.5, *[0.0] * tok.vocab_size][: tok.vocab_size]
    logits[tok.separator] = 1.9
    save(gpt_of(logits), tok, tmp_path / "out")
    argv = ["--device=cpu", "--temperature=0", "--max_new_tokens=9", "--repetition_penalty=100"]
    (tmp_path / "talk.txt").write_text("a\na\n")
    with open(tmp_path / "talk.txt") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", file)
        # "b" is the likeliest; then it is penalised, and the end of the text is, though it is in the history.
        assert cli(sample.main, *argv, "--chat") == (0, "b\n\n", "")


# Numbers that are none


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize(
    "argv", [[], ["--temperature=0"], ["--beams=2"], ["--logprobs"], ["--format=jsonl"], ["--num_samples=2"]]
)
def test_a_model_whose_logits_are_not_finite_writes_no_text(cli, tmp_path, wrong, argv):
    save(gpt_of([0.0, wrong, 1.0]), CharTokenizer("abc"), tmp_path / "out")
    status, out, err = cli(sample.main, "--device=cpu", "--start=a", *argv)
    assert status == 1 and out in ("", "a")
    assert err.startswith("error: the model's logits are not finite") and len(err.splitlines()) == 1


def not_json(name):
    raise AssertionError(f"{name} is no JSON")


def test_a_logarithm_of_zero_is_null_in_json(cli, tmp_path):
    save(gpt_of([0.0, 3e38, -3e38]), CharTokenizer("abc"), tmp_path / "out")
    for argv in (["--logprobs"], ["--format=jsonl", "--beams=2"], ["--format=jsonl"]):
        status, out, err = cli(sample.main, "--device=cpu", "--start=a", "--max_new_tokens=1", *argv)
        assert (status, err) == (0, "")
        for line in out.splitlines():
            json.loads(line, parse_constant=not_json)


def test_no_length_overflows_a_length_penalty(recite, refusal):
    (record,) = parsed(recite(b"ab" * 30, "--beams=2", "--length_penalty=10", "--format=jsonl"))
    assert record["score"] == pytest.approx(record["logprob"] / 60**10)
    line = refusal(sample.main, "--beams=2", "--length_penalty=99.9", status=2)
    assert "length_penalty is 99.9, but it must be at most 10" in line


# Settings that mean nothing


DRAWING = {"temperature": 0.8, "top_k": 200, "top_p": 1, "min_p": 0, "repetition_penalty": 1, "seed": 1337}
TEXTS_ALONE = {"start": "a", "prompts": "a.txt", "num_samples": 1, "logprobs": True}
OF_EVALUATION = {"dataset": "a", "max_examples": 0, "bleu": True}
REFUSED = {  # by the command line that makes them mean nothing; most have their default
    "": {**OF_EVALUATION, "length_penalty": 0},
    "--evaluate=val": {
        **DRAWING,
        **TEXTS_ALONE,
        "raw": True,
        "chat": True,
        "system": "",
        "unknown": "error",
        "length_penalty": 0,
    },
    "--evaluate=val --beams=2": {
        **DRAWING,
        **TEXTS_ALONE,
        **{"raw": True, "chat": True, "system": "a", "unknown": "skip"},
    },
    "--chat": {**TEXTS_ALONE, **OF_EVALUATION, "format": "text", "length_penalty": 0},
    "--chat --beams=2": {**DRAWING, **TEXTS_ALONE, **OF_EVALUATION, "format": "jsonl"},
    "--beams=2": {**DRAWING, **OF_EVALUATION, "logprobs": True},
    "--prompts=a.txt": {**OF_EVALUATION, "start": "", "length_penalty": 0},
    "--format=jsonl": {"raw": True, "length_penalty": 0, **OF_EVALUATION},
    "--logprobs": {"raw": True, **OF_EVALUATION, "format": "text", "length_penalty": 0},
    "--init_from=gpt2": {**OF_EVALUATION, "out_dir": "out", "checkpoint": "best", "length_penalty": 0},
    "--checkpoint=a.pt": {**OF_EVALUATION, "out_dir": "out", "length_penalty": 0},
}
SOME_VALUE = {
    **{"init_from": "resume", "out_dir": "out", "checkpoint": "newest", "prompts": "a.txt", "start": "a"},
    **{"base": "a"},
    **{"chat": True, "system": "a", "unknown": "skip", "num_samples": 1, "max_new_tokens": 500, "stop": "a"},
    **{"batch_size": 64, "format": "jsonl", "logprobs": True, "beams": 2, "length_penalty": 1.5},
    **{
        "evaluate": "train",
        "raw": True,
        "device": "cpu",
        "dtype": "float32",
        "engine": "plain",
        "weights": "int8",
        **DRAWING,
        **OF_EVALUATION,
    },
}


@pytest.mark.parametrize("command", REFUSED, ids=lambda command: command or "texts")
def test_what_is_given_is_used_or_refused(refusal, command):
    for name, value in REFUSED[command].items():
        line = refusal(sample.main, *command.split(), f"--{name}={value}", status=2)
        assert line.startswith(f"error: --{name}={value} means nothing with"), line
    assert SOME_VALUE.keys() == {field.name for field in dataclasses.fields(sample.SampleSettings)}
    own = {argument[2:].split("=")[0] for argument in command.split()}
    turns_it = {"evaluate", "chat", "beams", "prompts", "logprobs", "init_from", "checkpoint"}
    for name in SOME_VALUE.keys() - REFUSED[command].keys() - own - turns_it:
        given = read_given(sample.SampleSettings, [*command.split(), f"--{name}={SOME_VALUE[name]}"])
        sample.require_compatible(fill(sample.SampleSettings, given), given)


def test_what_a_config_file_gives_is_given_and_what_is_off_is_off(refusal, cli, tmp_path):
    (tmp_path / "mine.py").write_text("beams = 2\ntemperature = 0.5\n")
    line = refusal(sample.main, "mine.py", status=2)
    assert "mine.py: temperature = 0.5 means nothing with --beams" in line
    save(gpt_that_likes([1], 3), CharTokenizer("abc"), tmp_path / "out")
    argv = ["--start=a", "--device=cpu", "--max_new_tokens=2", "--beams=2"]
    assert cli(sample.main, *argv, "--logprobs=False", "--chat=False", "--bleu=False") == (0, "abb\n", "")


# Precision, compilation


@pytest.fixture(scope="module")
def sizes():
    """GPTs with 15 and 17 million parameters, without memory for them."""
    with torch.device("meta"):
        return [GPT(GPTConfig(**{**SMALL, "vocab_size": count * 10**6 // 8})) for count in (15, 17)]


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_large_models_are_read_in_bfloat16_by_a_cpu_that_has_it(monkeypatch, sizes, has_bfloat16):
    capabilities = {"avx512_bf16": has_bfloat16}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    cpu, (small, large) = torch.device("cpu"), sizes
    fast = torch.bfloat16 if has_bfloat16 else torch.float32
    assert generation_dtype("auto", cpu, small) == torch.float32
    assert generation_dtype("auto", cpu, large) == fast
    assert generation_dtype("auto", torch.device("mps"), large) == torch.float32
    for name in ("float32", "float16", "bfloat16"):
        for gpt in sizes:
            assert generation_dtype(name, cpu, gpt) == getattr(torch, name)


def test_the_precision_asked_for_is_the_models(recite):
    seen = []
    with forward_hook(257, lambda embedding, _: seen.append(embedding.weight.dtype)):
        recite(b"a", "--dtype=bfloat16")
        recite(b"a")
    assert seen == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    "device, steps, taken",  # of a large model, where there is a compiler
    [
        ("cuda", 0, "plain"),
        ("cuda", GRAPH_FROM - 1, "plain"),
        ("cuda", GRAPH_FROM, "graph"),
        ("cuda", 2000, "graph"),
        ("cuda", 500_000, "compiled"),
        ("cpu", 1999, "plain"),
        ("cpu", 2000, "compiled"),
        ("mps", 10**9, "plain"),
    ],
)
@pytest.mark.parametrize("lacking", [None, "no compiler is found: install one"])
def test_auto_takes_the_engine_that_pays_for_so_many_steps(
    monkeypatch, capsys, sizes, device, steps, taken, lacking
):
    monkeypatch.setattr(choice, "cannot_compile", lambda device: lacking)
    device, (small, large) = torch.device(device), sizes
    uncompiled = "graph" if device.type == "cuda" else "plain"
    for gpt in (large, small):
        expected = taken
        warned = lacking and taken == "compiled" and not (gpt is small and device.type == "cpu")
        if taken == "compiled" and (lacking or (gpt is small and device.type == "cpu")):
            expected = uncompiled
        assert choose_engine("auto", device, gpt, steps, 1) == expected
        err = capsys.readouterr().err
        assert err == (f"warning: the model is not compiled, and so slower: {lacking}\n" if warned else "")


@pytest.mark.parametrize(
    "argv, steps, rows",
    [
        (["--prompts=two.txt", "--max_new_tokens=30"], 30, 2),
        (["--prompts=two.txt", "--max_new_tokens=30", "--batch_size=1"], 60, 1),
        (["--prompts=two.txt", "--max_new_tokens=30", "--num_samples=3", "--batch_size=2"], 90, 2),
        (
            ["--prompts=two.txt", "--max_new_tokens=30", "--num_samples=3", "--beams=3", "--batch_size=1"],
            60,
            3,
        ),
        (["--chat", "--max_new_tokens=0"], sample.TYPICAL_ANSWER, 1),
    ],
)
def test_the_engine_is_chosen_by_the_number_of_steps(cli, tmp_path, monkeypatch, argv, steps, rows):
    tok = CharTokenizer("ab")
    tok = ChatTokenizer(tok) if "--chat" in argv else tok
    save(gpt_that_likes([1], tok.vocab_size), tok, tmp_path / "out")
    (tmp_path / "two.txt").write_text("a\nb\n")
    asked = []
    monkeypatch.setattr(sample, "choose_engine", lambda *given: asked.append(given[-2:]) or "plain")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        status, _, err = cli(sample.main, "--device=cpu", *argv)
    assert (status, err, asked) == (0, "", [(steps, rows)])


@pytest.mark.parametrize(
    "name, says",
    [
        ("graph", "a CUDA graph needs a CUDA device, not cpu"),
        ("compiled", "no C++ compiler is found: install g++"),
        ("kernels", "a CUDA graph needs a CUDA device, not cpu"),
    ],
)
def test_an_engine_that_cannot_run_here_is_refused_in_a_line(refusal, tmp_path, monkeypatch, name, says):
    save(gpt_that_likes([1], 2), CharTokenizer("ab"), tmp_path / "out")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    line = refusal(sample.main, "--start=a", "--device=cpu", f"--engine={name}")
    assert line == f"error: --engine={name} can't be used: {says}. Or use --engine=auto\n"


def test_the_kernels_are_used_or_refused_with_their_reason(monkeypatch, sizes):
    kernels = SimpleNamespace(
        MOST_TEXTS=8, why_not=lambda gpt, device: "no triton" if gpt is sizes[1] else None
    )
    monkeypatch.setitem(sys.modules, "kqv.kernels.decoding", kernels)
    gpu, (small, large) = torch.device("cuda"), sizes
    assert choose_engine("kernels", gpu, small, 1, 8) == "kernels"
    with pytest.raises(UserError, match="at most 8 texts at once, not 9: use a smaller --batch_size"):
        choose_engine("kernels", gpu, small, 1, 9)
    with pytest.raises(UserError, match="--engine=kernels can't be used: no triton"):
        choose_engine("kernels", gpu, large, 1, 1)


def test_compile_is_train_pys_and_says_what_it_is_here(refusal):
    line = refusal(sample.main, "--compile=False", status=2)
    assert line == "error: --compile is not a setting: here it is --engine=compiled or --engine=plain\n"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with the checkpoint of a model that is large enough to be compiled on a CPU."""
    shape = {"block_size": 4, "n_layer": 2, "n_head": 1, "n_embd": 840}
    return save(GPT(GPTConfig(vocab_size=257, **shape)), ByteTokenizer(), tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize(
    "argv, compiled",
    [
        (["--start=a"], False),
        (["--start=a", "--engine=compiled"], True),
        (["--prompts=two.txt", "--batch_size=1"], True),
        (["--prompts=two.txt", "--batch_size=1", "--engine=plain"], False),
        (["--prompts=two.txt", "--batch_size=2"], False),
    ],
)
def test_the_model_is_compiled_where_that_pays_or_is_asked_for(cli, large, monkeypatch, argv, compiled):
    (large / "two.txt").write_text("a\nb\n")
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **_: asked.append(module))
    monkeypatch.setitem(choice.COMPILE_FROM, "cpu", 4)
    monkeypatch.setenv("CXX", sys.executable)  # a compiler is found
    argv = [argument.replace("two.txt", str(large / "two.txt")) for argument in argv]
    status, _, err = cli(sample.main, f"--out_dir={large}", "--device=cpu", "--max_new_tokens=2", *argv)
    assert (status, err, bool(asked)) == (0, "", compiled)


# Processes


def test_a_reader_that_leaves_ends_the_text_quietly(trained, tmp_path):
    arguments = command(f"--out_dir={trained}", "--start=keys", "--max_new_tokens=100000", "--engine=plain")
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        arguments, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, env=process_environment()
    )
    os.close(theirs)
    assert len(os.read(ours, 5)) > 0
    os.close(ours)  # as `| head` does
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == 0


def test_the_text_of_a_process_is_that_of_main_in_the_terminals_encoding(write, trained, tmp_path):
    done = subprocess.run(
        command(f"--out_dir={trained}", "--max_new_tokens=40", "--start=é"),
        cwd=tmp_path,
        env=process_environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == write("--start=é").encode("ascii", "backslashreplace")
