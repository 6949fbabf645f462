"""try: a reward on a few rows of a file."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from selfkd.cli import try_reward
from selfkd.cli.main import main
from selfkd.cli.try_reward import read_rows
from selfkd.errors import UsageError
from selfkd.prompts.read import read_prompts
from selfkd.rewards.contract import meta_of


def test_try_scores_rows_of_a_file_and_says_why(said):
    rows = [
        {"prompt": "2 + 2?", "completion": "so it is 4", "answer": "4"},
        {"prompt": "2 + 3?", "completion": "none", "answer": 5},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = said("try", "reward/number.py:last_number", "rows.jsonl")
    assert "so it is 4" in text and "last_number 1" in text and "last_number 0" in text
    assert "of 2 scored" in text


def test_try_gives_other_columns_by_their_names(said):
    Path("named.py").write_text("def near(completion, limit):\n    return float(len(completion) < limit), f'limit {limit}'\n")
    Path("columns.jsonl").write_text(json.dumps({"completion": "abc", "limit": 5}) + "\n")
    text = said("try", "named.py:near", "columns.jsonl")
    assert "near 1" in text and "limit 5" in text


def test_try_names_file_and_line_of_a_broken_row(said):
    Path("broken.jsonl").write_text('{"completion": "x"}\n{"completion": \n')
    assert "broken.jsonl:2  not JSON" in said("try", "reward/number.py:last_number", "broken.jsonl", code=2)
    Path("empty.jsonl").write_text("")
    assert "no rows" in said("try", "reward/number.py:last_number", "empty.jsonl", code=2)


# ------------------------------------------------------------------------------------------------- the rows, as a run reads them

SHAPES = {  # a row of a file -> answer and meta; the prompt is "a"
    "a byte order mark": (b'\xef\xbb\xbf{"prompt":"a","completion":"4","answer":"4"}', "4", {}),
    "a truth value": (b'{"prompt":"a","completion":"4","answer":true}', "true", {}),
    "a number": (b'{"prompt":"a","completion":"4","answer":4}', "4", {}),
    "an empty answer": (b'{"prompt":"a","completion":"4","answer":""}', None, {}),
    "messages": (b'{"prompt":[{"role":"user","content":"a"}],"completion":"4","answer":"4"}', "4", {}),
    "a completion as TRL writes it": (
        b'{"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"4"}],"answer":"4"}', "4", {},
    ),
    "columns": (b'{"prompt":"a","completion":"4","level":3,"meta":{"k":1}}', None, {"level": 3, "k": 1}),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_try_reads_a_row_as_a_run_reads_it(shape):
    content, answer, meta = SHAPES[shape]
    Path("rows.jsonl").write_bytes(content + b"\n")
    (one,) = read_rows(Path("rows.jsonl"))
    assert (one["prompt"], one["answer"], one["completion"], meta_of(one)) == ("a", answer, "4", meta)
    frame = read_prompts("rows.jsonl", [Path.cwd()], "train")
    assert frame["answer"].to_list() == [answer] and frame["messages"].to_list() == [one["messages"]]


@pytest.mark.parametrize("meta", ['"abc"', '"{\\"k\\":1}"', "[1]", "5", "null"])
def test_a_meta_that_is_no_object_is_what_a_run_makes_of_it(meta):
    Path("rows.jsonl").write_text(f'{{"prompt":"a","completion":"4","meta":{meta}}}\n')
    (found,) = read_prompts("rows.jsonl", [Path.cwd()], "train")["meta"].to_list()
    in_run = {name: value for name, value in json.loads(found).items() if name != "completion"}
    assert meta_of(read_rows(Path("rows.jsonl"))[0]) == in_run


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt":"a","completion":"x"}\n{"prompt":"a","completion":"caf\xe9"}\n', "bad.jsonl:2  not UTF-8"),
        (b'{"prompt":"a","completion":"4","answer":["4","four"]}\n', "bad.jsonl:1  the answer must be text or a number"),
        (b'{"prompt":"a","completion":5}\n', "bad.jsonl:1  the completion must be text"),
        (b'{"prompt":"a","completion":[{"role":"user","content":"x"}]}\n', "bad.jsonl:1  the completion must be text"),
        (b'{"prompt":"a","completion":"4","meta":' + b"[" * 20_000 + b"]" * 20_000 + b"}\n", "bad.jsonl:1  "),
        (b'{"prompt":"a"}\n', "bad.jsonl:1  a row needs a column 'completion'"),
    ],
)
def test_what_a_run_would_refuse_is_refused_with_its_line(content, said):
    Path("bad.jsonl").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_rows(Path("bad.jsonl"))
    assert str(caught.value).startswith(said)


def test_rows_that_nobody_has_answered_yet_are_tried_with_their_gold_answers(said):
    Path("mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    Path("rows.jsonl").write_text('{"question": "a", "answer": "4"}\n{"question": "b", "answer": "5", "completion": "6"}\n')
    text = said("try", "mine.py:right", "rows.jsonl")
    assert "2 of 2 scored, mean 0.5" in text
    assert "1 row without a completion: the gold answer is tried" in text


def test_other_kinds_of_files_are_read_too_and_rows_keep_their_order():
    Path("rows.csv").write_text("prompt,completion,answer\nz,4,4\nb,5,5\nz,6,4\n")
    rows = read_rows(Path("rows.csv"))
    assert [(row["prompt"], row["completion"]) for row in rows] == [("z", "4"), ("z", "6"), ("b", "5")]
    assert len(read_rows(Path("rows.csv"), 2)) == 2
    with pytest.raises(UsageError, match="1 or more"):
        read_rows(Path("rows.csv"), 0)
    Path("rows.json").write_text('[{"conversations": [{"from": "human", "value": "a"}], "completion": "4", "answer": "4"}]')
    assert [(row["prompt"], row["completion"]) for row in read_rows(Path("rows.json"))] == [("a", "4")]
    Path("rows.txt").write_text("a")
    with pytest.raises(UsageError, match=r"'\.txt'"):
        read_rows(Path("rows.txt"))


# ------------------------------------------------------------------------------------------------------ what a reward may do

ONE = '{"prompt": "a", "completion": "4", "answer": "4"}\n'


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os; os._exit(0)", "the worker died (exit code 0)"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
        ("return len(bytearray(8 << 30))", "MemoryError"),
        ("raise ValueError('no')", "ValueError: no"),
        ("return float('nan')", "returned nan"),
    ],
)
def test_a_reward_that_exits_hangs_or_fails_ends_try_with_its_reason(said, monkeypatch, body, reason):
    monkeypatch.setattr(try_reward, "TIMEOUT", 1.0)
    Path("odd.py").write_text(f"def odd(completion):\n    {body}\n")
    Path("one.jsonl").write_text(ONE)
    for more in ((), ("--out", "scores.jsonl")):
        text = said("try", "odd.py:odd", "one.jsonl", *more, code=1)
        assert re.search(rf"1 of 1 rows could not be scored\. First: odd( \(odd\.py:[12]\))?: {re.escape(reason)}", text)
        assert "0 of 1 scored" in text


RAISES = """from helper import last

def right(completion, answer):
    return last(completion)
"""
HELPER = "import json\n\ndef last(text):\n    return json.loads(text + '}')\n"


def raising(folder: Path) -> None:
    (folder / "r_raise.py").write_text(RAISES)
    (folder / "helper.py").write_text(HELPER)
    (folder / "one.jsonl").write_text(ONE)


def test_a_reward_that_raises_is_named_with_the_innermost_line_of_the_users_files(said, home):
    raising(home)
    text = said("try", "r_raise.py:right", "one.jsonl", code=1)
    assert "First: right (helper.py:4): JSONDecodeError: Extra data" in text and "helper.py:4: JSONDecodeError" in text
    assert "in your files only" not in text
    assert said("try", "r_raise.py:right", "one.jsonl", "--out", "scores.jsonl", code=1).count("helper.py:4") == 1
    assert json.loads(Path("scores.jsonl").read_text())["why"].startswith("JSONDecodeError: Extra data")


def test_with_selfkd_debug_try_prints_the_frames_of_the_users_files_only(home, monkeypatch, capsys):
    raising(home)
    monkeypatch.setenv("SELFKD_DEBUG", "1")
    assert main(["try", "r_raise.py:right", "one.jsonl"]) == 1
    trace = capsys.readouterr().err.partition("in your files only:\n")[2].splitlines()
    assert trace[:4] == [
        "  r_raise.py:4, in right",
        "    return last(completion)",
        "  helper.py:4, in last",
        "    return json.loads(text + '}')",
    ]
    assert trace[4].startswith("JSONDecodeError: ") and not any("json/" in row or "selfkd" in row for row in trace)


def test_a_value_that_is_no_number_is_told_with_the_line_of_the_function(said):
    Path("r_text.py").write_text("\n\ndef right(completion):\n    return 'yes'\n")
    Path("one.jsonl").write_text(ONE)
    text = said("try", "r_text.py:right", "one.jsonl", code=1)
    assert "First: right (r_text.py:3): returned str 'yes', expected a number" in text


def test_abstaining_is_no_failure(said):
    Path("shy.py").write_text("def shy(completion): return None\n")
    Path("one.jsonl").write_text(ONE)
    assert "shy unscored   abstained" in said("try", "shy.py:shy", "one.jsonl")


def test_what_a_reward_prints_is_seen_but_not_when_all_rows_are_scored_into_a_file(capfd):
    Path("loud.py").write_text("def loud(completion):\n    print('heard', completion)\n    return 1.0\n")
    Path("one.jsonl").write_text(ONE)
    assert main(["try", "loud.py:loud", "one.jsonl"]) == 0
    assert capfd.readouterr().err == "heard 4\n"
    assert main(["try", "loud.py:loud", "one.jsonl", "--out", "scores.jsonl"]) == 0
    assert capfd.readouterr().err == ""


def test_scores_are_not_computed_for_a_place_where_they_cannot_be_written(said):
    Path("never.py").write_text("def never(completion): raise AssertionError('called')\n")
    Path("one.jsonl").write_text(ONE)
    assert "there is no folder nowhere" in said("try", "never.py:never", "one.jsonl", "--out", "nowhere/x.jsonl", code=2)


def test_a_helper_that_is_not_python_is_named(said):
    Path("mine.py").write_text("import helpers\ndef f(completion): return 1\n")
    Path("helpers.py").write_text("def (:\n")
    Path("one.jsonl").write_text(ONE)
    assert "helpers.py:1  not Python" in said("try", "mine.py:f", "one.jsonl", code=2)


def test_with_debugging_on_the_reward_runs_in_this_process(said, monkeypatch):
    monkeypatch.setenv("SELFKD_DEBUG", "1")
    Path("where.py").write_text(f"import os\ndef where(completion): return os.getpid() == {os.getpid()}\n")
    Path("one.jsonl").write_text(ONE)
    assert "where 1" in said("try", "where.py:where", "one.jsonl")


def test_a_judge_gets_the_key_that_the_machine_file_names_with_out_and_without(said, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "x")
    Path("judge.py").write_text("import os\ndef judged(completion): return os.environ['JUDGE_API_KEY'] == 'x'\n")
    Path("one.jsonl").write_text(ONE)
    Path("machine.yaml").write_text("environment: [JUDGE_API_KEY]\n")
    for more in ((), ("--out", "scores.jsonl")):
        assert "1 of 1 scored, mean 1" in said("try", "judge.py:judged", "one.jsonl", "--on", "machine.yaml", *more)
        assert "environment: [JUDGE_API_KEY]" in said("try", "judge.py:judged", "one.jsonl", *more, code=1)


def test_lint_gives_a_judge_the_same_key_as_a_run(said, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "x")
    Path("judge.py").write_text("import os\nKEY = os.environ['JUDGE_API_KEY']\ndef judged(completion): return 1.0\n")
    Path("machine.yaml").write_text("environment: [JUDGE_API_KEY]\n")
    Path("judge.yaml").write_text(
        "name: judged\nmodel: fake\nprompts: {train: [{prompt: a, answer: b}, {prompt: c, answer: d}]}\n"
        "steps:\n  - sample\n  - score: judge.py:judged\n  - train: sft\n"
    )
    said("lint", "judge.yaml", "--on", "machine.yaml")
    assert "two rounds were walked" in said("lint", "judge.yaml", "--dry-run", "--on", "machine.yaml", "rounds=1")
    assert main(["lint", "judge.yaml"]) == 2
