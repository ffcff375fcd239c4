"""
All tokenizers: the one that a user names, that a set or a checkpoint describes, or that nanoGPT left.

A new one is a class like those below (see `Tokenizer`) and its entry in TOKENIZERS.
"""

from kqv.errors import UsageError, UserError
from kqv.forms import require_form, shown
from kqv.text.added import AddedTokenizer
from kqv.text.bpe import PATTERNS, BPETokenizer, GPT2Tokenizer, bytes_of_letters
from kqv.text.chat import ChatTokenizer  # noqa: F401
from kqv.text.huggingface import HuggingFaceTokenizer
from kqv.text.templated import over
from kqv.text.tokenizer import SURROGATE, ByteTokenizer, CharTokenizer

__all__ = ["PATTERNS", "bytes_of_letters"]  # what kqv.formats needs, too

PLAIN = {  # what `to_json` of a tokenizer without a base gives
    "kind": str,
    "chars?": str,
    "pattern?": str,
    "pieces?": [str],
    "words?": {str: range(2**31)},
    "files?": {str: str},
    "ends?": [range(2**31)],
    "why?": str,
}
DEFINITION = {**PLAIN, "base?": {**PLAIN, "base?": PLAIN}}  # of any: of chat, over added words, over another

TOKENIZERS = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, GPT2Tokenizer, BPETokenizer)}

OF_TEXTS = {**TOKENIZERS, "huggingface": HuggingFaceTokenizer}  # also those that no user names


def by_name(name):
    """
    The user's name for a tokenizer -> (class, keyword arguments of its `trained_on`). Raises UsageError.
    """
    for cls in TOKENIZERS.values():
        options = cls.options(name)
        if options is not None:
            return cls, options
    known = ", ".join(f"{cls.spelling} ({cls.help})" for cls in TOKENIZERS.values())
    raise UsageError(f"--tokenizer={name} is none of {known}, nor smollm2, a prepared set or a checkpoint")


def listing():
    """What --tokenizer can be, for --help: a line for each kind."""
    lines = {cls.spelling: cls.help for cls in TOKENIZERS.values()}
    lines["smollm2"] = "that of SmolLM2, 49,152 ids"
    lines["a path"] = "the tokenizer of a prepared set, as data/plays, or of a checkpoint"
    return "\n".join(f"    {spelling:<18} {help}" for spelling, help in lines.items())


def from_json(definition):
    """The tokenizer that `to_json` described. Raises UserError where `definition` describes none."""
    require_definition(definition)
    tokenizer = None
    match definition:
        case {"kind": "chat", "base": {"kind": str(kind)} as base} if kind in (*OF_TEXTS, "added"):
            tokenizer = over(from_json(base))
        case {"kind": "added", "base": {"kind": str(kind)} as base} if kind in TOKENIZERS:
            tokenizer = AddedTokenizer.over(from_json(base), definition)
        case {"kind": str(kind)} if kind in OF_TEXTS:
            tokenizer = OF_TEXTS[kind].from_json(definition)
        case {"kind": "foreign", "why": why}:  # see kqv/formats/tokenizer_reading.py
            raise UserError(why)
    if tokenizer is None:
        raise unknown(shown(definition))
    return tokenizer


def require_definition(definition):
    """Raise UserError where a tokenizer's definition is not of the form of one."""
    try:
        require_form(definition, DEFINITION)
    except ValueError as error:
        raise unknown(f"({error})") from None


def unknown(what):
    return UserError(f"unknown tokenizer definition {what}: prepare the data again with prepare.py")


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
