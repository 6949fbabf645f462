"""The trainer group: N ranks inside one Ray Train TorchTrainer that stay alive from update to update.

A new `fit()` for every update would import torch, transformers and TRL anew in each round. So one
`fit()` runs for as long as the group lives: each rank imports what it needs, then takes updates one after another from the
conductor, the actor that runs `fit()` (which keeps torch out of the driver). A group that failed is thrown away, never mended.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from selfkd.backend.base import Trained
from selfkd.backend.engine.held_engine import TRAINER, preload, redirect, resolve
from selfkd.backend.ray.cluster import first_line
from selfkd.errors import BackendError, SelfkdError

# Ray Train's own settings: notice a dead rank soon, stay in the working folder, and leave out two actors nobody reads.
SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
PATIENCE = 5.0  # how long one question to the conductor waits before it is asked again
VERDICT = 10.0  # a rank whose neighbour died fails first; this long until Ray Train says who died
CLOSING = 15.0


@dataclass(frozen=True)
class Group:
    """Of what a trainer group is made."""

    ranks: int
    threads: int
    gpus: float
    storage: Path
    log: Path
    trainer: str | Callable[..., Any] = TRAINER


@dataclass(frozen=True)
class Outcome:
    """How an update ended: `value` of rank 0, or the `error` of the rank that failed first; `died` says that a process did."""

    value: Any = None
    error: BaseException | None = None
    died: str = ""


class Conductor:
    """An actor with threads: one runs `fit()`, the others hand out updates and collect what the ranks make of them."""

    def __init__(self, group: Group) -> None:
        redirect(group.log / "trainer.log")
        os.environ.update(SETTINGS)
        self._group = group
        self._changed = threading.Condition()
        self._job: tuple[int, tuple[Any, ...]] | None = None
        self._values: dict[int, Any] = {}
        self._error: BaseException | None = None
        self._over = ""
        self._closed = False

    def conduct(self) -> None:
        """Run the group until it is closed or fails."""
        try:
            _fit(self._group)
            over = "the trainer group ended"
        except BaseException as error:  # whatever it was, the driver must hear of it
            traceback.print_exc()
            over = _first_failure(error)
        with self._changed:
            self._over = over
            self._changed.notify_all()

    def post(self, number: int, job: tuple[Any, ...]) -> None:
        with self._changed:
            self._job, self._values, self._error = (number, job), {}, None
            self._changed.notify_all()

    def take(self, number: int) -> tuple[str, tuple[Any, ...]]:
        """For a rank: ("job", update `number`), ("wait", ()) if it is not there yet, ("close", ()) when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._posted(number), PATIENCE)
            if self._posted(number) and self._job:
                return "job", self._job[1]
            return ("close" if self._closed else "wait"), ()

    def finish(self, number: int, rank: int, value: Any, error: BaseException | None) -> None:
        with self._changed:
            if self._posted(number):
                self._values[rank] = value
                self._error = self._error or error
                self._changed.notify_all()

    def outcome(self, number: int) -> Outcome | None:
        """For the driver: how update `number` ended, or None if it still runs.

        By number, because the threads of an actor keep no order: this call may overtake the `post` before it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._posted(number) and self._decided(), PATIENCE)
            if not self._posted(number):
                return None
            if self._error is not None and not isinstance(self._error, SelfkdError) and self._group.ranks > 1:
                self._changed.wait_for(lambda: bool(self._over), VERDICT)
            if isinstance(self._error, SelfkdError) or (self._error and not self._over):
                return Outcome(error=self._error)
            if self._over:
                return Outcome(died=self._over)
            return Outcome(self._values[0]) if self._decided() else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _posted(self, number: int) -> bool:
        return self._job is not None and self._job[0] == number

    def _decided(self) -> bool:
        return bool(self._over) or self._error is not None or len(self._values) == self._group.ranks


def _fit(group: Group) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": float(group.threads), **({"GPU": group.gpus} if group.gpus else {})}
    scaling = ScalingConfig(num_workers=group.ranks, use_gpu=bool(group.gpus), resources_per_worker=resources)
    failures = FailureConfig(max_failures=0, controller_failure_limit=0)
    run = RunConfig(name="trainers", storage_path=str(group.storage), failure_config=failures)
    loop = partial(_serve, ray.get_runtime_context().current_actor, group.trainer, group.log)
    TorchTrainer(loop, scaling_config=scaling, run_config=run).fit()


def _first_failure(error: BaseException) -> str:
    """One sentence of why the group failed, from Ray Train's error of many lines."""
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"rank {rank}: {_cause(failure)}" for rank, failure in sorted(failures.items())) or first_line(error)


def _cause(failure: BaseException) -> str:
    from ray.exceptions import ActorDiedError

    inner = getattr(failure, "health_check_failure", failure)  # Ray Train wraps a death as a failed health check
    return (
        "its process ended, as after kill -9 or for want of memory" if isinstance(inner, ActorDiedError) else first_line(inner)
    )


def _serve(conductor: Any, trainer: str | Callable[..., Any], log: Path) -> None:
    """What each rank does: import, then one update after another. Runs inside Ray Train, in its process group."""
    import ray
    from ray import train

    rank = train.get_context().get_world_rank()
    redirect(log / f"trainer-{rank}.log")
    if train.get_context().get_world_size() == 1:
        _leave_process_group()
    print(f"rank {rank}, process {os.getpid()}, imports took {preload(trainer):.1f} s")
    number = 1
    while True:
        try:
            what, job = ray.get(conductor.take.remote(number), timeout=20 * PATIENCE)
        except ray.exceptions.RayActorError:  # the driver ended the group
            return
        if what == "close":
            return
        if what == "job":
            value, error = _update(resolve(trainer), job, rank)
            ray.get(conductor.finish.remote(number, rank, value, error), timeout=20 * PATIENCE)
            number += 1


def _leave_process_group() -> None:
    """A rank alone needs none: finding one, TRL's trainer would wrap the model for several ranks and hold its gradients twice."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _update(function: Callable[..., Any], job: tuple[Any, ...], rank: int) -> tuple[Any, BaseException | None]:
    """One call of the trainer. Only rank 0 reports; an error that cannot travel becomes a BackendError with its words."""
    *arguments, news = job
    try:
        return function(*arguments, report=partial(_report, news) if rank == 0 else None), None
    except SelfkdError as error:
        traceback.print_exc()
        return None, error
    except Exception as error:
        traceback.print_exc()
        return None, RuntimeError(f"{type(error).__name__}: {error}")


def _report(news: Path, numbers: Mapping[str, Any]) -> None:
    """Append one line of numbers; the driver follows the file, and it stays as the log of the update."""
    with news.open("a") as handle:
        handle.write(json.dumps(dict(numbers), default=float) + "\n")


class Trainers:
    """The driver's side: start a group early, hand it an update, follow its numbers, throw it away when it failed."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self._conductor: Any = None
        self._running: Any = None
        self._number = 0

    def start(self) -> None:
        """Start the ranks if there are none; returns at once, so that their imports run beside something else."""
        import ray

        if self._conductor is None:
            self.group.storage.mkdir(parents=True, exist_ok=True)
            options = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": self.group.ranks + 4}
            self._conductor = ray.remote(**options)(Conductor).remote(self.group)
            self._running = self._conductor.conduct.remote()
            self._number = 0

    def train(self, *arguments: Any, news: Path, follow: Callable[[dict[str, Any]], None]) -> Trained:
        """One update. A rank that is killed costs one repetition (an update is idempotent); a second death is an error."""
        for attempt in (1, 2):
            outcome = self._try(arguments, news, follow)
            if outcome.error is not None:
                raise outcome.error if isinstance(outcome.error, SelfkdError) else self._failed(str(outcome.error))
            if not outcome.died:
                return outcome.value
            if attempt == 2:
                raise self._failed(f"a training process died twice ({outcome.died})")
        raise AssertionError("unreachable")

    def close(self, kindly: bool = False) -> None:
        """End the group. `kindly` lets Ray Train end the ranks and waits for it: after that their GPU memory is free."""
        import ray

        conductor, self._conductor = self._conductor, None
        if conductor is None:
            return
        if kindly:
            conductor.close.remote()
            ray.wait([self._running], timeout=CLOSING)
        ray.kill(conductor, no_restart=True)

    def _failed(self, what: str) -> BackendError:
        fix = f"The log of the ranks: {self.group.log}/trainer-0.log. Repeat the command: nothing that was committed is lost."
        return BackendError(what, "train", fix)

    def _try(self, arguments: tuple[Any, ...], news: Path, follow: Callable[[dict[str, Any]], None]) -> Outcome:
        self.start()
        self._number += 1
        outcome = Outcome(died="it was interrupted")
        try:
            lines = _tail(news, news.stat().st_size if news.exists() else 0)
            self._conductor.post.remote(self._number, (*arguments, news))
            outcome = self._await(lines, follow)
            return outcome
        finally:
            if outcome.error is not None or outcome.died:
                self.close()

    def _await(self, lines: Iterator[list[dict[str, Any]]], follow: Callable[[dict[str, Any]], None]) -> Outcome:
        import ray

        while True:
            asked = self._conductor.outcome.remote(self._number)
            while not ray.wait([asked], timeout=0.25)[0]:
                for numbers in next(lines):
                    follow(numbers)
            try:
                outcome = ray.get(asked, timeout=PATIENCE)
            except ray.exceptions.RayActorError as error:
                outcome = Outcome(died=first_line(error))
            if outcome is not None:
                for numbers in next(lines):
                    follow(numbers)
                return outcome


def _tail(path: Path, place: int) -> Iterator[list[dict[str, Any]]]:
    """At each `next`: the whole lines that were added to `path` since the last one, first those after byte `place`."""
    while True:
        text = ""
        if path.exists():
            with path.open() as handle:
                handle.seek(place)
                text = handle.read()
        whole = text[: text.rfind("\n") + 1]
        place += len(whole.encode())
        yield [json.loads(line) for line in whole.splitlines()]
