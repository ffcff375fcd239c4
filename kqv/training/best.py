"""What a resumed run takes for its best so far: what best.pt in its folder holds."""

import math
from pathlib import Path

from kqv.errors import UserError
from kqv.files import put_back
from kqv.formats.checkpoint import BEST, NEWEST, REST, read


def adopt_best(state, config, world):
    """
    Let the state of a resumed run say about the best what best.pt in its folder holds. The checkpoint
    may say something else: a process was killed between the two files, one of them was not written, or a user
    has removed best.pt. Then best.pt counts. If the checkpoint's step is the one that was evaluated last, it
    is evaluated again, so that its weights become best.pt if they are the best. Returns a line if the best
    begins anew.
    """
    path = Path(config.out_dir) / BEST
    found, problem = world.share(held_in(path) if world.is_main else None)
    measured = state.belongs_to.get("best_val_loss")
    if found and measured and found["measured"] not in (None, measured):
        found, problem = None, "was measured on something else"
    loss, step = (found["loss"], found["step"]) if found else (math.inf, -1)
    never_saved = state.best_step in (0, -1) or state.best_step is None and state.evaluated != state.step
    if loss == state.best_val_loss or not found and never_saved:
        return None
    is_here = state.evaluated == state.step  # so the best, if it was that step, is found again
    is_known = state.best_step is not None  # an older file may mean the loss of another step
    state.best_val_loss, state.best_step = loss, step
    if is_here:
        state.evaluated = -1
    if found or is_here and is_known:
        return None
    return f"{path} {problem}, which {NEWEST} names as the best so far: the best begins anew"


def held_in(path):
    """({"loss", "step", "measured"} of a best.pt or None, why there is none)."""
    put_back(path)
    if not path.exists():
        return None, "is not there"
    try:
        contents = read(path / REST if path.is_dir() else path, mapped=True)
        loss, step = float(contents["best_val_loss"]), int(contents["iter_num"])
        measured = contents.get("belongs_to", {}).get("best_val_loss")
    except (UserError, KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return None, "is damaged"
    if not math.isfinite(loss):
        return None, "is damaged"
    return {"loss": loss, "step": step, "measured": measured}, None
