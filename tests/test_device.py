"""Which precision a device computes in, and its peak."""

import pytest
import torch

from kqv.device import PEAK_TFLOPS, find_dtype, peak_flops

CPU = torch.device("cpu")


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
