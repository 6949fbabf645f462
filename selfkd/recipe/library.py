"""The recipes that are shipped or lie in the working directory: listing them, and copying one with all the files it names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from selfkd.core.files import builtin_folder, reference_parts
from selfkd.core.local_code import local_code
from selfkd.errors import UsageError
from selfkd.prompts import templates
from selfkd.recipe.load import load, locate
from selfkd.recipe.schema import Recipe
from selfkd.rewards.find import find_function


def recipes() -> list[tuple[str, Path]]:
    """(name or path, file) of the recipes here and of the shipped ones; one's own stand in for shipped ones of their name."""
    own = {path.stem: (str(path), path) for path in _files(Path("recipes"))}
    shipped = {path.stem: (path.stem, path) for path in _files(builtin_folder() / "recipes")}
    same = Path("recipes").absolute() == builtin_folder() / "recipes"
    return list((shipped if same else {**shipped, **own}).values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.yaml"))


def copy(name: str, folder: Path) -> list[Path]:
    """The recipe `name`, the ones it extends, and the rewards and templates they name, under `folder`; what was written.

    A copied recipe finds its files next to itself, so it runs from anywhere. Files that exist with other content are refused
    before anything is written.
    """
    forms = [load(name), *([load(name, small=True)] if load(name).small else [])]
    if in_the_way := next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None):
        raise UsageError(
            "is a file, and the copy needs a folder", str(in_the_way), "Name a folder; it is made if it is not there."
        )
    wanted = dict(pair for form in forms for pair in _wanted(form, locate(name)))
    own = folder / locate(name).name
    if own.is_file() and own.samefile(locate(name)):
        raise UsageError("is there already", str(own), "Edit that file, or copy it to another folder.")
    taken = [folder / target for target, source in wanted.items() if _differs(folder / target, source)]
    if taken:
        raise UsageError("exists already with other content", str(taken[0]), "Copy to another folder, or move that file away.")
    for target, source in wanted.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        if not ((folder / target).exists() and (folder / target).samefile(source)):
            shutil.copyfile(source, folder / target)
    return [folder / target for target in wanted]


def _differs(target: Path, source: Path) -> bool:
    return target.exists() and target.read_bytes() != source.read_bytes()


def _wanted(recipe: Recipe, path: Path) -> Iterator[tuple[str, Path]]:
    """(name under the target folder, file) of everything a recipe needs: each under the name the recipe calls it by."""
    yield path.name, path
    yield from _parents(path)
    functions, texts = recipe.references()
    maps = [
        source["map"] for source in recipe.splits().values() if isinstance(source, dict) and isinstance(source.get("map"), str)
    ]
    for reference in (*functions, *maps):
        function = find_function(reference, recipe.folders)
        yield from _beside(reference, function.path.resolve())
    for reference in texts:
        template = templates.load(reference, list(recipe.folders))
        if Path(template.name).is_file():  # a template written into the recipe itself has no file
            yield reference, Path(template.name)


def _beside(reference: str, file: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name under the target folder, file) of a reward and of what it needs, each where it lies beside the other."""
    home = Path(reference_parts(reference)[0]).parent
    for source in local_code(file).files.values():
        name = os.path.normpath(home / os.path.relpath(source, file.parent))
        if name.startswith(".."):
            raise UsageError(f"'{reference}' needs {source}, which would lie outside the folder", reference, "Copy it by hand.")
        yield Path(name).as_posix(), source


def _parents(path: Path) -> Iterator[tuple[str, Path]]:
    """The files that a recipe extends, one after the other, each beside its child as `extends` names it."""
    above = (yaml.safe_load(path.read_text("utf-8")) or {}).get("extends")
    if above:
        beside = path.parent / above
        parent = beside if beside.is_file() else locate(above)
        yield Path(above).name if not beside.is_file() else above, parent
        yield from _parents(parent)
