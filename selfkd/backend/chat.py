"""How a model is spoken to: what its chat template is given, and what is done for a template that cannot write a conversation.

Decided once, when the model comes in, and kept beside its weights (chat.json), whose digest covers it: generation and training read
the same words, today and on any other day. Knows neither tokenizer nor recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

FILE = "chat.json"
CLOCK = "strftime_now"  # what templates call for today's date
PARAGRAPH = "\n\n"  # between texts that become one turn
# Names that the template gets from elsewhere, or that are no word of a template but of the function that calls it.
OWNED: dict[str, str] = {
    **dict.fromkeys(("messages", "conversation"), "a prompt's messages come from `prompts` and the steps"),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message"), "selfkd asks for the model's turn"),
    **dict.fromkeys(("tokenize", "padding", "truncation", "max_length", "return_tensors"), "selfkd encodes the text itself"),
    **dict.fromkeys(("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"), "selfkd encodes the text itself"),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "it is the tokenizer's"),
    "chat_template": "the template is the model's: change it in the model's folder",
    CLOCK: "a run writes the day on which it was created; most templates take `date_string` for another",
}

Message = Mapping[str, str]


@dataclass(frozen=True)
class Chat:
    """The words of one model. The defaults are what a run did that was made before there was such a record.

    `words` are given to the template, as is `now`, the day that its clock shows, at midnight ("" is the clock of the machine). `fold` puts what
    a system message says in front of the next user turn, `join` makes one turn of several in a row by the same role. `end` are the ids
    that the template writes behind an assistant's turn, () the end token alone. `behind`: an answer that nobody sampled is encoded
    as it would be behind its prompt.
    """

    words: Mapping[str, Any] = field(default_factory=dict)
    now: str = ""
    fold: bool = False
    join: bool = False
    end: tuple[int, ...] = ()
    behind: bool = False

    def given(self) -> dict[str, Any]:
        """Return what the template is given beside the messages."""
        return {**self.words, **({CLOCK: datetime.fromisoformat(self.now).strftime} if self.now else {})}

    def arranged(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """Return role and content of each message, in the turns that the template can write."""
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        plain = folded(plain) if self.fold else plain
        return joined(plain) if self.join else plain


PLAIN = Chat()


def folded(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages without a system role: its text stands in front of the next user turn.

    >>> folded([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}])
    [{'role': 'user', 'content': 'Be brief.\\n\\nWhy?'}]
    """
    found: list[dict[str, str]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            found.append({"role": "user", "content": PARAGRAPH.join([*waiting, message["content"]])})
            waiting = []
        else:
            found.append(dict(message))
    return [*found, {"role": "user", "content": PARAGRAPH.join(waiting)}] if waiting else found


def joined(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages with those that one role says in a row as one turn.

    >>> joined([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    [{'role': 'user', 'content': 'a\\n\\nb'}]
    """
    found: list[dict[str, str]] = []
    for message in messages:
        if found and found[-1]["role"] == message["role"]:
            found[-1] = {**found[-1], "content": PARAGRAPH.join([found[-1]["content"], message["content"]])}
        else:
            found.append(dict(message))
    return found


# ---- beside the weights ----


def write(folder: Path, chat: Chat) -> None:
    """Keep `chat` in a model folder: what is not as it always was."""
    said = {name: value for name, value in asdict(chat).items() if value != getattr(PLAIN, name)}
    (folder / FILE).write_text(json.dumps(said, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


@lru_cache(maxsize=16)
def read(folder: str) -> Chat:
    """Return how the model of a folder is spoken to. A folder never changes, so it is read once."""
    path = Path(folder) / FILE
    said: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    known = {name: value for name, value in said.items() if name in {one.name for one in fields(Chat)}}
    return replace(PLAIN, **{**known, "end": tuple(said.get("end", ()))})
