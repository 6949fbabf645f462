"""What is wrong with a function is said before a model is asked: parameters, doctests, gold answers."""

from __future__ import annotations

import re
from typing import Any

from scoring import Write, results, row, write

from selfkd.rewards.check import GoldCheck, check_gold, check_parameters, read_notes, run_doctests, score_batch

__all__ = ["write"]  # a fixture


def test_unknown_parameters_are_named_before_anything_runs(write: Write) -> None:
    f = write("def f(completion, anwser, level, lvl=1): return 1")
    (problem,) = check_parameters(f, ["level"])
    assert "'anwser'" in problem and "Did you mean 'answer'?" in problem and "mine.py:1" in problem
    assert check_parameters(f, None) == []
    assert check_parameters(write("def f(prompts, completions, completion_ids, **kwargs): return []"), []) == []
    (problem,) = check_parameters(write("def f(completions, target, **kwargs): return []"), [])
    assert "'target'" in problem and problem.endswith(
        "The gold answer is called 'answer'; under another name it needs a column of its own."
    )
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


def test_examples_that_are_no_python_session_are_reported_with_their_docstring(write: Write) -> None:
    (failure,) = run_doctests(write('def f(completion):\n    """\n    >>> f("a\\nb")\n    1.0\n    """\n    return 1.0'))
    assert "the examples of a docstring cannot be read" in failure and "mine.f" in failure


def gold_rows(*answers: str) -> list[dict[str, Any]]:
    return [dict(id=str(place), prompt="?", answer=answer, meta={}) for place, answer in enumerate(answers)]


def test_gold_answers_are_scored_in_the_forms_in_which_they_are_stated(write: Write) -> None:
    gold = gold_rows("0", "1", "2", "3")
    strict = write("def f(completion, answer): return completion == f'Answer: {answer}' and answer != '3'")
    found = check_gold(strict, gold)
    assert (found.passed, found.total, found.forms) == (3, 4, ("Answer: {}",)) and "answer '3'" in found.failure
    assert check_gold(write("def f(completion): return 0"), gold) == GoldCheck()


def test_a_reward_that_takes_only_the_bare_gold_answer_is_told_apart(write: Write) -> None:
    found = check_gold(write("def f(completion, answer): return completion == answer"), gold_rows("1", "22", "333"))
    assert (found.passed, found.forms, found.accepted) == (3, ("{}",), 0)


def test_a_gold_answer_that_fails_in_a_form_which_the_others_pass_is_named(write: Write) -> None:
    source = "def f(completion, answer): return answer in completion and (answer != '7' or 'boxed' not in completion)"
    found = check_gold(write(source), gold_rows("1", "7", "9"))
    assert found.passed == 3 and found.uneven == r"'so \\boxed{7}.' where the answer is '7'"


def test_a_form_in_which_the_reward_raised_says_so_with_its_line(write: Write) -> None:
    source = "def f(completion, answer):\n    assert answer != '7' or 'boxed' not in completion, 'a box'\n    return answer in completion"
    found = check_gold(write(source), gold_rows("1", "7", "9"))
    assert re.search(r"the answer is '7', on which it failed: f \(\w+\.py:2\): AssertionError: a box$", found.uneven)


def test_a_near_miss_that_a_reward_accepts_is_named_with_the_answer(write: Write) -> None:
    found = check_gold(write("def f(completion, answer): return answer.lstrip('-') in completion"), gold_rows("-5"))
    assert (found.accepted, found.example) == (2, "'Answer: 5' where the answer is '-5'")  # and -50
    assert check_gold(write("def f(completion, answer): return 1"), gold_rows("5", "7")).accepted == 10


def test_a_formula_read_by_one_of_its_numbers_is_found_though_it_agrees_with_itself(write: Write) -> None:
    source = "import re\n\ndef f(completion, answer): return re.findall('[0-9]+', completion)[:1] == re.findall('[0-9]+', answer)[:1]"
    found = check_gold(write(source), gold_rows("3\\sqrt{13}"))
    assert (found.passed, found.example) == (1, "'Answer: 3' where the answer is '3\\\\sqrt{13}'")


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
