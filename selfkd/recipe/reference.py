"""The recipe reference, printed from the schema: `python -m selfkd.recipe.reference > docs/recipes.md`.

States nothing that is not said by the fields themselves; a test checks that docs/recipes.md is what this prints.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from selfkd.prompts.sources import COMMON_FIELDS, SOURCES
from selfkd.recipe.lines import TRL_LISTS, changing
from selfkd.recipe.schema import Best, Keep, Origin, Prompts, Recipe, Stop, Take
from selfkd.steps import VERBS, Step
from selfkd.steps.check import Check
from selfkd.steps.divergence import Divergence
from selfkd.steps.lora import Lora

GENERATED = (
    "<!-- Generated: python -m selfkd.recipe.reference > docs/recipes.md -->\n"  # of the file; no reader of help needs it
)
INTRO = """\
# Recipes

A recipe is a YAML file: a model, prompts, and the list of steps that a round walks once, in order. `selfkd lint RECIPE` finds every
mistake with its file and line before anything starts; `selfkd run RECIPE --plan` says what it will cost.

- **YAML 1.2 words**: `1e-5` is a number; `on`, `yes` and `12:30` are text; only `true` and `false` are booleans. No tags; no key twice.
- **A step** is its verb and its fields, `- sample: {n: 4}`; a bare value fills the verb's short field, `- score: reward/math.py:correct`;
  `- build` takes every default. Each step has a unique name: the one given, else the verb, `sample-2`, …
- **Any number may be a list**: entry *r* is for round *r*, the last one repeats: `beta: [0.1, 0.1, 5.0]`. So may expressions and models,
  `where: ["mark >= 4", "mark = 5"]`, and the options inside `trl:` (except those that are lists by nature: {lists}). Round 0 uses the first entry.
- **Models** are written `role@when`, when being `now` (the default), `start` (entered the round), `base` (untouched), `warm` (left round 0), `best` or
  `round-3`. In a train step, `from: base` is short for its own role's.
- **Templates** are Jinja, inline or a .j2 file. They see `prompt` (`text`, `answer`, `messages`, `meta` and its columns) and, with `of`, the sample `of`, and
  become the last user message. A line `--- user`, `--- assistant` or `--- system` of the template begins a message of its own, so a teacher can be shown
  examples as turns. What `{{ }}` brings in, or a filter makes, begins none.
- **Chat templates** are the model's own, and are used as they are; `chat: {enable_thinking: false}` gives them words. Where one has no system role,
  a system message opens the next user turn; where it wants turns to alternate, those of one role in a row are joined by a blank line; a date is
  that of the run's creation. A run says once which of these it does; `selfkd show RUN --as-prompted` prints prompts as the model saw them.
- **Expressions** (`where`, `by`, `chosen`, …) are SQL over the columns that `selfkd lint` prints after each step; a window such as
  `OVER (PARTITION BY prompt)` is allowed. A condition that is null drops the row with the reason "unscored".
  A prompt's own columns are written `prompt.NAME`, as in templates: `prompt.level > 3`, `prompt."my column" = 'a'`, `prompt.answer`, `prompt.text`. Numbers are
  numbers there, and a column that mixes types is text. `mean`, `std` (divided by n - 1), `sum`, `min`, `max`, `count` and `count(distinct …)` are over the
  samples of the same prompt: `mean(correct) < 0.8`, `(reward - mean(reward)) / std(reward)`, `count(*)`. These are the live samples that the step works on, before
  its own `where`; where it chooses prompts, all samples so far, dropped ones too. Missing scores count nowhere.
- **`extends: star.yaml`** merges one parent: mappings field by field, lists whole. A prompt source of another kind replaces the parent's.
- **Overrides** on the command line, `sample.n=4 train.trl.learning_rate=2e-5 prompts.train.limit=10 rounds=5`: a recipe field, or a step by
  its name (or by its verb, where only one step has it). Values are read as YAML.
- **`repeat: {times: 3, steps: [...]}`** and **`each: [a, b]`, `as: word`, `steps: [...]`** (side by side; `${word}` stands for a, then for b) unroll into
  plain steps when the recipe loads; names are numbered.
- **Files** (rewards, templates, prompts) are looked for next to the recipe, then next to the one it extends, then in the working
  directory, then among the built-in ones.
- **The test split** steers nothing: every measure step is repeated on it, as `measure-test`, at round 0 and after the last round.
"""


def text() -> str:
    lists = ", ".join(f"`{name}`" for name in sorted(TRL_LISTS))
    parts = [GENERATED + INTRO.replace("{lists}", lists), "## Fields of a recipe\n", _doc(Recipe), *_table(Recipe)]
    for cls, title in (
        (Prompts, "prompts"),
        (Take, "prompts.take"),
        (Origin, "model"),
        (Best, "best"),
        (Stop, "stop"),
        (Keep, "keep"),
    ):
        parts += [f"\n### {title}\n", _doc(cls), *_table(cls)]
    parts += [
        "\n### Prompt sources\n",
        "A source is a mapping with one of these words, and fields beside it. Columns that nothing names become the prompt's meta. A row in which\n"
        "two columns could be the prompt or its answer is refused, with the words that decide.\n",
        *_sources(),
    ]
    parts += ["\n## Verbs\n"]
    for verb, step in VERBS.items():
        parts += [f"### {verb}\n", _doc(step), _short(step), *_table(step), ""]
        if verb == "train":
            blocks: dict[str, type[BaseModel]] = {"lora": Lora, "check": Check, "divergence": Divergence}
            for name, block in blocks.items():
                parts += [f"#### {name}\n", _doc(block), *_table(block), ""]
    return "\n".join(parts).rstrip() + "\n"


def verb_help(verb: str) -> str:
    """What `selfkd help VERB` prints: the step's sentence, and one line per field."""
    step = VERBS[verb]
    width = max(len(field.alias or name) for name, field in step.model_fields.items())
    lines = [
        f"  {(field.alias or name).ljust(width)}  {field.description} {_bracket(field)}".rstrip()
        for name, field in step.model_fields.items()
    ]
    return "\n".join([f"{verb}: {_doc(step).strip()}", _short(step).replace("`", "").strip(), *lines]).replace("\n\n", "\n")


def _bracket(field: FieldInfo) -> str:
    return (
        "[required]" if field.is_required() else f"[{_value(field.default)}]" if field.default not in (None, "", (), {}) else ""
    )


def _doc(cls: type[BaseModel]) -> str:
    return " ".join((cls.__doc__ or "").split()) + "\n"


def _short(step: type[Step]) -> str:
    return f"A bare value is `{step.short}`.\n" if step.short else ""


def _table(cls: type[BaseModel]) -> Iterator[str]:
    yield "| field | kind | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in cls.model_fields.items():
        if not field.exclude:
            cells = (f"`{field.alias or name}`", _kind(cls, name, field), _default(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _sources() -> Iterator[str]:
    yield "| source | meaning | fields of its own |"
    yield "|---|---|---|"
    for kind, source in SOURCES.items():
        yield f"| `{kind}` | {source.meaning} | {', '.join(f'`{field}`' for field in source.fields)} |"
    yield "\n| field of every source | meaning |"
    yield "|---|---|"
    for name, meaning in COMMON_FIELDS.items():
        yield f"| `{name}` | {meaning} |"


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else "" if field.default in (None, "", (), {}) else f"`{_value(field.default)}`"


def _value(value: Any) -> str:
    if isinstance(value, BaseModel):
        return "{" + ", ".join(f"{key}: {_value(item)}" for key, item in value.model_dump(by_alias=True).items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _kind(cls: type[BaseModel], name: str, field: FieldInfo) -> str:
    words = " or ".join(dict.fromkeys(_words(field.annotation)))
    listed = issubclass(cls, Step) and (field.alias or name) in changing(cls)
    return f"{words} (or one per round)" if listed else words


PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "mapping", tuple: "list", list: "list"}


def _words(kind: Any) -> Iterator[str]:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        yield from _words(typing.get_args(kind)[0])
    elif origin is typing.Literal:
        yield from (f"`{_value(choice)}`" for choice in typing.get_args(kind))
    elif origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(kind):
            yield from _words(inner) if inner is not type(None) else ()
    elif origin is tuple and typing.get_args(kind)[0] is not str:
        yield "list of steps"
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield "mapping"
    else:
        yield PLAIN.get(origin or kind, str(kind))


if __name__ == "__main__":
    print(text(), end="")
