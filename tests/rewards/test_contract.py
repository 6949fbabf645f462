"""A function receives what its parameters name; what it returns is read, and what is not a number is a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import Write, results, row, write

from selfkd.rewards.contract import WHY_CHARS, failed, read_value
from selfkd.rewards.load import load

__all__ = ["write"]  # a fixture


def test_a_function_receives_only_what_it_names(write: Write) -> None:
    f = write("def f(completion, answer, level, scale=1): return (completion == answer) * level * scale", scale=2)
    assert results(f, [row(level=3)]) == [(6.0, "")]


def test_prompt_meta_and_sample_are_given_by_name(write: Write) -> None:
    f = write("def f(prompt, meta, sample): return len(prompt) + meta['k'] + sample['chars']")
    assert results(f, [row(k=10)]) == [(6 + 10 + 2, "")]


def test_meta_may_come_as_json_text(write: Write) -> None:
    f = write("def f(completion, level): return level")
    assert results(f, [row() | {"meta": '{"level": 4}'}]) == [(4.0, "")]


def test_what_a_function_may_return(write: Write) -> None:
    source = """
import numpy as np
from fractions import Fraction
RETURNS = {"bool": True, "int": 2, "float": 0.25, "numpy": np.float32(0.5), "zero-d": np.array(3), "fraction": Fraction(1, 2),
           "pair": (0.5, "half"), "none": None, "why": (None, "no number"), "nan": float("nan"), "inf": -float("inf"),
           "text": "0.5", "list": [1.0], "triple": (1, 2, 3), "huge": 10 ** 400, "object": object()}
def f(completion): return RETURNS[completion]
"""
    names = [
        "bool",
        "int",
        "float",
        "numpy",
        "zero-d",
        "fraction",
        "pair",
        "none",
        "why",
        "nan",
        "inf",
        "text",
        "list",
        "triple",
        "huge",
        "object",
    ]
    got = dict(zip(names, results(write(source), [row(name) for name in names]), strict=True))
    assert [got[name][0] for name in names[:7]] == [1.0, 2.0, 0.25, 0.5, 3.0, 0.5, 0.5]
    assert got["pair"] == (0.5, "half")
    assert got["none"] == (None, "abstained") and got["why"] == (None, "abstained: no number")
    assert got["nan"] == (None, "returned nan") and got["inf"] == (None, "returned -inf")
    assert got["text"] == (None, "returned str '0.5', expected a number")
    assert got["list"][1].startswith("returned list") and got["huge"][1] == "returned a number that is too large"
    assert got["object"] == (None, "returned object '<object object at 0x...>', expected a number")
    assert got["triple"] == (None, "returned a tuple of 3, expected (value, why)")
    assert [failed(*got[name]) for name in ("none", "why", "pair", "nan")] == [False, False, False, True]


def test_what_is_raised_is_the_reason_and_never_a_zero(write: Write) -> None:
    f = write("import sys\ndef f(completion):\n    if completion == 'exit': sys.exit(3)\n    return float(completion)")
    assert results(f, [row("1"), row("x\ny"), row("exit"), row("2")]) == [
        (1.0, ""),
        (None, "ValueError: could not convert string to float: 'x\\ny'"),
        (None, "SystemExit: 3"),
        (2.0, ""),
    ]
    long = write("def f(completion): raise KeyError('k' * 1000)")
    assert len(results(long, [row()])[0][1]) == WHY_CHARS


def test_a_prompt_without_an_answer_is_not_compared_with_none(write: Write) -> None:
    f = write("def f(completion, answer): return completion == answer")
    assert results(f, [row(answer=None), row()]) == [(None, "this prompt has no answer"), (1.0, "")]
    g = write("def g(completion, answer='none'): return answer == 'none'", "g")
    assert results(g, [row(answer=None)]) == [(1.0, "")]


def test_a_missing_meta_column_is_a_reason(write: Write) -> None:
    assert results(write("def f(level): return level"), [row()]) == [(None, "no 'level' in the meta of this prompt")]


def test_an_async_function_is_awaited(write: Write) -> None:
    f = write("import asyncio\nasync def f(completion):\n    await asyncio.sleep(0.001)\n    return len(completion)")
    assert results(f, [row("a"), row("bc")]) == [(1.0, ""), (2.0, "")]


def test_a_plural_is_the_whole_group_of_one_prompt(write: Write) -> None:
    f = write(
        "def f(completions, answer): return [completions.count(c) / len(completions) + (c == answer) for c in completions]"
    )
    rows = [row("a", "a", "p1"), row("b", "a", "p1"), row("b", "b", "p2"), row("a", "a", "p1")]
    assert [round(value or 0, 2) for value, _ in results(f, rows)] == [1.67, 0.33, 2.0, 1.67]


def test_a_group_function_must_return_one_value_per_completion(write: Write) -> None:
    f = write("def f(completions): return [1.0]")
    assert results(f, [row(), row()]) == [(None, "returned 1 values for 2 completions")] * 2
    g = write("def g(completions): return 1.0", "g")
    assert results(g, [row()]) == [(None, "returned float, expected a list of 1")]
    h = write("import numpy as np\ndef h(completions): return np.array([1.0, float('nan')])", "h")
    assert results(h, [row(), row()]) == [(1.0, ""), (None, "returned nan")]


def test_a_trl_reward_function_works_unchanged(write: Write) -> None:
    source = """
def f(prompts, completions, completion_ids, ground_truth, **kwargs):
    assert kwargs["answer"] == ["42"] * len(prompts)
    return [float(len(ids)) if truth in text else 0.0
            for text, ids, truth in zip(completions, completion_ids, ground_truth)]
"""
    assert results(write(source), [row("a z", ground_truth="z"), row("b", ground_truth="z")]) == [(2.0, ""), (0.0, "")]


RECEIVED = {  # parameters -> what each receives for two samples "a" and "b" of one prompt; the last is a TRL function
    "prompt, completion, answer, meta, sample, level": ("?", "a", "42", {"level": 3}, {"chars": 1}, 3),
    "prompt, completions, answer, answers, meta, metas, level": (
        *("?", ["a", "b"], "42", ["42", "42"], {"level": 3}, [{"level": 3}, {"level": 3}], 3),
    ),
    "prompts, completion_ids, answer, meta, level, **kwargs": (
        *(["?", "?"], [[1], [2]], ["42", "42"], [{"level": 3}, {"level": 3}], [3, 3]),
    ),
}


@pytest.mark.parametrize("parameters", RECEIVED)
def test_each_parameter_receives_what_the_documentation_says(tmp_path: Path, parameters: str) -> None:
    (tmp_path / "mine.py").write_text(f"def f({parameters}): return 1")
    reward = load(tmp_path / "mine.py", "f")
    both = [
        {"prompt": "?", "completion": text, "answer": "42", "meta": {"level": 3}, "sample": {"chars": 1}, "token_ids": [place]}
        for place, text in enumerate("ab", 1)
    ]
    received = reward.arguments(both if reward.grouped else both[:1])
    assert tuple(received[name] for name in reward.takes.names) == RECEIVED[parameters]


def test_a_meta_column_may_be_called_like_a_key_of_the_row(write: Write) -> None:
    f = write("def f(token_ids, group): return token_ids + group")
    assert results(f, [row(token_ids=7, group="p1") | {"meta": {"token_ids": 7, "group": 1}}]) == [(8.0, "")]


def test_half_a_surrogate_in_a_reason_is_written_as_its_escape(write: Write) -> None:
    source = "def f(completion):\n    if completion == 'raise':\n        raise ValueError('\\ud800')\n    return (1.0 if completion == 'value' else None), '\\ud800 said'"
    got = results(write(source), [row("value"), row("none"), row("raise")])
    assert got == [(1.0, "\\ud800 said"), (None, "abstained: \\ud800 said"), (None, "ValueError: \\ud800")]
    assert all(why.encode() for _, why in got)


@pytest.mark.parametrize("value", [-1.7976931348623157e308, 1e101, 10**200])
def test_a_value_that_no_mean_can_hold_is_a_failure_with_its_reason(value):
    found, why = read_value(value)
    assert found is None and "no mean can hold" in why
