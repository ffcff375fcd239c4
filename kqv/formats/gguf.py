"""
Weights and tokenizer as one GGUF file, for llama.cpp and the programs built on it. The gguf package
translates transformers' names of weights.

Each of our own tokenizers is written as a byte-level BPE: llama.cpp begins with single bytes and merges
neighbours by the list of merges until it has none for them. A character is merged from its bytes.
"""

import json
from pathlib import Path

from kqv.errors import UserError
from kqv.formats import families, gguf_tokenizer, renaming
from kqv.formats.precision import require_held
from kqv.formats.tokenizer_json import (
    CHAT_TEMPLATE,
    added_to,
    base_of,
    merges_of,
    pattern_of,
    pieces_of,
    require_unique,
    specials_of,
    spelled,
)
from kqv.printable import one_line
from kqv.text.tokenizer import END
from kqv.text.tokenizers import PATTERNS

HELP = "a file for llama.cpp"

SUFFIX = ".gguf"

DTYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

EXPORTED = "kqv.export"  # the file's first key says that a later export may replace the file


def save(path, name, gpt, tokenizer, dtype, contents):
    """
    Write one file: the weights of `gpt` in `dtype`, one of DTYPES, their tokenizer, and `name` without its
    suffix. The checkpoint's `contents` are not used: a GGUF file has no model card. Raises UserError if the
    gguf package is missing or the tokenizer can't be written.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing a GGUF file needs: pip install gguf") from None
    family, config = families.family_of(gpt.config), gpt.config
    writer = gguf.GGUFWriter(path, family.name)
    writer.add_uint32(EXPORTED, 1)
    writer.add_name(one_line(Path(name).stem))
    writer.add_file_type(gguf.LlamaFileType[DTYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, family, config)
    whole = tokenizer.base if tokenizer.stores_marks else tokenizer  # of texts and of conversations alike
    if whole.kind == "huggingface":
        gguf_tokenizer.add_whole(writer, whole, config.vocab_size, [*tokenizer.ends][:1])
    else:
        writer.add_string(gguf_tokenizer.OURS, json.dumps(tokenizer.to_json()))
        add_tokenizer(writer, tokenizer, gguf.TokenType)
    for name, (theirs, tensor) in renaming.named_for_gguf(gpt.state_dict(), config).items():
        array = tensor.numpy()
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        if array.ndim == 1 or theirs == "transformer.wpe.weight":
            kind = gguf.GGMLQuantizationType.F32  # llama.cpp adds these in float32, or multiplies by them
        elif dtype == "q8_0" and array.shape[1] % 32:
            kind = gguf.GGMLQuantizationType.F16  # a block of q8_0 is 32 numbers
        require_held(theirs, tensor, kind.name.lower(), DTYPES)
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_shape(writer, family, config):
    """Write what llama.cpp must know of a GPTConfig."""
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.inner_channels)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    if family is families.GPT2:
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_channels)
    writer.add_value_length(config.head_channels)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_channels)
    writer.add_rope_freq_base(config.rope_theta)


def add_tokenizer(writer, tokenizer, types):
    """Write the tokenizer's ids, merges and special ids; `types` are the gguf package's kinds of ids."""
    base, specials, words = base_of(tokenizer), specials_of(tokenizer), added_to(tokenizer)
    pieces = pieces_of(tokenizer)
    require_apart(words, pieces)
    entries = [(spelled(piece), types.NORMAL) for piece in pieces]
    for name, number in sorted({**words, **specials}.items(), key=lambda item: item[1]):
        kind = types.CONTROL if name in specials else types.USER_DEFINED
        entries[number : number + 1] = [(name, kind)]  # a word may be a piece
    tokens, kinds = zip(*entries, strict=True)
    require_unique(tokens)
    if base.kind == "char":
        merges = dict.fromkeys(
            (char[:cut], char[cut : cut + 1]) for char in pieces for cut in range(1, len(char))
        )
    else:
        merges = merges_of(pieces)
    cut = {pattern: name for name, pattern in PATTERNS.items()}.get(pattern_of(base), "gpt-2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # The list can't be empty. No text has this merge, since a space is spelled as another character.
    writer.add_token_merges([f"{spelled(a)} {spelled(b)}" for a, b in merges] or ["  "])
    writer.add_bos_token_id(specials[END])
    writer.add_eos_token_id(specials[END])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.kind == "chat":
        writer.add_chat_template(CHAT_TEMPLATE)


def require_apart(words, pieces):
    """
    Raise UserError where the end of an added word is the beginning of another: of two that overlap in a text,
    here the first counts, and in llama.cpp the longest. And where a word is a piece with another spelling.
    """
    begun = {}
    for word in words:
        for length in range(1, len(word)):
            begun.setdefault(word[:length], set()).add(word)
    for word, number in words.items():
        others = (begun.get(word[-length:], set()) - {word} for length in range(1, len(word)))
        if other := next(filter(None, others), None):
            raise UserError(
                f"the tokenizer's added words {word!r} and {min(other)!r} can overlap, and llama.cpp would "
                "not take the first: export with --format=hf"
            )
        if number < len(pieces) and spelled(pieces[number]) != word:
            raise UserError(
                f"the tokenizer's added word {word!r} is a piece, too, which llama.cpp would spell in "
                "another way: export with --format=hf"
            )


def is_ours(path):
    """Whether an export may replace `path`: a file that `save` wrote."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(512)
    return head.startswith(b"GGUF") and EXPORTED.encode() in head
