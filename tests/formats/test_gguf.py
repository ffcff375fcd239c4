"""GGUF files, read by the real llama.cpp and by the gguf package."""

import copy
import json
import urllib.request
from functools import cache
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import random_gpt, random_ids
from exports import (
    CHATS,
    CONVERSATIONS,
    KINDS,
    TEXT,
    TRICKY,
    a_folder,
    another_tokenizer,
    as_dicts,
    assert_one_line,
    clear,
    exported,
    save_run,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import export
from kqv.formats import checkpoint, families, gguf, loading, lora
from kqv.formats.base import sha256_of
from kqv.text.added import AddedTokenizer
from kqv.text.tokenizers import ByteTokenizer


class LlamaCpp:
    """The real llama.cpp, its server with one file loaded; everything in float32."""

    def __init__(self, file):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = 128
        params.n_parallel = 1
        params.port = 0
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(params)

    def ask(self, path, **what):
        body = json.dumps(what).encode()
        address = self.server.listening_address + path
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, ids, count):
        options = {"temperature": 0, "top_k": 1, "samplers": ["top_k"], "cache_prompt": False}
        answer = self.ask("/completion", prompt=ids, n_predict=count, return_tokens=True, **options)
        return answer["tokens"]


@cache
def gguf_file(kind):
    """The path of a GGUF file of that kind of model, written once for all tests."""
    pytest.importorskip("gguf")
    ours = exported(kind)
    file = ours.folder.with_name("gpt.gguf")
    export.main([f"--out_dir={ours.run}", "--format=gguf", f"--to={file}"])
    return file


@cache
def in_llama_cpp(kind):
    """That file in llama.cpp, once for all tests."""
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    return LlamaCpp(gguf_file(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_goes_on_with_the_same_ids(kind):
    for ids, expected in islice(exported(kind).clear(100, least=1 if kind == "chat-char" else 64), 2):
        assert in_llama_cpp(kind).greedy(ids, 100) == expected


def test_llama_cpp_goes_on_as_an_adapter_does(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    base, tokenizer = exported("byte"), ByteTokenizer()
    gpt = lora.adapt(copy.deepcopy(base.gpt), 4, 16.0)
    for layer in lora.lora_layers(gpt):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    gpt.base = {"source": str(base.run), "sha256": sha256_of(base.gpt.state_dict()), "alpha": 16.0}
    about = {"model_args": vars(gpt.config), "tokenizer": tokenizer.to_json()}
    checkpoint.save(tmp_path / "best.pt", {**lora.contents_of(gpt), **about})
    export.main([f"--out_dir={tmp_path}", f"--to={tmp_path / 'it.gguf'}"])
    other = LlamaCpp(tmp_path / "it.gguf")
    for ids, expected in islice(clear(gpt, tokenizer, 100, least=64), 2):
        assert other.greedy(ids, 100) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_has_the_same_ids_in_llama_cpp(kind):
    ours, other = exported(kind).tokenizer, in_llama_cpp(kind)
    letters = st.text("aàAzé's 19.,<|>\n\r\t\u00a0\u0903\u3000中½क्वेरी键🔑", min_size=20, max_size=60)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(letters)
    def check(text):
        expected = ours.encode(text, unknown="skip").tolist()
        assert other.ask("/tokenize", content=text, parse_special=False)["tokens"] == expected
        assert other.ask("/detokenize", tokens=expected)["content"] == ours.decode(expected)

    for text in [*TRICKY, TEXT]:
        check = example(text)(check)
    check()


@pytest.mark.parametrize("messages", CONVERSATIONS[:2])  # it takes an assistant's last words as begun
@pytest.mark.parametrize("kind", CHATS)
def test_llama_cpp_writes_a_conversation_the_same_way(kind, messages):
    prompt = in_llama_cpp(kind).ask("/apply-template", messages=as_dicts(messages))["prompt"]
    found = in_llama_cpp(kind).ask("/tokenize", content=prompt, parse_special=True)["tokens"]
    assert found == exported(kind).tokenizer.encode_chat(messages, unknown="skip").tolist()


def test_llama_cpp_stops_at_the_end_of_a_text():
    ours = exported("chat-char")
    ids, expected = next((ids, new) for ids, new in ours.clear(100, least=1) if len(new) < 100)
    assert in_llama_cpp("chat-char").greedy(ids, 100) == expected and expected[-1] == ours.tokenizer.separator


FAMILIES = {  # name: (the family in GGUF, fields of a GPTConfig beside the family's)
    "gpt2": ("gpt2", {"bias": True, "tied_head": False, "norm_eps": 1e-3}),
    "llama": ("llama", {"n_kv_head": 2, "tied_head": False, "norm_eps": 1e-6}),
    "llama, tied, one head of keys": ("llama", {"n_kv_head": 1, "head_size": 24}),
    "llama, channels not divisible by heads": ("llama", {"n_embd": 68, "n_head": 3, "head_size": 16}),
    "llama 3": ("llama", {"n_kv_head": 2, "rope_theta": 5e5, "rope_factor": 8.0, "rope_original": 32}),
    "qwen2": ("qwen2", {"n_kv_head": 2, "tied_head": False}),
    "qwen2, tied": ("qwen2", {}),
    "qwen3": ("qwen3", {"n_kv_head": 2, "head_size": 32, "tied_head": False}),
    "qwen3, tied": ("qwen3", {"n_kv_head": 1, "head_size": 8, "norm_eps": 1e-2}),
    "arcee": ("arcee", {"n_kv_head": 2, "tied_head": False, "n_inner": 96}),
    "arcee, scaled": ("arcee", {"rope_factor": 8.0, "rope_original": 32}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_goes_on_with_the_same_ids_in_every_family(tmp_path, name):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    family, changes = FAMILIES[name]
    shape = {"vocab_size": 257, "block_size": 128, "n_embd": 64, "n_head": 4}
    gpt = random_gpt(std=0.2, **{**shape, **families.FAMILIES[family].shape, **changes})
    save_run(tmp_path / "run", ByteTokenizer(), gpt)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'it.gguf'}"])
    other = LlamaCpp(tmp_path / "it.gguf")
    for ids, expected in islice(clear(gpt, ByteTokenizer(), 80, least=64), 2):
        assert other.greedy(ids, 80) == expected


def test_scaled_positions_that_llama_cpp_lacks_are_refused(cli, tmp_path):
    shape = {**families.QWEN3.shape, "rope_factor": 8.0}
    save_run(tmp_path / "run", ByteTokenizer(), random_gpt(vocab_size=257, **shape))
    assert_one_line(
        cli(export.main, "--out_dir=run", "--to=it.gguf"), "qwen3", "rope_factor=8", "--format=hf"
    )


def read_gguf(path):
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("dtype", "file_type", "tolerance"),
    [("f32", 0, 0), ("f16", 1, 1e-3), ("bf16", 32, 1e-2), ("q8_0", 7, 2e-2)],
)
def test_weights_in_every_precision(tmp_path, dtype, file_type, tolerance):
    gguf = pytest.importorskip("gguf")
    ours = exported("byte")
    export.main(
        [f"--out_dir={ours.run}", "--format=gguf", f"--to={tmp_path / 'a.b.gguf'}", f"--dtype={dtype}"]
    )
    fields, tensors = read_gguf(tmp_path / "a.b.gguf")
    assert fields["general.file_type"] == file_type and fields["general.name"] == "a.b"
    assert "output.weight" not in tensors and len(tensors) == 4 + 2 * 12
    for name, shape in (("token_embd.weight", [32, 257]), ("blk.1.attn_qkv.weight", [32, 96])):
        tensor = tensors[name]
        assert list(tensor.shape) == shape and tensor.tensor_type.name == dtype.upper()
    for name, tensor in tensors.items():
        if "norm" in name or "bias" in name or "position" in name:
            assert tensor.tensor_type.name == "F32", name
    embedding = gguf.dequantize(tensors["token_embd.weight"].data, tensors["token_embd.weight"].tensor_type)
    expected = ours.gpt.lm_head.weight[:257].detach().numpy()
    np.testing.assert_allclose(embedding, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_reads_every_precision(tmp_path, dtype):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    export.main(
        [f"--out_dir={exported('byte').run}", "--format=gguf", f"--to={tmp_path / 'x'}", f"--dtype={dtype}"]
    )
    ids, expected = next(exported("byte").clear(4, least=4))
    assert LlamaCpp(tmp_path / "x").greedy(ids, 4) == expected


def test_rows_too_short_for_blocks_are_kept_in_half_precision(tmp_path):
    save_run(tmp_path / "out", ByteTokenizer(), random_gpt(vocab_size=257, n_embd=24))
    export.main([f"--out_dir={tmp_path / 'out'}", "--format=gguf", f"--to={tmp_path / 'x'}", "--dtype=q8_0"])
    kinds = {tensor.n_elements: tensor.tensor_type.name for tensor in read_gguf(tmp_path / "x")[1].values()}
    assert kinds[257 * 24] == "F16" and kinds[4 * 24 * 24] in ("F16", "Q8_0")
    down = read_gguf(tmp_path / "x")[1]["blk.0.ffn_down.weight"]
    assert down.tensor_type.name == "Q8_0" and down.shape[0] == 96


def test_the_end_that_characters_lack_is_as_good_as_impossible():
    fields, tensors = read_gguf(gguf_file("char"))
    V = exported("char").tokenizer.vocab_size
    embedding = tensors["token_embd.weight"].data
    assert embedding.shape[0] == V + 1 == len(fields["tokenizer.ggml.tokens"])
    x = exported("char").gpt.hidden(random_ids(8, 128, below=V)).detach().numpy()  # (B, T, C)
    assert (x @ embedding[V] < -30).all()
    assert fields["tokenizer.ggml.eos_token_id"] == fields["tokenizer.ggml.bos_token_id"] == V
    assert fields["tokenizer.ggml.token_type"] == [1] * V + [3]


def test_llama_cpp_is_told_which_ids_are_special():
    fields, _ = read_gguf(gguf_file("chat-bpe"))
    ours = exported("chat-bpe").tokenizer
    assert (
        fields["tokenizer.ggml.eos_token_id"] == ours.separator and fields["tokenizer.ggml.pre"] == "qwen35"
    )
    assert fields["tokenizer.ggml.tokens"][-4:] == [
        "<|endoftext|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
    ]
    assert fields["tokenizer.ggml.token_type"][-4:] == [3] * 4
    assert not fields["tokenizer.ggml.add_bos_token"] and fields["tokenizer.chat_template"]
    assert "tokenizer.chat_template" not in read_gguf(gguf_file("byte"))[0]


def test_a_vocabulary_in_gpt2s_way_is_the_same_in_llama_cpp(tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    a_folder(tmp_path / "hf", 330, end=0)
    another_tokenizer().save(str(tmp_path / "hf/tokenizer.json"))
    export.main([f"--init_from={tmp_path / 'hf'}", "--format=gguf", f"--to={tmp_path / 'x'}"])
    other = LlamaCpp(tmp_path / "x")
    ours = loading.tokenizer_of(loading.load_start(str(tmp_path / "hf")))
    for text in [*TRICKY, TEXT]:
        found = other.ask("/tokenize", content=text, parse_special=False)["tokens"]
        assert found == ours.encode(text).tolist()


def test_an_export_is_known_by_its_first_key():
    assert gguf.is_ours(gguf_file("byte"))
    assert not gguf.is_ours(exported("byte").folder / "config.json")


def test_added_words_are_words_in_llama_cpp_too(tmp_path):
    words = {"checkpoint": 257, "check": 258, " two words": 259, "éa": 260}
    tokenizer = AddedTokenizer(ByteTokenizer(), words)
    save_run(tmp_path / "run", tokenizer)
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'it.gguf'}"])
    pytest.importorskip("xllamacpp", reason="llama.cpp is not here: pip install xllamacpp")
    other = LlamaCpp(tmp_path / "it.gguf")
    for text in ("a checkpoint is two words", "checkpointcheck éa\nché"):
        ids = tokenizer.encode(text).tolist()
        assert other.ask("/tokenize", content=text, parse_special=False)["tokens"] == ids
        assert other.ask("/detokenize", tokens=ids)["content"] == text


def test_added_words_that_overlap_are_refused_for_llama_cpp(cli, tmp_path):
    save_run(tmp_path / "run", AddedTokenizer(ByteTokenizer(), {"abc": 257, "cde": 258}))
    assert_one_line(cli(export.main, "--out_dir=run", "--to=it.gguf"), "'abc'", "'cde'", "--format=hf")
