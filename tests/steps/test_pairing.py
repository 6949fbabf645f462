"""Which answers become pairs, and which part of them: spread, parent, and the first step in which two answers differ."""

from __future__ import annotations

from collections import Counter

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in
from hypothesis import given
from hypothesis import strategies as some

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.errors import RecipeError
from selfkd.steps.pairing import differing_step, matched

HEAD = RECIPE[: RECIPE.index("steps:")]
names = some.lists(some.text("abc", min_size=1, max_size=3), min_size=1, max_size=7, unique=True)


@given(names, names, some.integers(1, 60))
def test_spread_takes_all_with_all_and_each_answer_as_often_as_any_other(chosen, rejected, most):
    rejected = [f"-{name}" for name in rejected]
    pairs = matched(chosen, rejected, "spread", most, {})
    assert len(pairs) == len(set(pairs)) == min(most, len(chosen) * len(rejected))
    for side, wanted in enumerate((chosen, rejected)):
        often = Counter(dict.fromkeys(wanted, 0))
        often.update(pair[side] for pair in pairs)
        assert max(often.values()) - min(often.values()) <= 1


@given(names)
def test_spread_never_pairs_an_answer_with_itself(both):
    pairs = matched(both, both, "spread", 100, {})
    assert set(pairs) == {(one, other) for one in both for other in both if one != other}


texts = some.lists(some.sampled_from(["a", "b", ""]), min_size=1, max_size=5).map("\n".join)


@given(texts, texts)
def test_what_two_texts_share_is_whole_steps_and_the_next_step_is_the_last(one, other):
    short, shorter = differing_step(one, other, "\n")
    assert one.startswith(short) and other.startswith(shorter)
    if one != other:
        *shared, last = short.split("\n")
        *as_shared, as_last = shorter.split("\n")
        assert shared == as_shared[: len(shared)] or as_shared == shared[: len(as_shared)]
        assert short != shorter and (last != as_last or len(shared) != len(as_shared))


STEPS = (
    "  - sample: {n: 2, as: first}\n"
    "  - sample: {name: again, of: first, n: 3, template: 'Again: {{ prompt.text }}', as: again}\n"
    "  - build: {kind: pair, chosen: again, rejected: first, match: parent, per_prompt: 9%s}\n  - train: dpo\n"
)


def says(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    again = messages[-1]["content"].startswith("Again: ")
    return f"As before.\n{'Better' if again else 'Worse'} {seed % 97}.\nThe end."


def run_of(folder, more: str = "") -> Run:
    recipe = recipe_in(folder, HEAD + "steps:\n" + STEPS % more, "rounds=1")
    return go(recipe, folder / "run", Fake({}, says, fits=True))


def table(run: Run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def test_each_answer_loses_once_to_an_answer_that_was_made_from_it(tmp_path):
    run = run_of(tmp_path)
    first, again, rows = table(run, "sample", "samples"), table(run, "again", "samples"), table(run, "build", "rows")
    parents = dict(again.select("id", pl.col("parents").list.first()).iter_rows())
    assert sorted(rejected for _, rejected in rows["samples"]) == sorted(first["id"])
    assert all(parents[chosen] == rejected for chosen, rejected in rows["samples"])
    assert rows["chosen_ids"].null_count() == 0


def test_only_the_first_step_in_which_they_differ_is_learned_behind_what_they_share_and_no_end(tmp_path):
    rows = table(run_of(tmp_path, ', step: "\\n"'), "build", "rows")
    assert rows["chosen"].str.contains(r"^As before\.\nBetter \d+\.$").all()
    assert rows["rejected"].str.contains(r"^As before\.\nWorse \d+\.$").all()
    assert rows["chosen_ids"].null_count() == rows["rejected_ids"].null_count() == rows.height > 0
    assert not rows["chosen_ended"].any() and not rows["rejected_ended"].any()


def test_a_step_is_of_pairs(tmp_path):
    with pytest.raises(RecipeError, match="'step' is for kind: pair"):
        recipe_in(tmp_path, HEAD + "steps:\n  - sample: 2\n  - build: {step: x}\n  - train: sft\n")
