"""
What can be wrong with a file: functions (path, random), each changes the file at `path` in place.

A mutator that returns a function has changed how values are stored, not the values: that function writes the
same values plainly to `path`, and a program must refuse the one or read it as the other.
"""

import copy
import gzip
import io
import json
import math
import os
import pickle
import zipfile

import torch

from kqv.files import sha256_of_file
from kqv.formats import sharded


def unchanged(path, random):
    """What must be read."""


# Bytes


def flip(data, random):
    for _ in range(random.choice([1, 1, 1, 8])):
        at = random.randrange(len(data))
        data[at] ^= 1 << random.randrange(8)


def cut(data, random):
    del data[random.choice([0, 1, random.randrange(len(data)), len(data) - 1]) :]


def overwrite(data, random):
    at, length = random.randrange(len(data)), random.choice([1, 4, 8, 64])
    fill = random.choice([b"\0", b"\xff", b"9", b"[", b'"', b"(", random.randbytes(length)])
    data[at : at + length] = (fill * length)[:length]


def repeat(data, random):
    start = random.randrange(len(data))
    data[start:start] = data[start : start + random.choice([1, 16, 1000])] * random.choice([1, 2, 50])


def insert(data, random):
    at = random.randrange(len(data))
    data[at:at] = random.choice(SNIPPETS)


SNIPPETS = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\x1b[2J\x07", "\u202e".encode(), b'"', b"'''", b",,,,",
    b"\t\t",    b"\n\n", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"1e999", b"NaN",
    b"-Infinity", b"x" * 3_000_000,
]  # fmt: skip


def change_bytes(path, random):
    data = bytearray(path.read_bytes())
    random.choice([flip, flip, cut, overwrite, repeat, insert])(data, random)
    path.write_bytes(data)


# Trees of values: JSON, settings, what is in a pickle


def laughs(depth=50, make=list):
    """Shared lists in shared lists: small in memory, without end when printed, compared or copied."""
    value = make(["ha"])
    for _ in range(depth):
        value = make([value, value])
    return value


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


HOSTILE = [  # in JSON and elsewhere
    None, True, False, 0, 1, -1, 2, 7, 0.5, 1.5, -0.0, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 1e308,
    math.nan, math.inf, -math.inf, "", "x", "0", "nan", "\x00", "\x1b]0;owned\x07", "\u202egnp", "\ud800",
    "é" * 300, "../../../etc/passwd", "/dev/zero", "a\nb",
    "[click](javascript:alert(1))", "x" * 100_000, [], {}, [[]],
    [None], [1, 2, 3], {"": None}, {"a": {"b": 1}}, "float32", "gpt2", "char", "bpe", "chat", "foreign",
]  # fmt: skip
UNPRINTABLE = [  # that only a pickle can hold
    b"bytes", (), (1, 2), {1: 2}, {None: None}, {(): 1}, {1.5, "set"}, 1j, bytearray(8), 10**5000,
    laughs(), laughs(make=tuple), {"a": laughs()}, range(3), torch.float16, torch.Size([2, 3]),
]  # fmt: skip
TENSORS = [
    lambda: torch.tensor(3), lambda: torch.tensor(math.nan),
    lambda: torch.zeros(0), lambda: torch.zeros(2, 2),
    lambda: torch.tensor(True), lambda: torch.zeros(1).expand(10**9), lambda: torch.zeros(3, device="meta"),
]  # fmt: skip


def entries_of(value):
    """The container of a value's parts and their keys; dataclasses have fields."""
    if isinstance(value, dict):
        return value, [*value]
    if isinstance(value, list):
        return value, [*range(len(value))]
    if hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, type)):
        return vars(value), [*vars(value)]
    return None, []


def place_in(tree, random):
    """(container, key) somewhere in the tree: near the top as often as deep in it."""
    container, keys = entries_of(tree)
    while True:
        key = random.choice(keys)
        inner, inner_keys = entries_of(container[key])
        if not inner_keys or random.random() < 0.35:
            return container, key
        container, keys = inner, inner_keys


def change_tree(tree, random, values=HOSTILE):
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        container, key = place_in(tree, random)
        how = random.randrange(8)
        if how == 0:
            del container[key]
        elif how == 1 and isinstance(container, dict):
            container[random.choice([f"{key}.", "", "x" * 1000, "\x1b[2J", "\ud800", 0])] = container.pop(key)
        elif how == 2:
            other, name = place_in(tree, random)
            container[key] = copy.copy(other[name])
        elif how == 3 and isinstance(container[key], (list, str)):
            container[key] = container[key] * random.choice([0, 2, 1000])
        elif how == 4 and type(container[key]) in (int, float):
            container[key] += random.choice([-1, 1, 0.5, 1000, 10**6])
        else:
            value = random.choice(values)
            container[key] = value() if callable(value) else copy.copy(value)
        if not entries_of(tree)[1]:
            return


def change_json(path, random):
    """Values in a JSON file, and what json.dumps does not write: numbers of many digits, keys twice."""
    tree = json.loads(path.read_text("utf-8"))
    if entries_of(tree)[1]:
        change_tree(tree, random)
    text = json.dumps(tree)
    if random.random() < 0.1:
        container, key = place_in(json.loads(text), random)
        text = text.replace(json.dumps(key), random.choice(["9" * 5000, "1e9999", '"a": 1, "a"']), 1)
    path.write_text(text, "utf-8")


def nest_json(path, random):
    depth = random.choice([500, 5000, 200_000])
    path.write_text(random.choice(["[" * depth, "[" * depth + "]" * depth, '{"model":' * depth]), "utf-8")


def change_rows(path, random):
    """One of a .jsonl file's objects."""
    lines = path.read_text("utf-8").splitlines()
    number = random.randrange(len(lines))
    tree = json.loads(lines[number])
    change_tree(tree, random)
    lines[number] = json.dumps(tree)
    path.write_text("\n".join(lines), "utf-8")


# Tensors


def layout_of(tensor, random):
    """The tensor stored in another way, or of another kind."""
    kinds = [
        lambda t: t[:1].expand_as(t) if t.dim() else t,
        lambda t: torch.zeros(1, dtype=t.dtype).expand(t.shape),
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
        lambda t: torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape),
        lambda t: torch.stack([t, t + 1], -1)[..., 0],
        lambda t: torch.zeros(t.numel() + 1, dtype=t.dtype).as_strided(t.shape, [1] * t.dim()),
        lambda t: t.to_sparse(),
        lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(),
        lambda t: t.to("meta"),
        lambda t: t.to(random.choice([torch.complex64, torch.complex128])),
        lambda t: torch.conj(t.to(torch.complex64)),
        lambda t: torch._neg_view(t),
        lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        lambda t: t.to(random.choice([torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn])),
        lambda t: t.to(random.choice([torch.int8, torch.int64, torch.uint8, torch.bool])),
        lambda t: t.flatten(),
        lambda t: t[None],
        lambda t: t[:0] if t.dim() else t,
        lambda t: t * random.choice([math.nan, math.inf, -1, 1e30]),
        lambda t: t.float().clone().requires_grad_(),
        lambda t: torch.nn.Parameter(t.float().clone()),
        lambda t: torch.nested.nested_tensor([t.float(), t.float()]) if t.dim() else t,
    ]  # fmt: skip
    return random.choice(random.choice([kinds, kinds[:6]]))(tensor)  # the first keep shape and type


def tensors_in(tree):
    """(container, key) of each tensor in a tree."""
    container, keys = entries_of(tree)
    for key in keys:
        if isinstance(container[key], torch.Tensor):
            yield container, key
        else:
            yield from tensors_in(container[key])


def plain(tensor):
    """A dense tensor's values, stored plainly."""
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def change_layout(path, random):
    tree = torch.load(path, weights_only=True)
    found = [*tensors_in(tree)]
    for container, key in random.sample(found, min(len(found), random.choice([1, 1, 2, 5]))):
        if random.random() < 0.15:  # two tensors in one storage
            others = [other[name] for other, name in found if other[name].shape == container[key].shape]
            container[key] = random.choice(others)
        else:
            container[key] = layout_of(container[key], random)
    torch.save(tree, path)
    if all(t.layout == torch.strided and not t.is_nested and not t.is_meta and not t.is_quantized for t in
           (container[key] for container, key in tensors_in(tree))):  # fmt: skip

        def rewrite(path):
            twin = torch.load(path, weights_only=True)
            for container, key in tensors_in(twin):
                container[key] = plain(container[key])
            torch.save(twin, path)

        return rewrite


def change_values(path, random):
    tree = torch.load(path, weights_only=True)
    change_tree(tree, random, [*HOSTILE, *UNPRINTABLE, *TENSORS])
    torch.save(tree, path)


# Pickles


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile_pickle(random, original):
    """A pickle that wants to run code, or whose reading never ends; or a real one with some bytes changed."""
    tower = b")" + b"q\x00h\x00\x86" * 60  # ((), ()), and so on, each twice in the next
    code = "import pathlib; pathlib.Path('ran').touch()"
    damaged = bytearray(original)
    random.choice([flip, overwrite, repeat, cut])(damaged, random)
    opcodes = bytearray(original)
    at = random.randrange(2, len(opcodes))
    opcodes[at:at] = random.choice(
        [b"R", b"b", b"o", b"0", b"2", b"Q", b"}", b"(", b"s", b"u", b"e", b"\x81", b"\x93"]
    )
    return random.choice(
        [
            lambda: pickle.dumps(Call(os.system, "touch ran")),
            lambda: pickle.dumps({"model": Call(exec, code), "itos": Call(eval, f"exec({code!r})")}),
            lambda: pickle.dumps(Call(getattr, Call(__import__, "os"), "system")),
            lambda: pickle.dumps(Call(torch.load, "text.txt")),
            lambda: pickle.dumps({"itos": Call(torch._utils._rebuild_tensor_v2, 1, 2, 3, 4, 5, 6)}),
            lambda: b"\x80\x02}" + tower + b"K\x01s.",
            lambda: b"\x80\x02}X\x05\x00\x00\x00model" + tower + b"s.",
            lambda: b"\x80\x04\x8f(" + tower + b"\x90.",
            lambda: b"\x80\x04(" + tower + b"\x91.",
            lambda: b"\x80\x02" + b"(l" * 200_000 + b".",
            lambda: b"\x80\x02" + b"]" + b"]a" * 10 + b"}" * 100_000 + b".",
            lambda: b"I" + b"9" * 200_000 + b"\n.",
            lambda: b"L" + b"9" * 200_000 + b"L\n.",
            lambda: b"\x80\x02\x8b\xff\xff\xff\x7f.",
            lambda: b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
            lambda: b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
            lambda: b"\x80\x04r\xff\xff\xff\x7fN.",
            lambda: b"\x80\x02]r\xff\xff\xff\x7f.",
            lambda: b"\x80\x02K\x01Q.",
            lambda: b"\x80\x02]q\x00h\x00a.",
            lambda: b"\x80\x02}q\x00X\x04\x00\x00\x00itosh\x00s.",
            lambda: pickle.dumps({"itos": laughs(), "model": laughs(), "model_args": {"n_layer": laughs()}}),
            lambda: pickle.dumps({"itos": {i: "\x1b[2J" for i in range(9)}}),
            lambda: bytes(damaged),
            lambda: bytes(opcodes),
        ]  # fmt: skip
    )()


def change_pickle(path, random):
    path.write_bytes(hostile_pickle(random, path.read_bytes()))


def change_pickle_values(path, random):
    tree = pickle.loads(path.read_bytes())
    change_tree(tree, random, [*HOSTILE, *UNPRINTABLE])
    path.write_bytes(pickle.dumps(tree))


def change_pickle_in_zip(path, random):
    """Of a file that torch.save wrote; each record's checksum is right again."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    records[name] = hostile_pickle(random, records[name])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def old_pickle(path, random):
    """A pickle alone, as old versions of torch wrote, in the place of a checkpoint."""
    contents = io.BytesIO()
    torch.save({"model": {}}, contents, _use_new_zipfile_serialization=False)
    path.write_bytes(hostile_pickle(random, contents.getvalue()))


# A sharded checkpoint's folder


def sign(folder):
    """Let rest.pt name the .metadata that is there."""
    rest = torch.load(folder / "rest.pt", weights_only=True)
    rest["metadata_sha256"] = sha256_of_file(folder / sharded.METADATA)
    torch.save(rest, folder / "rest.pt")


def change_metadata(folder, random):
    path = folder / sharded.METADATA
    tree = pickle.loads(path.read_bytes())
    change_tree(tree, random, [*HOSTILE, *UNPRINTABLE])
    path.write_bytes(pickle.dumps(tree))
    sign(folder)


def change_metadata_pickle(folder, random):
    change_pickle(folder / sharded.METADATA, random)
    sign(folder)


def change_rest(folder, random):
    random.choice([change_values, change_layout, change_pickle_in_zip])(folder / "rest.pt", random)


def change_a_file(folder, random):
    change_bytes(random.choice(sorted(path for path in folder.iterdir() if path.is_file())), random)


# safetensors


def change_header(path, random):
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change_tree(header, random)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def change_header_length(path, random):
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    length = random.choice([0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1, len(data)])
    path.write_bytes(length.to_bytes(8, "little") + data[8:])


# Compressed text


def bomb(path, random):
    """One line of many megabytes, in a file of some hundred kilobytes."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(random.choice([b'{"text": "', b"a\tb", b"text\n", b""]))
        for _ in range(random.choice([100, 400])):
            file.write(random.choice([b"a", b" ", b"\0", b"["]) * 2**20)


# A folder with an entry that is no file


def no_file(path, random):
    path.unlink()
    kind = random.randrange(5)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(path.name)
    elif kind == 3:
        path.symlink_to(random.choice(["/dev/zero", "/dev/null", "/dev/tty", "/proc/self/mem", "/dev/stdin"]))
    else:
        path.symlink_to("nowhere")


def change_assignments(path, random):
    """Lines `name = value` of a config file."""
    lines = path.read_text("utf-8").splitlines()
    for _ in range(random.choice([1, 2])):
        number = random.randrange(len(lines))
        value = random.choice([*HOSTILE, *UNPRINTABLE[:8]])
        lines[number] = f"{lines[number].partition('=')[0]}= {value!r}"
    path.write_text("\n".join(lines), "utf-8", "surrogatepass")
