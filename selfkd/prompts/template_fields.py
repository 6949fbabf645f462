"""Which fields of a prompt and of a sample a template names, held against those that will be there. Renders nothing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfkd.core.wording import did_you_mean
from selfkd.prompts.templates import Template

PROMPT_FIELDS = ("text", "answer", "messages", "meta")  # of every prompt; its meta columns stand beside them
METHODS = ("get", "items", "keys", "values")  # of a mapping: `prompt.meta` and `of` are mappings
MAYBE = ("defined", "undefined", "default", "d")  # tests and filters that a missing field does not break

FIELD = (nodes.Getattr, nodes.Getitem)  # prompt.solution, and prompt["solution"]

_environment = ImmutableSandboxedEnvironment()


FIRST = 8  # prompts that a template is tried on


@dataclass(frozen=True)
class Columns:
    """The meta columns of a split: {name: how many of its `rows` prompts have it}; `first` are some of its prompts."""

    counts: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0
    first: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, prompts: pl.DataFrame) -> Columns:
        """Return those of a table of prompts."""
        counts = Counter(name for text in prompts["meta"].drop_nulls() for name in json.loads(text))
        return cls(counts, prompts.height, tuple(prompts.head(FIRST).iter_rows(named=True)))


@dataclass(frozen=True)
class Use:
    """One place where a template names a field: of `prompt`, `meta` (of a prompt) or `of`."""

    owner: str
    name: str
    line: int


def uses(template: Template) -> list[Use]:
    """Return the fields that the template cannot do without, each once, in order; none of a name that it gives itself."""
    tree = _environment.parse(template.source)
    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx == "store"}
    judged = [found for node in tree.find_all(FIELD) if (found := _use(node))]
    careful = [
        part
        for node in tree.find_all((nodes.Test, nodes.Filter))
        if node.name in MAYBE and node.node
        for part in _inside(node.node)
    ]
    maybe = {(one.owner, one.name) for one in careful}
    first: dict[tuple[str, str], Use] = {}
    for one in sorted(judged, key=lambda use: use.line):
        if one.owner not in own and (one.owner, one.name) not in maybe:
            first.setdefault((one.owner, one.name), one)
    return list(first.values())


def _inside(node: nodes.Node) -> list[Use]:
    return [use for one in (node, *node.find_all(FIELD)) if (use := _use(one))]


def _use(node: nodes.Node) -> Use | None:
    if not isinstance(node, nodes.Getattr | nodes.Getitem):
        return None
    name = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    if not isinstance(name, str):
        return None
    if isinstance(node.node, nodes.Name) and node.node.name in ("prompt", "of"):
        return Use(node.node.name, name, node.lineno)
    outer = _use(node.node)
    return Use("meta", name, node.lineno) if outer and (outer.owner, outer.name) == ("prompt", "meta") else None


def field_problems(template: Template, columns: Columns | None, of: Collection[str] | None) -> Iterator[str]:
    """Yield what the template names and will not find: `columns` are those of the prompts (None: not known), `of` the samples' own."""
    for use in uses(template):
        place = f"{template.name}:{use.line}"
        if use.owner == "of":
            yield from _of_problems(use, place, template, of)
        elif columns is not None:
            yield from _prompt_problems(use, place, columns)


def _prompt_problems(use: Use, place: str, columns: Columns) -> Iterator[str]:
    fixed = PROMPT_FIELDS if use.owner == "prompt" else METHODS
    if use.name in fixed:
        return
    have = columns.counts.get(use.name, 0)
    if not have:
        known = [*(fixed if use.owner == "prompt" else ()), *sorted(columns.counts)]
        yield f"{place}  no prompt has '{use.name}'.{did_you_mean(use.name, known) or ' There is: ' + (', '.join(known) or 'nothing')}"
    elif have < columns.rows:
        lacking = f"{columns.rows - have} of {columns.rows} prompts have no '{use.name}'"
        yield f"{place}  {lacking}: give them one, or write {use.name} | default('')"


def _of_problems(use: Use, place: str, template: Template, of: Collection[str] | None) -> Iterator[str]:
    if of is None:
        tree = _environment.parse(template.source)
        tests = [*(node.test for node in tree.find_all(nodes.If)), *(node.test for node in tree.find_all(nodes.CondExpr))]
        if not any(map(_names_of, tests)):
            yield f"{place}  '{use.name}' of nothing: this step works on prompts, so `of` is None here"
    elif use.name not in (*of, *METHODS):
        yield f"{place}  a sample has no '{use.name}' here.{did_you_mean(use.name, of) or ' There is: ' + ', '.join(of)}"


def _names_of(node: nodes.Node) -> bool:
    return (isinstance(node, nodes.Name) and node.name == "of") or any(name.name == "of" for name in node.find_all(nodes.Name))
