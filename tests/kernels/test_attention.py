"""Which kernels attention uses, and attention to examples by a kernel that knows their borders."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAMILIES, SHAPES, random_gpt, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kqv.generation.engine import Engine
from kqv.generation.stream import generate
from kqv.kernels.attention import MOST_BORDERS, attend_within_examples
from model import GPT, KVCache, NextToken

GPU, HALF = torch.device("cuda"), torch.bfloat16


def by_itself(query, key, value, begins, key_begins, longest, _, *, window_size=(-1, -1), enable_gqa=False):
    """
    A stand-in for torch's varlen_attn: each sequence by itself. query (N, nh, hs), others (N, nkv, hs).
    """
    assert query.dtype == key.dtype == value.dtype and window_size == (-1, 0)
    assert begins.dtype == torch.int32 and torch.equal(begins, key_begins)
    assert begins[0] == 0 and begins[-1] == len(query) and (begins.diff() <= longest).all()
    parts = []
    for first, end in zip(begins.tolist(), begins.tolist()[1:], strict=False):
        if first < end:
            q, k, v = (part[first:end].transpose(0, 1)[None] for part in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


@pytest.fixture(scope="module", params=["2.14", "2.11"])
def hopper(request):
    """
    A stand-in for a GPU with that kernel: a function that gives the kernel, or one of another signature, or
    none, and takes attend_within_examples's arguments.
    """

    def older(query, key, value, begins, key_begins, longest, longest_key, *, window_size=(-1, -1)):
        groups = query.size(1) != key.size(1)
        return by_itself(
            query,
            key,
            value,
            begins,
            key_begins,
            longest,
            longest_key,
            window_size=window_size,
            enable_gqa=groups,
        )

    def attend(gpt, most, device=GPU, dtype=HALF, capability=(9, 0), kernel=None):
        kernel = kernel or (older if request.param == "2.11" else by_itself)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            patch.setitem(
                sys.modules, "torch.nn.attention.varlen", kernel and SimpleNamespace(varlen_attn=kernel)
            )
            return attend_within_examples(gpt, most, device, dtype)

    return attend


def positions_of(rows, T):
    """Lists of lengths -> (B, T): positions from 0 in each example; the rest of a row is one more."""
    found = []
    for lengths in rows:
        places = np.concatenate([*(np.arange(length) for length in lengths), np.arange(T)])
        found.append(places[:T])
    return torch.from_numpy(np.stack(found))


PACKINGS = st.integers(1, 13).flatmap(
    lambda T: st.tuples(st.just(T), st.lists(st.lists(st.integers(1, T), max_size=T), min_size=1, max_size=3))
)


@settings(deadline=None, max_examples=50)
@given(packing=PACKINGS, family=FAMILIES, spare=st.integers(0, 3))
def test_examples_by_their_borders_are_the_examples_behind_a_mask(hopper, packing, family, spare):
    T, rows = packing
    positions, found = positions_of(rows, T), []
    most = int((positions == 0).sum(1).max()) + spare
    for by_borders in (False, True):
        gpt = random_gpt(**{**SHAPES[family], "head_size": 8}, block_size=13).double()
        assert not by_borders or hopper(gpt, most)
        idx = random_ids(len(rows), T)
        loss = NextToken(gpt)(idx, idx.roll(-1, 1), positions)
        loss.backward()
        found.append([loss.detach(), *(parameter.grad for parameter in gpt.parameters())])
    for masked, bordered in zip(*found, strict=True):
        torch.testing.assert_close(bordered, masked, atol=1e-9, rtol=1e-9)


def test_the_rest_of_a_model_that_knows_borders_is_as_it_was(hopper):
    gpt, idx = random_gpt(head_size=8), random_ids(2, 8)
    before, text = gpt(idx), generate(Engine(gpt), [[1, 2, 3]], 9)
    assert hopper(gpt, 3)
    assert torch.equal(gpt(idx), before) and generate(Engine(gpt), [[1, 2, 3]], 9) == text
    assert gpt.state_dict().keys() == random_gpt(head_size=8).state_dict().keys()


@pytest.mark.parametrize(
    "shape, how",
    [
        ({}, {"device": torch.device("cpu")}),
        ({}, {"device": torch.device("mps")}),
        ({}, {"dtype": torch.float32}),
        ({}, {"capability": (7, 5)}),
        ({}, {"kernel": lambda query, key, value, begins, is_causal=False: None}),  # torch 2.10
        ({"head_size": 12}, {}),
        ({"head_size": 200}, {}),
        ({"dropout": 0.1}, {}),
    ],
)
def test_where_that_kernel_can_not_work_the_mask_stays(hopper, shape, how):
    gpt = random_gpt(**{"head_size": 8, **shape})
    before = {name for name in vars(gpt)} | {name for name in vars(gpt.transformer.h[0].attn)}
    assert not hopper(gpt, 3, **how)
    assert {name for name in vars(gpt)} | {name for name in vars(gpt.transformer.h[0].attn)} == before


def test_more_borders_than_a_launch_takes_are_a_mask(hopper):
    gpt, positions = random_gpt(head_size=8), positions_of([[3], [2, 2]], 8)
    assert hopper(gpt, MOST_BORDERS // 2)
    assert gpt.mask_of_examples(positions).shape == (MOST_BORDERS // 2 * 2 + 1,)
    assert hopper(gpt, MOST_BORDERS // 2 + 1)
    assert torch.equal(gpt.mask_of_examples(positions), GPT.mask_of_examples(positions))
    assert gpt(random_ids(2, 8), positions).isfinite().all()


def test_compiled_it_is_torchs_kernel_and_no_mask_whatever_the_packing():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    gpt, idx, graphs = random_gpt(head_size=8, n_layer=1), random_ids(2, 8), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        if not attend_within_examples(gpt, 4, GPU, HALF):
            pytest.skip(f"varlen_attn of this torch knows no window: {varlen.varlen_attn.__doc__[:40]}")

    def keep(graph, inputs):
        graphs.append(graph)
        return lambda *inputs: (torch.zeros(2, 8, 16),)

    torch._dynamo.reset()
    hidden = torch.compile(gpt.hidden, backend=keep, fullgraph=True)
    with torch.no_grad():
        for rows in ([[3], [2, 2]], [[8], [1, 1]]):
            hidden(idx, positions_of(rows, 8))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert "torch_attn._varlen_attn" in called and not any("scaled_dot" in name for name in called)
    values = [node.meta.get("example_value") for node in graph.graph.nodes]
    assert not any(
        value.dtype == torch.bool and value.dim() > 2 for value in values if torch.is_tensor(value)
    )


# Which kernels


@pytest.fixture
def allowed(monkeypatch):
    """A list: for each attention, whether cuDNN's kernel was allowed, and the mask that it was given."""
    seen, kernel = [], F.scaled_dot_product_attention

    def recorded(q, k, v, mask, **options):
        seen.append((torch.backends.cuda.cudnn_sdp_enabled(), mask))
        return kernel(q, k, v, mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    return seen


def test_cudnn_attends_to_texts_in_training_alone(allowed):
    gpt, idx = random_gpt(n_layer=1), random_ids(2, 8)
    positions = positions_of([[3], [8]], 8)
    engine, cache = Engine(gpt), KVCache(gpt.config, 2)
    for mode in (gpt.train, gpt.eval):
        ways = {
            "texts": lambda: gpt(idx),
            "examples": lambda: gpt(idx, positions),
            "prefill of a whole cache": lambda: gpt(idx, cache=KVCache(gpt.config, 2)),
            "chunk": lambda: gpt(idx[:, :3], cache=cache),
            "token": lambda: gpt(idx[:, :1], cache=cache),
            "loss": lambda: NextToken(gpt)(idx, idx),
            "loss of examples": lambda: NextToken(gpt)(idx, idx, positions),
            "Engine": lambda: generate(engine, [[1, 2, 3], [1] * 8], 12),
        }
        mode()
        for name, attend in ways.items():
            allowed.clear()
            attend()
            whole = mode == gpt.train and name in ("texts", "prefill of a whole cache", "loss")
            assert allowed and all(cudnn == whole for cudnn, _ in allowed), (name, allowed)
            assert not any(cudnn and mask is not None for cudnn, mask in allowed)
        cache.length.zero_()


def test_compiled_training_keeps_cudnn_and_all_else_does_not(monkeypatch):
    """The choice is in the graph, whatever the switch was before, so it is part of a compiler's key, too."""
    gpt, idx, seen = random_gpt(n_layer=1), random_ids(2, 8), []

    def keep(graph, inputs):
        seen.append(
            [node.args for node in graph.graph.nodes if node.target is torch.backends.cuda.enable_cudnn_sdp]
        )
        return graph.forward

    torch._dynamo.reset()
    hidden = torch.compile(gpt.hidden, backend=keep, fullgraph=True)
    positions = positions_of([[3], [8]], 8)
    for training, arguments in ((True, ()), (True, (positions,)), (False, ()), (False, (positions,))):
        seen.clear()
        gpt.train(training)
        keeps = training and not arguments
        for before in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(before)
            hidden(idx, *arguments)
            assert torch.backends.cuda.cudnn_sdp_enabled() == keeps
        assert seen == [[(keeps,)]]


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_with_a_mask_the_kernel_is_not_asked_for_groups(monkeypatch, n_kv_head):
    gpt, idx, positions = (
        random_gpt(n_head=4, n_kv_head=n_kv_head),
        random_ids(2, 8),
        positions_of([[3], [8]], 8),
    )
    grouped, masked = gpt(idx), gpt(idx, positions)
    options, kernel = [], F.scaled_dot_product_attention

    def no_groups(q, k, v, mask, **how):
        options.append(how["enable_gqa"])
        assert mask is None or q.size(1) == k.size(1) == v.size(1)
        return kernel(q, k, v, mask, **how)

    monkeypatch.setattr(F, "scaled_dot_product_attention", no_groups)
    assert torch.equal(gpt(idx), grouped)
    torch.testing.assert_close(gpt(idx, positions), masked)
    assert options == [n_kv_head < 4] * 2 + [False] * 2
