"""Rows of tables and of JSON -> texts and conversations, by the names that sets of the field have."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import prepare
from kqv.text import utf8
from kqv.text.sources import Source

UNHURRIED = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.text(st.sampled_from('ab ,;"\n\t\\é☃{}[]'), min_size=1, max_size=12)


def read(*paths, **options):
    documents = []
    for piece in Source([str(path) for path in paths], **options):
        if piece.begins:
            documents.append(piece.content)
        else:
            documents[-1] += piece.content
    return documents


def asked(question, answer):
    return [("user", question), ("assistant", answer)]


ROWS = {
    "Alpaca": ({"instruction": "Add", "input": "1 and 2", "output": "3"}, asked("Add\n\n1 and 2", "3")),
    "Alpaca without an input": ({"instruction": "Hi", "input": "", "output": "Yes"}, asked("Hi", "Yes")),
    "no input at all": ({"instruction": "Hi", "output": "Yes"}, asked("Hi", "Yes")),
    "Dolly": ({"instruction": "Sum", "context": "it", "response": "Yes"}, asked("Sum\n\nit", "Yes")),
    "question and answer": ({"question": "Who?", "answer": "I"}, asked("Who?", "I")),
    "instructions": (
        {"system_prompt": "Be brief", "question": "Who?", "response": "I"},
        [("system", "Be brief"), *asked("Who?", "I")],
    ),
    "empty instructions": ({"system": "", "prompt": "Who?", "completion": "I"}, asked("Who?", "I")),
    "a text": ({"text": "abc", "prompt": "Who?", "completion": "I"}, "abc"),
}


@pytest.mark.parametrize("row, document", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_columns_of_known_sets_are_found_by_their_names(kind, row, document, tmp_path):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist([{"id": 1, **row}] * 2), path)
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, ["id", *row], delimiter="\t" if kind == "tsv" else ",")
            writer.writerow({"id": "Id", **{name: f" {name.title()}" for name in row}})
            writer.writerows([{"id": 1, **row}] * 2)
        if kind == "tsv" and "\n" in path.read_text():
            pytest.skip("a .tsv file has no way to write this")
    else:
        path.write_text(json.dumps([row, row]) if kind == "json" else f"{json.dumps(row)}\n" * 2)
    assert read(path) == [document] * 2


SHAREGPT = [
    {"from": "system", "value": "Be brief"},
    {"from": "human", "value": "Hi"},
    {"from": "gpt", "value": ""},
]


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_conversations_of_sharegpt_are_read(column, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"id": "x", column: SHAREGPT}]))
    assert read(tmp_path / "a.json") == [[("system", "Be brief"), ("user", "Hi"), ("assistant", "")]]


def test_a_line_may_be_a_list_of_messages_or_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(SHAREGPT[1:]))
    (tmp_path / "b.jsonl").write_text('"abc"\n"d"')
    assert read(tmp_path / "a.jsonl") == [asked("Hi", "")]
    assert read(tmp_path / "b.jsonl") == ["abc", "d"]


@UNHURRIED
@given(texts=st.lists(WORDS, min_size=1, max_size=5), size=st.integers(1, 9), indent=st.none() | st.just(1))
@example(texts=["a", "  "], size=1, indent=None)  # a document of blanks, longer than what is read at once
@pytest.mark.parametrize("kind", ["list", "lines"])
def test_a_json_file_is_a_list_or_objects_one_after_another(kind, texts, size, indent, tmp_path):
    rows = [{"text": text, "more": [{"a": 1.5}, None]} for text in texts]
    text = "\n".join(json.dumps(row, indent=indent) for row in rows)
    text = json.dumps(rows, indent=indent) if kind == "list" else text
    (tmp_path / "a.json").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utf8, "PIECE", size)
        assert read(tmp_path / "a.json") == texts


@UNHURRIED
@given(texts=st.lists(WORDS, min_size=1, max_size=5), delimiter=st.sampled_from(",;\t"))
def test_a_csv_file_comes_back_as_it_was_written(texts, delimiter, tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([["id", "text", "n"], *(["x,y", text, 1] for text in texts)])
    assert read(tmp_path / "a.csv") == texts
    assert read(tmp_path / "a.csv", text_column="id") == ["x,y"] * len(texts)


def test_a_field_of_csv_may_be_long_and_lines_empty(tmp_path):
    text = "long words\n" * 30_000
    (tmp_path / "a.csv").write_text(f'\n\nBody\n\n"{text}"\n\n')
    assert (
        read(tmp_path / "a.csv", text_column="Body") == read(tmp_path / "a.csv", text_column="body") == [text]
    )


def test_a_tsv_file_without_a_known_header_has_none(tmp_path):
    (tmp_path / "a.tsv").write_text("English\tGerman\nkey\tSchlüssel\n")
    assert read(tmp_path / "a.tsv") == [asked("English", "German"), asked("key", "Schlüssel")]


UNUSABLE = {
    "cut list": ("a.json", '[{"text": "a"}, {"te', ["no whole JSON after row 1", "list of objects"]),
    "open list": ("a.json", '[{"text": "a"}, ', ["no whole JSON after row 1"]),
    "more than a list": ("a.json", '[{"text": "a"}] {"text": "b"}', ["no whole JSON after row 1"]),
    "no JSON": ("a.json", "text", ["no whole JSON after row 0"]),
    "numbers": ("a.json", "[1, 2]", ["a.json, row 1 is 1", '{"text": "..."}']),
    "an object of lists": ("a.json", '{"data": [{"text": "a"}]}', ["row 1", "'data'", "--text_column="]),
    "an empty list": ("a.json", "[]", ["a.json is empty"]),
    "another from": ("a.json", '[[{"from": "tool", "value": "a"}]]', ["row 1, message 1", '"tool"']),
    "a header alone": ("a.csv", "text,id\n", ["a.csv is empty"]),
    "a field more": ("a.csv", "text,id\n\na,1\nb,2,3\n", ["a.csv, line 4 has 3 fields", "has 2"]),
    "open quotes": ("a.csv", 'text,id\n"a,1\n', ["a.csv, line 2 is no CSV", '"quotes"']),
    "text after quotes": ("a.csv", 'text,id\n"a"b,1\n', ["a.csv, line 2 is no CSV", '"quotes"']),
    "no known column": ("a.csv", "Body,id\na,1\n", ["a.csv, line 2", "'body', 'id'", "--text_column=NAME"]),
    "fields of tsv": ("a.tsv", "text\tid\na\n", ["a.tsv, line 2 has 1 fields", "has 2"]),
}  # fmt: skip


@pytest.mark.parametrize("name, content, parts", UNUSABLE.values(), ids=UNUSABLE)
def test_a_table_that_can_not_be_used_is_refused(name, content, parts, refusal, tmp_path):
    (tmp_path / name).write_text(content)
    line = refusal(prepare.main, name)
    assert line.startswith(f"error: {name}") and all(part in line for part in parts), line


def test_a_column_that_was_named_is_never_replaced_by_another(refusal):
    Path("a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    assert "no column 'body'" in refusal(prepare.main, "a.jsonl", "--text_column=body")
