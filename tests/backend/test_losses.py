"""Losses against formulas worked out by hand, on a model of two letters whose probabilities can be chosen."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bigram import PAIRS, REFERENCE, START, bigram, logprob, written

from selfkd.backend.base import TrainSpec
from selfkd.backend.trainer.loss_kinds import LOSSES
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("start"), START)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("reference"), REFERENCE)


def trained(
    folder: Path, start: Model, reference: Model | None, spec: dict[str, Any], weights: list[float] | None = None
) -> Any:
    from selfkd.backend.trainer.update import train_rank

    trl = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **spec.pop("trl", {})}
    arguments = TrainSpec(**{"loss": "dpo", "seed": 3, **spec, "trl": trl})
    return train_rank(start, reference, written(folder, weights), arguments, folder / "out", {"threads": 1}).metrics


WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_sft_is_the_mean_over_completion_tokens_only(tmp_path, start, weights):
    found = trained(tmp_path, start, None, {"loss": "sft"}, weights)["loss_first"]
    loss = sum(-weight * logprob(START, prompt, chosen) for (prompt, chosen, _), weight in zip(PAIRS, weights or [1.0] * 5))
    tokens = sum(weight * len(chosen) for (_, chosen, _), weight in zip(PAIRS, weights or [1.0] * 5))
    assert found == pytest.approx(loss / tokens, rel=1e-5)


def test_sft_without_padding_is_the_same_sum(tmp_path, start):
    padded, flat = (trained(tmp_path, start, None, {"loss": "sft", "trl": {"padding_free": flat}}) for flat in (False, True))
    assert flat["loss_last"] == pytest.approx(padded["loss_last"], rel=1e-5)
    assert flat["update_norm"] == pytest.approx(padded["update_norm"], rel=1e-3)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def preference(kind: str, beta: float, chosen: float, rejected: float, pair: tuple[str, str, str]) -> float:
    """The published losses of one pair, from the log-ratios of policy and reference."""
    margin = beta * (chosen - rejected)
    return {
        "sigmoid": -math.log(sigmoid(margin)),  # Rafailov et al. 2023, eq. 7
        "hinge": max(0.0, 1 - margin),  # Zhao et al. 2023
        "ipo": (chosen / len(pair[1]) - rejected / len(pair[2]) - 1 / (2 * beta)) ** 2,  # Azar et al. 2023, eq. 17, per token
        "robust": (-0.9 * math.log(sigmoid(margin)) + 0.1 * math.log(sigmoid(-margin))) / 0.8,  # Chowdhury et al. 2024
    }[kind]


def expected(kind: str, beta: float, nll: float, weights: list[float], reference: dict[str, float] | None) -> float:
    total = 0.0
    for pair, weight in zip(PAIRS, weights):
        prompt, *answers = pair
        ratios = [logprob(START, prompt, text) - (logprob(reference, prompt, text) if reference else 0) for text in answers]
        normalised = -logprob(START, prompt, pair[1]) / len(pair[1])  # Pang et al. 2024, eq. 1
        total += weight * (preference(kind, beta, *ratios, pair) + nll * normalised)
    return total / sum(weights)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("kind", "nll"), [("sigmoid", 0.0), ("sigmoid", 0.7), ("hinge", 0.0), ("ipo", 0.0), ("robust", 0.5)])
def test_preference_losses_equal_their_papers(tmp_path, start, reference, kind, nll, weights):
    options = {"loss_type": kind, "label_smoothing": 0.1} if kind == "robust" else {"loss_type": kind}
    found = trained(tmp_path, start, reference, {"beta": 0.4, "nll": nll, "trl": options}, weights)
    assert found["loss_first"] == pytest.approx(expected(kind, 0.4, nll, weights or [1.0] * 5, REFERENCE), rel=1e-5)


def test_without_a_reference_every_answer_was_equally_likely(tmp_path, start):
    found = trained(tmp_path, start, None, {"beta": 0.4})
    assert found["loss_first"] == pytest.approx(expected("sigmoid", 0.4, 0.0, [1.0] * 5, None), rel=1e-5)


def test_against_itself_the_first_margin_is_zero_and_the_last_is_not(tmp_path, start):
    found = trained(tmp_path, start, start, {"beta": 0.4, "trl": {"num_train_epochs": 5, "learning_rate": 0.05}})
    assert found["loss_first"] == pytest.approx(math.log(2), rel=1e-6)
    assert found["rewards/margins_first"] == pytest.approx(0, abs=1e-6)
    assert found["rewards/margins_last"] > 0.01
    assert found["loss_last"] < found["loss_first"]


def test_the_likelihood_term_lifts_the_chosen_answers(tmp_path, start):
    plain, lifted = (
        trained(tmp_path, start, start, {"nll": nll, "trl": {"num_train_epochs": 5, "learning_rate": 0.05}})
        for nll in (0.0, 2.0)
    )
    assert lifted["logps/chosen_last"] > plain["logps/chosen_last"]
    assert lifted["nll/chosen_last"] < lifted["nll/chosen_first"]


@pytest.mark.parametrize("loss", ["sft", "dpo"])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_how_a_batch_is_cut_changes_nothing(tmp_path, start, reference, loss, weights):
    """4 rows a step, 5 rows: the second step holds one row, less than there are micro-batches."""
    spec = {"loss": loss, "nll": 0.5 if loss == "dpo" else 0.0}
    other = reference if loss == "dpo" else None
    cuts = [
        trained(
            tmp_path,
            start,
            other,
            {**spec, "trl": {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}},
            weights,
        )
        for size in (4, 2, 1)
    ]
    for cut in cuts[1:]:
        assert cut["loss_first"] == pytest.approx(cuts[0]["loss_first"], rel=1e-5)
        assert cut["loss_last"] == pytest.approx(cuts[0]["loss_last"], rel=1e-4)
        assert cut["update_norm"] == pytest.approx(cuts[0]["update_norm"], rel=1e-3)


def test_a_loss_that_sorts_its_batch_honours_no_weights(tmp_path, start, reference):
    with pytest.raises(UsageError, match="aot cannot honour rows of unequal weight"):
        trained(tmp_path, start, reference, {"trl": {"loss_type": "aot"}}, WEIGHTS)


def test_only_learned_positions_reach_the_vocabulary(tmp_path, start):
    """TRL projects every position on devices without Triton; that was half of the time on CPU."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    import selfkd.backend.trainer.losses  # noqa: F401 - imported for what it changes in TRL

    model = AutoModelForCausalLM.from_pretrained(start.path)
    add_fused_lm_head(model)
    counts = []
    for learned in (4, 8):
        labels = torch.full((1, 65), -100)
        labels[:, -learned:] = 1
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.ones_like(labels), labels=labels, fused_lm_head=True)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 4 * 2 * 3 * 2  # tokens, hidden size, vocabulary, multiply and add


@pytest.mark.parametrize("like", ["sft", "dpo"])
def test_a_loss_is_one_row_of_a_table(tmp_path, start, reference, monkeypatch, like):
    """A loss with a name of its own trains like the one whose trainer it takes, at the learning rate of its own row."""
    from selfkd.backend.trainer.update import train_rank

    monkeypatch.setitem(LOSSES, "mine", replace(LOSSES[like], learning_rate=2e-3))
    found = {}
    for loss, trl in (("mine", {}), (like, {"learning_rate": 2e-3})):
        (tmp_path / loss).mkdir()
        spec = TrainSpec(loss, 3, beta=0.4, trl=trl)
        found[loss] = train_rank(start, reference, written(tmp_path / loss), spec, tmp_path / loss / "out", {"threads": 1})
    assert digest.weights(found["mine"].folder) == digest.weights(found[like].folder)
    assert found["mine"].metrics["loss_last"] == found[like].metrics["loss_last"]
