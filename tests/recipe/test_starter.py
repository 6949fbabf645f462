"""A first recipe for a file of questions: what is chosen for which rows, that it lints as written, and that nothing leaks between splits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfkd.chain.dry_run import try_walk
from selfkd.cli.main import main
from selfkd.errors import UsageError
from selfkd.prompts import templates
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load
from selfkd.recipe.starter import EXAMPLES, look
from selfkd.recipe.starter_files import template_text

SUMS = [{"question": f"What is {a} and {b}?", "answer": str(a + b)} for a in range(10) for b in range(6)]
SOLUTIONS = [{"question": f"{a} apples and {b}?", "answer": f"{a} + {b}\n#### {a + b}"} for a in range(10) for b in range(6)]
OPTIONS = [{"question": f"Is {a} even?", "label": "no" if a % 2 else "yes"} for a in range(60)]
SHORT = [{"Question": f'Who rules "{a}"?', "Answer": f"King \\{a} the 'Éblouissant' 😀"} for a in range(60)]
TEXTS = [{"prompt": f"Tell of {a}", "completion": " ".join(f"w{a * 7 + b}" for b in range(60))} for a in range(40)]
CHATS = [{"conversations": [{"from": "human", "value": f"Say {a}!"}, {"from": "gpt", "value": f"{a}"}]} for a in range(40)]
TURNS = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": f"{a}?"}], "answer": f"{a}"}
    for a in range(40)
]
TESTED = [{"prompt": f"Write f, which adds {a}", "tests": [{"call": "f", "args": [1], "returns": 1 + a}]} for a in range(40)]
KINDS = [
    *((SUMS, "number"), (SOLUTIONS, "number"), (OPTIONS, "choice"), (SHORT, "short"), (TEXTS, "text")),
    *((CHATS, "number"), (TURNS, "number"), (TESTED, "code")),
]


USER = {"role": "user", "content": "Now?"}


def written(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "kind"), KINDS, ids=["sums", "solutions", "options", "short", "texts", "chats", "turns", "tested"]
)
def test_what_is_made_of_a_file_lints_and_walks_as_written(tmp_path: Path, rows: list[Any], kind: str, capsys) -> None:
    data = written(tmp_path, rows)
    assert main(["init", str(data), str(tmp_path / "mine"), "--model", "fake"]) == 0
    said = capsys.readouterr().out
    assert f"  {kind}: " in said
    recipe = load(str(tmp_path / "mine" / "mine.yaml"))
    report = lint(recipe)
    assert report.ok, report.text()
    walked = try_walk(recipe, ())
    assert not walked.problems, walked.problems


def test_the_untouched_model_is_measured_with_room_to_talk_where_the_taught_one_answers_in_a_word(tmp_path: Path) -> None:
    assert main(["init", str(written(tmp_path, SUMS)), str(tmp_path / "mine"), "--model", "fake"]) == 0
    recipe = load(str(tmp_path / "mine" / "mine.yaml"))
    sample, measure = recipe.steps[0].at(1), recipe.steps[-1].at(1)
    assert (sample.max_tokens, measure.max_tokens) == (32, 256)  # type: ignore[attr-defined]


def test_equal_questions_stand_in_one_split_once_and_examples_in_none(tmp_path: Path) -> None:
    found = look(written(tmp_path, [*SUMS, *SUMS[:9]]))
    questions = [row.question for row in found.rows]
    assert len(questions) == len(set(questions)) == len(SUMS)
    assert {name: len(rows) for name, rows in found.splits.items()} == {"train": 44, "dev": 12}
    assert len(found.examples) == EXAMPLES
    assert "left out: 9 rows whose question is there already" in found.said


def test_a_row_that_is_added_moves_no_other_row_to_another_split(tmp_path: Path) -> None:
    before = {row.question for row in look(written(tmp_path, SUMS)).splits["dev"]}
    more = [{"question": f"And {a} with a hundred?", "answer": str(100 + a)} for a in range(5)]
    after = {row.question for row in look(written(tmp_path, [*SUMS, *more])).splits["dev"]}
    assert len(before - after) <= 2  # by their hash; the share of held-out rows grows with the rows


def test_options_are_shown_in_turn_so_that_no_answer_is_suggested(tmp_path: Path) -> None:
    found = look(written(tmp_path, OPTIONS))
    assert found.options == ("no", "yes")
    assert sorted(row.answer for row in found.examples if row.answer) == ["no", "no", "yes", "yes"]


def test_conversations_are_not_shown_as_examples(tmp_path: Path) -> None:
    assert look(written(tmp_path, TURNS)).examples == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(min_size=1, max_size=60), st.text(max_size=60))
def test_whatever_an_example_says_the_teacher_sees_it_as_it_is(tmp_path: Path, question: str, answer: str) -> None:
    question, answer = question.replace("\r", " "), answer.replace("\r", " ")
    row = look(written(tmp_path, SUMS)).examples[0]
    shown = type(row)([{"role": "user", "content": question}], answer, {})
    file = tmp_path / "examples.j2"
    file.write_text(template_text([shown]), "utf-8")
    said = templates.load(str(file), []).render(prompt=templates.visible_prompt([USER], None, {}), of=None)
    asked = templates.with_last_message([USER], said)
    assert [turn["role"] for turn in asked] == ["user", "assistant", "user"]
    assert asked[0]["content"].strip() == question.strip() and asked[1]["content"].strip() == answer.strip()


def test_a_column_that_is_called_as_gold_is_and_is_not_gold_stays_beside_it(tmp_path: Path, capsys) -> None:
    rows = [{"q": f"{a}+1?", "solution": f"{a + 1}", "answer": "hm", "answer_column": "x", "prompt": "y"} for a in range(40)]
    words = ("--prompt", "q", "--answer", "solution", "--model", "fake")
    assert main(["init", str(written(tmp_path, rows)), str(tmp_path / "mine"), *words]) == 0
    first = json.loads((tmp_path / "mine" / "train.jsonl").read_text().splitlines()[0])
    assert first["answer"] == str(int(first["prompt"].partition("+")[0]) + 1)
    rest = {name: value for name, value in first.items() if name not in ("prompt", "answer")}
    assert rest == {"answer_column_column": "hm", "answer_column": "x", "prompt_column": "y"}
    recipe = load(str(tmp_path / "mine" / "mine.yaml"))
    assert lint(recipe).ok


@pytest.mark.parametrize(("name", "model"), [("null", "fake"), ("1e5", "fake"), ("yes", "a model #1: mine")])
def test_names_that_yaml_reads_otherwise_are_quoted(tmp_path: Path, name: str, model: str, capsys) -> None:
    assert main(["init", str(written(tmp_path, SUMS)), str(tmp_path / name), "--model", model]) == 0
    recipe = load(str(tmp_path / name / f"{name}.yaml"))
    assert (recipe.name, recipe.model) == (name, model)


def test_options_that_no_docstring_holds_are_marked_as_short_answers(tmp_path: Path, capsys) -> None:
    rows = [{"question": f"Pick {a}", "answer": ('yes"""', "no")[a % 2]} for a in range(60)]
    assert main(["init", str(written(tmp_path, rows)), str(tmp_path / "mine"), "--model", "fake"]) == 0
    assert "  short: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"prompt": f"Hi {a}"} for a in range(40)], "no row has an answer"),
        (SUMS[:9], "9 rows with a question of its own"),
        ([{"frage": f"Hi {a}", "antwort": "3"} for a in range(40)], "which column is the question"),
    ],
)
def test_rows_of_which_nothing_can_be_made_are_refused_with_what_to_do(tmp_path: Path, rows: list[Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        look(written(tmp_path, rows))


def test_columns_and_kinds_can_be_said(tmp_path: Path) -> None:
    rows = [{"frage": f"Hi {a}", "antwort": f"{a}"} for a in range(40)]
    assert look(written(tmp_path, rows), "frage", "antwort").kind == "number"
    assert look(written(tmp_path, rows), "frage", "antwort", "short").kind == "short"
    with pytest.raises(UsageError, match="no row has a column 'tests'"):
        look(written(tmp_path, rows), "frage", "antwort", "code")


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path, capsys) -> None:
    data = written(tmp_path, SUMS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["init", str(data), str(tmp_path / "mine")]) == 2
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_reward_that_likes_answers_of_other_questions_is_pointed_at(tmp_path: Path, capsys) -> None:
    rows = [{"prompt": f"Tell of {a}", "completion": f"{'the same words again and again ' * 4}{a}th"} for a in range(40)]
    assert main(["init", str(written(tmp_path, rows)), str(tmp_path / "mine"), "--kind", "text", "--model", "fake"]) == 0
    assert "it should like the first, and not the second" in capsys.readouterr().out
