"""Models that read beside engines that answer: in this process, and as actors that die."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from local_engines import backend as local_backend
from scorers import classifier, logits_of
from tiny import WORDS, as_model, say, tiny_model
from toys import OLD, chunk_of, chunks_of

from selfkd.backend.base import Sampling
from selfkd.backend.engine.root_model import load_model
from selfkd.backend.reading import PART, TEXTS, Read, Reading
from selfkd.core import digest
from selfkd.core.pool import Model
from selfkd.errors import BackendError, UsageError

HOW = Reading("label")


def rows(count: int, text: str = "fine") -> pl.DataFrame:
    return pl.DataFrame([{"id": f"r{number}", "text": text} for number in range(count)], schema=TEXTS)


class Toy:
    """A reader that says who it is, and does what the first text orders: die (once, or always), or refuse."""

    def __init__(self, numerics: dict[str, Any], model: Model, reading: Reading) -> None:
        self.folder, self.facts = Path(model.path), {"torch": "toy", "runner": reading.kind}

    def read(self, part: pl.DataFrame) -> list[Read]:
        order = part["text"][0]
        if order == "die" or (order == "die-once" and not (self.folder / "died").exists()):
            (self.folder / "died").touch()
            os._exit(1)
        if order == "refuse":
            raise UsageError("no class 'good'", "the model", "Name another.")
        return [Read(name, (float(os.getpid()), float(part.height))) for name in part["id"]]


def test_texts_are_read_in_their_order_by_a_process_that_is_gone_afterwards(backend: Any, tmp_path: Path) -> None:
    ray = backend(reader=Toy)
    list(ray.generate(OLD, chunks_of(tmp_path, "answer"), Sampling()))
    found = list(ray.read(Model("scorer", str(tmp_path), "0"), HOW, rows(2 * PART + 7)))
    assert [one.id for one in found] == [f"r{number}" for number in range(2 * PART + 7)]
    assert [found[at].values[1] for at in (0, PART, 2 * PART)] == [PART, PART, 7]
    assert ray.facts() == {"engine-0": {"torch": "toy"}, "reader-0": {"torch": "toy", "runner": "label"}}
    assert list(ray.generate(OLD, chunks_of(tmp_path, "more"), Sampling()))


def test_a_reader_that_dies_is_replaced_and_its_part_is_read_again(backend: Any, tmp_path: Path) -> None:
    found = list(backend(reader=Toy).read(Model("scorer", str(tmp_path), "0"), HOW, rows(PART + 1, "die-once")))
    assert len(found) == PART + 1 and (tmp_path / "died").exists()


def test_readers_that_die_of_one_part_stop_the_run(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="2 processes were lost"):
        list(backend(reader=Toy).read(Model("scorer", str(tmp_path), "0"), HOW, rows(3, "die")))


def test_what_a_reader_refuses_is_said_in_its_own_words(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no class 'good'"):
        list(backend(reader=Toy).read(Model("scorer", str(tmp_path), "0"), HOW, rows(3, "refuse")))


def test_an_engine_and_a_reader_take_turns_in_one_process_and_both_say_what_they_said_before(tmp_path: Path) -> None:
    load_model({"path": str(tiny_model(tmp_path / "tiny"))}, tmp_path / "policy", None)
    policy = as_model(tmp_path / "policy")
    folder = classifier(tmp_path / "rm", ["reward"])
    texts = pl.DataFrame(
        [{"id": "a", "messages": say("hi"), "text": "yes", "token_ids": None, "finish_reason": "stop"}], schema=TEXTS
    )
    with local_backend(tmp_path, "transformers") as local:
        chunk = chunk_of(tmp_path, WORDS)
        before = [reply.path.name for reply in local.generate(policy, [chunk], Sampling(max_tokens=8))]
        [found] = local.read(Model("scorer", str(folder), digest.weights(folder)), HOW, texts)
        [own] = local.read(policy, Reading("entropy", context=256), texts)
        assert [reply.path.name for reply in local.generate(policy, [chunk], Sampling(max_tokens=8))] == before
    by_hand = logits_of(folder, "<s>user: hi\nassistant: yes\n").item()
    assert found.values == (pytest.approx(by_hand, abs=1e-5),) and own.values[0] > 0
    assert local.facts()["reader-0"]["runner"] == "transformers.LlamaForCausalLM"
