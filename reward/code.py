"""Code rewards: the last fenced block of a completion is run against tests behind the walls of selfkd.sandbox (docs/sandbox.md).

The program only makes outputs. They are compared here, in a process that never runs the program, as data of exact types; no
expected answer is ever in the program's reach, and a test's input reaches it only when that test runs. Exit status 0 is no
pass. A reason never quotes an expected answer, so it may be shown to the model.

Tests come in the forms that data sets use, as a column `tests` (a list, or its JSON text):

    {"input": "3 4", "output": "7"}                                        standard input and output
    {"call": "add", "args": [3, 4], "returns": 7}                          a function; "Solution.add" for a method
    {"inputs": [...], "outputs": [...], "fn_name": "add"}                  APPS, TACO (without fn_name: standard input)
    {"input": "3\\n4", "output": "7", "testtype": "functional"}             LiveCodeBench; the function is `entry_point`
    "assert add(3, 4) == 7"                                                MBPP; read, not run (reward/asserts.py)
"""

import json
from dataclasses import dataclass
from time import monotonic
from typing import Any

from asserts import BAD_DATA, Assertion, same, short, shown

from selfkd.sandbox import Limits, Sandbox, host

PROGRAM_BYTES = 1_000_000
ALIASES = {"python": ("python", "py", "python3"), "javascript": ("javascript", "js", "node"), "bash": ("bash", "sh", "shell")}


def code_tests(
    completion: str,
    tests: list | dict | str,
    strict: bool = False,
    entry_point: str = "",
    language: str = "python",
    argv: list | None = None,
    see: list | None = None,
    prelude: str = "",
    fenced: bool = True,
    exact: bool = True,
    tolerance: float = 0.0,
    seconds: float = 3.0,
    budget: float = 6.0,
    memory_mb: int = 512,
    processes: int = 32,
    warm: bool = True,
    unsafe: str | None = None,
) -> tuple[float, str]:
    """The share of tests that the program passes, and which one failed first and why. `strict`: 1.0 for all of them, else 0.0.

    `argv` names another interpreter (["/usr/bin/node", "{program}.js"], with `language` for the fence), `see` more folders
    to be seen read-only (for Python: and imported from), `prelude` what is put before the program. `exact`: 3 is not 3.0, and
    True never is 1. `tolerance` lets numbers differ by that much, absolutely or in proportion. A test may take `seconds`; when
    all together took `budget`, the rest has failed: keep the sum of both below the step's `timeout`. `unsafe: "I accept"` runs
    programs where the host has no walls.

    >>> code_tests("So:\\n```python\\nprint(sum(map(int, input().split())))\\n```", [{"input": "3 4", "output": "7"}])
    (1.0, '1 of 1 tests')
    >>> program = "```python\\ndef half(x):\\n    return x // 2\\n```"
    >>> code_tests(program, ["assert half(4) == 2", "assert half(3) == 1.5", "assert half('a') == 0"])
    (0.3333333333333333, '1 of 3 tests; test 2: wrong answer: 1')
    >>> code_tests(program, ["assert half(4) == 2", "assert half(3) == 1.5"], strict=True)
    (0.0, '1 of 2 tests; test 2: wrong answer: 1')
    >>> code_tests("I do not know.", ["assert half(4) == 2"])
    (0.0, 'no python block in the completion')
    """
    cases = read(tests, entry_point, exact, tolerance)
    found = last_block(completion, language) if fenced else last_block(completion, language) or completion
    if found is None:
        return 0.0, f"no {language} block in the completion"
    program = f"{prelude}\n{found}" if prelude else found
    size = len(program.encode("utf-8", "surrogatepass"))
    if size > PROGRAM_BYTES:
        return 0.0, f"the program has {size} bytes, the limit is {PROGRAM_BYTES}"
    space = None if argv else 2 * memory_mb << 20  # other interpreters reserve far more than they use
    limits = Limits(seconds=seconds, memory=memory_mb << 20, address_space=space, processes=processes)
    box = Sandbox(limits, tuple(argv) if argv else None, warm=warm, see=tuple(see or ()), unsafe=unsafe)
    passed, failure = run(box, program, cases, budget, strict)
    why = f"{passed} of {len(cases)} tests" + (f"; {failure}" if failure else "")
    return (float(passed == len(cases)) if strict else passed / len(cases)), why


def row(raw: dict) -> dict:
    """A row of MBPP (Austin et al. 2021), APPS (Hendrycks et al. 2021) or LiveCodeBench (Jain et al. 2024) as prompt and tests.

    MBPP names the function only in its tests, so the prompt shows the first one; the others stay hidden. Of LiveCodeBench the
    public tests are read: the private ones are a pickle.

    >>> row({"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"], "test_setup_code": ""})["tests"]
    ['assert add(1, 2) == 3', 'assert add(0, 0) == 0']
    >>> row({"question": "Add.", "input_output": '{"inputs": ["1 2"], "outputs": ["3"]}', "starter_code": ""})["prompt"]
    'Add.'
    """
    if "test_list" in raw:
        setup = "\n".join([*raw.get("test_imports", []), raw.get("test_setup_code", "")]).strip()
        asked = f"{raw.get('text') or raw['prompt']}\nYour code should pass tests like this one:\n{raw['test_list'][0]}"
        return {"prompt": asked, "tests": raw["test_list"], "prelude": setup}
    starter = f"\nBegin with:\n{raw['starter_code']}" if raw.get("starter_code") else ""
    if "input_output" in raw:
        return {"prompt": raw["question"] + starter, "tests": raw["input_output"]}
    entry = json.loads(raw.get("metadata") or "{}").get("func_name", "")
    return {"prompt": raw["question_content"] + starter, "tests": json.loads(raw["public_test_cases"]), "entry_point": entry}


def notes() -> dict:
    """What a run records beside the scores, outside of every digest: the walls that stood.

    >>> sorted(notes())
    ['tier', 'walls']
    """
    return {"tier": host().tier, "walls": host().walls}


# --------------------------------------------------------------------------------------------------------------- running


def run(box: Sandbox, program: str, cases: list, budget: float, strict: bool) -> tuple[int, str]:
    """(tests passed, what the first failure was). `strict` stops there."""
    passed, first, spent = 0, "", 0.0
    with box.calls(program) if any(not isinstance(case, Printed) for case in cases) else NoCalls() as functions:
        for number, case in enumerate(cases, 1):
            began = monotonic()
            if spent >= budget:
                reason = f"not run: the tests before it took {budget:g} s"
            else:
                reason = judged(case, box, program, functions)
            spent += monotonic() - began
            passed += not reason
            first = first or (f"test {number}: {reason}" if reason else "")
            if reason and strict:
                break
    return passed, first


def judged(case: Any, box: Sandbox, program: str, functions: Any) -> str:
    """'' where the test passed, else why not. Data that breaks the comparison is a wrong answer: never a score that is missing.

    An error of this host is none of the program's, and comes through.
    """
    given = box.run(program, case.input) if isinstance(case, Printed) else functions.call
    try:
        return case.judge(given)
    except BAD_DATA as error:
        return f"wrong answer ({type(error).__name__})"


class NoCalls:
    """Stands in where no test calls a function."""

    call = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


# ----------------------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True)
class Printed:
    """Standard input, and what must be printed for it."""

    input: str
    output: str
    tolerance: float = 0.0

    def judge(self, done: Any) -> str:
        """'' where it passed, else the reason: it must end well *and* print this, up to blanks at line ends."""
        if not done.ok:
            return done.reason
        got, want = lines(done.stdout), lines(self.output)
        if got == want or (self.tolerance and close(got, want, self.tolerance)):
            return ""
        return f"wrong output: {shown(done.stdout)}" if done.stdout.strip() else "printed nothing"


@dataclass(frozen=True)
class Called:
    """A function, its arguments, and what it must return. `alternatives`: any of these will do."""

    name: str
    arguments: list
    keywords: dict
    alternatives: list
    exact: bool = True
    tolerance: float = 0.0

    def judge(self, call: Any) -> str:
        returned = call(self.name, *self.arguments, **self.keywords)
        if not returned.ok:
            return returned.reason
        got = plain(returned.value)  # the test is JSON: it has no tuples to ask for
        right = any(same(got, one, self.exact, self.tolerance) for one in self.alternatives)
        return "" if right else f"wrong answer: {short([returned.value])}"


def read(tests: Any, entry_point: str = "", exact: bool = True, tolerance: float = 0.0) -> list:
    """The tests of any form above. ValueError says which one is none, so that a broken row is unscored and never a zero.

    >>> read('{"inputs": ["1"], "outputs": ["2"]}')
    [Printed(input='1', output='2', tolerance=0.0)]
    >>> read([{"input": "[1, 2]\\n3", "output": "true", "testtype": "functional"}], "f")[0].arguments
    [[1, 2], 3]
    >>> read([{"input": "", "output": " "}])
    Traceback (most recent call last):
    ValueError: test 1 expects no output: every program that ends would pass it
    """
    given = json.loads(tests) if isinstance(tests, str) and not tests.lstrip().startswith("assert") else tests
    given = spread(given) if isinstance(given, dict) and "inputs" in given else given
    given = given if isinstance(given, list) else [given]
    if not given:
        raise ValueError("there are no tests")
    return [one_test(test, f"test {number}", entry_point, exact, tolerance) for number, test in enumerate(given, 1)]


def spread(given: dict) -> list:
    """The APPS form as single tests. Its outputs of functions may or may not be wrapped in a list of one."""
    inputs, outputs, name = given["inputs"], given["outputs"], given.get("fn_name")
    if len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs but {len(outputs)} outputs")
    if not name:
        return [{"input": text(one), "output": text(other)} for one, other in zip(inputs, outputs)]
    wrapped = [[other, *(other if isinstance(other, list) and len(other) == 1 else [])] for other in outputs]
    return [{"call": name, "args": one, "any_of": anyof} for one, anyof in zip(inputs, wrapped)]


def one_test(test: Any, where: str, entry_point: str, exact: bool, tolerance: float) -> Any:
    if isinstance(test, str):
        return Assertion.read(test, where, exact, tolerance)
    if not isinstance(test, dict):
        raise ValueError(f"{where} is neither a mapping nor an assert")
    if test.get("testtype") == "functional":
        if not entry_point:
            raise ValueError(f"{where} calls a function, but there is no entry_point")
        arguments = [json.loads(line) for line in test["input"].split("\n") if line.strip()]
        return Called(entry_point, arguments, {}, [json.loads(test["output"])], exact, tolerance)
    if "call" in test and ("returns" in test or "any_of" in test):
        wanted = test["any_of"] if "any_of" in test else [test["returns"]]
        return Called(test["call"], list(test.get("args", [])), dict(test.get("kwargs", {})), wanted, exact, tolerance)
    if not isinstance(test.get("input"), str) or not isinstance(test.get("output"), str):
        raise ValueError(f"{where} has neither input and output (texts) nor call and returns")
    if not test["output"].strip():
        raise ValueError(f"{where} expects no output: every program that ends would pass it")
    return Printed(test["input"], test["output"], tolerance)


def text(value: Any) -> str:
    """
    >>> text(["1", "2"]), text("x")
    ('1\\n2', 'x')
    """
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


# ------------------------------------------------------------------------------------------------------------- comparing


def lines(printed: str) -> list[str]:
    """
    >>> lines("a  \\nb\\n\\n") == lines("a\\nb")
    True
    """
    return [line.rstrip() for line in printed.rstrip().splitlines()]


def close(got: list[str], want: list[str], tolerance: float) -> bool:
    """Word by word, numbers within the tolerance.

    >>> close(["0.33333 x"], ["0.33334 x"], 1e-4), close(["0.3 x"], ["0.4 x"], 1e-4), close(["nan"], ["1"], 1.0)
    (True, False, False)
    """
    pairs = [(line.split(), other.split()) for line, other in zip(got, want)]
    if len(got) != len(want) or any(len(line) != len(other) for line, other in pairs):
        return False
    return all(a == b or same(number(a), number(b), False, tolerance) for line, other in pairs for a, b in zip(line, other))


def number(word: str) -> Any:
    """The number that a word is, or an object that equals nothing."""
    try:
        return float(word)
    except ValueError:
        return object()


def plain(value: Any) -> Any:
    """A value as JSON would have it: tuples become lists, whole numbers as keys become texts.

    >>> plain((1, {2: (3,)}))
    [1, {'2': [3]}]
    """
    if type(value) in (list, tuple):
        return [plain(one) for one in value]
    if type(value) is dict:
        found = {str(key) if type(key) is int and abs(key) < 1 << 64 else key: plain(one) for key, one in value.items()}
        return found if len(found) == len(value) else object()  # {1: ..., "1": ...} is nothing that JSON could ask for
    return value


# ------------------------------------------------------------------------------------------------------------ extraction


def last_block(completion: str, language: str = "python") -> str | None:
    """The text of the last fenced block (CommonMark 4.5) that is tagged with the language or not tagged; None without one.

    A block that the completion never closes counts: it ends where the model was cut off.

    >>> last_block("```py\\na\\n```\\n```text\\nb\\n```\\n")
    'a\\n'
    >>> last_block("~~~\\n```\\nx\\n```\\n~~~")
    '```\\nx\\n```\\n'
    >>> last_block("text"), last_block("```python\\ncut o")
    (None, 'cut o\\n')
    """
    wanted = ("", *ALIASES.get(language, (language,)))
    found = [body for tag, body in blocks(completion) if tag in wanted]
    return found[-1] if found else None


def blocks(completion: str):
    """(tag, text) of each fenced block."""
    fence, tag, indent, body = "", "", 0, []
    for line in completion.split("\n"):
        stripped = line.lstrip(" ")
        mark = stripped[: len(stripped) - len(stripped.lstrip(stripped[:1]))] if stripped[:1] in ("`", "~") else ""
        room = len(line) - len(stripped)
        rest = stripped[len(mark) :].strip()
        if fence:
            if mark.startswith(fence) and not rest and room < 4:
                yield tag, "".join(body)
                fence = ""
            else:
                body.append(line[min(indent, room) :] + "\n")
        elif len(mark) >= 3 and room < 4 and not (mark[0] == "`" and "`" in rest):
            fence, tag, indent, body = mark, rest.split()[0].strip("{}.").lower() if rest else "", room, []
    if fence:
        yield tag, "".join(body)
