"""Generation inside a run against plain `LLM.generate`: the same requests, seeds and numerics; tokens per second, and their ratio.

`python generation.py RUN` takes the model at the base of a finished quickstart run. The two engines live one after the other in processes of their
own, the machine otherwise idle; each is asked three times and the median counts.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import polars as pl

from selfkd.backend.base import REQUESTS, Chunk, Sampling
from selfkd.backend.choose import open_backend
from selfkd.chain.run import Run
from selfkd.core.pool import Model

TIMES = 3
SAMPLING = Sampling(temperature=0.8, max_tokens=48)


def requests_of(run: Run) -> tuple[Model, pl.DataFrame]:
    """The base model, and what round 1 asked."""
    model = run.sealed()[0].head()["policy"].at(run.folder.resolve())
    commit = run.made(1)["sample"]
    frames = [pl.read_parquet(run.folder / path) for path in commit.tables["samples"].files]
    return model, pl.concat(frames).select(list(REQUESTS))


def inside(run: Run) -> list[float]:
    """Tokens per second through the Ray backend: actor, dispatcher, chunks and files included."""
    model, requests = requests_of(run)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backend = open_backend(run.machine, dict(run.numerics), folder / "log")
        rates = []
        try:
            for turn in range(TIMES + 1):  # the first one starts the engine and does not count
                cuts = [requests[at : at + run.recipe.chunk] for at in range(0, requests.height, run.recipe.chunk)]
                chunks = [Chunk(f"{turn}-{i}" * 8, "s", cut, folder / str(turn), folder / "tmp") for i, cut in enumerate(cuts)]
                began = time.monotonic()
                tokens = sum(reply.tokens for reply in backend.generate(model, chunks, SAMPLING))
                rates.append(tokens / (time.monotonic() - began))
        finally:
            backend.close()
    return rates[1:]


def plain(run: Run, seeded: bool) -> list[float]:
    """Tokens per second of one `LLM.generate` call: all requests at once; unseeded with n answers per prompt otherwise."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    os.environ.update(OMP_NUM_THREADS=str(run.numerics["threads"]), TORCHDYNAMO_DISABLE="1")
    from vllm import LLM, SamplingParams

    from selfkd.backend.tokens import encode_prompt, tokenizer

    model, requests = requests_of(run)
    options = {"enforce_eager": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 4096, "block_size": 32}
    llm = LLM(
        model.path,
        dtype=run.numerics["dtype"],
        max_model_len=run.recipe.context,
        max_num_seqs=run.numerics["max_num_seqs"],
        **options,
    )
    tok = tokenizer(model.path)
    rows = requests if seeded else requests.filter(pl.col("number") == 0)
    prompts = [{"prompt_token_ids": encode_prompt(tok, messages)} for messages in rows["teacher_messages"]]
    count = requests["number"].n_unique()
    common = {"temperature": SAMPLING.temperature, "max_tokens": SAMPLING.max_tokens, "stop_token_ids": [tok.eos_token_id]}
    params = [SamplingParams(seed=seed, **common) for seed in rows["seed"]] if seeded else SamplingParams(n=count, **common)
    rates = []
    for _ in range(TIMES + 1):
        llm.reset_prefix_cache()
        began = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        tokens = sum(len(answer.token_ids) for output in outputs for answer in output.outputs)
        rates.append(tokens / (time.monotonic() - began))
    return rates[1:]


def main(folder: str) -> dict[str, float]:
    def measured(which: str) -> float:
        done = subprocess.run([sys.executable, __file__, which, folder], capture_output=True, text=True, check=True)
        return statistics.median(json.loads(done.stdout.strip().splitlines()[-1]))

    rates = {which: round(measured(which), 1) for which in ("inside", "seeded", "unseeded")}
    ratios = {f"inside/{which}": round(rates["inside"] / rates[which], 3) for which in ("seeded", "unseeded")}
    return {**rates, **ratios}


if __name__ == "__main__":
    if sys.argv[1] in ("inside", "seeded", "unseeded"):
        opened = Run.at(Path(sys.argv[2]))
        print(json.dumps(inside(opened) if sys.argv[1] == "inside" else plain(opened, sys.argv[1] == "seeded")))
    else:
        print(json.dumps(main(sys.argv[1])))
