"""The order of data: a random permutation in no memory."""

import collections

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kqv.text.order import shuffled

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines may be busy


KEYS = st.lists(st.integers(0, 2**64 - 1), min_size=6, max_size=6).map(lambda keys: np.array(keys, np.uint64))


@UNHURRIED
@given(count=st.integers(1, 3000), keys=KEYS, data=st.data())
def test_shuffled_numbers_are_a_permutation(count, keys, data):
    order = shuffled(np.arange(count), count, keys)
    assert sorted(order.tolist()) == list(range(count)) and order.dtype == np.int64
    some = data.draw(st.lists(st.integers(0, count - 1), max_size=9))
    assert shuffled(some, count, keys).tolist() == order[some].tolist()


@UNHURRIED
@given(count=st.integers(2**31, 2**62), keys=KEYS)
def test_numbers_of_any_size_are_shuffled_without_the_others(count, keys):
    numbers = np.concatenate([np.arange(500), np.arange(count - 500, count)])
    found = shuffled(numbers, count, keys)
    assert len(set(found.tolist())) == 1000 and 0 <= found.min() and found.max() < count


@pytest.mark.parametrize("count", [2, 3, 4, 10, 17])
def test_every_place_is_as_likely_for_every_number(count):
    random, places = np.random.default_rng(0), np.zeros((count, count))
    pairs = collections.Counter()
    rounds = 1500
    for _ in range(rounds):
        order = shuffled(np.arange(count), count, random.integers(2**63, size=6, dtype=np.uint64))
        places[np.arange(count), order] += 1
        pairs[order[0], order[1]] += 1
    expected = rounds / count
    assert np.abs(places - expected).max() < 5 * expected**0.5
    expected = rounds / (count * (count - 1))
    assert max(abs(pairs[a, b] - expected) for a in range(count) for b in range(count) if a != b) < (
        5.5 * expected**0.5
    )


def test_a_shuffled_order_has_nothing_left_of_the_old_one():
    random = np.random.default_rng(0)
    for count in (1000, 1024, 1025, 65536):
        order = shuffled(np.arange(count), count, random.integers(2**63, size=6, dtype=np.uint64))
        places = np.arange(count)
        limit = 5 / count**0.5
        assert abs(np.corrcoef(places, order)[0, 1]) < limit
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < limit
        assert abs(np.corrcoef(places % 2, order % 2)[0, 1]) < limit
        assert (np.diff(order) == 1).sum() < 10
