"""How fast a machine makes and learns tokens, for a plan: as a run here was, else a rough figure for its kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Tokens per second times the parameters of the model, so that the speed falls as models grow.

    `made` is of one engine, `learned` of one rank; on a CPU, whose cores they share, of all of them together. `source` says where the
    figures are from, as a person reads it.
    """

    made: float
    learned: float
    source: str


# SmolLM2-135M on one thread: 280 tokens made and 147 learned in a second.
CPU = Pace(280 * 135e6, 147 * 135e6, "roughly, on this machine's CPU")
# From data sheets, for a card with 3.35 TB/s and 990 TFLOP/s in bf16. Making: the weights, two bytes each, are read once a step for 64
# answers, at a third of the bandwidth. Learning: six operations for each weight and token, at 30 % of the peak. Smaller cards are slower.
GPU = Pace(3.35e12 / 2 * 64 / 3, 0.3 * 990e12 / 6, "roughly, from the data sheet of an H100 (smaller cards are slower)")


def seconds(pace: Pace, parameters: int, made: float, learned: float) -> float:
    """Return how long it takes to make and to learn so many tokens, each divided by the engines or ranks that share them.

    >>> round(seconds(CPU, 135_000_000, 2_800, 1_470))
    20
    """
    return made * parameters / pace.made + learned * parameters / pace.learned
