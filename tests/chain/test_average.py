"""`average` in a chain: an EMA of rounds, killed and verified; and on whole tiny models, served and proved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chains import Faults, Killed, end, go, recipe_in

from selfkd.core.pool import Model
from selfkd.errors import RecipeError
from selfkd.recipe.lint import look
from selfkd.recipe.plan import plan
from selfkd.report.verify import verify

STEPS = """
name: sums
model: fake
rounds: 2
prompts: {train: {file: train.jsonl, prompt: question, answer: answer}}
keep: {last: 9}
steps:
  - sample: {n: 3, max_tokens: 64}
  - train: sft
  - average: {start: 0.75, now: 0.25}
"""


def skill(run, path: str) -> float:
    return json.loads((run.folder / path / "weights.json").read_text())["skill"]


def test_an_average_after_training_is_a_moving_average_over_rounds(tmp_path):
    run = go(recipe_in(tmp_path, STEPS.replace("{start: 0.75, now: 0.25}", "{of: {start: 0.75, now: 0.25}}")), tmp_path / "run")
    before = 0.3
    for index in (1, 2):
        averaged = run.made(index)["average"].models["policy"].path
        trained = before + (1 - before) * 0.3  # what an update of the fake model does
        assert skill(run, averaged) == pytest.approx(0.75 * before + 0.25 * trained)
        assert run.sealed()[index].models["policy"].path == averaged
        before = skill(run, averaged)
    assert verify(run.folder).problems == []


EMA = STEPS.replace("{start: 0.75, now: 0.25}", "{of: {start: 0.75, now: 0.25}}")


def test_another_role_may_be_the_average(tmp_path):
    text = EMA.replace(
        "  - average: {of: {start: 0.75, now: 0.25}}", "  - average: {role: ema, of: {policy@start: 0.9, policy@now: 0.1}}"
    )
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    models = run.sealed()[2].models
    made_of = run.made(2)["average"].notes["average"]
    assert [(one["model"], one["share"]) for one in made_of] == [("policy@start", 0.9), ("policy@now", 0.1)]
    assert made_of[1]["digest"] == models["policy"].digest and verify(run.folder).problems == []
    assert models["policy"].path == run.made(2)["train"].models["policy"].path != models["ema"].path


def test_a_killed_chain_ends_on_the_same_digest(tmp_path):
    recipe = recipe_in(tmp_path, EMA)
    whole = end(go(recipe, tmp_path / "whole"))
    with Faults() as faults:
        go(recipe, tmp_path / "counted")
    for at in range(faults.count // 3, faults.count, faults.count // 7):
        with Faults(at), pytest.raises(Killed):
            go(recipe, tmp_path / f"{at}")
        assert end(go(recipe, tmp_path / f"{at}")) == whole


def test_other_shares_are_another_chain(tmp_path):
    first = end(go(recipe_in(tmp_path, EMA), tmp_path / "a"))
    assert end(go(recipe_in(tmp_path, EMA.replace("0.75", "0.5")), tmp_path / "b")) != first


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("average: {of: {start: 1.0}}", "an average is of two models at least"),
        ("average: {of: {start: -1.0, now: 0.5}}", "it must be above 0"),
        ("average: {of: {start: 0, now: 0.5}}", "a share of 0 says nothing"),
        ("average: {of: {strat: 0.5, now: 0.5}}", "strat"),
        ("average: {of: {teacher: 0.5, now: 0.5}}", "teacher"),
    ],
)
def test_an_average_that_cannot_be_is_refused_with_its_line(tmp_path, step, said):
    with pytest.raises(RecipeError) as caught:
        recipe_in(tmp_path, EMA.replace("average: {of: {start: 0.75, now: 0.25}}", step))
    assert said in str(caught.value) and "sums.yaml:10" in str(caught.value)


def test_adapters_have_no_average(tmp_path):
    with pytest.raises(RecipeError, match="'policy' is trained as an adapter"):
        recipe_in(tmp_path, EMA.replace("train: sft", "train: {loss: sft, lora: {r: 8}}"))


def test_an_average_is_linted_and_planned(tmp_path, monkeypatch):
    recipe = recipe_in(tmp_path, EMA)
    assert look(recipe)[0].ok and "an average of 2 checkpoints" in str(plan(recipe))


# ---- whole models ----


def test_an_average_of_whole_models_is_served_and_proved_and_found_again(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file
    from tiny import opened, save_child, tiny_model

    from selfkd.backend.engine.averaged import average
    from selfkd.backend.probe import read_probe, token_logprobs
    from selfkd.backend.tokens import tokenizer
    from selfkd.core import averaging, digest

    parent = tiny_model(tmp_path / "parent")
    weights = opened(parent)
    with torch.no_grad():
        for tensor in weights.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    child = save_child(parent, weights, tmp_path / "child")
    models = [(Model("policy", str(folder), digest.weights(folder)), share) for folder, share in ((parent, 0.9), (child, 0.1))]
    if not (parent / "probe.json").exists():
        shutil.copy(child / "probe.json", parent / "probe.json")
    average(models, tmp_path / "out")
    made = opened(tmp_path / "out")
    probe = read_probe(tmp_path / "out")
    scored = [value for row in token_logprobs(made, probe.ids) for value in row]
    assert scored == pytest.approx(probe.child.tolist(), abs=1e-5) and probe.before is None
    mine, its, both = (load_file(folder / "model.safetensors") for folder in (parent, child, tmp_path / "out"))
    for name in mine:
        assert torch.equal(both[name], (0.9 * mine[name].double() + 0.1 * its[name].double()).float())
    assert tokenizer(str(tmp_path / "out")).get_vocab() == tokenizer(str(parent)).get_vocab()
    folders = [(Path(model.path), share) for model, share in models]
    assert averaging.differs(folders, tmp_path / "out") == ""
    name = next(iter(both))
    both[name].view(-1)[0] += 1e-3
    save_file(both, tmp_path / "out" / "model.safetensors")
    assert averaging.differs(folders, tmp_path / "out") == name
