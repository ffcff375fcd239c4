"""Ids -> text, as a stream."""

import codecs


class TextStream:
    """
    Ids, one at a time -> text: a character comes when all of its bytes have come.

    The text ends at an id that ends a text, or before the first of the strings `stops` that is complete; a
    token may hold more than that string. Text that may be the beginning of such a string is held back until
    it is known.
    """

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.ends = tokenizer.ends
        self.held = ""
        self.ended = None  # why the text has ended: "end_of_text" or "stop"

    def feed(self, token):
        """The text that is certain now that `token` has come."""
        if self.ended:
            return ""
        if token in self.ends:
            text = self.finish()
            self.ended = self.ended or "end_of_text"
            return text
        self.held += self.decoder.decode(self.tokenizer.decode_bytes([token]))
        return self.release()

    def finish(self):
        """The text that was held back, when no more tokens come."""
        if self.ended:
            return ""
        self.held += self.decoder.decode(b"", final=True)
        text, self.held = self.release() + self.held, ""
        return text

    def release(self):
        """The part of the held text that no stop can take back; the text before a stop that is complete."""
        found = [(start + len(stop), start) for stop in self.stops if (start := self.held.find(stop)) >= 0]
        if found:
            _, end = min(found)  # the first to be complete; of several at once the longest
            text, self.held, self.ended = self.held[:end], "", "stop"
            return text
        end = len(self.held) - max(map(self.begun, self.stops), default=0)
        text, self.held = self.held[:end], self.held[end:]
        return text

    def begun(self, stop):
        """How many characters of `stop` may have begun at the end of what is held."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self.held.endswith(stop[:n])), 0)
