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


@pytest.mark.parametrize(
    "argv", [["--init_from=out", "--out_dir=out"], ["--checkpoint=out/ckpt.pt", "--out_dir=out"]], ids=str
)
def test_what_is_given_and_not_used_is_refused(refusal, run, argv):
    assert "--out_dir=out means nothing with" in refusal(export.main, *argv, "--to=x", status=2)


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
    assert_one_line(cli(export.main, *targets(format)), "'aba'")


@pytest.mark.parametrize(
    ("argv", "is_file"),
    [
        (["--to=it.gguf"], True),
        (["--to=a.b/IT.GGUF"], True),
        (["--to=it", "--format=gguf"], True),
        (["--to=it.gguf", "--format=gguf", "--dtype=q8_0"], True),
        (["--to=it"], False),
        (["--to=gguf"], False),
        (["--to=v1.5"], False),
    ],
)
def test_the_format_follows_from_the_name(cli, run, argv, is_file):
    status, _, err = cli(export.main, *argv)
    assert status == 0, err
    path = Path(argv[0].removeprefix("--to="))
    assert path.is_file() == is_file and path.exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["--to=it.gguf", "--format=hf"],
        ["--to=it.safetensors"],
        ["--to=it.bin"],
        ["--to=it.pt", "--format=gguf"],
        ["--to=it/", "--format=gguf"],
        ["--to=it.gguf/"],
    ],
)
def test_a_name_that_contradicts_the_format_is_refused(refusal, run, argv):
    err = refusal(export.main, *argv, status=2)
    assert argv[0] in err and "--format=" in err
    assert not Path(argv[0].removeprefix("--to=")).exists()


def with_weight(run, name, value):
    contents = loading.load(run / "ckpt.pt")
    contents["model"][name].view(-1)[3] = value
    checkpoint.save(run / "ckpt.pt", contents)


@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_weight_that_is_no_number_is_not_exported(cli, run, format, name, value):
    with_weight(run, name, value)
    result = cli(export.main, *targets(format))
    assert_one_line(result, name, "nan" if value != value else "inf", "--checkpoint")
    assert left_in("here") == []


NAME = "transformer.h.0.attn.c_attn.weight"


@pytest.mark.parametrize(
    ("format", "dtype", "value", "fit"),
    [
        ("hf", "f16", 7e4, "f32 or bf16"),
        ("hf", "bf16", -3.4e38, "f32"),
        ("gguf", "f16", -7e4, "f32 or bf16"),
        ("gguf", "bf16", 3.4e38, "f32"),
        ("gguf", "q8_0", 9e6, "f32 or bf16"),
    ],
)
def test_a_precision_that_does_not_hold_a_weight_is_refused(cli, tmp_path, format, dtype, value, fit):
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257, n_embd=32))
    with_weight(tmp_path / "out", NAME, value)
    result = cli(export.main, *targets(format), f"--dtype={dtype}")
    assert_one_line(result, NAME, dtype, f"--dtype={fit}", f"{abs(value):.3g}")
    assert left_in("here") == []
    for other in fit.split(" or "):
        status, _, err = cli(export.main, *targets(format), f"--dtype={other}")
        assert (status, err) == (0, "")


@pytest.mark.parametrize(("format", "dtype"), [("hf", "f16"), ("gguf", "f16"), ("gguf", "q8_0")])
def test_the_largest_number_of_a_precision_is_held(cli, run, format, dtype):
    with_weight(run, NAME, 65504.0)
    status, _, err = cli(export.main, *targets(format), f"--dtype={dtype}")
    assert (status, err) == (0, "")
