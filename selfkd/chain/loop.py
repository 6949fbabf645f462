"""The loop. If a method needs this file changed, the method is probably a step."""

from __future__ import annotations

from selfkd.backend.base import Backend
from selfkd.chain.round import Round
from selfkd.chain.run import Run


def walk(run: Run, backend: Backend) -> None:
    """Walk the rounds that are not sealed yet; a step that was already made is read back, not made again."""
    for index in run.rounds_to_walk():
        with Round(run, index, backend) as round:  # lease, attempt log; Stopped abandons the chunk in flight
            pool = round.opening_pool()  # prompts, and the weights at the head of the chain
            for step in run.recipe.steps_of(index):
                pool += round.once(step, pool)  # read back if already made; else make and commit
            for step in round.closing_steps(pool):  # a run that stops early still measures its test split
                pool += round.once(step, pool)
            round.seal(pool)
