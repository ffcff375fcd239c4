"""
Our tokenizers -> the `tokenizer.json` of Hugging Face; and what GGUF files need too: pieces, merges, the
pattern that cuts a text into words, added words. No package is needed to write a tokenizer.json; the way back
is in tokenizer_reading.py.

Those programs write a piece as a string, with one printable character for each byte, as GPT-2 does
(`bytes_of_letters`).
"""

import json

from kqv.errors import UserError
from kqv.text import tokenizers
from kqv.text.tokenizer import END
from kqv.text.tokenizer_files import SETTINGS, WHOLE
from kqv.text.tokenizers import PATTERNS

OURS = "kqv"  # the key of tokenizer_config.json under which `to_json` of the tokenizer is kept

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}

# ChatTokenizer.encode_chat as a Jinja template.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|system|>{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role is system, user or assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
    "{% endfor %}"
    "{% if messages[-1]['role'] == 'user' %}<|assistant|>{% endif %}"
)


def base_of(tokenizer):
    """The tokenizer of plain text below a chat's marks and added words, or the tokenizer itself."""
    return base_of(tokenizer.base) if tokenizer.kind in ("chat", "added") else tokenizer


def added_to(tokenizer):
    """{word: id} of the words that were added to the tokenizer of plain text."""
    if tokenizer.kind == "chat":
        return added_to(tokenizer.base)
    return tokenizer.words if tokenizer.kind == "added" else {}


def pieces_of(tokenizer):
    """The bytes of each id of plain text, in the order of the ids. Special ids come after them."""
    base = base_of(tokenizer)
    count = base.vocab_size - (base.separator is not None)
    return [base.decode_bytes([number]) for number in range(count)]


def specials_of(tokenizer):
    """
    {name: id} of the special ids, in the order of the ids. Where the tokenizer has none, an id that ends a
    text comes after all others, as of `resize.with_end`: other programs need one.
    """
    return tokenizer.specials() or {END: tokenizer.vocab_size}


def spelled(piece):
    """Bytes -> a string with one printable character for each byte."""
    return piece.decode("latin-1").translate(LETTERS)


LETTERS = {byte: letter for letter, byte in tokenizers.bytes_of_letters().items()}


def merges_of(pieces):
    """
    [(left, right), ...], in order of priority: every way to make one of `pieces` (bytes) from two others.

    tiktoken merges any two neighbours whose bytes are a piece. The usual list has one merge for each piece,
    the one found in training, and would give other ids for some texts.
    """
    known = set(pieces)
    return [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]


def pattern_of(base):
    """The pattern that cuts a text into words for a tokenizer of pieces; None for bytes."""
    return {"byte": None, "gpt2": PATTERNS["gpt-2"]}.get(base.kind, getattr(base, "pattern", None))


def require_unique(names):
    """Raise UserError if two ids have the same name: other programs identify an id by its name."""
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(
                f"two ids of the tokenizer stand for {name!r}, and an export can't tell them apart"
            )
        seen.add(name)


def to_huggingface(tokenizer, block_size):
    """{file name: text} of the files that `AutoTokenizer.from_pretrained` reads. Raises UserError."""
    if tokenizer.kind == "huggingface":
        return tokenizer.files
    if tokenizer.stores_marks:  # it brought its chat template, which is in its files
        return tokenizer.base.files
    if base_of(tokenizer).kind == "huggingface":
        return with_marks(tokenizer)
    base, specials, words = base_of(tokenizer), specials_of(tokenizer), added_to(tokenizer)
    pieces = pieces_of(tokenizer)
    if base.kind == "char":
        names, merges, cut, decoder = list(base.chars), [], None, {"type": "Fuse"}
    else:
        names = [spelled(piece) for piece in pieces]
        merges = [[spelled(left), spelled(right)] for left, right in merges_of(pieces)]
        cut, decoder = words_of(pattern_of(base)), BYTES
    require_unique([*names, *specials, *(word for word, number in words.items() if number >= len(names))])
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **as_it_is}
            | {"normalized": name not in specials, "special": name in specials}
            for name, number in sorted({**words, **specials}.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a word that is a piece gets its id without merges, as in tiktoken
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids
        "model_max_length": block_size,
        # No text is encoded to a special id, except for chats: their template writes the marks as text.
        "split_special_tokens": tokenizer.kind != "chat",
        OURS: tokenizer.to_json(),
    }
    if tokenizer.kind == "chat":
        settings["additional_special_tokens"] = [name for name in specials if name != END]
        settings["chat_template"] = CHAT_TEMPLATE
    return {"tokenizer.json": to_text(content), "tokenizer_config.json": to_text(settings)}


def with_marks(chat):
    """`to_huggingface` for the marks of a chat over the tokenizer of another program."""
    base = chat.base
    end = next(name for name, number in chat.specials().items() if number == chat.separator)
    marks = {name: number for name, number in chat.specials().items() if number >= base.vocab_size}
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = json.loads(base.files[WHOLE])
    content["added_tokens"] += [{"id": id, "content": name, **as_it_is} for name, id in marks.items()]
    settings = {
        **json.loads(base.files.get(SETTINGS, "{}")),
        "eos_token": end,
        "chat_template": CHAT_TEMPLATE.replace(END, end),
        OURS: chat.to_json(),
    }
    return {WHOLE: to_text(content), SETTINGS: to_text(settings)}


def ids_of_roles(tokenizer):
    """{"eos_token_id": id, ...} for config.json: a list where several ids end a text."""
    base = base_of(tokenizer)
    if base.kind != "huggingface":
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), specials_of(tokenizer)[END])
    found = {f"{role}_id": base.special.get(base.roles.get(role)) for role in ("bos_token", "pad_token")}
    ends = list(tokenizer.ends)
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return {name: id for name, id in found.items() if id is not None}


def to_text(content):
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def words_of(pattern):
    """The `pre_tokenizer` that cuts a text into words by `pattern`; None: the text is one word."""
    if pattern is None:
        return BYTES
    if pattern == PATTERNS["gpt-2"]:
        return {**BYTES, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}
