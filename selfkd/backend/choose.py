"""Which backend a machine file asks for, and whether it computes on cards. Apart from the package's front, so that reading a recipe imports no dispatcher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfkd.backend.base import Backend
from selfkd.backend.engine.held_engine import ENGINES
from selfkd.backend.fake import Fake
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine, fixed_numerics, refuse_missing
from selfkd.backend.ray.cluster import cards_to_join, is_private
from selfkd.backend.ray.dispatcher import RayBackend
from selfkd.backend.ray.placement import nobody_hears
from selfkd.core.accelerator import accelerator
from selfkd.errors import UsageError


def open_backend(
    machine: Machine, numerics: dict[str, Any] | None, log: Path, say: Callable[[str], None] = nobody_hears
) -> Backend:
    """Open the backend `machine.backend`: `fake`, `local` or `ray`. `numerics` are the run's, or None to fix them now.

    `say` hears what a person should know while it opens: that it waits for others, for example.
    Nothing heavy is imported before a backend does something that needs it.
    """
    fixed = fixed_numerics(machine) if numerics is None else numerics
    refuse_missing(machine.backend)
    if machine.backend == "ray":
        return RayBackend(machine, fixed, log, engine=engine_of(fixed), say=say)
    if machine.backend == "local":
        return LocalBackend(machine, fixed, log, engine=engine_of(fixed))
    if machine.backend == "fake":
        return Fake(fixed)
    raise UsageError(f"no backend '{machine.backend}'", "machine.backend", "There are: fake, local, ray.")


def engine_of(numerics: Mapping[str, Any]) -> str:
    """Return the engine that generates with these numerics; UsageError where it cannot do what they ask for."""
    generator = numerics.get("generator", "vllm")  # runs made before there was a choice
    if generator == "transformers":
        for name, given, default in (("tensor_parallel", numerics["tensor_parallel"], 1), ("engine", numerics["engine"], {})):
            if given != default:
                fix = "Leave it out, or use `generator: vllm`."
                raise UsageError(f"is vLLM's, and the generator is transformers: {given}", f"machine.{name}", fix)
    return ENGINES[generator]


def on_cards(machine: Machine) -> bool:
    """Whether engines and ranks will compute on cards; those of a cluster to join may lie elsewhere, where this machine has none."""
    if machine.backend == "fake":
        return False
    if machine.backend == "ray" and not is_private():
        return accelerator().cuda_build and cards_to_join() > 0
    return accelerator().on_cards
