"""Who is shown the gold answer? A template may show it to a model only where its step says so: `told: own`.

A student that sees the answer learns to copy it, a judge that sees it is a verifier, and a measurement of a model that sees it is no
measurement. Whether a template shows it is seen by what it names and by what it makes of prompts, columns that hold the answer included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

from selfkd.core.yamlfile import Problems
from selfkd.errors import UsageError
from selfkd.prompts import templates
from selfkd.prompts.read import source_words
from selfkd.prompts.template_fields import Columns, columns_with_answer, shows_answer, shows_own_answer
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.step import several

# Templates that a model reads. Those of texts that are scored (target, text, second) and the text of a gold answer show it to nobody.
READ_BY = {
    "sample": {"template": "whoever answers", "begin": "whoever answers, as the beginning of the answer"},
    "judge": {"template": "the judge"},
    "score": {"template": "the model that scores", "given": "the model that scores"},
    "measure": {"template": "the model that is measured"},
    "build": {"teacher": "the teacher", "view": "the student", "completion": "the student, as what it is to say"},
}
DECLARE = "If it is meant, write told: own in this step"
EVERYBODY = "to everybody who reads the prompt, the student in training and the model that is measured included"
TO_A_TEACHER = "Leave it out; a sample step tells it to a teacher alone (template, and told: own)"


def look_at_gold(recipe: Recipe, prompts: Mapping[str, Columns], problems: Problems) -> None:
    """Add each template that shows the gold answer to a model whose step does not say so; `prompts` are those that were read."""
    _sources(recipe, problems)
    told: set[str] = set()  # streams whose samplers saw it
    for line in (line for part in LISTS for line in getattr(recipe, part)):
        shown = list(_shown(line, recipe, prompts))
        for field, said, whom in shown if not _declared(line) else ():
            problems.add(line.place(field), line.label, f"'{field}' shows {said} to {whom}. {DECLARE}")
        _told_streams(line, bool(shown), told, problems)


def _declared(line: Line) -> bool:
    return "told" in line.words


def _shown(line: Line, recipe: Recipe, prompts: Mapping[str, Columns]) -> Iterator[tuple[str, str, str]]:
    """Yield (field, what its template shows of the gold answer, to whom)."""
    columns = prompts.get(line.at(1).split_asked())
    first = columns.first if columns else ()
    for field, whom in READ_BY.get(line.verb, {}).items():
        for reference in several(line.words.get(field)):
            with suppress(UsageError):  # of a template that cannot be read, the walk says so
                template = templates.load(reference, recipe.folders)
                if shows_answer(template, first):
                    yield field, "the gold answer", whom
                elif held := columns_with_answer(template, first):
                    yield field, f"'{held[0]}', which holds the gold answer,", whom


def _told_streams(line: Line, shown: bool, told: set[str], problems: Problems) -> None:
    """Note the stream of a step that shows the gold answer; a student that sees what its sampler was asked sees it too."""
    step = line.at(1)
    if line.verb in ("sample", "judge") and shown:
        told.add(str(getattr(step, "as_")))  # noqa: B009 - both verbs have it
    if line.verb != "build" or getattr(step, "sees", "") != "asked" or _declared(line):
        return
    if seen := sorted(told & _streams(line, told)):
        said = f"'sees: asked' shows the gold answer to the student, for whoever answered in '{seen[0]}' was told it"
        problems.add(line.place("sees"), line.label, f"{said}. {DECLARE}")


def _streams(line: Line, told: set[str]) -> set[str]:
    """Return the streams that rows are made of, where the step names them; else all that there are."""
    named = {line.words[name] for name in ("of", "chosen", "rejected") if line.words.get(name)}
    return named if all(isinstance(one, str) and one.isidentifier() for one in named) and named else told


def _sources(recipe: Recipe, problems: Problems) -> None:
    """A template of a prompt source is what everybody reads, so it cannot show the answer at all."""
    for split, source in recipe.splits().items():
        words = source_words(source)
        if not words.get("template"):
            continue
        with suppress(UsageError):
            template = templates.load(words["template"], recipe.folders)
            if shows_own_answer(template, words.get("answer") or "answer"):
                named = (f"prompts.{split}.template", f"prompts.{split}", "prompts.held", "prompts")
                at = next((recipe.places[name] for name in named if name in recipe.places), "")
                problems.add(at, f"prompts.{split}", f"'template' shows the gold answer {EVERYBODY}. {TO_A_TEACHER}")
