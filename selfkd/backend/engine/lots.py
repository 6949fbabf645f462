"""The requests inside one vLLM, in lots: a second lot may enter while the first drains, so that its tail leaves no room empty."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from selfkd.backend.base import REPORT_SECONDS
from selfkd.backend.engine.sampling_params import refusals

OnTokens = Callable[[int, int, int], None]  # (requests done, tokens so far, steps of the engine so far)


def nothing() -> None:
    """Do nothing between two steps."""


@dataclass(frozen=True, eq=False)
class Lot:
    """Requests that entered together: vLLM's names for them, in order, and {id: output} of those that are finished."""

    names: Sequence[str]
    outputs: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        """Return what outputs are called: the names without what vLLM adds to make them unique."""
        return [name.partition("-")[0] for name in self.names]

    def tokens(self) -> int:
        return sum(len(output.outputs[0].token_ids) for output in self.outputs.values())


class Lots:
    """All that one vLLM is asked. `together`: no request of a lot is begun before all of it entered."""

    def __init__(self, llm: Any, together: bool = False) -> None:
        self._llm, self._together = llm, together
        self._lots: list[Lot] = []
        self._lot_of: dict[str, Lot] = {}  # by the id of an unfinished request
        self.adapter: Any = None  # by which all that enters is answered; None is by the weights alone

    def enter(self, prompts: Sequence[list[int]], params: Sequence[Any], extra: Mapping[str, Any]) -> Lot:
        """Hand requests to vLLM, which begins with them at its next step, behind those that are there.

        One that it does not take because of the recipe's words `extra` is a UsageError, and the engine lives on.
        """
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        beside = {"lora_request": self.adapter} if self.adapter else {}
        with refusals(extra), self._paused():
            lot = Lot(self._llm.enqueue(inputs, list(params), use_tqdm=False, **beside) if inputs else [])
        self._lots.append(lot)
        self._lot_of |= dict.fromkeys(lot.ids, lot)
        return lot

    def finish(self, lot: Lot, on_tokens: OnTokens | None = None, between: Callable[[], None] = nothing) -> list[Any]:
        """Make steps until the lot is whole; return its outputs in the order of its prompts. `between` is called before each step.

        Whatever interrupts it, no request stays behind in the engine.
        """
        try:
            self._step_until_whole(lot, on_tokens, between)
        except BaseException:  # Ctrl-C too: a request left here would join the next chunk's batch
            for one in list(self._lots):
                self.drop(one)
            raise
        self._lots.remove(lot)
        return [lot.outputs[name] for name in lot.ids]

    def hold(self, lot: Lot) -> bool:
        """Whether the lot entered, and was neither finished nor taken out."""
        return any(one is lot for one in self._lots)

    def drop(self, lot: Lot) -> None:
        """Take a lot out of the engine."""
        self._lots.remove(lot)
        self._lot_of = {name: other for name, other in self._lot_of.items() if other is not lot}
        self._llm.llm_engine.abort_request(list(lot.names), internal=True)

    def _step_until_whole(self, lot: Lot, on_tokens: OnTokens | None, between: Callable[[], None]) -> None:
        steps, reported = 0, time.monotonic()
        while len(lot.outputs) < len(lot.names):
            between()
            steps += 1
            for output in self._llm.llm_engine.step():
                self._lot_of.pop(output.request_id).outputs[output.request_id] = output
            if on_tokens and time.monotonic() - reported >= REPORT_SECONDS:
                reported = time.monotonic()
                on_tokens(len(lot.outputs), lot.tokens() + self._tokens_in_flight(), steps)

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Hold a scheduler that has a process of its own, where it would begin with the first request that it sees."""
        if not self._together or hasattr(
            self._llm.llm_engine.engine_core, "engine_core"
        ):  # in this process it waits for a step
            yield
            return
        self._llm.sleep(level=0, mode="keep")
        try:
            yield
        finally:
            self._llm.wake_up(["scheduling"])

    def _tokens_in_flight(self) -> int:
        """Count those of unfinished requests, as far as they have come back from the scheduler."""
        states = self._llm.llm_engine.output_processor.request_states.values()
        return sum(state.detokenizer.num_output_tokens() for state in states)
