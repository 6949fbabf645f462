"""The shipped recipe ssd, walked with a scripted model.

Derived by hand from simple self-distillation (arXiv 2604.01193) and its code: one sample of each prompt at T 1.6, top-p 0.8, top-k 20; nothing is
dropped but empty and one-line answers; they are learned as they are, lr 5e-6, once; then the model is sampled at a temperature of its own.

    prompt   its answer                                     row
    one      a program of two lines, right                  as it is
    two      a program of two lines, wrong                  as it is: nobody checks
    three    one line                                       none
    four     nothing                                        none
    six      one line, and empty ones after it              none
    five     two lines of 3,400 letters in all              none: the guard on length is ours
"""

from __future__ import annotations

import pytest
from golden import Golden, golden

SAYS = {
    "one": "def f(x):\n    return x + 1",
    "two": "def f(x):\n    return x - 1",
    "three": "f = abs",
    "four": "",
    "six": "f = abs\n\n",
    "five": "def f(x):\n" + "    # x\n" * 425,
}


def says(messages: list[dict[str, str]], time: int) -> str:
    return SAYS.get(messages[-1]["content"], "```python\ndef f(x):\n    return x\n```")


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Golden:
    dev = [{"prompt": "Write f.", "tests": ["assert f(1) == 1"]}]
    rows = [{"prompt": name} for name in SAYS]
    words = ["sample.max_tokens=8000", "context=16000"]  # so that the length alone is what drops the last one
    words += ["measure.timeout=300", "measure.params={seconds: 60}"]  # limits are of wall time, and the machine may be busy
    return golden("ssd", says, tmp_path_factory.mktemp("ssd"), rows, dev, overrides=words, test=None)


def test_each_prompt_is_sampled_once_at_the_shifted_temperature(walked):
    base = walked.weights()[0]
    assert walked.asked("sample") == {(base, 1.6, 0.8)}
    assert {one.sampling.top_k for one in walked.backend.asked} == {20}
    assert walked.table(1, "sample", "samples").height == 6


def test_all_but_empty_and_one_line_answers_are_learned_as_they_are(walked):
    [update] = walked.backend.updates
    found = {messages[-1]["content"]: text for messages, text in update.rows.select("messages", "chosen").iter_rows()}
    assert found == {name: SAYS[name] for name in ("one", "two")}
    assert (update.start, update.reference) == (walked.weights()[0], None)
    assert (update.spec.loss, update.spec.trl["learning_rate"]) == ("sft", 5e-6)


def test_the_anchor_runs_tests_at_the_temperature_that_goes_with_the_training(walked):
    assert walked.asked("dev") == {(one, 1.1, 0.8) for one in walked.weights()}
    assert walked.metrics(1)["dev/code_tests"] == 1.0 and walked.metrics(1)["dev/code_tests_pass_5"] == 1.0
