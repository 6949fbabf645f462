"""What a chat template can write, found by having it write a few conversations: which roles, which turns, and what it adds itself.

Works on any way to render (transformers with a model, Jinja alone in `lint`). Encodes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from selfkd.backend.chat import CLOCK, OWNED, Chat, Message
from selfkd.backend.chat_template import Write, names_in
from selfkd.core.wording import did_you_mean

# Contents that stand in no template, so that what a template makes of each can be found again.
RULE, ASKED, ASKED_NEXT, THOUGHT, SAID = "Basalt", "Quartz", "Marble", "Gneiss", "Garnet"
OPENS, CLOSES = "<think>", "</think>"
DAY = len("2026-11-27")  # of an instant: runs of one day are shown the same, so that they can be the same
SHOWN = 80  # characters of a template's own text in a remark


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


def unknown_words(source: str | None, words: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (word, what is wrong with it) of what a recipe's `chat` gives to a template that does not read it."""
    if source is None:
        return [(word, "the model has no chat template, so nothing would read it: leave it out") for word in words]
    known = names_in(source)
    usable = sorted(name for name in known if name not in OWNED and not name.endswith("_token"))
    hint = f" It knows {', '.join(usable)}." if usable else " It knows none."
    return [
        (word, f"the model's chat template does not know '{word}'.{did_you_mean(word, usable) or hint}")
        for word in words
        if word not in known
    ]


def settled(source: str, write: Write, words: Mapping[str, Any], now: str) -> Chat:
    """Return how a conversation is written with a template that is given `words`; the day of `now` only where it asks for the time.

    `write` gives it both. A template that can write no user turn at all is left as it is: its first prompt is refused in its own words.
    """
    head = [] if _holds(write, turns(("user", ASKED))) else turns(("system", RULE))
    chat = Chat(words=dict(words), now=now[:DAY] if CLOCK in names_in(source) else "", behind=True)
    if not _holds(write, [*head, *turns(("user", ASKED))]):
        return chat
    fold = not _holds(write, turns(("system", RULE), ("user", ASKED)))
    join = not _holds(write, [*head, *turns(("user", ASKED), ("user", ASKED_NEXT))])
    return replace(chat, fold=fold, join=join)


def _holds(write: Write, messages: Sequence[Message]) -> bool:
    """Whether a template writes these messages, all that they say, in their order."""
    text = _written(write, messages)
    places = [(text or "").find(message["content"]) for message in messages]
    return -1 not in places and places == sorted(places)


def _written(write: Write, messages: Sequence[Message], opens: bool = True) -> str | None:
    with suppress(Exception):  # what a template refuses, or trips over
        return write(messages, opens)
    return None


def _first(write: Write) -> tuple[list[dict[str, str]], str] | None:
    """Return the shortest conversation that a template writes, and its text."""
    for messages in (turns(("user", ASKED)), turns(("system", RULE), ("user", ASKED))):
        if (text := _written(write, messages)) and ASKED in text:
            return messages, text
    return None


def lead(write: Write) -> str:
    """Return what a template writes between the last thing asked and the answer."""
    found = _first(write)
    return found[1].rpartition(ASKED)[2] if found else ""


def behind_answer(write: Write) -> str:
    """Return what a template writes behind what an assistant said, where nothing follows; "" where it cannot say."""
    if not (found := _first(write)):
        return ""
    text = _written(write, [*found[0], *turns(("assistant", SAID))], opens=False)
    return text.rpartition(SAID)[2] if text and SAID in text else ""


# ---- what a person should know ----


def own_system(write: Write) -> str:
    """Return the system prompt that a template adds where there is none; "" where it adds none."""
    without, with_one = _written(write, turns(("user", ASKED))), _written(write, turns(("system", RULE), ("user", ASKED)))
    if not without or not with_one or ASKED not in without or RULE not in with_one:
        return ""
    head, given = without.partition(ASKED)[0], with_one.partition(ASKED)[0]
    before, behind = given.split(RULE, 1)
    fits = len(head) > len(before) + len(behind) and head.startswith(before) and head.endswith(behind)
    return head[len(before) : len(head) - len(behind)].strip() if fits else ""


def opens_thinking(write: Write) -> bool:
    """Whether a template begins the model's turn inside <think>."""
    return lead(write).rstrip().endswith(OPENS)


def dropped(text: str, messages: Sequence[Message]) -> bool:
    """Whether a rendered prompt lacks something that its messages say."""
    return any(message["content"].strip() not in text for message in messages)


@dataclass(frozen=True)
class Counts:
    """How many of the prompts that a run asks have a system message, have none, have turns in a row by one role, lose text."""

    system: int = 0
    plain: int = 0
    repeated: int = 0
    lost: int = 0
    lost_first: str = ""
    several: int = 0  # of more than one message


def remarks(write: Write, chat: Chat, counts: Counts) -> list[str]:
    """Return what a template does to the prompts of a run that their author may not expect, a sentence each."""
    found, own = [], own_system(write)
    if chat.fold and counts.system:
        what = "has no system role: what a system message says stands in front of the next user turn"
        found.append(f"The chat template {what} ({_prompts(counts.system)}).")
    if chat.join and counts.repeated:
        found.append(
            f"The chat template wants turns to alternate: those of one role in a row are joined ({_prompts(counts.repeated)})."
        )
    if own and counts.plain:
        shown = own if len(own) <= SHOWN else f"{own[:SHOWN]}…"
        found.append(f"The chat template adds a system prompt where there is none: {shown!r} ({_prompts(counts.plain)}).")
    if opens_thinking(write):
        more = f"a gold answer is learned inside it, unless its text ends the thought with {CLOSES}"
        found.append(f"The chat template opens {OPENS} in front of each answer: {more}.")
    if counts.lost:
        found.append(f"The chat template leaves out something of what {_prompts(counts.lost)} say, first {counts.lost_first}.")
    if chat.now:
        found.append(f"The chat template writes the date: this run keeps {chat.now}, on whatever day it goes on.")
    return found


def bare_remarks(counts: Counts) -> list[str]:
    """Return what is done without a chat template, where that is not plain."""
    if not counts.several:
        return []
    return [
        f"The model has no chat template: messages become one text, with blank lines between them ({_prompts(counts.several)})."
    ]


def _prompts(count: int) -> str:
    return "1 prompt" if count == 1 else f"{count:,} prompts"
