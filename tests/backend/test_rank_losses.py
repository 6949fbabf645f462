"""Rank rows: several answers of a prompt in their order, and the losses on them, against formulas worked out apart from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram import REFERENCE, START, bigram, logprob
from ranks import on_ranks
from updates import UNEVEN, update

from selfkd.backend.base import LoraSpec, Trained, TrainSpec
from selfkd.backend.trainer import batches
from selfkd.backend.trainer.row_loss import RowLoss, made_up, points, problems
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model, shape
from selfkd.core.source_code import code_digest

SHIPPED = builtin_folder() / "loss"
# (prompt, answers from the best on with their scores); rows differ in answers, and two answers may be equally good.
RANKED: list[tuple[str, list[tuple[str, float]]]] = [
    ("ab", [("ba", 3.0), ("aab", 1.0), ("b", 0.5)]),
    ("a", [("bbbba", 2.0), ("a", 1.5)]),
    ("bba", [("b", 1.0), ("ab", 1.0), ("bb", 0.0), ("aaaa", -2.0)]),
    ("b", [("abab", 0.7), ("bb", 0.2)]),
    ("aa", [("bab", 5.0), ("aaaab", 4.0), ("a", 1.0)]),
]


def rrhf(answers: list[tuple[list[float], float]]) -> float:
    """Yuan et al. 2023, eq. 2 and 3: p is the mean of an answer's log-probabilities."""
    mean = [sum(p) / len(p) for p, _ in answers]
    pairs = [(i, j) for i in range(len(answers)) for j in range(len(answers)) if answers[i][1] < answers[j][1]]
    return sum(max(0.0, mean[i] - mean[j]) for i, j in pairs) - sum(answers[0][0])


def pro(answers: list[tuple[list[float], float]]) -> float:
    """Song et al. 2023, eq. 7 to 10, with beta 0.05 (l - 1)^2."""
    mean, total = [sum(p) / len(p) for p, _ in answers], 0.0
    for k in range(len(answers) - 1):
        apart = {i: answers[k][1] - answers[i][1] for i in range(k + 1, len(answers))}
        own = math.exp(mean[k] * max(apart.values()))
        total -= math.log(own / (own + sum(math.exp(mean[i] * apart[i]) for i in apart)))
    return total - 0.05 * (len(answers) - 1) ** 2 * sum(answers[0][0])


BY_HAND: dict[str, Callable[..., float]] = {"rrhf": rrhf, "pro": pro}


def function(path: Path, **params: Any) -> Function:
    return Function(path.stem, path, code_digest(path), params)


def tokens_of(odds: tuple[float, float], prompt: str, answer: str) -> list[float]:
    """Log-probabilities under the two-token model whose odds of b, after a and after b, are e to these powers."""
    after = dict(zip("ab", odds))
    steps = zip(prompt[-1] + answer, answer)
    return [-math.log1p(math.exp(-after[last] if token == "b" else after[last])) for last, token in steps]


def by_hand(name: str, odds: tuple[float, float]) -> list[float]:
    return [BY_HAND[name]([(tokens_of(odds, prompt, text), score) for text, score in answers]) for prompt, answers in RANKED]


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_values_and_gradients_are_those_of_the_formula_in_float64(name):
    here = (0.4, -0.3)
    odds = torch.tensor(here, dtype=torch.float64, requires_grad=True)
    width, most = (max(len(text) for _, answers in RANKED for text, _ in answers), 4)
    rows, mask = [], torch.zeros(5, most, width, dtype=torch.bool)
    scores = torch.zeros(5, most, dtype=torch.float64)
    for at, (prompt, answers) in enumerate(RANKED):
        lines = []
        for place, (text, score) in enumerate(answers):
            mask[at, place, : len(text)], scores[at, place] = True, score
            signed = [odds["ab".index(last)] * (1 if token == "b" else -1) for last, token in zip(prompt[-1] + text, text)]
            lines.append(torch.cat([torch.nn.functional.logsigmoid(torch.stack(signed)), odds.new_zeros(width - len(text))]))
        rows.append(torch.stack(lines + [odds.new_zeros(width)] * (most - len(lines))))
    values = RowLoss.of(function(SHIPPED / f"{name}.py"), "rank").values(
        {"logps": torch.stack(rows), "mask": mask, "scores": scores}
    )
    assert values.tolist() == pytest.approx(by_hand(name, here), rel=1e-12)
    for row in range(5):
        gradient = torch.autograd.grad(values[row], odds, retain_graph=True)[0].tolist()
        for at in range(2):
            up, down = (tuple(one + step * (at == place) for place, one in enumerate(here)) for step in (1e-5, -1e-5))
            slope = (by_hand(name, up)[row] - by_hand(name, down)[row]) / 2e-5
            assert gradient[at] == pytest.approx(slope, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("body", "fits"),
    [
        ("return -((logps * mask).sum(-1) * scores).sum(1)", True),
        ("return -(logps * mask).sum((1, 2)) / mask.any(-1).sum(1)", True),
        ("return -(logps * mask).sum((1, 2)) / mask.shape[1]", False),  # answers that only another row has
        ("return -logps.mean((1, 2))", False),
    ],
)
def test_answers_that_a_row_lacks_must_not_count(tmp_path, body, fits):
    (tmp_path / "mine.py").write_text(f"def mine(logps, mask, scores):\n    {body}\n")
    loss = RowLoss.of(function(tmp_path / "mine.py"), "rank")
    found = [problem for point in points(made_up("rank", []), "rank") for problem in problems(loss, point)]
    assert (found == []) == fits, found


# ---- as updates ----


def record(at: int, prompt: str, answers: list[tuple[str, float]], **more: Any) -> dict[str, Any]:
    ranked = [{"text": text, "ids": None, "ended": False, "score": score} for text, score in answers]
    best = {"chosen": answers[0][0], "chosen_ended": False, "ranked": ranked}
    return {"id": f"row-{at}", "kind": "rank", "messages": [{"role": "user", "content": prompt}], **best, **more}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("start"), START)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("reference"), REFERENCE)


WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]


def trained(folder: Path, start: Model, loss: Function, size: int = 8, other: Model | None = None, **more: Any) -> Any:
    from selfkd.backend.trainer.update import train_rank

    folder.mkdir(exist_ok=True)
    rows = [record(at, *row, weight=WEIGHTS[at]) for at, row in enumerate(RANKED)]
    shape("rows", rows).write_parquet(folder / "rows.parquet")
    trl = {"per_device_train_batch_size": size, "gradient_accumulation_steps": max(1, 4 // size), "learning_rate": 1e-3}
    spec = TrainSpec(f"{loss.path.name}:{loss.name}", 3, function=loss, rows="rank", trl=trl, **more)
    return train_rank(start, other, [folder / "rows.parquet"], spec, folder / "out", {"threads": 1}).metrics


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_the_first_step_of_an_update_is_the_weighted_mean_of_the_formula(tmp_path, start, name):
    found = trained(tmp_path, start, function(SHIPPED / f"{name}.py"))
    values = []
    for prompt, answers in RANKED:
        steps = [[logprob(START, (prompt + text[:at])[-1], token) for at, token in enumerate(text)] for text, _ in answers]
        values.append(BY_HAND[name]([(p, score) for p, (_, score) in zip(steps, answers)]))
    assert found["loss_first"] == pytest.approx(sum(v * w for v, w in zip(values, WEIGHTS)) / sum(WEIGHTS), rel=1e-5)
    best = sum(logprob(START, prompt, answers[0][0]) for prompt, answers in RANKED) / 5
    assert found["logps/chosen_first"] == pytest.approx(best, rel=1e-5)


def test_a_reference_and_every_cut_of_a_step_are_the_same_for_rankings(tmp_path, start, reference):
    body = "return ((scores * ((logps - ref_logps) * mask).sum(-1)).sum(1) - 1) ** 2"
    (tmp_path / "mine.py").write_text(f"def mine(logps, ref_logps, mask, scores):\n    {body}\n")
    loss = function(tmp_path / "mine.py")
    cuts = [trained(tmp_path / f"{size}", start, loss, size, reference, average="tokens") for size in (4, 2, 1)]
    for cut in cuts[1:]:
        for what in ("loss_first", "loss_last"):
            assert cut[what] == pytest.approx(cuts[0][what], rel=1e-4), what
        assert cut["update_norm"] == pytest.approx(cuts[0]["update_norm"], rel=1e-3)
    first = batches.Row("x", 1.0, *(batches.np.zeros(n, "int32") for n in (2, 3)), others=(batches.np.zeros(4, "int32"),))
    assert (first.longest, first.learned, first.tokens) == (6, 7, 11)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tiny import as_model, tiny_model

    return as_model(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    texts = [("Answer: 7", 2.0), ("I do not know.", 1.0), ("Why?", 0.5)]
    shape("rows", [record(at, f"{at} + 1 = ?", texts[: 2 + at % 2]) for at in range(7)]).write_parquet(path)
    return [path]


def whole_update(place: Path, start: Model, rows: list[Path], name: str, out: str, **more: Any) -> Trained:
    spec = {"function": function(SHIPPED / f"{name}.py"), "rows": "rank", "trl": {**UNEVEN, "num_train_epochs": 3}}
    return update(start, rows, place / out, name, **{**spec, **more})


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_an_update_learns_without_padding_and_with_an_adapter(tmp_path, tiny, tiny_rows, name):
    flat = whole_update(tmp_path, tiny, tiny_rows, name, "flat").metrics
    padded = whole_update(
        tmp_path, tiny, tiny_rows, name, "padded", numerics={"trainer": {"attn_implementation": "sdpa"}}
    ).metrics
    assert flat["loss_last"] < flat["loss_first"] and (flat["padding_free"], padded["padding_free"]) == (True, False)
    for what in ("loss_first", "loss_last", "tokens"):
        assert flat[what] == pytest.approx(padded[what], rel=1e-3), what
    lora = whole_update(tmp_path, tiny, tiny_rows, name, "lora", lora=LoraSpec(r=2, alpha=4.0)).metrics
    assert lora["loss_first"] == pytest.approx(flat["loss_first"], rel=1e-4) and lora["loss_last"] < lora["loss_first"]


def together(rank: int, join: Any, start: Model, rows: list[Path], place: Path) -> Any:
    join()
    return [whole_update(place, start, rows, "pro", str(shard), numerics={"shard": shard}).metrics for shard in (False, True)]


@pytest.mark.nightly
def test_two_ranks_whole_and_divided_learn_what_one_learns(tmp_path, tiny, tiny_rows):
    alone = whole_update(tmp_path, tiny, tiny_rows, "pro", "alone").metrics
    for found in on_ranks(2, together, tiny, tiny_rows, tmp_path)[0]:
        for what in ("loss_first", "loss_last", "tokens"):
            assert found[what] == pytest.approx(alone[what], rel=1e-3), what
