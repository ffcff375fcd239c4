"""Text as it can be shown: what a terminal would obey, or nobody sees, is written out."""

import io
import os
import pty
import subprocess
import sys
import unicodedata

import pytest
import torch
from conftest import ROOT, process_environment, random_gpt
from exports import save_run
from hypothesis import given
from hypothesis import strategies as st
from known_models import gpt_that_writes, save

import export
import prepare
import sample
import train
from kqv.errors import Output, say
from kqv.printable import one_line, printable, without_commands
from kqv.text.tokenizers import ByteTokenizer

EVIL = "a\x1b]0;title\x07\x1b[31m\r\nb\u202ec\u200b\u2028\x9bd\ufeff\u2066"
SHOWN = r"a\x1b]0;title\x07\x1b[31m\r\nb\u202ec\u200b\u2028\x9bd\ufeff\u2066"
STAYS = [
    "é ñ ½ \u00a0 \u3000 键值 ключи",
    "क्\u200dष क्\u200cष می\u200cخواهم",
    "👨\u200d👩\u200d👧 👁\ufe0f\u200d🗨\ufe0f 🇮🇳",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "two\n\tlines",
]
TEXTS = st.text(st.characters() | st.sampled_from([*EVIL, *"".join(STAYS), "\ud800", "\udcff"]))


def is_hidden(char):
    """Whether Unicode calls a character a control, a surrogate, a separator of lines or a bidi control."""
    return unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char in "\u061c\u200e\u200f\u200b\ufeff"


@pytest.mark.parametrize("text", STAYS)
def test_what_people_write_stays(text):
    assert printable(text) == text


def test_what_is_hidden_is_written_out():
    assert one_line(EVIL) == SHOWN and printable(EVIL) == SHOWN.replace(r"\n", "\n")
    assert (
        printable("a\u200db\u200cé\u202e\u200d") == r"a\u200db\u200cé\u202e\u200d"
    )  # joiners that join nothing
    assert printable("a\U000e0041b\U000e0001") == r"a\U000e0041b\U000e0001"  # tags that are no flag's


@given(TEXTS)
def test_nothing_hidden_is_left_and_the_rest_is_as_it_was(text):
    shown = printable(text)
    assert not any(map(is_hidden, shown.replace("\n", "").replace("\t", "")))
    assert not any(map(is_hidden, one_line(text))) and printable(shown) == shown
    shown.encode("utf-8")
    if not any(is_hidden(char) or unicodedata.category(char) == "Cf" for char in text if char not in "\n\t"):
        assert shown == text


@given(st.lists(TEXTS))
def test_a_stream_shows_pieces_as_the_whole_text(pieces):
    stream = io.StringIO()
    output = Output(stream, needed=True)
    for piece in pieces:
        assert output.write(piece) == len(piece)
    assert stream.getvalue() == printable("".join(pieces))


def test_libraries_may_draw_progress_bars_and_give_no_other_orders():
    for drawn in ("\r 10% left", "\r     ", "\r", "\n\n\x1b[A\x1b[A", "\r\x1b[Am\x1b[2K\r"):
        assert without_commands(drawn) == drawn
    assert without_commands("\x1b[34mwandb\x1b[0m: a\n") == "wandb: a\n"
    assert without_commands("\rname\x1b]0;a\x07 b\rc\x1b[2J") == "\rname" + r"\x1b]0;a\x07 b\rc\x1b[2J"


# What strangers name


def refuses_evil(result):
    """That a command ended in one line without anything hidden in it."""
    status, out, err = result
    assert status and err.startswith("error: ") and err.count("\n") == 1, err
    assert not any(map(is_hidden, (out + err).replace("\n", ""))), err
    return err


@pytest.mark.parametrize(
    "main, argv",
    [
        (train.main, ["--dataset=X"]),
        (train.main, ["--out_dir=X", "--init_from=resume"]),
        (train.main, ["X.py"]),
        (train.main, ["--X=1"]),
        (train.main, ["--n_layer=X"]),
        (train.main, ["--init_from=X"]),
        (sample.main, ["--out_dir=X"]),
        (sample.main, ["--checkpoint=X"]),
        (sample.main, ["--start=FILE:X"]),
        (sample.main, ["--prompts=X"]),
        (export.main, ["--out_dir=X", "--to=a"]),
        (export.main, ["--to=X", "--format=gguf"]),
        (prepare.main, ["X"]),
        (prepare.main, ["text.txt", "--tokenizer=X"]),
        (prepare.main, ["text.txt", "--name=X"]),
    ],
)
@pytest.mark.parametrize(
    "name", [EVIL, "\udcff", "-\x1b[2J", "x" * 5000], ids=["evil", "bytes", "option", "long"]
)
def test_a_name_of_a_stranger_reaches_no_terminal(cli, main, argv, name):
    refuses_evil(cli(main, *(part.replace("X", name) for part in argv)))


def with_weight(contents, name):
    contents["model"][name] = torch.zeros(2)


CHANGES = {
    "a weight's name": lambda contents: with_weight(contents, EVIL),
    "a shape's name": lambda contents: contents["model_args"].update({EVIL: 1}),
    "a shape's value": lambda contents: contents["model_args"].update(n_layer=EVIL),
    "a tokenizer's kind": lambda contents: contents.update(tokenizer={"kind": EVIL}),
    "a vocabulary": lambda contents: contents.update(tokenizer={"kind": "char", "chars": [EVIL]}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("main", [sample.main, export.main], ids=["sample", "export"])
def test_a_checkpoint_of_a_stranger_orders_nothing(cli, tmp_path, main, change):
    tokenizer = ByteTokenizer()
    save_run(tmp_path / "out", tokenizer, random_gpt(vocab_size=tokenizer.vocab_size))
    contents = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    change(contents)
    torch.save(contents, tmp_path / "out/ckpt.pt")
    argv = ["--to=a"] if main is export.main else ["--device=cpu", "--start=a", "--max_new_tokens=1"]
    _, out, err = cli(main, *argv)
    assert not any(map(is_hidden, (out + err).replace("\n", ""))), err


def test_a_message_is_a_line(capsys):
    say(f"wrote {EVIL}")
    assert capsys.readouterr().out == f"wrote {SHOWN}\n"


# Generated text


def on_terminal(*argv, cwd):
    """What sample.py prints on a terminal of its own."""
    screen, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "sample.py"), "--device=cpu", *argv]
    environment = process_environment(PYTHONIOENCODING="utf-8")
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, cwd=cwd, env=environment
    )
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(screen, 4096):
            shown += part
    except OSError:  # the terminal has no program any more
        pass
    os.close(screen)
    assert process.wait() == 0, shown
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture
def evil_run(tmp_path):
    """A run of a model of bytes that writes EVIL, and then what people write, in pieces; -> that text."""
    text = f"{EVIL}क्\u200dष👨\u200d👩é"
    save(gpt_that_writes(text.encode(), 257), ByteTokenizer(), tmp_path / "out")
    return text


def test_a_terminal_obeys_no_generated_text_but_with_raw(evil_run, cli, tmp_path):
    argv = [f"--max_new_tokens={len(evil_run.encode())}", "--start=>"]
    shown = on_terminal(*argv, cwd=tmp_path)
    assert shown == f">{printable(evil_run)}\n"
    assert on_terminal(*argv, "--raw", cwd=tmp_path) == f">{evil_run}\n"
    assert cli(sample.main, *argv, "--device=cpu") == (0, f">{evil_run}\n", "")  # into a pipe
    assert cli(sample.main, *argv, "--device=cpu", "--raw", "--num_samples=2")[1].count(evil_run) == 2


def test_json_has_no_control_codes(cli, tmp_path):
    save(gpt_that_writes(b"a\x7fb\x1b", 257), ByteTokenizer(), tmp_path / "out")
    status, out, _ = cli(sample.main, "--device=cpu", "--start=>", "--max_new_tokens=4", "--format=jsonl")
    assert status == 0 and out.isascii() and out.rstrip("\n").isprintable() and r'"a\u007fb\u001b"' in out
