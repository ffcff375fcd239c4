"""Decoding on a CPU by compiled code that reads the weights at the speed of memory."""

import copy

import torch
from torch import nn

OPTIONS = {  # of the compiler
    # The vector that a matrix is multiplied with is computed once, not anew for each row of the matrix.
    "realize_reads_threshold": 1,
    "realize_opcount_threshold": 1,
    # A multiplication and an addition are one instruction.
    "cpp.enable_floating_point_contract_flag": "fast",
}


def matvec(matrix, x):
    """
    (out, in) times (in,) -> (out,) in float32, spelled out so that the compiler fuses it.

    The result is one pass over the matrix, through four of its rows at once: their sums do not wait for each
    other. Of one row at a time, the additions take longer than its way from memory.
    """
    x = x.float()
    quarters = matrix.split(max(1, len(matrix) // 4))  # and the up to 3 rows that are left
    return torch.cat([(part.float() * x).sum(dim=-1) for part in quarters])


class MatVec(nn.Linear):
    """Linear with the product spelled out for a single vector; the BLAS of many CPUs takes twice as long."""

    def forward(self, x):
        if x.numel() > self.in_features:
            return super().forward(x)
        y = matvec(self.weight, x.reshape(-1))  # (out,)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def compiled_for_decoding(gpt):
    """A GPT on the same weights, compiled for decoding on a CPU. All blocks share one compilation."""
    kept = {id(tensor): tensor for tensor in (*gpt.parameters(), *gpt.buffers())}
    twin = copy.deepcopy(gpt, kept).eval()
    for module in twin.modules():
        if type(module) is nn.Linear:
            module.__class__ = MatVec
    for module in (*twin.transformer.h, twin.lm_head):
        module.compile(fullgraph=True, dynamic=True, options=OPTIONS)
    return twin
