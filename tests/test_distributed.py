"""Many processes: they train as one, save what any number of them can go on from, and end together."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, process_environment, train_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import export
import sample
import train
from kqv import checkpoint

# Each step four micro-batches, for 1, 2 or 4 processes; three batches to evaluate on, unequal shares.
RUN = [*TINY_RUN, "--dataset=tiny", "--dtype=float32", "--gradient_accumulation_steps=4", "--eval_iters=3"]
WAIT = 100  # seconds, for processes that take ten


class Ranks:
    """Processes of train.py, as torchrun starts them on one node or several, without torchrun itself."""

    def __init__(self, count, *argv, node_size=None, address="127.0.0.1", code=None, folders=(), own=()):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, *(["-c", code] if code else [str(ROOT / "train.py")]), *argv]
        self.processes = []
        for rank in range(count):
            environment = process_environment(
                RANK=str(rank),
                WORLD_SIZE=str(count),
                LOCAL_RANK=str(rank % (node_size or count)),
                LOCAL_WORLD_SIZE=str(node_size or count),
                MASTER_ADDR=address,
                MASTER_PORT=str(port),
                TORCH_CPP_LOG_LEVEL="FATAL",
            )
            self.processes.append(
                subprocess.Popen(
                    [*command, *(own[rank] if own else ())],
                    cwd=folders[rank] if folders else None,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def ends(self):
        """(status, output, errors) of each, when all have ended."""
        deadline = time.monotonic() + WAIT
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(1, deadline - time.monotonic()))
            found.append((process.returncode, out, err))
        return found

    def wait_for(self, text, path, seconds=60):
        """Until a file has a text in it."""
        deadline = time.monotonic() + seconds
        while not (path.exists() and text in path.read_text()):
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes)
            time.sleep(0.02)


def run_ranks(count, *argv, **how):
    """What the main process printed, when all have succeeded and the others have said nothing."""
    with Ranks(count, *argv, **how) as ranks:
        ends = ranks.ends()
    assert [(status, err) for status, _, err in ends] == [(0, "")] * count, ends
    assert [out for _, out, _ in ends[1:]] == [""] * (count - 1)
    return ends[0][1]


def results(folder):
    """All that a run logged and that does not depend on the machine's speed."""
    lines = Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()
    timing = ("tokens_per_second", "save_stall_ms")
    found = [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]
    return [record for record in found if record.keys() != {"step"}]


def weights(folder, name="ckpt.pt"):
    return checkpoint.load(Path(folder, name))["model"]


def moments(folder):
    """AdamW's state in a run's checkpoint, whole: {"number.name": tensor}."""
    contents = checkpoint.load(Path(folder, "ckpt.pt"))
    if "folder" in contents:
        from kqv import sharded

        return sharded.load_whole(contents["folder"], "optimizer")
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
    """The same in the test's own folder, which is the current one."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Training


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("count, node_size", [(2, 2), (4, 4), (4, 2)])
def test_many_processes_train_as_one(here, parallel, count, node_size):
    out = run_ranks(
        count, *RUN, "--dropout=0.1", f"--parallel={parallel}", "--out_dir=out", node_size=node_size
    )
    assert out.splitlines()[0].endswith(f", {count} x cpu, float32, {parallel}")
    assert out.count("step 5: loss") == out.count("step 6: train loss") == 1
    assert_same_run("out", "alone")
    assert_close(moments("out"), moments("alone"))
    assert sorted(os.listdir("out")) == sorted(os.listdir("alone"))
    assert Path("out/ckpt.pt").is_dir() == Path("out/best.pt").is_dir() == (parallel == "fsdp")


COUNTED = """
import json, sys
from collections import Counter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.distributed.tensor import DTensor
import train
from kqv.distributed import in_one_voice
from kqv.errors import run

class Collectives(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it is counted by what it does
        if "c10d" in operation.namespace:
            counts[operation._schema.name.split("::")[-1]] += 1
        return operation(*args, **(kwargs or {}))

step, counts = train.train_step, Counter()
def counted(wrapped, state, *rest):
    with Collectives():
        result = step(wrapped, state, *rest)
    local = lambda tensor: getattr(tensor, "_local_tensor", tensor).numel()
    held = sum(local(value) for values in state.optimizer.state.values() for value in values.values())
    print(json.dumps([counts, held, sum(p.numel() for p in state.model.parameters())]), file=sys.stderr)
    return result
train.train_step = counted
run(in_one_voice(train.main))
"""


def counted_step(*argv, **how):
    """Of each process: collectives in a step by kind, numbers held of the optimizer, numbers in the model."""
    with Ranks(2, *RUN, "--max_iters=1", "--eval_iters=1", *argv, code=COUNTED, **how) as ranks:
        ends = ranks.ends()
    assert [status for status, _, _ in ends] == [0, 0], ends
    return [json.loads(err.splitlines()[-1]) for _, _, err in ends]


def test_a_sharded_step_reduces_once_and_each_process_holds_half_of_the_optimizer(here):
    found = {}
    for accumulation in (2, 8):
        argv = ["--parallel=fsdp", f"--gradient_accumulation_steps={accumulation}"]
        first, second = counted_step(*argv)
        assert first[0] == second[0]
        found[accumulation] = first[0]
        held = first[1] + second[1]
        assert held == pytest.approx(2 * first[2], rel=0.01)  # together each moment once
        assert max(first[1], second[1]) < 0.6 * held
    # A part for each of the two blocks and one for the rest, whatever the number of micro-batches. Weights
    # are gathered in each of these: forward and backward the blocks', once the rest, which evaluation left.
    assert [found[count]["_reduce_scatter_base_"] for count in found] == [3, 3]
    assert [found[count]["_allgather_base_"] for count in found] == [5 - 1, 4 * 5 - 1]


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


@pytest.mark.parametrize("count, parallel", [(1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "fsdp")])
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
    checkpoint.save("whole.pt", {**checkpoint.load(Path("four/best.pt")), "folder": ""})
    texts = [
        cli(sample.main, "--device=cpu", "--start=keys", "--max_new_tokens=20", *argv)
        for argv in (["--out_dir=four"], ["--checkpoint=four/best.pt"], ["--checkpoint=whole.pt"])
    ]
    assert texts[0] == texts[1] == texts[2] and texts[0][0] == 0
    assert cli(export.main, "--out_dir=four", "--to=exported")[0] == 0
    for start in ("four", "four/best.pt", "exported"):
        argv = [*RUN, f"--init_from={start}", "--learning_rate=0", "--min_lr=0", "--max_iters=1"]
        assert cli(train.main, *argv, "--out_dir=started")[0] == 0
        same = {name: value for name, value in weights("started").items() if "bias" not in name}
        expected = {name: value for name, value in weights("four", "best.pt").items() if "bias" not in name}
        assert_close(same, expected, atol=0)


def test_a_sample_of_a_sharded_model_is_that_of_a_whole_one(here, cli):
    argv = [*RUN, "--sample_tokens=20", "--max_iters=3"]
    run_ranks(2, *argv, "--parallel=fsdp", "--out_dir=out")
    assert cli(train.main, *argv, "--out_dir=one")[0] == 0
    texts = [[r["sample"] for r in results(folder) if "sample" in r] for folder in ("out", "one")]
    assert texts[0] == texts[1] and len(texts[0]) == 2


def test_best_weights_are_saved_without_the_optimizer(stopped):
    size = {
        name: sum(path.stat().st_size for path in Path("four", name).glob("*.distcp"))
        for name in ("best.pt", "ckpt.pt")
    }
    assert size["best.pt"] < 0.5 * size["ckpt.pt"]


def test_auto_begins_and_goes_on(here, cli):
    for _ in range(2):
        assert cli(train.main, *RUN, "--dropout=0.1", "--init_from=auto", "--max_iters=3")[0] == 0
        assert checkpoint.load(Path("out/ckpt.pt"))["iter_num"] == 3
    Path("out/ckpt.pt").unlink()  # the run was killed between the two renames of a save
    Path("out/ckpt.prev.pt").write_bytes(Path("alone/ckpt.pt").read_bytes())
    status, out, _ = cli(train.main, "--init_from=auto")
    assert status == 0 and "done: step 6" in out and "step 0" not in out
    Path("out/ckpt.prev.pt").write_bytes(b"torn")
    status, _, err = cli(train.main, *RUN, "--init_from=auto")  # not a new run in the place of a damaged one
    assert status == 1 and "ckpt.p" in err


# Damage


@pytest.fixture(scope="module")
def two_saves(sharded):
    """(step 2, step 3) as sharded checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sharded)
        run_ranks(2, *RUN, "--parallel=fsdp", "--max_iters=3", "--checkpoint_interval=1", "--out_dir=saves")
    return sharded / "saves"


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_sharded_checkpoint_is_refused_or_its_predecessor_used(two_saves, tmp_path, data):
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(two_saves, run)
    files = sorted(path.name for path in (run / "ckpt.pt").iterdir())
    file = run / "ckpt.pt" / data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:where]
    else:
        content[where] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    steps = [whole_step(run), whole_step(two_saves)]
    assert steps[0] in (steps[1] - 1, steps[1])  # its predecessor, or what is damaged is of no consequence


def whole_step(run):
    """The step that a run's newest whole checkpoint is of, with the weights that it should have."""
    contents = checkpoint.load(run / "ckpt.pt")
    original = checkpoint.load_file(contents["folder"], False)
    assert_close(contents["model"], original["model"], atol=0)
    return contents["iter_num"]
