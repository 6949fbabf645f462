"""Rows with a teacher: what student and teacher see, what is refused before anything starts, what names an update, what is shown of it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, end, go, recipe_in
from rich.console import Console

from selfkd.backend.base import DivergenceSpec, TrainSpec
from selfkd.backend.fake import Fake
from selfkd.chain import updates
from selfkd.chain.run import Run
from selfkd.core.pool import Function, Model, shape
from selfkd.errors import RecipeError
from selfkd.recipe.lint import lint, look
from selfkd.report import rows as found_rows
from selfkd.report.panels import print_rows
from selfkd.report.status import rounds

HEAD = RECIPE[: RECIPE.index("steps:")]
SAMPLE = "  - sample: {n: 2, temperature: 0.8, max_tokens: 64}\n"
TOLD = "  - sample: {n: 2, temperature: 0.8, max_tokens: 64, template: 'Be brief. {{ prompt.text }}', system: Count.}\n"
SCORE = "  - score: reward/number.py:last_number\n"
BUILD = "  - build: {kind: kd}\n"
KD = "  - train: {loss: kd}\n"


def recipe(folder: Path, steps: str, *overrides: str):
    return recipe_in(folder, HEAD + "steps:\n" + steps, "rounds=1", *overrides)


def run_of(folder: Path, steps: str, backend: Fake | None = None) -> Run:
    return go(recipe(folder, steps), folder / "run", backend)


def table(run: Run, step: str, name: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


def built(folder: Path, build: str, sample: str = SAMPLE) -> tuple[Run, pl.DataFrame]:
    run = run_of(folder, sample + SCORE + f"  - build: {build}\n" + KD)
    return run, table(run, "build", "rows")


# ---- what student and teacher see ----


def test_without_words_of_its_own_the_teacher_sees_what_the_sampler_saw(tmp_path):
    run, rows = built(tmp_path, "{kind: kd}", TOLD)
    assert rows.height == 24 and set(rows["kind"]) == {"kd"}
    for student, teacher in rows.select("messages", "teacher_messages").iter_rows():
        assert [one["content"] for one in teacher] == ["Count.", f"Be brief. {student[0]['content']}"] and len(student) == 1
    samples = {row["id"]: row for row in table(run, "sample", "samples").iter_rows(named=True)}
    for row in rows.iter_rows(named=True):
        [sample] = row["samples"]
        assert (row["chosen_ids"], row["chosen_logprob"]) == (samples[sample]["token_ids"], samples[sample]["logprob"])


def test_a_template_tells_the_teacher_of_the_completion_its_score_and_the_answer(tmp_path):
    words = "{{ prompt.text }} {{ of.text | length }} letters, {{ 'right' if of.last_number == 1 else 'wrong' }}, it is {{ prompt.answer }}"
    run, rows = built(
        tmp_path, f'{{kind: kd, told: own, teacher: "{words}", teacher_system: Judge., where: "last_number IS NOT NULL"}}'
    )
    scores = dict(table(run, "score", "scores").select("sample", "value").iter_rows())
    asked = run.split("train").scan("prompts").select("messages", "answer").collect()
    prompts = {messages[0]["content"]: answer for messages, answer in asked.iter_rows()}
    assert len(set(scores.values())) == 2
    for student, teacher, text, [sample] in rows.select("messages", "teacher_messages", "chosen", "samples").iter_rows():
        question = student[0]["content"]
        verdict = "right" if scores[sample] == 1 else "wrong"
        wanted = f"{question} {len(text)} letters, {verdict}, it is {prompts[question]}"
        assert [one["content"] for one in teacher] == ["Judge.", wanted]


def test_several_views_of_the_student_share_a_teacher(tmp_path):
    _, rows = built(tmp_path, "{kind: kd, view: ['A: {{ prompt.text }}', 'B: {{ prompt.text }}']}")
    assert rows.height == 48 and {one[0]["content"][0] for one in rows["messages"]} == {"A", "B"}
    assert all(one[0]["content"].startswith("What is") for one in rows["teacher_messages"])


def test_a_student_may_see_what_the_sampler_was_asked(tmp_path):
    run = run_of(tmp_path, TOLD + "  - build: {sees: asked}\n  - train: sft\n")
    assert [len(one) for one in table(run, "build", "rows")["messages"]] == [2] * 24


def test_rows_without_a_teacher_are_what_they_were(tmp_path):
    """Neither the new fields nor the new columns change a chain that does not use them."""
    run = run_of(tmp_path, SAMPLE + "  - build\n  - train: sft\n")
    rows = table(run, "build", "rows")
    assert rows["teacher_messages"].null_count() == rows["chosen_logprob"].null_count() == rows.height
    build = recipe(tmp_path / "b", SAMPLE + "  - build\n  - train: sft\n").steps[1].at(1)
    assert not {"teacher", "teacher_system", "sees"} & build.identity().keys()


# ---- what is refused before anything starts ----


def problems(folder: Path, steps: str, *overrides: str) -> list[str]:
    """What is found where it is loaded, and, with templates and rewards, where it is looked at."""
    try:
        return look(recipe(folder, steps, *overrides))[0].problems
    except RecipeError as error:
        return error.what.splitlines()


SAME = "teacher and student are the same model and see the same words, so the loss is 0"


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (SAMPLE + BUILD + KD, SAME),
        (SAMPLE + BUILD + "  - train: {loss: kd, teacher: now, from: start}\n", SAME),
        (SAMPLE + BUILD + "  - train: {loss: kd, teacher: live}\n", SAME),
        (SAMPLE + BUILD + "  - train: {loss: kd, teacher: base, from: base}\n", SAME),
        ("  - gold\n" + BUILD + KD, SAME),
        (TOLD + "  - build: {kind: kd, sees: asked}\n" + KD, SAME),
        (TOLD + BUILD + KD, ""),
        (SAMPLE + "  - build: {kind: kd, teacher_system: Think.}\n" + KD, ""),
        (SAMPLE + "  - build: {kind: kd, view: '{{ prompt.text }}?'}\n" + KD, ""),
        (SAMPLE + BUILD + "  - train: {loss: kd, teacher: base}\n", ""),
        (SAMPLE + "  - build: {as: plain}\n  - train: {loss: sft, of: plain}\n" + BUILD + "  - train: {loss: kd, from: now, teacher: start}\n", ""),
        (SAMPLE + KD, r"loss kd needs rows of kind kd in stream 'rows' for policy: put `build: \{kind: kd, ...\}` before it"),
        (SAMPLE + "  - build\n" + KD, "loss kd needs rows of kind kd; 'rows' holds sft rows"),
        (TOLD + BUILD + "  - train: sft\n", "loss sft needs rows of kind sft; 'rows' holds kd rows"),
        (TOLD + BUILD + "  - train: {loss: kd, teacher: bse}\n", "no model 'policy@bse'.*Did you mean 'base'"),
        (SAMPLE + "  - build: {kind: kd, teacher: '{{ of.txt }}'}\n" + KD, "txt.*Did you mean 'text'"),
    ],
)  # fmt: skip
def test_lint_says_what_cannot_teach(tmp_path, steps, wanted):
    found = problems(tmp_path, steps)
    assert (len(found) == 1 and re.search(wanted, found[0])) if wanted else not found, found


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (SAMPLE + "  - build: {teacher: 'x'}\n", "'teacher' is for kind: kd"),
        (SAMPLE + "  - build: {view: 'x', sees: asked}\n", "'sees: asked' shows what the sampler was asked"),
        (SAMPLE + "  - train: {loss: sft, teacher: base}\n", "'teacher' belongs to loss: kd"),
        (TOLD + BUILD + "  - train: {loss: kd, reference: base}\n", "'reference' belongs to loss"),
        (TOLD + BUILD + "  - train: {loss: kd, divergence: revers}\n", "Did you mean 'reverse'|should be 'forward', 'reverse' or 'jsd'"),
        (TOLD + BUILD + "  - train: {loss: kd, divergence: {beta: 0.3}}\n", "'beta' is for kind: jsd, and this is forward"),
        (TOLD + BUILD + "  - train: {loss: kd, divergence: {kind: jsd, beta: 1.0}}\n", "beta"),
        (TOLD + BUILD + "  - train: {loss: kd, divergence: {skip: 4, first: 4}}\n", "no token would count"),
        (TOLD + BUILD + "  - train: {loss: kd, divergence: {temprature: 2}}\n", "Did you mean 'temperature'"),
    ],
)  # fmt: skip
def test_fields_that_say_nothing_here_are_refused(tmp_path, steps, wanted):
    with pytest.raises(RecipeError, match=wanted):
        recipe(tmp_path, steps)


def test_a_function_of_the_divergence_is_tried_on_made_up_rows(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(divergence, mask):\n    return divergence.sum(1) / mask.sum()\n")
    train = "  - train: {loss: 'mine.py:mine', rows: kd, teacher: base, divergence: jsd}\n"
    [problem] = lint(recipe(tmp_path, TOLD + BUILD + train)).problems
    assert "cannot be split" in problem
    (tmp_path / "mine.py").write_text(
        "def mine(divergence, teacher_logps, mask):\n    return (divergence * teacher_logps.exp()).sum(1) / mask.sum(1)\n"
    )
    assert not lint(recipe(tmp_path, TOLD + BUILD + train)).problems
    (tmp_path / "mine.py").write_text("def mine(divergence, ref_logps):\n    return divergence.sum(1)\n")
    [problem] = problems(tmp_path, TOLD + BUILD + train)
    assert "asks for 'ref_logps', which kd rows do not have" in problem


# ---- what names an update, and the chain ----


def test_the_teacher_and_every_word_of_the_divergence_name_the_update():
    rows = shape("rows", [{"id": "a", "teacher_messages": [{"role": "user", "content": "x"}]}])
    start, other = Model("policy", "", "s"), Model("policy", "", "t")
    spec = TrainSpec("kd", 3, function=Function("kd", Path("kd.py"), "d", {}), rows="kd", divergence=DivergenceSpec())
    changed = [
        {"kind": "jsd"},
        {"beta": 0.1},
        {"temperature": 2.0},
        {"top_k": 5},
        {"clip": 0.1},
        {"clip_entry": 0.1},
        {"skip": 1},
        {"first": 9},
    ]
    names = [updates.key(start, other, rows, replace(spec, divergence=DivergenceSpec(**one)), {}) for one in ({}, *changed)]
    names += [updates.key(start, None, rows, spec, {}), updates.key(start, start, rows, spec, {})]
    told = rows.with_columns(teacher_messages=pl.lit([{"role": "user", "content": "y"}], dtype=rows.schema["teacher_messages"]))
    names.append(updates.key(start, other, told, spec, {}))
    assert len(set(names)) == len(names)


def test_another_divergence_is_another_chain(tmp_path):
    ends = {
        words: end(run_of(tmp_path / str(number), TOLD + BUILD + f"  - train: {{loss: kd, divergence: {words}}}\n"))
        for number, words in enumerate(("forward", "reverse", "{top_k: 9}"))
    }
    assert len(set(ends.values())) == 3


# ---- what is shown ----


def test_show_prints_what_the_teacher_sees(tmp_path):
    run, _ = built(tmp_path, "{kind: kd}", TOLD)
    console = Console(record=True, width=200)
    print_rows(found_rows.training_rows(run.folder, 1, n=1), console)
    shown = console.export_text()
    assert "teacher sees: [system] Count." in shown and "[user] Be brief. What is" in shown and "completion:" in shown


def test_a_round_says_how_far_the_model_was_from_its_teacher(tmp_path):
    class Far(Fake):
        def train(self, *arguments, **more):
            trained = super().train(*arguments, **more)
            far = {"divergence_first": 0.5, "divergence_last": 0.25, "staleness_first": 0.01, "staleness_last": 0.125}
            return replace(trained, metrics={**trained.metrics, **far})

    run = run_of(tmp_path, TOLD + BUILD + KD, Far({}))
    assert dict(rounds(run.paths)[-1].told) == {
        **{
            "train/divergence_first": 0.5,
            "train/divergence_last": 0.25,
            "train/staleness_first": 0.01,
            "train/staleness_last": 0.125,
        }
    }
