"""What a model saw, to the token: prompts and answers as the engine was asked and the trainer learned them, control tokens included.

Encodes with the tokenizer and the words that lie beside the run's own weights, by the code that generation and training use.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.rule import Rule
from rich.text import Text

from selfkd.backend import tokens
from selfkd.backend.chat import CLOCK
from selfkd.backend.chat_template import names_in
from selfkd.chain import records, rounded
from selfkd.chain.paths import Paths
from selfkd.chain.records import Commit
from selfkd.core import install
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.report.rows import Found

CONTROL = "bold cyan"  # tokens that no text can say
SIDES = ("chosen", "rejected")
UNDATED = "The chat template writes the date, and this run is older than the record of it: today's is shown."


@dataclass(frozen=True)
class Piece:
    """A run of tokens: their text, and whether it is a control token."""

    text: str
    control: bool


@dataclass(frozen=True)
class Shown:
    """One row: what it is, the ids of the prompt, those of each answer by its name, and of a teacher's prompt if it has one."""

    title: str
    prompt: Sequence[int]
    answers: Mapping[str, Sequence[int]]
    teacher: Sequence[int] = ()


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer of a run, from whichever of its checkpoints is still on disk; UsageError where none is."""
    paths = Paths(folder)
    for names in paths.rounds():
        for made in (records.read(path, Commit) for path in names.commits()):
            for entry in made.models.values():
                lies = folder / rounded.located(folder, entry.model("")).path
                if (lies / "tokenizer_config.json").is_file():
                    return _loaded(lies)
    what = "no checkpoint of this run has a tokenizer: it has no model yet, or a fake one, or `keep` had all of them taken away"
    raise UsageError(what, str(folder), "What was asked, as messages: leave out --as-prompted.")


def _loaded(model: Path) -> Any:
    try:
        return tokens.tokenizer(str(model))
    except ImportError as error:
        raise UsageError(f"transformers cannot be imported: {error}", "--as-prompted", install.extra("engine")) from error


def shown(found: Found, tok: Any) -> Iterator[Shown]:
    """Yield the ids of each row that was found."""
    one = _training_row if found.table == "rows" else _sample
    return (one(row, tok) for row in found.first.iter_rows(named=True))


def _sample(row: Mapping[str, Any], tok: Any) -> Shown:
    """The ids of a sample as they were drawn; of one that nobody sampled as they would be learned."""
    messages, drawn = row["teacher_messages"], row["token_ids"]
    answer = drawn if drawn is not None else _learned(tok, row["text"], None, row["finish_reason"] == "stop", messages)
    return Shown(f"{row['stream']} {row['id']}", tokens.encode_prompt(tok, messages), {"answer": answer})


def _training_row(row: Mapping[str, Any], tok: Any) -> Shown:
    messages = row["messages"]
    sides = [side for side in SIDES if row[side] is not None]
    answers = {
        side: _learned(tok, row[side], row[f"{side}_ids"], row[f"{side}_ended"] is not False, messages) for side in sides
    }
    told = row["teacher_messages"]
    teacher = tokens.encode_prompt(tok, told) if told else ()
    return Shown(f"{row['kind']} {row['id']}", tokens.encode_prompt(tok, messages), answers, teacher)


def _learned(tok: Any, text: str | None, sampled: Any, ended: bool, messages: Any) -> list[int]:
    """Return an answer's ids as training has them, with the end that it gives them."""
    return tokens.encode_completion(tok, text or "", sampled, ended, messages=messages)


def undated(tok: Any) -> bool:
    """Whether the template writes a date that nobody kept."""
    return bool(tok.chat_template) and not tokens.chat_of(tok).now and CLOCK in names_in(tok.get_chat_template())


# ---- on a terminal ----


def pieces(tok: Any, before: Sequence[int], ids: Sequence[int]) -> Iterator[Piece]:
    """Yield what ids say behind `before`, in runs; together they are the text to the letter."""
    control = set(tok.all_special_ids) | tokens.end_ids(tok)
    lead = decoded(tok, before)
    begin = 0
    for place, token in enumerate([*ids, None]):
        is_control = token is None or token in control
        if not is_control:
            continue
        for stop, marked in ((place, False), (place + 1, True))[: 1 if token is None else 2]:
            if stop > begin:
                whole = decoded(tok, [*before, *ids[:stop]])
                yield Piece(whole[len(lead) :], marked)
                lead, begin = whole, stop


def decoded(tok: Any, ids: Sequence[int]) -> str:
    text: str = tok.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def print_prompted(found: Found, tok: Any, ids: bool, to: Console) -> None:
    """Print each row as the model saw it; with `ids` the numbers too, one list per part."""
    to.print(Text(f"{found.title}: {found.matched} of {found.total}, showing {found.first.height}", "bold"))
    if undated(tok):
        to.print(Text(UNDATED, "yellow"), soft_wrap=True)
    for one in shown(found, tok):
        to.print(Rule(Text(one.title, "dim"), align="left", style="dim"))
        _print_part("prompt", tok, (), one.prompt, ids, to)
        if one.teacher:
            _print_part("prompt of the teacher", tok, (), one.teacher, ids, to)
        for name, answer in one.answers.items():
            _print_part(name, tok, one.prompt, answer, ids, to)


def _print_part(title: str, tok: Any, before: Sequence[int], part: Sequence[int], ids: bool, to: Console) -> None:
    to.print(Text(f"── {title}, {counted(len(part), 'token')}", "dim"), soft_wrap=True)
    text = Text()
    for piece in pieces(tok, before, part):
        text.append(piece.text, CONTROL if piece.control else "")
    to.print(text, soft_wrap=True)
    if ids:
        to.print(Text(json.dumps(list(part)), "dim"), soft_wrap=True)
