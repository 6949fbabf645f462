"""Who computes for a run: what engines, ranks, reward workers and the driver compute with, kept when they are first met.

The first of each kind is what all later ones are compared with. A step's record names those that made it, and a round says what
moved: its numbers may then differ in their last digits, or in more. Nothing here steers a chain.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping

from selfkd.chain import records
from selfkd.chain.attempt import Attempt
from selfkd.chain.paths import Paths
from selfkd.chain.records import Computer, Info
from selfkd.core import digest
from selfkd.core.facts import Facts, differences, of_process

DRIVER_PACKAGES = ("polars", "numpy", "jinja2")


def kind_of(process: str) -> str:
    """Return what a process is compared with: engine for engine-1; each reward is of a kind of its own.

    >>> kind_of("engine-1"), kind_of("driver"), kind_of("reward-9f01")
    ('engine', 'driver', 'reward-9f01')
    """
    return process if process.startswith("reward-") else process.partition("-")[0]


class Computers:
    """Those that a run has met, {kind: records}, the first one first."""

    def __init__(self, paths: Paths, info: Info) -> None:
        self.paths, self.info = paths, info
        self._known: dict[str, list[Computer]] = {}
        self._told: set[str] = set()

    def driver(self, attempt: Attempt) -> str:
        """Return the digest of what this process computes with: metrics and templates are its work."""
        return self.meet({"driver": of_process(DRIVER_PACKAGES)}, attempt)["driver"]

    def meet(self, processes: Mapping[str, Facts], attempt: Attempt) -> dict[str, str]:
        """Keep what processes compute with; return {process: digest of it}. What moved is told, once an attempt."""
        return {process: self._met(process, facts, attempt) for process, facts in processes.items()}

    def moved(self, makers: Iterable[Mapping[str, Iterable[str]]]) -> list[str]:
        """Return what differs between the first of each kind and those of `makers`: 'torch 2.13.0 → 2.14.0 (engine, trainer)'."""
        who: dict[str, list[str]] = {}
        for kind in sorted({kind for made in makers for kind in made}):
            met = {one for made in makers for one in made.get(kind, ())}
            for computer in (one for one in self._of(kind) if one.digest in met):
                for said in differences(self._of(kind)[0].facts, computer.facts):
                    name = computer.process if len(met) > 1 else kind
                    who.setdefault(said, []).append(name.split("-")[0] if kind.startswith("reward-") else name)
        return [f"{said} ({', '.join(dict.fromkeys(names))})" for said, names in who.items()]

    def unrepeatable(self, makers: Iterable[Mapping[str, Iterable[str]]]) -> list[str]:
        """Return which ranks trained on a card in ways that add up otherwise each time, as they said of themselves; one that did not say, too."""
        met = {one for made in makers for one in made.get("trainer", ())}
        ranks = [
            one for one in self._of("trainer") if one.digest in met and one.facts.get("gpu") and not one.facts.get("repeats")
        ]
        return [f"{rank.process} trained on a card without deterministic algorithms" for rank in ranks]

    def _met(self, process: str, facts: Facts, attempt: Attempt) -> str:
        kind, meaning = kind_of(process), digest.of(facts)
        known = self._of(kind)
        if all(one.digest != meaning for one in known):
            told = digest.as_json(facts)
            record = Computer(
                kind=kind, process=process, facts=told, digest=meaning, host=platform.node(), attempt=attempt.number
            )
            records.write(self.paths.computer(kind, len(known) + 1), record, self.paths.tmp)
            known.append(record)
        if meaning != known[0].digest and meaning not in self._told:
            self._told.add(meaning)
            if moved := self.moved([{kind: [meaning]}]):
                text = f"Not what this run began with: {'; '.join(moved)}. Rounds made from here on may differ from what they would be."
                attempt.event("warning", text=text)
        return meaning

    def _of(self, kind: str) -> list[Computer]:
        """Return those of a kind. An older run recorded versions only, those of its creation: they stand for the first one."""
        if kind not in self._known:
            found = [records.read(path, Computer) for path in self.paths.computers(kind)]
            if not found and self.info.numerics_fixed and not kind.startswith("reward-"):
                facts = self.info.numerics.get("packages", {})
                found = [Computer(kind=kind, process=kind, facts=facts, digest=digest.of(facts), host="", attempt=0)]
                records.write(self.paths.computer(kind, 1), found[0], self.paths.tmp)
            self._known[kind] = found
        return self._known[kind]
