"""An adapter merged into its base for other programs, and what rounding makes of it."""

import torch

from kqv.errors import UserError
from kqv.formats import lora
from kqv.formats.precision import rounded

TOLERANCE = 1e-4  # of the largest logit; what float32 rounds in some dozens of blocks is less

TEXTS, LENGTH = 2, 64  # of random ids, which both models read


@torch.no_grad()
def merge_for(dtype, gpt, source):
    """
    `lora.merge` an adapted GPT, whose weights will be kept in `dtype`. Returns a line about what becomes of
    the logits, of random ids, and of the weights. Raises UserError where the logits differ by more than what
    float32 rounds.
    """
    random = torch.Generator().manual_seed(0)
    length = min(LENGTH, gpt.config.block_size)
    idx = torch.randint(gpt.config.vocab_size, (TEXTS, length), generator=random)  # (B, T)
    before, layers = gpt.eval()(idx), lora.lora_layers(gpt)
    learnt = max(layer.change().abs().max().item() for layer in layers)
    after = lora.merge(gpt)(idx)
    error, largest = (after - before).abs().max().item(), before.abs().max().item()
    if not error <= TOLERANCE * largest:  # NaN, too
        raise UserError(
            f"{source} can't be merged into its base: the merged model's logits differ by up to {error:.1e}, "
            f"and the adapter's are up to {largest:.1e}"
        )
    lost = max((rounded(layer.weight, dtype) - layer.weight).abs().max().item() for layer in layers)
    return (
        f"merged: logits differ by at most {error:.1e} from the adapter's, which are up to {largest:.1e}; "
        f"weights change by at most {learnt:.1e}, and {dtype} rounds them by at most {lost:.1e}"
    )
