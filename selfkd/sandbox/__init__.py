"""Run code that a model wrote, and let nothing out: no root, no container, the standard library only. See docs/sandbox.md.

`Sandbox` runs programs, `Limits` says what they may use, `host()` what walls this machine has. Names are loaded when they are
first asked for, because the process that starts the programs must stay small.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from selfkd.sandbox.box import Sandbox as Sandbox
    from selfkd.sandbox.calls import Calls as Calls
    from selfkd.sandbox.calls import Returned as Returned
    from selfkd.sandbox.limits import Limits as Limits
    from selfkd.sandbox.runner import Done as Done
    from selfkd.sandbox.tiers import Host as Host
    from selfkd.sandbox.tiers import host as host
    from selfkd.sandbox.values import Foreign as Foreign

MODULE_OF = {
    "Calls": "calls",
    "Done": "runner",
    "Foreign": "values",
    "Host": "tiers",
    "Limits": "limits",
    "Returned": "calls",
    "Sandbox": "box",
    "host": "tiers",
}
__all__ = sorted(MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{MODULE_OF[name]}"), name)
