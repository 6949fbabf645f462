"""load: the root of a chain. Not a verb of recipes: every run begins with it, once, in round 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

import polars as pl

from selfkd.backend.base import QUESTIONS, LongPrompt
from selfkd.backend.tokens import opening
from selfkd.core import digest, views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.errors import UsageError
from selfkd.prompts.template_fields import StandIn
from selfkd.steps.context import Context, Messages
from selfkd.steps.question import LONGER, Question
from selfkd.steps.step import Step

SLICE = 20_000  # prompts whose texts are in memory at once


class LoadStep(Step):
    """Bring the model in as fp32 masters, dithered once so that later small updates survive the engine's cast to 16 bits.

    `dither` 'auto' is yes where the engine casts. Its notes say what was done.

    With the model comes its tokenizer: every prompt that the run will ask is measured, and each shape of them is written once with the
    chat template, before anything is generated. `chat` is what the template is given.
    """

    verb: ClassVar[str] = "load"
    role: str = "policy"
    source: dict[str, Any]
    dither: Literal["auto"] | bool = "auto"
    dither_seed: int | None = None
    questions: tuple[Question, ...] = ()
    long: Literal["refuse", "drop"] = "refuse"
    chat: dict[str, Any] = {}

    def run(self, pool: Pool, context: Context) -> Addition:
        wanted = context.engine_casts if self.dither == "auto" else self.dither
        seed = self._seed(context) if wanted else None
        folder, notes = context.load(self.source, seed, self._asked(context), self._shapes(context), self.chat)
        if refused := notes.get("refused"):
            raise _refused(refused, context)
        for remark in notes.get("chat", ()):
            context.say(remark)
        notes["dither"] = bool(wanted)
        found: Sequence[LongPrompt] = notes.pop("long", ())
        if not found:
            return Addition(models={self.role: folder}, notes=notes)
        if self.long == "refuse":
            raise _refusal(found, context)
        ids = sorted({one["id"] for one in found})
        drops = [{"id": name, "step": self.name, "reason": LONGER} for name in ids]
        told = {"long": {**_counts(found), "longest": max(one["tokens"] for one in found)}}
        return Addition({"drops": [shape("drops", drops)]}, models={self.role: folder}, notes={**notes, **told})

    def _asked(self, context: Context) -> Iterator[pl.DataFrame]:
        """Yield all that the steps will show a model, as table QUESTIONS."""
        for question in (one for one in self.questions if not one.about_samples):
            held = context.split(question.split)
            render = context.template("template", question.template) if question.template else None
            for part in held.prompts.iter_slices(SLICE):
                rows = views.with_heavy(part, held, ["messages", "meta"], "prompts").to_dicts()
                yield _as_questions(rows, question, [question.messages(row, render) for row in rows])

    def _shapes(self, context: Context) -> Iterator[pl.DataFrame]:
        """Yield one prompt of each shape as the steps that work on samples will show it, about a sample that stands in for one."""
        for question in (one for one in self.questions if one.about_samples):
            held = context.split(question.split)
            render = context.template("template", question.template, list(StandIn())) if question.template else None
            more = dict.fromkeys(question.more, StandIn())
            heavy = views.with_heavy(held.prompts, held, ["messages", "meta"], "prompts")
            roles = pl.col("messages").list.eval(pl.element().struct.field("role")).list.join(" ")
            firsts = heavy.unique(roles, keep="first", maintain_order=True)
            for row in firsts.to_dicts():
                with suppress(UsageError):  # a template may want of a sample what only a real one has
                    yield _as_questions([row], question, [question.messages(row, render, StandIn(), **more)])

    def identity(self) -> dict[str, Any]:
        """Without the place the model came from and what `auto` came to: the weights digest in the commit says what it is."""
        own = {} if self.dither_seed is None else {"dither_seed": self.dither_seed}
        chat = {"chat": self.chat} if self.chat else {}
        return {"verb": self.verb, "name": self.name, "role": self.role, "dither": self.dither is not False, **own, **chat}

    def _seed(self, context: Context) -> int:
        return context.seed("dither") if self.dither_seed is None else digest.seed("dither", self.dither_seed)


def _as_questions(rows: Sequence[Mapping[str, Any]], question: Question, messages: Sequence[Messages]) -> pl.DataFrame:
    columns = {
        "id": [row["id"] for row in rows],
        "split": [question.split] * len(rows),
        "place": [f"{row['source']}: {opening(row['messages'])}" for row in rows],
        "step": [question.step] * len(rows),
        "room": [question.room] * len(rows),
        "messages": list(messages),
    }
    return pl.DataFrame(columns, schema=QUESTIONS)


def _counts(found: Sequence[LongPrompt]) -> dict[str, int]:
    """Return {split: how many of its prompts are too long}."""
    return dict(Counter(split for split, _ in dict.fromkeys((one["split"], one["id"]) for one in found)))


def _refusal(found: Sequence[LongPrompt], context: Context) -> UsageError:
    counts = ", ".join(f"{count} in {split}" for split, count in _counts(found).items())
    what = f"prompts are too long for the context of {context.max_length} tokens, prompt and answer together ({counts})"
    most = max(found, key=lambda one: one["tokens"] - one["limit"])
    shown = {"First": found[0]} if most["id"] == found[0]["id"] else {"First": found[0], "Longest": most}
    lines = (
        *(
            f"{name}: {_placed(one, context)}, {one['tokens']:,} tokens where {one['limit']:,} fit."
            for name, one in shown.items()
        ),
        "Leave them out of every round: write `long: drop` in the recipe and repeat the command with --amend.",
        "Or shorten them, lower max_tokens, or raise `context`, in a new run.",
    )
    return UsageError(what, context.where, "\n".join(lines))


def _refused(found: Sequence[Mapping[str, str]], context: Context) -> UsageError:
    """Return one error for all shapes that the template refuses, each with a prompt, the step that asks it, and the template's words."""
    lines = [f"{_placed(one, context)}, asked by {one['step']}: {one['said']}" for one in found]
    fix = "Nothing was asked yet. Change their turns, or what the step shows of them; another template lies in the model's folder."
    return UsageError(lines[0], context.where, "\n".join([*lines[1:], fix]))


def _placed(one: Mapping[str, Any], context: Context) -> str:
    """Return a prompt's file, line and first words; the line where its source still says it."""
    found = context.places(one["split"], [one["id"]]).get(one["id"])
    return f"{found}: {one['place'].partition(': ')[2]}" if found else str(one["place"])
