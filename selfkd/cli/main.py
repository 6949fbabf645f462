"""The command line: what can be typed, which function it calls, and what a failure looks like.

Only the function that is called imports more, so that `lint` and `help` start at once and readers never load an engine.
Exit codes: 0 done · 1 failed · 2 recipe or usage · 75 stopped and resumable (schedulers requeue on it).
"""

from __future__ import annotations

import ast
import gc
import io
import os
import re
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import selfkd
from selfkd.cli import commands, exporting, starting, sweeping
from selfkd.core.wording import did_you_mean, way_out_of
from selfkd.errors import STOPPED, SelfkdError, Stopped, UsageError

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


class Argument:
    """One argument of a command: its names, and what `ArgumentParser.add_argument` takes beside them."""

    def __init__(self, *names: str, **how: Any) -> None:
        self.names, self.how = names, how


class Command:
    """A command: its line in the list, the function that acts, and its arguments, which are that function's parameters."""

    def __init__(self, line: str, act: Callable[..., int], *arguments: Argument) -> None:
        self.line, self.act, self.arguments = line, act, arguments


def _flag(name: str, text: str) -> Argument:
    return Argument(name, action="store_true", help=text)


def _at_least_one(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return number


CHANGE = re.compile(r"[A-Za-z_][\w.-]*=")  # how an override begins
RECIPE = Argument("recipe", help="a recipe file, or the name of a shipped one (selfkd recipes)")
OVERRIDES = Argument(
    "overrides", nargs="*", default=[], metavar="key=value", help="change a field: rounds=5, sample.n=4, model=PATH"
)
SMALL = _flag("--small", "change what the recipe's block `small` says: a small model, few prompts, minutes on a laptop")
RUN = Argument("run", type=Path, metavar="RUN", help="a run: its folder, or its name under runs/")
RUNS = Argument("--runs", type=Path, default=commands.RUNS, metavar="DIR", help="folder of runs; default: runs")
ON = Argument(
    "--on",
    type=Path,
    metavar="MACHINE",
    help="machine settings, a YAML file or the name of a shipped one (selfkd help machine)",
)
CONTROL = Argument(
    "--control",
    metavar="NAME",
    help="run the recipe's control instead: random-reward, gold-sft, one-round, wrong-context or best-decoding",
)
STEPS_OF = Argument(
    "--steps-of",
    type=Path,
    metavar="RUN",
    help="with --control gold-sft or one-round: a finished run of the method, whose updates say how many steps there are",
)

LOG = Argument(
    "--log",
    action="append",
    default=[],
    metavar="TRACKER",
    help="tell rounds to trackio, wandb, tensorboard or mlflow, NAME:PROJECT; default: SELFKD_LOG",
)
NOTIFY = Argument(
    "--notify",
    action="append",
    default=[],
    metavar="URL|COMMAND",
    help="send each round, alarm and stop as JSON to an address, or to a command's stdin; default: SELFKD_NOTIFY",
)

COMMANDS = {
    "init": Command(
        "make a first recipe for a file of questions",
        starting.init,
        Argument("data", type=Path, metavar="DATA", help="rows: .jsonl, .json, .csv or .parquet"),
        Argument(
            "folder", type=Path, nargs="?", metavar="FOLDER", help="where the recipe is to lie; default: the name of the file"
        ),
        Argument("--prompt", metavar="COLUMN", help="which column is the question, where its name does not tell"),
        Argument("--answer", metavar="COLUMN", help="which column is the gold answer"),
        Argument(
            "--kind",
            choices=("number", "choice", "code", "short", "text"),
            help="of what kind the answers are; default: what most of them look like",
        ),
        Argument(
            "--model", metavar="MODEL", help="a hub id, a folder or a GGUF file; default: one that this machine can train"
        ),
    ),
    "run": Command(
        "start a run, or go on with it",
        commands.run,
        RECIPE,
        OVERRIDES,
        Argument("--name", help="name of the run and of its folder; default: the recipe's name"),
        ON,
        SMALL,
        _flag("--plan", "print estimated rows, tokens, memory, disk and hours; start nothing"),
        _flag("--amend", "go on with a changed recipe where the change touches only steps not made yet"),
        CONTROL,
        STEPS_OF,
        LOG,
        NOTIFY,
        RUNS,
    ),
    "sweep": Command(
        "run methods and their controls, each as often",
        sweeping.sweep,
        Argument(
            "words",
            nargs="+",
            metavar="FILE | RECIPE … key=value",
            help="a sweep file (docs/sweeps.md); or recipes, and fields: of a field with commas each value is tried",
        ),
        Argument("--seeds", type=_at_least_one, default=3, metavar="N", help="seeds of each trial, from 0; default: 3"),
        Argument(
            "--controls",
            default="",
            metavar="NAMES",
            help="controls of every recipe that has something for them: random-reward,gold-sft",
        ),
        Argument("--budget", metavar="tokens=2M,hours=10", help="what all trials together may take"),
        Argument("--metric", metavar="dev/SCORE", help="what chooses; default: that of `best` in the first recipe"),
        Argument("--name", help="name of the sweep and of its folder; default: that of the file, or sweep"),
        ON,
        _flag("--plan", "list the trials; start nothing"),
        RUNS,
    ),
    "resume": Command("go on with a run as it was frozen", commands.resume, RUN, ON, LOG, NOTIFY),
    "status": Command(
        "show rounds, state and progress of runs",
        commands.status,
        Argument(
            "run",
            type=Path,
            nargs="?",
            metavar="RUN",
            help="a run: its folder, or its name under --runs; without it, all runs are listed",
        ),
        _flag("--follow", "keep showing the run until its driver ends"),
        RUNS,
    ),
    "show": Command(
        "read samples or training rows of a round",
        commands.show,
        RUN,
        Argument("--round", dest="index", type=int, metavar="K", help="which round; default: the newest that holds such rows"),
        Argument("--step", metavar="NAME", help="only what this step made; `measure` shows the held-out answers"),
        Argument("--where", metavar="EXPR", help='a SQL expression: "correct = 0 AND tokens > 100" or "NOT kept"'),
        Argument("-n", type=_at_least_one, default=5, metavar="N", help="rows to show; default: 5"),
        _flag("--training-rows", "show what the model was trained on instead of samples"),
        _flag("--as-prompted", "show exactly what the model saw: its chat template applied, control tokens written out"),
        _flag("--ids", "with --as-prompted: the token ids too"),
    ),
    "compare": Command(
        "set runs side by side on one metric",
        sweeping.compare,
        Argument(
            "runs",
            type=Path,
            nargs="+",
            metavar="RUN",
            help="two runs or more: folders, or names under runs/; the first is what others are compared with. Or one sweep: its folder, its sweep file, which shows arms that have not run too, or a file of its results (JSONL)",
        ),
        Argument(
            "--metric",
            metavar="SPLIT/SCORE",
            help="such as dev/correct; default: the first that all runs measured, test before dev",
        ),
        Argument(
            "--round",
            dest="which",
            default="last",
            metavar="K",
            help="last: the newest accepted round (default); best: by this metric; or a number",
        ),
        *(
            Argument(
                f"--{form}",
                dest="form",
                action="store_const",
                const=form,
                default="text",
                help=f"write {text}",
            )
            for form, text in {
                "csv": "CSV",
                "latex": "LaTeX",
                "markdown": "Markdown",
                "json": "JSON",
                "jsonl": "the results of a sweep, one a line",
            }.items()
        ),
    ),
    "verify": Command(
        "prove that a run is as it was committed",
        commands.verify,
        RUN,
        _flag("--quick", "check records, links and sizes only; read no data"),
    ),
    "export": Command(
        "write a model or the rows of a run for others",
        exporting.export,
        RUN,
        Argument("folder", type=Path, nargs="?", metavar="FOLDER", help="where the model is to lie: a new or an empty folder"),
        Argument("--model", metavar="ROLE@WHEN", help="which model: policy@best, policy@base, policy@round-2"),
        Argument("--round", dest="index", type=int, metavar="K", help="the policy of this round; of a table: only its rows"),
        Argument(
            "--dtype", choices=("bf16", "fp32"), help="format of the weights; default: the one in which they were measured"
        ),
        _flag("--merge", "make full weights of an adapter and what lies beneath it"),
        Argument("--samples", type=Path, metavar="FILE", help="write the samples with their scores: .parquet or .jsonl"),
        Argument("--rows", type=Path, metavar="FILE", help="write the training rows as TRL reads them: .parquet or .jsonl"),
        Argument("--where", metavar="EXPR", help="only rows of the table for which a SQL expression holds"),
    ),
    "track": Command(
        "tell the rounds of a run to a tracker",
        commands.track,
        RUN,
        Argument(
            "--to",
            action="append",
            required=True,
            metavar="TRACKER",
            help="trackio, wandb, tensorboard or mlflow, NAME:PROJECT",
        ),
    ),
    "lint": Command(
        "check a recipe without a model",
        commands.lint,
        RECIPE,
        OVERRIDES,
        SMALL,
        _flag("--dry-run", "also walk two rounds on a fake model, in a temporary folder"),
        ON,
        CONTROL,
        STEPS_OF,
    ),
    "try": Command(
        "run a reward on a few rows",
        commands.try_reward,
        Argument("function", metavar="FILE.py:FN", help="a reward function"),
        Argument(
            "data", type=Path, metavar="DATA", help="a file of rows: completion; prompt, answer and what the function asks"
        ),
        Argument("-n", type=_at_least_one, default=5, metavar="N", help="rows to score and show; default: 5"),
        Argument("--out", type=Path, metavar="FILE", help="score every row on all cores; write line, value, why as JSONL"),
        ON,
    ),
    "recipes": Command("list recipes", commands.recipes),
    "cp": Command(
        "copy a recipe with its files",
        commands.cp,
        Argument("name", metavar="NAME", help="a recipe (selfkd recipes)"),
        Argument("folder", type=Path, metavar="DIR", help="where to"),
    ),
    "doctor": Command("check this machine", commands.doctor, RUNS),
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
    _ready_streams()
    gc.set_threshold(COLLECT_AFTER)
    code = _code_of(sys.argv[1:] if words is None else words)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        commands.drop_output()  # the reader left; the flush at exit must not complain
    except OSError as error:  # what was to be read is lost, which is no success
        commands.drop_output()
        return code or _failed(error)
    return code


def _code_of(words: Sequence[str]) -> int:
    try:
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
        return _failed(error)


def _ready_streams() -> None:
    """Make stdout and stderr safe to write to: there, though closed by a shell (`>&-`), and for text their encoding does not have."""
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


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


def _failed(error: Exception) -> int:
    if os.environ.get("SELFKD_DEBUG") == "1":
        raise error
    notes = getattr(error, "__notes__", [])  # where the log is, if the error came out of a run
    if isinstance(error, SelfkdError):
        lines, code = [str(error), *notes], error.code
    else:
        lines, code = [_first_line(error), *(notes or [way_out_of(error)])], 1
    commands.say("\n".join(lines))
    return code


def _first_line(error: Exception) -> str:
    """Return an error of somebody else in one line: of a file, the place and then what is wrong there."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}  {error.strerror} ({type(error).__name__})"
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


__all__ = ["COMMANDS", "main", "overview"]
