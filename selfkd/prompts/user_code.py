"""A user's function of rows (`function:`, `map:`), run in this process: whatever it raises is an error with a place."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from selfkd.core.files import reference_parts
from selfkd.errors import UsageError
from selfkd.rewards.find import find_function
from selfkd.rewards.load import load

Returned = TypeVar("Returned")


def load_function(reference: str, folders: Sequence[Path]) -> Callable[..., Any]:
    """Return the function behind `file.py:name`; the file is run."""
    function = find_function(reference, folders)
    return run_user_code(reference, lambda: load(function.path, function.name).call)


def run_user_code(reference: str, work: Callable[[], Returned]) -> Returned:
    """Return what `work` returns; whatever it raises is a UsageError that names the line in the user's own file."""
    try:
        return work()
    except UsageError:
        raise
    except Exception as error:
        file = Path(reference_parts(reference)[0]).name
        frames = reversed(traceback.extract_tb(error.__traceback__))
        places = (f"{frame.filename}:{frame.lineno}" for frame in frames if Path(frame.filename).name == file)
        raise UsageError(f"{type(error).__name__}: {error}", next(places, reference)) from error
