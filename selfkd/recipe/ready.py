"""What would end a run before its first answer, known before anything of it is made: a model that is not here, words that its generator does not know.

Nothing is loaded: packages and folders are looked for, and a hub id is believed, for only the hub knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from selfkd.backend.engine.sampling_options import OF_TRANSFORMERS
from selfkd.backend.machine import Machine, chosen_generator, refuse_missing
from selfkd.backend.model_files import (
    PACKAGE,
    how_to_get,
    is_hub_id,
    packaged_gguf,
    packages_with_gguf,
    shipped_packages,
)
from selfkd.backend.trainer.trl_options import (
    INSTEAD_OF_OFFLOADING,
    LEAVE_IT_OUT,
    NO_STATE_TO_OFFLOAD,
    NOTHING_TO_OFFLOAD,
    whole_weights,
)
from selfkd.core.wording import did_you_mean
from selfkd.core.yamlfile import Problems
from selfkd.recipe import targets
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe

FORMS = (
    "Name a folder of safetensors, a .gguf file, a hub id such as Qwen/Qwen2.5-1.5B, or package:NAME of an installed package."
)

# Options of a trainer that move something from a card, and what is said where there is none.
OFFLOADED = {
    "activation_offloading": f"{NOTHING_TO_OFFLOAD}. {INSTEAD_OF_OFFLOADING}",
    "offload_optimiser": f"{NO_STATE_TO_OFFLOAD}. {LEAVE_IT_OUT}",
}


def refuse(recipe: Recipe, machine: Machine) -> None:
    """Raise RecipeError or BackendError where a run of this recipe on this machine would end before its first answer."""
    if machine.backend == "fake":
        return
    found = Problems()
    add_problems(recipe, machine, found)
    if missing := missing_model(recipe):
        found.add(place_of_model(recipe), "model", missing)
    if lacking := targets.lacking(recipe):
        found.add(*lacking)
    found.stop()
    refuse_missing(machine.backend)


def add_problems(recipe: Recipe, machine: Machine | None, problems: Problems) -> None:
    """Add what no install mends: a model that is nowhere; and of a machine, where one is named, words that its generator does not know."""
    if wrong := wrong_model(recipe):
        problems.add(place_of_model(recipe), "model", wrong)
    targets.add_problems(recipe, machine, problems)
    if machine and machine.backend != "fake":
        for where, label, problem in _of_trainer(recipe, machine):
            problems.add(where, label, problem)
    if machine and machine.backend != "fake" and chosen_generator(machine) == "transformers":
        for where, label, problem in _of_transformers(recipe):
            problems.add(where, label, problem)


def _of_trainer(recipe: Recipe, machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Yield (place, label, problem) wherever a step or the machine asks of a trainer what this machine cannot do."""
    lines = [line for part in LISTS for line in getattr(recipe, part) if getattr(line.at(1), "trl", {})]
    for line in lines:
        if found := whole_weights(line.at(1).trl.get("optim"), machine.trainer, machine.shard):
            yield line.place("trl.optim"), line.label, ". ".join(found)
    moved = [line for line in lines if line.at(1).trl.get("activation_offloading")]
    if not (moved or any(machine.trainer.get(name) for name in OFFLOADED)) or _has_cards(machine):
        return
    for line in moved:
        yield line.place("trl.activation_offloading"), line.label, OFFLOADED["activation_offloading"]
    yield from (("machine.trainer", "", said) for name, said in OFFLOADED.items() if machine.trainer.get(name))


def _has_cards(machine: Machine) -> bool:
    """Whether a run computes on cards, or a plan is made for some."""
    from selfkd.backend.choose import on_cards  # loads the dispatcher, which nothing else here needs

    return bool(machine.cards) or on_cards(machine)


def wrong_model(recipe: Recipe) -> str:
    """Return why there is no such model here, or ''; nothing of a package that shipped recipes use, which can be installed."""
    path = recipe.model_source()["path"]
    if path.startswith(PACKAGE):
        return _wrong_package(path.removeprefix(PACKAGE))
    local = Path(path).expanduser()
    if local.is_dir():
        return (
            "" if (local / "config.json").is_file() else f"the folder {local} has no config.json, so it holds no model. {FORMS}"
        )
    if local.exists() or is_hub_id(path):
        return ""
    return f"there is no {'file' if path.endswith('.gguf') else 'folder'} '{path}'. {FORMS}"


def _wrong_package(name: str) -> str:
    files = packaged_gguf(name)
    if files is None:
        known = shipped_packages()
        near = did_you_mean(name, {*known, *packages_with_gguf()})
        return "" if name in known else f"the package '{name}' is not installed.{near or ' ' + FORMS}"
    return "" if len(files) == 1 else f"the package '{name}' holds {len(files)} GGUF files, not one. {FORMS}"


def missing_model(recipe: Recipe) -> str:
    """Return how to install the package that holds the model, where it is one of those that shipped recipes use and is not here; else ''."""
    path = recipe.model_source()["path"]
    name = path.removeprefix(PACKAGE)
    if not path.startswith(PACKAGE) or name not in shipped_packages() or packaged_gguf(name) is not None:
        return ""
    return f"the package '{name}' is not installed: {how_to_get(name)}"


def place_of_model(recipe: Recipe) -> str:
    return recipe.places.get("model.path") or recipe.places.get("model", "")


def _of_transformers(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    for line in (line for part in LISTS for line in getattr(recipe, part)):
        for word in getattr(line.at(1), "vllm", {}):
            if word not in OF_TRANSFORMERS:
                said = f"the generator transformers does not know '{word}': only vLLM does. Leave it out, or use a machine with vLLM"
                yield line.place(f"vllm.{word}"), line.label, f"'vllm.{word}': {said} (`generator: vllm`)"
