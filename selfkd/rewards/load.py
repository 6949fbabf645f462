"""Loading a user's file as a module of its own, and taking the function out of it. Imports the standard library only."""

from __future__ import annotations

import dis
import importlib
import inspect
import linecache
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source, spec_from_file_location
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from selfkd.core.local_code import LocalCode, local_code
from selfkd.rewards.contract import Parameters, Reward
from selfkd.rewards.messages import function_of, reads_messages

SHOWN = "__selfkd_file__"  # the module's name for messages, among its globals


def load(path: str | Path, name: str, params: Mapping[str, Any] | None = None, shown: str = "", alone: bool = False) -> Reward:
    """Run the file and take the function out of it. Whatever the file raises comes through.

    `shown` is the name that messages give the file, if `path` is a copy of it. `alone`: this process exists for the file, so
    that its local modules may hide installed packages.
    """
    module = load_module(Path(path), shown, alone)
    call = callable_of(getattr(module, name), name)
    import_ahead(call, module)
    return Reward(
        call,
        dict(params or {}),
        module,
        parameters_of(call, name),
        reads_messages(call),
        str(path) if shown else "",
        vars(module)[SHOWN],
        _line_of(call, vars(module)[SHOWN]),
    )


def _line_of(call: Callable[..., Any], file: str) -> int:
    """Return the line at which a function of this file begins; 0 for one that is written elsewhere."""
    function = function_of(call)
    return function.__code__.co_firstlineno if function and function.__code__.co_filename == file else 0


def parameters_of(call: Callable[..., Any], name: str) -> Parameters:
    """Return what the function can be given by name."""
    all_of_them = signature_of(call, name).parameters.values()
    named = [one for one in all_of_them if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    return Parameters(
        tuple(one.name for one in named),
        frozenset(one.name for one in named if one.default is one.empty),
        any(one.kind is one.VAR_KEYWORD for one in all_of_them),
    )


def callable_of(found: Any, name: str) -> Callable[..., Any]:
    """Return what is called for a score: of a class whose instances can be called, an instance made without arguments."""
    if inspect.isclass(found) and any("__call__" in vars(base) for base in found.__mro__[:-1]):
        try:
            found = found()
        except TypeError as error:
            raise TypeError(f"{error}. Make an instance at the top level and name that: right = {name}(...)") from None
    if callable(found) and not inspect.isclass(found):
        call: Callable[..., Any] = found
        return call
    kind = "a class without a method __call__" if inspect.isclass(found) else f"of type {type(found).__name__}"
    raise TypeError(f"'{name}' is {kind}, which cannot be called for a score")


def signature_of(call: Callable[..., Any], name: str) -> inspect.Signature:
    """Return the signature of a function; of a wrapper that passes everything on (`*args, **kwargs`), that of what it wraps.

    A decorator without functools.wraps hides the function, but its closure holds it.
    """
    signature = inspect.signature(call)
    kinds = {one.kind for one in signature.parameters.values()}
    if kinds == {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} and isinstance(call, FunctionType):
        held = [cell.cell_contents for cell in call.__closure__ or ()]
        wrapped = [one for one in held if isinstance(one, FunctionType) and one.__name__ == name]
        return inspect.signature(wrapped[0]) if len(wrapped) == 1 else signature
    return signature


# --------------------------------------------------------------------------------------------------------------- modules


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


def import_ahead(call: Callable[..., Any], module: ModuleType) -> None:
    """Make the imports inside the function now, so that its first sample does not pay for them.

    Importing sympy takes a second on an idle machine; on a busy one the first sample of each worker would be late.
    """
    seen: set[CodeType] = set()
    function = function_of(call)
    waiting = [function.__code__] if function else []
    while waiting:
        code = waiting.pop()
        seen.add(code)
        around = [getattr(vars(module).get(name), "__code__", None) for name in code.co_names]
        waiting += [other for other in (*code.co_consts, *around) if isinstance(other, CodeType) and other not in seen]
        for name in imported_names(code):
            try:
                importlib.import_module(name)
            except Exception:  # the function meets this error itself, and its samples carry the reason
                continue


def imported_names(code: CodeType) -> Iterator[str]:
    return (step.argval for step in dis.get_instructions(code) if step.opname == "IMPORT_NAME" and step.argval)
