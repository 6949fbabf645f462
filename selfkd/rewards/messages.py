"""Whether a reward function reads prompts and completions as messages or as texts, told from its source.

TRL calls one function with lists of messages (`completion[0]["content"]`) and another with texts, after the data set that it
was written for. Here both kinds run over the same prompts, so what counts is how the function reads: it gets messages where a
value that comes from `prompts` or `completions` is subscripted with "content" or "role", in the function or in one that it
calls, or where their annotation holds dicts; else texts. Imports the standard library only.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

GIVEN = frozenset({"prompts", "completions"})
KEYS = ("content", "role")
MOST_CALLS = 5  # functions deep that a value is followed
Code = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def function_of(call: Any) -> FunctionType | None:
    """Return the Python function behind a callable: of a partial, an instance, a method or a wrapped function; None for others."""
    while isinstance(call, functools.partial):
        call = call.func
    call = inspect.unwrap(call)
    if not isinstance(call, FunctionType | MethodType):
        call = inspect.getattr_static(type(call), "__call__", None)  # of an instance: the method of its class
    call = getattr(call, "__func__", call)
    call = inspect.unwrap(call) if isinstance(call, FunctionType) else None
    return call if isinstance(call, FunctionType) else None


def reads_messages(call: Callable[..., Any]) -> bool:
    """Whether the function takes its prompts or completions for lists of messages. False where its source cannot be read."""
    function = function_of(call)
    code = _code_of(function) if function and _takes_groups(function) else None
    if function is None or code is None:
        return False
    return _Reader(function, code, GIVEN, MOST_CALLS, set()).finds_messages()


def _takes_groups(function: FunctionType) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(one.name in GIVEN or one.kind is one.VAR_KEYWORD for one in parameters)


class _Reader:
    """Follows, through one function, the values that come from some of its parameters."""

    def __init__(
        self,
        function: FunctionType,
        code: Code,
        given: frozenset[str],
        calls_left: int,
        seen: set[tuple[str, int, frozenset[str]]],
    ) -> None:
        self.function, self.code, self.calls_left, self.seen = function, code, calls_left, seen
        self.parameters = [*code.args.posonlyargs, *code.args.args, *code.args.kwonlyargs]
        self.carrying = {one.arg for one in self.parameters} & given  # names whose value is, or holds, prompts or completions
        self.everything = code.args.kwarg.arg if code.args.kwarg and given >= GIVEN else ""  # a `**kwargs` that may hold them

    def finds_messages(self) -> bool:
        if not (self.carrying or self.everything):
            return False
        if any(one.annotation and _holds_dicts(one.annotation) for one in self.parameters if one.arg in self.carrying):
            return True
        inside = (node for node in ast.walk(self.code) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        self.local = {node.name: node for node in inside if node is not self.code}
        before = -1
        while before < len(self.carrying):  # a name may be used above the line, in a loop, that fills it
            before = len(self.carrying)
            for node in ast.walk(self.code):
                for target, value in _bindings(node):
                    self._bind(target, value)
        return any(self._reads(node) for node in ast.walk(self.code))

    def _is_key(self, node: ast.AST) -> bool:
        """Whether a subscript is one of a message's keys: written out, or by a name that stands for one."""
        if isinstance(node, ast.Name | ast.Attribute) and getattr(node, "id", "") not in self.carrying:
            value = self._resolved(node)
            bound = (value for one in ast.walk(self.code) for target, value in _bindings(one) if _same_name(target, node))
            return (isinstance(value, str) and value in KEYS) or any(map(_written_key, bound))
        return _written_key(node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        """Note the names of `target` that an item of `value`, or `value` itself, carries into."""
        called = value.func.id if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) else ""
        items = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        if called == "enumerate" and len(items) == 2 and value.args:  # type: ignore[attr-defined]
            self._bind(items[1], value.args[0])  # type: ignore[attr-defined]
        elif called == "zip" and len(items) == len(value.args):  # type: ignore[attr-defined]
            for item, argument in zip(items, value.args, strict=True):  # type: ignore[attr-defined]
                self._bind(item, argument)
        elif isinstance(value, ast.Tuple) and len(items) == len(value.elts):
            for item, part in zip(items, value.elts, strict=True):
                self._bind(item, part)
        elif self._carries(value):
            self.carrying |= {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}

    def _carries(self, value: ast.AST | None) -> bool:
        """Whether a value is or holds prompts or completions, or a part of them that is no text yet."""
        match value:
            case ast.Name(id=name):
                return name in self.carrying
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=key)) if name == self.everything:
                return key in GIVEN
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name)), args=[ast.Constant(value=key), *_]) if (
                name == self.everything
            ):
                return key in GIVEN
            case ast.Subscript(value=inner, slice=key):
                return self._carries(inner) and not self._is_key(key)
            case ast.Call(
                func=ast.Name(id="zip" | "enumerate" | "list" | "tuple" | "reversed" | "iter" | "next" | "sorted"), args=args
            ):
                return any(map(self._carries, args))
            case ast.Call(func=ast.Attribute(value=inner, attr="copy" | "pop")):
                return self._carries(inner)
            case ast.ListComp(elt=item) | ast.GeneratorExp(elt=item) | ast.Starred(value=item) | ast.NamedExpr(value=item):
                return self._carries(item)
            case ast.Tuple(elts=items) | ast.List(elts=items) | ast.BoolOp(values=items):
                return any(map(self._carries, items))
            case ast.IfExp(body=one, orelse=other) | ast.BinOp(left=one, op=ast.Add(), right=other):
                return self._carries(one) or self._carries(other)
        return False

    def _reads(self, node: ast.AST) -> bool:
        """Whether this node takes the text, or the role, out of a message that came in."""
        match node:
            case ast.Subscript(value=inner, slice=key) if self._is_key(key):
                return self._carries(inner)
            case ast.Call(func=ast.Attribute(value=inner, attr="get"), args=[key, *_]) if self._is_key(key):
                return self._carries(inner)
            case ast.Match(subject=subject, cases=cases) if self._carries(subject):
                return any(self._is_key(key) for case in cases for key in _keys_matched(case.pattern))
            case ast.Call():
                return self.calls_left > 0 and any(reader.finds_messages() for reader in self._called(node))
        return False

    def _called(self, node: ast.Call) -> Iterator[_Reader]:
        """Yield a reader of the function that is called here with a value we follow."""
        maps = isinstance(node.func, ast.Name) and node.func.id in ("map", "filter") and len(node.args) > 1
        target, arguments = (node.args[0], node.args[1:]) if maps else (node.func, node.args)
        places = {place for place, argument in enumerate(arguments) if self._carries(argument)}
        names = {word.arg for word in node.keywords if word.arg and self._carries(word.value)}
        passed_on = any(word.arg is None and getattr(word.value, "id", "") == self.everything for word in node.keywords)
        if passed_on and self.everything:
            names |= GIVEN
        if not (places or names):
            return
        code: Code | None = target if isinstance(target, ast.Lambda) else self.local.get(getattr(target, "id", ""))
        function = self.function if code else function_of(self._resolved(target))
        code = code or (_code_of(function) if function else None)
        if code and function:
            taken = [one.arg for one in (*code.args.posonlyargs, *code.args.args)]
            taken = taken[1:] if taken[:1] == ["self"] else taken
            given = frozenset(names | {taken[place] for place in places if place < len(taken)})
            key = (function.__code__.co_filename, function.__code__.co_firstlineno + code.lineno, given)
            if key not in self.seen:
                self.seen.add(key)
                yield _Reader(function, code, given, self.calls_left - 1, self.seen)

    def _resolved(self, target: ast.expr) -> Any:
        """Return what a name or a dotted name means inside the function; None where that is not known before it runs."""
        if isinstance(target, ast.Attribute):
            if getattr(target.value, "id", "") == "self":
                return _attribute(_owner(self.function), target.attr)
            return _attribute(self._resolved(target.value), target.attr)
        names: Mapping[str, Any] = {**self.function.__globals__, **_enclosed(self.function)}
        return names.get(getattr(target, "id", ""))


def _bindings(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """Yield (target, value) of what a node binds: an assignment, each turn of a loop, what is put into a list, a matched pattern."""
    match node:
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign(target=target, value=ast.expr() as value) | ast.NamedExpr(target=target, value=value):
            yield target, value
        case ast.For(target=target, iter=value) | ast.comprehension(target=target, iter=value):
            yield target, value
        case ast.AugAssign(target=target, op=ast.Add(), value=value):
            yield target, value
        case ast.Call(func=ast.Attribute(value=ast.Name() as target, attr="append" | "extend" | "insert"), args=[*_, value]):
            yield target, value
        case ast.Match(subject=subject, cases=cases):
            for pattern in (one for case in cases for one in ast.walk(case.pattern)):
                if name := getattr(pattern, "name", None) or getattr(pattern, "rest", None):
                    yield ast.Name(name), subject


def _written_key(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value in KEYS


def _same_name(one: ast.AST, other: ast.AST) -> bool:
    return isinstance(one, ast.Name) and isinstance(other, ast.Name) and one.id == other.id


def _keys_matched(pattern: ast.pattern) -> Iterator[ast.expr]:
    for node in ast.walk(pattern):
        if isinstance(node, ast.MatchMapping):
            yield from node.keys


def _holds_dicts(annotation: ast.expr) -> bool:
    """Whether an annotation says list[list[dict]], and not texts as well."""
    said = ast.unparse(annotation).lower()
    return "dict" in said and "str]" not in said.replace("[str, str]", "") and "|" not in said


def _code_of(function: FunctionType) -> Code | None:
    """Return the syntax tree of a function; None where its source is not there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    kind: Any = ast.Lambda if function.__name__ == "<lambda>" else (ast.FunctionDef, ast.AsyncFunctionDef)
    return next((node for node in ast.walk(tree) if isinstance(node, kind)), None)


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute, or None: a module may import on being asked, and fail in any way."""
    try:
        return getattr(value, name, None)
    except Exception:
        return None


def _owner(method: FunctionType) -> Any:
    """Return the class that a method is written in, found by its qualified name; None for a local class."""
    found: Any = None
    for name in method.__qualname__.split(".")[:-1]:
        found = method.__globals__.get(name) if found is None else getattr(found, name, None)
    return found


def _enclosed(function: FunctionType) -> dict[str, Any]:
    """Return the names that a function has from the functions around it, where they are bound."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    return found
