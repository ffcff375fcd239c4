"""The order of a run's steps, and the residual stream that it trains with."""

import pytest
import torch
from conftest import TINY_RUN, random_gpt, random_ids

import train
from kqv.errors import UserError
from kqv.text.dataset import Dataset
from kqv.training import loss
from kqv.training.float8 import require_float8
from kqv.training.objective import narrow_stream
from model import Block, NextToken


def test_the_next_steps_batch_is_read_before_the_host_waits_for_a_step(cli, tiny_set, monkeypatch):
    """Else a GPU has nothing to do while the batch is read."""
    noted = []
    training_batch, tolist = Dataset.training_batch, torch.Tensor.tolist

    def read(data, batch_size, block_size, seed, step, index, *more):
        noted.append((step, index))
        return training_batch(data, batch_size, block_size, seed, step, index, *more)

    def wait(tensor):
        if len(tensor) == 3:  # a step's loss, norm of the gradient, and bad steps
            noted.append("wait")
        return tolist(tensor)

    monkeypatch.setattr(Dataset, "training_batch", read)
    monkeypatch.setattr(torch.Tensor, "tolist", wait)
    argv = ["--dataset=tiny", "--max_iters=3", "--eval_interval=2", "--gradient_accumulation_steps=2"]
    assert cli(train.main, *TINY_RUN, *argv)[0] == 0
    first, second, third = ([(step, 0), (step, 1)] for step in range(3))
    assert noted == [*first, second[0], "wait", second[1], third[0], "wait", third[1], "wait"]


@pytest.mark.parametrize(
    "dtype, stream", [("bfloat16", torch.bfloat16), ("float16", torch.float32), ("float32", torch.float32)]
)
def test_the_residual_stream_has_the_precision_of_bfloat16_products(
    dtype, stream, cli, tiny_set, monkeypatch
):
    seen, forward = set(), Block.forward

    def noting(block, x, *more):
        y = forward(block, x, *more)
        seen.update((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(Block, "forward", noting)
    assert cli(train.main, *TINY_RUN, "--dataset=tiny", "--max_iters=1", f"--dtype={dtype}")[0] == 0
    assert seen == {stream}


def test_a_stream_in_bfloat16_rounds_gradients_as_much_as_products_in_it_do(every_shape):
    def gradients(dtype, narrow):
        gpt = random_gpt(n_layer=4, std=0.1, block_size=32)
        if narrow:
            narrow_stream(gpt)
        idx, targets = random_ids(4, 32), random_ids(4, 32, seed=1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            NextToken(gpt, loss.next_token_loss)(idx, targets).backward()
        return torch.cat([parameter.grad.flatten() for parameter in gpt.parameters()])

    truth = gradients(torch.float32, narrow=True)
    assert torch.equal(truth, gradients(torch.float32, narrow=False))
    wide, narrow = ((gradients(torch.bfloat16, each) - truth).norm() / truth.norm() for each in (False, True))
    assert 1e-4 < wide < 0.03
    assert narrow < 3 * wide
    assert not torch.equal(narrow, wide)


@pytest.mark.parametrize(
    "argv, part",
    [
        (["--dtype=float32"], "it goes with --dtype=bfloat16, not with float32"),
        (["--dtype=bfloat16", "--n_embd=24"], "24 channels, not multiples of 16"),
    ],
)
def test_a_head_that_can_not_be_in_float8_is_one_line(argv, part, cli, tiny_set):
    status, _, err = cli(train.main, *TINY_RUN, "--dataset=tiny", "--dtype_head=float8", *argv)
    assert status == 1 and part in err and err.count("\n") == 1


def test_an_older_gpu_has_no_float8(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"^dtype_head=float8 can't be used: NVIDIA A100 has no .*; leave it"):
        require_float8(torch.zeros(16, 16), torch.bfloat16, torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    require_float8(torch.zeros(16, 16), torch.bfloat16, torch.device("cuda", 1))


def test_the_model_and_its_loss_in_chunks_compile_as_one_graph(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE_COMPILED", 100)
    monkeypatch.setattr(loss, "compiled_cross_entropy", lambda: loss.cross_entropy)
    torch._dynamo.reset()
    gpt, idx, targets = random_gpt(n_layer=1), random_ids(2, 8), random_ids(2, 8, seed=1)
    narrow_stream(gpt)
    objective = NextToken(gpt, loss.next_token_loss)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(objective, backend="eager", fullgraph=True)(idx, targets)
        assert found.item() == pytest.approx(objective(idx, targets).item(), abs=1e-2)
    torch._dynamo.reset()
    assert all(gradient.any() for gradient in torch.autograd.grad(found, list(gpt.parameters())))
