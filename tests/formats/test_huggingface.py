"""GPT-2 as Hugging Face stores it: folders that `transformers` wrote, trained, sampled, refused."""

import json
import sys

import pytest
import torch
from conftest import TINY_RUN, logits_of, script, write_text

import prepare
import sample
import train
from kqv.formats import families, loading
from model import GPT, GPTConfig

transformers = pytest.importorskip("transformers")

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 24}
QUICK = [*TINY_RUN, "--dataset=bpe", "--max_iters=2", "--eval_interval=2", "--eval_iters=1"]


def random_gpt2(vocab_size=50257, **options):
    """GPT-2's architecture, small, every number random."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=vocab_size, **{**SMALL, **options})
    gpt2 = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in gpt2.parameters():
            parameter.normal_(mean=0.5 if parameter.dim() == 1 else 0.0, std=0.3)
    return gpt2.eval()


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


def assert_one_line(result, *named):
    """A user's error: status 1, one line that names the values, no traceback."""
    status, out, err = result
    assert status == 1, err
    assert "Traceback" not in out + err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for name in named:
        assert str(name) in err


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
    ours, expected = families.our_weights(old), families.our_weights(theirs)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)


def test_evaluation_only_reports_the_loss_of_the_folders_weights(cli, folder, bpe_set):
    status, out, err = cli(train.main, *QUICK, f"--init_from={folder}", "--eval_only", "--dtype=float32")
    assert status == 0, err
    line = next(line for line in out.splitlines() if "val loss" in line)
    reported = float(line.split("val loss ")[1].split()[0])
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    config = train.parse(train.TrainSettings, QUICK)
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


def test_sampling_with_an_unknown_vocabulary_is_refused(cli, tmp_path):
    random_gpt2(vocab_size=61).save_pretrained(tmp_path / "theirs")
    assert_one_line(cli(sample.main, f"--init_from={tmp_path / 'theirs'}", "--device=cpu"), "tokenizer", 61)


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
    config = transformers.LlamaConfig(
        vocab_size=50257, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    refused(cli, tmp_path / "llama", "llama", "GPT-2")


@pytest.mark.parametrize(
    "change",
    [
        {"activation_function": "relu"},
        {"n_inner": 17},
        {"layer_norm_epsilon": 1e-6},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"tie_word_embeddings": False},
    ],
)
def test_gpt2_with_other_parts_is_refused(cli, folder, change):
    edit_config(folder, **change)
    refused(cli, folder, folder, "architecture", *change)


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
