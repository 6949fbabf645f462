"""Answers that are begun: both engines go on from the ids that a training row of the same answer has, on a tiny real model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from local_engines import backend
from tiny import WORDS, as_model, tiny_model
from toys import chunk_of

from selfkd.backend import tokens
from selfkd.backend.base import NOT_ASKED, Sampling, write_chunk
from selfkd.backend.engine import root_model
from selfkd.backend.local import LocalBackend
from selfkd.core.pool import Model
from selfkd.errors import UsageError

GREEDY = Sampling(temperature=0.0, max_tokens=12, extra={"logprobs": 0})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("begun")
    root_model.load_model({"path": str(tiny_model(folder / "source"))}, folder / "root", None)
    return as_model(folder / "root")


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def local(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalBackend]:
    with backend(tmp_path_factory.mktemp(request.param), request.param) as found:
        yield found


def answers(local: LocalBackend, model: Model, folder: Path, begun: list[str] | None = None) -> pl.DataFrame:
    chunk = chunk_of(folder, WORDS)
    if begun is not None:
        chunk = replace(chunk, key="begun", requests=chunk.requests.with_columns(begun=pl.Series(begun, dtype=pl.String)))
    (reply,) = local.generate(model, [chunk], GREEDY)
    return pl.read_parquet(reply.path)


def test_a_greedy_answer_that_is_begun_as_it_would_be_goes_on_as_it_would(local: LocalBackend, model: Model, tmp_path: Path):
    """The first answers are 12 tokens, a character each; what is begun with their first 5 goes on with the other 7, and 5 more."""
    whole = answers(local, model, tmp_path)
    begun = [text[:5] for text in whole["text"]]
    found = answers(local, model, tmp_path, begun)
    assert whole["text"].str.len_chars().max() == 12 and found["text"].str.len_chars().max() == 17
    assert all(text.startswith(first) for first, text in zip(whole["text"], found["text"], strict=True))


def test_the_answer_holds_its_beginning_and_has_no_ids_and_no_log_probability_where_it_was_begun(
    local: LocalBackend, model: Model, tmp_path: Path
):
    found = answers(local, model, tmp_path, ["so " if at % 2 else "" for at in range(len(WORDS))])
    plain, begun = found.filter(found["number"] % 2 == 0), found.filter(found["number"] % 2 == 1)
    assert begun["text"].str.starts_with("so ").all() and (begun["chars"] == begun["text"].str.len_chars()).all()
    assert begun["token_ids"].null_count() == begun["logprob"].null_count() == begun.height == len(WORDS) // 2
    assert plain["token_ids"].null_count() == plain["logprob"].null_count() == 0 and begun["tokens"].max() == 12
    assert plain["text"].to_list() == answers(local, model, tmp_path).filter(pl.col("number") % 2 == 0)["text"].to_list()


def test_what_is_asked_is_the_prompt_and_the_beginning_as_a_training_row_has_them(model: Model):
    tok, messages = tokens.tokenizer(model.path), [{"role": "user", "content": "why?"}]
    [asked] = tokens.encode_requests(tok, [messages], 8, 256, begun=["so 1"])
    row = tokens.encode_completion(tok, "so 1 + 1", None, True, messages=messages)
    assert asked == tokens.encode_prompt(tok, messages) + row[:4]
    assert tokens.encode_requests(tok, [messages], 8, 256, begun=[""]) == [tokens.encode_prompt(tok, messages)]


def test_the_context_holds_the_beginning_too(model: Model):
    tok, messages = tokens.tokenizer(model.path), [{"role": "user", "content": "why?"}]
    room = 256 - len(tokens.encode_prompt(tok, messages))
    assert tokens.encode_requests(tok, [messages], room - 4, 256, begun=["so 1"])[0]
    assert tokens.encode_requests(tok, [messages], room - 3, 256, drop_long=True, begun=["so 1"]) == [None]
    with pytest.raises(UsageError, match="the context holds 256"):
        tokens.encode_requests(tok, [messages], room - 3, 256, begun=["so 1"])


def test_a_request_that_was_too_long_has_no_answer_and_no_beginning(model: Model, tmp_path: Path):
    chunk = chunk_of(tmp_path, ["hi"])
    chunk = replace(chunk, requests=chunk.requests.with_columns(begun=pl.lit("so ")))
    assert pl.read_parquet(write_chunk(chunk, model, [NOT_ASKED], "w", {}))["text"].to_list() == [""]
