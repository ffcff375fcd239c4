"""Attention spelled out computes what the kernel computes; what a pass leaves behind adds up."""

import math

import pytest
import torch
from conftest import FAMILIES, SHAPES, random_gpt, random_ids
from hypothesis import given
from hypothesis import strategies as st

from kqv.looking import retrained
from kqv.looking.attention import MASKS, SCORES, WhatIf, attention
from kqv.looking.parts import parts_of_first_layer
from kqv.looking.trace import Looker
from kqv.looking.what_if import WHAT_IFS, cut_edges, loss_without_heads, measured, other_endings, rows_to_cut
from kqv.text.dataset import Dataset
from model import rotate

IDS = [3, 1, 4, 1, 5, 9, 2, 6]
POSITIONS = ["learned", "rotary", "sinusoidal"]


@given(family=FAMILIES, T=st.integers(1, 8), B=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_formula_gives_the_kernel_s_logits(family, T, B, seed):
    gpt, idx = random_gpt(seed, **SHAPES[family]), random_ids(B, T, seed=seed)
    before = {name: weight.clone() for name, weight in gpt.state_dict().items()}
    with torch.no_grad():
        expected = gpt(idx)
    trace = Looker(gpt).trace(idx)
    assert torch.allclose(trace.logits, expected, atol=1e-4)
    for weights in trace.weights:
        assert torch.allclose(weights.sum(dim=-1), torch.ones(()), atol=1e-6)
        assert (weights.triu(1) == 0).all()
    assert all(torch.equal(weight, before[name]) for name, weight in gpt.state_dict().items())
    with torch.no_grad():
        assert torch.equal(gpt(idx), expected)  # bit for bit: the model is as it was


@given(family=FAMILIES, seed=st.integers(0, 99))
def test_the_stream_is_the_sum_of_what_was_added(family, seed):
    gpt, idx = random_gpt(seed, **SHAPES[family]), random_ids(1, 8, seed=seed)
    looker = Looker(gpt)
    trace = looker.trace(idx)
    total = trace.stream[0] + sum(trace.attended) + sum(trace.computed)
    assert torch.allclose(total, trace.stream[-1], atol=1e-4)
    assert torch.allclose(looker.lens(trace.stream[-1]), trace.logits, atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_parts_of_queries_and_keys_add_up(positions, norm, qk_norm):
    gpt = random_gpt(positions=positions, norm=norm, qk_norm=qk_norm, n_kv_head=1)
    idx, trace = torch.tensor([IDS]), Looker(gpt).trace(torch.tensor([IDS]))
    found = parts_of_first_layer(gpt, idx)
    _, rotation = gpt.embed(idx, torch.arange(8)[None])
    for name, whole in (("q", trace.q[0][0]), ("k", trace.k[0][0])):
        total = sum(found[name].values())  # (heads, T, hs)
        if rotation is not None:
            total = rotate(total.transpose(0, 1)[None], *rotation)[0].transpose(0, 1)
        assert torch.allclose(total, whole, atol=1e-4)
        assert (found[name]["place"].abs().max() > 1e-3) == (positions != "rotary")


# What-ifs, against loops that share no line with them


def naive_attention(q, k, v, score, mask, scaled):
    """q (nh, T, hs), k and v (nkv, T, hs), lists of lists of numbers -> (nh, T, hs), number by number."""
    nh, T, hs = len(q), len(q[0]), len(q[0][0])
    group, result = nh // len(k), []
    for h in range(nh):
        keys, values, rows = k[h // group], v[h // group], []
        for t in range(T):
            seen = {"causal": range(t + 1), "none": range(T), "flipped": range(t, T)}[mask]
            scores = []
            for s in seen:
                a, b = (keys[t], q[h][s]) if score == "swapped" else (q[h][t], keys[s])
                products = [
                    x * x * y * y if score == "of_squares" else x * y for x, y in zip(a, b, strict=True)
                ]
                total = sum(products)
                total = {"squared": total * total, "reversed": -total}.get(score, total)
                scores.append(total / math.sqrt(hs) if scaled else total)
            powers = [math.exp(one - max(scores)) for one in scores]
            weights = [one / sum(powers) for one in powers]
            rows.append(
                [sum(w * values[s][c] for w, s in zip(weights, seen, strict=True)) for c in range(hs)]
            )
        result.append(rows)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("score", SCORES)
def test_a_changed_formula_is_what_its_name_says(score, mask, scaled):
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 5, 6), torch.randn(2, 5, 6), torch.randn(2, 5, 6)
    found, _, _ = attention(*(part.double()[None] for part in (q, k, v)), WhatIf(score, mask, scaled))
    expected = naive_attention(q.tolist(), k.tolist(), v.tolist(), score, mask, scaled)
    assert torch.allclose(found[0], expected, atol=1e-9)


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("name", WHAT_IFS)
def test_the_loss_of_a_change_is_that_of_the_text_read_again(family, name):
    gpt = random_gpt(**SHAPES[family])
    what_if = WHAT_IFS[name]
    idx = torch.tensor([IDS])
    positions = torch.arange(7)[None]
    x, rotation = gpt.embed(idx[:, :-1], positions if what_if.positions else 0 * positions)
    with torch.no_grad():
        for block in gpt.transformer.h:
            attn, of_heads = block.attn, block.attn.head_size
            q, k, v = attn.c_attn(block.ln_1(x))[0].unflatten(1, (-1, of_heads)).split(attn.heads, dim=1)
            q, k = attn.q_norm(q), attn.k_norm(k)
            if rotation is not None:
                q, k = (rotate(part[None], *rotation)[0] for part in (q, k))
            lists = [part.transpose(0, 1).tolist() for part in (q, k, v)]
            y = naive_attention(*lists, what_if.score, what_if.mask, what_if.scaled)
            x = x + attn.c_proj(y.float().transpose(0, 1).flatten(1)[None])
            x = x + block.mlp(block.ln_2(x))
        logprobs = gpt.lm_head(gpt.transformer.ln_f(x))[0].log_softmax(dim=-1)
    expected = [-logprobs[t, id].item() for t, id in enumerate(IDS[1:])]
    found = measured(Looker(gpt), IDS, what_if)
    assert found["loss"] == pytest.approx(sum(expected) / 7, abs=1e-5)
    assert found["last_loss"] == pytest.approx(expected[-1], abs=1e-5)


def test_only_a_change_changes_the_loss():
    looker = Looker(random_gpt())
    losses = {name: measured(looker, IDS, what_if)["loss"] for name, what_if in WHAT_IFS.items()}
    assert len({round(loss, 5) for loss in losses.values()}) == len(WHAT_IFS)


@pytest.mark.parametrize("family", SHAPES)
def test_a_head_that_is_off_adds_nothing(family):
    gpt = random_gpt(**SHAPES[family])
    looker, hs = Looker(gpt), gpt.config.head_channels
    whole = looker.losses(torch.tensor([IDS])).mean()
    found = loss_without_heads(looker, IDS)
    for layer, block in enumerate(gpt.transformer.h):
        for head in range(gpt.config.n_head):
            columns = block.attn.c_proj.weight.data[:, head * hs : (head + 1) * hs]
            before = columns.clone()
            columns.zero_()  # by another way: nothing of this head reaches the stream
            expected = looker.losses(torch.tensor([IDS])).mean() - whole
            columns.copy_(before)
            assert found[layer, head] == pytest.approx(expected.item(), abs=1e-5)


def test_a_cut_edge_is_a_weight_of_zero_in_every_layer():
    gpt = random_gpt()
    looker, t, s = Looker(gpt), 6, 2
    hidden = torch.zeros(1, 8, 8, dtype=torch.bool)
    hidden[0, t, s] = True
    cut = looker.trace(torch.tensor([IDS]), WhatIf(hidden=hidden))
    plain = looker.trace(torch.tensor([IDS]))
    assert all((weights[0, :, t, s] == 0).all() for weights in cut.weights)
    assert torch.equal(cut.logits[0, :t], plain.logits[0, :t])  # tokens before know nothing of it
    change = cut.logits[0, t].log_softmax(-1)[IDS[t + 1]] - plain.logits[0, t].log_softmax(-1)[IDS[t + 1]]
    assert cut_edges(looker, IDS, [t])[t][s] == pytest.approx(change.item(), abs=1e-5)


def test_all_edges_of_a_short_text_are_cut_and_the_last_of_a_long_one():
    assert rows_to_cut(8) == list(range(8))
    assert rows_to_cut(1000) == [999]
    assert rows_to_cut(100) == [94, 95, 96, 97, 98, 99]


def test_the_first_token_without_itself_takes_nothing():
    change = cut_edges(Looker(random_gpt()), IDS, [0])[0]
    assert change.isfinite().all()


def test_under_the_mask_no_row_knows_the_ending():
    looker = Looker(random_gpt())
    masked, free = (other_endings(looker, IDS, WHAT_IFS[name]) for name in ("as_trained", "no_mask"))
    assert max(masked) < 1e-6 and min(free) > 1e-4


def test_a_small_model_is_trained_with_a_change(tiny_set, monkeypatch):
    monkeypatch.setattr(retrained, "SMALL", {**retrained.SMALL, "n_layer": 1, "n_embd": 32, "block_size": 16})
    names = ("as_trained", "no_mask")
    found = retrained.compared(Dataset(tiny_set), [0], steps=250, names=names, tell=lambda line: None)
    trained = found["no_mask"]["trained"]
    assert found["as_trained"]["trained"] == found["as_trained"]["operated"]
    assert trained["loss"] < 0.9 * trained["last_loss"]  # it copies what it sees; the last token sees nothing
