"""What it takes to have models read answers: memory beside what is there already, and how many tokens go through which model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from selfkd.backend import memory
from selfkd.backend.machine import Machine
from selfkd.backend.memory import FP32, GIB, Need, Serving
from selfkd.backend.model_sizes import Sizes, Unknown, sizes_of
from selfkd.backend.reading import READ_TOKENS
from selfkd.core.number_format import BYTES
from selfkd.recipe import fit
from selfkd.recipe.schema import Recipe
from selfkd.recipe.scorers import local_folder, source_of
from selfkd.steps.forecast import Cost

FORWARD = 3  # a pass forward is a third of what an update does with a token


def sizes_by_name(recipe: Recipe) -> dict[str, Sizes | Unknown]:
    """Return the sizes of the models of others that a recipe scores by."""
    return {one: _sizes(one, recipe) for one in recipe.scorers()}


def _sizes(reference: str, recipe: Recipe) -> Sizes | Unknown:
    local, (path, revision) = local_folder(reference, recipe), source_of(reference)
    return sizes_of({"path": str(local) if local else path, "revision": revision})


def loads(
    recipe: Recipe, machine: Machine, words: Mapping[str, Any], own: Sizes, place: fit.Place, reads: Iterable[Cost]
) -> Iterator[fit.Load | tuple[str, str]]:
    """Yield what each model that reads asks of a card, or of the memory beside engines; a line in words where its size is not known."""
    others = sizes_by_name(recipe)
    for name in dict.fromkeys(cost.reader for cost in reads if cost.read != 0 and cost.reader is not None):
        sizes = others.get(name, own)
        if isinstance(sizes, Unknown):
            yield f"memory, read by {name}", f"unknown: {sizes.why}"
        elif place.cards:
            yield fit.Load(
                "each card of a rank", f"read by {name}", min(place.cards), _on_a_card(sizes, words, name not in others)
            )
        elif place.memory:
            need = _on_a_cpu(sizes, own, machine, words, recipe, place, name not in others)
            yield fit.Load("memory", f"read by {name}", place.memory, need)


def _reading(sizes: Sizes, width: int, on_card: bool, words_out: bool) -> Need:
    """Return what a reader holds: the weights, and one pass; of a language model's own words logits and their logarithms."""
    tokens = READ_TOKENS // 2 if words_out else READ_TOKENS
    return memory.of_engine(sizes, Serving(1, (tokens, tokens if words_out else 0), width, 1, on_card), 0)


def _on_a_card(sizes: Sizes, words: Mapping[str, Any], words_out: bool) -> Need:
    need = _reading(sizes, BYTES.get(words["dtype"], memory.HALF), True, words_out)
    certain = {name: size for name, size in need.certain.items() if name not in ("KV cache", "graphs")}
    return replace(need, certain={**certain, "sleeping engine": memory.CARD_CONTEXT + memory.GRAPHS})


def _on_a_cpu(
    sizes: Sizes, own: Sizes, machine: Machine, words: Mapping[str, Any], recipe: Recipe, place: fit.Place, words_out: bool
) -> Need:
    engine = memory.of_engine(own, fit.serving(recipe, words, place), int(words["kv_cache_gb"] * GIB)).times(machine.generators)
    readers = _reading(sizes, FP32, False, words_out).times(words["trainers"])
    held = {"weights": readers.certain["weights"], "engine's weights": engine.certain["weights"]}
    passing = {"activations": readers.passing["activations"], "KV cache": engine.passing["KV cache"]}
    waiting = engine.libraries + words["trainers"] * memory.RANK_PROCESS + fit.DRIVER
    return Need(held, passing, libraries=readers.libraries + waiting)


def as_learned(recipe: Recipe, costs: Iterable[Cost], own: int) -> float:
    """Return how many tokens of an update with `own` parameters take as long as what is read."""
    others = {name: sizes.parameters for name, sizes in sizes_by_name(recipe).items() if isinstance(sizes, Sizes)}
    return sum((cost.read or 0) * others.get(cost.reader or "", own) / own / FORWARD for cost in costs)
