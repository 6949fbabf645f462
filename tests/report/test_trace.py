"""Where rows and checkpoints come from and what came of them: every link compared with the tables and records it stands for."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in
from judges import of_length, scripted
from rich.console import Console

from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import in_small, knowing
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.errors import ChainError, UsageError
from selfkd.recipe.load import load
from selfkd.report.node import Node, Trace
from selfkd.report.trace import trace
from selfkd.report.tree import print_trace

HEAD = RECIPE[: RECIPE.index("steps:")]
WHOLE = f"""{HEAD}keep: {{last: 9}}
steps:
  - sample: {{n: 3, max_tokens: 64}}
  - score: [mine.py:shortness, reward/number.py:last_number]
  - judge: {{template: "<<{{{{ of.text }}}}>>", highest: 5, n: 2}}
  - apply: {{function: mine.py:joined, as: joined}}
  - bring: {{from: chat.jsonl, as: chat, licence: cc0}}
  - replay: {{rounds: 1, of: sample}}
  - build: {{kind: sft, of: chat, as: plain}}
  - build: {{name: whole, kind: sft, of: joined, as: joined}}
  - build: {{name: pairs, kind: pair, chosen: mark = 5, rejected: mark < 5, as: pairs}}
  - build: {{name: labels, kind: label, of: sample, label: shortness, as: labels}}
  - build: {{name: ranks, kind: rank, of: sample, by: mark, as: ranks}}
  - build: {{name: told, kind: kd, of: sample, teacher: "{{{{ prompt.answer }}}}?", told: own, as: told}}
  - train: {{loss: sft, mix: {{plain: 0.5, joined: 0.5}}}}
  - train: {{name: prefer, loss: dpo, of: pairs, reference: base}}
  - train: {{name: label, loss: kto, of: labels}}
  - train: {{name: rank, loss: loss/rrhf.py:rrhf, rows: rank, of: ranks}}
  - train: {{name: distil, loss: kd, of: told}}
  - average: {{of: {{start: 0.5, now: 0.5}}}}
  - measure: reward/number.py:last_number
"""
MINE = '''
import polars as pl

def shortness(completion: str) -> float:
    """1 for a short answer.

    >>> shortness("short")
    1.0
    """
    return float(len(completion) < 9)

def joined(samples):
    whole = samples.filter(pl.col("stream") == "sample").sort("prompt", "number").group_by("prompt", maintain_order=True)
    return {"samples": whole.agg(text=pl.col("text").str.join(" | "), parents=pl.col("id"))}
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A chain of two rounds in which every kind of row, of sample and of checkpoint is made."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "mine.py").write_text(MINE)
    (folder / "chat.jsonl").write_text(json.dumps({"prompt": "Say hello.", "completion": "Hello!"}) + "\n")
    return go(recipe_in(folder, WHOLE, "prompts.train.limit=4"), folder / "runs" / "whole", scripted(of_length))


def table(run: Run, step: str, name: str, index: int = 2) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(index)[step].tables[name].files])


def found(nodes, role: str) -> list[Node]:
    return [node for node in nodes if node.role == role]


def one(nodes, role: str) -> Node:
    [node] = found(nodes, role)
    return node


def no_doubt(one_trace: Trace) -> Trace:
    assert one_trace.doubts() == []
    return one_trace


# ---- back from a row ----

SIDES = {
    "build": ["completion"],
    "whole": ["completion"],
    "pairs": ["chosen", "rejected"],
    "labels": ["completion"],
    "told": ["completion"],
}


@pytest.mark.parametrize("step", SIDES)
def test_a_row_leads_to_its_samples_by_what_they_are_to_it(run, step):
    row = table(run, step, "rows").row(0, named=True)
    links = no_doubt(trace(run.folder, row["id"])).origins
    assert [link.id for role in SIDES[step] for link in found(links, role)] == row["samples"]
    assert one(links, "built by").id.endswith(f"-{step}")


def test_a_ranking_leads_to_its_answers_in_their_order(run):
    row = table(run, "ranks", "rows").row(0, named=True)
    links = no_doubt(trace(run.folder, row["id"])).origins
    assert [node.id for node in links if node.role.startswith("answer")] == row["samples"]


def test_a_sample_leads_to_its_prompt_its_model_and_its_scores_with_code_and_judgments(run):
    sample = table(run, "sample", "samples").row(0, named=True)
    links = no_doubt(trace(run.folder, sample["id"])).origins
    assert one(links, "prompt").id == sample["prompt"] and "train" in one(links, "prompt").said
    head = run.sealed()[1].models["policy"]
    assert one(links, "sampled by").facts["digest"] == head.digest
    assert one(links, "sampled by").facts["made_in"] == "round-001/18-average"
    scores = {node.id: node for node in found(links, "score")}
    values = {row["name"]: row["value"] for row in table(run, "score", "scores").to_dicts() if row["sample"] == sample["id"]}
    assert {name: scores[name].facts["value"] for name in values} == values
    code = one(scores["shortness"].walk(), "code")
    assert code.id == "mine.py:shortness" and code.facts["digest"] == run.made(2)["score"].code["mine.py:shortness"]
    assert code.facts["sha256"] == run.info.files[code.facts["path"]]["sha256"]
    judged = {node.id for node in found(scores["mark"].walk(), "judged by")}
    made = table(run, "judge", "samples")
    assert judged == {row["id"] for row in made.to_dicts() if row["parents"] == [sample["id"]]} and len(judged) == 2


def test_the_mean_of_several_draws_is_the_score_that_expressions_see(run):
    sample = table(run, "sample", "samples")["id"][0]
    drawn = table(run, "judge", "scores").filter(pl.col("sample") == sample)
    [mark] = [node for node in found(trace(run.folder, sample).origins, "score") if node.id == "mark"]
    assert drawn.height == 2 and mark.facts["value"] == drawn["value"].mean()


def test_a_judgment_leads_to_the_answer_that_it_is_about(run):
    judgment = table(run, "judge", "samples").row(0, named=True)
    traced = no_doubt(trace(run.folder, judgment["id"]))
    assert traced.subject.kind == "judgment" and one(traced.origins, "judges").id == judgment["parents"][0]


def test_what_a_function_made_leads_to_its_parents_and_its_code(run):
    made = table(run, "apply", "samples").row(0, named=True)
    links = no_doubt(trace(run.folder, made["id"])).origins
    assert [node.id for node in found(links, "made from")] == made["parents"]
    assert one(links, "written by").kind == "function"


def test_what_was_brought_leads_to_its_data_with_its_licence(run):
    brought = table(run, "bring", "samples").row(0, named=True)
    data = one(no_doubt(trace(run.folder, brought["id"])).origins, "brought from")
    assert data.facts["digest"] == run.info.data["data:bring"].digest and data.facts["licence"] == "cc0"


def test_a_replayed_sample_leads_to_the_round_that_made_it_and_forward_to_the_one_that_brought_it_back(run):
    replayed = table(run, "replay", "samples")["id"][0]
    traced = no_doubt(trace(run.folder, replayed))
    assert one(traced.origins, "made by").id == "round-001/01-sample"
    assert one(traced.uses, "brought back by").id == "round-002/06-replay"
    learned = {node.id.partition("/")[0] for use in traced.uses for node in use.walk() if node.role == "learned in"}
    assert learned == {"round-001", "round-002"}


# ---- forward ----


@pytest.mark.parametrize(("step", "train"), [("pairs", "prefer"), ("labels", "label"), ("ranks", "rank"), ("told", "distil")])
def test_a_row_leads_to_the_update_that_learned_it_and_to_its_checkpoint(run, step, train):
    row = table(run, step, "rows", 1)["id"][0]
    uses = [node for node in trace(run.folder, row, 1).uses if node.facts["round"] == 1]
    [learned] = uses
    assert learned.role == "learned in" and learned.id.endswith(f"-{train}")
    assert one(learned.links, "gave").facts["digest"] == run.made(1)[train].models["policy"].digest


def test_a_row_that_a_mix_left_out_says_so(run):
    left_out = table(run, "train", "drops")
    [name, *_] = left_out.filter(pl.col("stream") == "joined")["id"]
    node = one(no_doubt(trace(run.folder, name, 2)).uses, "left out by")
    assert node.said == "left out of the mix" and node.id == "round-002/13-train"


def test_a_prompt_leads_to_its_answers_and_to_the_rows_that_they_became(run):
    prompt = table(run, "sample", "samples", 1)["prompt"][0]
    uses = no_doubt(trace(run.folder, prompt)).uses
    answered = {node.id: len(node.facts["ids"]) for node in found(uses, "answered in")}
    judged = table(run, "judge", "samples", 1).filter(pl.col("prompt") == prompt).height  # canaries of the prompt, too
    assert answered["round-001/01-sample"] == 3 and answered["round-001/03-judge"] == judged > 6
    mine = {row["id"] for step in ("pairs", "labels", "ranks", "told", "whole") for row in _rows_of(run, step, prompt)}
    assert set(one(uses, "became").facts["ids"]) == mine


def _rows_of(run: Run, step: str, prompt: str) -> list[dict]:
    answers = {
        row["id"]
        for index in (1, 2)
        for made in ("sample", "apply")
        for row in table(run, made, "samples", index).to_dicts()
        if row["prompt"] == prompt
    }
    return [row for index in (1, 2) for row in table(run, step, "rows", index).to_dicts() if answers & set(row["samples"])]


# ---- checkpoints ----


def test_a_checkpoint_leads_to_the_models_it_names_and_to_its_rows(run):
    made = run.made(2)["prefer"].models["policy"].digest
    links = no_doubt(trace(run.folder, made[:16])).origins
    assert one(links, "from").facts["digest"] == run.made(2)["train"].models["policy"].digest
    assert one(links, "reference").facts["digest"] == run.made(0)["load"].models["policy"].digest
    rows = one(links, "learned")
    assert sorted(rows.facts["ids"]) == sorted(table(run, "pairs", "rows")["id"])
    assert {node.facts["step"] for node in found(rows.links, "scored by")} >= {"round-002/02-score", "round-002/03-judge"}
    line = one(links, "line back").facts["ids"]
    assert line[0] == run.made(2)["train"].models["policy"].digest


def test_an_average_leads_to_what_it_is_made_of(run):
    links = no_doubt(trace(run.folder, "policy@2")).origins
    said = run.made(2)["average"].notes["average"]
    assert [node.facts["digest"] for node in found(links, "0.5 of")] == [part["digest"] for part in said]


def test_the_base_leads_to_its_source_and_to_all_that_came_of_it(run):
    traced = no_doubt(trace(run.folder, "base"))
    assert one(traced.origins, "loaded from").id == "fake"
    assert one(traced.uses, "measured in").facts["metrics"]["dev/prompts"] == 6
    came = one(traced.uses, "from it came").facts["ids"]
    assert set(came) == {
        entry.digest for index in (1, 2) for commit in run.made(index).values() for entry in commit.models.values()
    }
    assert len(found(traced.uses, "reference in")) == 3  # dpo in both rounds, kto where it was the start


@pytest.mark.parametrize("name", ["policy", "policy@now", "policy@2", "policy@round-2", "round-2", "now"])
def test_a_checkpoint_has_many_names(run, name):
    assert trace(run.folder, name).subject.facts["digest"] == run.sealed()[2].models["policy"].digest


def test_the_model_that_a_sample_names_is_a_name_too(run):
    named = table(run, "sample", "samples")["model"][0]
    assert trace(run.folder, named).subject.facts["digest"] == run.sealed()[1].models["policy"].digest


def test_a_round_that_was_rolled_back_left_the_model_before_it(tmp_path):
    text = RECIPE.replace("rounds: 2", "rounds: 2\nkeep_if: dev_last_number > 9")
    folder = go(recipe_in(tmp_path, text), tmp_path / "run").folder
    assert trace(folder, "policy@1").subject.facts["digest"] == trace(folder, "base").subject.facts["digest"]
    assert "round 1 was rolled back" in trace(folder, "policy@1").subject.said


# ---- names that are none, and links that do not hold ----


def test_an_unknown_id_is_an_error_that_names_what_is_near(run):
    row = table(run, "pairs", "rows")["id"][0]
    wrong = row[:-1] + ("0" if row[-1] != "0" else "1")
    with pytest.raises(UsageError, match="nothing in this run is called") as error:
        trace(run.folder, wrong)
    assert row in error.value.fix
    with pytest.raises(UsageError, match="has no checkpoint 'policy@7'") as error:
        trace(run.folder, "policy@7")
    assert "rounds 0 to 2 are sealed" in error.value.fix


def test_the_beginning_of_several_ids_is_an_error_that_lists_them(run, monkeypatch):
    monkeypatch.setattr("selfkd.report.trace.FEWEST", 1)
    with pytest.raises(UsageError, match="is the beginning of") as error:
        trace(run.folder, table(run, "labels", "rows")["id"][0][:1])
    assert "Write more of it: " in error.value.fix


def test_a_sample_that_stands_in_no_table_is_said_not_guessed(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    row = table(run, "labels", "rows").row(0, named=True)
    for index in (1, 2):
        for step in ("sample", "replay"):
            if "samples" in run.made(index)[step].tables:
                for path in run.made(index)[step].tables["samples"].files:
                    (copy / path).unlink()
    traced = trace(copy, row["id"], 2)
    assert one(traced.origins, "completion").unproved == "it stands in no table of this run"
    assert any("is missing" in doubt for doubt in traced.doubts())


def test_a_table_that_was_changed_is_named(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    [path] = run.made(2)["labels"].tables["rows"].files
    frame = pl.read_parquet(copy / path)
    frame.with_columns(chosen=pl.lit("forged")).write_parquet(copy / path)
    traced = trace(copy, frame["id"][0], 2)
    assert one(traced.origins, "completion").unproved == "its text is not the one that the row teaches"
    assert any(doubt.startswith(path) for doubt in traced.doubts())


def test_a_record_that_was_changed_is_refused(run, tmp_path):
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    commit = next(copy.glob("round-002/*-pairs.json"))
    commit.write_text(re.sub(r'"rows": (\d)', r'"rows": 9\1', commit.read_text()))
    with pytest.raises(ChainError, match="was changed after it was written"):
        trace(copy, "base")


def test_a_tree_says_how_many_it_leaves_out_and_fits_its_terminal(run):
    to = Console(width=80, record=True, file=io.StringIO())
    print_trace(trace(run.folder, run.made(2)["label"].models["policy"].digest), to, most=1)
    text = to.export_text()
    assert "more of 'row' (-n" in text and max(map(len, text.splitlines())) <= 80
    assert text.count("row: ") == 1


@pytest.mark.nightly
@pytest.mark.parametrize("name", sorted(path.stem for path in (Path(__file__).parents[2] / "recipes").glob("*.yaml")))
def test_every_row_and_checkpoint_of_a_shipped_recipe_is_traced_without_a_doubt(tmp_path, name):
    from selfkd.backend.fake import Fake

    recipe = in_small(load(name))
    made = Run.open(recipe, tmp_path / name, Machine(backend="fake"))
    walk(made, Fake({}, knowing(recipe)), made.begin())
    commits = [commit for index in range(len(made.sealed())) for commit in made.made(index).values()]
    rows = {
        row for commit in commits if "rows" in commit.tables for row in table(made, commit.step, "rows", commit.round)["id"]
    }
    models = {entry.digest for commit in commits for entry in commit.models.values()}
    for name in [*sorted(rows)[:30], *models]:
        no_doubt(trace(made.folder, name))
    assert rows and models
