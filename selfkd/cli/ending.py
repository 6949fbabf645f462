"""How a command begins and ends: streams that can be written to, and what a failure looks like.

An error of ours is printed as it is, any other as one line; with SELFKD_DEBUG=1 it is raised, for its trace.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

from selfkd.cli import answers, commands
from selfkd.core.wording import way_out_of
from selfkd.errors import SelfkdError


def ready_streams() -> None:
    """Make stdout and stderr safe to write to: there, though closed by a shell (`>&-`), and for text their encoding does not have."""
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def failed(error: Exception, as_json_of: str = "") -> int:
    """Say what went wrong, and return the exit code; where a command was to answer in JSON, in a document."""
    if os.environ.get("SELFKD_DEBUG") == "1":
        raise error
    notes = getattr(error, "__notes__", [])  # where the log is, if the error came out of a run
    if as_json_of:
        return answers.failed(as_json_of, error, notes, getattr(error, "code", 1) if isinstance(error, SelfkdError) else 1)
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
