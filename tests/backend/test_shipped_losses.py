"""The losses in loss/: in float64 against formulas worked out apart from them, and as updates of whole models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch
from bigram import PAIRS, REFERENCE, START, bigram, logprob, written
from ranks import on_ranks
from updates import UNEVEN, Enough, stopped_at, update, write_rows

from selfkd.backend.base import Saves, Trained, TrainSpec
from selfkd.backend.trainer.loss_kinds import LOSSES, PREFERENCES
from selfkd.backend.trainer.row_loss import RowLoss
from selfkd.core import digest
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model
from selfkd.core.source_code import code_digest
from selfkd.errors import GuardError

SHIPPED = builtin_folder() / "loss"
LABELS = [1.0, 0.0, 0.0, 1.0, 0.0]
RATES = [0.5, 0.25, 0.8, 0.4, 0.01]
WINS = [(0.9, 0.2), (0.6, 0.5), (0.7, 0.1), (0.55, 0.45), (1.0, 0.0)]
AGREEMENT = [1.0, 0.8, 0.5, 0.3, 0.9]
KL = 0.15


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# ---- by hand: the loss of row `at` from its answers' log-likelihoods, p of the policy and q of the reference, token by token ----


def sft(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    return -sum(p[0])


def dpo(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    margin = 0.3 * (sum(p[0]) - sum(q[0]) - sum(p[1]) + sum(q[1]))
    return -math.log(sigmoid(margin)) - 0.7 * sum(p[0]) / len(p[0])


def kto(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    reward = sum(p[0]) - sum(q[0])
    return 1 - sigmoid(0.4 * (reward - KL)) if LABELS[at] else 1.3 * (1 - sigmoid(0.4 * (KL - reward)))


def nft(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    """With a clamp of 0.05, which no token here reaches: the paper's form."""
    rate, total = max(RATES[at], 0.02), 0.0
    for one, other in zip(p[0], q[0]):
        ratio = math.exp(one - other)
        total -= math.log(ratio) if LABELS[at] else math.log((1 - rate * ratio) / (1 - rate))
    return (1 - rate) * total / 1000


def sppo(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    win, lose = WINS[at]
    return ((sum(p[0]) - sum(q[0]) - 20 * (win - 0.5)) ** 2 + (sum(p[1]) - sum(q[1]) - 20 * (lose - 0.5)) ** 2) / 2


def cream(at: int, p: list[list[float]], q: list[list[float]]) -> float:
    margin = 0.3 * (sum(p[0]) - sum(q[0]) - sum(p[1]) + sum(q[1]))
    return -AGREEMENT[at] * math.log(sigmoid(margin)) - (1 - AGREEMENT[at]) * math.log(sigmoid(-margin))


BY_HAND: dict[str, tuple[Callable[..., float], dict[str, Any]]] = {
    "sft": (sft, {}),
    "dpo": (dpo, {"beta": 0.3, "nll": 0.7}),
    "kto": (kto, {"beta": 0.4, "undesirable": 1.3}),
    "nft": (nft, {"clamp": 0.05}),
    "sppo": (sppo, {"beta": 0.05}),
    "cream": (cream, {"beta": 0.3}),
}
COLUMNS = {
    "label": LABELS,
    "rate": RATES,
    "agreement": AGREEMENT,
    "chosen_win": [win for win, _ in WINS],
    "rejected_win": [lose for _, lose in WINS],
}


def function(name: str, **params: Any) -> Function:
    path = SHIPPED / f"{name}.py"
    return Function(name, path, code_digest(path), params)


def rows_of(name: str) -> str:
    return LOSSES[name].rows


def tokens_of(after: tuple[float, float], prompt: str, answer: str) -> list[float]:
    """Log-probabilities under the two-token model whose odds of b, after a and after b, are e to these powers."""
    odds = {"a": after[0], "b": after[1]}
    return [
        -math.log1p(math.exp(-odds[last] if token == "b" else odds[last])) for last, token in zip(prompt[-1] + answer, answer)
    ]


def given(theta: torch.Tensor, reference: tuple[float, float], sides: int) -> dict[str, torch.Tensor]:
    """What the trainer would give a function for the pairs, or for their chosen answers; the odds are its parameters."""
    found: dict[str, torch.Tensor] = {}
    for slot, side in enumerate(("chosen_", "rejected_") if sides == 2 else ("",)):
        width = max(len(pair[1 + slot]) for pair in PAIRS)
        lines, others, mask = [], [], torch.zeros(len(PAIRS), width, dtype=torch.bool)
        for at, pair in enumerate(PAIRS):
            prompt, answer = pair[0], pair[1 + slot]
            mask[at, : len(answer)] = True
            odds = torch.stack([theta["ab".index(last)] for last in (prompt[-1] + answer)[:-1]])
            signs = torch.tensor([1.0 if token == "b" else -1.0 for token in answer], dtype=torch.float64)
            lines.append(torch.nn.functional.logsigmoid(signs * odds))
            others.append(torch.tensor(tokens_of(reference, prompt, answer), dtype=torch.float64))
        found[f"{side}logps"], found[f"ref_{side}logps"] = (
            torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (lines, others)
        )
        found[f"{side}mask"] = mask
    numbers = {name: torch.tensor(values, dtype=torch.float64) for name, values in COLUMNS.items()}
    return {**found, **numbers, "kl": torch.tensor(KL, dtype=torch.float64)}


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_values_and_gradients_are_those_of_the_formula_in_float64(name):
    """Gradients of the formula by central differences over the two parameters of a two-token model."""
    formula, params = BY_HAND[name]
    here, reference = (0.1, -0.2), (-0.1, 0.15)
    loss, sides = RowLoss.of(function(name, **params), rows_of(name)), LOSSES[name].sequences

    def by_hand(theta: tuple[float, float]) -> list[float]:
        found = []
        for at, (prompt, *answers) in enumerate(PAIRS):
            p, q = ([tokens_of(one, prompt, answer) for answer in answers] for one in (theta, reference))
            found.append(formula(at, p, q))
        return found

    theta = torch.tensor(here, dtype=torch.float64, requires_grad=True)
    values = loss.values(given(theta, reference, sides))
    assert values.tolist() == pytest.approx(by_hand(here), rel=1e-12)
    for row in range(len(PAIRS)):
        gradient = torch.autograd.grad(values[row], theta, retain_graph=True)[0].tolist()
        for at in range(2):
            up, down = (tuple(one + step * (at == place) for place, one in enumerate(here)) for step in (1e-5, -1e-5))
            slope = (by_hand(up)[row] - by_hand(down)[row]) / 2e-5
            assert gradient[at] == pytest.approx(slope, rel=1e-6, abs=1e-11)


# ---- NFT ----


def nft_gradient(**params: Any) -> torch.Tensor:
    """The gradient of each token's log-probability where policy and reference are the same."""
    start = -torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logps = start.clone().requires_grad_()
    numbers = {name: torch.tensor(COLUMNS[name], dtype=torch.float64) for name in ("label", "rate")}
    yes = torch.ones(5, 4, dtype=torch.bool)
    values = RowLoss.of(function("nft", length=1, **params), "label").values(
        {"logps": logps, "ref_logps": start, "mask": yes, **numbers}
    )
    return torch.autograd.grad(values.sum(), logps)[0]


@pytest.mark.parametrize(("normalize", "spread"), [(1, lambda rate: 1.0), (2, lambda rate: math.sqrt(rate * (1 - rate)))])
def test_nft_at_ratio_1_has_the_gradient_of_dr_grpo_or_of_grpo(normalize, spread):
    """The gradient of -A log p for an advantage A = label - rate, for GRPO over its standard deviation."""
    advantages = [(label - rate) / spread(rate) for label, rate in zip(LABELS, (max(rate, 0.02) for rate in RATES))]
    wanted = -torch.tensor(advantages, dtype=torch.float64)[:, None].expand(5, 4)
    assert torch.allclose(nft_gradient(normalize=normalize), wanted, rtol=1e-12)


def test_nft_without_negatives_is_sft_of_right_answers_weighed_by_how_rare_they_are():
    wanted = [-(1 - rate) if label else 0.0 for label, rate in zip(LABELS, RATES)]
    assert nft_gradient(negative=0.0)[:, 0].tolist() == pytest.approx(wanted)


def test_an_over_likely_wrong_answer_gets_a_bounded_push():
    """At ratio 4 and rate 0.5 the rest would be -1, which has no logarithm; clamped to 1 the push is that of rate x ratio / (1 - rate)."""
    logps = torch.log(torch.tensor([[0.8]], dtype=torch.float64)).requires_grad_()
    one = torch.ones(1, dtype=torch.float64)
    values = RowLoss.of(function("nft", length=1), "label").values(
        {
            "logps": logps,
            "ref_logps": torch.log(torch.tensor([[0.2]], dtype=torch.float64)),
            "mask": torch.tensor([[True]]),
            "label": 0 * one,
            "rate": 0.5 * one,
        }
    )
    assert values.item() == 0.0
    assert torch.autograd.grad(values.sum(), logps)[0].item() == pytest.approx(0.5 * 4.0)  # (1 - rate) x 0.5 x 4 / 0.5


# ---- as updates ----


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("start"), START)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("reference"), REFERENCE)


def trained(folder: Path, start: Model, reference: Model, name: str, params: dict[str, Any], **more: Any) -> Trained:
    from selfkd.backend.trainer.update import train_rank

    folder.mkdir(exist_ok=True)
    trl = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **more.pop("trl", {})}
    kind = LOSSES[name]
    if kind.function:
        more |= {"function": function(name, **params), "rows": kind.rows}
    columns = [dict(zip(COLUMNS, row)) for row in zip(*COLUMNS.values())]
    rows = written(folder, more.pop("weights", None), columns=columns)
    return train_rank(start, reference, rows, TrainSpec(name, 3, trl=trl, **more), folder / "out", {"threads": 1})


def answers_of(model: dict[str, float], prompt: str, answer: str) -> list[float]:
    return [logprob(model, (prompt + answer[:at])[-1], token) for at, token in enumerate(answer)]


def step_kl() -> float:
    """One step holds all rows, the longest first; each prompt is followed by the answer of the row before it in that order."""
    order = sorted(range(5), key=lambda at: (-len(PAIRS[at][0]) - max(map(len, PAIRS[at][1:])), f"row-{at}"))
    pairs = [(PAIRS[at][0], PAIRS[order[place - 1]][1]) for place, at in enumerate(order)]
    return sum(logprob(START, *pair) - logprob(REFERENCE, *pair) for pair in pairs) / 5


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 3.0, 0.25]])
@pytest.mark.parametrize("name", ["kto", "nft", "sppo", "cream"])
def test_the_first_step_of_an_update_is_the_weighted_mean_of_the_formula(
    tmp_path, start, reference, name, weights, monkeypatch
):
    formula, params = BY_HAND[name]
    found = trained(tmp_path, start, reference, name, params, weights=weights).metrics
    monkeypatch.setitem(globals(), "KL", max(0.0, step_kl()))
    total = 0.0
    for at, (prompt, *answers) in enumerate(PAIRS):
        p, q = ([answers_of(model, prompt, answer) for answer in answers] for model in (START, REFERENCE))
        total += (weights or [1.0] * 5)[at] * formula(at, p, q)
    assert found["loss_first"] == pytest.approx(total / sum(weights or [1.0] * 5), rel=1e-5)
    if name == "kto":
        assert found["kl_first"] == pytest.approx(max(0.0, step_kl()), abs=1e-6)


def test_kto_is_the_same_however_a_step_is_cut(tmp_path, start, reference):
    """Two steps of four and one row, over three epochs: in each epoch a row meets other strangers."""
    cuts = []
    for size in (4, 2, 1):
        trl = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "num_train_epochs": 3}
        cuts.append(trained(tmp_path / str(size), start, reference, "kto", {"beta": 0.4}, trl=trl).metrics)
    assert cuts[0]["steps"] == 6 and cuts[0]["kl_first"] > 0
    for cut in cuts[1:]:
        for what in ("loss_first", "loss_last", "kl_first", "kl_last"):
            assert cut[what] == pytest.approx(cuts[0][what], rel=1e-4, abs=1e-7), what


def test_kto_is_that_of_trls_trainer_for_the_same_strangers():
    """TRL's own code for a batch, on log-probabilities that are given to it: three desirable answers, two undesirable ones."""
    from trl import KTOTrainer

    drawn = torch.Generator().manual_seed(4)
    tables = {name: -torch.rand(5, 6, generator=drawn) for name in ("now", "start", "kl_now", "kl_start")}
    label = torch.tensor([True, False, True, True, False])
    trainer = KTOTrainer.__new__(KTOTrainer)
    vars(trainer).update(
        model=SimpleNamespace(training=True), beta=0.4, desirable_weight=1.2, undesirable_weight=0.7, loss_type="kto",
        calculate_KL=True, precompute_ref_logps=True, aux_loss_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0, _tp_size=1, accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda value: value),
    )  # fmt: skip
    answers = iter([tables["kl_now"], tables["now"]])  # the strangers come first
    nothing = torch.zeros(5, 6)
    model = lambda **_: SimpleNamespace(log_probs=next(answers), entropy=nothing, mean_logits=nothing)  # noqa: E731
    whole = torch.ones(5, 7, dtype=torch.long)
    batch = {f"{prefix}{name}": whole for prefix in ("", "KL_") for name in ("input_ids", "attention_mask", "completion_mask")}
    batch |= {"label": label, "ref_logps": tables["start"].sum(1), "ref_KL_logps": tables["kl_start"].sum(1)}
    theirs = trainer._compute_loss(model, batch, False)
    kl = (tables["kl_now"] - tables["kl_start"]).sum(1).mean().clamp(min=0)
    given = {"logps": tables["now"], "ref_logps": tables["start"], "mask": torch.ones(5, 6, dtype=torch.bool)}
    loss = RowLoss.of(function("kto", beta=0.4, desirable=1.2, undesirable=0.7), "label")
    ours = loss.values({**given, "label": label.float(), "kl": kl})
    assert kl > 0 and ours.mean().item() == pytest.approx(theirs.item(), rel=1e-6)


def test_rows_of_one_prompt_have_no_strangers(tmp_path, tiny):
    rows = write_rows(tmp_path, 3, messages=[{"role": "user", "content": "one"}], label=1.0)
    with pytest.raises(GuardError, match="all rows have one prompt"):
        update(tiny, rows, tmp_path / "out", "kto", reference=tiny, function=function("kto"), **{"rows": "label"})


def test_sppo_of_sure_chances_is_half_of_trls(tmp_path, start, reference):
    """TRL's is the square error to 1/2 and -1/2 over beta, without the factor of the paper."""
    folder = tmp_path / "hard"
    theirs = trained(folder, start, reference, "sppo_hard", {}, beta=0.05).metrics["loss_first"]
    total = 0.0
    for prompt, *answers in PAIRS:
        win, lose = (logprob(START, prompt, answer) - logprob(REFERENCE, prompt, answer) for answer in answers)
        total += (win - 10) ** 2 + (lose + 10) ** 2
    assert theirs == pytest.approx(total / 5, rel=1e-5)


@pytest.mark.parametrize("name", ["ipo", "apo_zero"])
def test_a_loss_type_of_trl_is_a_loss_by_its_name(tmp_path, start, reference, name):
    by_name = trained(tmp_path / "a", start, reference, name, {})
    as_option = trained(tmp_path / "b", start, reference, "dpo", {}, trl={"loss_type": name})
    assert digest.weights(by_name.folder) == digest.weights(as_option.folder)


def test_every_preference_loss_of_trl_has_its_name():
    from trl.trainer.dpo_config import DPOConfig

    from selfkd.backend.trainer.trl_options import CHOICES

    assert {*PREFERENCES, "sigmoid", "sft"} == set(CHOICES["DPOConfig"]["loss_type"])
    assert DPOConfig.__dataclass_fields__["loss_type"]


# ---- on a whole model ----


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tiny import as_model, tiny_model

    return as_model(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Nine rows, every third one right, with all the columns that a shipped loss asks for."""
    folder = tmp_path_factory.mktemp("rows")
    names = {"rate": 0.4, "chosen_win": 0.9, "rejected_win": 0.1, "agreement": 0.8}
    columns = [{"name": name, "value": value} for name, value in names.items()]
    [path] = write_rows(folder, 9, columns=columns)
    pl.read_parquet(path).with_columns(label=(pl.int_range(9) % 3 == 0).cast(pl.Float64)).write_parquet(path)
    return [path]


def whole_update(place: Path, start: Model, rows: list[Path], name: str, out: str, **more: Any) -> Trained:
    spec = {"function": function(name, **({"beta": 0.01} if name == "sppo" else {})), "rows": LOSSES[name].rows}
    return update(start, rows, place / out, name, reference=start, trl={**UNEVEN, "num_train_epochs": 3}, **spec, **more)


@pytest.mark.parametrize("name", ["kto", "nft", "sppo", "cream"])
def test_an_update_learns(tmp_path, tiny, tiny_rows, name):
    metrics = whole_update(tmp_path, tiny, tiny_rows, name, "out").metrics
    assert metrics["loss_last"] < metrics["loss_first"] and metrics["steps"] == 9


def together(rank: int, join: Any, start: Model, rows: list[Path], place: Path) -> Any:
    join()
    return [whole_update(place, start, rows, "kto", str(shard), numerics={"shard": shard}).metrics for shard in (False, True)]


@pytest.mark.nightly
def test_kto_on_two_ranks_whole_and_divided_is_that_of_one(tmp_path, tiny, tiny_rows):
    alone = whole_update(tmp_path, tiny, tiny_rows, "kto", "alone").metrics
    for found in on_ranks(2, together, tiny, tiny_rows, tmp_path)[0]:
        for what in ("loss_first", "loss_last", "kl_last", "tokens"):
            assert found[what] == pytest.approx(alone[what], rel=1e-3, abs=1e-6), what


def test_kto_that_was_stopped_goes_on_to_the_same_bits(tmp_path, tiny, tiny_rows):
    """Its kl is worked out anew before each step, from the weights that a checkpoint put back."""
    saves = Saves(tmp_path / "update", "this", 1e-9)
    with suppress(Enough):
        whole_update(tmp_path, tiny, tiny_rows, "kto", "begun", saves=saves, on_progress=stopped_at(5))
    went_on = whole_update(tmp_path, tiny, tiny_rows, "kto", "b", saves=saves)
    whole = whole_update(tmp_path, tiny, tiny_rows, "kto", "a")
    assert went_on.metrics["continued_at"] == [4]
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)
    for name in ("loss_last", "kl_first", "kl_last", "tokens"):
        assert went_on.metrics[name] == whole.metrics[name], name
