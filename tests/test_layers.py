"""Imports go down, torch stays behind the backends, files and functions stay short enough to read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import selfkd

PACKAGE = Path(selfkd.__file__).parent
LEVELS = {
    0: ["types", "errors", "digest", "trl_fields"],
    1: ["storage", "templates", "rewards", "calling", "workers", "prompts", "sources", "tables", "yamlfile", "sandbox"],
    2: ["backend.base", "steps"],
    3: ["recipe", "lines", "checks", "explain", "machine", "plan", "reference"],
    4: ["run", "round", "keeping"],
    5: ["loop"],
    6: ["backend"],
    7: ["lint", "status", "show", "stats", "verify", "doctor", "screen", "shelf", "topics", "trial", "attempt"],
    8: ["cli", "commands", "__main__"],
}
HEAVY = {"torch", "vllm", "trl", "ray", "datasets", "transformers", "accelerate", "safetensors", "peft"}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def level(module: str) -> int:
    exact = [at for at, names in LEVELS.items() if module in names]
    package = [at for at, names in LEVELS.items() if module.split(".")[0] in names]
    assert exact or package, f"selfkd/{module.replace('.', '/')}.py has no level: name it in tests/test_layers.py"
    return (exact or package)[0]


def imported(path: Path) -> list[str]:
    """Modules of the package that a file imports at run time (TYPE_CHECKING blocks do not count)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "selfkd":
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfkd."):
            module = (node.module or "").removeprefix("selfkd.")
            deeper = [f"{module}.{alias.name}" for alias in node.names]
            found += [name if (PACKAGE / (name.replace(".", "/") + ".py")).exists() else module for name in deeper]
    return found


def test_a_module_imports_only_from_its_own_level_and_below():
    upward = [
        f"{name_of(path)} (level {level(name_of(path))}) imports {other} (level {level(other)})"
        for path in MODULES
        for other in imported(path)
        if level(other) > level(name_of(path)) and name_of(path) not in ("round", "run")
    ]
    assert upward == []


def test_backends_know_only_the_lowest_levels_and_each_other():
    for path in (PACKAGE / "backend").glob("*.py"):
        for other in imported(path):
            allowed = other.startswith("backend") or level(other) <= 1
            assert allowed, f"{path.name} imports {other}"


def test_only_backends_name_torch_and_its_friends():
    for path in MODULES:
        if path.parent.name == "backend" or path.stem in ("doctor", "prompts"):
            continue
        roots = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        froms = {
            (node.module or "").split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        }
        assert not (roots | froms) & HEAVY, f"{path.name} imports {(roots | froms) & HEAVY}"


def test_the_command_line_starts_without_torch():
    code = f"import sys, selfkd.cli, selfkd.lint, selfkd.verify, selfkd.status; sys.exit(bool(set(sys.modules) & {HEAVY!r}))"
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
