"""`bring` in a chain: frozen when the run is created, matched with its prompts, kept from what is held out, and proved by value."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from chains import Faults, Killed, end, go

from selfkd.backend.machine import Machine
from selfkd.chain.dry_run import lint_and_walk
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.errors import ChainError, RecipeError
from selfkd.recipe.load import load, read
from selfkd.recipe.plan import plan
from selfkd.report import brought
from selfkd.report.verify import verify

RECIPE = """\
name: r
model: fake
rounds: 2
prompts: {train: train.jsonl, dev: dev.jsonl}
steps:
  - sample: {n: 2, max_tokens: 64}
  - bring: {from: chat.jsonl, scores: [quality], licence: cc-by-4.0, as: chat}
  - select: {of: chat, where: quality > 0.2}
  - build: {of: sample, as: own}
  - build: {of: chat, as: chat, weight: quality}
  - train: {mix: {own: 0.8, chat: 0.2}}
"""
CHAT = [
    {"prompt": "What is 1 + 1?", "completion": "It is 2.", "quality": 1},
    {"prompt": "Say hello.", "completion": "Hello!", "quality": 0.5},
    {"prompt": "Say hello.", "completion": "Go away.", "quality": 0.1},
    {"prompt": "what is 100 + 100?", "completion": "200", "quality": 1},
]


def write(name: str, rows) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, first in (("train", 1), ("dev", 100)):
        write(f"{name}.jsonl", [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(first, first + 6)])
    write("chat.jsonl", CHAT)


def recipe(text: str = RECIPE):
    Path("r.yaml").write_text(text)
    return load("r.yaml")


def table(run: Run, step: str, name: str, index: int = 1) -> pl.DataFrame:
    paths = run.made(index)[step].tables[name].files
    return pl.concat([pl.read_parquet(run.folder / path) for path in paths])


def test_answers_become_samples_of_a_stream_with_their_scores():
    run = go(recipe(), Path("run"))
    samples, scores = table(run, "bring", "samples"), table(run, "bring", "scores")
    assert sorted(samples["text"]) == sorted(row["completion"] for row in CHAT)
    assert set(samples["model"]) == {"brought"} and set(samples["stream"]) == {"chat"}
    joined = samples.join(scores, left_on="id", right_on="sample")
    assert dict(joined.select("text", "value").iter_rows()) == {row["completion"]: row["quality"] for row in CHAT}
    ours = samples.filter(pl.col("text") == "It is 2.")["prompt"][0]
    assert ours in table(run, "sample", "samples")["prompt"].to_list()


def test_what_is_held_out_is_dropped_with_the_reason_and_never_learned():
    run = go(recipe(), Path("run"))
    drops = table(run, "bring", "drops").join(table(run, "bring", "samples"), on="id")
    assert drops.select("text", "reason").rows() == [("200", "its prompt stands in dev")]
    assert sorted(table(run, "build-2", "rows")["chosen"]) == ["Hello!", "It is 2."]
    assert sorted(table(run, "build-2", "rows")["weight"]) == [0.5, 1.0]


def test_the_run_records_licence_and_hash_and_keeps_the_answers_it_began_with():
    run = go(recipe(), Path("run"))
    entry = run.info.data["data:bring"]
    assert (entry.rows, entry.ours, entry.dropped, entry.licence) == (4, 1, 1, "cc-by-4.0")
    assert entry.read_sha256 == digest.file(Path("chat.jsonl"))
    write("chat.jsonl", CHAT[:1])
    again = Run.open(load("r.yaml", ["rounds=3"]), Path("run"), Machine(backend="fake"))
    assert any("chat.jsonl was changed since the run was created" in said for said in again.remarks())
    run = go(load("r.yaml", ["rounds=3"]), Path("run"))
    assert table(run, "bring", "samples", 3).height == 4


def test_other_answers_are_another_chain_and_another_place_is_the_same_one():
    first = end(go(recipe(), Path("a")))
    Path("copy.jsonl").write_text(Path("chat.jsonl").read_text())
    assert end(go(recipe(RECIPE.replace("chat.jsonl", "copy.jsonl")), Path("b"))) == first
    write("chat.jsonl", [{**CHAT[0], "completion": "It is two."}, *CHAT[1:]])
    assert end(go(recipe(), Path("c"))) != first


def test_a_killed_chain_ends_on_the_same_digest():
    made = recipe()
    whole = end(go(made, Path("whole")))
    with Faults() as faults:
        go(made, Path("counted"))
    for at in range(3, faults.count, faults.count // 8):
        folder = Path(f"killed-{at}")
        with Faults(at), pytest.raises(Killed):
            go(made, folder)
        assert end(go(made, folder)) == whole


def test_the_frozen_recipe_brings_the_same_answers():
    run = go(recipe(), Path("run"))
    again = go(load(str(run.paths.resolved)), Path("again"))
    assert again.info.data["data:bring"].digest == run.info.data["data:bring"].digest


def test_so_many_answers_a_round_go_on_through_the_set():
    run = go(recipe(RECIPE.replace("as: chat}", "as: chat, n: 2}").replace("quality > 0.2", "quality > 0")), Path("run"))
    first, second = (sorted(table(run, "bring", "samples", index)["text"]) for index in (1, 2))
    assert sorted([*first, *second]) == sorted(row["completion"] for row in CHAT)


def test_answers_to_prompts_of_others_can_be_dropped():
    text = RECIPE.replace("as: chat}", "as: chat, others: drop}")
    run = go(recipe(text), Path("run"))
    assert "prompts" not in run.made(1)["bring"].tables
    assert table(run, "build-2", "rows")["chosen"].to_list() == ["It is 2."]
    assert "not a prompt of this round" in table(run, "bring", "drops")["reason"].to_list()


def test_pairs_are_built_of_what_was_preferred():
    write("chat.jsonl", [{"prompt": "Say hello.", "chosen": "Hello!", "rejected": "Go away."}])
    steps = (
        RECIPE[: RECIPE.index("steps:")]
        + """steps:
  - bring: {from: chat.jsonl, scores: [preferred], licence: mit}
  - build: {kind: pair, chosen: preferred = 1, rejected: preferred = 0}
  - train: dpo
"""
    )
    rows = table(go(recipe(steps), Path("run")), "build", "rows")
    assert rows.select("chosen", "rejected").rows() == [("Hello!", "Go away.")]


# ---- proof ----


def test_verify_reads_the_answers_and_not_their_hashes_alone():
    go(recipe(), Path("run"))
    assert verify("run").problems == []
    [path] = Path("run/data").glob("*.parquet")
    frame = pl.read_parquet(path)
    path.write_bytes(b"")
    frame.with_columns(completion=pl.lit("It is 3.")).write_parquet(path)
    assert any(path.name in problem for problem in verify("run").problems)


def forged(run: Run, name: str, change) -> list[str]:
    """What verify says of a table that was changed with every hash made anew around it, as a careful forger would."""
    made, before = run.made(1)["bring"], [run.made(1)["sample"]]
    [file] = made.tables[name].files
    whole = pl.read_parquet(run.folder / file)
    change(whole).write_parquet(run.folder / file)
    found = list(brought.problems(run.paths, run.info, made, before))
    alone = list(brought.problems(run.paths, run.info, made, None))
    whole.write_parquet(run.folder / file)
    assert list(brought.problems(run.paths, run.info, made, before)) == []
    assert list(brought.problems(run.paths, run.info, made, None)) == []
    assert bool(found) >= bool(alone)
    return found


@pytest.fixture(scope="module")
def brought_run(tmp_path_factory):
    import os

    before, folder = Path.cwd(), tmp_path_factory.mktemp("bring")
    os.chdir(folder)
    for name, first in (("train", 1), ("dev", 100)):
        write(f"{name}.jsonl", [{"prompt": f"What is {k} + {k}?", "answer": str(2 * k)} for k in range(first, first + 6)])
    write("chat.jsonl", CHAT)
    run = go(recipe(RECIPE.replace("rounds: 2", "rounds: 1")), folder / "run")
    os.chdir(before)
    return run


def at(name: str, value) -> pl.Expr:
    return pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(value)).otherwise(pl.col(name)).alias(name)


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("samples", lambda frame: frame.with_columns(at("text", "other")), "is none that the frozen answers come to"),
        ("samples", lambda frame: frame[1:], "is missing"),
        ("samples", lambda frame: pl.concat([frame, frame[:1].with_columns(id=pl.lit("x"))]), "samples x is none that"),
        ("samples", lambda frame: frame.with_columns(at("tiebreak", 0.5)), "is none that the frozen answers come to"),
        ("scores", lambda frame: frame.with_columns(value=pl.lit(0.7)), "is none that the frozen answers come to"),
        ("scores", lambda frame: frame[:-1], "is missing"),
        ("drops", lambda frame: frame[:0], "is missing"),
        ("drops", lambda frame: frame.with_columns(reason=pl.lit("not a prompt of this round")), "is none that"),
        ("prompts", lambda frame: frame[:0], "is missing"),
        ("prompts", lambda frame: frame.with_columns(answer=pl.lit("7")), "is none that the frozen answers come to"),
    ],
)
def test_verify_names_what_was_brought_otherwise_or_left_out(brought_run, table, change, said):
    [problem] = forged(brought_run, table, change)
    assert said in problem and problem.startswith(table)


def test_verify_names_an_answer_that_is_dropped_though_its_prompt_is_asked(brought_run):
    sample = table(brought_run, "bring", "samples").filter(pl.col("text") == "It is 2.")["id"][0]
    row = {"id": sample, "stream": "chat", "step": "bring", "reason": "not a prompt of this round"}
    [problem] = forged(brought_run, "drops", lambda frame: pl.concat([frame, pl.DataFrame([row], schema=frame.schema)]))
    assert f"drops {sample}" in problem and "is none that" in problem


def test_a_held_out_answer_that_was_not_dropped_is_named_even_where_the_round_is_damaged(brought_run):
    made = brought_run.made(1)["bring"]
    [file] = made.tables["drops"].files
    whole = pl.read_parquet(brought_run.folder / file)
    whole[:0].write_parquet(brought_run.folder / file)
    [problem] = brought.problems(brought_run.paths, brought_run.info, made, None)
    whole.write_parquet(brought_run.folder / file)
    assert problem == f"sample {whole['id'][0]} is dropped as None, and what was frozen says 'its prompt stands in dev'"


@pytest.mark.parametrize(
    "text",
    [
        RECIPE.replace("dev: dev.jsonl}", "dev: dev.jsonl, take: 2}").replace("as: chat}", "as: chat, others: drop}"),
        RECIPE.replace("as: chat}", "as: chat, n: 3}"),
        RECIPE.replace("  - sample", "  - replay\n  - sample").replace(
            "steps:", "before:\n  - bring: {from: chat.jsonl, licence: x, name: first}\nsteps:"
        ),
    ],
)
def test_verify_works_out_again_what_rounds_of_other_recipes_brought(text):
    go(recipe(text.replace("{mix: {own: 0.8, chat: 0.2}}", "{of: own, loss: sft}")), Path("run"))
    assert verify("run").problems == []


# ---- lint, plan, dry run, amendments ----


def test_lint_says_what_would_be_brought():
    recipe()
    report = lint_and_walk(read("r.yaml"))
    assert report.ok, report.text()
    assert "bring: 4 answers, 1 to train prompts; 1 dropped: its prompt stands in dev" in report.notes
    assert "4 answers brought" in str(plan(read("r.yaml")))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  - sample: {n: 2, max_tokens: 64}\n", "", "r.yaml"),
        ("scores: [quality]", "scores: [tokens]", "a score cannot be called 'tokens'"),
        ("from: chat.jsonl", "from: {fiel: chat.jsonl}", "from needs one of hub, file"),
        ("from: chat.jsonl", "from: {file: chat.jsonl, limit: 0}", "'limit' should be a whole number"),
    ],
)
def test_words_that_cannot_be_are_refused_with_their_line(old, new, said):
    if not new:
        text = RECIPE.replace(old, "").replace("  - select", old + "  - select")
        said = "the prompts that 'bring' adds would be asked too"
    else:
        text = RECIPE.replace(old, new)
    with pytest.raises(RecipeError) as caught:
        recipe(text)
    assert said in str(caught.value) and "r.yaml:7" in str(caught.value)


def test_lint_says_how_many_answers_share_a_passage_with_what_is_held_out():
    words = " ".join(f"word{k}" for k in range(13))
    write("dev.jsonl", [{"prompt": f"Tell me: {words}?", "answer": "x"}])
    write("chat.jsonl", [*CHAT, {"prompt": "Go on.", "completion": f"I tell you: {words}? Yes.", "quality": 1}])
    recipe()
    assert "bring: 1 answer shares 13 words in a row with 'dev'" in lint_and_walk(read("r.yaml")).notes


def test_lint_names_a_row_that_is_no_answer_and_a_licence_that_is_missing():
    write("chat.jsonl", [*CHAT, {"prompt": "no answer", "quality": 1}])
    recipe(RECIPE.replace(", licence: cc-by-4.0", ""))
    report = lint_and_walk(read("r.yaml"))
    assert any("chat.jsonl:5" in one and "r.yaml:7" in one for one in report.problems)
    assert any("no `licence` is stated" in note for note in report.notes)


def test_data_cannot_be_amended():
    go(recipe(), Path("run"))
    other = RECIPE.replace("chat.jsonl", "other.jsonl")
    write("other.jsonl", CHAT)
    with pytest.raises(ChainError, match="would bring data that this run does not have"):
        Run.open(load_text(other, "rounds=4"), Path("run"), Machine(backend="fake"), True)


def load_text(text: str, *overrides: str):
    Path("r.yaml").write_text(text)
    return load("r.yaml", overrides)


def test_another_step_can_be_amended_beside_it():
    go(recipe(), Path("run"))
    run = go(load_text(RECIPE.replace("quality > 0.2", "quality > 0.6"), "rounds=3"), Path("run"), amend=True)
    assert table(run, "build-2", "rows", 3).height == 1 and verify("run").problems == []
