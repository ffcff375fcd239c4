"""Texts that are typed and continued: on a terminal, by a program, and with --chat as a conversation."""

import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT, process_environment, random_gpt
from known_models import forward_hook, gpt_that_writes, parsed, save
from torch import nn

import sample
from kqv.generation.beams import beam_search
from kqv.generation.engine import Engine
from kqv.generation.sampling import PLAIN
from kqv.generation.stream import generate
from kqv.text.text_stream import TextStream
from kqv.text.tokenizers import CharTokenizer, ChatTokenizer

SEPARATOR = "\n---------------\n"
GREEDY = replace(PLAIN, temperature=0)
TEXTS = CharTokenizer("\n abcdefghijklmnopqrstuvwxyz.")
TALK = ChatTokenizer(CharTokenizer("abcdef ."))


def command(*arguments):
    return [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *map(str, arguments)]


@pytest.fixture
def write(cli, tmp_path):
    """Call sample.py on a model of texts with random weights: write("--start=keys") -> the text."""
    shape = {"vocab_size": TEXTS.vocab_size, "block_size": 16, "n_embd": 32}
    save(random_gpt(seed=1, **shape), TEXTS, tmp_path / "texts")

    def succeed(*argv):
        status, out, err = cli(sample.main, "--out_dir=texts", "--device=cpu", "--max_new_tokens=20", *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


@pytest.fixture(scope="module")
def talker():
    """A GPT for TALK of random weights whose likeliest answers depend on all that was said."""
    gpt = random_gpt(seed=2, std=0.5, vocab_size=TALK.vocab_size, block_size=32, n_embd=32)
    for module in gpt.modules():
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
    return gpt


@pytest.fixture
def talk(cli, talker, tmp_path):
    """Call sample.py on that model of conversations: talk("--start=ab") -> its answer."""
    save(talker, TALK, tmp_path / "talk")

    def succeed(*argv):
        status, out, err = cli(sample.main, "--out_dir=talk", "--device=cpu", "--max_new_tokens=6", *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


@pytest.fixture
def answer(talker):
    """The likeliest answer of that model to ids: answer(chat_ids("ab")) -> text, by kqv's own functions."""

    def given(ids, max_new_tokens=6, stops=(), beams=0):
        engine, text = Engine(talker), TextStream(TALK, stops)
        if beams:

            def ends(ids):
                return ids[-1] == TALK.separator or any(stop in TALK.decode(ids) for stop in stops)

            ((best, *_),) = beam_search(engine, [ids], max_new_tokens, beams, 0.0, ends, TALK.vocab_size)
            written = best.ids
        else:
            (whole,) = generate(engine, [ids], max_new_tokens, sampling=GREEDY, vocab_size=TALK.vocab_size)
            written = whole[len(ids) :]
        return "".join(map(text.feed, written)) + text.finish()

    return given


def piped(monkeypatch, content):
    """Let a program write to standard input."""
    content = content if isinstance(content, bytes) else content.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.fixture
def asked(monkeypatch):
    """What is typed on a pretended terminal, one line after another; then it ends."""
    lines = []

    def type_a_line(prompt):
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", type_a_line)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    sys.stdin.isatty = lambda: True
    return lines


def chat_ids(*messages, system=""):
    """The ids of what the two sides say in turn, the user first."""
    roles = ("user", "assistant") * len(messages)
    return TALK.encode_chat([("system", system), *zip(roles, messages, strict=False)]).tolist()


# Texts, one after another


def test_each_text_that_is_typed_draws_anew(write, asked):
    asked += ["keys", "keys"]
    texts = write("--seed=3", "--num_samples=2").split("keys")
    assert len(texts) == 5 and len(set(texts)) == 5
    asked += ["keys"]
    assert write("--seed=3").endswith(write("--start=keys", "--seed=3") + "\n")  # the newline of Ctrl-D


def test_a_text_that_is_typed_obeys_the_same_settings(write, asked):
    for argv in (["--temperature=0", "--stop=s"], ["--beams=3"], ["--beams=3", "--num_samples=2"]):
        asked += ["keys"]
        assert write("--start=keys", *argv).removesuffix("\n") in write(*argv)


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
    assert write()[0] == "\n" and len(write()) == 1 + 20 + 1


def test_a_terminal_without_chat_remembers_nothing(write, talk, answer, asked):
    assert write().startswith("Begin a text, and it is continued.")
    asked += ["ab", "c", ""]
    hint, *answers = talk("--temperature=0").splitlines()
    assert hint.startswith("Say something, and it is answered.")
    assert answers == [answer(chat_ids("ab")), answer(chat_ids("c")), answer(chat_ids("")), ""]
    assert answer(chat_ids("c")) != answer(chat_ids("ab", answers[0], "c"))


# Answers


def test_what_the_user_says_is_answered_and_not_repeated(talk, answer, tmp_path):
    greedy = "--temperature=0"
    expected = answer(chat_ids("ab c"))
    assert talk("--start=ab c", greedy) == f"{expected}\n" and len(expected) > 2
    (record,) = parsed(talk("--start=ab c", greedy, "--format=jsonl"))
    assert (record["prompt"], record["text"]) == ("ab c", expected)
    (tmp_path / "prompts.txt").write_text("ab c\nfed\n")
    both = [record["text"] for record in parsed(talk("--prompts=prompts.txt", greedy, "--format=jsonl"))]
    assert both == [expected, answer(chat_ids("fed"))] and both[0] != both[1]
    assert talk("--prompts=prompts.txt", greedy) == "".join(text + SEPARATOR for text in both)
    assert len(talk("--start=ab c", "--num_samples=2").split(SEPARATOR)) == 3
    best = parsed(talk("--start=ab c", "--beams=3", "--format=jsonl"))[0]["text"]
    assert talk("--start=ab c", "--beams=3") == f"{best}\n"
    assert best == answer(chat_ids("ab c"), beams=3)


def test_the_system_text_comes_first(talk, answer):
    expected = answer(chat_ids("ab", system="be f."))
    assert talk("--start=ab", "--system=be f.", "--temperature=0") == f"{expected}\n"
    assert expected != answer(chat_ids("ab"))


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


def test_characters_that_the_tokenizer_lacks(talk, answer, write, refusal):
    line = refusal(sample.main, "--out_dir=talk", "--device=cpu", "--start=aXb")
    assert "'X' at position 1" in line and "--unknown=skip" in line
    assert talk("--start=aXbX", "--unknown=skip") == talk("--start=ab")
    assert talk("--start=X", "--unknown=skip", "--temperature=0") == answer(chat_ids("")) + "\n"
    assert write("--start=keXys", "--unknown=skip")[5:] == write("--start=keys")[4:]
    line = refusal(sample.main, "--out_dir=talk", "--start=ab", "--unknown=skp", status=2)
    assert "--unknown=skp" in line and "error|skip" in line


def test_a_model_of_texts_has_no_characters_left_to_go_on_from(refusal, write):
    line = refusal(sample.main, "--out_dir=texts", "--device=cpu", "--start=XX", "--unknown=skip")
    assert "0 tokens" in line


def test_a_system_text_that_leaves_no_room_is_shown(talk, refusal):
    argv = ["--out_dir=talk", "--device=cpu", f"--system={'d' * 28}"]
    line = refusal(sample.main, *argv, "--start=ab")
    assert "the prompt 'ddd" in line and "shorten --system" in line


def test_of_a_message_longer_than_the_context_the_end_is_answered(talk, answer, cli, monkeypatch):
    argv = ["--out_dir=talk", "--device=cpu", "--temperature=0", "--max_new_tokens=6", "--system=d."]
    text = "abcdef" * 8
    expected = answer(
        chat_ids(text[-21:], system="d.")
    )  # 26 of 32 tokens are read, 5 of them around the text
    status, out, err = cli(sample.main, *argv, f"--start={text}")
    assert (status, out) == (0, f"{expected}\n") and expected != answer(chat_ids(text[-20:], system="d."))
    assert err.startswith("warning: the prompt 'abcdef") and len(err.splitlines()) == 1
    piped(monkeypatch, f"ab\n{text}\n")
    status, out, err = cli(sample.main, *argv, "--chat")
    assert (status, out.splitlines()[1:]) == (0, [expected])  # what was said before is dropped
    assert err.startswith("warning: the prompt 'abcdef") and len(err.splitlines()) == 1


def test_without_a_newline_in_its_vocabulary_a_model_begins_by_itself(cli, tmp_path, asked, monkeypatch):
    tok = CharTokenizer("ACGT")
    save(random_gpt(vocab_size=4), tok, tmp_path / "dna")
    argv = ["--out_dir=dna", "--device=cpu", "--max_new_tokens=5"]
    asked += [""]  # the Enter key
    status, out, err = cli(sample.main, *argv)
    assert (status, err) == (0, "") and out.splitlines()[1].startswith("A") and len(out.splitlines()[1]) == 6
    piped(monkeypatch, "")
    expected = cli(sample.main, *argv)
    assert expected == cli(sample.main, *argv, "--start=A") and expected[0] == 0
    piped(monkeypatch, "GAT\n")  # by echo, with its newline
    assert cli(sample.main, *argv, "--start=-") == cli(sample.main, *argv, "--start=GAT")
    save(random_gpt(vocab_size=8), ChatTokenizer(tok), tmp_path / "dna")
    piped(monkeypatch, "")
    assert cli(sample.main, *argv)[0] == 0
    piped(monkeypatch, "\n\n")
    status, out, err = cli(sample.main, *argv, "--chat")
    assert (status, err, len(out.splitlines())) == (0, "", 2)


@pytest.mark.parametrize("argument", ["--chat", "--system=a"])
def test_a_model_of_texts_does_not_talk(refusal, write, argument):
    line = refusal(sample.main, "--out_dir=texts", "--device=cpu", argument)
    assert argument.split("=")[0] in line and "prepare.py" in line


# A conversation


def test_a_conversation_is_remembered(talk, answer, monkeypatch):
    piped(monkeypatch, "ab\nba c\r\n\nf")
    answers = talk("--chat", "--system=d.", "--max_new_tokens=2", "--temperature=0").split("\n")
    said = ["ab", "ba c", "", "f"]
    messages = []
    for text, found in zip(said, answers, strict=False):
        messages.append(text)
        assert found == answer(chat_ids(*messages, system="d."), 2)
        messages.append(found)
    assert answers[4:] == [""]
    forgetful = [answer(chat_ids(text, system="d."), 2) for text in said]
    assert answers[1:4] != forgetful[1:]


def test_each_answer_of_a_conversation_draws_anew(talk, monkeypatch):
    piped(monkeypatch, "ab\n" * 5)
    answers = talk("--chat", "--temperature=9", "--top_k=0").splitlines()
    piped(monkeypatch, "ab\n" * 5)
    assert answers == talk("--chat", "--temperature=9", "--top_k=0").splitlines()
    piped(monkeypatch, "ab\n" * 5)
    assert answers != talk("--chat", "--temperature=9", "--top_k=0", "--seed=2").splitlines()
    piped(monkeypatch, "ab")
    assert talk("--chat") == talk("--start=ab")


@pytest.mark.parametrize("beams", [0, 3])
@pytest.mark.parametrize("tokens, room", [(6, 26), (8, 24), (30, 24), (0, 32)])
def test_the_oldest_exchanges_make_room_for_an_answer(talk, answer, monkeypatch, beams, tokens, room):
    said = ["a", "bb", "abc", "d" * 10, "a", "ef" * 12, "f", "e", "d"]  # the sixth fills the context alone
    piped(monkeypatch, "".join(f"{text}\n" for text in said))
    how = f"--beams={beams}" if beams else "--temperature=0"
    argv = ["--chat", "--system=d.", f"--max_new_tokens={tokens}", "--stop= ", how]
    answers = talk(*argv).split("\n")
    assert len(answers) == len(said) + 1
    messages = [text for pair in zip(said, answers, strict=False) for text in pair]

    def answer_from(first, turn):
        """The answer that follows from the exchanges from `first` on."""
        return answer(chat_ids(*messages[2 * first : 2 * turn + 1], system="d."), tokens, (" ",), beams)

    forgotten, kept, told_apart = 0, [], 0
    for turn in range(len(said)):
        fitting = [
            number
            for number in range(turn + 1)
            if len(chat_ids(*messages[2 * number : 2 * turn + 1], system="d.")) <= room or number == turn
        ]
        forgotten = max(forgotten, fitting[0])  # what was dropped once does not come back
        assert answers[turn] == answer_from(forgotten, turn)
        if forgotten < turn:
            told_apart += answers[turn] != answer_from(forgotten + 1, turn)
        kept.append(turn - forgotten)
    assert kept[0] == kept[5] == 0 and max(kept) > 1 and len(set(kept)) > 2
    assert told_apart > 1 or tokens == 0


def test_an_error_ends_a_conversation_with_a_program(talk, cli, monkeypatch):
    for content, says in (
        ("ab\nX\nab", ["'X'"]),
        (b"ab\n\xff\nab", ["message 2 of standard input", "0xff"]),
    ):
        piped(monkeypatch, content)
        status, out, err = cli(sample.main, "--out_dir=talk", "--device=cpu", "--max_new_tokens=6", "--chat")
        assert status == 1 and out == talk("--start=ab") and err.startswith("error: ")
        assert all(part in err for part in says) and len(err.splitlines()) == 1


def test_an_answer_that_was_stopped_is_remembered_so_far(talk, answer, asked):
    forwards = []

    def ctrl_c(_, ids):
        forwards.append(ids)
        if len(forwards) == 5:  # one reads the prompt, and three have written a token
            raise KeyboardInterrupt

    asked += ["ab", "c"]
    with forward_hook(TALK.vocab_size, ctrl_c):
        _, first, second, _ = talk("--chat", "--temperature=0").split("\n", 3)
    assert len(first) == 3 and answer(chat_ids("ab")).startswith(first)
    assert second == answer(chat_ids("ab", first, "c"))
    assert second not in (answer(chat_ids("c")), answer(chat_ids("ab", answer(chat_ids("ab")), "c")))


def test_a_message_that_can_not_be_read_is_not_remembered_and_drops_nothing(talk, answer, cli, asked):
    asked += ["ab", "X", "c"]
    argv = ["--out_dir=talk", "--device=cpu", "--max_new_tokens=6", "--chat", "--temperature=0"]
    status, out, err = cli(sample.main, *argv)
    first = answer(chat_ids("ab"))
    assert status == 0
    assert out.splitlines()[1:] == [first, answer(chat_ids("ab", first, "c")), ""]
    assert answer(chat_ids("ab", first, "c")) != answer(chat_ids("c"))
    (unknown,) = err.splitlines()
    assert unknown.startswith("warning: ") and "'X'" in unknown


def test_a_closed_standard_input_is_an_empty_one(write, talk, monkeypatch):
    text = write()
    monkeypatch.setattr(sys, "stdin", None)
    assert write() == text
    monkeypatch.setattr(sys, "stdin", None)
    assert talk("--chat") == ""


# Processes


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
    for message, answered in zip(["ab\n", "c\n"], expected, strict=True):
        process.stdin.write(message)
        process.stdin.flush()
        assert process.stdout.readline() == f"{answered}\n"  # before the next message is there
    assert process.communicate() == ("", "") and process.returncode == 0
    patience.cancel()


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

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

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


def test_texts_on_a_terminal(tmp_path):
    # After a prompt of up to 14 tokens the model writes "w...w." and after a longer one "s" for ever.
    pattern = TEXTS.encode("w" * 13 + "." + "s" * 50).tolist()
    save(gpt_that_writes(pattern, TEXTS.vocab_size), TEXTS, tmp_path / "out")

    def two(text):
        return 2 * f"{text}{'w' * (14 - max(1, len(text)))}{SEPARATOR}"

    argv = ["--max_new_tokens=1000000", "--stop=.", "--num_samples=2"]
    with Terminal(*argv, cwd=tmp_path) as screen:
        assert "Ctrl-C stops it; Ctrl-D ends" in screen.until("\n> ")
        screen.type("keys and\n")
        assert screen.until("\n> ") == f"keys and\n{two('keys and')}> "
        screen.type("keys X\n")
        shown = screen.until("\n> ").splitlines()
        assert shown[1].startswith("warning: the character 'X' at position 5 ") and len(shown) == 3
        screen.type("k" * 65 + "\n")
        assert "65 tokens, more than block_size=64: only its end is read" in screen.until("kkss")
        screen.type("\x03")
        screen.until("\n> ")
        screen.type(b"\xff\n")
        assert "warning: " in screen.until("\n> ")
        screen.type("\x1b[A\x1b[A\x1b[A\x1b[A\n")  # up arrows: the fourth line before this one
        assert screen.until("\n> ").endswith(f"and\n{two('keys and')}> ")
        screen.type("\n")  # no text: a newline is continued
        assert screen.until("\n> ") == "\n" + two("\n") + "> "
        for start in ("keys and queries and", "and values and keys"):
            screen.type(f"{start}\n")
            screen.until(f"{start}\r\n{start}ss")  # it is writing
            screen.type("\x03")
            assert SEPARATOR not in screen.until("\n> ")
        screen.type("\x03")  # with nothing to stop, it asks again
        screen.until("\n> ", again=b"\x03")  # readline overlooks one just before it reads
        screen.type("\x04")
        screen.until("\n")
        assert screen.process.wait(60) == 0
