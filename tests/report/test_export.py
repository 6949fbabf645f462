"""What leaves a run: a model that other programs open, a card that is true and tells nothing of this machine, tables that TRL reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import polars as pl
import pytest
import torch
import yaml
from chains import RECIPE, go, recipe_in
from tiny import as_model, opened, tiny_model
from updates import FAST, write_rows

from selfkd.backend.base import LoraSpec, TrainSpec
from selfkd.backend.trainer.update import train_rank
from selfkd.chain.run import Run
from selfkd.cli.main import main
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import ChainError, UsageError
from selfkd.report import export as exporting
from selfkd.report import trl_shape
from selfkd.report.export import export

IDS = torch.tensor([[1, 20, 30, 40, 50]])


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An adapter of rank 4 over a tiny Llama, as an update leaves it."""
    home = tmp_path_factory.mktemp("adapted")
    base = as_model(tiny_model(home / "root"))
    spec = TrainSpec(loss="sft", seed=5, trl=FAST, lora=LoraSpec(4, 8.0))
    folder = train_rank(base, None, write_rows(home), spec, home / "out", {"threads": 1}).folder
    return Model("policy", str(folder), digest.weights(folder), "adapter", base.path)


def by_peft(adapter: Path, base: Path) -> torch.Tensor:
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(opened(base), adapter).eval()(IDS).logits


# ---- the model ----


def test_an_adapter_in_full_weights_says_what_peft_makes_of_the_two(adapted: Model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("selfkd.backend.merged.SHARD", 40_000)  # bytes: several files, with an index
    exporting._write_full(adapted, tmp_path / "whole", "fp32")
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
    assert not (tmp_path / "whole" / digest.ADAPTER).exists()
    with torch.no_grad():
        merged = opened(tmp_path / "whole")(IDS).logits
    assert adapted.base
    torch.testing.assert_close(merged, by_peft(Path(adapted.path), Path(adapted.base)), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(merged, opened(Path(adapted.base))(IDS).logits, atol=1e-4)


def test_an_adapter_takes_the_weights_beneath_it_along_and_names_no_folder_of_this_machine(
    adapted: Model, tmp_path: Path
) -> None:
    exporting._write_adapter(adapted, tmp_path / "out", "fp32")
    moved = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert adapted.base
    found = by_peft(Path(moved), Path(moved) / exporting.BENEATH)
    assert torch.equal(found, by_peft(Path(adapted.path), Path(adapted.base)))
    said = "".join(path.read_text() for path in Path(moved).rglob("*.json"))
    assert str(tmp_path.parent) not in said


def test_a_folder_that_holds_something_is_left_as_it_is(done: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is there already"):
        export(Run.at(done), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_an_empty_folder_is_filled_and_nothing_else_is_left_beside_it(done: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = export(Run.at(done), tmp_path / "out", "policy@round-1")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert digest.weights(tmp_path / "out") == found.model.digest == Run.at(done).sealed()[1].models["policy"].digest


def test_what_cannot_be_written_leaves_no_folder(done: Path, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting.model_card, "text", full)
    with pytest.raises(OSError, match="No space left"):
        export(Run.at(done), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_were_changed_are_not_handed_on(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    model = run.model("policy")
    (Path(model.path) / "weights.json").write_text('{"skill": 1.0}')
    with pytest.raises(ChainError, match="changed after they were committed"):
        export(Run.at(run.folder), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_round_that_is_not_there_and_a_checkpoint_that_was_taken_away_are_named(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path, RECIPE, "keep={last: 1, base: false}"), tmp_path / "run")
    with pytest.raises(ChainError, match="last round"):
        export(run, tmp_path / "out", "policy@round-9")
    with pytest.raises(ChainError, match="not on disk any more"):
        export(run, tmp_path / "out", "policy@base")


def test_the_best_round_is_written_where_the_recipe_says_which_that_is(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path, RECIPE + "\nbest: {metric: dev/last_number, mode: min}\n"), tmp_path / "run")
    assert export(run, tmp_path / "out").model.digest == run.sealed()[0].models["policy"].digest  # the fake only gets better


# ---- the card ----


def test_the_card_has_the_hubs_fields_and_the_figures_of_status(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    words = yaml.safe_load(front)
    assert (words["library_name"], words["tags"]) == ("transformers", ["selfkd", "self-distillation", "sft"])
    assert "base_model" not in words and "license" not in words  # a fake is no model of the hub; nobody named a licence
    right = run.sealed()[-1].metrics["dev/last_number"]
    [row] = [line for line in body.splitlines() if line.startswith("| round 2")]
    assert f"{100 * right:.1f} %" in row
    assert [seal.digest[:16] in body for seal in run.sealed()] == [True] * 3
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["steps"][0]["sample"]["n"] == 3
    assert str(tmp_path) not in card


def test_the_card_names_no_folder_of_code_and_no_mark_in_a_template_ends_its_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    (tmp_path / "told.j2").write_text("Say: {{ prompt }}")
    text = RECIPE.replace("reward/number.py:last_number", f"{tmp_path}/mine.py:right").replace("last_number", "right")
    text = text.replace("max_tokens: 64", f"max_tokens: 64, template: {tmp_path}/told.j2")
    text = text.replace("  - train:", '  - build: {view: "Solve\\n```\\n# Mine\\n{{ prompt }}"}\n  - train:')
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    card = exporting.model_card.text(run, "policy", run.named("policy"), "fp32", "")
    assert str(tmp_path) not in card and "`mine.py:right`" in card and "`told.j2`" in card
    recipe = yaml.safe_load(card.partition("````yaml\n")[2].partition("\n````\n")[0])
    assert recipe["steps"][3]["build"]["view"] == "Solve\n```\n# Mine\n{{ prompt }}" and "steps" in recipe and "keep" in recipe


def test_a_model_and_data_of_the_hub_are_named_to_it(tmp_path: Path) -> None:
    run = go(recipe_in(tmp_path), tmp_path / "run")
    recipe = {**run.info.recipe, "prompts": {"train": {"hub": "openai/gsm8k"}, "dev": {"file": "/home/me/dev.jsonl"}}}
    object.__setattr__(run, "info", exporting.model_card.Info.from_json({**run.info.to_json(), "model": {"path": "org/model"}}))
    words = exporting.model_card._front(run, recipe, "")
    assert (words["base_model"], words["datasets"]) == ("org/model", ["openai/gsm8k"])
    assert exporting.model_card._shown(recipe["prompts"]["dev"]) == "file: dev.jsonl"


# ---- tables ----


def test_samples_of_every_round_stand_in_one_table_with_what_became_of_them(done: Path) -> None:
    found = trl_shape.samples(Run.at(done))
    assert found.group_by("round").len().sort("round").rows() == [(1, 36), (2, 36)]  # 12 prompts, 3 answers, no held-out ones
    assert {"last_number", "kept", "why", "answer"} <= set(found.columns)
    one = found.row(0, named=True)
    assert one["prompt"][-1]["role"] == "user" and one["completion"][0]["role"] == "assistant"
    only = trl_shape.samples(Run.at(done), 1, "last_number = 1")
    assert set(only["round"]) == {1} and set(only["last_number"]) == {1.0}


def test_training_rows_are_read_by_trl_as_conversations(done: Path, tmp_path: Path) -> None:
    from datasets import load_dataset
    from trl.data_utils import is_conversational

    assert main(["export", str(done), "--rows", str(tmp_path / "rows.jsonl"), "--round", "2"]) == 0
    [row, *_] = rows = load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=str(tmp_path))
    assert is_conversational(row) and len(rows) == Run.at(done).rows(2).height


PAIRS = RECIPE.replace(
    "  - train: {loss: sft}\n",
    '  - build: {kind: pair, chosen: "last_number = 1", rejected: "last_number = 0"}\n  - train: {loss: dpo}\n',
)
LABELS = RECIPE.replace("  - train: {loss: sft}\n", "  - build: {kind: label, label: last_number}\n  - train: {loss: kto}\n")


@pytest.mark.parametrize(("text", "columns"), [(PAIRS, ("chosen", "rejected")), (LABELS, ("completion", "label"))])
def test_pairs_and_labels_have_the_columns_that_their_trainers_ask_for(
    tmp_path: Path, text: str, columns: tuple[str, ...]
) -> None:
    text = text.replace('  - select: {where: "last_number = 1", per_prompt: 2}\n', "")
    found = trl_shape.rows(go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run"))
    assert {"prompt", *columns} <= set(found.columns)
    assert found.height and found.null_count().select(columns).row(0) == (0, 0)
    assert "label" not in columns or found.schema["label"] == pl.Boolean


def test_a_table_is_not_written_over_another_file_and_a_strange_suffix_is_named(done: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "mine.jsonl").write_text("mine")
    assert main(["export", str(done), "--samples", str(tmp_path / "mine.jsonl")]) == 2
    assert main(["export", str(done), "--samples", str(tmp_path / "rows.xlsx")]) == 2
    said = capsys.readouterr().err
    assert "is there already" in said and "'.xlsx' is no format of a table" in said
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [[], ["--merge"], ["out", "--where", "tokens > 3"], ["out", "--model", "policy", "--round", "1"]]
)
def test_what_is_said_of_nothing_is_refused(done: Path, tmp_path: Path, words: list[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(done), *words]) == 2
    assert list(tmp_path.iterdir()) == []


def test_the_numbers_of_a_row_stand_in_columns_of_their_own(tmp_path: Path) -> None:
    numbers = [{"name": "edge", "value": 0.5}, {"name": "bias", "value": None}]
    frame = pl.DataFrame(
        {"columns": [numbers, None]}, schema={"columns": pl.List(pl.Struct({"name": pl.String, "value": pl.Float64}))}
    )
    assert json.loads(frame.select(trl_shape._numbers(frame, ())).write_json()) == [
        {"edge": 0.5, "bias": None},
        {"edge": None, "bias": None},
    ]


def test_scores_and_numbers_that_are_called_as_a_column_of_the_table_stand_beside_it(tmp_path: Path) -> None:
    names = ("round", "completion", "answer", "kept", "why")
    more = "".join(f"  - score: {{value: last_number + 1, as: {name}}}\n" for name in names)
    own = ", ".join(f"{name}: last_number" for name in ("id", "round", "prompt", "completion", "samples", "role"))
    text = RECIPE.replace("  - select:", more + "  - select:", 1)
    text = text.replace("  - train:", f"  - build: {{columns: {{{own}}}}}\n  - train:")
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    table = trl_shape.samples(run, 1)
    assert table.columns[:6] == ["round", "prompt", "completion", "id", "stream", "answer"]
    assert all((table[f"score_{name}"] == table["last_number"] + 1).all() for name in names)
    assert table["kept"].dtype == pl.Boolean and table["answer"].dtype == pl.String and set(table["round"]) == {1}
    rows = trl_shape.rows(run, 1)
    assert rows["column_prompt"].to_list() == rows["column_id"].to_list() == [1.0] * rows.height
    assert rows["prompt"].dtype == pl.List and rows["id"].dtype == pl.String


def test_rounds_that_learned_from_rows_of_other_kinds_are_not_mixed(tmp_path: Path) -> None:
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    pairs = RECIPE.replace(
        "  - select:", "  - build: {kind: pair, chosen: last_number = 1, rejected: last_number < 1}\n  - select:"
    )
    amended = recipe_in(tmp_path, pairs.replace("loss: sft", "loss: dpo"), "rounds=2")
    run = go(amended, tmp_path / "run", amend=True)
    with pytest.raises(UsageError, match=r"several kinds \(pair, sft\)"):
        trl_shape.rows(run)
    assert "chosen" in trl_shape.rows(run, 2).columns and "chosen" not in trl_shape.rows(run, 1).columns
    assert "chosen" not in trl_shape.rows(run, None, "kind = 'sft'").columns
    assert "completion" not in trl_shape.rows(run, None, "kind = 'pair'").columns
