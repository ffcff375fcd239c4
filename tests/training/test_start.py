"""From settings to a model: what a resumed run goes on with, what does not fit, how it computes."""

import copy
import shutil

import pytest
import torch
from conftest import TINY_RUN, random_gpt, random_ids

import train
from kqv.errors import UserError
from kqv.settings import parse, read_given
from kqv.training.notices import changed_settings
from kqv.training.start import (
    checkpoint_activations,
    new_model,
    resolve_start,
    set_precision,
    smaller_batch,
)
from kqv.training.state import start_state
from kqv.training.world import World
from model import NextToken


def settings(*argv, **values):
    return parse(train.TrainSettings, [*argv, *(f"--{name}={value}" for name, value in values.items())])


# Settings


def resolved(argv):
    """(settings, start_checkpoint) of a command line."""
    world = World(torch.device("cpu"))
    return resolve_start(settings(*argv), read_given(train.TrainSettings, argv), world)


@pytest.fixture
def old_checkpoint(cli, tiny_set):
    """A run whose checkpoint calls data_order by its older name: a function that saves it with that order."""
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=1")[0] == 0

    def save(order):
        contents = torch.load("out/ckpt.pt", weights_only=True)
        contents["config"].pop("data_order", None)
        contents["config"]["sampling"] = order
        torch.save(contents, "out/ckpt.pt")

    return save


@pytest.mark.parametrize("order", ["random", "epoch"])
def test_a_resumed_run_goes_on_with_a_setting_that_was_renamed(old_checkpoint, order):
    old_checkpoint(order)
    argv = ["--init_from=resume", "--device=cpu"]
    config, start_checkpoint = resolved(argv)
    assert config.data_order == order and config.n_layer == 2
    assert changed_settings(config, start_checkpoint) == {}
    argv.append(f"--data_order={'epoch' if order == 'random' else 'random'}")
    config, start_checkpoint = resolved(argv)
    assert changed_settings(config, start_checkpoint) == {"data_order": f"{order} -> {config.data_order}"}


@pytest.mark.parametrize("checkpointed", [True, False])
def test_out_of_memory_with_one_sequence_proposes_a_smaller_model(checkpointed):
    line = smaller_batch(settings(batch_size=1, activation_checkpointing=checkpointed))
    assert ("--activation_checkpointing=True" in line) != checkpointed
    assert all(name in line for name in ("--block_size", "--n_layer", "--n_embd"))


def test_auto_resumes_where_there_is_a_checkpoint_or_its_predecessor(cli, tiny_set):
    argv = ["--init_from=auto"]
    assert resolved(argv)[0].init_from == "scratch"
    assert cli(train.main, *TINY_RUN, "--dataset=tiny")[0] == 0
    config, start_checkpoint = resolved(argv)
    assert config.init_from == "resume" and start_checkpoint["iter_num"] == 6
    shutil.move("out/ckpt.pt", "elsewhere.pt")
    assert resolved(argv)[1]["iter_num"] == 3


# The model


def test_weights_that_the_machine_can_not_hold_are_refused_before_they_are_made():
    for sizes in ({"n_layer": 10**7}, {"n_embd": 10**6, "n_head": 1}, {"n_embd": 10**9, "n_head": 1}):
        with pytest.raises(UserError, match="n_layer=.* and n_embd=.* make .* parameters.* GiB"):
            new_model(settings(**sizes), vocab_size=50)
    assert new_model(settings(n_layer=1, n_embd=12), vocab_size=1025).config.vocab_size == 1088


# The state


def test_a_loss_that_is_no_number_is_never_the_best():
    state = start_state(settings(), random_gpt(), None, torch.float32)
    best = []
    for step, loss in enumerate([float("nan"), 2.0, float("nan"), 2.0, 1.0]):
        state.step = step
        best.append(state.note_evaluation(loss))
        assert state.evaluated == step
    assert best == [False, True, False, False, True] and state.best_val_loss == 1.0


def test_the_state_goes_through_a_checkpoint():
    config = settings(init_from="resume")
    state = start_state(settings(), random_gpt(), None, torch.float16)
    state.step, state.evaluated, state.best_val_loss = 7, 6, 1.5
    state.bad_steps += 2
    saved = copy.deepcopy(state.state_dict())
    again = start_state(config, random_gpt(), saved, torch.float16)
    assert (again.step, again.evaluated, again.best_val_loss, int(again.bad_steps)) == (7, 6, 1.5, 2)
    assert again.scaler.state_dict() == state.scaler.state_dict()
    saved["best_val_loss"] = None
    with pytest.raises(UserError, match="out/ckpt.pt can't be resumed: "):
        start_state(config, random_gpt(), saved, torch.float16)


# How it computes


@pytest.mark.parametrize("before", [True, False])
def test_a_cpu_attends_over_few_tokens_by_plain_products(before):
    for block_size, fused in ((128, False), (129, True), (16, False)):
        torch.backends.cuda.enable_flash_sdp(before)
        set_precision(settings(block_size=block_size), torch.device("cpu"))
        assert torch.backends.cuda.flash_sdp_enabled() == fused
    torch.backends.cuda.enable_flash_sdp(before)
    set_precision(settings(block_size=16), torch.device("mps"))
    assert torch.backends.cuda.flash_sdp_enabled() == before


def test_activation_checkpointing_keeps_one_tensor_of_a_block():
    idx, kept = random_ids(4, 8), {}
    for n_layer in (1, 3):
        for checkpointed in (False, True):
            gpt = random_gpt(n_layer=n_layer, dropout=0.1).train()
            names = list(gpt.state_dict())
            if checkpointed:
                checkpoint_activations(gpt)
            kept[n_layer, checkpointed] = kept_for_backward(gpt, idx)
            assert list(gpt.state_dict()) == names
    a_block = [(kept[3, checkpointed] - kept[1, checkpointed]) / 2 for checkpointed in (False, True)]
    assert a_block[1] == 4 * 8 * 16 * 4  # what goes into it, (B, T, C) in float32
    assert a_block[0] > 15 * a_block[1]


def kept_for_backward(gpt, idx):
    """The bytes of activations that a forward pass leaves for backward."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in gpt.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # kept, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        NextToken(gpt)(idx, idx).backward()
    return sum(storage.nbytes() for storage in storages.values())
