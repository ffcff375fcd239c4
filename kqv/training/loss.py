"""
The loss of next-token prediction, without holding the logits of all tokens at once.

For 64 x 1024 tokens and GPT-2's vocabulary the logits are 3.3 billion numbers. They are needed only briefly:
the loss is one number, and the gradient reaches the model as one vector of C channels per token. So the
tokens are split into chunks, and the gradient of a chunk is computed together with its logits (as in Liger
Kernel, Hsu et al. 2024).

Shapes: N tokens, C channels, V vocabulary.
"""

import functools
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from kqv.settings import setting

LOGITS_AT_ONCE = 2**28  # 512 MB in bfloat16, and enough tokens to keep a GPU's matrix units busy


@dataclass(frozen=True)
class LossSettings:
    """Loss"""

    label_smoothing: float = setting(
        0.0, "share of each target that goes to all ids alike, in training alone", at_least=0.0, below=1.0
    )


def next_token_loss(x, head, targets, vocab_size=None, label_smoothing=0.0):
    """
    x (N, C), head (V, C), targets (N,) ids, -1 where a token does not count -> the mean cross-entropy of the
    logits x @ head.T, in nats. It is model.py's function of the same name with less memory.

    With `label_smoothing` (Szegedy et al. 2016) the right answer is not the id alone: so large a share goes
    to all ids alike. Where no gradient is computed, as in an evaluation, it does not count.
    """
    chunks, bias = -(-x.size(0) * head.size(0) // LOGITS_AT_ONCE), without_padding(head, vocab_size)
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    if chunks == 1 and smoothing:  # it would be infinite with the bias
        logits = F.linear(x, head)[:, :vocab_size]
        return F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing)
    if chunks == 1:
        return F.cross_entropy(F.linear(x, head, bias), targets, ignore_index=-1)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    smooth = smoothing, vocab_size or head.size(0)
    return in_chunks(x, head, bias, targets, chunks, smooth, torch.compiler.is_compiling())


def without_padding(head, vocab_size):
    """
    The bias (V,) of logits from which a softmax gives 0 to the rows that pad `head`, or None where none does.
    (All logits are computed: their number is a multiple of 64, for which matrix units are faster.)
    """
    if vocab_size is None or vocab_size == head.size(0):
        return None
    bias = head.new_zeros(head.size(0))
    bias[vocab_size:] = -torch.inf
    return bias


# The compiler would unroll the loop, and keep several chunks in memory. This is torch.compiler.disable, but
# imports the compiler at the first call, not at the start of train.py, where that takes a second.
@torch._disable_dynamo
def in_chunks(x, head, bias, targets, chunks, smooth, compiled):
    """ChunkedCrossEntropy; if the model is compiled, so is the work on the logits of one chunk."""
    loss_of_chunk = compiled_cross_entropy() if compiled else cross_entropy
    loss_of_chunk = functools.partial(loss_of_chunk, smooth=smooth)
    return ChunkedCrossEntropy.apply(x, head, bias, targets, chunks, loss_of_chunk, torch.is_grad_enabled())


@functools.cache
def compiled_cross_entropy():
    return torch.compile(cross_entropy)


class ChunkedCrossEntropy(torch.autograd.Function):
    """
    Cross-entropy that computes each chunk's gradient in its forward. Until backward it is the gradient of the
    sum over all tokens, not of the mean, so that float16 does not round it to zero.
    """

    @staticmethod
    def forward(ctx, x, head, bias, targets, chunks, loss_of_chunk, with_gradient):
        weight, bias = head.to(x.dtype), None if bias is None else bias.to(x.dtype)  # (V, C), (V,)
        total = torch.zeros((), device=x.device)
        grad_x, grad_head = [], torch.zeros_like(head, dtype=torch.float32) if with_gradient else None
        for part, ids in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            loss, grad_logits = loss_of_chunk(F.linear(part, weight, bias), ids, with_gradient)  # (n, V)
            total = total + loss
            if with_gradient:
                grad_x.append(grad_logits @ weight)  # (n, V) @ (V, C) -> (n, C)
                grad_head += grad_logits.T @ part  # (V, n) @ (n, C) -> (V, C), summed in float32
        count = (targets >= 0).sum()
        if with_gradient:
            ctx.save_for_backward(torch.cat(grad_x), grad_head, count)
        return total / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_head, count = ctx.saved_tensors
        scale = grad_loss / count
        return grad_x * scale, grad_head * scale, None, None, None, None, None


def cross_entropy(logits, targets, with_gradient, smooth=(0.0, 1)):
    """
    The summed loss of logits (n, V), and its gradient (n, V) or None. The logits may be overwritten.
    `smooth`: the share of a target that goes to all ids, and how many ids there are; the columns after them
    are padding.
    """
    share, ids = smooth
    counts = (targets >= 0)[:, None]  # (n, 1)
    targets = targets.clamp(min=0)[:, None]  # (n, 1)
    scores = logits.float()  # (n, V)
    normaliser = scores.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    expected = (1 - share) * scores.gather(1, targets)
    if share:
        expected = expected + share * scores[:, :ids].mean(dim=-1, keepdim=True)
    loss = ((normaliser - expected) * counts).sum()
    if not with_gradient:
        return loss, None
    is_target = torch.arange(logits.size(1), device=logits.device) == targets  # (n, V)
    # softmax(logits), less what is expected; in place, since this is what is large
    grad_scores = scores.sub_(normaliser).exp_().add_(is_target, alpha=share - 1)
    if share:
        grad_scores[:, :ids] -= share / ids
    return loss, grad_scores.mul_(counts).to(logits.dtype)
