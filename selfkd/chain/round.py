"""A round: walks steps over a pool, commits each or reads it back, and is sealed."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import polars as pl

from selfkd.backend.base import Backend
from selfkd.chain import agreement, commit, drawn, filtering, measured, numerics, records, steering, updates, ways
from selfkd.chain.attempt import Attempt
from selfkd.chain.commit import Place
from selfkd.chain.context import StepContext
from selfkd.chain.head_start import HeadStart, spare_workers
from selfkd.chain.models import known_models
from selfkd.chain.records import Commit, ModelEntry, Seal
from selfkd.chain.retention import prune
from selfkd.chain.run import Run, head_of
from selfkd.core import digest, drawing, views
from selfkd.core.known_models import Models
from selfkd.core.pool import Pool
from selfkd.errors import Stopped
from selfkd.recipe.walk import outlook
from selfkd.steps import VERBS, Step
from selfkd.steps.score import ScoreStep

LACKING = {
    "measured": "no intervals were",
    "filter": "how good its filter is was not",
}  # what a reader of a round then does without


def open_round(run: Run, index: int, backend: Backend, attempt: Attempt) -> Round:
    """Begin round `index`, or go on with it. Call it under the lease: it empties tmp/."""
    run.refuse_replaced()
    run.clean_tmp()
    attempt.event("round", round=index, last=run.recipe.rounds)
    return Round(run, index, backend, attempt)


class Round:
    """Round `index` of `run`: `once` each step in order, `seal` at the end. `made` are the commits so far."""

    def __init__(self, run: Run, index: int, backend: Backend, attempt: Attempt) -> None:
        self.run, self.index, self.backend, self.attempt, self.recipe = run, index, backend, attempt, run.recipe
        self.before = run.sealed()[:index]  # all there are, unless a sealed round is walked again
        self.start: Models = head_of(self.before)
        self.follows = self.before[-1].digest if self.before else run.info.root
        self.parent = self.follows  # of the next step
        self.made: list[Commit] = []
        self.models = known_models(index, self.start, self.before, self.recipe.best, run.loaded)
        self.head_start = HeadStart(spare_workers(run.machine.generators, run.numerics["threads"]))
        self.seen = outlook(run.recipe)  # names the scores that expressions may use, whether or not a sample has one yet

    # ---- the walk ----

    def opening_pool(self) -> Pool:
        """Return the prompts of this round (all, or those that `take` draws) and the models at the head.

        Prompts that the load step dropped are dropped in every round; in round 0 the step itself adds these drops.
        """
        train = self.run.split("train")
        prompts = self._drawn(train)
        tables = {"prompts": prompts}
        if self.index:
            tables["drops"] = self.run.dropped_prompts().join(prompts, on="id", how="semi")
        return Pool(tables, train.files, self.start)

    def _drawn(self, train: Pool) -> pl.DataFrame:
        take, prompts = self.recipe.prompts.take, train.prompts
        if not take or not self.index:
            return prompts
        if isinstance(take, int) or not take.by:
            return drawing.next_of(prompts, self.recipe.take or 0, self.index)
        dropped = self.run.dropped_prompts()["id"]
        askable = Pool({"prompts": prompts.filter(~pl.col("id").is_in(dropped.implode()))}, train.files)
        names = self.seen.replayable.scores if self.seen.replayable else []
        found = drawn.chosen(askable, take, take.by, self.index, self.recipe.seed, self.earlier, names)
        if found.height < min(take.n, askable.prompts.height):
            self.attempt.warn(
                f"round {self.index} asks {found.height} prompts, not {take.n}: the others have no chance (take.by)"
            )
        return found

    def once(self, step: Step, pool: Pool) -> Pool:
        """Return what `step` adds to `pool`: read back if this very step was already made, else made and committed."""
        code = commit.code_of(step, self.run.code)
        place = Place(self.run.paths, self.index, len(self.made) + 1, step, self.parent, code)
        commit.refuse_another(place)
        fresh = not place.commit.exists()
        if fresh:
            try:
                self._make(place, pool)
            except BaseException:
                self.head_start.stop()
                raise
        made = commit.read(place)
        for role, entry in made.models.items() if fresh else ():
            self.run.trust.know(entry.model(role))
        self.made.append(made)
        self.parent = made.digest
        seconds = made.notes.get("seconds")
        self.attempt.event(
            "made", round=self.index, step=step.name, verb=step.verb, seconds=seconds, metrics=dict(made.metrics)
        )
        step.adds(self.seen)
        return commit.pool_of(self.run.paths, made) + Pool(scores_named=tuple(self.seen.scores))

    def _make(self, place: Place, pool: Pool) -> None:
        step = place.step
        self.attempt.event("step", round=self.index, step=step.name, verb=step.verb, stage=step.stage, number=place.number)
        self._expect(step, pool)
        context = StepContext(self.run, place, pool, self.models, self.backend, self.attempt, self.earlier, self.head_start)
        began = time.monotonic()
        added = step.run(pool, context)
        spent = {"seconds": round(time.monotonic() - began, 3), "attempt": self.attempt.number, "host": platform.node()}
        context.makers["driver"].add(self.run.computers.driver(self.attempt))
        makers = {kind: sorted(made - {""}) for kind, made in sorted(context.makers.items())}
        commit.write(place, added, pool, self.start, {**context.notes, **added.notes, **spent, "makers": makers})
        if step.trained_role():
            updates.clear(self.run.paths)

    def _expect(self, step: Step, pool: Pool) -> None:
        """Let the rewards of the score step behind a `sample` step begin with what that one finishes."""
        if step.stage == "score":
            return  # it takes what was scored ahead
        self.head_start.stop()
        following = next_step(self.recipe.steps_of(self.index), step) if step.stage == "generate" else None
        if not isinstance(following, ScoreStep):
            return
        try:
            functions = [self.run.function(reference, following.params) for reference in following.functions()]
            self.head_start.expect(following, functions, pool)
        except Stopped:
            raise
        except Exception:
            self.head_start.stop()  # whatever is wrong with a reward stops the step that it belongs to

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        """Yield (round, what it made) of the accepted rounds before this one, newest first, `window` rounds back at most; of round 0 for 0."""
        train = self.run.split("train")
        after_base = self.before[1:]
        chosen = self.before[:1] if window == 0 else after_base[-window:] if window else after_base
        for seal in reversed(chosen):
            if seal.accepted:
                pool = Pool({"prompts": train.prompts}, train.files)
                for made in self.run.commits(seal):
                    self.run.trust.files({name: entry for name, entry in made.files.items() if name.endswith(".parquet")})
                    pool += commit.own_pool_of(self.run.paths, made)
                yield seal.round, pool

    # ---- the end of a round ----

    def stop_reason(self, pool: Pool) -> str:
        """Return why this round is the last one before `rounds` is reached, or ''."""
        if self.index >= self.recipe.rounds:
            return ""
        spent = self._generated() + self.run.spent(self.before)
        return steering.stop_reason(self.recipe.stop, self.before, pool.metrics, self._measures(), self.index, spent)

    def _generated(self) -> int:
        """Return the tokens generated in this round so far, by the samples that its commits hold: a kill changes nothing in them."""
        return sum(commit.generated_tokens(self.run.paths, made) for made in self.made)

    def closing_steps(self, stop: str) -> list[Step]:
        """Return the steps that only a last round has, where this one is the last before `rounds` is reached.

        A round in which a first one of them was made keeps them all, though the run was given more rounds since: what is made counts.
        """
        if self.index >= self.recipe.rounds:
            return []  # they are among the round's steps
        begun = self.run.paths.round(self.index).at_number(len(self.made) + 1)
        return self.recipe.closing_steps(self.index) if stop or begun else []

    def _measures(self) -> dict[str, str]:
        return {name: how for made in self.made if made.outside for name, how in ways.measures_of(made).items()}

    def seal(self, pool: Pool, stop: str) -> None:
        """Commit the round: accepted or rolled back, the head it leaves, and the digest that the next round follows."""
        measures = self._measures()
        metrics = {**pool.metrics, **self._changes()}
        accepted, why = steering.verdict(self.recipe.keep_if, self.recipe.best, self.before, metrics, measures)
        head = {role: ModelEntry.of(model) for role, model in (pool.models if accepted else self.start).items()}
        names = self.run.paths.round(self.index)
        seal = Seal(
            format=records.FORMAT,
            round=self.index,
            parent=self.follows,
            steps=tuple(commit.entry_of(names, made) for made in self.made),
            models=head,
            metrics=metrics,
            accepted=accepted,
            why=why,
            stop=stop,
            digest=records.round_digest(self.index, self.parent, head, accepted),
            measures=measures,
            notes=self._notes(pool),
        )
        updates.clear(self.run.paths)  # of an update that a kill came behind, or that another recipe made
        records.write(names.seal, seal, self.run.paths.tmp)
        sealed = records.read(names.seal, Seal)
        prune(self.run, self.attempt.warn)
        told = {"metrics": sealed.metrics, "accepted": sealed.accepted, "notes": sealed.notes, "digest": sealed.digest}
        self.attempt.event("sealed", round=self.index, **told)

    def _changes(self) -> dict[str, float | None]:
        """Return the changes against the base, paired by prompt, and the bounds of their intervals, as far as `keep_if` names them."""
        named = {name.partition("_change")[0] for name in views.named_in(self.recipe.keep_if) if "_change" in name}
        found = measured.measurements(self.run.paths, self.made).values() if named and self.index else ()
        return {
            name: value for one in found if one.name.replace("/", "_") in named for name, value in measured.changes(one).items()
        }

    def _notes(self, pool: Pool) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        for made in self.made:
            stage = VERBS[made.verb].stage if made.verb in VERBS else "other"
            seconds[stage] = round(seconds.get(stage, 0) + made.notes.get("seconds", 0), 3)
        told: dict[str, Any] = {
            "seconds": seconds,
            "tokens": self._generated(),
            "funnel": views.funnel(pool),
            "level": self._level(),
        }
        apart = agreement.recorded(self.made)
        told |= {"engine_apart": apart} if apart else {}
        return {**told, **self._shown("measured", self._measured), **self._shown("filter", self._filtered)}

    def _measured(self) -> dict[str, Any]:
        return {name: one.to_json() for name, one in measured.measurements(self.run.paths, self.made).items()}

    def _filtered(self) -> list[dict[str, Any]]:
        found = filtering.filters(self.run.paths, self.made, lambda reference: self.run.function(reference, {}))
        return [one.to_json() for one in found]

    def _shown(self, name: str, work_out: Callable[[], Any]) -> dict[str, Any]:
        """Return what readers are told beside the metrics. Nothing of it steers: where it cannot be made, the round is sealed without."""
        try:
            found = digest.as_json(work_out())
        except Stopped:
            raise
        except Exception as error:
            why = str(error) or type(error).__name__
            self.attempt.event("warning", text=f"round {self.index}: {LACKING[name]} worked out: {why}")
            return {}
        return {name: found} if found or name == "measured" else {}

    def _level(self) -> str:
        """Return `exact` (canonical chunks, made by what the run began with, trained so that it repeats), or `data` and what moved."""
        makers = [made.notes.get("makers", {}) for made in self.made]
        made_by = [ranks for made in self.made for ranks in made.notes.get("train", {}).get("made_by", ())]
        ranks = numerics.other_ranks(numerics.kept(self.run.paths, self.run.info), made_by)
        if moved := [*self.run.computers.moved(makers), *ranks]:
            return "data: " + "; ".join(moved)
        if not self.run.numerics["exact"]:
            return "data"
        loose = self.run.computers.unrepeatable(makers)
        return "data: " + "; ".join(loose) if loose else "exact"


def next_step(steps: Sequence[Step], step: Step) -> Step | None:
    """Return the step behind the one of this name."""
    names = [one.name for one in steps]
    behind = steps[names.index(step.name) + 1 :] if step.name in names else []
    return behind[0] if behind else None
