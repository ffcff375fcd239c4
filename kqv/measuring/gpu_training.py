"""The training parts of bench.py gpu: each change of the step by itself, all together, and loss curves."""

import math
import statistics
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import torch

from kqv.device import find_dtype, peak_flops
from kqv.errors import UserError
from kqv.measuring.costs import model_of
from kqv.measuring.gpu_job import NotHere, patched
from kqv.measuring.machine import Machine, peak_memory, reset_peak_memory
from kqv.measuring.plain import plain_step
from kqv.measuring.presets import PRESETS
from kqv.measuring.training import own_step, step_settings, write_random_set
from kqv.training.optimizer import parameters_of, step_unless
from model import GPTConfig

CURVE = 200  # steps of a loss curve
LEAST_NOISE = 0.02  # nats: what is always allowed between two curves
MEASURING = 2  # seconds that a variant takes in the rounds, at most


@dataclass(frozen=True)
class Variant:
    """
    A way to train: train.py's step with `settings` beside its defaults and, while it runs, with what
    `replaced` says, {"module.name": value}; or a plain step.
    """

    settings: dict = field(default_factory=dict)
    replaced: dict = field(default_factory=dict)
    compiled: bool = True
    plain: bool = False


def clip_apart(bad, optimizer, norm=None, grad_clip=0.0):
    """kqv.training.optimizer.step_unless, with the clip as a pass of its own over the gradients."""
    if grad_clip:
        gradients = [each.grad for each in parameters_of(optimizer) if each.grad is not None]
        torch._foreach_div_(gradients, (norm / grad_clip).clamp(min=1.0))
    step_unless(bad, optimizer)


# What makes train.py's step as it was before each change.
WITHOUT = {
    "bfloat16 stream": {"kqv.training.objective.narrow_stream": lambda gpt: None},
    "large chunks": {"kqv.training.loss.LOGITS_AT_ONCE_COMPILED": 2**28},
    "folded clip": {"kqv.training.step.step_unless": clip_apart},
}


def without_all_but(*changes):
    """What to replace for a step with only these of the changes."""
    return {name: it for change in WITHOUT.keys() - changes for name, it in WITHOUT[change].items()}


BEFORE = without_all_but()
FUSED, FLOAT8 = {"fused_mlp": True}, {"dtype_head": "float8"}
VARIANTS = {
    "baseline": Variant(replaced=BEFORE),
    "train.py": Variant(),
    "plain": Variant(plain=True),
    "bfloat16 stream": Variant(replaced=without_all_but("bfloat16 stream")),
    "folded clip": Variant(replaced=without_all_but("folded clip")),
    "large chunks": Variant(replaced=without_all_but("large chunks")),
    "not compiled": Variant(replaced=BEFORE, compiled=False),
    "together": Variant(FUSED),
    "fused MLP": Variant(FUSED, BEFORE),
    "float8 head": Variant(FLOAT8, BEFORE),
}
# A kernel that reads where it must not spoils all that its process computes later: these come last.
OWN_KERNELS = ("together", "fused MLP", "float8 head")
SINGLE = ("bfloat16 stream", "folded clip", "large chunks")


def train_baby(job):
    """Lines of all variants on nanoGPT's model for tiny Shakespeare: their speed and their loss curves."""
    shape = GPTConfig(64, 128, 2, 2, 32, bias=False) if job.quick else PRESETS["baby"].shape
    shape = replace(shape, vocab_size=128)  # its 65 characters, padded
    with Trial(job, shape, 50) as trial:
        trial.measure("baseline", "train.py", "plain", *SINGLE, "not compiled")
        trial.compare_curves("baseline", "not compiled", "train.py", *SINGLE)
        trial.measure("baseline", *OWN_KERNELS)
        trial.compare_curves(*OWN_KERNELS)


def train_124m(job):
    """Lines of those without kernels of our own on GPT-2 124M, first of all changes, then of each."""
    with Trial(job, shape_of_124m(job), 5) as trial:
        trial.measure("baseline", "train.py", "plain")
        trial.measure("baseline", *SINGLE)
        trial.compare_curves("baseline", "train.py")


def train_124m_by_kernels(job):
    """Lines of those with kernels of our own."""
    with Trial(job, shape_of_124m(job), 5) as trial:
        trial.measure("baseline", *OWN_KERNELS)
        trial.compare_curves("baseline", "together")


def shape_of_124m(job):
    return GPTConfig(64, 512, 2, 2, 64, bias=False) if job.quick else PRESETS["124M"].shape


class Trial:
    """
    Variants on one shape of model, 64 rows of the context at a time, `count` steps of each in a measurement.
    A context, in which there are random tokens to train on.
    """

    def __init__(self, job, shape, count):
        self.job, self.shape = job, shape
        self.count, self.rounds = (1, 1) if job.quick else (count, 3)
        self.batch_size, self.curve_steps = (4, 10) if job.quick else (64, CURVE)
        self.machine = Machine(job.device, find_dtype("auto", job.device), self.rounds)
        self.taken = {}  # {variant: [seconds of a step]}
        self.longest = 0.0  # seconds of a first step
        self.baseline, self.allowed = None, LEAST_NOISE  # the loss curve, and how far another may be from it

    def __enter__(self):
        torch._dynamo.config.recompile_limit = 64  # of one function: each variant is a version of it
        self.data = tempfile.TemporaryDirectory()
        write_random_set(Path(self.data.name), self.shape)
        return self

    def __exit__(self, *error):
        self.data.cleanup()

    def step(self, name):
        """The variant's step on a new model, as a function without arguments that returns the loss."""
        variant, job = VARIANTS[name], self.job
        options = SimpleNamespace(
            activation_checkpointing=False, device=str(job.device), dtype="auto", compile="auto"
        )
        settings = step_settings(
            options, job.train.TrainSettings, self.shape, self.batch_size, self.data.name
        )
        if unknown := variant.settings.keys() - vars(settings).keys():
            raise NotHere(f"train.py has no setting {', '.join(sorted(unknown))}")
        self.require(variant.settings)
        settings = replace(settings, **variant.settings)
        compiled = variant.compiled and job.device.type == "cuda"
        if variant.plain:
            return plain_step(settings, self.shape, self.machine, compiled)
        with patched(variant.replaced):
            step = own_step(settings, self.shape, self.machine, compiled, job.train.train_step)

        def step_of_variant():
            with patched(variant.replaced):
                return step()

        return step_of_variant

    def require(self, settings):
        """Raise NotHere where the device or the shape is none for such settings."""
        of = self.job.device, self.machine.dtype
        if "fused_mlp" in settings:
            from kqv.training.fused_mlp import not_fused

            if reason := not_fused(self.shape, *of):
                raise NotHere(f"fused_mlp {reason}")
        if "dtype_head" in settings:
            from kqv.training.float8 import require_float8

            head = torch.empty(self.shape.vocab_size, self.shape.n_embd, device="meta")
            try:
                require_float8(head, *reversed(of))
            except UserError as error:
                raise NotHere(str(error)) from None

    def measure(self, *variants):
        """A line for each variant: its speed, from rounds in which all have a turn, the baseline two."""
        steps, figures = {}, {}
        for name in variants:
            if self.job.seconds_left < self.longest + MEASURING * len(steps):
                self.job.emit(name, skipped="no time is left")
                continue
            with self.job.reporting(name):
                steps[name], figures[name] = self.warm(name)
        if "baseline" in steps:
            steps["baseline again"], figures["baseline again"] = steps["baseline"], {}
        self.taken |= {name: [] for name in steps}
        for _ in range(self.rounds):
            for name in list(steps):
                step = steps.pop(name)
                with self.job.reporting(name):  # one that fails has no more turns
                    step()  # others have used the memory since
                    taken = self.machine.seconds(lambda: [step() for _ in range(self.count)])  # noqa: B023
                    self.taken[name].append(taken / self.count)
                    steps[name] = step
        ceiling = self.machine.matmul()
        for name in steps:
            self.job.emit(name, **self.speed(name, ceiling), **figures[name])

    def warm(self, name):
        """(the variant's step after three calls, what is to say of these)"""
        device = self.job.device
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by other variants
        reset_peak_memory(device)
        step = self.step(name)
        first = self.machine.seconds(step)  # compiles
        self.longest = max(first, self.longest)
        self.machine.seconds(lambda: [step() for _ in range(2)])  # the optimizer's state is made
        return step, {"peak memory GB": (peak_memory(device) - held) / 1e9, "first step s": first}

    def speed(self, name, ceiling):
        """{name: figure} of a variant's median step, where a large matrix product does `ceiling` FLOP/s."""
        seconds = statistics.median(self.taken[name])
        tokens = self.batch_size * self.shape.block_size / seconds
        flops = model_of(self.shape).flops_per_token() * tokens
        figures = {"ms a step": seconds * 1e3, "tokens/s": tokens}
        if "baseline" in self.taken:
            figures["of baseline"] = statistics.median(self.taken["baseline"]) / seconds
        if self.job.device.type == "cuda":
            peak = peak_flops(torch.cuda.get_device_name(self.job.device), self.machine.dtype)
            figures |= {"MFU": flops / peak} if peak else {}
        return {**figures, "of matmul ceiling": flops / ceiling}

    def compare_curves(self, *variants):
        """
        A line for each loss curve: the mean distance of its second half from the baseline's, which has the
        same batches. Noise is how far the baseline is from itself where it is not compiled.
        """
        for name in variants:
            seconds = self.curve_steps * statistics.median(self.taken.get(name) or [0])
            if seconds > self.job.seconds_left:
                self.job.emit(f"{name}, curve", skipped="no time is left")
                continue
            with self.job.reporting(f"{name}, curve"):
                losses = self.curve(name)
                self.baseline = losses if name == "baseline" else self.baseline
                distance = math.nan if self.baseline is None else distance_of(losses, self.baseline)
                figures = {"from baseline": distance, "steps": len(losses)}
                figures["losses"] = [round(x, 4) for x in losses[9::10].tolist()]
                if name == "not compiled":
                    self.allowed = max(self.allowed, 3 * distance)
                elif self.baseline is not None and not distance <= self.allowed:
                    figures["failed"] = f"{distance:.3g} from the baseline, but noise is {self.allowed:.3g}"
                self.job.emit(f"{name}, curve", **figures)

    def curve(self, name):
        """The losses (steps,) of the variant's first steps."""
        step = self.step(name)
        return torch.stack([step().detach().float() for _ in range(self.curve_steps)]).cpu()


def distance_of(losses, others):
    """How far two loss curves are from each other: the mean over their second halves, in nats."""
    return (losses - others)[len(losses) // 2 :].abs().mean().item()
