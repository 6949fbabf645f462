"""The code beside a Python program, behind the walls: it runs the program, or calls its functions and reports what they return.

Nothing here is trusted. The program can read and change all of this, and gains nothing: no expected answer, no other test
and no verdict is in this process. It imports nothing of selfkd, so that its text can also be given to another interpreter.

Frames on descriptor 3, each a length (4 bytes, big-endian) and a body. In, from the warden's owner, who is trusted: marshal of
(number, function, arguments, keywords). Out, to someone who trusts nothing: JSON, {"id": number, "value": ...} or
{"id": number, "error": "..."}. A value is null, true, a number, a text, or a list that begins with its kind (`encode`).
"""

import gc
import marshal
import os
import sys

CHANNEL = 3
MAX_DEPTH = 64
MAX_ERROR_CHARS = 300
HEAD_BYTES = 4
KIND_LETTERS = ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z"))


def main(kind: str, import_path: list) -> None:
    """Run a program and end. `kind` says what descriptor 3 is.

    `script`: the program's file. `calls`: a socket; the first frame is the program, the others are calls.
    """
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        errors = "backslashreplace" if fd == 2 else "strict"
        stream = open(fd, "w" if fd else "r", encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.argv = ["main.py"]
    sys.path += import_path
    if kind == "script":
        with open(CHANNEL, "rb") as file:
            source = file.read()
        finish(script(source))
    else:
        answer_calls()


def script(source):
    """Run the whole program and return its exit status, as an interpreter would give it."""
    try:
        run(source)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return int(left.code or 0) & 0xFF
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def finish(status):
    """Do what an interpreter does at its end: wait for threads, call exit functions, let go of the module, flush.

    Its own complete clean-up is left out: in a forked process it costs four times as much as all the rest.
    """
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        if "atexit" in sys.modules:
            sys.modules["atexit"]._run_exitfuncs()
        del sys.modules["__main__"]
        gc.collect()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        status = status or 120
    os._exit(status)


def run(source):
    """Run the program as `__main__`, as if the interpreter had been given its file, and return the module."""
    import builtins
    from _sitebuiltins import Quitter

    builtins.exit, builtins.quit = Quitter("exit", "Ctrl-D"), Quitter("quit", "Ctrl-D")
    module = type(sys)("__main__")
    module.__builtins__ = builtins
    module.__file__ = "main.py"
    sys.modules["__main__"] = module
    exec(compile(source, "main.py", "exec", dont_inherit=True), vars(module))
    return module


def answer_calls():
    """Load the program, then answer one call after another until the socket closes."""
    source = receive()
    module, failure = None, None
    try:
        module = run(source)
    except BaseException as error:
        failure = error_text(error)
    send(0, None, failure)
    while True:
        frame = receive()
        if frame is None:
            os._exit(0)  # nobody asks any more; what the program left for its end does not matter
        number, name, arguments, keywords = marshal.loads(frame)
        value, failure = None, None
        try:
            value = encode(find(module, name)(*arguments, **keywords), 0)
        except BaseException as error:
            failure = error_text(error)
        send(number, value, failure)


def find(module, name):
    """Return `f`, or `Solution.f` of a new instance; plain `f` finds it there too, as judges of contests do."""
    first, *rest = name.split(".")
    if not hasattr(module, first) and hasattr(module, "Solution"):
        first, rest = "Solution", [first, *rest]
    found = getattr(module, first)
    for part in rest:
        found = getattr(found() if isinstance(found, type) else found, part)
    return found


def error_text(error):
    """Return an error in one short line; its own text may be as hostile as the program."""
    try:
        text = str(error).strip().split("\n")[0]
    except BaseException:
        text = ""
    return (type(error).__name__ + (": " + text if text else ""))[:MAX_ERROR_CHARS]


def encode(value, depth):
    """Return the JSON text of a value with its exact type: no subclass passes for what it derives from."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise ValueError(f"the value is nested more than {MAX_DEPTH} deep")
    if value is None or kind is bool:
        return {None: "null", True: "true", False: "false"}[value]
    if kind is int:
        return str(value) if -(1 << 63) <= value < 1 << 63 else f'["i","{value:x}"]'
    if kind is float:
        return repr(value) if value - value == 0 else f'["f","{value!r}"]'
    if kind is str:
        return quoted(value)
    if kind is bytes:
        return f'["b","{value.hex()}"]'
    if kind is complex:
        return f'["c",{encode(value.real, depth)},{encode(value.imag, depth)}]'
    if kind is dict:
        pairs = ",".join(f"[{encode(key, depth + 1)},{encode(one, depth + 1)}]" for key, one in value.items())
        return f'["d",[{pairs}]]'
    for known, letter in KIND_LETTERS:
        if kind is known:
            return '["{}",[{}]]'.format(letter, ",".join([encode(one, depth + 1) for one in value]))
    return '["?",{}]'.format(quoted((kind.__module__ + "." + kind.__qualname__).replace("builtins.", "")[:MAX_ERROR_CHARS]))


def quoted(text):
    from _json import encode_basestring_ascii

    return encode_basestring_ascii(text)


def send(number, value, failure):
    body = f'"value":{value or "null"}' if failure is None else f'"error":{quoted(failure)}'
    data = f'{{"id":{number},{body}}}'.encode()
    view = memoryview(len(data).to_bytes(HEAD_BYTES, "big") + data)
    while view:
        view = view[os.write(CHANNEL, view) :]


def receive():
    head = read_exactly(HEAD_BYTES)
    return None if head is None else read_exactly(int.from_bytes(head, "big"))


def read_exactly(count):
    parts = []
    while count:
        part = os.read(CHANNEL, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
