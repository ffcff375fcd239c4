"""The part of bench.py gpu for generation: each engine's tokens, logits and speed beside the plain one's."""

from contextlib import suppress

import torch

from kqv.generation.engine import Engine
from kqv.generation.stream import ContextWindow, generate
from kqv.measuring.generation import WRITING, measure_decoding, random_texts
from kqv.measuring.machine import Machine
from kqv.measuring.presets import PRESETS
from model import GPT, GPTConfig

KINDS = ("graph", "kernels", "compiled", "compiled, int8")  # of engine; those that compile take long to begin
LOGITS = 1e-2  # how far logits in bfloat16 may be from the right ones, as a share of their size
PROMPT, WRITTEN = 100, 128  # tokens, below 256 together: there is one length of the cache to compile for
COMPILING = 30  # seconds that the compiled engine may take


class Trial:
    """Engines on the same weights, those of GPT-2 124M's shape, for `batch_size` texts."""

    def __init__(self, job, batch_size):
        shape = GPTConfig(256, 512, 2, 2, 64, bias=False) if job.quick else PRESETS["124M"].shape
        self.job, self.batch_size, self.written = job, batch_size, 16 if job.quick else WRITTEN
        self.texts = random_texts(batch_size, PROMPT, shape.vocab_size)
        torch.manual_seed(0)
        with torch.device(job.device):
            self.gpt = GPT(shape).eval()

    def name(self, kind):
        return f"{kind}, batch {self.batch_size}"

    def engine(self, kind, dtype):
        gpt = GPT.from_weights(self.gpt.config, self.gpt.state_dict())
        kind, _, weights = kind.partition(", ")
        if not weights:
            return Engine(gpt.to(self.job.device, dtype), kind)
        from kqv.generation.int8 import to_device

        return Engine(to_device(gpt, self.job.device, dtype, weights), kind)

    def not_for(self, kind):
        """Why an engine can't be measured, or None."""
        if "compiled" in kind and self.job.seconds_left < COMPILING:
            return "no time is left"
        if kind == "kernels":
            with suppress(ImportError):
                from kqv.kernels.decoding import MOST_TEXTS

                if self.batch_size > MOST_TEXTS:
                    return f"the kernels write at most {MOST_TEXTS} texts at once"
        return None

    def compare_tokens(self, kind):
        """A line that says whether an engine writes the plain one's tokens in float32."""
        with self.job.reporting(f"{self.name(kind)}, tokens"):
            found, expected = (
                generate(self.engine(name, torch.float32), self.texts, self.written, sampling=WRITING)
                for name in (kind, "plain")
            )
            equal = sum(map(list.__eq__, found, expected))
            wrong = {} if equal == len(found) else {"failed": f"{equal} of {len(found)} texts are the same"}
            self.job.emit(f"{self.name(kind)}, tokens", written=self.written, **wrong)

    def compare_logits(self, kind):
        """A line of how far an engine's logits in bfloat16 are from float64's, beside the plain one's."""
        with self.job.reporting(f"{self.name(kind)}, logits"):
            right = self.logits("plain", torch.float64)
            error, plain = (
                ((self.logits(name, torch.bfloat16) - right).norm() / right.norm()).item()
                for name in (kind, "plain")
            )
            figures = {"error": error, "plain error": plain}
            if not error <= max(LOGITS, 1.5 * plain):
                figures["failed"] = f"the logits are off by {error:.2g} of their size"
            self.job.emit(f"{self.name(kind)}, logits", **figures)

    def logits(self, kind, dtype):
        """The logits (B, V) after the texts, by the engine's decoding step, in float64."""
        window = ContextWindow(self.engine(kind, dtype), self.texts, 1)
        tokens = window.refill()
        return window.step(tokens, lambda logits: (logits,))[0].double()

    def measure(self, kind):
        """A line of an engine's speed in bfloat16."""
        with self.job.reporting(self.name(kind)):
            machine = Machine(self.job.device, torch.bfloat16, 1 if self.job.quick else 3)
            engine = self.engine(kind, torch.bfloat16)
            self.job.emit(self.name(kind), **measure_decoding(engine, self.texts, self.written, machine))


@torch.no_grad()
def compare_engines(job):
    """Lines of tokens, logits and speed at batch 1 and 64."""
    torch.set_float32_matmul_precision("highest")  # not TF32
    kinds = KINDS if job.device.type == "cuda" else ("plain",)
    trials = [Trial(job, 1), Trial(job, 4 if job.quick else 64)]
    for trial in trials:
        trial.measure("plain")
    for kind in kinds:
        for trial in trials:
            if reason := trial.not_for(kind):
                job.emit(trial.name(kind), skipped=reason)
                continue
            trial.measure(kind)
            if "compiled" not in kind:  # it is compiled anew for each
                trial.compare_logits(kind)
            if "int8" not in kind and not trial.not_for(kind):
                trial.compare_tokens(kind)
