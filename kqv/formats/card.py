"""The model card that an exported folder carries."""

import math
from pathlib import Path

import torch


def card(name, contents, shape, size, tokenizer):
    """
    The text of a model card: what it is and how it was trained. Of the settings it has those that are
    numbers, and the data set's own name: a text may be a path.
    """
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
        f"Tokenizer: {tokenizer.kind}, {tokenizer.vocab_size} ids. " + reads(tokenizer),
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


def reads(tokenizer):
    """What to know of texts that it is given."""
    if tokenizer.kind == "chat":
        return "Conversations go through `apply_chat_template`; in a text, its marks are read as such."
    if tokenizer.kind == "char":
        return "Characters that it does not know are left out."
    return "It reads any text; no text is read as a special id."
