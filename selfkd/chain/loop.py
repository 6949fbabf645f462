"""The loop. If a method needs this file changed, the method is probably a step."""

from __future__ import annotations

from selfkd.backend.base import Backend
from selfkd.chain.attempt import Attempt
from selfkd.chain.round import open_round
from selfkd.chain.run import Run


def walk(run: Run, backend: Backend, attempt: Attempt) -> None:
    """Walk the rounds that are not sealed yet; a step that was already made is read back, not made again."""
    with run.lease() as lease:  # from the first round to the last: no other driver can come in between
        for index in run.rounds_to_walk():
            lease.confirm()
            round = open_round(run, index, backend, attempt)
            pool = round.opening_pool()  # prompts, and the weights at the head of the chain
            for step in run.recipe.steps_of(index):
                pool += round.once(step, pool)  # read back if already made; else make and commit
            stop = round.stop_reason(pool)
            for step in round.closing_steps(stop):  # a run that stops early still measures its test split
                pool += round.once(step, pool)
            round.seal(pool, stop)
