"""The three floors: commands -> kqv/ -> model.py -> torch, the order of the rooms, and the size of a file."""

import ast
import subprocess
import sys

from conftest import ROOT

COMMANDS = ("train", "sample", "prepare", "export", "bench", "look", "tune")
# A room imports from itself and from those before it.
ROOMS = (
    "printable",
    "threads",
    "errors",
    "forms",
    "pipes",
    "config_files",
    "values",
    "settings",
    "device",
    "kernels",
    "files",
    "pickles",
)
ROOMS += ("text", "formats", "generation", "training", "tuning", "looking", "measuring")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("kqv/**/*.py"))
}


def imports_of(module):
    """The modules of ours that a module imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports by a relative name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {"kqv"}


IMPORTS = {module: imports_of(module) for module in MODULES}


def room_of(module):
    return module.split(".")[1]


def test_the_top_folder_has_the_model_and_what_a_person_runs():
    assert {module for module in MODULES if "." not in module} == {*COMMANDS, "model", "kqv"}


def test_the_model_needs_torch_alone():
    assert IMPORTS["model"] == set()
    tree = ast.parse(MODULES["model"].read_text("utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


def test_nothing_in_kqv_imports_a_command():
    wrong = {module: IMPORTS[module] & {*COMMANDS} for module in MODULES if module.startswith("kqv.")}
    assert not any(wrong.values()), wrong


def test_a_room_imports_from_those_before_it_alone():
    for module in MODULES:
        if module.startswith("kqv."):
            for other in IMPORTS[module] - {"model"}:
                assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(module)), f"{module} -> {other}"


def test_no_imports_go_in_a_circle():
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " -> ".join([*under_way[under_way.index(module) :], module])
        if module not in done:
            under_way.append(module)
            for other in sorted(IMPORTS[module]):
                visit(other)
            under_way.pop()
            done.add(module)

    for module in sorted(MODULES):
        visit(module)


def test_preparing_text_never_loads_torch():
    modules = [module for module in MODULES if module == "prepare" or module.startswith("kqv.text")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert len(modules) > 5 and subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_files_and_functions_fit_a_reader():
    """A file in kqv/ has at most 350 lines, and the body of a function fits a screen."""
    for module, path in MODULES.items():
        source = path.read_text("utf-8")
        most = 450 if module == "model" else 350
        assert len(source.splitlines()) <= most, f"{path} has {len(source.splitlines())} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.body[0].lineno + 1
                assert lines <= 60, f"{module}.{node.name} has {lines} lines"
