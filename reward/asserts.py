"""`assert f(1) == 2` as a test: the line is read, only the call is run behind the walls, and the comparison is made here.

Data sets such as MBPP (Austin et al. 2021, arXiv 2108.07732) write tests as Python. Running such a line beside the program would
put the answer in its reach and the verdict in its hands. So the line is taken apart: calls of unknown functions are the
program's, the rest is a small language of literals, comparisons and a few harmless functions. What is not in that language is refused.
"""

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ALIKE = 32  # members of a set that may have the same hash: those of a hostile list all have it, and building takes minutes


def isclose(a: float, b: float, rel_tol: float = 1e-9, abs_tol: float = 0.0) -> bool:
    """math.isclose, whose module has the name of a file in this folder.

    >>> isclose(1.0, 1.0 + 1e-10), isclose(float("inf"), 3.14), isclose(complex(float("inf"), 0), 1), isclose(float("nan"), 1)
    (True, False, False, False)
    """
    if a == b:
        return True
    distance, size = abs(a - b), max(abs(a), abs(b))
    return size < float("inf") and distance <= max(rel_tol * size, abs_tol)


def careful(kind: Callable[..., Any]) -> Callable[..., Any]:
    """`set`, `frozenset` or `dict` of what a program returned.

    >>> careful(set)([1] * 99), careful(dict)([("a", 1)], b=2)
    ({1}, {'a': 1, 'b': 2})
    >>> careful(set)([n * (2**61 - 1) for n in range(99)])
    Traceback (most recent call last):
    ValueError: hashes that collide
    """

    def make(*given: Any, **named: Any) -> Any:
        alike: dict[int, list[Any]] = {}
        for one in given[0] if given else ():
            key = next(iter(one)) if kind is dict and not isinstance(given[0], dict) else one
            known = alike.setdefault(hash(key), [])
            if key not in known:
                known.append(key)
            if len(known) > ALIKE:
                raise ValueError("hashes that collide")
        return kind(*given, **named)

    return make


def summed(values: Any, start: float = 0) -> Any:
    """sum of numbers; of lists it would be quadratic."""
    if isinstance(start, list | tuple):
        raise TypeError("only numbers are summed")
    return sum(values, start)


def rounded(number: Any, ndigits: int | None = None) -> Any:
    if ndigits is not None and not -400 <= ndigits <= 400:
        raise ValueError("too many digits")
    return round(number, ndigits)


HARMLESS: dict[str, Callable[..., Any]] = {
    one.__name__: one for one in (abs, all, any, bool, float, int, len, list, max, min, sorted, str, tuple)
}  # fmt: skip
HARMLESS |= {"set": careful(set), "frozenset": careful(frozenset), "dict": careful(dict), "round": rounded}
HARMLESS |= {"sum": summed, "math.isclose": isclose, "isclose": isclose}
GOT_CHARS = 60
LONGEST = 100_000  # characters of one assert


@dataclass(frozen=True)
class Assertion:
    """One assert, parsed. Comparisons with == are exact in type unless told otherwise."""

    test: Any
    exact: bool = True
    tolerance: float = 0.0

    @classmethod
    def read(cls, line: str, where: str, exact: bool = True, tolerance: float = 0.0):
        """ValueError where the line is not a single assert in the small language, or asks nothing of the program.

        >>> Assertion.read("assert f(1) == [2, (3,)]", "test 1").judge(lambda name, *a: Said([2, (3,)]))
        ''
        >>> Assertion.read("assert open('x') == f(1)", "test 1")
        Traceback (most recent call last):
        ValueError: test 1 calls 'open' and 'f': one function only, the program's
        """
        try:
            [statement] = ast.parse(line[:LONGEST].strip()).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(f"{where} is not one assert") from None
        if not isinstance(statement, ast.Assert):
            raise ValueError(f"{where} is not one assert")
        functions = {inner for node in ast.walk(statement.test) if isinstance(node, ast.Call) for inner in ast.walk(node.func)}
        for node in ast.walk(statement.test):
            if isinstance(node, ast.Name | ast.Attribute) and node not in functions:
                raise ValueError(f"{where} names '{ast.unparse(node)[:60]}', which is nothing here")
            if isinstance(node, ast.keyword) and node.arg is None:
                raise ValueError(f"{where} unpacks a mapping, which cannot be checked from outside")
            if not isinstance(node, LANGUAGE) or (isinstance(node, ast.BinOp) and not isinstance(node.op, ast.Add | ast.Sub)):
                raise ValueError(f"{where} holds what cannot be checked from outside: {ast.unparse(node)[:60]}")
        called = dict.fromkeys(
            name for node in ast.walk(statement.test) if (name := called_name(node)) not in (None, *HARMLESS)
        )
        if len(called) != 1:
            said = f"calls {' and '.join(map(repr, called))}: one function only, the program's" if called else "calls nothing"
            raise ValueError(f"{where} {said}")
        return cls(statement.test, exact, tolerance)

    def judge(self, call: Callable[..., Any]) -> str:
        """'' where it holds, else the reason. `call(name, *arguments, **keywords)` asks the program."""
        asked: list[Any] = []
        try:
            holds = bool(self.value(self.test, call, asked))
        except Refused as refused:
            return str(refused)
        except BAD_DATA as error:  # the value that came back does not fit the test: len(None), 1 < "a"
            return f"wrong answer: {short(asked)} ({type(error).__name__})"
        return "" if holds else f"wrong answer: {short(asked)}"

    def value(self, node: Any, call: Callable[..., Any], asked: list[Any]) -> Any:
        """The value of an expression of the language; what the program returned is added to `asked`."""
        if isinstance(node, ast.BoolOp):
            return self.either(node, call, asked)
        inner = [self.value(child, call, asked) for child in children(node)]
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.List | ast.Tuple | ast.Set):
            return {ast.List: list, ast.Tuple: tuple, ast.Set: careful(set)}[type(node)](inner)
        if isinstance(node, ast.Dict):
            return dict(zip(inner[: len(node.keys)], inner[len(node.keys) :]))
        if isinstance(node, ast.UnaryOp):
            return {ast.Not: lambda x: not x, ast.USub: lambda x: -x, ast.UAdd: lambda x: +x}[type(node.op)](inner[0])
        if isinstance(node, ast.BinOp):
            return inner[0] + inner[1] if isinstance(node.op, ast.Add) else inner[0] - inner[1]
        if isinstance(node, ast.Subscript):
            return inner[0][inner[1]]
        if isinstance(node, ast.Compare):
            return all(map(self.compare, node.ops, inner, inner[1:]))
        return self.called(node, inner, call, asked)

    def either(self, node: Any, call: Callable[..., Any], asked: list[Any]) -> Any:
        """`and` and `or`, which ask no further than Python does."""
        for child in node.values:
            found = self.value(child, call, asked)
            if bool(found) is isinstance(node.op, ast.Or):
                break
        return found

    def called(self, node: Any, inner: list[Any], call: Callable[..., Any], asked: list[Any]) -> Any:
        count = len(node.args)
        keywords = dict(zip((one.arg for one in node.keywords), inner[count:]))
        name = called_name(node)
        if name in HARMLESS:
            return HARMLESS[name](*inner[:count], **keywords)
        returned = call(name, *inner[:count], **keywords)
        if not returned.ok:
            raise Refused(returned.reason)
        asked.append(returned.value)
        return returned.value

    def compare(self, operator: Any, left: Any, right: Any) -> bool:
        if isinstance(operator, ast.Eq | ast.Is):
            return same(left, right, self.exact, self.tolerance)
        if isinstance(operator, ast.NotEq | ast.IsNot):
            return not same(left, right, self.exact, self.tolerance)
        if isinstance(operator, ast.In | ast.NotIn) and isinstance(right, str | bytes):
            return (left in right) is isinstance(operator, ast.In)
        if isinstance(operator, ast.In | ast.NotIn):
            return any(same(left, one, self.exact, self.tolerance) for one in right) is isinstance(operator, ast.In)
        return {ast.Lt: left < right, ast.LtE: left <= right, ast.Gt: left > right, ast.GtE: left >= right}[type(operator)]


BAD_DATA = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)  # and no error of this host


class Refused(Exception):
    """The program did not answer a call; the message is the reason."""


@dataclass
class Said:
    """What a call gave, for examples."""

    value: Any
    ok: bool = True
    reason: str = ""


LANGUAGE = (
    ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Subscript, ast.Compare, ast.Call,
    ast.Name, ast.Attribute, ast.keyword, ast.expr_context, ast.unaryop, ast.boolop, ast.cmpop, ast.Add, ast.Sub,
)  # fmt: skip


def called_name(node: Any) -> str | None:
    """`f` or `Solution.f` where the node is a call by name, also written `Solution().f(...)`."""
    if not isinstance(node, ast.Call):
        return None
    parts, inner = [], node.func
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value.func if isinstance(inner.value, ast.Call) and not inner.value.args else inner.value
    return ".".join([inner.id, *reversed(parts)]) if isinstance(inner, ast.Name) else ""


def children(node: Any) -> list[Any]:
    """The expressions below a node whose values it is made of."""
    if isinstance(node, ast.Call):
        return [*node.args, *(one.value for one in node.keywords)]
    return [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


def short(asked: list[Any]) -> str:
    """What the program returned, as one short line that can be printed and stored, whatever it is.

    >>> short([1, "a\\n\\x1b"]), len(short(["\\ud800" * 99])), short([1 << 20000])
    ("1 and 'a\\\\n\\\\x1b'", 61, 'a whole number of 20001 bits')
    """
    return shown(" and ".join(map(told, asked)))


def told(value: Any) -> str:
    if type(value) is int and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    try:
        return repr(value)
    except ValueError:  # a number of thousands of digits in it
        return f"a {type(value).__name__} that holds a very large number"


def shown(text: str) -> str:
    """
    >>> shown("a\\nb"), shown("\\x1b[2J"), len(shown("x" * 1000))
    ('a b', '?[2J', 61)
    """
    flat = "".join(sign if sign.isprintable() else "?" for sign in " ".join(text[: 4 * GOT_CHARS].split()))
    return flat if len(flat) <= GOT_CHARS else flat[:GOT_CHARS] + "…"


def same(got: Any, want: Any, exact: bool = True, tolerance: float = 0.0) -> bool:
    """Equal in type and value, all the way down. Not `exact`: 3 and 3.0 are equal, and a tuple and a list; True is never 1.

    >>> same(3, 3), same(3.0, 3), same(True, 1), same((1,), [1]), same(3.0, 3, exact=False), same(True, 1, exact=False)
    (True, False, False, False, True, False)
    >>> same([0.1 + 0.2], [0.3]), same([0.1 + 0.2], [0.3], tolerance=1e-9), same({1: {2}}, {1: {2}}), same({1}, {True})
    (False, True, True, False)
    """
    kinds = type(got), type(want)
    if set(kinds) <= {int, float} and (kinds[0] is kinds[1] or not exact or tolerance):
        return near(got, want, tolerance)
    if set(kinds) <= {list, tuple} and (kinds[0] is kinds[1] or not exact):
        return len(got) == len(want) and all(same(a, b, exact, tolerance) for a, b in zip(got, want))
    if kinds[0] is not kinds[1]:
        return False
    if kinds[0] is dict:
        keys = len(got) == len(want) and typed(frozenset(got)) == typed(frozenset(want))
        return keys and all(same(got[key], want[key], exact, tolerance) for key in want)
    return len(got) == len(want) and typed(got) == typed(want) if kinds[0] in (set, frozenset) else got == want


def near(got: float, want: float, tolerance: float) -> bool:
    """
    >>> near(float("nan"), 1, 9), near(float("nan"), float("nan"), 0), near(1, float("inf"), 9), near(10**400, 1.0, 9)
    (False, True, False, False)
    """
    if got == want or (got != got and want != want):
        return True
    try:
        return abs(got - want) <= tolerance * max(1.0, abs(want)) < float("inf")
    except OverflowError:  # a whole number that no float can hold
        return False


def typed(value: Any) -> Any:
    """A hashable value with the types of all its parts: {1} and {True} are equal to Python.

    >>> typed({(1,)}) == typed({(True,)})
    False
    """
    inner = type(value)(map(typed, value)) if type(value) in (tuple, set, frozenset) else value
    return type(value), frozenset(inner) if type(value) is set else inner
