"""Whether a method has anything to learn here: judged from the untouched model, before anything is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfkd.chain import measured, records
from selfkd.chain.paths import Paths
from selfkd.chain.records import Seal
from selfkd.chain.results import measuring
from selfkd.core.stats import change, interval
from selfkd.recipe.control import decodings

NO_HEADROOM = "no headroom"


def lacks_headroom(folder: Path, metric: str, wanted: Any) -> str:
    """Return why a base that was measured under every decoding leaves nothing to learn, or ''."""
    paths = Paths(folder)
    seal = records.read(paths.round(0).seal, Seal)
    known = decodings(metric, list(seal.metrics))
    scores = {name: _scores(paths, 0, name) for name in known}
    sampled = next((name for name in known if name.endswith("_at_07")), metric)
    if isinstance(wanted, float | int):
        bounds = interval(scores[sampled])
        held = bounds is not None and bounds.low > wanted
        return "" if held else f"{NO_HEADROOM}: {_percent(scores[sampled])} of {sampled} is not surely above {wanted:g}"
    ends, plain = ("_told", metric) if wanted == "told" else (re.compile(r"_maj_\d+$"), sampled)
    better = next((name for name in known if (name.endswith(ends) if isinstance(ends, str) else ends.search(name))), None)
    if better is None:
        return f"{NO_HEADROOM}: the base was not measured with '{wanted}'"
    found = change(scores[plain], scores[better])
    if found and found.interval and found.interval.low > 0:
        return ""
    return f"{NO_HEADROOM}: {better} is {_percent(scores[better])}, not surely above {plain} with {_percent(scores[plain])}"


def _percent(scores: Mapping[str, float]) -> str:
    return f"{100 * sum(scores.values()) / len(scores):.1f} %" if scores else "nothing"


def _scores(paths: Paths, index: int, metric: str) -> Mapping[str, float]:
    commit = measuring(paths, index, metric)
    return measured.prompt_means(paths, commit, metric.partition("/")[2]) if commit else {}
