"""How a metric was measured, as a digest: what was asked, and the reward of that name. Two rounds in which it differs did not measure the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfkd.chain.records import Commit
from selfkd.core import digest
from selfkd.core.files import reference_parts
from selfkd.steps.measure import PARSED, Figure, figures
from selfkd.steps.score import function_names
from selfkd.steps.step import several

COUNTS = ("_scored", "_interval")  # what is told of a score beside its mean; older runs recorded the interval


def measures_of(commit: Commit) -> dict[str, str]:
    """Return {metric: digest of how it was measured} of a measure step: what was asked, and the function and code of the reward of that name.

    The step's name and its limits for failures change no number; a reward beside another one changes only its own.
    """
    return {metric: how_measured(commit.identity, commit.code, metric) for metric in commit.metrics}


def how_measured(identity: Mapping[str, Any], code: Mapping[str, str], metric: str) -> str:
    """Return the digest of how a step of this identity, with this code, measures a metric."""
    apart = ("name", "reward", "as", "max_failed", "timeout", "pass_at", "vote", "key")
    asked = {name: value for name, value in identity.items() if name not in apart}
    rewards = rewards_of(identity)
    voting = [function for name in ("vote", "key") if (function := identity.get(name))]
    texts = {name: text for name, text in code.items() if name not in (*rewards.values(), *voting)}
    name = metric.partition("/")[2]
    of_figure = {figure: how.reward for figure, how in scores_of(identity).items()}
    score = next((of_figure[one] for one in (name, *map(name.removesuffix, COUNTS)) if one in of_figure), "")
    reward = [reference_parts(rewards[score])[1], code.get(rewards[score])] if score else None
    votes = name == PARSED or scores_of(identity).get(name, Figure("")).way in ("vote", "key")
    voted = [[reference_parts(function)[1], code.get(function)] for function in voting] if votes else []
    return digest.of("measure", asked, texts, reward, *voted)


def rewards_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return {score: the reward that gives it} of a step that scores, as its record tells it; the first is the one that tables show."""
    rewards = several(identity.get("reward"))
    return dict(zip(several(identity.get("as")) or function_names(rewards), rewards, strict=True))


def scores_of(identity: Mapping[str, Any]) -> dict[str, Figure]:
    """Return {figure: how it is made of a reward's scores} of a measure step, the scores themselves first."""
    return figures(list(rewards_of(identity)), identity)
