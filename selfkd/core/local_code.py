"""The files of its own that a Python file needs: local modules that its import statements name, and data that it names in FILES.

Read from the source, nothing is run. Imports the standard library only, so that the workers of rewards, which import exactly
these modules as local ones, start fast.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from selfkd.errors import UsageError

NEVER_LOCAL = sys.stdlib_module_names | {"selfkd"}  # a file called math.py is not what `import math` means
IMPORTERS = ("import_module", "__import__")
DATA = "FILES"  # the top-level list that names data files, relative to the file that holds it


@dataclass(frozen=True)
class LocalCode:
    """`files` are {name relative to their common folder: file}, `main` included; `modules` what is imported by a top-level name.

    `depth` is how many folders above `main` its relative imports treat as packages: 1 for `from . import helpers`.
    """

    main: Path
    files: Mapping[str, Path]
    modules: Mapping[str, Path]
    depth: int

    @property
    def main_name(self) -> str:
        return next(name for name, file in self.files.items() if file == self.main)


def local_code(path: Path) -> LocalCode:
    """Return what a Python file needs of the files around it, directly or not; UsageError where one is not Python or missing."""
    return _Collector(path.resolve()).collected()


def content(path: Path) -> bytes:
    """Return what a file holds; UsageError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", str(path)) from None


def parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file, which is shared: leave it as it is. UsageError with its line where it is not Python."""
    return parsed(content(path), path)


@lru_cache(maxsize=64)  # one file is asked for by each step that names it
def parsed(source: bytes, path: Path) -> ast.Module:
    """Return the syntax tree of what `path` holds, which is shared: leave it as it is. UsageError where it is not Python."""
    try:
        return ast.parse(source, str(path))
    except SyntaxError as error:
        raise UsageError(f"not Python: {error.msg}", f"{path}:{error.lineno or 1}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"not Python: {error or 'it nests too deeply to be read'}", str(path)) from None


class _Collector:
    """Follows import statements from one file on."""

    def __init__(self, main: Path) -> None:
        self.main, self.depth = main, 0
        self.found: list[Path] = []
        self.modules: dict[str, Path] = {}
        self.waiting = [main]

    def collected(self) -> LocalCode:
        while self.waiting:
            path = self.waiting.pop(0)
            if path in self.found:
                continue
            self.found.append(path)
            if path.suffix == ".py":
                self._read(path)
        root = Path(os.path.commonpath([path.parent for path in self.found]))
        files = {path.relative_to(root).as_posix(): path for path in self.found}
        return LocalCode(self.main, files, self.modules, self.depth)

    def _read(self, path: Path) -> None:
        imports, data = _named(content(path), path)
        for level, parts in imports:
            if level:
                self._relative(path, level, parts)
            elif parts and parts[0] not in NEVER_LOCAL and self._take(self.main.parent, parts):
                self.modules[parts[0]] = _module_file(self.main.parent / parts[0]) or self.main.parent / parts[0]
        self.waiting += [_data_file(name, path, line) for name, line in data]

    def _relative(self, path: Path, level: int, parts: Sequence[str]) -> None:
        """Take what a relative import names, and the `__init__.py` of the packages that it goes through."""
        packages = [path.parent, *path.parent.parents][:level]
        for folder in packages:
            self._wait_for(folder / "__init__.py")
        top = packages[-1]
        if self.main.parent.is_relative_to(top):
            self.depth = max(self.depth, len(self.main.parent.relative_to(top).parts) + 1)
        self._take(top, parts)

    def _take(self, folder: Path, parts: Sequence[str]) -> bool:
        """Take the module `parts` below `folder`, and the packages around it; return whether there was any."""
        places = (folder.joinpath(*parts[: length + 1]) for length in range(len(parts)))
        files = [file for place in places if (file := _module_file(place))]
        self.waiting += files
        return bool(files)

    def _wait_for(self, path: Path) -> None:
        if path.is_file():
            self.waiting.append(path)


def _module_file(place: Path) -> Path | None:
    """Return the file of the module or package at `place`; a package comes first, as in Python."""
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


@lru_cache(maxsize=256)  # one file is asked for by lint, by creation, and for each worker: its text is walked once
def _named(source: bytes, path: Path) -> tuple[list[tuple[int, list[str]]], list[tuple[str, int]]]:
    """Return what a file names: (level, parts) of what may be a module, and (name, line) of its data files."""
    tree = parsed(source, path)
    return list(_imports(tree)), list(_data_names(tree))


def _imports(tree: ast.Module) -> Iterator[tuple[int, list[str]]]:
    """Yield (level, parts of a dotted name) of all that may be a module: `from a import b` may import the module a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = node.module.split(".") if node.module else []
            yield from ((node.level, [*above, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and (name := _imported_by_call(node)):
            plain = name.lstrip(".")
            yield len(name) - len(plain), plain.split(".")


def _imported_by_call(node: ast.Call) -> str:
    """Return "helpers" of `importlib.import_module("helpers")`; "" of any other call."""
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    first = node.args[0] if node.args else None
    if called in IMPORTERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
        return first.value
    return ""


def _data_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the names in the top-level list FILES, and their lines."""
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == DATA for target in targets):
            for item in getattr(node.value, "elts", []):  # type: ignore[attr-defined]
                if isinstance(item, ast.Constant) and isinstance(item.value, str):
                    yield item.value, item.lineno


def _data_file(name: str, path: Path, line: int) -> Path:
    """Return the data file of this name beside `path`; UsageError where it is not there."""
    file = (path.parent / name).resolve()
    if Path(name).is_absolute():
        raise UsageError(f"{DATA} names '{name}', which is not relative to this file", f"{path}:{line}")
    if not file.is_file():
        what = "is a folder: name its files one by one" if file.is_dir() else f"is not there ({file})"
        raise UsageError(f"{DATA} names '{name}', which {what}", f"{path}:{line}")
    return file
