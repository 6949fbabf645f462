"""A sealed round walked once more over its stored tables: what each step that needs no machine makes of them now.

Every selection and every training row follows from what was sampled and scored before it. So each such step is run again, by its own
code, over what is read back, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, cast

import polars as pl

from selfkd.backend.base import Backend
from selfkd.chain import commit, standing
from selfkd.chain.attempt import Attempt
from selfkd.chain.commit import Place
from selfkd.chain.context import StepContext
from selfkd.chain.records import Amendment, Commit, Info, Record
from selfkd.chain.round import Round
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import KEYS, Addition, Pool, light
from selfkd.errors import ChainError, SelfkdError, UsageError
from selfkd.recipe.load import frozen
from selfkd.steps import Step
from selfkd.steps.build import BuildStep
from selfkd.steps.score import ScoreStep
from selfkd.steps.train import TrainStep

FROM_TABLES = ("replay", "gold", "select", "build")  # verbs that read tables and nothing else


@dataclass(frozen=True)
class Again:
    """A step of a sealed round, the pool before it, and what it makes of that pool now; None where it needs a machine.

    `why` says why it could not be run again although it needs none.
    """

    made: Commit
    step: Step
    pool: Pool
    added: Addition | None
    why: str = ""

    def differing(self) -> list[str]:
        """Return the tables that are not what was committed, each with the rows then and now."""
        if self.added is None:
            return []
        names = [name for name in (self.made.tables.keys() | self.added.tables.keys()) if self._counts(name)]
        return [said for name in sorted(names) if (said := self._compared(name))]

    def _counts(self, name: str) -> bool:
        """Whether a table is one that the step made of tables: what a trainer refused is not."""
        return not (self.step.verb == TrainStep.verb and name == "drops")

    def _compared(self, name: str) -> str:
        assert self.added
        now = self.added.whole(name) if name in self.added.tables else pl.DataFrame()
        was = self.made.tables.get(name)
        if (was.digest if was else digest.table(now.clear(), KEYS[name])) == digest.table(now, KEYS[name]):
            return ""
        return f"{name}: {was.rows if was else 0} rows were committed, and its own code makes {now.height} now"


class _Silent(Attempt):
    """An attempt that logs nothing: what is worked out again is no part of the run."""

    def event(self, kind: str, **more: Any) -> None: ...


class _NoBackend:
    """A backend that cannot be asked for anything."""

    def __getattr__(self, name: str) -> Any:
        raise ChainError(f"needs a machine ({name})", "again")


@dataclass
class Walk:
    """A walk of a sealed round; iterating it yields each step inside the pool, in order. `pool` is what all of them so far have made.

    With `scores`, each is a table that stands for all scores of its name: steps behind it see what these would have led to.
    """

    run: Run
    index: int
    scores: Mapping[str, pl.DataFrame] = field(default_factory=dict)
    round: Round = field(init=False)
    pool: Pool = field(init=False)
    parent: str = field(init=False)

    def __post_init__(self) -> None:
        silent, nobody_asked = _Silent(0, self.run.paths), cast(Backend, _NoBackend())
        self.rounds = [Round(run, self.index, nobody_asked, silent) for run in _as_it_was(self.run)]
        self.round = self.rounds[0]
        self.pool, self.parent = self.round.opening_pool(), self.round.follows

    def __iter__(self) -> Iterator[Again]:
        sealed = self.run.sealed()
        if not 0 <= self.index < len(sealed):
            raise UsageError(f"round {self.index} is not sealed", str(self.run.folder), f"Sealed: 0 to {len(sealed) - 1}")
        return (self._step(made) for made in self.run.commits(sealed[self.index]) if not made.outside)

    def _step(self, made: Commit) -> Again:
        """Run one step again, if it needs no machine, and go on with what was committed, or with what follows from other scores."""
        found = self._found(made)
        if found is None:
            raise ChainError("no recipe of this run has this step", f"{self.run.folder.name}/{made.step}")
        round_, step = found
        added, why = self._worked_out(round_, step, made) if _from_tables(step) else (None, "")
        result = Again(made, step, self.pool, added, why)
        follows = self._instead(made, added) if self.scores else commit.pool_of(self.run.paths, made)
        step.adds(round_.seen)
        self.pool = self.pool + follows + Pool(scores_named=tuple(round_.seen.scores))
        self.parent = made.digest
        return result

    def _found(self, made: Commit) -> tuple[Round, Step] | None:
        """Return the recipe that a step was made by: the one in force, or an earlier one; told by the step's key."""
        for round_ in self.rounds:
            for step in [*round_.recipe.steps_of(self.index), *round_.recipe.closing_steps(self.index)]:
                code = commit.code_of(step, round_.run.code)
                if (
                    step.name == made.step
                    and Place(self.run.paths, self.index, made.number, step, self.parent, code).key == made.key
                ):
                    return round_, step
        return None

    def _worked_out(self, round_: Round, step: Step, made: Commit) -> tuple[Addition | None, str]:
        place = Place(self.run.paths, self.index, made.number, step, self.parent, made.code)
        context = StepContext(round_.run, place, self.pool, round_.models, round_.backend, round_.attempt, round_.earlier)
        try:
            return _of_tables(step, self.pool, context), ""
        except SelfkdError as error:
            return None, str(error)

    def _instead(self, made: Commit, added: Addition | None) -> Pool:
        """Return what a step would have added with the other scores: of tables, what it makes now; of a machine, what it made, those left out."""
        if added is not None:
            files = commit.pool_of(self.run.paths, made).files  # of texts, which no score changes
            return Pool({name: light(name, added.whole(name)) for name in added.tables}, files)
        was = commit.pool_of(self.run.paths, made)
        if "scores" not in was.tables:
            return was
        named = [name for name in self.scores if name in set(was.scores["name"])]
        kept = was.scores.filter(~pl.col("name").is_in(named))
        return replace(was, tables={**was.tables, "scores": pl.concat([kept, *(self._of(name, was) for name in named)])})

    def _of(self, name: str, was: Pool) -> pl.DataFrame:
        scored = was.scores.filter(pl.col("name") == name)["sample"]
        return self.scores[name].filter(pl.col("sample").is_in(scored.implode())).select(was.scores.columns)


def _from_tables(step: Step) -> bool:
    """Whether a step reads tables and nothing else. Of a training step that builds plain rows, these are."""
    if isinstance(step, ScoreStep):
        return bool(step.value or step.elo or step.shuffled)
    return step.verb in FROM_TABLES or isinstance(step, TrainStep)


def _of_tables(step: Step, pool: Pool, context: StepContext) -> Addition | None:
    if not isinstance(step, TrainStep):
        return step.run(pool, context)
    if step.rows_of(pool).height or not step.builds_itself(pool.rows.height > 0):
        return None
    return BuildStep(name=step.name, role=step.role, as_=step.of).run(pool, context)


def _as_it_was(run: Run) -> list[Run]:
    """Return the run under each recipe that was in force, the newest first."""
    return [_under(run, one) for one in (*standing.amendments(run.paths)[::-1], run.info)]


def _under(run: Run, record: Record) -> Run:
    other = copy(run)
    assert isinstance(record, Amendment | Info)
    other.recipe = frozen(dict(record.recipe), run.folder).model_copy(update={"model": run.recipe.model})
    other.code = {**record.code, **run.info.data}
    return other
