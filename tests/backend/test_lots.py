"""Requests in lots, on a vLLM that is a list: two steps a request, so many at a time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from selfkd.backend.engine import lots as lots_module
from selfkd.backend.engine.lots import Lots
from selfkd.errors import UsageError


class ListedLLM:
    """Finishes requests in the order in which they entered, after as many steps as their prompt has tokens, `room` of them at a time."""

    def __init__(self, room: int = 2) -> None:
        self.room, self.number, self.llm_engine = room, 0, self
        self.engine_core, self.output_processor = SimpleNamespace(), SimpleNamespace(request_states={})
        self.calls: list[str] = []
        self.waiting: dict[str, int] = {}
        self.batches: list[list[str]] = []

    def enqueue(self, inputs: list[dict[str, Any]], params: list[Any], use_tqdm: bool) -> list[str]:
        if any(param == "wrong" for param in params):
            raise ValueError("this word is wrong")
        self.calls.append(f"{len(inputs)} enter")
        names = [f"{self.number + place}-abcd" for place in range(len(inputs))]
        self.number += len(inputs)
        self.waiting |= {name: len(one["prompt_token_ids"]) for name, one in zip(names, inputs, strict=True)}
        return names

    def step(self) -> list[Any]:
        batch = list(self.waiting)[: self.room]
        self.batches.append(batch)
        for name in batch:
            self.waiting[name] -= 1
        done = [name for name in batch if not self.waiting[name]]
        self.waiting = {name: left for name, left in self.waiting.items() if left}
        answer = [SimpleNamespace(token_ids=[1])]
        return [SimpleNamespace(request_id=name.split("-")[0], outputs=answer) for name in reversed(done)]

    def sleep(self, level: int, mode: str) -> None:
        assert (level, mode) == (0, "keep")  # no memory is given back, and no request is lost
        self.calls.append("pause")

    def wake_up(self, tags: list[str]) -> None:
        assert tags == ["scheduling"]
        self.calls.append("go on")

    def abort_request(self, names: list[str], internal: bool) -> None:
        self.waiting = {name: left for name, left in self.waiting.items() if name not in names}


def ids(outputs: list[Any]) -> list[str]:
    return [output.request_id for output in outputs]


def test_outputs_come_in_the_order_of_the_prompts_whichever_finished_first() -> None:
    lots = Lots(ListedLLM(room=3))
    lot = lots.enter([[1, 1, 1], [1], [1, 1]], ["a", "b", "c"], {})
    assert ids(lots.finish(lot)) == ["0", "1", "2"]


def test_a_second_lot_fills_the_room_that_the_first_leaves_free() -> None:
    llm = ListedLLM(room=2)
    lots = Lots(llm)
    first = lots.enter([[1], [1, 1, 1]], ["a", "b"], {})
    second: list[Any] = []

    def between() -> None:
        if not second:
            second.append(lots.enter([[1, 1]], ["c"], {}))

    assert ids(lots.finish(first, between=between)) == ["0", "1"]
    assert llm.batches == [["0-abcd", "1-abcd"], ["1-abcd", "2-abcd"], ["1-abcd", "2-abcd"]]
    assert ids(lots.finish(second[0])) == ["2"]
    assert len(llm.batches) == 3  # it was whole already


def test_a_lot_that_is_taken_out_leaves_the_other_alone() -> None:
    llm = ListedLLM()
    lots = Lots(llm)
    first, second = lots.enter([[1, 1]], ["a"], {}), lots.enter([[1]], ["b"], {})
    lots.drop(second)
    assert lots.hold(first) and not lots.hold(second)
    assert ids(lots.finish(first)) == ["0"]
    assert llm.waiting == {}


def test_an_interruption_leaves_no_request_behind() -> None:
    llm = ListedLLM()
    lots = Lots(llm)
    first, second = lots.enter([[1, 1]], ["a"], {}), lots.enter([[1]], ["b"], {})

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lots.finish(first, between=interrupt)
    assert llm.waiting == {} and not lots.hold(first) and not lots.hold(second)


def test_a_word_of_the_recipe_that_is_refused_is_an_error_of_the_user_and_nothing_entered() -> None:
    lots = Lots(ListedLLM())
    with pytest.raises(UsageError, match="this word is wrong"):
        lots.enter([[1]], ["wrong"], {"word": 1})


def test_a_scheduler_in_a_process_of_its_own_waits_until_a_whole_lot_entered() -> None:
    llm = ListedLLM()
    lots = Lots(llm, together=True)
    assert ids(lots.finish(lots.enter([[1], [1]], ["a", "b"], {}))) == ["0", "1"]
    assert llm.calls == ["pause", "2 enter", "go on"]
    with pytest.raises(UsageError):
        lots.enter([[1]], ["wrong"], {"word": 1})
    assert llm.calls[3:] == ["pause", "go on"]  # else the next lot would wait for ever


@pytest.mark.parametrize("together", [True, False])
def test_nobody_pauses_a_scheduler_in_this_process_or_one_that_may_begin_at_once(together: bool) -> None:
    llm = ListedLLM()
    llm.engine_core = SimpleNamespace(engine_core=None) if together else llm.engine_core
    Lots(llm, together).enter([[1]], ["a"], {})
    assert llm.calls == ["1 enter"]


def test_tokens_of_unfinished_requests_are_counted_wherever_the_scheduler_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lots_module, "REPORT_SECONDS", 0.0)
    llm, told = ListedLLM(room=2), []
    llm.output_processor = SimpleNamespace(
        request_states={"1": SimpleNamespace(detokenizer=SimpleNamespace(num_output_tokens=lambda: 5))}
    )
    lots = Lots(llm)
    lots.finish(lots.enter([[1], [1, 1]], ["a", "b"], {}), lambda *numbers: told.append(numbers))
    assert told == [(1, 1 + 5, 1), (2, 2 + 5, 2)]


def test_nothing_is_whole_at_once() -> None:
    lots = Lots(ListedLLM())
    assert lots.finish(lots.enter([], [], {})) == []
