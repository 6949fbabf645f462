"""From a list of steps as written to the straight line that is walked: verbs, bare values, repeat and each, names, overrides.

Works on nodes, so that every problem names the line it stands on. Knows a step's fields, not what a step does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, get_args

from pydantic import ValidationError

from selfkd.backend.trainer.trl_options import PASSED
from selfkd.core.wording import did_you_mean
from selfkd.core.yamlfile import Node, Problems, parse, plain
from selfkd.errors import RecipeError
from selfkd.recipe.messages import explain
from selfkd.steps import VERBS, Step

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,47}")
FUNCTION = re.compile(r".+\.py:[A-Za-z_]\w*")
MOST_STEPS = 500
GROUPS = ("repeat", "each")
LISTS = ("before", "steps", "after")
SMALL = "small"  # the field that says what --small changes
# Options of TRL that are lists by nature: a list given for them is one value, not one per round.
TRL_LISTS = frozenset(name for fields in PASSED.values() for name, (kinds, _) in fields.items() if "list" in kinds.split())


@dataclass(frozen=True)
class Entry:
    """One step as written: its fields as nodes, its place, the list it is in, and whether repeat or each copied it."""

    verb: str
    words: dict[str, Node]
    label: str
    where: str
    part: str
    name: str = ""
    copied: bool = False

    @property
    def step(self) -> type[Step]:
        return VERBS[self.verb]

    def at(self, field: str) -> str:
        """Return where `field` (or `field.option`) was written; the step's own line if it was not."""
        first, _, option = field.partition(".")
        if first not in self.words:
            return self.where
        inner = self.words[first].value
        return inner[option].where if isinstance(inner, dict) and option in inner else self.words[first].where


@dataclass(frozen=True)
class Line:
    """A checked step whose numbers, expressions and models may still be lists: entry r for round r, the last one repeats."""

    verb: str
    words: dict[str, Any]
    where: str = field(default="", compare=False)
    label: str = field(default="", compare=False)
    places: dict[str, str] = field(default_factory=dict, compare=False)  # where each field was written

    @property
    def name(self) -> str:
        return str(self.words["name"])

    @property
    def variants(self) -> int:
        """In how many rounds it differs from the one before."""
        return variants(VERBS[self.verb], self.words)

    @property
    def changing(self) -> frozenset[str]:
        """Return the fields that may be a list, one value per round."""
        return changing(VERBS[self.verb])

    @property
    def listed(self) -> set[str]:
        """Return the options of TRL that are given as such a list."""
        options = self.words.get("trl") or {}
        return {name for name, value in options.items() if isinstance(value, list) and name not in TRL_LISTS}

    @property
    def written(self) -> str:
        """Return where it stands and how errors name it."""
        return f"{self.where}  {self.label}".strip() or self.name

    def place(self, name: str) -> str:
        """Return where a field was written; the step's own line if it was not."""
        return self.places.get(name) or self.places.get(name.partition(".")[0], self.where)

    def at(self, index: int) -> Step:
        """The step of round `index`; round 0 (and `before`) uses the first entries."""
        return VERBS[self.verb].model_validate(pick(VERBS[self.verb], self.words, index))

    def spelled(self) -> dict[str, Any]:
        """The step with every default, its lists as they were given: what recipe.resolved.yaml holds."""
        chosen = self.at(1).words()
        lists = {field: self.words[field] for field in self.words if field == "trl" or isinstance(self.words[field], list)}
        return {self.verb: {**chosen, **lists}}


# ---- what changes from round to round ----


@cache
def changing(cls: type[Step]) -> frozenset[str]:
    """Return the fields that may be a list, one entry per round: all numbers, and the texts that a verb names (expressions, models)."""
    found = {field.alias or name: get_args(field.annotation) or (field.annotation,) for name, field in cls.model_fields.items()}
    return cls.per_round | {name for name, kinds in found.items() if int in kinds or float in kinds}


def pick(cls: type[Step], words: dict[str, Any], index: int) -> dict[str, Any]:
    picked = {field: _entry(value, index) if field in changing(cls) else value for field, value in words.items()}
    if isinstance(words.get("trl"), dict):
        picked["trl"] = {field: value if field in TRL_LISTS else _entry(value, index) for field, value in words["trl"].items()}
    return picked


def entries(value: Any) -> list[Any]:
    """Return the numbers of a field, one per round; [] where it is not given."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _entry(value: Any, index: int) -> Any:
    return value[min(max(index, 1), len(value)) - 1] if isinstance(value, list) and value else value


def variants(cls: type[Step], words: dict[str, Any]) -> int:
    """How many rounds differ: the longest per-round list."""
    options = words["trl"] if isinstance(words.get("trl"), dict) else {}
    lists = [value for field, value in words.items() if field in changing(cls)] + [
        v for k, v in options.items() if k not in TRL_LISTS
    ]
    return max([1, *(len(value) for value in lists if isinstance(value, list))])


# ---- from entries as written to a flat list ----


def unroll(items: Node | None, part: str, problems: Problems) -> list[Entry]:
    """Return the entries of a recipe's list of steps (`part`), one per step, groups unrolled."""
    return [replace(entry, part=part) for entry in _unrolled(items, part, problems)]


def _unrolled(items: Node | None, label: str, problems: Problems) -> list[Entry]:
    if items is None or items.value is None:
        return []
    if not isinstance(items.value, list):
        problems.add(items.where, label, "should be a list of steps, each starting with '- '")
        return []
    found = [entry for at, item in enumerate(items.value) for entry in _entries(item, f"{label}[{at}]", problems)]
    if len(found) > MOST_STEPS:
        problems.add(items.where, label, f"{len(found)} steps after unrolling; at most {MOST_STEPS}")
    return found[:MOST_STEPS]


def _entries(item: Node, label: str, problems: Problems) -> Iterator[Entry]:
    if isinstance(item.value, str):  # `- build`
        item = Node({item.value: Node(None, item.where)}, item.where)
    if not isinstance(item.value, dict) or not item.value:
        problems.add(item.where, label, f"a step starts with its verb: one of {', '.join(VERBS)}")
    elif "each" in item.value:
        yield from _each(item.value, label, item.where, problems)
    elif "repeat" in item.value:
        yield from _repeat(item.value, label, item.where, problems)
    else:
        yield from _one(item, label, problems)


def _one(item: Node, label: str, problems: Problems) -> Iterator[Entry]:
    verbs = [key for key in item.value if key in VERBS]
    strange = [key for key in item.value if key not in VERBS]
    if len(verbs) > 1:
        problems.add(item.where, label, f"one verb per step, not {' and '.join(verbs)}: start each with its own '- '")
    elif verbs and strange:
        problems.add(
            item.value[strange[0]].where, label, f"'{strange[0]}' stands beside '{verbs[0]}': indent it to be one of its fields"
        )
    elif strange:
        problems.add(
            item.where, label, f"no verb '{strange[0]}'.{did_you_mean(strange[0], [*VERBS, *GROUPS])} Verbs: {', '.join(VERBS)}"
        )
    else:
        words = _words(verbs[0], item.value[verbs[0]], f"{label}.{verbs[0]}", problems)
        yield Entry(verbs[0], words, f"{label}.{verbs[0]}", item.value[verbs[0]].where, part="")


def _words(verb: str, node: Node, label: str, problems: Problems) -> dict[str, Node]:
    """The fields of a step; a bare value fills the verb's short field."""
    if isinstance(node.value, dict):
        return dict(node.value)
    if node.value is None:
        return {}
    short = VERBS[verb].short
    if short is None:
        problems.add(node.where, label, "takes fields, not a bare value")
        return {}
    return {short: node}


def _repeat(words: dict[str, Node], label: str, where: str, problems: Problems) -> Iterator[Entry]:
    """`- repeat: {times: 3, steps: […]}`"""
    inner = words["repeat"].value if isinstance(words["repeat"].value, dict) else {}
    times = inner["times"].value if "times" in inner else None
    if (
        len(words) > 1
        or set(inner) != {"times", "steps"}
        or not isinstance(times, int)
        or isinstance(times, bool)
        or not 1 <= times <= MOST_STEPS
    ):
        problems.add(where, label, "write a repetition as `repeat: {times: 3, steps: [...]}`")
        return
    for _ in range(times):
        for entry in _unrolled(inner["steps"], f"{label}.repeat.steps", problems):
            yield replace(entry, copied=True)


def _each(words: dict[str, Node], label: str, where: str, problems: Problems) -> Iterator[Entry]:
    """`- {each: [a, b], as: style, steps: […]}`; `${style}` stands for a, then for b."""
    word = words["as"].value if "as" in words else "each"
    values = words["each"].value
    if not (
        isinstance(word, str)
        and isinstance(values, list)
        and values
        and "steps" in words
        and set(words) <= {"each", "as", "steps"}
    ):
        problems.add(
            where, label, "write `each: [a, b]`, `as: word` and `steps: [...]` side by side; ${word} stands for a, then b"
        )
        return
    for value in values:
        for entry in _unrolled(fill(words["steps"], word, value), f"{label}.steps", problems):
            yield replace(entry, copied=True)


def fill(node: Node, word: str, value: Node) -> Node:
    """`node` with `${word}` replaced; a text that is nothing but `${word}` becomes the value itself."""
    if isinstance(node.value, dict):
        return replace(node, value={key: fill(item, word, value) for key, item in node.value.items()})
    if isinstance(node.value, list):
        return replace(node, value=[fill(item, word, value) for item in node.value])
    mark = f"${{{word}}}"
    if node.value == mark:
        return replace(node, value=value.value)
    return replace(node, value=node.value.replace(mark, str(value.value))) if isinstance(node.value, str) else node


# ---- names ----


def name_all(entries: Sequence[Entry], reserved: Iterable[str], problems: Problems) -> list[Entry]:
    """Every step a name of its own: the given one, else the verb, verb-2, …; copies of a given name are numbered likewise."""
    taken = {name: "the recipe itself" for name in reserved}
    for entry in entries:
        given = _given(entry, problems)
        if given and not entry.copied:
            if given in taken:
                problems.add(entry.at("name"), entry.label, f"the name '{given}' is taken by {taken[given]}")
            taken[given] = entry.label
    named = []
    for entry in entries:
        name = given = _given(entry, problems) or entry.verb
        if entry.copied or "name" not in entry.words:
            name = next(n for n in (given, *(f"{given}-{k}" for k in range(2, 9999))) if n not in taken)
        taken.setdefault(name, entry.label)
        named.append(replace(entry, name=name, words={**entry.words, "name": Node(name, entry.at("name"))}))
    return named


def _given(entry: Entry, problems: Problems) -> str:
    if "name" not in entry.words:
        return ""
    name = entry.words["name"].value
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        problems.add(entry.at("name"), entry.label, f"a name is small letters, digits, '-' and '_', not {name!r}")
        return ""
    return str(name)


# ---- overrides ----


@dataclass(frozen=True)
class Change:
    """A word of the recipe given another value: `key` names it as an override does, `where` is the place that errors name."""

    key: str
    value: Node
    where: str


def typed(texts: Sequence[str], problems: Problems) -> list[Change]:
    """Return the changes that `key=value` words make."""
    found = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and key.strip():
            found.append(Change(key.strip(), _value(value, text), text))
        else:
            problems.add(text, "", "an override is written key=value")
    return found


def override(
    changes: Sequence[Change], fields: dict[str, Node], allowed: Sequence[str], entries: list[Entry], problems: Problems
) -> None:
    """Apply changes in order, in place: to a recipe field, or to a step by name (or by verb, if only one step has it)."""
    for change in changes:
        first, *rest = change.key.split(".")
        if first in LISTS:
            problems.add(change.where, "", "a list of steps is changed in the file; one step by its name: sample.n=4")
        elif first == SMALL:
            problems.add(change.where, "", f"what --{SMALL} changes is written in the file; make a change itself: rounds=2")
        elif first in allowed:
            fields[first] = _put(fields.get(first), rest, change.value, change.where, problems)
        elif (at := _step(first, entries, allowed, change.where, problems)) is not None:
            entries[at] = _override_step(entries[at], rest, change.value, change.where, problems)


def _override_step(entry: Entry, rest: list[str], value: Node, text: str, problems: Problems) -> Entry:
    path = rest or [entry.step.short or ""]
    if path == ["name"] or path == [""]:
        problems.add(
            text,
            entry.label,
            "names enter the seeds: give another one in the file" if rest else "name a field: step.field=value",
        )
        return entry
    return replace(entry, words={**entry.words, path[0]: _put(entry.words.get(path[0]), path[1:], value, text, problems)})


def _step(first: str, entries: Sequence[Entry], allowed: Sequence[str], text: str, problems: Problems) -> int | None:
    exact = [at for at, entry in enumerate(entries) if entry.name == first]
    found = exact or [at for at, entry in enumerate(entries) if entry.verb == first]
    if len(found) > 1:
        problems.add(text, "", f"'{first}' could be any of these steps: {', '.join(entries[at].name for at in found)}")
    elif not found:
        known = [*(entry.name for entry in entries), *allowed]
        problems.add(
            text,
            "",
            f"no field or step '{first}'.{did_you_mean(first, known)} Steps: {', '.join(entry.name for entry in entries)}",
        )
    return found[0] if len(found) == 1 else None


def _put(node: Node | None, path: Sequence[str], value: Node, text: str, problems: Problems) -> Node:
    if not path:
        return value
    if node is not None and node.value is not None and not isinstance(node.value, dict):
        problems.add(text, "", f"there is no '{path[0]}' inside {node.value!r}, a plain value ({node.where})")
        return node
    inner = dict(node.value or {}) if node else {}
    inner[path[0]] = _put(inner.get(path[0]), path[1:], value, text, problems)
    return Node(inner, node.where if node else text)


def _value(text: str, where: str) -> Node:
    """The value as YAML would read it; what is not YAML (a template with braces, an expression with a colon) is text."""
    trial = Problems()
    try:
        node = parse(text, where, trial, lines=False)
    except RecipeError:
        return Node(text, where)
    return Node(text, where) if trial.lines or (isinstance(node.value, dict) and not text.lstrip().startswith("{")) else node


# ---- checking ----


def check(entry: Entry, problems: Problems) -> Line | None:
    """The entry as a line, if every round's variant of it is valid."""
    cls, before = entry.step, len(problems.lines)
    words = {field: plain(node) for field, node in entry.words.items()}
    for index in range(1, variants(cls, words) + 1):
        try:
            step = cls.model_validate(pick(cls, words, index))
        except ValidationError as error:
            explain(error, cls, Node(entry.words, entry.where), entry.label, problems)
        else:
            _references(step, entry, problems)
            for field, problem in step.problems():
                problems.add(entry.at(field), entry.label, problem)
    places = {name: node.where for name, node in entry.words.items()}
    return Line(entry.verb, words, entry.where, entry.label, places) if len(problems.lines) == before else None


def _references(step: Step, entry: Entry, problems: Problems) -> None:
    for reference in step.functions():
        if not FUNCTION.fullmatch(reference):
            field = "loss" if reference in step.losses() else "reward"
            problems.add(entry.at(field), entry.label, f"'{reference}' does not name a function: write file.py:function")
