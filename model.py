"""
The whole GPT in one file, to read from top to bottom. The architecture is GPT-2's (Radford et al. 2019).

The input is token ids. The output is, for every position, V numbers (logits): how likely each id is to come
next. In between each token is a vector of C channels, its place in the *residual stream*. Every block reads
the stream and adds to it twice: attention lets tokens look at the tokens before them, the MLP computes on
each token by itself.

    idx (B, T) -> wte + wpe -> (B, T, C) -> n_layer x Block (B, T, C) -> ln_f -> lm_head -> logits (B, T, V)

Training compares the logits with the tokens that did come next (`next_token_loss`). Writing draws the next
token from them, again and again, with a `KVCache`.

Shapes: B batch, T tokens, C = n_embd channels, nh heads, hs = C / nh head size, V vocabulary,
S slots of the cache that tokens look at.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated

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

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if type(field.default) is int and (type(value) is not int or not 1 <= value < 2**31):
                raise ValueError(f"{field.name} is {value!r}, but it must be a whole number of at least 1")
        if self.n_embd % self.n_head:
            near = self.n_embd - self.n_embd % self.n_head or self.n_head
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}, but every head gets an "
                f"equal share of the channels: use n_embd={near}, for example"
            )

    @classmethod
    def from_args(cls, args):
        """The shape in a checkpoint's `model_args`; names that are no part of a shape are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in args.items() if name in known})


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
    """

    def __init__(self, config):
        super().__init__()
        # Q, K and V of all heads in one product.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)  # mixes what the heads found
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.head_size = config.n_embd // config.n_head

    def forward(self, x, mask=None, positions=None, cache=None):
        """
        x (B, T, C) -> (B, T, C). `mask` (B, 1, T, S) is True where token t may look at token s; None means
        the causal triangle, S = T. With a LayerCache, keys and values are kept there at `positions` (B, T).
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, 3C) -> 3 x (B, T, C)
        if cache is not None:
            k, v = cache.update(k, v, positions, T if mask is None else mask.size(-1))  # -> 2 x (B, S, C)
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)
        k = k.view(B, -1, self.n_head, self.head_size).transpose(1, 2)  # (B, S, C) -> (B, nh, S, hs)
        v = v.view(B, -1, self.n_head, self.head_size).transpose(1, 2)  # (B, S, C) -> (B, nh, S, hs)
        # The formula above, as one kernel that never writes the (T, S) scores to memory (Dao et al. 2022).
        dropout_p = self.resid_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=mask is None
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, nh, T, hs) -> (B, T, C): the heads side by side
        return self.resid_dropout(self.c_proj(y))  # (B, T, C)


class MLP(nn.Module):
    """Each token by itself: up to 4C channels, a non-linearity, and back. Two thirds of a block's weights."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        # GELU (Hendrycks & Gimpel 2016) in the form that GPT-2 was trained with.
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP: each reads the residual stream, normalised, and adds its result to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, positions=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, positions, cache)  # (B, T, C)
        x = x + self.mlp(self.ln_2(x))  # (B, T, C)
        return x


class GPT(nn.Module):
    """The whole model. Parameter names are nanoGPT's and GPT-2's own, so that their weights load."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),  # token id -> vector
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # position -> vector
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # One matrix both reads tokens in and scores them on the way out (weight tying, Press & Wolf 2016).
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self.init_weights)
        # Each block adds to the stream twice; smaller additions keep its variance from growing with depth.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

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

        By default each row is one text from its beginning. `positions` (B, T) are for rows that hold several
        examples side by side: each token's place in its own example. No token looks at another example. With
        a `cache`, each row continues the text that the cache holds for it.

        Raises ValueError for more than block_size tokens, or for both `positions` and a `cache`.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens, but block_size is {self.config.block_size}: shorten the input")
        mask = None  # the causal triangle
        if cache is not None:
            if positions is not None:
                raise ValueError("positions and a cache exclude each other: the cache knows the positions")
            positions, mask = cache.place(T)  # (B, T), (B, 1, T, S)
        elif positions is not None:
            mask = mask_of_examples(positions)  # (B, 1, T, T)
        else:
            positions = torch.arange(T, device=idx.device)  # (T,)
        # Attention alone knows no order: what a token is and where it stands are added into one vector.
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C) + (B or 1, T, C)
        x = self.transformer.drop(x)
        layers = cache.layers if cache is not None else [None] * len(self.transformer.h)
        for block, layer_cache in zip(self.transformer.h, layers, strict=True):
            x = block(x, mask, positions, layer_cache)  # (B, T, C)
        return self.transformer.ln_f(x)  # (B, T, C)

    @classmethod
    def from_weights(cls, config, weights, copy=True):
        """
        A GPT with the given weights {parameter name: tensor}, in evaluation mode: without dropout. Without
        `copy` it shares the memory of the weights that are float32.

        Raises ValueError where the weights don't fit the config.
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
        model.transformer.wte.weight = model.lm_head.weight  # tied again
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=copy)
        return model.eval()

    def num_parameters(self, without_positions=True):
        """How many numbers the model learns. Tied weights count once; positions don't count, as is usual."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if without_positions else total

    def flops_per_token(self):
        """
        Floating-point operations to train on one token of a full context, forward and backward.

        6 for each parameter (a multiply and an add forward, twice that backward), and for each channel of a
        head 12 T, for the attention scores and their use (PaLM, Chowdhery et al. 2022, appendix B). The
        causal mask's saving is not taken off, as is usual.
        """
        channels = sum(block.attn.n_head * block.attn.head_size for block in self.transformer.h)
        return 6 * self.num_parameters() + 12 * channels * self.config.block_size

    def crop_block_size(self, block_size):
        """Shorten the longest context, for fine-tuning at less. Raises ValueError where it would grow."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={block_size} is not within 1 to {self.config.block_size}, what the model has"
            )
        self.config = replace(self.config, block_size=block_size)
        kept = self.transformer.wpe.weight[:block_size].detach().clone()  # a view is saved with its base
        self.transformer.wpe.weight = nn.Parameter(kept)
        self.transformer.wpe.num_embeddings = block_size

    def grow_vocab_size(self, vocab_size):
        """Add ids after the known ones, which stay as they are; the rows of new ids begin at random."""
        new = torch.empty(vocab_size - self.config.vocab_size, self.config.n_embd)
        nn.init.normal_(new, mean=0.0, std=0.02)
        self.config = replace(self.config, vocab_size=vocab_size)
        self.lm_head.weight = nn.Parameter(torch.cat([self.lm_head.weight.detach(), new]))  # (V, C)
        self.transformer.wte.weight = self.lm_head.weight
        self.lm_head.out_features = self.transformer.wte.num_embeddings = vocab_size

    def parameter_groups(self, weight_decay):
        """For an optimizer: matrices and embeddings decay, biases and LayerNorms (1-D) do not."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]


def mask_of_examples(positions):
    """
    positions (B, T), which begin at 0 with each example of a row -> (B, 1, T, T): True where token t may look
    at token s, which is not later and not before the example's beginning. All heads share it.
    """
    order = torch.arange(positions.size(1), device=positions.device)  # (T,)
    begin = (order - positions)[:, None, :, None]  # (B, 1, T, 1): where the example of token t begins
    return (begin <= order) & (order <= order[:, None])  # (B, 1, T, T)


# Training


def next_token_loss(x, head, targets, vocab_size=None):
    """
    x (N, C) of N tokens, head (V, C), the lm_head's weight, and targets (N,), the ids that did come next
    (-1: this token does not count) -> the loss, one number.

    It is the mean cross-entropy in nats: -log of the probability that the model gave to the right id. A model
    that knows nothing gives every id 1/V, which is a loss of log V. Rows of `head` from `vocab_size`
    on stand for no id: the softmax leaves them out.
    """
    logits = F.linear(x, head)[:, :vocab_size]  # (N, C) @ (C, V) -> (N, V)
    return F.cross_entropy(logits, targets, ignore_index=-1)


class NextToken(nn.Module):
    """
    A GPT with its loss, which is what training computes. `loss` is a function with the arguments and result
    of `next_token_loss`; the one in kqv/training/loss.py needs less memory. `vocab_size` is the tokenizer's
    number of ids, if the embedding has more rows: the last ones are padding.
    """

    def __init__(self, gpt, loss=next_token_loss, vocab_size=None):
        super().__init__()
        self.gpt, self.loss, self.vocab_size = gpt, loss, vocab_size

    def forward(self, idx, targets, positions=None):
        """
        idx, targets and positions (B, T) -> the mean loss of all tokens whose target is not -1. Where this is
        not compiled, other negative targets count as -1 too, such as the -100 of Hugging Face's data.
        """
        if not torch.compiler.is_compiling():
            targets = targets.clamp(min=-1)
        x = self.gpt.hidden(idx, positions)  # (B, T, C)
        return self.loss(x.flatten(0, 1), self.gpt.lm_head.weight, targets.flatten(), self.vocab_size)


# Generation


class LayerCache(nn.Module):
    """The keys and values of one layer, in buffers made once. A token's slot is its position."""

    def __init__(self, config, batch_size, slots, device, dtype):
        super().__init__()
        shape = (batch_size, slots, config.n_embd)
        self.register_buffer("k", torch.zeros(shape, device=device, dtype=dtype))  # (B, slots, C)
        self.register_buffer("v", torch.zeros(shape, device=device, dtype=dtype))

    def update(self, k, v, positions, span):
        """Keep k and v (B, T, C) at `positions` (B, T) -> those of the first `span` slots, (B, S, C)."""
        rows = torch.arange(k.size(0), device=k.device)[:, None]  # (B, 1)
        self.k[rows, positions] = k
        self.v[rows, positions] = v
        return self.k[:, :span], self.v[:, :span]


class KVCache(nn.Module):
    """
    The keys and values of the tokens seen so far, of every layer.

    A token's K and V depend only on the tokens before it, so they never change once computed. Keeping them
    means that a new token costs one token's work, not the whole context's. Queries are not kept: only the
    newest token asks.

    Rows may hold texts of different lengths: `length` (B,) counts the tokens of each. Slots past a row's
    length hold garbage; the mask hides them until they are overwritten. Tokens look at the first `span`
    slots, by default all. A smaller span is faster, and correct as long as the longest row fits in it.
    """

    def __init__(self, config, batch_size, slots=None, device=None, dtype=None):
        """`slots` is the longest text that fits, by default and at most block_size."""
        super().__init__()
        self.span = slots = min(slots or config.block_size, config.block_size)
        self.layers = nn.ModuleList(
            [LayerCache(config, batch_size, slots, device, dtype) for _ in range(config.n_layer)]
        )
        self.register_buffer("length", torch.zeros(batch_size, device=device, dtype=torch.long))

    def place(self, T):
        """
        Add T tokens to each row -> their positions (B, T), and the mask (B, 1, T, S): a token may look at
        every slot up to its own. Where the T tokens fill the span, no tokens are before them, and the mask is
        None: the causal triangle.

        On a CPU and not compiled, raises ValueError where a row has no room for them. Elsewhere that check
        would wait for the device: there, the write to the cache has an index out of bounds.
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
