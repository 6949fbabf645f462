"""The results of a sweep: how a trial ended, where that is written, and which combination of an arm is the best on dev."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.chain import measured, records, ways
from selfkd.chain.measured import Measured
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit, Computer, Info, Record, Seal
from selfkd.chain.trained import learned, steps_of
from selfkd.core import digest
from selfkd.errors import ChainError, GuardError
from selfkd.recipe.schema import Recipe
from selfkd.recipe.sweep import Trial

# Facts of a process that are no version and no processor, and follow from the machine that a run asked for.
LEFT_OUT = (
    "instructions",
    "kernels",
    "vllm_kernels",
    "attention",
    "runner",
    "sampler",
    "kv_blocks",
    "batch_tokens",
    "sequences",
)


@dataclass(frozen=True, kw_only=True)
class Plan(Record):
    """plan-001.json, …: what a sweep was asked for."""

    format: int
    name: str
    metric: str
    mode: str
    trials: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Result(Record):
    """How a trial ended. `failed` says why it has no figures; else `rounds` are its path: what each round measured and had spent.

    `scores` are those of the last accepted round, by prompt in the order of their ids, of the frozen `prompts` of that digest, measured in
    the way `how`. `metric` is the one that was asked for, or that of another decoding. `facts` are the versions and the processor.
    """

    format: int
    sweep: str
    arm: str
    control: str | None
    number: int
    seed: int
    set: list[str]
    recipe: str
    steps: list[int]
    failed: str = ""
    metric: str = ""
    measured: Mapping[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)
    prompts: str = ""
    how: str = ""
    scores: list[float | None] = field(default_factory=list)
    digest: str = ""
    moved: list[str] = field(default_factory=list)
    facts: Mapping[str, Any] = field(default_factory=dict)
    when: str = ""

    @property
    def name(self) -> str:
        return f"{self.arm}.{self.number}.s{self.seed}"

    @property
    def is_test(self) -> bool:
        return self.metric.startswith("test/")

    @property
    def tokens(self) -> int:
        return int(self.rounds[-1]["generated"] + self.rounds[-1]["trained"]) if self.rounds else 0

    @property
    def value(self) -> float | None:
        return self.measured["value"] if self.measured else None


class Place:
    """The names inside the folder of a sweep."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tmp, self.leases = folder, folder / "tmp", folder / "leases"
        self.spent = folder / "spent.json"

    def run(self, trial: Trial) -> Path:
        return self.folder / trial.name

    def probe(self, recipe: Recipe) -> Path:
        """Return the run of a base that is asked for headroom; methods that ask it alike share one."""
        return self.folder / f"headroom-{meaning(recipe)[:8]}"

    def result(self, name: str) -> Path:
        return self.folder / "results" / f"{name}.json"

    def test(self, arm: str, of: Sequence[Result]) -> Path:
        """Return the record of an arm's test, which is of just these trials."""
        return self.folder / "tests" / f"{arm}-{digest.of(sorted(one.name for one in of))[:12]}.json"

    def plans(self) -> list[Path]:
        return sorted(self.folder.glob("plan-[0-9]*.json"))

    def results(self) -> list[Result]:
        """Return the results that are there, by name; ChainError where one was changed."""
        return [records.read(path, Result) for path in sorted((self.folder / "results").glob("*.json"))]

    def tests(self) -> list[Result]:
        return [records.read(path, Result) for path in sorted((self.folder / "tests").glob("*.json"))]


def lines_of(path: Path) -> tuple[list[Result], Plan | None]:
    """Return (results, the last plan) of a file of lines; ChainError where one was changed after it was written."""
    found, plan = list[Result](), None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.strip():
            content = json.loads(line)
            if not digest.intact(content):
                raise ChainError("was changed after it was written", f"{path}:{number}", "Restore the line.")
            if "trials" in content:
                plan = Plan.from_json(content)
            else:
                found.append(Result.from_json(content))
    return found, plan


def meaning(recipe: Recipe) -> str:
    """Return the digest of what a recipe says, without its name, which is that of a folder: a field that came later changes no older one."""
    said = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return digest.of({name: value for name, value in said.items() if name != "name"})


def measuring(paths: Paths, index: int, metric: str) -> Commit | None:
    """Return the step of a round that measured a metric."""
    made = [records.read(path, Commit) for path in paths.round(index).commits()]
    return next((one for one in reversed(made) if one.outside and metric in one.metrics), None)


def result_of(folder: Path, metric: str) -> dict[str, Any]:
    """Return what a finished run says of itself, for its result."""
    paths = Paths(folder)
    info = records.read(paths.info, Info)
    seals = [records.read(names.seal, Seal) for names in paths.rounds() if names.seal.is_file()]
    last = next(seal for seal in reversed(seals) if seal.accepted)
    commit = measuring(paths, last.round, metric)
    if commit is None:
        raise GuardError(f"its last round {last.round} did not measure {metric}")
    split, _, score = metric.partition("/")
    means = measured.prompt_means(paths, commit, score)
    ids = pl.read_parquet(paths.folder / info.prompts[split].file, columns=["id"])["id"].sort()
    found: Measured = measured.measurement(paths, commit, score)
    return {
        "metric": metric,
        "measured": digest.as_json(found.to_json()),
        "rounds": list(_path(paths, seals, metric)),
        "prompts": info.prompts[split].digest,
        "how": ways.measures_of(commit)[metric],
        "scores": [means.get(name) for name in ids],
        "digest": last.digest,
        "moved": [seal.notes["level"] for seal in seals if seal.notes.get("level", "exact") != "exact"],
        "facts": _facts(paths),
    }


def _path(paths: Paths, seals: Sequence[Seal], metric: str) -> Iterator[dict[str, Any]]:
    """Yield what each round measured, and what was spent until its end."""
    generated = trained = 0
    seconds = 0.0
    for seal in seals:
        made = [records.read(paths.round(seal.round).folder / step.file, Commit) for step in seal.steps]
        generated += int(seal.notes.get("tokens", 0))
        trained += sum(map(learned, made))
        seconds += sum(seal.notes.get("seconds", {}).values())
        spent = {"generated": generated, "trained": trained, "seconds": round(seconds, 1), "steps": sum(map(steps_of, made))}
        yield {"round": seal.round, "accepted": seal.accepted, "value": seal.metrics.get(metric), **spent}


def _facts(paths: Paths) -> dict[str, Any]:
    """Return the versions and the processor of the engines and ranks, each fact once where they agree."""
    found: dict[str, Any] = {}
    for path in paths.facts():
        computer = records.read(path, Computer)
        if computer.kind in ("driver", "engine", "trainer"):
            found |= {name: value for name, value in computer.facts.items() if value is not None and name not in LEFT_OUT}
    return found


def chosen(results: Sequence[Result], mode: str) -> int:
    """Return the combination of an arm that is best on dev over its seeds; one of which a seed failed only where all are such."""
    numbers = sorted({one.number for one in results})
    whole = [number for number in numbers if all(one.value is not None for one in results if one.number == number)]
    sign = -1 if mode == "min" else 1

    def mean(number: int) -> float:
        values = [one.value for one in results if one.number == number and one.value is not None]
        return sign * sum(values) / len(values) if values else -float("inf")

    return max(whole or numbers, key=lambda number: (mean(number), -number))
