"""One vLLM engine that lives across steps and rounds: weights are swapped in place, and every swap is proved.

Knows nothing of recipes, runs or Ray: a model folder and a chunk go in, a written chunk and the digest of the weights that
made it come out. vLLM and torch are imported when an engine is made, never before.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from selfkd.backend.base import Chunk, Completion, Logprob, Reply, Sampling, write_chunk
from selfkd.backend.engine.sampling_params import refusals, request_params
from selfkd.backend.facts import of_engine
from selfkd.backend.model_files import context_of
from selfkd.backend.probe import Probe, Scored, Scores, Verdict, judge, read_probe
from selfkd.backend.tokens import (
    Messages,
    encode_completion,
    encode_prompt,
    encode_prompts,
    end_ids,
    ids_of_text,
    opening,
    tokenizer,
)
from selfkd.core.accelerator import accelerator
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError, WeightsError

OnTokens = Callable[[int, int], None]  # (requests done, tokens so far)
REPORT_SECONDS = 1.0
BLOCK_TOKENS = (
    32  # KV block on CPU, the least its kernels take: vLLM's 128 shares no prompt of under 128 tokens (a quarter slower)
)
BATCH_TOKENS = 4096  # prompt tokens per step on CPU, where prompts must not be split ("CPU Generator does not use offset")
CANARY_TOKENS = 2 * BLOCK_TOKENS + 1  # of a prompt that a swap must make the engine forget
QUIET_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


class Engine:
    """Holds the weights `weights` (a digest; "" means unknown, and then it refuses to answer).

    It starts on random weights: even the first model arrives by `swap`, so that start and swap are one code path.
    """

    def __init__(self, numerics: Mapping[str, Any], model: Model) -> None:
        self.numerics, self.weights, self.model = dict(numerics), "", model
        self.context = context_of(Path(model.path), numerics["max_model_len"])
        self.room = context_of(
            Path(model.path), numerics["max_model_len"] + 1
        )  # to score what fills the context, vLLM draws one more
        self.llm: Any = _start(numerics, model, self.room)
        self.cpu = self.llm.llm_engine.vllm_config.device_config.device_type == "cpu"
        self._tok = tokenizer(model.path)
        self.facts = _facts(self.llm)
        self._notes: dict[str, Any] = {}
        self._asleep = False

    def swap(self, model: Model, fresh: bool = False) -> dict[str, Any]:
        """Load `model` in place and prove it; WeightsError if the engine then does not hold it. Free if it holds it already.

        Notes: seconds, proved (True or why not), survived (share of the update that the engine sees; None for a root),
        distance (from the trainer's log-probabilities), cached_tokens.
        """
        if model.digest == self.weights and not fresh:
            return {**self._notes, "seconds": 0.0}
        started = time.perf_counter()
        probe = read_probe(Path(model.path))
        held, self.weights = self.weights, ""
        scores = None if self._asleep else self._score(probe)[0]  # also puts a prompt into the cache that must be forgotten
        self._reload(model)
        self._forget()
        after, cached = self._score(probe)
        before = None if held == model.digest else scores
        verdict = judge(probe, Scored(after, before, bool(held) and held == probe.parent), self.numerics["dtype"])
        _refuse(model, verdict, cached)
        self.weights, self.model, self._tok = model.digest, model, tokenizer(model.path)
        self._notes = {**verdict.notes(), "cached_tokens": cached, "seconds": round(time.perf_counter() - started, 3)}
        return self._notes

    def generate(self, chunk: Chunk, sampling: Sampling, on_tokens: OnTokens | None = None) -> Reply:
        """Answer a chunk alone, from an empty prefix cache, and write it; `on_tokens(requests done, tokens)` about once a second.

        All requests enter before the first step, so the batches are the same in every engine with the same numerics.
        """
        self._must_know_its_weights()
        started = time.perf_counter()
        self._forget()
        prompts = self._prompts(chunk.requests["teacher_messages"].to_list(), sampling.max_tokens)
        params = request_params(sampling, sorted(end_ids(self._tok)), chunk.requests["seed"].to_list())
        outputs = self._run(prompts, params, on_tokens, sampling.extra)
        completions = [_completion(self._tok, output, param) for output, param in zip(outputs, params, strict=True)]
        path = write_chunk(chunk, self.model, completions, self.weights, self.facts)
        tokens = sum(len(completion.token_ids) for completion in completions)
        return Reply(chunk.key, path, self.weights, tokens, round(time.perf_counter() - started, 3))

    def logprobs(self, rows: pl.DataFrame) -> list[Logprob]:
        """Return (id, summed log-probability, tokens) of each row's completion: the ids that a training row would have."""
        self._must_know_its_weights()
        ids, starts = [], []
        for row in rows.iter_rows(named=True):
            place = f"sample {row['id']} of the prompt {opening(row['messages'])}"
            prompt = encode_prompt(self._tok, row["messages"], place)
            ended = row["finish_reason"] == "stop"
            completion = encode_completion(self._tok, row["text"] or "", row["token_ids"], ended, place)
            self._must_fit(place, len(prompt) + len(completion), 1, self.room)
            ids.append(prompt + completion)
            starts.append(len(prompt))
        outputs = self._run(ids, [_scoring() for _ in ids])
        scores = [_scores(output, start) for output, start in zip(outputs, starts, strict=True)]
        return [(name, sum(values), len(values)) for name, values in zip(rows["id"], scores, strict=True)]

    def sleep(self) -> None:
        """Give the GPU's memory back: weights and KV cache are dropped, not kept. On CPU nothing happens."""
        if not self.cpu and not self._asleep:
            self._forget()
            self.llm.sleep(level=2)
            self.weights, self._asleep = "", True

    def wake(self, model: Model) -> dict[str, Any]:
        """Take memory again, load `model` and prove it; the notes of `swap`."""
        return self.swap(model)

    def close(self) -> None:
        """End the engine. vLLM in one process gives all of a GPU's memory back only when the process ends."""
        self.weights = ""
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _must_know_its_weights(self) -> None:
        if not self.weights:
            raise WeightsError("the engine holds no proved weights", self.model.path, "Swap to a model first.")

    def _must_fit(self, place: str, length: int, room: int, context: int) -> None:
        if length + room > context:
            what = f"has {length} tokens and {room} more are to be generated, but the context holds {context}"
            raise UsageError(what, place, "Shorten or drop it, lower max_tokens, or raise the recipe's `context`.")

    def _prompts(self, conversations: Sequence[Messages], room: int) -> list[list[int]]:
        places = [f"the prompt {opening(messages)}" for messages in conversations]
        prompts = encode_prompts(self._tok, conversations, places)
        for place, ids in zip(places, prompts, strict=True):
            self._must_fit(place, len(ids), room, self.context)
        return prompts

    def _reload(self, model: Model) -> None:
        """Weights wake before the KV cache does, so that the peak of memory is no higher than at the start."""
        if self._asleep:
            self.llm.wake_up(["weights"])
        missing = {name for names in self.llm.collective_rpc("selfkd_reload", args=(model.path,)) for name in names}
        if self._asleep:
            self.llm.wake_up(["kv_cache"])
            self._asleep = False
        if missing:
            what = f"{len(missing)} tensors of the engine were not in the checkpoint: {', '.join(sorted(missing)[:5])}"
            raise WeightsError(
                what, model.path, "The checkpoint is incomplete, or vLLM does not know this architecture's names."
            )

    def _forget(self) -> None:
        """Drop the prefix cache: a reload leaves it there, and answers would start from the old weights' keys and values."""
        if not self.llm.reset_prefix_cache():
            raise BackendError(
                "vLLM did not drop its prefix cache: requests are still running", "engine", "Restart the engine."
            )

    def _score(self, probe: Probe) -> tuple[Scores, int]:
        """Return the engine's log-probabilities on the probe, and how many tokens of a long prompt it took from its cache.

        The scores cannot see a stale cache (vLLM does not read it when it scores a prompt); the long prompt can. It shares no
        prefix with the probe's sequences, which enter the cache in the same step.
        """
        backwards = [token for sequence in probe.ids for token in reversed(sequence)]
        canary = list(islice(cycle(backwards), min(CANARY_TOKENS, self.context - 1)))
        outputs = self._run([*probe.ids, canary], [*(_scoring() for _ in probe.ids), _one_token()])
        scores = [_scores(output, start) for output, start in zip(outputs, probe.starts, strict=False)]
        return np.array([value for values in scores for value in values]), outputs[-1].num_cached_tokens

    def _run(
        self,
        prompts: Sequence[list[int]],
        params: Sequence[Any],
        on_tokens: OnTokens | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """Return outputs in the order of `prompts`. Whatever interrupts it, no request stays behind in the engine.

        A request that vLLM does not take because of the recipe's words `extra` is a UsageError, and the engine lives on.
        """
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        with refusals(extra or {}):
            names = self.llm.enqueue(inputs, list(params), use_tqdm=False) if inputs else []
        try:
            outputs = list(self._finish(on_tokens))
        except BaseException:  # Ctrl-C too: a request left here would join the next chunk's batch
            self.llm.llm_engine.abort_request(names, internal=True)
            raise
        return sorted(outputs, key=lambda output: int(output.request_id))

    def _finish(self, on_tokens: OnTokens | None) -> Iterator[Any]:
        done, tokens, reported = 0, 0, time.monotonic()
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                done, tokens = done + 1, tokens + len(output.outputs[0].token_ids)
                yield output
            if on_tokens and time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                on_tokens(done, tokens + self._tokens_in_flight())

    def _tokens_in_flight(self) -> int:
        """Count those of unfinished requests, where the scheduler lives in this process (tensor_parallel 1); else 0."""
        core = getattr(self.llm.llm_engine.engine_core, "engine_core", None)
        return sum(request.num_output_tokens for request in core.scheduler.running) if core else 0


class Reload:
    """What vLLM mixes into its worker: load a Hugging Face folder in place, tied or not, and say what it computes with."""

    model_runner: Any
    reload_weights: Any

    def selfkd_reload(self, folder: str) -> list[str]:
        """Load a folder; return the engine's parameters that it did not fill, about which vLLM itself only warns."""
        model = self.model_runner.get_model()
        wanted, filled = {name for name, _ in model.named_parameters()}, set()
        load = model.load_weights

        def loading(weights: Iterator[tuple[str, Any]]) -> Any:
            filled.update(load(weights))
            return filled

        model.load_weights = loading
        try:
            self.reload_weights(weights_iterator=checkpoint_tensors(Path(folder)))
        finally:
            del model.load_weights
        return sorted(wanted - filled)

    def selfkd_facts(self) -> dict[str, Any]:
        """Return what this worker computes with; the names of vLLM's parts differ between its versions, and may be missing."""
        runner = self.model_runner
        sampler = getattr(runner, "sampler", None)
        chosen = getattr(getattr(sampler, "topk_topp_sampler", None), "forward", None)
        groups = [group for groups in getattr(runner, "attn_groups", None) or () for group in groups]
        return {
            **of_engine(),
            "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
            "attention": sorted({group.backend.get_name() for group in groups}),
            "sampler": f"{type(sampler).__qualname__}.{getattr(chosen, '__name__', 'forward')}",
        }


def _facts(llm: Any) -> dict[str, Any]:
    """Return what an engine computes with; where its workers differ, what each of them says."""
    workers = llm.collective_rpc("selfkd_facts")
    said = {name: [worker.get(name) for worker in workers] for name in workers[0]}
    config = llm.llm_engine.vllm_config
    return {
        **{name: ones[0] if all(one == ones[0] for one in ones) else ones for name, ones in said.items()},
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "batch_tokens": config.scheduler_config.max_num_batched_tokens,
    }


def checkpoint_tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name, tensor) of a folder, with the output head spelled out where it is tied to the embeddings.

    vLLM on CPU packs the head apart; a reload of a tied model by its own loader leaves the old head in place (0.31, 0.32).
    """
    from safetensors import safe_open

    tied = json.loads((folder / "config.json").read_text("utf-8")).get("tie_word_embeddings", True)
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                if tied and name == "lm_head.weight":
                    continue
                tensor = tensors.get_tensor(name)
                yield name, tensor
                if tied and name.endswith(EMBEDDING_NAMES):
                    yield "lm_head.weight", tensor


def _refuse(model: Model, verdict: Verdict, cached: int) -> None:
    fix = "Nothing was generated with these weights. Repeat the command; if it happens again, report it with the log."
    if verdict.wrong:
        raise WeightsError(f"after the swap the engine does not hold {model}: {verdict.wrong}", model.path, fix)
    if cached:
        raise WeightsError(f"after the swap the engine still used {cached} cached tokens of the old weights", model.path, fix)


def _start(numerics: Mapping[str, Any], model: Model, context: int) -> Any:
    """Start vLLM with random weights. `numerics["engine"]` passes through to vLLM's LLM and wins over every choice made here."""
    _set_environment(numerics)
    try:
        import torch

        cpu = not torch.cuda.is_available()
        if cpu and numerics["engine"].get("enforce_eager", True):
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-probability waits 14 s for a compiler, to count ranks
        from vllm import LLM
    except ImportError as error:
        fix = "Install the engine: pip install 'selfkd[cpu]' (or [gpu] on a machine with CUDA); then `selfkd doctor`."
        raise BackendError(f"vLLM cannot be imported: {error}", "engine", fix) from error
    set_threads = torch.set_num_threads
    if cpu and numerics["threads"]:
        set_threads(numerics["threads"])
    options = _cpu_options(numerics, context) if cpu else {"enable_sleep_mode": True}
    try:
        return LLM(**_options(numerics, model, context), **options, **numerics["engine"])
    finally:
        torch.set_num_threads = set_threads  # vLLM's CPU worker replaces it by a warning, also for a trainer in this process


def _set_environment(numerics: Mapping[str, Any]) -> None:
    """Set what vLLM reads at its import. It runs in this process: more are slow to start and outlive a kill.

    Only tensor parallelism needs several.
    """
    alone = numerics["tensor_parallel"] == 1
    wanted = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if alone else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_BATCH_INVARIANT": "1" if numerics.get("exact") and accelerator().on_cards else "0",
    }
    os.environ.update(wanted)
    if numerics["threads"]:
        os.environ["OMP_NUM_THREADS"] = str(numerics["threads"])
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on every CPU
    warnings.filterwarnings("ignore", module=r"vllm\..*")


def _options(numerics: Mapping[str, Any], model: Model, context: int) -> dict[str, Any]:
    given = numerics["engine"]
    options = {
        "model": model.path,
        "load_format": "dummy",
        "hf_overrides": {"tie_word_embeddings": False},
        "worker_extension_cls": f"{__name__}.{Reload.__name__}",
        "generation_config": "vllm",  # a folder's defaults (top_p, penalties) would change what a recipe asked for
        "dtype": numerics["dtype"],
        "max_model_len": context,
        "max_num_seqs": numerics["max_num_seqs"],
        "tensor_parallel_size": numerics["tensor_parallel"],
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "seed": 0,
    }
    return {name: value for name, value in options.items() if name not in given}


def _cpu_options(numerics: Mapping[str, Any], context: int) -> dict[str, Any]:
    options = {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(numerics["kv_cache_gb"] * 2**30),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(context, BATCH_TOKENS),
        "block_size": BLOCK_TOKENS,
    }
    return {name: value for name, value in options.items() if name not in numerics["engine"]}


def _scoring() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)


def _one_token() -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)


def _scores(output: Any, start: int) -> list[float]:
    ids, entries = output.prompt_token_ids, output.prompt_logprobs
    return [entries[place][ids[place]].logprob for place in range(start, len(ids))]


def _completion(tok: Any, output: Any, params: Any) -> Completion:
    """Return an answer whose ids say its text. vLLM cuts the text at a stop string, and leaves the ids of that string in."""
    answer = output.outputs[0]
    ids, logprob = list(answer.token_ids), answer.cumulative_logprob
    if isinstance(answer.stop_reason, str):
        sampled = ids
        ids, kept = ids_of_text(tok, output.prompt_token_ids, sampled, answer.text, params.skip_special_tokens)
        known = answer.logprobs is not None and kept == len(ids)  # nobody drew what was encoded anew
        logprob = sum(answer.logprobs[place][sampled[place]].logprob for place in range(kept)) if known else None
    return Completion(answer.text, ids, answer.finish_reason or "abort", logprob)
