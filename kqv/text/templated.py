"""Conversations <-> ids, in the chat template that a model brings."""

import re
import secrets
from functools import cached_property
from typing import NamedTuple

import numpy as np

from kqv.errors import UserError
from kqv.text.chat import BEGINS, LEARNT, ChatTokenizer
from kqv.text.huggingface import encodings
from kqv.text.template import Template
from kqv.text.tokenizer import Tokenizer, utf8

WAY_OUT = "train in kqv's own template, with a model of kqv's, or give this one another chat_template"


def over(base):
    """The tokenizer of conversations over one of texts: in the template that it brings, or in kqv's own."""
    return TemplatedTokenizer(base) if getattr(base, "chat_template", None) else ChatTokenizer(base)


class Turn(NamedTuple):
    """How an assistant's turn looks in a template."""

    opening: str  # what stands before it
    closing: str  # what stands behind it, up to and with the name of the special id that ends it
    end: int  # that id
    gap: str  # what the template puts between the opening and the answer, which a model writes as well


class TemplatedTokenizer(Tokenizer):
    """
    Encodes conversations as the chat template of another tokenizer, `base`, writes them: the ids are those of
    transformers' `apply_chat_template`. `base` is a HuggingFaceTokenizer with a `chat_template`.

    No word of a message becomes a special id. Where one has the name of such an id in it, the text is encoded
    in pieces that are cut inside of that name.
    """

    kind = "chat"
    stores_marks = True
    is_ours = False
    user = None  # there is no id that shows where a message of the user begins

    def __init__(self, base):
        self.base, self.vocab_size, self.separator = base, base.vocab_size, base.separator
        self.filling = base.separator or 0
        self.template = Template(base.chat_template, base.roles)
        self.names = base.specials()
        self.border = secrets.token_hex(16)  # stands where a text is cut; no text can have it by intent
        self.inside = re.compile("|".join(f"(?={re.escape(name)})" for name in self.names) or "(?!)")
        self.begun = {name[:end] for name in self.names for end in range(1, len(name))}
        self.longest = max(map(len, self.begun), default=0)

    def to_json(self):
        return {"kind": self.kind, "base": self.base.to_json()}

    def specials(self):
        return self.names

    def encode(self, text, unknown="error"):
        return self.base.encode(text, unknown)

    def decode_bytes(self, ids):
        special = {*self.names.values()}
        return self.base.decode_bytes([number for number in map(int, ids) if number not in special])

    @cached_property
    def ends(self):
        """The ids that end an answer: what the template ends a turn in, and what the model ends a text in."""
        return tuple(dict.fromkeys(([self.turn.end] if self.turn else []) + [*self.base.ends]))

    def message_of(self, answer):
        """The text of the message that the template makes an answer of: without what it adds itself."""
        return answer.removeprefix(self.turn.gap) if self.turn else answer

    # What the template does

    @cached_property
    def turn(self):
        """
        The Turn: what stands around an answer, found with texts that can't be in the template. None where
        there is none that can be found.
        """
        ask, answer, again, last = (secrets.token_hex(16) for _ in range(4))
        asked = self.template.render([("user", ask)], add_generation_prompt=True)
        not_yet = self.template.render([("user", ask)])
        messages = [("user", ask), ("assistant", answer), ("user", again), ("assistant", last)]
        whole = self.template.render(messages)
        parts = re.split("|".join(text for _, text in messages), whole)
        if len(parts) != 5 or ask not in asked or not whole.startswith(asked):
            return None
        opening = asked.removeprefix(not_yet) if asked.startswith(not_yet) else ""
        opening = opening if opening.strip() else asked.partition(ask)[2]
        found = self.inside.search(parts[2])
        if not opening.strip() or not found:
            return None
        name = max((name for name in self.names if parts[2].startswith(name, found.start())), key=len)
        closing = parts[2][: found.start() + len(name)]
        gap = parts[1].removeprefix(asked.partition(ask)[2])
        return Turn(opening, closing, self.names[name], gap) if parts[4].startswith(closing) else None

    def with_names_cut(self, text):
        """
        The text with `border` inside of each name of a special id, so that none is whole, and behind what may
        be the beginning of one at the end of the text.
        """
        utf8(text)
        cuts = {found.start() + 1 for found in self.inside.finditer(text)}
        for start in cuts:
            if (letter := text[start - 1]) in self.names:  # which has no inside
                raise UserError(f"{letter!r} is a special token of this model: no message can have it")
        end = len(text.rstrip())
        if any(text[max(0, end - size) : end] in self.begun for size in range(1, self.longest + 1)):
            cuts.add(end)
        places = [0, *sorted(cuts), len(text)]
        return self.border.join(text[a:b] for a, b in zip(places, places[1:], strict=False)) if cuts else text

    # Conversations

    def encode_chat(self, messages, unknown="error"):
        """
        [(role, text), ...] -> (T,) ids. Where the last message is the user's, they end in what opens the
        assistant's turn. Raises UserError where the template refuses the conversation.
        """
        return self.written(messages)[0]

    def encode_marked_chat(self, messages, unknown="error"):
        """As `encode_chat`, and the marks of the ids, (T,) uint8: LEARNT and BEGINS."""
        ids, starts, spans = self.written(messages, learn=True)
        marks = np.zeros(len(ids), np.uint8)
        for start, end in spans:
            marks[(starts >= start) & (starts < end)] |= LEARNT
        marks[0] |= BEGINS
        return ids, marks

    def written(self, messages, learn=False):
        """((T,) ids, where each begins in the text that the template writes, where what is learnt stands)."""
        messages = [(role, self.with_names_cut(text)) for role, text in messages]
        asks = messages[-1][0] == "user"
        text = self.template.render(messages, asks)
        spans = self.spans(text, messages, asks) if learn else []
        ids, starts, place = [], [], 0
        pieces = text.split(self.border)
        for piece, found in zip(pieces, encodings(self.base.marked.encode_batch, pieces), strict=True):
            ids += found.ids
            before = 0
            for start, end in found.offsets:  # some tokenizers leave blanks out of them
                starts.append(place + min(start, before))
                before = end
            place += len(piece) + len(self.border)
        if not ids:
            raise UserError(f"the chat template makes nothing of {str(messages)[:80]}: {WAY_OUT}")
        return np.array(ids, np.uint32), np.array(starts), spans

    def spans(self, text, messages, asks):
        """
        [(start, end), ...] of the assistant's turns in the `text` that the template makes of messages: behind
        what opens a turn, up to and with the special id that ends it.
        """
        said = [words for role, words in messages if role == "assistant"]
        turn = self.turn
        if not turn:
            raise self.not_found("an assistant's turn")
        if not said:
            return []
        names = [secrets.token_hex(16) for _ in said]
        each = iter(names)
        framed = [(role, next(each) if role == "assistant" else words) for role, words in messages]
        parts = re.split("|".join(names), self.template.render(framed, asks))
        leads = [lead.rpartition(turn.opening) for lead in parts[:-1]]
        if len(parts) != len(names) + 1 or not all(opening for _, opening, _ in leads):
            raise self.not_found(f"{len(said)} turns of the assistant")
        heads = [before + opening for before, opening, _ in leads]
        spans, start = [], len(heads[0]) if text.startswith(heads[0]) else -1
        for number, words in enumerate(said):
            if number + 1 < len(said):
                behind = heads[number + 1]
                likely = (start + len(leads[number][2]) + len(some) for some in (words, words.strip()))
                end = next((place for place in likely if text.startswith(behind, place)), None)
                end = text.find(behind, start) if end is None else end
            else:
                behind = parts[-1]
                end = len(text) - len(behind) if text.endswith(behind) else -1
            if not 0 <= start <= end or not behind.startswith(turn.closing):
                raise self.not_found(f"the assistant's {words[:40]!r}")
            spans.append((start, end + len(turn.closing)))
            start = end + len(behind)
        return spans

    def not_found(self, what):
        return UserError(
            f"{what} can't be found in what the chat template writes, so what is to be learnt is not known: "
            f"{WAY_OUT}"
        )

    def example_of(self, ids, learnt):
        """(the messages before the last answer, the ids that ask for it, the answer) of a conversation."""
        ends = np.flatnonzero(np.diff(learnt.astype(np.int8), prepend=0) == 1)
        begin = int(ends[-1]) if len(ends) else len(ids)
        return self.decode(ids[:begin]), ids[:begin].tolist(), self.decode(ids[begin:][learnt[begin:]])
