"""
Triton kernels without a GPU: their numbers by Triton's interpreter, and the machine code for an H100.

    from triton_tools import compiled_for_h100, interpreting  # skips the test file where triton is missing

    def test_numbers():
        with interpreting(module):  # kernels of these modules run on CPU tensors, in Python
            module.function(cpu_tensor)

    def test_code():
        code = compiled_for_h100(module.kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 128}, num_warps=8)
        assert code.spills == 0 and code.registers <= 255
"""

import inspect
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

triton = pytest.importorskip("triton", reason="triton is missing")


def dot_of_bfloat16(dot):
    """The interpreter's product `dot`, which would multiply the bits of bfloat16, as of integers."""
    from triton.runtime.interpreter import TensorHandle

    def as_float32(matrix):
        if matrix.dtype.scalar != triton.language.bfloat16:
            return matrix
        return TensorHandle((matrix.data.astype("uint32") << 16).view("float32"), triton.language.float32)

    return lambda self, a, b, *others: dot(self, as_float32(a), as_float32(b), *others)


@contextmanager
def interpreting(*modules):
    """
    Within this context, kernels that `modules` have as global names run by Triton's interpreter, and so do
    functions of Triton's own language that are written in it (tl.sum, tl.sigmoid, ...). `@triton.jit` decides
    at import whether a kernel is interpreted, so the names are replaced here: call module.kernel.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    language = {module for name, module in sys.modules.items() if name.startswith("triton.language")}
    places = [*{*language, *modules}, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base]
    before = [(place, dict(vars(place))) for place in places]  # the interpreter leaves much changed
    interpreted = {
        id(value): InterpretedFunction(value.fn)
        for _, names in before
        for value in names.values()
        if isinstance(value, triton.JITFunction)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(InterpretedFunction, "rewritten_fn", {})
        patch.setattr(InterpreterBuilder, "create_dot", dot_of_bfloat16(InterpreterBuilder.create_dot))
        for place, names in before:
            for name, value in names.items():
                if id(value) in interpreted:
                    setattr(place, name, interpreted[id(value)])
        try:
            yield
        finally:
            for place, names in before:
                for name in vars(place).keys() - names.keys():
                    if not inspect.ismodule(vars(place)[name]):
                        delattr(place, name)
                for name, value in names.items():
                    if vars(place)[name] is not value:
                        setattr(place, name, value)


@dataclass(frozen=True)
class H100Code:
    """A kernel's machine code: `registers` of a thread, `spills` of a thread and `shared` memory in bytes."""

    registers: int
    spills: int
    shared: int
    ptx: str


def compiled_for_h100(kernel, signature, constants, **options):
    """
    The H100Code of a `@triton.jit` function. `signature` has its arguments but the constexpr ones, by name:
    "*bf16" a pointer, "i32", "fp32". `constants` are the constexpr ones. As at a launch, pointers are taken
    to be divisible by 16; so are numbers whose type ends in ":16", such as "i32:16". `options` are the
    compiler's: num_warps, num_stages.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {name: signature.get(name, "constexpr").removesuffix(":16") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature.get(name, "").startswith("*") or signature.get(name, "").endswith(":16")
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What does not fit into registers is on the stack; a kernel puts nothing else there.
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return H100Code(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])
