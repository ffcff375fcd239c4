"""Files and folders that are written whole or not at all."""

import os

import pytest

from kqv.files import put_in_place, replacing, write_json


def names(folder):
    return sorted(os.listdir(folder))


def write(path, content):
    """A file, or for a dict a folder with such files."""
    if isinstance(content, dict):
        path.mkdir()
        for name, part in content.items():
            write(path / name, part)
    else:
        path.write_text(content)


def read(path):
    if path.is_dir():
        return {child.name: read(child) for child in path.iterdir()}
    return path.read_text() if path.exists() else None


OLD = ["old", {"a": "old", "b": {"c": "old"}}, {}, None]
NEW = ["new", {"a": "new", "d": {"c": "new"}}]


@pytest.mark.parametrize("old", OLD, ids=str)
@pytest.mark.parametrize("new", NEW, ids=str)
def test_what_was_written_takes_the_place_of_what_was_there(old, new, tmp_path):
    path = tmp_path / "it"
    if old is not None:
        write(path, old)
    with replacing(path) as beside:
        write(beside, new)
        assert read(path) == old
    assert read(path) == new and names(tmp_path) == ["it"]


@pytest.mark.parametrize("old", OLD, ids=str)
@pytest.mark.parametrize("new", [*NEW, None], ids=str)
def test_an_error_while_writing_leaves_what_was_there_and_no_trace(old, new, tmp_path):
    path = tmp_path / "it"
    if old is not None:
        write(path, old)
    before = names(tmp_path)
    with pytest.raises(KeyboardInterrupt), replacing(path) as beside:
        if new is not None:
            write(beside, new)
        raise KeyboardInterrupt
    assert read(path) == old and names(tmp_path) == before


@pytest.mark.parametrize("old", OLD[:2], ids=str)
def test_what_was_there_can_be_kept(old, tmp_path):
    path, previous = tmp_path / "it", tmp_path / "before"
    for content, kept in ((old, None), ("second", old), ({"third": "x"}, "second")):
        with replacing(path, previous) as beside:
            write(beside, content)
        assert (read(path), read(previous)) == (content, kept)
    assert names(tmp_path) == ["before", "it"]
    path.unlink() if path.is_file() else os.rename(path, tmp_path / "elsewhere")
    with replacing(path, previous) as beside:  # nothing was there: the last one kept stays
        write(beside, "fourth")
    assert (read(path), read(previous)) == ("fourth", "second")


def test_what_a_killed_process_left_beside_is_no_part_of_what_is_written(tmp_path):
    write(tmp_path / ".it.new", {"a": "half"})
    write(tmp_path / ".it.old", {"a": "old"})
    with replacing(tmp_path / "it") as beside:
        write(beside, {"b": "new"})
    assert read(tmp_path / "it") == {"b": "new"} and names(tmp_path) == ["it"]


@pytest.mark.parametrize("previous", [None, "before"])
def test_all_is_on_the_disk_before_the_first_rename(previous, tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: events.append(os.readlink(f"/proc/self/fd/{file}")) or sync(file)
    )
    monkeypatch.setattr(os, "replace", lambda a, b: events.append("rename") or replace(a, b))
    write(tmp_path / "it", {"a": "old"})
    with replacing(tmp_path / "it", previous and tmp_path / previous) as beside:
        write(beside, {"a": "new", "b": {"c": "new"}})
    synced = [beside / "a", beside / "b", beside / "b/c", beside]
    first = events.index("rename")
    assert set(map(str, synced)) <= set(events[:first])
    assert events[first:] == ["rename", "rename", str(tmp_path)]


def test_a_folder_that_is_whole_is_put_in_place(tmp_path):
    write(tmp_path / "it", {"a": "old"})
    write(tmp_path / "parts", {"a": "new"})
    put_in_place(tmp_path / "parts", tmp_path / "it")
    assert read(tmp_path / "it") == {"a": "new"} and names(tmp_path) == ["it"]


def test_json_that_can_not_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    before = read(tmp_path / "a.json")
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert before == '{\n "\\u00e9": [\n  1,\n  null\n ]\n}\n' and read(tmp_path / "a.json") == before
    assert names(tmp_path) == ["a.json"]
