"""What the files of a Hugging Face tokenizer say. No package is needed to read them."""

from kqv.text.bpe import bytes_of_letters

WHOLE, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
ROLES = "special_tokens_map.json"  # which special token has which role; where both say it, SETTINGS counts

FILES = (WHOLE, SETTINGS, ROLES, TEMPLATE)  # what is kept of a folder

NAMES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
LISTS = ("additional_special_tokens", "extra_special_tokens")

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}

HIDDEN = "\U0010fffd"  # no character; before the name of a piece, so that no usual text has it


def name_of(token):
    """The name of a special token, which files write as a text or as a dict."""
    return token if isinstance(token, str) else token["content"]


def roles_in(given):
    """{"bos_token": name, ...} of the special tokens that have a role."""
    return {role: name_of(given[role]) for role in NAMES if given.get(role)}


def special_in(given):
    """The names of all special tokens of the settings."""
    found = [*roles_in(given).values()]
    for several in (given.get(key) or () for key in LISTS):
        found += map(name_of, several.values() if isinstance(several, dict) else several)
    return found


def template_in(settings):
    """The chat template of the settings, or None; of several the one called default."""
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {one["name"]: one["template"] for one in found}.get("default")
    return found or None


def parts_of(part, several):
    """The parts that a decoder, a post-processor or the like is made of; `several` is their name there."""
    if not part:
        return []
    if part["type"] == "Sequence":
        return [one for inner in part[several] for one in parts_of(inner, several)]
    return [part]


def numbers_in(model):
    """{piece: id} of a model."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # of Unigram: [[piece, score], ...]
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}
    return dict(vocabulary)


def added_in(content, settings, numbers):
    """
    The added tokens, in the order of their ids: those of tokenizer.json, and those that only the settings
    name and that have an id there or in the model (`numbers`). transformers reads them so, too.
    """
    known = {token["content"]: {**PLAIN, **token} for token in content.get("added_tokens") or []}
    for number, token in (settings.get("added_tokens_decoder") or {}).items():
        known.setdefault(token["content"], {**PLAIN, **token, "id": int(number)})
    for name in special_in(settings):
        if name in known or name in numbers:
            known.setdefault(name, {**PLAIN, "content": name, "id": numbers.get(name)})["special"] = True
    return sorted(known.values(), key=lambda token: token["id"])


def begin_in(content, settings, numbers):
    """The ids that transformers puts before a text."""
    if "add_bos_token" in settings or "add_eos_token" in settings:
        name = roles_in(settings).get("bos_token")
        return [numbers[name]] if settings.get("add_bos_token") and name else []
    begin = []
    for part in parts_of(content.get("post_processor"), "processors"):
        for item in part.get("single", ()):
            if "SpecialToken" not in item:
                break
            begin += part["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        begin += part.get("cls", ())[1:]  # of BERT and RoBERTa: [name, id]
    return begin


def unknown_in(model):
    """The name of the piece for what a model has no piece for; None where it has none."""
    if isinstance(model["vocab"], list):
        number = model.get("unk_id")
        return None if number is None else model["vocab"][number][0]
    return model.get("unk_token")


def for_texts(content, special, number):
    """
    The content of a tokenizer.json -> that of one which encodes texts with the same ids, but gives the id
    `number`, which nothing else has, to what it has no piece for and would leave out; and whose Unigram does
    not take what a text says for one of the `special` names.
    """
    model, added = dict(content["model"]), content["added_tokens"]
    if isinstance(model["vocab"], list):
        hidden = special | {unknown_in(model)}
        model["vocab"] = [
            [HIDDEN + piece if piece in hidden else piece, score] for piece, score in model["vocab"]
        ]
        added = [
            token for token in added if token["content"] not in hidden or token["id"] >= len(model["vocab"])
        ]
    elif model.get("type", "BPE") == "BPE" and not unknown_in(model) and not has_all_bytes(content):
        numbers = {token["content"]: token["id"] for token in added}
        model |= {"vocab": {**numbers, **model["vocab"], HIDDEN: number}, "unk_token": HIDDEN}
    return {**content, "model": model, "added_tokens": added}


def has_all_bytes(content):
    """Whether a tokenizer has a piece for each byte, so that it encodes any text."""
    model = content["model"]
    if model.get("byte_fallback"):
        return all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
    parts = parts_of(content.get("pre_tokenizer"), "pretokenizers")
    parts += parts_of(content.get("normalizer"), "normalizers")
    is_byte_level = any(part["type"] == "ByteLevel" for part in parts)
    return is_byte_level and all(letter in model["vocab"] for letter in bytes_of_letters())
