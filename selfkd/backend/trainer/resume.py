"""An update that goes on where it was stopped: weights, optimiser, scheduler, random numbers and place in the data, as they were.

Every so many minutes, where a check wants one, and where a stop is asked for, each rank writes its part, and rank 0 seals the whole.
Other ranks than those that wrote it may go on: each reads its rows. What is trained is saved by name; what is frozen lies with the model.
"""

# transformers' callbacks have no types.
# mypy: allow-subclassing-any
from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.trainer
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from selfkd.backend.base import OnSteps, TrainProgress, TrainSpec
from selfkd.backend.trainer import sealed
from selfkd.backend.trainer.batches import Feed
from selfkd.backend.trainer.offload import Offloaded
from selfkd.backend.trainer.parts import Parts, write
from selfkd.backend.trainer.together import gathered, of_rank_0
from selfkd.core import digest
from selfkd.core.facts import Facts
from selfkd.core.wording import first_line
from selfkd.errors import STOPPED, Stopped, StorageError

TRAINER_STATE = transformers.trainer.TRAINER_STATE_NAME
WORDS = "words.json"  # of a checkpoint, and of an optimiser's state: all that is no tensor
PLAIN = (bool, int, float, str, type(None))

# transformers would take the batches that were trained on from a DataLoader, and ours is none.
_skip_first_batches = transformers.trainer.skip_first_batches
transformers.trainer.skip_first_batches = lambda feed, count: (
    feed.after(count) if isinstance(feed, Feed) else _skip_first_batches(feed, count)
)


class Over(Exception):
    """All the steps that are asked for were made before, and are put back."""


class Unsaveable(Exception):
    """An optimiser keeps what cannot be written and read back as it was."""


# ---- what there is to save ----


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are learned, by name; of tied ones the first."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def inner(optimiser: Any) -> Any:
    return getattr(optimiser, "optimizer", optimiser)  # without Accelerate's wrapper


def states(model: Any, optimiser: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield (parameter, what the optimiser keeps of it, its value); Unsaveable for a value of which a copy is not the same."""
    plain = inner(optimiser)
    for name, weight in trained(model).items():
        kept = plain.kept(weight) if isinstance(plain, Offloaded) else plain.state.get(weight, {})
        for key, value in kept.items():
            plain_tensor = type(value) in (torch.Tensor, DTensor) and (key == "step" or value.dtype == weight.dtype)
            if not plain_tensor and type(value) not in PLAIN:
                raise Unsaveable(f"the optimiser {type(plain).__name__} keeps {key} in a form of its own")
            yield name, key, value


def optimiser_tensors(model: Any, optimiser: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, key, value in states(model, optimiser):
        if isinstance(value, torch.Tensor):
            yield f"optimiser/{name}/{key}", value


def optimiser_words(model: Any, optimiser: Any, scheduler: Any) -> dict[str, Any]:
    plain = inner(optimiser)
    values: dict[str, dict[str, Any]] = {}
    for name, key, value in states(model, optimiser):
        if not isinstance(value, torch.Tensor):
            values.setdefault(name, {})[key] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in plain.param_groups]
    return {
        "optimiser": type(plain).__name__,
        "values": values,
        "groups": groups,
        "scheduler": scheduler.state_dict(),
    }


def _random_numbers() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)
    card = torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else ""
    numpy_state = [kind, [int(key) for key in keys], *rest]
    return {
        "python": random.getstate(),
        "numpy": numpy_state,
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "card": card,
    }


# ---- putting it back ----


def _put_weights(model: Any, parts: Parts) -> None:
    with torch.no_grad():
        for name, weight in trained(model).items():
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            local.copy_(parts.rows_like(f"weights/{name}", weight))


def put_optimiser(model: Any, optimiser: Any, parts: Parts, words: Mapping[str, Any], as_it_was: bool = True) -> None:
    """Give an optimiser the state that it had; with the hyperparameters that it had (`as_it_was`), or those that it has now."""
    plain, names = inner(optimiser), {id(weight): name for name, weight in trained(model).items()}
    now, state = plain.state_dict()["param_groups"], {}
    for group, numbered in zip(plain.param_groups, now, strict=True):
        for weight, number in zip(group["params"], numbered["params"], strict=True):
            name = names[id(weight)]
            kinds, values = parts.names(f"optimiser/{name}/"), words["values"].get(name, {})
            if isinstance(plain, Offloaded):
                tensors = {key: _at_rest(parts, f"optimiser/{name}/{key}", weight, group) for key in kinds}
                plain.keep(weight, {**tensors, **values})
            elif entry := {**{key: _placed(parts, f"optimiser/{name}/{key}", weight) for key in kinds}, **values}:
                state[number] = entry
    if as_it_was:
        saved = zip(words["groups"], now, strict=True)
        now = [{**_typed(words_of, group), "params": group["params"]} for words_of, group in saved]
    plain.load_state_dict({"state": state, "param_groups": now})


def _placed(parts: Parts, name: str, weight: torch.Tensor) -> torch.Tensor:
    """Return a state of a parameter, divided as that one is; the count of steps is one number on every rank."""
    return parts.whole(name) if name.endswith("/step") else parts.like(name, weight)


def _at_rest(parts: Parts, name: str, weight: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Return this rank's part of a state of a parameter, in the machine's memory; the count of steps where the optimiser wants it."""
    if name.endswith("/step"):
        on_card = group.get("fused") or group.get("capturable")
        return parts.whole(name).to(weight.device if on_card else "cpu")
    return parts.rows_like(name, weight, "cpu")


def _typed(saved: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters with tuples where they were tuples: JSON has lists only."""
    return {key: tuple(value) if isinstance(group.get(key), tuple) else value for key, value in saved.items()}


def _put_random_numbers(found: Mapping[str, Any]) -> None:
    version, keys, gauss = found["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = found["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), *rest))
    torch.set_rng_state(_bytes(found["torch"]))
    if found["card"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(found["card"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


class Resumption(TrainerCallback):
    """The checkpoints of one update, on one rank: the one that it goes on from, and those that it writes.

    `tell` hears on rank 0 of what a person should know. `made_by` are the groups of ranks that made the steps so far, in order,
    with the digests of what they computed with; `computers` are (process, facts) of all of them.
    """

    def __init__(self, spec: TrainSpec, rank: int, ranks: int, shard: bool, tell: OnSteps) -> None:
        self.saves, self.until, self.rank, self.ranks, self.tell = spec.saves, spec.until, rank, ranks, tell
        self.folder, self.words, ignored = self._found()
        self.here: dict[str, Any] = {"trainers": ranks, "shard": shard}
        self.made_by: list[dict[str, Any]] = self.words.get("made_by", [])
        self.computers: list[tuple[str, Facts]] = self.words.get("computers", [])
        self.interrupted = self.folder is not None and not self.words.get("planned")
        self.continued_at = [*self.words.get("continued_at", []), *([self.words["step"]] if self.interrupted else [])]
        self.newest, self.saved_at = int(self.words.get("step", 0)), time.monotonic()
        self.seconds: Callable[[], float] = lambda: 0.0  # that the steps took so far
        self._broken = False  # the last one could not be written, and that was said
        self._say_where(ignored)

    def _found(self) -> tuple[Path | None, dict[str, Any], tuple[str, ...]]:
        if self.saves is None:
            return None, {}, ()
        found = of_rank_0(sealed.newest(self.saves.folder, self.saves.key) if self.rank == 0 else None, self.ranks)
        words = json.loads((found.folder / WORDS).read_text("utf-8")) if found.folder else {}
        return found.folder, words, found.ignored

    def _say_where(self, ignored: tuple[str, ...]) -> None:
        if self.rank:
            return
        for text in ignored:
            self._tell(warning=f"train: {text}")
        if self.interrupted:
            said = f"train continues at step {self.words['step']} of {self.words['steps']}, from its checkpoint"
            self._tell(said=said, computers=self.computers)
        elif self.folder:
            self._tell(computers=self.computers)

    def _tell(self, **more: Any) -> None:
        words = self.words
        progress = TrainProgress(
            step=words.get("step", 0),
            steps=words.get("steps", 0),
            loss=words.get("loss", math.nan),
            tokens=words.get("tokens", 0),
            seconds=words.get("seconds", 0.0),
        )
        self.tell({**progress, **more})  # type: ignore[typeddict-item]

    def computes_with(self, facts: Facts) -> None:
        """Note what this rank computes with; the checkpoints then say it of all ranks. Every rank calls it, before the first step."""
        met = gathered(facts, self.ranks)
        here = {**self.here, "facts": sorted({digest.of(one) for one in met})}
        if self.made_by[-1:] != [here]:
            self.made_by = [*self.made_by, here]
        known = {digest.of(one) for _, one in self.computers}
        fresh = [(f"trainer-{rank}", one) for rank, one in enumerate(met) if digest.of(one) not in known]
        self.computers = [*self.computers, *fresh]

    # ---- going on ----

    def put_back(self, trainer: Any) -> None:
        """Give model, optimiser and scheduler what the checkpoint holds; raise Over where no step is left to make."""
        assert self.folder is not None
        parts = Parts(self.folder)
        _put_weights(trainer.model, parts)
        put_optimiser(trainer.model, trainer.optimizer, parts, self.words)
        trainer.lr_scheduler.load_state_dict(self.words["scheduler"])
        trainer._total_train_tokens = self.words["tokens"]
        if self.until is not None and self.words["step"] >= self.until:
            raise Over

    def put_back_random_numbers(self) -> None:
        """Go on drawing where this rank was; a rank that was not there begins at the seed."""
        path = self.folder / f"random-{self.rank}.json" if self.folder else None
        if path and path.exists():
            _put_random_numbers(json.loads(path.read_text("utf-8")))

    # ---- writing ----

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Mapping[str, Any] | None = None,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **_: Any,
    ) -> None:
        """Called behind each optimiser step, when its numbers are noted and its gradients are gone."""
        if self.saves is None or not logs or "loss" not in logs:
            return
        due, stop = self._due()
        planned = state.global_step == self.until
        if (due or planned) and state.global_step < state.max_steps:
            self._save(state, model, optimizer, lr_scheduler, logs)
        if planned:
            control.should_training_stop = True
        if stop:
            raise Stopped(STOPPED)

    def _due(self) -> tuple[bool, bool]:
        """Return whether a checkpoint is due, and whether a stop was asked for: rank 0 knows, and all do the same."""
        assert self.saves is not None
        spent = time.monotonic() - self.saved_at
        stop, seconds = self.rank == 0 and (self.saves.folder / sealed.STOP).exists(), self.saves.minutes * 60
        due = seconds > 0 and spent >= (min(sealed.WORTH_SECONDS, seconds) if stop else seconds)
        both: tuple[bool, bool] = of_rank_0((due, stop), self.ranks)
        return both

    def _save(self, state: Any, model: Any, optimiser: Any, scheduler: Any, logs: Mapping[str, Any]) -> None:
        """Write a checkpoint. One that cannot be written is said once, and the update goes on; a check cannot do without."""
        assert self.saves is not None
        folder, step = self.saves.folder, state.global_step
        words = {
            **{"step": step, "steps": state.max_steps, "loss": logs["loss"], "tokens": int(logs["num_tokens"])},
            **{"seconds": self.seconds(), "made_by": self.made_by, "continued_at": self.continued_at},
            "computers": self.computers,
            "planned": step == self.until,
        }
        problem = ""
        try:
            if self.rank == 0:
                sealed.fresh_draft(folder)
        except OSError as error:
            problem = first_line(error)
        of_rank_0(None, self.ranks)  # the folder is there
        try:
            mine = self._write(folder / sealed.DRAFT, state, model, optimiser, scheduler, words)
        except (OSError, SafetensorError, Unsaveable, TypeError) as error:
            mine, problem = {}, problem or first_line(error)
        told = gathered((mine, problem), self.ranks)
        problem = next((said for _, said in told if said), "")
        if self.rank == 0 and not problem:
            try:
                sealed.seal(
                    folder / sealed.DRAFT, folder, self.saves.key, step, {k: v for one, _ in told for k, v in one.items()}
                )
            except (OSError, StorageError) as error:
                problem = first_line(error)
        self._done(step, of_rank_0(problem, self.ranks))

    def _write(
        self, draft: Path, state: Any, model: Any, optimiser: Any, scheduler: Any, words: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Write this rank's part; return its files with their hashes."""

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            yield from ((f"weights/{name}", weight) for name, weight in trained(model).items())
            yield from optimiser_tensors(model, optimiser)

        paths = [*write(draft, self.rank, tensors()), draft / f"random-{self.rank}.json"]
        paths[-1].write_text(json.dumps(_random_numbers()), "utf-8")
        if self.rank == 0:
            whole = {**words, **optimiser_words(model, optimiser, scheduler)}
            (draft / WORDS).write_text(json.dumps(whole), "utf-8")
            state.save_to_json(str(draft / TRAINER_STATE))
            paths += [draft / WORDS, draft / TRAINER_STATE]
        return sealed.entries(paths)

    def _done(self, step: int, problem: str) -> None:
        self.saved_at = time.monotonic()
        if not problem:
            self.newest, self._broken = step, False
            return
        if step == self.until:
            what = f"the checkpoint at step {step}, from which the update goes on behind its check, could not be written: {problem}"
            raise StorageError(what, "train.check", "Make room and repeat the command, or leave out `check`.")
        if not self._broken and self.rank == 0:
            self._tell(warning=f"train: no checkpoint could be written at step {step}: {problem}. The update goes on without.")
        if self.rank == 0 and self.saves:
            sealed.forget_draft(self.saves.folder)  # the room that it takes is the child's
        self._broken = True
