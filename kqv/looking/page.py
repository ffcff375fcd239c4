"""The page: its data, words, style and script in one file of HTML that needs no network."""

import base64
import hashlib
import inspect
import json
from pathlib import Path

from kqv.generation.sampling import Sampler
from kqv.looking.attention import attention, may_look
from kqv.looking.runs import curves
from kqv.looking.trace import Looker
from kqv.looking.what_if import cut_edges, loss_without_heads
from kqv.text.built_in import digits
from model import GPT, CausalSelfAttention, next_token_loss

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("core.js", "sections.js", "digits.js", "runs.js")
TRAINED = FOLDER.parent / "trained.json"

CODE = {  # of each section, the code that it is about
    "tokens": next_token_loss,
    "places": GPT.embed,
    "vectors": CausalSelfAttention.forward,
    "scores": attention,
    "what_if": may_look,
    "it": cut_edges,
    "guess": Looker.lens,
    "heads": loss_without_heads,
    "next": Sampler.draw,
    "digits": digits,
    "runs": curves,
}


def languages():
    """{language: {key: text}}: a file of words for each."""
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def as_json(value):
    """JSON that can stand in HTML: no `<`, `>` or `&` in it, so nothing there is taken for a tag."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def hash_of(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def html(figures=None, runs=(), text=None):
    """
    The page of `figures`, what kqv.looking.figures makes of a text, and of `runs`, what kqv.looking.runs
    makes of folders. With the `text` that it shows, a page is live: it asks its server for others.
    """
    data = {
        "figures": figures,
        "trained": json.loads(TRAINED.read_text("utf-8")),
        "runs": list(runs),
        "live": text is not None,
        "text": text,
        "strings": languages(),
        "code": {name: inspect.cleandoc(inspect.getsource(part)) for name, part in CODE.items()},
    }
    script = "\n".join((FOLDER / name).read_text("utf-8") for name in SCRIPTS)
    style = (FOLDER / "style.css").read_text("utf-8")
    policy = f"default-src 'none'; script-src 'sha256-{hash_of(script)}'; style-src 'sha256-{hash_of(style)}'"
    if text is not None:
        policy += "; connect-src 'self'"
    parts = {"POLICY": policy, "STYLE": style, "DATA": as_json(data), "SCRIPT": script}
    text = (FOLDER / "page.html").read_text("utf-8")
    before = []
    for name in ("POLICY", "STYLE", "DATA", "SCRIPT"):  # in the order of the file: nothing is replaced twice
        start, _, text = text.partition(f"@{name}@")
        before += [start, parts[name]]
    return "".join([*before, text])
