"""Prompts that stand in two splits, word for word or in a passage of thirteen words."""

from __future__ import annotations

import numpy as np
import polars as pl

GRAM = 13  # words; the length used since GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C)

COMMON_GRAM = 10  # a passage in more prompts than this is their shared wording (same appendix)


def duplicates(frame: pl.DataFrame) -> int:
    """How many prompts repeat an earlier one of the same split."""
    return int(frame["id"].str.contains("-", literal=True).sum())


def texts(frame: pl.DataFrame) -> pl.DataFrame:
    """id and text (all that is not a system message), normalised: case folded, white space as single spaces."""
    messages = frame["messages"].to_list()
    spoken = (" ".join(one["content"] for one in talk or [] if one["role"] != "system") for talk in messages)
    folded = [" ".join(text.casefold().split()) for text in spoken]
    return pl.DataFrame({"id": frame["id"], "text": pl.Series(folded, dtype=pl.String)})


def overlap(train: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """ids of the train prompts whose normalised text is that of a prompt in `other` (dev or test)."""
    held_out = texts(other)["text"].unique()
    return texts(train).filter(pl.col("text").is_in(held_out.implode()))["id"].to_list()


def shared_passages(train: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """ids of the train prompts that share 13 words in a row with a prompt in `other`; a warning, not a proof.

    Prompts of fewer words have no such passage. A passage that more than 10 prompts of `other` share is the wording of the
    task or of a template, and does not count.
    """
    ours, theirs = grams(texts(train)["text"]), grams(texts(other)["text"])
    rare, counts = np.unique(theirs.unique()["gram"].to_numpy(), return_counts=True)
    hits = ours.filter(pl.Series(np.isin(ours["gram"].to_numpy(), rare[counts <= COMMON_GRAM])))
    return train["id"].gather(hits["row"].unique().sort()).to_list()


def grams(texts: pl.Series) -> pl.DataFrame:
    """(row, gram) for each run of 13 words: a 64-bit polynomial of the words' hashes."""
    words = pl.DataFrame({"word": texts.str.split(" ")}).with_row_index("row").explode("word")
    hashes, rows = words["word"].hash(0).to_numpy(), words["row"].to_numpy()
    count = max(len(hashes) - GRAM + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(GRAM):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    whole = rows[:count] == rows[GRAM - 1 : GRAM - 1 + count]
    return pl.DataFrame({"row": rows[:count][whole], "gram": total[whole]})
