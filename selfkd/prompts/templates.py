"""Templates: what a teacher or a judge is told, as Jinja2 text with strict names and a sandbox.

A template sees `prompt`, `of` (the sample it works on) and `group`, and writes the last user message. It stands alone: no
includes, no imports, so its digest is that of its own text. Nothing here knows a recipe or a model.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfkd.core import digest
from selfkd.core.files import locate
from selfkd.errors import UsageError

Message = Mapping[str, str]
NAMES = ("prompt", "of", "group")
INLINE = ("{{", "{%", "\n")
TURN = re.compile(r"^--- (user|assistant|system)[ \t]*$", re.MULTILINE)
MOST_CHARS = 1_000_000  # a loop in a template must not fill the memory; the longest contexts in use are near this

_environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False)


class Prompt(SimpleNamespace):
    """A prompt as a template sees it: text, answer, messages, meta, and each meta column by its own name."""

    def __str__(self) -> str:
        return str(self.text)


@dataclass(frozen=True)
class Template:
    """`name` is the file as found, or `template` for text in the recipe."""

    name: str
    source: str
    compiled: jinja2.Template

    @property
    def digest(self) -> str:
        return digest.of("template", self.source)

    def __call__(self, **values: Any) -> str:
        return self.render(**values)

    def render(self, **values: Any) -> str:
        """The text, without white space around it. UsageError with the line where a name is missing or it grows too long."""
        text, size = [], 0
        try:
            for piece in self.compiled.generate(**values):
                text.append(piece)
                size += len(piece)
                if size > MOST_CHARS:
                    raise UsageError(f"the text grew beyond {MOST_CHARS} characters", self.name, "Shorten a loop or a column.")
        except UsageError:
            raise
        except Exception as error:  # an expression of the user's, so any exception is possible
            raise UsageError(self.told(error, values), f"{self.name}:{self.line(error)}") from None
        return "".join(text).strip()

    def told(self, error: Exception, values: Mapping[str, Any]) -> str:
        if isinstance(error, jinja2.UndefinedError):
            return f"{error}. Names here: {', '.join(sorted(values))}"
        return f"{type(error).__name__}: {error}"

    def line(self, error: Exception) -> int:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.name]
        return (frames[-1].lineno or 1) if frames else 1


def view(messages: Sequence[Message], answer: str | None, columns: Mapping[str, Any]) -> Prompt:
    """The `prompt` of a template. The four fixed names win over meta columns of the same name."""
    fixed = dict(text=text_of(messages), answer=answer, messages=list(messages), meta=dict(columns))
    return Prompt(**{**columns, **fixed})


def text_of(messages: Iterable[Message]) -> str:
    """The last user message: what `prompt` means in a reward and `prompt.text` in a template."""
    return next((message["content"] for message in reversed(list(messages)) if message["role"] == "user"), "")


def ask(messages: Sequence[Message], rendered: str) -> list[dict[str, str]]:
    """The same conversation with its last user message replaced: a teacher is the student's model, told more.

    A line `--- user`, `--- assistant` or `--- system` begins a message of its own, so a template can show examples as turns.

    >>> ask([{"role": "user", "content": "2 + 2"}], "--- user\\n1 + 1\\n--- assistant\\n2\\n--- user\\n2 + 2")[1]
    {'role': 'assistant', 'content': '2'}
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    place = places[-1] if places else len(messages)
    asked = [dict(message) for message in messages]
    return [*asked[:place], *turns(rendered), *asked[place + 1 :]]


def turns(rendered: str) -> list[dict[str, str]]:
    """The messages of a rendered template; one user message where it has no `--- role` line."""
    first, *rest = TURN.split(rendered)
    if not rest:
        return [{"role": "user", "content": rendered}]
    opening = [{"role": "user", "content": first.strip()}] if first.strip() else []
    return opening + [{"role": role, "content": text.strip()} for role, text in zip(rest[::2], rest[1::2], strict=True)]


def load(reference: str, folders: Sequence[Path]) -> Template:
    """A template from a file (next to the recipe, in the working directory, built in), or from text in the recipe itself."""
    if any(mark in reference for mark in INLINE):
        return compiled("template", reference)
    path = locate(reference, folders, "recipes", "recipes/templates")
    try:
        return compiled(str(path), path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error.reason} at byte {error.start}", str(path)) from None


def compiled(name: str, source: str) -> Template:
    try:
        tree = _environment.parse(source, name, name)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise UsageError("a template stands alone: no include, import or extends", f"{name}:{node.lineno}")
        code = _environment.compile(tree, name, name)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"not a Jinja2 template: {error.message}", f"{name}:{error.lineno}") from None
    return Template(name, source, jinja2.Template.from_code(_environment, code, dict(_environment.globals)))


def problems(reference: str, folders: Sequence[Path], names: Collection[str] = NAMES) -> list[str]:
    """What is wrong with a template before any prompt is seen: missing, not Jinja2, or a name nobody will give it."""
    try:
        template = load(reference, folders)
    except UsageError as error:
        return [str(error)]
    tree = _environment.parse(template.source)
    unknown = meta.find_undeclared_variables(tree) - set(names) - set(_environment.globals)
    lines = {node.name: node.lineno for node in tree.find_all(nodes.Name) if node.name in unknown}
    return [f"{template.name}:{lines[name]}  unknown name '{name}'{_near(name, names)}" for name in sorted(unknown)]


def _near(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f". Did you mean '{close[0]}'?" if close else f" (names here: {', '.join(names)})"
