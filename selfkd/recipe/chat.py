"""What `lint` finds of a model's chat template where the model is on this machine: words that nothing reads, prompts it refuses.

Reads text files of the model's folder only; a model on a hub, or in a GGUF file, is looked at when the run brings it in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend import chat_trial
from selfkd.backend.chat import OWNED
from selfkd.backend.chat_template import Write, said_by, template_of, tokens_of, writer
from selfkd.backend.conversations import Refused, Shape, shapes, tried
from selfkd.backend.model_files import find_model
from selfkd.backend.tokens import opening
from selfkd.core.yamlfile import Problems
from selfkd.errors import SelfkdError, UsageError
from selfkd.prompts import templates
from selfkd.prompts.read import places_of
from selfkd.prompts.template_fields import StandIn
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe
from selfkd.steps.context import Messages, Render, Row
from selfkd.steps.question import Question

Frames = Mapping[str, pl.DataFrame]


def owned_words(recipe: Recipe, problems: Problems) -> None:
    """Add a problem for each word of `chat` that is not the recipe's to give."""
    for word in recipe.chat:
        if word in OWNED:
            problems.add(recipe.places.get(f"chat.{word}", ""), "chat", f"'{word}' is not for this mapping: {OWNED[word]}")


@dataclass
class ChatFindings:
    """problems stop a run; notes do not."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look_at_chat(recipe: Recipe, frames: Frames) -> ChatFindings:
    """Return what is found with the tokenizer's files of the model; nothing where they are not at hand."""
    found, folder = ChatFindings(), find_model(recipe.model_source()["path"])
    if folder is None or not (folder / "tokenizer_config.json").is_file():
        where = f"{recipe.places.get('chat', '')}  " if recipe.chat else ""
        said = f"{where}chat: the model's template cannot be read here, so its words and the prompts are tried when a run brings the model in"
        found.notes += [said.strip()] if recipe.chat else []
        return found
    source = template_of(folder)
    for word, problem in chat_trial.unknown_words(source, recipe.chat):
        at = recipe.places.get(f"chat.{word}", "")
        found.problems.append(f"{at}  chat: {problem}".strip())
    found.notes += cut_from_texts(recipe, folder)
    if source is not None and not found.problems:
        _try_prompts(recipe, frames, source, tokens_of(folder), found)
    return found


def _try_prompts(recipe: Recipe, frames: Frames, source: str, tokens: Mapping[str, str], found: ChatFindings) -> None:
    now = datetime.now(UTC).isoformat()
    try:
        write = writer(source, tokens, recipe.chat)
    except Exception as error:  # a template is a program of somebody else's
        found.problems.append(f"model: its chat template cannot be read: {said_by(error)}")
        return
    chat = chat_trial.settled(source, write, recipe.chat, now)
    refused, counts = tried(_shapes(recipe, frames), lambda messages: _shown(write, chat.arranged(messages)))
    found.problems += [f"{one['step']}: {_placed(one, recipe)}: {one['said']}" for one in refused]
    found.notes += chat_trial.remarks(write, chat, counts)


def _shown(write: Write, messages: Messages) -> str:
    try:
        return write(messages, True)
    except Exception as error:
        turns = ", ".join(message["role"] for message in messages)
        raise UsageError(f"the model's chat template refuses it: {said_by(error)} (turns: {turns})") from None


def _placed(one: Refused, recipe: Recipe) -> str:
    found = places_of(recipe.splits()[one["split"]], recipe.folders, one["split"], [one["id"]]).get(one["id"])
    return f"{found}: {one['place'].partition(': ')[2]}" if found else one["place"]


def _shapes(recipe: Recipe, frames: Frames) -> list[Shape]:
    """Return the shapes of all that the steps ask, each with how many prompts have it; a recipe's template is rendered once for each."""
    found: dict[tuple[str, ...], Shape] = {}
    for question in recipe.questions():
        for shape in shapes(frames[question.split].iter_rows(named=True)) if question.split in frames else ():
            with suppress(SelfkdError):  # of a template: lint says elsewhere what is wrong with it
                asked = Shape(shape.count, _asked(shape.first, question, recipe))
                before = found.get(asked.roles)
                found[asked.roles] = Shape(before.count + asked.count, before.first) if before else asked
    return list(found.values())


def _asked(row: Mapping[str, Any], question: Question, recipe: Recipe) -> dict[str, Any]:
    of = StandIn() if question.about_samples else None
    messages = question.messages(dict(row), _render(question, recipe), of, **dict.fromkeys(question.more, StandIn()))
    place = f"{row['source']}: {opening(row['messages'])}"
    return {"id": row["id"], "split": question.split, "place": place, "step": question.step, "messages": messages}


def _render(question: Question, recipe: Recipe) -> Render | None:
    if not question.template:
        return None
    template = templates.load(question.template, recipe.folders)

    def render(prompt: Row, messages: Messages, of: Row | None = None, **more: Any) -> Messages:
        return templates.with_last_message(messages, template.render(prompt=templates.prompt_of(prompt), of=of, **more))

    return render


# ---- what rewards see ----


def cut_from_texts(recipe: Recipe, folder: Path) -> list[str]:
    """Return a note for each text that a reward is told to look for and that is a special token: it is cut from what rewards see."""
    special = special_tokens(folder)
    steps = [line.at(1) for part in LISTS for line in getattr(recipe, part)]
    if any(getattr(step, "vllm", {}).get("skip_special_tokens") is False for step in steps):
        return []
    named = {(step.name, text) for step in steps for text in texts_in(getattr(step, "params", {}))}
    seen = {(name, token) for name, text in named for token in (text, f"<{text}>") if token in special}
    fix = "vllm: {skip_special_tokens: false} in the step that asks keeps it"
    return [
        f"{name}: {token} is a special token of this model, which rewards do not see: {fix}" for name, token in sorted(seen)
    ]


def special_tokens(folder: Path) -> set[str]:
    """Return the special tokens that a tokenizer file lists."""
    path = folder / "tokenizer.json"
    added = json.loads(path.read_text("utf-8")).get("added_tokens", []) if path.is_file() else []
    return {token["content"] for token in added if token.get("special")}


def texts_in(value: Any) -> Iterator[str]:
    """Yield the texts in the parameters of a reward, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for one in value.values() for text in texts_in(one))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in texts_in(one))
