"""
Decoding steps as CUDA graphs: the host launches a whole step at once. One kernel at a time it takes longer to
launch a step of a small model than the GPU takes to run it.

A graph repeats its kernels with the same addresses, shapes and numbers. So the model, the cache and a
sampler's numbers stay where they are; what is new in each step is copied into tensors that the graph reads.
"""

import torch

WARM_UPS = 3  # steps before one is recorded, in which libraries choose kernels and code is compiled


class Recorder:
    """Records CUDA graphs on a stream beside the current one. Their tensors share one pool of memory."""

    def __init__(self, device):
        if device.type != "cuda":
            raise ValueError(f"a CUDA graph needs a CUDA device, not {device}")
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function):
        """Call it where it will be recorded."""
        before = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(before)
        with torch.cuda.stream(self.stream):
            function()
        before.wait_stream(self.stream)

    def record(self, function):
        """
        A function that does on the device what `function` does there, and the tensors that `function`
        returns; each call of it fills them anew. Nothing is computed yet.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            found = function()
        return graph.replay, found


class RecordedSteps:
    """
    The decoding steps of one cache, each recorded when it is first needed: one for each span, sampler and
    shape of inputs. With this object their memory is free again.
    """

    def __init__(self, cache, recorder):
        self.cache, self.recorder = cache, recorder
        self.samplers = {}  # {what it is for: Sampler}: kept, since a graph knows the addresses in it
        self.steps = {}  # {what it is for: (replay, the inputs that it reads, the tensors that it fills)}

    def has_room(self, batch_size, slots):
        """Whether the cache is one for that number of texts, of at most `slots` tokens."""
        rows, has = self.cache.layers[0].k.shape[:2]
        return rows == batch_size and has >= slots

    def __call__(self, decode, span, sampler, *inputs):
        """
        decode(cache, sampler, *inputs), with that span of the cache -> its tensors. The next step overwrites
        them, in the order of the device's work.
        """
        key = span, sampler, *(part.shape if is_tensor(part) else part for part in inputs)
        if key not in self.steps:
            self.steps[key] = self.record(decode, span, sampler, inputs)
        replay, own, found = self.steps[key]
        for part, given in zip(own, inputs, strict=True):
            if is_tensor(part):
                part.copy_(given)
        replay()
        return found

    def record(self, decode, span, sampler, inputs):
        own = [part.clone() if is_tensor(part) else part for part in inputs]
        changed = [self.cache.length, *(sampler.buffers() if isinstance(sampler, torch.nn.Module) else ())]
        before = [part.clone() for part in changed]

        def step():
            self.cache.span = span
            return decode(self.cache, sampler, *own)

        for _ in range(WARM_UPS):
            self.recorder.warm_up(step)
            for part, value in zip(changed, before, strict=True):
                part.copy_(value)  # and the slots that the step wrote to, the next one overwrites
        replay, found = self.recorder.record(step)
        return replay, own, found


def is_tensor(part):
    return isinstance(part, torch.Tensor)
