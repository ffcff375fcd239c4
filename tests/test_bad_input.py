"""Whatever is wrong, a script says so in one line with the way out, and leaves no half of anything."""

import copy
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_RUN, free_port, process_environment, script, train_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
import sample
import train

TINY = [*TINY_RUN, "--dataset=tiny"]
TEXT = ["--device=cpu", "--max_new_tokens=3"]
RESUME = ["--init_from=resume", "--max_iters=9"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a prepared set and a run on it, made once."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, "--max_iters=3")
    return folder


@pytest.fixture
def here(cli, trained, tmp_path):
    """The working folder, with a copy of that set and run in it."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def refuse(cli, here):
    """Call a script that must refuse, with exit status 1 or 2: refuse(train.main, "--seed=-1", status=2)."""

    def refused(main, *argv, status=None, says=()):
        before = listing()
        found, out, err = cli(main, *argv)
        assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
        assert len(err) < 500 and "Traceback" not in out + err
        assert found == status or found in (1, 2) and status is None, err
        for part in says:
            assert part in err
        assert listing() == before

    return refused


def listing():
    """{path: content} of all that is in the working folder; None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def cases(table):
    return [pytest.param(name, says, id=name) for name, says in table.items()]


# Settings

TRAIN_SETTINGS = {
    "--max_itrs=5": ["--max_itrs", "did you mean max_iters?"],
    "--learning-rate=1": ["--learning-rate", "did you mean learning_rate?"],
    "--banana=5": ["--banana", "--help"],
    "-n": ["-n", "--name=value"],
    "--max_iters=ten": ["--max_iters=ten", "whole number"],
    "--max_iters=1.5": ["--max_iters=1.5", "whole number"],
    "--max_iters": ["--max_iters", "needs a value"],
    "--learning_rate=fast": ["--learning_rate=fast", "number"],
    "--learning_rate=nan": ["--learning_rate=nan", "finite"],
    "--bias=maybe": ["--bias=maybe", "True|False"],
    "--dtype=bf16": ["--dtype=bf16", "bfloat16"],
    "--compile=yes": ["--compile=yes", "True|False"],
    "--batch_size=0": ["batch_size is 0", "at least 1"],
    "--batch_size=-4": ["batch_size is -4", "at least 1"],
    "--gradient_accumulation_steps=0": ["gradient_accumulation_steps is 0", "at least 1"],
    "--block_size=-1": ["block_size is -1", "at least 1"],
    "--n_layer=0": ["n_layer is 0", "at least 1"],
    "--max_iters=-1": ["max_iters is -1", "at least 0"],
    "--eval_interval=0": ["eval_interval is 0", "at least 1"],
    "--learning_rate=-1": ["learning_rate is -1", "at least 0"],
    "--dropout=1": ["dropout is 1", "below 1"],
    "--seed=-1": ["seed is -1", "at least 0"],
    "--n_embd=33": ["n_embd=33", "n_head=2", "use n_embd=32"],
    "--n_head=64": ["n_embd=32", "n_head=64", "use n_embd=64"],
    "nope.py": ["nope.py", "No such file"],
    "data": ["data", "directory"],
}
TEXT_SETTINGS = {
    "--max_new_tokens=-1": ["max_new_tokens is -1", "at least 0"],
    "--num_samples=0": ["num_samples is 0", "at least 1"],
    "--batch_size=0": ["batch_size is 0", "at least 1"],
    "--top_k=-1": ["top_k is -1", "at least 0"],
    "--top_p=-0.1": ["top_p is -0.1", "at least 0"],
    "--min_p=-0.1": ["min_p is -0.1", "at least 0"],
    "--repetition_penalty=0": ["repetition_penalty is 0", "at least"],
    "--beams=-1": ["beams is -1", "at least 0"],
    "--length_penalty=-1": ["length_penalty is -1", "at least 0"],
    "--format=xml": ["--format=xml", "text|jsonl"],
    "--stop": ["--stop needs a value", "--stop=text"],
    "--temperature=-1": ["temperature is -1", "at least 0"],
    "--temperature=warm": ["--temperature=warm", "number"],
    "--top_q=5": ["--top_q", "did you mean top_p?"],
}


@pytest.mark.parametrize("argument, says", cases(TRAIN_SETTINGS))
def test_training_settings_that_make_no_sense(refuse, argument, says):
    refuse(train.main, *TINY, argument, status=2, says=says)


@pytest.mark.parametrize("argument, says", cases(TEXT_SETTINGS))
def test_text_settings_that_make_no_sense(refuse, argument, says):
    refuse(sample.main, *TEXT, argument, status=2, says=says)


def test_a_config_file_with_a_misspelt_name(refuse, here):
    (here / "mine.py").write_text("n_layers = 3\n")
    refuse(train.main, *TINY, "mine.py", status=2, says=["mine.py", "n_layers", "did you mean n_layer?"])


@pytest.mark.parametrize("device", [None, "/dev/zero"], ids=["pipe", "device"])
def test_a_config_file_that_may_have_no_end(refuse, here, device):
    os.symlink(device, "mine.py") if device else os.mkfifo("mine.py")
    refuse(train.main, *TINY, "mine.py", says=["mine.py", "device" if device else "pipe"])


@pytest.mark.parametrize("name", ["batch_size", "block_size", "n_layer", "n_embd"])
@pytest.mark.parametrize("value", [10**19, 10**30])
def test_sizes_beyond_any_computer(refuse, name, value):
    refuse(train.main, *TINY, f"--{name}={value}", "--n_head=1", "--out_dir=new", says=[name, str(value)])


@pytest.mark.parametrize("value", [10**9, 10**19, 10**30])
def test_more_samples_than_any_computer_holds(refuse, value):
    refuse(sample.main, *TEXT, f"--num_samples={value}", says=["num_samples", str(value)])


@pytest.mark.parametrize("setting", ["n_embd=10000000", "n_layer=1000000000"])
def test_a_model_too_large_for_the_machine_is_refused_before_it_is_built(refuse, setting):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, before[1]))  # a fault here takes no more memory
    try:
        refuse(train.main, *TINY, f"--{setting}", "--out_dir=new", says=[setting.partition("=")[0], "GiB"])
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


# Devices


@pytest.mark.parametrize("main, argv", [(train.main, TINY), (sample.main, TEXT)], ids=["train", "sample"])
@pytest.mark.parametrize("device", ["cuda", "cuda:99", "xyz", "gpu", "meta", "", "cpu:-1", "privateuseone"])
def test_a_device_that_is_not_there(refuse, main, argv, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    refuse(main, *argv, f"--device={device}", status=1, says=[f"device {device} ", "--device=auto"])


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_an_environment_of_many_processes_that_makes_no_sense(refuse, monkeypatch, name):
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": free_port()}
    for variable, value in {**environment, "MASTER_ADDR": "127.0.0.1", name: "abc"}.items():
        monkeypatch.setenv(variable, value)
    refuse(train.main, *TINY, status=2, says=[f"{name}=abc", "whole number", "torchrun"])


# Text and data


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", ["is empty"]),
        (b" \n\t\n", ["is empty"]),
        (b"caf\xe9 au lait", ["0xe9", "offset 3", "iconv"]),
        ("text".encode("utf-16-le"), ["UTF-16", "byte order mark", "iconv -f utf-16le"]),
        (b"ab", ["split", "more text", "--val_fraction"]),
    ],
    ids=["empty", "blank", "latin1", "utf-16", "short"],
)
def test_text_that_can_not_be_prepared(refuse, here, content, says):
    (here / "mine.txt").write_bytes(content)
    refuse(prepare.main, "mine.txt", status=1, says=says if content == b"ab" else ["mine.txt", *says])


def test_text_that_is_not_there(refuse, here):
    refuse(prepare.main, "nope.txt", status=1, says=["nope.txt", "plays"])
    Path("empty").mkdir()
    refuse(prepare.main, "empty", status=1, says=["empty", "text file"])
    refuse(prepare.main, "*.nope", "--name=new", status=1, says=["*.nope"])
    refuse(prepare.main, status=2, says=["no source", "plays"])
    refuse(prepare.main, "text.txt", "--tokenizer=word", status=2, says=["--tokenizer=word", "char"])
    refuse(prepare.main, "text.txt", "--val_fraction=1", status=2, says=["val_fraction is 1", "below 1"])
    refuse(prepare.main, "text.txt", "--val_fraction=0", status=1, says=["val split", "--val_fraction"])


def test_a_set_that_is_not_prepared(refuse, here):
    refuse(
        train.main,
        "--dataset=plays",
        "--device=cpu",
        status=1,
        says=["data/plays", "python prepare.py plays"],
    )
    refuse(
        train.main,
        "--dataset=mine",
        "--device=cpu",
        status=1,
        says=["data/mine", "prepare.py", "--name=mine"],
    )
    Path("data/tiny/val.bin").unlink()
    refuse(train.main, *TINY, status=1, says=["data/tiny", "val.bin", "prepare.py"])


def test_a_set_that_is_damaged(refuse, here):
    Path("data/tiny/val.bin").write_bytes(b"123")
    refuse(train.main, *TINY, status=1, says=["data/tiny/val.bin", "3 bytes", "prepare.py"])
    Path("data/tiny/meta.json").write_text("{")
    refuse(train.main, *TINY, status=1, says=["data/tiny/meta.json", "prepare.py"])


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_with_ids_beyond_its_vocabulary(cli, here, split):
    path = Path(f"data/tiny/{split}.bin")
    np.full(path.stat().st_size // 2, 60000, np.uint16).tofile(path)
    status, _, err = cli(train.main, *TINY, "--out_dir=new")
    assert status == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert "data/tiny" in err and split in err and "60000" in err and "prepare.py" in err
    assert not list(Path("new").glob("*.pt"))


def test_text_shorter_than_the_context(refuse, here):
    (here / "short.txt").write_text("keys and queries " * 8)
    prepare.main(["short.txt"])
    says = ["val split", "14 tokens", "block_size=16", "--block_size=13"]
    refuse(train.main, *TINY, "--dataset=short", "--out_dir=new", status=1, says=says)


# Prompts


def test_a_prompt_that_the_tokenizer_does_not_know(refuse):
    refuse(sample.main, *TEXT, "--start=keys X", status=1, says=["'X'", "position 5"])
    refuse(sample.main, *TEXT, "--start=\udcff", status=1, says=[r"'\udcff'", "position 0"])


def test_a_prompt_from_an_empty_file(refuse):
    Path("empty.txt").touch()
    refuse(sample.main, *TEXT, "--start=FILE:empty.txt", status=1, says=["empty.txt has no text"])


def test_a_prompt_from_a_file_that_can_not_be_read(refuse, here):
    refuse(sample.main, *TEXT, "--start=FILE:nope.txt", status=1, says=["nope.txt", "--start"])
    refuse(sample.main, *TEXT, "--start=FILE:data", status=1, says=["data", "--start"])
    (here / "latin1.txt").write_bytes(b"caf\xe9")
    refuse(sample.main, *TEXT, "--start=FILE:latin1.txt", status=1, says=["latin1.txt", "0xe9", "offset 3"])


def test_a_prompt_from_standard_input_that_is_no_text(refuse, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"keys\xff")))
    refuse(sample.main, *TEXT, "--start=-", status=1, says=["standard input", "0xff", "offset 4"])


# Checkpoints


@pytest.mark.parametrize("start", ["out", "out/best.pt", "./out/../out/ckpt.pt"])
def test_training_over_the_weights_it_starts_from(refuse, start):
    refuse(train.main, *TINY, f"--init_from={start}", status=2, says=["out_dir=out", "--init_from=resume"])


def refuse_everywhere(refuse, says=("out/ckpt.pt",)):
    """Sampling, starting and resuming must all refuse the checkpoint."""
    refuse(sample.main, *TEXT, "--checkpoint=newest", status=1, says=says)
    refuse(train.main, *TINY, "--init_from=out/ckpt.pt", "--out_dir=new", status=1, says=says)
    refuse(train.main, *RESUME, status=1, says=says)


def test_a_checkpoint_that_is_not_there(refuse, here):
    refuse(sample.main, *TEXT, "--out_dir=nope", status=1, says=["nope/ckpt.pt", "--out_dir"])
    refuse(sample.main, *TEXT, "--checkpoint=nope.pt", status=1, says=["nope.pt"])
    refuse(train.main, *RESUME, "--out_dir=nope", status=1, says=["nope/ckpt.pt", "--out_dir"])
    refuse(
        train.main, *TINY, "--init_from=nonsense", status=1, says=["init_from=nonsense", "scratch", "gpt2"]
    )
    refuse(train.main, *TINY, "--init_from=data", status=1, says=["data/ckpt.pt"])
    refuse(sample.main, *TEXT, "--checkpoint=data", status=1, says=["data", "--checkpoint"])


FOREIGN = {
    "a list": lambda path: torch.save([1, 2], path),
    "weights alone": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "a module": lambda path: torch.save(torch.nn.Linear(2, 2), path),
    "text": lambda path: path.write_text("hello, I am no checkpoint\n"),
    "nothing": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"model": {}, "model_args": {}})),
    "an image": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
}


@pytest.mark.parametrize("write", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_that_is_no_checkpoint(refuse, write):
    write(Path("out/ckpt.pt"))
    refuse_everywhere(refuse)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_checkpoint_that_is_cut_off_anywhere(trained, refuse, share):
    whole = (trained / "out/ckpt.pt").read_bytes()
    Path("out/ckpt.pt").write_bytes(whole[: int(share * len(whole))])
    refuse_everywhere(refuse)


class Hostile:
    """Unpickled by a reader that trusts it, this makes a file."""

    def __reduce__(self):
        return (open, ("owned", "w"))


@pytest.mark.parametrize("where", ["all", "model", "tokenizer"])
def test_a_checkpoint_that_would_run_code(refuse, here, where):
    contents = torch.load("out/ckpt.pt", weights_only=True)
    torch.save(Hostile() if where == "all" else {**contents, where: Hostile()}, "out/ckpt.pt")
    refuse_everywhere(refuse)
    assert not Path("owned").exists()


WRONG = {
    "weights of another shape": lambda c: c["model"].update({"transformer.wte.weight": torch.zeros(3, 3)}),
    "a weight missing": lambda c: c["model"].pop("transformer.wpe.weight"),
    "a weight too many": lambda c: c["model"].update({"transformer.h.9.ln_1.weight": torch.zeros(32)}),
    "a weight that is a number": lambda c: c["model"].update({"transformer.wte.weight": 5}),
    "a weight without a name": lambda c: c["model"].update({7: torch.zeros(1)}),
    "no weights": lambda c: c.update(model=None),
    "a list of weights": lambda c: c.update(model=[1]),
    "no shape": lambda c: c.update(model_args=None),
    "a shape without n_layer": lambda c: c["model_args"].pop("n_layer"),
    "a shape without vocab_size": lambda c: c["model_args"].pop("vocab_size"),
    "a billion layers": lambda c: c["model_args"].update(n_layer=10**9),
    "channels without end": lambda c: c["model_args"].update(n_embd=10**18),
    "a context without end": lambda c: c["model_args"].update(block_size=10**30),
    "another n_layer": lambda c: c["model_args"].update(n_layer=1),
    "heads that do not fit": lambda c: c["model_args"].update(n_head=5),
    "no heads": lambda c: c["model_args"].update(n_head=0),
    "heads in words": lambda c: c["model_args"].update(n_head="two"),
    "a weight in 4 bytes": lambda c: c["model"].update(
        alike(c["model"], lambda w: w[:1, :1].clone().expand_as(w))
    ),
    "a sparse weight": lambda c: c["model"].update(alike(c["model"], torch.Tensor.to_sparse)),
    "a weight without numbers": lambda c: c["model"].update(alike(c["model"], lambda w: w.to("meta"))),
    "complex weights": lambda c: c["model"].update(alike(c["model"], lambda w: w + 1j)),
    "weights of a byte": lambda c: c["model"].update(alike(c["model"], lambda w: w.to(torch.float8_e5m2))),
    "weights of 4 TiB": lambda c: c["model"].update(
        alike(c["model"], lambda w: w[0, 0].clone().expand(2**40, 1))
    ),
    "one tensor as two weights": lambda c: c["model"].update(
        {f"transformer.h.{n}.ln_1.weight": torch.ones(32) for n in (0, 1)}
        | dict.fromkeys(["transformer.h.0.ln_2.weight", "transformer.h.1.ln_2.weight"], torch.ones(32))
    ),
    "half a layer": lambda c: c["model_args"].update(n_layer=1.5),
}


def alike(weights, change):
    """A weight of a checkpoint, changed."""
    name = "transformer.wpe.weight"
    return {name: change(weights[name])}


@pytest.mark.parametrize("break_it", WRONG.values(), ids=WRONG.keys())
def test_a_checkpoint_with_weights_that_do_not_fit(refuse, break_it):
    contents = torch.load("out/ckpt.pt", weights_only=True)
    break_it(contents)
    torch.save(contents, "out/ckpt.pt")
    refuse_everywhere(refuse)


NOT_RESUMABLE = {
    "no optimizer": lambda c: c.pop("optimizer"),
    "an optimizer of nothing": lambda c: c.update(optimizer=None),
    "an optimizer in words": lambda c: c.update(optimizer="adam"),
    "moments of another shape": lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)),
    "moments that are numbers": lambda c: c["optimizer"]["state"][0].update(exp_avg=5),
    "a moment missing": lambda c: c["optimizer"]["state"][0].pop("exp_avg_sq"),
    "a parameter without moments": lambda c: c["optimizer"]["state"].pop(3),
    "moments of a parameter too many": lambda c: c["optimizer"]["state"].update({99: first_state(c)}),
    "a moment too many": lambda c: first_state(c).update(max_exp_avg_sq=first_state(c)["exp_avg"]),
    "moments in a list": lambda c: c["optimizer"].update(state=[1]),
    "a moment in 4 bytes": lambda c: first_state(c).update(exp_avg=torch.zeros(1).expand(first_shape(c))),
    "a sparse moment": lambda c: first_state(c).update(exp_avg=torch.zeros(first_shape(c)).to_sparse()),
    "a moment without numbers": lambda c: first_state(c).update(exp_avg=torch.empty(0).to("meta")),
    "moments of whole numbers": lambda c: first_state(c).update(exp_avg=torch.ones(first_shape(c)).int()),
    "moments of less precision": lambda c: first_state(c).update(
        exp_avg_sq=torch.ones(first_shape(c)).half()
    ),
    "no step": lambda c: first_state(c).update(step=None),
    "steps of each number": lambda c: first_state(c).update(step=torch.ones(first_shape(c))),
    "a step that is no number": lambda c: first_state(c).update(step=torch.tensor(float("nan"))),
    "a step without end": lambda c: first_state(c).update(step=float("inf")),
    "half a step": lambda c: first_state(c).update(step=torch.tensor(0.5)),
    "a step before the first": lambda c: first_state(c).update(step=torch.tensor(-1.0)),
    "a step of two numbers": lambda c: first_state(c).update(step=torch.ones(2)),
    "skipped steps in a list": lambda c: c.update(bad_steps=torch.ones(2)),
    "settings in a list": lambda c: c.update(config=[1]),
    "no settings": lambda c: c.update(config=None),
    "a step in words": lambda c: c.update(iter_num="three"),
    "no best loss": lambda c: c.update(best_val_loss=None),
}


def first_state(contents):
    return contents["optimizer"]["state"][0]


def first_shape(contents):
    return first_state(contents)["exp_avg_sq"].shape


@pytest.mark.parametrize("break_it", NOT_RESUMABLE.values(), ids=NOT_RESUMABLE.keys())
def test_a_checkpoint_that_can_not_be_resumed(refuse, break_it):
    contents = copy.deepcopy(torch.load("out/ckpt.pt", weights_only=True))
    break_it(contents)
    torch.save(contents, "out/ckpt.pt")
    # --max_iters as it was: should a fault go unseen, then no step is taken on memory that is not there
    refuse(train.main, "--init_from=resume", status=1, says=["out/ckpt.pt"])


def test_tensors_of_any_strides_go_on_as_dense_ones_do(cli, here):
    """Transposed, with gaps, at an offset: the numbers are the same, and so are those of the next steps."""

    def strange(tensor):
        if tensor.dim() == 2:
            return tensor.t().clone().t()
        return torch.stack([torch.zeros_like(tensor), tensor], -1)[..., 1]

    contents = torch.load("out/ckpt.pt", weights_only=True)
    model = {name: strange(tensor) for name, tensor in contents["model"].items()}
    model["lm_head.weight"] = model["transformer.wte.weight"]
    states = contents["optimizer"]["state"]
    for state in states.values():
        state.update({name: strange(tensor) for name, tensor in state.items()})
    Path("strange").mkdir()
    torch.save({**contents, "model": model}, "strange/ckpt.pt")
    for folder in ("out", "strange"):
        status, _, err = cli(train.main, "--init_from=resume", f"--out_dir={folder}", "--max_iters=6")
        assert (status, err) == (0, "")
    one, other = (torch.load(f"{folder}/ckpt.pt", weights_only=True) for folder in ("out", "strange"))
    assert all(torch.equal(other["model"][name], tensor) for name, tensor in one["model"].items())
    for number, state in one["optimizer"]["state"].items():
        assert all(torch.equal(other["optimizer"]["state"][number][name], state[name]) for name in state)


@pytest.mark.parametrize("definition", [None, [1], {"kind": "word"}, {"kind": "char", "chars": ""}], ids=str)
def test_a_checkpoint_with_a_tokenizer_that_is_none(refuse, definition):
    contents = torch.load("out/ckpt.pt", weights_only=True)
    torch.save({**contents, "tokenizer": definition}, "out/ckpt.pt")
    refuse_everywhere(refuse, says=["tokenizer"])


# Output folders


@pytest.mark.parametrize("out_dir", ["text.txt", "text.txt/below"])
def test_an_out_dir_that_can_not_be(refuse, out_dir):
    refuse(train.main, *TINY, f"--out_dir={out_dir}", status=1, says=[out_dir, "--out_dir"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_dir_without_permission(refuse, here):
    (here / "closed").mkdir(mode=0o500)
    refuse(train.main, *TINY, "--out_dir=closed/out", status=1, says=["closed/out", "--out_dir"])
    refuse(train.main, *TINY, "--out_dir=closed", status=1, says=["closed", "--out_dir"])


def test_a_data_folder_that_can_not_be(refuse, here):
    shutil.rmtree("data")
    Path("data").write_text("a file")
    refuse(prepare.main, "text.txt", status=1, says=["data"])


# Real processes


@pytest.mark.parametrize(
    "name, arguments, status",
    [
        ("train.py", ["--max_itrs=5"], 2),
        ("sample.py", ["--out_dir=nope"], 1),
        ("prepare.py", ["nope.txt"], 1),
    ],
)
def test_a_process_ends_in_one_line_and_its_status(tmp_path, name, arguments, status):
    done = script(name, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_control_c_ends_a_text_in_one_line(here):
    arguments = ["--start=keys", "--device=cpu", "--max_new_tokens=1000000"]
    command = [sys.executable, str(ROOT / "sample.py"), *arguments]
    process = subprocess.Popen(
        command,
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # ignored where tests run in the background
    )
    assert process.stdout.read(10).startswith(b"keys")  # it is writing
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, b"error: interrupted\n")
