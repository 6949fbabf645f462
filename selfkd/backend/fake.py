"""A model is a function. The fake backend does what the real ones do, on the same files, in milliseconds: for tests and dry runs.

Its weights are one JSON file {"skill", "history"}: training raises the skill and chains a hash of what was trained on.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import (
    Chunk,
    Completion,
    Logprob,
    OnAnswers,
    OnSteps,
    OptimiserState,
    Questions,
    Reply,
    Sampling,
    Trained,
    TrainSpec,
    nobody_listens,
    write_chunk,
)
from selfkd.backend.lengths import answers
from selfkd.backend.reading import NO_STEPS, Read, Reading
from selfkd.backend.scored import PROBABILITY
from selfkd.core import digest
from selfkd.core.facts import Facts, of_process
from selfkd.core.pool import KEYS, Model

Answer = Callable[[list[dict[str, str]], int, float], str]
SUM = re.compile(r"(-?\d+) *([-+]) *(\d+)")


def adder(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    """Answer the last `a + b` or `a - b` that was asked: rightly with probability `skill`, else off by one to nine."""
    found = SUM.findall(messages[-1]["content"])
    first, sign, second = found[-1] if found else ("1", "+", str(len(messages[-1]["content"]) % 7))
    result = int(first) + int(second) if sign == "+" else int(first) - int(second)
    right = digest.uniform("skill", seed) < skill
    return f"{first} {sign} {second} is easy.\nAnswer: {result if right else result + 1 + seed % 9}"


class Fake:
    """`answer(messages, seed, skill)` is the model; `hook(call)` runs before every call, and may raise to imitate a crash.

    Its calls end at once, so it never reports progress. `facts` stands for those of its engine and its rank. A token is a byte; with
    `fits` it is as many as let every answer end within `max_tokens`, so that none is cut.
    """

    name = "fake"

    def __init__(
        self,
        numerics: Mapping[str, Any],
        answer: Answer = adder,
        hook: Callable[[str], None] = lambda call: None,
        facts: Facts | None = None,
        fits: bool = False,
    ) -> None:
        self._numerics, self.answer, self.hook = dict(numerics), answer, hook
        self._facts: Facts = of_process(()) if facts is None else facts
        self._up: dict[str, Facts] = {}
        self.reverse, self.fits = False, fits

    def numerics(self) -> dict[str, Any]:
        return self._numerics

    def facts(self) -> dict[str, Facts]:
        return dict(self._up)

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        self.hook("load")
        _write(out, {"skill": 0.3, "history": digest.of("root", dither)})
        return {"source": str(source)}

    def generate(
        self, model: Model, chunks: Sequence[Chunk], sampling: Sampling, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Reply]:
        weights, held = _read(model), digest.weights(Path(model.path))
        for chunk in reversed(chunks) if self.reverse else chunks:
            self.hook("generate")
            self._up["engine-0"] = self._facts
            began = time.monotonic()
            asked = [_asked(row) for row in chunk.requests.iter_rows(named=True)]
            completions = [self._complete(row, weights["skill"], sampling) for row in asked]
            path = write_chunk(chunk, model, completions, held, self._facts)
            tokens = sum(len(completion.token_ids) for completion in completions)
            yield Reply(chunk.key, path, held, tokens, time.monotonic() - began)

    def _complete(self, row: Mapping[str, Any], skill: float, sampling: Sampling) -> Completion:
        seed = digest.seed(row["teacher_messages"][-1]["content"]) if sampling.temperature == 0 else row["seed"]
        text = self.answer(row["teacher_messages"], seed, skill)
        whole = min((text.split(stop)[0] for stop in sampling.stop), key=len, default=text)
        if self.fits:
            ids, said, cut = list(whole.encode()[:: -(-len(whole.encode()) // sampling.max_tokens) or 1]), whole, False
        else:
            ids = list(whole.encode()[: sampling.max_tokens])
            said, cut = bytes(ids).decode(errors="ignore"), len(ids) < len(whole.encode())
        ended = [] if cut or whole != text else [0]  # a stop string ends an answer without an end token
        return Completion(said, [*ids, *ended], "length" if cut else "stop", -0.1 * len(ids))

    def logprobs(self, model: Model, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens) -> Iterator[Logprob]:
        self.hook("logprobs")
        self._up["engine-0"] = self._facts
        for row in rows.iter_rows(named=True):
            yield _logprob(model, row)

    def read(
        self, model: Model, reading: Reading, rows: pl.DataFrame, on_progress: OnAnswers = nobody_listens
    ) -> Iterator[Read]:
        self.hook("read")
        self._up["reader-0"] = self._facts
        for row in rows.iter_rows(named=True):
            steps = [step for step in row["text"].split(reading.separator) if step.strip()] if reading.kind == "steps" else [""]
            chances = (digest.uniform(model.digest, reading.label, row["text"], row["second"], step) for step in steps)
            yield Read(row["id"], tuple(chances)) if steps else Read(row["id"], (), NO_STEPS)

    def train(
        self,
        start: Model,
        reference: Model | None,
        rows: Sequence[Path],
        spec: TrainSpec,
        out: Path,
        on_progress: OnSteps = nobody_listens,
    ) -> Trained:
        self.hook("train")
        self._up["trainer-0"] = self._facts
        frame = pl.concat([pl.read_parquet(path) for path in rows]).sort("id")
        weights = _read(start)
        loss = [spec.function.digest, dict(spec.function.params)] if spec.function else spec.loss
        history = digest.of(
            *(weights["history"], digest.table(frame, KEYS["rows"]), loss, spec.seed, reference and reference.digest),
            *([_moments(spec.state)] if spec.state else []),
            *([asdict(spec.divergence)] if spec.divergence else []),
        )
        made = min(spec.until or frame.height, frame.height)
        if made < frame.height:
            history = digest.of(history, made)
        base = {"base": digest.base_of(Path(start.path)) or start.digest} if spec.lora else {}
        share = 0.3 * (made / frame.height)
        _write(out, {"skill": weights["skill"] + (1 - weights["skill"]) * share, "history": history, **base})
        if base:
            (out / digest.ADAPTER).write_text(json.dumps(base))
        metrics: dict[str, Any] = {
            "steps": made,
            "rows": frame.height,
            "loss_first": 1.0,
            "loss_last": 0.5,
            "seconds": 0.0,
        }
        metrics["made_by"] = [{"trainers": self._numerics.get("trainers", 1), "shard": self._numerics.get("shard", False)}]
        state = _leave_state(out, history) if spec.keeps_state else None
        return Trained(out, metrics, {}, state, made == frame.height, of=frame.height)

    def average(self, models: Sequence[tuple[Model, float]], out: Path) -> None:
        self.hook("average")
        read = [(_read(model), share) for model, share in models]
        whole = sum(share for _, share in read)
        skill = sum(weights["skill"] * share / whole for weights, share in read)
        _write(out, {"skill": skill, "history": digest.of("average", [(one["history"], share / whole) for one, share in read])})

    def lengths(self, model: Model, rows: pl.DataFrame) -> list[int]:
        return [sum(len((text or "").encode()) for text, _, _ in answers(row)) for row in rows.iter_rows(named=True)]

    def swap_notes(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a request whose answer is begun as one whose last message is that beginning."""
    begun = [{"role": "assistant", "content": row["begun"]}] if row.get("begun") else []
    return {**row, "teacher_messages": [*row["teacher_messages"], *begun]}


def _logprob(model: Model, row: Mapping[str, Any]) -> Logprob:
    """Return a number hashed from what is scored; what stands before it counts only where a step says what that is."""
    text, said = row["text"], [row["text"]]
    if "given" in row:
        text = text.removeprefix(row["given"] or "")
        said = [text, row["given"] or "", *(message["content"] for message in row["messages"])]
    chance = digest.uniform(model.digest, *said)
    return row["id"], (chance if row.get("sums") == PROBABILITY else -chance) * len(text), len(text)


def _moments(state: OptimiserState) -> Any:
    return json.loads((state.folder / "moments.json").read_text())


def _leave_state(out: Path, history: str) -> Path:
    folder = out.with_name(f"{out.name}-state")
    folder.mkdir()
    (folder / "moments.json").write_text(json.dumps({"moments": digest.of("moments", history)}))
    return folder


def _read(model: Model) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(model.path) / "weights.json").read_text())
    return loaded


def _write(out: Path, weights: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "weights.json").write_text(json.dumps(weights))
