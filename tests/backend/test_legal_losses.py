"""Each loss against each reference that a recipe may give it, once, by the trainer alone, on a model of two letters.

Held against the model that it starts from (`reference: start`, or `base` in the first round), every likelihood ratio is 1 and every margin 0, so
that the first value follows from the loss's formula alone; the table has it, with beta 0.1, for rows of chances 0.9 and 0.2, labels and rates.
Held against another model (`base`, `warm`, `round-3`, `best`) it is another value. A loss that knows no reference is given none.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from bigram import PAIRS, REFERENCE, START, bigram, written

from selfkd.backend.base import Trained, TrainSpec
from selfkd.backend.trainer.loss_kinds import LOSSES
from selfkd.backend.trainer.trl_options import lacking_trl
from selfkd.core import digest
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model, shape
from selfkd.core.source_code import code_digest
from selfkd.steps.train import TrainStep

LOG_2 = math.log(2)
COLUMNS = {"rate": 0.5, "chosen_win": 0.9, "rejected_win": 0.2, "agreement": 0.7}
AT_START = {  # the value where nothing has moved yet
    "dpo": LOG_2,
    "hinge": 1.0,
    "ipo": (1 / (2 * 0.1)) ** 2,
    "exo_pair": 0.5 * (-LOG_2 - math.log(0.999)) + 0.5 * (-LOG_2 - math.log(0.001)),
    "nca_pair": 2 * LOG_2,
    "robust": LOG_2,
    "bco_pair": 2 * LOG_2,
    "sppo_hard": 2 * (0.5 / 0.1) ** 2,
    "aot": LOG_2,
    "aot_unpaired": LOG_2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * LOG_2 + 0.5,
    "sigmoid_norm": LOG_2,
    "kto": 0.5,
    "nft": 0.0,
    "sppo": ((0.4 / 0.001) ** 2 + (0.3 / 0.001) ** 2) / 2,
    "cream": LOG_2,
}
OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}}  # without which it has no value
LEGAL = [
    (name, place)
    for name, kind in LOSSES.items()
    for place in (("start", "another") if kind.reference else ("none",))
    if not kind.teacher  # who that may be, and what it is worth by hand, is in test_distil.py
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    made = {"start": START, "another": REFERENCE}
    return {name: bigram(tmp_path_factory.mktemp(name), after) for name, after in made.items()}


def rows_of(kind: str, folder: Path) -> list[Path]:
    if kind != "rank":
        return written(folder, columns=[{**COLUMNS, "label": float(at % 2)} for at in range(len(PAIRS))])
    rows = []
    for at, (prompt, *answers) in enumerate(PAIRS):
        ranked = [{"text": text, "ids": None, "ended": False, "score": 1.0 - place} for place, text in enumerate(answers)]
        messages = [{"role": "user", "content": prompt}]
        rows.append(
            {
                "id": f"row-{at}",
                "weight": 1.0,
                "messages": messages,
                "chosen": answers[0],
                "chosen_ended": False,
                "ranked": ranked,
            }
        )
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    return [folder / "rows.parquet"]


def updated(name: str, start: Model, reference: Model | None, folder: Path) -> Trained:
    from selfkd.backend.trainer.update import train_rank

    kind, function = LOSSES[name], None
    if kind.function:
        path = builtin_folder() / kind.function.partition(":")[0]
        function = Function(kind.function.partition(":")[2], path, code_digest(path), {})
    trl = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, **OPTIONS.get(name, {})}
    spec = TrainSpec(name, 3, trl=trl, function=function, rows=kind.rows if function else "")
    return train_rank(start, reference, rows_of(kind.rows, folder), spec, folder / "out", {"threads": 1})


@pytest.mark.parametrize(("name", "place"), LEGAL)
def test_a_loss_learns_against_a_reference_and_leaves_both_models_as_they_were(tmp_path, models, name, place):
    before = {key: digest.weights(Path(model.path)) for key, model in models.items()}
    reference = models.get(place)
    made = updated(name, models["start"], reference, tmp_path)
    value = made.metrics["loss_first"]
    if place == "start":
        assert value == pytest.approx(AT_START[name], rel=1e-4, abs=1e-6)
    elif place == "another":
        assert math.isfinite(value) and value != pytest.approx(AT_START[name], rel=1e-3, abs=1e-4)
    else:
        assert math.isfinite(value) and value > 0
    assert digest.weights(made.folder) not in before.values()
    assert {key: digest.weights(Path(model.path)) for key, model in models.items()} == before


def test_every_loss_that_is_held_against_a_model_stands_in_the_table():
    assert set(AT_START) == {name for name, kind in LOSSES.items() if kind.reference}


def test_a_loss_without_the_option_that_it_needs_is_refused_beforehand():
    assert lacking_trl("exo_pair", {}) == lacking_trl("dpo", {"loss_type": ["sigmoid", "exo_pair"]}) != ""
    assert "label_smoothing: 1e-3" in lacking_trl("dpo", {"loss_type": "exo_pair"})
    assert [lacking_trl(*case) for case in (("exo_pair", {"label_smoothing": 0.01}), ("dpo", {}), ("sft", {}))] == [""] * 3
    [(field, said)] = TrainStep(name="train", loss="exo_pair").problems()
    assert (field, "label_smoothing" in said) == ("loss", True)
