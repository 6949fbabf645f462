"""Runs side by side: the same figures as by hand, and no comparison of things that are not alike."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, go, write_prompts

from selfkd.backend.base import Trained
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.cli.main import main
from selfkd.core import stats
from selfkd.errors import UsageError
from selfkd.recipe.load import load
from selfkd.report import comparison
from selfkd.report.compare import Within, compare

MEASURE = "measure: reward/number.py:last_number"
TWO_ANSWERS = RECIPE.replace(MEASURE, "measure: {reward: reward/number.py:last_number, n: 2, temperature: 1}")
OTHER_REWARD = RECIPE.replace(MEASURE, "measure: {reward: mine.py:right, as: last_number}")
ROLLED_BACK = RECIPE + "\nkeep_if: dev_last_number > 2\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short` ends after one round of few answers, `long` after three of many."""
    folder = tmp_path_factory.mktemp("compared")
    write_prompts(folder, dev=40)
    for name, words in {"short": ["rounds=1", "sample.n=1"], "long": ["rounds=3", "sample.n=4"]}.items():
        made(folder, name, RECIPE, *words)
    return folder / "runs"


def made(folder: Path, name: str, text: str, *words: str) -> Run:
    (folder / f"{name}.yaml").write_text(text.replace("name: sums", f"name: {name}"))
    return go(load(str(folder / f"{name}.yaml"), words), folder / "runs" / name)


def tokens(run: Run, last: int) -> int:
    """Return what the rounds up to this one generated: the fake trains on no token."""
    return sum(seal.notes["tokens"] for seal in run.sealed()[: last + 1])


def dev(run: Run, index: int) -> dict[str, float]:
    frame = run.samples(index, step="measure")
    return {prompt: float(value) for prompt, value in frame.select("prompt", "last_number").iter_rows()}


def test_a_run_is_compared_with_the_first_prompt_by_prompt(runs: Path) -> None:
    short, long = Run.at(runs / "short"), Run.at(runs / "long")
    found = compare([runs / "short", runs / "long"])
    expected = stats.change(dev(short, 1), dev(long, 3))
    assert found.metric == "dev/last_number" and [arm.round for arm in found.arms] == [1, 3]
    assert found.arms[0].against is None and found.arms[0].verdict == ""
    assert found.arms[1].against == expected and expected is not None and expected.prompts == 40
    assert [arm.measured.value for arm in found.arms] == [run.sealed()[-1].metrics["dev/last_number"] for run in (short, long)]


def test_at_equal_tokens_each_run_has_what_it_had_when_it_had_spent_as_many(runs: Path) -> None:
    short, long = Run.at(runs / "short"), Run.at(runs / "long")
    found = compare([runs / "short", runs / "long"])
    assert found.budget == tokens(short, 1)
    assert tokens(long, 0) <= found.budget < tokens(long, 1)  # so that of the long run only its base is left
    assert found.arms[1].within == Within(0, long.sealed()[0].metrics["dev/last_number"], tokens(long, 0))
    assert found.arms[0].within.round == 1


@pytest.mark.parametrize(("low", "high", "said"), [(-0.1, 0.2, comparison.SAME), (0.01, 0.2, "higher"), (-0.3, -0.1, "lower")])
def test_words_say_no_more_than_the_interval(
    runs: Path, monkeypatch: pytest.MonkeyPatch, low: float, high: float, said: str
) -> None:
    middle = stats.Change((low + high) / 2, stats.Interval(low, high), 40)
    monkeypatch.setattr("selfkd.report.compare.change", lambda *_: middle)
    assert compare([runs / "short", runs / "long"]).arms[1].verdict == said


def test_a_run_beside_itself_is_not_distinguishable_and_that_is_said(runs: Path) -> None:
    found = compare([runs / "long", runs / "long"])
    assert found.arms[1].verdict == comparison.SAME
    assert found.notes == ["long ends in the round that long ends in"]


def test_another_round_or_the_best_one_may_be_compared(runs: Path) -> None:
    long = Run.at(runs / "long")
    assert [arm.round for arm in compare([runs / "short", runs / "long"], which="1").arms] == [1, 1]
    best = compare([runs / "short", runs / "long"], which="best")
    values = [seal.metrics["dev/last_number"] for seal in long.sealed()]
    assert best.arms[1].round == values.index(max(values)) and best.notes[0].startswith("best: the round was chosen by")


def test_a_round_that_was_rolled_back_is_not_what_a_run_ends_in(tmp_path: Path, runs: Path) -> None:
    write_prompts(tmp_path, dev=40)
    made(tmp_path, "back", ROLLED_BACK)
    found = compare([runs / "short", tmp_path / "runs/back"])
    assert found.arms[1].round == 0
    assert found.arms[1].against == stats.change(dev(Run.at(runs / "short"), 1), dev(Run.at(tmp_path / "runs/back"), 0))


@pytest.mark.parametrize("text", [TWO_ANSWERS, OTHER_REWARD])
def test_one_name_with_two_meanings_is_not_compared(tmp_path: Path, runs: Path, text: str) -> None:
    write_prompts(tmp_path, dev=40)
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    made(tmp_path, "other", text)
    with pytest.raises(UsageError, match="measured dev/last_number differently from short"):
        compare([runs / "short", tmp_path / "runs/other"])


def test_runs_with_other_questions_are_compared_on_those_that_they_share(tmp_path: Path, runs: Path) -> None:
    write_prompts(tmp_path, dev=30)
    made(tmp_path, "fewer", RECIPE)
    (arm,) = compare([runs / "short", tmp_path / "runs/fewer"]).arms[1:]
    assert arm.against is not None and arm.against.prompts == 30
    (tmp_path / "none").mkdir()
    write_prompts(tmp_path / "none")
    rows = [{"question": f"What is {800 + i} + 1?", "answer": str(801 + i)} for i in range(9)]
    (tmp_path / "none/dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made(tmp_path / "none", "apart", RECIPE)
    (arm,) = compare([runs / "short", tmp_path / "none/runs/apart"]).arms[1:]
    assert arm.against is None and arm.verdict == "not compared: no prompt in common"


def test_what_cannot_be_compared_is_named(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(UsageError, match="two runs or more"):
        compare([runs / "short"])
    with pytest.raises(UsageError, match=r"did not measure dev/last\. Did you mean 'dev/last_number'\?"):
        compare([runs / "short", runs / "long"], "dev/last")
    with pytest.raises(UsageError, match="no round 3"):
        compare([runs / "short", runs / "long"], which="3")
    with pytest.raises(UsageError, match="no run here"):
        compare([runs / "short", tmp_path])


def test_three_runs_are_two_comparisons(runs: Path) -> None:
    assert (
        compare([runs / "short", runs / "long", runs / "long"])
        .notes[0]
        .startswith("2 comparisons with the first run, each at 95 %")
    )


def test_the_command_writes_a_table_csv_latex_and_json(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, names = compare([runs / "short", runs / "long"]), [str(runs / "short"), str(runs / "long")]

    def said(*words: str) -> str:
        assert main(["compare", *names, *words]) == 0
        return capsys.readouterr().out

    rows = list(csv.DictReader(said("--csv").splitlines()))
    assert [row["run"] for row in rows] == ["short", "long"]
    assert [float(row["value"]) for row in rows] == [arm.measured.value for arm in found.arms]
    assert rows[0]["vs_first"] == "" and float(rows[1]["vs_first"]) == found.arms[1].against.value  # type: ignore[union-attr]
    assert json.loads(said("--json"))["data"] == json.loads(json.dumps(found.to_json()))
    latex = said("--latex")
    assert r"dev/last\_number" in latex and r"\bottomrule" in latex and "% at equal tokens:" in latex
    monkeypatch.setenv("COLUMNS", "200")
    wide = said()
    monkeypatch.setenv("COLUMNS", "90")
    assert "vs. base" in wide and "vs. base" not in said() and found.arms[1].verdict in wide


def test_at_equal_tokens_only_the_measurement_that_is_compared_counts(tmp_path: Path) -> None:
    """A reward that says yes to all, mended after round 1: its figures are no match for those of the other run."""
    write_prompts(tmp_path, dev=40)
    (tmp_path / "mine.py").write_text("def right(completion):\n    return 1.0\n")
    amended = made(tmp_path, "amended", OTHER_REWARD, "rounds=1")
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    go(load(str(tmp_path / "amended.yaml"), ["rounds=3"]), amended.folder, amend=True)
    made(tmp_path, "plain", OTHER_REWARD, "rounds=1", "sample.n=1")
    found = compare([tmp_path / "runs/plain", tmp_path / "runs/amended"])
    assert found.arms[1].round == 3 and found.arms[1].within is None
    best = compare([tmp_path / "runs/plain", tmp_path / "runs/amended"], which="best")
    assert best.arms[1].round in (2, 3)


def test_prompts_that_a_reward_sees_otherwise_are_not_paired(tmp_path: Path) -> None:
    """The same questions, but with other tests beside some of them."""
    (tmp_path / "mine.py").write_text("def right(completion, meta):\n    return float(str(meta['truth']) in completion)\n")
    for name, moved in (("one", 0), ("two", 15)):
        write_prompts(tmp_path, dev=40)
        rows = [{"question": f"What is {60 + i} + {i}?", "truth": 60 + 2 * i + (i < moved)} for i in range(40)]
        (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = OTHER_REWARD.replace("dev.jsonl, prompt: question, answer: answer", "dev.jsonl, prompt: question")
        made(tmp_path, name, text)
    (arm,) = compare([tmp_path / "runs/one", tmp_path / "runs/two"]).arms[1:]
    assert arm.against is not None and arm.against.prompts == 25


def test_what_a_reader_must_know_of_a_side_is_a_note(tmp_path: Path, runs: Path) -> None:
    write_prompts(tmp_path, dev=40)
    back = made(tmp_path, "back", ROLLED_BACK)
    assert any(
        note.startswith("back: round 1 was rolled back: ") for note in compare([runs / "short", back.folder], which="1").notes
    )
    commit = next(iter(back.paths.round(1).commits()))
    content = json.loads(commit.read_text())
    content["notes"]["seconds"] = 7
    commit.write_text(json.dumps(content))
    said = f"back: round-001/{commit.name} was changed after it was written; see selfkd verify"
    assert said in compare([runs / "short", back.folder]).notes


def test_the_best_round_is_the_least_one_where_the_recipe_says_so(tmp_path: Path, runs: Path) -> None:
    write_prompts(tmp_path, dev=40)
    run = made(tmp_path, "least", RECIPE + "\nbest: {metric: dev/last_number, mode: min}\n")
    values = [seal.metrics["dev/last_number"] for seal in run.sealed()]
    found = compare([runs / "short", run.folder], "dev/last_number", "best")
    assert found.arms[1].round == values.index(min(values)) != values.index(max(values))


def test_a_name_of_two_lines_is_written_on_one(tmp_path: Path, runs: Path) -> None:
    odd = tmp_path / "two\nlines"
    shutil.copytree(runs / "long", odd)
    latex = comparison.as_latex(compare([runs / "short", odd]))
    assert [line for line in latex.splitlines() if line.startswith("lines")] == []


class Learning(Fake):
    """A hundred tokens a step."""

    def train(self, *arguments: Any, **more: Any) -> Trained:
        trained = super().train(*arguments, **more)
        return replace(trained, metrics={**trained.metrics, "tokens": 100 * trained.metrics["steps"]})


def test_an_update_that_was_measured_on_its_way_costs_all_its_steps_and_answers(tmp_path: Path, runs: Path) -> None:
    """What was learned behind the step that won was learned, and each check was answered."""
    write_prompts(tmp_path, dev=40)
    text = RECIPE.replace("{loss: sft}", "{loss: sft, check: {every: 4, metric: dev/last_number, mode: min}}")
    (tmp_path / "checked.yaml").write_text(text.replace("name: sums", "name: checked"))
    run = Run.open(load(str(tmp_path / "checked.yaml"), ["rounds=1"]), tmp_path / "runs/checked", Machine(backend="fake"))
    walk(run, Learning(run.numerics), run.begin())
    made = run.made(1)["train"]
    steps = [figure["step"] for figure in made.checks["figures"]]
    assert made.checks["picked"] < steps[-1]  # else the test says nothing
    arm = compare([runs / "short", run.folder]).arms[1]
    assert arm.trained == 100 * steps[-1]
    plain = sum(int(seal.metrics["dev/tokens"]) for seal in run.sealed()) + int(run.samples(1)["tokens"].sum())
    assert arm.generated == plain + sum(figure["tokens"] for figure in made.checks["figures"])
