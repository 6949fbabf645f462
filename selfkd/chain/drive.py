"""Driving a run to its end: the one place that knows in which order an attempt, a machine and the loop are opened."""

from __future__ import annotations

from contextlib import closing, suppress

from selfkd.backend.bf16 import flags_here
from selfkd.backend.choose import on_cards, open_backend
from selfkd.backend.model_sizes import Sizes, sizes_of
from selfkd.backend.ray.cluster import is_private
from selfkd.chain import numerics
from selfkd.chain.attempt import Attempt, Watch, nobody
from selfkd.chain.loop import walk
from selfkd.chain.retention import format_remark, is_due, prune
from selfkd.chain.run import Run
from selfkd.core.lease import holder
from selfkd.core.yamlfile import Problems
from selfkd.errors import BusyError
from selfkd.recipe import fit, targets


def go_on(opened: Run, watch: Watch = nobody) -> None:
    """Walk an opened run to its end; of a finished one only what a kill after its last seal left undone is done."""
    if is_finished(opened):
        catch_up(opened)
        return
    refuse_second_driver(opened)
    attempt = opened.begin(watch)
    try:
        drive(opened, attempt)
    except BaseException as error:
        attempt.failed(error)
        raise


def is_finished(run: Run) -> bool:
    return next(run.rounds_to_walk(), None) is None


def catch_up(run: Run) -> None:
    """Do for a finished run what a kill after its last seal left undone, or what `keep` now says: take checkpoints away."""
    if is_due(run):
        with suppress(BusyError), run.lease():  # whoever holds it does the same
            prune(run)


def refuse_second_driver(run: Run) -> None:
    """Raise BusyError where another process drives the run now: before an attempt begins and an engine starts."""
    if driver := holder(run.paths.leases):
        fix = f"Watch it: selfkd status {run.folder} --follow   Or stop it, or give this run another name: --name X"
        raise BusyError(f"another driver holds this run ({driver})", str(run.folder), fix)


def refuse_too_large(run: Run) -> None:
    """Raise UsageError where the model cannot fit on what is here, whatever is asked of it, or not be spread as the machine file says."""
    machine = run.machine
    if machine.backend == "fake":
        return
    place = fit.Place.here() if machine.backend == "local" or is_private() else fit.Place()  # nothing is known of other nodes
    loaded = next(iter(run.loaded().values()), None)
    kept = run.folder / loaded.path if loaded else None
    sizes = sizes_of({"path": str(kept)} if kept and kept.is_dir() else run.recipe.model_source())
    if isinstance(sizes, Sizes):
        whole = fit.Lengths(run.recipe.context, run.recipe.context)
        fit.refuse(run.recipe, machine, run.numerics, sizes, whole, place)


def refuse_unlearnable(run: Run) -> None:
    """Raise RecipeError where an adapter cannot be learned as the recipe in force says: by what is installed, or on the model that came in."""
    if run.machine.backend == "fake":
        return
    problems, loaded = Problems(), next(iter(run.loaded().values()), None)
    if lacking := targets.lacking(run.recipe):
        problems.add(*lacking)
    problems.stop()
    if loaded and (run.folder / loaded.path).is_dir():
        targets.refuse(run.recipe, run.folder / loaded.path)


def drive(run: Run, attempt: Attempt) -> None:
    """Walk the run to its end on its own machine; `attempt` hears of every event."""
    with attempt.logging():
        run.check_head()  # before an engine starts
        refuse_too_large(run)
        refuse_unlearnable(run)
        if run.ignored:
            kept = f"This run keeps the numerics that it began with: {', '.join(run.ignored)}."
            attempt.event("warning", text=f"{kept} Other numbers need a run of another name: --name X")
        if run.other_ranks:
            said = f"Not the ranks that this run began with: {', '.join(run.other_ranks)}."
            attempt.event("warning", text=f"{said} What they train may differ in its last digits, and its rounds say so.")
        if slow := numerics.emulation(run.numerics, run.recipe, flags_here(), on_cards(run.machine)):
            attempt.event("warning", text=slow)
        if kept := format_remark(run.recipe, run.numerics):
            attempt.event("warning", text=kept)
        with closing(open_backend(run.machine, dict(run.numerics), attempt.logs, attempt.warn)) as backend:
            walk(run, backend, attempt)
        attempt.event("done")
