"""sample.py end to end: the text it prints, from checkpoints that a test trains or writes itself."""

import codecs
import io
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, process_environment, train_in

import sample
import train
from kqv import checkpoint
from kqv.tokenizer import ByteTokenizer, CharTokenizer
from model import GPT, GPTConfig

SEPARATOR = "\n---------------\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run, made once: checkpoints of a small model that has begun to learn."""
    folder = tmp_path_factory.mktemp("trained")
    train_in(folder, "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=30", "--dropout=0.2")
    return folder / "out"


@pytest.fixture
def write(cli, trained):
    """Call sample.py on the trained model, far from its data: write("--start=keys") -> the text."""

    def succeed(*argv):
        status, out, err = cli(
            sample.main, f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=40", *argv
        )
        assert (status, err) == (0, "")
        return out

    return succeed


def saved_gpt(folder, tokenizer, vocab_size, favourite=(), name="ckpt.pt"):
    """A checkpoint in `folder` whose model finds the ids of `favourite` likeliest, whatever came before."""
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": vocab_size, "n_layer": 1, "n_head": 1, "n_embd": 8, "bias": True}
    gpt = GPT(GPTConfig(**shape))
    with torch.no_grad():
        gpt.transformer.ln_f.weight.zero_()
        gpt.transformer.ln_f.bias.fill_(1.0)  # so that the logits are the rows' sums
        gpt.lm_head.weight[list(favourite)] = 5.0
    folder.mkdir(exist_ok=True)
    contents = {
        "model": gpt.state_dict(),
        "model_args": shape,
        "config": {},
        "tokenizer": tokenizer.to_json(),
    }
    checkpoint.save(folder / name, contents)
    return folder


# The text


def test_text_begins_with_the_prompt_and_goes_on(write):
    out = write("--start=keys and ")
    assert out.startswith("keys and ") and out.endswith("\n")
    assert len(out) == len("keys and ") + 40 + 1


def test_the_same_seed_writes_the_same_text(write):
    assert write("--seed=5") == write("--seed=5")
    assert write("--seed=5") != write("--seed=6")


def test_several_samples_are_separated_as_in_nanogpt(write):
    out = write("--num_samples=3", "--start=keys")
    assert out.endswith(SEPARATOR)
    samples = out.removesuffix(SEPARATOR).split(SEPARATOR)
    assert len(set(samples)) == 3
    assert all(text.startswith("keys") and len(text) == 44 for text in samples)


def test_a_single_sample_is_the_text_alone(write):
    assert "---" not in write("--num_samples=1")


def test_temperature_zero_takes_the_likeliest_token(write, trained):
    contents = checkpoint.load(trained / "best.pt")
    gpt = GPT.from_weights(GPTConfig(**contents["model_args"]), contents["model"]).eval()
    tok = checkpoint.tokenizer_of(contents)
    ids = torch.tensor([tok.encode("keys").tolist()])  # (1, T)
    for _ in range(12):  # up to block_size, so that nothing is forgotten
        ids = torch.cat([ids, gpt(ids)[0][:, -1].argmax(dim=-1, keepdim=True)], dim=1)
    assert (
        write("--start=keys", "--temperature=0", "--max_new_tokens=12") == tok.decode(ids[0].tolist()) + "\n"
    )
    assert write("--temperature=0", "--seed=5") == write("--temperature=0", "--seed=6")
    assert write("--top_k=1", "--seed=5") == write("--temperature=0")


def test_streamed_text_is_that_of_a_batch(write):
    alone = write("--start=keys", "--temperature=0")
    assert write("--start=keys", "--temperature=0", "--num_samples=2") == 2 * (alone + SEPARATOR.lstrip("\n"))


def test_text_grows_past_the_context(write):
    assert len(write("--start=keys", "--max_new_tokens=100")) == 4 + 100 + 1  # block_size is 16
    assert write("--max_new_tokens=30", "--seed=5")[:-1] == write("--max_new_tokens=100", "--seed=5")[:31]


def test_no_new_tokens_leave_the_prompt(write):
    assert write("--start=keys", "--max_new_tokens=0") == "keys\n"
    assert write("--start=keys", "--max_new_tokens=0", "--num_samples=2") == 2 * ("keys" + SEPARATOR)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_writes_too(write, dtype):
    assert len(write("--start=keys", f"--dtype={dtype}")) == 45


@pytest.mark.slow  # the compiler takes its time
def test_compiled_text_is_that_of_the_plain_model(write, cli, trained):
    argv = [f"--out_dir={trained}", "--device=cpu", "--max_new_tokens=40"]  # past block_size
    status, out, err = cli(sample.main, *argv, "--compile=True")
    assert status == 0, err  # which may hold the compiler's own warnings
    assert out == write("--compile=False")


# The prompt


def test_prompt_from_a_file(write, tmp_path):
    (tmp_path / "prompt.txt").write_text("tokens, é"[:6] + " é", "utf-8")
    assert write("--start=FILE:prompt.txt").startswith("tokens é")
    assert write(f"--start=FILE:{tmp_path / 'prompt.txt'}") == write("--start=tokens é")


def test_prompt_from_standard_input(write, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("masks é".encode())))
    assert write("--start=-") == write("--start=masks é")


# Which weights


def test_best_newest_or_any_checkpoint(cli, tmp_path):
    tok = CharTokenizer("abc")
    saved_gpt(tmp_path / "out", tok, 3, favourite=[0], name="ckpt.pt")
    saved_gpt(tmp_path / "out", tok, 3, favourite=[1], name="best.pt")
    saved_gpt(tmp_path / "other", tok, 3, favourite=[2], name="any.pt")

    def letter(*argv):
        status, out, err = cli(
            sample.main, "--start=c", "--temperature=0", "--max_new_tokens=3", "--device=cpu", *argv
        )
        assert (status, err) == (0, "")
        return out

    assert letter() == letter("--checkpoint=best") == "cbbb\n"
    assert letter("--checkpoint=newest") == letter("--checkpoint=out/ckpt.pt") == "caaa\n"
    assert letter("--checkpoint=other/any.pt") == letter("--init_from=other/any.pt") == "cccc\n"
    assert letter("--init_from=out", "--out_dir=nowhere") == "cbbb\n"
    (tmp_path / "out/best.pt").unlink()
    assert letter() == letter("--checkpoint=best") == "caaa\n"


def test_nothing_but_the_checkpoint_is_needed(write, tmp_path):
    write("--start=keys")
    assert list(tmp_path.iterdir()) == []


# Ids and characters


@pytest.mark.parametrize("draw", ["--temperature=0", "--temperature=1.5", "--top_k=3", "--top_k=0"])
def test_ids_beyond_the_vocabulary_are_never_written(cli, tmp_path, draw):
    chars = "".join(map(chr, range(0x4E00, 0x4E00 + 1100)))
    assert train.padded(len(chars)) == 1152
    saved_gpt(tmp_path / "out", CharTokenizer(chars), 1152, favourite=range(1100, 1152))
    for samples in (1, 2):
        argv = [
            f"--start={chars[:5]}",
            f"--num_samples={samples}",
            "--max_new_tokens=30",
            "--device=cpu",
            draw,
        ]
        status, out, err = cli(sample.main, *argv)
        assert (status, err) == (0, "")
        assert set(out) - set(chars) <= set(SEPARATOR)
        assert len(out.replace(SEPARATOR, "").strip()) == samples * 35


@pytest.fixture
def write_ids(cli, tmp_path, monkeypatch):
    """Call sample.py with a byte model that draws the given ids: write_ids(b"abc") -> the text."""
    saved_gpt(tmp_path / "out", ByteTokenizer(), 257)

    def succeed(ids, *argv):
        def stream(self, idx, max_new_tokens, **options):
            return (torch.tensor([[token]] * len(idx)) for token in ids)

        monkeypatch.setattr(GPT, "stream", stream)
        status, out, err = cli(sample.main, "--start=>", "--device=cpu", *argv)
        assert (status, err) == (0, "")
        return out

    return succeed


TEXTS = {
    "characters of one to four bytes": "aé€😀".encode(),
    "a stray byte": b"a\xffb",
    "a character that is cut off": "aé".encode()[:-1],
    "a character broken by another": b"\xe2\x82A\xc3\xc3\xa9",
    "an end of text": [97, 256, 98],
}


@pytest.mark.parametrize("ids", TEXTS.values(), ids=TEXTS.keys())
def test_streamed_bytes_become_the_text_of_all_bytes(write_ids, ids):
    expected = ">" + bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
    assert write_ids(ids) == expected + "\n"
    assert write_ids(ids, "--num_samples=2") == 2 * (expected + SEPARATOR)


def test_a_token_is_shown_before_the_next_is_drawn_and_a_character_when_it_is_whole(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stdout", written)
    seen = []

    def ids():
        for token in "é!😀".encode():
            yield token
            seen.append(written.getvalue())

    sample.print_stream("<", ids(), ByteTokenizer())
    assert seen == ["<", "<é", "<é!", "<é!", "<é!", "<é!", "<é!😀"]
    assert written.getvalue() == "<é!😀\n"


def test_text_goes_out_on_a_terminal_of_another_encoding(cli, trained):
    environment = process_environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        f"--out_dir={trained}",
        "--start=é",
        "--max_new_tokens=3",
    ]
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    codecs.decode(done.stdout, "ascii")


# A reader that leaves


def test_a_reader_that_leaves_ends_the_text_quietly(trained, tmp_path):
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={trained}", "--max_new_tokens=100000"]
    ours, theirs = os.pipe()
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=theirs, stderr=subprocess.PIPE, env=process_environment()
    )
    os.close(theirs)
    assert len(os.read(ours, 5)) > 0
    os.close(ours)  # as `| head` does
    _, err = process.communicate(timeout=60)
    assert err == b""
    assert process.returncode == 1


def test_the_text_of_a_process_is_that_of_main(write, trained, tmp_path):
    command = [
        sys.executable,
        str(ROOT / "sample.py"),
        f"--out_dir={trained}",
        "--device=cpu",
        "--max_new_tokens=40",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=process_environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (write(), "")
