"""What a library raises reaches a person in words, whatever the error holds."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from toys import Odd

from selfkd.backend.ray.cluster import in_one_line
from selfkd.backend.reported import Reported, in_words, reported
from selfkd.errors import UsageError


def raised(*arguments: Any) -> Exception:
    with pytest.raises(ValueError) as caught:
        Odd(*arguments)
    return caught.value


def test_an_error_of_pydantic_that_does_not_pickle_arrives_as_what_is_wrong() -> None:
    error = raised(9, 2)
    with pytest.raises(TypeError, match="ArgsKwargs"):
        pickle.dumps(error)
    found = pickle.loads(pickle.dumps(reported(error)))
    assert in_one_line(found) == "ValidationError: 9 attention heads must be divisible by 2"


def test_each_thing_that_pydantic_finds_wrong_is_told() -> None:
    assert in_words(raised("x", "y")).count("; ") == 1


class Twice(Exception):
    """An exception that pickles and cannot be made again: it takes two arguments and keeps one."""

    def __init__(self, first: str, second: object) -> None:
        super().__init__(f"{first}\nand more")
        self.second = second


def test_an_error_that_cannot_be_made_again_arrives_in_one_line() -> None:
    found = pickle.loads(pickle.dumps(reported(Twice("out of memory", lambda: None))))
    assert in_one_line(found) == "Twice: out of memory"
    assert in_words(ValueError()) == "ValueError: no message"


def test_an_error_of_selfkd_stays_itself() -> None:
    error = UsageError("wrong", "here", "mend it")
    assert reported(error) is error
    known = Reported("ValueError: known")
    assert reported(known) is known


LOG = """\
(Worker pid=8) ERROR 11-27 22:57:43 [multiproc.py:9] Traceback (most recent call last):
(Worker pid=8) ERROR 11-27 22:57:43 [multiproc.py:9]     raise ValueError(
(Worker pid=8) ERROR 11-27 22:57:43 [multiproc.py:9] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.
(EngineCore pid=7) Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
"""


def test_where_an_error_says_only_that_the_cause_was_printed_the_cause_is_found_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "engine-0.log"
    log.write_text("KeyError: of an earlier start\n" + LOG)
    error = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
    found = reported(error, log, start=30)
    assert str(found) == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    log.write_text("nothing\n")
    assert str(reported(error, log)).startswith("RuntimeError: Engine core initialization failed")
    assert str(reported(error, tmp_path / "none")).startswith("RuntimeError: Engine core initialization failed")
    assert str(reported(ValueError("plain"), log)) == "ValueError: plain"
