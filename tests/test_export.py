"""export.py as a user runs it: what it replaces and what stays, what a failure leaves, settings, refusals."""

import os
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import random_gpt
from exports import a_folder, assert_one_line, save_run

import export
from kqv.formats import checkpoint, loading
from kqv.text.tokenizers import ByteTokenizer, CharTokenizer


@pytest.fixture
def run(tmp_path):
    """A run with a tiny model, to export in the test's folder."""
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257), iter_num=1)
    return tmp_path / "out"


def targets(format):
    return [f"--format={format}", "--to=here/it"]


def left_in(folder):
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_an_earlier_export_is_replaced_and_nothing_else_is(cli, run, format):
    status, out, err = cli(export.main, *targets(format))
    assert status == 0 and "here/it" in out and "byte" in out, err
    changed = loading.load(run / "ckpt.pt")
    changed["model"]["transformer.wpe.weight"] += 1
    checkpoint.save(run / "ckpt.pt", changed)
    before = content_of("here/it")
    assert cli(export.main, *targets(format))[0] == 0
    assert content_of("here/it") != before and left_in("here") == ["it"]
    if format == "hf":
        Path("here/it/mine.txt").write_text("mine")
        assert_one_line(cli(export.main, *targets(format)), "here/it", "another --to")
        assert Path("here/it/mine.txt").read_text() == "mine"


def content_of(path):
    path = Path(path)
    return path.read_bytes() if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("other", ["file", "note", "folder", "theirs", "gguf"])
def test_what_no_export_wrote_stays(cli, run, format, other):
    Path("here").mkdir()
    if other == "file":
        Path("here/it").write_text("mine")
    elif other == "note":
        Path("here/it").write_text("GG kqv.export")
    elif other == "gguf":
        Path("here/it").write_bytes(b"GGUF" + bytes(100))
    elif other == "folder":
        Path("here/it").mkdir()
        Path("here/it/mine").write_text("mine")
    else:
        a_folder("here/it", 257)
    before = content_of("here/it")
    assert_one_line(cli(export.main, *targets(format)), "here/it", "another --to")
    assert content_of("here/it") == before and left_in("here") == ["it"]


def test_an_empty_folder_is_filled(cli, run):
    Path("here/it").mkdir(parents=True)
    assert cli(export.main, *targets("hf"))[0] == 0 and "config.json" in left_in("here/it")
    Path("other").mkdir()
    assert_one_line(cli(export.main, "--format=gguf", "--to=other"), "other", "another --to")


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("limit", [10, 3000, 20000])
@pytest.mark.parametrize("again", [False, True])
def test_a_full_disk_leaves_nothing_half_written(cli, run, format, limit, again):
    if again:
        assert cli(export.main, *targets(format))[0] == 0
    before = content_of("here/it") if again else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        result = cli(export.main, *targets(format))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_one_line(result, "here/it", "can't be written")
    assert left_in("here") == (["it"] if again else [])
    assert not again or content_of("here/it") == before


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_what_a_killed_export_left_is_no_hindrance(cli, run, format):
    Path("here/.it.new").mkdir(parents=True)
    Path("here/.it.new/config.json").write_text("half")
    Path("here/.it.old").mkdir()
    assert cli(export.main, *targets(format))[0] == 0
    assert left_in("here") == ["it"] and cli(export.main, *targets(format))[0] == 0


def test_an_interrupted_export_leaves_nothing(cli, tmp_path):
    """By a real signal, when the first of its files is there and 25 MB are still to be written."""
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257, n_layer=2, n_embd=512))

    def interrupt():
        until = time.monotonic() + 60
        while not Path("here/.it.new/tokenizer.json").exists() and time.monotonic() < until:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    status = cli(export.main, *targets("hf"))[0]
    thread.join()
    assert status == 130 and left_in("here") == []


def test_the_checkpoint_can_be_chosen(cli, run):
    other = loading.load(run / "ckpt.pt")
    other["iter_num"] = 2
    checkpoint.save(run / "best.pt", other)
    shutil.copy(run / "best.pt", "copy.pt")
    for choice, step in (("best", 2), ("newest", 1), ("copy.pt", 2)):
        assert cli(export.main, f"--checkpoint={choice}", "--to=it")[0] == 0
        assert f"Steps: {step}." in Path("it/README.md").read_text()
    assert cli(export.main, "--init_from=out", "--to=it")[0] == 0
    assert "Steps: 2." in Path("it/README.md").read_text()


@pytest.mark.parametrize("argv", [[], ["--to=x", "--dtype=q8_0"], ["--to=x", "--format=onnx"]])
def test_settings_that_make_no_sense_are_refused(refusal, run, argv):
    assert "--" in refusal(export.main, *argv, status=2)


def test_a_run_that_is_not_there_is_refused(cli):
    assert_one_line(cli(export.main, "--to=x"), "out/ckpt.pt")
    assert left_in("x") == []


@pytest.mark.parametrize(("format", "package"), [("hf", "safetensors"), ("gguf", "gguf")])
def test_a_missing_package_is_one_line(cli, run, monkeypatch, format, package):
    for name in (package, f"{package}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert_one_line(cli(export.main, *targets(format)), f"pip install {package}")
    assert left_in("here") == []


def test_weights_for_fewer_ids_than_the_tokenizers_are_refused(cli, tmp_path):
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=256))
    assert_one_line(cli(export.main, "--to=x"), "257", "256")


def test_weights_of_another_shape_are_refused(cli, run):
    broken = loading.load(run / "ckpt.pt")
    checkpoint.save(run / "ckpt.pt", {**broken, "model_args": {**broken["model_args"], "n_embd": 32}})
    assert_one_line(cli(export.main, "--to=x"), "ckpt.pt", "no weights of a GPT")


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_two_ids_of_one_name_are_refused(cli, tmp_path, format):
    save_run(tmp_path / "out", CharTokenizer("aba"))
    assert_one_line(cli(export.main, *targets(format)), "'a'")
