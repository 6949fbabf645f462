"""What lint finds of a chat template where the model's folder is on this machine, without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, write_prompts
from template_kinds import DATED, NO_SYSTEM, THINKS

from selfkd.recipe.chat import cut_from_texts, look_at_chat
from selfkd.recipe.lint import look
from selfkd.recipe.load import read


def model(folder: Path, template: str | None, special: tuple[str, ...] = ()) -> None:
    """The files of a model that lint looks at."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **({"chat_template": template} if template else {})}))
    added = [{"content": token, "special": True} for token in special]
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))


@pytest.fixture
def linted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lint the recipe of the chain tests with a model that has this template."""
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)

    def run(template: str | None, text: str = RECIPE, special: tuple[str, ...] = ()) -> Any:
        model(tmp_path / "model", template, special)
        (tmp_path / "sums.yaml").write_text(text.replace("model: fake", "model: model"))
        return look(read("sums.yaml"))[0]

    return run


def test_a_prompt_that_the_template_refuses_is_a_problem_with_line_step_and_words(linted: Any) -> None:
    talk = [{"role": "assistant", "content": "Hello."}, {"role": "user", "content": "What is 1 + 2?"}]
    with Path("train.jsonl").open("a") as file:
        file.write(json.dumps({"question": talk, "answer": "3"}) + "\n")
    found = linted(NO_SYSTEM)
    [problem] = found.problems
    assert problem.startswith("sums.yaml:11  steps[0].sample: train.jsonl:13: 'What is 1 + 2?': ")
    assert problem.endswith("refuses it: roles must alternate (turns: assistant, user)")


def test_what_the_template_does_to_prompts_is_a_note(linted: Any) -> None:
    found = linted(NO_SYSTEM, RECIPE.replace("- sample: {", "- sample: {system: Be brief., "))
    said = (
        "The chat template has no system role: what a system message says stands in front of the next user turn (12 prompts)."
    )
    assert said in found.notes and found.problems == []


def test_a_word_that_the_template_does_not_read_is_a_problem_at_its_line(linted: Any) -> None:
    found = linted(THINKS, RECIPE.replace("rounds: 2", "rounds: 2\nchat:\n  enable_thinkin: false"))
    assert found.problems == [
        "sums.yaml:7  chat: the model's chat template does not know 'enable_thinkin'. Did you mean 'enable_thinking'?"
    ]


def test_words_for_a_model_without_a_template_are_a_problem(linted: Any) -> None:
    found = linted(None, RECIPE.replace("rounds: 2", "rounds: 2\nchat: {enable_thinking: false}"))
    assert found.problems == ["sums.yaml:6  chat: the model has no chat template, so nothing would read it: leave it out"]


def test_words_that_the_template_knows_are_no_problem(linted: Any) -> None:
    found = linted(THINKS, RECIPE.replace("rounds: 2", "rounds: 2\nchat: {enable_thinking: false}"))
    assert found.problems == []


def test_a_template_that_cannot_be_read_is_a_problem_in_words(linted: Any) -> None:
    [problem] = linted("{% for m in messages %}").problems
    assert problem.startswith("model: its chat template cannot be read: TemplateSyntaxError: ")


def test_a_date_in_the_template_is_a_note(linted: Any) -> None:
    assert any("The chat template writes the date: this run keeps 20" in note for note in linted(DATED).notes)


def test_a_model_that_is_not_here_is_looked_at_when_it_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    (tmp_path / "sums.yaml").write_text(RECIPE.replace("model: fake", "model: nobody/nothing\nchat: {anything: 1}"))
    found = look_at_chat(read("sums.yaml"), {})
    assert found.problems == [] and [note.partition(": ")[0] for note in found.notes] == ["sums.yaml:5  chat"]


TAGS = RECIPE.replace(
    "- score: reward/number.py:last_number", "- score: {reward: reward/regex.py:has_tags, params: {tags: [answer]}}"
)


def test_a_reward_that_looks_for_a_special_token_is_noted_until_the_step_that_asks_keeps_them(tmp_path: Path) -> None:
    model(tmp_path / "model", None, ("<answer>",))
    (tmp_path / "sums.yaml").write_text(TAGS)
    fix = "which rewards do not see: vllm: {skip_special_tokens: false} in the step that asks keeps it"
    said = [f"score: <answer> is a special token of this model, {fix}"]
    assert cut_from_texts(read(str(tmp_path / "sums.yaml")), tmp_path / "model") == said
    (tmp_path / "sums.yaml").write_text(TAGS.replace("- sample: {", "- sample: {vllm: {skip_special_tokens: false}, "))
    assert cut_from_texts(read(str(tmp_path / "sums.yaml")), tmp_path / "model") == []


def test_words_for_a_model_whose_template_cannot_be_read_here_are_noted_as_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    Path("model.gguf").write_bytes(b"GGUF")
    Path("sums.yaml").write_text(RECIPE.replace("model: fake", "model: model.gguf\nchat: {enable_thinking: false}"))
    said = [
        note
        for note in look(read("sums.yaml"))[0].notes
        if "its words and the prompts are tried when a run brings the model in" in note
    ]
    assert len(said) == 1 and said[0].startswith("sums.yaml:5  chat: ")
