"""model.py against what it claims: the formulas, GPT-2 itself, one forward for training and generation."""

import math
import re
import shutil

import pytest
import torch
from conftest import FAMILIES, SHAPES, SMALL, logits_of, random_gpt, random_ids, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kqv.formats import renaming, resize
from kqv.formats.families import GPT2
from kqv.training.optimizer import parameter_groups
from model import GPT, CausalSelfAttention, GPTConfig, KVCache, NextToken

GPT2_SIZES = {"124M": (12, 12), "350M": (24, 16), "774M": (36, 20), "1558M": (48, 25)}  # (n_layer, n_head)


# Attention and the whole model, against independent implementations


def attention_by_the_formula(attention, x):
    """softmax(Q K^T / sqrt(hs) + mask) V, token by token and head by head."""
    B, T, C = x.shape
    hs = C // attention.n_head
    q, k, v = F.linear(x, attention.c_attn.weight, attention.c_attn.bias).chunk(3, dim=-1)  # 3 x (B, T, C)
    heads = []
    for head in range(attention.n_head):
        Q, K, V = (part[:, :, head * hs : (head + 1) * hs] for part in (q, k, v))  # (B, T, hs)
        scores = torch.einsum("bth,bsh->bts", Q, K) / math.sqrt(hs)  # (B, T, S)
        for t in range(T):
            scores[:, t, t + 1 :] = -math.inf
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        heads.append(torch.einsum("bts,bsh->bth", weights, V))
    return F.linear(torch.cat(heads, dim=-1), attention.c_proj.weight, attention.c_proj.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_attention_is_the_formula(bias, dropout):
    torch.manual_seed(0)
    config = GPTConfig(block_size=10, n_head=3, n_embd=24, bias=bias, dropout=dropout)
    attention = randomise(CausalSelfAttention(config), std=0.5).eval()  # eval: dropout is off
    x = torch.randn(2, 10, 24)
    torch.testing.assert_close(attention(x), attention_by_the_formula(attention, x), atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_training_alone():
    gpt, idx = random_gpt(dropout=0.5), random_ids(2, 8)
    assert torch.equal(logits_of(gpt, idx), logits_of(random_gpt(dropout=0.0), idx))
    gpt.train()
    assert not torch.equal(logits_of(gpt, idx), logits_of(gpt, idx))


@pytest.mark.parametrize("place", ["drop", "h.0.attn.resid_dropout", "h.1.mlp.dropout"])
def test_dropout_acts_in_each_of_its_places(place):
    gpt, idx = random_gpt(dropout=0.5).train(), random_ids(2, 8)
    for name, module in gpt.transformer.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 if name == place else 0.0
    assert not torch.equal(logits_of(gpt, idx), logits_of(gpt, idx))


@pytest.mark.parametrize("size", GPT2_SIZES)
def test_logits_equal_hugging_faces_gpt2(size):
    transformers = pytest.importorskip("transformers")
    n_layer, n_head = GPT2_SIZES[size]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": 4 * n_head, "vocab_size": 61}
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=12, attn_implementation="eager", **shape)
    theirs = randomise(transformers.GPT2LMHeadModel(config), std=0.3).eval()
    weights = renaming.our_weights(theirs.state_dict(), GPT2)
    ours = GPT.from_weights(GPTConfig(block_size=12, **shape), weights).eval()
    idx = random_ids(3, 12, below=61)
    with torch.no_grad():
        expected = theirs(idx).logits  # (B, T, V)
    assert expected.std() > 0.5  # numbers that a wrong model would not meet by being near zero
    torch.testing.assert_close(logits_of(ours, idx), expected, atol=1e-4, rtol=0)


@settings(deadline=None, max_examples=40)
@given(changed=st.integers(0, 7), seed=st.integers(0, 9), new_seed=st.integers(10, 19), family=FAMILIES)
def test_later_tokens_never_change_earlier_logits(changed, seed, new_seed, family):
    gpt, idx = random_gpt(**SHAPES[family]), random_ids(2, 8, seed=seed)
    other = torch.cat([idx[:, :changed], random_ids(2, 8 - changed, seed=new_seed)], dim=1)
    assert torch.equal(logits_of(gpt, idx)[:, :changed], logits_of(gpt, other)[:, :changed])


def test_every_token_sees_every_token_before_it():
    gpt = random_gpt(n_layer=1)
    for position in range(8):
        idx, other = random_ids(1, 8), random_ids(1, 8)
        other[:, position] = (other[:, position] + 1) % 19
        changed = (logits_of(gpt, idx) - logits_of(gpt, other)).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [t >= position for t in range(8)]


# The cache: the same numbers, computed once


@torch.no_grad()
def read(gpt, cache, idx, narrow=False):
    """
    Read more tokens (B, T) of rows that may be at different places -> their logits (B, T, V). `narrow`: look
    at no more slots than are needed.
    """
    if narrow:
        cache.span = int(cache.length.max()) + idx.size(1)
    return gpt(idx, cache=cache)


@settings(deadline=None, max_examples=40)
@given(
    chunks=st.lists(st.integers(1, 8), min_size=1, max_size=8),
    batch_size=st.integers(1, 3),
    narrow=st.booleans(),
    family=FAMILIES,
)
def test_a_prompt_fed_in_chunks_gives_the_logits_of_all_at_once(chunks, batch_size, narrow, family):
    gpt, idx, seen = random_gpt(**SHAPES[family]), random_ids(batch_size, 8), 0
    cache = KVCache(gpt.config, batch_size)
    for chunk in chunks:
        if seen + chunk <= 8:
            logits = read(gpt, cache, idx[:, seen : seen + chunk], narrow)
            seen += chunk
            torch.testing.assert_close(
                logits, logits_of(gpt, idx[:, :seen])[:, -chunk:], atol=1e-5, rtol=1e-5
            )


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    chunk=st.integers(1, 2),
    narrow=st.booleans(),
    family=FAMILIES,
)
def test_rows_of_different_lengths_side_by_side_give_what_each_gives_alone(lengths, chunk, narrow, family):
    gpt, idx = random_gpt(**SHAPES[family]), random_ids(len(lengths), 8)
    cache = KVCache(gpt.config, len(lengths))
    if any(lengths):
        # The shorter ones are padded on the right, here with any ids.
        read(gpt, cache, idx[:, : max(lengths)])
    cache.length.copy_(torch.tensor(lengths))
    more = torch.stack([row[length : length + chunk] for row, length in zip(idx, lengths, strict=True)])
    logits = read(gpt, cache, more, narrow)
    for row, length in enumerate(lengths):
        alone = logits_of(gpt, idx[row : row + 1, : length + chunk])[:, -chunk:]
        torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("n_kv_head", [1, 2, 3, 6])
def test_a_new_token_asks_with_all_queries_of_a_group_at_once(monkeypatch, n_kv_head):
    shapes, attend = [], F.scaled_dot_product_attention

    def recorded(q, *arguments, **options):
        shapes.append((tuple(q.shape), options["enable_gqa"]))
        return attend(q, *arguments, **options)

    gpt, idx = random_gpt(n_head=6, n_kv_head=n_kv_head, n_embd=24, n_layer=1), random_ids(2, 8)
    cache, whole = KVCache(gpt.config, 2), logits_of(gpt, idx)
    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    for t in range(8):
        logits = read(gpt, cache, idx[:, t : t + 1], narrow=True)  # of the first token, there is no mask
        torch.testing.assert_close(logits, whole[:, t : t + 1], atol=1e-5, rtol=1e-5)
    assert shapes == [((2, n_kv_head, 6 // n_kv_head, 4), False)] * 8


def test_what_older_texts_left_in_a_cache_is_never_looked_at():
    gpt, idx = random_gpt(), random_ids(2, 5)
    cache = KVCache(gpt.config, 2)
    for layer in cache.layers:
        layer.k.fill_(50.0)
        layer.v.fill_(50.0)
    read(gpt, cache, idx[:, :4])
    logits = read(gpt, cache, idx[:, 4:])
    torch.testing.assert_close(logits, logits_of(gpt, idx)[:, -1:], atol=1e-5, rtol=1e-5)


def test_a_cache_used_without_care_gives_the_right_logits_or_an_error():
    """Nothing but `gpt(idx, cache=cache)` is asked of the caller: the cache counts, and looks far enough."""
    gpt, idx = random_gpt(), random_ids(2, 8)
    cache = KVCache(gpt.config, 2)
    for t in range(8):
        logits = read(gpt, cache, idx[:, t : t + 1])
        torch.testing.assert_close(logits, logits_of(gpt, idx)[:, t : t + 1], atol=1e-5, rtol=1e-5)
    before = [layer.k.clone() for layer in cache.layers]
    with pytest.raises(ValueError, match="room for 8 .* 9"):  # a full row, which has no next slot
        read(gpt, cache, idx[:, :1])
    assert cache.length.tolist() == [8, 8]
    assert all(torch.equal(layer.k, old) for layer, old in zip(cache.layers, before, strict=True))
    cache = KVCache(gpt.config, 2)
    read(gpt, cache, idx[:, :5])
    cache.span = 4  # less than what is in it
    with pytest.raises(ValueError, match="room for 4 .* 6"):
        read(gpt, cache, idx[:, 5:6])
    with pytest.raises(ValueError, match="positions and a cache"):
        gpt(idx, positions=torch.zeros_like(idx), cache=cache)


def test_a_cache_has_a_slot_for_each_position_or_as_many_as_are_asked_for():
    gpt, idx = random_gpt(), random_ids(3, 5)
    assert KVCache(gpt.config, 3).layers[1].v.numel() == 3 * 8 * 16
    cache = KVCache(gpt.config, 3, slots=5, dtype=torch.float32)
    assert {kept.numel() for layer in cache.layers for kept in (layer.k, layer.v)} == {3 * 5 * 16}
    read(gpt, cache, idx[:, :4])
    logits = read(gpt, cache, idx[:, 4:])
    assert cache.length.tolist() == [5, 5, 5]
    torch.testing.assert_close(logits, logits_of(gpt, idx)[:, -1:], atol=1e-5, rtol=1e-5)


# Initialisation, parameters, names


def test_the_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=32, vocab_size=1000, n_layer=4, n_head=4, n_embd=64))
    loss = NextToken(gpt)(random_ids(4, 32, below=1000), random_ids(4, 32, below=1000, seed=1))
    assert abs(loss.item() - math.log(1000)) < 0.05


@pytest.mark.parametrize("n_layer", [1, 8])
def test_the_initial_weights_are_gpt2s(n_layer):
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=n_layer, n_head=2, n_embd=128))
    for name, parameter in gpt.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * std, name


def test_the_head_is_the_embedding():
    gpt = GPT(GPTConfig(**SMALL))
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    names = [name for name, _ in gpt.named_parameters()]  # an optimizer's state follows this order: nanoGPT's
    assert names[:2] == ["transformer.wte.weight", "transformer.wpe.weight"] and "lm_head.weight" not in names


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_names_are_nanogpts(bias):
    kinds = ("weight", "bias") if bias else ("weight",)
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    expected = ["transformer.wte.weight", "transformer.wpe.weight"]
    for layer in range(2):
        expected += [f"transformer.h.{layer}.{part}.{kind}" for part in parts for kind in kinds]
    expected += [f"transformer.ln_f.{kind}" for kind in kinds] + ["lm_head.weight"]
    assert list(GPT(GPTConfig(**SMALL, bias=bias)).state_dict()) == expected


def parameters_by_the_formula(V, T, C, n_layer, bias):
    matrices = 3 * C * C + C * C + 4 * C * C + 4 * C * C
    biases = 3 * C + C + 4 * C + C if bias else 0
    layer_norm = 2 * C if bias else C
    return V * C + T * C + n_layer * (matrices + biases + 2 * layer_norm) + layer_norm


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("vocab_size", [50257, 50304])
def test_parameters_and_flops_of_the_124m(vocab_size, bias):
    with torch.device("meta"):  # shapes alone
        gpt = GPT(GPTConfig(vocab_size=vocab_size, bias=bias))
    total = parameters_by_the_formula(vocab_size, T=1024, C=768, n_layer=12, bias=bias)
    assert gpt.num_parameters(without_positions=False) == total
    assert gpt.num_parameters() == total - 1024 * 768
    attention = 12 * 2 * 2 * 768 * 1024  # in 12 layers, Q K^T and weights V: a multiply and an add for each
    assert gpt.flops_per_token() == 6 * (total - 1024 * 768) + 3 * attention
    if vocab_size == 50257 and bias:
        assert total == 124_439_808  # as GPT-2's 124M is usually counted


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_decay_and_vectors_do_not(bias):
    gpt = GPT(GPTConfig(**SMALL, bias=bias))
    decaying, other = parameter_groups(gpt, 0.1)
    assert decaying["weight_decay"] == 0.1 and other["weight_decay"] == 0.0
    assert all(p.dim() >= 2 for p in decaying["params"]) and all(p.dim() == 1 for p in other["params"])
    grouped = [id(p) for p in decaying["params"] + other["params"]]
    assert len(grouped) == len(set(grouped)) and set(grouped) == {id(p) for p in gpt.parameters()}
    assert len(decaying["params"]) == 2 + 4 * 2  # wte (which is lm_head too), wpe, four matrices a block


def test_frozen_parameters_are_in_no_group():
    gpt = GPT(GPTConfig(**SMALL))
    gpt.transformer.wpe.weight.requires_grad_(False)
    grouped = [p for group in parameter_groups(gpt, 0.1) for p in group["params"]]
    assert len(grouped) == len(list(gpt.parameters())) - 1
    assert all(p is not gpt.transformer.wpe.weight for p in grouped)


# Loss and gradients


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_reaches_every_parameter(bias):
    gpt = random_gpt(bias=bias).train()
    loss = NextToken(gpt)(random_ids(4, 8), random_ids(4, 8, seed=1))
    loss.backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if parameter.dim() == 1:
            assert parameter.grad.any(), name
        else:
            assert parameter.grad.any(dim=1).all(), name  # every row: every position, every id, every channel


def test_the_gradient_is_that_of_the_loss():
    gpt = random_gpt(n_layer=1).double()
    idx, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    NextToken(gpt)(idx, targets).backward()
    torch.manual_seed(0)
    for name, parameter in gpt.named_parameters():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ahead = gpt_loss_at(gpt, parameter, 1e-5 * direction, idx, targets)
            behind = gpt_loss_at(gpt, parameter, -1e-5 * direction, idx, targets)
        slope = (parameter.grad * direction).sum().item()
        assert (ahead - behind) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8), name


def gpt_loss_at(gpt, parameter, offset, idx, targets):
    parameter += offset
    loss = NextToken(gpt)(idx, targets).item()
    parameter -= offset
    return loss


def test_the_loss_is_the_mean_over_targets_that_are_not_minus_1():
    gpt, idx, targets = random_gpt(), random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[0, 2:] = targets[1, 5] = -1
    loss = NextToken(gpt)(idx, targets)
    counted = [(b, t) for b in range(2) for t in range(8) if targets[b, t] >= 0]
    log_p = logits_of(gpt, idx).log_softmax(dim=-1)
    expected = -sum(log_p[b, t, targets[b, t]] for b, t in counted) / len(counted)
    assert len(counted) == 2 + 7
    torch.testing.assert_close(loss, expected)


def test_targets_that_hugging_face_ignores_are_not_learnt():
    gpt, idx, targets = random_gpt(), random_ids(2, 8), random_ids(2, 8, seed=1)
    targets[0, 2:] = -1
    expected = NextToken(gpt)(idx, targets)
    targets[0, 2:] = -100
    assert torch.equal(NextToken(gpt)(idx, targets), expected)
    assert targets[0, 2] == -100  # the caller's


def test_the_model_learns_a_batch_by_heart():
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(**SMALL))
    optimizer = torch.optim.AdamW(parameter_groups(gpt, 0.0), lr=1e-2)
    idx, targets = random_ids(4, 8), random_ids(4, 8, seed=1)
    for _ in range(100):
        loss = NextToken(gpt)(idx, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


# Shapes that can and can't be


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"n_embd": 17}, "n_embd=17 .*n_head=2"),
        ({"n_embd": 2, "n_head": 3}, "n_embd=2 .*n_head=3"),
        *(({name: value}, f"{name}.*{value}") for name in SMALL for value in (0, -4)),
        *(({"n_kv_head": count}, f"n_kv_head.*{count}") for count in (3, 4, -1)),
        ({"positions": "rotary", "head_size": 5}, "rotary .*even.*5"),
        *(
            ({"rope_theta": theta}, f"rope_theta.*{theta}")
            for theta in (0, 1.0, -1, math.inf, math.nan, 10**400)
        ),
        *(({"rope_factor": factor}, f"rope_factor.*{factor}") for factor in (0, 0.5, math.inf, math.nan)),
        *(({"rope_slow": slow}, f"rope_slow.*{slow}") for slow in (4.0, 5.0, -1, math.nan)),
        *(({"norm_eps": eps}, f"norm_eps.*{eps}") for eps in (-1, math.inf, math.nan)),
    ],
)
def test_a_shape_that_cannot_be_is_refused_with_its_values(wrong, named):
    with pytest.raises(ValueError, match=named):
        GPTConfig(**{**SMALL, **wrong})


@pytest.mark.parametrize(
    "shape",
    [
        {"positions": "rotary", "rope_theta": 1e10},
        {"positions": "rotary", "rope_theta": 1.5, "rope_factor": 1e10},
        {"positions": "sinusoidal", "n_embd": 15, "n_head": 3},
        {"positions": "sinusoidal", "n_embd": 1, "n_head": 1},
        {"norm": "rmsnorm", "norm_eps": 0},
    ],
)
def test_an_unusual_shape_computes(shape):
    gpt = random_gpt(**shape)
    assert logits_of(gpt, random_ids(2, 8)).isfinite().all()
    if gpt.config.positions == "sinusoidal":
        x, _ = gpt.embed(torch.zeros(1, 8, dtype=torch.long), torch.arange(8)[None])
        C, waves = gpt.config.n_embd, x - gpt.transformer.wte.weight[0] * math.sqrt(gpt.config.n_embd)
        pairs = (C + 1) // 2
        expected = [
            [
                math.sin(t / 1e4 ** (2 * i / C)) if i < pairs else math.cos(t / 1e4 ** (2 * (i - pairs) / C))
                for i in range(C)
            ]
            for t in range(8)
        ]
        torch.testing.assert_close(waves[0], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_embd, n_head", [(17, 2), (2, 3), (100, 12), (7, 7)])
def test_the_width_that_a_refused_shape_is_told_to_use_works(n_embd, n_head):
    try:
        GPTConfig(n_embd=n_embd, n_head=n_head)
    except ValueError as error:
        suggested = int(re.findall(r"n_embd=(\d+)", str(error))[-1])
        assert GPTConfig(n_embd=suggested, n_head=n_head).n_embd == suggested != n_embd


def test_more_tokens_than_block_size_are_refused():
    gpt = random_gpt()
    with pytest.raises(ValueError, match=r"\b9\b.*\b8\b"):
        gpt(random_ids(1, 9))
    cache = KVCache(gpt.config, 1)
    read(gpt, cache, random_ids(1, 8))
    with pytest.raises(ValueError, match=r"\b8\b.*\b9\b"):
        read(gpt, cache, random_ids(1, 1))


def test_crop_block_size_keeps_the_logits_of_short_inputs():
    gpt, idx = random_gpt(), random_ids(2, 5)
    before = logits_of(gpt, idx)
    resize.crop_block_size(gpt, 5)
    assert torch.equal(logits_of(gpt, idx), before)
    assert gpt.config.block_size == 5 and gpt.state_dict()["transformer.wpe.weight"].shape == (5, 16)
    again = GPT.from_weights(gpt.config, gpt.state_dict())
    assert torch.equal(logits_of(again.eval(), idx), before)
    with pytest.raises(ValueError, match="6"):
        gpt(random_ids(1, 6))
    assert gpt.transformer.wpe.weight.untyped_storage().nbytes() == 5 * 16 * 4  # what a checkpoint would save
    NextToken(gpt)(idx, idx).backward()
    assert gpt.transformer.wpe.weight.grad.shape == (5, 16)


@pytest.mark.parametrize("block_size", [0, -1, 9])
def test_crop_block_size_only_shortens(block_size):
    gpt = random_gpt()
    with pytest.raises(ValueError, match=rf"{block_size}\b.*8"):
        resize.crop_block_size(gpt, block_size)
    assert gpt.config.block_size == 8
    resize.crop_block_size(gpt, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_gpt_from_weights_is_ready_to_use_and_owns_its_memory(dtype):
    weights = {name: weight.to(dtype) for name, weight in random_gpt().state_dict().items()}
    gpt, other = (GPT.from_weights(GPTConfig(**SMALL, dropout=0.5), weights) for _ in range(2))
    before = logits_of(gpt, random_ids(2, 8))
    assert not gpt.training and torch.equal(logits_of(gpt, random_ids(2, 8)), before)
    kept = {name: weight.clone() for name, weight in weights.items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 1
    assert torch.equal(logits_of(gpt, random_ids(2, 8)), before)
    assert all(torch.equal(weight, weights[name]) for name, weight in kept.items())
    for weight in weights.values():
        weight.zero_()
    assert torch.equal(logits_of(gpt, random_ids(2, 8)), before)
    assert gpt.transformer.wte.weight is gpt.lm_head.weight
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in gpt.parameters())


def test_a_gpt_shares_its_weights_memory_where_asked_to():
    weights = random_gpt().state_dict()
    gpt = GPT.from_weights(GPTConfig(**SMALL), weights, copy=False)
    for name, parameter in gpt.named_parameters():
        assert parameter.data_ptr() == weights[name].data_ptr(), name


def test_weights_of_another_shape_are_refused_in_one_line():
    weights = random_gpt().state_dict()
    for other in ({"n_layer": 3}, {"n_layer": 1}, {"n_embd": 32}, {"bias": False}):
        with pytest.raises(ValueError) as caught:
            GPT.from_weights(GPTConfig(**{**SMALL, **other}), weights)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("n_kv_head", [0, 2])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_equals_the_eager_one(backend, n_kv_head):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    gpt = random_gpt(n_layer=1, n_head=4, n_kv_head=n_kv_head)
    idx, targets = random_ids(2, 8), random_ids(2, 8, seed=1)
    compiled = torch.compile(gpt, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(idx), gpt(idx), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled(idx[:, :1]), gpt(idx[:, :1]), atol=1e-5, rtol=1e-5)
    loss = torch.compile(NextToken(gpt), backend=backend, fullgraph=True)(idx, targets)
    expected_loss = NextToken(gpt)(idx, targets)
    torch.testing.assert_close(loss, expected_loss)
    gradients = torch.autograd.grad(loss, list(gpt.parameters()))
    expected = torch.autograd.grad(expected_loss, list(gpt.parameters()))
    for gradient, expectation in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, expectation, atol=1e-5, rtol=1e-4)
