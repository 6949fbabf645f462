"""Engine against trainer on what was sampled: next to nothing where both have the same weights and words, and plain to see where not."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from architectures import architecture
from local_engines import asked, backend
from ranks import on_ranks
from tiny import TEMPLATE, as_model
from updates import Enough, stopped_at, update

from selfkd.backend.base import SAMPLED, DivergenceSpec, LoraSpec, Saves, Trained, TrainSpec
from selfkd.backend.trainer.agreement import DROPOUT, FOUR_BITS, NONE_MET
from selfkd.chain.agreement import alarm, judged
from selfkd.core.files import builtin_folder
from selfkd.core.pool import Function, Model, shape
from selfkd.core.source_code import code_digest

STEP = {"learning_rate": 2e-3, "per_device_train_batch_size": 16, "num_train_epochs": 2}


@dataclass(frozen=True)
class Drawn:
    """Answers of a real engine, the model that gave them, how far the engine lay from it, and where a test may write."""

    model: Model
    answers: pl.DataFrame
    engine: dict[str, Any]
    folder: Path

    def rows(self, **more: Any) -> list[Path]:
        """The answers as rows of any kind: what they are learned against is each other."""
        others = self.answers.select("text", "token_ids").reverse()
        table = [
            {
                **{
                    "id": row["id"],
                    "kind": "sft",
                    "weight": 1.0,
                    "messages": row["messages"],
                    "teacher_messages": row["messages"],
                },
                **{"chosen": row["text"], "chosen_ids": row["token_ids"], "chosen_ended": row["finish_reason"] == "stop"},
                **{"rejected": other["text"] + "!", "rejected_ended": True, **more},
            }
            for row, other in zip(self.answers.to_dicts(), others.to_dicts(), strict=True)
        ]
        shape("rows", table).write_parquet(self.folder / "rows.parquet")
        return [self.folder / "rows.parquet"]

    def said(self, change: float = 0.0) -> Path:
        table = [
            {"row": row["id"], "ids": row["token_ids"], "logprobs": [one + change for one in row["token_logprobs"]]}
            for row in self.answers.to_dicts()
        ]
        pl.DataFrame(table, schema=SAMPLED).write_parquet(self.folder / "said.parquet")
        return self.folder / "said.parquet"

    def learned(self, loss: str = "sft", start: Model | None = None, **more: Any) -> Trained:
        words = {"trl": STEP, "precision": "fp32", "sampled": self.said(more.pop("change", 0.0)), **more}
        return update(start or self.model, self.rows(), self.folder / "child", loss, **words)


def drawn(folder: Path, generator: str, dtype: str) -> Drawn:
    with backend(folder, generator, dtype) as local:
        local.load({"path": str(architecture("llama", folder / "source"))}, folder / "root", 0 if dtype == "bfloat16" else None)
        root = as_model(folder / "root")
        return Drawn(root, asked(local, root, folder), local.swap_notes()["apart"], folder)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    return drawn(tmp_path_factory.mktemp("exact"), "transformers", "float32")


def figure(drawn: Drawn, trained: Trained) -> dict[str, Any]:
    return judged(trained.metrics["engine_apart"], drawn.engine)


def taught(exact: Drawn, **more: Any) -> Trained:
    """By distillation: a teacher that is the model itself behind another prompt."""
    rows = exact.rows(kind="kd", teacher_messages=[{"role": "user", "content": "abc"}])
    function = Function("kd", builtin_folder() / "loss" / "kd.py", code_digest(builtin_folder() / "loss" / "kd.py"))
    spec = {"function": function, "rows": "kd", "divergence": DivergenceSpec(**more), "precision": "fp32"}
    return update(
        exact.model, rows, exact.folder / "child", "kd", trl=STEP, sampled=exact.said(), reference=exact.model, **spec
    )


@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_same_weights_and_words_lie_within_their_rounding(exact: Drawn, loss: str) -> None:
    found = figure(exact, exact.learned(loss))
    first = exact.answers["tokens"].sum()
    assert 0 <= found["mean"] <= found["p99"] < 1e-5 and found["floor"] < 1e-5
    assert 50 < found["tokens"] <= first and not alarm(found, "round-001/train")


def test_every_token_is_off_by_what_the_engine_said_wrongly(exact: Drawn) -> None:
    """The engine's log-probabilities are raised by 0.25 each: so far apart are mean and 99th percentile."""
    found = figure(exact, exact.learned(change=0.25))
    assert found["mean"] == pytest.approx(0.25, abs=1e-5) and found["p99"] == pytest.approx(0.25, abs=1e-5)
    said = alarm(found, "round-001/train")
    assert said.startswith(
        "round-001/train: engine and trainer give what was sampled log-probabilities that lie 0.25 nats apart"
    )
    for cause in ("other weights", "another chat template", "attention"):
        assert cause in said


def test_an_engine_that_holds_other_weights_is_seen(exact: Drawn, tmp_path: Path) -> None:
    child = exact.learned(trl={**STEP, "learning_rate": 1e-3}).folder
    other = as_model(Path(shutil.copytree(child, tmp_path / "other")))
    found = figure(exact, exact.learned(start=other))
    assert found["mean"] > 0.05 and alarm(found, "train")


def test_a_trainer_that_writes_prompts_by_another_chat_template_is_seen(exact: Drawn, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exact.model.path, tmp_path / "other"))
    template = folder / "chat_template.jinja"
    assert TEMPLATE in template.read_text()
    template.write_text(TEMPLATE.replace("assistant: ", "me> "))
    found = figure(exact, exact.learned(start=as_model(folder)))
    assert found["mean"] > 0.05 and alarm(found, "train")


def test_of_a_part_of_an_answer_the_learned_tokens_count(exact: Drawn) -> None:
    whole = taught(exact).metrics["engine_apart"]
    part = taught(exact, skip=2, first=5).metrics["engine_apart"]
    lengths = [min(count, 5) - 2 for count in exact.answers["tokens"] if count > 2]
    assert whole["p99"] < 1e-5 and part["p99"] < 1e-5
    assert 0 < part["tokens"] <= sum(lengths) < whole["tokens"]


def test_the_figure_changes_nothing_that_is_learned(exact: Drawn) -> None:
    with_it = exact.learned()
    digest = as_model(with_it.folder).digest
    without = exact.learned(sampled=None)
    assert as_model(without.folder).digest == digest and "engine_apart" not in without.metrics


def test_where_it_has_no_meaning_there_is_a_reason_and_no_number(exact: Drawn, tmp_path: Path) -> None:
    assert exact.learned(lora=LoraSpec(4, 8.0, quantise="nf4")).metrics["engine_apart"] == {"why": FOUR_BITS}
    folder = Path(shutil.copytree(exact.model.path, tmp_path / "dropping"))
    words = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**words, "attention_dropout": 0.1}))
    assert exact.learned(start=as_model(folder)).metrics["engine_apart"] == {"why": DROPOUT}
    nothing = pl.DataFrame(schema=SAMPLED)
    nothing.write_parquet(tmp_path / "nothing.parquet")
    assert exact.learned(sampled=tmp_path / "nothing.parquet").metrics["engine_apart"] == {"why": NONE_MET}


def test_an_update_that_was_stopped_keeps_the_figure_of_its_first_step(exact: Drawn, tmp_path: Path) -> None:
    whole = exact.learned().metrics["engine_apart"]
    saves = Saves(tmp_path / "saves", "key", 1e-9)
    with suppress(Enough):
        exact.learned(saves=saves, on_progress=stopped_at(3))
    trained = exact.learned(saves=saves)
    assert trained.metrics["continued_at"] and trained.metrics["engine_apart"] == whole


def _on_a_rank(rank: int, join: Any, start: Model, rows: list[Path], spec: TrainSpec, out: Path) -> dict[str, Any]:
    from selfkd.backend.trainer.update import train_rank

    join()
    return dict(train_rank(start, None, rows, spec, out, {"threads": 1}).metrics)


def test_two_ranks_find_what_one_finds(exact: Drawn, tmp_path: Path) -> None:
    alone = exact.learned().metrics["engine_apart"]
    spec = TrainSpec("sft", 2**40 + 7, trl=STEP, precision="fp32", sampled=exact.said())
    both = on_ranks(2, _on_a_rank, exact.model, exact.rows(), spec, tmp_path / "child")
    together = both[0]["engine_apart"]
    assert together["tokens"] == alone["tokens"] and together["mean"] == pytest.approx(alone["mean"], abs=1e-6)


@pytest.mark.real
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.nightly)])
def test_vllm_lies_within_its_rounding(tmp_path: Path, dtype: str) -> None:
    found = drawn(tmp_path, "vllm", dtype)
    for precision in ("fp32", "bf16") if dtype == "bfloat16" else ("fp32",):
        figures = figure(found, found.learned(precision=precision))
        assert figures["mean"] < 2 * figures["floor"] and not alarm(figures, "train")
        assert alarm(figure(found, found.learned(precision=precision, change=0.1)), "train")
