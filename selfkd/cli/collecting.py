"""What `selfkd gc` does, from its arguments to an exit code. A docstring here is the text of `selfkd help gc`."""

from __future__ import annotations

from pathlib import Path

from selfkd.chain.paths import find_run
from selfkd.cli import answers
from selfkd.cli.commands import RUNS, command_line
from selfkd.core.wording import counted


def collect(run: Path, delete: bool, as_json: bool = False) -> int:
    """List what lies in a run folder and counts for nothing: leftovers of crashes, which no record names. --delete takes it away.

    Checkpoints are the business of `keep` in the recipe, and logs stay.
    """
    from selfkd.chain.garbage import collect as take_away
    from selfkd.chain.garbage import garbage
    from selfkd.chain.run import Run

    opened = Run.at(find_run(run, RUNS))
    found = take_away(opened) if delete else garbage(opened)
    if as_json:
        leftovers = [{"path": opened.paths.relative(one.path), "bytes": one.bytes, "what": one.what} for one in found]
        return answers.told("gc", {"leftovers": leftovers, "deleted": delete})
    for one in found:
        print(f"{one.bytes / 1e6:>9.2f} MB  {opened.paths.shown(one.path)}   {one.what}")
    total = f"{sum(one.bytes for one in found) / 1e6:.2f} MB in {counted(len(found), 'leftover')}"
    if not found:
        print("Nothing here that no record names.")
    elif delete:
        print(f"Taken away: {total}.")
    else:
        print(f"{total}. Take it away: {command_line('gc', str(opened.folder), '--delete')}")
    return 0
