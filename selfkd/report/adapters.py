"""What a reader is told of the adapters that a run learned: how large, how engines hold them, and what 4 bits beneath them changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from selfkd.chain.records import Commit, Seal

HELD = {"merged": "merged into the weights by engines", "adapter": "served beside the weights"}


def learned(commits: Iterable[Commit]) -> tuple[str, ...]:
    """Return 'train learned an adapter of rank 16, merged into …' of each step that made one."""
    found = ((commit, commit.notes.get("train", {}).get("lora")) for commit in commits)
    return tuple(f"{commit.step} learned {text(notes)}" for commit, notes in found if notes)


def text(notes: Mapping[str, Any]) -> str:
    """Return an adapter in words, from what its trainer noted.

    >>> text({"rank": 16, "serve": "merged", "survived": 0.931})
    'an adapter of rank 16, merged into the weights by engines (93 % of it survives their number format)'
    >>> text({"rank": 8, "serve": "adapter", "survived": 0.4, "quantise": "nf4", "gap": 0.04, "likelier": -0.01, "carried": 0.97})
    'an adapter of rank 8, served beside the weights; learned over nf4: 97 % of what it learned is served, 0.04 apart in log-probability a token (mean -0.01)'
    """
    found = f"an adapter of rank {notes['rank']}, {HELD[notes['serve']]}"
    if notes["serve"] == "merged" and round(notes["survived"], 2) != 1:
        found += f" ({_percent(notes['survived'])} of it survives their number format)"
    if notes.get("quantise"):
        carried = notes["carried"]
        share = "what it learned cannot be told" if carried is None else f"{_percent(carried)} of what it learned is served"
        apart = f"{notes['gap']:.2g} apart in log-probability a token (mean {notes['likelier']:+.2g})"
        found += f"; learned over {notes['quantise']}: {share}, {apart}"
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def lines(told: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
    """Return {round: what was learned} as lines, one for neighbours of which the same is said.

    >>> lines([(0, []), (1, ["a"]), (2, ["a"]), (3, ["b", "c"])])
    ['rounds 1 to 2: a', 'round 3: b', 'round 3: c']
    """
    found = []
    for said, same in groupby(((index, tuple(texts)) for index, texts in told), key=lambda one: one[1]):
        numbers = [index for index, _ in same]
        name = f"round {numbers[0]}" if len(numbers) == 1 else f"rounds {numbers[0]} to {numbers[-1]}"
        found += [f"{name}: {one}" for one in said]
    return found


def served(seal: Seal, commits: Iterable[Commit]) -> list[str]:
    """Return the adapters that stand at the end of a round, in words; `commits` are those of it and of the rounds before."""
    made = {entry.digest: commit.notes.get("train", {}).get("lora") for commit in commits for entry in commit.models.values()}
    heads = {role: made.get(entry.digest) for role, entry in seal.models.items() if entry.kind == "adapter"}
    return [f"{role} is {text(notes)}" for role, notes in heads.items() if notes]
