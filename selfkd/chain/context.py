"""What a step may ask while it runs (`steps.context.Context`), answered from a run, a round and a backend."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import (
    AnswerProgress,
    Backend,
    Chunk,
    Logprob,
    OptimiserState,
    Questions,
    Sampling,
    Trained,
    TrainProgress,
    TrainSpec,
    made_by,
)
from selfkd.backend.reading import PART, Read, Reading
from selfkd.backend.tokens import OF_A_PROMPT
from selfkd.chain import agreement, chunks, rounded, updates
from selfkd.chain.attempt import Attempt
from selfkd.chain.checks import ANSWERS, CheckedUpdate, CheckPlace, check_place, how_measured
from selfkd.chain.chunks import Asked, Tally
from selfkd.chain.commit import Place, pruned_paths
from selfkd.chain.computers import kind_of
from selfkd.chain.head_start import HeadStart, completed
from selfkd.chain.numerics import engine_casts
from selfkd.chain.run import SCORER, Run
from selfkd.chain.states import state_of
from selfkd.core import digest, storage, views
from selfkd.core.hardware import usable_cores
from selfkd.core.known_models import KnownModels
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Function, Model, Pool
from selfkd.core.views import Kind
from selfkd.errors import BackendError, ChainError, GuardError, UsageError
from selfkd.prompts import templates
from selfkd.prompts.read import places_of
from selfkd.prompts.template_fields import SAMPLES, uses
from selfkd.recipe import targets
from selfkd.rewards.pool import spread, worker_facts
from selfkd.rewards.tables import applied
from selfkd.steps.check import Check
from selfkd.steps.context import Messages, Render, Row

Earlier = Callable[[int | None], Iterator[tuple[int, Pool]]]


@dataclass(frozen=True)
class StepContext:
    """One step's view of its round. `notes` collects what this run of the step cost; it stays outside every digest.

    `makers` collects who computed: {kind of process: digests of their facts}. `head_start` is told of each finished chunk.
    """

    run: Run
    place: Place
    pool: Pool
    models: KnownModels
    backend: Backend
    attempt: Attempt
    rounds_before: Earlier
    head_start: HeadStart = field(default_factory=lambda: HeadStart(0))
    notes: dict[str, Any] = field(default_factory=dict)
    makers: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    @property
    def index(self) -> int:
        return self.place.index

    @property
    def where(self) -> str:
        return self.place.where

    @property
    def max_length(self) -> int:
        return self.run.recipe.context

    @property
    def engine_casts(self) -> bool:
        return engine_casts(self.run.numerics)

    def seed(self, *names: Any) -> int:
        return digest.seed(self.run.recipe.seed, self.index, self.place.step.name, *names)

    def model(self, reference: ModelRef) -> Model:
        found = self.models.find(reference, self.pool.models, self.where)
        names = (self.run.paths.round(seal.round) for seal in self.run.sealed())
        lies = rounded.located(self.run.folder, found).path
        if not (self.run.folder / lies).exists() and any(found.path in pruned_paths(one) for one in names):
            what = f"the weights of '{reference}' are not on disk any more: `keep` had them taken away ({found.path})"
            fix = f"Name other weights, such as '{reference.role}@now', and repeat the command with --amend."
            raise ChainError(what, self.where, f"{fix}   Or restore this folder from a copy.")
        return found

    def there(self, reference: ModelRef) -> bool:
        try:
            self.models.find(reference, self.pool.models, self.where)
        except ChainError:
            return False
        return True

    # ---- machines ----

    def load(
        self,
        source: Mapping[str, Any],
        dither: int | None,
        asked: Iterable[pl.DataFrame],
        shapes: Iterable[pl.DataFrame] = (),
        chat: Mapping[str, Any] | None = None,
    ) -> tuple[Path, dict[str, Any]]:
        out = storage.temporary(self.run.paths.tmp, "-model")
        questions = Questions(
            files=list(self._written(asked)),
            context=self.max_length,
            shapes=list(self._written(shapes)),
            words=chat or {},
            now=self.run.info.created,
        )
        notes = self.backend.load(source, out, dither, questions)
        targets.refuse(self.run.recipe, out)
        return out, notes

    def _written(self, parts: Iterable[pl.DataFrame]) -> Iterator[Path]:
        for part in parts:
            path = storage.temporary(self.run.paths.tmp, "-questions.parquet")
            part.write_parquet(path)
            yield path

    def places(self, split: str, ids: Collection[str]) -> dict[str, str]:
        return places_of(self.run.recipe.splits()[split], self.run.recipe.folders, split, ids)

    def say(self, text: str) -> None:
        self.attempt.warn(text)

    def generate(
        self, model: Model, requests: pl.DataFrame, sampling: Sampling, stream: str, about_samples: bool = False
    ) -> list[Path]:
        self._refuse_repeats(requests)
        place, tmp = self.place, self.run.paths.tmp
        drop = about_samples and self.run.recipe.long == "drop"
        asked = Asked(requests, place.generation_key, model, sampling, stream, place.data, tmp, drop)
        wanted = asked.cut(self._chunk_size(asked))
        done = chunks.finished(wanted, model)
        for path in done.values():
            self.head_start.add(path)
        todo = [chunk for chunk in wanted if chunk.key not in done]
        tally = Tally(self.progress, requests.height, requests.height - sum(chunk.requests.height for chunk in todo))
        self.progress(tally.answered, tally.total, "answers")
        if todo:
            done |= self._answered(model, todo, sampling, tally)
        missing = [chunk for chunk in wanted if chunk.key not in done]
        if missing:
            what = f"{len(missing)} of {len(wanted)} chunks were not answered"
            raise BackendError(what, self.where, "Repeat the command to go on.")
        files = [done[chunk.key] for chunk in wanted]
        self.makers["engine"] |= {made_by(path).facts for path in files}
        return files

    def _chunk_size(self, asked: Asked) -> int:
        usual = self.run.recipe.chunk
        if self.run.numerics["exact"]:
            return usual
        return chunks.recorded_size(asked, self.run.machine.generators, usual, self.place.cut)

    def _answered(self, model: Model, todo: list[Chunk], sampling: Sampling, tally: Tally) -> dict[str, Path]:
        """Return {key: file} of chunks that the backend answers now, each with the weights that were asked for."""
        asked = {chunk.key: chunk for chunk in todo}
        done: dict[str, Path] = {}
        with self._asking():
            for reply in self.backend.generate(self.run.trust.weights(model), todo, sampling, tally.tell):
                self._met()  # before the answers count: which numerics and which facts they are of is then on disk
                chunk = asked[reply.key]
                done[reply.key] = chunks.named(chunk, reply, model, self.where)
                self.head_start.add(done[reply.key])
                tally.add(chunk.requests.height, reply.tokens)
        if swap := self.backend.swap_notes():
            self.notes["swap"] = {**swap, "weights": model.digest}
        return done

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Have an error about a prompt, which an engine knows by its words alone, name the step that asks it too."""
        try:
            yield
        except UsageError as error:
            known = f"{self.where}: {error.where}" if error.where.startswith(OF_A_PROMPT) else error.where
            raise UsageError(error.what, known, error.fix) from error

    def _refuse_repeats(self, requests: pl.DataFrame) -> None:
        if requests["id"].n_unique() < requests.height:
            repeated = requests.filter(requests["id"].is_duplicated())["id"][0]
            fix = "Nothing was asked. Report it with the recipe and this message."
            raise GuardError(f"the request {repeated} is there twice", self.where, fix)

    def _met(self, kind: str = "") -> None:
        """Keep what the engines and ranks that came up compute with; of `kind`, count them among those that made this step."""
        for process, facts in self.run.meet(self.backend.facts(), self.attempt).items():
            if kind == kind_of(process):
                self.makers[kind].add(facts)

    def logprobs(self, model: Model, rows: pl.DataFrame) -> Iterator[Logprob]:
        scored = 0

        def tell(unfinished: AnswerProgress) -> None:
            self.progress(scored + unfinished["requests"], rows.height, "samples")

        with self._asking():
            for scored, score in enumerate(self.backend.logprobs(self.run.trust.weights(model), rows, tell), 1):  # noqa: B007 - told above
                yield score
        self._met("engine")

    def read(self, model: Model, reading: Reading, rows: pl.DataFrame) -> Iterator[Read]:
        held = model if model.role == SCORER else self.run.trust.weights(model)
        done = 0
        for done, found in enumerate(self.backend.read(held, reading, rows), 1):
            if done % PART == 0:
                self.progress(done, rows.height, "samples")
            yield found
        self.progress(done, rows.height, "samples")
        self._met("reader")

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        return self.backend.lengths(self.run.trust.weights(model), rows)

    def average(self, models: Sequence[tuple[Model, float]]) -> Path:
        out = storage.temporary(self.run.paths.tmp, "-average")
        self.backend.average([(self.run.trust.masters(model), share) for model, share in models], out)
        return out

    def train(
        self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec, check: Check | None = None
    ) -> Trained:
        spec = replace(spec, state=self._state_of(start)) if spec.keeps_state else spec
        said, why = agreement.said_of(rows, self.pool, start, spec.seed)
        spec = spec if said is None else replace(spec, sampled=next(self._written([said])))
        return self._agreed(self._updated(start, reference, rows, spec, check), start, why)

    def _agreed(self, trained: Trained, start: Model, why: str) -> Trained:
        """Return an update with how far engine and trainer lay apart where it began, or why nobody can say; warn where that is too far."""
        found = {"why": why} if why else trained.metrics.get("engine_apart")
        if not found:
            return trained
        made = [one for seal in self.run.sealed()[-1:] for one in self.run.commits(seal)] + list(
            self.run.made(self.index).values()
        )
        found = agreement.judged(found, agreement.of_engine(made, start))
        if warning := agreement.alarm(found, self.where):
            self.say(warning)
            found["alarm"] = warning
        return replace(trained, metrics={**trained.metrics, "engine_apart": found})

    def _updated(
        self, start: Model, reference: Model | None, rows: pl.DataFrame, spec: TrainSpec, check: Check | None
    ) -> Trained:
        asked = check_place(self.place, self.run, check.metric) if check else None
        kept = ["state"] if spec.keeps_state else []  # the segments on disk have one, or none
        judged = [check.model_dump(mode="json"), asked.key, *kept] if check and asked else None
        name = updates.key(start, reference, rows, spec, self.run.numerics, judged)
        spec = replace(spec, saves=updates.saves(self.run.paths, name, self.run.machine.checkpoint_minutes))
        path = storage.temporary(self.run.paths.tmp, "-rows.parquet")
        rows.write_parquet(path)
        held = reference and self.run.trust.masters(reference)
        train = partial(self._trained, self.run.trust.masters(start), held, path, spec)
        if check is None or asked is None:
            trained, makers = train(None, storage.temporary(self.run.paths.tmp, "-child"))
            self.makers["trainer"] |= makers["trainer"]
            return trained
        folder, how = self.run.paths.update(name), how_measured(asked, check.metric)
        measure = partial(self._measured, check.metric, replace(asked, folder=folder / ANSWERS), self._child_of(start, spec))
        told = (self.attempt, self.where, self.makers, self.notes)
        return CheckedUpdate(check, how, folder, self.run.paths, train, measure, *told).made()

    def _trained(
        self, start: Model, reference: Model | None, rows: Path, spec: TrainSpec, until: int | None, out: Path
    ) -> tuple[Trained, dict[str, set[str]]]:
        """Return what an update is up to a step, and who made it; `makers` do not hear of it."""
        apart = replace(self, makers=defaultdict(set))
        trained = self.backend.train(start, reference, [rows], replace(spec, until=until), out, self._hear)
        apart._met("trainer")
        apart.makers["trainer"] |= {one for ranks in trained.metrics.get("made_by", ()) for one in ranks.get("facts", ())}
        return trained, apart.makers

    def _child_of(self, start: Model, spec: TrainSpec) -> Model:
        """Return what the update of this step makes, without its path and its digest."""
        role = self.place.step.trained_role() or ""
        return Model(role, "", "", "adapter", start.base or start.path) if spec.lora else Model(role, "", "")

    def _measured(
        self, metric: str, place: CheckPlace, like: Model, folder: Path, weights: str
    ) -> tuple[float | None, int, dict[str, set[str]]]:
        """Return what the measure step at `place` says of a model that is not committed, such as `like`, the tokens that it generated, and who did it.

        Its answers stay outside the pool.
        """
        model = replace(like, path=self.run.paths.relative(folder), digest=weights)
        pool = Pool(models={**self.pool.models, like.role: model})
        inside = replace(self, place=place, pool=pool, head_start=HeadStart(0), notes={}, makers=defaultdict(set))
        found = place.step.run(pool, inside).metrics
        return found[metric], int(found[f"{metric.partition('/')[0]}/tokens"]), inside.makers

    def _state_of(self, start: Model) -> OptimiserState | None:
        """Return with which optimiser's state an update goes on (None: it begins with an empty one), and say so."""
        found = state_of(self.run.paths, self.run.trust, start, self.where)
        goes_on = f"goes on with the optimiser of {start}" if found else f"begins with an empty optimiser: {start} brings none"
        self.attempt.event("continues", text=f"{self.where} {goes_on}")
        self.notes["optimiser"] = {"of": start.digest, "state": found and found.digest}
        return found

    def _hear(self, done: TrainProgress) -> None:
        """Pass on how far an update is, and what its ranks have to say; keep what those computed with that are gone."""
        for process, facts in done.get("computers", ()):
            self.run.meet({process: facts}, self.attempt)
        if done.get("warning"):
            self.attempt.warn(done["warning"])
        elif done.get("said"):
            self.attempt.event("continues", text=done["said"])
        else:
            self.progress(done["step"], done["steps"], "steps", loss=done["loss"])

    def map(
        self, function: Function, batches: Iterable[list[Row]], samples: Iterable[str], timeout: float
    ) -> Iterator[list[tuple[float | None, str]]]:
        worked, known = False, self.head_start.known(function)
        held = len(known)
        compute = partial(spread, function, workers=usable_cores(), timeout=timeout)
        for results in completed(batches, samples, known, compute):
            worked = True
            yield results
        if used := held - len(known):
            self.notes["scored_ahead"] = self.notes.get("scored_ahead", 0) + used
        if worked:
            kind = f"reward-{function.digest[:12]}"
            self.makers[kind] |= set(self.run.computers.meet({kind: worker_facts(function)}, self.attempt).values())

    def apply(
        self, reference: str, params: Mapping[str, Any], tables: Mapping[str, pl.DataFrame], timeout: float
    ) -> dict[str, pl.DataFrame]:
        function = self.run.function(reference, params)
        made = applied(function, tables, timeout, self.where)
        kind = f"reward-{function.digest[:12]}"
        self.makers[kind] |= set(self.run.computers.meet({kind: worker_facts(function)}, self.attempt).values())
        return made

    # ---- what the run holds ----

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        return self.run.function(reference, params)

    def scorer(self, field: str, reference: str, reading: Reading) -> Model:
        return self.run.scorer(reference)

    def loss(self, reference: str, params: Mapping[str, Any]) -> Function:
        return self.run.function(reference, params)

    def template(
        self, field: str, reference: str, of: Sequence[str] | None = None, shows: Mapping[str, str] | None = None
    ) -> Render:
        template = self.run.template(reference)

        def render(prompt: Row, messages: Messages, of: Row | None = None, **more: Any) -> Messages:
            return templates.with_last_message(messages, template.render(prompt=templates.prompt_of(prompt), of=of, **more))

        return render

    def sample_fields(self, reference: str) -> Collection[str]:
        return {use.name for use in uses(self.run.template(reference)) if use.owner in SAMPLES}

    def expression(self, field: str, text: str, table: pl.DataFrame, kind: Kind) -> pl.Expr:
        return views.expression(text, table, kind, f"{self.where} '{field}'")

    def earlier(self, window: int | None) -> Iterator[tuple[int, Pool]]:
        return self.rounds_before(window)

    def split(self, name: str) -> Pool:
        held, dropped = self.run.split(name), self.run.dropped_prompts()
        return Pool({"prompts": held.prompts.filter(~pl.col("id").is_in(dropped["id"].implode()))}, held.files)

    def data(self, name: str) -> pl.DataFrame:
        return pl.read_parquet(self.run.data(name), glob=False)

    def save(self, table: str, frame: pl.DataFrame) -> Path:
        return storage.write_parquet(frame, self.place.data, self.run.paths.tmp)

    def progress(self, done: int, total: int, unit: str, **more: Any) -> None:
        self.attempt.event("progress", round=self.index, step=self.place.step.name, done=done, total=total, unit=unit, **more)
