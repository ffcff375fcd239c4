"""Files of torch.save: bombs among them, for every command that reads one."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import random_gpt

import export
import prepare
import sample
import train
from kqv.errors import UserError
from kqv.formats import loading

NESTED = ()
for _ in range(60):
    NESTED = (NESTED, NESTED)
HASHED = b"\x80\x02}" + pickle.dumps(NESTED, 2)[2:-1] + b"K\x01s."  # {NESTED: 1}, which none can make here


def records(**contents):
    file = io.BytesIO()
    torch.save({"model": {"a": torch.zeros(4)}, **contents}, file)
    with zipfile.ZipFile(file) as archive:
        return {record.filename: archive.read(record) for record in archive.infolist()}


def zipped(path, parts, **writing):
    with zipfile.ZipFile(path, "w", **writing) as archive:
        for name, content in parts:
            archive.writestr(name, content)


def hashed(path):
    zipped(path, {**records(), "archive/data.pkl": HASHED}.items())


def compressed(path):
    zeros = {**records(), "archive/data/0": bytes(50_000_000)}
    zipped(path, zeros.items(), compression=zipfile.ZIP_DEFLATED)


def overlapping(path):
    zipped(path, [("archive/data/1", bytes(1000)), ("archive/data/2", bytes(1000)), *records().items()])
    content = path.read_bytes()
    second = content.rindex(b"archive/data/2") - 4  # its header's offset, in the central directory
    path.write_bytes(content[:second] + bytes(4) + content[second + 4 :])


def of_two_names(path):
    zipped(path, [*records().items(), ("ARCHIVE/data.pkl", HASHED)])


def after_something(path):
    zipped(path, records().items())
    path.write_bytes(b"PK\x03\x04" + bytes(96) + path.read_bytes())


FILES = {
    "hashed for ever": lambda path: hashed(path),
    "hashed for ever, before torch 1.6": lambda path: path.write_bytes(
        b"".join(pickle.dumps(start, 2) for start in (0x1950A86A20F9469CFC6C, 1001, {})) + HASHED
    ),
    "hashed for ever, with a zip behind": lambda path: (
        hashed(path),
        path.write_bytes(HASHED + path.read_bytes()),
    ),
    "compressed": compressed,
    "overlapping": overlapping,
    "of two names": of_two_names,
    "after something": after_something,
    "of many layers": lambda path: torch.save(
        {"model": dict.fromkeys((f"transformer.h.{i}.x" for i in range(150_000)), torch.zeros(1))}, path
    ),
    "a pipe": os.mkfifo,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a pipe": lambda path: (os.mkfifo("pipe"), path.symlink_to("pipe")),
    "a socket": lambda path: os.mknod(path, 0o140644),
    "larger than any memory": lambda path: (path.touch(), os.truncate(path, 2**43)),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_a_file_that_would_take_too_much_is_refused(write, refusal, tmp_path):
    path = Path("a.pt")
    write(path)
    assert "a.pt" in refusal(sample.main, "--checkpoint=a.pt")


def test_every_command_refuses_it(refusal, tiny_set):
    hashed(Path("a.pt"))
    Path("text").write_text("keys and values " * 99)
    assert "a.pt" in refusal(export.main, "--checkpoint=a.pt", "--to=b")
    assert "a.pt" in refusal(prepare.main, "text", "--tokenizer=a.pt", "--name=b")
    assert "a.pt" in refusal(train.main, f"--dataset={tiny_set}", "--init_from=a.pt", "--device=cpu")


def test_a_model_is_measured_before_it_is_built():
    gpt = random_gpt()
    weights, args = dict(gpt.state_dict()), vars(gpt.config)
    assert loading.model_of({"model": weights, "model_args": args}, "a.pt").config == gpt.config
    large = {name: torch.zeros(1, dtype=torch.float16).expand(9, 9) for name in weights}
    with pytest.raises(UserError, match="a.pt is too large: .* GiB of this machine"):
        loading.model_of({"model": large, "model_args": {**args, "n_embd": 2**18}}, "a.pt")
    many = {f"transformer.h.{layer}.x": torch.zeros(1) for layer in range(20_000)}
    with pytest.raises(UserError, match="missing"):
        loading.model_of({"model": many, "model_args": {**args, "n_layer": 20_000}}, "a.pt")
