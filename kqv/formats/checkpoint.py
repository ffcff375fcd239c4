"""
Checkpoints on disk: saved atomically and without stalling, loaded without running any code that is in them.
"""

import os
import shutil
import threading
import time
import warnings
import zipfile
from pathlib import Path

import torch

from kqv import dataset, distributed, huggingface, tokenizer
from kqv.errors import UserError, first_line, warn

NEWEST = "ckpt.pt"
PREVIOUS = "ckpt.prev.pt"
BEST = "best.pt"
REST = "rest.pt"  # in a folder that a sharded model's checkpoint is: see kqv/sharded.py
ONLY_TO_TRAIN = ("optimizer", "scaler")  # what best.pt leaves out


def save(path, contents):
    """
    Write `contents` (tensors and plain values) beside `path`, then rename: a crash at any byte leaves a file
    that is whole. ckpt.pt's predecessor stays as ckpt.prev.pt. torch.save stores a CRC-32 of every record,
    which `load` checks.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.new")
    try:
        with open(beside, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def put_in_place(beside, path):
    """Rename `beside`, a whole file or folder, to `path`; ckpt.pt's predecessor stays as ckpt.prev.pt."""
    earlier = path.with_name(PREVIOUS if path.name == NEWEST else f".{path.name}.old")
    if path.exists() and (path.name == NEWEST or path.is_dir() or beside.is_dir()):
        remove(earlier)
        os.replace(path, earlier)
    os.replace(beside, path)
    sync_folder(path.parent)
    if earlier.name != PREVIOUS:
        remove(earlier)


def remove(path):
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_folder(folder):
    """Make renames in a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Saver:
    """Saves a run as it goes on: the run waits for a copy in host memory, and a thread writes that."""

    def __init__(self, out_dir, is_new_run):
        self.out_dir = Path(out_dir)
        self.older = (PREVIOUS, BEST) if is_new_run else ()  # what another run may have left here
        self.copies = {}  # (address, shape, type) of a tensor -> its copy, used again at the next save
        self.thread = None

    def save(self, contents, best):
        """Copy `contents`, begin to write ckpt.pt (and best.pt); returns the seconds the caller waited."""
        before = time.perf_counter()
        self.wait()
        copy = self.stage(contents)
        if any(tensor.is_pinned() for tensor in self.copies.values()):
            torch.cuda.synchronize()
        files = {NEWEST: copy}
        if best:
            files[BEST] = {name: value for name, value in copy.items() if name not in ONLY_TO_TRAIN}
        self.thread = threading.Thread(target=self.write, args=(files,))
        self.thread.start()
        return time.perf_counter() - before

    def stage(self, contents):
        """What to write, so that training may go on."""
        return self.copy(contents)

    def copy(self, value):
        """A copy in host memory; tensors that share memory (tied weights) share it there too."""
        if isinstance(value, dict):
            return {name: self.copy(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copy(part) for part in value)
        if not isinstance(value, torch.Tensor):
            return value
        key = (value.data_ptr(), value.shape, value.dtype)
        if key not in self.copies:
            self.copies[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self.copies[key].copy_(value, non_blocking=True)

    def write(self, files):
        for name, contents in files.items():
            try:
                self.save_file(self.out_dir / name, contents)
                self.forget_older_run()
            except (OSError, RuntimeError) as error:  # RuntimeError: torch's writer, when the disk is full
                reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
                warn(f"{self.out_dir / name} can't be saved ({reason}): training goes on, the last one stays")

    def save_file(self, path, contents):
        save(path, contents)

    def forget_older_run(self):
        for name in self.older:
            remove(self.out_dir / name)
        self.older = ()

    def wait(self):
        """Until what is being written is on disk."""
        if self.thread:
            self.thread.join()
            self.thread = None


def saver(out_dir, is_new_run, world, is_sharded):
    """The Saver for this process; None where it has nothing to save."""
    if is_sharded:
        from kqv.sharded import ShardedSaver  # which takes half a second to import

        return ShardedSaver(out_dir, is_new_run, world)
    return Saver(out_dir, is_new_run) if world.is_main else None


def load(path, mapped=False):
    """
    A checkpoint of kqv or nanoGPT as a dict on the CPU: `model`, `model_args`, `config`, and more as it was
    saved. Of a sharded model's, `model` is whole, and `folder` stands for the `optimizer` that is in parts.
    `mapped`: of a file, only what is used takes memory.

    Only tensors and plain values are read (`weights_only`). Where ckpt.pt is torn or missing and its
    predecessor is whole, that one is returned, with a warning. Raises UserError for a file that is anything
    else.
    """
    path = Path(path)
    try:
        return load_file(path, mapped)
    except UserError as error:
        previous = path.with_name(PREVIOUS)
        if path.name != NEWEST or not previous.exists():
            raise
        contents = load_file(previous, mapped)
        warn(f"{error}; using {previous}, of step {contents.get('iter_num', 'unknown')}")
        return contents


def load_file(path, mapped):
    if (path / REST).is_file():
        contents = load_folder(path)
    else:
        contents = read(path, mapped)
    if not is_checkpoint(contents):
        raise UserError(
            f"{path} is of another program: a checkpoint of kqv or nanoGPT has `model` and `model_args`"
        )
    contents["model"] = plain_names(contents["model"])
    return contents


def load_folder(path):
    """The contents of a sharded model's checkpoint. Raises UserError."""
    from kqv import sharded

    return {**sharded.load_rest(path, read), "model": sharded.load_whole(path, "model"), "folder": path}


def read(path, mapped=False):
    """What torch.save wrote into a file, with its checksums checked. Raises UserError."""
    try:
        path.open("rb").close()  # what the system refuses is no damage to the file
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train one, or name another with --out_dir") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name it as --out_dir, or a file with --checkpoint") from None
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if torn := archive.testzip():
                    raise UserError(f"{path} is damaged: the checksum of its record {torn} is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch has some to say of foreign pickles
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and is_zip)
    except UserError:
        raise
    except Exception as error:  # a torn or foreign file raises nearly anything
        raise UserError(
            f"{path} is damaged or not a checkpoint of kqv or nanoGPT: {first_line(error)}"
        ) from None


def load_optimizer(optimizer, saved):
    """
    AdamW's state for the optimizer's parameters, from the contents of a checkpoint: where they are sharded,
    each process takes its part. Raises ValueError or UserError where it does not fit.
    """
    if "folder" in saved:
        from kqv import sharded

        return sharded.load_moments(optimizer, saved["folder"])
    settings = optimizer.state_dict()["param_groups"]  # the run's own, not the checkpoint's
    moments = {number: dict(state) for number, state in saved["optimizer"]["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for name in ("exp_avg", "exp_avg_sq"):
            if moments[number][name].shape != parameter.shape:  # the fused kernel trusts these shapes
                raise ValueError(f"{name} of parameter {number} has another shape than the parameter")
            moments[number][name] = distributed.shard_like(parameter, moments[number][name])
    optimizer.load_state_dict({"state": moments, "param_groups": settings})


def is_checkpoint(contents):
    """Whether a loaded object has a checkpoint's form; whether its weights fit is for the model to say."""
    if not isinstance(contents, dict):
        return False
    parts = (contents.get("model"), contents.get("model_args"), contents.get("config", {}))
    return all(isinstance(part, dict) for part in parts) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in parts[0].items()
    )


def plain_names(weights):
    """
    Weights under the model's own names: without torch.compile's prefix and old nanoGPT's causal-mask buffers.
    """
    names = {name: name.removeprefix("_orig_mod.") for name in weights}
    return {plain: weights[name] for name, plain in names.items() if not plain.endswith(".attn.bias")}


def find(out_dir, which):
    """
    The path of a run's "best" or "newest" checkpoint (best falls back to newest), or of a file that `which`
    names.
    """
    if which not in ("best", "newest"):
        return Path(which)
    best, newest = Path(out_dir) / BEST, Path(out_dir) / NEWEST
    return best if which == "best" and best.exists() else newest


def chosen(config):
    """(name, contents) of the weights that the settings `init_from`, or `out_dir` and `checkpoint`, name."""
    if config.init_from != "resume":
        return config.init_from, load_start(config.init_from)
    path = find(config.out_dir, config.checkpoint)
    return path, load(path)


def load_start(source):
    """
    Weights to start from, in the form of a checkpoint: from `source`, a checkpoint file, a run's folder (its
    best), a Hugging Face folder with GPT-2's architecture, or a model on the Hugging Face hub: gpt2,
    gpt2-medium, gpt2-large, gpt2-xl or ORG/NAME. Raises UserError where it is none.
    """
    path = Path(source)
    on_hub = source in huggingface.NAMES or (huggingface.HUB_ID.fullmatch(source) and not path.exists())
    if on_hub or (path / "config.json").exists():
        return huggingface.load(source)
    if not path.exists():
        known = ", ".join(("scratch", "resume", *huggingface.NAMES))
        raise UserError(f"init_from={source} is no file or folder, nor one of {known}")
    return load(find(path, "best") if path.is_dir() and not (path / REST).exists() else path)


def tokenizer_of(contents):
    """
    A checkpoint's own tokenizer; for nanoGPT's, which carry none, that of the data folder it was trained on.
    """
    definition = contents.get("tokenizer")
    if isinstance(definition, dict) and definition.get("kind") == "foreign":  # of a Hugging Face folder
        raise UserError(f"{definition['why']}: use a model with a byte-level BPE, as GPT-2's")
    if "tokenizer" in contents:
        return tokenizer.from_json(definition)
    folder = Path("data") / str(contents.get("config", {}).get("dataset", "unnamed"))
    if any((folder / name).exists() for name in ("meta.json", "meta.pkl")):
        return dataset.read_meta(folder)[0]
    vocab_size = contents["model_args"].get("vocab_size")
    if vocab_size in (50257, 50304):
        return tokenizer.GPT2Tokenizer()
    raise UserError(
        f"the checkpoint has no tokenizer, nor has {folder} for its {vocab_size} ids: put its meta.pkl there"
    )
