"""`keep: {as: bf16}`: what no training needs is left in bf16; whatever is killed, the chain ends on its digest with the same on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chains import RECIPE, Faults, Killed, end, recipe_in
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weighty import Weighty

from selfkd.backend.machine import Machine
from selfkd.chain import records, rounded
from selfkd.chain.drive import catch_up
from selfkd.chain.loop import walk
from selfkd.chain.records import Rounded, Tombstone
from selfkd.chain.retention import prune
from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.errors import ChainError
from selfkd.recipe.schema import Recipe
from selfkd.report.verify import verify

IN_BF16 = RECIPE.replace("rounds: 2", "rounds: 3\nkeep: {last: 4, as: bf16}")
FROM_ROUND_1 = ("\nsteps:", "\nafter:\n  - train: {loss: sft, from: round-1, name: last}\nsteps:")
MACHINE = Machine(backend="fake")


def go(recipe: Recipe, folder: Path, amend: bool = False, machine: Machine = MACHINE) -> Run:
    run = Run.open(recipe, folder, machine, amend)
    walk(run, Weighty(run.numerics), run.begin())
    catch_up(run)
    return run


def on_disk(run: Run) -> list[str]:
    """Each checkpoint by its round, with what its tensors are stored in."""
    found = sorted(run.folder.glob("round-*/*/policy-*"))
    return [f"{path.parent.parent.name[-1]} {stored(path)}" for path in found]


def stored(folder: Path) -> str:
    content = (folder / "model.safetensors").read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["layer.weight"]["dtype"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    return go(recipe_in(folder, IN_BF16.replace(", as: bf16", "")), folder / "run")


def test_all_but_root_and_head_are_left_in_bf16_and_the_chain_is_the_same(tmp_path, whole):
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    assert on_disk(whole) == ["0 F32", "1 F32", "2 F32", "3 F32"]
    assert on_disk(run) == ["0 F32", "1 BF16", "2 BF16", "3 F32"]
    assert [seal.digest for seal in run.sealed()] == [seal.digest for seal in whole.sealed()]
    assert [path.parent.parent.name for path in (run.folder / name for name in verify(run.folder).rounded)] == [
        "round-001",
        "round-002",
    ]
    assert verify(run.folder).problems == []
    assert len(go(recipe_in(tmp_path, IN_BF16.replace("rounds: 3", "rounds: 4")), tmp_path / "run").sealed()) == 5


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        (FROM_ROUND_1, ["0 F32", "1 F32", "2 BF16", "3 F32"]),
        (("{loss: sft}", "{loss: sft, from: base}"), ["0 F32", "1 BF16", "2 BF16", "3 F32"]),
        (("last: 4", "last: 1, best: false, base: false"), ["3 F32"]),
        (("last: 4", "last: 2, best: false, base: false"), ["2 BF16", "3 F32"]),
    ],
)
def test_what_a_step_goes_on_using_stays_whole(tmp_path, changed, left):
    run = go(recipe_in(tmp_path, IN_BF16.replace(*changed)), tmp_path / "run")
    assert on_disk(run) == left
    assert verify(run.folder).problems == []


def test_the_best_round_stays_whole_while_a_step_trains_from_it_and_only_then(tmp_path):
    best = IN_BF16.replace("last: 4", "last: 0").replace("chunk: 8", "chunk: 8\nbest: {metric: dev/last_number, mode: min}")
    assert on_disk(go(recipe_in(tmp_path / "a", best), tmp_path / "a" / "run"))[0] == "0 F32"
    run = go(recipe_in(tmp_path / "b", best.replace("{loss: sft}", "{loss: sft, from: best}")), tmp_path / "b" / "run")
    assert "BF16" not in "".join(on_disk(run))


def test_a_copy_opens_as_the_model_and_no_training_starts_from_it(tmp_path):
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    model, head = run.model("policy@round-1"), run.sealed()[1].models["policy"]
    assert model.path.endswith("-bf16") and model.digest == head.digest
    assert run.trust.weights(head.model("policy")).path == str(run.folder / f"{head.path}-bf16")
    with pytest.raises(ChainError, match="only a copy in bf16 is left"):
        run.trust.masters(head.model("policy"))
    assert run.trust.masters(run.head()["policy"]).path == str(run.folder / run.head()["policy"].path)
    again = IN_BF16.replace("rounds: 3", "rounds: 4").replace(*FROM_ROUND_1)
    with pytest.raises(ChainError, match=r"only a copy in bf16 is left[\s\S]*fp32"):
        go(recipe_in(tmp_path, again), tmp_path / "run", amend=True)


def test_keep_can_be_amended_back_and_forth_for_what_is_still_whole(tmp_path):
    fp32 = IN_BF16.replace(", as: bf16", "")
    go(recipe_in(tmp_path, IN_BF16.replace("rounds: 3", "rounds: 2")), tmp_path / "run")
    run = go(recipe_in(tmp_path, fp32), tmp_path / "run", amend=True)
    assert on_disk(run) == ["0 F32", "1 BF16", "2 F32", "3 F32"]
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run", amend=True)
    assert on_disk(run) == ["0 F32", "1 BF16", "2 BF16", "3 F32"]
    assert verify(run.folder).problems == []


def test_a_copy_whose_removal_was_cut_off_is_checked_like_any_other_one(tmp_path):
    """The tombstone was written, the kill came before the copy was gone, and then `keep` was widened again: the copy is in use."""
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    names = run.paths.round(1)
    (committed,) = rounded.copies(names)
    records.write(names.next_tombstone(), Tombstone(paths=[committed]), run.paths.tmp)
    found = verify(run.folder)
    assert (found.pruned, len(found.rounded), found.problems) == ([], 2, [])
    weights = run.folder / rounded.copies(names)[committed].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert any("the copy in bf16 of" in problem for problem in verify(run.folder).problems)


def test_a_copy_that_keep_takes_away_later_is_pruned(tmp_path):
    go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    run = go(recipe_in(tmp_path, IN_BF16.replace("last: 4", "last: 1, best: false")), tmp_path / "run", amend=True)
    assert on_disk(run) == ["0 F32", "3 F32"]
    found = verify(run.folder)
    assert (len(found.pruned), found.rounded, found.problems) == (2, [], [])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_engine_that_loads_other_bytes_than_bf16_keeps_all_in_fp32_and_says_so(tmp_path, dtype):
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run", machine=Machine(backend="fake", dtype=dtype))
    assert on_disk(run) == ["0 F32", "1 F32", "2 F32", "3 F32"]


def killed_then_continued(folder: Path, at: int) -> Run:
    recipe = recipe_in(folder, IN_BF16)
    with Faults(at), pytest.raises(Killed):
        go(recipe, folder / "run")
    return go(recipe, folder / "run")


def check_killed(folder: Path, at: int, whole: Run) -> None:
    run = killed_then_continued(folder, at)
    assert end(run) == end(whole)
    assert on_disk(run) == ["0 F32", "1 BF16", "2 BF16", "3 F32"]
    assert verify(run.folder).problems == []
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[int]]:
    """How many file operations the run takes, and which of them make a copy."""
    folder, seen = tmp_path_factory.mktemp("count"), []

    class Noting(Faults):
        def __call__(self, moment: str, action: str, path: Path) -> None:
            if "bf16" in str(path) or "rounded-" in str(path):
                seen.append(self.count)
            super().__call__(moment, action, path)

    with Noting() as counted:
        go(recipe_in(folder, IN_BF16), folder / "run")
    return counted.count, seen


def test_killed_while_it_rounds_it_ends_with_the_same_on_disk(tmp_path, whole, operations):
    assert len(operations[1]) > 20
    for at in operations[1][: len(operations[1]) // 2 : 5]:  # of the first copy
        check_killed(tmp_path / str(at), at, whole)


@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True))
def test_killed_anywhere_it_ends_with_the_same_on_disk(tmp_path, whole, operations, share):
    at = int(share * operations[0])
    check_killed(tmp_path / f"at-{at}", at, whole)


@pytest.mark.nightly
def test_killed_at_every_operation_it_ends_with_the_same_on_disk(tmp_path, whole, operations):
    for at in range(operations[0]):
        check_killed(tmp_path / str(at), at, whole)


def test_damage_to_a_copy_and_a_lost_record_of_one_are_found(tmp_path):
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    copy = next(iter(rounded.copies(run.paths.round(1)).values()))
    shard = run.folder / copy.path / "model.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify(run.folder).problems == [
        f"{copy.path}/model.safetensors was changed after it was committed (named by the copy in bf16 of {copy.path.removesuffix('-bf16')})"
    ]
    with pytest.raises(ChainError, match="these weights were changed"):
        Run.at(run.folder).trust.weights(run.sealed()[1].head()["policy"])
    shard.write_bytes(content)
    [record] = run.paths.round(1).rounded()
    record.unlink()
    assert any("is missing (named by round-001/04-train.json)" in problem for problem in verify(run.folder).problems)


def test_a_record_of_a_copy_of_what_nobody_committed_is_found(tmp_path):
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    copy = next(iter(rounded.copies(run.paths.round(1)).values()))
    records.write(run.paths.round(1).next_rounded(), Rounded(models={"round-001/04-train/policy-0": copy}), run.paths.tmp)
    assert any("which no step committed" in problem for problem in verify(run.folder).problems)


def test_a_damaged_checkpoint_is_not_rounded_and_stops_nothing(tmp_path):
    run = go(recipe_in(tmp_path, IN_BF16.replace(", as: bf16", "").replace("rounds: 3", "rounds: 2")), tmp_path / "run")
    shard = run.folder / run.sealed()[1].models["policy"].path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run", amend=True)
    assert on_disk(run) == ["0 F32", "1 F32", "2 BF16", "3 F32"]
    log = (run.paths.events(run.paths.attempts()[-1])).read_text()
    assert "stays in fp32: these weights were changed after they were committed" in log


def test_a_checkpoint_that_this_process_knew_to_be_sound_is_hashed_anew_before_it_is_rounded(tmp_path):
    go(recipe_in(tmp_path, IN_BF16.replace(", as: bf16", "")), tmp_path / "run")
    run, said = Run.open(recipe_in(tmp_path, IN_BF16), tmp_path / "run", MACHINE, True), []
    model = run.sealed()[1].head()["policy"]
    run.trust.weights(model)
    shard = run.folder / model.path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")  # damaged behind its back
    prune(run, said.append)
    assert on_disk(run) == ["0 F32", "1 F32", "2 BF16", "3 F32"]
    assert said == [f"{model.path} stays in fp32: these weights were changed after they were committed."]


def test_a_copy_is_what_an_engine_in_bf16_makes_of_the_weights(tmp_path, whole):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    run = go(recipe_in(tmp_path, IN_BF16), tmp_path / "run")
    path = run.sealed()[1].models["policy"].path
    fp32 = load_file(whole.folder / path / "model.safetensors")["layer.weight"]
    assert torch.equal(load_file(run.folder / f"{path}-bf16" / "model.safetensors")["layer.weight"], fp32.bfloat16())
    assert digest.weights(run.folder / f"{path}-bf16") != digest.weights(whole.folder / path)
