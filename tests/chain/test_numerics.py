"""Numerics hold from the first engine on, and what a run was made with is compared: another version, processor or checker is named."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from chains import RECIPE, Killed, end, go, recipe_in
from rich.console import Console

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine, read_machine
from selfkd.chain import drive, numerics, records
from selfkd.chain.loop import walk
from selfkd.chain.records import Numerics
from selfkd.chain.run import Run
from selfkd.core import digest, facts
from selfkd.errors import BackendError, ChainError, UsageError
from selfkd.report import notebook, status
from selfkd.report.tables import print_rounds
from selfkd.report.verify import verify

FACTS = {"cpu": "EPYC 7763", "instructions": ["avx2", "avx512f"], "torch": "2.13.0", "flash-attn": None}


def levels(run: Run) -> list[str]:
    return [seal.notes["level"] for seal in run.sealed()]


def two_attempts(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Run:
    """A run of one round with `first`, and a second round with `second`."""
    go(recipe_in(folder, RECIPE, "rounds=1"), folder / "run", Fake({}, facts=first))
    return go(recipe_in(folder, RECIPE, "rounds=2"), folder / "run", Fake({}, facts=second))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"torch": "2.14.0"}, "torch 2.13.0 → 2.14.0 (engine, trainer)"),
        ({"cpu": "Xeon"}, "cpu EPYC 7763 → Xeon (engine, trainer)"),
        ({"instructions": ["amx_bf16", "avx2"]}, "instructions without avx512f, with amx_bf16 (engine, trainer)"),
        ({"flash-attn": "2.9"}, "flash-attn none → 2.9 (engine, trainer)"),
    ],
)
def test_a_round_made_with_something_else_says_so_and_is_not_exact(tmp_path, change, said):
    run = two_attempts(tmp_path, FACTS, {**FACTS, **change})
    assert levels(run) == ["exact", "exact", f"data: {said}"]
    assert [one.moved for one in status.rounds(run.paths)] == ["", "", said]
    shown = Console(file=io.StringIO(), width=200)
    print_rounds(status.read(run.folder), shown)
    assert f"round 2 was not made with what the run began with: {said}" in shown.file.getvalue()
    assert verify(run.folder).problems == []


@pytest.mark.parametrize(
    ("told", "level"),
    [
        ({"gpu": None}, "exact"),
        ({"gpu": "H100 (sm_90)", "repeats": True}, "exact"),
        ({"gpu": "H100 (sm_90)", "repeats": False}, "data: trainer-0 trained on a card without deterministic algorithms"),
        ({"gpu": "H100 (sm_90)"}, "data: trainer-0 trained on a card without deterministic algorithms"),
    ],
)
def test_a_round_that_trained_on_a_card_is_exact_only_where_the_rank_kept_to_what_repeats(tmp_path, told, level):
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run", Fake({}, facts={**FACTS, **told}))
    assert levels(run) == ["exact", level]  # round 0 trains nothing


def test_rounds_made_with_the_same_are_exact_however_many_attempts_there_were(tmp_path):
    run = two_attempts(tmp_path, FACTS, dict(FACTS))
    assert levels(run) == ["exact", "exact", "exact"]
    assert sorted(path.name for path in run.paths.facts() if path.name.startswith(("engine", "trainer"))) == [
        "engine-001.json",
        "trainer-001.json",
    ]


def test_what_moved_is_told_while_it_goes_on(tmp_path):
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run", Fake({}, facts=FACTS))
    run = Run.open(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run", Machine(backend="fake"))
    events: list[dict[str, Any]] = []
    walk(run, Fake({}, facts={**FACTS, "torch": "2.14.0"}), run.begin(events.append))
    warned = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warned) == 1 and "torch 2.13.0 → 2.14.0 (engine)" in warned[0]


def test_answers_that_a_killed_attempt_made_with_something_else_count_for_the_round_that_uses_them(tmp_path):
    def kill_at_the_fourth(call: str, calls: list[str] = []) -> None:  # noqa: B006 - it counts
        calls.append(call)
        if calls.count("generate") == 4:  # the base is measured by the first; two chunks of round 1 are answered
            raise KeyboardInterrupt

    recipe = recipe_in(tmp_path)
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "first", Fake({}, facts=FACTS))
    with pytest.raises(KeyboardInterrupt):
        go(recipe, tmp_path / "run", Fake({}, hook=kill_at_the_fourth, facts=FACTS))
    run = go(recipe, tmp_path / "run", Fake({}, facts={**FACTS, "torch": "2.14.0"}))
    assert levels(run)[0] == "exact"
    # Both made answers of round 1, so the one that differs is named; the trainer came up in the second attempt only.
    assert levels(run)[1] == "data: torch 2.13.0 → 2.14.0 (engine-0)"


class Trains(Fake):
    """One whose rank says how its updates add up, as ranks do since there is more than one way."""

    def __init__(self, arithmetic: str) -> None:
        super().__init__({}, facts=FACTS)
        self.arithmetic = arithmetic

    def facts(self) -> dict[str, Any]:
        found = super().facts()
        word = {"arithmetic": self.arithmetic}
        return {name: {**one, **word} if name.startswith("trainer") else one for name, one in found.items()}


def test_a_run_that_goes_on_with_training_that_adds_up_otherwise_is_not_called_exact(tmp_path):
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run", Fake({}, facts=FACTS))  # an older rank says nothing of it
    go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run", Trains("padded"))
    run = go(recipe_in(tmp_path, RECIPE, "rounds=3"), tmp_path / "run", Trains("flat-1"))
    assert levels(run) == ["exact", "exact", "exact", "data: arithmetic padded → flat-1 (trainer)"]
    assert levels(go(recipe_in(tmp_path), tmp_path / "new", Trains("flat-1"))) == ["exact"] * 3


class TwoEngines(Fake):
    def facts(self) -> dict[str, Any]:
        found = super().facts()
        return found | {"engine-1": {**FACTS, "cpu": "Xeon"}} if "engine-0" in found else found

    def logprobs(self, model, rows, on_progress=None):
        yield from super().logprobs(model, rows)


def test_engines_of_one_attempt_that_differ_among_themselves_are_named(tmp_path):
    text = RECIPE.replace("  - select:", "  - score: {logprob: policy, as: likely}\n  - select:")
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run", TwoEngines({}, facts=FACTS))
    assert levels(run)[1] == "data: cpu EPYC 7763 → Xeon (engine-1)"


def test_another_version_of_a_package_that_a_reward_imports_is_named(tmp_path, monkeypatch):
    """A package of its own, so that the test rests on no other: what counts is what the worker has imported."""

    def installed(version: str) -> None:
        folder = tmp_path / version
        (folder / f"math_checker-{version}.dist-info").mkdir(parents=True)
        (folder / f"math_checker-{version}.dist-info/METADATA").write_text(f"Name: math-checker\nVersion: {version}\n")
        (folder / "math_checker.py").write_text("")
        monkeypatch.syspath_prepend(str(folder))

    (tmp_path / "mine.py").write_text(
        "import math_checker\n\ndef right(completion, answer):\n    return float(answer in completion)\n"
    )
    text = RECIPE.replace("  - score: reward/number.py:last_number", "  - score: mine.py:right").replace(
        "last_number = 1", "right = 1"
    )
    installed("1.0")
    go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    installed("1.1")
    from selfkd.rewards.pool import close_idle_workers

    close_idle_workers()
    run = go(recipe_in(tmp_path, text, "rounds=2"), tmp_path / "run")
    assert levels(run) == ["exact", "exact", "data: math-checker 1.0 → 1.1 (reward)"]


def test_another_version_in_the_driver_is_named_for_metrics_are_its_work(tmp_path, monkeypatch):
    go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    found = facts.installed_version
    monkeypatch.setattr(facts, "installed_version", lambda package: "99" if package == "polars" else found(package))
    run = go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run")
    assert levels(run)[2].startswith("data: polars ") and levels(run)[2].endswith(" → 99 (driver)")


def test_the_facts_of_this_process_name_its_processor_its_python_and_its_packages():
    found = facts.of_process(["polars", "no-such-package"])
    assert found["cpu"] and found["python"].startswith("3.") and found["selfkd"]
    assert found["polars"][0].isdigit() and found["no-such-package"] is None


# ---- machine numerics ----


class Picky(Fake):
    """An engine that starts with float32 only, as one whose processor has no bf16 might."""

    def generate(self, model, chunks, sampling, on_progress=None):
        if self.numerics()["dtype"] != "float32":
            raise BackendError("2 engines in a row did not start", "engine", "Look at the log.")
        yield from super().generate(model, chunks, sampling)


def machine(folder: Path, text: str) -> Machine:
    (folder / "machine.yaml").write_text(text)
    return read_machine(folder / "machine.yaml")


def driven(folder: Path, text: str, monkeypatch, events: list[dict[str, Any]] | None = None, rounds: int = 1) -> Run:
    monkeypatch.setattr(drive, "open_backend", lambda machine, numerics, log, say: Picky(numerics))
    watch = events.append if events is not None else lambda event: None
    return notebook.run(recipe_in(folder, RECIPE, f"rounds={rounds}"), folder / "run", machine(folder, text), watch)


def test_numerics_that_no_engine_came_up_with_may_be_corrected_and_the_same_command_goes_on(tmp_path, monkeypatch):
    with pytest.raises(BackendError, match="did not start"):
        driven(tmp_path, "{backend: fake, dtype: bfloat16, threads: 1}", monkeypatch)
    assert not (tmp_path / "run/numerics.json").exists()
    run = driven(tmp_path, "{backend: fake, dtype: float32, threads: 2}", monkeypatch)
    kept = records.read(run.paths.numerics, Numerics).numerics
    assert (kept["dtype"], kept["threads"], run.rounds) == ("float32", 2, 1)
    assert end(run) == end(go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "other"))
    assert verify(run.folder).problems == []


def test_other_numerics_are_ignored_afterwards_and_one_line_names_them(tmp_path, monkeypatch):
    driven(tmp_path, "{backend: fake, dtype: float32, threads: 2}", monkeypatch)
    events: list[dict[str, Any]] = []
    run = driven(
        tmp_path, "{backend: fake, dtype: bfloat16, threads: 0, max_num_seqs: 0, generators: 3}", monkeypatch, events, rounds=2
    )
    assert (run.machine.dtype, run.machine.threads, run.machine.generators, run.rounds) == ("float32", 2, 3, 2)
    warned = [event["text"] for event in events if event["event"] == "warning"]
    assert len(warned) == 1 and "dtype float32 (bfloat16 asked)" in warned[0] and warned[0].count(" asked)") == 1
    assert Run.at(run.folder).ignored == []
    assert Run.at(run.folder, Machine(backend="fake", dtype="float16")).ignored == ["dtype float32 (float16 asked)"]
    events.clear()
    driven(tmp_path, "{backend: fake, generators: 2}", monkeypatch, events, rounds=3)  # names no numerics: nothing to say
    assert [event for event in events if event["event"] == "warning"] == []


def test_a_run_whose_record_of_numerics_is_gone_does_not_go_on_with_others(tmp_path, monkeypatch):
    run = driven(tmp_path, "{backend: fake, dtype: float32, threads: 2}", monkeypatch)
    kept = run.paths.numerics.read_bytes()
    run.paths.numerics.unlink()
    with pytest.raises(ChainError, match=r"run/numerics.json  is missing, but run/facts/engine-001.json") as caught:
        driven(tmp_path, "{backend: fake, dtype: float32, threads: 5}", monkeypatch, rounds=2)
    for path in run.paths.facts():
        path.unlink()
    with pytest.raises(ChainError, match=r"is missing, but run/round-000/02-measure.json was made with it"):
        driven(tmp_path, "{backend: fake, dtype: float32, threads: 5}", monkeypatch, rounds=2)
    assert "Restore the file from a copy" in caught.value.fix and "--name" in caught.value.fix
    assert Run.at(run.folder).samples(round=1).height == 36  # reading needs no numerics
    run.paths.numerics.write_bytes(kept)
    assert driven(tmp_path, "{backend: fake, dtype: float32, threads: 5}", monkeypatch, rounds=2).numerics["threads"] == 2


def test_an_older_run_is_fixed_to_the_numerics_of_its_creation(tmp_path):
    """One that was made before numerics had a record of their own: its run.json does not say that they are not fixed."""
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    run.paths.numerics.unlink()
    for path in run.paths.facts():
        path.unlink()
    content = json.loads(run.paths.info.read_text())
    del content["numerics_fixed"], content["self"]
    content["numerics"] = {**content["numerics"], "threads": 7, "packages": {"torch": "2.11.0", "polars": "2.0.0"}}
    run.paths.info.write_text(json.dumps(digest.with_self_digest(content), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert Run.at(run.folder, Machine(backend="fake", threads=3)).numerics["threads"] == 7
    again = go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run", Fake({}, facts=FACTS))
    assert levels(again)[2].startswith("data: polars 2.0.0 → ")
    assert "torch 2.11.0 → 2.13.0 (engine, trainer)" in levels(again)[2]


# ---- number formats ----


class Recording(Fake):
    """Notes which dither and which precision it is asked for."""

    def __init__(self, numerics: Any) -> None:
        super().__init__(numerics)
        self.dithers: list[int | None] = []
        self.precisions: list[str] = []

    def load(self, source, out, dither, asked=None):
        self.dithers.append(dither)
        return super().load(source, out, dither, asked)

    def train(self, start, reference, rows, spec, out, on_progress=None):
        self.precisions.append(spec.precision)
        return super().train(start, reference, rows, spec, out)


def recorded(folder: Path, dtype: str, *overrides: str) -> tuple[Run, Recording]:
    recipe = recipe_in(folder, RECIPE, "rounds=1", *overrides)
    run = Run.open(recipe, folder / "run", Machine(backend="fake", dtype=dtype))
    backend = Recording(run.numerics)
    walk(run, backend, run.begin())
    return run, backend


@pytest.mark.parametrize(
    ("dtype", "override", "dithered"),
    [
        ("bfloat16", "dither=auto", True),
        ("float16", "dither=auto", True),
        ("float32", "dither=auto", False),
        ("float32", "dither=true", True),
        ("bfloat16", "dither=false", False),
    ],
)
def test_the_first_weights_are_dithered_where_the_engine_casts_or_the_recipe_says_so(tmp_path, dtype, override, dithered):
    run, backend = recorded(tmp_path, dtype, override)
    assert [seed is not None for seed in backend.dithers] == [dithered]
    assert run.made(0)["load"].identity["dither"] is (override != "dither=false")


def killed_before_an_engine(folder: Path, dtype: str) -> Run:
    """A run of which the model is loaded, and nothing else is made."""

    def kill(call: str) -> None:
        if call == "generate":
            raise Killed

    run = Run.open(recipe_in(folder, RECIPE, "rounds=1"), folder / "run", Machine(backend="fake", dtype=dtype))
    with pytest.raises(Killed):
        walk(run, Fake(run.numerics, hook=kill), run.begin())
    assert list(run.made(0)) == ["load"] and not run.paths.numerics.exists()
    return run


def test_weights_that_were_loaded_undithered_for_float32_do_not_meet_an_engine_that_casts(tmp_path):
    killed_before_an_engine(tmp_path, "float32")
    run = Run.open(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run", Machine(backend="fake", dtype="bfloat16"))
    with pytest.raises(ChainError, match=r"01-load.json  brought the model in for an engine in float32, undithered") as caught:
        run.begin()
    assert "dtype: float32" in caught.value.fix and "--name X" in caught.value.fix
    again, backend = recorded(tmp_path, "float32")
    assert (again.rounds, backend.dithers, verify(again.folder).problems) == (1, [], [])
    Run.at(again.folder, Machine(backend="fake", dtype="bfloat16")).begin()  # the run is fixed to float32 by now


@pytest.mark.parametrize(("was", "now"), [("bfloat16", "float16"), ("bfloat16", "float32")])
def test_dithered_weights_go_on_in_every_format(tmp_path, was, now):
    killed_before_an_engine(tmp_path, was)
    run, backend = recorded(tmp_path, now)
    assert (run.rounds, backend.dithers, run.numerics["dtype"]) == (1, [], now)


def test_a_model_that_an_older_version_loaded_was_dithered_and_goes_on(tmp_path):
    path = killed_before_an_engine(tmp_path, "float32").paths.round(0).commits()[0]
    record = json.loads(path.read_text())
    del record["self"], record["notes"]["dither"]
    path.write_text(json.dumps(digest.with_self_digest(record), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    assert recorded(tmp_path, "bfloat16")[0].rounds == 1


def test_a_train_step_says_auto_and_its_key_is_that_of_every_machine(tmp_path):
    made = {dtype: recorded(tmp_path / dtype, dtype) for dtype in ("bfloat16", "float32")}
    for run, backend in made.values():
        assert backend.precisions == ["auto"] and run.made(1)["train"].identity["precision"] == "bf16"
        assert {"precision": "auto"}.items() <= run.info.recipe["steps"][3]["train"].items()
    assert [run.numerics["precision"] for run, _ in made.values()] == ["bf16", "fp32"]
    _, explicit = recorded(tmp_path / "explicit", "float32", "train.precision=bf16")
    assert explicit.precisions == ["bf16"]


def of_an_older_version(run: Run) -> None:
    """Take out of a run's records what was not there before a number format was chosen; the recipe spelled out its default."""
    for path in (run.paths.info, run.paths.numerics):
        content = json.loads(path.read_text())
        del content["self"], content["numerics"]["precision"], content["numerics"]["number_format"]
        if "recipe" in content:
            content["recipe"]["steps"][3]["train"]["precision"] = "bf16"
            content["machine"]["dtype"] = "bfloat16"
        path.write_text(json.dumps(digest.with_self_digest(content), indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def test_an_older_run_goes_on_as_before_and_trains_in_bf16(tmp_path):
    first, _ = recorded(tmp_path, "float32", "dither=true")
    of_an_older_version(first)
    run = Run.open(recipe_in(tmp_path, RECIPE, "rounds=2", "dither=true"), first.folder, Machine(backend="fake"))
    backend = Recording(run.numerics)
    walk(run, backend, run.begin())
    assert (run.rounds, backend.precisions, run.numerics["dtype"]) == (2, ["bf16"], "float32")
    assert verify(run.folder).problems == []
    assert (
        numerics.told({**run.numerics, "backend": "local"}, run.recipe) == "Computes in float32 (engine), bfloat16 (training)"
    )
    assert numerics.engine_casts(run.numerics)  # one whose model was not loaded yet dithers as it did


def test_reading_a_run_that_no_engine_came_up_for_decides_nothing_anew(tmp_path, monkeypatch):
    run = Run.open(recipe_in(tmp_path), tmp_path / "run", Machine(backend="fake", dtype="float16"))
    content = json.loads(run.paths.info.read_text())
    del content["self"], content["machine"]["chunk_timeout"], content["numerics"]["precision"]  # as of an older version
    run.paths.info.write_text(json.dumps(digest.with_self_digest(content), indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    monkeypatch.setattr(numerics, "asked", lambda recipe, machine: {"dtype": "asked anew"})
    assert Run.at(run.folder).numerics == content["numerics"]
    assert Run.at(run.folder, Machine(backend="fake")).numerics == {"dtype": "asked anew"}


def test_a_precision_that_is_named_later_is_an_amendment_of_the_rounds_to_come(tmp_path):
    recorded(tmp_path, "float32")
    changed = recipe_in(tmp_path, RECIPE, "rounds=2", "train.precision=bf16")
    with pytest.raises(ChainError, match=r"steps.3.train.precision: 'auto' was changed to 'bf16'"):
        Run.open(changed, tmp_path / "run", Machine(backend="fake"))
    run = Run.open(changed, tmp_path / "run", Machine(backend="fake"), amended=True)
    backend = Recording(run.numerics)
    walk(run, backend, run.begin())
    assert (run.rounds, backend.precisions, verify(run.folder).problems) == (2, ["bf16"], [])


def trained_and_killed(folder: Path, dtype: str, *words: str) -> None:
    """A run whose first round is trained, and not measured."""
    seen: list[str] = []

    def kill(call: str) -> None:
        seen.append(call)
        if call == "generate" and "train" in seen:
            raise Killed

    recipe = recipe_in(folder, RECIPE, "rounds=1", *words)
    run = Run.open(recipe, folder / "run", Machine(backend="fake", dtype=dtype))
    with pytest.raises(Killed):
        walk(run, Fake(run.numerics, hook=kill), run.begin())
    assert list(run.made(1))[-1] == "train"


@pytest.mark.parametrize(
    ("dtype", "was", "now", "said"),
    [
        ("float32", "auto", "bf16", r"was trained in fp32 \(precision: auto\), and would now be in bf16 \(precision: bf16\)"),
        ("float32", "bf16", "auto", r"was trained in bf16 \(precision: bf16\), and would now be in fp32 \(precision: auto\)"),
        ("bfloat16", "auto", "fp32", r"was trained in bf16 \(precision: auto\), and would now be in fp32"),
        ("float32", "auto", "fp32", r"was trained in fp32 \(precision: auto\).*says the same under another key"),
    ],
)
def test_a_precision_other_than_what_auto_came_to_is_refused_for_a_step_that_is_made(tmp_path, dtype, was, now, said):
    trained_and_killed(tmp_path, dtype, f"train.precision={was}")
    changed = recipe_in(tmp_path, RECIPE, "rounds=1", f"train.precision={now}")
    with pytest.raises(ChainError, match=said) as caught:
        Run.open(changed, tmp_path / "run", Machine(backend="fake"), amended=True)
    assert "round-001/04-train.json" in caught.value.where and not list((tmp_path / "run").rglob("amend*"))
    assert go(recipe_in(tmp_path, RECIPE, "rounds=1", f"train.precision={was}"), tmp_path / "run").rounds == 1


def test_naming_the_precision_that_auto_came_to_leaves_the_made_step_as_it_is(tmp_path):
    trained_and_killed(tmp_path, "bfloat16")
    calls: list[str] = []
    changed = recipe_in(tmp_path, RECIPE, "rounds=1", "train.precision=bf16")
    run = go(changed, tmp_path / "run", Fake({}, hook=calls.append), amend=True)
    assert (run.rounds, calls.count("train"), verify(run.folder).problems) == (1, 0, [])


FIXED_IN = {"backend": "ray", "dtype": "bfloat16", "precision": "bf16", "number_format": "this CPU has amx_bf16"}


@pytest.mark.parametrize(
    ("fixed", "overrides", "said"),
    [
        ({}, (), "(engine and training)"),
        ({"precision": "fp32"}, (), "(engine)"),
        ({"dtype": "float32"}, (), "(training)"),
        ({"dtype": "float32", "precision": "fp32"}, ("train.precision=bf16",), "(training)"),
        ({"dtype": "float32", "precision": "fp32"}, (), ""),
        ({"backend": "fake"}, (), ""),
    ],
)
def test_a_machine_that_only_emulates_the_format_of_a_run_is_told_so(tmp_path, fixed, overrides, said):
    recipe, kept = recipe_in(tmp_path, RECIPE, *overrides), {**FIXED_IN, **fixed}
    warned = numerics.emulation(kept, recipe, ["avx2", "avx512f"], gpu=False)
    assert bool(warned) == bool(said) and said in warned
    assert not said or ("a new run would choose float32" in warned and "--name X" in warned)
    assert numerics.emulation(kept, recipe, ["avx512_bf16"], gpu=False) == ""
    assert numerics.emulation(kept, recipe, [], gpu=True) == ""


def test_the_warning_comes_before_an_engine_does(tmp_path, monkeypatch):
    """The run was created in bfloat16 elsewhere; the engine here is a fake that stands for a real one."""
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(numerics, "emulation", lambda kept, recipe, flags, gpu: f"slow in {kept['dtype']}")
    driven(tmp_path, "{backend: fake, dtype: float32, threads: 1}", monkeypatch, events)
    told = [event.get("text") or event["event"] for event in events]
    assert told.index("slow in float32") < told.index("step")


def test_the_head_of_a_run_says_its_format_and_why(tmp_path):
    recipe = recipe_in(tmp_path)
    assert numerics.told(FIXED_IN, recipe) == "Computes in bfloat16: this CPU has amx_bf16"
    named = {**FIXED_IN, "precision": "fp32", "number_format": "the machine file says so"}
    assert numerics.told(named, recipe) == "Computes in bfloat16 (engine), float32 (training): the machine file says so"
    assert numerics.told({**FIXED_IN, "backend": "fake"}, recipe) == ""


def test_auto_asks_a_run_that_is_fixed_for_nothing(tmp_path, monkeypatch):
    driven(tmp_path, "{backend: fake, dtype: float32, threads: 2}", monkeypatch)
    events: list[dict[str, Any]] = []
    run = driven(tmp_path, "{backend: fake, dtype: auto, threads: 0}", monkeypatch, events, rounds=2)
    assert run.machine.dtype == "float32" and [event for event in events if event["event"] == "warning"] == []


def test_a_run_made_before_there_was_a_choice_of_generators_goes_on_with_vllm(tmp_path):
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    record = json.loads(run.paths.numerics.read_text())
    del record["self"], record["numerics"]["generator"]
    run.paths.numerics.write_text(json.dumps(digest.with_self_digest(record), indent=1, sort_keys=True) + "\n")
    asked = Run.at(run.folder, Machine(backend="fake", generator="transformers"))
    assert (asked.numerics["generator"], asked.machine.generator) == ("vllm", "vllm")
    assert asked.ignored == ["generator vllm (transformers asked)"]
    assert Run.at(run.folder, Machine(backend="fake", generator="auto", threads=0)).ignored == []
    assert levels(go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run")) == ["exact"] * 3


def test_a_run_whose_ranks_held_whole_models_goes_on_with_others_that_are_asked_for_and_says_so(tmp_path):
    run = go(recipe_in(tmp_path, RECIPE, "rounds=1"), tmp_path / "run")
    record = json.loads(run.paths.numerics.read_text())
    assert record["numerics"]["shard"] is False
    del record["self"], record["numerics"]["shard"]  # as it was before there was a choice
    run.paths.numerics.write_text(json.dumps(digest.with_self_digest(record), indent=1, sort_keys=True) + "\n")
    asked = Run.at(run.folder, Machine(backend="fake", trainers=2, shard=True))
    assert (asked.numerics["shard"], asked.machine.shard, asked.machine.trainers) == (True, True, 2)
    assert asked.ignored == [] and asked.other_ranks == ["trainers 1 → 2", "shard False → True"]
    assert levels(go(recipe_in(tmp_path, RECIPE, "rounds=2"), tmp_path / "run")) == ["exact"] * 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("generator: vlm", "generator: 'vlm' is none of 'auto', 'vllm' or 'transformers'. Did you mean 'vllm'?"),
        ("backend: foo", "backend: 'foo' is none of 'ray', 'local' or 'fake'"),
        ("dtype: bfloat", "dtype: 'bfloat' is none of 'auto', 'bfloat16', 'float16' or 'float32'. Did you mean 'bfloat16'?"),
        ("max_num_seqs: -1", "max_num_seqs: must be at least 0, not -1"),
        ("generators: 0", "generators: must be at least 1, not 0"),
        ("threads: -5", "threads: must be at least 0, not -5"),
        ("tensor_parallel: 0", "tensor_parallel: must be at least 1, not 0"),
        ("kv_cache_gb: 0", "kv_cache_gb: must be at least 0.001, not 0"),
        ("turns: foo", "turns: 'foo' is none of 'share' or 'split'"),
        ("turns: no", "turns: 'no' is none of"),
        ("max_model_len: 2048", "max_model_len: the recipe's `context` says how long"),
        ("trainer: {learning_rate: 1e-5}", "trainer.learning_rate: changes what is learned: write it into the recipe"),
        ("trainer: {gradient_checkpointing: 3}", "trainer.gradient_checkpointing must be bool, not 3"),
        ("trainer: {gradient_chekpointing: true}", "Did you mean 'gradient_checkpointing'?"),
        ("engine: {seed: 3}", "engine.seed: not for this mapping: the fields of a step"),
        ("threads: 1\nthreads: 2", "'threads' stands here twice"),
        ("threads:", "threads: None is not a whole number"),
    ],
)
def test_a_value_that_can_be_judged_before_is_refused_with_its_place(tmp_path, text, said):
    with pytest.raises(UsageError) as caught:
        machine(tmp_path, text)
    assert said in str(caught.value) and "machine.yaml:" in str(caught.value)


def test_numbers_of_a_machine_file_are_read_as_in_a_recipe(tmp_path):
    read = machine(tmp_path, "{chunk_timeout: 1e3, threads: 010, trainer: {ddp_timeout: 90}}")
    assert (read.chunk_timeout, read.threads, read.trainer) == (1000.0, 10, {"ddp_timeout": 90})


def test_a_run_that_leaves_cores_alone_says_so_unless_its_machine_file_asked_for_that():
    kept = {**FIXED_IN, "threads": 1, "trainers": 1}
    assert numerics.spare_cores(kept, {"threads": 0, "generators": 1}, 2, gpu=False).startswith("Takes 1 of 2 cores to its end")
    assert "`threads: 2`" in numerics.spare_cores(kept, {"threads": 0, "generators": 1}, 2, gpu=False)
    assert numerics.spare_cores(kept, {"threads": 1, "generators": 1}, 2, gpu=False) == ""
    assert numerics.spare_cores(kept, {"threads": 0, "generators": 2}, 2, gpu=False) == ""
    assert numerics.spare_cores(kept, {"threads": 0, "generators": 1}, 2, gpu=True) == ""
    assert numerics.spare_cores({**kept, "threads": 2}, {"threads": 0, "generators": 1}, 2, gpu=False) == ""
