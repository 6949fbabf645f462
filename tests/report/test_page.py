"""The page of a run, of several, of a sweep: what it says, in every state that a run may be in, from the records and nowhere else."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in, write_prompts
from pages import nothing, page, seen, sweep_in

import selfkd
from selfkd.backend.fake import Fake, adder
from selfkd.backend.machine import Machine
from selfkd.chain.run import Run
from selfkd.errors import SelfkdError, UsageError
from selfkd.report import status, sweeps
from selfkd.report.page import diagnostics, examples, noted, opened, story, write


@pytest.fixture(scope="module")
def text(done) -> str:
    return page(done)


# ---- a finished run ----


def test_the_page_of_a_run_says_first_what_was_gained_and_how_sure_that_is(done, text):
    said = seen(text)
    state = status.read(done)
    newest = state.rounds[2].measured["dev"]
    assert newest.change and newest.change.interval
    points = f"{100 * newest.change.value:+.1f} points"
    bounds = f"[{100 * newest.change.interval.low:z.1f}, {100 * newest.change.interval.high:z.1f}]"
    assert f"Gain over the base {points} {bounds}" in said.words
    assert (
        "Best round round 2 By no metric: the newest accepted round. All 2 rounds that the recipe asks for were made."
        in said.words
    )


def test_every_part_that_the_first_screen_promises_is_there(done, text):
    titles = [text for text in seen(text).said if text.strip()]
    for title in (
        *("Gain over the base", "Best round", "What it took", "Alarms", "dev/last_number by round", "What became of samples"),
        *("What the base could do, and what is left of it", "Go on from here", "Answers that changed", "Dropped in round 2"),
        *("Diagnostics by round", "Samples by round and verdict", "Training rows", "Recipe", "Lineage of each checkpoint"),
    ):
        assert title in titles


def test_the_funnel_is_that_of_the_seals_with_every_reason(done):
    found = story.funnel(opened.open_run(done))
    assert found
    for at, index in enumerate(found.rounds):
        sealed = dict(json.loads((done / f"round-{index:03d}" / "sealed.json").read_text())["notes"]["funnel"])
        assert found.samples[at] == sealed["samples"] and found.parts["kept"][at] == sealed["kept"]
        assert {f"dropped by {name}": counts[at] for name, counts in found.parts.items() if counts[at] and name != "kept"} == {
            name: count for name, count in sealed.items() if name.startswith("dropped")
        }


def test_what_rose_and_fell_is_counted_from_the_stored_scores(done):
    run = Run.at(done)
    before, after = (
        dict(run.samples(round=index, step="measure").select("prompt", "last_number").iter_rows()) for index in (0, 2)
    )
    found = examples.ledger(opened.open_run(done), 2)
    assert found and found.yes_no
    assert {prompt for prompt, _ in found.rose} == {one for one in before if after[one] > before[one]}
    assert {prompt for prompt, _ in found.fell} == {one for one in before if after[one] < before[one]}
    assert found.right == sum(before.values()) and found.still == sum(before[one] * after[one] for one in before)


def test_an_answer_that_became_right_stands_beside_what_the_base_said(done):
    run = opened.open_run(done)
    found = examples.ledger(run, 2)
    assert found and found.rose
    shown = examples.moved(run, 2, found.rose)
    texts = {
        index: dict(Run.at(done).samples(round=index, step="measure").select("id", "text").iter_rows()) for index in (0, 2)
    }
    for one in shown:
        assert (one.before.scores["last_number"], one.after.scores["last_number"]) == (0.0, 1.0)
        assert texts[0][one.before.id] == one.before.text and texts[2][one.after.id] == one.after.text
        assert one.wanted and one.wanted in one.after.text


def test_kept_share_coverage_and_diversity_are_what_the_tables_come_to(done):
    """Counted again from `Run.samples`: 12 prompts, three answers to each."""
    rows = Run.at(done).samples(round=1)
    found = {one.name: one for group in diagnostics.groups(opened.open_run(done)) for one in group.diagnostics}
    assert found["kept share"].values[1] == rows["kept"].sum() / rows.height
    by_prompt = rows.group_by("prompt").agg(pl.col("kept").any(), texts=pl.col("text").n_unique())
    assert found["coverage"].values[1] == pytest.approx(by_prompt["kept"].mean())
    assert found["diversity"].values[1] == pytest.approx(((by_prompt["texts"] - 1) / 2).mean())


def test_token_entropy_from_samples_is_minus_their_log_probability_per_token(done):
    """The fake's answers have 0.1 nats a token, and an end token on top that has none."""
    rows = Run.at(done).samples(round=1)
    found = {one.name: one for group in diagnostics.groups(opened.open_run(done)) for one in group.diagnostics}
    assert found["token entropy, from samples"].values[1] == pytest.approx(-rows["logprob"].sum() / rows["tokens"].sum())


def test_what_cannot_be_known_has_its_reason_and_no_number(done, text):
    found = {one.name: one for group in diagnostics.groups(opened.open_run(done)) for one in group.diagnostics}
    for name in ("pass@k", "vote share against accuracy", "KL to the base"):
        assert not found[name].known and found[name].reason
    said = seen(text).words
    assert f"KL to the base Not known: {found['KL to the base'].reason}." in said


def test_every_diagnostic_says_what_it_means(done):
    assert all(
        one.means.endswith((".", ": it should lose."))
        for group in diagnostics.groups(opened.open_run(done))
        for one in group.diagnostics
    )


def test_kl_to_the_base_is_the_mean_of_both_log_probabilities_over_tokens(tmp_path):
    text = RECIPE.replace("  - select:", '  - score: {logprob: "policy@base"}\n  - select:')
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    rows = run.samples(round=1)
    found = {one.name: one for group in diagnostics.groups(opened.open_run(run.folder)) for one in group.diagnostics}
    wanted = (rows["logprob"] - rows["logprob_of"]).sum() / rows["tokens"].sum()
    assert found["KL to the base"].values[1] == pytest.approx(wanted)


def figures(run: Run) -> dict[str, Any]:
    return {one.name: one for group in diagnostics.groups(opened.open_run(run.folder)) for one in group.diagnostics}


def test_what_a_filter_is_worth_is_what_its_round_recorded(tmp_path):
    """Votes choose, and gold that nothing names watches them."""
    text = RECIPE.replace(
        "  - score: reward/number.py:last_number",
        "  - score: {reward: reward/number.py:last_number, as: gold}\n  - score: {reward: reward/vote.py:share, as: votes}",
    )
    run = go(recipe_in(tmp_path, text.replace('"last_number = 1"', '"votes > 0.4"')), tmp_path / "run")
    found, recorded = figures(run), run.metrics()
    for name, column in (
        ("filter precision, by gold", "gold_precision"),
        ("GV gap, by gold", "gold_gap"),
        ("relative GV gap, by gold", "gold_relative_gap"),
        ("AUROC within prompts of votes, by gold", "gold_auroc_votes"),
    ):
        assert found[name].values == {index: recorded[column][index] for index in (1, 2)} and found[name].known
    low, high = recorded["gold_precision_low"][1], recorded["gold_precision_high"][1]
    assert found["filter precision, by gold"].bounds[1] == (low, high)


def test_a_filter_that_no_gold_watches_has_its_four_figures_missing_with_the_reason(done):
    found = figures(Run.at(done))
    for kind in noted.MEANS:
        assert not found[kind].known and found[kind].reason == noted.UNWATCHED


def test_how_far_engine_and_trainer_lie_apart_is_listed_by_update_or_why_it_is_not_known(done):
    seal = opened.open_run(done).seals[1]
    apart = {"train": {"mean": 0.01, "p99": 0.05, "floor": 0.02, "tokens": 9}}
    found = list(noted.of_engine([seal, replace(seal, round=2, notes={"engine_apart": apart})]))
    assert [(one.name.split(", ")[1], one.known) for one in found] == [
        ("mean", {2: 0.01}),
        ("p99", {2: 0.05}),
        ("floor", {2: 0.02}),
    ]
    [missing] = noted.of_engine([replace(seal, notes={"engine_apart": {"train": {"why": "dropout"}}})])
    assert not missing.known and missing.reason == "dropout"


def test_a_chart_has_its_numbers_in_words_too(done, text):
    [says] = [one for one in re.findall(r"<desc[^>]*>(.*?)</desc>", text) if "with 95 % intervals" in one]
    values = [one.measured["dev"].value for one in status.read(done).rounds]
    assert all(f"{100 * value:.1f} %" in says for value in values if value is not None)


def test_charts_take_their_colours_from_the_style_sheet(done, text):
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert drawn.count("<svg") > 5 and set(re.findall(r"#[0-9a-f]{6}", drawn)) <= {"#000000"}
    assert set(re.findall(r"var\(--([\w-]+)\)", drawn)) <= set(re.findall(r"--([\w-]+):", text))


def test_the_same_records_make_the_same_page_and_are_only_read(done, text):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    assert page(done) == text
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == before


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_every_colour_can_be_read_on_what_is_behind_it(text, place):
    """WCAG 2.2 AA: 4.5 to 1 for text; lines of charts, of which 3 to 1 is asked, have as much."""
    blocks = re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[place]))

    def contrast(one: str, other: str) -> float:
        high, low = sorted((luminance(colours[one]), luminance(colours[other])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    written = [name for name in colours if name in ("ink", "soft", "link", "good", "bad", "warn") or name.startswith("line-")]
    assert {
        (one, behind): contrast(one, behind) for one in written for behind in ("paper", "card") if contrast(one, behind) < 4.5
    } == {}
    assert min(contrast("ink", "learned"), contrast("ink", "against")) >= 4.5 and contrast("soft", "masked") >= 4.5


def test_from_python_a_run_has_the_same_page_with_commands_of_python(done, text):
    shown = selfkd.open(done).report()
    assert seen(shown).words.count("selfkd.open(") == 2 and len(shown) > len(text)
    assert shown._repr_html_().startswith("<iframe") and "<script" not in shown._repr_html_()


# ---- runs in every state ----


def test_a_run_in_which_nothing_was_made_yet_says_so(tmp_path):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    said = seen(page(run.folder)).words
    assert "No round is sealed yet." in said and "It has not begun: 0 of 2 rounds made." in said
    assert "No row was trained on." in said and "No answers were made yet." in said


def test_a_run_that_failed_in_its_first_round_shows_what_there_is(tmp_path):
    def broken(call: str) -> None:
        if call == "train":
            raise SelfkdError("the trainer is gone", "train", "Start it again.")

    recipe = recipe_in(tmp_path)
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    with pytest.raises(SelfkdError):
        go(recipe, tmp_path / "run", Fake(run.numerics, hook=broken))
    said = seen(page(run.folder)).words
    assert "there is no round to compare it with yet" in said
    assert "What became of samples No sealed round has drawn samples." in said
    assert "Round 1 kept" in said  # the samples of the round that broke can be read


def test_a_run_that_measures_nothing_says_what_would_tell(tmp_path):
    text = RECIPE[: RECIPE.index("  - measure")].replace("  dev: {file: dev.jsonl, prompt: question, answer: answer}\n", "")
    said = seen(page(go(recipe_in(tmp_path, text), tmp_path / "run").folder)).words
    assert "Nothing was measured, so nothing is known of a gain" in said and "Nothing was measured yet." in said


def test_one_round_after_the_base_makes_a_page(tmp_path):
    said = seen(page(go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run").folder)).words
    assert "All 1 round that the recipe asks for were made." in said


def test_a_round_that_was_rolled_back_is_marked_and_warned_of(tmp_path):
    recipe = recipe_in(tmp_path, f"{RECIPE}keep_if: dev_last_number > 2\n")
    said = seen(page(go(recipe, tmp_path / "run").folder)).words
    assert "round 1 (rolled back)" in said and "round 1 was rolled back: not dev_last_number > 2" in said
    assert "Best round base" in said and "No round is better than the base. dev/last_number: base" in said


def test_a_run_that_stopped_early_says_why(tmp_path):
    recipe = recipe_in(tmp_path, f"{RECIPE}stop: {{tokens: 10}}\n")
    said = seen(page(go(recipe, tmp_path / "run").folder)).words
    assert re.search(r"Stopped early after 1 of 2 rounds: \d+ tokens were generated, budget 10\.", said)


def test_a_changed_recipe_is_shown_with_its_changes(tmp_path):
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    run = go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run", amend=True)
    said = seen(page(run.folder)).words
    assert "It was changed 1 time" in said and "with 2 rounds sealed: rounds" in said


def test_judges_and_several_streams_have_their_place(tmp_path):
    judged = """
  - judge: {template: "{{ prompt.text }}\\n{{ of.text }}\\nMark it from 0 to 9: 3 + 4", parse: number, lowest: 0, highest: 9, name: judge}
"""
    text = RECIPE.replace("  - score:", f"{judged.strip(chr(10))}\n  - score:", 1)
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    said = seen(page(run.folder)).words
    assert "judgments (" in said and "judge: unread" in said


def test_a_table_that_is_gone_leaves_a_page_that_says_so(tmp_path, done):
    copy = shutil.copytree(done, tmp_path / "copy")
    for path in copy.glob("round-002/*/*.parquet"):
        path.unlink()
    said = seen(page(copy)).words
    assert "Gain over the base" in said and "their tables are not on disk" in said


def many_rounds(folder: Path, rounds: int) -> Path:
    few = ("prompts.train.limit=1", "prompts.dev.limit=3", "sample.n=8")
    return go(recipe_in(folder, RECIPE, f"rounds={rounds}", *few), folder / "run").folder


def test_a_run_of_many_rounds_shows_some_of_them_and_says_so(tmp_path):
    said = seen(page(many_rounds(tmp_path, 16))).words
    assert "All 17 rounds in numbers" in said and re.search(r"Of 17 rounds 1[12] are shown\.", said)
    assert re.search(r"in some rounds; [67] more stand in the chart", said)


@pytest.mark.nightly
def test_a_hundred_rounds_make_a_page_that_can_be_read(tmp_path):
    text = page(many_rounds(tmp_path, 100))
    assert "All 101 rounds in numbers" in seen(text).words and len(text) < 2_000_000


@pytest.mark.nightly
def test_ten_thousand_samples_make_a_page_of_well_under_five_megabytes(tmp_path):
    recipe = recipe_in(tmp_path, RECIPE, "rounds=5", "sample.n=4", "sample.max_tokens=900", "chunk=256")
    write_prompts(tmp_path, train=500, dev=200)
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    go(recipe, run.folder, Fake(run.numerics, lambda *asked: "Let us think step by step. " * 30 + adder(*asked)))
    assert sum(one.samples or 0 for one in status.rounds(run.paths)) == 10_000
    assert len(page(run.folder).encode()) < 1_000_000


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no run here"):
        page(tmp_path)


# ---- controls, several runs, sweeps ----


def test_a_control_beside_the_run_is_drawn_where_it_measured_the_same(tmp_path):
    recipe = recipe_in(tmp_path)
    method = go(recipe, tmp_path / "runs/sums").folder
    control = recipe.model_copy(update={"name": "sums-random-reward", "control": "random-reward"})
    go(control, tmp_path / "runs/sums-random-reward")
    go(control.model_copy(update={"seed": 7}), tmp_path / "runs/other-seed")
    [found] = story.controls(opened.open_run(method))
    assert found.control == "random-reward" and sorted(found.values) == [0, 1, 2]
    assert "control random-reward: base" in page(method)


def test_runs_side_by_side_are_compared_as_compare_does(tmp_path):
    one = go(recipe_in(tmp_path), tmp_path / "one").folder
    other = go(recipe_in(tmp_path, RECIPE, "seed=1"), tmp_path / "other").folder
    said = seen(page(one, other)).words
    assert "2 runs side by side" in said and "at equal tokens" in said and said.count("Lineage of each checkpoint") == 2


def test_runs_that_cannot_be_compared_each_have_their_part_and_the_reason(tmp_path, done):
    write_prompts(tmp_path)
    text = RECIPE.replace("measure: reward/number.py:last_number", "measure: {reward: reward/number.py:last_number, as: other}")
    other = go(recipe_in(tmp_path, text), tmp_path / "other").folder
    said = seen(page(done, other)).words
    assert "These runs cannot be set side by side" in said and said.count("Gain over the base") == 2


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    return sweep_in(tmp_path_factory.mktemp("sweep"))


def test_a_sweep_with_missing_arms_says_which(swept):
    said = seen(write.of_sweep(swept, nothing)).words
    assert "not run" in said and "sums-random-reward" in said and "What it found" in said


def test_a_sweep_is_the_same_from_the_file_of_its_results(swept, tmp_path):
    (tmp_path / "results.jsonl").write_text(sweeps.lines(swept))
    assert seen(write.of_sweep(tmp_path / "results.jsonl", nothing)).words == seen(write.of_sweep(swept, nothing)).words


# ---- Markdown ----


def test_the_markdown_has_the_same_figures(done):
    text = page(done, html=False)
    state = status.read(done)
    last = state.rounds[2].measured["dev"]
    assert last.change and f"**{100 * last.change.value:+.1f} points**" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for table in tables:
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.strip().split("\n")}
        assert len(widths) == 1, table
    assert len(tables) >= 4
