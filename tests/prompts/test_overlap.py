"""Prompts that two splits share are found, word for word or in a passage."""

from __future__ import annotations

from pathlib import Path

from splits import read

from selfkd.prompts.overlap import overlap, shared_passages


def test_train_prompts_found_in_a_held_out_split_are_listed(tmp_path: Path) -> None:
    train = read(["What is  ONE plus one?", "Something else", "x"], tmp_path)
    test = read({"rows": ["what is one\nplus one?"], "system": "Be brief."}, tmp_path, "test")
    assert overlap(train, test) == [train["id"][0]]
    assert overlap(train, read(["nothing"], tmp_path)) == []


def test_thirteen_words_in_a_row_are_a_shared_passage(tmp_path: Path) -> None:
    passage = " ".join(f"w{n}" for n in range(13))
    train = read([f"a b {passage} c", "short text", passage[3:], "x " + passage.replace("w5", "v5")], tmp_path)
    test = read([f"q {passage.upper()}", "short text"], tmp_path)
    assert shared_passages(train, test) == [train["id"][0]]
    wording = read([f"{passage} {n}" for n in range(11)], tmp_path)
    assert shared_passages(train, wording) == []


def test_a_train_conversation_in_which_a_held_out_prompt_is_asked_is_listed(tmp_path: Path) -> None:
    turns = [("user", "Held out?"), ("assistant", "Yes."), ("user", "Why?")]
    talk = [{"role": role, "content": text} for role, text in turns]
    said = [{"messages": talk}, {"messages": [{**talk[2]}, {**talk[1], "content": "Held out?"}, {**talk[2], "content": "So?"}]}]
    train = read({"rows": said}, tmp_path)
    assert overlap(train, read(["held  out?"], tmp_path, "test")) == [train["id"][0]]
