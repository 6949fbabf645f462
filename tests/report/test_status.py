"""status and its numbers: what a run folder says about its run, wherever it lies and whoever is writing in it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, Faults, Killed, go, recipe_in
from rich.console import Console

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.run import Run
from selfkd.core.lease import Lease, holder
from selfkd.errors import ChainError, UsageError
from selfkd.report import status, tables


def printed(state: status.Status, width: int = 120) -> str:
    to = Console(width=width, record=True, file=io.StringIO(), highlight=False)
    tables.print_status(state, to)
    return to.export_text()


# ---- the rounds ----


def test_the_rounds_of_a_run_are_read_from_its_folder(done):
    state = status.read(done)
    assert (state.state, state.name, state.model, state.rounds_wanted) == ("done", "sums", "fake", 2)
    assert [row.index for row in state.rounds] == [0, 1, 2]
    base, first, _ = state.rounds
    assert base.measured["dev"].change is None
    assert (base.samples, base.kept) == (None, None)
    assert first.samples == 36 and first.kept is not None and 0 < first.kept < 36
    assert first.tokens > 0
    assert set(first.seconds) == {"generate", "score", "train", "measure", "other"}


def test_the_change_against_the_base_is_that_of_the_stored_scores(done):
    """Counted again by hand from the Parquet files of both measure steps."""

    def scores(round_: str) -> dict[str, float]:
        step = next(done.glob(f"{round_}/*-measure.json"))
        files = {
            name: [done / path for path in table["files"]] for name, table in json.loads(step.read_text())["tables"].items()
        }
        samples = pl.read_parquet(files["samples"]).select("id", "prompt")
        values = pl.read_parquet(files["scores"]).select(id="sample", value="value")
        return dict(samples.join(values, on="id").select("prompt", "value").iter_rows())

    before, after = scores("round-000"), scores("round-002")
    measured = status.read(done).rounds[2].measured["dev"]
    assert measured.value == pytest.approx(sum(after.values()) / 6)
    assert measured.change is not None
    assert measured.change.value == pytest.approx(sum(after[prompt] - before[prompt] for prompt in before) / 6)


def test_the_base_is_round_0_whatever_the_measure_step_is_called_since(tmp_path):
    go(recipe_in(tmp_path), tmp_path / "run")
    text = RECIPE.replace(
        "measure: reward/number.py:last_number", "measure: {name: exam, reward: reward/number.py:last_number}"
    )
    run = go(recipe_in(tmp_path, text, "rounds=4"), tmp_path / "run", amend=True)
    base, *_, last = status.read(run.folder).rounds
    measured = last.measured["dev"]
    assert measured.change is not None and measured.change.value > 0
    assert measured.change.value == pytest.approx(measured.value - base.measured["dev"].value)


def test_a_score_that_the_base_does_not_have_shows_no_change_against_it(tmp_path):
    go(recipe_in(tmp_path), tmp_path / "run")
    (tmp_path / "mine.py").write_text("def short(completion):\n    return float(len(completion) < 20)\n")
    text = RECIPE.replace(
        "measure: reward/number.py:last_number", "measure: {reward: [reward/number.py:last_number, mine.py:short]}"
    )
    run = go(recipe_in(tmp_path, text, "rounds=4"), tmp_path / "run", amend=True)
    later = [row.measured for row in status.read(run.folder).rounds[3:]]
    assert [(one["dev"].change is None, one["dev/short"].change, one["dev/short"].differently) for one in later] == [
        (False, None, False),
        (False, None, False),
    ]


def test_what_was_measured_is_worked_out_once_and_recorded_outside_every_digest(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    for seal in copy.glob("round-*/sealed.json"):
        content = json.loads(seal.read_text())
        assert set(content["notes"].pop("measured")) == {"dev"}
        seal.write_text(json.dumps(content))
    assert (
        status.read(copy).rounds == status.read(done).rounds
    )  # worked out again, as of runs from before there were such notes
    assert Run.at(done).sealed()[2].digest == json.loads((copy / "round-002/sealed.json").read_text())["digest"]


def test_reading_a_run_loads_no_statistics(done):
    code = f"import sys, pathlib; from selfkd.report import status, tables; tables.print_status(status.read(pathlib.Path({str(done)!r})), tables.console())"
    found = subprocess.run([sys.executable, "-c", f"{code}; sys.exit('scipy' in sys.modules)"], capture_output=True)
    assert found.returncode == 0


def test_a_frame_of_metrics_has_the_bounds_beside_each_mean(done):
    frame, shown = Run.at(done).metrics(), status.read(done).rounds
    for row, summary in zip(frame.iter_rows(named=True), shown, strict=True):
        found = summary.measured["dev"].interval
        assert found is not None
        assert (row["dev/last_number_low"], row["dev/last_number_high"]) == (found.low, found.high)


def test_the_mean_after_a_warm_up_is_shown(tmp_path):
    text = RECIPE + "before:\n  - sample: {n: 1, max_tokens: 64}\n  - train: {loss: sft}\n"
    base = status.read(go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run").folder).rounds[0]
    warm = base.measured["dev (measure-warm)"]
    assert warm.value is not None and warm.change is not None
    assert warm.change.value == pytest.approx(warm.value - base.measured["dev"].value)


def measuring(folder: Path, reward: str) -> status.Status:
    """The state of a run of one round whose held-out answers this function judges."""
    folder.mkdir(exist_ok=True)
    (folder / "judge.py").write_text(reward)
    text = RECIPE.replace("measure: reward/number.py:last_number", "measure: judge.py:judge")
    return status.read(go(recipe_in(folder, text, "rounds=1"), folder / "run").folder)


def test_prompts_without_a_score_are_counted_wherever_their_mean_is_shown(tmp_path):
    """Gold answers of dev are 60, 62, … 70: three of the six can be divided by 4."""
    state = measuring(tmp_path, "def judge(answer):\n    return None if int(answer) % 4 else 1.0\n")
    assert "round 1: dev/judge scored 3 of 6 prompts" in printed(state)
    assert "scored 3 of 6 prompts" in tables.round_line(state.rounds[1], "dev").plain
    assert "100.0 % [43.9, 100.0]" in printed(state)  # Wilson's lower bound of 3 of 3: 3 / (3 + 3.8415)


def test_a_mean_of_nothing_is_unscored_and_not_zero(tmp_path):
    text = printed(measuring(tmp_path, "def judge(answer):\n    return None\n"))
    assert "unscored" in text and "round 1: dev/judge scored 0 of 6 prompts" in text
    assert "0.0" not in text.split("[ ]")[0] and "nan" not in text


def test_where_there_is_no_interval_none_is_shown(tmp_path):
    text = printed(measuring(tmp_path, "def judge(answer):\n    return 7.5\n"))
    first = next(line for line in text.splitlines() if line.startswith("round 1"))
    assert first.split()[2:4] == ["7.5", "+0"]
    assert "[" not in first and "±" not in text and "nan" not in text


def test_a_moved_run_has_the_same_status(done, tmp_path):
    moved = Path(shutil.copytree(done, tmp_path / "elsewhere"))
    assert status.read(moved).rounds == status.read(done).rounds
    assert status.read(moved).state == "done"


def test_an_amendment_says_how_many_rounds_are_wanted(tmp_path):
    go(recipe_in(tmp_path), tmp_path / "run")
    go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run")
    state = status.read(tmp_path / "run")
    assert (state.rounds_wanted, len(state.rounds), state.state) == (3, 4, "done")


def test_the_test_split_stands_under_the_table(tmp_path):
    recipe = RECIPE.replace("  dev:", "  test: {file: test.jsonl, prompt: question, answer: answer}\n  dev:")
    recipe_in(tmp_path)
    shutil.copy(tmp_path / "dev.jsonl", tmp_path / "test.jsonl")
    lines = (tmp_path / "dev.jsonl").read_text().replace("+", "+ 1 +")
    (tmp_path / "test.jsonl").write_text(lines)
    go(recipe_in(tmp_path, recipe), tmp_path / "run")
    state = status.read(tmp_path / "run")
    assert state.split == "dev"
    assert "test/last_number: base" in printed(state) and "→  round 2" in printed(state)


# ---- who drives it, and how far ----


def test_a_run_that_was_only_created_is_new(tmp_path):
    Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    assert status.read(tmp_path / "run").state == "new"


def test_a_held_lease_means_running_and_names_the_process(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    with Lease(copy / "leases", copy / "tmp"):
        state = status.read(copy)
    assert state.state == "running"
    assert f"process {os.getpid()}" in state.note
    assert status.read(copy).state == "done"


def test_a_lease_of_another_machine_counts_only_while_its_heartbeat_is_fresh(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    lease = copy / "leases/000099.json"
    lease.write_text(json.dumps({"host": "elsewhere", "boot": "b", "pid": 1, "started": "1"}))
    lease.with_suffix(".beat").write_text("7")
    assert "process 1 on elsewhere" in holder(copy / "leases")
    os.utime(lease.with_suffix(".beat"), (0, 0))
    assert holder(copy / "leases") == ""


def test_a_killed_driver_leaves_an_interrupted_run_with_what_was_sealed(tmp_path):
    with Faults(150), pytest.raises(Killed):
        go(recipe_in(tmp_path), tmp_path / "run")
    for lease in (tmp_path / "run/leases").glob("*.done"):
        lease.unlink()
    newest = max((tmp_path / "run/leases").glob("*.json"))
    newest.write_text(newest.read_text().replace('"pid": ', '"pid": 99'))  # a process that is gone
    state = status.read(tmp_path / "run")
    assert state.state == "interrupted"
    assert "its driver ended without giving a reason" in printed(state)


def test_a_torn_last_line_of_the_log_is_left_out(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    (copy / "round-002/sealed.json").unlink()
    events = copy / "logs/attempt-001/events.jsonl"
    progress = {"event": "progress", "round": 2, "step": "sample", "done": 20, "total": 36, "unit": "answers", "rate": 800.0}
    step = {"event": "step", "round": 2, "step": "sample", "number": 1}
    events.write_text(json.dumps(step) + "\n" + json.dumps(progress) + '\n{"event": "progr')
    state = status.read(copy)
    assert (state.progress["done"], state.progress["number"]) == (20, 1)
    assert "20/36 answers  800 tok/s" in printed(state)


def test_a_failure_is_told_with_its_words(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    (copy / "round-002/sealed.json").unlink()
    with (copy / "logs/attempt-001/events.jsonl").open("a") as log:
        log.write(json.dumps({"event": "failed", "text": "the loss is NaN\n    Lower the rate."}) + "\n")
    state = status.read(copy)
    assert state.state == "failed"
    assert "failed (the loss is NaN)" in printed(state)


def test_a_folder_without_a_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"run\.json is missing"):
        status.read(tmp_path)


def test_a_record_that_cannot_be_read_is_named(done, tmp_path):
    copy = Path(shutil.copytree(done, tmp_path / "run"))
    (copy / "round-001/sealed.json").write_text("{")
    with pytest.raises(ChainError, match=r"round-001/sealed\.json  is not readable"):
        status.read(copy)


# ---- what a reader is warned about ----


class Faint(Fake):
    """An engine that sees a third of each update."""

    def swap_notes(self) -> dict[str, object]:
        return {"seconds": 0.1, "proved": "only 30% of the update is visible in bfloat16", "survived": 0.3}


def test_an_update_that_mostly_vanished_is_shown_and_warned_about(tmp_path):
    run = go(recipe_in(tmp_path), tmp_path / "run", Faint({}))
    assert status.read(run.folder).rounds[1].survived == 0.3
    assert "round 1: only 30% of the update reaches the engine" in printed(status.read(run.folder))


def test_answers_that_were_cut_are_told_where_they_are_many_at_one_end(done):
    state = status.read(done)
    assert set(state.rounds[0].cut) == {"dev"} and "cut at max_tokens" not in printed(state)
    rounds = [replace(row, cut={"dev": 0.8 if row.index == 0 else 0.0}) for row in state.rounds]
    assert "dev: answers cut at max_tokens of the measure step: base 80 %, round 2 0 %;" in printed(
        replace(state, rounds=rounds)
    )
    few = [replace(row, cut={"dev": 0.1}) for row in state.rounds]
    assert "cut at max_tokens" not in printed(replace(state, rounds=few))


def test_a_round_that_was_rolled_back_says_why(tmp_path):
    run = go(recipe_in(tmp_path, RECIPE + "keep_if: dev_last_number > 2\n"), tmp_path / "run")
    state = status.read(run.folder)
    assert [row.accepted for row in state.rounds] == [True, False, False]
    assert "round 1 was rolled back: not dev_last_number > 2" in printed(state)


def test_the_table_fits_into_80_columns(done):
    assert max(map(len, printed(status.read(done), 80).splitlines())) <= 80
    assert "seconds" in printed(status.read(done), 80).splitlines()[1]
    assert "generate" in printed(status.read(done), 120).splitlines()[1]


def test_no_column_of_the_table_is_cut_at_any_width_from_80_on(done):
    state = status.read(done)
    rounds = [
        replace(row, tokens=12_345, samples=512, kept=123, seconds=dict.fromkeys(row.seconds, 1234.0)) for row in state.rounds
    ]
    for width in range(80, 140):
        assert "…" not in printed(replace(state, rounds=rounds), width), f"cut at {width} columns"


def test_the_best_round_is_named_where_the_recipe_says_what_best_is(done, tmp_path):
    assert "best:" not in printed(status.read(done))
    run = go(recipe_in(tmp_path, RECIPE + "best: {metric: dev/tokens, mode: min}\n"), tmp_path / "run")
    tokens = [seal.metrics["dev/tokens"] for seal in run.sealed()]
    least = tokens.index(min(tokens))
    name = f"round {least}" if least else "the base"
    assert f"best: {name}, by dev/tokens" in printed(status.read(run.folder)).splitlines()


def test_the_name_of_a_score_that_is_cut_ends_with_an_ellipsis(done):
    rounds = status.read(done).rounds
    assert tables.rounds_table(rounds, "dev").columns[1].header == "dev/last_number"
    assert tables.rounds_table(measured_as(rounds, "a_score_of_many_words"), "dev").columns[1].header == "dev/a_score_of_ma…"


def measured_as(rounds: list[status.RoundSummary], score: str) -> list[status.RoundSummary]:
    return [
        replace(row, measured={split: replace(found, score=score) for split, found in row.measured.items()}) for row in rounds
    ]


def test_a_round_that_kept_next_to_nothing_says_so(done: Path) -> None:
    state = status.read(done)
    few = replace(state.rounds[1], kept=2, samples=160)
    said = printed(replace(state, rounds=[state.rounds[0], few]))
    assert "round 1 kept 2 of 160 samples" in said
    assert "all that it learned" not in printed(state)
    assert "all that it learned" not in printed(replace(state, rounds=[state.rounds[0], replace(few, kept=4)]))
