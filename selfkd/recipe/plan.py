"""What a recipe will cost: requests, tokens, rows, memory, disk and time, as upper bounds, from words alone. Starts nothing.

Every figure assumes that each answer is as long as it may be and that nothing is dropped but what a cap drops. What is not known
here (the size of a model or of a data set that lies on a hub) is said to be unknown, not guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from selfkd.backend.machine import SLOW, Machine, chosen_generator
from selfkd.backend.memory import adapter
from selfkd.backend.model_sizes import Sizes, Unknown, parameters, sizes_of
from selfkd.core.accelerator import accelerator
from selfkd.core.yamlfile import Problems
from selfkd.errors import SelfkdError, UsageError
from selfkd.prompts.read import on_hub, read_prompts
from selfkd.recipe import brought, disk, fit, readers, ready
from selfkd.recipe.lines import LISTS
from selfkd.recipe.pace import CPU, GPU, Pace, seconds
from selfkd.recipe.schema import Recipe
from selfkd.steps.bring import BringStep
from selfkd.steps.forecast import Cost, Forecast, figure, least

TRANSFORMERS_SHARE = 0.2  # of a rough speed of generation: 53 instead of 280 tokens/s
SWAP_SECONDS = 2.0
CHARS_PER_TOKEN = 2.5  # of a prompt with its template, on the safe side: English text has about four
NO_MEMORY = "not compared: this system does not say how much it has; `memory_gb` in the machine file states it"


@dataclass(frozen=True)
class Plan:
    """`lines` of (what, how much): each step of the first and of the last round, then memory, disk and time; `problems`: what cannot be."""

    lines: Sequence[tuple[str, str]]
    problems: Sequence[str] = ()

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name.ljust(width)}  {what}" for name, what in self.lines) + "\nUpper bounds; nothing was started."

    def refuse(self) -> None:
        """Raise UsageError where something cannot be."""
        if self.problems:
            raise UsageError("\n".join(self.problems), "machine", "Change the machine file or the recipe, and plan again.")


def plan(recipe: Recipe, machine: Machine | None = None, folder: Path | None = None, known: Pace | None = None) -> Plan:
    """Return what a recipe will cost on a machine, and why it cannot run there.

    `folder` is where the run would lie, `known` how fast this machine was before; None counts with a rough figure.
    """
    machine = machine or Machine()
    wrong = Problems()
    ready.add_problems(recipe, machine, wrong)
    wrong.stop()
    sizes = {split: size(recipe, split) for split in recipe.splits()}
    prompt_tokens = _prompt_tokens(recipe)
    longest = _longest_answer(recipe)
    sizes_and_more = {**sizes, **_brought(recipe)}
    rounds = [_costs(recipe, index, sizes_and_more, prompt_tokens, longest) for index in range(recipe.rounds + 1)]
    lines = [("prompts", ", ".join(f"{split} {figure(count)}" for split, count in sizes.items()))]
    for index in dict.fromkeys((0, min(1, recipe.rounds), recipe.rounds)):
        if index > 2:
            skipped = "round 2 is" if index == 3 else f"rounds 2 to {index - 1} are"
            lines.append(("…", f"{skipped} counted below and not listed"))
        lines += [(f"round {index}  {cost.step}", cost.what) for cost in rounds[index] if cost.what]
    found = sizes_of(recipe.model_source())
    weights = found.parameters if isinstance(found, Sizes) else parameters(recipe.model_source()["path"])
    memory, problems = _memory(
        recipe, machine, found, _lengths(recipe, prompt_tokens, longest), [cost for made in rounds for cost in made]
    )
    room = disk.free(folder) if folder and not machine.cards else None  # a machine that is elsewhere has a disk of its own
    taken = _disk(recipe, machine, rounds, weights, found)
    problems += [taken.problem(room, folder)] if taken and taken.problem(room, folder) else []
    return Plan([*lines, *_whole(recipe, machine, rounds, weights, memory, taken, room, known)], problems)


def _disk(
    recipe: Recipe, machine: Machine, rounds: list[list[Cost]], weights: int | None, found: Sizes | Unknown
) -> disk.Disk | None:
    """Return what the run takes on disk; None where the size of the model is not known."""
    if weights is None:
        return None
    dtype = fit.words_of(machine, fit.Place.of(machine))["dtype"]
    numbers = disk.Numbers(weights, adapter(found, 1) if isinstance(found, Sizes) else None)
    return disk.of(recipe, numbers, _total(rounds, "made"), dtype, machine)


def size(recipe: Recipe, split: str) -> int | None:
    """How many prompts a split has; of a hub's data set only what its slice says."""
    source = recipe.splits()[split]
    if on_hub(source):
        limit = source.get("limit")
        sliced = re.search(r"\[(\d*):(\d+)\]$", str(source.get("split", "")))
        count = int(sliced[2]) - int(sliced[1] or 0) if sliced else None
        return min(limit, count) if limit and count else limit or count
    try:
        return int(read_prompts(source, recipe.folders, split).height)
    except SelfkdError:
        return None


def _brought(recipe: Recipe) -> dict[str, int | None]:
    """Return how many answers each `bring` step has to bring."""
    if not any(line.verb == BringStep.verb for part in LISTS for line in getattr(recipe, part)):
        return {}
    source = recipe.prompts.train
    try:
        prompts = {} if on_hub(source) else {"train": read_prompts(source, recipe.folders, "train")}
    except SelfkdError:
        prompts = {}
    return brought.counts(recipe, prompts)


# ---- steps ----


def _costs(recipe: Recipe, index: int, sizes: Mapping[str, int | None], prompt_tokens: int | None, longest: int) -> list[Cost]:
    """Return the cost of each step of round `index`, from the sizes of the splits, the tokens of a prompt (None: not known) and of the longest answer."""
    train = sizes["train"]
    drawn = least(recipe.take, train) if recipe.take and index else train
    forecast = Forecast(drawn, sizes, recipe.context, prompt_tokens, longest)
    return [step.cost(forecast) for step in recipe.steps_of(index)]


def _longest_answer(recipe: Recipe) -> int:
    """Return the most tokens of an answer that a round samples, 0 where it samples none."""
    forecast = Forecast(None)
    for step in recipe.steps_of(1):
        step.cost(forecast)
    return forecast.longest


def _prompt_tokens(recipe: Recipe) -> int | None:
    """Return the tokens of a train prompt of the mean length, None where the prompts are not here."""
    source = recipe.splits()["train"]
    if on_hub(source):
        return None
    try:
        messages = read_prompts(source, recipe.folders, "train")["messages"]
    except SelfkdError:
        return None
    chars = int(messages.explode().struct.field("content").str.len_chars().sum()) / max(1, len(messages))
    return math.ceil(chars / CHARS_PER_TOKEN)


# ---- the whole ----


def _lengths(recipe: Recipe, prompt_tokens: int | None, longest: int) -> fit.Lengths:
    """Return the tokens of a training sequence: of a mean prompt with the longest answer, or as many as may be."""
    row = Forecast(None, context=recipe.context, prompt_tokens=prompt_tokens, longest=longest).row_tokens
    return fit.Lengths(row, min(row, longest or row))


def _memory(
    recipe: Recipe, machine: Machine, sizes: Sizes | Unknown, lengths: fit.Lengths, costs: list[Cost]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Return the lines on memory, and what does not fit."""
    if machine.backend == "fake":
        return [], []
    if isinstance(sizes, Unknown):
        return [("memory", f"unknown: {sizes.why}")], []
    place = fit.Place.of(machine)
    words = fit.words_of(machine, place)
    try:
        found = fit.loads(recipe, machine, words, sizes, lengths, place)
        problems = list(fit.problems(recipe, machine, words, sizes, lengths, place))
    except UsageError as error:  # too few cards, or a batch that its ranks cannot share
        return [], [f"{error.what}. {error.fix}"]
    lines = [(load.name, str(load)) for load in found] or [("memory", NO_MEMORY)]
    for load in readers.loads(recipe, machine, words, sizes, place, costs):
        lines.append(load if isinstance(load, tuple) else (load.name, str(load)))
        if isinstance(load, fit.Load) and load.need.least > load.room:
            least = f"at least {fit.gib(load.need.least)} GiB, and there are {fit.gib(load.room)}"
            problems.append(f"{load.name}: the weights alone need {least}. Score by a smaller model, or on a larger machine")
    return lines, problems


def _whole(
    recipe: Recipe,
    machine: Machine,
    rounds: list[list[Cost]],
    weights: int | None,
    memory: list[tuple[str, str]],
    taken: disk.Disk | None,
    room: int | None,
    known: Pace | None,
) -> list[tuple[str, str]]:
    made, learned = _total(rounds, "made"), _total(rounds, "learned")
    unknown = any(None in (cost.made, cost.learned) for round_costs in rounds for cost in round_costs)
    more = ", and what is marked with ?" if unknown else ""
    lines = [("all rounds", f"{made:,} tokens made, {learned:,} tokens learned{more}")]
    if weights is None or taken is None:
        missing = ready.missing_model(recipe)
        unknown_yet = "unknown until the model is here" + (f": {missing}" if missing else "")
        return [*lines, *memory, ("disk, time", unknown_yet)]
    lines += [("parameters", f"about {weights / 1e6:,.0f} million"), *memory]
    lines += [("disk", taken.text(more, room))]
    if chosen_generator(machine) == "transformers":
        lines += [("generator", SLOW)]
    return [
        *lines,
        (
            "time",
            f"up to {_time(recipe, machine, rounds, weights, known)}{more}; answers are usually shorter. Starting, loading and rewards are not counted",
        ),
    ]


def _time(recipe: Recipe, machine: Machine, rounds: list[list[Cost]], weights: int, known: Pace | None) -> str:
    """Return how long a run takes, and by which pace; engines that a step has no chunk for, and ranks on one CPU, make it no faster."""
    on_cards = bool(machine.cards) or accelerator().on_cards
    pace = known or _rough(machine, on_cards)
    costs = [cost for made in rounds for cost in made]
    made = sum((cost.made or 0) / (_busy(recipe, machine, cost) if on_cards else 1) for cost in costs)
    learned = _total(rounds, "learned") / (machine.trainers if on_cards else 1)
    learned += readers.as_learned(recipe, costs, weights) / (machine.trainers if on_cards else 1)
    took = seconds(pace, weights, made, learned) + recipe.rounds * SWAP_SECONDS
    minutes = math.ceil(took / 60)
    said = f"{minutes} minutes" if 1 < minutes < 100 else "a minute" if minutes <= 1 else f"{took / 3600:.1f} hours"
    return f"{said}, {pace.source}"


def _rough(machine: Machine, on_cards: bool) -> Pace:
    pace = GPU if on_cards else CPU
    return replace(pace, made=pace.made * TRANSFORMERS_SHARE) if chosen_generator(machine) == "transformers" else pace


def _busy(recipe: Recipe, machine: Machine, cost: Cost) -> int:
    """Return how many engines have something to do in a step. Chunks are as large as the recipe says only where a run on cards is exact."""
    if recipe.exact is not True or not cost.answers:
        return machine.generators
    return min(machine.generators, math.ceil(cost.answers / recipe.chunk))


def _total(rounds: list[list[Cost]], field_: str) -> int:
    return sum(getattr(cost, field_) or 0 for round_costs in rounds for cost in round_costs)
