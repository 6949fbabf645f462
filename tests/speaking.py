"""A fake model that has a tokenizer and a chat template of the table of kinds: for chains in which prompts become ids."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chains import Killed
from template_kinds import Kind, tokenizer_of

from selfkd.backend import chat, conversations, tokens
from selfkd.backend.base import Questions
from selfkd.backend.fake import Fake, adder
from selfkd.core import digest

NOT_WEIGHTS = ("tokenizer*", "chat*")


class Speaking(Fake):
    """A fake with a tokenizer and a chat template: what it answers depends on the ids of its prompt. `calls` are those made of it."""

    def __init__(self, kind: Kind, die_at: str = "") -> None:
        self.kind, self.die_at, self.calls, self.asked = kind, die_at, [], Questions([], 0)
        super().__init__({}, answer=self.say, hook=self.called)

    def called(self, call: str) -> None:
        self.calls.append(call)
        if call == self.die_at:
            raise Killed

    def load(self, source: Any, out: Path, dither: int | None, asked: Questions | None = None) -> dict[str, Any]:
        assert asked is not None
        self.asked, tok = asked, tokenizer_of(self.kind)
        seen = conversations.look(tok, asked)
        notes = super().load(source, out, dither)
        if seen.refused:
            return {"refused": list(seen.refused)}
        tok.save_pretrained(out)
        chat.write(out, seen.chat)
        return {**notes, "chat": list(seen.remarks)}

    def generate(self, model: Any, *more: Any, **words: Any) -> Iterator[Any]:
        self.tok = tokens.tokenizer(model.path)
        return super().generate(model, *more, **words)

    def say(self, messages: Any, seed: int, skill: float) -> str:
        return f"It saw {digest.of(tokens.encode_prompt(self.tok, messages))[:8]}. {adder(messages, seed, skill)}"

    def train(self, start: Any, reference: Any, rows: Any, spec: Any, out: Path, *more: Any, **words: Any) -> Any:
        trained = super().train(start, reference, rows, spec, out, *more, **words)
        for path in (path for pattern in NOT_WEIGHTS for path in Path(start.path).glob(pattern)):
            shutil.copy(path, out / path.name)
        return trained
