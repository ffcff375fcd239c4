"""
The loss of next-token prediction, without ever holding the logits of all tokens at once.

For 64 x 1024 tokens and GPT-2's vocabulary the logits are 3.3 billion numbers. They are needed for a moment
only: the loss is one number, and the gradient reaches the model as one vector of C channels per token. So
tokens are taken a chunk at a time, and a chunk's gradient is computed while its logits are there (as in Liger
Kernel, Hsu et al. 2024).

Shapes: N tokens, C channels, V vocabulary.
"""

import functools

import torch
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**28  # 512 MB in bfloat16, and enough tokens to keep a GPU's matrix units busy


def next_token_loss(x, head, targets):
    """
    The mean cross-entropy, in nats, of the logits x @ head.T (N, V).

    x (N, C), head (V, C), targets (N,) ids, -1 where a token does not count.
    """
    chunks = -(-x.size(0) * head.size(0) // LOGITS_AT_ONCE)
    if chunks == 1:
        return F.cross_entropy(F.linear(x, head), targets, ignore_index=-1)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return in_chunks(x, head, targets, chunks, torch.compiler.is_compiling())


@torch.compiler.disable  # which would unroll the chunks, and hold some of them at the same time
def in_chunks(x, weight, targets, chunks, compiled):
    """The loss by ChunkedCrossEntropy, the work on one chunk's logits compiled where the model is."""
    of_logits = compiled_cross_entropy() if compiled else cross_entropy
    return ChunkedCrossEntropy.apply(x, weight, targets, chunks, of_logits, torch.is_grad_enabled())


@functools.cache
def compiled_cross_entropy():
    return torch.compile(cross_entropy)


class ChunkedCrossEntropy(torch.autograd.Function):
    """The same, in chunks. The gradient is that of the sum until backward, so float16 does not lose it."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunks, of_logits, with_gradient):
        matrix = weight.to(x.dtype)  # (V, C)
        total = torch.zeros((), device=x.device)
        grad_x, grad_weight = [], torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        for part, ids in zip(x.chunk(chunks), targets.chunk(chunks), strict=True):
            loss, grad_logits = of_logits(part @ matrix.T, ids, with_gradient)  # (n, V)
            total = total + loss
            if with_gradient:
                grad_x.append(grad_logits @ matrix)  # (n, V) @ (V, C) -> (n, C)
                grad_weight += grad_logits.T @ part  # (V, n) @ (n, C) -> (V, C), summed in float32
        count = (targets >= 0).sum()
        if with_gradient:
            ctx.save_for_backward(torch.cat(grad_x), grad_weight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count
        return grad_x * scale, grad_weight * scale, None, None, None, None


def cross_entropy(logits, targets, with_gradient):
    """The summed loss of logits (n, V), which may be overwritten, and its gradient (n, V) or None."""
    counts = (targets >= 0)[:, None]  # (n, 1)
    targets = targets.clamp(min=0)[:, None]  # (n, 1)
    scores = logits.float()  # (n, V)
    normaliser = scores.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    loss = ((normaliser - scores.gather(1, targets)) * counts).sum()
    if not with_gradient:
        return loss, None
    is_target = torch.arange(logits.size(1), device=logits.device) == targets  # (n, V)
    # softmax(logits), less 1 at the target; in place, since this is what is large
    grad_scores = scores.sub_(normaliser).exp_().add_(is_target, alpha=-1).mul_(counts)
    return loss, grad_scores.to(logits.dtype)
