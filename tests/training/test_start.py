"""From settings to a model: what a resumed run goes on with, what does not fit, how it computes."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, random_gpt, random_ids

import train
from kqv.errors import UserError
from kqv.settings import parse, read_given
from kqv.training.notices import changed_settings, odd_learning_rates
from kqv.training.objective import checkpoint_activations, set_precision
from kqv.training.start import new_model, require_divisible, resolve_start, smaller_batch
from kqv.training.state import start_state
from kqv.training.world import World
from model import NextToken

ONE = World(torch.device("cpu"))


def settings(*argv, **values):
    return parse(train.TrainSettings, [*argv, *(f"--{name}={value}" for name, value in values.items())])


# Settings


@pytest.mark.parametrize("processes", [1, 3, 8])
@pytest.mark.parametrize("depth, batch", [(1, ["--batch_size=16"]), (1, []), (2, []), (4, []), (26, [])])
def test_a_run_follows_from_its_depth(depth, batch, processes):
    world = World(torch.device("cpu"), 0, processes, processes)
    argv = [f"--depth={depth}", "--block_size=64", "--tokens_per_parameter=8", *batch]
    config, _ = resolve_start(settings(*argv), read_given(train.TrainSettings, argv), world)
    require_divisible(config, world)
    with torch.device("meta"):
        gpt = new_model(config, 512)
    matrices = sum(p.numel() for p in gpt.transformer.h.parameters() if p.dim() == 2)
    assert config.n_layer == depth and config.batch_size == 16 if batch else config.batch_size <= 12
    step = config.batch_size * config.block_size * config.gradient_accumulation_steps
    assert config.max_iters * step == pytest.approx(8 * matrices, abs=step)
    assert config.optimizer == "muon" and gpt.config.qk_norm and not gpt.config.tied_head


def test_what_is_given_comes_before_what_follows_from_the_depth():
    config, _ = resolved(["--depth=3", "--n_head=4", "--n_embd=64", "--max_iters=7", "--schedule=cosine"])
    assert (config.n_layer, config.n_embd, config.max_iters, config.schedule) == (3, 64, 7, "cosine")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--depth=201"], "depth is 201, but it must be at most 200"),
        (["--init_from=out", "--depth=2"], "--depth=2 means nothing for weights to start from"),
        (["--init_from=resume", "--depth=2"], "--depth=2, but the run in out has 0"),
    ],
)
def test_a_depth_that_can_not_be_is_refused(cli, tiny_set, argv, says):
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=0")[0] == 0
    status, _, err = cli(train.main, *argv, "--dataset=tiny", "--device=cpu")
    assert status == 2 and says in err and err.count("\n") == 1


def resolved(argv):
    """(settings, start_checkpoint) of a command line."""
    return resolve_start(settings(*argv), read_given(train.TrainSettings, argv), ONE)


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


def test_weights_decide_the_shape_of_a_new_run_and_what_was_asked_for_is_said(cli, tiny_set):
    base = ["--dataset=tiny", "--init_from=base", "--max_iters=0", "--device=cpu", "--eval_iters=1"]
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--out_dir=base", "--max_iters=1")[0] == 0
    status, _, err = cli(train.main, *base)  # the defaults are of another shape, but nobody gave them
    assert (status, err) == (0, "")
    assert torch.load("out/ckpt.pt", weights_only=True)["config"]["block_size"] == 16
    Path("mine.py").write_text("n_layer = 4\nn_head = 2\n")
    for argv in (["--n_layer=4", "--block_size=64"], ["mine.py", "--block_size=64"]):
        status, _, err = cli(train.main, *base, *argv)
        assert status == 0 and err.count("\n") == 1
        assert (
            "block_size=64, n_layer=4 is not used: the weights of base have block_size=16, n_layer=2;" in err
        )
    status, _, err = cli(train.main, *base, "--block_size=8")
    assert (status, err) == (0, "")
    assert torch.load("out/ckpt.pt", weights_only=True)["model_args"]["block_size"] == 8


def test_a_resumed_run_says_that_it_is_on_another_device(cli, tiny_set):
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=1")[0] == 0
    contents = torch.load("out/ckpt.pt", weights_only=True)
    assert contents["config"]["device"] == "cpu"
    for device, says in (("cuda:1", "changed: device cuda:1 -> cpu"), ("auto", None), ("cpu", None)):
        contents["config"]["device"] = device
        torch.save(contents, "out/ckpt.pt")
        for argv in ([], ["--device=cpu"]) if not torch.cuda.is_available() else [["--device=cpu"]]:
            status, out, err = cli(train.main, "--init_from=resume", *argv)
            assert (status, err) == (0, "")
            assert says in out if says else "changed" not in out


def test_a_setting_that_was_given_and_has_no_use_is_named(cli, tiny_set):
    argv = ["--decay_lr=False", "--wandb_project=mine", "--timeout_minutes=3", "--max_iters=1"]
    status, out, err = cli(train.main, *TINY_RUN, "--dataset=tiny", *argv)
    assert (status, err) == (0, "")
    (line,) = [line for line in out.splitlines() if line.startswith("not used: ")]
    why = "decay_lr is False"
    expected = [f"warmup_iters ({why})", f"lr_decay_iters ({why})", "wandb_project (wandb_log is False)"]
    assert line == f"not used: {', '.join([*expected, 'timeout_minutes (it is one process)'])}"
    assert "not used" not in cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=1")[1]


def test_without_min_lr_the_learning_rate_falls_to_a_tenth(cli, tiny_set):
    def rates():
        lines = map(json.loads, Path("out/metrics.jsonl").read_text().splitlines())
        return [line["lr"] for line in lines if "lr" in line]

    run = [*TINY_RUN, "--dataset=tiny", "--lr_decay_iters=3", "--learning_rate=1e-5"]
    assert cli(train.main, *run)[0] == 0
    assert rates()[3:] == pytest.approx([1e-6] * 3) and max(rates()) == 1e-5
    assert cli(train.main, "--init_from=resume", "--learning_rate=1e-4", "--max_iters=7")[0] == 0
    assert rates()[-1] == pytest.approx(1e-5)  # still a tenth
    assert cli(train.main, "--init_from=resume", "--min_lr=3e-6", "--max_iters=8")[0] == 0
    assert cli(train.main, "--init_from=resume", "--max_iters=9")[0] == 0
    assert rates()[-2:] == [3e-6, 3e-6]


@pytest.mark.parametrize(
    "values, says",
    [
        ({"warmup_iters": 2000, "max_iters": 60}, ["never reaches 0.0006", "2000", "60", "--warmup_iters=6"]),
        ({"learning_rate": 1e-5, "min_lr": 6e-5}, ["rises to min_lr=6e-05", "learning_rate=1e-05"]),
        ({"warmup_iters": 2000, "max_iters": 60, "min_lr": 1}, ["never reaches"]),
        ({"learning_rate": 1e-5}, None),
        ({"learning_rate": 1e-5, "min_lr": 1e-5}, None),
        ({"learning_rate": 1e-5, "min_lr": 1, "decay_lr": False}, None),
        ({"warmup_iters": 60, "max_iters": 60}, None),
        ({"warmup_iters": 60, "max_iters": 50, "eval_only": True}, None),
    ],
)
def test_a_learning_rate_that_gets_nowhere_is_one_warning(values, says):
    lines = list(odd_learning_rates(settings(**values)))
    assert len(lines) == (says is not None)
    assert all(word in lines[0] for word in says or [])


# The model


def test_weights_that_the_machine_can_not_hold_are_refused_before_they_are_made():
    for sizes in ({"n_layer": 10**7}, {"n_embd": 10**6, "n_head": 1}, {"n_embd": 10**9, "n_head": 1}):
        with pytest.raises(UserError, match="n_layer=.* and n_embd=.* make .* parameters.* GiB"):
            new_model(settings(**sizes), vocab_size=50)
    assert new_model(settings(n_layer=1, n_embd=12), vocab_size=1025).config.vocab_size == 1088


# The state


def test_a_loss_that_is_no_number_is_never_the_best():
    state = start_state(settings(), random_gpt(), None, torch.float32, ONE)
    best = []
    for step, loss in enumerate([float("nan"), 2.0, float("nan"), 2.0, 1.0]):
        state.step = step
        best.append(state.note_evaluation(loss))
        assert state.evaluated == step
    assert best == [False, True, False, False, True] and state.best_val_loss == 1.0


def test_the_state_goes_through_a_checkpoint():
    config = settings(init_from="resume")
    state = start_state(settings(), random_gpt(), None, torch.float16, ONE)
    state.step, state.evaluated, state.best_val_loss = 7, 6, 1.5
    state.bad_steps += 2
    saved = copy.deepcopy(state.state_dict())
    again = start_state(config, random_gpt(), saved, torch.float16, ONE)
    assert (again.step, again.evaluated, again.best_val_loss, int(again.bad_steps)) == (7, 6, 1.5, 2)
    assert again.scaler.state_dict() == state.scaler.state_dict()
    saved["best_val_loss"] = None
    with pytest.raises(UserError, match="out/ckpt.pt can't be resumed: "):
        start_state(config, random_gpt(), saved, torch.float16, ONE)


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
