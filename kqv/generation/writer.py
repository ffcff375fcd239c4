"""Continuations of texts: drawn, or found by beam search, in batches."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from kqv.generation.beams import beam_search
from kqv.generation.stream import Drawn, stream
from kqv.settings import setting
from kqv.text.text_stream import TextStream


@dataclass(frozen=True)
class TextSettings:
    """What to write"""

    num_samples: int = setting(1, "how many continuations of each text", at_least=1, below=10**6)
    max_new_tokens: int = setting(500, "tokens in each, at most", at_least=0, below=2**31)
    stop: tuple[str, ...] = setting(
        (), "a text ends before this string, with \\n in it also before a newline; may be given many times"
    )
    seed: int = setting(1337, "the same seed draws the same text", at_least=0, below=2**63)
    batch_size: int = setting(64, "texts that are written at once", at_least=1)
    format: Literal["text", "jsonl"] = setting("text", "jsonl: a JSON object a line for each continuation")
    raw: bool = setting(False, "control codes in a text go to the terminal, too; else it shows \\x1b for ESC")


class Piece(NamedTuple):
    """What one step adds to one text of a batch."""

    row: int  # of the batch
    text: str  # the characters that are certain now; may be empty
    end: str | None  # why the text has ended: "stop", "end_of_text"; None while it has not
    drawn: Drawn | None  # the step's tokens, of all rows; None for what was held back until the last step


def batched(prompts, config):
    """
    Batches: lists of at most batch_size keys (number of the prompt, number of its sample). Prompts of similar
    length are batched together, which keeps the padding small. Beam search finds all samples of a prompt at
    once: then each prompt has one key.
    """
    copies = 1 if config.beams else config.num_samples
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    keys = [(number, copy) for number in by_length for copy in range(copies)]
    return [keys[first : first + config.batch_size] for first in range(0, len(keys), config.batch_size)]


class Writer:
    """
    Continues prompts, lists of ids, as the settings ask.

    `config` is a TextSettings, a Sampling and a BeamSettings in one. A continuation's key is (number of the
    prompt, number of its sample).
    """

    def __init__(self, engine, tokenizer, config):
        self.engine, self.tokenizer, self.config = engine, tokenizer, config
        self.stops = with_newlines(config.stop)

    def records(self, prompts):
        """
        An iterator of (number of the prompt, number of the sample, record) over all continuations in order;
        each comes as soon as it and all before it are complete. A record is a dict: text, tokens, end, and of
        a beam search logprob and score; None where beam search found fewer texts than num_samples.
        """
        config, finished = self.config, {}
        order = ((number, copy) for number in range(len(prompts)) for copy in range(config.num_samples))
        key = next(order, None)
        for batch in batched(prompts, config):
            finished |= self.search(batch, prompts) if config.beams else self.draw(batch, prompts)
            while key in finished:
                yield *key, finished.pop(key)
                key = next(order, None)

    def pieces(self, prompt, key):
        """One continuation as an iterator of strings: one for each token drawn, or the best beam's text."""
        if self.config.beams:
            yield self.search([key], {key[0]: prompt})[key]["text"]
            return
        for piece in self.steps([key], {key[0]: prompt}):
            yield piece.text

    def steps(self, batch, prompts):
        """Draw the continuations of a batch of keys together: an iterator of Pieces."""
        config = self.config
        texts = [TextStream(self.tokenizer, self.stops) for _ in batch]
        for drawn in stream(
            self.engine,
            [prompts[number] for number, _ in batch],
            config.max_new_tokens,
            sampling=config,
            seed=config.seed,
            rows=[(copy, number) for number, copy in batch],
            vocab_size=self.tokenizer.vocab_size,
            exempt=self.tokenizer.specials().values(),
        ):
            for row, text in enumerate(texts):
                if not text.ended:
                    new = text.feed(drawn.ids[row])
                    yield Piece(row, new, text.ended, drawn)
            if all(text.ended for text in texts):
                return
        for row, text in enumerate(texts):
            if not text.ended:
                new = text.finish()
                yield Piece(row, new, text.ended, None)

    def draw(self, batch, prompts):
        """Draw the continuations of a batch of keys: {key: record}."""
        records = {key: {"text": "", "tokens": 0, "end": "length"} for key in batch}
        for piece in self.steps(batch, prompts):
            record = records[batch[piece.row]]
            record["text"] += piece.text
            record["tokens"] += piece.drawn is not None
            record["end"] = piece.end or "length"
        return records

    def search(self, batch, prompts):
        """Find the continuations of a batch of keys by beam search, sample 0 the best: {key: record}."""
        config = self.config
        found = beam_search(
            self.engine,
            [prompts[number] for number, _ in batch],
            config.max_new_tokens,
            config.beams,
            config.length_penalty,
            self.ends,
            self.tokenizer.vocab_size,
        )
        # A small vocabulary or max_new_tokens=0 may give fewer texts than are asked for.
        records = {(number, copy): None for number, _ in batch for copy in range(config.num_samples)}
        for (number, _), hypotheses in zip(batch, found, strict=True):
            for copy, hypothesis in enumerate(hypotheses[: config.num_samples]):
                text = TextStream(self.tokenizer, self.stops)
                records[number, copy] = {
                    "text": "".join(map(text.feed, hypothesis.ids)) + text.finish(),
                    "tokens": len(hypothesis.ids),
                    "end": text.ended or "length",
                    "logprob": hypothesis.logprob,
                    "score": hypothesis.score,
                }
        return records

    def ends(self, ids):
        """Whether the last of the ids is one of the tokenizer's `ends`, or completes a --stop string."""
        if ids[-1] in self.tokenizer.ends:
            return True
        text = self.tokenizer.decode(ids) if self.stops else ""
        return any(stop in text for stop in self.stops)


def with_newlines(stops):
    """The stop strings. One with a typed \\n or \\t is there twice: as typed, and with a newline or tab."""
    meant = (stop.replace("\\n", "\n").replace("\\t", "\t") for stop in stops)
    return tuple(dict.fromkeys((*stops, *meant)))
