"""Reading a page as a browser's parser does: its elements, its words, and what it would fetch."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from chains import RECIPE, recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import sweep
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.recipe.sweep import sweep_of
from selfkd.report.page import write

VOID = {"meta", "br", "link", "img", "input", "hr"}


def nothing(folder) -> dict[str, str]:
    return {}


@dataclass
class Seen(HTMLParser):
    """The elements of a page: (tag, attributes) in order, its words, and tags that were closed without being open."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    unbalanced: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        if not self._open or self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data) -> None:
        if "style" not in self._open:
            self.said.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.said).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def seen(text: str) -> Seen:
    """Parse a page, and see that it is one: balanced, no name twice, every label there, nothing fetched or run."""
    found = Seen()
    found.feed(text)
    found.close()
    assert found.unbalanced == [] and found._open == []
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for _, attributes in found.tags:
        for label in (attributes.get("aria-labelledby") or "").split():
            assert label in names
        for reference in (attributes.get("href"), *re.findall(r"url\((.*?)\)", " ".join(filter(None, attributes.values())))):
            assert reference is None or (reference.startswith("#") and reference[1:] in names), reference
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "form", "base"}
    assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)
    return found


def page(*folders, html: bool = True) -> str:
    return write.of_runs(list(folders), nothing, html)


class Tired(Exception):
    """Ends a sweep after its first trials."""


def sweep_in(folder: Path) -> Path:
    """Return a sweep of a method and its control, two seeds each, in which only the trials of the first seed were made."""
    recipe_in(folder, f"{RECIPE}best: {{metric: dev/last_number}}\n")
    asked = sweep_of([str(folder / "sums.yaml"), "rounds=1"], 2, ["random-reward"], None, None, "swept")

    def drive(run: Run, watch: Any) -> None:
        if run.info.seed:
            raise Tired
        if len(run.sealed()) <= run.recipe.rounds:
            walk(run, Fake(run.numerics), run.begin(watch))

    with suppress(Tired):
        sweep.walk(asked, folder / "swept", Machine(backend="fake"), drive, lambda text: None)
    return folder / "swept"
