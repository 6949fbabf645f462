"""Which backend a machine file asks for. Apart from the package's front, so that reading a recipe imports no dispatcher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfkd.backend.base import Backend
from selfkd.backend.fake import Fake
from selfkd.backend.local import LocalBackend
from selfkd.backend.machine import Machine, fixed_numerics
from selfkd.backend.ray.dispatcher import RayBackend
from selfkd.errors import UsageError


def open_backend(machine: Machine, numerics: dict[str, Any] | None, log: Path) -> Backend:
    """Open the backend `machine.backend`: `fake`, `local` or `ray`. `numerics` are the run's, or None to fix them now.

    Nothing heavy is imported before a backend does something that needs it.
    """
    if machine.backend == "ray":
        return RayBackend(machine, numerics, log)
    if machine.backend == "local":
        return LocalBackend(machine, numerics, log)
    if machine.backend == "fake":
        return Fake(fixed_numerics(machine) if numerics is None else numerics)
    raise UsageError(f"no backend '{machine.backend}'", "machine.backend", "There are: fake, local, ray.")
