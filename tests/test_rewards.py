"""Rewards are found, checked and called by name; what they return is read, and what is not a number is a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from scoring import Write, results, row, write

from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function
from selfkd.errors import UsageError
from selfkd.rewards.check import check_gold, check_parameters, read_notes, run_doctests, score_batch
from selfkd.rewards.contract import WHY_CHARS, failed
from selfkd.rewards.find import definition, find_function, names_in, parse

__all__ = ["write"]  # a fixture


# ------------------------------------------------------------------------------------------------------------- the call


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


# ------------------------------------------------------------------------------------------------- finding and checking


def test_a_file_next_to_the_recipe_comes_before_a_built_in_one(tmp_path: Path) -> None:
    assert find_function("reward/exact.py:match", [tmp_path]).path == builtin_folder() / "reward/exact.py"
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward/exact.py").write_text("def match(completion): return 1")
    assert find_function("reward/exact.py:match", [tmp_path]).path == tmp_path / "reward/exact.py"


def test_what_cannot_be_found_names_the_nearest_and_the_places(write: Write, tmp_path: Path) -> None:
    write("def correct(completion): return 1\ndef wrong(completion): return 0", "correct")
    with pytest.raises(UsageError, match=r"no function 'corect'.*Did you mean 'correct'") as caught:
        find_function("mine.py:corect", [tmp_path])
    assert "correct, wrong" in str(caught.value)
    with pytest.raises(UsageError, match=r"no file 'mime.py'. Did you mean 'mine.py'") as caught:
        find_function("mime.py:f", [tmp_path])
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(UsageError, match=r"file\.py:function"):
        find_function("mine.py", [tmp_path])
    (tmp_path / "torn.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(UsageError, match=r"torn.py:2"):
        find_function("torn.py:f", [tmp_path])


def test_the_digest_is_that_of_the_code_and_its_helpers(tmp_path: Path, write: Write) -> None:
    (tmp_path / "helper.py").write_text("VALUE = 1")
    first = write("import helper\ndef f(completion): return helper.VALUE")
    assert write("import helper\n# a comment\ndef f(completion): return helper.VALUE").digest == first.digest
    (tmp_path / "helper.py").write_text("VALUE = 2")
    assert find_function("mine.py:f", [tmp_path]).digest != first.digest


def test_unknown_parameters_are_named_before_anything_runs(write: Write) -> None:
    f = write("def f(completion, anwser, level, lvl=1): return 1")
    (problem,) = check_parameters(f, ["level"])
    assert "'anwser'" in problem and "Did you mean 'answer'?" in problem and "mine.py:1" in problem
    assert check_parameters(f, None) == []
    assert check_parameters(write("def f(prompts, completions, completion_ids, **kwargs): return []"), []) == []
    (problem,) = check_parameters(write("def f(completion, maximum=1): return 1", maximun=2), [])
    assert "no parameter 'maximun'. Did you mean 'maximum'?" in problem
    (problem,) = check_parameters(write("def f(completion, completions): return []"), [])
    assert "take 'completions'" in problem
    (problem,) = check_parameters(write("def f(completion, /): return 1"), [])
    assert "by position" in problem


def test_failing_doctests_are_reported(write: Write) -> None:
    f = write('def f(completion):\n    """One.\n\n    >>> f("a")\n    2.0\n    """\n    return 1.0')
    (failure,) = run_doctests(f)
    assert failure.endswith('f("a") gives 1.0, expected 2.0') and "mine.py:4" in failure
    assert run_doctests(write('def f(completion):\n    """\n    >>> f("")\n    1.0\n    """\n    return 1.0')) == []


def test_gold_answers_are_scored_in_the_forms_in_which_they_are_stated(write: Write) -> None:
    gold = [dict(id=str(n), prompt="?", answer=str(n), meta={}) for n in range(4)]
    strict = write("def f(completion, answer): return completion == f'Answer: {answer}' and answer != '3'")
    passed, total, first = check_gold(strict, gold)
    assert (passed, total) == (3, 4) and first
    assert check_gold(write("def f(completion): return 0"), gold) == (0, 0, "")


BUILT_IN = sorted(builtin_folder().glob("reward/*.py"))


@pytest.mark.parametrize("path", BUILT_IN, ids=lambda path: path.name)
def test_the_doctests_of_a_shipped_reward_pass(path: Path) -> None:
    names = [name for name in names_in(parse(path)) if definition(Function(name, path, ""))]
    assert names and run_doctests(find_function(f"{path}:{names[0]}", []), 120.0) == []
    assert all(check_parameters(find_function(f"{path}:{name}", []), None) == [] for name in names)


def test_the_same_batch_scored_here_gives_the_same(write: Write) -> None:
    f = write("def f(completion, answer): return completion == answer, 'compared'")
    rows = [row(), row("1")]
    assert score_batch(f, rows) == results(f, rows) == [(1.0, "compared"), (0.0, "compared")]


def test_notes_of_a_file_are_recorded_and_never_cost_a_score(write: Write) -> None:
    def said(text: str) -> object:
        return read_notes(write(f"def f(completion): return 1\n{text}"))

    assert said("def notes(): return {'walls': (1, 2)}") == {"walls": [1, 2]}
    assert said("def notes(): raise KeyError('gone')") == {"failed": "KeyError: 'gone'"}
    assert said("def notes(): return {1, 2}") == {"failed": "TypeError: Object of type set is not JSON serializable"}
    assert [said(text) for text in ("", "notes = ['mine']", "def notes(sample): return sample")] == [None, None, None]
