"""From the contents of a checkpoint to its model, and which checkpoint is meant."""

import math
from dataclasses import asdict

import pytest
import torch
from conftest import logits_of, random_gpt, random_ids

import sample
import train
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_theta", 0.0),
        ("rope_theta", math.nan),
        ("rope_factor", 0),
        ("rope_slow", 4.0),
        ("n_kv_head", 4),
        ("head_size", -8),
        ("norm_eps", math.inf),
        ("norm", ["rmsnorm"]),
        *(("n_layer", torch.tensor(value)) for value in (2, [[1, 2], [3, 4]])),
        *(
            (name, value)
            for name in ("tied_head", "qk_norm", "bias")
            for value in (1, "yes", torch.tensor([1, 2]))
        ),
    ],
    ids=lambda value: str(value).replace("\n", ""),
)
def test_a_checkpoint_of_a_shape_that_can_not_be_is_refused_in_a_line(cli, tiny_set, name, value):
    torch.save(contents_of(random_gpt(), **{name: value}), "x.pt")
    for main, argv in ((sample.main, ()), (train.main, ("--dataset=tiny", "--out_dir=out"))):
        status, _, err = cli(main, "--init_from=x.pt", "--device=cpu", *argv)
        assert status == 1 and len(err.splitlines()) == 1 and "x.pt" in err and name in err, err


def test_rows_that_pad_the_vocabulary_are_cut_off():
    gpt = random_gpt()
    cut = resize.without_padding(gpt, 10).eval()
    idx = random_ids(2, 8, below=10)
    assert cut.config.vocab_size == 10 and cut.lm_head.weight is cut.transformer.wte.weight
    torch.testing.assert_close(logits_of(cut, idx), logits_of(gpt, idx)[..., :10])


CHARS = "abcdefghijklmnopqrs"  # as many as a small model has rows


@pytest.mark.parametrize(
    "chars, says",
    [
        (CHARS + "t", {}),  # more ids than rows
        (CHARS[:-1], {"ids_in_loss": 19}),  # fewer than the loss knew
        (CHARS + "t", {"from_huggingface": "x"}),
    ],
)
def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(chars, says):
    contents = {**contents_of(random_gpt()), "tokenizer": {"kind": "char", "chars": chars}, **says}
    with pytest.raises(UserError, match=f"{len(chars)} ids, but the weights of x.pt have 19 rows"):
        loading.pair_of(contents, "x.pt")


@pytest.mark.parametrize("says", [{}, {"ids_in_loss": 18}])
def test_rows_that_pad_the_vocabulary_belong_to_the_tokenizer(says):
    contents = {**contents_of(random_gpt()), "tokenizer": {"kind": "char", "chars": CHARS[:-1]}, **says}
    assert loading.pair_of(contents, "x.pt")[1].vocab_size == 18


BAD = [float("inf"), float("nan"), -5, 10**400, True, "three", [1], {}, torch.zeros(2), torch.tensor(1 + 2j)]


@pytest.mark.parametrize("name", ["iter_num", "windows", "evaluated", "bad_steps", "best_val_loss"])
def test_numbers_of_a_checkpoint_that_can_not_be_are_refused(tmp_path, name):
    # A loss may be inf, of a run that was never evaluated, or below 0, as minus a reward is.
    for value in [BAD[1], *BAD[3:]] if name == "best_val_loss" else BAD:
        torch.save({**contents_of(random_gpt()), name: value}, tmp_path / "x.pt")
        with pytest.raises(UserError, match=f"x.pt is damaged.*({name}|asks for)"):
            loading.load(tmp_path / "x.pt")


@pytest.mark.parametrize("name", [".", "/", "..", ""])
def test_a_checkpoint_in_a_folders_name_is_refused(name):
    with pytest.raises(UserError):
        loading.load(name)


def test_a_checkpoint_can_not_name_a_folder_to_read(tmp_path):
    torch.save({**contents_of(random_gpt()), "folder": "/", "from_huggingface": "x"}, tmp_path / "x.pt")
    assert not {"folder", "from_huggingface"} & loading.load(tmp_path / "x.pt").keys()


@pytest.mark.parametrize("dataset", ["../elsewhere", "data/../elsewhere"])
def test_no_path_in_a_checkpoint_is_followed_out_of_data(tmp_path, monkeypatch, dataset):
    for name in ("work/data", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "elsewhere/meta.json").write_text("{")  # if it is read, the error names it
    monkeypatch.chdir(tmp_path / "work")
    for named in (dataset, str(tmp_path / "elsewhere")):
        with pytest.raises(UserError, match="the checkpoint has no tokenizer"):
            loading.tokenizer_of({**contents_of(random_gpt()), "config": {"dataset": named}})


def test_the_newest_checkpoint_serves_as_the_best(tmp_path):
    assert loading.find(tmp_path, "best") == loading.find(tmp_path, "newest") == tmp_path / "ckpt.pt"
    (tmp_path / "best.pt").touch()
    assert loading.find(tmp_path, "best") == tmp_path / "best.pt"
    assert str(loading.find(tmp_path, "other/a.pt")) == "other/a.pt"
