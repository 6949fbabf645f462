"""What a model folder says of answers, as the trainer computes it: the measure that engines are held against."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from transformers.utils import logging

from selfkd.backend import tokens
from selfkd.backend.base import Logprob
from selfkd.backend.trainer import losses, opened
from selfkd.backend.trainer.repeatable import repeatable


def sequence_logprobs(
    folder: Path, rows: pl.DataFrame, numerics: Mapping[str, Any], bf16: bool = False, base: Path | None = None
) -> list[Logprob]:
    """Return (id, summed log-probability, tokens) of each row's `text` or `token_ids` after its `messages`, under a model folder.

    `base` is the folder beneath an adapter.
    """
    tok, pairs = tokens.tokenizer(str(folder)), []
    for row in rows.iter_rows(named=True):
        sampled = row.get("token_ids")
        ended, messages = row["finish_reason"] == "stop", row["messages"]
        completion = tokens.encode_completion(tok, row["text"] or "", sampled, ended, messages=messages)
        pairs.append((np.array(tokens.encode_prompt(tok, row["messages"]), np.int32), np.array(completion, np.int32)))
    logging.disable_progress_bar()
    with repeatable(numerics):
        sums = losses.completion_logprobs(opened.load(str(folder), None if base is None else str(base)), pairs, bf16)
    return [(name, value, len(pair[1])) for name, value, pair in zip(rows["id"], sums, pairs, strict=True)]
