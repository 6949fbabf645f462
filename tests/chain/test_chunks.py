"""Into chunks of what size answers are cut: canonical where a run is exact, else once for each step, whatever machine goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Killed, end, go, recipe_in
from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import chunks
from selfkd.chain.chunks import FEWEST, loose_size
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.report.verify import verify

LOOSE = "exact=false"


class Listening(Fake):
    """A fake that notes which requests it was asked, chunk by chunk, and is killed before chunk `last` of the attempt."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__({}, hook=self._count)
        self.last, self.asked = last, []

    def _count(self, call: str) -> None:
        if call == "generate":
            if len(self.asked) == self.last:
                raise Killed
            self.asked.append([])

    def _complete(self, row: Any, skill: float, sampling: Any) -> Any:
        self.asked[-1].append(row["id"])
        return super()._complete(row, skill, sampling)


def attempt(folder: Path, engines: int, backend: Fake, *overrides: str) -> Run:
    run = Run.open(recipe_in(folder, RECIPE, *overrides), folder / "run", Machine(backend="fake", generators=engines))
    walk(run, backend, run.begin())
    return run


def sizes(folder: Path) -> dict[str, int]:
    return {path.name[: -len("-123456789012.json")]: json.loads(path.read_text())["size"] for path in folder.glob("cut-*.json")}


def test_killed_with_four_engines_and_continued_with_two_nothing_is_asked_twice(tmp_path):
    first, second = Listening(last=3 + 2), Listening()  # three chunks of the dev split, two of the sample step
    with pytest.raises(Killed):
        attempt(tmp_path, 4, first, LOOSE)
    run = attempt(tmp_path, 2, second, LOOSE)
    asked = [name for part in (*first.asked, *second.asked) for name in part]
    assert len(asked) == len(set(asked)) == 6 + 2 * (36 + 6)
    assert [len(part) for part in (*first.asked[3:], *second.asked[:2])] == [9, 9, 9, 9]  # the cut of four engines
    assert sizes(run.paths.round(1).folder) == {"cut-01-sample": 9, "cut-05-measure": 3}  # the second step began with two
    assert verify(run.folder).problems == []


def test_how_answers_are_cut_is_in_no_digest(tmp_path):
    exact = go(recipe_in(tmp_path / "exact"), tmp_path / "exact" / "run")
    loose = [attempt(tmp_path / str(engines), engines, Fake({}), LOOSE) for engines in (1, 4)]
    assert {end(run) for run in loose} == {end(exact)}


def test_an_exact_run_is_cut_by_its_recipe_and_records_nothing(tmp_path):
    backend = Listening()
    run = attempt(tmp_path, 4, backend)
    assert [len(part) for part in backend.asked[1:6]] == [8, 8, 8, 8, 4]
    assert list(run.folder.glob("round-*/cut-*")) == []


def test_a_step_that_was_begun_before_cuts_were_recorded_goes_on_with_the_size_it_had(tmp_path, monkeypatch):
    first, second = Listening(last=1 + 2), Listening()
    with monkeypatch.context() as before:
        before.setattr(chunks, "loose_size", lambda requests, engines, most: most)
        with pytest.raises(Killed):
            attempt(tmp_path, 4, first, LOOSE, "chunk=1")
    for path in (tmp_path / "run").glob("round-*/cut-*.json"):
        path.unlink()
    run = attempt(tmp_path, 4, second, LOOSE, "chunk=1")
    assert [len(part) for part in (*first.asked[1:], second.asked[0])] == [16, 16, 4]
    assert sizes(run.paths.round(1).folder)["cut-01-sample"] == 16


def test_a_changed_record_of_a_cut_is_named(tmp_path):
    run = attempt(tmp_path, 2, Fake({}), LOOSE)
    [path] = run.paths.round(2).folder.glob("cut-01-*.json")
    path.write_text(path.read_text().replace('"size": 18', '"size": 17'))
    assert [problem for problem in verify(run.folder).problems if path.name in problem] == [
        f"round-002/{path.name} was changed after it was committed"
    ]


@pytest.mark.parametrize(
    "requests, engines, size",
    [
        (7000, 8, 219),  # star on eight cards: four chunks for each
        (1000, 8, FEWEST),  # a dev split: two for each
        (40, 8, 5),  # few: one for each, and nobody is idle
        (194_000, 8, 4096),
        (1, 4, 1),
        (0, 4, 1),
    ],
)
def test_a_loose_chunk_is_a_quarter_of_an_engines_share_within_limits(requests, engines, size):
    assert loose_size(requests, engines, 4096) == size


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 5000))
def test_no_engine_is_idle_where_there_are_requests_for_all(requests, engines, most):
    size = loose_size(requests, engines, most)
    assert 1 <= size <= most
    assert -(-requests // size) >= min(engines, requests) or -(-requests // engines) == size
