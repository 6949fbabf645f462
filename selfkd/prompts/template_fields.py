"""Which fields of a prompt and of a sample a template names, held against those that will be there. Renders nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfkd.core import digest, of_prompts
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.prompts.templates import Template, prompt_of, text_of

PROMPT_FIELDS = ("text", "answer", "messages", "meta")  # of every prompt; its meta columns stand beside them
SAMPLES = ("of", "other")  # the names under which a template is given samples
METHODS = ("get", "items", "keys", "values")  # of a mapping: `prompt.meta` and `of` are mappings
MAYBE = ("defined", "undefined", "default", "d")  # tests and filters that a missing field does not break

FIELD = (nodes.Getattr, nodes.Getitem)  # prompt.solution, and prompt["solution"]

_environment = ImmutableSandboxedEnvironment()


FIRST = 8  # prompts that a template is tried on
STOOD_IN = "1"  # what a sample says that is not there yet


@dataclass(frozen=True)
class Columns:
    """The meta columns of a split: {name: how many of its `rows` prompts have it}, and their types; `first` are some of its prompts."""

    counts: Mapping[str, int] = field(default_factory=dict)
    rows: int = 0
    first: tuple[Mapping[str, Any], ...] = ()
    kinds: Mapping[str, pl.DataType] = field(default_factory=dict)

    @classmethod
    def of(cls, prompts: pl.DataFrame) -> Columns:
        """Return those of a table of prompts."""
        counts = Counter(name for text in prompts["meta"].drop_nulls() for name in json.loads(text))
        first = tuple(prompts.head(FIRST).iter_rows(named=True))
        return cls(counts, prompts.height, first, of_prompts.kinds(prompts["meta"]))


@dataclass(frozen=True)
class Use:
    """One place where a template names a field: of `prompt`, `meta` (of a prompt), `of` or `other`."""

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


def tells_gold(template: Template) -> bool:
    """Whether a template names what a prompt's student does not see: its answer, or a column of it."""
    shown = ("text", "messages")
    named = [use for node in _environment.parse(template.source).find_all(FIELD) if (use := _use(node))]
    return any(use.owner == "meta" or (use.owner == "prompt" and use.name not in shown) for use in named)


def shows_answer(template: Template, prompts: Collection[Mapping[str, Any]]) -> bool:
    """Whether a template shows a prompt's gold answer: it names it, or what it makes of these prompts changes with it."""
    tree = _environment.parse(template.source)
    named = {(use.owner, use.name) for node in tree.find_all(FIELD) if (use := _use(node))}
    if ("prompt", "answer") in named and not any(
        one.name == "prompt" and one.ctx == "store" for one in tree.find_all(nodes.Name)
    ):
        return True
    return any(len({_rendered(template, {**prompt, "answer": _sign(name)}) for name in SAMPLES}) > 1 for prompt in prompts)


def shows_own_answer(template: Template, column: str) -> bool:
    """Whether the template of a prompt source, which sees the columns of a row by their names, shows the one of the gold answer."""
    return column in meta.find_undeclared_variables(_environment.parse(template.source)) or shows_answer(template, ())


def _rendered(template: Template, prompt: Mapping[str, Any]) -> str:
    """Return what a template makes of a prompt and of answers that are not there; '' where it cannot."""
    with suppress(UsageError):
        return template.render(
            prompt=prompt_of(prompt), **{name: StandIn(text=STOOD_IN) for name in SAMPLES}, criterion=STOOD_IN
        )
    return ""


def columns_with_answer(template: Template, prompts: Collection[Mapping[str, Any]]) -> list[str]:
    """Return the columns that a template shows, by name or otherwise, and that hold the gold answer of every one of these prompts, two at least.

    A prompt that states its answer itself, as one of several choices, says nothing of a column.
    """
    named = {use.name for node in _environment.parse(template.source).find_all(FIELD) if (use := _use(node))}
    telling = [one for one in prompts if one["answer"] and not _states(text_of(one["messages"]), one["answer"])]
    held = [
        {name for name, value in json.loads(one["meta"] or "{}").items() if _states(str(value), one["answer"])}
        for one in telling
    ]
    holding = set.intersection(*held) if len(held) > 1 else set()
    return sorted(name for name in holding if name in named or any(_shows_column(template, one, name) for one in telling))


def _shows_column(template: Template, prompt: Mapping[str, Any], column: str) -> bool:
    """Whether what a template makes of a prompt changes with a column: `prompt.meta` shows all of them."""
    values = json.loads(prompt["meta"])
    others = ({**prompt, "meta": json.dumps({**values, column: _sign(name)})} for name in SAMPLES)
    return len({_rendered(template, one) for one in others}) > 1


def _states(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", text, re.IGNORECASE) is not None


def _inside(node: nodes.Node) -> list[Use]:
    return [use for one in (node, *node.find_all(FIELD)) if (use := _use(one))]


def _use(node: nodes.Node) -> Use | None:
    if not isinstance(node, nodes.Getattr | nodes.Getitem):
        return None
    name = node.attr if isinstance(node, nodes.Getattr) else getattr(node.arg, "value", None)
    if not isinstance(name, str):
        return None
    if isinstance(node.node, nodes.Name) and node.node.name in ("prompt", *SAMPLES):
        return Use(node.node.name, name, node.lineno)
    outer = _use(node.node)
    return Use("meta", name, node.lineno) if outer and (outer.owner, outer.name) == ("prompt", "meta") else None


def field_problems(template: Template, columns: Columns | None, of: Collection[str] | None) -> Iterator[str]:
    """Yield what the template names and will not find: `columns` are those of the prompts (None: not known), `of` the samples' own."""
    for use in uses(template):
        place = f"{template.name}:{use.line}"
        if use.owner in SAMPLES:
            yield from _of_problems(use, place, template, of)
        elif columns is not None:
            yield from _prompt_problems(use, place, columns)


def unshown(template: Template, shows: Mapping[str, str], prompts: Collection[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what a template must show and does not, {name: what that is}: of a sample its text, or the sample as a whole.

    A field of a sample is not the sample: `of.chars` alone would have it judged unread. What is named is looked for in what the template
    makes of `prompts`, too: `of.text | length` shows nothing of it.
    """
    said = _renderings(template, shows, prompts)
    tree = _environment.parse(template.source)
    fields = list(tree.find_all(FIELD))
    texts = {(use.owner, use.name) for node in fields if (use := _use(node))}
    inner = {id(node.node) for node in fields if isinstance(node, FIELD) and (use := _use(node)) and use.name not in METHODS}
    whole = {node.name for node in tree.find_all(nodes.Name) if id(node) not in inner}
    for name, what in shows.items():
        named = name in whole or (name, "text") in texts
        if not named or (said and not any(_sign(name) in text for text in said)):
            written = f"{name}.text" if name in SAMPLES else name
            yield f"{template.name}  it does not show {what}: write {{{{ {written} }}}} where it belongs"


def _sign(name: str) -> str:
    """Return digits that stand for a text, so that no filter for letters changes them."""
    return str(digest.seed("shown", name))


def _renderings(template: Template, names: Collection[str], prompts: Collection[Mapping[str, Any]]) -> list[str]:
    """Return what the template makes of prompts, and of signs that stand for what it is given; of those that it can be rendered for."""
    given = {name: StandIn(text=_sign(name)) if name in SAMPLES else _sign(name) for name in names}
    found = []
    for prompt in prompts:
        with suppress(UsageError):
            found.append(template.render(prompt=prompt_of(prompt), **given))
    return found


class StandIn(dict[str, Any]):
    """A sample that is not there yet: whatever is asked of it is a short text."""

    def __missing__(self, name: str) -> str:
        return STOOD_IN

    def __str__(self) -> str:
        return str(self["text"])


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
