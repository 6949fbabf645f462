"""Words that a shell completes: commands, their options, recipes and runs. The script is shtab's, made from the table of commands."""

from __future__ import annotations

from argparse import Action, ArgumentParser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selfkd.cli.arguments import Command

SHELLS = ("bash", "zsh", "fish")

# What a shell finds out when it is asked: runs come and go, and so do recipes beside the shipped ones.
PREAMBLE = {
    "bash": """\
_selfkd_runs() {
  local found
  for found in runs/*/; do
    [ -e "$found" ] && compgen -W "$(basename "$found")" -- "$1"
  done
  compgen -d -- "$1"
}
_selfkd_recipes() {
  compgen -W "@RECIPES@" -- "$1"
  compgen -f -X '!*.yaml' -- "$1"
  compgen -d -- "$1"
}
_selfkd_topics() {
  compgen -W "@TOPICS@" -- "$1"
}
""",
    "zsh": """\
_selfkd_runs() {
  local -a found=(runs/*(N/:t))
  compadd -a found
  _files -/
}
_selfkd_recipes() {
  compadd @RECIPES@
  _files -g '*.yaml'
}
_selfkd_topics() {
  compadd @TOPICS@
}
""",
    "fish": """\
function _selfkd_runs
  for found in runs/*/
    basename $found
  end
  __fish_complete_directories
end
function _selfkd_recipes
  printf '%s\\n' @RECIPES@
  __fish_complete_suffix .yaml
end
function _selfkd_topics
  printf '%s\\n' @TOPICS@
end
""",
}


def of(commands: Callable[[], Mapping[str, Command]]) -> Callable[[str], int]:
    """Return the command that completes these commands; the table it stands in is not there yet when it is made."""

    def completion(shell: str) -> int:
        """Print what makes a shell complete commands, options, recipes and runs.

        bash: eval "$(selfkd completion bash)" in ~/.bashrc; zsh: selfkd completion zsh > a file _selfkd on its fpath;
        fish: selfkd completion fish > ~/.config/fish/completions/selfkd.fish
        """
        print(script(shell, commands()))
        return 0

    return completion


def script(shell: str, commands: Mapping[str, Command]) -> str:
    """Return the script that completes these commands in a shell."""
    import shtab

    from selfkd.core.files import builtin_folder
    from selfkd.steps import VERBS

    shipped = sorted(path.stem for path in (builtin_folder() / "recipes").glob("*.yaml"))
    words = {"RECIPES": shipped, "TOPICS": [*commands, *VERBS, "recipe", "machine"]}
    preamble = PREAMBLE[shell]
    for name, found in words.items():
        preamble = preamble.replace(f"@{name}@", " ".join(found))
    return str(shtab.complete(_parser(commands), shell=shell, preamble=preamble))


def _parser(commands: Mapping[str, Command]) -> ArgumentParser:
    """Return one parser of all commands, for shtab to walk; what is typed is read by one parser a command."""
    parser = ArgumentParser("selfkd")
    below = parser.add_subparsers()
    for name, command in commands.items():
        one = below.add_parser(name, help=command.line, description=command.line, allow_abbrev=False)
        for argument in command.arguments:
            action = one.add_argument(*argument.names, **argument.how)
            if found := _completes(action):
                action.complete = found  # type: ignore[attr-defined]
    return parser


def _completes(action: Action) -> Mapping[str, Any] | None:
    """Return what completes an argument, by shell: the functions of PREAMBLE, or files; None where nothing is known of it."""
    import shtab

    if action.metavar == "RUN":
        return _asked("runs")
    if action.dest in ("recipe", "words") or (action.dest == "name" and not action.option_strings):
        return _asked("recipes")
    if action.dest == "topic":
        return _asked("topics")
    return shtab.FILE if action.type is Path else None


def _asked(what: str) -> dict[str, str]:
    return {"bash": f"_selfkd_{what}", "zsh": f"_selfkd_{what}", "fish": f"(_selfkd_{what})"}
