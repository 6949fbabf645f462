"""Models of others that only score: copied into a run when it is created, found again by content, and never fetched again.

Nothing of them is changed: they are read as they were published. Their weights are links of one copy in the cache where links are possible.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from selfkd.backend.engine.root_model import ROOTS, cache, fetched
from selfkd.backend.reading import config_in, head_of, problem_of
from selfkd.backend.reading_files import Count, files_problem
from selfkd.backend.tokens import tokenizer
from selfkd.chain.paths import Paths
from selfkd.chain.records import CodeEntry
from selfkd.core import digest, storage
from selfkd.core.shared_files import share
from selfkd.errors import UsageError
from selfkd.recipe.lines import LISTS
from selfkd.recipe.schema import Recipe
from selfkd.recipe.scorers import local_folder, source_of
from selfkd.steps.by_model import reading_of
from selfkd.steps.score import ScoreStep

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
        _refuse_unfit(reference, folder, recipe)
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


def _refuse_unfit(reference: str, folder: Path, recipe: Recipe) -> None:
    """Raise UsageError where a step could not have the model read as it wants: now that its files are here, and before anything is asked."""
    for step in (line.at(1) for part in LISTS for line in getattr(recipe, part)):
        if isinstance(step, ScoreStep) and reference in step.scorers():
            reading = reading_of(step)
            count = _counter(folder) if reading.good and reading.bad else None
            found = problem_of(reading, config_in(folder))
            field, why = found if any(found) else files_problem(reading, folder, count)
            if why:
                what = f"'{field or step.source}': {why}"
                raise UsageError(what, f"{step.name}: {folder}", "Name another model, or other words, in the score step.")


def _counter(folder: Path) -> Count:
    """Return how many tokens a word is for the tokenizer that will read it."""
    return lambda word: len(tokenizer(str(folder))(word, add_special_tokens=False)["input_ids"])


def edited(recipe: Recipe, known: Mapping[str, CodeEntry], run: Path) -> list[str]:
    """Return one sentence for each local model that was changed since the run was created: the run keeps the one that it has."""
    said = "was changed since the run was created, which keeps the model it was created with. For the other one: --name X"
    return [f"{one}: {folder} {said}" for one, folder in _local(recipe, known, run) if not _is(folder, known[one].digest)]


def _local(recipe: Recipe, known: Mapping[str, CodeEntry], run: Path) -> Iterator[tuple[str, Path]]:
    """Yield the frozen models that were folders here, and still are; a stand-in was never opened."""
    for one in recipe.scorers():
        folder = local_folder(one, recipe)
        if folder and one in known and not known[one].revision and not (run / known[one].path / STAND_IN).exists():
            yield one, folder


def _is(folder: Path, expected: str) -> bool:
    """Whether a folder still holds the model of this digest, in the files that a run keeps of it."""
    with tempfile.TemporaryDirectory(prefix="selfkd-scorer-") as place:
        for path in (path for pattern in KEPT for path in folder.glob(pattern) if path.is_file()):
            (Path(place) / path.name).symlink_to(path.absolute())
        try:
            return digest.holds(Path(place), expected)
        except (OSError, ValueError, KeyError, EOFError):
            return False  # half a model, or none, is another one
