"""Templates: what a teacher sees in place of the last user message, as Jinja2 text with strict names and a sandbox.

A template sees `prompt` and `of` (the sample it works on, or None). It includes and imports nothing, so its digest is that of
its own text. Nothing here knows a recipe or a model.
"""

from __future__ import annotations

import itertools
import json
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

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
TURN = re.compile(r"^--- (user|assistant|system)[ \t]*$", re.MULTILINE)  # begins a message, where it is the template's own line
COMPUTED = re.compile(r"^--- \Z", re.MULTILINE)
LINE_END = re.compile(r"[ \t]*(\n|\Z)")
FILE_NAME = re.compile(r"\S+\.\w+")  # hint.j2, but not "Think hard."
MOST_CHARS = 1_000_000  # a loop in a template must not fill the memory; the longest contexts in use are near this


class Rendered(str):
    """A rendered text that knows which of its lines begin a message: `turns` holds (place, role) of each, in order.

    Every other method of `str` returns a plain text: what a filter made has no turns, and what came in as data has none either.
    """

    turns: tuple[tuple[int, str], ...]

    def __new__(cls, text: str, turns: Iterable[tuple[int, str]]) -> Self:
        self = super().__new__(cls, text)
        self.turns = tuple(turns)
        return self

    def __str__(self) -> str:  # Jinja calls str() on all that it writes; that of the base class would forget the turns
        return self

    def strip(self, chars: str | None = None, /) -> Rendered:  # keeps the turns: `{{ example(1) | trim }}` is common
        before = len(self) - len(self.lstrip(chars))
        return Rendered(super().strip(chars), [(place - before, role) for place, role in self.turns])


def join(pieces: Iterable[str]) -> str:
    """Return the pieces as one text; it is `Rendered` where one of them is."""
    pieces = list(pieces)
    text = "".join(pieces)
    if not any(isinstance(piece, Rendered) for piece in pieces):
        return text
    begins = itertools.accumulate(map(len, pieces), initial=0)
    marked = ((begin, piece) for begin, piece in zip(begins, pieces, strict=False) if isinstance(piece, Rendered))
    return Rendered(text, [(begin + place, role) for begin, piece in marked for place, role in piece.turns])


class Environment(ImmutableSandboxedEnvironment):
    """Jinja2 in its sandbox, which writes the template's own `--- role` lines as `Rendered` pieces."""

    concat = staticmethod(join)  # of captured text: `{% set %}` blocks and macros
    turn_user, turn_assistant, turn_system = (Rendered(f"--- {role}", [(0, role)]) for role in ("user", "assistant", "system"))


TURN_NAMES = ("turn_user", "turn_assistant", "turn_system")

_environment = Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False, autoescape=False)


def mark_turns(tree: nodes.Template, name: str) -> bool:
    """Replace the `--- role` lines of a template's own text by expressions that write them as `Rendered` pieces; are there any?

    A line counts where it stands alone in the source: nothing but block tags and comments around it, no `{{ }}`.
    """
    for output in tree.find_all(nodes.Output):
        parts: list[nodes.Expr] = []
        for is_text, group in itertools.groupby(output.nodes, lambda node: isinstance(node, nodes.TemplateData)):
            together = list(group)
            parts += [joined(together)] if is_text else together  # a comment parts a text in two
        refuse_computed_roles(parts, name)
        last = len(parts) - 1
        output.nodes = [
            marked for place, part in enumerate(parts) for marked in with_turns(part, before=place > 0, behind=place < last)
        ]
    return any(node.name in TURN_NAMES for node in tree.find_all(nodes.EnvironmentAttribute))


def refuse_computed_roles(parts: Sequence[nodes.Expr], name: str) -> None:
    """Raise UsageError for a line `--- {{ role }}`, which cannot begin a message: what `{{ }}` writes is data."""
    for place, (text, part) in enumerate(itertools.pairwise(parts)):
        found = COMPUTED.search(text.data) if isinstance(text, nodes.TemplateData) else None
        opens = found and (found.start() > 0 or place == 0)
        after = parts[place + 2] if place + 2 < len(parts) else None
        closes = after is None or (isinstance(after, nodes.TemplateData) and LINE_END.match(after.data))
        if opens and closes:
            fix = "Write the role out: {% if message.role == 'user' %}, and `--- user` as a line of its own."
            raise UsageError("`--- {{ }}` does not begin a message", f"{name}:{part.lineno}", fix)


def joined(texts: list[Any]) -> nodes.Expr:
    return nodes.TemplateData("".join(text.data for text in texts), lineno=texts[0].lineno)


def with_turns(node: nodes.Expr, before: bool, behind: bool) -> Iterator[nodes.Expr]:
    """Yield the parts of a text; `before` and `behind` tell whether `{{ }}` touches it there, so that its edge is no edge of a line."""
    if not isinstance(node, nodes.TemplateData):
        yield node
        return
    text, written = node.data, 0
    for found in TURN.finditer(text):
        if (before and found.start() == 0) or (behind and found.end() == len(text)):
            continue
        yield nodes.TemplateData(text[written : found.start()], lineno=node.lineno)
        yield nodes.EnvironmentAttribute(f"turn_{found[1]}", lineno=node.lineno)
        written = found.end()
    yield nodes.TemplateData(text[written:], lineno=node.lineno)


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
    has_turns: bool = False

    @property
    def digest(self) -> str:
        return digest.of("template", self.source)

    def render(self, **values: Any) -> str:
        """Return the text, stripped; `Rendered` where it has turns. UsageError with the line of a missing name, or where it grows too long."""
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
        return (join(text) if self.has_turns else "".join(text)).strip()

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


def prompt_of(row: Mapping[str, Any]) -> Prompt:
    """Return the `prompt` that a template sees of a row of table `prompts`."""
    return visible_prompt(row["messages"], row["answer"], json.loads(row["meta"] or "{}"))


def text_of(messages: Iterable[Message]) -> str:
    """Return the last user message ("" where there is none): `prompt` in a reward, and `prompt.text` in a template."""
    return next((message["content"] for message in reversed(list(messages)) if message["role"] == "user"), "")


def with_last_message(messages: Sequence[Message], rendered: str) -> list[dict[str, str]]:
    """Return the same conversation with its last user message replaced: a teacher is the student's model with more to read.

    Turns of the rendered text are messages of their own, so a template can show examples.

    >>> shown = compile_template("example", "--- user\\n1 + 1\\n--- assistant\\n2\\n--- user\\n{{ sum }}").render(sum="2 + 2")
    >>> with_last_message([{"role": "user", "content": "2 + 2"}], shown)[1]
    {'role': 'assistant', 'content': '2'}
    """
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    place = places[-1] if places else len(messages)
    copied = [dict(message) for message in messages]
    return [*copied[:place], *split_turns(rendered), *copied[place + 1 :]]


def split_turns(rendered: str) -> list[dict[str, str]]:
    """Return the messages of a rendered template; one user message where it has no turns."""
    if not isinstance(rendered, Rendered):
        return [{"role": "user", "content": rendered}]
    begins = [place for place, _ in rendered.turns]
    texts = [rendered[begin:end].strip() for begin, end in itertools.pairwise([0, *begins, len(rendered)])]
    opening = [{"role": "user", "content": texts[0]}] if texts[0] else []
    turns = zip(rendered.turns, texts[1:], strict=True)
    return opening + [{"role": role, "content": text.removeprefix(f"--- {role}").strip()} for (_, role), text in turns]


def is_inline(reference: str) -> bool:
    """Whether a reference is the text of a template itself, not the name of a file."""
    return any(mark in reference for mark in INLINE)


def load(reference: str, folders: Sequence[Path]) -> Template:
    """Return the template of a file (beside the recipe, in the working directory, built in), or of text in the recipe."""
    if is_inline(reference):
        return compile_template("template", reference)
    try:
        path = locate(reference, folders, "recipes", "recipes/templates")
    except UsageError:
        if FILE_NAME.fullmatch(reference):
            raise
        fix = f"Say where the prompt stands: '{reference} {{{{ prompt.text }}}}'"
        raise UsageError(f"'{reference}' is neither the name of a file nor a template, which names `prompt`", "", fix) from None
    try:
        return compile_template(str(path), path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UsageError(f"not UTF-8 text: {error.reason}", f"{path}:{line}", "Save the file as UTF-8.") from None


def compile_template(name: str, source: str) -> Template:
    """Return the template of a text; UsageError with the line where it is not Jinja2, or reaches for another file."""
    try:
        tree = _environment.parse(source, name, name)
        for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)):
            raise UsageError("a template cannot include, import or extend another one", f"{name}:{node.lineno}")
        has_turns = mark_turns(tree, name)
        code = _environment.compile(tree, name, name)
    except jinja2.TemplateSyntaxError as error:
        raise UsageError(f"not a Jinja2 template: {error.message}", f"{name}:{error.lineno}") from None
    return Template(name, source, jinja2.Template.from_code(_environment, code, dict(_environment.globals)), has_turns)


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
