"""Reward functions as they are written for TRL run unchanged, whether they were written for texts or for lists of messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scoring import Write, results, row, write

from selfkd.rewards.advice import way_out
from selfkd.rewards.check import check_parameters
from selfkd.rewards.contract import Result

__all__ = ["write"]  # a fixture

SYSTEM = {"role": "system", "content": "Think first."}
XML = "<reasoning>\n2 + 2\n</reasoning>\n<answer>\n{}\n</answer>\n"


def asked(completion: str, answer: str | None = "4", **meta: Any) -> dict[str, Any]:
    messages = [SYSTEM, {"role": "user", "content": "What is 2 + 2?"}]
    return row(completion, answer, **meta) | {"prompt": "What is 2 + 2?", "messages": messages}


def scores(function: Any, *rows: dict[str, Any]) -> list[float | None]:
    got: list[Result] = results(function, list(rows))
    assert all(value is not None or why.startswith("abstained") for value, why in got), got
    return [value for value, _ in got]


# --------------------------------------------------------------------------------------------------- written for messages

GSM8K = """
import re

def extract_xml_answer(text: str) -> str:
    answer = text.split("<answer>")[-1]
    answer = answer.split("</answer>")[0]
    return answer.strip()

def count_xml(text) -> float:
    return 0.5 * text.count("<answer>")

def correctness(prompts, completions, answer, **kwargs) -> list[float]:
    responses = [completion[0]['content'] for completion in completions]
    q = prompts[0][-1]['content']
    extracted = [extract_xml_answer(r) for r in responses]
    print('-' * 20, f"Question:\\n{q}", f"\\nAnswer:\\n{answer[0]}", f"\\nResponse:\\n{responses[0]}")
    return [2.0 if r == a else 0.0 for r, a in zip(extracted, answer)]

def is_int(completions, **kwargs) -> list[float]:
    responses = [completion[0]['content'] for completion in completions]
    return [0.5 if extract_xml_answer(r).isdigit() else 0.0 for r in responses]

def strict_format(completions, **kwargs) -> list[float]:
    pattern = r"^<reasoning>\\n.*?\\n</reasoning>\\n<answer>\\n.*?\\n</answer>\\n$"
    responses = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, r, flags=re.DOTALL) for r in responses]
    return [0.5 if match else 0.0 for match in matches]

def xmlcount(completions, **kwargs) -> list[float]:
    contents = [completion[0]["content"] for completion in completions]
    return [count_xml(c) for c in contents]

def system_seen(prompts, completions, **kwargs):
    return [float(p[0]["role"] == "system" and c[0]["role"] == "assistant") for p, c in zip(prompts, completions)]
"""


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("correctness", 2.0, 0.0),
        ("is_int", 0.5, 0.0),
        ("strict_format", 0.5, 0.0),
        ("xmlcount", 0.5, 0.0),
        ("system_seen", 1, 1),
    ],
)
def test_the_rewards_of_the_copied_gsm8k_script_read_messages(write: Write, name: str, right: float, wrong: float) -> None:
    assert scores(write(GSM8K, name), asked(XML.format(4)), asked("it is five")) == [right, wrong]


READERS = {  # ways to take the text out of a completion, each "4"
    "a loop": "out = []\n    for completion in completions:\n        out.append(completion[0]['content'])\n    return same(out, answer)",
    "enumerate and zip": (
        "out = [''] * len(completions)\n    for i, (c, a) in enumerate(zip(completions, answer)):\n"
        "        out[i] = c[-1].get('content', '')\n    return same(out, answer)"
    ),
    "a helper": "return same([text_of(c) for c in completions], answer)",
    "a helper of a helper": "return same(texts_of(completions), answer)",
    "map": "return same(list(map(text_of, completions)), answer)",
    "a lambda": "return same(list(map(lambda c: c[0]['content'], completions)), answer)",
    "a function inside": "def inner(c):\n        return c[0]['content']\n    return same([inner(c) for c in completions], answer)",
    "both forms": "return same([c[0]['content'] if isinstance(c, list) else c for c in completions], answer)",
    "all messages": "return same([''.join(m['content'] for m in c if m['role'] == 'assistant') for c in completions], answer)",
    "an async function inside": (
        "async def inner(c):\n        return c[0]['content']\n    import asyncio\n"
        "    async def all_of_them():\n        return await asyncio.gather(*[inner(c) for c in completions])\n"
        "    return same(asyncio.new_event_loop().run_until_complete(all_of_them()), answer)"
    ),
    "a function that calls itself": "return same([deep(c) for c in completions], answer)",
    "a name on the way": "firsts = [c[0] for c in completions]\n    return same([m['content'] for m in firsts], answer)",
    "a pattern": (
        "out = []\n    for c in completions:\n        match c:\n            case [{'content': text}]:\n                out.append(text)\n"
        "            case _:\n                out.append('')\n    return same(out, answer)"
    ),
    "a pattern that names the message": (
        "out = []\n    for c in completions:\n        match c:\n            case [message, *_]:\n                out.append(message['content'])\n"
        "            case _:\n                out.append('')\n    return same(out, answer)"
    ),
    "a key of the module": "return same([c[0][KEY] for c in completions], answer)",
    "a key of the function": "key = 'content'\n    return same([c[0][key] for c in completions], answer)",
    "a list that is filled": (
        "found = []\n    for c in completions:\n        found.append(c[0])\n    return same([m['content'] for m in found], answer)"
    ),
    "a list that grows": (
        "found = []\n    for c in completions:\n        found += c\n    return same([m['content'] for m in found], answer)"
    ),
    "prompt and completion together": (
        "return same([(p + c)[-1]['content'] for p, c in zip(kwargs['prompts'], completions)], answer)"
    ),
    "an exception caught": (
        "out = []\n    for c in completions:\n        try:\n            out.append(c[0]['content'])\n"
        "        except Exception:\n            out.append('')\n    return same(out, answer)"
    ),
}
HELPERS = """
KEY = "content"
def text_of(message):
    return message[0]["content"]
def texts_of(many):
    return [text_of(one) for one in many]
def deep(message):
    return deep(message[0]) if isinstance(message, list) else message.get("content")
def same(texts, answers):
    return [float(text == gold) for text, gold in zip(texts, answers)]
"""


@pytest.mark.parametrize("way", READERS)
def test_however_the_text_is_taken_out_of_a_message_it_is_there(write: Write, way: str) -> None:
    f = write(f"{HELPERS}\ndef f(completions, answer, **kwargs):\n    {READERS[way]}")
    assert scores(f, asked("4"), asked("5")) == [1.0, 0.0]


def test_completions_taken_out_of_kwargs_are_messages_too(write: Write) -> None:
    f = write("def f(**kwargs):\n    return [float(c[0]['content'] == '4') for c in kwargs['completions']]")
    assert scores(f, asked("4"), asked("5")) == [1.0, 0.0]
    g = write(
        "def inner(completions, **kwargs):\n    return [len(c[0]['content']) for c in completions]\ndef g(**kwargs):\n    return inner(**kwargs)",
        "g",
    )
    assert scores(g, asked("four"), asked("5")) == [4.0, 1.0]


def test_an_annotation_says_what_a_function_reads_where_its_code_does_not(write: Write) -> None:
    f = write(
        "def f(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:\n    return [float(len(c)) for c in completions]"
    )
    assert scores(f, asked("four")) == [1.0]


def test_a_class_whose_method_reads_messages_is_called_with_messages(write: Write) -> None:
    source = """
class Right:
    __name__ = "right"
    def __init__(self, worth=1.0): self.worth = worth
    def text(self, completion): return completion[0]["content"]
    def __call__(self, completions, answer, **kwargs):
        return [self.worth * (self.text(c) == a) for c, a in zip(completions, answer)]
right = Right(3.0)
"""
    assert scores(write(source, "right"), asked("4"), asked("5")) == [3.0, 0.0]
    assert scores(write(source, "Right"), asked("4"), asked("5")) == [1.0, 0.0]


def test_a_run_that_is_named_by_a_relative_path_reads_the_function_all_the_same(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker works in a folder of its own, where a relative path leads nowhere."""
    function = write(GSM8K, "correctness")
    monkeypatch.chdir(tmp_path.parent)
    relative = replace(function, path=Path(tmp_path.name) / "mine.py")
    assert scores(relative, asked(XML.format(4))) == [2.0]


# ------------------------------------------------------------------------------------------------------ written for texts

TEXTS = """
import re

def match_format(completions, target, nums, **kwargs):
    rewards = []
    for completion, gt, numbers in zip(completions, target, nums):
        try:
            completion = "<think>" + completion
            match = re.search(r"<answer>(.*?)<\\\\/answer>", completion)
            rewards.append(float(match is not None and [int(n) for n in re.findall(r"\\\\d+", match[1])] == sorted(numbers)))
        except Exception:
            rewards.append(0.0)
    return rewards

def length(completions, **kwargs):
    return [-abs(20 - len(completion)) / 20 for completion in completions]

def words(prompts, completions, **kwargs):
    return [float(prompt.endswith("?") and completion.isdigit()) for prompt, completion in zip(prompts, completions)]

def judged(prompts, completions, **kwargs):
    asked = [[{"role": "user", "content": f"{p} {c}"}] for p, c in zip(prompts, completions)]
    answers = [{"choices": [{"message": {"content": messages[0]["content"][-1]}}]} for messages in asked]
    return [float(answer["choices"][0]["message"]["content"] == "4") for answer in answers]

async def later(completions, **kwargs):
    return [len(c) for c in completions]
""".replace("\\\\", "\\")


def test_functions_written_for_texts_get_texts(write: Write) -> None:
    right, wrong = asked("<answer>1 + 3</answer>", target=4, nums=[3, 1]), asked("none", target=4, nums=[3, 1])
    assert scores(write(TEXTS, "match_format"), right, wrong) == [1.0, 0.0]
    assert scores(write(TEXTS, "length"), asked("x" * 20), asked("x" * 10)) == [0.0, -0.5]
    assert scores(write(TEXTS, "words"), asked("4"), asked("four")) == [1.0, 0.0]
    assert scores(write(TEXTS, "later"), asked("four")) == [4.0]


def test_a_judge_that_writes_messages_of_its_own_still_gets_texts(write: Write) -> None:
    assert scores(write(TEXTS, "judged"), asked("4"), asked("5")) == [1.0, 0.0]


def test_a_message_read_from_what_cannot_be_seen_is_a_reason_with_a_way_out(write: Write) -> None:
    f = write(
        "import operator\nREAD = {'text': lambda c: c[0]['content']}\ndef f(completions, **kwargs):\n    return [READ['text'](c) for c in completions]"
    )
    ((value, why),) = results(f, [asked("4")])
    assert value is None and why.startswith("TypeError: string indices must be integers")
    assert "completions: list[list[dict]]" in way_out(why, "mine.py")
    told = write(
        "import operator\nREAD = {'text': lambda c: c[0]['content']}\ndef f(completions: list[list[dict]], **kwargs):\n    return [float(READ['text'](c)) for c in completions]"
    )
    assert scores(told, asked("4")) == [4.0]


# -------------------------------------------------------------------------------------------------- what TRL passes beside

LOGGED = """
def f(prompts, completions, completion_ids, answer, trainer_state, log_metric, log_extra, **kwargs):
    right = [float(c == a) for c, a in zip(completions, answer)]
    log_extra("answer", list(answer))
    log_metric("accuracy", sum(right) / len(right))
    assert "trainer_state" not in kwargs and trainer_state.is_world_process_zero
    return [r * (1 - trainer_state.global_step / trainer_state.max_steps) + trainer_state.epoch for r in right]
"""


def test_the_state_of_the_trainer_and_the_logs_are_given(write: Write) -> None:
    f = write(LOGGED)
    assert check_parameters(f, []) == []
    assert scores(f, asked("4"), asked("5")) == [1.0, 0.0]
    rest = write(
        "def f(completions, **kwargs):\n    kwargs['log_metric']('n', 1.0)\n    return [kwargs['trainer_state'].global_step]"
    )
    assert scores(rest, asked("4")) == [0.0]
    plain = write("def f(completions, log_extra=None):\n    log_extra('c', completions)\n    return [1.0]")
    assert check_parameters(plain, []) == [] and scores(plain, asked("4")) == [1.0]


def test_the_gold_answer_is_given_under_the_names_of_trl_where_no_column_has_them(write: Write) -> None:
    f = write("def f(completions, solution, **kwargs): return [float(c == s) for c, s in zip(completions, solution)]")
    assert check_parameters(f, []) == [] and scores(f, asked("4"), asked("5")) == [1.0, 0.0]
    assert scores(f, asked("4", solution="5"), asked("5", solution="5")) == [0.0, 1.0]
    assert results(f, [asked("4", None)]) == [(None, "no 'solution' in the meta of this prompt")]
    (problem,) = check_parameters(write("def f(completion, solution): return 1"), [])
    assert "asks for 'solution'" in problem and "The gold answer is called 'answer'" in problem


def test_the_gold_answer_is_in_kwargs_too_where_no_column_has_the_names_of_trl(write: Write) -> None:
    for name in ("solution", "ground_truth"):
        f = write(f"def f(completions, **kwargs): return [float(c == s) for c, s in zip(completions, kwargs['{name}'])]")
        assert scores(f, asked("4"), asked("5")) == [1.0, 0.0]
        assert scores(f, asked("4", **{name: "5"}), asked("5", **{name: "5"})) == [0.0, 1.0]


def test_a_function_of_one_sample_has_no_trainer(write: Write) -> None:
    (problem,) = check_parameters(write("def f(completion, trainer_state): return 1"), [])
    assert "'trainer_state'" in problem


def test_token_ids_that_are_not_known_are_no_empty_list(write: Write) -> None:
    f = write("def f(completion_ids, **kwargs):\n    return [-float(len(ids) > 3) for ids in completion_ids]")
    assert results(f, [asked("4") | {"token_ids": None}]) == [(None, "the token ids of this completion are not known")]
    assert scores(f, asked("4") | {"token_ids": [1, 2, 3, 4]}) == [-1.0]


# ---------------------------------------------------------------------------------------------------------- TRL's own ones

SHIPPED = """
from trl.rewards import accuracy_reward, get_cosine_scaled_reward, get_repetition_penalty_reward
from trl.rewards import get_soft_overlong_punishment, reasoning_accuracy_reward, think_format_reward
overlong = get_soft_overlong_punishment(max_completion_len=10, soft_punish_cache=4)
repeated = get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
cosine = get_cosine_scaled_reward(max_len=100)
"""


def test_the_rewards_that_trl_ships_run_unchanged(write: Write) -> None:
    pytest.importorskip("trl")
    pytest.importorskip("math_verify")

    def said(name: str, *rows: dict[str, Any]) -> list[float | None]:
        return [value and round(value, 3) for value in scores(write(SHIPPED, name), *rows)]

    boxed = [asked(f"It is $\\boxed{{{said}}}$", solution="$4$") for said in (4, 5)]
    assert said("accuracy_reward", *boxed) == [1.0, 0.0]
    assert said("think_format_reward", asked("<think>\nhm\n</think>\n4"), asked("<think>4")) == [1.0, 0.0]
    thought = asked("<think> so </think> It is $\\boxed{4}$", solution="$4$")
    assert said("reasoning_accuracy_reward", thought, asked("<think> $\\boxed{4}$", solution="$4$")) == [1.0, 0.0]
    assert said("overlong", *(asked("4") | {"token_ids": [7] * n} for n in (6, 8, 11))) == [0.0, -0.5, -1.0]
    assert said("repeated", asked("4") | {"token_ids": [5, 5, 5, 5, 5]}, asked("4") | {"token_ids": [1, 2, 3]}) == [-0.75, 0.0]
    halves = [one | {"token_ids": [1] * 50} for one in boxed]
    assert said("cosine", *halves) == [0.75, -0.75]
