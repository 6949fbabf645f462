"""Trackers and notices: every round once, under one id through kills, and none that fails or hangs costs a run anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, write_prompts

from selfkd.chain.paths import Paths
from selfkd.chain.run import Run
from selfkd.cli.main import main
from selfkd.errors import UsageError
from selfkd.report import status, tracking
from selfkd.report.tracking import Ledger, follow, targets_of, told_of, values_of

NEVER = 10_000  # seconds


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackers write beside the test, ask no network, and are found by the processes that the test starts."""
    for name, value in {
        "TRACKIO_DIR": tmp_path / "trackio",
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path / "wandb",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "HF_HUB_OFFLINE": "1",
    }.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "run"))


def in_a_process(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    """Tell a run's rounds to a target as a driver's process does, stdin at its end."""
    command = [sys.executable, "-m", "selfkd.report.tracking", str(folder)]
    return subprocess.run(command, input=target + "\n", capture_output=True, text=True, timeout=120, check=False)


# ---- what is told ----


def test_the_values_of_a_round_are_those_of_its_row(done: Path) -> None:
    [_, first, _] = status.read(done).rounds
    values, measured = values_of(first), first.measured["dev"]
    assert measured.interval and measured.change and first.kept and first.samples
    assert values["dev/last_number"] == measured.value
    assert (values["dev/last_number_low"], values["dev/last_number_high"]) == (measured.interval.low, measured.interval.high)
    assert values["dev/last_number_change"] == measured.change.value
    assert values["kept_share"] == first.kept / first.samples and values["round"] == 1


def test_a_run_has_one_id_wherever_it_lies_and_another_run_another_one(done: Path, run: Path) -> None:
    assert told_of(done).id == told_of(run).id
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "created": "2020-01-01T00:00:00Z"}))
    assert told_of(run).id != told_of(done).id


# ---- each tracker ----


def by_trackio(told: tracking.Told) -> list[int]:
    """The steps that trackio holds, as a process of its own reads them: it looks for its folder once, when it is imported."""
    name = f"{told.name}-{told.id[:8]}"
    program = f"import trackio.sqlite_storage as s, json; print(json.dumps([row['step'] for row in s.SQLiteStorage.get_logs('selfkd', {name!r})]))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    found: list[int] = json.loads(said.splitlines()[-1])
    return found


def by_tensorboard(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.step for event in EventAccumulator(str(folder / "logs" / "tensorboard")).Reload().Tensors("dev/last_number")]


@pytest.mark.parametrize("lost", [False, True])
def test_trackio_holds_every_round_once_though_the_ledger_was_lost(run: Path, lost: bool) -> None:
    assert in_a_process(run, "trackio").returncode == 0
    if lost:
        shutil.rmtree(run / "logs" / tracking.FOLDER)
    assert in_a_process(run, "trackio").returncode == 0
    assert by_trackio(told_of(run)) == [0, 1, 2]


@pytest.mark.parametrize("lost", [False, True])
def test_tensorboard_holds_every_round_once_though_the_ledger_was_lost(run: Path, lost: bool) -> None:
    assert main(["track", str(run), "--to", "tensorboard"]) == 0
    if lost:
        shutil.rmtree(run / "logs" / tracking.FOLDER)
    assert main(["track", str(run), "--to", "tensorboard"]) == 0
    assert by_tensorboard(run) == [0, 1, 2]


def test_wandb_offline_has_one_id_for_both_attempts_and_no_round_twice(run: Path, tmp_path: Path) -> None:
    for _ in range(2):
        said = in_a_process(run, "wandb")
        assert said.returncode == 0, said.stderr
    [only] = (tmp_path / "wandb" / "wandb").glob("offline-run-*")  # the second one had nothing to tell, and opened nothing
    assert only.name.endswith(told_of(run).id)


def test_mlflow_finds_its_run_again_and_holds_every_round_once(run: Path, tmp_path: Path, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # without its database package, which the small MLflow lacks
    for _ in range(2):
        said = in_a_process(run, "mlflow")
        assert said.returncode == 0, said.stderr
        shutil.rmtree(run / "logs" / tracking.FOLDER)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("selfkd")
    assert experiment
    [only] = client.search_runs([experiment.experiment_id])
    assert [one.step for one in client.get_metric_history(only.info.run_id, "dev/last_number")] == [0, 1, 2]


def test_a_tracker_that_nobody_knows_or_has_installed_is_named(run: Path, monkeypatch, capsys) -> None:
    assert main(["track", str(run), "--to", "trackoi"]) == 2
    assert "Did you mean 'trackio'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["track", str(run), "--to", "wandb"]) == 2
    assert "pip install wandb" in capsys.readouterr().err


# ---- beside a run ----

SLOW = RECIPE.replace("rounds: 2", "rounds: 3")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_prompts(tmp_path)
    (tmp_path / "sums.yaml").write_text(RECIPE)
    (tmp_path / "fake.yaml").write_text("backend: fake\n")
    return tmp_path


def started(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "selfkd", "run", "sums.yaml", "--on", "fake.yaml", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_run_that_is_killed_and_repeated_is_one_run_in_trackio_with_each_round_once(home: Path) -> None:
    process = started("--log", "trackio")
    run, deadline = home / "runs" / "sums", time.monotonic() + 60
    while not (run / "round-001" / "sealed.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    said, _ = started("--log", "trackio").communicate(timeout=120)
    assert by_trackio(told_of(run)) == [0, 1, 2], said
    assert Run.at(run).sealed()[-1].round == 2


@contextmanager
def server(status_code: int, seconds: float = 0.0) -> Iterator[tuple[str, list[Any]]]:
    """An address that answers with this status, after so long; and what it was sent."""
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(seconds)
            self.send_response(status_code)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=made.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}/hook?token=secret", seen
    finally:
        made.shutdown()


def test_an_address_is_told_of_each_round_and_of_the_end(home: Path) -> None:
    with server(200) as (address, seen):
        said, _ = started("--notify", address).communicate(timeout=120)
    assert [(one["event"], one["round"]) for one in seen] == [("round", 0), ("round", 1), ("round", 2), ("stop", 2)]
    assert seen[1]["text"].startswith("sums: round 1") and seen[-1]["text"] == "sums: done"
    assert seen[1]["values"]["round"] == 1
    assert "secret" not in said


def test_a_command_is_told_on_its_stdin(home: Path) -> None:
    started("--notify", 'printf "%s\\n" "$SELFKD_TEXT" >> told.txt; cat >/dev/null').communicate(timeout=120)
    lines = (home / "told.txt").read_text().splitlines()
    assert len(lines) == 4 and lines[-1] == "sums: done"


def test_a_server_that_answers_500_stops_nothing_and_is_told_of_once(home: Path, monkeypatch) -> None:
    with server(500) as (address, _):
        process = started("--notify", address)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and Run.at(home / "runs" / "sums").sealed()[-1].round == 2
    assert said.count("The run goes on without.") == 1 and "secret" not in said


def test_a_server_that_hangs_costs_a_run_the_grace_at_its_end_and_no_more(home: Path) -> None:
    with server(200, seconds=NEVER) as (address, _):
        process = started("--notify", address)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "did not answer within 5 s of the end" in said
    assert Run.at(home / "runs" / "sums").sealed()[-1].round == 2  # and no round waited for an answer that never comes


def test_a_driver_that_is_killed_is_told_of_and_leaves_no_process(home: Path) -> None:
    (home / "sums.yaml").write_text(RECIPE.replace("rounds: 2", "rounds: 400"))
    with server(200) as (address, seen):
        process = started("--notify", address)
        deadline = time.monotonic() + 60
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "selfkd.report.tracking"], capture_output=True, text=True
        )
        [child] = map(int, children.stdout.split())
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert seen[-1]["event"] == "stop" and "its driver was killed" in seen[-1]["text"]


def test_rounds_that_were_there_before_anybody_asked_are_no_news(run: Path) -> None:
    with server(200) as (address, seen):
        Ledger.of(Paths(run), f"notify:{address}").begin(Paths(run))
        follow(run, f"notify:{address}", lambda: True)
    assert [one["event"] for one in seen] == ["stop"]


def test_a_ledger_that_is_torn_counts_as_none(run: Path) -> None:
    ledger = Ledger.of(Paths(run), "trackio")
    ledger.note(1)
    assert ledger.newest() == 1
    ledger.path.write_text('{"round": ')
    assert ledger.newest() == -1


def test_targets_come_from_the_command_else_from_the_environment_and_are_checked() -> None:
    environment = {"SELFKD_LOG": "trackio,wandb:mine", "SELFKD_NOTIFY": "say hello"}
    assert targets_of([], [], environment) == ["trackio", "wandb:mine", "notify:say hello"]
    assert targets_of(["mlflow", "mlflow"], [], {"SELFKD_LOG": "trackio"}) == ["mlflow"]
    with pytest.raises(UsageError, match="no tracker 'wndb'"):
        targets_of(["wndb"], [], {})
