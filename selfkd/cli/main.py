"""The command line: what can be typed, which function it calls, and what a failure looks like.

Only the function that is called imports more, so that `lint` and `help` start at once and readers never load an engine.
Exit codes: 0 done · 1 failed · 2 recipe or usage · 75 stopped and resumable (schedulers requeue on it).
"""

from __future__ import annotations

import ast
import gc
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import selfkd
from selfkd.cli import answers, commands, completion
from selfkd.cli.arguments import CHANGE, Argument, Command
from selfkd.cli.ending import failed, ready_streams
from selfkd.cli.table import TABLE
from selfkd.core.wording import did_you_mean
from selfkd.errors import STOPPED, Stopped, UsageError

COLLECT_AFTER = 50_000  # objects; what a command imports lives on, and Python's 700 looks through it again and again

# ----------------------------------------------------------------------------------------------------- help and its topics


def overview() -> str:
    """Return the list of commands, of verbs and of exit codes."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.line}" for name, command in COMMANDS.items()]
    return (
        "selfkd runs self-distillation chains: sample, score, select, train, measure, round after round.\n\n"
        "Commands:\n" + "\n".join(lines) + "\n\n"
        f"selfkd help COMMAND | recipe | machine, or a verb: {', '.join(_verbs())}\n"
        "Exit codes: 0 done · 1 failed · 2 recipe or usage · 75 stopped, the same command goes on"
    )


def _verbs() -> list[str]:
    """Return the names in `steps.VERBS`, read from its source: importing it would load pydantic and Polars."""
    spec = find_spec("selfkd.steps")
    assert spec and spec.origin
    for node in ast.parse(Path(spec.origin).read_text("utf-8")).body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "VERBS" and isinstance(node.value, ast.Dict):
            return [str(verb.value) for verb in node.value.keys if isinstance(verb, ast.Constant)]
    raise AssertionError("selfkd.steps has no table VERBS")


def explain(topic: str | None) -> int:
    """Explain a command, a verb, the recipe or the machine file."""
    if topic is None:
        print(overview())
    elif topic in COMMANDS:
        print(_parser(topic).format_help(), end="")
    else:
        print(_topic(topic))
    return 0


def _topic(topic: str) -> str:
    from selfkd.backend import machine
    from selfkd.recipe import reference
    from selfkd.steps import VERBS

    if topic == "recipe":
        return reference.text().removeprefix(reference.GENERATED).rstrip()
    if topic == "machine":
        return machine.explain()
    if topic in VERBS:
        return reference.verb_help(topic)
    fix = f"Verbs: {', '.join(VERBS)}; or a command, recipe, machine."
    raise UsageError(f"no topic '{topic}'.{did_you_mean(topic, [*VERBS, *COMMANDS])}", "", fix)


# ------------------------------------------------------------------------------------------------------------ the commands


COMMANDS: dict[str, Command] = {
    **TABLE,
    "completion": Command(
        "print a script that completes words in a shell",
        completion.of(lambda: COMMANDS),
        Argument("shell", choices=completion.SHELLS, help="eval the output, or keep it where the shell looks for it"),
    ),
    "help": Command(
        "explain a command or a verb",
        explain,
        Argument("topic", nargs="?", help="a command, a verb of recipes, `recipe` or `machine`"),
    ),
}


# -------------------------------------------------------------------------------------------------------------------- main


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An error of ours is printed as it is, any other as one line; with SELFKD_DEBUG=1 it is raised, for its trace.
    """
    ready_streams()
    gc.set_threshold(COLLECT_AFTER)
    code = _code_of(sys.argv[1:] if words is None else words)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        commands.drop_output()  # the reader left; the flush at exit must not complain
    except OSError as error:  # what was to be read is lost, which is no success
        commands.drop_output()
        return code or failed(error)
    return code


def _code_of(words: Sequence[str]) -> int:
    quietly = answers.alone() if answers.FLAG in words else nullcontext()
    try:
        with quietly:
            return _act(words)
    except BrokenPipeError:
        return 0
    except Stopped as error:
        why = "" if error.what == STOPPED else f" {error.what[0].upper()}{error.what[1:]}."
        commands.say(f"Stopped.{why} Repeat the command to go on: {commands.command_line(*words)}")
        return Stopped.code
    except KeyboardInterrupt:
        commands.say("Stopped.")
        return 0 if "--follow" in words else Stopped.code
    except Exception as error:
        return failed(error, next(iter(words)) if answers.FLAG in words else "")


def _act(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"selfkd {selfkd.__version__}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise UsageError(f"no command '{name}'.{did_you_mean(name, COMMANDS)}", "", f"Commands: {', '.join(COMMANDS)}")
    if name == "resume" and (changes := [word for word in rest if CHANGE.match(word)]):
        fix = f"Change it: selfkd run RECIPE {' '.join(changes)}, with the --name that the run was started with."
        raise UsageError(f"resume keeps the run's own recipe and takes no {changes[0]}", f"selfkd {name}", fix)
    try:
        given = _parser(name).parse_intermixed_args(rest)
    except SystemExit:  # argparse has printed the help that `--help` asked for
        return 0
    return COMMANDS[name].act(**vars(given))


class _Parser(ArgumentParser):
    """An ArgumentParser that raises what is wrong with the arguments instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.prog, f"See {self.prog} --help")


def _parser(name: str) -> ArgumentParser:
    parser = _Parser(f"selfkd {name}", description=COMMANDS[name].act.__doc__, allow_abbrev=False)
    for argument in COMMANDS[name].arguments:
        parser.add_argument(*argument.names, **argument.how)
    return parser


__all__ = ["COMMANDS", "main", "overview"]
