"""
The loss of next-token prediction, without holding the logits of all tokens at once.

For 64 x 1024 tokens and GPT-2's vocabulary the logits are 3.3 billion numbers. They are needed only briefly:
the loss is one number, and the gradient reaches the model as one vector of C channels per token. So the
tokens are split into chunks, and the gradient of a chunk is computed together with its logits (as in Liger
Kernel, Hsu et al. 2024).

Shapes: N tokens, C channels, V rows of the head, n tokens of a chunk.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from kqv.settings import setting
from kqv.training.float8 import Float8Head, Head, gradient_in_float8

LOGITS_AT_ONCE = 2**28  # not compiled, a logit in bfloat16 takes 10 bytes
LOGITS_AT_ONCE_COMPILED = 2**30  # it takes 4, and fewer chunks write the head's gradient less often
ROWS = 128  # a chunk has a multiple of so many tokens: whole tiles for the matrix units of a GPU


@dataclass(frozen=True)
class LossSettings:
    """Loss"""

    label_smoothing: float = setting(
        0.0, "share of each target that goes to all ids alike, in training alone", at_least=0.0, below=1.0
    )
    dtype_head: Literal["auto", "float8"] = setting(
        "auto", "precision of the head's products; float8: in 8 bits, on GPUs from Ada and Hopper on"
    )


def next_token_loss(x, head, targets, vocab_size=None, label_smoothing=0.0, float8=False, new_rows=None):
    """
    x (N, C), head (V, C), targets (N,) ids, -1 where a token does not count -> the mean cross-entropy of the
    logits x @ head.T, in nats. It is model.py's function of the same name with less memory.

    With `label_smoothing` (Szegedy et al. 2016) the right answer is not the id alone: so large a share goes
    to all ids alike. Where no gradient is computed, as in an evaluation, it does not count, and no product is
    in `float8`.

    A frozen head has no gradient. If its last rows learn, `new_rows` (n, C) is the parameter that has them,
    in the same memory (kqv/formats/lora.py): the gradient is of these alone.
    """
    compiled, with_gradient = torch.compiler.is_compiling(), torch.is_grad_enabled()
    float8 = float8 and with_gradient
    chunks, rows = split(len(x), len(head), compiled)
    smoothing, ids = label_smoothing if with_gradient else 0.0, vocab_size or head.size(0)
    plain = chunks == 1 and not float8 and new_rows is None
    if plain and smoothing:  # it would be infinite with the bias
        return F.cross_entropy(
            F.linear(x, head)[:, :ids], targets, ignore_index=-1, label_smoothing=smoothing
        )
    if plain:
        return F.cross_entropy(F.linear(x, head, without_padding(head, ids)), targets, ignore_index=-1)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    count = (targets >= 0).sum()
    if float8:
        rows = -(-rows // 16) * 16
    if missing := chunks * rows - len(x):  # so that all chunks have one shape, and are compiled once
        x, targets = F.pad(x, (0, 0, 0, missing)), F.pad(targets, (0, missing), value=-1)
    learnt = head if new_rows is None else new_rows
    frozen = len(head) - len(learnt) if learnt.requires_grad else len(head)
    arguments = head.detach().to(x.dtype), targets, rows, ids, smoothing, with_gradient, float8, frozen
    work = loss_in_compiled_chunks if compiled else loss_in_chunks
    if with_gradient:
        return ChunkedCrossEntropy.apply(x, learnt, work, *arguments) / count
    return work(x, *arguments)[0] / count


def split(N, V, compiled):
    """(how many chunks, tokens of each). Together they hold N tokens, or more: the rest is padding."""
    most = LOGITS_AT_ONCE_COMPILED if compiled else LOGITS_AT_ONCE
    rows = -(-N // -(-N * V // most))
    if rows < N:
        rows = -(-rows // ROWS) * ROWS
    return -(-N // rows), rows


def without_padding(head, ids):
    """
    The bias (V,) of logits from which a softmax gives 0 to the rows that pad `head`, or None where none does.
    (All logits are computed: their number is a multiple of 64, for which matrix units are faster.)
    """
    if ids == head.size(0):
        return None
    bias = head.new_zeros(head.size(0))
    bias[ids:] = -torch.inf
    return bias


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    The summed cross-entropy, whose gradient is computed in its forward. Until backward it is the gradient of
    the sum over all tokens, not of the mean, so that float16 does not round it to zero.

    `learnt` are the rows of the head that learn. Their gradient is summed in float32.
    """

    @staticmethod
    def forward(ctx, x, learnt, work, *arguments):
        loss, *gradients = work(x, *arguments)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_learnt = ctx.saved_tensors
        grad_learnt = grad_learnt * grad_loss if ctx.needs_input_grad[1] else None
        return grad_x * grad_loss, grad_learnt, *[None] * 9


def loss_in_chunks(
    x, weight, targets, rows, ids, smoothing, with_gradient, float8, frozen, loss_of_chunk=None
):
    """
    The summed loss, and its gradients of x (N, C) and in float32 of the weight (V, C) without its first
    `frozen` rows, both empty where no gradient is wanted. `rows` are a chunk's tokens, `ids` the rows of
    `weight` that are no padding.
    """
    loss_of_chunk = loss_of_chunk or cross_entropy
    head = (Float8Head if float8 else Head)(weight)
    loss, grad_x, grad_weight = room_for_loss(x, weight[frozen:], with_gradient)
    room = None if float8 else x.new_empty(rows, weight.size(0))  # for the logits of a chunk
    for start in range(0, len(x), rows):
        part, answers = x[start : start + rows], targets[start : start + rows]  # (n, C), (n,)
        logits = head.logits(part, room)  # (n, V)
        loss_of_part, gradient, low = loss_of_chunk(logits, answers, ids, smoothing, with_gradient, float8)
        loss += loss_of_part
        if with_gradient:
            head.grad_x(low if float8 else gradient, grad_x[start : start + rows])  # (n, V) -> (n, C)
            if len(grad_weight):
                add_product(grad_weight, gradient[:, frozen:].T, part)  # (V, n) @ (n, C) -> (V, C)
        del logits, gradient, low  # before the next ones are made
    return loss, grad_x, grad_weight


def room_for_loss(x, weight, with_gradient):
    """Tensors for what loss_in_chunks returns; the sums are 0."""
    x, weight = (x, weight) if with_gradient else (x[:0], weight[:0])
    sums = x.new_zeros((), dtype=torch.float32), torch.zeros_like(weight, dtype=torch.float32)
    return sums[0], torch.empty_like(x), sums[1]


# An operator into which the compiler does not look: it would unroll the loop, and hold several chunks in
# memory. So it is compiled by itself, and what is before and after it as one graph.
@torch.library.custom_op("kqv::loss_in_compiled_chunks", mutates_args=())
def loss_in_compiled_chunks(
    x: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    rows: int,
    ids: int,
    smoothing: float,
    with_gradient: bool,
    float8: bool,
    frozen: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    arguments = x, weight, targets, rows, ids, smoothing, with_gradient, float8, frozen
    return loss_in_chunks(*arguments, loss_of_chunk=compiled_cross_entropy())


@loss_in_compiled_chunks.register_fake
def _(x, weight, targets, rows, ids, smoothing, with_gradient, float8, frozen):
    return room_for_loss(x, weight[frozen:], with_gradient)


def add_product(total, a, b):
    """Add a @ b to a total in float32. On a GPU the product is not rounded to the type of a and b before."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def compiled_cross_entropy():
    return torch.compile(cross_entropy, dynamic=False)


def cross_entropy(logits, targets, ids, smoothing, with_gradient, float8=False):
    """
    The summed loss of logits (n, V), whose columns from `ids` on are padding, its gradient (n, V), and the
    same in float8; None where it is not wanted. The logits may be overwritten. `smoothing` is the share of a
    target that goes to all ids.
    """
    counts = (targets >= 0)[:, None]  # (n, 1)
    targets = targets.clamp(min=0)[:, None]  # (n, 1)
    logits[:, ids:] = -torch.inf
    scores = logits.float()  # (n, V)
    most = scores.amax(dim=-1, keepdim=True)  # (n, 1)
    normaliser = most + (scores - most).exp_().sum(dim=-1, keepdim=True).log()  # logsumexp, one loop compiled
    expected = (1 - smoothing) * scores.gather(1, targets)
    if smoothing:
        expected = expected + smoothing * scores[:, :ids].mean(dim=-1, keepdim=True)
    loss = ((normaliser - expected) * counts).sum()
    if not with_gradient:
        return loss, None, None
    is_target = torch.arange(logits.size(1), device=logits.device) == targets  # (n, V)
    # softmax(logits), less what is expected; in place, since this is what is large
    grad_scores = scores.sub_(normaliser).exp_().add_(is_target, alpha=smoothing - 1)
    if smoothing:
        grad_scores[:, :ids] -= smoothing / ids
    gradient = grad_scores.mul_(counts)
    return loss, gradient.to(logits.dtype), gradient_in_float8(gradient) if float8 else None
