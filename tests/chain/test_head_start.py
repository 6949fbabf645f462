"""Rewards that run while answers still come: what is used of them, and that nobody can tell from the chain."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Killed, end, recipe_in
from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import context, head_start, round
from selfkd.chain.head_start import completed, key_of, spare_workers
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core.accelerator import Accelerator
from selfkd.errors import RewardError
from selfkd.rewards.pool import spread
from selfkd.steps import score as score_step

RIGHT = """
import os

def right(completion: str, answer: str) -> float:
    with open(os.environ["HEARD"], "a") as heard:
        heard.write("scored\\n")
    return float(completion.endswith(answer))
"""
FAILS = "def right(completion: str, answer: str) -> float:\n    raise ValueError('no number')\n"
HANGS = """
import os
import time

def right(completion: str, answer: str) -> float:
    with open(os.environ["HEARD"], "a") as heard:
        heard.write("begun\\n")
    time.sleep(600)
"""
VOTE = """
import os

def right(completions: list, answer: str) -> list:
    with open(os.environ["HEARD"], "a") as heard:
        heard.write("scored\\n" * len(completions))
    return [float(text.endswith(answer)) for text in completions]
"""
DRAWS = """
import os

def right(completion: str) -> float:
    with open(os.environ["HEARD"], "a") as heard:
        heard.write("scored\\n")
    return int.from_bytes(os.urandom(6)) / 2**48
"""
SCORED = (
    RECIPE.replace("reward/number.py:last_number", "right.py:right")
    .replace("last_number", "right")
    .replace("rounds: 2", "rounds: 1")
)
SAMPLES = 36
WAIT = 60.0


class Slow(Fake):
    """An engine that is asked chunk by chunk, and before the last one of the sample step waits for `until`, if it ever comes."""

    def __init__(self, heard: Path, until: Any = lambda: True, killed: bool = False) -> None:
        super().__init__({}, hook=self._slowly)
        self.heard, self.until, self.killed, self.chunks = heard, until, killed, 0

    def _slowly(self, call: str) -> None:
        self.chunks += call == "generate"
        if call == "generate" and self.chunks == 1 + 5:  # one of the dev split in round 0, five of the sample step
            deadline = time.monotonic() + WAIT
            while not self.until() and time.monotonic() < deadline:
                time.sleep(0.02)
            if self.killed:
                raise Killed
            with self.heard.open("a") as heard:
                heard.write("last chunk\n")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Walk the recipe with so many workers ahead, in a folder of its own; return its run and what was heard, in order."""

    def walked(
        name: str, workers: int, reward: str = RIGHT, backend: Any = None, recipe: str = SCORED
    ) -> tuple[Run, list[str]]:
        folder, heard = tmp_path / name, tmp_path / f"{name}.heard"
        folder.mkdir(exist_ok=True)
        (folder / "right.py").write_text(reward)
        heard.touch()
        monkeypatch.setenv("HEARD", str(heard))
        monkeypatch.setattr(round, "spare_workers", lambda engines, threads: workers)
        run = Run.open(recipe_in(folder, recipe), folder / "run", Machine(backend="fake"))
        walk(run, backend(heard) if backend else Slow(heard), run.begin())
        return run, heard.read_text().splitlines()

    return walked


def some_are_scored(heard: Path) -> Any:
    return lambda: "scored" in heard.read_text().split("\n")[6:]  # the first six are of the dev split


def used(run: Run) -> int:
    notes: dict[str, Any] = json.loads(next(run.paths.round(1).folder.glob("02-score.json")).read_text())["notes"]
    return int(notes.get("scored_ahead", 0))


def test_rewards_run_while_answers_still_come_and_the_score_step_uses_what_they_gave(start: Any) -> None:
    run, heard = start("ahead", 1, backend=lambda heard: Slow(heard, some_are_scored(heard)))
    assert "scored" in heard[6 : heard.index("last chunk")]
    assert used(run) > 0
    score = run.samples(round=1, step="sample")
    assert score.height == SAMPLES and score["right"].null_count() == 0


def test_with_and_without_a_head_start_the_chain_ends_on_one_digest(start: Any) -> None:
    ahead, _ = start("ahead", 2, backend=lambda heard: Slow(heard, some_are_scored(heard)))
    alone, heard = start("alone", 0)
    assert used(ahead) > 0 and used(alone) == 0
    assert heard[6] == "last chunk"  # where nobody works ahead, no reward runs before it
    assert end(ahead) == end(alone)


def test_equal_answers_share_no_value_of_a_reward_that_draws_and_the_note_counts_what_was_used(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_step, "SLICE", 6)
    computed: list[Any] = []

    def counted(function: Any, batches: Any, **words: Any) -> Any:
        return spread(function, (computed.extend(batch) or batch for batch in batches), **words)

    monkeypatch.setattr(context, "spread", counted)
    recipe = SCORED.replace("  - measure: right.py:right\n", "").replace("right = 1", "right >= 0")

    def until_scored(heard: Path) -> Slow:
        slow = Slow(heard, lambda: heard.read_text().count("scored") >= 8)
        slow.chunks = 1  # nothing is measured before
        return slow

    run, _ = start("draws", 1, DRAWS, until_scored, recipe)
    samples = run.samples(round=1, step="sample")
    assert samples["text"].n_unique() < samples.height == samples["right"].n_unique() == SAMPLES
    assert used(run) == SAMPLES - len(computed) > 0


def test_a_reward_that_hangs_ahead_stops_no_sample_step_and_fails_in_its_own(start: Any, tmp_path: Path) -> None:
    recipe = SCORED.replace("  - score: right.py:right", "  - score: {reward: right.py:right, timeout: 0.3}")
    recipe = recipe.replace("  - measure: right.py:right\n", "")

    def until_begun(heard: Path) -> Slow:
        slow = Slow(heard, lambda: "begun" in heard.read_text())
        slow.chunks = 1  # nothing is measured before
        return slow

    with pytest.raises(RewardError, match="could not be scored"):
        start("hangs", 2, HANGS, until_begun, recipe)
    heard = (tmp_path / "hangs.heard").read_text().splitlines()
    assert "begun" in heard[: heard.index("last chunk")]
    folder = tmp_path / "hangs" / "run" / "round-001"
    assert (folder / "01-sample.json").exists() and not (folder / "02-score.json").exists()


def test_a_reward_that_fails_ahead_fails_in_its_own_step_as_it_would_alone(start: Any) -> None:
    recipe = SCORED.replace("  - measure: right.py:right\n", "")
    said = []
    for workers in (0, 2):
        with pytest.raises(RewardError) as caught:
            start(f"fails{workers}", workers, FAILS, recipe=recipe)
        said.append(str(caught.value).replace(f"fails{workers}", ""))
    assert said[0] == said[1] and "ValueError: no number" in said[0]


def test_a_vote_over_a_group_waits_for_all_of_it(start: Any) -> None:
    run, heard = start("vote", 2, VOTE)
    assert heard[6] == "last chunk" and used(run) == 0


def test_a_kill_in_between_loses_only_time(start: Any) -> None:
    whole, _ = start("whole", 2)
    with pytest.raises(Killed):
        start("killed", 2, backend=lambda heard: Slow(heard, some_are_scored(heard), killed=True))
    again, _ = start("killed", 2, backend=Slow)
    assert end(again) == end(whole)


def test_chunks_of_an_earlier_attempt_are_scored_ahead_too(start: Any) -> None:
    with pytest.raises(Killed):
        start("resumed", 0, backend=lambda heard: Slow(heard, killed=True))

    def last_only(heard: Path) -> Slow:
        slow = Slow(heard, lambda: heard.read_text().count("scored") > 6)
        slow.chunks = 5  # the next one is the last of the sample step
        return slow

    run, heard = start("resumed", 1, backend=last_only)
    assert "scored" in heard[6 : heard.index("last chunk")] and used(run) > 0


# ---- the parts ----


def test_no_core_that_an_engine_uses_works_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "accelerator", lambda: Accelerator("cpu"))
    monkeypatch.setattr(head_start, "usable_cores", lambda: 16)
    assert spare_workers(engines=1, threads=16) == 0
    assert spare_workers(engines=1, threads=13) == 2
    assert spare_workers(engines=4, threads=2) == head_start.MOST_WORKERS
    monkeypatch.setattr(head_start, "accelerator", lambda: Accelerator("cuda"))
    assert spare_workers(engines=8, threads=16) == 0
    assert spare_workers(engines=6, threads=16) == 3


def test_a_row_is_another_one_where_any_word_of_it_differs() -> None:
    row = {"completion": "4", "answer": "4", "meta": {"a": 1}}
    assert key_of("s", row) == key_of("s", dict(reversed(row.items())))
    others = (key_of("s", {**row, "answer": "5"}), key_of("s", {**row, "meta": {"a": 2}}), key_of("t", row))
    assert len({key_of("s", row), *others}) == 4
    assert key_of("s", {"meta": {"a": float("nan")}}) is None


@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=5), max_size=6))
def test_results_come_batch_by_batch_in_order_whatever_is_known(batches: list[list[tuple[int, bool]]]) -> None:
    """The value of a row is its place: equal rows of two samples do not share one."""
    rows = [[{"n": number, "known": known} for number, known in batch] for batch in batches]
    flat = [row for batch in rows for row in batch]
    ids = [f"s{place}" for place in range(len(flat))]
    known = {
        key_of(name, row): (float(place), "ahead")
        for place, (name, row) in enumerate(zip(ids, flat, strict=True))
        if row["known"]
    }
    asked: list[Any] = []

    def compute(some: Any) -> Any:
        for batch in some:
            asked.extend(batch)
            yield [(float(row["n"]), "now") for row in batch]

    found = list(completed(iter(rows), iter(ids), known, compute))
    assert [len(batch) for batch in found] == [len(batch) for batch in rows]
    expected = [(float(place), "ahead") if row["known"] else (float(row["n"]), "now") for place, row in enumerate(flat)]
    assert [result for batch in found for result in batch] == expected
    assert asked == [row for row in flat if not row["known"]]
    assert known == {}  # each was handed out, once
