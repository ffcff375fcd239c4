"""
Evaluation on a prepared set: the loss on a split, and how many of its answers the model gives exactly.

Shapes: B rows, T tokens.
"""

import math
import sys
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from kqv.errors import UsageError, UserError
from kqv.generation.engine import evaluating
from kqv.generation.printing import print_object
from kqv.generation.sampling import not_finite
from kqv.printable import one_line
from kqv.settings import setting
from kqv.text.dataset import Dataset
from kqv.text.names import require_in_data
from model import NextToken

TOKENS_AT_ONCE = 4096  # of the loss: their logits, (B, T, V), take more memory than anything else

REPORT = {  # the text for each number, printed where the number is there and not 0
    "split": "{dataset}, {split} split",
    "max_examples": ", of which at most the first {max_examples:,} conversations",
    "tokens": "\nloss {loss:.4f} nats per token, over {tokens:,} tokens",
    "bits_per_byte": ": {bits_per_byte:.4f} bits per byte",
    "examples": "\nexact match {exact_match:.2%}, {matches:,} of {examples:,} conversations",
    "left_out": "; {left_out:,} left out, longer than block_size={block_size}",
    "bleu_signature": "\nBLEU {bleu:.2f}, {bleu_signature}",
}


@dataclass(frozen=True)
class EvaluationSettings:
    """How good it is, instead of text"""

    evaluate: Literal["train", "val", ""] = setting(
        "", "a split: its loss, and how many answers are right, by the likeliest token or by beams"
    )
    dataset: str = setting("", "the prepared set; empty: the one that the model was trained on", path=True)
    max_examples: int = setting(0, "only so many conversations of the split, the first; 0: all", at_least=0)
    bleu: bool = setting(False, "also the answers' BLEU, for translations")


class Example(NamedTuple):
    """A conversation whose last answer the model is to give."""

    prompt: str  # the messages before that answer, a line each
    ids: list  # the prompt that the model continues: those messages, and the mark that begins an answer
    expected: str  # the answer


def open_set(config, trained_on, tokenizer):
    """
    The Dataset to evaluate on; of its split only the first --max_examples conversations. Raises UserError
    where its tokenizer is not the model's, UsageError where the settings name none.
    """
    if not (config.dataset or trained_on):
        raise UsageError("the checkpoint does not say which set it was trained on: name one, --dataset=NAME")
    if not config.dataset:
        require_in_data(trained_on)
    data = Dataset(config.dataset or trained_on)
    known = tokenizer.to_json()
    readable = known, known.get("base")  # a model of conversations reads texts, too
    if data.tokenizer.to_json() not in readable:
        raise UserError(
            f"{data.folder} was made with another tokenizer than the model knows: prepare it with "
            "--tokenizer=CHECKPOINT"
        )
    if config.max_examples and data.is_chat:
        starts = data.conversation_starts
        starts[config.evaluate] = starts[config.evaluate][: config.max_examples + 1]
    return data


def read_examples(data, split, block_size):
    """
    The Examples of a split that fit into block_size; of a set of texts there are none. Raises UserError where
    a set of conversations has none that fits.
    """
    found = []
    for ids, learnt in data.marked_conversations(split) if data.is_chat else ():
        if len(ids) - 1 <= block_size:
            found.append(Example(*data.tokenizer.example_of(ids, learnt)))
    if data.is_chat and not found:
        raise UserError(
            f"no conversation of the {split} split of {data.folder} fits into the model's block_size="
            f"{block_size}: evaluate on shorter ones, or train with a larger --block_size"
        )
    return found


def settings_for_answers(config, examples, block_size):
    """
    The settings with which a model answers: always the likeliest token, and no more tokens than follow the
    shortest prompt in the context.
    """
    if not examples:
        return config
    longest = block_size + 1 - min(len(example.ids) for example in examples)
    return replace(config, temperature=0.0, max_new_tokens=min(config.max_new_tokens, longest))


@torch.no_grad()
def mean_loss(gpt, data, split, batch_size):
    """
    (mean cross-entropy in nats per token, number of tokens) over every target of a split, once. Raises
    UserError where it has none, or where the model's logits are not finite.
    """
    device, dtype = gpt.transformer.ln_f.weight.device, gpt.transformer.ln_f.weight.dtype
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # losses are float32
    loss = NextToken(gpt, vocab_size=data.tokenizer.vocab_size)
    block_size = gpt.config.block_size
    batch_size = min(batch_size, max(1, TOKENS_AT_ONCE // block_size))
    losses, counts = [], []
    batches = whole_split(data, split, batch_size, block_size)
    for batch in with_progress(batches, data.batches(split, batch_size, block_size)):
        if not (batch.targets >= 0).any():
            continue
        arrays = [torch.from_numpy(array).to(device) for array in batch if array is not None]
        with autocast, evaluating(gpt):
            losses.append(loss(*arrays))
        counts.append(int((batch.targets >= 0).sum()))
    if not counts:
        raise UserError(f"the {split} split of {data.folder} is too short to predict anything: use more text")
    mean = float(np.average(torch.stack(losses).tolist(), weights=counts))
    if not math.isfinite(mean):
        raise not_finite()
    return mean, sum(counts)


def whole_split(data, split, batch_size, block_size):
    """Batches, (B, T), in which each token to predict of a split is a target exactly once."""
    count = data.windows(split, block_size)
    windows = np.arange(count) if data.is_chat else np.arange(count) * block_size
    for first in range(0, count, batch_size):
        yield data.batch(split, windows[first : first + batch_size], block_size)
    rest = 0 if data.is_chat else (len(data.splits[split]) - 1) % block_size
    if rest:
        yield data.batch(split, np.array([count * block_size]), rest)


def report(config, gpt, data, examples, records):
    """
    Print the loss and what became of the answers: lines to read, or with --format=jsonl a JSON object for
    each Example and one of all numbers. `records` are the model's answers, as Writer.records gives them.
    """
    split, plain = config.evaluate, config.format == "text"
    bleu = bleu_metric() if config.bleu else None
    loss, tokens = mean_loss(gpt, data, split, config.batch_size)
    numbers = {"dataset": str(data.folder), "split": split, "loss": loss, "tokens": tokens}
    if bits := data.bits_per_byte(split, loss):
        numbers["bits_per_byte"] = bits
    texts, expected = [], [example.expected for example in examples]
    records = with_progress(records, len(examples)) if plain else records
    for example, (*_, record) in zip(examples, records, strict=True):
        texts.append(record["text"])
        if not plain:
            about = {"prompt": example.prompt, "text": texts[-1], "expected": example.expected}
            print_object({**about, "match": texts[-1] == example.expected})
    if examples:
        matches = sum(map(str.__eq__, texts, expected))
        numbers |= {"max_examples": config.max_examples, "block_size": gpt.config.block_size}
        numbers |= {"examples": len(examples), "left_out": len(data.lengths(split)) - len(examples)}
        numbers |= {"matches": matches, "exact_match": matches / len(examples)}
    if bleu:
        score = bleu.corpus_score(texts, [expected]).score
        numbers |= {"bleu": score, "bleu_signature": str(bleu.get_signature())}
    if plain:
        print(in_words(numbers))
    else:
        print_object(numbers)


def in_words(numbers):
    """The numbers as lines to read."""
    shown = {**numbers, "dataset": one_line(numbers["dataset"])}
    return "".join(words.format(**shown) for name, words in REPORT.items() if numbers.get(name))


def with_progress(items, total):
    """The same items; a terminal shows the progress."""
    return tqdm(items, total=total, leave=False, disable=not sys.stderr.isatty())


def bleu_metric():
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it (Post 2018)."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        raise UserError("--bleu needs: pip install sacrebleu") from None
    return BLEU()
