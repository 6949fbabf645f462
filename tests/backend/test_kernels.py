"""Which kernels vLLM may load follows ATEN_CPU_CAPABILITY, in runs that were fixed by a version which knows it."""

from __future__ import annotations

from typing import Any

import pytest

from selfkd.backend.engine import inverse_cdf, kernels

torch = pytest.importorskip("torch")
HAS = {"avx2": True, "avx512_f": True, "amx_bf16": True}
ALL, AVX2 = HAS, {"avx2": True, "avx512_f": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("variable", "numerics", "seen"),
    [
        ("avx2", {"sampler": inverse_cdf.NAME}, AVX2),
        ("DEFAULT", {"sampler": inverse_cdf.NAME}, AVX2),
        ("avx512", {"sampler": inverse_cdf.NAME}, ALL),
        ("avx2", {}, ALL),  # of a run that began with what vLLM chooses
    ],
)
def test_vllm_is_kept_to_the_kernels_of_torch_but_an_older_run_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, variable: str, numerics: dict[str, Any], seen: dict[str, bool]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(HAS), raising=False)
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", variable)
    kernels.follow_torch(numerics)
    assert torch.cpu.get_capabilities() == seen
