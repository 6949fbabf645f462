"""YAML whose every value remembers its file and line. Knows nothing about recipes.

Only plain data is read: no tags, no second document, no key twice. Words follow YAML 1.2: `1e-5` is a number, and `on`, `yes`
and `12:30` are text (YAML 1.1, PyYAML's default, reads a text, two booleans and a number).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from selfkd.core.wording import first_line
from selfkd.errors import RecipeError

MOST_BYTES = 1 << 20
MOST_NODES = 20_000  # a few nested aliases could otherwise stand for billions of values
MOST_DEPTH = 40
TAG = "tag:yaml.org,2002:"
WORDS = (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind, _pattern, _first in WORDS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(TAG + _kind, re.compile(_pattern), _first)


@dataclass(frozen=True)
class Node:
    """A value and where it was written: `recipes/star.yaml:14`, or an override as typed. Values of a mapping carry the line of their key."""

    value: Any  # None, bool, int, float, str, list[Node] or dict[str, Node]
    where: str


class Problems:
    """Every problem found, none twice; `stop` raises them all as one RecipeError, in the order of the lines they stand on.

    `doubts` stop nothing: they are what a person should know beforehand.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.doubts: list[str] = []

    def add(self, where: str, label: str, text: str) -> None:
        line = f"{where}  {label}: {text}" if label else f"{where}  {text}"
        if line not in self.lines:
            self.lines.append(line)

    def doubt(self, where: str, label: str, text: str) -> None:
        line = f"{where}  {label}: {text}".lstrip()
        if line not in self.doubts:
            self.doubts.append(line)

    def ordered(self) -> list[str]:
        return sorted(self.lines, key=_place)

    def stop(self) -> None:
        if self.lines:
            raise RecipeError("\n".join(self.ordered()))


def _place(line: str) -> tuple[bool, str, int]:
    """Files first, by line; then what stands on the command line."""
    found = re.match(r"(\S+):(\d+)  ", line)
    return (False, found[1], int(found[2])) if found else (True, "", 0)


def read(path: Path, shown: str, problems: Problems) -> tuple[Node, str]:
    """The file as a node, and its text. A file that is not YAML at all stops here: nothing in it can be judged."""
    if path.stat().st_size > MOST_BYTES:
        raise RecipeError(f"larger than {MOST_BYTES >> 20} MB: this cannot be a recipe", shown)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", shown, "Save the file as UTF-8.") from None
    return parse(text, shown, problems), text


def parse(text: str, shown: str, problems: Problems, lines: bool = True) -> Node:
    try:
        tree = yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}" if mark and lines else shown
        column = f" at column {mark.column + 1}" if mark else ""
        raise RecipeError(f"not valid YAML{column}: {error.problem}{_tab(text, mark)}", where) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"not valid YAML: {first_line(error)}", shown) from None
    return (
        _Reader(shown, problems, lines).node(tree, None, 0)
        if tree is not None
        else Node(None, f"{shown}:1" if lines else shown)
    )


def _tab(text: str, mark: Any) -> str:
    line = text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else ""
    return " (a tab: indent with spaces)" if "\t" in line else ""


class _Reader:
    """Turns PyYAML's tree into nodes, with limits."""

    def __init__(self, shown: str, problems: Problems, lines: bool) -> None:
        self.shown, self.problems, self.lines, self.count = shown, problems, lines, 0

    def where(self, tree: Any) -> str:
        return f"{self.shown}:{tree.start_mark.line + 1}" if self.lines else self.shown

    def node(self, tree: Any, key: Any, depth: int) -> Node:
        self.count += 1
        where = self.where(tree if key is None else key)
        if self.count > MOST_NODES or depth > MOST_DEPTH:
            raise RecipeError(f"more than {MOST_NODES} values or {MOST_DEPTH} levels: an alias (*name) inside itself?", where)
        if isinstance(tree, yaml.MappingNode):
            return Node(self._mapping(tree, depth), where)
        if isinstance(tree, yaml.SequenceNode):
            self._plain(tree, "seq", where)
            return Node([self.node(item, None, depth + 1) for item in tree.value], where)
        return Node(self._scalar(tree, where), where)

    def _mapping(self, tree: Any, depth: int) -> dict[str, Node]:
        self._plain(tree, "map", self.where(tree))
        found: dict[str, Node] = {}
        for key, value in tree.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or key.tag != TAG + "str":
                self.problems.add(self.where(key), "", f"a key must be a word, not {name or 'a list or mapping'}")
            elif name in found:
                self.problems.add(self.where(key), "", f"'{name}' stands here twice; first in {found[name].where}")
            else:
                found[name] = self.node(value, key, depth + 1)
        return found

    def _plain(self, tree: Any, kind: str, where: str) -> None:
        if tree.tag != TAG + kind:
            self.problems.add(where, "", f"tags such as '{tree.tag.replace(TAG, '!!')}' are not read: plain values only")

    def _scalar(self, tree: Any, where: str) -> Any:
        kind, text = tree.tag.removeprefix(TAG), tree.value
        try:
            if kind in ("str", "null"):
                return text if kind == "str" else None
            if kind == "bool":
                return text.lower() == "true"
            if kind == "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            if kind == "float":
                number = float(text)
                if math.isinf(number):
                    self.problems.add(where, "", f"'{text}' is beyond the numbers that can be computed with")
                    return text
                return number
        except ValueError:
            self.problems.add(where, "", f"'{text}' is not a valid {kind}")
            return None
        self._plain(tree, "str", where)
        return text


def plain(node: Node) -> Any:
    """The value without places."""
    if isinstance(node.value, dict):
        return {name: plain(item) for name, item in node.value.items()}
    return [plain(item) for item in node.value] if isinstance(node.value, list) else node.value


def dump(value: Any) -> str:
    """`value` as YAML that `parse` reads back equal, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
