"""Mathematical equality by the math-verify library (github.com/huggingface/Math-Verify): LaTeX, fractions, sets, units.

Needs `pip install math-verify` (in the extras [cpu] and [gpu]). The library's own timeout is switched off: it uses
signal.alarm, which works only in a main thread, and a reward has its own deadline already.
"""

import re
from functools import lru_cache


def correct(completion: str, answer: str) -> float:
    """1.0 when the completion's final answer is mathematically equal to the gold answer.

    >>> correct("so it is #### 42", "42")
    1.0
    >>> correct(r"Therefore $x = \\boxed{\\frac{1}{2}}$", "0.5")
    1.0
    >>> correct("Answer: 7", "42")
    0.0
    >>> correct("no idea", "42")
    0.0
    """
    from math_verify import verify

    target = gold(answer)
    return float(verify(target, parsed(completion), timeout_seconds=None))


@lru_cache(maxsize=256)
def gold(answer: str) -> list:
    """The gold answer, parsed; one that cannot be read is an error of the data, so it raises.

    >>> gold("42")[0]
    42
    """
    target = parsed(answer) or parsed(f"${answer}$")
    if not target:
        raise ValueError(f"the gold answer {answer!r} cannot be read as mathematics")
    return target


def parsed(text: str) -> list:
    from math_verify import parse

    return parse(text, parsing_timeout=None)


def row(raw: dict) -> dict:
    """A row of a mathematics data set with `problem` and `solution` (or `answer`) as prompt and answer.

    >>> row({"problem": "1+1?", "solution": r"It is $\\boxed{2}$.", "level": 1})
    {'prompt': '1+1?', 'answer': '2', 'level': 1}
    """
    rest = {key: value for key, value in raw.items() if key not in ("problem", "solution", "answer")}
    answer = raw.get("answer") or boxed(raw["solution"])
    return {"prompt": raw["problem"], "answer": answer, **rest}


def boxed(solution: str) -> str:
    """What stands in the last \\\\boxed{}, braces balanced.

    >>> boxed(r"so \\boxed{\\frac{1}{2}}.")
    '\\\\frac{1}{2}'
    """
    start = re.search(r".*\\boxed\s*\{", solution, re.DOTALL)
    if start is None:
        raise ValueError("the solution has no \\boxed{...}")
    depth, end = 1, start.end()
    while depth and end < len(solution):
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        end += 1
    return solution[start.end() : end - 1]
