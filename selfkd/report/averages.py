"""Whether an averaged checkpoint is the average that its commit states: worked out again from the checkpoints, where these still lie there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from selfkd.chain.records import Commit, ModelEntry
from selfkd.core import averaging, digest
from selfkd.errors import WeightsError
from selfkd.steps.average import AverageStep


def problems(folder: Path, commit: Commit, known: Mapping[str, ModelEntry], gone: Collection[str]) -> Iterator[str]:
    """Yield what does not hold; `known` are the models committed so far by their paths, `gone` those that retention took."""
    if commit.verb != AverageStep.verb:
        return
    made_of = commit.notes.get("average", [])
    if {one["model"]: one["share"] for one in made_of} != dict(commit.identity["of"]):
        yield "it does not say of which checkpoints it is the average"
        return
    for one in made_of:
        if one["path"] not in known:
            yield f"it says that '{one['model']}' lay at {one['path']}, where no model was committed"
            return
        if known[one["path"]].digest != one["digest"]:
            yield f"it says that '{one['model']}' was {one['digest'][:12]}, and another model was committed at {one['path']}"
            return
    models = [(folder / one["path"], one["share"]) for one in made_of]
    for role, made in commit.models.items():
        if made.path not in gone and all(
            one["path"] not in gone and path.is_dir() for one, (path, _) in zip(made_of, models, strict=True)
        ):
            yield from _recomputed(role, models, [one["digest"] for one in made_of], folder / made.path)


def _recomputed(role: str, models: list[tuple[Path, float]], digests: list[str], made: Path) -> Iterator[str]:
    try:
        moved = [path.name for (path, _), expected in zip(models, digests, strict=True) if not digest.holds(path, expected)]
        wrong = "" if moved else averaging.differs(models, made)
    except (WeightsError, OSError, ValueError, KeyError) as error:
        yield f"the average '{role}' cannot be worked out again: {error}"
        return
    if moved:
        yield f"{moved[0]}, of which it is an average, does not hold what it says"
    elif wrong:
        yield f"the tensor {wrong} of '{role}' is not the average of the checkpoints that it names"
