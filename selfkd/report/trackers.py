"""Trackers that a run's rounds are told to: trackio, wandb, TensorBoard, MLflow, each behind the same three functions.

None is a dependency: one that is asked for and not installed is named with the command that installs it. Where a tracker sends things is
its own business, by its own environment variables: TRACKIO_SPACE_ID, WANDB_MODE, MLFLOW_TRACKING_URI and the like.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from selfkd.errors import BackendError, UsageError

PROJECT = "selfkd"
STEP = "round"  # the metric that says which round a row is of


@dataclass(frozen=True)
class Told:
    """What a tracker is told of a run once: its name, an id that stays the same through kills, its folder for logs, and the recipe."""

    name: str
    id: str
    logs: Path
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Where rounds go. `log` returns when the round would survive a kill of this process."""

    def newest(self) -> int | None:
        """Return the newest round that it holds, -1 for none, None where it cannot say."""

    def log(self, index: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def _package(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        what = f"the package '{install}' is not installed here: {error}"
        raise UsageError(
            what, f"--log {module.partition('.')[0]}", f"Install it: {sys.executable} -m pip install {install}"
        ) from None


class Trackio:
    """One run of trackio, opened for each round: it is written in a thread, and only its end waits for that."""

    def __init__(self, told: Told, project: str) -> None:
        self.trackio, self.told, self.project = _package("trackio", "trackio"), told, project
        self.name = f"{told.name}-{told.id[:8]}"  # a run is found by its name

    def newest(self) -> int | None:
        if any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            return None
        found = import_module("trackio.sqlite_storage").SQLiteStorage.get_max_step_for_run(self.project, self.name)
        return -1 if found is None else int(found)

    def log(self, index: int, values: Mapping[str, float]) -> None:
        off = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        run = self.trackio.init(self.project, name=self.name, config=dict(self.told.config), resume="allow", **off)
        run.log(dict(values), step=index)
        run.finish()
        held = self.newest()
        if held is not None and held < index:  # it warns of what it could not write, and goes on
            raise BackendError(
                f"trackio did not keep round {index}", "--log trackio", "Its own words stand above, in this log."
            )

    def close(self) -> None: ...


class Wandb:
    """One run of wandb by its id: offline it is written beside the logs, and `wandb sync` joins what several attempts wrote."""

    def __init__(self, told: Told, project: str) -> None:
        wandb = _package("wandb", "wandb")
        quiet = wandb.Settings(console="off", silent=True, disable_git=True)
        folder = None if os.environ.get("WANDB_DIR") else str(told.logs)
        more = {"config": dict(told.config), "dir": folder, "settings": quiet}
        self.run = wandb.init(project=project, id=told.id, name=told.name, resume="allow", **more)

    def newest(self) -> int | None:
        return None

    def log(self, index: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=index, commit=True)

    def close(self) -> None:
        self.run.finish()


class Tensorboard:
    """Event files in the run's logs, or in `project` where that is said."""

    def __init__(self, told: Told, project: str) -> None:
        self.writer = _package("tensorboard.summary", "tensorboard").Writer
        self.folder = told.logs.parent / "tensorboard" if project == PROJECT else Path(project) / told.name
        self.folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> int | None:
        reading = import_module("tensorboard.backend.event_processing.event_accumulator")
        found = reading.EventAccumulator(str(self.folder), size_guidance={"tensors": 0}).Reload()
        steps = [event.step for event in found.Tensors(STEP)] if STEP in found.Tags()["tensors"] else []
        return max(steps, default=-1)

    def log(self, index: int, values: Mapping[str, float]) -> None:
        writer = self.writer(str(self.folder))
        for name, value in values.items():
            writer.add_scalar(name, value, step=index)
        writer.close()

    def close(self) -> None: ...


class Mlflow:
    """One run of MLflow, found again by a tag."""

    TAG = "selfkd.id"

    def __init__(self, told: Told, project: str) -> None:
        mlflow = _package("mlflow", "mlflow-skinny")
        self.client, self.metric = mlflow.MlflowClient(), mlflow.entities.Metric
        known = self.client.get_experiment_by_name(project)
        experiment = known.experiment_id if known else self.client.create_experiment(project)
        found = self.client.search_runs([experiment], f"tags.`{self.TAG}` = '{told.id}'", max_results=1)
        made = found[0] if found else self.client.create_run(experiment, run_name=told.name, tags={self.TAG: told.id})
        self.id = made.info.run_id
        if not found:
            self.client.log_dict(self.id, dict(told.config), "recipe.yaml")

    def newest(self) -> int | None:
        return max((one.step for one in self.client.get_metric_history(self.id, STEP)), default=-1)

    def log(self, index: int, values: Mapping[str, float]) -> None:
        now = [self.metric(name, value, 0, index) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=now)

    def close(self) -> None:
        self.client.set_terminated(self.id)


TRACKERS: Mapping[str, Callable[[Told, str], Tracker]] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": Tensorboard,
    "mlflow": Mlflow,
}


def open_tracker(target: str, told: Told) -> Tracker:
    """Return the tracker that `trackio` or `wandb:my-project` names."""
    name, _, project = target.partition(":")
    return TRACKERS[name](told, project or PROJECT)
