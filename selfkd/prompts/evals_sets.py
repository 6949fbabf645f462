"""Data sets of OpenAI's package `evals`, read from the files that its installer left; the package is never imported, for it pulls in a lot.

It is optional: `pip install --no-deps evals`. Nothing of it is part of selfkd, so what may be done with a set is what the package says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.prompts.rows import rows_of_file

PACKAGE = "evals"
DATA = "evals/registry/data/"
USUAL_FILE = "samples.jsonl"
SET = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<first>\d*):(?P<end>\d*)\])?")
HOW_TO_GET = f"It is optional: pip install --no-deps {PACKAGE}"


class Rows(NamedTuple):
    """The rows of a set with their places, and what the recipe calls their origin: package, version, set and licence."""

    rows: Iterator[tuple[Any, str]]
    label: str


def rows_of_set(name: str, where: str) -> Rows:
    """Return the rows of a set, all or a slice of them: `quartz`, `quartz[:3000]`, `product-matching/rules`, `abba/of/a.jsonl`."""
    found = SET.fullmatch(name.strip())
    if found is None:
        raise UsageError(
            f"no name of a data set: '{name}'", where, "Write it as quartz, or sliced: quartz[:3000], quartz[3000:]"
        )
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UsageError(f"this recipe needs the data of the package '{PACKAGE}'", where, HOW_TO_GET) from None
    path = _file_of(package, found["name"], where)
    label = f"{PACKAGE} {package.version} {name}, {_licence(package, found['name'])}"
    first, end = (int(found[side]) if found[side] else None for side in ("first", "end"))
    return Rows(iter([*rows_of_file(path)][first:end]), label)


def _file_of(package: metadata.Distribution, name: str, where: str) -> Path:
    """Return the file of a set: `samples.jsonl` of its folder, or the one that is named."""
    files = {str(file).removeprefix(DATA): file for file in package.files or () if str(file).startswith(DATA)}
    named = name if name.endswith(".jsonl") else f"{name}/{USUAL_FILE}"
    if named not in files:
        known = [file.removesuffix(f"/{USUAL_FILE}") for file in files if file.endswith(".jsonl")]
        beside = [one for one in known if one.startswith(f"{name}/")]
        fix = f"Files of it: {', '.join(sorted(beside))}" if beside else f"{len(known)} sets are there. {HOW_TO_GET}"
        said = f"the package '{PACKAGE}' {package.version} has no set '{name}'.{did_you_mean(name, known)}"
        raise UsageError(said, where, fix)
    return Path(str(files[named].locate()))


def _licence(package: metadata.Distribution, name: str) -> str:
    """Return the licence of a set: that of the package, unless its licence file speaks of the set's folder."""
    files = [file for file in package.files or () if re.match(r"LICEN[CS]E", file.name, re.IGNORECASE)]
    texts = [Path(str(file.locate())).read_text("utf-8") for file in files]
    if not texts:
        return "no licence told"
    folder = name.partition("/")[0]
    apart = any(re.search(rf"{DATA}{re.escape(folder)}(?![\w-])", text) for text in texts)
    mit = any(re.match(r"\s*MIT License", text) for text in texts)
    return f"licence of its own ({files[0].name})" if apart else "MIT" if mit else f"licence in {files[0].name}"


def as_asked(row: Any, place: str) -> dict[str, Any]:
    """Return a row in the package's usual form, `input` and `ideal`, as messages and answer; its other columns stay."""
    if not isinstance(row, dict) or "input" not in row:
        fix = "Rows of this package's usual form have `input` and `ideal`; a `map` function can read any other."
        raise UsageError("no column 'input'", place, fix)
    rest = {name: value for name, value in row.items() if name not in ("input", "ideal")}
    asked = "messages" if isinstance(row["input"], list) else "prompt"
    ideal = row.get("ideal")
    only = ideal[0] if isinstance(ideal, list) and len(ideal) == 1 else ideal
    return {asked: row["input"], "answer": only, **rest}
