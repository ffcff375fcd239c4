"""The model card of an exported folder: its README.md."""

import math
from dataclasses import asdict
from pathlib import Path

import torch

from kqv.formats.tokenizer_json import base_of


def card(name, gpt, tokenizer, contents):
    """
    The text of a model card: what the model is, and how it was trained, from a checkpoint's `contents`.
    Settings that are text are left out, since they may be paths; a data set is named without its folder.
    """
    shape = asdict(gpt.config)
    size = f"{gpt.num_parameters() / 1e6:.2f}M parameters"
    config = contents.get("config", {})
    numbers = {
        key: value
        for key, value in config.items()
        if str(key).isidentifier() and isinstance(value, (bool, int, float)) and key not in shape
    }
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# {name}",
        "",
        f"A GPT of GPT-2's architecture with {size}, trained with kqv.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{name}")',
        "```",
        "",
        f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} ids. " + what_it_reads(tokenizer),
        "",
        "## Training",
        "",
    ]
    dataset = config.get("dataset")
    if isinstance(dataset, str) and Path(dataset).name:
        lines += [f"Data: {Path(dataset).name}.", ""]
    for label, value in (
        ("Steps", contents.get("iter_num")),
        ("Validation loss", contents.get("best_val_loss")),
    ):
        value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if isinstance(value, (int, float)) and math.isfinite(value):
            unit = "" if label == "Steps" else " nats per token, the lowest of the run so far"
            lines += [f"{label}: {value if isinstance(value, int) else format(value, '.4f')}{unit}.", ""]
    lines += ["| setting | value |", "|---|---|"]
    lines += [f"| {key} | {value} |" for key, value in {**shape, **numbers}.items()]
    return "\n".join(lines) + "\n"


def what_it_reads(tokenizer):
    """A sentence for the card: which texts the tokenizer reads."""
    if tokenizer.kind == "chat":
        return "Conversations go through `apply_chat_template`; in a text, its marks are read as such."
    if base_of(tokenizer).kind == "char":
        return "Characters that it does not know are left out."
    return "It reads any text; no text is read as a special id."
