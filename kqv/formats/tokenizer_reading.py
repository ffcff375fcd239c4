"""
The tokenizer of a Hugging Face folder -> one of ours that gives any text the same ids, as transformers reads
the folder. No package is needed. The other way round is in tokenizer_json.py.
"""

from hashlib import sha256
from types import SimpleNamespace

from kqv.errors import UserError, first_line
from kqv.files import read_file, read_json
from kqv.formats.tokenizer_json import BYTES, spelled, words_of
from kqv.text import tokenizers
from kqv.text.tokenizer import END
from kqv.text.tokenizers import PATTERNS, ChatTokenizer

# The files that a tokenizer may be in.
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
FILES += ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")

# The SHA-256 of GPT-2's pieces, one a line.
GPT2_PIECES = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"

# Parts of a tokenizer.json that change ids and that our tokenizers don't have.
UNSUPPORTED = ("normalizer", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")

# Keys of tokenizer_config.json that change ids if they are true.
SWITCHES = ("add_prefix_space", "add_bos_token", "add_eos_token", "do_lower_case")

# Classes of transformers that take a tokenizer.json as it is, and the one that cuts words in GPT-2's way
# whatever the file says. Without a class it is the latter, since the model is a GPT-2.
GENERAL = ("PreTrainedTokenizer", "TokenizersBackend")
GPT2S = "GPT2Tokenizer"

NAMES = tuple(f"{part}_token" for part in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("additional_special_tokens", "extra_special_tokens")

# Of an added token: it takes spaces along, or looks at its neighbours.
FLAGS = ("lstrip", "rstrip", "single_word")


class Foreign(Exception):
    """A tokenizer does what none of ours does; the message says what, `way_out` what to do."""

    def __init__(self, why, way_out="use a model with a byte-level BPE, as GPT-2's"):
        super().__init__(why)
        self.way_out = way_out


def from_huggingface(folder, config, rows):
    """
    (definition, order) of the tokenizer in `folder`. `definition` is the `to_json` of one of our tokenizers
    that reads and writes texts in the same way; `order` lists their ids in the order of ours, None if the ids
    are the same. `config` is what config.json says, `rows` the number of ids that the weights have.

    (None, None) if the folder has no tokenizer. If none of ours does the same, the definition is
    {"kind": "foreign", "why": reason and way out}, which `loading.tokenizer_of` refuses.
    """
    way_out = Foreign("").way_out
    try:
        content = read(folder, config)
        return (None, None) if content is None else definition_of(content, ends_of(folder, config), rows)
    except Foreign as error:
        why, way_out = first_line(error, 200), error.way_out
    except UserError as error:
        why = first_line(error)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        why = f"it is damaged: {type(error).__name__} {first_line(error)}"
    why = f"{folder} has a tokenizer that none of kqv's is like ({why}): {way_out}"
    return {"kind": "foreign", "why": why}, None


# What the files say


def read(folder, config):
    """
    The content of a folder's tokenizer.json, or of its older form, vocab.json and merges.txt, with the added
    tokens of the files beside it; None if it has no tokenizer. Raises Foreign for one in another form, and
    where transformers does something else than the file says.
    """
    settings = {**json_of(folder, "special_tokens_map.json"), **json_of(folder, "tokenizer_config.json")}
    named = [settings.get(name) for name in NAMES]
    for several in (settings.get(name) or () for name in LISTS):
        named += several.values() if isinstance(several, dict) else several
    named = [name_of(token) for token in named if token]
    cls = (settings.get("tokenizer_class") or config.get("tokenizer_class") or GPT2S).removesuffix("Fast")
    wrong = [f"its {name} is {settings[name]}" for name in SWITCHES if settings.get(name)]
    wrong += [] if cls in (*GENERAL, GPT2S) else [f"its tokenizer_class is {cls}"]
    if wrong:
        raise Foreign(", ".join(wrong))
    whole, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        content = read_json(whole)
    elif vocabulary.exists() and merges.exists():
        lines = read_file(merges).decode("utf-8").split("\n")
        model = {"vocab": read_json(vocabulary)}
        model["merges"] = [line for line in lines if line and not line.startswith("#version")]
        added = json_of(folder, "added_tokens.json")
        tokens = [token(name, number, name in named) for name, number in added.items()]
        content = {"model": model, "pre_tokenizer": {**BYTES, "use_regex": True}, "added_tokens": tokens}
        cls = GPT2S
    else:
        for name in ("vocab.txt", "vocab.json", "spiece.model", "tokenizer.model"):
            if (folder / name).exists():
                raise Foreign(name)
        return None
    if cls == GPT2S:
        cut = content.get("pre_tokenizer")
        if not cut or plain(cut) != plain(words_of(PATTERNS["gpt-2"])):
            raise Foreign(
                f"it cuts words in another way than its tokenizer_class {GPT2S}",
                "if it is right, set tokenizer_class to PreTrainedTokenizerFast in its tokenizer_config.json",
            )
        content = {**content, "model": {**content["model"], "ignore_merges": False}, "decoder": BYTES}
        named.append(END)
    known = {token["content"]: token for token in content["added_tokens"]}
    for number, other in (settings.get("added_tokens_decoder") or {}).items():
        other = {**token(other["content"], int(number)), **other}
        mine = known.setdefault(other["content"], other)
        differ = [key for key in other if mine.get(key, other[key]) != other[key]]
        if differ:
            raise Foreign(f"tokenizer_config.json has another {differ[0]} of {other['content']!r}")
    return {**content, "added_tokens": sorted(known.values(), key=lambda token: token["id"]), "named": named}


def json_of(folder, name):
    """A file's content, a dict; an empty one if the file is not there."""
    path = folder / name
    content = read_json(path) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"in {name}")
    return content


def token(name, number, special=False):
    """An added token as tokenizer.json has it."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": number, "content": name, **plain, "special": special}


def name_of(token):
    """The name of a special token, which files write as a text or as a dict."""
    return token if isinstance(token, str) else token["content"]


def ends_of(folder, config):
    """What may end a text, as ids or names, the most reliable first."""
    found = [
        json_of(folder, "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id", 50256),
        json_of(folder, "tokenizer_config.json").get("eos_token"),
        json_of(folder, "special_tokens_map.json").get("eos_token"),
    ]
    ends = []
    for end in found:
        ends += end if isinstance(end, list) else [name_of(end)] if isinstance(end, dict) else [end]
    return [end for end in ends if end is not None]


# The same as one of ours


def definition_of(content, ends, rows):
    """
    (definition, order), as `from_huggingface`, of what `read` gives. Raises Foreign or UserError if none of
    our tokenizers does the same, and many other errors if the content is damaged.
    """
    model, processor = content["model"], content.get("post_processor")
    unsupported = [name for name in UNSUPPORTED if model.get(name) or content.get(name)]
    if model.get("type", "BPE") != "BPE" or unsupported:
        raise Foreign(", ".join([model.get("type", "BPE"), *unsupported]))
    if not keeps_ids(processor):
        raise Foreign("its post_processor adds special ids to every text")
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    pieces, words, specials, end = sorted_out(content, {left + right for left, right in merges}, ends)
    base = base_definition(content.get("pre_tokenizer"), pieces, merges)
    if base["kind"] == "char":  # where an added letter changes nothing
        end, words = None, {name: number for name, number in words.items() if name not in pieces}
    elif wrong := [name for name in words if name in pieces and spelled(name.encode()) != name]:
        raise Foreign(f"its added token {wrong[0]!r} is the name of a piece")
    elif end is None:
        raise Foreign(
            f"its eos_token_id is none of its special ids {specials}"[:150],
            "set it in config.json to the id that ends a text",
        )
    decoder = (content.get("decoder") or {}).get("type")
    if decoder != ("Fuse" if base["kind"] == "char" else "ByteLevel"):
        raise Foreign(f"its decoder is {decoder}")
    if base["kind"] != "gpt2":
        tokenizers.from_json(base)  # raises UserError if a byte is missing or a piece is there twice
        require_whole(pieces, merges)
    numbers = model["vocab"] | words
    new = sorted({*words.values()} - {numbers[name] for name in pieces})
    order = [numbers[name] for name in pieces] + ([] if end is None else [end]) + new
    if set(order) - set(range(rows)) or len(set(order)) < len(order):
        raise Foreign(
            f"it has ids up to {max(order)}, but the weights have {rows} rows, or two ids are the same",
            "model.resize_token_embeddings(len(tokenizer)) in transformers makes room",
        )
    if words:
        place = {number: position for position, number in enumerate(order)}
        base = {"kind": "added", "base": base, "words": {name: place[numbers[name]] for name in words}}
    separator = None if end is None else len(pieces)
    shape = SimpleNamespace(kind="any", vocab_size=len(order), separator=separator)
    if specials == ChatTokenizer(shape).specials() and order == list(range(len(order))):
        return {"kind": "chat", "base": base}, None
    order += sorted(set(range(rows)) - set(order))  # the other special ids: not used by any text
    return base, None if order == list(range(rows)) else order


def keeps_ids(processor):
    """Whether a `post_processor` adds no ids to a text."""
    match processor:
        case None | {"type": "ByteLevel"} | {"type": "TemplateProcessing", "single": [{"Sequence": _}]}:
            return True
        case {"type": "Sequence", "processors": parts}:
            return all(map(keeps_ids, parts))
    return False


def sorted_out(content, made, ends):
    """
    The names of a vocabulary: (those of pieces in the order of their ids, {added word: id}, {special name:
    id}, the id that ends a text or None). `made`: the pieces that merges make. Raises Foreign.
    """
    vocabulary, added = content["model"]["vocab"], content["added_tokens"]
    numbers, following = dict(vocabulary), len(vocabulary)
    for token in added:  # as transformers numbers them
        name = token["content"]
        if token["id"] != numbers.setdefault(name, following):
            raise Foreign(f"its added token {name!r} has the id {token['id']}, not {numbers[name]}")
        following = max(following, numbers[name] + 1)
    parts = {name for name in vocabulary if name in made or len(name) == 1}
    loose = {name for name in content.get("named", ()) if name in vocabulary and name not in parts}
    special = loose | {token["content"] for token in added if token["special"]}
    if both := sorted(special & parts):
        raise Foreign(f"its special token {both[0]!r} is a piece, too")
    # Whatever ends a text is special, even if its token does not say so.
    allowed = (special | {token["content"] for token in added}) - parts
    by_number = {numbers[name]: name for name in allowed}
    end = next((name for end in ends if (name := by_number.get(end, end)) in allowed), None)
    special |= {end} - {None}
    words = [token for token in added if token["content"] not in special and token["content"]]
    for token in words:
        name = token["content"]
        flags = [flag for flag in FLAGS if token[flag]]
        if flags or token["normalized"] != words[0]["normalized"]:
            differs = ", ".join(flags) or "another normalized than the others"
            raise Foreign(f"its added token {name!r} has {differs}")
    words = {token["content"]: token["id"] for token in words}
    pieces = sorted(set(vocabulary) - special - (words.keys() - parts), key=vocabulary.get)
    specials = dict(sorted(((name, numbers[name]) for name in special), key=lambda item: item[1]))
    return pieces, words, specials, numbers.get(end)


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


def require_whole(names, merges):
    """
    Raise Foreign unless the merges, in their order, make each piece from its letters. transformers merges the
    listed pairs only; our tokenizers merge any two neighbours that together are a piece. Where each piece can
    be made, no text has two such neighbours without a merge, so both give the same ids.
    """
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    for name in names:
        parts = list(name)
        while len(parts) > 1:
            pairs = [ranks.get(pair, len(ranks)) for pair in zip(parts, parts[1:], strict=False)]
            first = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[first] == len(ranks):
                raise Foreign(f"its merges don't make its piece {name!r}")
            parts[first : first + 2] = [parts[first] + parts[first + 1]]


def plain(words):
    """A pre_tokenizer without what does not change ids. Older files leave out `use_regex`."""
    if words["type"] == "Sequence":
        return [plain(part) for part in words["pretokenizers"]]
    return {"use_regex": True, **words, "trim_offsets": True} if words["type"] == "ByteLevel" else words
