"""Finding a user's function, `file.py:function`, and what its source says of it: parameters, requirements. Runs nothing.

A file may define a function in a branch (`try`, `if`, `with`), import or assign it, and write a class whose instances can be
called. What only running can tell (the parameters of a name that is assigned) is asked of a worker: `pool.signature`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path

from selfkd.core.files import locate, reference_parts
from selfkd.core.local_code import parse
from selfkd.core.pool import Function
from selfkd.core.source_code import code_digest
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.rewards.contract import keys_of

Definition = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (ast.If, ast.Try, ast.With, ast.For, ast.While)  # their bodies belong to the top level


def find_function(reference: str, folders: Sequence[Path]) -> Function:
    """Return `reward/math.py:correct` as a Function; nothing in the file is run."""
    file, name = reference_parts(reference)
    if not file.endswith(".py") or not name.isidentifier():
        raise UsageError(f"'{reference}' does not name a function", reference, "Write it as file.py:function")
    path = locate(file, folders)
    known = names_in(parse(path))
    if name not in known and "*" not in known:
        there = sorted({one for one in known if not one.isupper() and not one.startswith("_")})
        listed = f"Functions there: {', '.join(there)}" if there else "There is no function in that file."
        raise UsageError(f"no function '{name}' in {path}.{did_you_mean(name, known)}", reference, listed)
    return Function(name, path, code_digest(path))


def names_in(tree: ast.Module) -> list[str]:
    """Return what the file offers at its top level: functions, classes, what it imports by name or assigns; "*" of a module."""
    return [name for node in top_level(tree.body) for name in _names_of(node)]


def top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of the top level, those inside `if`, `try`, `with` and loops too."""
    for node in body:
        yield node
        if isinstance(node, BRANCHES):
            inner = [*node.body, *getattr(node, "orelse", []), *getattr(node, "finalbody", [])]
            yield from top_level([*inner, *(line for one in getattr(node, "handlers", []) for line in one.body)])


def _names_of(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, Definition | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name))


def definition(function: Function) -> Definition | None:
    """Return the `def` of that name, of a class the `__call__` without `self`.

    None where the file imports, assigns or decorates it, or has several that differ: what it takes, only running can tell.
    """
    found = [node for node in top_level(parse(function.path).body) if function.name in _names_of(node)]
    if len(found) == 1 and isinstance(found[0], ast.ClassDef):
        return _call_of(found[0])
    plain = [node for node in found if isinstance(node, Definition) and not node.decorator_list]
    same = len({ast.dump(node.args) for node in plain}) == 1  # as in the branches of a `try`, usually
    return plain[-1] if same and len(plain) == len(found) else None


def _call_of(node: ast.ClassDef) -> Definition | None:
    """Return the `__call__` of a class as a function of its own; None where another class defines it."""
    found = next((one for one in node.body if isinstance(one, Definition) and one.name == "__call__"), None)
    if found is None or not found.args.args:
        return None
    found = copy.deepcopy(found)
    del found.args.args[0]
    return found


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
