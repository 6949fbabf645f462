"""A run on disk: opened with a recipe or as it was frozen, its sealed rounds, and the head of its chain.

Nothing in a run folder is ever rewritten: commits are put if absent, data is named by its hash, and what a crash leaves in tmp/ is
garbage by definition. Creating a run is `freeze`, changing one `amend`, walking one `loop`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import polars as pl

from selfkd.backend.machine import NUMERIC, Machine, settings
from selfkd.chain import amend, contents, data, numerics, records, rounded, scorers, standing, steering
from selfkd.chain.attempt import Attempt, Watch, nobody
from selfkd.chain.commit import generated_in
from selfkd.chain.computers import Computers
from selfkd.chain.freeze import begin_anew, create, edited_prompts
from selfkd.chain.models import known_models
from selfkd.chain.paths import Paths, no_run
from selfkd.chain.records import CodeEntry, Commit, Info, Seal
from selfkd.chain.trust import Trust
from selfkd.core import storage
from selfkd.core.facts import Facts
from selfkd.core.files import reference_parts
from selfkd.core.lease import Lease
from selfkd.core.model_ref import ModelRef
from selfkd.core.pool import Function, Model, Pool, read_light
from selfkd.errors import ChainError, UsageError
from selfkd.prompts import templates
from selfkd.recipe import ready
from selfkd.recipe.load import frozen
from selfkd.recipe.schema import Origin, Recipe, Stop

SCORER = "scorer"  # role of a model that is of no chain
MORE_ROUNDS = 3  # that an ended run is offered


class Run:
    """One chain. `open` creates it or goes on with it; `at` opens it with the recipe and the code frozen inside it."""

    def __init__(self, paths: Paths, recipe: Recipe, machine: Machine, info: Info) -> None:
        self.paths, self.recipe, self.info = paths, recipe, info
        machine = replace(machine, max_model_len=recipe.context)
        kept = numerics.in_force(paths, info, recipe, machine)
        self.numerics: Mapping[str, Any] = numerics.with_ranks(kept, machine)
        self.other_ranks = numerics.other_ranks(kept, [{name: self.numerics[name] for name in numerics.RANKS if name in kept}])
        self.ignored = numerics.ignored(self.numerics, machine)
        self.machine = replace(machine, **{name: self.numerics[name] for name in NUMERIC if name in self.numerics})
        self.trust, self.computers = Trust(paths.folder), Computers(paths, info)
        in_force = standing.in_force(paths, info)
        self.code: Mapping[str, CodeEntry] = {**in_force.code, **info.data}
        self._code_files = in_force.files
        self._fixed = paths.numerics.exists()
        self._splits: dict[str, Pool] = {}
        self._sealed: list[Seal] = []
        self._tokens: dict[int, int] = {}
        self.anew: list[str] = []  # what changed in the recipe since an attempt that committed nothing

    @property
    def folder(self) -> Path:
        return self.paths.folder

    # ---- opening ----

    @classmethod
    def open(cls, recipe: Recipe, folder: Path, machine: Machine, amended: bool = False) -> Self:
        """Create the run, or go on with it if its recipe is the same; `amended` accepts changes to steps not made yet.

        A run in which nothing was committed is no chain yet: another recipe begins it anew. Nothing is created that could not begin.
        """
        paths, whole, anew = Paths(folder), replace(machine, max_model_len=recipe.context), list[str]()
        if not paths.info.exists():
            ready.refuse(recipe, machine)
            create(recipe, paths, whole)
        elif not paths.holds_a_chain and amend.changes(recipe, paths):
            ready.refuse(recipe, machine)
            anew = list(begin_anew(recipe, paths, whole, lambda: amend.changes(recipe, paths)))
        info = records.read(paths.info, Info)
        run = cls(paths, amend.accept(recipe, paths, info, machine.environment, amended), machine, info)
        run.anew = anew
        return run

    @classmethod
    def at(cls, folder: Path, machine: Machine | None = None) -> Self:
        """Open an existing run with its own recipe; works on a folder that was moved. UsageError where there is none."""
        paths = Paths(folder)
        if not paths.info.is_file():
            raise no_run(folder)
        info = records.read(paths.info, Info)
        recipe = frozen(dict(standing.in_force(paths, info).recipe), folder)
        recipe = recipe.model_copy(update={"model": Origin(**info.model)})  # found where the recipe lay, not where we are now
        known = {one.name for one in settings()}
        own = Machine(**{name: value for name, value in info.machine.items() if name in known})
        run = cls(paths, recipe, machine or own, info)
        run.ignored = run.ignored if machine else []  # nobody asked for anything
        return run

    def remarks(self) -> list[str]:
        """Return what a person should know who goes on with the run: that it begins anew, files that it does not follow any more."""
        anew = f"Nothing was committed in this run yet, so it begins anew: {'; '.join(self.anew)}."
        edited = [*edited_prompts(self.recipe, self.info.prompts), *data.edited(self.recipe, self.info.data)]
        return [*([anew] if self.anew else []), *edited, *scorers.edited(self.recipe, self.code, self.folder)]

    # ---- rounds ----

    def sealed(self) -> list[Seal]:
        """Return the sealed rounds, oldest first, each checked to follow the one before it. A seal never changes: it is read once."""
        while (path := self.paths.round(len(self._sealed)).seal).exists():
            seal = records.read(path, Seal)
            if seal.parent != (self._sealed[-1].digest if self._sealed else self.info.root):
                fix = f"See what is wrong: selfkd verify {self.folder}"
                raise ChainError("does not follow the round before it", self.paths.shown(path), fix)
            self._sealed.append(seal)
        return list(self._sealed)

    def rounds_to_walk(self) -> Iterator[int]:
        """Yield the number of each round that is not sealed yet, until the last one or one that stops the run."""
        while True:
            sealed = self.sealed()
            if len(sealed) > self.recipe.rounds or self.stop_reason(sealed):
                return
            yield len(sealed)

    def stop_reason(self, sealed: Sequence[Seal]) -> str:
        """Return why the run has ended before `rounds` was reached, or ''."""
        return steering.ended_early(self.recipe.stop, sealed, standing.amendments(self.paths), self.spent(sealed))

    def ways_on(self) -> tuple[list[str], list[str]]:
        """Return the overrides with which an ended run makes more rounds: of `rounds`, and of what ended it before, to be amended."""
        stop, sealed = self.recipe.stop, self.sealed()
        wider = self._wider(stop, sealed) if stop and self.stop_reason(sealed) else []
        reached = len(sealed) > self.recipe.rounds
        return ([f"rounds={self.recipe.rounds + MORE_ROUNDS}"] if reached or not wider else []), wider

    def _wider(self, stop: Stop, sealed: Sequence[Seal]) -> list[str]:
        """Return a larger patience where it was over, and a larger budget of tokens where it was spent."""
        patience, spent = steering.larger_patience(stop, sealed, MORE_ROUNDS), self.spent(sealed)
        return [f"stop.patience={patience}"] * (patience is not None) + (
            [f"stop.tokens={spent + stop.tokens}"] if stop.tokens and spent >= stop.tokens else []
        )

    def commits(self, seal: Seal) -> list[Commit]:
        """Return the commits of a sealed round, in order."""
        return [records.read(self.paths.round(seal.round).folder / step.file, Commit) for step in seal.steps]

    def spent(self, sealed: Sequence[Seal]) -> int:
        """Return the tokens that were generated in these rounds. What a seal holds never changes: it is counted once."""
        for seal in sealed:
            if seal.round not in self._tokens:
                self._tokens[seal.round] = generated_in(self.paths, seal)
        return sum(self._tokens[seal.round] for seal in sealed)

    def made(self, index: int) -> dict[str, Commit]:
        """Return {step: commit} of what is on disk of round `index`, sealed or not, in order."""
        found = [records.read(path, Commit) for path in self.paths.round(index).commits()]
        return {commit.step: commit for commit in found}

    def head(self) -> dict[str, Model]:
        """Return the models at the head of the chain, by role."""
        return head_of(self.sealed())

    def check_head(self) -> None:
        """Hash the weights that an attempt starts from, before an engine does."""
        for model in self.head().values():
            self.trust.weights(model)

    def loaded(self) -> Mapping[str, Model]:
        """Return the models as round 0 loaded them, before any warm-up."""
        first = next(iter(self.made(0).values()), None)
        return {role: entry.model(role) for role, entry in first.models.items()} if first else {}

    def dropped_prompts(self) -> pl.DataFrame:
        """Return the drops of the load step: prompts that no round may ask (`long: drop`)."""
        first = next(iter(self.made(0).values()), None)
        files = [self.folder / path for path in first.tables["drops"].files] if first and "drops" in first.tables else []
        return read_light("drops", files)

    # ---- reading it, as in a notebook ----

    @property
    def rounds(self) -> int:
        """How many rounds are sealed, round 0 left out."""
        return max(0, len(self.sealed()) - 1)

    def metrics(self) -> pl.DataFrame:
        """Return one row per sealed round: `round`, `accepted`, and a column per metric, null where it was not measured."""
        return contents.metrics(self.sealed())

    def samples(self, round: int | None = None, where: str | None = None, step: str | None = None) -> pl.DataFrame:
        """Return samples with their texts, scores, `kept` and `why`; of the newest round that has some, or of `round`.

        `where` is a SQL expression over all columns, such as "correct = 0 AND tokens > 100".
        """
        return contents.samples(self.paths, round, step, where).with_texts("samples")

    def rows(self, round: int | None = None, where: str | None = None, step: str | None = None) -> pl.DataFrame:
        """Return training rows as they were built, with their messages and texts; `stream` and `role` say what they are for."""
        return contents.training_rows(self.paths, round, step, where).with_texts("rows")

    def model(self, reference: str) -> Model:
        """Return the model that `role@when` names at the head of the chain, its path absolute; ChainError where there is none."""
        found = rounded.located(self.folder, self.named(reference)).at(self.folder.absolute())
        if not Path(found.path).is_dir():
            fix = "The recipe's `keep` says which checkpoints stay: keep: {last: 2, best: true, base: true}"
            raise ChainError(f"the weights of '{reference}' are not on disk any more", found.path, fix)
        return found

    def named(self, reference: str) -> Model:
        """Return the model that `role@when` names, as its step committed it; ChainError where there is none."""
        sealed, named = self.sealed(), ModelRef.parse(reference)
        head = head_of(sealed)
        if problem := named.problem(list(head), len(sealed), best_is_named=True):
            raise ChainError(problem, str(self.folder))
        known = known_models(len(sealed), head, sealed, self.recipe.best, self.loaded)
        return known.find(named, head, str(self.folder))

    # ---- walking ----

    def begin(self, watch: Watch = nobody) -> Attempt:
        """Begin an attempt: its log folder, and `watch`, which is called with every event.

        ChainError where its numerics are lost, or are not those that the model was loaded for.
        """
        numerics.refuse_lost(self.paths, self.info)
        numerics.refuse_undithered(self.paths, self.numerics)
        return Attempt.begin(self.paths, watch)

    def lease(self) -> Lease:
        """Return what keeps a second driver away while it is entered; entering it raises BusyError where one drives."""
        return Lease(self.paths.leases, self.paths.tmp)

    def refuse_replaced(self) -> None:
        """Raise ChainError where another process began the run anew since it was opened. Call it under the lease."""
        if not self.paths.info.exists() or records.read(self.paths.info, Info) != self.info:
            what = "another process began this run anew, with another recipe"
            raise ChainError(what, str(self.folder), "Repeat the command, or give this run another name: --name X")

    def clean_tmp(self) -> None:
        """Empty tmp/. Call it under the lease, when no other driver can be writing."""
        shutil.rmtree(self.paths.tmp, ignore_errors=True)
        storage.make_folder(self.paths.tmp)

    def meet(self, processes: Mapping[str, Facts], attempt: Attempt) -> dict[str, str]:
        """Keep what engines and ranks compute with, and fix the run to the numerics they came up with; {process: its digest}."""
        if processes and not self._fixed:
            numerics.fix(self.paths, self.numerics, attempt.number)
            self._fixed = True
        return self.computers.meet(processes, attempt)

    # ---- what was frozen ----

    def split(self, name: str) -> Pool:
        """Return the prompts of a split, in their frozen order."""
        if name not in self.info.prompts:
            raise UsageError(f"the run has no split '{name}'", str(self.folder), "Splits: " + ", ".join(self.info.prompts))
        if name not in self._splits:
            self.trust.files(self.info.files, self.info.prompts[name].file)
            path = self.folder / self.info.prompts[name].file
            self._splits[name] = Pool({"prompts": read_light("prompts", [path])}, {"prompts": (path,)})
        return self._splits[name]

    def data(self, name: str) -> Path:
        """Return the file of what was read for a step when the run was created, hashed."""
        self.trust.files(self.info.files, self.info.data[name].path)
        return self.folder / self.info.data[name].path

    def function(self, reference: str, params: Mapping[str, Any]) -> Function:
        """Return a reward as frozen in the run: editing the file beside a running chain changes nothing in it."""
        entry = self._trusted_code(reference)
        allowed = tuple(self.machine.environment)
        return Function(reference_parts(reference)[1], self.folder / entry.path, entry.digest, params, allowed)

    def scorer(self, reference: str) -> Model:
        """Return a model that only scores as frozen in the run, its path absolute, its files hashed."""
        entry = self._trusted_code(reference)
        return Model(SCORER, str((self.folder / entry.path).absolute()), entry.digest)

    def template(self, reference: str) -> templates.Template:
        """Return a template as frozen in the run; inline text is its own template."""
        if reference in self.code:
            return templates.load(str((self.folder / self._trusted_code(reference).path).resolve()), [])
        return templates.load(reference, [])

    def _trusted_code(self, reference: str) -> CodeEntry:
        """Return where frozen code lies, its files and those of its helpers hashed."""
        entry = self.code[reference]
        self.trust.files(self._code_files, "/".join(Path(entry.path).parts[:2]))
        return entry


def head_of(sealed: Iterable[Seal]) -> dict[str, Model]:
    """Return the models that the newest accepted round left, by role."""
    accepted = [seal for seal in sealed if seal.accepted]
    return accepted[-1].head() if accepted else {}
