"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168; hub id openai/gsm8k): its rows, and its own strict reading of an answer."""

import ast
import hashlib
import operator
import re
from fractions import Fraction

from numerals import agreement, gold, read
from stated import final

CALCULATION = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)")
LONGEST = 200  # characters of a calculation
OPERATE = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


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


def annotated(raw: dict) -> dict:
    """A raw row with its calculations left in the solution, as models are taught that are to write them: `<<6*7=42>>`.

    >>> annotated({"question": "6 x 7?", "answer": "6 x 7 = <<6*7=42>>42\\n#### 42"})["solution"]
    '6 x 7 = <<6*7=42>>42'
    """
    return {**row(raw), "solution": raw["answer"].rpartition("####")[0].strip()}


def calculations(completion: str) -> float:
    """1.0 when every calculation in `<< >>` comes out as it says, to the places that it gives; also where there is none (RFT's check).

    >>> calculations("<<6*7=42>>42, <<50/100*80=40>>40"), calculations("<<10/3=3.33>>"), calculations("<<2+2=5>>"), calculations("42")
    (1.0, 1.0, 0.0, 1.0)
    """
    return float(all(comes_out(found) for found in equations(completion)))


def path(completion: str) -> float:
    """A number that names the reasoning path: the calculations in `<< >>` in their order, without blanks (RFT's key of repeats).

    >>> path("<<6*7 = 42>> so 42") == path("That is <<6*7=42>>42."), path("<<7*6=42>>") == path("<<6*7=42>>"), path("no calculation")
    (True, False, 0.0)
    """
    found = equations(completion)
    return float(int.from_bytes(hashlib.sha256("\n".join(found).encode()).digest()[:6], "big")) if found else 0.0


def equations(completion: str) -> list[str]:
    """
    >>> equations("<<6 * 7=42>>42 and <<1+1=2>>")
    ['6*7=42', '1+1=2']
    """
    return ["".join(found[2:-2].split()) for found in CALCULATION.findall(final(completion))]


def comes_out(equation: str) -> bool:
    """
    >>> comes_out("(1+2)*-3=-9"), comes_out("1,000/8=125"), comes_out("9**9=1"), comes_out("1/0=1"), comes_out("x=1")
    (True, True, False, False, False)
    """
    left, equals, right = equation.replace(",", "").replace("$", "").partition("=")
    if not equals or len(left) > LONGEST or not NUMBER.fullmatch(right):
        return False
    try:
        value = worked_out(ast.parse(left.lstrip("+"), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False
    unit = Fraction(1, 10 ** len(right.partition(".")[2]))
    return abs(value - Fraction(right)) <= unit / 2


def worked_out(node: ast.expr) -> Fraction:
    """
    >>> worked_out(ast.parse("1 - .5 * 3", mode="eval").body)
    Fraction(-1, 2)
    """
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(repr(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -worked_out(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATE:
        return OPERATE[type(node.op)](worked_out(node.left), worked_out(node.right))
    raise ValueError("no plain calculation")
