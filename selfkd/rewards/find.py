"""Finding a user's function, `file.py:function`, and what its source says of it: parameters, requirements. Runs nothing."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from selfkd.core.files import locate, reference_parts
from selfkd.core.pool import Function
from selfkd.core.source_code import code_digest
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.rewards.contract import keys_of

Definition = ast.FunctionDef | ast.AsyncFunctionDef


def find_function(reference: str, folders: Sequence[Path]) -> Function:
    """Return `reward/math.py:correct` as a Function; nothing in the file is run."""
    file, name = reference_parts(reference)
    if not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"'{reference}' does not name a function", reference, "Write it as file.py:function")
    path = locate(file, folders)
    known = names_in(parse(path))
    if name not in known:
        there = sorted({one for one in known if not one.isupper() and not one.startswith("_")})
        listed = f"Functions there: {', '.join(there)}" if there else "There is no function in that file."
        raise UsageError(f"no function '{name}' in {path}.{did_you_mean(name, known)}", reference, listed)
    return Function(name, path, code_digest(path))


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of the file; UsageError with its line where it is not Python."""
    try:
        return ast.parse(path.read_text("utf-8"), str(path))
    except SyntaxError as error:
        raise UsageError(f"not Python: {error.msg}", f"{path}:{error.lineno}") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"not Python: {error}", str(path)) from None


def names_in(tree: ast.Module) -> list[str]:
    """Return what the file offers at its top level: its functions, and what it imports by name or assigns."""
    found = [node.name for node in tree.body if isinstance(node, Definition)]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found += [alias.asname or alias.name for alias in node.names if node.module != "__future__"]
        elif isinstance(node, ast.Assign):
            found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return found


def definition(function: Function) -> Definition | None:
    """Return the last `def` of that name; None where the file imports or assigns the name."""
    for node in reversed(parse(function.path).body):
        if isinstance(node, Definition) and node.name == function.name:
            return node
    return None


def parameters(node: Definition) -> list[str]:
    """Return the names of the parameters that can be given by name."""
    return [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]


def required(node: Definition) -> list[str]:
    """Return those of them that have no default."""
    args = node.args
    plain = [argument.arg for argument in args.args]
    keyword = [argument.arg for argument, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return plain[: len(plain) - min(len(args.defaults), len(plain))] + keyword


def wants(function: Function) -> frozenset[str] | None:
    """Return the keys of a row that the function can see; None (all) where it takes `**kwargs` or has no `def`."""
    node = definition(function)
    if node is None or node.args.kwarg:
        return None
    return keys_of(parameters(node), function.params)
