"""A whole chain on the real engine and the real trainer, a tiny Llama: killed anywhere, it ends on the undisturbed digest."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import polars as pl
import pytest
from real_chain import KILLS, begins, finish, kill_each, make_home, pid_in, start, until

from selfkd.chain.run import Run
from selfkd.core import digest
from selfkd.core.accelerator import accelerator
from selfkd.report.export import export, measured_format
from selfkd.report.verify import verify

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_home(tmp_path_factory.mktemp("home"))
    (folder / "slow.yaml").write_text("threads: 1\ngenerator: transformers\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(home: Path) -> Run:
    return finish(home, "undisturbed")


def test_the_chain_learns_from_both_losses_and_every_swap_is_proved(undisturbed: Run) -> None:
    sealed = undisturbed.sealed()
    assert len({record.models["policy"].digest for record in sealed}) == 3
    for index in (1, 2):
        notes = undisturbed.made(index)["measure"].notes
        assert notes["swap"]["proved"] is True and notes["swap"]["survived"] > 0.5
    assert verify(undisturbed.folder).problems == []


def test_an_exported_model_is_the_one_that_was_measured(undisturbed: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = export(undisturbed, tmp_path / "whole", "policy@round-2", "fp32")
    assert digest.weights(whole.folder) == undisturbed.sealed()[2].models["policy"].digest
    assert export(undisturbed, tmp_path / "served").dtype == measured_format(undisturbed)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="float32")
    asked = undisturbed.samples(2, step="measure").row(0, named=True)
    [prompt] = undisturbed.samples(2, "id = '{}'".format(asked["id"]), "measure")["teacher_messages"]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert said[:4] == asked["token_ids"][:4]


def test_killed_driver_engine_and_trainer_the_same_command_ends_on_the_same_digest(home: Path, undisturbed: Run) -> None:
    assert len(list(kill_each(home, "killed"))) == KILLS
    run = Run.at(home / "runs" / "killed")
    assert run.sealed()[-1].digest == undisturbed.sealed()[-1].digest
    assert verify(run.folder).problems == []


def test_two_engines_and_a_stop_in_the_middle_end_on_the_same_digest(home: Path, undisturbed: Run) -> None:
    (home / "one.yaml").write_text("threads: 1\ngenerators: 2\n")
    process = start(home, "stopped")
    until(home / "runs" / "stopped", begins(1, "sample"), process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert finish(home, "stopped").sealed()[-1].digest == undisturbed.sealed()[-1].digest


def test_a_chain_by_transformers_killed_with_its_engine_ends_on_its_own_digest(home: Path) -> None:
    whole, run = finish(home, "slow", "slow.yaml"), home / "runs" / "slow-killed"
    process = start(home, "slow-killed", "slow.yaml")
    until(run, begins(1, "sample"), process)
    os.kill(pid_in(run, "engine-0.log", "generator"), signal.SIGKILL)  # the driver replaces it, and goes on
    until(run, begins(2, "sample"), process)
    os.killpg(process.pid, signal.SIGKILL)
    ended = finish(home, "slow-killed", "slow.yaml")
    assert ended.sealed()[-1].digest == whole.sealed()[-1].digest
    assert [seal.notes["level"] for seal in ended.sealed()] == ["exact"] * 3
    assert all(ended.made(index)["measure"].notes["swap"]["proved"] is True for index in (1, 2))
    assert verify(run).problems == []


@pytest.mark.nightly
@pytest.mark.parametrize("words", ["continue: true, lora: {r: 4, serve: merged}", "lora: {r: 4, serve: adapter}"])
def test_a_chain_of_adapters_killed_anywhere_ends_on_the_same_digest(tmp_path: Path, words: str) -> None:
    """The second one lays four adapters over each other, and its engines are started anew as the rank grows."""
    home = make_home(tmp_path)
    recipe = (home / "chain.yaml").read_text().replace("- train: {", f"- train: {{{words}, ")
    (home / "chain.yaml").write_text(recipe.replace("5.0e-4", "5.0e-3").replace("1.0e-4", "1.0e-3"))
    whole = finish(home, "whole")
    assert len(list(kill_each(home, "killed"))) == KILLS
    run = Run.at(home / "runs" / "killed")
    assert run.sealed()[-1].digest == whole.sealed()[-1].digest
    assert [seal.models["policy"].kind for seal in run.sealed()] == ["full", "adapter", "adapter"]
    assert all(run.made(index)["measure"].notes["swap"]["proved"] is True for index in (1, 2))
    assert verify(run.folder).problems == []


JUDGES = """  - judge: {template: "{{ of.text }} 0-9?", highest: 9, n: 2, max_tokens: 24, canaries: 1}
  - judge: {name: duel, template: "{{ of.text }} or {{ other.text }}?", pairwise: average, pairs: 2, max_tokens: 24, canaries: 1, as: duels}
  - score: {elo: wins}
"""


@pytest.mark.nightly
@pytest.mark.parametrize("generator", ["vllm", "transformers"])
def test_a_chain_that_judges_itself_killed_anywhere_ends_on_the_same_digest(tmp_path: Path, generator: str) -> None:
    """A tiny random model says little that reads as a mark or a verdict; a question that is too long for it is left out."""
    home = make_home(tmp_path, machine=f"threads: 1\ngenerator: {generator}\n")
    recipe = (home / "chain.yaml").read_text().replace("context: 160", "context: 160\nlong: drop")
    (home / "chain.yaml").write_text(recipe.replace("  - select: ", f"{JUDGES}  - select: "))
    whole = finish(home, "whole")
    assert len(list(kill_each(home, "killed"))) == KILLS
    run = Run.at(home / "runs" / "killed")
    assert run.sealed()[-1].digest == whole.sealed()[-1].digest
    assert [seal.notes["level"] for seal in run.sealed()] == ["exact"] * 3
    judged = run.samples(1).filter(pl.col("aside"))
    assert set(judged["stream"]) == {"judgments", "judgments-canaries", "duels", "duels-canaries"}
    assert judged.filter(pl.col("stream") == "judgments").height == 6 * 4 * 2
    assert 0 <= run.sealed()[1].metrics["judge/unread"] <= 1
    assert verify(run.folder).problems == []


@pytest.mark.gpu
@pytest.mark.skipif(not accelerator().on_cards, reason="no CUDA device")
@pytest.mark.parametrize("turns", ["share", "split"])
def test_on_a_gpu_engine_and_trainer_take_turns_and_every_swap_is_proved(home: Path, turns: str) -> None:
    if turns == "split" and len(accelerator().cards) < 2:
        pytest.skip("split needs two cards")
    (home / "one.yaml").write_text(f"threads: 1\nturns: {turns}\n")
    run = finish(home, f"gpu-{turns}")
    swaps = [run.made(index)["measure"].notes["swap"] for index in (1, 2)]
    assert [swap["proved"] for swap in swaps] == [True, True]
    assert len({record.models["policy"].digest for record in run.sealed()}) == 3
    assert verify(run.folder).problems == []
