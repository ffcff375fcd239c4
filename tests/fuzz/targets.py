"""
What is changed and who reads it: the original files, made once by the commands themselves, and the table TARGETS.
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
from kqv.files import sha256_of_file
from kqv.formats import sharded

# Commands

LENGTH = ["--max_iters=5", "--eval_interval=1", "--eval_iters=1", "--log_interval=1", "--lr_decay_iters=5"]
CPU = ["--device=cpu", "--dtype=float32", "--compile=False"]
RESUME = ["train", "--init_from=resume", *LENGTH, *CPU]
TEXT = ["--max_new_tokens=4", "--num_samples=1", "--start=keys", "--temperature=0", *CPU]


def readers_of(path):
    """All that a user does with weights, in a file or in a folder."""
    ours = path.startswith("out")
    weights, dataset = (f"--checkpoint={path}", "tiny") if ours else (f"--init_from={path}", "pairs")
    return [
        ["sample", *TEXT, weights],
        ["export", "--to=exported", weights],
        ["export", "--to=exported.gguf", weights],
        ["train", f"--init_from={path}", f"--dataset={dataset}", "--out_dir=new", *LENGTH, "--max_iters=2", *CPU],
        ["prepare", "text.txt", "--name=new", "--unknown=skip", f"--tokenizer={path}"],
    ]


RUN = [*readers_of("out/ckpt.pt"), RESUME, RESUME, RESUME]
SET = [
    [*RESUME, "--dataset=tiny"],
    ["train", *TINY_RUN, "--dataset=tiny", "--out_dir=new", *CPU],
    ["sample", *TEXT, "--evaluate=val"],
    ["prepare", "text.txt", "--name=new", "--tokenizer=data/tiny", "--unknown=skip"],
]
NANOGPT = [
    ["train", *TINY_RUN, "--dataset=nanogpt", "--out_dir=new", *CPU],
    ["prepare", "text.txt", "--name=new", "--tokenizer=data/nanogpt", "--unknown=skip"],
]


def prepare_from(name):
    return [["prepare", name, "--name=new", "--tokenizer=byte", "--workers=1"]]


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
IN_SAFETENSORS = [m.change_header, m.change_header_length, *ANY]

TEXTS, RUN_NEEDS = ("text.txt", "data/tiny"), ("text.txt", "data/tiny", "out")
TARGETS = {
    "checkpoint": Target("out/ckpt.pt", RUN, [*IN_TORCH, m.change_values, m.change_layout], TEXTS, checked=True),
    "sharded": Target("out/sharded/ckpt.pt", [*readers_of("out/sharded/ckpt.pt"), [*RESUME, "--out_dir=out/sharded"]],
                      IN_FOLDER, TEXTS, checked=True),
    "meta.json": Target("data/tiny/meta.json", SET, IN_JSON, RUN_NEEDS),
    "train.bin": Target("data/tiny/train.bin", SET, ANY, RUN_NEEDS),
    "meta.pkl": Target("data/nanogpt/meta.pkl", NANOGPT, [m.change_pickle, m.change_pickle_values, *ANY],
                       ("text.txt", "data/nanogpt")),
    "config.json": Target("hf/config.json", readers_of("hf"), IN_JSON, ("text.txt", "data/pairs", "hf")),
    "tokenizer.json": Target("hf/tokenizer.json", readers_of("hf"), IN_JSON, ("text.txt", "data/pairs", "hf")),
    "tokenizer_config.json": Target("hf/tokenizer_config.json", readers_of("hf"), IN_JSON, ("text.txt", "data/pairs", "hf")),
    "safetensors": Target("hf/model.safetensors", readers_of("hf"), IN_SAFETENSORS, ("text.txt", "data/pairs", "hf")),
    "index": Target("parts/model.safetensors.index.json", readers_of("parts"), IN_JSON, ("text.txt", "data/pairs", "parts")),
    "pytorch_model.bin": Target("old/pytorch_model.bin", readers_of("old"), IN_TORCH, ("text.txt", "data/pairs", "old"), checked=True),
    "jsonl": Target("rows.jsonl", prepare_from("rows.jsonl"), [m.change_rows, *ANY]),
    "json": Target("rows.json", prepare_from("rows.json"), IN_JSON),
    "csv": Target("rows.csv", prepare_from("rows.csv"), ANY),
    "tsv": Target("rows.tsv", prepare_from("rows.tsv"), ANY),
    "txt": Target("text.txt", prepare_from("text.txt"), ANY),
    "gz": Target("rows.jsonl.gz", prepare_from("rows.jsonl.gz"), [*ANY, m.bomb], checked=True),
    "parquet": Target("rows.parquet", prepare_from("rows.parquet"), ANY),
    "config file": Target("mine.py", CONFIG, [m.change_assignments, *ANY], TEXTS),
}  # fmt: skip

# Originals


def make_originals(folder):
    """All files that TARGETS names, in the working folder `folder`."""
    train_in(folder, "--max_iters=3", *CPU)
    for name in ("best.pt", "ckpt.prev.pt", "metrics.jsonl"):
        Path("out", name).unlink(missing_ok=True)
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
