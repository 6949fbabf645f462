"""The identity of a Python file: its syntax tree, those of the local modules that it imports, and the data files it names.

A comment changes nothing, a helper does. A docstring changes nothing either, unless one of the files reads `__doc__`. Nothing
in the files is run.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import Any

from selfkd.core import digest
from selfkd.core.local_code import content, local_code, parsed
from selfkd.errors import UsageError


def code_digest(path: Path) -> str:
    """Return the digest of what a Python file and the local files it needs mean."""
    files = local_code(path).files
    sources = {name: content(file) for name, file in files.items() if file.suffix == ".py"}
    documented = any(_reads_docstrings(source, files[name]) for name, source in sources.items())
    meanings = {name: _source_digest(source, files[name], documented) for name, source in sources.items()}
    return digest.of("code", meanings | {name: digest.file(file) for name, file in files.items() if name not in sources})


@lru_cache(maxsize=256)
def _source_digest(source: bytes, path: Path, documented: bool) -> str:
    tree = parsed(source, path)
    try:
        return digest.of(_plain(tree if documented else _without_docstrings(tree)))
    except RecursionError:
        raise UsageError("an expression nests too deeply to be read", str(path), "Write it as a loop or a list.") from None


@lru_cache(maxsize=256)
def _reads_docstrings(source: bytes, path: Path) -> bool:
    names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(parsed(source, path))}
    return bool(names & {"__doc__", "getdoc"})


def _plain(node: Any) -> Any:
    """Return a syntax tree as plain JSON, the same on every Python: what is empty or None is left out, as newer ones add fields."""
    if isinstance(node, ast.Constant):
        return ["Constant", ascii(node.value)]  # 1, 1.0, True and "1" differ
    if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty texts between the parts of an f-string
        return [
            "JoinedStr",
            [_plain(part) for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")],
        ]
    if isinstance(node, ast.AST):
        given = {name: getattr(node, name, None) for name in node._fields}
        return [
            type(node).__name__,
            {name: _plain(value) for name, value in given.items() if value is not None and value != []},
        ]
    return [_plain(item) for item in node] if isinstance(node, list) else node


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree
