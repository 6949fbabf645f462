"""The models of a chain, as its sealed rounds say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from selfkd.chain.records import Seal
from selfkd.chain.steering import best_round
from selfkd.core.known_models import KnownModels, Models
from selfkd.recipe.schema import Best


def known_models(
    index: int, start: Models, sealed: Sequence[Seal], best: Best | None, base: Callable[[], Models]
) -> KnownModels:
    """Return the models of round `index`, which `start` entered, after these sealed rounds; `base` reads what round 0 loaded."""
    return KnownModels(index, start, [seal.head for seal in sealed], best_round(sealed, best), base)
