"""A set's name, and the command that makes it."""

from pathlib import Path

import pytest
from conftest import write_text

import prepare
import train
from kqv.text import built_in
from kqv.text.dataset import Dataset


def ids(name, split):
    return all_of(Dataset(Path("data").resolve() / name).splits[split])


def all_of(tokens):
    return tokens[:].tolist()


# A set on disk


@pytest.mark.parametrize(
    "name, command",
    [
        ("plays", "prepare.py plays"),
        ("plays_gpt2", "prepare.py plays --tokenizer=gpt2"),
        ("plays_byte", "prepare.py plays --tokenizer=byte"),
        ("plays_bpe2000", "prepare.py plays --tokenizer=bpe:2000"),
        ("plays_chat_plays", "prepare.py plays_chat --tokenizer=data/plays"),
        ("plays_bpe20", "prepare.py YOUR_TEXT.txt --name=plays_bpe20"),
        ("shakespeare", "prepare.py shakespeare"),
        ("shakespeare_char", "prepare.py shakespeare_char"),
        ("shakespeare_char_byte", "prepare.py shakespeare_char --tokenizer=byte"),
        ("mine", "prepare.py YOUR_TEXT.txt --name=mine"),
        ("play", "prepare.py YOUR_TEXT.txt --name=play"),
        ("plays_of_mine", "prepare.py YOUR_TEXT.txt --name=plays_of_mine"),
    ],
)
def test_a_set_that_is_missing_is_named_with_the_command_that_makes_it(name, command, refusal):
    line = refusal(train.main, f"--dataset={name}", "--device=cpu")
    assert f"data/{name} has no train.bin" in line and f"python {command}" in line


@pytest.mark.parametrize(
    "name", ["plays", "plays_byte", "plays_char", "shakespeare_char", "shakespeare_byte", "plays_x", "x"]
)
def test_the_command_makes_the_set_that_was_missing(name, refusal, prepared, tmp_path, monkeypatch):
    for source, found in built_in.BUILT_IN.items():
        found = found._replace(documents=lambda: ["what is built in " * 20])
        monkeypatch.setitem(built_in.BUILT_IN, source, found)
    write_text(tmp_path / "YOUR_TEXT.txt")
    line = refusal(train.main, f"--dataset={name}", "--device=cpu")
    prepared(*line.split("python prepare.py ")[1].split())
    assert ids(name, "train")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../../x",
        "/tmp/x",
        "~",
        "a/b",
        "a\0b",
        "a\nb",
        "a\x1b[2J",
        "a\u202eb",
        "\udcff",
        "é" * 101,
    ],
)
def test_a_set_is_a_folder_in_data_with_a_name_that_can_be_shown(name, refusal, tmp_path):
    write_text(tmp_path / "text.txt", words=300)
    line = refusal(prepare.main, "text.txt", f"--name={name}", status=2)
    assert "--name=" in line and {path.name for path in tmp_path.iterdir()} == {"text.txt"}


@pytest.mark.parametrize("name", ["-x", "--n_layer=3", "a b", "café", "कुंजी", "é" * 100])
def test_a_set_with_an_odd_name_is_found_again(name, prepared, tmp_path):
    write_text(tmp_path / "text.txt", words=300)
    prepared("text.txt", f"--name={name}")
    assert all_of(Dataset(name).splits["train"])
