"""
What every tokenizer offers, and the two simplest: characters and bytes.

    tokenizer.encode(text) -> (T,) array of ids     tokenizer.vocab_size  how many ids there are
    tokenizer.decode(ids)  -> text                  tokenizer.separator   the id between documents, or None
    tokenizer.to_json()    -> plain dict, for meta.json and checkpoints; from_json() is its inverse

Ids stand for UTF-8 bytes, so `decode_bytes` is the exact inverse of `encode`; the ids of one character may be
several, and `TextStream` joins them. No text, whatever it says, is encoded to a special id.
"""

import re

import numpy as np

from kqv.errors import UserError

END = "<|endoftext|>"  # the name of the separator

SURROGATE = re.compile("[\ud800-\udfff]")


class Tokenizer:
    kind: str  # its name in meta.json and checkpoints
    spelling: str  # what a user writes for it: --tokenizer=bpe:N
    help: str  # one line
    is_ours = True  # whether the ids, and how many rows of weights they need, are for us to say
    learns_from = "train"  # which text `trained_on` reads: that of the split "train", or of "all" splits
    vocab_size: int
    separator: int | None = None
    stores_marks = False  # of conversations: whether a set has their marks in files of their own
    begin: tuple = ()  # the ids before every text
    pattern: str | None = None  # the regular expression that cuts a text into words; None: nothing is cut

    @classmethod
    def options(cls, name):
        """
        The keyword arguments of `trained_on` that the user's `name` for this tokenizer asks for; None where
        it is no name of this one.
        """
        return {} if name == cls.kind else None

    @classmethod
    def trained_on(cls, texts):
        """The tokenizer whose vocabulary is learnt from an iterable of texts. Raises UserError."""
        return cls()

    @classmethod
    def from_json(cls, definition):
        """
        The tokenizer that `to_json` described; None where `definition` describes none. Its values are of the
        types that `tokenizers.DEFINITION` declares.
        """
        return cls()

    def to_json(self):
        return {"kind": self.kind}

    def encode(self, text, unknown="error"):
        """
        Text -> (T,) uint32 array of ids. Raises UserError for text that this tokenizer can't represent;
        unknown="skip" leaves out characters that it does not know.
        """
        raise NotImplementedError

    def encode_many(self, texts, unknown="error"):
        """A list of texts -> a list of what `encode` gives for each."""
        return [self.encode(text, unknown) for text in texts]

    def decode_bytes(self, ids):
        """Ids -> the UTF-8 bytes they stand for."""
        raise NotImplementedError

    def decode(self, ids):
        """Ids -> text; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @property
    def ends(self):
        """The ids that end a text while it is written."""
        return () if self.separator is None else (self.separator,)

    def specials(self):
        """{name: id} of the ids that no text is encoded to, in the order of the ids."""
        return {} if self.separator is None else {END: self.separator}


class CharTokenizer(Tokenizer):
    """One id a character; the vocabulary is the sorted set of characters of the training text."""

    kind = spelling = "char"
    help = "one id a character of the text"
    learns_from = "all"

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars)
        points = code_points(chars)
        # code point -> id; the last entry: everything beyond
        self.id_of = np.full(int(points.max()) + 2, -1, np.int64)
        self.id_of[points] = np.arange(len(chars))

    @classmethod
    def trained_on(cls, texts):
        found = set()
        for text in texts:
            found.update(text)
        return cls("".join(sorted(found)))

    @classmethod
    def from_json(cls, definition):
        chars = definition.get("chars")
        if not chars or SURROGATE.search(chars) or len(set(chars)) < len(chars):
            return None
        return cls(chars)

    def to_json(self):
        return {"kind": self.kind, "chars": self.chars}

    def encode(self, text, unknown="error"):
        ids = self.id_of[np.minimum(code_points(text), len(self.id_of) - 1)]
        if unknown == "skip":
            ids = ids[ids >= 0]
        elif (ids < 0).any():
            position = int(np.argmax(ids < 0))
            shown = self.chars if len(self.chars) <= 100 else f"{self.chars[:100]}..."
            raise UserError(
                f"the character {text[position]!r} at position {position} is not in the tokenizer's "
                f"vocabulary of {self.vocab_size} characters: use only {shown!r}, or --unknown=skip"
            )
        return ids.astype(np.uint32)

    def decode_bytes(self, ids):
        return "".join(self.chars[i] for i in ids).encode("utf-8")


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; 256 is the end of a text."""

    kind = spelling = "byte"
    help = "the bytes of the text in UTF-8"
    vocab_size = 257
    separator = 256

    def encode(self, text, unknown="error"):
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)


def utf8(text):
    """
    The text's UTF-8 bytes. Raises UserError where it has none (a lone surrogate, as from bad bytes on a
    command line).
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text is not valid Unicode at position {error.start}: {text[error.start]!a}"
        ) from None
