"""
The tokenizer of a Hugging Face folder: one of ours where this project wrote the folder or it is GPT-2's own;
any other as it is. The other way round is in tokenizer_json.py.
"""

import json
from hashlib import sha256

from kqv.errors import UserError, first_line
from kqv.files import read_file
from kqv.formats import tokenizer_json
from kqv.formats.tokenizer_json import BYTES, OURS
from kqv.text import tokenizers
from kqv.text.tokenizer import END
from kqv.text.tokenizer_files import (
    FILES,
    ROLES,
    SETTINGS,
    WHOLE,
    added_in,
    begin_in,
    json_in,
    name_of,
    numbers_in,
    settings_in,
    special_in,
)

OLD = ("vocab.json", "merges.txt", "added_tokens.json")  # the older form of a byte-level BPE

# Forms that need other libraries.
OTHERS = ("vocab.txt", "spiece.model", "tokenizer.model", "tekken.json", "vocab.json")

# The SHA-256 of GPT-2's pieces, one a line.
GPT2_PIECES = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


def from_huggingface(folder, config, rows):
    """
    The definition (`to_json`) of the tokenizer in `folder`, None if it has none. `config` is what config.json
    says, `rows` the number of ids that the weights have. Where the files can't be used, it is
    {"kind": "foreign", "why": reason and way out}, which `loading.tokenizer_of` refuses.
    """
    try:
        files = read(folder, config)
        return None if files is None else definition_of(files, ends_of(folder, files, config), rows)
    except UserError as error:
        why = first_line(error, 300)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = f"{type(error).__name__} {first_line(error, 120)}"
        why = f"the tokenizer in {folder} is damaged ({what}): fetch it again"
    return {"kind": "foreign", "why": why}


def read(folder, config):
    """{name: text} of the FILES of a folder; None if it has no tokenizer. Raises UserError."""
    files = {name: text_of(folder / name) for name in FILES if (folder / name).exists()}
    if WHOLE in files:
        return files
    cls = json_in(files, SETTINGS).get("tokenizer_class") or config.get("model_type", "gpt2")
    if cls.startswith(("GPT2", "gpt2")) and all((folder / name).exists() for name in OLD[:2]):
        return {**files, WHOLE: json.dumps(from_old_form(folder, files))}
    for name in OTHERS:
        if (folder / name).exists():
            raise UserError(
                f"{folder} has its tokenizer as {name} alone: AutoTokenizer.from_pretrained and "
                f"save_pretrained of transformers make a {WHOLE} of it"
            )
    return None


def from_old_form(folder, files):
    """The content of a tokenizer.json for a vocab.json and merges.txt, as transformers reads GPT-2's."""
    vocab, merges = json.loads(text_of(folder / OLD[0])), text_of(folder / OLD[1]).split("\n")
    added = json.loads(text_of(folder / OLD[2])) if (folder / OLD[2]).exists() else {}
    settings = settings_in(files)
    blank = bool(settings.get("add_prefix_space"))
    special = {END, *special_in(settings)}
    added |= {END: vocab[END]} if END in vocab else {}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": number, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": name not in special, "special": name in special}
            for name, number in sorted(added.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {**BYTES, "use_regex": True} | {"add_prefix_space": blank},
        "post_processor": None,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "vocab": vocab,
            "merges": [line for line in merges if line and not line.startswith("#version")],
        },
    }


def text_of(path):
    return read_file(path).decode("utf-8")


def ends_of(folder, files, config):
    """What may end a text, as ids or names, the most reliable first."""
    path = folder / "generation_config.json"
    found = [
        json.loads(text_of(path)).get("eos_token_id") if path.exists() else None,
        config.get("eos_token_id", 50256 if config.get("model_type", "gpt2") == "gpt2" else None),
        json_in(files, SETTINGS).get("eos_token"),
        json_in(files, ROLES).get("eos_token"),
    ]
    ends = []
    for end in found:
        ends += (
            end if isinstance(end, list) else [end] if isinstance(end, int) else [name_of(end)] if end else []
        )
    return ends


def definition_of(files, ends, rows):
    """
    The definition of the tokenizer of `files`; `ends` as `ends_of`. Raises UserError, and other errors where
    the files are damaged.
    """
    content, settings = json.loads(files[WHOLE]), settings_in(files)
    if OURS in settings and is_as_we_write(settings[OURS], content):
        return settings[OURS]
    numbers = numbers_in(content["model"])
    added = added_in(content, settings, numbers)
    if is_gpt2s(content, numbers, [token["content"] for token in added]) and not begin_in(content):
        return {"kind": "gpt2"}
    special = {token["content"]: token["id"] for token in added}
    if (most := max({**numbers, **special}.values())) >= rows:
        raise UserError(
            f"the tokenizer has ids up to {most}, but the weights have {rows} rows, one for each id: "
            "model.resize_token_embeddings(len(tokenizer)) in transformers makes room"
        )
    found = [special.get(end, end) for end in ends]
    ends = [end for end in dict.fromkeys(found) if end in special.values()]
    return {"kind": "huggingface", "files": files, "ends": ends}


def is_as_we_write(definition, content):
    """Whether a definition is of one of our tokenizers, and `content` is what we write for it."""
    try:
        written = tokenizer_json.to_huggingface(tokenizers.from_json(definition), 1)[WHOLE]
    except UserError:
        return False
    return what_counts(json.loads(written)) == what_counts(content)


def what_counts(content):
    """What of a tokenizer.json decides which ids a text has."""
    added = {(token["content"], token["id"], token["special"]) for token in content["added_tokens"]}
    return content["model"], content["pre_tokenizer"], content["normalizer"], added


def is_gpt2s(content, numbers, added):
    """Whether a tokenizer with these pieces {piece: id} and names of added tokens is GPT-2's own."""
    words, merges = content.get("pre_tokenizer"), content["model"].get("merges", ())
    names = sorted(numbers.keys() - set(added), key=numbers.get)
    made = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]
    return (
        set(added) <= {END}
        and not content.get("normalizer")
        and words is not None
        and {**words, "trim_offsets": True} == {**BYTES, "use_regex": True}
        and made == names[256:]
        and sha256("\n".join(names).encode()).hexdigest() == GPT2_PIECES
    )
