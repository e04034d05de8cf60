"""The GPUs that are here, by the driver's own library: torch must not be imported before its numerics are fixed.

Place in the path: below run and preflight. Without the library nothing is named.

Example:
    >>> cards()
    [Card(name='NVIDIA H200', memory_bytes=150754820096)]
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple


class Card(NamedTuple):
    """One GPU."""

    name: str
    memory_bytes: int


class _Memory(ctypes.Structure):
    """`nvmlMemory_t`."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def cards() -> list[Card]:
    """All of them, in the driver's order.

    Source:  https://docs.nvidia.com/deploy/nvml-api/group__nvmlDeviceQueries.html
    """
    name, count, handle, memory = ctypes.create_string_buffer(96), ctypes.c_uint(), ctypes.c_void_p(), _Memory()
    found = []
    try:
        driver = ctypes.CDLL("libnvidia-ml.so.1")
        if driver.nvmlInit_v2() or driver.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return []
        for number in range(count.value):
            if driver.nvmlDeviceGetHandleByIndex_v2(number, ctypes.byref(handle)):
                continue
            driver.nvmlDeviceGetName(handle, name, len(name))
            driver.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            found.append(Card(name.value.decode(errors="replace"), memory.total))
    except (OSError, AttributeError):
        return []
    return found
