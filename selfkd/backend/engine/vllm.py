"""One vLLM engine that lives across steps and rounds: weights are swapped in place, and every swap is proved.

Knows nothing of recipes, runs or Ray: a model folder and a chunk go in, a written chunk and the digest of the weights that
made it come out. vLLM and torch are imported when an engine is made, never before.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from selfkd.backend import adapters
from selfkd.backend.base import NOT_ASKED, Chunk, Completion, Logprob, Reply, Sampling, write_chunk
from selfkd.backend.engine import kernels, vllm_models
from selfkd.backend.engine.lots import Lot, Lots, OnTokens
from selfkd.backend.engine.sampling_params import request_params
from selfkd.backend.engine.vllm_options import (
    BLOCK_TOKENS,
    EXTENSIONS,
    OWNER,
    QUIET_ENVIRONMENT,
    Card,
    adapter_options,
    environment,
    has_core_process,
    llm_options,
)
from selfkd.backend.machine import how_to_install
from selfkd.backend.model_files import config_of, context_of
from selfkd.backend.probe import Earlier, Probe, Scores, Verdict, judge, read_probe, weighed
from selfkd.backend.scored import encode_scored, summed
from selfkd.backend.tokens import encode_requests, end_ids, ids_of_text, tokenizer
from selfkd.backend.trainer import batches
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError, WeightsError

CANARY_TOKENS = 2 * BLOCK_TOKENS + 1  # of a prompt that a swap must make the engine forget


Encoded = tuple[list[list[int]], list[Any]]  # the prompts that fit, and how each request draws: None for one that does not fit


@dataclass(frozen=True)
class Asked:
    """A chunk inside vLLM: its key, how each of its requests draws (None: it is not asked), and those that are asked."""

    key: str
    params: list[Any]
    lot: Lot


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
        self._beside = adapters.room_for(Path(model.path))  # what it keeps for an adapter
        self._full = ""  # the digest of the full weights that lie there beneath an adapter, or by themselves
        self.llm: Any = _start(numerics, model, self.room, self._beside)
        config = self.llm.llm_engine.vllm_config
        card = config.device_config.device_type != "cpu"
        self._may_sleep = card and config.model_config.enable_sleep_mode
        self._has_core_process = has_core_process(self.numerics, card)
        self._tok = tokenizer(model.path)
        self.facts = _facts(self.llm)
        self._lots = Lots(self.llm, together=bool(numerics.get("exact")))
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._encoding: dict[str, Future[Encoded]] = {}  # by the key of a chunk that is asked next
        self._ahead: Asked | None = None  # the chunk that was begun before it was asked
        self._notes: dict[str, Any] = {}
        self._asleep = False

    def swap(self, model: Model, fresh: bool = False, earlier: Earlier | None = None) -> dict[str, Any]:
        """Load `model` in place and prove it; WeightsError if the engine then does not hold it. Free if it holds it already.

        `earlier` is what an engine scored before all of them slept. Notes: seconds, proved (True or why not), survived (share of
        the update that the engine sees; None for a root), distance (from the trainer's log-probabilities), cached_tokens.
        """
        if model.digest == self.weights and not fresh:
            return {**self._notes, "seconds": 0.0}
        started = time.perf_counter()
        probe = read_probe(Path(model.path))
        held, self.weights = self.weights, ""
        if fresh or not held:
            self._full = ""  # nothing is known of what lies there: it is loaded whole
        scores = None if self._asleep else self._score(probe)[0]  # also puts a prompt into the cache that must be forgotten
        self._reload(model)
        self._forget()
        after, cached = self._score(probe)
        before = None if held == model.digest else scores
        verdict = judge(probe, weighed(probe, after, before, held, earlier), self.numerics["dtype"])
        _refuse(model, verdict, cached)
        self.weights, self.model, self._tok = model.digest, model, tokenizer(model.path)
        self._notes = {**verdict.notes(), "cached_tokens": cached, "seconds": round(time.perf_counter() - started, 3)}
        return self._notes

    def generate(
        self, chunk: Chunk, sampling: Sampling, on_tokens: OnTokens | None = None, following: Chunk | None = None
    ) -> Reply:
        """Answer a chunk alone, from an empty prefix cache, and write it; `on_tokens` hears about once a second how far it is.

        Under `exact` all requests enter before the first step, so the batches are the same in every engine with the same numerics.
        Where a chunk `following` is named, nothing of that holds: its prompts are encoded beside the steps, and its requests enter behind.
        """
        self._must_know_its_weights()
        started = time.perf_counter()
        asked = self._taken(chunk) or self._ask(chunk, sampling)
        if following:
            self._encoding[following.key] = self._encoder.submit(self._encoded, following, sampling)
        outputs = self._lots.finish(asked.lot, on_tokens, partial(self._begin, following, sampling.extra))
        given = iter(outputs)
        completions = [_completion(self._tok, next(given), param) if param else NOT_ASKED for param in asked.params]
        path = write_chunk(chunk, self.model, completions, self.weights, self.facts)
        tokens = sum(len(completion.token_ids) for completion in completions)
        return Reply(chunk.key, path, self.weights, tokens, round(time.perf_counter() - started, 3))

    def _taken(self, chunk: Chunk) -> Asked | None:
        """Return the chunk where it was begun already, and nothing took it out since."""
        if self._ahead is None or self._ahead.key != chunk.key or not self._lots.hold(self._ahead.lot):
            return None
        asked, self._ahead = self._ahead, None
        return asked

    def _ask(self, chunk: Chunk, sampling: Sampling) -> Asked:
        begun = self._encoding.pop(chunk.key, None)
        self._forget()
        prompts, params = begun.result() if begun else self._encoded(chunk, sampling)
        return self._entered(chunk.key, prompts, params, sampling.extra)

    def _entered(self, key: str, prompts: list[list[int]], params: list[Any], extra: Mapping[str, Any]) -> Asked:
        return Asked(key, params, self._lots.enter(prompts, [param for param in params if param], extra))

    def _encoded(self, chunk: Chunk, sampling: Sampling) -> Encoded:
        asked = chunk.requests["teacher_messages"].to_list()
        prompts = encode_requests(self._tok, asked, sampling.max_tokens, self.context, chunk.drop_long, chunk.begun)
        params = request_params(sampling, sorted(end_ids(self._tok)), chunk.requests["seed"].to_list())
        return [ids for ids in prompts if ids], [param if ids else None for ids, param in zip(prompts, params, strict=True)]

    def _begin(self, following: Chunk | None, extra: Mapping[str, Any]) -> None:
        """Have the requests of the next chunk enter once they are encoded. What is wrong with them is said when it is asked."""
        if following and following.key in self._encoding and self._encoding[following.key].done():
            with suppress(UsageError):
                prompts, params = self._encoding.pop(following.key).result()
                self._ahead = self._entered(following.key, prompts, params, extra)

    def _drop_ahead(self) -> None:
        """Take out the chunk that was begun: something else is asked instead."""
        if self._ahead is not None and self._lots.hold(self._ahead.lot):
            self._lots.drop(self._ahead.lot)
        self._ahead = None
        self._encoding.clear()

    def logprobs(self, rows: pl.DataFrame) -> list[Logprob]:
        """Return (id, sum over its log-probabilities, tokens) of each row's answer: the ids that a training row would have."""
        self._must_know_its_weights()
        asked = rows.to_dicts()
        return summed(asked, encode_scored(self._tok, asked), self.room - 1, self._values)

    def _values(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return [_scores(output, 1) for output in self._run(sequences, [_scoring() for _ in sequences])]

    def sleep(self) -> None:
        """Give the GPU's memory back: weights and KV cache are dropped, not kept. Nothing happens on a CPU, or without sleep mode."""
        if self._may_sleep and not self._asleep:
            self._forget()
            self._take_adapter(None)  # its weights are dropped too
            self.llm.sleep(level=2)
            self.weights, self._full, self._asleep = "", "", True

    def before_update(self, rows: Sequence[Path], pairs: bool, max_length: int) -> Earlier:
        """Score the sequences of which an update of these weights on `rows` keeps some as its probe: after `sleep` nobody can."""
        self._must_know_its_weights()
        ids = batches.candidates(self.model.path, rows, pairs, max_length)
        outputs = self._run(ids, [_scoring() for _ in ids])
        return Earlier(self.weights, {tuple(one): _scores(output, 1) for one, output in zip(ids, outputs, strict=True)})

    def wake(self, model: Model, earlier: Earlier | None = None) -> dict[str, Any]:
        """Take memory again, load `model` and prove it; the notes of `swap`."""
        return self.swap(model, earlier=earlier)

    def close(self) -> None:
        """End the engine. vLLM in one process gives all of a GPU's memory back only when the process ends."""
        self.weights = ""
        self._encoder.shutdown(cancel_futures=True)
        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()

    def _must_know_its_weights(self) -> None:
        if not self.weights:
            raise WeightsError("the engine holds no proved weights", self.model.path, "Swap to a model first.")

    def _reload(self, model: Model) -> None:
        """Weights wake before the KV cache does, so that the peak of memory is no higher than at the start."""
        if self._asleep:
            self.llm.wake_up(["weights"])
        with vllm_models.in_words(model, "take the weights of", self.numerics["engine"], alone=not self._has_core_process):
            missing = self._load(model)
        if self._asleep:
            self.llm.wake_up(["kv_cache"])
            self._asleep = False
        if missing:
            what = f"{len(missing)} tensors of the engine were not in the checkpoint: {', '.join(sorted(missing)[:5])}"
            raise WeightsError(
                what, model.path, "The checkpoint is incomplete, or vLLM does not know this architecture's names."
            )

    def _load(self, model: Model) -> set[str]:
        """Load what a model is made of: its weights whole, an adapter merged into them, or beside them where it is served so.

        Weights that lie there already stay. Return the engine's parameters that were not filled.
        """
        beside = adapters.room_for(Path(model.path))
        if not self._beside.holds(beside):
            what = f"the engine has room for adapters of rank {self._beside.rank}, and {model} needs {beside.rank}"
            raise BackendError(what, "engine", "Repeat the command: an engine that has it is started anew.")
        full = adapters.full_weights(model) if beside.rank else model
        loaded: list[list[str]] = []
        self._take_adapter(None)
        if full.digest != self._full:
            self._full = ""
            loaded = self.llm.collective_rpc("selfkd_reload", args=(full.path, full.base))
            self._full = full.digest
        self._take_adapter(model if beside.rank else None)
        return {name for names in loaded for name in names}

    def _take_adapter(self, model: Model | None) -> None:
        """Answer by the adapter of a model from now on, read from its folder at the next request; the one before it is gone."""
        if self._lots.adapter is not None:
            self._drop_ahead()
            self.llm.llm_engine.remove_lora(self._lots.adapter.lora_int_id)
        self._lots.adapter = _request(model) if model else None

    def _forget(self) -> None:
        """Drop the prefix cache: a reload leaves it there, and answers would start from the old weights' keys and values."""
        self._drop_ahead()
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

    def _run(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> list[Any]:
        """Return outputs in the order of `prompts`."""
        self._drop_ahead()
        return self._lots.finish(self._lots.enter(prompts, params, {}))


def _facts(llm: Any) -> dict[str, Any]:
    """Return what an engine computes with; where its workers differ, what each of them says."""
    workers = llm.collective_rpc("selfkd_facts")
    said = {name: [worker.get(name) for worker in workers] for name in workers[0]}
    config = llm.llm_engine.vllm_config
    return {
        **{name: ones[0] if all(one == ones[0] for one in ones) else ones for name, ones in said.items()},
        "kv_blocks": config.cache_config.num_gpu_blocks,
        "batch_tokens": config.scheduler_config.max_num_batched_tokens,
        "sequences": config.scheduler_config.max_num_seqs,
    }


def _refuse(model: Model, verdict: Verdict, cached: int) -> None:
    fix = "Nothing was generated with these weights. Repeat the command; if it happens again, report it with the log."
    if verdict.wrong:
        if verdict.survived is None:
            fix += f"\nIf it is the first model of a run, vLLM computes its architecture differently: {vllm_models.WAY_OUT}"
        raise WeightsError(f"after the swap the engine does not hold {model}: {verdict.wrong}", model.path, fix)
    if cached:
        raise WeightsError(f"after the swap the engine still used {cached} cached tokens of the old weights", model.path, fix)


def _request(model: Model) -> Any:
    """Return how vLLM is asked to answer by an adapter: its number is a part of the digest, so that no two of a chain share one."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(model.digest, int(model.digest[:7], 16) + 1, model.path)


def _start(numerics: Mapping[str, Any], model: Model, context: int, beside: adapters.Room) -> Any:
    """Start vLLM with random weights, and with the sampler that the run is fixed to; an older run has vLLM's own, and its kernels."""
    os.environ.update(environment(numerics, card=False))  # torch reads the number of threads at its import
    try:
        import torch

        card = _card(torch, numerics)
        _set_environment(numerics, card is not None)
        kernels.follow_torch(numerics)
        from vllm import LLM
    except ImportError as error:
        fix = f"Install the engine: {how_to_install()}; or write `generator: transformers`."
        raise BackendError(f"vLLM cannot be imported: {error}", "engine", fix) from error
    set_threads = torch.set_num_threads
    if threads := 1 if card else numerics["threads"]:
        set_threads(threads)
    extension = EXTENSIONS[has_core_process(numerics, card is not None)]
    folder = Path(model.path)
    options = {**llm_options(numerics, model.path, config_of(folder), context, extension, card), **adapter_options(beside)}
    try:
        with vllm_models.in_words(model, "run", numerics["engine"]), vllm_models.classes_kept(folder):
            llm = LLM(**options)
    finally:
        torch.set_num_threads = set_threads  # vLLM's CPU worker replaces it by a warning, also for a trainer in this process
    if card is None and (sampler := numerics.get("sampler")):
        llm.collective_rpc("selfkd_sample_by", args=(sampler,))
    return llm


def _card(torch: Any, numerics: Mapping[str, Any]) -> Card | None:
    """Return the memory of the card that torch sees, of several that of the fullest; None on a CPU.

    Where vLLM computes in processes of its own, they are asked in another one too: a context here would stay on the card.
    """
    if not torch.cuda.is_available():
        return None
    if not has_core_process(numerics, card=True):
        return Card(*torch.cuda.mem_get_info(0))
    count = numerics["tensor_parallel"]
    ask = f"import json, torch; print(json.dumps([torch.cuda.mem_get_info(i) for i in range({count})]))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    return min((Card(*one) for one in json.loads(done.stdout)), key=lambda card: card.free / card.total)


def _set_environment(numerics: Mapping[str, Any], card: bool) -> None:
    os.environ.update({**environment(numerics, card), OWNER: str(os.getpid())})
    if not card and numerics["engine"].get("enforce_eager", True):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first log-probability waits 14 s for a compiler, to count ranks
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # "Triton not available" on every CPU
    warnings.filterwarnings("ignore", module=r"vllm\..*")


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
    sampled = list(answer.token_ids)
    ids, kept, logprob = sampled, len(sampled), answer.cumulative_logprob
    if isinstance(answer.stop_reason, str):
        ids, kept = ids_of_text(tok, output.prompt_token_ids, sampled, answer.text, params.skip_special_tokens)
    known = answer.logprobs is not None and kept == len(ids)  # nobody drew what was encoded anew
    each = [answer.logprobs[place][sampled[place]].logprob for place in range(kept)] if known else None
    if isinstance(answer.stop_reason, str):
        logprob = sum(each) if each is not None else None
    return Completion(answer.text, ids, answer.finish_reason or "abort", logprob, each)
