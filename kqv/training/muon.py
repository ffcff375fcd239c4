"""
Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for all else, as one optimizer.

The gradient of a matrix is U S V^T: orthogonal directions, in U and V, and how much the loss falls along
each, in S. A few of these numbers are large, so gradient descent moves a matrix in few directions and hardly
in the others. Muon steps by U V^T instead, equally far in all. It takes it from the mean of the gradients so
far, its momentum, in which noise has averaged out.

An embedding is a table: a batch moves the rows of its tokens alone. These, and vectors, AdamW fits better.

Shapes: n matrices (rows, cols) of one kind, one of each block, are a stack (n, rows, cols).
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from kqv.settings import setting
from kqv.training.sharding import local_part

# A Newton-Schulz iteration makes a s + b s^3 + c s^5 of each singular value s (Jordan's numbers). Five of
# them bring all between 0.01 and 1 to between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


@dataclass(frozen=True)
class MuonSettings:
    """With --optimizer=muon"""

    embedding_learning_rate: float = setting(
        None, "the largest learning rate of embeddings; not given: learning_rate", at_least=0.0
    )
    head_learning_rate: float = setting(
        None, "that of a head that is not tied; not given: learning_rate", at_least=0.0
    )
    muon_learning_rate: float = setting(0.02, "that of the blocks' matrices", at_least=0.0)
    muon_weight_decay: float = setting(0.0, "on the blocks' matrices", at_least=0.0)
    muon_momentum: float = setting(0.95, "momentum", at_least=0.0, below=1.0)
    momentum_warmup_iters: float = setting(
        300, "steps in which the momentum rises from 0.85; below 1: a share of max_iters", at_least=0.0
    )


def orthogonalise(stack):
    """
    G = U S V^T -> near U V^T, for each G in a stack, by products alone: a polynomial in X X^T, times X,
    changes the singular values of X and keeps U and V. In bfloat16 on a GPU, where that is several times
    faster.
    """
    a, b, c = COEFFICIENTS
    tall = stack.size(1) > stack.size(2)
    X = stack.mT if tall else stack  # so that X X^T is small
    X = X.bfloat16() if X.is_cuda else X
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value is above 1
    for _ in range(ITERATIONS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A A) X
    return X.mT if tall else X


def directions(stack, rows):
    """
    A stack of gradients -> the steps at a learning rate of 1. `rows` are those of the parts of a matrix, each
    orthogonalised by itself: c_attn is three matrices, of Q, K and V. A part with more rows than columns
    takes a longer step, by sqrt(rows / cols), so that it changes what it puts out as much as others do.
    """
    steps = [
        orthogonalise(part) * max(1, part.size(1) / part.size(2)) ** 0.5 for part in stack.split(rows, dim=1)
    ]
    return torch.cat(steps, dim=1).to(stack.dtype)


class Muon(torch.optim.AdamW):
    """
    AdamW, fused. But groups with "rows" (see `directions`) hold matrices of one shape, which Muon moves; such
    a group has a "momentum" too. `spread` is World.spread, by which processes share the work.
    """

    def __init__(self, groups, betas, spread):
        super().__init__([{"rows": None, **group} for group in groups], betas=betas, fused=True)
        self.spread = spread

    @torch.no_grad()
    def step(self):
        every = self.param_groups
        for group in every:
            if group["rows"]:
                self.step_matrices(group)
        self.param_groups = [group for group in every if not group["rows"]]  # AdamW's
        super().step()
        self.param_groups = every

    def step_matrices(self, group):
        """Nesterov's momentum, orthogonalised. All tensors are this process's part, the updates too."""
        matrices, momentum, lr = group["params"], group["momentum"], group["lr"]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["mean"] = torch.zeros_like(matrix)
        means = [local_part(self.state[matrix]["mean"]) for matrix in matrices]
        gradients = torch.stack([local_part(matrix.grad) for matrix in matrices])
        mean = torch.stack(means)
        if (scale := getattr(self, "grad_scale", None)) is not None:
            gradients /= scale
        # A bad step, which only the device knows of, has the mean as its gradient, and the length 0.
        if (bad := getattr(self, "found_inf", None)) is not None:
            gradients, lr = torch.where(bad > 0, mean, gradients), lr * (1 - bad)
        mean.lerp_(gradients, 1 - momentum)
        steps = self.spread(
            lambda stack: directions(stack, group["rows"]), gradients.lerp(mean, momentum), matrices[0]
        )
        torch._foreach_copy_(means, mean.unbind())
        weights = [local_part(matrix) for matrix in matrices]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, (steps * lr).unbind())


def muon_groups(gpt, config):
    """
    The blocks' matrices, a group of each kind, then embeddings, an untied head, and vectors. "peak"
    is a group's largest learning rate.
    """
    matrices, others = defaultdict(list), {"embeddings": [], "head": [], "vectors": []}
    learnt = {name: p for name, p in gpt.named_parameters() if p.requires_grad}
    for name, parameter in learnt.items():
        if parameter.dim() < 2:
            others["vectors"].append(parameter)
        elif name.startswith("transformer.h."):
            matrices[name.split(".", 3)[3]].append(parameter)  # "attn.c_attn.weight", of each block
        else:
            others["head" if name.startswith("lm_head.") else "embeddings"].append(parameter)
    attention = gpt.transformer.h[0].attn
    rows = {kind: [len(stack[0])] for kind, stack in matrices.items()}
    rows["attn.c_attn.weight"] = [heads * attention.head_size for heads in attention.heads]  # Q, K, V
    muon = {"peak": config.muon_learning_rate, "weight_decay": config.muon_weight_decay}
    groups = [
        {"params": stack, "rows": rows[kind], "momentum": 0.0, **muon} for kind, stack in matrices.items()
    ]
    peaks = {"embeddings": config.embedding_learning_rate, "head": config.head_learning_rate, "vectors": None}
    for kind, parameters in others.items():
        peak = config.learning_rate if peaks[kind] is None else peaks[kind]
        decay = config.weight_decay * (kind != "vectors")
        groups.append({"params": parameters, "peak": peak, "weight_decay": decay})
    return [{"lr": group["peak"], **group} for group in groups if group["params"]]
