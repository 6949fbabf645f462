"""Easy to hard on copying, by a transformer trained from scratch: three fates of one loop (Lee et al. 2025, arXiv 2502.01612).

The model knows words of up to six letters and copies longer ones, a letter more each round, for its own labels. With a verifier it goes
on; without a filter its mistakes are learned and grow from round to round; labels of which half are wrong undo what it knew.
The loop is the engine's: who is asked, what is scored, kept, replayed and brought. The model is a real one, small enough for a CPU.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chains import go
from learners import Learner, skill

from selfkd.core import digest
from selfkd.recipe.load import load

pytestmark = pytest.mark.nightly

LETTERS, KNOWN, ROUNDS, ASKED, TRIED = "abcdefghij", 6, 3, 512, 256
SEP, END, PAD = len(LETTERS), len(LETTERS) + 1, len(LETTERS) + 2
STEPS, BATCH, RATE = 2500, 128, 1e-3
AGAIN = 60  # steps of a round
RECIPE = """
name: copy
model: fake
rounds: 3
chunk: 4096
keep: {{last: 9}}
prompts:
  take: {{n: 512}}
  train: {{file: train.jsonl, prompt: question, answer: answer}}
steps:
  - sample: {{temperature: 0, max_tokens: 16, as: own}}
  - score: {{reward: reward/exact.py:match, max_failed: 1}}
{filter}
  - replay: {{of: own}}
  - bring: {{from: {{file: easy.jsonl, prompt: question, answer: answer}}, as: easy, licence: ours}}
  - train: sft
"""
VERIFIED = '  - select: "match = 1"'


def word(draw: random.Random, length: int) -> str:
    return "".join(draw.choice(LETTERS) for _ in range(length))


# ---- a transformer without position embeddings, which is what lets it copy longer words ----


def network() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": PAD + 1, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "no_rope_layers": [0] * 3, "max_position_embeddings": 64}
    ids = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": END, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("smollm3", **sizes, **heads, **ids)).float()


def numbers(net: Any) -> list[float]:
    import torch

    return torch.nn.utils.parameters_to_vector(net.parameters()).tolist()  # type: ignore[no-any-return]


def with_numbers(values: list[float]) -> Any:
    import torch

    net = network()
    torch.nn.utils.vector_to_parameters(torch.tensor(values), net.parameters())
    return net


def train(net: Any, drawn: Any, steps: int, rate: float, warm: int) -> Any:
    import torch

    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    net.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm, (steps - step) / (0.2 * steps))
        ids, labels = batch(drawn())
        net(input_ids=ids, attention_mask=(ids != PAD).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
    return net


def batch(pairs: list[tuple[str, str]]) -> tuple[Any, Any]:
    import torch

    width = max(len(asked) + len(said) + 2 for asked, said in pairs)
    ids, labels = torch.full((len(pairs), width), PAD), torch.full((len(pairs), width), -100)
    for row, (asked, said) in enumerate(pairs):
        shown, copied = [*map(LETTERS.index, asked), SEP], [*(LETTERS.index(one) for one in said if one in LETTERS), END]
        ids[row, : len(shown) + len(copied)] = torch.tensor(shown + copied)
        labels[row, len(shown) : len(shown) + len(copied)] = torch.tensor(copied)
    return ids, labels


def copies(net: Any, words: list[str]) -> list[str]:
    """Return what the network writes, greedily, for words that are all equally long."""
    import torch

    now, past, said = torch.tensor([[*map(LETTERS.index, one), SEP] for one in words]), None, []
    with torch.no_grad():
        for _ in range(len(words[0]) + 4):
            found = net.eval()(input_ids=now, past_key_values=past, use_cache=True)
            now, past = found.logits[:, -1].argmax(-1, keepdim=True), found.past_key_values
            said.append(now)
    rows = torch.cat(said, 1).tolist()
    ends = [row.index(END) if END in row else len(row) for row in rows]
    return ["".join(LETTERS[one] for one in row[:end] if one < SEP) or "?" for row, end in zip(rows, ends, strict=True)]


def accuracy(values: list[float], length: int) -> float:
    draw = random.Random(f"tried {length}")
    words = [word(draw, length) for _ in range(TRIED)]
    return sum(a == b for a, b in zip(copies(with_numbers(values), words), words, strict=True)) / TRIED


# ---- the loop ----


class Copier(Learner):
    """Half of each batch are the newest labels, a quarter older ones, a quarter what was brought. `wrong` is the share of labels that are noise."""

    def __init__(self, base: list[float], words: list[str], wrong: float) -> None:
        super().__init__({}, self.said)
        self.base, self.words, self.wrong = base, words, wrong
        self.known: dict[tuple[str, str], str] = {}

    def first(self) -> list[float]:
        return self.base

    def said(self, messages: list[dict[str, str]], seed: int, values: list[float]) -> str:
        asked, weights = messages[-1]["content"], digest.of(values[:64])
        if (weights, asked) not in self.known:
            alike = [one for one in self.words if len(one) == len(asked)]
            self.known |= zip(((weights, one) for one in alike), copies(with_numbers(values), alike), strict=True)
        noise = digest.uniform(seed, "noise") < self.wrong
        return word(random.Random(seed), len(asked)) if noise else self.known[weights, asked]

    def learn(self, now: list[float], rows: list[tuple[str, str]]) -> list[float]:
        newest = max(len(asked) for asked, _ in rows)
        own, easy = [one for one in rows if len(one[0]) > KNOWN], [one for one in rows if len(one[0]) <= KNOWN]
        new, draw = [one for one in own if len(one[0]) == newest], random.Random(newest)

        def drawn() -> list[tuple[str, str]]:
            return draw.choices(new, k=BATCH // 2) + draw.choices(own, k=BATCH // 4) + draw.choices(easy, k=BATCH // 4)

        return numbers(train(with_numbers(now), drawn, AGAIN, RATE / 2, 10))


@pytest.fixture(scope="module")
def base() -> list[float]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # several cost more than they gain at this size
    draw = random.Random(0)

    def drawn() -> list[tuple[str, str]]:
        return [(one, one) for one in (word(draw, draw.randint(1, KNOWN)) for _ in range(BATCH))]

    try:
        return numbers(train(network(), drawn, STEPS, RATE, 100))
    finally:
        torch.set_num_threads(before)


def walked(folder: Path, base: list[float], kept: str = "", wrong: float = 0.0) -> tuple[list[list[float]], list[float]]:
    """Return the weights after each round, and the share of right ones among the labels of each."""
    folder.mkdir()
    draw = random.Random(1)
    words = [word(draw, KNOWN + index) for index in range(1, ROUNDS + 1) for _ in range(ASKED)]
    easy = [word(draw, draw.randint(1, KNOWN)) for _ in range(1000)]
    for name, some in (("train", words), ("easy", easy)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"question": one, "answer": one}) for one in some))
    (folder / "copy.yaml").write_text(RECIPE.format(filter=kept))
    run = go(load(str(folder / "copy.yaml")), folder / "run", Copier(base, words, wrong))
    labels = [run.samples(index, step="sample") for index in range(1, ROUNDS + 1)]
    assert [one.height for one in labels] == [ASKED] * ROUNDS
    right = [float(one["match"].fill_null(0.0).mean()) for one in labels]  # type: ignore[arg-type]
    return [skill(run, index) for index in range(ROUNDS + 1)], right


def test_copying_goes_on_with_a_verifier_decays_without_one_and_is_undone_by_labels_of_which_half_are_wrong(
    tmp_path: Path, base: list[float]
) -> None:
    verified, _ = walked(tmp_path / "verified", base, VERIFIED)
    unfiltered, labels = walked(tmp_path / "unfiltered", base)
    corrupted, noise = walked(tmp_path / "corrupted", base, wrong=0.5)
    table = {
        "base": [accuracy(base, length) for length in range(KNOWN, KNOWN + ROUNDS + 2)],
        "verified": [accuracy(verified[index], KNOWN + index) for index in range(1, ROUNDS + 1)],
        "unfiltered": [accuracy(unfiltered[index], KNOWN + index) for index in range(1, ROUNDS + 1)],
        "labels": labels,
        "noise": noise,
        "known words": [accuracy(one[ROUNDS], KNOWN) for one in (verified, unfiltered, corrupted)],
    }
    print(json.dumps(table))
    first, last = 0, ROUNDS - 1
    assert table["base"][0] > 0.9 and table["base"][ROUNDS] < 0.1  # it knows six letters, and not nine
    assert table["verified"][last] > table["base"][ROUNDS] + 0.2  # each round a letter more
    assert table["verified"][last] > table["unfiltered"][last] + 0.15
    assert all(a > b for a, b in zip(table["labels"], table["labels"][1:], strict=False))  # mistakes compound
    assert table["labels"][last] < table["labels"][first] - 0.3
    assert table["noise"][first] < 0.6 * table["labels"][first] and table["noise"][last] < 0.2
    in_verified, in_unfiltered, in_corrupted = table["known words"]
    assert min(in_verified, in_unfiltered) > table["base"][0] - 0.1 > in_corrupted
