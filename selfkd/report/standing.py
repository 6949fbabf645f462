"""How far each shipped recipe was tried: compared with others in a sweep whose results are kept, or walked with a scripted model.

`python -m selfkd.report.standing FOLDER > recipes/standing.json` writes what `selfkd recipes` shows, of a folder of sweeps and their results; a test
holds the file against this.
A recipe was compared where an arm of its name is the same method by its steps, and results of that very arm have figures.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from selfkd.chain.results import Result, lines_of, meaning
from selfkd.core.files import builtin_folder
from selfkd.recipe.load import load, read
from selfkd.recipe.method import method
from selfkd.recipe.sweep import Sweep, Trial, is_sweep, read_sweep

WALKED = "walked with a scripted model"  # in the first line of such a test


def standing(results: Sequence[Result], sweeps: Sequence[Sweep], shipped: Path, walks: Path) -> dict[str, Any]:
    """Return {compared: {recipe: {metric, trials, controls, made}}, walked: recipes}; `walks` are the tests that walk them."""
    there = [path.stem for path in sorted(shipped.glob("*.yaml"))]
    done = {name: found for name in there if (found := _compared(shipped / f"{name}.yaml", results, sweeps))}
    files = [path.read_text("utf-8") for path in sorted(walks.rglob("test_*.py"))]
    texts = "\n".join(text for text in files if WALKED in text.partition("\n")[0])
    return {"compared": done, "walked": [name for name in there if re.search(rf'"{re.escape(name)}"', texts)]}


def _compared(path: Path, results: Sequence[Result], sweeps: Sequence[Sweep]) -> Mapping[str, Any]:
    found = [result for sweep in sweeps for result in _of_method(path, results, sweep)]
    arms = {one.arm for one in found}
    beside = sorted(
        {
            str(one.control)
            for one in results
            if one.control and not one.failed and one.arm == f"{_method_of(one, arms)}-{one.control}"
        }
    )
    made = sorted({one.when[:10] for one in found})
    return {"metric": found[0].metric, "trials": len(found), "controls": beside, "made": made[-1]} if found else {}


def _method_of(control: Result, arms: set[str]) -> str:
    return next((arm for arm in arms if control.arm == f"{arm}-{control.control}"), "")


def _of_method(path: Path, results: Sequence[Result], sweep: Sweep) -> Iterator[Result]:
    """Yield the results with figures of the trials of a sweep that are the recipe's method, as its files are now."""
    trials = {one.name: one for one in sweep.trials if not one.control and Path(one.recipe).stem == path.stem}
    own = {one.name: one for one in results if one.sweep == sweep.name and not one.failed and one.name in trials}
    if own and _same_method(path, next(iter(trials.values()))):
        yield from (one for name, one in own.items() if one.recipe == meaning(trials[name].load(one.steps)))


def _same_method(path: Path, trial: Trial) -> bool:
    return method(read(str(path))) == method(load(trial.recipe, list(trial.words)))


def kept(folder: Path) -> tuple[list[Result], list[Sweep]]:
    """Return the results that lie in a folder, and its sweeps that have some."""
    results = {path: [one for one in lines_of(path)[0] if not one.is_test] for path in sorted(folder.rglob("*.jsonl"))}
    files = [path for path in sorted(folder.rglob("*.yaml")) if is_sweep(path)]
    sweeps = [read_sweep(path) for path in files if any(results.get(path.parent / name) for name in _results_of(path))]
    return [one for found in results.values() for one in found], sweeps


def _results_of(path: Path) -> list[str]:
    return re.findall(r"^results: (\S+)$", path.read_text("utf-8"), re.MULTILINE)


if __name__ == "__main__":
    home = builtin_folder()
    print(json.dumps(standing(*kept(Path(sys.argv[1])), home / "recipes", home / "tests"), indent=1))
