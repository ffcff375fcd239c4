"""Our tokenizers in transformers, the real one."""

import pytest
from conftest import random_ids
from exports import (
    CHATS,
    CONVERSATIONS,
    KINDS,
    TRICKY,
    as_dicts,
    exported,
    in_transformers,
    save_run,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import export
from kqv.formats import tokenizer_json
from kqv.text.tokenizers import PATTERNS, BPETokenizer, from_json


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_the_same_ids_in_transformers(kind):
    ours, tokenizer = exported(kind).tokenizer, in_transformers(kind)[1]

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text() | st.text("aàA's 1.\n\r\t\u00a0\u0903\u3000中"))
    def check(text):
        expected = ours.encode(text, unknown="skip").tolist()
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected, skip_special_tokens=True) == ours.decode(expected)

    for text in TRICKY:
        if not kind.startswith("chat") or "<|" not in text:
            check = example(text)(check)
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_are_the_same_text_in_transformers(kind):
    ours, tokenizer = exported(kind).tokenizer, in_transformers(kind)[1]
    for seed in range(20):
        ids = random_ids(30, below=ours.vocab_size, seed=seed).tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == ours.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_text_is_known_to_transformers(kind):
    model, tokenizer = in_transformers(kind)
    ours = exported(kind).tokenizer
    end = ours.vocab_size if ours.separator is None else ours.separator
    for known in (model.config, model.generation_config, tokenizer):
        assert known.bos_token_id == known.eos_token_id == known.pad_token_id == end
    assert tokenizer.model_max_length == model.config.n_positions == 128
    assert set(tokenizer("a")) == {"input_ids", "attention_mask"}
    assert end in tokenizer.all_special_ids


def test_a_chats_marks_are_special_in_transformers():
    ours, tokenizer = exported("chat-byte").tokenizer, in_transformers("chat-byte")[1]
    assert sorted(tokenizer.all_special_ids) == [ours.separator, *ours.marks]
    assert tokenizer("a<|user|>b")["input_ids"] == [97, ours.user, 98]  # a text can forge a mark there


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("kind", CHATS)
def test_the_chat_template_gives_the_ids_of_encode_chat(kind, messages):
    ours, tokenizer = exported(kind).tokenizer, in_transformers(kind)[1]
    for add in (False, True):
        found = tokenizer.apply_chat_template(as_dicts(messages), add_generation_prompt=add, return_dict=True)
        assert found["input_ids"] == ours.encode_chat(messages, unknown="skip").tolist()


def test_the_chat_template_knows_three_roles():
    with pytest.raises(Exception, match="a role is system, user or assistant"):
        in_transformers("chat-byte")[1].apply_chat_template([{"role": "tool", "content": "x"}])


def test_only_a_chat_has_a_template():
    assert not in_transformers("byte")[1].chat_template


def test_a_word_that_is_a_piece_is_that_piece(tmp_path):
    """Even where no merges lead to it, as in no vocabulary that was learnt."""
    transformers = pytest.importorskip("transformers")
    ours = BPETokenizer([*(bytes([byte]) for byte in range(256)), b"xyz"])
    save_run(tmp_path / "run", ours)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in ("xyz", "xyzx"):
        assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert ours.encode("xyz").tolist() == [256]


# Parts


def test_every_way_to_make_a_piece_is_a_merge():
    assert tokenizer_json.merges_of([b"a", b"b", b"ab", b"ba", b"aba", b"x!"]) == [
        (b"a", b"b"),
        (b"b", b"a"),
        (b"a", b"ba"),
        (b"ab", b"a"),
    ]


def test_no_piece_of_a_line_without_words_is_endless():
    """And learning from such a line is quick, where it took minutes."""
    learnt = BPETokenizer.trained_on(["a" * 20_000], 400)
    assert max(map(len, learnt.pieces)) == 64


def test_definitions_keep_their_pattern():
    definition = {**exported("bpe").tokenizer.to_json(), "pattern": PATTERNS["gpt-2"]}
    assert from_json(definition).to_json() == definition
