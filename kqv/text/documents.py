"""
A row of a table -> a document: a text, or a conversation [(role, text), ...]. A row has a conversation as
messages, or as a question and its answer, by the names that sets of the field have.
"""

import json

from kqv.errors import UserError

ROLES = ("system", "user", "assistant")

TEXT = "text"  # the column of a text, where the user names none

MESSAGES = ("messages", "conversations", "conversation")  # columns; the second is ShareGPT's

PAIRS = (  # columns of a question and its answer
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),  # Alpaca's
    ("instruction", "response"),  # Dolly's
    ("question", "answer"),
    ("question", "response"),
    ("input", "output"),
)

WITH_INSTRUCTION = ("input", "context")  # columns of what an instruction is about

SYSTEM = ("system", "system_prompt")  # columns of what stands before a conversation

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def prompted(prompt, completion):
    """A prompt with its completion, as a conversation."""
    return [("user", prompt), ("assistant", completion)]


def document_of_json(value, text_column, where):
    """A value of JSON -> a document: an object is a row, a list are messages, a string is a text."""
    if isinstance(value, str):
        value = {text_column: value}
    elif isinstance(value, list):
        return conversation(value, where)
    return document_of(value, text_column, where)


def document_of(row, text_column, where):
    """
    A row {column: value} -> a text, a conversation, or None where the text is null. `where` is the row's
    place, for the message. Raises UserError.
    """
    columns = columns_of(row, text_column, where)
    if "messages" in columns:
        said = conversation(row[columns["messages"]], where)
    else:
        for column in columns.values():
            require_text(row[column], column, where)
        if "text" in columns:
            return row[columns["text"]]
        said = question_and_answer(row, columns, where)
    instructions = row[columns["system"]] if "system" in columns else None
    if instructions and said[0][0] != "system":
        require_text(instructions, columns["system"], where)
        said = [("system", instructions), *said]
    return said


def question_and_answer(row, columns, where):
    question, answer = row[columns["question"]], row[columns["answer"]]
    if not question or answer is None:
        empty = columns["question" if not question else "answer"]
        raise UserError(f"{where} has no {empty}: leave the row out, or fill it in")
    about = row[columns["about"]] if "about" in columns else None
    return prompted(f"{question}\n\n{about}" if about else question, answer)


def columns_of(columns, text_column, where):
    """
    Which of the columns hold the documents of a table: {"text": its name}; or {"messages": ...} or
    {"question": ..., "answer": ..., "about": ...}, both with or without "system". Raises UserError where none
    does.
    """
    if text_column in columns:
        return {"text": text_column}
    found = {}
    if text_column == TEXT:  # else the user has named the one that is to be read
        pair = next((pair for pair in PAIRS if all(column in columns for column in pair)), None)
        if messages := first_of(MESSAGES, columns):
            found = {"messages": messages}
        elif pair:
            found = {"question": pair[0], "answer": pair[1]}
            if pair[0] == "instruction" and (about := first_of(WITH_INSTRUCTION, columns)):
                found["about"] = about
    if not found:
        there = ", ".join(map(repr, columns))[:100] or "it has none"
        raise UserError(
            f"{where} has no column {text_column!r}, nor messages, nor a prompt and completion: say which "
            f"one has the text, --text_column=NAME ({there})"
        )
    if system := first_of(SYSTEM, columns):
        found["system"] = system
    return found


def first_of(names, columns):
    return next((name for name in names if name in columns), None)


def conversation(messages, where):
    """
    [{"role": ..., "content": ...}, ...], or ShareGPT's "from" and "value", -> [(role, text), ...]. Raises
    UserError for anything else.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where} has no list of messages: [{{"role": "user", "content": "..."}}, ...]')
    said = []
    for number, message in enumerate(messages, start=1):
        role = text = None
        if isinstance(message, dict):
            role, text = message.get("role"), message.get("content")
            if "from" in message:
                role, text = SHAREGPT_ROLES.get(str(message["from"]), message["from"]), message.get("value")
        if role not in ROLES or not isinstance(text, str) or (role == "system" and number > 1):
            shown = json.dumps(message, default=str)[:80]
            raise UserError(
                f'{where}, message {number} is {shown}: each is {{"role": "user" or '
                '"assistant", "content": text}, and the first may be by "system"'
            )
        require_text(text, "content", where)
        said.append((role, text))
    roles = [role for role, _ in said if role != "system"]
    if roles[-1:] != ["assistant"] or "user" not in roles:
        raise UserError(
            f"{where} does not end with what the assistant says to the user: there is nothing to learn"
        )
    return said


def require_text(value, column, where):
    """Raise UserError where a value is neither null nor a string that has UTF-8 bytes."""
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(
            f"{where} has a {type(value).__name__} in column {column!r}, not a string: say which one "
            "has the text, --text_column=NAME"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has \\u{ord(value[error.start]):04x} in column {column!r}, half of a surrogate "
            "pair, which is no character: remove it"
        ) from None
