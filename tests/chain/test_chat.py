"""How a run speaks to its model: settled once before anything is asked, told once, and the same on any day it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Killed, end, go, recipe_in
from speaking import Speaking
from template_kinds import OtherDay, kind_named

from selfkd.backend import chat
from selfkd.backend.fake import Fake
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.errors import ChainError, RecipeError, UsageError
from selfkd.recipe.load import load


def warnings(run: Path) -> list[str]:
    logs = sorted(run.glob("logs/attempt-*/events.jsonl"))
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return [event["text"] for event in events if event["event"] == "warning"]


STRICT, PLAIN, DATED = (kind_named(name) for name in ("no system role", "ChatML", "today"))
TOLD = RECIPE.replace("- sample: {", "- sample: {system: Be brief., ")


# ---- refused before anything is asked ----


def talking(folder: Path, *turns: str) -> None:
    """One more train prompt: a conversation of these roles."""
    folder.mkdir(exist_ok=True)
    row = {"question": [{"role": role, "content": f"What is 1 + {at}?"} for at, role in enumerate(turns)], "answer": "3"}
    with (folder / "train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_a_prompt_that_the_template_refuses_is_named_with_its_line_its_step_and_the_templates_words(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    talking(tmp_path, "assistant", "user")
    backend = Speaking(STRICT)
    with pytest.raises(UsageError) as caught:
        go(recipe, tmp_path / "run", backend)
    said = str(caught.value)
    assert backend.calls == ["load"]
    assert "train.jsonl:13: 'What is 1 + 1?', asked by " in said and "sums.yaml:11  steps[0].sample: " in said
    assert "refuses it: roles must alternate (turns: assistant, user)" in said and "jinja" not in said.lower()


def test_what_a_step_will_show_of_samples_is_tried_before_anything_is_asked(tmp_path: Path) -> None:
    about = "  - sample: {of: sample, as: again, template: '--- assistant\n\n      {{ of.text }}\n\n      --- user\n\n      Sure?'}\n"
    recipe = recipe_in(tmp_path, RECIPE.replace("  - score:", about + "  - score:", 1))
    backend = Speaking(STRICT)
    with pytest.raises(UsageError, match=r"steps\[1\]\.sample: .*roles must alternate \(turns: assistant, user\)"):
        go(recipe, tmp_path / "run", backend)
    assert backend.calls == ["load"]


def test_all_shapes_that_are_refused_are_named_at_once(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    talking(tmp_path, "assistant", "user")
    talking(tmp_path, "tool", "user")
    with pytest.raises(UsageError) as caught:
        go(recipe, tmp_path / "run", Speaking(STRICT))
    assert "train.jsonl:13: " in str(caught.value) and "train.jsonl:14: " in str(caught.value)


def test_a_prompt_that_only_a_real_answer_makes_unwritable_is_named_with_the_step_that_asks_it(tmp_path: Path) -> None:
    late = "{% if of.chars > 3 %}\n\n      --- assistant\n\n      x\n\n      {% endif %}\n\n      --- user\n\n      Sure?"
    about = f"  - sample: {{of: sample, as: again, template: '{late}'}}\n"
    recipe = recipe_in(tmp_path, RECIPE.replace("  - score:", about + "  - score:", 1))
    with pytest.raises(
        UsageError, match=r"round-001/sample-2: the prompt 'Sure\?'  the model's chat template refuses it: roles must"
    ):
        go(recipe, tmp_path / "run", Speaking(STRICT))


# ---- told once ----


def test_what_the_template_does_to_a_system_message_is_told_once_however_often_a_run_goes_on(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, TOLD)
    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Speaking(STRICT, die_at="train"))
    run = go(recipe, tmp_path / "run", Speaking(STRICT))
    told = [text for text in warnings(tmp_path / "run") if "no system role" in text]
    assert told == [
        "The chat template has no system role: what a system message says stands in front of the next user turn (12 prompts)."
    ]
    assert run.made(0)["load"].notes["chat"] == told


def test_a_template_that_takes_all_as_it_is_is_not_spoken_of(tmp_path: Path) -> None:
    go(recipe_in(tmp_path, TOLD), tmp_path / "run", Speaking(PLAIN))
    assert not any("template" in text for text in warnings(tmp_path / "run"))


# ---- the day ----


def test_a_run_that_is_killed_and_goes_on_on_another_day_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("selfkd.chain.freeze.now", lambda: "2026-11-27T12:00:00Z")
    recipe = recipe_in(tmp_path)
    whole = go(recipe, tmp_path / "whole", Speaking(DATED))
    with pytest.raises(Killed):
        go(recipe, tmp_path / "killed", Speaking(DATED, die_at="train"))
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", OtherDay)
    killed = go(recipe, tmp_path / "killed", Speaking(DATED))
    assert end(killed) == end(whole)
    monkeypatch.setattr("selfkd.chain.freeze.now", lambda: "2026-11-28T12:00:00Z")
    assert end(go(recipe, tmp_path / "next day", Speaking(DATED))) != end(whole)  # it shows another date
    assert end(go(recipe, tmp_path / "plain", Speaking(PLAIN))) == end(go(recipe, tmp_path / "plain 2", Speaking(PLAIN)))


def test_a_model_that_comes_in_on_a_later_day_is_shown_the_day_of_run_json(tmp_path: Path, monkeypatch: Any) -> None:
    recipe = recipe_in(tmp_path)
    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Speaking(DATED, die_at="load"))
    created = json.loads((tmp_path / "run/run.json").read_text())["created"]
    monkeypatch.setattr("selfkd.chain.freeze.now", lambda: "2031-01-01T12:00:00Z")
    backend = Speaking(DATED)
    go(recipe, tmp_path / "run", backend)
    assert backend.asked.now == created


# ---- the recipe's words ----


THINKING = kind_named("thinking as it comes")
SILENT = RECIPE.replace("rounds: 2", "rounds: 2\nchat: {enable_thinking: false}")


def test_the_words_for_the_template_reach_it_and_are_part_of_what_the_chain_is(tmp_path: Path) -> None:
    with_words = go(recipe_in(tmp_path / "a", SILENT), tmp_path / "a/run", Speaking(THINKING))
    without = go(recipe_in(tmp_path / "b"), tmp_path / "b/run", Speaking(THINKING))
    assert with_words.made(0)["load"].identity["chat"] == {"enable_thinking": False}
    assert "chat" not in without.made(0)["load"].identity
    assert with_words.made(0)["load"].key != without.made(0)["load"].key
    model = with_words.model("policy")
    assert chat.read(model.path).words == {"enable_thinking": False}


def test_the_words_for_the_template_are_fixed_when_a_run_is_created(tmp_path: Path) -> None:
    go(recipe_in(tmp_path, SILENT), tmp_path / "run", Speaking(THINKING))
    with pytest.raises(ChainError, match="enable_thinking: False was changed to True: this is fixed when a run is created"):
        go(recipe_in(tmp_path, SILENT.replace("false", "true")), tmp_path / "run", Speaking(THINKING), amend=True)


def test_a_run_that_was_made_before_there_were_such_words_goes_on(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    go(recipe, tmp_path / "run", Fake({}))
    path = tmp_path / "run/run.json"
    info = json.loads(path.read_text())
    del info["recipe"]["chat"], info["self"]
    path.unlink()
    path.write_text(json.dumps(digest.with_self_digest(info)))
    assert len(go(load(str(tmp_path / "sums.yaml"), ["rounds=3"]), tmp_path / "run", Fake({})).sealed()) == 4
    assert Run.at(tmp_path / "run").recipe.chat == {}


def test_a_word_that_is_not_the_recipes_to_give_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"sums\.yaml:6  chat: 'messages' is not for this mapping: a prompt's messages come from"
    ):
        recipe_in(tmp_path, RECIPE.replace("rounds: 2", "rounds: 2\nchat: {messages: []}"))
