"""The commands. Each imports only what it needs, so that `lint` and `help` start at once and readers never load an engine.

Exit codes: 0 done · 1 failed · 2 recipe or usage · 75 stopped and resumable (schedulers requeue on it).
"""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from selfkd.cli import commands
from selfkd.core.wording import did_you_mean
from selfkd.errors import SelfkdError, Stopped, UsageError


@dataclass(frozen=True)
class Command:
    """One command: its line in the list, what it says at length, its arguments, and what it does."""

    line: str
    text: str
    arguments: Callable[[ArgumentParser], None]
    act: Callable[[Namespace], int]


# ------------------------------------------------------------------------------------------------------------ arguments


def _run_arguments(to: ArgumentParser) -> None:
    to.add_argument("recipe", help="a recipe file, or the name of a shipped one (selfkd recipes)")
    to.add_argument("overrides", nargs="*", metavar="key=value", help="change a field: rounds=5, sample.n=4, model=PATH")
    to.add_argument("--name", help="name of the run and of its folder; default: the recipe's name")
    to.add_argument("--on", metavar="MACHINE", type=Path, help="machine settings, a YAML file (selfkd help machine)")
    to.add_argument("--plan", action="store_true", help="print estimated rows, tokens, memory, disk and hours; start nothing")
    to.add_argument(
        "--amend", action="store_true", help="go on with a changed recipe where the change touches only steps not made yet"
    )
    to.add_argument("--runs", type=Path, default=commands.RUNS, metavar="DIR", help="folder of runs; default: runs")


def _resume_arguments(to: ArgumentParser) -> None:
    to.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    to.add_argument(
        "--on", metavar="MACHINE", type=Path, help="machine settings; what fixes numbers stays as the run was created"
    )


def _status_arguments(to: ArgumentParser) -> None:
    to.add_argument("run", type=Path, nargs="?", metavar="RUN", help="folder of a run; without it, all runs are listed")
    to.add_argument("--follow", action="store_true", help="keep showing the run until its driver ends")
    to.add_argument("--runs", type=Path, default=commands.RUNS, metavar="DIR", help="folder of runs; default: runs")


def _show_arguments(to: ArgumentParser) -> None:
    to.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    to.add_argument("--round", type=int, metavar="K", help="which round; default: the newest that holds such rows")
    to.add_argument("--step", metavar="NAME", help="only what this step made; `measure` shows the held-out answers")
    to.add_argument("--where", metavar="EXPR", help='a SQL expression, such as "correct = 0 AND tokens > 100" or "NOT kept"')
    to.add_argument("-n", type=int, default=5, metavar="N", help="rows to show; default: 5")
    to.add_argument("--training-rows", action="store_true", help="show what the model was trained on instead of samples")


def _verify_arguments(to: ArgumentParser) -> None:
    to.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    to.add_argument("--quick", action="store_true", help="check records, links and sizes only; read no data")


def _lint_arguments(to: ArgumentParser) -> None:
    to.add_argument("recipe", help="a recipe file, or the name of a shipped one")
    to.add_argument("overrides", nargs="*", metavar="key=value", help="as for run")
    to.add_argument("--dry-run", action="store_true", help="also walk two rounds on a fake model, in a temporary folder")


def _try_arguments(to: ArgumentParser) -> None:
    to.add_argument("function", metavar="FILE.py:FN", help="a reward function")
    to.add_argument(
        "data", type=Path, metavar="DATA", help="JSONL: completion, and prompt, answer and other columns as the function asks"
    )
    to.add_argument("-n", type=int, default=5, metavar="N", help="rows to score and show; default: 5")
    to.add_argument(
        "--out", type=Path, metavar="FILE", help="score every row, on all cores, and write line, value and why as JSONL"
    )


def _cp_arguments(to: ArgumentParser) -> None:
    to.add_argument("name", metavar="NAME", help="a recipe (selfkd recipes)")
    to.add_argument("folder", type=Path, metavar="DIR", help="where to")


def _doctor_arguments(to: ArgumentParser) -> None:
    to.add_argument("--runs", type=Path, default=commands.RUNS, metavar="DIR", help="folder of runs; default: runs")


def _help_arguments(to: ArgumentParser) -> None:
    to.add_argument("topic", nargs="?", help="a command, a verb of recipes, `recipe` or `machine`")


def _no_arguments(to: ArgumentParser) -> None:
    pass


# ------------------------------------------------------------------------------------------------------------------ help


def _help(given: Namespace) -> int:
    if given.topic is None:
        print(overview())
    elif given.topic in COMMANDS:
        print(_parser(given.topic).format_help(), end="")
    else:
        print(_topic(given.topic))
    return 0


def _topic(topic: str) -> str:
    from selfkd.backend.machine import explain
    from selfkd.recipe import reference
    from selfkd.steps import VERBS

    if topic == "recipe":
        return reference.text().rstrip()
    if topic == "machine":
        return explain()
    if topic in VERBS:
        return reference.verb_help(topic)
    raise UsageError(
        f"no topic '{topic}'.{did_you_mean(topic, [*VERBS, *COMMANDS])}",
        "",
        f"Verbs: {', '.join(VERBS)}; or a command, recipe, machine.",
    )


def overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    return (
        "selfkd runs self-distillation chains: sample, score, select, train, measure, round after round.\n\n"
        "Commands:\n" + "\n".join(lines) + "\n\n"
        "selfkd help COMMAND | recipe | machine, or a verb: recall, gold, sample, score, select, build, train, measure\n"
        "Exit codes: 0 done · 1 failed · 2 recipe or usage · 75 stopped, the same command goes on"
    )


COMMANDS = {
    "run": Command(
        "start a run, or go on with it",
        "Starts a run, or goes on where it stopped: safe to repeat, safe to requeue.",
        _run_arguments,
        commands.run,
    ),
    "resume": Command(
        "go on with a run as it was frozen",
        "Goes on with the recipe and the code that the run keeps inside.",
        _resume_arguments,
        commands.resume,
    ),
    "status": Command(
        "rounds, state and progress of runs",
        "Reads run folders; also while a driver writes.",
        _status_arguments,
        commands.status,
    ),
    "show": Command(
        "read samples or training rows of a round",
        "Shows rows: what was asked, answered, scored, kept.",
        _show_arguments,
        commands.show,
    ),
    "verify": Command(
        "prove that a run is as it was committed",
        "Checks the chain and re-hashes every file that counts.",
        _verify_arguments,
        commands.verify,
    ),
    "lint": Command(
        "check a recipe without a model", "Checks a recipe, its rewards and its prompts.", _lint_arguments, commands.lint
    ),
    "try": Command(
        "run a reward on a few rows",
        "Scores the first rows of a file with a reward function.",
        _try_arguments,
        commands.try_reward,
    ),
    "recipes": Command("list recipes", "Lists the shipped recipes and those under recipes/.", _no_arguments, commands.recipes),
    "cp": Command(
        "copy a recipe with its files", "Copies a recipe and the rewards and templates it names.", _cp_arguments, commands.cp
    ),
    "doctor": Command(
        "check this machine", "Versions, cores, memory, disk, run folder, GPU, imports.", _doctor_arguments, commands.doctor
    ),
    "help": Command(
        "explain a command or a verb", "Explains a command, a verb, the recipe or the machine file.", _help_arguments, _help
    ),
}


# ------------------------------------------------------------------------------------------------------------------ main


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors of ours are printed as they are, others as one line; SELFKD_DEBUG=1 shows traces."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _command(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went; the flush at exit must not complain
        return 0
    except Stopped:
        print(f"Stopped. Repeat the command to go on: {commands.say(*words)}", file=sys.stderr)
        return Stopped.code
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 0 if "--follow" in words else Stopped.code
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    if os.environ.get("SELFKD_DEBUG") == "1":
        raise error
    ours = isinstance(error, SelfkdError)
    notes = getattr(error, "__notes__", [])  # where the log is, if the error came out of a run
    lines = [str(error) if ours else f"{type(error).__name__}: {error}".split("\n", 1)[0], *notes]
    lines += [] if ours or notes else ["SELFKD_DEBUG=1 shows where this comes from."]
    print("\n".join(lines), file=sys.stderr)
    return error.code if isinstance(error, SelfkdError) else 1


def _command(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        import selfkd

        print(f"selfkd {selfkd.__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UsageError(
            f"no command '{words[0]}'.{did_you_mean(words[0], list(COMMANDS))}", "", f"Commands: {', '.join(COMMANDS)}"
        )
    try:
        given = _parser(words[0]).parse_intermixed_args(list(words[1:]))
    except SystemExit as left:  # argparse has printed its help (0) or what is wrong (2)
        return int(left.code or 0)
    return COMMANDS[words[0]].act(given)


def _parser(name: str) -> ArgumentParser:
    command = COMMANDS[name]
    parser = argparse.ArgumentParser(f"selfkd {name}", description=command.text, allow_abbrev=False)
    command.arguments(parser)
    return parser


__all__ = ["COMMANDS", "main", "overview"]
