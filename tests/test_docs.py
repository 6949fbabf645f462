"""The pages of docs/ are true: what stands in their consoles is typed and printed, and the site builds without a broken link."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import consoles
import pytest

import selfkd
from selfkd.cli.main import COMMANDS
from selfkd.recipe import library
from selfkd.recipe.control import CONTROLS

SOURCE = Path(selfkd.__file__).parent
TYPED = {page: count for page in sorted(consoles.DOCS.glob("*.md")) if (count := len(list(consoles.typed(page))))}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    here = SOURCE.parent
    monkeypatch.setenv("PYTHONPATH", f"{here}:{here / 'tests'}")  # for what is killed in a process of its own
    return tmp_path


@pytest.mark.parametrize("page", TYPED, ids=lambda page: page.stem)
def test_what_stands_in_a_console_is_what_is_printed(page: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    assert consoles.type_all(page, monkeypatch) == TYPED[page]


# ---- what a message says stands in the code ----


def texts() -> str:
    """Return all texts of the package; what stands between the parts of a formatted one is left out."""
    found = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_every_message_of_the_tables_of_recover_md_is_one_that_is_printed():
    page = (consoles.DOCS / "recover.md").read_text("utf-8")
    rows = [row for row in re.findall(r"^\| (.*) \|$", page, re.MULTILINE) if row.startswith("`")]
    messages = [part for row in rows for cell in row.split(" | ") for part in re.findall(r"`([^`]+)`", cell)]
    said = [one for one in messages if " " in one and "{" not in one and not re.match(r"selfkd |\w+: \w+$", one)]
    known = texts()
    assert len(said) > 25 and [message for message in said if message not in known] == []


def test_every_option_beside_a_command_of_a_page_is_one_of_that_command():
    for page in [consoles.DOCS.parent / "README.md", *consoles.DOCS.glob("*.md")]:
        for code in re.findall(r"`(selfkd [^`]+)`|^(?:\$ )?(selfkd .+)$", page.read_text("utf-8"), re.MULTILINE):
            _, name, *words = (code[0] or code[1]).partition("#")[0].replace(",", " ").split()
            known = {one for argument in COMMANDS[name].arguments for one in argument.names} if name in COMMANDS else set()
            unknown = {word for word in words if word.startswith("--")} - known
            assert name not in COMMANDS or not unknown, f"{page.name}: {name} {unknown}"


def test_the_recipes_controls_and_numbers_that_choose_md_names_are_there():
    page = (consoles.DOCS / "choose.md").read_text("utf-8")
    table = page[page.index("| what tells") : page.index("A first method")]
    named = {
        name
        for cell in re.findall(r"^\\|[^|]+\\|([^|]+)", table, re.MULTILINE)
        for name in re.findall(r"`([a-z]+(?:-[a-z]+)*)`", cell)
    }
    assert len(named) > 25 and named - {"bring", "chosen", "rejected"} <= {name for name, _ in library.recipes()}
    below = page[page.index("## Then hold") :]
    assert re.findall(r"^\| `([a-z-]+)` \|", below, re.MULTILINE) == list(CONTROLS)
    told = {name for name in re.findall(r"`judge/(\w+)`", page)}
    assert told and told <= set(
        re.findall(r"\w+", (SOURCE / "steps/judged.py").read_text("utf-8") + (SOURCE / "steps/judge.py").read_text("utf-8"))
    )


def test_the_site_builds_without_a_broken_link_and_asks_no_network(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=consoles.DOCS.parent,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    made = {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in consoles.DOCS.glob("*.md") if page.stem != "README"} | {"index", "404"} == made
    for page in (tmp_path / "site").glob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|iframe)[^>]*\ssrc=\"?([^\s\">]+)|<link[^>]*\shref=\"?([^\s\">]+)", page.read_text("utf-8")
        )
        assert not [one for pair in loaded for one in pair if "//" in one], page.name
    words = (tmp_path / "site/search/search_index.json").read_text("utf-8")
    assert "choose.html" in words and "--amend" in words


def test_a_broken_link_a_lost_page_and_a_missing_place_are_refused(tmp_path: Path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text("[no page](none.md) and [no place](README.md#none)\n")
    (tmp_path / "docs/lost.md").write_text("# In no menu\n")
    settings = (consoles.DOCS.parent / "mkdocs.yml").read_text("utf-8")
    (tmp_path / "mkdocs.yml").write_text(settings[: settings.index("\nnav:")] + "\nnav: [README.md, gone.md]\n")
    (tmp_path / "docs/hooks.py").write_text((consoles.DOCS / "hooks.py").read_text("utf-8"))
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 1
    for said in ("none.md", "#none", "lost.md", "gone.md"):
        assert said in built.stderr, said
