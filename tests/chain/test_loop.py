"""The chain on the fake backend: killed at every operation it ends on the same digest; nothing committed ever changes."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in
from rich.console import Console

import selfkd
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import freeze, records, retention
from selfkd.chain.dry_run import in_small, knowing
from selfkd.chain.records import Amendment
from selfkd.chain.run import Run
from selfkd.core.lease import Lease
from selfkd.errors import BusyError, ChainError, GuardError, RewardError, StorageError
from selfkd.recipe.load import load
from selfkd.report import rows
from selfkd.report.panels import print_rows
from selfkd.report.verify import verify


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Faults() as counted:
        run = go(recipe_in(folder), folder / "runs" / "sums")
    return run, counted.count


def test_two_runs_with_one_seed_end_on_one_digest_and_another_seed_does_not(undisturbed, tmp_path):
    again = go(recipe_in(tmp_path), tmp_path / "elsewhere")
    other = go(recipe_in(tmp_path / "b", RECIPE, "seed=1"), tmp_path / "b" / "run")
    assert end(again) == end(undisturbed[0])
    assert end(other) != end(undisturbed[0])


def test_the_order_in_which_chunks_are_answered_does_not_matter(undisturbed, tmp_path):
    backend = Fake({})
    backend.reverse = True
    assert end(go(recipe_in(tmp_path), tmp_path / "run", backend)) == end(undisturbed[0])


def killed_then_continued(folder: Path, at: int) -> str:
    recipe = recipe_in(folder)
    with Faults(at), pytest.raises(Killed):
        go(recipe, folder / "run")
    before = {path: path.read_bytes() for path in (folder / "run").glob("round-*/*.json")}
    run = go(recipe, folder / "run")
    assert all(path.read_bytes() == content for path, content in before.items()), "a committed record changed"
    return end(run)


@pytest.mark.parametrize("part", range(23))
def test_killed_at_a_file_operation_and_continued_the_chain_ends_on_the_same_digest(undisturbed, tmp_path, part):
    run, operations = undisturbed
    assert killed_then_continued(tmp_path, operations * part // 23 + part % 7) == end(run)


@pytest.mark.nightly
def test_killed_at_every_file_operation_the_chain_ends_on_the_same_digest(undisturbed, tmp_path):
    run, operations = undisturbed
    for at in range(operations):
        assert killed_then_continued(tmp_path / str(at), at) == end(run), f"operation {at}"
        shutil.rmtree(tmp_path / str(at))


def test_killed_at_every_call_of_the_backend_the_chain_ends_on_the_same_digest(undisturbed, tmp_path):
    calls: list[str] = []
    go(recipe_in(tmp_path / "count"), tmp_path / "count" / "run", Fake({}, hook=calls.append))
    for at in range(len(calls)):
        seen = iter(range(len(calls)))

        def kill(call: str, at: int = at, seen=seen) -> None:
            if next(seen) == at:
                raise Killed

        recipe = recipe_in(tmp_path / str(at))
        with pytest.raises(Killed):
            go(recipe, tmp_path / str(at) / "run", Fake({}, hook=kill))
        assert end(go(recipe, tmp_path / str(at) / "run")) == end(undisturbed[0]), f"call {at}: {calls[at]}"


@pytest.fixture(scope="module")
def shipped(tmp_path_factory):
    """{recipe: (itself in small, its model, its undisturbed digest, its file operations)}, made when first asked for."""
    known: dict = {}

    def of(name: str):
        if name not in known:
            recipe = in_small(load(name))
            with Faults() as counted:
                run = go(recipe, tmp_path_factory.mktemp(name) / "run", Fake({}, knowing(recipe)))
            known[name] = (recipe, knowing(recipe), end(run), counted.count)
        return known[name]

    return of


RECIPES = [
    "quickstart",
    "rest-em",
    "star",
    "spin",
    "irpo",
    "self-rewarding",
    "raft",
    "reinforce-rej",
    "iterative-dpo",
    "easy-to-hard",
]


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_survives_a_kill_at_a_file_operation(shipped, tmp_path, name, part):
    recipe, model, digest, operations = shipped(name)
    with Faults(operations * (2 * part + 1) // 6 + part), pytest.raises(Killed):
        go(recipe, tmp_path / "run", Fake({}, model))
    assert end(go(recipe, tmp_path / "run", Fake({}, model))) == digest


@pytest.mark.nightly
@pytest.mark.parametrize("name", RECIPES)
def test_every_shipped_recipe_survives_a_kill_at_every_file_operation(shipped, tmp_path, name):
    recipe, model, digest, operations = shipped(name)
    for at in range(operations):
        with Faults(at), pytest.raises(Killed):
            go(recipe, tmp_path / str(at), Fake({}, model))
        assert end(go(recipe, tmp_path / str(at), Fake({}, model))) == digest, f"operation {at}"
        shutil.rmtree(tmp_path / str(at))


def test_finished_chunks_of_a_killed_step_are_not_generated_again(tmp_path):
    recipe, calls = recipe_in(tmp_path), []

    def kill_fourth(call: str) -> None:
        calls.append(call)
        if len(calls) == 5:  # load, the base's measure, then chunks of round 1
            raise Killed

    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Fake({}, hook=kill_fourth))
    again: list[str] = []
    go(recipe, tmp_path / "run", Fake({}, hook=again.append))
    whole: list[str] = []
    go(recipe_in(tmp_path / "b"), tmp_path / "b" / "run", Fake({}, hook=whole.append))
    assert len(calls) - 1 + len(again) == len(whole)


@pytest.mark.parametrize("part", range(6))
def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_space(undisturbed, tmp_path, part):
    run, operations = undisturbed
    recipe = recipe_in(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    with Faults(5 + operations * part // 6, full), pytest.raises((StorageError, OSError)):
        go(recipe, tmp_path / "run")
    assert end(go(recipe, tmp_path / "run")) == end(run)


def test_a_run_that_is_moved_keeps_its_digests_and_goes_on(tmp_path, undisturbed):
    recipe = recipe_in(tmp_path, RECIPE, "rounds=1")
    first = end(go(recipe, tmp_path / "here" / "run"))
    (tmp_path / "there").mkdir()
    moved = (tmp_path / "here" / "run").rename(tmp_path / "there" / "moved")
    assert end(Run.at(moved)) == first
    assert end(go(recipe_in(tmp_path, RECIPE, "rounds=2"), moved)) == end(undisturbed[0])


def test_a_changed_recipe_is_refused_with_the_difference_named_and_nothing_changes(tmp_path):
    run = go(recipe_in(tmp_path), tmp_path / "run")
    before = sorted(path.relative_to(run.folder) for path in run.folder.rglob("*.json"))
    with pytest.raises(ChainError, match=r"sample\.n.*3.*changed to.*4"):
        go(recipe_in(tmp_path, RECIPE, "sample.n=4"), tmp_path / "run")
    assert sorted(path.relative_to(run.folder) for path in run.folder.rglob("*.json")) == before


def test_a_changed_reward_is_refused_by_name_and_a_comment_in_it_is_not(tmp_path):
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    text = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
    go(recipe_in(tmp_path, text), tmp_path / "run")
    (tmp_path / "mine.py").write_text("# a remark\ndef right(completion, answer):\n    return float(answer in completion)\n")
    go(recipe_in(tmp_path, text), tmp_path / "run")
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer not in completion)\n")
    with pytest.raises(ChainError, match=r"mine\.py:right changed"):
        go(recipe_in(tmp_path, text), tmp_path / "run")


def test_a_comment_that_moves_the_line_on_which_a_reward_raises_moves_no_digest_and_show_says_the_reason(tmp_path):
    text = RECIPE.replace("score: reward/number.py:last_number", "score: {reward: mine.py:odd, max_failed: 1}").replace(
        "last_number = 1", "odd = 1 or odd is null"
    )
    code = "def odd(completion, answer):\n    return 1.0 / (int(answer) % 4)\n"
    ends = []
    for name, above in (("plain", ""), ("moved", "# A remark.\n\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(above + code)
        run = go(recipe_in(tmp_path / name, text), tmp_path / name / "run")
        ends.append([seal.digest for seal in run.sealed()])
    assert ends[0] == ends[1]
    to = Console(record=True, width=200, file=io.StringIO())
    print_rows(rows.samples(tmp_path / "plain/run", 1, "sample", "odd is null", 1), to)
    assert "odd: ZeroDivisionError: " in to.export_text()


def test_a_reward_that_crashes_is_mended_with_amend_and_nothing_is_generated_again(tmp_path):
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(completion.index('no such text'))\n")
    text = RECIPE.replace("  - score: reward/number.py:last_number", "  - score: mine.py:right").replace(
        "last_number = 1", "right = 1"
    )
    with pytest.raises(RewardError, match=r"could not be scored.*First: right \(mine\.py:2\): ValueError"):
        go(recipe_in(tmp_path, text), tmp_path / "run")
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    calls: list[str] = []
    run = go(recipe_in(tmp_path, text), tmp_path / "run", Fake({}, hook=calls.append), amend=True)
    assert len(run.sealed()) == 3
    assert "load" not in calls
    assert records.read(run.paths.amendment(1), Amendment).changed == ["mine.py:right"]


def test_amending_a_step_that_was_already_made_is_refused(tmp_path):
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    recipe = recipe_in(tmp_path, RECIPE, "rounds=2", "sample.n=4")
    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Fake({}, hook=kill_at_train), amend=True)
    with pytest.raises(ChainError, match="n was 4, is 5"):
        go(recipe_in(tmp_path, RECIPE, "rounds=2", "sample.n=5"), tmp_path / "run", amend=True)


def kill_at_train(call: str) -> None:
    if call == "train":
        raise Killed


def test_nothing_kept_stops_before_the_trainer_with_the_funnel(tmp_path):
    calls: list[str] = []
    with pytest.raises(GuardError, match=r"0 training rows[\s\S]*dropped by select"):
        go(recipe_in(tmp_path, RECIPE, "select.where=last_number = 7"), tmp_path / "run", Fake({}, hook=calls.append))
    assert "train" not in calls


def test_train_prompts_in_dev_are_refused_or_dropped_where_the_recipe_says_so(tmp_path):
    recipe_in(tmp_path)
    leaky = (tmp_path / "train.jsonl").read_text() + (tmp_path / "dev.jsonl").read_text()

    def with_leak(text: str) -> Run:
        recipe = recipe_in(tmp_path, text)
        (tmp_path / "train.jsonl").write_text(leaky)
        return go(recipe, tmp_path / "run")

    with pytest.raises(GuardError, match="6 train prompts stand in 'dev'"):
        with_leak(RECIPE)
    run = with_leak(RECIPE.replace("prompts:", "overlap: drop\nprompts:"))
    assert (run.info.prompts["train"].rows, run.info.prompts["train"].overlap) == (12, 6)


def test_a_second_driver_is_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    recipe = recipe_in(tmp_path)
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    with Lease(run.folder / "leases", run.paths.tmp), pytest.raises(BusyError, match="another driver holds this run"):
        go(recipe, tmp_path / "run")
    newest = max((run.folder / "leases").glob("*.done"))
    newest.unlink()  # as if the holder had been killed …
    holder = json.loads(newest.with_suffix(".json").read_text())
    newest.with_suffix(".json").write_text(json.dumps({**holder, "started": "1"}))  # … and its pid used again
    assert len(go(recipe, tmp_path / "run").sealed()) == 3


def test_every_training_row_leads_back_to_its_samples_and_their_scores(undisturbed):
    run, _ = undisturbed
    commits = run.made(1)

    def table(step: str, name: str) -> pl.DataFrame:
        return pl.concat([pl.read_parquet(run.folder / path) for path in commits[step].tables[name].files])

    samples, scores, rows = table("sample", "samples"), table("score", "scores"), table("train", "rows")
    assert rows.height > 0
    for row in rows.iter_rows(named=True):
        sample = samples.row(by_predicate=pl.col("id") == row["samples"][0], named=True)
        assert scores.row(by_predicate=pl.col("sample") == sample["id"], named=True)["value"] == 1.0
        assert (row["chosen"], row["chosen_ids"]) == (sample["text"], sample["token_ids"])


def test_a_rolled_back_round_is_sealed_and_the_chain_goes_on_from_its_parent(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 2\nkeep_if: dev_chars > 1000000")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    sealed = run.sealed()
    assert [record.accepted for record in sealed] == [True, False, False]
    assert len({record.models["policy"].digest for record in sealed}) == 1
    assert "dev_chars" in sealed[1].why


def test_only_the_checkpoints_that_keep_names_stay_on_disk(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 4\nkeep: {last: 1, best: false, base: true}")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    left = sorted(path.parent.parent.name for path in run.folder.glob("round-*/*/policy-*"))
    assert left == ["round-000", "round-004"]
    assert len(go(recipe_in(tmp_path, text.replace("rounds: 4", "rounds: 5")), tmp_path / "run").sealed()) == 6


def test_runs_of_several_seeds_begin_with_one_root_where_the_dither_has_a_seed_of_its_own(tmp_path):
    def root(name: str, *overrides: str) -> str:
        run = go(recipe_in(tmp_path / name, RECIPE, "rounds=1", *overrides), tmp_path / name / "run")
        return str(run.loaded()["policy"].digest)

    assert root("a") != root("b", "seed=1")
    assert root("c", "dither_seed=7") == root("d", "dither_seed=7", "seed=1") != root("e", "dither_seed=0")
    assert root("e2", "dither_seed=0") not in (root("f"), root("g", "dither=false"))


def test_a_window_that_is_wider_than_the_chain_keeps_all_of_it(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 2\nkeep: {last: 4, best: false, base: false}")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert sorted(path.parent.parent.name for path in run.folder.glob("round-*/*/policy-*")) == [
        f"round-00{at}" for at in range(3)
    ]


def test_a_checkpoint_that_a_step_goes_on_using_stays_whatever_keep_says(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 4\nkeep: {last: 1, best: false, base: false}").replace(
        "{loss: sft}", "{loss: sft, from: base}"
    )
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert [record.accepted for record in run.sealed()] == [True] * 5
    assert sorted(path.parent.parent.name for path in run.folder.glob("round-*/*/policy-*")) == ["round-000", "round-004"]


@pytest.mark.parametrize("keep", ["{last: 0}", "{last: 0, best: false, base: false}"])
def test_the_head_stays_on_disk_whatever_keep_says_for_the_next_round_starts_from_it(tmp_path, keep):
    """The fake's accuracy may fall, so that the head is neither the best round nor the base."""
    text = RECIPE.replace("rounds: 2", f"rounds: 3\nkeep: {keep}\nbest: {{metric: dev/last_number, mode: min}}")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert len(run.sealed()) == 4
    assert Path(run.model("policy").path).is_dir()


# ---- taking checkpoints away, more than once ----

TWO_TRAININGS = RECIPE.replace("rounds: 2", "rounds: 3\nkeep: {last: 1, best: false, base: true}").replace(
    "  - train: {loss: sft}", "  - train: {loss: sft}\n  - train: {loss: sft, name: again}"
)


def checkpoints(run: Run) -> list[str]:
    return sorted(path.parent.relative_to(run.folder).as_posix() for path in run.folder.glob("round-*/*/policy-*"))


def test_both_checkpoints_of_a_round_with_two_trainings_are_taken_away_at_their_time(tmp_path):
    run = go(recipe_in(tmp_path, TWO_TRAININGS), tmp_path / "run")
    assert checkpoints(run) == ["round-000/01-load", "round-003/05-again"]
    assert [path.name for path in run.paths.round(1).tombstones()] == ["pruned-001.json", "pruned-002.json"]
    assert verify(run.folder).problems == []
    assert len(verify(run.folder).pruned) == 5


def test_a_run_whose_first_tombstone_has_the_name_of_before_is_read_and_pruned_on(tmp_path):
    run = go(recipe_in(tmp_path, TWO_TRAININGS, "rounds=1"), tmp_path / "run")
    first = run.paths.round(1)
    first.tombstone(1).rename(first.folder / "pruned.json")
    run = go(recipe_in(tmp_path, TWO_TRAININGS, "rounds=3"), tmp_path / "run")
    assert [path.name for path in first.tombstones()] == ["pruned.json", "pruned-001.json"]
    assert checkpoints(run) == ["round-000/01-load", "round-003/05-again"]
    assert verify(run.folder).problems == []


def test_a_removal_that_a_kill_cut_short_is_finished_at_the_next_prune(tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def cut_short(path, *given, **more):
        if "removed-policy" not in str(path):
            return rmtree(path, *given, **more)
        next(Path(path).iterdir()).unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(retention.storage.shutil, "rmtree", cut_short)
        go(recipe_in(tmp_path, TWO_TRAININGS), tmp_path / "run")
    assert list((tmp_path / "run").glob("round-*/*/removed-*"))
    run = go(recipe_in(tmp_path, TWO_TRAININGS), tmp_path / "run")
    assert list(run.folder.glob("round-*/*/removed-*")) == []
    assert checkpoints(run) == ["round-000/01-load", "round-003/05-again"]
    assert verify(run.folder).problems == []


def test_a_kill_between_the_last_seal_and_its_prune_is_caught_up_when_the_finished_run_is_opened(tmp_path, monkeypatch):
    def kill(run: Run, say) -> None:
        if len(run.sealed()) == 4:
            raise Killed

    recipe = recipe_in(tmp_path, TWO_TRAININGS)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("selfkd.chain.round.prune", kill)
        go(recipe, tmp_path / "run")
    run = selfkd.run(recipe, tmp_path / "run", Machine(backend="fake"))
    assert checkpoints(run) == ["round-000/01-load", "round-003/05-again"]
    assert run.paths.attempts() == [1]  # nothing was walked for it


def test_a_smaller_keep_of_a_finished_run_takes_effect_when_it_is_amended(tmp_path):
    run = go(recipe_in(tmp_path), tmp_path / "run")
    assert checkpoints(run) == ["round-000/01-load", "round-001/04-train", "round-002/04-train"]
    small = recipe_in(tmp_path, RECIPE, "keep.last=1")
    selfkd.run(small, tmp_path / "run", Machine(backend="fake"), amended=True)
    assert checkpoints(run) == ["round-000/01-load", "round-002/04-train"]


# ---- creation ----


def test_a_second_creator_is_refused_while_the_first_one_creates_and_takes_nothing_away(tmp_path, monkeypatch):
    recipe, machine = recipe_in(tmp_path), Machine(backend="fake")
    freeze_prompts = freeze.freeze_prompts

    def with_a_second_creator(*given):
        frozen = freeze_prompts(*given)
        with pytest.raises(BusyError):
            Run.open(recipe, tmp_path / "run", machine)
        return frozen

    monkeypatch.setattr(freeze, "freeze_prompts", with_a_second_creator)
    run = Run.open(recipe, tmp_path / "run", machine)
    assert verify(run.folder).problems == []
    assert len(list(run.paths.prompts.iterdir())) == 2


def test_a_second_creator_that_saw_no_run_finds_the_finished_one(tmp_path):
    recipe, machine = recipe_in(tmp_path), Machine(backend="fake")
    run = Run.open(recipe, tmp_path / "run", machine)
    created = run.paths.info.read_bytes()
    freeze.create(recipe, run.paths, machine)  # it looked before run.json was there, and comes to it now
    assert run.paths.info.read_bytes() == created
    assert verify(run.folder).problems == []


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.nightly)])
def test_killed_at_file_operations_of_creation_the_same_command_creates_the_run(tmp_path, step):
    machine = Machine(backend="fake")
    with Faults() as counted:
        Run.open(recipe_in(tmp_path / "whole"), tmp_path / "whole" / "run", machine)
    for at in range(0, counted.count, step):
        recipe = recipe_in(tmp_path / str(at))
        with Faults(at), pytest.raises(Killed):
            Run.open(recipe, tmp_path / str(at) / "run", machine)
        for done in (tmp_path / str(at) / "run/leases").glob("*.done"):
            done.unlink()  # a process that is gone leaves no such mark
        assert verify(Run.open(recipe, tmp_path / str(at) / "run", machine).folder).problems == [], f"operation {at}"


@pytest.mark.parametrize("number", ["EPERM", "ENOTSUP", "EXDEV", "EMLINK", "EIO"])
def test_a_file_system_without_hard_links_is_named_at_creation(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(getattr(errno, number), "no")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="this file system cannot link files") as error:
        go(recipe_in(tmp_path), tmp_path / "run")
    assert "--runs DIR" in error.value.fix
    assert not (tmp_path / "run/prompts").exists()


def test_a_removal_that_a_kill_cut_short_in_creation_is_no_hindrance(tmp_path):
    (tmp_path / "run/removed-prompts").mkdir(parents=True)
    (tmp_path / "run/removed-prompts/x").write_text("left")
    (tmp_path / "run/prompts").mkdir()
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    assert not (run.folder / "removed-prompts").exists()


# ---- what a run keeps inside ----


def test_the_resolved_recipe_runs_from_inside_the_run_folder_on_the_frozen_prompts_and_code(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(completion.endswith(answer))\n")
    (tmp_path / "hint.j2").write_text("{{ prompt.text }} Think of {{ prompt.hint }}.")
    text = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
    text = text.replace("{n: 3,", "{n: 3, template: hint.j2,")
    recipe_in(tmp_path, text)
    rows = [{"question": f"What is {1 + i} + {i}?", "answer": str(1 + 2 * i), "hint": f"h{i}"} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    first = go(load(str(tmp_path / "sums.yaml")), tmp_path / "runs/sums")
    moved = (tmp_path / "runs/sums").rename(tmp_path / "moved")
    for name in ("train.jsonl", "dev.jsonl", "mine.py", "hint.j2"):
        (tmp_path / name).unlink()
    monkeypatch.chdir(moved)
    again = go(load("recipe.resolved.yaml"), moved / "runs/again")
    assert [seal.metrics for seal in again.sealed()] == [seal.metrics for seal in Run.at(moved).sealed()]
    before, after = (run.samples(round=1).select("id", "text", "right") for run in (Run.at(moved), again))
    assert before.equals(after) and first.info.name == "sums"


def test_resume_before_the_model_is_loaded_finds_it_where_the_recipe_lay(tmp_path, monkeypatch):
    (tmp_path / "home/weights").mkdir(parents=True)
    Run.open(recipe_in(tmp_path / "home", RECIPE, "model=weights"), tmp_path / "run", Machine(backend="fake"))
    monkeypatch.chdir(tmp_path)
    step = Run.at(tmp_path / "run").recipe.steps_of(0)[0]
    assert step.source == {"path": str(tmp_path / "home/weights"), "revision": None}


def test_a_prompt_file_that_was_edited_beside_a_run_is_said_and_the_frozen_prompts_are_used(tmp_path):
    run = go(recipe_in(tmp_path), tmp_path / "run")
    assert run.remarks() == []
    recipe = recipe_in(tmp_path, RECIPE, "rounds=3")
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "Another?", "answer": "1"}) + "\n")
    run = go(recipe, tmp_path / "run")
    assert len(run.remarks()) == 1 and "prompts.train: train.jsonl was changed since the run was created" in run.remarks()[0]
    assert run.samples(round=3)["prompt"].n_unique() == 12


def test_a_round_of_a_hundred_steps_is_walked_and_verified(tmp_path):
    text = RECIPE.replace("  - sample: {n: 3, temperature: 0.8, max_tokens: 64}\n  - score: reward/number.py:last_number\n", "")
    text = text.replace(
        "steps:\n", "steps:\n  - repeat: {times: 50, steps: [sample: {n: 1, max_tokens: 64}, select: {per_prompt: 1}]}\n"
    )
    text = text.replace('  - select: {where: "last_number = 1", per_prompt: 2}\n', "").replace("rounds: 2", "rounds: 1")
    text = text.replace("{file: train.jsonl,", "{limit: 1, file: train.jsonl,").replace(
        "{loss: sft}", "{loss: sft, of: sample}"
    )
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    found = verify(run.folder)
    assert found.problems == [] and found.steps == 2 + 102
    assert [made.number for made in run.made(1).values()] == list(range(1, 103))
