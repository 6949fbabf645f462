"""What a recipe will cost: requests, tokens, rows, memory, disk and hours, as upper bounds, from words alone. Starts nothing.

Every figure assumes that each answer is as long as it may be and that nothing is dropped but what a cap drops. What is not known
here (the size of a model or of a data set that lies on a hub) is said to be unknown, not guessed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selfkd.backend.machine import Machine
from selfkd.errors import SelfkdError
from selfkd.prompts.read import on_hub, read_prompts
from selfkd.recipe.schema import Recipe
from selfkd.steps import Build, Gold, Measure, Recall, Sample, Select, Step, Train

# Parameters times tokens per second, so that speed falls as models grow. CPU: SmolLM2-135M made 280 and learned 147 tokens/s
# on one thread. GPU: round figures for one current data-centre card. Orders of magnitude; a run shows its own rate.
SPEED = {"cpu": (280 * 135e6, 147 * 135e6), "gpu": (3.5e12, 1.5e13)}
SWAP_SECONDS = 2.0
CHARS_PER_TOKEN = 2.5  # of a prompt with its template, on the safe side: English text has about four
BYTES_PER_TOKEN = 10  # of a stored answer: text and ids, compressed, with their share of the other columns
GB = 1e9


@dataclass
class Count:
    """Upper bounds of what a round holds so far; None is unknown, and anything times unknown is unknown."""

    prompts: int | None
    streams: dict[str, int | None] = field(default_factory=dict)
    rows: dict[str, int | None] = field(default_factory=dict)

    def samples(self, stream: str | None = None) -> int | None:
        chosen = [self.streams.get(stream)] if stream else list(self.streams.values())
        return None if any(count is None for count in chosen) else sum(count for count in chosen if count is not None)


@dataclass(frozen=True)
class Cost:
    """One step of one round. `made` tokens are generated, `learned` ones are trained on."""

    step: str
    what: str
    made: int | None = 0
    learned: int | None = 0


def plan(recipe: Recipe, machine: Machine | None = None) -> list[tuple[str, str]]:
    """(what, how much), line by line: each step of the first and of the last round, then memory, disk and hours of the whole."""
    machine = machine or Machine()
    sizes = {split: size(recipe, split) for split in recipe.splits()}
    rounds = [costs(recipe, index, sizes) for index in range(recipe.rounds + 1)]
    lines = [("prompts", ", ".join(f"{split} {_number(count)}" for split, count in sizes.items()))]
    for index in dict.fromkeys((0, 1, recipe.rounds)):
        lines += [(f"round {index}  {cost.step}", cost.what) for cost in rounds[index] if cost.what]
    weights = parameters(recipe.model_source()["path"])
    return [*lines, *_whole(recipe, machine, rounds, weights)]


def text(recipe: Recipe, machine: Machine | None = None) -> str:
    lines = plan(recipe, machine)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name.ljust(width)}  {what}" for name, what in lines) + "\nUpper bounds; nothing was started."


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


# ---- steps ----


def costs(recipe: Recipe, index: int, sizes: Mapping[str, int | None]) -> list[Cost]:
    train = sizes["train"]
    drawn = min(recipe.take, train) if recipe.take and train and index else recipe.take if recipe.take and index else train
    count = Count(drawn)
    return [_cost(step, count, recipe, sizes) for step in recipe.steps_of(index)]


def _cost(step: Step, count: Count, recipe: Recipe, sizes: Mapping[str, int | None]) -> Cost:
    if isinstance(step, Measure):
        split = sizes.get(step.split)
        asked = _times(min(step.limit, split) if step.limit and split else step.limit or split, step.n)
        return _asked(step, asked, step.max_tokens)
    if isinstance(step, Sample):
        count.streams[step.as_] = asked = _times(count.samples(step.of) if step.of else count.prompts, step.n)
        return _asked(step, asked, step.max_tokens)
    if isinstance(step, Gold):
        count.streams[step.as_] = count.prompts
    if isinstance(step, Recall):
        count.streams[step.as_ or "recalled"] = None
    if isinstance(step, Select):
        return _capped(step, count)
    if isinstance(step, Build):
        count.rows[step.as_] = rows = _built(step, count)
        return Cost(step.name, f"{_number(rows)} rows")
    return _learned(step, count, recipe) if isinstance(step, Train) else Cost(step.name, "")


def _asked(step: Sample | Measure, asked: int | None, longest: int) -> Cost:
    tokens = _times(asked, longest)
    return Cost(step.name, f"{_number(asked)} answers, {_number(tokens)} tokens", made=tokens)


def _capped(step: Select, count: Count) -> Cost:
    """A cap bounds every stream by itself, which is more than it does to all of them together: an upper bound still."""
    if step.of == "prompts":
        count.prompts = _least(count.prompts, step.limit)
        return Cost(step.name, f"at most {_number(count.prompts)} prompts") if step.limit else Cost(step.name, "")
    most = _least(_times(count.prompts, step.per_prompt) if step.per_prompt else None, step.limit)
    left = _least(count.samples(), most)
    count.streams = {stream: _least(made, most) for stream, made in count.streams.items()}
    if step.of is None and len(count.streams) > 1 and most is not None:
        count.streams = {"kept": left}
    return Cost(step.name, f"at most {_number(left)} samples kept") if most is not None else Cost(step.name, "")


def _built(step: Build, count: Count) -> int | None:
    if step.kind == "pair":
        return _times(count.prompts, step.per_prompt)
    return _times(count.samples(step.of if step.of in count.streams else None), max(1, len(step.templates())))


def _learned(step: Train, count: Count, recipe: Recipe) -> Cost:
    rows = count.rows.get(step.of, count.samples())
    epochs, most = float(step.trl.get("num_train_epochs", 1)), int(step.trl.get("max_steps", 0))
    seen = None if rows is None else math.ceil(rows * epochs)
    if most > 0:
        batch = step.trl.get("per_device_train_batch_size", 8) * step.trl.get("gradient_accumulation_steps", 1)
        seen = _least(seen, most * batch) if "num_train_epochs" in step.trl else most * batch
    tokens = _times(seen, _row_tokens(recipe) * (2 if step.loss == "dpo" else 1))
    return Cost(step.name, f"{_number(rows)} rows, {_number(seen)} read in all, {_number(tokens)} tokens", learned=tokens)


def _row_tokens(recipe: Recipe) -> int:
    """A prompt of the mean length and the longest answer, where the prompts are here; else as much as the context holds."""
    longest = max((step.max_tokens for step in recipe.steps_of(1) if isinstance(step, Sample)), default=recipe.context)
    source = recipe.splits()["train"]
    if on_hub(source):
        return recipe.context
    try:
        messages = read_prompts(source, recipe.folders, "train")["messages"]
    except SelfkdError:
        return recipe.context
    chars = int(messages.explode().struct.field("content").str.len_chars().sum()) / max(1, len(messages))
    return min(recipe.context, math.ceil(chars / CHARS_PER_TOKEN) + longest)


# ---- the whole ----


def _whole(recipe: Recipe, machine: Machine, rounds: list[list[Cost]], weights: int | None) -> list[tuple[str, str]]:
    made, learned = _total(rounds, "made"), _total(rounds, "learned")
    unknown = any(None in (cost.made, cost.learned) for round_costs in rounds for cost in round_costs)
    more = ", and what is marked with ?" if unknown else ""
    lines = [("all rounds", f"{made:,} tokens made, {learned:,} tokens learned{more}")]
    if weights is None:
        return [*lines, ("memory, disk, hours", "unknown until the model is here")]
    checkpoints = min(recipe.rounds + 1, recipe.keep.last + recipe.keep.best + recipe.keep.base + 1)  # one is being written
    disk = 4 * weights * checkpoints + BYTES_PER_TOKEN * made
    engine, trainer = 2 * weights / GB + machine.kv_cache_gb, 16 * weights / GB
    lines += [("parameters", f"about {weights / 1e6:,.0f} million")]
    lines += [("memory", f"engine {engine:.1f} GB, trainer {trainer:.1f} GB (fp32 weights, gradients, AdamW) and activations")]
    lines += [("disk", f"{disk / GB:.1f} GB: {checkpoints} checkpoints and the samples{more}")]
    return [
        *lines,
        ("hours", f"up to {_hours(made, learned, weights, recipe.rounds, machine)}{more}; answers are usually shorter"),
    ]


def _hours(made: int, learned: int, weights: int, rounds: int, machine: Machine) -> str:
    place = "gpu" if Path("/dev/nvidia0").exists() else "cpu"
    makes, learns = SPEED[place]
    generators, trainers = (machine.generators, machine.trainers) if place == "gpu" else (1, 1)
    seconds = made * weights / makes / generators + learned * weights / learns / trainers + rounds * SWAP_SECONDS
    return f"{seconds / 3600:.1f}, roughly, on this machine's {place.upper()}"


def _total(rounds: list[list[Cost]], field_: str) -> int:
    return sum(getattr(cost, field_) or 0 for round_costs in rounds for cost in round_costs)


def _times(count: int | None, by: int) -> int | None:
    return None if count is None else count * by


def _least(first: int | None, second: int | None) -> int | None:
    known = [value for value in (first, second) if value is not None]
    return min(known) if known else None


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"


# ---- how large a model is ----


def parameters(path: str) -> int | None:
    """Of a local folder by its safetensors headers, of a GGUF file by its size and the bits its name tells; else None."""
    found = _local(path)
    if found is None:
        return None
    if found.is_dir():
        return sum(_header(shard) for shard in found.glob("*.safetensors")) or None
    bits = re.search(r"[QF](\d+)", found.name.upper())
    return int(found.stat().st_size * 8 / (int(bits[1]) + (0 if int(bits[1]) >= 16 else 1))) if bits else None


def _local(path: str) -> Path | None:
    if path.startswith("package:"):
        spec = importlib.util.find_spec(path.removeprefix("package:"))
        places = list(spec.submodule_search_locations or []) if spec else []
        return next((file for place in places for file in sorted(Path(place).glob("**/*.gguf"))), None)
    found = Path(path).expanduser()
    return found if found.exists() else None


def _header(shard: Path) -> int:
    """Parameters in one safetensors file: the product of each shape in its header."""
    with shard.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        tensors: dict[str, Any] = json.loads(handle.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")
