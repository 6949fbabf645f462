"""How the shipped rewards read: random numbers in every written custom, what a model may write, and gold answers that are refused."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readers import READERS, score
from scoring import results, row

from selfkd.rewards.contract import failed
from selfkd.rewards.find import find_function

numbers = st.decimals(min_value=-(10**12), max_value=10**12, places=2, allow_nan=False).filter(lambda value: value != 0)


def customs(value: Decimal) -> list[str]:
    """The number in each custom that docs/rewards.md writes down."""
    sign, size = "-" if value < 0 else "", abs(value)
    whole, _, cents = f"{size:f}".partition(".")
    grouped = f"{int(whole):,}"
    written = [f"{whole}.{cents}", f"{grouped}.{cents}", f"{grouped.replace(',', ' ')}.{cents}", f"{whole}.{cents}000"]
    written += [f"{grouped.replace(',', chr(0xA0))},{cents}"] if "," in grouped else []
    written += [f"{grouped.replace(',', '.')},{cents}"] if "," in grouped else []
    written += [f"{size * 1000:f}e-3", f"{Fraction(size).numerator}/{Fraction(size).denominator}"]
    signs = [sign, sign and "−", sign and "–", f"{sign}$", sign and f"${sign}"]
    plain = [one + text for text in written for one in dict.fromkeys(signs)]
    return [around.format(text) for text in plain for around in ("{}", "**{}**", "{} kg", "{}.")]


def stated(reader: str, text: str) -> str:
    return {"gsm8k": "so\n#### {}", "math": "so \\boxed{{{}}}", "answer_line": "so\nAnswer: {}"}.get(reader, "so {}").format(
        text
    )


@pytest.mark.parametrize("reader", ["number", "answer_line", "gsm8k", "math"])
@given(value=numbers)
@settings(deadline=None, max_examples=15)
def test_a_number_in_any_custom_equals_itself_and_no_other(reader: str, value: Decimal) -> None:
    texts = [text for text in customs(value) if reader != "answer_line" or "kg" not in text]
    other = f"{value + 1:f}"
    for text in texts:
        assert score(READERS[reader], stated(reader, text), f"{value:f}")[0] == 1.0, text
        assert score(READERS[reader], stated(reader, text), other)[0] == 0.0, text
        assert score(READERS[reader], stated(reader, text), f"{-value:f}")[0] == 0.0, text


@given(value=numbers)
@settings(deadline=None, max_examples=30)
def test_the_same_number_in_any_custom_is_the_same_vote(value: Decimal) -> None:
    texts = customs(value)
    assert all(score(READERS["vote"], f"Answer: {text}", f"{value:f}")[0] == 1.0 for text in texts)
    assert all(score(READERS["vote"], f"Answer: {text}", f"{value + 1:f}")[0] == 0.0 for text in texts)


@given(value=st.integers(-(10**9), 10**9), other=st.integers(-(10**9), 10**9))
@settings(deadline=None)
def test_a_near_miss_is_never_right(value: int, other: int) -> None:
    misses = {value + 1, value - 1, -value, value * 10, int(str(value)[:-1] or "0") if value > 9 else value + 2, other} - {
        value
    }
    for miss in misses:
        for reader in ("number", "gsm8k", "exact"):
            assert score(READERS[reader], stated(reader, str(miss)), str(value))[0] == 0.0, (reader, miss)


@given(text=st.text("-+0123456789.,/ $%e^{}\\()!xπ€", max_size=12))
@settings(deadline=None, max_examples=300)
def test_whatever_is_written_has_a_value_or_an_abstention_and_a_readable_gold_answer_equals_itself(text: str) -> None:
    for reader in ("number", "answer_line", "gsm8k", "exact", "vote"):
        value, why = score(READERS[reader], stated(reader, text), "7")
        assert not failed(value, why), (reader, text, why)
    value, why = score(READERS["number"], text, text)
    assert value in (1.0, None) or "gold answer" in why, (text, why)


@given(text=st.text("Ab-+.#!?()*`$ ", min_size=1, max_size=8), more=st.sampled_from("-+#5%"))
@settings(deadline=None, max_examples=300)
def test_a_text_equals_itself_and_not_itself_with_a_sign_more(text: str, more: str) -> None:
    value, why = score(READERS["exact"], text, text)
    if failed(value, why):
        assert "has no text" in why
        return
    assert value == 1.0
    assert score(READERS["exact"], f"x{text}x{more}", f"x{text}x")[0] == 0.0


HOSTILE = [
    *(rf"\boxed{{{text}}}" for text in (
        "9^{9^{9^9}}", "7^{7^{7^{7^7}}}-3", r"\dfrac{7^{7^{7^{7^7}}}-3}{16}", "9999999!", "((9!)!)!", "9^9^9^9", "9**9**9**9",
        "(((9^{99})^{99})^{99})^{99}", "10^{999999999}", "x^{999999999}", r"9^{\frac{9^9}{1}}", r"9^{\left(9!\right)}",
        r"\binom{999999999}{499999999}", "(x+y+z+w+v)^{99}", "(" * 150 + "1" + ")" * 150, "9" * 20_000, "1e999", "\ud800", "x" * 390,
    )),
    "9999999!", "1e999999", "9" * 20_000, "Answer: " + "9" * 20_000 + "x", "#### " + "9" * 20_000, "\ud800", "Answer: 4\udfff", "٤٢",
    *(text * (100_000 // len(text)) for text in (
        "Answer: 1", "answer is ", r"\boxed{", r"\boxed{1} and ", "<answer>", "</answer>", "<think>", "####", "$ ", r"\(", "*", "(", "1,",
        "123 ", "1,234,", "- ", " ", "\n", "a1", "{", r"\text{", r"\frac{1", "1/", "1e", "1%", "10^", ":", "!x", ".", "1 1/", r"\,1",
    )),
]  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # the clock may strike in a callback of the collector
@pytest.mark.parametrize("reference", [*READERS.values(), "number.py:close", "exact.py:contains"])
def test_whatever_a_model_writes_is_a_zero_or_an_abstention_in_bounded_time(reference: str) -> None:
    if reference == "math.py:correct":
        pytest.importorskip("math_verify")
    for text in HOSTILE:
        begun = time.process_time()
        value, why = score(reference, text, "-4")
        assert not value and not failed(value, why), (text[:40], value, why)
        assert why.encode() is not None and time.process_time() - begun < 2.0, text[:40]


@pytest.mark.parametrize(
    "answer", ["1,5", "a lot", "3-4", "x = 5", "2\\sqrt{3}", "9\\pi", "", "5!", "2 million", "±5", "1.5.2", "3/0"]
)
def test_a_gold_answer_that_is_not_one_number_is_refused(answer: str) -> None:
    for reader in ("number", "answer_line", "gsm8k"):
        value, why = score(READERS[reader], "#### 5", answer)
        assert value is None and failed(value, why) and "is not one number" in why


@pytest.mark.parametrize(
    "answer",
    ["", "\\frac{1}{", "9^{9^{9^9}}", "(1, 2", "First we see that " * 6 + "it is 2.", "so \\boxed{2", "x+" * 250 + "1"],
)
def test_a_gold_answer_that_mathematics_cannot_read_is_refused(answer: str) -> None:
    pytest.importorskip("math_verify")
    value, why = score(READERS["math"], "\\boxed{1}", answer)
    assert value is None and failed(value, why) and "the gold answer" in why


def test_a_gold_answer_with_a_currency_sign_or_a_unit_is_a_number() -> None:
    assert [score(READERS["gsm8k"], "#### 42", answer)[0] for answer in ("$42", "42.0", "42 apples", "1e16")] == [
        1.0,
        1.0,
        1.0,
        0.0,
    ]


def test_the_gold_answer_of_a_whole_solution_is_what_its_box_holds() -> None:
    pytest.importorskip("math_verify")
    solution = "First we see that $x > 3$. Then we see that the answer is $\\boxed{3\\sqrt{13}}$, as $9 \\cdot 13 = 117$."
    values = [score(READERS["math"], text, solution)[0] for text in (solution, "\\boxed{\\sqrt{117}}", "\\boxed{3}", "117")]
    assert values == [1.0, 1.0, 0.0, 0.0]


def test_hostile_answers_are_scored_in_worker_processes_too() -> None:
    pytest.importorskip("math_verify")
    rows = [dict(row(text, "4"), group=str(place)) for place, text in enumerate((*HOSTILE[:5], HOSTILE[12], "\\boxed{4}"))]
    found = results(find_function("reward/math.py:correct", []), rows, 60.0)
    assert [value for value, _ in found] == [0.0] * 6 + [1.0] and "a power in a power" in found[0][1]


def test_a_text_contains_an_answer_only_as_whole_words_with_their_signs() -> None:
    texts = {"it is -5": 1.0, "it is 5": 0.0, "(−5)": 1.0, "**-5**.": 1.0, "-55": 0.0, "<think>-5</think>6": 0.0}
    assert {text: score("exact.py:contains", text, "-5")[0] for text in texts} == texts
    assert [score("exact.py:contains", text, "C++")[0] for text in ("in C++.", "in C", "in C#")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text", ["**New York**", "'New York'", '"New York" is', "“New York”", "_New York_", "City:New York", "New York—a city"]
)
def test_a_text_contains_an_answer_of_several_words_within_emphasis_quotes_and_marks(text: str) -> None:
    assert score("exact.py:contains", text, "New York")[0] == 1.0
    assert score("exact.py:contains", text, "York New")[0] == score("exact.py:contains", text, "New Yor")[0] == 0.0


def test_signs_that_touch_a_word_are_no_emphasis() -> None:
    pairs = [("x' is", "x"), ("2*3*4", "3"), ("a_b_c", "b"), ("C++ is", "C"), ("**-5**", "5")]
    assert [score("exact.py:contains", text, answer)[0] for text, answer in pairs] == [0.0] * 5


def test_close_takes_a_number_within_its_tolerance_and_abstains_where_the_numeral_may_be_near() -> None:
    texts = {"about 3.14": 1.0, "about 3.2": 0.0, "-3.14": 0.0, "3,14": None, "4,2": 0.0, "314%": None, "nothing": 0.0}
    assert {text: score("number.py:close", text, "3.14159")[0] for text in texts} == texts
