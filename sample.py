"""Text from a checkpoint: continuations, answers, a conversation. And how good it is on a prepared set."""

import os
import sys
from dataclasses import dataclass, replace
from typing import Literal

from kqv.device import DeviceSettings, find_compile, find_device, out_of_memory_as
from kqv.errors import UsageError, UserError, run
from kqv.formats import loading
from kqv.formats.loading import WeightsSettings
from kqv.generation import evaluation
from kqv.generation.engine import Engine, compiling_pays, generation_dtype
from kqv.generation.prompts import read_texts
from kqv.generation.writer import Writer, batched, encode, require_length
from kqv.settings import parse, setting

OF_TEXTS = ("start", "prompts", "num_samples", "logprobs")  # settings with no part in --chat and --evaluate


@dataclass(frozen=True)
class TextSettings:
    """What to write"""

    start: str = setting(
        "", "the text to continue; FILE:path reads a file, - standard input; empty: ask, or a newline"
    )
    prompts: str = setting("", "a file of texts to continue, one a line")
    chat: bool = setting(False, "talk, on a terminal or a line of standard input a message; it remembers")
    system: str = setting("", "the instructions that a conversation begins with")
    unknown: Literal["error", "skip"] = setting("error", "what becomes of characters the tokenizer lacks")
    num_samples: int = setting(1, "how many continuations of each text", at_least=1, below=10**6)
    max_new_tokens: int = setting(500, "tokens in each, at most", at_least=0)
    stop: tuple[str, ...] = setting((), "a text ends before this string; may be given many times")
    seed: int = setting(1337, "the same seed draws the same text", at_least=0, below=2**63)
    batch_size: int = setting(64, "texts that are written at once", at_least=1)
    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line for each continuation")
    logprobs: bool = setting(False, "print a JSON object a line for each token, with its log-probability")


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are drawn"""

    temperature: float = setting(
        0.8, "below 1: likelier tokens more often; 0: always the likeliest", at_least=0.0
    )
    top_k: int = setting(200, "draw among the k likeliest tokens; 0: among all", at_least=0)
    top_p: float = setting(1.0, "draw among the likeliest that have this probability together", at_least=0.0)
    min_p: float = setting(
        0.0, "draw among those with this share of the likeliest's probability", at_least=0.0
    )
    repetition_penalty: float = setting(1.0, "above 1: tokens of the text become less likely", at_least=1e-9)


@dataclass(frozen=True)
class BeamSettings:
    """Beam search instead of drawing"""

    beams: int = setting(0, "how many continuations to follow at once; 0: draw", at_least=0, below=2**31)
    length_penalty: float = setting(
        0.0, "divide log-probabilities by length to this power", at_least=0.0, below=100.0
    )


@dataclass(frozen=True)
class EvaluationSettings:
    """How good it is, instead of text"""

    evaluate: Literal["train", "val", ""] = setting(
        "", "a split: its loss, and how many answers are right, by the likeliest token or by beams"
    )
    dataset: str = setting("", "the prepared set; empty: the one that the model was trained on")
    max_examples: int = setting(0, "only so many conversations of the split, the first; 0: all", at_least=0)
    bleu: bool = setting(False, "also the answers' BLEU, for translations")


@dataclass(frozen=True)
class SampleSettings(
    DeviceSettings, EvaluationSettings, BeamSettings, SamplingSettings, TextSettings, WeightsSettings
):
    """
    usage: python sample.py [config.py ...] [--name=value ...]

    Print text from a trained model. A checkpoint is all it needs. One that was trained on conversations
    answers: what it is to continue is what the user says.
    """


def main(argv):
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # None where it is closed
    config = parse(SampleSettings, argv)
    if config.evaluate:
        refuse(config, ("chat", "system", *OF_TEXTS), "with --evaluate: leave one of them out")
    else:
        refuse(config, ("dataset", "max_examples", "bleu"), "without --evaluate=train or --evaluate=val")
    if config.chat:
        refuse(config, ("format", *OF_TEXTS), "with --chat: leave one of them out")
    if config.beams and (config.logprobs or config.num_samples > config.beams):
        raise UsageError(
            "beam search prints log-probabilities with --format=jsonl instead of --logprobs"
            if config.logprobs
            else f"num_samples={config.num_samples} is more than beams={config.beams} can give"
        )
    if config.start and config.prompts:
        raise UsageError("--start and --prompts both name texts to continue: give one of them")
    if "" in config.stop:
        raise UsageError("--stop is empty, and an empty string is everywhere: leave it out, or name one")
    with out_of_memory_as(
        f"out of memory with num_samples={config.num_samples}, batch_size={config.batch_size}: "
        "try fewer texts at once (--batch_size), or a smaller --max_new_tokens"
    ):
        write(config)


def refuse(config, names, where):
    """Raise UsageError where one of these settings was given."""
    for name in names:
        if getattr(config, name) != getattr(SampleSettings, name):
            raise UsageError(f"--{name} means nothing {where}")


def write(config):
    """Print what the settings ask for."""
    plain = config.format == "text" and not config.logprobs
    ask = plain and not config.start and not config.prompts and sys.stdin.isatty() or config.chat
    texts = [] if ask or config.evaluate else read_texts(config)
    device = find_device(config.device)
    gpt, tokenizer, trained_on = load(config)
    if tokenizer.kind != "chat" and (config.chat or config.system):
        raise UserError(
            "--chat and --system need a model of conversations, and this one was trained on texts: prepare "
            "conversations (python prepare.py plays_chat, or a .jsonl file of them) and train on those"
        )
    gpt.to(device=device, dtype=generation_dtype(config.dtype, device, gpt))
    if config.evaluate:
        data = evaluation.open_set(config, trained_on, tokenizer)
        examples = evaluation.read_examples(data, config.evaluate, gpt.config.block_size)
        prompts = [example.ids for example in examples]
        longest = gpt.config.block_size + 1 - min(map(len, prompts), default=0)  # of an answer
        config = replace(config, temperature=0.0, max_new_tokens=min(config.max_new_tokens, longest))
    else:
        prompts = [encode(text, tokenizer, config) for text in texts]
        for text, prompt in zip(texts, prompts, strict=True):
            require_length(text, prompt, config, gpt.config.block_size)
    batches = batched(prompts, config)
    compiled = config.compile
    if compiled == "auto":
        compiled = compiling_pays(batches, device, gpt, config)
    writer = Writer(Engine(gpt, find_compile(compiled, device)), tokenizer, config)
    if config.evaluate:
        evaluation.report(config, gpt, data, examples, writer.records(prompts, batches))
    elif ask:
        writer.converse()
    elif config.logprobs:
        writer.print_logprobs(prompts, batches)
    elif plain and len(texts) == config.num_samples == 1:
        writer.print_stream(texts[0], prompts[0], key=(0, 0), said=[])
    else:
        writer.print_samples(texts, prompts, batches)


def load(config):
    """(model ready to write, tokenizer, name of the set it was trained on or "") of the settings."""
    path, contents = loading.load_chosen(config)
    gpt = loading.model_of(contents, path)
    trained_on = str(contents.get("config", {}).get("dataset", ""))
    return gpt.eval(), loading.tokenizer_of(contents), trained_on


if __name__ == "__main__":
    run(main)
