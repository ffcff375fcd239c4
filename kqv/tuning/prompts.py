"""The prompts that a prepared set gives, with what is known as the answer to each."""

from typing import NamedTuple

import numpy as np

from kqv.errors import UserError
from kqv.text.order import shuffled


class Prompt(NamedTuple):
    """What a model is to complete."""

    text: str
    ids: list
    answer: str  # what the set has there: the last answer of the conversation, or how the text goes on


class Prompts:
    """
    The prompts of a split of a Dataset. Of a set of conversations each is a conversation without its last
    answer. Of a set of texts each is `prompt_tokens` tokens from anywhere. Raises UserError where the split
    has none that fits into block_size with a completion.
    """

    def __init__(self, data, split, block_size, prompt_tokens, answer_tokens):
        self.data, self.split = data, split
        self.prompt_tokens, self.answer_tokens = prompt_tokens, answer_tokens
        if data.is_chat:
            learnt = np.diff(data.learnt_before[split])  # (N,) ids of each conversation
            self.numbers = np.flatnonzero((data.lengths(split) <= block_size) & (learnt > 0))
            self.count = len(self.numbers)
            found = f"has no conversation with an answer that fits into block_size={block_size}"
        else:
            room = prompt_tokens < block_size
            self.count = max(0, len(data.splits[split]) - prompt_tokens) if room else 0
            found = f"has no text of prompt_tokens={prompt_tokens} that fits into block_size={block_size}"
        if not self.count:
            raise UserError(f"the {split} split of {data.folder} {found} with one token more: change one")

    def __len__(self):
        return self.count

    def __getitem__(self, place):
        data = self.data
        if data.is_chat:
            ids, learnt = data.conversation(self.split, int(self.numbers[place]))
            text, ids, answer = data.tokenizer.example_of(ids, learnt)
            return Prompt(text, list(map(int, ids)), answer)
        end = place + self.prompt_tokens
        ids = data.splits[self.split][place:end].tolist()
        answer = data.splits[self.split][end : end + self.answer_tokens].tolist()
        return Prompt(data.tokenizer.decode(ids), ids, data.tokenizer.decode(answer))

    def of_step(self, count, seed, step):
        """The `count` prompts of a step: each prompt comes once before any comes again."""
        found = []
        for number in range(step * count, (step + 1) * count):
            epoch, place = divmod(number, len(self))
            keys = np.random.default_rng((seed, epoch)).integers(2**63, size=6, dtype=np.uint64)
            found.append(self[int(shuffled([place], len(self), keys)[0])])
        return found

    def spread(self, count):
        """At most `count` prompts, evenly spread over the split: the same ones each time."""
        places = np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)
        return [self[place] for place in places.tolist()]


def prompts_of(config, data, block_size):
    """(the Prompts to learn from, a list of held-out ones to evaluate on). Raises UserError."""
    wanted = block_size, config.prompt_tokens, config.max_new_tokens
    return Prompts(data, "train", *wanted), Prompts(data, "val", *wanted).spread(config.eval_prompts)
