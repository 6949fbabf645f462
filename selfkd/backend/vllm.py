"""One vLLM engine that lives across steps and rounds: weights are swapped in place, and every swap is proved.

Knows nothing of recipes, runs or Ray: a model folder and a chunk go in, a written chunk and the digest of the weights that
made it come out. vLLM and torch are imported when an engine is made, never before.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from selfkd.backend.base import Chunk, Completion, Reply, Sampling, write_chunk
from selfkd.backend.probe import Probe, Verdict, judge, read_probe
from selfkd.backend.tokens import encode_completion, encode_prompt, end_ids, tokenizer
from selfkd.errors import BackendError, UsageError, WeightsError
from selfkd.types import Model

Progress = Callable[[int, int], None]
BLOCK = 32  # KV block on CPU: vLLM's 128 would cache no prompt of under 128 tokens, and 32 is the least its kernels take
BATCH_TOKENS = 4096  # prompt tokens per step on CPU, where prompts must not be split ("CPU Generator does not use offset")
CANARY = 2 * BLOCK + 1  # tokens of a prompt that a swap must make the engine forget
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


class Engine:
    """Holds the weights `weights` (a digest; "" means unknown, and then it refuses to answer).

    It starts on random weights: even the first model arrives by `swap`, so that start and swap are one code path.
    """

    def __init__(self, numerics: Mapping[str, Any], model: Model) -> None:
        self.numerics, self.weights = dict(numerics), ""
        self.context = _context(model, numerics["max_model_len"])
        self.llm: Any = _start(numerics, model, self.context)
        self.cpu = self.llm.llm_engine.vllm_config.device_config.device_type == "cpu"
        self._tok = tokenizer(model.path)
        self._asleep = False

    def swap(self, model: Model, fresh: bool = False) -> dict[str, Any]:
        """Load `model` in place and prove it; WeightsError if the engine then does not hold it. Free if it holds it already.

        Notes: seconds, proved (True or why not), survived (share of the update that the engine sees; None for a root),
        distance (from the trainer's log-probabilities), cached_tokens.
        """
        if model.digest == self.weights and not fresh:
            return {"seconds": 0.0, "proved": True, "survived": None, "distance": None, "cached_tokens": 0}
        started = time.perf_counter()
        probe = read_probe(Path(model.path))
        held, self.weights = self.weights, ""
        before = self._score(probe, [self._canary(probe)])[0]
        self._reload(model)
        self._forget()
        after, cached = self._score(probe, [self._canary(probe)])
        verdict = judge(probe, after, before if held and held == probe.parent else None, self.numerics["dtype"])
        _refuse_unproved(model, verdict, cached)
        self.weights, self._tok = model.digest, tokenizer(model.path)
        return {
            "seconds": round(time.perf_counter() - started, 3),
            "proved": verdict.proved,
            "survived": verdict.survived,
            "distance": verdict.distance,
            "cached_tokens": cached,
        }

    def generate(self, chunk: Chunk, model: Model, sampling: Sampling, on_tokens: Progress | None = None) -> Reply:
        """Answer a chunk alone, from an empty prefix cache, and write it; `on_tokens(requests done, tokens)` once a second.

        All requests enter before the first step, so the batches are the same on every engine with the same numerics.
        """
        self._must_hold(model)
        started = time.perf_counter()
        self._forget()
        rows = chunk.requests.select("id", "seed", "asked").to_dicts()
        prompts = [self._prompt(row["id"], row["asked"], sampling.max_tokens) for row in rows]
        ends = sorted(end_ids(self._tok))
        params = [_params(sampling, ends, row["seed"]) for row in rows]
        outputs = self._run(prompts, params, on_tokens)
        completions = [_completion(output.outputs[0]) for output in outputs]
        path = write_chunk(chunk, model, completions)
        tokens = sum(len(completion.token_ids) for completion in completions)
        return Reply(chunk.key, path, self.weights, tokens, round(time.perf_counter() - started, 3))

    def logprobs(self, model: Model, rows: pl.DataFrame) -> list[tuple[str, float, int]]:
        """(id, summed log-probability, tokens) of each row's completion: `token_ids` as sampled, else `text` and an end token."""
        self._must_hold(model)
        ids, starts = [], []
        for row in rows.select("id", "messages", "text", "token_ids").iter_rows(named=True):
            prompt = encode_prompt(self._tok, row["messages"])
            sampled = row["token_ids"]
            completion = encode_completion(self._tok, row["text"] or "", sampled, ended=sampled is None)
            self._must_fit(row["id"], len(prompt) + len(completion), 1)
            ids.append(prompt + completion)
            starts.append(len(prompt))
        scored = self._prompt_logprobs(ids, starts)
        return [(name, float(values.sum()), len(values)) for name, values in zip(rows["id"], scored, strict=True)]

    def sleep(self) -> None:
        """Give the GPU's memory back (weights and KV cache are dropped, not kept). On CPU nothing happens."""
        if not self.cpu:
            self._forget()
            self.llm.sleep(level=2)
            self.weights, self._asleep = "", True

    def wake(self, model: Model) -> dict[str, Any]:
        """Take memory again, load `model` and prove it. Weights come before the KV cache, so the peak is as at the start."""
        return self.swap(model, fresh=self._asleep)

    def close(self) -> None:
        """End the engine. In one process, vLLM gives a GPU's memory back only when the process ends."""
        self.weights = ""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _must_hold(self, model: Model) -> None:
        if model.digest != self.weights:
            holds = self.weights[:12] or "no proved weights"
            raise WeightsError(f"the engine holds {holds}, asked for {model}", model.path, "Swap to the model first.")

    def _must_fit(self, name: str, length: int, room: int) -> None:
        if length + room > self.context:
            what = f"prompt {name} has {length} tokens, and {room} more are to be generated; the context holds {self.context}"
            raise UsageError(what, "", "Shorten or drop the prompt, lower max_tokens, or raise max_model_len of the machine.")

    def _prompt(self, name: str, messages: Sequence[Mapping[str, str]], room: int) -> list[int]:
        ids = encode_prompt(self._tok, messages)
        self._must_fit(name, len(ids), room)
        return ids

    def _reload(self, model: Model) -> None:
        if self._asleep:
            self.llm.wake_up(["weights"])
        missing = sorted({name for names in self.llm.collective_rpc("selfkd_reload", args=(model.path,)) for name in names})
        if self._asleep:
            self.llm.wake_up(["kv_cache"])
            self._asleep = False
        if missing:
            what = f"{len(missing)} tensors of the engine were not loaded: {', '.join(missing[:5])}"
            raise WeightsError(what, model.path, "The checkpoint is incomplete, or vLLM names this architecture's tensors otherwise.")

    def _forget(self) -> None:
        """Drop the prefix cache: a reload leaves it, and would answer from the old weights' keys and values."""
        if not self.llm.reset_prefix_cache():
            raise BackendError("vLLM did not reset its prefix cache: requests are still running", "engine", "Restart the engine.")

    def _canary(self, probe: Probe) -> list[int]:
        """A prompt over two KV blocks long that shares no prefix with the probe's sequences."""
        ids = [token for sequence in probe.ids for token in reversed(sequence)] or [0]
        return (ids * (1 + CANARY // len(ids)))[: min(CANARY, self.context - 1)]

    def _score(self, probe: Probe, canaries: list[list[int]]) -> tuple[np.ndarray, int]:
        """The engine's log-probabilities on the probe, and how many tokens of the canary it took from its cache.

        The scores cannot see a stale cache (vLLM skips it when it scores a prompt); the canary can.
        """
        if self._asleep:
            return np.empty(0), 0
        from vllm import SamplingParams

        one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        self._cached = 0
        scores = self._prompt_logprobs(probe.ids, probe.starts, [(ids, one) for ids in canaries])
        return np.concatenate(scores), self._cached
