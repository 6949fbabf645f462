"""Prints as JSON what the NVIDIA driver says of this machine's cards. A script of its own that needs nothing but Python:

    python -I -S nvml.py

Whoever loads a card's library holds on to it, so nobody does but this process, which ends. It decides nothing: `accelerator.py`
does. A card that is cut into slices (MIG) is listed with them.
"""

from __future__ import annotations

import ctypes
import json
from typing import Any

LIBRARY = "libnvidia-ml.so.1"


class Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Refused(Exception):
    """A call that NVML refused."""


def call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    status = getattr(library, name)(*arguments)
    if status:
        library.nvmlErrorString.restype = ctypes.c_char_p
        raise Refused(f"{name}: {(library.nvmlErrorString(status) or b'').decode()}")


def number(library: ctypes.CDLL, name: str, *arguments: Any) -> int:
    value = ctypes.c_uint()
    call(library, name, *arguments, ctypes.byref(value))
    return value.value


def text(library: ctypes.CDLL, name: str, handle: Any) -> str:
    buffer = ctypes.create_string_buffer(128)
    call(library, name, handle, buffer, ctypes.c_uint(len(buffer)))
    return buffer.value.decode()


def memory(library: ctypes.CDLL, handle: Any) -> dict[str, int]:
    found = Memory()
    call(library, "nvmlDeviceGetMemoryInfo", handle, ctypes.byref(found))
    return {"total": found.total, "free": found.free}


def card(library: ctypes.CDLL, index: int) -> dict[str, Any]:
    handle, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    call(library, "nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
    call(library, "nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
    about = {"index": index, "sm": [major.value, minor.value], "slices": slices(library, handle)}
    return {**about, **identity(library, handle)}


def identity(library: ctypes.CDLL, handle: Any) -> dict[str, Any]:
    names = {"uuid": text(library, "nvmlDeviceGetUUID", handle), "name": text(library, "nvmlDeviceGetName", handle)}
    return {**names, **memory(library, handle)}


def slices(library: ctypes.CDLL, handle: Any) -> list[dict[str, Any]] | None:
    """Return the slices of a card, or None where it is whole."""
    current, pending = ctypes.c_uint(), ctypes.c_uint()
    if library.nvmlDeviceGetMigMode(handle, ctypes.byref(current), ctypes.byref(pending)) or not current.value:
        return None
    found = []
    for index in range(number(library, "nvmlDeviceGetMaxMigDeviceCount", handle)):
        one = ctypes.c_void_p()
        if not library.nvmlDeviceGetMigDeviceHandleByIndex(handle, ctypes.c_uint(index), ctypes.byref(one)):
            found.append(identity(library, one))
    return found


def look() -> dict[str, Any]:
    """Return {driver, cuda, cards}, or {error} where there is no driver to ask."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        return {"error": f"no NVIDIA driver ({error})"}
    try:
        call(library, "nvmlInit_v2")
        version, cuda = ctypes.create_string_buffer(96), ctypes.c_int()
        call(library, "nvmlSystemGetDriverVersion", version, ctypes.c_uint(len(version)))
        call(library, "nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))
        count = number(library, "nvmlDeviceGetCount_v2")
        cards = [card(library, index) for index in range(count)]
    except Refused as error:
        return {"error": str(error)}
    return {"driver": version.value.decode(), "cuda": [cuda.value // 1000, cuda.value % 1000 // 10], "cards": cards}


if __name__ == "__main__":
    print(json.dumps(look()))
