"""Texts that would take all memory, or would never end."""

import gzip
import os
import resource
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN

import prepare
import train
from kqv import pipes

MB = 2**20
LONG = {
    "a.jsonl": (b'{"text": "a"}\n', b'{"text": "', b"a", "line 2"),
    "a.tsv": (b"text\tid\n", b"", b"a", "line 2"),
    "a.csv": (b"text,id\n", b'"', b"a,b\n", "line 2"),
    "a.json": (b'[{"text": "a"}, ', b'{"text": "', b"a", "row 2"),
    "a.txt": (b"", b"", b" ", "blanks"),
}


@pytest.mark.parametrize("name", LONG)
def test_a_row_without_end_is_refused_by_its_place_and_takes_little_memory(name, refusal):
    before, begin, part, where = LONG[name]
    # A gzip file may have several parts, one after the other: 120 times the same here.
    members = [gzip.compress(before + begin), *[gzip.compress(part * (MB // len(part)), 1)] * 120]
    Path(f"{name}.gz").write_bytes(b"".join(members))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert where in refusal(prepare.main, f"{name}.gz", "--name=a", "--max_row_mb=2")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100 * 1024


def test_the_longest_row_is_a_setting(refusal, prepared):
    Path("a.jsonl").write_text("".join(f'{{"text": "{i} {"key " * (MB // 3)}"}}\n' for i in range(20)))
    assert "--max_row_mb=2" in refusal(prepare.main, "a.jsonl", "--max_row_mb=1")
    assert "20 documents" in prepared("a.jsonl", "--max_row_mb=2", "--tokenizer=byte")


def test_a_table_of_one_text_many_times_is_refused_by_its_row(refusal):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pa.array(["a", *["a" * (5 * MB)] * 20])
    pq.write_table(pa.table({"text": texts}), "a.parquet", compression="zstd")
    assert "a.parquet, row 2" in refusal(prepare.main, "a.parquet", "--max_row_mb=2")


@pytest.mark.parametrize("place", ["folder", "glob"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_read_where_the_user_does_not_name_it(kind, place, refusal):
    os.mkdir("texts")
    os.mkfifo("texts/a.txt") if kind == "pipe" else os.symlink("/dev/zero", "texts/a.txt")
    source = "texts" if place == "folder" else "texts/*.txt"
    assert f"texts/a.txt is a {kind}" in refusal(prepare.main, source, "--name=a")


def test_a_pipe_without_a_writer_and_a_device_without_an_end_are_refused(refusal, monkeypatch):
    monkeypatch.setattr(pipes.opened, "__defaults__", (0.3,))  # seconds to wait for a writer
    assert "device" in refusal(prepare.main, "/dev/zero", "--name=a")
    assert "device" in refusal(train.main, *TINY_RUN, "/dev/zero", status=2)
    os.mkfifo("pipe")
    assert "no program writes" in refusal(prepare.main, "pipe", "--name=a")
    with open("/dev/zero") as zeros:
        monkeypatch.setattr(sys, "stdin", zeros)
        assert "standard input is a device" in refusal(prepare.main, "-", "--name=a")
