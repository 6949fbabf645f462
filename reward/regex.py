"""Format rewards: does the completion have the wanted form? As in DeepSeek-R1's format reward (2025, arXiv 2501.12948).

A pattern that backtracks without end is stopped by the reward's deadline, and that sample has no value.
"""

import re


def matches(completion: str, pattern: str) -> float:
    """1.0 when `pattern` (a `params:` entry or a meta column) is found in the completion; a dot matches line breaks.

    >>> matches("step 1\\nAnswer: 42", r"Answer: \\d+$")
    1.0
    >>> matches("42", r"Answer: \\d+$")
    0.0
    """
    return float(re.search(pattern, completion, re.DOTALL) is not None)


def answer_line(completion: str) -> float:
    """1.0 when the last line is `Answer: ` and something.

    >>> answer_line("2 + 2\\nAnswer: 4"), answer_line("Answer: 4\\nor 5")
    (1.0, 0.0)
    """
    lines = completion.strip().splitlines()
    return float(bool(lines) and re.match(r"\s*Answer:\s*\S", lines[-1]) is not None)


def has_tags(completion: str, tags: str = "think answer") -> float:
    """1.0 when the completion is exactly these elements, in order, each once and not empty.

    >>> has_tags("<think>6 x 7</think>\\n<answer>42</answer>")
    1.0
    >>> has_tags("<answer>42</answer>")
    0.0
    >>> has_tags("<think>a</think><answer>1</answer><answer>2</answer>")
    0.0
    """
    names = tags.split()
    form = r"\s*".join(rf"<{name}>\s*\S.*?</{name}>" for name in names)
    once = all(completion.count(f"<{name}>") == completion.count(f"</{name}>") == 1 for name in names)
    return float(once and re.fullmatch(rf"\s*{form}\s*", completion, re.DOTALL) is not None)
