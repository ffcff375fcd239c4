"""Text from a checkpoint: continuations, answers, a conversation. And how good it is on a prepared set."""

import itertools
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import evaluation
from generate import Engine, Sampling, beam_search, stream
from kqv import checkpoint
from kqv.device import (
    DeviceSettings,
    find_compile,
    find_device,
    find_dtype,
    has_compiler,
    out_of_memory_as,
)
from kqv.errors import UsageError, UserError, run, warn
from kqv.settings import parse, setting
from kqv.tokenizer import TextStream
from model import GPT, GPTConfig

SEPARATOR = "---------------"
OF_TEXTS = ("start", "prompts", "num_samples", "logprobs")  # settings with no part in --chat and --evaluate
COMPILE_FROM = 2000  # decoding steps from which compiling has paid for itself


@dataclass(frozen=True)
class ModelSettings:
    """Which weights"""

    out_dir: str = setting("out", "the folder of a training run")
    checkpoint: str = setting("best", "best (lowest validation loss), newest, or the path of a file")
    init_from: str = setting(
        "resume", "resume: from out_dir; or gpt2, gpt2-medium|large|xl, a Hugging Face folder"
    )


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
    DeviceSettings, EvaluationSettings, BeamSettings, SamplingSettings, TextSettings, ModelSettings
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


def batched(prompts, config):
    """
    Lists of at most batch_size (number of the prompt, number of its sample), prompts of like length together:
    then little of a batch is padding.
    """
    copies = 1 if config.beams else config.num_samples
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    rows = [(number, copy) for number in by_length for copy in range(copies)]
    return [rows[first : first + config.batch_size] for first in range(0, len(rows), config.batch_size)]


class Writer:
    """Continues texts and prints them in the form that the settings ask for."""

    def __init__(self, engine, tokenizer, config):
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.sampling = Sampling(
            config.temperature,
            config.top_k,
            config.top_p,
            config.min_p,
            config.repetition_penalty,
            config.logprobs,
        )

    def events(self, batch, prompts):
        """
        Continue the batch's prompts together: an iterator of (index in the batch, the TextStream that it has
        become, its new text, what was drawn or None where there is nothing more to draw).
        """
        texts = [prompts[number] for number, _ in batch]
        rows = [number * self.config.num_samples + copy for number, copy in batch]
        streams = [TextStream(self.tokenizer, self.config.stop) for _ in batch]
        for drawn in stream(
            self.engine,
            texts,
            self.config.max_new_tokens,
            self.sampling,
            self.config.seed,
            rows,
            self.tokenizer.vocab_size,
        ):
            for number, text in enumerate(streams):
                if not text.ended:
                    yield number, text, text.feed(drawn.ids[number]), drawn
            if all(text.ended for text in streams):
                return
        for number, text in enumerate(streams):
            if not text.ended:
                yield number, text, text.finish(), None

    def opening(self, text):
        """What is printed before a continuation: the text that goes on, but not what the user said."""
        return "" if self.tokenizer.kind == "chat" else text

    def print_stream(self, text, prompt, key, said):
        """
        Print each token as it is made; a character that spans several tokens appears when it is whole. The
        pieces of text are added to the list `said`.
        """
        if self.config.beams:
            pieces = [self.found([key], {key[0]: prompt})[key]["text"]]
        else:
            pieces = (new for _, _, new, _ in self.events([key], {key[0]: prompt}))
        print(self.opening(text), end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
        print(flush=True)

    def records(self, prompts, batches):
        """
        (number of the prompt, of its sample, what there is to say of it or None) for all continuations, in
        order, each when those before it are there.
        """
        config, finished = self.config, {}
        order = ((number, copy) for number in range(len(prompts)) for copy in range(config.num_samples))
        key = next(order, None)
        for batch in batches:
            finished.update(self.found(batch, prompts) if config.beams else self.drawn(batch, prompts))
            while key in finished:
                yield *key, finished.pop(key)
                key = next(order, None)

    def print_samples(self, texts, prompts, batches):
        """Print all continuations in the order of their prompts."""
        several = len(prompts) * self.config.num_samples > 1
        for number, copy, record in self.records(prompts, batches):
            if record and self.config.format == "jsonl":
                print(json.dumps({"prompt": texts[number], "sample": copy, **record}), flush=True)
            elif record:
                print(self.opening(texts[number]) + record["text"], flush=True)
                if several:
                    print(SEPARATOR, flush=True)

    def drawn(self, batch, prompts):
        """Draw a batch's continuations: {(number of the prompt, of the sample): what there is to say}."""
        records = {key: {"text": "", "tokens": 0, "end": "length"} for key in batch}
        for row, text, new, drawn in self.events(batch, prompts):
            record = records[batch[row]]
            record["text"] += new
            record["tokens"] += drawn is not None
            record["end"] = text.ended or "length"
        return records

    def found(self, batch, prompts):
        """The same from a beam search, with log-probabilities; sample 0 is the best."""
        texts = [prompts[number] for number, _ in batch]
        hypotheses = beam_search(
            self.engine,
            texts,
            self.config.max_new_tokens,
            self.config.beams,
            self.config.length_penalty,
            self.ends,
            self.tokenizer.vocab_size,
        )
        # Of a small vocabulary, or of no tokens, there may be fewer texts than are asked for: None.
        records = {(number, copy): None for number, _ in batch for copy in range(self.config.num_samples)}
        for (number, _), some in zip(batch, hypotheses, strict=True):
            for copy, hypothesis in enumerate(some[: self.config.num_samples]):
                text = TextStream(self.tokenizer, self.config.stop)
                records[number, copy] = {
                    "text": "".join(map(text.feed, hypothesis.ids)) + text.finish(),
                    "tokens": len(hypothesis.ids),
                    "end": text.ended or "length",
                    "logprob": hypothesis.logprob,
                    "score": hypothesis.score,
                }
        return records

    def ends(self, ids):
        """Whether a text is complete with the last of its ids."""
        if ids[-1] == self.tokenizer.separator:
            return True
        text = self.tokenizer.decode(ids) if self.config.stop else ""
        return any(stop in text for stop in self.config.stop)

    def print_logprobs(self, prompts, batches):
        """Print a JSON object for each token: what the model thought of it, and of the likeliest ones."""
        for batch in batches:
            for row, _, _, drawn in self.events(batch, prompts):
                if drawn is None:
                    continue
                number, copy = batch[row]
                token = self.token(drawn.ids[row], drawn.logprobs[row])
                top = map(self.token, drawn.top_ids[row], drawn.top_logprobs[row])
                print(json.dumps({"prompt": number, "sample": copy, **token, "top": list(top)}), flush=True)

    def token(self, token, logprob):
        return {"token": self.tokenizer.decode([token]), "id": token, "logprob": logprob}

    def converse(self):
        """Ask for texts and continue them. Ctrl-C ends a text, Ctrl-D the program."""
        history = []  # [(role, text), ...]
        if not sys.stdin.isatty():  # a program speaks: it wants answers alone, and an error is the end
            for turn, line in enumerate(sys.stdin.buffer):
                text = decoded(line, f"message {turn + 1} of standard input")
                self.reply(text.removesuffix("\n").removesuffix("\r"), turn, history)
            return
        try:
            import readline  # noqa: F401  gives input() its history and line editing
        except ImportError:
            pass
        what = self.opening("Begin a text, and it is continued") or "Say something, and it is answered"
        print(f"{what}. Ctrl-C stops it; Ctrl-D ends the program.")
        for turn in itertools.count():
            try:
                self.reply(input("> "), turn, history)
            except (UserError, UnicodeDecodeError) as error:
                warn(str(error))
            except KeyboardInterrupt:
                print()
            except EOFError:
                print()
                return

    def reply(self, text, turn, history):
        """
        Continue what the user types. With --chat it follows `history`, [(role, text), ...], of which the
        oldest exchanges are dropped where they leave no room for an answer, and is added to it.
        """
        config, block_size = self.config, self.engine.gpt.config.block_size
        text = text or self.opening("\n")
        room = block_size - min(config.max_new_tokens, block_size // 4)
        first = 0  # of the messages that are kept
        prompt = encode(text, self.tokenizer, config, history)
        while len(prompt) > room and first < len(history):
            first += 2
            prompt = encode(text, self.tokenizer, config, history[first:])
        require_length(text, prompt, config, block_size)
        del history[:first]
        if config.beams and config.num_samples > 1:
            self.print_samples([text], [prompt], batched([prompt], config))
            return
        for copy in range(config.num_samples):
            said = []
            try:
                self.print_stream(text, prompt, (turn, copy), said)
            finally:  # what was stopped is remembered as far as it got
                if config.chat:
                    history += [("user", text), ("assistant", "".join(said))]
            if config.num_samples > 1:
                print(SEPARATOR)


def read_texts(config):
    """The texts to continue."""
    if not config.prompts:
        return [read_prompt(config.start or "\n")]
    content = read_file(config.prompts, f"--prompts={config.prompts}")
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if "" in lines:
        raise UserError(f"{config.prompts} has no text in line {lines.index('') + 1}: give one in each line")
    return lines


def encode(text, tokenizer, config, history=()):
    """The ids of a text to continue; of what the user says after `history`, where the model answers."""
    if tokenizer.kind != "chat":
        return tokenizer.encode(text, config.unknown).tolist()
    messages = [("system", config.system), *history, ("user", text)]
    return tokenizer.encode_chat(messages, config.unknown).tolist()


def require_length(text, ids, config, block_size):
    """Raise UserError where the model can't read the ids of a text."""
    if not 1 <= len(ids) <= block_size:
        text = config.system + text
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise UserError(
            f"the prompt {shown!r} has {len(ids)} tokens, but the model takes 1 to {block_size}: "
            + ("shorten it" if ids else "give a --start")
        )


def compiling_pays(batches, device, gpt, config):
    """Whether so much is to be written that compiling saves more time than it takes."""
    if len(batches) * config.max_new_tokens < COMPILE_FROM:
        return False
    return device.type == "cuda" or (device.type == "cpu" and is_large(gpt) and has_compiler())


def is_large(gpt):
    """Whether a model is too large for the caches of a CPU, which then waits for its weights from memory."""
    return gpt.num_parameters() > 16e6


def generation_dtype(name, device, gpt):
    """
    The precision of the weights. "auto" on a CPU: float32 for a small model, whose tokens wait for no memory.
    """
    if name == "auto" and device.type == "cpu" and not is_large(gpt):
        return torch.float32
    return find_dtype(name, device)


def read_prompt(start):
    """The prompt that --start names: the text itself, FILE:path, or - for standard input."""
    if start == "-":
        return decoded(sys.stdin.buffer.read(), "standard input")
    if start.startswith("FILE:"):
        return read_file(start.removeprefix("FILE:"), f"--start={start}")
    return start


def read_file(path, setting):
    """The text of a file that a setting names."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{setting} can't be read: {error.strerror}") from None
    return decoded(content, path)


def decoded(content, name):
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start})"
        ) from None


def load(config):
    """(model ready to write, tokenizer, name of the set it was trained on or "") of the settings."""
    path, contents = checkpoint.chosen(config)
    try:
        gpt = GPT.from_weights(GPTConfig.from_args(contents["model_args"]), contents["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no weights of a GPT: {error}") from None
    trained_on = str(contents.get("config", {}).get("dataset", ""))
    return gpt.eval(), checkpoint.tokenizer_of(contents), trained_on


if __name__ == "__main__":
    run(main)
