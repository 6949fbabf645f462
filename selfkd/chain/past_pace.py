"""How fast this machine was in the runs that lie here: what a plan counts with instead of a rough figure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfkd.backend.machine import Machine
from selfkd.chain import commit, records
from selfkd.chain.paths import runs_under
from selfkd.chain.records import Commit, Computer
from selfkd.chain.run import Run
from selfkd.core.accelerator import accelerator
from selfkd.core.facts import of_process
from selfkd.errors import SelfkdError
from selfkd.recipe.fit import Place, words_of
from selfkd.recipe.pace import Pace

ENOUGH_SECONDS = 20.0  # of making and of learning: less says more of what begins and ends a step than of its tokens
SAME = ("dtype", "generator", "tensor_parallel")  # numerics by which speed goes


def newest(runs: Path, machine: Machine) -> Pace | None:
    """Return the pace of the newest run in a folder that computed on what this machine computes on; None where none tells.

    None too where the machine is stated (`cards`) rather than here. A run that cannot be read is passed over: nothing here is its concern.
    """
    if machine.cards or machine.backend == "fake":
        return None
    words = words_of(machine, Place.of(machine))
    folders = sorted(runs_under(runs), key=lambda folder: (folder / "run.json").stat().st_mtime, reverse=True)
    return next((pace for folder in folders if (pace := _pace_of(folder, machine, words))), None)


def _pace_of(folder: Path, machine: Machine, words: Mapping[str, Any]) -> Pace | None:
    try:
        run = Run.at(folder)
        return _measured(run) if _was_here(run, machine, words) else None
    except SelfkdError:
        return None


def _was_here(run: Run, machine: Machine, words: Mapping[str, Any]) -> bool:
    """Whether every engine and every rank of a run computed on this processor or card, in this way."""
    numerics = run.numerics
    same = numerics["backend"] != "fake" and all(numerics.get(name) == words[name] for name in SAME)
    same &= machine.threads in (0, numerics["threads"])
    facts = [records.read(path, Computer).facts for kind in ("engine", "trainer") for path in run.paths.computers(kind)]
    return same and bool(facts) and all(_is_here(one) for one in facts)


def _is_here(facts: Mapping[str, Any]) -> bool:
    here, card = accelerator(), facts.get("gpu")
    if here.on_cards:
        return card is not None and all(str(card).startswith(f"{one.name} (") for one in here.cards)
    return card is None and facts.get("cpu") == of_process(())["cpu"]


def _measured(run: Run) -> Pace | None:
    """Return the pace of the rounds behind the base, in which nothing is loaded for the first time; None where they were too short."""
    made = [one for seal in run.sealed() for one in run.commits(seal)]
    parameters, later = _parameters(made), [one for one in _undivided(made) if one.round]
    answered, asked = _sums(_generated(run, later))
    learned, trained = _sums(_trained(later))
    if not parameters or min(asked, trained) < ENOUGH_SECONDS:
        return None
    engines, ranks = (run.machine.generators, run.machine.trainers) if accelerator().on_cards else (1, 1)
    of_engine, of_rank = answered / asked / engines, learned / trained / ranks
    said = f"as fast as {run.paths.folder} was here: {of_engine:,.0f} tokens made and {of_rank:,.0f} learned in a second"
    return Pace(of_engine * parameters, of_rank * parameters, said)


def _undivided(made: list[Commit]) -> Iterator[Commit]:
    """Yield the steps that one attempt made whole. The first one of a later attempt may have been begun, and timed, in the one before."""
    before = 1
    for one in made:
        attempt = one.notes.get("attempt", 0)
        if attempt == before:
            yield one
        before = attempt


def _generated(run: Run, made: list[Commit]) -> Iterator[tuple[float, float]]:
    """Yield (tokens, seconds) of each step that asked the engines; a check inside an update asks them beside its training."""
    for one in made:
        if not one.checks and (tokens := commit.generated_tokens(run.paths, one)):
            yield tokens, one.notes["seconds"]


def _trained(made: list[Commit]) -> Iterator[tuple[float, float]]:
    """Yield (tokens, seconds) of each update, what comes before and behind its steps included; one that was measured on its way took more."""
    for one in made:
        if not one.checks and (found := one.notes.get("train")):
            yield found["tokens"], one.notes["seconds"]


def _sums(pairs: Iterator[tuple[float, float]]) -> tuple[float, float]:
    found = list(pairs)
    return math.fsum(one for one, _ in found), math.fsum(two for _, two in found)


def _parameters(made: list[Commit]) -> int:
    """Return the parameters of the model that round 0 brought in, whose weights lie in fp32."""
    for one in made:
        for entry in one.models.values():
            sizes: list[int] = [file["bytes"] for name, file in one.files.items() if _is_weight(name, entry.path)]
            return sum(sizes) // 4
    return 0


def _is_weight(name: str, folder: str) -> bool:
    return name.startswith(f"{folder}/") and name.endswith(".safetensors")
