"""Filters that gold did not choose by, in walked chains: what is recorded, where it is shown, and where there is nothing to say."""

from __future__ import annotations

import pytest
from chains import RECIPE, end, go, recipe_in
from rich.console import Console

from selfkd.chain.filtering import filters, recorded
from selfkd.chain.run import Run
from selfkd.report import compare, status
from selfkd.report.tables import print_status

HEAD = RECIPE[: RECIPE.index("steps:")] + "steps:\n  - sample: {n: 4, temperature: 0.8, max_tokens: 64}\n"
GOLD = "  - score: {reward: reward/number.py:last_number, as: right}\n"
VOTES = "  - score: {reward: reward/vote.py:share, as: votes}\n"
MEASURE = "  - measure: reward/number.py:last_number\n"
BY_VOTE = HEAD + VOTES + GOLD + "  - select: {where: votes >= 0.5, per_prompt: 1}\n  - train: sft\n" + MEASURE
BY_PAIR = (
    HEAD
    + VOTES
    + GOLD
    + '  - build: {kind: pair, chosen: "votes = MAX(votes) OVER (PARTITION BY prompt)", rejected: "votes < 1", where: "chosen_votes > rejected_votes"}\n'
    + "  - train: dpo\n"
    + MEASURE
)


def by_hand(run: Run, chosen: set[str]) -> tuple[float, float]:
    samples = run.samples(1, step="sample")
    rows = {prompt: list(zip(group["id"], group["right"], strict=True)) for (prompt,), group in samples.group_by("prompt")}
    kept = [right for answers in rows.values() for name, right in answers if name in chosen]
    gaps = []
    for answers in rows.values():
        mine = [right for name, right in answers if name in chosen]
        sampled = sum(right for _, right in answers) / len(answers)
        gaps.append((sum(mine) / len(mine) if mine else sampled) - sampled)
    return sum(kept) / len(kept), sum(gaps) / len(gaps)


@pytest.mark.parametrize(("text", "side"), [(BY_VOTE, "samples"), (BY_PAIR, "samples")])
def test_what_a_vote_keeps_is_held_against_gold_that_nobody_chose_by(tmp_path, text, side):
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    chosen = {ids[0] for ids in run.rows(1)[side].to_list()}  # of a pair, the chosen one
    (found,) = recorded(run.sealed()[1].notes)
    precision, gap = by_hand(run, chosen)
    assert found.gold == "right" and found.kept == len(chosen) and found.sampled == 48
    assert found.precision == pytest.approx(precision) and found.gap.value == pytest.approx(gap)
    assert list(found.auroc) == ["votes"]
    assert run.metrics()["right_precision"].to_list() == [None, pytest.approx(precision)]


def test_status_and_compare_say_it_and_a_kill_or_another_score_changes_no_digest(tmp_path):
    run = go(recipe_in(tmp_path, BY_VOTE, "rounds=1"), tmp_path / "run")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_status(status.read(run.folder), console)
    said = console.export_text()
    assert "round 1: by right, which did not choose: precision " in said and "AUROC of votes" in said
    go(recipe_in(tmp_path, BY_VOTE, "rounds=1"), tmp_path / "again")
    notes = compare.compare([run.folder, tmp_path / "again"]).notes
    assert sum("round 1 by right, which did not choose: precision" in note for note in notes) == 2
    assert end(run) == end(Run.at(tmp_path / "again"))


@pytest.mark.parametrize(
    "steps",
    [
        GOLD + "  - select: {where: right = 1}\n",
        GOLD + "  - score: {value: right * 2, as: doubled}\n  - select: {where: doubled >= 2}\n",
        VOTES + GOLD + "  - select: {where: votes >= 0.5, by: mean(right), per_prompt: 1}\n",
        VOTES + "  - select: {where: votes >= 0.5}\n",
    ],
)
def test_nothing_is_said_where_gold_chose_or_where_there_is_none(tmp_path, steps):
    run = go(recipe_in(tmp_path, HEAD + steps + "  - train: sft\n" + MEASURE, "rounds=1"), tmp_path / "run")
    assert "filter" not in run.sealed()[1].notes


def test_a_caller_may_name_the_gold_that_chose(tmp_path):
    text = HEAD + GOLD + "  - select: {where: right = 1}\n  - train: sft\n" + MEASURE
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    made = run.commits(run.sealed()[1])
    (found,) = filters(run.paths, made, lambda reference: run.function(reference, {}), "right")
    assert found.precision == 1.0 and found.gap.value > 0 and found.relative_gap <= 1


def test_a_function_over_tables_that_is_given_gold_may_have_chosen_by_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import polars as pl\n\n\ndef right_ones(samples, scores):\n"
        "    bad = scores.filter((pl.col('name') == 'right') & (pl.col('value') < 1))\n"
        "    return {'drops': bad.select(id='sample', reason=pl.lit('wrong'))}\n\n\n"
        "def short_ones(samples):\n    long = samples.filter(pl.col('chars') % 2 == 0)\n"
        "    return {'drops': long.select('id', reason=pl.lit('long'))}\n"
    )
    apply, rest = "  - apply: {function: mine.py:FN}\n", "  - train: sft\n" + MEASURE
    for name, text, known in (
        ("given", HEAD + GOLD + apply.replace("FN", "right_ones") + rest, []),
        ("before", HEAD + VOTES + apply.replace("FN", "short_ones") + GOLD + rest, ["right"]),
        ("blind", HEAD + GOLD + apply.replace("FN", "short_ones") + rest, ["right"]),
    ):
        run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / name)
        assert [one.gold for one in recorded(run.sealed()[1].notes)] == known, name
