"""Tables of texts and conversations: what is read, and what is refused."""

import builtins
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import parquet, read, write_table

import prepare
from kqv.text import documents
from kqv.text.documents import prompted
from kqv.text.sources import Source

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]))).filter(any)


KINDS = ["jsonl", "jsonl.gz", "parquet"]


def with_newlines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


# What is read


@UNHURRIED
@given(documents=DOCUMENTS)
@pytest.mark.parametrize("kind", KINDS)
def test_documents_come_back_as_they_were_written_but_for_empty_ones(kind, documents, tmp_path):
    path = write_table(tmp_path / f"table.{kind}", documents)
    assert read(path) == [with_newlines(document) for document in documents if document]


@UNHURRIED
@given(documents=DOCUMENTS)
def test_json_with_raw_unicode_is_split_at_newlines_alone(documents, tmp_path):
    lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
    (tmp_path / "raw.jsonl").write_bytes("\r\n".join(lines).encode("utf-8"))
    assert read(tmp_path / "raw.jsonl") == [with_newlines(document) for document in documents if document]


@pytest.mark.parametrize("kind", KINDS)
def test_the_column_may_have_another_name(kind, tmp_path):
    path = write_table(tmp_path / f"table.{kind}", ["a", None, "", "b"], column="content")
    assert read(path, text_column="content") == ["a", "b"]


def test_empty_lines_of_jsonl_and_a_byte_order_mark_are_no_documents(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \r\n{"text": "b"}')
    assert read(tmp_path / "a.jsonl") == ["a", "b"]


def test_parquet_of_many_row_groups_and_any_string_type(tmp_path):
    pa, pq = parquet()
    written = [f"document {i % 7}" for i in range(3000)]
    for column in (pa.array(written, pa.large_string()), pa.array(written).dictionary_encode()):
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=700)
        assert read(tmp_path / "a.parquet") == written


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lines_of_a_table_of_prompts_end_in_any_way(ends, tmp_path):
    lines = ["2+2=\t4", "", "é ☃\t\\n ", "no answer\t", "last\tone"]
    (tmp_path / "a.tsv").write_bytes(ends.join(lines).encode("utf-8"))
    (tmp_path / "b.TSV.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa\tb\r\nc\td\n"))
    expected = [("2+2=", "4"), ("é ☃", "\\n "), ("no answer", ""), ("last", "one"), ("a", "b"), ("c", "d")]
    assert read(tmp_path / "a.tsv", tmp_path / "b.TSV.gz") == [prompted(*row) for row in expected]


MESSAGES = [
    [{"role": "user", "content": "What is a key?"}, {"role": "assistant", "content": "A value's name."}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "☃"},
    ],
    [{"role": role, "content": role} for role in ("assistant", "user", "assistant")],
]


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_read_from_messages(kind, tmp_path):
    path = write_table(tmp_path / f"table.{kind}", MESSAGES, column="messages")
    expected = [[(message["role"], message["content"]) for message in messages] for messages in MESSAGES]
    assert read(path) == expected
    assert all(piece.begins for piece in Source([str(path)]))


@pytest.mark.parametrize("kind", KINDS)
def test_conversations_are_read_from_prompts_and_completions(kind, tmp_path):
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1) * (i != 5), "note": None} for i in range(9)]
    if kind == "parquet":
        pa, pq = parquet()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content = gzip.compress(content) if kind == "jsonl.gz" else content
        (tmp_path / f"table.{kind}").write_bytes(content)
    expected = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in rows]
    assert read(tmp_path / f"table.{kind}") == expected
    if kind != "parquet":  # a text is what was asked for
        assert read(tmp_path / f"table.{kind}", text_column="prompt") == [f"{i}+1=" for i in range(9)]


def said(*messages):
    """A line with a conversation: of each message its role, where nothing more is to be said of it."""
    messages = [{"role": m, "content": m} if m in documents.ROLES else m for m in messages]
    return json.dumps({"messages": messages}).encode()


LINE = b'{"text": "a"}\n'


ZIPPED = gzip.compress(b"some text, and more of it " * 9)


UNUSABLE = {
    "cut gzip": ("a.txt.gz", ZIPPED[:-9], ["gzip", "ended before", "again"]),
    "bad gzip": ("a.txt.gz", ZIPPED[:12] + b"\xff\xff" + ZIPPED[14:], ["gzip", "again"]),
    "bad checksum": ("a.jsonl.gz", gzip.compress(LINE)[:-8] + bytes(8), ["gzip", "CRC", "again"]),
    "empty gzip": ("a.txt.gz", b"", ["is empty"]),
    "gzip of blanks": ("a.txt.gz", gzip.compress(b" \n"), ["is empty"]),
    "gzip of Latin-1": ("a.txt.gz", gzip.compress(b"a\nb\xe9"), ["UTF-8", "0xe9", "line 2", "iconv"]),
    "Latin-1": ("a.txt", b"\xef\xbb\xbfa\nb\nab\xe9", ["UTF-8", "0xe9", "offset 2 of line 3", "iconv"]),
    "no lines": ("a.jsonl", b"", ["is empty"]),
    "empty documents": ("a.jsonl", b'{"text": ""}\n{"text": null}\n', ["is empty"]),
    "torn line": ("a.jsonl", LINE * 3 + b'{"text": "b', ["line 4", "JSON object"]),
    "a list": ("a.jsonl", LINE + b'\n["text"]\n', ["line 3, message 1", '"text"']),
    "a line of a number": ("a.jsonl", LINE + b"\n5\n", ["line 3", "JSON object"]),
    "deep": ("a.jsonl", b"[" * 100_000, ["line 1", "JSON object"]),
    "a long number": ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", ["line 1", "JSON object"]),
    "Latin-1 line": ("a.jsonl", LINE + b'{"text": "\xe9"}', ["UTF-8", "offset 10 of line 2", "iconv"]),
    "no column": ("a.jsonl", LINE + b'{"id": "", "body": ""}', ["line 2", "'id', 'body'", "--text_column="]),
    "no columns": ("a.jsonl", b"{}", ["line 1", "--text_column=", "none"]),
    "a number": ("a.jsonl", LINE + b'{"text": 5}', ["line 2", "int", "'text'", "--text_column="]),
    "half a pair": ("a.jsonl", LINE + rb'{"text": "a\ud83d"}', ["line 2", "\\ud83d", "surrogate", "remove"]),
    "a NUL in a line": ("a.jsonl", LINE + b'{"text": "a\0"}', ["line 2", "JSON object"]),
    "no tab": ("a.tsv", b"a\tb\na b\n", ["line 2", "0 tabs", "prompt, a tab and its completion"]),
    "two tabs": ("a.tsv", b"\r\na\tb\tc", ["line 2", "2 tabs", "prompt, a tab and its completion"]),
    "no prompt": ("a.tsv", b"a\tb\n\tb\n", ["line 2", "0 characters", "prompt"]),
    "Latin-1 prompt": ("a.tsv.gz", gzip.compress(b"a\tb\na\xe9\tb"), ["UTF-8", "offset 1 of line 2"]),
    "prompt alone": ("a.jsonl", b'{"prompt": "a"}', ["line 1", "'prompt'", "completion", "--text_column="]),
    "null prompt": ("a.jsonl", b'{"prompt": null, "completion": "b"}', ["line 1 has no prompt", "leave"]),
    "empty prompt": ("a.jsonl", b'{"prompt": "", "completion": "b"}', ["line 1 has no prompt", "fill"]),
    "null completion": ("a.jsonl", b'{"prompt": "a", "completion": null}', ["line 1 has no completion"]),
    "a number for one": ("a.jsonl", b'{"prompt": "a", "completion": 5}', ["line 1", "int", "'completion'"]),
    "no messages": ("a.jsonl", b'{"messages": []}', ["line 1 has no list of messages", '"role"']),
    "null messages": ("a.jsonl", b'{"messages": null}', ["line 1 has no list of messages", '"role"']),
    "text for messages": ("a.jsonl", b'{"messages": "a"}', ["line 1 has no list of messages", '"role"']),
    "a message in words": ("a.jsonl", said("user", "assistant", "a"), ["line 1, message 3 is", '"a"']),
    "another role": ("a.jsonl", said({"role": "bot", "content": ""}), ["line 1, message 1 is", '"bot"']),
    "a list of contents": ("a.jsonl", said({"role": "user", "content": [1]}), ["message 1 is", "[1]"]),
    "half a message": ("a.jsonl", said({"role": "user"}), ["line 1, message 1", '"user"', "each is"]),
    "half a pair said": ("a.jsonl", said({"role": "user", "content": "\ud83d"}), ["\\ud83d", "pair"]),
    "late instructions": ("a.jsonl", said("user", "assistant", "system"), ["message 3", '"system"', "first"]),
    "half a conversation": ("a.jsonl", said("user", "assistant", "user"), ["line 1", "nothing to learn"]),
    "nobody asks": ("a.jsonl", said("system", "assistant"), ["line 1", "nothing to learn"]),
    "instructions alone": ("a.jsonl", said("system"), ["line 1", "nothing to learn"]),
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


def test_a_parquet_message_that_can_not_be_used_is_shown(refusal, tmp_path):
    pa, _ = parquet()
    values = pa.array([[{"role": "user", "content": b"caf\xe9"}]])
    write_table(tmp_path / "a.parquet", values, column="messages")
    line = refusal(prepare.main, "a.parquet")
    assert "a.parquet, row 1, message 1 is " in line and "each is" in line and "\\xe9" in line


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
