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

READ_DOCSTRINGS = ("__doc__", "getdoc")  # names by which a file can make its docstrings count


def code_digest(path: Path) -> str:
    """Return the digest of what a Python file and the local files it needs mean."""
    files = local_code(path).files
    sources = {name: content(file) for name, file in files.items() if file.suffix == ".py"}
    documented = any(_reads_docstrings(source, files[name]) for name, source in sources.items())
    meanings = {name: _source_digest(source, files[name], documented) for name, source in sources.items()}
    return digest.of("code", meanings | {name: digest.file(file) for name, file in files.items() if name not in sources})


@lru_cache(maxsize=256)
def _source_digest(source: bytes, path: Path, documented: bool) -> str:
    try:
        return digest.of(_plain(parsed(source, path), documented))
    except RecursionError:
        raise UsageError("an expression nests too deeply to be read", str(path), "Write it as a loop or a list.") from None


@lru_cache(maxsize=256)
def _reads_docstrings(source: bytes, path: Path) -> bool:
    if source.isascii() and not any(name.encode() in source for name in READ_DOCSTRINGS):
        return False  # told without a walk; other letters may be another spelling of these names
    return any(getattr(node, "attr", getattr(node, "id", "")) in READ_DOCSTRINGS for node in ast.walk(parsed(source, path)))


def _plain(node: Any, documented: bool) -> Any:
    """Return a syntax tree as plain JSON, the same on every Python: what is empty or None is left out, as newer ones add fields."""
    if isinstance(node, ast.Constant):
        return ["Constant", ascii(node.value)]  # 1, 1.0, True and "1" differ
    if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty texts between the parts of an f-string
        parts = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
        return ["JoinedStr", [_plain(part, documented) for part in parts]]
    if isinstance(node, list):
        return [_plain(item, documented) for item in node]
    if not isinstance(node, ast.AST):
        return node
    given = {name: value for name in node._fields if (value := getattr(node, name, None)) is not None and value != []}
    if not documented and isinstance(body := given.get("body"), list) and _is_text(body[0]):
        given["body"] = body[1:] or [ast.Pass()]
    return [type(node).__name__, {name: _plain(value, documented) for name, value in given.items()}]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
