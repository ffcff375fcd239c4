"""
The whole GPT in one file, to read from top to bottom. By default the architecture is GPT-2's (Radford et al.
2019). Fields of `GPTConfig` make it Llama's (Touvron et al. 2023) or Qwen's (Yang et al. 2025).

The input is token ids. The output is, for every position, V numbers (logits): how likely each id is to come
next. In between each token is a vector of C channels, its place in the *residual stream*. Every block reads
the stream and adds to it twice: attention lets tokens look at those before them, the MLP computes on each.

    idx (B, T) -> wte (+ wpe) -> (B, T, C) -> n_layer x Block (B, T, C) -> ln_f -> lm_head -> logits (B, T, V)

Training compares the logits with what did come next (`next_token_loss`). Writing draws from them (`KVCache`).

Shapes: B batch, T tokens, C = n_embd channels, nh heads of queries, nkv heads of keys and values, hs head
size, V vocabulary, S slots of the cache that tokens look at.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_type_hints

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT; by default that of GPT-2 124M, its 50257 ids rounded up to a multiple of 64."""

    block_size: Annotated[int, "the longest context, in tokens"] = 1024
    vocab_size: Annotated[int, "token ids"] = 50304
    n_layer: Annotated[int, "blocks"] = 12
    n_head: Annotated[int, "attention heads in a block"] = 12
    n_embd: Annotated[int, "channels of the residual stream"] = 768
    dropout: Annotated[float, "share of activations dropped in training"] = 0.0
    bias: Annotated[bool, "biases in linear layers and LayerNorms, as in GPT-2"] = True
    qkv_bias: Annotated[bool, "biases of queries, keys and values even without bias, as in Qwen2"] = False
    n_kv_head: Annotated[int, "heads of keys and values, each for several heads of queries; 0: n_head"] = 0
    head_size: Annotated[int, "channels of a head; 0: n_embd / n_head"] = 0
    qk_norm: Annotated[bool, "normalise queries and keys"] = False
    n_inner: Annotated[int, "channels inside the MLP; 0: 4 n_embd"] = 0
    activation: Annotated[Literal["gelu", "swiglu", "relu2"], "what the MLP does in between"] = "gelu"
    norm: Annotated[Literal["layernorm", "rmsnorm"], "how vectors are normalised"] = "layernorm"
    norm_eps: Annotated[float, "what a norm adds to the variance"] = 1e-5
    tied_head: Annotated[bool, "the embedding is the head, too"] = True
    positions: Annotated[Literal["learned", "rotary", "sinusoidal"], "how order is known"] = "learned"
    rope_theta: Annotated[float, "the slowest angle of a position is near position / rope_theta"] = 10000.0
    rope_factor: Annotated[float, "Llama 3's scaling: slow angles are divided by this; 1: none"] = 1.0
    rope_slow: Annotated[float, "slow: at most so many turns in rope_original tokens"] = 1.0
    rope_fast: Annotated[float, "fast, and not scaled: at least so many turns"] = 4.0
    rope_original: Annotated[int, "the longest context before the scaling"] = 8192

    def __post_init__(self):
        for name, kind in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), (False, True) if kind is bool else get_args(kind)
            least, most = (min(1, getattr(type(self), name)), 2**31 - 1) if kind is int else (0, 1e30)
            if not (value in choices if choices else type(value) in (kind, int) and least <= value <= most):
                wanted = f"a {'whole ' * (kind is int)}number from {least} to {most}"
                wanted = f"one of {', '.join(map(str, choices))}" if choices else wanted
                raise ValueError(f"{name} is {value!r}, but it must be {wanted}")
        if not self.head_size and self.n_embd % self.n_head:
            C = self.n_embd - self.n_embd % self.n_head or self.n_head
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}: use n_embd={C}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} is no multiple of n_kv_head={self.n_kv_head}")
        if self.positions == "rotary" and self.head_channels % 2:
            raise ValueError(f"rotary positions need heads of an even size, not {self.head_channels}")
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta is {self.rope_theta}, but it must be above 1")
        if self.rope_factor < 1:
            raise ValueError(f"rope_factor is {self.rope_factor}, but it must be at least 1")
        if self.rope_slow >= self.rope_fast:
            raise ValueError(f"rope_slow={self.rope_slow} is not below rope_fast={self.rope_fast}")

    kv_heads = property(lambda self: self.n_kv_head or self.n_head)  # the values for which 0 stands
    head_channels = property(lambda self: self.head_size or self.n_embd // self.n_head)
    inner_channels = property(lambda self: self.n_inner or 4 * self.n_embd)


class RMSNorm(nn.RMSNorm):
    """LayerNorm without the mean and the bias: x / its root mean square x weight (Zhang & Sennrich 2019)."""

    def forward(self, x):
        # The fused kernel takes no float32 weight where autocast has made x bfloat16.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(size, config):
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.bias)


def angles_of(positions, channels, config):
    """
    positions (..., T) -> (..., T, channels / 2): one angle for each pair of channels. The first pair turns by
    1 radian a token and tells neighbours apart; the last one hardly turns and tells far from near. Llama 3
    divides its slow angles, so that a model of short texts can read longer ones.
    """
    pairs = torch.arange(0, channels, 2, device=positions.device) / channels
    frequency = 1 / config.rope_theta**pairs  # (channels / 2,), radians a token
    if config.rope_factor != 1:
        turns = config.rope_original * frequency / (2 * math.pi)
        fast = ((turns - config.rope_slow) / (config.rope_fast - config.rope_slow)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / config.rope_factor)
    return positions[..., None] * frequency


def rotate(x, cos, sin):
    """
    Rotary positions (Su et al. 2021): x (B, T, heads, hs), cos and sin (B or 1, T, 1, hs / 2) -> as x.

    Channels i and i + hs / 2 are a point in the plane; it is rotated by the angle of its position. Rotate a
    query by a t and a key by a s: both keep their lengths, the angle between them changes by a (t - s), and
    so their dot product depends on how far apart the tokens are, not on where they are.
    """
    a, b = x.float().chunk(2, dim=-1)  # 2 x (B, T, heads, hs / 2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class CausalSelfAttention(nn.Module):
    """
    Every token looks at itself and the tokens before it, and takes from each what it finds useful.

    Each token x computes three vectors, per head:

        Q, its query:  what am I looking for?
        K, its key:    what do I have to be found by?
        V, its value:  what do I hand over when I am found?

    Q and K live in the same space, so their dot product measures how well they match: large where they point
    the same way, near zero where they have nothing to do with each other. A softmax turns one token's scores
    into weights that sum to 1, and the token receives the weighted mean of the values:

        attention(Q, K, V) = softmax(Q K^T / sqrt(hs) + mask) V        (Vaswani et al. 2017, section 3.2.1)

        Q (T, hs) @ K^T (hs, S) -> scores (T, S): row t holds token t's interest in every token s
        softmax over s, then weights (T, S) @ V (S, hs) -> (T, hs)

    Why 1/sqrt(hs)? The dot product of two random vectors of hs entries of variance 1 has variance hs.
    Unscaled, scores grow with the head size, the softmax saturates on one token, and its gradient vanishes.

    Why the mask? Position t is trained to predict token t+1. If it could look at t+1, it would copy the
    answer and learn nothing. So the scores of later tokens are set to -inf, which the softmax turns into
    weights of exactly 0. This makes all T positions of a sequence training examples at once.

    Why heads? One softmax can look at one kind of thing at a time. nh heads of hs channels look at nh things
    for the same cost as one head of C channels.

    Why fewer keys than queries (Ainslie et al. 2023)? To write a token, all K and V that are kept are read:
    S x nkv x hs numbers each. Where nh / nkv heads of queries share one head of K and V, as a group, that is
    so many times less, at little loss: many questions can be answered by one key.

    Why a norm on Q and K (Henry et al. 2020)? A score is the product of their lengths and the cosine between
    them. Normalised over their hs channels, they can't grow in training until the softmax saturates.
    """

    def __init__(self, config):
        super().__init__()
        hs = self.head_size = config.head_channels
        self.n_head, self.heads = config.n_head, (config.n_head, config.kv_heads, config.kv_heads)
        # Q, K and V of all heads in one product.
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * hs, bias=config.bias or config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * hs, config.n_embd, bias=config.bias)  # mixes what heads found
        self.q_norm = make_norm(hs, config) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(hs, config) if config.qk_norm else nn.Identity()
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, rotation=None, positions=None, cache=None):
        """
        x (B, T, C) -> (B, T, C). `mask` (B, 1, T, S): may token t look at token s? None: the causal triangle,
        S = T. `rotation` is what `rotate` takes. A LayerCache keeps keys and values at `positions` (B, T).
        """
        # (B, T, C) -> (B, T, (nh + 2 nkv) hs) -> (B, T, nh, hs) and 2 x (B, T, nkv, hs)
        q, k, v = self.c_attn(x).unflatten(2, (-1, self.head_size)).split(self.heads, dim=2)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.update(k, v, positions, x.size(1) if mask is None else mask.size(-1))  # S of them
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, nh, T, hs), 2 x (B, nkv, S, hs)
        y = self.attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, T, nh hs): heads side by side
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)

    def attend(self, q, k, v, mask):
        """The formula above: q (B, nh, T, hs), k and v (B, nkv, S, hs), the `mask` of `forward` -> as q."""
        shape, group = q.shape, q.size(1) // k.size(1)
        if q.size(2) == 1 and not torch.compiler.is_compiling():  # faster: a group as rows of one product
            q = q.reshape(len(q), k.size(1), group, -1)  # (B, nkv, nh / nkv, hs)
        elif mask is not None and group > 1:  # no fused kernel of a GPU takes both a mask and groups
            k, v = (part.repeat_interleave(group, dim=1) for part in (k, v))  # 2 x (B, nh, S, hs)
        # cuDNN's kernel errs with some masks (pytorch issue 196678), and is slow to prepare for a new length.
        torch.backends.cuda.enable_cudnn_sdp(self.training and mask is None)
        # As one kernel, which never writes the (T, S) scores to memory (Dao et al. 2022).
        how = {"dropout_p": self.resid_dropout.p * self.training, "enable_gqa": q.size(1) != k.size(1)}
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, **how).reshape(shape)


class MLP(nn.Module):
    """
    Each token by itself: up to n_inner channels, a non-linearity, and back. Most of a block's weights. Of a
    SwiGLU (Shazeer 2020), a second matrix is the gate: it decides how much each inner channel counts.
    """

    def __init__(self, config):
        super().__init__()
        inner = config.inner_channels
        self.c_fc = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.activation = config.activation
        if self.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        h = self.c_fc(x)  # (B, T, C) -> (B, T, inner)
        if self.activation == "swiglu":
            h = F.silu(self.c_gate(x)) * h
        elif self.activation == "relu2":
            h = F.relu(h).square()  # So et al. 2021
        else:
            h = F.gelu(h, approximate="tanh")  # Hendrycks & Gimpel 2016, in GPT-2's form
        return self.dropout(self.c_proj(h))  # (B, T, inner) -> (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP: each reads the residual stream, normalised, and adds its result to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config.n_embd, config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config.n_embd, config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, rotation=None, positions=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, rotation, positions, cache)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class GPT(nn.Module):
    """The whole model. Parameter names are nanoGPT's and GPT-2's own, so that their weights load."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        parts = {"wte": nn.Embedding(config.vocab_size, config.n_embd)}  # token id -> vector
        if config.positions == "learned":
            parts["wpe"] = nn.Embedding(config.block_size, config.n_embd)  # position -> vector
        blocks = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        parts |= {"drop": nn.Dropout(config.dropout), "h": blocks, "ln_f": make_norm(config.n_embd, config)}
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_head()
        self.apply(self.init_weights)
        # Each block adds to the stream twice; smaller additions keep its variance from growing with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def tie_head(self):
        """One matrix reads tokens in and scores them on the way out (weight tying, Press & Wolf 2016)."""
        if self.config.tied_head:
            self.transformer.wte.weight = self.lm_head.weight

    @staticmethod
    def init_weights(module):
        """GPT-2's initialisation: normal with standard deviation 0.02, biases zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, positions=None, cache=None):
        """
        idx (B, T) token ids -> logits (B, T, V): row t scores every id as the one that comes after token t.
        A softmax turns a row into probabilities. The other arguments are those of `hidden`.
        """
        return self.lm_head(self.hidden(idx, positions, cache))  # (B, T, C) -> (B, T, V)

    def hidden(self, idx, positions=None, cache=None):
        """
        idx (B, T) token ids -> the residual stream after the last block, normalised (B, T, C).

        By default each row is one text from its beginning. `positions` (B, T) are for rows of examples
        side by side: each token's place in its own, the only one that it looks at. With a `cache`, each row
        continues the text that is in there. Raises ValueError for more than block_size tokens, and for both.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}: shorten the input")
        if cache is not None:
            if positions is not None:
                raise ValueError("positions and a cache exclude each other: the cache knows the positions")
            positions, mask = cache.place(T)  # (B, T), (B, 1, T, S)
        elif positions is not None:
            mask = self.mask_of_examples(positions)  # (B, 1, T, T)
        else:
            positions, mask = torch.arange(T, device=idx.device)[None], None  # (1, T), the causal triangle
        x, rotation = self.embed(idx, positions)
        layers = cache.layers if cache is not None else [None] * len(self.transformer.h)
        for block, layer_cache in zip(self.transformer.h, layers, strict=True):
            x = block(x, mask, rotation, positions, layer_cache)  # (B, T, C)
        return self.transformer.ln_f(x)  # (B, T, C)

    def embed(self, idx, positions):
        """
        idx (B, T), positions (B or 1, T) -> the first block's input (B, T, C), and the `rotation`, or None.
        Attention alone knows no order: a vector of the place is added, or blocks rotate queries and keys.
        """
        config, x, rotation = self.config, self.transformer.wte(idx), None  # (B, T, C)
        if config.positions == "learned":
            x = x + self.transformer.wpe(positions)
        elif config.positions == "rotary":
            angles = angles_of(positions, config.head_channels, config)[..., None, :]
            rotation = angles.cos(), angles.sin()  # (B or 1, T, 1, hs / 2)
        else:  # Vaswani et al. 2017, sections 3.4 and 3.5
            angles = angles_of(positions, config.n_embd, config)  # (B or 1, T, C / 2), rounded up
            waves = torch.cat((angles.sin(), angles.cos()), dim=-1)[..., : config.n_embd]
            x = x * math.sqrt(config.n_embd) + waves.to(x.dtype)
        return self.transformer.drop(x), rotation

    @staticmethod
    def mask_of_examples(positions):
        """positions (B, T), from 0 in each example of a row -> (B, 1, T, T): may token t look at token s?"""
        order = torch.arange(positions.size(1), device=positions.device)  # (T,)
        begin = (order - positions)[:, None, :, None]  # (B, 1, T, 1): where the example of token t begins
        return (begin <= order) & (order <= order[:, None])  # (B, 1, T, T): s is in it, and not after t

    @classmethod
    def from_weights(cls, config, weights, copy=True):
        """
        A GPT with the given weights {parameter name: tensor}, in evaluation mode: without dropout. Without
        `copy` it shares the memory of weights in float32. Raises ValueError where they don't fit the config.
        """
        blocks = {name.split(".")[2] for name in weights if name.startswith("transformer.h.")}
        if len(blocks) != config.n_layer:
            raise ValueError(f"n_layer is {config.n_layer}, but there are weights of {len(blocks)} blocks")
        try:
            with torch.device("meta"):  # names and shapes only: the weights take the place of these
                model = cls(config)
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())[:200]) from None
        model.tie_head()  # again
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=copy)
        return model.eval()

    def num_parameters(self, without_positions=True):
        """How many numbers the model learns. Tied weights count once; positions don't count, as is usual."""
        left_out = "transformer.wpe.weight" if without_positions else None
        return sum(weight.numel() for name, weight in self.named_parameters() if name != left_out)

    def flops_per_token(self):
        """
        Floating-point operations to train on one token of a full context, forward and backward: 6 for each
        parameter of a product (a multiply and an add, twice that backward), and 12 T for each channel of a
        head (attention; PaLM, Chowdhery et al. 2022, appendix B). The causal mask saves nothing, as is usual.
        """
        channels = self.config.n_layer * self.config.n_head * self.config.head_channels
        looked_up = 0 if self.config.tied_head else self.transformer.wte.weight.numel()
        return 6 * (self.num_parameters() - looked_up) + 12 * channels * self.config.block_size


def next_token_loss(x, head, targets, vocab_size=None):
    """
    x (N, C) of N tokens, head (V, C), the lm_head's weight, and targets (N,), the ids that did come next
    (-1: this token does not count) -> the loss, one number.

    It is the mean cross-entropy in nats: -log of the probability that the model gave to the right id. A model
    that knows nothing gives every id 1/V, a loss of log V. Rows of `head` from `vocab_size` on are no ids.
    """
    logits = F.linear(x, head)[:, :vocab_size]  # (N, C) @ (C, V) -> (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-1)


class NextToken(nn.Module):
    """
    A GPT with its loss, which is what training computes. `loss` has the form of `next_token_loss`; the one in
    kqv/training/loss.py needs less memory. `vocab_size`: how many ids the head's rows stand for; None: all.
    """

    def __init__(self, gpt, loss=next_token_loss, vocab_size=None):
        super().__init__()
        self.gpt, self.loss, self.vocab_size = gpt, loss, vocab_size

    def forward(self, idx, targets, positions=None):
        """
        idx, targets, positions (B, T) -> the mean loss of all tokens whose target is not -1 (nor, where this
        is not compiled, any other negative number, such as the -100 of Hugging Face's data).
        """
        if not torch.compiler.is_compiling():
            targets = targets.clamp(min=-1)
        x = self.gpt.hidden(idx, positions)  # (B, T, C)
        return self.loss(x.flatten(0, 1), self.gpt.lm_head.weight, targets.flatten(), self.vocab_size)


class LayerCache(nn.Module):
    """The keys and values of one layer, in buffers made once. A token's slot is its position."""

    def __init__(self, config, batch_size, slots, device, dtype):
        super().__init__()
        shape = (batch_size, slots, config.kv_heads, config.head_channels)
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype))  # (B, slots, nkv, hs)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype))

    def update(self, k, v, positions, span):
        """Keep k and v (B, T, nkv, hs) at `positions` (B, T) -> the first `span` slots, (B, S, nkv, hs)."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        self.k[rows, positions] = k
        self.v[rows, positions] = v
        return self.k[:, :span], self.v[:, :span]


class KVCache(nn.Module):
    """
    The keys and values of the tokens seen so far, of every layer, with room for `slots` tokens of a text.
    They depend only on the tokens before, so they never change. Kept, a new token costs one token's work, not
    the whole context's. Queries are not kept: only the newest token asks.

    Rows may hold texts of different lengths: `length` (B,) counts the tokens of each. Slots past a row's
    length hold garbage; the mask hides them until they are overwritten. Tokens look at the first `span`
    slots, by default all. A smaller span is faster, and correct as long as the longest row fits in it.
    """

    def __init__(self, config, batch_size, slots=None, device=None, dtype=None):
        super().__init__()
        self.span = slots = min(slots or config.block_size, config.block_size)
        of_layer = config, batch_size, slots, device, dtype
        self.layers = nn.ModuleList(LayerCache(*of_layer) for _ in range(config.n_layer))
        self.register_buffer("length", torch.zeros(batch_size, device=device, dtype=torch.long))

    def place(self, T):
        """
        Add T tokens to each row -> their positions (B, T), and the mask (B, 1, T, S): a token may look at
        every slot up to its own. The mask is None, the causal triangle, where the T tokens fill the span.

        Raises ValueError where a row has no room for them, but on a GPU or compiled, where the check would
        wait for the device: there, the write to the cache has an index out of bounds.
        """
        positions = self.length[:, None] + torch.arange(T, device=self.length.device)  # (B, T)
        if self.length.device.type == "cpu" and not torch.compiler.is_compiling():
            if (longest := int(positions.max()) + 1) > self.span:
                raise ValueError(f"the cache has room for {self.span} tokens of a row, not for {longest}")
        self.length.add_(T)
        if T == self.span:
            return positions, None
        slots = torch.arange(self.span, device=positions.device)  # (S,)
        return positions, slots <= positions[:, None, :, None]  # (B, 1, T, S)
