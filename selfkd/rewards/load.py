"""A user's function, taken out of its file. Imports the standard library only."""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from selfkd.core.user_module import SHOWN, load_module
from selfkd.rewards.contract import Parameters, Reward
from selfkd.rewards.messages import function_of, reads_messages


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
