"""Which tokens of a row are said to be learned: compared with the batches that the trainer makes of the same rows, row by row."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chains import go, recipe_in
from rich.console import Console
from speaking import Speaking
from template_kinds import kind_named
from tiny import as_model, tiny_model
from updates import update

from selfkd.backend import tokens
from selfkd.backend.base import DivergenceSpec
from selfkd.backend.trainer import batches, flat
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model, shape
from selfkd.core.source_code import code_digest
from selfkd.report import learned, rows
from selfkd.report.as_prompted import tokenizer_of
from selfkd.report.history import History
from selfkd.report.learned import Side, Update, spans, split, updates_of
from selfkd.report.learned_text import as_data, print_learned
from selfkd.report.rows import Found

LIMIT = 90
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "and 2 + 2"},
]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return as_model(tiny_model(tmp_path_factory.mktemp("tiny") / "model"))


def table(kind: str) -> pl.DataFrame:
    """Rows of a kind: one turn and several, with sampled ids and without, ended and cut, and one that is too long."""
    said = [{"role": "user", "content": "2 + 2 = ?"}]
    made = [
        {"messages": said, "chosen": "4", "chosen_ended": True},
        {"messages": TURNS, "chosen": "It is four.", "chosen_ended": True, "weight": 0.5},
        {"messages": said, "chosen": "cut in the mid", "chosen_ended": False},
        {"messages": said, "chosen": "4!", "chosen_ids": [23, 4, 2], "chosen_ended": True},
        {"messages": said, "chosen": "long " * LIMIT, "chosen_ended": True},
    ]
    more: dict[str, Any] = {}
    if kind == "pair":
        more = {"rejected": "I do not know.", "rejected_ended": True}
    if kind == "kd":
        more = {"teacher_messages": [{"role": "user", "content": "2 + 2 = ? It is 4."}]}
    if kind == "label":
        more = {"label": 1.0}
    found = [{"id": f"row-{at}", "kind": kind, "weight": 1.0, **more, **row} for at, row in enumerate(made)]
    for row in found if kind == "rank" else ():
        best = {"text": row["chosen"], "ids": row.get("chosen_ids"), "ended": row["chosen_ended"], "score": 2.0}
        row["ranked"] = [best, {"text": "five", "ids": None, "ended": True, "score": 1.0}]
    return shape("rows", found)


class Seen:
    """What an update's batches hold: each sequence without its padding, and which of its tokens are learned."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sequences: set[tuple[tuple[int, ...], tuple[bool, ...]]] = set()
        self.flat: list[Any] = []
        given = batches.Feed.__iter__

        def watched(feed: batches.Feed) -> Any:
            for batch in given(feed):
                self._add(batch)
                yield batch

        monkeypatch.setattr(batches.Feed, "__iter__", watched)

    def _add(self, batch: Any) -> None:
        marks = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
        for ids, real, mark in zip(batch["input_ids"], batch["attention_mask"].bool(), marks, strict=True):
            self.sequences.add((tuple(ids[real].tolist()), tuple(mark[real].tolist())))


def said(frame: pl.DataFrame, tok: Any, how: Update) -> tuple[set[Any], dict[str, str]]:
    """What `split` says of the rows: the sequences that are learned, and the rows that are not."""
    found = [split(row, tok, how) for row in frame.to_dicts()]
    kept = {(tuple(side.ids), tuple(side.learned)) for row in found if not row.refused for side in row.sides}
    return kept, {row.id: row.refused for row in found if row.refused}


def function(file: str, name: str) -> Function:
    path = builtin_folder() / "loss" / file
    return Function(name, path, code_digest(path))


CASES: dict[str, tuple[str, dict[str, Any], Update]] = {
    "sft": ("sft", {}, Update("", "sft", LIMIT)),
    "dpo": ("pair", {}, Update("", "dpo", LIMIT)),
    "kto": ("label", {"function": function("kto.py", "kto"), "rows": "label"}, Update("", "kto", LIMIT)),
    "loss/rrhf.py:rrhf": ("rank", {"function": function("rrhf.py", "rrhf"), "rows": "rank"}, Update("", "rrhf", LIMIT)),
    "kd": (
        "kd",
        {"function": function("kd.py", "kd"), "rows": "kd", "divergence": DivergenceSpec(skip=1, first=9)},
        Update("", "kd", LIMIT, skip=1, first=9),
    ),
}


@pytest.mark.parametrize("loss", CASES)
def test_what_is_said_to_be_learned_is_what_the_trainers_batches_hold(start, tmp_path, monkeypatch, loss):
    kind, more, how = CASES[loss]
    frame, tok = table(kind), tokens.tokenizer(start.path)
    frame.write_parquet(tmp_path / "rows.parquet")
    expected, refused = said(frame, tok, how)
    seen = Seen(monkeypatch)
    reference = start if kind in ("pair", "label", "kd") else None
    trl = {"learning_rate": 2e-3, "per_device_train_batch_size": 4}
    trained = update(
        start, [tmp_path / "rows.parquet"], tmp_path / "out", loss, reference=reference, max_length=LIMIT, trl=trl, **more
    )
    assert seen.sequences == expected and expected
    assert dict(trained.drops) == refused and "row-4" in refused


def test_rows_that_are_packed_without_padding_are_learned_at_the_same_tokens(start, tmp_path, monkeypatch):
    frame, tok = table("sft"), tokens.tokenizer(start.path)
    frame.write_parquet(tmp_path / "rows.parquet")
    packed: Counter[tuple[Any, ...]] = Counter()
    whole = flat.forward

    def watched(model: Any, input_ids: Any, attention_mask: Any, labels: Any, **more: Any) -> Any:
        def through(**given: Any) -> Any:
            starts = [*(given["position_ids"][0] == 0).nonzero()[:, 0].tolist(), given["input_ids"].shape[1]]
            for begin, end in pairwise(starts):
                ids = given["input_ids"][0, begin:end].tolist()
                follows = given["shift_labels"][0, begin : end - 1].tolist()  # the label of each token's successor
                packed[tuple(ids), (False, *(label != -100 for label in follows))] += 1
            return model(**given)

        return whole(through, input_ids=input_ids, attention_mask=attention_mask, labels=labels, **more)

    monkeypatch.setattr(flat, "forward", watched)
    trl = {"learning_rate": 2e-3, "per_device_train_batch_size": 4, "padding_free": True}
    found = update(start, [tmp_path / "rows.parquet"], tmp_path / "out", max_length=LIMIT, trl=trl)
    assert found.metrics["padding_free"] and set(packed) == said(frame, tok, Update("", "sft", LIMIT))[0]


def test_only_the_last_answer_of_a_conversation_is_learned_and_its_end_with_it(start):
    tok = tokens.tokenizer(start.path)
    [side] = split(table("sft").to_dicts()[1], tok, Update("", "sft", LIMIT)).sides
    runs = list(spans(tok, side))
    assert "".join(run.text for run in runs) == tok.decode(side.ids)
    assert [(run.text, run.control) for run in runs if run.learned] == [("It is four.", False), ("</s>", True)]
    assert "assistant: 2\n" in "".join(run.text for run in runs if not run.learned)


def test_an_answer_that_was_cut_has_no_end_to_learn(start):
    tok = tokens.tokenizer(start.path)
    [side] = split(table("sft").to_dicts()[2], tok, Update("", "sft", LIMIT)).sides
    assert [run.text for run in spans(tok, side) if run.learned] == ["cut in the mid"]


def test_a_row_that_an_update_left_out_has_no_learned_token(start):
    row = split(
        table("sft").to_dicts()[0], tokens.tokenizer(start.path), Update("", "sft", LIMIT, refused="left out of the mix")
    )
    assert row.refused == "left out of the mix" and row.sides[0].count == 0


# ---- of a run ----

RECIPE = """
model: fake
rounds: 1
context: 200
prompts:
  train: {file: train.jsonl, prompt: question, answer: answer, limit: 2}
steps:
  - sample: {system: Be brief., max_tokens: 64}
  - build: {as: own}
  - build: {name: late, as: late}
  - train: {loss: sft, of: own}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return go(recipe_in(folder, RECIPE), folder / "run", Speaking(kind_named("no system role"))).folder


def shown(found: Found, folder: Path, ids: bool = False, **how: Any) -> str:
    out = Console(file=io.StringIO(), width=200, **how)
    print_learned(found, tokenizer_of(folder), folder, ids, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_rows_of_a_run_name_the_update_that_learned_them_and_those_that_wait(run):
    history = History.of(run)
    found = rows.training_rows(run, where="stream = 'own'", n=1, ids=True)
    [update_of] = updates_of(history, 1, found.first["id"].to_list())[found.first["id"][0]]
    assert (update_of.where, update_of.loss, update_of.limit) == ("round-001/04-train", "sft", 200)
    assert "learned in round-001/04-train (sft)" in shown(found, run)
    late = rows.training_rows(run, where="stream = 'late'", n=1, ids=True)
    assert "no update was given it yet" in shown(late, run)


def test_without_colour_brackets_tell_learned_from_masked_and_with_it_none_are_needed(run):
    found = rows.training_rows(run, where="stream = 'own'", n=1, ids=True)
    plain = shown(found, run)
    legend, text = plain.split("\n", 2)[1:]
    assert legend.startswith("⟦learned⟧") and text.count("⟦") == text.count("⟧") == 1
    assert plain == shown(found, run, force_terminal=True, no_color=True, color_system=None)
    coloured = shown(found, run, force_terminal=True, color_system="standard")
    assert "⟦" not in coloured and "\x1b[1;32m" in coloured


def test_a_stream_that_cannot_write_brackets_gets_plain_ones(run):
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    out = Console(file=raw, width=200)
    print_learned(rows.training_rows(run, where="stream = 'own'", n=1, ids=True), tokenizer_of(run), run, False, out)
    raw.flush()
    assert b"[[learned]]" in raw.buffer.getvalue()  # type: ignore[attr-defined]


def test_ids_and_what_is_learned_of_them_are_printed_on_request_and_given_to_programs(run):
    found = rows.training_rows(run, where="stream = 'own'", n=1, ids=True)
    [one] = as_data(found, tokenizer_of(run), run)
    [side] = one["sides"]
    assert len(side["ids"]) == len(side["learned"]) and side["learned"][-1] and not side["learned"][0]
    text = shown(found, run, ids=True)
    assert json.dumps(side["ids"]) in text and json.dumps([int(mark) for mark in side["learned"]]) in text


def test_spans_of_nothing_learned_are_one_text(start):
    tok = tokens.tokenizer(start.path)
    ids = tok("plain")["input_ids"]
    assert [span.learned for span in spans(tok, Side("completion", ids, [False] * len(ids)))] == [False]
    assert learned.AGAINST == "rejected"
