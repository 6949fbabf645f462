"""Where a thing in a run came from, and what came of it: `trace` finds what an id names, then goes back and forward."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import polars as pl

from selfkd.chain.records import Commit
from selfkd.chain.steering import best_round
from selfkd.core.model_ref import WHENS
from selfkd.core.pool import scan
from selfkd.core.wording import counted
from selfkd.errors import UsageError
from selfkd.report.history import Checkpoint, Found, History
from selfkd.report.node import Node, Trace
from selfkd.report.origins import (
    ROW_TEXTS,
    checkpoint_links,
    checkpoint_node,
    opening,
    prompt_node,
    row_line,
    row_links,
    sample_node,
    samples_of,
)
from selfkd.report.uses import checkpoint_uses, prompt_uses, row_uses, sample_uses
from selfkd.steps import LoadStep

FEWEST = 3  # characters of an id that may stand for the whole
MOST_NEAR = 5  # ids that an error names
NAMED_ROUND = re.compile(r"round-\d+")
ROUND = re.compile(r"(round-)?\d{1,5}")  # after '@'; a longer number is the beginning of a digest
WAYS = "Name a training row, a sample, a judgment or a prompt by its id (selfkd show), or a checkpoint: policy@2, best, base, a digest"


@dataclass(frozen=True)
class Known:
    """An id of the run: what it names there, and how it is traced."""

    kind: str
    id: str
    trace: Callable[[], Trace]


def trace(folder: Path, name: str, index: int | None = None) -> Trace:
    """Return what `name` came of in a run, and what came of it.

    `name` is the id of a training row, a sample, a judgment or a prompt, or its beginning; or a checkpoint: role@when, a number for a
    round, or the beginning of its digest. `index` looks at rows of one round only. UsageError, with what is near, where that is nothing or
    several things.
    """
    history = History.of(folder)
    if index is not None and all(one.round != index for one in history.commits):
        raise UsageError(f"there is no round {index}", str(folder), f"Rounds: 0 to {max(one.round for one in history.commits)}")
    found = _checkpoint(history, name) or _by_id(history, name, index)
    return replace(found, unproved=history.changed())


# ---- checkpoints ----


def _checkpoint(history: History, name: str) -> Trace | None:
    """Return the trace of the checkpoint that a name says by its role and time; None where it says none."""
    roles = list(dict.fromkeys(one.role for one in history.checkpoints))
    role, at, when = name.rpartition("@")
    if name in roles:
        role, when = name, "now"
    if when not in WHENS and not (ROUND if at else NAMED_ROUND).fullmatch(when):
        return None
    if not role and len(roles) > 1:
        raise UsageError(
            f"'{name}' may be of several models", "trace", f"Write {' or '.join(f'{one}@{name}' for one in roles)}"
        )
    role = role or next(iter(roles), "policy")
    number = int(when.removeprefix("round-")) if when not in WHENS else None
    if number is not None and number not in history.seals and len(when) >= FEWEST and _known(history, name, None):
        return None  # a digest that begins with digits
    found = _at(history, role, when if number is None else number)
    if found is None:
        raise _no_checkpoint(history, name, roles)
    return _trace_checkpoint(history, found, number)


def _at(history: History, role: str, when: str | int) -> Checkpoint | None:
    """Return the model of a role that a round left at its end (of one that was rolled back, that of the round before), or that `when` names."""
    seals = [history.seals[index] for index in sorted(history.seals)]
    if when == "base":
        return next((one for one in history.checkpoints if one.role == role and one.commit.verb == LoadStep.verb), None)
    newest = len(seals) - 1
    index = {"warm": 0, "start": newest - 1, "now": newest, "best": best_round(seals, history.best)}.get(str(when), when)
    seal = history.seals.get(index) if isinstance(index, int) else None
    entry = seal.models.get(role) if seal else None
    return history.checkpoint(entry.digest) if entry else None


def _no_checkpoint(history: History, name: str, roles: Sequence[str]) -> UsageError:
    last = max(history.seals, default=-1)
    rounds = f"rounds 0 to {last} are sealed" if last >= 0 else "no round is sealed yet"
    listed = f"Models: {', '.join(roles) or 'none yet'}; {rounds}."
    return UsageError(f"this run has no checkpoint '{name}'", str(history.paths.folder), listed)


def _trace_checkpoint(history: History, one: Checkpoint, asked: int | None = None) -> Trace:
    back = f"round {asked} was rolled back" if asked is not None and not history.seals[asked].accepted else ""
    subject = checkpoint_node(history, one, "", said=back)
    return Trace(subject, checkpoint_links(history, one), checkpoint_uses(history, one))


# ---- ids ----


def _by_id(history: History, name: str, index: int | None) -> Trace:
    """Return the trace of what has this id, or the only id that begins so."""
    known = _known(history, name, index)
    begins = [one for one in known if one.id == name] or (known if len(name) >= FEWEST else [])
    if len(begins) == 1:
        return begins[0].trace()
    if begins:
        listed = ", ".join(f"{one.kind} {one.id}" for one in begins[:MOST_NEAR]) + (" …" if len(begins) > MOST_NEAR else "")
        raise UsageError(f"'{name}' is the beginning of {counted(len(begins), 'id')}", "trace", f"Write more of it: {listed}")
    raise UsageError(f"nothing in this run is called '{name}'", str(history.paths.folder), _near(history, name, index))


def _known(history: History, name: str, index: int | None) -> list[Known]:
    """Return all whose id begins as `name` does; of `role@digest`, as samples name their model, the checkpoints."""
    role, at, digest = name.rpartition("@")
    found = [
        Known("checkpoint", one.entry.digest, partial(_trace_checkpoint, history, one))
        for one in history.checkpoints
        if one.entry.digest.startswith(digest) and role in ("", one.role)
    ]
    if at:
        return found
    begins = pl.col("id").str.starts_with(name)
    rows = {row["id"] for _, row in history.look("rows", begins, commits=_of_round(history, index))}
    found += [Known("row", one, partial(_trace_row, history, one, index)) for one in sorted(rows)]
    samples = {row["id"]: row["aside"] for _, row in history.look("samples", begins)}
    for one, aside in sorted(samples.items()):
        found.append(Known("judgment" if aside else "sample", one, partial(_trace_sample, history, one)))
    return found + [Known("prompt", one, partial(_trace_prompt, history, one)) for one in _prompts(history, begins)]


def _of_round(history: History, index: int | None) -> list[Commit]:
    return [one for one in history.commits if index is None or one.round == index]


def _prompts(history: History, keep: pl.Expr) -> list[str]:
    """Return the ids of prompts for which `keep` holds, frozen ones and brought ones."""
    files = [path for _, path in history.frozen_prompts()]
    files += [path for commit in history.commits for path in history.files(commit, "prompts")]
    return sorted(set(scan("prompts", files).filter(keep).select("id").collect()["id"]))


def _near(history: History, name: str, index: int | None) -> str:
    """Return which ids are like one that is not there."""
    ids = [*history.table("rows")["id"], *history.table("samples")["id"], *_prompts(history, pl.lit(True))]
    ids += [one.entry.digest[: max(len(name), 12)] for one in history.checkpoints]
    where = f" in round {index}" if index is not None else ""
    close = difflib.get_close_matches(name, dict.fromkeys(ids), n=MOST_NEAR)
    return f"Near{where}: {', '.join(close)}" if close else f"{WAYS}."


def _trace_row(history: History, name: str, index: int | None) -> Trace:
    rows = history.look("rows", pl.col("id") == name, ROW_TEXTS, _of_round(history, index))
    newest = rows[-1]
    rounds = ", ".join(str(commit.round) for commit, _ in rows)
    line = row_line(newest)
    doubt = _differ(rows)
    facts = {**line.facts, "rounds": [commit.round for commit, _ in rows], "kind": newest[1]["kind"]}
    said = f"{line.said} · round {rounds} · teaches {opening(newest[1]['chosen'])}"
    return Trace(Node("", "row", name, said, facts, doubt), row_links(history, newest), row_uses(history, rows))


def _differ(rows: Sequence[Found]) -> str:
    """Return in what the rows of one id differ over the rounds, or ''."""
    first = rows[0][1]
    fields = sorted({field for _, row in rows for field in row if row[field] != first[field]})
    if not fields:
        return ""
    return (
        f"its rounds do not hold the same row: {', '.join(fields)} differ; what stands here is that of the newest (--round K)"
    )


def _trace_sample(history: History, name: str) -> Trace:
    rows = samples_of(history, [name])[name]
    node = sample_node(history, name, "", rows)
    return Trace(replace(node, links=()), node.links, sample_uses(history, rows))


def _trace_prompt(history: History, name: str) -> Trace:
    node = prompt_node(history, name, "")
    return Trace(replace(node, links=()), node.links, prompt_uses(history, name))
