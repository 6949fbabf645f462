"""Expressions over prompts: their own columns by `prompt.NAME`, and numbers over the samples of each."""

from __future__ import annotations

import json
import statistics

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfkd.core import of_prompts, views
from selfkd.core.pool import Pool, shape
from selfkd.errors import RecipeError

META = {"p": {"level": 3, "kind": "geo"}, "q": {"level": 5, "kind": 7, "my column": True}}
VALUES = {"p": [1.0, 0.0, 1.0], "q": [0.0, None]}


@pytest.fixture
def pool(tmp_path) -> Pool:
    prompts = shape(
        "prompts",
        [
            {
                "id": name,
                "answer": name.upper(),
                "meta": json.dumps(meta),
                "messages": [{"role": "user", "content": f"{name}?"}],
            }
            for name, meta in META.items()
        ],
    )
    prompts.write_parquet(tmp_path / "prompts.parquet")
    names = [(prompt, f"{prompt}{at}", value) for prompt, values in VALUES.items() for at, value in enumerate(values)]
    samples = shape("samples", [{"id": one, "prompt": prompt, "stream": "s", "tokens": len(names)} for prompt, one, _ in names])
    scores = [{"sample": one, "name": "ok", "value": value, "draw": 0, "weight": 1.0} for _, one, value in names]
    tables = {"prompts": prompts.drop("messages", "meta"), "samples": samples, "scores": shape("scores", scores)}
    return Pool(tables, {"prompts": (tmp_path / "prompts.parquet",)})


def of_samples(pool: Pool, text: str, kind: views.Kind = "number") -> dict[str, object]:
    view = views.sample_view(pool, None, text)
    return dict(view.select("id", found=views.expression(text, view, kind)).iter_rows())


def of_the_prompts(pool: Pool, text: str, kind: views.Kind = "number") -> dict[str, object]:
    view = views.prompt_view(pool, text)
    return dict(view.select("id", found=views.expression(text, view, kind)).iter_rows())


def test_a_mean_is_over_the_samples_of_the_prompt_that_have_the_score(pool):
    assert of_samples(pool, "mean(ok)") == {"p0": 2 / 3, "p1": 2 / 3, "p2": 2 / 3, "q0": 0.0, "q1": 0.0}
    assert of_the_prompts(pool, "avg(ok)") == {"p": 2 / 3, "q": 0.0}


def test_counts_extremes_and_spread_are_of_the_prompt_too(pool):
    assert of_the_prompts(pool, "count(*)") == {"p": 3, "q": 2}
    assert of_the_prompts(pool, "count(ok)") == {"p": 3, "q": 1}
    assert of_the_prompts(pool, "count(distinct ok)") == {"p": 2, "q": 1}
    assert of_the_prompts(pool, "max(ok) - min(ok)") == {"p": 1.0, "q": 0.0}
    assert of_the_prompts(pool, "sum(ok)") == {"p": 2.0, "q": 0.0}
    spread = of_the_prompts(pool, "std(ok)")
    assert spread["p"] == pytest.approx(statistics.stdev([1.0, 0.0, 1.0])) and spread["q"] is None  # of a single value


def test_what_is_inside_a_call_is_an_expression_over_a_sample(pool):
    assert of_samples(pool, "ok - mean(case when id = 'p0' then 5 else ok end)")["p1"] == pytest.approx(0 - 2.0)
    assert of_the_prompts(pool, "mean(ok * prompt.level)") == {"p": 2.0, "q": 0.0}


def test_a_window_that_is_written_out_is_left_to_sql(pool):
    assert of_samples(pool, "max(ok) over (partition by stream)")["q0"] == 1.0
    assert of_samples(pool, "max(ok)")["q0"] == 0.0


def test_a_prompt_nobody_answered_has_a_count_of_zero_and_no_mean(pool):
    tables = {**pool.tables, "samples": pool.samples.filter(pl.col("prompt") == "p")}
    some = Pool(tables, pool.files)
    assert of_the_prompts(some, "count(*)") == {"p": 3, "q": 0} and of_the_prompts(some, "mean(ok)")["q"] is None


def test_a_prompts_own_columns_are_reached_by_its_name(pool):
    assert of_samples(pool, "prompt.level") == {"p0": 3, "p1": 3, "p2": 3, "q0": 5, "q1": 5}
    assert of_the_prompts(pool, "prompt.level > 3", "condition") == {"p": False, "q": True}
    assert of_the_prompts(pool, 'prompt."my column"', "value") == {"p": None, "q": True}
    assert of_the_prompts(pool, "prompt.answer || prompt.text", "value") == {"p": "Pp?", "q": "Qq?"}


def test_a_column_that_mixes_texts_and_numbers_is_text(pool):
    assert of_the_prompts(pool, "prompt.kind", "value") == {"p": "geo", "q": "7"}


def test_a_pair_sees_its_prompt_and_numbers_over_all_samples_of_it(pool):
    text = "chosen_ok - mean(ok) + prompt.level"
    view = views.sample_view(pool, None)
    pairs = pl.DataFrame({"prompt": ["p"], "chosen": ["p0"], "rejected": ["p1"]})
    seen = views.pair_view(pairs, view, pool, text)
    assert seen.select(views.expression(text, seen, "number")).item() == pytest.approx(1 - 2 / 3 + 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max(mean(ok)) > 1", "has another one inside"),
        ("prompt.levl > 1", "Did you mean 'prompt.level'?"),
        ("mean(nothing) > 1", "no column 'nothing'"),
        ("mean(stream) > 1", "gives a text, where a number is wanted"),
        ("level > 1", "Did you mean 'prompt.level'?"),
        ("mean(ok > 1", "is missing at its end"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_the_word_to_write(pool, text, said):
    with pytest.raises(RecipeError) as caught:
        view = views.sample_view(pool, None, text)
        views.expression(text, view, "condition", own=of_prompts.known_kinds(pool) or ())
    assert said in str(caught.value)


def test_a_text_in_quotes_is_left_as_it_is():
    assert of_prompts.words("text = 'mean(x) prompt.a'").sql == "text = 'mean(x) prompt.a'"
    assert of_prompts.words('"mean(x)" + my_mean(x) + s.prompt.a').calls == frozenset()


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12))
def test_a_mean_does_not_depend_on_the_order_of_the_samples(values):
    samples = pl.DataFrame({"id": [str(at) for at in range(len(values))], "prompt": "p", "x": values})
    found = {
        views._with_calls(some, some, ("mean(x) + std(x)",), "prompt").select("mean(x)", "std(x)").row(0)
        for some in (samples, samples.reverse())
    }
    assert len(found) == 1
