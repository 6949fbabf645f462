"""Where a round's time goes, read from a finished run: stages, the rest, and how long the engine waits around an update.

`python idle.py RUN` prints, per round: seconds of generate, train, score, measure; everything else as a share of the round; seconds from the last
answer to the start of the first optimiser step, and from the end of the last step to the first measured tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from selfkd.chain.run import Run

STAGES = {"sample": "generate", "score": "score", "train": "train", "measure": "measure"}


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(folder.glob("logs/*/events.jsonl")) for line in path.read_text().splitlines()]


def main(folder: str) -> list[dict[str, Any]]:
    run = Run.at(Path(folder))
    events = events_of(run.folder)
    return [
        _round(run, index, [event for event in events if event.get("round") == index]) for index in range(1, len(run.sealed()))
    ]


def _round(run: Run, index: int, events: list[dict[str, Any]]) -> dict[str, Any]:
    def when(kind: str, step: str, last: bool) -> float:
        times = [event["t"] for event in events if event["event"] == kind and event.get("step") == step]
        return times[-1 if last else 0]

    whole = [event["t"] for event in events if event["event"] == "sealed"][-1] - events[0]["t"]
    commits = run.made(index)
    seconds = {stage: commits[step].notes["seconds"] for step, stage in STAGES.items() if step in commits}
    train = commits["train"].notes["train"]
    step = train["seconds"] / train["steps"]
    steps = [e["t"] for e in events if e["event"] == "progress" and e.get("step") == "train" and e["done"]]
    swap = commits["measure"].notes["swap"]
    spoken = [e["t"] for e in events if e["event"] == "progress" and e.get("step") == "measure" and e.get("tokens")]
    return {
        "round": index,
        "seconds": round(whole, 1),
        **seconds,
        "beyond": f"{1 - sum(seconds.values()) / whole:.1%}",
        "to first optimiser step": round(steps[0] - step - when("made", "sample", True), 2),
        "to first token": round(spoken[0] - steps[-1], 2),
        "swap and proof": swap["seconds"],
        "survived": None if swap["survived"] is None else round(swap["survived"], 2),
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
