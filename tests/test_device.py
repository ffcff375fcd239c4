"""How a device is found, its precision and peak, and whether compiling can work there."""

import importlib.metadata
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from kqv.device import PEAK_TFLOPS, cannot_compile, find_compile, find_device, find_dtype, peak_flops
from kqv.errors import UserError
from kqv.training.process_group import find_own_device

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


@pytest.fixture
def current(monkeypatch):
    """A stand-in for two GPUs: the list of those that became the current one."""
    chosen, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device: empty(*sizes))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_the_device_that_is_found_is_the_current_one(current):
    assert find_device("cuda:1") == GPU
    assert find_device("cuda") == find_device("auto") == torch.device("cuda")  # the current one already
    assert find_device("cpu") == CPU
    assert current == [GPU]


def test_of_two_processes_each_has_its_own_current_device(current):
    assert [find_own_device("auto", rank) for rank in (0, 1)] == current == [torch.device("cuda:0"), GPU]


@pytest.fixture
def compiling(monkeypatch, tmp_path):
    """A stand-in for a GPU that torch.compile works on, with torch 2.11: a function that takes parts away."""

    def install(capability=(9, 0), triton="3.6.0", gcc=True, header=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        requirements = ["numpy", 'triton==3.6.0; platform_system == "Linux"']
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements)
        monkeypatch.setitem(sys.modules, "triton", triton and SimpleNamespace(__version__=triton))
        folder = tmp_path / "include"
        folder.mkdir(exist_ok=True)
        for path, there in ((tmp_path / "gcc", gcc), (folder / "Python.h", header)):
            path.unlink(missing_ok=True)
            if there:
                path.touch(mode=0o755)
        monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(folder))
        monkeypatch.setenv("PATH", str(tmp_path))
        for variable in ("CC", "CXX"):
            monkeypatch.delenv(variable, raising=False)

    install()
    return install


LACKING = {
    "a new GPU": ({"capability": (6, 1)}, "capability is 6.1"),
    "Triton": ({"triton": None}, "pip install 'triton==3.6.0'"),
    "Triton for this torch": ({"triton": "3.5.1"}, "triton 3.5.1 is not for torch"),
    "a C compiler": ({"gcc": False}, "install gcc"),
    "Python.h": ({"header": False}, "include/Python.h is not there: install python3-dev"),
}


@pytest.mark.parametrize("lacking, says", LACKING.values(), ids=LACKING)
def test_a_gpu_that_cannot_compile_is_told_what_to_install(compiling, capsys, lacking, says):
    assert cannot_compile(GPU) is None and find_compile("auto", GPU) and find_compile(True, GPU)
    compiling(**lacking)
    assert capsys.readouterr().err == ""
    assert find_compile(False, GPU) is False
    assert capsys.readouterr().err == ""
    assert find_compile("auto", GPU) is False
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the model is not compiled") and says in line
    with pytest.raises(UserError, match="--compile=True can't work") as error:
        find_compile(True, GPU)
    assert says in str(error.value) and "--compile=False" in str(error.value)


def test_a_torch_that_says_nothing_of_triton_works_with_any(compiling, monkeypatch):
    compiling(triton="9.9")
    monkeypatch.setattr(
        importlib.metadata, "requires", lambda name: importlib.metadata.distribution("no-torch")
    )
    assert cannot_compile(GPU) is None
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: None)
    assert cannot_compile(GPU) is None


def test_a_cpu_compiles_with_cxx_or_gxx(compiling, monkeypatch, tmp_path, capsys):
    assert find_compile("auto", CPU) is False
    for compiler in ("", "g++", "clang++ -v"):
        monkeypatch.setenv("CXX", compiler)
        assert "install g++" in cannot_compile(CPU)
    (tmp_path / "clang++").touch(mode=0o755)
    assert find_compile(True, CPU)
    monkeypatch.delenv("CXX")
    assert "install g++" in cannot_compile(CPU)  # torch looks for no other name
    assert capsys.readouterr().err == ""


def test_a_compiler_that_the_environment_names_is_the_only_one_for_triton(compiling, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "icc")
    assert "install gcc" in cannot_compile(GPU)
    (tmp_path / "icc").touch(mode=0o755)
    assert cannot_compile(GPU) is None


@pytest.mark.parametrize("features, fastest", [({"avx512_bf16": True}, "bfloat16"), ({}, "float32")])
def test_a_cpu_computes_in_bfloat16_where_it_has_it(monkeypatch, features, fastest):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert find_dtype("auto", CPU) == getattr(torch, fastest)
    for name in ("float32", "bfloat16", "float16"):
        assert find_dtype(name, CPU) == getattr(torch, name)
    assert find_dtype("auto", torch.device("mps")) == torch.float32


def test_peak_is_known_by_the_whole_name_alone():
    assert peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16) == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", torch.float16) == 312e12
    assert peak_flops("NVIDIA L4", torch.bfloat16) == 121e12
    for other in ("NVIDIA L40", "NVIDIA RTX A4000", "NVIDIA H100 NVL", "NVIDIA A10M", "Some GPU", ""):
        assert peak_flops(other, torch.bfloat16) is None
    assert all(peak_flops(name, torch.float32) is None for name in PEAK_TFLOPS)
