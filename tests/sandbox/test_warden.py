"""The warden stays small: what it imports is in the memory of every program that is forked from it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from selfkd.sandbox import sites

ROOT = str(Path(sites.__file__).parent.parent.parent)
OWN = {"bubble", "cgroup", "inside", "kernel", "seccomp", "walls", "warden", "watch"}


def test_a_warden_imports_eight_modules_of_ours() -> None:
    code = f"import sys; sys.path.append({ROOT!r}); import selfkd.sandbox.warden; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-S", "-s", "-B", "-c", code], capture_output=True, text=True, check=True)
    found = {name for name in done.stdout.split() if name.startswith("selfkd.")}
    assert found == {"selfkd.sandbox", *(f"selfkd.sandbox.{name}" for name in OWN)}
