"""verify: a run as committed passes; one flipped bit in any file that counts is found and named; what does not count is left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chains import RECIPE, go, recipe_in

from selfkd.core import digest, storage
from selfkd.report.verify import verify

LARGE_CHUNKS = RECIPE.replace("chunk: 8", "chunk: 64").replace("rounds: 2", "rounds: 3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    run = go(recipe_in(folder, LARGE_CHUNKS), folder / "runs" / "sums")
    return run.folder


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy elsewhere: a moved folder is the same run."""
    return Path(shutil.copytree(whole, tmp_path / "moved"))


def counting(run: Path) -> list[Path]:
    """Every file that a record names, and the records: all but logs, leases and tmp."""
    outside = ("logs", "leases", "tmp")
    return sorted(path for path in run.rglob("*") if path.is_file() and path.relative_to(run).parts[0] not in outside)


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


def rewrite(path: Path, change: dict) -> None:
    """A careful forger's edit: the record's own digest fits again."""
    record = {**json.loads(path.read_text()), **change}
    path.write_bytes(json.dumps(digest.with_self_digest(record), indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def test_a_run_as_committed_passes_wherever_it_lies(run):
    found = verify(run)
    assert found.problems == []
    assert (found.rounds, found.steps) == (4, 2 + 3 * 5)
    assert found.head == json.loads((run / "round-003/sealed.json").read_text())["digest"]
    assert found.files >= len(counting(run)) - 1  # the tombstone is a record of its own


def test_one_flipped_bit_is_found_in_every_file_that_counts(run):
    files = counting(run)
    assert {path.suffix for path in files} >= {".json", ".parquet", ".yaml", ".py"}
    for number, path in enumerate(files):
        content = path.read_bytes()
        for part in range(3):
            flip(path, len(content) * 8 * part // 3 + number)
            named = [problem for problem in verify(run).problems if path.relative_to(run).as_posix() in problem]
            assert named, f"bit {len(content) * 8 * part // 3 + number} of {path.name} went unseen"
            path.write_bytes(content)
    assert verify(run).problems == []


def test_every_single_bit_of_a_sealed_record_counts(run):
    path = run / "round-001/sealed.json"
    content = path.read_bytes()
    for at in range(0, len(content) * 8, 61):  # 61 and 8 share no factor: every bit position is met
        flip(path, at)
        assert verify(run, quick=True).problems, f"bit {at}: {content[max(0, at // 8 - 20) : at // 8 + 20]!r}"
        path.write_bytes(content)


def test_a_number_spelled_otherwise_is_found_though_its_value_is_the_same(run):
    path = run / "round-001/01-sample.json"
    rewrite(path, {"notes": {"rate": 1e-05}})
    assert b"1e-05" in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b"1e-05", b"1E-05"))
    assert any("01-sample.json was changed" in problem for problem in verify(run).problems)


@pytest.mark.parametrize(
    "pattern", ["round-002/01-sample.json", "round-002/sealed.json", "round-001/04-train/*.parquet", "prompts/train-*"]
)
def test_a_missing_file_is_named(run, pattern):
    path = next(run.glob(pattern))
    path.unlink()
    assert any(path.name in problem and "missing" in problem for problem in verify(run).problems)


def test_a_missing_round_is_named(run):
    shutil.rmtree(run / "round-002")
    assert verify(run).problems == ["round-002 is missing, but round-003 is there"]


def test_a_changed_note_is_found_even_when_the_record_fits_itself(run):
    path = run / "round-001/02-score.json"
    rewrite(path, {"notes": {"seconds": 0.001}})
    assert verify(run).problems == ["round-001/02-score.json is not the commit that round-001/sealed.json names"]


def test_a_better_looking_metric_is_found_even_when_the_record_fits_itself(run):
    path = run / "round-003/05-measure.json"
    rewrite(path, {"metrics": {**json.loads(path.read_text())["metrics"], "dev/last_number": 1.0}})
    problems = verify(run).problems
    assert any("05-measure.json: its digest does not follow from what it added" in problem for problem in problems)
    assert any("sealed.json: its metrics are not those of its steps" in problem for problem in problems)


def test_a_seal_that_says_otherwise_how_it_measured_is_found_even_when_the_record_fits_itself(run):
    path = run / "round-003/sealed.json"
    measures = json.loads(path.read_text())["measures"]
    assert set(measures) >= {"dev/last_number", "dev/chars"}
    rewrite(path, {"measures": {**measures, "dev/last_number": "0" * 64}})
    assert verify(run).problems == ["round-003/sealed.json: how it measured is not what its steps say"]


def test_a_round_of_another_chain_does_not_fit_in(run, tmp_path):
    other = go(recipe_in(tmp_path / "other", LARGE_CHUNKS, "seed=7"), tmp_path / "other" / "run").folder
    shutil.rmtree(run / "round-003")
    shutil.copytree(other / "round-003", run / "round-003")
    assert any(problem == "round-003/01-sample.json does not follow the step before it" for problem in verify(run).problems)


def test_a_commit_added_after_sealing_is_found(run):
    source = json.loads((run / "round-001/05-measure.json").read_text())
    storage.put_json(run / "round-001/06-measure.json", digest.with_self_digest({**source, "number": 6}), run / "tmp")
    assert any("06-measure.json is not part of the round that was sealed" in problem for problem in verify(run).problems)


def test_checkpoints_that_retention_took_are_pruned_and_not_damaged(run):
    found = verify(run)
    assert [path.split("/")[0] for path in found.pruned] == ["round-001"]
    assert found.problems == []


def test_a_checkpoint_taken_without_a_tombstone_is_missing(run):
    checkpoint = next((run / "round-003/04-train").glob("policy-*"))
    shutil.rmtree(checkpoint)
    assert any(checkpoint.name in problem and "missing" in problem for problem in verify(run).problems)


def test_orphans_logs_leases_and_an_open_round_are_no_damage(run):
    (run / "round-002/01-sample/orphan.parquet").write_bytes(b"left by a crash")
    (run / "tmp/half").write_bytes(b"half")
    (run / "logs/attempt-001/driver.log").write_text("anything")
    (run / "round-003/sealed.json").unlink()
    (run / "round-003/05-measure.json").unlink()
    assert verify(run).problems == []
    assert verify(run).rounds == 3


def test_quick_checks_records_and_sizes_but_not_contents(run):
    parquet = next(run.glob("round-001/01-sample/*.parquet"))
    content = parquet.read_bytes()
    flip(parquet, 800)
    assert verify(run, quick=True).problems == []
    parquet.write_bytes(content + b"x")
    assert any(f"{parquet.name} has {len(content) + 1} bytes" in problem for problem in verify(run, quick=True).problems)


def test_a_table_that_means_something_else_is_found_even_when_the_file_hashes_fit(run):
    """A writer's mistake, not a disk's: the commit names the file as it is, but was digested from other rows."""
    path = run / "round-001/03-select.json"
    record = json.loads(path.read_text())
    table = {**record["tables"]["drops"], "digest": "0" * 64}
    rewrite(path, {"tables": {"drops": table}})
    assert any("table 'drops' does not mean what was committed" in problem for problem in verify(run).problems)


# ---- records that no other record names ----


def test_lost_numerics_are_named(run):
    (run / "numerics.json").unlink()
    assert verify(run).problems == ["numerics.json is missing, but round-000/02-measure.json was made with it"]


def test_lost_facts_are_named_once_each(run):
    gone = sorted((run / "facts").glob("*.json"))
    kinds = {path.name.rpartition("-")[0] for path in gone}
    shutil.rmtree(run / "facts")
    problems = verify(run).problems
    assert len(problems) == len(gone) and len(kinds) == 4  # driver, engine, trainer, and the reward
    for kind in kinds:
        assert any(problem.startswith(f"facts/{kind}-….json is missing: what made round-00") for problem in problems)


@pytest.fixture
def amended(tmp_path) -> Path:
    """Amended twice: more rounds and another temperature; then more rounds and an edited reward."""
    own = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")
    recipe_in(tmp_path, own)
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return float(answer in completion)\n")
    go(recipe_in(tmp_path, own, "rounds=1"), tmp_path / "run")
    go(recipe_in(tmp_path, own, "rounds=2", "sample.temperature=0.7"), tmp_path / "run", amend=True)
    (tmp_path / "mine.py").write_text("def right(completion, answer):\n    return 1.0\n")
    run = go(recipe_in(tmp_path, own, "rounds=3", "sample.temperature=0.7"), tmp_path / "run", amend=True)
    assert verify(run.folder).problems == []
    return run.folder


def test_a_gap_in_the_amendments_is_named(amended):
    (amended / "amendments/001.json").unlink()
    assert verify(amended).problems == ["amendments/001.json is missing, but amendments/002.json is there"]


def test_lost_amendments_show_in_rounds_that_no_recipe_has(amended):
    shutil.rmtree(amended / "amendments")
    said = verify(amended).problems
    assert said == ["an amendment is missing: round-002/01-sample.json is of round 2, and no recipe here has more than 1"]


def test_lost_amendments_show_in_code_and_in_words_that_no_recipe_has(amended):
    """The older recipes, forged to have as many rounds as were made: what is left to tell by is code, then words."""
    (amended / "amendments/002.json").unlink()
    path = amended / "amendments/001.json"
    rewrite(path, {"recipe": {**json.loads(path.read_text())["recipe"], "rounds": 3}})
    code = "was made with a version of mine.py:right that no recipe here has"
    assert verify(amended).problems == [f"an amendment is missing: round-003/02-score.json {code}"]
    path.unlink()
    record = json.loads((amended / "run.json").read_text())
    rewrite(amended / "run.json", {"recipe": {**record["recipe"], "rounds": 3}})
    words = "was made with words that no recipe here has"
    assert verify(amended).problems == [f"an amendment is missing: round-002/01-sample.json {words}"]


def test_rounds_that_an_amendment_knew_of_are_missed(amended):
    shutil.rmtree(amended / "round-003")
    shutil.rmtree(amended / "round-002")
    said = verify(amended).problems
    assert said == ["amendments/002.json was written when 3 rounds were sealed, and 2 are here"]
