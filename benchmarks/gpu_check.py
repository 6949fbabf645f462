"""`make gpu-check`: what only a card can show, in under ten minutes on one card, into one results file.

    python benchmarks/gpu_check.py [--out runs/gpu-check.json] [--model FOLDER] [--seconds 570] [--only NAME ...]

Every check runs in a process of its own and has a deadline, so that one that hangs or dies costs itself only. It ends 0 where all pass or
are skipped, and 1 where one fails. Without a card all are skipped, with the reason. `--model` is the model whose speeds are compared, such as
a folder of Qwen2.5-1.5B; without it, one of that shape with random weights is made on the spot, since a card may have no hub to ask. The
checks are functions of `card_checks.py`; this file knows only their names, their order and what they left.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from selfkd.backend.facts import ENGINE_PACKAGES, TRAINER_PACKAGES
from selfkd.core import accelerator, facts

HERE = Path(__file__).parent
SECONDS = 570.0
LEAST = 10.0  # seconds with which a check is worth beginning
GRACE = 5.0  # after which a check that was asked to end is killed
GIB = 1 << 30
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Check:
    """One thing to show: the function that shows it, the sentence that is true then, and the seconds that it may take."""

    name: str
    sentence: str
    seconds: float


CHECKS = (
    Check("models_are_made", "the models that the checks need are made and brought in as any root of a chain", 90),
    Check("three_rounds", "three rounds on one shared card end with every swap proved, and give its memory back", 150),
    Check("swap_is_proved", "new weights are proved in an engine that is awake, and it sees the update", 90),
    Check("sleep_gives_memory_back", "an asleep engine gives its memory back, and answers the same when it woke", 90),
    Check("mates_change_nothing", "with exact, who else is in a batch changes no token", 90),
    Check("an_update_repeats", "with exact, the same update gives the same digest", 90),
    Check(
        "an_offloaded_optimiser",
        "an optimiser's state in the machine's memory leaves the card and changes no weight",
        60,
    ),
    Check("as_fast_as_vllm", "answers come as fast as from LLM.generate", 160),
    Check("as_fast_as_trl", "an update is as fast as TRL's own as its users run it", 100),
    Check("kills_change_nothing", "with exact, a chain that was killed ends on the digest of one that was not", SECONDS),
)


@dataclass(frozen=True)
class Result:
    """What a check came to: passed, failed or skipped, `why` it did not pass, its figures, and what it was computed with."""

    name: str
    sentence: str
    status: str
    why: str = ""
    seconds: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    computed_with: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[str] = ()


# ---- in the process of a check ----


class Skip(Exception):
    """This check has nothing to check here; the text says why."""


class Failed(Exception):
    """What was to be shown is not so; the text says what is instead."""


class TimeUp(BaseException):
    """The time of a check is over; nothing but the check itself may catch it."""


@dataclass(frozen=True)
class Given:
    """What a check is given: an empty folder, one that all checks share, seconds, and the model to compare speeds with, or ''."""

    folder: Path
    shared: Path
    seconds: float
    model: str
    figures: dict[str, Any] = field(default_factory=dict)

    def note(self, **figures: Any) -> None:
        """Keep figures at once, so that a check that is killed has left them."""
        self.figures.update(figures)
        self.leave()

    def leave(self, **more: Any) -> None:
        path = self.folder / "left.json"
        path.with_suffix(".new").write_text(json.dumps({"figures": self.figures, **more}))
        path.with_suffix(".new").replace(path)

    @cached_property
    def ends(self) -> float:
        """When its time is over, by time.monotonic(); read it first when a check begins."""
        return time.monotonic() + self.seconds


def must(true: bool, otherwise: str) -> None:
    if not true:
        raise Failed(otherwise)


def serve(bodies: Mapping[str, Callable[[Given], None]], words: Sequence[str]) -> None:
    """Be the process of the check that `words` name, and leave what it came to in its folder."""
    name, folder, shared, seconds, model = words
    given = Given(Path(folder), Path(shared), float(seconds), model)
    signal.signal(signal.SIGTERM, _time_is_up)  # so that a check ends what it started
    signal.signal(signal.SIGALRM, _time_is_up)
    status, why = PASSED, ""
    try:
        assert given.ends
        bodies[name](given)
    except Skip as reason:
        status, why = SKIPPED, str(reason)
    except Failed as reason:
        status, why = FAILED, str(reason)
    except TimeUp:
        status, why = FAILED, f"did not end within {given.seconds:.0f} s"
    except Exception as error:
        traceback.print_exc()
        status, why = FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    given.leave(status=status, why=why, computed_with=_computed_with())
    sys.stdout.flush()
    os._exit(0)  # an engine's threads may wait for ever


def _time_is_up(*_: Any) -> None:
    raise TimeUp


def _computed_with() -> dict[str, Any]:
    """What this process computed with: versions of what it may have used, and of a card that torch saw."""
    from selfkd.backend.facts import of_engine, of_trainer

    found = {**of_trainer(), **of_engine()}
    return {name: value for name, value in found.items() if value is not None and name != "instructions"}


# ---- who runs them ----


def run_all(
    checks: Sequence[Check], program: Path, scratch: Path, seconds: float, model: str, say: Callable[[str], None] = print
) -> Iterator[Result]:
    """Run the checks in their order, each for as long as it may and time is left."""
    ends, free = time.monotonic() + seconds, accelerator.free_memory()
    for check in checks:
        left = ends - time.monotonic()
        if left < LEAST:
            yield told(Result(check.name, check.sentence, SKIPPED, f"no time was left of {seconds:.0f} s"), say)
            continue
        say(f"… {check.name}: {check.sentence}")
        yield told(run_one(check, program, scratch, min(check.seconds, left), model), say)
        if free is not None:
            accelerator.await_memory(free - GIB)


def told(result: Result, say: Callable[[str], None]) -> Result:
    say(line(result))
    return result


def run_one(check: Check, program: Path, scratch: Path, seconds: float, model: str) -> Result:
    """Run one check in a session of its own; whatever is left of it afterwards is killed."""
    folder, shared, began = scratch / check.name, scratch / "shared", time.monotonic()
    for one in (folder, shared):
        one.mkdir(parents=True, exist_ok=True)
    inner = max(seconds - GRACE, 1.0)  # so that it can end by itself
    command = [sys.executable, str(program), check.name, str(folder), str(shared), str(inner), model]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = _waited(process, seconds)
        finally:
            end_session(process.pid)
            process.wait()
    return _result(check, folder, code, seconds, time.monotonic() - began)


def _waited(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """Return how it ended, or None where it had to be asked to."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
    return None


def end_session(session: int) -> None:
    """Kill every process of a session, as long as there are any: one may start another meanwhile."""
    until = time.monotonic() + GRACE
    while (members := list(_of_session(session))) and time.monotonic() < until:
        for pid in members:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _of_session(session: int) -> Iterator[int]:
    """Yield the living processes of a session. Where there is no /proc there are no cards for us either."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, found = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(found) == session and state != "Z":
            yield int(path.parent.name)


def _result(check: Check, folder: Path, code: int | None, limit: float, seconds: float) -> Result:
    """Read what a check left; one that left no verdict has failed."""
    path = folder / "left.json"
    left = json.loads(path.read_text()) if path.is_file() else {}
    log = (folder / "log").read_text("utf-8", "replace").splitlines()
    how = f"did not end within {limit:.0f} s" if code is None else f"ended with status {code} and no verdict"
    status = left.get("status", FAILED)
    why = left.get("why", how)
    return Result(
        *(check.name, check.sentence, status, why, round(seconds, 1)),
        figures=left.get("figures", {}),
        computed_with=left.get("computed_with", {}),
        log=log[-40:] if status == FAILED else (),
    )


# ---- what is told ----


def summary(results: Sequence[Result]) -> str:
    """A line per check; the reason that all of them share is said once, above them."""
    reasons = {result.why for result in results}
    if len(results) < 2 or len(reasons) > 1 or "" in reasons:
        return "\n".join(map(line, results))
    return "\n".join([reasons.pop(), *(line(replace(result, why="")) for result in results)])


def line(result: Result) -> str:
    figures = ", ".join(
        f"{name} {_short(value)}" for name, value in result.figures.items() if not isinstance(value, list | dict)
    )
    more = "; ".join(filter(None, (result.why, figures)))
    return f"{result.status:8}{result.name:24}{result.sentence} ({result.seconds:.0f} s)" + (f": {more}" if more else "")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine() -> dict[str, Any]:
    """What the checks run on: cards, driver, processor and versions."""
    found, shown = accelerator.accelerator(), accelerator.inventory()
    return {
        "cards": [str(card) for card in found.cards],
        "not_used": found.why or found.left_out,
        "driver": shown.driver or None,
        "driver_cuda": ".".join(map(str, shown.cuda)) if shown.driver else None,
        **facts.of_process(dict.fromkeys((*ENGINE_PACKAGES, *TRAINER_PACKAGES, "liger-kernel", "kernels"))),
    }


def write(out: Path, results: Sequence[Result]) -> None:
    """Write the results file."""
    counts = {status: sum(result.status == status for result in results) for status in (PASSED, FAILED, SKIPPED)}
    made = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(), **counts}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**made, "checks": [asdict(result) for result in results]}, indent=1) + "\n")


def on_this_machine(checks: Sequence[Check], options: argparse.Namespace, program: Path) -> list[Result]:
    """Run them on one card, the roomiest; without any, say for each why it is skipped."""
    found = accelerator.accelerator()
    if not found.on_cards:
        return [Result(one.name, one.sentence, SKIPPED, f"no card: {found.why}") for one in checks]
    os.environ.update(CUDA_DEVICE_ORDER="PCI_BUS_ID", CUDA_VISIBLE_DEVICES=found.visible(1))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    scratch = options.out.parent / f".{options.out.stem}"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        return list(run_all(checks, program, scratch.resolve(), options.seconds, options.model))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main(words: Sequence[str], checks: Sequence[Check] = CHECKS, program: Path = HERE / "card_checks.py") -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check.json"), help="the results file")
    parser.add_argument(
        "--model", default="", help="a model folder whose speeds are compared; default: one with random weights"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all checks together; default: {SECONDS:.0f}")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in checks], help="these checks only")
    options = parser.parse_args(words)
    wanted = [one for one in checks if not options.only or one.name in options.only]
    results = on_this_machine(wanted, options, program)
    write(options.out, results)
    print("\n" + summary(results) + f"\n\nresults: {options.out}")
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
