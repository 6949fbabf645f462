"""Files that a person names: finding one, naming one back, and the two parts of `file.py:function`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import selfkd
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError

NAME = r"^\w[\w.-]*$"  # of a run, and so of its folder


def builtin_folder() -> Path:
    """Return the folder that holds the shipped `recipes/` and `reward/`: a checkout's root, or a wheel's own share."""
    package = Path(selfkd.__file__).resolve().parent
    for folder in (package.parent, package / "share"):
        if (folder / "recipes").is_dir() and (folder / "reward").is_dir():
            return folder
    return package / "share"


def locate(name: str, folders: Iterable[Path], *inside: str) -> Path:
    """Return the file `name` from next to the recipe (`folders`), else the working directory, else the shipped files.

    In each folder, `inside` are tried as prefixes too. UsageError names a likely spelling and the places.
    """
    places = dict.fromkeys(folder.absolute() for folder in (*folders, Path.cwd(), builtin_folder()))
    tried = [folder / prefix / name for folder in places for prefix in ("", *inside)]
    for path in tried:
        if path.is_file():
            return path
    searched = sorted({path.parent for path in tried if path.parent.is_dir()})
    names = [other.name for folder in searched for other in folder.iterdir() if other.suffix == Path(name).suffix]
    looked = "Looked in: " + ", ".join(dict.fromkeys(str(path.parent) for path in tried))
    raise UsageError(f"no file '{name}'.{did_you_mean(Path(name).name, names)}", name, looked)


def beside(path: str, folders: Iterable[Path]) -> Iterator[Path]:
    """Yield what lies at a path as a recipe writes it, seen from its folders; of an absolute path, itself."""
    local = Path(path).expanduser()
    places = dict.fromkeys([local] if local.is_absolute() else [folder / local for folder in folders])
    return (place for place in places if place.exists())


def as_typed(path: Path) -> str:
    """Return the path as a person would type it here: relative where it lies below the working directory."""
    absolute = path.absolute()
    return absolute.relative_to(Path.cwd()).as_posix() if absolute.is_relative_to(Path.cwd()) else str(path)


def reference_parts(reference: str) -> tuple[str, str]:
    """Return (file, function) of a reference such as `reward/math.py:correct`; the file is "" where there is no colon.

    >>> reference_parts("reward/math.py:correct")
    ('reward/math.py', 'correct')
    """
    file, _, name = reference.rpartition(":")
    return file, name
