"""What errors advise to install can be installed: from the checkout, since selfkd is on no index."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import selfkd
from selfkd.core import install

ROOT = Path(__file__).parents[2]


def installed(monkeypatch: pytest.MonkeyPatch, package: Path, origin: dict[str, object] | None) -> None:
    """selfkd's files lie in `package`, and pip noted that it came from `origin`."""
    monkeypatch.setattr(selfkd, "__file__", str(package / "selfkd" / "__init__.py"))
    said = SimpleNamespace(read_text=lambda name: json.dumps(origin) if origin else None)
    monkeypatch.setattr(metadata, "distribution", lambda name: said)


def checkout_at(folder: Path) -> Path:
    (folder / "locks").mkdir(parents=True)
    (folder / "pyproject.toml").touch()
    (folder / "locks/cpu.txt").touch()
    return folder


def test_a_checkout_is_named_with_its_path_and_stays_editable_where_it_is(tmp_path, monkeypatch):
    home = checkout_at(tmp_path / "my selfkd")
    installed(monkeypatch, home, {"url": home.as_uri(), "dir_info": {"editable": True}})
    assert install.extra("engine") == f"pip install -e '{home}[engine]'"
    assert install.lock("cpu") == f"pip install --no-deps -r '{home}/locks/cpu.txt'"


def test_a_copy_that_was_installed_from_a_checkout_names_it_while_it_is_there(tmp_path, monkeypatch):
    home = checkout_at(tmp_path / "my selfkd")
    installed(monkeypatch, tmp_path / "site-packages", {"url": home.as_uri(), "dir_info": {}})
    assert install.extra("rewards") == f"pip install '{home}[rewards]'"
    (home / "pyproject.toml").unlink()
    assert install.extra("rewards") == "in a checkout of selfkd: pip install '.[rewards]'"


@pytest.mark.parametrize("origin", [None, {"url": "https://example.org/selfkd.whl"}])
def test_where_no_checkout_is_known_one_is_asked_for(tmp_path, monkeypatch, origin):
    installed(monkeypatch, tmp_path, origin)
    said = [install.extra("engine"), install.lock("gpu"), install.itself()]
    assert said == [
        "in a checkout of selfkd: pip install '.[engine]'",
        "in a checkout of selfkd: pip install --no-deps -r locks/gpu.txt",
        "in a checkout of selfkd: pip install --no-deps .",
    ]


def test_no_message_advises_to_install_selfkd_from_an_index():
    texts = {path: path.read_text() for path in (ROOT / "selfkd").rglob("*.py")}
    assert [path.name for path, text in texts.items() if re.search(r"(pip )?install '?selfkd\[", text)] == []


def test_the_locks_and_extras_that_are_named_are_there():
    named = set()
    for path in (ROOT / "selfkd").rglob("*.py"):
        named |= set(re.findall(r"\b(lock|extra)\(\s*['\"](\w+)['\"]", path.read_text()))
    project = (ROOT / "pyproject.toml").read_text()
    assert {kind for kind, _ in named} == {"lock", "extra"}
    for kind, name in named:
        assert (ROOT / "locks" / f"{name}.txt").is_file() if kind == "lock" else re.search(rf"^{name} = \[", project, re.M)
    tracked = subprocess.run(["git", "ls-files", "locks"], cwd=ROOT, capture_output=True, text=True).stdout
    assert "locks/cpu.txt" in tracked or not (ROOT / ".git").exists()
