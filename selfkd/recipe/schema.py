"""What a person writes, as frozen models: the recipe, its parts, and the steps of each round that it stands for. Reads no file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, field_validator

from selfkd.core.drawing import Pick
from selfkd.core.files import NAME, beside
from selfkd.core.model_ref import ModelRef
from selfkd.prompts.read import source_words
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.messages import names
from selfkd.steps import LoadStep, Step
from selfkd.steps.question import Question, longest

Source = str | dict[str, Any] | list[Any]


def _no_number(value: Any) -> Any:
    """Python takes 1 for true; a recipe does not."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


Switch = Annotated[Literal["auto", True, False], BeforeValidator(_no_number)]


RESERVED = ("train", "dev", "test", "take", "held", "warm", "prev", "best")  # words that mean something where a split is named


class _Words(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, strict=True, allow_inf_nan=False, str_min_length=1
    )


class Take(_Words):
    """Train prompts chosen anew in each round, by what earlier rounds made of them."""

    n: int = Field(ge=1, description="How many prompts per round; fewer where no more have a chance.")
    by: str | None = Field(
        None,
        description="How much speaks for a prompt, over all samples of earlier rounds: `1 - abs(2 * mean(correct) - 1)` takes those that are solved half of the time. "
        "Prompts of which it is null, such as those not asked yet, come first, the least asked before others; `coalesce(..., 0.5)` gives them a number instead. Default: on through the set.",
    )
    pick: Pick = Field(
        "top",
        description="top: the greatest values; weighted: drawn with chances by the value, and none at 0 or below. Hashed from the seed, so it repeats.",
    )
    rounds: int | None = Field(None, ge=1, description="Look so many rounds back; default: at all accepted rounds.")


class Prompts(_Words):
    """Where the prompts come from. Splits have roles: `dev` may steer, `test` is measured at the base and at the end only."""

    train: Source = Field(description="What the model practises on.")
    dev: Source | None = Field(None, description="Held out; measured every round; may steer best, keep_if and stop.")
    test: Source | None = Field(None, description="Held out; measured at round 0 and after the last round; steers nothing.")
    held: dict[str, Source] = Field(
        {},
        description="Other suites that are held out, {name: source}: measured every round by a measure step that names the split, beside dev. What was forgotten shows there: its change against the base may decide in keep_if.",
    )
    take: Annotated[int, Field(ge=1)] | Take | None = Field(
        None,
        description="Train prompts drawn per round, on through the set, or chosen: {n: 2000, by: expression}; its fields are below. Default: all of them.",
    )

    @field_validator("held")
    @classmethod
    def _named(cls, held: dict[str, Source]) -> dict[str, Source]:
        for name in held:
            if name in RESERVED or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
                raise ValueError(
                    f"a suite cannot be called '{name}': write small letters, digits and '_', and none of {', '.join(RESERVED)}"
                )
        return held


class Origin(_Words):
    """A model to start from."""

    path: str = Field(
        description="Hub id, folder of safetensors, GGUF file, or package:NAME of an installed package that holds a GGUF."
    )
    revision: str | None = Field(None, description="Commit, tag or branch of the hub id.")


class Best(_Words):
    """What makes one round better than another."""

    metric: str = Field(description="A metric of a measure step, such as dev/correct.")
    mode: Literal["max", "min"] = Field("max", description="max: the greatest is best.")


class Stop(_Words):
    """When to end before `rounds` is reached; the test split is still measured."""

    patience: int | None = Field(None, ge=1, description="Stop after so many rounds without a better value of the metric.")
    metric: str | None = Field(None, description="Which metric patience watches; default: that of `best`.")
    mode: Literal["max", "min"] = Field("max", description="max: the greatest is best; default: that of `best`.")
    tokens: int | None = Field(None, ge=1, description="Stop before the next round when so many tokens were generated.")


class Keep(_Words):
    """Which checkpoints stay on disk. Records, samples and scores of every round always stay."""

    last: int = Field(2, ge=0, description="Those of so many newest rounds.")
    best: bool = Field(True, description="That of the best round.")
    base: bool = Field(True, description="That of round 0, which every report compares with.")
    as_: Literal["fp32", "bf16"] = Field(
        "fp32",
        alias="as",
        description="bf16: those that no later training needs are rounded, as an engine in bfloat16 rounds them, to half of their bytes. The root, the newest and the best one that a step names stay in fp32, and one is whole while it is rounded: it pays from three kept rounds on.",
    )


class Recipe(_Words):
    """A recipe, complete and checked."""

    name: str = Field("", pattern=NAME, description="Name of the run and of its folder; default: the name of the file.")
    model: Annotated[str, Field(min_length=1)] | Origin = Field(
        description="Hub id, folder, GGUF file or package:NAME; or {path, revision}."
    )
    rounds: int = Field(
        1, ge=0, description="How many rounds after round 0, which measures the untouched model; 0: only that is measured."
    )
    seed: int = Field(0, ge=0, description="Every random choice is hashed from this number and from names.")
    prompts: Prompts = Field(description="train, and optionally dev, test and take.")
    overlap: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Train prompts found in dev or test, and dev prompts found in test: refuse to start, or take them out of the former.",
    )
    transductive: bool = Field(
        False,
        exclude_if=lambda given: not given,
        description="Train prompts may be those that dev or test measures, as in test-time training. They are read without gold answers and further columns (`gold: false`), so no step can be shown them; what is measured is how well these very prompts are answered.",
    )
    long: Literal["refuse", "drop"] = Field(
        "refuse",
        description="Prompts that with their answer are longer than `context`: refuse to start, or leave them out of every round. "
        "What a step asks about a sample (`of`) is measured when it is asked: refuse ends the run there, drop leaves that question out.",
    )
    context: int = Field(
        1024,
        ge=16,
        description="Most tokens of a prompt and its answer together, for engine and trainer; nothing is cut silently.",
    )
    chat: dict[str, Any] = Field(
        {},
        description="Words that the model's chat template is given, for generation and training alike: {enable_thinking: false}.",
    )
    chunk: int = Field(
        256,
        ge=1,
        description="Requests generated together; the unit of redoing, part of what makes a chain reproducible. Where not `exact`, the unit of redoing follows the number of engines, up to 16 times this.",
    )
    exact: Switch = Field(
        "auto", description="Answers that do not depend on restarts or on the number of engines; auto: where it is cheap."
    )
    dither: Switch = Field(
        "auto",
        description="Shift the first weights off the bf16 grid, so that small updates reach the engine; auto: where it computes in 16 bits.",
    )
    dither_seed: int | None = Field(
        None,
        ge=0,
        description="Seed of that shift, instead of one from `seed`: runs of several seeds then begin with the same weights, once on disk.",
    )
    before: tuple[Line, ...] = Field(
        (), description="Steps that run once, in round 0, after the base was measured (a warm-up)."
    )
    steps: tuple[Line, ...] = Field(description="The steps of a round, in order.")
    after: tuple[Line, ...] = Field((), description="Steps that run once, at the end of the last round.")
    best: Best | None = Field(
        None, description="What `policy@best`, `keep` and `stop` mean by best; default: the newest kept round."
    )
    keep_if: str | None = Field(
        None,
        description="Keep a round only if this holds: SQL over its metrics (dev/correct is dev_correct), prev_dev_correct (of the last accepted round) and best_dev_correct.",
    )
    stop: Stop | None = Field(None, description="When to end early.")
    keep: Keep = Field(Keep(), description="Which checkpoints stay on disk.")
    small: dict[str, Any] = Field(
        {},
        exclude_if=lambda block: True,  # what it set stands in the resolved recipe, each at its place
        description="What `selfkd run RECIPE --small` changes, as overrides are written: {rounds: 1, sample.n: 4, prompts.train: {file: few.jsonl}}. Such a run is called NAME-small.",
    )
    control: str | None = Field(
        None,
        pattern=NAME,
        description="Which control of its method this recipe is, for tables: `--control` writes it into the recipe that it makes.",
    )
    source: Path = Field(Path(), exclude=True)
    folders: tuple[Path, ...] = Field((), exclude=True)
    places: dict[str, str] = Field({}, exclude=True)  # where its fields were written; `best.metric` is one inside another
    text: str = Field("", exclude=True)

    @field_serializer("before", "steps", "after")
    def _spelled(self, lines: tuple[Line, ...]) -> list[dict[str, Any]]:
        return [line.spelled() for line in lines]

    @property
    def take(self) -> int | None:
        return self.prompts.take.n if isinstance(self.prompts.take, Take) else self.prompts.take

    def splits(self) -> dict[str, Source]:
        """{split: source} of the splits that are given, train first, other suites last."""
        train = {**source_words(self.prompts.train), "gold": False} if self.transductive else self.prompts.train
        given = {"train": train, "dev": self.prompts.dev, "test": self.prompts.test}
        return {split: source for split, source in given.items() if source is not None} | dict(self.prompts.held)

    def steps_of(self, index: int) -> list[Step]:
        """The steps of round `index`, numbers filled in. Round 0 brings in the model, measures it, and runs `before`."""
        if index == 0:
            return self._opening_steps()
        steps = [line.at(index) for line in self.steps]
        return [*steps, *self.closing_steps(index)] if index >= self.rounds else steps

    def closing_steps(self, index: int) -> list[Step]:
        """What only the last round does: `after`, then the test split, so that what is measured is what the chain leaves.

        `index` is the number of that round: a run that stops early has another last one than `rounds` says.
        """
        return [*(line.at(index) for line in self.after), *self._measures(index, "test")]

    def _opening_steps(self) -> list[Step]:
        before = [line.at(0) for line in self.before]
        warm = self._measures(0, "warm") if any(step.trained_role() for step in before) else []
        first = LoadStep(
            name="load",
            source=self.model_source(),
            dither=self.dither,
            dither_seed=self.dither_seed,
            questions=tuple(self.questions()),
            long=self.long,
            chat=self.chat,
        )
        return [first, *self._measures(0), *self._measures(0, "test"), *before, *warm]

    def named_models(self) -> list[ModelRef]:
        """Return the models that the steps of all rounds name: those of a round may be others than the next one's."""
        lines = (*self.steps, *self.after)
        return [one for line in lines for index in range(1, line.variants + 1) for one in line.at(index).models().values()]

    def questions(self) -> Iterator[Question]:
        """Yield how the steps of all rounds ask about the prompts of each split, test included."""
        lines = [line for part in LISTS for line in getattr(self, part)]
        steps = [(line.at(index), line) for line in lines for index in range(1, line.variants + 1)]
        asked = [(replace(one, step=line.written), step) for step, line in steps if (one := step.question())]
        found = [question for question, _ in asked]
        if self.prompts.test is not None:
            found += [replace(question, split="test") for question, step in asked if step.outside]
        return longest(found)

    def measures(self, index: int) -> list[Any]:
        """Return the steps that measure in a round, as every round measures."""
        return self._measures(index)

    def _measures(self, index: int, suffix: str = "") -> list[Step]:
        """The measure steps of a round; with suffix `test` their copies on the test split, if there is one, but for other suites."""
        if suffix == "test" and self.prompts.test is None:
            return []
        found = [step for line in self.steps if (step := line.at(index)).outside]
        if suffix:
            found = [step for step in found if step.split_asked() not in self.prompts.held]
        changed: dict[str, Any] = {"split": "test"} if suffix == "test" else {}
        return [step.model_copy(update={**changed, "name": f"{step.name}-{suffix}"} if suffix else {}) for step in found]

    def model_source(self) -> dict[str, Any]:
        """Where the first weights come from: {path, revision}; a path that exists is absolute, a hub id stays as it is."""
        path, revision = (self.model, None) if isinstance(self.model, str) else (self.model.path, self.model.revision)
        found = next(beside(path, self.folders), None)
        return {"path": str(found.absolute()) if found else path, "revision": revision}

    def references(self) -> tuple[list[str], list[str]]:
        """(functions, templates) that the steps name: the code and texts a run freezes."""
        steps = [line.at(1) for part in LISTS for line in getattr(self, part)]
        functions = {reference for step in steps for reference in step.functions()}
        texts = {reference for step in steps for reference in step.templates()}
        return sorted(functions), sorted(texts)

    def scorers(self) -> list[str]:
        """Return the models that only score, as the steps name them: a run freezes them, too."""
        steps = [line.at(1) for part in LISTS for line in getattr(self, part)]
        return sorted({reference for step in steps for reference in step.scorers()})

    def resolved(self) -> dict[str, Any]:
        """Every word with its default spelled out; itself a recipe that means the same. A method says nothing of controls."""
        return self.model_dump(mode="json", by_alias=True, exclude=None if self.control else {"control"})


FIELDS = names(Recipe)
