"""How an engine is started, on a CPU and on a card: the variables that vLLM reads, and the options of its LLM.

Plain data in and out: neither vLLM nor torch is imported, so that what a card gets can be read where there is none.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selfkd.backend.adapters import Room
from selfkd.backend.model_files import text_sections
from selfkd.errors import BackendError

BLOCK_TOKENS = (
    32  # KV block on CPU, the least its kernels take: vLLM's 128 shares no prompt of under 128 tokens (a quarter slower)
)
BATCH_TOKENS = 4096  # prompt tokens per step on CPU, where prompts must not be split ("CPU Generator does not use offset")
MOST_OF_A_CARD = 0.92  # vLLM's own share
SPARE = 0.03  # of a card, for what others that are on it take meanwhile
RANK_BYTES = 2**30  # what a sleeping rank keeps on the card that it shares: its CUDA context
GIB = 2**30
OWNER = "SELFKD_ENGINE_PID"  # of the engine that vLLM's own processes follow into their end
EXTENSIONS = {  # what vLLM mixes into its worker, by whether that has a process of its own
    False: "selfkd.backend.engine.worker_extension.WorkerExtension",
    True: "selfkd.backend.engine.followed.WorkerExtension",
}
QUIET_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@cache
def known_options() -> frozenset[str]:
    """Return the names that the installed vLLM's LLM takes, read from its source, for importing it takes a quarter of a minute.

    None of them where vLLM is not installed, or its source does not tell.
    """
    spec = find_spec("vllm")
    places = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    sources = [place / file for place in places for file in ("engine/arg_utils.py", "entrypoints/llm.py")]
    if not sources or not all(path.is_file() for path in sources):
        return frozenset()
    arguments, llm = (_class_body(path, name) for path, name in zip(sources, ("EngineArgs", "LLM"), strict=False))
    fields = {one.target.id for one in arguments if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)}
    made = (one.args for one in llm if isinstance(one, ast.FunctionDef) and one.name == "__init__")
    return frozenset(fields | {one.arg for args in made for one in (*args.args[1:], *args.kwonlyargs)} if fields else ())


def _class_body(path: Path, name: str) -> list[ast.stmt]:
    tree = ast.parse(path.read_text("utf-8"))
    return next((node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), [])


@dataclass(frozen=True)
class Card:
    """Bytes of memory of the card that an engine is to start on; of several, of the fullest."""

    free: int
    total: int


def environment(numerics: Mapping[str, Any], card: bool) -> dict[str, str]:
    """Return what vLLM reads at its import. Beside a card, threads of torch do nothing but wait, and take cores from the scheduler."""
    found = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if has_core_process(numerics, card) else "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_BATCH_INVARIANT": "1" if numerics.get("exact") and card else "0",
    }
    threads = 1 if card else numerics["threads"]
    return {**found, "OMP_NUM_THREADS": str(threads)} if threads else found


def has_core_process(numerics: Mapping[str, Any], card: bool) -> bool:
    """Whether vLLM schedules in a process of its own. One over several cards must; one that feeds a card thousands of tokens a second
    should, so that no step waits until the answers of the last one are read. Else one process starts faster, steps in one order,
    and can be looked into by a debugger.
    """
    busy = card and numerics.get("backend") != "local" and not numerics.get("exact", True)
    return numerics["tensor_parallel"] > 1 or busy


def llm_options(
    numerics: Mapping[str, Any], model: str, config: Mapping[str, Any], context: int, extension: str, card: Card | None
) -> dict[str, Any]:
    """Return the arguments of vLLM's LLM for a model folder with this config.json.

    What the machine file says under `engine` wins over every choice made here.
    """
    chosen = {
        "model": model,
        "load_format": "dummy",
        "worker_extension_cls": extension,
        "generation_config": "vllm",  # a folder's defaults (top_p, penalties) would change what a recipe asked for
        "dtype": numerics["dtype"],
        "max_model_len": context,
        "tensor_parallel_size": numerics["tensor_parallel"],
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    if (
        numerics["tensor_parallel"] > 1
    ):  # else vLLM, which finds itself in a placement group of Ray, asks Ray for workers of its own
        chosen["distributed_executor_backend"] = "mp"
    if numerics["max_num_seqs"]:  # else as many as vLLM chooses for this card
        chosen["max_num_seqs"] = numerics["max_num_seqs"]
    place = _on_a_card(numerics, card) if card else _on_a_cpu(numerics, config, context)
    return {**chosen, **place, **numerics["engine"]}


def adapter_options(beside: Room) -> dict[str, Any]:
    """Return the arguments of an engine that keeps room for one adapter beside its weights.

    Only at its modules: around an output head vLLM for a CPU cannot score two prompts at once (0.31).
    """
    if not beside.rank:
        return {}
    room = {"max_lora_rank": beside.rank, "lora_target_modules": list(beside.modules)}
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, **room}


def _on_a_cpu(numerics: Mapping[str, Any], config: Mapping[str, Any], context: int) -> dict[str, Any]:
    untied = {"tie_word_embeddings": False}  # vLLM packs the head for a CPU, and a reload must reach it by a name
    return {
        "hf_overrides": {**untied, **{section: untied for section in text_sections(config)}},
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(numerics["kv_cache_gb"] * GIB),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, BATCH_TOKENS),
        "block_size": BLOCK_TOKENS,
    }


def _on_a_card(numerics: Mapping[str, Any], card: Card) -> dict[str, Any]:
    shared = numerics.get("turns", "share") == "share"
    options: dict[str, Any] = {"enable_sleep_mode": True} if shared else {}
    if "gpu_memory_utilization" not in numerics["engine"]:
        options["gpu_memory_utilization"] = memory_share(card, shared)
    return options


def memory_share(card: Card, shared: bool) -> float:
    """Return which share of a card an engine takes: vLLM's own, or less where a desktop, other programs or the ranks need it.

    BackendError where nothing is left.
    """
    free = card.free - (RANK_BYTES if shared else 0)
    share = math.floor(1000 * min(MOST_OF_A_CARD, free / card.total - SPARE)) / 1000
    if share <= 0:
        what = f"only {card.free / GIB:.1f} of {card.total / GIB:.1f} GiB of the card are free"
        fix = "End what else runs on it (nvidia-smi names it), or choose another card with CUDA_VISIBLE_DEVICES."
        raise BackendError(what, "engine", fix)
    return share
