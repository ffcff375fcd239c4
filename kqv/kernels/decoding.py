"""
One decoding step as few Triton kernels: five a layer, one before and one after them. At batch 1 a launch
takes longer than what most of them compute.

    embed                                           token and place -> the residual stream x
    a layer's 1. norm_linear   x -> queries, keys, values
              2. attend        keys and values to the cache; attention over the cache, in splits
              3. combine_linear   the splits' results -> c_proj, added to x
              4. norm_linear   x -> the MLP's inner channels, with their activation
              5. linear        inner channels -> c_proj, added to x
    norm_linear                                     x -> logits

Shapes: B texts, C = n_embd channels, V vocabulary, nh, nkv, hs as in model.py, P splits of the slots.
"""

import importlib.util

import torch

from kqv.kernels.sizes import power_of_two
from model import angles_of

MOST_TEXTS = 8  # of one step; the products' time grows with each text
MOST_CHANNELS = 32768  # into a product: a program holds whole rows of a weight
MOST_HEAD_SIZE = 256
DTYPES = torch.float32, torch.bfloat16, torch.float16
PROCESSORS = 132  # of an H100; each gets a program or two
ROWS = 8  # of a weight, that a program reads at most
BLOCK = 64  # slots that a program of attention reads at once
MOST_SPLITS = 8  # each program of the next product reads the results of all splits


def why_not(gpt, device):
    """Why `gpt` can't decode by these kernels on `device`, in plain words; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if not triton.knobs.runtime.interpret:  # the interpreter runs kernels on a CPU, for tests
        if device.type != "cuda" or torch.version.cuda is None:
            return f"the kernels need an NVIDIA GPU, but the device is {device}"
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"the kernels need compute capability 8.0, but the GPU has {major}.{minor}"
    config, others = gpt.config, {tensor.dtype for tensor in gpt.state_dict().values()}.difference(DTYPES)
    if others:
        return f"the kernels read float32, bfloat16 and float16, not {str(others.pop())[6:]}"
    heads = power_of_two(config.n_head) * power_of_two(config.head_channels)
    widest = max(config.n_embd, config.inner_channels, heads)
    if widest > MOST_CHANNELS:
        return f"the kernels take {MOST_CHANNELS} channels at most, but the model has {widest}"
    if config.head_channels > MOST_HEAD_SIZE:
        return f"the kernels take heads of {MOST_HEAD_SIZE} channels at most, not {config.head_channels}"
    return None


def splits_of(span, heads):
    """
    How attention over `span` slots is split, for B nh = `heads` -> (how many splits, slots of each): a power
    of two, with at most one program for each processor, and at least BLOCK slots for each.
    """
    splits = 1
    while 2 * splits <= min(MOST_SPLITS, PROCESSORS // heads) and splits * BLOCK < span:
        splits *= 2
    return splits, -(-span // (BLOCK * splits)) * BLOCK


class KernelDecoder:
    """
    Does what `gpt(tokens, cache=cache)` does for one new token of each row, on a GPU by Triton kernels. It
    reads the weights where they are, so it follows a change of their values. Nothing in a step waits for the
    host or depends on values, so a step can be recorded as a CUDA graph.
    """

    def __init__(self, gpt):
        from kqv.kernels import decode_kernels  # needs Triton

        config, device = gpt.config, gpt.lm_head.weight.device
        self.gpt, self.config, self.kernels = gpt, config, decode_kernels
        hs = config.head_channels
        self.heads = {"NH": config.n_head, "HS": hs, "HS_P": power_of_two(hs)}
        self.norm = {"EPS": config.norm_eps, "RMS": config.norm == "rmsnorm"}
        self.places, self.cos, self.sin, self.scale = None, None, None, 1.0
        order = torch.arange(config.block_size, device=device)
        if config.positions == "learned":
            self.places = gpt.transformer.wpe.weight
        elif config.positions == "rotary":
            angles = angles_of(order, hs, config)  # (block_size, hs / 2)
            self.cos, self.sin = angles.cos(), angles.sin()
        else:
            angles = angles_of(order, config.n_embd, config)  # (block_size, C / 2), rounded up
            waves = torch.cat((angles.sin(), angles.cos()), dim=-1)[:, : config.n_embd].contiguous()
            self.places, self.scale = waves, config.n_embd**0.5

    @torch.no_grad()
    def __call__(self, tokens, cache):
        """
        tokens (B, 1), the newest of each row, and a KVCache with room for it -> logits (B, V) in float32. As
        on any GPU, a row without room is not noticed. Raises ValueError for more than MOST_TEXTS rows.
        """
        B, C = len(tokens), self.config.n_embd
        if tokens.shape != (B, 1) or B > MOST_TEXTS:
            raise ValueError(
                f"the kernels read one token of at most {MOST_TEXTS} texts, not {tuple(tokens.shape)}"
            )
        transformer, x = self.gpt.transformer, self.empty(B, C)  # the residual stream
        self.kernels.embed_kernel[(B,)](
            tokens, cache.length, transformer.wte.weight, self.places, x, self.scale, C, power_of_two(C)
        )
        for block, layer in zip(transformer.h, cache.layers, strict=True):
            qkv = self.norm_linear(x, block.ln_1, block.attn.c_attn)  # (B, (nh + 2 nkv) hs)
            self.combine_linear(*self.attend(qkv, block.attn, layer, cache), block.attn.c_proj, x)
            mlp = block.mlp
            h = self.norm_linear(x, block.ln_2, mlp.c_fc, mlp.activation, getattr(mlp, "c_gate", None))
            self.linear(h, mlp.c_proj, x)
        return self.norm_linear(x, transformer.ln_f, self.gpt.lm_head)

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.gpt.lm_head.weight.device)

    def norm_linear(self, x, norm, linear, activation="none", gate=None):
        """x (B, K) -> activation(linear(norm(x))) (B, N); with a `gate`, SwiGLU."""
        N, K = linear.weight.shape
        y, K_P = self.empty(len(x), N), power_of_two(K)
        weights = norm.weight, getattr(norm, "bias", None), linear.weight, linear.bias
        weights += (gate.weight, gate.bias) if gate else (None, None)
        grid, how = tiling(N, K_P)
        self.kernels.norm_linear_kernel[grid](
            x, *weights, y, len(x), N, K, K_P, ACTIVATION=activation, **self.norm, **how
        )
        return y

    def attend(self, qkv, attention, layer, cache):
        """
        qkv (B, (nh + 2 nkv) hs); its keys and values go to the cache `layer` -> attention in splits: results
        (B, P, nh, hs), logsums (B, P, nh).
        """
        B, NH, slots = len(qkv), self.config.n_head, layer.k.size(1)
        splits, split_slots = splits_of(cache.span, B * NH)
        parts = self.empty(B, splits, NH, self.heads["HS"]), self.empty(B, splits, NH)
        norms = attention.q_norm, attention.k_norm
        norms = (getattr(norm, name, None) for norm in norms for name in ("weight", "bias"))
        self.kernels.attend_kernel[(splits, NH, B)](
            *(qkv, cache.length, layer.k, layer.v, *norms, self.cos, self.sin, *parts, slots, split_slots),
            NKV=self.config.kv_heads,
            BLOCK=min(BLOCK, 8192 // self.heads["HS_P"]),
            **self.heads,
            **self.norm,
        )
        return parts

    def combine_linear(self, results, logsums, linear, x):
        """Add linear(what the splits of attention find together) to x (B, C)."""
        heads = self.heads | {"NH_P": power_of_two(self.config.n_head), "SPLITS": results.size(1)}
        grid, how = tiling(len(linear.weight), heads["NH_P"] * heads["HS_P"])
        self.kernels.combine_linear_kernel[grid](
            results, logsums, linear.weight, linear.bias, x, len(x), N=len(linear.weight), **heads, **how
        )

    def linear(self, h, linear, x):
        """Add linear(h) to x (B, N), h (B, K)."""
        N, K = linear.weight.shape
        grid, how = tiling(N, power_of_two(K))
        self.kernels.linear_kernel[grid](
            h, linear.weight, linear.bias, x, len(x), N, K, power_of_two(K), **how
        )


def tiling(N, K_P):
    """
    For a weight (N, K): the grid, and how many rows a program reads: so few that there are four programs for
    each processor, and that 16 warps hold them in registers. A thread has 16 to 64 numbers.
    """
    rows = ROWS
    while rows > 2 and N < 4 * PROCESSORS * rows or rows > 1 and rows * K_P > 8192:
        rows //= 2
    return (-(-N // rows),), {"ROWS": rows, "num_warps": min(16, max(4, rows * K_P // 1024))}
