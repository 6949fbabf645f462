"""Rounds of a run told to a tracker, to an address or to a command, by a process that only reads the run's folder.

    python -m selfkd.report.tracking RUN trackio

The driver starts one such process per target and waits for none: one that fails or hangs costs a run nothing, and what it missed is told
when the command is repeated, or by `selfkd track`. What was told already stands in logs/told/, so that no round is told twice.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from selfkd.chain import standing
from selfkd.chain.paths import Paths
from selfkd.core import digest
from selfkd.core.files import as_typed
from selfkd.core.wording import did_you_mean
from selfkd.errors import SelfkdError, UsageError
from selfkd.report import status
from selfkd.report.status import RoundSummary, Status
from selfkd.report.tables import round_line
from selfkd.report.trackers import STEP, TRACKERS, Told, Tracker, open_tracker

POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # that a driver waits at its end for what was sealed last to be told
NOTIFY = "notify:"  # in front of an address or a command
TRIES, WAIT_SECONDS, LIMIT_SECONDS = 3, 2.0, 20.0
FOLDER = "told"


# ---------------------------------------------------------------------------------------------------------------- targets


def check_target(target: str) -> str:
    """Return the target as it is; UsageError where no tracker has that name."""
    name = target.partition(":")[0]
    if target.startswith(NOTIFY) or name in TRACKERS:
        return target
    fix = f"Trackers: {', '.join(TRACKERS)}; a project behind a colon: wandb:mine"
    raise UsageError(f"no tracker '{name}'.{did_you_mean(name, TRACKERS)}", f"--log {target}", fix)


def values_of(summary: RoundSummary) -> dict[str, float]:
    """Return the numbers of a round by name: every measurement with its bounds and its change, what was kept, tokens, seconds."""
    found: dict[str, float | None] = {STEP: summary.index, "accepted": float(summary.accepted), "tokens": summary.tokens}
    for measured in summary.measured.values():
        found[measured.name] = measured.value
        if measured.interval:
            found |= {f"{measured.name}_low": measured.interval.low, f"{measured.name}_high": measured.interval.high}
        if measured.change:
            found[f"{measured.name}_change"] = measured.change.value
    if summary.samples and summary.kept is not None:
        found |= {"samples": summary.samples, "kept": summary.kept, "kept_share": summary.kept / summary.samples}
    found |= {f"seconds/{stage}": seconds for stage, seconds in summary.seconds.items()}
    found |= {"survived": summary.survived, **summary.told}
    return {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}


# -------------------------------------------------------------------------------------------------------------- following


@dataclass
class Ledger:
    """Which round a target was told last, kept in the logs of the run, outside everything that counts."""

    path: Path

    @classmethod
    def of(cls, paths: Paths, target: str) -> Ledger:
        safe = target.partition(":")[0] + "-" + digest.of(target)[:8]  # an address may hold a password
        return cls(paths.folder / "logs" / FOLDER / f"{safe}.json")

    def newest(self) -> int:
        try:
            return int(json.loads(self.path.read_text("utf-8"))["round"])
        except (OSError, ValueError, KeyError, TypeError):
            return -1

    def begin(self, paths: Paths) -> None:
        """Take all rounds as told, where nothing was told yet: what was sealed before anybody asked is no news."""
        if not self.path.is_file():
            self.note(max((names.index for names in paths.rounds() if names.seal.is_file()), default=-1))

    def note(self, index: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({"round": index}), "utf-8")
        draft.replace(self.path)


def follow(folder: Path, target: str, ended: Callable[[], bool]) -> None:
    """Tell each sealed round to the target, once, until `ended`; then those that were sealed meanwhile."""
    paths = Paths(folder)
    ledger = Ledger.of(paths, target)
    notices = target.startswith(NOTIFY)
    teller = _Notices(folder, target.removeprefix(NOTIFY)) if notices else _Rounds(folder, target)
    last = False
    while True:
        for summary in _new_rounds(paths, ledger.newest()):
            teller.tell(summary)
            ledger.note(summary.index)
        if last:
            break
        last = ended()
        if not last:
            time.sleep(POLL_SECONDS)
    teller.end()


def _new_rounds(paths: Paths, newest: int) -> list[RoundSummary]:
    """Return the sealed rounds after `newest`; a round that is not whole yet is none."""
    with suppress(SelfkdError, OSError):
        if len([names for names in paths.rounds() if names.seal.is_file()]) > newest + 1:
            return [summary for summary in status.rounds(paths) if summary.index > newest]
    return []


class _Rounds:
    """A tracker that is opened when there is something to tell."""

    def __init__(self, folder: Path, target: str) -> None:
        self.folder, self.target = folder, target
        self._opened: Tracker | None = None
        self._held = -1  # the newest round that it held when it was opened

    def tell(self, summary: RoundSummary) -> None:
        if self._opened is None:
            self._opened = open_tracker(self.target, told_of(self.folder))
            held = self._opened.newest()
            self._held = -1 if held is None else held
        if summary.index > self._held:
            self._opened.log(summary.index, values_of(summary))

    def end(self) -> None:
        if self._opened is not None:
            self._opened.close()


def told_of(folder: Path) -> Told:
    """Return what a tracker is told of the run in `folder`: its id is of its creation, so a kill changes nothing, and a copy is the same run."""
    paths = Paths(folder)
    info = status.info_of(paths)
    recipe = dict(standing.in_force(paths, info).recipe)
    logs = max((paths.attempt(number) for number in paths.attempts()), default=folder / "logs")
    return Told(info.name, digest.of("tracked", info.root, info.name, info.created)[:16], logs, recipe)


# ---------------------------------------------------------------------------------------------------------------- notices


@dataclass
class _Notices:
    """Rounds, their alarms and the end of the run, told to an address as JSON (`text` is what chats show) or to a command on stdin."""

    folder: Path
    to: str

    def tell(self, summary: RoundSummary) -> None:
        state = status.read(self.folder)
        self.send("round", f"{state.name}: {round_line(summary, state.split)}", summary)
        for warning in summary.warnings:
            self.send("alarm", f"{state.name}, round {summary.index}: {warning}", summary)

    def end(self) -> None:
        state = status.read(self.folder)
        self.send("stop", f"{state.name}: {_ending(state)}", state.rounds[-1] if state.rounds else None)

    def send(self, event: str, text: str, summary: RoundSummary | None) -> None:
        """Send a notice, a few times where it fails; then say so in the log, and go on."""
        content: dict[str, Any] = {"event": event, "text": text, "run": as_typed(self.folder)}
        content |= {"round": summary.index, "values": values_of(summary)} if summary else {}
        for attempt in range(TRIES):
            try:
                _deliver(self.to, json.dumps(content, ensure_ascii=False), text)
                return
            except (OSError, subprocess.SubprocessError, ValueError) as error:
                print(f"{event} was not delivered ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
                time.sleep(WAIT_SECONDS * (attempt + 1))
        raise UsageError(f"a notice of '{event}' was not delivered in {TRIES} tries", "--notify")


def _ending(state: Status) -> str:
    said = {"done": "done", "failed": "failed", "stopped": "stopped; the same command goes on"}
    said |= {"interrupted": "its driver was killed; the same command goes on"}
    return f"{said.get(state.state, state.state)}{f': {state.note}' if state.note and state.state != 'interrupted' else ''}"


def _deliver(to: str, content: str, text: str) -> None:
    if to.startswith(("http://", "https://")):
        request = urllib.request.Request(to, content.encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=LIMIT_SECONDS):
            return
    environment = {**os.environ, "SELFKD_TEXT": text}
    subprocess.run(to, shell=True, input=content, text=True, timeout=LIMIT_SECONDS, check=True, env=environment)


# ------------------------------------------------------------------------------------------------------ beside a driver


class Beside:
    """The processes that tell of a run while it is driven, one per target; used by a driver as a context.

    They end when their stdin does, so a driver that is killed leaves none for longer than it takes to tell the last round.
    """

    def __init__(self, folder: Path, targets: Sequence[str], logs: Path, warn: Callable[[str], None]) -> None:
        self.folder, self.targets, self.logs, self.warn = folder, targets, logs, warn
        self._processes: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}

    def __enter__(self) -> Beside:
        for target in self.targets:
            name = target.partition(":")[0]
            log = self.logs / f"{name}.log"
            if target.startswith(NOTIFY):  # here, for the process may begin after the first rounds
                paths = Paths(self.folder)
                with suppress(OSError):
                    Ledger.of(paths, target).begin(paths)
            command = [sys.executable, "-m", "selfkd.report.tracking", str(self.folder)]
            with suppress(OSError), log.open("ab") as out:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True)
                assert process.stdin
                process.stdin.write(target.encode() + b"\n")  # not an argument: every user of the machine sees those
                process.stdin.flush()
                self._processes[target] = process, log
        return self

    def check(self) -> None:
        """Say of each process that failed what it said, once."""
        for target, (process, log) in list(self._processes.items()):
            if process.poll() not in (None, 0):
                self._tell(target, f"failed: {_last_line(log)}", log)

    def __exit__(self, *_: object) -> None:
        for process, _log in self._processes.values():
            with suppress(OSError):
                assert process.stdin
                process.stdin.close()
        deadline = time.monotonic() + GRACE_SECONDS
        for target, (process, log) in list(self._processes.items()):
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                self._tell(target, f"did not answer within {GRACE_SECONDS:.0f} s of the end", log)
        self.check()

    def _tell(self, target: str, what: str, log: Path) -> None:
        del self._processes[target]
        name = target.partition(":")[0]
        fix = f"Tell it what it missed: selfkd track {as_typed(self.folder)} --to {name}" if name in TRACKERS else ""
        self.warn(f"{name} {what}. The run goes on without. {fix}".strip() + f"   Log: {as_typed(log)}")


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return (errors or lines or ["it said nothing"])[-1].strip()
    return "its log cannot be read"


def main() -> int:
    """Follow the run named by the argument, for the target that stdin names, until stdin ends."""
    stdin: TextIO = sys.stdin
    folder, target = Path(sys.argv[1]), stdin.readline().rstrip("\n")
    over = _ends(stdin)
    try:
        follow(folder, target, over)
    except SelfkdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _ends(stream: TextIO) -> Callable[[], bool]:
    """Return what says whether a stream has ended; a thread waits for it."""
    over = threading.Event()

    def wait() -> None:
        stream.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    return over.is_set


def targets_of(logs: Sequence[str], notify: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the targets of a command: those of its options, else those of SELFKD_LOG and SELFKD_NOTIFY; each checked, each once."""
    named = list(logs) or [word for word in environment.get("SELFKD_LOG", "").split(",") if word]
    told = list(notify) or [word for word in [environment.get("SELFKD_NOTIFY", "")] if word]
    return list(dict.fromkeys([*map(check_target, named), *(f"{NOTIFY}{to}" for to in told)]))


def said_of(targets: Sequence[str]) -> str:
    """Return which trackers a run is told to, for its head line; of a notice not where it goes."""
    names = dict.fromkeys(target.partition(":")[0] for target in targets)
    return f"Its rounds are told to {' and '.join(names)}." if targets else ""


if __name__ == "__main__":
    sys.exit(main())
