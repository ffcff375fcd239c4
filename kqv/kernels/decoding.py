"""
One decoding step as few Triton kernels: five a layer, one before and one after them. torch.compile makes about
twelve of a layer, and at batch 1 a launch costs more than most of them compute.

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

from model import angles_of

MOST_TEXTS = 8  # of one step; the products' time grows with each text
MOST_CHANNELS = 32768  # into a product: a program holds whole rows of a weight
MOST_HEAD_SIZE = 256
DTYPES = torch.float32, torch.bfloat16, torch.float16
ROWS, HEAD_ROWS = 4, 8  # of a weight, that a program reads: 192 programs at 768 channels, for 132 processors
BLOCK = 64  # slots that a program of attention reads at once
PROGRAMS = 132  # of attention, at least, where there are slots for so many
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
    config, dtype = gpt.config, gpt.lm_head.weight.dtype
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 and float16, not in {str(dtype)[6:]}"
    widest = max(config.n_embd, config.inner_channels, config.n_head * config.head_channels)
    if widest > MOST_CHANNELS:
        return f"the kernels take {MOST_CHANNELS} channels at most, but the model has {widest}"
    if config.head_channels > MOST_HEAD_SIZE:
        return f"the kernels take heads of {MOST_HEAD_SIZE} channels at most, not {config.head_channels}"
    return None


def power_of_two(number):
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def splits_of(span, rows_of_heads):
    """
    How attention over `span` slots is split, for B nh heads -> (how many splits, slots of each): as many as
    fill the GPU.
    """
    splits = min(MOST_SPLITS, power_of_two(-(-PROGRAMS // rows_of_heads)), power_of_two(-(-span // BLOCK)))
    blocks = -(-span // (BLOCK * splits))
    return splits, blocks * BLOCK


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
        self.norm = {"EPS": config.norm_eps, "RMS": config.norm == "rmsnorm"}
        self.places, self.cos, self.sin, self.scale = None, None, None, 1.0
        order = torch.arange(config.block_size, device=device)
        if config.positions == "learned":
            self.places = gpt.transformer.wpe.weight
        elif config.positions == "rotary":
            angles = angles_of(order, config.head_channels, config)  # (block_size, hs / 2)
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
        B, C, V = len(tokens), self.config.n_embd, self.config.vocab_size
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
            self.attend(qkv, block.attn, layer, cache, x)
            mlp = block.mlp
            h = self.norm_linear(x, block.ln_2, mlp.c_fc, mlp.activation, getattr(mlp, "c_gate", None))
            self.linear(self.kernels.linear_kernel, (h,), mlp.c_proj, x, K=h.size(1))
        return self.norm_linear(x, transformer.ln_f, self.gpt.lm_head, rows=HEAD_ROWS)[:, :V]

    def empty(self, *shape):
        return torch.empty(shape, dtype=torch.float32, device=self.gpt.lm_head.weight.device)

    def norm_linear(self, x, norm, linear, activation="none", gate=None, rows=ROWS):
        """x (B, K) -> activation(linear(norm(x))) (B, N); with a `gate`, SwiGLU."""
        N, K = linear.weight.shape
        y, how = self.empty(len(x), N), tiling(K, rows)
        weights = norm.weight, getattr(norm, "bias", None), linear.weight, linear.bias
        weights += (gate.weight, gate.bias) if gate else (None, None)
        self.kernels.norm_linear_kernel[(-(-N // how["ROWS"]),)](
            x, *weights, y, len(x), N, K, ACTIVATION=activation, **self.norm, **how
        )
        return y

    def attend(self, qkv, attention, layer, cache, x):
        """qkv (B, (nh + 2 nkv) hs): its keys and values go to the cache `layer`; attention is added to x."""
        B, NH, HS = len(qkv), self.config.n_head, self.config.head_channels
        splits, split_slots = splits_of(cache.span, B * NH)
        sums, peaks, totals = self.empty(B, splits, NH, HS), self.empty(B, splits, NH), self.empty(B, splits, NH)
        q_norm, k_norm = attention.q_norm, attention.k_norm
        norms = (getattr(norm, name, None) for norm in (q_norm, k_norm) for name in ("weight", "bias"))
        HS_P = power_of_two(HS)
        self.kernels.attend_kernel[(splits, NH, B)](
            qkv, cache.length, layer.k, layer.v, *norms, self.cos, self.sin, sums, peaks, totals,
            layer.k.size(1), split_slots, **self.norm, NH=NH, NKV=self.config.kv_heads, HS=HS, HS_P=HS_P,
            BLOCK=min(BLOCK, 8192 // HS_P),
        )
        parts = sums, peaks, totals
        self.linear(self.kernels.combine_linear_kernel, parts, attention.c_proj, x, NH=NH, HS=HS, SPLITS=splits)

    def linear(self, kernel, inputs, linear, x, **sizes):
        """Add linear(what the kernel makes of `inputs`) to x (B, N)."""
        N, K = linear.weight.shape
        how = tiling(K, ROWS)
        kernel[(-(-N // how["ROWS"]),)](*inputs, linear.weight, linear.bias, x, len(x), N=N, **sizes, **how)


def tiling(K, rows):
    """For a weight (N, K): how many rows a program reads, and its warps: 32 numbers a thread where K allows."""
    K_P = power_of_two(K)
    rows = max(1, min(rows, 16384 // K_P))
    return {"ROWS": rows, "K_P": K_P, "num_warps": min(16, max(4, rows * K_P // 1024))}
