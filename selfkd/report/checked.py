"""What `verify` says of an update that was measured on its way: its figures, judged again, and what its round measured of the same model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from pydantic import ValidationError

from selfkd.chain import ways
from selfkd.chain.records import Commit
from selfkd.steps.check import Check, unreadable


def problems(commit: Commit) -> Iterator[str]:
    """Judge again by the figures of an update where it ended and which model it left, and compare that model."""
    asked = commit.identity.get("check") if commit.verb == "train" else None
    if not commit.checks:
        if asked is not None:
            yield "it was to be measured on its way, and no figure was committed"
        return
    if asked is None:
        yield "it was not to be measured on its way, and figures were committed"
    if problem := unreadable(commit.checks):
        yield problem
        return
    with suppress(ValidationError):  # words of a later version, which this one cannot judge by
        yield from Check.model_validate(asked).contradictions(commit.checks)
    picked = {one["model"] for one in commit.checks["figures"] if one["step"] == commit.checks["picked"]}
    if picked != {model.digest for model in commit.models.values()}:
        yield "the model that its checks picked is not the one that was committed"


def differently(commits: Sequence[Commit | None]) -> Iterator[tuple[Commit, str]]:
    """Yield each update of a round with the step behind it that measured its model in the same way and found another value.

    Only where both were made so that they repeat need the two be one value.
    """
    for at, commit in enumerate(commits):
        if commit is None or not commit.checks or unreadable(commit.checks) or not commit.checks.get("how"):
            continue
        for other in commits[at + 1 :]:
            if other is None or commit.models.keys() & other.models.keys():
                break  # from here on it is another model
            if said := _other_value(commit, other):
                yield commit, said


def _other_value(commit: Commit, other: Commit) -> str:
    picked, how = commit.checks["picked"], commit.checks["how"]
    score = commit.checks["metric"].partition("/")[2]
    value = next((one["value"] for one in commit.checks["figures"] if one["step"] == picked), None)
    for name, measured in ways.measures_of(other).items() if other.outside else ():
        if measured == how and name.partition("/")[2] == score and other.metrics[name] != value:
            asked = f"'{other.step}' measured {other.metrics[name]} of the same model in the same way"
            return (
                f"its figure of step {picked} is {value}, and {asked}: one of them was changed, or the reward does not repeat"
            )
    return ""
