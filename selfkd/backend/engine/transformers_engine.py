"""An engine for machines that vLLM has no build for: the same work by transformers, in whole batches, several times slower.

What vLLM's engine promises holds here too: weights are proved at every swap, a chunk is answered alone, and an answer is drawn by
its own seed. torch and transformers are imported when an engine is made, never before.
"""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from selfkd.backend.adapters import Weights, base_folder
from selfkd.backend.base import NOT_ASKED, REPORT_SECONDS, Chunk, Completion, Logprob, Reply, Sampling, write_chunk
from selfkd.backend.engine import inverse_cdf
from selfkd.backend.engine.held_engine import REPORT_IT
from selfkd.backend.engine.lots import OnTokens
from selfkd.backend.engine.root_model import quietly
from selfkd.backend.engine.sampling_options import OF_TRANSFORMERS
from selfkd.backend.facts import of_engine
from selfkd.backend.model_files import context_of
from selfkd.backend.probe import Earlier, Probe, Scores, judge, read_probe, token_logprobs, weighed
from selfkd.backend.scored import encode_scored, summed
from selfkd.backend.tokens import BEFORE, encode_requests, end_ids, ids_of_text, tokenizer
from selfkd.backend.trainer import batches
from selfkd.core.install import extra
from selfkd.core.number_format import BYTES
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError, WeightsError

SCORED_TOKENS = 2048  # of one forward pass that scores: its logits, for a vocabulary of 150,000 in fp32, take 1.2 GB
GREEDY_BELOW = 1e-5  # a temperature under it is none, as in vLLM
UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character
SKIP = "skip_special_tokens"


class Engine:
    """Holds the weights `weights` (a digest; "" means unknown, and then it refuses to answer)."""

    def __init__(self, numerics: Mapping[str, Any], model: Model) -> None:
        self.numerics, self.weights, self.model = dict(numerics), "", model
        self.context = context_of(Path(model.path), numerics["max_model_len"])
        self._torch, self.device = start_torch(numerics)
        self._net: Any = None
        self.facts: dict[str, Any] = {}  # known once a model is loaded
        self._tok = tokenizer(model.path)
        self._notes: dict[str, Any] = {}

    def swap(self, model: Model, fresh: bool = False, earlier: Earlier | None = None) -> dict[str, Any]:
        """Load `model` and prove it; WeightsError if the engine then does not hold it. Free if it holds it already.

        `earlier` is what an engine scored before all of them slept. Notes: seconds, proved (True or why not), survived (share of
        the update that the engine sees; None for a root), distance (from the trainer's log-probabilities).
        """
        if model.digest == self.weights and not fresh:
            return {**self._notes, "seconds": 0.0}
        started = time.perf_counter()
        probe = read_probe(Path(model.path))
        held, self.weights = self.weights, ""
        before = self._score(probe) if held and held != model.digest else None
        self._load(model, probe.attention)
        verdict = judge(probe, weighed(probe, self._score(probe), before, held, earlier), self.numerics["dtype"])
        if verdict.wrong:
            what = f"after the swap the engine does not hold {model}: {verdict.wrong}"
            raise WeightsError(what, model.path, REPORT_IT)
        self.weights, self.model, self._tok = model.digest, model, tokenizer(model.path)
        self._notes = {**verdict.notes(), "seconds": round(time.perf_counter() - started, 3)}
        return self._notes

    def generate(self, chunk: Chunk, sampling: Sampling, on_tokens: OnTokens | None = None) -> Reply:
        """Answer a chunk alone and write it; `on_tokens(requests done, tokens, steps of this batch)` about once a second.

        The batches are cut from the chunk's order, so they are the same in every engine with the same numerics.
        """
        self._must_know_its_weights()
        refuse_unknown(sampling.extra)
        started = time.perf_counter()
        asked = self._asked(chunk, sampling)
        answers = [answer for answer in asked if answer]
        tell = Teller(answers, on_tokens)
        for batch in self._batches(answers, sampling.max_tokens):
            self._answer(batch, sampling, tell)
        skip = bool(sampling.extra.get(SKIP, True))
        known = "logprobs" in sampling.extra
        completions = [answer.completion(self._tok, known, skip) if answer else NOT_ASKED for answer in asked]
        path = write_chunk(chunk, self.model, completions, self.weights, self.facts)
        tokens = sum(len(completion.token_ids) for completion in completions)
        return Reply(chunk.key, path, self.weights, tokens, round(time.perf_counter() - started, 3))

    def logprobs(self, rows: pl.DataFrame) -> list[Logprob]:
        """Return (id, sum over its log-probabilities, tokens) of each row's answer: the ids that a training row would have."""
        self._must_know_its_weights()
        asked = rows.to_dicts()
        return summed(asked, encode_scored(self._tok, asked), self.context, self._values)

    def _values(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        return [one for part in parts_of(sequences) for one in token_logprobs(self._net, part)]

    def sleep(self) -> None:
        """Give a card's memory back. On CPU nothing happens."""
        if self.device != "cpu":
            self._forget()

    def before_update(self, rows: Sequence[Path], pairs: bool, max_length: int) -> Earlier:
        """Score the sequences of which an update of these weights on `rows` keeps some as its probe: after `sleep` nobody can."""
        self._must_know_its_weights()
        ids = batches.candidates(self.model.path, rows, pairs, max_length)
        return Earlier(self.weights, dict(zip(map(tuple, ids), token_logprobs(self._net, ids), strict=True)))

    def wake(self, model: Model, earlier: Earlier | None = None) -> dict[str, Any]:
        """Load `model` again and prove it; the notes of `swap`."""
        return self.swap(model, earlier=earlier)

    def close(self) -> None:
        self._forget()

    # ---- weights ----

    def _load(self, model: Model, attention: str | None) -> None:
        from transformers import AutoModelForCausalLM

        self._forget()  # first: two models would need twice the memory
        dtype = getattr(self._torch, self.numerics["dtype"])
        full = str(base_folder(model.path, model.base))
        with quietly():
            net = AutoModelForCausalLM.from_pretrained(
                full, dtype=dtype, attn_implementation=attention, local_files_only=True, trust_remote_code=False
            )
        Weights(model.path, model.base).merge_into(net)
        self._net = net.to(self.device).eval()
        self.facts = {
            **of_engine(),
            "runner": f"transformers.{type(net).__name__}",
            "attention": getattr(net.config, "_attn_implementation", None),
            "sampler": inverse_cdf.NAME,
            "device": self.device,
        }

    def _forget(self) -> None:
        self.weights, self._net = "", None
        gc.collect()
        if self.device != "cpu":
            getattr(self._torch, self.device).empty_cache()

    def _score(self, probe: Probe) -> Scores:
        values = token_logprobs(self._net, probe.ids)
        return np.array([value for row, start in zip(values, probe.starts, strict=True) for value in row[start - 1 :]])

    def _must_know_its_weights(self) -> None:
        if not self.weights:
            raise WeightsError("the engine holds no proved weights", self.model.path, "Swap to a model first.")

    # ---- requests ----

    def _asked(self, chunk: Chunk, sampling: Sampling) -> list[Answer | None]:
        """Return an answer to begin for each request; None for one that the context does not hold."""
        asked, seeds = chunk.requests["teacher_messages"].to_list(), chunk.requests["seed"].to_list()
        prompts = encode_requests(self._tok, asked, sampling.max_tokens, self.context, chunk.drop_long, chunk.begun)
        draw = self._torch.Generator
        return [Answer(ids, draw().manual_seed(seed)) if ids else None for ids, seed in zip(prompts, seeds, strict=True)]

    def _batches(self, answers: Sequence[Answer], room: int) -> Iterator[list[Answer]]:
        """Yield as many answers at a time as `max_num_seqs` and the memory for keys and values allow, in the chunk's order."""
        memory = self.numerics["kv_cache_gb"] * 2**30
        longest = max((len(answer.prompt) for answer in answers), default=0) + room
        one = longest * bytes_per_token(self._net.config, BYTES[self.numerics["dtype"]])
        size = max(1, min(self.numerics["max_num_seqs"], int(memory / one)))
        for start in range(0, len(answers), size):
            yield list(answers[start : start + size])

    # ---- a batch ----

    def _answer(self, batch: list[Answer], sampling: Sampling, tell: Teller) -> None:
        """Draw token after token for a batch, padded on the left; those that ended leave it."""
        from transformers import DynamicCache

        torch = self._torch
        width = max(len(answer.prompt) for answer in batch)
        ids = [[0] * (width - len(answer.prompt)) + answer.prompt for answer in batch]
        mask = [[0] * (width - len(answer.prompt)) + [1] * len(answer.prompt) for answer in batch]
        step = torch.tensor(ids, device=self.device)
        seen = torch.tensor(mask, device=self.device)
        cache = DynamicCache(config=self._net.config)
        ends = Ends(self._tok, sampling)
        taken = inspect.signature(self._net.forward).parameters
        tell.begin_batch()
        while True:
            logits = self._forward(step, seen, cache, taken)
            drawn = draw_or_take(logits, [answer.generator for answer in batch], sampling)
            chances = torch.log_softmax(logits, -1).gather(-1, drawn[:, None])[:, 0].tolist()
            for answer, token, chance in zip(batch, drawn.tolist(), chances, strict=True):
                answer.add(token, chance, ends)
            tell.step()
            going = [place for place, answer in enumerate(batch) if not answer.finish]
            if not going:
                return
            kept = torch.tensor(going, device=self.device)
            if len(going) < len(batch):
                cache.batch_select_indices(kept)
                seen = seen[kept]
            batch = [batch[place] for place in going]
            step = drawn.to(self.device)[kept][:, None]
            seen = torch.cat([seen, seen.new_ones(len(going), 1)], dim=1)

    def _forward(self, step: Any, seen: Any, cache: Any, taken: Collection[str]) -> Any:
        """Return the logits of the next token of each row, in fp32. `taken`: what this model may be told by name."""
        places = (seen.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
        words = {"position_ids": places, "logits_to_keep": 1}
        with self._torch.inference_mode():
            out = self._net(
                input_ids=step,
                attention_mask=seen,
                past_key_values=cache,
                use_cache=True,
                **{name: value for name, value in words.items() if name in taken},
            )
            return out.logits[:, -1].float()


@dataclass
class Answer:
    """One answer while it is drawn. `finish` is 'stop' or 'length' once it is over; `text` is set where a stop string cut it."""

    prompt: list[int]
    generator: Any
    ids: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    finish: str = ""
    text: str | None = None

    def add(self, token: int, chance: float, ends: Ends) -> None:
        self.ids.append(token)
        self.chances.append(chance)
        if token in ends.tokens:
            self.finish = "stop"
        elif (cut := ends.cut(self.prompt, self.ids)) is not None:
            self.finish, self.text = "stop", cut
        elif len(self.ids) >= ends.most:
            self.finish = "length"

    def completion(self, tok: Any, with_chances: bool, skip_special: bool = True) -> Completion:
        """Return the answer with ids that say its text; its log-probability where it was asked for and all ids were drawn.

        Without `skip_special` the text has the special tokens that were drawn, but not the one that ended it.
        """
        if self.text is None:
            ended = self.finish == "stop"
            text = said(tok, self.prompt, self.ids[:-1] if ended else self.ids, skip_special)
            ids, kept = self.ids, len(self.ids)
        else:
            text = self.text
            ids, kept = ids_of_text(tok, self.prompt, self.ids, text, skip_special)
        known = with_chances and kept == len(ids)
        each = self.chances[:kept] if known else None
        return Completion(text, ids, self.finish, sum(self.chances[:kept]) if known else None, each)


class Ends:
    """What ends an answer: the model's end tokens, the stop strings of a step, its `max_tokens`."""

    def __init__(self, tok: Any, sampling: Sampling) -> None:
        self.tokens, self.most, self._tok, self._stop = end_ids(tok), sampling.max_tokens, tok, sampling.stop
        self._skip = bool(sampling.extra.get(SKIP, True))
        # A stop string has at most four bytes a character and a token at least one byte; a few tokens more for what a
        # tokenizer changes at the beginning of a text.
        self._window = max((4 * len(one) for one in sampling.stop), default=0) + BEFORE

    def cut(self, prompt: Sequence[int], ids: Sequence[int]) -> str | None:
        """Return the text up to the first stop string; None while there is none. Only the newest tokens are read for it."""
        if not self._stop or not self._found(self._tok.decode(ids[-self._window :], skip_special_tokens=self._skip)):
            return None
        text = said(self._tok, prompt, ids, self._skip)
        places = self._found(text)
        return text[: min(places)] if places else None

    def _found(self, text: str) -> list[int]:
        return [place for one in self._stop if (place := text.find(one)) >= 0]


class Teller:
    """Reports how far a chunk is, about once a second: who makes no more steps is hanging.

    A batch begins at step 0, which nobody takes for a hang: all its prompts are read in one pass, however long a CPU takes for it.
    """

    def __init__(self, answers: Sequence[Answer], on_tokens: OnTokens | None) -> None:
        self._answers, self._on_tokens, self._told, self._steps = answers, on_tokens, time.monotonic(), 0

    def begin_batch(self) -> None:
        self._steps = 0
        self._tell()

    def step(self) -> None:
        self._steps += 1
        if time.monotonic() - self._told >= REPORT_SECONDS:
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._on_tokens:
            done = sum(bool(answer.finish) for answer in self._answers)
            self._on_tokens(done, sum(len(answer.ids) for answer in self._answers), self._steps)


def said(tok: Any, prompt: Sequence[int], ids: Sequence[int], skip_special: bool = True) -> str:
    """Return what ids say behind a prompt. The first bytes of a character that was cut off are no text."""
    lead, whole = (
        tok.decode(part, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        for part in (list(prompt[-BEFORE:]), [*prompt[-BEFORE:], *ids])
    )
    text = whole[len(lead) :] if whole.startswith(lead) else tok.decode(list(ids), skip_special_tokens=skip_special)
    return str(text).rstrip(UNFINISHED)


def refuse_unknown(extra: Mapping[str, Any]) -> None:
    """Raise UsageError where a step's `vllm:` block asks for what only vLLM can do."""
    if unknown := [name for name in extra if name not in OF_TRANSFORMERS]:
        what = f"the generator transformers does not know {', '.join(unknown)}: only vLLM does"
        raise UsageError(what, "sample.vllm", "Leave it out, or use a machine with vLLM (`generator: vllm`).")


# ---- drawing ----


def draw_or_take(logits: Any, generators: Sequence[Any], sampling: Sampling) -> Any:
    """Return the next token of each row: the likeliest at temperature 0, else a drawn one."""
    if sampling.temperature < GREEDY_BELOW:
        return inverse_cdf.likeliest(logits)
    return inverse_cdf.next_tokens(logits / sampling.temperature, generators, sampling.top_k, sampling.top_p)


# ---- the machine ----


def start_torch(numerics: Mapping[str, Any]) -> tuple[Any, str]:
    """Return (torch, the device): CUDA, Apple's, or the CPU with the run's threads."""
    try:
        import torch
        import transformers  # noqa: F401
    except ImportError as error:
        fix = f"Install the engine: {extra('engine')}; then `selfkd doctor`."
        raise BackendError(f"transformers cannot be imported: {error}", "engine", fix) from error
    if torch.cuda.is_available():
        return torch, "cuda"
    if torch.backends.mps.is_available():
        return torch, "mps"
    if numerics["threads"]:
        torch.set_num_threads(numerics["threads"])
    return torch, "cpu"


def bytes_per_token(config: Any, width: int) -> int:
    """Return the bytes that the keys and values of one token take in all layers, `width` bytes a number."""
    config = config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * width)


def parts_of(sequences: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Cut sequences into parts of at most SCORED_TOKENS padded tokens, at least one sequence each, in their order."""
    part: list[list[int]] = []
    for sequence in sequences:
        if part and (len(part) + 1) * max(len(sequence), *map(len, part)) > SCORED_TOKENS:
            yield part
            part = []
        part.append(sequence)
    if part:
        yield part
