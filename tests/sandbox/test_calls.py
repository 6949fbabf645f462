"""Functions of a program are called with plain data and return plain data, or a reason."""

from __future__ import annotations

import pytest

from selfkd.sandbox import Foreign, Limits, Sandbox, tiers

pytestmark = pytest.mark.skipif(tiers.host().tier < 1, reason=f"this host has {tiers.host().walls}")
MB = 1 << 20
BOX = Sandbox(Limits(seconds=10, memory=256 * MB))
SHORT = Sandbox(Limits(seconds=0.4))


def test_functions_return_plain_data_of_exact_types() -> None:
    values = [
        None,
        True,
        0,
        -(2**70),
        1.5,
        float("inf"),
        "ü\ud800",
        b"\0",
        [1],
        (1,),
        {1},
        frozenset({1}),
        {1: {"a": ()}},
        2 - 1j,
    ]
    with BOX.calls("def same(x): return x\nclass Solution:\n  def m(self, a, b=1): return a + b") as program:
        for value in values:
            returned = program.call("same", value).value
            assert returned == value and type(returned) is type(value)
        assert program.call("Solution.m", 1, b=2).value == program.call("m", 1, b=2).value == 3
        nan = program.call("same", float("nan")).value
        assert nan != nan


def test_what_is_not_plain_data_equals_nothing() -> None:
    with BOX.calls(
        "class Any:\n  def __eq__(self, other): return True\n  __hash__ = None\n"
        "class I(int): pass\nclass S(str): pass\ndef f(k): return {'any': Any(), 'int': I(1), 'text': S('a'), 'code': f}[k]"
    ) as program:
        for key, kind in (("any", "__main__.Any"), ("int", "__main__.I"), ("text", "__main__.S"), ("code", "function")):
            value = program.call("f", key).value
            assert isinstance(value, Foreign) and value.kind == kind
            assert value != 1 and value != "a" and value != value


def test_a_call_that_ends_badly_costs_a_fresh_start_and_no_other_call() -> None:
    with SHORT.calls(
        "import os, sys\nn = 0\ndef count():\n  global n\n  n += 1\n  return n\ndef hang():\n  while True: pass\n"
        "def leave(): os._exit(0)\ndef raises(): sys.exit(0)\ndef shut(): os.close(3)\ndef big(): return 'x' * (3 << 20)\n"
        "def deep():\n  a = []\n  for _ in range(1000): a = [a]\n  return a\ndef loop():\n  a = []\n  a.append(a)\n  return a"
    ) as program:
        reasons = {
            "hang": "time limit (0.4 s)",
            "leave": "ended before it answered",
            "raises": "SystemExit: 0",
            "shut": "exit status 1: OSError: [Errno 9] Bad file descriptor",
            "big": "output limit (1 MB of output)",
            "deep": "ValueError: the value is nested more than 64 deep",
            "loop": "ValueError: the value is nested more than 64 deep",
            "none": "AttributeError: module '__main__' has no attribute 'none'",
        }
        assert [program.call("count").value for _ in range(2)] == [1, 2]
        for name, reason in reasons.items():
            returned = program.call(name)
            assert (returned.ok, returned.value, returned.reason) == (False, None, reason)
            assert program.call("count").ok


def test_a_program_that_cannot_be_loaded_is_started_once() -> None:
    with BOX.calls("import no_such_module") as program:
        for _ in range(3):
            assert program.call("f").reason == "ModuleNotFoundError: No module named 'no_such_module'"
        assert program.starts == 1
    with SHORT.calls("while True: pass") as program:
        assert program.call("f").reason == program.call("f").reason == "time limit (0.4 s)"
        assert program.starts == 1
