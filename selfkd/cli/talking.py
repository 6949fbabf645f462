"""The command `chat`. A docstring here is the text of `selfkd help COMMAND`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfkd.chain.paths import find_run
from selfkd.cli import answers, commands
from selfkd.core.wording import counted
from selfkd.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from selfkd.chain.talk import Answer, Messages, Talk

ANEW = "/new"
LEAST_WIDTH = 38  # characters of a column; with less each, answers stand one below the other


def chat(
    run: Path,
    rounds: str,
    prompt: str | None,
    system: str | None,
    temperature: float,
    max_tokens: int,
    seed: int,
    on: Path | None,
    as_json: bool = False,
) -> int:
    """Ask checkpoints of a run the same question with the same seed, side by side; each goes on from its own answers."""
    from selfkd.backend.base import Sampling
    from selfkd.backend.machine import read_machine
    from selfkd.chain.run import Run
    from selfkd.chain.talk import talking
    from selfkd.report.tables import console

    names = list(dict.fromkeys(name.strip() for name in rounds.split(",") if name.strip()))
    if not names:
        raise UsageError("names no checkpoint", "--rounds", "Such as --rounds base,3")
    opened, to = Run.at(find_run(run, commands.RUNS)), console()
    with talking(opened, names, read_machine(on) if on else None) as talk:
        for line in _alike(talk) if not as_json else ():
            to.print(line, style="yellow", markup=False)
        said: dict[str, Messages] = {}
        for text in [prompt] if prompt is not None else _typed(names, as_json):
            if text == ANEW or not said:
                said = {name: [{"role": "system", "content": system}] if system else [] for name in names}
            if text != ANEW:
                _turn(talk, said, text, Sampling(temperature=temperature, max_tokens=max_tokens), seed, None if as_json else to)
    return 0


def _alike(talk: Talk) -> Iterator[str]:
    """Yield which of the checkpoints are the same one: a round that was rolled back left the weights of the round before."""
    seen: dict[str, str] = {}
    for name, model in talk.models.items():
        if model.digest in seen:
            yield f"{name} and {seen[model.digest]} are the same weights ({model})."
        seen.setdefault(model.digest, name)


def _typed(names: Sequence[str], quiet: bool) -> Iterator[str]:
    """Yield what is typed, or what stands in a pipe line by line, until it ends."""
    asks = sys.stdin.isatty() and not quiet
    if asks:
        print(f"Asking {', '.join(names)}. {ANEW} forgets what was said; Ctrl-D ends.")
    while True:
        if asks:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _turn(talk: Talk, said: dict[str, Messages], text: str, sampling: Any, seed: int, to: Console | None) -> None:
    """Ask, show what is answered, and keep it as a part of each model's own conversation."""
    from selfkd.report.bar import waiting

    for messages in said.values():
        messages.append({"role": "user", "content": text})
    with waiting("asking", to) if to else nullcontext():
        found = list(talk.ask(said, sampling, seed))
    for answer in found:
        said[answer.name].append({"role": "assistant", "content": answer.text})
    if to:
        _show(found, to)
    else:
        answers.told("chat", {"prompt": text, "seed": seed, "answers": found})


def _show(found: Sequence[Answer], to: Console) -> None:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    panels = [
        Panel(
            Text(one.text),
            title=Text(f"{one.name} · {one.model}"),
            title_align="left",
            subtitle=Text(_ended(one)),
            border_style="dim",
        )
        for one in found
    ]
    if to.width < LEAST_WIDTH * len(panels):
        for panel in panels:
            to.print(panel)
        return
    table = Table.grid(expand=True)
    for _ in panels:
        table.add_column(ratio=1)
    table.add_row(*panels)
    to.print(table)


def _ended(one: Answer) -> str:
    return f"{counted(one.tokens, 'token')}{', cut at the limit' if one.finish_reason == 'length' else ''}"
