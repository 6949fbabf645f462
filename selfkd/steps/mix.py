"""What a train step mixes: rows of several streams in given shares, drawn by hash. Pure: sizes in, names out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from selfkd.core import digest
from selfkd.core.wording import listed

LEFT_OUT = "left out of the mix"
EVEN = 1e-9  # a share times a count that is whole may come out a little below it


@dataclass(frozen=True)
class Mixed:
    """The ids that are used of each stream, and how much that is: {stream: {rows, of, size}}, of how many rows."""

    chosen: Mapping[str, Sequence[str]]
    counts: Mapping[str, Mapping[str, int]]
    short: str = ""  # the stream that the others were cut to match

    def warning(self, shares: Mapping[str, float]) -> str:
        """Return what a person should know where the stream with the largest share was cut; ''."""
        main = max(shares, key=lambda name: shares[name])
        used = self.counts[main]
        if main == self.short or used["rows"] == used["of"]:
            return ""
        few = self.counts[self.short]
        said = f"'{self.short}' is too small for its share of {shares[self.short] / sum(shares.values()):.3g}: all its {few['of']:,} rows"
        return f"{said} go with {used['rows']:,} of {used['of']:,} rows of '{main}', and the others are left out"


def mixed(sizes: Mapping[str, pl.DataFrame], shares: Mapping[str, float], seed: int) -> Mixed:
    """Return the largest mix in which every stream has its share and no row is there twice.

    `sizes` has columns id and size of each stream, the size being 1 or its tokens. The stream that runs out first is used whole, and of
    the others rows are drawn by hash: as many as fit in the share, and one at least.
    """
    whole = {name: int(frame["size"].sum()) for name, frame in sizes.items()}
    short = min(shares, key=lambda name: (whole[name] / shares[name], name))
    unit = whole[short] / shares[short]
    chosen = {name: _drawn(frame, name, unit * shares[name], seed) for name, frame in sizes.items()}
    counts = {
        name: {"rows": len(ids), "of": sizes[name].height, "size": _size(sizes[name], ids)} for name, ids in chosen.items()
    }
    return Mixed(chosen, counts, short)


def _drawn(frame: pl.DataFrame, name: str, quota: float, seed: int) -> list[str]:
    hashed = [digest.uniform(seed, "mix", name, one) for one in frame["id"]]
    ordered = frame.with_columns(_hash=pl.Series(hashed, dtype=pl.Float64)).sort("_hash", "id")
    fits = ordered.filter(pl.col("size").cum_sum() <= quota + EVEN * max(1.0, quota))["id"].to_list()
    return fits or ordered["id"].head(1).to_list()


def _size(frame: pl.DataFrame, ids: Sequence[str]) -> int:
    return int(frame.filter(pl.col("id").is_in(list(ids)))["size"].sum())


def notes(found: Mixed, by: str) -> dict[str, Any]:
    """Return what was mixed, as the commit tells it."""
    counted = {"tokens": "size"} if by == "tokens" else {}
    fields = {"rows": "rows", "of": "of", **counted}
    return {name: {said: one[key] for said, key in fields.items()} for name, one in found.counts.items()}


def problem(shares: Mapping[str, float]) -> str:
    """Return what is wrong with shares of rows, or ''."""
    if len(shares) < 2:
        return "mixes several: name two streams of rows at least, {own: 0.8, chat: 0.2}"
    wrong = [name for name, share in shares.items() if not share > 0]
    return f"the share of {listed(wrong)} is not above 0: leave it out" if wrong else ""
