"""What pydantic found wrong with a recipe's words, said plainly and at the line where each word stands."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from selfkd.core.wording import did_you_mean
from selfkd.core.yamlfile import Node, Problems

MEANINGS = {
    "string_type": "should be text, not {given}",
    "int_type": "should be a whole number, not {given}",
    "int_parsing": "should be a whole number, not {given}",
    "int_from_float": "should be a whole number, not {given}",
    "float_type": "should be a number, not {given}",
    "float_parsing": "should be a number, not {given}",
    "finite_number": "should be a finite number, not {given}",
    "bool_type": "should be true or false, not {given}",
    "bool_parsing": "should be true or false, not {given}",
    "dict_type": "should be a mapping (name: value), not {given}",
    "model_type": "should be a mapping (name: value), not {given}",
    "tuple_type": "should be a list, not {given}",
    "greater_than": "should be above {gt}, not {given}",
    "greater_than_equal": "should be at least {ge}, not {given}",
    "less_than": "should be below {lt}, not {given}",
    "less_than_equal": "should be at most {le}, not {given}",
    "string_too_short": "should not be empty",
    "too_short": "should not be empty",
    "string_pattern_mismatch": "should be letters, digits, '.', '_' and '-', not {given}",
    "literal_error": "should be {expected}, not {given}",
}


@cache
def names(cls: type[BaseModel]) -> tuple[str, ...]:
    """The fields a person may write, by the names they write."""
    return tuple(field.alias or name for name, field in cls.model_fields.items() if not field.exclude)


@dataclass(frozen=True)
class _Finding:
    """One of pydantic's findings: the path of fields that leads to it, where that is written, and the model whose field it is."""

    item: Any
    path: tuple[Any, ...]
    place: str
    model: type[BaseModel]


def explain(error: ValidationError, cls: type[BaseModel], node: Node, label: str, problems: Problems) -> None:
    """Add pydantic's findings in plain words, each at its line, and each mistake once."""
    found = [_located(item, node, cls) for item in error.errors()]
    misspelt = {str(one.item["loc"][-1]) for one in found if one.item["type"] == "extra_forbidden"}
    told: set[tuple[Any, ...]] = set()
    for one in found:
        if one.path in told or _looked_deeper(one, found) or _is_misspelt(one, misspelt):
            continue
        told.add(one.path)
        *outer, field = one.path or ("",)
        inside = ".".join([*([label] if label else []), *map(str, outer)])
        problems.add(one.place, inside, _say(one.item, str(field), names(one.model)))


def _looked_deeper(finding: _Finding, found: Sequence[_Finding]) -> bool:
    """A union reports each of its branches: one that got further into the value says more than this one."""
    depth = len(finding.path)
    return depth > 0 and any(other.path[:depth] == finding.path and len(other.path) > depth for other in found)


def _is_misspelt(finding: _Finding, misspelt: Iterable[str]) -> bool:
    """Whether a missing field is there under a likely misspelling, which has a message of its own."""
    if finding.item["type"] != "missing":
        return False
    known = names(finding.model)
    return any(f"'{finding.path[-1]}'" in did_you_mean(word, known) for word in misspelt)


def _located(item: Any, node: Node, cls: type[BaseModel]) -> _Finding:
    """Follow a finding's location through the nodes; the parts that name a union's branch are left out of its path."""
    path: list[Any] = []
    owner: type[BaseModel] = cls
    model: type[BaseModel] | None = cls
    for part in item["loc"]:
        here = isinstance(node.value, dict) and part in node.value
        if not here and (model is None or part not in names(model)):
            continue
        path.append(part)
        owner = model or owner
        model = _inner(model, part) if model and part in names(model) else model  # a key of a mapping of models is no field
        node = node.value[part] if here else node
    return _Finding(item, tuple(path), node.where, owner)


def _inner(model: type[BaseModel], part: Any) -> type[BaseModel] | None:
    """The model that the field holds, or of which it holds a mapping, if it does."""
    annotations = [field.annotation for name, field in model.model_fields.items() if part == (field.alias or name)]
    kinds = [kind for annotation in annotations for kind in _kinds(annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield a type and those that it is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _kinds(inner)


def _say(item: Any, field: str, known: Sequence[str]) -> str:
    if item["type"] == "extra_forbidden":
        return f"no field '{field}'.{did_you_mean(field, known) or ' Fields: ' + ', '.join(known)}"
    if item["type"] == "missing":
        return f"'{field}' is missing"
    if item["type"] == "value_error":
        text = str(item["ctx"]["error"])
        return f"'{field}' {text}" if field else text
    given = item["input"] if not isinstance(item["input"], dict) else "a mapping"
    words = {"given": repr(given) if isinstance(given, str) else given, **_yaml_words(item.get("ctx", {}))}
    shown = MEANINGS[item["type"]].format(**words) if item["type"] in MEANINGS else item["msg"]
    guess = (
        did_you_mean(given, re.findall(r"'([^']+)'", shown)[:-1])
        if item["type"] == "literal_error" and isinstance(given, str)
        else ""
    )
    return f"'{field}' {shown}.{guess}" if guess else f"'{field}' {shown}"


def _yaml_words(context: Mapping[str, Any]) -> dict[str, Any]:
    """pydantic writes choices as Python does; a recipe is YAML."""
    return {
        key: value.replace("True", "true").replace("False", "false") if key == "expected" else value
        for key, value in context.items()
    }
