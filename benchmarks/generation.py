"""Generation by selfkd against plain `LLM.generate`: the same requests, numerics and engine, in turns; tokens per second, and ratios.

`python generation.py RUN [THREADS]` takes the model and the requests of a finished quickstart run. For each number format, and for the kernels of a
CPU that has AVX2 only, one process holds one engine, and asks it in turns:

- local: a chunk through the local backend (encoding, seeds, proof of weights, the written file);
- plain: `LLM.generate` with the same sampler and seeds, its prompts encoded before;
- vllm: the same with vLLM's own sampler;
- unseeded: vLLM's own sampler without seeds, n answers per prompt.

Ratios are medians over turns; on one thread of processor time, so that a busy machine does not decide. `ray` is the same chunk through the Ray
backend, in an engine of its own, by the clock. `engines` is the tokens per second of 1, 2 and 4 engines of one thread each, through Ray.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl
from training import AVX2

from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.bf16 import format_here
from selfkd.backend.choose import open_backend
from selfkd.backend.engine import inverse_cdf
from selfkd.backend.machine import Machine
from selfkd.chain.run import Run
from selfkd.core.pool import Model

TURNS = {"local": 5, "plain": 5, "vllm": 2, "unseeded": 2}  # counted ones; vLLM's own sampler takes several times as long
ENGINES, CHUNKS = (1, 2, 4), 8
SAMPLING = Sampling(temperature=0.8, max_tokens=48)


@dataclass(frozen=True)
class Asked:
    """What every contender is asked, and with which numerics; on a card these name no `sampler`, for there vLLM's own draws."""

    model: Model
    requests: pl.DataFrame
    machine: Machine
    numerics: dict[str, Any]
    sampling: Sampling = SAMPLING


def asked_of(run: Run, dtype: str, threads: int) -> Asked:
    """The base model, and the first chunk of what round 1 asked."""
    model = run.sealed()[0].head()["policy"].at(run.folder.resolve())
    commit = run.made(1)["sample"]
    frames = [pl.read_parquet(run.folder / path) for path in commit.tables["samples"].files]
    requests = pl.concat(frames).select(list(REQUESTS)).head(run.recipe.chunk)
    numerics = {**run.numerics, "dtype": dtype, "threads": threads, "sampler": inverse_cdf.NAME}
    return Asked(model, requests, run.machine, numerics)


@contextmanager
def opened(asked: Asked, kind: str, chunks: int = 1) -> Iterator[tuple[Any, Callable[[], int]]]:
    """A backend, and what answers the requests through it and counts the tokens."""
    with tempfile.TemporaryDirectory() as name:
        folder, turns = Path(name), iter(range(10**6))
        backend = open_backend(replace(asked.machine, backend=kind), asked.numerics, folder / "log")

        def answer() -> int:
            asked_now = [
                Chunk(f"{turn:032d}", "s", part, folder / str(turn), folder / "tmp")
                for turn, part in zip(turns, asked.requests.iter_slices(-(-len(asked.requests) // chunks)), strict=False)
            ]
            return sum(reply.tokens for reply in backend.generate(asked.model, asked_now, asked.sampling))

        try:
            yield backend, answer
        finally:
            backend.close()


def plain(asked: Asked, llm: Any, seeded: bool) -> Callable[[], int]:
    """One `LLM.generate` call on all requests; unseeded with n answers per prompt."""
    from vllm import SamplingParams

    from selfkd.backend.tokens import encode_prompt, tokenizer

    requests, sampling = asked.requests, asked.sampling
    tok, count = tokenizer(asked.model.path), requests["number"].n_unique()
    rows = requests if seeded else requests.filter(pl.col("number") == 0)
    prompts = [{"prompt_token_ids": encode_prompt(tok, messages)} for messages in rows["teacher_messages"]]
    common = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens, "stop_token_ids": [tok.eos_token_id]}
    params = [SamplingParams(seed=seed, **common) for seed in rows["seed"]] if seeded else SamplingParams(n=count, **common)

    def answer() -> int:
        llm.reset_prefix_cache()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return sum(len(answer.token_ids) for output in outputs for answer in output.outputs)

    return answer


def draw_by(llm: Any, ours: bool) -> None:
    """Give the engine our sampler, or vLLM's own."""

    def change(worker: Any) -> None:
        sampler = worker.model_runner.sampler.topk_topp_sampler
        sampler.forward = inverse_cdf.InverseCdf(sampler.logprobs_mode) if ours else sampler.forward_cpu

    llm.collective_rpc(change)


def in_turns(asked: Asked) -> dict[str, list[tuple[float, float]]]:
    """{contender: [(tokens per second, tokens per second of processor time)]}, the first turn of each left out."""
    with opened(asked, "local") as (backend, local):
        local()
        llm, draws = backend._engine._engine.llm, "sampler" in asked.numerics
        contenders = {
            "local": (True, local),
            **({"plain": (True, plain(asked, llm, True))} if draws else {}),
            "vllm": (False, plain(asked, llm, True)),
            "unseeded": (False, plain(asked, llm, False)),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
        contenders["plain" if draws else "vllm"][1]()  # warm, as `local` is
        for turn in range(max(TURNS.values())):
            for name, (ours, answer) in contenders.items():
                if turn < TURNS[name]:
                    if draws:
                        draw_by(llm, ours)
                    found[name].append(timed(answer))
    return found


def by_ray(asked: Asked) -> dict[str, list[tuple[float, float]]]:
    with opened(asked, "ray") as (_, answer):
        rates = [timed(answer) for _ in range(TURNS["local"] + 1)]
    return {"ray": rates[1:]}


def by_engines(asked: Asked) -> dict[str, float]:
    """{engines: tokens per second}, each the median of three turns after one that does not count."""

    def rate(engines: int) -> float:
        machine = replace(asked.machine, generators=engines)
        with opened(replace(asked, machine=machine), "ray", CHUNKS) as (_, answer):
            return statistics.median([timed(answer)[0] for _ in range(4)][1:])

    return {str(engines): round(rate(engines), 1) for engines in ENGINES}


def timed(answer: Callable[[], int]) -> tuple[float, float]:
    clock, processor = time.monotonic(), time.process_time()
    tokens = answer()
    return tokens / (time.monotonic() - clock), tokens / (time.process_time() - processor)


def main(folder: str, threads: str) -> dict[str, dict[str, Any]]:
    """{number format and kernels: {contender: tokens per second, 'local/plain': ratio, …}, 'engines': {number: tokens per second}}."""

    def measured(which: str, dtype: str, threads: str = threads, **kernels: str) -> dict[str, Any]:
        command = [sys.executable, __file__, folder, threads, which, dtype]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **kernels})
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    own = format_here(int(threads)).dtype
    found = {dtype: {**measured("turns", dtype), **measured("ray", dtype)} for dtype in sorted({own, "float32"})}
    found["float32, AVX2"] = measured("turns", "float32", **AVX2)
    return {**{name: summed_up(each, threads) for name, each in found.items()}, "engines": measured("engines", own, "1")}


def summed_up(found: dict[str, list[tuple[float, float]]], threads: str) -> dict[str, float]:
    """Medians of the clock's rates, and of the ratios of one turn."""
    counted = 1 if threads == "1" else 0
    rates = {name: round(statistics.median(wall for wall, _ in turns), 1) for name, turns in found.items()}
    turns = {
        name: [one[counted] / other[counted] for one, other in zip(found["local"], found[name], strict=False)]
        for name in TURNS
        if name != "local"
    }
    ratios = {f"local/{name}": round(statistics.median(each), 3) for name, each in turns.items()}
    spread = {"least": round(min(turns["plain"]), 3), "most": round(max(turns["plain"]), 3)}
    return {**rates, **ratios, **spread, **({"ray/plain": round(rates["ray"] / rates["plain"], 3)} if "ray" in rates else {})}


MEASURES: dict[str, Callable[[Asked], Any]] = {"turns": in_turns, "ray": by_ray, "engines": by_engines}

if __name__ == "__main__":
    folder, given = Path(sys.argv[1]), sys.argv[2:]
    if len(given) == 3:
        print(json.dumps(MEASURES[given[1]](asked_of(Run.at(folder), given[2], int(given[0])))))
    else:
        print(json.dumps(main(str(folder), given[0] if given else str(Run.at(folder).numerics["threads"]))))
