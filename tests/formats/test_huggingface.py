"""Hugging Face folders with the real transformers: its folders read here, ours read there; and the hub."""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, logits_of, random_gpt, random_ids, script, write_text
from exports import (
    BASES,
    KINDS,
    SHAPE,
    TEXT,
    a_folder,
    assert_one_line,
    exported,
    in_transformers,
    random_gpt2,
    save_run,
    write_json,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import export
import prepare
import sample
import train
from kqv.errors import UserError
from kqv.formats import checkpoint, families, huggingface, loading, renaming, resize
from kqv.settings import parse
from kqv.text.tokenizers import ByteTokenizer
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

QUICK = [*TINY_RUN, "--dataset=bpe", "--max_iters=2", "--eval_interval=2", "--eval_iters=1"]


@pytest.fixture
def folder(tmp_path):
    """The folder of a model with GPT-2's vocabulary."""
    random_gpt2().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.fixture
def bpe_set(cli, tmp_path):
    text = write_text(tmp_path / "text.txt", words=800)
    status, _, err = cli(prepare.main, text, "--name=bpe", "--tokenizer=gpt2")
    assert status == 0, err


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")


def refused(cli, source, *named):
    """Both scripts refuse to start from `source`."""
    for main in (train.main, sample.main):
        assert_one_line(cli(main, f"--init_from={source}", "--device=cpu"), *named)


# Folders that work


@pytest.mark.parametrize("vocab_size", [50257, 61])
def test_a_folder_gives_the_logits_of_transformers(tmp_path, vocab_size):
    theirs = random_gpt2(vocab_size)
    theirs.save_pretrained(tmp_path)
    contents = loading.load_start(str(tmp_path))
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    idx = torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(gpt, idx), theirs(idx).logits, atol=1e-4, rtol=0)
    assert contents.get("tokenizer") == ({"kind": "gpt2"} if vocab_size == 50257 else None)


def test_weights_in_half_precision_are_read(tmp_path):
    random_gpt2(vocab_size=61).half().save_pretrained(tmp_path)
    contents = loading.load_start(str(tmp_path))
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"])
    assert {parameter.dtype for parameter in gpt.parameters()} == {torch.float32}


def test_the_names_of_old_files_are_read_too():
    """The hub's first files lack the `transformer.` prefix and the head, and carry the causal mask."""
    theirs = random_gpt2(vocab_size=61).state_dict()
    old = {name.removeprefix("transformer."): tensor for name, tensor in theirs.items()}
    del old["lm_head.weight"]
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    old["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    ours, expected = (
        renaming.our_weights(
            renaming.usual_names(checkpoint.plain_weights(old, "it"), families.GPT2), families.GPT2
        ),
        renaming.our_weights(theirs, families.GPT2),
    )
    checkpoint.tie_head(ours, "it", True)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_evaluation_only_reports_the_loss_of_the_folders_weights(cli, folder, bpe_set):
    status, out, err = cli(train.main, *QUICK, f"--init_from={folder}", "--eval_only", "--dtype=float32")
    assert status == 0, err
    line = next(line for line in out.splitlines() if "val loss" in line)
    reported = float(line.split("val loss ")[1].split()[0])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    config = parse(train.TrainSettings, QUICK)
    batch = train.Dataset("bpe").evaluation_batch("val", config.batch_size, config.block_size, 0, 1)
    x, y = torch.from_numpy(batch.idx), torch.from_numpy(batch.targets)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
    assert reported == pytest.approx(expected.item(), abs=2e-4)


def test_training_goes_on_from_the_folders_weights(cli, folder, bpe_set, tmp_path):
    status, _, err = cli(train.main, *QUICK, f"--init_from={folder}", "--learning_rate=0", "--min_lr=0")
    assert status == 0, err
    saved, start = loading.load(tmp_path / "out/ckpt.pt"), loading.load_start(str(folder))
    assert saved["model_args"] == {**start["model_args"], "block_size": 16, "dropout": 0.0}  # cropped from 24
    for name, tensor in start["model"].items():
        kept = tensor[:16] if name == "transformer.wpe.weight" else tensor
        assert torch.equal(saved["model"][name], kept), name

    status, _, err = cli(train.main, *QUICK, f"--init_from={folder}", "--out_dir=tuned")
    assert status == 0, err
    tuned = loading.load(tmp_path / "tuned/ckpt.pt")
    assert tuned["iter_num"] == 2 and tuned["best_val_loss"] < saved["best_val_loss"]
    status, out, err = cli(sample.main, "--out_dir=tuned", "--max_new_tokens=3", "--start=keys")
    assert status == 0 and out.startswith("keys"), err


def test_sampling_from_a_folder_writes_what_transformers_writes(cli, folder):
    prompt = "keys and values"
    arguments = [f"--init_from={folder}", f"--start={prompt}", "--max_new_tokens=8", "--device=cpu"]
    status, out, err = cli(sample.main, *arguments, "--temperature=0")
    assert status == 0, err
    tokenizer = loading.tokenizer_of(loading.load_start(str(folder)))
    idx = torch.tensor(tokenizer.encode(prompt).astype("int64"))[None]
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder)
    options = {"attention_mask": torch.ones_like(idx), "min_new_tokens": 8, "pad_token_id": 0}
    expected = theirs.generate(idx, max_new_tokens=8, do_sample=False, **options)
    assert out == tokenizer.decode(expected[0].tolist()) + "\n"


def test_a_set_with_another_tokenizer_is_refused(cli, folder, tiny_set):
    result = cli(train.main, *TINY_RUN, f"--dataset={tiny_set}", f"--init_from={folder}")
    assert_one_line(result, "tokenizer", folder)


def test_a_folder_without_its_tokenizer_is_refused_with_how_to_save_it(cli, tmp_path):
    random_gpt2(vocab_size=61).save_pretrained(tmp_path / "theirs")
    result = cli(sample.main, f"--init_from={tmp_path / 'theirs'}", "--device=cpu")
    assert_one_line(result, f"tokenizer.save_pretrained('{tmp_path / 'theirs'}')")


# Folders that do not


def test_a_folder_without_weights_is_refused(cli, folder):
    (folder / "model.safetensors").unlink()
    refused(cli, folder, folder, "model.safetensors", "save_pretrained")


@pytest.mark.parametrize("left", [0, 5, 300, -1])
def test_cut_off_weights_are_refused(cli, folder, left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(cli, folder, folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"n_positions": 24}'])
def test_a_config_json_that_says_nothing_is_refused(cli, folder, content):
    (folder / "config.json").write_bytes(content)
    refused(cli, folder, folder)


def test_another_architecture_is_refused(cli, tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=61, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "neox")
    refused(cli, tmp_path / "neox", "neox", "gpt_neox", "llama")


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"n_inner": 17},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
)
def test_gpt2_with_other_parts_is_refused(cli, folder, change):
    edit_config(folder, **change)
    refused(cli, folder, folder, *change)


def test_either_name_of_gpt2s_activation_is_read(folder):
    edit_config(folder, activation_function="gelu_pytorch_tanh")
    assert loading.load_start(str(folder))["model_args"]["n_layer"] == 2


def test_weights_that_do_not_fit_their_config_are_refused(cli, folder, bpe_set):
    for change in ({"n_embd": 16}, {"n_layer": 3}, {"n_layer": "2"}, {"n_positions": 10**12}):
        edit_config(folder, **{"n_embd": 8, "n_layer": 2, **change})
        assert_one_line(cli(sample.main, f"--init_from={folder}", "--device=cpu"))
        assert_one_line(cli(train.main, *QUICK, f"--init_from={folder}"), folder)


def test_a_source_that_is_nowhere_is_refused_with_what_there_is(cli):
    refused(cli, "gpt2-large-ish", "gpt2-large-ish", "gpt2-xl")


def test_a_missing_package_is_named_with_how_to_install_it(cli, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(cli, folder, "pip install safetensors")


def test_a_missing_hub_package_matters_for_the_hub_alone(cli, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(cli, "gpt2", "pip install", "huggingface_hub")
    status, _, err = cli(sample.main, f"--init_from={folder}", "--max_new_tokens=1", "--device=cpu")
    assert status == 0, err


def test_a_hub_out_of_reach_is_one_line_with_the_way_out(tmp_path):
    empty = str(tmp_path / "hf")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": empty, "HF_HUB_CACHE": empty}
    done = script("sample.py", "--init_from=gpt2", "--device=cpu", cwd=tmp_path, **offline)
    assert_one_line((done.returncode, done.stdout, done.stderr), "gpt2", "--init_from=FOLDER")


# Folders for transformers


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(kind):
    ours, (model, tokenizer) = exported(kind), in_transformers(kind)
    V = ours.tokenizer.vocab_size
    assert model.config.vocab_size == len(tokenizer) == V + (ours.tokenizer.separator is None)
    idx = random_ids(2, 128, below=V)
    with torch.no_grad():
        expected, found = logits_of(ours.gpt, idx)[..., :V], model(idx).logits
        torch.testing.assert_close(found[..., :V], expected, atol=1e-4, rtol=0)
        likely = found.log_softmax(-1)[..., :V]  # an id that only programs need takes nothing from the others
        torch.testing.assert_close(likely, expected.log_softmax(-1), atol=1e-4, rtol=0)
    assert model.dtype == torch.float32 and expected.std() > 0.5


def clear_prompt(ours):
    """A text after which no choice is close."""
    for start in range(len(TEXT)):
        prompt = TEXT[start : start + 12].strip()
        if prompt and ours.greedy(ours.tokenizer.encode(prompt).tolist(), 100)[1] > 2e-4:
            return prompt


@pytest.mark.parametrize("kind", BASES)
def test_transformers_writes_what_sample_py_writes(cli, kind):
    ours, (model, tokenizer) = exported(kind), in_transformers(kind)
    prompt = clear_prompt(ours)
    arguments = [f"--out_dir={ours.run}", f"--start={prompt}", "--temperature=0", "--max_new_tokens=100"]
    status, out, err = cli(sample.main, *arguments, "--device=cpu")
    assert status == 0, err
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=100, do_sample=False)
    assert out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_writes_several_texts_at_once(kind):
    """For which it needs an id that fills up the shorter ones."""
    model, tokenizer = in_transformers(kind)
    write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts, options = ["the queries and", "keys a", "heads"], {"max_new_tokens": 8, "do_sample": False}
    several = [one[0]["generated_text"] for one in write(texts, batch_size=2, **options)]
    assert several == [write(text, **options)[0]["generated_text"] for text in texts]
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collate([tokenizer(text) for text in texts])
    assert (batch["labels"] >= 0).sum() == sum(len(tokenizer(text)["input_ids"]) for text in texts)


@pytest.mark.parametrize("shape", [{"vocab_size": 4, "bias": False}, {"vocab_size": 300, "n_embd": 32}, {}])
def test_an_id_more_takes_nothing_from_the_others(shape):
    gpt = random_gpt(**shape)
    V, idx = gpt.config.vocab_size, random_ids(20, 8, below=gpt.config.vocab_size)
    more = resize.with_end(gpt).eval()
    assert more.config.vocab_size == V + 1 and more.lm_head.weight is more.transformer.wte.weight
    found, expected = (logits_of(one, idx).log_softmax(-1)[..., :V] for one in (more, gpt))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_biases_that_a_model_lacks_are_zeros(tmp_path):
    from safetensors.torch import load_file

    written = load_file(exported("byte").folder / "model.safetensors")
    biases = [weight for name, weight in written.items() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1 and not any(bias.any() for bias in biases)


def test_biases_that_a_model_has_are_written(tmp_path):
    save_run(tmp_path / "run", ByteTokenizer(), random_gpt(vocab_size=257, bias=True, **SHAPE))
    export.main([f"--out_dir={tmp_path / 'run'}", f"--to={tmp_path / 'hf'}"])
    saved, back = loading.load(tmp_path / "run/ckpt.pt"), huggingface.load(tmp_path / "hf")
    assert back["model"].keys() == saved["model"].keys()
    assert all(torch.equal(back["model"][name], weight) for name, weight in saved["model"].items())
    assert back["model_args"] == {k: v for k, v in saved["model_args"].items() if k != "dropout"}


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_a_folder_in_half_precision(tmp_path, name):
    export.main([f"--out_dir={exported('byte').run}", f"--to={tmp_path / 'hf'}", f"--dtype={name}"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto")
    assert model.dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[name]
    assert torch.equal(
        model.transformer.wpe.weight, exported("byte").gpt.transformer.wpe.weight.to(model.dtype)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_exported_comes_back_bit_for_bit(tmp_path, kind):
    ours = exported(kind)
    first = loading.load_start(str(ours.folder))
    assert first["tokenizer"] == ours.tokenizer.to_json()
    export.main([f"--init_from={ours.folder}", f"--to={tmp_path / 'again'}"])
    second = loading.load_start(str(tmp_path / "again"))
    assert first["model_args"] == second["model_args"] and first["tokenizer"] == second["tokenizer"]
    assert all(torch.equal(first["model"][name], weight) for name, weight in second["model"].items())
    with open(ours.folder / "tokenizer.json") as one, open(tmp_path / "again/tokenizer.json") as other:
        assert one.read() == other.read()


def test_biases_are_kept_in_any_order():
    weights = {"a.bias": torch.ones(2), "a.weight": torch.ones(2, 3), "b.weight": torch.ones(4)}
    whole = renaming.with_biases(weights)
    assert torch.equal(whole["a.bias"], torch.ones(2)) and torch.equal(whole["b.bias"], torch.zeros(4))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_files_that_go_too_deep_are_one_line(cli, name):
    shutil.copytree(exported("byte").folder, "it")
    Path("it", name).write_text("[" * 200_000)
    assert_one_line(cli(sample.main, "--init_from=it"), "it")


def test_a_folder_whose_config_goes_too_deep_is_not_replaced(cli):
    shutil.copytree(exported("byte").folder, "it")
    Path("it/config.json").write_text("[" * 200_000)
    assert_one_line(cli(export.main, f"--out_dir={exported('byte').run}", "--to=it"), "another --to")


def test_who_may_read_one_file_may_read_all():
    assert len({path.stat().st_mode for path in exported("byte").folder.iterdir()}) == 1


# Weights in other forms


def as_bin(folder):
    from safetensors.torch import load_file

    for path in folder.glob("*.safetensors"):
        torch.save(
            load_file(path),
            folder / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"),
        )
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("old", [False, True])
def test_weights_in_parts_and_in_torchs_own_format_are_read(tmp_path, parts, old):
    model = a_folder(tmp_path, 61, max_shard_size="2KB" if parts else "1GB")
    if old:
        as_bin(tmp_path)
    files = [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.bin")]
    assert (len(files) > 1) == parts and {path.suffix for path in files} == {
        ".bin" if old else ".safetensors"
    }
    contents = loading.load_start(str(tmp_path))
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    idx = random_ids(2, 24, below=61)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(gpt, idx), model(idx).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("named", ["../model.safetensors", "/etc/passwd", "model-00009-of-00009.safetensors"])
def test_a_part_that_is_not_there_is_refused(cli, tmp_path, named):
    a_folder(tmp_path / "hf", 61)
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"transformer.wte.weight": named}}
    (tmp_path / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", named)


def test_each_weight_comes_from_the_part_that_the_index_names(cli, tmp_path):
    from safetensors.torch import load_file, save_file

    a_folder(tmp_path, 61)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    weights = load_file(tmp_path / "model-1.safetensors")
    name = "transformer.ln_f.weight"
    save_file({name: weights[name] + 1}, tmp_path / "model-2.safetensors")
    places = dict.fromkeys(weights, "model-1.safetensors")
    for wrong in ({**places, name: "model-2.safetensors"}, {**places, "more": "model-1.safetensors"}):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        assert_one_line(cli(sample.main, f"--init_from={tmp_path}"), name if "more" not in wrong else "more")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "complex64", "int32", "uint16", "bool"])
def test_weights_of_no_plain_real_numbers_are_refused(cli, tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    a_folder(tmp_path, 61)
    weights = load_file(tmp_path / "model.safetensors")
    name = "transformer.ln_f.weight"
    save_file({**weights, name: weights[name].to(getattr(torch, dtype))}, tmp_path / "model.safetensors")
    assert_one_line(cli(sample.main, f"--init_from={tmp_path}"), dtype)


class Code:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("content", [b"", b"x" * 100, pickle.dumps({"a": Code()}), "torch"])
def test_old_weights_run_no_code(cli, tmp_path, content):
    a_folder(tmp_path / "hf", 61)
    (tmp_path / "hf/model.safetensors").unlink()
    if content == "torch":
        torch.save({"a": Code()}, tmp_path / "hf/pytorch_model.bin")
    else:
        (tmp_path / "hf/pytorch_model.bin").write_bytes(content)
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'hf'}"), "hf", "pytorch_model.bin")
    assert not (tmp_path / "pwned").exists()


def test_a_local_folder_needs_no_transformers(cli, monkeypatch):
    folder = exported("bpe").folder
    for name in ("transformers", "tokenizers", "huggingface_hub"):
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = cli(sample.main, f"--init_from={folder}", "--max_new_tokens=3", "--device=cpu")
    assert status == 0, err
    status, _, err = cli(export.main, f"--init_from={folder}", "--to=again")
    assert status == 0, err


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has the folders below hub/ORG/NAME, as huggingface_hub fetches them; what was asked for."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if not (tmp_path / "hub" / name).exists():
            raise OSError("401 Client Error\nRepository Not Found")
        fetched = tmp_path / "cache" / name
        ignore = shutil.ignore_patterns(*allow_patterns)
        left = ignore(str(tmp_path), os.listdir(tmp_path / "hub" / name))
        fetched.mkdir(parents=True, exist_ok=True)
        for part in left:
            shutil.copy(tmp_path / "hub" / name / part, fetched)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


@pytest.mark.parametrize("old", [False, True])
def test_a_model_of_the_hub_is_fetched_with_its_tokenizer(cli, hub, tmp_path, old):
    shutil.copytree(exported("char").folder, tmp_path / "hub/some-org/a.model_1")
    (tmp_path / "hub/some-org/a.model_1/tf_model.h5").write_bytes(b"large")
    if old:
        as_bin(tmp_path / "hub/some-org/a.model_1")
    status, out, err = cli(
        sample.main, "--init_from=some-org/a.model_1", "--max_new_tokens=9", "--device=cpu"
    )
    assert status == 0 and len(out) == 11, err
    assert set(hub) == {"some-org/a.model_1"} and not list((tmp_path / "cache").rglob("*.h5"))


def test_gpt2_is_found_under_its_owners_name(cli, hub):
    assert_one_line(cli(sample.main, "--init_from=gpt2-large"), "gpt2-large", "--init_from=FOLDER")
    assert hub == ["openai-community/gpt2-large"]


def test_a_model_that_is_not_on_the_hub_is_refused_in_one_line(cli, hub):
    assert_one_line(cli(sample.main, "--init_from=no/where"), "no/where", "401")


def test_a_model_of_the_hub_without_a_config_is_refused(cli, hub, tmp_path):
    (tmp_path / "hub/some-org/other").mkdir(parents=True)
    assert_one_line(cli(sample.main, "--init_from=some-org/other"), "some-org/other", "config.json")


def test_a_path_is_no_name_on_the_hub(cli, hub, tmp_path):
    for source in ("a/b/c", "../b", "/a/b", "a/b.pt"):
        status, _, err = cli(sample.main, f"--init_from={source}")
        assert status == 1 and "Traceback" not in err
    (tmp_path / "out/run").mkdir(parents=True)
    assert_one_line(cli(sample.main, "--init_from=out/run"), "no checkpoint")
    assert set(hub) <= {"../b", "a/b.pt"}


# Keys of config.json, with the real transformers as the judge

SIZES = {
    "n_positions": [16, 24, None, "missing"],
    "max_position_embeddings": ["missing", 24, 16],
    "n_layer": [2, 1, "missing", 2.0],
    "num_hidden_layers": ["missing", 2],
    "n_head": [2, 4, 1, 3, "missing"],
    "num_attention_heads": ["missing", 4],
    "n_embd": [8, 16, "missing"],
    "hidden_size": ["missing", 8, 16],
    "vocab_size": [61, 60, "missing"],
    "n_ctx": ["missing", 7],
    "n_inner": [None, 32, 33, "missing"],
}
OTHERS = {
    "activation_function": ["gelu_new", "gelu", "gelu_pytorch_tanh", "gelu_fast", "relu", "missing"],
    "layer_norm_epsilon": [1e-5, 1e-3, "missing"],
    "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [False, True],
    "reorder_and_upcast_attn": [False, True],
    "add_cross_attention": [False, True],
    "tie_word_embeddings": [True, False, "missing"],
    "architectures": [["GPT2LMHeadModel"], ["GPT2Model"], "missing"],
    "model_type": ["gpt2", "missing", "gpt_neo"],
    "attn_pdrop": [0.1, 0.9],
    "initializer_range": [0.02, 3.0],
    "quantization_config": ["missing", {"quant_method": "x"}],
}


def a_change(**more):
    """A dict of a few changes to a config.json."""
    keys = {**SIZES, **OTHERS, **more}
    one = st.sampled_from([(key, value) for key, values in keys.items() for value in values])
    return st.lists(one, min_size=1, max_size=3).map(dict)


def test_a_config_gives_the_logits_of_transformers_or_is_refused_by_one_line(tmp_path):
    random_gpt2(61).save_pretrained(tmp_path)
    good = json.loads((tmp_path / "config.json").read_text("utf-8"))
    idx = random_ids(2, 12, below=60)
    taken = []

    @settings(max_examples=60, deadline=None, derandomize=True)
    @example({"n_positions": "missing", "max_position_embeddings": 24})
    @example({"n_head": "missing", "num_attention_heads": 4})
    @example({"tie_word_embeddings": "missing"})
    @given(a_change())
    def check(changes):
        config = {**good, **changes}
        config = {key: value for key, value in config.items() if value != "missing"}
        write_json(tmp_path / "config.json", config)
        try:
            contents = loading.load_start(str(tmp_path))
            gpt = loading.model_of(contents, tmp_path).eval()
        except UserError as error:
            assert str(tmp_path) in str(error) and "\n" not in str(error)
            return
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            torch.testing.assert_close(logits_of(gpt, idx), theirs(idx).logits, atol=1e-4, rtol=0)
        taken.append(changes)

    check()
    assert len(taken) > 10


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_positions": "missing"}, "n_positions"),
        ({"n_positions": 23}, "n_positions=23"),
        ({"n_embd": 16}, "n_embd=16"),
        ({"hidden_size": 16}, "hidden_size"),
        ({"n_layer": 3}, "n_layer=3"),
        ({"vocab_size": 60}, "vocab_size=60"),
        ({"n_layer": "2"}, "n_layer='2'"),
        ({"n_head": None}, "n_head=None"),
        ({"n_head": 3}, "n_head=3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"add_cross_attention": True}, "add_cross_attention"),
    ],
)
def test_a_key_that_does_not_fit_is_named(cli, tmp_path, changes, named):
    random_gpt2(61).save_pretrained(tmp_path / "hf")
    config = {**json.loads((tmp_path / "hf/config.json").read_text("utf-8")), **changes}
    write_json(tmp_path / "hf/config.json", {k: v for k, v in config.items() if v != "missing"})
    assert_one_line(cli(sample.main, "--init_from=hf"), "hf", named)


@pytest.mark.parametrize("tied", [True, False, "missing"])
@pytest.mark.parametrize("head", ["same", "other"])
def test_a_head_of_its_own_is_used_or_refused(cli, tmp_path, tied, head):
    from safetensors.torch import load_file, save_file

    random_gpt2(61).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights["transformer.wte.weight"].clone() + (head == "other")
    save_file(weights, path, metadata={"format": "pt"})
    config = {**json.loads((tmp_path / "hf/config.json").read_text("utf-8")), "tie_word_embeddings": tied}
    write_json(tmp_path / "hf/config.json", {k: v for k, v in config.items() if v != "missing"})
    if head == "other" and tied is False:
        contents = loading.load_start(str(tmp_path / "hf"))
        assert torch.equal(contents["model"]["lm_head.weight"], weights["lm_head.weight"])
        assert torch.equal(contents["model"]["transformer.wte.weight"], weights["transformer.wte.weight"])
    elif head == "other":
        assert_one_line(cli(sample.main, "--init_from=hf"), "lm_head.weight", "tie_word_embeddings")
    else:
        contents = loading.load_start(str(tmp_path / "hf"))
        assert torch.equal(contents["model"]["lm_head.weight"], weights["transformer.wte.weight"])


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_weights_of_wrapped_models_are_read(tmp_path, prefix):
    from safetensors.torch import load_file, save_file

    random_gpt2(61).save_pretrained(tmp_path)
    expected = loading.load_start(str(tmp_path))["model"]
    weights = {prefix + name: weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    save_file(weights, tmp_path / "model.safetensors")
    found = loading.load_start(str(tmp_path))["model"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2"])
def test_a_run_its_export_and_transformers_have_one_loss(cli, tmp_path, kind):
    """Rows that pad the vocabulary, and an id that only other programs need, count in none of them."""
    ours, model = exported(kind), in_transformers(kind)[0]
    (tmp_path / "text.txt").write_text(TEXT[:200], "utf-8")
    options = ["--name=it", f"--tokenizer={ours.run}", "--val_fraction=0.5"]
    status, _, err = cli(prepare.main, "text.txt", *options)
    assert status == 0, err
    idx = torch.from_numpy(np.fromfile("data/it/val.bin", np.uint16).astype("int64"))[None]
    with torch.no_grad():
        logits = model(idx[:, :-1]).logits[0]
    expected = torch.nn.functional.cross_entropy(logits, idx[0, 1:]).item()
    for source in (f"--out_dir={ours.run}", f"--init_from={ours.folder}"):
        arguments = [source, "--dataset=it", "--evaluate=val", "--device=cpu", "--dtype=float32"]
        status, out, err = cli(sample.main, *arguments)
        assert status == 0, err
        assert f"{expected:.3f}" in out, (out, expected)
