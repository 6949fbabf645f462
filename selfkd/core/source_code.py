"""The identity of a Python file: its syntax tree and those of the local modules that it imports.

A comment or a docstring changes nothing, a helper does. Nothing in the file is run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selfkd.core.digest import of
from selfkd.errors import UsageError


def code_digest(path: Path, root: Path | None = None) -> str:
    """Return the digest of a Python file's syntax tree and of the local modules it imports."""
    return of("code", {name: _tree_digest(source) for name, source in local_sources(path, root).items()})


def local_sources(path: Path, root: Path | None = None) -> dict[str, Path]:
    """Return {name relative to `root`: file} of a Python file and of every local module it imports, directly or not."""
    found: dict[str, Path] = {}
    _collect(path.resolve(), (root or path.parent).resolve(), found)
    return found


def _tree_digest(path: Path) -> str:
    tree = ast.parse(path.read_text("utf-8"), filename=str(path))
    try:
        return of(_plain(_without_docstrings(tree)))
    except RecursionError:
        raise UsageError("an expression nests too deeply to be read", str(path), "Write it as a loop or a list.") from None


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


def _collect(path: Path, root: Path, found: dict[str, Path]) -> None:
    """Add the file, and every local module it imports, to `found`."""
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
    if name in found:
        return
    found[name] = path
    for module in _imports(ast.parse(path.read_text("utf-8"), filename=str(path))):
        for folder in (path.parent, root):
            local = folder.joinpath(*module.split("."))
            for candidate in (local.with_suffix(".py"), local / "__init__.py"):
                if candidate.is_file():
                    _collect(candidate, root, found)


def _without_docstrings(tree: ast.AST) -> ast.AST:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _imports(tree: ast.AST) -> Iterator[str]:
    """Yield every dotted name that may be a module: `from a import b` may import the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
