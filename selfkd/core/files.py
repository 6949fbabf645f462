"""Files that a person names: found beside the recipe, in the working directory, or among the shipped ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import selfkd
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError


def builtin_folder() -> Path:
    """The folder that holds the shipped `recipes/` and `reward/`: a checkout's root, or a wheel's own share."""
    package = Path(selfkd.__file__).resolve().parent
    for folder in (package.parent, package / "share"):
        if (folder / "recipes").is_dir() and (folder / "reward").is_dir():
            return folder
    return package / "share"


def locate(name: str, folders: Iterable[Path], *inside: str) -> Path:
    """A file next to the recipe (`folders`), then in the working directory, then built in; `inside` are tried as prefixes."""
    places = dict.fromkeys(folder.absolute() for folder in (*folders, Path.cwd(), builtin_folder()))
    tried = [folder / prefix / name for folder in places for prefix in ("", *inside)]
    for path in tried:
        if path.is_file():
            return path
    near = {f"{path.parent}" for path in tried if path.parent.is_dir()}
    names = [other.name for folder in sorted(near) for other in Path(folder).iterdir() if other.suffix == Path(name).suffix]
    looked = "Looked in: " + ", ".join(dict.fromkeys(str(path.parent) for path in tried))
    raise UsageError(f"no file '{name}'.{did_you_mean(Path(name).name, names)}", name, looked)


def as_typed(path: Path) -> str:
    """The path as a person would type it here."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else str(path)
