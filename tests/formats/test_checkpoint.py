"""Checkpoints of one file: whole or refused, whatever happens to the file or to who writes it."""

import os
import shutil
from dataclasses import asdict

import pytest
import torch
from conftest import random_gpt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.errors import UserError
from kqv.formats import checkpoint, loading


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """A folder with a ckpt.pt and its predecessor, and what is in them."""
    folder = tmp_path_factory.mktemp("run")
    for step in (1, 2):
        contents = {"model": {"a": torch.randn(300) + step}, "model_args": {"n_layer": 1}, "iter_num": step}
        checkpoint.save(folder / "ckpt.pt", contents)
    return folder


def is_step(contents, folder, name):
    expected = torch.load(folder / name, weights_only=True)
    return contents["iter_num"] == expected["iter_num"] and torch.equal(
        contents["model"]["a"], expected["model"]["a"]
    )


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_checkpoint_is_refused_or_its_predecessor_used(two_checkpoints, tmp_path, data):
    whole = (two_checkpoints / "ckpt.pt").read_bytes()
    offset = data.draw(st.integers(0, len(whole) - 1), label="offset")
    bit = data.draw(st.none() | st.integers(0, 7), label="bit")  # None: cut there
    torn = whole[:offset] if bit is None else bytearray(whole)
    if bit is not None:
        torn[offset] ^= 1 << bit
    (tmp_path / "ckpt.pt").write_bytes(torn)
    (tmp_path / "ckpt.prev.pt").unlink(missing_ok=True)
    try:
        contents = loading.load(tmp_path / "ckpt.pt")
    except UserError as error:
        assert "ckpt.pt" in str(error)
        shutil.copy(two_checkpoints / "ckpt.prev.pt", tmp_path)
        assert is_step(loading.load(tmp_path / "ckpt.pt"), two_checkpoints, "ckpt.prev.pt")
    else:  # the bit was in padding, which nothing reads
        assert is_step(contents, two_checkpoints, "ckpt.pt")


@pytest.mark.parametrize("fails_at", range(1, 4))
def test_a_save_that_breaks_off_leaves_a_whole_checkpoint(two_checkpoints, tmp_path, monkeypatch, fails_at):
    """Whichever step of saving is the last before a crash, what can be loaded is the state before."""
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        shutil.copy(two_checkpoints / name, tmp_path)
    steps = [(os, "fsync"), (os, "replace"), (os, "replace")]
    real, calls = {name: getattr(os, name) for _, name in steps}, []

    def crash_later(name):
        def step(*arguments):
            calls.append(name)
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return real[name](*arguments)

        return step

    for name in real:
        monkeypatch.setattr(os, name, crash_later(name))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "ckpt.pt", {"model": {}, "model_args": {}, "iter_num": 3})
    monkeypatch.undo()
    assert loading.load(tmp_path / "ckpt.pt")["iter_num"] == 2


def test_only_the_newest_checkpoint_keeps_its_predecessor(tmp_path):
    for step in (1, 2, 3):
        for name in ("ckpt.pt", "best.pt"):
            checkpoint.save(tmp_path / name, {"model": {}, "model_args": {}, "iter_num": step})
    steps = {path.name: checkpoint.read(path)["iter_num"] for path in tmp_path.iterdir()}
    assert steps == {"ckpt.pt": 3, "ckpt.prev.pt": 2, "best.pt": 3}


@pytest.mark.parametrize("form", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module.", "inner"])
def test_names_of_wrapped_models_and_old_masks_are_made_plain(tmp_path, form):
    gpt = random_gpt()
    plain = {**gpt.state_dict(), "transformer.h.0.attn.bias": torch.ones(1)}
    if form == "inner":
        wrapped = {name.replace("h.0.", "h.0._orig_mod."): tensor for name, tensor in plain.items()}
    else:
        wrapped = {form + name: tensor for name, tensor in plain.items()}
    checkpoint.save(tmp_path / "a.pt", {"model": wrapped, "model_args": asdict(gpt.config)})
    again = loading.model_of(loading.load(tmp_path / "a.pt"), "a.pt")
    assert all(torch.equal(tensor, gpt.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("left", ["lm_head.weight", "transformer.wte.weight"])
def test_one_of_embedding_and_head_is_enough(tmp_path, left):
    gpt = random_gpt()
    weights = {name: tensor for name, tensor in gpt.state_dict().items() if name != left}
    checkpoint.save(tmp_path / "a.pt", {"model": weights, "model_args": asdict(gpt.config)})
    assert torch.equal(loading.load(tmp_path / "a.pt")["model"][left], gpt.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: {"lm_head.weight": weights["lm_head.weight"] + 1}, "lm_head.weight"),
        (lambda weights: {"lm_head.weight": weights["lm_head.weight"][1:].clone()}, "lm_head.weight"),
        (lambda weights: {"lm_head.weight": weights["lm_head.weight"].half()}, "lm_head.weight"),
        (lambda weights: {"transformer.ln_f.weight": torch.ones(16, dtype=torch.int8)}, "torch.int8"),
        (lambda weights: {"module.transformer.ln_f.weight": torch.ones(16)}, "two weights"),
    ],
)
def test_weights_that_would_be_lost_are_refused(tmp_path, change, named):
    gpt = random_gpt()
    weights = {**gpt.state_dict(), **change(gpt.state_dict())}
    checkpoint.save(tmp_path / "a.pt", {"model": weights, "model_args": asdict(gpt.config)})
    with pytest.raises(UserError, match=named):
        loading.load(tmp_path / "a.pt")


def test_a_head_that_is_the_embedding_may_hold_what_is_no_number(tmp_path):
    gpt = random_gpt()
    gpt.lm_head.weight.data[0, 0] = float("nan")
    weights = {**gpt.state_dict(), "lm_head.weight": gpt.lm_head.weight.detach().clone()}
    checkpoint.save(tmp_path / "a.pt", {"model": weights, "model_args": asdict(gpt.config)})
    assert loading.load(tmp_path / "a.pt")["model"].keys() == gpt.state_dict().keys()
