"""The card of an exported model, as the hub reads it: what it is, what was measured, what to beware of, and where it comes from.

Its figures are those of `selfkd status`. Folders of the machine that made it do not stand in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import jinja2

import selfkd
from selfkd.chain import standing
from selfkd.chain.records import Info
from selfkd.chain.run import Run
from selfkd.core import yamlfile
from selfkd.core.pool import Model
from selfkd.recipe.schema import Recipe
from selfkd.report import status
from selfkd.report.comparison import markdown_of
from selfkd.report.tables import LEGEND, lines_of, rounds_cells

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
FORMATS = {"bf16": "bfloat16", "fp32": "float32"}
UNTOLD = "not told by the recipe"


def text(run: Run, reference: str, model: Model, dtype: str, beneath: str) -> str:
    """Return the card of one model of a run as Markdown with the hub's fields on top. `beneath`: the folder of an adapter's base, or ''."""
    state, recipe = status.read(run.folder), dict(standing.in_force(run.paths, run.info).recipe)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False)
    environment.filters["table"] = markdown_of
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    return (
        template.render(
            front=yamlfile.dump(_front(run, recipe, beneath)).strip(),
            run=run.info.name,
            round=_round_of(run, model),
            reference=reference,
            model=model,
            dtype=FORMATS[dtype],
            beneath=beneath,
            origin=_origin(run.info),
            rounds=len(state.rounds) - 1,
            state=state,
            measured=[[str(cell) for cell in row] for row in rounds_cells(state.rounds, state.split, wide=False)],
            legend=LEGEND,
            notes=[line for line in map(str, lines_of(state)) if line != LEGEND],
            data=[("data", "rows", "from", "licence", "digest"), *_data(run, recipe)],
            lineage=[("round", "began with", "trained from", "weights", "sealed as"), *_lineage(run, model.role)],
            code=sorted(
                (_without_folders(name), entry.digest[:16]) for name, entry in run.code.items() if "/" in name or "." in name
            ),
            amended=len(run.paths.amendments()),
            recipe=(words := recipe_text(recipe)),
            fence=_fence(words),
            packages=", ".join(f"{name} {version}" for name, version in sorted(run.numerics.get("packages", {}).items())),
            seed=run.info.seed,
            version=selfkd.__version__,
        ).strip()
        + "\n"
    )


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML with every word that its record has, but for the folders of the machine that made it."""
    return yamlfile.dump(_without_folders(_ordered(recipe))).strip()


def _fence(text: str) -> str:
    """Return the marks around a text in Markdown: more of them than stand anywhere in it."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _ordered(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words of a recipe in the order in which its reference explains them; a record sorts them by name."""
    known = [name for name in Recipe.model_fields if name in recipe]
    return {name: recipe[name] for name in (*known, *(name for name in recipe if name not in known))}


def _front(run: Run, recipe: Mapping[str, Any], beneath: str) -> dict[str, Any]:
    """Return the fields that the hub reads; those that name a hub's model or data only where the run came from one."""
    origin = str(run.info.model["path"])
    hubs = sorted({words["hub"] for words in _sources(recipe).values() if isinstance(words, Mapping) and words.get("hub")})
    steps = [words for step in recipe["steps"] for verb, words in step.items() if verb == "train"]
    losses = sorted({str(words["loss"]) for words in steps if ".py:" not in str(words["loss"])} - {"none"})
    return {
        "library_name": "peft" if beneath else "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": origin} if _is_hub_id(origin) else {}),
        **({"datasets": hubs} if hubs else {}),
        "tags": ["selfkd", "self-distillation", *losses],
    }


def _is_hub_id(origin: str) -> bool:
    return origin.count("/") == 1 and not origin.startswith((".", "/", "~")) and not Path(origin).exists()


def _origin(info: Info) -> str:
    """Return what the run started from: a hub id with its revision; of a folder or a file its name alone."""
    path, revision = str(info.model["path"]), info.model.get("revision")
    shown = path if _is_hub_id(path) or path.startswith("package:") else PurePath(path).name
    return f"{shown} at {revision}" if revision else shown


def _round_of(run: Run, model: Model) -> int:
    """Return the round that left a model, the first where several did."""
    heads = [seal.head().get(model.role) for seal in run.sealed()]
    return next((index for index, head in enumerate(heads) if head and head.digest == model.digest), 0)


def _lineage(run: Run, role: str) -> Iterator[tuple[str, ...]]:
    """Yield of each round whose answers it learned from, which weights its update began from, and what it left."""
    start = ""
    for seal in run.sealed():
        left = seal.head().get(role)
        weights = left.digest[:16] if left else ""
        begun = [
            str(one.identity["from"]) for one in run.commits(seal) if one.verb == "train" and one.identity.get("role") == role
        ]
        verdict = "" if seal.accepted else ", rolled back"
        name = "base" if seal.round == 0 else str(seal.round)
        yield name, start, ", ".join(begun), weights, f"{seal.digest[:16]}{verdict}"
        start = weights if seal.accepted else start


def _sources(recipe: Mapping[str, Any]) -> dict[str, Any]:
    prompts = recipe["prompts"]
    held = prompts.get("held") or {}
    return {**{name: words for name, words in prompts.items() if name not in ("held", "take") and words}, **held}


def _data(run: Run, recipe: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    sources = _sources(recipe)
    for split, entry in run.info.prompts.items():
        yield f"prompts, {split}", str(entry.rows), _shown(sources.get(split)), UNTOLD, entry.digest[:16]
    for name, brought in run.info.data.items():
        source = brought.reading.get("from", "")
        yield f"brought, {name}", str(brought.rows), _shown(source), brought.licence or UNTOLD, brought.digest[:16]


def _shown(source: Any) -> str:
    """Return a source in one line: its kind and place, of a file its name alone."""
    if isinstance(source, str):
        return PurePath(source).name
    if isinstance(source, Sequence):
        return f"{len(source)} rows in the recipe"
    words = _without_folders(source or {})
    kept = {name: value for name, value in words.items() if value and name not in ("prompt", "answer", "template")}
    return ", ".join(f"{name}: {_plain(value)}" for name, value in kept.items())


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return str(value)


def _without_folders(value: Any) -> Any:
    """Return words of a recipe in which an absolute path is the name of its file: whose home it was is nobody's business."""
    if isinstance(value, Mapping):
        return {name: _without_folders(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return PurePath(value).name if value.startswith(("/", "~")) and "\n" not in value else value
    return [_without_folders(inner) for inner in value] if isinstance(value, Sequence) else value
