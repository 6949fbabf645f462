"""The shipped recipe lmsi, walked with a scripted model.

Derived by hand from Huang et al. 2022 (arXiv 2210.11610), sections 3.1 to 3.3: 32 paths to each question at T 0.7 behind worked examples; the most
frequent result wins, at whatever share; every path that gives it is kept; each becomes four rows: with reasons behind worked examples,
result alone behind examples with results alone, with reasons behind a cue to think first, result alone behind the bare question; one round.

    question   32 paths                                                     kept   rows
    2 + 2      13 say 4, 10 say 5, 9 say 6: 4 wins with 13 of 32            13     4 * 13
    3 + 3      16 say 6 and 16 say 7: tied                                  none
    4 + 4      20 say 9 (wrong, and nobody knows), 12 say 8                 20     4 * 20
    5 + 5      all say 10; one of them is far longer than twice the mean    31     4 * 31 (the guard is ours)
    6 + 6      31 say "#### 12", one says "it is 12." with no ####          32     2 * 32 with reasons, 2 * 31 of results (ours)
"""

from __future__ import annotations

from collections import Counter

import pytest
from golden import Golden, golden

VOTES = {
    "2 + 2": ["4"] * 13 + ["5"] * 10 + ["6"] * 9,
    "3 + 3": ["6"] * 16 + ["7"] * 16,
    "4 + 4": ["9"] * 20 + ["8"] * 12,
    "5 + 5": ["10"] * 32,
    "6 + 6": ["12"] * 32,
}
WON = {"2 + 2": ("4", 13), "4 + 4": ("9", 20), "5 + 5": ("10", 31), "6 + 6": ("12", 32)}


def says(messages: list[dict[str, str]], time: int) -> str:
    asked = next((sum_ for sum_ in VOTES if f"Question: What is {sum_}?\nAnswer:" in messages[-1]["content"]), "")
    if not asked:
        return "#### 7"
    if asked == "6 + 6" and time == 31:
        return "Path 31, and so it is 12."
    padding = "on and on " * (10 if asked == "5 + 5" and time == 31 else 0)
    return f"Path {time:02} {padding}leads here.\n#### {VOTES[asked][time]}"


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    return golden("lmsi", says, tmp_path_factory.mktemp("lmsi"), [{"prompt": f"What is {sum_}?"} for sum_ in VOTES], test=None)


def test_32_paths_are_drawn_from_the_model_behind_worked_examples(walked):
    base = walked.weights()[0]
    assert walked.asked("sample") == {(base, 0.7, 1.0)}
    samples = walked.table(1, "sample", "samples")
    assert samples.height == 5 * 32
    assert all("A baker has 4 trays" in messages[-1]["content"] for messages in samples["teacher_messages"])


def test_each_path_that_agrees_with_the_plurality_becomes_a_row_in_each_of_four_forms(walked):
    [update] = walked.backend.updates
    found: Counter[tuple[str, str, bool]] = Counter()
    for messages, text in update.rows.select("messages", "chosen").iter_rows():
        shown = messages[-1]["content"]
        asked = next(sum_ for sum_ in VOTES if f"What is {sum_}?" in shown)
        form = (
            "reasons shown" if "are 4 * 12 = 48 rolls" in shown
            else "results shown" if "A baker" in shown
            else "think" if shown == f"What is {asked}?\nLet's think step by step."
            else "bare" if shown == f"What is {asked}?"
            else shown
        )  # fmt: skip
        won = WON[asked][0]
        if form in ("reasons shown", "think"):
            assert text.startswith("Path ") and text.endswith((f"leads here.\n#### {won}", f"it is {won}."))
        else:
            assert text == f"#### {won}"
        found[asked, form, "Path" in text] += 1
    forms = (("reasons shown", True), ("results shown", False), ("think", True), ("bare", False))
    kept = {(asked, form, reasons): count for asked, (_, count) in WON.items() for form, reasons in forms}
    assert found == kept | {("6 + 6", "results shown", False): 31, ("6 + 6", "bare", False): 31}


def test_the_model_is_trained_once_from_itself_as_the_paper_trains(walked):
    [update] = walked.backend.updates
    assert (update.start, update.reference) == (walked.weights()[0], None)
    assert (update.spec.trl["learning_rate"], update.spec.trl["max_steps"]) == (5e-5, 10000)
    assert update.spec.trl["per_device_train_batch_size"] * update.spec.trl["gradient_accumulation_steps"] == 32


def test_the_anchor_is_measured_with_examples_and_without_against_gold_answers(walked):
    assert {"dev/correct", "dev/correct_bare"} <= set(walked.metrics(1))
    assert walked.asked("dev") == {(one, 0.0, 1.0) for one in walked.weights()}
