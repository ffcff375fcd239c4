"""prepare.py --show: documents as tokens, with what is learnt."""

import json
from pathlib import Path

import prepare
from kqv.text import showing


def write_chats():
    said = [{"role": "user", "content": "ab?"}, {"role": "assistant", "content": "b\x1b\n"}]
    Path("a.jsonl").write_text("".join(json.dumps({"messages": said}) + "\n" for _ in range(3)))


def test_conversations_are_shown_with_brackets_around_what_is_learnt(cli):
    write_chats()
    argv = ["a.jsonl", "--tokenizer=byte", "--val=a.jsonl", "--show=2"]
    status, out, err = cli(prepare.main, *argv)
    assert (status, err) == (0, "")
    shown = "<|system|>|<|user|>|a|b|?|<|assistant|>|[b|\\x1b|\\n|<|endoftext|>]"
    for number in (1, 2):
        assert f"conversation {number}: 10 tokens, 4 of them learnt\n{shown}\n" in out
    assert "conversation 3" not in out
    assert shown in cli(prepare.main, *argv)[1]  # also of a set that is ready


def test_what_is_learnt_is_coloured_on_a_terminal(cli, monkeypatch):
    write_chats()

    class Terminal:
        isatty = staticmethod(lambda: True)

    monkeypatch.setattr(showing, "sys", type("sys", (), {"stdout": Terminal}))
    status, out, err = cli(prepare.main, "a.jsonl", "--tokenizer=byte", "--val=a.jsonl", "--show=1")
    assert "|\x1b[32mb|\\x1b|\\n|<|endoftext|>\x1b[0m\n" in out


def test_texts_are_shown_to_the_end_of_each_document(cli):
    Path("a.txt").write_text("a é\t")
    Path("b.txt").write_text("c" * 600)
    status, out, _ = cli(
        prepare.main, "a.txt", "b.txt", "--name=t", "--tokenizer=byte", "--val=a.txt", "--show=9"
    )
    assert status == 0
    assert "document 1: 6 tokens, all of them learnt\na| |\\xc3|\\xa9|\\t|<|endoftext|>\n" in out
    assert "document 2: 600 tokens" in out and "|... 100 more\n" in out
    Path("c.txt").write_text("abc" * 9)
    status, out, _ = cli(prepare.main, "c.txt", "--tokenizer=char", "--val=c.txt", "--show=2")
    assert f"document 1: 27 tokens, all of them learnt\n{'|'.join('abc' * 9)}\n" in out


def test_a_set_in_which_nothing_is_learnt_is_refused(refusal):
    row = {"messages": [{"role": "user", "content": "a"}]}
    Path("a.jsonl").write_text(json.dumps(row) + "\n")
    line = refusal(prepare.main, "a.jsonl", "--tokenizer=byte", "--val=a.jsonl")
    assert "nothing to learn" in line and not Path("data/a_byte").exists()
