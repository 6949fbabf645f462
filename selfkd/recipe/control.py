"""Controls: what a method is held against, each made of the method's own recipe. A recipe comes in and a recipe goes out; no prompt is read.

A method that does not beat them has shown nothing of its own. What a control changes is words of steps, so that the recipe that ran can
be read in its run, and lints, resumes and is verified as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from selfkd.backend.trainer.trl_options import PASSED
from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.prompts import templates
from selfkd.prompts.template_fields import tells_gold
from selfkd.recipe.lines import LISTS, Line, entries
from selfkd.recipe.schema import Recipe
from selfkd.steps import VERBS

Steps = Sequence[int]  # how many optimiser steps the method made, round by round
TRUE = "true_"  # before the name of a score that a control hides behind another one
GOLD = "{{ prompt.answer }}"
SFT_WORDS = ("name", "from", "role", "trl", "lora", "continue", "optimiser", "precision", "min_rows", "check")
VOTE = "reward/vote.py:share"
COOL, WARM, TOLD = "at_03", "at_07", "told"  # how the scores of other decodings are called: right_at_03, right_told
TEMPERATURES = {COOL: 0.3, WARM: 0.7}


@dataclass(frozen=True)
class _Method:
    """A method that is to be controlled, how many steps its updates took where that is known, and how its gold answers are said."""

    recipe: Recipe
    steps: Steps
    gold: str

    def lines(self, verb: str, part: str = "steps") -> list[Line]:
        return [line for line in getattr(self.recipe, part) if line.verb == verb]

    def no(self, control: str, what: str, fix: str = "") -> UsageError:
        return UsageError(f"{control} has nothing to control in {self.recipe.name}: {what}", f"--control {control}", fix)


def controlled(recipe: Recipe, control: str, steps: Steps = (), gold: str = GOLD) -> Recipe:
    """Return the control of a method; `steps` are those that its updates took, round by round, where it has run.

    `gold` is the text of a gold answer where the method has no gold step that says it. UsageError in words where the recipe has nothing that this control takes away.
    """
    if control not in CONTROLS:
        raise UsageError(
            f"no control '{control}'.{did_you_mean(control, CONTROLS)}", "--control", f"Controls: {', '.join(CONTROLS)}"
        )
    if recipe.control:
        raise UsageError(f"{recipe.name} is the control {recipe.control} itself", f"--control {control}", "Name the method.")
    changed = CONTROLS[control](_Method(recipe, steps, gold))
    return recipe.model_copy(update={**changed, "control": control, "name": f"{recipe.name}-{control}"})


# ---- random-reward ----


def random_reward(method: _Method) -> dict[str, Any]:
    """Each score is given as it was, under another name; its own name gets the same values, dealt out anew among the samples."""
    scored = [line for part in LISTS for line in getattr(method.recipe, part) if _gives_scores(line)]
    if not scored:
        raise method.no("random-reward", "no step gives a score", "It is for methods that choose by one.")
    return {part: tuple(chain.from_iterable(map(_dealt_out, getattr(method.recipe, part)))) for part in LISTS}


def _gives_scores(line: Line) -> bool:
    return line.verb in ("score", "judge") and bool(line.at(1).scores())


def _dealt_out(line: Line) -> list[Line]:
    if not _gives_scores(line):
        return [line]
    step, field = line.at(1), "as" if line.verb == "score" else "score"
    hidden = [f"{TRUE}{name}" for name in step.scores()]
    words = {**line.words, field: hidden if len(hidden) > 1 else hidden[0]}
    if words.get("elo"):
        words["elo"] = f"{TRUE}{words['elo']}"
    deal = {"name": f"{line.name}-dealt", "shuffled": hidden, "as": step.scores()}
    deal |= {"of": words["of"]} if words.get("of") else {}
    return [replace(line, words=words), replace(line, verb="score", words=deal, label=f"{line.label}, dealt out")]


# ---- gold-sft ----


def gold_sft(method: _Method) -> dict[str, Any]:
    """The model learns each prompt's gold answer for as many steps as the method's updates took, from where they began."""
    train = _last_update(method, "gold-sft")
    taken = _steps_of(method, train, "gold-sft")
    given = method.lines("gold")
    gold = given[0] if given else Line("gold", {"name": "gold", "text": method.gold}, train.where, f"{train.label}, gold")
    words = {name: value for name, value in train.words.items() if name in SFT_WORDS}
    words |= {"loss": "sft", "trl": _trl(train, taken)}
    rounds = {"rounds": len(taken)} if method.steps else {}
    steps = (replace(gold, words={**gold.words, "as": "gold"}), replace(train, words=words), *_measuring(method.recipe))
    return {"steps": steps, "after": tuple(line for line in method.recipe.after if VERBS[line.verb].outside), **rounds}


def _trl(train: Line, taken: Any) -> dict[str, Any]:
    """Return the options of an update that SFT has too, so many steps long."""
    known = PASSED["SFTConfig"].keys() - {"num_train_epochs", "loss_type"}
    kept = {name: value for name, value in (train.words.get("trl") or {}).items() if name in known}
    return {**kept, "max_steps": taken if len(taken) > 1 else taken[0]}


def _last_update(method: _Method, control: str) -> Line:
    found = [line for line in method.lines("train") if line.at(1).trained_role() == "policy"]
    if not found:
        raise method.no(control, "no step trains")
    return found[-1]


def _steps_of(method: _Method, train: Line, control: str) -> list[int]:
    """Return the steps of each round's update: as the method made them, else as its recipe says."""
    if method.steps:
        return list(method.steps)
    options = train.words.get("trl") or {}
    given = entries(options.get("max_steps"))
    if not given or any(not isinstance(one, int) or one < 1 for one in given):
        what = f"how many steps {method.recipe.name} makes is known when it has run"
        fix = "Run it first, then name its run: --steps-of RUN. Or give its train step trl.max_steps."
        raise UsageError(what, f"--control {control}", fix)
    return given


# ---- one-round ----


def one_round(method: _Method) -> dict[str, Any]:
    """All samples of all rounds at once, answered by the untouched model, and as many steps on them."""
    recipe = method.recipe
    if recipe.rounds < 2:
        raise method.no("one-round", "it has one round as it is")
    _last_update(method, "one-round")
    prompts = recipe.prompts
    taken = prompts.model_copy(update={"take": recipe.take * recipe.rounds}) if recipe.take else prompts
    steps = tuple(_at_once(line, method, bool(prompts.take)) for line in recipe.steps)
    return {"rounds": 1, "prompts": taken, "steps": steps, "stop": None}


def _at_once(line: Line, method: _Method, new_prompts: bool) -> Line:
    """Return the step of round 1 with what it makes in all rounds: more prompts where each round has new ones, else more answers."""
    rounds, cls = method.recipe.rounds, VERBS[line.verb]
    words = {name: _first(value) if name in line.changing else value for name, value in line.words.items()}
    if line.verb in ("sample", "gold") and "n" in cls.model_fields and not new_prompts:
        words["n"] = _in_all(line.words.get("n", cls.model_fields["n"].default), rounds)
    for cap in () if line.verb not in ("select", "build") else ("limit",) if new_prompts else ("limit", "per_prompt"):
        given = line.words.get(cap) or (1 if line.words.get("kind") == "pair" and cap == "per_prompt" else None)
        words |= {cap: _in_all(given, rounds)} if given else {}
    if line.verb == "train":
        words["trl"] = _long_update(line, method)
    return replace(line, words=words)


def _long_update(line: Line, method: _Method) -> dict[str, Any]:
    """Return the options of one update with the steps of all: those that were made, those in the recipe, or the mean of its epochs."""
    given = line.words.get("trl") or {}
    options = {name: _first(value) if name in line.listed else value for name, value in given.items()}
    if method.steps:
        return {
            **{name: value for name, value in options.items() if name != "num_train_epochs"},
            "max_steps": sum(method.steps),
        }
    if "max_steps" in given:
        options["max_steps"] = _in_all(given["max_steps"], method.recipe.rounds)
    if "num_train_epochs" in given:
        options["num_train_epochs"] = _in_all(given["num_train_epochs"], method.recipe.rounds) / method.recipe.rounds
    return options


def _in_all(value: Any, rounds: int) -> Any:
    """Return the sum over rounds of a number, or of a list of one per round whose last entry repeats.

    >>> _in_all(4, 3), _in_all([40, 48], 4)
    (12, 184)
    """
    given = entries(value)
    return sum(given[min(index, len(given) - 1)] for index in range(rounds))


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, list) and value else value


# ---- wrong-context ----


def wrong_context(method: _Method) -> dict[str, Any]:
    """A teacher that is told a prompt's answer is told that of another prompt."""
    recipe = method.recipe
    lines = [line for part in LISTS for line in getattr(recipe, part) if _tells_gold(line, recipe)]
    if not lines:
        what = "no template tells a teacher the answer of the prompt, or a column of it"
        raise method.no("wrong-context", what, "It is for teachers that see more than the student.")
    names = {line.name for line in lines}
    return {
        part: tuple(
            replace(line, words={**line.words, "told": "other"}) if line.name in names else line
            for line in getattr(recipe, part)
        )
        for part in LISTS
    }


def _tells_gold(line: Line, recipe: Recipe) -> bool:
    """Whether a step has a teacher, one that answers or one whose distribution is learned, that is told something of the prompt's gold."""
    if line.verb not in ("sample", "build"):
        return False
    reference = line.words.get("teacher" if line.verb == "build" else "template")
    return reference is not None and tells_gold(templates.load(reference, recipe.folders))


# ---- best-decoding ----


def best_decoding(method: _Method) -> dict[str, Any]:
    """No training: the untouched model answers greedily, at two temperatures, by a vote among as many answers as the method draws for a
    prompt in all its rounds, and with what its teacher is told, where that holds no gold.
    """
    recipe = method.recipe
    measuring = tuple(map(_unpicked, _measuring(recipe)))
    if not measuring:
        raise method.no("best-decoding", "no step measures")
    asking = method.lines("sample")
    n = max(2, sum(_in_all(line.words.get("n", 1), recipe.rounds) for line in asking))
    told = [line for line in asking if (line.words.get("template") or line.words.get("system")) and not line.words.get("of")]
    words = [{name: line.words.get(name) for name in ("template", "system")} for line in told if not _tells_gold(line, recipe)]
    steps = [*measuring, *(one for line in measuring for one in _decodings(line, n, words[:1]))]
    none: dict[str, Any] = {"before": (), "after": (), "stop": None, "keep_if": None}
    none |= {"best": None} if measuring != _measuring(recipe) else {}  # it may name what was picked, and here is but the base
    return {"rounds": 0, "steps": tuple(steps), **none}


def _unpicked(line: Line) -> Line:
    """Return a measurement that no model picks in: one that would is trained, and here none is."""
    return replace(line, words={name: value for name, value in line.words.items() if name not in ("logprobs", "pick")})


def _decodings(line: Line, n: int, told: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """Yield the same measurement under other decodings, their scores named apart."""
    voting = {"temperature": TEMPERATURES[WARM], "n": n, "vote": VOTE}
    ways: list[tuple[str, dict[str, Any]]] = [
        (COOL, {"temperature": TEMPERATURES[COOL]}),
        (WARM, voting),
        *((TOLD, dict(words)) for words in told),
    ]
    plain = {name: value for name, value in line.words.items() if name not in ("pass_at", "vote", "key")}
    for ending, changed in ways:
        scores = [f"{score}_{ending}" for score in line.at(1).scores()]
        named = {"name": f"{line.name}-{ending.replace('_', '-')}", "as": scores}
        yield replace(line, words={**plain, **named, **changed}, label=f"{line.label}, {ending}")


def decodings(metric: str, known: Sequence[str]) -> list[str]:
    """Return the metrics among `known` that are `metric` under a decoding that `best-decoding` tries, itself included.

    >>> decodings("dev/right", ["dev/right", "dev/right_at_07", "dev/right_at_07_maj_12", "dev/right_scored", "dev/right_at_07_scored"])
    ['dev/right', 'dev/right_at_07', 'dev/right_at_07_maj_12']
    """
    voted = f"{metric}_{WARM}_maj_"
    plain = {metric, *(f"{metric}_{ending}" for ending in (COOL, WARM, TOLD))}
    return [name for name in known if name in plain or (name.startswith(voted) and name.removeprefix(voted).isdigit())]


def _measuring(recipe: Recipe) -> tuple[Line, ...]:
    return tuple(line for line in recipe.steps if VERBS[line.verb].outside)


CONTROLS: Mapping[str, Callable[[_Method], dict[str, Any]]] = {
    "random-reward": random_reward,
    "gold-sft": gold_sft,
    "one-round": one_round,
    "wrong-context": wrong_context,
    "best-decoding": best_decoding,
}
