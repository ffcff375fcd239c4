"""The texts to continue: read from the command line, a file or standard input, and turned into ids."""

import sys
from dataclasses import dataclass
from typing import Literal

from kqv import pipes
from kqv.errors import UserError, warn
from kqv.settings import setting
from kqv.values import expand_home


@dataclass(frozen=True)
class PromptSettings:
    """The text to continue"""

    start: str = setting(
        "", "the text to continue; FILE:path reads a file, - standard input; empty: ask, or begin anew"
    )
    prompts: str = setting("", "a file of texts to continue, one a line", path=True)
    chat: bool = setting(False, "talk, on a terminal or a line of standard input a message; it remembers")
    system: str = setting("", "the instructions that a conversation begins with")
    unknown: Literal["error", "skip"] = setting("error", "what becomes of characters the tokenizer lacks")


def read_prompts(config):
    """
    The texts to continue, a list: the lines of the file --prompts, or the one text of --start. Raises
    UserError for what can't be read, is not UTF-8, or has an empty line.
    """
    if not config.prompts:
        return [read_start(config.start)]
    content = read_file(config.prompts, f"--prompts={config.prompts}")
    lines = content.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if "" in lines:
        raise UserError(f"{config.prompts} has no text in line {lines.index('') + 1}: give one in each line")
    return lines


def read_start(start):
    """The text that --start names: FILE:path, - for standard input, or the text itself."""
    if start == "-":
        pipes.require_end(sys.stdin.buffer, "standard input")
        text = decode_utf8(sys.stdin.buffer.read(), "standard input")
    elif start.startswith("FILE:"):
        text = read_file(expand_home(start.removeprefix("FILE:")), f"--start={start}")
    else:
        return start
    if not text:
        raise UserError(f"--start={start} has no text: give one to continue, or leave --start out")
    return text


def read_file(path, setting):
    """The text of a file. `setting` is what the user gave, for the message of the UserError."""
    try:
        content = pipes.content_of(path)
    except OSError as error:
        raise UserError(f"{setting} can't be read: {error.strerror}") from None
    return decode_utf8(content, path)


def decode_utf8(content, name):
    """Bytes -> str. Raises UserError, which begins with `name`, where they are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start})"
        ) from None


def completed(text, tokenizer):
    """
    The text that the model continues where the user gave `text`. Where the tokenizer has no newline, one at
    the end of the text is removed. An empty text becomes a newline, or the tokenizer's first character where
    it has no newline. It stays empty if the tokenizer puts an id of its own before every text, and if it is a
    message to a model of conversations.
    """
    has_newline = tokenizer.encode("\n", "skip").size > 0
    if not has_newline:
        text = text.removesuffix("\n").removesuffix("\r")
    if text or tokenizer.begin or tokenizer.kind == "chat":
        return text
    return "\n" if has_newline else tokenizer.decode([0])


def encode_prompt(text, tokenizer, config, history=()):
    """
    The ids that the model continues: those of the text; for a model of conversations those of a conversation
    that begins with --system, goes on with `history`, [(role, text), ...], and ends with the user's `text`.
    """
    if tokenizer.kind != "chat":
        return [*tokenizer.begin, *tokenizer.encode(text, config.unknown).tolist()]
    instructions = [("system", config.system)] if config.system else []  # a template may have its own
    messages = [*instructions, *history, ("user", text)]
    return tokenizer.encode_chat(messages, config.unknown).tolist()


def fitted(texts, prompts, tokenizer, config, block_size):
    """
    The ids that the model reads of each prompt, a list of ids; `texts` are the prompts' texts. Of a prompt
    that is longer than block_size, it reads the end. Of such a conversation, it reads what comes before the
    last message, and the end of that message, with room for an answer. One warning tells of all of them.

    Raises UserError for a prompt without a token, or where --system leaves no room for a message.
    """
    long = [number for number, ids in enumerate(prompts) if len(ids) > block_size]
    found = [
        end_of(ids, tokenizer, config, block_size, excerpt(config.system + text))
        for text, ids in zip(texts, prompts, strict=True)
    ]
    if len(long) == 1:
        text, count = excerpt(texts[long[0]]), len(prompts[long[0]])
        warn(f"the prompt {text} has {count} tokens, more than block_size={block_size}: only its end is read")
    elif long:
        warn(
            f"{len(long)} prompts, the first of them {excerpt(texts[long[0]])}, have more tokens than "
            f"block_size={block_size}: only their ends are read"
        )
    return found


def end_of(ids, tokenizer, config, block_size, shown):
    """`fitted` for one prompt. `shown` is its name in errors."""
    if not ids:
        raise UserError(
            f"the prompt {shown} has 0 tokens, but the model continues at least 1: give a --start"
        )
    if len(ids) <= block_size:
        return ids
    if tokenizer.kind != "chat":
        begin = list(tokenizer.begin)[: block_size - 1]
        return begin + ids[len(ids) - block_size + len(begin) :]
    if tokenizer.user is None:
        raise UserError(
            f"the prompt {shown} has {len(ids)} tokens, more than block_size={block_size}, and where its "
            "message begins is not known in this model's chat template: shorten it"
        )
    begin = len(ids) - ids[::-1].index(tokenizer.user)  # of the last message, after its mark
    end = begin + len(ids) - (block_size - room_for_answer(config, block_size))
    if end >= len(ids) - 1:  # not even one token of the message would be left
        raise UserError(
            f"the prompt {shown} has {len(ids)} tokens, and those before the message leave no room for it in "
            f"block_size={block_size}: shorten --system"
        )
    return ids[:begin] + ids[end:]


def room_for_answer(config, block_size):
    """How many tokens stay free for the answer to a long conversation: at most a quarter of the context."""
    return min(config.max_new_tokens, block_size // 4)


def excerpt(text):
    """The beginning of a text, in quotes."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
