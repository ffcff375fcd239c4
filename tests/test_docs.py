"""README, CONTRIBUTING and docs/: files, links, settings and Python code in them are those of the project."""

import re

import pytest
from conftest import ROOT, TINY_RUN, call, write_text

import bench
import export
import look
import prepare
import sample
import train
import tune

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data/README.md", *ROOT.glob("docs/**/*.md")]
COMMANDS = {
    "train": train,
    "sample": sample,
    "prepare": prepare,
    "export": export,
    "bench": bench,
    "look": look,
    "tune": tune,
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page, language):
    """The code blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link may name after #: each heading in lower case, with - for spaces and without punctuation."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pages
def test_named_files_exist(page):
    text = page.read_text("utf-8")
    named = {name for name in re.findall(r"`([\w./]+\.(?:py|sh|toml|txt|md))`", text) if "/" in name}
    named |= {f"{name}.py" for name in re.findall(r"python ([\w/]+)\.py", text)}
    named |= {*re.findall(r"\b((?:config|launch)/\w+\.\w+)", text)} - {"config/mine.py"}
    for name in named:
        assert (ROOT / name).exists() or name.startswith(("data/", "out/")), name


@pages
def test_commands_use_settings_that_exist(page, cli):
    lines = re.findall(r"python (\w+)\.py([^#\n|&)`]*)", page.read_text("utf-8").replace("\\\n", " "))
    for name, arguments in lines:
        if name in COMMANDS:
            kind = re.match(r" (train|sample|plan|gpu)\b", arguments) if name == "bench" else None
            status, known, _ = cli(COMMANDS[name].main, *([kind[1]] if kind else []), "--help")
            for setting in re.findall(r"--(\w+)", arguments):
                assert status or f"--{setting}=" in known or setting == "help", f"{name}.py {arguments}"


def test_python_in_training_runs(capsys, monkeypatch):
    (program,) = blocks(ROOT / "docs/training.md", "python")
    exec(program, {})
    before, exact, after = capsys.readouterr().out.splitlines()
    loss, ln_v = map(float, before.split())
    assert abs(loss - ln_v) < 0.1 and exact == "True" and float(after) < loss


def test_python_in_from_nanogpt_runs():
    (program,) = blocks(ROOT / "docs/from_nanogpt.md", "python")
    namespace = {}
    exec(program, namespace)
    assert namespace["logits"].shape == (4, 16, 65) and len(namespace["text"]) == 23


def test_python_in_readme_runs(cli, tmp_path, monkeypatch, capsys):
    text = write_text(tmp_path / "text.txt")
    text.write_text(f"ROMEO: {text.read_text('utf-8')}", "utf-8")
    assert cli(prepare.main, text, "--name=tiny")[0] == 0
    assert (
        call(train.main, [*TINY_RUN, "--dataset=tiny", "--out_dir=out/plays_char"], monkeypatch, capsys)[0]
        == 0
    )
    (program,) = blocks(ROOT / "README.md", "python")
    namespace = {}
    exec(program, namespace)
    assert namespace["logits"].shape == (1, 6, namespace["gpt"].config.vocab_size)
    assert capsys.readouterr().out.startswith("ROMEO:")


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 170


def test_extras_and_the_requirements_of_development_are_the_same():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = {name for names in project["optional-dependencies"].values() for name in names}
    wanted = (ROOT / "requirements-dev.txt").read_text("utf-8").splitlines()
    assert {name for name in extras if not name.startswith("kqv[")} == {*wanted} - {"-r requirements.txt"}
