"""What lint says of a loss that is a function: parameters, rows, columns, references, and whether it is row-wise."""

from __future__ import annotations

import math
import re
from pathlib import Path

import consoles
import polars as pl
import pytest
from chains import RECIPE, end, go, recipe_in

from selfkd.backend.base import TrainSpec
from selfkd.backend.fake import Fake
from selfkd.chain import updates
from selfkd.chain.run import Run
from selfkd.core.pool import Function, Model, shape
from selfkd.errors import RecipeError
from selfkd.recipe import library
from selfkd.recipe.lint import lint, look
from selfkd.report.verify import verify

TRAIN = "  - train: {loss: sft}\n"
SFT = "def mine(logps, mask):\n    return -(logps * mask).sum(1)\n"


def recipe(folder: Path, train: str, loss: str = SFT, build: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(loss)
    return recipe_in(folder, RECIPE.replace(TRAIN, f"{build}  - train: {train}\n"), "rounds=1")


def said(folder: Path, train: str, loss: str = SFT, build: str = "") -> list[str]:
    """What is found without running anything of the user's."""
    return look(recipe(folder, train, loss, build))[0].problems


PAIRS = '  - build: {kind: pair, chosen: "last_number = 1", rejected: "chars > 1"}\n'
LABEL = '  - build: {kind: label, label: "last_number = 1"}\n'
RATE = LABEL.replace("}", ", columns: {rate: '0.5'}}")
GAIN = '  - build: {columns: {gain: "chars / 2"}}\n'


@pytest.mark.parametrize(
    ("train", "loss", "build", "wanted"),
    [
        ("{loss: 'mine.py:other'}", SFT, "", "no function 'other' in .*mine.py"),
        ("{loss: 'missing.py:mine'}", SFT, "", "no file 'missing.py'"),
        ("{loss: 'mine.py:mine'}", "def mine(logps\n", "", r"not Python"),
        ("{loss: 'mine.py:1'}", SFT, "", "'mine.py:1' does not name a function: write file.py:function"),
        ("{loss: sftt}", SFT, "", "should be 'sft', 'dpo'.* or file.py:function, not 'sftt'.*Did you mean 'sft'"),
        (
            "{loss: 'mine.py:mine'}",
            "def mine(logps, gain): ...",
            "",
            r"mine.py:1  mine asks for 'gain', which its rows do not have. Write `columns: \{gain: ...\}` in the build step",
        ),
        (
            "{loss: 'mine.py:mine'}",
            "\n\ndef mine(logps, gian): ...",
            GAIN,
            r"mine.py:3  mine asks for 'gian', which its rows do not have \(columns of the rows: gain\). Did you mean 'gain'",
        ),
        ("{loss: 'mine.py:mine'}", "def mine(logps, weight): ...", "", "multiplies each value with its row's weight already"),
        ("{loss: 'mine.py:mine'}", "def mine(logps, ref_logps): ...", "", "names no reference model: write `reference: start`"),
        ("{loss: 'mine.py:mine', reference: start}", SFT, "", "never looks at the reference model"),
        ("{loss: 'mine.py:mine'}", "def mine(mask): ...", "", "asks for none of 'logps', so nothing could be learned"),
        ("{loss: 'mine.py:mine', params: {gamma: 1}}", SFT, "", "has no parameter 'gamma'"),
        ("{loss: 'mine.py:mine'}", "def mine(logps, chosen_logps): ...", "", "which sft rows do not have: write `rows: pair`"),
        ("{loss: 'mine.py:mine'}", SFT, PAIRS, "needs rows of kind sft; 'rows' holds pair rows: write `rows: pair`"),
        ("{loss: 'mine.py:mine', rows: label}", SFT, "", "needs rows of kind label in stream 'rows'"),
        ("{loss: 'mine.py:mine', trl: {loss_type: dft}}", SFT, "", "trl.loss_type has no meaning for loss mine.py:mine"),
        ("{loss: 'mine.py:mine', beta: 0.2}", SFT, "", "'beta' belongs to loss: dpo"),
        ("{loss: sft, rows: pair}", SFT, "", "'rows' belongs to loss: file.py:function"),
        (
            "{loss: sft, params: {a: 1}}",
            SFT,
            "",
            "'params' belongs to loss: kto, nft, sppo, cream, rrhf, pro, kd, file.py:function",
        ),
        (
            "{loss: 'mine.py:mine', reference: start, lora: {r: 2, dropout: 0.1}}",
            "def mine(logps, ref_logps): ...",
            "",
            "switches dropout off, also the adapter's: leave it out",
        ),
        ("{loss: nft}", SFT, LABEL, r"nft.py:\d+  nft asks for 'rate', which its rows do not have. Write `columns: \{rate: "),
        ("{loss: nft, params: {clmap: 0.1}}", SFT, RATE, "has no parameter 'clmap'. Did you mean 'clamp'"),
        ("{loss: kto}", SFT, PAIRS, "loss kto needs rows of kind label; 'rows' holds pair rows$"),
        ("{loss: ipo, trl: {loss_type: hinge}}", SFT, PAIRS, "trl.loss_type has no meaning for loss ipo"),
        (
            "{loss: 'mine.py:mine', rows: label}",
            "def mine(logps, kl): ...",
            LABEL,
            "asks for 'kl', and the step names no reference model",
        ),
        ("{loss: 'mine.py:mine'}", SFT, "  - build: {kind: label}\n", "'label' and kind: label belong together"),
        ("{loss: 'mine.py:mine'}", SFT, "  - build: {columns: {mask: '1'}}\n", "cannot be called 'mask'"),
        ("{loss: 'mine.py:mine'}", SFT, "  - build: {columns: {gain: 'charss'}}\n", "no column 'charss'"),
        ("{loss: 'mine.py:mine'}", SFT, "  - build: {columns: {gain: 'stream'}}\n", "gives a text, where a number is wanted"),
    ],
)
def test_what_does_not_fit_is_told_with_its_line(tmp_path, train, loss, build, wanted):
    try:
        found = said(tmp_path, train, loss, build)
    except RecipeError as error:
        found = str(error).splitlines()
    line = RECIPE.splitlines().index(TRAIN.rstrip()) + 1
    assert any(re.search(wanted, one) for one in found), found
    assert any(re.search(rf"sums.yaml:{line}|sums.yaml:{line + 1}", one) for one in found), found


def test_a_sound_loss_is_no_problem_whoever_makes_its_rows(tmp_path):
    assert said(tmp_path / "a", "{loss: 'mine.py:mine'}") == []
    assert said(tmp_path / "b", "{loss: 'mine.py:mine'}", "def mine(logps, gain, more=2): ...", GAIN) == []
    pair = "def mine(chosen_logps, rejected_logps, ref_chosen_logps, scale): ...\n"
    words = "{loss: 'mine.py:mine', rows: pair, reference: base, params: {scale: 2}}"
    assert said(tmp_path / "c", words, pair, PAIRS) == []
    label = '  - build: {kind: label, label: "last_number = 1"}\n'
    assert said(tmp_path / "d", "{loss: 'mine.py:mine', rows: label}", "def mine(logps, label): ...", label) == []


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("v = -(logps * mask).sum(1)\n    return v - v.mean()", "mine.py:1  mine: the loss cannot be split: the value of row"),
        ("return (logps * mask).sum(1).detach()", "mine.py:1  mine: the loss has no gradient"),
        ("return undefined", "mine.py:1  mine: the loss raised NameError"),
    ],
)
def test_a_loss_that_is_not_row_wise_is_a_problem_before_the_run(tmp_path, body, problem):
    found = lint(recipe(tmp_path, "{loss: 'mine.py:mine'}", f"def mine(logps, mask):\n    {body}\n")).problems
    [one] = found
    assert problem in one and "sums.yaml" in one


def test_what_made_up_columns_may_do_to_a_loss_is_a_note_and_its_examples_are_run(tmp_path):
    loss = '''import torch
def mine(logps, mask, gain):
    """
    >>> 1 + 1
    3
    """
    assert gain.min() > 5
    return -(logps * mask).sum(1) * gain
'''
    report = lint(recipe(tmp_path, "{loss: 'mine.py:mine'}", loss, GAIN))
    [problem] = report.problems
    assert "mine.py:4  1 + 1 gives 2, expected 3" in problem
    sound = lint(recipe(tmp_path, "{loss: 'mine.py:mine'}", loss.replace("    3\n", "    2\n"), GAIN))
    assert sound.problems == []
    assert any("raised AssertionError" in note and "made-up 'gain'" in note for note in sound.notes)


def test_the_loss_of_the_documents_works_as_printed(tmp_path):
    [code], [steps, distilled, labels] = (consoles.blocks(consoles.DOCS / "losses.md", kind) for kind in ("python", "yaml"))
    (tmp_path / "mine.py").write_text(code)
    written = recipe_in(tmp_path, RECIPE[: RECIPE.index("steps:")] + steps, "rounds=1")
    report = lint(written)
    assert report.problems == [] and not any("mine.py" in note for note in report.notes)
    run = go(written, tmp_path / "run")
    rows = run.rows(1, step="build")
    gains = [{column["name"]: column["value"] for column in row} for row in rows["columns"].to_list()]
    assert {gain for [gain] in (one.keys() for one in gains)} == {"gain"}
    assert abs(sum(one["gain"] for one in gains)) < 1e-9 and verify(run.folder).problems == []
    taught = recipe_in(tmp_path / "kd", RECIPE[: RECIPE.index("steps:")] + distilled, "rounds=1")
    rows = go(taught, tmp_path / "kd/run").rows(1, step="build")
    assert set(rows["kind"]) == {"kd"}
    second = recipe_in(tmp_path / "nft", RECIPE[: RECIPE.index("steps:")] + labels, "rounds=1")
    assert lint(second).problems == []
    rows = go(second, tmp_path / "nft/run").rows(1, step="build")
    shares = rows.with_columns(pl.col("columns").list.first().struct.field("value").alias("rate"), prompt="messages")
    by_prompt = shares.group_by(pl.col("prompt").list.first().struct.field("content")).agg(pl.col("label").mean(), "rate")
    assert rows.height == 12 * 8 and set(rows["kind"]) == {"label"}
    assert all(rate == [share] * 8 for share, rate in by_prompt.select("label", "rate").iter_rows())


RANK = '  - build: {kind: rank, by: chars, answers: 2, columns: {gain: "chars / 2"}}\n'


def test_a_ranking_holds_the_best_answers_of_a_prompt_in_their_order(tmp_path):
    score = "def mine(logps, mask, scores, gain): ..."
    recipe(tmp_path, "{loss: 'mine.py:mine', rows: rank}", score, RANK)
    text = (tmp_path / "sums.yaml").read_text().replace('  - select: {where: "last_number = 1", per_prompt: 2}\n', "")
    written = recipe_in(tmp_path, text, "rounds=1")
    assert look(written)[0].problems == []
    run = go(written, tmp_path / "run")
    rows, samples = run.rows(1, step="build"), run.samples(1)
    assert rows.height == 12 and set(rows["kind"]) == {"rank"} and verify(run.folder).problems == []
    for row in rows.iter_rows(named=True):
        known = samples.filter(pl.col("id").is_in(row["samples"]))
        prompt = samples.filter(pl.col("prompt") == known["prompt"][0]).sort("chars", "tiebreak", descending=[True, False])
        assert row["samples"] == prompt["id"][:2].to_list() and row["rejected"] is None
        assert [(one["text"], one["score"]) for one in row["ranked"]] == list(
            prompt.select("text", "chars").head(2).iter_rows()
        )
        assert row["chosen"] == row["ranked"][0]["text"] and row["columns"] == [
            {"name": "gain", "value": row["ranked"][0]["score"] / 2}
        ]


@pytest.mark.parametrize(
    ("build", "wanted"),
    [
        ("  - build: {kind: rank}\n", "kind: rank needs 'by', the score of an answer"),
        ("  - build: {kind: rank, by: stream}\n", "'by'.* gives a text, where a number is wanted"),
        ("  - build: {kind: sft, answers: 3}\n", "'answers' is for kind: rank"),
        (RANK, "^nothing$"),
        (LABEL, "loss pro needs rows of kind rank; 'rows' holds label rows"),
    ],
)
def test_what_a_ranking_lacks_is_told(tmp_path, build, wanted):
    try:
        found = said(tmp_path, "{loss: pro}", SFT, build) or ["nothing"]
    except RecipeError as error:
        found = str(error).splitlines()
    assert any(re.search(wanted, one) for one in found), found


# Identity: the code of a loss is what made a step, and what names an update


def test_an_edited_loss_is_another_step_and_a_comment_is_not(tmp_path):
    words = "{loss: 'mine.py:mine'}"
    ends = {}
    for name, loss in (("a", SFT), ("b", SFT + "# a remark\n"), ("c", SFT.replace("sum(1)", "sum(1) * 2"))):
        ends[name] = end(go(recipe(tmp_path / name, words, loss), tmp_path / name / "run"))
    assert ends["a"] == ends["b"] != ends["c"]
    ends["d"] = end(go(recipe(tmp_path / "d", "{loss: 'mine.py:mine', average: tokens}"), tmp_path / "d/run"))
    assert ends["d"] != ends["a"]


def test_a_recipe_is_copied_with_its_losses_those_of_a_name_too(tmp_path):
    recipe(tmp_path, "{loss: 'mine.py:mine'}")
    assert {path.name for path in library.copy(str(tmp_path / "sums.yaml"), tmp_path / "a")} >= {"sums.yaml", "mine.py"}
    recipe(tmp_path, "{loss: nft}", build=RATE)
    assert tmp_path / "b/loss/nft.py" in library.copy(str(tmp_path / "sums.yaml"), tmp_path / "b")


def test_a_run_trains_with_the_loss_that_was_frozen_in_it(tmp_path):
    seen = []

    class Looking(Fake):
        def train(self, start, reference, rows, spec, *rest, **more):
            seen.append(spec.function)
            return super().train(start, reference, rows, spec, *rest, **more)

    run = go(recipe(tmp_path, "{loss: 'mine.py:mine', params: {}}"), tmp_path / "run", Looking({}))
    [function] = seen
    assert function.path.is_relative_to(tmp_path / "run/code") and function.path.read_text() == SFT
    (tmp_path / "mine.py").write_text("raise SystemExit\n")
    assert Run.at(run.folder).function("mine.py:mine", {}).path.read_text() == SFT


def test_what_decides_a_loss_names_its_update_and_where_it_lies_does_not():
    start, rows = Model("policy", "a", "1"), shape("rows", [{"id": "x", "chosen": "y", "weight": 1.0}])

    def named(path="a.py", code="1", params=None, **more):
        function = Function("mine", Path(path), code, params or {})
        return updates.key(start, None, rows, TrainSpec("mine.py:mine", 3, function=function, **more), {})

    first = named()
    assert named(path="b/a.py") == first
    others = [named(code="2"), named(params={"a": 1}), named(rows="pair"), named(average="tokens")]
    assert len({first, *others}) == 5


def test_rows_whose_numbers_are_none_are_dropped_with_the_reason(tmp_path):
    """`number` is that of a prompt's sample, 0 to 2: the label of the first is null, and the logarithm of its number is none."""
    label = '  - build: {kind: label, label: "CASE WHEN number = 1 THEN NULL ELSE last_number END", columns: {gain: "LN(number)"}}\n'
    recipe(tmp_path, "{loss: 'mine.py:mine', rows: label}", "def mine(logps, label, gain): ...", label)
    text = (tmp_path / "sums.yaml").read_text().replace('where: "last_number = 1", per_prompt: 2', "limit: 30")
    run = go(recipe_in(tmp_path, text, "rounds=1"), tmp_path / "run")
    rows, drops = run.rows(1, step="build"), run.made(1)["build"].tables["drops"]
    reasons = pl.concat([pl.read_parquet(run.folder / path) for path in drops.files])["reason"].value_counts()
    assert reasons.rows() == [("its label or a column of it is no number", 30 - rows.height)]
    assert 0 < rows.height < 30 and set(rows["kind"]) == {"label"} and set(rows["label"]) <= {0.0, 1.0}
    assert {(column["name"], column["value"]) for row in rows["columns"] for column in row} == {("gain", math.log(2))}
