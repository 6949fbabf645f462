"""The tokens that a mix counts are those that a trainer learns."""

from __future__ import annotations

import polars as pl
from tiny import as_model, say, tiny_model

from selfkd.backend import lengths, tokens
from selfkd.backend.trainer.batches import encode
from selfkd.core.pool import shape


def test_a_rows_length_is_what_the_trainer_learns_of_it(tmp_path):
    model = as_model(tiny_model(tmp_path / "m"))
    tok = tokens.tokenizer(model.path)
    one = {"weight": 1.0, "messages": say("2+2=?"), "chosen_ended": True, "rejected_ended": False}
    rows = shape(
        "rows",
        [
            {**one, "id": "gold", "kind": "sft", "chosen": "four"},
            {**one, "id": "own", "kind": "sft", "chosen": "four", "chosen_ids": [40, 41, 42]},
            {**one, "id": "pair", "kind": "pair", "chosen": "four", "rejected": "fi"},
            {
                **one,
                "id": "rank",
                "kind": "rank",
                "chosen": "four",
                "ranked": [{"text": text, "ended": True, "score": 1.0} for text in ("four", "5")],
            },
        ],
    )
    learned = [encode(tok, row, row["kind"] == "pair").learned for row in rows.iter_rows(named=True)]
    assert lengths.learned(model, rows) == learned == [5, 4, 7, 7]  # a character is a token, and what ended has one more


def test_a_row_that_no_tokenizer_can_write_counts_nothing(tmp_path):
    model = as_model(tiny_model(tmp_path / "m"))
    row = {"id": "a", "kind": "sft", "messages": say("hi"), "chosen": "a</s>b", "chosen_ended": True}
    found = lengths.learned(model, shape("rows", pl.DataFrame([row])))
    assert found in ([0], [len("a</s>b") + 1])  # as plain characters, where the tokenizer can
