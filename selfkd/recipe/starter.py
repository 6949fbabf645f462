"""A first recipe for a file of questions: what its answers are, how they can be marked, which rows are held out, and why.

Looks at rows and chooses; writes nothing (`starter_files.py` says what is written). What it chose is told in words, and each choice can
be made by the user instead.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from selfkd.core import digest
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.prompts.forms import ANSWER_NAMES, PROMPT_NAMES, likely
from selfkd.prompts.read import gold_hint, read_prompts
from selfkd.prompts.rows import rows_of_file

Kind = Literal["number", "choice", "code", "short", "text"]
KINDS = get_args(Kind)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ENDS_IN_NUMBER = re.compile(
    rf"(?:^|####|=|\b(?:is|answer:?))\s*\**[$£€]?\s*{NUMBER.pattern}\s*[%°]?[\w/²³ ]{{0,12}}\**\.?\s*\Z", re.I
)
NEARLY_ALL = 0.95  # of the answers, that are to be of a kind: the rest are mistakes of the data
MOST_OPTIONS, OPTION_CHARS, ROWS_PER_OPTION = 12, 40, 3
SHORT_CHARS = 80  # of an answer that can be marked by being there
LEAST_ROWS = 24
MOST_HELD_OUT, HELD_OUT = 200, 0.2
TEST_FROM = 600  # rows from which a test split is held out beside dev
EXAMPLES = 4  # solved rows that the teacher is shown
EXAMPLE_CHARS = 1200  # of one of them
TESTS = "tests"  # the column of code_tests


@dataclass(frozen=True)
class Row:
    """A row to be written: the conversation, the gold answer or None, other columns, and its question as one text."""

    messages: Sequence[Mapping[str, str]]
    answer: str | None
    meta: Mapping[str, Any]

    @property
    def question(self) -> str:
        return "\n".join(turn["content"] for turn in self.messages)

    @property
    def is_one_question(self) -> bool:
        return len(self.messages) == 1 and self.messages[0]["role"] == "user"


@dataclass(frozen=True)
class Found:
    """What was found in a file, and chosen: the rows of each split, the solved ones that the teacher is shown, and why."""

    kind: Kind
    options: tuple[str, ...]
    splits: Mapping[str, Sequence[Row]]
    examples: Sequence[Row]
    said: Sequence[str]

    @property
    def rows(self) -> list[Row]:
        return [*self.examples, *(row for rows in self.splits.values() for row in rows)]


def look(path: Path, prompt: str | None = None, answer: str | None = None, kind: Kind | None = None) -> Found:
    """Read a file of rows (.jsonl, .json, .csv, .parquet) and choose. UsageError where it cannot be read, or nothing can be marked."""
    words = _columns(path, prompt, answer)
    rows, repeats = _rows(path, words)
    if len(rows) < LEAST_ROWS:
        what = f"{counted(len(rows), 'row')} with a question of its own, and {LEAST_ROWS} are the fewest that leave some to hold out"
        raise UsageError(what, str(path), "Add rows, or write the recipe by hand: selfkd help recipe")
    chosen, options, why = _kind(rows, kind, path)
    usable = [row for row in rows if chosen == "code" or row.answer]
    left_out = len(rows) - len(usable)
    splits, examples = _split(usable, chosen, options)
    named = " → ".join(str(words[name]) for name in ("prompt", "messages", "answer") if name in words)
    said = [
        f"{counted(len(usable), 'row')}{f', {named}' if named else ''}",
        *([f"left out: {counted(repeats, 'row')} whose question is there already"] if repeats else []),
        *([f"left out: {counted(left_out, 'row')} without an answer"] if left_out else []),
        f"{chosen}: {why}",
        _said_of(splits, examples),
    ]
    return Found(chosen, options, splits, examples, said)


# ------------------------------------------------------------------------------------------------------------------ rows


def _columns(path: Path, prompt: str | None, answer: str | None) -> dict[str, str]:
    """Return the words of a source that name its columns: the user's, else those that its names tell where readers need them said."""
    if not path.is_file():
        raise UsageError("no such file", str(path), 'A row looks like {"question": "2 + 2 = ?", "answer": "4"}')
    words = {name: column for name, column in (("prompt", prompt), ("answer", answer)) if column}
    first = next((row for row, _ in islice(rows_of_file(path), 1)), None)
    if first is None:
        raise UsageError("no rows in this file", str(path))
    if not isinstance(first, Mapping):
        return words
    if "prompt" not in words and likely(first, ("messages", "conversations", "conversation")) is None:
        found = likely(first, PROMPT_NAMES)
        if found is None:
            raise UsageError(
                "which column is the question?", str(path), f"Say it: --prompt COLUMN. Columns: {', '.join(first)}"
            )
        words["prompt"] = found
    if "answer" not in words and "prompt" in words:
        found = likely([name for name in first if name != words["prompt"]], ANSWER_NAMES)
        words |= {"answer": found} if found else {}
    return words


def _rows(path: Path, words: Mapping[str, str]) -> tuple[list[Row], int]:
    """Return the rows, each question once, and how many were left out for that."""
    frame = read_prompts({"file": str(path.absolute()), **words}, [], "train")
    if hint := gold_hint(frame):
        raise UsageError(hint, str(path), "Say it: --answer COLUMN")
    found: dict[str, Row] = {}
    for one in frame.iter_rows(named=True):
        row = Row(one["messages"], one["answer"], json.loads(one["meta"] or "{}"))
        found.setdefault(row.question, row)
    return list(found.values()), frame.height - len(found)


# ------------------------------------------------------------------------------------------------------------------ kinds


def _kind(rows: Sequence[Row], wanted: Kind | None, path: Path) -> tuple[Kind, tuple[str, ...], str]:
    """Return of what kind the answers are, the options where they are a choice, and a sentence that says how they are marked."""
    answers = [row.answer.strip() for row in rows if row.answer and row.answer.strip()]
    tested = sum(bool(row.meta.get(TESTS)) for row in rows)
    if wanted == "code" or (wanted is None and tested >= NEARLY_ALL * len(rows)):
        if not tested:
            raise UsageError(
                f"no row has a column '{TESTS}'", str(path), "Tests look like those in docs/rewards.md: code_tests"
            )
        return (
            "code",
            (),
            f"{tested} of {len(rows)} rows have tests, which the programs of the model are run against behind walls",
        )
    if not answers:
        fix = (
            "Recipes that need none: lmsi, ttrl, self-rewarding (selfkd recipes).   Or say which column it is: --answer COLUMN"
        )
        raise UsageError("no row has an answer that completions could be marked by", str(path), fix)
    options = _options(answers)
    ending = sum(bool(ENDS_IN_NUMBER.search(text)) for text in answers)
    chosen = wanted or _told_by(answers, options, ending)
    return chosen, options if chosen == "choice" else (), _why(chosen, answers, options, ending)


def _told_by(answers: Sequence[str], options: Sequence[str], ending: int) -> Kind:
    if ending >= NEARLY_ALL * len(answers):
        return "number"
    if options:
        return "choice"
    short = sum(len(text) <= SHORT_CHARS and "\n" not in text for text in answers)
    return "short" if short >= NEARLY_ALL * len(answers) else "text"


def _options(answers: Sequence[str]) -> tuple[str, ...]:
    """Return what all answers are one of, if there are so few of them; the same word in other case is one."""
    counts = Counter(answers)
    few = 2 <= len(counts) <= MOST_OPTIONS and len(answers) >= ROWS_PER_OPTION * len(counts)
    short = all(len(text) <= OPTION_CHARS and "\n" not in text and '"""' not in text for text in counts)  # a reward quotes them
    distinct = len({text.casefold() for text in counts}) == len(counts)
    return tuple(sorted(counts)) if few and short and distinct else ()


def _why(kind: Kind, answers: Sequence[str], options: Sequence[str], ending: int) -> str:
    return {
        "number": f"{ending} of {len(answers)} answers end in a number, which the last number of a completion must equal",
        "choice": f"all answers are one of {', '.join(options)}; the last of them that a completion names must be the right one",
        "short": "answers are short; the last line of a completion must say the right one",
        "text": "answers are texts; a completion is marked by the words that it shares with the right one",
    }[kind]


# ----------------------------------------------------------------------------------------------------------------- splits


def _split(rows: Sequence[Row], kind: Kind, options: Sequence[str]) -> tuple[dict[str, list[Row]], list[Row]]:
    """Return the rows of each split and the examples, all drawn by a hash of the question: adding rows moves no other row."""
    ordered = sorted(rows, key=lambda row: digest.uniform("split", row.question))
    held = min(MOST_HELD_OUT, int(HELD_OUT * len(rows)))
    dev, rest = ordered[:held], ordered[held:]
    test, rest = (rest[:held], rest[held:]) if len(rows) >= TEST_FROM else ([], rest)
    examples = [] if kind in ("code", "text") else _examples(rest, options)
    train = [row for row in rest if row not in examples]
    return {"train": train, "dev": dev, **({"test": test} if test else {})}, examples


def _examples(rows: Sequence[Row], options: Sequence[str]) -> list[Row]:
    """Return some solved rows to show: short ones, of options each in turn, so that no answer is suggested."""
    if not all(row.is_one_question for row in rows):
        return []
    short = sorted(rows, key=lambda row: len(row.question) + len(row.answer or ""))[: max(EXAMPLES, len(rows) // 2)]
    drawn = sorted(short, key=lambda row: digest.uniform("example", row.question))
    if options:
        seen: Counter[str] = Counter()
        ranked = [(seen.update([row.answer or ""]), seen[row.answer or ""], row) for row in drawn]
        drawn = [row for _, _, row in sorted(ranked, key=lambda one: one[1])]
    found = drawn[:EXAMPLES]
    return found if all(len(row.question) + len(row.answer or "") <= EXAMPLE_CHARS for row in found) else []


def _said_of(splits: Mapping[str, Sequence[Row]], examples: Sequence[Row]) -> str:
    sizes = ", ".join(f"{len(rows)} {name}" for name, rows in splits.items())
    shown = f"; {len(examples)} solved ones are shown to the teacher, and not to the student" if examples else ""
    return f"split by a hash of the question: {sizes}{shown}"
