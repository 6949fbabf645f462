"""A chat template as text: where a model folder keeps it, which words it knows, and how it is rendered without a tokenizer.

What a model is really shown is rendered by transformers (tokens.py); here stand the same rules in Jinja alone, so that `lint` needs no
engine. Imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfkd.backend.chat import CLOCK, Message
from selfkd.core.wording import first_line

DEFAULT = "default"  # of several templates, the one that is used
Write = Callable[[Sequence[Message], bool], str]  # messages, and whether the model's turn is opened behind them


def said_by(error: Exception) -> str:
    """Return what a template said when it refused, in one line; an error that it did not raise itself with its kind."""
    refusal = type(error) is jinja2.TemplateError
    return first_line(error) if refusal else f"{type(error).__name__}: {first_line(error)}"


# ---- files ----


def template_of(folder: Path) -> str | None:
    """Return the chat template of a model folder; None where it has none, or keeps it where only transformers finds it."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        named = {one["name"]: one["template"] for one in found} if isinstance(found, list) else found
        chosen = named.get(DEFAULT) if isinstance(named, dict) else named
        if isinstance(chosen, str):
            return chosen
    return None


def tokens_of(folder: Path) -> dict[str, str]:
    """Return the special tokens that a template may name, {bos_token: text}."""
    said = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in said.items()
        if name.endswith("_token")
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


# ---- Jinja, by the rules of transformers ----


class _Generation(Extension):
    """{% generation %} marks what an assistant says; it writes what stands inside it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, **more: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **more)  # Jinja's own would escape HTML


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _to_json
    made.globals.update({"raise_exception": _refuse, CLOCK: lambda form: datetime.now().strftime(form)})
    return made


@lru_cache(maxsize=16)
def names_in(source: str) -> frozenset[str]:
    """Return the names that a template takes from outside; none of one that is not Jinja, which rendering it will say."""
    try:
        tree = _environment().parse(source)
    except jinja2.TemplateSyntaxError:
        return frozenset()
    calls_clock = any(node.name == CLOCK for node in tree.find_all(nodes.Name))  # a global, so it is declared
    return frozenset(meta.find_undeclared_variables(tree)) | ({CLOCK} if calls_clock else set())


def writer(source: str, tokens: Mapping[str, str], given: Mapping[str, Any]) -> Write:
    """Return what renders messages with a template, its special `tokens` and what it is `given`."""
    compiled = _environment().from_string(source)
    words = {"tools": None, "documents": None, **tokens, **given}
    return lambda messages, opens: compiled.render(messages=list(messages), add_generation_prompt=opens, **words)
