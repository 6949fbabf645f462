"""Only a program that computes the right data passes: no forgery does, no oddity freezes or crashes the reward."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from confined import USERS, ask
from forgeries import CALLS, FORGED_CALLS, FORGED_PRINTS, PRINTS
from scoring import results, row

from selfkd.backend.fake import Fake
from selfkd.backend.machine import Machine
from selfkd.chain.loop import walk
from selfkd.chain.run import Run
from selfkd.core.files import builtin_folder
from selfkd.core.user_module import load_module
from selfkd.errors import SandboxError
from selfkd.recipe.load import load
from selfkd.rewards.check import check_parameters, read_notes
from selfkd.rewards.find import find_function
from selfkd.rewards.load import load as load_reward
from selfkd.rewards.pool import close_idle_workers
from selfkd.sandbox import Sandbox, tiers

NEEDS_WALLS = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")
CODE = builtin_folder() / "reward/code.py"


@pytest.fixture(scope="module")
def code() -> ModuleType:
    return load_module(CODE)


def fenced(program: str) -> str:
    return f"Here it is:\n\n```python\n{program}\n```\n"


# ----------------------------------------------------------------------------------------------------------- forgeries


@NEEDS_WALLS
@pytest.mark.parametrize("tier", [2, 1])
@pytest.mark.parametrize("name", FORGED_CALLS)
def test_no_forged_return_passes(code: ModuleType, name: str, tier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at(code, tier, monkeypatch)
    value, why = code.code_tests(fenced(FORGED_CALLS[name]), CALLS, strict=True, seconds=1.0)
    assert value == 0.0 and why.startswith("0 of 4 tests; test 1: ") and len(why) < 400, why
    assert code.code_tests(fenced(FORGED_CALLS[name]), CALLS, seconds=0.3)[0] == 0.0


@NEEDS_WALLS
def test_a_second_report_that_comes_late_costs_the_call_it_falls_into(code: ModuleType) -> None:
    program = (
        "import os\ndef f(x):\n  b = b'{\"id\":%d,\"value\":%d}' % (x + 1, x * x + 7)\n  os.write(3, len(b).to_bytes(4, 'big') + b)\n"
        "  return x * x + 7"
    )
    value, why = code.code_tests(fenced(program), CALLS)
    assert value < 1.0 and "malformed report" in why


@NEEDS_WALLS
@pytest.mark.parametrize("tier", [2, 1])
@pytest.mark.parametrize("name", FORGED_PRINTS)
def test_no_forged_output_passes(code: ModuleType, name: str, tier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    at(code, tier, monkeypatch)
    value, why = code.code_tests(fenced(FORGED_PRINTS[name]), PRINTS, strict=True, seconds=1.0)
    assert value == 0.0 and why.startswith("0 of 4 tests; test 1: "), why


@NEEDS_WALLS
@pytest.mark.parametrize("who", [who for who in USERS if who != "root"])
def test_no_forgery_passes_where_an_ordinary_user_runs_it(who: str) -> None:
    found = ask(who, "nothing", "forgeries")
    assert len(found) == 2 * (len(FORGED_CALLS) + len(FORGED_PRINTS) + 2)
    assert [name for name, value in found.items() if value != float("honest" in name)] == []


def at(code: ModuleType, tier: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if tier > tiers.host().tier:
        pytest.skip("this host has no such tier")
    monkeypatch.setattr(code, "Sandbox", lambda *a, **k: Sandbox(*a, **k, tier=tier))


@NEEDS_WALLS
def test_honest_programs_pass(code: ModuleType) -> None:
    assert code.code_tests(fenced("def f(x): return x * x + 7"), CALLS) == (1.0, "4 of 4 tests")
    assert code.code_tests(fenced("n = int(input())\nprint(n * n + 7)"), PRINTS) == (1.0, "4 of 4 tests")
    assert code.code_tests(fenced("n = int(input())\nprint(n * n + 7 if n < 3 else 0)"), PRINTS) == (
        0.75,
        "3 of 4 tests; test 4: wrong output: 0",
    )


HOSTILE_DATA = {
    "infinity for close": ("def f(x): return float('inf')", ["assert isclose(f(2), 3.14)", "assert math.isclose(f(3), 9.86, rel_tol=1e-3)"]),
    "complex infinity for close": ("def f(x): return complex(float('inf'), 0)", ["assert isclose(f(2), 3.14)"]),
    "a number of thousands of digits": ("def f(x): return 1 << 20000", ["assert f(1) == 3", {"call": "f", "args": [1], "returns": 3}]),
    "the same as a key": ("def f(x): return {1 << 20000: 1}", [{"call": "f", "args": [1], "returns": {"1": 1}}]),
    "two keys that JSON cannot tell apart": ("def f(x): return {1: 0, '1': 2}", [{"call": "f", "args": [1], "returns": {"1": 2}}]),
    "hashes that collide, in a list": ("def f(x): return [i * (2**61 - 1) for i in range(33000)]", ["assert set(f(1)) == {1}"]),
    "hashes that collide, in a set": ("def f(x): return {i * (2**61 - 1) for i in range(3000)}", ["assert f(1) == {1}"]),
    "keys that collide, in dicts for pairs": (
        "def f(x):\n  P = 2**61 - 1\n  return [{P * i: 1, 0: i} for i in range(1, 16000)]", ["assert dict(f(1)) == {1: 1}"],
    ),
    "many members, one wanted": ("def f(x): return {(i, i * 7) for i in range(20000)}", ["assert f(1) == {(1, 2)}"]),
    "an object that is true": ("def f(x): return f", ["assert f(1)", "assert not f(1)", "assert bool(f(1))", "assert f(1) or False"]),
    "control signs for a name": (
        "import os\ndef f(x):\n  b = b'{\"id\":%d,\"value\":[\"?\",\"\\\\ud800\\\\u001b[2J\\\\n\"]}' % x\n"
        "  os.write(3, len(b).to_bytes(4, 'big') + b); os._exit(0)", ["assert f(1) == 3"],
    ),
    "text that holds the answer's letters": ("def f(x): return 'a bad word'", ["assert 'bad' not in f(1)"]),
    "a rounding without end": ("def f(x): return -3000000", ["assert round(123456, f(1)) == 0"]),
}  # fmt: skip


@NEEDS_WALLS
@pytest.mark.parametrize("name", HOSTILE_DATA)
def test_hostile_data_is_a_wrong_answer_and_never_a_missing_score(code: ModuleType, name: str) -> None:
    program, tests = HOSTILE_DATA[name]
    for test in tests:
        began = time.process_time()
        value, why = code.code_tests(fenced(program), [test], exact=False, tolerance=1e-6)
        assert value == 0.0 and why.startswith("0 of 1 tests; test 1: "), (test, value, why)
        assert why.isprintable() and why.encode() and time.process_time() - began < 3


@NEEDS_WALLS
def test_asserts_mean_what_python_means_by_them(code: ModuleType) -> None:
    program = fenced("def f(x): return x")
    right = [
        "(f(1) and 5) == 5",
        "(f(0) or 5) == 5",
        "'b' in f('abc')",
        "f(3) in (1, 3)",
        "4 not in f([1])",
        "len(f([1, 2])) == 2",
    ]
    right += [
        "f(2) > 1",
        "1 < f(2) <= 2",
        "f([1, [2]])[1][0] == 2",
        "not f(0)",
        "f(-1) == -1",
        "set(f([1, 1])) == {1}",
        "f(2) - 1 == 1",
    ]
    right += [
        "f(x=3) == 3",
        "sorted(f([2, 1])) == [1, 2]",
        "f({'a': (1,)}) == {'a': (1,)}",
        "f(None) is None",
        "round(f(2.5678), 2) == 2.57",
    ]
    assert code.code_tests(program, [f"assert {one}" for one in right])[1] == f"{len(right)} of {len(right)} tests"
    wrong = [
        "(f(1) and 5) == 1",
        "'d' in f('abc')",
        "f(3) in (1, True)",
        "f(1) == True",
        "f((1,)) == [1]",
        "f(1) == 1.0",
        "len(f(1)) == 1",
    ]
    assert code.code_tests(program, [f"assert {one}" for one in wrong])[0] == 0.0


@NEEDS_WALLS
def test_no_reason_quotes_an_expected_answer(code: ModuleType) -> None:
    secret = "the-hidden-answer"
    tests = [{"input": "x", "output": secret}, {"call": "f", "args": [1], "returns": secret}, f"assert f(2) == {secret!r}"]
    for program in ("def f(x): return 'no'\nprint('no')", "1 / 0", "print(1)", "def f(x): raise ValueError(x)"):
        for strict in (True, False):
            value, why = code.code_tests(fenced(program), tests, strict=strict)
            assert value == 0.0 and secret not in why


# ------------------------------------------------------------------------------------------------------------- completions


@pytest.mark.parametrize(
    ("completion", "block"),
    [
        ("", None),
        ("no code here", None),
        ("```python\na\n```", "a\n"),
        ("```python\na\n```\ntext\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```\nb\n```", "b\n"),
        ("```python\na\n```\n```bash\nb\n```", "a\n"),
        ("```Python title=x\na\n```", "a\n"),
        ("```{.python}\na\n```", "a\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("~~~py\na\n~~~", "a\n"),
        ("  ```python\n  a\n    b\n  ```", "a\n  b\n"),
        ("    ```python\n    a\n    ```", None),
        ("```python\na\nb", "a\nb\n"),
        ("`` x ``` y", None),
        ("```python a```", None),
        ("```bash\na\n```", None),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
    ],
)
def test_the_last_block_of_the_language_is_the_program(code: ModuleType, completion: str, block: str | None) -> None:
    assert code.last_block(completion) == block


ODD_COMPLETIONS = {
    "": "no python block in the completion",
    "no code": "no python block in the completion",
    "```python\n```": "0 of 1 tests; test 1: printed nothing",
    "```python\n" + "x = 1\n" * 900_000 + "```": "the program has 5400000 bytes, the limit is 1000000",
    "```python\nprint('\0')\n```": "0 of 1 tests; test 1: exit status 1: SyntaxError: source code string cannot contain null bytes",
    "```python\nprint('\ud800')\n```": "SyntaxError",
    "```python\nprint(7\n```": "SyntaxError",
    "```python\nimport sys; sys.stdout.buffer.write(b'\\xff\\xfe')\n```": "wrong output: ��",
}


@NEEDS_WALLS
@pytest.mark.parametrize("completion", ODD_COMPLETIONS)
def test_an_odd_completion_is_a_zero_with_its_reason(code: ModuleType, completion: str) -> None:
    value, why = code.code_tests(completion, [{"input": "", "output": "7"}])
    assert value == 0.0 and ODD_COMPLETIONS[completion] in why, why


# ------------------------------------------------------------------------------------------------------------------ tests


@NEEDS_WALLS
def test_every_form_of_tests_is_understood(code: ModuleType) -> None:
    method = fenced("class Solution:\n    def add(self, a, b):\n        return a + b")
    plain = fenced("def add(a, b):\n    return a + b")
    forms = [
        [{"call": "add", "args": [3, 4], "returns": 7}],
        [{"call": "add", "kwargs": {"a": 3, "b": 4}, "returns": 7}],
        {"inputs": [[3, 4], [[1], [2]]], "outputs": [7, [[1, 2]]], "fn_name": "add"},
        json.dumps({"inputs": [[3, 4]], "outputs": [[7]], "fn_name": "add"}),
        "assert add(3, 4) == 7",
        ["assert add([1], [2]) == [1, 2]", "assert 7 == add(3, 4) and add(1, 1) > 1", "assert not add(0, 0)"],
    ]
    for tests in forms:
        assert code.code_tests(plain, tests)[0] == 1.0, tests
        assert code.code_tests(method, tests)[0] == 1.0, tests
    functional = [{"input": "3\n4", "output": "7", "testtype": "functional"}]
    assert code.code_tests(method, functional, entry_point="add")[0] == 1.0
    printing = fenced("print(sum(int(input()) for _ in range(2)))")
    for tests in ({"inputs": ["3\n4\n"], "outputs": ["7\n"]}, {"inputs": [["3", "4"]], "outputs": [["7"]]}):
        assert code.code_tests(printing, tests)[0] == 1.0, tests


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ([], "there are no tests"),
        ("[torn", "Expecting"),
        ([{"input": "1"}], "test 1 has neither input and output (texts) nor call and returns"),
        ([{"input": 1, "output": "1"}], "test 1 has neither"),
        ([7], "test 1 is neither a mapping nor an assert"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs but 0 outputs"),
        ([{"input": "1", "output": "1", "testtype": "functional"}], "test 1 calls a function, but there is no entry_point"),
        (["assert f(1) == 1; import os"], "test 1 is not one assert"),
        (["assert True"], "test 1 calls nothing"),
        (["assert f(x) == 1"], "test 1 names 'x', which is nothing here"),
        (["assert f(1) == math.pi"], "test 1 names 'math.pi', which is nothing here"),
        (["assert f(**{'a': 1}) == 1"], "test 1 unpacks a mapping"),
        (["assert f(1) == [x for x in (1,)]"], "test 1 holds what cannot be checked from outside: [x for x in (1,)]"),
        (["assert f(1) == 'a' * 10 ** 9"], "test 1 holds what cannot be checked from outside"),
        (["assert __import__('os').system('true') == f(1)"], "one function only, the program's"),
        (["assert f(" + "(" * 5000 + ")" * 5000 + ") == 1"], "test 1 is not one assert"),
    ],
)
def test_tests_that_are_none_are_an_error_of_the_data_and_no_zero(code: ModuleType, tests: Any, reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        code.code_tests(fenced("print(1)"), tests)
    assert reason in str(caught.value)


@NEEDS_WALLS
def test_types_are_exact_unless_told_otherwise(code: ModuleType) -> None:
    def score(program: str, test: Any, **more: Any) -> float:
        value: float = code.code_tests(fenced(f"def f(x): return {program}"), [test], **more)[0]
        return value

    three = {"call": "f", "args": [3], "returns": 3}
    assert [score(text, three) for text in ("x", "float(x)", "x == 3", "str(x)", "x + 0j")] == [1, 0, 0, 0, 0]
    assert [score(text, three, exact=False) for text in ("x", "float(x)", "x == 3")] == [1, 1, 0]
    pair = {"call": "f", "args": [1], "returns": [1, {"2": 3}]}
    assert [score(text, pair) for text in ("(x, {2: 3})", "[True, {2: 3}]", "[x, {'2': 3}]")] == [1, 0, 1]
    assert [score("(1,)", "assert f(1) == [1]", exact=exact) for exact in (True, False)] == [0, 1]
    assert score("1 / 3", {"call": "f", "args": [1], "returns": 0.3333}, tolerance=1e-3) == 1
    assert score("1 / 3", {"call": "f", "args": [1], "returns": 0.3333}) == 0
    assert score("float('nan')", {"call": "f", "args": [1], "returns": 0.3}, tolerance=1e9) == 0
    prints = fenced("print('a', 0.33331)")
    assert [code.code_tests(prints, [{"input": "", "output": "a 0.3333"}], tolerance=t)[0] for t in (0.0, 1e-3)] == [0, 1]


@NEEDS_WALLS
def test_a_hang_costs_its_test_and_the_budget_ends_the_rest(code: ModuleType) -> None:
    program = fenced("n = int(input())\nwhile n == 1: pass\nprint(n)")
    tests = [{"input": str(n), "output": str(n)} for n in range(3)]
    assert code.code_tests(program, tests, seconds=0.3) == (2 / 3, "2 of 3 tests; test 2: time limit (0.3 s)")
    value, why = code.code_tests(fenced("while True: pass"), tests * 10, seconds=0.3, budget=0.5)
    assert (value, why) == (0.0, "0 of 30 tests; test 1: time limit (0.3 s)")
    value, why = code.code_tests(program, [*tests[1:2], *tests], seconds=0.3, budget=0.2)
    assert why == "0 of 4 tests; test 1: time limit (0.3 s)"
    began = time.monotonic()
    assert code.code_tests(fenced("while True: pass"), tests * 10, seconds=0.3, strict=True)[0] == 0.0
    assert time.monotonic() - began < 5, "strict stops at the first failure"


@NEEDS_WALLS
def test_rows_of_known_data_sets_become_prompts_and_tests(code: ModuleType) -> None:
    """The shapes are those of the hub's rows; the rows are ours."""
    mbpp = {
        "text": "Double it.",
        "code": "",
        "test_list": ["assert f(1) == 2", "assert f(0) == 0"],
        "test_setup_code": "import math",
    }
    sanitized = {"prompt": "Double it.", "test_imports": ["import math"], "test_list": mbpp["test_list"]}
    apps = {
        "question": "Double it.",
        "starter_code": "def f(x):",
        "input_output": '{"fn_name": "f", "inputs": [[1]], "outputs": [2]}',
    }
    bench = {
        "question_content": "Double it.", "starter_code": "class Solution:\n    def f(self, x):", "metadata": '{"func_name": "f"}',
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "functional"}]', "private_test_cases": "a pickle",
    }  # fmt: skip
    for raw in (mbpp, sanitized, apps, bench):
        found = code.row(raw)
        assert found.pop("prompt").startswith("Double it.\n")
        assert code.code_tests(fenced("class Solution:\n  def f(self, x): return 2 * x"), **found)[0] == 1.0
        assert code.code_tests(fenced("def f(x): return x"), **found)[0] < 1.0


# ----------------------------------------------------------------------------------------------------------- as a reward


@NEEDS_WALLS
def test_it_is_a_reward_like_others_in_worker_processes() -> None:
    function = find_function("reward/code.py:code_tests", [])
    assert check_parameters(function, ["tests"]) == []
    tests = json.loads(json.dumps(PRINTS))
    rows = [row(fenced("n = int(input())\nprint(n * n + 7)"), None, f"p{n}", tests=tests) for n in range(6)]
    rows += [row(fenced("while True: pass"), None, "p7", tests=tests), row("none", None, "p8", tests=[])]
    found = results(function, rows, timeout=30.0)
    assert found[:6] == [(1.0, "4 of 4 tests")] * 6
    assert found[6][0] == 0.0 and found[7] == (None, "ValueError: there are no tests")
    assert read_notes(function) == {"tier": tiers.host().tier, "walls": tiers.host().walls}
    close_idle_workers()


def test_on_a_host_without_walls_the_reward_is_unscored_with_one_line(
    code: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tiers.Host(
        0, "", 0, 57, ("tier 2: no Landlock in kernel 4.18", "tier 1: no Landlock in kernel 4.18"), "Get a newer kernel"
    )
    monkeypatch.setattr(tiers, "host", lambda: bare)
    reward = load_reward(CODE, "code_tests")
    [(value, why)] = reward.score([row(fenced("print(7)"), tests=[{"input": "", "output": "7"}])])
    assert value is None
    assert why.startswith(
        "SandboxError: this host cannot close the network to model-written code, so none is run: tier 2: no Landlock"
    )
    accepting = load_reward(CODE, "code_tests", {"unsafe": "I accept"})
    assert accepting.score([row(fenced("print(7)"), tests=[{"input": "", "output": "7"}])]) == [(1.0, "1 of 1 tests")]
    refusing = load_reward(CODE, "code_tests", {"unsafe": "yes"})
    assert refusing.score([row(fenced("print(7)"), tests=[{"input": "", "output": "7"}])])[0][0] is None


CHAIN = """
# A chain for tests: write programs, keep those that pass, learn.
name: programs
model: fake
rounds: 1
chunk: 8
prompts:
  train: {file: train.jsonl, prompt: question}
  dev: {file: dev.jsonl, prompt: question}
steps:
  - sample: {n: 2, temperature: 0.8, max_tokens: 64}
  - score: {reward: "reward/code.py:code_tests", params: {strict: true}, as: passed, timeout: 30}
  - select: {where: "passed = 1"}
  - train: {loss: sft}
  - measure: {reward: "reward/code.py:code_tests", timeout: 30}
"""


def program_of(messages: list[dict[str, str]], seed: int, skill: float) -> str:
    """A model that writes the right program two times in three, and else one that tries to pass without."""
    return fenced("print(int(input()) + 1)" if seed % 3 else "import os\nprint('passed', flush=True)\nos._exit(0)")


@NEEDS_WALLS
def test_a_chain_learns_from_programs_that_pass_and_records_the_walls(tmp_path: Path) -> None:
    ends = []
    for name in ("first", "second"):
        for split, count in (("train", 9), ("dev", 3)):
            rows = [
                {"question": f"{split}: print {n} + 1", "tests": [{"input": f"{n}", "output": f"{n + 1}"}]}
                for n in range(count)
            ]
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "programs.yaml").write_text(CHAIN)
        run = Run.open(load(str(tmp_path / "programs.yaml")), tmp_path / name, Machine(backend="fake"))
        walk(run, Fake(run.numerics, program_of), run.begin())
        ends.append(run.sealed()[-1].digest)
    assert ends[0] == ends[1]
    made = Run.at(tmp_path / "first").made(1)
    walls = {"tier": tiers.host().tier, "walls": tiers.host().walls}
    assert made["score"].notes["rewards"] == {"passed": walls}
    assert made["measure"].notes["rewards"] == {"code_tests": walls}
    kept = run.sealed()[-1].metrics
    assert 0 < kept["dev/code_tests"] <= 1


@NEEDS_WALLS
def test_an_error_of_the_host_is_no_verdict_about_a_program(code: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (SandboxError("no walls"), OSError(24, "Too many open files")):

        def broken(self: Sandbox, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(Sandbox, "site", broken)
        for test in (CALLS[0], PRINTS[0], "assert f(1) == 1"):
            with pytest.raises(type(error)):
                code.code_tests(fenced("def f(x): return 1"), [test])


@NEEDS_WALLS
def test_javascript_and_shell_programs_are_scored_too(code: ModuleType) -> None:
    if Path("/usr/bin/node").exists():
        completion = "```js\nconst n = +require('fs').readFileSync(0);\nconsole.log(n * n + 7)\n```"
        assert code.code_tests(completion, PRINTS, language="javascript", argv=["/usr/bin/node", "{program}.js"]) == (
            1.0,
            "4 of 4 tests",
        )
    completion = "```bash\nread n; echo $((n * n + 7))\n```"
    assert code.code_tests(completion, PRINTS, language="bash", argv=["/usr/bin/bash", "{program}"]) == (1.0, "4 of 4 tests")
