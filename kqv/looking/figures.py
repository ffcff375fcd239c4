"""
All that the page shows of one text: numbers of a trace, and of experiments, in a form that JSON can hold.

Shapes: T tokens, L layers, nh and nkv heads, hs head size, C channels, V vocabulary.
"""

import base64
import gzip

import numpy as np
import torch

from kqv.looking.parts import parts_of_first_layer
from kqv.looking.what_if import (
    WHAT_IFS,
    cut_edges,
    loss_without_heads,
    measured,
    other_endings,
    rows_to_cut,
)
from kqv.text.showing import token_text

LENS_TOP = 5  # tokens that the lens shows of each place
MOST_BYTES = 5_000_000  # of queries, keys and values in a page: packed they take about as many

NEXT_TOP = 64  # tokens that can be drawn from


def packed(array):
    """
    An array of numbers -> {"shape", "data"}: float32 as base64 of gzip. The first bytes of all numbers come
    first, then the second ones, ...: bytes that are alike, which gzip makes shorter.
    """
    array = np.ascontiguousarray(array, dtype="<f4")
    planes = array.reshape(-1).view(np.uint8).reshape(-1, 4).T
    data = gzip.compress(planes.tobytes(), compresslevel=9, mtime=0)
    return {"shape": list(array.shape), "data": base64.b64encode(data).decode("ascii")}


def packed_bytes(weights):
    """Weights of attention, each from 0 to 1 -> {"shape", "bytes"}: rounded to 1/255, as base64 of gzip."""
    rounded = np.rint(weights * 255).astype(np.uint8)
    data = gzip.compress(rounded.tobytes(), compresslevel=9, mtime=0)
    return {"shape": list(rounded.shape), "bytes": base64.b64encode(data).decode("ascii")}


def of_layer(trace, layer):
    """The queries, keys and values of a layer: packed (nh or nkv, T, hs)."""
    return {name: packed(getattr(trace, name)[layer][0].float().cpu().numpy()) for name in ("q", "k", "v")}


def of_layers(trace, exact):
    """
    Queries, keys and values of all layers where they fit into a page; else the weights of all heads, rounded,
    and of the layers None. `exact`: whether they fit, None: find out.
    """
    L = len(trace.q)
    size = sum(tensor[0].numel() for name in ("q", "k", "v") for tensor in getattr(trace, name))
    if exact or exact is None and 4 * size <= MOST_BYTES:
        return {"layers": [of_layer(trace, layer) for layer in range(L)], "overview": None}
    weights = torch.stack([one[0] for one in trace.weights]).float().cpu().numpy()  # (L, nh, T, T)
    return {"layers": [None] * L, "overview": packed_bytes(weights)}


def figures(looker, tokenizer, ids, name, exact_layers=None):
    """
    A text, a list of at least 2 ids -> what the page shows of it, a dict for JSON. `name` is the model's.
    `exact_layers` is for `of_layers`.
    """
    gpt = looker.gpt
    trace = looker.trace(torch.tensor([ids], device=looker.device))
    losses = looker.losses(torch.tensor([ids], device=looker.device))[0].tolist()
    what_ifs = {key: measured(looker, ids, what_if) for key, what_if in WHAT_IFS.items()}
    shown = {
        "model": of_model(gpt, name),
        "tokens": [{"id": id, "loss": loss} for id, loss in zip(ids, [None, *losses], strict=True)],
        **of_layers(trace, exact_layers),
        "reach": packed(reach(gpt, trace)),
        "parts": of_parts(gpt, torch.tensor([ids], device=looker.device)),
        "places": of_places(gpt, len(ids)),
        "stream": of_stream(looker, trace),
        "next": of_next(trace.logits[0]),
        "what_if": what_ifs,
        "heads": packed(loss_without_heads(looker, ids)),
        "edges": {t: packed(row) for t, row in cut_edges(looker, ids, rows_to_cut(len(ids))).items()},
        "endings": {key: other_endings(looker, ids, WHAT_IFS[key]) for key in ("as_trained", "no_mask")},
    }
    names = {number: mark for mark, number in tokenizer.specials().items()}
    used = sorted(ids_in(shown))
    shown["vocabulary"] = {
        id: token_text(tokenizer, names, id) if id < tokenizer.vocab_size else f"[{id}]" for id in used
    }
    return shown


def of_model(gpt, name):
    config = gpt.config
    return {
        "name": name,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_kv_head": config.kv_heads,
        "head_size": config.head_channels,
        "n_embd": config.n_embd,
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "positions": config.positions,
        "rope_theta": config.rope_theta,
        "parameters": gpt.num_parameters(),
    }


def of_parts(gpt, idx):
    """
    What the parts of the first layer's scores are made of: the parts "token" and "rest" of its queries and
    keys before rotation; what is left of them comes from places.
    """
    found = parts_of_first_layer(gpt, idx)
    names = ("token", "rest") if gpt.config.positions != "rotary" else ("token",)
    return {
        vectors: {name: packed(split[name].float().cpu().numpy()) for name in names}
        for vectors, split in found.items()
    }


def reach(gpt, trace):
    """(L, nh, T): how long what each head adds to the stream of a token that takes all of token s."""
    found = []
    for block, v in zip(gpt.transformer.h, trace.v, strict=True):
        nh, hs = gpt.config.n_head, gpt.config.head_channels
        v = v[0].repeat_interleave(nh // v.size(1), dim=0)  # (nh, T, hs)
        out = block.attn.c_proj.weight.unflatten(1, (nh, hs)).permute(1, 2, 0)  # (nh, hs, C)
        found.append((v @ out).norm(dim=-1))  # (nh, T)
    return torch.stack(found).float().detach().cpu().numpy()


def of_places(gpt, T):
    """How alike learnt positions are: packed (T, T) of cosines; None where positions are not learnt."""
    if gpt.config.positions != "learned":
        return None
    places = torch.nn.functional.normalize(gpt.transformer.wpe.weight[:T].detach().float(), dim=-1)
    return packed((places @ places.T).cpu().numpy())


def of_stream(looker, trace):
    """
    The stream after the embedding and each block: its length (L + 1, T), and the tokens that the model would
    say there, the likeliest first: ids (L + 1, T, 5) and probabilities.
    """
    tops = [looker.lens(x)[0].float().softmax(dim=-1).topk(LENS_TOP) for x in trace.stream]
    return {
        "length": packed(torch.stack([x[0].float().norm(dim=-1) for x in trace.stream]).cpu().numpy()),
        "ids": [top.indices.tolist() for top in tops],
        "p": packed(torch.stack([top.values for top in tops]).cpu().numpy()),
    }


def of_next(logits):
    """The largest logits (T, 64) after each token, their ids, and the log of the sum of all exponentials."""
    logits = logits.float()
    top = logits.topk(min(NEXT_TOP, logits.size(-1)))
    return {
        "ids": top.indices.tolist(),
        "logits": packed(top.values.cpu().numpy()),
        "logsumexp": packed(logits.logsumexp(dim=-1).cpu().numpy()),
    }


def ids_in(shown):
    """All token ids that the page names."""
    found = {token["id"] for token in shown["tokens"]}
    for table in (*shown["stream"]["ids"], shown["next"]["ids"]):
        for row in table:
            found |= set(row)
    for result in shown["what_if"].values():
        found |= {id for id, _ in result["top"]} | set(result["continuation"])
    return found
