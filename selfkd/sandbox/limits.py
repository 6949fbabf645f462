"""What a program may use. Knows nothing of how a limit is kept."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from selfkd.errors import UsageError
from selfkd.sandbox.walls import KernelLimits

MB = 1 << 20
MAX_NUMBER = 1 << 50  # of bytes, processes or files; what is larger does not fit into the kernel's own numbers
MAX_SECONDS = 1e6


@dataclass(frozen=True)
class Limits:
    """What a program may use, its processes together. Sizes in bytes, times in seconds.

    `seconds` of wall time; `cpu` of processor time (None: as many as `seconds`); `memory` that is resident; `address_space` of
    each process (None: no such limit), which a Python program meets as a MemoryError; `processes` and threads; open `files`;
    `file_size` of one file; `disk` of the working directory; `output` on both streams, or of one returned value.
    """

    seconds: float = 10.0
    cpu: float | None = None
    memory: int = 512 * MB
    address_space: int | None = 1024 * MB
    processes: int = 32
    files: int = 64
    file_size: int = 16 * MB
    disk: int = 64 * MB
    output: int = MB

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = MAX_SECONDS if name in ("seconds", "cpu") else MAX_NUMBER
            if value is not None and not 0 < value < most:
                raise UsageError(f"a limit is a positive number, not {value}", f"Limits.{name}")

    def for_kernel(self, cpu: float | None = None) -> KernelLimits:
        """Return the limits that the warden keeps; its owner keeps the others. `cpu` is the default where none was set."""
        return {
            "cpu": self.cpu or cpu or self.seconds,
            "memory": self.memory,
            "address_space": self.address_space,
            "processes": self.processes,
            "files": self.files,
            "file_size": self.file_size,
            "disk": self.disk,
        }
