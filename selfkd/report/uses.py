"""Forward from a training row, a sample, a prompt or a checkpoint: to the rows it became, the updates that learned it, and their checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import polars as pl

from selfkd.chain.records import Commit
from selfkd.core.wording import counted
from selfkd.report.history import Checkpoint, Found, History
from selfkd.report.node import Node
from selfkd.report.origins import checkpoint_node, copies, doubted, row_line, rows_of, step_node, told
from selfkd.steps.measure import MeasureStep
from selfkd.steps.train import TrainStep

Trained = tuple[Commit, set[str], Mapping[str, str]]  # an update, the rows it learned, and {row: why it was left out}


def updates(history: History, rounds: Sequence[int]) -> list[Trained]:
    """Return the updates of these rounds, each with the rows that it learned and those that it left out."""
    found = list[Trained]()
    for commit in history.commits:
        step = history.step(commit) if commit.round in rounds else None
        if isinstance(step, TrainStep):
            rows, refused = rows_of(history, commit, step)
            found.append((commit, {row["id"] for _, row in rows}, refused))
    return found


def row_uses(history: History, rows: Sequence[Found], known: Sequence[Trained] | None = None) -> list[Node]:
    """Return the updates that learned a row, or left it out, in every round that holds it."""
    rounds = sorted({commit.round for commit, _ in rows})
    name = rows[0][1]["id"]
    nodes = []
    for commit, learned, refused in updates(history, rounds) if known is None else known:
        if commit.round in rounds and name in learned:
            nodes.append(_learned(history, commit, told(commit)))
        elif commit.round in rounds and name in refused:
            nodes.append(step_node(history, commit, "left out by", said=refused[name]))
    return nodes


def _learned(history: History, commit: Commit, said: str) -> Node:
    """Return an update that learned something, with its checkpoint and those that came of that one.

    One that ended within its first epoch did not see all its rows, and which they were is not recorded.
    """
    epochs = commit.notes.get("train", {}).get("epochs")
    early = isinstance(epochs, int | float) and epochs < 1
    unproved = f"the update ended after {epochs:.2g} epochs, and which rows it saw is not recorded" if early else ""
    made = [one for one in history.checkpoints if one.commit is commit]
    links = [checkpoint_node(history, one, "gave", _descendants(history, one)) for one in made]
    return doubted(step_node(history, commit, "learned in", links, said), unproved)


def _descendants(history: History, one: Checkpoint) -> list[Node]:
    """Return the checkpoints that were trained from it or averaged of it, and all that came of these."""
    reached, found = {one.entry.digest}, list[Checkpoint]()
    for later in history.checkpoints:
        grown = [model for field, _, model in history.parents(later) if field == "from" or field.endswith(" of")]
        if later != one and any(model and model.digest in reached for model in grown):
            reached.add(later.entry.digest)
            found.append(later)
    names = ", ".join(f"{each.name} (round {each.commit.round})" for each in found)
    facts = {"ids": [each.entry.digest for each in found]}
    return [Node("from it came", "checkpoints", said=names, facts=facts)] if found else []


# ---- samples ----


def sample_uses(history: History, rows: Sequence[Found]) -> list[Node]:
    """Return what became of a sample: dropped, judged, asked about, brought back, measured, and the rows that it became."""
    name = rows[0][1]["id"]
    fates = _dropped(history, name)
    fates += [step_node(history, commit, "brought back by") for commit, _ in rows if copies(commit)]
    fates += [_measured(history, commit) for commit, _ in rows if commit.outside]
    about = history.look("samples", pl.col("parents").list.contains(name))
    fates += _by_step(history, about, "judged in", [one for one in about if one[1]["aside"]])
    fates += _by_step(history, about, "asked about in", [one for one in about if not one[1]["aside"]])
    return [*fates, *_became(history, [name])]


def _dropped(history: History, name: str) -> list[Node]:
    found = history.look("drops", pl.col("id") == name)
    return [step_node(history, commit, "dropped by", said=row["reason"]) for commit, row in found]


def _measured(history: History, commit: Commit) -> Node:
    metrics, step = dict(commit.metrics), history.step(commit)
    wanted = step.metrics()[:1] if isinstance(step, MeasureStep) else []
    score = [f"{name} {metrics[name]:.4g}" for name in wanted if metrics.get(name) is not None]
    node = step_node(history, commit, "measured in", said=", ".join(score))
    return replace(node, facts={**node.facts, "metrics": metrics})


def _by_step(history: History, every: Sequence[Found], role: str, found: Sequence[Found]) -> list[Node]:
    """Return samples by the step that made them: how many, and which."""
    groups: dict[str, list[Found]] = {}
    for one in found:
        if not copies(one[0]):
            groups.setdefault(history.where(one[0]), []).append(one)
    nodes = []
    for where, rows in groups.items():
        models = ", ".join(dict.fromkeys(row["model"] for _, row in rows))
        facts = {"ids": [row["id"] for _, row in rows], "round": rows[0][0].round}
        nodes.append(Node(role, "samples", where, f"{counted(len(rows), 'sample')} by {models}", facts))
    return nodes


def _became(history: History, names: Sequence[str]) -> list[Node]:
    """Return the rows that samples became, each with the updates that learned it; of many the updates alone."""
    mine = pl.col("samples").list.eval(pl.element().is_in(list(names))).list.any()
    groups: dict[str, list[Found]] = {}
    for one in history.look("rows", mine):
        groups.setdefault(one[1]["id"], []).append(one)
    known = updates(history, sorted({commit.round for rows in groups.values() for commit, _ in rows}))
    if len(names) == 1:
        lines = [(row_line(rows[0]), row_uses(history, rows, known)) for rows in groups.values()]
        return [Node("became", "row", line.id, line.said, line.facts, links=links) for line, links in lines]
    if not groups:
        return []
    nodes = []
    for commit, learned, _ in known:
        if mine_of := [name for name in groups if name in learned]:
            node = _learned(history, commit, f"{counted(len(mine_of), 'row')} of them; {told(commit)}")
            nodes.append(replace(node, facts={**node.facts, "ids": mine_of}))
    return [Node("became", "rows", said=counted(len(groups), "row"), facts={"ids": list(groups)}, links=nodes)]


# ---- prompts and checkpoints ----


def prompt_uses(history: History, name: str) -> list[Node]:
    """Return where a prompt was asked or dropped, and the rows that answers to it became."""
    asked = history.look("samples", pl.col("prompt") == name)
    names = list(dict.fromkeys(row["id"] for _, row in asked))
    return [
        *_dropped(history, name),
        *_by_step(history, asked, "answered in", asked),
        *(_became(history, names) if names else []),
    ]


def checkpoint_uses(history: History, one: Checkpoint) -> list[Node]:
    """Return what a checkpoint answered, was measured at, was trained on or held against, and the rows that its answers became."""
    mine = history.look("samples", pl.col("model") == one.name)
    inside = [found for found in mine if not found[0].outside]
    measured = {history.where(commit): commit for commit, _ in mine if commit.outside}
    nodes = [_measured(history, commit) for commit in measured.values()]
    nodes += _by_step(history, mine, "sampled in", inside)
    for later in history.checkpoints:
        for field, words, model in history.parents(later):
            if model and model.digest == one.entry.digest:
                role = {"from": "trained on in", "reference": "reference in", "teacher": "teacher in"}.get(field, "averaged in")
                gave = checkpoint_node(history, later, "gave", said=words)
                nodes.append(step_node(history, later.commit, role, [gave], told(later.commit)))
    names = list(dict.fromkeys(row["id"] for _, row in inside))
    return [*nodes, *(_became(history, names) if names else []), *_descendants(history, one)]
