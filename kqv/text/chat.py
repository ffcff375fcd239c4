"""Conversations <-> ids."""

import numpy as np

from kqv.text.documents import ROLES
from kqv.text.tokenizer import END, Tokenizer

LEARNT, BEGINS = 1, 2  # marks of an id in a conversation: it is learnt; a conversation begins with it


class ChatTokenizer(Tokenizer):
    """
    Encodes conversations: the ids of another tokenizer, `base`, and a mark before what each role says.

        <|system|>Be brief.<|user|>What is a query?<|assistant|>A question.<|endoftext|><|user|>...

    Every conversation begins with <|system|>, even without instructions, so that mark shows where one begins.
    What the assistant says ends in the separator. A prompt with its completion is the shortest conversation.
    The marks have ids after those of the base, so no text can contain one.
    """

    kind = "chat"
    roles = ROLES
    ends = ()

    def __init__(self, base):
        self.base, self.is_ours = base, base.is_ours
        self.system, self.user, self.assistant = self.marks = range(base.vocab_size, base.vocab_size + 3)
        self.separator = base.vocab_size + 3 if base.separator is None else base.separator
        self.ends = (self.separator, *(end for end in base.ends if end != self.separator))
        self.vocab_size = base.vocab_size + (4 if base.separator is None else 3)
        self.filling = self.system  # a conversation of this mark alone fills up a row

    def encode(self, text, unknown="error"):
        return self.base.encode(text, unknown)

    def encode_chat(self, messages, unknown="error"):
        """
        [(role, text), ...] -> (T,) ids. Where the last message is the user's, they end in the assistant's
        mark, and a model continues with the answer.
        """
        if messages[0][0] != "system":
            messages = [("system", ""), *messages]
        ids = []
        for role, text in messages:
            ids += [[self.marks[self.roles.index(role)]], self.encode(text, unknown)]
            if role == "assistant":
                ids.append([self.separator])
        if role == "user":
            ids.append([self.assistant])
        return np.concatenate(ids).astype(np.uint32)

    def encode_marked_chat(self, messages, unknown="error"):
        """As `encode_chat`, and the marks of the ids, (T,) uint8: LEARNT and BEGINS."""
        ids = self.encode_chat(messages, unknown)
        return ids, self.marks_of(ids)

    def is_learnt(self, ids):
        """
        (..., T) ids that begin with a conversation -> (..., T) bool: which ones the assistant says, with the
        separator at the end.
        """
        is_mark = (ids >= self.system) & (ids <= self.assistant)
        latest = np.maximum.accumulate(np.where(is_mark, np.arange(ids.shape[-1]), 0), axis=-1)
        return (np.take_along_axis(ids, latest, axis=-1) == self.assistant) & ~is_mark

    def marks_of(self, ids):
        """The marks of (T,) ids that begin with a conversation, (T,) uint8: LEARNT and BEGINS."""
        return np.uint8(LEARNT) * self.is_learnt(ids) | np.uint8(BEGINS) * (ids == self.system)

    def example_of(self, ids, learnt):
        """(the messages before the last answer, the ids that ask for it, the answer) of a conversation."""
        marks = np.flatnonzero((ids >= self.system) & (ids <= self.assistant))
        texts = [self.decode(part.tolist()) for part in np.split(ids, marks)[1:]]
        return "\n".join(filter(None, texts[:-1])), ids[: marks[-1] + 1].tolist(), texts[-1]

    def message_of(self, answer):
        """The text of the message that the model's answer is."""
        return answer

    def decode_bytes(self, ids):
        return self.base.decode_bytes([i for i in ids if i < self.system and i != self.separator])

    def specials(self):
        marks = {f"<|{role}|>": mark for role, mark in zip(self.roles, self.marks, strict=True)}
        end = {END: self.separator} if self.base.separator is None else self.base.specials()
        return dict(sorted({**end, **marks}.items(), key=lambda special: special[1]))

    def to_json(self):
        return {"kind": self.kind, "base": self.base.to_json()}
