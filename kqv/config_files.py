"""Config files: the user's own Python, whose plain values are settings."""

import ast
import difflib
import os
import shlex
import types

from kqv import pipes
from kqv.errors import UsageError, UserError

PLAIN = (bool, int, float, str)


def read_config_file(path, known):
    """
    The plain values that a config file leaves behind, as {name: value}. Names that begin with _ are private
    to the file. `known` holds the names of all settings. Raises UsageError, also where the file sets none, or
    seems to set one in a way that has no effect.
    """
    source = read_source(path)
    try:
        tree = ast.parse(source, path)
        require_effect(tree, path, known)
        elsewhere = [*set_elsewhere(tree)]
        namespace = {"__name__": "config", "__file__": path}
        exec(compile(source, path, "exec"), namespace)
    except (KeyboardInterrupt, UsageError):
        raise
    except BaseException as error:  # whatever the user's code raises, SystemExit too, is an error in it
        raise UsageError(
            f"config file {path}{line_of(error, path)}: {type(error).__name__}: {error}"
        ) from None
    values = plain_values(namespace, path, known)
    for name, line, place in elsewhere:
        if name in known and name not in values:
            raise UsageError(
                f"{path}, line {line}: {name} is set inside {place}, which sets nothing: write it at the "
                "left margin, or let the name of its place begin with _"
            )
    if not values:
        raise UsageError(f"config file {path} sets nothing: a setting is a line such as name = value")
    return values


def require_config_file(path, types_of):
    """Raise UsageError where there is no file to read settings from, with what the user may have meant."""
    if os.path.exists(path) and not os.path.isdir(path):  # a file, or a pipe as of bash's <(...)
        return
    folder, name = os.path.split(path.rstrip("/"))
    ways = ["settings are written --name=value"]
    if "dataset" in types_of and not name.endswith(".py"):
        ways.append(f"a set is named by {shlex.quote(f'--dataset={name}')}")
    if "out_dir" in types_of and (folder or os.path.isdir(path)):
        ways.append(f"a run's folder by {shlex.quote(f'--out_dir={path}')}")
    if os.path.isdir(path):
        reason = "Is a directory"
    else:
        reason = "No such file or directory"
        files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        near = difflib.get_close_matches(name, [file for file in files if file.endswith(".py")], n=1)
        ways = [f"did you mean {os.path.join(folder, near[0])}?"] if near else ways
    raise UsageError(f"config file {path}: {reason} ({', '.join(ways)})")


def read_source(path):
    try:
        content = pipes.content_of(path).decode("utf-8-sig")
        return content.replace("\r\n", "\n").replace("\r", "\n")
    except UserError as error:
        raise UsageError(f"config file {error}") from None
    except OSError as error:
        raise UsageError(f"config file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"config file {path} is not UTF-8 text") from None


def plain_values(namespace, path, known):
    """The settings among a namespace's names."""
    values = {}
    for name, value in namespace.items():
        is_code = isinstance(value, (types.ModuleType, type)) or callable(value)
        if name.startswith("_") or (is_code and name not in known):
            continue
        if not isinstance(value, PLAIN):
            way = f"write {name} = a value" if name in known else f"rename a helper to _{name}"
            raise UsageError(
                f"{path}: {name} is a {type(value).__name__}, but a setting is a plain value "
                f"(bool, int, float or str): {way}"
            )
        values[name] = value
    return values


def require_effect(tree, path, known):
    """Raise UsageError for a statement that names a setting as if it set it: `n_layer: 4`, `n_layer == 4`."""
    for node in tree.body:
        name = None
        if isinstance(node, ast.AnnAssign) and node.value is None:
            name, value = node.target, node.annotation
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            name, value = node.value.left, node.value.comparators[0]
        if isinstance(name, ast.Name) and name.id in known:
            raise UsageError(
                f"{path}, line {node.lineno}: {ast.unparse(node)} sets nothing: write "
                f"{name.id} = {ast.unparse(value)}"
            )


def set_elsewhere(node, place=None):
    """
    Names whose assignment sets nothing, as (name, line, place): those assigned in a class or a function, or
    under `if __name__ == ...`. Classes and functions that are private (_name) are left out.
    """
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if node.name.startswith("_"):
            return
        place = f"{'class' if isinstance(node, ast.ClassDef) else 'function'} {node.name}"
    elif isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        place = f"if {ast.unparse(node.test)}"
    elif place and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id, node.lineno, place
    for child in ast.iter_child_nodes(node):
        yield from set_elsewhere(child, place)


def line_of(error, path):
    """Where in the file at `path` an exception came from, as ", line N"; "" where that is not known."""
    if isinstance(error, SyntaxError) and error.filename == path and error.lineno:
        return f", line {error.lineno}"
    lines = []
    trace = error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == path:
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f", line {lines[-1]}" if lines else ""
