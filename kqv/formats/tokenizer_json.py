"""
Our tokenizers <-> the `tokenizer.json` of Hugging Face, and what it shares with llama.cpp: pieces, the merges
that make them, the pattern that cuts words, special ids. No package is needed to read or write one.

A byte is spelled as one printable character there, GPT-2's way (`bytes_of_letters`), so pieces are strings.
"""

import json
from hashlib import sha256
from types import SimpleNamespace

from kqv.errors import UserError, first_line
from kqv.text import tokenizers
from kqv.text.tokenizers import PATTERNS, ChatTokenizer

END = "<|endoftext|>"


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


# The sha256 of GPT-2's pieces, a line each.
GPT2_PIECES = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


# What a tokenizer.json may have and ours have nothing like.
CHANGES = ("normalizer", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")


# In Jinja, what ChatTokenizer.encode_chat says of messages.
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
    """The tokenizer of a text's ids: of conversations, the one beneath."""
    return tokenizer.base if tokenizer.kind == "chat" else tokenizer


def pieces_of(tokenizer):
    """The bytes that each id of text stands for, in the order of the ids; special ones come behind them."""
    base = base_of(tokenizer)
    count = base.vocab_size - (base.separator is not None)
    return [base.decode_bytes([number]) for number in range(count)]


def specials_of(tokenizer):
    """{name: id} of the ids that no text has, in the order of the ids."""
    specials = {} if tokenizer.separator is None else {END: tokenizer.separator}
    if tokenizer.kind == "chat":
        specials |= {f"<|{role}|>": mark for role, mark in zip(tokenizer.roles, tokenizer.marks, strict=True)}
    return dict(sorted(specials.items(), key=lambda item: item[1]))


def spelled(piece):
    """Bytes -> a string of as many printable characters."""
    return piece.decode("latin-1").translate(LETTERS)


LETTERS = {byte: letter for letter, byte in tokenizers.bytes_of_letters().items()}


def merges_of(pieces):
    """
    [(left, right), ...], earliest first: every way to make one of `pieces` (bytes) of two others.

    tiktoken merges any two neighbours that make a piece together; a list that had one way for each piece, as
    training writes it, would leave out some.
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
    """Raise UserError where two ids have one name: other programs know an id by it."""
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(
                f"two ids of the tokenizer stand for {name!r}, and an export can't tell them apart"
            )
        seen.add(name)


def to_huggingface(tokenizer, block_size):
    """{file name: content} for `AutoTokenizer.from_pretrained`. Raises UserError."""
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
            "ignore_merges": True,  # a word that is a piece is that piece, as for tiktoken
            "vocab": {name: number for number, name in enumerate(names)},
            "merges": merges,
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # token types would be added
        "model_max_length": block_size,
        # No text is read as a special id; but a chat's template writes its marks as text.
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
    """How tokenizer.json says where a text is cut before pieces are looked for; None: nowhere."""
    if pattern is None:
        return BYTES
    if pattern == PATTERNS["gpt-2"]:
        return {**BYTES, "use_regex": True}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, BYTES]}


def from_huggingface(folder, end, rows):
    """
    What the files in `folder` say, as (definition, order): the `to_json` of a tokenizer of ours that reads
    and writes texts the same way, and their ids in the order of ours, where ours has others. `end` is the id
    that ends a text, `rows` how many ids the weights have.

    (None, None) where there are no files. Where none of ours does the same, the definition is that of no
    tokenizer: {"kind": "foreign", "why": ...}.
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
    """Why a tokenizer is like none of ours."""


def read(folder):
    """The content of a folder's tokenizer.json, or of its older form in two files; None without either."""
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
    """The same for a tokenizer.json's content. Raises Foreign, and nearly anything for what is not one."""
    model, specials = content["model"], {token["content"]: token["id"] for token in content["added_tokens"]}
    changes = [name for name in CHANGES if model.get(name) or content.get(name)]
    if model.get("type", "BPE") != "BPE" or changes:
        raise Foreign(", ".join([model.get("type", "BPE"), *changes]))
    names = sorted(set(model["vocab"]) - set(specials), key=model["vocab"].get)
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    base = base_definition(content.get("pre_tokenizer"), names, merges)
    if base["kind"] != "gpt2":
        tokenizers.from_json(base)  # raises UserError where a byte is missing, or a piece is there twice
    ends = [] if base["kind"] == "char" else [number for number in specials.values() if number == end]
    if base["kind"] != "char" and not ends:
        raise Foreign(f"the end of a text, {end}, is none of {specials}")
    order = [model["vocab"][name] for name in names] + ends
    if set(order) - set(range(rows)) or len(set(order)) < len(order):
        raise Foreign(f"it has {len(order)} ids, and not all are within 0 to {rows - 1}, or two are the same")
    shape = SimpleNamespace(kind="any", vocab_size=len(order), separator=len(names) if ends else None)
    if specials == specials_of(ChatTokenizer(shape)) and order == list(range(len(order))):
        return {"kind": "chat", "base": base}, None
    order += sorted(set(range(rows)) - set(order))  # ids that no text has: never read, never written
    return base, None if order == list(range(rows)) else order


def base_definition(words, names, merges):
    """The definition of the tokenizer that cuts a text into `words` and makes these pieces of them."""
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
    """A pre_tokenizer, told apart by what changes ids alone; older files leave `use_regex` out."""
    if words["type"] == "Sequence":
        return [plain(part) for part in words["pretokenizers"]]
    return {"use_regex": True, **words, "trim_offsets": True} if words["type"] == "ByteLevel" else words
