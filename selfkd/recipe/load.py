"""What a person writes: a recipe file, checked as a whole before anything starts, and the steps of each round it stands for.

Loading reads files and nothing else: no network, no model, no prompt. What needs those is `lint`'s to find.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from selfkd.core import yamlfile
from selfkd.core.files import as_typed, builtin_folder
from selfkd.core.wording import closest
from selfkd.core.yamlfile import Node, Problems
from selfkd.errors import RecipeError, UsageError
from selfkd.prompts.read import source_kind
from selfkd.recipe import checks
from selfkd.recipe.control import controlled
from selfkd.recipe.lines import LISTS, SMALL, Change, Entry, Line, check, name_all, override, typed, unroll
from selfkd.recipe.messages import explain
from selfkd.recipe.schema import FIELDS, Recipe

GOLD_TEXT = "gold.text="  # an override of the step that the control gold-sft brings in


def load(
    name: str, overrides: str | Sequence[str] = (), small: bool = False, control: str | None = None, steps: Sequence[int] = ()
) -> Recipe:
    """The recipe of a file, or of a name such as `quickstart`; `overrides` are key=value words. RecipeError names every problem.

    With `small`, what its block `small` changes is changed, before the overrides are. With `control` it is that control of the recipe,
    after the overrides; `steps` are those that the method's updates took, by round.
    """
    recipe, problems = read(name, overrides, small, control, steps), Problems()
    checks.meaning(recipe, problems)
    problems.stop()
    return recipe


def read(
    name: str, overrides: str | Sequence[str] = (), small: bool = False, control: str | None = None, steps: Sequence[int] = ()
) -> Recipe:
    """`load` without a look at what the words mean together, which `lint` reports beside what it finds in files."""
    overrides = [overrides] if isinstance(overrides, str) else list(overrides)
    path = locate(name)
    problems = Problems()
    tree, text, folders = _with_parent(path, problems, ())
    tree = _in_small(tree, path) if small else tree
    gold = [word for word in overrides if word.startswith(GOLD_TEXT)] if control and not _has_gold(tree) else []
    recipe = _build(tree, [word for word in overrides if word not in gold], path, text, folders, problems, small)
    if not small:
        small_form(recipe)
    return controlled(recipe, control, steps, *(word.removeprefix(GOLD_TEXT) for word in gold[-1:])) if control else recipe


def small_form(recipe: Recipe) -> Recipe | None:
    """The small form of a recipe, where its own file has one: of one that is inherited, a child with other steps need not keep the names."""
    own = recipe.small and recipe.places[SMALL].startswith(f"{as_typed(recipe.source)}:")
    return read(str(recipe.source), small=True) if own else None


def _in_small(tree: Node, path: Path) -> Node:
    """The recipe under the name that its small form has, so that both may run; UsageError where it has none."""
    if SMALL not in tree.value or not tree.value[SMALL].value:
        fix = (
            f"Recipes that have one: {', '.join(with_small())}; or say what is to be smaller: rounds=1 prompts.train.limit=100"
        )
        raise UsageError(f"has no `{SMALL}` block", as_typed(path), fix)
    written = tree.value["name"].value if "name" in tree.value else path.stem
    return Node({**tree.value, "name": Node(f"{written}-{SMALL}", tree.where)}, tree.where)


def with_small() -> list[str]:
    """The shipped recipes that have a block `small`."""
    files = sorted((builtin_folder() / "recipes").glob("*.yaml"))
    return [file.stem for file in files if re.search(rf"^{SMALL}:", file.read_text("utf-8"), re.MULTILINE)]


def _has_gold(tree: Node) -> bool:
    """Whether the recipe has a gold step itself, which an override then means."""
    entries = unroll(tree.value.get("steps"), "steps", Problems())
    return any(entry.verb == "gold" for entry in entries)


def frozen(resolved: dict[str, Any], folder: Path) -> Recipe:
    """A recipe read back from the words that `Recipe.resolved` gave, as a run keeps them; what they mean was judged back then."""
    return _of_words(resolved, folder, (), [folder], Problems())


def changed(resolved: dict[str, Any], folder: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe that a run keeps, changed by overrides as one of a file is; what they name is looked for here. RecipeError names every problem."""
    problems = Problems()
    recipe = _of_words(resolved, folder, overrides, [folder, Path.cwd()], problems)
    checks.meaning(recipe, problems)
    problems.stop()
    return recipe


def _of_words(
    resolved: dict[str, Any], folder: Path, overrides: Sequence[str], folders: list[Path], problems: Problems
) -> Recipe:
    text = yamlfile.dump(resolved)
    tree = yamlfile.parse(text, f"{folder.name}/recipe.resolved.yaml", problems)
    return _build(tree, overrides, folder / "recipe.resolved.yaml", text, folders, problems)


def locate(name: str) -> Path:
    """A path as given, then a name under the working directory's recipes/ or itself, then a shipped recipe."""
    if Path(name).is_file():
        return Path(name)
    file = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    homes = [Path("."), Path("recipes"), builtin_folder(), builtin_folder() / "recipes"]
    for home in homes:
        if (home / file).is_file():
            return home / file
    fix = "selfkd recipes lists the shipped ones; or give a path to a .yaml file."
    raise UsageError(f"no recipe '{name}'.{_meant(Path(name), file, homes)}", "", fix)


def _meant(given: Path, file: Path, homes: Sequence[Path]) -> str:
    """Return which recipe is likely meant: that of the folder that was named, else one of a like name, beside that path or known."""
    inside = sorted(given.glob("*.y*ml")) if given.is_dir() else []
    own = [path for path in inside if path.stem == given.name] or inside
    if len(own) == 1:
        return f" Did you mean '{own[0]}'?"
    known = {path.stem: path.stem for home in homes[1::2] for path in home.glob("*.yaml")}
    known |= {path.stem: str(path) for path in file.parent.glob("*.y*ml")}
    return f" Did you mean '{known[stem]}'?" if (stem := closest(file.stem, known)) else ""


def hidden(name: str) -> str:
    """Return which file a name means where a shipped recipe is called so too; "" where there is nothing to confuse."""
    path, shipped = locate(name), builtin_folder() / "recipes" / f"{name}.yaml"
    if Path(name).is_file() or not shipped.is_file() or path.samefile(shipped):
        return ""
    return f"'{name}' is {as_typed(path)} here, not the shipped recipe of that name."


def _with_parent(path: Path, problems: Problems, children: tuple[Path, ...]) -> tuple[Node, str, list[Path]]:
    """The file merged over the one it extends, its own text, and the folders to look in, nearest first."""
    if path.resolve() in children:
        raise RecipeError("extends itself", as_typed(path))
    tree, text = yamlfile.read(path, as_typed(path), problems)
    folders = [path.absolute().parent]
    if not isinstance(tree.value, dict):
        raise RecipeError("a recipe is a mapping of fields such as model, prompts and steps", tree.where)
    parent = tree.value.pop("extends", None)
    if parent is not None and parent.value is not None:
        above, _, more = _with_parent(_parent(parent, path), problems, (*children, path.resolve()))
        tree, folders = merge(above, tree), folders + more
    return tree, text, folders


def _parent(node: Node, child: Path) -> Path:
    if not isinstance(node.value, str):
        raise RecipeError("extends: name one recipe file", node.where)
    beside = child.parent / node.value
    try:
        return beside if beside.is_file() else locate(node.value)
    except UsageError as error:
        raise RecipeError(f"extends: {error.what}", node.where) from None


def merge(parent: Node, child: Node) -> Node:
    """Mappings merge field by field; anything else, lists included, is replaced. A source of another kind replaces the parent's whole."""
    mappings = isinstance(parent.value, dict) and isinstance(child.value, dict)
    if not mappings or source_kind(parent.value) != source_kind(child.value):
        return child
    own = {key: merge(parent.value[key], node) if key in parent.value else node for key, node in child.value.items()}
    return Node({**parent.value, **own}, child.where)


def _build(
    tree: Node,
    overrides: Sequence[str],
    path: Path,
    text: str,
    folders: list[Path],
    problems: Problems,
    small: bool = False,
) -> Recipe:
    fields: dict[str, Node] = dict(tree.value)
    changes = [*(_changes(fields.pop(SMALL), problems) if small else []), *typed(overrides, problems)]
    if SMALL in fields and fields[SMALL].value is None:  # how a child lets go of its parent's
        del fields[SMALL]
    if "steps" not in fields or not fields["steps"].value:
        problems.add(fields["steps"].where if "steps" in fields else tree.where, "steps", "a recipe needs at least one step")
    written = {part: unroll(fields.pop(part, None), part, problems) for part in LISTS}
    named = name_all([entry for part in LISTS for entry in written[part]], {*FIELDS, "load"}, problems)
    override(changes, fields, [field for field in FIELDS if field not in (*LISTS, SMALL)], named, problems)
    lines = [check(entry, problems) for entry in named]
    entries = {part: [entry for entry in named if entry.part == part] for part in LISTS}
    checks.sources(fields, problems)
    recipe = _recipe(fields, entries, dict(zip((entry.name for entry in named), lines, strict=True)), tree.where, problems)
    problems.stop()
    assert recipe is not None
    found = {"source": path, "text": text, "folders": _unique(folders), "places": _places(fields)}
    return recipe.model_copy(update={**found, "name": recipe.name or path.stem})


def _changes(block: Node, problems: Problems) -> list[Change]:
    """What a block `small` changes: its keys are those of overrides, its values are YAML."""
    if not isinstance(block.value, dict):
        problems.add(block.where, SMALL, "should be a mapping of overrides: {rounds: 1, sample.n: 4}")
        return []
    return [Change(key, Node(node.value, node.where), node.where) for key, node in block.value.items()]


def _places(fields: dict[str, Node]) -> dict[str, str]:
    inner = {
        f"{name}.{word}": node.where
        for name, one in fields.items()
        if isinstance(one.value, dict)
        for word, node in one.value.items()
    }
    return {name: node.where for name, node in fields.items()} | inner


def _unique(folders: Sequence[Path]) -> tuple[Path, ...]:
    return tuple(dict.fromkeys([*folders, Path.cwd(), builtin_folder(), builtin_folder() / "recipes"]))


def _recipe(
    fields: dict[str, Node], entries: dict[str, list[Entry]], lines: dict[str, Line | None], where: str, problems: Problems
) -> Recipe | None:
    words = {field: yamlfile.plain(node) for field, node in fields.items()}
    hidden = [field for field in Recipe.model_fields if field not in FIELDS and words.pop(field, None) is not None]
    for field in hidden:
        problems.add(fields[field].where, "", f"no field '{field}'. Fields: {', '.join(FIELDS)}")
    for part in LISTS:
        words[part] = tuple(line for entry in entries[part] if (line := lines[entry.name]) is not None)
    try:
        return Recipe.model_validate(_watching_best(words))
    except ValidationError as error:
        explain(error, Recipe, Node(fields, where), "", problems)
        return None


def _watching_best(words: dict[str, Any]) -> dict[str, Any]:
    """Patience without a metric of its own watches that of `best`."""
    best, stop = words.get("best"), words.get("stop")
    if isinstance(best, dict) and isinstance(stop, dict) and stop.get("patience") and not stop.get("metric"):
        return {**words, "stop": {**stop, "metric": best.get("metric"), "mode": best.get("mode", "max")}}
    return words
