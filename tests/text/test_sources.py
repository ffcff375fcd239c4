"""Which text a source has, in which pieces and which split."""

import gzip
import hashlib
import io
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import script, write_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import read, write_table

import prepare
from kqv.errors import UserError
from kqv.text import sources, utf8
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.sources import Source

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


def ids(name, split):
    return all_of(Dataset(Path("data").resolve() / name).splits[split])


def all_of(tokens):
    return tokens[:].tolist()


def text(name, split):
    return Dataset(Path("data").resolve() / name).tokenizer.decode(ids(name, split))


def cut_in_two(text, val_fraction=0.1):
    """A text's two parts: the second has its last bytes, and begins with a whole character."""
    data = with_newlines(text).encode("utf-8")
    cut = int(len(data) * (1 - val_fraction))
    while data[cut : cut + 1] and data[cut] & 0xC0 == 0x80:
        cut += 1
    return data[:cut].decode(), data[cut:].decode()


def with_newlines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_of(document, val_fraction=0.1):
    """(training part, validation part) of a text that is one of a few."""
    pieces = list(Source(("plays",), val_fraction=val_fraction).pieces(document, cut=True))
    assert [piece.begins for piece in pieces] == [True, False][: len(pieces)]
    return tuple("".join(p.content for p in pieces if p.split == split) for split in SPLITS)


def test_a_text_is_split_where_nanogpt_splits_it():
    for n in [*range(3000), 1_115_394]:
        assert len(split_of("x" * n)[0]) == int(n * 0.9)


@UNHURRIED
@given(st.text().map(lambda text: f"x{text}"), st.floats(0, 1, exclude_max=True))
def test_a_text_is_cut_at_its_last_bytes_between_two_characters(document, val_fraction):
    assert split_of(document, val_fraction) == cut_in_two(document, val_fraction)


KINDS = ["jsonl", "jsonl.gz", "parquet"]


@pytest.fixture
def small(monkeypatch):
    """small(PIECE=9) sets what is usually large."""

    def set_sizes(**sizes):
        for name, value in sizes.items():
            monkeypatch.setattr(utf8 if name == "PIECE" else sources, name, value)

    return set_sizes


@contextmanager
def pieces_of(size):
    """Texts in pieces of so many bytes, within."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utf8, "PIECE", size)
        yield


def split_at(separator, ids):
    borders = [-1, *(place for place, id in enumerate(ids) if id == separator), len(ids)]
    return [ids[start + 1 : end] for start, end in zip(borders, borders[1:], strict=False)]


def split_by_hash(document, val_fraction=0.1):
    digest = hashlib.sha256(document.encode("utf-8")).digest()
    return "val" if int.from_bytes(digest[:8], "big") / 2**64 < val_fraction else "train"


# What is read


def test_compressed_text_is_one_document_exactly_as_it_was(tmp_path):
    whole = "one\n\n two ☃\0\n"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + whole.encode("utf-8")))
    (tmp_path / "b.GZ").write_bytes(gzip.compress(b"first, ") + gzip.compress(b"second"))  # as cat a.gz b.gz
    assert read(tmp_path / "a.txt.gz", tmp_path / "b.GZ") == [whole, "first, second"]


def test_a_file_whose_ending_says_nothing_is_text(tmp_path):
    (tmp_path / "rows.log").write_text('{"text": "a"}\n')
    assert read(tmp_path / "rows.log") == ['{"text": "a"}\n']


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
    assert read(tmp_path / "a.txt", "-", tmp_path / "a.txt") == ["a", "é\n☃\n", "a"]


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


@UNHURRIED
@given(
    text=st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t")).filter(str.strip),
    size=st.integers(1, 9),
)
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
            assert whole in map(with_newlines, (text, text.removeprefix("\ufeff")))
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
    assert max(len(piece.content) for piece in found) <= utf8.PIECE and len(found) > 10


def splits_of(*patterns, **options):
    """{document: its split}."""
    return {str(piece.content): piece.split for piece in Source([str(p) for p in patterns], **options)}


@UNHURRIED
@given(documents=st.lists(st.text(min_size=1), min_size=1, unique=True), random=st.randoms())
def test_a_documents_split_depends_on_nothing_but_itself(documents, random, tmp_path):
    documents = [*dict.fromkeys(map(with_newlines, documents))]
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


LINE = b'{"text": "a"}\n'


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
    assert "standard input is empty" in refusal(prepare.main, "-", "--name=x")


def test_a_process_of_its_own_says_the_same(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(LINE + b"{")
    done = script("prepare.py", "a.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: a.jsonl, line 2 is not a JSON object")
