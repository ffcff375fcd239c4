"""
Tokenizers of other programs in a GGUF file's metadata <-> the content of a tokenizer.json.

A GGUF file names how a text is cut into words, its *pre-tokeniser*, by a word that llama.cpp knows. The table
below has those whose rules are known here; another one is refused, in both directions.
"""

import json

from kqv.errors import UserError
from kqv.text import tokenizers
from kqv.text.tokenizers import PATTERNS

OURS = "kqv.tokenizer"  # the key with the definition of a tokenizer of ours

KEYS = "tokenizer.ggml."

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of ids

ENDINGS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"

SHORT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # the same in tokenizer.json, but for the letter long s

WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

QWEN2, LLAMA3 = WORDS % r"\p{N}", WORDS % r"\p{N}{1,3}"

NFC = {"type": "NFC"}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def letters(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


DIGITS = {"type": "Digits", "individual_digits": True}

# llama.cpp's name -> the pre-tokenisers of tokenizer.json that do so, the one that we write first
CUTS = {
    "gpt-2": ([letters(True)],),
    "smollm": ([DIGITS, letters(True)],),
    "qwen2": ([split(ENDINGS + QWEN2), letters(False)], [split(SHORT + QWEN2), letters(False)]),
    "llama-bpe": ([split(ENDINGS + LLAMA3), letters(False)], [split(SHORT + LLAMA3), letters(False)]),
    "qwen35": (
        [split(PATTERNS["qwen35"]), letters(False)],
        [split(PATTERNS["qwen35"].replace(ENDINGS, SHORT)), letters(False)],
    ),
}

NORMALISED = ("qwen2", "qwen35")  # the models with these bring a text into Unicode's form NFC

WHOLE_WORDS = ("llama-bpe",)  # a word that is a piece gets its id without merges; a text begins with bos

# A turn ends with one of these, too, where they are special ids.
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")

MOST_LETTERS = 128  # of a piece with a score; SentencePiece makes them of 16 at most, or of blanks

ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name: GGUF's


# In


def definition_of(metadata, path, rows):
    """
    The `to_json` of the tokenizer in a file's metadata. `rows`: of the embedding. Raises UserError.
    """
    if OURS in metadata:
        try:
            definition = json.loads(metadata[OURS])
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path} has a {OURS} that is no JSON: export it again") from None
        tokenizers.require_definition(definition)
        return definition
    given = {key.removeprefix(KEYS): value for key, value in metadata.items() if key.startswith(KEYS)}
    try:
        return whole(given, metadata.get("tokenizer.chat_template"), rows)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        why = str(error) if type(error) is ValueError else f"{type(error).__name__} {error}"
        raise UserError(
            f"{path} has a tokenizer that can't be read ({why[:150]}): use another model"
        ) from None


def whole(given, template, rows):
    """The definition of the tokenizer in {key: value}. Raises ValueError, LookupError and TypeError."""
    tokens, model = given["tokens"], given.get("model")
    kinds = [int(kind) for kind in given.get("token_type", [NORMAL] * len(tokens))]
    if len(kinds) != len(tokens) or len(set(tokens)) < len(tokens) or not 0 < len(tokens) <= rows:
        raise ValueError(f"{len(tokens)} tokens, {len(kinds)} kinds, {rows} rows of the embedding")
    if model == "gpt2":
        pre = given.get("pre")
        if pre not in CUTS:
            raise ValueError(f"its pre is {pre!r}, not {', '.join(CUTS)}")
        parts, last = byte_level(given, pre), (NORMAL,)
    elif model == "llama":
        pre = "llama-bpe"  # which adds bos, too
        parts, last = sentence_pieces(given, kinds), (NORMAL, BYTE, UNKNOWN)
    else:
        raise ValueError(f"its model is {model!r}, not gpt2 or llama")
    count = max((place + 1 for place, kind in enumerate(kinds) if kind in last), default=0)
    added = [
        {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": kind != USER_DEFINED}
        for number, (name, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED) or kind == UNUSED and number < count
    ]
    parts["model"]["vocab"] = {name: number for number, name in enumerate(tokens[:count])}
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | parts
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in ROLES.items():
        if f"{name}_token_id" in given:
            settings[f"{role}_token"] = tokens[number_in(tokens, given, f"{name}_token_id")]
    if given.get("add_bos_token", pre in WHOLE_WORDS) and "bos_token" in settings:
        number = number_in(tokens, given, "bos_token_id")
        content["post_processor"] = beginning_with(settings["bos_token"], number)
    if template is not None:
        if not isinstance(template, str):
            raise ValueError(f"its chat_template is {template!r}, no text")
        settings["chat_template"] = template
    ends = [
        number_in(tokens, given, key)
        for key in ("eos_token_id", "eot_token_id", "eom_token_id")
        if key in given
    ]
    names = {token["content"]: token["id"] for token in added if token["special"]}
    ends += [names[name] for name in ENDS if name in names]
    files = {"tokenizer.json": json.dumps(content), "tokenizer_config.json": json.dumps(settings)}
    return {"kind": "huggingface", "files": files, "ends": list(dict.fromkeys(ends))}


def beginning_with(name, number):
    """The post_processor that puts a special id before a text."""
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }


def number_in(tokens, given, key):
    if type(given[key]) is not int or not 0 <= given[key] < len(tokens):
        raise ValueError(f"its {key} is {given[key]!r}, which is no id")
    return given[key]


def bpe(merges, **options):
    usual = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    usual |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {**usual, **options, "merges": merges}


def byte_level(given, pre):
    """The parts of a tokenizer.json for a byte-level BPE, but its vocabulary."""
    merges = [merge.split(" ") for merge in given["merges"]]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"its merge {wrong} is not of two")
    return {
        "normalizer": NFC if pre in NORMALISED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[pre][0]},
        "post_processor": None,
        "decoder": letters(True),
        "model": bpe(merges, ignore_merges=pre in WHOLE_WORDS),
    }


def sentence_pieces(given, kinds):
    """
    The same for SentencePiece's BPE (Kudo & Richardson 2018), whose pieces have scores: of all neighbours
    that make a piece, those with the highest score are merged first.
    """
    tokens, scores = given["tokens"], [float(score) for score in given["scores"]]
    number = {name: place for place, name in enumerate(tokens) if kinds[place] == NORMAL}
    if long := next((name for name in number if len(name) > MOST_LETTERS), None):
        raise ValueError(f"its token {long[:20]!r}... has {len(long)} letters")
    merges = []
    for name, place in number.items():
        for cut in range(1, len(name)):
            left, right = name[:cut], name[cut:]
            if left in number and right in number:
                merges.append((scores[place], len(left), len(right), left, right))
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    space = "\u2581"
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": space}
    back = {"type": "Replace", "pattern": {"String": space}, "content": " "}
    before = given.get("add_space_prefix", True)
    stripped = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if before else []
    prepended = [{"type": "Prepend", "prepend": space}] if before else []
    unknown = next((name for name, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN), None)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*prepended, replaced]},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *stripped],
        },
        "model": bpe(
            [list(merge[3:]) for merge in merges], byte_fallback=True, fuse_unk=True, unk_token=unknown
        ),
    }


# Out


def add_whole(writer, tokenizer, rows, ends):
    """
    Write a tokenizer of another program, of the kind "huggingface", with a name for each of `rows` ids. A
    text, or an answer, ends in the first of `ends`. Raises UserError where llama.cpp has no such tokenizer,
    or its pre-tokeniser is not known.
    """
    content, model = tokenizer.content, tokenizer.content["model"]
    pre = pre_of(content)
    numbers = {number: name for name, number in model["vocab"].items()}
    kinds = dict.fromkeys(numbers, NORMAL)
    for token in content["added_tokens"]:
        numbers[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    kinds |= dict.fromkeys(tokenizer.specials().values(), CONTROL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([numbers.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types([kinds.get(number, UNUSED) for number in range(rows)])
    writer.add_token_merges(merges or ["  "])
    names = {name: number for number, name in numbers.items()}
    ids = {role: names.get(tokenizer.roles.get(f"{role}_token")) for role in ROLES}
    ids["eos"] = ends[0] if ends else ids["eos"]
    for role, name in ROLES.items():
        if ids[role] is not None:
            writer.add_uint32(f"{KEYS}{name}_token_id", ids[role])
    writer.add_add_bos_token(bool(tokenizer.begin))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_of(content):
    """llama.cpp's name for how a tokenizer.json cuts texts into words. Raises UserError."""
    cut, model, normalizer = content.get("pre_tokenizer") or {}, content["model"], content.get("normalizer")
    parts = cut.get("pretokenizers", [cut]) if cut else []
    found = [name for name, known in CUTS.items() if any(map(lambda one: alike(parts, one), known))]
    wrong = [
        f"a {what}"
        for what, is_there in (
            (
                "model that is no byte-level BPE",
                model.get("type", "BPE") != "BPE" or model.get("byte_fallback"),
            ),
            ("pre_tokenizer that it has no name for", not found),
            (f"normalizer {(normalizer or {}).get('type')}", normalizer not in (None, NFC)),
            ("normalizer NFC", normalizer == NFC and found and found[0] not in NORMALISED),
            ("dropout", model.get("dropout")),
            (
                "prefix or suffix of pieces",
                model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"),
            ),
        )
        if is_there
    ]
    if wrong:
        raise UserError(f"the tokenizer has {wrong[0]}, which llama.cpp has not: export with --format=hf")
    return found[0]


def alike(parts, known):
    """Whether parts of a pre_tokenizer do the same as known ones; `trim_offsets` changes no ids."""
    usual = {"add_prefix_space": True, "use_regex": True, "invert": False}

    def plain(part):
        missing = {key: value for key, value in usual.items() if part["type"] in ("ByteLevel", "Split")}
        return {key: value for key, value in {**missing, **part}.items() if key != "trim_offsets"}

    return list(map(plain, parts)) == list(map(plain, known))
