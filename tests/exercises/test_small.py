"""The small programs of the exercises do what the libraries do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exercises.small import Network, adamw_step, merge, most_frequent_pair
from kqv.text.tokenizers import BPETokenizer


def loss_of(network, x, y):
    """The network's cost in torch, and its parameters as leaves."""
    leaves = [torch.tensor(each, requires_grad=True) for each in (*network.biases, *network.weights)]
    a, half = torch.tensor(x), len(leaves) // 2
    for bias, weight in zip(leaves[:half], leaves[half:], strict=True):
        a = torch.sigmoid(weight @ a + bias)
    return ((a - torch.tensor(y)) ** 2).sum() / 2, leaves


@pytest.mark.parametrize("sizes", [(3, 2), (5, 4, 3), (4, 6, 5, 2)])
def test_backpropagation_gives_autograd_s_gradients(sizes):
    network, random = Network(sizes), np.random.default_rng(1)
    x, y = random.random(sizes[0]), random.random(sizes[-1])
    loss, leaves = loss_of(network, x, y)
    biases, weights = network.backprop(x, y)
    for found, wanted in zip((*biases, *weights), torch.autograd.grad(loss, leaves), strict=True):
        assert np.allclose(found, wanted.numpy(), atol=1e-12)


def test_a_mini_batch_is_a_step_along_the_mean_gradient():
    network, random = Network((5, 4, 3)), np.random.default_rng(1)
    batch = [(random.random(5), random.random(3)) for _ in range(4)]
    losses = [loss_of(network, x, y) for x, y in batch]
    gradients = [torch.autograd.grad(loss, leaves) for loss, leaves in losses]
    before = [leaf.detach().numpy() for leaf in losses[0][1]]
    network.update_mini_batch(batch, 0.5)
    for i, after in enumerate((*network.biases, *network.weights)):
        mean = sum(gradient[i].numpy() for gradient in gradients) / 4
        assert np.allclose(after, before[i] - 0.5 * mean, atol=1e-12)


def test_a_network_learns_to_read_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    x, y = found.data / 16, np.eye(10)[found.target]
    network, random = Network((64, 30, 10)), np.random.default_rng(0)
    for _ in range(15):
        order = random.permutation(1400)
        for first in range(0, 1400, 10):
            network.update_mini_batch([(x[i], y[i]) for i in order[first : first + 10]], 3.0)
    right = sum(network.feedforward(x[i]).argmax() == found.target[i] for i in range(1400, len(x)))
    assert right / (len(x) - 1400) > 0.85


@settings(deadline=None)  # the first step of torch's optimizer imports its compiler
@given(steps=st.integers(1, 5), lr=st.floats(1e-5, 1), decay=st.floats(0, 1), seed=st.integers(0, 99))
def test_the_optimizer_s_step_is_torch_s(steps, lr, decay, seed):
    random = np.random.default_rng(seed)
    weight, gradients = random.standard_normal((3, 4)), random.standard_normal((steps, 3, 4))
    parameter = torch.nn.Parameter(torch.tensor(weight))
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    mean = square = np.zeros((3, 4))
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        weight, mean, square = adamw_step(weight, gradient, mean, square, step, lr, decay=decay)
    assert np.allclose(weight, parameter.detach().numpy(), atol=1e-9)


def test_merging_gives_the_pieces_of_the_project_s_tokenizer():
    word = "abcabcabdabd"
    pieces = {i: bytes([i]) for i in range(256)}
    ids, new = list(word.encode()), 256
    for _ in range(2):
        pair = most_frequent_pair(ids)
        ids, pieces[new] = merge(ids, pair, new), pieces[pair[0]] + pieces[pair[1]]
        new += 1
    learnt = BPETokenizer.trained_on([word], 256 + 3).pieces[256:]
    assert [pieces[256], pieces[257]] == learnt
    assert b"".join(pieces[id] for id in ids) == word.encode()


@given(st.lists(st.integers(0, 2), max_size=30), st.tuples(st.integers(0, 2), st.integers(0, 2)))
def test_a_merge_loses_nothing(ids, pair):
    merged = merge(ids, pair, 9)
    undone = [one for id in merged for one in (pair if id == 9 else (id,))]
    assert undone == ids
    assert all((a, b) != pair for a, b in zip(merged, merged[1:], strict=False))
