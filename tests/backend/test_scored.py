"""Which tokens count, with a tokenizer of one id per character, and what an engine gives for them."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from local_engines import backend
from tiny import as_model, opened, say, tiny_model, tiny_tokenizer

from selfkd.backend import tokens
from selfkd.backend.engine.root_model import load_model
from selfkd.backend.scored import Scored, encode_scored, summed
from selfkd.core.pool import Model

PROMPT = [1, *(5 + ord(c) - 32 for c in "user: hi"), 4, *(5 + ord(c) - 32 for c in "assistant: ")]


def ids(text: str) -> list[int]:
    return [5 + ord(c) - 32 for c in text]


def row(text: str, **more) -> dict:
    return {"id": "s", "messages": say("hi"), "text": text, "token_ids": None, "finish_reason": "length", **more}


def test_what_is_given_is_read_and_not_scored():
    tok = tiny_tokenizer()
    [whole] = encode_scored(tok, [row("so 4", finish_reason="stop")])
    [behind] = encode_scored(tok, [row("so 4", given="so")])
    assert whole == Scored([*PROMPT, *ids("so 4"), 2], len(PROMPT)) and whole.count == 5
    assert behind == Scored([*PROMPT, *ids("so 4")], len(PROMPT) + 2) and behind.count == 2


def test_a_token_over_the_border_is_scored():
    """The two characters `: ` are one token of this tokenizer, and what is given ends between them."""

    class Merging:
        def __init__(self, tok):
            self._tok = tok

        def __getattr__(self, name):
            return getattr(self._tok, name)

        def __call__(self, text, **words):
            found = self._tok(text, **words)
            return found if isinstance(text, list) else {"input_ids": merged(found["input_ids"])}

    def merged(one: list[int]) -> list[int]:
        colon, blank = ids(": ")
        out: list[int] = []
        for token in one:
            out[-1:] = [999] if out and (out[-1], token) == (colon, blank) else [*out[-1:], token]
        return out

    [found] = encode_scored(Merging(tiny_tokenizer()), [row("is: 4", given="is:")])
    assert found.ids[found.start :] == [999, *ids("4")]


def test_sums_means_and_what_cannot_be_scored():
    found = [Scored([1, 2, 3, 4], 2), Scored([1, 2, 3, 4], 2), Scored([1, 2, 3, 4, 5, 6], 2), Scored([7, 8], 0), Scored([7], 1)]
    rows = [{"id": name, "sums": how} for name, how in zip("abcde", (None, "probability", None, None, None), strict=True)]
    asked: list[list[int]] = []

    def ask(sequences):
        asked.extend(sequences)
        return [[math.log(0.5)] * (len(one) - 1) for one in sequences]

    a, b, c, d, e = summed(rows, found, 5, ask)
    assert asked == [[1, 2, 3, 4], [1, 2, 3, 4], [7]]
    assert a == ("a", pytest.approx(2 * math.log(0.5)), 2) and b == ("b", pytest.approx(1.0), 2) and e == ("e", 0, 0)
    assert (c[0], math.isnan(c[1]), c[2]) == ("c", True, 6) and (d[0], math.isnan(d[1]), d[2]) == ("d", True, 0)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Model:
    home = tmp_path_factory.mktemp("policy")
    load_model({"path": str(tiny_model(home / "tiny"))}, home / "root", None)
    return as_model(home / "root")


@pytest.mark.parametrize("generator", ["transformers", pytest.param("vllm", marks=pytest.mark.real)])
def test_an_engine_gives_the_log_probability_of_what_follows_and_its_mean_probability(
    generator: str, policy: Model, tmp_path: Path
) -> None:
    rows = pl.DataFrame(
        [row("so 4", id="a", given="so"), row("so 4", id="b", given="so", sums="probability"), row("x" * 300, id="c")]
    )
    with backend(tmp_path, generator) as local:
        a, b, c = local.logprobs(policy, rows)
    logits = opened(Path(policy.path))(torch.tensor([[*PROMPT, *ids("so 4")]])).logits[0].log_softmax(-1)
    places = (len(PROMPT) + 1, len(PROMPT) + 2)
    by_hand = [logits[place, token].item() for place, token in zip(places, ids(" 4"), strict=True)]
    assert a == ("a", pytest.approx(sum(by_hand), abs=1e-3), 2)
    assert b == ("b", pytest.approx(sum(map(math.exp, by_hand)), abs=1e-3), 2)
    assert math.isnan(c[1]) and c[2] == len(PROMPT) + 300
    assert tokens.encode_prompt(tokens.tokenizer(policy.path), say("hi")) == PROMPT
