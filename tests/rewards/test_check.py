"""What is wrong with a function is said before a model is asked: parameters, doctests, gold answers."""

from __future__ import annotations

from scoring import Write, results, row, write

from selfkd.rewards.check import check_gold, check_parameters, read_notes, run_doctests, score_batch

__all__ = ["write"]  # a fixture


def test_unknown_parameters_are_named_before_anything_runs(write: Write) -> None:
    f = write("def f(completion, anwser, level, lvl=1): return 1")
    (problem,) = check_parameters(f, ["level"])
    assert "'anwser'" in problem and "Did you mean 'answer'?" in problem and "mine.py:1" in problem
    assert check_parameters(f, None) == []
    assert check_parameters(write("def f(prompts, completions, completion_ids, **kwargs): return []"), []) == []
    (problem,) = check_parameters(write("def f(completions, solution, **kwargs): return []"), [])
    assert "'solution'" in problem and problem.endswith(
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


def test_gold_answers_are_scored_in_the_forms_in_which_they_are_stated(write: Write) -> None:
    gold = [dict(id=str(n), prompt="?", answer=str(n), meta={}) for n in range(4)]
    strict = write("def f(completion, answer): return completion == f'Answer: {answer}' and answer != '3'")
    passed, total, first = check_gold(strict, gold)
    assert (passed, total) == (3, 4) and first
    assert check_gold(write("def f(completion): return 0"), gold) == (0, 0, "")


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
