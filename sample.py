"""
Text from a trained model: continuations, answers, a conversation. With --evaluate its loss on a prepared set.
"""

if __name__ == "__main__":  # before the imports, so that one that fails ends in one line
    from kqv.errors import run_command

    run_command(__file__)

import sys
from dataclasses import dataclass

from kqv import threads
from kqv.device import PlacementSettings, find_device, out_of_memory_as
from kqv.errors import UsageError, UserError
from kqv.formats import loading
from kqv.formats.loading import WeightsSettings
from kqv.generation import evaluation
from kqv.generation.beams import BeamSettings
from kqv.generation.choice import EngineSettings, choose_engine, generation_dtype
from kqv.generation.conversation import Conversation
from kqv.generation.engine import Engine
from kqv.generation.evaluation import EvaluationSettings
from kqv.generation.int8 import PrecisionSettings, to_device
from kqv.generation.printing import is_plain, print_continuations
from kqv.generation.prompts import PromptSettings, completed, encode_prompt, fitted, read_prompts
from kqv.generation.sampling import Sampling
from kqv.generation.writer import TextSettings, Writer, batched
from kqv.settings import fill, read_given, refuse, refuse_unused

OF_TEXTS = ("start", "prompts", "num_samples", "logprobs")
OF_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
OF_ANSWERS = ("beams", "length_penalty", "stop", "max_new_tokens", "max_examples", "bleu", "engine")

TYPICAL_ANSWER = 100  # tokens; of a conversation nobody knows how many there will be

UNUSED = (  # rows of `refuse_unused`: names of settings, when they mean nothing, and when in words
    (("dataset", "max_examples", "bleu"), lambda c: not c.evaluate, "without --evaluate=train or val"),
    (("chat", "system", "unknown", *OF_TEXTS), lambda c: c.evaluate, "with --evaluate, which reads a set"),
    (OF_DRAWING, lambda c: c.evaluate, "with --evaluate, where answers are the likeliest"),
    (("format", *OF_TEXTS), lambda c: c.chat, "with --chat"),
    (("start",), lambda c: c.prompts, "with --prompts, which names the texts to continue"),
    (("format",), lambda c: c.logprobs and c.format == "text", "with --logprobs, which prints JSON"),
    (OF_DRAWING, lambda c: c.beams, "with --beams, which draws nothing"),
    (("logprobs",), lambda c: c.beams, "with --beams, where --format=jsonl prints log-probabilities"),
    (("raw",), lambda c: c.evaluate or not is_plain(c), "with --evaluate, or with JSON"),
    (("length_penalty",), lambda c: not c.beams, "without --beams"),
)


@dataclass(frozen=True)
class SampleSettings(
    EngineSettings,
    PlacementSettings,
    PrecisionSettings,
    EvaluationSettings,
    BeamSettings,
    Sampling,
    TextSettings,
    PromptSettings,
    WeightsSettings,
):
    """
    usage: python sample.py [config.py ...] [--name=value ...]

    Print text from a trained model. A checkpoint is all it needs. A model that was trained on conversations
    answers: the text to continue is then the user's message.
    """


def main(argv):
    given = read_given(SampleSettings, argv)
    config = fill(SampleSettings, given)
    require_compatible(config, given)
    with out_of_memory_as(
        f"out of memory with num_samples={config.num_samples}, batch_size={config.batch_size}: "
        "try fewer texts at once (--batch_size), or a smaller --max_new_tokens"
    ):
        sample(config, given)


def sample(config, given):
    """Load the model, and print what the settings ask for. `given`: {name: Given}, what the user gave."""
    nothing_given = is_plain(config) and not config.start and not config.prompts
    asks = config.chat or (nothing_given and sys.stdin.isatty())
    texts = [] if config.evaluate or asks else read_prompts(config)
    device = find_device(config.device)
    threads.choose(device)
    gpt, tokenizer, trained_on = load(config)
    require_conversations(tokenizer, config, given)
    with out_of_memory_as(f"the model does not fit into the memory of {device}: try --device=cpu"):
        to_device(gpt, device, generation_dtype(config.dtype, device, gpt), config.weights)
    block_size = gpt.config.block_size
    if config.evaluate:
        data = evaluation.open_set(config, trained_on, tokenizer)
        if not data.is_chat:
            refuse(given, OF_ANSWERS, f"with {data.folder}, which has texts, not conversations")
        examples = evaluation.read_examples(data, config.evaluate, block_size)
        prompts = [example.ids for example in examples]
        config = evaluation.settings_for_answers(config, examples, block_size)
    else:
        texts = [completed(text, tokenizer) for text in texts]
        prompts = [encode_prompt(text, tokenizer, config) for text in texts]
        prompts = fitted(texts, prompts, tokenizer, config, block_size)
    batches = batched(prompts, config)
    steps = TYPICAL_ANSWER if asks else len(batches) * config.max_new_tokens
    rows = max(map(len, batches), default=1) * max(1, config.beams)
    engine = Engine(gpt, choose_engine(config.engine, device, gpt, steps, rows))
    writer = Writer(engine, tokenizer, config)
    if config.evaluate:
        evaluation.report(config, gpt, data, examples, writer.records(prompts))
    elif asks:
        Conversation(writer).run()
    else:
        print_continuations(writer, texts, prompts)


def load(config):
    """(model, tokenizer, name of the set it was trained on or "") that the settings name."""
    path, contents = loading.load_chosen(config)
    gpt, tokenizer = loading.pair_of(contents, path)
    return gpt.eval(), tokenizer, contents.get("config", {}).get("dataset", "")


def require_compatible(config, given):
    """Raise UsageError where two settings do not go together; `given`: {name: Given}, what the user gave."""
    refuse_unused((*loading.UNUSED, *UNUSED), config, given)
    if config.beams and config.num_samples > config.beams:
        raise UsageError(f"num_samples={config.num_samples} is more than beams={config.beams} can give")
    if "" in config.stop:
        raise UsageError("--stop is empty, and an empty string is everywhere: leave it out, or name one")


def require_conversations(tokenizer, config, given):
    """Raise UserError where --chat or --system is given for a model that was trained on texts."""
    if tokenizer.kind != "chat" and (config.chat or "system" in given):
        raise UserError(
            "--chat and --system need a model of conversations, and this one was trained on texts: prepare "
            "conversations (python prepare.py plays_chat, or a .jsonl file of them) and train on those"
        )
