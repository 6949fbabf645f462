"""The trainer group: N ranks inside one Ray Train TorchTrainer that stay alive from update to update.

A new `fit()` for every update would import torch, transformers and TRL anew in each round. So one `fit()` runs for as long as
the group lives: each rank imports what it needs, then takes updates one after another from the coordinator, the actor that runs
`fit()` (which keeps torch out of the driver). A group that failed is thrown away and a new one started.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from selfkd.backend.base import OnSteps, Trained, TrainProgress, nobody_listens
from selfkd.backend.engine.held_engine import TRAINER, Importable, preload, redirect, resolve
from selfkd.backend.facts import of_trainer
from selfkd.backend.ray.cluster import POLL_SECONDS, actor_class, in_one_line
from selfkd.core.facts import Facts
from selfkd.errors import BackendError, SelfkdError

# Ray Train's own settings: notice a dead rank soon, stay in the working folder, and leave out two actors nobody reads.
RAY_TRAIN_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}
ANSWER_SECONDS = 5.0  # how long the coordinator waits for news before it answers that there are none
BLAME_SECONDS = 10.0  # a rank whose neighbour died fails first; this long until Ray Train says who died
CLOSE_SECONDS = 15.0
MOST_DEATHS = 2  # an update during which a process of the group died so often stops the run


@dataclass(frozen=True)
class GroupSpec:
    """What a trainer group consists of: so many ranks, each with these threads and this share of a GPU, running `trainer`."""

    ranks: int
    threads: int
    gpus: float
    storage: Path
    log: Path
    trainer: Importable = TRAINER


@dataclass(frozen=True)
class Outcome:
    """How an update ended: what rank 0 trained, or the `error` of the rank that failed first, or how a process `died`.

    `facts`: what each rank computes with.
    """

    trained: Trained | None = None
    error: BaseException | None = None
    died: str = ""
    facts: Mapping[int, Facts] = field(default_factory=dict)


class Coordinator:
    """An actor with threads: one runs `fit()`, the others hand out updates and collect what the ranks make of them."""

    def __init__(self, spec: GroupSpec) -> None:
        redirect(spec.log / "trainer.log")
        os.environ.update(RAY_TRAIN_SETTINGS)
        self._spec = spec
        self._changed = threading.Condition()
        self._job: tuple[int, tuple[Any, ...]] | None = None
        self._values: dict[int, Any] = {}
        self._facts: dict[int, Facts] = {}
        self._error: BaseException | None = None
        self._ended = ""
        self._closed = False

    def run_group(self) -> None:
        """Run the group until it is closed or fails."""
        try:
            _fit(self._spec)
            ended = "the trainer group ended"
        except BaseException as error:  # whatever it was, the driver must learn of it
            traceback.print_exc()
            ended = _first_failure(error)
        with self._changed:
            self._ended = ended
            self._changed.notify_all()

    def post(self, number: int, job: tuple[Any, ...]) -> None:
        with self._changed:
            self._job, self._values, self._error = (number, job), {}, None
            self._changed.notify_all()

    def take(self, number: int) -> tuple[str, tuple[Any, ...]]:
        """Return to a rank: ("job", update `number`), ("wait", ()) if it is not there yet, ("close", ()) when all is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._posted(number), ANSWER_SECONDS)
            if self._posted(number) and self._job:
                return "job", self._job[1]
            return ("close" if self._closed else "wait"), ()

    def finish(self, number: int, rank: int, value: Any, error: BaseException | None, facts: Facts) -> None:
        with self._changed:
            if self._posted(number):
                self._values[rank], self._facts[rank] = value, facts
                self._error = self._error or error
                self._changed.notify_all()

    def outcome(self, number: int) -> Outcome | None:
        """Return to the driver how update `number` ended, or None if it still runs.

        By number, because the threads of an actor keep no order: this call may overtake the `post` before it.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._posted(number) and self._decided(), ANSWER_SECONDS)
            if not self._posted(number):
                return None
            if self._error is not None and not isinstance(self._error, SelfkdError) and self._spec.ranks > 1:
                self._changed.wait_for(lambda: bool(self._ended), BLAME_SECONDS)
            if isinstance(self._error, SelfkdError) or (self._error and not self._ended):
                return Outcome(error=self._error)
            if self._ended:
                return Outcome(died=self._ended)
            return Outcome(self._values[0], facts=dict(self._facts)) if self._decided() else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _posted(self, number: int) -> bool:
        return self._job is not None and self._job[0] == number

    def _decided(self) -> bool:
        return bool(self._ended) or self._error is not None or len(self._values) == self._spec.ranks


def _fit(spec: GroupSpec) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": float(spec.threads), **({"GPU": spec.gpus} if spec.gpus else {})}
    scaling = ScalingConfig(num_workers=spec.ranks, use_gpu=bool(spec.gpus), resources_per_worker=resources)
    failures = FailureConfig(max_failures=0, controller_failure_limit=0)
    run = RunConfig(name="trainers", storage_path=str(spec.storage), failure_config=failures)
    loop = partial(_serve, ray.get_runtime_context().current_actor, spec.trainer, spec.log)
    TorchTrainer(loop, scaling_config=scaling, run_config=run).fit()


def _first_failure(error: BaseException) -> str:
    """Say in one sentence why the group failed; Ray Train's own error has many lines."""
    failures = getattr(error, "worker_failures", None) or {}
    return "; ".join(f"rank {rank}: {_cause(failure)}" for rank, failure in sorted(failures.items())) or in_one_line(error)


def _cause(failure: BaseException) -> str:
    from ray.exceptions import ActorDiedError

    inner = getattr(failure, "health_check_failure", failure)  # Ray Train wraps a death as a failed health check
    return (
        "its process ended, as after kill -9 or for want of memory" if isinstance(inner, ActorDiedError) else in_one_line(inner)
    )


def _serve(coordinator: Any, trainer: Importable, log: Path) -> None:
    """Be a rank: import, then make one update after another. Runs inside Ray Train, in its process group."""
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
            what, job = ray.get(coordinator.take.remote(number), timeout=20 * ANSWER_SECONDS)
        except ray.exceptions.RayActorError:  # the driver ended the group
            return
        if what == "close":
            return
        if what == "job":
            value, error = _update(resolve(trainer), job, rank)
            ray.get(coordinator.finish.remote(number, rank, value, error, of_trainer()), timeout=20 * ANSWER_SECONDS)
            number += 1


def _leave_process_group() -> None:
    """Leave the process group, which a single rank does not need: TRL's trainer would wrap the model and hold its gradients twice."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def _update(function: Callable[..., Any], job: tuple[Any, ...], rank: int) -> tuple[Any, BaseException | None]:
    """Call the trainer once. Only rank 0 reports; an error that may not pickle becomes a RuntimeError with the same text."""
    *arguments, steps_log = job
    try:
        return function(*arguments, partial(_append, steps_log) if rank == 0 else nobody_listens), None
    except SelfkdError as error:
        traceback.print_exc()
        return None, error
    except Exception as error:
        traceback.print_exc()
        return None, RuntimeError(f"{type(error).__name__}: {error}")


def _append(steps_log: Path, progress: TrainProgress) -> None:
    """Append one line per step; the driver follows the file, and it stays as the log of the update."""
    with steps_log.open("a") as handle:
        handle.write(json.dumps(progress, default=float) + "\n")


class TrainerGroup:
    """The driver's side: start a group early, hand it an update, follow its steps, throw it away when it failed.

    `facts`: what each rank that made an update computes with.
    """

    def __init__(self, spec: GroupSpec) -> None:
        self.spec = spec
        self.facts: dict[str, Facts] = {}
        self._coordinator: Any = None
        self._running: Any = None
        self._number = 0

    def start(self) -> None:
        """Start the ranks if there are none; returns at once, so that their imports run beside something else."""
        if self._coordinator is None:
            self.spec.storage.mkdir(parents=True, exist_ok=True)
            kind = actor_class(Coordinator, num_cpus=0, max_concurrency=self.spec.ranks + 4)
            self._coordinator = kind.remote(self.spec)
            self._running = self._coordinator.run_group.remote()
            self._number = 0

    def train(self, *arguments: Any, steps_log: Path, on_progress: OnSteps) -> Trained:
        """Make one update. It is idempotent, so one that a process died of is repeated, until MOST_DEATHS have died."""
        deaths = 0
        while True:
            outcome = self._try(arguments, steps_log, on_progress)
            if outcome.error is not None:
                raise outcome.error if isinstance(outcome.error, SelfkdError) else self._failed(str(outcome.error))
            if not outcome.died:
                assert outcome.trained is not None
                self.facts |= {f"trainer-{rank}": facts for rank, facts in outcome.facts.items()}
                return outcome.trained
            deaths += 1
            if deaths >= MOST_DEATHS:
                raise self._failed(f"a training process died {deaths} times ({outcome.died})")

    def close(self, wait: bool = False) -> None:
        """End the group. `wait` lets Ray Train end the ranks and waits for it: after that their GPU memory is free."""
        import ray

        coordinator, self._coordinator = self._coordinator, None
        if coordinator is None:
            return
        if wait:
            coordinator.close.remote()
            ray.wait([self._running], timeout=CLOSE_SECONDS)
        ray.kill(coordinator, no_restart=True)

    def _failed(self, what: str) -> BackendError:
        fix = f"The log of the ranks: {self.spec.log}/trainer-0.log. Repeat the command: nothing that was committed is lost."
        return BackendError(what, "train", fix)

    def _try(self, arguments: tuple[Any, ...], steps_log: Path, on_progress: OnSteps) -> Outcome:
        self.start()
        self._number += 1
        outcome = Outcome(died="it was interrupted")
        try:
            steps = _new_lines(steps_log, steps_log.stat().st_size if steps_log.exists() else 0)
            self._coordinator.post.remote(self._number, (*arguments, steps_log))
            outcome = self._await(steps, on_progress)
            return outcome
        finally:
            if outcome.error is not None or outcome.died:
                self.close()

    def _await(self, steps: Iterator[list[TrainProgress]], on_progress: OnSteps) -> Outcome:
        import ray

        while True:
            answer = self._coordinator.outcome.remote(self._number)
            while not ray.wait([answer], timeout=POLL_SECONDS)[0]:
                _report(steps, on_progress)
            try:
                outcome: Outcome | None = ray.get(answer, timeout=ANSWER_SECONDS)
            except ray.exceptions.RayActorError as error:
                outcome = Outcome(died=in_one_line(error))
            if outcome is not None:
                _report(steps, on_progress)
                return outcome


def _report(steps: Iterator[list[TrainProgress]], on_progress: OnSteps) -> None:
    for progress in next(steps):
        on_progress(progress)


def _new_lines(path: Path, place: int) -> Iterator[list[TrainProgress]]:
    """Yield at each `next` the whole lines that were added to `path` since the last one, first those after byte `place`."""
    while True:
        text = ""
        if path.exists():
            with path.open() as handle:
                handle.seek(place)
                text = handle.read()
        whole = text[: text.rfind("\n") + 1]
        place += len(whole.encode())
        yield [json.loads(line) for line in whole.splitlines()]
