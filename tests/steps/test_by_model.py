"""Scores that a model gives: of another text than the answer, by a model of others, by two answers held against each other."""

from __future__ import annotations

import itertools
import json
import math

import polars as pl
import pytest
from chains import RECIPE, Faults, Killed, end, go, recipe_in
from scorers import classifier

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.backend.reading import Read
from selfkd.chain.freeze import freeze_code
from selfkd.chain.run import Run
from selfkd.core import digest, storage
from selfkd.errors import ChainError, RecipeError, RewardError, UsageError
from selfkd.prompts import templates
from selfkd.recipe.lint import lint
from selfkd.report.verify import verify
from selfkd.steps.model_texts import written

HEAD = RECIPE[: RECIPE.index("steps:")]
SAMPLE = "  - sample: {n: 3, temperature: 0.8, max_tokens: 64}\n"


class Said(Fake):
    """A model that gives what the test says: `scores` of a row (ids, messages, text, …) or of a text that is read."""

    def __init__(self, numerics, logprob=None, read=None):
        super().__init__(numerics)
        self.logprob, self.reads, self.asked = logprob, read, []

    def logprobs(self, model, rows, on_progress=None):
        for row in rows.iter_rows(named=True):
            self.asked.append(row)
            yield (row["id"], *self.logprob(row))

    def read(self, model, reading, rows, on_progress=None):
        for row in rows.iter_rows(named=True):
            self.asked.append((reading, row))
            found = self.reads(row)
            yield Read(row["id"], (), found) if isinstance(found, str) else Read(row["id"], tuple(found))


def run_of(folder, steps, backend=None, *overrides) -> Run:
    return go(recipe_in(folder, f"{HEAD}steps:\n{SAMPLE}{steps}", "rounds=1", *overrides), folder / "run", backend)


def table(run: Run, step: str, name: str = "scores") -> pl.DataFrame:
    return pl.concat([pl.read_parquet(run.folder / path) for path in run.made(1)[step].tables[name].files])


# ---- log-probabilities ----


def test_the_gold_answer_is_scored_behind_the_models_own_reasoning_and_the_reasoning_is_not(tmp_path):
    """RLPR: the reward is the mean probability of the gold answer's tokens; here every one of four tokens has a chance of 0.25."""
    cut = "{{ of.text.rsplit('Answer:', 1)[0] }}Answer:"
    words = json.dumps({"logprob": "policy", "given": cut, "target": f"{cut} {{{{ prompt.answer }}}}", "reduce": "probability"})
    backend = Said({}, lambda row: (4 * 0.25, 4))
    run = run_of(tmp_path, f"  - score: {words}\n", backend)
    assert set(table(run, "score")["value"]) == {0.25} and len(backend.asked) == 36
    samples = {row["id"]: row for row in run.samples(1).iter_rows(named=True)}
    for row in backend.asked:
        own = samples[row["id"]]["text"]
        reasoning = own[: own.index("Answer:") + len("Answer:")]
        assert row["text"].startswith(f"{reasoning} ") and row["given"] == reasoning
        assert (row["token_ids"], row["finish_reason"], row["sums"]) == (None, "length", "probability")


def test_an_answer_with_and_without_its_prompt_gives_instruction_following_difficulty(tmp_path):
    """IFD = s(A|Q) / s(A), the ratio of the mean losses per token: 8 tokens, -4 with the prompt and -16 without, 0.5 / 2."""
    steps = (
        "  - score: {logprob: policy, reduce: mean, as: with_it}\n"
        "  - score: {logprob: policy, reduce: mean, template: '{{ \"Write:\" }}', as: alone}\n"
        "  - select: {where: 'with_it / alone = 0.25'}\n"
    )
    backend = Said({}, lambda row: (-16.0 if row["messages"][-1]["content"] == "Write:" else -4.0, 8))
    run = run_of(tmp_path, steps, backend)
    assert set(table(run, "score")["value"]) == {-0.5} and set(table(run, "score-2")["value"]) == {-2.0}
    assert run.samples(1)["kept"].all()
    hinted = [row for row in backend.asked if row["messages"][-1]["content"] == "Write:"]
    assert all(row["token_ids"] and row["finish_reason"] == "stop" for row in hinted)  # its own ids, as it was drawn


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ((math.nan, 5000), "it has 5,000 tokens with its prompt, and the context holds 1,024"),
        ((math.nan, 0), "nothing stands before its first token: the model sees an empty prompt"),
        ((0.0, 0), "there are no tokens to score"),
        ((math.nan, 3), "log-probability nan"),
    ],
)
def test_what_could_not_be_scored_is_null_and_says_why(tmp_path, found, why):
    turns = itertools.cycle([(-1.0, 1), found])
    run = run_of(tmp_path, "  - score: {logprob: policy, max_failed: 1}\n", Said({}, lambda row: next(turns)))
    assert set(table(run, "score").select("value", "why").rows()) == {(-1.0, None), (None, why)}
    with pytest.raises(RewardError, match="could not be scored, limit 1%"):
        run_of(tmp_path / "strict", "  - score: {logprob: policy}\n", Said({}, lambda row: found))


def test_a_gold_answer_that_is_not_there_is_a_reason_and_never_the_word_none(tmp_path):
    prompts = [{"prompt": "2 + 2?"}, {"prompt": "1 + 1?", "answer": "2"}]
    head = HEAD.replace("{file: train.jsonl, prompt: question, answer: answer}", json.dumps(prompts))
    steps = f"{SAMPLE}  - score: {{logprob: policy, target: '{{{{ prompt.answer }}}}', max_failed: 1}}\n"
    backend = Said({}, lambda row: (-1.0, 1))
    run = go(recipe_in(tmp_path, f"{head}steps:\n{steps}", "rounds=1"), tmp_path / "run", backend)
    assert {row["text"] for row in backend.asked} == {"2"}
    counted = dict(table(run, "score")["why"].value_counts().iter_rows())
    assert counted == {"the prompt has no gold answer to show": 3, None: 3}


def test_a_beginning_that_is_not_one_is_a_reason(tmp_path):
    steps = "  - score: {logprob: policy, given: '{% if of.number == 0 %}Never{% endif %}', max_failed: 1}\n"
    run = run_of(tmp_path, steps, Said({}, lambda row: (-1.0, 1)))
    assert set(table(run, "score")["why"]) == {"the answer does not begin with what `given` says", None}


# ---- models that read ----


def test_a_classifier_reads_the_prompt_and_each_answer_and_gives_its_number(tmp_path):
    backend = Said({}, read=lambda row: [float(len(row["text"]))])
    run = run_of(tmp_path, "  - score: {classifier: org/rm}\n  - select: {where: 'rating > 0'}\n", backend)
    lengths = dict(run.samples(1).select("id", "chars").iter_rows())
    assert dict(table(run, "score").select("sample", "value").iter_rows()) == lengths
    assert all(row["messages"] and row["second"] is None for _, row in backend.asked)


def test_templates_make_one_text_or_two_of_prompt_and_answer(tmp_path):
    words = json.dumps(
        {"classifier": "org/nli", "label": "entailment", "text": "{{ of.text }}", "second": "{{ prompt.answer }}"}
    )
    backend = Said({}, read=lambda row: [0.5])
    run = run_of(tmp_path, f"  - score: {words}\n", backend)
    assert all(row["messages"] is None and row["second"].isdigit() for _, row in backend.asked)
    assert {reading.label for reading, _ in backend.asked} == {"entailment"} and run.made(1)["score"].code.keys() >= {"org/nli"}


@pytest.mark.parametrize(("reduce", "value"), [("min", 0.25), ("product", 0.1), ("last", 0.5), ("mean", 31 / 60)])
def test_the_steps_of_an_answer_become_one_score(tmp_path, reduce, value):
    """0.8, 0.25, 0.5: the least is 0.25, the product 0.1, the last 0.5, the mean 1.55 / 3."""
    steps = f"  - score: {{per_step: org/prm, label: good, reduce: {reduce}}}\n"
    run = run_of(tmp_path, steps, Said({}, read=lambda row: [0.8, 0.25, 0.5]))
    assert table(run, "score")["value"].unique().to_list() == [pytest.approx(value)]


def test_answers_are_held_against_each_other_in_both_orders_and_elo_reads_it(tmp_path):
    """First shown has a chance of 0.75 in one order and 0.5 in the other: (0.75 + 1 - 0.5) / 2 = 0.625 for one, 0.375 for the other."""
    backend = Said({}, read=lambda row: [0.75 if row["text"] < row["second"] else 0.5])
    steps = "  - score: {pairwise: org/pm, label: better}\n  - score: {elo: wins}\n"
    run = run_of(tmp_path, steps, backend)
    rows = table(run, "score")
    assert rows.height == 12 * 3 * 2 and len(backend.asked) == 12 * 3 * 2  # three pairs of a prompt, two sides, two orders
    texts = dict(run.samples(1).select("id", "text").iter_rows())
    for one, other, value in rows.select("sample", "versus", "value").iter_rows():
        same = texts[one] == texts[other]
        assert value == pytest.approx(0.5 if same else 0.625 if texts[one] < texts[other] else 0.375)
    assert table(run, "score-2")["value"].is_not_null().all()


def test_what_a_model_cannot_read_is_null_and_too_much_of_it_stops_the_round(tmp_path):
    why, turns = "it has 900 tokens, and the model reads 512", itertools.count()
    run = run_of(
        tmp_path,
        "  - score: {classifier: org/rm, max_failed: 1}\n",
        Said({}, read=lambda row: why if next(turns) % 2 else [1.0]),
    )
    assert dict(table(run, "score")["why"].value_counts().iter_rows()) == {None: 18, why: 18}
    reads = Said({}, read=lambda row: why)
    with pytest.raises(RewardError, match="First: it has 900 tokens"):
        run_of(tmp_path / "strict", "  - score: {classifier: org/rm}\n", reads)


def test_entropy_and_certainty_are_of_a_model_of_the_chain_and_name_no_other(tmp_path):
    backend = Said({}, read=lambda row: [1.5])
    run = run_of(tmp_path, "  - score: {entropy: policy@base}\n  - score: {certainty: policy}\n", backend)
    assert [reading.kind for reading, _ in backend.asked] == ["entropy"] * 36 + ["certainty"] * 36
    assert all(row["token_ids"] and reading.context == 1024 for reading, row in backend.asked)
    assert {*table(run, "score")["name"], *table(run, "score-2")["name"]} == {"entropy", "certainty"}


# ---- frozen with the run ----


def test_a_model_that_scores_is_copied_into_the_run_and_its_digest_is_in_the_key(tmp_path):
    folder = classifier(tmp_path / "rm", ["reward"])
    recipe = recipe_in(tmp_path, f"{HEAD}steps:\n{SAMPLE}  - score: {{classifier: rm}}\n")
    run = Run.open(recipe, tmp_path / "run", Machine(backend="fake"))
    storage.make_folder(run.paths.tmp)
    entry = freeze_code(recipe, run.paths, {}, stand_in=False)["rm"]
    assert entry.digest == digest.weights(folder) and (run.folder / entry.path / "model.safetensors").is_file()
    (folder / "model.safetensors").unlink()  # what its owner does to it later does not reach the run
    assert freeze_code(recipe, run.paths, {"rm": entry}, stand_in=False)["rm"] == entry


def test_a_run_never_asks_for_its_models_again_and_another_model_is_an_amendment(tmp_path):
    steps = "  - score: {classifier: ORG/rm}\n  - select: {where: 'rating > 0'}\n  - train: sft\n"
    first = run_of(tmp_path, steps, None)
    again = run_of(tmp_path, steps, None)
    assert end(first) == end(again) and not verify(first.folder).problems
    other = recipe_in(tmp_path, f"{HEAD}steps:\n{SAMPLE}{steps.replace('ORG/rm', 'org/other')}", "rounds=2")
    with pytest.raises(ChainError, match="classifier"):
        go(other, tmp_path / "run")
    amended = go(other, tmp_path / "run", amend=True)
    assert {"org/other"} <= amended.made(2)["score"].code.keys() and not verify(amended.folder).problems


def test_a_model_that_was_changed_inside_the_run_is_noticed(tmp_path):
    run = run_of(tmp_path, "  - score: {classifier: org/rm}\n", None)
    stored = run.folder / run.code["org/rm"].path / "weights.json"
    stored.chmod(0o644)
    stored.write_text('{"scorer": "another"}')
    with pytest.raises(ChainError, match=r"weights\.json"):
        Run.at(run.folder).scorer("org/rm")


def test_killed_between_any_two_file_operations_it_ends_on_the_same_digest(tmp_path):
    steps = "  - score: {pairwise: org/pm}\n  - score: {per_step: org/prm}\n  - select: {where: 'wins > 0', per_prompt: 1}\n  - train: sft\n"
    expected = end(run_of(tmp_path / "whole", steps, None))
    with Faults() as counted:
        run_of(tmp_path / "count", steps, None)
    for at in range(3, counted.count, max(1, counted.count // 4)):
        with pytest.raises(Killed), Faults(at):
            run_of(tmp_path / str(at), steps, None)
        assert end(run_of(tmp_path / str(at), steps, None)) == expected


# ---- lint ----


def found(folder, step: str) -> str:
    folder.mkdir(exist_ok=True, parents=True)
    try:
        recipe_in(folder, f"{HEAD}steps:\n{SAMPLE}  - score: {step}\n  - train: sft\n")
        return lint(str(folder / "sums.yaml")).text()
    except RecipeError as error:
        return str(error)


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{classifier: nowhere/at/all}", "there is no folder 'nowhere/at/all'"),
        ("{classifier: nli}", "3 classes, and none is named: write label. There are: entailment, neutral, contradiction"),
        ("{classifier: nli, label: yes}", "no class"),
        ("{per_step: nli, label: neutral}", "this needs one that ends in ForTokenClassification or ForCausalLM"),
        (
            "{logprob: policy, label: neutral}",
            "'label' belongs to classifier and pairwise and per_step, and this is scored by logprob",
        ),
        ("{logprob: policy, reduce: min}", "'min' does not reduce logprob: sum, mean, probability do"),
        ("{per_step: nli, good: +}", "by two tokens: write both"),
        ("{pairwise: nli, label: neutral, second: '{{ of.text }}'}", "it does not show the one that it is compared with"),
        ("{logprob: policy, target: '{{ prompt.nothing }}'}", "no prompt has 'nothing'"),
        ("{entropy: policy@best}", "which round is best?"),
        ("{classifier: nli, label: neutral, second: '{{ of.text }}'}", "a second text only where there is a first"),
    ],
)
def test_lint_names_the_line_of_what_cannot_be(tmp_path, step, said):
    classifier(tmp_path / "nli", ["entailment", "neutral", "contradiction"], template=False)
    text = found(tmp_path, step)
    assert said in text and "sums.yaml:" in text


def test_two_sources_of_one_score_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="give one of 'reward', 'logprob'"):
        recipe_in(tmp_path, f"{HEAD}steps:\n{SAMPLE}  - score: {{logprob: policy, entropy: policy}}\n")


def test_a_model_that_gives_no_scores_is_refused_when_the_run_is_created(tmp_path):
    folder = classifier(tmp_path / "rm", ["reward"])
    (folder / "config.json").write_text('{"architectures": ["LlamaModel"]}')
    recipe = recipe_in(tmp_path, f"{HEAD}steps:\n{SAMPLE}  - score: {{classifier: rm}}\n")
    with pytest.raises(RecipeError, match="it is a LlamaModel, and this needs one that ends in ForSequenceClassification"):
        Run.open(recipe, tmp_path / "run", Machine(backend="local"))


@pytest.mark.parametrize("text", ["{{ prompt.answer | upper }}", "{{ prompt.answer | int }}", "{{ prompt.answer[::-1] }}"])
def test_what_is_made_of_a_gold_answer_that_is_not_there_is_refused_as_it_is_itself(text):
    template = templates.load(text, [])

    def render(prompt, messages, of=None, **more):
        return [{"role": "user", "content": template.render(prompt=templates.prompt_of(prompt), of=of, **more)}]

    prompt = {"messages": [{"role": "user", "content": "q"}], "answer": None, "meta": "{}"}
    with pytest.raises(UsageError, match="no gold answer to show"):
        written(render, prompt, {"text": "x"})
