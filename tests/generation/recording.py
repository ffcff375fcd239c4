"""
CUDA graphs without a GPU. What stands in for one keeps the operations of a step with the very tensors that
they read and wrote, and repeats those, and nothing else: no Python of the step runs again, and a number that
came from Python stays as it was.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kqv.generation import engine as engines
from kqv.generation import graphs
from kqv.generation import stream as streams

copy_to_host = streams.copy_to_host


class Operations(TorchDispatchMode):
    """
    Keeps the operations that run in it. Afterwards, what they changed is as before, and what they made is
    rubbish, since a recording on a GPU computes nothing.
    """

    def __init__(self):
        super().__init__()
        self.done, self.made, self.before, self.reads = [], [], {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1  # the host waits for a number
            return function(*args)
        written = [
            given
            for argument, given in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        for part in written:
            key = part.untyped_storage().data_ptr()
            self.before.setdefault(key, (part.untyped_storage(), part.untyped_storage().clone()))
        found = function(*args, **(kwargs or {}))
        is_new = all(result.alias_info is None for result in function._schema.returns)
        if is_new or written:
            self.done.append((function, args, kwargs or {}, parts_of(found) if is_new else ()))
        if is_new:
            self.made += parts_of(found)
        return found

    def __exit__(self, *error):
        super().__exit__(*error)
        for now, before in self.before.values():
            now.copy_(before)
        self.spoil()

    def spoil(self):
        for part in self.made:
            part.fill_(-7 if not part.is_floating_point() else float("nan"))

    def again(self):
        for function, args, kwargs, made in self.done:
            found = function(*args, **kwargs)
            for part, value in zip(made, parts_of(found) if made else (), strict=True):
                part.copy_(value)


class Recorder:
    """Stands in for graphs.Recorder. All graphs share their memory: each spoils what the others left."""

    made = []

    def __init__(self, device):
        self.graphs, self.warm_ups = [], 0
        Recorder.made.append(self)

    def warm_up(self, function):
        self.warm_ups += 1
        function()

    def record(self, function):
        assert self.warm_ups == graphs.WARM_UPS
        self.warm_ups, graph = 0, Operations()
        with graph:
            found = function()
        assert graph.reads == 1  # by KVCache.place, which on a GPU does not look
        self.graphs.append(graph)

        def replay():
            for other in self.graphs:
                other.spoil()
            graph.again()

        return replay, found


def recording_engine(monkeypatch, gpt, kind="graph"):
    """An Engine on the CPU that works as on a GPU, but for the graphs themselves."""
    monkeypatch.setattr(graphs, "Recorder", Recorder)
    monkeypatch.setattr(
        streams, "copy_to_host", lambda chosen: copy_to_host([part.clone() for part in chosen])
    )
    Recorder.made.clear()
    engine = engines.Engine(gpt, kind)
    engine.ahead = engines.AHEAD
    return engine


def recordings():
    """How many graphs each of the recorders made."""
    return [len(recorder.graphs) for recorder in Recorder.made]


def parts_of(found):
    return [part for part in (found if isinstance(found, (tuple, list)) else [found]) if part is not None]
