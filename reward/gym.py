"""reasoning-gym's own scorers (Stojanovski et al. 2025, arXiv 2505.24760): one verifier per task, most give partial marks.

Needs `pip install reasoning-gym` (in the extras [cpu] and [gpu]). The prompt source `reasoning_gym:` stores what a scorer needs.
"""

import re
from functools import cache

TUPLES = ("arc_agi", "rearc")  # of 105 tasks, the two whose scorers compare with tuples, which JSON turned into lists


def score(completion: str, meta: dict, answer: str | None = None) -> float:
    """The mark of the task named in meta's `source_dataset` for the text behind the last `Answer:`; 0.0 where there is none.

    Some tasks (graph_color, rubiks_cube, ...) have no gold answer: their scorers check any solution.

    >>> score("4 - 1 is 3.\\nAnswer: 3", {"source_dataset": "chain_sum"}, "3")
    1.0
    >>> score("Answer: 4", {"source_dataset": "chain_sum"}, "3") < 0.1
    True
    """
    stated, task = extracted(completion), meta["source_dataset"]
    if stated is None:
        return 0.0
    metadata = {key: frozen(value) for key, value in meta.items()} if task in TUPLES else meta
    return float(scorer(task)(stated, {"question": meta.get("question", ""), "answer": answer, "metadata": metadata}))


def solved(completion: str, meta: dict, answer: str | None = None) -> float:
    """1.0 for full marks, else 0.0: what expert iteration keeps.

    >>> meta = {"source_dataset": "chain_sum"}
    >>> solved("Answer: 3", meta, "3"), solved("Answer: 4", meta, "3")
    (1.0, 0.0)
    """
    return float(score(completion, meta, answer) >= 1.0)


def extracted(completion: str) -> str | None:
    """The text in the last <answer> element, else behind the last `Answer:`, else None: nothing was answered.

    >>> extracted("so\\nAnswer: 3 \\n"), extracted("<answer> x y </answer>"), extracted("3")
    ('3', 'x y', None)
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    if tagged:
        return tagged[-1].strip()
    _, found, stated = completion.rpartition("Answer:")
    return stated.strip() if found else None


def frozen(value):
    """
    >>> frozen([[1, 2], "a"])
    ((1, 2), 'a')
    """
    return tuple(frozen(one) for one in value) if isinstance(value, list) else value


@cache
def scorer(task: str):
    import reasoning_gym

    return reasoning_gym.get_score_answer_fn(task)
