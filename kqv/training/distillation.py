"""
Distillation (Hinton et al. 2015): a model, the student, learns from the probabilities of a larger one.

The right id alone says little: 1 for one id, 0 for all others. A teacher's probabilities say for each id how
well it would fit there.

    loss = (1 - w) x cross-entropy  +  w x T^2 x KL(p_teacher || p_student), both at temperature T

A temperature above 1 makes unlikely ids count more. The gradient of the second part falls as 1 / T^2, so it
is multiplied by T^2.

Shapes: B rows, T tokens, N = B x T, C channels, V ids.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from kqv.errors import UsageError, UserError
from kqv.formats import loading
from kqv.formats.base import sha256_of
from kqv.settings import setting
from kqv.text.names import folder_of
from kqv.training.loss import split
from kqv.training.start import replaces
from model import GPT, NextToken

BYTES_MORE = 3  # a logit of both models takes about so many times the bytes of one in kqv/training/loss.py


@dataclass(frozen=True)
class DistillationSettings:
    """Distillation"""

    teacher: str = setting("", "a trained model to learn from: what --init_from takes", path=True)
    distill_weight: float = setting(
        0.5, "weight of the teacher's probabilities in the loss, 0 to 1", at_least=0.0, at_most=1.0
    )
    distill_temperature: float = setting(
        1.0, "above 1: what the teacher finds unlikely counts more", at_least=0.01
    )


@dataclass(frozen=True)
class Teacher:
    """A model to learn from, what the user calls it, and the SHA-256 of its weights."""

    gpt: GPT
    name: str
    sha256: str

    def __str__(self):
        return f"teacher {self.name}, {self.gpt.num_parameters() / 1e6:.2f}M parameters"


def load_teacher(config, data):
    """
    The Teacher that the settings name; None where they name none, or its weight in the loss is 0. Raises
    UserError where it does not fit the Dataset and the run, UsageError where the run would replace it.
    """
    if not (config.teacher and config.distill_weight):
        return None
    if replaces(config, config.teacher):
        raise UsageError(f"out_dir={config.out_dir} holds the teacher: use another --out_dir")
    if config.dtype_head == "float8":
        raise UsageError("--dtype_head=float8 and --teacher exclude each other: leave one out")
    contents = loading.load_start(config.teacher, words=(), what="teacher")
    gpt, tokenizer = loading.pair_of(contents, config.teacher, partial(loading.model_of, dropout=0.0))
    theirs, ours = tokenizer.to_json(), data.tokenizer.to_json()
    if theirs != ours:
        way_out = f"prepare the set with --tokenizer={config.teacher}"
        if ours.get("base") == theirs:
            way_out = "it knows no marks of conversations: name a model that was trained on this set"
        raise UserError(
            f"the teacher {config.teacher} knows another tokenizer ({tokenizer.kind}, {tokenizer.vocab_size} "
            f"ids) than {folder_of(config.dataset)} was made with ({data.tokenizer.kind}, "
            f"{data.tokenizer.vocab_size} ids): {way_out}"
        )
    if gpt.config.block_size < config.block_size:
        raise UserError(
            f"the teacher {config.teacher} reads at most {gpt.config.block_size} tokens, but block_size is "
            f"{config.block_size}: use --block_size={gpt.config.block_size}"
        )
    return Teacher(gpt.requires_grad_(False), config.teacher, sha256_of(contents["model"]))


def other_teacher(teacher, config, start_checkpoint):
    """A line, if a resumed run learnt from other weights before."""
    before = start_checkpoint.get("teacher") if config.init_from == "resume" else ""
    if before and teacher and before != teacher.sha256:
        yield f"the weights of the teacher {teacher.name} are not those that this run learnt from before"


class Distilled(NextToken):
    """A GPT with the loss above. Where no gradient is computed, as in an evaluation, it is NextToken's."""

    def __init__(self, gpt, loss, vocab_size, teacher, config):
        """`config` is a DistillationSettings and a LossSettings in one."""
        super().__init__(gpt, loss, vocab_size)
        self.teacher = (teacher,)  # in a tuple, so that its weights are no weights of this module
        self.weight, self.temperature = config.distill_weight, config.distill_temperature
        self.label_smoothing = config.label_smoothing

    def forward(self, idx, targets, positions=None):
        """The arguments are NextToken's."""
        if not torch.is_grad_enabled():
            return super().forward(idx, targets, positions)
        with torch.no_grad():
            taught = self.teacher[0].hidden(idx, positions).flatten(0, 1)  # (N, C of the teacher)
        x = self.gpt.hidden(idx, positions).flatten(0, 1)  # (N, C)
        targets = targets.flatten().clamp(min=-1)  # (N,)
        chunks, rows = split(len(x), BYTES_MORE * self.vocab_size, compiled=False)
        arguments = x, taught, targets
        total = self.of_chunk(*arguments) if chunks == 1 else self.of_chunks(rows, *arguments)
        return total / (targets >= 0).sum()

    # Compiled, the loop would be unrolled, and several chunks would be in memory.
    @torch.compiler.disable
    def of_chunks(self, rows, *whole):
        """The same as `of_chunk`, with the logits of `rows` tokens in memory, also in the backward pass."""
        parts = zip(*(each.split(rows) for each in whole), strict=True)
        how = {"use_reentrant": False, "preserve_rng_state": False}  # no number is random
        return sum(recomputed(self.of_chunk, *part, **how) for part in parts)

    def of_chunk(self, x, taught, targets):
        """x (n, C), taught (n, C of the teacher), targets (n,), -1: does not count -> the summed loss."""
        logits = self.gpt.lm_head(x)[:, : self.vocab_size].float()  # (n, V)
        cross_entropy = F.cross_entropy(
            logits, targets, ignore_index=-1, reduction="sum", label_smoothing=self.label_smoothing
        )
        with torch.no_grad():
            right = self.teacher[0].lm_head(taught)[:, : self.vocab_size].float()  # (n, V)
            right = (right / self.temperature).log_softmax(dim=-1)
        ours = (logits / self.temperature).log_softmax(dim=-1)
        divergence = (right.exp() * (right - ours)).sum(dim=-1)  # (n,)
        of_teacher = self.temperature**2 * (divergence * (targets >= 0)).sum()
        return (1 - self.weight) * cross_entropy + self.weight * of_teacher
