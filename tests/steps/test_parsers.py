"""Parsers of judgments: right values by hand, and for any text a value in range or a reason."""

from __future__ import annotations

import doctest
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.steps import parsers
from selfkd.steps.parsers import PARSERS, Parser, json_field, last_letter, last_number, last_word, tagged

EVERY = [(name, kind) for kind, names in PARSERS.items() for name in names]
PIECES = st.sampled_from(
    [
        "yes",
        "no",
        "[[A]]",
        "[[",
        "]]",
        "B",
        ":",
        "\n",
        "<score>",
        "</score>",
        '{"score": ',
        "}",
        '"',
        "4",
        "-1",
        "99",
        ".",
        "/5",
        " ",
    ]
)
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=3), max_size=30).map("".join)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers(), max_size=3)


def test_the_examples_hold():
    assert doctest.testmod(parsers).failed == 0 < doctest.testmod(parsers).attempted


@pytest.mark.parametrize(("name", "kind"), EVERY)
@given(TEXTS, st.floats(-100, 100), st.floats(0.001, 100))
def test_any_text_is_a_value_in_range_or_none_with_a_reason(name, kind, text, lowest, width):
    value, why = Parser(name, kind, lowest=lowest, highest=lowest + width).read(text)
    assert (value is None) == bool(why)
    if value is not None:
        low, high = (lowest, lowest + width) if kind == "mark" else (0.0, 1.0)
        assert type(value) is float and low <= value <= high


@pytest.mark.parametrize("kind", PARSERS)
@given(PLAIN | st.dictionaries(st.text(max_size=3), PLAIN, max_size=2), st.text(max_size=5))
def test_any_json_value_is_read_or_refused_with_a_short_reason(kind, value, before):
    found, why = Parser("json", kind, highest=5.0).read(before + json.dumps({"score": value}))
    assert (found is None) == bool(why)
    assert "\n" not in why and len(why) < 120


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_what_a_parser_writes_it_reads_again(name, kind):
    parser = Parser(name, kind, lowest=1, highest=7)
    for value in (1.0, 7.0, 2.5) if kind == "mark" else set(parsers.WORDS[kind].values()):
        assert parser.read(parser.written(value)) == (value, "")
        assert parser.read(f"Some thoughts first.\n{parser.written(value)}\n") == (value, "")


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("Score: 4", 4),
        ("Score: **4**", 4),
        ("4.", 4),
        ("I add 1 point, then 1 more: 2 points in all", 2),
        ("Score: 3 / 5", 3),
        ("Score: 3 out of 5.", 3),
        ("It is right in 2/3 of the steps. Score: 1. (2/3 of them)", 1),
        ("Score: 4\n\nWritten in 2023", 4),
        ("-1", None),
        ("6", None),
        ("1,000", None),
        ("v2 and A3", None),
        ("2023-04-05", None),
        ("1.2.3", None),
        ("9" * 5000, None),
        ("٤", None),
        ("", None),
    ],
)
def test_the_last_number_in_range_is_the_mark(text, mark):
    assert last_number(text, 0, 5)[0] == mark


@pytest.mark.parametrize(
    ("text", "first_wins"),
    [
        ("[[A]]", 1.0),
        ("[[ b ]]", 0.0),
        ("[[C]]", 0.5),
        ("[[tie]]", 0.5),
        ("A", 1.0),
        ("**B**.", 0.0),
        ("My verdict: A\n", 1.0),
        ("[[D]]", None),
        ("A is better than B", None),
        ("I like A.", None),
    ],
)
def test_a_verdict_is_a_letter_in_brackets_or_the_end_of_the_last_line(text, first_wins):
    assert last_letter(text)[0] == first_wins


@pytest.mark.parametrize(
    ("text", "met"),
    [
        ("yes", 1.0),
        ("NO!", 0.0),
        ("**Yes**", 1.0),
        ("nothing wrong", None),
        ("Yesterday", None),
        ("x\nSo: yes", 1.0),
        ("no\nyes", None),
    ],
)
def test_a_criterion_is_met_where_the_judgment_opens_or_ends_with_yes(text, met):
    assert last_word(text)[0] == met


def test_the_last_tag_or_object_counts_and_an_open_one_does_not():
    assert tagged("<score>1</score><score>2", "score") == "1"
    assert json_field('{"score": 1} {"score": ', "score") == 1
    assert Parser("json", "mark", highest=5).read('{"score": "4/5"}') == (4.0, "")
    assert Parser("json", "mark", highest=5).read('{"score": true}') == (None, "true is no number")
    assert Parser("json", "mark", highest=5).read('{"score": NaN}')[0] is None
    assert Parser("json", "mark", highest=5).read('{"score": 1' + "0" * 400 + "}")[0] is None
    assert Parser("tag", "mark", highest=5).read("<score>9</score>") == (None, "no number between 0 and 5")


@pytest.mark.parametrize(
    "text", ["{" * 40_000, '{"a":' * 40_000, "<score>" * 40_000, "[[" * 40_000, "1 out of " * 40_000, "1" * 300_000]
)
def test_a_long_odd_text_is_read_in_a_moment(text):
    began = time.monotonic()
    for name, kind in EVERY:
        Parser(name, kind).read(text)
    assert time.monotonic() - began < 5


def test_what_a_judge_quotes_behind_or_inside_its_mark_is_no_mark():
    tag, field = (Parser(name, "mark", highest=10) for name in ("tag", "json"))
    assert tag.read("<score>2</score> The answer asks for 10</score> itself.") == (2.0, "")
    assert field.read('{"score": 2, "parts": [{"score": 10}, {"score": 9}]}') == (2.0, "")
    assert field.read('{"score": 1} {"result": {"score": 4}}') == (4.0, "")
