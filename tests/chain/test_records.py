"""Records: one reader, fields of a newer writer kept and verified, files of an older writer read, other formats refused in a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from chains import RECIPE, go, recipe_in
from hypothesis import given
from hypothesis import strategies as st

from selfkd.chain import records
from selfkd.chain.records import FORMAT, Commit, Info, ModelEntry, Tombstone
from selfkd.chain.run import Run
from selfkd.cli.main import main
from selfkd.core import digest, storage
from selfkd.core.pool import Model
from selfkd.errors import ChainError
from selfkd.report import status
from selfkd.report.verify import verify

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("made")
    return go(recipe_in(folder), folder / "run")


@pytest.fixture
def run(made, tmp_path) -> Run:
    """A copy of the run, to be changed."""
    shutil.copytree(made.folder, tmp_path / "run")
    return Run.at(tmp_path / "run")


def rewrite(path, change) -> None:
    """Change a record as another version of selfkd would have written it: its own digest fits."""
    content = json.loads(path.read_text())
    content.pop("self")
    path.write_text(json.dumps(digest.with_self_digest(change(content)), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@given(st.dictionaries(st.text(min_size=1).filter(lambda name: name not in ("paths", "self", "more")), JSON, max_size=4))
def test_fields_of_a_newer_writer_are_kept_as_they_are(more):
    content = {"paths": ["a"], **more}
    record = Tombstone.from_json(content)
    assert record.paths == ["a"] and record.more == more and record.to_json() == content


def test_a_foreign_field_in_a_commit_is_no_damage_and_the_run_goes_on(run):
    path = run.paths.round(2).commits()[-1]
    rewrite(
        path,
        lambda content: (
            content | {"invented_in": "format 2.1", "tables": {k: v | {"bloom": "x"} for k, v in content["tables"].items()}}
        ),
    )
    commit = records.read(path, Commit)
    assert commit.more == {"invented_in": "format 2.1"}
    assert next(iter(commit.tables.values())).more == {"bloom": "x"}
    assert list(run.made(2).values())[-1].digest == run.sealed()[2].steps[-1].digest


def test_a_flipped_bit_in_a_foreign_field_is_found(run):
    path = run.paths.info
    rewrite(path, lambda content: content | {"invented": "later"})
    assert records.read(path, Info).more == {"invented": "later"}
    path.write_text(path.read_text().replace('"later"', '"lates"'))
    with pytest.raises(ChainError, match="was changed after it was written"):
        records.read(path, Info)


def test_a_missing_field_is_named(run):
    rewrite(run.paths.info, lambda content: {name: value for name, value in content.items() if name != "numerics"})
    with pytest.raises(ChainError, match="lacks the field 'numerics'"):
        Run.at(run.folder)


OTHERS = (None, 3, "x", [], [3], {}, {"a": 1}, {"a": {"files": 3}})


def forged(run: Run) -> Iterator[tuple[Path, str]]:
    """Yield each field of each kind of record that this run holds."""
    names = run.paths.round(1)
    first = next(path for path in sorted(names.folder.glob("*.json")) if '"verb"' in path.read_text())
    last = max(path for path in names.folder.glob("*.json") if '"verb": "train"' in path.read_text())
    for path in (run.paths.info, first, last, names.folder / "sealed.json"):
        yield from ((path, name) for name in json.loads(path.read_text()) if name != "self")


def test_verify_says_so_of_a_record_that_holds_another_kind_of_value_in_a_field_and_never_crashes(run):
    for path, name in forged(run):
        before = path.read_text()
        value = json.loads(before)[name]
        for other in OTHERS:
            rewrite(path, lambda content, name=name, other=other: content | {name: other})
            try:
                found = bool(verify(run.folder, quick=True).problems)
            except ChainError:
                found = True
            assert found or type(other) is type(value) or value is None, (path.name, name, other)
        path.write_text(before)


@pytest.mark.parametrize(("written", "said"), [(FORMAT - 1, "an older"), (FORMAT + 1, "a newer")])
def test_a_run_of_another_format_is_refused_in_one_sentence(run, written, said):
    rewrite(run.paths.info, lambda content: content | {"format": written})
    sentence = rf"was written by {said} selfkd \(format {written}; this one reads format {FORMAT}\)"
    for read in (Run.at, status.read, verify):
        with pytest.raises(ChainError, match=sentence):
            read(run.folder)


def test_a_run_that_cannot_be_read_does_not_hide_the_others(run, capsys, monkeypatch):
    shutil.copytree(run.folder, run.folder.parent / "old")
    rewrite(run.folder.parent / "old/run.json", lambda content: content | {"format": 1})
    shutil.copytree(run.folder, run.folder.parent / "torn")
    (run.folder.parent / "torn/run.json").write_text("{")
    assert main(["status", "--runs", str(run.folder.parent)]) == 0
    shown = capsys.readouterr().out
    assert "done" in shown and "was written by an older selfkd" in shown and "torn/run.json  is not readable" in shown


def test_a_model_is_full_weights_unless_its_record_says_that_it_is_an_adapter():
    assert ModelEntry.from_json({"path": "a", "digest": "d"}).model("policy") == Model("policy", "a", "d", "full", None)
    adapter = Model("policy", "b", "e", "adapter", "a")
    assert ModelEntry.from_json(ModelEntry.of(adapter).to_json()).model("policy") == adapter
    assert adapter.at(Path("/run")) == Model("policy", "/run/b", "e", "adapter", "/run/a")


class OtherWriter:
    """Writes tables as another version would: without three columns of samples, and with one that this version does not know."""

    def __init__(self) -> None:
        self.write = storage.write_parquet

    def __call__(self, frame: pl.DataFrame, folder, tmp, prefix: str = "", about=None):
        if "token_ids" in frame.columns:
            frame = frame.drop("logprob", "seed", "parents").with_columns(invented=pl.lit("later"))
        return self.write(frame, folder, tmp, prefix, about)


def test_a_run_whose_tables_lack_columns_and_hold_a_foreign_one_is_read_and_goes_on(tmp_path, monkeypatch):
    text = RECIPE.replace("steps:\n", "steps:\n  - replay: {rounds: 1}\n")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_parquet", OtherWriter())
        other = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    stored = pl.read_parquet(other.folder / other.made(1)["sample"].tables["samples"].files[0])
    assert "invented" in stored.columns and not {"logprob", "seed", "parents"} & set(stored.columns)
    seen = other.samples(round=1)
    assert seen["logprob"].null_count() == seen.height > 0 and "invented" not in seen.columns
    run = go(recipe_in(tmp_path, text, "rounds=2"), other.folder)
    kept = other.sealed()[1].notes["funnel"][-1][1]
    assert run.samples(round=2, step="replay").height == kept > 0  # tables of both kinds side by side
    assert verify(run.folder).problems == []


def test_frozen_prompts_of_another_version_are_read_with_the_columns_of_this_one(run):
    """With a foreign column, without one of ours, and in another order."""
    entry, columns = run.info.prompts["train"], run.split("train").prompts.columns
    frame = pl.read_parquet(run.folder / entry.file)
    frame.with_columns(pl.lit(1).alias("invented")).drop("source").select(pl.all().reverse()).write_parquet(
        run.folder / entry.file
    )
    hashes = storage.file_hashes([run.folder / entry.file], run.folder)
    rewrite(run.paths.info, lambda content: content | {"files": content["files"] | hashes})
    again = Run.at(run.folder).split("train")
    assert again.prompts.columns == columns
    assert again.prompts["source"].null_count() == frame.height and (again + again).prompts.height == 2 * frame.height


def test_a_copy_that_somebody_made_inside_a_run_stops_no_reader(run):
    shutil.copytree(run.paths.round(1).folder, run.folder / "round-001.bak")
    shutil.copytree(run.paths.attempt(1), run.folder / "logs/attempt-001.old")
    assert [names.index for names in run.paths.rounds()] == [0, 1, 2] and run.paths.attempts() == [1]
    assert status.read(run.folder).state == "done" and verify(run.folder).problems == []


def test_a_folder_with_brackets_in_its_name_holds_what_it_holds(run):
    moved = run.folder.rename(run.folder.with_name("x[1]*"))
    assert Run.at(moved).samples(round=1).height == 36 and Run.at(moved).rows(round=1).height > 0
    assert verify(moved).problems == [] and status.read(moved).rounds[1].measured["dev"].change is not None


def test_a_table_file_that_a_commit_uses_but_does_not_count_is_found(run):
    path = run.paths.round(2).commits()[0]
    rewrite(path, lambda content: content | {"files": {}})
    assert any("is used but not among its files" in problem for problem in verify(run.folder).problems)


@pytest.mark.parametrize("change", [{"kind": "adapter", "base": "round-000/x"}, {"path": "round-000/nowhere"}])
def test_a_seal_whose_model_is_not_one_that_was_committed_is_found(run, change):
    def forge(content):
        return content | {"models": {"policy": content["models"]["policy"] | change}}

    rewrite(run.paths.round(2).seal, forge)
    assert any("model 'policy' is not the one that was committed" in problem for problem in verify(run.folder).problems)
