"""Continues texts and prints them."""

import itertools
import json
import sys

from kqv.errors import UserError, warn
from kqv.generation.beams import beam_search
from kqv.generation.prompts import decoded
from kqv.generation.sampling import Sampling
from kqv.generation.stream import stream
from kqv.text.text_stream import TextStream

SEPARATOR = "---------------"


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
