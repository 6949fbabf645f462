"""A sweep on the fake backend: every arm as often, killed anywhere it goes on, and no result is ever written twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from chains import RECIPE, Faults, Killed, go, write_prompts

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain import sweep as sweeps
from selfkd.chain.headroom import lacks_headroom
from selfkd.chain.loop import walk as walk_run
from selfkd.chain.results import Place, chosen, result_of
from selfkd.chain.run import Run
from selfkd.chain.sweep import BudgetSpent, Clock
from selfkd.cli.main import main
from selfkd.core import stats
from selfkd.errors import ChainError, RecipeError
from selfkd.recipe.sweep import Sweep, read_sweep, sweep_of
from selfkd.report.sweeps import SAME, lines, report

BEST = "\nbest: {metric: dev/last_number}\n"
FAKE = Machine(backend="fake")
SWEEP = """
arms:
  - {recipe: sums, gold: "Answer: {{ prompt.answer }}"}
controls: [random-reward, gold-sft, wrong-context]
seeds: 2
set: {rounds: 1}
try: {sample.n: [1, 2]}
"""


def sweep_in(folder: Path, text: str = SWEEP, recipe: str = RECIPE + BEST) -> Sweep:
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder, train=6, dev=8)
    (folder / "sums.yaml").write_text(recipe)
    (folder / "all.yaml").write_text(text)
    return read_sweep(folder / "all.yaml")


def drive(run: Run, watch: object) -> None:
    if run.sealed()[run.recipe.rounds :]:
        return
    walk_run(run, Fake(run.numerics), run.begin(watch))  # type: ignore[arg-type]


def make(sweep: Sweep, folder: Path) -> list[str]:
    return [trial.name for trial in sweeps.walk(sweep, folder, FAKE, drive, lambda text: None)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    folder = tmp_path_factory.mktemp("swept")
    sweep = sweep_in(folder)
    with Faults() as counted:
        assert make(sweep, folder / "runs") == []
    (folder / "operations").write_text(str(counted.count))
    return sweep, folder / "runs"


def test_every_arm_and_control_gets_the_same_trials_one_seed_after_the_other(made: tuple[Sweep, Path]) -> None:
    sweep, folder = made
    assert sweep.arms == ["sums", "sums-random-reward", "sums-gold-sft"]  # nobody is told anything: no wrong-context
    names = [trial.name for trial in sweep.trials]
    assert names[:6] == [f"{arm}.{number}.s0" for number in (1, 2) for arm in sweep.arms]
    assert len(names) == 12 and {one.name for one in Place(folder).results()} == set(names)


def test_a_result_says_what_its_run_says(made: tuple[Sweep, Path]) -> None:
    _, folder = made
    result = next(one for one in Place(folder).results() if one.name == "sums.2.s1")
    run = Run.at(folder / "sums.2.s1")
    last = run.sealed()[-1]
    assert (result.digest, result.value) == (last.digest, last.metrics["dev/last_number"])
    assert result.rounds[-1]["generated"] == sum(seal.notes["tokens"] for seal in run.sealed())
    answers = run.samples(1, step="measure").sort("prompt")
    assert result.scores == answers["last_number"].to_list()
    assert result.facts["python"] and result.seed == run.info.seed == 1


def test_gold_sft_takes_as_many_steps_as_the_trial_of_its_method(made: tuple[Sweep, Path]) -> None:
    _, folder = made
    for name in ("1.s0", "2.s1"):
        update = Run.at(folder / f"sums.{name}").made(1)["train"].notes["train"]["steps"]
        recipe = Run.at(folder / f"sums-gold-sft.{name}").info.recipe
        assert next(step["train"]["trl"]["max_steps"] for step in recipe["steps"] if "train" in step) == update


@pytest.mark.parametrize("part", range(1, 8))
def test_killed_anywhere_a_sweep_goes_on_to_the_same_results_and_touches_no_finished_trial(
    made: tuple[Sweep, Path], tmp_path: Path, part: int
) -> None:
    _, whole = made
    operations = int((whole.parent / "operations").read_text())
    sweep = sweep_in(tmp_path)
    with Faults(operations * part // 8), pytest.raises(Killed):
        make(sweep, tmp_path / "runs")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").glob("results/*.json")}
    assert make(sweep, tmp_path / "runs") == []
    assert all(path.read_bytes() == content for path, content in before.items())
    digests = [{one.name: one.digest for one in Place(folder).results()} for folder in (tmp_path / "runs", whole)]
    assert digests[0] == digests[1]


def test_a_finished_sweep_starts_nothing_and_writes_nothing(made: tuple[Sweep, Path]) -> None:
    sweep, folder = made
    before = {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*.json")
        if path.name not in ("spent.json",) and "leases" not in path.parts
    }
    assert make(sweep, folder) == []
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_trial_that_fails_by_itself_is_a_result_with_its_reason_and_its_control_too(tmp_path: Path) -> None:
    sweep = sweep_in(
        tmp_path, SWEEP.replace("seeds: 2", "seeds: 1"), RECIPE.replace("last_number = 1", "last_number = 2") + BEST
    )
    make(sweep, tmp_path / "runs")
    failed = {one.name: one.failed for one in Place(tmp_path / "runs").results()}
    assert "0 training rows, at least 1 wanted" in failed["sums.1.s0"]
    assert "its method's trial sums.1.s0 has no result" in failed["sums-gold-sft.1.s0"]
    assert not [text for text in failed.values() if not text]


def test_what_no_trial_can_help_ends_the_call_and_leaves_no_result(tmp_path: Path) -> None:
    sweep = sweep_in(tmp_path)

    def broken(run: Run, watch: object) -> None:
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="network"):
        sweeps.walk(sweep, tmp_path / "runs", FAKE, broken, lambda text: None)
    assert Place(tmp_path / "runs").results() == []


def test_a_recipe_that_changed_after_its_trial_is_refused_and_more_arms_are_welcome(tmp_path: Path) -> None:
    one = "arms: [sums]\nseeds: 1\nset: {rounds: 1}\n"
    make(sweep_in(tmp_path, one), tmp_path / "runs")
    more = "arms: [sums, {recipe: sums, name: more, set: {sample.n: 1}}]\nseeds: 1\nset: {rounds: 1}\n"
    make(sweep_in(tmp_path, more), tmp_path / "runs")
    assert len(Place(tmp_path / "runs").results()) == len(Place(tmp_path / "runs").plans()) == 2
    with pytest.raises(ChainError, match="the arm 'sums' has another recipe now"):
        make(sweep_in(tmp_path, one.replace("rounds: 1", "rounds: 2")), tmp_path / "runs")


def test_a_budget_of_tokens_lets_no_trial_begin_beyond_it(made: tuple[Sweep, Path], tmp_path: Path) -> None:
    first = Place(made[1]).results()[0].tokens
    assert first > 0
    sweep = sweep_in(tmp_path, SWEEP + f"budget: {{tokens: {first + 1}}}\n")
    left = make(sweep, tmp_path / "runs")
    done = Place(tmp_path / "runs").results()
    assert len(left) + len(done) == 12 and sum(one.tokens for one in done[:-1]) < first + 1
    assert "trials not run: " in "\n".join(report(tmp_path / "runs").notes)


def test_hours_add_up_over_calls_in_a_file_that_sweeps_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.yaml").parent.mkdir(exist_ok=True)
    (tmp_path / "b.yaml").write_text("# of all\nhours: 1\nspent_hours: 0.5\n")
    sweep = sweep_in(tmp_path, SWEEP + "budget: {file: b.yaml}\n")
    now = [100.0]
    monkeypatch.setattr("selfkd.chain.sweep.time.monotonic", lambda: now[0])
    clock = Clock(tmp_path / "spent.json", sweep)
    now[0] += 1200
    clock.note()
    assert (tmp_path / "b.yaml").read_text() == "# of all\nhours: 1\nspent_hours: 0.8333\n" and not clock.over()
    now[0] += 1200

    def driven(run: None, watch: object) -> None:
        watch({"event": "progress"})  # type: ignore[operator]

    with pytest.raises(BudgetSpent, match=r"1.17 of 1 hours are spent"):
        clock.watching(driven)(None, lambda event: None)  # type: ignore[arg-type]
    assert make(sweep, tmp_path / "runs") == [trial.name for trial in sweep.trials]


def test_an_arm_without_headroom_is_said_to_have_none_and_is_not_trained(tmp_path: Path) -> None:
    text = "arms: [{recipe: sums, headroom: 0.99}, {recipe: sums, name: more, headroom: 0.0}]\nseeds: 1\nset: {rounds: 1}\n"
    make(sweep_in(tmp_path, text), tmp_path / "runs")
    found = {one.arm: one.failed for one in Place(tmp_path / "runs").results()}
    assert found["sums"].startswith("no headroom: ") and found["more"] == ""
    assert not (tmp_path / "runs" / "sums.1.s0").exists()
    [probe] = (tmp_path / "runs").glob("headroom-*")  # both ask it alike
    base = Run.at(probe).sealed()[0].metrics
    assert lacks_headroom(probe, "dev/last_number", base["dev/last_number_at_07"] + 0.01)
    assert "was not measured with 'told'" in lacks_headroom(probe, "dev/last_number", "told")


def test_dev_chooses_and_test_is_told_once_of_what_it_chose(tmp_path: Path) -> None:
    recipe = RECIPE.replace("prompts:\n", "prompts:\n  test: {file: test.jsonl, prompt: question, answer: answer}\n") + BEST
    sweep_in(tmp_path, SWEEP, RECIPE + BEST)
    rows = [{"question": f"What is {at} + 3?", "answer": str(at + 3)} for at in range(80, 88)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(recipe)
    sweep = read_sweep(tmp_path / "all.yaml")
    make(sweep, tmp_path / "runs")
    place = Place(tmp_path / "runs")
    best = chosen([one for one in place.results() if one.arm == "sums"], "max")
    told = [one for one in place.tests() if one.arm == "sums"]
    assert [(one.number, one.seed) for one in told] == [(best, 0), (best, 1)]
    row = report(tmp_path / "runs").rows[0]
    by_hand = [Run.at(tmp_path / "runs" / f"sums.{best}.s{seed}").sealed()[-1].metrics["test/last_number"] for seed in (0, 1)]
    assert row.test == pytest.approx(sum(by_hand) / 2)
    assert all(one.metric.startswith("dev/") for one in place.results())


def test_a_report_is_the_mean_over_seeds_of_what_dev_chose_prompt_by_prompt(made: tuple[Sweep, Path]) -> None:
    _, folder = made
    found, results = report(folder), {one.name: one for one in Place(folder).results()}
    means = {n: sum(results[f"sums.{n}.s{seed}"].value or 0 for seed in (0, 1)) / 2 for n in (1, 2)}
    best = max(means, key=lambda n: (means[n], -n))
    first, other = found.rows[0], found.rows[1]
    assert first.value == pytest.approx(means[best]) and first.chosen == results[f"sums.{best}.s0"].set
    number = chosen([one for one in results.values() if one.arm == other.arm], "max")
    sides = []
    for arm, n in (("sums", best), (other.arm, number)):
        scores = [results[f"{arm}.{n}.s{seed}"].scores for seed in (0, 1)]
        sides.append({str(at): (a + b) / 2 for at, (a, b) in enumerate(zip(*scores, strict=True))})  # type: ignore[operator]
    by_hand = stats.change(*sides)
    assert other.against and by_hand and other.against.value == pytest.approx(by_hand.value)
    assert other.verdict == SAME  # the fake learns from any rows alike
    assert any("does not beat random-reward" in line for line in found.sentences)


def test_a_file_of_results_says_the_same_as_the_folder_and_a_changed_line_is_refused(
    made: tuple[Sweep, Path], tmp_path: Path
) -> None:
    _, folder = made
    (tmp_path / "r.jsonl").write_text(lines(folder) + "\n")
    assert report(tmp_path / "r.jsonl").rows == report(folder).rows
    (tmp_path / "r.jsonl").write_text(lines(folder).replace('"seed": 1', '"seed": 2', 1))
    with pytest.raises(ChainError, match="was changed after it was written"):
        report(tmp_path / "r.jsonl")


@pytest.mark.parametrize("form", ["csv", "latex", "markdown", "json", "jsonl"])
def test_compare_writes_a_sweep_in_each_form(made: tuple[Sweep, Path], form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(made[1]), f"--{form}"]) == 0
    said = capsys.readouterr().out
    assert "sums-random-reward" in said and ("not distinguishable" in said or form == "jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: [sums]\nsedes: 2\n", "all.yaml:2  no field 'sedes'. Did you mean 'seeds'?"),
        ("arms: [nobody]\n", "all.yaml:1  nobody: no recipe 'nobody'"),
        ("arms:\n  - sums\n  - {recipe: sums, try: {sample.n: [1, 2]}}\n", "two arms are called 'sums'"),
        ("arms:\n  - sums\n  - {recipe: sums, name: b, try: {sample.n: [1, 2]}}\n", "all.yaml:2  'sums' has 1 combinations to try and another arm has 2"),
        ("arms:\n  - sums\nset: {sample.m: 1}\n", "no field 'm'"),
        ("arms: [sums]\ncontrols: [placebo]\n", "no control 'placebo'"),
        ("arms: [sums]\nmetric: test/last_number\n", "'metric' is of dev, which chooses"),
        ("arms: [sums]\nmetric: dev/right\n", "does not measure dev/right"),
        ("arms: [{recipe: sums, controls: [wrong-context]}]\n", "wrong-context has nothing to control in sums"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_file_is_told_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as told:
        sweep_in(tmp_path, text)
    assert said in str(told.value)


def test_a_sweep_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    typed = sweep_of(
        ["sums", "rounds=1", "sample.n=1,2", "train.trl.learning_rate=1e-6"], 2, ["random-reward"], "tokens=2M", None, "t"
    )
    assert typed.budget.tokens == 2_000_000 and len(typed.trials) == 8
    assert typed.trials[2].words == ("rounds=1", "train.trl.learning_rate=1e-06", "sample.n=2")


def test_a_recipe_alone_has_the_result_of_its_run(tmp_path: Path) -> None:
    sweep_in(tmp_path)
    from selfkd.recipe.load import load

    run = go(load(str(tmp_path / "sums.yaml")), tmp_path / "run")
    assert result_of(run.folder, "dev/last_number")["digest"] == run.sealed()[-1].digest


def test_a_sweep_file_is_compared_before_it_ran_and_while_it_runs_with_a_row_for_each_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = sweep_in(tmp_path / "files")
    file = tmp_path / "files" / "all.yaml"
    found = report(file, tmp_path)
    assert [row.arm for row in found.rows] == asked.arms and {row.why for row in found.rows} == {"not run"}
    assert found.notes == [f"none of {len(asked.trials)} trials has run"]
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(file), "--markdown"]) == 0
    assert [line.count("not run") for line in capsys.readouterr().out.splitlines()[2:5]] == [1] * 3
    first = next(one for one in asked.trials if one.arm == "sums")
    sweeps.walk(replace(asked, trials=(first,)), tmp_path / "runs" / asked.name, FAKE, drive, lambda text: None)
    rows = report(file, tmp_path / "runs").rows
    assert [row.done for row in rows] == [1, 0, 0] and [row.wanted for row in rows] == [4] * 3
    (tmp_path / "files" / "sums.yaml").write_text((RECIPE + BEST).replace("max_tokens: 64", "max_tokens: 63"))
    with pytest.raises(ChainError, match="the arm 'sums' has another recipe now"):
        report(file, tmp_path / "runs")
