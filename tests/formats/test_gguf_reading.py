"""GGUF files in: those of our own export, those that the gguf package writes, and hostile ones."""

import json
import os
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_gpt, random_ids
from exports import TEXT, TRICKY, another_tokenizer, assert_one_line, exported, save_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf import LlamaCpp, gguf_file

import export
import prepare
import sample
from kqv.errors import UserError
from kqv.formats import gguf_tokenizer, loading
from kqv.formats.families import MODERN
from kqv.text.tokenizers import ByteTokenizer, from_json

gguf = pytest.importorskip("gguf")

SHAPES = {
    "gpt2": {"bias": True},
    "gpt2, two matrices": {"bias": False, "tied_head": False, "n_inner": 96},
    "llama": {**MODERN, "n_kv_head": 2, "n_inner": 96, "norm_eps": 1e-6},
    "llama 3": {**MODERN, "rope_theta": 500000.0, "rope_factor": 8.0, "head_size": 64, "tied_head": False},
    "qwen2": {**MODERN, "qkv_bias": True, "n_kv_head": 1},
    "qwen3": {**MODERN, "qk_norm": True, "head_size": 24, "tied_head": False},
    "arcee": {**MODERN, "activation": "relu2"},
}


def written(folder, dtype="f32", **shape):
    """(a random model of 257 ids, the GGUF file of it)."""
    gpt = random_gpt(**{"vocab_size": 257, "block_size": 64, "n_head": 4, "n_embd": 64, **shape})
    save_run(folder / "run", ByteTokenizer(), gpt)
    export.main([f"--out_dir={folder / 'run'}", f"--to={folder / 'it.gguf'}", f"--dtype={dtype}"])
    return gpt, folder / "it.gguf"


def logits(gpt):
    with torch.no_grad():
        return gpt.lm_head(gpt.hidden(random_ids(2, 50, below=257)))


def read(path):
    return loading.pair_of(loading.load_start(str(path)), path)


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_comes_back_with_the_same_numbers(tmp_path, family):
    gpt, path = written(tmp_path, **SHAPES[family])
    found, tokenizer = read(path)
    assert torch.equal(logits(found), logits(gpt)) and tokenizer.kind == "byte"
    assert replace(found.config, n_inner=0, n_kv_head=0, bias=False) == replace(
        gpt.config, n_inner=0, n_kv_head=0, bias=False
    )
    again = path.with_name("again.gguf")
    export.main([f"--init_from={path}", f"--to={again}"])
    assert again.read_bytes()[-10_000:] == path.read_bytes()[-10_000:]


@pytest.mark.parametrize("kind", ["char", "bpe", "chat-byte"])
def test_our_own_tokenizers_come_back_as_they_were(kind):
    _, tokenizer = read(gguf_file(kind))
    assert tokenizer.to_json() == exported(kind).tokenizer.to_json()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_every_precision_is_read_as_the_gguf_package_reads_it(tmp_path, dtype):
    _, path = written(tmp_path, dtype, **SHAPES["llama"])
    weights = loading.load_start(str(path))["model"]
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_down.weight")
    expected = gguf.dequantize(tensor.data, tensor.tensor_type)
    assert tensor.tensor_type.name == dtype.upper()
    assert np.array_equal(weights["transformer.h.1.mlp.c_proj.weight"], expected)


def test_other_scalings_than_llama_3s_usual_one_are_found(tmp_path):
    scaling = {"rope_factor": 3.5, "rope_slow": 2.0, "rope_fast": 11.0, "rope_original": 300}
    gpt, path = written(tmp_path, **MODERN, **scaling, head_size=64)
    assert torch.allclose(logits(read(path)[0]), logits(gpt), atol=1e-4)


# What a header says


def a_file(path, change=None, tensors=None, **metadata):
    """A llama of random numbers, as the gguf package writes it; `metadata` of the llama, None: left out."""
    writer = gguf.GGUFWriter(path, "llama")
    usual = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    usual |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    for key, value in {**usual, "attention.layer_norm_rms_epsilon": 1e-5, **metadata}.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add.get(type(value), writer.add_uint32)(f"llama.{key}", value)
    writer.add_string(gguf_tokenizer.OURS, json.dumps({"kind": "byte"}))
    shapes = {
        "token_embd": (257, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
    }
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {"blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32), "blk.0.ffn_gate": (64, 32)}
    shapes |= {"blk.0.ffn_up": (64, 32), **(tensors or {})}
    for name, shape in shapes.items():
        if shape:
            writer.add_tensor(f"{name}.weight", np.full(shape, 0.5, np.float32))
    (change or (lambda writer: None))(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_that_the_gguf_package_wrote_is_read(tmp_path):
    assert read(a_file(tmp_path / "a.gguf", **{"rope.scaling.type": "none"}))[0].config.kv_heads == 2
    assert read(a_file(tmp_path / "a.gguf", **{"rope.freq_base": 1e10}))[0].config.rope_theta == 1e10
    os.rename(tmp_path / "a.gguf", tmp_path / "of no ending")
    read(tmp_path / "of no ending")


REFUSED = {
    "a window": ({"attention.sliding_window": 16}, {}, ["attention.sliding_window=16"]),
    "experts": ({"expert_count": 8}, {}, ["expert_count=8"]),
    "yarn": ({"rope.scaling.type": "yarn"}, {}, ["rope.scaling.type='yarn'"]),
    "linear": ({"rope.scaling.factor": 4.0}, {}, ["rope.scaling.factor=4.0"]),
    "part of a head": ({"rope.dimension_count": 4}, {}, ["rope.dimension_count=4"]),
    "heads of layers": ({"attention.head_count_kv": [1, 2]}, {}, ["attention.head_count_kv"]),
    "no heads": ({"attention.head_count": 0}, {}, ["attention.head_count=0"]),
    "no length": ({"context_length": None}, {}, ["llama.context_length"]),
    "no eps": ({"attention.layer_norm_rms_epsilon": None}, {}, ["layer_norm_rms_epsilon"]),
    "nan": ({"attention.layer_norm_rms_epsilon": float("nan")}, {}, ["=nan"]),
    "theta 0": ({"rope.freq_base": 0.0}, {}, ["rope_theta", "0.0"]),
    "theta 1": ({"rope.freq_base": 1.0}, {}, ["rope_theta", "1.0"]),
    "infinite theta": ({"rope.freq_base": float("inf")}, {}, ["rope.freq_base=inf"]),
    "odd heads": (
        {f"{part}_length": 7 for part in ("attention.key", "attention.value")} | {"rope.dimension_count": 7},
        {},
        ["even size, not 7"],
    ),
    "five heads": ({"attention.head_count": 5}, {}, ["n_head=5", "n_kv_head=2"]),
    "more blocks": ({"block_count": 2**31 - 1}, {}, ["block_count=2147483647"]),
    "wide": ({"embedding_length": 2**30, "feed_forward_length": 2**30}, {}, ["n_embd", "parameters"]),
    "narrow": ({"feed_forward_length": 65}, {}, ["ffn_up", "(64, 32)", "(65, 32)"]),
    "a bias": ({}, {"blk.0.attn_q_norm": (8,)}, ["'blk.0.attn_q_norm.weight'"]),
    "no q": ({}, {"blk.0.attn_q": None}, ["blk.0.attn_q.weight"]),
    "no embedding": ({}, {"token_embd": None}, ["token_embd.weight"]),
    "other factors": ({}, {"rope_freqs": (4,)}, ["rope_freqs.weight"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_changes_the_computing_is_refused_by_name(cli, tmp_path, what):
    metadata, tensors, named = REFUSED[what]
    a_file(tmp_path / "a.gguf", tensors=tensors, **metadata)
    assert_one_line(cli(sample.main, "--init_from=a.gguf"), "a.gguf", *named)


def test_other_architectures_and_parts_of_models_are_refused(cli, tmp_path):
    gemma = {"general.architecture": gguf.gguf_writer.GGUFValue("gemma3", gguf.GGUFValueType.STRING)}
    for change, named in (
        (lambda writer: writer.kv_data[0].update(gemma), "'gemma3'"),
        (lambda writer: writer.add_type("adapter"), "general.type='adapter'"),
        (lambda writer: writer.add_uint16("split.count", 3), "split.count=3"),
    ):  # fmt: skip
        a_file(tmp_path / "a.gguf", change)
        assert_one_line(cli(sample.main, "--init_from=a.gguf"), "a.gguf", named)


# Files that lie


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def header(tensors=b"", count=0, entries=(), number=None, version=3):
    number = len(entries) if number is None else number
    return b"GGUF" + struct.pack("<IQQ", version, count, number) + b"".join(entries) + tensors


def a_tensor(name=b"a", dimensions=(32,), kind=0, offset=0, number=None):
    number = len(dimensions) if number is None else number
    return (
        struct.pack("<Q", len(name))
        + name
        + struct.pack(f"<I{len(dimensions)}QIQ", number, *dimensions, kind, offset)
    )


def followed(head, size=4096):
    return head + bytes(-len(head) % 32) + bytes(size)


NESTED = struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 1) + bytes(4)

LIES = {
    "empty": (b"", "is empty"),
    "only the magic": (b"GGUF", "ends within its header"),
    "another file": (b"PK\x03\x04" + bytes(100), "begins with"),
    "version 1": (header(version=1), "version is 1"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version is"),
    "2**60 tensors": (header(count=2**60), f"{2**60} tensors"),
    "2**60 entries": (header(number=2**60), f"{2**60} entries"),
    "2**63 texts": (header(entries=[entry(b"a", 9, struct.pack("<IQ", 8, 2**63))]), f"{2**63} texts"),
    "2**60 numbers": (header(entries=[entry(b"a", 9, struct.pack("<IQ", 4, 2**60))]), f"{2**60} numbers"),
    "a text of 2**63": (header(entries=[entry(b"a", 8, struct.pack("<Q", 2**63))]), f"{2**63} bytes"),
    "an array in an array": (header(entries=[entry(b"a", 9, NESTED)]), "array of the unknown kind 9"),
    "an unknown kind of value": (header(entries=[entry(b"a", 77, b"")]) + bytes(64), "unknown kind 77"),
    "no UTF-8": (header(entries=[entry(b"\xff", 4, bytes(4))]), "not UTF-8"),
    "a key twice": (header(entries=[entry(b"a", 4, bytes(4))] * 2), "'a' twice"),
    "an alignment of 0": (
        followed(header(entries=[entry(b"general.alignment", 4, bytes(4))])),
        "alignment is 0",
    ),
    "an alignment of 3": (
        followed(header(entries=[entry(b"general.alignment", 4, struct.pack("<I", 3))])),
        "alignment is 3",
    ),
    "a tensor twice": (followed(header(a_tensor() + a_tensor(offset=128), 2)), "'a' twice"),
    "no dimension": (followed(header(a_tensor(dimensions=()), 1)), "0 dimensions"),
    "2**31 dimensions": (followed(header(a_tensor(number=2**31), 1)), f"{2**31} dimensions"),
    "a dimension of 0": (followed(header(a_tensor(dimensions=(0,)), 1)), "(0,)"),
    "2**62 numbers in each of 4 dimensions": (
        followed(header(a_tensor(dimensions=(2**62,) * 4), 1)),
        "is cut off or lies",
    ),
    "an unknown quantisation": (followed(header(a_tensor(kind=999), 1)), "unknown kind 999"),
    "half a block": (followed(header(a_tensor(dimensions=(33,), kind=8), 1)), "(33,), which Q8_0"),
    "past the end": (followed(header(a_tensor(offset=2**40), 1)), "is cut off or lies"),
    "an offset of 2**63": (followed(header(a_tensor(offset=2**63), 1)), "is cut off or lies"),
    "overlapping": (followed(header(a_tensor() + a_tensor(b"b", offset=64), 2)), "overlap"),
    "not aligned": (followed(header(a_tensor(offset=5), 1)), "is cut off or lies"),
    "no metadata": (followed(header()), "general.architecture=None"),
}


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_one_line(cli, tmp_path, what):
    content, why = LIES[what]
    (tmp_path / "a.gguf").write_bytes(content)
    assert_one_line(cli(sample.main, "--init_from=a.gguf"), "a.gguf", why)
    assert_one_line(cli(sample.main, "--checkpoint=a.gguf"), "a.gguf", why)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damage_anywhere_is_an_error_of_one_line_or_none(tmp_path, data):
    path = tmp_path / "a.gguf"
    content = bytearray(a_file(path).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 32))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, 1600))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert "\n" not in str(error) and "a.gguf" in str(error)


def test_a_pipe_is_no_file(cli, tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    assert_one_line(cli(sample.main, "--init_from=a.gguf"), "a.gguf", "pipe")
    assert_one_line(cli(sample.main, "--init_from=b.gguf"), "b.gguf")


# Tokenizers of other programs

NASTY = [
    *TRICKY, TEXT, "नमस्ते दुनिया १२३", "👩‍👩‍👧 🇫🇷", "a\r\nb\r\n\r\nc", "   \n\n  x    y\t\t z", "12345 1,234.5",
    "<|im_end|> <|im_start|>user",
]  # fmt: skip


def in_gguf(folder, pre, **more):
    """A model in a GGUF file whose tokenizer, a byte-level BPE, is cut by llama.cpp's `pre`."""
    content = json.loads(another_tokenizer(("<|end|>", "<|im_end|>"), 400)._tokenizer.to_str())
    names = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    kinds = [gguf_tokenizer.CONTROL if name.startswith("<|") else gguf_tokenizer.NORMAL for name in names]
    names, kinds = [*names, "two words", "[PAD401]"], [*kinds, 4, 5]
    values = {"model": "gpt2", "pre": pre, "tokens": names, "token_type": kinds, "eos_token_id": 1}
    values |= {"merges": [" ".join(merge) for merge in content["model"]["merges"]], "bos_token_id": 0}
    values |= {"add_bos_token": False, **more}

    def change(writer):
        del writer.kv_data[0][gguf_tokenizer.OURS]
        writer.add_chat_template("{{ messages }}")
        for key, value in values.items():
            add = {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
            if value is not None:
                add.get(type(value), writer.add_uint32)(f"tokenizer.ggml.{key}", value)

    folder.mkdir(exist_ok=True)
    return a_file(folder / f"{pre}.gguf", change, {"token_embd": (len(values["tokens"]), 32)})


@pytest.mark.parametrize("pre", gguf_tokenizer.CUTS)
def test_a_whole_tokenizer_gives_llama_cpps_ids_in_and_out(tmp_path, pre):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    path = in_gguf(tmp_path, pre)
    gpt, tokenizer = read(path)
    assert gpt.config.vocab_size == tokenizer.vocab_size + 1 and tokenizer.ends == (1,)
    export.main([f"--init_from={path}", f"--to={tmp_path / 'out.gguf'}"])
    before, after = (gguf.GGUFReader(file).fields for file in (path, tmp_path / "out.gguf"))
    for key in ("model", "pre", "merges", "eos_token_id", "bos_token_id", "add_bos_token"):
        assert before[f"tokenizer.ggml.{key}"].contents() == after[f"tokenizer.ggml.{key}"].contents(), key
    for key in ("tokens", "token_type"):  # the last row is of no token: its name there is llama.cpp's
        assert (
            before[f"tokenizer.ggml.{key}"].contents()[:-1] == after[f"tokenizer.ggml.{key}"].contents()[:-1]
        )
    assert after["tokenizer.chat_template"].contents() == tokenizer.base.chat_template == "{{ messages }}"
    for file in (path, tmp_path / "out.gguf"):
        other = LlamaCpp(file)
        for text in NASTY:
            ids = tokenizer.encode(text).tolist()
            assert other.ask("/tokenize", content=text, parse_special=False)["tokens"] == ids, text
            assert tokenizer.decode(ids) == text
    marked = "a<|im_end|>two words<|end|>"
    found = other.ask("/tokenize", content=marked, parse_special=True)["tokens"]
    assert found == tokenizer.base.encode_marked(marked).tolist()


def pieces_with_scores():
    """{key: value} of SentencePiece's BPE of TEXT, as GGUF has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    vocabulary = learner.get_vocab()
    pieces = sorted(vocabulary, key=vocabulary.get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "two words", *pieces]
    kinds = [2, 3, 3, *[6] * 256, 4, *[1] * len(pieces)]
    scores = [0.0] * 260 + [-float(place) for place in range(len(pieces))]
    found = {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "merges": None}
    return {**found, "pre": "default", "bos_token_id": 1, "eos_token_id": 2, "add_bos_token": None}


@pytest.mark.parametrize("space", [True, False])
def test_sentence_pieces_give_llama_cpps_ids(cli, tmp_path, space):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    values = pieces_with_scores()
    path = in_gguf(tmp_path, **values, add_space_prefix=space)
    _, tokenizer = read(path)
    assert tokenizer.base.begin == (1,) and tokenizer.separator == 2
    other = LlamaCpp(path)
    for text in NASTY:
        ids = tokenizer.encode(text).tolist()
        assert other.ask("/tokenize", content=text, parse_special=False)["tokens"] == ids, text
        assert tokenizer.base.decode(ids) == text
    assert_one_line(cli(export.main, f"--init_from={path}", "--to=a.gguf"), "byte-level", "--format=hf")
    values["tokens"][-1] = "a" * 1_000_000
    assert_one_line(cli(sample.main, f"--init_from={in_gguf(tmp_path, **values)}"), "1000000 letters")


@pytest.mark.parametrize(
    "pre, more, named",
    [
        ("viking", {}, "'viking'"),
        ("qwen2", {"model": "bert"}, "'bert'"),
        ("qwen2", {"tokens": ["a", "b"]}, "2 tokens"),
        ("qwen2", {"merges": None}, "merges"),
        ("qwen2", {"merges": ["a b c"]}, "['a', 'b', 'c']"),
        ("qwen2", {"eos_token_id": 2**31}, "eos_token_id"),
        ("qwen2", {"tokens": [7] * 402}, "402 tokens"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(cli, tmp_path, pre, more, named):
    path = in_gguf(tmp_path / "folder", pre, **more)
    assert_one_line(cli(sample.main, f"--init_from={path}"), named)


def test_a_pre_tokenizer_without_a_name_in_llama_cpp_is_refused_on_the_way_out(cli, tmp_path):
    contents = loading.load_start(str(in_gguf(tmp_path, "qwen2")))
    content = json.loads(contents["tokenizer"]["files"]["tokenizer.json"])
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\w+|\W+"}
    contents["tokenizer"]["files"]["tokenizer.json"] = json.dumps(content)
    save_run(tmp_path / "run", from_json(contents["tokenizer"]))
    assert_one_line(cli(export.main, "--out_dir=run", "--to=a.gguf"), "pre_tokenizer", "--format=hf")


@pytest.mark.slow
def test_smollm2_goes_on_as_in_llama_cpp(cli, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    try:
        gpt, tokenizer = read("smollm2")
    except UserError as error:
        if "package index" in str(error):
            pytest.skip(str(error))
        raise
    (tmp_path / "text.txt").write_text(TEXT)
    assert cli(prepare.main, "text.txt", "--tokenizer=smollm2", "--name=it")[0] == 0
    export.main(["--init_from=smollm2", f"--to={tmp_path / 'it.gguf'}"])
    other = LlamaCpp(tmp_path / "it.gguf")
    for text in NASTY:
        found = other.ask("/tokenize", content=text, parse_special=False)["tokens"]
        assert found == tokenizer.encode(text).tolist()
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    for text, least in ((question, 4), ("The history of mathematics begins", 64)):
        ids, new = tokenizer.base.encode_marked(text).tolist(), []
        while len(new) < 64 and not {*new[-1:]} & {*tokenizer.ends}:
            with torch.no_grad():
                new.append(int(gpt.lm_head(gpt.hidden(torch.tensor([ids + new]))[0, -1]).argmax()))
        assert other.greedy(ids, len(new)) == new and len(new) >= least
        print(tokenizer.decode(new))
