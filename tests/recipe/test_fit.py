"""Whether a recipe fits: a model that is too large is refused with the numbers and with what would fit, and no card is needed for it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfkd.backend.machine import Machine, explain, read_machine, shipped
from selfkd.backend.memory import GIB
from selfkd.backend.model_sizes import Sizes
from selfkd.core.yamlfile import Problems
from selfkd.errors import UsageError
from selfkd.recipe import fit, plan, ready
from selfkd.recipe.load import load
from selfkd.recipe.schema import Recipe

RECIPE = """
model: big
context: 512
rounds: 1
prompts:
  train: [{prompt: "1 + 1 = ?", answer: "2"}]
steps:
  - sample: {n: 1, max_tokens: 64}
  - build: {kind: sft}
  - train: {loss: sft}
"""
MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
SEVEN = Sizes(7_241_728_000, 32, 4096, 14336, 32, 8, 128, 32000)
SMOL = Sizes(134_515_008, 30, 576, 1536, 9, 3, 64, 49152, tied=True)
EIGHTY = 80 * GIB


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(MISTRAL))


def asked(sizes: Sizes, cards: int = 1, recipe: Recipe | None = None, **words: Any) -> list[str]:
    machine = Machine(cards=cards, card_gb=80.0, **words)
    place = fit.Place((EIGHTY,) * cards)
    return list(
        fit.problems(recipe or load("r.yaml"), machine, fit.words_of(machine, place), sizes, fit.Lengths(512, 64), place)
    )


def test_seven_billion_parameters_do_not_train_whole_on_a_card_of_80_gib() -> None:
    """16 bytes each: 7.24e9 × 16 / 2^30 = 107.9 GiB, with 1 for CUDA and 1.5 for the engine that sleeps there."""
    [problem] = asked(SEVEN)
    assert problem.startswith("card 1, training: 7.2 billion parameters need at least 110.4 GiB")
    assert "weights 27.0, gradients 27.0, optimiser 54.0" in problem and "and there are 80.0" in problem
    assert "What would fit: train.lora.r=16" in problem and re.search(r"1[23]\d GiB and more", problem)


def test_what_is_said_to_fit_does_fit() -> None:
    [problem] = asked(SEVEN)
    changed = load("r.yaml", ["train.lora.r=16"])
    assert "What would fit: train.lora.r=16 (an override" in problem
    assert all(load.fits for load in fitted(SEVEN, changed, 512))
    [most] = re.findall(r"a model of up to ([\d.]+) billion", problem)
    small, large = (replace(SEVEN, parameters=int(float(most) * factor * 1e9)) for factor in (0.97, 1.05))
    assert all(load.fits for load in fitted(small, load("r.yaml"), 64)) and not all(
        load.fits for load in fitted(large, load("r.yaml"), 64)
    )


def test_an_engine_that_is_too_large_for_a_card_is_told_over_how_many_it_fits() -> None:
    problems = asked(replace(SEVEN, parameters=45_000_000_000), cards=4)
    assert (
        "card 1, answering: 45 billion parameters need at least" in problems[1] and "tensor_parallel: 2 (in the" in problems[1]
    )


def fitted(sizes: Sizes, recipe: Recipe, learned: int) -> list[fit.Load]:
    machine, place = Machine(cards=1, card_gb=80.0), fit.Place((EIGHTY,))
    return fit.loads(recipe, machine, fit.words_of(machine, place), sizes, fit.Lengths(512, learned), place)


def test_eight_cards_with_a_whole_model_each_make_it_no_smaller_and_neighbours_stand_in_one_line() -> None:
    [problem] = asked(SEVEN, cards=8, generators=8, trainers=8)
    assert problem.startswith("cards 1-8, training: ")
    assert "What would fit: shard: true (in the machine file): up to 21.3 GiB;" in problem


def test_a_model_that_is_divided_over_eight_cards_fits_where_a_whole_one_does_not() -> None:
    """7.24e9 × 16 / 8 / 2^30 = 13.5 GiB on each, beside 1 for CUDA and 1.5 for the engine that sleeps there."""
    words = {"cards": 8, "generators": 8, "trainers": 8, "shard": True}
    assert asked(SEVEN, **words) == []
    machine, place = Machine(card_gb=80.0, **words), fit.Place((EIGHTY,) * 8, 200 * GIB)
    found = fit.loads(load("r.yaml"), machine, fit.words_of(machine, place), SEVEN, fit.Lengths(512, 64), place)
    assert found[0].need.least / GIB == pytest.approx(13.5 + 1 + 1.5, abs=0.1)
    host = next(one for one in found if one.stage == "loading")
    assert host.need.certain["weights"] == 4 * SEVEN.parameters  # a part of the checkpoint each, not eight times the whole


def test_an_adapter_of_seven_billion_parameters_is_planned_on_a_card_of_24_gib() -> None:
    """7.24e9 weights in 2 bytes but 131 million of the embedding in 4: 13.7 GiB; 41.9 million learn, with 16 bytes each: 0.6."""
    recipe = load("r.yaml", ["train.lora.r=16", "train.trl.per_device_train_batch_size=1"])
    machine, place = Machine(cards=1, card_gb=24.0, trainer={"gradient_checkpointing": True}), fit.Place((24 * GIB,))
    words = fit.words_of(machine, place)
    assert list(fit.problems(recipe, machine, words, SEVEN, fit.Lengths(512, 64), place)) == []
    [training] = [
        one for one in fit.loads(recipe, machine, words, SEVEN, fit.Lengths(512, 64), place) if one.stage == "training"
    ]
    learned = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert training.need.certain["weights"] == 2 * SEVEN.parameters + 2 * 32000 * 4096 + 4 * learned
    assert training.need.certain["optimiser"] == 8 * learned and training.need.certain["gradients"] == 4 * learned
    assert 14 < training.need.least / GIB < 18 and training.fits


def test_an_adapter_of_seventy_billion_parameters_is_planned_over_eight_cards_and_offered_there() -> None:
    """70.6e9 weights in 2 bytes but 1.05e9 of the embedding in 4, over 8 cards: 16.7 GiB each; 207 million learn, 16 bytes each: 0.4."""
    seventy = Sizes(70_553_706_496, 80, 8192, 28672, 64, 8, 128, 128256)
    words = {"cards": 8, "generators": 4, "trainers": 8, "shard": True, "tensor_parallel": 2}
    recipe = load("r.yaml", ["train.lora.r=16"])
    assert asked(seventy, recipe=recipe, **words) == []
    machine, place = Machine(card_gb=80.0, **words), fit.Place((EIGHTY,) * 8)
    [training, *_] = fit.loads(recipe, machine, fit.words_of(machine, place), seventy, fit.Lengths(512, 64), place)
    learned = 16 * 80 * (2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    lies_still = 2 * seventy.parameters + 2 * 128256 * 8192
    assert training.need.certain["weights"] == (lies_still + 4 * learned) // 8
    assert training.need.certain["optimiser"] == learned and training.need.certain["gradients"] == learned // 2
    blocks = (seventy.parameters - 2 * 128256 * 8192) // 80
    assert training.need.passing["gathered"] == pytest.approx(4 * 128256 * 8192 + 2 * 2 * blocks, rel=1e-6)
    [problem, *_] = asked(seventy, **words)
    assert "What would fit: train.lora.r=16" in problem


def test_four_bits_are_offered_where_an_adapter_over_sixteen_just_does_not_fit_and_then_it_does() -> None:
    """9.5e9 weights in 2 bytes, 17.9 GiB, with what sleeps and with rows of full length are too many for 24 GiB; in 4 bits they take 5.4."""
    nine = replace(SEVEN, parameters=9_500_000_000, layers=42)
    machine, place = Machine(cards=1, card_gb=20.0, trainer={"gradient_checkpointing": True}), fit.Place((20 * GIB,))
    words, lengths = fit.words_of(machine, place), fit.Lengths(512, 512)
    [problem, *_] = fit.problems(load("r.yaml", ["train.lora.r=16"]), machine, words, nine, lengths, place)
    assert (
        problem.startswith("card 1, training: 9.5 billion")
        and "What would fit: train.lora.quantise=nf4 (an override" in problem
    )
    over = load("r.yaml", ["train.lora.r=16", "train.lora.quantise=nf4"])
    (training,) = [one for one in fit.loads(over, machine, words, nine, lengths, place) if one.stage == "training"]
    assert training.fits and training.need.certain["weights"] < 7 * GIB
    mixture = replace(nine, fits_four_bits=False)
    assert not any(
        "quantise" in said
        for said in fit.problems(load("r.yaml", ["train.lora.r=16"]), machine, words, mixture, lengths, place)
    )


def test_an_adapter_on_a_divided_model_is_refused_nowhere() -> None:
    problems = Problems()
    ready.add_problems(load("r.yaml", ["train.lora.r=16"]), Machine(backend="fake", trainers=2, shard=True), problems)
    assert not problems.lines


def test_small_models_fit_and_say_how_many_answers() -> None:
    machine = Machine(cards=2, card_gb=24.0, turns="split")
    place = fit.Place((24 * GIB,) * 2)
    words = fit.words_of(machine, place)
    answering, training = fit.loads(load("r.yaml"), machine, words, SMOL, fit.Lengths(128, 64), place)
    assert (answering.name, training.name) == ("card 1, answering", "card 2, training")
    assert re.search(r"the rest holds 1,\d\d\d answers of 512 tokens at once", str(answering))
    assert "sleeping engine" not in str(training) and answering.fits and training.fits


def test_long_answers_that_may_not_fit_are_said_and_not_refused() -> None:
    machine = Machine(cards=1, card_gb=24.0)
    place = fit.Place((24 * GIB,))
    recipe = load("r.yaml", ["context=32768", "train.trl.per_device_train_batch_size=32"])
    words = fit.words_of(machine, place)
    found = fit.loads(recipe, machine, words, SMOL, fit.Lengths(32768, 32768), place)
    assert "May not fit" in str(found[0])
    assert list(fit.problems(recipe, machine, words, SMOL, fit.Lengths(32768, 32768), place)) == []


def test_heads_that_do_not_divide_are_refused_with_what_would() -> None:
    [problem] = asked(SMOL, cards=2, tensor_parallel=2)
    assert problem == (
        "tensor_parallel: 2 does not divide this model (9 attention heads, 3 for keys and values, and layers 1,536 wide); "
        "possible: 1, 3."
    )
    assert fit.spread_problem(SMOL, 3) == fit.spread_problem(SEVEN, 8) == ""
    assert "possible: 1, 2, 4, 8, 16, 32" in fit.spread_problem(SEVEN, 3)


def test_on_a_cpu_all_processes_share_the_memory() -> None:
    machine, place = Machine(memory_gb=16.0), fit.Place((), 16 * GIB)
    words = fit.words_of(machine, place)
    training, answering = fit.loads(load("r.yaml"), machine, words, SMOL, fit.Lengths(128, 64), place)
    assert (training.name, answering.name) == ("memory, training", "memory, answering")
    assert training.fits and answering.fits
    [first, *_] = fit.problems(load("r.yaml"), machine, words, SEVEN, fit.Lengths(128, 64), place)
    assert first.startswith("memory, training: 7.2 billion parameters need at least")


def test_a_batch_that_ranks_cannot_share_is_found_by_the_plan() -> None:
    found = plan.plan(load("r.yaml", ["train.trl.per_device_train_batch_size=2"]), Machine(cards=8, card_gb=80.0, trainers=8))
    with pytest.raises(UsageError, match="2 x 1 = 2 rows, and 8 ranks are to share them"):
        found.refuse()


@pytest.mark.parametrize("name", ["laptop", "1x24gb", "1x80gb", "8x80gb"])
def test_every_shipped_machine_file_is_sound_and_found_by_its_name(name: str) -> None:
    machine = read_machine(Path(name))
    assert machine == read_machine(Path(f"{name}.yaml")) == read_machine(shipped()[name])
    assert shipped()[name].read_text().startswith("# ") and f"--on {name}    " in explain()
    place = fit.Place.of(machine)
    cards, _, size = name.removesuffix("gb").partition("x")
    assert place.cards == ((int(size) * GIB,) * int(cards) if size else ())
    words = fit.words_of(machine, place)
    small = load("r.yaml", ["train.trl.num_train_epochs=2"])
    assert list(fit.problems(small, machine, words, SMOL, fit.Lengths(512, 64), place)) == []
    assert all(load.fits for load in fit.loads(small, machine, words, SMOL, fit.Lengths(512, 512), place))


def test_what_the_shipped_files_say_of_sizes_is_what_fits() -> None:
    """Their first lines name a whole model that fits with room for its rows; one a third larger is refused."""
    for name in ("1x24gb", "1x80gb"):
        machine = read_machine(Path(name))
        [said] = re.findall(r"up to about ([\d.]+) billion", shipped()[name].read_text())
        place, words = fit.Place.of(machine), fit.words_of(machine, fit.Place.of(machine))
        for factor, fits in ((1.0, True), (1.35, False)):
            sizes = replace(SEVEN, parameters=int(float(said) * factor * 1e9))
            assert (list(fit.problems(load("r.yaml"), machine, words, sizes, fit.Lengths(512, 64), place)) == []) is fits


def test_a_name_that_is_no_file_is_answered_with_those_that_are_shipped() -> None:
    with pytest.raises(UsageError, match=r"no such file\. Did you mean '1x80gb'") as caught:
        read_machine(Path("1x81gb"))
    assert "Shipped: 1x24gb, 1x80gb, 8x80gb, laptop" in caught.value.fix
    Path("1x24gb").write_text("generators: 3\n")
    assert read_machine(Path("1x24gb")).generators == 3  # one's own comes first


def test_cards_are_stated_with_their_memory() -> None:
    Path("half.yaml").write_text("cards: 2\n")
    with pytest.raises(UsageError, match="cards and card_gb say together"):
        read_machine(Path("half.yaml"))


def test_a_plan_for_cards_that_are_not_here_says_gib_line_by_line_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan.plan(load("r.yaml"), read_machine(Path("1x24gb")))
    lines = dict(found.lines)
    assert (
        lines["card 1, training"].startswith("up to ")
        and "of 24.0 GiB: weights 27.0, gradients 27.0" in lines["card 1, training"]
    )
    assert lines["card 1, training"].endswith("DOES NOT FIT")
    assert lines["card 1, answering"].startswith("up to ")
    with pytest.raises(UsageError, match=r"7\.2 billion parameters need at least 110\.4 GiB"):
        found.refuse()


def test_a_model_whose_sizes_are_not_known_is_not_refused() -> None:
    (Path("big") / "config.json").write_text('{"model_type": "of tomorrow"}')
    found = plan.plan(load("r.yaml"), read_machine(Path("1x24gb")))
    assert dict(found.lines)["memory"].startswith("unknown: ")
    found.refuse()


def test_a_state_that_lies_in_the_machines_memory_is_counted_there_and_offered_where_that_alone_is_enough() -> None:
    """7.24e9 numbers: weights and gradients 27.0 GiB each on the card, 67 million states at a time 0.5; 54.0 in the machine's memory."""
    [problem] = asked(SEVEN)
    [offered] = re.findall(
        r"; or (offload_optimiser: true \(in `trainer` of the machine file\): up to [\d.]+ GiB, and [\d.]+ of)", problem
    )
    assert offered.endswith("and 54.0 of")
    machine = Machine(cards=1, card_gb=80.0, trainer={"offload_optimiser": True})
    for host, fits in ((128, True), (50, False)):
        place = fit.Place((EIGHTY,), host * GIB)
        words = fit.words_of(machine, place)
        problems = list(fit.problems(load("r.yaml"), machine, words, SEVEN, fit.Lengths(512, 64), place))
        assert (problems == []) is fits
        training, _, loading, beside = fit.loads(load("r.yaml"), machine, words, SEVEN, fit.Lengths(512, 512), place)
        assert training.fits and training.need.certain["optimiser"] == 8 * 2**26
        assert (loading.name, beside.name) == ("memory, loading", "memory, training")
        assert beside.need.certain == {"optimiser": 8 * SEVEN.parameters}
    assert problems[0].startswith(
        "memory, training: 7.2 billion parameters need at least 54.0 GiB (optimiser 54.0), and there are 50.0"
    )
    assert "What would fit: offload_optimiser: false;" in problems[0]


@pytest.mark.parametrize(("host", "offered"), [(None, True), (64, True), (55, False)])
def test_offloading_is_offered_only_where_the_machines_memory_holds_the_state(host: int | None, offered: bool) -> None:
    machine, place = Machine(cards=1, card_gb=80.0), fit.Place((EIGHTY,), host and host * GIB)
    [problem] = fit.problems(load("r.yaml"), machine, fit.words_of(machine, place), SEVEN, fit.Lengths(512, 64), place)
    assert ("offload_optimiser: true" in problem) is offered


def test_each_rank_keeps_the_state_of_its_part_in_the_machines_memory() -> None:
    words = {"cards": 8, "generators": 8, "trainers": 8, "shard": True, "trainer": {"offload_optimiser": True}}
    machine, place = Machine(card_gb=80.0, **words), fit.Place((EIGHTY,) * 8, 512 * GIB)
    found = fit.loads(load("r.yaml"), machine, fit.words_of(machine, place), SEVEN, fit.Lengths(512, 64), place)
    [beside] = [one for one in found if one.name == "memory, training"]
    assert beside.need.certain == {"optimiser": 8 * SEVEN.parameters}  # all ranks together
    adafactor = load("r.yaml", ["train.trl.optim=adafactor"])
    problems = Problems()
    ready.add_problems(adafactor, machine, problems)
    assert any("adafactor does not know weights that are divided" in line for line in map(str, problems.lines))


KD = RECIPE.replace("kind: sft", "kind: kd, teacher_system: Think.")


@pytest.mark.parametrize(
    ("train", "copied"),
    [
        ("{loss: kd}", True),
        ("{loss: kd, teacher: live}", False),
        ("{loss: kd, lora: {r: 8}}", False),
        ("{loss: kd, lora: {r: 8}, teacher: base}", True),
        ("{loss: kd, lora: {r: 8}, continue: true, teacher: base}", False),
        ("{loss: kd, lora: {r: 8}, continue: true, teacher: start}", True),
    ],
)
def test_a_teacher_is_counted_where_it_has_weights_of_its_own(tmp_path, train: str, copied: bool) -> None:
    (tmp_path / "kd.yaml").write_text(KD.replace("{loss: sft}", train))
    loads = fitted(SEVEN, load(str(tmp_path / "kd.yaml")), 64)
    training = next(one for one in loads if one.stage == "training")
    assert ("teacher" in training.need.certain) == copied
    assert ("teacher" in str(training)) == copied
