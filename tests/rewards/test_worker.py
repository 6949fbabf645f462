"""A worker process starts fast: it imports the standard library and a few small modules of ours, no package."""

from __future__ import annotations

import subprocess
import sys


def test_a_worker_needs_no_package_and_few_modules_of_ours() -> None:
    code = "import sys, selfkd.rewards.worker; print(*sorted(name for name in sys.modules if name.startswith('selfkd.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours = ("contract", "load", "messages", "worker")
    needed = ["selfkd.core", "selfkd.core.local_code", "selfkd.core.user_module", "selfkd.errors", "selfkd.rewards"]
    assert done.stdout.split() == [*needed, *(f"selfkd.rewards.{name}" for name in ours)]
    code = "import sys, selfkd.rewards.worker; print({'polars', 'numpy', 'pydantic', 'yaml'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
