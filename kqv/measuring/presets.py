"""The shapes of model that are measured and planned."""

from dataclasses import dataclass, replace

from kqv.errors import UsageError
from model import GPTConfig


@dataclass(frozen=True)
class Preset:
    """A shape, and the micro-batches that it is measured with."""

    shape: GPTConfig
    batch_sizes: tuple[int, ...]


MODERN = {"bias": False, "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu"}

PRESETS = {
    "tiny": Preset(GPTConfig(64, 65, 4, 4, 128, bias=False), (12,)),  # nanoGPT's recipe for a CPU
    "baby": Preset(GPTConfig(256, 65, 6, 6, 384, bias=False), (64,)),  # its recipe for tiny Shakespeare
    "124M": Preset(GPTConfig(1024, 50304, 12, 12, 768, bias=False), (16, 32, 64)),
    "350M": Preset(GPTConfig(1024, 50304, 24, 16, 1024, bias=False), (8, 16, 32)),
    "774M": Preset(GPTConfig(1024, 50304, 36, 20, 1280, bias=False), (4, 8, 16)),
    "1.5B": Preset(GPTConfig(1024, 50304, 48, 25, 1600, bias=False), (2, 4, 8)),
    "smollm2-135M": Preset(
        GPTConfig(2048, 49152, 30, 9, 576, n_kv_head=3, n_inner=1536, **MODERN), (4, 8, 16)
    ),
    "qwen3-0.6B": Preset(
        GPTConfig(
            2048, 151936, 28, 16, 1024, n_kv_head=8, head_size=128, n_inner=3072, qk_norm=True, **MODERN
        ),
        (1, 2, 4),
    ),
}


def chosen_presets(names, batch_sizes, device):
    """
    {name: Preset} of `names` ("tiny,baby", or "auto": those for the device), with the `batch_sizes` ("1,8",
    or "auto": each preset's own). Raises UsageError.
    """
    if names == "auto":
        names = "tiny" if device.type == "cpu" else "baby,124M"
    chosen = {}
    for name in names.split(","):
        if name not in PRESETS:
            raise UsageError(f"presets={names}: {name!r} is none of {', '.join(PRESETS)}")
        chosen[name] = PRESETS[name]
        if batch_sizes != "auto":
            chosen[name] = replace(PRESETS[name], batch_sizes=tuple(parse_batch_sizes(batch_sizes)))
    return chosen


def parse_batch_sizes(batch_sizes):
    """ "1,64" -> [1, 64]. Raises UsageError."""
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError as error:
        raise UsageError(f"{error} (batch_sizes={batch_sizes})") from None
    if min(sizes) < 1:
        raise UsageError(f"batch_sizes={batch_sizes}, but each must be at least 1")
    return sizes
