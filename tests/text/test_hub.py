"""Sets of the Hugging Face hub."""

import json
import sys
from pathlib import Path

import pytest
from conftest import script

import prepare
from kqv.text import built_in
from kqv.text.dataset import SPLITS, Dataset


def all_ids(name, split):
    return Dataset(Path("data", name).resolve()).splits[split][:].tolist()


TEXTS = [f"text {number} of the hub\n" for number in range(60)]


CHATS = [[{"role": r, "content": f"{r} {n}"} for r in ("user", "assistant")] for n in range(60)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(name, column, values) makes a folder like a set on the hub; none of this needs the network."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def make(name, column, values):
        folder = tmp_path / Path(name).stem
        folder.mkdir()
        rows = [{"id": number, column: value} for number, value in enumerate(values)]
        if name.endswith(".parquet"):
            pa = pytest.importorskip("pyarrow")
            pq = pytest.importorskip("pyarrow.parquet")
            pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
        else:
            Path(folder, "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("column, values", [("text", TEXTS), ("messages", CHATS)])
def test_a_set_of_the_hub_is_prepared_like_a_file(kind, column, values, hub, cli, tmp_path):
    folder = hub(f"theirs.{kind}", column, values)
    status, out, err = cli(prepare.main, f"hf:{folder}", "--tokenizer=byte")
    assert (status, err) == (0, "") and "data/theirs_byte: " in out and "of 60 " in out
    file = next(folder.iterdir())
    assert cli(prepare.main, file, "--name=file", "--tokenizer=byte")[0] == 0
    for split in SPLITS:
        assert all_ids("theirs_byte", split) == all_ids("file", split)
    assert "is ready" in cli(prepare.main, f"hf:{folder}", "--tokenizer=byte")[1]


def test_a_folder_like_a_set_of_the_hub_is_compared(hub, cli):
    folder = hub("theirs.jsonl", "body", TEXTS)
    assert cli(prepare.main, f"hf:{folder}", "--text_column=body")[0] == 0
    with open(folder / "train.jsonl", "a") as file:
        file.write(json.dumps({"id": 60, "body": "one text more of the hub\n"}) + "\n")
    status, out, _ = cli(prepare.main, f"hf:{folder}", "--text_column=body")
    assert status == 0 and "is ready" not in out and "of 61 documents" in out


def test_a_row_of_the_hub_that_can_not_be_used_is_named(hub, refusal):
    folder = hub("theirs.jsonl", "body", TEXTS)
    line = refusal(prepare.main, f"hf:{folder}")
    assert f"hf:{folder}, row 1 has no column 'text'" in line and "--text_column=" in line


def test_a_folder_of_the_hub_that_is_damaged_is_one_line(hub, refusal):
    folder = hub("theirs.jsonl", "text", TEXTS)
    Path(folder, "train.jsonl").write_text('{"text": "a"}\n{"text": "\\ud83d"}\n')
    line = refusal(prepare.main, "hf:theirs")
    assert "error: cannot read theirs" in line and "surrogate" in line


def test_a_hub_out_of_reach_is_one_line(tmp_path):
    pytest.importorskip("datasets")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = script("prepare.py", "hf:no/such-set", cwd=tmp_path, **environment)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "error: cannot read no/such-set from the Hugging Face hub" in done.stderr
    assert "in reach" in done.stderr and "hf:FOLDER" in done.stderr and not Path(tmp_path, "data").exists()


def test_without_datasets_the_line_says_what_to_install(refusal, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(prepare.main, "tinystories") == (
        "error: reading hf:roneneldan/TinyStories needs: pip install datasets\n"
    )


RECIPES = {
    "openwebtext": ("hf:Skylion007/openwebtext", 0.0005),
    "fineweb_edu": ("hf:HuggingFaceFW/fineweb-edu:sample-10BT", 0.001),
    "tinystories": ("hf:roneneldan/TinyStories", 0.01),
}


def test_recipes_of_the_hub_name_their_sets():
    on_hub = {name: found for name, found in built_in.BUILT_IN.items() if isinstance(found.documents, str)}
    assert {
        name: (found.documents, found.settings["val_fraction"]) for name, found in on_hub.items()
    } == RECIPES
    assert {found.settings["tokenizer"] for found in on_hub.values()} == {"gpt2"}


def test_a_recipe_of_the_hub_is_prepared_with_its_settings(hub, cli, monkeypatch):
    folder = hub("theirs.jsonl", "text", [f"story {number}\n" for number in range(3000)])
    found = built_in.BUILT_IN["tinystories"]._replace(documents=f"hf:{folder}")
    monkeypatch.setitem(built_in.BUILT_IN, "tinystories", found)
    status, out, err = cli(prepare.main, "tinystories")
    if "package index" in err:
        pytest.skip(err)
    assert (status, err) == (0, "") and "data/tinystories: " in out and "gpt2 tokenizer" in out
    meta = json.loads(Path("data/tinystories/meta.json").read_text())
    assert (meta["val_fraction"], meta["made_with"], meta["source"]) == (0.01, "gpt2", ["tinystories"])
    assert 10 <= all_ids("tinystories", "val").count(50256) <= 60
    assert "data/tinystories_byte: " in cli(prepare.main, "tinystories", "--tokenizer=byte")[1]
