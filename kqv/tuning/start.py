"""The model that tuning began with, which says how far the tuned one has gone from it."""

import copy
from dataclasses import replace

import torch

from kqv.errors import UserError
from kqv.formats import loading, lora
from kqv.formats.base import sha256_of
from kqv.generation.engine import evaluating
from kqv.training.start import build_model
from kqv.tuning.policy import logprobs


class Start:
    """
    A model as tuning began with it. `named` says, for a checkpoint, where its weights are and their sha256.
    """

    def __init__(self, gpt, named):
        self.gpt, self.named = gpt.requires_grad_(False), named

    @torch.no_grad()
    def __call__(self, *arguments):
        """`logprobs` of this model."""
        with evaluating(self.gpt):
            return logprobs(self.gpt, *arguments)


class AdapterOff(Start):
    """The base of an adapted GPT, which the GPT itself is without its adapter: that takes no more memory."""

    def __init__(self, gpt):
        self.gpt, self.named = gpt, {}

    def __call__(self, *arguments):
        with lora.without_adapter(self.gpt):
            return super().__call__(*arguments)


def start_of(config, gpt, start_checkpoint, data, device):
    """
    The Start of a run: an adapted `gpt` without its adapter, or a copy of `gpt`; of a resumed run, what it
    began with, read again.
    """
    if lora.is_adapted(gpt):
        return AdapterOff(gpt)
    if config.init_from != "resume":
        named = {"source": config.init_from, "sha256": sha256_of(start_checkpoint["model"])}
        return Start(copy.deepcopy(gpt).to(device), named)
    named = start_checkpoint.get("start")
    if not named:
        raise UserError(f"the run in {config.out_dir} does not say what model it began with: begin a new one")
    _, gpt = build_model(replace(config, init_from=named["source"]), weights_of(named, config.out_dir), data)
    return Start(gpt.to(device), named)


def weights_of(named, out_dir):
    """The checkpoint's contents that the run in `out_dir` began with. Raises UserError for other ones."""
    way_out = f"put the model back that the run in {out_dir} began with"
    try:
        contents = loading.load_start(named["source"])
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None
    found = sha256_of(contents["model"])
    if found != named["sha256"]:
        raise UserError(
            f"the weights of {named['source']} have the SHA-256 {found[:12]}..., but needed are those of "
            f"{named['sha256'][:12]}...: {way_out}"
        )
    return contents
