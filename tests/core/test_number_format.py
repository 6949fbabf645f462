"""Which number format a machine computes in, by inventories: what a processor, a GPU, a timing and a machine file say."""

from __future__ import annotations

import pytest

from selfkd.core import number_format
from selfkd.core.number_format import NumberFormat, choose, in_hardware, of_training, resolve, usable

ZEN_3 = ["avx", "avx2", "f16c", "fma"]
CASCADE_LAKE = [*ZEN_3, "avx512f", "avx512_vnni"]
ZEN_4 = [*CASCADE_LAKE, "avx512_bf16"]
SAPPHIRE_RAPIDS = [*ZEN_4, "amx_bf16", "amx_int8", "amx_tile"]
GRAVITON_2, GRAVITON_3 = ["asimd", "asimddp", "fphp"], ["asimd", "bf16", "i8mm", "svebf16"]


def never() -> float:
    raise AssertionError("nothing is to be timed here")


@pytest.mark.parametrize("flags", [ZEN_3, CASCADE_LAKE, GRAVITON_2, []])
def test_a_cpu_without_bfloat16_takes_float32_and_nothing_is_timed(flags):
    found = choose(flags, None, never)
    assert (found.dtype, found.precision) == ("float32", "fp32")
    assert found.why == "this CPU has no bfloat16 (none of the flags amx_bf16, avx512_bf16, bf16)"


@pytest.mark.parametrize(
    ("flags", "said"),
    [(ZEN_4, "avx512_bf16"), (SAPPHIRE_RAPIDS, "amx_bf16 and avx512_bf16"), (GRAVITON_3, "bf16")],
)
def test_a_cpu_with_bfloat16_takes_it_and_says_by_which_flags(flags, said):
    found = choose(flags, None, lambda: 0.42)
    assert (found.dtype, found.precision) == ("bfloat16", "bf16")
    assert found.why == f"this CPU has {said}, and a bfloat16 matmul takes 0.42 times as long as in float32"


@pytest.mark.parametrize(("times", "dtype"), [(2.9, "bfloat16"), (3.0, "float32"), (77.6, "float32")])
def test_a_timed_matmul_vetoes_what_is_only_emulated(times, dtype):
    found = choose(SAPPHIRE_RAPIDS, None, lambda: times)
    assert found.dtype == dtype
    assert (", but a bfloat16 matmul takes" in found.why) == (dtype == "float32")


def test_where_nothing_could_be_timed_the_flags_are_trusted_and_it_says_so():
    found = choose(ZEN_4, None, lambda: "not timed: torch is not installed")
    assert found == NumberFormat("bfloat16", "bf16", "this CPU has avx512_bf16 (not timed: torch is not installed)")


@pytest.mark.parametrize("flags", [ZEN_3, SAPPHIRE_RAPIDS])
def test_a_gpu_decides_alone(flags):
    assert choose(flags, True, never) == NumberFormat("bfloat16", "bf16", "the GPU has bfloat16")
    assert choose(flags, False, never).dtype == "float32"


@pytest.mark.parametrize(
    ("environ", "kept"),
    [
        ({}, SAPPHIRE_RAPIDS),
        ({"ONEDNN_MAX_CPU_ISA": "AVX2"}, ZEN_3),
        ({"DNNL_MAX_CPU_ISA": "avx512_core_vnni"}, ZEN_3),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, ZEN_3),
        ({"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, SAPPHIRE_RAPIDS),
    ],
)
def test_what_a_variable_keeps_libraries_from_is_not_there(environ, kept):
    assert usable(SAPPHIRE_RAPIDS, environ) == kept
    assert usable(GRAVITON_3, environ) == GRAVITON_3
    assert bool(in_hardware(kept)) == (kept == SAPPHIRE_RAPIDS)


def test_a_word_of_the_machine_file_wins_and_training_follows_it_where_the_hardware_can():
    quick, slow = NumberFormat("bfloat16", "bf16", "flags"), NumberFormat("float32", "fp32", "no flags")
    assert resolve("auto", lambda: quick) is quick and resolve("auto", lambda: slow) is slow
    words = {
        (asked, here): resolve(asked, lambda here=here: here) for asked in ("bfloat16", "float16") for here in (quick, slow)
    }
    assert {(asked, here.precision): (one.dtype, one.precision) for (asked, here), one in words.items()} == {
        ("bfloat16", "bf16"): ("bfloat16", "bf16"),
        ("bfloat16", "fp32"): ("bfloat16", "fp32"),
        ("float16", "bf16"): ("float16", "bf16"),
        ("float16", "fp32"): ("float16", "fp32"),
    }
    assert resolve("float32", never) == NumberFormat("float32", "fp32", "the machine file says so")  # type: ignore[arg-type]


def test_a_train_step_keeps_its_own_word_and_auto_is_that_of_the_run():
    assert [of_training(word, {"precision": "fp32"}) for word in ("auto", "bf16", "fp32")] == ["fp32", "bf16", "fp32"]
    assert of_training("auto", {"dtype": "float32"}) == "bf16"  # an older run, whose only default was bf16


def test_the_flags_of_bfloat16_are_among_those_that_facts_keep():
    from selfkd.core.facts import INSTRUCTIONS

    assert all(INSTRUCTIONS.match(flag) for flag in number_format.BF16_FLAGS)
