"""What gave a number that a record holds: how a metric was measured, what made a score. Where it differs, one name means two things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from selfkd.chain.records import Commit
from selfkd.core import digest
from selfkd.core.files import reference_parts
from selfkd.steps import VERBS
from selfkd.steps.by_model import BY_ROLE
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
    apart = ("name", "reward", "as", "max_failed", "timeout", "pass_at", "vote", "key", "logprobs", "pick")
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
    picks = scores_of(identity).get(name, Figure("")).way == "pick"
    picked = [[identity["pick"], identity.get("logprobs")]] if picks else []
    return digest.of("measure", asked, texts, reward, *voted, *picked)


def rewards_of(identity: Mapping[str, Any]) -> dict[str, str]:
    """Return {score: the reward that gives it} of a step that scores, as its record tells it; the first is the one that tables show."""
    rewards = several(identity.get("reward"))
    return dict(zip(several(identity.get("as")) or function_names(rewards), rewards, strict=True))


def scores_of(identity: Mapping[str, Any]) -> dict[str, Figure]:
    """Return {figure: how it is made of a reward's scores} of a measure step, the scores themselves first."""
    return figures(list(rewards_of(identity)), identity)


# ---- scores ----

Made = dict[str, Any]
Grouped = Callable[[str], bool]  # whether the reward of this reference sees all answers of a prompt at once
# Fields that change no score: names, what may fail, what is asked beside the answers; of `bring` also which rows are brought.
BESIDE = ("name", "as", "score", "scores", "max_failed", "max_unparsed", "timeout", "canaries")
BESIDE_ROWS = ("id", "n", "others")
ALONE = (*BY_ROLE, "classifier", "per_step")  # score one answer by itself, whichever others there are
WHICH = ("of", "where")  # which answers are scored: it matters where they are seen together


def scores_made(verb: str, identity: Mapping[str, Any], code: Mapping[str, str], grouped: Grouped) -> dict[str, Made]:
    """Return {score: what gives it} of a step, as its record tells it: its words and the digests of its code, templates, models and data.

    Nothing of what only copies scores, or keeps them out of the pool.
    """
    if verb not in VERBS or VERBS[verb].copies or VERBS[verb].outside:
        return {}
    if identity.get("reward"):
        rewards = rewards_of(identity)
        return {name: _by_reward(reference, identity, code, grouped(reference)) for name, reference in rewards.items()}
    words = {name: value for name, value in identity.items() if name != "verb"}
    step = VERBS[verb].model_construct(**words)  # not validated: words of another version are words, too
    beside = (*BESIDE, *(WHICH if _alone(verb, identity) else ()), *(BESIDE_ROWS if step.data() else ()))
    made = {name: _by_value(value, step.functions(), code) for name, value in identity.items() if name not in beside}
    made |= {"data": code.get(step.data())} if step.data() else {}
    return {name: made for name in step.scores()}


def unlike(one: Made, other: Made) -> list[str]:
    """Return in which words two scores were made otherwise; where another verb made one of them, that is all."""
    differ = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return ["verb"] if "verb" in differ else differ


def _by_reward(reference: str, identity: Mapping[str, Any], code: Mapping[str, str], grouped: bool) -> Made:
    told = [reference_parts(reference)[1], code.get(reference), digest.as_json(identity.get("params", {}))]
    return {"verb": identity["verb"], "reward": told, **({"of": identity.get("of")} if grouped else {})}


def _alone(verb: str, identity: Mapping[str, Any]) -> bool:
    if verb == "judge":
        return not identity.get("pairwise")
    return any(identity.get(name) for name in ALONE)


def _by_value(value: Any, functions: list[str], code: Mapping[str, str]) -> Any:
    """Return the digest of what a word names, with the function's name; the word itself where it names nothing that is frozen."""
    if not isinstance(value, str) or value not in code:
        return value
    return [reference_parts(value)[1], code[value]] if value in functions else code[value]
