"""Prompts that two splits share, word for word, as turns of a longer conversation, or in a passage of thirteen words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

PASSAGE_WORDS = 13  # the length used since GPT-3 (Brown et al. 2020, arXiv 2005.14165, appendix C)
WORDING_PROMPTS = 10  # a passage in more prompts than this is their shared wording (same appendix)


def duplicates(frame: pl.DataFrame) -> int:
    """Return how many prompts repeat an earlier one of the same split."""
    return int(frame["id"].str.contains("-", literal=True).sum())


def texts(frame: pl.DataFrame) -> pl.DataFrame:
    """Return id and text (all that is not a system message), normalised: case folded, white space as single spaces."""
    messages = frame["messages"].to_list()
    spoken = (" ".join(one["content"] for one in talk or [] if one["role"] != "system") for talk in messages)
    folded = [" ".join(text.casefold().split()) for text in spoken]
    return pl.DataFrame({"id": frame["id"], "text": pl.Series(folded, dtype=pl.String)})


@dataclass(frozen=True)
class HeldOut:
    """The prompts of a split, as other conversations are held against them: their normalised texts, and how many messages they have."""

    texts: frozenset[str]
    sizes: frozenset[int]

    @classmethod
    def of(cls, prompts: pl.DataFrame) -> HeldOut:
        sizes = {sum(one["role"] != "system" for one in talk or []) for talk in prompts["messages"].to_list()}
        return cls(frozenset(texts(prompts)["text"]), frozenset(sizes))

    def among(self, messages: Sequence[Mapping[str, str]] | None) -> bool:
        """Whether one of these prompts is asked somewhere in a conversation: as its beginning, or as turns in the midst of it.

        System messages are not looked at, here as there. What is asked ends with a message of the user.
        """
        turns = [one for one in messages or [] if one["role"] != "system"]
        said = [" ".join(one["content"].casefold().split()) for one in turns]
        ends = [at + 1 for at, one in enumerate(turns) if one["role"] == "user"]
        runs = ((end - size, end) for end in ends for size in {end, *self.sizes} if 0 < size <= end)
        return any(" ".join(filter(None, said[first:end])) in self.texts for first, end in runs)


def overlap(train: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """Return the ids of the train prompts that are a prompt of `other` (dev or test), or ask one among their turns."""
    whole = texts(train)["text"].to_list()
    held_out = HeldOut.of(other)
    rows = zip(train["id"], whole, train["messages"].to_list(), strict=True)
    return [name for name, text, talk in rows if text in held_out.texts or (len(talk or []) > 1 and held_out.among(talk))]


def leaks(frames: Mapping[str, pl.DataFrame], transductive: bool = False) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (split, split that it must not share prompts with, ids of those it shares): nothing is learned from, or steered by, the latter.

    A recipe that is `transductive` learns from prompts that it measures, and says so.
    """
    suites = [("train", name) for name in frames if name not in ("train", "dev", "test")]
    for split, held_out in (("train", "dev"), ("train", "test"), ("dev", "test"), *suites):
        if transductive and split == "train":
            continue
        if split in frames and held_out in frames and (shared := overlap(frames[split], frames[held_out])):
            yield split, held_out, shared


def shared_passages(train: pl.DataFrame, other: pl.DataFrame) -> list[str]:
    """Return the ids of the train prompts that share 13 words in a row with a prompt in `other`; a warning, not a proof.

    Prompts of fewer words have no such passage. A passage that more than 10 prompts of `other` share is the wording of the
    task or of a template, and does not count.
    """
    ours, theirs = passages(texts(train)["text"]), passages(texts(other)["text"])
    rare, counts = np.unique(theirs.unique()["passage"].to_numpy(), return_counts=True)
    hits = ours.filter(pl.Series(np.isin(ours["passage"].to_numpy(), rare[counts <= WORDING_PROMPTS])))
    return train["id"].gather(hits["row"].unique().sort()).to_list()


def passages(texts: pl.Series) -> pl.DataFrame:
    """Return (row, passage) for each run of 13 words: a 64-bit polynomial of the words' hashes."""
    words = pl.DataFrame({"word": texts.str.split(" ")}).with_row_index("row").explode("word")
    hashes, rows = words["word"].hash(0).to_numpy(), words["row"].to_numpy()
    count = max(len(hashes) - PASSAGE_WORDS + 1, 0)
    total = np.zeros(count, np.uint64)
    for offset in range(PASSAGE_WORDS):
        total = total * np.uint64(0x9E3779B97F4A7C15) + hashes[offset : offset + count]
    whole = rows[:count] == rows[PASSAGE_WORDS - 1 : PASSAGE_WORDS - 1 + count]
    return pl.DataFrame({"row": rows[:count][whole], "passage": total[whole]})
