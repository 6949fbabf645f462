"""What a recipe asks of adapters is held against the model's own files: layers that are not there, and weights that cannot lie in 4 bits."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture
from chains import RECIPE, write_prompts
from tiny import tiny_model

from selfkd.backend import layer_names, nf4
from selfkd.backend.base import Questions
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import drive
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core import install
from selfkd.core.yamlfile import Problems
from selfkd.errors import BackendError, RecipeError
from selfkd.recipe import plan, targets
from selfkd.recipe.lint import look
from selfkd.recipe.load import load, read

HERE = Machine(backend="local", threads=1)
LLAMA = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("llama") / "model", tied=False)


def recipe_of(model: Any, lora: str) -> Path:
    path = Path("r.yaml")
    path.write_text(
        RECIPE.replace("model: fake", f"model: {model}").replace(
            "train: {loss: sft}", f"train:\n      loss: sft\n      lora: {lora}"
        )
    )
    return path


def problems(model: Any, lora: str, **machine: Any) -> list[str]:
    found = Problems()
    targets.add_problems(load(str(recipe_of(model, lora))), Machine(backend="local", **machine), found)
    return found.ordered()


# ---- layers ----


def test_the_linear_layers_of_a_model_are_read_from_the_headers_of_its_files_without_torch(llama, tmp_path):
    assert sorted({name.rpartition(".")[2] for name in layer_names.linear_layers(llama)}) == LLAMA
    assert len(layer_names.linear_layers(llama)) == 2 * 7  # neither embedding nor head, which lie in no block
    gpt2 = layer_names.linear_layers(architecture("gpt2", tmp_path / "gpt2"))
    assert {name.rpartition(".")[2] for name in gpt2} == {"c_attn", "c_proj", "c_fc"}
    mixture = layer_names.linear_layers(architecture("mixtral", tmp_path / "mixtral"))
    assert mixture and not any("experts" in name for name in mixture)


def test_a_layer_that_the_model_has_not_is_named_by_lint_plan_and_run_at_its_line(llama):
    said = (
        f"'lora.targets': no linear layer of the model is called 'q_prj'. Did you mean 'q_proj'? There are: {', '.join(LLAMA)}"
    )
    path = recipe_of(llama, "{r: 4, targets: [q_prj, v_proj]}")
    (line,) = look(read(str(path)))[0].problems
    assert line == f"r.yaml:16  steps[3].train: {said}"
    for refused in (lambda: plan.plan(load("r.yaml")), lambda: Run.open(load("r.yaml"), Path("runs/x"), HERE)):
        with pytest.raises(RecipeError) as caught:
            refused()
        assert line in str(caught.value)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "words", ["[q_proj]", "[self_attn.q_proj, mlp.up_proj]", "[model.layers.0.self_attn.q_proj]", "[o_proj]"]
)
def test_layers_that_are_there_are_no_problem_and_neither_is_what_is_not_known(llama, words):
    assert problems(llama, f"{{r: 4, targets: {words}}}") == []
    assert problems("some-one/not-here", f"{{r: 4, targets: {words}}}") == []


def test_of_the_root_the_whole_name_counts_and_of_other_files_its_end(llama):
    layers = layer_names.linear_layers(llama)
    assert layer_names.unknown(["transformer.h.0.q_proj"], layers, whole=False) == ""
    assert "'transformer.h.0.q_proj'" in layer_names.unknown(["transformer.h.0.q_proj"], layers, whole=True)
    assert layer_names.unknown(["layers.1.self_attn.q_proj"], layers, whole=True) == ""
    assert "'layers.2.self_attn.q_proj'" in layer_names.unknown(["layers.2.self_attn.q_proj"], layers, whole=True)


class Bringing(Fake):
    """A backend that brings the files of a real model in beside its own, and counts what it is asked."""

    files: Path
    asked = 0

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        notes = super().load(source, out, dither, asked)
        shutil.copy(self.files / "model.safetensors", out)
        return notes

    def generate(self, *arguments: Any, **more: Any) -> Any:
        self.asked += 1
        return super().generate(*arguments, **more)


def test_a_model_whose_names_are_known_only_once_it_came_in_stops_before_anything_is_generated(llama):
    """As one of a hub's, or a GGUF file: lint sees nothing wrong."""
    machine = Machine(backend="fake")
    for words, wrong in (("[layers.7.self_attn.q_proj]", True), ("[layers.1.self_attn.q_proj]", False)):
        run = Run.open(load(str(recipe_of("fake", f"{{r: 4, targets: {words}}}"))), Path("runs") / str(wrong), machine)
        backend = Bringing(run.numerics)
        backend.files = llama
        if not wrong:
            walk(run, backend, run.begin())
            assert backend.asked and len(run.sealed()) == 3
            continue
        with pytest.raises(RecipeError, match=r"r\.yaml:16 .*'lora.targets': no linear layer .* 'layers.7.self_attn.q_proj'"):
            walk(run, backend, run.begin())
        assert backend.asked == 0 and not list((run.folder / "round-000").glob("*.json"))


# ---- 4 bits ----


def test_a_kind_of_model_that_cannot_lie_in_4_bits_is_named_at_its_line(llama, tmp_path):
    lora = "{r: 4, quantise: nf4}"
    assert problems(llama, lora) == []
    for kind, why in (("gpt2", "keep their matrices as (in, out)"), ("qwen3_moe", "lie in one tensor")):
        (said,) = problems(architecture(kind, tmp_path / kind), lora)
        assert (
            said.startswith("r.yaml:16  steps[3].train: 'lora.quantise': ")
            and kind in said
            and why in said
            and "Leave out" in said
        )
        assert problems(tmp_path / kind, "{r: 4}") == []


def test_beside_a_divided_model_it_is_refused_with_what_to_leave_out(llama):
    found = problems(llama, "{r: 4, quantise: nf4}", trainers=2, shard=True)
    assert any("r.yaml:16  steps[3].train: 'quantise' packs each weight whole" in line for line in found)


def test_without_the_package_a_run_does_not_begin_and_lint_elsewhere_says_so(llama, monkeypatch):
    path = recipe_of(llama, "{r: 4, quantise: nf4}")
    assert targets.lacking(load(str(path))) is None
    monkeypatch.setattr(nf4, "installed_version", lambda package: "")
    said = f"'quantise: nf4' is computed by the package bitsandbytes, which is not installed: {install.extra('qlora')}"
    with pytest.raises((RecipeError, BackendError), match=r"r\.yaml:16") as caught:
        Run.open(load(str(path)), Path("runs/x"), HERE)
    assert said in str(caught.value) and not Path("runs").exists()
    report = look(read(str(path)))[0]
    assert report.problems == [] and any(said in note for note in report.notes)
    assert targets.lacking(load(str(recipe_of(llama, "{r: 4}")))) is None


def test_a_package_without_a_build_for_this_system_is_told_from_one_that_has_it(llama, monkeypatch, tmp_path):
    assert nf4.has_a_build()
    (tmp_path / "site" / "bitsandbytes").mkdir(parents=True)
    (tmp_path / "site" / "bitsandbytes" / "__init__.py").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert "has no build for this system" in nf4.lacking()


def test_a_run_whose_package_went_away_does_not_go_on_to_generate(llama, monkeypatch):
    run = Run.open(load(str(recipe_of(llama, "{r: 4, quantise: nf4}"))), Path("runs/x"), HERE)
    monkeypatch.setattr(nf4, "installed_version", lambda package: "")
    with pytest.raises(RecipeError, match="bitsandbytes, which is not installed"):
        drive.drive(run, run.begin())


# ---- what stays as it was ----


def test_a_recipe_that_does_not_name_it_has_the_words_that_it_had():
    one, other = (
        next(step for step in load(str(recipe_of("fake", lora))).steps_of(1) if step.verb == "train").identity()["lora"]
        for lora in ("{r: 4}", "{r: 4, quantise: nf4}")
    )
    assert "quantise" not in json.dumps(one) and other == {**one, "quantise": "nf4"}
