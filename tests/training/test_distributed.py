"""Many processes: they train as one, save what any number of them can go on from, and end together."""

import copy
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SHAPES, TINY_RUN, process_environment, results, train_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ranks import WAIT, Process, Ranks, elastic, run_ranks, train_and_save_late
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import export
import sample
import train
from kqv.errors import UserError, warn
from kqv.files import sha256_of_file
from kqv.formats import checkpoint, loading, lora
from kqv.formats import sharded as sharded_format
from kqv.training import failures
from kqv.training.failures import FailureDetector
from kqv.training.process_group import is_to_restart_machines
from kqv.training.sharding import is_sharded
from kqv.training.state import start_state
from kqv.training.world import World
from model import GPT, GPTConfig, NextToken

# Each step four micro-batches, for 1, 2 or 4 processes; three batches to evaluate on, unequal shares.
RUN = [*TINY_RUN, "--dataset=tiny", "--dtype=float32", "--gradient_accumulation_steps=4", "--eval_iters=3"]


def weights(folder, name="ckpt.pt"):
    return loading.load(Path(folder, name))["model"]


def moments(folder, name="ckpt.pt"):
    """AdamW's state in a run's checkpoint: {"number.name": full tensor}."""
    contents = loading.load(Path(folder, name))
    if "folder" in contents:
        return sharded_format.load_full(contents["folder"], "optimizer")
    states = contents["optimizer"]["state"]
    return {f"{number}.{name}": value for number in states for name, value in states[number].items()}


def assert_close(found, expected, atol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=0, msg=name)


def assert_same_run(found, expected):
    for one, other in zip(results(found), results(expected), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert_close(weights(found), weights(expected))
    assert_close(weights(found, "best.pt"), weights(expected, "best.pt"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A folder with a prepared set, and in `alone` a run of one process, with dropout, to step 6."""
    folder = tmp_path_factory.mktemp("straight")
    train_in(folder, *RUN[len(TINY_RUN) + 1 :], "--dropout=0.1", "--out_dir=alone")
    return folder


@pytest.fixture
def here(straight, tmp_path, monkeypatch):
    """A copy of `straight` in the test's own folder, which is the current one."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Training


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "parallel, count, node_size",
    [
        ("ddp", 2, 2),
        slow("fsdp", 4, 4),  # its first half is that of test_any_number_of_processes_goes_on
        ("fsdp", 4, 2),  # two nodes of two
        slow("ddp", 4, 4),
        slow("ddp", 4, 2),
        slow("fsdp", 2, 2),
        slow("fsdp", 2, 1),  # two nodes of one
    ],
)
def test_many_processes_train_as_one(here, parallel, count, node_size):
    out = run_ranks(
        count, *RUN, "--dropout=0.1", f"--parallel={parallel}", "--out_dir=out", node_size=node_size
    )
    assert f", {count} x cpu, float32, {parallel}, " in out.splitlines()[0]
    assert out.count("step 5: loss") == out.count("step 6: train loss") == 1
    assert_same_run("out", "alone")
    assert_close(moments("out"), moments("alone"))
    assert sorted(os.listdir("out")) == sorted(os.listdir("alone"))
    assert Path("out/ckpt.pt").is_dir() == Path("out/best.pt").is_dir() == (parallel == "fsdp")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_train_any_family_as_one(here, every_shape, parallel):
    shaped = [*RUN, *every_shape, "--dropout=0.1", "--max_iters=3"]
    train_in(here, *shaped[len(TINY_RUN) + 1 :], "--out_dir=one")
    run_ranks(2, *shaped, f"--parallel={parallel}", "--out_dir=two", "--activation_checkpointing=True")
    assert_same_run("two", "one")
    assert_close(moments("two"), moments("one"))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_learn_from_a_teacher_as_one(here, parallel):
    taught = [*RUN, "--teacher=alone", "--n_layer=1", "--max_iters=3"]
    train_in(here, *taught[len(TINY_RUN) + 1 :], "--out_dir=one")
    run_ranks(2, *taught, f"--parallel={parallel}", "--out_dir=two")
    assert_same_run("two", "one")
    assert_close(moments("two"), moments("one"))


@pytest.mark.parametrize("parallel, count, node_size", [("ddp", 2, 2), ("fsdp", 4, 2), ("fsdp", 3, 3)])
def test_processes_share_muons_work(here, cli, parallel, count, node_size):
    """They do not divide the three blocks, nor the rows of a matrix; and the run goes on in one process."""
    shape = [f"--{name}={value}" for name, value in (SHAPES["qwen3"] | {"n_layer": 3}).items()]
    steps = [*RUN, *shape, "--gradient_accumulation_steps=12", "--optimizer=muon", "--muon_weight_decay=0.1"]
    assert cli(train.main, *steps, "--out_dir=one")[0] == 0
    how = f"--parallel={parallel}", "--max_iters=3", "--out_dir=many"
    run_ranks(count, *steps, *how, "--lr_decay_iters=6", node_size=node_size)
    assert cli(train.main, "--init_from=resume", "--max_iters=6", "--out_dir=many")[0] == 0
    assert_same_run("many", "one")
    assert_close(moments("many"), moments("one"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sharded_processes_train_in_lower_precision(here, dtype):
    low = [*RUN, "--dropout=0.1", f"--dtype={dtype}"]
    run_ranks(2, *low, "--parallel=fsdp", "--out_dir=low")
    train_in(here, *low[len(TINY_RUN) + 1 :], "--out_dir=low_alone")
    assert {weight.dtype for weight in weights("low").values()} == {torch.float32}
    runs = ("low", "low_alone", "alone")
    losses = [[r["loss"] for r in results(folder) if "loss" in r] for folder in runs]
    assert losses[0] == pytest.approx(losses[1], abs=0.005)
    assert losses[0] == pytest.approx(losses[2], abs=0.02)
    assert losses[0] != losses[2]  # it did compute in another precision


class Collectives(TorchDispatchMode):
    """Counts the collective operations in this context, by their names and the dtypes of what they send."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # counted below, as operations on this process's parts
        if "c10d" in operation.namespace:
            tensor, *_ = args[0] if isinstance(args[0], list) else args
            self.counts[f"{operation._schema.name.split('::')[-1]} of {tensor.dtype}"] += 1
        return operation(*args, **(kwargs or {}))


@contextmanager
def fake_world(size, rank=0, node_size=None):
    """The World of one process among `size`, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield World(torch.device("cpu"), rank, size, node_size or size)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("accumulation, dtype", [(2, torch.float32), (8, torch.bfloat16)])
def test_a_sharded_step_reduces_once_and_each_process_holds_half_of_the_optimizer(rank, accumulation, dtype):
    config = train.TrainSettings(gradient_accumulation_steps=accumulation)
    with fake_world(2, rank) as world:
        gpt = GPT(GPTConfig(16, 66, 2, 2, 32))
        model = world.place(NextToken(gpt), gpt.transformer.h, "fsdp", dtype)
        state = start_state(config, gpt, None, dtype, world)
        idx = torch.zeros(4, 16, dtype=torch.long)
        batches = [((idx, idx), 1.0, 0)] * (accumulation // 2)
        with Collectives() as sent:
            train.train_step(world.wrap(model), state, batches, config, world, nullcontext())
        moments = [value for values in state.optimizer.state.values() for value in values.values()]
        held = sum(getattr(value, "_local_tensor", value).numel() for value in moments)
        assert held == pytest.approx(gpt.num_parameters(without_positions=False), rel=0.02)  # half of twice
    # Reduced once: each of two blocks, and all the rest together. Gathered for every micro-batch: each block
    # forward and again backward, the rest once.
    assert sent.counts["_reduce_scatter_base_ of torch.float32"] == 3
    assert sent.counts[f"_allgather_base_ of {dtype}"] == 5 * (accumulation // 2)


@pytest.mark.parametrize("positions", ["learned", "rotary", "sinusoidal"])
@pytest.mark.parametrize("compute", [nullcontext, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_a_sharded_model_rotates_in_float32(monkeypatch, positions, compute):
    """Everything else, what goes from block to block above all, is in bfloat16."""
    streams, rotations = set(), []

    def rotate(x, cos, sin):
        rotations.append((cos.dtype, sin.dtype))
        return x

    monkeypatch.setattr("model.rotate", rotate)
    with fake_world(2) as world:
        gpt = GPT(GPTConfig(16, 66, 2, 2, 32, positions=positions))
        model = world.place(NextToken(gpt), gpt.transformer.h, "fsdp", torch.bfloat16)
        for norm in (gpt.transformer.h[0].ln_1, gpt.transformer.h[1].ln_2, gpt.transformer.ln_f):
            norm.register_forward_pre_hook(lambda _, inputs: streams.add(inputs[0].dtype))
        with compute():
            model(torch.zeros(4, 16, dtype=torch.long), torch.zeros(4, 16, dtype=torch.long)).backward()
    assert streams == {torch.bfloat16}
    # Of queries and keys in each of two blocks
    assert rotations == [(torch.float32, torch.float32)] * (4 if positions == "rotary" else 0)


def test_a_sharded_model_inside_of_its_loss_keeps_its_names_and_its_tied_weight():
    gpt = GPT(GPTConfig(16, 66, 2, 2, 32))
    names = list(gpt.state_dict())
    with fake_world(2) as world:
        model = world.place(NextToken(gpt), gpt.transformer.h, "fsdp", torch.float32)
        assert is_sharded(model) and is_sharded(gpt)
        assert list(gpt.state_dict()) == names
        assert gpt.transformer.wte.weight is gpt.lm_head.weight


def test_a_model_is_sharded_within_a_node_and_replicated_across_nodes():
    for node_size, mesh in ((3, (2, 3)), (6, (6,)), (1, (6,))):
        with fake_world(6, node_size=node_size) as world:
            gpt = GPT(GPTConfig(16, 66, 2, 2, 12))
            world.place(gpt, gpt.transformer.h, "fsdp", torch.float32)
            for parameter in gpt.parameters():
                assert parameter.device_mesh.shape == mesh and parameter.placements[-1] == Shard(0)
                assert parameter.placements[:-1] == (Replicate(),) * (len(mesh) - 1)
    with pytest.raises(UserError, match="4 of 6 processes"):
        World(torch.device("cpu"), 0, 6, 4).place(gpt, gpt.transformer.h, "fsdp", torch.float32)


@pytest.mark.parametrize("rank, said", [("0", "warning: mind the gap\n"), ("3", "")])
def test_warnings_are_those_of_the_main_process(monkeypatch, capsys, rank, said):
    monkeypatch.setenv("RANK", rank)
    warn("mind the gap")
    assert capsys.readouterr().err == said


# Saving and going on


@pytest.fixture(scope="module")
def sharded(straight):
    """In `straight`, a run of four sharded processes in `four`, stopped after step 3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(straight)
        run_ranks(4, *RUN, "--dropout=0.1", "--parallel=fsdp", "--max_iters=3", "--out_dir=four")
        run_ranks(2, *RUN, "--dropout=0.1", "--parallel=ddp", "--max_iters=3", "--out_dir=two")
    return straight


@pytest.fixture
def stopped(sharded, here):
    """The test's own copy of those runs."""
    for name in ("four", "two"):
        if not Path(name).exists():
            shutil.copytree(sharded / name, name)
    return here


GO_ON = ["--init_from=auto", "--max_iters=6"]


@pytest.mark.parametrize("count, parallel", [(1, "fsdp"), (2, "fsdp"), slow(2, "ddp"), slow(4, "fsdp")])
def test_any_number_of_processes_goes_on_from_what_four_saved(stopped, cli, count, parallel):
    argv = [*GO_ON, f"--parallel={parallel}", "--out_dir=four"]
    if count == 1:
        status, _, err = cli(train.main, *argv)
        assert (status, err) == (0, "")
    else:
        run_ranks(count, *argv)
    assert_same_run("four", "alone")
    assert_close(moments("four"), moments("alone"))


def test_sharded_processes_go_on_from_a_file(stopped):
    run_ranks(2, *GO_ON, "--parallel=fsdp", "--out_dir=two")
    assert_same_run("two", "alone")
    assert_close(moments("two"), moments("alone"))
    assert Path("two/ckpt.pt").is_dir() and Path("two/ckpt.prev.pt").is_file()


def test_a_sharded_checkpoint_writes_text_starts_runs_and_is_exported(stopped, cli):
    assert Path("four/best.pt").is_dir()
    checkpoint.save("whole.pt", {**loading.load(Path("four/best.pt")), "folder": ""})
    texts = [
        cli(sample.main, "--device=cpu", "--start=keys", "--max_new_tokens=20", *argv)
        for argv in (["--out_dir=four"], ["--checkpoint=four/best.pt"], ["--checkpoint=whole.pt"])
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] == 0
    assert cli(export.main, "--out_dir=four", "--to=exported")[0] == 0
    for start in ("four", "four/best.pt", "exported"):
        argv = [*RUN, f"--init_from={start}", "--learning_rate=0", "--min_lr=0", "--max_iters=1"]
        assert cli(train.main, *argv, "--out_dir=started")[0] == 0
        expected = {name: value for name, value in weights("four", "best.pt").items() if "bias" not in name}
        # The end of a text, which characters lack, is one more row in an export.
        same = {name: weights("started")[name][: len(value)] for name, value in expected.items()}
        assert_close(same, expected, atol=0)


def test_a_sample_of_a_sharded_model_is_that_of_a_whole_one(here, cli):
    argv = [*RUN, "--sample_tokens=20", "--max_iters=3"]
    run_ranks(2, *argv, "--parallel=fsdp", "--out_dir=out")
    assert cli(train.main, *argv, "--out_dir=one")[0] == 0
    texts = [[r["sample"] for r in results(folder) if "sample" in r] for folder in ("out", "one")]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_a_sharded_save_holds_the_state_of_its_step_though_training_goes_on(here, cli):
    argv = [*RUN, "--dropout=0.1", "--checkpoint_interval=1"]
    run_ranks(2, *argv, "--parallel=fsdp", "--max_iters=3", "--out_dir=out", main=train_and_save_late)
    assert cli(train.main, *argv, "--max_iters=3", "--out_dir=one")[0] == 0
    for name, step in (("ckpt.prev.pt", 2), ("ckpt.pt", 3)):
        for run in ("out", "one"):
            assert loading.load(Path(run, name))["iter_num"] == step
        assert_close(weights("out", name), weights("one", name))
        assert_close(moments("out", name), moments("one", name))


def test_best_weights_are_saved_without_the_optimizer(stopped):
    size = {
        name: sum(path.stat().st_size for path in Path("four", name).glob("*.distcp"))
        for name in ("best.pt", "ckpt.pt")
    }
    assert size["best.pt"] < 0.5 * size["ckpt.pt"]


def test_auto_begins_and_goes_on(here, cli):
    for _ in range(2):
        assert cli(train.main, *RUN, "--dropout=0.1", "--init_from=auto", "--max_iters=3")[0] == 0
        assert loading.load(Path("out/ckpt.pt"))["iter_num"] == 3
    Path("out/ckpt.pt").unlink()  # the run was killed between the two renames of a save
    Path("out/ckpt.prev.pt").write_bytes(Path("alone/ckpt.pt").read_bytes())
    status, out, _ = cli(train.main, "--init_from=auto")
    assert status == 0 and "done: step 6" in out and "step 0" not in out
    Path("out/ckpt.prev.pt").write_bytes(b"torn")
    Path("out/ckpt.pt").unlink(missing_ok=True)
    status, _, err = cli(train.main, *RUN, "--init_from=auto")  # not a new run in the place of a damaged one
    assert status == 1 and "ckpt.p" in err


@pytest.mark.slow
def test_kills_at_any_moment_of_sharded_saves_lose_nothing(here, cli):
    """All processes at once, as when a machine dies, while a save is always under way."""
    steps = [*RUN, "--dropout=0.1", "--max_iters=120", "--lr_decay_iters=120", "--eval_interval=20"]
    argv = [*steps, "--init_from=auto", "--checkpoint_interval=1", "--parallel=fsdp"]
    moment, reached = random.Random(5), []
    for _ in range(8):
        with Ranks(2, *argv) as ranks:
            further = reached[-1] + 2 if reached else 2
            ranks.wait_for(f'"step": {further},', here / "out/metrics.jsonl")
            time.sleep(moment.uniform(0, 0.2))
        reached.append(loading.load(Path("out/ckpt.pt"))["iter_num"])
    assert reached == sorted(reached) and 0 < reached[0] < reached[-1] < 120
    run_ranks(2, *argv)
    assert cli(train.main, *steps, "--out_dir=one")[0] == 0
    assert_same_run("out", "one")


# Damage


@pytest.fixture(scope="module")
def two_saves(sharded):
    """A run's folder with the sharded checkpoints of steps 2 and 3, and their weights by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sharded)
        run_ranks(2, *RUN, "--parallel=fsdp", "--max_iters=3", "--checkpoint_interval=1", "--out_dir=saves")
    return sharded / "saves", {name: weights(sharded / "saves", name) for name in ("ckpt.prev.pt", "ckpt.pt")}


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_sharded_checkpoint_is_refused_or_its_predecessor_used(two_saves, tmp_path, data):
    folder, undamaged = two_saves
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(folder, run)
    files = sorted(path.name for path in (run / "ckpt.pt").iterdir())
    file = run / "ckpt.pt" / data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:where]
    else:
        content[where] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    contents = loading.load(run / "ckpt.pt")
    assert contents["iter_num"] in (2, 3)  # its predecessor, or what is damaged is of no consequence
    name = contents["folder"].name
    assert (name == "ckpt.pt") == (contents["iter_num"] == 3)
    assert_close(contents["model"], undamaged[name], atol=0)


@pytest.mark.parametrize("file", [".metadata", "rest.pt", "__1_0.distcp"])
def test_a_sharded_checkpoint_without_a_part_of_it_is_refused(stopped, cli, file):
    shutil.rmtree("four/ckpt.prev.pt", ignore_errors=True)
    Path("four/ckpt.pt", file).unlink()
    for main, argv in ((train.main, GO_ON), (sample.main, ["--checkpoint=newest"])):
        status, out, err = cli(main, *argv, "--out_dir=four", "--device=cpu")
        assert (status, out) == (1, "") and len(err.splitlines()) == 1 and "four/ckpt.pt" in err


def test_metadata_other_than_what_was_written_is_refused(stopped, cli):
    shutil.rmtree("four/ckpt.prev.pt", ignore_errors=True)
    metadata = Path("four/ckpt.pt/.metadata")
    metadata.write_bytes(metadata.read_bytes() + b"0")  # which changes nothing that is read from it
    status, _, err = cli(sample.main, "--checkpoint=newest", "--out_dir=four", "--device=cpu")
    assert status == 1 and "its .metadata is not the one that was written" in err


def test_damaged_moments_are_refused(stopped, cli):
    """Weights are whole, so the checkpoint is chosen; what only training needs is read later."""
    places = sharded_format.TensorReader("four/ckpt.pt").metadata.storage_data
    place = next(place for index, place in places.items() if index.fqn == "optimizer.3.exp_avg")
    file = Path("four/ckpt.pt", place.relative_path)
    content = bytearray(file.read_bytes())
    content[place.offset + place.length // 2] ^= 255
    file.write_bytes(content)
    assert cli(sample.main, "--checkpoint=newest", "--out_dir=four", "--device=cpu")[0] == 0
    status, _, err = cli(train.main, *GO_ON, "--out_dir=four")
    assert status == 1 and len(err.splitlines()) == 1 and "four/ckpt.pt is damaged" in err


class Hostile:
    def __reduce__(self):
        return (os.mkdir, ("run by unpickling",))


def test_a_sharded_checkpoint_runs_no_code(stopped, cli):
    """In .metadata, and in an entry that torch itself would unpickle; nor are other folders read."""
    shutil.rmtree("four/ckpt.prev.pt", ignore_errors=True)
    folder = Path("four/ckpt.pt")
    honest = sharded_format.TensorReader(folder).metadata
    code = pickle.dumps(Hostile())
    entry = BytesStorageMetadata()
    file = folder / "__0_0.distcp"
    place = type(next(iter(honest.storage_data.values())))(file.name, file.stat().st_size, len(code))
    hidden = copy.deepcopy(honest)
    hidden.state_dict_metadata["model.lm_head.weight"] = entry
    hidden.storage_data = {MetadataIndex("model.lm_head.weight"): place, **hidden.storage_data}
    file.write_bytes(file.read_bytes() + code)
    elsewhere = copy.deepcopy(honest)
    for place in elsewhere.storage_data.values():
        place.relative_path = f"../ckpt.pt/{place.relative_path}"
    for metadata in (Hostile(), hidden, elsewhere):
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        rest = torch.load(folder / "rest.pt", weights_only=True)
        rest["metadata_sha256"] = sha256_of_file(folder / ".metadata")
        checkpoint.save(folder / "rest.pt", rest)
        for main, argv in ((train.main, GO_ON), (sample.main, ["--checkpoint=newest"])):
            status, out, err = cli(main, *argv, "--out_dir=four", "--device=cpu")
            assert (status, out) == (1, "") and len(err.splitlines()) == 1 and "four/ckpt.pt" in err
        assert not Path("run by unpickling").exists()
    with pytest.raises(OSError):  # it would have: the folder is there already when it runs again
        os.mkdir("run by unpickling")
        pickle.loads(code)


def test_a_checkpoint_of_another_shape_does_not_fit(stopped, cli):
    status, _, err = cli(train.main, *GO_ON, "--out_dir=four", "--n_layer=3")
    assert status == 2 and "n_layer=3" in err and "n_layer=2" in err


# What goes wrong


def assert_one_line(ends, *says):
    """All have failed, and all that is said is one line."""
    lines = [line for _, _, err in ends for line in err.splitlines()]
    assert all(status for status, _, _ in ends), ends
    assert len(lines) == 1, ends
    (line,) = lines
    assert line.startswith("error: ") and all(word in line for word in says), line


def failing(count, *argv, **how):
    with Ranks(count, *RUN, *argv, **how) as ranks:
        return ranks.ends()


def test_micro_batches_that_can_not_be_shared_are_refused(here):
    assert_one_line(failing(2, "--gradient_accumulation_steps=3"), "gradient_accumulation_steps=3", "2")
    assert not Path("out").exists()


def test_an_error_of_all_processes_before_they_meet_is_printed_once(here):
    assert_one_line(failing(3, "--learning_rat=1"), "did you mean learning_rate?")


def test_processes_with_other_settings_are_refused(here):
    ends = failing(2, own=(["--learning_rate=0.1"], ["--learning_rate=0.2"]))
    assert_one_line(ends, "learning_rate", "0.1 in process 0", "0.2 in process 1")
    assert not Path("out").exists()


@pytest.fixture
def nodes(here):
    """Two folders, as of two nodes that share none, each with the set."""
    folders = [here / "node0", here / "node1"]
    for folder in folders:
        shutil.copytree("data", folder / "data")
    return folders


def test_data_that_differ_between_nodes_are_refused(nodes):
    file = nodes[1] / "data/tiny/val.bin"
    content = bytearray(file.read_bytes())
    content[100:200] = content[200:300]
    file.write_bytes(content)
    ends = failing(2, folders=nodes, node_size=1)
    assert_one_line(ends, "content of data/tiny", "process 0", "process 1")


def test_teachers_that_differ_between_nodes_are_refused(nodes, straight):
    for folder in nodes:
        shutil.copytree(straight / "alone", folder / "alone")
    contents = loading.load(nodes[1] / "alone/best.pt")
    contents["model"]["transformer.ln_f.weight"] += 1
    checkpoint.save(nodes[1] / "alone/best.pt", contents)
    assert_one_line(failing(2, "--teacher=alone", folders=nodes, node_size=1), "the teacher", "process 1")


def test_data_that_a_node_lacks_are_named_once(nodes):
    shutil.rmtree(nodes[1] / "data/tiny")
    assert_one_line(failing(2, folders=nodes, node_size=1), "data/tiny has no train.bin")


def test_a_checkpoint_that_a_node_lacks_is_not_a_new_run_there(nodes, straight):
    shutil.copytree("alone", nodes[0] / "out")
    ends = failing(2, "--init_from=auto", "--max_iters=9", "--dropout=0.1", folders=nodes, node_size=1)
    assert_one_line(ends, "process 0", "process 1")


def test_an_address_where_nobody_is_ends_in_a_line(here):
    started = time.monotonic()
    ends = failing(2, "--timeout_minutes=0.03", address="nowhere.invalid", node_size=1)
    assert time.monotonic() - started < 40
    for (status, _, err), rank in zip(ends, (0, 1), strict=True):
        (line,) = err.splitlines()
        assert status == 1 and line.startswith(f"error: process {rank} of 2 found nobody at nowhere.invalid")


def test_a_process_that_never_comes_is_named(here):
    with Ranks(2, *RUN, "--timeout_minutes=0.05", own=([], ["--help"])) as ranks:
        ends = ranks.ends()
    assert ends[1][0] == 0
    assert_one_line(ends[:1], "process 1 of 2")


@pytest.mark.parametrize(
    "parallel, how, says",
    [("fsdp", "SIGSTOP", "has not answered for 4.2 s"), ("ddp", "SIGKILL", "has ended")],
)
def test_a_process_that_hangs_or_dies_is_named(here, how, says, parallel):
    argv = [*RUN, "--max_iters=1000000", "--eval_interval=1000000", "--timeout_minutes=0.07"]
    with Ranks(3, *argv, f"--parallel={parallel}", "--gradient_accumulation_steps=3") as ranks:
        ranks.wait_for('"step": 5,', here / "out/metrics.jsonl")
        ranks.send_signal(1, how)
        ends = ranks.ends(0, 2)
    assert_one_line(ends, f"process 1 of 3 {says}")


@pytest.mark.parametrize(
    "living, error, says",
    [
        ((0, 2), "gloo: connection closed", "process 1 of 3 has ended"),  # though 2 does not wait yet
        ((0, 1, 2), "gloo: timeout", "process 1, 2 of 3 has not answered for 0.1 s"),  # they hang
    ],
)
def test_a_lost_process_is_one_without_a_heartbeat_or_else_one_that_does_not_wait(
    monkeypatch, living, error, says
):
    monkeypatch.setattr(failures, "GRACE", 0.4)
    store = dist.HashStore()
    with ExitStack() as stack:
        first, *_ = [stack.enter_context(FailureDetector(store, rank, 3)) for rank in living]
        time.sleep(0.3)  # until each has shown a heartbeat
        assert first.explain(RuntimeError(error), timeout=0.1).startswith(says)


class EndingStore(dist.Store):
    """A store that ends with its host: then whatever is asked of it raises RuntimeError."""

    def __init__(self):
        super().__init__()
        self.table, self.ended = {}, False

    def clone(self):
        return self

    def set(self, key, value):
        self.require_host()
        self.table[key] = value

    def get(self, key):
        self.require_host()
        return self.table[key].encode()

    def check(self, keys):
        self.require_host()
        return all(key in self.table for key in keys)

    def require_host(self):
        if self.ended:
            raise RuntimeError("connection refused")


@pytest.mark.parametrize("posted, says", [("out of memory", "out of memory"), (None, "process 0 of 2")])
def test_a_posted_error_outlives_the_store(posted, says):
    store = EndingStore()
    with FailureDetector(store, 1, 2) as detector:
        if posted:
            store.set("error", posted)
        deadline = time.monotonic() + WAIT
        while detector.first_error != posted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        store.ended = True
    assert detector.explain(RuntimeError("gloo"), timeout=1).startswith(says)


def test_an_environment_that_is_half_torchruns_is_refused(cli, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    status, _, err = cli(train.main, *RUN)
    assert status == 2 and "WORLD_SIZE" in err and "torchrun" in err


def test_a_model_is_sharded_by_itself_where_it_would_fill_a_gpu(monkeypatch):
    gpt = GPT(GPTConfig(16, 65, 2, 2, 32))
    count = sum(parameter.numel() for parameter in gpt.parameters())
    for memory, choice in ((32 * count, "ddp"), (32 * count - 1, "fsdp")):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)  # noqa: B023
        world = World(torch.device("cuda:0"), size=2)
        assert world.find_parallel("auto", gpt) == choice
    assert World(torch.device("cpu"), size=2).find_parallel("auto", gpt) == "ddp"
    lora.adapt(gpt, 1, 16.0)
    needed = 4 * count + 16 * sum(parameter.numel() for parameter in lora.learnt(gpt).values())
    for properties.total_memory, choice in ((2 * needed, "ddp"), (2 * needed - 1, "fsdp")):
        assert world.find_parallel("auto", gpt) == choice
    assert world.find_parallel("ddp", gpt) == "ddp"


# torchrun


@pytest.mark.parametrize(
    "machines, restarts, needs", [("2", "3", True), ("1", "3", False), ("2", "0", False)]
)
def test_restarts_over_several_machines_are_known(monkeypatch, machines, restarts, needs):
    monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert is_to_restart_machines() == needs


def torchrun(count, *argv, restarts=0):
    """train.py under a real torchrun, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", str(ROOT / "train.py"), *argv],
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow  # without torchrun: test_an_error_of_all_processes_before_they_meet_is_printed_once
def test_an_error_of_all_processes_is_printed_once_by_torchrun(here):
    process = torchrun(3, *RUN, "--learning_rat=1")
    _, err = process.communicate(timeout=WAIT)
    assert process.returncode != 0
    assert err.count("--learning_rat is not a setting: did you mean learning_rate?") == 1


def children(pid):
    """The processes that a process has started and that are still there."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(pid) for pid in found if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("parallel", ["fsdp", slow("ddp")])
def test_a_run_with_a_killed_process_goes_on_by_itself(here, cli, parallel):
    steps = [*RUN, "--dropout=0.1", "--max_iters=24", "--lr_decay_iters=24", "--eval_interval=12"]
    argv = [*steps, "--init_from=auto", "--checkpoint_interval=2", f"--parallel={parallel}"]
    agent = Process(elastic, 2, 3, argv)
    log, deadline = here / "out/metrics.jsonl", time.monotonic() + WAIT
    try:
        for step, rank in ((4, 1), (13, 0)):
            while not log.exists() or f'"step": {step},' not in log.read_text():
                assert agent.poll() is None and time.monotonic() < deadline, agent.read("err")
                time.sleep(0.01)
            os.kill(children(agent.pid)[rank], signal.SIGKILL)
        status, out, err = agent.end(deadline)
    finally:
        for pid in children(agent.pid) if agent.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        agent.close()
    assert status == 0, err
    assert err.count("error: process 1 of 2 has ended") == err.count("error: process 0 of 2 has ended") == 1
    assert out.count(f"2 x cpu, float32, {parallel}") == 3 and out.count("done: step 24") == 1
    assert cli(train.main, *steps, "--out_dir=one")[0] == 0
    assert_same_run("out", "one")
