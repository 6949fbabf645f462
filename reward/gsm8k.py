"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168; hub id openai/gsm8k): its rows, and its own strict reading of an answer."""

import re

from numerals import agreement, gold, read
from stated import final

CALCULATION = re.compile(r"<<[^<>]*>>")


def row(raw: dict) -> dict:
    """A raw row as prompt and answer: the answer is what stands behind `####`, the worked solution goes to meta.

    >>> row({"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\\n#### 1,042"})
    {'prompt': '6 x 7?', 'answer': '1042', 'solution': '6 x 7 = 42'}
    """
    solution, mark, answer = raw["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError("the solution states no answer behind ####")
    return {
        "prompt": raw["question"],
        "answer": answer.strip().replace(",", ""),
        "solution": CALCULATION.sub("", solution).strip(),
    }


def correct(completion: str, answer: str) -> float | tuple[float | None, str]:
    """1.0 when the completion has a `#### n` and the first one equals the answer ("strict-match").

    >>> correct("6 x 7 = 42 #### 42", "42"), correct("#### **$42**", "42"), correct("it is 42", "42")
    (1.0, 1.0, 0.0)
    """
    target = gold(answer)
    _, marked, rest = final(completion).partition("####")
    stated = rest.partition("####")[0].strip().partition("\n")[0]
    return agreement(read(stated), target) if marked else 0.0
