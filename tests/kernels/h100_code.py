"""
What torch's compiler would run on an H100, on a machine without one: how many kernels a function becomes, and
how many bytes they read and write. The device is a description, and nothing runs.

    def code():                                         # a global function of the test file
        return h100_code(function, [meta_tensor, ...])  # where `function` may call torch.autograd.grad
    found = in_own_process(code)                        # .launches, .gigabytes, .calls, .call_gigabytes

What attention and cuBLAS do is not known here. This uses torch's private parts, so it is for tests alone.
"""

import concurrent.futures
import multiprocessing
import re
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)


@dataclass(frozen=True)
class Report:
    """
    The kernels that the compiler writes: `launches`, and `gigabytes` that they read and write; what it calls
    by name, such as products: `calls` and `call_gigabytes`; and the `code`.
    """

    launches: int
    gigabytes: float
    calls: list
    call_gigabytes: float
    code: str


class Found(Exception):
    """The Report is known: stop compiling."""


def in_own_process(function):
    """function() in a new process, which may believe in an H100: what torch finds out there, it keeps."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function).result()


def h100_code(function, arguments, **options):
    """
    The Report of function(*arguments) for tensors `arguments`, of which the shapes and dtypes count.
    `options` are the compiler's.
    """
    from torch._inductor.decomposition import select_decomp_table

    # The gradients of fake tensors are known on a CPU alone, so the graph is made there, and moved.
    with FakeTensorMode():
        inputs = [torch.empty(t.shape, dtype=t.dtype, requires_grad=t.is_floating_point()) for t in arguments]
        graph = make_fx(function, select_decomp_table(), tracing_mode="real", _allow_non_fake_inputs=True)(
            *inputs
        )
    pretend()
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        inputs = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in arguments]
    FakeTensorProp(graph, fake).propagate_dont_convert_inputs(*inputs)
    return lowered(graph, inputs, options)


def lowered(graph, inputs, options):
    """The Report of a graph of fake tensors on an H100."""
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import ExternKernelSchedulerNode

    found = []

    def stop(lowering):
        code = lowering.codegen()[0]
        code = getattr(code, "value", code)
        body, own, others = code.split("def call")[1], 0, 0
        for node in lowering.scheduler.nodes:
            if isinstance(node, ExternKernelSchedulerNode):
                others += node.get_read_write_buffers_sizes()
            else:
                own += node.get_read_write_buffers_sizes()
        calls = re.findall(r"extern_kernels\.\w+|torch\.ops\.[\w.]+\(|aten\.[\w.]+\(", body)
        found.append(Report(body.count(".run("), own / 1e9, calls, others / 1e9, code))
        raise Found

    GraphLowering._compile_to_module = GraphLowering.compile_to_module = stop
    options = {"fx_graph_cache": False, "force_disable_caches": True, "compile_threads": 1, **options}
    with config.patch(options):
        try:
            compile_fx.compile_fx_inner(graph, inputs)
        except Exception:
            if not found:
                raise
    return found[0]


def pretend():
    """Let this process believe, for good, that there is an H100."""
    import torch._dynamo.device_interface as device_interface
    import torch._inductor.scheduler as scheduler
    import torch.utils._triton as triton_utils
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    torch._C._ensureCUDADeviceGuardSet()
    answers = {
        "get_device_properties": lambda *a, **k: H100,
        "get_device_capability": lambda *a, **k: (9, 0),
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_initialized": lambda: False,
        "_lazy_init": lambda: None,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_name": lambda *a: H100.name,
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *a: None,
        "synchronize": lambda *a: None,
        "manual_seed_all": lambda *a: None,
        "_exchange_device": lambda *a: 0,
        "_maybe_exchange_device": lambda *a: 0,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    device_interface.caching_worker_device_properties["cuda"] = [H100]
    device_interface.caching_worker_current_devices["cuda"] = 0
    for name in ("get_device_properties", "current_device", "device_count", "is_bf16_supported"):
        setattr(device_interface.CudaInterface, name, staticmethod(answers[name]))
    scheduler.has_triton = triton_utils.has_triton = lambda *a: True
    of_triton = {
        "get_current_target": lambda: GPUTarget("cuda", 90, 32),
        "get_current_device": lambda: 0,
        "get_active_torch_device": lambda: torch.device("cuda", 0),
        "get_device_interface": lambda: torch.cuda,
        "is_active": lambda: True,
    }
    driver.set_active(SimpleNamespace(**of_triton))
