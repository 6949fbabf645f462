"""A user's file as a module of its own, with the local modules that it imports. Imports the standard library only."""

from __future__ import annotations

import linecache
import sys
import zlib
from collections.abc import Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from selfkd.core.local_code import LocalCode, local_code

SHOWN = "__selfkd_file__"  # the module's name for messages, among its globals


class LocalModules:
    """Finds the local modules that a file imports: after the standard library, before installed packages.

    A finder as `sys.meta_path` takes them; without its base class, whose import costs a worker several milliseconds.
    """

    def __init__(self, modules: Mapping[str, Path]) -> None:
        self.modules = dict(modules)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        place = self.modules.get(fullname)
        if place is None:
            return None
        folder = place.parent if place.name == "__init__.py" else place
        if place.suffix == ".py":
            inside = [str(folder)] if folder is not place else None
            return spec_from_file_location(fullname, place, submodule_search_locations=inside)
        spec = ModuleSpec(fullname, None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        return spec


def load_module(path: Path, shown: str = "", alone: bool = False) -> ModuleType:
    """Run the file as a module of its own; it imports its local modules by name, or relatively, as the file is written."""
    code = local_code(path)
    name, package, modules = _place_in_packages(code)
    _make_importable(modules, alone)
    folder = str(code.main.parent)
    if (
        folder not in sys.path
    ):  # last, for modules whose names are made at run time: reward/math.py must not become `import math`
        sys.path.append(folder)
    module = ModuleType(name)
    module.__file__, module.__package__ = str(path), package
    vars(module)[SHOWN] = shown or str(path)
    sys.modules[name] = module
    # Not through importlib: its cache cannot tell apart two versions of one length written within one second.
    source = path.read_bytes()
    code_object = compile(source, vars(module)[SHOWN], "exec")
    _remember_source(vars(module)[SHOWN], source)
    exec(code_object, vars(module))
    return module


def _remember_source(shown: str, source: bytes) -> None:
    """Let `inspect.getsource` and tracebacks quote what is run: the file of that name may be edited, or not found from here."""
    lines = decode_source(source).splitlines(keepends=True)
    linecache.cache[shown] = (len(source), None, lines, shown)


def _place_in_packages(code: LocalCode) -> tuple[str, str, Mapping[str, Path]]:
    """Return the module's name, its package ("" for none), and its local modules with the package that relative imports reach."""
    if not code.depth:
        return f"selfkd_file_{code.main.stem}", "", code.modules
    top = code.main.parents[code.depth - 1]
    root = f"selfkd_files_{zlib.crc32(str(top).encode()):08x}"  # no other folder's packages in this process
    package = ".".join((root, *code.main.parent.relative_to(top).parts))
    init = top / "__init__.py"
    return f"{package}.{code.main.stem}", package, {**code.modules, root: init if init.is_file() else top}


def _make_importable(modules: Mapping[str, Path], alone: bool) -> None:
    """Let these modules be found first. In a process shared with others, none of them may hide an installed package."""
    mine = [finder for finder in sys.meta_path if isinstance(finder, LocalModules)]
    earlier = {name for finder in mine for name in finder.modules}
    for name, place in modules.items():
        if name in earlier:  # of another file's folder, perhaps: it is imported anew
            for loaded in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
                del sys.modules[loaded]
        elif not alone and _is_taken(name, place):
            raise ImportError(f"the local module '{place.name}' is called like the installed package '{name}': rename it")
    sys.meta_path[:] = [LocalModules(modules), *sys.meta_path]


def _is_taken(name: str, place: Path) -> bool:
    """Whether the name means another module here: one that is loaded, or that is installed."""
    spec = getattr(sys.modules.get(name), "__spec__", None) or PathFinder.find_spec(name)
    origin = getattr(spec, "origin", None)
    return spec is not None and origin is not None and Path(origin).resolve() not in (place, place / "__init__.py")
