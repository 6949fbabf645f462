"""What a command is to the command line, and the arguments that several commands share."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selfkd.cli import answers, commands


class Argument:
    """One argument of a command: its names, and what `ArgumentParser.add_argument` takes beside them."""

    def __init__(self, *names: str, **how: Any) -> None:
        self.names, self.how = names, how


class Command:
    """A command: its line in the list, the function that acts, and its arguments, which are that function's parameters."""

    def __init__(self, line: str, act: Callable[..., int], *arguments: Argument) -> None:
        self.line, self.act, self.arguments = line, act, arguments


def flag(name: str, text: str) -> Argument:
    return Argument(name, action="store_true", help=text)


def at_least_one(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return number


def from_zero(text: str) -> int:
    return 0 if text == "0" else at_least_one(text)


CHANGE = re.compile(r"[A-Za-z_][\w.-]*=")  # how an override begins
RECIPE = Argument("recipe", help="a recipe file, or the name of a shipped one (selfkd recipes)")
OVERRIDES = Argument(
    "overrides", nargs="*", default=[], metavar="key=value", help="change a field: rounds=5, sample.n=4, model=PATH"
)
SMALL = flag("--small", "change what the recipe's block `small` says: a small model, few prompts, minutes on a laptop")
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
JSON = Argument(answers.FLAG, dest="as_json", action="store_true", help="write one JSON document a line (docs/reading.md)")
