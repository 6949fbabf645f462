"""What happens to a target is seen from outside, and by the attack after which it happened."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from selfkd.sandbox.targets import PROBE_VARIABLE, targets


def test_a_target_that_is_hit_is_seen_once() -> None:
    with targets() as (aims, evidence):
        assert evidence() == ""
        with socket.create_connection(("127.0.0.1", int(aims["tcp"]))):
            Path(str(aims["changed"])).chmod(0o666)
            assert evidence() == "a socket outside was reached"
        assert evidence() == "", "the changed file must not be counted against the next attack"
        Path(str(aims["removed"])).unlink()
        assert evidence() == "files outside changed"


def test_nothing_of_the_targets_is_left() -> None:
    with targets() as (aims, _):
        assert os.environ[PROBE_VARIABLE] == aims["marker"]
    assert PROBE_VARIABLE not in os.environ
    assert not Path(str(aims["folder"])).exists() and not Path(str(aims["shown"])).exists()
