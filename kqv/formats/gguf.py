"""
Weights and tokenizer as one GGUF file, for llama.cpp and what is built on it. The names are those of the gguf
package; the architecture is its `gpt2`.

Every tokenizer of ours is a byte-level BPE there: llama.cpp joins those neighbours that the list of merges
names, and an id is what it has joined when nothing is left to join. Characters are joined from their bytes.
"""

import numpy as np

from kqv.errors import UserError
from kqv.formats.tokenizer_json import (
    CHAT_TEMPLATE,
    END,
    base_of,
    merges_of,
    pattern_of,
    pieces_of,
    require_unique,
    specials_of,
    spelled,
)
from kqv.text.tokenizers import PATTERNS

EXPORTED = "kqv.export"  # the first key of the file, so that a later export may take its place


def save(path, name, weights, shape, tokenizer, dtype):
    """
    Write one file: `weights` (all that GPT-2 has, biases too, float32), the model's `shape` (a GPTConfig's
    fields) and the tokenizer. `dtype` is f32, f16, bf16 or q8_0. Raises UserError where the gguf package is
    missing or the tokenizer has no counterpart.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("writing a GGUF file needs: pip install gguf") from None
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_uint32(EXPORTED, 1)
    writer.add_name(name)
    writer.add_context_length(shape["block_size"])
    writer.add_embedding_length(shape["n_embd"])
    writer.add_feed_forward_length(4 * shape["n_embd"])
    writer.add_block_count(shape["n_layer"])
    writer.add_head_count(shape["n_head"])
    writer.add_layer_norm_eps(1e-5)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, tokenizer, gguf.TokenType)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, shape["n_layer"])
    for ours, tensor in weights.items():
        if ours == "lm_head.weight":
            continue  # the embedding again, which is what llama.cpp takes where there is no head
        array = tensor.numpy()
        if ours == "transformer.wte.weight" and tokenizer.separator is None:
            array = np.concatenate([array, array.mean(0, keepdims=True)])  # see add_tokenizer
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        if array.ndim == 1 or ours == "transformer.wpe.weight":
            kind = gguf.GGMLQuantizationType.F32  # llama.cpp adds these in float32
        elif dtype == "q8_0" and array.shape[1] % 32:
            kind = gguf.GGMLQuantizationType.F16  # q8_0 has blocks of 32
        writer.add_tensor(theirs, gguf.quantize(array, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def add_tokenizer(writer, tokenizer, types):
    """
    llama.cpp can't do without an id that ends a text. Where we have none, it gets one behind ours, whose row
    of the embedding is the mean of all: its logit is the mean of all logits, so it is never the likeliest.
    """
    base, specials = base_of(tokenizer), specials_of(tokenizer)
    pieces = pieces_of(tokenizer)
    specials = specials or {END: len(pieces)}
    tokens = [*map(spelled, pieces), *specials]
    require_unique(tokens)
    if base.kind == "char":
        merges = dict.fromkeys(
            (char[:cut], char[cut : cut + 1]) for char in pieces for cut in range(1, len(char))
        )
    else:
        merges = merges_of(pieces)
    words = {pattern: name for name, pattern in PATTERNS.items()}.get(pattern_of(base), "gpt-2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(tokens)
    writer.add_token_types([types.NORMAL] * len(pieces) + [types.CONTROL] * len(specials))
    # It wants some merge; no text has the characters of this one, which would be spelled otherwise.
    writer.add_token_merges([f"{spelled(a)} {spelled(b)}" for a, b in merges] or ["  "])
    writer.add_bos_token_id(specials[END])
    writer.add_eos_token_id(specials[END])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if tokenizer.kind == "chat":
        writer.add_chat_template(CHAT_TEMPLATE)


def is_our_export(path):
    """Whether a file is one that `save` wrote."""
    with open(path, "rb") as file:
        head = file.read(512)
    return head.startswith(b"GGUF") and EXPORTED.encode() in head
