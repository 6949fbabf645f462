"""Who holds a run: another process, not one that never got to hold it."""

from __future__ import annotations

import pytest

from selfkd.core import storage
from selfkd.core.lease import Lease, holder


def test_a_holder_is_named_while_it_holds_and_not_afterwards(tmp_path):
    with Lease(tmp_path / "leases", tmp_path / "tmp"):
        assert holder(tmp_path / "leases").startswith("process ")
    assert holder(tmp_path / "leases") == ""


def test_a_lease_that_was_interrupted_while_it_was_taken_is_nobodys(tmp_path, monkeypatch):
    def interrupt(moment, action, path):
        if (moment, action) == ("after", "link"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "hook", interrupt)
        Lease(tmp_path / "leases", tmp_path / "tmp").__enter__()
    assert holder(tmp_path / "leases") == ""
    with Lease(tmp_path / "leases", tmp_path / "tmp"):
        assert holder(tmp_path / "leases") != ""


def test_a_second_interrupt_while_a_lease_is_let_go_leaves_nobody_holding_it(tmp_path):
    lease = Lease(tmp_path / "leases", tmp_path / "tmp")
    lease.__enter__()
    join = lease._beat.join
    lease._beat.join = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        lease.__exit__()
    join()
    assert holder(tmp_path / "leases") == ""
