"""The one form of every tensor that is loaded, whatever file it comes from."""

import torch

# What a file's tensors may be of. All other types are of complex, quantised or packed numbers.
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def dense(tensor):
    """
    The same numbers as a plain tensor: strided, contiguous, on the CPU, in memory of its own. It is a copy
    only where `tensor` is not so already. Since every number has its own place in memory, a copy is never
    larger than the memory that `tensor` is a view of.

    Raises ValueError for anything else than a tensor, for one that has no such form (sparse, meta, complex,
    quantised, nested, of a subclass), and for one whose numbers share memory, as after `expand`.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise ValueError(f"it holds an object of the type {type(tensor).__name__} in the place of a tensor")
    shape = "x".join(map(str, tensor.shape)) if not tensor.is_nested else "nested"
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and tensor.dtype in DTYPES
    if not plain or tensor.is_nested or tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
        raise ValueError(
            f"it holds a tensor ({shape}, {tensor.dtype}, {tensor.layout}, {tensor.device}) that is not "
            "plain: save a dense one of float32"
        )
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held:
        raise ValueError(
            f"it holds a tensor ({shape}, {tensor.dtype}) whose numbers share {held} bytes of memory, as "
            "after expand: save its clone()"
        )
    plain = tensor.detach().contiguous()  # a copy if it is not
    if held != plain.nbytes:
        plain = plain.clone()
    # Along a dimension of size 1 the stride of a contiguous tensor may be any: here it is the usual one.
    return torch.empty(0, dtype=plain.dtype).set_(plain.untyped_storage(), 0, plain.shape)
