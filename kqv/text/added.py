"""Words that were added to a tokenizer after it was made."""

import re
from itertools import groupby

import numpy as np

from kqv.text.tokenizer import SURROGATE, Tokenizer


class AddedTokenizer(Tokenizer):
    """
    Another tokenizer, `base`, and `words` {text: id}: each is one id wherever it is in a text, even inside of
    a longer word. Of words that begin at the same place, the longest counts. The text between them is the
    base's. Hugging Face calls such words added tokens that are not special.

    A word that the base has as one id keeps that id; the others have ids after those of the base.
    """

    kind = "added"

    def __init__(self, base, words):
        self.base, self.words = base, words
        self.separator, self.pattern = base.separator, base.pattern
        self.vocab_size = max(base.vocab_size, *(number + 1 for number in words.values()))
        longest_first = sorted(words, key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.bytes_of = {number: word.encode() for word, number in words.items()}

    @classmethod
    def over(cls, base, definition):
        """The tokenizer that `to_json` described, over its base; None where `definition` describes none."""
        words = definition.get("words")
        if not words:
            return None
        for word, number in words.items():
            if not word or SURROGATE.search(word):
                return None
            if number < base.vocab_size and base.decode_bytes([number]) != word.encode():
                return None
        new = sorted(number for number in words.values() if number >= base.vocab_size)
        if new != list(range(base.vocab_size, base.vocab_size + len(new))):
            return None
        return cls(base, words)

    def encode(self, text, unknown="error"):
        parts = self.cut.split(text)  # text, word, text, word, ..., text
        ids = [
            [self.words[part]] if place % 2 else self.base.encode(part, unknown)
            for place, part in enumerate(parts)
        ]
        return np.concatenate(ids).astype(np.uint32)

    def decode_bytes(self, ids):
        parts = []
        for is_word, group in groupby(map(int, ids), self.bytes_of.__contains__):
            some = list(group)
            parts.append(b"".join(map(self.bytes_of.get, some)) if is_word else self.base.decode_bytes(some))
        return b"".join(parts)

    def to_json(self):
        return {"kind": self.kind, "base": self.base.to_json(), "words": self.words}
