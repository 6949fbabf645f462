"""An update that is measured on its way, on the fake backend: where it ends, which model it leaves, and that a kill changes neither."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in
from rich.console import Console

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.checks import CheckedUpdate
from selfkd.chain.commit import generated_tokens
from selfkd.chain.loop import walk
from selfkd.chain.records import Commit
from selfkd.chain.run import Run
from selfkd.core import digest, storage
from selfkd.recipe.lint import look
from selfkd.report import status, tables
from selfkd.report.verify import verify
from selfkd.steps.check import Check, Figure

CHECK = "check: {every: 4, metric: dev/last_number, patience: 2}"
CHECKED = RECIPE.replace("train: {loss: sft}", f"train: {{loss: sft, {CHECK}}}").replace("rounds: 2", "rounds: 1")
LIVES_ON = CHECKED.replace("check:", "optimiser: continue, check:")
SIXTHS = {4: 2, 8: 4, 12: 3, 16: 4, 20: 6, 24: 1}  # right answers to the six prompts of dev, of the model as of each step


class Scripted(Fake):
    """A model that answers as many prompts of dev rightly as its script says for the step that it is of. Two rows of each of 12 prompts: 24 steps."""

    def __init__(self, hook: Any = lambda call: None, script: dict[int, int] = SIXTHS) -> None:
        super().__init__({}, _answer, hook)
        self.script, self.asked = script, []

    def train(self, start: Any, reference: Any, rows: Any, spec: Any, out: Path, *more: Any) -> Any:
        self.asked.append(spec.until)
        made = super().train(start, reference, rows, spec, out, *more)
        weights = json.loads((out / "weights.json").read_text())
        (out / "weights.json").write_text(json.dumps({**weights, "skill": self.script[made.metrics["steps"]]}))
        return made


def _answer(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    first, _, second = messages[-1]["content"].removeprefix("What is ").removesuffix("?").split()
    number = int(first) - 60  # of the prompt in dev; below 0 in train
    return f"Answer: {int(first) + int(second) if number < skill else 0}"


def made(run: Run) -> Commit:
    return run.made(1)["train"]


def checks(folder: Path, words: str, backend: Fake | None = None) -> tuple[Run, dict[str, Any]]:
    run = go(
        recipe_in(folder, CHECKED.replace(CHECK, f"check: {{{words}, metric: dev/last_number}}")),
        folder / "run",
        backend or Scripted(),
    )
    return run, dict(made(run).checks)


def steps_of(found: dict[str, Any]) -> list[int]:
    return [one["step"] for one in found["figures"]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Faults() as counted:
        run = go(recipe_in(folder, CHECKED), folder / "run", Scripted())
    return run, counted.count


# ---- where it ends, and what it leaves ----


def test_it_ends_after_so_many_checks_without_a_better_value_and_leaves_the_earliest_of_the_best(undisturbed):
    run, _ = undisturbed
    found = dict(made(run).checks)
    assert [(one["step"], one["value"]) for one in found["figures"]] == [(4, 2 / 6), (8, 4 / 6), (12, 3 / 6), (16, 4 / 6)]
    assert (found["picked"], found["stopped"]) == (8, "dev/last_number did not improve for 2 checks")
    assert made(run).models["policy"].digest == found["figures"][1]["model"]
    assert made(run).notes["train"]["steps"] == 8
    assert run.sealed()[1].metrics["dev/last_number"] == 4 / 6
    tokens = [one["tokens"] for one in found["figures"]]
    assert min(tokens) > 0 and tokens[1] == run.sealed()[1].metrics["dev/tokens"]
    sampled, measured = (generated_tokens(run.paths, run.made(1)[step]) for step in ("sample", "measure"))
    assert run.spent([run.sealed()[1]]) == sampled + measured + sum(tokens)  # which `stop: {tokens: …}` counts
    assert not run.paths.updates.exists() and verify(run.folder).problems == []


def test_the_whole_update_is_made_without_patience_and_its_end_is_a_check(tmp_path):
    backend = Scripted(script={10: 1, 20: 2, 24: 3})
    run, found = checks(tmp_path, "every: 10", backend)
    assert steps_of(found) == [10, 20, 24] and backend.asked == [10, 20, 30]
    assert (found["picked"], found["stopped"]) == (24, "")
    plain = go(recipe_in(tmp_path / "plain", CHECKED.replace(f", {CHECK}", "")), tmp_path / "plain" / "run", backend)
    assert made(run).models["policy"].digest == made(plain).models["policy"].digest


@pytest.mark.parametrize(
    ("words", "steps", "picked"),
    [
        ("every: 4, pick: last, patience: 2", [4, 8, 12, 16], 16),
        ("every: 4, pick: last", [4, 8, 12, 16, 20, 24], 24),
        ("every: 4", [4, 8, 12, 16, 20, 24], 20),
        ("every: 4, patience: 1", [4, 8, 12], 8),
        ("every: 4, mode: min, patience: 3", [4, 8, 12, 16], 4),
        ("every: 99", [24], 24),
    ],
)
def test_patience_mode_and_pick_by_hand(tmp_path, words, steps, picked):
    run, found = checks(tmp_path, words)
    assert (steps_of(found), found["picked"]) == (steps, picked)
    assert made(run).models["policy"].digest == next(one["model"] for one in found["figures"] if one["step"] == picked)


def test_what_could_not_be_scored_is_no_better_value():
    found = [Figure(1, None, "a"), Figure(2, 0.0, "b"), Figure(3, None, "c")]
    check = Check(every=1, metric="dev/x", patience=2)
    assert check.best(found).step == 2 and check.best(found[:1]).step == 1
    assert not check.stops(found) and check.stops([Figure(1, None, "a"), Figure(2, None, "b")])


def test_a_check_measures_with_the_seeds_of_the_measure_step_and_nothing_of_it_enters_the_pool(tmp_path):
    drawn = CHECKED.replace(
        "measure: reward/number.py:last_number", "measure: {reward: reward/number.py:last_number, n: 5, temperature: 0.9}"
    )
    run = go(recipe_in(tmp_path, drawn), tmp_path / "run")
    found = made(run).checks
    picked = next(one for one in found["figures"] if one["step"] == found["picked"])
    assert 0 < picked["value"] < 1 and picked["value"] == run.sealed()[1].metrics["dev/last_number"]
    assert set(made(run).tables) == {"rows"}


def test_in_a_warm_up_it_is_measured_as_the_rounds_will_be(tmp_path):
    text = RECIPE.replace("\nsteps:", f"\nbefore:\n  - gold\n  - train: {{loss: sft, name: warm, {CHECK}}}\nsteps:")
    run = go(recipe_in(tmp_path, text), tmp_path / "run")
    assert run.made(0)["warm"].checks["metric"] == "dev/last_number" and verify(run.folder).problems == []


def test_an_adapter_and_an_optimiser_that_lives_on_are_those_of_the_picked_step(tmp_path):
    more = "lora: {r: 2}, continue: true, optimiser: continue, "
    run = go(
        recipe_in(tmp_path, CHECKED.replace("check:", f"{more}check:").replace("rounds: 1", "rounds: 2")), tmp_path / "run"
    )
    for index in (1, 2):
        commit = run.made(index)["train"]
        assert commit.models["policy"].kind == "adapter" and commit.checks
        assert commit.states["policy"].model == commit.models["policy"].digest
    assert verify(run.folder).problems == []


def test_recipes_without_checks_keep_their_keys(tmp_path):
    step = next(one for one in recipe_in(tmp_path, RECIPE).steps_of(1) if one.verb == "train")
    assert "check" not in step.identity()


# ---- kills ----


def continued(folder: Path, at: int) -> Run:
    recipe = recipe_in(folder, CHECKED)
    with Faults(at), pytest.raises(Killed):
        go(recipe, folder / "run", Scripted())
    return go(recipe, folder / "run", Scripted())


@pytest.mark.parametrize("part", range(8))
def test_killed_at_a_file_operation_it_ends_on_the_same_digest(undisturbed, tmp_path, part):
    run, operations = undisturbed
    again = continued(tmp_path, operations * (4 + part) // 13 + part % 5)  # most of them are of the checks
    assert end(again) == end(run) and verify(again.folder).problems == []


@pytest.mark.nightly
def test_killed_at_every_file_operation_it_ends_on_the_same_digest(undisturbed, tmp_path):
    run, operations = undisturbed
    for at in range(operations):
        assert end(continued(tmp_path, at)) == end(run), f"operation {at}"
        shutil.rmtree(tmp_path / "run")


def test_killed_at_every_call_of_the_backend_it_repeats_that_call_alone(undisturbed, tmp_path):
    recipe, calls = recipe_in(tmp_path, CHECKED), []
    go(recipe, tmp_path / "count", Scripted(calls.append))
    inside = range(calls.index("train"), len(calls) - 1 - calls[::-1].index("train") + 1)
    for at in inside[::2]:
        heard: list[str] = []

        def kill(call: str, at: int = at, heard: list[str] = heard) -> None:
            heard.append(call)
            if len(heard) == at + 1:
                raise Killed

        with pytest.raises(Killed):
            go(recipe, tmp_path / str(at), Scripted(kill))
        again = go(recipe, tmp_path / str(at), Scripted(kill))
        assert end(again) == end(undisturbed[0]) and len(heard) == len(calls) + 1, f"call {at}: {calls[at]}"


class Dying(Scripted):
    """Dies when it is asked to train up to a step."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def train(self, *arguments: Any) -> Any:
        if arguments[3].until == self.until:
            raise KeyboardInterrupt
        return super().train(*arguments)


def killed_before(folder: Path, until: int, text: str = CHECKED) -> tuple[Any, Path]:
    recipe = recipe_in(folder, text)
    with pytest.raises(KeyboardInterrupt):
        go(recipe, folder / "run", Dying(until))
    [update] = (folder / "run" / "updates").iterdir()
    return recipe, update


def test_on_the_way_only_the_model_that_would_be_picked_is_kept(tmp_path):
    _, update = killed_before(tmp_path, 16)
    assert sorted(path.name for path in update.glob("check-*")) == [
        *("check-000004.json", "check-000008", "check-000008.json", "check-000012.json")
    ]


@pytest.mark.parametrize(("old", "new"), [(CHECKED, LIVES_ON), (LIVES_ON, CHECKED)])
def test_an_update_goes_on_only_with_segments_that_have_a_state_where_it_shall_leave_one(tmp_path, old, new):
    killed_before(tmp_path, 16, old)
    backend = Scripted()
    run = go(recipe_in(tmp_path, new), tmp_path / "run", backend, amend=True)
    assert backend.asked == [4, 8, 12, 16] and set(made(run).states) == ({"policy"} if new == LIVES_ON else set())
    assert verify(run.folder).problems == []


def harm_model(update: Path) -> str:
    (update / "check-000008" / "model" / "weights.json").write_text('{"skill": 6, "history": ""}')
    return "the model that was picked so far is not as it was"


def harm_words(update: Path) -> str:
    (update / "check-000008" / "trained.json").write_text("[]")
    return "the model that was picked so far is not as it was"


def harm_figure(update: Path) -> str:
    path = update / "check-000012.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    return "was changed after it was written"


def lose_figure(update: Path) -> str:
    (update / "check-000004.json").unlink()
    return "figures are missing"


@pytest.mark.parametrize("harm", [harm_model, harm_words, harm_figure, lose_figure])
def test_where_something_of_it_was_damaged_the_update_begins_anew_and_ends_the_same(undisturbed, tmp_path, harm):
    recipe, update = killed_before(tmp_path, 16)
    said, events = harm(update), []
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    backend = Scripted()
    walk(run, backend, run.begin(events.append))
    [warning] = [event["text"] for event in events if event["event"] == "warning" and "anew" in event["text"]]
    assert said in warning and backend.asked == [4, 8, 12, 16] and end(run) == end(undisturbed[0])


@pytest.mark.parametrize("content", [b'{"moments": "other"}', None])
def test_a_state_that_was_damaged_beside_the_picked_model_is_made_again(tmp_path, content):
    text = LIVES_ON.replace("rounds: 1", "rounds: 2")
    recipe, update = killed_before(tmp_path, 16, text)
    [path] = update.glob("check-000008/*state*/moments.json")
    path.unlink() if content is None else path.write_bytes(content)
    backend = Scripted()
    run = go(recipe, tmp_path / "run", backend)
    whole = go(recipe_in(tmp_path / "whole", text), tmp_path / "whole" / "run", Scripted())
    assert backend.asked[:4] == [4, 8, 12, 16] and end(run) == end(whole) and verify(run.folder).problems == []


def test_a_segment_that_was_damaged_before_it_was_measured_is_made_again(undisturbed, tmp_path):
    recipe, folder = recipe_in(tmp_path, CHECKED), tmp_path / "run"
    seen: list[str] = []

    def kill(call: str) -> None:
        seen.append(call)
        if call == "generate" and seen.count("train") == 2:
            raise Killed

    with pytest.raises(Killed):
        go(recipe, folder, Scripted(kill))
    [place] = folder.glob("updates/*/check-000008")
    (place / "model" / "weights.json").write_text('{"skill": 6, "history": ""}')
    backend = Scripted()
    assert end(go(recipe, folder, backend)) == end(undisturbed[0]) and backend.asked == [8, 12, 16]


def test_it_says_what_was_measured_and_where_it_goes_on(tmp_path):
    recipe, _ = killed_before(tmp_path, 16)
    events: list[Any] = []
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    walk(run, Scripted(), run.begin(events.append))
    texts = [event["text"] for event in events if event["event"] in ("checked", "continues")]
    assert texts == [
        "round-001/train goes on behind its check at step 12",
        "round-001/train: checked at step 16: dev/last_number 0.6667",
    ]


def test_status_says_which_step_was_taken_and_why_the_update_ended(undisturbed):
    [said] = status.rounds(undisturbed[0].paths)[1].checked
    assert said == (
        "train: the model of step 8 was taken: dev/last_number 0.667, 0.667 at step 16, the last of 4; "
        "dev/last_number did not improve for 2 checks"
    )
    to = Console(width=200, record=True, file=io.StringIO(), highlight=False)
    tables.print_status(status.read(undisturbed[0].folder), to)
    assert f"round 1, {said}" in to.export_text()


# ---- who made it, and what it took ----


class Elsewhere(Scripted):
    """On another processor; each step learns 100 tokens. Killed when it is to train up to `until`."""

    def __init__(self, cpu: str, until: int | None = None) -> None:
        super().__init__()
        self._facts, self.until = {"cpu": cpu}, until

    def train(self, *arguments: Any) -> Any:
        if arguments[3].until == self.until:
            raise Killed
        made = super().train(*arguments)
        made.metrics["tokens"] = 100 * made.metrics["steps"]
        return made


@pytest.mark.parametrize("last", [16, None], ids=["all but the last segment", "all of it"])
def test_a_round_says_who_made_its_segments_and_checks_in_an_earlier_attempt(tmp_path, monkeypatch, last):
    recipe, folder = recipe_in(tmp_path, CHECKED), tmp_path / "run"

    def killed(*_: Any) -> Any:
        raise Killed

    with pytest.raises(Killed):
        go(recipe, folder, Elsewhere("A", until=8))
    with pytest.raises(Killed), monkeypatch.context() as patch:
        if last is None:
            patch.setattr(CheckedUpdate, "_picked", killed)
        go(recipe, folder, Elsewhere("B", until=last))
    run = go(recipe, folder, Elsewhere("A"))
    assert run.sealed()[1].notes["level"] == "data: cpu A → B (engine-0, trainer-0)"
    makers = {kind.partition("-")[0]: len(of) for kind, of in made(run).notes["makers"].items()}
    assert makers == {"driver": 1, "engine": 2, "reward": 1, "trainer": 2}
    [moved] = verify(folder).moved
    assert "cpu A → B" in moved and verify(folder).problems == []


def test_a_commit_counts_the_tokens_of_all_checks_and_all_segments_whichever_attempt_made_them(tmp_path):
    recipe, folder = recipe_in(tmp_path, CHECKED), tmp_path / "run"
    with pytest.raises(Killed):
        go(recipe, folder, Elsewhere("A", until=12))
    run = go(recipe, folder, Elsewhere("A"))
    generated = sum(one["tokens"] for one in made(run).checks["figures"])
    assert made(run).notes["checked"] == {"generated": generated, "trained": 1600}
    assert made(run).notes["train"]["tokens"] == 800 and made(run).checks["picked"] == 8
    sampled, measured = (generated_tokens(run.paths, run.made(1)[step]) for step in ("sample", "measure"))
    assert run.sealed()[1].notes["tokens"] == sampled + measured + generated


@pytest.mark.parametrize("measured", [False, True])
def test_a_record_of_how_answers_are_cut_that_was_damaged_lets_the_update_begin_anew(tmp_path, measured):
    recipe, folder = recipe_in(tmp_path, CHECKED + "exact: false\n"), tmp_path / "run"
    seen: list[str] = []

    def kill(call: str) -> None:
        seen.append(call)
        if seen.count("train") == 2 and (call == "generate" or measured):
            raise Killed

    with pytest.raises(Killed):
        go(recipe, folder, Scripted(kill))
    cuts = list(folder.glob("updates/*/answers/cut-*.json"))
    assert cuts
    for path in cuts:
        path.write_text("{")
    backend = Scripted()
    go(recipe, folder, backend)
    assert backend.asked == [4, 8, 12, 16] and verify(folder).problems == []


# ---- verify ----


def changed(folder: Path, **change: Any) -> list[str]:
    """What verify says where the checks of a commit are others, all digests of that commit redone."""
    path = folder / "round-001" / "04-train.json"
    record = json.loads(path.read_text())
    record["checks"] = {name: value for name, value in {**record["checks"], **change}.items() if value != "gone"}
    path.write_bytes(storage.json_text(digest.with_self_digest(record)))
    return verify(folder).problems


@pytest.fixture
def moved(undisturbed, tmp_path) -> Path:
    return Path(shutil.copytree(undisturbed[0].folder, tmp_path / "moved"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"figures": []}, "checks.figures: List should have at least 1 item"),
        ({"figures": "gone"}, "checks.figures: Field required"),
        ({"figures": [{"step": 4, "model": "0"}]}, "checks.figures.0.value: Field required"),
        ({"picked": "8"}, "checks.picked: Input should be a valid integer"),
    ],
)
def test_checks_that_cannot_be_read_are_a_problem_in_words(moved, change, said):
    assert any(
        "04-train.json: what it says of its checks cannot be read: " in one and said in one for one in changed(moved, **change)
    )


@pytest.mark.parametrize(
    ("cut", "more", "said"),
    [
        (slice(0, 3), {"stopped": ""}, "where the update ended does not follow from its figures"),
        (slice(0, 3), {}, "where the update ended does not follow from its figures"),
        (slice(0, 4), {"stopped": ""}, "where the update ended does not follow from its figures"),
        (slice(1, 2), {"stopped": ""}, "its figures are not of every 4 steps"),
        (slice(1, 4), {}, "its figures are not of every 4 steps"),
    ],
)
def test_figures_that_were_left_out_are_found(undisturbed, moved, cut, more, said):
    figures = made(undisturbed[0]).checks["figures"][cut]
    assert any(said in problem for problem in changed(moved, figures=figures, **more))


def test_checks_that_no_step_asked_for_and_those_that_are_gone_are_found(undisturbed, moved):
    path = moved / "round-001" / "04-train.json"
    record = json.loads(path.read_text())
    for change, said in (
        ({"checks": {}}, "it was to be measured on its way, and no figure was committed"),
        ({"identity": {**record["identity"], "check": None}}, "it was not to be measured on its way"),
    ):
        path.write_bytes(storage.json_text(digest.with_self_digest({**record, **change})))
        assert any(said in problem for problem in verify(moved).problems)


@pytest.mark.parametrize(
    ("steps", "right"), [([10, 20, 24], True), ([10, 20], False), ([10, 20, 25], False), ([10, 24], False)]
)
def test_a_whole_update_ends_with_its_last_step_however_soon_behind_a_check(steps, right):
    check = Check(every=10, metric="dev/x")
    found = [Figure(step, 0.1 * step, str(step)) for step in steps]
    assert (list(check.contradictions(check.record(found, True, 24, "how"))) == []) is right


def test_records_without_the_steps_of_the_whole_update_are_judged_as_they_were(undisturbed, moved):
    figures = made(undisturbed[0]).checks["figures"]
    check = Check(every=4, metric="dev/last_number", patience=2)
    old = {"metric": check.metric, "figures": figures, "picked": 8, "stopped": "dev/last_number did not improve for 2 checks"}
    assert list(check.contradictions(old)) == []
    problems = changed(moved, of="gone", how="gone")
    assert len(problems) == 2 and not any("figure" in problem for problem in problems)  # its digest, and its file's hash


def test_a_figure_says_how_it_was_measured_as_seals_do(undisturbed, tmp_path):
    run, _ = undisturbed
    assert made(run).checks["how"] == run.sealed()[1].measures["dev/last_number"]
    other = CHECKED.replace(
        "measure: reward/number.py:last_number", "measure: {reward: reward/number.py:last_number, limit: 3}"
    )
    recipe = recipe_in(tmp_path, CHECKED)

    class Ended(Scripted):
        def generate(self, model: Any, *more: Any) -> Any:
            if not list(tmp_path.glob("run/updates/*")) and list(tmp_path.glob("run/round-001/04-*.json")):
                raise KeyboardInterrupt
            yield from super().generate(model, *more)

    with pytest.raises(KeyboardInterrupt):
        go(recipe, tmp_path / "run", Ended())
    amended = go(recipe_in(tmp_path, other), tmp_path / "run", Scripted(), amend=True)
    assert amended.sealed()[1].metrics["dev/last_number"] != 4 / 6
    assert made(amended).checks["how"] == made(run).checks["how"] != amended.sealed()[1].measures["dev/last_number"]
    assert verify(amended.folder).problems == []


def test_a_figure_that_is_not_what_its_round_measured_of_the_same_model_in_the_same_way_is_found(undisturbed, moved):
    figures = [{**one, "value": one["value"] + 0.01} for one in made(undisturbed[0]).checks["figures"]]
    said = f"its figure of step 8 is {4 / 6 + 0.01}, and 'measure' measured {4 / 6} of the same model in the same way"
    assert any(said in problem for problem in changed(moved, figures=figures))
    assert not any("of the same model" in problem for problem in changed(moved, how="0" * 64))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"picked": 4}, "its figures pick the model of step 8, not of step 4"),
        ({"stopped": "", "figures": None}, "is not the one that was committed"),
    ],
)
def test_a_record_that_does_not_follow_from_its_figures_is_found(undisturbed, tmp_path, change, said):
    folder = shutil.copytree(undisturbed[0].folder, tmp_path / "moved")
    path = folder / "round-001" / "04-train.json"
    record = json.loads(path.read_text())
    if "figures" in change:
        change = {"figures": [{**one, "model": "0" * 64} for one in record["checks"]["figures"]]}
    record["checks"] |= change
    path.write_bytes(storage.json_text(digest.with_self_digest(record)))
    problems = verify(folder).problems
    assert any(said in problem for problem in problems)
    assert any("its digest does not follow from what it added" in problem for problem in problems)


# ---- lint ----


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("every: 4, metric: dev/nothing", "'check.metric' 'dev/nothing' is not measured every round"),
        ("every: 4, metric: test/last_number", "a split that steers is not a test any more"),
        ("every: 0, metric: dev/last_number", "every"),
        ("every: 4, metric: dev/last_number, patience: 0", "patience"),
        ("every: 4, metric: dev/last_number, pick: worst", "pick"),
        ("pick: best", "metric"),
    ],
)
def test_what_cannot_be_checked_is_refused_at_its_line(tmp_path, words, said):
    from selfkd.errors import RecipeError

    with pytest.raises(RecipeError) as caught:
        recipe = recipe_in(tmp_path, CHECKED.replace(CHECK, f"check: {{{words}}}"))
        found = look(recipe)[0].problems
        raise RecipeError("\n".join(found))
    assert said in str(caught.value) and "sums.yaml:14" in str(caught.value)


def test_a_metric_of_another_role_or_of_the_train_split_is_refused(tmp_path):
    from selfkd.errors import RecipeError

    other = CHECKED.replace("loss: sft,", "loss: sft, role: critic, from: policy@now,")
    with pytest.raises(RecipeError, match=r"is measured of policy, and this step trains critic"):
        recipe_in(tmp_path, other)
    train = CHECKED.replace(
        "measure: reward/number.py:last_number", "measure: {reward: reward/number.py:last_number, split: train}"
    )
    with pytest.raises(RecipeError, match=r"'train/last_number' is of prompts that are trained on"):
        recipe_in(tmp_path, train.replace("metric: dev/", "metric: train/"))
