"""How a sharded checkpoint leaves a GPU, with stand-ins for the GPU; test_distributed.py has the rest."""

import threading

import pytest
import torch
import torch.distributed as dist

from kqv.formats import sharded
from kqv.training.saver import Saver
from kqv.training.sharded_saver import ShardedSaver
from kqv.training.world import World

GPU = torch.device("cuda:1")


@pytest.fixture
def saving():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def pinned(monkeypatch):
    """A stand-in for pinned memory: the list of the tensors in it."""
    found = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.fixture
def current(monkeypatch):
    """A stand-in for CUDA: a list of (thread, the device that became its current one)."""
    found = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: found.append((threading.current_thread().name, device))
    )
    return found


def contents_of(step):
    weight = torch.full((4, 3), float(step))
    state = {0: {"step": torch.tensor(float(step)), "exp_avg": weight + 1}}
    return {"model": {"weight": weight}, "optimizer": {"state": state}, "iter_num": step}


def test_a_gpus_parts_are_staged_in_pinned_memory_that_is_used_again(saving, pinned, current, tmp_path):
    saver = ShardedSaver(World(GPU, saving=saving), tmp_path)
    for step in (1, 2, 3):
        saver.save(contents_of(step), best=False)
        saver.wait()
        assert saver.failed == {}
        assert sharded.load_full(tmp_path / "ckpt.pt", "model")["weight"].eq(step).all()
    assert [tensor.shape for tensor in pinned] == [(4, 3)] * 2
    assert current == [("saver", GPU)] * 3  # in the thread that writes


def test_a_best_that_could_not_be_written_keeps_its_memory(saving, pinned, current, tmp_path):
    saver = ShardedSaver(World(GPU, saving=saving), tmp_path)
    first = saver.stage(contents_of(1))
    saver.release_copies()
    assert saver.stage(contents_of(2))["model"]["weight"].eq(2).all()
    assert first["model"]["weight"].eq(1).all() and len(pinned) == 4


def test_without_a_gpu_nothing_is_pinned(saving, pinned, current, tmp_path):
    saver = ShardedSaver(World(torch.device("cpu"), saving=saving), tmp_path)
    for step in (1, 2):
        saver.save(contents_of(step), best=False)
        saver.wait()
    assert saver.failed == {} and not pinned and not current


def test_a_copy_to_the_host_waits_unless_it_is_from_cuda(tmp_path, monkeypatch):
    waits, copy = [], torch.Tensor.copy_

    def recorded(target, source, non_blocking=False):
        waits.append(not non_blocking)
        return copy(target, source)

    monkeypatch.setattr(torch.Tensor, "copy_", recorded)
    Saver(tmp_path).copy({"weight": torch.zeros(3)})
    assert waits == [True]
