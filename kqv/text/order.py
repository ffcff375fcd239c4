"""The order of data: a permutation that takes no memory, and conversations packed into rows."""

import numpy as np


def packed(starts, longest):
    """
    Conversations packed into rows: (N + 1,) where each of N begins, and the last one ends -> (rows, 2) where
    each row begins and ends. A row has as many conversations, in order, as fit into `longest` ids. Those that
    are longer are in no row.
    """
    rows, first = [], 0
    while first < len(starts) - 1:
        after = int(np.searchsorted(starts, starts[first] + longest, "right")) - 1
        if after > first:
            rows.append((starts[first], starts[after]))
        first = max(after, first + 1)
    return np.array(rows, np.int64).reshape(-1, 2)


def shuffled(numbers, count, keys):
    """
    The places of `numbers` in a random order of range(count): (n,) -> (n,). The order is decided by `keys`
    (k,) of uint64 and never in memory as a whole, whatever the count.

    A Feistel network permutes the numbers that have as many bits as the count, a round for each key. A number
    that lands outside the range is permuted again until it is inside (cycle walking, Black & Rogaway 2002).
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    numbers = np.array(numbers, np.uint64)
    outside = np.ones(len(numbers), bool)
    while outside.any():
        left, right = numbers[outside] >> half, numbers[outside] & mask
        for key in keys:
            mixed = (right + key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(29)) & mask)
        numbers[outside] = left << half | right
        outside = numbers >= count
    return numbers.astype(np.int64)
