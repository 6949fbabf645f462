"""Running a check of the sandbox as somebody else, or on a host that lacks something: users, namespaces and Landlock for real.

`ask(who, lacking, check)` starts this file as a process that first gives up what is asked, and returns what the check found.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ORDINARY = 65534
USERS = ("root", "ordinary") if os.geteuid() == 0 else ("ordinary",)
PACKAGE = Path(__file__).parent.parent / "selfkd"
# What hosts refuse, as (x86_64, aarch64) numbers and errno: containers refuse namespaces like this; old kernels know no Landlock.
UNSHARE, LANDLOCK = ((272, 97), 1), ((444, 444), 38)
LACKING = {"namespaces": [UNSHARE], "landlock": [LANDLOCK], "nothing": []}


def ask(who: str, lacking: str, check: str) -> Any:
    """The result of a function of this file (`CHECKS`), run by a user of that kind on a host that lacks that."""
    with home() as folder:
        command = [str(folder / "python" / interpreter()), "-S", "-s", str(folder / "confined.py"), lacking, check]
        variables = {"PATH": os.environ["PATH"], "HOME": str(folder / "home"), "SELFKD_DEBUG": "1"}
        more: dict[str, Any] = (
            {"user": ORDINARY, "group": ORDINARY, "extra_groups": []} if (os.geteuid(), who) == (0, "ordinary") else {}
        )
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, cwd=folder, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def interpreter() -> str:
    return f"bin/{Path(os.path.realpath(sys.executable)).name}"


@contextmanager
def home() -> Iterator[Path]:
    """A folder that everybody may read: the package, this file, and a way to the interpreter, which may lie in root's home."""
    folder = Path(tempfile.mkdtemp(prefix="selfkd-confined-"))
    folder.chmod(0o755)
    shutil.copytree(PACKAGE / "sandbox", folder / "selfkd/sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "errors.py"):
        shutil.copyfile(PACKAGE / name, folder / "selfkd" / name)
    for name in ("confined.py", "forgeries.py"):
        shutil.copyfile(Path(__file__).with_name(name), folder / name)
    shutil.copytree(PACKAGE.parent / "reward", folder / "reward", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "home").mkdir()
    (folder / "home").chmod(0o777)
    (folder / "python").mkdir()
    bound = os.geteuid() == 0
    try:
        if bound:
            subprocess.run(["mount", "--bind", sys.base_prefix, str(folder / "python")], check=True)
        else:
            (folder / "python").rmdir()
            (folder / "python").symlink_to(sys.base_prefix)
        yield folder
    finally:
        if bound:
            subprocess.run(["umount", str(folder / "python")], check=True)
        shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------- in the other process


def refuse(lacking: str) -> None:
    """Make the kernel refuse these calls to us and all we start, by a small filter of our own."""
    from selfkd.sandbox import kernel as k
    from selfkd.sandbox import seccomp as s

    calls = LACKING[lacking]
    if not calls:
        return
    place = list(s.ARCHES).index(k.MACHINE)
    code = [(s.LOAD, 0, 0, 0)]
    for numbers, errno in calls:
        code += [(s.EQUAL, 0, 1, numbers[place]), s.refuse(errno)]
    if lacking == "namespaces":
        code += [(s.EQUAL, 0, 1, s.CLONE3), s.refuse(38)]
        code += s.if_call(s.CLONE[place], 0, [(s.SET, 0, 1, s.CLONE_NEW_NAMESPACES), s.refuse()])
    code += [(s.RETURN, 0, 0, s.ALLOW)]
    k.prctl("NO_NEW_PRIVS", k.NO_NEW_PRIVS, 1)
    k.install_filter(b"".join(struct.pack("=HBBI", *one) for one in code))


def host() -> Any:
    """What this host has, by trying."""
    from selfkd.sandbox import tiers

    found = tiers.host()
    assert tiers.host.__wrapped__() == found, "the note says something else"  # from the file this time
    return {"tier": found.tier, "lacks": found.lacks, "refusal": found.refusal, "attacks": found.attacks, "uid": os.geteuid()}


def through() -> Any:
    """For each tier, the attacks that got through."""
    from selfkd.sandbox import sites, tiers

    found = {}
    for tier in (2, 1, 0):
        results = tiers.results(sites.site(tier, sites.python_view(None)))
        found[tier] = [name for name, evidence in results.items() if evidence]
    return found


def bubble() -> Any:
    from selfkd.sandbox import sites, tiers

    results = tiers.results(sites.site(2, sites.python_view(None), shutil.which("bwrap") or ""))
    return {name: evidence for name, evidence in results.items() if evidence}


def limits() -> Any:
    """How bombs end at the best tier of this host."""
    from selfkd.sandbox import Limits, Sandbox

    box = Sandbox(Limits(seconds=20))
    programs = {
        # A bomb that goes on where the kernel says no; one that lets the error through may end by it before anybody looks.
        "forks": "import os\nwhile True:\n  try: os.fork()\n  except BlockingIOError: pass",
        "memory": "kept = []\nwhile True: kept.append(b'x' * (1 << 20))",
        "shared": "import os\nkept = []\nfor _ in range(6):\n  try: os.fork()\n  except BlockingIOError: pass\nwhile True: kept.append(b'x' * (1 << 20))",
        "daemon": "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\nif os.fork(): os._exit(0)\ntime.sleep(1000)",
    }
    return {name: (done.ok, done.limit, done.reason) for name, text in programs.items() for done in [box.run(text)]}


def refusal() -> Any:
    """What a user meets who runs a program here, and with the words that accept it."""
    from selfkd.errors import SandboxError
    from selfkd.sandbox import Sandbox

    try:
        Sandbox().run("print(1)")
        said = ""
    except SandboxError as error:
        said = str(error)
    done = Sandbox(unsafe="I accept").run("print(1)")
    return {"said": said, "accepted": done.stdout, "tier": done.tier}


def forgeries() -> Any:
    """The score of each forged program, and of an honest one of either kind, at tiers 2 and 1."""
    import importlib.util

    from forgeries import CALLS, FORGED_CALLS, FORGED_PRINTS, HONEST_CALL, HONEST_PRINT, PRINTS

    from selfkd import sandbox

    folder = Path(__file__).parent / "reward"
    sys.path.append(str(folder))
    spec = importlib.util.spec_from_file_location("code_reward", folder / "code.py")
    assert spec and spec.loader
    code = importlib.util.module_from_spec(spec)
    sys.modules["code_reward"] = code
    spec.loader.exec_module(code)
    found = {}
    for tier in (2, 1):
        code.Sandbox = lambda *a, tier=tier, **k: sandbox.Sandbox(*a, **k, tier=tier)
        for programs, tests in (
            ({**FORGED_CALLS, "honest": HONEST_CALL}, CALLS),
            ({**FORGED_PRINTS, "honest": HONEST_PRINT}, PRINTS),
        ):
            for name, text in programs.items():
                value, _ = code.code_tests(f"```python\n{text}\n```", tests, strict=True, seconds=1.0)
                found[f"{tier} {len(programs)} {name}"] = value
    return found


CHECKS = {one.__name__: one for one in (host, through, bubble, limits, refusal, forgeries)}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    refuse(sys.argv[1])
    print(json.dumps(CHECKS[sys.argv[2]]()))
