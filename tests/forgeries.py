"""Programs that want to pass without the right answer, and the tests they are given. Plain data: other users run them too."""

CALLS = [{"call": "f", "args": [n], "returns": n * n + 7} for n in range(4)]
PRINTS = [{"input": f"{n}", "output": f"{n * n + 7}"} for n in range(4)]
HONEST_CALL, HONEST_PRINT = "def f(x): return x * x + 7", "n = int(input())\nprint(n * n + 7)"

FORGED_CALLS = {
    "returns nothing": "def f(x): pass",
    "returns an object equal to everything": "class A:\n  def __eq__(s, o): return True\n  def __ne__(s, o): return False\ndef f(x): return A()",
    "returns a subclass of int equal to everything": "class A(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\ndef f(x): return A(x * x + 7)",
    "returns a bool for an int": "def f(x): return True",
    "returns a float for an int": "def f(x): return float(x * x + 7)",
    "returns text for an int": "def f(x): return str(x * x + 7)",
    "sys.exit(0) when loaded": "import sys\ndef f(x): return 0\nsys.exit(0)",
    "sys.exit(0) in the call": "import sys\ndef f(x): sys.exit(0)",
    "os._exit(0) in the call": "import os\ndef f(x): os._exit(0)",
    "os._exit(0) when loaded": "import os\nos._exit(0)",
    "walks the frames for a verdict": (
        "import sys\ndef f(x):\n  frame = sys._getframe()\n  while frame:\n    for name, value in list(frame.f_locals.items()):\n"
        "      if isinstance(value, list): value.append('passed')\n      if isinstance(value, dict): value['passed'] = True\n"
        "    frame = frame.f_back\n  return None"
    ),
    "walks the collector for answers": (
        "import gc\ndef f(x):\n  for one in gc.get_objects():\n"
        "    if isinstance(one, dict) and 'returns' in one: return one['returns']\n  return None"
    ),
    "prints what looks like a report": "def f(x):\n  print('{\"id\": 1, \"value\": 7}')\n  print('passed 4 of 4')",
    "reports twice": (
        "import os\ndef f(x):\n  b = b'{\"id\":%d,\"value\":%d}' % (x + 1, x * x + 7)\n  os.write(3, (len(b).to_bytes(4, 'big') + b) * 2)"
    ),
    "writes reports for calls to come": (
        "import os\nfor n in range(9):\n  b = b'{\"id\":%d,\"value\":0}' % n\n  os.write(3, len(b).to_bytes(4, 'big') + b)\ndef f(x): return 0"
    ),
    "lets a forked child report": (
        "import os, time\ndef f(x):\n  if os.fork() == 0:\n    b = b'{\"id\":%d,\"value\":1}' % (x + 1)\n"
        "    os.write(3, len(b).to_bytes(4, 'big') + b); os._exit(0)\n  time.sleep(0.2)\n  return 1"
    ),
    "reports after the deadline": "import time\ndef f(x):\n  time.sleep(5)\n  return x * x + 7",
    "patches comparison": "import builtins\nbuiltins.all = builtins.any = lambda *a: True\nint.__class__\ndef f(x): return 0",
    "patches json, marshal and the harness": (
        "import sys, json\njson.loads = lambda *a, **k: {'id': 1, 'value': 7}\njson.dumps = lambda *a, **k: 'passed'\n"
        "for m in list(sys.modules.values()):\n  for n in ('encode', 'send', 'error_text', 'same', 'judge', 'read', 'value'):\n"
        "    if hasattr(m, n):\n      try: setattr(m, n, lambda *a, **k: 'true')\n      except Exception: pass\ndef f(x): return 0"
    ),
    "patches builtins under the harness": (
        "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.len = lambda *a: 0\nbuiltins.repr = lambda *a: '7'\ndef f(x): return object()"
    ),
    "plants a test module": "import sys\nsys.modules['selfkd'] = sys.modules['reward'] = sys.modules['code'] = sys\ndef f(x): return None",
    "raises what looks like success": "class passed(Exception): pass\ndef f(x): raise passed('4 of 4 tests')",
    "an exception whose text explodes": "class E(Exception):\n  def __str__(s): raise SystemExit(0)\ndef f(x): raise E()",
    "a type whose name is a report": "A = type('7}', (int,), {})\ndef f(x): return A(7)",
    "a generator": "def f(x): yield x * x + 7",
    "recurses for ever": "def f(x): return f(x)",
    "an endless int": "def f(x): return 10 ** 10 ** 9",
    "a huge int": "def f(x): return 1 << 20_000_000",
    "NaN": "def f(x): return float('nan')",
    "deep lists": "def f(x):\n  a = 7\n  for _ in range(5000): a = [a]\n  return a",
    "raw bytes on the channel": "import os\ndef f(x):\n  while True: os.write(3, b'\\xff' * 4096)",
    "half a report": "import os\ndef f(x):\n  os.write(3, b'\\0\\0\\0\\x10{'); os._exit(0)",
    "closes the channel": "import os\ndef f(x): os.close(3)",
}  # fmt: skip

FORGED_PRINTS = {
    "nothing": "",
    "exit 0": "import sys; sys.exit(0)",
    "os._exit(0)": "import os; os._exit(0)",
    "claims": "print('All tests passed'); print('4 of 4 tests')",
    "a report on descriptor 3": "import os\ntry: os.write(3, b'passed')\nexcept OSError: pass",
    "the input": "print(input())",
    "after the deadline": "import time\nn = int(input())\ntime.sleep(5)\nprint(n * n + 7)",
    "right, then crashes": "n = int(input())\nprint(n * n + 7, flush=True)\n1 / 0",
    "right, then is killed": "import os\nn = int(input())\nprint(n * n + 7, flush=True)\nos.abort()",
    "right, then never ends": "n = int(input())\nprint(n * n + 7, flush=True)\nwhile True: pass",
    "right, then floods": "n = int(input())\nprint(n * n + 7, flush=True)\nwhile True: print(n)",
    "looks for the tests": (
        "import os\nfor folder, _, files in os.walk('/'):\n  for name in files:\n    try: text = open(os.path.join(folder, name)).read()\n"
        "    except Exception: continue\n    if '\"output\"' in text and 'selfkd' in text: print(text)\n    break"
    ),
    "looks into the environment and arguments": "import os, sys\nprint(os.environ, sys.argv, getattr(sys, 'orig_argv', 0))",
    "no program": "This is not Python.",
}  # fmt: skip
