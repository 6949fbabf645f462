"""What a model wrote is text on a page, whatever it wrote: no mark-up, no sign that acts, no flood."""

from __future__ import annotations

import re

import pytest
from chains import RECIPE, go, recipe_in
from hypothesis import given
from hypothesis import strategies as st
from pages import page, seen

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.run import Run
from selfkd.report.page.text import ACTING, clean
from selfkd.report.page.write import markdown_cell

HOSTILE = (
    "<script>alert(1)</script>",
    "</style></pre></div></details></main><img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "\x00\x07\x1b[31mred\x9b",
    "\u202eTXT.exe\u2066\u200b\U000e0041",
    "]]>--><!-- ' \" & &amp; &#x202e;",
    "![picture](http://example.org/x.png) [link](javascript:alert(1)) | cell | `code",
)
LONG = "na" * 50_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return a run whose model answers sums rightly, around one hostile text or another, or 100,000 letters."""

    def says(messages, seed, skill) -> str:
        first, second = map(int, re.findall(r"\d+", messages[-1]["content"])[-2:])
        said = LONG if first in (60, 62, 64) else HOSTILE[seed % len(HOSTILE)]
        return f"{said} {first + second + (seed % 3 == 0)}"

    folder = tmp_path_factory.mktemp("hostile")
    recipe = recipe_in(folder, RECIPE, "rounds=1", "context=200000", "sample.max_tokens=120000", "measure.max_tokens=120000")
    run = Run.open(recipe, folder / "run", Machine(backend="fake"))
    return go(recipe, folder / "run", Fake(run.numerics, says))


def test_hostile_answers_are_shown_as_they_are_and_do_nothing(hostile):
    run = hostile
    assert run.samples(round=1, step="measure")["text"].str.len_chars().max() > 100_000
    text = page(run.folder)
    found = seen(text)  # no script, no image, no handler, every tag closed in its turn
    assert "<script>alert(1)</script>" in found.words and "&lt;script&gt;" in text
    assert "{{ 7 * 7 }}{% raw %}" in found.words
    assert not ACTING.search(text)
    assert len(text) < 1_000_000 and "more characters)" in text


def test_hostile_names_are_text_in_charts_too(tmp_path):
    name = "a<b>$x_1$"
    text = RECIPE.replace(
        "measure: reward/number.py:last_number", f'measure: {{reward: reward/number.py:last_number, as: "{name}"}}'
    )
    try:
        run = go(recipe_in(tmp_path, text), tmp_path / "run")
    except Exception as error:  # a name that the recipe refuses cannot reach a page
        assert "as" in str(error)
        return
    assert "a&lt;b&gt;$x_1$" in page(run.folder)


def test_hostile_answers_stay_in_their_line_of_the_markdown(hostile):
    text = page(hostile.folder, html=False)
    assert not ACTING.search(text) and "<script" not in text and not re.search(r"(?<!\\)\]\(", text)
    assert len(text) < 30_000


@given(st.text(alphabet=st.characters(codec=None)))
def test_no_sign_that_acts_is_left_in_any_text(text):
    shown = clean(text)
    assert not ACTING.search(shown)
    shown.encode("utf-8")


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs", "M"))))
def test_a_text_of_letters_and_signs_stays_as_it_is(text):
    plain = ACTING.sub("", text)
    assert clean(plain) == plain


@given(st.text())
def test_a_cell_of_markdown_is_one_line_with_no_border_of_its_own(text):
    cell = markdown_cell(text)
    assert "\n" not in cell and not re.search(r"(?<!\\)(\\\\)*\|", cell) and "<" not in cell
