"""The model card of an exported folder."""

import ast
import re

import pytest
import torch
from conftest import random_gpt
from exports import make_tokenizer, save_run

import export
from kqv.formats.card import card
from kqv.text.tokenizers import ByteTokenizer


def test_the_card_has_the_training_and_no_path(tmp_path):
    secret = str(tmp_path / "secret")
    config = {"learning_rate": 3e-4, "dataset": f"{secret}/plays", "out_dir": secret, "init_from": secret}
    config |= {"wandb_project": secret, "decay_lr": True, "odd": [secret], "x y|z": 1, "n_layer": 77}
    save_run(tmp_path / "run", ByteTokenizer(), config=config, iter_num=1234, best_val_loss=1.23456)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    text = (tmp_path / "hf/README.md").read_text("utf-8")
    for line in ("Data: plays.", "Steps: 1234.", "| learning_rate | 0.0003 |", "| decay_lr | True |"):
        assert line in text.splitlines()
    assert "Validation loss: 1.2346 nats" in text and "| n_layer | 2 |" in text and "77" not in text
    assert "| vocab_size | 257 |" in text and "x y" not in text
    written = b"".join(path.read_bytes() for path in (tmp_path / "hf").iterdir())
    assert b"secret" not in written and str(tmp_path).encode() not in written


def card_of(tokenizer, contents, name="it"):
    return card(name, random_gpt(vocab_size=tokenizer.vocab_size), tokenizer, contents)


@pytest.mark.parametrize("loss", [float("inf"), float("nan"), torch.tensor(2.5), None, "x", torch.zeros(2)])
def test_a_card_has_the_losses_that_are_known(loss):
    text = card_of(ByteTokenizer(), {"best_val_loss": loss})
    is_known = isinstance(loss, torch.Tensor) and loss.dim() == 0
    assert ("Validation loss: 2.5000 nats" in text) == ("Validation loss" in text) == is_known
    assert "Steps" not in text and "Data" not in text


def test_the_card_says_what_a_tokenizer_does_with_odd_texts():
    cards = {kind: card_of(make_tokenizer(kind), {}, name=kind) for kind in ("char", "bpe", "chat-bpe")}
    assert "does not know are left out" in cards["char"] and "any text" in cards["bpe"]
    assert "apply_chat_template" in cards["chat-bpe"] and "# bpe" in cards["bpe"].splitlines()


@pytest.mark.parametrize(
    "name",
    [
        "a\n---\nlicense: mit\n---\n# Big",
        "[x](javascript:alert(1))",
        "<script>alert(1)</script><img src=x onerror=y>",
        "![a](https://example.org/a.png) https://example.org www.example.org a@example.org",
        "**bold** _it_ ~~no~~ `code` &lt; $x$ | cell",
        "\x1b[31m\u202e\udcff\u2028# a",
        "``` \n```\n# out",
    ],
)
def test_a_name_is_text_in_the_card_and_nothing_else(name):
    plain = card_of(ByteTokenizer(), {"config": {"dataset": "plain"}}, name="plain").splitlines()
    text = card_of(ByteTokenizer(), {"config": {"dataset": name.replace("/", "∕")}}, name=name)
    text.encode("utf-8")
    lines = text.split("\n")[:-1]
    assert len(lines) == len(plain) == len(text.splitlines())
    for line, expected in zip(lines, plain, strict=True):
        if expected in ("# plain", "Data: plain."):
            shown = line.removeprefix("# ").removeprefix("Data: ")
            assert not re.search(r"(?<!\\)(\\\\)*[<>\[\]()!*`~&$|:@#]", shown), line
            assert shown.isprintable()
        elif "from_pretrained" in expected:
            assert ast.literal_eval(line.split("from_pretrained(")[1].removesuffix(")")) == name
        else:
            assert line == expected


def test_numbers_that_no_setting_has_are_not_in_the_card():
    config = {"seed": 10**5000, "a": -(2**64), "b": 2**62, "<b>": 1, "__c__": 2}
    text = card_of(ByteTokenizer(), {"config": config, "iter_num": 10**5000})
    assert "| b | 4611686018427387904 |" in text and "seed" not in text and "Steps" not in text
    assert "<b>" not in text and r"| \_\_c\_\_ | 2 |" in text
