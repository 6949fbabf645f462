"""What a recipe says of checks inside an update: the mapping `check` of the step train, and what follows from their figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from selfkd.core.model_ref import ModelRef
from selfkd.core.wording import counted


def measures(step: Any, role: str) -> bool:
    """Whether a step measures the newest model of a role."""
    return bool(step.outside and step.models()["model"] == ModelRef(role, "now"))


class Figure(NamedTuple):
    """What was measured of the model as it was at an optimiser step, which generated so many tokens for it.

    The value is None where nothing of it could be scored.
    """

    step: int
    value: float | None
    model: str
    tokens: int = 0


class Check(BaseModel):
    """Measure the model inside its update, stop where it gets no better, and choose which of those that were measured becomes the child."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, strict=True, allow_inf_nan=False, str_min_length=1
    )

    every: int = Field(ge=1, description="Optimiser steps between two checks; the end of the update is always one.")
    metric: str = Field(
        description="What is measured, as the measure step of the recipe that gives it does, with its seeds: dev/correct."
    )
    mode: Literal["max", "min"] = Field("max", description="max: the greatest is best.")
    patience: int | None = Field(
        None, ge=1, description="End the update after so many checks without a better value; default: make all of its steps."
    )
    pick: Literal["best", "last"] = Field(
        "best",
        description="Which of the checked models becomes the child: the best one, of equals the earliest; or the last one.",
    )

    def best(self, found: Sequence[Figure]) -> Figure:
        """Return the best figure, of equal ones the earliest; the last one where none has a value."""
        sign = 1 if self.mode == "max" else -1
        known = [(sign * one.value, -one.step, one) for one in found if one.value is not None]
        return max(known)[2] if known else found[-1]

    def picked(self, found: Sequence[Figure]) -> Figure:
        """Return the figure of the model that becomes the child."""
        return self.best(found) if self.pick == "best" else found[-1]

    def stops(self, found: Sequence[Figure]) -> str:
        """Return why the update ends with the last of these checks, or ''."""
        values = [one for one in found if one.value is not None]
        since = [one for one in found if not values or one.step > self.best(found).step]
        if self.patience is None or len(since) < self.patience:
            return ""
        return f"{self.metric} did not improve for {counted(self.patience, 'check')}"

    def record(self, found: Sequence[Figure], whole: bool, of: int, how: str) -> dict[str, Any]:
        """Return what a commit says of the checks; `whole`: the last of them was at the end of the update, which has `of` steps.

        `how` is the digest of how the metric was measured, as a seal has it.
        """
        figures = [one._asdict() for one in found]
        stopped = "" if whole else self.stops(found)
        told = {"metric": self.metric, "how": how, "of": of, "figures": figures}
        return {**told, "picked": self.picked(found).step, "stopped": stopped}

    def contradictions(self, recorded: Mapping[str, Any]) -> Iterator[str]:
        """Yield in what a record does not follow from its own figures."""
        read = _Recorded.model_validate(recorded)
        found = [Figure(one.step, one.value, one.model, one.tokens) for one in read.figures]
        whole = found[-1].step == read.of if read.of else not read.stopped
        if not self._apart(found, whole):
            yield f"its figures are not of every {counted(self.every, 'step')}"
        ends = [bool(self.stops(found[: at + 1])) for at in range(len(found))]
        if any(ends[:-1]) or (bool(read.stopped) if whole else not (read.stopped and ends[-1])):
            yield "where the update ended does not follow from its figures"
        if recorded["picked"] != self.picked(found).step:
            yield f"its figures pick the model of step {self.picked(found).step}, not of step {recorded['picked']}"

    def _apart(self, found: Sequence[Figure], whole: bool) -> bool:
        """Whether so many steps lie between figures; the last one may come sooner where it is of the whole update."""
        due = [self.every * (at + 1) for at in range(len(found))]
        last = found[-1].step
        on_time = due[-1] - self.every < last <= due[-1] if whole else last == due[-1]
        return on_time and [one.step for one in found[:-1]] == due[:-1]


class _Measured(BaseModel):
    model_config = ConfigDict(strict=True)

    step: int
    value: float | None
    model: str
    tokens: int = 0


class _Recorded(BaseModel):
    """What a commit says of checks, as far as it is judged by. `of` is 0 where the steps of the whole update were not recorded."""

    model_config = ConfigDict(strict=True)

    metric: str
    figures: list[_Measured] = Field(min_length=1)
    picked: int
    stopped: str
    how: str = ""
    of: int = 0


def unreadable(recorded: Mapping[str, Any]) -> str:
    """Return what keeps the checks of a commit from being read, or ''."""
    try:
        _Recorded.model_validate(recorded)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in ("checks", *first["loc"]))
        return f"what it says of its checks cannot be read: {place}: {first['msg']}"
    return ""


def told(recorded: Mapping[str, Any]) -> str:
    """Return in one line what a commit says of the checks of its update."""
    if problem := unreadable(recorded):
        return problem
    values = {one["step"]: one["value"] for one in recorded["figures"]}
    picked, last = recorded["picked"], max(values)
    other = "" if picked == last else f", {_value(values[last])} at step {last}, the last of {len(values)}"
    stopped = f"; {recorded['stopped']}" if recorded["stopped"] else ""
    return f"the model of step {picked} was taken: {recorded['metric']} {_value(values.get(picked))}{other}{stopped}"


def _value(value: float | None) -> str:
    return "unscored" if value is None else f"{value:.3g}"
