"""Checkpoints of models whose weights are constructed so that what they write is known."""

import json
from contextlib import contextmanager

import torch

from kqv.formats import checkpoint
from model import GPT, GPTConfig

SMALL = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}  # a GPTConfig


def save(gpt, tokenizer, folder, name="ckpt.pt"):
    """A checkpoint in `folder`, which is returned."""
    folder.mkdir(exist_ok=True)
    contents = {
        "model": gpt.state_dict(),
        "model_args": vars(gpt.config),
        "config": {},
        "tokenizer": tokenizer.to_json(),
    }
    checkpoint.save(folder / name, contents)
    return folder


@torch.no_grad()
def gpt_of(logits):
    """A GPT that gives the same logits whatever it reads."""
    gpt = GPT(GPTConfig(vocab_size=len(logits), **SMALL))
    gpt.transformer.ln_f.weight.zero_()
    gpt.transformer.ln_f.bias.zero_()[0] = 1
    gpt.lm_head.weight[:, 0] = torch.as_tensor(logits)
    return gpt


def gpt_that_likes(favourites, vocab_size):
    """A GPT that finds some ids likeliest, whatever it reads."""
    logits = torch.zeros(vocab_size)
    logits[list(favourites)] = 30
    return gpt_of(logits)


@torch.no_grad()
def gpt_that_writes(ids, vocab_size):
    """A GPT that is sure of `ids` after a prompt of one token, and of ids[n:] after one of n more."""
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(vocab_size=vocab_size, block_size=64, n_layer=1, n_head=1, n_embd=64))
    gpt.lm_head.weight.copy_(torch.nn.functional.normalize(torch.randn(vocab_size, 64)))
    gpt.transformer.wpe.weight.zero_()
    gpt.transformer.wpe.weight[: len(ids)] = 100 * gpt.lm_head.weight[list(ids)]  # a position's next id
    gpt.transformer.h[0].attn.c_proj.weight.zero_()
    gpt.transformer.h[0].mlp.c_proj.weight.zero_()
    gpt.transformer.ln_f.weight.fill_(10)  # so that nothing else is ever drawn
    return gpt


def parsed(out):
    """The JSON objects of a command's output, one a line."""
    return [json.loads(line) for line in out.splitlines()]


@contextmanager
def forward_hook(vocab_size, observe):
    """Call observe(embedding, ids (B, T)) before each forward of any model of that vocabulary."""

    def hook(module, inputs):
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == vocab_size:
            observe(module, inputs[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
