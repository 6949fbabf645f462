"""How turns are rearranged for a template that cannot write them: nothing that a message says is lost, and nothing changes its place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from selfkd.backend import chat
from selfkd.backend.chat import PARAGRAPH, Chat

TALKS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text("abc", min_size=1, max_size=3)), min_size=1, max_size=7
)


def messages(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in talk]


def texts(found: list[dict[str, str]]) -> list[str]:
    return [text for message in found for text in message["content"].split(PARAGRAPH)]


@given(TALKS)
def test_joined_turns_alternate_and_say_all_that_was_said_in_its_order(talk: Any) -> None:
    found = chat.joined(messages(talk))
    assert texts(found) == [content for _, content in talk]
    assert all(one["role"] != other["role"] for one, other in pairwise(found))


@given(TALKS)
def test_folded_turns_have_no_system_role_and_say_all_that_was_said(talk: Any) -> None:
    found = chat.folded(messages(talk))
    assert "system" not in {message["role"] for message in found}
    assert sorted(texts(found)) == sorted(content for _, content in talk)
    kept = [content for role, content in talk if role == "assistant"]
    assert [message["content"] for message in found if message["role"] == "assistant"] == kept


@given(TALKS)
def test_turns_that_a_template_can_write_are_left_as_they_are(talk: Any) -> None:
    assert Chat().arranged(messages(talk)) == messages(talk)
    plain = [(role, content) for role, content in talk if role != "system"]
    assert Chat(fold=True).arranged(messages(plain)) == messages(plain)


def test_a_system_message_opens_the_next_user_turn_wherever_it_stands() -> None:
    talk = [("user", "Hi."), ("assistant", "Yes?"), ("system", "Be brief."), ("user", "Why?")]
    assert chat.folded(messages(talk))[2:] == messages([("user", "Be brief.\n\nWhy?")])
    assert chat.folded(messages([("user", "Why?"), ("system", "Be brief.")])) == messages(
        [("user", "Why?"), ("user", "Be brief.")]
    )
