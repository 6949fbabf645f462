"""The table of vLLM's options against the installed vLLM."""

from __future__ import annotations

import dataclasses
import math

import pytest

from selfkd.backend.engine.sampling_options import INNER, OWNED, PASSED, check_vllm

EXAMPLES = {"int": 1, "float": 0.5, "bool": True, "ints": [3, 4], "texts": ["a"], "mapping": {}}


@pytest.fixture(scope="module")
def params():
    return pytest.importorskip("vllm.sampling_params")


def test_every_field_of_vllm_is_passed_or_decided_here_and_no_other_is_named(params):
    fields = {name for name in params.SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert set(PASSED) | set(OWNED) == fields
    assert not set(PASSED) & set(OWNED)


def test_the_words_inside_a_field_are_those_of_vllm(params):
    classes = {"structured_outputs": params.StructuredOutputsParams, "repetition_detection": params.RepetitionDetectionParams}
    found = {
        name: {one.name for one in dataclasses.fields(cls) if not one.name.startswith("_")} for name, cls in classes.items()
    }
    assert found == {name: set(words) for name, words in INNER.items()}


@pytest.mark.parametrize("name", [name for name, (kind, *_) in PASSED.items() if kind != "mapping"])
def test_vllm_takes_what_the_table_takes_and_refuses_what_is_beyond_it(params, name):
    refusals = pytest.importorskip("vllm.exceptions").VLLMValidationError
    kind, least, most = PASSED[name]
    fine = [EXAMPLES[kind], *([least] if least is not None else []), *([most] if most is not None else [])]
    for value in fine:
        assert list(check_vllm(name, value)) == []
        params.SamplingParams(**{name: value})
    for beyond in [*([least - 1] if least is not None else []), *([most + 1] if most is not None else [])]:
        assert list(check_vllm(name, beyond)) != []
        with pytest.raises(refusals):
            params.SamplingParams(**{name: beyond})
    assert list(check_vllm(name, math.nan if kind == "texts" else {"a": 1})) != []
