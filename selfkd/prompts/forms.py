"""The forms in which data sets write a row: which columns are the conversation, and which is the gold answer.

What the recipe names is taken as named. Else the form is known by its columns, and where two columns could be meant the row
is refused with the words to write: a guess would be trained on. Nothing here knows where a row came from.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from selfkd.core.wording import did_you_mean
from selfkd.errors import UsageError
from selfkd.prompts.sources import Words

Row = Mapping[str, Any]
Message = dict[str, Any]

USUAL = ("messages", "prompt", "question")  # the first of these that a row has is its prompt
CHATS = ("messages", "conversations", "conversation")
OTHERS = ("conversations", "conversation", "instruction", "problem")  # read where a row has exactly one of them
PARTNERS = {"instruction": "output", "problem": "solution"}  # the gold answer that belongs to an unnamed prompt column
UNREAD = ("system", "system_prompt", "history", "tools")  # these are part of the conversation, and only messages hold them
BELOW = ("input", "context")  # what a question is asked about; only Alpaca's `input` has a known place
NOTHING: tuple[Any, ...] = (None, "", "[]", [], {})
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
PROMPT_NAMES = (*USUAL, *OTHERS, "input", "query", "text", "task")  # for hints only, as are these
ANSWER_NAMES = (
    *("answer", "solution", "output", "response", "completion", "answers", "target", "label", "final_answer", "gold"),
    *("ground_truth", "reference_answer", "expected_answer", "correct_answer", "expected_output"),
)
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")  # as JSON or as Python prints them
PLAIN_WORD = re.compile(r"[A-Za-z_]\w*([ .-]\w+)*")
MAP_FIX = "Or make the row's {prompt, answer} in a `map` function."


class Parts(NamedTuple):
    """A row in its parts: the conversation, the gold answer as found (None: there is none), the columns that these were."""

    messages: list[Message]
    answer: Any
    used: Collection[str]


def parts_of(words: Words, row: Row, place: str) -> Parts:
    """Return the parts of a row. UsageError with its place, and with the words to write in the recipe where they decide."""
    column = prompt_column(words, row, place)
    unnamed = not named_prompt(words)
    if unnamed and "map" not in words:  # a `map` function has decided
        refuse_unread(words, row, column, place)
        refuse_other_prompts(row, column, place)
    if unnamed and column == "instruction":
        messages, used = alpaca(row, place), {"instruction", "input"}
    else:
        messages, used = as_messages(conversation(words, cell(row, column), column, place), column, place), {column}
    answer_column = words.get("answer") or usual_answer(row, column, unnamed, place)
    if messages[-1]["role"] != "assistant":
        if answer_column == column and messages != [{"role": "user", "content": cell(row, column)}]:
            raise UsageError(f"the conversation in '{column}' does not end with the assistant's answer", place)
        answer = answer_cell(row, answer_column, place)
    else:
        if answer_column and not words.get("answer"):
            raise two_answers(column, answer_column, place)
        if unnamed:
            refuse_rivals(row, place)
        spoken = answer_column in (None, column)
        answer = last_answer(messages, place) if spoken else answer_cell(row, answer_column, place)
        messages = messages[:-1]
        if not messages:
            raise UsageError("there is no user message", place)
    return Parts(messages, answer, used | {answer_column} if answer_column else used)


# ----------------------------------------------------------------------------------------------------- which column it is


def named_prompt(words: Words) -> str | None:
    return words.get("messages") or words.get("prompt")


def prompt_column(words: Words, row: Row, place: str) -> str:
    """Return the column that holds the prompt: the one named, else the first usual one, else the only one of another form."""
    named = named_prompt(words)
    if named is not None:
        if cell(row, named) is MISSING:
            raise missing_column(named, row, place)
        return named
    usual = next((name for name in USUAL if name in row), None)
    if usual is not None:
        return usual
    others = [name for name in OTHERS if name in row]
    if len(others) > 1:
        raise two_prompts(others, place)
    if not others:
        raise no_prompt(row, place)
    return others[0]


def usual_answer(row: Row, column: str, unnamed: bool, place: str) -> str | None:
    """Return `answer` if the row has it, else the column that belongs to an unnamed prompt column of another form."""
    if "answer" in row:
        return "answer"
    partner = PARTNERS.get(column) if unnamed else None
    if partner in row:
        return partner
    spaced = next((name for name in row if str(name).strip() in ("answer", partner)), None)
    if spaced is not None:
        fix = f"Take the blanks out of the name, or write `answer: {yaml_word(spaced)}`."
        raise UsageError(f"column {spaced!r} has blanks around its name, so it is not read as the gold answer", place, fix)
    return None


def refuse_rivals(row: Row, place: str) -> None:
    """Raise UsageError where a row has a conversation with its answer, and a column that may be the prompt beside it."""
    rivals = [name for name in dict.fromkeys((*USUAL, *OTHERS)) if name in row]
    if len(rivals) > 1:
        raise two_prompts(rivals, place)


def two_answers(column: str, answer_column: str, place: str) -> UsageError:
    what = f"two gold answers: the assistant's last message in '{column}', and column '{answer_column}'"
    return UsageError(what, place, f"Write `answer: {column}` for the message or `answer: {answer_column}` for the column.")


def two_prompts(names: Sequence[str], place: str) -> UsageError:
    ways = " or ".join(f"`{'messages' if name in CHATS else 'prompt'}: {name}`" for name in names)
    return UsageError(f"the prompt may be in any of these columns: {', '.join(names)}", place, f"Write {ways}.")


def refuse_unread(words: Words, row: Row, column: str, place: str) -> None:
    """Raise UsageError where a column says more of the conversation than is read. A template may say what is asked about."""
    below = () if column == "instruction" or words.get("template") else BELOW
    for name in (*UNREAD, *below):
        if row.get(name) not in NOTHING:
            word = "messages" if column in CHATS else "prompt"
            fix = f"Write `{word}: {column}` to read that column alone. {MAP_FIX}"
            raise UsageError(f"column '{name}' belongs to the conversation and is not read", place, fix)


def refuse_other_prompts(row: Row, column: str, place: str) -> None:
    """Raise UsageError where another column may be the prompt and asks something else."""
    names = [name for name in dict.fromkeys((*USUAL, *OTHERS)) if name == column or row.get(name) not in NOTHING]
    if any(asked(row[name]) != asked(row[column]) for name in names):
        raise two_prompts(names, place)


def asked(value: Any) -> Any:
    """Return a text as it is, and of a conversation the user's last message."""
    if not isinstance(value, list | tuple):
        return value
    said = [message for message in value if isinstance(message, Mapping)]
    return next((message.get("content") for message in reversed(said) if message.get("role") == "user"), value)


# ------------------------------------------------------------------------------------------------------------ the prompt


def alpaca(row: Row, place: str) -> list[Message]:
    """Return Alpaca's `instruction`, with its `input` after an empty line where there is one, as a user message."""
    if "output" not in row:
        raise UsageError("column 'instruction' without Alpaca's 'output'", place, words_to_write(row, "instruction"))
    texts = [row["instruction"], row.get("input") or ""]
    for name, text in zip(("instruction", "input"), texts, strict=True):
        if not isinstance(text, str):
            raise UsageError(f"column '{name}' must be text, not {kind_of(text)}", place)
    return [{"role": "user", "content": "\n\n".join(text for text in texts if text.strip())}]


def conversation(words: Words, value: Any, column: str, place: str) -> Any:
    """Return a cell, with messages that were written as JSON text (CSV holds nothing else) as a list.

    As a plain text they would be the user's, with the assistant's answer inside.
    """
    if not isinstance(value, str) or "map" in words:
        return value
    found = messages_in(value)
    if found is None:
        if not MESSAGES_AS_TEXT.match(value):
            return value
        raise UsageError(f"column '{column}' holds messages as text that is not JSON", place, f"Write it as JSON. {MAP_FIX}")
    if words.get("messages") or column in CHATS:
        return found
    raise UsageError(
        f"column '{column}' holds messages as JSON text", place, f"Write `messages: {yaml_word(column)}`. {MAP_FIX}"
    )


def messages_in(text: str) -> list[Any] | None:
    """Return the messages that a text is in JSON; None where it is none."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    first = found[0] if found else None
    shaped = isinstance(first, Mapping) and ({"role", "content"} <= set(first) or {"from", "value"} <= set(first))
    return found if shaped else None


def as_messages(value: Any, column: str, place: str) -> list[Message]:
    """Return a cell as messages of role and content; a text is one user message. ShareGPT's `from` and `value` are read too."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple) or not value:
        raise UsageError(f"column '{column}' must be text or a list of messages, not {kind_of(value)}", place)
    return [as_message(message, column, place) for message in value]


def as_message(message: Any, column: str, place: str) -> Message:
    if isinstance(message, Mapping):
        if {"role", "content"} <= set(message):
            return {"role": message["role"], "content": message["content"]}
        if {"from", "value"} <= set(message):
            speaker = message["from"]
            return {
                "role": SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker,
                "content": message["value"],
            }
    raise UsageError(f"column '{column}': a message needs `role` and `content`, got {short(message)}", place)


# ------------------------------------------------------------------------------------------------------- the gold answer


def last_answer(messages: Sequence[Message], place: str) -> str:
    """Return the text of the last message, the assistant's."""
    content = messages[-1]["content"]
    if not isinstance(content, str):
        raise UsageError(f"the assistant message must be text, not {kind_of(content)}", place)
    return content


def answer_cell(row: Row, column: str | None, place: str) -> Any:
    """Return the gold answer in a column; a list or an object is refused with the names of its parts."""
    value = cell(row, column) if column else None
    if value is MISSING:
        raise missing_column(str(column), row, place)
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        message = value[0]  # TRL's conversational form of a completion
        if message.get("role") == "assistant" and isinstance(message.get("content"), str):
            return message["content"]
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, list | tuple | Mapping):
        paths = list(leaves(str(column), value))
        fix = f"Name the part that is the answer: {' or '.join(f'`answer: {path}`' for path in paths[:3])}. " if paths else ""
        raise UsageError(f"the answer must be text or a number, not {kind_of(value)}", place, fix + MAP_FIX)
    return value


MISSING: Any = object()


def cell(row: Row, column: str) -> Any:
    """Return a cell: of the column so named, else of a part of one, `answers.text.0`; MISSING where there is none."""
    if column in row or "." not in column:
        return row.get(column, MISSING)
    found: Any = row
    for name in column.split("."):
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list | tuple) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return MISSING
    return found


def leaves(name: str, value: Any, depth: int = 3) -> Iterator[str]:
    """Yield the names of the texts and numbers in a cell, as a recipe writes them; of a list only its first one."""
    if isinstance(value, str | int | float):
        yield name
    elif depth and isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves(f"{name}.{key}", part, depth - 1)
    elif depth and isinstance(value, list | tuple) and value:
        yield from leaves(f"{name}.0", value[0], depth - 1)


# --------------------------------------------------------------------------------------------------------------- wording


def missing_column(column: str, row: Row, place: str) -> UsageError:
    """Return the error of a row without the column, which names those it has."""
    top = column.partition(".")[0]
    known = leaves(top, row[top]) if top in row and top != column else row
    return UsageError(f"no column '{column}'.{did_you_mean(column, known)}", place, f"Columns: {', '.join(map(str, row))}")


def no_prompt(row: Row, place: str) -> UsageError:
    """Return the error of a row in no known form, with the words that name its columns."""
    error = missing_column("prompt", row, place)
    return UsageError(error.what, place, f"{error.fix}\n{words_to_write(row)}")


def words_to_write(row: Row, prompt: str | None = None) -> str:
    """Return the words of a recipe that name the prompt and the answer of such a row, as far as their names tell."""
    prompt = prompt or likely(row, PROMPT_NAMES)
    answer = likely([name for name in row if name != prompt], ANSWER_NAMES)
    if prompt is None:
        return f"Say which column it is: `prompt: COLUMN, answer: COLUMN`. {MAP_FIX}"
    named = f"prompt: {yaml_word(prompt)}" + (f", answer: {yaml_word(answer)}" if answer else "")
    return f"Write `{named}` if that is meant. {MAP_FIX}"


def yaml_word(column: str) -> str:
    """Return a column's name as YAML takes it: in quotes where blanks or signs would be lost."""
    return column if PLAIN_WORD.fullmatch(column) else json.dumps(column, ensure_ascii=False)


def likely(columns: Collection[Any], names: Sequence[str]) -> str | None:
    """Return the first column that is one of `names`, be it in other case: `Question`, `Final answer`."""
    plain = {str(column): str(column).strip().casefold().replace(" ", "_") for column in columns}
    return next((column for name in names for column, text in plain.items() if text == name), None)


def kind_of(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {short(value)[:40]!r}"


def short(value: Any) -> str:
    """Return the beginning of a value, however deep it is nested."""
    return value[:80] if isinstance(value, str) else reprlib.repr(value)
