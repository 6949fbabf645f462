"""A worker process starts fast: it imports the standard library and nothing else."""

from __future__ import annotations

import subprocess
import sys


def test_a_worker_needs_only_two_modules_of_the_package() -> None:
    code = "import sys, selfkd.rewards.worker; print(*sorted(name for name in sys.modules if name.startswith('selfkd.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["selfkd.rewards", "selfkd.rewards.contract", "selfkd.rewards.worker"]
