"""How selfkd and what it lacks are installed: as commands that can be typed here. selfkd is on no index, so they name its checkout."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import selfkd

ELSEWHERE = "in a checkout of selfkd: "  # in front of a command, where none is known
LOCKED = sys.platform == "linux" and platform.machine() == "x86_64"  # what the locks hold has wheels there


def extra(name: str) -> str:
    """Return the command that installs an extra, such as `engine`, beside the selfkd that runs."""
    home = checkout()
    if home is None:
        return f"{ELSEWHERE}pip install '.[{name}]'"
    return f"pip install {'-e ' if _is_editable() else ''}{shlex.quote(f'{home}[{name}]')}"


def lock(name: str) -> str:
    """Return the command that installs a lock, `cpu` or `gpu`: the exact versions of everything that it needs."""
    home = checkout()
    return f"{'' if home else ELSEWHERE}pip install --no-deps -r {shlex.quote(str((home or Path()) / 'locks' / f'{name}.txt'))}"


def itself() -> str:
    """Return the command that installs selfkd as a package."""
    home = checkout()
    return f"pip install --no-deps -e {shlex.quote(str(home))}" if home else f"{ELSEWHERE}pip install --no-deps ."


def checkout() -> Path | None:
    """Return the checkout that selfkd runs from or was installed from, where it is still there."""
    return next((home for home in (Path(selfkd.__file__).resolve().parents[1], *_installed_from()) if _is_checkout(home)), None)


def _is_checkout(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file() and (folder / "locks" / "cpu.txt").is_file()


def _installed_from() -> list[Path]:
    address = urlparse(_origin().get("url", ""))
    return [Path(unquote(address.path))] if address.scheme == "file" else []


def _is_editable() -> bool:
    return bool(_origin().get("dir_info", {}).get("editable"))


def _origin() -> dict[str, Any]:
    """Return what pip noted of where selfkd came from (PEP 610)."""
    try:
        found: dict[str, Any] = json.loads(metadata.distribution("selfkd").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return {}
    return found
