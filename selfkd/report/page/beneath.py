"""What lies beneath the figures of a run: where each checkpoint comes from, what the recipe says and when that changed, and what was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from selfkd.chain import rounded
from selfkd.chain.records import Commit
from selfkd.errors import SelfkdError
from selfkd.report import as_prompted, model_card, rows
from selfkd.report.page.opened import Opened
from selfkd.report.page.text import shortened

ROWS = 6  # training rows that are shown


@dataclass(frozen=True)
class Checkpoint:
    """A model that a step made: which one, from what, by how many rows, and where it lies, '' where it is not on disk any more."""

    round: int
    role: str
    step: str
    digest: str
    made: str
    rows: int
    path: str
    head: bool


@dataclass(frozen=True)
class Change:
    """An amendment: when it was made, behind which round, and what it changed."""

    when: str
    sealed: int
    changed: Sequence[str]


@dataclass(frozen=True)
class Span:
    """A part of a training row: its text, whether its tokens are learned, and whether it is a control token."""

    text: str
    trained: bool
    control: bool = False


@dataclass(frozen=True)
class Learned:
    """A training row: what it is, and for each side of it (a completion; chosen and rejected) its spans."""

    title: str
    note: str
    sides: Mapping[str, Sequence[Span]]


@dataclass(frozen=True)
class Training:
    """Training rows of a round. `tokens`: they are shown to the token, as the trainer has them; else by their messages."""

    index: int
    count: int
    shown: Sequence[Learned]
    tokens: bool
    undated: str = ""


# ---- where a checkpoint comes from ----


def lineage(run: Opened) -> list[Checkpoint]:
    """Return the models that sealed and unsealed rounds made, in order."""
    heads = {(seal.round, role): entry.digest for seal in run.seals if seal.accepted for role, entry in seal.models.items()}
    return [
        Checkpoint(
            round=index,
            role=role,
            step=commit.step,
            digest=entry.digest,
            made=_made(run, commit),
            rows=int(commit.notes.get("train", {}).get("rows", 0)),
            path=_lies(run, entry.path, role, commit),
            head=heads.get((index, role)) == entry.digest,
        )
        for index, commits in sorted(run.commits.items())
        for commit in commits
        for role, entry in commit.models.items()
    ]


def _lies(run: Opened, path: str, role: str, commit: Commit) -> str:
    folder = run.paths.folder
    try:
        found = rounded.located(folder, commit.models[role].model(role)).path
    except SelfkdError:
        found = path
    return found if (folder / found).is_dir() else ""


def _made(run: Opened, commit: Commit) -> str:
    """Return in words what a step made a model of."""
    said = commit.identity
    if commit.verb == "load":
        return f"loaded from {run.state.model}"
    if commit.verb == "average":
        return "the average of " + ", ".join(f"{share:g} of {name}" for name, share in dict(said.get("of", {})).items())
    from_ = f"{said.get('loss', commit.verb)} from {said.get('from', 'now')}"
    return from_ + (f", held against {said['reference']}" if said.get("reference") else "")


# ---- the recipe ----


def changes(run: Opened) -> list[Change]:
    return [Change(one.when, one.sealed, one.changed) for one in run.amendments]


def recipe_text(run: Opened) -> str:
    """Return the recipe as it was written, as it is in force where it was amended or no text was kept."""
    written = run.paths.recipe
    if run.amendments or not written.is_file():
        return model_card.recipe_text(run.recipe)
    return written.read_text("utf-8", "replace")


# ---- what was trained on ----


def training(run: Opened) -> Training | None:
    """Return rows that the newest model at the head was trained on: of the best round, else of the newest that trained; None where none did."""
    trained = [index for index, commits in run.commits.items() if any("rows" in one.tables for one in commits)]
    if not trained:
        return None
    index = run.best if run.best in trained else max(trained)
    tok = _tokenizer(run)
    try:
        found = rows.training_rows(run.paths.folder, index, n=ROWS, ids=tok is not None)
    except SelfkdError:  # `verify` names a table that is gone
        return None
    undated = as_prompted.UNDATED if tok and as_prompted.undated(tok) else ""
    both = zip(found.first.iter_rows(named=True), _sides(run, found, tok), strict=True)
    shown = [_learned(row, sides, refused) for row, (sides, refused) in both]
    return Training(index, found.matched, shown, tok is not None, undated)


def _tokenizer(run: Opened) -> Any:
    """Return the tokenizer of a run; None where there is none here, or nothing that reads it: messages say it too."""
    try:
        import_module("selfkd.report.learned")  # labels rows by the trainer's own code, which needs torch
        return as_prompted.tokenizer_of(run.paths.folder)
    except (ImportError, SelfkdError, OSError, ValueError):
        return None


def _sides(run: Opened, found: rows.Found, tok: Any) -> list[tuple[dict[str, list[Span]], str]]:
    """Return of each row its sides as the trainer learned them, and why it was left out, '' where it was not; without `tok` its messages."""
    records = found.first.to_dicts()
    if tok is None:
        return [(_by_message(row), "") for row in records]
    from selfkd.report.learned import spans
    from selfkd.report.learned_text import rows_in_tokens

    shown = []
    for record, (row, _) in zip(records, rows_in_tokens(found, tok, run.paths.folder), strict=True):
        sides = {
            side.name: [Span(shortened(one.text), one.learned, one.control) for one in spans(tok, side)] for side in row.sides
        }
        shown.append((sides or _by_message(record, trained=False), row.refused))
    return shown


def _by_message(row: Mapping[str, Any], trained: bool = True) -> dict[str, list[Span]]:
    asked = [Span(f"[{one['role']}] {shortened(one['content'])}\n", False) for one in row["messages"] or ()]
    if row["ranked"] is not None:
        return {f"ranked {at}": [*asked, Span(shortened(one["text"]), trained)] for at, one in enumerate(row["ranked"], 1)}
    sides = {"completion" if row["rejected"] is None else "chosen": row["chosen"], "rejected": row["rejected"]}
    return {name: [*asked, Span(shortened(text), trained)] for name, text in sides.items() if text is not None}


def _learned(row: Mapping[str, Any], sides: Mapping[str, Sequence[Span]], refused: str) -> Learned:
    note = f"{row['role']}, weight {row['weight']:g}, from {', '.join(row['samples'] or ()) or 'no sample'}"
    return Learned(f"{row['kind']} {row['id']}", f"{note}; left out: {refused}" if refused else note, sides)
