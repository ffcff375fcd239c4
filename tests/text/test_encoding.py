"""
Text to files as a stream: parts that outlive any end of the process, the same files whatever the workers, and
as little memory for much text as for little.
"""

import collections
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from conftest import process_environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from kqv.text import dataset_writer, encoding, sources, utf8
from kqv.text.dataset import SPLITS, Dataset
from kqv.text.sources import Source

UNHURRIED = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)


# prepare.py with small parts and pieces, and slowly where asked, so that a signal can come in between.
DRIVER = """
import json, sys, time
import prepare
from kqv import errors
from kqv.text import dataset_writer, encoding, utf8

if __name__ == "__main__":
    small = json.loads(sys.argv.pop(1))
    utf8.PIECE = small["PIECE"]
    encoding.PART, encoding.BEFORE_WORKERS = small["PART"], 1
    append = dataset_writer.Writer.append
    dataset_writer.Writer.append = lambda *arguments: (time.sleep(small["pause"]), append(*arguments))
    errors.run(prepare.main)
"""


SMALL = {"PART": 3000, "PIECE": 200, "pause": 0.0}


COMMAND = ["docs.jsonl", "--name=docs", "--val_fraction=0.3", "--workers=1"]


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """A file of 500 documents in the working folder."""
    monkeypatch.chdir(tmp_path)
    return write_documents(range(500))


def write_documents(numbers):
    rows = [
        {"text": f"document {number}: " + f"keys {number % 7} and values " * (number % 5)}
        for number in numbers
    ]
    Path("docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row["text"] for row in rows]


def start(*argv, tag="", limit=None, **small):
    """prepare.py in a process of its own, from the working folder; `tag` marks it and its workers."""
    Path("driver.py").write_text(DRIVER)
    command = [sys.executable, "driver.py", json.dumps({**SMALL, **small}), *map(str, argv)]

    def prepare_process():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command,
        env=process_environment(KQV_TEST_TAG=tag),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=prepare_process,
    )


def finish(*argv, **small):
    """prepare.py to its end, in this process: what it says."""
    small = {**SMALL, **small}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(utf8, "PIECE", small["PIECE"])
        patch.setattr(encoding, "PART", small["PART"])
        prepare.main(list(map(str, argv)))
    return out.getvalue()


def finish_apart(*argv):
    """prepare.py to its end, in a process of its own."""
    process = start(*argv)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), err


def fail(*argv, **options):
    """prepare.py in a process of its own, to an end that must be a failure: the one line that it says."""
    process = start(*argv, **options)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (1, ""), err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


def files(folder="data/docs"):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def parts_done(folder="data/docs"):
    with contextlib.suppress(OSError):
        return len(json.loads(Path(folder, ".new/progress.json").read_text())["parts"])
    return 0


def wait_for_parts(process, count):
    deadline = time.monotonic() + 60
    while parts_done() < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)


def tagged(tag):
    """{process id: command line} of the living processes that carry a tag."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"KQV_TEST_TAG={tag}\0".encode() in folder.joinpath("environ").read_bytes() + b"\0":
                found[int(folder.name)] = folder.joinpath("cmdline").read_bytes().decode()
    return found


def workers_of(tag):
    return [pid for pid, command in tagged(tag).items() if "spawn_main" in command]


def all_ids(name, split):
    return Dataset(Path("data", name).resolve()).splits[split][:].tolist()


# Parts


def test_a_large_set_is_in_parts_that_are_read_as_one(documents):
    out = finish(*COMMAND, "--tokenizer=byte")
    found = {split: sorted(path.name for path in Path("data/docs").glob(f"{split}*.bin")) for split in SPLITS}
    count = len(found["train"])
    assert count > 5 and found == {split: [f"{split}_{i:04d}.bin" for i in range(count)] for split in SPLITS}
    assert sorted(files()) == sorted(["meta.json", *found["train"], *found["val"]])
    sizes = {"train": [], "val": []}
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()[:8]
        sizes["val" if int.from_bytes(digest, "big") < 0.3 * 2**64 else "train"].append(document)
    meta = json.loads(files()["meta.json"])
    for split in SPLITS:
        expected = list(b"\0".join(document.encode() for document in sizes[split]))
        assert all_ids("docs", split) == [byte or 256 for byte in expected]
        assert meta["tokens"][split] == sum(part["tokens"][split] for part in meta["parts"]) == len(expected)
        assert meta["bytes"][split] == sum(map(len, sizes[split]))
    assert meta["sha256"] == hashlib.sha256(b"\xff".join(map(str.encode, documents))).hexdigest()
    assert meta["documents"] == 500 and "of 500 documents" in out
    assert all(sum(part["bytes"].values()) < 3000 + 2 * 200 for part in meta["parts"])
    assert finish(*COMMAND, "--tokenizer=byte").startswith("data/docs is ready")


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_the_files_are_the_same_whatever_the_workers_and_the_size_of_parts(tokenizer, documents):
    found = []
    for workers in (1, 2, 3):
        finish_apart(*COMMAND, f"--tokenizer={tokenizer}", f"--workers={workers}")
        found.append(files())
        shutil.rmtree("data")
    assert found[0] == found[1] == found[2] and len(found[0]) > 10
    finish(*COMMAND, f"--tokenizer={tokenizer}", PART=10**9)
    whole = files()
    assert sorted(whole) == ["meta.json", "train.bin", "val.bin"]
    for split in SPLITS:
        parts = [found[0][name] for name in sorted(found[0]) if name.startswith(split)]
        assert b"".join(parts) == whole[f"{split}.bin"]


@settings(UNHURRIED, max_examples=40)
@given(
    texts=st.lists(st.text(st.sampled_from("ab \n☃"), max_size=30).filter(str.strip), min_size=2, max_size=6),
    piece=st.integers(2, 12),
    part=st.integers(9, 60),
    few=st.sampled_from([100, 1]),
    kind=st.sampled_from(["byte", "char"]),
)
def test_documents_in_any_pieces_and_parts_have_separators_between_them_alone(
    texts, piece, part, few, kind, tmp_path
):
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        folder = tmp_path / uuid.uuid4().hex
        folder.mkdir()
        patch.chdir(folder)
        for module, name, value in (
            (utf8, "PIECE", piece),
            (encoding, "PART", part),
        ):
            patch.setattr(module, name, value)
        patch.setattr(sources, "FEW", few)
        patch.setattr(os, "fsync", lambda file: None)  # which takes its time
        for number, text in enumerate(texts):
            Path(f"{number}.txt").write_bytes(text.encode())
        expected = {split: [] for split in SPLITS}
        for number in range(len(texts)):
            pieces = list(Source([f"{number}.txt"], val_fraction=0.5))
            for split in SPLITS:
                own = "".join(piece.content for piece in pieces if piece.split == split)
                expected[split] += [own] * any(piece.split == split for piece in pieces)
        try:
            prepare.main(["*.txt", "--name=x", "--val_fraction=0.5", f"--tokenizer={kind}"])
        except prepare.UserError as error:
            assert "more text" in str(error) and not Path("data").exists()
            assert min(len("x".join(expected[split]).encode()) for split in SPLITS) < 6
            return
        data = Dataset(Path("data/x").resolve())
        for split in SPLITS:
            ids = [[int(id) for id in data.tokenizer.encode(text)] for text in expected[split]]
            between = [] if kind == "char" else [256]
            joined = functools.reduce(lambda a, b: [*a, *between, *b], ids)
            assert data.splits[split][:].tolist() == joined
        meta = json.loads(Path("data/x/meta.json").read_text())
        assert meta["documents"] == len(texts)
        assert meta["sha256"] == hashlib.sha256(b"\xff".join(map(str.encode, texts))).hexdigest()


# Ends


def test_killed_at_any_moment_it_goes_on_with_what_was_finished(documents):
    finish(*COMMAND, "--tokenizer=bpe:300")
    straight = files()
    shutil.rmtree("data")
    finished = {}
    for count in (1, 4, 7):
        process = start(*COMMAND, "--tokenizer=bpe:300", "--workers=2", pause=0.01)
        wait_for_parts(process, count)
        process.kill()
        process.communicate()
        parts = parts_done()
        assert count <= parts < len(straight) // 2
        for name, status in finished.items():  # what was finished before was not written again
            assert facts_of(Path("data/docs/.new", name)) == status
        finished = {}
        for number in range(parts):
            for split in SPLITS:
                path = Path(f"data/docs/.new/{split}_{number:04d}.bin")
                finished[path.name] = facts_of(path)
        assert os.listdir("data/docs") == [".new"]
    finish(*COMMAND, "--tokenizer=bpe:300")
    assert files() == straight and len(finished) >= 14
    for name, status in finished.items():
        assert facts_of(Path("data/docs", name)) == status


def facts_of(path):
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@pytest.fixture(scope="module")
def killed_after_three_parts(tmp_path_factory):
    """A folder in which prepare.py was killed after three parts; and the files that it would have made."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_documents(range(500))
        finish(*COMMAND, "--tokenizer=byte")
        straight = files()
        shutil.rmtree("data")
        process = start(*COMMAND, "--tokenizer=byte", pause=0.02)
        wait_for_parts(process, 3)
        process.kill()
        process.communicate()
        assert parts_done() == 3
    return folder, straight


@pytest.fixture
def stopped(killed_after_three_parts, tmp_path, monkeypatch):
    """A copy of that folder to work in: the files that prepare.py would have made."""
    folder, straight = killed_after_three_parts
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return straight


def kept_files():
    return {path.name: facts_of(path) for path in Path("data/docs/.new").glob("*_000[012].bin")}


def rewritten(before, folder="data/docs"):
    """Which of the files of three parts were written again."""
    return sorted(name for name, facts in before.items() if facts_of(Path(folder, name)) != facts)


@pytest.mark.parametrize("how", ["a bit", "shorter", "gone"])
def test_a_finished_part_that_was_damaged_is_made_again_and_what_follows(how, stopped):
    before = kept_files()
    path = Path("data/docs/.new/val_0001.bin")
    content = path.read_bytes()
    damaged = {"a bit": bytes([content[0] ^ 1]) + content[1:], "shorter": content[:-2], "gone": None}[how]
    path.unlink() if damaged is None else path.write_bytes(damaged)
    finish(*COMMAND, "--tokenizer=byte")
    assert files() == stopped
    assert [name for name in rewritten(before) if "0000" in name] == []
    assert {"train_0001.bin", "train_0002.bin", "val_0002.bin"} <= set(rewritten(before))


@pytest.mark.parametrize("torn", [b"", b"{", b"[]", b'{"parts": 5}', b"\xff"])
def test_progress_that_can_not_be_read_is_none(torn, stopped):
    Path("data/docs/.new/progress.json").write_bytes(torn)
    finish(*COMMAND, "--tokenizer=byte")
    assert files() == stopped


@pytest.mark.parametrize("what", ["first", "in the third part", "last", "two parts", "shorter", "longer"])
def test_a_text_that_has_changed_is_begun_again(what, stopped):
    parts = json.loads(Path("data/docs/.new/progress.json").read_text())["parts"]
    _, second, third = (part["documents"] for part in parts)
    before = kept_files()
    numbers = {
        "first": [999, *range(1, 500)],
        "in the third part": [*range(third - 1), 999, *range(third, 500)],
        "last": [*range(499), 999],
        "two parts": range(second),
        "shorter": range(40),
        "longer": range(501),
    }
    write_documents(numbers[what])
    finish(*COMMAND, "--tokenizer=byte")
    found = files()
    if what in ("last", "longer"):  # behind what was finished
        assert rewritten(before) == []
    shutil.rmtree("data")
    finish(*COMMAND, "--tokenizer=byte")
    assert files() == found != stopped


@pytest.mark.parametrize("setting", ["--val_fraction=0.4", "--tokenizer=char", "--unknown=skip"])
def test_parts_of_other_settings_are_not_gone_on_with(setting, stopped):
    finish(*COMMAND, "--tokenizer=byte", setting)
    found = files()
    shutil.rmtree("data")
    finish(*COMMAND, "--tokenizer=byte", setting)
    assert files() == found != stopped


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_no_process_outlives_the_one_that_was_stopped(how, documents):
    tag = uuid.uuid4().hex
    process = start(*COMMAND, "--tokenizer=byte", "--workers=2", tag=tag, pause=0.01)
    wait_for_parts(process, 1)
    while len(workers_of(tag)) < 2:
        time.sleep(0.01)
    if how == "SIGINT":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(getattr(signal, how))
    _, err = process.communicate(timeout=20)
    assert "Traceback" not in err and (how != "SIGINT" or err == "error: interrupted\n"), err
    deadline = time.monotonic() + 10
    while tagged(tag):
        assert time.monotonic() < deadline, tagged(tag)
        time.sleep(0.01)
    assert parts_done() >= 1
    finish(*COMMAND, "--tokenizer=byte")
    found = files()
    shutil.rmtree("data")
    finish(*COMMAND, "--tokenizer=byte")
    assert files() == found


def test_a_worker_that_was_killed_is_one_line_and_what_was_finished_stays(documents):
    tag = uuid.uuid4().hex
    process = start(*COMMAND, "--tokenizer=byte", "--workers=2", tag=tag, pause=0.01)
    wait_for_parts(process, 1)
    while not workers_of(tag):
        time.sleep(0.01)
    for pid in workers_of(tag):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, out, err.count("\n")) == (1, "", 1), err
    assert "was killed" in err and "--workers=1" in err and "go on" in err
    before = {path.name: facts_of(path) for path in Path("data/docs/.new").glob("*_0000.bin")}
    finish(*COMMAND, "--tokenizer=byte", "--workers=1")
    assert rewritten(before) == [] and len(before) == 2


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_finds_wrong_is_the_same_line(workers, documents):
    Path("abc.txt").write_text("abcdefghijklmnopqrstuvwxyz :0123456789 " * 9)
    finish("abc.txt", "--name=abc")
    with open("docs.jsonl", "a") as file:
        file.write('{"text": "document \\u2603"}')
    line = fail(*COMMAND, "--tokenizer=data/abc", f"--workers={workers}")
    assert "'☃' at position 9" in line and "--unknown=skip" in line
    assert parts_done() > 5  # the same command goes on from there, once the line is gone
    finish_apart(*COMMAND, "--tokenizer=data/abc", f"--workers={workers}", "--unknown=skip")
    decoded = Dataset(Path("data/docs").resolve()).tokenizer.decode
    assert "document " in decoded(all_ids("docs", "train")) + decoded(all_ids("docs", "val"))


# Disks


def test_a_full_disk_is_one_line_and_what_was_finished_stays(documents):
    """A limit on the size of files stands in for the full disk: only the last part is larger than it."""
    with open("docs.jsonl", "a") as file:
        file.write(json.dumps({"text": "much " * 20_000}) + "\n")
    small = {"PIECE": 30_000, "PART": 3000}
    line = fail(*COMMAND, "--tokenizer=byte", limit=70_000, **small)
    assert "data/docs" in line and "File too large" in line
    assert parts_done() == 0 or not Path("data/docs/meta.json").exists()


def test_a_disk_that_fills_up_leaves_the_parts_before(documents, refusal, monkeypatch):
    append, calls = dataset_writer.Writer.append, itertools.count()

    def full(*arguments):
        if next(calls) > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(*arguments)

    monkeypatch.setattr(dataset_writer.Writer, "append", full)
    monkeypatch.setattr(utf8, "PIECE", 200)
    monkeypatch.setattr(encoding, "PART", 3000)
    line = refusal(prepare.main, *COMMAND, "--tokenizer=byte")
    assert "data/docs" in line and "No space left" in line and "same command" in line
    assert parts_done() > 1
    before = {path.name: facts_of(path) for path in Path("data/docs/.new").glob("*_0000.bin")}
    monkeypatch.setattr(dataset_writer.Writer, "append", append)
    prepare.main([*COMMAND, "--tokenizer=byte"])
    assert rewritten(before) == []


@pytest.mark.parametrize("tokenizer, needed", [("byte", 2), ("bpe:300", None)])
def test_a_set_that_would_not_fit_on_the_disk_is_refused_at_once(
    tokenizer, needed, documents, refusal, monkeypatch
):
    Disk = collections.namedtuple("Disk", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 1000))
    line = refusal(prepare.main, *COMMAND, f"--tokenizer={tokenizer}")
    assert "data/docs needs about 0.0 GB" in line and "make room" in line
    assert not Path("data").exists()
    size = Path("docs.jsonl").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(0, 0, 3 * size))
    prepare.main([*COMMAND, f"--tokenizer={tokenizer}"])


def test_the_disk_that_counts_is_the_one_that_data_is_on(documents, tmp_path, monkeypatch):
    asked, usage = [], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path).resolve()) or usage(path))
    prepare.main(COMMAND)
    shutil.rmtree("data")
    (tmp_path / "larger").mkdir()
    Path("data").symlink_to(tmp_path / "larger")
    prepare.main(COMMAND)
    assert asked == [tmp_path / "data/docs", tmp_path / "larger/docs"]
    assert "train.bin" in os.listdir(tmp_path / "larger/docs")


# Settings and names


def test_two_processes_do_not_prepare_the_same_set(documents, refusal):
    process = start(*COMMAND, "--tokenizer=byte", pause=0.05)
    wait_for_parts(process, 1)
    line = refusal(prepare.main, *COMMAND, "--tokenizer=byte")
    assert "data/docs is being prepared by another process" in line and "--name" in line
    assert process.poll() is None and parts_done() >= 1
    process.kill()
    process.communicate()
    finish(*COMMAND, "--tokenizer=byte")


MEASURED = """
import resource, sys
import prepare
from kqv import errors
prepare.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize(
    "argv", [["--tokenizer=byte"], ["--tokenizer=char", "--workers=2"]], ids=["byte", "char"]
)
def test_memory_does_not_grow_with_the_text(argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "keys and values, and what is asked of them\n"
    peaks = []
    for megabytes in (5, 30):
        with open("text.txt", "w") as file:
            for _ in range(megabytes):
                file.write(line * (2**20 // len(line)))
        for _ in range(2):  # made, and found ready
            command = [sys.executable, "-c", MEASURED, "text.txt", *argv]
            done = subprocess.run(
                command, env=process_environment(), capture_output=True, text=True, check=True
            )
            peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert "is ready" in done.stdout
    assert peaks[2] - peaks[0] < 10 and peaks[3] - peaks[1] < 10, peaks  # megabytes
