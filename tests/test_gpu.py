"""What holds on a CUDA device: precisions train, runs repeat and resume bit for bit, generation agrees."""

import math

import pytest
import torch
from conftest import TINY_RUN

import train
from kqv import checkpoint
from model import GPT, GPTConfig

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
RUN = [*TINY_RUN, "--dataset=tiny", f"--device={DEVICE}", "--compile=False"]


def weights(out_dir):
    return checkpoint.load(f"{out_dir}/ckpt.pt")["model"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_trains(cli, tiny_set, dtype, compiled):
    steps = ["--max_iters=100", "--lr_decay_iters=100", "--eval_interval=100"]
    status, _, err = cli(train.main, *RUN, *steps, f"--dtype={dtype}", f"--compile={compiled}")
    assert status == 0, err
    assert checkpoint.load("out/ckpt.pt")["best_val_loss"] < 0.7 * math.log(20)  # about 20 characters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_deterministic_run_repeats_and_resumes_bit_for_bit(cli, tiny_set, dtype):
    run = [*RUN, f"--dtype={dtype}", "--dropout=0.1", "--deterministic=True"]
    try:
        for out_dir in ("a", "b"):
            assert cli(train.main, *run, f"--out_dir={out_dir}")[0] == 0
        assert cli(train.main, *run, "--out_dir=c", "--max_iters=3")[0] == 0
        assert cli(train.main, "--init_from=resume", "--out_dir=c", "--max_iters=6")[0] == 0
    finally:
        torch.use_deterministic_algorithms(False)
    for other in ("b", "c"):
        assert all(map(torch.equal, weights("a").values(), weights(other).values()))


def test_cached_generation_is_that_of_the_cpu():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    idx = torch.randint(50, (3, 7))
    expected = gpt.generate(idx, 60, temperature=0)
    assert torch.equal(gpt.to(DEVICE).generate(idx.to(DEVICE), 60, temperature=0).cpu(), expected)
