"""Models that only score, before anything is generated: words that are no token, heads that are not there, folders that were edited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chains import RECIPE, recipe_in
from safetensors.numpy import load_file, save_file
from scorers import classifier
from tiny import tiny_model

from selfkd.backend.machine import Machine
from selfkd.backend.reading import Reading
from selfkd.backend.reading_files import files_problem
from selfkd.chain import freeze, scorers
from selfkd.chain.paths import Paths
from selfkd.chain.run import Run
from selfkd.errors import UsageError
from selfkd.recipe.lint import look

HEAD = RECIPE[: RECIPE.index("steps:")] + "steps:\n  - sample: {n: 2, max_tokens: 64}\n"
STEPS = Reading("steps", good="+", bad="-")
LABEL = Reading("label", "good")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A language model whose tokens are single characters."""
    return tiny_model(tmp_path_factory.mktemp("words") / "prm")


@pytest.fixture
def rater(tmp_path) -> Path:
    return classifier(tmp_path / "rm", ["bad", "good"])


def lint(folder: Path, step: str) -> list[str]:
    return look(recipe_in(folder, f"{HEAD}  - score: {step}\n  - train: sft\n"))[0].problems


def without(folder: Path, part: str) -> None:
    """Leave out the tensors with a part in their names, as a backbone alone is saved."""
    [file] = folder.glob("*.safetensors")
    save_file({name: value for name, value in load_file(file).items() if part not in name}, file, {"format": "pt"})


def test_words_that_are_several_tokens_are_refused_at_their_line_and_no_model_is_opened(words, tmp_path):
    assert lint(tmp_path, f"{{per_step: {words}, good: +, bad: '-'}}") == []
    [problem] = lint(tmp_path, f"{{per_step: {words}, good: yes, bad: '-'}}")
    assert "sums.yaml:12" in problem and "'good': 'yes' is 3 tokens of this model, and one is read" in problem
    [problem] = lint(tmp_path, f"{{per_step: {words}, good: +, bad: no}}")
    assert "'bad': 'no' is 2 tokens" in problem


def test_a_head_that_is_not_among_the_tensors_is_named_where_the_recipe_is_linted(rater, tmp_path):
    assert lint(tmp_path, "{classifier: rm, label: good}") == []
    without(rater, "score")
    [problem] = lint(tmp_path, "{classifier: rm, label: good}")
    assert "sums.yaml:12" in problem and "none of its tensors has 2 rows, so its head is not among them" in problem


def test_a_token_head_and_one_of_words_are_sought_by_their_shapes(words, tmp_path):
    of_tokens = classifier(tmp_path / "prm", ["bad", "good"], "Token")
    reading = Reading("steps", "good")
    assert files_problem(reading, of_tokens) == files_problem(STEPS, words) == ("", "")
    without(of_tokens, "score")
    assert "its head is not among them" in files_problem(reading, of_tokens)[1]
    config = json.loads((words / "config.json").read_text())
    bare = tmp_path / "bare"
    bare.mkdir()
    [file] = words.glob("*.safetensors")
    tensors = {name: value for name, value in load_file(file).items() if "lm_head" not in name}
    save_file(tensors, bare / "model.safetensors")
    for tied, said in ((True, ""), (False, "no matrix that gives words")):
        (bare / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
        assert said in (found := files_problem(STEPS, bare)[1]) and bool(found) == bool(said)


def test_files_that_are_not_all_here_yet_are_not_judged(rater):
    without(rater, "score")
    index = {"weight_map": {"score.weight": "model-00002-of-00002.safetensors"}}
    (rater / "model.safetensors.index.json").write_text(json.dumps(index))
    assert files_problem(LABEL, rater) == ("", "")


@pytest.mark.parametrize(
    ("step", "said"),
    [("{classifier: rm, label: god}", "no class 'god'"), ("{classifier: rm, label: good}", "its head is not among them")],
)
def test_what_lint_could_not_see_is_refused_when_the_run_is_created(rater, tmp_path, step, said):
    """Of a hub's model the files come with the run."""
    without(rater, "score")
    recipe = recipe_in(tmp_path, f"{HEAD}  - score: {step}\n  - train: sft\n")
    with pytest.raises(UsageError, match=f"score: .*{said}"):
        freeze.freeze_code(recipe, Paths(tmp_path / "run"), {}, False)
    assert not (tmp_path / "run" / "code").exists()


def test_tokens_are_counted_at_creation_by_the_tokenizer_that_will_read(words, tmp_path):
    recipe = recipe_in(tmp_path, f"{HEAD}  - score: {{per_step: {words}, good: yes, bad: '-'}}\n  - train: sft\n")
    with pytest.raises(UsageError, match="'good': 'yes' is 3 tokens"):
        scorers.freeze_scorer(str(words), recipe, Paths(tmp_path / "run"), False)


# ---- edited since ----


def test_a_local_model_that_was_edited_is_named_when_the_run_goes_on(rater, tmp_path):
    recipe = recipe_in(tmp_path, f"{HEAD}  - score: {{classifier: rm, label: good}}\n  - train: sft\n")
    paths = Paths(tmp_path / "run")
    known = {"rm": scorers.freeze_scorer("rm", recipe, paths, False)}

    def said() -> list[str]:
        return scorers.edited(recipe, known, paths.folder)

    assert said() == []
    (rater / "README.md").write_text("a word on it")  # no part of the model
    assert said() == []
    [file] = rater.glob("*.safetensors")
    whole, tensors = file.read_bytes(), load_file(file)
    tensors["score.weight"][0, 0] += 1
    save_file(tensors, file, {"format": "pt"})
    assert len(said()) == 1 and "rm was changed since the run was created, which keeps the model" in said()[0]
    file.write_bytes(whole[:100])
    assert len(said()) == 1
    file.write_bytes(whole)
    assert said() == []
    config = json.loads((rater / "config.json").read_text())
    (rater / "config.json").write_text(json.dumps({**config, "id2label": {"0": "good", "1": "bad"}}))
    assert len(said()) == 1  # the label now names the other class


def test_a_stand_in_and_a_model_of_a_hub_are_not_looked_at(tmp_path):
    recipe = recipe_in(tmp_path, f"{HEAD}  - score: {{classifier: org/rm, label: good}}\n  - train: sft\n", "rounds=1")
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    (tmp_path / "org" / "rm").mkdir(parents=True)
    assert run.remarks() == []
