"""recipe.resolved.yaml: the recipe of a run with every word spelled out, and every file it names found inside the run folder.

It runs from that folder, wherever the folder lies: prompts, rewards and templates are the frozen ones. Only the model stays where
it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfkd.chain.records import CodeEntry, DataEntry, SplitEntry
from selfkd.core import yamlfile
from selfkd.core.files import reference_parts
from selfkd.prompts import brought
from selfkd.recipe.lines import LISTS, Line
from selfkd.recipe.schema import Recipe
from selfkd.steps.bring import BringStep


def text(
    recipe: Recipe, prompts: Mapping[str, SplitEntry], code: Mapping[str, CodeEntry], data: Mapping[str, DataEntry]
) -> str:
    """Return the resolved recipe as YAML whose paths are relative to the run folder."""
    words = recipe.resolved()
    words["model"] = {name: value for name, value in recipe.model_source().items() if value is not None}
    found = {split: {"file": entry.file} for split, entry in prompts.items()}
    held = {split: found.pop(split) for split in recipe.prompts.held}
    words["prompts"] = {**words["prompts"], **found, "held": held}
    for part in LISTS:
        words[part] = [
            {verb: _of_step(verb, {**fields, **_declared(line)}, code, data) for verb, fields in step.items()}
            for line, step in zip(getattr(recipe, part), words[part], strict=True)
        ]
    return yamlfile.dump(words)


def _declared(line: Line) -> dict[str, Any]:
    """Return who a step says is told the gold answer: to have written the default is a declaration, without which it would not start."""
    return {name: line.words[name] for name in ("told",) if name in line.words}


def _of_step(
    verb: str, fields: Mapping[str, Any], code: Mapping[str, CodeEntry], data: Mapping[str, DataEntry]
) -> dict[str, Any]:
    words = _frozen(fields, code)
    name = f"{BringStep.DATA}{fields['name']}" if verb == BringStep.verb else ""
    return {**words, "from": {"file": data[name].path, **brought.FROZEN}, "id": None} if name else words


def _frozen(fields: Mapping[str, Any], code: Mapping[str, CodeEntry]) -> dict[str, Any]:
    return {
        name: [_place(one, code) for one in value] if isinstance(value, list) else _place(value, code)
        for name, value in fields.items()
    }


def _place(value: Any, code: Mapping[str, CodeEntry]) -> Any:
    """Return a reference to code or a template as one to its frozen copy; any other value as it is."""
    if not isinstance(value, str) or value not in code:
        return value
    function = reference_parts(value)[1] if value.partition(":")[2] else ""
    return f"{code[value].path}:{function}" if function else code[value].path
