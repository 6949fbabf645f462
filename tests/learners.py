"""Models of our own on the fake backend: what is sampled, scored, kept and trained on is the loop's doing, how a model learns is theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from selfkd.backend.base import OnSteps, Questions, Trained, TrainSpec, nobody_listens
from selfkd.backend.fake import Fake, _read, _write
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import Model


class Learner(Fake):
    """A model that is a list of numbers in the file of a fake's skill; `learn` makes the next one from the rows."""

    def first(self) -> Any:
        raise NotImplementedError

    def learn(self, now: Any, rows: list[tuple[str, str]]) -> Any:
        raise NotImplementedError

    def load(self, source: Mapping[str, Any], out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        _write(out, {"skill": self.first(), "history": "root"})
        return {}

    def train(
        self,
        start: Model,
        reference: Model | None,
        rows: Sequence[Path],
        spec: TrainSpec,
        out: Path,
        on_progress: OnSteps = nobody_listens,
    ) -> Trained:
        frame = pl.concat([pl.read_parquet(path) for path in rows]).sort("id")
        texts = [(messages[-1]["content"], chosen) for messages, chosen in frame.select("messages", "chosen").iter_rows()]
        before = _read(start)
        _write(
            out, {"skill": self.learn(before["skill"], texts), "history": digest.of(before["history"], len(texts), spec.seed)}
        )
        return Trained(
            out, {"steps": frame.height, "rows": frame.height, "loss_first": 1.0, "loss_last": 1.0, "seconds": 0.0}, {}
        )


def skill(run: Run, index: int) -> Any:
    model = run.sealed()[index].head()["policy"]
    return _read(Model("policy", str(run.folder / model.path), model.digest))["skill"]
