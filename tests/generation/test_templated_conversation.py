"""A model that brings a chat template is asked and tuned in it."""

import io
import json
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, random_gpt
from known_models import gpt_that_writes, save

import prepare
import sample
import train
from kqv.formats import loading

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "text"))
from test_templated import chat_of


@pytest.fixture(scope="module")
def chat():
    return chat_of("qwen3")


def writes(chat, text, folder):
    """A model that writes this text at the place where the answer to "a" stands, and ends its turn."""
    ids = [0] * (len(chat.encode_chat([("user", "a")])) - 1)
    ids += [*chat.encode(text).tolist(), chat.ends[0], *chat.encode("x").tolist()]
    save(gpt_that_writes(ids, chat.vocab_size), chat, folder)


@pytest.mark.parametrize("how", [[], ["--beams=2"], ["--chat"]])
def test_an_answer_ends_at_the_end_of_its_turn(chat, cli, tmp_path, monkeypatch, how):
    writes(chat, "No keys", tmp_path / "out")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    start = [] if how == ["--chat"] else ["--start=a"]
    assert cli(sample.main, "--device=cpu", *start, *how) == (0, "No keys\n", "")


def test_a_conversation_goes_on_in_the_template(chat, cli, tmp_path, monkeypatch):
    gpt = random_gpt(seed=3, vocab_size=chat.vocab_size, block_size=256, n_embd=32, std=0.5)
    save(gpt, chat, tmp_path / "out")
    argv = ["--device=cpu", "--max_new_tokens=4", "--temperature=0", "--chat", "--format=text"]
    argv = argv[:-1]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\nb\n")))
    seen, original = [], type(chat).encode_chat

    def noted(self, messages, unknown="error"):
        seen.append(messages)
        return original(self, messages, unknown)

    monkeypatch.setattr(type(chat), "encode_chat", noted)
    status, out, err = cli(sample.main, *argv)
    assert (status, err) == (0, "")
    assert seen[0] == [("user", "a")] and [role for role, _ in seen[1]] == ["user", "assistant", "user"]
    assert out.startswith(seen[1][1][1])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    assert cli(sample.main, *argv, "--system=Be brief.")[0] == 0
    assert seen[2] == [("system", "Be brief."), ("user", "a")]


def test_a_message_that_does_not_fit_is_refused(chat, tmp_path, refusal):
    save(random_gpt(vocab_size=chat.vocab_size, block_size=64), chat, tmp_path / "out")
    line = refusal(sample.main, "--device=cpu", f"--start={'ab ' * 80}")
    assert "block_size=64" in line and "shorten it" in line


def test_tuning_keeps_the_ids_and_lowers_the_loss_on_answers(chat, cli, tmp_path):
    save(random_gpt(vocab_size=chat.vocab_size, block_size=128, std=0.02), chat.base, tmp_path / "base")
    rows = [{"prompt": f"key {i % 7}", "completion": f"lock {i % 7}"} for i in range(80)]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli(prepare.main, "a.jsonl", "--tokenizer=base", "--name=mine", "--val=a.jsonl")[0] == 0
    argv = [*TINY_RUN, "--dataset=mine", "--init_from=base", "--block_size=128", "--dtype=float32"]
    status, _, err = cli(train.main, *argv, "--max_iters=12", "--eval_interval=12")
    assert status == 0, err
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    contents = loading.load("out/ckpt.pt")
    assert len(contents["model"]["lm_head.weight"]) == chat.vocab_size
    assert contents["tokenizer"] == chat.to_json()
    assert cli(train.main, "--init_from=resume", "--max_iters=14")[0] == 0
    status, out, _ = cli(sample.main, "--device=cpu", "--evaluate=val", "--max_examples=3")
    assert status == 0 and "of 3 conversations" in out
