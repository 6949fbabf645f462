"""load: the root of a chain. Not a verb of recipes: every run begins with it, once, in round 0."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import polars as pl

from selfkd.backend.base import QUESTIONS, LongPrompt
from selfkd.backend.tokens import opening
from selfkd.core import views
from selfkd.core.pool import Addition, Pool, shape
from selfkd.errors import UsageError
from selfkd.steps.context import Context
from selfkd.steps.question import Question
from selfkd.steps.step import Step

SLICE = 20_000  # prompts whose texts are in memory at once
TOO_LONG = "longer than the context allows"


class LoadStep(Step):
    """Bring the model in as fp32 masters, dithered once so that later small updates survive the engine's cast to 16 bits.

    `dither` 'auto' is yes where the engine casts. Its notes say what was done.

    With the model comes its tokenizer: every prompt that the run will ask is measured, before anything is generated.
    """

    verb: ClassVar[str] = "load"
    role: str = "policy"
    source: dict[str, Any]
    dither: Literal["auto"] | bool = "auto"
    questions: tuple[Question, ...] = ()
    long: Literal["refuse", "drop"] = "refuse"

    def run(self, pool: Pool, context: Context) -> Addition:
        wanted = context.engine_casts if self.dither == "auto" else self.dither
        seed = context.seed("dither") if wanted else None
        folder, notes = context.load(self.source, seed, self._asked(context))
        notes["dither"] = bool(wanted)
        found: Sequence[LongPrompt] = notes.pop("long", ())
        if not found:
            return Addition(models={self.role: folder}, notes=notes)
        if self.long == "refuse":
            raise _refusal(found, context)
        ids = sorted({one["id"] for one in found})
        drops = [{"id": name, "step": self.name, "reason": TOO_LONG} for name in ids]
        told = {"long": {**_counts(found), "longest": max(one["tokens"] for one in found)}}
        return Addition({"drops": [shape("drops", drops)]}, models={self.role: folder}, notes={**notes, **told})

    def _asked(self, context: Context) -> Iterator[pl.DataFrame]:
        """Yield all that the steps will show a model, as table QUESTIONS."""
        for question in self.questions:
            held = context.split(question.split)
            render = context.template("template", question.template) if question.template else None
            for part in held.prompts.iter_slices(SLICE):
                rows = views.with_heavy(part, held, ["messages", "meta"], "prompts").to_dicts()
                yield pl.DataFrame(
                    {
                        "id": [row["id"] for row in rows],
                        "split": [question.split for row in rows],
                        "place": [f"{row['source']}: {opening(row['messages'])}" for row in rows],
                        "room": [question.room for row in rows],
                        "messages": [question.messages(row, render) for row in rows],
                    },
                    schema=QUESTIONS,
                )

    def identity(self) -> dict[str, Any]:
        """Without the place the model came from and what `auto` came to: the weights digest in the commit says what it is."""
        return {"verb": self.verb, "name": self.name, "role": self.role, "dither": self.dither is not False}


def _counts(found: Sequence[LongPrompt]) -> dict[str, int]:
    """Return {split: how many of its prompts are too long}."""
    return dict(Counter(split for split, _ in dict.fromkeys((one["split"], one["id"]) for one in found)))


def _refusal(found: Sequence[LongPrompt], context: Context) -> UsageError:
    counts = ", ".join(f"{count} in {split}" for split, count in _counts(found).items())
    what = f"prompts are too long for the context of {context.max_length} tokens, prompt and answer together ({counts})"
    most = max(found, key=lambda one: one["tokens"] - one["limit"])
    shown = {"First": found[0]} if most["id"] == found[0]["id"] else {"First": found[0], "Longest": most}
    lines = (
        *(f"{name}: {one['place']}, {one['tokens']:,} tokens where {one['limit']:,} fit." for name, one in shown.items()),
        "Leave them out of every round: write `long: drop` in the recipe and repeat the command with --amend.",
        "Or shorten them, lower max_tokens, or raise `context`, in a new run.",
    )
    return UsageError(what, context.where, "\n".join(lines))
