"""The model card of an exported folder: its README.md."""

import math
import re
from dataclasses import asdict
from pathlib import Path

import torch

from kqv.formats.families import family_of
from kqv.formats.tokenizer_json import base_of
from kqv.printable import one_line

LONGEST = 255  # characters of a name; that of a folder is no longer


def card(name, gpt, tokenizer, contents):
    """
    The text of a model card: what the model is, and how it was trained, from a checkpoint's `contents`.
    Settings that are text are left out, since they may be paths; a data set is named without its folder.
    """
    shape, family = asdict(gpt.config), family_of(gpt.config)
    size = f"{gpt.num_parameters() / 1e6:.2f}M parameters"
    config = contents.get("config", {})
    numbers = {
        key: value
        for key, value in config.items()
        if str(key).isidentifier() and is_number(value) and key not in shape
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {as_markdown(name)}",
        "",
        f"A {family.architecture} (the {family.name} family) with {size}, trained with kqv.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({name!r})",
        f"model = AutoModelForCausalLM.from_pretrained({name!r})",
        "```",
        "",
        f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} ids. " + what_it_reads(tokenizer),
        "",
        "## Training",
        "",
    ]
    dataset = config.get("dataset")
    if isinstance(dataset, str) and Path(dataset).name:
        lines += [f"Data: {as_markdown(Path(dataset).name)}.", ""]
    for label, value in (
        ("Steps", contents.get("iter_num")),
        ("Validation loss", contents.get("best_val_loss")),
    ):
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if is_number(value) and math.isfinite(value):
            unit = "" if label == "Steps" else " nats per token, the lowest of the run so far"
            lines += [f"{label}: {value if isinstance(value, int) else format(value, '.4f')}{unit}.", ""]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {as_markdown(key)} | {value} |" for key, value in {**shape, **numbers}.items()]
    return "\n".join(lines) + "\n"


def is_number(value):
    """Whether a value of a checkpoint is a number that a setting has: a whole one has 64 bits at most."""
    return isinstance(value, float) or isinstance(value, int) and abs(value) < 2**63


def as_markdown(text):
    """A line of Markdown that shows `text`, whatever is in it: every mark of Markdown and HTML is escaped."""
    marks = r"[!-/:-@\[-^`{-~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"  # in a word, _ is no mark
    return re.sub(marks, r"\\\g<0>", one_line(str(text))[:LONGEST])


def what_it_reads(tokenizer):
    """A sentence for the card: which texts the tokenizer reads."""
    if tokenizer.kind == "chat":
        return "Conversations go through `apply_chat_template`; in a text, its marks are read as such."
    if base_of(tokenizer).kind == "char":
        return "Characters that it does not know are left out."
    return "It reads any text; no text is read as a special id."
