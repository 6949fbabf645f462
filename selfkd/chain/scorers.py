"""Models of others that only score: copied into a run when it is created, found again by content, and never fetched again.

Nothing of them is changed: they are read as they were published. Their weights are links of one copy in the cache where links are possible.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from selfkd.backend.engine.root_model import ROOTS, cache, fetched
from selfkd.backend.reading import config_in, head_of
from selfkd.chain.paths import Paths
from selfkd.chain.records import CodeEntry
from selfkd.core import digest, storage
from selfkd.core.shared_files import share
from selfkd.errors import UsageError
from selfkd.recipe.schema import Recipe
from selfkd.recipe.scorers import local_folder, source_of

KEPT = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
STAND_IN = "weights.json"


def freeze_scorer(reference: str, recipe: Recipe, paths: Paths, stand_in: bool) -> CodeEntry:
    """Copy the model that a step names into code/. With `stand_in`, for a walk without models, its name alone."""
    draft = storage.make_folder(storage.temporary(paths.tmp, "-scorer"))
    revision = ""
    if stand_in:
        storage.put(draft / STAND_IN, storage.json_text({"scorer": reference}), paths.tmp)
    else:
        folder, revision = _found(reference, recipe)
        _copy(folder, draft)
        share(sorted(draft.glob("*.safetensors")), cache() / ROOTS)
    found = digest.weights(draft)
    home = storage.adopt(draft, paths.code / f"{found[:12]}-model")
    return CodeEntry(path=paths.relative(home), digest=found, revision=revision)


def _found(reference: str, recipe: Recipe) -> tuple[Path, str]:
    """Return the folder of a model, and which revision of a hub's it is; UsageError where there is none that can be read."""
    path, revision = source_of(reference)
    local = local_folder(reference, recipe)
    folder, resolved = (local, "") if local else fetched(path, revision)
    if not any(folder.glob("*.safetensors")):
        fix = "selfkd opens safetensors only: convert it once on a machine you trust, with `save_pretrained`."
        raise UsageError("the model that scores has no weights in safetensors", str(folder), fix)
    config = config_in(folder)
    if not head_of(config):
        kind = (config.get("architectures") or ["nothing"])[0]
        fix = "Name one that ends in ForSequenceClassification, ForTokenClassification or ForCausalLM."
        raise UsageError(f"its config.json names {kind}, which gives no scores", str(folder), fix)
    return folder, resolved


def _copy(folder: Path, draft: Path) -> None:
    """Copy what a model is made of; links would follow a folder that its owner writes into again."""
    for path in sorted(path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()):
        storage.written(draft / path.name, lambda path=path: shutil.copyfile(path, draft / path.name))  # type: ignore[misc]
