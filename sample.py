"""Text from a checkpoint."""

import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from kqv import checkpoint
from kqv.device import DeviceSettings, find_compile, find_device, find_dtype, is_out_of_memory
from kqv.errors import UserError, run
from kqv.settings import parse, setting
from model import GPT, GPTConfig


@dataclass(frozen=True)
class ModelSettings:
    """Which weights"""

    out_dir: str = setting("out", "the folder of a training run")
    checkpoint: str = setting("best", "best (lowest validation loss), newest, or the path of a file")
    init_from: str = setting(
        "resume", "resume: from out_dir; or gpt2, gpt2-medium|large|xl, a Hugging Face folder"
    )


@dataclass(frozen=True)
class TextSettings:
    """What to write"""

    start: str = setting("\n", "the text to continue; FILE:path reads a file, - reads standard input")
    num_samples: int = setting(1, "how many continuations", at_least=1, below=2**31)
    max_new_tokens: int = setting(500, "tokens in each", at_least=0)
    temperature: float = setting(
        0.8, "below 1: likelier tokens more often; 0: always the likeliest", at_least=0.0
    )
    top_k: int = setting(200, "draw among the k likeliest tokens; 0: among all", at_least=0)
    seed: int = setting(1337, "the same seed draws the same text", at_least=0, below=2**63)


@dataclass(frozen=True)
class SampleSettings(DeviceSettings, TextSettings, ModelSettings):
    """
    usage: python sample.py [config.py ...] [--name=value ...]

    Print text from a trained model. A checkpoint is all it needs.
    """


def main(argv):
    config = parse(SampleSettings, argv)
    try:
        write(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with num_samples={config.num_samples}: try fewer") from None


def write(config):
    """Print what the settings ask for."""
    text = read_prompt(config.start)
    device = find_device(config.device)
    compiled = find_compile(False if config.compile == "auto" else config.compile, device)
    gpt, tokenizer = load(config)
    ids = tokenizer.encode(text)
    if not 1 <= len(ids) <= gpt.config.block_size:
        raise UserError(
            f"the prompt has {len(ids)} tokens, but the model takes 1 to {gpt.config.block_size}: "
            + ("shorten --start" if len(ids) else "give a --start")
        )
    gpt.to(device=device, dtype=find_dtype(config.dtype, device))
    if compiled:
        gpt.compile()
    prompt = torch.tensor(ids.astype("int64"), device=device)  # (T,)
    prompt = prompt.expand(config.num_samples, -1)  # (T,) -> (num_samples, T)
    tokens = gpt.stream(
        prompt,
        config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        vocab_size=tokenizer.vocab_size,
        generator=torch.Generator(device).manual_seed(config.seed),
    )
    if config.num_samples == 1:
        print_stream(text, (token.item() for token in tokens), tokenizer)
        return
    samples = torch.cat([prompt[:, :0], *tokens], dim=1).tolist()  # (num_samples, max_new_tokens)
    for sample in samples:
        print(text + tokenizer.decode(sample))
        print("---------------")


def read_prompt(start):
    """The prompt that --start names: the text itself, FILE:path, or - for standard input."""
    if start == "-":
        content, name = sys.stdin.buffer.read(), "standard input"
    elif start.startswith("FILE:"):
        name = start.removeprefix("FILE:")
        try:
            content = Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"--start=FILE:{name} can't be read: {error.strerror}") from None
    else:
        return start
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (byte {content[error.start]:#04x} at offset {error.start})"
        ) from None


def load(config):
    """(model ready to write, tokenizer) that the settings ask for."""
    if config.init_from == "resume":
        path = checkpoint.find(config.out_dir, config.checkpoint)
        contents = checkpoint.load(path)
    else:
        path, contents = config.init_from, checkpoint.load_start(config.init_from)
    try:
        gpt = GPT.from_weights(GPTConfig.from_args(contents["model_args"]), contents["model"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no weights of a GPT: {error}") from None
    return gpt.eval(), checkpoint.tokenizer_of(contents)


def print_stream(text, ids, tokenizer):
    """Print each token as it is made; a character that spans several tokens appears when it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(text, end="", flush=True)
    for token in ids:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    run(main)
