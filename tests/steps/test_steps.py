"""What each verb adds, seen through the tables it leaves in the run."""

from __future__ import annotations

import json
import re
from itertools import combinations

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.measured import measurements
from selfkd.chain.run import Run
from selfkd.errors import RecipeError, RewardError
from selfkd.steps.measure import Figure, by_prompt

HEAD = RECIPE[: RECIPE.index("steps:")]


def run_of(folder, steps: str, *overrides: str, backend: Fake | None = None) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + steps, *overrides), folder / "run", backend)


def table(run: Run, step: str, name: str, index: int = 1) -> pl.DataFrame:
    paths = run.made(index)[step].tables[name].files
    return pl.concat([pl.read_parquet(run.folder / path) for path in paths])


def notes(run: Run, step: str, index: int = 1) -> dict:
    return dict(run.made(index)[step].notes)


SAMPLE = "  - sample: {n: 4, temperature: 0.8, max_tokens: 64}\n"
SCORE = "  - score: reward/number.py:last_number\n"


def test_each_prompt_is_answered_n_times_with_seeds_of_its_own(tmp_path):
    samples = table(run_of(tmp_path, SAMPLE, "rounds=1"), "sample", "samples")
    assert samples.height == 12 * 4
    assert samples["seed"].n_unique() == samples["id"].n_unique() == samples.height
    assert samples.group_by("prompt").len()["len"].unique().to_list() == [4]


def test_a_template_is_what_the_teacher_sees_and_never_what_the_student_is_trained_on(tmp_path):
    steps = "  - sample: {template: 'The answer is {{ prompt.answer }}. {{ prompt.text }}', told: own, system: Be brief., max_tokens: 64}\n  - train: sft\n"
    run = run_of(tmp_path, steps, "rounds=1")
    asked, rows = table(run, "sample", "samples"), table(run, "train", "rows")
    assert all(
        messages[0]["content"] == "Be brief." and "The answer is" in messages[1]["content"]
        for messages in asked["teacher_messages"]
    )
    assert all(len(messages) == 1 and "The answer is" not in messages[0]["content"] for messages in rows["messages"])


def test_role_lines_in_prompts_gold_answers_and_samples_are_text(tmp_path):
    prompt, gold, said = "Fix this diff:\n--- user\n+++ b/user", "one\n--- user\ntwo", "three\n--- system\nfour"
    head = HEAD.replace(
        "{file: train.jsonl, prompt: question, answer: answer}", json.dumps([{"prompt": prompt, "answer": gold}])
    )
    teacher = json.dumps("--- system\nBe brief.\n--- user\n{{ of.text }}\n{{ prompt }}")
    steps = f"steps:\n  - gold\n  - sample: {{max_tokens: 64}}\n  - sample: {{of: sample, template: {teacher}, as: again, max_tokens: 64}}\n"
    recipe = recipe_in(tmp_path, head + steps, "rounds=1")
    numerics = Run.open(recipe, tmp_path / "run", Machine(backend="fake")).numerics
    run = go(recipe, tmp_path / "run", Fake(numerics, lambda messages, seed, skill: said))
    assert table(run, "gold", "samples")["text"].to_list() == [gold]
    assert table(run, "sample-2", "samples")["teacher_messages"][0].to_list() == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{said}\n{prompt}"},
    ]


def test_only_prompts_without_a_right_answer_are_asked_again(tmp_path):
    steps = SAMPLE.replace("n: 4", "n: 1") + SCORE + "  - sample: {where: 'last_number_max < 1', as: again, max_tokens: 64}\n"
    run = run_of(tmp_path, steps, "rounds=1")
    first, again = table(run, "sample", "samples"), table(run, "sample-2", "samples")
    wrong = table(run, "score", "scores").filter(pl.col("value") < 1)
    assert 0 < again.height < 12
    assert set(again["prompt"]) == set(first.join(wrong, left_on="id", right_on="sample", how="semi")["prompt"])


def test_a_sample_about_a_sample_names_its_parent(tmp_path):
    steps = SAMPLE + "  - sample: {of: sample, template: 'Improve: {{ of.text }}', as: better, max_tokens: 64}\n"
    run = run_of(tmp_path, steps, "rounds=1")
    first, better = table(run, "sample", "samples"), table(run, "sample-2", "samples")
    assert sorted(better["parents"].explode()) == sorted(first["id"])
    texts = dict(first.select("id", "text").iter_rows())
    assert all(
        row["teacher_messages"][-1]["content"] == f"Improve: {texts[row['parents'][0]]}" for row in better.iter_rows(named=True)
    )


def test_select_filters_then_caps_and_every_drop_has_its_reason(tmp_path):
    run = run_of(tmp_path, SAMPLE + SCORE + "  - select: {where: 'last_number = 1', per_prompt: 1}\n", "rounds=1", "sample.n=8")
    drops, scores = table(run, "select", "drops"), table(run, "score", "scores")
    reasons = dict(drops.group_by("reason").len().iter_rows())
    right = int(scores["value"].sum())
    solved = (
        scores.join(table(run, "sample", "samples"), left_on="sample", right_on="id")
        .filter(pl.col("value") == 1)["prompt"]
        .n_unique()
    )
    assert reasons == {"not last_number = 1": 96 - right, "more than 1 per prompt": right - solved}


def test_an_unscored_sample_is_dropped_as_unscored_and_not_as_wrong(tmp_path):
    (tmp_path / "half.py").write_text("def half(sample):\n    return None if sample['number'] % 2 else 1.0\n")
    run = run_of(tmp_path, SAMPLE + "  - score: half.py:half\n  - select: half = 1\n", "rounds=1")
    assert dict(table(run, "select", "drops").group_by("reason").len().iter_rows()) == {"unscored": 24}
    assert table(run, "score", "scores")["value"].null_count() == 24


def test_repeats_are_dropped_within_a_prompt_and_a_limit_holds_in_all(tmp_path):
    run = run_of(
        tmp_path,
        SAMPLE + "  - select: {dedup: text, limit: 5, by: '-chars'}\n",
        "rounds=1",
        backend=Fake({}, lambda m, s, k: "same"),
    )
    reasons = dict(table(run, "select", "drops").group_by("reason").len().iter_rows())
    assert reasons == {"repeat": 36, "over the limit of 5": 7}


def test_a_reward_that_fails_too_often_stops_the_round_and_says_how_often(tmp_path):
    (tmp_path / "bad.py").write_text("def bad(sample):\n    return 1 / (sample['number'] % 2)\n")
    with pytest.raises(RewardError, match=r"samples \(\d+\.\d%\) could not be scored, limit 1%.*ZeroDivisionError"):
        run_of(tmp_path, SAMPLE + "  - score: bad.py:bad\n", "rounds=1")


@pytest.mark.parametrize(
    ("odd", "max_failed", "stops"),
    [
        (1, 0.01, False),  # 1 of 48 is 2 %, and one odd answer is no broken reward
        (2, 0.01, True),
        (2, 0.05, False),  # 2 of 48 are 4 %
        (3, 0.05, True),
        (1, 0.0, True),
    ],
)
def test_one_sample_of_few_may_fail_and_more_only_up_to_the_share(tmp_path, odd, max_failed, stops):
    fails = "def odd(sample, answer, meta):\n    assert sample['number'] or int(answer) >= LIMIT\n    return 1.0\n"
    (tmp_path / "odd.py").write_text(f"LIMIT = {10 + 2 * odd}\n" + fails)  # answers are 10, 12, 14, …
    steps = SAMPLE + f"  - score: {{reward: odd.py:odd, max_failed: {max_failed}}}\n"
    if stops:
        with pytest.raises(RewardError, match=rf"\d+ of \d+ samples .* limit {max_failed:.0%}"):
            run_of(tmp_path, steps, "rounds=1")
    else:
        assert table(run_of(tmp_path, steps, "rounds=1"), "score", "scores")["value"].null_count() == odd


def test_the_only_sample_may_not_fail(tmp_path):
    (tmp_path / "bad.py").write_text("def bad(completion):\n    return 1 / 0\n")
    with pytest.raises(RewardError, match=r"1 of 1 samples(.|\n)*with --amend(.|\n)*new run: --name X(.|\n)*raise max_failed"):
        run_of(
            tmp_path, "  - sample: {n: 1}\n  - score: bad.py:bad\n", "rounds=1", "prompts.train.limit=1", "sample.max_tokens=64"
        )


def test_pairs_walk_both_lists_side_by_side_and_none_is_made_twice(tmp_path):
    build = "  - build: {kind: pair, chosen: 'last_number = 1', rejected: 'last_number = 0', per_prompt: 3}\n  - train: dpo\n"
    run = run_of(tmp_path, SAMPLE + SCORE + build, "rounds=1", "sample.n=6")
    rows, scores = table(run, "build", "rows"), dict(table(run, "score", "scores").select("sample", "value").iter_rows())
    assert rows.height > 0
    assert all((scores[chosen], scores[rejected]) == (1.0, 0.0) for chosen, rejected in rows["samples"])
    assert len({tuple(pair) for pair in rows["samples"]}) == rows.height


def test_spin_pairs_the_gold_answer_with_the_own_one(tmp_path):
    steps = (
        SAMPLE.replace("n: 4", "n: 1")
        + "  - gold: '{{ prompt.answer }}'\n  - build: {kind: pair, chosen: gold, rejected: sample}\n  - train: dpo\n"
    )
    run = run_of(tmp_path, steps, "rounds=1")
    rows = table(run, "build", "rows")
    assert rows.height == 12
    assert rows["chosen"].str.contains(r"^\d+$").all() and rows["chosen_ids"].null_count() == 12 and rows["chosen_ended"].all()


def test_replay_brings_back_what_earlier_rounds_kept_and_scores_come_along(tmp_path):
    steps = SAMPLE + SCORE + "  - replay: 1\n  - select: last_number = 1\n  - train: sft\n"
    run = run_of(tmp_path, steps, "rounds=3")
    kept = [record.notes["funnel"][-1][1] for record in run.sealed()]
    assert table(run, "replay", "samples", 2).height == kept[1]
    assert table(run, "replay", "scores", 2)["value"].unique().to_list() == [1.0]
    assert kept[2] > kept[1]


def test_a_view_list_fans_out_into_one_row_each(tmp_path):
    steps = SAMPLE + "  - build: {kind: sft, view: ['{{ prompt.text }}', 'Short: {{ prompt.text }}']}\n  - train: sft\n"
    rows = table(run_of(tmp_path, steps, "rounds=1"), "build", "rows")
    assert rows.height == 2 * 48 and rows["id"].n_unique() == 96
    assert sum(messages[-1]["content"].startswith("Short: ") for messages in rows["messages"]) == 48


def test_a_weight_is_an_expression_over_the_sample(tmp_path):
    rows = table(
        run_of(tmp_path, SAMPLE + SCORE + "  - build: {weight: '0.5 + last_number'}\n  - train: sft\n", "rounds=1"),
        "build",
        "rows",
    )
    assert set(rows["weight"].unique()) == {0.5, 1.5}


def test_a_model_scores_samples_by_their_log_probability(tmp_path):
    run = run_of(
        tmp_path,
        SAMPLE + "  - score: {logprob: policy@base, as: fluency}\n  - select: fluency < 0\n  - train: sft\n",
        "rounds=1",
    )
    assert (table(run, "score", "scores")["value"] < 0).all()


def test_a_log_probability_that_is_no_number_is_unscored_and_leaves_means_alone(tmp_path):
    class Odd(Fake):
        def logprobs(self, *arguments):
            for place, (sample, _, tokens) in enumerate(super().logprobs(*arguments)):
                yield sample, (-1.0, float("nan"), -3.0, float("-inf"))[place % 4], tokens

    steps = (
        SAMPLE
        + "  - score: {logprob: policy@base, as: fluency, max_failed: 1}\n  - sample: {where: 'fluency_mean = -2', as: again}\n"
    )
    run = run_of(tmp_path, steps, "rounds=1", backend=Odd({}))
    scores = table(run, "score", "scores")
    assert dict(scores.group_by("value").len().iter_rows()) == {-1.0: 12, -3.0: 12, None: 24}
    assert set(scores.filter(pl.col("value").is_null())["why"]) == {"log-probability nan", "log-probability -inf"}
    assert table(run, "sample-2", "samples").height == 12  # every prompt has a -1, a -3 and two that do not count


def test_measured_answers_never_enter_the_pool(tmp_path):
    run = run_of(tmp_path, SAMPLE + "  - measure: reward/number.py:last_number\n  - train: sft\n", "rounds=1")
    assert table(run, "measure", "samples")["stream"].unique().to_list() == ["dev"]
    assert table(run, "train", "rows").height == 48
    metrics = run.sealed()[1].metrics
    assert metrics["dev/prompts"] == metrics["dev/last_number_scored"] == 6 and 0 <= metrics["dev/last_number"] <= 1


HALF = "def half(answer):\n    return None if int(answer) % 4 else 1.0\n"
NEVER = "def never(answer):\n    return None\n"


def test_prompts_without_a_score_are_counted_beside_the_mean(tmp_path):
    """Gold answers of dev are 60, 62, … 70: three of the six can be divided by 4."""
    (tmp_path / "half.py").write_text(HALF)
    metrics = run_of(tmp_path, SAMPLE + "  - measure: half.py:half\n  - train: sft\n", "rounds=1").sealed()[1].metrics
    assert (metrics["dev/half"], metrics["dev/half_scored"], metrics["dev/prompts"]) == (1.0, 3, 6)


STEERED = """rounds: 3
best: {metric: dev/never, mode: max}
keep_if: dev_never >= prev_dev_never
stop: {patience: 1, metric: dev/never}
"""


def test_a_reward_that_abstains_on_every_held_out_answer_gives_a_null_and_steers_nothing(tmp_path):
    (tmp_path / "never.py").write_text(NEVER)
    text = (HEAD + "steps:\n" + SAMPLE + "  - train: sft\n  - measure: never.py:never\n").replace("rounds: 2\n", STEERED)
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert [(seal.metrics["dev/never"], seal.metrics["dev/never_scored"]) for seal in run.sealed()] == [(None, 0)] * 4
    assert [(seal.accepted, seal.why) for seal in run.sealed()[1:]] == [
        (False, "could not judge dev_never >= prev_dev_never")
    ] * 3
    assert {seal.stop for seal in run.sealed()} == {""}


def test_the_mean_of_a_prompt_does_not_depend_on_the_order_of_its_answers():
    """Added up in the first order the values give 2 / 4, in the second 3 / 4; exactly they are 3 / 4. A NaN does not count."""
    values = [1e16, 1.0, -1e16, 2.0, float("nan")]
    for order in ([0, 1, 2, 3, 4], [0, 2, 1, 3, 4], [4, 3, 2, 1, 0]):
        view = pl.DataFrame({"prompt": ["p"] * 5, "id": [f"i{at}" for at in order], "right": [values[at] for at in order]})
        assert by_prompt(view, Figure("right")) == {"p": 0.75}


def test_numbers_may_be_lists_one_entry_per_round(tmp_path):
    run = run_of(tmp_path, "  - sample: {n: [1, 2], max_tokens: 64}\n  - train: sft\n", "rounds=3")
    assert [table(run, "sample", "samples", index).height for index in (1, 2, 3)] == [12, 24, 24]


def test_take_draws_the_next_prompts_each_round_and_wraps_around(tmp_path):
    text = HEAD.replace("prompts:\n", "prompts:\n  take: 5\n") + "steps:\n  - sample: {max_tokens: 64}\n  - train: sft\n"
    run = go(recipe_in(tmp_path, text, "rounds=3"), tmp_path / "run")
    drawn = [set(table(run, "sample", "samples", index)["prompt"]) for index in (1, 2, 3)]
    assert [len(prompts) for prompts in drawn] == [5, 5, 5]
    assert len(drawn[0] | drawn[1]) == 10 and len(drawn[0] & drawn[2]) == 3


def test_training_starts_where_the_recipe_says(tmp_path):
    steps = SAMPLE + "  - train: {loss: sft, from: base}\n"
    seen: list[str] = []

    class Watching(Fake):
        def train(self, start, *arguments):
            seen.append(start.digest)
            return super().train(start, *arguments)

    run = run_of(tmp_path, steps, "rounds=3", backend=Watching({}))
    assert set(seen) == {run.sealed()[0].models["policy"].digest}


def with_test_split(folder) -> str:
    """RECIPE with a test split of one prompt, whose file is written into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / "test.jsonl").write_text('{"question": "What is 90 + 1?", "answer": "91"}\n')
    return RECIPE.replace("prompts:\n", "prompts:\n  test: {file: test.jsonl, prompt: question, answer: answer}\n")


def test_the_test_split_is_measured_at_the_base_and_at_the_end_only(tmp_path):
    run = go(recipe_in(tmp_path, with_test_split(tmp_path), "rounds=3"), tmp_path / "run")
    assert ["test/last_number" in record.metrics for record in run.sealed()] == [True, False, False, True]


def test_a_run_that_stops_early_says_why_and_still_measures_the_test_split(tmp_path):
    text = with_test_split(tmp_path).replace("rounds: 2", "rounds: 9\nstop: {patience: 1, metric: dev/chars, mode: min}")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert len(run.sealed()) < 10
    assert run.sealed()[-1].stop.endswith("did not improve for 1 round") and "test/last_number" in run.sealed()[-1].metrics


def test_an_unknown_column_is_named_with_the_nearest_one(tmp_path):
    with pytest.raises(RecipeError, match="last_nmber"):
        run_of(tmp_path, SAMPLE + SCORE + "  - select: last_nmber = 1\n", "rounds=1")


def test_a_vote_counts_the_samples_that_were_scored_before_and_scores_only_the_new_ones(tmp_path):
    """Three samples are scored, two are added: the second call sees five, and only the two get their first score."""
    (tmp_path / "size.py").write_text("def size(completions):\n    return [float(len(completions))] * len(completions)\n")
    score = "  - score: size.py:size\n"
    steps = SAMPLE.replace("n: 4", "n: 3") + score + "  - sample: {n: 2, temperature: 0.8, as: again, max_tokens: 64}\n" + score
    run = run_of(tmp_path, steps, "rounds=1")
    first, second = table(run, "score", "scores"), table(run, "score-2", "scores")
    assert first["value"].to_list() == [3.0] * 36 and second["value"].to_list() == [5.0] * 24
    assert set(second["sample"]) == set(table(run, "sample-2", "samples")["id"])


def test_a_group_reward_of_one_stream_sees_that_stream_alone(tmp_path):
    (tmp_path / "size.py").write_text("def size(completions):\n    return [float(len(completions))] * len(completions)\n")
    steps = (
        SAMPLE
        + "  - sample: {n: 2, temperature: 0.8, as: again, max_tokens: 64}\n  - score: {reward: size.py:size, of: again}\n"
    )
    assert table(run_of(tmp_path, steps, "rounds=1"), "score", "scores")["value"].to_list() == [2.0] * 24


def test_a_judge_of_a_run_sees_the_key_that_the_machine_names_and_no_other(tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text("import os\ndef judged(completion): return os.environ['JUDGE_API_KEY'] == 'x'\n")
    monkeypatch.setenv("JUDGE_API_KEY", "x")
    recipe = recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + "  - score: judge.py:judged\n", "rounds=1")
    run = Run.open(recipe, tmp_path / "allowed", Machine(backend="fake", environment=["JUDGE_API_KEY"]))
    walk(run, Fake({}), run.begin())
    assert table(run, "score", "scores")["value"].to_list() == [1.0] * 48
    with pytest.raises(RewardError, match=r"KeyError: 'JUDGE_API_KEY'(.|\n)*environment: \[JUDGE_API_KEY\]"):
        go(recipe, tmp_path / "withheld")


# ---- names and columns ----


def test_a_score_is_recorded_under_the_name_it_was_given(tmp_path):
    steps = SAMPLE + "  - score: {reward: [reward/number.py:last_number, reward/number.py:answer_line], as: [any_form, form]}\n"
    measure = "  - measure: {reward: reward/number.py:last_number, as: right}\n"
    run = run_of(tmp_path, steps + "  - train: sft\n" + measure, "rounds=1")
    assert table(run, "score", "scores")["name"].unique().sort().to_list() == ["any_form", "form"]
    assert table(run, "measure", "scores")["name"].unique().to_list() == ["right"]
    metrics = run.sealed()[1].metrics
    assert 0 <= metrics["dev/right"] <= 1 and "dev/last_number" not in metrics
    assert measurements(run.paths, run.commits(run.sealed()[1]))["dev"].name == "dev/right"


def test_a_score_that_no_sample_has_is_null_and_stops_no_round(tmp_path):
    (tmp_path / "late.py").write_text("def late(completion):\n    return 1.0\n")
    again = (
        "  - sample: {where: 'last_number_max < 1', as: again, max_tokens: 64}\n  - score: {reward: late.py:late, of: again}\n"
    )
    select = "  - select: {where: 'late IS NULL AND late_or_right = 1'}\n".replace(
        "late_or_right", "COALESCE(late, last_number)"
    )
    right = Fake({}, lambda messages, seed, skill: f"{eval_sum(messages)}")
    run = run_of(tmp_path, SAMPLE + SCORE + again + select + "  - train: sft\n", "rounds=1", backend=right)
    assert table(run, "train", "rows").height == 48


def eval_sum(messages) -> int:
    """The answer of "What is 10 + 1?"."""
    first, second = messages[-1]["content"].removeprefix("What is ").removesuffix("?").split(" + ")
    return int(first) + int(second)


def test_scores_of_earlier_rounds_are_columns_in_the_first_round_too(tmp_path):
    steps = "  - replay\n  - select: {where: 'last_number = 1'}\n" + SAMPLE + SCORE + "  - train: sft\n"
    run = run_of(tmp_path, steps, "rounds=2")
    assert table(run, "train", "rows", 1).height == 48


# ---- pairs of equal texts ----

PAIRS = SAMPLE + "  - gold\n  - build: {kind: pair, chosen: gold, rejected: sample, per_prompt: 4%s}\n  - train: dpo\n"


def half_right(messages, seed, skill) -> str:
    """The gold answer itself for every second seed."""
    return str(eval_sum(messages)) if seed % 2 else "no idea"


def test_pairs_of_two_equal_texts_are_dropped_with_the_reason(tmp_path):
    run = run_of(tmp_path, PAIRS % "", "rounds=1", backend=Fake({}, half_right))
    rows, drops = table(run, "build", "rows"), table(run, "build", "drops")
    equal = int((table(run, "sample", "samples")["text"] != "no idea").sum())
    assert 0 < equal < 48
    assert rows.height == 48 - equal and (rows["chosen"] != rows["rejected"]).all()
    assert drops.height == equal and drops["reason"].unique().to_list() == ["chosen equals rejected"]
    assert not set(drops["id"]) & set(rows["id"])
    assert ["dropped by build: chosen equals rejected", equal] in [list(one) for one in run.sealed()[1].notes["funnel"]]


def test_pairs_may_be_filtered_by_their_texts(tmp_path):
    where = ", where: 'chosen_text <> rejected_text AND LENGTH(rejected_text) > 2', weight: 'LENGTH(chosen_text)'"
    run = run_of(tmp_path, PAIRS % where, "rounds=1", backend=Fake({}, half_right))
    rows = table(run, "build", "rows")
    assert rows.height > 0 and rows["rejected"].unique().to_list() == ["no idea"]
    assert (rows["weight"] == rows["chosen"].str.len_bytes()).all()
    assert "drops" not in run.made(1)["build"].tables


# ---- measuring as sampling ----


def test_measure_asks_with_the_stop_strings_top_k_system_and_options_that_it_was_given(tmp_path):
    asked = []

    class Watching(Fake):
        def generate(self, model, chunks, sampling, *rest):
            asked.append((chunks[0].stream, sampling, chunks[0].requests["teacher_messages"][0][0]))
            return super().generate(model, chunks, sampling, *rest)

    words = "reward: reward/number.py:last_number, stop: ['Question:'], top_k: 5, system: Be brief., vllm: {min_p: 0.1}"
    run_of(tmp_path, SAMPLE + f"  - train: sft\n  - measure: {{{words}}}\n", "rounds=1", backend=Watching({}))
    stream, sampling, first = asked[0]
    assert stream == "dev" and first == {"role": "system", "content": "Be brief."}
    assert (sampling.stop, sampling.top_k, sampling.extra, sampling.temperature) == (("Question:",), 5, {"min_p": 0.1}, 0.0)


PASS = "  - train: sft\n  - measure: {reward: size.py:even, n: 5, temperature: 1, pass_at: 2}\n"
EVEN = "def even(completion, answer):\n    return None if completion.endswith('7') else float(int(completion[-1]) % 2 == 0)\n"


def test_pass_at_k_is_measured_prompt_by_prompt_and_an_expression_may_name_it(tmp_path):
    (tmp_path / "size.py").write_text(EVEN)
    text = HEAD.replace("rounds: 2\n", "rounds: 2\nbest: {metric: dev/even_pass_2}\nkeep_if: dev_even_pass_2 >= 0\n")
    run = go(recipe_in(tmp_path, text + "steps:\n" + SAMPLE + PASS.replace("even,", "even, max_failed: 1,")), tmp_path / "run")
    answers = table(run, "measure", "samples", 1).select("prompt", right=pl.col("id"))
    values = dict(table(run, "measure", "scores", 1).select("sample", "value").iter_rows())
    chances = []
    for _, group in answers.group_by("prompt"):
        marks = [mark for sample in group["right"] if (mark := values[sample]) is not None]
        draws = list(combinations(marks, 2))  # every way to draw two of the answers, as if one tried them all
        chances += [sum(max(two) for two in draws) / len(draws)] if draws else []
    found = run.sealed()[1]
    assert found.metrics["dev/even_pass_2"] == pytest.approx(sum(chances) / len(chances))
    assert 0 < found.metrics["dev/even"] < found.metrics["dev/even_pass_2"]
    noted = found.notes["measured"]["dev/even_pass_2"]
    assert (
        noted["value"] == found.metrics["dev/even_pass_2"]
        and noted["interval"]["low"] < noted["value"] <= noted["interval"]["high"]
    )
    assert noted["change"]["prompts"] == noted["scored"] == len(chances)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("n: 4, temperature: 1, pass_at: 8", "8 answers cannot be drawn of 4: raise n, to 32"),
        ("n: 8, pass_at: 8", "at temperature 0 the answers to a prompt are all the same"),
        ("n: 8, temperature: 1, pass_at: 1", "pass_at"),
    ],
)
def test_a_pass_at_k_that_says_nothing_is_refused_at_its_line(tmp_path, words, said):
    (tmp_path / "size.py").write_text(EVEN)
    with pytest.raises(RecipeError, match=re.escape(said)):
        run_of(tmp_path, SAMPLE + f"  - train: sft\n  - measure: {{reward: size.py:even, {words}}}\n")


def test_a_run_may_begin_to_measure_pass_at_k_and_its_other_figures_stay_comparable(tmp_path):
    (tmp_path / "size.py").write_text(EVEN)
    steps = "steps:\n" + SAMPLE + PASS.replace("even,", "even, max_failed: 1,")
    go(recipe_in(tmp_path, HEAD + steps.replace(", pass_at: 2", "")), tmp_path / "run")
    run = go(recipe_in(tmp_path, HEAD + steps, "rounds=3"), tmp_path / "run", amend=True)
    later = run.sealed()[3].notes["measured"]
    assert later["dev"]["change"] is not None and not later["dev"]["differently"]
    assert later["dev/even_pass_2"]["change"] is None  # the base has none


@pytest.mark.parametrize("name", ["even_pass_2", "even_scored"])
def test_a_figure_that_two_measure_steps_call_alike_is_refused(tmp_path, name):
    (tmp_path / "size.py").write_text(EVEN)
    first = f"  - measure: {{name: m1, reward: size.py:even, as: {name}}}\n"
    second = "  - measure: {name: m2, reward: size.py:even, n: 5, temperature: 1, pass_at: 2}\n"
    for steps in (first + second, second + first):
        with pytest.raises(RecipeError, match=f"measures dev/{name} already"):
            run_of(tmp_path, SAMPLE + "  - train: sft\n" + steps)


VOTED = "  - train: sft\n  - measure: {reward: size.py:even, n: 5, temperature: 1, vote: size.py:crowd}\n"
CROWD = (
    "\n\ndef crowd(completions):\n    ends = [text[-1] for text in completions]\n    return [ends.count(end) for end in ends]\n"
)


def test_what_a_vote_gets_is_the_mean_score_of_the_answers_that_win_it(tmp_path):
    (tmp_path / "size.py").write_text(EVEN.replace("None if completion.endswith('7') else ", "") + CROWD)
    run = go(recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + VOTED, "best.metric=dev/even_maj_5"), tmp_path / "run")
    by_hand = []
    for _, group in run.samples(1, step="measure").group_by("prompt"):
        ends = [text[-1] for text in group["text"]]
        most = max(ends.count(end) for end in ends)
        won = [int(end) % 2 == 0 for end in ends if ends.count(end) == most]
        by_hand.append(sum(won) / len(won))
    seal = run.sealed()[1]
    assert seal.metrics["dev/even_maj_5"] == pytest.approx(sum(by_hand) / len(by_hand))
    noted = seal.notes["measured"]["dev/even_maj_5"]
    assert noted["value"] == seal.metrics["dev/even_maj_5"] and noted["scored"] == noted["change"]["prompts"] == 6


def test_a_vote_changes_no_other_figure_of_its_step(tmp_path):
    (tmp_path / "size.py").write_text(EVEN + CROWD)
    steps = "steps:\n" + SAMPLE + VOTED.replace("even,", "even, max_failed: 1,")
    go(recipe_in(tmp_path, HEAD + steps.replace(", vote: size.py:crowd", "")), tmp_path / "run")
    run = go(recipe_in(tmp_path, HEAD + steps, "rounds=3"), tmp_path / "run", amend=True)
    assert not run.sealed()[3].notes["measured"]["dev"]["differently"]


@pytest.mark.parametrize("words", ["n: 5", "temperature: 1"])
def test_a_vote_among_answers_that_are_all_the_same_is_refused(tmp_path, words):
    (tmp_path / "size.py").write_text(EVEN + CROWD)
    with pytest.raises(RecipeError, match="a vote needs several answers that may differ"):
        run_of(tmp_path, SAMPLE + f"  - train: sft\n  - measure: {{reward: size.py:even, vote: size.py:crowd, {words}}}\n")
