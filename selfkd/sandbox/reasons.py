"""Why a program did not end well, in one line that is the same each time it ends so. Knows no test and no answer."""

from __future__ import annotations

import signal

from selfkd.sandbox.jail import Ended
from selfkd.sandbox.limits import MB, Limits

MAX_REASON_CHARS = 300


def reason(ended: Ended, limits: Limits, stderr: str = "") -> str:
    """Return why a program did not end well: the limit it hit, else its signal, else its exit status with its last words.

    The reason is '' where the program ended well.
    """
    if ended.limit:
        return limit_with_size(ended.limit, limits)
    if ended.status < 0:
        return f"ended by {signal_name(-ended.status)}"
    if ended.status == 0:
        return ""
    last = next((text for text in reversed(stderr.splitlines()) if text.strip()), "")
    return f"exit status {ended.status}" + (f": {one_line(last)}" if last else "")


def limit_with_size(limit: str, limits: Limits) -> str:
    """Return a limit's name with its size; a word that names no limit ("stopped") is returned as it is."""
    sizes = {
        "time": f"{limits.seconds:g} s",
        "cpu": f"{limits.cpu or limits.seconds:g} s of processor time",
        "memory": f"{limits.memory / MB:g} MB",
        "processes": f"{limits.processes} processes and threads",
        "output": f"{limits.output / MB:g} MB of output",
        "file_size": f"{limits.file_size / MB:g} MB in one file",
        "disk": f"{limits.disk / MB:g} MB of files",
    }
    return f"{limit.replace('_', ' ')} limit ({sizes[limit]})" if limit in sizes else limit


def one_line(text: str) -> str:
    """Return a program's text as one short line that is safe to print and to encode."""
    return "".join(sign if sign.isprintable() else " " for sign in text[:MAX_REASON_CHARS]).strip()


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
