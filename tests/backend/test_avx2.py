"""The path of a CPU that has AVX2 only, on any x86 machine: torch, oneDNN and vLLM are kept to it by their own variables."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfkd.core import facts
from selfkd.core.accelerator import accelerator

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        "avx2" not in facts.instructions() or accelerator().on_cards, reason="needs an x86 CPU with AVX2, and no GPU"
    ),
]
KEPT = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
ENGINE = """
import json, sys
from pathlib import Path

import polars as pl
from tiny import WORDS, as_model, say, tiny_model

from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.engine import held_engine, root_model
from selfkd.backend.machine import Machine, fixed_numerics

def main(folder):
    numerics = fixed_numerics(Machine(threads=1, kv_cache_gb=0.05, max_model_len=256, max_num_seqs=16))
    root_model.load_model({"path": str(tiny_model(folder / "source"))}, folder / "root", None)
    model = as_model(folder / "root")
    held = held_engine.HeldEngine(held_engine.ENGINE, numerics, folder / "beat")
    held.preload()
    _, notes, facts = held.ensure(model)
    rows = [
        {"id": text, "prompt": text, "number": 0, "seed": at, "tiebreak": 0.5, "teacher_messages": say(text)}
        for at, text in enumerate(WORDS)
    ]
    chunk = Chunk("k" * 64, "answers", pl.DataFrame(rows, schema=REQUESTS), folder / "data", folder / "tmp")
    answers = pl.read_parquet(held.generate(model, chunk, Sampling(max_tokens=12)).path)
    print(json.dumps({"numerics": numerics, "notes": notes, "facts": facts, "tokens": answers["tokens"].to_list()}))
    held.close()

main(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an engine in a process of its own says and answers; as in Ray's actors, vLLM is imported before the engine is made."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", ENGINE, str(tmp_path_factory.mktemp("avx2"))]
    found = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **KEPT, "PYTHONPATH": path})
    assert found.returncode == 0, found.stderr
    said: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return said


def test_the_kernels_of_avx2_are_the_ones_that_are_loaded(made: dict[str, Any]) -> None:
    assert platform.machine() in ("x86_64", "AMD64")
    assert (made["facts"]["kernels"], made["facts"]["vllm_kernels"]) == ("AVX2", ["_C_AVX2"])
    assert {name: made["facts"][name] for name in KEPT} == KEPT


def test_auto_is_float32_there_in_engine_and_training_and_nothing_was_timed(made: dict[str, Any]) -> None:
    assert (made["numerics"]["dtype"], made["numerics"]["precision"]) == ("float32", "fp32")
    assert made["numerics"]["number_format"].startswith("this CPU has no bfloat16")


def test_its_engine_proves_its_weights_and_answers(made: dict[str, Any]) -> None:
    assert made["notes"]["proved"] is True and made["notes"]["distance"] < 1e-4
    assert len(made["tokens"]) == 8 and all(count > 0 for count in made["tokens"])
