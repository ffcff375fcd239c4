"""look.py as a user runs it: a page of a model, a server, curves of runs; and what it refuses."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, TINY_RUN, process_environment

import look
import prepare
import train


@pytest.fixture
def trained(cli, tiny_set):
    """The folder of a run on a tiny set of characters."""
    assert cli(train.main, *TINY_RUN, "--dataset=tiny")[0] == 0
    return "out"


def data_of(path):
    """What a page shows, as Python."""
    page = path.read_text("utf-8")
    return json.loads(re.search(r'<script type="application/json" id="page">(.*?)</script>', page, re.S)[1])


def test_a_page_of_the_text_is_written(cli, trained, tmp_path):
    status, out, err = cli(look.main, "--text=the keys and")
    assert (status, out, err) == (0, "look.html: open it in a browser\n", "")
    shown = data_of(tmp_path / "look.html")
    figures = shown["figures"]
    assert "".join(figures["vocabulary"][str(token["id"])] for token in figures["tokens"]) == "the keys and"
    assert [run["name"] for run in shown["runs"]] == ["out"]  # how it learnt
    page = (tmp_path / "look.html").read_text("utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


def test_a_text_can_come_from_a_file(cli, trained, tmp_path):
    (tmp_path / "mine.txt").write_text("values", "utf-8")
    assert cli(look.main, "--text=FILE:mine.txt", "--page=mine.html")[0] == 0
    assert len(data_of(tmp_path / "mine.html")["figures"]["tokens"]) == 6


def test_a_model_of_conversations_is_asked_its_own_first_question(cli, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]}
        for n in range(40)
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    assert cli(prepare.main, "talk.jsonl", "--name=talk")[0] == 0
    assert cli(train.main, *TINY_RUN, "--dataset=talk")[0] == 0
    assert cli(look.main)[0] == 0
    figures = data_of(tmp_path / "look.html")["figures"]
    texts = [figures["vocabulary"][str(token["id"])] for token in figures["tokens"]]
    assert texts[-1] == "<|assistant|>" and texts[-2] == "?"


def test_curves_of_runs_are_a_page_or_a_picture(cli, trained, tmp_path):
    assert cli(look.main, "--runs", "out", "--page=runs.html")[0] == 0
    (run,) = data_of(tmp_path / "runs.html")["runs"]
    assert [step for step, _ in run["curves"]["val_loss"]] == [0, 3, 6]
    assert cli(look.main, "--runs", "out", "--png=runs.png")[1] == "runs.png\n"
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--text=k"], "the text has 1 tokens"),
        (["--text=the Q"], "Q"),
        (["--text=FILE:no.txt"], "no.txt"),
        (["--out_dir=elsewhere"], "python train.py config/train_plays_char.py"),
        (["--init_from=nowhere"], "nowhere"),
        (["--page=no/such/folder.html"], "no/such"),
        (["--runs", "nowhere"], "nowhere/metrics.jsonl"),
        (["--device=abacus"], "abacus"),
    ],
)
def test_what_can_not_be_done_is_one_line(refusal, trained, arguments, said):
    assert said in refusal(look.main, *arguments)


def test_nothing_but_a_page_is_replaced(cli, refusal, trained, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine", "utf-8")
    (tmp_path / "look.html").write_text("<!DOCTYPE html>an older page", "utf-8")
    assert "is a folder" in refusal(look.main, "--page=notes", "--text=the keys")
    assert "another kind of file" in refusal(look.main, "--page=notes/mine.txt", "--text=the keys")
    assert "another kind of file" in refusal(look.main, "--runs", "out", "--png=look.html")
    assert (tmp_path / "notes/mine.txt").read_text("utf-8") == "mine"
    assert cli(look.main, "--text=the keys")[0] == 0
    assert data_of(tmp_path / "look.html")["figures"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--txt=a"], "did you mean text"),
        (["out/a"], "--runs"),
        (["--runs"], "names no folder"),
        (["--runs", "out", "--text=a"], "with --runs"),
        (["--serve", "--page=a.html"], "--serve"),
        (["--port=1"], "without --serve"),
        (["--png=a.png"], "without --runs"),
        (["--port=70000", "--serve"], "65536"),
    ],
)
def test_a_wrong_command_is_one_line(refusal, trained, arguments, said):
    assert said in refusal(look.main, *arguments, status=2)


def test_the_server_reads_texts_and_trains(cli, trained, tmp_path):
    command = [sys.executable, str(ROOT / "look.py"), "--serve", "--port=0", "--text=the keys"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=process_environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        address = process.stdout.readline().split()[0]

        def ask(name, **asked):
            request = urllib.request.Request(
                address + name, json.dumps(asked).encode(), {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, error.read().decode()

        with urllib.request.urlopen(address, timeout=60) as page:
            assert "connect-src 'self'" in page.read().decode()
        status, found = ask("figures", text="values and")
        assert status == 200 and len(found["tokens"]) == 10
        status, layer = ask("layer", ids=[1, 2, 3], layer=1)
        assert status == 200 and layer["q"]["shape"] == [2, 3, 16]
        for asked in (
            {"ids": [1, 99], "layer": 0},
            {"ids": [1, 2], "layer": 2},
            {"ids": "1", "layer": 0},
            {},
        ):
            assert ask("layer", **asked)[0] == 422, asked
        assert ask("figures", text="Q") == (422, ask("figures", text="Q")[1]) and ask("figures")[0] == 422
        assert ask("train", change="__class__")[0] == 422
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)
    assert process.returncode == 130
