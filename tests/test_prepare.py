"""prepare.py from the command line: what it makes of a text, and what it refuses."""

import dataclasses
import gzip
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY_RUN, process_environment, script, write_text

import prepare
import train
from kqv.text import built_in, file_formats, learning, names, sources, utf8
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.tokenizers import TOKENIZERS


def ids(name, split):
    return all_of(Dataset(Path("data").resolve() / name).splits[split])


def all_of(tokens):
    return tokens[:].tolist()


def text(name, split):
    return Dataset(Path("data").resolve() / name).tokenizer.decode(ids(name, split))


# prepare.py: files


def test_the_second_time_a_set_is_ready_and_stays_untouched(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt")

    def files():
        found = {path.name: path.stat() for path in Path("data/text").iterdir()}
        return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in found.items()}

    before = files()
    assert len(before) == 3
    assert "ready" in prepared("text.txt")
    assert files() == before


@pytest.mark.parametrize("change", ["text", "val_fraction", "tokenizer", "torn file", "torn meta", "no meta"])
def test_what_has_changed_is_prepared_anew(change, prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt", "--name=tiny")
    options = {"val_fraction": ["--val_fraction=0.2"], "tokenizer": ["--tokenizer=byte"]}.get(change, [])
    if change == "text":
        (tmp_path / "text.txt").write_text("another text " * 50)
    for name in {"torn file": ["val.bin"], "torn meta": ["meta.json"]}.get(change, []):
        (tmp_path / "data/tiny" / name).write_bytes((tmp_path / "data/tiny" / name).read_bytes()[:-10])
    if change == "no meta":
        (tmp_path / "data/tiny/meta.json").unlink()
    assert "ready" not in prepared("text.txt", "--name=tiny", *options)
    whole = (tmp_path / "text.txt").read_text("utf-8")
    assert (text("tiny", "train"), text("tiny", "val")) == cut_in_two(
        whole, 0.2 if change == "val_fraction" else 0.1
    )
    assert "ready" in prepared("text.txt", "--name=tiny", *options)


def cut_in_two(text, val_fraction=0.1):
    """A text's two parts: the second has its last bytes, and begins with a whole character."""
    data = text.encode("utf-8")
    cut = int(len(data) * (1 - val_fraction))
    while data[cut : cut + 1] and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut].decode(), data[cut:].decode()


def test_a_vocabulary_is_learnt_from_the_training_text_alone(prepared, tmp_path):
    (tmp_path / "text.txt").write_text("keys and values " * 90 + "queries " * 20, "utf-8")
    out = prepared("text.txt", "--tokenizer=bpe:300")
    assert "data/text_bpe300: " in out and "bpe tokenizer with 270 ids" in out
    data = Dataset(Path("data/text_bpe300").resolve())
    assert b" values" in data.tokenizer.pieces and not any(b"qu" in piece for piece in data.tokenizer.pieces)
    assert text("text_bpe300", "train") + text("text_bpe300", "val") == (tmp_path / "text.txt").read_text()
    sizes = [len(text("text_bpe300", split)) for split in ("train", "val")]
    assert list(data.bytes.values()) == sizes  # ASCII
    tokens = sum(map(len, data.splits.values()))
    assert f"{sum(sizes) / tokens:.2f} bytes a token" in out
    assert data.bits_per_byte("val", 2.0) == pytest.approx(2 / np.log(2) * len(data.splits["val"]) / sizes[1])
    assert "ready" in prepared("text.txt", "--tokenizer=bpe:300")
    assert "ready" not in prepared("text.txt", "--tokenizer=bpe:258", "--name=text_bpe300")


@pytest.mark.parametrize("source, name", [("b.v2", "b.v2"), ("b.v2/.", "b.v2"), ("b.v2/a.b.txt.gz", "a.b")])
def test_a_set_is_named_after_its_folder_or_file(source, name, prepared, tmp_path):
    (tmp_path / "b.v2").mkdir()
    with gzip.open(tmp_path / "b.v2" / "a.b.txt.gz", "wt") as file:
        file.write("some text " * 50)
    assert f"data/{name}: " in prepared(source)


def test_bits_per_byte_need_a_set_that_knows_its_bytes(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt")
    (tmp_path / "data/text/meta.json").unlink()  # as nanoGPT's are
    assert Dataset(Path("data/text").resolve()).bits_per_byte("val", 2.0) is None


def test_other_borders_between_the_same_texts_are_another_text(prepared, tmp_path):
    for first in ("one two ", "one "):
        (tmp_path / "a.txt").write_text(first)
        (tmp_path / "b.txt").write_text(("one two " + "three " * 50)[len(first) :])
        prepared("a.txt", "b.txt", "--name=ab", "--tokenizer=byte")
        assert ids("ab", "train").index(256) == int(0.9 * len(first))


def test_a_set_is_named_after_its_source_and_an_unusual_tokenizer(prepared, tmp_path):
    write_text(tmp_path / "my text.v2.txt")
    prepared("my text.v2.txt")
    prepared("my text.v2.txt", "--tokenizer=byte")
    prepared("my text.v2.txt", "--name=other", "--tokenizer=byte")
    assert sorted(os.listdir("data")) == ["my text.v2", "my text.v2_byte", "other"]


@pytest.mark.parametrize("name", ["text", "text_byte"])
def test_the_train_command_that_is_printed_finds_the_set(name, prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    out = prepared("text.txt", *(["--tokenizer=byte"] if name == "text_byte" else []))
    assert f"train.py --dataset={name}" in out and Dataset(Path("data").resolve() / name)


def test_meta_json_says_what_the_files_are(prepared, tmp_path):
    write_text(tmp_path / "text.txt")
    prepared("text.txt", "--tokenizer=byte")
    meta = json.loads(Path("data/text_byte/meta.json").read_text("utf-8"))
    assert {name: meta[name] for name in ("tokenizer", "vocab_size", "dtype", "separator")} == {
        "tokenizer": {"kind": "byte"},
        "vocab_size": 257,
        "dtype": "uint16",
        "separator": 256,
    }
    assert meta["tokens"] == {split: len(ids("text_byte", split)) for split in SPLITS}
    assert (tmp_path / "text.txt").stat().st_size == sum(meta["tokens"].values())


def test_several_files_need_a_name(refusal, tmp_path):
    write_text(tmp_path / "a.txt"), write_text(tmp_path / "b.txt")
    for argv in (["a.txt", "b.txt"], ["*.txt"], ["?.txt"]):
        assert "--name=" in refusal(prepare.main, *argv, status=2)
    assert not Path("data").exists()


def test_files_come_in_the_order_given_and_those_of_a_glob_by_name(prepared, tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b", "a", "deep/c"):
        (tmp_path / f"{name}.txt").write_text(name[-1] * 40)
    prepared("b.txt", "a.txt", "--name=ba", "--val_fraction=0.5")
    prepared("**/*.txt", "--name=all", "--val_fraction=0.5", "--tokenizer=byte")
    assert text("ba", "train") == text("ba", "val") == "b" * 20 + "\n" + "a" * 20
    assert text("all", "train") == text("all", "val") == "a" * 20 + "b" * 20 + "c" * 20


def test_a_separator_or_a_newline_stands_between_two_documents(prepared, tmp_path):
    (tmp_path / "a.txt").write_text("aaa")
    (tmp_path / "b.txt").write_text("bb\n")
    (tmp_path / "c.txt").write_text("cccc")
    prepared("a.txt", "b.txt", "c.txt", "--name=bytes", "--tokenizer=byte", "--val_fraction=0.2")
    out = prepared("a.txt", "b.txt", "c.txt", "--name=chars", "--val_fraction=0.2")
    assert "a newline stands between documents" in out
    assert ids("bytes", "train") == [*b"aa", 256, *b"bb", 256, *b"ccc"]
    assert ids("bytes", "val") == [*b"a", 256, *b"\n", 256, *b"c"]
    assert (ids("chars", "train"), ids("chars", "val")) == (
        [1, 1, 0, 2, 2, 3, 3, 3],
        [1, 0, 0, 3],
    )


def test_a_text_is_taken_as_it_is_but_for_line_ends_and_a_byte_order_mark(prepared, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\n \t\xe2\x98\x83\0 " * 10)
    assert "line ends" in prepared("text.txt")
    assert text("text", "train") + text("text", "val") == "one\ntwo\n \t☃\0 " * 10


@pytest.mark.parametrize(
    "content, argv, parts",
    [
        (b"", "text.txt", ["text.txt is empty"]),
        (b" \n\t\r\n", "text.txt", ["text.txt is empty"]),
        (b"\xef\xbb\xbf", "text.txt", ["text.txt is empty"]),
        (b"\xef\xbb\xbf\n", "text.txt", ["text.txt is empty"]),
        (b"abc\xff", "text.txt", ["text.txt is not UTF-8", "0xff", "offset 3", "iconv"]),
        (b"text " * 9, "missing.txt", ["missing.txt", "glob", "plays"]),
        (b"text " * 9, "no*.txt --name=x", ["no*.txt", "glob", "plays"]),
        (b"text " * 9, "text.txt --val_fraction=0", ["val split", "0 tokens", "--val_fraction", "0.0"]),
        (
            b"text " * 9,
            "text.txt --val_fraction=0.999",
            ["train split", "0 tokens", "--val_fraction", "0.999"],
        ),
        (b"abc", "text.txt", ["val split", "1 tokens", "more text"]),
    ],
)
def test_a_text_that_can_not_be_used_is_refused(content, argv, parts, refusal, tmp_path):
    (tmp_path / "text.txt").write_bytes(content)
    line = refusal(prepare.main, *argv.split())
    assert all(part in line for part in parts), line
    assert not Path("data").exists()


@pytest.mark.parametrize(
    "argv, parts",
    [
        ("", ["no source", "plays"]),
        ("plays text.txt", ["plays", "text.txt", "--name"]),
        ("text.txt --val_fraction=1", ["val_fraction", "1.0", "below 1"]),
        ("text.txt --val_fraction=-0.1", ["val_fraction", "-0.1", "at least 0"]),
        ("text.txt --tokenizer=bpe", ["--tokenizer=bpe", "char", "byte", "gpt2", "bpe:4096"]),
        ("text.txt --tokenizer=bpe:100", ["--tokenizer=bpe:100", "from 257"]),
        ("text.txt --nme=x", ["nme", "name"]),
        ("--sources=text.txt", ["sources"]),
    ],
)
def test_a_wrong_command_is_refused(argv, parts, refusal, tmp_path):
    write_text(tmp_path / "text.txt")
    line = refusal(prepare.main, *argv.split(), status=2)
    assert all(part in line for part in parts), line
    assert not Path("data").exists()


def test_a_file_in_the_way_is_one_line(refusal, tmp_path):
    write_text(tmp_path / "text.txt")
    (tmp_path / "data").write_text("")
    assert "data" in refusal(prepare.main, "text.txt")


def test_a_file_name_that_is_no_unicode_is_no_traceback(tmp_path):
    try:
        path = write_text(tmp_path / os.fsdecode(b"caf\xe9.txt"))
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    done = script("prepare.py", path.name, cwd=tmp_path)
    assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr


# Settings and names


def test_so_many_texts_that_none_is_cut_any_more_make_another_set(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "FEW", 3)
    (tmp_path / "books").mkdir()
    for name, text in {"a": "some text " * 20, "b": "more text " * 20}.items():
        (tmp_path / "books" / f"{name}.txt").write_text(text)
    assert cli(prepare.main, "books", "--val_fraction=0.4")[0] == 0
    assert "is ready" in cli(prepare.main, "books", "--val_fraction=0.4")[1]
    (tmp_path / "books/c.txt").touch()  # three, with the same text in them
    status, out, err = cli(prepare.main, "books", "--val_fraction=0.4")
    assert "is ready" not in out and (status == 0 or "split would have" in err)


def test_the_help_names_every_source_and_setting(cli):
    status, out, _ = cli(prepare.main, "--help")
    settings = [f.name for f in dataclasses.fields(prepare.PrepareSettings) if f.name != "sources"]
    words = [
        *built_in.BUILT_IN,
        *file_formats.FORMATS,
        "hf:ORG/NAME",
        ".gz",
        "folder",
        "glob",
        *(cls.spelling for cls in TOKENIZERS.values()),
        "standard input",
        "goes on",
    ]
    missing = [word for word in [*words, *(f"--{name}=" for name in settings)] if word not in out]
    assert (status, missing) == (0, [])


@pytest.mark.parametrize(
    "argv, says",
    [
        ("text.txt --worker=2", ["--worker", "did you mean workers?"]),
        ("text.txt --workers=-1", ["workers is -1", "at least 0"]),
        ("text.txt --unknown=ignore", ["--unknown=ignore", "error|skip"]),
        ("text.txt --tokeniser=byte", ["--tokeniser", "did you mean tokenizer?"]),
        ("text.txt --tokenizer=", ["--tokenizer is empty"]),
        ("text.txt --tokenizer=data/nope", ["--tokenizer=data/nope is none of", "a prepared set"]),
        ("text.txt hf:org/set", ["several files", "--name="]),
        ("text.txt openwebtext", ["openwebtext is a whole set by itself", "text.txt", "--name"]),
        ("-", ["standard input", "--name="]),
    ],
)
def test_a_command_that_makes_no_sense_is_one_line(argv, says, refusal, tmp_path):
    write_text(tmp_path / "text.txt")
    line = refusal(prepare.main, *argv.split(), status=2)
    assert all(part in line for part in says), line
    assert not Path("data").exists()


@pytest.mark.parametrize(
    "pattern, tokenizer, name",
    [
        ("hf:org/Some.Set", "char", "Some.Set"),
        ("hf:org/set:config-1", "gpt2", "set_config-1_gpt2"),
        ("hf:folder/deep/", "bpe:500", "deep_bpe500"),
        ("hf:alone", "char", "alone"),
        ("a/b.c.tsv.gz", "data/plays_bpe4096", "b.c_plays_bpe4096"),
        ("a/b.jsonl", "out/ckpt.pt", "b_ckpt"),
    ],
)
def test_a_set_is_named_after_where_it_is_from(pattern, tokenizer, name):
    assert names.default_name([pattern], tokenizer) == name


def test_a_vocabulary_is_learnt_from_so_much_text_at_most(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(utf8, "PIECE", 100)
    for limit in (10**9, 1000):
        monkeypatch.setattr(learning, "LEARN_FROM", limit)
        (tmp_path / "text.txt").write_text("keys and values " * 100 + "queries " * 100)
        assert cli(prepare.main, "text.txt", "--tokenizer=bpe:400", f"--name=at_most_{limit}")[0] == 0
        pieces = Dataset(tmp_path / f"data/at_most_{limit}").tokenizer.pieces
        assert b" values" in pieces and (b" queries" in pieces) == (limit > 1000)


@pytest.fixture
def base(cli, tmp_path):
    """A set of two letters' words, whose tokenizer knows `ab .\\n` alone."""
    Path(tmp_path, "base.txt").write_text("abba ab. ba\n" * 50)
    assert cli(prepare.main, "base.txt")[0] == 0
    return tmp_path


def written_by_others(name, text="baba .\n" * 50):
    Path(name).write_text(text)
    return name


def test_a_sets_tokenizer_can_be_taken(base, cli):
    status, out, err = cli(prepare.main, written_by_others("new.txt"), "--tokenizer=data/base")
    assert (status, err) == (0, "") and "data/new_base: " in out and "char tokenizer with 5 ids" in out
    data, known = Dataset(base / "data/new_base"), Dataset(base / "data/base").tokenizer
    assert data.tokenizer.to_json() == known.to_json()
    assert known.decode([*data.splits["train"][:], *data.splits["val"][:]]) == "baba .\n" * 50
    assert "is ready" in cli(prepare.main, "new.txt", "--tokenizer=data/base")[1]


def test_characters_that_a_taken_tokenizer_lacks_are_refused_or_left_out(base, cli, refusal):
    written_by_others("new.txt", "bab☃a!\n" * 50)
    line = refusal(prepare.main, "new.txt", "--tokenizer=data/base")
    assert "'☃' at position 3" in line and "--unknown=skip" in line and not Path("data/new_base").exists()
    assert cli(prepare.main, "new.txt", "--tokenizer=data/base", "--unknown=skip")[0] == 0
    data = Dataset(base / "data/new_base")
    text = data.tokenizer.decode([*data.splits["train"][:], *data.splits["val"][:]])
    assert text == "baba\n" * 50


def test_a_taken_tokenizer_that_has_changed_makes_another_set(base, cli):
    argv = [written_by_others("new.txt"), "--tokenizer=data/base"]
    assert cli(prepare.main, *argv)[0] == 0
    Path("base.txt").write_text("abba ab. ba\nc" * 50)
    assert cli(prepare.main, "base.txt")[0] == 0
    status, out, _ = cli(prepare.main, *argv)
    assert status == 0 and "is ready" not in out
    assert (
        Dataset(base / "data/new_base").tokenizer.to_json() == Dataset(base / "data/base").tokenizer.to_json()
    )


@pytest.mark.parametrize("source", ["out", "out/ckpt.pt", "out/best.pt"])
def test_a_checkpoints_tokenizer_can_be_taken(source, base, cli):
    assert cli(train.main, *TINY_RUN, "--dataset=base", "--max_iters=1")[0] == 0
    status, out, err = cli(prepare.main, written_by_others("new.txt"), "--name=new", f"--tokenizer={source}")
    assert (status, err) == (0, "")
    assert Dataset(base / "data/new").tokenizer.to_json() == Dataset(base / "data/base").tokenizer.to_json()


def test_nanogpts_set_lends_its_tokenizer_too(base, cli):
    meta = {"vocab_size": 5, "itos": dict(enumerate("ba\n .")), "stoi": {}}
    Path("data/base/meta.pkl").write_bytes(pickle.dumps(meta))
    Path("data/base/meta.json").unlink()
    assert cli(prepare.main, written_by_others("new.txt"), "--tokenizer=data/base")[0] == 0
    assert Dataset(base / "data/new_base").tokenizer.chars == "ba\n ."


@pytest.mark.parametrize(
    "path, content", [("nothing", None), ("some.txt", b"text"), ("data/base/train.bin", None), ("data", None)]
)
def test_what_has_no_tokenizer_is_refused(path, content, base, refusal):
    Path("nothing").mkdir()
    if content:
        Path(path).write_bytes(content)
    line = refusal(prepare.main, written_by_others("new.txt"), f"--tokenizer={path}")
    assert path in line and not Path("data/new").exists()


def test_a_folder_with_a_tokenizers_name_is_not_in_its_way(base, cli):
    for name in ("char", "byte"):
        Path(name).mkdir()
        assert cli(prepare.main, written_by_others("new.txt"), f"--tokenizer={name}", "--name=new")[0] == 0
        assert Dataset(base / "data/new").tokenizer.kind == name


# Borders of documents


@pytest.mark.parametrize("ends", ["", "\n"])
def test_documents_do_not_run_into_each_other_where_a_tokenizer_has_no_end_of_text(ends, prepared):
    names = [f"emma{number}" for number in range(40)]
    Path("names.jsonl").write_text("".join(json.dumps({"text": name + ends}) + "\n" for name in names))
    out = prepared("names.jsonl")
    assert ("a newline stands between documents" in out) == (ends == "")
    found = [line for split in SPLITS for line in text("names", split).splitlines()]
    assert sorted(found) == sorted(names) and min(len(ids("names", split)) for split in SPLITS) > 0
    data = Dataset("names")
    assert data.bytes == {split: len(ids("names", split)) for split in SPLITS}  # ASCII
    assert "newline" not in prepared("names.jsonl", "--tokenizer=byte")


def test_documents_that_run_into_each_other_are_said(prepared, cli):
    Path("dna.txt").write_text("acgt" * 50)
    prepared("dna.txt")
    Path("more.jsonl").write_text("".join(f'{{"text": "{"acgt"[n % 4] * (n + 5)}"}}\n' for n in range(40)))
    status, out, err = cli(prepare.main, "more.jsonl", "--tokenizer=data/dna")
    assert status == 0 and err.startswith("warning: documents run into each other: the char tokenizer")


def test_bits_per_byte_count_what_the_ids_stand_for(prepared):
    Path("known.txt").write_text("ab\n" * 50)
    prepared("known.txt")
    Path("new.txt").write_text("aébccb\n" * 50, "utf-8")
    prepared("new.txt", "--tokenizer=data/known", "--unknown=skip")
    assert Dataset("new_known").bytes == {split: len(ids("new_known", split)) for split in SPLITS}


# A validation file


def test_a_validation_file_is_the_validation_split_and_the_sources_are_all_of_the_other(prepared, tmp_path):
    write_text(tmp_path / "a.txt"), (tmp_path / "b.txt").write_text("values and heads\n" * 9)
    prepared("a.txt", "--val=b.txt", "--name=ab")
    assert text("ab", "train") == (tmp_path / "a.txt").read_text("utf-8")
    assert text("ab", "val") == (tmp_path / "b.txt").read_text("utf-8")
    assert "ready" in prepared("a.txt", "--val=b.txt", "--name=ab")
    (tmp_path / "b.txt").write_text("values and keys\n" * 9)
    assert "ready" not in prepared("a.txt", "--val=b.txt", "--name=ab")
    assert text("ab", "val").startswith("values and keys")
    assert "ready" not in prepared("a.txt", "--name=ab")


def test_a_validation_folder_of_conversations(prepared):
    Path("val").mkdir()
    Path("train.tsv").write_text("Hi\tHello\n" * 9)
    Path("val/a.tsv").write_text("Hi\tYes\n" * 2), Path("val/b.tsv").write_text("Hi\tNo\n")
    assert "of 12 conversations" in prepared("train.tsv", "--val=val")
    assert [len(list(Dataset("train").conversations(split))) for split in SPLITS] == [9, 3]


@pytest.mark.parametrize(
    "argv, status, parts",
    [
        ("a.txt --val=b.txt --val_fraction=0.1", 2, ["--val=b.txt and --val_fraction=0.1", "one of them"]),
        ("a.txt --val=none.txt", 1, ["none.txt names no file"]),
        ("a.txt --val=blank.txt", 1, ["blank.txt is empty"]),
        ("a.txt --val=one.txt", 1, ["val split would have 1 tokens", "more text for it"]),
        ("a.txt --val=c.tsv", 1, ["c.tsv mixes texts and conversations"]),
    ],
)
def test_a_validation_file_that_can_not_be_used_is_refused(argv, status, parts, refusal, tmp_path):
    for name, content in {"a.txt": "text " * 9, "b.txt": "text", "blank.txt": "\n", "one.txt": "t"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "c.tsv").write_text("a\tb\n")
    line = refusal(prepare.main, *argv.split(), status=status)
    assert all(part in line for part in parts), line


def test_an_empty_split_is_told_what_fills_it(refusal, prepared):
    def write(*questions):
        Path("a.tsv").write_text("".join(f"{question}\tabc\n" for question in questions))

    write("Hi", "Hi", "Hi")  # no fraction can cut these
    line = refusal(prepare.main, "a.tsv")
    assert "begin alike" in line and "--val=FILE" in line and "--val_fraction" not in line
    for argv in (["--val_fraction=0.00001"], ["--val_fraction=0.99999"], ["--val_fraction=0"]):
        write("Hi", "Who?", "Where?")
        share = re.search(r"--val_fraction=[0-9.]+", refusal(prepare.main, "a.tsv", *argv))[0]
        prepared("a.tsv", share)


# Sources that are no plain files


@pytest.mark.parametrize("how", ["a pipe's path", "compressed", "/dev/stdin"])
def test_a_pipe_is_read_once_and_used_as_often_as_needed(how, tmp_path):
    content = ("keys and values\n" * 99).encode()
    command = [sys.executable, str(ROOT / "prepare.py"), "--name=pipe"]
    source = f"<(cat {'text.gz' if how == 'compressed' else 'text'})" if how != "/dev/stdin" else "/dev/stdin"
    (tmp_path / "text").write_bytes(content), (tmp_path / "text.gz").write_bytes(gzip.compress(content))
    line = f"cat text | {shlex.join(command)} {source}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=process_environment(), capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    data = Dataset(tmp_path / "data/pipe")
    assert "".join(data.tokenizer.decode(data.splits[split][:]) for split in SPLITS).encode() == content


def test_a_pipe_needs_a_name(refusal):
    os.mkfifo("pipe")
    assert "--name=" in refusal(prepare.main, "pipe", status=2)


def test_a_set_that_datasets_saved_is_read_and_of_several_splits_the_training_split(prepared, refusal):
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"document {number}"} for number in range(60)]
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
    parts["train"].save_to_disk("one", num_shards=3)
    datasets.DatasetDict(parts).save_to_disk("several")
    datasets.DatasetDict({"test": parts["test"]}).save_to_disk("other")
    shutil.copy("one/data-00000-of-00003.arrow", "one/cache-1234.arrow")  # left there by a map()
    for source in ("one", "hf:one", "several", "several/train", "hf:several", "one/data*.arrow"):
        assert "of 60 documents" in prepared(source, "--name=saved", "--tokenizer=byte")
    assert "of 63 documents" in prepared("several", "--val=several/test", "--name=saved")
    assert "other has no split called train" in refusal(prepare.main, "other")
    Path("one/state.json").write_text("{}")
    assert "state.json" in refusal(prepare.main, "one")


# Names and folders of sets


@pytest.mark.parametrize("name", ["a/b", "../a", "/tmp/a", ".", "..", "~a", "data/a"])
def test_a_name_that_is_a_path_is_refused(name, refusal):
    Path("a.txt").write_text("text " * 9)
    assert f"--name={name} is no name of a set" in refusal(prepare.main, "a.txt", f"--name={name}", status=2)
    assert not Path("data").exists()


def test_the_printed_command_is_quoted_for_the_shell(prepared):
    Path("Mein Text 1.txt").write_text("text " * 99)
    command = prepared("Mein Text 1.txt").split("with: ")[1]
    assert shlex.split(command)[2] == "--dataset=Mein Text 1"


def test_a_link_to_nowhere_is_named(refusal):
    Path("data").symlink_to("larger_disk")
    Path("a.txt").write_text("text " * 9)
    line = refusal(prepare.main, "a.txt")
    assert f"{Path('data').absolute()} is a link to larger_disk, which is not there" in line
    Path("larger_disk").mkdir()
    Path("data/a").symlink_to("/no/where")
    for main, argv in ((prepare.main, ["a.txt"]), (train.main, ["--dataset=a", "--device=cpu"])):
        assert "data/a is a link to /no/where, which is not there" in refusal(main, *argv)
