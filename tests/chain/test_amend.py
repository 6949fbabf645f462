"""A second word: what may change after a run was created works from the next unmade step on; all else is refused and changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import RECIPE, Killed, end, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import records, retention
from selfkd.chain.drive import is_finished
from selfkd.chain.loop import walk
from selfkd.chain.records import Amendment
from selfkd.chain.run import Run
from selfkd.chain.steering import best_round
from selfkd.core.lease import Lease
from selfkd.errors import BusyError, ChainError, RewardError
from selfkd.recipe.schema import Recipe
from selfkd.report import status
from selfkd.report.verify import verify

OWN = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
RIGHT = "def right(completion, answer):\n    return float(completion.rstrip().endswith(' ' + answer))\n"
GENEROUS = "def right(completion, answer):\n    return 1.0\n"


def files_of(run: Path) -> dict[Path, bytes]:
    """Everything in a run folder that says what the run is."""
    outside = ("logs", "leases", "tmp")
    return {
        path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] not in outside
    }


def refused(folder: Path, *words: str, text: str = RECIPE, run: str = "run") -> str:
    """The message of an amendment that is refused; the run is exactly as before."""
    before = files_of(folder / run)
    with pytest.raises(ChainError) as error:
        go(recipe_in(folder, text, *words), folder / run, amend=True)
    assert files_of(folder / run) == before
    return str(error.value)


def stop_at(call: str, times: int):
    """A hook of the fake backend that kills at the so manyeth call of that name."""
    seen: list[str] = []

    def hook(name: str) -> None:
        seen.append(name)
        if seen.count(call) == times and name == call:
            raise Killed

    return hook


def killed_in_training(folder: Path, text: str = RECIPE, *words: str, times: int = 1) -> None:
    with pytest.raises(Killed):
        go(recipe_in(folder, text, *words), folder / "run", Fake({}, hook=stop_at("train", times)))


# ---- what is fixed ----


FIXED = "model=other seed=1 prompts.train.limit=3 prompts.take=4 context=512 chunk=4 exact=true overlap=drop dither=false dither_seed=3"


@pytest.mark.parametrize("word", FIXED.split())
def test_what_is_fixed_at_creation_is_refused_with_the_way_out_and_the_run_goes_on(tmp_path, word):
    killed_in_training(tmp_path, RECIPE, "rounds=1")
    said = refused(tmp_path, "rounds=1", word)
    assert word.partition("=")[0] in said and "this is fixed when a run is created" in said and "--name X" in said
    assert len(go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run").sealed()) == 2


def test_what_to_do_with_long_prompts_may_change_until_they_are_measured_with_the_model(tmp_path):
    with pytest.raises(Killed):
        go(recipe_in(tmp_path), tmp_path / "run", Fake({}, hook=stop_at("load", 1)))
    go(recipe_in(tmp_path, RECIPE, "long=drop", "rounds=1"), tmp_path / "run", amend=True)
    said = refused(tmp_path, "long=refuse", "rounds=2")
    assert "prompts are measured when the model is loaded, and it was loaded" in said


def test_without_amend_a_fixed_word_is_not_offered_to_be_amended(tmp_path):
    killed_in_training(tmp_path)
    with pytest.raises(ChainError, match=r"cannot be amended.*fixed when a run is created") as error:
        go(recipe_in(tmp_path, RECIPE, "seed=1"), tmp_path / "run")
    assert "--amend" not in str(error.value)


# ---- what is made ----


def test_a_change_of_a_step_already_made_is_refused_by_its_name_and_both_ways_out_work(tmp_path):
    killed_in_training(tmp_path)
    said = refused(tmp_path, "sample.n=4")
    assert "run/round-001/01-sample.json  was made by a different recipe: n was 3, is 4" in said
    run = Run.at(tmp_path / "run")  # selfkd resume
    walk(run, Fake({}), run.begin())
    assert len(go(recipe_in(tmp_path), tmp_path / "run").sealed()) == 3  # the recipe restored
    assert verify(tmp_path / "run").problems == []


def test_a_changed_reward_of_a_step_already_made_is_refused(tmp_path):
    recipe_in(tmp_path)
    (tmp_path / "mine.py").write_text(RIGHT)
    killed_in_training(tmp_path, OWN)
    (tmp_path / "mine.py").write_text(GENEROUS)
    assert "02-score.json  was made by a different recipe: mine.py:right changed" in refused(tmp_path, text=OWN)


def test_another_order_of_steps_already_made_is_refused(tmp_path):
    killed_in_training(tmp_path)
    moved = RECIPE.replace("  - score: reward/number.py:last_number\n", "").replace(
        "  - train", "  - score: reward/number.py:last_number\n  - train"
    )
    moved = moved.replace('{where: "last_number = 1", per_prompt: 2}', "{per_prompt: 2}")
    assert "02-score.json  is where the recipe now has 'select'" in refused(tmp_path, text=moved)


def test_a_last_step_that_is_made_cannot_be_left_out(tmp_path):
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    run.paths.round(1).seal.unlink()  # as if killed before it was sealed
    said = refused(tmp_path, "rounds=1", text=RECIPE.replace("  - measure: reward/number.py:last_number\n", ""))
    assert "run/round-001/05-measure.json  is made already, and the recipe has no such step" in said


def test_a_step_that_is_not_made_yet_changes_and_nothing_before_it_is_made_again(tmp_path):
    killed_in_training(tmp_path)
    calls: list[str] = []
    recipe = recipe_in(tmp_path, RECIPE, "measure.limit=3")
    run = go(recipe, tmp_path / "run", Fake({}, hook=calls.append), amend=True)
    assert [seal.metrics["dev/prompts"] for seal in run.sealed()] == [6, 3, 3]
    assert calls.count("load") == 0
    assert verify(run.folder).problems == []


def test_what_is_made_in_every_round_to_come_already_is_refused_and_not_ignored(tmp_path):
    text = RECIPE.replace("steps:", "before:\n  - gold: {as: told}\n  - train: {of: told, name: warm}\nsteps:").replace(
        "{loss: sft}", "{loss: sft, of: sample}"
    )
    text = text.replace("{of: told, name: warm}", "{loss: sft, of: told, name: warm}")
    killed_in_training(tmp_path, text, times=2)
    assert "warm: all that changed in it is made already" in refused(
        tmp_path, text=text.replace("name: warm}", "name: warm, from: base}")
    )


def test_an_entry_of_a_list_for_a_round_that_is_sealed_is_refused(tmp_path):
    text = RECIPE.replace("{n: 3, temperature: 0.8", "{n: 3, temperature: [0.8, 0.9]")
    killed_in_training(tmp_path, text, times=2)
    assert "sample: all that changed in it is made already" in refused(tmp_path, text=text.replace("[0.8, 0.9]", "[0.7, 0.9]"))


def test_a_finished_run_takes_no_new_words_unless_it_gets_more_rounds_with_them(tmp_path):
    go(recipe_in(tmp_path), tmp_path / "run")
    said = refused(tmp_path, "sample.n=4")
    assert "the run has ended" in said and "repeat the command with rounds=3 --amend" in said
    run = go(recipe_in(tmp_path, RECIPE, "sample.n=4", "rounds=3"), tmp_path / "run", amend=True)
    assert [run.made(index)["sample"].tables["samples"].rows for index in (2, 3)] == [36, 48]


def test_another_best_metric_is_refused_where_a_step_was_made_with_the_best_round(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 3\nbest: {metric: dev/last_number}").replace(
        "{n: 3,", "{n: 3, model: policy@best,"
    )
    killed_in_training(tmp_path, text, times=3)
    run = Run.at(tmp_path / "run")
    values = [seal.metrics["dev/last_number"] for seal in run.sealed()]
    best, worst = values.index(max(values)), values.index(min(values))
    assert best != worst
    said = refused(tmp_path, "best.mode=min", text=text)
    assert f"was made when round {best} was the best one; now round {worst} would be" in said


# ---- models that are gone ----


def test_a_model_that_keep_took_away_is_refused_with_the_reason(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 4\nkeep: {last: 1, best: false, base: false}")
    killed_in_training(tmp_path, text, times=4)
    said = refused(tmp_path, "train.from=base", text=text)
    assert "train.from: the weights of 'policy@base' are not on disk any more: `keep` had them taken away" in said
    go(recipe_in(tmp_path, text, "train.from=start"), tmp_path / "run", amend=True)


FROM_BEST = (
    OWN.replace("{loss: sft}", "{loss: sft, from: best}")
    + "best: {metric: dev/right}\nkeep: {last: 1, best: true, base: true}\n"
)


def measured_by_another_reward_and_back(folder: Path) -> Recipe:
    """A run whose third round another reward measured; the recipe that goes back to the first reward."""
    recipe_in(folder, FROM_BEST)
    (folder / "mine.py").write_text(RIGHT)
    go(recipe_in(folder, FROM_BEST), folder / "run")
    (folder / "mine.py").write_text("def right(completion, answer):\n    return 0.5 if completion.endswith(answer) else 0.0\n")
    text = FROM_BEST.replace("right = 1", "right > 0")
    go(recipe_in(folder, text, "rounds=3"), folder / "run", amend=True)
    (folder / "mine.py").write_text(RIGHT)
    return recipe_in(folder, text, "rounds=6")


def test_a_reward_that_is_amended_and_amended_back_finds_the_weights_of_its_best_round(tmp_path):
    run = go(measured_by_another_reward_and_back(tmp_path), tmp_path / "run", amend=True)
    assert len(run.sealed()) == 7
    assert verify(run.folder).problems == []


def test_weights_that_keep_took_away_are_named_as_such_and_the_way_out_works(tmp_path, monkeypatch):
    with monkeypatch.context() as older:  # as a run was pruned when only the best one of the newest way of measuring stayed
        older.setattr(retention, "best_rounds", lambda sealed, best: {best_round(sealed, best)})
        recipe = measured_by_another_reward_and_back(tmp_path)
        with pytest.raises(ChainError, match="`keep` had them taken away") as caught:
            go(recipe, tmp_path / "run", amend=True)
    assert "'policy@now'" in caught.value.fix and "--amend" in caught.value.fix
    text = (tmp_path / "sums.yaml").read_text().replace("from: best", "from: now")
    assert len(go(recipe_in(tmp_path, text, "rounds=6"), tmp_path / "run", amend=True).sealed()) == 7


# ---- two drivers ----


def test_an_amendment_beside_a_living_driver_is_refused_and_leaves_nothing(tmp_path):
    killed_in_training(tmp_path)
    before = files_of(tmp_path / "run")
    with Lease(tmp_path / "run/leases", tmp_path / "run/tmp"), pytest.raises(BusyError):
        go(recipe_in(tmp_path, RECIPE, "measure.limit=3"), tmp_path / "run", amend=True)
    assert files_of(tmp_path / "run") == before
    assert len(go(recipe_in(tmp_path), tmp_path / "run").sealed()) == 3


def test_no_other_driver_comes_in_between_two_rounds(tmp_path):
    """A second command is refused at every event of the first one, also right behind a seal."""
    recipe = recipe_in(tmp_path)
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    seen: list[str] = []

    def second(event: dict) -> None:
        if event["event"] in ("sealed", "round"):
            with pytest.raises(BusyError):
                run.lease().__enter__()
            seen.append(event["event"])

    walk(run, Fake({}), run.begin(second))
    assert seen == ["round", "sealed"] * 3


# ---- code ----


def test_a_comment_in_a_reward_is_no_change_and_more_rounds_go_on(tmp_path):
    recipe_in(tmp_path)
    (tmp_path / "mine.py").write_text(RIGHT)
    go(recipe_in(tmp_path, OWN), tmp_path / "run")
    (tmp_path / "mine.py").write_text("# a remark\n" + RIGHT)
    run = go(recipe_in(tmp_path, OWN, "rounds=3"), tmp_path / "run")
    assert len(run.sealed()) == 4
    assert verify(run.folder).problems == []


def test_a_mended_reward_of_measure_scores_the_answers_that_are_there(tmp_path):
    recipe_in(tmp_path)
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    raise ValueError('not yet')\n")
    text = RECIPE.replace("- measure: reward/number.py:last_number", "- measure: mine.py:right")
    with pytest.raises(RewardError, match="not yet"):
        go(recipe_in(tmp_path, text), tmp_path / "run")
    (tmp_path / "mine.py").write_text(RIGHT)
    calls: list[str] = []
    go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run", Fake({}, hook=calls.append), amend=True)
    assert calls.count("generate") == 5 + 1  # 36 samples in chunks of 8, and the dev prompts once: those of the base are there


def test_metrics_of_another_reward_are_not_compared_under_one_name(tmp_path):
    recipe_in(tmp_path)
    (tmp_path / "mine.py").write_text(RIGHT)
    text = RECIPE.replace("- measure: reward/number.py:last_number", "- measure: mine.py:right").replace(
        "rounds: 2", "rounds: 3\nbest: {metric: dev/right}\nkeep_if: dev_right >= prev_dev_right"
    )
    killed_in_training(tmp_path, text, times=2)
    (tmp_path / "mine.py").write_text(GENEROUS)
    run = go(recipe_in(tmp_path, text), tmp_path / "run", amend=True)
    first, second = run.sealed()[1:3]
    assert second.metrics["dev/right"] == 1.0 > first.metrics["dev/right"]
    assert not second.accepted
    assert second.why == "could not judge dev_right >= prev_dev_right: dev/right was measured differently in round 1"
    summaries = status.read(run.folder).rounds
    assert [row.measured["dev"].differently for row in summaries] == [False, False, True, True]
    assert summaries[1].measured["dev"].change is not None and summaries[2].measured["dev"].change is None


def test_a_second_reward_beside_the_first_leaves_the_first_comparable(tmp_path):
    text = RECIPE.replace("  - measure: reward/number.py:last_number", "  - measure: {reward: [reward/number.py:last_number]}")
    killed_in_training(tmp_path, text, times=2)
    more = text.replace("[reward/number.py:last_number]", "[reward/number.py:last_number, reward/exact.py:contains]")
    run = go(recipe_in(tmp_path, more), tmp_path / "run", amend=True)
    measured = status.read(run.folder).rounds[2].measured
    assert measured["dev"].change is not None and not measured["dev"].differently
    assert measured["dev/contains"].change is None


# ---- more rounds ----

PATIENT = RECIPE.replace("rounds: 2", "rounds: 6\nstop: {patience: 1, metric: dev/chars}").replace(
    "prompts:", "prompts:\n  test: {file: test.jsonl, prompt: question, answer: answer}"
)


def stopped(folder: Path) -> Run:
    """A run that ended early: the longest answers were those of round 0, 1 or 2."""
    recipe_in(folder)
    (folder / "test.jsonl").write_text((folder / "dev.jsonl").read_text().replace("What", "Now, what"))
    run = go(recipe_in(folder, PATIENT), folder / "run")
    assert 1 < len(run.sealed()) < 6 and run.sealed()[-1].stop
    assert "test/last_number" in run.sealed()[-1].metrics
    return run


def test_a_run_that_stopped_early_goes_on_when_it_is_given_more_rounds(tmp_path):
    before = stopped(tmp_path).sealed()
    assert len(go(recipe_in(tmp_path, PATIENT), tmp_path / "run").sealed()) == len(before)  # the same command: nothing to do
    run = go(recipe_in(tmp_path, PATIENT, "rounds=9"), tmp_path / "run")
    assert len(run.sealed()) > len(before) and [seal.digest for seal in run.sealed()][: len(before)] == [
        s.digest for s in before
    ]
    assert verify(run.folder).problems == []
    assert is_finished(run) and status.read(run.folder).state == "done"


def test_a_run_that_stopped_early_goes_on_with_more_patience(tmp_path):
    before = len(stopped(tmp_path).sealed())
    run = go(recipe_in(tmp_path, PATIENT, "stop.patience=6"), tmp_path / "run", amend=True)
    assert len(run.sealed()) == 7 > before
    assert verify(run.folder).problems == []
    assert run.sealed()[before].parent == run.sealed()[before - 1].digest


def test_a_run_that_was_asked_to_go_on_and_was_killed_is_interrupted_and_not_done(tmp_path):
    before = len(stopped(tmp_path).sealed())
    with pytest.raises(Killed):
        go(recipe_in(tmp_path, PATIENT, "rounds=9"), tmp_path / "run", Fake({}, hook=stop_at("generate", 1)))
    assert status.read(tmp_path / "run").state != "done"
    assert len(go(recipe_in(tmp_path, PATIENT, "rounds=9"), tmp_path / "run").sealed()) > before


def test_a_patience_that_is_still_over_leaves_the_run_ended(tmp_path):
    before = len(stopped(tmp_path).sealed())
    text = PATIENT.replace("patience: 1", "patience: 1, tokens: 100000000")
    assert len(go(recipe_in(tmp_path, text), tmp_path / "run", amend=True).sealed()) == before


def test_killed_in_the_closing_steps_and_given_more_rounds_nothing_is_lost_and_verify_is_clean(tmp_path):
    text = PATIENT.replace("stop: {patience: 1, metric: dev/chars}\n", "").replace("rounds: 6", "rounds: 1")
    text += "after:\n  - measure: {reward: reward/exact.py:contains, name: last}\n"
    recipe_in(tmp_path)
    (tmp_path / "test.jsonl").write_text((tmp_path / "dev.jsonl").read_text().replace("What", "Now, what"))
    calls: list[str] = []
    go(recipe_in(tmp_path, text), tmp_path / "whole", Fake({}, hook=calls.append))
    with pytest.raises(Killed):
        go(recipe_in(tmp_path, text), tmp_path / "run", Fake({}, hook=stop_at("generate", calls.count("generate"))))
    assert sorted(path.name for path in (tmp_path / "run/round-001").glob("*.json"))[-1] == "06-last.json"
    run = go(recipe_in(tmp_path, text, "rounds=3"), tmp_path / "run")
    assert verify(run.folder).problems == []
    assert len(run.sealed()) == 4
    assert [list(run.made(index))[5:] for index in (1, 2, 3)] == [["last", "measure-test"], [], ["last", "measure-test"]]


def test_closing_steps_of_a_run_that_stops_early_use_the_numbers_of_their_own_round(tmp_path):
    recipe = recipe_in(
        tmp_path, PATIENT + "after:\n  - measure: {reward: reward/exact.py:contains, name: last, limit: [1, 2, 3]}\n"
    )
    assert [step.limit for step in recipe.closing_steps(2) if step.name == "last"] == [2]


# ---- fewer rounds ----


def test_the_recipes_own_rounds_after_more_were_made_change_nothing(tmp_path):
    go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run")
    run = go(recipe_in(tmp_path), tmp_path / "run")
    assert (status.read(run.folder).rounds_wanted, run.recipe.rounds, len(run.sealed())) == (3, 3, 4)
    assert run.paths.amendments() == []


def test_a_run_on_its_way_cannot_end_where_it_was_and_says_how_it_can(tmp_path):
    killed_in_training(tmp_path, RECIPE, "rounds=5", times=3)  # rounds 0, 1 and 2 are sealed
    with pytest.raises(ChainError, match=r"round 2 is sealed already, on the way to round 5: rounds=2 comes too late") as error:
        go(recipe_in(tmp_path), tmp_path / "run")
    assert "rounds=5" in error.value.fix and "rounds=3" in error.value.fix
    assert len(go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run").sealed()) == 4


# ---- replay ----


def test_a_window_of_rounds_replays_what_those_rounds_made_and_not_what_they_replayed(tmp_path):
    text = (
        RECIPE.replace("rounds: 2", "rounds: 4")
        .replace("steps:", "steps:\n  - replay: {rounds: 1, as: older}")
        .replace("{loss: sft}", "{loss: sft, of: sample}")
    )
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    for index in (2, 3, 4):
        replayed = set(_ids(run, index, "replay"))
        assert replayed and replayed == set(_kept(run, index - 1))


REPLAYED = OWN.replace("  - score", "  - replay\n  - score")


def replaying(folder: Path, text: str = REPLAYED) -> None:
    recipe_in(folder, text)
    (folder / "mine.py").write_text(RIGHT)
    go(recipe_in(folder, text), folder / "run")


def test_scores_of_two_rewards_do_not_meet_under_one_name_in_a_replay(tmp_path):
    replaying(tmp_path)
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return 2.0\n")
    said = refused(tmp_path, "rounds=3", text=REPLAYED)
    assert "round-001/03-score.json" in said and "gave 'right' by another reward, and `replay` brings these scores" in said
    own_name = REPLAYED.replace("score: mine.py:right", "score: {reward: mine.py:right, as: right_2}").replace(
        '"right = 1"', '"right_2 = 2"'
    )
    run = go(recipe_in(tmp_path, own_name, "rounds=3"), tmp_path / "run", amend=True)  # the way out
    assert run.samples(round=3, step="replay").height > 0
    assert set(run.samples(round=3)["right_2"]) == {2.0}


@pytest.mark.parametrize("change", ["{reward: mine.py:wrong, as: right}", "{reward: mine.py:right, params: {least: 1}}"])
def test_another_function_or_other_arguments_make_another_score_for_a_replay(tmp_path, change):
    body = "def right(completion, answer, least=0):\n    return 1.0\n\n\ndef wrong(completion, answer):\n    return 0.0\n"
    recipe_in(tmp_path, REPLAYED)
    (tmp_path / "mine.py").write_text(body)
    go(recipe_in(tmp_path, REPLAYED), tmp_path / "run")
    said = refused(tmp_path, "rounds=3", text=REPLAYED.replace("score: mine.py:right", f"score: {change}"))
    assert "gave 'right' by another reward" in said


def test_a_reward_may_change_where_no_replay_reaches_back_to_the_old_one(tmp_path):
    narrow = REPLAYED.replace("- replay", "- replay: {rounds: 1}")
    replaying(tmp_path, OWN)
    (tmp_path / "mine.py").write_text(GENEROUS)
    go(recipe_in(tmp_path, OWN, "rounds=3"), tmp_path / "run", amend=True)
    run = go(recipe_in(tmp_path, narrow, "rounds=4"), tmp_path / "run", amend=True)
    assert set(run.samples(round=4)["right"]) == {1.0}


def _ids(run: Run, index: int, step: str) -> list[str]:
    return run.samples(round=index, step=step)["id"].to_list()


def _kept(run: Run, index: int) -> list[str]:
    view = run.samples(round=index, where="kept")
    return view.filter(view["stream"] == "sample")["id"].to_list()


# ---- an amendment says when ----


def test_an_amendment_written_before_it_said_when_reads_as_written_at_the_start(tmp_path):
    go(recipe_in(tmp_path), tmp_path / "run")
    run = go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run")
    found = records.read(run.paths.amendment(1), Amendment)
    assert (found.changed, found.sealed) == (["rounds"], 3)
    content = {name: value for name, value in json.loads(run.paths.amendment(1).read_text()).items() if name != "sealed"}
    assert Amendment.from_json(content).sealed == 0
    assert end(run)
