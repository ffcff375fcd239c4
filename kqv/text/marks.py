"""
The marks of a split of conversations: which ids are learnt, and where each conversation begins.

kqv's own template has an id for each role, which says both. Of another model's template the ids do not: there
the set has a file of marks, a byte for each id.
"""

import numpy as np

from kqv.errors import UserError
from kqv.text.chat import BEGINS, LEARNT


class StoredMarks:
    """Marks in files, as Tokens."""

    def __init__(self, tokens):
        self.tokens = tokens

    def of(self, ids, start):
        """The marks of (T,) ids that stand from `start` on: (T,)."""
        return self.tokens[start : start + len(ids)]

    def conversations(self, name):
        """
        Where each of the N conversations begins, and where the last one ends: (N + 1,); and how many ids are
        learnt before each of these places: (N + 1,). Raises UserError, which begins with `name`.
        """
        starts, before, done, learnt = [], [], 0, 0
        for block in self.tokens.blocks():
            begins = np.flatnonzero(block & BEGINS)
            so_far = np.concatenate([[0], np.cumsum(block & LEARNT, dtype=np.int64)])
            starts.append(begins + done)
            before.append(so_far[begins] + learnt)
            done, learnt = done + len(block), learnt + int(so_far[-1])
        starts, before = np.concatenate([*starts, [done]]), np.concatenate([*before, [learnt]])
        require_beginning(starts[0], name)
        return starts, before


class MarksOfIds:
    """The marks that the ids of a ChatTokenizer have by themselves."""

    def __init__(self, tokens, tokenizer):
        self.tokens, self.tokenizer = tokens, tokenizer

    def of(self, ids, start):
        """The marks of (T,) ids that stand from `start` on, where a conversation begins: (T,)."""
        return self.tokenizer.marks_of(ids)

    def conversations(self, name):
        """As that of StoredMarks."""
        tok, places, roles, done = self.tokenizer, [], [], 0
        for block in self.tokens.blocks():
            found = np.flatnonzero((block >= tok.system) & (block <= tok.assistant))
            places.append(found + done)
            roles.append(block[found])
            done += len(block)
        places = np.concatenate([*places, [done]])
        roles = np.concatenate([*roles, [tok.system]])  # the end is where the next one would begin
        learnt = np.where(roles[:-1] == tok.assistant, np.diff(places) - 1, 0)  # behind each role
        learnt_before, begins = np.concatenate([[0], np.cumsum(learnt)]), roles == tok.system
        require_beginning(places[0] if begins[0] else -1, name)
        return places[begins], learnt_before[begins]


def require_beginning(place, name):
    if place != 0:
        raise UserError(f"{name} begins with no conversation: run prepare.py again")
