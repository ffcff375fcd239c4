"""
A tokenizer of another program, kept whole: its tokenizer.json, which the `tokenizers` package reads.

No id, no piece and no rule of it is changed: its files go into sets and checkpoints, and out again.
"""

import json
import re
from functools import cached_property, lru_cache

import numpy as np

from kqv.errors import UserError, first_line
from kqv.forms import shown
from kqv.text import tokenizer_files
from kqv.text.bpe import bytes_of_letters
from kqv.text.foreign_code import within
from kqv.text.tokenizer import Tokenizer, utf8
from kqv.text.tokenizer_files import FILES, TEMPLATE, WHOLE

# The parts of a decoder with which the bytes of a piece alone can be known.
DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip")

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # a piece that is one byte, where the decoder has ByteFallback

LETTERS = bytes_of_letters()

TIME_LIMIT = 120  # seconds for about a megabyte of text, which takes less than one


class HuggingFaceTokenizer(Tokenizer):
    """
    `files`: {name: text} of FILES, tokenizer.json at the least. `ends`: the ids that end a text or an
    assistant's turn; the first is the separator.

    `settings` is what tokenizer_config.json says; `roles` are {"bos_token": name, ...}, the special tokens
    that have one; `chat_template` is a template in Jinja, or None. Raises UserError where the package is
    missing, or does not read the files.
    """

    kind = "huggingface"
    is_ours = False
    ends = ()

    def __init__(self, files, ends=()):
        self.files, self.ends = files, tuple(ends)
        self.separator = self.ends[0] if self.ends else None
        try:
            self.read()
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise unreadable(f"damaged: {type(error).__name__} {first_line(error, 120)}") from None
        self.known = dict.fromkeys(self.specials().values(), b"")  # {id: its bytes}, as far as asked for

    def read(self):
        """What the files say. Raises UserError, and other errors where they are damaged."""
        self.settings = tokenizer_files.settings_in(self.files)
        self.roles = tokenizer_files.roles_in(self.settings)
        self.chat_template = self.files.get(TEMPLATE) or tokenizer_files.template_in(self.settings)
        content = json.loads(self.files[WHOLE])
        numbers = tokenizer_files.numbers_in(content["model"])
        added = tokenizer_files.added_in(content, self.settings, numbers)
        for token in added:  # whatever ends a text is special, even if its token does not say so
            token["special"] |= token["id"] in self.ends
        content |= {"truncation": None, "padding": None, "added_tokens": added}
        numbers |= {token["content"]: token["id"] for token in added}
        self.words = {token["id"]: token["content"] for token in added if not token["special"]}
        self.vocab_size = max(numbers.values()) + 1
        self.begin = tuple(tokenizer_files.begin_in(content))
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        names = {number: name for name, number in numbers.items()}
        for number in (*self.ends, *self.begin):
            if number not in names:
                raise unreadable(f"without the id {shown(number)}, which begins or ends a text")
            self.special.setdefault(names[number], number)
        unknown = numbers.get(tokenizer_files.unknown_in(content["model"]))
        self.never = [*self.special.values(), self.vocab_size, *([] if unknown is None else [unknown])]
        self.decoders = {
            part["type"] for part in tokenizer_files.parts_of(content.get("decoder"), "decoders")
        }
        if not self.decoders or self.decoders - set(DECODERS):
            raise unreadable(f"with the decoder {', '.join(sorted(self.decoders)) or 'none'}")
        if content["model"].get("dropout"):
            raise unreadable("with a dropout, which gives a text other ids each time")
        self.content = content
        for_texts = tokenizer_files.for_texts(content, set(self.special), self.vocab_size)
        self.plain = loaded(json.dumps(for_texts), True)
        for token in added:
            found = self.plain.token_to_id(token["content"])
            if found not in (token["id"], None):
                raise unreadable(f"with the id {token['id']} for {token['content']!r}, which gets {found}")

    @classmethod
    def from_json(cls, definition):
        files = definition.get("files", {})
        return cls(files, definition.get("ends", ())) if WHOLE in files and set(files) <= set(FILES) else None

    def to_json(self):
        return {"kind": self.kind, "files": self.files, "ends": list(self.ends)}

    def specials(self):
        return dict(sorted(self.special.items(), key=lambda special: special[1]))

    @cached_property
    def marked(self):
        """The package's tokenizer that takes the names of special ids in a text for them."""
        return loaded(json.dumps(self.content), False)

    def encode(self, text, unknown="error"):
        return self.encode_many([text], unknown)[0]

    def encode_many(self, texts, unknown="error"):
        for text in texts:
            utf8(text)  # raises UserError
        found = [np.array(ids, np.uint32) for ids in encoded(self.plain, texts)]
        for number, ids in enumerate(found):
            is_lost = np.isin(ids, self.never)
            if is_lost.any() and unknown == "error":
                raise self.lacking(texts[number])
            found[number] = ids[~is_lost]
        return found

    def lacking(self, text):
        """The UserError for a text with a part that has no id."""
        found = self.plain.encode(text, add_special_tokens=False)
        start, end = next(
            offsets for id, offsets in zip(found.ids, found.offsets, strict=True) if id in self.never
        )
        return UserError(
            f"the tokenizer has no id for {text[start:end]!r} at position {start}: leave it out, or "
            "--unknown=skip"
        )

    def encode_marked(self, text):
        """Text in which the names of special ids stand for them, as a chat template writes it -> (T,) ids."""
        utf8(text)
        (ids,) = encoded(self.marked, [text])
        return np.array(ids, np.uint32)

    def decode_bytes(self, ids):
        return b"".join(self.bytes_of(int(number)) for number in ids)

    def bytes_of(self, number):
        if number not in self.known:
            self.known[number] = self.bytes_of_piece(number)
        return self.known[number]

    def bytes_of_piece(self, number):
        piece = self.words.get(number)
        if piece is not None:
            return piece.encode()
        piece = self.plain.id_to_token(number)
        if piece is None or number >= self.vocab_size:
            return b""
        if "ByteLevel" in self.decoders:
            try:
                return bytes(LETTERS[letter] for letter in piece)
            except KeyError:
                return piece.encode()
        if "ByteFallback" in self.decoders and (byte := BYTE.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        return self.plain.decoder.decode(["a", piece, "a"])[1:-1].encode()  # as in the middle of a text

    def decode(self, ids):
        """
        The text of all ids of a text, as transformers gives it: without the blank that some tokenizers add at
        the beginning of a text.
        """
        special = set(self.special.values())
        plain = [int(number) for number in ids if number not in special and number < self.vocab_size]
        return self.plain.decode(plain, skip_special_tokens=False)


def encoded(tokenizer, texts):
    """The ids of each of the texts, of `tokenizers.Tokenizer`. Raises UserError."""
    return [one.ids for one in encodings(tokenizer.encode_batch_fast, texts)]


def encodings(encode, texts):
    """
    What a method of `tokenizers.Tokenizer`, `encode`, gives for the texts: `encode_batch` also gives where
    each id stands in its text. Raises UserError.
    """
    try:
        return within(TIME_LIMIT, lambda: encode(texts, add_special_tokens=False))
    except TimeoutError:
        raise UserError(
            f"the tokenizer took more than {TIME_LIMIT} s for {sum(map(len, texts)):,} characters: its "
            "tokenizer.json cuts words by an expression that some texts take for ever"
        ) from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # also a panic in Rust, which is no Exception
        raise UserError(
            f"the tokenizer's tokenizer.json fails on this text: {first_line(error, 120)}"
        ) from None


@lru_cache(maxsize=4)
def loaded(content, encodes_special):
    """
    The package's Tokenizer of a tokenizer.json; with `encodes_special` it takes no part of a text for a
    special id. Raises UserError.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise UserError("this model's tokenizer needs: pip install tokenizers") from None
    try:
        tokenizer = within(TIME_LIMIT, lambda: Tokenizer.from_str(content))
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:  # the package raises Exception itself, and panics
        raise unreadable(first_line(error, 120)) from None
    tokenizer.encode_special_tokens = encodes_special
    return tokenizer


def unreadable(why):
    return UserError(
        f"the tokenizer.json is not one that kqv can use ({why}): use a model with another, as those of "
        "Llama, Qwen or SmolLM"
    )
