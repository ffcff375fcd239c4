"""From the contents of a checkpoint to its model, and which checkpoint is meant."""

from dataclasses import asdict

import pytest
import torch
from conftest import logits_of, random_gpt, random_ids

from kqv.errors import UserError
from kqv.formats import loading, resize


def contents_of(gpt, **changes):
    return {"model": gpt.state_dict(), "model_args": {**asdict(gpt.config), **changes}}


def test_a_checkpoints_contents_are_its_model():
    gpt = random_gpt(dropout=0.25)
    again = loading.model_of(contents_of(gpt, unknown=1), "x.pt").eval()
    idx = random_ids(2, 8)
    assert again.config == gpt.config and torch.equal(logits_of(again, idx), logits_of(gpt, idx))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_dropout_of_a_checkpoint_can_be_replaced(dropout):
    model = loading.model_of(contents_of(random_gpt(dropout=0.25)), "x.pt", dropout=dropout)
    found = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert model.config.dropout == dropout and found == {dropout}


@pytest.mark.parametrize("changes", [{"n_layer": 3}, {"n_embd": 32}, {"n_head": 5}, {"n_layer": "2"}])
def test_contents_that_are_no_gpt_are_refused_by_the_name_of_their_file(changes):
    with pytest.raises(UserError, match="x.pt holds no weights of a GPT: "):
        loading.model_of(contents_of(random_gpt(), **changes), "x.pt")


def test_rows_that_pad_the_vocabulary_are_cut_off():
    gpt = random_gpt()
    cut = resize.without_padding(gpt, 10).eval()
    idx = random_ids(2, 8, below=10)
    assert cut.config.vocab_size == 10 and cut.lm_head.weight is cut.transformer.wte.weight
    torch.testing.assert_close(logits_of(cut, idx), logits_of(gpt, idx)[..., :10])
    with pytest.raises(UserError, match="20 ids, but the weights are for 19"):
        resize.without_padding(gpt, 20)


def test_the_newest_checkpoint_serves_as_the_best(tmp_path):
    assert loading.find(tmp_path, "best") == loading.find(tmp_path, "newest") == tmp_path / "ckpt.pt"
    (tmp_path / "best.pt").touch()
    assert loading.find(tmp_path, "best") == tmp_path / "best.pt"
    assert str(loading.find(tmp_path, "other/a.pt")) == "other/a.pt"
