"""Prompts that do not fit the context: all of them are found before anything is generated, and refused or left out of every round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in

from selfkd.backend.base import NOT_ASKED, Completion, Questions, Sampling
from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.core.pool import Model
from selfkd.errors import UsageError
from selfkd.steps.question import Question, longest

WORD = "word "
CONTEXT = 80
SMALL = RECIPE.replace("rounds: 2", f"rounds: 2\ncontext: {CONTEXT}")
MEASURE = "  - measure: {reward: reward/number.py:last_number, max_tokens: 60}\n"
SMALL = SMALL.replace("  - measure: reward/number.py:last_number\n", MEASURE)


class Counting(Fake):
    """A fake with a tokenizer: one token per word. `calls` are the calls made of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        super().__init__({}, hook=self.calls.append)

    def load(self, source: Any, out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        notes = super().load(source, out, dither)
        assert asked is not None
        found = []
        for row in (row for file in asked.files for row in pl.read_parquet(file).iter_rows(named=True)):
            tokens = sum(len(message["content"].split()) for message in row["messages"])
            if tokens + row["room"] > asked.context:
                place = {name: row[name] for name in ("id", "split", "place")}
                found.append({**place, "tokens": tokens, "limit": asked.context - row["room"]})
        return {**notes, "long": found}

    def generate(self, model: Model, chunks: Any, sampling: Sampling, *rest: Any) -> Any:
        for chunk in chunks:
            self.drop_long = chunk.drop_long
            yield from super().generate(model, [chunk], sampling, *rest)

    def _complete(self, row: Any, skill: float, sampling: Sampling) -> Completion:
        words = sum(len(message["content"].split()) for message in row["teacher_messages"])
        if words + sampling.max_tokens > CONTEXT and self.drop_long:
            return NOT_ASKED
        if words + sampling.max_tokens > CONTEXT:
            raise UsageError("too long", "engine")
        return super()._complete(row, skill, sampling)


def rows_in(folder: Path, name: str, *questions: str) -> None:
    """More prompts at the end of a split's file."""
    folder.mkdir(exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps({"question": question, "answer": "3"}) + "\n" for question in questions)


def recipe_with(
    folder: Path, *overrides: str, text: str = SMALL, train: tuple[str, ...] = (), dev: tuple[str, ...] = ()
) -> Any:
    recipe = recipe_in(folder, text, *overrides)
    rows_in(folder, "train", *train)
    rows_in(folder, "dev", *dev)
    return recipe


LONG = "Very " + WORD * 20 + "1 + 2?"  # 24 words, and 64 more to answer: too long for a context of 80
LONGER = "So " + WORD * 30 + "1 + 2?"  # 34 words


def drops(run: Run, index: int) -> list[list[Any]]:
    return [stage for stage in run.sealed()[index].notes["funnel"] if stage[0].startswith("dropped by load")]


def asked(run: Run, step: str, index: int) -> int:
    files = run.made(index)[step].tables["samples"].files
    return int(pl.concat([pl.read_parquet(run.folder / path) for path in files])["prompt"].n_unique())


def test_all_prompts_that_are_too_long_are_refused_at_once_and_nothing_is_generated(tmp_path):
    backend = Counting()
    with pytest.raises(UsageError) as caught:
        go(recipe_with(tmp_path, train=(LONG, LONGER), dev=(LONGER + " 2?",)), tmp_path / "run", backend)
    assert backend.calls == ["load"]
    said = str(caught.value)
    assert "too long for the context of 80 tokens, prompt and answer together (2 in train, 1 in dev)" in said
    assert "First: train.jsonl:13: 'Very word word" in said and "24 tokens where 16 fit" in said
    assert "Longest: train.jsonl:14: 'So word word" in said and "34 tokens where 16 fit" in said


def test_a_refused_run_goes_on_without_them_when_the_recipe_says_so_and_amend_is_given(tmp_path):
    with pytest.raises(UsageError, match=r"write `long: drop` in the recipe and repeat the command with --amend"):
        go(recipe_with(tmp_path, train=(LONG,)), tmp_path / "run", Counting())
    recipe = recipe_with(tmp_path, "long=drop", train=(LONG,))
    run = go(recipe, tmp_path / "run", Counting(), amend=True)
    assert len(run.sealed()) == 3


def test_prompts_that_are_left_out_are_asked_in_no_round_and_recorded_in_each(tmp_path):
    recipe = recipe_with(tmp_path, "long=drop", train=(LONG, LONGER), dev=(LONGER + " So?",))
    run = go(recipe, tmp_path / "run", Counting())
    assert [asked(run, "sample", index) for index in (1, 2)] == [12, 12]
    assert [sealed.metrics["dev/prompts"] for sealed in run.sealed()] == [6, 6, 6]
    assert drops(run, 1) == drops(run, 2) == [["dropped by load: longer than the context allows", 2]]
    assert run.made(0)["load"].notes["long"] == {"train": 2, "dev": 1, "longest": 35}


def test_what_a_template_adds_counts(tmp_path):
    shots = SMALL.replace("max_tokens: 64}", f"max_tokens: 64, template: '{WORD * 12}{{{{ prompt.text }}}}'}}")
    with pytest.raises(UsageError, match=r"12 in train\)"):  # 'What is 10 + 0?' and 12 words are 17, where 16 fit
        go(recipe_with(tmp_path, text=shots), tmp_path / "run", Counting())


def test_the_longest_answer_of_any_round_counts(tmp_path):
    later = SMALL.replace("max_tokens: 64}", "max_tokens: [64, 76]}")
    with pytest.raises(UsageError, match=r"12 in train\)[\s\S]*5 tokens where 4 fit"):
        go(recipe_with(tmp_path, text=later), tmp_path / "run", Counting())


def test_the_test_split_is_looked_at_too(tmp_path):
    tested = SMALL.replace("prompts:\n", "prompts:\n  test: {file: test.jsonl, prompt: question, answer: answer}\n")
    rows_in(tmp_path, "test", LONGER)
    with pytest.raises(UsageError, match=r"1 in test\)"):
        go(recipe_with(tmp_path, text=tested), tmp_path / "run", Counting())


def test_what_is_asked_about_samples_is_not_known_beforehand(tmp_path):
    again = SMALL.replace(
        "  - score:",
        f"  - sample: {{of: sample, as: again, max_tokens: 8, template: '{WORD * 99}{{{{ of.text }}}}'}}\n  - score:",
        1,
    )
    backend = Counting()
    with pytest.raises(UsageError, match="too long"):
        go(recipe_with(tmp_path, text=again), tmp_path / "run", backend)
    assert backend.calls.count("generate") > 2


def test_what_is_asked_about_a_sample_and_does_not_fit_is_left_out_with_a_reason_where_the_recipe_says_drop(tmp_path):
    ask = f"  - sample: {{of: sample, as: again, max_tokens: 8, template: '{{% if prompt.text.startswith(\"What is 10 \") %}}{WORD * 99}{{% endif %}}{{{{ of.text }}}}'}}\n"
    again = SMALL.replace("  - score:", f"{ask}  - score:", 1)
    run = go(recipe_with(tmp_path, "long=drop", text=again), tmp_path / "run", Counting())
    funnel = {stage: count for stage, count in run.sealed()[1].notes["funnel"]}
    assert funnel["dropped by sample-2: longer than the context allows"] == 3  # the three answers to one of twelve prompts
    kept = run.made(1)["score"].tables["scores"].rows
    assert kept == 2 * 12 * 3 - 3


def test_a_run_without_long_prompts_has_the_digest_of_one_that_was_never_measured(tmp_path):
    recipe = recipe_with(tmp_path)
    measured, unmeasured = go(recipe, tmp_path / "a", Counting()), go(recipe, tmp_path / "b", Fake({}))
    assert measured.sealed()[-1].digest == unmeasured.sealed()[-1].digest


def test_each_wording_is_looked_at_once_with_its_longest_answer():
    asked = [Question("train", None, None, 8), Question("train", "a.j2", None, 8), Question("train", None, None, 16)]
    assert list(longest(asked)) == [Question("train", None, None, 16), Question("train", "a.j2", None, 8)]
