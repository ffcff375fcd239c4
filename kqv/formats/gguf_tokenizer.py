"""The tokenizer in a GGUF file's metadata -> the definition of one of ours."""

import json

from kqv.errors import UserError
from kqv.text import tokenizers

OURS = "kqv.tokenizer"  # the key with the definition of a tokenizer of ours


def definition_of(metadata, path, rows):
    """
    The `to_json` of the tokenizer in a file's metadata; None where it has none. `rows`: of the embedding.
    Raises UserError.
    """
    if OURS in metadata:
        try:
            definition = json.loads(metadata[OURS])
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"{path} has a {OURS} that is no JSON: export it again") from None
        tokenizers.require_definition(definition)
        return definition
    return None
