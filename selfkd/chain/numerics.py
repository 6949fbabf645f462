"""Which numerics a run computes with: those of the machine file until an engine or a trainer came up with them, then always the same."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from selfkd.backend.choose import on_cards
from selfkd.backend.machine import NUMERIC, Machine, fixed_numerics
from selfkd.chain import records
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Info, Numerics
from selfkd.core import digest, number_format
from selfkd.errors import ChainError
from selfkd.recipe.schema import Recipe
from selfkd.steps.train import TrainStep

OPEN = {"threads": 0, "max_num_seqs": 0, "dtype": "auto", "generator": "auto"}  # values that leave it to whoever creates a run
RANKS = (
    "trainers",
    "shard",
)  # who trains may change: an update goes on from its checkpoint on other ranks, and a round says so
COMPUTING = ("engine", "trainer")  # the kinds of processes whose numbers the numerics fix


def asked(recipe: Recipe, machine: Machine) -> dict[str, Any]:
    """Return the numerics that a machine file and a recipe ask for."""
    cards = on_cards(machine)
    exact = not cards if recipe.exact == "auto" else bool(recipe.exact)
    return {**fixed_numerics(machine, on_cards=cards), "exact": exact}


def in_force(paths: Paths, info: Info, recipe: Recipe, machine: Machine) -> Mapping[str, Any]:
    """Return the numerics of this attempt: those of the record, those of run.json while the machine is the same, or today's.

    A run made before there was such a record is fixed to those of run.json.
    """
    if paths.numerics.exists():
        return _of_any_age(kept(paths, info))
    same = machine.words() == {**Machine().words(), **info.machine}  # older runs did not record every field
    if same or (info.numerics_fixed and _was_used(paths)):
        return _of_any_age(info.numerics)
    return asked(recipe, machine)


def kept(paths: Paths, info: Info) -> Mapping[str, Any]:
    """Return the numerics that whatever was trained was trained with: those of the record, in an older run those of run.json."""
    return records.read(paths.numerics, Numerics).numerics if paths.numerics.exists() else info.numerics


def _of_any_age(numerics: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say of a run that was made before there was a choice what generated then, and that each rank held the model whole."""
    return {"generator": "vllm", "shard": False, **numerics}


def fix(paths: Paths, numerics: Mapping[str, Any], attempt: int) -> None:
    """Fix the run to the numerics that an engine or a trainer came up with; ChainError where another attempt fixed it to others."""
    plain = digest.as_json(numerics)
    if records.write(paths.numerics, Numerics(numerics=plain, attempt=attempt), paths.tmp):
        return
    if records.read(paths.numerics, Numerics).numerics != plain:
        what = "another driver fixed this run to other numerics meanwhile"
        raise ChainError(what, paths.shown(paths.numerics), "Nothing of this was kept. Repeat the command.")


def refuse_lost(paths: Paths, info: Info) -> None:
    """Raise ChainError where an engine or a trainer came up for this run and the record of its numerics is gone.

    Today's numerics would give other numbers, and the run would not say so.
    """
    if not info.numerics_fixed and not paths.numerics.exists() and (trace := _of_computing(paths)):
        what = f"is missing, but {paths.shown(trace)} was made with it: which numerics this run is fixed to is not known"
        fix = "Restore the file from a copy.   Start a new chain: --name X"
        raise ChainError(what, paths.shown(paths.numerics), fix)


def refuse_undithered(paths: Paths, numerics: Mapping[str, Any]) -> None:
    """Raise ChainError where `dither: auto` left the weights as they were, for a float32 engine, and this one would cast them.

    Only until numerics are fixed can they be others than at the load. Dithered weights go on in float32: they lose nothing there.
    """
    if paths.numerics.exists() or not engine_casts(numerics) or not (loaded := paths.round(0).commits()):
        return
    load = records.read(loaded[0], Commit)
    if load.identity["dither"] and not load.notes.get("dither", True):  # older ones do not say: they dithered
        what = f"brought the model in for an engine in float32, undithered; in {numerics['dtype']} small updates would be rounded away"
        fix = "Keep `dtype: float32` in the machine file (--on).   Start a new chain: --name X"
        raise ChainError(what, paths.shown(loaded[0]), fix)


def _of_computing(paths: Paths) -> Path | None:
    """Return a file that is there because an engine or a trainer came up; None where none did."""
    for path in (path for kind in COMPUTING for path in paths.computers(kind)):
        return path
    commits = (path for names in paths.rounds() for path in names.commits())
    return next((path for path in commits if computed(records.read(path, Commit, unchanged=False))), None)


def computed(commit: Commit) -> bool:
    """Whether an engine or a trainer made a step."""
    return any(commit.notes.get("makers", {}).get(kind) for kind in COMPUTING)


def ignored(numerics: Mapping[str, Any], machine: Machine) -> list[str]:
    """Return the fields of a machine that ask for other numerics than the run is fixed to: 'dtype float32 (bfloat16 asked)'.

    A file asks for what it names, a Machine made in Python for what is not the default; what is in OPEN asks for nothing.
    """
    return [
        f"{name} {numerics.get(name)} ({value} asked)"
        for name, value in _asked_for(machine).items()
        if value != numerics.get(name)
    ]


def _asked_for(machine: Machine) -> dict[str, Any]:
    usual = Machine()
    named = machine.named or [name for name in NUMERIC if getattr(machine, name) != getattr(usual, name)]
    return {name: getattr(machine, name) for name in named if name in NUMERIC and getattr(machine, name) != OPEN.get(name)}


# ---- other ranks ----


def with_ranks(numerics: Mapping[str, Any], machine: Machine) -> Mapping[str, Any]:
    """Return numerics with the ranks that a machine asks for: those of the record may not be there any more.

    One rank holds a model whole, unless `shard` is asked for by name, which is then refused.
    """
    asked = {name: value for name, value in _asked_for(machine).items() if name in RANKS}
    if asked.get("trainers") == 1:
        asked = {"shard": False, **asked}
    return {**numerics, **asked}


def other_ranks(recorded: Mapping[str, Any], made_by: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return in what the ranks that trained differ from those that a run began with: 'trainers 4 → 2'."""
    begun = {"trainers": 1, "shard": False, **recorded}
    changed = ((name, ranks.get(name, begun[name])) for ranks in made_by for name in RANKS)
    said = (f"{name} {begun[name]} → {value}" for name, value in changed if value != begun[name])
    return list(dict.fromkeys(said))


# ---- number formats ----


def engine_casts(numerics: Mapping[str, Any]) -> bool:
    """Whether the engine rounds the fp32 weights to 16 bits. Numerics of an older run count as if it did: it dithers as it did."""
    return numerics["dtype"] != "float32" or "precision" not in numerics


def formats(numerics: Mapping[str, Any], recipe: Recipe) -> dict[str, str]:
    """Return {engine, training: dtype} of a run; of steps that train in several formats, bfloat16."""
    lines = [*recipe.before, *recipe.steps, *recipe.after]
    steps = [step for line in lines if isinstance(step := line.at(1), TrainStep)]
    words = {number_format.of_training(step.precision, numerics) for step in steps}
    training = {"training": "bfloat16" if "bf16" in words else "float32"} if words else {}
    return {"engine": str(numerics["dtype"]), **training}


def told(numerics: Mapping[str, Any], recipe: Recipe) -> str:
    """Return the line on number formats at the head of a run; '' for the fake, which computes nothing."""
    if numerics.get("backend") == "fake":
        return ""
    found, why = formats(numerics, recipe), numerics.get("number_format")
    several = ", ".join(f"{dtype} ({part})" for part, dtype in found.items())
    said = found["engine"] if len(set(found.values())) == 1 else several
    return f"Computes in {said}{f': {why}' if why else ''}"


def spare_cores(numerics: Mapping[str, Any], asked: Mapping[str, Any], cores: int, gpu: bool) -> str:
    """Return the line that a run leaves some of so many cores alone, where nobody `asked` for that in a machine file; or ''."""
    taken = numerics["threads"] * max(asked.get("generators", 1), numerics.get("trainers", 1))
    if gpu or numerics.get("backend") == "fake" or asked.get("threads") or taken >= cores:
        return ""
    what = f"Takes {taken} of {cores} cores to its end: those that were free when it was created."
    return f"{what} More threads round otherwise, so they need a new run: `threads: {cores}` in a machine file, and --name."


def emulation(numerics: Mapping[str, Any], recipe: Recipe, flags: Collection[str], gpu: bool) -> str:
    """Return the warning that the CPU of this machine, which computes where there is no GPU, only emulates a format of the run; or ''."""
    slow = [part for part, dtype in formats(numerics, recipe).items() if dtype == "bfloat16"]
    if not slow or numerics.get("backend") == "fake" or gpu or number_format.in_hardware(flags):
        return ""
    return (
        f"This run computes in bfloat16 ({' and '.join(slow)}), which this CPU emulates: 3 to 10 times slower than float32; "
        "a new run would choose float32 (dtype: auto, precision: auto): --name X"
    )


def _was_used(paths: Paths) -> bool:
    """Whether there is a step beyond the first one, which only brings the model in."""
    return any(len(names.commits()) > 1 or names.index for names in paths.rounds())
