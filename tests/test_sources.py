"""What prepare.py takes as text: folders, compressed files, tables of documents, standard input."""

import builtins
import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from conftest import script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from kqv import sources
from kqv.dataset import Dataset

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]))).filter(any)
KINDS = ["jsonl", "jsonl.gz", "parquet"]


def parquet():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def write_table(path, values, column="text", **writing):
    """A .jsonl, .jsonl.gz or .parquet file with a document in each row and a number beside it."""
    if path.name.endswith(".parquet"):
        pa, pq = parquet()
        table = pa.table({column: values, "number": list(range(len(values)))})
        pq.write_table(table, path, **writing)
        return path
    rows = "".join(json.dumps({"number": i, column: value}) + "\n" for i, value in enumerate(values))
    content = rows.encode("utf-8")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read(*patterns, **options):
    return sources.read_text_files([str(pattern) for pattern in patterns], **options)


# What is read


@UNHURRIED
@given(documents=DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_back_as_they_were_written_but_for_empty_ones(kind, documents, tmp_path):
    path = write_table(tmp_path / f"table.{kind}", documents)
    assert read(path) == [document for document in documents if document]


@UNHURRIED
@given(documents=DOCUMENTS)
def test_json_with_raw_unicode_is_split_at_newlines_alone(documents, tmp_path):
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    (tmp_path / "raw.jsonl").write_bytes("\r\n".join(lines).encode("utf-8"))
    assert read(tmp_path / "raw.jsonl") == [document for document in documents if document]


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_may_have_another_name(kind, tmp_path):
    path = write_table(tmp_path / f"table.{kind}", ["a", None, "", "b"], column="content")
    assert read(path, text_column="content") == ["a", "b"]


def test_empty_lines_of_jsonl_and_a_byte_order_mark_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert read(tmp_path / "a.jsonl") == ["a", "b"]


def test_parquet_of_many_row_groups_and_any_string_type(tmp_path):
    pa, pq = parquet()
    documents = [f"document {i % 7}" for i in range(3000)]
    for column in (pa.array(documents, pa.large_string()), pa.array(documents).dictionary_encode()):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=700)
        assert read(tmp_path / "a.parquet") == documents


def test_compressed_text_is_one_document_exactly_as_it_was(tmp_path):
    whole = "one\r\n\n two ☃\0\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + whole.encode("utf-8")))
    (tmp_path / "b.GZ").write_bytes(gzip.compress(b"first, ") + gzip.compress(b"second"))  # as cat a.gz b.gz
    assert read(tmp_path / "a.txt.gz", tmp_path / "b.GZ") == [whole, "first, second"]


def test_a_file_whose_ending_says_nothing_is_text(tmp_path):
    (tmp_path / "rows.json").write_text('{"text": "a"}\n')
    assert read(tmp_path / "rows.json") == ['{"text": "a"}\n']


def test_a_folder_is_its_visible_text_files_sorted_whatever_their_depth(tmp_path):
    for name in ("b.txt", "c.MD", "deep/er/a.txt", "x.py", "txt", ".hidden.txt", ".git/a.txt", "deep/.b.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    write_table(tmp_path / "deep/t.jsonl", ["t1", "t2"])
    write_table(tmp_path / "a.jsonl.gz", ["a1"])
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"d.txt.gz"))
    (tmp_path / "self").symlink_to(tmp_path)  # no file comes twice
    assert read(tmp_path) == ["a1", "b.txt", "c.MD", "d.txt.gz", "deep/er/a.txt", "t1", "t2"]
    assert read(tmp_path / "b.txt", f"{tmp_path}/deep", f"{tmp_path}/*.gz") == [
        *["b.txt", "deep/er/a.txt", "t1", "t2"],
        *["a1", "d.txt.gz"],
    ]


def test_a_folder_with_parquet_in_it(tmp_path):
    write_table(tmp_path / "b.parquet", ["b"])
    (tmp_path / "a.txt").write_text("a")
    assert read(tmp_path) == ["a", "b"]


def test_standard_input_is_one_document_among_others(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    # a stream that decodes as another encoding: a terminal's locale doesn't matter
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\n☃\r\n".encode()), encoding="ascii"))
    assert read(tmp_path / "a.txt", "-", tmp_path / "a.txt") == ["a", "é\n☃\r\n", "a"]


# From the command line


def decoded(name):
    opened = Dataset(Path("data").resolve() / name)
    return "".join(opened.tokenizer.decode(opened.splits[split].tolist()) for split in ("train", "val"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_prepared_document_by_document(kind, cli, tmp_path):
    documents = ["first document ", "second one ", "", "third"]
    write_table(tmp_path / f"table.{kind}", documents, column="content")
    argv = [f"table.{kind}", "--name=table", "--text_column=content", "--tokenizer=byte"]
    status, _, err = cli(prepare.main, *argv)
    assert (status, err) == (0, "")
    opened = Dataset(Path("data/table").resolve())
    ids = [*opened.splits["train"].tolist(), *opened.splits["val"].tolist()]
    assert ids == [*b"first document ", 256, *b"second one ", 256, *b"third"]
    assert json.loads(Path("data/table/meta.json").read_text("utf-8"))["source"]["documents"] == 3


def test_a_folder_and_a_pipe_are_prepared(cli, tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/a.txt").write_text("a book " * 9)
    assert cli(prepare.main, "books", "--name=books")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a pipe " * 9)))
    assert cli(prepare.main, "-", "--name=pipe")[0] == 0
    assert (decoded("books"), decoded("pipe")) == ("a book " * 9, "a pipe " * 9)


def test_the_help_names_the_sources(cli):
    out = cli(prepare.main, "--help")[1]
    assert all(word in out for word in ("folders", ".jsonl", ".gz", ".parquet", "--text_column=")), out


# What is refused

LINE = b'{"text": "a"}\n'
ZIPPED = gzip.compress(b"some text, and more of it " * 9)
UNUSABLE = {
    "cut gzip": ("a.txt.gz", ZIPPED[:-9], ["gzip", "ended before", "again"]),
    "no gzip": ("a.txt.gz", b"plain text", ["gzip", "again"]),
    "bad gzip": ("a.txt.gz", ZIPPED[:12] + b"\xff\xff" + ZIPPED[14:], ["gzip", "again"]),
    "bad checksum": ("a.jsonl.gz", gzip.compress(LINE)[:-8] + bytes(8), ["gzip", "CRC", "again"]),
    "empty gzip": ("a.txt.gz", b"", ["is empty"]),
    "gzip of blanks": ("a.txt.gz", gzip.compress(b" \n"), ["is empty"]),
    "gzip of Latin-1": ("a.txt.gz", gzip.compress(b"a\nb\xe9"), ["UTF-8", "0xe9", "line 2", "iconv"]),
    "Latin-1": ("a.txt", b"\xef\xbb\xbfa\nb\nab\xe9", ["UTF-8", "0xe9", "offset 2 of line 3", "iconv"]),
    "no lines": ("a.jsonl", b"", ["is empty"]),
    "empty documents": ("a.jsonl", b'{"text": ""}\n{"text": null}\n', ["is empty"]),
    "torn line": ("a.jsonl", LINE * 3 + b'{"text": "b', ["line 4", "JSON object"]),
    "a list": ("a.jsonl", LINE + b'\n["text"]\n', ["line 3", "JSON object"]),
    "deep": ("a.jsonl", b"[" * 100_000, ["line 1", "JSON object"]),
    "a long number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", ["line 1", "JSON object"]),
    "Latin-1 line": ("a.jsonl", LINE + b'{"text": "\xe9"}', ["UTF-8", "offset 10 of line 2", "iconv"]),
    "no column": ("a.jsonl", LINE + b'{"id": "", "body": ""}', ["line 2", "'id', 'body'", "--text_column="]),
    "no columns": ("a.jsonl", b"{}", ["line 1", "--text_column=", "none"]),
    "a number": ("a.jsonl", LINE + b'{"text": 5}', ["line 2", "int", "'text'", "--text_column="]),
    "half a pair": ("a.jsonl", LINE + rb'{"text": "a\ud83d"}', ["line 2", "\\ud83d", "surrogate", "remove"]),
    "half a name": ("a.jsonl", rb'{"\ud83d": "a"}', ["line 1", "\\ud83d", "--text_column="]),
}  # fmt: skip


@pytest.mark.parametrize("name, content, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_a_file_that_can_not_be_used_is_refused(name, content, parts, refusal, tmp_path):
    (tmp_path / name).write_bytes(content)
    line = refusal(prepare.main, name, "--name=x")
    assert line.startswith(f"error: {name}") and all(part in line for part in parts), line
    assert not Path("data").exists()


def damaged(whole):
    yield from (b"", b"abc", whole[:-5], whole[: len(whole) // 2], b"PAR1" + bytes(99) + b"PAR1")
    yield whole[:4] + b"\xff" * 60 + whole[64:]  # the pages
    yield whole.replace(b"number", b"numb\xffr")
    yield whole[:-60] + b"\xff" * 30 + whole[-30:]  # the footer


def test_a_damaged_parquet_file_is_refused(refusal, tmp_path):
    whole = write_table(tmp_path / "whole.parquet", ["a document"] * 99).read_bytes()
    for content in damaged(whole):
        (tmp_path / "a.parquet").write_bytes(content)
        line = refusal(prepare.main, "a.parquet")
        assert line.startswith("error: a.parquet is not a whole parquet file (") and "again" in line, line


@pytest.mark.parametrize(
    "column, parts",
    [
        ("body", ["a.parquet has no column 'body'", "'text', 'number'", "--text_column="]),
        ("number", ["a.parquet, row 1 has a int", "'number'", "--text_column="]),
    ],
)
def test_a_parquet_column_that_can_not_be_used_is_refused(column, parts, refusal, tmp_path):
    write_table(tmp_path / "a.parquet", ["a", "b"])
    line = refusal(prepare.main, "a.parquet", f"--text_column={column}")
    assert all(part in line for part in parts), line


def test_a_parquet_row_that_is_not_utf8_is_named(refusal, tmp_path):
    pa, _ = parquet()
    values = pa.array([b"a"] * 1500 + [b"\xff"]).view(pa.string())
    write_table(tmp_path / "a.parquet", values)
    line = refusal(prepare.main, "a.parquet")
    assert "a.parquet, row 1501 is not UTF-8" in line and "again" in line


def test_an_empty_parquet_table_is_refused(refusal, tmp_path):
    pa, _ = parquet()
    write_table(tmp_path / "a.parquet", pa.array([None, ""], pa.string()))
    assert "a.parquet is empty" in refusal(prepare.main, "a.parquet")


def test_parquet_without_pyarrow_is_one_line(refusal, tmp_path, monkeypatch):
    def without(name, *rest):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return found(name, *rest)

    found = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "a.parquet").write_bytes(b"")
    assert refusal(prepare.main, "a.parquet") == "error: reading a.parquet needs: pip install pyarrow\n"


def test_a_folder_without_text_is_refused(refusal, tmp_path):
    (tmp_path / "code/.git").mkdir(parents=True)
    (tmp_path / "code/a.py").write_text("pass")
    (tmp_path / "code/.git/a.txt").write_text("hidden")
    line = refusal(prepare.main, "code", "--name=x")
    assert all(part in line for part in ("code", "text file", ".jsonl", ".parquet", "glob")), line


def test_a_file_that_can_not_be_read_is_named(refusal, tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books/gone.txt").symlink_to("nowhere.txt")
    line = refusal(prepare.main, "books", "--name=x")
    assert "books/gone.txt cannot be read (No such file or directory)" in line and "yours to read?" in line


def test_a_folder_that_can_not_be_listed_is_named(refusal, tmp_path, monkeypatch):
    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return found(path)

    (tmp_path / "books/closed").mkdir(parents=True)
    (tmp_path / "books/a.txt").write_text("a book")
    found = sources.os.scandir
    monkeypatch.setattr(sources.os, "scandir", scandir)
    assert "books/closed cannot be read (Permission denied)" in refusal(prepare.main, "books", "--name=x")


@pytest.mark.parametrize(
    "content, parts", [(b"", ["standard input is empty"]), (b"a\nb\xff", ["standard input is not", "line 2"])]
)
def test_standard_input_that_can_not_be_used_is_refused(content, parts, refusal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    line = refusal(prepare.main, "-", "--name=x")
    assert all(part in line for part in parts), line


def test_standard_input_that_is_closed_is_refused(refusal, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refusal(prepare.main, "-", "--name=x")


def test_a_process_of_its_own_says_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"{")
    done = script("prepare.py", "a.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: a.jsonl, line 2 is not a JSON object")
