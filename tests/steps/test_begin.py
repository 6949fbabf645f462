"""sample: {begin: TEMPLATE}: answers that go on from a beginning, such as a part of another answer."""

from __future__ import annotations

import polars as pl
from chains import RECIPE, go, recipe_in

from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.recipe.lint import lint
from selfkd.recipe.load import load

HEAD = RECIPE[: RECIPE.index("steps:")]
STEPS = (
    "  - sample: {n: 1, as: first}\n"
    '  - sample: {name: again, of: first, n: 2, begin: "{{ of.text[:3] }}", as: again}\n'
    "  - build: {of: again}\n  - train: sft\n"
)


def says(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
    return f" and so {seed % 97}" if begun else f"All {seed % 97} of them"


def run_of(folder, steps: str = STEPS, *overrides: str) -> Run:
    return go(recipe_in(folder, HEAD + "steps:\n" + steps, "rounds=1", *overrides), folder / "run", Fake({}, says))


def table(run: Run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def test_an_answer_is_what_it_began_with_and_what_the_model_went_on_with(tmp_path):
    run = run_of(tmp_path)
    again, first = table(run, "again", "samples"), dict(table(run, "sample", "samples").select("id", "text").iter_rows())
    assert again.height == 2 * len(first)
    for text, [parent], ids in again.select("text", "parents", "token_ids").iter_rows():
        assert text.startswith(f"{first[parent][:3]} and so ") and ids is None


def test_the_teacher_saw_the_prompt_and_a_row_teaches_the_whole_answer_behind_it(tmp_path):
    run = run_of(tmp_path)
    samples, rows = table(run, "again", "samples"), table(run, "build", "rows")
    first = table(run, "sample", "samples")
    prompts = dict(first.select("prompt", "teacher_messages").iter_rows())
    assert all(shown == prompts[prompt] for prompt, shown in samples.select("prompt", "teacher_messages").iter_rows())
    assert sorted(rows["chosen"]) == sorted(samples["text"]) and rows["chosen_ids"].null_count() == rows.height
    assert all(len(messages) == 1 for messages in rows["messages"])


def test_lint_finds_what_the_beginning_cannot_show(tmp_path):
    recipe_in(tmp_path, HEAD + "steps:\n" + STEPS.replace("of.text", "of.txt"))
    [problem] = lint(load(str(tmp_path / "sums.yaml"))).problems
    assert "steps[1].sample" in problem and "'txt'" in problem


def test_a_step_without_it_keeps_its_key_and_its_requests(tmp_path):
    step = recipe_in(tmp_path, HEAD + "steps:\n  - sample: 2\n  - train: sft\n").steps_of(1)[0]
    assert "begin" not in step.identity()
