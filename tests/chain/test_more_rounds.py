"""More rounds are always welcome: whatever wrote the run, and without trusting what lies in it more than its records do."""

from __future__ import annotations

import json

import pytest
from chains import RECIPE, go, recipe_in

from selfkd.chain import records
from selfkd.chain.records import Commit
from selfkd.chain.ways import measures_of
from selfkd.core import digest
from selfkd.errors import ChainError
from selfkd.report.verify import verify

OWN = RECIPE.replace("reward/number.py:last_number", "r.py:right").replace("last_number", "right")
RIGHT = "def right(completion: str, answer: str) -> float:\n    return float(answer in completion)\n"


def test_a_run_whose_record_lacks_a_word_of_today_is_given_more_rounds_by_its_own_recipe(tmp_path):
    run = go(recipe_in(tmp_path), tmp_path / "run")
    content = json.loads(run.paths.info.read_text())
    del content["recipe"]["long"], content["self"]
    run.paths.info.chmod(0o644)
    run.paths.info.write_text(json.dumps(digest.with_self_digest(content)))
    longer = go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run")
    assert len(longer.sealed()) == 4


def test_more_rounds_do_not_make_damaged_code_the_truth(tmp_path):
    (tmp_path / "r.py").write_text(RIGHT)
    run = go(recipe_in(tmp_path, OWN), tmp_path / "run")
    frozen = next(run.paths.code.glob("*/r.py"))
    frozen.chmod(0o644)
    frozen.write_text(RIGHT.replace("float(answer", "2 * float(answer"))
    with pytest.raises(ChainError, match=r"r\.py"):
        go(recipe_in(tmp_path, OWN, "rounds=3"), tmp_path / "run")
    assert any("r.py" in problem for problem in verify(tmp_path / "run").problems)


def measured(reward: str, score: str, code: str) -> Commit:
    identity = {"verb": "measure", "reward": reward, "as": score, "n": 1}
    metrics = {f"dev/{score}": 0.5, f"dev/{score}_scored": 3}
    return Commit(
        format=records.FORMAT, round=1, number=5, step="measure", verb="measure", outside=True, key="", parent="", identity=identity,
        code={reward: code}, tables={}, models={}, metrics=metrics, files={}, digest="",
    )  # fmt: skip


@pytest.mark.parametrize("score", ["good", "good_interval", "good_scored"])
def test_a_score_by_another_function_or_by_other_code_is_measured_differently_whatever_it_is_called(score):
    one = measures_of(measured("r.py:right", score, "a"))
    assert one == measures_of(measured("r.py:right", score, "a")) == measures_of(measured("moved/r.py:right", score, "a"))
    for other in (measured("r.py:never", score, "a"), measured("r.py:right", score, "b")):
        assert all(one[metric] != how for metric, how in measures_of(other).items())
