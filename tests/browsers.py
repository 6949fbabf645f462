"""Debian's Chromium, driven by Playwright. `.ci/run` installs it and sets SELFKD_CI: then a browser that is missing is a failure, and no skip."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    demanded = bool(os.environ.get("SELFKD_CI"))
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    assert found or not demanded, "there has to be a browser here: apt-get install chromium"
    if not found:
        pytest.skip("no chromium here: apt-get install chromium")
    sync = importlib.import_module("playwright.sync_api") if demanded else pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        # A root user, as in a container, has no sandbox of its own; the page is ours.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()
