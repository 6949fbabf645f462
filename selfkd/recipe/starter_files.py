"""The files of a first recipe, as texts: the rows of each split, the reward with examples of the user's own, and the recipe.

Every number in them is one that a user may change, so each is written where it acts, with its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from selfkd.core import yamlfile
from selfkd.recipe.starter import NUMBER, Found, Kind, Row

REWARD, TEMPLATE = "reward.py", "examples.j2"
TOKEN_CHARS = 3.0  # of a token, at the least that is usual: room is planned by it
LEAST_TOKENS, MOST_TOKENS = 32, 512  # of an answer
MEASURED_TOKENS = (
    256  # at the least: the untouched model talks at length, and cut before its answer it would look worse than it is
)
LEAST_CONTEXT = 512
TAKEN = 128  # prompts of a round
SCORES: Mapping[Kind, str] = {"number": "right", "choice": "right", "short": "right", "text": "overlap", "code": "code_tests"}


def files(found: Found, name: str, model: str) -> dict[str, str]:
    """Return {file name: text} of all that a first recipe called `name` is made of."""
    rows = {f"{split}.jsonl": "".join(map(_line, of)) for split, of in found.splits.items()}
    reward = {} if found.kind == "code" else {REWARD: reward_text(found)}
    shown = {TEMPLATE: template_text(found.examples)} if found.examples else {}
    return {**rows, **reward, **shown, f"{name}.yaml": recipe_text(found, name, model)}


def function_of(kind: Kind) -> str:
    """Return the reward that marks answers of this kind, as the recipe names it."""
    return "reward/code.py:code_tests" if kind == "code" else f"{REWARD}:{SCORES[kind]}"


def _line(row: Row) -> str:
    asked = {"prompt": row.messages[0]["content"]} if row.is_one_question else {"messages": list(row.messages)}
    answer = {} if row.answer is None else {"answer": row.answer}
    taken = (
        "prompt",
        "messages",
        "answer",
    )  # names that the recipe gives to what is asked and to gold: another column of that name moves
    more = {_free(name, row.meta) if name in taken else name: value for name, value in row.meta.items()}
    return json.dumps({**asked, **answer, **more}, ensure_ascii=False) + "\n"


def _free(name: str, meta: Mapping[str, Any]) -> str:
    """Return a name for a column of the data that would pass for the question or its gold answer."""
    name = f"{name}_column"
    return name if name not in meta else _free(name, meta)


def template_text(examples: Sequence[Row]) -> str:
    """Return the template of what the teacher sees: solved rows as turns, then the question. They are data in it, never its own lines."""
    pairs = ",\n  ".join(f"({_word(row.question)}, {_word(row.answer or '')})" for row in examples)
    return (
        "{# Solved questions as turns of the conversation, then the one that is asked. Only the teacher sees them. #}\n"
        f"{{% for question, answer in [\n  {pairs},\n] %}}\n"
        "--- user\n{{ question }}\n--- assistant\n{{ answer }}\n{% endfor %}\n--- user\n{{ prompt.text }}\n"
    )


def _word(text: str) -> str:
    """Return a text as a template writes one: quoted, each sign that Jinja or Python would read escaped."""
    return json.dumps(text, ensure_ascii=False)


# ---------------------------------------------------------------------------------------------------------------- reward


def reward_text(found: Found) -> str:
    """Return a reward whose doctests are the first rows of the user's own."""
    answers = [row.answer.strip() for row in found.splits["train"] if row.answer]
    shown = [text for text in answers if '"""' not in text][:1] or ["42"]
    return {"number": _number, "choice": _choice, "short": _short, "text": _overlap}[found.kind](shown, found.options)


def _number(shown: Sequence[str], _: Sequence[str]) -> str:
    gold = [NUMBER.findall(text)[-1] for text in shown if NUMBER.search(text)][:1] or ["42"]
    return f'''"""How an answer is marked. Called with a completion and the gold answer of its question; docs/rewards.md."""

import re

NUMBER = re.compile(r"{NUMBER.pattern}")


def right(completion: str, answer: str) -> float:
    """1.0 where the last number of the completion equals the last number of the answer.

    >>> right("It is {gold[0]}.", "{gold[0]}"), right("No idea.", "{gold[0]}")
    (1.0, 0.0)
    """
    said, gold = NUMBER.findall(completion), NUMBER.findall(answer)
    return float(bool(said and gold) and value(said[-1]) == value(gold[-1]))


def value(number: str) -> float:
    """
    >>> value("1,042.50")
    1042.5
    """
    return float(number.replace(",", ""))
'''


def _choice(shown: Sequence[str], options: Sequence[str]) -> str:
    other = next(option for option in options if option != shown[0])
    flags = "" if any(len(option) == 1 for option in options) else "(?i)"  # a single letter is a word of its own in lower case
    longest = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    return f'''"""How an answer is marked. Called with a completion and the gold answer of its question; docs/rewards.md."""

import re

OPTIONS = re.compile(r"""{flags}(?<!\\w)(?:{longest})(?!\\w)""")


def right(completion: str, answer: str) -> float:
    r"""1.0 where the last option that the completion names is the answer.

    >>> right({f"It is {shown[0]}."!r}, {shown[0]!r}), right({f"It is {other}."!r}, {shown[0]!r}), right("", {shown[0]!r})
    (1.0, 0.0, 0.0)
    """
    named = OPTIONS.findall(completion)
    return float(bool(named) and named[-1].casefold() == answer.strip().casefold())
'''


def _short(shown: Sequence[str], _: Sequence[str]) -> str:
    return f'''"""How an answer is marked. Called with a completion and the gold answer of its question; docs/rewards.md."""

import re


def right(completion: str, answer: str) -> float:
    r"""1.0 where the last line of the completion says the answer, whatever its case and punctuation.

    >>> right({f"It is {shown[0]}."!r}, {shown[0]!r}), right("", {shown[0]!r})
    (1.0, 0.0)
    """
    last = completion.strip().rpartition("\\n")[2]
    return float(f" {{plain(answer)}} " in f" {{plain(last)}} ")


def plain(text: str) -> str:
    """
    >>> plain("The  Answer, please!")
    'the answer please'
    """
    return " ".join(re.findall(r"\\w+", text.casefold()))
'''


def _overlap(shown: Sequence[str], _: Sequence[str]) -> str:
    sample = " ".join(re.findall(r"[A-Za-z0-9]+", shown[0])[:6]) or "a text"
    return f'''"""How an answer is marked. Called with a completion and the gold answer of its question; docs/rewards.md."""

import re
from collections import Counter


def overlap(completion: str, answer: str) -> float:
    """The F1 of the words that both have (as SQuAD marks answers: Rajpurkar et al. 2016, arXiv 1606.05250): 0 to 1.

    >>> overlap({sample!r}, {sample!r}), overlap("", {sample!r})
    (1.0, 0.0)
    """
    said, gold = words(completion), words(answer)
    both = (said & gold).total()
    return 2 * both / (said.total() + gold.total()) if both else 0.0


def words(text: str) -> Counter:
    """
    >>> words("The cat, the hat")["the"]
    2
    """
    return Counter(re.findall(r"\\w+", text.casefold()))
'''


# ---------------------------------------------------------------------------------------------------------------- recipe


def recipe_text(found: Found, name: str, model: str) -> str:
    """Return the recipe: sample, score, select, train, measure, three rounds."""
    longest = max((len(row.answer or "") for row in found.rows), default=0)
    tokens = (
        int(min(MOST_TOKENS, max(LEAST_TOKENS, _round_up(longest / TOKEN_CHARS + 16, 16))))
        if found.examples
        else MOST_TOKENS // 2
    )
    tokens = MOST_TOKENS if found.kind in ("text", "code") else tokens
    shown = sum(len(row.question) + len(row.answer or "") for row in found.examples)
    asked = max(len(row.question) for row in found.rows)
    measured = max(MEASURED_TOKENS, tokens)
    room = max(shown / TOKEN_CHARS + tokens, measured)
    context = max(LEAST_CONTEXT, _round_up(asked / TOKEN_CHARS + 64 + room, 256))
    reward, score = function_of(found.kind), SCORES[found.kind]
    graded = found.kind in ("text", "code")
    where = f"{score} = max({score}) AND {score} > mean({score})" if graded else f"{score} = 1 AND finish_reason = 'stop'"
    per_prompt = 1 if graded else 2
    template = f", template: {TEMPLATE}" if found.examples else ""
    named = "prompt: prompt" if all(row.is_one_question for row in found.rows) else "messages: messages"
    answer = ", answer: answer" if any(row.answer for row in found.rows) else ""
    splits = "".join(f"  {split}: {{file: {split}.jsonl, {named}{answer}}}\n" for split in found.splits)
    kept = (
        "the best answer of each question, where it is better than the mean"
        if graded
        else "at most two right answers of each question"
    )
    teacher = (
        f"The teacher is the same model, shown {len(found.examples)} solved questions ({TEMPLATE}); the student sees the bare one."
        if found.examples
        else "The teacher is the model of the last round."
    )
    return f"""# {name}: expert iteration (ReST-EM, Singh et al. 2023, arXiv 2312.06585) on questions of our own
# {teacher}
# Each round: answer {TAKEN} questions four times, keep {kept}, train on them, measure the held-out ones.
#
# run      selfkd run {name}.yaml                   first: selfkd run {name}.yaml --plan
# expect   nobody knows: compare the dev column with row 0, and run a control: selfkd run {name}.yaml --control random-reward --name control
# fidelity: made by selfkd init; each round goes on from the last one, where ReST-EM trains from the base.
name: {_yaml(name)}
model: {_yaml(model)}
rounds: 3
context: {context}
prompts:
  take: {min(TAKEN, len(found.splits["train"]))}  # other questions in each round
{splits}best: {{metric: dev/{score}}}
steps:
  - sample: {{n: 4, temperature: 0.8, max_tokens: {tokens}{template}}}
  - score: {reward}
  - select: {{where: "{where}", per_prompt: {per_prompt}}}
  - train: {{loss: sft, trl: {{learning_rate: [5e-5, 1e-5], num_train_epochs: [2, 1]}}}}  # smaller steps once the form is learned
  - measure: {{reward: {reward}, max_tokens: {measured}}}{"  # room for the untouched model, which was shown no short answers" if measured > tokens else ""}
"""


def _yaml(text: str) -> str:
    """Return a text as YAML reads it back: `null` and `1e5` are no texts there, and a `#` begins a comment."""
    return yamlfile.dump([text]).strip().removeprefix("- ")


def _round_up(number: float, step: int) -> int:
    return int(-(-number // step) * step)
