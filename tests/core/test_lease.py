"""Who holds a run: another process, not one that never got to hold it."""

from __future__ import annotations

import pytest

from selfkd.core import storage
from selfkd.core.lease import Lease, holder
from selfkd.core.storage import put_json
from selfkd.errors import Stopped


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


def test_a_driver_whose_lease_was_taken_over_stops_so_that_a_scheduler_may_ask_again(tmp_path):
    with Lease(tmp_path / "leases", tmp_path / "tmp") as lease:
        lease.confirm()
        put_json(
            tmp_path / "leases/000002.json", {"host": "elsewhere"}, tmp_path / "tmp"
        )  # its heartbeat seemed to stand still
        with pytest.raises(Stopped, match="another driver took this run over") as error:
            lease.confirm()
    assert error.value.code == 75


def test_a_draft_that_the_holder_swept_away_with_tmp_is_no_crash_but_another_look(tmp_path, monkeypatch):
    swept: list[str] = []

    def sweep(moment, action, path):
        if (moment, action) == ("before", "link") and not swept:
            swept.append(path.name)
            for draft in (tmp_path / "tmp").iterdir():
                draft.unlink()

    monkeypatch.setattr(storage, "hook", sweep)
    with Lease(tmp_path / "leases", tmp_path / "tmp"):
        assert swept == ["000001.json"] and holder(tmp_path / "leases") != ""
