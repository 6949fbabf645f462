"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168; hub id openai/gsm8k): its rows, and its own strict reading of an answer."""

import re
from decimal import Decimal

MARKED = re.compile(r"####\s*([-−]?[\d,]*\.?\d+)")
CALCULATION = re.compile(r"<<.*?>>")


def row(raw: dict) -> dict:
    """A raw row as prompt and answer: the answer is what stands behind `####`, the worked solution goes to meta.

    >>> row({"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\\n#### 1,042"})
    {'prompt': '6 x 7?', 'answer': '1042', 'solution': '6 x 7 = 42'}
    """
    solution, _, answer = raw["answer"].rpartition("####")
    return {
        "prompt": raw["question"],
        "answer": answer.strip().replace(",", ""),
        "solution": CALCULATION.sub("", solution).strip(),
    }


def correct(completion: str, answer: str) -> float:
    """1.0 when the completion has a `#### n` and the first one equals the answer ("strict-match").

    >>> correct("6 x 7 = 42 #### 42", "42")
    1.0
    >>> correct("it is 42", "42")
    0.0
    """
    marked = MARKED.search(completion)
    return float(marked is not None and number(marked[1]) == number(answer))


def number(text: str) -> Decimal:
    """
    >>> number("1,042") == number("1042.0")
    True
    """
    return Decimal(text.replace(",", "").replace("−", "-"))
