"""Every command, as it is typed: exit codes, messages, and that stopping loses nothing."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chains import RECIPE, write_prompts

from selfkd.cli.main import COMMANDS, main
from selfkd.core.lease import Lease
from selfkd.recipe.lint import Report

SLOW = '''
import time

def slow(completion: str, answer: str) -> float:
    """Long enough to be interrupted."""
    time.sleep(0.25)
    return float(completion.endswith(answer))
'''
WITH_SLOW = RECIPE.replace("- score: reward/number.py:last_number", "- score: slow.py:slow").replace(
    "last_number = 1", "slow = 1"
)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A working directory with a recipe, its prompts and a machine file, and one finished run made by `selfkd run`."""
    folder = tmp_path_factory.mktemp("home")
    write_prompts(folder)
    (folder / "sums.yaml").write_text(RECIPE)
    (folder / "slow.yaml").write_text(WITH_SLOW)
    (folder / "slow.py").write_text(SLOW)
    (folder / "fake.yaml").write_text("backend: fake\n")
    here = Path.cwd()
    os.chdir(folder)
    assert main(["run", "sums.yaml", "--on", "fake.yaml"]) == 0
    os.chdir(here)
    return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "selfkd", *words]


# ---- run ----


def test_run_says_at_its_head_in_which_number_format_it_computes(said, monkeypatch):
    monkeypatch.setattr("selfkd.chain.numerics.told", lambda numerics, recipe: f"Computes in {numerics['dtype']}: so it is")
    text = said("run", "sums.yaml", "--on", "fake.yaml", "--name", "formats", "rounds=1")
    assert text.startswith("formats · fake · 1 round · fake\nComputes in bfloat16: so it is\n")


def test_run_prints_a_line_per_round_the_table_and_commands_that_work_as_printed(said):
    text = said("run", "sums.yaml", "--on", "fake.yaml", "--name", "printed", "rounds=1")
    assert text.startswith("printed · fake · 1 round · fake\n")
    assert re.search(r"^base {5}\d+\.\d % \[\d+\.\d, \d+\.\d\]", text, re.M)
    assert re.search(
        r"^round 1  \d+\.\d % \[\d+\.\d, \d+\.\d\]   [+-]\d+\.\d \[-?\d+\.\d, \d+\.\d\]   kept \d+ of 36", text, re.M
    )
    commands = [line.split("#")[0].strip() for line in text.split("Next:\n")[1].splitlines()]
    assert len(commands) == 3
    for line in commands:
        words = shlex.split(line)
        at = next(place for place, word in enumerate(words) if word in COMMANDS)
        assert words[at] in ("show", "verify", "run")
        assert main(words[at:]) == 0, line
    assert "rounds=4" in commands[2] and len(list(Path("runs/printed").glob("round-*"))) == 5


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("number", "'number' gives a number, where true or false is wanted"),
        ("tokens + 1", "'tokens + 1' gives a number, where true or false is wanted"),
        ("text > 3", "where  'text > 3' cannot be computed: cannot compare string with numeric type"),
        ("((", "'((' is not a condition that SQL can read"),
        ("nmber = 1", "no column 'nmber' in 'nmber = 1'. Did you mean 'number'?"),
    ],
)
def test_a_where_that_is_not_true_or_false_is_refused_in_one_sentence(said, where, message):
    assert message in said("show", "runs/sums", "--where", where, code=2)


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("tokens > 1 and", ": something is missing at its end"),
        ("(tokens > 1", ": a ')' is missing at its end"),
        ("tokens in (1,", ": a ')' is missing at its end"),
        ("text = 'a", ": a quote (') is missing at its end"),
        ("tokens > 1)", ": found unexpected token ')'"),
        ("tokens === 1", ""),
    ],
)
def test_what_sql_cannot_read_is_said_in_our_words_with_the_place_where_it_is_known(said, where, why):
    text = said("show", "runs/sums", "--where", where, code=2)
    assert f"'{where}' is not a condition that SQL can read{why}\n" in text and "Expr" not in text


def test_a_where_that_is_null_everywhere_finds_nothing(said):
    assert "0 of 36, showing 0" in said("show", "runs/sums", "--where", "NULL")


def test_the_same_run_again_prints_the_table_and_starts_nothing(said):
    attempts = len(list(Path("runs/sums/logs").iterdir()))
    assert "round 2" in said("run", "sums.yaml", "--on", "fake.yaml")
    assert len(list(Path("runs/sums/logs").iterdir())) == attempts


def test_options_may_stand_between_the_overrides(said):
    text = said("run", "sums.yaml", "sample.n=1", "--name", "between", "--on", "fake.yaml", "rounds=1")
    assert re.search(r"kept \d+ of 12\b", text)


def test_the_head_of_a_run_says_that_its_generator_is_slow(said, tmp_path):
    (tmp_path / "machine.yaml").write_text("backend: fake\ngenerator: transformers\n")
    lines = said("run", "sums.yaml", "--on", str(tmp_path / "machine.yaml"), "--name", "slowly", "rounds=1").splitlines()
    assert lines[1].startswith("generator: transformers (slow: vLLM, where it can be installed, is")


def test_plan_estimates_and_starts_nothing(said):
    text = said("run", "sums.yaml", "--name", "planned", "--plan")
    assert "36 answers" in text
    assert not Path("runs/planned").exists()


def test_a_changed_recipe_is_refused_with_the_difference_and_the_ways_out(said):
    text = said("run", "sums.yaml", "--on", "fake.yaml", "sample.n=5", code=1)
    assert "sample.n" in text and "3" in text and "5" in text
    assert "--amend" in text and "--name" in text


def test_a_second_driver_is_refused_and_starts_no_attempt(said):
    assert main(["run", "slow.yaml", "--on", "fake.yaml", "--name", "held", "rounds=1"]) == 0
    with Lease(Path("runs/held/leases"), Path("runs/held/tmp")):
        text = said("run", "slow.yaml", "--on", "fake.yaml", "--name", "held", "rounds=2", code=1)
    assert f"another driver holds this run (process {os.getpid()}" in text
    assert [path.name for path in Path("runs/held/logs").iterdir()] == ["attempt-001"]


def test_a_failing_reward_stops_the_run_names_the_log_and_goes_on_after_the_fix(said):
    Path("bad.py").write_text("def slow(completion):\n    raise ValueError('no number in it')\n")
    Path("bad.yaml").write_text(WITH_SLOW.replace("slow.py:slow", "bad.py:slow"))
    text = said("run", "bad.yaml", "--on", "fake.yaml", "--name", "bad", "rounds=1", code=1)
    assert "ValueError: no number in it" in text and "Log: runs/bad/logs/attempt-001" in text
    assert "RewardError" in Path("runs/bad/logs/attempt-001/driver.log").read_text()
    assert "failed (" in said("status", "runs/bad")
    Path("bad.py").write_text("def slow(completion, answer):\n    return float(completion.endswith(answer))\n")
    assert "--amend" in said("run", "bad.yaml", "--on", "fake.yaml", "--name", "bad", "rounds=1", code=1)
    said("run", "bad.yaml", "--on", "fake.yaml", "--name", "bad", "rounds=1", "--amend")
    asked = [e for e in _events("runs/bad", 2) if e["event"] == "step"]
    assert asked[0]["step"] == "score"  # what was generated before the failure is used


def _events(run: str, attempt: int) -> list[dict]:
    return [json.loads(line) for line in Path(run, f"logs/attempt-{attempt:03d}/events.jsonl").read_text().splitlines()]


def test_resume_goes_on_without_the_recipe_file(said, tmp_path):
    assert main(["run", "sums.yaml", "--on", "fake.yaml", "--runs", str(tmp_path), "--name", "r", "rounds=1"]) == 0
    (tmp_path / "r/round-001/sealed.json").unlink()
    (tmp_path / "r/round-001/05-measure.json").unlink()
    text = said("resume", str(tmp_path / "r"))
    assert "round 1 " in text and (tmp_path / "r/round-001/sealed.json").is_file()
    assert "is as it was committed" in said("verify", str(tmp_path / "r"))


def test_resume_without_a_run_says_so(said):
    assert "run.json is missing" in said("resume", "runs/nothing", code=2)


# ---- machine files ----


def test_every_wrong_field_of_a_machine_file_is_named(said):
    Path("wrong.yaml").write_text("bakend: fake\nthreads: two\ngenerators: true\n")
    text = said("run", "sums.yaml", "--on", "wrong.yaml", code=2)
    assert "no field 'bakend'. Did you mean 'backend'?" in text
    assert "threads: 'two' is not a whole number" in text and "generators: True is not a whole number" in text


def test_a_missing_machine_file_is_a_usage_error(said):
    assert "no such file" in said("run", "sums.yaml", "--on", "none.yaml", code=2)


# ---- stopping ----


def started(*words: str) -> subprocess.Popen:
    """A run in a process of its own, waited for until its slow step has begun."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    name = words[words.index("--name") + 1]
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = sorted(Path("runs", name, "logs").glob("*/events.jsonl"))
        if logs and '"step": "score", "verb"' in logs[-1].read_text():
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_with_75_says_how_to_go_on_and_the_same_command_ends_on_the_same_digest(number):
    name = f"stopped-{number.name}"
    words = ["run", "slow.yaml", "--on", "fake.yaml", "--name", name, "rounds=1"]
    process = started(*words)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 75
    assert re.search(rf"Stopped\. Repeat the command to go on: .*\brun slow\.yaml --on fake\.yaml --name {name}", err)
    assert "Traceback" not in out + err
    assert _events(f"runs/{name}", 1)[-1]["event"] == "stopped"
    assert main(words) == 0
    assert main([*words[:5], "undisturbed", "rounds=1"]) == 0
    assert _end(f"runs/{name}") == _end("runs/undisturbed")


def _end(run: str) -> str:
    return json.loads(Path(run, "round-001/sealed.json").read_text())["digest"]


def test_a_second_driver_in_another_process_is_refused():
    words = ["run", "slow.yaml", "--on", "fake.yaml", "--name", "twice", "rounds=1"]
    first = started(*words)
    second = subprocess.run(command(*words), capture_output=True, text=True)
    first.terminate()
    first.communicate(timeout=30)
    assert second.returncode == 1
    assert f"another driver holds this run (process {first.pid} on" in second.stderr


# ---- readers ----


def test_status_lists_the_runs_of_a_folder(said):
    text = said("status")
    assert re.search(r"runs/sums +fake +done +2 of 2", text)


def test_status_of_one_run_is_the_table_that_run_printed(said):
    table = said("status", "runs/sums").splitlines()
    again = said("run", "sums.yaml", "--on", "fake.yaml").splitlines()
    assert table[0] == "sums · fake · 2 rounds · done"
    assert table[1:5] == again[1:5]


def test_status_of_no_run_says_where_to_start(said, tmp_path):
    assert "Start one" in said("status", "--runs", str(tmp_path), code=2)


def test_status_follow_shows_a_finished_run_and_returns(said):
    assert "round 2" in said("status", "runs/sums", "--follow")


def test_status_follow_shows_progress_until_the_driver_ends():
    process = started("run", "slow.yaml", "--on", "fake.yaml", "--name", "followed", "rounds=1")
    seen = subprocess.run(command("status", "runs/followed", "--follow"), capture_output=True, text=True, timeout=120)
    process.communicate(timeout=60)
    assert seen.returncode == 0
    assert "score" in seen.stdout and "followed · fake · 1 round · done" in seen.stdout


def test_show_prints_prompt_answer_completion_scores_and_why_a_sample_was_dropped(said):
    text = said("show", "runs/sums", "--round", "1", "--where", "last_number = 0", "-n", "2")
    assert "round 1 · samples where last_number = 0:" in text and "showing 2" in text
    assert "prompt: What is" in text and "answer: " in text and "is easy." in text
    assert "last_number 0" in text and "dropped by select: not last_number = 1" in text


def test_show_can_filter_by_text_and_by_fate(said):
    kept = said("show", "runs/sums", "--where", "kept AND text LIKE '%easy%'", "-n", "1")
    assert re.search(r"showing 1\n", kept) and "   kept   " in kept


def test_show_a_step_shows_held_out_answers(said):
    text = said("show", "runs/sums", "--step", "measure", "-n", "1")
    assert "round 2 · measure · samples: 6 of 6" in text and "held out" in text


def test_show_training_rows_shows_what_was_learned_and_from_which_sample(said):
    text = said("show", "runs/sums", "--training-rows", "--round", "1", "-n", "1")
    sample = re.search(r"from ([0-9a-f]{16})", text)
    assert "completion: " in text and sample
    assert sample[1] in said("show", "runs/sums", "--round", "1", "--where", f"id = '{sample[1]}'")


def test_show_as_prompted_needs_a_model_with_a_tokenizer_and_ids_need_it(said):
    assert "no checkpoint of this run has a tokenizer" in said("show", "runs/sums", "--as-prompted", code=2)
    assert "--ids  is for --as-prompted" in said("show", "runs/sums", "--ids", code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "corect = 1"], "no column 'corect'"),
        (["--where", "last_numbr = 1"], "Did you mean 'last_number'?"),
        (["--where", "last_number ="], "is not a condition that SQL can read: something is missing at its end"),
        (["--round", "9"], "Rounds: 0, 1, 2"),
        (["--step", "smaple"], "Steps with samples: measure, sample"),
    ],
)
def test_show_says_what_there_is_where_something_is_asked_that_is_not(said, words, message):
    assert message in said("show", "runs/sums", *words, code=2)


def test_verify_accepts_the_run_and_refuses_it_after_one_flipped_bit(said):
    assert "runs/sums is as it was committed: 3 rounds" in said("verify", "runs/sums")
    path = next(Path("runs/sums").glob("round-001/02-score/*.parquet"))
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    text = said("verify", "runs/sums", code=1)
    assert f"damaged  round-001/02-score/{path.name} was changed" in text and "NOT as it was committed" in text
    assert "is as it was committed" in said("verify", "runs/sums", "--quick")
    path.write_bytes(content)


def test_verify_of_no_run_is_a_usage_error(said):
    assert "run.json is missing" in said("verify", "runs/nothing", code=2)


@pytest.mark.parametrize("words", [["status"], ["show", "-n", "1"], ["verify"], ["resume"]], ids=" ".join)
def test_a_run_is_found_by_its_bare_name_under_runs_and_both_places_are_named_where_it_is_not(said, words):
    command, *more = words
    by_name, by_folder = (re.sub(r"[\d.]+ m?s\b", "", said(command, run, *more)) for run in ("sums", "runs/sums"))
    assert by_name == by_folder  # but for the seconds that `verify` took
    assert "nothing and runs/nothing  no run here" in said(command, "nothing", *more, code=2)


def test_a_damaged_run_here_is_meant_before_a_run_of_its_name_under_runs(said):
    Path("sums/round-001").mkdir(parents=True)
    try:
        assert "sums  no run here (run.json is missing)" in said("verify", "sums", code=2)
    finally:
        shutil.rmtree("sums")


@pytest.mark.parametrize("command", ["status", "verify", "show", "resume"])
@pytest.mark.parametrize("name", ["both", "runs/both"])
def test_the_folder_of_a_sweep_says_that_it_holds_runs(said, name, command):
    Path("runs/both/one").mkdir(parents=True, exist_ok=True)
    Path("runs/both/one/run.json").write_text("{}")
    try:
        text = said(command, name, code=2)
        assert text.startswith("runs/both  holds runs, and is none\n") and "selfkd compare runs/both" in text
    finally:
        shutil.rmtree("runs/both")


def test_the_folder_of_a_recipe_hides_no_run_of_its_name(said):
    Path("sums").mkdir()
    Path("sums/sums.yaml").write_text("name: sums\n")
    try:
        assert said("status", "sums") == said("status", "runs/sums")
        assert "is as it was committed" in said("verify", "sums")
    finally:
        shutil.rmtree("sums")


def test_a_reader_that_goes_away_is_no_failure():
    shown = subprocess.Popen(command("show", "runs/sums", "-n", "36"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert shown.stdout is not None and shown.stderr is not None
    shown.stdout.close()
    assert shown.stderr.read() == b""
    assert shown.wait(30) == 0
    shown.stderr.close()


def test_readers_work_while_torch_ray_and_vllm_are_not_there(tmp_path):
    """The base install: importing any of them fails."""
    for name in ("torch", "ray", "vllm", "trl", "transformers", "datasets", "accelerate"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not in the base install')\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    for words in (
        ["lint", "sums.yaml"],
        ["status"],
        ["status", "runs/sums"],
        ["show", "runs/sums"],
        ["verify", "runs/sums"],
        ["recipes"],
    ):
        found = subprocess.run(command(*words), capture_output=True, text=True, env=env)
        assert found.returncode == 0, found.stderr


# ---- recipes and rewards ----


def test_lint_says_the_columns_and_accepts_a_good_recipe(said):
    text = said("lint", "sums.yaml")
    assert text.startswith("What expressions (where, by, chosen, …) may name:\nalways\n") and "last_number" in text
    assert text.endswith("sums.yaml  no problems\n")


def test_lint_refuses_a_bad_recipe_with_file_and_line(said):
    Path("typo.yaml").write_text(RECIPE.replace("temperature", "temprature"))
    text = said("lint", "typo.yaml", code=2)
    assert re.search(r"typo\.yaml:\d+", text) and "Did you mean 'temperature'?" in text


def test_lint_prints_what_it_finds_before_it_tries_rewards(home, monkeypatch):
    printed: list[str] = []
    monkeypatch.setattr("selfkd.recipe.lint.try_rewards", lambda *_: printed.append("rewards") or Report(notes=["tried"]))
    monkeypatch.setattr("builtins.print", lambda *words, **_: printed.extend(map(str, words)))
    Path("wrong.yaml").write_text(RECIPE.replace("last_number = 1", "last_number"))
    assert main(["lint", "wrong.yaml"]) == 2
    at = printed.index("rewards")
    assert "'last_number' gives a number" in "".join(printed[:at]) and printed[at + 1 :] == [
        "",
        "note: tried",
        "wrong.yaml  1 problem",
    ]


def test_lint_dry_run_walks_without_leaving_anything(said):
    before = sorted(Path().iterdir())
    said("lint", "sums.yaml", "--dry-run")
    assert sorted(Path().iterdir()) == before


def test_recipes_lists_each_shipped_recipe_with_its_first_line_and_what_it_needs(said):
    shipped = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    text, _, legend = said("recipes").rpartition("\n\n")
    lines = text.splitlines()
    assert "only walked: " in legend
    assert [line.split()[0] for line in lines[::2]] == [path.stem for path in shipped]
    assert all(len(line.split()) > 3 for line in lines) and all(" needs " in line for line in lines[1::2])


def test_cp_copies_a_recipe_with_everything_it_names_so_that_it_lints_there(said, tmp_path, monkeypatch):
    Path("mine").mkdir()
    Path("mine/plain.yaml").write_text(
        RECIPE.replace("{n: 3, ", "{n: 3, template: hint.j2, ").replace("reward/number.py", "own.py")
    )
    Path("mine/hint.j2").write_text("{{ prompt.text }} Think.")
    Path("mine/own.py").write_text(
        "from helping import same\n\ndef last_number(completion: str, answer: str) -> float:\n    return same(completion, answer)\n"
    )
    Path("mine/helping.py").write_text("def same(completion, answer):\n    return float(completion.strip().endswith(answer))\n")
    Path("mine/child.yaml").write_text("extends: plain.yaml\nname: child\n")
    write_prompts(Path("mine"))
    written = said("cp", "mine/child.yaml", str(tmp_path / "copy")).splitlines()
    assert {Path(path).name for path in written} == {"child.yaml", "plain.yaml", "hint.j2", "own.py", "helping.py"}
    write_prompts(tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    said("lint", "copy/child.yaml")


def test_cp_refuses_to_replace_a_file_and_writes_nothing(said, tmp_path):
    (tmp_path / "sums.yaml").write_text("something else")
    assert "exists already with other content" in said("cp", "sums.yaml", str(tmp_path), code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["sums.yaml"]


def test_a_plan_that_cannot_fit_is_shown_and_ends_as_a_mistake(said, tmp_path):
    (tmp_path / "big").mkdir()
    sizes = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 14336,
        "vocab_size": 32000,
    }
    (tmp_path / "big" / "config.json").write_text(json.dumps(sizes))
    text = said("run", "sums.yaml", f"model={tmp_path / 'big'}", "--plan", "--on", "1x24gb", code=2)
    assert "DOES NOT FIT" in text and "What would fit: " in text
