"""Files as they are: compressed, in any encoding of Unicode, with any line ends; and what is no text."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from kqv.text import utf8
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.sources import Source

UNHURRIED = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
# How bytes of Unicode begin and are written. A mark is for those that do not write it themselves.
ENCODINGS = {
    "utf-8": "",
    "utf-8-sig": "",
    "utf-16": "",
    "utf-32": "",
    "utf-16-be": "\ufeff",
    "utf-32-be": "\ufeff",
}
TEXTS = st.text(st.sampled_from("ab \t\n\r\r\né☃😀\u3000\x85\u2028"), max_size=40).filter(str.strip)


def read(path, **options):
    documents = []
    for piece in Source([str(path)], **options):
        documents += [""] * piece.begins
        documents[-1] += piece.content
    return documents


def with_newlines(text):
    return text.replace("\r\n", "\n").replace("\r", "\n")


@UNHURRIED
@given(text=TEXTS, size=st.integers(1, 12))
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", COMPRESS)
def test_a_text_is_the_same_however_it_is_written(ending, encoding, text, size, tmp_path):
    content = (ENCODINGS[encoding] + text).encode(encoding)
    (tmp_path / f"a{ending}").write_bytes(COMPRESS[ending](content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utf8, "PIECE", size)
        assert read(tmp_path / f"a{ending}") == [with_newlines(text)]


@UNHURRIED
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    size=st.integers(1, 12),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_line_ends_are_one_rule_for_every_source(kind, texts, size, end, tmp_path):
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    if kind == "json":
        lines = ["[", *(f"{line}," for line in lines[:-1]), lines[-1], "]"]
    elif kind == "csv":
        lines = ["id,text", *('"1","{}"'.format(text.replace('"', '""')) for text in texts)]
    elif kind == "tsv":  # has no way to write a line end or a tab
        texts = ["".join(text.split("\t")).replace("\r", "").replace("\n", "") + "." for text in texts]
        lines = ["Text\tid", *(f"{text}\t1" for text in texts)]
    (tmp_path / f"a.{kind}").write_bytes(end.join(lines).encode("utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utf8, "PIECE", size)
        assert read(tmp_path / f"a.{kind}") == [with_newlines(text) for text in texts]


def test_the_end_of_a_text_is_as_long_whatever_its_encoding(tmp_path):
    text = "some words é\n" * 500
    for encoding in ENCODINGS:
        (tmp_path / "a.txt").write_bytes((ENCODINGS[encoding] + text).encode(encoding))
        ends = "".join(piece.content for piece in Source([str(tmp_path / "a.txt")]) if piece.split == "val")
        assert len(ends.encode()) == pytest.approx(0.1 * len(text.encode()), abs=5)


def test_line_ends_in_conversations_are_newlines_too(tmp_path):
    rows = [[{"role": "user", "content": "a\r\nb"}, {"role": "assistant", "content": "c\rd\n"}]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    source = Source([str(tmp_path / "a.json")])
    assert [piece.content for piece in source] == [[("user", "a\nb"), ("assistant", "c\nd\n")]]
    assert source.has_other_line_ends


def test_line_ends_that_are_changed_are_said(prepared, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n" * 20)
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n" * 20)
    assert r"line ends \r\n or \r became \n" in prepared("a.txt")
    assert "line ends" not in prepared("b.txt")
    assert r"line ends \r\n or \r became \n" in prepared("b.txt", "--val=a.txt", "--name=c")
    assert [Dataset(name).tokenizer.chars for name in "ab"] == ["\nenotw"] * 2


# What is no text, or in another encoding


def archive(kind):
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("a.txt", "text " * 99)
    else:
        with tarfile.open(fileobj=content, mode=f"w:{kind}") as file:
            entry = tarfile.TarInfo("a.txt")
            file.addfile(entry, io.BytesIO())
    return content.getvalue()


GERMAN = "Grüße aus Köln, sagte er — „schön“, und ging.\n" * 5
RUSSIAN = "Привет, как дела сегодня?\n" * 5
NO_TEXT = {
    "zip": (archive("zip"), ["zip archive", "python -m zipfile -e"]),
    "tar": (archive(""), ["tar archive", "tar -xf"]),
    "tar.gz": (archive("gz"), ["tar archive", "tar -xf"]),
    "PDF": (b"%PDF-1.7\nsome text", ["PDF", "pdftotext"]),
    "zstd": (b"\x28\xb5\x2f\xfd\x00\x00", ["zstd", "zstd -d"]),
    "parquet": (b"PAR1 and more", [".parquet"]),
    "numbers": (bytes([0, 0, 0, 7, 1, 0, 0, 0]) * 99, ["is no text", "control characters"]),
    "any bytes": (bytes(range(1, 256)) * 20, ["is no text", "control characters"]),
    "UTF-16 without a mark": (GERMAN.encode("utf-16-le"), ["without a byte order mark", "iconv -f utf-16le"]),
    "the other UTF-16": (GERMAN.encode("utf-16-be"), ["without a byte order mark", "iconv -f utf-16be"]),
    "half a UTF-16": (GERMAN.encode("utf-16")[:-1], ["utf-16", "not whole"]),
    "a lone surrogate": ("a\ud800b".encode("utf-16", "surrogatepass"), ["utf-16", "not whole"]),
    "cp1252": (GERMAN.encode("cp1252"), ["0xfc", "iconv -f cp1252 -t utf-8"]),
    "cp1251": (RUSSIAN.encode("cp1251"), ["its own encoding", "cp1251", "iconv -f ENCODING"]),
    "gb18030": ("键和查询，值和键。\n".encode("gb18030") * 5, ["its own encoding", "gb18030"]),
    "damaged UTF-8": (GERMAN.encode() + b"\xff" + GERMAN.encode(), ["0xff", "iconv -c -f utf-8"]),
    "cut xz": (lzma.compress(GERMAN.encode())[:-20], ["xz file", "again"]),
    "cut bz2": (bz2.compress(GERMAN.encode())[:-20], ["bzip2 file", "again"]),
    "bad xz": (lzma.compress(bytes(9))[:20] + bytes(20), ["xz file", "again"]),
}  # fmt: skip


@pytest.mark.parametrize("content, parts", NO_TEXT.values(), ids=NO_TEXT)
def test_what_is_no_text_is_refused_with_the_way_out(content, parts, refusal, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    line = refusal(prepare.main, "a.txt")
    assert line.startswith("error: a.txt") and all(part in line for part in parts), line


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv"])
def test_a_table_that_is_no_text_is_refused_in_the_same_way(kind, refusal, tmp_path):
    for content, says in ((archive("zip"), "unpack it"), (RUSSIAN.encode("cp1251"), "its own encoding")):
        (tmp_path / f"a.{kind}").write_bytes(content)
        assert says in refusal(prepare.main, f"a.{kind}")


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be"])
def test_the_conversion_that_is_named_is_the_right_one(encoding, refusal, tmp_path):
    (tmp_path / "a.txt").write_bytes(GERMAN.encode(encoding))
    named = refusal(prepare.main, "a.txt").split("iconv -f ")[1].split()[0]
    assert (tmp_path / "a.txt").read_bytes().decode(named) == GERMAN


def test_a_compressed_file_needs_no_ending(prepared, tmp_path):
    for name, content in {"a.txt": gzip.compress(b"text " * 99), "b.txt.gz": b"text " * 99}.items():
        (tmp_path / name).write_bytes(content)
    prepared("a.txt"), prepared("b.txt.gz")
    for split in SPLITS:
        assert Dataset("a").splits[split][:].tolist() == Dataset("b").splits[split][:].tolist()
