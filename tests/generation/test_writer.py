"""Continuations: in which batches, in which order, when, and where they end."""

import pytest
from known_models import gpt_that_writes
from reference import positions_read

from kqv.generation.engine import Engine
from kqv.generation.writer import Writer, batched
from kqv.settings import parse
from kqv.text.tokenizers import ByteTokenizer
from sample import SampleSettings


@pytest.fixture
def writer_of():
    """
    A Writer whose model writes given bytes after a prompt of one token, and bytes[n:] after one of n more;
    and a list that grows with each forward: writer_of(b"abc", "--stop=c") -> (Writer, [(rows, positions)]).
    """

    def make(ids, *argv):
        gpt = gpt_that_writes(ids, 257)
        config = parse(SampleSettings, [f"--max_new_tokens={len(ids)}", *argv])
        return Writer(Engine(gpt), ByteTokenizer(), config), positions_read(gpt)

    return make


def test_prompts_of_similar_length_are_batched_together():
    prompts = [[0] * length for length in (10, 1, 2, 7, 1, 14)]
    config = parse(SampleSettings, ["--batch_size=2"])
    assert batched(prompts, config) == [[(1, 0), (4, 0)], [(2, 0), (3, 0)], [(0, 0), (5, 0)]]
    config = parse(SampleSettings, ["--batch_size=3", "--num_samples=2"])
    assert batched(prompts[:2], config) == [[(1, 0), (1, 1), (0, 0)], [(0, 1)]]
    config = parse(SampleSettings, ["--batch_size=3", "--num_samples=2", "--beams=2"])
    assert batched(prompts[:2], config) == [[(1, 0), (0, 0)]]  # a search finds all samples of a prompt
    assert batched([], config) == []


def test_pieces_come_one_for_each_token_before_the_next_is_drawn(writer_of):
    writer, forwards = writer_of(b"a<|b", "--stop=<|end|>")
    found = [(piece, len(forwards)) for piece in writer.pieces([0], key=(0, 0))]
    assert found == [("a", 1), ("", 2), ("", 3), ("<|b", 4), ("", 4)]  # the last: what was still held back


def test_the_best_beam_is_one_piece(writer_of):
    writer, _ = writer_of(b"abc", "--beams=2")
    assert list(writer.pieces([0], key=(0, 0))) == ["abc"]


def test_records_come_in_order_as_soon_as_those_before_are_there(writer_of):
    writer, forwards = writer_of(b"abcd", "--batch_size=1", "--max_new_tokens=1")
    records = [
        (number, copy, record["text"], len(forwards))
        for number, copy, record in writer.records([[0] * 2, [0], [0] * 4])
    ]
    # The order of writing is: the second, the first and the third. All but the second also take a prefill.
    assert records == [(0, 0, "b", 3), (1, 0, "a", 3), (2, 0, "d", 5)]


def test_a_record_says_how_a_text_ended(writer_of):
    writer, _ = writer_of([*b"abcd", 256, *b"ef"], "--stop=cd")
    records = [record for _, _, record in writer.records([[0], [0] * 4])]
    assert records == [
        {"text": "ab", "tokens": 4, "end": "stop"},
        {"text": "d", "tokens": 2, "end": "end_of_text"},
    ]
    writer, _ = writer_of(b"ef", "--stop=cd")
    assert list(writer.records([[0]])) == [(0, 0, {"text": "ef", "tokens": 2, "end": "length"})]


def test_a_search_has_no_more_texts_than_there_are(writer_of):
    writer, _ = writer_of(b"ab", "--beams=3", "--num_samples=2", "--max_new_tokens=0")
    (_, _, best), (_, _, second) = writer.records([[0]])
    assert best == {"text": "", "tokens": 0, "end": "length", "logprob": 0, "score": 0} and second is None
