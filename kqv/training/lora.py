"""Tuning an adapter instead of all weights: its settings, and the model that learns it."""

from dataclasses import dataclass, replace

import torch

from kqv.errors import UsageError
from kqv.formats import base, lora
from kqv.settings import refuse, setting


@dataclass(frozen=True)
class LoraSettings:
    """LoRA"""

    lora_rank: int = setting(
        0, "train two matrices of this rank beside each weight, which stays; 0: all weights", at_least=0
    )
    lora_alpha: float = setting(
        16.0, "their product is multiplied by lora_alpha / lora_rank", at_least=base.ALPHA.least, below=1e6
    )
    lora_targets: str = setting(",".join(lora.LAYERS), "the linear layers of blocks that have them")
    base: str = setting(
        "", "to go on from an adapter: where its base is, if it is no more where it was", path=True
    )


def settings_of(contents):
    """The settings that an adapter's checkpoint decides; {"lora_rank": 0} for whole weights."""
    if "base" not in contents:
        return {"lora_rank": 0}
    try:
        rank = lora.rank_in(contents["model"])
    except ValueError:
        return {}  # loading.adapted_model_of raises the error
    targets = ",".join(lora.targets_in(contents["model"]))
    return {"lora_rank": rank, "lora_alpha": float(contents["base"]["alpha"]), "lora_targets": targets}


def targets_of(config):
    """lora_targets as names, in the order of LAYERS. Raises UsageError for one that is no layer."""
    names = [name.strip() for name in config.lora_targets.split(",")]
    if unknown := [name for name in names if name not in lora.LAYERS]:
        raise UsageError(
            f"lora_targets={config.lora_targets}: {unknown[0]!r} is no linear layer of a block: use some of "
            f"{','.join(lora.LAYERS)}"
        )
    return tuple(name for name in lora.LAYERS if name in names)


def require_lora(config, given, contents):
    """
    Raise an error where the settings ask for an adapter that can't be. `contents` are those of the checkpoint
    to start from, or None.
    """
    targets_of(config)
    if not config.lora_rank:
        refuse(given, ("lora_alpha", "lora_targets"), "without --lora_rank, which makes an adapter")
    if not contents:
        refuse(given, ("base", "lora_rank"), "for a model from scratch (--init_from names a trained one)")
    elif config.lora_rank and config.init_from != "resume":
        way_out = "export it (python export.py --to=FOLDER), and begin from that with --init_from=FOLDER"
        base.require_whole(contents, config.init_from, way_out)


def start_adapter(config, contents, gpt, new_ids):
    """
    Let `gpt`, which has the weights in a checkpoint's contents, learn an adapter if the settings ask for it;
    the rows of its last `new_ids` ids are not of its base. Returns the settings, with the targets that there
    are. Raises UsageError where they are not those of the run to go on with, and where there is none.
    """
    if config.lora_rank:
        there = [name for name in targets_of(config) if lora.layers_called(gpt, (name,))]
        config = replace(config, lora_targets=",".join(there) or config.lora_targets)
    if config.init_from == "resume":
        require_same_adapter(config, settings_of(contents))
    elif config.lora_rank:
        sha256 = base.sha256_of(contents["model"])
        torch.manual_seed(config.seed)
        try:
            lora.adapt(gpt, config.lora_rank, config.lora_alpha, targets_of(config), new_ids)
        except ValueError as error:
            raise UsageError(f"lora_rank={config.lora_rank} can't be: {error}") from None
        gpt.base = {"source": config.init_from, "sha256": sha256, "alpha": config.lora_alpha}
    return config


def require_same_adapter(config, saved):
    """Raise UsageError where the settings ask for another adapter than the saved one."""
    if differing := [name for name in saved if getattr(config, name) != saved[name]]:
        asked = ", ".join(f"{name}={getattr(config, name)}" for name in differing)
        found = ", ".join(f"{name}={saved[name]}" for name in differing)
        raise UsageError(
            f"{asked}, but the run in {config.out_dir} has {found}: leave it out, or begin anew from a model "
            "by --init_from and another --out_dir"
        )
