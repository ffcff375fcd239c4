"""
A row of a table -> a document: a text, or a conversation [(role, text), ...]. A row has a conversation as
`messages`, or as a `prompt` and its `completion`.
"""

import json

from kqv.errors import UserError

ROLES = ("system", "user", "assistant")


def prompted(prompt, completion):
    """A prompt with its completion, as a conversation."""
    return [("user", prompt), ("assistant", completion)]


def document_of(row, text_column, where):
    """
    A row {column: value} -> a text, a conversation, or None where the text is null. `where` is the row's
    place, for the message. Raises UserError.
    """
    columns = columns_of(row, text_column, where)
    if columns == ("messages",):
        return conversation(row["messages"], where)
    values = [row[column] for column in columns]
    for column, value in zip(columns, values, strict=True):
        require_text(value, column, where)
    if len(values) == 1:
        return values[0]
    if not values[0] or values[1] is None:
        raise UserError(
            f"{where} has no {columns[0 if not values[0] else 1]}: leave the row out, or fill it in"
        )
    return prompted(*values)


def columns_of(columns, text_column, where):
    """Which of the columns hold the documents of a table. Raises UserError where none does."""
    for wanted in ((text_column,), ("messages",), ("prompt", "completion")):
        if all(column in columns for column in wanted):
            return wanted
    there = ", ".join(map(repr, columns))[:100] or "it has none"
    raise UserError(
        f"{where} has no column {text_column!r}, nor messages, nor a prompt and completion: say which one "
        f"has the text, --text_column=NAME ({there})"
    )


def conversation(messages, where):
    """[{"role": ..., "content": ...}, ...] -> [(role, text), ...]. Raises UserError for anything else."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where} has no list of messages: [{{"role": "user", "content": "..."}}, ...]')
    said = []
    for number, message in enumerate(messages, start=1):
        role, text = (
            (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        )
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
