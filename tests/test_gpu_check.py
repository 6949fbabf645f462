"""`make gpu-check` without a card: the runner with checks that pass, fail, hang and die, and the checks themselves on a tiny model."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from tiny import tiny_model

from selfkd.core.accelerator import Accelerator, Card, Inventory

ROOT = Path(__file__).parent.parent
FAKES = """
import os, subprocess, sys, time
from pathlib import Path

sys.path.insert(0, BENCHMARKS)
from gpu_check import Skip, must, serve

def passes(given):
    assert given.folder.is_dir() and given.shared.is_dir() and given.model == "named"
    (given.shared / "made").touch()
    given.note(card=os.environ.get("CUDA_VISIBLE_DEVICES"), rate=1234.5678)

def goes_on(given):
    must((given.shared / "made").exists(), "what the first check made is gone")

def is_wrong(given):
    given.note(digest="ab")
    must(False, "two digests differ")

def breaks(given):
    raise KeyError("steps")

def has_nothing(given):
    raise Skip("no second card")

def hangs(given):
    child = subprocess.Popen(["sleep", "600"], process_group=0)
    given.note(child=child.pid)
    time.sleep(600)

def is_deaf(given):
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    given.note(begun=True)
    time.sleep(600)

def dies(given):
    given.note(kills=3)
    print("CUDA error: an illegal memory access")
    sys.stdout.flush()
    os.kill(os.getpid(), 9)

serve({name: found for name, found in globals().items() if callable(found)}, sys.argv[1:])
"""


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("gpu_check")
    monkeypatch.setattr(found.accelerator, "free_memory", lambda: None)
    return found


@pytest.fixture
def fakes(tmp_path: Path) -> Path:
    path = tmp_path / "fakes.py"
    path.write_text(FAKES.replace("BENCHMARKS", repr(str(ROOT / "benchmarks"))))
    return path


@pytest.fixture
def card(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine with two cards, the second of which is roomier."""
    cards = (Card("0", "H100", (9, 0), 80 << 30, 40 << 30), Card("1", "H100", (9, 0), 80 << 30, 79 << 30))
    monkeypatch.setattr(gpu_check.accelerator, "accelerator", lambda: Accelerator("cuda", cards))
    monkeypatch.setattr(gpu_check.accelerator, "inventory", lambda: Inventory(cards, "580.65", (13, 0)))
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "PYTHONPATH"):
        monkeypatch.setenv(name, "")
    return gpu_check


def checks(gpu_check: Any, *names: str, seconds: float = 20.0) -> list[Any]:
    return [gpu_check.Check(name, f"{name} is so", seconds) for name in names]


def ended(gpu_check: Any, fakes: Path, name: str, seconds: float = 20.0) -> Any:
    return gpu_check.run_one(*checks(gpu_check, name), fakes, fakes.parent / "scratch", seconds, "named")


def test_one_file_holds_what_every_check_came_to_and_one_that_fails_ends_with_1(card, fakes, tmp_path, capsys):
    asked = checks(card, "passes", "goes_on", "has_nothing", "is_wrong", "breaks")
    words = ["--out", str(tmp_path / "runs/found.json"), "--model", "named"]
    assert card.main(words, asked, fakes) == 1
    found = json.loads((tmp_path / "runs/found.json").read_text())
    assert [(one["status"], one["why"]) for one in found["checks"]] == [
        ("passed", ""),
        ("passed", ""),
        ("skipped", "no second card"),
        ("failed", "two digests differ"),
        ("failed", "KeyError: 'steps'"),
    ]
    assert found["checks"][0]["figures"] == {"card": "1", "rate": 1234.5678}
    assert found["checks"][3]["figures"] == {"digest": "ab"} and found["checks"][4]["log"][-1] == "KeyError: 'steps'"
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 1)
    assert found["machine"]["driver"] == "580.65" and found["machine"]["cards"][0].startswith("H100 (sm_90")
    assert found["checks"][0]["computed_with"]["python"] == found["machine"]["python"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["found.json"]
    out = capsys.readouterr().out
    assert "… passes: passes is so" in out and f"passed  {'passes':24}passes is so" in out  # --only takes the name


def test_where_all_pass_or_are_skipped_it_ends_with_0(card, fakes, tmp_path):
    words = ["--out", str(tmp_path / "found.json"), "--model", "named", "--only", "passes", "has_nothing"]
    assert card.main(words, checks(card, "passes", "has_nothing", "breaks"), fakes) == 0
    assert len(json.loads((tmp_path / "found.json").read_text())["checks"]) == 2


def test_a_check_that_hangs_fails_at_its_deadline_with_its_figures_and_leaves_no_process(gpu_check, fakes, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    began = time.monotonic()
    found = ended(gpu_check, fakes, "hangs", 3.0)
    assert (found.status, found.why) == ("failed", "did not end within 2 s") and time.monotonic() - began < 15
    stat = Path(f"/proc/{found.figures['child']}/stat")
    assert not stat.exists() or ") Z " in stat.read_text()


def test_a_check_that_does_not_hear_is_killed(gpu_check, fakes, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    found = ended(gpu_check, fakes, "is_deaf", 3.0)
    assert (found.status, found.why, found.figures) == ("failed", "did not end within 3 s", {"begun": True})


def test_a_check_that_dies_fails_with_its_last_words_and_the_next_one_runs(gpu_check, fakes, tmp_path):
    asked = checks(gpu_check, "dies", "has_nothing")
    dead, after = gpu_check.run_all(asked, fakes, tmp_path / "scratch", 60.0, "named", lambda _: None)
    assert (dead.status, dead.why, dead.figures) == ("failed", "ended with status -9 and no verdict", {"kills": 3})
    assert list(dead.log) == ["CUDA error: an illegal memory access"] and after.status == "skipped"


def test_what_no_time_is_left_for_is_skipped(gpu_check, fakes, tmp_path):
    [found] = gpu_check.run_all(checks(gpu_check, "passes"), fakes, tmp_path, 5.0, "", lambda _: None)
    assert (found.status, found.why) == ("skipped", "no time was left of 5 s")


def test_without_a_card_every_check_is_skipped_with_the_reason_and_it_ends_with_0(tmp_path):
    out = tmp_path / "found.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu_check.py"), "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["skipped"] == len(found["checks"]) == 10
    assert all(
        one["why"] == f"no card: {found['machine']['not_used']}" and one["why"] != "no card: " for one in found["checks"]
    )
    assert done.stdout.count("skipped ") == 10 and str(out) in done.stdout
    assert done.stdout.count(found["machine"]["not_used"]) == 1  # said once, above the names that --only takes
    assert [row.split()[1] for row in done.stdout.splitlines() if row.startswith("skipped ")] == [
        one["name"] for one in found["checks"]
    ]


def test_make_installs_the_lock_that_was_named_and_runs_the_program(tmp_path: Path):
    (tmp_path / "locks").mkdir()
    for name in ("Makefile", "pyproject.toml", "locks/cpu.txt", "locks/gpu.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    # the make that runs this suite tells its children how to print and what they are given
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-n", "gpu-check", "LOCK=locks/gpu.txt"]
    told = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=True).stdout
    assert "locks/install.py locks/gpu.txt" in told and "locks/cpu.txt" not in told
    assert told.splitlines()[-1].endswith("benchmarks/gpu_check.py")


# ---- the checks themselves ----


@pytest.fixture
def card_checks(gpu_check: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The checks on a CPU, with a tiny model and the engine of transformers."""
    pytest.importorskip("torch")
    pytest.importorskip("trl")
    found = importlib.import_module("card_checks")
    numerics = found.numerics
    small = {"generator": "transformers", "threads": 1, "dtype": "float32", "max_num_seqs": 16}
    monkeypatch.setattr(found, "numerics", lambda exact, **more: numerics(exact, **small, **more))
    monkeypatch.setattr(found, "small_source", lambda given: str(tiny_model(given.folder / "tiny")))
    return found


@pytest.fixture
def given(gpu_check: Any, tmp_path: Path) -> Any:
    (tmp_path / "folder").mkdir()
    return gpu_check.Given(tmp_path / "folder", tmp_path / "shared", 60.0, "")


def test_every_check_has_a_body_and_every_body_is_a_check(gpu_check, card_checks):
    assert [one.name for one in gpu_check.CHECKS] == [body.__name__ for body in card_checks.BODIES]


@pytest.mark.real
def test_models_are_made_once_and_told(card_checks, given):
    card_checks.models_are_made(given)
    assert given.figures["small_parameters"] == given.figures["large_parameters"] > 0
    assert given.figures["small_model"] == "tiny" and given.figures["large_model"] == "small"
    again = card_checks.root(given, "small")
    assert again == card_checks.root(given, "small")


@pytest.mark.real
def test_a_model_with_random_weights_has_the_shape_that_was_asked_and_loads_as_a_root(card_checks, given):
    shape = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    made = card_checks.random_model(given.folder / "random", card_checks.root(given, "small"), shape)
    config = json.loads((made / "config.json").read_text())
    assert {name: config[name] for name in shape} == shape and config["tie_word_embeddings"] is True
    assert card_checks.load_model({"path": str(made)}, given.folder / "root", 7)["dithered"] > 0.9


@pytest.mark.real
def test_an_update_that_repeats_passes_and_one_that_does_not_fails(card_checks, gpu_check, given, monkeypatch):
    monkeypatch.setattr(card_checks, "REPEATED", 1)
    card_checks.an_update_repeats(given)
    assert given.figures["sft_digest"] != given.figures["dpo_digest"] and given.figures["held_to_what_repeats"]
    numbers = iter(range(9))
    monkeypatch.setattr(card_checks.digest, "weights", lambda folder: str(next(numbers)))
    monkeypatch.setattr(card_checks, "root", lambda *_: card_checks.Model("policy", str(given.shared / "small"), "0"))
    monkeypatch.setattr(card_checks.training, "train", lambda *_, **__: None)
    with pytest.raises(gpu_check.Failed, match="two sft updates from the same rows differ"):
        card_checks.an_update_repeats(given)


@pytest.mark.real
@pytest.mark.parametrize("saved", [True, False])
def test_a_state_that_leaves_the_card_is_compared_by_weights_and_by_memory(card_checks, gpu_check, given, monkeypatch, saved):
    with pytest.raises(gpu_check.Skip, match="no card that an optimiser's state could leave"):
        card_checks.an_offloaded_optimiser(given)
    monkeypatch.setattr(card_checks, "REPEATED", 2)
    monkeypatch.setattr("selfkd.backend.trainer.refused.offloading", lambda *_: None)
    bytes_of = iter([0, 0, 9 << 30, 0, (1 if saved else 9) << 30])
    monkeypatch.setattr(card_checks, "most_allocated", lambda anew=False: next(bytes_of))
    if not saved:
        with pytest.raises(gpu_check.Failed, match=r"the card holds 0\.00 GiB less"):
            card_checks.an_offloaded_optimiser(given)
        return
    card_checks.an_offloaded_optimiser(given)
    assert given.figures["digest_beside"] == given.figures["digest_elsewhere"]
    assert (given.figures["gib_beside"], given.figures["gib_elsewhere"]) == (9.0, 1.0)


@pytest.mark.real
def test_a_swap_after_a_real_update_is_proved_here_too(card_checks, given):
    card_checks.swap_is_proved(given)
    assert given.figures["proved"] is True and given.figures["survived"] > 0.9


@pytest.mark.real
def test_mates_and_sleep_change_no_answer_here_too(card_checks, gpu_check, given, monkeypatch):
    monkeypatch.setattr(card_checks, "MATES", 8)
    card_checks.mates_change_nothing(given)
    assert (given.figures["requests"], given.figures["mates"], given.figures["moved"]) == (8, 8, 0)
    with pytest.raises(gpu_check.Skip, match="no card to ask for its memory; the answers are equal"):
        card_checks.sleep_gives_memory_back(given)


@pytest.mark.real
@pytest.mark.parametrize(("asleep", "passes"), [(70, True), (30, False)])
def test_an_engine_that_keeps_its_memory_while_it_sleeps_fails(card_checks, gpu_check, given, monkeypatch, asleep, passes):
    frees = iter([80 << 30, 10 << 30, asleep << 30])
    monkeypatch.setattr(card_checks.accelerator, "free_memory", lambda: next(frees))
    if not passes:
        with pytest.raises(gpu_check.Failed, match="most of the engine's memory is not free"):
            card_checks.sleep_gives_memory_back(given)
        return
    card_checks.sleep_gives_memory_back(given)
    assert (given.figures["gib_taken"], given.figures["gib_kept_asleep"]) == (70.0, 10.0)


@pytest.mark.real
def test_an_update_is_compared_with_trls_own_on_the_same_rows(card_checks, given, monkeypatch):
    monkeypatch.setattr(card_checks, "STEPS", 3)
    monkeypatch.setattr(card_checks, "BATCH", 8)
    monkeypatch.setattr(card_checks, "LEAST_OF_TRL", 0.0)
    card_checks.as_fast_as_trl(given)
    assert given.figures["ratio"] == given.figures["tokens_per_second"] / given.figures["tokens_per_second_trl"] > 0
    assert given.figures["trl"] == "packing {}"


def test_a_trl_that_does_not_train_is_said_to(card_checks, gpu_check, tmp_path):
    with pytest.raises(gpu_check.Failed, match=r"TRL alone does not train here: .*no-such-rows"):
        card_checks.plain_rate(tmp_path, tmp_path / "no-such-rows", tmp_path / "out", "fp32", 1024, None)


def test_vllm_is_compared_only_where_it_generates(card_checks, gpu_check, given):
    with pytest.raises(gpu_check.Skip, match="vLLM is not what generates here"):
        card_checks.as_fast_as_vllm(given)


def test_requests_have_seeds_of_their_own_and_the_same_ones_again(card_checks, given):
    made = card_checks.requests_for(card_checks.sums(given, 3), answers=2)
    assert made["seed"].n_unique() == made["id"].n_unique() == len(made) == 6
    assert made.equals(card_checks.requests_for(card_checks.sums(given, 3), answers=2))
    assert made["number"].to_list() == [0, 1] * 3 and isinstance(made, pl.DataFrame)


def test_the_memory_of_a_run_is_told_by_what_it_does(card_checks, monkeypatch, tmp_path):
    log = tmp_path / "runs/card/logs/attempt-001/events.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text('{"event": "step", "verb": "sample"}\n{"event": "step", "verb": "train"}\n{"event": "st')
    one = Accelerator("cuda", (Card("0", "H100", (9, 0), 80 << 30, 0),))
    monkeypatch.setattr(card_checks.accelerator, "free_memory", lambda: 20 << 30)
    monkeypatch.setattr(card_checks.accelerator, "accelerator", lambda: one)
    script = "import time; print('first'); print('last'); time.sleep(0.2)"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    least = card_checks.watched(process, tmp_path / "runs/card")
    assert least == {"train": 20 << 30} and card_checks.last_words(tmp_path) == "last"
    assert card_checks.memory(79 << 30, least) == {"gib_used_before": 1.0, "gib_used_train": 60.0}
    assert card_checks.memory(None, {}) == {}


@pytest.fixture
def chains(card_checks, gpu_check, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Chains that end at once on the digests that they are given; when there is none left, the time is over."""

    def give(*digests: str) -> None:
        left = iter(digests)

        def finish(home: Path, name: str) -> Any:
            try:
                ends[name] = next(left)
            except StopIteration:
                raise gpu_check.TimeUp from None
            return at(name)

        ends: dict[str, str] = {}
        at = lambda name: SimpleNamespace(sealed=lambda: [SimpleNamespace(digest=ends[name])])  # noqa: E731
        monkeypatch.setattr(card_checks.real_chain, "make_home", lambda folder, **_: folder)
        monkeypatch.setattr(card_checks.real_chain, "finish", finish)
        monkeypatch.setattr(card_checks.real_chain, "kill_each", lambda home, name, pause: iter(["engine", finish(home, name)]))
        monkeypatch.setattr(card_checks.Run, "at", lambda folder: at(folder.name))
        monkeypatch.setattr(card_checks.signal, "setitimer", lambda *_: None)

    return give


def test_kills_are_counted_until_the_time_is_over(card_checks, given, chains):
    chains("same", "same", "same")
    card_checks.kills_change_nothing(given)
    assert (given.figures["kills"], given.figures["chains_compared"], given.figures["digest"]) == (4, 2, "same")


def test_a_killed_chain_that_ends_elsewhere_fails(card_checks, gpu_check, given, chains):
    chains("same", "same", "other")
    with pytest.raises(gpu_check.Failed, match="killed-1 ended on another digest"):
        card_checks.kills_change_nothing(given)


@pytest.mark.parametrize("digests", [(), ("same",)])
def test_where_no_killed_chain_ended_in_time_nothing_is_claimed(card_checks, gpu_check, given, chains, digests):
    chains(*digests)
    with pytest.raises(gpu_check.Skip, match="no killed chain ended in the 60 s"):
        card_checks.kills_change_nothing(given)


@pytest.mark.nightly
@pytest.mark.real
@pytest.mark.parametrize("name", ["three_rounds", "as_fast_as_vllm", "kills_change_nothing"])
def test_the_checks_that_start_vllm_hold_on_a_cpu_too(gpu_check, given, tmp_path, name):
    """In processes of their own, as on a card; the speed is told, and not judged."""
    program = tmp_path / "on_a_cpu.py"
    program.write_text(ON_A_CPU.format(benchmarks=str(ROOT / "benchmarks"), tests=str(ROOT / "tests")))
    found = gpu_check.run_one(*checks(gpu_check, name), program, tmp_path / "scratch", 420.0, "")
    assert (found.status, found.why) == ("passed", ""), found
    assert found.figures.get("kills", 4) >= 4


ON_A_CPU = """
import sys

sys.path[:0] = [{benchmarks!r}, {tests!r}]
import card_checks
from tiny import tiny_model

made, numerics = card_checks.real_chain.make_home, card_checks.numerics
small = dict(threads=1, dtype="float32", max_num_seqs=16, kv_cache_gb=0.05)
card_checks.numerics = lambda exact, **more: numerics(exact, **small, **more)
card_checks.real_chain.make_home = lambda folder, **more: made(folder, **{{**more, "machine": "threads: 1\\n"}})
card_checks.find_spec = lambda name: None
card_checks.QUESTIONS, card_checks.ANSWERS, card_checks.LONGEST, card_checks.LEAST_OF_VLLM = 8, 2, 8, 0.0
card_checks.serve({{body.__name__: body for body in card_checks.BODIES}}, sys.argv[1:])
"""
