"""LoRA beside its definition, W + alpha / rank B A, and the hash of a base."""

import copy

import pytest
import torch
from conftest import MODERN, logits_of, random_gpt, random_ids
from torch import nn
from torch.func import functional_call

from kqv.formats import base, lora, resize
from kqv.formats.merging import merge_for
from kqv.training.loss import next_token_loss
from kqv.training.objective import checkpoint_activations
from model import GPT, Block, GPTConfig, NextToken

RANK, ALPHA = 3, 6.0


def adapted(new_ids=0, targets=lora.LAYERS, **shape):
    """A random GPT and the same with an adapter of random numbers."""
    gpt = random_gpt(**shape)
    other = lora.adapt(copy.deepcopy(gpt), RANK, ALPHA, targets, new_ids)
    for layer in lora.lora_layers(other):
        nn.init.normal_(layer.lora_B, std=0.3)
    return gpt, other


def of_all_shapes(test):
    return pytest.mark.usefixtures("every_shape")(test)


def test_the_layers_are_those_of_the_model():
    block = Block(GPTConfig(**{**MODERN, "n_embd": 16, "n_head": 2}))
    names = [name.split(".")[-1] for name, part in block.named_modules() if isinstance(part, nn.Linear)]
    assert {*names} == {*lora.LAYERS}


@of_all_shapes
def test_an_adapter_begins_as_its_base_bit_for_bit():
    gpt, idx = random_gpt(), random_ids(2, 8)
    before = logits_of(gpt, idx)
    names = [*gpt.state_dict()]
    assert torch.equal(logits_of(lora.adapt(gpt, RANK, ALPHA), idx), before)
    assert {*names} < {*gpt.state_dict()}


@of_all_shapes
def test_gradients_are_those_of_a_weight_with_the_product_added():
    """In float64, beside the definition; nothing else has a gradient."""
    _, gpt = adapted()
    gpt, idx = gpt.double(), random_ids(2, 8)
    NextToken(gpt)(idx, idx.roll(-1, 1)).backward()
    parts = {name: p.detach().clone().requires_grad_() for name, p in lora.learnt(gpt).items()}
    plain = lora.merge(copy.deepcopy(gpt))
    weights = {name: weight.detach() for name, weight in gpt.named_parameters() if name not in parts}
    for name in parts:
        if name.endswith(lora.A):
            layer = name.removesuffix(f".{lora.A}")
            A, B = parts[name], parts[f"{layer}.{lora.B}"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + ALPHA / RANK * (B @ A)
    x = functional_call(plain, weights, (idx,))  # (B, T, V)
    nn.functional.cross_entropy(x.flatten(0, 1), idx.roll(-1, 1).flatten()).backward()
    assert len(parts) == 2 * len(lora.lora_layers(gpt)) >= 8
    for name, parameter in gpt.named_parameters():
        if name in parts:
            torch.testing.assert_close(parameter.grad, parts[name].grad)
            assert parameter.grad.abs().max() > 0
        else:
            assert parameter.grad is None and not parameter.requires_grad


@of_all_shapes
@pytest.mark.parametrize("targets", [("c_attn",), ("c_proj", "c_gate"), lora.LAYERS])
def test_a_merged_model_is_a_plain_one_with_the_same_logits(targets):
    gpt, other = adapted(targets=targets)
    idx, names = random_ids(2, 8), [*gpt.state_dict()]
    expected, start = logits_of(other, idx), logits_of(gpt, idx)
    assert (expected - start).abs().max() > 0.01
    merged = lora.merge(other)
    torch.testing.assert_close(logits_of(merged, idx), expected, rtol=1e-5, atol=1e-5)
    assert [*merged.state_dict()] == names and not lora.is_adapted(merged)
    assert {type(part) for part in merged.modules()} == {type(part) for part in gpt.modules()}
    assert all(parameter.requires_grad for parameter in merged.parameters())


@of_all_shapes
def test_without_its_adapter_a_model_is_its_base():
    gpt, other = adapted()
    idx = random_ids(2, 8)
    expected, start = logits_of(other, idx), logits_of(gpt, idx)
    with pytest.raises(ZeroDivisionError), lora.without_adapter(other):
        assert torch.equal(logits_of(other, idx), start)
        raise ZeroDivisionError
    assert torch.equal(logits_of(other, idx), expected)
    with lora.without_adapter(gpt):
        assert torch.equal(logits_of(gpt, idx), start)


@pytest.mark.parametrize("how", ["checkpointing", "bfloat16"])
def test_adapters_learn_the_same_in_other_ways_of_computing(how):
    _, gpt = adapted()
    idx, found = random_ids(2, 8), []
    for other in (False, True):
        model = copy.deepcopy(gpt).train()
        if other and how == "checkpointing":
            checkpoint_activations(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=other and how == "bfloat16"):
            NextToken(model)(idx, idx).backward()
        found.append({name: p.grad for name, p in lora.learnt(model).items()})
    tolerance = {"rtol": 0.1, "atol": 0.02} if how == "bfloat16" else {}
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance)


# New rows


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_learn_as_in_a_plain_model_and_the_others_do_not(tied, smoothing, chunks, monkeypatch):
    from kqv.training import loss

    if chunks > 1:
        monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 8 * 19)
        monkeypatch.setattr(loss, "ROWS", 2)
    gpt, other = (model.double() for model in adapted(new_ids=4, tied_head=tied))
    for layer in lora.lora_layers(other):  # so that both compute the same
        nn.init.zeros_(layer.lora_B)
    idx = random_ids(2, 8)
    for model in (gpt, other):
        x = model.hidden(idx).flatten(0, 1)
        rows = getattr(model.lm_head, "new_rows", None)
        found = next_token_loss(x, model.lm_head.weight, idx.flatten(), 18, smoothing, new_rows=rows)
        found.backward()
    for mine, theirs in ((other.lm_head, gpt.lm_head), (other.transformer.wte, gpt.transformer.wte)):
        assert mine.weight.grad is None
        torch.testing.assert_close(mine.new_rows.grad, theirs.weight.grad[-4:])
        assert mine.new_rows.grad.abs().max() > 0
    assert (other.lm_head.new_rows is other.transformer.wte.new_rows) == tied


@pytest.mark.parametrize("tied", [True, False])
def test_logits_have_the_gradient_of_new_rows_too(tied):
    gpt, other = (model.double() for model in adapted(new_ids=4, tied_head=tied))
    idx = random_ids(2, 8)
    for layer in lora.lora_layers(other):
        nn.init.zeros_(layer.lora_B)
    for model in (gpt, other):
        model(idx).logsumexp(-1).sum().backward()
    torch.testing.assert_close(other.lm_head.new_rows.grad, gpt.lm_head.weight.grad[-4:])


@pytest.mark.parametrize("tied", [True, False])
def test_the_weight_shows_what_new_rows_have_learnt(tied):
    """On the device to which a model has gone, and when it is merged."""
    gpt, other = adapted(new_ids=4, tied_head=tied)
    other = other.double()
    with torch.no_grad():
        for part in (other.lm_head, other.transformer.wte):
            part.new_rows.copy_(torch.arange(64.0).view(4, 16))
            assert torch.equal(part.weight[-4:], part.new_rows)
            assert torch.equal(part.weight[:-4].float(), gpt.lm_head.weight[:-4]) == (
                tied or part is other.lm_head
            )
    merged = lora.merge(other)
    assert type(merged.lm_head) is nn.Linear and type(merged.transformer.wte) is nn.Embedding
    assert merged.lm_head.weight[-4:].flatten().tolist() == list(range(64))
    assert (merged.lm_head.weight is merged.transformer.wte.weight) == tied


def test_a_frozen_head_gets_no_gradient_nor_memory_for_one(monkeypatch):
    from kqv.training import loss

    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 8 * 19)
    monkeypatch.setattr(loss, "ROWS", 2)
    rooms = []
    room_for_loss = loss.room_for_loss
    monkeypatch.setattr(loss, "room_for_loss", lambda *args: rooms.append(room_for_loss(*args)) or rooms[-1])
    head, x = torch.randn(19, 16, dtype=torch.float64), torch.randn(16, 16, dtype=torch.float64)
    found = []
    for frozen in (False, True):
        leaves = x.clone().requires_grad_(), head.clone().requires_grad_(not frozen)
        next_token_loss(*leaves, random_ids(16)).backward()
        found.append(leaves)
    assert torch.equal(found[0][0].grad, found[1][0].grad)
    assert found[1][1].grad is None and found[0][1].grad is not None
    assert [room[2].numel() for room in rooms] == [19 * 16, 0]


# What does not fit


@pytest.mark.parametrize("rank", [0, 17, 10**9])
def test_a_rank_above_the_smaller_side_is_refused(rank):
    with pytest.raises(ValueError, match=f"c_attn: rank {rank} is not within 1 to 16"):
        lora.adapt(random_gpt(), rank, ALPHA)


def test_targets_that_the_model_lacks_are_left_out_if_one_is_there():
    gpt = lora.adapt(random_gpt(), RANK, ALPHA, ("c_gate", "c_fc"))
    assert len(lora.lora_layers(gpt)) == 2
    with pytest.raises(ValueError, match="no layer is called c_gate"):
        lora.adapt(random_gpt(), RANK, ALPHA, ("c_gate",))


@of_all_shapes
def test_a_merge_that_changes_the_logits_is_refused(monkeypatch):
    _, gpt = adapted()
    assert "logits differ by at most" in merge_for("f32", copy.deepcopy(gpt), "out")
    monkeypatch.setattr(lora.LoraLinear, "change", lambda layer: 0.99 * layer.lora_B @ layer.lora_A)
    with pytest.raises(Exception, match="out can't be merged into its base: .* differ by up to"):
        merge_for("f32", copy.deepcopy(gpt), "out")
    monkeypatch.undo()
    nn.init.constant_(lora.lora_layers(gpt)[0].lora_B, torch.nan)
    with pytest.raises(Exception, match="differ by up to nan"):
        merge_for("f32", gpt, "out")


# Counts


@of_all_shapes
def test_what_a_token_costs_leaves_out_the_gradients_of_frozen_weights():
    gpt = random_gpt()
    full, matrices = gpt.flops_per_token(), gpt.num_parameters()
    if not gpt.config.tied_head:
        matrices -= gpt.transformer.wte.weight.numel()
    lora.adapt(gpt, RANK, ALPHA)
    added = sum(parameter.numel() for parameter in lora.learnt(gpt).values())
    assert lora.flops_per_token(gpt) == full - 2 * matrices + 6 * added
    assert lora.parameters_in_words(gpt).endswith(f"M parameters, {added:,} of them trained")


# The hash of a base


@of_all_shapes
def test_the_hash_of_weights_is_of_their_numbers():
    gpt = random_gpt()
    weights = gpt.state_dict()
    expected = base.sha256_of(weights)
    shuffled = dict(reversed([(name, weight.clone()) for name, weight in weights.items()]))
    if gpt.config.tied_head:
        shuffled[base.HEAD] = shuffled[base.EMBEDDING]
    assert base.sha256_of(shuffled) == expected
    low = {name: weight.bfloat16() for name, weight in weights.items()}
    if gpt.config.tied_head:
        low[base.HEAD] = low[base.EMBEDDING]
    assert base.sha256_of({name: weight.float() for name, weight in low.items()}) != expected
    name = "transformer.h.1.attn.c_attn.weight"
    other = weights[name].clone()
    other[0, 0] += 1e-3
    assert base.sha256_of({**weights, name: other}) != expected
    assert base.sha256_of({**weights, name: weights[name].reshape(16, -1)}) != expected
    assert base.sha256_of({**weights, "a": weights[name]}) != expected


def test_low_precision_has_the_hash_of_the_same_numbers_in_float32():
    weights = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).half()}
    assert base.sha256_of(weights) == base.sha256_of({name: w.double() for name, w in weights.items()})


def test_a_base_takes_the_shape_of_its_adapter():
    gpt = random_gpt(block_size=8)
    shape = GPTConfig(**{**vars(gpt.config), "block_size": 5, "vocab_size": 24})
    known = gpt.lm_head.weight.detach().clone()
    resize.to_shape(gpt, shape, new_ids=7)
    assert gpt.config == shape and len(gpt.lm_head.weight) == 24
    assert torch.equal(gpt.lm_head.weight[:19], known) and isinstance(gpt, GPT)
    for change in ({"block_size": 9}, {"vocab_size": 18}, {"vocab_size": 40}, {"n_layer": 3}):
        with pytest.raises(ValueError):
            resize.to_shape(random_gpt(), GPTConfig(**{**vars(random_gpt().config), **change}), new_ids=7)
