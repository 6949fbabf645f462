"""Finding a user's function, `file.py:function`, and what its source says of it: parameters, requirements. Runs nothing."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from selfkd.core.files import locate
from selfkd.core.pool import Function
from selfkd.core.source_code import code_digest
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.rewards.contract import keys_of


def find_function(reference: str, folders: Sequence[Path]) -> Function:
    """`reward/math.py:correct` as a Function; nothing in the file is run."""
    file, colon, name = reference.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"'{reference}' does not name a function", reference, "Write it as file.py:function")
    path = locate(file, folders)
    known = names_in(parsed(path))
    if name not in known:
        there = sorted({one for one in known if not one.isupper() and not one.startswith("_")})
        listed = f"Functions there: {', '.join(there)}" if there else "There is no function in that file."
        raise UsageError(f"no function '{name}' in {path}.{did_you_mean(name, known)}", reference, listed)
    return Function(name, path, code_digest(path))


def parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf-8"), str(path))
    except SyntaxError as error:
        raise UsageError(f"not Python: {error.msg}", f"{path}:{error.lineno}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"not Python: {error}", str(path)) from None


def names_in(tree: ast.Module) -> list[str]:
    """What the file offers at its top level: its functions, and what it imports by name or assigns."""
    found = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found += [alias.asname or alias.name for alias in node.names if node.module != "__future__"]
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return found


def definition(function: Function) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in reversed(parsed(function.path).body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == function.name:
            return node
    return None


def wants(function: Function) -> frozenset[str] | None:
    """The keys of a row that the function can see, from its parameters; None (all) where it takes `**kwargs` or is not found."""
    node = definition(function)
    if node is None or node.args.kwarg:
        return None
    names = (argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    return keys_of(names, function.params)


def required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    args = node.args
    plain = [argument.arg for argument in args.args]
    keyword = [argument.arg for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return plain[: len(plain) - min(len(args.defaults), len(plain))] + keyword
