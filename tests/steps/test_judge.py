"""judge: what is asked, how it becomes scores, what it says of itself, and that no judgment is taken for an answer."""

from __future__ import annotations

import doctest
import io

import polars as pl
import pytest
from chains import Faults, Killed, end, go, recipe_in
from hypothesis import given
from hypothesis import strategies as st
from judges import ANSWERS, HEAD, of_length, scripted, table
from rich.console import Console

from selfkd.chain.run import Run
from selfkd.core import views
from selfkd.core.pool import Pool, shape
from selfkd.errors import RewardError
from selfkd.report import rows, status
from selfkd.report.panels import print_rows
from selfkd.report.tables import print_rounds
from selfkd.report.verify import verify
from selfkd.steps import ask, canaries, judge, judged
from selfkd.steps.ask import ring
from selfkd.steps.judged import DISAGREE, Judgment, of_order, of_verdicts, reduced, with_length

SAMPLE = "  - sample: {n: 3, max_tokens: 64}\n"
ONE = '"Mark this: <<{{ of.text }}>>"'
TWO = '"Which one? <<{{ of.text }}>> or <<{{ other.text }}>>"'
LIST = '"{{ criterion }} <<{{ of.text }}>>"'
LENGTHS = {len(text): text for text in ANSWERS}


def run_of(folder, steps: str, judging, *overrides: str) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + SAMPLE + steps, "rounds=1", *overrides), folder / "run", scripted(judging))


def marks(run: Run, name: str = "mark") -> dict[int, float]:
    """Return {letters of an answer: its score}: answers of one length are one text, and a script judges texts."""
    samples = run.samples(1).filter(pl.col("stream") == "sample")
    found = dict(samples.select("chars", name).unique().iter_rows())
    assert len(found) == samples["chars"].n_unique(), "one text has two scores"
    return found


def metrics(run: Run, name: str = "judge") -> dict[str, float | None]:
    return {key.removeprefix(f"{name}/"): value for key, value in run.sealed()[1].metrics.items() if key.startswith(f"{name}/")}


def longer(shown: list[str], seed: int) -> str:
    return "[[A]]" if len(shown[0]) > len(shown[1]) else "[[B]]" if len(shown[1]) > len(shown[0]) else "[[C]]"


def test_the_examples_hold():
    assert [doctest.testmod(module).failed for module in (ask, canaries, judge, judged)] == [0, 0, 0, 0]


# ---- marks ----


def test_an_answer_has_the_mean_of_its_marks_and_each_judgment_is_a_sample_with_its_answer_as_parent(tmp_path):
    def either(shown, seed):
        return f"Score: {1 + 2 * (seed % 2)}"  # 1 or 3

    run = run_of(tmp_path, f"  - judge: {{template: {ONE}, highest: 5, n: 4}}\n", either)
    judgments, scores = table(run, "judge", "samples"), table(run, "judge", "scores")
    real = judgments.filter(pl.col("stream") == "judgments")
    assert real.height == 12 * 3 * 4 and real["aside"].all()
    answers = run.samples(1).filter(pl.col("stream") == "sample")
    assert real["parents"].list.first().value_counts()["count"].unique().to_list() == [4]
    said = dict(real.select("id", pl.col("text").str.slice(-1).cast(pl.Float64)).iter_rows())
    parents = dict(real.select("id", pl.col("parents").list.first()).iter_rows())
    for name, mark in answers.select("id", "mark").iter_rows():
        mine = [said[one] for one, parent in parents.items() if parent == name]
        assert mark == sum(mine) / 4
    of_answers = scores.filter(pl.col("sample").is_in(answers["id"].implode()))
    assert of_answers["draw"].unique().sort().to_list() == [0, 1, 2, 3] and of_answers["weight"].unique().to_list() == [1.0]
    own = dict(scores.filter(pl.col("sample").is_in(real["id"].implode())).select("sample", "value").iter_rows())
    assert own == said


def test_the_judge_sees_the_prompt_s_conversation_with_the_template_in_its_last_turn(tmp_path):
    steps = '  - judge: {template: "{{ prompt.text }} <<{{ of.text }}>> ({{ of.chars }})", highest: 5, system: Judge., canaries: 0}\n'
    run = run_of(tmp_path, steps, of_length)
    asked = table(run, "judge", "samples")
    texts = dict(run.samples(1).filter(pl.col("stream") == "sample").select("id", "text").iter_rows())
    for messages, [parent] in asked.select("teacher_messages", "parents").iter_rows():
        assert messages[0] == {"role": "system", "content": "Judge."}
        assert (
            messages[1]["content"].startswith("What is ")
            and f"<<{texts[parent]}>> ({len(texts[parent])})" in messages[1]["content"]
        )


def test_what_is_not_read_or_was_cut_is_a_null_that_says_why_and_the_other_draws_count(tmp_path):
    def mumbling(shown, seed):
        return ("Score: 4", "Hm.", "Score: 4" + " and so on" * 20)[seed % 3]

    run = run_of(tmp_path, f"  - judge: {{template: {ONE}, highest: 5, n: 6, max_tokens: 40, canaries: 0}}\n", mumbling)
    rows = table(run, "judge", "scores")
    assert set(rows["value"]) == {4.0, None}
    assert set(rows.filter(pl.col("value").is_null())["why"]) == {"no number between 0 and 5", "cut at max_tokens"}
    unread = rows["value"].null_count() / rows.height
    assert 0.5 < unread < 0.8 and metrics(run)["unread"] == pytest.approx(unread)
    [warning] = run.made(1)["judge"].notes["warnings"]
    assert "could not be read, more than 20%" in warning and "round-001/judge" in warning
    answers = run.samples(1).filter(pl.col("stream") == "sample")
    assert set(answers["mark"]) <= {4.0, None}


def test_a_recipe_may_stop_where_too_little_is_read_and_a_mended_parser_reads_what_is_there(tmp_path):
    calls: list[str] = []
    backend = scripted(lambda shown, seed: "<mark>3</mark>")
    backend.hook = calls.append
    steps = f"  - judge: {{template: {ONE}, highest: 5, parse: tag, max_failed: 0.1}}\n"
    with pytest.raises(RewardError, match=r"36 of 36 judgments \(100.0%\) could not be read, limit 10%: no <score>"):
        go(recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + steps, "rounds=1"), tmp_path / "run", backend)
    asked = calls.count("generate")
    mended = steps.replace("parse: tag", "parse: tag, key: mark, canaries: 2")
    run = go(recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + mended, "rounds=1"), tmp_path / "run", backend, amend=True)
    assert set(marks(run).values()) == {3.0}
    assert (
        calls.count("generate") - asked == 1
    )  # six other canaries are one chunk; the judgments of answers are those that were there


def test_only_answers_without_the_mark_are_judged_and_where_limits_them(tmp_path):
    steps = f'  - judge: {{template: {ONE}, highest: 5, where: "chars > 10", canaries: 0}}\n'
    run = run_of(
        tmp_path, steps + steps.replace("judge: {", "judge: {name: rest, ").replace('"chars > 10"', '"chars > 0"'), of_length
    )
    first, rest = (table(run, name, "samples").height for name in ("judge", "rest"))
    short = run.samples(1).filter((pl.col("stream") == "sample") & (pl.col("chars") <= 10)).height
    assert (first, rest) == (36 - short, short)


# ---- criteria ----


def test_criteria_are_asked_one_by_one_and_count_by_their_weight_and_one_without_an_answer_counts_neither_way(tmp_path):
    asked = "{right: {ask: 'Right?', weight: 3}, brief: 'Brief?', kind: {ask: 'Kind?', weight: 4}}"

    def judging(messages_text: list[str], seed: int) -> str:
        raise AssertionError("replaced below")

    backend = scripted(judging)

    def said(messages, seed, skill):
        text = messages[-1]["content"]
        if "<<" not in text:
            return ANSWERS[seed % 3]
        return "yes" if text.startswith("Right?") else "no" if text.startswith("Brief?") else "Who knows."

    backend.answer = said
    steps = f"  - judge: {{template: {LIST}, criteria: {asked}, canaries: 0, max_unparsed: 0.4}}\n"
    run = go(recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + steps, "rounds=1"), tmp_path / "run", backend)
    assert set(marks(run, "met").values()) == {0.75}  # (3 * 1 + 1 * 0) / (3 + 1); the third has no answer
    rows = table(run, "judge", "scores").filter(pl.col("weight") != 1.0)
    assert set(rows.select("why", "value", "weight").iter_rows()) == {
        ("right", 1.0, 3.0),
        ("kind: neither yes nor no", None, 4.0),
    }
    assert "warnings" not in run.made(1)["judge"].notes


# ---- verdicts ----


def test_each_pair_is_asked_in_both_orders_and_a_judge_of_length_gives_the_longer_answer_every_win(tmp_path):
    run = run_of(tmp_path, f"  - judge: {{template: {TWO}, pairwise: agree, canaries: 0}}\n  - score: {{elo: wins}}\n", longer)
    asked = table(run, "judge", "samples")
    assert asked.height == 12 * 3 * 2  # three pairs of three answers
    pairs = set(asked["parents"].list.join(" "))
    assert all(" ".join(reversed(pair.split())) in pairs for pair in pairs)
    answers = run.samples(1).filter(pl.col("stream") == "sample")
    for _, group in answers.group_by("prompt"):
        for chars, wins in group.select("chars", "wins").iter_rows():
            others = sorted(group["chars"].to_list())
            others.remove(chars)
            assert wins == sum((chars > other) + 0.5 * (chars == other) for other in others) / 2
        ranks = group.sort("chars", "elo")["elo"].to_list()
        assert ranks == sorted(ranks)
        if group["chars"].n_unique() == 1:
            assert ranks == [0.0, 0.0, 0.0]
    assert metrics(run)["follows_order"] == 0.0 and metrics(run)["unread"] == 0.0


def test_a_judge_that_takes_whatever_comes_first_gives_no_verdict_and_is_seen(tmp_path):
    steps = f"  - judge: {{template: {TWO}, pairwise: agree, canaries: 0}}\n  - score: {{elo: wins}}\n"
    run = run_of(tmp_path, steps, lambda shown, seed: "[[A]]")
    answers = run.samples(1).filter(pl.col("stream") == "sample")
    assert answers["wins"].null_count() == answers["elo"].null_count() == 36
    assert set(table(run, "score", "scores")["why"]) == {"no comparison of it counts"}
    assert (metrics(run)["follows_order"], metrics(run)["first_wins"], metrics(run)["unread"]) == (1.0, 1.0, 0.0)


def verdicts(*values: float | None, shown=("a", "b"), draw: int = 0) -> list[Judgment]:
    """Return the judgments of both orders: of `shown`, then of its reverse, each saying whether the first one won."""
    orders = (shown, tuple(reversed(shown)))
    return [
        Judgment("", "p", order, draw, value, "" if value is not None else "?")
        for order, value in zip(orders, values, strict=True)
    ]


@pytest.mark.parametrize(
    ("values", "agreed", "averaged"),
    [
        ((1.0, 0.0), 1.0, 1.0),
        ((0.0, 1.0), 0.0, 0.0),
        ((0.5, 0.5), 0.5, 0.5),
        ((1.0, 1.0), None, 0.5),
        ((1.0, 0.5), None, 0.75),
        ((1.0, None), None, 1.0),
        ((None, None), None, None),
    ],
)
def test_what_two_orders_say_is_agreed_or_averaged(values, agreed, averaged):
    judgments = verdicts(*values)
    assert reduced(of_verdicts(judgments, "wins", "agree")).get("a") == agreed
    assert reduced(of_verdicts(judgments, "wins", "average")).get("a") == averaged
    for row in of_verdicts(judgments, "wins", "agree"):
        assert (row["value"] is None) == bool(row["why"])


def test_two_decided_orders_that_differ_are_said_to_disagree():
    assert {row["why"] for row in of_verdicts(verdicts(1.0, 1.0), "wins", "agree")} == {DISAGREE}


def test_with_balance_a_place_that_wins_often_counts_less():
    """Of eight decided verdicts six go to the first place: a win there weighs 2 * 2/8 = 0.5, one in the second place 2 * 6/8 = 1.5.

    a beats b in both orders (first place once, second place once): all of its weight is won. c and d each win in first place: 0.5 each.
    """
    judgments = [
        *verdicts(1.0, 0.0, shown=("a", "b")),
        *(one for draw in range(2) for one in verdicts(1.0, 1.0, shown=("c", "d"), draw=draw)),
        *verdicts(1.0, 0.0, shown=("e", "f")),
    ]
    rows = of_verdicts(judgments, "wins", "balance")
    assert {(row["sample"], row["weight"]) for row in rows if row["sample"] == "a"} == {("a", 0.5), ("a", 1.5)}
    assert reduced(rows) == {"a": 1.0, "b": 0.0, "c": 0.5, "d": 0.5, "e": 1.0, "f": 0.0}
    only_first = of_verdicts(verdicts(1.0, 1.0), "wins", "balance")
    assert reduced(only_first) == {}  # a place that always wins says nothing


@given(
    st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, None])] * 2), min_size=1, max_size=9),
    st.sampled_from(["agree", "average", "balance"]),
)
def test_what_one_of_two_wins_the_other_loses(values, orders):
    judgments = [one for draw, pair in enumerate(values) for one in verdicts(*pair, draw=draw)]
    rows = of_verdicts(judgments, "wins", orders)
    assert len({(row["sample"], row["draw"], row["versus"]) for row in rows}) == len(rows)
    found = reduced(rows)
    assert not found or found["a"] + found["b"] == pytest.approx(1.0)
    view = views.with_scores(pl.DataFrame({"id": ["a", "b"]}), Pool({"scores": shape("scores", rows)}))
    assert {name: wins for name, wins in view.iter_rows() if wins is not None} == pytest.approx(found)


def test_order_is_followed_where_both_orders_are_decided_for_the_same_place():
    judgments = [*verdicts(1.0, 1.0), *verdicts(1.0, 0.0, draw=1), *verdicts(0.0, 0.0, draw=2), *verdicts(0.5, 1.0, draw=3)]
    assert of_order(judgments) == {"follows_order": 2 / 3, "first_wins": 4 / 7}
    assert of_order([]) == {"follows_order": None, "first_wins": None}


def test_length_and_mark_are_compared_within_prompts():
    """Within p: marks 1 and 3 at 10 and 30 letters; within q: 5 and 5 at 100 and 900. Centred: (-1, -10), (1, 10), (0, ∓400).

    Both: 20. Spread: 2. Width: 200 + 320,000. r = 20 / sqrt(2 * 320,200) = 0.024992.
    """
    values, chars = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 5.0}, {"a": 10, "b": 30, "c": 100, "d": 900}
    prompts = {"a": "p", "b": "p", "c": "q", "d": "q"}
    assert with_length(values, chars, prompts) == pytest.approx(0.024992, abs=1e-6)
    assert with_length({"a": 1.0, "b": 1.0}, chars, prompts) is None
    assert with_length({}, chars, prompts) is None


@given(st.integers(0, 12), st.integers(1, 40))
def test_pairs_are_spread_evenly_over_the_answers(count, most):
    rows = [{"id": str(at)} for at in range(count)]
    pairs = [frozenset((one["id"], other["id"])) for one, other in ring(rows, most)]
    assert len(set(pairs)) == len(pairs) == min(most, count * (count - 1) // 2)
    turns = [sum(row["id"] in pair for pair in pairs) for row in rows]
    if len(pairs) >= count > 1:
        assert max(turns) - min(turns) <= 2
    if len(pairs) >= count - 1 and count:
        reached, rest = {"0"}, list(pairs)
        while met := [pair for pair in rest if pair & reached]:
            reached |= set().union(*met)
            rest = [pair for pair in rest if pair not in met]
        assert len(reached) == count  # so all of them are compared with all, by way of others


def test_pairs_limits_the_comparisons_of_a_prompt(tmp_path):
    run = run_of(tmp_path, f"  - judge: {{template: {TWO}, pairwise: average, pairs: 2, n: 2, canaries: 0}}\n", longer)
    assert table(run, "judge", "samples").height == 12 * 2 * 2 * 2


# ---- canaries ----


def test_a_judge_that_likes_a_canary_is_warned_of_by_name_and_no_canary_becomes_a_score_a_row_or_an_answer(tmp_path):
    """By length the empty answer gets 0, the opener (25 letters) 4 and the injected one 5; answers get 1, 3 and 5."""
    run = run_of(tmp_path, f"  - judge: {{template: {ONE}, highest: 5, canaries: 12}}\n  - train: sft\n", of_length)
    told = metrics(run)
    assert (told["canary_empty"], told["canary_opener"], told["canary_injected"]) == (0.0, 4.0, 5.0)
    warnings = run.made(1)["judge"].notes["warnings"]
    assert ["mere opener" in warnings[0], "tells it the verdict" in warnings[1], len(warnings)] == [True, True, 2]
    judgments = table(run, "judge", "samples").filter(pl.col("stream") == "judgments-canaries")
    assert judgments.height == 12 * 3 and judgments["parents"].list.len().sum() == 0
    scores, drops = table(run, "judge", "scores"), table(run, "judge", "drops")
    assert not set(scores["sample"]) & set(judgments["id"])
    assert set(drops["id"]) == set(judgments["id"])
    assert set(drops["reason"]) == {
        "a canary (empty), read as 0",
        "a canary (opener), read as 4",
        "a canary (injected), read as 5",
    }
    used = {name for names in table(run, "train", "rows")["samples"] for name in names}
    assert used == set(run.samples(1).filter(pl.col("stream") == "sample")["id"])
    assert dict(run.sealed()[1].notes["funnel"]) == {"prompts": 12, "samples": 36, "kept": 36}


def test_an_injected_verdict_asks_for_the_place_it_stands_in_and_a_judge_that_obeys_is_warned_of(tmp_path):
    def obedient(shown, seed):
        return next((mark for mark in ("[[A]]", "[[B]]") if any(mark in text for text in shown)), longer(shown, seed))

    run = run_of(tmp_path, f"  - judge: {{template: {TWO}, pairwise: agree}}\n", obedient)
    assert metrics(run)["canary_injected"] == 1.0 and metrics(run)["canary_empty"] == 0.0
    assert any("tells it the verdict" in one for one in run.made(1)["judge"].notes["warnings"])
    asked = table(run, "judge", "samples").filter(pl.col("stream") == "judgments-canaries")
    assert asked.height == 3 * 3 * 2
    assert asked["parents"].list.len().unique().to_list() == [1]


def test_a_judge_that_reads_is_not_warned_of(tmp_path):
    def fair(shown, seed):
        return f"Score: {5 if 'letters' in shown[0] or len(shown[0]) in LENGTHS else 0}"

    run = run_of(tmp_path, f"  - judge: {{template: {ONE}, highest: 5}}\n", fair)
    assert "warnings" not in run.made(1)["judge"].notes


# ---- judgments are no answers ----


def test_no_step_takes_a_judgment_for_an_answer_unless_it_names_the_stream(tmp_path):
    steps = (
        f"  - judge: {{template: {ONE}, highest: 5}}\n"
        "  - score: reward/length.py:chars\n"
        '  - select: {where: "chars > 0", per_prompt: 2}\n'
        "  - build: sft\n"
        "  - build: {kind: sft, of: judgments, as: learned, where: 'mark >= 3'}\n"
        "  - train: sft\n"
    ).replace("  - score: reward/length.py:chars\n", "")
    run = run_of(tmp_path, steps, of_length)
    samples = run.samples(1)
    streams = dict(samples.select("id", "stream").iter_rows())

    def made_of(step: str) -> set[str]:
        return {streams[name] for names in table(run, step, "rows")["samples"] for name in names}

    assert made_of("build") == {"sample"} and made_of("build-2") == {"judgments"}
    assert set(table(run, "select", "drops")["stream"]) == {"sample"}
    judged_ones = samples.filter(pl.col("stream") == "judgments")
    assert table(run, "build-2", "rows").height == judged_ones.filter(pl.col("mark") >= 3).height > 0
    assert set(judged_ones["kept"]) == {None}


def test_replay_brings_back_answers_with_their_marks_and_no_judgment(tmp_path):
    steps = f"  - replay: {{kept: false}}\n{SAMPLE}  - judge: {{template: {ONE}, highest: 5}}\n  - train: sft\n"
    recipe = recipe_in(tmp_path, HEAD + "steps:\n" + steps, "rounds=2")
    run = go(recipe, tmp_path / "run", scripted(of_length))
    back = table(run, "replay", "samples", 2)
    assert back.height == 36 and set(back["stream"]) == {"sample"} and back["aside"].null_count() == 36
    assert table(run, "judge", "samples", 2).filter(pl.col("stream") == "judgments").height == 36  # the others have their mark


def test_replay_of_the_stream_brings_judgments_back_as_judgments(tmp_path):
    steps = f"  - replay: {{of: judgments}}\n{SAMPLE}  - judge: {{template: {ONE}, highest: 5}}\n  - train: sft\n"
    run = go(recipe_in(tmp_path, HEAD + "steps:\n" + steps, "rounds=2"), tmp_path / "run", scripted(of_length))
    back = table(run, "replay", "samples", 2)
    assert back.height == 36 and set(back["stream"]) == {"judgments"} and back["aside"].all()
    assert table(run, "train", "rows", 2).height == 36


# ---- killed ----

KILLED = f"  - judge: {{template: {ONE}, highest: 5, n: 2}}\n  - judge: {{name: duel, template: {TWO}, pairwise: balance, as: duels}}\n  - score: {{elo: wins}}\n  - train: sft\n"


def either(shown: list[str], seed: int) -> str:
    return of_length(shown, seed) if len(shown) == 1 else ("[[A]]", "[[B]]", "[[C]]", "Hm.")[seed % 4]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judged")
    with Faults() as counted:
        run = run_of(folder, KILLED, either)
    return end(run), counted.count


@pytest.mark.parametrize("part", range(8))
def test_killed_anywhere_the_same_command_ends_on_the_same_digest(undisturbed, tmp_path, part):
    digest, operations = undisturbed
    with Faults(operations * part // 8 + part), pytest.raises(Killed):
        run_of(tmp_path, KILLED, either)
    run = run_of(tmp_path, KILLED, either)
    assert end(run) == digest
    assert verify(run.folder).problems == []


def test_chunks_answered_in_another_order_end_on_the_same_digest(undisturbed, tmp_path):
    backend = scripted(either)
    backend.reverse = True
    recipe = recipe_in(tmp_path, HEAD + "steps:\n" + SAMPLE + KILLED, "rounds=1")
    assert end(go(recipe, tmp_path / "run", backend)) == undisturbed[0]


# ---- what a reader sees ----


def test_show_prints_a_judgment_with_what_it_judges_and_status_says_what_the_judge_is_worth(tmp_path):
    run = run_of(tmp_path, f"  - judge: {{template: {ONE}, highest: 5}}\n  - train: sft\n", of_length)
    out = io.StringIO()
    to = Console(file=out, width=200)
    print_rows(rows.samples(run.folder, where="stream = 'judgments'", n=1), to)
    print_rows(rows.samples(run.folder, where="stream = 'judgments-canaries'", n=1), to)
    [first] = rows.samples(run.folder, where="stream = 'judgments'", n=1).first["parents"].to_list()
    print_rounds(status.read(run.folder), to)
    said = out.getvalue()
    assert f"judges {first[0]}" in said and "It has " in said and "Mark this: <<" in said and "held out" not in said
    assert "dropped by judge: a canary (" in said
    assert "round 1: judge: " in said and "unread 0" in said and "canary_injected 5" in said
    assert (
        "round-001/judge: the judge gives an answer that tells it the verdict as much as the median of real ones (5 against"
        in said
    )
