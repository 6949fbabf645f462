"""What a chain trusts: answers of the right weights, rows that are there once, weights, tables and code as they were committed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, Killed, end, go, recipe_in

from selfkd.backend.base import REQUESTS, Completion, Reply, Sampling, write_chunk
from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import records
from selfkd.chain.commit import Place, write
from selfkd.chain.context import StepContext
from selfkd.chain.models import KnownModels
from selfkd.chain.records import Seal
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.pool import Addition, Model, Pool, shape
from selfkd.errors import ChainError, GuardError, WeightsError
from selfkd.report.verify import verify
from selfkd.steps import SampleStep


class WrongWeights(Fake):
    """Its engine holds other weights while the second chunk is answered. `admits`: whether the reply says so, or only the file."""

    def __init__(self, admits: bool) -> None:
        super().__init__({})
        self.admits = admits

    def generate(self, model, chunks, sampling, on_progress=None) -> Iterator[Reply]:
        yield from super().generate(model, chunks[:1], sampling)
        garbage = [Completion("Answer: 7", [7], "stop", -1.0) for _ in range(chunks[1].requests.height)]
        path = write_chunk(chunks[1], model, garbage, "f" * 64, {})
        yield Reply(chunks[1].key, path, "f" * 64 if self.admits else model.digest, 8, 0.0)


@pytest.mark.parametrize("admits", [True, False])
def test_answers_of_other_weights_get_no_name_and_the_same_command_asks_for_them_again(tmp_path, admits):
    recipe = recipe_in(tmp_path, RECIPE.replace("chunk: 8", "chunk: 4"))
    with pytest.raises(WeightsError, match="answered with the weights ffffffffffff"):
        go(recipe, tmp_path / "run", WrongWeights(admits))
    run = go(recipe, tmp_path / "run")
    assert "Answer: 7" not in run.samples(round=0, step="measure")["text"].to_list()
    assert end(run) == end(go(recipe, tmp_path / "undisturbed"))


def test_a_file_under_the_right_key_that_says_other_weights_inside_is_not_used(tmp_path):
    recipe = recipe_in(tmp_path)

    def kill_at_train(call: str) -> None:
        if call == "train":
            raise Killed

    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Fake({}, hook=kill_at_train))
    sample = tmp_path / "run/round-001/01-sample.json"
    for path in (tmp_path / "run/round-001").glob("01-sample/*.parquet"):
        draft = tmp_path / "draft.parquet"
        pl.read_parquet(path).with_columns(text=pl.lit("garbage")).write_parquet(draft, metadata={"weights": "f" * 64})
        path.unlink()
        draft.rename(path.with_name(f"{path.name.split('.')[0]}.{digest.file(draft)[:32]}.parquet"))
    for commit in (sample, *(tmp_path / "run/round-001").glob("0[23]-*.json")):
        commit.unlink()
    run = go(recipe, tmp_path / "run")
    assert "garbage" not in run.samples(round=1)["text"].to_list()
    assert end(run) == end(go(recipe, tmp_path / "undisturbed"))


# ---- once ----

DRAWN = RECIPE.replace("dev: {file", "take: 4\n  dev: {file")


def test_where_prompts_are_drawn_and_samples_replayed_each_row_is_there_once(tmp_path):
    sample = "  - sample: {n: 3, temperature: 0.8, max_tokens: 64}\n"
    text = DRAWN.replace(sample, sample + "  - replay: {}\n").replace("rounds: 2", "rounds: 3")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    for index in (2, 3):
        rows = run.rows(round=index)
        assert rows["id"].n_unique() == rows.height > 0
        assert rows.select(pl.col("samples").list.first()).n_unique() == rows.height
        asked = run.samples(round=index, step="sample")
        assert asked["id"].n_unique() == asked.height == 12  # 4 prompts are drawn, 3 answers each


def test_a_step_that_adds_a_row_twice_fails_and_names_the_table_and_the_row(tmp_path):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    place = Place(run.paths, 1, 1, SampleStep(name="sample"), "parent", {})
    once = shape("samples", [{"id": "a1", "prompt": "p"}])
    with pytest.raises(GuardError, match="two rows of the table 'samples' are the same one: id a1") as caught:
        write(place, Addition({"samples": [once, once]}), Pool(), {}, {})
    assert caught.value.where == "round-001/sample"
    with pytest.raises(GuardError, match="id a1"):
        write(place, Addition({"samples": [once]}), Pool({"samples": once}), {}, {})
    scores = shape("scores", [{"sample": "a1", "name": "right", "draw": 0}] * 2)
    with pytest.raises(GuardError, match="'scores' are the same one: sample a1, name right, draw 0"):
        write(place, Addition({"scores": [scores]}), Pool(), {}, {})
    assert not place.commit.exists()


def test_a_request_that_is_there_twice_is_refused_before_anything_is_asked(tmp_path):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake"))
    backend = Fake({}, hook=lambda call: pytest.fail("it was asked"))
    place = Place(run.paths, 1, 1, SampleStep(name="sample"), "parent", {})
    models = KnownModels(1, {}, [], None, dict)
    context = StepContext(run, place, Pool(), models, backend, run.begin(), lambda window: iter(()))
    row = {"id": "r1", "prompt": "p", "number": 0, "parents": [], "seed": 1, "tiebreak": 0.5, "teacher_messages": []}
    with pytest.raises(GuardError, match="the request r1 is there twice"):
        context.generate(Model("policy", "x", "y"), pl.DataFrame([row, row], schema=REQUESTS), Sampling(), "sample")


# ---- hashed when first used ----


def damage(folder: Path) -> None:
    weights = folder / "weights.json"
    weights.write_text(json.dumps({**json.loads(weights.read_text()), "skill": 0.99}))


def test_base_weights_that_were_changed_are_found_where_a_later_round_starts_from_them(tmp_path):
    text = RECIPE.replace("{loss: sft}", "{loss: sft, from: base}")
    go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    damage(next((tmp_path / "run/round-000").glob("01-load/policy-*")))
    with pytest.raises(ChainError, match="these weights were changed after they were committed") as caught:
        go(recipe_in(tmp_path, text, "rounds=2"), tmp_path / "run")
    assert "round-000/01-load/policy-" in caught.value.where


@pytest.mark.parametrize("name", ["prompts/train-*.parquet", "code/*/number.py", "round-001/02-sample/*.parquet"])
def test_a_changed_file_that_a_later_round_reads_is_found_before_it_is_used(tmp_path, name):
    recipe = recipe_in(tmp_path, RECIPE.replace("steps:\n", "steps:\n  - replay: {}\n"))

    def kill_in_round_2(call: str) -> None:
        if (tmp_path / "run/round-001/sealed.json").exists():
            raise Killed

    with pytest.raises(Killed):
        go(recipe, tmp_path / "run", Fake({}, hook=kill_in_round_2))
    for commit in (tmp_path / "run/round-002").glob("*.json"):
        commit.unlink()
    path = next((tmp_path / "run").glob(name))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ChainError, match=rf"{path.name} was changed after it was committed"):
        go(recipe, tmp_path / "run")


def test_a_table_whose_very_form_is_damaged_is_named_like_any_other(tmp_path):
    """The end of a Parquet file says what is in it: no reader gets past that, and some look before anything is hashed."""
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    path = next((run.folder / "round-001").glob("01-sample/*.parquet"))
    content = bytearray(path.read_bytes())
    content[-40:-8] = bytes(32)
    path.write_bytes(content)
    with pytest.raises(ChainError, match=rf"{path.name} was changed after it was committed"):
        go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run")


def test_a_folder_of_weights_is_hashed_once_in_an_attempt(tmp_path, monkeypatch):
    text = RECIPE.replace("{loss: sft}", "{loss: sft, from: base}")
    go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    hashed: list[str] = []
    holds = digest.holds
    monkeypatch.setattr(digest, "holds", lambda folder, expected: hashed.append(folder.name) or holds(folder, expected))
    go(recipe_in(tmp_path, text, "rounds=4"), tmp_path / "run")
    assert len(hashed) == len(set(hashed)) == 2  # the head of round 1, and the base; what this attempt made it hashed itself


def test_a_seal_is_read_once_however_many_rounds_there_are(tmp_path, monkeypatch):
    read, seen = records.read, []

    def counting(path, kind, unchanged=True):
        seen.append(kind)
        return read(path, kind, unchanged)

    monkeypatch.setattr(records, "read", counting)
    run = go(recipe_in(tmp_path, RECIPE, "rounds=6"), tmp_path / "run")
    assert len(run.sealed()) == 7
    assert seen.count(Seal) == 14  # as it is sealed, and when the next round asks for it


# ---- many ----


def test_step_100_follows_step_99_and_round_1000_round_999(tmp_path):
    many = "\n".join(f"  - select: {{name: cut-{i}, limit: 5}}" for i in range(100))
    run = go(recipe_in(tmp_path, RECIPE.replace("  - train:", many + "\n  - train:"), "rounds=1"), tmp_path / "run")
    names = [path.name for path in run.paths.round(1).commits()]
    assert names[9:11] == ["10-cut-6.json", "11-cut-7.json"] and names[-2:] == ["104-train.json", "105-measure.json"]
    assert verify(run.folder).problems == []
    for index in (999, 1000):
        run.paths.round(index).folder.mkdir()
        run.paths.attempt(index).mkdir()
        run.paths.amendment(index).parent.mkdir(exist_ok=True)
        run.paths.amendment(index).touch()
    assert [names.index for names in run.paths.rounds()][-2:] == run.paths.attempts()[-2:] == [999, 1000]
    assert [path.name for path in run.paths.amendments()] == ["999.json", "1000.json"]


# ---- notes steer nothing ----


def test_one_kill_changes_neither_the_number_of_rounds_nor_the_tokens_that_a_budget_counts(tmp_path):
    """An answer of this model is some 20 tokens; a round asks for 36 and measures 6: the budget ends it in the third round."""
    text = RECIPE.replace("rounds: 2", "rounds: 5\nstop: {tokens: 2000}")
    undisturbed = go(recipe_in(tmp_path, text), tmp_path / "run")
    tokens = sum(
        pl.read_parquet(path)["tokens"].sum()
        for path in undisturbed.folder.glob("round-*/*/*.parquet")
        if path.parent.name.endswith(("sample", "measure")) and "tokens" in pl.read_parquet_schema(path)
    )
    assert undisturbed.rounds < 5 and tokens >= 2000
    assert undisturbed.sealed()[-1].stop == f"{tokens} tokens were generated, budget 2000"
    calls = 0

    def kill(call: str) -> None:
        nonlocal calls
        calls += call == "generate"
        if calls == 5:  # in the middle of round 1
            raise Killed

    with pytest.raises(Killed):
        go(recipe_in(tmp_path, text), tmp_path / "killed", Fake({}, hook=kill))
    killed = go(recipe_in(tmp_path, text), tmp_path / "killed")
    assert (killed.rounds, end(killed)) == (undisturbed.rounds, end(undisturbed))
    assert killed.sealed()[-1].stop == undisturbed.sealed()[-1].stop
