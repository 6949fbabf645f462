"""What a reader says of texts, against plain forward passes on texts that are written out here."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from scorers import classifier, logits_of
from tiny import as_model, opened, say, tiny_model

from selfkd.backend import tokens
from selfkd.backend.engine.reader import Reader
from selfkd.backend.reading import TEXTS, Reading
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import UsageError

NUMERICS = {"threads": 1, "dtype": "float32"}
MARKED = "<s>user: 2+2=?\nassistant: 2+2=4\n"  # how the tiny template writes a prompt and its answer


def reader(folder: Path, kind: str, **words) -> Reader:
    return Reader(NUMERICS, Model("scorer", str(folder), digest.weights(folder)), Reading(kind, **words))


def texts(*rows: dict) -> pl.DataFrame:
    return pl.DataFrame([{"id": str(at), **row} for at, row in enumerate(rows)], schema=TEXTS)


def answered(text: str, ids: list[int] | None = None) -> dict:
    return {"messages": say("2+2=?"), "text": text, "token_ids": ids, "finish_reason": "length"}


def test_a_reward_model_reads_prompt_and_answer_in_its_own_template_and_gives_its_one_logit(tmp_path):
    folder = classifier(tmp_path / "rm", ["reward"])
    found = reader(folder, "label").read(texts(answered("2+2=4"), answered("five"), answered("2+2=4")))
    assert found[0].values[0] == pytest.approx(logits_of(folder, MARKED).item(), abs=1e-5)
    assert found[0].values == pytest.approx(found[2].values) and found[0].values[0] != pytest.approx(found[1].values[0])


def test_of_several_classes_the_named_one_counts_with_its_probability(tmp_path):
    folder = classifier(tmp_path / "nli", ["entailment", "neutral", "contradiction"])
    chances = torch.softmax(logits_of(folder, MARKED), -1).tolist()
    for label, place in (("Neutral", 1), (2, 2)):
        [found] = reader(folder, "label", label=label).read(texts(answered("2+2=4")))
        assert found.values == (pytest.approx(chances[place], abs=1e-5),)


def test_two_texts_are_joined_as_the_tokenizer_joins_them_and_what_names_a_special_token_is_text(tmp_path):
    folder = classifier(tmp_path / "nli", ["no", "yes"], template=False)
    one, other = {"text": "it rains", "second": "</s>wet"}, {"text": "a", "second": None}
    found = reader(folder, "pair", label="yes").read(texts(one, other))
    tok = tokens.tokenizer(str(folder))
    ids = tok("it rains", "</s>wet", split_special_tokens=True)["input_ids"]
    assert ids == [4 + 1 + ord(c) - 32 for c in "it rains</s>wet"]  # no id is 2, the end token
    net = __import__("transformers").LlamaForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    by_hand = torch.softmax(net(torch.tensor([ids])).logits[0], -1)[1].item()
    assert found[0].values == (pytest.approx(by_hand, abs=1e-5),)


def test_a_text_that_the_model_cannot_take_is_no_value_but_a_reason_and_the_others_keep_theirs(tmp_path):
    folder = classifier(tmp_path / "rm", ["reward"])
    rows = texts(answered("x" * 300), answered("ok"), answered("say </s> now"))
    long, fine, special = reader(folder, "label").read(rows)
    assert (long.values, special.values) == ((), ()) and fine.values
    assert "and the model reads 256" in long.why and "special token </s>" in special.why


def test_a_model_without_a_padding_token_reads_its_texts_one_by_one(tmp_path):
    folder = classifier(tmp_path / "rm", ["reward"], pad=False)
    found = reader(folder, "label").read(texts(answered("2+2=4"), answered("a much longer answer")))
    assert found[0].values[0] == pytest.approx(logits_of(folder, MARKED).item(), abs=1e-5)


@pytest.mark.parametrize("mark", ["\n", "!"])
def test_a_process_reward_model_is_read_at_the_mark_behind_each_step(tmp_path, mark):
    folder = classifier(tmp_path / "prm", ["bad", "good"], of="Token")
    [found] = reader(folder, "steps", label="good", separator="\n", mark=mark).read(texts(answered("one\n\ntwo")))
    whole = f"<s>user: 2+2=?\nassistant: one{mark}two{mark}"
    chances = torch.softmax(logits_of(folder, whole), -1)[:, 1].tolist()
    places = [len("user: 2+2=?\nassistant: one") + 1, len("user: 2+2=?\nassistant: one") + 1 + 4]  # `<s>` is one token
    assert found.values == pytest.approx([chances[place] for place in places], abs=1e-5)


def test_a_language_model_says_by_two_tokens_what_it_thinks_of_a_step(tmp_path):
    folder = tiny_model(tmp_path / "lm")
    [found] = reader(folder, "steps", mark="#", good="+", bad="-").read(texts(answered("one")))
    last = logits_of(folder, "<s>user: 2+2=?\nassistant: one#")[-1]
    plus, minus = (last[4 + 1 + ord(sign) - 32].item() for sign in "+-")
    assert found.values == (pytest.approx(1 / (1 + math.exp(minus - plus)), abs=1e-5),)


def test_an_answer_of_no_steps_has_a_reason(tmp_path):
    folder = classifier(tmp_path / "prm", ["bad", "good"], of="Token")
    [found] = reader(folder, "steps", label="good").read(texts(answered(" \n ")))
    assert found == ("0", (), "the answer has no steps: it is empty")


def test_entropy_and_certainty_are_over_the_whole_vocabulary_and_the_tokens_of_the_answer_alone(tmp_path):
    folder = tiny_model(tmp_path / "lm")
    tok, net = tokens.tokenizer(str(folder)), opened(folder)
    prompt, answer = tokens.encode_prompt(tok, say("2+2=?")), [40, 41, 42]
    logits = net(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    entropy = -(logits.exp() * logits).sum(-1).mean().item()
    certainty = (-math.log(logits.shape[-1]) - logits.mean(-1)).mean().item()  # KL(uniform || model)
    rows = texts(answered("xyz", answer), answered("xyz" * 9, answer * 9))
    for kind, right in (("entropy", entropy), ("certainty", certainty)):
        assert Reader(NUMERICS, as_model(folder), Reading(kind)).read(rows)[0].values == (pytest.approx(right, abs=1e-4),)
    assert 0 < entropy < math.log(logits.shape[-1]) and certainty > 0


def test_what_a_model_cannot_say_is_refused_with_what_it_can(tmp_path):
    folder = classifier(tmp_path / "nli", ["entailment", "neutral"])
    with pytest.raises(UsageError, match=r"no class 'yes'\. The model has: entailment, neutral"):
        reader(folder, "label", label="yes")
    with pytest.raises(UsageError, match="2 classes, and none is named"):
        reader(folder, "label")
    with pytest.raises(UsageError, match="needs one that ends in ForTokenClassification or ForCausalLM"):
        reader(folder, "steps", label="neutral")


def test_a_language_model_that_was_never_trained_to_classify_is_refused_where_its_head_would_be_random(tmp_path):
    folder = tiny_model(tmp_path / "lm")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "LlamaForSequenceClassification"))
    with pytest.raises(UsageError, match=r"tensors are missing .* score\.weight"):
        reader(folder, "label", label=0)
