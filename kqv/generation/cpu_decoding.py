"""Decoding on a CPU by compiled code that reads the weights at the speed of memory."""

import copy

from torch import nn


class MatVec(nn.Linear):
    """
    Linear as multiply-and-sum for a single vector, so that the compiler fuses it.

    The result is one pass over the weights at the speed of memory; the BLAS of some CPUs takes twice as long.
    """

    def forward(self, x):
        if x.numel() > self.in_features:
            return super().forward(x)
        y = (self.weight.float() * x.float().reshape(-1)).sum(dim=-1)  # (out, in) -> (out,)
        if self.bias is not None:
            y = y + self.bias.float()
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def compiled_for_decoding(gpt):
    """A GPT on the same weights, compiled for decoding on a CPU. All blocks share one compilation."""
    twin = copy.deepcopy(gpt, {id(parameter): parameter for parameter in gpt.parameters()}).eval()
    for module in twin.modules():
        if type(module) is nn.Linear:
            module.__class__ = MatVec
    # The vector that a matrix is multiplied with is computed once, not anew for each row of the matrix.
    options = {"realize_reads_threshold": 1, "realize_opcount_threshold": 1}
    for module in (*twin.transformer.h, twin.lm_head):
        module.compile(fullgraph=True, dynamic=True, options=options)
    return twin
