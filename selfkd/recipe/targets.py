"""What a recipe asks of adapters, held against the model that it names and the packages that are here: known before anything is generated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from selfkd.backend import layer_names, nf4
from selfkd.backend.machine import Machine
from selfkd.core.yamlfile import Problems
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.lora import Lora

Found = tuple[Line, str, str]  # the line of a step, the field of `lora`, and what is wrong with it


def add_problems(recipe: Recipe, machine: Machine | None, problems: Problems) -> None:
    """Add layers that the model has not, and weights that cannot lie in 4 bits; nothing of a model whose files are not here."""
    folder = layer_names.folder_of(recipe.model_source())
    for line, field, said in [*_beside_shards(recipe, machine), *(_of_model(recipe, folder, False) if folder else ())]:
        problems.add(line.place(f"lora.{field}"), line.label, said)


def refuse(recipe: Recipe, root: Path) -> None:
    """Raise RecipeError where the model that came in for a run has not what its adapters ask for."""
    problems = Problems()
    for line, field, said in _of_model(recipe, root, True):
        problems.add(line.place(f"lora.{field}"), line.label, said)
    problems.stop()


def lacking(recipe: Recipe) -> tuple[str, str, str] | None:
    """Return (place, label, what is not installed) where weights are to lie in 4 bits and nothing here makes them so."""
    asked = next((line for line, lora in _adapters(recipe) if lora.quantise), None)
    said = nf4.lacking() if asked else ""
    return (asked.place("lora.quantise"), asked.label, said) if asked and said else None


def _adapters(recipe: Recipe) -> Iterator[tuple[Line, Lora]]:
    for line in (line for part in LISTS for line in getattr(recipe, part)):
        if lora := getattr(line.at(1), "lora", None):
            yield line, lora


def _beside_shards(recipe: Recipe, machine: Machine | None) -> Iterator[Found]:
    if machine and machine.shard:
        for line, lora in _adapters(recipe):
            if lora.quantise:
                said = "'quantise' packs each weight whole, and `shard: true` of the machine divides weights: leave out one of the two"
                yield line, "quantise", said


def _of_model(recipe: Recipe, folder: Path, is_root: bool) -> Iterator[Found]:
    layers, unfit = layer_names.linear_layers(folder), nf4.unfit(layer_names.words_of(folder))
    for line, lora in _adapters(recipe):
        if layers and (said := layer_names.unknown(lora.targets or (), layers, is_root)):
            yield line, "targets", f"'lora.targets': {said}"
        if lora.quantise and unfit:
            yield line, "quantise", f"'lora.quantise': {unfit}. {nf4.LEAVE_IT_OUT}"
