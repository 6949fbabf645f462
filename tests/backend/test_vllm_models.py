"""What vLLM says of an architecture, told to a person; without vLLM."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from architectures import architecture
from tiny import opened

from selfkd.backend.engine.vllm_models import classes_kept, in_words
from selfkd.core.pool import Model
from selfkd.errors import UsageError, WeightsError


@pytest.fixture
def model(tmp_path: Path) -> Model:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["OddForCausalLM"], "model_type": "odd"}))
    return Model("policy", str(tmp_path), "0" * 64)


PYDANTIC = """1 validation error for ModelConfig
  Value error, Model architectures ['OddForCausalLM'] are not supported for now. [type=value_error, input_value=ArgsKwargs(()), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev"""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError(PYDANTIC),
            r"vLLM cannot run OddForCausalLM: Model architectures \['OddForCausalLM'\] are not supported for now\.$",
        ),
        (NotImplementedError("ALiBi"), r"vLLM cannot run OddForCausalLM: ALiBi \(NotImplementedError\)$"),
        (KeyError("rope"), r"vLLM cannot run OddForCausalLM: 'rope' \(KeyError\)$"),
    ],
)
def test_what_an_architecture_lacks_is_told_in_vllms_words_with_the_way_out(model: Model, error: Exception, said: str) -> None:
    with pytest.raises(UsageError) as raised, in_words(model, "run", {}):
        raise error
    assert raised.value.where == model.path and raised.value.fix.startswith("`generator: transformers`")
    assert re.search(said, raised.value.what)


def test_options_that_were_passed_through_are_named_as_another_cause(model: Model) -> None:
    with pytest.raises(UsageError) as raised, in_words(model, "run", {"block_sise": 3}):
        raise TypeError("EngineArgs.__init__() got an unexpected keyword argument 'block_sise'")
    assert "one of the options under `engine` there: block_sise" in raised.value.fix


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Free memory on device is less than desired GPU memory utilization"),
        RuntimeError("Engine core initialization failed"),
        WeightsError("wrong", "somewhere", "stop"),
        OSError("no space"),
    ],
)
def test_what_may_pass_or_is_told_already_is_raised_as_it_is(model: Model, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, in_words(model, "run", {}):
        raise error
    assert raised.value is error


def test_a_runtime_error_is_the_models_where_no_other_process_takes_part(model: Model) -> None:
    said = "cannot take the weights of OddForCausalLM: exceeds dimension size"
    with pytest.raises(UsageError, match=said), in_words(model, "take the weights of", {}, alone=True):
        raise RuntimeError("exceeds dimension size")


def test_a_class_of_transformers_that_vllm_changed_makes_models_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Olmo2Model

    def only_inside_vllm(self: Any, config: Any) -> None:
        raise AssertionError("Current vLLM config is not set")

    folder = architecture("olmo2", tmp_path)
    monkeypatch.setattr(Olmo2Model, "do_not_compile", False, raising=False)
    with classes_kept(folder):
        Olmo2Model.__init__ = only_inside_vllm
        with pytest.raises(AssertionError):
            opened(folder)
    assert opened(folder).model.do_not_compile is True
