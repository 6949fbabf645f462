"""Back from a training row, a sample, a prompt or a checkpoint: to the samples, judgments, prompts, scores, code and models it came of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from selfkd.chain.records import Commit
from selfkd.core import views
from selfkd.core.pool import Model, Pool, shape
from selfkd.core.wording import counted
from selfkd.report.history import Checkpoint, Found, History
from selfkd.report.node import Node
from selfkd.steps import VERBS
from selfkd.steps.apply import ApplyStep
from selfkd.steps.bring import BringStep
from selfkd.steps.build import BuildStep
from selfkd.steps.gold import GoldStep
from selfkd.steps.judge import JudgeStep
from selfkd.steps.measure import MeasureStep
from selfkd.steps.train import TrainStep

NOWHERE = "it stands in no table of this run"
TEXTS = ("text", "token_ids")
ROW_TEXTS = ("messages", "chosen", "chosen_ids", "rejected", "rejected_ids", "ranked", "teacher_messages")
SHOWN = 60  # characters of a text in a line


def opening(text: str | None) -> str:
    """Return how a text begins, in quotes, on one line."""
    words = " ".join((text or "").split())
    return repr(words if len(words) <= SHOWN else f"{words[:SHOWN]}…")


def copies(commit: Commit) -> bool:
    """Whether a step brings samples of other rounds back."""
    return commit.verb in VERBS and VERBS[commit.verb].copies


def step_node(history: History, commit: Commit, role: str, links: Sequence[Node] = (), said: str = "") -> Node:
    facts = {"round": commit.round, "verb": commit.verb, "digest": commit.digest, "key": commit.key}
    return Node(role, "step", history.where(commit), said, facts, links=links)


def code_nodes(history: History, commit: Commit, references: Sequence[str]) -> list[Node]:
    return [_code(history, name, commit.code[name]) for name in references if name in commit.code]


def _code(history: History, reference: str, digest: str) -> Node:
    entry = history.code(digest)
    path = entry.path if entry else ""
    sha256 = history.sha256(path)
    said = f"{path} · digest {digest[:12]}" + (f" · sha256 {sha256[:12]}" if sha256 else "")
    unproved = "" if entry else "nothing frozen in this run has the digest of its code"
    return Node("code", "code", reference, said, {"digest": digest, "path": path, "sha256": sha256}, unproved)


# ---- rows ----


def row_links(history: History, found: Found) -> list[Node]:
    """Return what a training row was built of: the samples with all that they came of, then the step that built it, and its code."""
    commit, row = found
    names = list(row["samples"] or ())
    known = samples_of(history, names)
    links = [
        doubted(sample_node(history, name, role, known.get(name, [])), _unlike(history, found, side, known.get(name, [])))
        for name, role, side in zip(names, _roles(row), _sides(row), strict=False)
    ]
    step = history.step(commit)
    templates = step.templates() if isinstance(step, BuildStep) else []
    return [*links, step_node(history, commit, "built by", code_nodes(history, commit, templates))]


def _roles(row: Mapping[str, Any]) -> list[str]:
    if row["kind"] == "pair":
        return ["chosen", "rejected"]
    return [f"answer {at + 1}" for at in range(len(row["samples"] or ()))] if row["kind"] == "rank" else ["completion"]


def _sides(row: Mapping[str, Any]) -> list[str | None]:
    """Return what a row says of each of its samples' texts."""
    if row["kind"] == "rank":
        return [answer["text"] for answer in row["ranked"] or ()]
    return [row["chosen"], row["rejected"]] if row["kind"] == "pair" else [row["chosen"]]


def _unlike(history: History, found: Found, text: str | None, samples: Sequence[Found]) -> str:
    """Return why the text of a row is not that of its sample, where nothing rewrote it."""
    step = history.step(found[0])
    written = samples[0][1]["text"] if samples else text
    if isinstance(step, BuildStep) and (step.completion is not None or (step.step and (written or "").startswith(text or ""))):
        return ""
    return "" if written == text else "its text is not the one that the row teaches"


def doubted(node: Node, doubt: str) -> Node:
    """Return a node whose link does not hold for certain, where there is a doubt."""
    return replace(node, unproved=node.unproved or doubt)


# ---- samples ----


def samples_of(history: History, names: Sequence[str], heavy: Sequence[str] = TEXTS) -> dict[str, list[Found]]:
    """Return {sample: its rows}, those that made it before those that copied it; a sample that is nowhere is left out."""
    found: dict[str, list[Found]] = {}
    for one in history.look("samples", pl.col("id").is_in(list(names)), heavy):
        found.setdefault(one[1]["id"], []).append(one)
    return {name: sorted(rows, key=lambda one: copies(one[0])) for name, rows in found.items()}


def sample_node(history: History, name: str, role: str, rows: Sequence[Found], deep: bool = True) -> Node:
    """Return a sample with all that it came of; `deep` false leaves out what its parents came of."""
    if not rows:
        return Node(role, "sample", name, unproved=NOWHERE)
    commit, row = rows[0]
    kind = "judgment" if row["aside"] else "sample"
    length = f"{row['tokens']} tokens, {row['finish_reason']}" if row["tokens"] is not None else str(row["finish_reason"])
    facts = {name: row[name] for name in ("prompt", "stream", "model", "finish_reason", "tokens", "seed")}
    unproved = "the round that made it is not here, only a copy that a later one brought back" if copies(commit) else ""
    said = f"{row['stream']} · {length} · {opening(row['text'])}"
    return Node(role, kind, name, said, {**facts, "round": commit.round}, unproved, sample_links(history, rows, deep))


def sample_links(history: History, rows: Sequence[Found], deep: bool = True) -> list[Node]:
    """Return who made a sample, the step that asked, its prompt, what it was made from, and its scores with what gave them."""
    commit, row = rows[0]
    step = history.step(commit)
    asked = code_nodes(history, commit, step.templates() if step else [])
    names = list(row["parents"] or ()) if deep else []
    known = samples_of(history, names) if names else {}
    role = "judges" if row["aside"] else "made from"
    return [
        _maker(history, commit, row),
        step_node(history, commit, "made by", asked),
        prompt_node(history, row["prompt"]),
        *(sample_node(history, name, role, known.get(name, []), deep=False) for name in names),
        *score_nodes(history, row["id"], deep),
    ]


def _maker(history: History, commit: Commit, row: Mapping[str, Any]) -> Node:
    """Return who wrote a sample; a model by its digest, which the files of its samples must say too."""
    if commit.verb == GoldStep.verb:
        return Node("written by", "gold", said="the gold answer of its prompt")
    if commit.verb == BringStep.verb:
        return _data(history, commit)
    if commit.verb == ApplyStep.verb:
        return Node("written by", "function", said="a function: the code of its step")
    found = history.sampler(row["model"])
    if len(found) != 1:
        why = "no step of this run committed these weights" if not found else "several checkpoints have digests that begin so"
        return Node("sampled by", "checkpoint", row["model"], unproved=why)
    others = history.made_files(commit) - {found[0].entry.digest}
    wrong = f"files of {history.where(commit)} say that {min(others)[:12]} made them" if others and not copies(commit) else ""
    return checkpoint_node(history, found[0], "sampled by", unproved=wrong)


def _data(history: History, commit: Commit) -> Node:
    name = f"{BringStep.DATA}{commit.step}"
    entry = history.info.data.get(name)
    if entry is None or entry.digest != commit.code.get(name):
        return Node("brought from", "data", name, unproved="no data frozen in this run has the digest that its step names")
    facts = {"path": entry.path, "digest": entry.digest, "read_sha256": entry.read_sha256, "licence": entry.licence}
    said = f"{entry.path} · digest {entry.digest[:12]} · licence {entry.licence or 'not stated'}"
    return Node("brought from", "data", name, said, facts)


# ---- prompts ----


def prompt_node(history: History, name: str, role: str = "prompt") -> Node:
    """Return a prompt: the split that it was frozen in, or the step that brought it."""
    if frozen := history.prompt(name):
        splits, row = frozen
        entry = history.info.prompts[splits[0]]
        facts = {"splits": splits, "file": entry.file, "digest": entry.digest, "read_sha256": entry.read_sha256}
        return Node(role, "prompt", name, f"{', '.join(splits)} · {_asked(row)}", {**facts, "answer": row["answer"]})
    for commit, row in history.look("prompts", pl.col("id") == name, ["messages"]):
        links = [] if copies(commit) else [step_node(history, commit, "brought by")]
        return Node(role, "prompt", name, _asked(row), {"answer": row["answer"], "round": commit.round}, links=links)
    return Node(role, "prompt", name, unproved=NOWHERE)


def _asked(row: Mapping[str, Any]) -> str:
    last = row["messages"][-1]["content"] if row["messages"] else ""
    return opening(last) + (f" · answer {opening(row['answer'])}" if row["answer"] is not None else "")


# ---- scores ----


def score_nodes(history: History, sample: str, deep: bool = True) -> list[Node]:
    """Return the scores of a sample, each with the code, the judgments or the model that gave it."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for one in history.look("scores", pl.col("sample") == sample):
        if not copies(one[0]):
            groups.setdefault((history.where(one[0]), one[1]["name"]), []).append(one)
    return [_score(history, sample, name, found, deep) for (_, name), found in groups.items()]


def _score(history: History, sample: str, name: str, found: Sequence[Found], deep: bool) -> Node:
    commit, draws = found[0][0], [row for _, row in found]
    value = draws[0]["value"] if len(draws) == 1 else _mean(sample, name, draws)
    why = "; ".join(dict.fromkeys(row["why"] for row in draws if row["why"])) if value is None else ""
    said = f"= {value:.4g}" if value is not None else f"unscored: {why}"
    said += f" · mean of {len(draws)} draws" if len(draws) > 1 else ""
    facts = {"value": value, "why": why, "draws": draws, "round": commit.round}
    return Node("score", "score", name, said, facts, links=[*_given_by(history, commit, name, sample, deep)])


def _mean(sample: str, name: str, draws: Sequence[Mapping[str, Any]]) -> float | None:
    """Return what several draws of a score come to, as expressions see it."""
    found = views.with_scores(pl.DataFrame({"id": [sample]}), Pool({"scores": shape("scores", draws)}))[name].item()
    return None if found is None else float(found)


def _given_by(history: History, commit: Commit, name: str, sample: str, deep: bool) -> list[Node]:
    step = history.step(commit)
    if isinstance(step, BringStep):
        return [_data(history, commit)]
    functions = dict(zip(step.scores(), step.functions(), strict=False)) if step else {}
    code = code_nodes(history, commit, [functions[name]] if name in functions else list(commit.code))
    models = step.models() if step and not isinstance(step, MeasureStep) else {}
    asked = [_named(history, commit, "read by", field, history.named(commit, reference)) for field, reference in models.items()]
    judged = []
    if isinstance(step, JudgeStep) and deep:
        keep = pl.col("parents").list.contains(sample)
        judged = [
            sample_node(history, row["id"], "judged by", [(one, row)], deep=False)
            for one, row in history.look("samples", keep, TEXTS, [commit])
        ]
    return [step_node(history, commit, "given by", [*code, *asked]), *judged]


# ---- checkpoints ----


def checkpoint_node(
    history: History, one: Checkpoint, role: str, links: Sequence[Node] = (), said: str = "", unproved: str = ""
) -> Node:
    heads, lies = history.heads(one.entry.digest), history.lies(one)
    ends = f" · head of round {', '.join(map(str, heads))}" if heads else ""
    line = f"{history.where(one.commit)}{ends}{'' if lies else ' · not on disk any more'}"
    facts = {
        "role": one.role,
        "digest": one.entry.digest,
        "model_kind": one.entry.kind,
        "base": one.entry.base,
        "made_in": history.where(one.commit),
        "heads": heads,
        "path": lies or None,
    }
    return Node(role, "checkpoint", one.name, line + (f" · {said}" if said else ""), facts, unproved, links)


def _named(
    history: History, commit: Commit, role: str, words: str, model: Model | None, child: Checkpoint | None = None
) -> Node:
    """Return a model that a step named, found as the run finds it; `child` is what was trained from it, which may say so itself."""
    if model is None:
        return Node(role, "checkpoint", words, unproved="no round sealed before this step has such a model")
    one = history.checkpoint(model.digest)
    if one is None:
        return Node(role, "checkpoint", str(model), unproved="no step of this run committed these weights")
    said = history.parent_said(child) if child else None
    wrong = f"the checkpoint says that it was trained from {said[:12]}" if said and said != model.digest else ""
    return checkpoint_node(history, one, role, said=words, unproved=wrong)


def checkpoint_links(history: History, one: Checkpoint) -> list[Node]:
    """Return what a checkpoint came of: the step, the models that it names, the rows it learned, and the line back to the base."""
    step = history.step(one.commit)
    links = [
        step_node(history, one.commit, "made by", code_nodes(history, one.commit, list(one.commit.code)), told(one.commit))
    ]
    if one.commit.verb == "load":
        source = history.info.model
        revision = f" at {source['revision']}" if source.get("revision") else ""
        links.append(Node("loaded from", "source", str(source["path"]), f"{source['path']}{revision}", dict(source)))
    for field, words, model in history.parents(one):
        child = one if field == "from" else None
        links.append(_named(history, one.commit, field, words, model, child))
    if isinstance(step, TrainStep):
        links.append(rows_node(history, one.commit, step))
    return [*links, *_line_back(history, one)]


def told(commit: Commit) -> str:
    """Return what a training was, in few words."""
    found = commit.notes.get("train", {})
    parts = [str(commit.identity.get("loss", commit.verb))]
    parts += [counted(found[name], name.removesuffix("s")) for name in ("rows", "steps") if isinstance(found.get(name), int)]
    parts += [f"{found['epochs']:.3g} epochs"] if isinstance(found.get("epochs"), int | float) else []
    return ", ".join(parts)


def _line_back(history: History, one: Checkpoint) -> list[Node]:
    """Return the checkpoints from which, one after the other, this one was trained, back to what was loaded."""
    line, now = list[Checkpoint](), one
    while True:
        start = next((model for field, _, model in history.parents(now) if field == "from"), None)
        before = history.checkpoint(start.digest) if start else None
        if before is None or before in line or before == one:
            break
        line, now = [*line, before], before
    names = [f"{each.name} (round {each.commit.round})" for each in line]
    ids = [each.entry.digest for each in line]
    return [Node("line back", "checkpoints", said=" ← ".join(names), facts={"ids": ids})] if line else []


# ---- the rows of an update ----


def rows_of(history: History, commit: Commit, step: TrainStep) -> tuple[list[Found], dict[str, str]]:
    """Return the rows that an update was given and learned from, and {row: why not} of those that it left out."""
    before = [one for one in history.commits if one.round == commit.round and one.number <= commit.number and not one.outside]
    mine = pl.col("stream").is_in(list(step.streams)) & (pl.col("role") == step.role)
    given = history.look("rows", mine, commits=before)
    out = {row["id"]: row["reason"] for _, row in history.look("drops", pl.col("step") == commit.step, commits=[commit])}
    return [one for one in given if one[1]["id"] not in out], {
        row["id"]: out[row["id"]] for _, row in given if row["id"] in out
    }


def rows_node(history: History, commit: Commit, step: TrainStep) -> Node:
    """Return the rows of an update: how many, of what, who sampled them, what scored them; and the first of them."""
    rows, refused = rows_of(history, commit, step)
    names = list(dict.fromkeys(name for _, row in rows for name in row["samples"] or ()))
    known = samples_of(history, names, ())
    recorded = commit.notes.get("train", {}).get("rows")
    doubts = []
    if recorded not in (None, len(rows)):
        doubts.append(f"the update recorded {recorded} rows, and its tables hold {len(rows)}")
    if lost := [name for name in names if name not in known]:
        doubts.append(f"{counted(len(lost), 'sample')} that they name stand in no table, such as {lost[0]}")
    kinds = Counter(row["kind"] for _, row in rows)
    prompts = {found[0][1]["prompt"] for found in known.values()}
    whole = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "0"
    said = f"{whole} rows, of {counted(len(names), 'sample')} to {counted(len(prompts), 'prompt')}"
    said += f"; {len(refused)} left out" if refused else ""
    facts = {"ids": [row["id"] for _, row in rows], "refused": refused, "kinds": dict(kinds), "samples": names}
    links = [*_samplers(history, known), *_scored(history, known), *map(row_line, rows)]
    return Node("learned", "rows", said=said, facts=facts, unproved="; ".join(doubts), links=links)


def row_line(found: Found) -> Node:
    commit, row = found
    facts = {"round": commit.round, "weight": row["weight"], "stream": row["stream"], "samples": row["samples"]}
    return Node("row", "row", row["id"], f"{row['kind']} · {row['stream']} · weight {number(row['weight'])}", facts)


def number(value: float | None) -> str:
    return "1" if value is None else f"{value:.4g}"


def _samplers(history: History, known: Mapping[str, Sequence[Found]]) -> list[Node]:
    """Return who wrote samples, each writer once, with how many and in which rounds."""
    by: dict[str, list[Found]] = {}
    for found in known.values():
        by.setdefault(found[0][1]["model"], []).append(found[0])
    nodes = []
    for rows in by.values():
        node = _maker(history, *rows[0])
        rounds = sorted({commit.round for commit, _ in rows})
        said = f"{counted(len(rows), 'sample')} in round {', '.join(map(str, rounds))}"
        facts = {**node.facts, "samples": len(rows), "rounds": rounds}
        nodes.append(replace(node, said=f"{node.said} · {said}", facts=facts))
    return nodes


def _scored(history: History, known: Mapping[str, Sequence[Found]]) -> list[Node]:
    """Return what scored samples: each score of each step once, with its code."""
    groups: dict[tuple[str, str], list[Found]] = {}
    for one in history.look("scores", pl.col("sample").is_in(list(known))):
        if not copies(one[0]):
            groups.setdefault((history.where(one[0]), one[1]["name"]), []).append(one)
    nodes = []
    for (where, name), found in groups.items():
        count = len({row["sample"] for _, row in found})
        links = _given_by(history, found[0][0], name, "", deep=False)
        facts = {"samples": count, "step": where}
        nodes.append(Node("scored by", "score", name, f"{counted(count, 'sample')} in {where}", facts, links=links))
    return nodes
