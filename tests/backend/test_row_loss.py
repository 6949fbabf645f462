"""Losses that are functions: what they are given, how their values become a step, and which of them are refused."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram import PAIRS, REFERENCE, START, bigram, logprob, written
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from selfkd.backend.base import LoraSpec, Saves, Trained, TrainSpec
from selfkd.backend.trainer.loss_kinds import LOSSES
from selfkd.backend.trainer.row_loss import RowLoss, made_up, points, problems, refuse_mixed_rows
from selfkd.core import digest
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model
from selfkd.core.source_code import code_digest
from selfkd.errors import UsageError
from selfkd.rewards.check import run_doctests

WEIGHTS = [1.0, 2.0, 0.5, 3.0, 0.25]
SHIPPED = builtin_folder() / "loss"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("start"), START)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return bigram(tmp_path_factory.mktemp("reference"), REFERENCE)


def function(path: Path, name: str = "", **params: Any) -> Function:
    return Function(name or path.stem, path, code_digest(path), params)


def mine(folder: Path, body: str, names: str = "logps, mask", **params: Any) -> Function:
    """A loss of one's own, in a file."""
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(f"import torch\n\ndef mine({names}):\n    {body}\n")
    return function(folder / "mine.py", **params)


def trained(
    folder: Path,
    start: Model,
    reference: Model | None,
    loss: Function | str,
    rows: str = "sft",
    weights: Any = None,
    **more: Any,
) -> Trained:
    from selfkd.backend.trainer.update import train_rank

    folder.mkdir(exist_ok=True)
    trl = {"per_device_train_batch_size": 8, "learning_rate": 1e-3, **more.pop("trl", {})}
    numerics = {"threads": 1, **more.pop("numerics", {})}
    columns, steps = more.pop("columns", None), more.pop("steps", [])
    if isinstance(loss, Function):
        more |= {"function": loss, "rows": rows}
        loss = f"{loss.path.name}:{loss.name}"
    spec = TrainSpec(loss, 3, trl=trl, **more)
    return train_rank(start, reference, written(folder, weights, columns=columns), spec, folder / "out", numerics, steps.append)


# What it is given


def test_a_row_has_the_log_probabilities_of_its_answers_tokens_from_the_first_on(tmp_path, start, reference):
    seen = tmp_path / "seen.pt"
    body = f"torch.save((logps, ref_logps, mask, gain), {str(seen)!r}); return -(logps * gain[:, None]).sum(1)"
    loss = mine(tmp_path, body, "logps, ref_logps, mask, gain")
    columns = [{"gain": float(number)} for number in range(5)]
    trained(tmp_path, start, reference, loss, columns=columns, trl={"per_device_train_batch_size": 5})
    logps, ref_logps, mask, gain = torch.load(seen)
    for row, count in enumerate(mask.sum(1).tolist()):
        prompt, answer, _ = next(pair for pair in PAIRS if len(pair[1]) == count and pair == PAIRS[int(gain[row])])
        for values, model in ((logps, START), (ref_logps, REFERENCE)):
            steps = [logprob(model, (prompt + answer[:at])[-1:], token) for at, token in enumerate(answer)]
            assert values[row, :count].tolist() == pytest.approx(steps, rel=1e-5)
            assert not values[row, count:].any()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize(("average", "each"), [("rows", lambda answer: 1), ("tokens", len)])
def test_a_step_is_the_weighted_average_of_its_rows_values(tmp_path, start, average, each, weights):
    """The value of a row here is its log-likelihood squared, which is no sum over tokens."""
    loss = mine(tmp_path, "return (logps * mask).sum(1) ** 2")
    found = trained(tmp_path, start, None, loss, weights=weights, average=average).metrics["loss_first"]
    value = [logprob(START, prompt, chosen) ** 2 for prompt, chosen, _ in PAIRS]
    parts = list(zip(value, weights or [1.0] * 5, (each(chosen) for _, chosen, _ in PAIRS)))
    assert found == pytest.approx(sum(v * w for v, w, _ in parts) / sum(w * n for _, w, n in parts), rel=1e-5)


# The shipped ones are those of TRL


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_shipped_sft_is_that_of_trl(tmp_path, start, weights):
    trl = {"per_device_train_batch_size": 2, "num_train_epochs": 3}
    ours = trained(
        tmp_path / "a", start, None, function(SHIPPED / "sft.py"), weights=weights, average="tokens", trl=trl
    ).metrics
    theirs = trained(tmp_path / "b", start, None, "sft", weights=weights, trl=trl).metrics
    for name in ("loss_first", "loss_last", "tokens", "grad_norm_max"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    assert ours["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_the_shipped_dpo_is_that_of_trl(tmp_path, start, reference, weights, nll):
    trl = {"per_device_train_batch_size": 2, "num_train_epochs": 3}
    shipped = function(SHIPPED / "dpo.py", beta=0.4, nll=nll)
    ours = trained(tmp_path / "a", start, reference, shipped, "pair", weights, trl=trl).metrics
    theirs = trained(tmp_path / "b", start, reference, "dpo", weights=weights, beta=0.4, nll=nll, trl=trl).metrics
    for name in ("loss_first", "loss_last", "tokens", "grad_norm_max"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name
    if weights is None:  # TRL's mean does not know weights
        assert ours["logps/chosen_first"] == pytest.approx(theirs["logps/chosen_first"], rel=1e-5)
    assert ours["update_norm"] == pytest.approx(theirs["update_norm"], rel=1e-3)


# Cut, divided, flat, with an adapter: the same numbers

RATIO = "r = ((logps - ref_logps) * mask).sum(1); return -gain * torch.exp(r).clamp(max=1.2) + 0.1 * r ** 2"
GAINS = [{"gain": gain} for gain in (1.0, -0.5, 0.25, 2.0, -1.0)]


@pytest.mark.parametrize("average", ["rows", "tokens"])
def test_how_a_step_is_cut_changes_nothing(tmp_path, start, reference, average):
    """4 rows a step, 5 rows: the second step holds one row, less than there are micro-batches."""
    loss = mine(tmp_path, RATIO, "logps, ref_logps, mask, gain")
    cuts = []
    for size in (4, 2, 1):
        trl = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        more = {"weights": WEIGHTS, "average": average, "columns": GAINS, "trl": trl}
        cuts.append(trained(tmp_path / str(size), start, reference, loss, **more).metrics)
    for cut in cuts[1:]:
        assert cut["loss_first"] == pytest.approx(cuts[0]["loss_first"], rel=1e-5)
        assert cut["loss_last"] == pytest.approx(cuts[0]["loss_last"], rel=1e-4)
        assert cut["update_norm"] == pytest.approx(cuts[0]["update_norm"], rel=1e-3)
        assert cut["logps/chosen_first"] == pytest.approx(cuts[0]["logps/chosen_first"], rel=1e-5)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("v = -(logps * mask).sum(1); return v - v.mean()", "cannot be split: the value of row"),
        ("v = -(logps * mask).sum(1); return v / v.detach().max()", "cannot be split: the value of row"),
        ("return -logps.mean(1)", "cannot be split: the value of row"),  # padding counts: a batch's width
        ("return -(logps * mask).sum(1).sort().values", "cannot be split: the value of row"),
        ("v = -(logps * mask).sum(1); return v + v.mean() - v.mean().detach()", "the gradient of a row"),
        ("return -(logps * mask).sum()", r"returned \[\] for 4 rows, where a tensor of one value per row is wanted: \[4\]"),
        ("return logps", r"returned \[4, 5\] for 4 rows"),
        ("return 1.5", "returned float for 4 rows"),
        ("return torch.log((logps * mask).sum(1))", "is not finite"),
        ("return mask.sum(1).float()", "has no gradient"),
        ("return -(logps * mask).sum(1).detach()", "has no gradient"),
        ("return -torch.sqrt((logps * ~mask).sum(1))", "gradient of the loss is not finite"),
        ("return logps[7]", r"the loss raised IndexError: .*\(at mine.py:4\)"),
    ],
)
def test_what_is_no_value_per_row_is_refused(tmp_path, body, said):
    with pytest.raises(UsageError, match=said) as error:
        refuse_mixed_rows(RowLoss.of(mine(tmp_path, body), "sft"), made_up("sft", []))
    assert error.value.where == "mine.py:mine" and error.value.fix


def test_it_is_refused_before_the_first_step_and_nothing_is_left(tmp_path, start):
    steps: list[Any] = []
    with pytest.raises(UsageError, match="cannot be split"):
        trained(tmp_path, start, None, mine(tmp_path, "v = (logps * mask).sum(1); return v.mean() - v"), steps=steps)
    assert steps == [] and not (tmp_path / "out").exists()


def test_a_batch_mean_does_not_hide_where_policy_and_reference_agree(tmp_path, start):
    """Before the first step every ratio against the start is 1, and so is their mean."""
    body = "r = torch.exp(((logps - ref_logps) * mask).sum(1)); return -r / r.mean()"
    with pytest.raises(UsageError, match="cannot be split"):
        trained(tmp_path, start, start, mine(tmp_path, body, "logps, ref_logps, mask"))


def test_a_column_that_a_row_lacks_is_named(tmp_path, start):
    loss = mine(tmp_path, "return -(logps * mask).sum(1) * gain", "logps, mask, gain")
    with pytest.raises(UsageError, match="asks for 'gain', which not every row has"):
        trained(tmp_path, start, None, loss, columns=[{"gain": 1.0}] * 4 + [{}])


def test_a_column_that_not_every_row_has_is_not_given_where_it_has_a_default(tmp_path, start):
    loss = mine(tmp_path, "return -(logps * mask).sum(1) * gain", "logps, mask, gain=1.0")
    some = trained(tmp_path / "a", start, None, loss, columns=[{"gain": 5.0}] * 4 + [{}]).metrics
    none = trained(tmp_path / "b", start, None, mine(tmp_path, "return -(logps * mask).sum(1)")).metrics
    assert some["loss_first"] == none["loss_first"]


def test_rows_without_padding_with_shards_or_an_adapter_teach_the_same(tmp_path, tiny, tiny_rows):
    found = {}
    for name, more in (("flat", {}), ("padded", {"numerics": {"trainer": {"attn_implementation": "sdpa"}}})):
        found[name] = tiny_update(tmp_path, tiny, tiny_rows, name, **more)
    assert [one.metrics["padding_free"] for one in found.values()] == [True, False]
    for what in ("loss_first", "loss_last", "tokens", "logps/chosen_last"):
        assert found["flat"].metrics[what] == pytest.approx(found["padded"].metrics[what], rel=1e-4)
    lora = tiny_update(tmp_path, tiny, tiny_rows, "lora", lora=LoraSpec(r=2, alpha=4.0))
    assert lora.metrics["loss_first"] == pytest.approx(found["flat"].metrics["loss_first"], rel=1e-5)
    assert lora.metrics["loss_last"] < lora.metrics["loss_first"] and (lora.folder / "adapter.json").exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Model:
    from tiny import as_model, tiny_model

    return as_model(tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from updates import write_rows

    return write_rows(tmp_path_factory.mktemp("rows"), 9)


TRUST = """
def mine(chosen_logps, ref_chosen_logps, chosen_mask, rejected_logps, ref_rejected_logps, rejected_mask):
    chosen = ((chosen_logps - ref_chosen_logps) * chosen_mask).sum(1)
    rejected = ((rejected_logps - ref_rejected_logps) * rejected_mask).sum(1)
    return (chosen - 1) ** 2 + (rejected + 1) ** 2
"""


def tiny_update(place: Path, start: Model, rows: list[Path], name: str, **more: Any) -> Trained:
    from updates import UNEVEN, update

    if not (place / "trust.py").exists():
        (place / "trust.py").write_text(TRUST)
    loss = function(place / "trust.py", "mine")
    numerics = more.pop("numerics", {})
    spec = {"function": loss, "rows": "pair", "trl": {**UNEVEN, "num_train_epochs": 3}, **more}
    return update(start, rows, place / name, "trust.py:mine", numerics=numerics, reference=start, **spec)


def together(rank: int, join: Any, start: Model, rows: list[Path], place: Path) -> dict[bool, Any]:
    join()
    return {shard: tiny_update(place, start, rows, str(shard), numerics={"shard": shard}) for shard in (False, True)}


def test_two_ranks_whole_and_divided_learn_what_one_learns(tmp_path, tiny, tiny_rows):
    alone = tiny_update(tmp_path, tiny, tiny_rows, "alone").metrics
    found = on_ranks(2, together, tiny, tiny_rows, tmp_path)[0]
    for shard, one in found.items():
        for what in ("loss_first", "loss_last", "tokens", "logps/rejected_last"):
            assert one.metrics[what] == pytest.approx(alone[what], rel=1e-3), (shard, what)


# Stopped in the middle


def doomed(start: Model, rows: list[Path], place: Path) -> None:
    tiny_update(place, start, rows, "doomed", saves=Saves(place / "update", "this", 1e-9), on_progress=killed_at(4))


def killed_at(step: int) -> Any:
    def at(progress: Any) -> None:
        if progress["step"] >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def test_killed_in_the_middle_it_ends_on_the_same_bits(tmp_path, tiny, tiny_rows):
    process = multiprocessing.get_context("spawn").Process(target=doomed, args=(tiny, tiny_rows, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    went_on = tiny_update(tmp_path, tiny, tiny_rows, "b", saves=Saves(tmp_path / "update", "this", 1e-9))
    whole = tiny_update(tmp_path, tiny, tiny_rows, "a")
    assert went_on.metrics["continued_at"] == [3] and whole.metrics["steps"] == 9
    assert digest.weights(went_on.folder) == digest.weights(whole.folder)
    for name in ("loss_last", "tokens", "logps/chosen_last", "grad_norm_max"):
        assert went_on.metrics[name] == whole.metrics[name]


# The proof, on losses that nobody wrote

WISE = {
    "sum": lambda logps, mask: -(logps * mask).sum(1),
    "mean": lambda logps, mask: -(logps * mask).sum(1) / mask.sum(1),
    "powers": lambda logps, mask: (torch.exp(logps) * mask).pow(2).sum(1) - (logps * mask).amin(1),
    "cut": lambda logps, mask: torch.relu(1 + (logps * mask).sum(1)) + logps[:, 0] ** 2,
}
SHARED = {
    "centred": lambda values: values - values.mean(),
    "scaled": lambda values: values / (1 + values.detach().abs().max()),
    "shifted": lambda values: values.roll(1, 0),
    "leaked": lambda values: values + values.sum() - values.sum().detach(),
}


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(sorted(WISE)),
    st.lists(st.integers(1, 5), min_size=2, max_size=5),
    st.sampled_from([None, *sorted(SHARED)]),
    st.integers(0, 2**32),
)
def test_only_what_rows_share_is_refused_whatever_their_lengths(name, lengths, shared, seed):
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    drawn = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(mask.shape, generator=drawn) * mask
    loss = RowLoss(lambda logps, mask: SHARED.get(shared, lambda values: values)(WISE[name](logps, mask)), {}, "sft", "x.py:x")
    if shared is None:
        refuse_mixed_rows(loss, {"logps": logps, "mask": mask})
    else:
        with pytest.raises(UsageError):
            refuse_mixed_rows(loss, {"logps": logps, "mask": mask})


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda path: path.stem)
def test_the_examples_of_a_shipped_loss_hold_and_it_is_row_wise(path):
    assert run_doctests(function(path)) == []
    loss = RowLoss.of(function(path), kind_of_file(path))
    for point in points(made_up(loss.rows, loss.columns), loss.rows):
        assert list(problems(loss, point)) == []


def kind_of_file(path: Path) -> str:
    """What a loss of that name learns from; a shipped file that has no name of its own is told by the recipe that names it."""
    return LOSSES[path.stem].rows if path.stem in LOSSES else {"reinforce": "label"}[path.stem]
