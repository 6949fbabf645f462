"""The Ray cluster of a run: one that is there (RAY_ADDRESS names it, or this process uses it already), or a private one.

A private cluster listens on loopback only, wants a token, has no dashboard and keeps its files in a short temporary folder
(Unix sockets have at most 107 bytes). It holds no data of the run: rows and weights go through files. When its driver
is killed, Ray's own processes go within about 4 s; `guardian.py` ends the rest.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from selfkd.backend.ray import guardian
from selfkd.backend.reported import Reported
from selfkd.errors import BackendError, SelfkdError, UsageError

POLL_SECONDS = 0.25  # how long one look at running calls waits; signals are handled in between
JOIN_SECONDS = 120.0
FETCH_SECONDS = 1800.0  # a result that is ready comes at once, unless the cluster hangs
STORE_BYTES = 200_000_000
SOCKET_ROOM = 60  # what Ray appends to its folder: /session_<date>_<time>_<pid>/sockets/plasma_store
TOKEN = secrets.token_hex(32)  # one for the life of this process: Ray reads it once
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
PRIVATE_ENVIRONMENT = {
    "RAY_AUTH_TOKEN": TOKEN,  # Ray 2.60 then asks every client for it; RAY_AUTH_MODE would be read too early, at the import
    # Ray's own switch for "no other machine": without it Ray turns 127.0.0.1 into the address of the machine and listens there.
    LOOPBACK_SWITCH: "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
    "RAY_worker_niceness": "0",  # 15 by default: engines and ranks would give way to all else on the machine
    "RAY_prestart_worker_first_driver": "0",  # else one idle process per core, which no actor of ours becomes
}
HOW_MANY_CARDS = "import ray; ray.init(log_to_driver=False); print(); print(int(ray.cluster_resources().get('GPU', 0)))"
WAYS_TO_JOIN = "Start that cluster, or unset RAY_ADDRESS to have a private one."


class Cluster:
    """A connection to Ray. `close` ends a private cluster with all its processes and files; it leaves a joined one, and does
    nothing to one that this process used before.
    """

    folder: Path | None
    _guardian: subprocess.Popen[bytes] | None

    def __init__(self, log: Path, cpus: int, threads: int, cards: int = 0, visible: str | None = None) -> None:
        """Join, or start one with so many cores and cards. `visible` is its CUDA_VISIBLE_DEVICES; None leaves it alone."""
        self.log, self.folder, self._guardian = log, None, None
        log.mkdir(parents=True, exist_ok=True)
        self.used = is_used()
        if not self.used and os.environ.get("RAY_ADDRESS"):
            self._join(threads)
        elif not self.used:
            order = {} if visible is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}
            self._start(cpus, cards, {"OMP_NUM_THREADS": str(threads), **order})

    def nodes(self) -> list[dict[str, float]]:
        """Return the resources of each living node, whoever uses them now."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def close(self) -> None:
        import ray

        if self.used:
            return
        ray.shutdown()
        if self._guardian is not None:
            with suppress(OSError):
                self._guardian.communicate(b".", timeout=5)
            self._guardian = None
        if self.folder is not None:
            self._keep_logs()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _join(self, threads: int) -> None:
        refuse_address(os.environ["RAY_ADDRESS"])
        with _quiet_import(self.log) as ray:
            try:
                variables = {"OMP_NUM_THREADS": str(threads)}
                ray.init(**_silent(), runtime_env={"env_vars": variables})
            except SelfkdError:
                raise  # asked to stop
            except Exception as error:
                raise BackendError(f"cannot join the Ray cluster: {error}", os.environ["RAY_ADDRESS"], WAYS_TO_JOIN) from error

    def _start(self, cpus: int, cards: int, variables: Mapping[str, str]) -> None:
        # Workers inherit the variables. A runtime environment would cost each of them 0.7 s.
        with _environment({**PRIVATE_ENVIRONMENT, **variables}), _quiet_import(self.log) as ray:
            self.folder = _short_folder()
            self._guardian = _watch(self.folder)
            try:
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=cards,
                    object_store_memory=STORE_BYTES,
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(self.folder),
                    **_silent(),
                )
                # It reads every log of the cluster again and again for a driver that wants none of it.
                ray._private.worker._global_node.kill_log_monitor(check_alive=False)
            except BaseException as error:
                self.close()
                if isinstance(error, SelfkdError) or not isinstance(error, Exception):
                    raise  # asked to stop
                fix = f"Ray's own log: {self.log / 'ray'}. `selfkd doctor` checks the machine; the backend `local` needs none."
                raise BackendError(f"a private Ray cluster did not start: {error}", "ray", fix) from error

    def _keep_logs(self) -> None:
        """Ray's logs move to the run; the rest of its folder is sockets."""
        assert self.folder is not None
        for session in self.folder.glob("session_*_*"):
            with suppress(OSError, shutil.Error):
                shutil.copytree(session / "logs", self.log / "ray", dirs_exist_ok=True, ignore=shutil.ignore_patterns("old"))


def is_used() -> bool:
    """Whether this process uses a cluster already."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


def is_private() -> bool:
    """Whether a run that begins now has a cluster of its own."""
    return not is_used() and not os.environ.get("RAY_ADDRESS")


def refuse_address(address: str) -> None:
    """Raise UsageError for an address that Ray takes and that is no cluster to join."""
    if address.startswith("ray://"):
        what = "is an address of Ray's client, which cannot reserve cards nor follow processes"
        raise UsageError(what, f"RAY_ADDRESS={address}", "Run selfkd on a node of that cluster, with RAY_ADDRESS=auto.")
    if address == "local":
        what = "starts a cluster that nobody cleans up after a kill"
        raise UsageError(what, f"RAY_ADDRESS={address}", "Unset RAY_ADDRESS to have a private cluster.")


def cards_to_join() -> int:
    """Return how many cards the cluster has that a run would join; asked in a process of its own where none is used yet."""
    if is_used():
        return int(sys.modules["ray"].cluster_resources().get("GPU", 0))
    refuse_address(os.environ["RAY_ADDRESS"])
    command = [sys.executable, "-c", HOW_MANY_CARDS]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=JOIN_SECONDS, check=True)
        return int(answer.stdout.split()[-1])
    except subprocess.TimeoutExpired:
        why = f"it did not answer within {JOIN_SECONDS:.0f} s"
    except subprocess.CalledProcessError as error:
        why = (error.stderr.strip().splitlines() or [f"status {error.returncode}"])[-1]
    raise BackendError(f"cannot join the Ray cluster: {why}", os.environ["RAY_ADDRESS"], WAYS_TO_JOIN)


def actor_class(kind: type, **options: Any) -> Any:
    """Make an actor class that Ray never restarts: a restarted actor would come back as its constructor left it."""
    import ray

    return ray.remote(max_restarts=0, max_task_retries=0, **options)(kind)


def result_of(call: Any, what: str, log: Path, seconds: float) -> Any:
    """Wait for a call and return its result; signals are handled meanwhile, and an error keeps its own type.

    BackendError says what hangs where there is no result after `seconds`.
    """
    import ray

    deadline = time.monotonic() + seconds
    while not ray.wait([call], timeout=POLL_SECONDS)[0]:
        if time.monotonic() > deadline:
            raise BackendError(f"{what} did not end within {seconds:.0f} s", str(log), "The log says more. Repeat the command.")
    try:
        return ray.get(call, timeout=FETCH_SECONDS)
    except Exception as error:
        cause = unwrapped(error)
        if isinstance(cause, SelfkdError):
            raise cause from None
        raise BackendError(
            f"{what} failed: {in_one_line(cause)}", str(log), "The log says more. Repeat the command."
        ) from error


def unwrapped(error: BaseException) -> BaseException:
    """Return the exception that was raised in the other process, with its own type; Ray wraps it in one of its own."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def in_one_line(error: BaseException) -> str:
    """Describe an error of Ray in one line: of its dozens the first one says what matters, or the last where no actor was made."""
    if isinstance(error, Reported):
        return str(error)
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", str(error)).splitlines() if line.strip()]
    text = (lines[-1] if "creation task" in lines[0] else lines[0]) if lines else "no message"
    return f"{type(error).__name__}: {text}"


def _silent() -> dict[str, Any]:
    return {"log_to_driver": False, "logging_level": logging.WARNING}


@contextmanager
def _quiet_import(log: Path) -> Iterator[Any]:
    """Import Ray so that it prints into a file instead of the terminal, and handles no SIGTERM: the run has a handler.

    For its messages about dead workers and for its handler Ray 2.60 has no option.
    """
    import ray

    logger = logging.getLogger("ray")
    logger.handlers = [logging.FileHandler(log / "ray.log", delay=True)]
    logger.propagate = False
    ray._private.worker.print_to_stdstream = lambda data, ignore_prefix=False: logger.warning("%s", "\n".join(data["lines"]))
    ray._private.utils.set_sigterm_handler = lambda handler: None
    _read_switch(ray)
    yield ray


def _read_switch(ray: Any) -> None:
    """Have Ray see its switch as it stands now: it reads it at its import, which may have been long before."""
    constants = ray._private.ray_constants
    constants.ENABLE_RAY_CLUSTER = constants.env_bool(LOOPBACK_SWITCH, sys.platform == "linux")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for what is started meanwhile. The token must not stay: rewards and model-written code inherit the rest."""
    before = {name: os.environ.get(name) for name in (*values, "RAY_AUTH_MODE")}
    os.environ.pop("RAY_AUTH_MODE", None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        if "ray" in sys.modules:
            _read_switch(sys.modules["ray"])  # a cluster that this process joins later may be elsewhere


def _short_folder() -> Path:
    """Make a new folder for Ray's sockets: in the system's temporary folder if the names stay short enough there, else in /tmp."""
    wanted = Path(tempfile.gettempdir())
    short = len(str(wanted)) + SOCKET_ROOM + len("/selfkd-12345678") < 107
    return Path(tempfile.mkdtemp(prefix="selfkd-", dir=wanted if short else "/tmp"))


def _watch(folder: Path) -> subprocess.Popen[bytes] | None:
    """Start the guardian, in a session of its own: Ctrl-C at the terminal must not reach it."""
    if not Path("/proc/self/stat").exists():
        return None
    command = [sys.executable, "-I", "-S", guardian.__file__, str(os.getpid()), str(folder)]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True)
