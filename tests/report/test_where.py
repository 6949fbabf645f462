"""`show --where` with the words of a recipe's expressions: columns of the prompt, and numbers over a prompt's samples."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.chain.run import Run
from selfkd.cli.main import main
from selfkd.errors import RecipeError, UsageError
from selfkd.recipe.load import load
from selfkd.report.rows import samples, training_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("where")
    recipe_in(folder, RECIPE, "rounds=1")
    for name in ("train", "dev"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        leveled = [{**row, "level": at % 3} for at, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in leveled))
    return go(load(str(folder / "sums.yaml"), ["rounds=1"]), folder / "run")


def test_a_column_of_the_prompt_chooses_samples(run: Run) -> None:
    found = samples(run.folder, 1, where="prompt.level = 2 AND prompt.answer <> '14'", n=100)
    assert found.total == 36 and found.matched == 4 * 3 - 3
    assert not [name for name in found.first.columns if name.startswith("prompt.")]
    assert run.samples(1, where="prompt.text LIKE 'What is 10 %'").height == 3


def test_held_out_answers_know_their_prompts_too(run: Run) -> None:
    assert samples(run.folder, 1, step="measure", where="prompt.level = 0").matched == 2


def test_a_number_is_over_all_samples_of_the_prompt_dropped_ones_too(run: Run) -> None:
    everything = run.samples(1)
    means = everything.group_by("prompt").agg(pl.col("last_number").mean())
    some = means.filter((pl.col("last_number") > 0) & (pl.col("last_number") < 1))
    assert 0 < some.height < means.height
    found = samples(run.folder, 1, where="mean(last_number) > 0 AND mean(last_number) < 1", n=100)
    assert found.matched == 3 * some.height and set(found.first["prompt"]) == set(some["prompt"])


def test_a_name_that_no_prompt_has_is_refused_with_those_that_there_are(run: Run) -> None:
    with pytest.raises(RecipeError, match=r"no prompt has the column of 'prompt.lvel'.*Did you mean 'prompt.level'"):
        samples(run.folder, 1, where="prompt.lvel = 1")
    with pytest.raises(RecipeError, match=r"it is one of the prompts. Did you mean 'prompt.level'"):
        samples(run.folder, 1, where="level = 1 AND prompt.text <> ''")
    with pytest.raises(UsageError, match="a training row may be made of several prompts, or of none"):
        training_rows(run.folder, 1, where="prompt.level = 1")


def test_the_command_knows_them(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(run.folder).parent)
    assert main(["show", str(run.folder), "--where", "prompt.level = 1", "-n", "1"]) == 0
    assert "prompt.level = 1" in capsys.readouterr().out
