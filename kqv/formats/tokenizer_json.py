"""
Our tokenizers <-> the `tokenizer.json` of Hugging Face; and what GGUF files need too: pieces, merges, the
pattern that cuts a text into words, special ids. No package is needed to read or write a tokenizer.json.

Those programs write a piece as a string, with one printable character for each byte, as GPT-2 does
(`bytes_of_letters`).
"""

import json
from hashlib import sha256
from types import SimpleNamespace

from kqv.errors import UserError, first_line
from kqv.text import tokenizers
from kqv.text.tokenizers import PATTERNS, ChatTokenizer

END = "<|endoftext|>"


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


# The SHA-256 of GPT-2's pieces, one a line.
GPT2_PIECES = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


# Parts of a tokenizer.json that change ids and that our tokenizers don't have.
UNSUPPORTED = ("normalizer", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


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
    """The tokenizer of plain text: a chat tokenizer's base, or the tokenizer itself."""
    return tokenizer.base if tokenizer.kind == "chat" else tokenizer


def pieces_of(tokenizer):
    """The bytes of each id of plain text, in the order of the ids. Special ids come after them."""
    base = base_of(tokenizer)
    count = base.vocab_size - (base.separator is not None)
    return [base.decode_bytes([number]) for number in range(count)]


def specials_of(tokenizer):
    """{name: id} of the special ids, which no text is encoded to, in the order of the ids."""
    specials = {} if tokenizer.separator is None else {END: tokenizer.separator}
    if tokenizer.kind == "chat":
        specials |= {f"<|{role}|>": mark for role, mark in zip(tokenizer.roles, tokenizer.marks, strict=True)}
    return dict(sorted(specials.items(), key=lambda item: item[1]))


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
    base, specials = base_of(tokenizer), specials_of(tokenizer)
    pieces = pieces_of(tokenizer)
    if base.kind == "char":
        names, merges, words, decoder = list(base.chars), [], None, {"type": "Fuse"}
    else:
        names = [spelled(piece) for piece in pieces]
        merges = [[spelled(left), spelled(right)] for left, right in merges_of(pieces)]
        words, decoder = words_of(pattern_of(base)), BYTES
    require_unique([*names, *specials])
    as_it_is = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": name, **as_it_is, "special": True} for name, number in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": words,
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
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids
        "model_max_length": block_size,
        # No text is encoded to a special id, except for chats: their template writes the marks as text.
        "split_special_tokens": tokenizer.kind != "chat",
    }
    if specials:
        settings |= {"bos_token": END, "eos_token": END, "pad_token": END}
    if tokenizer.kind == "chat":
        settings["additional_special_tokens"] = [name for name in specials if name != END]
        settings["chat_template"] = CHAT_TEMPLATE
    return {"tokenizer.json": to_text(content), "tokenizer_config.json": to_text(settings)}


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


def from_huggingface(folder, end, rows):
    """
    (definition, order) of the tokenizer in `folder`. `definition` is the `to_json` of one of our tokenizers
    that reads and writes texts in the same way; `order` lists their ids in the order of ours, None if the ids
    are the same. `end` is the id that ends a text, `rows` the number of ids that the weights have.

    (None, None) if the folder has no tokenizer. If none of ours does the same, the definition is
    {"kind": "foreign", "why": reason}, which `loading.tokenizer_of` refuses.
    """
    try:
        content = read(folder)
        return (None, None) if content is None else definition_of(content, end, rows)
    except (Foreign, UserError) as error:
        why = first_line(error)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"it is damaged: {type(error).__name__} {first_line(error)}"
    return {"kind": "foreign", "why": f"{folder} has a tokenizer that none of kqv's is like ({why})"}, None


class Foreign(Exception):
    """A tokenizer does what none of ours does; the message says what."""


def read(folder):
    """
    The content of a folder's tokenizer.json, or of its older form, vocab.json and merges.txt; None if it has
    no tokenizer. Raises Foreign for one in another form.
    """
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        return json.loads(whole.read_text("utf-8"))
    if vocabulary.exists() and merges.exists():
        model = {"vocab": json.loads(vocabulary.read_text("utf-8")), "merges": []}
        lines = merges.read_text("utf-8").split("\n")
        model["merges"] = [line for line in lines if line and not line.startswith("#version")]
        specials = [{"content": name, "id": number} for name, number in model["vocab"].items() if name == END]
        return {"model": model, "pre_tokenizer": {**BYTES, "use_regex": True}, "added_tokens": specials}
    for name in ("vocab.txt", "vocab.json", "spiece.model"):
        if (folder / name).exists():
            raise Foreign(name)
    return None


def definition_of(content, end, rows):
    """
    (definition, order), as `from_huggingface`, of a tokenizer.json's content. Raises Foreign or UserError if
    none of our tokenizers does the same, and many other errors if the content is damaged.
    """
    model, specials = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
    unsupported = [name for name in UNSUPPORTED if model.get(name) or content.get(name)]
    if model.get("type", "BPE") != "BPE" or unsupported:
        raise Foreign(", ".join([model.get("type", "BPE"), *unsupported]))
    names = sorted(set(model["vocab"]) - set(specials), key=model["vocab"].get)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    base = base_definition(content.get("pre_tokenizer"), names, merges)
    if base["kind"] != "gpt2":
        tokenizers.from_json(base)  # raises UserError if a byte is missing or a piece is there twice
    ends = [] if base["kind"] == "char" else [number for number in specials.values() if number == end]
    if base["kind"] != "char" and not ends:
        raise Foreign(f"the end of a text, {end}, is none of {specials}")
    order = [model["vocab"][name] for name in names] + ends
    if set(order) - set(range(rows)) or len(set(order)) < len(order):
        raise Foreign(f"it has {len(order)} ids, and not all are within 0 to {rows - 1}, or two are the same")
    shape = SimpleNamespace(kind="any", vocab_size=len(order), separator=len(names) if ends else None)
    if specials == specials_of(ChatTokenizer(shape)) and order == list(range(len(order))):
        return {"kind": "chat", "base": base}, None
    order += sorted(set(range(rows)) - set(order))  # the other special ids: not used by any text
    return base, None if order == list(range(rows)) else order


def base_definition(words, names, merges):
    """The definition of a tokenizer from its pre_tokenizer, pieces and merges. Raises Foreign."""
    if words is None and not merges and all(len(name) == 1 for name in names):
        return {"kind": "char", "chars": "".join(names)}
    if words is None:
        raise Foreign("its pieces go across words")
    letters = tokenizers.bytes_of_letters()
    pieces = [bytes(letters[letter] for letter in name) for name in names]
    if plain(words) == BYTES and not merges and pieces == [bytes([byte]) for byte in range(256)]:
        return {"kind": "byte"}
    known = [pattern for pattern in PATTERNS.values() if plain(words) == plain(words_of(pattern))]
    if not known:
        raise Foreign("it cuts words in another way")
    number = {piece: number for number, piece in enumerate(names)}
    made = [number[left + right] for left, right in merges]
    if made != sorted(made) or {number for number, piece in enumerate(pieces) if len(piece) > 1} != set(made):
        raise Foreign("its merges come in another order than its pieces")
    if known == [PATTERNS["gpt-2"]] and sha256("\n".join(names).encode()).hexdigest() == GPT2_PIECES:
        return {"kind": "gpt2"}
    return {"kind": "bpe", "pattern": known[0], "pieces": [piece.decode("latin-1") for piece in pieces]}


def plain(words):
    """A pre_tokenizer without what does not change ids. Older files leave out `use_regex`."""
    if words["type"] == "Sequence":
        return [plain(part) for part in words["pretokenizers"]]
    return {"use_regex": True, **words, "trim_offsets": True} if words["type"] == "ByteLevel" else words
