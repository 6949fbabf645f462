"""Views: the numbers that expressions see are the same on every machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

MEANS = """
import json, sys
import polars as pl
from selfkd.core import views
from selfkd.core.pool import Pool, shape

values = [1 / (7 + at % 9973) for at in range(60_000)]
samples = pl.DataFrame({"id": [f"s{at % 20_000}" for at in range(60_000)][:20_000], "prompt": [f"p{at % 3}" for at in range(20_000)]})
scores = {"sample": [f"s{at % 20_000}" for at in range(60_000)], "name": "x", "draw": [at // 20_000 for at in range(60_000)], "value": values}
pool = Pool({
    "samples": shape("samples", samples),
    "prompts": shape("prompts", pl.DataFrame({"id": ["p0", "p1", "p2"]})),
    "scores": shape("scores", pl.DataFrame(scores)),
})
found = views.with_scores(pool.samples, pool)["x"].to_list()
print(json.dumps([pl.thread_pool_size(), views.prompt_view(pool)["x_mean"].to_list(), found[:500]]))
"""


def test_means_are_the_same_to_the_last_digit_whatever_the_number_of_threads():
    runs = [
        subprocess.run(
            [sys.executable, "-c", MEANS], env={**os.environ, "POLARS_MAX_THREADS": threads}, capture_output=True, check=True
        )
        for threads in ("1", "2", "5")
    ]
    threads, means, scores = zip(*(json.loads(run.stdout) for run in runs), strict=True)
    assert threads == (1, 2, 5)
    assert means[0] == means[1] == means[2] and scores[0] == scores[1] == scores[2]
