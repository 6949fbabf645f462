"""An update that is measured on its way: segment, check, segment, until its last step or until it gets no better; one of them is the child.

All lies beside the update's checkpoints until its step is committed. A segment's model is whole on disk before it is measured, and its
figure before the next segment begins: a kill repeats at most the one that it came into, and what is decided follows from the figures.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.backend.base import Trained
from selfkd.chain import records, ways
from selfkd.chain.attempt import Attempt
from selfkd.chain.commit import Place, code_of
from selfkd.chain.paths import Paths
from selfkd.chain.records import Cut, Record
from selfkd.chain.run import Run
from selfkd.core import digest, storage
from selfkd.errors import ChainError
from selfkd.steps.check import Check, Figure, measures

TRAINED = "trained.json"  # what the trainer said of a model, beside it
MODEL = "model"
ANSWERS = "answers"  # of all its checks
Makers = Mapping[str, Iterable[str]]  # {kind of process: digests of what those computed with}
Train = Callable[[int, Path], tuple[Trained, Makers]]  # up to an optimiser step, into a folder
Measure = Callable[
    [Path, str], tuple[float | None, int, Makers]
]  # the model in a folder, which has this digest; with the tokens it generated


@dataclass(frozen=True, kw_only=True)
class CheckRecord(Record):
    """check-000100.json: what the model as of a step was measured to be; `until` is the step at which it was to be checked.

    `tokens` were generated for it, `learned` by the update up to that step, which has `of` steps in all (0: not said). `makers` are
    those who trained up to it since the check before, and measured it.
    """

    until: int
    step: int
    value: float | None
    model: str
    tokens: int
    whole: bool
    of: int = 0
    learned: int = 0
    makers: Makers = field(default_factory=dict)

    @property
    def figure(self) -> Figure:
        return Figure(self.step, self.value, self.model, self.tokens)


@dataclass(frozen=True)
class CheckPlace(Place):
    """Where a check measures: as the measure step of the round, but for its answers, which lie in `folder` and are in no record."""

    folder: Path = Path()

    @property
    def data(self) -> Path:
        return self.folder

    def cut(self, key: str) -> Path:
        return self.folder / f"cut-{key[:12]}.json"


def how_measured(place: Place, metric: str) -> str:
    """Return the digest by which the measure step at `place` says how it measures a metric."""
    return ways.how_measured(digest.as_json(place.step.identity()), place.code, metric)


def check_place(place: Place, run: Run, metric: str) -> CheckPlace:
    """Return where the step that measures `metric` every round stands inside an update, which has its place in the chain."""
    role = place.step.trained_role() or ""
    step = next(one for one in run.recipe.measures(place.index) if metric in one.metrics() and measures(one, role))
    return CheckPlace(place.paths, place.index, place.number, step, place.parent, code_of(step, run.code))


@dataclass(frozen=True)
class CheckedUpdate:
    """One update in `folder`, which `train` makes piece by piece and `measure` measures; `where` names it in what a person reads.

    `how` is the digest of how it measures. In the end `makers` and `notes` are told of the segments and checks of all attempts.
    """

    check: Check
    how: str
    folder: Path
    paths: Paths
    train: Train
    measure: Measure
    attempt: Attempt
    where: str
    makers: dict[str, set[str]]
    notes: dict[str, Any]

    def made(self) -> Trained:
        """Return the model that the figures pick, with all of them."""
        found = self._found()
        while not self._is_over(found):
            until = (found[-1].until if found else 0) + self.check.every
            found.append(self._checked(until, found))
            self._forget(found)
        return self._picked(found)

    def _is_over(self, found: list[CheckRecord]) -> bool:
        return bool(found) and (found[-1].whole or bool(self.check.stops(_figures(found))))

    def _checked(self, until: int, before: list[CheckRecord]) -> CheckRecord:
        """Make the next segment if it is not there, measure its model, and write its figure down."""
        place = self._place(until)
        if not _is_sound(place):
            self._segment(until, place)
        made = _said(place)
        value, tokens, makers = self.measure(place / MODEL, made["model"])
        told = {name: made[name] for name in ("step", "model", "whole", "of", "learned")}
        record = CheckRecord(until=until, value=value, tokens=tokens, makers=_merged([made["makers"], makers]), **told)
        records.write(self._record(until), record, self.paths.tmp)
        self._tell(record, before)
        return record

    def _segment(self, until: int, place: Path) -> None:
        if place.exists():
            storage.remove(place)
        draft = storage.make_folder(storage.temporary(self.paths.tmp, "-check"))
        trained, makers = self.train(until, draft / MODEL)
        said: dict[str, Any] = {
            "metrics": dict(trained.metrics),
            "drops": dict(trained.drops),
            "state": trained.state and trained.state.name,
            "of": trained.of,
            "learned": int(trained.metrics.get("tokens", 0)),
            "makers": _merged([makers]),
        }
        model, hashes = digest.weights_and_files(draft / MODEL)
        said |= {"whole": trained.whole, "step": trained.metrics["steps"], "model": model}
        said["files"] = storage.file_hashes(storage.files_in(draft), draft, hashes)
        (draft / TRAINED).write_bytes(storage.json_text(digest.with_self_digest(said)))
        storage.adopt(draft, place)

    def _tell(self, record: CheckRecord, before: list[CheckRecord]) -> None:
        best = self.check.best([*_figures(before), record.figure]) == record.figure
        value = "nothing could be scored" if record.value is None else f"{record.value:.4g}"
        text = f"{self.where}: checked at step {record.step}: {self.check.metric} {value}{', the best so far' if best else ''}"
        self.attempt.event("checked", text=text, step=record.step, metric=self.check.metric, value=record.value, best=best)

    # ---- what is on disk ----

    def _place(self, until: int) -> Path:
        return self.folder / f"check-{until:06d}"

    def _record(self, until: int) -> Path:
        return self.folder / f"check-{until:06d}.json"

    def _found(self) -> list[CheckRecord]:
        """Return the figures of an earlier attempt; where the model that they pick so far is lost with them, all begins anew."""
        try:
            found = sorted(
                (records.read(path, CheckRecord) for path in self.folder.glob("check-*.json")), key=lambda one: one.until
            )
            for path in self.folder.glob(f"{ANSWERS}/cut-*.json"):
                records.read(path, Cut)
        except ChainError as error:
            return self._anew(str(error))
        if [one.until for one in found] != [self.check.every * (at + 1) for at in range(len(found))]:
            return self._anew("figures are missing")
        if not found:
            return []
        self._forget(found)
        if not _is_sound(self._place(self._kept(found))):
            return self._anew("the model that was picked so far is not as it was")
        self.attempt.event("continues", text=f"{self.where} goes on behind its check at step {found[-1].step}")
        return found

    def _anew(self, why: str) -> list[CheckRecord]:
        self.attempt.warn(f"{self.where}: this update and its checks begin anew: {why}")
        storage.remove(self.folder)  # under another name at once: a kill leaves no figure without those before it
        storage.make_folder(self.folder)
        return []

    def _kept(self, found: list[CheckRecord]) -> int:
        """Return which check's model is kept: the one that would be picked now."""
        picked = self.check.picked(_figures(found))
        return next(one.until for one in found if one.figure == picked)

    def _forget(self, found: list[CheckRecord]) -> None:
        """Take away the measured models but for the one that would be picked now."""
        for until in {one.until for one in found} - {self._kept(found)}:
            if self._place(until).exists():
                storage.remove(self._place(until))

    def _picked(self, found: list[CheckRecord]) -> Trained:
        """Hand out the picked model by links: a kill between its way into the round and the commit finds it here again."""
        place = self._place(self._kept(found))
        said, out = _said(place), storage.temporary(self.paths.tmp, "-child")
        shutil.copytree(place, out, copy_function=os.link)
        self._account(found)
        checks = self.check.record(_figures(found), found[-1].whole, found[-1].of, self.how)
        return Trained(
            out / MODEL, said["metrics"], said["drops"], said["state"] and out / said["state"], found[-1].whole, checks
        )

    def _account(self, found: list[CheckRecord]) -> None:
        """Say who made all of it and what it took, from the figures: an earlier attempt may have made most of it, and elsewhere."""
        for kind, made in _merged(one.makers for one in found).items():
            self.makers[kind] |= set(made)
        self.notes["checked"] = {"generated": sum(one.tokens for one in found), "trained": found[-1].learned}


def _merged(makers: Iterable[Makers]) -> dict[str, list[str]]:
    merged: dict[str, set[str]] = {}
    for one in makers:
        for kind, made in one.items():
            merged.setdefault(kind, set()).update(made)
    return {kind: sorted(made - {""}) for kind, made in sorted(merged.items())}


def _figures(found: list[CheckRecord]) -> list[Figure]:
    return [one.figure for one in found]


def _said(place: Path) -> dict[str, Any]:
    said = json.loads((place / TRAINED).read_text("utf-8"))
    if not isinstance(said, dict):
        raise ValueError(f"{TRAINED} holds no object")
    return said


def _is_sound(place: Path) -> bool:
    """Whether all files of a segment, and what was said of it, are there as they were written."""
    try:
        said = _said(place)
        return digest.intact(said) and not storage.damaged(said["files"], place, rehash=True)
    except (OSError, ValueError, KeyError):
        return False
