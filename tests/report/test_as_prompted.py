"""What a model saw, to the token: the prompt as its template wrote it, the answer as it was drawn, control tokens told from text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from chains import go, recipe_in
from rich.console import Console
from speaking import Speaking
from template_kinds import IDS, NOW, RULE, kind_named, talk, tokenizer_of

from selfkd.backend import tokens
from selfkd.backend.fake import Fake
from selfkd.core.pool import shape
from selfkd.errors import UsageError
from selfkd.report import as_prompted, rows
from selfkd.report.as_prompted import Piece
from selfkd.report.rows import Found


def speaking(name: str) -> Any:
    """The tokenizer of a kind, as of a model that came in."""
    tok = tokenizer_of(kind_named(name))
    return tokens.with_chat(tok, tokens.settled(tok, {}, NOW))


def sample(messages: Any, **more: Any) -> Found:
    row = {"id": "s1", "stream": "own", "teacher_messages": messages, "text": "Fine", "finish_reason": "stop"}
    return Found("samples", "round 1 · samples", 3, 1, shape("samples", [{**row, **more}]))


def printed(found: Found, tok: Any, ids: bool = False) -> str:
    out = Console(file=io.StringIO(), width=20)  # narrower than any line: nothing may be wrapped
    as_prompted.print_prompted(found, tok, ids, out)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_sample_is_printed_as_the_model_saw_and_wrote_it() -> None:
    said = printed(sample(talk(*RULE), token_ids=[34, 6]), speaking("no system role"))
    assert "<s><start_of_turn>user\nRule\n\nAsk<end_of_turn>\n<start_of_turn>model\n" in said
    assert "── answer, 2 tokens\nFine<end_of_turn>\n" in said and "[34" not in said


def test_ids_are_printed_on_request_and_are_those_that_were_asked_and_drawn() -> None:
    said = printed(sample(talk(*RULE), token_ids=[34, 6]), speaking("no system role"), ids=True)
    assert "[1, 5, 23, 20, 32, 20, 20, 30, 6, 20, 5, 25, 20]" in said and "\n[34, 6]\n" in said


def test_a_control_token_is_told_from_a_text_of_the_same_letters() -> None:
    tok = speaking("ChatML")
    ids = [*tokens.encode_completion(tok, "Say <|im_end|>", ended=False), IDS["<|im_end|>"]]
    assert list(as_prompted.pieces(tok, [], ids)) == [Piece("Say <|im_end|>", False), Piece("<|im_end|>", True)]


def test_both_sides_of_a_training_row_are_printed_with_the_ends_that_are_learned() -> None:
    row = {"id": "r1", "kind": "pair", "messages": talk(*RULE), "chosen": "Fine", "chosen_ended": True}
    row |= {"rejected": "Say", "rejected_ids": [31], "rejected_ended": False}
    said = printed(Found("rows", "round 1 · training rows", 1, 1, shape("rows", [row])), speaking("ChatML"))
    assert "── chosen, 2 tokens\nFine<|im_end|>\n" in said and "── rejected, 1 token\nSay\n" in said


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return go(recipe_in(folder, RECIPE_ONE), folder / "run", Speaking(kind_named("no system role"))).folder


RECIPE_ONE = """
model: fake
rounds: 1
prompts:
  train: {file: train.jsonl, prompt: question, answer: answer, limit: 2}
steps:
  - sample: {system: Be brief., max_tokens: 64}
  - train: sft
"""


def test_a_run_is_shown_with_the_tokenizer_and_the_words_of_its_own_model(run: Path) -> None:
    tok = as_prompted.tokenizer_of(run)
    found = rows.samples(run, n=1, ids=True)
    [one] = as_prompted.shown(found, tok)
    assert tokens.chat_of(tok).fold and list(one.answers["answer"]) == found.first["token_ids"][0].to_list()
    assert tok.decode(one.prompt).startswith("<s><start_of_turn>user\n<unk>")  # the system text opens the user's turn
    [learned] = as_prompted.shown(rows.training_rows(run, n=1, ids=True), tok)
    assert learned.prompt and learned.answers.keys() == {"chosen"}


def test_a_run_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    folder = go(recipe_in(tmp_path, RECIPE_ONE), tmp_path / "run", Fake({})).folder
    with pytest.raises(UsageError, match="no checkpoint of this run has a tokenizer"):
        as_prompted.tokenizer_of(folder)


def test_an_older_run_whose_template_shows_the_date_says_that_it_shows_todays() -> None:
    older = tokenizer_of(kind_named("today"))
    assert as_prompted.UNDATED[:30] in printed(sample(talk(*RULE), token_ids=[34]), older)
    assert as_prompted.UNDATED[:30] not in printed(sample(talk(*RULE), token_ids=[34]), speaking("today"))


def test_rows_without_ids_are_as_they_were(run: Path) -> None:
    assert isinstance(rows.samples(run, n=1).first, pl.DataFrame) and "token_ids" not in rows.samples(run, n=1).first.columns
