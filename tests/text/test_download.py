"""Wheels: pinned, checked, fetched once, and where they are kept."""

import hashlib
import os
import pwd
import zipfile
from pathlib import Path

import pytest

import prepare
from kqv.errors import UserError
from kqv.text import download, package_index


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


@pytest.fixture
def index(monkeypatch):
    """index(content) answers what is fetched by these bytes -> the list of what was asked for."""

    def answer(content):
        calls = []
        monkeypatch.setattr(package_index, "fetch", lambda *asked: calls.append(asked) or content)
        return calls

    return answer


def test_of_a_wheel_only_what_is_asked_for_is_unpacked_once(cache, tmp_path, index):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text", "thing/deep/b.md": "more"})
    calls = index(content)
    for _ in range(2):
        folder = download.unpacked_wheel(pinned)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        assert files == ["thing/a.md", "thing/deep/b.md"]
    assert calls == [("thing==1.0", pinned.sha256)] and os.listdir(cache) == [folder.name]


def test_a_wheel_with_other_content_is_refused_and_not_kept(cache, tmp_path, index):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text"})
    index(content + b"\0")
    with pytest.raises(UserError, match="sha256"):
        download.unpacked_wheel(pinned)
    assert os.listdir(cache) == []


# Where downloads are kept


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """As in a container: neither a home folder nor an entry in the list of users."""

    def unknown(uid):
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "KQV_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_a_user_without_a_home_is_told_the_way_out_and_it_is_one(
    homeless, tmp_path, index, monkeypatch, refusal
):
    content, pinned = wheel(tmp_path, **{"thing/a.md": "text"})
    index(content)
    line = refusal(prepare.main, "plays")
    assert "no home folder" in line and "KQV_CACHE=" in line
    monkeypatch.setenv("KQV_CACHE", "here")
    assert Path(download.unpacked_wheel(pinned), "thing/a.md").read_text() == "text"


@pytest.mark.parametrize("name", ["HOME", "XDG_CACHE_HOME", "KQV_CACHE"])
def test_a_folder_for_downloads_that_can_not_be_written_is_named_with_the_way_out(
    name, homeless, tmp_path, monkeypatch, refusal
):
    Path("a_file").touch()
    monkeypatch.setenv(name, str(tmp_path / "a_file"))
    line = refusal(prepare.main, "plays")
    assert (
        f"kept in {tmp_path}/a_file" in line
        and ("Not a directory" in line or "File exists" in line)
        and "KQV_CACHE=" in line
    )
