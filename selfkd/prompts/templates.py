"""Templates: what a teacher sees in place of the last user message, as Jinja2 text with strict names and a sandbox.

A template sees `prompt` and `of` (the sample it works on, or None). It includes and imports nothing, so its digest is that of
its own text. Nothing here knows a recipe or a model.
"""

from __future__ import annotations

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
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError

Message = Mapping[str, str]
NAMES = ("prompt", "of")  # what a template sees
INLINE = ("{{", "{%", "\n")  # marks of a template that is text in the recipe itself, not the name of a file
TURN = re.compile(r"^--- (user|assistant|system)[ \t]*$", re.MULTILINE)
MOST_CHARS = 1_000_000  # a loop in a template must not fill the memory; the longest contexts in use are near this

_environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False)


class Prompt(SimpleNamespace):
    """A prompt as a template sees it: text, answer, messages, meta, and each meta column by its own name."""

    def __str__(self) -> str:
        return str(self.text)


@dataclass(frozen=True)
class Template:
    """A template ready to render. `name` is the file as found, or `template` for text in the recipe."""

    name: str
    source: str
    compiled: jinja2.Template

    @property
    def digest(self) -> str:
        return digest.of("template", self.source)

    def render(self, **values: Any) -> str:
        """Return the text, stripped. UsageError with the line where a name is missing, or where it grows too long."""
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
            raise UsageError(_describe(error, values), f"{self.name}:{self._line(error)}") from None
        return "".join(text).strip()

    def _line(self, error: Exception) -> int:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == self.name]
        return (frames[-1].lineno or 1) if frames else 1


def _describe(error: Exception, values: Mapping[str, Any]) -> str:
    if isinstance(error, jinja2.UndefinedError):
        return f"{error}. Names here: {', '.join(sorted(values))}"
    return f"{type(error).__name__}: {error}"


def visible_prompt(messages: Sequence[Message], answer: str | None, columns: Mapping[str, Any]) -> Prompt:
    """Return the `prompt` that a template sees. The four fixed names win over meta columns of the same name."""
    fixed = dict(text=text_of(messages), answer=answer, messages=list(messages), meta=dict(columns))
    return Prompt(**{**columns, **fixed})


def text_of(messages: Iterable[Message]) -> str:
    """Return the last user message ("" where there is none): `prompt` in a reward, and `prompt.text` in a template."""
    return next((message["content"] for message in reversed(list(messages)) if message["role"] == "user"), "")


def with_last_message(messages: Sequence[Message], rendered: str) -> list[dict[str, str]]:
    """Return the same conversation with its last user message replaced: a teacher is the student's model with more to read.

    A line `--- user`, `--- assistant` or `--- system` begins a message of its own, so a template can show examples as turns.

    >>> with_last_message([{"role": "user", "content": "2 + 2"}], "--- user\\n1 + 1\\n--- assistant\\n2\\n--- user\\n2 + 2")[1]
    {'role': 'assistant', 'content': '2'}
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    place = places[-1] if places else len(messages)
    copied = [dict(message) for message in messages]
    return [*copied[:place], *turns(rendered), *copied[place + 1 :]]


def turns(rendered: str) -> list[dict[str, str]]:
    """Return the messages of a rendered template; one user message where it has no `--- role` line."""
    first, *rest = TURN.split(rendered)
    if not rest:
        return [{"role": "user", "content": rendered}]
    opening = [{"role": "user", "content": first.strip()}] if first.strip() else []
    return opening + [{"role": role, "content": text.strip()} for role, text in zip(rest[::2], rest[1::2], strict=True)]


def is_inline(reference: str) -> bool:
    """Whether a reference is the text of a template itself, not the name of a file."""
    return any(mark in reference for mark in INLINE)


def load(reference: str, folders: Sequence[Path]) -> Template:
    """Return the template of a file (beside the recipe, in the working directory, built in), or of text in the recipe."""
    if is_inline(reference):
        return compile_template("template", reference)
    path = locate(reference, folders, "recipes", "recipes/templates")
    try:
        return compile_template(str(path), path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text: {error.reason} at byte {error.start}", str(path)) from None


def compile_template(name: str, source: str) -> Template:
    """Return the template of a text; UsageError with the line where it is not Jinja2, or reaches for another file."""
    try:
        tree = _environment.parse(source, name, name)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise UsageError("a template cannot include, import or extend another one", f"{name}:{node.lineno}")
        code = _environment.compile(tree, name, name)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"not a Jinja2 template: {error.message}", f"{name}:{error.lineno}") from None
    return Template(name, source, jinja2.Template.from_code(_environment, code, dict(_environment.globals)))


def problems(reference: str, folders: Sequence[Path], names: Collection[str] = NAMES) -> list[str]:
    """Return what is wrong with a template before any prompt is seen: missing, not Jinja2, or a name it will not be given."""
    try:
        template = load(reference, folders)
    except UsageError as error:
        return [str(error)]
    tree = _environment.parse(template.source)
    unknown = meta.find_undeclared_variables(tree) - set(names) - set(_environment.globals)

    def hint(name: str) -> str:
        return did_you_mean(name, names) or f" Names here: {', '.join(names)}"

    lines = {node.name: node.lineno for node in tree.find_all(nodes.Name) if node.name in unknown}
    return [f"{template.name}:{lines[name]}  unknown name '{name}'.{hint(name)}" for name in sorted(unknown)]
