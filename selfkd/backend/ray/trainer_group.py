"""The trainer group, from the driver's side: its ranks live as long as the run, and take one update after another.

A rank that dies, hangs, or fails alone, leaves the others waiting in a group call that nobody answers; so a group that failed is ended
as a whole, and a new one is started.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfkd.backend.base import OnSteps, Saves, Trained, TrainProgress, TrainSpec
from selfkd.backend.ray.cluster import POLL_SECONDS, actor_class, in_one_line, unwrapped
from selfkd.backend.ray.rank import Group, Rank, Update
from selfkd.backend.ray.step_watch import StepWatch
from selfkd.backend.trainer import sealed
from selfkd.core.facts import Facts
from selfkd.errors import BackendError, SelfkdError, Stopped

FETCH_SECONDS = 60.0  # an answer that is ready is a few kilobytes
BLAME_SECONDS = 10.0  # a rank whose neighbour died fails first; this long until Ray says who died
MOST_DEATHS = 2  # so many of a process of the group, without a checkpoint of the update between them, stop the run


@dataclass(frozen=True)
class Died:
    """A process of the group ended, or the group made no step any more."""

    reason: str
    how: str = "died"


class TrainerGroup:
    """Start the ranks early, hand them an update, follow its steps, end them all when one failed.

    `options` are those of each rank's actor. `facts`: what each rank that made an update computes with.
    """

    def __init__(self, group: Group, options: Sequence[Mapping[str, Any]]) -> None:
        self.group, self._options = group, options
        self.facts: dict[str, Facts] = {}
        self._ranks: list[Any] = []
        self._joined: list[Any] = []

    def start(self) -> None:
        """Start the ranks if there are none; returns at once, so that their imports run beside something else."""
        if self._ranks:
            return
        numbered = enumerate(self._options)
        self._ranks = [actor_class(Rank, **options).remote(rank, self.group) for rank, options in numbered]
        meeting = self._ranks[0].listen.remote() if self.group.ranks > 1 else None
        self._joined = [rank.join.remote(meeting) for rank in self._ranks]

    def train(self, *arguments: Any, steps_log: Path, on_progress: OnSteps) -> Trained:
        """Make one update. One that a process died of, or hung in, goes on from its newest checkpoint, until MOST_DEATHS died without getting further."""
        saves, until = next(((one.saves, one.until) for one in arguments if isinstance(one, TrainSpec)), (None, None))
        deaths, reached = 0, _newest(saves)
        while True:
            outcome = self._try(arguments, saves, until, steps_log, on_progress)
            if isinstance(outcome, BaseException):
                raise outcome if isinstance(outcome, SelfkdError) else self._failed(in_one_line(outcome))
            if isinstance(outcome, list):
                self.facts |= {f"trainer-{rank}": update.facts for rank, update in enumerate(outcome)}
                trained: Trained = outcome[0].trained
                return trained
            deaths, reached = (deaths if _newest(saves) == reached else 0) + 1, _newest(saves)
            if deaths >= MOST_DEATHS:
                raise self._failed(f"a training process {outcome.how} {deaths} times ({outcome.reason})")

    def close(self) -> None:
        """End every rank, whatever it is doing."""
        import ray

        ranks, self._ranks, self._joined = self._ranks, [], []
        for rank in ranks:
            with suppress(ray.exceptions.RayError):  # it may be dead already
                ray.kill(rank, no_restart=True)

    def _failed(self, what: str) -> BackendError:
        fix = f"The log of the ranks: {self.group.log}/trainer-0.log. Repeat the command: nothing that was committed is lost."
        return BackendError(what, "train", fix)

    def _try(
        self, arguments: tuple[Any, ...], saves: Saves | None, until: int | None, steps_log: Path, on_progress: OnSteps
    ) -> list[Update] | BaseException | Died:
        """Return what each rank made of an update, or the error of one, or how one died; then, or if interrupted, the group is gone."""
        self.start()
        outcome: list[Any] | BaseException | Died = Died("it was interrupted")
        try:
            steps = _new_lines(steps_log, steps_log.stat().st_size if steps_log.exists() else 0)
            outcome = self._gather(self._joined, steps, on_progress, StepWatch())
            if isinstance(outcome, list):
                with _ended_gently(saves) as calls:
                    calls += [rank.update.remote(arguments, steps_log) for rank in self._ranks]
                    watch = StepWatch(saves.folder if saves else None, until)
                    outcome = self._gather(calls, steps, on_progress, watch)
            return outcome
        finally:
            if not isinstance(outcome, list):
                self.close()

    def _gather(
        self, calls: Sequence[Any], steps: Iterator[list[TrainProgress]], on_progress: OnSteps, watch: StepWatch
    ) -> list[Any] | BaseException | Died:
        """Wait for one call of each rank. A death counts before an error, for errors are what the others make of a death."""
        import ray

        answers: dict[int, Any] = {}
        failed: BaseException | None = None
        until = math.inf
        while len(answers) < len(calls) and time.monotonic() < until:
            waiting = [call for rank, call in enumerate(calls) if rank not in answers]
            ready, _ = ray.wait(waiting, timeout=POLL_SECONDS)
            for progress in next(steps):
                watch.heard(progress)
                on_progress(progress)
            if (hangs := watch.hangs(time.monotonic())) and not ready:
                return Died(f"{_named(waiting, calls)}: {hangs}", "hung")
            for rank in [calls.index(call) for call in ready]:
                answer = answers[rank] = _answer(calls[rank], rank)
                if isinstance(answer, Died):
                    return answer
                error = _error(answer)
                if isinstance(error, SelfkdError):
                    return error
                if error is not None and failed is None:
                    failed, until = error, time.monotonic() + BLAME_SECONDS
        return failed or [answers[rank] for rank in range(len(calls))]


def _newest(saves: Saves | None) -> int:
    """Return the step of the newest checkpoint of an update, 0 where there is none."""
    return max((step for step, _ in sealed.steps(saves.folder)), default=0) if saves else 0


@contextmanager
def _ended_gently(saves: Saves | None) -> Iterator[list[Any]]:
    """Let the calls that the list is filled with seal the step that they are at, where a stop is asked for.

    Not so soon after the beginning that the work is made again sooner.
    """
    import ray

    calls: list[Any] = []
    flag, began = saves and saves.folder / sealed.STOP, time.monotonic()
    if flag:
        flag.unlink(missing_ok=True)  # of an earlier attempt: whatever asks for a checkpoint now, it is not that
    try:
        yield calls
    except (Stopped, KeyboardInterrupt):
        if flag and saves and saves.minutes and time.monotonic() - began >= sealed.WORTH_SECONDS:
            flag.touch()
            ray.wait(calls, num_returns=len(calls), timeout=sealed.STOP_SECONDS)
        raise


def _named(waiting: Sequence[Any], calls: Sequence[Any]) -> str:
    ranks = [str(rank) for rank, call in enumerate(calls) if call in waiting]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"one of the ranks {', '.join(ranks)}"


def _answer(call: Any, rank: int) -> Any:
    """Return what a rank answered, the error it raised, or how its process ended."""
    import ray

    try:
        return ray.get(call, timeout=FETCH_SECONDS)
    except ray.exceptions.RayActorError as error:
        started = "creation task" not in str(error)
        why = "its process ended, as after kill -9 or for want of memory" if started else in_one_line(error)
        return Died(f"rank {rank}: {why}")
    except Exception as error:
        return unwrapped(error)


def _error(answer: Any) -> BaseException | None:
    return answer.error if isinstance(answer, Update) else answer if isinstance(answer, BaseException) else None


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
