"""What a recipe says of models that only score: where they come from, and what can be known of them before a run. Opens no weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from selfkd.backend.model_files import is_hub_id
from selfkd.backend.model_sizes import Sizes, sizes_of
from selfkd.backend.reading import Reading, config_in, problem_of
from selfkd.backend.reading_files import files_problem
from selfkd.core.files import beside
from selfkd.core.number_format import BYTES
from selfkd.recipe.schema import Recipe

FORMS = "Name a folder of safetensors, or a hub id, with its revision behind an @: Org/model@main"


def source_of(reference: str) -> tuple[str, str | None]:
    """Return the path or hub id of a model, and its revision.

    >>> source_of("Org/model@main"), source_of("models/rm@2")
    (('Org/model', 'main'), ('models/rm', '2'))
    """
    path, _, revision = reference.partition("@")
    return path, revision or None


def local_folder(reference: str, recipe: Recipe) -> Path | None:
    """Return the folder that a reference names, seen from the recipe; None where there is none."""
    return next((place for place in beside(reference, recipe.folders) if place.is_dir()), None)


def problem(reference: str, reading: Reading, recipe: Recipe) -> tuple[str, str]:
    """Return (field, why) a model cannot score so, as far as that is known here; ('', '') where nothing is wrong with it."""
    folder = local_folder(reference, recipe) or _in_cache(reference)
    if folder is None:
        name, _ = source_of(reference)
        return ("", "") if is_hub_id(name) else ("", f"there is no folder '{reference}'. {FORMS}")
    config = config_in(folder)
    if not config:
        return "", f"the folder {folder} has no config.json, so it holds no model. {FORMS}"
    found = problem_of(reading, config)
    return found if any(found) else files_problem(reading, folder)


def bytes_of(reference: str, recipe: Recipe) -> int | None:
    """Return what the copy of a model takes in a run; of one that is not here, known by its description alone, the most; None: not known."""
    folder = local_folder(reference, recipe) or _in_cache(reference)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0
    if weights:
        return weights
    path, revision = source_of(reference)
    sizes = sizes_of({"path": str(folder or path), "revision": revision})
    return BYTES["float32"] * sizes.parameters if isinstance(sizes, Sizes) else None


def _in_cache(reference: str) -> Path | None:
    """Return where a hub's model lies on this machine already; nothing is fetched, nobody is asked."""
    name, revision = source_of(reference)
    if not is_hub_id(name):
        return None
    from huggingface_hub import try_to_load_from_cache  # half a second, for recipes alone that name such a model

    with suppress(Exception):  # a name that is no repository, a cache that cannot be read
        found = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    return None
