"""Continuations on standard output: as plain text, as a JSON object for each, or for each token."""

import json
import math

from kqv.errors import print_text
from kqv.generation.writer import batched

SEPARATOR = "---------------"  # nanoGPT's, between samples


def is_plain(config):
    """Whether the settings ask for plain text, not JSON."""
    return config.format == "text" and not config.logprobs


def print_continuations(writer, texts, prompts):
    """Print the continuations of all texts, whose ids are the prompts, in the form that the settings name."""
    config = writer.config
    if config.logprobs:
        print_logprobs(writer, prompts)
    elif config.format == "jsonl":
        print_json(texts, writer.records(prompts))
    else:
        openings = [opening(text, writer.tokenizer) for text in texts]
        if len(texts) == config.num_samples == 1:
            print_pieces(openings[0], writer.pieces(prompts[0], key=(0, 0)), config.raw)
        else:
            print_samples(openings, writer.records(prompts), config.raw)


def opening(text, tokenizer):
    """What is printed before the continuation of a text: the text, but not what the user said in a chat."""
    return "" if tokenizer.kind == "chat" else text


def print_pieces(opening, pieces, raw):
    """Print a text piece by piece, each as soon as the iterator `pieces` gives it; `raw` as in print_text."""
    print_text(opening, raw, end="")
    for piece in pieces:
        print_text(piece, raw, end="")
    print(flush=True)


def print_samples(openings, records, raw):
    """Print plain texts, a separator after each; records as of Writer.records, `raw` as in print_text."""
    for number, _, record in records:
        if record:
            print_text(f"{openings[number]}{record['text']}\n{SEPARATOR}", raw)


def print_object(found):
    """Print a JSON object in a line, all of it printable ASCII."""
    print(json.dumps(found, allow_nan=False).replace("\x7f", "\\u007f"), flush=True)


def print_json(texts, records):
    """Print a JSON object for each continuation; records are those of Writer.records."""
    for number, copy, record in records:
        if record:
            print_object({"prompt": texts[number], "sample": copy, **record})


def print_logprobs(writer, prompts):
    """Print a JSON object for each token drawn: the model's log-probability of it and of the likeliest."""

    def token(id, logprob):
        # A logarithm of 0 is -inf, which JSON can't say.
        logprob = logprob if math.isfinite(logprob) else None
        return {"token": writer.tokenizer.decode([id]), "id": id, "logprob": logprob}

    for batch in batched(prompts, writer.config):
        for row, _, _, drawn in writer.steps(batch, prompts):
            if drawn is None:
                continue
            number, copy = batch[row]
            top = list(map(token, drawn.top_ids[row], drawn.top_logprobs[row]))
            said = token(drawn.ids[row], drawn.logprobs[row])
            print_object({"prompt": number, "sample": copy, **said, "top": top})
