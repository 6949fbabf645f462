"""The page in Debian's Chromium, driven by Playwright: light and dark, a phone's width, no JavaScript, keyboard only, and axe-core's rules.

Where there is no browser these are skipped, and fail under `.ci/run` (tests/browsers.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browsers
import pytest
from chains import RECIPE, go, recipe_in
from pages import nothing, page, sweep_in

from selfkd.report.page import write

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browsers.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Pages of a run with alarms, a rolled back round and two suites, of two runs, and of one that was just begun."""
    folder = tmp_path_factory.mktemp("browser")
    recipe = f"{RECIPE}keep_if: dev_last_number > prev_dev_last_number\nbest: {{metric: dev/last_number}}\n"
    one = go(recipe_in(folder, recipe, "rounds=3"), folder / "one").folder
    other = go(recipe_in(folder, RECIPE, "seed=1"), folder / "other").folder
    made = {"run": page(one), "runs": page(one, other)}
    for name, text in made.items():
        (folder / f"{name}.html").write_text(text)
    return {name: folder / f"{name}.html" for name in made}


def opened(chromium: Any, path: Path, size: dict[str, int] = DESK, scripts: bool = True, **how: Any) -> Any:
    context = chromium.new_context(viewport=size, java_script_enabled=scripts, bypass_csp=scripts, **how)
    tab = context.new_page()
    tab.goto(path.as_uri())
    return tab


def closed(tab: Any) -> None:
    tab.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "runs"])
def test_axe_finds_no_fault(chromium, files, scheme, name):
    from axe_playwright_python.sync_playwright import Axe

    tab = opened(chromium, files[name], color_scheme=scheme)
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    found = Axe().run(tab).response["violations"]
    assert [(one["id"], one["impact"], one["nodes"][0]["html"][:200]) for one in found] == []
    closed(tab)


@pytest.mark.parametrize("name", ["run", "runs"])
def test_nothing_on_a_phone_is_wider_than_it(chromium, files, name):
    tab = opened(chromium, files[name], PHONE)
    tab.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    wide = "[...document.querySelectorAll('body *')].filter(one => one.getBoundingClientRect().right > innerWidth + 1 && !one.closest('.scroll')).length"
    assert tab.evaluate(wide) == 0
    closed(tab)


def test_letters_of_charts_can_be_read_on_a_phone(chromium, files):
    tab = opened(chromium, files["run"], PHONE)
    heights = tab.evaluate("[...document.querySelectorAll('svg.chart text')].map(one => one.getBoundingClientRect().height)")
    assert heights and min(heights) >= 8
    closed(tab)


def test_light_and_dark_are_two_papers_and_charts_follow(chromium, files):
    colours = {}
    for scheme in ("light", "dark"):
        tab = opened(chromium, files["run"], color_scheme=scheme)
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        line = tab.evaluate("getComputedStyle(document.querySelector('svg.chart [style*=\"stroke: var(--line-1)\"]')).stroke")
        colours[scheme] = (paper, line)
        closed(tab)
    assert colours["light"][0] == "rgb(255, 255, 255)"
    assert colours["light"][0] != colours["dark"][0] and colours["light"][1] != colours["dark"][1]


def test_without_javascript_and_network_all_of_it_is_there(chromium, files):
    tab = opened(chromium, files["run"], scripts=False, offline=True)
    asked: list[str] = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.reload()
    assert asked == [files["run"].as_uri()]
    assert tab.locator("svg.chart").count() > 5
    first = tab.locator("#r1-gallery details").first
    first.locator("summary").first.click()
    inner = first.locator("details").first
    inner.locator("summary").click()
    assert inner.locator(".said").first.is_visible()
    closed(tab)


def test_the_page_complains_of_nothing(chromium, files):
    tab = opened(chromium, files["run"], scripts=False)
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.reload()
    assert said == []
    closed(tab)


def test_a_keyboard_reaches_and_opens_everything(chromium, files):
    tab = opened(chromium, files["run"])
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the figures"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#main"
    reached = set()
    for _ in range(400):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            "[document.activeElement.tagName, [...document.querySelectorAll('summary')].indexOf(document.activeElement)]"
        )
        if at[0] == "BODY":
            break
        if at[0] == "SUMMARY" and at[1] not in reached:
            reached.add(at[1])
            if not tab.evaluate("document.activeElement.parentElement.open"):
                tab.keyboard.press("Enter")
            assert tab.evaluate("document.activeElement.parentElement.open")
            assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert len(reached) == tab.locator("summary").count() > 10
    closed(tab)


def test_what_is_printed_is_dark_on_white(chromium, files):
    tab = opened(chromium, files["run"], color_scheme="dark")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert not tab.locator("nav").is_visible()
    closed(tab)


def test_a_sweep_has_a_page_without_faults(chromium, tmp_path):
    from axe_playwright_python.sync_playwright import Axe

    (tmp_path / "sweep.html").write_text(write.of_sweep(sweep_in(tmp_path), nothing))
    tab = opened(chromium, tmp_path / "sweep.html", PHONE)
    assert Axe().run(tab).response["violations"] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    closed(tab)
