"""
What is changed and who reads it: the original files, made once by the commands, and the table TARGETS.
"""

import gzip
import json
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import mutators as m
import torch
import torch.distributed.checkpoint as dcp
from conftest import TINY_RUN, train_in
from exports import make_tokenizer, save_run
from safetensors.torch import load_file, save_file

import export
import prepare
import train
import tune
from kqv.files import sha256_of_file
from kqv.formats import sharded

# Commands

LENGTH = ["--max_iters=5", "--eval_interval=1", "--eval_iters=1", "--log_interval=1", "--lr_decay_iters=5"]
CPU = ["--device=cpu", "--dtype=float32", "--compile=False"]
RESUME = ["train", "--init_from=resume", *LENGTH, *CPU]
TUNE = ["tune", "--init_from=resume", "--out_dir=out/tuned", "--reward=reward.py", "--max_iters=3", *CPU[:2]]
FROM_WEIGHTS = ["--out_dir=new", *LENGTH, "--max_iters=2", *CPU]
TEXT = ["--max_new_tokens=4", "--num_samples=1", "--start=keys", "--temperature=0", *CPU]


def readers_of(path):
    """All that a user does with weights, in a file or in a folder."""
    ours = path.startswith("out")
    weights, dataset = (f"--checkpoint={path}", "tiny") if ours else (f"--init_from={path}", "pairs")
    return [
        ["sample", *TEXT, weights],
        ["export", "--to=exported", weights],
        ["export", "--to=exported.gguf", weights],
        ["train", f"--init_from={path}", f"--dataset={dataset}", *FROM_WEIGHTS],
        ["prepare", "text.txt", "--name=new", "--unknown=skip", f"--tokenizer={path}"],
    ]


SET = [
    [*RESUME, "--dataset=tiny"],
    ["train", *TINY_RUN, "--dataset=tiny", "--out_dir=new", *CPU],
    ["sample", "--evaluate=val", *CPU],
    ["prepare", "text.txt", "--name=new", "--tokenizer=data/tiny", "--unknown=skip"],
]
NANOGPT = [
    ["train", *TINY_RUN, "--dataset=nanogpt", "--out_dir=new", *CPU],
    ["prepare", "text.txt", "--name=new", "--tokenizer=data/nanogpt", "--unknown=skip"],
]
CONFIG = [["train", "mine.py", "--dataset=tiny", "--out_dir=new", *CPU]]

# Targets


class Target(NamedTuple):
    path: str  # what is changed: a file, or a folder
    commands: list  # one of them reads it
    mutators: list
    needs: tuple = ()  # what else the commands read
    checked: bool = False  # whether checksums show that a byte was changed


ANY = [m.unchanged, m.change_bytes, m.no_file]
IN_JSON = [m.change_json, m.change_json, m.nest_json, *ANY]
IN_TORCH = [m.change_values, m.change_layout, m.change_pickle_in_zip, m.old_pickle, *ANY]
IN_FOLDER = [m.unchanged, m.change_rest, m.change_metadata, m.change_metadata_pickle, m.change_a_file]
IN_PICKLE = [m.change_pickle, m.change_pickle_values, *ANY]
IN_SAFETENSORS = [m.change_header, m.change_header_length, *ANY]

TEXTS = ("text.txt", "data/tiny")


def of_run(path, mutators, checked=False, commands=()):
    """A checkpoint, in a file or a folder."""
    return Target(path, [*readers_of(path), *commands], mutators, TEXTS, checked)


def of_set(path, mutators):
    return Target(path, SET, mutators, (*TEXTS, "out"))


def of_model(path, mutators, checked=False):
    """A file in a Hugging Face folder."""
    folder = path.partition("/")[0]
    return Target(path, readers_of(folder), mutators, ("text.txt", "data/pairs", folder), checked)


def of_text(path, mutators, checked=False):
    command = ["prepare", path, "--name=new", "--tokenizer=byte", "--workers=1"]
    return Target(path, [command], mutators, checked=checked)


TARGETS = {
    "checkpoint": of_run("out/ckpt.pt", IN_TORCH, True, [RESUME] * 3),
    "sharded": of_run("out/sharded/ckpt.pt", IN_FOLDER, True, [[*RESUME, "--out_dir=out/sharded"]]),
    "adapter": of_run("out/adapter/best.pt", IN_TORCH, True)._replace(needs=(*TEXTS, "base")),
    "tuned": Target("out/tuned/ckpt.pt", [TUNE], IN_TORCH, (*TEXTS, "base", "reward.py"), True),
    "meta.json": of_set("data/tiny/meta.json", IN_JSON),
    "train.bin": of_set("data/tiny/train.bin", ANY),
    "meta.pkl": Target("data/nanogpt/meta.pkl", NANOGPT, IN_PICKLE, ("text.txt", "data/nanogpt")),
    "config.json": of_model("hf/config.json", IN_JSON),
    "tokenizer.json": of_model("hf/tokenizer.json", IN_JSON),
    "tokenizer_config.json": of_model("hf/tokenizer_config.json", IN_JSON),
    "safetensors": of_model("hf/model.safetensors", IN_SAFETENSORS),
    "index": of_model("parts/model.safetensors.index.json", IN_JSON),
    "pytorch_model.bin": of_model("old/pytorch_model.bin", IN_TORCH, checked=True),
    "jsonl": of_text("rows.jsonl", [m.change_rows, *ANY]),
    "json": of_text("rows.json", IN_JSON),
    "csv": of_text("rows.csv", ANY),
    "tsv": of_text("rows.tsv", ANY),
    "txt": of_text("text.txt", ANY),
    "gz": of_text("rows.jsonl.gz", [*ANY, m.bomb], checked=True),
    "parquet": of_text("rows.parquet", ANY),
    "config": Target("mine.py", CONFIG, [m.change_assignments, *ANY], TEXTS),
}

# Originals


def make_originals(folder):
    """All files that TARGETS names, in the working folder `folder`."""
    train_in(folder, "--max_iters=3", *CPU)
    for name in ("best.pt", "ckpt.prev.pt", "metrics.jsonl"):
        Path("out", name).unlink(missing_ok=True)
    shutil.copytree("out", "base")
    adapter = ["--init_from=base", "--lora_rank=2", "--dataset=tiny", "--out_dir=out/adapter", *LENGTH, *CPU]
    train.main(adapter)
    Path("reward.py").write_text(
        "def reward(prompt, completion, answer):\n    return completion.count('k')\n"
    )
    tune.main(
        [
            *TUNE[1:],
            "--init_from=base",
            "--dataset=tiny",
            "--prompts_per_step=2",
            "--prompt_tokens=4",
            "--max_new_tokens=4",
            "--max_iters=2",
        ]
    )
    make_nanogpt_set(Path("data/nanogpt"))
    make_sharded(Path("out/ckpt.pt"), Path("out/sharded/ckpt.pt"))
    make_models()
    make_tables()
    numbers = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "batch_size": 4, "max_iters": 3}
    numbers |= {"gradient_accumulation_steps": 1, "eval_interval": 3, "eval_iters": 1, "learning_rate": 0.01}
    Path("mine.py").write_text("".join(f"{name} = {value!r}\n" for name, value in numbers.items()))


def make_nanogpt_set(folder):
    meta = json.loads(Path("data/tiny/meta.json").read_text("utf-8"))
    chars = dict(enumerate(prepare.token_files.read_meta(Path("data/tiny")).tokenizer.chars))
    folder.mkdir()
    for name in ("train.bin", "val.bin"):
        shutil.copy(Path("data/tiny", name), folder)
    itos = {"vocab_size": meta["vocab_size"], "itos": chars, "stoi": {char: i for i, char in chars.items()}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(itos))


def make_sharded(file, folder):
    """A sharded checkpoint with the contents of one of a file, in one part."""
    contents = torch.load(file, weights_only=True)
    parts = {"model": contents.pop("model"), "optimizer": contents["optimizer"]["state"]}
    dcp.save(parts, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    contents["metadata_sha256"] = sha256_of_file(folder / sharded.METADATA)
    contents.pop("optimizer")
    torch.save(contents, folder / "rest.pt")


def make_models():
    """A model with a byte-pair tokenizer, as a Hugging Face folder: of today, in two parts, and of old."""
    save_run(Path("made"), make_tokenizer("bpe"))
    export.main(["--out_dir=made", "--to=hf"])
    prepare.main(["text.txt", "--name=pairs", "--tokenizer=hf", "--unknown=skip"])
    shutil.rmtree("made")
    weights = load_file("hf/model.safetensors")
    for folder in ("parts", "old"):
        shutil.copytree("hf", folder)
        Path(folder, "model.safetensors").unlink()
    torch.save(weights, "old/pytorch_model.bin")
    names, where = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, Path("parts", file))
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    Path("parts/model.safetensors.index.json").write_text(json.dumps(index))


def make_tables():
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": f"the keys of row {i}, 'values' and é\n"} for i in range(20)]
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    pairs = [{"prompt": f"{i} + {i} =", "completion": str(2 * i)} for i in range(20)]
    messages = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*pairs, *messages * 5]))
    Path("rows.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    Path("rows.json").write_text(json.dumps(rows))
    Path("rows.csv").write_text("number,text\n" + "".join(f'{i},"{i} ""keys"", é\n"\n' for i in range(20)))
    Path("rows.tsv").write_text("".join(f"{pair['prompt']}\t{pair['completion']}\n" for pair in pairs))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
