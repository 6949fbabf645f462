"""Imports go down, torch stays behind the backends, files and functions stay short enough to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import selfkd

ORDER = "errors < core < sandbox, backend, rewards < prompts < steps < recipe < chain < report < cli"

PACKAGE = Path(selfkd.__file__).parent
LEVEL = {name: at for at, names in enumerate(ORDER.split(" < ")) for name in names.split(", ")}
HEAVY = {"torch", "vllm", "trl", "ray", "datasets", "transformers", "accelerate", "safetensors", "peft"}
HOMES = {"vllm": "backend/engine", "ray": "backend/ray"}  # the one folder that may import it
FRONT_DOORS = ("__init__", "sandbox.__init__")
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def package_of(module: str) -> str:
    return module.split(".")[0]


def imported(path: Path) -> Iterator[str]:
    """Modules of selfkd that a file imports anywhere in it: at its top, inside a function, or for types only."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "selfkd":
            base = (node.module or "").removeprefix("selfkd").removeprefix(".")
            for alias in node.names:
                deeper = f"{base}.{alias.name}".removeprefix(".")
                found = deeper if is_module(deeper) else base
                yield f"{found}.__init__" if (PACKAGE / found.replace(".", "/")).is_dir() else found
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("selfkd.") for alias in node.names if alias.name.startswith("selfkd."))


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


GRAPH = {name_of(path): set(imported(path)) for path in MODULES}


def test_every_package_has_its_place_in_the_order():
    assert {package_of(name) for name in GRAPH} - {"__init__", "__main__"} == set(LEVEL)


def test_a_package_imports_only_from_packages_to_its_left():
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if package_of(name) in LEVEL
        and package_of(other) in LEVEL
        and package_of(name) != package_of(other)
        and LEVEL[package_of(other)] >= LEVEL[package_of(name)]
    ]
    assert upward == []


def test_no_imports_go_round_in_a_circle():
    """Imports inside functions and for types only count too; the two front doors load names when these are first asked for."""
    graph = {name: others for name, others in GRAPH.items() if name not in FRONT_DOORS}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        graph = {name: others for name, others in graph.items() if name not in leaves}
    assert sorted(graph) == []


def heavy(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        named = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.split(".")[0] for name in named if name.split(".")[0] in HEAVY)


def test_only_backends_name_torch_and_its_friends():
    for path in MODULES:
        if package_of(name_of(path)) != "backend":
            assert set(heavy(path)) == set(), path
        for package in heavy(path):
            home = HOMES.get(package, "backend")
            assert (PACKAGE / home) in path.parents, f"{path} imports {package}"


def test_the_command_line_starts_without_torch():
    modules = "selfkd.cli.main, selfkd.recipe.lint, selfkd.report.verify, selfkd.report.status"
    code = f"import sys, {modules}; sys.exit(bool(set(sys.modules) & {HEAVY!r}))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_files_and_functions_are_short_enough_to_read():
    for path in MODULES:
        text = path.read_text()
        assert text.count("\n") <= 450, f"{path.name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{path.name}:{node.lineno} {node.name} has {lines} lines"


def test_every_module_says_what_it_is_for():
    assert [path.name for path in MODULES if not ast.get_docstring(ast.parse(path.read_text()))] == []
