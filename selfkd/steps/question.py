"""What a step shows a model of a prompt, told apart from whom it asks and what becomes of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from selfkd.steps.context import Messages, Render, Row

LONGER = "longer than the context allows"  # why a prompt or a question about a sample is dropped


@dataclass(frozen=True)
class Question:
    """How a step asks about the prompts of a split: in whose words, and how many tokens the answer may have.

    `about_samples`: it asks about samples of these prompts, which are not known beforehand. `more` names what its template is given
    beside prompt and sample. `step` says where it is written.
    """

    split: str
    template: str | None
    system: str | None
    room: int
    about_samples: bool = False
    more: tuple[str, ...] = ()
    step: str = field(default="", compare=False)

    def messages(self, prompt: Row, render: Render | None, of: Row | None = None, **more: Any) -> Messages:
        """Return what the model is shown of `prompt`; `render` is `template`, ready to use, and `of` a sample that it is about."""
        messages = list(prompt["messages"])
        if self.system:
            messages = [{"role": "system", "content": self.system}, *(m for m in messages if m["role"] != "system")]
        return render(prompt, messages, of=of, **more) if render else messages


def longest(questions: Iterable[Question]) -> Iterator[Question]:
    """Yield each wording once, with the longest answer that is asked for in it."""
    rooms: dict[Question, int] = {}
    for question in questions:
        wording = replace(question, room=0)
        rooms[wording] = max(rooms.get(wording, 0), question.room)
    return (replace(wording, room=room) for wording, room in rooms.items())
