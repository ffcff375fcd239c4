"""What prepare.py takes as text: folders, compressed files, tables of documents, standard input."""

import builtins
import gzip
import hashlib
import io
import json
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT, script, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from kqv.errors import UserError
from kqv.text import built_in, sources
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.sources import Source
from kqv.text.tokenizers import BPETokenizer, GPT2Tokenizer

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]))).filter(any)
KINDS = ["jsonl", "jsonl.gz", "parquet"]


@pytest.fixture
def small(monkeypatch):
    """small(PIECE=9) sets what is usually large."""

    def set_sizes(**sizes):
        for name, value in sizes.items():
            monkeypatch.setattr(sources, name, value)

    return set_sizes


@contextmanager
def pieces_of(size):
    """Texts in pieces of so many bytes, within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", size)
        yield


def parquet():
    return pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")


def split_at(separator, ids):
    borders = [-1, *(place for place, id in enumerate(ids) if id == separator), len(ids)]
    return [ids[start + 1 : end] for start, end in zip(borders, borders[1:], strict=False)]


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
    """The documents of a source, put together from their pieces."""
    documents = []
    for piece in Source([str(pattern) for pattern in patterns], **options):
        if piece.begins:
            documents.append(piece.content)
        else:
            documents[-1] += piece.content
    return documents


def split_by_hash(document, val_fraction=0.1):
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return "val" if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else "train"


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


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_lines_of_a_table_of_prompts_end_in_any_way(ends, tmp_path):
    lines = ["2+2=\t4", "", "é ☃\t\\n ", "no answer\t", "last\tone"]
    (tmp_path / "a.tsv").write_bytes(ends.join(lines).encode("utf-8"))
    (tmp_path / "b.TSV.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfa\tb\r\nc\td\n"))
    expected = [("2+2=", "4"), ("é ☃", "\\n "), ("no answer", ""), ("last", "one"), ("a", "b"), ("c", "d")]
    assert read(tmp_path / "a.tsv", tmp_path / "b.TSV.gz") == [built_in.prompted(*row) for row in expected]


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


def test_blank_files_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf \r\n\t")
    (tmp_path / "d.txt.gz").write_bytes(b"")
    (tmp_path / "e.jsonl").write_bytes(b"\n")
    assert read(tmp_path) == ["b"]
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=f"{tmp_path} is empty"):
        read(tmp_path)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_texts_and_conversations_are_not_mixed(names, tmp_path, refusal):
    (tmp_path / "a.jsonl").write_bytes(LINE)
    (tmp_path / "b.tsv").write_bytes(b"a\tb\n")
    paths = [next(tmp_path.glob(f"{name}.*")).name for name in names]
    line = refusal(prepare.main, *paths, "--name=x")
    assert line.startswith(f"error: {paths[1]} mixes texts and conversations") and "apart" in line


# A text in pieces

SCRIPTS = st.text(st.sampled_from("ab  \n\n\r\té☃😀\ufeff\u3000")).map(lambda text: text.encode("utf-8"))


def after_byte(data, cut):
    """Where the first character begins at or after a byte."""
    while cut < len(data) and data[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


@settings(UNHURRIED, max_examples=300)
@given(data=SCRIPTS, size=st.integers(1, 12), cut=st.none() | st.integers(0, 60), at_once=st.integers(1, 9))
def test_stretches_join_to_the_text_and_never_cut_a_character(data, size, cut, at_once):
    class Slow(io.BytesIO):
        def read(self, size):
            return super().read(min(size, at_once))

    with pieces_of(size):
        found = list(sources.stretches(Slow(data), "a", cut))
    text = data.decode("utf-8")
    assert "".join(stretch for _, stretch in found) == text.removeprefix("\ufeff")
    assert all(0 < len(stretch.encode("utf-8")) <= size + 3 for _, stretch in found)
    tail = "".join(stretch for is_tail, stretch in found if is_tail).encode("utf-8")
    whole = len(data) if cut is None else after_byte(data, cut)
    assert tail.decode() == data[whole:].decode().removeprefix("" if whole else "\ufeff")
    assert [is_tail for is_tail, _ in found] == sorted(is_tail for is_tail, _ in found)


@settings(UNHURRIED, max_examples=300)
@given(data=SCRIPTS, size=st.integers(1, 12))
def test_a_stretch_ends_between_two_words_where_it_can(data, size):
    with pieces_of(size):
        found = [stretch for _, stretch in sources.stretches(io.BytesIO(data), "a")]

    def border(rest):
        places = [i for i in range(1, min(size, len(rest) - 1) + 1) if not rest[i - 1 : i].isspace()]
        before_space = [i for i in places if rest[i : i + 1] == b" "]
        lines = [i + 1 for i in places if rest[i : i + 1] == b"\n" and rest[i + 1 : i + 2].strip()]
        return max(before_space or [i for i in lines if i <= size] or [after_byte(rest, size)])

    expected = []
    while data:
        end = len(data) if len(data) <= size else border(data)
        expected, data = [*expected, data[:end].decode("utf-8")], data[end:]
    if expected:
        expected[0] = expected[0].removeprefix("\ufeff")
    assert found == list(filter(None, expected))


@pytest.fixture(scope="module")
def learnt():
    return BPETokenizer.trained_on([PROSE], 700)


@pytest.fixture(scope="module")
def gpt2():
    try:
        return GPT2Tokenizer()
    except UserError as error:
        if "package index" not in str(error):
            raise
        pytest.skip(str(error))


PROSE = Path(ROOT, "README.md").read_text("utf-8")
CODE = Path(ROOT, "model.py").read_text("utf-8")


def in_pieces(tokenizer, text):
    found = sources.stretches(io.BytesIO(text.encode("utf-8")), "a")
    return [tokenizer.encode(stretch).tolist() for _, stretch in found]


TEXTS = [PROSE, CODE, PROSE.replace("\n", " "), CODE.replace("\n", "\r\n\r\n")]


@pytest.mark.parametrize("size", [100, 1000, 5000])
@pytest.mark.parametrize("text", TEXTS, ids=["prose", "code", "one line", "empty lines"])
def test_tokens_of_a_text_in_pieces_are_those_of_the_whole_text(gpt2, learnt, text, size):
    for tokenizer in (gpt2, learnt):
        with pieces_of(size):
            found = in_pieces(tokenizer, text)
        assert len(found) >= len(text) / size
        assert sum(found, []) == tokenizer.encode(text).tolist()


ENDS = st.sampled_from([" ", "  ", "\n", "\n\n", "\r\n", "\n    ", "\t", ".\n", "...\n\n", ":\n\t", ""])
WORDS = st.sampled_from(["key", " key", "key's", "1234", "é", " (", "_", "\u00a0a", "क्वे"])


@settings(UNHURRIED, max_examples=300)
@given(words=st.lists(st.tuples(WORDS, ENDS).map("".join), max_size=60), size=st.integers(20, 60))
def test_tokens_of_any_words_in_pieces_are_those_of_the_whole_text(gpt2, learnt, words, size):
    text = "".join(words)
    longest = max(len(part.encode("utf-8")) for part in re.split(r"(?<=[^\s])(?= )", text))
    for tokenizer in (gpt2, learnt):
        with pieces_of(size):
            found = sum(in_pieces(tokenizer, text), [])
        assert tokenizer.decode(found) == text
        if longest < size:  # so that in each piece there is a space between two words
            assert found == tokenizer.encode(text).tolist()


@settings(UNHURRIED, max_examples=200)
@given(before=SCRIPTS, after=SCRIPTS, size=st.integers(1, 12), cut=st.none() | st.integers(0, 60))
def test_a_byte_that_is_no_utf8_is_found_wherever_pieces_end(before, after, size, cut):
    with pieces_of(size), pytest.raises(UserError) as error:
        list(sources.stretches(io.BytesIO(before + b"\xff" + after), "a.txt", cut))
    line, offset = before.count(b"\n") + 1, len(before) - before.rfind(b"\n") - 1
    assert f"a.txt is not UTF-8 text (byte 0xff at offset {offset} of line {line})" in str(error.value)


@UNHURRIED
@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip), size=st.integers(1, 9))
@pytest.mark.parametrize("few", [100, 1])
def test_a_document_comes_in_pieces_of_which_only_the_first_begins_it(few, text, size, tmp_path):
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    write_table(tmp_path / "b.jsonl", [text])
    with pieces_of(size), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "FEW", few)
        for name in ("a.txt", "b.jsonl"):
            found = list(Source([str(tmp_path / name)], val_fraction=0.5))
            assert [piece.begins for piece in found] == [True, *[False] * (len(found) - 1)]
            whole = "".join(piece.content for piece in found)
            assert whole in (text, text.removeprefix("\ufeff"))
            if few == 1 or name == "b.jsonl":
                assert len({piece.split for piece in found}) == 1


def test_a_compressed_text_comes_in_the_same_pieces(small, tmp_path):
    small(PIECE=1000)
    content = write_text(tmp_path / "a.txt").read_bytes()
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    plain, compressed = (list(Source([str(tmp_path / name)])) for name in ("a.txt", "a.txt.gz"))
    assert plain == compressed
    tail = "".join(piece.content for piece in plain if piece.split == "val")
    assert len(tail.encode("utf-8")) == len(content) - int(0.9 * len(content))


def test_a_source_can_be_read_again_and_shows_how_far_it_is(small, tmp_path):
    small(PIECE=1000)
    write_text(tmp_path / "a.txt")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress((tmp_path / "a.txt").read_bytes()))
    write_table(tmp_path / "c.jsonl", ["a document"] * 99)
    source = Source([str(tmp_path)])
    first, positions = [], []
    for piece in source:
        first.append(piece)
        positions.append(source.position)
    assert source.size == source.position == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert positions == sorted(positions) and len(set(positions)) > 20 and positions[-1] <= source.size
    assert list(source) == first


def test_a_file_that_changes_while_it_is_read_is_refused(small, tmp_path):
    small(PIECE=1000)
    path = write_text(tmp_path / "a.txt")
    source = Source([str(path)])
    pieces = iter(source)
    next(pieces)
    with open(path, "a") as file:
        file.write("more")
    with pytest.raises(UserError, match="a.txt changed while it was read"):
        list(pieces)
    with pytest.raises(UserError, match="a.txt changed while it was read"):
        list(source)  # and between the first reading and the next


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_line_may_have_any_length(name, tmp_path):
    text = "longer" * 2_000_000
    (tmp_path / name).write_text(text if name == "a.txt" else json.dumps({"text": text}))
    found = list(Source([str(tmp_path / name)]))
    assert "".join(piece.content for piece in found) == text
    assert max(len(piece.content) for piece in found) <= sources.PIECE and len(found) > 10


# Which split


def splits_of(*patterns, **options):
    """{document: its split}."""
    return {str(piece.content): piece.split for piece in Source([str(p) for p in patterns], **options)}


@UNHURRIED
@given(documents=st.lists(st.text(min_size=1), min_size=1, unique=True), random=st.randoms())
def test_a_documents_split_depends_on_nothing_but_itself(documents, random, tmp_path):
    together = splits_of(write_table(tmp_path / "a.jsonl", documents))
    random.shuffle(documents)
    half = len(documents) // 2
    parts = [documents[:half], documents[half:]]
    paths = [write_table(tmp_path / f"{name}.jsonl", part) for name, part in zip("yx", parts, strict=True)]
    assert splits_of(*paths) == together == {text: split_by_hash(text) for text in documents}


@pytest.mark.parametrize("val_fraction", [0.0, 0.01, 0.1, 0.5, 0.9])
def test_the_share_of_validation_is_near_what_was_asked_for(val_fraction, tmp_path):
    path = write_table(tmp_path / "a.jsonl", [f"document {number}" for number in range(5000)])
    found = splits_of(path, val_fraction=val_fraction)
    share = sum(split == "val" for split in found.values()) / 5000
    assert share == pytest.approx(val_fraction, abs=4 * (val_fraction * (1 - val_fraction) / 5000) ** 0.5)
    larger = splits_of(path, val_fraction=min(val_fraction + 0.05, 0.99))
    assert all(larger[document] == "val" for document, split in found.items() if split == "val")


@pytest.mark.parametrize("number", [4, 5])
def test_many_texts_are_in_one_split_each(number, small, tmp_path):
    small(FEW=5, PIECE=8)
    for name in range(number):
        (tmp_path / f"{name}.txt").write_text(f"text number {name} of several words")
    write_table(tmp_path / "table.jsonl", ["no text", "no text either"])
    source = Source([str(tmp_path)], val_fraction=0.4)
    assert source.cut == (number < 5)
    splits, texts = {}, []
    for piece in source:
        texts += [""] * piece.begins
        texts[-1] += piece.content
        splits.setdefault(len(texts) - 1, []).append(piece.split)
    assert texts[-2:] == ["no text", "no text either"]
    for place in range(number):
        if number < 5:
            assert splits[place] == sorted(splits[place]) and set(splits[place]) == {"train", "val"}
        else:
            assert set(splits[place]) == {split_by_hash("text", 0.4)}  # as its first piece says
    assert set(splits[number]) == set(splits[number + 1]) == {split_by_hash("no text", 0.4)}


def test_a_question_is_never_in_both_splits(tmp_path):
    rows = []
    for number in range(300):
        for answer in ("yes", "no"):
            said = [("system", f"{answer} {number}")] if number % 2 else []
            said += [
                ("user", f"question {number}"),
                ("assistant", answer),
                ("user", answer),
                ("assistant", ""),
            ]
            rows.append([{"role": role, "content": text} for role, text in said])
    found = {}
    for piece in Source([str(write_table(tmp_path / "a.jsonl", rows, column="messages"))]):
        question = next(text for role, text in piece.content if role == "user")
        assert found.setdefault(question, piece.split) == piece.split == split_by_hash(question)
    assert set(found.values()) == set(SPLITS)


# From the command line


def decoded(name):
    opened = Dataset(Path("data").resolve() / name)
    return "".join(opened.tokenizer.decode(opened.splits[split][:]) for split in ("train", "val"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_prepared_document_by_document(kind, cli, tmp_path):
    documents = [f"document {i} " for i in range(60)]
    write_table(tmp_path / f"table.{kind}", ["", *documents, ""], column="content")
    argv = [f"table.{kind}", "--name=table", "--text_column=content", "--tokenizer=byte"]
    status, _, err = cli(prepare.main, *argv)
    assert (status, err) == (0, "")
    opened = Dataset(Path("data/table").resolve())
    for split in SPLITS:
        own = [document.encode() for document in documents if split_by_hash(document) == split]
        ids = opened.splits[split][:].tolist()
        assert len(own) > 2 and [bytes(part) for part in split_at(256, ids)] == own
    assert json.loads(Path("data/table/meta.json").read_text("utf-8"))["documents"] == 60


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


def said(*messages):
    """A line with a conversation: of each message its role, where nothing more is to be said of it."""
    messages = [{"role": m, "content": m} if m in sources.ROLES else m for m in messages]
    return json.dumps({"messages": messages}).encode()


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
