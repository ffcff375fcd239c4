"""The Sampler of the engine with the project's own kernels."""

from kqv.generation.sampling import Sampler
from kqv.kernels.top_k import MOST_K, draw_top_k


class KernelSampler(Sampler):
    """A Sampler that draws among the k likeliest by two kernels instead of some thirty."""

    def draw(self, logits, uniform):
        return draw_top_k(logits, uniform, self.temperature, self.top_k, self.min_p)


def kind_for(sampling, work):
    """The Sampler's class for a Sampling: the kernels know the temperature, top_k and min_p alone."""
    others = sampling.top_p < 1 or work.penalty or work.logprobs
    return Sampler if others or not 0 < work.kept <= MOST_K else KernelSampler
