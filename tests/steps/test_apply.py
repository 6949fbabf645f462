"""`apply`: a user's function over whole tables, in a worker of its own; what is no function of the tables is refused."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import Faults, Killed, end, go

from selfkd.chain.dry_run import lint_and_walk
from selfkd.errors import RecipeError, RewardError, SelfkdError
from selfkd.recipe.load import load, read
from selfkd.report.verify import verify

HEAD = "name: r\nmodel: fake\nrounds: 1\nprompts: {train: train.jsonl}\nsteps:\n  - sample: {n: 3, max_tokens: 64}\n"
SCORED = "  - score: reward/number.py:last_number\n"
MINE = '''
import random
import polars as pl

def rank(samples, scores, least=0):
    """How many answers of the prompt are shorter."""
    rank = pl.col("chars").rank("min").over("prompt") - 1 + least
    return samples.select("id", value=rank).rename({"id": "sample"})

def two(samples):
    value = samples.select("id", value=pl.col("chars")).rename({"id": "sample"})
    return {"scores": pl.concat([value.with_columns(name=pl.lit("long")), value.with_columns(name=pl.lit("short"), value=-pl.col("value"))])}

def marks(prompts, samples):
    first = samples.sort("prompt", "number").unique("prompt", keep="first", maintain_order=True)
    return {"drops": first.select("id", reason=pl.lit("the first one"))}

def joined(samples):
    whole = samples.sort("prompt", "number").group_by("prompt", maintain_order=True).agg(text=pl.col("text").str.join(" | "), parents=pl.col("id"))
    return {"samples": whole}

def by_place(samples):
    return samples.with_row_index("value").select("value", sample="id")

def drawn(samples):
    return samples.select(sample="id").with_columns(value=pl.Series([random.random() for _ in range(samples.height)]))

def strange(samples):
    return pl.DataFrame({"sample": ["nobody"], "value": [1.0]})

def of_parents(samples, prompts, parents):
    return {"samples": pl.DataFrame({"prompt": prompts["id"][:1], "text": ["x"], "parents": [parents]})}

def of_a_text(samples):
    return {"samples": samples.sort("id").select("prompt", text=pl.lit("x"), parents="id").unique("prompt", keep="first", maintain_order=True)}

def of_nobody(samples):
    none = pl.lit(None, pl.List(pl.String))
    return {"samples": samples.sort("id").unique("prompt", keep="first", maintain_order=True).select("prompt", text=pl.lit("x"), parents=none)}

def number(samples):
    return 7

def raising(samples):
    raise ValueError("no such luck")

def wanting(samples, tables):
    return {}
'''


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(1, 5)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("mine.py").write_text(MINE)


def made(steps: str, folder: str = "run"):
    Path("r.yaml").write_text(f"{HEAD}{steps}  - train: sft\n")
    return go(load("r.yaml"), Path(folder))


def table(run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def test_its_scores_are_scores_like_any_other():
    run = made(SCORED + "  - apply: {function: mine.py:rank, scores: [rank], params: {least: 1}}\n  - select: rank = 1\n")
    scores = table(run, "apply", "scores").join(table(run, "sample", "samples"), left_on="sample", right_on="id")
    shortest = scores.with_columns(least=pl.col("chars").min().over("prompt"))
    assert all(
        row["value"] >= 1 and (row["value"] == 1) == (row["chars"] == row["least"]) for row in shortest.iter_rows(named=True)
    )
    assert scores.height == 12 and verify(run.folder).problems == []


def test_it_may_return_several_scores_by_name():
    scores = table(made("  - apply: {function: mine.py:two, scores: [long, short]}\n"), "apply", "scores")
    assert scores.group_by("name").len().sort("name").rows() == [("long", 12), ("short", 12)] and scores["value"].sum() == 0


def test_samples_that_are_replayed_keep_the_score_that_their_own_round_gave():
    Path("r.yaml").write_text(
        HEAD.replace("rounds: 1", "rounds: 2").replace("steps:\n", "steps:\n  - replay\n")
        + "  - apply: {function: mine.py:rank, scores: [rank]}\n  - train: sft\n"
    )
    run = go(load("r.yaml"), Path("run"))
    files = [run.made(index)["apply"].tables["scores"].files for index in (1, 2)]
    first, second = (pl.concat([pl.read_parquet(run.folder / file) for file in found])["sample"] for found in files)
    assert len(first) == len(second) == 12 and not set(first) & set(second)
    assert run.samples(round=2)["rank"].null_count() == 0


def test_its_marks_are_drops_with_their_reason():
    run = made("  - apply: mine.py:marks\n")
    drops = table(run, "apply", "drops")
    assert drops["reason"].unique().to_list() == ["the first one"] and drops.height == 4
    assert table(run, "train", "rows").height == 8


def test_its_samples_have_their_parents_and_their_prompts_words():
    run = made("  - apply: {function: mine.py:joined, as: joined}\n")
    samples = table(run, "apply", "samples")
    assert samples.height == 4 and set(samples["stream"]) == {"joined"} and samples["parents"].list.len().to_list() == [3] * 4
    assert all(" | " in row["text"] and row["teacher_messages"][0]["content"].startswith("What") for row in samples.to_dicts())


def test_a_sample_may_have_no_parents_and_says_so_by_an_empty_list():
    samples = table(made("  - apply: {function: mine.py:of_nobody, as: x}\n"), "apply", "samples")
    assert samples["parents"].to_list() == [[]] * 4


def test_a_sample_of_an_earlier_round_or_of_another_stream_is_no_parent_of_what_it_was_not_given_for():
    steps = "  - apply: {{function: mine.py:of_parents, as: x, params: {{parents: [{}]}}{}}}\n"
    [old, *_] = table(made(SCORED), "sample", "samples")["id"].sort()
    run = made(steps.format(old, ""), "whole")
    assert table(run, "apply", "samples")["parents"].to_list() == [[old]]
    again = "  - sample: {n: 1, max_tokens: 64, as: more}\n" + steps.format(old, ", of: more")
    with pytest.raises(RewardError, match=rf"round-001/apply .*with the parent '{old}', which it was not given"):
        made(again, "other")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{function: mine.py:by_place, scores: [x]}", "where the rows of its tables are in another order"),
        ("{function: mine.py:strange, scores: [x]}", "returns scores of 'nobody', which it was not given"),
        (
            "{function: mine.py:of_parents, as: x, params: {parents: [nobody]}}",
            "returns samples with the parent 'nobody', which it was not given",
        ),
        ("{function: mine.py:of_parents, as: x, params: {parents: [null]}}", "returns samples with a parent that is no id"),
        (
            "{function: mine.py:of_parents, as: x, params: {parents: [1]}}",
            "returns samples whose column 'parents' is no list of ids",
        ),
        ("{function: mine.py:of_a_text, as: x}", "returns samples whose column 'parents' is no list of ids"),
        ("{function: mine.py:number, scores: [x]}", "returns int: give a frame of scores"),
        ("{function: mine.py:raising, scores: [x]}", "no such luck"),
        ("{function: mine.py:rank}", "returns scores, and the step names none"),
        ("{function: mine.py:joined}", "write `as`"),
        ("{function: mine.py:two, scores: [long]}", "returns the score 'short', which the step does not name"),
    ],
)
def test_what_is_no_pure_function_or_returns_what_cannot_be_is_refused(words, said):
    with pytest.raises(SelfkdError) as caught:
        made(f"  - apply: {words}\n")
    assert said in str(caught.value)


def test_random_numbers_are_told_from_an_order(tmp_path):
    with pytest.raises(RewardError, match="when it is called again with the same tables"):
        made("  - apply: {function: mine.py:drawn, scores: [x]}\n")


def test_a_killed_chain_ends_on_the_same_digest_and_other_code_on_another():
    steps = "  - apply: {function: mine.py:rank, scores: [rank]}\n"
    whole = end(made(steps, "whole"))
    with Faults() as faults:
        made(steps, "counted")
    for at in range(2 * faults.count // 3, faults.count, faults.count // 4):
        with Faults(at), pytest.raises(Killed):
            made(steps, f"{at}")
        assert end(made(steps, f"{at}")) == whole
    Path("mine.py").write_text(MINE.replace("- 1 + least", "+ least"))
    assert end(made(steps, "other")) != whole


def test_lint_names_what_it_is_not_given_and_walks_the_rest():
    Path("r.yaml").write_text(f"{HEAD}  - apply: {{function: mine.py:wanting}}\n  - train: sft\n")
    report = lint_and_walk(read("r.yaml"))
    assert any(
        "r.yaml:7" in one and "wants 'tables', and it is given prompts, samples, scores" in one for one in report.problems
    )
    Path("r.yaml").write_text(
        f"{HEAD}  - apply: {{function: mine.py:rank, scores: [rank]}}\n  - select: rank = 0\n  - train: sft\n"
    )
    assert lint_and_walk(read("r.yaml")).ok


def test_a_score_that_no_expression_could_name_is_refused():
    Path("r.yaml").write_text(f"{HEAD}  - apply: {{function: mine.py:rank, scores: [tokens]}}\n  - train: sft\n")
    with pytest.raises(RecipeError, match="a score cannot be called 'tokens'"):
        load("r.yaml")
